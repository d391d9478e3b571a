"""Public sets that pretrained models are fine-tuned to: sentences, pairs of them, and words with tags."""

from llmfound.data.batching import _ordered
from llmfound.data.sets import _known, _published
from llmfound.data.text import _up_to_the_last, fetch, read_lines

RTE_CLASSES = ("entailment", "not_entailment")
_BINARY = ("0", "1")
_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_STANFORD = {"-lrb-": "(", "-rrb-": ")", "\\/": "/", "\\*": "*"}  # how a parser wrote what GLUE has plain


def sst2(split="train", folder=None):
    """SST-2: sentences of film reviews, 67,349 train, most of them parts of sentences, 872 dev and 1,821 test.

    GLUE keeps the labels of its test sentences. Those here come from the Stanford Sentiment Treebank itself, brackets
    and slashes as in GLUE; but for the spelling of six words, they are GLUE's sentences. Source: Socher et al. 2013;
    Wang et al. 2019.

    Args:
        split: "train", "dev" or "test".
        folder: where the files are, sst2/train.tsv.gz and sst/binary.test.txt.gz, or SST-2/train.tsv and
            stsa.binary.test as published; None takes LLMFOUND_DATA.

    Returns:
        The sentences, list of str; and their classes, list of int, 1 being positive.

    Raises:
        ValueError: if a line has no label, naming it; and as `read_labelled`.
    """
    if _known(split, "train", "dev", "test") != "test":
        return read_labelled(_path("SST-2", split, folder), "sentence", "label", _BINARY)
    path = _published(folder, "stsa.binary.test") or fetch("sst/binary.test.txt.gz", folder)
    texts, labels = [], []
    for number, line in enumerate(read_lines(path), start=1):
        label, _, text = line.partition(" ")
        if label not in _BINARY or not text:
            raise ValueError(f"{path}, line {number}: a sentence after 0 or 1 is expected; got {line[:40]!r}.")
        for written, plain in _STANFORD.items():
            text = text.replace(written, plain)
        texts.append(text)
        labels.append(_BINARY.index(label))
    return texts, labels


def cola(split="train", folder=None):
    """CoLA: sentences of linguists, 8,551 train and 1,043 dev, of which 1 is acceptable English and 0 is not.

    Source: Warstadt, Singh, Bowman 2019, in GLUE's selection.

    Args:
        split: "train" or "dev".
        folder: where the files are, cola/train.tsv.gz, or CoLA/train.tsv as published; None takes LLMFOUND_DATA.

    Returns:
        The sentences, list of str; and their classes, list of int.

    Raises:
        ValueError: as `read_labelled`.
    """
    path = _path("CoLA", _known(split, "train", "dev"), folder)
    return read_labelled(path, "sentence", "label", _BINARY, _COLA_COLUMNS)


def mrpc(split="train", folder=None):
    """MRPC: pairs of sentences of the news, 3,668 train, 408 dev and 1,725 test, 1 if they say the same.

    Under a licence of Microsoft Research. Source: Dolan, Brockett 2005; train and dev divided as in GLUE.

    Args:
        split: "train", "dev" or "test".
        folder: where the files are, mrpc/train.tsv.gz, or MRPC/train.tsv, MRPC/dev.tsv and msr_paraphrase_test.txt as
            published (GLUE's own test.tsv has no labels); None takes LLMFOUND_DATA.

    Returns:
        The pairs, list of (str, str); and their classes, list of int.

    Raises:
        ValueError: as `read_labelled`.
    """
    if _known(split, "train", "dev", "test") == "test":
        path = _published(folder, "msr_paraphrase_test.txt") or fetch("mrpc/test.tsv.gz", folder)
    else:
        path = _path("MRPC", split, folder)
    return read_labelled(path, ("#1 String", "#2 String"), "Quality", _BINARY)


def stsb(split="train", folder=None):
    """STS-B: pairs of sentences, 5,749 train and 1,500 dev, and how alike they are, from 0 to 5, where they agree.

    Source: Cer et al. 2017, in GLUE's form.

    Args:
        split: "train" or "dev".
        folder: where the files are, stsb/train.tsv.gz, or STS-B/train.tsv as published; None takes LLMFOUND_DATA.

    Returns:
        The pairs, list of (str, str); and their scores, list of float.

    Raises:
        ValueError: as `read_labelled`.
    """
    path = _path("STS-B", _known(split, "train", "dev"), folder)
    return read_labelled(path, ("sentence1", "sentence2"), "score")


def rte(split="train", folder=None):
    """RTE: pairs of a text and a sentence, 2,490 train and 277 dev, 0 if the sentence follows from it (RTE_CLASSES).

    Source: Dagan et al. 2006 and later years, put together in GLUE.

    Args:
        split: "train" or "dev".
        folder: where the files are, rte/train.tsv.gz, or RTE/train.tsv as published; None takes LLMFOUND_DATA.

    Returns:
        The pairs, list of (str, str); and their classes, list of int.

    Raises:
        ValueError: as `read_labelled`.
    """
    path = _path("RTE", _known(split, "train", "dev"), folder)
    return read_labelled(path, ("sentence1", "sentence2"), "label", RTE_CLASSES)


def wnut17(split="train", folder=None):
    """WNUT-17: posts with names of six types, rare and new, 3,394 train, 1,009 dev and 1,287 test.

    Of the test posts, these are the labels that the shared task was scored with. Licence: CC BY 4.0.
    Source: Derczynski et al. 2017.

    Args:
        split: "train", "dev" or "test".
        folder: where the files are, wnut17/train.conll.gz, or wnut17train.conll, emerging.dev.conll and
            emerging.test.annotated as published; None takes LLMFOUND_DATA.

    Returns, errors: as `read_conll`.
    """
    names = {"train": "wnut17train.conll", "dev": "emerging.dev.conll", "test": "emerging.test.annotated"}
    path = _published(folder, names[_known(split, *names)])
    return read_conll(path or fetch(f"wnut17/{split}.conll.gz", folder))


def read_labelled(path, texts, label, classes=None, columns=None):
    """Texts, or pairs of them, and their labels from a tab-separated file, such as those of GLUE.

    Quotation marks stand for themselves. QNLI, for instance:
    read_labelled("QNLI/train.tsv", ("question", "sentence"), "label", ("entailment", "not_entailment"))

    Args:
        path: str or path; compression as in `read_lines`.
        texts: str, the column of the text; or two, of a pair.
        label: str, the column of the label; None for a file without labels, such as those that GLUE tests on.
        classes: iterable of str, what the labels may be. None: they are numbers.
        columns: sequence of str, the columns of a file that does not name them; None takes its first line.

    Returns:
        The texts, list of str, or of (str, str); and the labels, list of int, places in `classes`; without these
        list of int if every label is written as an integer, else of float; None without a column of labels.

    Raises:
        ValueError: if the file has no such column, or a line, but for empty ones at the end, has more or fewer columns
            or another label, naming the line; if `classes` are a set, which has no order; and as `read_lines`.
    """
    lines = list(enumerate(_up_to_the_last(read_lines(path)), start=1))
    classes = None if classes is None else _ordered(classes)
    if columns is None:
        columns = lines.pop(0)[1].split("\t")
    needed = [texts] if isinstance(texts, str) else list(texts)
    missing = [name for name in (*needed, *([] if label is None else [label])) if name not in columns]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(columns)}.")
    found, labels = [], []
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) != len(columns):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns instead of {len(columns)}: {line[:60]!r}.")
        row = dict(zip(columns, cells))
        found.append(row[texts] if isinstance(texts, str) else tuple(row[name] for name in needed))
        if label is None:
            continue
        try:
            labels.append(_number(row[label]) if classes is None else classes.index(row[label]))
        except ValueError as error:
            expected = "a number" if classes is None else f"one of {', '.join(classes)}"
            raise ValueError(f"{path}, line {number}: {label} must be {expected}; got {row[label]!r}.") from error
    if label is None:
        return found, None
    return found, list(map(float, labels)) if any(isinstance(value, float) for value in labels) else labels


def _number(text):
    try:
        return int(text)
    except ValueError:
        return float(text)


def read_conll(path):
    """Words and their tags, a word to a line and a blank line after each sentence, such as CoNLL-2003 and WNUT-17.

    The word is the first column of a line, the tag its last; tabs are between them, or else blanks. Lines that start
    with -DOCSTART- are left out; and so are, in a file with tabs, the comments of CoNLL-U: lines that start with "# "
    and have no tab. In a file without tabs these cannot be told from a word "#" and its tag, and are read as such.

    Args:
        path: str or path; compression as in `read_lines`.

    Returns:
        The sentences, list of lists of str; and the tags of their words, list of lists of str.

    Raises:
        ValueError: if a line has no word or no tag, naming it; and as `read_lines`.
    """
    sentences, tags, inside = [], [], False
    lines = read_lines(path)
    with_tabs = any("\t" in line.strip() for line in lines)
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            inside = False
            continue
        if with_tabs and line.startswith("# ") and "\t" not in line:
            continue
        cells = line.split("\t" if "\t" in line else " ")
        if len(cells) < 2 or not cells[0] or not cells[-1]:
            raise ValueError(f"{path}, line {number}: a word and its tag are expected; got {line[:40]!r}.")
        if not inside:
            sentences.append([])
            tags.append([])
            inside = True
        sentences[-1].append(cells[0])
        tags[-1].append(cells[-1])
    return sentences, tags


def _path(task, split, folder):
    """The file of a task of GLUE: in GLUE's own folder, or as hashed."""
    name = task.lower().replace("-", "")
    return _published(folder, f"{task}/{split}.tsv") or fetch(f"{name}/{split}.tsv.gz", folder)

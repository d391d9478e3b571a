"""Public sets of texts with classes, and of running text, as published or as hashed in `text.HASHES`."""

import csv
import json
import os
from pathlib import Path

from llmfound.data.text import BY_HAND, fetch, read_lines

AG_NEWS_CLASSES = ("World", "Sports", "Business", "Sci/Tech")
IMDB_CLASSES = ("neg", "pos")
TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def wikitext2(split="train", folder=None):
    """WikiText-2, word level: articles of Wikipedia, tokenized, with <unk> for rare words.

    In the usual perplexity, each line ends with one more token, end of sentence, and blank lines are such tokens alone:
    2,088,628 of train, 217,646 of valid and 245,569 of test. Licence: CC BY-SA 3.0. Source: Merity et al. 2016.

    Args:
        split: "train", "valid" or "test".
        folder: where the files are, wikitext-2/train.txt.xz or wiki.train.tokens; None takes LLMFOUND_DATA.

    Returns:
        list of str, the lines, without the blanks at either end.

    Raises:
        ValueError: if several sub-folders have wiki.train.tokens, and the name of none begins with wikitext-2.
    """
    name = f"wiki.{_known(split, 'train', 'valid', 'test')}.tokens"
    path = _published(folder, name, ("wikitext-2", "wikitext2"), ("wikitext-103", "wikitext103"))
    return [line.strip() for line in read_lines(path or fetch(f"wikitext-2/{split}.txt.xz", folder))]


def imdb(split="train", folder=None):
    """IMDb: reviews of films, 25,000 train and 25,000 test, half of them good, and 50,000 without classes, unsup.

    For research, with citation. Source: Maas et al. 2011.

    Args:
        split: "train", "test" or "unsup".
        folder: where the files are, imdb/train.jsonl.xz, or aclImdb as published; None takes LLMFOUND_DATA.

    Returns:
        The texts, list of str; and their classes, list of int, 1 being good, or of None.
    """
    _known(split, "train", "test", "unsup")
    published = _published(folder, "aclImdb")
    if published:
        kinds = dict(unsup=None) if split == "unsup" else dict(neg=0, pos=1)
        part = "train" if split == "unsup" else split
        found = [(path.read_text("utf-8"), label) for kind, label in kinds.items()
                 for path in sorted((published / part / kind).glob("*.txt"))]  # fmt: skip
        if not found:
            raise FileNotFoundError(f"{published} has no {part}/{'unsup' if split == 'unsup' else 'pos'}/*.txt.")
    else:
        rows = [json.loads(line) for line in read_lines(fetch(f"imdb/{split}.jsonl.xz", folder))]
        found = [(row["text"], row["label"]) for row in rows]
    texts, labels = zip(*found)
    return list(texts), list(labels)


def trec(split="train", folder=None):
    """TREC: questions by what they ask for, 5,452 train and 500 test, in six classes (TREC_CLASSES).

    Source: Li and Roth 2002.

    Args:
        split: "train" or "test".
        folder: where the files are, trec/train.label.gz, or train_5500.label as published; None takes LLMFOUND_DATA.

    Returns:
        The questions, list of str; and their classes, list of int.

    Raises:
        ValueError: if a line is not "CLASS:fine question".
    """
    name = {"train": "train_5500.label", "test": "TREC_10.label"}[_known(split, "train", "test")]
    path = _published(folder, name)
    if path:
        lines = path.read_text("latin-1").splitlines()
    else:
        lines = read_lines(fetch(f"trec/{split}.label.gz", folder))
    texts, labels = [], []
    for i, line in enumerate(lines, 1):
        kind, _, text = line.partition(" ")
        if kind.partition(":")[0] not in TREC_CLASSES:
            raise ValueError(f"Line {i} of {split} is no question with a class, but {line[:40]!r}.")
        labels.append(TREC_CLASSES.index(kind.partition(":")[0]))
        texts.append(text)
    return texts, labels


def ag_news(split="train", folder=None):
    """AG News: titles and first sentences of news, 120,000 train and 7,600 test, in four classes (AG_NEWS_CLASSES).

    For research that is not commercial. Source: Zhang, Zhao and LeCun 2015.

    Args:
        split: "train" or "test".
        folder: where the files are, ag_news_csv/train.csv as published, or ag_news/test.csv.xz, which is the test part
            alone; None takes LLMFOUND_DATA.

    Returns:
        The texts, list of str, title and description with a blank between them, as published, remains of escapes such
        as " #39;" included; and their classes, list of int.

    Raises:
        FileNotFoundError: if the part is not there.
        ValueError: if a row is not a class, a title and a description.
    """
    name = f"{_known(split, 'train', 'test')}.csv"
    path = _published(folder, f"ag_news_csv/{name}") or _published(folder, f"ag_news/{name}")
    if not path and split == "train":
        where = folder or os.environ.get("LLMFOUND_DATA") or "the folder that folder=... or LLMFOUND_DATA should name"
        raise FileNotFoundError(f"There is no ag_news_csv/train.csv in {where}. {BY_HAND['ag_news']}")
    path = path or fetch(f"ag_news/{name}.xz", folder)
    texts, labels = [], []
    for i, row in enumerate(csv.reader(read_lines(path)), 1):
        if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
            raise ValueError(f"Row {i} of {path} is not a class from 1 to 4, a title and a description, but {row}.")
        labels.append(int(row[0]) - 1)
        texts.append(" ".join(row[1:]))
    return texts, labels


def _known(split, *splits):
    if split not in splits:
        raise ValueError(f"split must be one of {', '.join(splits)}; got {split!r}.")
    return split


def _published(folder, name, own="", others=()):
    """The path of a file, or folder, of the authors, if it is there: in the folder itself, or in a sub-folder.

    Where the name does not tell the set, the sub-folders' names do: what they begin with, in lower case, if they are
    the set's `own`, which come first, or those of `others`, which are passed over.
    """
    folder = folder or os.environ.get("LLMFOUND_DATA")
    if not folder:
        return None
    if (Path(folder) / name).exists():
        return Path(folder) / name
    found = [path for path in sorted(Path(folder).glob(f"*/{name}"))
             if path.exists() and not path.parent.name.lower().startswith(others)]  # fmt: skip
    named = [path for path in found if path.parent.name.lower().startswith(own)]
    if len(found) > 1 and not named:
        raise ValueError(
            f"{folder} has {name} in {', '.join(path.parent.name for path in found)}, and none is called {own[0]}; "
            "give the folder of the set itself."
        )
    return next(iter(named or found), None)

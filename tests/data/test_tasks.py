"""Public sets to fine-tune on, in the form of their authors and in the form that is hashed."""

import numpy as np
import pytest
from test_sets import hashed

from llmfound.data import text
from llmfound.data.tasks import cola, mrpc, read_conll, read_labelled, rte, sst2, stsb, wnut17

pytestmark = pytest.mark.on_one_backend

MRPC = 'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said " no .\tNo , said he .\n0\t8\t9\tA .\tB .\n'
STSB_COLUMNS = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
RTE = "index\tsentence1\tsentence2\tlabel\n0\tIt\x85 rains.\tIt does.\tentailment\n1\tA.\tB.\tnot_entailment\n"
WNUT = "Redondo\tB-location\nBeach\tI-location\n.\tO\n\n\n😂\tO\n"
REVIEWS = "1 a -lrb- truly -rrb- good film\\/play .\n0 no. .\n"
SETS = {
    "sst2/train.tsv.gz": (sst2, "train", "SST-2/train.tsv", 'sentence\tlabel\n" hide new \t0\nit is\t1\n',
                          (['" hide new ', "it is"], [0, 1])),
    "sst/binary.test.txt.gz": (sst2, "test", "stsa.binary.test", REVIEWS,
                               (["a ( truly ) good film/play .", "no. ."], [1, 0])),
    "cola/dev.tsv.gz": (cola, "dev", "CoLA/dev.tsv", "gj04\t1\t\tHe went.\nbc01\t0\t*\tHim go.\n",
                        (["He went.", "Him go."], [1, 0])),
    "mrpc/train.tsv.gz": (mrpc, "train", "MRPC/train.tsv", MRPC,
                          ([('He said " no .', "No , said he ."), ("A .", "B .")], [1, 0])),
    "mrpc/test.tsv.gz": (mrpc, "test", "MRPC/msr_paraphrase_test.txt", "\ufeff" + MRPC,
                         ([('He said " no .', "No , said he ."), ("A .", "B .")], [1, 0])),
    "stsb/dev.tsv.gz": (stsb, "dev", "STS-B/dev.tsv", STSB_COLUMNS + "0\tg\tf\ty\t1\tn\tn\tA man.\tA plane.\t4.750\n",
                        ([("A man.", "A plane.")], [4.75])),
    "rte/train.tsv.gz": (rte, "train", "RTE/train.tsv", RTE, ([("It\x85 rains.", "It does."), ("A.", "B.")], [0, 1])),
    "wnut17/train.conll.gz": (wnut17, "train", "wnut17train.conll", WNUT,
                              ([["Redondo", "Beach", "."], ["😂"]], [["B-location", "I-location", "O"], ["O"]])),
    "wnut17/test.conll.gz": (wnut17, "test", "emerging.test.annotated", "a\tO\n\t\nb\tO\n",
                             ([["a"], ["b"]], [["O"], ["O"]])),
}  # fmt: skip


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_both_forms(name, published, monkeypatch, tmp_path):
    read, split, theirs, content, expected = SETS[name]
    if published:
        path = tmp_path / "downloads" / theirs if "/" in theirs else tmp_path / theirs
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8", newline="\r\n" if name.startswith("mrpc") else None)
        monkeypatch.setenv("LLMFOUND_DATA", str(path.parent.parent if "/" in theirs else tmp_path))
    else:
        hashed(monkeypatch, tmp_path, name, content)
        monkeypatch.setenv("LLMFOUND_DATA", str(tmp_path))
    assert read(split) == expected


@pytest.mark.parametrize("read, splits", [
    (sst2, "train dev test"), (cola, "train dev"), (mrpc, "train dev test"), (stsb, "train dev"), (rte, "train dev"),
    (wnut17, "train dev test"),
])  # fmt: skip
def test_every_split_has_a_hash_and_a_way_to_get_it(read, splits, tmp_path):
    for split in splits.split():
        with pytest.raises(FileNotFoundError, match=r"does not exist and cannot be downloaded\. \w"):
            read(split, tmp_path)
    with pytest.raises(ValueError, match=f"split must be one of {', '.join(splits.split())}; got 'valid'"):
        read("valid", tmp_path)


def test_question_answering_can_be_fetched(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded\. \w"):
        text.fetch("squad/dev-v1.1.json.xz", tmp_path)


def test_any_file_with_labels(tmp_path):
    path = tmp_path / "file.tsv"
    path.write_text("a\tb\tc\nx\ty\tno\nz\tw\tyes\n")
    assert read_labelled(path, "b", "c", ["yes", "no"]) == (["y", "w"], [1, 0])
    assert read_labelled(path, ["b", "a"], "c", ["yes", "no"]) == ([("y", "x"), ("w", "z")], [1, 0])
    path.write_text("2\tx\n-1e1\ty\n")
    assert read_labelled(path, "text", "score", columns=["score", "text"]) == (["x", "y"], [2.0, -10.0])
    for numbers, expected in (("1 0 -3", [1, 0, -3]), ("1 0 2.0", [1.0, 0.0, 2.0])):
        path.write_text("text\tlabel\n" + "".join(f"x\t{number}\n" for number in numbers.split()))
        labels = read_labelled(path, "text", "label")[1]
        assert labels == expected and {type(label) for label in labels} == {type(expected[0])}


def test_a_file_without_labels(tmp_path):
    path = tmp_path / "test.tsv"
    path.write_text("index\ta\tb\n0\tx\ty\n1\tz\tw\n\n")
    assert read_labelled(path, "a", None) == (["x", "z"], None)
    assert read_labelled(path, ("a", "b"), None) == ([("x", "y"), ("z", "w")], None)
    with pytest.raises(ValueError, match="has no column c; its columns are index, a, b"):
        read_labelled(path, "c", None)


def test_classes_may_come_in_any_iterable(tmp_path):
    path = tmp_path / "file.tsv"
    path.write_text("text\tlabel\nx\tno\ny\tyes\n")
    for classes in ({"yes": 0, "no": 1}, np.array(["yes", "no"]), iter(["yes", "no"])):
        assert read_labelled(path, "text", "label", classes) == (["x", "y"], [1, 0])
    with pytest.raises(ValueError, match=r"classes must stand in an order, which a set has not: \{'yes'\}"):
        read_labelled(path, "text", "label", {"yes"})


@pytest.mark.parametrize("content, message", [
    ("text\tlabels\nx\t1\n", "has no column label; its columns are text, labels"),
    ("text\tlabel\nx\t1\ny\n", r"line 3: 1 columns instead of 2: 'y'"),
    ("text\tlabel\nx\t1\ty\n", r"line 2: 3 columns instead of 2"),
    ("text\tlabel\nx\t2\n", "line 2: label must be one of 0, 1; got '2'"),
    ("text\tlabel\nx\t1\n\ny\t1\n", "line 3: 1 columns instead of 2"),
    ("", "is empty"),
    ("\n\n", "has no column text, label"),
])  # fmt: skip
def test_files_whose_labels_are_missing(content, message, tmp_path):
    path = tmp_path / "file.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_labelled(path, "text", "label", ("0", "1"))


def test_scores_and_reviews_that_are_none(tmp_path):
    path = tmp_path / "STS-B" / "train.tsv"
    path.parent.mkdir()
    path.write_text("sentence1\tsentence2\tscore\na\tb\tgood\n")
    with pytest.raises(ValueError, match="line 2: score must be a number; got 'good'"):
        stsb("train", tmp_path)
    for line in ("2 good", "good", "1", "1 "):
        (tmp_path / "stsa.binary.test").write_text(f"0 bad\n{line}\n")
        with pytest.raises(ValueError, match=f"line 2: a sentence after 0 or 1 is expected; got '{line}'"):
            sst2("test", tmp_path)


def test_columns_between_words_and_tags(tmp_path):
    path = tmp_path / "conll.txt"
    path.write_text("-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\nPeter NNP B-NP B-PER\n\n")
    assert read_conll(path) == ([["EU", "rejects"], ["Peter"]], [["B-ORG", "O"], ["B-PER"]])
    path.write_text("# id = 1\na\tO\n# x\n#\tB-x\n\n\t\n# id = 2\n# b\tO\n")
    assert read_conll(path) == ([["a", "#"], ["# b"]], [["O", "B-x"], ["O"]])
    path.write_text("# O\na B-x\n\t\n# B-y\n")
    assert read_conll(path) == ([["#", "a"], ["#"]], [["O", "B-x"], ["B-y"]])
    for line in ("word", "\tO", "word\t", "word "):
        path.write_text(f"a\tO\n{line}\n")
        with pytest.raises(ValueError, match="line 2: a word and its tag are expected"):
            read_conll(path)

"""Public sets, in the form of their authors and in the form that is hashed."""

import gzip
import hashlib
import json
import lzma

import pytest

from llmfound.data import ag_news, imdb, text, trec, wikitext2

pytestmark = pytest.mark.on_one_backend


def hashed(monkeypatch, folder, name, content):
    pack = gzip.compress if name.endswith(".gz") else lzma.compress
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(content.encode("utf-8")))
    monkeypatch.setitem(text.HASHES, name, hashlib.sha256(path.read_bytes()).hexdigest())


WIKI = " = Title = \n \n A text @-@ with <unk> . \n"


@pytest.mark.parametrize("published", [False, True])
def test_wikitext2(published, monkeypatch, tmp_path):
    if published:
        (tmp_path / "wikitext-2").mkdir()
        (tmp_path / "wikitext-2" / "wiki.valid.tokens").write_text(WIKI)
    else:
        hashed(monkeypatch, tmp_path, "wikitext-2/valid.txt.xz", WIKI)
    monkeypatch.setenv("LLMFOUND_DATA", str(tmp_path))
    assert wikitext2("valid") == ["= Title =", "", "A text @-@ with <unk> ."]


def test_wikitext2_is_not_taken_from_the_folder_of_another_set(monkeypatch, tmp_path):
    def put(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "wiki.valid.tokens").write_text(f"of {name}")

    hashed(monkeypatch, tmp_path, "wikitext-2/valid.txt.xz", WIKI)
    put("wikitext-103")
    assert wikitext2("valid", tmp_path)[0] == "= Title ="
    put("mine")
    assert wikitext2("valid", tmp_path) == ["of mine"]
    put("copy")
    with pytest.raises(ValueError, match=r"has wiki.valid.tokens in copy, mine, and none is called wikitext-2; give"):
        wikitext2("valid", tmp_path)
    put("WikiText-2")
    assert wikitext2("valid", tmp_path) == ["of WikiText-2"]
    assert wikitext2("valid", tmp_path / "wikitext-103") == ["of wikitext-103"]


@pytest.mark.parametrize("published", [False, True])
def test_imdb(published, monkeypatch, tmp_path):
    rows = [("train/neg/0", 0, "Bad.\x85<br />"), ("train/pos/1", 1, "Good."), ("unsup/2", None, "What?")]
    if published:
        for name, _, words in rows:
            path = tmp_path / "aclImdb" / ("train/" * name.startswith("unsup") + name + ".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(words, "utf-8")
    else:
        for split in ("train", "unsup"):
            lines = [json.dumps(dict(id=name, label=label, text=words), ensure_ascii=False)
                     for name, label, words in rows if name.startswith(split)]  # fmt: skip
            hashed(monkeypatch, tmp_path, f"imdb/{split}.jsonl.xz", "\n".join(lines) + "\n")
    assert imdb("train", tmp_path) == (["Bad.\x85<br />", "Good."], [0, 1])
    assert imdb("unsup", tmp_path) == (["What?"], [None])


@pytest.mark.parametrize("published", [False, True])
def test_trec(published, monkeypatch, tmp_path):
    content = "DESC:manner How did it go ?\nNUM:date When was Pel\u00f0 born ?\n"
    if published:
        (tmp_path / "TREC_10.label").write_bytes(content.encode("latin-1"))
    else:
        hashed(monkeypatch, tmp_path, "trec/test.label.gz", content)
    assert trec("test", tmp_path) == (["How did it go ?", "When was Pel\u00f0 born ?"], [1, 5])


@pytest.mark.parametrize("published", [False, True])
def test_ag_news(published, monkeypatch, tmp_path):
    content = '"3","Fears, again","Unions #39; say"\n"1","Peace","A ""war"" ends.\\"\n'
    if published:
        (tmp_path / "ag_news_csv").mkdir()
        (tmp_path / "ag_news_csv" / "test.csv").write_text(content)
    else:
        hashed(monkeypatch, tmp_path, "ag_news/test.csv.xz", content)
    assert ag_news("test", tmp_path) == (["Fears, again Unions #39; say", 'Peace A "war" ends.\\'], [2, 0])


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded\. aclImdb_v1\.tar\.gz"):
        imdb("train", tmp_path)
    with pytest.raises(ValueError, match="split must be one of train, test; got 'dev'"):
        trec("dev", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no ag_news_csv/train\.csv in .*CharCnn_Keras"):
        ag_news("train", tmp_path)
    monkeypatch.setenv("LLMFOUND_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"no ag_news_csv/train\.csv in {tmp_path}\."):
        ag_news("train")
    (tmp_path / "ag_news").mkdir()
    (tmp_path / "ag_news" / "train.csv").write_text('"1","Peace","A war ends."\n"5","Peace","A war ends."\n')
    with pytest.raises(ValueError, match=r"Row 2 of .*train\.csv is not a class from 1 to 4, .*'5', 'Peace'"):
        ag_news("train", tmp_path)
    (tmp_path / "aclImdb").mkdir()
    with pytest.raises(FileNotFoundError, match=r"aclImdb has no train/pos/\*\.txt"):
        imdb("train", tmp_path)
    (tmp_path / "TREC_10.label").write_text("What is it ?\n")
    with pytest.raises(ValueError, match="Line 1 of test is no question with a class, but 'What is it"):
        trec("test", tmp_path)

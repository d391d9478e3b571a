import bz2
import gzip
import hashlib
import http.server
import lzma
import threading
from pathlib import Path

import pytest

from llmfound import data
from llmfound.data import text

pytestmark = pytest.mark.on_one_backend

SHIPPED = Path(__file__).parents[2] / "examples" / "data"
PACK = {".txt": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def write(path, content):
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(PACK.get(path.suffix.lower(), bytes)(content))
    return path


@pytest.mark.parametrize("suffix", [*PACK, ".GZ"])
def test_lines_end_at_newlines_only(tmp_path, suffix):
    odd = "a\u0085b\u2028c\x0bd\x1ce\rf"
    path = write(tmp_path / f"text{suffix}", f"\ufeff{odd}\n\nwindows\r\nlast")
    assert data.read_lines(path) == [odd, "", "windows", "last"]


def test_last_newline_ends_the_last_line(tmp_path):
    assert data.read_lines(write(tmp_path / "one.txt", "a\n")) == ["a"]
    assert data.read_lines(write(tmp_path / "two.txt", "a\n\n")) == ["a", ""]


def test_pairs(tmp_path):
    path = write(tmp_path / "pairs.tsv", "a\tb\nc d\t\n")
    assert data.read_pairs(path) == [("a", "b"), ("c d", "")]
    assert data.read_pairs(path, columns=(1, 0)) == [("b", "a"), ("", "c d")]


def test_empty_lines_at_the_end_are_no_pairs(tmp_path):
    assert data.read_pairs(write(tmp_path / "end.tsv", "a\tb\nc\td\n\n\n")) == [("a", "b"), ("c", "d")]
    with pytest.raises(ValueError, match=r"middle.tsv, line 2: 1 tab-separated columns where 2 are needed"):
        data.read_pairs(write(tmp_path / "middle.tsv", "a\tb\n\nc\td\n"))
    with pytest.raises(ValueError, match=r"empty.tsv, line 1: 1 tab-separated columns"):
        data.read_pairs(write(tmp_path / "empty.tsv", "\n\n"))


def test_pairs_of_a_split(tmp_path):
    path = write(tmp_path / "splits.tsv", "train\ta\tb\tby x\ntest\tc\td\tby y\n")
    assert data.read_pairs(path, split="test", columns=(0, 1)) == [("c", "d")]
    with pytest.raises(ValueError, match=r"splits.tsv has no row of split 'valid'.*\['test', 'train'\]"):
        data.read_pairs(path, split="valid", columns=(0, 1))
    with pytest.raises(ValueError, match=r"splits.tsv, line 1: 4 tab-separated columns where 3 are needed"):
        data.read_pairs(path, split="test")


def test_parallel(tmp_path):
    source, target = write(tmp_path / "s.gz", "a\nb\n"), write(tmp_path / "t.xz", "c\nd")
    assert data.read_parallel(source, target) == [("a", "c"), ("b", "d")]


def test_errors_name_file_and_place(tmp_path):
    with pytest.raises(ValueError, match=r"bad.txt, line 3: byte 0xff at offset 6 is not valid UTF-8"):
        data.read_lines(write(tmp_path / "bad.txt", "é\na\n".encode() + b"b\xff\n"))
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        data.read_lines(write(tmp_path / "empty.txt", ""))
    with pytest.raises(ValueError, match=r"empty.gz is empty"):
        data.read_lines(write(tmp_path / "empty.gz", ""))
    with pytest.raises(FileNotFoundError, match=r"absent.txt"):
        data.read_lines(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match=r"tabs.tsv, line 2: 1 tab-separated columns where 2 are needed.*'no tab'"):
        data.read_pairs(write(tmp_path / "tabs.tsv", "a\tb\nno tab\n"))
    with pytest.raises(ValueError, match=r"three.tsv, line 1: 3 tab-separated"):
        data.read_pairs(write(tmp_path / "three.tsv", "a\tb\tc\n"))
    with pytest.raises(ValueError, match=r"counted from 0; got \(0, -1\)"):
        data.read_pairs(tmp_path / "three.tsv", columns=(0, -1))
    with pytest.raises(ValueError, match=r"two.txt has 2 lines, .*three.txt has 3; .* Line 3 has no partner"):
        data.read_parallel(write(tmp_path / "two.txt", "a\nb\n"), write(tmp_path / "three.txt", "a\nb\nc\n"))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"plain text", lambda b: b[:30] + b"\0" * 9 + b[39:]])
def test_broken_compression(tmp_path, suffix, damage):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(damage(PACK[suffix](bytes(range(256)))))
    with pytest.raises(ValueError, match=rf"broken{suffix} is no complete {suffix} file"):
        data.read_lines(path)


def files_below(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Multi30k of two lines, served on this machine; returns the folder of the server and its list of requests."""
    root, requests = tmp_path / "served", []
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=root)

        def log_message(self, *args):
            requests.append(self.path)

    hashes = {}
    for language in ("en", "fr"):
        content = gzip.compress(f"one {language}\ntwo {language}\n".encode())
        (root / f"train.{language}.gz").write_bytes(content)
        hashes[f"multi30k/train.{language}.gz"] = hashlib.sha256(content).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(text, "HASHES", hashes)
        monkeypatch.setattr(text, "ADDRESSES", {"multi30k": f"http://127.0.0.1:{server.server_port}/"})
        monkeypatch.delenv("LLMFOUND_DATA", raising=False)
        yield root, requests
        server.shutdown()


def test_download_once(served, tmp_path, monkeypatch):
    _, requests = served
    pairs = [("one en", "one fr"), ("two en", "two fr")]
    assert data.multi30k(folder=tmp_path / "new") == pairs
    assert sorted(files_below(tmp_path / "new")) == ["train.en.gz", "train.fr.gz"]
    assert len(requests) == 2
    monkeypatch.setenv("LLMFOUND_DATA", str(tmp_path / "new"))
    assert data.multi30k() == pairs
    assert data.multi30k(source="fr", target="en", folder=tmp_path / "new" / "multi30k")[0] == ("one fr", "one en")
    assert len(requests) == 2


def test_wrong_download_leaves_nothing(served, tmp_path):
    root, _ = served
    (root / "train.en.gz").write_bytes(b"other")
    expected, actual = text.HASHES["multi30k/train.en.gz"], hashlib.sha256(b"other").hexdigest()
    with pytest.raises(ValueError, match=f"http://127.*train.en.gz has SHA-256 {actual}, expected {expected}"):
        data.multi30k(folder=tmp_path / "new")
    assert files_below(tmp_path / "new") == []


def test_failed_download_says_where_to_put_the_file(served, tmp_path):
    root, _ = served
    (root / "train.en.gz").unlink()
    with pytest.raises(
        OSError, match=r"train.en.gz could not be downloaded \(HTTP Error 404.*new.multi30k.train.en.gz"
    ):
        data.multi30k(folder=tmp_path / "new")
    assert files_below(tmp_path / "new") == []


def test_changed_file_is_refused_and_kept(served, tmp_path):
    path = tmp_path / "train.en.gz"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"train.en.gz has SHA-256 {hashlib.sha256(b'mine').hexdigest()}, expected"):
        data.fetch("multi30k/train.en.gz", tmp_path)
    assert path.read_bytes() == b"mine"


def test_folder_and_name_must_be_known(monkeypatch):
    monkeypatch.delenv("LLMFOUND_DATA", raising=False)
    with pytest.raises(ValueError, match=r"folder=..., or the environment variable LLMFOUND_DATA"):
        data.multi30k()
    with pytest.raises(ValueError, match=r"No data file is called 'multi30k/train.it.gz'; there are .*imdb/"):
        data.multi30k(source="it", folder=".")


def test_tatoeba_is_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"eng-deu.test.tsv.xz does not exist .*deu-eng.zip.*read_pairs"):
        data.tatoeba("test", "deu", folder=tmp_path)


def test_shipped_corpus():
    sizes = {split: len(data.tatoeba(split, folder=SHIPPED)) for split in ("train", "valid", "test")}
    assert sizes == {"train": 160_954, "valid": 2_105, "test": 2_009}
    assert ("Be careful!", "Sois prudent !") in set(data.tatoeba("train", folder=SHIPPED))
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 3_000_000

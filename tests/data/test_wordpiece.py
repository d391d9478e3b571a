"""WordPiece against a plain transcription of the authors' rules, and the files that it reads and writes."""

import copy
import json
import pickle
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfound.data import Tokenizer, WordPiece

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, "want", "##want", "##ed", "wa", "un", "runn", "##ing", ",", "hello", "!", "how", "are", "you",
              "?", "博", "推", "a", "b", "##a", "##b", "##h", "zz", "$", "5", ".", "00", "^", "x", "##x", "é", "e",
              "##e", "H", "abc", "σ", "ς", "##σ", "##ς", "α", "##α"]  # fmt: skip
CHINESE = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
           (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]  # fmt: skip
LIKE_THE_LIBRARY = set("\u166d\u1734\U000111c9\U00011938")


def basic(text, lowercase=True):
    """The words of a text, by the rules of the authors' code."""
    kept = []
    for c in text:
        if c in "\t\n\r" or unicodedata.category(c) == "Zs":
            kept.append(" ")
        elif any(first <= ord(c) <= last for first, last in CHINESE):
            kept.append(f" {c} ")
        elif c not in "\0\ufffd" and unicodedata.category(c) not in ("Cc", "Cf"):
            kept.append(c)
    words = []
    for word in "".join(kept).split():
        if lowercase:
            letters = unicodedata.normalize("NFD", word.lower())
            word = "".join(c for c in letters if unicodedata.category(c) != "Mn")
        for c in word:
            apart = (c.isascii() and not c.isalnum()) or unicodedata.category(c).startswith("P")
            words.append(f" {c} " if apart else c)
        words.append(" ")
    return "".join(words).split()


def pieces(word, vocabulary, longest=200):
    """The pieces of a word: the longest first piece that is there, then the longest next one."""
    found, start = [], 0
    while start < len(word):
        end = len(word)
        while end > start and ("##" if start else "") + word[start:end] not in vocabulary:
            end -= 1
        if end == start or len(word) > longest:
            return ["[UNK]"]
        found.append(("##" if start else "") + word[start:end])
        start = end
    return found


def reference(text, vocabulary=VOCABULARY, lowercase=True):
    return [vocabulary.index(piece) for word in basic(text, lowercase) for piece in pieces(word, set(vocabulary))]


UNCASED, CASED = (WordPiece.from_vocabulary(VOCABULARY, lowercase) for lowercase in (True, False))


def words_of(tokenizer, text):
    """What stands between normalization and the vocabulary."""
    inner = tokenizer._tokenizer
    return [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(inner.normalizer.normalize_str(text))]


# The rules


@pytest.mark.parametrize("text, expected", [
    ("UNwant\u00e9d,running", ["un", "##want", "##ed", ",", "runn", "##ing"]),
    ("unwantedX running", ["un", "##want", "##ed", "##x", "runn", "##ing"]),
    ("unwantedq running", ["[UNK]", "runn", "##ing"]), ("", []), (" \t\n", []),
    ("[SEP] a", ["[UNK]", "[UNK]", "[UNK]", "a"]),
])  # fmt: skip
def test_check_8_pieces(text, expected):
    assert UNCASED.encode(text) == [VOCABULARY.index(piece) for piece in expected] == reference(text)


@pytest.mark.parametrize("text, expected", [
    ("ah\u535a\u63a8zz", "ah 博 推 zz"), (" \tHeLLo!how  \n Are yoU?  ", "hello ! how are you ?"),
    ("$5.00^x", "$ 5 . 00 ^ x"), ("a\u200bb\ufffdc", "abc"), ("H\u00e9llo", "hello"), ("İstanbul", "istanbul"),
    ("ΟΔΟΣ ΣΑΣ.", "οδος σας ."), ("a\u2028b\u3000c", "a b c"), ("a\x85b", "ab"), ("\ue000a", "\ue000a"),
])  # fmt: skip
def test_check_8_words(text, expected):
    assert " ".join(words_of(UNCASED, text)) == expected == " ".join(basic(text))


@pytest.mark.parametrize("tokenizer, lowercase", [(UNCASED, True), (CASED, False)], ids=["uncased", "cased"])
def test_every_assigned_character_is_treated_as_the_authors_do(tokenizer, lowercase):
    chunks, wrong = [], set()
    characters = [chr(i) for i in [*range(1, 0xD800), *range(0xE000, 0x2FA20), *range(0xE0000, 0xE0200)]]
    characters = [c for c in characters if unicodedata.category(c) != "Cn"]
    for i in range(0, len(characters), 500):
        chunks.append(characters[i : i + 500])
    for chunk in chunks:
        text = " ".join(f"a{c}b" for c in chunk)
        if words_of(tokenizer, text) != basic(text, lowercase):
            wrong |= {c for c in chunk if words_of(tokenizer, f"a{c}b") != basic(f"a{c}b", lowercase)}
    assert wrong <= LIKE_THE_LIBRARY


alphabet = st.one_of(
    st.sampled_from("abhx ,.?!é\u0301博推H\t\u200b\ufffd\ue000"),
    st.characters(exclude_categories=["Cs", "Cn"], exclude_characters=LIKE_THE_LIBRARY | set("Σ")),
)


@given(st.text(alphabet, max_size=40), st.booleans())
def test_any_text_has_the_pieces_of_the_authors(text, lowercase):
    assert (UNCASED if lowercase else CASED).encode(text) == reference(text, lowercase=lowercase)


@pytest.mark.parametrize("length, expected", [(200, 200), (201, 1)])
def test_words_may_have_200_characters(length, expected):
    assert len(UNCASED.encode("a" * length)) == expected
    assert UNCASED.encode("a" * length) == reference("a" * length)


# Words, offsets, pieces


def test_words_of_a_text_that_is_split_already():
    assert UNCASED.encode_words(["UNwanted", "\u200b", "", "running,"]) == [[9, 6, 7], [], [], [10, 11, 12]]
    assert UNCASED.encode_words([]) == []


def test_offsets_are_those_of_the_text_as_it_is_written():
    text = "  UNwant\u00e9d,\trunning 博推!"
    ids, offsets = UNCASED.encode_with_offsets(text)
    assert ids == UNCASED.encode(text)
    assert [text[a:b] for a, b in offsets] == ["UN", "want", "\u00e9d", ",", "runn", "ing", "博", "推", "!"]
    decomposed = "unwante\u0301d"
    _, offsets = UNCASED.encode_with_offsets(decomposed)
    assert [decomposed[a:b] for a, b in offsets][:2] == ["un", "want"] and offsets[-1][1] == len(decomposed)
    assert UNCASED.encode_batch_with_offsets([text, "a"])[1] == ([VOCABULARY.index("a")], [(0, 1)])


def test_what_a_tokenizer_tells():
    assert [UNCASED.pad_id, UNCASED.unk_id, UNCASED.cls_id, UNCASED.sep_id, UNCASED.mask_id] == [0, 1, 2, 3, 4]
    assert (UNCASED.start_id, UNCASED.end_id, UNCASED.vocab_size) == (2, 3, len(VOCABULARY))
    assert UNCASED.vocabulary == VOCABULARY
    assert UNCASED.continues.tolist() == [piece.startswith("##") for piece in VOCABULARY]
    assert UNCASED.decode([2, 9, 6, 7, 12, 3]) == "unwanted ,"
    assert UNCASED.pieces("Unwanted é") == ["Un", "want", "ed", "é"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_is_the_same(how):
    twin = how(UNCASED)
    assert type(twin) is WordPiece and twin.mask_id == 4
    assert twin.encode("UNwant\u00e9d [MASK]") == UNCASED.encode("UNwant\u00e9d [MASK]")


# Training


TEXTS = ["the lower the better", "lower than low", "Newer and wider, Été"] * 3


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_trained_vocabulary(lowercase):
    tokenizer = WordPiece.train(TEXTS, 60, lowercase)
    assert tokenizer.vocabulary[:5] == SPECIAL and tokenizer.vocab_size <= 60
    assert ("É" in tokenizer.vocabulary) is not lowercase
    ids = tokenizer.encode("the lower")
    assert tokenizer.unk_id not in ids and tokenizer.decode(ids) == "the lower"
    for text in TEXTS:
        expected = reference(text, tokenizer.vocabulary, lowercase)
        assert tokenizer.encode(text) == expected and tokenizer.unk_id not in expected


# Files


def test_saved_and_loaded(tmp_path):
    CASED.save(tmp_path / "tokenizer.json")
    again = WordPiece.load(tmp_path / "tokenizer.json")
    assert again.encode("Hello H\u00e9") == CASED.encode("Hello H\u00e9") and again.to_json() == CASED.to_json()
    with pytest.raises(ValueError, match=r"was made with lowercase=False; got lowercase=True"):
        WordPiece.load(tmp_path / "tokenizer.json", lowercase=True)
    assert WordPiece.load(tmp_path / "tokenizer.json", lowercase=False, strip_accents=False).vocab_size == len(
        VOCABULARY
    )


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_a_vocabulary_of_lines(tmp_path, ending, last):
    path = tmp_path / "vocab.txt"
    path.write_bytes((ending.join(VOCABULARY) + last).encode())
    assert WordPiece.load(path).vocabulary == VOCABULARY
    assert WordPiece.load(path).encode("H") == CASED.encode("H")  # it has an H, so it is cased
    assert WordPiece.load(path, lowercase=True).encode("H\u00e9") == UNCASED.encode("H\u00e9")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true, "strip_accents": false}')
    assert WordPiece.load(tmp_path).encode("\u00c9") == [VOCABULARY.index("é")]
    lower = [piece for piece in VOCABULARY if piece != "H"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "vocab.txt").write_text("\n".join([*lower, "[unused0]"]), "utf-8")
    assert WordPiece.load(tmp_path / "b").encode("A\u00c9") == [VOCABULARY.index("a"), VOCABULARY.index("##e") - 0]


def test_a_folder_that_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    UNCASED.save_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"}  # fmt: skip
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["UNwant\u00e9d, running!", "how are you? 博推"]
    single, pair = theirs(texts[0]), theirs(*texts)
    first, second = UNCASED.encode_batch(texts)
    assert single["input_ids"] == [2, *first, 3]
    assert pair["input_ids"] == [2, *first, 3, *second, 3]
    assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert (theirs.pad_token_id, theirs.mask_token_id, theirs.unk_token_id) == (0, 4, 1)
    assert WordPiece.load(tmp_path).encode(texts[1]) == second
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["do_lower_case"] is True
    theirs.save_pretrained(tmp_path / "theirs")
    assert WordPiece.load(tmp_path / "theirs").encode_batch(texts) == [first, second]


def test_ids_with_gaps_and_added_pieces_of_someone_else(tmp_path):
    content = json.loads(UNCASED.to_json())
    content["model"]["vocab"]["late"] = 99
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    found = WordPiece.load(tmp_path)
    assert found.vocab_size == 100 and found.continues.shape == (100,) and found.encode("late") == [99]


@pytest.mark.parametrize("call, message", [
    (lambda: WordPiece.from_vocabulary(["a", *SPECIAL[:3]]), r"vocabulary of 4 pieces lacks \[SEP\], \[MASK\]"),
    (lambda: WordPiece.from_vocabulary([*SPECIAL, "a", "b", "a"]), "Piece 5, 'a', is there twice"),
    (lambda: WordPiece.from_vocabulary([*SPECIAL, "a", "", "b"]), "Piece 6, '', is empty"),
    (lambda: WordPiece.train("abc", 10), "got one str, 'abc'"),
    (lambda: WordPiece.train([], 10), "There is no text to train on"),
    (lambda: WordPiece.train(TEXTS, 10), r"vocab_size \(10\) is too small: characters alone are \d+ pieces"),
    (lambda: WordPiece(Tokenizer.train(TEXTS, 300).to_json()), "a BPE model, not WordPiece; Tokenizer.load"),
    (lambda: WordPiece(Tokenizer.train(TEXTS, 60, kind="wordpiece").to_json()), r"lacks \[CLS\], \[SEP\], \[MASK\]"),
    (lambda: WordPiece("{}"), "not a tokenizer.json"),
    (lambda: UNCASED.encode_words([1]), "texts must be an iterable of str"),
])  # fmt: skip
def test_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer.json nor vocab.txt, but nothing"):
        WordPiece.load(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor vocab.txt, but model.bin"):
        WordPiece.load(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(ValueError, match="not valid UTF-8"):
        WordPiece.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY), "utf-8")
    for content, message in (("{", "is not JSON"), ("[1]", "holds no JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            WordPiece.load(tmp_path)


def test_offsets_are_numbers_that_an_array_takes():
    assert np.array(UNCASED.encode_with_offsets("a b")[1]).tolist() == [[0, 1], [2, 3]]

"""What holds for every tokenizer, whatever the text."""

import copy
import functools
import pickle
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmfound.data import Tokenizer

pytestmark = pytest.mark.on_one_backend

BYTE_LEVEL = ["bpe", "unigram"]
KINDS = [*BYTE_LEVEL, "wordpiece", "word"]
FRAGMENTS = [
    " ", "  ", "\t\n", "\r\n", "\u3000", "\u00a0", "\u200b",  # spaces, and one that is none
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "👍🏽",  # joined, with a variation selector, of two letters, with a modifier
    "é", "e\u0301", "\u0301", "q\u0323\u0307", "q\u0307\u0323", "ﬁ", "Å", "각", "\u1100\u1161\u11a8",  # (de)composed
    "שלום", "مرحبا", "\u202eabc\u202c", "\u2066אב\u2069", "\u200f",  # right to left, and marks that say so
    "\0", "\x1b", "\x7f", "\u0085", "\u2028", "\u2029", "\ufeff", "\ufffd", "\ufffe", "\U0010ffff",
    "[PAD]", "[START]", "[END]", "[UNK]", "[MASK]", "<s>", "</s>", "<unk>", "<|endoftext|>", "##", "▁", "Ġ", "Ċ",
    "the", "House", "l'", "n't", "-", "?", " !", "42", "ß", "İ", "Σ", "ς", "日本",
]  # fmt: skip
LONG = 100_000  # characters of a word
WORDS = ["x", "ab", "é", "e\u0301", "日", "👩‍", "ש", "\0", "[PAD]", "-", "'", " ", "\u0301"]
TEXTS = [
    "Where is the house ?", "Où est la maison ?", "I don't know the man's name.", "C'est l'été, dit-il.",
    "L'homme qu'elle a vu n'est pas là.", "Y a-t-il quelqu'un ici ?",
] * 5  # fmt: skip

# Unassigned characters are left out: the Unicode of Python and that of the library may differ in what they are.
characters = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=20)
texts = st.lists(st.sampled_from(FRAGMENTS) | characters, max_size=8).map("".join)
long_texts = st.tuples(texts, st.sampled_from(WORDS), texts).map(lambda t: t[0] + t[1] * (LONG // len(t[1])) + t[2])


@functools.cache
def tokenizer(kind, lowercase=False):
    return Tokenizer.train(TEXTS, {"bpe": 400, "unigram": 300, "wordpiece": 90, "word": 25}[kind], kind, lowercase)


def nfc(text):
    return unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(text=texts)
@example(text="")
def test_any_text_survives_up_to_nfc(kind, text):
    assert tokenizer(kind).decode(tokenizer(kind).encode(text)) == nfc(text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_no_text_gives_an_id_that_is_special_or_out_of_range(kind, text):
    ids = tokenizer(kind).encode(text)
    least = 4 if kind in BYTE_LEVEL else tokenizer(kind).unk_id
    assert all(least <= i < tokenizer(kind).vocab_size for i in ids)
    assert len(tokenizer(kind).tokens(ids)) == len(ids)
    assert isinstance(tokenizer(kind).decode(ids), str)


@pytest.mark.parametrize("kind", KINDS)
@given(batch=st.lists(texts, max_size=6))
def test_a_batch_is_encoded_like_its_texts_one_by_one(kind, batch):
    alone = [tokenizer(kind).encode(text) for text in batch]
    assert tokenizer(kind).encode_batch(batch) == tokenizer(kind).encode_batch(iter(batch)) == alone
    assert tokenizer(kind).decode_batch(alone) == [tokenizer(kind).decode(ids) for ids in alone]


@pytest.mark.parametrize("kind", KINDS)
@given(batch=st.lists(texts, min_size=1, max_size=4), data=st.data())
def test_special_ids_change_nothing_wherever_they_stand(kind, batch, data):
    rows = [ids for ids in tokenizer(kind).encode_batch(batch) if tokenizer(kind).unk_id not in ids]
    specials = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3)
    mixed = [[j for i in ids for j in (*data.draw(specials), i)] + data.draw(specials) for ids in rows]
    assert tokenizer(kind).decode_batch(mixed) == tokenizer(kind).decode_batch(rows)
    longest = max(map(len, mixed), default=0)
    padded = np.zeros((len(mixed), longest), data.draw(st.sampled_from(["int32", "int64", "uint16"])))
    for row, ids in zip(padded, mixed):
        row[: len(ids)] = ids
    assert tokenizer(kind).decode_batch(padded) == tokenizer(kind).decode_batch(rows)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_ids_of_the_vocabulary_can_be_decoded(kind, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer(kind).vocab_size - 1), max_size=20))
    text = tokenizer(kind).decode(ids)
    assert text.encode("utf-8") is not None  # no half of a surrogate pair
    assert all(isinstance(piece, str) for piece in tokenizer(kind).tokens(ids))
    if kind in BYTE_LEVEL:
        assert tokenizer(kind).decode(tokenizer(kind).encode(text)) == nfc(text)


@pytest.mark.parametrize("kind", KINDS)
@given(before=texts, surrogate=st.characters(categories=("Cs",)), after=texts)
def test_half_a_surrogate_pair_is_refused(kind, before, surrogate, after):
    with pytest.raises(ValueError, match=r"without lone surrogates; got .* as item 1"):
        tokenizer(kind).encode_batch(["a", before + surrogate + after])
    with pytest.raises(ValueError, match="as item 0"):
        Tokenizer.train([before + surrogate + after], 400, kind)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@example(text="The HOUSE ?")
@example(text="0.")
def test_case_dropped_once_is_dropped_for_good(kind, text):
    lower = tokenizer(kind, lowercase=True)
    ids = lower.encode(text)
    if lower.unk_id not in ids:  # an unknown word is left out, which may put another at the start of the text
        once = lower.decode(ids)
        assert lower.decode(lower.encode(once)) == once
    assert lower.encode(nfc(text)) == lower.encode(text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_a_copy_is_the_same_tokenizer(kind, text):
    for again in copies(kind):
        assert again.encode(text) == tokenizer(kind).encode(text)
        assert again.decode(again.encode(text)) == tokenizer(kind).decode(tokenizer(kind).encode(text))


@functools.cache
def copies(kind):
    original = tokenizer(kind)
    made = Tokenizer(original.to_json()), pickle.loads(pickle.dumps(original)), copy.deepcopy(original)
    assert {(repr(again), again.to_json()) for again in made} == {(repr(original), original.to_json())}
    return made


@pytest.mark.parametrize("kind", KINDS)
@given(corpus=st.lists(texts, min_size=1, max_size=6).filter(any), text=texts, min_frequency=st.integers(1, 3))
def test_a_tokenizer_trained_on_any_texts_takes_any_text(tmp_path_factory, kind, corpus, text, min_frequency):
    try:
        trained = Tokenizer.train(corpus, 400, kind, min_frequency=min_frequency)
    except ValueError as error:
        assert kind == "word" and "No word occurs" in str(error)
        return
    assert trained.tokens([0, 1, 2, 3]) == ["[PAD]", "[START]", "[END]", "[UNK]"] and trained.vocab_size <= 400
    path = tmp_path_factory.getbasetemp() / f"{kind}.json"
    trained.save(path)
    loaded = Tokenizer.load(path)
    for x in (text, *corpus):
        ids = trained.encode(x)
        assert loaded.encode(x) == ids and all(3 <= i < trained.vocab_size for i in ids)
        assert kind not in BYTE_LEVEL or trained.decode(ids) == nfc(x)


@pytest.mark.parametrize("kind", KINDS)
@given(text=long_texts)
def test_a_word_may_have_100_000_characters(kind, text):
    ids = tokenizer(kind).encode(text)
    decoded = tokenizer(kind).decode(ids)
    assert kind not in BYTE_LEVEL or decoded == nfc(text)

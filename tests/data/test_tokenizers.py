import copy
import functools
import json
import pickle
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmfound.data import Tokenizer

pytestmark = pytest.mark.on_one_backend

SPECIALS = ["[PAD]", "[START]", "[END]", "[UNK]"]
TEXTS = [
    "Where is the house ?",
    "Où est la maison ?",
    "I don't know the man's name.",
    "L'homme qu'elle a vu n'est pas là.",
    "Y a-t-il quelqu'un ici ?",
    "C'est l'été, dit-il.",
] * 5
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn")))  # unassigned: Python's Unicode may be the older one
SIZES = {"bpe": 400, "unigram": 300, "wordpiece": 90, "word": 60}
KINDS = {kind: Tokenizer.train(TEXTS, size, kind) for kind, size in SIZES.items()}


def examples(test):
    hard = [
        "",
        " ",
        "  two  ",
        "\0",
        "\n\t",
        "👩‍👩‍👧 🇫🇷",
        "e\u0301\u0323",
        "\u0301",
        "שלום עולם",
        "x" * 3000,
        "[PAD][END]",
        "▁Ġ##",
    ]
    for text in hard:
        test = example(text)(test)
    return test


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@examples
@given(text=ANY_TEXT)
def test_any_text_survives_up_to_nfc(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    assert all(len(SPECIALS) <= i < tokenizer.vocab_size for i in ids)
    assert len(tokenizer.tokens(ids)) == len(ids)


@pytest.mark.parametrize("kind", ["wordpiece", "word"])
@examples
@given(text=ANY_TEXT)
def test_what_is_unknown_is_no_error(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert all(tokenizer.unk_id <= i < tokenizer.vocab_size for i in ids)
    tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids(kind):
    tokenizer = KINDS[kind]
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.tokens([0, 1, 2, 3]) == SPECIALS
    assert not {0, 1, 2} & set(tokenizer.encode("[PAD] [START] [END] [UNK]"))


def test_pieces_respect_elisions_and_spaced_punctuation():
    def words(text):  # a vocabulary of bytes alone cannot merge, so learn one that merges all it may
        tokenizer = Tokenizer.train([text] * 2, 500)
        return tokenizer.tokens(tokenizer.encode(text))

    assert words("l'homme qu'il voit ?") == ["▁l'", "homme", "▁qu'", "il", "▁voit", "▁?"]
    assert words("I don't, he's") == ["▁I", "▁don", "'t", ",", "▁he", "'s"]
    assert words("a-t-il 42 ?!") == ["▁a", "-t", "-il", "▁4", "2", "▁?!"]


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_first_word_has_the_pieces_it_has_elsewhere(kind):
    tokenizer = KINDS[kind]
    assert tokenizer.encode("house") == tokenizer.encode("the house")[-len(tokenizer.encode("house")) :]


@pytest.mark.parametrize("kind", KINDS)
def test_decode_skips_specials_and_stops_nowhere(kind):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode("the house")
    assert tokenizer.decode([1, *ids, 2, 0, *tokenizer.encode("name"), 0]) == "the house name"
    rows = np.array([[1, *ids, 2], [1, *ids, 0]], "int32")
    assert tokenizer.decode_batch(rows) == ["the house", "the house"]
    assert tokenizer.decode([]) == ""


def test_cut_character_is_readable():
    tokenizer = KINDS["bpe"]
    assert tokenizer.tokens(tokenizer.encode("日"))[-3:] == ["\\xe6", "\\x97", "\\xa5"]


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_training_twice_gives_the_same_file(kind):
    assert Tokenizer.train(TEXTS, SIZES[kind], kind).to_json() == KINDS[kind].to_json()


@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_lowercase_drops_case(kind):
    tokenizer = Tokenizer.train(TEXTS, 400, kind, lowercase=True)
    assert tokenizer.decode(tokenizer.encode("Où EST ?")) == "où est ?"


def test_min_frequency_leaves_rare_pairs_apart():
    assert Tokenizer.train(["rare"], 400, min_frequency=2).vocab_size == 260
    assert Tokenizer.train(["rare"], 400, min_frequency=1).vocab_size > 260


@pytest.mark.parametrize(
    "text",
    [
        "Where is the man's house ?",
        "L'homme qu'elle a vu n'est pas là.",
        "« Y a-t-il 42 (ou 7) l'été ? », dit-il.",
        "Tokenised : l' homme n' est pas ( là ) .",
        "  spaces \t and\nlines  ",
        "",
    ],
)
def test_known_words_survive_and_unknown_ones_are_one_id(text):
    known = Tokenizer.train([text, *TEXTS], 1000, "word", min_frequency=1)
    ids = known.encode(text)
    assert known.decode(ids) == text and 3 not in ids
    words, found = known.tokens(ids), KINDS["word"].tokens(KINDS["word"].encode(text))
    vocabulary = KINDS["word"].tokens(range(KINDS["word"].vocab_size))
    assert found == [word if word in vocabulary else "[UNK]" for word in words]


def test_words_are_the_most_frequent_and_equals_stand_in_their_order():
    texts = ["the cat", "the dog", "the cat sat", "an ant", "rare"] * 2
    tokenizer = Tokenizer.train(texts, 8, "word")
    assert tokenizer.tokens(range(8)) == [*SPECIALS, "▁the", "▁cat", "▁an", "▁ant"]
    assert tokenizer.tokens(tokenizer.encode("the rare Cat sat")) == ["▁the", "[UNK]", "[UNK]", "[UNK]"]
    assert Tokenizer.train(texts[:5], 100, "word").tokens(range(4, 6)) == ["▁the", "▁cat"]
    assert Tokenizer.train(texts[:5], 100, "word").vocab_size == 6  # the others occur once
    assert Tokenizer.train(texts[:5], 100, "word", min_frequency=1).vocab_size == 11


def test_many_equals_are_ordered_the_same_every_time():
    words = [a + b for a in "abcdefghijklmnop" for b in "abcdefghijklmnop"]
    forwards, backwards = (Tokenizer.train([" ".join(w)] * 2, 100, "word") for w in (words, words[::-1]))
    assert forwards.to_json() == backwards.to_json()
    assert forwards.tokens(range(4, 100)) == [f"▁{word}" for word in words[:96]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lowercase", [False, True])
@examples
@given(text=ANY_TEXT)
@settings(max_examples=30)
def test_pieces_are_parts_of_the_text_one_for_each_id(kind, lowercase, text):
    tokenizer = lowered(kind) if lowercase else KINDS[kind]
    pieces = tokenizer.pieces(text)
    assert len(pieces) == len(tokenizer.encode(text))
    assert all(piece in text for piece in pieces)
    if kind == "word":  # which cuts no character: all of the text stands in a piece, in its order
        assert len(text) - len(pieces) <= sum(map(len, pieces)) <= len(text)
        place = 0
        for piece in pieces:
            place = text.index(piece, place) + len(piece)


@functools.cache
def lowered(kind):
    return Tokenizer.train(TEXTS, SIZES[kind], kind, lowercase=True)


@pytest.mark.parametrize("lowercase", [False, True])
def test_pieces_show_what_is_unknown_as_it_is_written(lowercase):
    tokenizer = lowered("word") if lowercase else KINDS["word"]
    text = "Where  is L'E\u0301le\u0301phant-Roi, HOUSE 4 ?"
    assert tokenizer.pieces(text) == [
        "Where", "", "is", "L'", "E\u0301le\u0301phant", "-Roi", ",", "HOUSE", "4", "?"
    ]  # fmt: skip
    known = [token.strip("▁") for token in tokenizer.tokens(tokenizer.encode(text))]
    assert known == [
        "where" if lowercase else "Where", "[UNK]", "is", "l'" if lowercase else "L'", "[UNK]", "[UNK]", ",",
        "house" if lowercase else "[UNK]", "[UNK]", "?",
    ]  # fmt: skip


def test_pieces_of_other_kinds():
    assert KINDS["wordpiece"].pieces("Zzz ü 日日") == ["Zzz", "ü", "日日"]
    assert "".join(KINDS["wordpiece"].pieces("the house")) == "thehouse"
    assert KINDS["bpe"].pieces("l'été 日") == ["l'", "été", "", "日", "日", "日"]
    assert KINDS["bpe"].pieces("日")[-3:] == ["日", "日", "日"]
    assert KINDS["bpe"].tokens(KINDS["bpe"].encode("日"))[0] == "▁" and KINDS["bpe"].pieces("日")[0] == ""
    assert KINDS["word"].pieces("\rhouse  Zzz") == ["", "\r", "house", "", "Zzz"]
    assert KINDS["bpe"].pieces("a▁") == ["a", *["▁"] * 3]  # a character like others
    assert Tokenizer.train(["a▁"], 10, "word", min_frequency=1).pieces("a▁") == ["a", "▁"]


def test_words_in_place_of_unknown_ones_are_spaced():
    tokenizer = Tokenizer.train(["L'homme vu (là), dit"], 100, "word", min_frequency=1)
    elision, *others = tokenizer.encode("L'homme vu (là), dit")
    assert tokenizer.tokens(others) == ["homme", "▁vu", "▁(", "là", "),", "▁dit"]
    rows = [[3, elision, 3, *others[1:-1], 3, 3, 2, 0], [others[1]], [3, 1, others[-2]]]
    words = [["Été", "oncle", "Zoé", "-Rémi"], [], ["d'"]]
    assert tokenizer.decode_batch(rows, words) == ["Été L'oncle vu (là), Zoé-Rémi", "vu", "d'),"]
    assert tokenizer.decode_batch([[3, 3, 3, others[1]]], [["d'", "Artagnan", ""]]) == ["d'Artagnan vu"]
    assert tokenizer.decode_batch(np.array(rows[1:2]), [[]]) == ["vu"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_words_for_unknown_ones_in_bytes(kind):
    ids = KINDS[kind].encode("the house")
    assert KINDS[kind].decode_batch([[3, *ids, 3, 0]], [["日", "Été"]]) == ["日 the house Été"]


def test_words_for_unknown_ones_in_files_of_others():
    assert KINDS["wordpiece"].decode_batch([[3, *KINDS["wordpiece"].encode("the house"), 3]], [["a", "b"]]) == [
        "a the house b"
    ]
    assert Tokenizer(plain_tokenizer().to_str()).decode_batch([[3, 10, 3, 4, 12]], [["a", "b"]]) == ["a the b house"]


def test_round_trip_of_words(tmp_path):
    tokenizer = KINDS["word"]
    tokenizer.save(tmp_path / "tokenizer.json")
    text = "L'été [END] [UNK] où  elephants ?"
    for again in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.encode(text) == tokenizer.encode(text) and again.pieces(text) == tokenizer.pieces(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert (repr(again), again.to_json()) == (repr(tokenizer), tokenizer.to_json())


def test_round_trip_through_file_string_pickle_and_copy(tmp_path):
    tokenizer = KINDS["bpe"]
    tokenizer.save(tmp_path / "tokenizer.json")
    text = "L'été [END] où ?"
    for again in (
        Tokenizer.load(tmp_path / "tokenizer.json"),
        Tokenizer(tokenizer.to_json()),
        pickle.loads(pickle.dumps(tokenizer)),
        copy.deepcopy(tokenizer),
    ):
        assert again.encode(text) == tokenizer.encode(text)
        assert repr(again) == repr(tokenizer)
        assert again.to_json() == tokenizer.to_json()
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("Où").ids == tokenizer.encode("Où")


def test_training_from_files_is_training_from_their_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    for paths in ([path], path, str(path)):
        assert Tokenizer.train_from_files(paths, 400).to_json() == KINDS["bpe"].to_json()


def plain_tokenizer():
    """As others publish them: own names and ids, a template that adds specials, padding and truncation switched on."""
    vocab = {"<pad>": 1, "<s>": 0, "</s>": 2, "<unk>": 3, "the": 10, "house": 12}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=16)
    tokenizer.enable_truncation(3)
    return tokenizer


def test_file_of_the_plain_library_loads(tmp_path):
    plain_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.unk_id) == (1, 0, 2, 3)
    assert tokenizer.vocab_size == 13  # the largest id + 1: ids 4 to 9 and 11 are gaps
    assert tokenizer.encode_batch(["the house the house", "the"]) == [[10, 12, 10, 12], [10]]
    assert tokenizer.encode("the tree") == [10, 3]
    tokenizer.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["padding"] is not None  # nothing of the file is lost


def test_tokens_that_are_not_special_pieces_are_found_in_texts():
    plain = plain_tokenizer()
    plain.add_special_tokens(["<|user|>", "<mask>"])
    tokenizer = Tokenizer(plain.to_str())
    user = plain.token_to_id("<|user|>")
    assert tokenizer.encode("the<|user|>house") == [10, user, 12]
    assert set(tokenizer.encode("<s><mask><pad></s>")) == {3}
    assert tokenizer.decode([10, user, 12]) == "the house"
    assert pickle.loads(pickle.dumps(tokenizer)).encode("<|user|>") == [user] and tokenizer.to_json() == plain.to_str()


def test_special_pieces_can_be_named():
    text = plain_tokenizer().to_str()
    tokenizer = Tokenizer(text, start="house", end=10)
    assert (tokenizer.start_id, tokenizer.end_id) == (12, 10)
    assert tokenizer.decode([12, 3, 10]) == ""
    assert pickle.loads(pickle.dumps(tokenizer)).end_id == 10
    with pytest.raises(ValueError, match=r"start \('<bos>'\) is not in this vocabulary of 13"):
        Tokenizer(text, start="<bos>")
    with pytest.raises(ValueError, match=r"pad \(13\)"):
        Tokenizer(text, pad=13)


def test_a_vocabulary_without_specials_says_none():
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str())
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.unk_id) == (None, None, None, None)


def test_errors(tmp_path):
    tokenizer = KINDS["bpe"]
    with pytest.raises(ValueError, match=r"kind must be.*'char'"):
        Tokenizer.train(TEXTS, 400, "char")
    with pytest.raises(ValueError, match=r"vocab_size \(260\) must be more than 260"):
        Tokenizer.train(TEXTS, 260)
    with pytest.raises(ValueError, match=r"vocab_size \(4\) must be more than 4 for kind 'word'"):
        Tokenizer.train(TEXTS, 4, "word")
    with pytest.raises(ValueError, match=r"No word occurs min_frequency \(31\) times"):
        Tokenizer.train(TEXTS, 400, "word", min_frequency=31)
    with pytest.raises(ValueError, match="5 as item 0"):
        tokenizer.pieces(5)
    for unknown in ([["a"]], [["a"], ["b", "c"]], [["a"], ["b"], []]):
        with pytest.raises(ValueError, match=r"a word for each unk_id; the rows have \[1, 1\], got \[\['a'\]"):
            tokenizer.decode_batch([[3], [3]], unknown)
    with pytest.raises(ValueError, match=r"cannot be encoded: .*; this one has unk_id None"):
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?"))
        Tokenizer(words.to_str()).encode("b")
    with pytest.raises(ValueError, match=r"vocab_size \(9\) is too small"):
        Tokenizer.train(TEXTS, 9, "wordpiece")
    with pytest.raises(ValueError, match="0 items"):
        Tokenizer.train([], 400)
    with pytest.raises(ValueError, match="2 items, all empty"):
        Tokenizer.train(["", ""], 400)
    with pytest.raises(ValueError, match="one str, 'a text'"):
        Tokenizer.train("a text", 400)
    with pytest.raises(ValueError, match="got a dict, whose iteration gives its names, 'text'"):
        Tokenizer.train({"text": TEXTS}, 400)
    with pytest.raises(ValueError, match="5 as item 1"):
        tokenizer.encode_batch(["a", 5])
    with pytest.raises(ValueError, match="one str, 'abc'"):
        tokenizer.encode_batch("abc")
    with pytest.raises(ValueError, match=r"without lone surrogates; got '.ud800' as item 0"):
        tokenizer.encode("\ud800")
    for ids in ([-1], [tokenizer.vocab_size], [0.5], [[1]]):
        with pytest.raises(ValueError, match=f"integers from 0 to {tokenizer.vocab_size - 1}; got"):
            tokenizer.decode(ids)
    with pytest.raises(ValueError, match=r"not a tokenizer.json.*'nonsense'"):
        Tokenizer("nonsense")
    with pytest.raises(FileNotFoundError, match=r"absent.json"):
        Tokenizer.load(tmp_path / "absent.json")


def test_a_binary_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\x80\xc1\x00")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer\.json: it is not UTF-8"):
        Tokenizer.load(path)

"""Words with marks: the rules of ULMFiT, a vocabulary of them, and back to text."""

import pickle

import pytest

from llmfound.data import Tokenizer, WordTokenizer, words

pytestmark = pytest.mark.on_one_backend


@pytest.mark.parametrize("text, expected", [
    ("The cat sat.", "xxmaj the cat sat ."),
    ("I LOVE it!!!!", "i xxup love it xxrep 4 !"),
    ("so very very very very good", "so xxwrep 4 very good"),
    ("don't it's we'll o'clock", "do n't it 's we 'll o ' clock"),
    ("good<br /><br />bad", "good xxnl xxnl bad"),
    ("rock &amp; roll &quot;live&quot;", 'rock & roll " live "'),
    ("well @-@ known 1 @,@ 000 3 @.@ 5 #39;s", "well-known 1 , 000 3 . 5 's"),
    ("a <unk> b", "a [UNK] b"),
    ("McDonald iPhone U.S.A. today...", "mcdonald iphone xxup u.s.a. today ..."),
    ("Ärger über Öl 東京", "xxmaj ärger über xxmaj öl 東京"),
    ("by L.Bunuel, of the U.S.Army", "by l . xxmaj bunuel , of the xxup u.s. xxmaj army"),
    ("हिन्दी में लिखा", "हिन्दी में लिखा"), ("می\u200cخواهم بروم", "می\u200cخواهم بروم"), ("שָׁלוֹם", "שָׁלוֹם"),
    ("Cafe\u0301-cre\u0300me don't", "xxmaj cafe\u0301-cre\u0300me do n't"), ("ही ही ही ही", "xxwrep 4 ही"),
    ("किन न न न", "किन न न न"), ("👩\u200d👧 ❤\ufe0fok", "👩 \u200d 👧 ❤ \ufe0f ok"),
    ("", ""),
    ("aaaa 10,000 5/6", "xxrep 4 a 10 , 000 5 / 6"),
    ("the the the", "the the the"),
])  # fmt: skip
def test_the_rules(text, expected):
    assert " ".join(words(text)) == expected


TEXTS = ["The cat sat on the mat.", "The DOG sat!!!!", "A cat isn't a dog, the dog said."] * 2


def test_a_vocabulary_and_back():
    tokenizer = WordTokenizer.train(TEXTS)
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.vocabulary[:9] == ["[PAD]", "[START]", "[END]", "[UNK]", "xxmaj", "xxup", "xxrep", "xxwrep", "the"]
    assert tokenizer.decode_batch(tokenizer.encode_batch(TEXTS[:3])) == [
        "The cat sat on the mat.", "The DOG sat!!!!", "a cat isn't a dog, the dog said.",
    ]  # fmt: skip
    assert tokenizer.encode("a bird") == [tokenizer.encode("a")[0], 3]
    assert len(tokenizer.vocabulary) == tokenizer.vocab_size


def test_the_most_frequent_words():
    tokenizer = WordTokenizer.train(TEXTS, vocab_size=10)
    assert tokenizer.vocab_size == 10
    assert set(tokenizer.vocabulary[8:]) < {"the", "cat", "sat", "dog", "."}


def test_text_that_is_tokenized_already():
    tokenizer = WordTokenizer.train(["The <unk> cat @-@ sat", "= Title ="], min_frequency=1, marks=False)
    assert set(tokenizer.vocabulary[4:]) == {"The", "<unk>", "cat", "@-@", "sat", "=", "Title"}
    assert tokenizer.decode(tokenizer.encode("The cat @-@ sat")) == "The cat @-@ sat"


def test_text_that_is_marked_already(tmp_path):
    texts = ["xxmaj hello World , it's xxup usa"] * 2
    tokenizer = WordTokenizer.train(texts, marks=False)
    tokenizer.save(tmp_path / "words.json")
    for one in (tokenizer, WordTokenizer.load(tmp_path / "words.json")):
        assert not one.marks
        assert one.decode(one.encode(texts[0])) == texts[0]


def test_special_words_in_a_text_are_not_taken_for_them():
    tokenizer = WordTokenizer.train(["a b c"] * 3, marks=False)
    assert tokenizer.encode("a [END] b [PAD] [UNK] [START]") == [4, 3, 5, 3, 3, 3]


@pytest.mark.parametrize("marks", [True, False])
def test_a_piece_for_each_id(marks):
    tokenizer = WordTokenizer.train(TEXTS, marks=marks)
    for text in (*TEXTS, "A bird!!!!"):
        assert len(tokenizer.pieces(text)) == len(tokenizer.encode(text))


def test_saved_and_loaded(tmp_path):
    for marks in (True, False):
        tokenizer = WordTokenizer.train(TEXTS, marks=marks)
        tokenizer.save(tmp_path / "words.json")
        for other in (WordTokenizer.load(tmp_path / "words.json"), pickle.loads(pickle.dumps(tokenizer))):
            assert type(other) is WordTokenizer and other.marks == marks
            assert other.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_marks_that_lack_their_word_are_left_out():
    tokenizer = WordTokenizer.train(TEXTS)
    rep, maj = (tokenizer.vocabulary.index(mark) for mark in ("xxrep", "xxmaj"))
    the = tokenizer.vocabulary.index("the")
    assert tokenizer.decode([rep, the, maj]) == "the"
    tokenizer = WordTokenizer.train(["x ² a b !!!! ! "] * 3)
    assert tokenizer.decode([tokenizer.vocabulary.index(word) for word in ("xxrep", "²", "a")]) == "² a"  # no number


@pytest.mark.parametrize("arguments, message", [
    (dict(texts="The cat"), "texts must be an iterable of str; got one str"),
    (dict(texts={"a": 1}), "got a dict, whose iteration gives its names, 'a'"),
    (dict(texts=["a", float("nan")]), "got nan as item 1"), (dict(texts=[b"a"], marks=False), "got b'a' as item 0"),
    (dict(texts=TEXTS, vocab_size=8), r"vocab_size \(8\) must be more than the 8 special words"),
    (dict(texts=[]), "No word occurs"),
    (dict(texts=["one two"]), r"min_frequency \(2\) times"),
])  # fmt: skip
def test_vocabularies_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        WordTokenizer.train(**arguments)


def test_texts_that_are_none():
    with pytest.raises(ValueError, match="texts must be an iterable of str"):
        WordTokenizer.train(TEXTS).encode_batch(["a", None])


def test_every_tokenizer_tells_its_vocabulary():
    tokenizer = Tokenizer.train(TEXTS, 300)
    assert tokenizer.vocabulary[:4] == ["[PAD]", "[START]", "[END]", "[UNK]"]
    assert len(tokenizer.vocabulary) == tokenizer.vocab_size

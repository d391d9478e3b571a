"""Batches to fine-tune on: every example once, as [CLS] a [SEP] b [SEP], with labels where they belong."""

import itertools
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import llmfound
from llmfound.data.finetuning import ChoiceBatches, SentenceBatches, TaggingBatches
from llmfound.training import TokenAccuracy

RNG = np.random.default_rng(0)


def encode_words(words):
    """One id for each small letter, from 3; other characters have none."""
    return [[3 + ord(c) - ord("a") for c in word if "a" <= c <= "z"] for word in words]


TOKENIZER = SimpleNamespace(pad_id=0, cls_id=1, sep_id=2, encode_batch=encode_words, encode_words=encode_words)
WITHOUT = SimpleNamespace(pad_id=0, cls_id=None, encode_batch=encode_words, encode_words=encode_words)


class Table(SimpleNamespace):
    """Iterates as a DataFrame of pandas does."""

    def __iter__(self):
        return iter(self.columns)


TABLE = Table(columns=["first", "second"])


def random_texts(lengths):
    return ["".join(RNG.choice(list("abcdefgh"), n)) for n in lengths]


def taken(batches):
    """All rows of a pass, without padding, with their labels."""
    return [(tuple(ids[ids != 0].tolist()), float(label)) for x, y in (batches[i] for i in range(len(batches)))
            for ids, label in zip(x["token_ids"], y)]  # fmt: skip


def shapes(batches):
    batches = [batches[i] for i in range(len(batches))]
    return [(x[0] if isinstance(x, tuple) else x)["token_ids"].shape for x in batches]


# Sentences


def test_one_segment_and_two():
    x, y = SentenceBatches(["ab", "c"], [1, 0], TOKENIZER, length_multiple=1, shuffle=False)[0]
    assert x["token_ids"].tolist() == [[1, 3, 4, 2], [1, 5, 2, 0]] and not x["segment_ids"].any()
    assert y.tolist() == [1, 0] and {a.dtype.name for a in (*x.values(), y)} == {"int32"}
    x, y = SentenceBatches([("ab", "c"), ["a", "b"]], [0.5, 2], TOKENIZER, length_multiple=4, shuffle=False)[0]
    assert x["token_ids"].tolist() == [[1, 3, 4, 2, 5, 2, 0, 0], [1, 3, 2, 4, 2, 0, 0, 0]]
    assert x["segment_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert x["segment_ids"].dtype == "int32" and y.dtype == "float32" and y.tolist() == [0.5, 2]


def test_pairs_may_be_rows_of_an_array():
    pairs = [("ab", "c"), ("a", "b")]
    found, expected = (SentenceBatches(x, None, TOKENIZER)[0] for x in (np.array(pairs), pairs))
    assert all((found[name] == expected[name]).all() for name in expected)


def test_pairs_lose_one_token_at_a_time_from_the_longer():
    pairs = [(a, b) for a, b in zip(random_texts(range(1, 13)), random_texts(RNG.integers(1, 13, 12)))]
    pairs += [("abcdefgh", "hgfedcba"), ("a", "abcdefgh"), ("abcdefgh", "a")]
    for max_length in range(5, 30):
        batches = SentenceBatches(pairs, None, TOKENIZER, max_length=max_length, length_multiple=1, shuffle=False)
        cut = 0
        for row, pair in zip(batches[0]["token_ids"], pairs):
            a, b = encode_words(pair)
            cut += len(a) + len(b) > max_length - 3
            while len(a) + len(b) > max_length - 3:
                (a if len(a) > len(b) else b).pop()
            assert row[row != 0].tolist() == [1, *a, 2, *b, 2]
        assert batches.cut == cut


def test_long_texts_lose_their_end():
    batches = SentenceBatches(["abcdefgh", "abcd"], None, TOKENIZER, max_length=6, shuffle=False)
    assert batches[0]["token_ids"].tolist() == [[1, 3, 4, 5, 6, 2]] * 2 and batches.cut == 1


TEXTS = random_texts(RNG.integers(1, 60, 500))
LABELS = RNG.integers(0, 3, 500)


def test_every_text_comes_once_an_epoch_with_its_label():
    batches = SentenceBatches(TEXTS, LABELS, TOKENIZER, batch_size=16, max_length=64, seed=3)
    whole = sorted(((1, *ids, 2), label) for ids, label in zip(encode_words(TEXTS), LABELS.tolist()))
    first = taken(batches)
    batches.epoch = 5
    assert sorted(first) == sorted(taken(batches)) == whole and taken(batches) != first
    resumed = SentenceBatches(TEXTS, LABELS, TOKENIZER, batch_size=16, max_length=64, seed=3)
    resumed.epoch = 5
    assert taken(resumed) == taken(batches) and batches.num_classes == 3
    other = SentenceBatches(TEXTS, LABELS, TOKENIZER, batch_size=16, max_length=64, seed=4)
    assert taken(other) != first
    plain = SentenceBatches(TEXTS, LABELS, TOKENIZER, batch_size=16, shuffle=False)
    assert [label for _, label in taken(plain)] == LABELS.tolist()


def test_few_lengths_and_little_padding():
    batches = SentenceBatches(TEXTS, LABELS, TOKENIZER, batch_size=16, max_length=60)
    assert {length for _, length in shapes(batches)} == set(batches.lengths) <= {16, 32, 48, 60}
    x = np.concatenate([batches[i][0]["token_ids"].ravel() for i in range(len(batches))])
    assert np.isclose(batches.padding, np.mean(x == 0)) and batches.padding < 0.25
    exact = SentenceBatches(TEXTS, LABELS, TOKENIZER, batch_size=1, max_length=60, length_multiple=1)
    assert exact.padding == 0
    assert str(batches) == f"500 examples, 32 batches of 16, 32, 48, 60 tokens, {batches.padding:.1%} padding"


LENGTHS = {
    "mixed": RNG.integers(1, 60, 300), "few short": [3] * 10 + [40] * 190, "some short": [3] * 80 + [40] * 120,
    "one long": [3] * 199 + [40], "equal": [9] * 100, "one batch": [3, 9, 40], "two batches": [3] * 16 + [40] * 3,
    "long first": [60] * 64 + [3] * 64, "short first": [3] * 64 + [40] * 64,
}  # fmt: skip


@pytest.mark.parametrize("shuffle, window", [(True, 50), (True, 2), (False, 50)])
@pytest.mark.parametrize("max_length", [20, 32, 100])
@pytest.mark.parametrize("name", LENGTHS)
def test_tensorflow_never_fixes_a_length_that_varies(name, max_length, shuffle, window, monkeypatch):
    monkeypatch.setattr(SentenceBatches, "_WINDOW", window)
    texts = random_texts(LENGTHS[name])
    batches = SentenceBatches(texts, [0] * len(texts), TOKENIZER, batch_size=16, max_length=max_length, shuffle=shuffle)
    fixed = set()
    for epoch in range(20):
        batches.epoch = epoch
        lengths = [length for _, length in shapes(batches)]
        assert max(lengths) <= max_length
        fixed.add(lengths[0] if lengths[0] == lengths[min(1, len(lengths) - 1)] else None)
        assert None in fixed or set(lengths) == fixed
    assert len(fixed) == 1  # one answer for all epochs


def test_without_labels():
    batches = SentenceBatches(TEXTS, None, TOKENIZER, shuffle=False)
    assert isinstance(batches[0], dict) and batches.num_classes is None
    assert SentenceBatches(TEXTS, LABELS, TOKENIZER, num_classes=5).num_classes == 5


def test_which_labels_are_classes_and_which_are_scores(recwarn):
    for labels, given, expected in [
        ([0, 0], None, 2), ([1, 0], None, 2), ([3, 0], None, 4), ([0, 0], np.int64(3), 3), (None, np.int64(3), 3),
        ([0.5, 1.0], None, 1), ([0.0, 1.0], 1, 1), ([0, 5], 1, 1),
    ]:  # fmt: skip
        batches = SentenceBatches(["a", "b"], labels, TOKENIZER, num_classes=given)
        assert batches.num_classes == expected and type(batches.num_classes) is int
        assert labels is None or batches.labels.dtype == ("float32" if expected == 1 else "int32")
        assert labels is None or batches.labels.tolist() == labels
    assert not recwarn.list
    with pytest.warns(UserWarning, match="taken for scores. For classes, pass integers; for scores, num_classes=1"):
        assert SentenceBatches(["a", "b"], [0.0, 1.0], TOKENIZER).num_classes == 1


@pytest.mark.parametrize("texts, labels, options, message", [
    ([], [], {}, "There are no texts"),
    ("ab", [0], {}, "got one str, 'ab'"),
    ({"a": 1}, None, {}, "got a dict, whose iteration gives its names, 'a'. Pass a column of it, or for pairs"),
    (TABLE, None, {}, "got a Table, whose iteration gives its names, 'first', 'second'"),
    (["ab", {"a", "b"}], [0, 1], {}, "text 1 is .*, other, text 0 is str"),
    (["a", ("a", "b")], [0, 1], {}, r"text 1 is \"\('a', 'b'\)\", a pair, text 0 is str"),
    ([("a", "b", "c")], [0], {}, "text 0 is .*, other"),
    ([3, "a"], [0, 1], {}, "text 0 is '3', other"),
    ([("a", None)], [0], {}, "all str, or all"),
    (["a", " ?"], [0, 1], {}, r"Text 1 has no word pieces: ' \?'"),
    ([("a", "b"), ("a", "")], [0, 1], {}, "Text 1 has no word pieces: ''"),
    (["a", "b"], [0], {}, "one for each of the 2 texts"),
    (["a", "b"], [0.5], {}, r"one for each of the 2 texts; got shape \(1,\)"),
    (["a", "b"], [0.5, float("nan")], {}, "1 that are not finite"),
    (["a", "b"], [0.5, 1.0], dict(num_classes=2), "got num_classes=2. For classes, pass integers"),
    (["a", "b"], [0, 1], dict(num_classes=2.0), "num_classes must be an integer of at least 1; got 2.0"),
    (["a", "b"], [0, 2], dict(num_classes=2), "labels must be 0 to 1; text 1 has 2"),
    (["a", "b"], [-1, 0], {}, "text 0 has -1"),
    (["a", "b"], ["x", "y"], {}, "labels must be integers"),
    (["a"], [0], dict(max_length=4), "max_length must be an integer of at least 5"),
    (["a"], [0], dict(batch_size=0), "batch_size must be an integer of at least 1"),
    (["a"], [0], dict(length_multiple=0), "length_multiple must be an integer of at least 1"),
    (["a"], [0], dict(seed=-1), "seed must be an integer of at least 0"),
    (["a"], [0], dict(tokenizer=WITHOUT), "The tokenizer has no cls_id, sep_id"),
])  # fmt: skip
def test_texts_and_labels_that_make_no_sense(texts, labels, options, message):
    with pytest.raises(ValueError, match=message):
        SentenceBatches(texts, labels, **{"tokenizer": TOKENIZER, **options})


# Multiple choice

QUESTIONS, CHOICES = random_texts(RNG.integers(1, 20, 50)), [random_texts(RNG.integers(1, 20, 4)) for _ in range(50)]
ANSWERS = RNG.integers(0, 4, 50)


def test_choices_stand_side_by_side():
    batches = ChoiceBatches(QUESTIONS, CHOICES, ANSWERS, TOKENIZER, batch_size=8, length_multiple=4)
    flat = SentenceBatches([(q, c) for q, row in zip(QUESTIONS, CHOICES) for c in row], None, TOKENIZER,
                           batch_size=4, length_multiple=1, shuffle=False)  # fmt: skip
    expected = {tuple(tuple(ids[ids != 0].tolist()) for ids in flat[i]["token_ids"]): i for i in range(50)}
    found = []
    for x, y in (batches[i] for i in range(len(batches))):
        assert x["token_ids"].shape == x["segment_ids"].shape == (len(y), 4, x["token_ids"].shape[2])
        for ids, segments, label in zip(x["token_ids"], x["segment_ids"], y):
            i = expected[tuple(tuple(row[row != 0].tolist()) for row in ids)]
            assert label == ANSWERS[i]
            assert segments.sum(axis=1).tolist() == [len(choice) + 1 for choice in CHOICES[i]]
            found.append(i)
    assert sorted(found) == list(range(50)) and found != sorted(found) and batches.num_choices == 4
    cells = np.concatenate([batches[i][0]["token_ids"].ravel() for i in range(len(batches))])
    assert np.isclose(batches.padding, np.mean(cells == 0))
    plain = ChoiceBatches(QUESTIONS, CHOICES, None, TOKENIZER, shuffle=False, max_length=16)
    assert shapes(plain)[0] == (16, 4, 16) and plain.cut > 0


@pytest.mark.parametrize("questions, choices, labels, message", [
    ([], [], [], "There are no texts"),
    (["a", "b"], [["a", "b"]], [0, 1], "2 questions, but choices for 1"),
    (["a", "b"], [["a", "b"], ["c"]], [0, 1], r"question 0 has 2, question 1 has \['c'\]"),
    (["a", "b"], [["a"], ["c"]], [0, 0], "two at least"),
    (["a"], ["ab"], [0], "question 0 has ab"),
    (["a"], [["a", 3]], [0], r"all str, .*question 0 has \['a', 3\]"), (["a", 3], [], [], "got 3 as item 1"),
    (["a", "b"], [["a", "b"], ["c", ""]], [0, 0], "Text 1 has no word pieces: ''"),
    (["a"], [["a", "b"]], [2], "labels must be 0 to 1; text 0 has 2"),
    (["a"], [["a", "b"]], [0.0], "labels must be integers"),
])  # fmt: skip
def test_choices_that_make_no_sense(questions, choices, labels, message):
    with pytest.raises(ValueError, match=message):
        ChoiceBatches(questions, choices, labels, TOKENIZER)


# Tagging

SENTENCES = [["Ann", "met", "bob", "?!", "cd"], ["e"], ["?", "f", "ghab"]]
TAGS = [["O", "O", "B-per", "I-per", "B-loc"], ["O"], ["B-loc", "I-loc", "O"]]


def test_labels_stand_at_first_pieces():
    batches = TaggingBatches(SENTENCES, TAGS, TOKENIZER, length_multiple=1, shuffle=False)
    assert batches.classes == ("O", "B-loc", "B-per", "I-loc", "I-per") and batches.num_classes == 5
    x, y = batches[0]
    assert x["token_ids"].tolist()[0] == [1, *encode_words(["nnmetbobcd"])[0], 2]
    assert y.tolist()[0] == [-1, 0, -1, 0, -1, -1, 2, -1, -1, 1, -1, -1]
    assert y.tolist()[1:] == [[-1, 0] + [-1] * 10, [-1, 3, 0] + [-1] * 9]
    assert y.dtype == "int32" and not x["segment_ids"].any() and x["segment_ids"].shape == y.shape
    given = TaggingBatches(SENTENCES, TAGS, TOKENIZER, classes=batches.classes[::-1], length_multiple=1, shuffle=False)
    assert (given[0][1] == np.where(y < 0, -1, 4 - y)).all() and given.classes[4] == "O"


@pytest.mark.parametrize("options", [{}, dict(max_length=8, split_long=True), dict(max_length=5, split_long=True)])
def test_tags_come_back(options):
    batches = TaggingBatches(SENTENCES, TAGS, TOKENIZER, batch_size=2, shuffle=False, **options)
    labels = np.concatenate([batches[i][1] for i in range(len(batches))])
    expected = [["O", "O", "B-per", "O", "B-loc"], ["O"], ["O", "I-loc", "O"]]  # words without pieces are O
    assert batches.words(np.maximum(labels, 0)) == expected
    scores = np.eye(5)[labels] - 0.5
    assert batches.words(scores) == expected
    classes = ("B-per", "I-loc", "B-loc", "O")
    alone = TaggingBatches(SENTENCES, None, TOKENIZER, classes, shuffle=False)
    assert alone.words(np.zeros((3, 16), int)) == [["B-per"] * 3 + ["O", "B-per"], ["B-per"], ["O", "B-per", "B-per"]]
    assert isinstance(alone[0], dict) and alone.classes == classes
    assert len({shape[1] for shape in shapes(batches)}) == 1


def test_a_tokenizer_of_words_may_give_arrays():
    arrays = SimpleNamespace(**{**vars(TOKENIZER), "encode_words": lambda words: [*map(np.array, encode_words(words))]})
    found, plain = (TaggingBatches(SENTENCES, TAGS, tokenizer)[0] for tokenizer in (arrays, TOKENIZER))
    assert (found[0]["token_ids"] == plain[0]["token_ids"]).all() and (found[1] == plain[1]).all()


def test_tags_may_come_from_generators():
    classes = ["O", "B-per", "I-per", "B-loc", "I-loc"]
    rows = TaggingBatches(iter(SENTENCES), ((tag for tag in tags) for tags in TAGS), TOKENIZER, iter(classes))
    assert rows.classes == tuple(classes)
    plain = TaggingBatches(SENTENCES, TAGS, TOKENIZER, classes)
    assert (rows[0][1] == plain[0][1]).all()


def test_long_sentences_are_cut_between_words():
    words = random_texts(RNG.integers(1, 9, 60))
    tags = [f"B-{i % 7}" for i in range(60)]
    options = dict(batch_size=90, split_long=True, shuffle=False)
    batches = TaggingBatches([words, ["a"]], [tags, ["O"]], TOKENIZER, max_length=12, **options)
    x, y = batches[0]
    assert x["token_ids"].shape[1] == 12
    rows = [ids[ids > 2].tolist() for ids in x["token_ids"]]
    assert list(itertools.chain(*rows)) == encode_words(["".join(words) + "a"])[0]
    starts = np.cumsum([0, *map(len, words)])
    assert np.isin(np.cumsum([0, *map(len, rows[:-1])]), starts).all()
    assert batches.words(np.maximum(y, 0)) == [tags, ["O"]]
    short = TaggingBatches([["abcdefgh", "b"]], [["x", "y"]], TOKENIZER, max_length=5, **options)
    assert short[0][0]["token_ids"].tolist() == [[1, 3, 4, 5, 2], [1, 4, 2, 0, 0]]
    assert short[0][1].tolist() == [[-1, 0, -1, -1, -1], [-1, 1, -1, -1, -1]]


def test_shuffled_sentences_keep_their_labels():
    sentences = [random_texts(RNG.integers(1, 5, n)) for n in RNG.integers(1, 30, 100)]
    tags = [["BIO"[len(word) % 3] for word in words] for words in sentences]
    batches = TaggingBatches(sentences, tags, TOKENIZER, batch_size=8)
    expected = sorted((tuple(encode_words(["".join(words)])[0]), marks) for words, marks in zip(sentences, tags))
    found = []
    for x, y in (batches[i] for i in range(len(batches))):
        found += [(tuple(ids[ids > 2].tolist()), [batches.classes[label] for label in labels[labels >= 0]])
                  for ids, labels in zip(x["token_ids"], y)]  # fmt: skip
    assert sorted(found) == expected and len(batches.lengths) > 1
    with pytest.raises(ValueError, match="shuffle=False"):
        batches.words(np.zeros((100, 128), int))


@pytest.mark.parametrize("sentences, tags, options, message", [
    ([], [], {}, "There are no sentences"),
    (["ab"], [["O"]], {}, "sentence 0 is 'ab'"),
    ([["a"], []], [["O"], []], {}, r"sentence 1 is '\[\]'"),
    ([["a"], ["b", 3]], [["O"], ["O", "O"]], {}, r"sentence 1 is .*\['b', 3\]"),
    ([["a"], ["b"]], [["O"]], {}, "2 sentences, but tags for 1"),
    ([["a"], ["b"]], [["O"], ["O", "O"]], {}, "Sentence 1 has 1 words, but 2 tags"),
    ([["a"], ["b"]], [["O"], ["X"]], dict(classes=["O", "B"]), "Sentence 1 has the tag 'X'; classes are O, B"),
    ([["a"]], None, {}, "classes must be given"),
    ([["a"]], [["O"]], dict(classes={"O", "B"}), r"classes must stand in an order, .* Pass sorted\(classes\)"),
    ([["a"]], [["O"]], dict(classes={"B": 1, "O": 0}), r"order of their numbers; got .* Pass sorted\(classes, key="),
    ([["a"]], None, dict(classes=frozenset("O")), "in an order, which a set has not"),
    ([["a", "b"]], [["O", None]], {}, "Tags must be str; got None among them"),
    ([["a"]], [[3]], dict(classes=[0, 1]), "the tag 3; classes are 0, 1"),
    ([["a"], ["\ud800"]], [["O"], ["O"]], {}, "sentence 1 is"),
    ([["a"], ["b", "abcd"]], [["O"], ["O", "O"]], dict(max_length=6), "Sentence 1 has 5 word pieces, .* leaves 4"),
    ([["a"]], [["O"]], dict(tokenizer=WITHOUT), "has no cls_id, sep_id"),
])  # fmt: skip
def test_tags_that_make_no_sense(sentences, tags, options, message):
    with pytest.raises(ValueError, match=message):
        TaggingBatches(sentences, tags, **{"tokenizer": TOKENIZER, **options})


@pytest.mark.parametrize("predictions, message", [
    (np.zeros((3, 16, 4)), r"scores of shape \(3, 16, 5\).* got float64 of shape \(3, 16, 4\)"),
    (np.zeros((2, 16), int), r"integers of shape \(3, 16\); got int64 of shape \(2, 16\)"),
    (np.zeros((3, 16)), r"got float64 of shape \(3, 16\)"),
    (np.full((3, 16), 5), "classes from 0 to 4; got 5 to 5"),
    (np.full((3, 16), -1), "got -1 to -1"),
])  # fmt: skip
def test_predictions_that_make_no_sense(predictions, message):
    batches = TaggingBatches(SENTENCES, TAGS, TOKENIZER, shuffle=False)
    with pytest.raises(ValueError, match=message):
        batches.words(predictions)


# Keras


def test_loss_and_metric_leave_out_what_has_no_tag():
    batches = TaggingBatches(SENTENCES, TAGS, TOKENIZER, shuffle=False)
    _, labels = batches[0]
    logits = RNG.normal(size=(*labels.shape, 5)).astype("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=batches.ignore)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    rows, places = np.nonzero(labels >= 0)
    expected = -log_probabilities[rows, places, labels[rows, places]].mean()
    assert np.isclose(float(loss(labels, logits)), expected, atol=1e-6)
    metric = TokenAccuracy(pad_id=batches.ignore)
    metric.update_state(labels, logits)
    right = logits.argmax(axis=-1)[rows, places] == labels[rows, places]
    assert np.isclose(float(metric.result()), right.mean(), atol=1e-6)


class Tokens(keras.Model):
    """Scores of each token."""

    def __init__(self, units):
        super().__init__()
        self.tokens, self.segments = keras.layers.Embedding(32, 4), keras.layers.Embedding(2, 4)
        self.dense = keras.layers.Dense(units)

    def call(self, inputs):
        return self.dense(self.tokens(inputs["token_ids"]) + self.segments(inputs["segment_ids"]))


class Texts(Tokens):
    def call(self, inputs):
        return keras.ops.mean(super().call(inputs), axis=-2)


class Choice(Texts):
    def call(self, inputs):
        return keras.ops.squeeze(super().call(inputs), -1)


SCORES = RNG.random(499)
WORDS = [[text[i : i + 3] for i in range(0, len(text), 3)] for text in TEXTS]


def examples(kind, **options):
    options = dict(tokenizer=TOKENIZER, batch_size=100, length_multiple=32, **options)
    if kind == "classes":
        return SentenceBatches(TEXTS, LABELS, **options)
    if kind == "scores":
        return SentenceBatches(list(itertools.pairwise(TEXTS)), SCORES, **options)
    if kind == "choices":
        return ChoiceBatches(TEXTS[:200], [TEXTS[i : i + 3] for i in range(200)], LABELS[:200], **options)
    return TaggingBatches(WORDS, [["OI"["a" in word] for word in words] for words in WORDS], **options)


class TextModel(llmfound.Model):
    def __init__(self):
        super().__init__()
        self.tokens = keras.layers.Embedding(32, 2)

    def input_signature(self):
        return {"token_ids": (None,), "segment_ids": (None,)}

    def call(self, inputs):
        return keras.ops.mean(self.tokens(inputs["token_ids"]), axis=1)


def test_predictions_are_in_the_order_of_the_texts():
    model, options = TextModel(), dict(tokenizer=TOKENIZER, batch_size=100, length_multiple=64)
    plain = SentenceBatches(TEXTS, None, **options)
    found = model.predict(plain, verbose=0)
    assert np.allclose(found, np.concatenate([model.predict_on_batch(plain[i]) for i in range(5)]), atol=1e-6)
    labelled = SentenceBatches(TEXTS, LABELS, **options, shuffle=False)
    assert np.allclose(model.predict(labelled, verbose=0), found, atol=1e-6)
    for batches in (SentenceBatches(TEXTS, LABELS, **options), SentenceBatches(TEXTS, None, **options, shuffle=True)):
        with pytest.raises(ValueError, match=r"SentenceBatches: shuffled batches .*; make them with shuffle=False"):
            model.predict(batches, verbose=0)


def test_what_has_no_labels_is_not_shuffled():
    tags = [["O"] * len(words) for words in SENTENCES]
    for shuffle in (None, False, True):
        for labels in (None, [0] * 50):
            given = labels is not None
            found = [
                SentenceBatches(QUESTIONS, labels, TOKENIZER, shuffle=shuffle),
                ChoiceBatches(QUESTIONS, CHOICES, labels, TOKENIZER, shuffle=shuffle),
                TaggingBatches(SENTENCES, tags if given else None, TOKENIZER, ["O"], shuffle=shuffle),
            ]
            assert [batches.shuffle for batches in found] == [given if shuffle is None else shuffle] * 3


@pytest.mark.parametrize("kind, network, units", [
    ("classes", Texts, 3), ("scores", Texts, 1), ("choices", Choice, 1), ("tags", Tokens, 2),
])  # fmt: skip
def test_fit_evaluate_and_predict(kind, network, units):
    model = network(units)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=TaggingBatches.ignore)
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError() if kind == "scores" else loss)
    batches, in_order = examples(kind), examples(kind, shuffle=False)
    assert len(batches.lengths) > 1
    model.fit(batches, epochs=2, verbose=0)
    assert batches.epoch == 2
    found, measured = model.predict(in_order, verbose=0), model.evaluate(in_order, verbose=0)
    labels = np.concatenate([in_order[i][1] for i in range(len(in_order))])
    if kind == "tags":
        first = found.argmax(axis=-1)[labels >= 0]
        assert [tag for tags in in_order.words(found) for tag in tags] == [in_order.classes[i] for i in first]
    elif kind == "scores":
        assert np.isclose(measured, np.mean((found[:, 0] - SCORES) ** 2), atol=1e-6)
    else:
        likelihood = np.exp(found) / np.exp(found).sum(axis=-1, keepdims=True)
        expected = -np.log(likelihood[np.arange(len(found)), LABELS[: len(found)]]).mean()
        assert np.isclose(measured, expected, atol=1e-5)

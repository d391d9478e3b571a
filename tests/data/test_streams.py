"""Streams for language models cover their text without overlap; texts for classifiers come once each, sorted."""

import keras
import numpy as np
import pytest

from llmfound.data import ClassificationBatches, LanguageModelBatches, WordTokenizer, stream, write_stream
from llmfound.models import ULMFiT


def words_of(batches):
    """The inputs and labels of each row, without padding, joined over the windows."""
    rows = [[[], []] for _ in range(batches.batch_size)]
    for x, y in (batches[i] for i in range(len(batches))):
        real = x["token_ids"] != batches.pad_id
        assert ((y != batches.pad_id) == real).all()
        for row, inputs, labels, there in zip(rows, x["token_ids"], y, real):
            row[0].extend(inputs[there].tolist())
            row[1].extend(labels[there].tolist())
    return rows


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("count, batch_size", [(1000, 4), (1001, 7), (2, 1), (9, 4), (3, 4)])
def test_windows_cover_the_text_once(count, batch_size, variable, reverse):
    ids = np.arange(1, count + 1)
    batches = LanguageModelBatches(ids, batch_size, 20, variable, reverse)
    rows = words_of(batches)
    text = ids[::-1] if reverse else ids
    assert [i for inputs, _ in rows for i in inputs] == text[:-1].tolist()
    assert [i for _, labels in rows for i in labels] == text[1:].tolist()
    assert batches.tokens_per_epoch == count - 1 == sum(len(labels) for _, labels in rows)
    flags = [batches[i][0]["continues"] for i in range(len(batches))]
    assert (flags[0] == 0).all() and all((f == 1).all() for f in flags[1:])


def test_ids_may_be_a_tensor_or_a_list():
    ids = np.arange(1, 100, dtype="int32")
    expected = words_of(LanguageModelBatches(ids, 2, 20, reverse=True))
    for given in (keras.ops.convert_to_tensor(ids), ids.tolist()):
        assert words_of(LanguageModelBatches(given, 2, 20, reverse=True)) == expected


def test_check_7_lengths_of_windows():
    batches = LanguageModelBatches(np.ones(3_000_000, "int32"), 2, 70)
    lengths = batches.lengths[:-1]
    assert abs(lengths.mean() - 67.75) < 0.3 and lengths.min() >= 5
    assert 0.03 < (lengths < 52).mean() < 0.07
    assert lengths.sum() + batches.lengths[-1] == 1_500_000


def test_few_shapes():
    batches = LanguageModelBatches(np.ones(200_000, "int32"), 2, 70)
    assert {batches[i][0]["token_ids"].shape[1] for i in range(len(batches) - 1)} <= set(range(20, 111, 10))
    assert batches[0][0]["token_ids"].shape != batches[1][0]["token_ids"].shape
    fixed = LanguageModelBatches(np.ones(1001, "int32"), 2, 70, variable=False)
    assert {fixed[i][0]["token_ids"].shape for i in range(len(fixed))} == {(2, 70)}
    exact = LanguageModelBatches(np.ones(20_000, "int32"), 2, 70, length_multiple=1)
    assert [exact[i][0]["token_ids"].shape[1] for i in range(2, len(exact))] == exact.lengths[2:].tolist()


@pytest.mark.parametrize("count, batch_size", [(20_000, 4), (1000, 4), (300, 7), (9, 4)])
def test_every_epoch_has_equally_many_windows(count, batch_size):
    batches = LanguageModelBatches(np.arange(1, count + 1), batch_size, 20)
    windows, least = len(batches), batches.lengths.min()
    for epoch in range(1, 20):
        batches.epoch = epoch
        assert len(batches) == windows and batches.lengths.min() >= min(3, least)
        assert [i for inputs, _ in words_of(batches) for i in inputs] == list(range(1, count))
    if count == 20_000:
        assert abs(batches.lengths.mean() - 19.5) < 1


def test_fit_reads_every_epoch_to_its_end():
    ids = np.random.default_rng(0).integers(1, 9, 2000)
    batches = LanguageModelBatches(ids, 4, 20)
    model = ULMFiT(9, embedding_dim=4, hidden_dim=4, num_layers=1)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(batches, epochs=4, verbose=0)
    assert batches.epoch == 4


def test_epochs_differ_and_can_be_resumed():
    batches = LanguageModelBatches(np.arange(1, 5000), 2, 70, seed=3)
    first = batches.lengths.tolist()
    for _ in batches:
        pass
    assert batches.epoch == 1 and batches.lengths.tolist() != first
    other = LanguageModelBatches(np.arange(1, 5000), 2, 70, seed=3)
    other.epoch = 1
    assert other.lengths.tolist() == batches.lengths.tolist()


def test_files_larger_than_memory(tmp_path):
    tokenizer = WordTokenizer.train(["a b c d", "a b"] * 2, min_frequency=1)
    texts = [f"{'a b c d'[: 1 + 2 * (i % 4)]}" for i in range(3500)]
    count = write_stream(tmp_path / "text.npy", (text for text in texts), tokenizer)
    mapped = np.load(tmp_path / "text.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap) and len(mapped) == count
    whole = stream(texts, tokenizer)
    assert (mapped == whole).all() and whole[-1] == tokenizer.end_id
    assert (whole == tokenizer.end_id).sum() == len(texts)
    ours, theirs = LanguageModelBatches(mapped, 4, 20), LanguageModelBatches(whole, 4, 20)
    assert all((ours[i][0]["token_ids"] == theirs[i][0]["token_ids"]).all() for i in range(len(ours)))
    assert isinstance(ours.ids, np.memmap)


def test_a_file_that_could_not_be_written_is_not_left(tmp_path):
    tokenizer = WordTokenizer.train(["a a"])

    def texts():
        yield from ["a"] * 3000
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        write_stream(tmp_path / "text.npy", texts(), tokenizer)
    with pytest.raises(ValueError, match="There are no texts"):
        write_stream(tmp_path / "text.npy", [], tokenizer)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"must end in \.npy"):
        write_stream(tmp_path / "text.bin", ["a"], tokenizer)
    with pytest.raises(ValueError, match="got one str"):
        stream("a a", tokenizer)
    with pytest.raises(ValueError, match="got nan as item 1500"):
        stream(["a"] * 1500 + [float("nan")], tokenizer)
    with pytest.raises(ValueError, match="There are no texts"):
        stream([], tokenizer)


@pytest.mark.parametrize("arguments, message", [
    (dict(ids=np.array([1])), r"two at least; got int64 of shape \(1,\)"),
    (dict(ids=np.ones((2, 3), int)), r"shape \(2, 3\)"),
    (dict(ids=np.ones(5)), "got float64"),
    (dict(ids=[1, 2, 3], window=0), "window must be an integer of at least 1"),
    (dict(ids=[1, 2, 3], batch_size=2.5), "batch_size must be an integer"),
])  # fmt: skip
def test_streams_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelBatches(**arguments)


# Classification

TOKENIZER = WordTokenizer.train(["a b c d e f g h"], min_frequency=1, marks=False)
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(list("abcdefgh"), n)) for n in RNG.integers(1, 200, 300)]
LABELS = RNG.integers(0, 3, 300)


def test_every_text_comes_once_with_its_label():
    batches = ClassificationBatches(TEXTS, LABELS, TOKENIZER, batch_size=16)
    found = []
    for x, y in (batches[i] for i in range(len(batches))):
        assert x["token_ids"].shape[1] % 16 == 0 and x["token_ids"].dtype == "int32"
        found += [(TOKENIZER.decode(ids), int(label)) for ids, label in zip(x["token_ids"], y)]
    assert sorted(found) == sorted(zip(TEXTS, LABELS.tolist()))
    assert batches.num_classes == 3 and len(batches) == 19
    assert ClassificationBatches(["a", "b"], [0, 0], TOKENIZER).num_classes == 2
    assert type(ClassificationBatches(["a"], [0], TOKENIZER, num_classes=np.int64(5)).num_classes) is int


def test_texts_of_a_batch_are_of_like_length():
    batches = ClassificationBatches(TEXTS, LABELS, TOKENIZER, batch_size=16)
    padding = np.mean(np.concatenate([(batches[i][0]["token_ids"] == 0).ravel() for i in range(len(batches))]))
    assert padding < 0.15  # half of it, if they were not sorted
    order = [batches[i][0]["token_ids"].shape[1] for i in range(len(batches))]
    assert order != sorted(order)


def test_orders_of_epochs():
    batches = ClassificationBatches(TEXTS, LABELS, TOKENIZER, batch_size=16, seed=1)
    first = [batches[i][1].tolist() for i in range(3)]
    batches.epoch = 1
    assert [batches[i][1].tolist() for i in range(3)] != first
    batches.epoch = 0
    assert [batches[i][1].tolist() for i in range(3)] == first
    plain = ClassificationBatches(TEXTS, LABELS, TOKENIZER, batch_size=16, shuffle=False)
    assert np.concatenate([plain[i][1] for i in range(len(plain))]).tolist() == LABELS.tolist()


def test_without_labels_and_cut():
    batches = ClassificationBatches(TEXTS, None, TOKENIZER, shuffle=False, max_length=5, length_multiple=1)
    assert not isinstance(batches[0], tuple) and batches.num_classes is None
    kept = [TOKENIZER.decode(ids) for i in range(len(batches)) for ids in batches[i]["token_ids"]]
    assert kept == [" ".join(text.split()[-5:]) for text in TEXTS]
    assert ClassificationBatches(TEXTS, LABELS, TOKENIZER).shuffle is True
    assert ClassificationBatches(TEXTS, None, TOKENIZER).shuffle is False


@pytest.mark.parametrize("texts, labels, options, message", [
    ([], [], {}, "There are no texts"),
    ("abcd", None, {}, "texts must be an iterable of str; got one str, 'abcd'"),
    (["a"] * 1500 + [float("nan")], None, {}, "got nan as item 1500"), ({"a": 1}, None, {}, "got a dict"),
    (["a"], None, dict(max_length=0), "max_length must be an integer of at least 1"),
    (["a", " "], [0, 1], {}, "Text 1 has no words: ' '"),
    (["a", "b"], [0], {}, "one for each of the 2 texts"),
    (["a", "b"], [0.5, 1.0], {}, "labels must be integers"),
    (["a", "b"], [0, 2], dict(num_classes=2), "labels must be 0 to 1; text 1 has 2"),
    (["a", "b"], [-1, 0], {}, "text 0 has -1"),
    (["a", "b"], [0, 1], dict(batch_size=0), "batch_size must be an integer of at least 1"),
])  # fmt: skip
def test_texts_and_labels_that_make_no_sense(texts, labels, options, message):
    with pytest.raises(ValueError, match=message):
        ClassificationBatches(texts, labels, TOKENIZER, **options)


def test_fit_takes_both():
    embed = keras.Sequential(
        [keras.layers.Embedding(20, 4), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3)]
    )

    class Classifier(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = embed

        def call(self, inputs):
            return self.inner(inputs["token_ids"])

    model = Classifier()
    batches = ClassificationBatches(TEXTS, LABELS, TOKENIZER, batch_size=16)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(batches, epochs=2, verbose=0, shuffle=False)
    assert batches.epoch == 2
    plain = ClassificationBatches(TEXTS, None, TOKENIZER, batch_size=16, shuffle=False)
    assert model.predict(plain, verbose=0).shape == (300, 3)

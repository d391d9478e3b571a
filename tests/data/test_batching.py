import itertools
import random
import tracemalloc
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfound.data import Tokenizer, TranslationBatches, WindowedBatches, batching, pad
from llmfound.models import Transformer
from llmfound.training import Checkpoints

START, END = 1, 2


class Letters:
    """A tokenizer of one id per letter: a is 3, b is 4, and so on."""

    pad_id, start_id, end_id, vocab_size = 0, START, END, 29

    def encode_batch(self, texts):
        return [[ord(letter) - ord("a") + 3 for letter in text] for text in texts]


class Shifted(Letters):
    pad_id, start_id, end_id, vocab_size = 50, 60, 61, 62


def ids(text):
    return Letters().encode_batch([text])[0]


def random_pairs(count, longest=12, seed=0):
    generator = random.Random(seed)

    def word():
        return "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(0, longest)))

    return [(word(), word()) for _ in range(count)]


def contents(batches):
    """The pairs of an epoch, in its order, checked against the layout on the way."""
    found = []
    for x, labels in batches:
        assert (*x["source_ids"].shape, labels.shape[1]) in batches.shapes
        assert x["target_ids"].shape == labels.shape
        assert {x["source_ids"].dtype, x["target_ids"].dtype, labels.dtype} == {np.dtype("int32")}
        for source, target, label in zip(x["source_ids"], x["target_ids"], labels):
            source, target, label = ([int(i) for i in row[: np.count_nonzero(row)]] for row in (source, target, label))
            if not source:
                assert not target and not label  # a row of padding
                continue
            assert source[-1] == END and target[0] == START and label == [*target[1:], END]
            found.append((tuple(source[:-1]), tuple(target[1:])))
    return found


def expected(pairs):
    return Counter((tuple(ids(source)), tuple(ids(target))) for source, target in pairs)


words = st.text("abcdefgh", max_size=30)


@given(
    pairs=st.lists(st.tuples(words, words), min_size=1, max_size=40),
    num_buckets=st.integers(1, 6),
    batch_tokens=st.integers(31, 200),
    batch_size=st.none() | st.integers(1, 9),
    shuffle=st.booleans(),
)
def test_every_pair_once_in_few_shapes(pairs, num_buckets, batch_tokens, batch_size, shuffle):
    batches = TranslationBatches(
        pairs, Letters(), None, batch_tokens, batch_size, num_buckets=num_buckets, shuffle=shuffle
    )
    assert Counter(contents(batches)) == expected(pairs)
    assert 1 <= len(batches.shapes) <= num_buckets
    assert batches.shapes == sorted(batches.shapes, key=lambda shape: shape[1:])
    for rows, source_length, target_length in batches.shapes:
        if batch_size is None:
            assert rows * max(source_length, target_length) <= batch_tokens
        else:
            assert rows == batch_size
    seen = [(*x["source_ids"].shape, y.shape[1]) for x, y in batches]
    assert set(seen) == set(batches.shapes) and len(seen) == len(batches)
    assert seen[0] == batches.shapes[0] and (len(seen) == 1 or seen[1] in (batches.shapes[0], batches.shapes[-1]))
    cells = sum(x["source_ids"].size + y.size for x, y in batches)
    real = sum(np.count_nonzero(x["source_ids"]) + np.count_nonzero(y) for x, y in batches)
    assert batches.padding == pytest.approx(1 - real / cells)
    assert batches.tokens_per_epoch == sum(np.count_nonzero(y) for _, y in batches)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12),
    num_buckets=st.integers(1, 3),
    batch_size=st.none() | st.integers(1, 4),
)
def test_buckets_are_the_best_of_all_chains(lengths, num_buckets, batch_size):
    source, target = np.array(lengths).T
    budget = batching._Budget(12, batch_size)

    def cells(chain):
        total, before = 0, 0
        for s, t in chain:
            fitting = int(((source <= s) & (target <= t)).sum())
            total += int(budget.cells(fitting - before, s, t))
            before = fitting
        return total

    corners = list(itertools.product(range(1, source.max() + 1), range(1, target.max() + 1)))
    chains = (
        (*chain, corners[-1])
        for k in range(num_buckets)
        for chain in itertools.combinations(corners, k)
        if all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(chain))
    )
    found = batching._bucket_lengths(source, target, num_buckets, budget)
    assert len(found) <= num_buckets and found[-1] == corners[-1]
    assert cells(found) == min(map(cells, chains))


def test_many_lengths_are_thinned_out_to_a_grid_that_keeps_both_ends():
    grid = batching._grid(np.arange(3, 2000))
    assert grid[0] == 3 and grid[-1] == 1999 and 30 < len(grid) <= batching._GRID
    assert (np.diff(grid) > 0).all() and (grid[1:] / grid[:-1]).max() < 1.4


def test_more_buckets_mean_less_padding():
    pairs = random_pairs(500)
    padding = [TranslationBatches(pairs, Letters(), batch_tokens=200, num_buckets=k).padding for k in (1, 2, 4, 8)]
    assert padding == sorted(padding, reverse=True) and padding[-1] < 0.6 * padding[0]


def test_the_last_batch_is_filled_up():
    batches = TranslationBatches([("a", "bc")] * 5, Letters(), batch_size=3, shuffle=False)
    assert batches.shapes == [(3, 2, 3)]
    x, labels = batches[1]
    assert x["source_ids"].tolist() == [[3, 2], [3, 2], [0, 0]]
    assert x["target_ids"].tolist() == [[1, 4, 5], [1, 4, 5], [0, 0, 0]]
    assert labels.tolist() == [[4, 5, 2], [4, 5, 2], [0, 0, 0]]


def test_rows_are_shared_out_evenly():
    batches = TranslationBatches([("a", "b")] * 9, Letters(), batch_tokens=16, shuffle=False)
    assert batches.shapes == [(5, 2, 2)]  # of 8 rows that would fit, to leave 1 row of padding instead of 7


def test_two_tokenizers():
    batches = TranslationBatches([("ab", "c"), ("a", "cd")], Letters(), Shifted(), num_buckets=1, shuffle=False)
    x, labels = batches[0]
    assert (batches.source_vocab_size, batches.target_vocab_size) == (29, 62)
    assert x["source_ids"].tolist() == [[3, 4, 2], [3, 2, 0]]
    assert x["target_ids"].tolist() == [[60, 5, 50], [60, 5, 6]]
    assert labels.tolist() == [[5, 61, 50], [5, 6, 61]]


def test_order_is_a_function_of_seed_and_epoch():
    pairs = random_pairs(60)

    def order(seed, epoch, shuffle=True):
        batches = TranslationBatches(pairs, Letters(), batch_tokens=60, seed=seed, shuffle=shuffle)
        batches.epoch = epoch
        return contents(batches)

    assert order(0, 0) == order(0, 0) and order(3, 7) == order(3, 7)
    assert len({tuple(order(*key)) for key in itertools.product(range(2), range(3))}) == 6
    assert order(0, 0, False) == order(1, 5, False)


def test_order_is_the_same_on_every_backend():
    batches = TranslationBatches([(letter, "") for letter in "abcdefgh"], Letters(), batch_size=4, seed=1)
    order = ["".join(chr(int(i) + 94) for i in x["source_ids"][:, 0]) for x, _ in batches]
    assert order == ["cgdh", "fabe"]


def test_a_tokenizer_may_give_arrays():
    class Arrays(Letters):
        def encode_batch(self, texts):
            return [np.array(row, "int32") for row in super().encode_batch(texts)]

    pairs = random_pairs(40)
    found, plain = (TranslationBatches(pairs, tokenizer, batch_size=4) for tokenizer in (Arrays(), Letters()))
    assert contents(found) == contents(plain)


def test_pairs_may_be_rows_of_an_array():
    pairs = random_pairs(20)
    found, expected = (TranslationBatches(x, Letters(), batch_size=4) for x in (np.array(pairs), pairs))
    assert contents(found) == contents(expected)


def test_unshuffled_order_is_that_of_the_pairs():
    pairs = [("a", letter) for letter in "abcdefghij"]
    assert contents(TranslationBatches(pairs, Letters(), batch_size=3, shuffle=False)) == list(expected(pairs))


def test_the_epoch_advances_after_a_whole_pass_only():
    batches = TranslationBatches(random_pairs(60), Letters(), batch_tokens=60)
    first, second = contents(batches), contents(batches)
    assert second != first and Counter(second) == Counter(first)
    batches.on_epoch_end()  # Keras does, before the first epoch
    assert batches.epoch == 2
    batches.on_epoch_begin()
    for index in range(len(batches) - 1):
        batches[index]
    batches.on_epoch_end()  # Keras does, amid a pass, if steps_per_epoch is given
    assert batches.epoch == 2
    batches.on_epoch_begin()
    batches[len(batches) - 1]
    batches.on_epoch_end()
    assert batches.epoch == 3
    batches.epoch = 0
    assert contents(batches) == first


def test_what_was_asked_for_tells_the_order():
    batches = TranslationBatches(random_pairs(60), Letters(), batch_tokens=60)
    assert batches.asked is None
    batches.on_epoch_begin()
    batches[1]
    assert np.flatnonzero(batches.asked).tolist() == [1]


def test_many_threads_may_ask_at_once():
    batches = TranslationBatches(random_pairs(300), Letters(), batch_tokens=60)
    alone = [batches[i] for i in range(len(batches))]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(batches.__getitem__, range(len(batches))))
    for (x, y), (other_x, other_y) in zip(alone, together):
        assert all((x[name] == other_x[name]).all() for name in x) and (y == other_y).all()


def test_keras_gives_them_no_workers():
    batches = TranslationBatches(random_pairs(30), Letters(), batch_tokens=60)
    for name, value in (("workers", 2), ("use_multiprocessing", True)):
        with pytest.raises(ValueError, match=f"by one worker of this process; got .*{name}"):
            setattr(batches, name, value)
    batches.workers, batches.use_multiprocessing = 1, False
    assert (batches.workers, batches.use_multiprocessing) == (1, False)


def test_texts_become_numbers_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(batching, "_CHUNK", 1000)
    pairs = [("abcdefgh" * 4, "a")] * 20_000
    tracemalloc.start()
    batches = WindowedBatches(pairs, Letters())
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(batches) and most < 3 * kept  # all of them in lists would take five times as much


class Recording(TranslationBatches):
    """Keeps (epoch, index) of every batch asked for."""

    def __init__(self, *args, **kwargs):
        self.record = []
        super().__init__(*args, **kwargs)

    def __getitem__(self, index):
        self.record.append((self.epoch, index))
        return super().__getitem__(index)


class Unigrams(keras.Model):
    """Guesses each label from the target id before it."""

    def __init__(self):
        super().__init__()
        self.table = keras.layers.Embedding(Letters.vocab_size, Letters.vocab_size)

    def call(self, inputs):
        keras.ops.sum(inputs["source_ids"])
        return self.table(inputs["target_ids"])


def compiled():
    model = Unigrams()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0))
    return model


@pytest.mark.parametrize("shuffle", [False, True])
def test_fit_makes_whole_passes(shuffle):
    batches = Recording(random_pairs(60), Letters(), batch_tokens=60, num_buckets=3, shuffle=shuffle)
    assert len(batches.shapes) == 3 and len(batches) > 6
    history = compiled().fit(batches, epochs=3, shuffle=False, validation_data=batches, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert batches.epoch == 6  # three of training and three of validation
    asked = set(batches.record)
    assert asked == set(itertools.product(range(6), range(len(batches))))


def test_a_loop_is_a_pass():
    batches = Recording(random_pairs(60), Letters(), batch_tokens=60)
    for epoch in range(3):
        assert batches.epoch == epoch
        for _ in zip(range(2), batches):  # ends early
            pass
        assert batches.epoch == epoch and len(list(batches)) == len(batches)
    assert batches.epoch == 3 and {epoch for epoch, _ in batches.record} == {0, 1, 2}
    batches.on_epoch_end()  # which the loop has called
    assert batches.epoch == 3


def test_fit_sees_the_order_of_the_epoch():
    batches = Recording(random_pairs(60), Letters(), batch_tokens=60, num_buckets=2)
    batches.epoch = 4
    compiled().fit(batches, epochs=2, shuffle=False, verbose=0)
    passes = [[i for epoch, i in batches.record if epoch == wanted] for wanted in (4, 5)]
    assert passes[0][-len(batches) :] == passes[1] == list(range(len(batches)))


def test_fit_with_steps_per_epoch_repeats_and_loses_nothing():
    batches = Recording([("a", "b")] * 8, Letters(), batch_size=2, num_buckets=1)
    compiled().fit(batches, epochs=4, steps_per_epoch=2, shuffle=False, verbose=0)
    assert batches.epoch == 2


def test_evaluate_reads_shapes_in_turn():
    batches = TranslationBatches([("a", "b")] * 20 + [("abc", "b")] * 20, Letters(), batch_size=4, shuffle=False)
    assert [(rows, s, t) for rows, s, t in batches.shapes] == [(4, 2, 2), (4, 4, 2)]
    assert np.isfinite(compiled().evaluate(batches, verbose=0))


def test_long_pairs_are_left_out_with_a_warning_or_refused():
    pairs = [("a", "b"), ("abcdef", "a"), ("b", "abcdef")]
    with pytest.warns(UserWarning, match="2 of 3 pairs have more than max_length=4 ids and are left out"):
        batches = TranslationBatches(pairs, Letters(), max_length=4)
    assert batches.skipped == 2 and contents(batches) == list(expected(pairs[:1]))
    with pytest.raises(ValueError, match=r"2 of 3 pairs .*the longest is pair 1 with 7. .* drop_long=True"):
        TranslationBatches(pairs, Letters(), max_length=4, drop_long=False)
    with pytest.raises(ValueError, match=r"3 of 3 pairs have more than max_length=1 ids.*Raise max_length"):
        TranslationBatches(pairs, Letters(), max_length=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TranslationBatches(pairs, Letters(), max_length=7).skipped == 0


def test_summary():
    pairs = [("a", "bc")] * 5
    assert str(TranslationBatches(pairs, Letters(), batch_size=3)) == (
        "5 pairs (0 longer ones left out), 2 batches of 1 shapes (rows x source x target): 3x2x3; 15 labels, "
        "16.7% padding"
    )


def test_errors():
    pairs = [("a", "b")]
    with pytest.raises(ValueError, match="no pairs"):
        TranslationBatches([], Letters())
    for bad in ("ab", ("a",), ("a", "b", "c"), ("a", 5), 5):
        with pytest.raises(ValueError, match="pair 1 is"):
            TranslationBatches([*pairs, bad], Letters())
    for argument, bad in itertools.product(("batch_tokens", "batch_size", "max_length", "num_buckets"), (0, -1, 1.5)):
        with pytest.raises(ValueError, match=f"{argument} must be an integer of at least 1; got {bad}"):
            TranslationBatches(pairs, Letters(), **{argument: bad})
    with pytest.raises(ValueError, match="seed must be an integer of at least 0; got -1"):
        TranslationBatches(pairs, Letters(), seed=-1)
    with pytest.raises(ValueError, match="epoch must be an integer"):
        TranslationBatches(pairs, Letters()).epoch = None
    with pytest.raises(ValueError, match=r"batch_tokens \(3\) does not hold the longest pair, of 4 ids"):
        TranslationBatches([("abc", "a")], Letters(), batch_tokens=3)
    with pytest.raises(ValueError, match="The target tokenizer gives ids 2 to 70, outside 0 to 28"):
        broken = SimpleNamespace(encode_batch=lambda texts: [[70]], pad_id=0, start_id=3, end_id=2, vocab_size=29)
        TranslationBatches(pairs, Letters(), broken)
    with pytest.raises(ValueError, match="The source tokenizer gives ids of 1 texts for 2"):
        broken = SimpleNamespace(encode_batch=lambda texts: [[7]], pad_id=0, start_id=3, end_id=2, vocab_size=29)
        TranslationBatches(pairs * 2, broken, Letters())
    with pytest.raises(ValueError, match="The target tokenizer has pad_id 29, outside 0 to 28"):
        broken = SimpleNamespace(encode_batch=lambda texts: [[7]], pad_id=29, start_id=3, end_id=2, vocab_size=29)
        TranslationBatches(pairs, Letters(), broken)
    with pytest.raises(ValueError, match="The source tokenizer has no pad_id, end_id; name the piece"):
        TranslationBatches(pairs, SimpleNamespace(pad_id=None, end_id=None), Letters())


# WindowedBatches


@pytest.mark.parametrize(
    "count, batch_size, window, sorted_batches", [(1600, 80, 20, 20), (1601, 80, 10, 10), (7, 3, 1, 1)]
)
def test_a_window_is_sorted_by_the_longer_side(count, batch_size, window, sorted_batches):
    pairs = random_pairs(count, longest=30)
    batches = WindowedBatches(pairs, Letters(), batch_size=batch_size, window=window)
    assert len(batches) == -(-count // batch_size)
    assert Counter(contents(batches)) == expected(pairs)
    longest = [max(np.count_nonzero(ids, axis=1).max() for ids in (x["source_ids"], y)) for x, y in batches]
    for i in range(0, len(batches), sorted_batches):
        assert longest[i : i + window] == sorted(longest[i : i + window])
    assert {len(y) for _, y in batches} == {batch_size}
    rows = [np.count_nonzero(y.any(axis=1)) for _, y in batches]
    assert rows[:-1] == [batch_size] * (len(rows) - 1) and rows[-1] == (count - 1) % batch_size + 1


def test_windows_hold_the_pairs_in_their_shuffled_order():
    pairs = random_pairs(60)
    batches = WindowedBatches(pairs, Letters(), batch_size=4, window=3, shuffle=False)
    for i in range(0, len(batches), 3):
        found = [pair for x, y in (batches[j] for j in range(i, i + 3)) for pair in contents_of(x, y)]
        assert Counter(found) == expected(pairs[4 * i : 4 * (i + 3)])
    unsorted = WindowedBatches(pairs, Letters(), batch_size=60, window=1, shuffle=False)
    lengths = [max(map(len, pair)) for pair in contents(unsorted)]
    assert lengths == sorted(lengths)  # within the batch


def contents_of(x, labels):
    rows = zip(x["source_ids"].tolist(), labels.tolist())
    return [(tuple(i for i in s if i > END), tuple(i for i in t if i > END)) for s, t in rows]


@given(
    pairs=st.lists(st.tuples(words, words), min_size=1, max_size=40),
    batch_size=st.integers(1, 6),
    window=st.integers(1, 4),
    length_multiple=st.sampled_from([1, 3, 8]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_windowed_batches_are_as_long_as_they_must_be(pairs, batch_size, window, length_multiple, shuffle, epoch):
    batches = WindowedBatches(pairs, Letters(), None, batch_size, window, length_multiple, shuffle=shuffle)
    batches.epoch = epoch
    assert Counter(contents(batches)) == expected(pairs)
    found = [batches[i] for i in range(len(batches))]
    sides = [[x["source_ids"] for x, _ in found], [y for _, y in found]]
    for arrays, texts in zip(sides, zip(*pairs)):
        needed = [pad([row[row > 0] for row in ids], 0, length_multiple).shape[1] for ids in arrays]
        lengths = [ids.shape[1] for ids in arrays]
        may_vary = len({-(-(len(text) + 1) // length_multiple) for text in texts}) > 1
        if len(found) > 1 and may_vary and needed[0] == needed[1]:
            needed[1] += length_multiple
        assert lengths == needed
        assert len(found) == 1 or not may_vary or lengths[0] != lengths[1]  # as Keras on TensorFlow needs it
    cells = sum(ids.size for side in sides for ids in side)
    real = sum(np.count_nonzero(ids) for side in sides for ids in side)
    assert batches.padding == pytest.approx(1 - real / cells)
    assert batches.tokens_per_epoch == sum(np.count_nonzero(labels) for labels in sides[1])
    shapes = {(*source.shape, labels.shape[1]) for source, labels in zip(*sides)}
    assert batches.shapes == sorted(shapes, key=lambda shape: shape[1:])


def test_order_of_windows_is_a_function_of_seed_and_epoch():
    pairs = random_pairs(60)

    def order(seed, epoch, shuffle=True):
        batches = WindowedBatches(pairs, Letters(), batch_size=4, window=3, seed=seed, shuffle=shuffle)
        batches.epoch = epoch
        return contents(batches)

    assert order(0, 0) == order(0, 0) and order(3, 7) == order(3, 7)
    assert len({tuple(order(*key)) for key in itertools.product(range(2), range(3))}) == 6
    assert order(0, 0, False) == order(1, 5, False)
    batches = WindowedBatches(pairs, Letters(), batch_size=4, window=3)
    passes = [contents(batches), contents(batches)]
    assert batches.epoch == 2 and passes == [order(0, 0), order(0, 1)]


def test_order_of_windows_is_the_same_on_every_backend():
    batches = WindowedBatches([(letter, "") for letter in "abcdefgh"], Letters(), batch_size=4, window=1, seed=1)
    order = ["".join(chr(int(i) + 94) for i in x["source_ids"][:, 0]) for x, _ in batches]
    assert order == ["fabe", "cgdh"]


def test_sorting_saves_padding():
    pairs = random_pairs(1000, longest=60)
    padding = [
        WindowedBatches(pairs, Letters(), batch_size=10, window=w, length_multiple=1).padding for w in (1, 4, 20)
    ]
    assert padding == sorted(padding, reverse=True) and padding[-1] < 0.75 * padding[0]


def test_long_pairs_and_two_tokenizers_in_windows():
    pairs = [("ab", "c"), ("abcdef", "a"), ("a", "cd")]
    with pytest.warns(UserWarning, match="1 of 3 pairs have more than max_length=4 ids") as caught:
        batches = WindowedBatches(pairs, Letters(), Shifted(), batch_size=2, length_multiple=1, max_length=4)
    assert caught[0].filename == __file__
    x, labels = batches[0]
    assert batches.skipped == 1 and (batches.source_vocab_size, batches.target_vocab_size) == (29, 62)
    assert sorted(x["source_ids"].tolist()) == [[3, 2, 0], [3, 4, 2]]
    assert sorted(x["target_ids"].tolist()) == [[60, 5, 6], [60, 5, 50]]
    assert sorted(labels.tolist()) == [[5, 6, 61], [5, 61, 50]]
    with pytest.raises(ValueError, match="drop_long=True"):
        WindowedBatches(pairs, Letters(), max_length=4, drop_long=False)


def test_summary_of_windows():
    batches = WindowedBatches([("a", "bc")] * 5, Letters(), batch_size=3)
    assert str(batches) == (
        "5 pairs (0 longer ones left out), 2 batches of 1 shapes (rows x source x target): 3x8x8; 15 labels, "
        "74.0% padding"
    )
    many = str(WindowedBatches(random_pairs(900), Letters(), batch_size=2, length_multiple=1))
    assert ", ..., 2x13x13; " in many and many.count("x") < 30


def test_errors_of_windows():
    for argument, bad in itertools.product(("batch_size", "window", "length_multiple", "max_length"), (0, None, 1.5)):
        with pytest.raises(ValueError, match=f"{argument} must be an integer of at least 1; got {bad}"):
            WindowedBatches([("a", "b")], Letters(), **{argument: bad})
    with pytest.raises(ValueError, match="seed must be an integer of at least 0; got -1"):
        WindowedBatches([("a", "b")], Letters(), seed=-1)
    with pytest.raises(ValueError, match="no pairs"):
        WindowedBatches([], Letters())


def test_a_transformer_fits_windowed_batches_of_words():
    short, long = "b c", "c a b a b c a b c a"
    tokenizer = Tokenizer.train([short, long] * 2, 20, "word")
    pairs = [(short, short)] * 8 + [(long, long)] * 8
    batches = WindowedBatches(pairs, tokenizer, batch_size=4, window=4)
    assert batches.shapes == [(4, 8, 8), (4, 16, 16)]
    keras.utils.set_random_seed(0)
    model = Transformer(tokenizer.vocab_size, 1, 8, 2, 16)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    model.compile(keras.optimizers.Adam(0.01), loss)
    history = model.fit(batches, epochs=3, shuffle=False, verbose=0).history
    assert batches.epoch == 3 and history["loss"][-1] < history["loss"][0] < np.inf


@pytest.mark.parametrize("window", [1, 4])
def test_fit_takes_windows_of_any_lengths(window):
    pairs = random_pairs(60, longest=30)
    batches, validation = (WindowedBatches(p, Letters(), batch_size=4, window=window) for p in (pairs, pairs[:21]))
    assert len({s for _, s, _ in batches.shapes}) > 1 and len({t for _, _, t in batches.shapes}) > 1
    history = compiled().fit(batches, epochs=2, validation_data=validation, verbose=0).history
    assert batches.epoch == validation.epoch == 2
    assert np.isfinite(history["loss"]).all() and np.isfinite(history["val_loss"]).all()


def test_short_first_batches_do_not_fix_the_lengths():
    """Here the first two batches need the same lengths in every epoch, and later ones need others."""
    pairs = [("a", "b")] * 40 + [("abcdefghij" * 2, "abcdefghij")] * 8
    batches = WindowedBatches(pairs, Letters(), batch_size=4, window=12)
    assert batches.shapes == [(4, 8, 8), (4, 16, 16), (4, 24, 16)]
    assert np.isfinite(compiled().fit(batches, epochs=2, shuffle=False, verbose=0).history["loss"]).all()
    assert np.isfinite(compiled().evaluate(batches, verbose=0))


class Stop(keras.callbacks.Callback):
    """Ends training as a kill would, after some batches."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_killed_run_on_windows_goes_on_to_the_same_weights(tmp_path):
    def run(folder, *callbacks):
        batches = WindowedBatches(random_pairs(60, seed=1), Letters(), batch_size=4, window=3)
        keras.utils.set_random_seed(0)
        model = compiled()
        model(batches[0][0])
        checkpoints = Checkpoints(tmp_path / folder, batches, steps=4)
        model.fit(batches, epochs=2, shuffle=False, verbose=0, callbacks=[checkpoints, *callbacks])
        return model.get_weights(), batches.epoch

    expected_weights, epoch = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", Stop(23))  # in the second epoch of 15 batches
    weights, resumed_epoch = run("killed")
    assert resumed_epoch == epoch == 2
    for found, wanted in zip(weights, expected_weights):
        np.testing.assert_array_equal(found, wanted)


def test_pad():
    array = pad([[5, 6, 7], [], np.array([8])], pad_id=9)
    assert array.tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]] and array.dtype == np.int32
    assert pad([[5, 6, 7]], 0, multiple=4).shape == (1, 4)
    assert pad([[5, 6, 7, 8]], 0, multiple=4).shape == (1, 4)
    assert pad([[5]], 0, length=3).tolist() == [[5, 0, 0]]
    assert pad([[]], 0).shape == (1, 1)
    with pytest.raises(ValueError, match="Sequence 1 has 2 ids, more than length=1"):
        pad([[5], [5, 6]], 0, length=1)
    with pytest.raises(ValueError, match="at least one sequence"):
        pad([], 0)
    with pytest.raises(ValueError, match="multiple must be an integer of at least 1; got 0"):
        pad([[5]], 0, multiple=0)

"""Batches of a few fixed shapes, in an order that is a function of seed and epoch alone."""

import itertools
import sys
import warnings
from collections import namedtuple
from collections.abc import Mapping, Sequence

import keras
import numpy as np

_CHUNK = 20_000  # texts encoded at a time
_SHOWN = 8  # shapes that the summary names
_GRID = 48  # lengths per side that the choice of shapes considers


class _Rows(namedtuple("_Rows", "flat starts lengths")):
    """Many sequences in one array: row i is flat[starts[i] : starts[i] + lengths[i]]."""

    def at(self, indices):
        return self._replace(starts=self.starts[indices], lengths=self.lengths[indices])


class Passes(keras.utils.PyDataset):
    """Batches whose order is a function of the epoch; each pass goes on where the one before was finished.

    A subclass has `_order(epoch)`, a list with an entry for each batch, and sets `epoch` once it can.

    Attributes:
        pad_id: int, the token that fills up short sequences of the inputs.
        label_pad_id: int, what fills up labels where losses and metrics are to leave it out; else None.
    """

    pad_id = label_pad_id = None

    # Workers ask ahead, and processes in copies, so that some examples would come twice and others never.
    workers = property(lambda self: 1, lambda self, value: _refuse(value > 1, workers=value))
    use_multiprocessing = property(lambda self: False, lambda self, value: _refuse(value, use_multiprocessing=value))

    @property
    def epoch(self):
        """int, the number of the current pass, from 0; set it to resume."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch):
        _check_integers(0, epoch=epoch)
        self._epoch = epoch
        self._asked = None
        self._batches = self._order(epoch)

    @property
    def order_varies(self):
        """bool, whether the examples' order changes from epoch to epoch; `predict` of our models then refuses them."""
        return getattr(self, "shuffle", False)

    @property
    def asked(self):
        """bool (batches,), True for the batches of the current pass that were asked for; None before it begins."""
        return self._asked

    def __len__(self):
        return len(self._batches)

    def _take(self, index):
        """The entry of a batch, which counts as asked for from now on."""
        entry = self._batches[index]
        if self._asked is not None:
            self._asked[index] = True
        return entry

    def __iter__(self):
        """One pass, after which the next epoch begins, as in `fit`; a loop that ends early stays in its pass."""
        self.on_epoch_begin()
        yield from super().__iter__()
        self.on_epoch_end()

    def on_epoch_begin(self):
        if self._asked is None:
            self._asked = np.zeros(len(self), "bool")

    def on_epoch_end(self):
        """Goes on to the next epoch, if every batch of this one was asked for.

        Keras calls this also before the first epoch, after a look at one batch, and, with `steps_per_epoch`, in the
        middle of a pass; a new order there would repeat some batches and lose others.
        """
        if self._asked is not None and self._asked.all():
            self.epoch += 1


class _LikeLengths(Passes):
    """Examples in batches of like length, rounded up: all but what a batch holds.

    A subclass has `__getitem__`, for which `_take(index)` is (length, int (at most batch_size,) members).

    On TensorFlow, Keras takes a length that the first two batches share for a fixed one. So they only do if all batches
    of all epochs do. When shuffled, the second batch is exchanged for another; and where too few examples are shorter
    than the rest for a batch of them in every epoch, all batches are equally long. In order, the second is padded one
    length_multiple further, or, if it already has the greatest length, all are.

    Args:
        lengths: int (examples,), or (examples, rows of each).
        limit: int, what no length is rounded up above.
        shuffle: whether the order changes from epoch to epoch; None does as `labelled`, whether there are labels, says.
    """

    _WINDOW = 50  # batches that are sorted together

    def __init__(self, lengths, batch_size, length_multiple, limit, shuffle, seed, labelled=True):
        super().__init__()
        _check_integers(1, batch_size=batch_size, length_multiple=length_multiple)
        _check_integers(0, seed=seed)
        self.batch_size, self.length_multiple, self.seed = batch_size, length_multiple, seed
        self.shuffle = labelled if shuffle is None else bool(shuffle)
        self._limit, self._cells = limit or sys.maxsize, lengths.reshape(len(lengths), -1)
        longest = self._cells.max(axis=1)
        self._rounded = np.minimum(-(-longest // length_multiple) * length_multiple, self._limit)
        self.epoch = 0

    def _order(self, epoch):
        examples, size, together = np.arange(len(self._rounded)), self.batch_size, self.batch_size * self._WINDOW
        if self.shuffle:
            generator = np.random.default_rng([self.seed, epoch])
            window = examples // together
            examples = generator.permutation(examples)
            examples = examples[np.lexsort([self._rounded[examples], window])]
        members = [examples[i : i + size] for i in range(0, len(examples), size)]
        lengths = [int(self._rounded[chosen].max()) for chosen in members]
        if self.shuffle:
            order = generator.permutation(len(members)).tolist()
            members, lengths = [members[i] for i in order], [lengths[i] for i in order]
            shorter = np.count_nonzero(self._rounded < self._rounded.max())
            if shorter <= -(-len(examples) // together) * (size - 1):
                lengths = [int(self._rounded.max())] * len(lengths)
        batches = list(zip(lengths, members))
        other = next((i for i, length in enumerate(lengths) if length != lengths[0]), 0)
        if other <= 1:
            return batches
        if self.shuffle:
            batches[1], batches[other] = batches[other], batches[1]
        elif lengths[0] < self._limit:
            batches[1] = min(lengths[0] + self.length_multiple, self._limit), members[1]
        else:
            batches = [(self._limit, chosen) for chosen in members]
        return batches

    @property
    def lengths(self):
        """list of int, those of the batches of the current pass, each once."""
        return sorted({length for length, _ in self._batches})

    @property
    def padding(self):
        """float, the share of cells that hold padding in the current pass."""
        cells = sum(length * len(members) for length, members in self._batches) * self._cells.shape[1]
        return 1 - int(self._cells.sum()) / cells

    def __str__(self):
        return (
            f"{len(self._cells):,} examples, {len(self):,} batches of {', '.join(map(str, self.lengths))} tokens, "
            f"{self.padding:.1%} padding"
        )


class _Batches(Passes):
    """Sentence pairs as batches: all but which pairs go together, in which shape. See `TranslationBatches`.

    A subclass has `_order(epoch)`, list of ((rows, source length, target length), int (at most rows,) pairs), always
    of one length, and sets `epoch` once it can.
    """

    def __init__(self, pairs, source_tokenizer, target_tokenizer, max_length, shuffle, seed, drop_long):
        super().__init__()
        _check_integers(1, max_length=max_length)
        _check_integers(0, seed=seed)
        target_tokenizer = source_tokenizer if target_tokenizer is None else target_tokenizer
        sources, targets = _sides(pairs)
        source = _encoded(sources, source_tokenizer, "source", ["end_id"])
        target = _encoded(targets, target_tokenizer, "target", ["start_id", "end_id"])
        target = target._replace(lengths=target.lengths - 1)  # of target_ids, and of the labels one place later
        longest = np.maximum(source.lengths, target.lengths)
        kept = _short_enough(longest, max_length, drop_long)
        self._source, self._target, self._longest = source.at(kept), target.at(kept), longest[kept]
        self.pad_id, self.label_pad_id = source_tokenizer.pad_id, target_tokenizer.pad_id
        self.source_vocab_size, self.target_vocab_size = source_tokenizer.vocab_size, target_tokenizer.vocab_size
        self.skipped = len(longest) - len(kept)
        self.tokens_per_epoch = int(self._target.lengths.sum())
        self.shuffle, self.seed = shuffle, seed

    @property
    def shapes(self):
        """list of (rows, source length, target length) of the current pass, each once, smallest first."""
        return sorted({shape for shape, _ in self._batches}, key=lambda shape: shape[1:])

    @property
    def padding(self):
        """float, the share of cells, of both sides, that hold padding in the current pass."""
        cells = sum(rows * (s + t) for (rows, s, t), _ in self._batches)
        return 1 - (int(self._source.lengths.sum()) + self.tokens_per_epoch) / cells

    def __getitem__(self, index):
        """Batch `index` of the current epoch.

        Returns:
            {"source_ids": int32 (rows, source length), "target_ids": int32 (rows, target length)}, and the labels,
            int32 (rows, target length).
        """
        (rows, source_length, target_length), members = self._take(index)
        source, target = self._source.at(members), self._target.at(members)
        labels = target._replace(starts=target.starts + 1)
        x = {
            "source_ids": _padded(source, rows, source_length, self.pad_id),
            "target_ids": _padded(target, rows, target_length, self.label_pad_id),
        }
        return x, _padded(labels, rows, target_length, self.label_pad_id)

    def __str__(self):
        shapes = ["x".join(map(str, shape)) for shape in self.shapes]
        shown = shapes if len(shapes) <= _SHOWN else [*shapes[: _SHOWN - 1], "...", shapes[-1]]
        return (
            f"{len(self._longest):,} pairs ({self.skipped:,} longer ones left out), {len(self):,} batches of "
            f"{len(shapes)} shapes (rows x source x target): {', '.join(shown)}; {self.tokens_per_epoch:,} labels, "
            f"{self.padding:.1%} padding"
        )


class TranslationBatches(_Batches):
    """Sentence pairs as training batches, each in one of a handful of shapes, so that XLA compiles each of them once.

    Source = pieces + [end]; target_ids = [start] + pieces; labels = pieces + [end]. A pair goes to the smallest
    shape that holds both sides. Of all such shapes those with the fewest cells are taken. The last batch of a shape
    is filled up with rows of padding. Source: batches of similar length and limited by tokens, Vaswani et al. 2017,
    section 5.1; the paper's shapes vary, ours are fixed for the sake of compilers.

    The order of an epoch depends on (seed, epoch) alone, if Keras leaves it alone: `fit(batches, shuffle=False)`. By
    default `fit` shuffles the batches once more, with Python's `random`.

    Args:
        pairs: iterable of (source, target), both str.
        source_tokenizer: Tokenizer, or any object with encode_batch, vocab_size, pad_id, start_id and end_id.
        target_tokenizer: the same for the target; None takes the source's (a joint vocabulary).
        batch_tokens: int, the most cells per side of a batch: rows * length, padding included.
        batch_size: int. If given, every batch has exactly so many rows, and `batch_tokens` is not used.
        max_length: int, the most ids of a side, start or end id included.
        num_buckets: int, the most shapes.
        shuffle: whether the order changes from epoch to epoch. False keeps the order of `pairs` within a shape.
        seed: int, not negative.
        drop_long: whether longer pairs are left out, with a warning. False raises.

    Attributes:
        shapes: list of (rows, source length, target length), smallest first.
        tokens_per_epoch: int, labels of one pass, padding not counted.
        padding: float, the share of cells, of both sides, that hold padding.
        source_vocab_size, target_vocab_size: int.
        skipped: int, pairs left out as too long.

    Raises:
        ValueError: if there is no pair, a pair is not two str, an argument is out of range, a tokenizer lacks a
            special id or gives an id outside its vocabulary, or a pair is too long and `drop_long` is False.
    """

    def __init__(
        self,
        pairs,
        source_tokenizer,
        target_tokenizer=None,
        batch_tokens=4096,
        batch_size=None,
        max_length=128,
        num_buckets=4,
        shuffle=True,
        seed=0,
        drop_long=True,
    ):
        _check_integers(1, batch_tokens=batch_tokens, num_buckets=num_buckets)
        _check_integers(1, batch_size=1 if batch_size is None else batch_size)
        super().__init__(pairs, source_tokenizer, target_tokenizer, max_length, shuffle, seed, drop_long)
        if batch_size is None and self._longest.max() > batch_tokens:
            raise ValueError(
                f"batch_tokens ({batch_tokens}) does not hold the longest pair, of {self._longest.max()} ids; "
                "raise it to that or more, or lower max_length."
            )
        self._buckets = self._choose(num_buckets, _Budget(batch_tokens, batch_size))
        self.epoch = 0

    def _choose(self, num_buckets, budget):
        """The buckets, list of (shape, int (pairs,) that it holds), smallest first."""
        lengths = np.stack([self._source.lengths, self._target.lengths], axis=1)
        chain = np.array(_bucket_lengths(*lengths.T, num_buckets, budget))
        bucket = (lengths[:, None] <= chain).all(axis=-1).argmax(axis=-1)  # the first that holds both sides
        members = [np.flatnonzero(bucket == k) for k in range(len(chain))]
        shapes = [(int(budget.rows(len(m), max(s, t))), s, t) for m, (s, t) in zip(members, chain.tolist())]
        return list(zip(shapes, members))

    def _order(self, epoch):
        generator = np.random.default_rng([self.seed, epoch])
        batches = []
        for shape, members in self._buckets:
            members = generator.permutation(members) if self.shuffle else members
            batches += [(shape, members[i : i + shape[0]]) for i in range(0, len(members), shape[0])]
        if self.shuffle:
            batches = [batches[i] for i in generator.permutation(len(batches))]
        # On TensorFlow, Keras takes every length that the first two batches share for a fixed one.
        for place, (shape, _) in enumerate([self._buckets[0], self._buckets[-1]][: len(self._buckets)]):
            found = next(i for i in range(place, len(batches)) if batches[i][0] == shape)
            batches[place], batches[found] = batches[found], batches[place]
        return batches


class WindowedBatches(_Batches):
    """Sentence pairs as training batches of pairs of like length, sorted within windows of some batches.

    The pairs are shuffled at the start of each epoch. Of every batch_size * window of them, sorted by the longer of
    their sides, the first batch_size are a batch, and so on; the window's batches follow each other from short to long.
    A batch is as long as its own longest source and target, rounded up. The last one is filled up with rows of padding.
    Source: Bahdanau, Cho, Bengio 2015, appendix B.2 (80 rows, windows of 20); sorted by the longer side as in the
    authors' code. There, the data is shuffled once, before the first epoch, and lengths are not rounded.

    On TensorFlow, Keras takes every length that the first two batches share for a fixed one, so that in every epoch
    the second is padded to one length_multiple more on each side that it would share with the first, unless no batch
    can differ there.

    Args:
        batch_size: int, rows of a batch.
        window: int, batches that are sorted together; 1 sorts nothing, many mix less.
        length_multiple: int, lengths are rounded up to a multiple of it: few shapes for a compiler to meet. The
            longest are up to max_length, rounded up, and one length_multiple more.
        shuffle: whether the order changes from epoch to epoch. False cuts windows from the pairs as they stand.
        pairs, source_tokenizer, target_tokenizer, max_length, seed, drop_long: as in `TranslationBatches`, whose
            attributes and errors these batches have, too; shapes and padding are those of the current epoch.
    """

    def __init__(self, pairs, source_tokenizer, target_tokenizer=None, batch_size=80, window=20, length_multiple=8,
                 max_length=128, shuffle=True, seed=0, drop_long=True):  # fmt: skip
        _check_integers(1, batch_size=batch_size, window=window, length_multiple=length_multiple)
        super().__init__(pairs, source_tokenizer, target_tokenizer, max_length, shuffle, seed, drop_long)
        self.batch_size, self.window, self.length_multiple = batch_size, window, length_multiple
        self.epoch = 0

    def _order(self, epoch):
        pairs = np.arange(len(self._longest))
        if self.shuffle:
            pairs = np.random.default_rng([self.seed, epoch]).permutation(pairs)
        window = np.arange(len(pairs)) // (self.batch_size * self.window)
        pairs = pairs[np.lexsort([self._longest[pairs], window])]  # stable
        first = np.arange(0, len(pairs), self.batch_size)
        lengths = []
        for side in (self._source.lengths, self._target.lengths):
            rounded = -(-side // self.length_multiple) * self.length_multiple
            longest = np.maximum.reduceat(rounded[pairs], first)
            if len(first) > 1 and longest[0] == longest[1] and rounded.min() < rounded.max():
                longest[1] += self.length_multiple
            lengths.append(longest.tolist())
        members = np.split(pairs, first[1:])
        return [((self.batch_size, s, t), chosen) for s, t, chosen in zip(*lengths, members)]


def pad(sequences, pad_id, multiple=1, length=None):
    """Sequences of different lengths as one array.

    Args:
        sequences: list of lists, or 1-D arrays, of int.
        pad_id: int, fills the rows on the right.
        multiple: int, the length of the array is a multiple of it; few lengths mean few compiled programs.
        length: int, exact length of the array; None takes that of the longest sequence, rounded up.

    Returns:
        int32 (len(sequences), length).

    Raises:
        ValueError: if there is no sequence, or one is longer than `length`.
    """
    _check_integers(1, multiple=multiple, length=1 if length is None else length)
    if len(sequences) == 0:
        raise ValueError("pad needs at least one sequence; got none.")
    rows = _flattened(sequences)
    longest = max(int(rows.lengths.max()), 1)
    if length is not None and longest > length:
        raise ValueError(f"Sequence {rows.lengths.argmax()} has {longest} ids, more than length={length}.")
    return _padded(rows, len(sequences), length or -(-longest // multiple) * multiple, pad_id)


class _Budget:
    """How many rows a batch has, if a shape has `count` pairs of at most `length` ids."""

    def __init__(self, batch_tokens, batch_size):
        self.batch_tokens, self.batch_size = batch_tokens, batch_size

    def batches(self, count, length):
        most = self.batch_size or self.batch_tokens // length
        return -(-count // most)

    def rows(self, count, length):
        """Equal shares: with all batches but the last full, the last would be mostly padding."""
        return self.batch_size or -(-count // np.maximum(self.batches(count, length), 1))

    def cells(self, count, source, target):
        length = np.maximum(source, target)
        return self.batches(count, length) * self.rows(count, length) * (source + target)


def _bucket_lengths(source, target, num_buckets, budget):
    """The lengths of the buckets: a chain, each bucket at least as long as the one before on both sides.

    Of all chains the one with the fewest cells, rows of padding included. Let N(c) be the number of pairs that fit
    into lengths c = (source, target). With k buckets, the last of them c,
    best_1(c) = cells(N(c), c),  best_k(c) = min over p <= c of best_{k-1}(p) + cells(N(c) - N(p), c).

    Args:
        source: int (pairs,), lengths.
        target: int (pairs,), lengths.
        num_buckets: int, the most buckets.
        budget: _Budget.

    Returns:
        list of (source length, target length), ascending; every bucket holds a pair.
    """
    source_grid, target_grid = _grid(source), _grid(target)
    fitting = np.zeros((len(source_grid), len(target_grid)), "int64")
    np.add.at(fitting, (np.searchsorted(source_grid, source), np.searchsorted(target_grid, target)), 1)
    fitting = fitting.cumsum(axis=0).cumsum(axis=1)
    best = budget.cells(fitting, source_grid[:, None], target_grid)
    predecessors = []
    for _ in range(num_buckets - 1):
        cells, predecessor = np.empty_like(best), np.empty_like(best)
        for i, j in np.ndindex(best.shape):
            rest = fitting[i, j] - fitting[: i + 1, : j + 1]
            options = best[: i + 1, : j + 1] + budget.cells(rest, source_grid[i], target_grid[j])
            predecessor[i, j] = options.argmin()
            cells[i, j] = options.flat[predecessor[i, j]]
        best = cells
        predecessors.append(predecessor)
    i, j = len(source_grid) - 1, len(target_grid) - 1
    chain = {(i, j)}
    for predecessor in reversed(predecessors):
        i, j = divmod(int(predecessor[i, j]), j + 1)
        chain.add((i, j))
    smallest = {fitting[cell]: cell for cell in sorted(chain, reverse=True)}  # of cells that hold the same pairs
    return [(source_grid[i], target_grid[j]) for count, (i, j) in sorted(smallest.items()) if count]


def _grid(lengths):
    """The lengths that occur, or _GRID of them, at growing distances, where there are more."""
    found = np.unique(lengths)
    if len(found) <= _GRID:
        return found
    places = np.searchsorted(found, np.geomspace(found[0], found[-1], _GRID))
    return found[np.unique(np.minimum(places, len(found) - 1))]


def _sides(pairs):
    """The sources and the targets of the pairs."""
    pairs = list(pairs)
    if not pairs:
        raise ValueError("There are no pairs; pass a list of (source, target) with at least one.")
    for i, pair in enumerate(pairs):
        if not _is_pair(pair):
            raise ValueError(f"Every pair is (source, target), two str; pair {i} is {str(pair)[:80]}.")
    return zip(*pairs)


def _is_pair(value):
    """Whether this is a sequence of two str, such as a row of an array, but no str itself."""
    is_sequence = isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)
    return is_sequence and len(value) == 2 and all(isinstance(side, str) for side in value)


def _short_enough(lengths, max_length, drop_long):
    """The indices of the pairs to keep, int (kept,)."""
    kept = np.flatnonzero(lengths <= max_length)
    if len(kept) == len(lengths):
        return kept
    report = f"{len(lengths) - len(kept)} of {len(lengths)} pairs have more than max_length={max_length} ids"
    if not drop_long or not len(kept):
        worst = lengths.argmax()
        raise ValueError(
            f"{report}; the longest is pair {worst} with {lengths[worst]}. Raise max_length"
            f"{'' if drop_long else ', or leave them out with drop_long=True'}."
        )
    warnings.warn(f"{report} and are left out.", stacklevel=4)
    return kept


def _encoded(texts, tokenizer, side, specials):
    """_Rows of the ids of the texts, those of the specials around them: start_id before, end_id after."""
    missing = [name for name in ["pad_id", *specials] if getattr(tokenizer, name) is None]
    if missing:
        raise ValueError(f"The {side} tokenizer has no {', '.join(missing)}; name the piece when loading it.")
    before = [tokenizer.start_id] if "start_id" in specials else []
    after = [tokenizer.end_id]
    chunks = (list(texts[i : i + _CHUNK]) for i in range(0, len(texts), _CHUNK))
    rows = _joined(_flattened([[*before, *ids, *after] for ids in tokenizer.encode_batch(chunk)]) for chunk in chunks)
    if len(rows.lengths) != len(texts):
        raise ValueError(f"The {side} tokenizer gives ids of {len(rows.lengths)} texts for {len(texts)}.")
    low, high = rows.flat.min(), rows.flat.max()
    if low < 0 or high >= tokenizer.vocab_size:
        raise ValueError(f"The {side} tokenizer gives ids {low} to {high}, outside 0 to {tokenizer.vocab_size - 1}.")
    if not 0 <= tokenizer.pad_id < tokenizer.vocab_size:
        raise ValueError(
            f"The {side} tokenizer has pad_id {tokenizer.pad_id}, outside 0 to {tokenizer.vocab_size - 1}."
        )
    return rows


def _refuse(wrong, **given):
    if wrong:
        raise ValueError(f"Batches are made one after the other, by one worker of this process; got {given}.")


def _flattened(sequences):
    """_Rows of some sequences."""
    lengths = np.fromiter(map(len, sequences), "int64", len(sequences))
    flat = np.fromiter(itertools.chain.from_iterable(sequences), "int32", lengths.sum())
    return _Rows(flat, np.cumsum(lengths) - lengths, lengths)


def _joined(parts):
    """One _Rows of many, which are made one at a time."""
    flats, _, lengths = zip(*parts)
    lengths = np.concatenate(lengths)
    return _Rows(np.concatenate(flats), np.cumsum(lengths) - lengths, lengths)


def _padded(sequences, rows, length, pad_id):
    """int32 (rows, length), the sequences (a _Rows) filled up on the right, and with rows of padding below."""
    position = np.arange(length)
    real = position < sequences.lengths[:, None]
    ids = np.full((rows, length), pad_id, "int32")
    ids[: len(real)][real] = sequences.flat[(sequences.starts[:, None] + position)[real]]
    return ids


def _ordered(classes):
    """The classes as a list; no set, whose order is another in every process, nor a dict with other numbers."""
    if isinstance(classes, (set, frozenset)):
        raise ValueError(f"classes must stand in an order, which a set has not: {classes}. Pass sorted(classes).")
    if isinstance(classes, Mapping) and list(classes.values()) != list(range(len(classes))):
        raise ValueError(
            f"classes must stand in the order of their numbers; got {str(classes)[:80]}. Pass sorted(classes, "
            "key=classes.get)."
        )
    return list(classes)


def _check_integers(minimum, **arguments):
    """Raises ValueError unless all arguments are int and at least the minimum."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}; got {value!r}.")

"""Texts for language models and for classifiers: one long stream cut into windows, and documents of like length."""

import itertools
from pathlib import Path

import numpy as np

from llmfound.data.batching import Passes, _check_integers, _flattened, _joined, _LikeLengths, _padded
from llmfound.data.tokenizers import _as_texts

_CHUNK = 1000  # texts encoded at a time
_SHORT = 0.05  # of the windows have half the length
_SPREAD = 5  # standard deviation of their lengths
_LEAST = 5  # words of a window


def write_stream(path, texts, tokenizer):
    """Writes the ids of many texts, one after the other, to a file, with only a few of them in memory at a time.

    Each text is followed by the tokenizer's end_id. `numpy.load(path, mmap_mode="r")` opens it for LanguageModelBatches
    without reading it.

    Args:
        path: str or path, ending in .npy.
        texts: iterable of str: a generator will do.
        tokenizer: Tokenizer, or any object with encode_batch and end_id.

    Returns:
        int, how many ids there are.

    Raises:
        ValueError: if there is no text, the tokenizer has no end_id, or the path does not end in .npy. No file is left
            then, nor if the texts' own iteration fails.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"The file must end in .npy; got {path}.")
    temporary, count = path.with_name(path.name + ".part"), 0
    try:
        with open(temporary, "wb") as file:
            _write_header(file, 0)
            for ids in _chunks(texts, tokenizer):
                file.write(ids.tobytes())
                count += len(ids)
            file.seek(0)
            _write_header(file, count)  # NumPy leaves room in a header for any length
        if not count:
            raise ValueError("There are no texts to write.")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def stream(texts, tokenizer):
    """The ids of many texts one after the other, each followed by the tokenizer's end_id: int32 (words,).

    Args, errors: as `write_stream`, for what fits in memory.
    """
    chunks = list(_chunks(texts, tokenizer))
    if not chunks:
        raise ValueError("There are no texts.")
    return np.concatenate(chunks).astype("int32")


def _chunks(texts, tokenizer):
    if tokenizer.end_id is None:
        raise ValueError("The tokenizer has no end_id, to stand between texts; name the piece when loading it.")
    texts = _as_texts(texts)
    while chunk := [text for _, text in zip(range(_CHUNK), texts)]:
        yield np.array([i for row in tokenizer.encode_batch(chunk) for i in (*row, tokenizer.end_id)], "<i4")


def _write_header(file, count):
    np.lib.format.write_array_header_2_0(file, {"descr": "<i4", "fortran_order": False, "shape": (count,)})


class LanguageModelBatches(Passes):
    """One long text as batches of windows that follow each other, for truncated back-propagation through time.

    The text is cut into `batch_size` rows of equal length, read side by side: window k of a row goes on where window
    k - 1 ended, and the labels are the words one place later. Of windows of varying length, each is
    max(5, int(N(base, 5))) words long, with base = window, or half of it in one of 20. After the first epoch they are
    stretched or shrunk, all by one factor near 1, so that each epoch has equally many. The last row is filled up.
    Source: Merity, Keskar, Socher 2018, section 4.1; the authors' code.

    Windows are a function of (seed, epoch) alone. Batches go on from each other: models of llmfound never shuffle them,
    others need `fit(batches, shuffle=False)`.

    Args:
        ids: int (words,), the text; a memory-mapped array is read window by window.
        batch_size: int, rows.
        window: int, words of a window (BPTT).
        variable: whether lengths vary, from window to window and epoch to epoch; for training.
        reverse: whether the text is read from its end, for a backward model.
        length_multiple: int, windows are filled up with padding to a multiple of it: few shapes for a compiler to meet,
            for 10 about 7 % padding.
        pad_id: int, fills up windows and rows; a word of this id counts as padding.
        seed: int, not negative.

    Attributes:
        lengths: int (batches,), the words of each window of the current epoch.
        tokens_per_epoch: int, labels of one pass.
        epoch: int, the number of the current pass, from 0; set it to resume.

    Raises:
        ValueError: if there are fewer than two words, ids are not integers of rank 1, or an argument is out of range.
    """

    in_order = True  # each batch goes on from the one before; `fit` of our models then shuffles none

    def __init__(self, ids, batch_size=64, window=70, variable=True, reverse=False, length_multiple=10, pad_id=0,
                 seed=0):  # fmt: skip
        super().__init__()
        _check_integers(1, batch_size=batch_size, window=window, length_multiple=length_multiple)
        _check_integers(0, seed=seed, pad_id=pad_id)
        if not hasattr(getattr(ids, "dtype", None), "kind"):  # a list, or a tensor of another library
            ids = np.asarray(ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 2:
            raise ValueError(
                f"ids must be integers of shape (words,), two at least; got {ids.dtype} of shape {ids.shape}. "
                "llmfound.data.stream makes them of texts."
            )
        self.ids = ids
        self.batch_size = batch_size
        self.window = window
        self.variable = variable
        self.reverse = reverse
        self.length_multiple = length_multiple
        self.pad_id = self.label_pad_id = pad_id
        self.seed = seed
        self.tokens_per_epoch = len(ids) - 1
        self._row = -(-self.tokens_per_epoch // batch_size)  # words of a row
        self.epoch = 0

    @property
    def lengths(self):
        return np.array([end - start for start, end in self._batches])

    def _order(self, epoch):
        """The (start, end) of each window in a row."""
        if not self.variable:
            return [(start, min(start + self.window, self._row)) for start in range(0, self._row, self.window)]
        ends = self._drawn(0)
        count = int((ends < self._row).sum()) + 1  # of every epoch, for Keras counts the steps of the first one only
        if epoch:
            ends = self._drawn(epoch)
            ends = np.rint(ends * (self._row / ends[count - 1])).astype(int)
        return list(itertools.pairwise([0, *ends[: count - 1].tolist(), self._row]))

    def _drawn(self, epoch):
        """Ends of more windows than a row holds, each as long as it was drawn."""
        generator = np.random.default_rng([self.seed, epoch])
        count = self._row // _LEAST + 1
        base = np.where(generator.random(count) < _SHORT, self.window // 2, self.window)
        return np.cumsum(np.maximum(_LEAST, generator.normal(base, _SPREAD).astype(int)))

    def __getitem__(self, index):
        """Window `index` of the current epoch.

        Returns:
            {"token_ids": int32 (batch_size, length), "continues": int32 (batch_size,), 0 in the first window}, and the
            labels, int32 (batch_size, length).
        """
        start, end = self._take(index)
        length = self._length(index)
        token_ids = np.full((self.batch_size, length), self.pad_id, "int32")
        labels = token_ids.copy()
        for row in range(self.batch_size):
            first = row * self._row
            found = self._read(first + start, min(first + end, self.tokens_per_epoch) + 1)
            count = max(len(found) - 1, 0)
            token_ids[row, :count], labels[row, :count] = found[:count], found[1:]
        return {"token_ids": token_ids, "continues": np.full(self.batch_size, int(index > 0), "int32")}, labels

    def _length(self, index):
        """The words of a window, with padding.

        On TensorFlow, Keras takes a length that the first two batches share for a fixed one: they never do, unless all
        windows are equal.
        """
        multiple = self.length_multiple
        if not self.variable:
            return min(self.window, self._row)  # the last one, too
        rounded = [-(-(end - start) // multiple) * multiple for start, end in (self._batches[0], self._batches[index])]
        return rounded[1] + multiple * (index == 1 and rounded[0] == rounded[1])

    def _read(self, start, end):
        if start >= end:
            return self.ids[:0]
        return self.ids[len(self.ids) - end : len(self.ids) - start][::-1] if self.reverse else self.ids[start:end]

    def __str__(self):
        return (
            f"{self.tokens_per_epoch:,} words in {self.batch_size} rows of {self._row:,}, {len(self):,} windows of "
            f"{self.lengths.min()} to {self.lengths.max()}"
        )


class ClassificationBatches(_LikeLengths):
    """Texts and their classes as batches of texts of like length, filled up on the right.

    Shuffled at the start of each epoch, sorted by length within windows of 50 batches, and these batches in random
    order. Source: sorted by length, Howard and Ruder 2018, the authors' code.

    Args:
        texts: sequence of str.
        labels: sequence of int, 0 to num_classes - 1; None for texts without classes, and batches without labels.
        tokenizer: Tokenizer, or any object with encode_batch and pad_id.
        num_classes: int; None takes the greatest label + 1, 2 at least.
        batch_size: int, rows; the last batch may have fewer.
        max_length: int, words that are kept of a text, its last ones; None keeps all.
        length_multiple: int, batches are as long as their longest text, rounded up to a multiple of it, but not above
            max_length.
        shuffle: whether the order changes from epoch to epoch; None: if there are labels. False keeps the order of the
            texts; `predict` of our models refuses other batches.
        seed: int, not negative.

    Attributes:
        num_classes: int.
        lengths: list of int, those of the batches of the current pass.
        padding: float, the share of cells that hold padding in the current pass.
        epoch: int, the number of the current pass, from 0; set it to resume.

    Raises:
        ValueError: if there is no text, a text is empty or has no words, there are not as many labels as texts, or a
            label is no integer from 0 to num_classes - 1.
    """

    def __init__(self, texts, labels, tokenizer, num_classes=None, batch_size=64, max_length=None, length_multiple=16,
                 shuffle=None, seed=0):  # fmt: skip
        _check_integers(1, max_length=1 if max_length is None else max_length)
        texts = list(_as_texts(texts))
        if not texts:
            raise ValueError("There are no texts.")
        chunks = (tokenizer.encode_batch(texts[i : i + _CHUNK]) for i in range(0, len(texts), _CHUNK))
        self._rows = _joined(_flattened([ids[-max_length:] if max_length else ids for ids in rows]) for rows in chunks)
        if not self._rows.lengths.all():
            empty = int(self._rows.lengths.argmin())
            raise ValueError(f"Text {empty} has no words: {texts[empty]!r}. Leave empty texts out.")
        self.labels, self.num_classes = None, _counted(num_classes)
        if labels is not None:
            self.labels, self.num_classes = _checked_labels(labels, len(texts), self.num_classes)
        self.pad_id = tokenizer.pad_id
        super().__init__(self._rows.lengths, batch_size, length_multiple, max_length, shuffle, seed, labels is not None)

    def __getitem__(self, index):
        """Batch `index` of the current epoch: {"token_ids": int32 (rows, length)}, and the labels, int32 (rows,)."""
        length, members = self._take(index)
        x = {"token_ids": _padded(self._rows.at(members), len(members), length, self.pad_id)}
        return x if self.labels is None else (x, self.labels[members])


def _counted(num_classes):
    """num_classes as an int, or None."""
    _check_integers(1, num_classes=1 if num_classes is None else num_classes)
    return num_classes if num_classes is None else int(num_classes)


def _checked_labels(labels, count, num_classes):
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be integers, one for each of the {count} texts; got {labels.dtype} of shape {labels.shape}."
        )
    num_classes = max(int(labels.max()) + 1, 2) if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= num_classes:
        worst = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        raise ValueError(f"labels must be 0 to {num_classes - 1}; text {worst} has {labels[worst]}.")
    return labels.astype("int32"), num_classes

"""Texts, pairs of texts, tagged words and questions with choices, as batches to fine-tune BERT and its like on."""

import itertools
import warnings
from collections import namedtuple

import numpy as np

from llmfound.data.batching import _check_integers, _flattened, _is_pair, _joined, _LikeLengths, _ordered, _padded
from llmfound.data.streams import _checked_labels, _counted
from llmfound.data.tokenizers import _as_texts, _check_many, _is_text

_CHUNK = 1000  # texts encoded at a time


class SentenceBatches(_LikeLengths):
    """Texts, or pairs of texts, and their classes or scores, as batches of texts of like length.

    token_ids = [CLS] a [SEP], or [CLS] a [SEP] b [SEP]; segment_ids = 0 up to the first [SEP], then 1, 0 at padding.
    What is longer than max_length loses its last tokens, a pair one at a time from the longer text, from b if both are
    equally long. Shuffled at the start of each epoch, sorted by length within windows of 50 batches, and these batches
    in random order. Source: Devlin et al. 2019, section 4.1 and figure 4; the authors' code, which pads all texts to
    max_length.

    Args:
        texts: sequence of str, or of pairs of str: tuples, lists, rows of an array.
        labels: sequence of int, 0 to num_classes - 1, or of float, scores; None for batches without labels.
        tokenizer: WordPiece, or any object with encode_batch, pad_id, cls_id and sep_id.
        num_classes: int; None takes the greatest label + 1, 2 at least. 1 says that the labels, int or float, are
            scores; floats are without it, too, but if all of them are whole numbers, with a warning.
        batch_size: int, rows; the last batch of a window may have fewer.
        max_length: int, the most tokens of a row, [CLS] and [SEP] included.
        length_multiple: int, batches are as long as their longest text, rounded up to a multiple of it, but not above
            max_length: few shapes for a compiler to meet.
        shuffle: whether the order changes from epoch to epoch; None: if there are labels. False keeps the order of the
            texts; `predict` of our models refuses other batches.
        seed: int, not negative.

    Attributes:
        num_classes: int; 1 for scores, None without labels.
        cut: int, texts that were too long.
        lengths: list of int, those of the batches of the current pass.
        padding: float, the share of cells that hold padding in the current pass.
        epoch: int, the number of the current pass, from 0; set it to resume.

    Raises:
        ValueError: if there is no text, texts are not all str or all pairs of str, a text has no word pieces, there are
            not as many labels as texts, a label is no integer from 0 to num_classes - 1 nor a finite float, the
            tokenizer lacks a special id, or an argument is out of range.
    """

    def __init__(self, texts, labels, tokenizer, num_classes=None, batch_size=32, max_length=128, length_multiple=16,
                 shuffle=None, seed=0):  # fmt: skip
        sides = _sides(texts)
        self._inputs, self.cut = _encoded(sides, tokenizer, max_length)
        self.pad_id = tokenizer.pad_id
        self.labels, self.num_classes = _targets(labels, len(sides[0]), num_classes)
        super().__init__(
            self._inputs.rows.lengths, batch_size, length_multiple, max_length, shuffle, seed, labels is not None
        )

    def __getitem__(self, index):
        """Batch `index` of the current epoch.

        Returns:
            {"token_ids": int32 (rows, length), "segment_ids": int32 (rows, length)}, and the labels, int32 or float32
            (rows,).
        """
        length, members = self._take(index)
        x = self._inputs.batch(members, length)
        return x if self.labels is None else (x, self.labels[members])


class ChoiceBatches(_LikeLengths):
    """Questions with several answers to choose from, as batches of questions of like length.

    token_ids of answer i = [CLS] question [SEP] answer_i [SEP]; segments, truncation and order as in `SentenceBatches`.
    Source: Devlin et al. 2019, section 4.4.

    Args:
        questions: sequence of str.
        choices: sequence of sequences of str, the answers to each question, always as many.
        labels: sequence of int, the place of the right answer; None for batches without labels.
        batch_size: int, questions of a batch.
        tokenizer, max_length, length_multiple, shuffle, seed: as in `SentenceBatches`.

    Attributes:
        num_choices: int.
        cut: int, answers that were, with their questions, too long.
        lengths, padding, epoch: as in `SentenceBatches`.

    Raises:
        ValueError: if the questions do not have as many answers each, two at least; and as `SentenceBatches`.
    """

    def __init__(self, questions, choices, labels, tokenizer, batch_size=16, max_length=128, length_multiple=16,
                 shuffle=None, seed=0):  # fmt: skip
        questions, choices = list(_as_texts(questions, "questions")), list(choices)
        if len(questions) != len(choices):
            raise ValueError(f"There are {len(questions)} questions, but choices for {len(choices)}.")
        self.num_choices = len(choices[0]) if choices else 0
        for i, answers in enumerate(choices):
            counted = not isinstance(answers, str) and len(answers) == self.num_choices >= 2
            if not counted or not all(map(_is_text, answers)):
                raise ValueError(
                    f"Every question needs as many choices, all str, two at least; question 0 has {self.num_choices}, "
                    f"question {i} has {str(answers)[:60]}."
                )
        sides = _sides([(question, answer) for question, answers in zip(questions, choices) for answer in answers])
        self._inputs, self.cut = _encoded(sides, tokenizer, max_length, self.num_choices)
        self.pad_id = tokenizer.pad_id
        self.labels = None if labels is None else _checked_labels(labels, len(questions), self.num_choices)[0]
        lengths = self._inputs.rows.lengths.reshape(-1, self.num_choices)
        super().__init__(lengths, batch_size, length_multiple, max_length, shuffle, seed, labels is not None)

    def __getitem__(self, index):
        """Batch `index` of the current epoch.

        Returns:
            {"token_ids": int32 (rows, num_choices, length), "segment_ids": the same}, and the labels, int32 (rows,).
        """
        length, members = self._take(index)
        rows = (members[:, None] * self.num_choices + np.arange(self.num_choices)).ravel()
        x = {name: ids.reshape(len(members), -1, length) for name, ids in self._inputs.batch(rows, length).items()}
        return x if self.labels is None else (x, self.labels[members])


class TaggingBatches(_LikeLengths):
    """Sentences of words with a tag each, as batches of sentences of like length.

    token_ids = [CLS] the pieces of all words [SEP]. The first piece of a word has the class of its tag for a label; all
    other places have `ignore`: keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1) leaves
    them out, and so does the metric training.TokenAccuracy(pad_id=-1), where Keras's "accuracy" counts them as errors.
    Order as in `SentenceBatches`. Source: Devlin et al. 2019, section 5.3.

    Args:
        sentences: sequence of sequences of str, the words.
        tags: sequence of sequences of str, the tags of the words; None for batches without labels.
        tokenizer: WordPiece, or any object with encode_words, pad_id, cls_id and sep_id.
        classes: sequence of str, all tags, the place of each being its class; None takes those that occur, "O" first.
        max_length: int, the most tokens of a row, [CLS] and [SEP] included.
        split_long: whether a sentence that is too long is cut, between words, into several rows; of a word that is too
            long for a row, the first pieces are kept. False raises.
        shuffle: whether the order changes from epoch to epoch; None: if there are tags. False keeps the order of the
            sentences and makes all batches of one length, so that `predict` can join what it finds for `words`.
        batch_size, length_multiple, seed: as in `SentenceBatches`.

    Attributes:
        classes: tuple of str.
        num_classes: int.
        ignore: int, the label of what has no tag.
        lengths, padding, epoch: as in `SentenceBatches`.

    Raises:
        ValueError: if there is no sentence, one has no words, something but str as words, not as many tags as words, or
            a tag that is not in `classes`; if a sentence is too long; if both `tags` and `classes` are None, or
            `classes` a set, which has no order; if the tokenizer lacks a special id; or if an argument is out of range.
            The sentence is named.
    """

    ignore = label_pad_id = -1

    def __init__(self, sentences, tags, tokenizer, classes=None, batch_size=32, max_length=128, split_long=False,
                 length_multiple=16, shuffle=None, seed=0):  # fmt: skip
        cls_id, sep_id = _specials(tokenizer, max_length)
        tags = None if tags is None else [list(marks) for marks in tags]
        sentences, self.classes = _tagged(sentences, tags, classes)
        self.num_classes = len(self.classes)
        rows, row, place, most = [], [], [], max_length - 2
        for i, words in enumerate(sentences):
            pieces, ids = tokenizer.encode_words(words), [cls_id]
            total = sum(map(len, pieces))
            if total > most and not split_long:
                raise ValueError(
                    f"Sentence {i} has {total} word pieces, where max_length={max_length} leaves {most}; raise it, or "
                    "cut long sentences with split_long=True."
                )
            for word in pieces:
                if len(ids) > 1 and len(ids) - 1 + len(word) > most:
                    rows.append([*ids, sep_id])
                    ids = [cls_id]
                row.append(len(rows) if len(word) else -1)
                place.append(len(ids))
                ids.extend(word[:most])
            rows.append([*ids, sep_id])
        rows = _flattened(rows)
        self.pad_id = tokenizer.pad_id
        self._inputs = _Inputs(rows, rows.lengths, self.pad_id)
        self._row, self._place = np.array(row), np.array(place)  # of the first piece of each word; row -1 if none
        self._ends = np.cumsum([len(words) for words in sentences])
        self._labels = None
        if tags is not None:
            number = {tag: i for i, tag in enumerate(self.classes)}
            numbers = np.array([number[tag] for tag in itertools.chain.from_iterable(tags)])
            there = self._row >= 0
            flat = np.full(len(rows.flat), self.ignore, "int32")
            flat[rows.starts[self._row[there]] + self._place[there]] = numbers[there]
            self._labels = rows._replace(flat=flat)
        super().__init__(rows.lengths, batch_size, length_multiple, max_length, shuffle, seed, tags is not None)

    def _order(self, epoch):
        batches = super()._order(epoch)
        return batches if self.shuffle else [(int(self._rounded.max()), members) for _, members in batches]

    def __getitem__(self, index):
        """Batch `index` of the current epoch.

        Returns:
            {"token_ids": int32 (rows, length), "segment_ids": int32 (rows, length), all 0}, and the labels, int32
            (rows, length).
        """
        length, members = self._take(index)
        x = self._inputs.batch(members, length)
        if self._labels is None:
            return x
        return x, _padded(self._labels.at(members), len(members), length, self.ignore)

    def words(self, predictions):
        """The tag of each word of each sentence, taken from the first piece of the word; "O" for words without pieces.

        Args:
            predictions: float (rows, length, num_classes), scores, as from `predict`, or int (rows, length), classes;
                of batches with shuffle=False.

        Returns:
            list of lists of str.

        Raises:
            ValueError: if the batches are shuffled, or predictions have another shape or classes.
        """
        if self.shuffle:
            raise ValueError("Shuffled batches have no order to map back; make them with shuffle=False.")
        predictions = np.asarray(predictions)
        rows, length = len(self._inputs.rows.lengths), self.lengths[0]
        if predictions.shape == (rows, length, self.num_classes):
            predictions = predictions.argmax(axis=-1)
        if predictions.shape != (rows, length) or predictions.dtype.kind not in "iu":
            raise ValueError(
                f"predictions must be scores of shape {(rows, length, self.num_classes)}, or integers of shape "
                f"{(rows, length)}; got {predictions.dtype} of shape {predictions.shape}."
            )
        if predictions.min() < 0 or predictions.max() >= self.num_classes:
            raise ValueError(
                f"predictions must be classes from 0 to {self.num_classes - 1}; got {predictions.min()} to "
                f"{predictions.max()}."
            )
        found = np.where(self._row < 0, self.num_classes, predictions[self._row, self._place])
        tags = np.array([*self.classes, "O"], dtype=object)[found].tolist()
        return [tags[start:end] for start, end in itertools.pairwise([0, *self._ends])]


class _Inputs(namedtuple("_Inputs", "rows firsts pad_id")):
    """Rows of ids, a _Rows, of which the first `firsts`, int (rows,), are segment 0, and the others segment 1."""

    def batch(self, members, length):
        rows, position = self.rows.at(members), np.arange(length)
        second = (position >= self.firsts[members, None]) & (position < rows.lengths[:, None])
        return {"token_ids": _padded(rows, len(members), length, self.pad_id), "segment_ids": second.astype("int32")}


def _encoded(sides, tokenizer, max_length, each=1):
    """_Inputs [CLS] a [SEP], or [CLS] a [SEP] b [SEP], and how many were cut.

    Args:
        sides: list of one or two lists of str.
        each: int, rows of an example, for the error's sake.
    """
    cls_id, sep_id = _specials(tokenizer, max_length)
    most = max_length - 1 - len(sides)
    parts, firsts, cut = [], [], 0
    for start in range(0, len(sides[0]), _CHUNK):
        rows = []
        encoded = [tokenizer.encode_batch(side[start : start + _CHUNK]) for side in sides]
        for i, texts in enumerate(zip(*encoded), start):
            for side, ids in zip(sides, texts):
                if not len(ids):
                    raise ValueError(f"Text {i // each} has no word pieces: {side[i]!r}. Leave empty texts out.")
            cut += sum(map(len, texts)) > most
            kept = _cut(most, *texts)
            firsts.append(len(kept[0]) + 2)
            rows.append([cls_id, *itertools.chain.from_iterable([*ids, sep_id] for ids in kept)])
        parts.append(_flattened(rows))
    return _Inputs(_joined(parts), np.array(firsts), tokenizer.pad_id), cut


def _cut(most, first, second=None):
    """One or two lists without their last ids, taken one at a time from the longer, the second of two equally long."""
    if second is None:
        return [first[:most]]
    half = most // 2
    return [first[: max(most - half, most - len(second))], second[: max(half, most - len(first))]]


def _specials(tokenizer, max_length):
    """cls_id and sep_id."""
    _check_integers(5, max_length=max_length)
    missing = [name for name in ("pad_id", "cls_id", "sep_id") if getattr(tokenizer, name, None) is None]
    if missing:
        raise ValueError(f"The tokenizer has no {', '.join(missing)}; a WordPiece of BERT's vocabulary has them.")
    return tokenizer.cls_id, tokenizer.sep_id


def _sides(texts):
    """The texts as one list, or pairs of texts as two."""
    _check_many(texts)
    texts = list(texts)
    if not texts:
        raise ValueError("There are no texts.")
    kinds = [_kind(text) for text in texts]
    for i, kind in enumerate(kinds):
        if kind == "other" or kind != kinds[0]:
            raise ValueError(
                f"texts must be all str, or all (str, str); text {i} is {str(texts[i])[:60]!r}, {kind}, text 0 is "
                f"{kinds[0]}."
            )
    return [texts] if kinds[0] == "str" else [list(side) for side in zip(*texts)]


def _kind(text):
    if isinstance(text, str):
        return "str"
    return "a pair" if _is_pair(text) else "other"


def _targets(labels, count, num_classes):
    """The labels as int32 or float32, or None, and the number of outputs that they ask for."""
    num_classes = _counted(num_classes)
    if labels is None:
        return None, num_classes
    labels = np.asarray(labels)
    if labels.dtype.kind != "f" and (num_classes != 1 or labels.dtype.kind not in "iu"):
        return _checked_labels(labels, count, num_classes)
    if labels.shape != (count,) or not np.isfinite(labels).all():
        raise ValueError(
            f"Scores must be finite, one for each of the {count} texts; got shape {labels.shape}, with "
            f"{np.count_nonzero(~np.isfinite(labels))} that are not finite."
        )
    if num_classes not in (None, 1):
        raise ValueError(
            f"Labels that are floats are scores, without classes; got num_classes={num_classes}. "
            "For classes, pass integers."
        )
    if num_classes is None and not (labels % 1).any():
        warnings.warn(
            "The labels are floats, though whole numbers, and are taken for scores. For classes, pass integers; for "
            "scores, num_classes=1 says so.",
            stacklevel=3,
        )
    return labels.astype("float32"), 1


def _tagged(sentences, tags, classes):
    """The sentences as lists, and all classes, a tuple."""
    sentences = [words if isinstance(words, str) else list(words) for words in sentences]
    if not sentences:
        raise ValueError("There are no sentences.")
    for i, words in enumerate(sentences):
        if isinstance(words, str) or not words or not all(map(_is_text, words)):
            raise ValueError(f"A sentence is a list of str, its words; sentence {i} is {str(words)[:60]!r}.")
    if tags is None and classes is None:
        raise ValueError("classes must be given where there are no tags to take them from.")
    classes = None if classes is None else tuple(_ordered(classes))
    if tags is None:
        return sentences, classes
    if len(tags) != len(sentences):
        raise ValueError(f"There are {len(sentences)} sentences, but tags for {len(tags)}.")
    known = set(itertools.chain.from_iterable(tags)) if classes is None else set(classes)
    odd = [tag for tag in known if not isinstance(tag, str)]
    if classes is None and 0 < len(odd) < len(known):
        raise ValueError(f"Tags must be str; got {', '.join(map(repr, odd[:5]))} among them.")
    for i, (words, marks) in enumerate(zip(sentences, tags)):
        if len(words) != len(marks):
            raise ValueError(f"Sentence {i} has {len(words)} words, but {len(marks)} tags.")
        if not known.issuperset(marks):
            unknown = next(tag for tag in marks if tag not in known)
            raise ValueError(f"Sentence {i} has the tag {unknown!r}; classes are {', '.join(map(str, classes))}.")
    if classes is None:
        classes = tuple(sorted(known, key=lambda tag: (tag != "O", tag)))
    return sentences, classes

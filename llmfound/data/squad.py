"""Questions on texts: reading SQuAD, windows of long texts as batches, and answers from what a model finds."""

import dataclasses
import json
import unicodedata
from collections import namedtuple

import numpy as np

from llmfound.data.batching import _check_integers, _flattened, _LikeLengths, _padded
from llmfound.data.text import read_lines
from llmfound.data.tokenizers import _is_text

_CHUNK = 1000  # texts encoded at a time


@dataclasses.dataclass(frozen=True)
class Question:
    """A question on a text.

    Attributes:
        id, question, context, title: str.
        answers: tuple of (str, int), right answers and where they begin in the context, in characters.
        impossible: bool, whether the context has no answer (SQuAD 2.0).
    """

    id: str
    question: str
    context: str
    answers: tuple = ()
    impossible: bool = False
    title: str = ""


# The answer's text, score and probability of a candidate; and how much likelier it is that there is none.
Candidates = namedtuple("Candidates", "texts scores probabilities null_odds")


def read_squad(path):
    """The questions of a file of SQuAD, 1.1 or 2.0; a name that ends in .gz, .xz or .bz2 is decompressed.

    Where an entry does not tell of "is_impossible", it is if its "answers" are there and empty.

    Args:
        path: str or path.

    Returns:
        list of Question.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such file, or an answer does not stand where it says.
    """
    try:
        return _questions(path, json.loads("\n".join(read_lines(path)))["data"])
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no file of SQuAD: {type(error).__name__}, {error}.") from error


def _questions(path, articles):
    found = []
    for article in articles:
        for paragraph in article["paragraphs"]:
            context = paragraph["context"]
            for entry in paragraph["qas"]:
                answers = tuple((answer["text"], answer["answer_start"]) for answer in entry.get("answers", ()))
                for text, start in answers:
                    if context[start : start + len(text)] != text:
                        raise ValueError(f"{path}: the answer {text!r} of {entry['id']} is not at character {start}.")
                impossible = bool(entry.get("is_impossible", "answers" in entry and not answers))
                found.append(Question(entry["id"], entry["question"], context, answers, impossible,
                                      article.get("title", "")))  # fmt: skip
    return found


def windows(pieces, size, stride):
    """Where the windows of a text begin and end, list of (start, end): `size` pieces each, one every `stride` pieces.

    The last one ends with the text. Source: Devlin et al. 2019, the authors' code.
    """
    found, start = [], 0
    while start < pieces:
        found.append((start, min(start + size, pieces)))
        if found[-1][1] == pieces:
            break
        start += min(size, stride)
    return found


def owners(found):
    """The window in which each piece has the most context: int (pieces,), of what `windows` found.

    min(pieces to the left, pieces to the right) + 0.01 window's length; the first of equal ones.
    """
    places = np.arange(found[-1][1])
    scores = [
        np.where((places >= start) & (places < end), np.minimum(places - start, end - 1 - places), -1e9)
        + 0.01 * (end - start)
        for start, end in found
    ]
    return np.argmax(scores, axis=0)


class QuestionAnsweringBatches(_LikeLengths):
    """Questions and windows of their texts as batches, and the answers that a model's logits amount to.

    token_ids = [CLS] question [SEP] window [SEP]; segment_ids = 0 up to the first [SEP], then 1, 0 at padding. A text
    that does not fit is read in windows that overlap. Labels are the places, in the row, of the answer's first and last
    piece; both are 0, [CLS], where a window does not hold the whole answer. Source: Devlin et al. 2019, sections 4.2
    and 4.3; the authors' code, which looks for the pieces of the answer where here the characters' places tell them.

    Args:
        questions: sequence of Question; the first of several answers is the label.
        tokenizer: WordPiece, or any object with encode_batch, encode_batch_with_offsets, pad_id, cls_id and sep_id.
        batch_size: int, windows of a batch.
        max_length: int, the most tokens of a row.
        stride: int, pieces from one window's beginning to the next.
        max_question: int, the most pieces of a question.
        cut_questions: whether longer questions are cut, as the authors do. False raises.
        length_multiple, seed: as in `SentenceBatches`.
        shuffle: whether the order changes from epoch to epoch. False keeps the order and makes all batches of one
            length, so that `predict` can join what it finds for `answers`.

    Attributes:
        questions: list of Question.
        cut: int, questions that were cut.
        windows: list of (question, start, end) of every row: the place in `questions`, and pieces of its text.
        lengths, padding, epoch: as in `SentenceBatches`.

    Raises:
        ValueError: if there is no question, two have one id, a question is empty or too long, a text has no pieces,
            an answer does not stand where it says, rows leave no room for a text, the tokenizer lacks a special id, or
            an argument is out of range.
    """

    def __init__(self, questions, tokenizer, batch_size=32, max_length=384, stride=128, max_question=64,
                 cut_questions=True, length_multiple=64, shuffle=True, seed=0):  # fmt: skip
        _check_integers(1, max_length=max_length, stride=stride, max_question=max_question)
        self.questions = list(questions)
        if not self.questions:
            raise ValueError("There are no questions.")
        seen = {}
        for i, question in enumerate(self.questions):
            first = seen.setdefault(question.id, i)
            if first != i:
                raise ValueError(f"Questions {first} and {i} have one id, {question.id!r}; answers need one for each.")
            if not _is_text(question.question) or not _is_text(question.context):
                raise ValueError(
                    f"Question {question.id}: question and context must be str without lone surrogates; got "
                    f"{repr(question.question)[:60]} and {repr(question.context)[:60]}."
                )
        special = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id]
        if None in special:
            raise ValueError(f"The tokenizer needs pad_id, cls_id and sep_id; it has {special}.")
        asked = tokenizer.encode_batch([question.question for question in self.questions])
        for question, ids in zip(self.questions, asked):
            if not ids:
                raise ValueError(f"Question {question.id} has no words: {question.question!r}.")
            if len(ids) > max_question and not cut_questions:
                raise ValueError(
                    f"Question {question.id} has {len(ids)} pieces, more than max_question={max_question}."
                )
        self.cut = sum(len(ids) > max_question for ids in asked)
        asked = [ids[:max_question] for ids in asked]
        longest = max(map(len, asked))
        if max_length < longest + 4:
            raise ValueError(
                f"max_length ({max_length}) leaves no room for a text behind {longest} pieces of a question."
            )
        contexts = list(dict.fromkeys(question.context for question in self.questions))
        encoded = {}
        for i in range(0, len(contexts), _CHUNK):
            chunk = contexts[i : i + _CHUNK]
            encoded |= {text: (ids, np.array(offsets, "int32").reshape(-1, 2))
                        for text, (ids, offsets) in zip(chunk, tokenizer.encode_batch_with_offsets(chunk))}  # fmt: skip
        self._offsets = {text: offsets for text, (_, offsets) in encoded.items()}
        self.windows, self._firsts, self._owners, rows, spans = [], [], [], [], []
        for i, question in enumerate(self.questions):
            ids, offsets = encoded[question.context]
            if not ids:
                raise ValueError(f"The text of question {question.id} has no words: {question.context[:40]!r}.")
            places = windows(len(ids), max_length - len(asked[i]) - 3, stride)
            first, answer = len(asked[i]) + 2, _pieces_of_answer(question, offsets)
            self._owners.append(owners(places))
            for start, end in places:
                self.windows.append((i, start, end))
                self._firsts.append(first)
                rows.append([tokenizer.cls_id, *asked[i], tokenizer.sep_id, *ids[start:end], tokenizer.sep_id])
                inside = answer is not None and start <= answer[0] and answer[1] < end
                spans.append([place - start + first for place in answer] if inside else [0, 0])
        self.labels, self.pad_id = np.array(spans, "int32"), tokenizer.pad_id
        self._rows, self._firsts = _flattened(rows), np.array(self._firsts)
        lengths = self._rows.lengths if shuffle else np.full(len(rows), self._rows.lengths.max())
        super().__init__(lengths, batch_size, length_multiple, max_length, shuffle, seed)
        self._cells = self._rows.lengths[:, None]

    def __getitem__(self, index):
        """Batch `index` of the current epoch.

        Returns:
            {"token_ids": int32 (rows, length), "segment_ids": int32 (rows, length)}, and the labels, int32 (rows, 2).
        """
        length, members = self._take(index)
        ids = _padded(self._rows.at(members), len(members), length, self.pad_id)
        places = np.arange(length)
        segments = (places >= self._firsts[members, None]) & (places < self._rows.lengths[members, None])
        return {"token_ids": ids, "segment_ids": segments.astype("int32")}, self.labels[members]

    def candidates(self, logits, n_best=20, max_answer=30):
        """The likeliest answers to each question.

        Of each window, the 20 likeliest first and last pieces are paired: a pair counts if both are in the text, the
        first in the window where it has the most context, the last not before it, and there are at most `max_answer`
        pieces. Pairs of all windows are ranked by the sum of their logits; each text counts once.

        Args:
            logits: float (windows, 2, length), of first and last pieces, as a BERTQuestionAnswering predicts them from
                these batches; `shuffle` must be False.
            n_best: int, how many.
            max_answer: int, pieces.

        Returns:
            dict, question's id -> Candidates: `texts`, `scores` and `probabilities`, the likeliest first, and
            `null_odds`, the logits' sum at [CLS], the least of all windows, less that of the first candidate.

        Raises:
            ValueError: if the batches are shuffled, or the logits are not those of all windows.
        """
        logits = np.asarray(logits)
        if self.shuffle:
            raise ValueError("Windows must be in order; make these batches with shuffle=False.")
        if logits.ndim != 3 or logits.shape[:2] != (len(self.windows), 2):
            raise ValueError(f"logits must be ({len(self.windows)}, 2, length); got {logits.shape}.")
        spans = {question.id: [] for question in self.questions}
        nulls = dict.fromkeys(spans, np.inf)
        before, window = None, 0
        for row, (i, start, end) in enumerate(self.windows):
            before, window = i, window + 1 if i == before else 0
            name, first = self.questions[i].id, self._firsts[row]
            nulls[name] = min(nulls[name], float(logits[row, :, 0].sum()))
            length = end - start
            starts, ends = (self._likeliest(side[first : first + length], max(n_best, 20)) for side in logits[row])
            starts = starts[self._owners[i][starts + start] == window]
            pairs = ends[None] - starts[:, None]
            a, b = np.nonzero((pairs >= 0) & (pairs < max_answer))
            scores = logits[row, 0, first + starts[a]] + logits[row, 1, first + ends[b]]
            best = np.argsort(-scores, kind="stable")[: 4 * n_best]
            spans[name] += zip(
                scores[best].tolist(), (starts[a][best] + start).tolist(), (ends[b][best] + start).tolist()
            )
        return {question.id: self._ranked(question, spans[question.id], nulls[question.id], n_best)
                for question in self.questions}  # fmt: skip

    def answers(self, logits, null_threshold=None, **options):
        """The answer to each question: dict, id -> str.

        Args:
            logits, options: as in `candidates`.
            null_threshold: float, "" is the answer where `null_odds` is greater (SQuAD 2.0); None always answers.
        """
        return {name: "" if not found.texts or (null_threshold is not None and found.null_odds > null_threshold)
                else found.texts[0] for name, found in self.candidates(logits, **options).items()}  # fmt: skip

    def __str__(self):
        return (
            f"{len(self.questions):,} questions ({self.cut:,} cut), {len(self.windows):,} windows, "
            f"{len(self):,} batches, {self.padding:.1%} padding"
        )

    @staticmethod
    def _likeliest(logits, count):
        if len(logits) <= count:
            return np.arange(len(logits))
        return np.argpartition(-logits, count)[:count]

    def _ranked(self, question, spans, null, n_best):
        offsets, texts = self._offsets[question.context], {}
        for score, first, last in sorted(spans, key=lambda span: (-span[0], span[1], span[2])):
            text = question.context[offsets[first, 0] : _end(question.context, offsets, last)]
            if text not in texts:
                texts[text] = score
            if len(texts) == n_best:
                break
        scores = np.array(list(texts.values()))
        shares = np.exp(scores - scores.max()) if len(scores) else scores
        odds = null - scores[0] if len(scores) else np.inf
        return Candidates(list(texts), scores.tolist(), (shares / shares.sum()).tolist(), float(odds))


def _end(text, offsets, piece):
    """Where a piece ends, with the marks behind it that combine with its last character, if they are in no piece."""
    end, following = offsets[piece, 1], offsets[piece + 1, 0] if piece + 1 < len(offsets) else len(text)
    while end < following and unicodedata.category(text[end]) == "Mn":
        end += 1
    return end


def _pieces_of_answer(question, offsets):
    """The first and the last piece of the first answer; None if there is none, or its characters are all dropped."""
    if question.impossible or not len(question.answers):
        return None
    first = next(iter(question.answers))
    kinds = (str, (int, np.integer))
    if not isinstance(first, (tuple, list)) or len(first) != 2 or not all(map(isinstance, first, kinds)):
        raise ValueError(
            f"Question {question.id}: answers must be pairs of a str and an int, the character of the text at which it "
            f"begins; got {str(question.answers)[:80]}."
        )
    text, start = first
    found = question.context[max(start, 0) :][: len(text)]
    if found != text:
        raise ValueError(f"Question {question.id}: the answer {text!r} is not at character {start}, but {found!r}.")
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < start + len(text)))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None

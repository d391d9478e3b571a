"""The scores that fine-tuned models are reported by: GLUE's, SQuAD's and those of named entities."""

import collections
import re
import string

import numpy as np

_KINDS = {**dict.fromkeys("biuf", "numbers"), **dict.fromkeys("UT", "str")}  # of NumPy's kinds


def accuracy(labels, predictions):
    """The share of predictions that are the label: float from 0 to 1. Args, errors: as `f1`."""
    labels, predictions = _classes(labels, predictions)
    return float((labels == predictions).mean())


def f1(labels, predictions, positive=1):
    """The harmonic mean of precision and recall of one class.

    F1 = 2 TP / (2 TP + FP + FN), and 0 where nothing of the class is there or found.

    Args:
        labels, predictions: sequences (n,) of int, bool, whole float, or str: classes.
        positive: the class.

    Returns:
        float from 0 to 1.

    Raises:
        ValueError: if there is nothing, the two are not of one length and of rank 1, a value is not finite or no whole
            number, or some classes are str and others are not.
    """
    labels, predictions = _classes(labels, predictions, positive)
    both = ((labels == positive) & (predictions == positive)).sum()
    either = (labels == positive).sum() + (predictions == positive).sum()
    return float(2 * both / either) if either else 0.0


def matthews_correlation(labels, predictions):
    """The correlation of two classifications, of two classes or more: float from -1 to 1.

    (c n - sum_k p_k t_k) / sqrt((n^2 - sum_k p_k^2)(n^2 - sum_k t_k^2)),  with c of n right, p_k predictions and t_k
    labels of class k; 0 where either has one class only, as in GLUE. Source: Gorodkin 2004. Args, errors: as `f1`.
    """
    labels, predictions = _classes(labels, predictions)
    classes, places = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    true, found = (np.bincount(x, minlength=len(classes)).astype(float) for x in np.split(places, 2))
    n = float(len(labels))
    below = (n * n - found @ found) * (n * n - true @ true)
    return float((n * (labels == predictions).sum() - found @ true) / np.sqrt(below)) if below > 0 else 0.0


def pearson(labels, predictions):
    """The correlation of two series of numbers, float from -1 to 1; nan where either is constant. Errors: as `f1`."""
    x, y = _pair(labels, predictions, float)
    if np.ptp(x) == 0 or np.ptp(y) == 0:  # exact, where the squares of what is left by the mean's rounding are not
        return float("nan")
    x, y = (values - values.mean() for values in (x, y))
    x, y = (values / np.abs(values).max() for values in (x, y))  # squares of small values would be 0
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def spearman(labels, predictions):
    """`pearson` of the ranks; equal values share the mean of theirs."""
    return pearson(*(_ranks(values) for values in _pair(labels, predictions, float)))


def squad_scores(predictions, examples, null_odds=None):
    """Exact match and F1 of answers, in percent, equal to SQuAD's own evaluation: 2.0's, or 1.1's if all have answers.

    Both texts lose case, punctuation, articles and extra space; F1 is of the words that they share. The best of several
    right answers counts; of a question without an answer, "" is right. Source: Rajpurkar et al. 2016, section 6.1;
    Rajpurkar, Jia, Liang 2018.

    Args:
        predictions: dict, question's id -> str.
        examples: iterable of what `data.read_squad` gives: objects with `id`, `answers`, a list of (text, start), and
            `impossible`. One that is impossible, or has no answers, is a question without an answer.
        null_odds: dict, id -> float, how much likelier no answer is. The best threshold is then looked for, above which
            "" is taken in place of the prediction.

    Returns:
        dict of float: "exact", "f1"; where some questions have no answer also "HasAns_exact", "HasAns_f1",
        "NoAns_exact", "NoAns_f1"; and with `null_odds` "best_exact", "best_exact_threshold", "best_f1",
        "best_f1_threshold".

    Raises:
        ValueError: if there is no example, a prediction or its odds are missing, or a prediction is no str.
    """
    examples = list(examples)
    if not examples:
        raise ValueError("There are no examples.")
    missing = [example.id for example in examples if not isinstance(predictions.get(example.id), str)]
    if missing:
        raise ValueError(f"{len(missing)} questions have no prediction, or one that is no str: {missing[:3]}.")
    missing = [example.id for example in examples if null_odds is not None and example.id not in null_odds]
    if missing:
        raise ValueError(f"{len(missing)} questions have no null_odds: {missing[:3]}.")
    has_answer = np.array([bool(example.answers) and not example.impossible for example in examples])
    second = null_odds is not None or not has_answer.all()
    answers = [one.answers if has else () for one, has in zip(examples, has_answer)]
    found = np.array([_exact_and_f1(predictions[one.id], right, second) for one, right in zip(examples, answers)])
    scores = dict(zip(("exact", "f1"), 100 * found.mean(axis=0)))
    if not has_answer.all():
        for name, chosen in (("HasAns", has_answer), ("NoAns", ~has_answer)):
            if chosen.any():
                scores |= {f"{name}_{key}": x for key, x in zip(("exact", "f1"), 100 * found[chosen].mean(axis=0))}
    if null_odds is not None:
        odds = np.array([null_odds[example.id] for example in examples], float)
        given = np.array([bool(predictions[example.id]) for example in examples])
        for i, name in enumerate(("exact", "f1")):
            scores[f"best_{name}"], scores[f"best_{name}_threshold"] = _best(odds, found[:, i], has_answer, given)
    return {name: float(value) for name, value in scores.items()}


def entity_scores(labels, predictions):
    """Precision, recall and F1 of whole entities, by the rules of the CoNLL evaluation.

    An entity is right if its type and both ends are. It begins at a B-, or at an I- that does not go on with an entity
    of its type. Source: Tjong Kim Sang and De Meulder 2003.

    Args:
        labels, predictions: sequences, one for each sentence, of sequences of str: O, B-type, I-type.

    Returns:
        dict of float from 0 to 1: "precision", "recall", "f1"; 0 where there is nothing to divide by.

    Raises:
        ValueError: if the two differ in sentences or lengths, or a tag is none of these.
    """
    labels, predictions = list(labels), list(predictions)
    if len(labels) != len(predictions):
        raise ValueError(f"There are {len(labels)} sentences of labels, and {len(predictions)} of predictions.")
    right = true = found = 0
    for i, (one, other) in enumerate(zip(labels, predictions)):
        if len(one) != len(other):
            raise ValueError(f"Sentence {i} has {len(one)} labels, and {len(other)} predictions.")
        one, other = _entities(one, i), _entities(other, i)
        right, true, found = right + len(one & other), true + len(one), found + len(other)
    precision, recall = right / found if found else 0.0, right / true if true else 0.0
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}


def _pair(labels, predictions, dtype=None):
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape or not len(labels):
        raise ValueError(
            f"labels and predictions must be of one length, at least 1; got {labels.shape} and {predictions.shape}."
        )
    for name, values in (("labels", labels), ("predictions", predictions)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite; number {int(np.flatnonzero(~np.isfinite(values))[0])} is not.")
    return (labels, predictions) if dtype is None else (labels.astype(dtype), predictions.astype(dtype))


def _classes(labels, predictions, positive=None):
    """The two as arrays, if these and `positive` are classes of one kind."""
    labels, predictions = (np.asarray(x.tolist()) if x.dtype == object else x for x in _pair(labels, predictions))
    given = {"labels": labels, "predictions": predictions}
    if positive is not None:
        given["positive"] = np.asarray([positive])
    for name, values in given.items():
        if values.dtype.kind == "f" and (values % 1).any():
            odd = values[np.flatnonzero(values % 1)[0]]
            raise ValueError(f"{name} must be classes; got {odd}. Of logits or probabilities, take the argmax.")
    kinds = {name: _KINDS.get(values.dtype.kind, values.dtype.name) for name, values in given.items()}
    if set(kinds.values()) not in ({"numbers"}, {"str"}):
        found = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        raise ValueError(f"Classes must be all numbers or all str; got {found}.")
    return labels, predictions


def _ranks(values):
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[places]


def _normal(text):
    """The words of an answer that count."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _exact_and_f1(prediction, answers, second):
    """Of the best of several (text, start). The `second` version's rules drop answers without a word, and let no words
    match none."""
    found, answers, scores = _normal(prediction), [_normal(text) for text, _ in answers], []
    for answer in [words for words in answers if words or not second] or [[]]:
        shared = sum((collections.Counter(found) & collections.Counter(answer)).values())
        f1 = 2 * shared / (len(found) + len(answer)) if found or answer else float(second)
        scores.append((float(found == answer), f1))
    return tuple(map(max, zip(*scores)))


def _best(odds, scores, has_answer, given):
    """The best mean score, in percent, when questions of odds above a threshold get "", and that threshold.

    As in the official script, the threshold grows through the odds, and whatever is `given` where no answer is due
    counts as wrong, be it without a word. If it is best to answer nothing, the threshold is 0, as in the
    script, or less where 0 would answer some.
    """
    gains = np.where(has_answer, scores, np.where(given, -1.0, 0.0))
    order = np.argsort(odds, kind="stable")
    totals = np.concatenate([[0.0], np.cumsum(gains[order])]) + (~has_answer).sum()
    best = int(totals.argmax())
    threshold = odds[order][best - 1] if best else min(0.0, np.nextafter(odds.min(), -np.inf))
    return 100 * totals[best] / len(odds), float(threshold)


def _entities(tags, sentence):
    """{(type, first, last)} of one sentence."""
    found, start, kind = set(), None, None
    for i, tag in enumerate([*tags, "O"]):
        mark, _, new = tag.partition("-")
        if tag != "O" and (mark not in ("B", "I") or not new):
            raise ValueError(f"Sentence {sentence} has the tag {tag!r}; tags are O, B-type and I-type.")
        if kind is not None and (mark != "I" or new != kind):
            found.add((kind, start, i - 1))
            kind = None
        if kind is None and tag != "O":
            start, kind = i, new
    return found

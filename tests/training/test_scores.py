"""Scores against definitions written otherwise, and cases of the official scripts worked out by hand."""

import math
import types

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmfound.training import accuracy, entity_scores, f1, matthews_correlation, pearson, spearman, squad_scores

pytestmark = pytest.mark.on_one_backend

classes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30)
numbers = st.lists(st.tuples(*[st.floats(-9, 9).map(lambda x: round(x, 1))] * 2), min_size=2, max_size=30)


@given(classes)
def test_scores_of_classes_are_those_of_the_counts(pairs):
    labels, found = zip(*pairs)
    assert accuracy(labels, found) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    for positive in (0, 1):
        both = pairs.count((positive, positive))
        precision, recall = (both / n if n else 0 for n in (found.count(positive), labels.count(positive)))
        harmonic = 2 * precision * recall / (precision + recall) if both else 0
        assert f1(labels, found, positive) == pytest.approx(harmonic)


@given(classes)
def test_matthews_correlation_is_the_correlation_of_one_hot_rows(pairs):
    one, other = (np.eye(3)[list(x)] for x in zip(*pairs))
    covariance = lambda x, y: ((x - x.mean(0)) * (y - y.mean(0))).sum()  # noqa: E731
    below = covariance(one, one) * covariance(other, other)
    expected = covariance(one, other) / math.sqrt(below) if below > 1e-12 else 0
    assert matthews_correlation(*zip(*pairs)) == pytest.approx(expected, abs=1e-9)


def test_matthews_correlation_of_two_classes():
    labels, found = (
        [1] * 6 + [0] * 4,
        [1, 1, 1, 1, 0, 0, 1, 0, 0, 0],
    )  # 4 true positives, 2 missed, 1 false, 3 true negatives
    assert matthews_correlation(labels, found) == pytest.approx((4 * 3 - 1 * 2) / math.sqrt(5 * 6 * 4 * 5))


@given(numbers)
@example([(1.6, 0.0), (1.6, 0.0), (1.6, 1.0)])  # 1.6 less the rounded mean of three is not 0
@example([(1e-200, 0.0), (0.0, 0.0), (0.0, 1.0)])
def test_correlations_are_scipys(pairs):
    stats = pytest.importorskip("scipy.stats")
    x, y = map(np.array, zip(*pairs))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(pearson(x, y)) and math.isnan(spearman(x, y))
        return
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-7)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-7)


@pytest.mark.parametrize("score", [accuracy, f1, matthews_correlation, pearson, spearman])
def test_predictions_that_do_not_fit(score):
    for labels, found in (([], []), ([1, 0], [1]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match=r"must be of one length, at least 1; got \("):
            score(labels, found)
    with pytest.raises(ValueError, match="predictions must be finite; number 1 is not"):
        score([0.0, 1.0], [0.0, math.nan])


@pytest.mark.parametrize("labels, found, more, message", [
    ([1, 0], ["1", "0"], {}, "all numbers or all str; got labels numbers, predictions str"),
    ([1, 0], [0.9, 0.2], {}, "predictions must be classes; got 0.9. Of logits or probabilities, take the argmax"),
    ([0.5, 1.0], [1, 0], {}, "labels must be classes; got 0.5"),
    (["a", None], ["a", "b"], {}, "got labels object, predictions str"),
    ([b"a"], [b"a"], {}, "got labels bytes8, predictions bytes8"),
    (["a", "b"], ["a", "b"], dict(positive=1), "got labels str, predictions str, positive numbers"),
    ([1, 0], [1, 0], dict(positive="1"), "got labels numbers, predictions numbers, positive str"),
])  # fmt: skip
def test_classes_that_cannot_be_compared(labels, found, more, message):
    for score in (f1,) if more else (accuracy, matthews_correlation):
        with pytest.raises(ValueError, match=message):
            score(labels, found, **more)


def test_classes_may_be_of_either_kind():
    names = ["yes", "no", "no"]
    for labels in (names, np.array(names), np.array(names, object)):
        assert accuracy(labels, names) == matthews_correlation(labels, names) == f1(labels, names, "no") == 1
    for labels in ([True, False, False], [1.0, 0.0, 0.0], np.array([1, 0, 0], object), np.array([1, 0, 0], "uint8")):
        assert accuracy(labels, [1, 0, 0]) == matthews_correlation(labels, [1, 0, 0]) == f1(labels, [1, 0, 0]) == 1


# SQuAD


def question(name, *answers, impossible=False):
    return types.SimpleNamespace(id=name, answers=[(text, 0) for text in answers], impossible=impossible)


@pytest.mark.parametrize("prediction, answers, exact, overlap", [
    ("The Cat!", ["cat"], 100, 100), ("a cat sat", ["the cat"], 0, 200 / 3), ("dog", ["cat"], 0, 0),
    ("cat", ["dog", "Cat."], 100, 100), ("in 1999", ["1999", "the year 1999"], 0, 200 / 3), ("the", ["cat"], 0, 0),
    ("cat cat", ["cat"], 0, 200 / 3), ("  new\u00a0 york ", ["New York"], 100, 100), ("can't", ["cant"], 100, 100),
])  # fmt: skip
def test_answers_by_the_official_rules(prediction, answers, exact, overlap):
    found = squad_scores({"q": prediction}, [question("q", *answers)])
    assert found == pytest.approx({"exact": exact, "f1": overlap})


def test_answers_without_a_word_by_the_rules_of_both_versions():
    dot, the = question("a", "."), question("b", "the")
    assert squad_scores({"a": ".", "b": "the"}, [dot, the]) == {"exact": 100, "f1": 0}  # 1.1
    found = squad_scores({"a": "", "b": "the", "c": ""}, [dot, the, question("c", impossible=True)])  # 2.0
    assert found["exact"] == found["f1"] == 100
    assert squad_scores({"a": "."}, [question("a", ".", "x")], {"a": 0.0})["exact"] == 0  # 2.0 drops the first


def test_questions_without_an_answer():
    examples = [question("a", "cat"), question("b", impossible=True), question("c", impossible=True)]
    found = squad_scores({"a": "cat sat", "b": "", "c": "dog"}, examples)
    assert found == pytest.approx({"exact": 100 / 3, "f1": (2 / 3 + 1) * 100 / 3, "HasAns_exact": 0,
                                   "HasAns_f1": 200 / 3, "NoAns_exact": 50, "NoAns_f1": 50})  # fmt: skip


@pytest.mark.parametrize("none", [question("b"), question("b", "dog", impossible=True)])
def test_a_question_has_an_answer_if_it_has_answers_and_is_possible(none):
    examples = [question("a", "cat"), none]
    for prediction, right in (("", 100), ("dog", 0)):
        found = squad_scores({"a": "cat", "b": prediction}, examples, {"a": -1.0, "b": 1.0})
        assert found["exact"] == (100 + right) / 2 and found["HasAns_exact"] == 100
        assert found["NoAns_exact"] == found["NoAns_f1"] == right and found["best_exact"] == 100


def test_the_best_threshold():
    examples = [question("a", "cat"), question("b", "dog"), question("c", impossible=True), question("d", "x")]
    predictions = {"a": "cat", "b": "dog", "c": "cow", "d": "y"}
    odds = {"a": -3.0, "b": 1.0, "c": 2.0, "d": -1.0}
    found = squad_scores(predictions, examples, odds)
    assert found["exact"] == 50 and found["best_exact"] == 75 and found["best_exact_threshold"] == 1.0
    taken = {name: "" if odds[name] > 1.0 else text for name, text in predictions.items()}
    assert squad_scores(taken, examples)["exact"] == 75
    examples = [question("a", impossible=True), question("b", "cat")]
    for prediction, best in (("the", 50), ("", 100)):  # "the" has no word, but is no ""
        found = squad_scores({"a": prediction, "b": "cat"}, examples, {"a": 0.0, "b": 1.0})
        assert found["exact"] == 100 and found["best_exact"] == found["best_f1"] == best
    nothing = squad_scores({"a": "y"}, [question("a", "x")], {"a": 5.0})
    assert nothing["best_f1"] == 0 and nothing["best_f1_threshold"] == 0.0
    for least in (-2.0, 0.0):
        odds = {"a": least, "b": 1.0}
        nothing = squad_scores({"a": "x", "b": "y"}, [question(name, impossible=True) for name in odds], odds)
        assert nothing["best_exact"] == 100 and least - 1e-9 < nothing["best_exact_threshold"] < least


def test_predictions_that_are_missing():
    with pytest.raises(ValueError, match=r"2 questions have no prediction, or one that is no str: \['a', 'b'\]"):
        squad_scores({"b": None}, [question("a", "x"), question("b", "x")])
    with pytest.raises(ValueError, match="There are no examples"):
        squad_scores({}, [])
    with pytest.raises(ValueError, match=r"1 questions have no null_odds: \['b'\]"):
        squad_scores({"a": "x", "b": "y"}, [question("a", "x"), question("b", "x")], {"a": 0.0})


# Entities


@pytest.mark.parametrize("tags, expected", [
    ("B-x I-x O B-x", {("x", 0, 1), ("x", 3, 3)}), ("I-x I-x B-x", {("x", 0, 1), ("x", 2, 2)}),
    ("B-x I-y I-y", {("x", 0, 0), ("y", 1, 2)}), ("O O", set()), ("B-x B-x", {("x", 0, 0), ("x", 1, 1)}),
    ("B-a-b I-a-b", {("a-b", 0, 1)}),
])  # fmt: skip
def test_where_entities_begin_and_end(tags, expected):
    tags = tags.split()
    begun = [["O"] * len(tags)]
    for kind, first, last in expected:
        begun[0][first : last + 1] = [f"B-{kind}", *[f"I-{kind}"] * (last - first)]
    found = entity_scores(begun, [tags])
    assert found["f1"] == (1.0 if expected else 0.0) == found["precision"] == found["recall"]


def test_entities_are_right_as_wholes():
    labels = [["B-x", "I-x", "O", "B-y"], ["B-x"]]
    found = entity_scores(labels, [["B-x", "O", "O", "B-y"], ["B-y"]])
    assert found == pytest.approx({"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3})
    found = entity_scores(labels, [["B-x", "I-x", "O", "O"], ["O"]])
    assert found == pytest.approx({"precision": 1, "recall": 1 / 3, "f1": 0.5})


@pytest.mark.parametrize("labels, found, message", [
    ([["O"]], [], "There are 1 sentences of labels, and 0 of predictions"),
    ([["O"], ["O", "O"]], [["O"], ["O"]], "Sentence 1 has 2 labels, and 1 predictions"),
    ([["O"]], [["E-x"]], "Sentence 0 has the tag 'E-x'; tags are O, B-type and I-type"),
    ([["B"]], [["O"]], "Sentence 0 has the tag 'B'"),
])  # fmt: skip
def test_tags_that_do_not_fit(labels, found, message):
    with pytest.raises(ValueError, match=message):
        entity_scores(labels, found)

"""Perplexity and accuracy over batches of unequal size, and BLEU."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from llmfound.training import (
    ErrorRate,
    Perplexity,
    SmoothedCrossEntropy,
    TokenAccuracy,
    bleu,
    bleu_by_length,
    mean_interval,
)  # fmt: skip


def log_likelihoods(labels, logits):
    logits = logits.astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, labels[..., None], -1)[..., 0]


@pytest.fixture
def batches():
    """Two batches whose means differ and whose numbers of real tokens are 9 and 1."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 3, 5)).astype("float32")
    labels = rng.integers(1, 5, (6, 3)).astype("int32")
    labels[3:] = 0
    labels[4, 1] = 2
    logits[4, 1, 2] = -3
    return [(labels[:3], logits[:3]), (labels[3:], logits[3:])]


def result(metric):
    return float(ops.convert_to_numpy(metric.result()))


def pooled(batches, pad_id=0):
    labels, logits = (np.concatenate(x) for x in zip(*batches))
    return labels, logits, np.ones(labels.shape, bool) if pad_id is None else labels != pad_id


@pytest.mark.parametrize("pad_id", [0, 3, None])
def test_perplexity_over_unequal_batches_is_that_of_the_whole(batches, pad_id):
    metric = Perplexity(pad_id)
    for labels, logits in batches:
        metric.update_state(labels, logits)
    labels, logits, real = pooled(batches, pad_id)
    expected = np.exp(-log_likelihoods(labels, logits)[real].mean())
    np.testing.assert_allclose(result(metric), expected, rtol=1e-5)


@pytest.mark.parametrize("pad_id", [0, 3, None])
def test_accuracy_over_unequal_batches_is_that_of_the_whole(batches, pad_id):
    metric = TokenAccuracy(pad_id)
    for labels, logits in batches:
        metric.update_state(labels, logits)
    labels, logits, real = pooled(batches, pad_id)
    np.testing.assert_allclose(result(metric), (logits.argmax(-1) == labels)[real].mean(), rtol=1e-6)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    metric = Perplexity()
    metric.update_state(np.ones((2, 3), "int32"), np.zeros((2, 3, 11), "float32"))
    np.testing.assert_allclose(result(metric), 11, rtol=1e-6)


@pytest.mark.parametrize("make, empty", [(Perplexity, 1.0), (TokenAccuracy, 0.0)])
def test_without_a_token_and_after_a_reset(batches, make, empty):
    metric = make()
    assert result(metric) == empty
    metric.update_state(*batches[0])
    assert result(metric) != empty
    metric.reset_state()
    metric.update_state(np.zeros((3, 3), "int32"), batches[0][1])
    assert result(metric) == empty


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 3)])
def test_weights_are_counts(batches, shape):
    labels, logits = batches[0]
    weights = np.random.default_rng(1).integers(0, 3, shape).astype("float32")
    metric = Perplexity()
    metric.update_state(labels, logits, sample_weight=weights)
    counts = np.broadcast_to(weights[:, None] if len(shape) == 1 else weights, labels.shape).astype(int)
    expected = np.exp(-np.repeat(log_likelihoods(labels, logits).ravel(), counts.ravel()).mean())
    np.testing.assert_allclose(result(metric), expected, rtol=1e-5)


def test_right_in_fit_and_evaluate():
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 9, (8, 6)).astype("int32")
    for row, length in zip(labels, [1, 6, 2, 0, 6, 6, 5, 6]):
        row[length:] = 0
    model = keras.Sequential([keras.Input((6,), dtype="int32"), keras.layers.Embedding(9, 8), keras.layers.Dense(9)])
    model.compile(keras.optimizers.SGD(0.0), SmoothedCrossEntropy(), metrics=[Perplexity(), TokenAccuracy()])
    history = model.fit(labels, labels, batch_size=4, verbose=0).history
    logits, real = ops.convert_to_numpy(model(labels)), labels != 0
    expected = {
        "perplexity": np.exp(-log_likelihoods(labels, logits)[real].mean()),
        "token_accuracy": (logits.argmax(-1) == labels)[real].mean(),
    }
    evaluated = model.evaluate(labels, labels, batch_size=4, verbose=0, return_dict=True)
    for name, value in expected.items():
        np.testing.assert_allclose([history[name][0], evaluated[name]], value, rtol=1e-5)


def test_mask_of_keras_counts_as_padding(batches):
    token_ids = np.array([[3, 4, 0], [1, 0, 0], [2, 2, 4]], "int32")
    inputs = keras.Input((3,), dtype="int32")
    model = keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Embedding(5, 4, mask_zero=True)(inputs)))
    model.compile("sgd", SmoothedCrossEntropy(), metrics=[Perplexity()])
    labels = batches[0][0]
    expected = np.exp(-log_likelihoods(labels, ops.convert_to_numpy(model(token_ids)))[token_ids != 0].mean())
    evaluated = model.evaluate(token_ids, labels, verbose=0, return_dict=True)
    np.testing.assert_allclose(evaluated["perplexity"], expected, rtol=1e-5)


@pytest.mark.parametrize("metric", [Perplexity(None, name="ppl"), TokenAccuracy(7)])
def test_metric_survives_serialization(metric):
    copy = keras.metrics.deserialize(keras.metrics.serialize(metric))
    assert type(copy) is type(metric) and copy.get_config() == metric.get_config()
    assert copy.pad_id == metric.pad_id


def test_error_rate_over_unequal_batches_is_that_of_the_whole():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(7, 3)).astype("float32"), rng.integers(0, 3, 7)
    metric = ErrorRate()
    for part in (slice(0, 5), slice(5, 7)):
        metric.update_state(labels[part], logits[part])
    assert result(metric) == pytest.approx((logits.argmax(-1) != labels).mean(), abs=1e-6)
    metric.reset_state()
    metric.update_state([1], [[0.0, 2.0, 1.0]])
    assert result(metric) == 0


def test_error_rate_is_better_when_it_is_lower():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(5.0), loss, metrics=[ErrorRate()])
    best = keras.callbacks.EarlyStopping("val_error_rate", patience=1, restore_best_weights=True)
    x, y = np.ones((4, 1)), np.zeros(4)
    history = model.fit(x, y, validation_data=(x, y), epochs=3, verbose=0, callbacks=[best]).history
    assert history["val_error_rate"][-1] == 0 and best.best == 0


@pytest.mark.parametrize("values, confidence, half", [  # of a printed table of Student's distribution
    ([1.0, 3.0], 0.95, 12.706), ([1.0, 2.0, 3.0], 0.95, 4.3027 / 3**0.5), ([1.0, 2.0, 3.0], 0.9, 2.9200 / 3**0.5),
    ([0.0] * 15 + [1.0] * 16, 0.99, 2.7500 * 0.508001 / 31**0.5),
])  # fmt: skip
def test_mean_interval(values, confidence, half):
    mean, low, high = mean_interval(values, confidence)
    assert mean == pytest.approx(np.mean(values))
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=1e-4)


def test_mean_interval_of_one_run_and_of_none():
    mean, low, high = mean_interval(iter([2]))
    assert mean == 2 and np.isnan([low, high]).all()
    for values in ([], [1, np.nan], [[1, 2]]):
        with pytest.raises(ValueError, match="values must be finite numbers, at least one; got"):
            mean_interval(values)
    with pytest.raises(ValueError, match="confidence must be between 0 and 1; got 95"):
        mean_interval([1, 2], 95)


def test_wrong_labels_are_named():
    with pytest.raises(ValueError, match=r"integer.* got float32"):
        Perplexity().update_state(np.ones((2, 3), "float32"), np.ones((2, 3, 4), "float32"))
    with pytest.raises(ValueError, match=r"labels \(2, 2\)"):
        TokenAccuracy().update_state(np.ones((2, 2), "int32"), np.ones((2, 3, 4), "float32"))


HYPOTHESES = ["The cat sat on the mat.", "A dog barks at the moon tonight."]


def test_bleu_of_the_references_is_100():
    result = bleu(HYPOTHESES, HYPOTHESES)
    np.testing.assert_allclose(result.score, 100)
    assert result.interval is None
    for part in ("nrefs:1", "case:mixed", "tok:13a", "version:"):
        assert part in result.signature


def test_bleu_by_hand():
    """4-gram precisions 5/6, 3/5, 2/4, 1/3 and no brevity penalty."""
    result = bleu(["a b c d x e"], ["a b c d e e"])
    np.testing.assert_allclose(result.score, 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, rtol=1e-6)


def test_bleu_takes_the_best_of_several_references():
    worse = ["Cats on mats sit there.", "The moon is barked at."]
    assert bleu(HYPOTHESES, list(zip(worse, HYPOTHESES))).score > bleu(HYPOTHESES, worse).score
    assert "nrefs:2" in bleu(HYPOTHESES, list(zip(worse, HYPOTHESES))).signature


def test_bleu_lowercase():
    upper = [text.upper() for text in HYPOTHESES]
    assert bleu(upper, HYPOTHESES).score < 50
    np.testing.assert_allclose(bleu(upper, HYPOTHESES, lowercase=True).score, 100)


def test_bleu_interval_holds_the_score():
    references = ["The cat sat on a mat.", "A dog barks at the moon tonight."]
    result = bleu(HYPOTHESES * 10, references * 10, bootstrap=200)
    low, high = result.interval
    assert low < result.score < high
    assert result == bleu(HYPOTHESES * 10, references * 10, bootstrap=200)
    assert f"[{low:.1f}, {high:.1f}]" in str(result)
    assert bleu(["a"], ["b"], bootstrap=10).interval == (0.0, 0.0)


@pytest.mark.parametrize(
    "hypotheses, references, match",
    [
        ([], [], "got 0 and 0"),
        (["a"], ["a", "b"], "got 1 and 2"),
        (["a", "b"], [["a"], ["b", "c"]], r"same number of references; got \[1, 2\]"),
        (["a"], [[]], r"got \[0\]"),
        (["a", 3], ["a", "b"], "entry 1"),
    ],
)
def test_bleu_names_what_is_wrong(hypotheses, references, match):
    with pytest.raises(ValueError, match=match):
        bleu(hypotheses, references)


def test_bleu_of_one_resample():
    with pytest.raises(ValueError, match="got 1"):
        bleu(["a"], ["a"], bootstrap=1)


LONGER = ["one two three four five", "one two three", "a b c d e f", "w x y z", "one two three four five six seven"]
SPOKEN = ["one two three four", "one too three", "a b c d x f", "w x y z", "one two three four five six seven"]


@pytest.mark.parametrize("as_lengths", [False, True])
def test_bleu_by_length_is_the_bleu_of_each_bin(as_lengths):
    sources = [5, np.int64(3), 6, 4, 7] if as_lengths else ["a  b c d e", "a b c", " x" * 6, "a b\tc d", "s " * 7]
    records = bleu_by_length(SPOKEN, LONGER, sources, bins=(4, 6))
    scores = [bleu([SPOKEN[i] for i in there], [LONGER[i] for i in there]).score for there in ([1, 3], [0, 2], [4])]
    assert records == [
        {"low": 0, "high": 4, "count": 2, "length": 3.5, "bleu": scores[0]},
        {"low": 5, "high": 6, "count": 2, "length": 5.5, "bleu": scores[1]},
        {"low": 7, "high": 7, "count": 1, "length": 7.0, "bleu": scores[2]},
    ]
    assert len({round(score) for score in scores}) == 3
    assert json.loads(json.dumps(records)) == records


def test_bleu_by_length_leaves_out_empty_bins_and_counts_every_sentence():
    sources = [0, 3, 12, 35, 80]
    records = bleu_by_length(SPOKEN, LONGER, sources)
    found = [(r["low"], r["high"], r["count"], r["length"]) for r in records]
    assert found == [(0, 10, 2, 1.5), (11, 20, 1, 12), (31, 40, 1, 35), (51, 80, 1, 80)]
    [record] = bleu_by_length(SPOKEN, LONGER, sources, bins=())
    assert record == {"low": 0, "high": 80, "count": 5, "length": 26.0, "bleu": bleu(SPOKEN, LONGER).score}
    [record] = bleu_by_length(["A B C D"], [["a b c d", "x"]], ["s"], lowercase=True, tokenize="none")
    np.testing.assert_allclose(record["bleu"], 100)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (([], [], []), "got 0, 0 and 0"),
        ((["a"], ["a"], ["a", "b"]), "a reference and a source for each; got 1, 1 and 2"),
        ((["a"], ["a", "b"], ["a"]), "got 1, 2 and 1"),
        ((["a", "b"], ["a", "b"], ["a", 1.5]), "str, or their lengths in words; entry 1 is 1.5"),
        ((["a"], ["a"], [-1]), "entry 0 is -1"),
        ((["a"], ["a"], [True]), "entry 0 is True"),
        ((["a"], ["a"], ["a"], (10, 10)), r"bins must be lengths that ascend; got \(10, 10\)"),
        ((["a"], ["a"], ["a"], (20, 10)), r"got \(20, 10\)"),
        ((["a"], ["a"], ["a"], (-1, 10)), r"got \(-1, 10\)"),
        (([3], ["a"], ["a"]), "must be str; entry 0"),
    ],
)
def test_bleu_by_length_names_what_is_wrong(arguments, match):
    with pytest.raises(ValueError, match=match):
        bleu_by_length(*arguments)

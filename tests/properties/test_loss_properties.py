"""What holds for losses, metrics and schedules, whatever the numbers, against their equations in float64."""

import keras
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from llmfound import training
from llmfound.kernels import token_cross_entropy
from llmfound.testing import assert_close

SHAPE = BATCH, LENGTH, VOCAB_SIZE = 3, 4, 5  # one, since JAX compiles for each

seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.0, 1.0, 30.0, 1e4])
smoothings = st.sampled_from([0.0, 0.1, 0.75])
pad_ids = st.sampled_from([None, 0, 3, -1, 99])  # a label, no label, or nothing
weightings = st.sampled_from([None, (BATCH,), (BATCH, LENGTH)])


def drawn(seed, scale, pad_id=None):
    """Logits and labels; some labels, perhaps all, are `pad_id`."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=SHAPE)).astype("float32") + 0  # no -0.0, which Keras sorts before 0.0
    labels = rng.integers(0, VOCAB_SIZE, SHAPE[:2])
    if pad_id is not None:
        labels[rng.random(SHAPE[:2]) < rng.choice([0, 0.5, 1])] = pad_id
    return logits, labels.astype("int32")


def drawn_weights(seed, shape):
    return None if shape is None else np.random.default_rng([seed, 1]).integers(0, 3, shape).astype("float32")


def log_softmax(logits):
    logits = logits.astype("float64") - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(logits, labels, on_label, elsewhere):
    """-sum_c q_c log p_c of every token, the distribution q written out; labels outside count as 0."""
    labels = np.where((labels >= 0) & (labels < VOCAB_SIZE), labels, 0)
    q = np.where(np.arange(VOCAB_SIZE) == labels[..., None], on_label, elsewhere)
    return -(q * log_softmax(logits)).sum(-1)


def is_real(labels, pad_id):
    return np.ones(labels.shape, bool) if pad_id is None else labels != pad_id


def full(weights):
    return 1.0 if weights is None else weights.reshape(BATCH, -1)


@given(seeds, scales, smoothings)
def test_token_cross_entropy(seed, scale, smoothing):
    logits, labels = drawn(seed, scale)
    expected = cross_entropy(logits, labels, 1 - smoothing + smoothing / VOCAB_SIZE, smoothing / VOCAB_SIZE)
    found = token_cross_entropy(ops.convert_to_tensor(logits), ops.convert_to_tensor(labels), smoothing)
    assert_close(found, expected, 1e-6 * max(1, scale))


@given(seeds, scales, smoothings, pad_ids, st.sampled_from(["uniform", "tensor2tensor"]), weightings)
def test_smoothed_cross_entropy_is_the_mean_over_real_tokens(seed, scale, smoothing, pad_id, form, weighting):
    logits, labels = drawn(seed, scale, pad_id)
    weights, real = drawn_weights(seed, weighting), is_real(labels, pad_id)
    others = VOCAB_SIZE if form == "uniform" else VOCAB_SIZE - 1
    on_label = 1 - smoothing + (smoothing / VOCAB_SIZE if form == "uniform" else 0)
    losses = cross_entropy(logits, labels, on_label, smoothing / others)
    if form == "tensor2tensor" and smoothing:
        losses += (1 - smoothing) * np.log(1 - smoothing) + smoothing * np.log(smoothing / others)
    expected = (losses * real * full(weights)).sum() / max(real.sum(), 1)
    loss = training.SmoothedCrossEntropy(smoothing, pad_id, form)
    assert_close(loss(labels, logits, weights), np.array(expected), 2e-6 * max(1, scale))
    if pad_id is not None:  # what is said about padding does not matter
        other = np.where(real[..., None], logits, drawn(seed + 1, scale)[0])
        assert_close(loss(labels, other, weights), loss(labels, logits, weights), 1e-6)


@given(seeds, st.sampled_from([0.0, 1.0, 5.0]), pad_ids, weightings, st.integers(1, 3))
def test_metrics_are_of_all_tokens_however_they_are_batched(seed, scale, pad_id, weighting, batches):
    perplexity, accuracy = training.Perplexity(pad_id), training.TokenAccuracy(pad_id)
    nll, right, count = 0.0, 0.0, 0.0
    for number in range(batches):
        logits, labels = drawn(seed + number, scale, pad_id)
        weights = drawn_weights(seed + number, weighting)
        for metric in (perplexity, accuracy):
            metric.update_state(labels, logits, weights)
        weight = is_real(labels, pad_id) * full(weights)
        nll += (cross_entropy(logits, labels, 1, 0) * weight).sum()
        right += ((logits.argmax(-1) == labels) * weight).sum()
        count += weight.sum()
    assert_close(perplexity.result(), np.array(np.exp(nll / max(count, 1))), 2e-5)
    assert_close(accuracy.result(), np.array(right / max(count, 1)), 1e-6)
    perplexity.reset_state()
    assert_close(perplexity.result(), np.array(1.0), 0)


# Schedules

steps = st.integers(0, 10**6)


@given(st.integers(1, 4096), st.integers(1, 20_000), st.floats(0.1, 10), steps)
def test_inverse_square_root(hidden_dim, warmup_steps, factor, step):
    schedule = training.InverseSquareRoot(hidden_dim, warmup_steps, factor)
    s = step + 1
    expected = factor * hidden_dim**-0.5 * min(s**-0.5, s * warmup_steps**-1.5)
    assert_close(rate(schedule, step) / schedule.peak, np.array(expected / schedule.peak), 1e-6)
    assert rate(schedule, step) <= schedule.peak * (1 + 1e-6)
    again = training.InverseSquareRoot.from_peak(schedule.peak, warmup_steps)
    assert_close(rate(again, step) / schedule.peak, np.array(expected / schedule.peak), 1e-6)


@given(st.floats(1e-6, 10), st.integers(0, 10_000), st.integers(1, 100_000), st.floats(0, 1), steps)
def test_linear_warmup_and_decay(peak, warmup_steps, decay_steps, fraction, step):
    total = max(warmup_steps, 1) + decay_steps
    schedule = training.LinearWarmupDecay(peak, warmup_steps, total, end=fraction * peak)
    s, w = step + 1, max(warmup_steps, 1)
    expected = s / w if s <= w else max(fraction, 1 + (fraction - 1) * (s - w) / (total - w))
    assert_close(rate(schedule, step) / peak, np.array(expected), 1e-5)
    config = keras.optimizers.schedules.serialize(schedule)
    assert rate(keras.optimizers.schedules.deserialize(config), step) == rate(schedule, step)


def rate(schedule, step):
    found = schedule(ops.convert_to_tensor(step, "int32"))
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    return ops.convert_to_numpy(found)

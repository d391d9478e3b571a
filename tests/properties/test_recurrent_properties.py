"""What holds for every recurrence, whatever the mask: positions that are masked might as well not be there."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from llmfound import layers, models
from llmfound.testing import assert_close

LENGTH, DIM, UNITS = 4, 3, 2
X = np.random.default_rng(0).normal(size=(1, LENGTH, DIM)).astype("float32")
STATE = np.random.default_rng(1).normal(size=(1, UNITS)).astype("float32")
LAYERS = {
    "LSTM": lambda: layers.LSTM(UNITS, return_sequences=True, return_state=True),
    "GRU": lambda: layers.GRU(UNITS, return_sequences=True, return_state=True),
    "the paper's": lambda: layers.GatedRecurrence(UNITS),
    "dl4mt's": lambda: layers.GatedRecurrence(UNITS, reset_after=True, update="old", use_recurrent_bias=True),
}
masks = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH).map(np.array)


@functools.cache
def made(name):
    layer = LAYERS[name]()
    layer(X)
    rng = np.random.default_rng(2)
    for weight in layer.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    return layer


def run(layer, x, mask=None):
    """h at every position, and the last states, from given first states."""
    if isinstance(layer, layers.GatedRecurrence):
        outputs, *last = layer(x, state=STATE, mask=mask)
    else:
        outputs, *last = layer(x, mask=mask, initial_state=[STATE, -STATE] if isinstance(layer, layers.LSTM) else STATE)
    return [ops.convert_to_numpy(y) for y in (outputs, *last)]


@pytest.mark.parametrize("name", LAYERS)
@given(mask=masks, garbage=st.floats(-1e6, 1e6, width=32))
def test_a_masked_position_is_as_good_as_none(name, mask, garbage):
    x = np.where(mask[None, :, None], X, np.float32(garbage))
    outputs, *last = run(made(name), x, mask[None])
    if not mask.any():
        np.testing.assert_array_equal(outputs, np.repeat(STATE[:, None], LENGTH, axis=1))
        return
    expected, *expected_last = run(made(name), x[:, mask])
    assert_close(outputs[:, mask], expected, 1e-5)
    assert_close(last, expected_last, 1e-5)
    before = np.concatenate([STATE[:, None], outputs], axis=1)
    np.testing.assert_array_equal(outputs[:, ~mask], before[:, :-1][:, ~mask])  # it stays exactly as it was


@functools.cache
def model(name):
    made = getattr(models, name)(9, 9, 3, 4)
    rng = np.random.default_rng(3)
    for weight in made.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    return made


@pytest.mark.parametrize("name", ["RNNsearch", "RNNencdec", "DL4MT"])
@given(words=st.lists(st.integers(1, 8), max_size=LENGTH), data=st.data())
def test_a_source_is_its_words_wherever_padding_stands(name, words, data):
    places = data.draw(st.permutations(range(LENGTH + 2)))[: len(words)]
    source = np.zeros((1, LENGTH + 2), "int32")
    source[0, sorted(places)] = words
    target = np.array([[1, 4, 5]], "int32")
    found = model(name).predict_on_batch({"source_ids": source, "target_ids": target})
    assert np.isfinite(found).all()
    flush = np.array([words + [0] * (LENGTH + 2 - len(words))], "int32")
    expected = model(name).predict_on_batch({"source_ids": flush, "target_ids": target})
    largest = np.abs(expected).max()  # some hundred, and a small logit is what large terms leave
    assert_close(found / largest, expected / largest, 1e-5)

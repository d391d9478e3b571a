"""Masks, sinusoids and gathering, against their definitions in NumPy and the numbers of the papers."""

import itertools
import math

import keras
import numpy as np
import pytest
from keras import ops

from llmfound.ops import attention_mask, causal_mask, gather_positions, padding_mask, sinusoids


def numpy(x):
    return ops.convert_to_numpy(x)


def is_bool(x):
    return keras.backend.standardize_dtype(x.dtype) == "bool"


# Masks


@pytest.mark.parametrize("pad_id", [0, 3])
def test_padding_mask_is_true_at_real_tokens(pad_id):
    token_ids = np.array([[3, 1, 0, 0], [0, 3, 3, 3]], "int32")
    mask = padding_mask(ops.convert_to_tensor(token_ids), pad_id)
    assert is_bool(mask)
    np.testing.assert_array_equal(numpy(mask), token_ids != pad_id)


@pytest.mark.parametrize("queries, keys", [(4, 4), (3, 4), (4, 3), (1, 4)])
def test_causal_mask(queries, keys):
    mask = causal_mask(queries, keys)
    assert is_bool(mask)
    expected = [[key <= query for key in range(keys)] for query in range(queries)]
    np.testing.assert_array_equal(numpy(mask), expected)


RANDOM = np.random.default_rng(0)
MASKS = {  # by rank: batch 2, heads 2, queries 3, keys 4
    None: None,
    2: RANDOM.random((2, 4)) < 0.6,
    3: RANDOM.random((2, 3, 4)) < 0.6,
    4: RANDOM.random((2, 2, 3, 4)) < 0.6,
}


def allowed(mask, causal, batch, head, query, key):
    """The definition, one entry at a time."""
    index = {None: (), 2: (batch, key), 3: (batch, query, key), 4: (batch, head, query, key)}
    seen = True if mask is None else mask[index[mask.ndim]]
    return seen and (key <= query or not causal)


@pytest.mark.parametrize("rank", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_mask(rank, causal):
    mask = attention_mask(MASKS[rank], causal, 3, 4)
    if rank is None and not causal:
        assert mask is None  # nothing to hide, and kernels are faster without a mask
        return
    assert is_bool(mask)
    shape = (2, 2, 3, 4)
    expected = [allowed(MASKS[rank], causal, *index) for index in itertools.product(*map(range, shape))]
    np.testing.assert_array_equal(np.broadcast_to(numpy(mask), shape), np.reshape(expected, shape))


def test_attention_mask_of_one_head_serves_all():
    mask = attention_mask(MASKS[4][:, :1], True, 3, 4)
    np.testing.assert_array_equal(numpy(mask)[:, 0], MASKS[4][:, 0] & np.tri(3, 4, dtype=bool))


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_attention_mask_of_numbers(dtype):
    mask = attention_mask(MASKS[2].astype(dtype))
    assert is_bool(mask)
    np.testing.assert_array_equal(numpy(mask)[:, 0, 0], MASKS[2])


@pytest.mark.parametrize("shape, said", [((4,), r"\(4,\)"), ((1, 2, 2, 3, 4), r"\(1, 2, 2, 3, 4\)")])
def test_attention_mask_of_another_rank(shape, said):
    message = r"An attention mask is \(batch, keys\), .* or \(batch, heads, queries, keys\); got shape " + said
    with pytest.raises(ValueError, match=message):
        attention_mask(np.ones(shape, bool))


# Sinusoids

INTERLEAVED = {  # [pos, column] of dim 512, computed with 50 digits
    (1, 0): 0.841470985, (1, 1): 0.540302306, (1, 2): 0.821856190, (1, 3): 0.569695009, (50, 100): 0.913046583,
    (50, 101): -0.407855290, (100, 511): 0.999946270, (511, 256): -0.921988678,
}  # fmt: skip
CONCATENATED = {
    (1, 1): 0.821778650, (1, 2): 0.801804926, (50, 100): 0.975729338, (511, 256): -0.471678874,
}  # fmt: skip
LAYOUTS = {"interleaved": INTERLEAVED, "concatenated": CONCATENATED}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinusoids_of_the_papers(layout):
    table = sinusoids(512, 512, layout)
    assert table.shape == (512, 512) and table.dtype == np.float32
    for index, value in LAYOUTS[layout].items():
        assert abs(table[index] - value) < 4e-8, index  # half a unit in the last place of a float32 near 1


def test_sinusoids_of_four_columns():
    interleaved = [
        [0, 1, 0, 1],
        [0.841470985, 0.540302306, 0.009999833, 0.999950000],
        [0.909297427, -0.416146837, 0.019998667, 0.999800007],
    ]
    np.testing.assert_allclose(sinusoids(3, 4), interleaved, atol=4e-8)
    concatenated = [0.841470985, 0.0001, 0.540302306, 0.999999995]
    np.testing.assert_allclose(sinusoids(3, 4, "concatenated")[1], concatenated, atol=4e-8)


def test_sinusoids_of_two_columns_are_one_wave_in_both_layouts():
    wave = [[math.sin(pos), math.cos(pos)] for pos in range(5)]
    for layout in LAYOUTS:
        np.testing.assert_allclose(sinusoids(5, 2, layout), wave, atol=4e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinusoids_are_computed_in_float64(layout):
    """At position 9999 an angle in float32 is off by up to 5e-4."""
    table, half = sinusoids(10_000, 64, layout), 32
    for k in range(half):
        exponent = k / half if layout == "interleaved" else k / (half - 1)
        angle = 9999 * 10000**-exponent
        sine, cosine = (2 * k, 2 * k + 1) if layout == "interleaved" else (k, half + k)
        assert table[9999, sine] == np.float32(math.sin(angle)), k
        assert table[9999, cosine] == np.float32(math.cos(angle)), k


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_position_has_the_same_norm_and_a_shift_is_a_rotation(layout):
    table = sinusoids(100, 16, layout).astype("float64")
    np.testing.assert_allclose((table**2).sum(-1), 8, rtol=1e-6)
    sine, cosine = (table[:, 0::2], table[:, 1::2]) if layout == "interleaved" else np.split(table, 2, axis=1)
    pairs = cosine + 1j * sine
    np.testing.assert_allclose(pairs[7:], pairs[:-7] * pairs[7], atol=1e-6)  # by the angle of 7 positions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinusoids_of_an_odd_width(layout):
    with pytest.raises(ValueError, match=r"even; got 5"):
        sinusoids(3, 5, layout)


def test_sinusoids_of_an_unknown_layout():
    with pytest.raises(ValueError, match=r"\"interleaved\" or \"concatenated\"; got 'rotary'"):
        sinusoids(3, 4, "rotary")


# Gathering


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_gather_positions(dtype):
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    positions = np.array([[4, 0, 0], [2, 1, 4]], dtype)
    rows = gather_positions(ops.convert_to_tensor(x), ops.convert_to_tensor(positions))
    np.testing.assert_array_equal(numpy(rows), np.stack([x[0, [4, 0, 0]], x[1, [2, 1, 4]]]))

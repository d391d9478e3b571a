"""Transformer blocks: the two placements of the norm, recomputed from their parts in NumPy, and what can be swapped."""

import keras
import numpy as np
import pytest
from keras import ops

from llmfound.layers import (
    FeedForward,
    MultiHeadAttention,
    MultiHeadSelfAttention,
    PostLNBlock,
    PreLNBlock,
    TransformerBlock,
)
from llmfound.testing import assert_close, check_layer, fixture

BATCH, LENGTH, MEMORY_LENGTH, DIM, MEMORY_DIM, HEADS, INNER = 2, 4, 5, 8, 6, 2, 16
SIZES = dict(hidden_dim=DIM, num_heads=HEADS, intermediate_dim=INNER)
X = fixture("x", (BATCH, LENGTH, DIM)).astype("float32")
MEMORY = fixture("memory", (BATCH, MEMORY_LENGTH, MEMORY_DIM)).astype("float32")
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
MEMORY_MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
BIAS = fixture("bias", (1, HEADS, LENGTH, LENGTH)).astype("float32")
BLOCKS = pytest.mark.parametrize("block_class", [PostLNBlock, PreLNBlock])
DECODER = dict(causal=True, cross_attention=True)


def numpy(x):
    return ops.convert_to_numpy(x)


def filled(block, *inputs):
    """The block, built by a call, with weights that anyone can compute again; no bias is 0 and no scale is 1."""
    block(*inputs)
    for weight in block.weights:
        name = "/".join(weight.path.split("/")[1:])
        weight.assign(fixture(name, tuple(weight.shape), norm_scale=name.endswith("gamma")))
    return block


def norm(x, part):
    gamma, beta = part.get_weights()
    x = x - x.mean(axis=-1, keepdims=True)
    return gamma * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + part.epsilon) + beta


def feedforward(x, part):
    w1, b1, w2, b2 = part.get_weights()
    return np.maximum(x @ w1 + b1, 0) @ w2 + b2


def post_ln(block, x, memory=None, **masks):
    """Xiong et al. 2020, table 1, left."""
    for attended, part in sublayers(block, memory, **masks):
        x = norm(x + attended(x), part)
    return x


def pre_ln(block, x, memory=None, **masks):
    """Xiong et al. 2020, table 1, right."""
    for attended, part in sublayers(block, memory, **masks):
        x = x + attended(norm(x, part))
    return x


def sublayers(block, memory, mask=None, memory_mask=None, bias=None):
    yield lambda y: numpy(block.attention(y, mask=mask, bias=bias)), block.attention_norm
    if memory is not None:
        yield lambda y: numpy(block.cross_attention(y, memory, mask=memory_mask)), block.cross_attention_norm
    yield lambda y: feedforward(y, block.feedforward), block.feedforward_norm


EQUATIONS = {PostLNBlock: post_ln, PreLNBlock: pre_ln}


@BLOCKS
@pytest.mark.parametrize(
    "options, memory, masks",
    [
        ({}, None, {}),
        ({}, None, dict(mask=MASK, bias=BIAS)),
        (dict(causal=True, use_bias=True), None, dict(mask=MASK)),
        (dict(cross_attention=True, head_dim=3), MEMORY, dict(memory_mask=MEMORY_MASK)),
        (DECODER, MEMORY, dict(mask=MASK, memory_mask=MEMORY_MASK, bias=BIAS)),
    ],
    ids=["self", "masked", "causal", "cross", "decoder"],
)
def test_the_equations(block_class, options, memory, masks):
    block = filled(block_class(**SIZES, **options), X, memory)
    assert block.attention.causal == options.get("causal", False)
    assert_close(block(X, memory, **masks), EQUATIONS[block_class](block, X, memory, **masks), 5e-6)


@BLOCKS
def test_the_mask_of_an_embedding_is_used_and_passed_on(block_class):
    class Asked(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.supports_masking = True

        def call(self, x, mask=None):
            return mask

    token_ids = np.array([[1, 2, 3, 0], [4, 3, 0, 0]], "int32")
    x = keras.layers.Embedding(5, DIM, mask_zero=True)(token_ids)
    block = filled(block_class(**SIZES), X)
    assert_close(block(x), block(numpy(x), mask=token_ids != 0), 5e-6)
    assert np.abs(numpy(block(x)) - numpy(block(numpy(x)))).max() > 1e-4
    np.testing.assert_array_equal(numpy(Asked()(block(x))), token_ids != 0)


@BLOCKS
@pytest.mark.parametrize("memory", [None, MEMORY])
def test_some_rows_with_the_others_as_context(block_class, memory):
    block = filled(block_class(**SIZES, cross_attention=memory is not None), X, memory)
    expected, weights = block(X, memory, mask=MASK, return_weights=True)
    rows = dict(context=X, context_mask=MASK)
    found, some = block(X[:, 2:0:-1], memory, return_weights=True, **rows)
    assert_close(found, numpy(expected)[:, 2:0:-1], 1e-6)
    for name, seen in weights.items():
        assert_close(some[name], numpy(seen)[:, :, 2:0:-1], 1e-6)
    assert_close(block(X[:, :1], memory, context=X), numpy(block(X, memory))[:, :1], 1e-6)
    given = [ops.convert_to_tensor(x) for x in (X[:, :1], X)]
    assert getattr(block(given[0], memory, context=given[1], context_mask=MASK), "_keras_mask", None) is None


def test_a_context_that_makes_no_sense():
    with pytest.raises(ValueError, match="attention is given context_mask without a context"):
        PostLNBlock(**SIZES)(X, context_mask=MASK)
    with pytest.raises(ValueError, match="is causal, and cannot tell which rows of the context x is"):
        PostLNBlock(**SIZES, causal=True)(X[:, :1], context=X)


class OddRows(FeedForward):
    """Reads its neighbours, too."""

    def call(self, x):
        return super().call(x + ops.roll(x, 1, axis=1))


@BLOCKS
def test_what_is_known_to_treat_rows_alike(block_class):
    class Variant(block_class):
        pass

    class OfOddRows(block_class):
        feedforward_class = OddRows

    assert block_class(**SIZES).row_by_row()
    for other in (block_class(**SIZES, causal=True), Variant(**SIZES), OfOddRows(**SIZES)):
        assert not other.row_by_row()
    block = block_class(**SIZES)
    block.feedforward = OddRows(DIM, INNER)
    assert not block.row_by_row()
    with pytest.raises(NotImplementedError, match=r"override read\(\)"):
        TransformerBlock(**SIZES).read(X, None)


@BLOCKS
@pytest.mark.parametrize("options, epsilon", [({}, 1e-6), (dict(epsilon=0.5), 0.5)])
def test_the_epsilon_of_the_norms(block_class, options, epsilon):
    block = filled(block_class(**SIZES, **options, cross_attention=True), X, MEMORY)
    norms = (block.attention_norm, block.cross_attention_norm, block.feedforward_norm)
    assert [n.epsilon for n in norms] == [epsilon] * 3
    assert_close(block(0.1 * X, MEMORY), EQUATIONS[block_class](block, 0.1 * X, MEMORY), 5e-6)


@BLOCKS
def test_return_weights(block_class):
    block = filled(block_class(**SIZES, **DECODER), X, MEMORY)
    masks = dict(mask=MASK, memory_mask=MEMORY_MASK)
    output, weights = block(X, MEMORY, **masks, return_weights=True)
    assert_close(output, block(X, MEMORY, **masks), 5e-6)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "self": (BATCH, HEADS, LENGTH, LENGTH), "cross": (BATCH, HEADS, LENGTH, MEMORY_LENGTH),
    }  # fmt: skip
    y = norm(X, block.attention_norm) if block_class is PreLNBlock else X
    assert_close(weights["self"], block.attention(y, mask=MASK, return_weights=True)[1], 5e-6)
    assert numpy(weights["cross"])[0, :, :, 3:].max() == 0  # what memory_mask hides
    assert set(filled(block_class(**SIZES), X)(X, return_weights=True)[1]) == {"self"}


@BLOCKS
def test_steps_equal_the_causal_call(block_class):
    """Of two beams of one sentence; those of several sentences are tested with the attention."""
    block = filled(block_class(**SIZES, **DECODER, use_bias=True), X, MEMORY)
    cache, keys = block.start(2, LENGTH + 1), block.cross_attention.remember(MEMORY[:1])
    assert [tuple(c.shape) for c in cache] == [(2, HEADS, LENGTH + 1, DIM // HEADS)] * 2
    outputs = []
    for position in range(LENGTH):
        row = ops.convert_to_tensor(X[:, position : position + 1])
        at = ops.convert_to_tensor(position, "int32")  # as in a compiled loop
        output, cache = block.step(row, cache, at, keys, MEMORY_MASK[:1])
        outputs.append(output)
    memory, mask = (np.repeat(array[:1], 2, axis=0) for array in (MEMORY, MEMORY_MASK))
    assert_close(ops.concatenate(outputs, axis=1), block(X, memory, memory_mask=mask), 5e-6)


class Gated(FeedForward):
    def call(self, x):
        return 2 * super().call(x) + 1


class Doubled(MultiHeadSelfAttention):
    def join(self, heads):
        return 2 * super().join(heads)


@pytest.mark.parametrize("part", [dict(feedforward_class=Gated), dict(attention_class=Doubled)])
def test_steps_of_a_variant_equal_its_causal_call(part):
    block = filled(type("Variant", (PreLNBlock,), part)(**SIZES, causal=True), X)
    cache, outputs = block.start(BATCH, LENGTH), []
    for position in range(LENGTH):
        output, cache = block.step(ops.convert_to_tensor(X[:, position : position + 1]), cache, position)
        outputs.append(output)
    assert_close(ops.concatenate(outputs, axis=1), block(X), 5e-6)


def test_the_cache_is_in_the_dtype_of_the_computation():
    block = PreLNBlock(**SIZES, causal=True, dtype="mixed_bfloat16")
    assert {keras.backend.standardize_dtype(c.dtype) for c in block.start(BATCH, LENGTH)} == {"bfloat16"}


@BLOCKS
def test_dropout_is_on_each_sublayer_before_the_addition(block_class):
    """With sub-layers that put out 1 and a norm that passes, each element of x gains 0 or 2, twice."""

    class Passing(keras.layers.Layer):
        def __init__(self, epsilon, **kwargs):
            super().__init__(**kwargs)

        def call(self, x):
            return x

    block = type("Block", (block_class,), {"norm_class": Passing})(**SIZES, dropout=0.5, use_bias=True)
    x = np.full((60 * BATCH, LENGTH, DIM), 7.0, "float32")
    block(x)
    block.set_weights([np.zeros(w.shape) for w in block.weights])
    for dense in (block.attention.merge, block.feedforward.contract):
        dense.bias.assign(np.ones(dense.bias.shape))
    np.testing.assert_array_equal(numpy(block(x)), 9)
    gains = numpy(block(x, training=True)) - 7
    found, counts = np.unique(gains, return_counts=True)
    np.testing.assert_array_equal(found, [0, 2, 4])
    np.testing.assert_allclose(counts / gains.size, [0.25, 0.5, 0.25], atol=0.04)  # 5 standard deviations


def test_dropout_of_attention_weights_is_another_rate():
    block = filled(PreLNBlock(**SIZES, attention_dropout=0.5, **DECODER), X, MEMORY)
    assert (block.dropout.rate, block.attention.dropout.rate, block.cross_attention.dropout.rate) == (0, 0.5, 0.5)
    expected = numpy(block(X, MEMORY))
    assert np.abs(numpy(block(X, MEMORY, training=True)) - expected).max() > 0.01
    assert_close(block(X, MEMORY), expected, tolerance=0)


def test_parts_are_swapped_by_naming_classes():
    class Attention(MultiHeadSelfAttention):
        pass

    class Cross(MultiHeadAttention):
        pass

    class Doubled(FeedForward):
        def call(self, x):
            return 2 * super().call(x)

    class Block(PreLNBlock):
        attention_class = Attention
        cross_attention_class = Cross
        feedforward_class = Doubled
        norm_class = keras.layers.RMSNormalization

    block = Block(**SIZES, cross_attention=True)
    assert (type(block.attention), type(block.cross_attention)) == (Attention, Cross)
    norms = (block.attention_norm, block.cross_attention_norm, block.feedforward_norm)
    assert {type(n) for n in norms} == {keras.layers.RMSNormalization}
    block(X, MEMORY)
    x = X + numpy(block.attention(block.attention_norm(X)))
    x = x + numpy(block.cross_attention(block.cross_attention_norm(x), MEMORY))
    y = numpy(block.feedforward_norm(x))
    assert_close(block(X, MEMORY), x + 2 * feedforward(y, block.feedforward), 5e-6)


def test_arguments_reach_the_parts():
    ones = keras.initializers.Ones()
    block = PreLNBlock(**SIZES, activation="gelu", kernel_initializer=ones, use_bias=True, head_dim=3, **DECODER)
    block(X, MEMORY)
    kernels = [w for w in block.weights if w.name == "kernel"]
    assert len(kernels) == 10 and all((numpy(w) == 1).all() for w in kernels)
    assert block.feedforward.expand.activation is keras.activations.gelu
    inner = 3 * HEADS
    assert block.attention.count_params() == 3 * (DIM * inner + inner) + inner * DIM + DIM
    assert (
        block.cross_attention.count_params()
        == DIM * inner + inner + 2 * (MEMORY_DIM * inner + inner) + inner * DIM + DIM
    )
    assert block.feedforward.count_params() == DIM * INNER + INNER + INNER * DIM + DIM


@BLOCKS
def test_published_counts_of_parameters(block_class):
    """4d^2 + 2df + f + d + 4d and 8d^2 + 2df + f + d + 6d: 3150336 and 4199936 in the base model."""
    d, f = DIM, INNER
    assert filled(block_class(**SIZES), X).count_params() == 4 * d * d + 2 * d * f + f + d + 4 * d
    assert filled(block_class(**SIZES, **DECODER), X, X).count_params() == 8 * d * d + 2 * d * f + f + d + 6 * d


def test_only_pre_ln_needs_a_final_norm():
    assert PreLNBlock.final_norm and not PostLNBlock.final_norm


def test_check_encoder_block():
    check_layer(
        lambda: PostLNBlock(**SIZES, dropout=0.1, attention_dropout=0.1), dict(x=X, mask=MASK), mask="mask",
        expected_shape=(BATCH, LENGTH, DIM),
    )  # fmt: skip


def test_check_decoder_block():
    check_layer(
        lambda: PreLNBlock(**SIZES, **DECODER), dict(x=X, memory=MEMORY, mask=MASK, memory_mask=MEMORY_MASK),
        mask="memory_mask", expected_shape=(BATCH, LENGTH, DIM),
    )  # fmt: skip


@BLOCKS
@pytest.mark.parametrize(
    "options, memory, message",
    [
        (DECODER, None, "decoder was built with cross_attention=True, but memory is missing"),
        ({}, MEMORY, r"decoder was built with cross_attention=False, but memory is given, of shape \(2, 5, 6\)"),
    ],
)
def test_a_memory_must_be_there_if_and_only_if_the_block_looks_at_one(block_class, options, memory, message):
    with pytest.raises(ValueError, match=message):
        block_class(**SIZES, **options, name="decoder")(X, memory)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(hidden_dim=10, num_heads=4), r"hidden_dim \(10\) must be divisible by num_heads \(4\); try 8 or 12"),
        (dict(intermediate_dim=0), "intermediate_dim must be positive; got 8 and 0"),
        (dict(dropout=-0.1), "at least 0 and below 1; got -0.1"),
        (dict(attention_dropout=1.5), "at least 0 and below 1; got 1.5"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        PreLNBlock(**{**SIZES, **options})


def test_a_block_must_say_where_its_norm_stands():
    class Sandwich(TransformerBlock):
        pass

    with pytest.raises(NotImplementedError, match=r"Sandwich must say where .* override residual\(\)"):
        Sandwich(**SIZES)(X)

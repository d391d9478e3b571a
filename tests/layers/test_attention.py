"""Attention layers against the papers' equations in NumPy, Keras's own layer and torch's."""

import keras
import numpy as np
import pytest
from keras import ops

from llmfound import kernels
from llmfound.layers import AdditiveAttention, MultiHeadAttention, MultiHeadSelfAttention
from llmfound.testing import assert_close, check_layer, fixture

BATCH, QUERIES, LENGTH, HEADS, DIM, MEMORY_DIM = 2, 4, 5, 2, 8, 6
QUERY = fixture("query", (BATCH, QUERIES, DIM)).astype("float32")
MEMORY = fixture("memory", (BATCH, LENGTH, MEMORY_DIM)).astype("float32")
PADDING = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)
QUERY_PADDING = np.array([[1, 1, 1, 0], [1, 0, 1, 1]], bool)
NOTHING = np.array([[0, 0, 0, 0, 0], [1, 0, 1, 1, 1]], bool)


def numpy(x):
    return ops.convert_to_numpy(x)


def filled(layer, *inputs):
    """The layer, built by a call, with weights that anyone can compute again; biases are not zero."""
    layer(*inputs)
    for weight in layer.weights:
        weight.assign(3 * fixture(name_of(weight), tuple(weight.shape)))
    return layer


def name_of(weight):
    return "/".join(weight.path.split("/")[-2:])


def weights_of(layer):
    return {name_of(weight): numpy(weight).astype("float64") for weight in layer.weights}


def softmax(scores, mask=None):
    scores = scores if mask is None else np.where(mask, scores, -1e30)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


# Additive attention


def additive(w, query, memory, mask=None):
    """Bahdanau et al. 2015, section 3.1, one score at a time."""
    v, context, weights = w["score/kernel"][:, 0], [], []
    for b in range(BATCH):
        scores = np.array(
            [[v @ np.tanh(q @ w["query/kernel"] + m @ w["key/kernel"]) for m in memory[b]] for q in query[b]]
        )
        weights.append(softmax(scores, None if mask is None else mask[b]))
        context.append(weights[-1] @ memory[b])
    return np.stack(context), np.stack(weights)


@pytest.mark.parametrize("mask", [None, PADDING], ids=["no mask", "padding"])
def test_additive_attention(mask):
    layer = filled(AdditiveAttention(7), QUERY, MEMORY)
    assert set(weights_of(layer)) == {"query/kernel", "key/kernel", "score/kernel"}  # no biases in the paper
    context, weights = layer(QUERY, MEMORY, mask=mask)
    assert_close((context, weights), additive(weights_of(layer), QUERY, MEMORY, mask), 1e-6)
    assert mask is None or numpy(weights)[~np.broadcast_to(mask[:, None], weights.shape)].max() == 0


def test_additive_attention_takes_keys_computed_before(monkeypatch):
    layer = filled(AdditiveAttention(7), QUERY, MEMORY)
    expected, keys = layer(QUERY, MEMORY, mask=PADDING), layer.project(MEMORY)
    assert_close(keys, MEMORY @ weights_of(layer)["key/kernel"], 1e-6)
    monkeypatch.setattr(layer, "project", None)  # so that it cannot compute them again
    assert_close(layer(QUERY, MEMORY, mask=PADDING, keys=keys), expected, tolerance=0)


def test_additive_attention_to_nothing_is_the_mean_of_the_memory():
    context, weights = filled(AdditiveAttention(7), QUERY, MEMORY)(QUERY, MEMORY, mask=NOTHING)
    np.testing.assert_allclose(numpy(weights)[0], 1 / LENGTH, rtol=1e-6)
    assert_close(context[0], np.repeat(MEMORY[:1].mean(1), QUERIES, axis=0), 1e-6)


def test_dropout_of_additive_attention_is_on_the_weights_it_uses_not_on_those_it_returns():
    layer = filled(AdditiveAttention(7, dropout=0.5), QUERY, MEMORY)
    expected, expected_weights = layer(QUERY, MEMORY)
    context, weights = layer(*draws(QUERY, MEMORY), training=True)
    assert_close(weights[:BATCH], expected_weights, 1e-6)
    assert_unbiased(numpy(context), numpy(expected))


def draws(*arrays):
    """Each batch a hundred times, one after the other: a call for each would take long."""
    return [np.tile(x, (100, 1, 1)) for x in arrays]


def assert_unbiased(outputs, expected):
    """Every number of `draws` varies, and its mean is as expected, within 5 standard deviations."""
    draws = outputs.reshape(100, *expected.shape)
    deviation = draws.std(axis=0)
    assert deviation.min() > 0.01
    assert (np.abs(draws.mean(axis=0) - expected) < 5 * deviation / len(draws) ** 0.5).all()


def test_check_additive_attention():
    check_layer(
        lambda: AdditiveAttention(7), dict(query=QUERY, memory=MEMORY, mask=PADDING), mask="mask",
        expected_shape=[(BATCH, QUERIES, MEMORY_DIM), (BATCH, QUERIES, LENGTH)],
    )  # fmt: skip


def test_additive_attention_in_bfloat16():
    layer = filled(AdditiveAttention(7, dtype="mixed_bfloat16"), QUERY, MEMORY)
    context, weights = layer(QUERY, MEMORY, mask=PADDING)
    assert (dtype_of(context), dtype_of(weights)) == ("bfloat16", "float32")
    np.testing.assert_allclose(numpy(weights).sum(-1), 1, atol=1e-6)
    exact = additive(weights_of(layer), QUERY, MEMORY, PADDING)
    assert_close((ops.cast(context, "float32"), weights), exact, 0.02)


@pytest.mark.parametrize("units", [0, -3])
def test_additive_attention_of_no_units(units):
    with pytest.raises(ValueError, match=f"units must be positive; got {units}"):
        AdditiveAttention(units)


@pytest.mark.parametrize(
    "query, memory, message",
    [
        (QUERY[0], MEMORY, r"query must be \(batch, length, dim\); got shape \(4, 8\)"),
        (QUERY, MEMORY[None], r"memory must be \(batch, length, dim\); got shape \(1, 2, 5, 6\)"),
    ],
)
@pytest.mark.parametrize("make", [lambda: AdditiveAttention(7), lambda: MultiHeadAttention(DIM, HEADS)])
def test_wrong_ranks(make, query, memory, message):
    with pytest.raises(ValueError, match=message):
        make()(query, memory)


# Multi-head attention


def multi_head(w, query, memory, heads, mask=None, bias=0.0, causal=False):
    """Vaswani et al. 2017, section 3.2.2, one head at a time; bias and mask (batch, heads, queries, length)."""
    shape = (len(query), heads, query.shape[1], memory.shape[1])
    bias, mask = np.broadcast_to(bias, shape), np.broadcast_to(True if mask is None else mask, shape)
    mask = mask & np.tri(*shape[2:], dtype=bool) if causal else mask
    q, k, v = (
        x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0)
        for name, x in [("query", query), ("key", memory), ("value", memory)]
    )
    d, outputs, weights = q.shape[-1] // heads, [], []
    for j in range(heads):
        q_j, k_j, v_j = (x[..., j * d : (j + 1) * d] for x in (q, k, v))
        weights.append(softmax(q_j @ k_j.swapaxes(1, 2) / np.sqrt(d) + bias[:, j], mask[:, j]))
        outputs.append(weights[-1] @ v_j)
    output = np.concatenate(outputs, axis=-1) @ w["output/kernel"] + w.get("output/bias", 0)
    return output, np.stack(weights, axis=1)


RANDOM = np.random.default_rng(0)
MASKS = {
    "none": (None, None),  # what the layer gets, and the same as (batch, heads, queries, length)
    "rank 2": (PADDING, PADDING[:, None, None]),
    "a row of nothing": (NOTHING, NOTHING[:, None, None]),
    "rank 3": (m := RANDOM.random((BATCH, QUERIES, LENGTH)) < 0.6, m[:, None]),
    "rank 4": (m := RANDOM.random((BATCH, HEADS, QUERIES, LENGTH)) < 0.6, m),
}
BIAS = 2 * fixture("bias", (1, HEADS, QUERIES, LENGTH)).astype("float32")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
def test_multi_head_attention(mask, causal, bias):
    layer = filled(MultiHeadAttention(DIM, HEADS, causal=causal), QUERY, MEMORY)
    given, full = MASKS[mask]
    expected = multi_head(weights_of(layer), QUERY, MEMORY, HEADS, full, 0.0 if bias is None else bias, causal)
    output = layer(QUERY, MEMORY, mask=given, bias=bias)
    assert_close(output, expected[0], 2e-6)
    assert_close(layer(QUERY, MEMORY, mask=given, bias=bias, return_weights=True), expected, 2e-6)


@pytest.mark.parametrize(
    "sizes, inner, output_dim", [(dict(hidden_dim=8), 8, 8), (dict(hidden_dim=4, head_dim=3), 6, 4)]
)
def test_sizes_and_biases_of_multi_head_attention(sizes, inner, output_dim):
    layer = filled(MultiHeadAttention(num_heads=HEADS, use_bias=True, **sizes), QUERY, MEMORY)
    matrices = DIM * inner + 2 * MEMORY_DIM * inner + inner * output_dim
    assert layer.count_params() == matrices + 3 * inner + output_dim
    assert MultiHeadAttention(num_heads=HEADS, **sizes).merge.use_bias is False
    assert_close(layer(QUERY, MEMORY), multi_head(weights_of(layer), QUERY, MEMORY, HEADS)[0], 2e-6)


def test_self_attention_is_attention_to_itself():
    layer = filled(MultiHeadSelfAttention(DIM, HEADS, causal=True, use_bias=True), QUERY)
    expected = multi_head(weights_of(layer), QUERY, QUERY, HEADS, QUERY_PADDING[:, None, None], causal=True)
    assert_close(layer(QUERY, mask=QUERY_PADDING), expected[0], 2e-6)
    assert_close(layer(QUERY, QUERY_PADDING, return_weights=True), expected, 2e-6)


def test_scores_are_divided_by_the_root_of_the_width():
    """q = k = 1 in 4 dimensions against k = 0: scores 2 and 0, not 4 and 0."""
    layer = MultiHeadAttention(4, 1)
    memory = np.stack([np.ones(4), np.zeros(4)])[None].astype("float32")
    layer(memory, memory)
    layer.set_weights([np.eye(4)] * 4)
    weights = layer(memory[:, :1], memory, return_weights=True)[1]
    assert_close(numpy(weights)[0, 0, 0], 1 / (1 + np.exp([-2.0, 2.0])))


def test_no_query_sees_what_causality_hides():
    layer = filled(MultiHeadSelfAttention(DIM, HEADS, causal=True), QUERY)
    changed = QUERY.copy()
    changed[:, 2:] += 1
    before, after = numpy(layer(QUERY)), numpy(layer(changed))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert np.abs(before[:, 2:] - after[:, 2:]).min(axis=(0, 2)).min() > 1e-4


@pytest.mark.parametrize("return_weights", [False, True])
def test_dropout_is_on_the_weights(return_weights):
    layer = filled(MultiHeadAttention(DIM, HEADS, dropout=0.5), QUERY, MEMORY)
    expected, expected_weights = layer(QUERY, MEMORY, return_weights=True)
    outputs = layer(*draws(QUERY, MEMORY), return_weights=return_weights, training=True)
    if return_weights:
        outputs, weights = outputs
        assert_close(weights[:BATCH], expected_weights, 1e-6)
    assert_unbiased(numpy(outputs), numpy(expected))


# Decoding


@pytest.mark.parametrize("compiled", [False, True], ids=["position is an int", "position is a tensor"])
def test_steps_with_a_cache_equal_the_causal_call(compiled):
    layer = filled(MultiHeadSelfAttention(DIM, HEADS, causal=True, use_bias=True), QUERY)
    full = layer(QUERY)
    cache = [ops.zeros((BATCH, HEADS, LENGTH, DIM // HEADS)) for _ in range(2)]
    for position in range(QUERIES):
        at = ops.convert_to_tensor(position, "int32") if compiled else position
        output, cache = layer.step(ops.convert_to_tensor(QUERY[:, position : position + 1]), cache, at)
        assert_close(output, full[:, position : position + 1], 2e-6, f"output at {position}")


def test_steps_in_bfloat16_equal_the_causal_call():
    layer = filled(MultiHeadSelfAttention(DIM, HEADS, causal=True, dtype="mixed_bfloat16"), QUERY)
    cache = [ops.zeros((BATCH, HEADS, QUERIES, DIM // HEADS), "bfloat16") for _ in range(2)]
    for position in range(2):
        row, at = ops.cast(QUERY[:, position : position + 1], "bfloat16"), ops.convert_to_tensor(position, "int32")
        output, cache = layer.step(row, cache, at)
    assert [dtype_of(x) for x in (output, *cache)] == ["bfloat16"] * 3
    assert_close(ops.cast(output, "float32"), ops.cast(layer(QUERY)[:, 1:2], "float32"), 0.02)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("mask", [None, PADDING], ids=["no mask", "padding"])
def test_beams_share_a_memory(beams, mask):
    layer = filled(MultiHeadAttention(DIM, HEADS, use_bias=True), QUERY, MEMORY)
    rows = fixture("rows", (BATCH * beams, 1, DIM)).astype("float32")
    repeated = [None if x is None else np.repeat(x, beams, axis=0) for x in (MEMORY, mask)]
    output = layer.step(ops.convert_to_tensor(rows), layer.remember(MEMORY), mask)
    assert_close(output, layer(rows, repeated[0], mask=repeated[1]), 2e-6)


# Parity


@pytest.mark.parametrize("use_bias, causal", [(False, False), (True, True)])
def test_parity_with_keras(use_bias, causal):
    ours = filled(MultiHeadAttention(DIM, HEADS, use_bias=use_bias, causal=causal), QUERY, MEMORY)
    theirs = keras.layers.MultiHeadAttention(HEADS, DIM // HEADS, use_bias=use_bias, output_shape=DIM)
    mask = RANDOM.random((BATCH, QUERIES, LENGTH)) < 0.7
    mask[..., 0] = True  # they have no answer for a row of nothing
    arrays = [QUERY, MEMORY, mask]
    inputs = [keras.Input(batch_shape=x.shape, dtype=x.dtype.name) for x in arrays]
    outputs = theirs(*inputs[:2], attention_mask=inputs[2], use_causal_mask=causal, return_attention_scores=True)
    model = keras.Model(inputs, list(outputs))
    arguments = [w for name in ("query", "key", "value", "merge") for w in getattr(ours, name).get_weights()]
    model.set_weights([w.reshape(their.shape) for w, their in zip(arguments, model.get_weights())])
    expected = model.predict_on_batch(arrays)
    assert_close(list(ours(QUERY, MEMORY, mask=mask, return_weights=True)), expected, 2e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the backend is not PyTorch")
@pytest.mark.parametrize("use_bias", [False, True])
def test_parity_with_torch(use_bias):
    import torch

    ours = filled(MultiHeadAttention(DIM, HEADS, use_bias=use_bias), QUERY, MEMORY)
    theirs = torch.nn.MultiheadAttention(
        DIM, HEADS, bias=use_bias, kdim=MEMORY_DIM, vdim=MEMORY_DIM, batch_first=True
    ).eval()
    w = {name: torch.tensor(x, dtype=torch.float32) for name, x in weights_of(ours).items()}
    state = {f"{name[0]}_proj_weight": w[f"{name}/kernel"].T for name in ("query", "key", "value")}
    state["out_proj.weight"] = w["output/kernel"].T
    if use_bias:
        state["in_proj_bias"] = torch.cat([w[f"{name}/bias"] for name in ("query", "key", "value")])
        state["out_proj.bias"] = w["output/bias"]
    theirs.load_state_dict(state)
    with torch.no_grad():
        expected = theirs(
            *map(torch.from_numpy, (QUERY, MEMORY, MEMORY)), key_padding_mask=torch.from_numpy(~PADDING),
            average_attn_weights=False,
        )  # fmt: skip
    assert_close(ours(QUERY, MEMORY, mask=PADDING, return_weights=True), expected, 2e-6)


# The rest


def test_check_multi_head_attention():
    check_layer(
        lambda: MultiHeadAttention(DIM, HEADS, dropout=0.1, use_bias=True),
        dict(query=QUERY, memory=MEMORY, mask=PADDING), mask="mask", expected_shape=(BATCH, QUERIES, DIM),
    )  # fmt: skip


def test_check_self_attention():
    check_layer(
        lambda: MultiHeadSelfAttention(DIM, HEADS, causal=True), dict(x=QUERY, mask=QUERY_PADDING), mask="mask",
        expected_shape=(BATCH, QUERIES, DIM),
    )  # fmt: skip


def test_multi_head_attention_in_bfloat16():
    layer = filled(MultiHeadAttention(DIM, HEADS, dtype="mixed_bfloat16"), QUERY, MEMORY)
    output = layer(QUERY, MEMORY, mask=NOTHING)
    output_again, weights = layer(QUERY, MEMORY, mask=NOTHING, return_weights=True)
    assert [dtype_of(x) for x in (output, output_again, weights)] == ["bfloat16", "bfloat16", "float32"]
    exact = multi_head(weights_of(layer), QUERY, MEMORY, HEADS, NOTHING[:, None, None])
    for found in (output, output_again):
        assert_close(ops.cast(found, "float32"), exact[0], 0.05)
    assert_close(weights, exact[1], 0.02)


def test_a_subclass_changes_attend_and_nothing_else():
    class Averaging(MultiHeadSelfAttention):
        def attend(self, query, key, value, mask=None, bias=None, training=None):
            shapes.update({tuple(x.shape) for x in (query, key, value)})
            return ops.repeat(ops.mean(value, axis=2, keepdims=True), query.shape[2], axis=2)

    shapes = set()
    layer = filled(Averaging(DIM, HEADS), QUERY)
    w = weights_of(layer)
    expected = np.repeat((QUERY @ w["value/kernel"] @ w["output/kernel"]).mean(axis=1, keepdims=True), QUERIES, axis=1)
    assert_close(layer(QUERY), expected, 2e-6)
    assert shapes == {(BATCH, HEADS, QUERIES, DIM // HEADS)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(hidden_dim=10, num_heads=3), r"hidden_dim \(10\) must be divisible by num_heads \(3\); try 9 or 12\."),
        (dict(hidden_dim=2, num_heads=3), r"hidden_dim \(2\) must be divisible by num_heads \(3\); try 3\."),
        (dict(hidden_dim=0, num_heads=3), "hidden_dim and num_heads must be positive; got 0 and 3"),
        (dict(hidden_dim=4, num_heads=-1), "hidden_dim and num_heads must be positive; got 4 and -1"),
        (dict(hidden_dim=4, num_heads=2, head_dim=0), "head_dim must be positive.* got 0"),
        (dict(hidden_dim=4, num_heads=2, dropout=1.0), "at least 0 and below 1; got 1.0"),
    ],
)
@pytest.mark.parametrize("layer_class", [MultiHeadAttention, MultiHeadSelfAttention])
def test_bad_sizes(layer_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_class(**arguments)


class Uniform(MultiHeadSelfAttention):
    def attend(self, query, key, value, mask=None, bias=None, training=None):
        return super().attend(0 * query, key, value, mask, bias, training)


class Squared(MultiHeadSelfAttention):
    def weights_of(self, query, key, mask=None, bias=None):
        weights = super().weights_of(query, key, mask, bias) ** 2
        return weights / ops.sum(weights, axis=-1, keepdims=True)


@pytest.mark.parametrize("layer_class", [Uniform, Squared])
def test_the_weights_of_a_variant_are_those_it_uses(layer_class):
    layer = filled(layer_class(DIM, HEADS), QUERY)
    output, weights = layer(QUERY, mask=QUERY_PADDING, return_weights=True)
    assert_close(output, layer(QUERY, mask=QUERY_PADDING), 2e-6)
    value = layer.split(layer.value(QUERY))
    assert_close(layer.join(ops.matmul(weights, value)), output, 2e-6)
    if layer_class is Uniform:
        expected = QUERY_PADDING / QUERY_PADDING.sum(1, keepdims=True)
        assert_close(weights, np.broadcast_to(expected[:, None, None], (BATCH, HEADS, QUERIES, QUERIES)), 1e-6)


def test_the_mask_that_comes_with_a_tensor():
    """Keras gives it by the name `mask` only to a call of one tensor."""
    ids = np.array([[1, 2, 3, 0, 0], [4, 3, 2, 1, 0]], "int32")
    masked, mask = keras.layers.Embedding(5, MEMORY_DIM, mask_zero=True)(ids), ids != 0
    additive_layer = filled(AdditiveAttention(3), QUERY, MEMORY)
    assert_close(additive_layer(QUERY, masked), additive_layer(QUERY, numpy(masked), mask=mask), 1e-6)
    layer = filled(MultiHeadAttention(DIM, HEADS), QUERY, MEMORY)
    assert_close(layer(QUERY, masked), layer(QUERY, numpy(masked), mask=mask), 1e-6)
    layer, bias = filled(MultiHeadSelfAttention(DIM, HEADS), MEMORY), np.zeros((1, 1, LENGTH, LENGTH), "float32")
    assert_close(layer(masked, bias=bias), layer(numpy(masked), mask=mask, bias=bias), 1e-6)
    assert np.abs(numpy(layer(masked, bias=bias)) - numpy(layer(numpy(masked)))).max() > 1e-3


def test_a_bias_may_forbid_and_so_may_a_mask():
    layer = filled(MultiHeadSelfAttention(DIM, HEADS), QUERY)
    mask = np.arange(QUERIES) < np.array([[QUERIES - 1], [QUERIES]])
    causal = np.tri(QUERIES, dtype=bool)
    found = layer(QUERY, mask=mask, bias=np.where(causal, 0, -np.inf).astype("float32"), return_weights=True)
    assert_close(found, layer(QUERY, mask=mask[:, None] & causal, return_weights=True), 1e-6)


def test_kernels_that_are_read_alone_are_not_quantized():
    layer = filled(AdditiveAttention(3), QUERY, MEMORY)
    before = layer(QUERY, MEMORY)
    for dense in (layer.query, layer.score):
        with pytest.raises(NotImplementedError, match="stays as it is, for its kernel is read without it"):
            dense.quantize("int8")
    assert_close(layer(QUERY, MEMORY), before, 0)


def test_heads_need_not_divide_the_width_if_theirs_is_given():
    assert MultiHeadAttention(10, 3, head_dim=4).head_dim == 4


def test_self_attention_of_another_rank():
    with pytest.raises(ValueError, match=r"must be \(batch, length, dim\); got shape \(4, 8\)"):
        MultiHeadSelfAttention(DIM, HEADS)(QUERY[0])


def test_a_missing_memory():
    for layer in (MultiHeadAttention(DIM, HEADS), AdditiveAttention(7)):
        with pytest.raises(TypeError, match="memory"):
            layer(QUERY)


def test_a_mask_of_another_rank_or_length():
    with pytest.raises(ValueError, match=r"An attention mask is .*; got shape \(5,\)"):
        MultiHeadAttention(DIM, HEADS)(QUERY, MEMORY, mask=PADDING[0])
    with pytest.raises(ValueError, match=r"A padding mask must be \(batch, 5\), as the memory is; got \(2, 1\)"):
        MultiHeadAttention(DIM, HEADS)(QUERY, MEMORY, mask=PADDING[:, :1])


def test_scaled_scores_of_unit_normals_have_unit_variance():
    """The reason for the factor 1 / sqrt(d_k). Source: Vaswani et al. 2017, section 3.2.1, footnote 4."""
    rng = np.random.default_rng(0)
    query, key = (ops.convert_to_tensor(rng.standard_normal((1, 1, n, 64)).astype("float32")) for n in (50, 2000))
    scores = np.log(numpy(kernels.attention_weights(query, key)))  # but for a constant of each query
    np.testing.assert_allclose(scores.var(axis=-1).mean(), 1, atol=0.1)
    products = numpy(query) @ numpy(key).swapaxes(-1, -2)
    np.testing.assert_allclose(products.var(axis=-1).mean(), 64, atol=6)

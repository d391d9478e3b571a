"""What holds for every layer, whatever the shape, the mask, the dtype and the numbers."""

import functools
import math

import keras
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from llmfound import layers
from llmfound.ops import masked_softmax
from llmfound.testing import assert_close

DIM, MEMORY_DIM, HIDDEN, HEADS, VOCAB_SIZE = 6, 4, 8, 2, 11
LARGE = BATCH, QUERIES, LENGTH = 2, 4, 3
SHAPES = [(1, 1, 1), LARGE]  # of batch, queries and length: few, since JAX compiles every operation for each
POLICIES = {"mixed_bfloat16": 0.06, "mixed_float16": 0.01}  # and their tolerance

shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.0, 0.1, 1.0, 5.0])
mask_ranks = st.sampled_from([None, 2, 3, 4])
mask_dtypes = st.sampled_from(["bool", "int32", "float32"])


@st.composite
def bits(draw, *shape):
    """bool arrays; those of nothing but False are among the simplest."""
    size = int(np.prod(shape))
    number = draw(st.integers(0, 2**size - 1))
    return np.array([number >> i & 1 for i in range(size)], bool).reshape(shape)


@st.composite
def masks(draw, batch, heads, queries, length, ranks=mask_ranks):
    """What a layer gets, of any dtype, and the same as bool (batch, heads, queries, length)."""
    rank = draw(ranks)
    if rank is None:
        return None, np.ones((batch, heads, queries, length), bool)
    shape = {2: (batch, length), 3: (batch, queries, length), 4: (batch, heads, queries, length)}[rank]
    mask = draw(bits(*shape))
    full = {2: mask[:, None, None], 3: mask[:, None] if rank == 3 else None, 4: mask}[rank]
    return mask.astype(draw(mask_dtypes)), np.broadcast_to(full, (batch, heads, queries, length))


def normal(seed, *shape, scale=1.0):
    return (scale * np.random.default_rng([seed, *shape]).normal(size=shape)).astype("float32")


def numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32") if "float" in keras.backend.standardize_dtype(x.dtype) else x)


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def filled(layer, *inputs):
    """The layer, built by a call, with random weights; biases are not zero."""
    layer(*inputs)
    rng = np.random.default_rng(7)
    for weight in layer.weights:
        noise = rng.normal(size=weight.shape)
        if "kernel" in weight.path:
            weight.assign(noise / weight.shape[0] ** 0.5)
        else:
            weight.assign(0.3 * noise + ("gamma" in weight.path))
    return layer


def weights_of(layer):
    """The weights as the layer computes with them, in float64, by the ends of their paths."""
    return {weight.path.split("/", 1)[1]: numpy(weight).astype("float64") for weight in layer.weights}


# Transcriptions in NumPy


def softmax(scores, mask):
    scores = np.where(mask, scores, -1e30)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense(w, name, x):
    return x @ w[f"{name}/kernel"] + w.get(f"{name}/bias", 0.0)


def multi_head(w, query, memory, heads, mask, bias=0.0, path=""):
    """Vaswani et al. 2017, section 3.2.2: output and weights; mask bool (batch, heads, queries, length)."""
    q, k, v = (dense(w, f"{path}{name}", x) for name, x in (("query", query), ("key", memory), ("value", memory)))
    q, k, v = (np.stack(np.split(x, heads, axis=-1), axis=1) for x in (q, k, v))
    weights = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + bias, mask)
    return dense(w, f"{path}output", np.concatenate(list((weights @ v).swapaxes(0, 1)), axis=-1)), weights


def layer_norm(w, name, x, epsilon):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)
    return x * w[f"{name}/gamma"] + w[f"{name}/beta"]


def block(w, x, memory, mask, memory_mask, bias, pre):
    """Xiong et al. 2020, table 1."""

    def sublayer(name, x, function):
        norm = functools.partial(layer_norm, w, f"{name}_norm", epsilon=1e-6)
        return x + function(norm(x)) if pre else norm(x + function(x))

    x = sublayer("attention", x, lambda y: multi_head(w, y, y, HEADS, mask, bias, "attention/")[0])
    if memory is not None:
        cross = lambda y: multi_head(w, y, memory, HEADS, memory_mask, path="cross_attention/")[0]  # noqa: E731
        x = sublayer("cross_attention", x, cross)
    expand = lambda y: np.maximum(dense(w, "feedforward/expand", y), 0)  # noqa: E731
    return sublayer("feedforward", x, lambda y: dense(w, "feedforward/contract", expand(y)))


def causal(mask, is_causal):
    return mask & np.tri(*mask.shape[2:], dtype=bool) if is_causal else mask


# Attention


@functools.cache
def attention(**arguments):
    layer = layers.MultiHeadAttention(HIDDEN, HEADS, **arguments)
    return filled(layer, zeros(1, 2, DIM), zeros(1, 2, MEMORY_DIM))


@functools.cache
def additive(**arguments):
    return filled(layers.AdditiveAttention(5, **arguments), zeros(1, 2, DIM), zeros(1, 2, MEMORY_DIM))


@functools.cache
def self_attention(name):
    layer = layers.MultiHeadSelfAttention(8, 4, use_bias=True, name=name)
    return filled(layer, zeros(1, 2, DIM))


@given(st.data(), shapes, seeds, scales, st.booleans(), st.booleans())
def test_multi_head_attention_is_its_equation(data, shape, seed, scale, is_causal, use_bias):
    batch, queries, length = shape
    layer = attention(causal=is_causal, use_bias=use_bias, head_dim=3 if use_bias else None)
    query, memory = normal(seed, batch, queries, DIM, scale=scale), normal(seed, batch, length, MEMORY_DIM, scale=scale)
    given_mask, mask = data.draw(masks(batch, HEADS, queries, length))
    bias_shape = data.draw(st.sampled_from([None, (1, HEADS, queries, length), (batch, 1, 1, length)]))
    bias = None if bias_shape is None else normal(seed, *bias_shape, scale=3)
    expected = multi_head(
        weights_of(layer), query, memory, HEADS, causal(mask, is_causal), 0.0 if bias is None else bias
    )
    output, weights = layer(query, memory, mask=given_mask, bias=bias, return_weights=True)
    tolerance = 1e-5 * max(1, scale) ** 2
    assert_close((output, weights), expected, tolerance)
    assert_close(layer(query, memory, mask=given_mask, bias=bias), expected[0], tolerance)
    assert_close(numpy(weights).sum(-1), np.ones((batch, HEADS, queries)), 1e-6)
    visible = causal(mask, is_causal)
    hidden = ~visible & visible.any(-1, keepdims=True)
    assert not numpy(weights)[hidden].any()


@given(st.data(), shapes, seeds, scales)
def test_additive_attention_is_its_equation_with_and_without_keys(data, shape, seed, scale):
    batch, queries, length = shape
    layer = additive()
    query, memory = normal(seed, batch, queries, DIM, scale=scale), normal(seed, batch, length, MEMORY_DIM, scale=scale)
    given_mask, mask = data.draw(masks(batch, 1, queries, length, ranks=st.sampled_from([None, 2])))
    given_mask = None if given_mask is None else given_mask.astype(bool)
    w = weights_of(layer)
    hidden = np.tanh(dense(w, "query", query)[:, :, None] + dense(w, "key", memory)[:, None])
    expected = softmax(dense(w, "score", hidden)[..., 0], mask[:, 0])
    found = layer(query, memory, mask=given_mask)
    assert_close(found, (expected @ memory, expected), 1e-5 * max(1, scale))
    assert_close(layer(query, memory, mask=given_mask, keys=layer.project(memory)), found, 0)


@given(st.data(), st.sampled_from(["multi-head", "additive"]), seeds, st.sampled_from([-1e30, 1e3, 1e30]))
def test_what_stands_at_masked_positions_does_not_matter(data, kind, seed, huge):
    batch, queries, length = LARGE
    layer = attention() if kind == "multi-head" else additive()
    query, memory = normal(seed, batch, queries, DIM), normal(seed, batch, length, MEMORY_DIM)
    mask = data.draw(bits(batch, length)) | (np.arange(length) == data.draw(st.integers(0, length - 1)))
    changed = np.where(mask[..., None], memory, np.float32(huge))
    assert_close(layer(query, changed, mask=mask), layer(query, memory, mask=mask), 1e-6)


@given(st.data(), seeds, st.booleans())
def test_the_order_of_sentences_and_of_memory_positions_does_not_matter(data, seed, is_additive):
    batch, queries, length = LARGE
    layer = additive() if is_additive else attention()
    query, memory = normal(seed, batch, queries, DIM), normal(seed, batch, length, MEMORY_DIM)
    mask = data.draw(bits(batch, length))
    rows, places = data.draw(st.permutations(range(batch))), data.draw(st.permutations(range(length)))
    options = {} if is_additive else dict(return_weights=True)
    output, weights = map(numpy, layer(query, memory, mask=mask, **options))
    found = layer(query[rows], memory[rows][:, places], mask=mask[rows][:, places], **options)
    assert_close(found, (output[rows], weights[rows][..., places]), 1e-5)


@given(st.permutations(range(4)), seeds)
def test_the_order_of_heads_does_not_matter(order, seed):
    layer, permuted = self_attention("layer"), self_attention("permuted")
    columns = np.arange(8).reshape(4, 2)[order].ravel()
    for name in ("query", "key", "value"):
        for old, new in zip(getattr(layer, name).weights, getattr(permuted, name).weights):
            new.assign(numpy(old)[..., columns])
    permuted.merge.kernel.assign(numpy(layer.merge.kernel)[columns])
    permuted.merge.bias.assign(layer.merge.bias)
    x = normal(seed, BATCH, QUERIES, DIM)
    output, weights = layer(x, return_weights=True)
    assert_close(permuted(x, return_weights=True), (numpy(output), numpy(weights)[:, order]), 1e-5)


@given(st.data(), shapes, seeds, st.sampled_from([1.0, 1e3, 1e20]), st.booleans())
def test_masked_softmax_gives_distributions(data, shape, seed, scale, in_half):
    batch, _, length = shape
    scores = normal(seed, batch, length, scale=1e4 if in_half and scale > 1 else scale)
    mask = data.draw(bits(batch, length))
    scores = ops.cast(scores, "float16") if in_half else scores
    weights = masked_softmax(scores, mask)
    assert dtype_of(weights) == "float32"
    assert_close(weights, softmax(numpy(ops.convert_to_tensor(scores)).astype("float64"), mask), 1e-5)
    assert_close(masked_softmax(scores), softmax(numpy(ops.convert_to_tensor(scores)).astype("float64"), True), 1e-5)


# Blocks


@functools.cache
def blocks(name, is_causal, cross_attention, dtype="float32"):
    layer = getattr(layers, name)(
        HIDDEN, HEADS, intermediate_dim=5, dropout=0.5, attention_dropout=0.5, causal=is_causal,
        cross_attention=cross_attention, use_bias=True, dtype=dtype,
    )  # fmt: skip
    return filled(layer, zeros(1, 2, HIDDEN), *[zeros(1, 2, MEMORY_DIM)] * cross_attention)


block_names = st.sampled_from(["PreLNBlock", "PostLNBlock"])


@given(st.data(), block_names, shapes, seeds, st.booleans(), st.booleans())
def test_blocks_are_their_equations(data, name, shape, seed, is_causal, cross_attention):
    batch, length, memory_length = shape
    layer = blocks(name, is_causal, cross_attention)
    x = normal(seed, batch, length, HIDDEN)
    memory = normal(seed, batch, memory_length, MEMORY_DIM) if cross_attention else None
    given_mask, mask = data.draw(masks(batch, HEADS, length, length))
    given_memory_mask, memory_mask = data.draw(masks(batch, HEADS, length, memory_length))
    bias = data.draw(st.none() | st.just(normal(seed, 1, HEADS, length, length)))
    if not cross_attention:
        given_memory_mask = None
    expected = block(
        weights_of(layer), x, memory, causal(mask, is_causal), memory_mask, 0.0 if bias is None else bias,
        pre=name == "PreLNBlock",
    )  # fmt: skip
    found = layer(x, memory, mask=given_mask, memory_mask=given_memory_mask, bias=bias)
    assert_close(found, expected, 5e-5)
    with_weights, weights = layer(
        x, memory, mask=given_mask, memory_mask=given_memory_mask, bias=bias, return_weights=True
    )
    assert_close(with_weights, expected, 5e-5)
    assert set(weights) == {"self", "cross"} if cross_attention else {"self"}
    for x in weights.values():
        assert_close(numpy(x).sum(-1), np.ones(x.shape[:-1]), 1e-6)


@given(st.data(), block_names, seeds, st.integers(0, 3), st.sampled_from([1.0, 1e3]), st.booleans())
def test_later_tokens_never_move_earlier_outputs(data, name, seed, kept, scale, cross_attention):
    batch, length, memory_length = LARGE
    layer, x = blocks(name, True, cross_attention), normal(seed, batch, length, HIDDEN)
    memory = normal(seed, batch, memory_length, MEMORY_DIM) if cross_attention else None
    mask, _ = data.draw(masks(batch, HEADS, length, length))
    changed = x.copy()
    changed[:, kept:] = normal(seed + 1, batch, length, HIDDEN, scale=scale)[:, kept:]
    before, after = (numpy(layer(y, memory, mask=mask)) for y in (x, changed))
    # a row that may look nowhere reads the mean of all positions, later ones included
    sees = np.ones((batch, length), bool) if mask is None else may_look(mask, batch, length)
    early = sees & (np.arange(length) < kept)
    assert_close(after[early], before[early], 1e-6)


def may_look(mask, batch, length):
    """bool (batch, length): positions whose causal mask leaves something, in every head."""
    mask = mask.astype(bool).reshape(batch, -1, length if mask.ndim > 2 else 1, length)
    return (mask & np.tri(length, dtype=bool)).any(-1).all(1)


@given(
    block_names,
    seeds,
    st.lists(st.sampled_from([1, 3, 4]), min_size=BATCH, max_size=BATCH),
    st.sampled_from([1.0, 1e6]),
)
def test_padding_moves_nothing_at_real_positions(name, seed, lengths, scale):
    layer = blocks(name, False, False)
    x, real = normal(seed, BATCH, QUERIES, HIDDEN), np.arange(QUERIES) < np.array(lengths)[:, None]
    changed = np.where(real[..., None], x, normal(seed + 1, BATCH, QUERIES, HIDDEN, scale=scale))
    before, after = (numpy(layer(y, mask=real)) for y in (x, changed))
    assert_close(after[real], before[real], 1e-5)
    for row, length in enumerate(lengths):
        assert_close(layer(x[row : row + 1, :length])[0], before[row, :length], 1e-5)


# The small layers


@functools.cache
def feed_forward():
    return filled(layers.FeedForward(3, 7), zeros(1, 2, DIM))


@given(shapes, seeds, st.sampled_from([2, 3, 4]), scales)
def test_feed_forward_is_the_same_at_every_position(shape, seed, rank, scale):
    layer, x = feed_forward(), normal(seed, *{2: shape[:1], 3: shape[:2], 4: shape}[rank], DIM, scale=scale)
    w = weights_of(layer)
    expected = dense(w, "contract", np.maximum(dense(w, "expand", x), 0))
    assert_close(layer(x), expected, 1e-5 * max(1, scale))


def positions(length, dim, layout):
    """Vaswani et al. 2017, section 3.5, one number at a time; and the authors' code."""
    table = np.empty((length, dim))
    for place in range(length):
        for i in range(dim // 2):
            exponent = 2 * i / dim if layout == "interleaved" else i / max(dim // 2 - 1, 1)
            sine, cosine = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, dim // 2 + i)
            angle = place / 10000**exponent
            table[place, sine], table[place, cosine] = np.sin(angle), np.cos(angle)
    return table


@given(
    shapes, seeds, st.integers(0, 12), st.sampled_from([2, 4, 6]), st.sampled_from(["interleaved", "concatenated"]),
    st.sampled_from(["int", "tensor"]), st.sampled_from(sorted(POLICIES)),
)  # fmt: skip
def test_positions_from_a_start_are_a_slice_of_all(shape, seed, start, dim, layout, kind, policy):
    batch, length, _ = shape
    layer = layers.PositionalEncoding(16, layout, dtype=policy)
    x = normal(seed, batch, length, dim)
    expected = x + positions(16, dim, layout)[start : start + length]
    given_start = start if kind == "int" else ops.convert_to_tensor(start, "int32")
    found = layer(x, start=given_start)
    assert dtype_of(found) == layer.compute_dtype
    assert_close(numpy(found), expected, POLICIES[policy])
    if start == 0:
        assert_close(layer(x), found, 0)


erf = np.vectorize(math.erf)


@functools.cache
def head():
    layer = layers.MaskedLMHead(VOCAB_SIZE, HIDDEN)
    return filled(layer, zeros(1, 2, DIM), zeros(1, 1, dtype="int32"), zeros(VOCAB_SIZE, HIDDEN))


@given(st.data(), shapes, seeds)
def test_masked_lm_head_is_the_dense_computation_gathered(data, shape, seed):
    batch, length, count = shape
    layer, x, embeddings = head(), normal(seed, batch, length, DIM), normal(seed, VOCAB_SIZE, HIDDEN)
    places = st.lists(st.integers(0, length - 1), min_size=count, max_size=count)
    where = np.array([data.draw(places) for _ in range(batch)], data.draw(st.sampled_from(["int32", "int64"])))
    w = weights_of(layer)
    hidden = dense(w, "dense", x)
    hidden = layer_norm(w, "norm", hidden * (1 + erf(hidden / 2**0.5)) / 2, 1e-12)
    expected = np.stack([row[chosen] for row, chosen in zip(hidden @ embeddings.T + w["bias"], where)])
    logits = layer(x, where, embeddings)
    assert dtype_of(logits) == "float32"
    assert_close(logits, expected, 2e-4)


@given(seeds, st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.sampled_from([(4096,), (4, 32, 32)]),
       st.sampled_from(["float32", "bfloat16"]))  # fmt: skip
def test_dropout_keeps_the_expectation(seed, rate, shape, dtype):
    layer = layers.Dropout(rate, seed=seed % 2**31, dtype=dtype)
    found = numpy(layer(np.ones(shape, "float32"), training=True))
    kept = (found != 0).sum()
    assert abs(kept - 4096 * (1 - rate)) <= 6 * (4096 * rate * (1 - rate)) ** 0.5
    assert_close(found[found != 0], np.full(kept, 1 / (1 - rate)), 1e-4 if dtype == "float32" else 0.01)
    again = layers.Dropout(rate, seed=seed % 2**31, dtype=dtype)
    np.testing.assert_array_equal(numpy(again(np.ones(shape, "float32"), training=True)), found)
    np.testing.assert_array_equal(numpy(layer(np.full(shape, 3.0, "float32"))), np.full(shape, 3.0))


@given(seeds, st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from(["float32", "bfloat16"]))
def test_variational_dropout_drops_features_of_a_row_at_all_its_positions(seed, rate, dtype):
    layer = layers.VariationalDropout(rate, seed=seed % 2**31, dtype=dtype)
    x = normal(seed, 8, 5, 512) + 10  # none of them is 0
    found = numpy(layer(x, training=True))
    scale = found / numpy(ops.cast(x, dtype))
    kept = scale[:, :1] != 0
    assert_close(scale, np.broadcast_to(kept / (1 - rate), x.shape), 1e-4 if dtype == "float32" else 0.02)
    assert abs(kept.sum() - 4096 * (1 - rate)) <= 6 * (4096 * rate * (1 - rate)) ** 0.5
    assert (kept[0] != kept[1]).any()
    np.testing.assert_array_equal(numpy(layer(x)), numpy(ops.cast(x, dtype)))


@given(seeds, st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from(["float32", "bfloat16"]))
def test_embedding_dropout_drops_a_word_wherever_it_stands(seed, rate, dtype):
    layer = layers.EmbeddingDropout(4096, rate, seed=seed % 2**31, dtype=dtype)
    ids = np.random.default_rng(seed).permutation(4096).reshape(2, 2048).astype("int32")
    ids = np.concatenate([ids, ids[::-1]], axis=1)  # every word once in either row
    found = numpy(layer(np.ones((2, 4096, 2), "float32"), ids, training=True))
    of_word = np.zeros(4096, "float32")
    of_word[ids] = found[..., 0]
    np.testing.assert_array_equal(found, np.stack([of_word[ids]] * 2, axis=-1))
    kept = (of_word != 0).sum()
    assert abs(kept - 4096 * (1 - rate)) <= 6 * (4096 * rate * (1 - rate)) ** 0.5
    assert_close(of_word[of_word != 0], np.full(kept, 1 / (1 - rate)), 1e-4 if dtype == "float32" else 0.01)


# Dtypes


@given(
    st.data(), st.sampled_from(sorted(POLICIES)), st.sampled_from(["float16", "bfloat16", "float32"]), seeds,
    st.sampled_from(["AdditiveAttention", "PreLNBlock", "PostLNBlock"]),
)  # fmt: skip
def test_every_policy_takes_every_float_and_stays_near_float32(data, policy, given_dtype, seed, name):
    batch, queries, length = LARGE
    make = additive if name == "AdditiveAttention" else functools.partial(blocks, name, False, True)
    query = normal(seed, batch, queries, HIDDEN if "Block" in name else DIM)
    memory, mask = normal(seed, batch, length, MEMORY_DIM), data.draw(bits(batch, length))
    options = dict(memory_mask=mask) if "Block" in name else dict(mask=mask)
    if name != "AdditiveAttention":
        options["return_weights"] = True
    expected, expected_weights = make()(query, memory, **options)
    output, weights = make(dtype=policy)(*(ops.cast(x, given_dtype) for x in (query, memory)), **options)
    assert dtype_of(output) == keras.dtype_policies.get(policy).compute_dtype
    assert {dtype_of(x) for x in keras.tree.flatten(weights)} == {"float32"}
    tolerance = max(POLICIES[policy], POLICIES[f"mixed_{given_dtype}"] if given_dtype != "float32" else 0)
    assert_close(numpy(output), numpy(expected), tolerance)
    assert_close(weights, expected_weights, tolerance)

"""PositionalEncoding, FeedForward, Dropout and MaskedLMHead, against their equations in NumPy."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from llmfound.layers import (
    Dense,
    Dropout,
    Embedding,
    FeedForward,
    FirstTokenPooler,
    MaskedLMHead,
    MultiHeadSelfAttention,
    PositionalEncoding,
    PositionEmbedding,
)
from llmfound.ops import sinusoids
from llmfound.testing import assert_close, check_layer, fixture

X = fixture("x", (2, 4, 8)).astype("float32")


def numpy(x):
    return ops.convert_to_numpy(x)


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


def filled(layer, *inputs):
    """The layer, built by a call, with weights that anyone can compute again; biases are not zero."""
    layer(*inputs)
    for weight in layer.weights:
        name = "/".join(weight.path.split("/")[1:])
        weight.assign(fixture(name, tuple(weight.shape), norm_scale=name.endswith("gamma")))
    return layer


class Asked(keras.layers.Layer):
    """Returns the mask that it was handed implicitly."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, x, mask=None):
        return mask


@pytest.mark.parametrize("layer", [Dropout(0.5), PositionalEncoding(4), FeedForward(8, 16)], ids=lambda x: x.name)
def test_the_mask_of_an_embedding_is_passed_on(layer):
    token_ids = np.array([[1, 2, 0, 0], [4, 3, 2, 0]], "int32")
    x = keras.layers.Embedding(5, 8, mask_zero=True)(token_ids)
    np.testing.assert_array_equal(numpy(Asked()(layer(x))), token_ids != 0)


# Dense


def test_dense_is_keras_dense_also_after_lora_and_quantization(weights_go_quickly):
    x, layer, other = fixture("x", (2, 3, 4)), Dense(5, "gelu"), keras.layers.Dense(5, "gelu")
    for one in (layer, other):
        one.build((None, 3, 4))
    other.set_weights(layer.get_weights())
    assert_close(layer(x), other(x), 1e-6)
    for one in (layer, other):
        one.enable_lora(2)
        one.lora_kernel_b.assign(np.ones((2, 5)))
    other.lora_kernel_a.assign(layer.lora_kernel_a)
    assert_close(layer(x), other(x), 1e-6)
    for one in (layer, other):
        one.quantize("int8")
    assert_close(layer(x), other(x), 1e-6)


def test_check_dense():
    check_layer(lambda: Dense(5, "gelu"), {"inputs": fixture("x", (2, 3, 4))}, expected_shape=(2, 3, 5))


# Embedding


def test_an_embedding_trains_as_the_product_with_one_hot_vectors():
    """Adam and a clipped norm: on TensorFlow, Keras's own gives other weights where an id is repeated."""
    ids = np.array([[1, 1, 2, 3], [1, 2, 2, 5]], "int32")
    table, target, found = fixture("table", (6, 3)), fixture("target", (2, 4, 3)), []
    for first, x in ((Embedding(6, 3), ids), (keras.layers.Dense(3, use_bias=False), np.eye(6)[ids])):
        model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), first])
        model.set_weights([table])
        model.compile(keras.optimizers.Adam(0.01, global_clipnorm=0.1), "mse")
        for _ in range(3):
            model.train_on_batch(x, target)
        found.append(model.get_weights())
    assert_close(found[0], found[1], 1e-6)


def test_check_embedding():
    check_layer(lambda: Embedding(6, 3), {"inputs": np.array([[1, 1, 2, 3], [1, 2, 2, 5]], "int32")},
                expected_shape=(2, 4, 3))  # fmt: skip


# Positions


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_positional_encoding_is_added(layout):
    layer = PositionalEncoding(16, layout)
    assert_close(layer(X), X + sinusoids(4, 8, layout), tolerance=0)
    assert not layer.weights


def test_the_layout_of_the_paper_is_the_default():
    assert_close(PositionalEncoding()(0 * X[:1, :2])[0, 1, :2], np.array([math.sin(1), math.cos(1)]), 1e-7)


@pytest.mark.parametrize("tensor", [False, True], ids=["start is an int", "start is a tensor"])
def test_positional_encoding_from_a_start(tensor):
    layer = PositionalEncoding(7)
    start = ops.convert_to_tensor(3, "int32") if tensor else 3
    assert_close(layer(X, start=start), X + sinusoids(7, 8)[3:7], tolerance=0)
    assert_close(layer(X[:, :1], start=start), X[:, :1] + sinusoids(7, 8)[3], tolerance=0)
    assert_close(layer(X, start=0 * start), layer(X), tolerance=0)


def test_check_positional_encoding():
    check_layer(lambda: PositionalEncoding(4, "concatenated"), (X,), expected_shape=X.shape)


def test_positions_of_any_length_in_a_functional_model():
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, PositionalEncoding(16)(inputs))
    for length in (2, 4):
        assert_close(model.predict(X[:, :length], verbose=0), X[:, :length] + sinusoids(length, 8), 1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's own traces")
def test_positions_of_any_length_in_a_trace_of_torch():
    import torch

    layer, x = PositionalEncoding(16), torch.from_numpy(X)
    traced = torch.jit.trace_module(layer, {"forward": (x[:, :3],)})  # where sizes are tensors
    assert_close(traced(x), layer(x), tolerance=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(layout="rotary"), "layout must be .*interleaved.* or .*concatenated.*; got 'rotary'"),
        (dict(max_length=0), "max_length must be positive; got 0"),
    ],
)
def test_bad_arguments_of_positional_encoding(arguments, message):
    with pytest.raises(ValueError, match=message):
        PositionalEncoding(**arguments)


@pytest.mark.parametrize(
    "x, start, message",
    [
        (X, None, r"A sequence of 4 is longer than the position table \(3\); .* max_length=4"),
        (X[:, :2], 2, r"A sequence of 4 is longer than the position table \(3\); .* max_length=4"),
        (X[:, :1], 3, r"A sequence of 4 is longer than the position table \(3\); .* max_length=4"),
        (X[:, :2, :5], None, "even; got 5"),
    ],
    ids=["length", "start and length", "start", "odd width"],
)
def test_bad_inputs_of_positional_encoding(x, start, message):
    with pytest.raises(ValueError, match=message):
        PositionalEncoding(3)(x, start=start)


def test_position_embedding_is_a_table_cut_to_the_length():
    layer = PositionEmbedding(7, keras.initializers.TruncatedNormal(stddev=0.02))
    found = layer(X)
    table = ops.convert_to_numpy(layer.embeddings)
    assert table.shape == (7, 8) and 0 < np.abs(table).max() < 0.06
    assert_close(found, X + table[:4], 1e-7)
    assert_close(layer(X[:, :2]), X[:, :2] + table[:2], 1e-7)
    for start in (3, ops.convert_to_tensor(3)):  # a decoder's step, known or not
        assert_close(layer(X, start=start), X + table[3:7], 1e-7)


def test_check_position_embedding():
    check_layer(lambda: PositionEmbedding(16), (X,), expected_shape=X.shape)


def test_bad_arguments_of_position_embedding():
    with pytest.raises(ValueError, match="max_length must be positive; got 0"):
        PositionEmbedding(0)
    with pytest.raises(ValueError, match=r"A sequence of 4 is longer than the position table \(3\); .* max_length=4"):
        PositionEmbedding(3)(X)
    with pytest.raises(ValueError, match=r"A sequence of 5 is longer than the position table \(4\)"):
        PositionEmbedding(4)(X, start=1)


# The vector of a text


def test_first_token_pooler():
    layer = FirstTokenPooler(5)
    found = layer(X)
    expected = np.tanh(X[:, 0] @ ops.convert_to_numpy(layer.dense.kernel) + ops.convert_to_numpy(layer.dense.bias))
    assert_close(found, expected, 1e-6)


def test_check_first_token_pooler():
    check_layer(lambda: FirstTokenPooler(5), {"x": X}, expected_shape=(2, 5))


# Initializers


@pytest.mark.parametrize("make, names", [
    (lambda given: MultiHeadSelfAttention(8, 2, kernel_initializer=given), ["query", "key", "value", "merge"]),
    (lambda given: FeedForward(8, 8, kernel_initializer=given), ["expand", "contract"]),
], ids=["attention", "feed-forward"])  # fmt: skip
def test_weights_of_one_initializer_differ(make, names):
    layer = make(keras.initializers.TruncatedNormal(stddev=0.02))
    layer(X)
    kernels = [ops.convert_to_numpy(getattr(layer, name).kernel) for name in names]
    for i, one in enumerate(kernels):
        assert one.std() == pytest.approx(0.0176, rel=0.3)
        assert all((one != other).mean() > 0.9 for other in kernels[:i])


# The feed-forward network

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward(activation):
    layer = filled(FeedForward(8, 16, activation), X)
    w1, b1, w2, b2 = layer.get_weights()
    assert (w1.shape, b1.shape, w2.shape, b2.shape) == ((8, 16), (16,), (16, 8), (8,))
    assert_close(layer(X), ACTIVATIONS[activation](X @ w1 + b1) @ w2 + b2, 2e-6)


def test_relu_is_the_default_activation():
    layer = filled(FeedForward(8, 16), X)
    w1, b1, w2, b2 = layer.get_weights()
    assert_close(layer(X), np.maximum(X @ w1 + b1, 0) @ w2 + b2, 2e-6)


def test_check_feed_forward():
    check_layer(lambda: FeedForward(6, 16, "gelu"), (X,), expected_shape=(2, 4, 6))


@pytest.mark.parametrize("sizes", [(0, 4), (4, -1)])
def test_bad_sizes_of_feed_forward(sizes):
    with pytest.raises(ValueError, match=f"hidden_dim and intermediate_dim must be positive; got {sizes[0]} and"):
        FeedForward(*sizes)


# Dropout; the distribution of its masks is tested with the kernels


def test_dropout_acts_in_training_alone():
    layer = Dropout(0.5)
    for training in (None, False):
        assert_close(layer(X, training=training), X, tolerance=0)
    dropped = numpy(layer(X, training=True))
    zero = dropped == 0
    assert 0.2 < zero.mean() < 0.8
    np.testing.assert_array_equal(dropped[~zero], 2 * X[~zero])


def test_dropout_at_rate_zero_does_nothing_and_keeps_no_state():
    layer = Dropout(0)
    assert_close(layer(X, training=True), X, tolerance=0)
    assert not layer.variables


def test_dropout_with_a_seed_repeats_itself():
    x = np.ones((50, 50), "float32")
    first, second = ([numpy(layer(x, training=True)) for _ in range(2)] for layer in (Dropout(0.3, 7), Dropout(0.3, 7)))
    np.testing.assert_array_equal(first, second)
    assert (first[0] != first[1]).any()


def test_dropout_without_a_seed_follows_the_global_one():
    x, masks = np.ones((50, 50), "float32"), []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        masks.append(numpy(Dropout(0.3)(x, training=True)))
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()


def test_check_dropout():
    check_layer(lambda: Dropout(0.3, seed=3), (X,), expected_shape=X.shape)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match=f"A dropout rate is at least 0 and below 1; got {rate}"):
        Dropout(rate)


# The masked-language-model head

POSITIONS = np.array([[3, 0, 3], [1, 2, 0]], "int32")
EMBEDDINGS = fixture("embeddings", (11, 6)).astype("float32")


def dense_logits(layer, x):
    """Devlin et al. 2019: the head's equation at every position."""
    w = {"/".join(weight.path.split("/")[1:]): numpy(weight).astype("float64") for weight in layer.weights}
    x = ACTIVATIONS["gelu"](x @ w["dense/kernel"] + w["dense/bias"])
    x = x - x.mean(axis=-1, keepdims=True)
    x = w["norm/gamma"] * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-12) + w["norm/beta"]
    return x @ EMBEDDINGS.T + w["bias"]


def test_masked_lm_head_is_the_dense_computation_at_those_positions():
    layer = filled(MaskedLMHead(11, 6), X, POSITIONS, EMBEDDINGS)
    expected = np.stack([row[positions] for row, positions in zip(dense_logits(layer, X), POSITIONS)])
    assert_close(layer(X, POSITIONS, EMBEDDINGS), expected, 5e-6)


def test_masked_lm_head_has_no_output_matrix_of_its_own():
    layer = filled(MaskedLMHead(11, 6), X, POSITIONS, EMBEDDINGS)
    assert {"/".join(w.path.split("/")[1:]): tuple(w.shape) for w in layer.weights} == {
        "dense/kernel": (8, 6), "dense/bias": (6,), "norm/gamma": (6,), "norm/beta": (6,), "bias": (11,),
    }  # fmt: skip
    before = numpy(layer(X, POSITIONS, EMBEDDINGS))
    changed = EMBEDDINGS.copy()
    changed[4] += 1
    difference = np.abs(numpy(layer(X, POSITIONS, changed)) - before).max(axis=(0, 1))
    assert difference[4] > 0.1 and np.delete(difference, 4).max() < 1e-6


def test_the_start_of_masked_lm_head_is_the_authors():
    keras.utils.set_random_seed(0)
    layer = MaskedLMHead(11, 300)
    layer(X, POSITIONS, np.zeros((11, 300), "float32"))
    kernel = numpy(layer.dense.kernel)
    assert 0 < np.abs(kernel).max() <= 0.04 + 1e-6  # truncated at two standard deviations of 0.02
    assert abs(kernel.std() - 0.02 * 0.8796) < 5e-4  # of a normal cut there
    assert not numpy(layer.bias).any()


def test_another_activation():
    layer = filled(MaskedLMHead(11, 6, activation="tanh"), X, POSITIONS, EMBEDDINGS)
    assert layer.activation is keras.activations.tanh


def test_masked_lm_head_in_bfloat16_keeps_logits_and_bias_in_float32():
    layer = filled(MaskedLMHead(11, 6, dtype="mixed_bfloat16"), X, POSITIONS, EMBEDDINGS)
    bias = 1000 + np.arange(11) / 64  # bfloat16 would round it to 1000
    layer.bias.assign(bias)
    logits = layer(X, POSITIONS, EMBEDDINGS)
    assert dtype_of(logits) == "float32"
    expected = np.stack([row[positions] for row, positions in zip(dense_logits(layer, X), POSITIONS)])
    assert_close(numpy(logits) - bias, expected - bias, 0.03)


def test_check_masked_lm_head():
    check_layer(
        lambda: MaskedLMHead(11, 6), dict(x=X, masked_positions=POSITIONS, embeddings=EMBEDDINGS),
        expected_shape=(2, 3, 11), bfloat16_output="float32",
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(6, 11), (11, 8), (12, 6)])
def test_embeddings_of_another_shape(shape):
    message = rf"embeddings must be \(vocab_size, hidden_dim\) = \(11, 6\); got \({shape[0]}, {shape[1]}\)"
    with pytest.raises(ValueError, match=message):
        MaskedLMHead(11, 6)(X, POSITIONS, np.zeros(shape, "float32"))


@pytest.mark.parametrize("sizes", [(0, 6), (11, -1)])
def test_bad_sizes_of_masked_lm_head(sizes):
    with pytest.raises(ValueError, match=f"vocab_size and hidden_dim must be positive; got {sizes[0]} and {sizes[1]}"):
        MaskedLMHead(*sizes)


def test_a_dense_layer_of_integers_is_keras_own():
    ids, ours, theirs = np.arange(6).reshape(2, 3), Dense(4), keras.layers.Dense(4)
    ours(ids), theirs(ids)
    theirs.set_weights(ours.get_weights())
    assert_close(ours(ids), theirs(ids), 1e-6)

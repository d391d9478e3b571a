"""Keras's own test of a layer, `keras.src.testing.TestCase.run_layer_test`, on every public layer."""

import keras
import numpy as np
import pytest
from keras.src.testing import TestCase

from llmfound import layers
from llmfound.testing import fixture

X = fixture("x", (2, 4, 8)).astype("float32")
MEMORY = fixture("memory", (2, 5, 6)).astype("float32")
EMBEDDINGS = fixture("embeddings", (11, 8)).astype("float32")
POSITIONS = np.array([[0, 3], [2, 2]], "int32")
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
MEMORY_MASK = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], bool)
BLOCK = dict(hidden_dim=8, num_heads=2, intermediate_dim=16, dropout=0.1, attention_dropout=0.1)
MATRICES, NORM, FEEDFORWARD = 4, 2, 4  # weights

# What cannot apply, and why. `check_layer` makes a step of training with each of these layers.
SEVERAL_INPUTS = "its training step hands all inputs over as the first argument of call"
NESTED_OUTPUTS = "its training step takes outputs in a flat tuple, and states are lists within one"
NO_CALL = "an abstract layer cannot be called, nor a cell without its states: only the tests of its config apply"

# class: arguments, inputs, what is expected, and a reason from above
CASES = {
    "AdditiveAttention": (
        dict(units=7, dropout=0.1),
        dict(query=X, memory=MEMORY, mask=MEMORY_MASK),
        dict(shape=((2, 4, 6), (2, 4, 5)), dtype=("float32", "float32"), weights=3, seeds=1, masking=True),
        SEVERAL_INPUTS,
    ),
    "MultiHeadAttention": (
        dict(hidden_dim=8, num_heads=2, dropout=0.1, use_bias=True),
        dict(query=X, memory=MEMORY, mask=MEMORY_MASK),
        dict(shape=(2, 4, 8), dtype="float32", weights=2 * MATRICES, seeds=1, masking=True),
        SEVERAL_INPUTS,
    ),
    "MultiHeadSelfAttention": (
        dict(hidden_dim=6, num_heads=3, causal=True),
        dict(x=X),
        dict(shape=(2, 4, 6), dtype="float32", weights=MATRICES, seeds=0, masking=True),
        None,
    ),
    "TransformerBlock": (BLOCK, None, dict(masking=True), NO_CALL),
    "PostLNBlock": (
        dict(BLOCK, activation="gelu"),
        dict(x=X),
        dict(shape=(2, 4, 8), dtype="float32", weights=MATRICES + FEEDFORWARD + 2 * NORM, seeds=2, masking=True),
        None,
    ),
    "PreLNBlock": (
        dict(BLOCK, causal=True, cross_attention=True),
        dict(x=X, memory=MEMORY, mask=MASK, memory_mask=MEMORY_MASK),
        dict(shape=(2, 4, 8), dtype="float32", weights=2 * MATRICES + FEEDFORWARD + 3 * NORM, seeds=3, masking=True),
        SEVERAL_INPUTS,
    ),
    "Dropout": (
        dict(rate=0.5),
        dict(x=X),
        dict(shape=(2, 4, 8), dtype="float32", weights=0, seeds=1, masking=True),
        None,
    ),
    "Dense": (
        dict(units=3, activation="gelu"),
        dict(inputs=X),
        dict(shape=(2, 4, 3), dtype="float32", weights=2, seeds=0, masking=True),
        None,
    ),
    "LayerNormalization": (
        dict(epsilon=0.1),
        dict(inputs=X),
        dict(shape=(2, 4, 8), dtype="float32", weights=2, seeds=0, masking=True),
        None,
    ),
    "Embedding": (
        dict(input_dim=11, output_dim=3, mask_zero=True),
        dict(inputs=POSITIONS),
        dict(shape=(2, 2, 3), dtype="float32", weights=1, seeds=0, masking=True),
        None,
    ),
    "VariationalDropout": (
        dict(rate=0.5),
        dict(x=X),
        dict(shape=(2, 4, 8), dtype="float32", weights=0, seeds=1, masking=True),
        None,
    ),
    "EmbeddingDropout": (
        dict(vocab_size=11, rate=0.5),
        dict(x=X, token_ids=np.array([[1, 2, 3, 0], [4, 10, 0, 0]], "int32")),
        dict(shape=(2, 4, 8), dtype="float32", weights=0, seeds=1, masking=True),
        SEVERAL_INPUTS,
    ),
    "AWDLSTM": (
        dict(vocab_size=11, embedding_dim=3, hidden_dim=4, num_layers=2),
        dict(token_ids=POSITIONS),
        dict(
            shape=((2, 2, 3), (2, 2, 3), [[(2, 4)] * 2, [(2, 3)] * 2]),
            dtype=("float32", "float32", [["float32"] * 2] * 2),
            weights=7,
            seeds=8,
            masking=False,
        ),
        NESTED_OUTPUTS,
    ),
    "LanguageModelHead": (
        dict(vocab_size=11),
        dict(x=X, embeddings=EMBEDDINGS),
        dict(shape=(2, 4, 11), dtype="float32", weights=1, seeds=0, masking=False),
        SEVERAL_INPUTS,
    ),
    "PositionalEncoding": (
        dict(max_length=16, layout="concatenated"),
        dict(x=X),
        dict(shape=(2, 4, 8), dtype="float32", weights=0, seeds=0, masking=True),
        None,
    ),
    "PositionEmbedding": (
        dict(max_length=16),
        dict(x=X),
        dict(shape=(2, 4, 8), dtype="float32", weights=1, seeds=0, masking=True),
        None,
    ),
    "FirstTokenPooler": (
        dict(hidden_dim=6),
        dict(x=X),
        dict(shape=(2, 6), dtype="float32", weights=2, seeds=0, masking=True),
        None,
    ),
    "FeedForward": (
        dict(hidden_dim=6, intermediate_dim=16),
        dict(x=X),
        dict(shape=(2, 4, 6), dtype="float32", weights=FEEDFORWARD, seeds=0, masking=True),
        None,
    ),
    "Maxout": (
        dict(pieces=2),
        dict(x=X),
        dict(shape=(2, 4, 4), dtype="float32", weights=0, seeds=0, masking=True),
        None,
    ),
    "GatedRecurrence": (
        dict(units=3, reset_after=True, use_recurrent_bias=True),
        dict(x=X, mask=MASK),
        dict(shape=((2, 4, 3), (2, 3)), dtype=("float32", "float32"), weights=4, seeds=0, masking=True),
        SEVERAL_INPUTS,
    ),
    "LSTM": (
        dict(units=3, weight_dropout=0.1),
        dict(sequences=X),
        dict(shape=(2, 3), dtype="float32", weights=3, seeds=2, masking=True),
        None,
    ),
    "GRU": (
        dict(units=3, return_sequences=True, weight_dropout=0.1),
        dict(sequences=X),
        dict(shape=(2, 4, 3), dtype="float32", weights=3, seeds=2, masking=True),
        None,
    ),
    "AttentionCell": (dict(cell=keras.layers.GRUCell(3), units=4, memory_dim=6), None, dict(masking=False), NO_CALL),
    "PoolingClassifierHead": (
        dict(num_classes=3, hidden_dim=5),
        dict(x=X, mask=MASK),
        dict(shape=(2, 3), dtype="float32", weights=8, moving=4, seeds=2, masking=True),
        SEVERAL_INPUTS,
    ),
    "MaskedLMHead": (
        dict(vocab_size=11, hidden_dim=8),
        dict(x=X, masked_positions=POSITIONS, embeddings=EMBEDDINGS),
        dict(shape=(2, 2, 11), dtype="float32", weights=5, seeds=0, masking=True),
        SEVERAL_INPUTS,
    ),
}


def public_layers():
    return [name for name, x in vars(layers).items() if isinstance(x, type) and issubclass(x, keras.layers.Layer)]


def maker(layer_class, inputs):
    """Layers as the test makes them, whose `build` calls them on symbolic inputs.

    The test first calls `build` alone and counts the weights. Here sublayers are built by the first call, as Keras
    allows, so `build` alone would make none; what the test then asserts of layer and outputs applies.
    """

    def make(**init_kwargs):
        layer = layer_class(**init_kwargs)
        own = layer.build

        def build(*shapes, **named_shapes):
            layer.build = own
            layer(**{name: keras.KerasTensor(x.shape, x.dtype) for name, x in inputs.items()})

        build._is_default = getattr(own, "_is_default", False)
        layer.build = build
        return layer

    return make


@pytest.mark.parametrize("name", public_layers())
def test_keras_own_test_of_a_layer(name):
    assert name in CASES, f"{name} is public: give it a row in CASES."
    init_kwargs, inputs, expected, inapplicable = CASES[name]
    layer_class = getattr(layers, name)
    if inapplicable is NO_CALL:
        TestCase().run_layer_test(layer_class, init_kwargs, supports_masking=expected["masking"])
        return
    inputs = {
        key: keras.ops.convert_to_tensor(x, "float32" if x.dtype == "float64" else None) for key, x in inputs.items()
    }
    TestCase().run_layer_test(
        maker(layer_class, inputs),
        init_kwargs,
        input_data=inputs if len(inputs) > 1 else next(iter(inputs.values())),
        expected_output_shape=expected["shape"],
        expected_output_dtype=expected["dtype"],
        expected_num_trainable_weights=expected["weights"],
        expected_num_non_trainable_weights=expected.get("moving", 0),
        expected_num_non_trainable_variables=expected["seeds"] + expected.get("moving", 0),
        expected_num_seed_generators=expected["seeds"],
        expected_num_losses=0,
        supports_masking=expected["masking"],
        run_training_check=inapplicable is None,
        assert_built_after_instantiation=False,
    )


def test_every_row_is_a_public_layer():
    assert set(CASES) == set(public_layers())

"""keras.RematScope: the same training, with activations that are computed again."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

from llmfound import attention, layers, models, training

BLOCKS = keras.RematScope("list_of_layers", layer_names=["block_0", "block_1"])


class Block(layers.PostLNBlock):
    """With a layer of Keras's that is not told `training`, a loss, and a count of its passes."""

    passes = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with keras.RematScope(None):  # Keras's own layers fail under the mode "full" on JAX
            self.noise = keras.layers.Dropout(0.3, seed=5)

    def call(self, x, *args, **kwargs):
        Block.passes += 1
        result = super().call(x, *args, **kwargs)
        self.add_loss(0.1 * ops.mean(ops.square(ops.cast(result, "float32"))))
        return self.noise(result)


@pytest.fixture(scope="module", autouse=True)
def blocks_of_bert():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.bert.BERTEncoder, "block_class", Block)
        yield


def trained(scope, dtype, seed=0):
    """The variables of a model after two steps in a scope, by path, and its last loss."""
    keras.backend.clear_session(free_memory=False)  # equal names
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 20, (4, 6)).astype("int32")
    ids[1, 3:] = 0
    with scope:
        model = models.BERTClassifier(models.BERT(20, 2, 8, 2, 16, 0.2, 0.2, dtype=dtype), 2, dtype=dtype)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.3, global_clipnorm=1.0), loss)
    losses = [model.train_on_batch(ids, np.arange(4) % 2) for _ in range(2)]
    return {v.path: ops.convert_to_numpy(v).astype("float64") for v in model.variables}, float(losses[-1])


@pytest.fixture(scope="module")
def as_they_are():
    return trained(contextlib.nullcontext(), "float32")


@pytest.mark.parametrize("scope", [BLOCKS, keras.RematScope("full")], ids=["blocks", "full"])
def test_a_model_trains_as_without(scope, as_they_are):
    expected, expected_loss = as_they_are
    actual, loss = trained(scope, "float32")
    assert abs(loss - expected_loss) < 1e-5
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=1e-5, err_msg=path)


def test_what_is_recomputed_has_the_dtype_of_mixed_precision():
    (expected, _), (actual, _) = (trained(scope, "mixed_bfloat16") for scope in (contextlib.nullcontext(), BLOCKS))
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=1e-5, err_msg=path)


def test_the_blocks_are_computed_again():
    if keras.backend.backend() == "jax":  # traces once, and its program says so
        import jax

        with BLOCKS:
            block = layers.PreLNBlock(8, 2, 16, name="block_0")
        x = np.ones((2, 3, 8), "float32")
        block(x)
        values = [[v.value for v in which] for which in (block.trainable_variables, block.non_trainable_variables)]
        assert "prevent_cse" in str(jax.make_jaxpr(lambda x: block.stateless_call(*values, x)[0])(x))
        return
    passes = []
    for scope in (contextlib.nullcontext(), BLOCKS):
        before = Block.passes
        trained(scope, "float32")
        passes.append(Block.passes - before)
    assert passes[1] > passes[0]


def test_a_recurrent_model_trains_as_without():
    """AWD-LSTM: states of its own, losses of its own, masks over its weights."""
    ids = np.random.default_rng(0).integers(1, 12, (2, 3, 5)).astype("int32")
    found = []
    for scope in (contextlib.nullcontext(), keras.RematScope("full")):
        keras.utils.set_random_seed(1)
        with scope:
            model = models.ULMFiT(12, 4, 6, 2, max_batch=3)
        model.compile(keras.optimizers.SGD(0.5), training.SmoothedCrossEntropy(0.0))
        inputs = {"token_ids": ids[0, :2], "continues": np.array([0, 0], "int32")}
        losses = [model.train_on_batch({**inputs, "continues": inputs["continues"] + i}, ids[1, :2]) for i in (0, 1)]
        found.append(([float(x) for x in losses], [ops.convert_to_numpy(v) for v in model.variables]))
    (expected_losses, expected), (losses, actual) = found
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for value, other in zip(expected, actual):
        np.testing.assert_allclose(other, value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [dict(dropout=0.3, recurrent_dropout=0.3), dict(stateful=True)], ids=str)
def test_a_recurrent_layer_finds_its_masks_and_states_again(options):
    rng, found = np.random.default_rng(0), []
    x, y = (rng.normal(size=(2, 3, 4)).astype("float32") for _ in range(2))
    for scope in (contextlib.nullcontext(), keras.RematScope("list_of_layers", layer_names=["lstm"])):
        keras.utils.set_random_seed(1)
        with scope:
            layer = layers.LSTM(4, return_sequences=True, name="lstm", **options)
        model = keras.Sequential([keras.Input(batch_shape=x.shape), layer])
        model.compile(keras.optimizers.SGD(1.0), "mse")
        losses = model.fit(x, y, epochs=3, batch_size=2, shuffle=False, verbose=0).history["loss"]
        found.append([*losses, *[ops.convert_to_numpy(layer(x)) for _ in range(2)]])
    for expected, actual in zip(*found):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_what_is_seen_inside_is_what_a_model_without_shows():
    """Attention that is captured, and the norms of a recorder, of layers within the repeated ones."""
    found = []
    for scope in (contextlib.nullcontext(), BLOCKS):
        keras.backend.clear_session(free_memory=False)
        keras.utils.set_random_seed(1)
        with scope:
            model = models.BERTClassifier(models.BERT(20, 2, 8, 2, 16), 2)
        model.compile(keras.optimizers.SGD(0.3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        batch = np.array([[1, 2, 3], [4, 5, 6]]), np.array([0, 1])
        recorder = training.NormRecorder(*batch, layers=[model.encoder.blocks[0].attention])
        model.fit(*batch, verbose=0, callbacks=[recorder])
        found.append({**attention.capture(model, batch[0]), "norms": recorder.activations})
        assert (model.encoder.blocks[0]._remat_mode is None) == (scope is not BLOCKS)
    assert list(found[0]) == list(found[1])
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-4, err_msg=name)

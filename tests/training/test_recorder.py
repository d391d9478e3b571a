"""Norms of gradients and outputs while a model trains."""

import keras
import numpy as np
import pytest
from keras import ops

from llmfound import plots
from llmfound.models import BERT, BERTClassifier, ULMFiT
from llmfound.testing import assert_close, fixture
from llmfound.training import DiscriminativeSGD, NormRecorder

X, Y = fixture("x", (12, 3)).astype("float32"), fixture("y", (12, 1)).astype("float32")


def linear():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="low"), keras.layers.Dropout(0.5),
                              keras.layers.Dense(1, name="high")])  # fmt: skip
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


def by_hand(model):
    """Norms of the gradients of the mean squared error, and lengths of the outputs, in NumPy."""
    w1, b1, w2, b2 = (ops.convert_to_numpy(w).astype("float64") for w in model.trainable_weights)
    hidden = X @ w1 + b1
    error = hidden @ w2 + b2 - Y
    of_output = 2 * error / error.size
    of_hidden = of_output @ w2.T
    low = [X.T @ of_hidden, of_hidden.sum(0)]
    high = [hidden.T @ of_output, of_output.sum(0)]
    norms = [np.sqrt(sum((g**2).sum() for g in some)) for some in (low, high)]
    return norms, [np.linalg.norm(hidden, axis=-1).mean(), np.abs(hidden @ w2 + b2).mean()]


def test_norms_are_those_of_the_model_before_and_after():
    model, recorder = linear(), NormRecorder(X, Y, every=2)
    first = by_hand(model)
    history = model.fit(X, Y, batch_size=4, epochs=3, verbose=0, callbacks=[recorder])
    assert recorder.names == ["low", "high"]
    assert recorder.steps == [0, 2, 4, 6, 8, 9]
    assert recorder.gradients.shape == recorder.activations.shape == (6, 2)
    for place, (gradients, activations) in ((0, first), (-1, by_hand(model))):
        np.testing.assert_allclose(recorder.gradients[place], gradients, rtol=1e-4)
        np.testing.assert_allclose(recorder.activations[place], activations, rtol=1e-5)
    assert set(history.history) == {"loss", "mae"}


def test_layers_that_wait_have_gradients_too():
    """Which PyTorch does not compute for the steps of training."""
    model, recorder = linear(), NormRecorder(X, Y, every=3)
    low, _, high = model.layers
    model.compile(DiscriminativeSGD(0.1, [[low], [high]]), "mse")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.train([1])
    before = [ops.convert_to_numpy(w).copy() for w in low.weights]
    model.fit(X, Y, batch_size=4, epochs=1, verbose=0, callbacks=[recorder])
    assert recorder.steps == [0, 3]
    assert_close(recorder.gradients[-1], np.array(by_hand(model)[0]), 1e-5)
    assert all((ops.convert_to_numpy(w) == old).all() for w, old in zip(low.weights, before))
    assert model.optimizer.leaves_out(low.trainable_weights[0])


def test_training_is_the_same_with_and_without():
    """Weights, dropout's draws, and the metrics of an epoch."""
    found = []
    for callbacks in ([], [NormRecorder(X, Y, every=1)]):
        keras.utils.set_random_seed(3)
        model = linear()
        history = model.fit(X, Y, batch_size=5, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        found.append([*history.history["loss"], *history.history["mae"], *model.get_weights()])
        assert "call" not in vars(model.layers[0])
    assert_close(found[0], found[1], 1e-6)


def test_states_that_a_model_carries_on_stay():
    model = ULMFiT(11, 4, 6, 1)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ids = np.arange(12).reshape(2, 6) % 11
    batch = {"token_ids": ids, "continues": np.ones(2, "int32")}, ids
    model.train_on_batch(*batch)
    states = [ops.convert_to_numpy(x) + 0 for x in model.carried.variables]
    recorder = NormRecorder(*batch, layers=[model.encoder])
    recorder.set_model(model)
    recorder.on_train_begin()
    assert_close(model.carried.variables, states, 0)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch executes one step at a time")
def test_steps_are_counted_of_executions_that_are_several():
    model, recorder = linear(), NormRecorder(X, Y, every=4)
    model.compile(model.optimizer, "mse", steps_per_execution=4)
    model.fit(X, Y, batch_size=2, epochs=2, verbose=0, callbacks=[recorder])
    assert recorder.steps == [0, 4, 10, 12] and int(model.optimizer.iterations) == 12


def test_layers_of_a_bert_and_by_name(tmp_path):
    model = BERTClassifier(BERT(11, 2, 8, 2, 16, max_length=8), 3)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ids, labels = np.array([[1, 2, 3, 0], [4, 5, 6, 7]], "int32"), np.array([0, 2])
    every, some = NormRecorder({"token_ids": ids}, labels), NormRecorder({"token_ids": ids}, labels, layers="block_1")
    model.fit({"token_ids": ids}, labels, verbose=0, callbacks=[every, some])
    assert [name.split("/")[-1] for name in every.names[-3:]] == ["block_1", "pooler", "classes"]
    assert len(every.names) == 8
    assert (every.gradients > 0).all() and (every.activations > 0).all()
    assert some.names == every.names[5:6]
    assert_close(some.gradients[:, 0], every.gradients[:, 5], 1e-6)
    assert_close(some.activations[0, 0], 8**0.5, 1e-4)  # Post-LN normalises every vector

    figure = plots.norms(every, "Norms", tmp_path / "norms.png")
    left, right = figure.axes[:2]
    assert [text.get_text() for text in left.get_yticklabels()] == every.names
    np.testing.assert_allclose(right.images[0].get_array().T, every.activations)
    assert (tmp_path / "norms.png").stat().st_size > 10_000


def test_what_cannot_be_recorded():
    with pytest.raises(ValueError, match="every must be at least 1; got 0"):
        NormRecorder(X, Y, every=0)
    with pytest.raises(ValueError, match="has no layer 'middle'"):
        linear().fit(X, Y, verbose=0, callbacks=[NormRecorder(X, Y, layers=["middle"])])
    with pytest.raises(ValueError, match="has no layer 'middle'"):
        linear().fit(X, Y, verbose=0, callbacks=[NormRecorder(X, Y, layers="middle")])
    with pytest.raises(ValueError, match="has no layers with weights; name some"):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dropout(0.5)])
        model.compile("sgd", "mse")
        model.fit(X, X, verbose=0, callbacks=[NormRecorder(X, X)])
    with pytest.raises(ValueError, match="Nothing is recorded yet"):
        plots.norms(NormRecorder(X, Y))

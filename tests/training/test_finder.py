"""The search for a learning rate leaves no trace, and finds what one would choose."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers

from llmfound.testing import assert_close
from llmfound.training import InverseSquareRoot, find_learning_rate


def problem(optimizer="sgd"):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    y = x @ rng.normal(size=(4, 1)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model, [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_it_leaves_no_trace(optimizer):
    model, batches = problem(optimizer)
    model.train_on_batch(*batches[0])
    before = [*model.get_weights(), *(np.array(v) for v in map(keras.ops.convert_to_numpy, model.optimizer.variables))]
    find_learning_rate(model, batches, steps=20)
    after = [*model.get_weights(), *map(keras.ops.convert_to_numpy, model.optimizer.variables)]
    for old, new in zip(before, after):
        assert (old == new).all()


def test_the_rate_that_it_suggests_is_good():
    model, batches = problem()
    found = find_learning_rate(model, batches, 1e-5, 10.0)
    assert found.rates[0] == 1e-5 and found.rates == sorted(found.rates)
    assert len(found.rates) == len(found.losses) == len(found.smooth) < 100  # it stopped where the loss diverged
    assert 1e-3 < found.suggestion < 1  # SGD on this problem diverges near 1
    assert found.losses[0] == pytest.approx(float(model.evaluate(*batches[0], verbose=0)), rel=1e-4)
    model.optimizer.learning_rate = found.suggestion
    losses = [float(model.train_on_batch(*batches[i % 4])) for i in range(100)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_that_was_never_called():
    _, batches = problem()
    unbuilt = keras.Sequential([layers.Dense(1)])
    unbuilt.compile("sgd", "mse")
    assert len(find_learning_rate(unbuilt, batches, high=0.01, steps=20).losses) == 20


def test_batches_without_an_end():
    model, batches = problem()
    endless = itertools.cycle(batches)
    assert find_learning_rate(model, endless, steps=20) == find_learning_rate(model, batches, steps=20)
    assert next(endless) is batches[20 % 4]


def test_a_negative_loss():
    model, batches = problem()
    positive = find_learning_rate(model, batches, high=0.01)
    model.compile("sgd", lambda y, p: keras.ops.mean(keras.ops.square(y - p)) - 100)
    negative = find_learning_rate(model, batches, high=0.01)
    assert_close(np.array(negative.losses), np.array(positive.losses) - 100, 1e-3)
    assert len(negative.losses) == 100


@pytest.mark.parametrize("arguments, message", [
    (dict(low=0), "low and high must be 0 < low < high"),
    (dict(low=1, high=0.1), "got 1, 0.1"),
    (dict(steps=9), "steps at least 10"),
    (dict(batches=[]), "There are no batches"),
])  # fmt: skip
def test_arguments_that_make_no_sense(arguments, message):
    model, batches = problem()
    with pytest.raises(ValueError, match=message):
        find_learning_rate(**{"model": model, "batches": batches, **arguments})


def test_a_schedule_cannot_be_set():
    model, batches = problem(keras.optimizers.Adam(InverseSquareRoot(8, 5)))
    with pytest.raises(ValueError, match="compile the model with a number, no schedule"):
        find_learning_rate(model, batches)


def test_a_loss_that_is_not_finite():
    model, [(x, y), *_] = problem()
    with pytest.raises(ValueError, match=r"The loss is not finite, or diverges, from a rate of 0\.001 on"):
        find_learning_rate(model, [(x * np.nan, y)], low=1e-3)
    assert_close(model.get_weights()[1], np.zeros(1), 0)

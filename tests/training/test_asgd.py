"""Averaged SGD, and when to begin to average."""

import math
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from llmfound.data import LanguageModelBatches
from llmfound.testing import assert_close
from llmfound.training import ASGD, Checkpoints, NonMonotonicTrigger, WindowRates


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def walk(optimizer, targets):
    """One variable that visits the targets."""
    variable = keras.Variable(np.zeros(2, "float32"), name="w")
    optimizer.build([variable])
    for target in targets:
        optimizer.apply([variable - target], [variable])
    return variable


@pytest.mark.parametrize("accumulation", [None, 2])
def test_check_8_the_mean_of_the_iterates(accumulation):
    optimizer = ASGD(1.0, average=True, gradient_accumulation_steps=accumulation)
    variable = walk(optimizer, [target for target in (1.0, 2.0, 3.0) for _ in range(accumulation or 1)])
    assert_close(variable, np.full(2, 3.0), 1e-6)
    optimizer.swap()
    assert_close(variable, np.full(2, 2.0), 1e-6)
    optimizer.swap()
    assert_close(variable, np.full(2, 3.0), 1e-6)
    optimizer.finalize_variable_values([variable])
    assert_close(variable, np.full(2, 2.0), 1e-6)


def test_the_mean_of_a_weight_without_gradients_is_the_weight():
    inputs = keras.Input((4,))
    hidden = layers.Dense(3)(inputs)
    model = keras.Model(inputs, {name: layers.Dense(1, name=name)(hidden) for name in "ab"})
    model.compile(ASGD(0.1, average=True), {"a": "mse"})
    before, x = numpy(model.get_layer("b").kernel), np.ones((8, 4), "float32")
    model.fit(x, {"a": x[:, :1]}, batch_size=4, verbose=0)
    assert_close(model.get_layer("b").kernel, before, 0)


def test_averaging_from_some_step_on():
    optimizer = ASGD(1.0)
    variable = walk(optimizer, [1.0, 2.0])
    optimizer.swap()  # nothing to swap
    optimizer.finalize_variable_values([variable])
    assert_close(variable, np.full(2, 2.0), 0)
    optimizer.start_averaging()
    for target in (5.0, 7.0):
        optimizer.apply([variable - target], [variable])
    optimizer.swap()
    assert_close(variable, np.full(2, 6.0), 1e-6)


def test_averaging_begins_once():
    optimizer = ASGD(1.0, average=True)
    variable = walk(optimizer, [1.0, 2.0])
    optimizer.start_averaging()
    optimizer.apply([variable - 3.0], [variable])
    optimizer.swap()
    assert_close(variable, np.full(2, 2.0), 1e-6)


def test_weight_decay_goes_with_the_scale():
    optimizer = ASGD(1.0, weight_decay=0.1)
    variable = keras.Variable(np.ones(2, "float32"), name="w")
    optimizer.build([variable])
    optimizer.scale.assign(0.5)
    optimizer.apply([ops.zeros(2)], [variable])
    assert_close(variable, np.full(2, 0.95), 1e-6)


def fired(values, **options):
    trigger = NonMonotonicTrigger(verbose=False, **options)
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile(ASGD(0.1), "mse")
    trigger.set_model(model)
    trigger.on_train_begin()
    for epoch, value in enumerate(values):
        trigger.on_epoch_end(epoch, {"val_loss": value})
        if trigger.fired is not None:
            return epoch
    return None


def test_check_8_the_trigger():
    assert fired([5, 4, 3, 2, 1, 2, 2, 2, 2, 2, 2]) == 10
    assert fired(np.linspace(9, 1, 50)) is None
    assert fired([2, 1, 2], n=0) == 2


def test_in_fit_validation_sees_the_mean():
    x = np.random.default_rng(0).normal(size=(8, 1)).astype("float32")
    y = 3 * x
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.compile(ASGD(0.3, average=True), "mse")
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(float(numpy(self.model.trainable_weights[0])[0, 0]))

    history = model.fit(x, y, validation_data=(x, y), batch_size=4, epochs=3, shuffle=False, verbose=0,
                        callbacks=[Look(), NonMonotonicTrigger(verbose=False)]).history  # fmt: skip
    assert len(seen) == 6
    for epoch in range(3):
        mean = np.mean(seen[: 2 * epoch + 2])
        assert_close(history["val_loss"][epoch], np.mean((mean * x - y) ** 2), 1e-4)
    assert_close(model.get_weights()[0][0, 0], np.mean(seen), 1e-5)


def noisy(wrapper=lambda optimizer: optimizer):
    """A model whose weights never come to rest, with their mean from the first step on; and its data."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "tanh"), layers.Dense(1)])
    model.compile(wrapper(ASGD(1.0, average=True, momentum=0.9, clipnorm=1.0)), "mse")
    return model, x, 2 * x[:, :1]


def test_callbacks_keep_the_weights_that_were_validated(tmp_path):
    model, x, y = noisy()
    early = keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    whole = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True)
    history = model.fit(x, y, batch_size=4, epochs=8, validation_data=(x, y), verbose=0,
                        callbacks=[early, whole, NonMonotonicTrigger(99)]).history  # fmt: skip
    saved = keras.saving.load_model(tmp_path / "best.keras")
    for kept in (model, saved):
        assert_close(kept.evaluate(x, y, verbose=0), min(history["val_loss"]), 1e-5)
    assert not model.optimizer.swapped and saved.optimizer.swapped
    means = saved.get_weights()
    saved.optimizer.finalize_variable_values(saved.trainable_weights)
    assert_close(saved.get_weights(), means, 0)


@pytest.mark.parametrize("batch", [0, 2])
def test_a_run_goes_on_from_its_checkpoint_exactly(tmp_path, batch):
    """One that was written while the model had the means, as an epoch began, or within the epoch."""

    class Crash(keras.callbacks.Callback):
        def on_train_batch_begin(self, step, logs=None):
            if self.model.optimizer.iterations == 4 + batch:
                raise InterruptedError

    def fit(folder, *callbacks):
        model, x, y = noisy()
        callbacks = [Checkpoints(tmp_path / folder, steps=1), NonMonotonicTrigger(99), *callbacks]
        model.fit(x, y, batch_size=4, epochs=3, validation_data=(x, y), shuffle=False, verbose=0, callbacks=callbacks)
        return model.get_weights()

    with pytest.raises(InterruptedError):
        fit("run", Crash())
    with pytest.warns(UserWarning, match="without `data`"):
        assert_close(fit("run"), fit("whole"), 0)


@pytest.mark.parametrize("way", ["Checkpoints", "BackupAndRestore", "initial_epoch", "more epochs"])
def test_a_run_that_goes_on_compares_with_the_losses_before(tmp_path, way):
    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3 and way != "initial_epoch":
                raise InterruptedError

    def fit(model, x, y, folder, *callbacks, **options):
        trigger = NonMonotonicTrigger(1, verbose=False)
        first = [Checkpoints(tmp_path / folder, steps=1)] if way in ("Checkpoints", "more epochs") else []
        last = [keras.callbacks.BackupAndRestore(tmp_path / folder)] if way == "BackupAndRestore" else []
        options = dict(epochs=6, batch_size=8, validation_data=(x, y), shuffle=False, verbose=0) | options
        model.fit(x, y, callbacks=[*first, trigger, *last, *callbacks], **options)
        return trigger.fired, numpy(model.optimizer.losses), model.get_weights()

    def noisy():
        keras.utils.set_random_seed(0)
        x = np.random.default_rng(0).normal(size=(16, 1)).astype("float32")
        model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
        model.compile(ASGD(keras.optimizers.schedules.PiecewiseConstantDecay([5], [0.01, 3.0])), "mse")
        return model, x, 2 * x

    whole = fit(*noisy(), "whole")
    assert whole[0] == 3
    model, x, y = noisy()
    if way == "initial_epoch":
        model.fit(x, y, epochs=3, batch_size=8, validation_data=(x, y), shuffle=False, verbose=0,
                  callbacks=[NonMonotonicTrigger(1, verbose=False)])  # fmt: skip
    elif way == "more epochs":
        fit(model, x, y, "run", epochs=3)
        model = noisy()[0]
    else:
        with pytest.raises(InterruptedError):
            fit(model, x, y, "run", Crash())
        model = noisy()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Checkpoints has no `data`
        again = fit(model, x, y, "run", initial_epoch=3 if way == "initial_epoch" else 0)
    assert again[0] == whole[0]
    np.testing.assert_array_equal(again[1], whole[1])
    assert_close(again[2], whole[2], 0)
    model._initial_epoch = None  # which BackupAndRestore leaves behind
    assert fit(model, x, y, "anew", epochs=1)[0] is None
    assert np.isfinite(numpy(model.optimizer.losses)).sum() == 1


def test_a_validation_that_is_interrupted():
    model, x, y = noisy()

    class Interrupt(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            raise KeyboardInterrupt

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            assert not self.model.optimizer.swapped

    trigger = NonMonotonicTrigger()
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, validation_data=(x, y), verbose=0, callbacks=[trigger, Interrupt()])
    model.fit(x, y, validation_data=(x, y), verbose=0, callbacks=[trigger, Look()])


def test_mixed_precision_wraps_the_optimizer():
    model, x, y = noisy(lambda optimizer: keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0))
    trigger = NonMonotonicTrigger(0, verbose=False)
    trigger.set_model(model)
    model.fit(x, y, validation_data=(x, y), epochs=2, verbose=0, callbacks=[trigger])
    assert model.optimizer.inner_optimizer.averages
    trigger.on_train_begin()
    for epoch in range(2):
        trigger.on_epoch_end(epoch, {"val_loss": float(epoch)})
    assert trigger.fired == 1


def test_the_trigger_begins_to_average_in_fit(capsys):
    x = np.random.default_rng(0).normal(size=(8, 1)).astype("float32")
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile(ASGD(5.0), "mse")  # too large a rate: it diverges
    trigger = NonMonotonicTrigger(n=1)
    model.fit(x, x, validation_data=(x, x), epochs=4, verbose=0, callbacks=[trigger])
    assert trigger.fired is not None
    assert f"epoch {trigger.fired + 1}: averages the weights from here on" in capsys.readouterr().out
    assert model.optimizer.averages
    model.compile(ASGD(5.0, average=True), "mse")
    history = model.fit(
        x, x, validation_data=(x, x), epochs=9, verbose=0, callbacks=[NonMonotonicTrigger(1, stop=True)]
    )
    assert len(history.history["loss"]) < 9


def test_the_trigger_compares_the_epochs_that_were_validated():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile(ASGD(0.1), "mse")
    x, trigger = np.ones((4, 1), "float32"), NonMonotonicTrigger(verbose=False)
    with pytest.warns(UserWarning, match="compares the epochs that have it"):
        model.fit(x, x, epochs=5, verbose=0, validation_data=(x, x), validation_freq=2, callbacks=[trigger])
    assert np.isfinite(numpy(model.optimizer.losses)).sum() == 2


def test_the_state_is_saved(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 1)).astype("float32")
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile(ASGD(0.1, average=True), "mse")
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, other):
        each.fit(x, x, verbose=0, shuffle=False)
    assert_close(other.get_weights(), model.get_weights(), 1e-6)


@pytest.mark.parametrize("steps", [None, 7])
def test_check_7_a_window_learns_in_proportion_to_its_length(steps):
    ids = np.random.default_rng(0).integers(1, 9, 1000)
    batches = LanguageModelBatches(ids, 2, 20)

    class Mean(keras.Model):
        """Loss 1 for each window, gradient 1."""

        def __init__(self):
            super().__init__()
            self.w = self.add_weight((), "zeros", name="w")

        def call(self, inputs):
            return ops.zeros_like(ops.cast(inputs["token_ids"], "float32"))[:, 0] + self.w

    model = Mean()
    model.compile(ASGD(1.0), lambda y, p: p)
    places, lengths = [0.0], []
    for batches.epoch in (1, 0):
        lengths = [*batches.lengths, *lengths]

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            places.append(float(numpy(self.model.w)))

    callbacks, epochs = [WindowRates(batches), Look()], 2 * math.ceil(len(batches) / (steps or len(batches)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")  # at the end of a pass
        model.fit(batches, epochs=epochs, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=callbacks)
    assert_close(-np.diff(places), np.array(lengths) / 20, 1e-4)
    assert float(numpy(model.optimizer.scale)) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="n must not be negative"):
        NonMonotonicTrigger(-1)
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    x = np.zeros((4, 1), "float32")
    model.compile(ASGD(0.1), "mse")
    with pytest.raises(ValueError, match=r"'los' is not logged after epoch 1, but \['loss'\]; name one of them"):
        model.fit(x, x, verbose=0, callbacks=[NonMonotonicTrigger(monitor="los")])
    with pytest.warns(UserWarning, match=r"'val_loss' is not logged after epoch 1, but .*; fit needs validation_data"):
        model.fit(x, x, epochs=2, verbose=0, callbacks=[NonMonotonicTrigger()])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="NonMonotonicTrigger needs ASGD; got Adam"):
        model.fit(x, x, verbose=0, callbacks=[NonMonotonicTrigger()])
    with pytest.raises(ValueError, match=r"WindowRates needs ASGD, or .*; got Adam"):
        model.fit(x, x, verbose=0, callbacks=[WindowRates(None)])
    model.compile(ASGD(0.1), "mse", steps_per_execution=4)
    with pytest.raises(ValueError, match=r"WindowRates needs steps_per_execution=1; got 4|must be 1 with the PyTorch"):
        model.fit(x, x, verbose=0, callbacks=[WindowRates(None)])

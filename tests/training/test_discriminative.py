"""Optimizers with a rate for each group: ratios, one clip for all, decay, freezing, saving, callbacks of Keras."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from llmfound.base import Model
from llmfound.testing import assert_close, fixture
from llmfound.training import (
    ASGD,
    Adam,
    AdamW,
    Discriminative,
    DiscriminativeAdam,
    DiscriminativeAdamW,
    DiscriminativeSGD,
    GradualUnfreezing,
    SlantedTriangular,
)

PLAIN = {
    DiscriminativeSGD: keras.optimizers.SGD,
    DiscriminativeAdam: Adam,
    DiscriminativeAdamW: AdamW,
}
every = pytest.mark.parametrize("optimizer_class", PLAIN)


@keras.saving.register_keras_serializable("tests")
class DiscriminativeLion(Discriminative, keras.optimizers.Lion):
    pass


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def variables():
    shapes = dict(low=(4, 3), middle=(3,), high=(2, 2))
    return [keras.Variable(fixture(name, shape).astype("float32"), name=name) for name, shape in shapes.items()]


def gradients(step=0):
    return [
        ops.convert_to_tensor(fixture(f"g{step}{n}", s).astype("float32")) for n, s in enumerate([(4, 3), (3,), (2, 2)])
    ]


def run(optimizer, found, steps):
    places = [[numpy(v) for v in found]]
    for step in steps:
        optimizer.apply(gradients(step), found)
        places.append([numpy(v) for v in found])
    return places


@every
def test_groups_of_one_rate_are_the_plain_optimizer(optimizer_class):
    options = dict(learning_rate=0.1, global_clipnorm=0.5)
    ours, theirs = variables(), variables()
    found = run(optimizer_class(groups=[ours], **options), ours, range(5))
    assert_close(found, run(PLAIN[optimizer_class](**options), theirs, range(5)), 1e-6)


@every
def test_each_group_is_the_plain_optimizer_at_its_own_rate(optimizer_class):
    ours = variables()
    found = run(optimizer_class(0.1, groups=[[v] for v in ours], decay=2.0), ours, range(5))[-1]
    for i, rate in enumerate((0.025, 0.05, 0.1)):
        theirs = variables()
        assert_close(found[i], run(PLAIN[optimizer_class](rate), theirs, range(5))[-1][i], 1e-6)


def test_other_optimizers_of_keras_can_have_groups():
    ours = variables()
    found = run(DiscriminativeLion(0.1, groups=[[v] for v in ours], decay=[0.5, 1.0, 2.0]), ours, range(5))[-1]
    for i, rate in enumerate((0.05, 0.1, 0.2)):
        assert_close(found[i], run(keras.optimizers.Lion(rate), variables(), range(5))[-1][i], 1e-6)


def test_the_clip_is_over_all_groups():
    ours = variables()
    norm = np.sqrt(sum(np.square(numpy(g)).sum() for g in gradients()))
    before, after = run(DiscriminativeSGD(1.0, groups=[[v] for v in ours], decay=1.0, global_clipnorm=0.1), ours, [0])
    moved = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(before, after)))
    assert_close(moved, min(norm, 0.1), 1e-5)


def test_a_group_that_waits_is_not_in_the_norm():
    ours = variables()
    optimizer = DiscriminativeSGD(1.0, groups=[[v] for v in ours], decay=1.0, global_clipnorm=0.1)
    optimizer.build(ours)
    optimizer.train([1, 2])
    before, after = run(optimizer, ours, [0])
    assert (before[0] == after[0]).all()
    moved = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(before, after)))
    assert_close(moved, 0.1, 1e-5)


@every
@pytest.mark.parametrize("options", [{}, dict(global_clipnorm=0.5), dict(clipvalue=0.1)])
def test_a_rate_of_0_leaves_weights_and_moments_untouched(optimizer_class, options):
    ours = variables()
    decay = dict(weight_decay=0.1) if optimizer_class is DiscriminativeAdamW else {}
    momentum = dict(momentum=0.9) if optimizer_class is DiscriminativeSGD else {}
    optimizer = optimizer_class(0.1, groups=[[v] for v in ours], **options, **decay, **momentum)
    optimizer.build(ours)
    run(optimizer, ours, range(2))
    optimizer.train([2])
    waiting = [v for key in ours[:2] for v in (key, *optimizer._slots.value[optimizer._var_key(key)])]
    assert len(waiting) == {DiscriminativeSGD: 4}.get(optimizer_class, 6)
    before = [numpy(v) for v in waiting]
    run(optimizer, ours, range(2, 5))
    for old, variable in zip(before, waiting):
        assert (old == numpy(variable)).all(), variable.path


def test_a_group_counts_its_own_steps():
    """One that begins late is corrected for its own zero moments, as if training began with it."""
    ours, theirs = variables(), variables()
    optimizer = DiscriminativeAdam(0.1, groups=[[v] for v in ours], decay=1.0, beta_1=0.7, beta_2=0.99)
    optimizer.build(ours)
    optimizer.train([1, 2])
    run(optimizer, ours, range(7))
    optimizer.train([0, 1, 2])
    found = run(optimizer, ours, range(7, 10))[-1][0]
    assert_close(found, run(Adam(0.1, beta_1=0.7, beta_2=0.99), theirs, range(7, 10))[-1][0], 1e-6)
    assert_close(optimizer.group_steps, np.array([3, 10, 10]), 0)
    assert int(numpy(optimizer.iterations)) == 10


def test_weight_decay_goes_with_the_rate_of_the_group():
    ours = variables()
    optimizer = DiscriminativeAdamW(0.1, groups=[[v] for v in ours], decay=2.0, weight_decay=0.5)
    optimizer.build(ours)
    before = [numpy(v) for v in ours]
    optimizer.apply([ops.zeros(v.shape) for v in ours], ours)
    for old, variable, rate in zip(before, ours, (0.025, 0.05, 0.1)):
        assert_close(variable, old * (1 - rate * 0.5), 1e-6)


@pytest.mark.parametrize("options", [dict(use_ema=True, ema_momentum=0.5), dict(gradient_accumulation_steps=2)])
def test_averages_and_accumulation_work_as_in_the_plain_optimizer(options):
    ours, theirs = variables(), variables()
    found = run(DiscriminativeAdam(0.1, groups=[ours], **options), ours, range(6))
    assert_close(found, run(Adam(0.1, **options), theirs, range(6)), 1e-6)


@keras.saving.register_keras_serializable("tests")
class Late(keras.optimizers.schedules.LearningRateSchedule):
    """0 for some steps, then 0.1."""

    def __init__(self, start):
        self.start = start

    def __call__(self, step):
        return ops.where(ops.cast(step, "int32") < self.start, 0.0, 0.1)

    def get_config(self):
        return {"start": self.start}


@pytest.mark.parametrize("optimizer_class", [DiscriminativeSGD, DiscriminativeAdam])
def test_a_batch_at_which_the_schedule_is_0_is_part_of_its_update(optimizer_class):
    ours, theirs = variables(), variables()
    options = dict(gradient_accumulation_steps=4)
    found = run(optimizer_class(Late(2), groups=[[v] for v in ours], decay=1.0, **options), ours, range(8))
    assert_close(found, run(PLAIN[optimizer_class](Late(2), **options), theirs, range(8)), 1e-6)


def test_an_update_at_a_rate_of_0_is_not_counted():
    ours, theirs = variables(), variables()
    optimizer = DiscriminativeAdam(Late(2), groups=[ours], gradient_accumulation_steps=2)
    found = run(optimizer, ours, range(6))[-1]
    assert_close(found, run(Adam(0.1, gradient_accumulation_steps=2), theirs, range(2, 6))[-1], 1e-6)
    assert_close(optimizer.group_steps, np.array([4]), 0)


# Inside fit


def model_and_data():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh", name="a"), layers.Dense(2, name="b")])
    rng = np.random.default_rng(0)
    return model, rng.normal(size=(16, 4)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")


def compiled(**options):
    model, x, y = model_and_data()
    model.compile(
        DiscriminativeAdam(options.pop("rate", 0.01), groups=[[layer] for layer in model.layers], **options), "mse"
    )
    return model, x, y


def test_keras_callbacks_keep_the_ratios():
    model, x, y = compiled()
    model.fit(
        x, y, verbose=0, epochs=2, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: 0.26 / (1 + epoch))]
    )
    assert_close(np.array(model.optimizer.group_rates), np.array([0.05, 0.13]), 1e-6)
    model.fit(x, y, verbose=0, epochs=3, callbacks=[
        keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=1e9, min_lr=1e-9)])  # fmt: skip
    low, high = model.optimizer.group_rates
    assert high < 0.13 and abs(high / low - 2.6) < 1e-4


@pytest.mark.parametrize("jit_compile", [False, "auto"])
def test_unfreezing_in_one_fit_is_several_fits_by_hand(jit_compile):
    """The same steps as an optimizer of Keras over the top layer alone would make first."""
    model, x, y = compiled()
    model.compile(model.optimizer, "mse", jit_compile=jit_compile)
    start = model.get_weights()
    model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[GradualUnfreezing(2, verbose=False)])
    assert not (model.get_weights()[0] == start[0]).all()
    by_hand, x, y = model_and_data()
    by_hand.layers[0].trainable = False
    by_hand.compile(Adam(0.01), "mse")
    by_hand.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    frozen = model_and_data()[0]
    frozen.compile(DiscriminativeAdam(0.01, groups=[[layer] for layer in frozen.layers]), "mse")
    frozen.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[GradualUnfreezing(2, verbose=False)])
    assert_close(frozen.get_weights(), by_hand.get_weights(), 1e-5)


def test_nothing_is_compiled_anew_for_a_stage():
    """Tracing runs Python; a layer that counts its calls sees none in later stages. On torch every step is one."""
    if keras.backend.backend() == "torch":
        pytest.skip("torch compiles nothing")
    calls = []

    class Counting(layers.Dense):
        def call(self, x, training=None):
            calls.append(1)
            return super().call(x)

    model = keras.Sequential([keras.Input((4,)), Counting(3), layers.Dense(2)])
    _, x, y = model_and_data()
    model.compile(DiscriminativeSGD(0.01, groups=[[layer] for layer in model.layers]), "mse")
    counts = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(calls)))
    model.fit(x, y, epochs=3, verbose=0, callbacks=[GradualUnfreezing(verbose=False), note])
    assert counts[0] == counts[1] == counts[2]


def test_gradients_of_waiting_groups_are_not_computed_on_torch():
    if keras.backend.backend() != "torch":
        pytest.skip("the compiled steps of the others have them all")
    model, x, y = compiled()
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append([w.value.grad is None for w in model.trainable_weights])
    )
    model.fit(x, y, epochs=2, verbose=0, callbacks=[GradualUnfreezing(verbose=False), note])
    assert seen[0] == [True, True, False, False] and seen[-1] == [False] * 4


def test_a_schedule_with_stages():
    model, x, y = compiled(rate=SlantedTriangular(0.01, [2, 4]))
    model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[GradualUnfreezing(verbose=False)])
    assert_close(model.optimizer.group_rates[1], 0.01 / 32, 1e-7)


def test_mixed_precision_wraps_the_optimizer(capsys):
    model, x, y = model_and_data()
    optimizer = DiscriminativeSGD(0.01, groups=[[layer] for layer in model.layers])
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0), "mse")
    start = model.get_weights()
    model.fit(x, y, verbose=0, callbacks=[GradualUnfreezing()])
    assert (model.get_weights()[0] == start[0]).all() and not (model.get_weights()[2] == start[2]).all()
    assert "training b at 1.00e-02; waiting: a" in capsys.readouterr().out


def test_groups_are_saved_with_the_model(tmp_path):
    model, x, y = compiled(decay=3.0)
    model.fit(x, y, verbose=0, shuffle=False)
    model.optimizer.train([1])
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    assert other.optimizer.group_names == ["a", "b"]
    assert_close(np.array(other.optimizer.group_rates), np.array([0, 0.01]), 1e-9)
    for each in (model, other):
        each.optimizer.train([0, 1])
        each.fit(x, y, verbose=0, shuffle=False)
    assert_close(other.get_weights(), model.get_weights(), 1e-6)


def test_a_model_is_saved_before_its_first_step(tmp_path):
    model, x, y = compiled()
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, other):
        each.fit(x, y, verbose=0, shuffle=False)
    assert_close(other.get_weights(), model.get_weights(), 1e-6)


class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


class Ours(Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = layers.Embedding(5, 4, name="a"), layers.Dense(2, name="b")

    def input_signature(self):
        return {"ids": ()}

    def call(self, inputs):
        return self.b(self.a(inputs["ids"]))

    def layer_groups(self):
        return [[self.a], [self.b]]


@pytest.mark.parametrize("then", [
    lambda model: model.compile("sgd", "mse"),
    lambda model: model.compile(DiscriminativeSGD(0.1, groups=model.layer_groups()), "mse"),
    lambda model: model.optimizer.train([0, 1]),
])  # fmt: skip
def test_all_layers_train_after_a_fit_that_was_interrupted(then):
    model, x, y = Ours(), {"ids": np.arange(4)}, np.ones((4, 2), "float32")
    model.compile(DiscriminativeSGD(0.1, groups=model.layer_groups()), "mse")
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[GradualUnfreezing(verbose=False), Interrupt()])
    then(model)
    before = model.get_weights()
    model.fit(x, y, verbose=0)
    assert all((old != new).any() for old, new in zip(before, model.get_weights()))


class Sharing(Ours):
    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.a = other.a


@pytest.mark.parametrize("step", ["fit", "train_on_batch"])
def test_a_model_that_shares_layers_trains_them_after_a_fit_that_was_interrupted(step):
    model, x, y = Ours(), {"ids": np.arange(4)}, np.ones((4, 2), "float32")
    other = Sharing(model)
    other.compile("sgd", "mse")
    other.train_on_batch(x, y)
    model.compile(DiscriminativeSGD(0.1, groups=model.layer_groups()), "mse")
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[GradualUnfreezing(verbose=False), Interrupt()])
    before = other.get_weights()
    getattr(other, step)(x, y)
    assert all((old != new).any() for old, new in zip(before, other.get_weights()))
    before = model.get_weights()
    model.fit(x, y, verbose=0)  # its own groups wait as they did
    assert [bool((old != new).any()) for old, new in zip(before, model.get_weights())] == [False, True, True]


def test_a_group_without_a_variable_to_train_keeps_its_place(tmp_path, capsys):
    model = keras.Sequential([keras.Input((2,)), *[keras.layers.Dense(2, name=name) for name in ("low", "mid", "top")]])
    model.layers[1].trainable = False
    model.compile(DiscriminativeSGD(0.1, groups=[[layer] for layer in model.layers], decay=2.0), "mse")
    x = np.ones((4, 2), "float32")
    model.fit(x, x, verbose=0, callbacks=[GradualUnfreezing()])
    assert capsys.readouterr().out == "epoch 1: training top at 1.00e-01; waiting: low\n"
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.optimizer.group_rates, [0.025, 0.05, 0.1], 1e-6)
    for one in (model, loaded):
        one.fit(x, x, epochs=3, verbose=0)
    for ours, theirs in zip(model.weights, loaded.weights):
        assert_close(theirs, ours, 1e-6)


# Bad input


@pytest.mark.parametrize("groups", [None, [], [[]], "layers"])
def test_no_groups(groups):
    with pytest.raises(ValueError, match="groups must be lists of layers"):
        DiscriminativeSGD(0.1, groups=groups)


@pytest.mark.parametrize("decay", [[1.0], [1.0, -1.0], [1.0, float("nan")]])
def test_ratios_that_make_no_sense(decay):
    with pytest.raises(ValueError, match="decay must be a positive number, or 2 ratios"):
        DiscriminativeSGD(0.1, groups=[["a"], ["b"]], decay=decay)


def test_groups_that_overlap_or_miss_a_variable():
    low, middle, _ = found = variables()
    optimizer = DiscriminativeSGD(0.1, groups=[[low, middle], [middle]])
    with pytest.raises(ValueError, match=r"middle is in groups \[0, 1\]; in no group: high"):
        optimizer.build(found)


def test_groups_that_do_not_exist():
    with pytest.raises(ValueError, match=r"There are 2 groups, 0 to 1; got \[2\]"):
        DiscriminativeSGD(0.1, groups=[["a"], ["b"]]).train([2])
    with pytest.raises(ValueError, match="at least one group to train; got none"):
        DiscriminativeSGD(0.1, groups=[["a"], ["b"]]).train([])


@pytest.mark.parametrize("optimizer", ["adam", ASGD(0.1)])
def test_unfreezing_needs_groups(optimizer):
    model, x, y = model_and_data()
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="GradualUnfreezing needs an optimizer with groups of layers"):
        model.fit(x, y, verbose=0, callbacks=[GradualUnfreezing()])


def test_epochs_per_group():
    with pytest.raises(ValueError, match="epochs_per_group must be at least 1; got 0"):
        GradualUnfreezing(0)

"""Adam and AdamW are Keras's, number for number, in every setting that a run may use."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from llmfound.testing import assert_close, fixture
from llmfound.training import Adam, AdamW, BERTAdam, InverseSquareRoot

PAIRS = {Adam: keras.optimizers.Adam, AdamW: keras.optimizers.AdamW}
PAPER = dict(beta_2=0.98, epsilon=1e-9)  # Vaswani et al. 2017, section 5.3
NOAM = dict(learning_rate=InverseSquareRoot(hidden_dim=512, warmup_steps=5), **PAPER)


def numpy(x):
    return ops.convert_to_numpy(x)


def variables():
    shapes = dict(kernel=(4, 3), bias=(3,))
    return [keras.Variable(fixture(name, shape).astype("float32"), name=name) for name, shape in shapes.items()]


def gradients(step):
    """Of very different sizes, and zero in places, as those of an embedding are."""
    kernel = fixture(f"gradient of kernel {step}", (4, 3)) * 10.0 ** np.arange(-6, 0, 2.0)[:3]
    kernel[step % 4] = 0
    return [ops.convert_to_tensor(g.astype("float32")) for g in (kernel, fixture(f"gradient of bias {step}", (3,)))]


def trajectory(optimizer, steps=8):
    """The variables after each step."""
    found, places = variables(), []
    optimizer.build(found)
    for step in range(steps):
        optimizer.apply(gradients(step), found)
        places.append([numpy(v).copy() for v in found])
    return places


def assert_equal(ours, theirs):
    paths = [trajectory(optimizer) for optimizer in (ours, theirs)]
    assert_close(*paths, 1e-6, "variables by step")
    return paths[0]


SETTINGS = [
    (Adam, {}),
    (Adam, NOAM),
    (Adam, dict(learning_rate=0.01, beta_1=0.5, beta_2=0.9, epsilon=1e-3)),
    (Adam, dict(learning_rate=0.01, global_clipnorm=0.1)),
    (Adam, dict(learning_rate=0.01, clipvalue=1e-3)),
    (Adam, dict(learning_rate=0.01, amsgrad=True)),
    (Adam, dict(learning_rate=0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3)),
    (AdamW, {}),
    (AdamW, dict(weight_decay=0.1, global_clipnorm=0.1, **NOAM)),
]


@pytest.mark.parametrize(
    "ours, options", SETTINGS, ids=[" ".join([ours.__name__, *options]) for ours, options in SETTINGS]
)
def test_every_step_equals_that_of_keras(ours, options):
    path = assert_equal(ours(**options), PAIRS[ours](**options))
    assert np.abs(path[-1][0] - path[0][0]).max() > 1e-4  # for equal is not enough: it must move


@pytest.mark.parametrize("options", [{}, dict(global_clipnorm=0.5)], ids=["unclipped", "clipped"])
def test_gradients_that_share_memory_count_once_each_and_stay(options):
    shared, row = ops.convert_to_tensor(fixture("shared", (3,)).astype("float32")), ops.ones(3)
    weights = []
    for make in (Adam, keras.optimizers.Adam):
        found = [*variables(), keras.Variable(np.zeros(3, "float32"), name="other")]
        optimizer = make(0.1, epsilon=1.0, **options)
        optimizer.build(found)
        optimizer.apply([ops.broadcast_to(row, (4, 3)), shared, shared], found)
        weights.append([numpy(v) for v in found])
    assert_close(*weights, 1e-6)
    assert_close([shared, row], [fixture("shared", (3,)), np.ones(3)], 1e-7)


@pytest.mark.parametrize("transposed", ["gradient", "variable", "both"])
def test_the_order_of_numbers_in_memory_does_not_matter(transposed):
    turned = lambda x: ops.transpose(ops.convert_to_tensor(np.ascontiguousarray(x.T)))  # noqa: E731
    value, gradient = fixture("value", (4, 3)).astype("float32"), fixture("gradient", (4, 3)).astype("float32")
    weights = []
    for make in (Adam, keras.optimizers.Adam):
        v = keras.Variable(turned(value) if transposed != "gradient" else value, name="kernel")
        optimizer = make(0.1, epsilon=1.0)
        optimizer.build([v])
        for _ in range(3):
            optimizer.apply([turned(gradient) if transposed != "variable" else ops.convert_to_tensor(gradient)], [v])
        weights.append([numpy(v), *map(numpy, optimizer.variables[2:])])
    assert_close(*weights, 1e-6)


def test_a_run_of_the_paper_equals_the_equations():
    """Kingma and Ba 2015, section 2, in float64, with the rate and the settings of Vaswani et al. 2017."""
    w = [numpy(v).astype("float64") for v in variables()]
    m, v = ([np.zeros_like(x) for x in w] for _ in range(2))
    found = trajectory(Adam(**NOAM))
    for step in range(8):
        t = step + 1
        rate = 512**-0.5 * min(t**-0.5, t * 5**-1.5)
        for i, g in enumerate(numpy(g).astype("float64") for g in gradients(step)):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.98 * v[i] + 0.02 * g**2
            w[i] = w[i] - rate * np.sqrt(1 - 0.98**t) / (1 - 0.9**t) * m[i] / (np.sqrt(v[i]) + 1e-9)
        assert_close(found[step], w, 2e-6, f"after step {t}")


def test_weight_decay_is_decoupled_and_spares_what_is_excluded():
    optimizer = AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    found = variables()
    before = [numpy(v).copy() for v in found]
    optimizer.build(found)
    optimizer.apply([ops.zeros(v.shape) for v in found], found)
    assert_close(found[0], before[0] * (1 - 0.1 * 0.5), 1e-7)
    assert_close(found[1], before[1], tolerance=0)
    assert_equal(*(excluding(make(0.01, weight_decay=0.1)) for make in (AdamW, keras.optimizers.AdamW)))


def excluding(optimizer):
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def test_what_is_excluded_is_told_by_names_and_saved():
    ours = AdamW(0.01, weight_decay=0.1, exclude=["bias"])
    path = assert_equal(ours, excluding(keras.optimizers.AdamW(0.01, weight_decay=0.1)))
    again = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(ours))))
    assert_close(trajectory(again), path, tolerance=0)
    part = trajectory(AdamW(0.01, weight_decay=0.1, exclude=["bia", "kern.*"]))  # names are whole, and no patterns
    assert_close(part, trajectory(AdamW(0.01, weight_decay=0.1)), tolerance=0)
    with pytest.raises(ValueError, match="exclude must be a list of names; got one str, 'bias'"):
        AdamW(exclude="bias")


def test_berts_adam_is_that_of_its_authors():
    """Their equations in float64, with the norm of all gradients at most 1."""
    w = [numpy(v).astype("float64") for v in variables()]
    m, v = ([np.zeros_like(x) for x in w] for _ in range(2))
    found = trajectory(BERTAdam(0.01))
    for step in range(8):
        grads = [numpy(g).astype("float64") for g in gradients(step)]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        for i, g in enumerate(g / max(norm, 1) for g in grads):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g**2
            w[i] = w[i] - 0.01 * (m[i] / (np.sqrt(v[i]) + 1e-6) + (0.01 * w[i] if i == 0 else 0))
        assert_close(found[step], w, 2e-6, f"after step {step + 1}")
    with pytest.raises(ValueError, match=r"has no amsgrad=True; take AdamW\(amsgrad=True\)"):
        BERTAdam(amsgrad=True)


@pytest.mark.parametrize("gradient, factor", [(0.5, 3.16228), (-0.5, -3.16228), (1e-3, 3.065343)])
def test_check_4_the_first_step_of_berts_adam(gradient, factor):
    w = keras.Variable(np.zeros(1, "float32"), name="kernel")
    optimizer = BERTAdam(0.1)
    optimizer.build([w])
    optimizer.apply([ops.convert_to_tensor([gradient], "float32")], [w])
    assert numpy(w)[0] == pytest.approx(-0.1 * factor, rel=1e-4)


def test_berts_adam_in_a_model_spares_biases_and_norms():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.LayerNormalization()])
    model.compile(BERTAdam(0.1, weight_decay=0.5), lambda y, x: 0.0 * x)
    for weight in model.weights:
        weight.assign(np.ones(weight.shape))
    model.fit(np.ones((2, 3)), np.ones((2, 4)), verbose=0)
    found = {weight.name: numpy(weight).ravel()[0] for weight in model.weights}
    assert found == pytest.approx({"kernel": 0.95, "bias": 1, "gamma": 1, "beta": 1}, abs=1e-6)


def test_berts_adam_is_restored():
    optimizer = BERTAdam(0.01, epsilon=1e-5)
    twin = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(optimizer))))
    assert type(twin) is BERTAdam and twin.get_config() == optimizer.get_config()
    assert (twin.weight_decay, twin.exclude, twin.global_clipnorm) == (0.01, ["bias", "gamma", "beta"], 1.0)
    assert_close(trajectory(twin), trajectory(optimizer), tolerance=0)


def test_a_rate_of_zero_leaves_every_weight_untouched():
    path = trajectory(AdamW(0.0, weight_decay=0.1), steps=2)
    assert_close(path[-1], [numpy(v) for v in variables()], tolerance=0)


@pytest.mark.parametrize("ours", PAIRS)
def test_the_config_is_restored(ours):
    optimizer = ours(**NOAM, weight_decay=0.02, global_clipnorm=0.7, name="mine")
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    for twin in (keras.optimizers.deserialize(config), ours.from_config(optimizer.get_config())):
        assert type(twin) is ours and twin.name == "mine"
        assert isinstance(twin._learning_rate, InverseSquareRoot)
        assert twin.get_config() == optimizer.get_config()
        assert_close(trajectory(twin), trajectory(ours(**NOAM, weight_decay=0.02, global_clipnorm=0.7)), tolerance=0)


def test_gradients_of_bfloat16_are_widened_before_they_are_used():
    """Keras's own Adam on PyTorch multiplies in bfloat16 first."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        optimizer, found[dtype] = Adam(0.01, **PAPER), variables()
        optimizer.build(found[dtype])
        for step in range(3):
            optimizer.apply([ops.cast(ops.cast(g, "bfloat16"), dtype) for g in gradients(step)], found[dtype])
    assert {v.dtype for v in found["bfloat16"]} == {"float32"}
    assert_close(*([numpy(v) for v in each] for each in found.values()), 1e-6)


def test_a_state_of_keras_goes_on_in_ours():
    """The slots mean the same, so a run may change from one to the other."""
    theirs, ours, found = keras.optimizers.Adam(**NOAM), Adam(**NOAM), [variables(), variables()]
    for optimizer, each in zip((theirs, ours), found):
        optimizer.build(each)
    for step in range(3):
        theirs.apply(gradients(step), found[0])
    for mine, other in zip([*ours.variables, *found[1]], [*theirs.variables, *found[0]]):
        mine.assign(numpy(other))
    for optimizer, each in zip((theirs, ours), found):
        optimizer.apply(gradients(3), each)
    assert_close(*([numpy(v) for v in each] for each in found), 1e-6)


# In a model

IDS, LABELS = np.array([[1, 2, 3], [4, 0, 6]], "int32"), np.array([[2, 3, 1], [0, 2, 3]], "int32")


def model(optimizer):
    """Its embedding has sparse gradients on TensorFlow."""
    keras.utils.set_random_seed(0)
    found = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(9, 4), keras.layers.Dense(5)])
    found.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return found


def test_a_token_that_comes_twice_has_the_sum_of_its_gradients():
    """As with a matrix product of one-hot rows. Keras's own Adam on TensorFlow squares the two one by one instead."""
    keras.utils.set_random_seed(0)
    rows = keras.Sequential([keras.Input((3, 9)), keras.layers.Dense(4, use_bias=False), keras.layers.Dense(5)])
    rows.compile(Adam(**NOAM), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tokens, repeated = model(Adam(**NOAM)), np.array([[1, 2, 1], [4, 1, 2]], "int32")
    rows.set_weights(tokens.get_weights())
    for _ in range(4):
        rows.train_on_batch(np.eye(9, dtype="float32")[repeated], LABELS)
        tokens.train_on_batch(repeated, LABELS)
    assert_close(tokens.get_weights(), rows.get_weights(), 1e-6)


@pytest.mark.parametrize(
    "ours, options", [(Adam, dict(gradient_accumulation_steps=2)), (AdamW, dict(weight_decay=0.1, global_clipnorm=0.5))]
)
def test_a_model_trains_as_with_keras(ours, options):
    models = [model(make(**options, **NOAM)) for make in (ours, PAIRS[ours])]
    start = models[0].get_weights()
    losses = [[float(m.train_on_batch(IDS, LABELS)) for _ in range(6)] for m in models]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert losses[0][-1] < losses[0][0]
    assert_close(models[0].get_weights(), models[1].get_weights(), 1e-6)
    moved = np.abs(models[0].get_weights()[0] - start[0]).max(axis=1) > 0
    seen = np.isin(np.arange(9), IDS)
    np.testing.assert_array_equal(moved, seen | (ours is AdamW))  # the decay moves rows without a gradient, too


def test_a_compiled_model_goes_on_from_its_file_as_if_never_saved(tmp_path):
    saved = model(AdamW(weight_decay=0.1, **NOAM))
    for _ in range(2):
        saved.train_on_batch(IDS, LABELS)
    saved.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is AdamW
    assert_close([numpy(v) for v in loaded.optimizer.variables], [numpy(v) for v in saved.optimizer.variables], 0)
    for _ in range(2):
        for m in (saved, loaded):
            m.train_on_batch(IDS, LABELS)
    assert int(loaded.optimizer.iterations) == 4
    assert_close(loaded.get_weights(), saved.get_weights(), tolerance=0)

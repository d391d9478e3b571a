"""The checks pass what is right and name what is wrong: one planted fault for each, in an otherwise good layer."""

import zlib

import keras
import numpy as np
import pytest
from keras import layers, ops

from llmfound import testing
from llmfound.base import Layer, Model
from llmfound.testing import assert_close, check_layer, check_model, fixture, set_weights_by_path

ALL = list(testing.CHECKS)


def only(*names):
    """The checks to skip so that those are left."""
    return {name: "not under test" for name in ALL if name not in names}


# fixture


def test_fixture_gives_the_published_numbers():
    assert zlib.crc32(b"x") == 2363233923
    assert_close(fixture("x", (3,)), np.array([0.21850054, 0.13793418, 0.25830092]), 1e-8)


@pytest.mark.parametrize("name", ["x", "dec.1.ffn.w2", "œuf 日本"])
def test_fixture_is_exact_for_large_arrays(name):
    w = fixture(name, (300, 300))
    c = zlib.crc32(name.encode("utf-8"))
    for k in (1, 2, 299, 300, 301, 65_537, 90_000):
        exact = ((k * k * (2 * c + 1) + 2654435761 * k) % 2**32) / 2**32 - 0.5
        assert w[(k - 1) // 300, (k - 1) % 300] == exact
    assert w.dtype == "float64" and w.min() >= -0.5 and w.max() < 0.5
    assert abs(w.mean()) < 0.01 and abs(w.std() - 12**-0.5) < 0.01
    np.testing.assert_array_equal(fixture(name, (300, 300), norm_scale=True), w + 1)
    np.testing.assert_array_equal(fixture(name, (90_000,)), w.ravel())


def test_fixture_of_no_dimension_and_of_no_element():
    assert fixture("x", ()).shape == () and fixture("x", ()) == fixture("x", (1,))[0]
    assert fixture("x", (0, 3)).shape == (0, 3)


# assert_close


@pytest.mark.parametrize(
    "actual, expected",
    [
        (1.0, 1.0 + 1.9e-5),
        (1e6, 1e6 + 9.0),
        (np.array([np.inf, -np.inf, 2.0]), np.array([np.inf, -np.inf, 2.0])),
        (np.array([True, False]), np.array([1, 0])),
        (np.zeros((0, 3)), np.zeros((0, 3))),
        ({"a": [np.ones(2), 3]}, {"a": [np.ones(2, "float32"), 3.0]}),
    ],
    ids=str,
)
def test_what_is_close(actual, expected):
    assert_close(actual, expected)
    assert_close(keras.tree.map_structure(ops.convert_to_tensor, actual), expected, 1e-4)


@pytest.mark.parametrize(
    "actual, expected, message",
    [
        (1.0, 1.0 + 2.1e-5, r"values: 1 of 1 differ by more than 1e-05 \(1 \+ \|expected\|\)"),
        (np.array([np.nan]), np.array([np.nan]), r"absolute difference nan at \(0,\) \(nan, expected nan\)"),
        (np.array([np.inf]), np.array([-np.inf]), r"inf at \(0,\) \(inf, expected -inf\)"),
        (np.array([1.0]), np.array([np.inf]), r"\(1, expected inf\)"),
        (np.zeros(3), np.zeros((1, 3)), r"the shape is \(3,\); expected \(1, 3\)"),
        (np.zeros(()), np.zeros((1,)), r"the shape is \(\); expected \(1,\)"),
        ([np.zeros(1)], [np.zeros(1), np.zeros(1)], r"the structure is \['\[0\]'\]; expected \['\[0\]', '\[1\]'\]"),
        ({"a": np.zeros(1)}, {"b": np.zeros(1)}, "the structure is"),
        ({"a": (np.zeros(1), np.ones(2))}, {"a": (np.zeros(1), np.zeros(2))}, r"values\['a'\]\[1\]: 2 of 2"),
    ],
)
def test_what_is_not_close(actual, expected, message):
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected)


def test_the_message_says_how_far_and_where():
    expected = np.array([[1.0, 1000.0], [0.001, 2.0]])
    message = (
        r"^logits: 3 of 4 differ by more than 0\.001 .*; "
        r"largest absolute difference 50 at \(0, 1\) \(1050, expected 1000\), "
        r"largest relative difference 3 at \(1, 0\) \(0\.004, expected 0\.001\)\.$"
    )
    with pytest.raises(AssertionError, match=message):
        assert_close(expected + np.array([[0.5, 50.0], [0.003, 0.0]]), expected, 1e-3, "logits")


# set_weights_by_path


def tower():
    model = keras.Sequential(
        [keras.Input((2,)), layers.Dense(3, name="first"), layers.Dense(3, name="second")], name="tower"
    )
    return model


NAMES = {"first/kernel": (2, 3), "first/bias": (3,), "second/kernel": (3, 3), "second/bias": (3,)}


def test_weights_are_set_by_the_ends_of_their_paths():
    model = tower()
    arrays = {name: fixture(name, shape) for name, shape in NAMES.items()}
    set_weights_by_path(model, arrays)
    for weight, expected in zip(model.weights, arrays.values()):
        assert_close(weight, expected, 1e-7)
    set_weights_by_path(model.layers[0], {"kernel": np.ones((2, 3)), "bias": np.zeros(3)})
    assert_close(model.layers[0].kernel, np.ones((2, 3)), 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"second/bias": None}, r"second/bias \(3,\) is named by nothing"),
        ({"second/bias": (4,)}, r"second/bias is \(3,\), second/bias is \(4,\)"),
        ({"third/bias": (3,)}, r"third/bias \(3,\) names no weight"),
        ({"econd/bias": (3,)}, r"econd/bias \(3,\) names no weight"),
        ({"bias": (3,)}, r"second/bias \(3,\) is named by second/bias and bias"),
        ({"first/bias": None, "second/bias": None, "bias": (3,)}, "bias names tower/first/bias and tower/second/bias"),
    ],
)
def test_each_weight_must_be_set_exactly_once(change, message):
    model = tower()
    before = model.get_weights()
    shapes = {name: shape for name, shape in {**NAMES, **change}.items() if shape is not None}
    with pytest.raises(ValueError, match=f"Each weight must be set exactly once: .*{message}"):
        set_weights_by_path(model, {name: fixture(name, shape) for name, shape in shapes.items()})
    assert_close(model.get_weights(), before, 0)


def test_weights_must_exist_to_be_set():
    with pytest.raises(ValueError, match="late has no weights; call it once so that they exist"):
        set_weights_by_path(layers.Dense(3, name="late"), {"kernel": np.ones((2, 3))})


# check_layer


class Mix(Layer):
    """y_t = tanh(W x_t) + the mean over real positions of V x; every fault below is a subclass of it."""

    def __init__(self, units, rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.own = layers.Dense(units, activation="tanh", name="own", dtype=self.policy())
        self.shared = layers.Dense(units, name="shared", dtype=self.policy())
        self.dropout = layers.Dropout(rate, name="dropout", dtype=self.policy())

    def policy(self):
        return self.dtype_policy

    def mean(self, x, mask):
        weights = ops.cast(mask, x.dtype)[..., None]
        return ops.sum(x * weights, axis=1, keepdims=True) / ops.maximum(ops.sum(weights, axis=1, keepdims=True), 1)

    def call(self, x, mask=None, training=None):
        return self.dropout(self.own(x), training=training) + self.mean(self.shared(x), mask)


class IgnoresMask(Mix):
    def mean(self, x, mask):
        return ops.mean(x, axis=1, keepdims=True)


class DividesByZero(Mix):
    def mean(self, x, mask):
        weights = ops.cast(mask, x.dtype)[..., None]
        return ops.sum(x * weights, axis=1, keepdims=True) / ops.sum(weights, axis=1, keepdims=True)


class StopsGradient(Mix):
    def mean(self, x, mask):
        return super().mean(ops.stop_gradient(x), mask)


class CutsInput(Mix):
    def call(self, x, mask=None, training=None):
        return super().call(ops.stop_gradient(x), mask, training)


class TurnsMask(Mix):
    def compute_mask(self, x, mask=None):
        return None if mask is None else ops.logical_not(mask)


class TimesZero(Mix):
    def call(self, x, mask=None, training=None):
        return super().call(x, mask, training) * 0.0


class ForgetsUnits(Mix):
    def get_config(self):
        return {name: value for name, value in super().get_config().items() if name != "units"}


class ForgetsRate(Mix):
    def get_config(self):
        return {name: value for name, value in super().get_config().items() if name != "rate"}


class NoJSON(Mix):
    def get_config(self):
        return {**super().get_config(), "units": np.float32(2)}


class IgnoresDtype(Mix):
    def policy(self):
        return None


class GivesFloat32(Mix):
    def call(self, x, mask=None, training=None):
        return ops.cast(super().call(x, mask, training), "float32")


class LosesPrecision(Mix):
    def call(self, x, mask=None, training=None):
        return super().call(x, mask, training) * (1.25 if self.compute_dtype == "bfloat16" else 1.0)


class IsRandom(Mix):
    def call(self, x, mask=None, training=True):
        return super().call(x, mask, training)


class GivesNaN(Mix):
    def call(self, x, mask=None, training=None):
        return ops.sqrt(super().call(x, mask, training))


class WrongShape(Mix):
    def compute_output_spec(self, x, mask=None, training=None):
        return keras.KerasTensor((*x.shape[:2], 7), self.compute_dtype)


class Shares(Mix):
    def __deepcopy__(self, memo):
        return self


class KeepsTensor(Mix):
    kept = None

    def call(self, x, mask=None, training=None):
        before = self.kept
        if self.built:
            self.kept = mask
        return super().call(x, mask if before is None else before, training)


class FixesLength(Mix):
    def build(self, x_shape, mask_shape=None):
        self.position = self.add_weight(shape=(x_shape[1] or 1, 2), name="position")
        self.own.build(x_shape)
        self.shared.build(x_shape)

    def call(self, x, mask=None, training=None):
        return super().call(x, mask, training) + self.position


class SavesLess(Mix):
    def build(self, x_shape, mask_shape=None):
        self.scale = self.add_weight(shape=(2,), name="scale", initializer="ones")

    def call(self, x, mask=None, training=None):
        return super().call(x, mask, training) * self.scale

    def save_own_variables(self, store):
        pass

    def load_own_variables(self, store):
        pass


class BuildsLate(Mix):
    def __init__(self, units, rate=0.0, **kwargs):
        super().__init__(units, rate, **kwargs)
        self.late = layers.Dense(units, name="late", dtype=self.dtype_policy)

    def call(self, x, mask=None, training=None):
        y = super().call(x, mask, training)
        return self.late(y) if training else y


X = fixture("x", (3, 5, 4)).astype("float32")
MASK = np.arange(5) < np.array([[5], [3], [1]])
INPUTS = {"x": X, "mask": MASK}


def test_a_good_layer_passes_every_check():
    report = check_layer(lambda: Mix(2, 0.5, name="mix"), INPUTS, mask="mask", expected_shape=(3, 5, 2))
    assert report.done == ALL and not report.skipped
    assert str(report) == f"check_layer(mix): {', '.join(ALL)}"


@pytest.mark.parametrize(
    "kind, name, message",
    [
        (GivesNaN, "output", r"output: \d+ of 30 are not finite, first nan at \(0, "),
        (IsRandom, "deterministic", "output of a second call: .* differ by more than 1e-05"),
        (WrongShape, "spec", r"compute_output_spec says \[\(\(3, 5, 7\), 'float32'\)\] for a batch of 3; the"),
        (ForgetsUnits, "config", "TypeError: .* missing 1 required positional argument: 'units'"),
        (ForgetsRate, "config", r"after .* \(get_config lacks rate\), Dropout\.rate is 0\.0, was 0\.5\.$"),
        (NoJSON, "config", "TypeError: Object of type float32 is not JSON serializable"),
        (Shares, "copy", "output after a change to the deepcopy: 30 of 30 differ"),
        (KeepsTensor, "functional", "Error"),
        (FixesLength, "variable_length", "Error"),
        (SavesLess, "save", "output after save and load: .* differ"),
        (GivesFloat32, "mixed_bfloat16", r"the outputs are \['float32'\]; expected bfloat16_output='bfloat16'"),
        (LosesPrecision, "mixed_bfloat16", r"output \(largest is 1\): .* differ by more than 0\.05"),
        (IgnoresDtype, "dtype", "with dtype=.* the outputs are .*float32.*; as global policy .*bfloat16"),
        (TimesZero, "fit", r"the loss was (\S+) in a step of fit, and \1 in the next one on the same batch"),
        (BuildsLate, "fit", "Error"),
        (StopsGradient, "gradient", r"no gradient reaches .*shared/kernel \(4, 2\); all of it is zero"),
        (CutsInput, "gradient", r"no gradient reaches \S*input_x \(3, 5, 4\); all of it is zero"),
        (TurnsMask, "mask", "the input's mask is .*True.*, and the output's is .*False"),
        (IgnoresMask, "padding", "output at real positions, after a change of what mask hides and 3 padded positions"),
        (DividesByZero, "all_padding", "output where row 0 of mask is all padding: 10 of 30 are not finite"),
    ],
)
def test_a_fault_is_named(kind, name, message):
    with pytest.raises(AssertionError, match=rf"(?s)^check_layer\(mix\), {name}: .*{message}"):
        check_layer(lambda: kind(2, 0.5, name="mix"), INPUTS, mask="mask", skip=only(name))


def test_arguments_may_come_in_order_and_other_shapes_are_refused():
    skip = only("output")
    report = check_layer(lambda: Mix(2), (X, MASK), expected_shape=[(3, 5, 2)], skip=skip)
    assert report.done == ["output"]
    message = r"the output has shape \[\(3, 5, 2\)\]; expected_shape is \(3, 5, 4\)"
    with pytest.raises(AssertionError, match=message):
        check_layer(lambda: Mix(2), (X, MASK), expected_shape=(3, 5, 4), skip=skip)


def test_a_layer_that_carries_its_state_on_is_judged_from_its_start():
    skip = dict.fromkeys(set(ALL) - {"deterministic", "functional", "variable_length", "save"}, "another matter")
    report = check_layer(
        lambda: layers.LSTM(2, stateful=True, return_sequences=True), {"sequences": X, "mask": MASK}, mask="mask",
        skip=skip,
    )  # fmt: skip
    assert set(report.done) == set(ALL) - set(skip)


def test_what_is_not_checked_is_reported():
    reasons = {"fit": "it has a reason", "save": "so has this"}
    report = check_layer(lambda: layers.Activation("tanh", name="plain"), (X,), skip=reasons)
    none = {"variable_length", "padding", "all_padding"}
    mask = "no argument mask= that tells padding"
    assert report.skipped == {**reasons, "mask": mask, **dict.fromkeys(none, testing.NO_PADDING)}
    assert set(report.done) == set(ALL) - set(report.skipped)
    assert "\n  fit skipped: it has a reason\n" in str(report)


def mix():
    return Mix(2, name="mix")


SAME = mix()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: check_layer(mix, INPUTS, mask="no"), ValueError, r"mask must name .* \['x', 'mask'\]; got 'no'"),
        (lambda: check_layer(mix, INPUTS, mask="x"), ValueError, "mask must name a bool .*got 'x'"),
        (lambda: check_layer(mix, list(INPUTS.values())), ValueError, "inputs must be a dict .*; got <class 'list'>"),
        (lambda: check_layer(mix, {"x": 3}), ValueError, "The inputs must hold NumPy arrays; got {'x': 3}"),
        (lambda: check_layer(mix, INPUTS, skip={"speed": "slow"}), ValueError, "checks: .*; got {'speed'"),
        (lambda: check_layer(mix, INPUTS, skip={"fit": ""}), ValueError, "reason for leaving it out"),
        (
            lambda: check_layer(lambda: SAME, INPUTS, skip=only("dtype")),
            AssertionError,
            "make must return a new object",
        ),
        (lambda: check_model(Bag, [IDS, LABELS]), ValueError, r"batch must be \(inputs, labels\) or .*list"),
        (lambda: check_model(Bag, (IDS,)), ValueError, "batch must be"),
    ],
)
def test_wrong_use(call, error, message):
    with pytest.raises(error, match=message):
        call()


# check_model


class Bag(Model):
    """Logits from each token and the mean of all real ones, in each of its inputs."""

    def __init__(self, vocab_size=7, names=("token_ids",), rate=0.0, **kwargs):
        self.names = list(names)
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(vocab_size, 4, name="embedding", dtype=self.dtype_policy)
        self.dropout = layers.Dropout(rate, name="dropout", dtype=self.dtype_policy)
        self.head = layers.Dense(vocab_size, name="head", dtype="float32")

    def input_signature(self):
        return dict.fromkeys(self.names, (None,))

    def weights_of(self, ids):
        return ops.cast(ops.not_equal(ids, 0), self.compute_dtype)[..., None]

    def call(self, inputs, training=None):
        y = 0.0
        for name in self.names:
            x, weights = self.embedding(inputs[name]), self.weights_of(inputs[name])
            y = y + ops.sum(x * weights, axis=1, keepdims=True) / ops.maximum(ops.sum(weights, 1, keepdims=True), 1)
        return self.head(self.dropout(x, training=training) + y)


class ReadsPadding(Bag):
    def weights_of(self, ids):
        return ops.ones_like(super().weights_of(ids))


class DividesByNone(Bag):
    def call(self, inputs, training=None):
        real = ops.sum(self.weights_of(inputs["token_ids"]), axis=1, keepdims=True)
        return super().call(inputs, training) / real


class RoundedLogits(Bag):
    def call(self, inputs, training=None):
        return ops.cast(super().call(inputs, training), self.compute_dtype)


class ClonesWrongly(Bag):
    @classmethod
    def from_config(cls, config):
        return super().from_config({**config, "rate": 0.0})


class BuildsLater(Bag):
    """A model is built on two tokens; this one makes a weight when it first sees more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.later = layers.Dense(7, name="later", dtype="float32")

    def call(self, inputs, training=None):
        y = super().call(inputs, training)
        return self.later(y) if inputs["token_ids"].shape[1] > 2 else y


IDS = {"token_ids": np.array([[3, 1, 4, 1, 5], [2, 6, 5, 0, 0], [3, 5, 0, 0, 0]])}
LABELS = np.array([[1, 4, 1, 5, 2], [6, 5, 3, 0, 0], [5, 2, 0, 0, 0]])


def test_a_good_model_passes_every_check():
    report = check_model(lambda: Bag(rate=0.5, name="bag"), (IDS, LABELS), expected_shape=(3, 5, 7))
    assert report.done == [name for name in ALL if name != "mask"]
    assert report.skipped == {"mask": "no argument mask= that tells padding"}


def test_a_model_of_two_lengths_with_weights_of_the_samples():
    inputs = {"source_ids": np.array([[3, 1, 4, 0], [2, 0, 0, 0], [1, 2, 0, 0]]), **IDS}
    make = lambda: Bag(names=["source_ids", "token_ids"])  # noqa: E731
    skip = only("fit", "gradient", "padding", "all_padding")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    report = check_model(make, (inputs, LABELS, np.arange(15.0).reshape(3, 5)), loss=loss, skip=skip)
    assert report.done == ["fit", "gradient", "padding", "all_padding"]


def test_a_model_without_padding():
    report = check_model(
        ReadsPadding, (IDS, LABELS), pad_id=None, skip=only("variable_length", "padding", "all_padding")
    )
    assert report.skipped["padding"] == testing.NO_PADDING and report.done == []


@pytest.mark.parametrize(
    "make, name, message",
    [
        (ReadsPadding, "padding", "output at real positions, after a change of the inputs of length 5 and 3 padded"),
        (DividesByNone, "all_padding", "output where row 0 of the inputs of length 5 is all padding: 35 of 105"),
        (RoundedLogits, "mixed_bfloat16", r"the outputs are \['bfloat16'\]; expected bfloat16_output='float32'"),
        (lambda: ClonesWrongly(rate=0.5), "config", r"Dropout\.rate is 0\.0, was 0\.5"),
        (lambda: ClonesWrongly(rate=0.5), "copy", r"after clone_model, Dropout\.rate is 0\.0, was 0\.5"),
        (BuildsLater, "save", ""),
    ],
)
def test_a_fault_of_a_model_is_named(make, name, message):
    with pytest.raises(AssertionError, match=rf"(?s)^check_model\(.*\), {name}: .*{message}"):
        check_model(make, (IDS, LABELS), skip=only(name))

"""Kernels: every body, plain or native, equals the definition in NumPy, in value and gradient."""

import inspect
import itertools
import math
import os
import pathlib
import runpy
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from keras import ops

from llmfound import kernels
from llmfound.kernels import reference
from llmfound.random import portable
from llmfound.testing import assert_close, fixture


def numpy(x):
    return ops.convert_to_numpy(x)


def bodies(name):
    """The plain body and, if there is one, the native one in force."""
    return list(dict.fromkeys([getattr(reference, name), getattr(kernels, name)]))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# Gradients without a framework


class Expose(keras.optimizers.SGD):
    """Keeps each weight's gradient in its momentum: the one way to it that every backend has.

    Not in the weight itself: TensorFlow's dependency optimiser may let the assignment overtake a read.
    """

    def __init__(self):
        super().__init__(1.0, momentum=0.5)

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.momentums[self._get_variable_index(variable)], gradient)


class Probe(keras.Model):
    """function(*weights); its loss is the sum of the output's elements, each times its own factor."""

    def __init__(self, function, values):
        super().__init__()
        self.function = function
        self.arguments = [self.add_weight(shape=v.shape, name=f"x{i}") for i, v in enumerate(values)]
        self.set_weights(values)

    def call(self, _):
        return self.function(*[ops.convert_to_tensor(x) for x in self.arguments])

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.sum(ops.multiply(ops.cast(y_pred, "float32"), factors(y_pred.shape)))


def factors(shape):
    return fixture("factors", tuple(shape)).astype("float32")


def gradients(function, *values):
    return exposed(Probe(function, values))


def exposed(model):
    model.compile(Expose())
    model.train_on_batch(np.zeros((1, 1), "float32"))
    return [numpy(momentum) for momentum in model.optimizer.momentums]


def numeric_gradients(function, *values, step=1e-5):
    """Central differences of a NumPy function, in float64."""
    values = [v.astype("float64") for v in values]
    found = []
    for value in values:
        gradient = np.zeros_like(value)
        for index in np.ndindex(*value.shape):
            sums = []
            for sign in (1, -1):
                kept, value[index] = value[index], value[index] + sign * step
                output = function(*values)
                sums.append((output * fixture("factors", output.shape)).sum())
                value[index] = kept
            gradient[index] = (sums[0] - sums[1]) / (2 * step)
        found.append(gradient)
    return found


def assert_equals_numpy(name, definition, *values, call=lambda body: body, value_tolerance=1e-6):
    """Holds every body of a kernel, called as `call` says, against its definition in NumPy."""
    expected = numeric_gradients(definition, *values)
    for body in bodies(name):
        what = f"{body.__module__}.{name}"
        constants = [ops.convert_to_tensor(v) for v in values]
        actual = call(body)(*constants)
        assert_close(actual, definition(*values), value_tolerance, what)
        assert_close(gradients(call(body), *values), expected, 1e-5, f"gradient of {what}")
    if keras.backend.backend() == "torch":  # where each argument may be differentiated or not
        for i in range(len(values)):
            found = gradients(lambda x: call(body)(*constants[:i], x, *constants[i + 1 :]), values[i])  # noqa: B023
            assert_close(found, expected[i : i + 1], 1e-5, f"gradient of {what} by argument {i} alone")


# The choice of bodies


@pytest.mark.parametrize("name", kernels.native.__all__)
def test_every_override_has_a_test_here(name):
    source = pathlib.Path(__file__).read_text()
    assert f'"{name}"' in source or f"kernels.{name}(" in source


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the other backends compile each of them")
def test_every_benchmark_runs(monkeypatch):
    folder = pathlib.Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    cases = runpy.run_path(folder / "kernels.py")
    for call in cases["build"](cases["SMOKE"]).values():
        call()


@pytest.mark.parametrize("name", kernels.native.__all__)
def test_an_override_takes_the_arguments_of_its_reference(name):
    assert inspect.signature(getattr(kernels.native, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("name", reference.__all__)
def test_the_override_is_in_force(name):
    native = name in kernels.native.__all__
    assert getattr(kernels, name) is getattr(kernels.native if native else reference, name)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_environment_switches_all_overrides_off():
    code = """
from llmfound import kernels
from llmfound.kernels import reference
print([name for name in reference.__all__ if getattr(kernels, name) is not getattr(reference, name)])
"""
    result = python(code, LLMFOUND_KERNELS="reference")
    assert result.stdout.strip() == "[]", result.stderr


def test_only_torch_calls_layers_directly():
    layer, x = keras.layers.Dense(3), ops.convert_to_tensor(random(2, 3))
    layer(x)
    assert not reference.direct_call(layer, (x,), {})
    on_torch = keras.backend.backend() == "torch"
    assert kernels.direct_call(layer, (x,), {"mask": None, "training": True}) == on_torch
    for args, kwargs in [((random(2, 3),), {}), ((x, 1), {}), (([x],), {}), ((x,), {"bias": random(2, 3)})]:
        assert not kernels.direct_call(layer, args, kwargs)


def test_a_backend_without_kernels_is_refused():
    result = python("import llmfound", KERAS_BACKEND="numpy")
    message = "ValueError: llmfound runs on jax, tensorflow, torch; got KERAS_BACKEND='numpy'."
    assert result.returncode == 1 and result.stderr.strip().endswith(message), result.stderr


# Softmax and attention


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4), (5, 4)])
def test_dense(shape, bias):
    values = random(*shape), random(4, 3, seed=1), *([random(3, seed=2)] if bias else [])
    assert_equals_numpy("dense", lambda x, kernel, bias=0: x @ kernel + bias, *values)


def test_layer_norm():
    def definition(x, gamma=1, beta=0):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * gamma + beta

    def call(body):
        return lambda x, gamma=None, beta=None: body(x, gamma, beta, 1e-3)

    x, gamma, beta = random(2, 3, 6), random(6, seed=1), random(6, seed=2)
    assert_equals_numpy("layer_norm", definition, x, gamma, beta, call=call, value_tolerance=2e-6)
    assert_equals_numpy("layer_norm", definition, x, call=call, value_tolerance=2e-6)


@pytest.mark.parametrize("length", [1, 3])
def test_heads_are_split_and_joined(length):
    x = random(2, length, 6)
    heads = x.reshape(2, length, 3, 2).transpose(0, 2, 1, 3)
    for body in bodies("split_heads"):
        assert_close(body(ops.convert_to_tensor(x), 3), heads, 0)
    for body in bodies("join_heads"):
        assert_close(body(ops.convert_to_tensor(heads)), x, 0)


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def masked(scores, mask):
    return scores if mask is None else np.where(mask, scores, -1e30)


MASKS = {
    "none": None,
    "padding": np.array([[1, 1, 0, 0], [0, 1, 1, 1]], bool)[:, None, None],
    "causal": np.tri(3, 4, 1, dtype=bool)[None, None],
    "a row of nothing": np.array([[0, 0, 0, 0], [1, 1, 1, 0]], bool)[:, None, None],
}
BIASES = {"none": None, "heads": random(1, 2, 3, 4, seed=7), "batch": random(2, 1, 1, 4, seed=8)}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_softmax(mask):
    def call(body):
        return lambda scores: body(scores, None if mask is None else ops.convert_to_tensor(mask))

    scores = random(2, 2, 3, 4)
    assert_equals_numpy("masked_softmax", lambda s: softmax(masked(s, mask)), scores, call=call)


@pytest.mark.parametrize("body", bodies("masked_softmax"))
def test_masked_softmax_gives_float32_and_rows_that_sum_to_one(body):
    scores = ops.cast(30 * random(5, 7), "bfloat16")
    weights = body(scores, np.arange(7) < 3)
    assert weights.dtype == body(scores).dtype == ops.zeros((), "float32").dtype
    assert numpy(weights)[:, 3:].max() == 0
    np.testing.assert_allclose(numpy(weights).sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(numpy(body(scores, np.zeros(7, bool))), np.float32(1 / 7))
    np.testing.assert_array_equal(numpy(body(scores[:, :1], np.zeros(1, bool))), 1)


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_dot_product_attention(mask, bias):
    query, key, value = random(2, 2, 3, 4), random(2, 2, 4, 4, seed=1), random(2, 2, 4, 3, seed=2)

    def weights(query, key):
        scores = np.einsum("bhqd,bhkd->bhqk", query, key) / np.sqrt(4)
        return softmax(masked(scores if bias is None else scores + bias, mask))

    def attention(query, key, value):
        return np.einsum("bhqk,bhkd->bhqd", weights(query, key), value)

    def call(body):
        return lambda *arrays: body(*arrays, *(None if x is None else ops.convert_to_tensor(x) for x in (mask, bias)))

    assert_equals_numpy("dot_product_attention", attention, query, key, value, call=call)
    if mask is None or bias is None:
        assert_equals_numpy("attention_weights", weights, query, key, call=call)


@pytest.mark.parametrize("body", bodies("attention_weights"))
def test_a_score_beyond_float16_is_masked_as_others_are(body):
    query = ops.convert_to_tensor(np.full((1, 2, 1, 4), 200, "float16"))
    key = ops.convert_to_tensor(np.array([-6e4, 0, 6e4], "float16")[:, None] * np.ones((1, 2, 3, 4), "float16"))
    weights = body(query, key, ops.convert_to_tensor(np.array([True, True, False])[None, None, None]))
    np.testing.assert_array_equal(numpy(weights)[0, 0, 0], [0, 1, 0])


def test_a_bias_is_learnt():
    query, key, value = random(1, 2, 3, 4), random(1, 2, 4, 4, seed=1), random(1, 2, 4, 3, seed=2)

    def attention(bias):
        scores = np.einsum("bhqd,bhkd->bhqk", query, key) / np.sqrt(4) + bias
        return np.einsum("bhqk,bhkd->bhqd", softmax(scores), value)

    def call(body):
        return lambda bias: body(*map(ops.convert_to_tensor, (query, key, value)), None, bias)

    assert_equals_numpy("dot_product_attention", attention, BIASES["heads"], call=call)


@pytest.mark.parametrize("body", bodies("dot_product_attention"))
def test_attention_keeps_the_dtype_of_the_values(body):
    arrays = [ops.cast(random(2, 2, 3, 4, seed=i), "bfloat16") for i in range(3)]
    bias = ops.convert_to_tensor(BIASES["heads"][..., :3])
    heads = body(*arrays, bias=bias)
    assert keras.backend.standardize_dtype(heads.dtype) == "bfloat16"
    exact = reference.dot_product_attention(*[ops.cast(x, "float32") for x in arrays], bias=bias)
    assert_close(ops.cast(heads, "float32"), exact, 0.02)


# Cross-entropy


def cross_entropy(logits, labels, smoothing):
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    classes = logits.shape[-1]
    target = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    return -(target * log_p).sum(-1)


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_cross_entropy(smoothing, dtype):
    labels = np.array([[0, 4, 2], [1, 1, 3]])

    def call(body):
        return lambda logits: body(logits, ops.convert_to_tensor(labels.astype(dtype)), smoothing)

    assert_equals_numpy(
        "token_cross_entropy", lambda z: cross_entropy(z, labels, smoothing), 3 * random(2, 3, 5), call=call
    )


@pytest.mark.parametrize("body", bodies("token_cross_entropy"))
def test_token_cross_entropy_of_bfloat16_logits_is_computed_in_float32(body):
    labels = np.array([3, 0, 499])
    logits = ops.cast(5 * random(3, 500), "bfloat16")
    ids = ops.convert_to_tensor(labels)
    loss = body(logits, ids, 0.1)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    exact = cross_entropy(numpy(ops.cast(logits, "float32")).astype("float64"), labels, 0.1)
    assert_close(loss, exact, 2e-6)
    found, expected = (
        gradients(lambda z, f=f: f(ops.cast(z, "bfloat16"), ids, 0.1), numpy(ops.cast(logits, "float32")))
        for f in (body, reference.token_cross_entropy)
    )
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("body", bodies("token_cross_entropy"))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_cross_entropy_of_large_logits_is_finite(body, smoothing):
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], "float32")
    labels = np.array([1, 2])
    loss = body(ops.convert_to_tensor(logits), ops.convert_to_tensor(labels), smoothing)
    exact = cross_entropy(logits.astype("float64"), labels, smoothing)
    assert_close(loss, exact, 1e-4)  # the difference of two numbers near 1e4, in float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_cross_entropy_of_a_large_vocabulary(smoothing):
    """So large that the native body of torch takes three rows at a time, and the last alone."""
    logits, labels = 3 * random(7, 70_000), ops.convert_to_tensor(np.arange(7) * 11_000)
    losses, found = [], []
    for body in (kernels.token_cross_entropy, reference.token_cross_entropy):
        losses.append(body(ops.convert_to_tensor(logits), labels, smoothing))
        found.append(gradients(lambda z, body=body: body(z, labels, smoothing), logits)[0])
    assert_close(losses[0], losses[1], 1e-5)
    assert_close(found[0], found[1], 1e-6)


@pytest.mark.parametrize("body", bodies("token_cross_entropy"))
def test_token_cross_entropy_of_no_tokens(body):
    assert body(ops.zeros((0, 5)), ops.zeros((0,), "int32")).shape == (0,)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [-1, 5, 99])
def test_token_cross_entropy_of_a_label_outside_the_vocabulary_is_no_number(label, smoothing):
    logits, labels = ops.convert_to_tensor(random(3, 5)), ops.convert_to_tensor(np.array([1, label, 4]))
    if keras.backend.backend() == "torch":
        with pytest.raises(RuntimeError, match=f"index {label} is out of bounds"):
            kernels.token_cross_entropy(logits, labels, smoothing)
        return
    for body in bodies("token_cross_entropy"):
        np.testing.assert_array_equal(np.isnan(numpy(body(logits, labels, smoothing))), [False, True, False])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the other backends differentiate their own gradients")
def test_the_gradient_of_token_cross_entropy_can_be_differentiated():
    logits, labels = ops.convert_to_tensor(3 * random(3, 5)).requires_grad_(), ops.convert_to_tensor([0, 4, 2])
    second = []
    for body in (kernels.token_cross_entropy, reference.token_cross_entropy):
        body(logits, labels, 0.1).sum().backward(create_graph=True)
        first, logits.grad = logits.grad, None
        ops.sum(ops.square(first)).backward()
        second.append(numpy(logits.grad))
        logits.grad = None
    assert_close(second[0], second[1], 1e-5)


# Adam


@pytest.mark.parametrize("body", bodies("adam_update"))
@pytest.mark.parametrize("epsilon, decay", [(1e-9, 0.0), (1e-3, 0.0), (1e-9, 0.5)])
def test_adam_update(body, epsilon, decay):
    w, m, v = random(4, 3).astype("float64"), np.zeros((4, 3)), np.zeros((4, 3))
    variables = [keras.Variable(x.astype("float32")) for x in (w, m, v)]
    for step in range(1, 6):
        rate = 0.01 * step
        gradient = random(4, 3, seed=step) * 10.0 ** np.arange(-5, 1, 2)[: w.shape[1]].astype("float32")
        m += (1 - 0.9) * (gradient - m)
        v += (1 - 0.98) * (gradient.astype("float64") ** 2 - v)
        w -= rate * decay * w
        w -= rate * np.sqrt(1 - 0.98**step) / (1 - 0.9**step) * m / (np.sqrt(v) + epsilon)
        body(
            variables[:1], [ops.convert_to_tensor(gradient)], variables[1:2], variables[2:],
            ops.convert_to_tensor(rate), ops.convert_to_tensor(float(step)), 0.9, 0.98, epsilon, decay,
        )  # fmt: skip
        for variable, exact, what in zip(variables, (w, m, v), ("weights", "momentum", "velocity")):
            # the momentum of a float32 in torch's form, and 1 - 0.98^step, lose the last digits
            assert_close(numpy(variable.value), exact, 1e-6, f"{what} after step {step}")


@pytest.mark.parametrize("body", bodies("adam_update"))
def test_adam_update_of_bfloat16(body):
    """With a gradient that is always 1, the weight falls by the rate in every step."""
    variable, *moments = [keras.Variable(np.full(2, x, "float32"), dtype="bfloat16") for x in (1, 0, 0)]
    for step in range(1, 4):
        rate, step = (ops.convert_to_tensor(x) for x in (0.125, float(step)))
        body([variable], [ops.ones(2, "bfloat16")], *([x] for x in moments), rate, step, 0.9, 0.999, 1e-7)
    assert_close(numpy(ops.cast(variable.value, "float32")), np.full(2, 1 - 3 * 0.125), 0.01)


@pytest.mark.parametrize("body", bodies("adam_update"))
def test_adam_update_of_several_variables_of_two_dtypes(body):
    rows = [[keras.Variable(random(3, seed=i + j) ** 2, dtype=dtype) for j in range(3)]
            for i, dtype in enumerate(["float32", "bfloat16", "float32"])]  # fmt: skip
    gradients = [ops.convert_to_tensor(random(3, seed=9 + i)) for i in range(3)]
    alone = [[keras.Variable(variable.value, dtype=variable.dtype) for variable in row] for row in rows]
    options = ops.convert_to_tensor(0.1), ops.convert_to_tensor(3.0), 0.9, 0.98, 1e-6
    variables, momentums, velocities = zip(*rows)
    body(variables, gradients, momentums, velocities, *options)
    for row, gradient in zip(alone, gradients):
        reference.adam_update(row[:1], [gradient], row[1:2], row[2:], *options)
    for found, expected in zip(itertools.chain(*rows), itertools.chain(*alone)):
        assert found.dtype == expected.dtype
        tolerance = 0.02 if found.dtype == "bfloat16" else 1e-6
        assert_close(*(numpy(ops.cast(x.value, "float32")) for x in (found, expected)), tolerance)


@pytest.mark.parametrize("body", bodies("clip_gradients"))
@pytest.mark.parametrize("norm", [0.5, 100.0])
def test_clip_gradients(body, norm):
    arrays = [random(3), random(2, 4, seed=1), np.float32(2.0)]
    total = np.sqrt(sum((x.astype("float64") ** 2).sum() for x in arrays))
    for found, x in zip(body([ops.convert_to_tensor(x) for x in arrays], norm), arrays):
        assert_close(numpy(found), x * min(norm / total, 1), 1e-6)


@pytest.mark.parametrize("body", bodies("clip_gradients"))
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_clip_gradients_that_are_no_numbers(body, wrong):
    found = body([ops.convert_to_tensor(np.float32([1, wrong])), ops.ones(2)], 1.0)
    assert all(np.isnan(numpy(x)).all() for x in found)


@pytest.mark.parametrize("body", bodies("clip_gradients"))
def test_clip_gradients_of_two_dtypes_and_of_zeros(body):
    found = body([ops.full((3,), 3.0, "bfloat16"), ops.full((3,), 4.0)], 1.0)
    assert [keras.backend.standardize_dtype(x.dtype) for x in found] == ["bfloat16", "float32"]
    assert_close(numpy(found[1]), np.full(3, 4 / 75**0.5), 1e-5)
    assert not numpy(body([ops.zeros((3,))], 1.0)[0]).any()


@pytest.mark.parametrize("body", bodies("clip_gradients"))
def test_clip_gradients_leaves_the_callers_as_they_are(body):
    shared, row = ops.convert_to_tensor(random(3)), ops.convert_to_tensor(random(2, seed=1))
    arrays = [numpy(shared).copy(), numpy(shared).copy(), np.tile(numpy(row), (4, 1))]
    norm = np.sqrt(sum((x**2).sum() for x in arrays))
    found = body([shared, shared, ops.broadcast_to(row, (4, 2))], 0.5, variables_of(*arrays))
    assert_close(found, [x * 0.5 / norm for x in arrays], 1e-6)
    assert_close(shared, arrays[0], 0)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the other backends keep no gradients with variables")
def test_clip_gradients_of_the_variables_own_takes_no_memory():
    variables = variables_of(random(3), random(2, 4, seed=1))
    for variable in variables:
        variable.value.grad = ops.ones(variable.shape)
    gradients = [variable.value.grad for variable in variables]
    found = kernels.clip_gradients(gradients[1:], 0.5, variables)
    assert found[0] is gradients[1]
    assert_close(gradients, [np.ones(3), np.full((2, 4), 0.5 / 8**0.5)], 1e-6)


def variables_of(*arrays):
    return [keras.Variable(array) for array in arrays]


@pytest.mark.parametrize("body", bodies("update_if"))
@pytest.mark.parametrize("condition", [True, False])
def test_update_if(body, condition):
    variables = variables_of(random(3), random(2, 2))

    def update():
        for variable in variables:
            variable.assign_add(ops.ones(variable.shape))

    body(ops.convert_to_tensor(condition), update, variables)
    for variable, before in zip(variables, (random(3), random(2, 2))):
        assert (numpy(variable) == before + condition).all()


class Two(keras.Model):
    """Two outputs, dropout, a weight that nothing depends on, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(2, "tanh", kernel_regularizer="l2"), keras.layers.Dense(1)
        self.drop, self.frozen = keras.layers.Dropout(0.5), self.add_weight(shape=(2,), trainable=False)
        self.idle = self.add_weight(shape=(2,), name="idle")
        self(np.zeros((1, 3), "float32"))

    def call(self, x, training=None):
        hidden = self.drop(self.first(x), training=training) + self.frozen
        return {"hidden": hidden, "score": self.second(hidden)}


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_gradients(weighted):
    model = Two()
    for losses in ({"hidden": "mse", "score": "mae"}, {"hidden": "mae", "score": "mse"}):
        model.compile("adam", losses)
        check_loss_gradients(model, weighted)


def check_loss_gradients(model, weighted):
    x, y = random(4, 3), {"hidden": random(4, 2, seed=1), "score": 9 + random(4, 1, seed=2)}
    weights = {name: np.array([1, 2, 0, 1], "float32") for name in y} if weighted else None
    before = [numpy(weight) for weight in model.weights]
    found, expected = kernels.loss_gradients(model, x, y, weights), reference.loss_gradients(model, x, y, weights)
    assert [gradient.shape for gradient in found] == [tuple(w.shape) for w in model.trainable_weights]
    for one, other, weight in zip(found, expected, model.trainable_weights):
        assert_close(one, other, 2e-3, weight.path)  # differences of float32
        assert (weight.name == "idle") == (np.abs(one).max() == 0)
    assert_close([numpy(weight) for weight in model.weights], before, 1e-7)


@pytest.mark.parametrize("body", bodies("differentiate"))
def test_differentiate(body):
    """Whatever it says, the gradients that are wanted are right; on torch the others are none."""
    probe = Probe(lambda x, y: x * y, [random(3), random(3, seed=1)])
    first, second = probe.arguments
    assert body(first)
    off = not body(first, False)
    assert body(first) == (not off) and body(second)
    expected = factors((3,)) * random(3)
    if off:
        assert keras.backend.backend() == "torch"
        probe.compute_loss(y_pred=probe(np.zeros((1, 1), "float32"))).backward()
        assert first.value.grad is None
        assert_close(second.value.grad, expected)
    assert body(first, True)
    assert_close(exposed(probe)[1], expected)


# The cache


@pytest.mark.parametrize("body", bodies("write"))
@pytest.mark.parametrize("position", [0, 2, 4])
def test_write(body, position):
    cache, update = random(2, 3, 5, 4), random(2, 3, 1, 4, seed=1)
    expected = cache.copy()
    expected[:, :, position] = update[:, :, 0]
    written = body(ops.copy(ops.convert_to_tensor(cache)), ops.convert_to_tensor(update), position)
    np.testing.assert_array_equal(numpy(written), expected)


@pytest.mark.parametrize("body", bodies("write"))
def test_write_keeps_the_dtype_of_the_cache(body):
    written = body(ops.zeros((1, 1, 2, 3), "bfloat16"), ops.ones((1, 1, 1, 3), "float32"), 1)
    assert keras.backend.standardize_dtype(written.dtype) == "bfloat16"
    np.testing.assert_array_equal(numpy(ops.cast(written, "float32"))[0, 0], [[0] * 3, [1] * 3])


# Matrix products


@pytest.fixture
def precision_kept():
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("body", bodies("fast_matmul"))
def test_fast_matmul_leaves_products_exact(body, precision_kept):
    choice = body()
    assert isinstance(choice, str) and choice and body() == choice
    for n, k, m in [(256, 256, 256), (77, 300, 129), (1, 512, 1000)]:
        a, b = random(n, k), random(k, m, seed=1)
        exact = a.astype("float64") @ b.astype("float64")
        assert np.abs(numpy(ops.matmul(a, b)) - exact).max() / np.abs(exact).max() < 2e-6


def test_fast_matmul_takes_a_setting_back_that_loses_digits(precision_kept, monkeypatch):
    if keras.backend.backend() != "torch":
        assert kernels.fast_matmul is reference.fast_matmul  # which changes nothing
        return
    import torch

    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.full(shape, 1 / 3) + torch.eye(*shape) * 1e-3)
    multiply = torch.Tensor.__matmul__

    def rounding(a, b):  # a processor with bfloat16 units
        if a.dtype is torch.float32 and torch.get_float32_matmul_precision() == "medium":
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    torch.set_float32_matmul_precision("high")
    assert kernels.fast_matmul() == torch.get_float32_matmul_precision() == "high"


# Dropout


def drawn(rate, seed, shape, dtype="float32"):
    return numpy(ops.cast(kernels.dropout(ops.ones(shape, dtype), rate, seed), "float32"))


def mask(seed, shape=(100_000,), rate=0.5):
    return drawn(rate, seed, shape) > 0


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_dropout_rate_scale_and_expectation(rate):
    seed = keras.random.SeedGenerator(1)
    draws = np.stack([drawn(rate, seed, (1000, 1000)) for _ in range(4)])
    kept = draws > 0
    assert abs(kept.mean() - (1 - rate)) < 1e-3  # the mean of 4e6 elements: 4 standard deviations
    assert abs(draws.mean() - 1) < 2e-3
    np.testing.assert_allclose(draws[kept], 1 / (1 - rate), rtol=2e-5)  # torch meets the rate to 1/65536


@pytest.mark.parametrize("rate", [0.0, 0.999999])
def test_dropout_at_the_ends_of_its_range(rate):
    x = drawn(rate, keras.random.SeedGenerator(1), (1000,))
    assert np.isfinite(x).all() and (x > 0).mean() == (rate == 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dropout_keeps_shape_and_dtype(dtype):
    x = kernels.dropout(ops.full((3, 5, 7), 2.0, dtype), 0.5, keras.random.SeedGenerator(1))
    assert keras.backend.standardize_dtype(x.dtype) == dtype
    assert x.shape == (3, 5, 7)
    assert set(np.unique(numpy(ops.cast(x, "float32")))) == {0.0, 4.0}


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="keras.RematScope fails elsewhere, as with Keras's layers"
)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_forward_pass_that_is_repeated_drops_the_same(reentrant):
    """Three passes, one inside another, before their way back; None is keras.RematScope."""
    import torch

    def gradient(repeats):
        def repeated(f):
            if not repeats:
                return f
            if reentrant is None:
                return keras.remat(f)
            return lambda *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=reentrant)

        keras.utils.set_random_seed(3)
        first, second = keras.random.SeedGenerator(), keras.random.SeedGenerator()
        weight = torch.linspace(-1, 1, 64).reshape(8, 8).requires_grad_()

        def inner(x):
            return kernels.dropout(torch.tanh(kernels.dropout(x @ weight, 0.5, first)), 0.2, first)

        def outer(x):
            return kernels.dropout(torch.tanh(repeated(inner)(x)) @ weight, 0.3, second)

        passes = [repeated(outer)(torch.ones(4, 8, requires_grad=True)) for _ in range(3)]
        loss = sum((y * y).sum() for y in passes)
        loss.backward()
        return numpy(loss), numpy(weight.grad), numpy(first.state), numpy(second.state)

    for actual, expected in zip(gradient(True), gradient(False)):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_seed_repeats_its_masks_and_advances():
    first, second = (keras.random.SeedGenerator(5) for _ in range(2))
    masks = [mask(first, (1000,)) for _ in range(3)]
    for expected in masks:
        before = numpy(second.state.value).copy()
        np.testing.assert_array_equal(mask(second, (1000,)), expected)
        assert (numpy(second.state.value) != before).any()
    assert (masks[0] != masks[1]).any() and (masks[1] != masks[2]).any()


@pytest.mark.parametrize("body", bodies("truncated_normal"))
def test_truncated_normal_has_its_distribution(body):
    x = np.sort(numpy(body((1000, 300), 1.0, 0.5, "float32", keras.random.SeedGenerator(3))).ravel().astype("float64"))
    outside = ((x < -1e-5) | (x > 2 + 1e-5)).mean()
    assert outside < (1e-4 if body is reference.truncated_normal else 1e-9)  # Keras's on torch leaves 4 of a million
    assert x[5] < 1e-3 and x[-5] > 2 - 1e-3
    erf = np.vectorize(math.erf)
    cumulated = (erf((x - 1) / 0.5 / 2**0.5) / math.erf(2**0.5) + 1) / 2
    # Of Kolmogorov's statistic, times the root of 300,000: above 1.95 once in a thousand times.
    assert np.abs(cumulated - (np.arange(len(x)) + 0.5) / len(x)).max() < 1.95 / len(x) ** 0.5


@pytest.mark.parametrize("body", bodies("truncated_normal"))
def test_truncated_normal_repeats_what_a_number_gives_and_goes_on_with_a_generator(body):
    first, again, other = (numpy(body((50, 4), 0.0, 0.02, "float32", seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert abs(correlation(first, other)) < 0.5
    generator = keras.random.SeedGenerator(5)
    first, second = (numpy(body((50, 4), 0.0, 0.02, "float32", generator)) for _ in range(2))
    np.testing.assert_array_equal(first, numpy(body((50, 4), 0.0, 0.02, "float32", keras.random.SeedGenerator(5))))
    assert abs(correlation(first, second)) < 0.5


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_truncated_normal_has_the_dtype_that_is_asked_for(dtype):
    x = kernels.truncated_normal((3, 2), 0.0, 0.02, dtype, 1)
    assert keras.backend.standardize_dtype(x.dtype) == (dtype or "float32") and tuple(x.shape) == (3, 2)
    assert (np.abs(numpy(ops.cast(x, "float32"))) <= 0.0401).all()


def test_draws_and_seeds_are_independent():
    """Seven draws of each of three seeds; neighbouring seeds and the counter must not meet."""
    masks = []
    for seed in (0, 1, 2**30):  # Keras on TensorFlow takes 2^31 - 1 for 1
        generator = keras.random.SeedGenerator(seed)
        masks += [mask(generator) for _ in range(7)]
    found = np.corrcoef(np.stack(masks).reshape(21, -1))
    assert np.abs(found - np.eye(21)).max() < 5 / np.sqrt(100_000)


def test_neighbours_and_rows_are_independent():
    m = mask(keras.random.SeedGenerator(3), (500, 1000))
    limit = 5 / np.sqrt(m.size)
    for lag in range(1, 65):
        assert abs(correlation(m[:, lag:], m[:, :-lag])) < limit, f"along a row, {lag} apart"
        assert abs(correlation(m[lag:], m[:-lag])) < limit, f"{lag} rows apart"
    assert np.ptp(m.mean(0)) < 10 * 0.5 / np.sqrt(500) and np.ptp(m.mean(1)) < 10 * 0.5 / np.sqrt(1000)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="its generators are the caller's")
def test_processes_and_replicas_that_have_one_seed_draw_masks_of_their_own(monkeypatch):
    def mask(rank):
        if keras.backend.backend() == "torch":
            import torch

            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
            monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        else:
            import tensorflow as tf

            replica = types.SimpleNamespace(num_replicas_in_sync=3, replica_id_in_sync_group=rank)
            monkeypatch.setattr(tf.distribute, "get_replica_context", lambda: None if rank is None else replica)
        return numpy(kernels.dropout(ops.ones(1000), 0.5, keras.random.SeedGenerator(1))) > 0

    masks = [mask(rank) for rank in (0, 1, 2)]
    assert (mask(None) == masks[0]).all()
    for one, other in itertools.combinations(masks, 2):
        assert 400 < (one == other).sum() < 600


def test_dropout_passes_the_gradient_where_it_passed_the_value():
    """Of sum(y^2) / 2 the gradient is y dy/dx: x / (1 - p)^2 or 0, half of each, only if both use one mask."""
    x = random(100, 100) + 5
    generator = keras.random.SeedGenerator(1)

    class Squared(Probe):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.sum(ops.square(y_pred)) / 2

    model = Squared(lambda x: kernels.dropout(x, 0.5, generator), [x])
    gradient = exposed(model)[0]
    passed = gradient != 0
    assert abs(passed.mean() - 0.5) < 0.025
    np.testing.assert_allclose(gradient[passed], 4 * x[passed], rtol=1e-5)


def test_fit_draws_a_fresh_mask_at_every_step():
    """With rate 1/2 each step takes 2 from half of the weights, so their losses follow Binomial(8, 1/2)."""
    n, steps = 20_000, 8
    generator = keras.random.SeedGenerator(1)

    class Summed(Probe):
        def __init__(self):
            super().__init__(lambda w: kernels.dropout(w, 0.5, self.seed_generator), [np.zeros(n, "float32")])
            self.seed_generator = generator

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.sum(y_pred)

    model = Summed()
    model.compile(keras.optimizers.SGD(1.0))
    model.fit(np.zeros((steps, 1), "float32"), batch_size=1, epochs=1, verbose=0)
    hits = -model.get_weights()[0] / 2
    assert set(np.unique(hits)) == set(range(steps + 1))
    assert abs(hits.mean() - steps / 2) < 0.05 and abs(hits.var() - steps / 4) < 0.1
    assert int(numpy(generator.state.value)[1]) == steps


# Portable bits


def hashed(words, index):
    """The hash in Python's unbounded integers."""

    def mixed(x, key):
        x = (x + key) * 0x9E3779B9 % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    first = mixed(words[0], 1)
    second = mixed(words[1], first)
    return mixed(mixed(index, mixed(first, second)), second)


@pytest.mark.parametrize("words", [(0, 0), (5, 1), (2**31 - 1, 2**31), (2**32 - 1, 7)])
def test_portable_bits_equal_the_hash_in_python(words):
    words32 = np.array(words, "uint32").view("int32")
    expected = np.array([hashed(words, i) for i in range(60)], "uint32").view("int32").reshape(3, 4, 5)
    np.testing.assert_array_equal(kernels.portable_bits(words32, (3, 4, 5), np), expected)
    for body in bodies("portable_bits"):
        bits = body(ops.convert_to_tensor(words32), (3, 4, 5))
        assert keras.backend.standardize_dtype(bits.dtype) == "int32"
        np.testing.assert_array_equal(numpy(bits), expected)


def test_portable_bits_are_fair_and_independent():
    """Of 100,000: every bit, each pair of bits, neighbours, and what a flipped bit of the seed does (half of all)."""
    n, limit = 100_000, 5 / 100_000**0.5  # 5 standard errors of a correlation

    def signs(*words):
        bits = kernels.portable_bits(np.array(words, "int32"), (n,), np)
        assert len(np.unique(bits)) == n
        return ((bits[:, None] >> np.arange(32)) & 1).astype("float32") * 2 - 1

    for words in [(0, 0), (1, 0), (12345, 678)]:
        one = signs(*words)
        assert np.abs(one.mean(0)).max() < limit
        assert np.abs(one.T @ one / n - np.eye(32)).max() < limit
        for lag in (1, 2, 64, 1000):
            assert np.abs(one[lag:].T @ one[:-lag] / n).max() < 1.2 * limit  # of 16,000 pairs
        for other in [(words[0] ^ 1, words[1]), (words[0], words[1] ^ 1), (words[1] + 7, words[0])]:
            assert np.abs(one.T @ signs(*other) / n).max() < 1.2 * limit


@pytest.mark.parametrize(
    "law",
    [
        *[lambda rate=rate: test_dropout_rate_scale_and_expectation(rate) for rate in (0.1, 0.5)],
        lambda: test_dropout_at_the_ends_of_its_range(0.999999),
        lambda: test_dropout_keeps_shape_and_dtype("bfloat16"),
        lambda: test_a_seed_repeats_its_masks_and_advances(),
        lambda: test_draws_and_seeds_are_independent(),
        lambda: test_neighbours_and_rows_are_independent(),
        lambda: test_dropout_passes_the_gradient_where_it_passed_the_value(),
        lambda: test_fit_draws_a_fresh_mask_at_every_step(),
    ],
)
def test_portable_dropout_obeys_the_laws_of_the_native_one(law):
    with portable():
        law()


# Decoding


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_top_k_takes_the_first_of_equal_values(dtype):
    x = np.array([[1, 3, 3, 0, 3], [2, 2, 2, 2, 2], [5, 4, 3, 2, 1], [-0.0, 0, -1, 0, -0.0]], "float32")
    for k in (1, 2, 4, 5):
        values, indices = kernels.top_k(ops.convert_to_tensor(x, dtype), k)
        order = np.argsort(-x, axis=-1, kind="stable")[:, :k]
        np.testing.assert_array_equal(numpy(indices), order)
        np.testing.assert_array_equal(numpy(ops.cast(values, "float32")), np.take_along_axis(x, order, -1))
        assert keras.backend.standardize_dtype(indices.dtype) == "int32"


@pytest.mark.parametrize("body", bodies("unfold"))
@pytest.mark.parametrize("limit, taken", [(3, 3), (100, 6)])
def test_unfold_stops_when_told_or_when_the_record_is_full(body, limit, taken):
    def step(t, total):
        total = total + t
        return total, {"total": total, "square": ops.square(total)}, ops.any(total >= limit * (limit - 1) // 2)

    record = {"total": ops.zeros((6, 2), "int32"), "square": ops.zeros((6, 2), "int32")}
    total, record, steps = body(step, ops.zeros((2,), "int32"), record)
    expected = np.cumsum(np.arange(6)) * (np.arange(6) < taken)
    assert int(steps) == taken
    np.testing.assert_array_equal(numpy(total), expected.max())
    np.testing.assert_array_equal(numpy(record["total"]), np.stack([expected] * 2, 1))
    np.testing.assert_array_equal(numpy(record["square"]), np.stack([expected**2] * 2, 1))


def scaled(model, factor, inputs, offset):
    return {"y": model(inputs["x"]) * factor + offset}


@pytest.mark.parametrize("body", bodies("compiled"))
def test_compiled_follows_shapes_static_values_and_weights(body):
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    for rows, factor, seed in [(2, 3.0, 0), (4, 3.0, 1), (4, -1.0, 2)]:
        kernel, bias, x = random(3, 2, seed=seed), random(2, seed=seed + 9), random(rows, 3, seed=seed + 5)
        model.set_weights([kernel, bias])
        y = body(model, scaled, factor)({"x": x}, np.float32(0.5))["y"]
        assert isinstance(y, np.ndarray)
        assert_close(y, (x.astype("float64") @ kernel + bias) * factor + 0.5, 1e-6)


# Additive attention


def additive(query, keys, scale):
    return np.tanh(query[:, :, None] + keys[:, None]) @ scale


@pytest.fixture(params=[1, 2, 10**6], ids="{} queries at a time".format)
def at_once(request, monkeypatch):
    """How many queries of (2, 4, 5) keys `additive_scores` takes at a time."""
    chunk_bytes = dict.fromkeys(reference.CHUNK_BYTES, 4 * 2 * 4 * 5 * request.param)
    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk_bytes)


@pytest.mark.parametrize("queries", [1, 3])
def test_additive_scores(queries, at_once):
    values = random(2, queries, 5), random(2, 4, 5, seed=1), random(5, seed=2)
    assert_equals_numpy("additive_scores", additive, *values)


@pytest.mark.parametrize("learnt", range(3))
def test_additive_scores_of_constants(learnt, at_once):
    values = [random(2, 3, 5), random(2, 4, 5, seed=1), random(5, seed=2)]

    def put(body, convert=lambda x: x):
        return lambda x: body(*[x if i == learnt else convert(v) for i, v in enumerate(values)])

    assert_equals_numpy(
        "additive_scores", put(additive), values[learnt], call=lambda body: put(body, ops.convert_to_tensor)
    )


@pytest.mark.parametrize("body", bodies("additive_scores"))
def test_additive_scores_far_from_zero(body, at_once):
    query, keys, scale = 1e3 * random(2, 3, 5), 1e3 * random(2, 4, 5, seed=1), random(5, seed=2)
    keys[0, 0] = -query[0, 0]
    actual = body(*map(ops.convert_to_tensor, (query, keys, scale)))
    assert_close(actual, additive(query, keys, scale), 1e-6)
    assert all(np.isfinite(g).all() for g in gradients(body, query, keys, scale))


@pytest.mark.parametrize("body", bodies("additive_scores"))
def test_additive_scores_in_bfloat16(body, at_once):
    values = [ops.cast(random(2, *shape, seed=i), "bfloat16") for i, shape in enumerate([(3, 5), (4, 5)])]
    scale = ops.cast(random(5, seed=2), "bfloat16")
    scores = body(*values, scale)
    assert keras.backend.standardize_dtype(scores.dtype) == "bfloat16"
    exact = additive(*[numpy(ops.cast(x, "float32")).astype("float64") for x in (*values, scale)])
    assert_close(ops.cast(scores, "float32"), exact, 0.02)


@pytest.mark.parametrize("body", bodies("additive_scores"))
@pytest.mark.parametrize("shapes", [[(2, 3, 5), (2, 4, 5)], [(None, None, 5), (None, None, 5)]], ids=["known", "open"])
def test_additive_scores_of_symbols(body, shapes, at_once):
    """Also where the shapes are open, as in a functional model, which then fits and predicts any."""

    class Scores(keras.layers.Layer):
        def build(self, *_, **__):
            self.kernel = self.add_weight(shape=(5,))

        def call(self, query, keys):
            return body(query, keys, ops.convert_to_tensor(self.kernel))

    inputs = [keras.Input(batch_shape=shape) for shape in shapes]
    output = Scores()(*inputs)
    assert output.shape == (*shapes[0][:2], shapes[1][1])
    model = keras.Model(inputs, output)
    for jit in (False, True) if keras.backend.backend() == "tensorflow" else ("auto",):
        model.compile("sgd", "mse", jit_compile=jit)
        query, keys = random(2, 3, 5), random(2, 4, 5)
        assert_close(model.predict([query, keys], verbose=0), additive(query, keys, numpy(model.weights[0])), 1e-6)
        assert np.isfinite(model.train_on_batch([query, keys], np.zeros((2, 3, 4))))


@pytest.mark.parametrize("body", bodies("additive_scores"))
@pytest.mark.parametrize("queries", [0, 3])
def test_additive_scores_of_transposed_tensors(body, queries, at_once):
    query, keys, scale = random(queries, 2, 5), random(5, 4, 2, seed=1), random(5, seed=2)

    def call(query, keys, scale):
        return body(ops.swapaxes(query, 0, 1), ops.transpose(keys, (2, 1, 0)), scale)

    expected = additive(query.swapaxes(0, 1), keys.T, scale)
    np.testing.assert_allclose(
        numpy(call(*map(ops.convert_to_tensor, (query, keys, scale)))), expected, atol=2e-6, rtol=0
    )


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the backend is not PyTorch")
def test_additive_scores_in_torch(at_once):
    import torch

    values = [ops.convert_to_tensor(random(*shape)) for shape in [(2, 3, 5), (2, 4, 5), (5,)]]
    expected = numpy(kernels.additive_scores(*values))
    with torch.inference_mode():
        assert_close(kernels.additive_scores(*values), expected, 0)
    values = [x.requires_grad_() for x in values]
    found = []
    for body in bodies("additive_scores"):
        query = values[0] + values[1].sum(1, keepdim=True)  # as a decoder's, which has seen the keys
        gradient = torch.autograd.grad(body(query, *values[1:]).sum(), values, create_graph=True)
        penalty = sum((x**2).sum() for x in gradient)
        found.append([numpy(x) for x in torch.autograd.grad(penalty, values)])
    assert_close(found[-1], found[0], 1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the backend is not TensorFlow")
@pytest.mark.parametrize("jit", [False, True])
def test_additive_scores_in_a_loop_of_tensorflow(jit, at_once):
    """A decoder's: each query comes of the scores before."""
    import tensorflow as tf

    start, keys, scale = (tf.constant(random(*shape, seed=i)) for i, shape in enumerate([(2, 1, 5), (2, 4, 5), (5,)]))

    def run(body, loop):
        @tf.function(jit_compile=jit and loop)
        def run(start, keys, scale):
            def step(i, query):
                return i + 1, query + tf.matmul(tf.nn.softmax(body(query, keys, scale)), keys)

            with tf.GradientTape() as tape:
                tape.watch((start, keys, scale))
                query = start
                if loop:
                    _, query = tf.while_loop(lambda i, _: i < 4, step, (0, query), maximum_iterations=4)
                else:
                    for i in range(4):
                        _, query = step(i, query)
            return query, *tape.gradient(query, (start, keys, scale))

        return [numpy(x) for x in run(start, keys, scale)]

    assert_close(run(kernels.additive_scores, True), run(reference.additive_scores, False), 1e-5)


def test_embed_adds_up_the_gradient_of_a_repeated_id():
    """The body in force: on TensorFlow, that of the plain one has each id's shares apart."""
    ids, table = np.array([[1, 1, 2], [0, 1, 4]], "int32"), random(5, 3)
    run = lambda table: kernels.embed(table, ops.convert_to_tensor(ids))  # noqa: E731
    assert_close(run(ops.convert_to_tensor(table)), table[ids], 0)
    assert_close(reference.embed(ops.convert_to_tensor(table), ops.convert_to_tensor(ids)), table[ids], 0)
    assert_close(gradients(run, table), numeric_gradients(lambda table: table[ids], table), 1e-5)


# Recurrence


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("reverse", [False, True])
def test_recurrence(reverse):
    """Weights common and of each row, a product that feeds the next, what all positions share, a mask, two states."""
    mask = np.array([[1, 1], [0, 1], [1, 0]], bool)

    def step(state, x, product, shared, where, tanh):
        (a, b), (x, m) = state, x
        hidden = tanh(product("common", a) + x * shared)
        a, b = where(m[:, None], hidden, a), b + product("own", hidden)
        return (a, b), (a * b[:, :3], b)

    def definition(a, b, x, common, own, shared):
        def product(name, left):
            return left @ common if name == "common" else np.einsum("bi,bij->bj", left, own)

        rows, state = [None] * 3, (a, b)
        for t in range(3)[:: -1 if reverse else 1]:
            state, rows[t] = step(state, (x[t], mask[t]), product, shared, np.where, np.tanh)
        return np.concatenate([*state, *[x for row in rows for x in row]], axis=1)

    def call(body):
        def run(a, b, x, common, own, shared):
            def one(state, x, product, shared):
                return step(state, x, product, shared["s"], ops.where, ops.tanh)

            inputs, weights = (x, ops.convert_to_tensor(mask)), {"common": common, "own": own}
            state, rows = body(one, (a, b), inputs, weights, {"s": shared}, reverse)
            return ops.concatenate([*state, *[x[t] for t in range(3) for x in rows]], axis=1)

        return run

    shapes = (2, 3), (2, 4), (3, 2, 3), (3, 3), (2, 3, 4), (2, 3)
    values = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert_equals_numpy("recurrence", definition, *values, call=call, value_tolerance=2e-6)


def penalty_gradients(function, *values, jit=False):
    """The gradients of a sum of squared outputs plus the squares of its own gradients, which are differentiated so."""
    values = [ops.convert_to_tensor(value) for value in values]
    loss = lambda *values: sum(ops.sum(x**2) for x in function(*values))  # noqa: E731
    if keras.backend.backend() == "jax":
        import jax

        places = tuple(range(len(values)))
        penalty = lambda *values: loss(*values) + sum((x**2).sum() for x in jax.grad(loss, places)(*values))  # noqa: E731
        return jax.grad(penalty, places)(*values)
    if keras.backend.backend() == "torch":
        import torch

        values = [value.requires_grad_() for value in values]
        found = loss(*values)
        first = torch.autograd.grad(found, values, create_graph=True)
        return torch.autograd.grad(found + sum((x**2).sum() for x in first), values)
    import tensorflow as tf

    def run(*values):
        with tf.GradientTape() as outer:
            outer.watch(values)
            with tf.GradientTape() as inner:
                inner.watch(values)
                found = loss(*values)
            found = found + sum(tf.reduce_sum(x**2) for x in inner.gradient(found, values))
        return outer.gradient(found, values)

    return (tf.function(run, jit_compile=True) if jit else run)(*values)


@pytest.mark.parametrize("name, options", [
    ("recurrence", {"reverse": True}), ("lstm", {}), ("gru", {"reverse": True}), ("gru", {"reset_after": True}),
])  # fmt: skip
def test_the_gradient_of_a_recurrence_can_be_differentiated(name, options):
    mask = ops.convert_to_tensor(np.array([[1, 1, 0], [1, 0, 1]], bool))

    def step(state, x, product, shared):
        state = ops.tanh(product("own", ops.where(x[1], product("common", state), state)) + x[0] * shared["s"])
        return state, state * state

    def call(body):
        def run(x, *weights):
            h = 2 * x[:, 0] + 1  # one argument comes of another
            if name == "recurrence":
                inputs = ops.swapaxes(x, 0, 1), ops.swapaxes(mask, 0, 1)[..., None]
                weights = {"common": weights[0][:, :2], "own": ops.reshape(weights[1][:, :4], (2, 2, 2))}
                return body(step, h, inputs, weights, {"s": h}, **options)
            outputs, last = body(x, (h, h) if name == "lstm" else h, *weights, mask=mask, **options)
            return outputs, *(last if name == "lstm" else [last])

        return run

    width = 8 if name == "lstm" else 6
    shapes = [(2, 3, 2), (2, width), (2, width)] + [(width,)] * (name != "recurrence")
    values = [random(*shape, seed=i) / 3 for i, shape in enumerate(shapes)]
    expected = penalty_gradients(call(getattr(reference, name)), *values)
    for jit in (False, True) if keras.backend.backend() == "tensorflow" and "reset_after" in options else (False,):
        assert_close(penalty_gradients(call(getattr(kernels, name)), *values, jit=jit), expected, 1e-5)


def test_a_recurrence_whose_weight_alone_is_trained():
    state, x = random(2, 3, seed=1), random(4, 2, 3, seed=2)

    def step(state, x, product, shared):
        return ops.tanh(product("w", state) + x), state

    def call(body):
        return lambda w: body(step, ops.convert_to_tensor(state), ops.convert_to_tensor(x), {"w": w})[0]

    found = [gradients(call(body), random(3, 3, seed=3)) for body in bodies("recurrence")]
    assert_close(found[-1], found[0], 1e-6)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the others keep no graph from call to call")
def test_a_recurrence_differentiated_twice_says_what_to_do():
    step = lambda state, x, product, shared: (state + product("w", x), state)  # noqa: E731
    state, x, w = (ops.convert_to_tensor(random(*shape)) for shape in [(2, 3), (4, 2, 3), (3, 3)])
    last, _ = kernels.recurrence(step, state, x, {"w": w.requires_grad_()})
    last.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken before; call the model again"):
        last.sum().backward()


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch.autocast")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_native_loops_compute_in_float32_under_autocast(kind, inside, dtype):
    import torch

    gates = {"lstm": 4, "gru": 3}[kind]
    state, x, *weights = (torch.tensor(random(*shape)) for shape in [(2, 3), (2, 4, 5), (5, 3 * gates), (3, 3 * gates)])
    weights = [w.requires_grad_() for w in weights]
    call = lambda: getattr(kernels, kind)(x, (state, state) if kind == "lstm" else state, *weights)[0]  # noqa: E731
    expected = call()
    gradients = torch.autograd.grad(expected.square().sum(), weights)
    with torch.autocast("cpu", getattr(torch, dtype)):
        found = call()
        loss = found.square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert found.dtype == torch.float32
    for a, b in zip([found, *(w.grad for w in weights)], [expected, *gradients]):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch.autocast")
def test_masked_scores_that_overflow_under_autocast():
    import torch

    query, mask = torch.full((1, 2, 1, 4), 1e4), torch.tensor([True, False, True])
    key = torch.tensor([[1.0], [100.0], [1.0]]).expand(1, 2, 3, 4)
    with torch.autocast("cpu", torch.float16):
        weights = kernels.attention_weights(query, key, mask.expand(1, 1, 1, 3))
    assert weights.flatten().tolist() == [0.5, 0, 0.5] * 2


KEPT = {"no mask": None, "mask": np.array([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)}


def over(x, mask, reverse, state, step):
    """Outputs of a recurrence in NumPy, and after them the last state, (batch, length + states, n)."""
    rows = [None] * x.shape[1]
    for t in range(x.shape[1])[:: -1 if reverse else 1]:
        new = step(state, x[:, t])
        keep = np.ones((len(x), 1)) if mask is None else mask[:, t, None]
        state = [np.where(keep, n, s) for n, s in zip(new, state)]
        rows[t] = state[0]
    return np.stack([*rows, *state], axis=1)


@pytest.mark.parametrize("mask", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("update, reset_after, projected", [("new", False, False), ("old", True, False),
                                                            ("old", False, True)])  # fmt: skip
def test_gru(mask, reverse, update, reset_after, projected):
    def definition(x, h, recurrent, kernel=None, bias=0, recurrent_bias=0):
        def step(state, x):
            x, (h,) = x if kernel is None else x @ kernel + bias, state
            u = h @ recurrent + recurrent_bias
            z, r = sigmoid(x[:, :2] + u[:, :2]), sigmoid(x[:, 2:4] + u[:, 2:4])
            c = np.tanh(x[:, 4:] + (r * u[:, 4:] if reset_after else (r * h) @ recurrent[:, 4:]))
            return [h + z * (c - h) if update == "new" else c + z * (h - c)]

        return over(x, mask, reverse, [h], step)

    def call(body):
        def run(x, h, recurrent, kernel=None, bias=None, recurrent_bias=None):
            keep = None if mask is None else ops.convert_to_tensor(mask)
            outputs, last = body(x, h, kernel, recurrent, bias, recurrent_bias, keep, reverse, reset_after, update)
            return ops.concatenate([outputs, last[:, None]], axis=1)

        return run

    values = [random(3, 4, 6 if projected else 2, seed=1), random(3, 2, seed=2), random(2, 6, seed=3)]
    if not projected:
        values += [random(2, 6, seed=4), random(6, seed=5)] + [random(6, seed=6)] * reset_after
    assert_equals_numpy("gru", definition, *values, call=call, value_tolerance=2e-6)


@pytest.mark.parametrize("mask", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lstm(mask, reverse, bias):
    def definition(x, h, c, kernel, recurrent, bias=0):
        def step(state, x):
            h, c = state
            i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            return [sigmoid(o) * np.tanh(c), c]

        return over(x, mask, reverse, [h, c], step)

    def call(body):
        def run(x, h, c, kernel, recurrent, bias=None):
            keep = None if mask is None else ops.convert_to_tensor(mask)
            outputs, last = body(x, (h, c), kernel, recurrent, bias, keep, reverse)
            return ops.concatenate([outputs, *[s[:, None] for s in last]], axis=1)

        return run

    shapes = [(3, 4, 2), (3, 2), (3, 2), (2, 8), (2, 8)] + [(8,)] * bias
    values = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert_equals_numpy("lstm", definition, *values, call=call, value_tolerance=2e-6)


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_mask_that_hides_nothing_is_none(name, reverse):
    gates = {"lstm": 4, "gru": 3}[name]
    x, h, *weights = (random(*s, seed=i) for i, s in enumerate([(3, 4, 2), (3, 2), (2, gates * 2), (2, gates * 2)]))
    x, h, *weights = map(ops.convert_to_tensor, (x, h, *weights))
    state, call = (h, h) if name == "lstm" else h, getattr(kernels, name)
    outputs, last = call(x, state, *weights, reverse=reverse)
    again, masked_last = call(x, state, *weights, mask=ops.ones((3, 4), "bool"), reverse=reverse)
    for found, expected in zip(keras.tree.flatten([again, masked_last]), keras.tree.flatten([outputs, last])):
        assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("mask", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("window", [1, 3, 9])
def test_lstm_in_windows(mask, reverse, window):
    """The same outputs, and the gradients of windows by hand between which the state stops them."""

    def by_hand(x, h, c, kernel, recurrent):
        state, rows = (h, c), []
        for start in range(0, 4, window):
            part = slice(max(4 - start - window, 0), 4 - start) if reverse else slice(start, start + window)
            keep = None if mask is None else ops.convert_to_tensor(mask[:, part])
            outputs, last = reference.lstm(x[:, part], state, kernel, recurrent, None, keep, reverse)
            state = [ops.stop_gradient(s) for s in last]
            rows.append(outputs)
        rows = rows[::-1] if reverse else rows
        return ops.concatenate([*rows, *[s[:, None] for s in last]], axis=1)

    def call(body):
        def run(x, h, c, kernel, recurrent):
            keep = None if mask is None else ops.convert_to_tensor(mask)
            outputs, last = body(x, (h, c), kernel, recurrent, None, keep, reverse, window)
            return ops.concatenate([outputs, *[s[:, None] for s in last]], axis=1)

        return run

    values = [random(*shape, seed=i) for i, shape in enumerate([(3, 4, 2), (3, 2), (3, 2), (2, 8), (2, 8)])]
    tensors = [ops.convert_to_tensor(value) for value in values]
    for body in bodies("lstm"):
        assert_close(call(body)(*tensors), by_hand(*tensors), 2e-6, body.__module__)
        assert_close(gradients(call(body), *values), gradients(by_hand, *values), 1e-5, body.__module__)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_recurrent_kernels_read_no_number_behind_a_mask(name):
    """Not a number in padding does not get out."""
    body, gates = getattr(kernels, name), 3 if name == "gru" else 4
    x = random(2, 3, 2)
    x[0, 2] = np.nan
    mask = ops.convert_to_tensor(np.array([[1, 1, 0], [1, 1, 1]], bool))
    state = ops.zeros((2, 2)) if name == "gru" else (ops.zeros((2, 2)), ops.zeros((2, 2)))
    weights = [ops.convert_to_tensor(random(2, 2 * gates, seed=i)) for i in range(2)]
    outputs, _ = body(ops.convert_to_tensor(x), state, *weights, **{"mask": mask})
    assert np.isfinite(numpy(outputs)).all()


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="other backends leave cuDNN to Keras")
@pytest.mark.parametrize("mask", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_gru_that_runs_on_a_gpu(mask, reverse):
    """torch.gru, which is cuDNN's there, takes our weights on a CPU as well."""
    x, h, kernel, recurrent = random(3, 4, 2), random(3, 2, seed=1), random(2, 6, seed=2), random(2, 6, seed=3)
    arrays = [x, h, kernel, recurrent, random(6, seed=4), random(6, seed=5)]
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    mask = None if mask is None else ops.convert_to_tensor(mask)
    found = kernels.native._native_gru(*tensors, mask, reverse)
    assert_close(found, reference.gru(*tensors, mask, reverse, reset_after=True), 1e-6)

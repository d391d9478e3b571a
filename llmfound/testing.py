"""Checks of layers and models, for this library's own and for yours: one call runs all of them.

    check_layer(lambda: MyLayer(8), {"x": x, "mask": mask}, mask="mask")
    check_model(lambda: MyModel(vocab_size=11), ({"token_ids": token_ids}, labels))

Every check is a function of a subject (a layer or model, its inputs and its outputs), so that outputs found elsewhere,
say on another backend, can be held against it with `assert_close`.
"""

import copy
import dataclasses
import functools
import inspect
import json
import math
import pathlib
import tempfile
import warnings
import zlib

import keras
import numpy as np
from keras import ops, tree

EXTRA = 3  # padded positions appended by the checks


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def fixture(name, shape, norm_scale=False):
    """Weights that anyone can compute again, on any machine and in any language.

    w_k = ((k^2 (2c + 1) + 2654435761 k) mod 2^32) / 2^32 - 1/2,  k = 1..size in row-major order,  c = CRC-32(name)

    Args:
        name: str, hashed as UTF-8.
        shape: tuple of int.
        norm_scale: whether to add 1, as for the scale of a normalisation.

    Returns:
        NumPy float64 array of that shape, in [-0.5, 0.5), or [0.5, 1.5) with `norm_scale`.
    """
    k = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    odd = np.uint64(2 * zlib.crc32(name.encode()) + 1)
    w = (k * k * odd + k * np.uint64(2654435761)) % np.uint64(2**32)  # uint64 wraps at 2^64, a multiple of 2^32: exact
    return (w / 2**32 - 0.5 + norm_scale).reshape(shape)


def assert_close(actual, expected, tolerance=1e-5, what="values"):
    """Holds |actual - expected| <= tolerance (1 + |expected|) everywhere; NaN is close to nothing.

    Args:
        actual: Array, tensor of any backend, or nest of them.
        expected: The same structure.
        tolerance: Largest difference, absolute for values below 1 and relative for those above.
        what: What is compared, for the message.

    Raises:
        AssertionError: with the largest absolute and relative difference and where they are.
    """
    actual, expected = _leaves(actual), _leaves(expected)
    if list(actual) != list(expected):
        raise AssertionError(f"{what}: the structure is {list(actual)}; expected {list(expected)}.")
    for path in actual:
        _assert_arrays_close(actual[path], expected[path], tolerance, what + path)


def _assert_arrays_close(actual, expected, tolerance, what):
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: the shape is {actual.shape}; expected {expected.shape}.")
    actual, expected = actual.astype("float64"), expected.astype("float64")
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.where(actual == expected, 0.0, np.abs(actual - expected))  # equal infinities are close
        relative = np.where(difference == 0, 0.0, difference / np.abs(expected))
        wrong = ~(difference <= tolerance * (1 + np.abs(expected))) | np.isinf(difference)
    if wrong.any():
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} differ by more than {tolerance:g} (1 + |expected|); "
            f"largest absolute difference {_largest(difference, actual, expected)}, "
            f"largest relative difference {_largest(relative, actual, expected)}."
        )


def _largest(difference, actual, expected):
    where = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
    index = tuple(int(i) for i in where)
    return f"{difference[index]:.3g} at {index} ({actual[index]:.6g}, expected {expected[index]:.6g})"


def _leaves(nest):
    """{path: NumPy array} of a nest, the path written as the index that picks the leaf: "", "[1]", "['logits']"."""
    found = tree.flatten_with_path(nest)
    return {"".join(f"[{key!r}]" for key in path): ops.convert_to_numpy(leaf) for path, leaf in found}


def set_weights_by_path(layer, arrays):
    """Sets every weight of a layer, or of a model, from arrays named by the ends of the weights' paths.

    Args:
        layer: Layer or model whose weights exist.
        arrays: dict of path suffix, in whole parts ("query/kernel" or "kernel", not "ernel"), to array.

    Raises:
        ValueError: unless every weight is set exactly once, every array is used, and every shape fits. Nothing is set.
    """
    if not layer.weights:
        raise ValueError(f"{layer.name} has no weights; call it once so that they exist.")
    problems, unused = [], set(arrays)
    for weight in layer.weights:
        names = [name for name in arrays if f"/{weight.path}".endswith(f"/{name}")]
        unused -= set(names)
        if len(names) != 1:
            problems.append(f"{weight.path} {tuple(weight.shape)} is named by {' and '.join(names) or 'nothing'}")
        elif np.shape(arrays[names[0]]) != tuple(weight.shape):
            problems.append(f"{weight.path} is {tuple(weight.shape)}, {names[0]} is {np.shape(arrays[names[0]])}")
    for name in arrays:
        paths = [weight.path for weight in layer.weights if f"/{weight.path}".endswith(f"/{name}")]
        if len(paths) > 1:
            problems.append(f"{name} names {' and '.join(paths)}")
    problems += [f"{name} {np.shape(arrays[name])} names no weight" for name in sorted(unused)]
    if problems:
        raise ValueError("Each weight must be set exactly once: " + "; ".join(problems) + ".")
    for weight in layer.weights:
        weight.assign(next(array for name, array in arrays.items() if f"/{weight.path}".endswith(f"/{name}")))


# ---------------------------------------------------------------------------------------------------------------------
# The two entry points


@dataclasses.dataclass
class Report:
    """What was checked and what was not, so that nothing vanishes silently."""

    subject: str
    done: list = dataclasses.field(default_factory=list)
    skipped: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        skipped = "".join(f"\n  {name} skipped: {reason}" for name, reason in self.skipped.items())
        return f"{self.subject}: {', '.join(self.done)}{skipped}"


def check_layer(make, inputs, *, expected_shape=None, mask=None, tolerance=1e-5, bfloat16_output="bfloat16",
                bfloat16_tolerance=0.05, skip=None):  # fmt: skip
    """Checks that a layer computes, saves, trains and masks as a Keras layer should, on the current backend.

    The checks, by name: `output` is finite and of the expected shape; `deterministic` without training; `spec`,
    compute_output_spec says what comes out; `config` is JSON and rebuilds the layer; `copy` by deepcopy (a model: by
    clone_model); `functional`, inside a keras.Model; `variable_length`, inside one that leaves the length open,
    through predict; `save` to a .keras file and load in safe mode; `mixed_bfloat16` as global policy; `dtype` does as
    an argument what the policy does; `gradient`, finite and not zero for every weight; `fit`, one step changes the
    loss; `padding` moves nothing at real positions; `all_padding` gives no NaN.
    Weights are set to fixed numbers first, since at the usual start (zero biases) much goes unnoticed.

    Args:
        make: Function of no argument that returns a new layer.
        inputs: dict of call arguments, or tuple of the first ones. Arrays with the leading axis of the first array
            are the batch; all else is passed as it is.
        expected_shape: Shape of the output, or list of the shapes of all outputs in order.
        mask: Name of the argument that holds the padding mask, bool (batch, length), True at real positions. Arrays
            with that second axis are padded with it; choose a length unlike other second axes, such as a state's width.
        tolerance: For equal outputs, as in `assert_close`.
        bfloat16_output: dtype of the first output under mixed_bfloat16.
        bfloat16_tolerance: Largest difference under mixed_bfloat16, as a fraction of the largest output.
        skip: dict of check name to the reason for leaving it out.

    Returns:
        Report of the checks done and of those skipped, each with a reason.

    Raises:
        AssertionError: at the first check that fails; it names the check, what differed, where and by how much.
        ValueError: if `inputs`, `mask` or `skip` is not as described.
    """
    layer = make()
    if isinstance(inputs, tuple):
        inputs = dict(zip(inspect.signature(layer.call).parameters, inputs))
    if mask is not None and (np.ndim(inputs.get(mask)) != 2 or inputs[mask].dtype != bool):
        raise ValueError(f"mask must name a bool (batch, length) array among {list(inputs)}; got {mask!r}.")
    subject = _LayerSubject(make, layer, inputs, mask)
    subject.limits = _Limits(expected_shape, tolerance, bfloat16_output, bfloat16_tolerance)
    return _run_checks(f"check_layer({layer.name})", subject, skip)


def check_model(make, batch, *, loss=None, expected_shape=None, pad_id=0, tolerance=1e-5, bfloat16_output="float32",
                bfloat16_tolerance=0.05, skip=None):  # fmt: skip
    """Checks that a model computes, saves, trains and ignores padding, on the current backend.

    The checks are those of `check_layer`. Padding is appended to the integer inputs of rank 2, one length after the
    other: those of equal length are taken to belong together, and the model must have room for 3 more positions.

    Args:
        make: Function of no argument that returns a new model.
        batch: (inputs, labels), arrays or nests of them, or (inputs, labels, sample_weight).
        loss: As in `compile`; None takes SparseCategoricalCrossentropy(from_logits=True).
        expected_shape: Shape of the output, or list of the shapes of all outputs in order.
        pad_id: int, the token that fills up short sequences; None if the model knows none.
        tolerance: For equal outputs, as in `assert_close`.
        bfloat16_output: dtype of the first output under mixed_bfloat16; logits leave as float32.
        bfloat16_tolerance: Largest difference under mixed_bfloat16, as a fraction of the largest output.
        skip: dict of check name to the reason for leaving it out.

    Returns:
        Report of the checks done and of those skipped, each with a reason.

    Raises:
        AssertionError: at the first check that fails; it names the check, what differed, where and by how much.
        ValueError: if `batch` or `skip` is not as described.
    """
    if not isinstance(batch, tuple) or len(batch) not in (2, 3):
        raise ValueError(f"batch must be (inputs, labels) or (inputs, labels, sample_weight); got {type(batch)}.")
    model = make()
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    subject = _ModelSubject(make, model, batch, loss, pad_id)
    subject.limits = _Limits(expected_shape, tolerance, bfloat16_output, bfloat16_tolerance)
    return _run_checks(f"check_model({model.name})", subject, skip)


def _run_checks(title, subject, skip):
    skip, report = skip or {}, Report(title)
    if not set(skip) <= set(CHECKS) or not all(skip.values()):
        raise ValueError(f"skip maps a check to the reason for leaving it out; checks: {list(CHECKS)}; got {skip}.")
    for name, check in CHECKS.items():
        try:
            reason = skip.get(name) or check(subject)
        except AssertionError as error:
            raise AssertionError(f"{title}, {name}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{title}, {name}: {type(error).__name__}: {error}") from error
        if reason:
            report.skipped[name] = reason
        else:
            report.done.append(name)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# What is under test


@dataclasses.dataclass
class _Limits:
    """What the outputs are held against."""

    expected_shape: tuple | list | None
    tolerance: float
    bfloat16_output: str
    bfloat16_tolerance: float


class _Subject:
    """A layer or model with fixed weights, its call arguments and what it returns for them."""

    def __init__(self, make, layer, arguments):
        self.make, self.layer = make, layer
        self.arguments = tree.map_structure(_as_32_bits, arguments)
        leaves = [x for value in self.arguments.values() for x in tree.flatten(value)]  # in the order of the dict
        arrays = [x for x in leaves if isinstance(x, np.ndarray) and x.ndim]
        if not arrays:
            raise ValueError(f"The inputs must hold NumPy arrays; got {arguments}.")
        self.batch_size = len(arrays[0])
        self.run(layer)
        _fill(layer)
        self.weights = layer.get_weights()
        self.outputs = self.run(layer)

    def run(self, layer, arguments=None):
        return layer(**(arguments or self.arguments), training=False)

    def twin(self, layer=None):
        """Another layer, by default a new one, built by a call and given the weights under test."""
        layer = layer or self.make()
        if layer is self.layer:
            raise ValueError("make must return a new object at each call; it returned the same one twice.")
        if len(layer.get_weights()) != len(self.weights):
            self.run(layer)
        shapes, expected = ([w.shape for w in weights] for weights in (layer.get_weights(), self.weights))
        if shapes != expected:
            raise AssertionError(f"the weights have shapes {shapes}; expected {expected}.")
        layer.set_weights(self.weights)
        return layer

    def is_batched(self, x):
        return isinstance(x, np.ndarray) and x.ndim > 0 and len(x) == self.batch_size

    def arrays(self, arguments=None):
        return [x for x in tree.flatten(arguments or self.arguments) if self.is_batched(x)]

    def symbolic(self, make, batch_size=None, is_open=lambda x: False):
        """The arguments with make(shape, dtype) for each array, its length None if is_open(array)."""

        def symbol(x):
            if not self.is_batched(x):
                return x
            return make((batch_size, None, *x.shape[2:]) if is_open(x) else (batch_size, *x.shape[1:]), x.dtype.name)

        return tree.map_structure(symbol, self.arguments)

    def graph(self, layer, is_open=lambda x: False):
        """A functional model of the layer alone; it takes what `arrays` gives."""
        arguments = self.symbolic(lambda shape, dtype: keras.Input(batch_shape=shape, dtype=dtype), is_open=is_open)
        return keras.Model([x for x in tree.flatten(arguments) if isinstance(x, keras.KerasTensor)], layer(**arguments))

    @functools.cached_property
    def second(self):
        """A twin for graphs and for training, which leave it as it was: to make a model takes seconds."""
        return self.twin()

    @functools.cached_property
    def functional(self):
        return self.graph(self.second)

    @functools.cached_property
    def padded(self):
        """(what, arguments, real positions, outputs) for each of `paddings`."""
        return [(*padding, self.run(self.layer, padding[1])) for padding in self.paddings()]

    @functools.cached_property
    def under_bfloat16(self):
        """Outputs of a twin made under the global policy mixed_bfloat16."""
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            return self.run(self.twin())
        finally:
            keras.config.set_dtype_policy(policy)

    @functools.cached_property
    def trainer(self):
        """The second layer in a compiled model, whose optimizer keeps the gradients."""
        model = self.trainable(self.second)
        model.compile(_Recorder(0.1, name="recorder"), self.loss)
        return model

    def fit(self, arguments=None, steps=1):
        """Steps on one batch, from the weights under test: the losses, and {weight path: gradient} of the last one."""
        model, losses = self.trainer, []
        for _ in range(steps):
            _reset_random(model)
            model.optimizer.forget()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Gradients do not exist")  # they stay zero: reported
                batch = self.batch(arguments)
                history = model.fit(**batch, batch_size=self.batch_size, epochs=1, shuffle=False, verbose=0).history
            losses += history["loss"]
        model.set_weights(self.weights)
        paths = [weight.path for weight in model.trainable_weights]
        return losses, dict(zip(paths, [ops.convert_to_numpy(g.value) for g in model.optimizer.gradients]))


class _LayerSubject(_Subject):
    """A layer; its padding is what the argument named `mask` says."""

    def __init__(self, make, layer, arguments, mask):
        super().__init__(make, layer, arguments)
        self.mask, self.loss = mask, None

    def savable(self):
        """A keras.Model with the weights under test, and the inputs it takes."""
        return self.functional, self.arrays()

    def trainable(self, layer):
        """A keras.Model of the layer that has a loss."""
        return _Probe(layer, self)

    def batch(self, arguments=None):
        """What the trainer trains on."""
        return {"x": self.arrays(arguments)}

    def is_padded(self, x):
        """Whether an array has the length axis of the mask."""
        if self.mask is None or not self.is_batched(x) or x.ndim < 2:
            return False
        return x.shape[1] == self.arguments[self.mask].shape[1]

    def paddings(self):
        """(what, arguments with more padding, real positions) for each length that can be padded."""
        if self.mask is None:
            return
        real = self.arguments[self.mask]

        def pad(x):
            if not self.is_padded(x):
                return x
            if x.dtype == bool:
                return np.pad(x, ((0, 0), (0, EXTRA), *((0, 0),) * (x.ndim - 2)))
            other = np.flip(x, (0, 1))  # values that the layer accepts, in other places
            if np.issubdtype(x.dtype, np.floating):
                other = 1 - 3 * other
            inside = np.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, other)
            return np.concatenate([inside, np.take(other, np.arange(EXTRA) % x.shape[1], axis=1)], axis=1)

        yield f"what {self.mask} hides", tree.map_structure(pad, self.arguments), real

    def all_padding(self):
        """(what, arguments whose first row is padding alone) for each length that can be padded."""
        if self.mask is not None:
            mask = self.arguments[self.mask].copy()
            mask[0] = False
            yield self.mask, {**self.arguments, self.mask: mask}


class _ModelSubject(_Subject):
    """A model; its padding is the token `pad_id` in integer inputs of rank 2."""

    def __init__(self, make, model, batch, loss, pad_id):
        inputs, *labels = batch
        self.argument = next(iter(inspect.signature(model.call).parameters))
        super().__init__(make, model, {self.argument: inputs})
        self.labels, self.loss, self.pad_id = dict(zip(("y", "sample_weight"), labels)), loss, pad_id

    def savable(self):
        return self.layer, self.arguments[self.argument]

    def trainable(self, model):
        return model

    def batch(self, arguments=None):
        return {"x": (arguments or self.arguments)[self.argument], **self.labels}

    def is_padded(self, x):
        return self.pad_id is not None and self.is_batched(x) and x.ndim == 2 and np.issubdtype(x.dtype, np.integer)

    def lengths(self):
        """{length: real positions} of the inputs that can be padded."""
        found = {}
        for x in filter(self.is_padded, tree.flatten(self.arguments)):
            found[x.shape[1]] = found.get(x.shape[1], False) | (x != self.pad_id)
        return found

    def replaced(self, length, replace):
        """The arguments with replace(ids) for those of one length."""

        def at_length(x):
            return replace(x) if self.is_padded(x) and x.shape[1] == length else x

        return tree.map_structure(at_length, self.arguments)

    def paddings(self):
        def pad(ids):
            return np.pad(ids, ((0, 0), (0, EXTRA)), constant_values=self.pad_id)

        for length, real in self.lengths().items():
            yield f"the inputs of length {length}", self.replaced(length, pad), real

    def all_padding(self):
        def blank(ids):
            return np.concatenate([np.full_like(ids[:1], self.pad_id), ids[1:]])

        for length in self.lengths():
            yield f"the inputs of length {length}", self.replaced(length, blank)


class _Probe(keras.Model):
    """Trains a layer alone, on a fixed projection of all that it returns.

    A plain sum would not do: that of a softmax or of a layer norm is constant and leaves no gradient.
    """

    def __init__(self, layer, subject):
        super().__init__(name="probe")
        self.layer = layer
        self.is_batched, self.arguments = subject.is_batched, subject.arguments

    def call(self, arrays, training=None):
        arrays = iter(tree.flatten(arrays))
        arguments = tree.map_structure(lambda x: next(arrays) if self.is_batched(x) else x, self.arguments)
        return self.layer(**arguments, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        outputs = [y for y in tree.flatten(y_pred) if keras.backend.is_float_dtype(y.dtype)]
        factors = [fixture(f"output {i}", (1, *y.shape[1:])) for i, y in enumerate(outputs)]
        return sum(
            ops.mean(ops.multiply(ops.cast(y, "float32"), f.astype("float32"))) for y, f in zip(outputs, factors)
        )


class _Recorder(keras.optimizers.SGD):
    """SGD that keeps the gradients: the one way to them that every backend has."""

    def build(self, variables):
        super().build(variables)
        self.gradients = self.add_optimizer_variables(variables, "gradient")

    def forget(self):
        for gradient in self.gradients if self.built else ():
            gradient.assign(np.zeros(gradient.shape))

    def update_step(self, gradient, variable, learning_rate):
        self.assign_add(self.gradients[self._get_variable_index(variable)], gradient)
        super().update_step(gradient, variable, learning_rate)


def _as_32_bits(x):
    if not isinstance(x, np.ndarray):
        return x
    return x.astype({"float64": "float32", "int64": "int32"}.get(x.dtype.name, x.dtype))


def _fill(layer):
    """Sets the trainable weights to fixed numbers, none of them zero.

    Matrices get unit gain; vectors stay near their start, so that scales stay near 1.
    """
    for index, weight in enumerate(layer.trainable_weights):
        noise = fixture(f"weight {index}", tuple(weight.shape))
        if noise.ndim >= 2:
            weight.assign(noise * math.sqrt(12 / math.prod(noise.shape[:-1])))
        else:
            weight.assign(ops.convert_to_numpy(weight) + 0.2 * noise)
    _reset_random(layer)


def _reset_random(layer):
    """Sets random generators to a fixed state, so that dropout drops the same again."""
    for variable in layer.non_trainable_variables:
        if variable.name == "seed_generator_state":
            variable.assign(np.array([1337, 0]))


# ---------------------------------------------------------------------------------------------------------------------
# The checks: each takes a subject and returns the reason if there is nothing to check


def _check_output(subject):
    shapes = [tuple(x.shape) for x in tree.flatten(subject.outputs)]
    expected = subject.limits.expected_shape
    if expected is not None and shapes != ([expected] if isinstance(expected, tuple) else list(expected)):
        raise AssertionError(f"the output has shape {shapes}; expected_shape is {expected}.")
    _assert_finite(subject.outputs, "output")


def _check_deterministic(subject):
    again = subject.layer(**subject.arguments)  # without training=False: that is the default
    assert_close(again, subject.outputs, subject.limits.tolerance, "output of a second call")


def _check_spec(subject):
    actual = [(tuple(x.shape), keras.backend.standardize_dtype(x.dtype)) for x in tree.flatten(subject.outputs)]
    for batch_size in (subject.batch_size, None):
        spec = subject.layer.compute_output_spec(**subject.symbolic(keras.KerasTensor, batch_size))
        said = [(tuple(x.shape), x.dtype) for x in tree.flatten(spec)]
        fits = [
            dtype == real_dtype and len(shape) == len(real) and all(n in (None, m) for n, m in zip(shape, real))
            for (shape, dtype), (real, real_dtype) in zip(said, actual)
        ]
        if len(said) != len(actual) or not all(fits):
            raise AssertionError(
                f"compute_output_spec says {said} for a batch of {batch_size}; the output is {actual}."
            )


def _check_config(subject):
    layer = subject.layer
    config = layer.get_config()
    forgotten = [name for name in _parameters(layer) if name not in config]
    hint = f" (get_config lacks {', '.join(forgotten)})" if forgotten else ""
    json.dumps(config)
    written = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    rebuilt = {
        "deserialize_keras_object(serialize_keras_object(layer))": keras.saving.deserialize_keras_object(written)
    }
    if not isinstance(layer, keras.Model):  # whose clone_model, in `copy`, is just that
        rebuilt["from_config(get_config())"] = type(layer).from_config(config)
    for how, twin in rebuilt.items():
        _assert_same(subject, subject.twin(twin), f"{how}{hint}")


def _check_copy(subject):
    layer = subject.layer
    if isinstance(layer, keras.Model):  # whose deepcopy saves and loads, as `save` does
        how, twin = "clone_model", subject.twin(keras.models.clone_model(layer))
    else:
        how, twin = "deepcopy", copy.deepcopy(layer)
    _assert_same(subject, twin, how)
    twin.set_weights([np.zeros_like(w) for w in subject.weights])
    assert_close(subject.run(layer), subject.outputs, subject.limits.tolerance, f"output after a change to the {how}")


def _assert_same(subject, twin, how):
    outputs = subject.run(twin)
    before, after = _settings(subject.layer), _settings(twin)
    changed = [f"{what[1]} is {after.get(what)!r}, was {before[what]!r}" for what in before
               if after.get(what) != before[what]]  # fmt: skip
    if changed:
        raise AssertionError(f"after {how}, {'; '.join(changed)}.")
    assert_close(outputs, subject.outputs, subject.limits.tolerance, f"output after {how}")


def _check_functional(subject):
    model = subject.functional
    if len(model.weights) != len(subject.weights):
        raise AssertionError(f"the model has {len(model.weights)} weights; the layer has {len(subject.weights)}.")
    outputs = model(subject.arrays(), training=False)
    assert_close(outputs, subject.outputs, subject.limits.tolerance, "output in a functional model")


def _check_variable_length(subject):
    if not subject.padded:
        return NO_PADDING
    model = subject.graph(subject.second, subject.is_padded)
    cases = [(subject.arguments, subject.outputs)] + [
        (arguments, outputs) for _, arguments, _, outputs in subject.padded
    ]
    for arguments, expected in cases:
        outputs = model.predict(subject.arrays(arguments), batch_size=subject.batch_size, verbose=0)
        shapes = [x.shape for x in subject.arrays(arguments)]
        assert_close(outputs, expected, subject.limits.tolerance, f"output of predict for inputs {shapes}")


def _check_save(subject):
    model, inputs = subject.savable()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)  # safe mode is the default
    outputs = loaded(inputs, training=False)
    assert_close(outputs, subject.outputs, subject.limits.tolerance, "output after save and load")


def _check_mixed_bfloat16(subject):
    outputs = subject.under_bfloat16
    limits, expected = subject.limits, _leaves(subject.outputs)
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in tree.flatten(outputs)]
    allowed = [{limits.bfloat16_output}, *[{"bfloat16", "float32"}] * (len(dtypes) - 1)]
    for dtype, names, was in zip(dtypes, allowed, tree.flatten(subject.outputs)):
        if keras.backend.is_float_dtype(was.dtype) and dtype not in names:
            raise AssertionError(f"the outputs are {dtypes}; expected bfloat16_output={limits.bfloat16_output!r}.")
    _assert_finite(outputs, "output")
    for path, value in _leaves(outputs).items():
        scale = max(1e-6, np.abs(expected[path].astype("float32")).max(initial=0))
        assert_close(value / scale, expected[path] / scale, limits.bfloat16_tolerance, f"output{path} (largest is 1)")


def _check_dtype(subject):
    policy = keras.saving.serialize_keras_object(keras.config.dtype_policy())
    config = subject.layer.get_config()
    changed = _replaced(config, policy, "mixed_bfloat16")
    if changed == config:
        return f"no {policy['config']['name']} policy in the config"
    outputs = subject.run(subject.twin(type(subject.layer).from_config(changed)))
    expected = subject.under_bfloat16
    dtypes, global_dtypes = ([str(x.dtype) for x in tree.flatten(nest)] for nest in (outputs, expected))
    if dtypes != global_dtypes:
        raise AssertionError(f'with dtype="mixed_bfloat16" the outputs are {dtypes}; as global policy {global_dtypes}.')
    assert_close(outputs, expected, subject.limits.tolerance, 'output with dtype="mixed_bfloat16", not global policy')


def _check_fit(subject):
    if not subject.layer.trainable_weights:
        return NO_WEIGHTS
    (before, after), _ = subject.fit(steps=2)
    if not np.isfinite([before, after]).all() or before == after:
        raise AssertionError(f"the loss was {before} in a step of fit, and {after} in the next one on the same batch.")


def _check_gradient(subject):
    if not subject.layer.trainable_weights:
        return NO_WEIGHTS
    for path, gradient in subject.fit()[1].items():
        _assert_finite(gradient, f"gradient of {path}")
        if not gradient.any():
            raise AssertionError(f"no gradient reaches {path} {gradient.shape}; all of it is zero.")


def _check_padding(subject):
    if not subject.padded:
        return NO_PADDING
    for what, _, real, outputs in subject.padded:
        expected, actual = _leaves(subject.outputs), _leaves(outputs)
        for path in expected:
            a, b = _at_real(actual[path], expected[path], real)
            name = f"output{path} at real positions, after a change of {what} and {EXTRA} padded positions more"
            assert_close(a, b, subject.limits.tolerance, name)


def _check_all_padding(subject):
    rows = list(subject.all_padding())
    if not rows:
        return NO_PADDING
    for what, arguments in rows:
        _assert_finite(subject.run(subject.layer, arguments), f"output where row 0 of {what} is all padding")
        gradients = subject.fit(arguments)[1] if subject.layer.trainable_weights else {}
        for path, gradient in gradients.items():
            _assert_finite(gradient, f"gradient of {path} where row 0 of {what} is all padding")


NO_PADDING = "no mask= argument, pad_id= or integer input that would tell padding"
NO_WEIGHTS = "no trainable weights"
CHECKS = {
    "output": _check_output,
    "deterministic": _check_deterministic,
    "spec": _check_spec,
    "config": _check_config,
    "copy": _check_copy,
    "functional": _check_functional,
    "variable_length": _check_variable_length,
    "save": _check_save,
    "mixed_bfloat16": _check_mixed_bfloat16,
    "dtype": _check_dtype,
    "fit": _check_fit,
    "gradient": _check_gradient,
    "padding": _check_padding,
    "all_padding": _check_all_padding,
}


def _assert_finite(nest, what):
    for path, value in _leaves(nest).items():
        wrong = np.argwhere(~np.isfinite(value.astype("float64")))
        if len(wrong):
            where = tuple(int(i) for i in wrong[0])
            raise AssertionError(
                f"{what}{path}: {len(wrong)} of {value.size} are not finite, first {value[where]} at {where}."
            )


def _parameters(layer):
    """Names of the constructor's own arguments."""
    parameters = list(inspect.signature(type(layer).__init__).parameters.values())[1:]
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _settings(layer):
    """{(place, what): value} of the public plain attributes of a layer and of all its sublayers.

    A rate of dropout that got lost in the config shows here, and in no output without training.
    """
    return {
        (place, f"{type(part).__name__}.{name}"): value
        for place, part in enumerate(layer._flatten_layers())  # among the attributes PyTorch hides them
        for name, value in vars(part).items()
        if not name.startswith("_") and name not in ("name", "built") and isinstance(value, (bool, int, float, str))
    }


def _replaced(config, old, new):
    """A config with every value equal to `old`, at any depth, made `new`."""
    if config == old:
        return new
    if isinstance(config, dict):
        return {key: _replaced(value, old, new) for key, value in config.items()}
    return [_replaced(value, old, new) for value in config] if isinstance(config, list) else config


def _at_real(actual, expected, real):
    """The parts of two outputs that stand at real positions; the axes that padding lengthened are the lengths."""
    grown = [axis for axis in range(1, min(actual.ndim, expected.ndim)) if actual.shape[axis] != expected.shape[axis]]
    if actual.ndim != expected.ndim or any(actual.shape[axis] != expected.shape[axis] + EXTRA for axis in grown):
        raise AssertionError(
            f"the output is {actual.shape} with {EXTRA} more padded positions, {expected.shape} without."
        )
    keep = real.any(axis=1).reshape(-1, *(1,) * (expected.ndim - 1))
    for axis in grown:
        keep = keep & real.reshape(len(real), *(real.shape[1] if i == axis else 1 for i in range(1, expected.ndim)))
    actual = actual[tuple(slice(n) for n in expected.shape)]
    return np.where(keep, actual, 0), np.where(keep, expected, 0)

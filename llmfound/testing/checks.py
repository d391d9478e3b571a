"""Every check is a function of a subject: a layer or model, its inputs and its outputs."""

import copy
import dataclasses
import inspect
import json
import pathlib
import tempfile

import keras
import numpy as np
from keras import tree

from llmfound.base import overrides
from llmfound.testing.numbers import assert_close, leaves
from llmfound.testing.subjects import EXTRA, LayerSubject, ModelSubject, reset_states


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
    an argument what the policy does; `gradient`, finite and not zero for every weight and every float input; `fit`, one
    step changes the loss; `mask`, the mask of Keras that an input brings is that of the output, if that has one of its
    length; `padding` moves nothing at real positions; `all_padding` gives no NaN.
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
    subject = LayerSubject(make, layer, inputs, mask)
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
    model = make()
    subject = ModelSubject(make, model, batch, loss, pad_id)
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


@dataclasses.dataclass
class _Limits:
    """What the outputs are held against."""

    expected_shape: tuple | list | None
    tolerance: float
    bfloat16_output: str
    bfloat16_tolerance: float


# The checks: each takes a subject and returns the reason if there is nothing to check


def _check_output(subject):
    shapes = [tuple(x.shape) for x in tree.flatten(subject.outputs)]
    expected = subject.limits.expected_shape
    if expected is not None and shapes != ([expected] if isinstance(expected, tuple) else list(expected)):
        raise AssertionError(f"the output has shape {shapes}; expected_shape is {expected}.")
    _assert_finite(subject.outputs, "output")


def _check_deterministic(subject):
    reset_states(subject.layer)
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
    reset_states(model)
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
        reset_states(model)
        outputs = model.predict(subject.arrays(arguments), batch_size=subject.batch_size, verbose=0)
        shapes = [x.shape for x in subject.arrays(arguments)]
        assert_close(outputs, expected, subject.limits.tolerance, f"output of predict for inputs {shapes}")


def _check_save(subject):
    model, inputs = subject.savable()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)  # safe mode is the default
    reset_states(loaded)
    outputs = loaded(inputs, training=False)
    assert_close(outputs, subject.outputs, subject.limits.tolerance, "output after save and load")


def _check_mixed_bfloat16(subject):
    outputs = subject.under_bfloat16
    limits, expected = subject.limits, leaves(subject.outputs)
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in tree.flatten(outputs)]
    allowed = [{limits.bfloat16_output}, *[{"bfloat16", "float32"}] * (len(dtypes) - 1)]
    for dtype, names, was in zip(dtypes, allowed, tree.flatten(subject.outputs)):
        if keras.backend.is_float_dtype(was.dtype) and dtype not in names:
            raise AssertionError(f"the outputs are {dtypes}; expected bfloat16_output={limits.bfloat16_output!r}.")
    _assert_finite(outputs, "output")
    for path, value in leaves(outputs).items():
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
    if not subject.can_train:
        return "no trainable weights, and no float inputs and outputs"
    for path, gradient in subject.fit()[1].items():
        _assert_finite(gradient, f"gradient of {path}")
        if not gradient.any():
            raise AssertionError(f"no gradient reaches {path} {gradient.shape}; all of it is zero.")


def _check_mask(subject):
    if subject.mask != "mask":
        return "no argument mask= that tells padding"
    if not subject.layer.supports_masking and not overrides(subject.layer, keras.layers.Layer, "compute_mask"):
        return "the layer hands no mask on"
    carried = subject.mask_carried()
    if carried is not None and (carried != subject.arguments["mask"]).any():
        raise AssertionError(f"the input's mask is {subject.arguments['mask']}, and the output's is {carried}.")


def _check_padding(subject):
    if not subject.padded:
        return NO_PADDING
    for what, _, real, outputs in subject.padded:
        expected, actual = leaves(subject.outputs), leaves(outputs)
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
    "mask": _check_mask,
    "padding": _check_padding,
    "all_padding": _check_all_padding,
}


def _assert_finite(nest, what):
    for path, value in leaves(nest).items():
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
        for name, value in [*vars(part).items(), *((k, getattr(part, k)) for k in getattr(part, "settable", ()))]
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

"""Numbers: fixtures, comparisons, weights by name."""

import math
import zlib

import numpy as np
from keras import ops, tree


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
    actual, expected = leaves(actual), leaves(expected)
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


def leaves(nest):
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

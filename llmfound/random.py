"""The same random numbers on every backend."""

import contextlib
import functools
import inspect
import math
import threading

import keras
import numpy as np
from keras import ops
from keras.src.backend import random as native  # where initializers, layers and keras.random all draw
from keras.src.random.seed_generator import global_seed_generator

from llmfound import kernels
from llmfound.kernels import reference

_lock = threading.Lock()
_open = 0  # contexts; the first replaces, the last restores
_restored = []  # (module, name, function) to put back


@contextlib.contextmanager
def portable():
    """Inside this context, or the function that it decorates, equal seeds give equal numbers on every backend.

        keras.utils.set_random_seed(0)
        with llmfound.random.portable():
            model = llmfound.models.Transformer(8000)
            model.compile(...)
            model.fit(batches, shuffle=False)

    It replaces the functions behind `keras.random`, and with them the draws of Keras's initializers and layers and of
    ours. A number is a function of the seed's two words and of the element's place alone (`kernels.portable_bits`).
    An int seed is drawn in NumPy, a SeedGenerator's in the framework:

    ====================================  ====================================  ===================================
    draw                                  int seed (initializers)               SeedGenerator, None (dropout, noise)
    ====================================  ====================================  ===================================
    dropout, randint, shuffle             equal                                 equal
    uniform, normal, truncated_normal     equal                                 to rounding, 1e-6; equal in [0, 1)
    initializers.Orthogonal               equal                                 to rounding, 1e-6
    categorical                           equal, but for ties within rounding   equal, but for ties within rounding
    beta, binomial, gamma                 NotImplementedError                   NotImplementedError
    ====================================  ====================================  ===================================

    All state is in the SeedGenerators, thus in a model's `variables` (a .keras file has its weights only, so layers
    made from one start again at their seed); only the generator that `seed=None` uses is Keras's own. The numbers are
    not those that any backend draws outside.

    - Equal draws leave rounding: losses agree to 1e-6 until it is amplified, by a ReLU whose input is nearly 0 or by
      a learning rate at the edge of divergence. tests/test_random.py has runs of 200 steps that agree to 1e-4.
    - Compiled code keeps the draws it was compiled with. Call `compile` and `fit` inside; a model that was already
      trained outside is native until it is compiled again, and one trained inside stays portable.
    - Data order is not a draw of keras.random. `fit` shuffles arrays by the framework's or NumPy's global generator,
      and a PyDataset by Python's: pass `shuffle=False`, and data that shuffle themselves, like `TranslationBatches`.
    - Draws in a tf.data pipeline, such as augmentation there, are TensorFlow's on all backends and left alone.
    - The context holds for the whole process, other threads included, until the last one that is open is left.
    """
    global _open
    with _lock:
        if _open == 0:
            for module, name, function in _replacements():
                _restored.append((module, name, getattr(module, name)))
                setattr(module, name, function)
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            while _open == 0 and _restored:
                setattr(*_restored.pop())


def _replacements():
    """(module, name, function) of everything to replace."""
    covered = [uniform, normal, truncated_normal, randint, categorical, shuffle, dropout]
    functions = {name: functools.partial(_refuse, name) for name in vars(keras.random) if hasattr(native, name)}
    functions.update({function.__name__: function for function in covered})
    functions = {name: f for name, f in functions.items() if inspect.isfunction(getattr(native, name))}
    return [
        (kernels, "dropout", reference.dropout),
        (keras.initializers.Orthogonal, "__call__", _orthogonal),
        *((native, name, function) for name, function in functions.items()),
    ]


def _refuse(name, *arguments, **options):
    raise NotImplementedError(
        f"keras.random.{name} has no form that is equal on every backend; draw it with NumPy, or outside "
        "llmfound.random.portable()."
    )


def _bits(seed, shape):
    """int32 of `shape`: of NumPy if the seed is an int, else of the framework."""
    if isinstance(seed, int):
        words = np.array([seed & 0xFFFFFFFF, 0], "uint32").view("int32")  # what Keras makes of an int
        if all(isinstance(size, int) for size in shape):
            return kernels.portable_bits(words, tuple(shape), np)
    elif seed is None:
        words = global_seed_generator().next()
    elif isinstance(seed, keras.random.SeedGenerator):
        words = seed.next()
    elif ops.is_tensor(seed) and tuple(seed.shape) == (2,):
        words = seed
    else:
        raise ValueError(f"seed must be an int, a keras.random.SeedGenerator or None; got {seed!r}.")
    return kernels.portable_bits(ops.cast(words, "int32"), tuple(shape))


def _unit(bits):
    """The upper 24 bits as a float in [0, 1), exact in float32; float64 in NumPy."""
    if isinstance(bits, np.ndarray):
        return (bits.view("uint32") >> 8) * 2.0**-24
    return ops.cast(ops.bitwise_and(ops.right_shift(bits, 8), 2**24 - 1), "float32") * 2.0**-24


def _scaled(x, scale, shift, dtype):
    """x * scale + shift as a tensor of the dtype; scale and shift are numbers or tensors."""
    dtype = keras.backend.standardize_dtype(dtype or keras.config.floatx())
    if isinstance(x, np.ndarray) and not (ops.is_tensor(scale) or ops.is_tensor(shift)):
        x, scale, shift = (x * scale + shift).astype("float64" if dtype == "float64" else "float32"), 1, 0
    x = ops.cast(x, "float64" if dtype == "float64" else "float32")
    return ops.cast(x * scale + shift, dtype)


def uniform(shape, minval=0.0, maxval=1.0, dtype=None, seed=None):
    """keras.random.uniform in steps of (maxval - minval) / 2^24; rounding can make the last of them maxval."""
    return _scaled(_unit(_bits(seed, shape)), maxval - minval, minval, dtype)


def normal(shape, mean=0.0, stddev=1.0, dtype=None, seed=None):
    """keras.random.normal, up to 5.8 standard deviations."""
    return _scaled(_gaussian(seed, shape), stddev, mean, dtype)


def _gaussian(seed, shape):
    """sqrt(-2 ln(1 - u)) cos(2 pi v). Source: Box and Muller 1958."""
    u = _unit(_bits(seed, (2, *shape)))
    xp = np if isinstance(u, np.ndarray) else ops
    return xp.sqrt(-2 * xp.log(1 - u[0])) * xp.cos(2 * math.pi * u[1])


def truncated_normal(shape, mean=0.0, stddev=1.0, dtype=None, seed=None):
    """keras.random.truncated_normal, within two standard deviations, by the inverse of the distribution function.

    Source: Giles 2010, "Approximating the erfinv function", table 5, the branch for w < 5; error below 1e-6.
    """
    u = _unit(_bits(seed, shape))
    xp = np if isinstance(u, np.ndarray) else ops
    x = (2 * u - 1) * math.erf(2**0.5)
    w = -xp.log((1 - x) * (1 + x)) - 2.5
    y = 0.0
    for coefficient in (2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
                        -0.00125372503, -0.00417768164, 0.246640727, 1.50140941):  # fmt: skip
        y = y * w + coefficient
    return _scaled(2**0.5 * x * y, stddev, mean, dtype)


def randint(shape, minval, maxval, dtype="int32", seed=None):
    """keras.random.randint, of int32 numbers."""
    if not any(ops.is_tensor(x) for x in (minval, maxval)) and not -(2**31) <= minval < maxval <= minval + 2**31 - 1:
        raise ValueError(
            f"minval must be below maxval, by less than 2^31, and both int32; got minval={minval}, maxval={maxval}."
        )
    bits = ops.convert_to_tensor(_bits(seed, shape))
    return ops.cast(minval + ops.mod(ops.bitwise_and(bits, 2**31 - 1), maxval - minval), dtype)


def categorical(logits, num_samples, dtype="int32", seed=None):
    """keras.random.categorical: the class with the greatest sum of logit and Gumbel noise."""
    rows, classes = ops.shape(logits)
    u = ops.cast(_unit(_bits(seed, (rows, num_samples, classes))), "float32")
    waiting = ops.log(ops.maximum(-ops.log(1 - u), 2.0**-25))
    return ops.cast(ops.argmin(waiting - ops.cast(logits, "float32")[:, None], axis=-1), dtype)


def shuffle(x, axis=0, seed=None):
    """keras.random.shuffle: one permutation along the axis."""
    bits = _bits(seed, (ops.shape(x)[axis],))  # no two equal
    return ops.take(x, ops.argsort(ops.convert_to_tensor(bits)), axis=axis)


def dropout(inputs, rate, noise_shape=None, seed=None):
    """keras.random.dropout."""
    if rate in (0, 1):
        return inputs if rate == 0 else ops.zeros_like(inputs)
    shape = ops.shape(inputs)
    if noise_shape is not None:
        shape = [size if asked is None else asked for asked, size in zip(noise_shape, shape)]
    dropped = min(round(rate * 2**32), 2**32 - 1) - 2**31  # of 2^32 equally likely values, the least ones
    keep = ops.convert_to_tensor(_bits(seed, shape)) >= dropped
    return ops.where(keep, inputs / (1 - rate), ops.zeros((), inputs.dtype))


def _orthogonal(initializer, shape, dtype=None):
    """keras.initializers.Orthogonal, its QR decomposition in NumPy."""
    if len(shape) < 2 or not isinstance(initializer.seed, int):
        return _native_orthogonal(initializer, shape, dtype)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    q, r = np.linalg.qr(_gaussian(initializer.seed, (max(rows, columns), min(rows, columns))))
    q = q * np.where(np.diag(r) < 0, -1, 1)
    return _scaled(np.reshape(q if rows >= columns else q.T, shape), initializer.gain, 0, dtype)


_native_orthogonal = keras.initializers.Orthogonal.__call__

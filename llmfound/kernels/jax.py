"""Overrides for JAX."""

import math
import weakref

import jax
import jax.numpy as jnp
import keras
import numpy as np

__all__ = ["dropout", "compiled"]

_programs = weakref.WeakKeyDictionary()  # model: {(function, static): its compiled program}


def dropout(x, rate, seed):
    """Masks from a hash of each element's index, which XLA fuses into the multiplication: no mask in memory.

    The hash is murmur3's finaliser, applied twice with one word of key before each round; the key comes from
    JAX's own generator, so draws are independent. See `reference.dropout`.
    """
    key = jax.random.bits(jax.random.wrap_key_data(seed.next().astype("uint32"), impl="threefry2x32"), (2,), "uint32")
    hashed = jnp.arange(math.prod(x.shape), dtype="uint32").reshape(x.shape)
    for word in key:
        hashed = (hashed + word) * jnp.uint32(0x9E3779B9)
        hashed = (hashed ^ (hashed >> 16)) * jnp.uint32(0x85EBCA6B)
        hashed = (hashed ^ (hashed >> 13)) * jnp.uint32(0xC2B2AE35)
        hashed = hashed ^ (hashed >> 16)
    keep = hashed >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def compiled(model, function, *static):
    """jax.jit, with the weights as arguments: new weights need no new program. See `reference.compiled`."""
    programs = _programs.setdefault(model, {})
    if (function, static) not in programs:
        programs[function, static] = _program(weakref.ref(model), function, static)

    def call(*arrays):
        weights = [variable.value for variable in getattr(model, "variables", ())]
        return keras.tree.map_structure(np.asarray, programs[function, static](weights, *arrays))

    return call


def _program(model, function, static):
    @jax.jit
    def program(weights, *arrays):
        with _Weights(zip(getattr(model(), "variables", ()), weights)):
            return function(model(), *static, *arrays)

    return program


class _Weights(keras.StatelessScope):
    """Lets a program read its arguments only: any other variable would be baked in as a constant."""

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None:
            raise ValueError(
                f"{variable.path} is read but not listed in the model's `variables`. If the model is not built yet, "
                "call it once; if it is not a Keras model, give it a property `variables`."
            )
        return value

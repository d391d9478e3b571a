"""Overrides for JAX."""

import functools
import math
import weakref

import jax
import jax.numpy as jnp
import keras
import numpy as np

from llmfound.kernels import reference

__all__ = ["dropout", "compiled", "loss_gradients", "additive_scores", "recurrence", "gru", "lstm"]

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


def loss_gradients(model, x, y=None, sample_weight=None):
    """Compiled once for a model, its loss and the shapes of its batch."""
    programs = _programs.setdefault(model, {})
    key = "loss_gradients", model._compile_loss  # another one after each `compile`
    if key not in programs:
        known = weakref.ref(model)

        @jax.jit
        def program(trained, others, *batch):
            def loss(trained):
                model = known()
                pairs = zip([*model.trainable_weights, *_others(model)], [*trained, *others])
                with keras.StatelessScope(list(pairs)):
                    return reference.evaluated_loss(model, *batch)

            return jax.grad(loss)(trained)

        programs[key] = program
    batch = reference.as_tensors(x, y, sample_weight)
    trained, others = ([v.value for v in some] for some in (model.trainable_weights, _others(model)))
    return [np.asarray(g, "float32") for g in programs[key](trained, others, *batch)]


def _others(model):
    trained = {id(variable) for variable in model.trainable_weights}
    return [variable for variable in model.variables if id(variable) not in trained]


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


def recurrence(step, state, inputs, weights, shared=(), reverse=False):
    """A scan whose backward pass forms each weight's gradient as one product; see `reference.recurrence`.

    Every product gets a zero added, at every position another: its gradient is that of the product. Products are kept
    for the backward pass; what lies between them is computed again.
    """
    return _recurrence(step, reverse, state, inputs, weights, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(step, reverse, state, inputs, weights, shared):
    def product(name, left):
        return reference.times(left, weights[name])

    return jax.lax.scan(lambda state, x: step(state, x, product, shared), state, inputs, reverse=reverse)


def _recurrence_forward(step, reverse, state, inputs, weights, shared):
    def one(state, x, zeros, weights, shared):
        factors, products = {}, {}

        def product(name, left):
            factors[name] = left
            products[name] = reference.times(left, weights[name])
            return products[name] if zeros is None else products[name] + zeros[name]

        state, output = step(state, x, product, shared)
        return state, output, factors, products

    first = jax.tree.map(lambda x: x[0], inputs)
    shapes = jax.eval_shape(lambda *a: one(a[0], a[1], None, *a[2:])[3], state, first, weights, shared)
    length = jax.tree.leaves(inputs)[0].shape[0]
    zeros = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), shapes)

    def loop(state, inputs, zeros, shared):
        @functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.dots_saveable)
        def body(state, inputs):
            state, output, factors, _ = one(state, *inputs, weights, shared)
            return state, (output, factors)

        state, (outputs, factors) = jax.lax.scan(body, state, (inputs, zeros), reverse=reverse)
        return (state, outputs), factors

    result, backward, factors = jax.vjp(loop, state, inputs, zeros, shared, has_aux=True)
    return result, (backward, factors, weights)


def _recurrence_backward(step, reverse, kept, gradients):
    backward, factors, weights = kept
    state, inputs, products, shared = backward(gradients)
    formula = {2: "tbi,tbj->ij", 3: "tbi,tbj->bij"}
    weights = {name: jnp.einsum(formula[w.ndim], factors[name], products[name]) for name, w in weights.items()}
    return state, inputs, weights, shared


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


@functools.partial(jax.jit, static_argnames=("reverse", "reset_after", "update"))  # else compiled at every eager call
def gru(x, state, kernel, recurrent_kernel, bias=None, recurrent_bias=None, mask=None, reverse=False,
        reset_after=False, update="old"):  # fmt: skip
    return reference.gru_by(
        recurrence, x, state, kernel, recurrent_kernel, bias, recurrent_bias, mask, reverse, reset_after, update
    )


@functools.partial(jax.jit, static_argnames=("reverse", "window"))
def lstm(x, state, kernel, recurrent_kernel, bias=None, mask=None, reverse=False, window=None):
    return reference.lstm_by(recurrence, x, state, kernel, recurrent_kernel, bias, mask, reverse, window)


def additive_scores(query, keys, scale):
    """A loop over chunks of queries, whose backward pass computes tanh again; see `reference.additive_scores`."""
    dtype = jnp.result_type(query, keys, scale)
    query, keys, scale = (x.astype(jnp.promote_types(dtype, "float32")) for x in (query, keys, scale))
    queries = query.shape[1]
    if not all(isinstance(n, int) for n in (queries, *keys.shape)):  # symbols, of no size yet
        return reference.additive_scores(query, keys, scale).astype(dtype)
    chunk = reference.queries_at_once(keys.shape, "cpu" if jax.default_backend() == "cpu" else "gpu")
    if chunk >= queries:
        return jax.checkpoint(reference.additive_scores)(query, keys, scale).astype(dtype)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(query):
        return reference.additive_scores(query.swapaxes(0, 1), keys, scale).swapaxes(0, 1)

    query = jnp.pad(query.swapaxes(0, 1), ((0, -queries % chunk), (0, 0), (0, 0)))
    scores = jax.lax.map(one, query.reshape(-1, chunk, *query.shape[1:]))
    return scores.reshape(-1, *scores.shape[2:])[:queries].swapaxes(0, 1).astype(dtype)

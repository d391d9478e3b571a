"""Overrides for TensorFlow."""

import math
import weakref

import keras
import numpy as np
import tensorflow as tf

from llmfound.kernels import reference

__all__ = [
    "dropout", "token_cross_entropy", "adam_update", "compiled", "loss_gradients", "embed", "additive_scores",
    "recurrence", "gru", "lstm",
]  # fmt: skip

_programs = weakref.WeakKeyDictionary()  # model: its variables, and {(function, static, shapes): a graph}


def dropout(x, rate, seed):
    """Masks from 16 random bits an element, of a named generator: the one that XLA takes by itself on a CPU needs a
    microsecond for each element.

    The rate is met to 1/65536; see `reference.dropout`. The replicas of a tf.distribute.Strategy have one seed, and by
    their numbers each has its own masks.
    """
    shape = tf.shape(x) if None in x.shape else x.shape
    size = tf.reduce_prod(shape) if None in x.shape else math.prod(shape)
    key = tf.bitcast(tf.cast(seed.next(), "uint32"), "int32")
    replica = tf.distribute.get_replica_context()
    if replica is not None and replica.num_replicas_in_sync > 1:
        key += tf.stack([replica.replica_id_in_sync_group * 0x3779B97F, 0])
    words = tf.random.stateless_uniform([(size + 3) // 4], key, None, None, "int64", alg="philox")
    dropped = min(round(rate * 2**16), 2**16 - 1)
    keep = tf.reshape(tf.reshape(tf.bitcast(words, "int16"), [-1])[:size], shape) >= dropped - 2**15
    return tf.where(keep, x * tf.cast(2**16 / (2**16 - dropped), x.dtype), tf.zeros((), x.dtype))


def token_cross_entropy(logits, labels, smoothing=0.0):
    """One fused operation computes loss and gradient; see `reference.token_cross_entropy`."""
    logits, labels = tf.cast(logits, "float32"), tf.cast(labels, "int32")
    classes = tf.shape(logits)[-1]
    other = smoothing / tf.cast(classes, "float32")
    target = tf.one_hot(labels, classes, on_value=1 - smoothing + other, off_value=other)
    loss = tf.nn.softmax_cross_entropy_with_logits(target, logits)
    return tf.where((labels >= 0) & (labels < classes), loss, math.nan)


def adam_update(
    variables, gradients, momentums, velocities, learning_rate, step, beta_1, beta_2, epsilon, weight_decay=0.0
):
    """TensorFlow's fused Adam; see `reference.adam_update`."""
    for variable, gradient, momentum, velocity in zip(variables, gradients, momentums, velocities):
        gradient = tf.convert_to_tensor(gradient)
        if variable.dtype == "bfloat16":  # in which 0.999, which the fused one reads in the variable's type, is 1
            reference.adam_update(
                [variable], [gradient], [momentum], [velocity], learning_rate, step, beta_1, beta_2, epsilon,
                weight_decay,
            )  # fmt: skip
            continue
        var, m, v = (v if isinstance(v, tf.Variable) else v.value for v in (variable, momentum, velocity))
        dtype = var.dtype
        if weight_decay:
            var.assign(var * tf.cast(1 - learning_rate * weight_decay, dtype))
        tf.raw_ops.ResourceApplyAdam(
            var=var.handle, m=m.handle, v=v.handle, beta1_power=tf.cast(tf.pow(beta_1, step), dtype),
            beta2_power=tf.cast(tf.pow(beta_2, step), dtype), lr=tf.cast(learning_rate, dtype), beta1=beta_1,
            beta2=beta_2, epsilon=epsilon, grad=tf.cast(gradient, dtype),
        )  # fmt: skip


def compiled(model, function, *static):
    """A graph for the shapes of the arrays, which reads the variables as they are; see `reference.compiled`."""

    def call(*arrays):
        variables = list(getattr(model, "variables", ()))
        known, programs = _programs.get(model, ([], {}))
        if len(known) != len(variables) or any(old is not new for old, new in zip(known, variables)):
            programs = {}  # LoRA and quantization exchange variables, and change what is to be traced
        _programs[model] = variables, programs
        shapes = tuple((x.shape, x.dtype) for x in keras.tree.flatten(arrays))
        key = function, static, shapes  # one tf.function each: it takes many shapes for a mistake and warns
        if key not in programs:
            programs[key] = _program(weakref.ref(model), function, static)
        return keras.tree.map_structure(np.asarray, programs[key](*arrays))

    return call


def _program(model, function, static):
    # On a CPU XLA is no faster than the graph, and takes longer to compile.
    @tf.function(autograph=False, jit_compile=bool(tf.config.list_physical_devices("GPU")))
    def program(*arrays):
        return function(model(), *static, *arrays)

    return program


def loss_gradients(model, x, y=None, sample_weight=None):
    batch = reference.as_tensors(x, y, sample_weight)
    weights = [variable.value for variable in model.trainable_weights]
    with tf.GradientTape() as tape:
        loss = reference.evaluated_loss(model, *batch)
    found = tape.gradient(loss, weights, unconnected_gradients="zero")
    return [np.asarray(tf.cast(tf.convert_to_tensor(gradient), "float32")) for gradient in found]


def embed(table, ids):
    """The gradient of the table as a dense tensor, with the shares of a repeated id added up.

    TensorFlow's own leaves them apart, and Keras's optimizers (3.15.1) square and clip them one by one.
    """
    table, ids = tf.convert_to_tensor(table), tf.cast(ids, "int32")

    @tf.custom_gradient
    def run(table):
        def gradient(upstream):
            return tf.math.unsorted_segment_sum(upstream, ids, tf.shape(table)[0])

        return tf.gather(table, ids), gradient

    return run(table)


def recurrence(step, state, inputs, weights, shared=(), reverse=False):
    """Two loops: the one back forms each weight's gradient as one product, after it. See `reference.recurrence`.

    Products are kept for the way back; what lies between them is computed again.
    """
    nests = state, inputs, weights, shared
    shapes = {}  # filled by the forward pass
    flat = [tf.identity(x) for x in keras.tree.flatten(nests)]  # else one that comes twice would count for both

    @tf.custom_gradient
    def run(*flat):
        state, inputs, weights, shared = keras.tree.pack_sequence_as(nests, flat)
        result, kept = _forth(step, state, inputs, weights, shared, reverse)
        shapes["result"] = result

        def gradient(*gradients):
            nest = keras.tree.pack_sequence_as(result, gradients)
            found = keras.tree.flatten(_back(step, inputs, weights, shared, reverse, kept, nest))
            return _differentiable(plain, flat, gradients, found)

        return keras.tree.flatten(result), gradient

    def plain(*flat):
        state, inputs, weights, shared = keras.tree.pack_sequence_as(nests, flat)
        return keras.tree.flatten(_forth(step, state, inputs, weights, shared, reverse)[0])

    flat = run(*flat)
    return keras.tree.pack_sequence_as(shapes["result"], flat)


def _forth(step, state, inputs, weights, shared, reverse):
    """The result, and what the way back needs: the states before each position, and the products."""

    def one(t, state):
        products = {}

        def product(name, left):
            products[name] = reference.times(left, weights[name])
            return products[name]

        following, output = step(state, _at(inputs, t), product, shared)
        return following, (output, state, products)

    length = tf.shape(keras.tree.flatten(inputs)[0])[0]
    t, forward = (length - 1, -1) if reverse else (0, 1)
    state, rows = one(t, state)  # the first tells the structure and shapes
    arrays = [_array(length, x).write(t, x) for x in keras.tree.flatten(rows)]

    def body(t, state, arrays):
        state, again = one(t, state)
        return t + forward, state, [a.write(t, x) for a, x in zip(arrays, keras.tree.flatten(again))]

    _, state, arrays = _loop(length - 1, body, (t + forward, state, arrays))
    outputs, *kept = keras.tree.pack_sequence_as(rows, [_stack(a, inputs) for a in arrays])
    return (state, outputs), kept


def _back(step, inputs, weights, shared, reverse, kept, gradients):
    """The gradients of state, inputs, weights and shared."""
    states, products = kept
    of_state, of_outputs = gradients

    def one(t, of_state):
        factors = {}

        def product(name, left):
            factors[name] = left
            return _known(left, zeros[name], weights[name], products[name][t])

        state, x = _at(states, t), _at(inputs, t)
        zeros = {name: tf.zeros_like(z[t]) for name, z in products.items()}
        sources = state, x, zeros, shared
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            leaves = keras.tree.flatten(sources)
            tape.watch([s for s in leaves if s.dtype.is_floating])
            result = step(state, x, product, shared)
        found = tape.gradient(keras.tree.flatten(result), [s for s in leaves if s.dtype.is_floating],
                              keras.tree.flatten((of_state, _at(of_outputs, t))), "zero")  # fmt: skip
        found = iter(found)
        found = [next(found) if s.dtype.is_floating else tf.zeros((), tf.float32) for s in leaves]
        of_state, of_x, of_products, of_shared = keras.tree.pack_sequence_as(sources, found)
        return of_state, of_shared, (of_x, of_products, factors)

    length = tf.shape(keras.tree.flatten(inputs)[0])[0]
    t, backward = (0, 1) if reverse else (length - 1, -1)
    of_state, of_shared, rows = one(t, of_state)
    arrays = [_array(length, x).write(t, x) for x in keras.tree.flatten(rows)]

    def body(t, of_state, of_shared, arrays):
        of_state, more, again = one(t, of_state)
        of_shared = keras.tree.map_structure(tf.add, of_shared, more)
        return t + backward, of_state, of_shared, [a.write(t, x) for a, x in zip(arrays, keras.tree.flatten(again))]

    _, of_state, of_shared, arrays = _loop(length - 1, body, (t + backward, of_state, of_shared, arrays))
    of_inputs, of_products, factors = keras.tree.pack_sequence_as(rows, [_stack(a, inputs) for a in arrays])
    of_weights = {
        name: tf.einsum("tbi,tbj->ij" if len(w.shape) == 2 else "tbi,tbj->bij", factors[name], of_products[name])
        for name, w in weights.items()
    }
    integers = lambda x, gradient: gradient if x.dtype.is_floating else None  # noqa: E731
    of_inputs = keras.tree.map_structure(integers, inputs, of_inputs)
    of_shared = keras.tree.map_structure(integers, shared, of_shared)
    return of_state, of_inputs, of_weights, of_shared


def _differentiable(body, tensors, gradients, found):
    """What was `found` as gradients of the tensors, to be differentiated as those of body(*tensors): `_back` takes
    for constants what the way there has kept.

    Args:
        body: function of the tensors that returns a list of tensors.
        tensors: list of tensors; of those that hold no floats, what was found is left as it is.
        gradients: list of tensors, of the results.
        found: list of tensors, as long as `tensors`.
    """
    learnt = [i for i, x in enumerate(tensors) if x.dtype.is_floating]

    @tf.custom_gradient
    def run(*_):
        def second(*upstream):
            sources = [*[tensors[i] for i in learnt], *gradients]
            with tf.GradientTape(watch_accessed_variables=False) as outer:
                outer.watch(sources)
                with tf.GradientTape(watch_accessed_variables=False) as inner:
                    inner.watch(sources)
                    results = body(*tensors)
                first = inner.gradient(results, sources[: len(learnt)], gradients, "zero")
            return outer.gradient(first, sources, upstream, "zero")

        return [tf.identity(found[i]) for i in learnt], second

    result = dict(zip(learnt, run(*[tensors[i] for i in learnt], *gradients)))
    return [result.get(i, x) for i, x in enumerate(found)]


@tf.custom_gradient
def _known(left, zero, weight, value):
    """The product left weight + zero, whose value is known."""

    def gradient(of_product):
        if len(weight.shape) == 2:
            return tf.matmul(of_product, weight, transpose_b=True), of_product, None, None
        return tf.linalg.matvec(weight, of_product), of_product, None, None

    return tf.identity(value), gradient


def _at(nest, t):
    return keras.tree.map_structure(lambda x: x[t], nest)


def _array(length, x):
    return tf.TensorArray(x.dtype, length, element_shape=x.shape, clear_after_read=False)


def _stack(array, inputs):
    """The rows of an array; their number is known if that of the inputs is."""
    x = array.stack()
    return tf.ensure_shape(x, [keras.tree.flatten(inputs)[0].shape[0], *x.shape[1:]])


def _loop(count, body, variables):
    """Its end is known beforehand: without that, XLA cannot differentiate it."""
    return tf.while_loop(lambda *_: True, body, variables, maximum_iterations=count)


def gru(x, state, kernel, recurrent_kernel, bias=None, recurrent_bias=None, mask=None, reverse=False,
        reset_after=False, update="old"):  # fmt: skip
    return reference.gru_by(
        recurrence, x, state, kernel, recurrent_kernel, bias, recurrent_bias, mask, reverse, reset_after, update
    )


def lstm(x, state, kernel, recurrent_kernel, bias=None, mask=None, reverse=False, window=None):
    return reference.lstm_by(recurrence, x, state, kernel, recurrent_kernel, bias, mask, reverse, window)


def additive_scores(query, keys, scale):
    """Loops over chunks of queries; the one back computes tanh again. See `reference.additive_scores`."""
    dtype = keras.backend.result_type(query.dtype, keys.dtype, scale.dtype)
    wide = keras.backend.result_type(dtype, "float32")
    query, keys, scale = (tf.cast(tf.convert_to_tensor(x), wide) for x in (query, keys, scale))

    @tf.custom_gradient
    def run(*_):
        # Both ways read the tensors from outside: a loop around them sees that the keys are always the same.
        def gradient(upstream):
            return _additive_gradients(query, keys, scale, upstream)

        return _additive_values(query, keys, scale), gradient

    scores = run(query, keys, scale)
    scores.set_shape((*query.shape[:2], keys.shape[1]))
    return tf.cast(scores, dtype)


def _additive_values(query, keys, scale):
    def values(query):
        hidden = tf.tanh(query[:, :, None] + keys)
        scores = tf.matmul(tf.reshape(hidden, (-1, tf.shape(scale)[0])), scale[:, None])
        return tf.reshape(scores, tf.shape(hidden)[:3])

    blocks = _blocks(keys, query)
    if blocks is None:
        return tf.transpose(values(tf.transpose(query, (1, 0, 2))), (1, 0, 2))

    def body(i, array):
        return i + 1, array.write(i, values(blocks[0][i]))

    count = tf.shape(blocks[0])[0]
    array = tf.TensorArray(query.dtype, count, element_shape=(*blocks[0].shape[1:3], keys.shape[1]))
    _, array = tf.while_loop(lambda i, _: i < count, body, (0, array), parallel_iterations=1)
    return _joined(array.stack(), query)


def _additive_gradients(query, keys, scale, upstream):
    def gradients(query, upstream):
        hidden = tf.tanh(query[:, :, None] + keys)
        units = tf.shape(scale)[0]
        of_scale = tf.matmul(tf.reshape(upstream, (1, -1)), tf.reshape(hidden, (-1, units)))[0]
        of_sum = upstream[..., None] * (1 - hidden * hidden)
        return tf.reduce_sum(of_sum, 2), tf.reduce_sum(of_sum, 0), of_scale

    blocks = _blocks(keys, query, upstream)
    if blocks is None:
        of_query, of_keys, of_scale = gradients(*(tf.transpose(x, (1, 0, 2)) for x in (query, upstream)))
        return tf.transpose(of_query, (1, 0, 2)) * scale, of_keys * scale, of_scale

    def body(i, array, of_keys, of_scale):
        of_query, of_keys_here, of_scale_here = gradients(blocks[0][i], blocks[1][i])
        return i + 1, array.write(i, of_query), of_keys + of_keys_here, of_scale + of_scale_here

    count = tf.shape(blocks[0])[0]
    array = tf.TensorArray(query.dtype, count, element_shape=blocks[0].shape[1:])
    start = 0, array, tf.zeros_like(keys), tf.zeros_like(scale)
    _, array, of_keys, of_scale = tf.while_loop(lambda i, *_: i < count, body, start, parallel_iterations=1)
    return _joined(array.stack(), query) * scale, of_keys * scale, of_scale


def _blocks(keys, *arrays):
    """Arrays (batch, queries, n) cut into (blocks, chunk, batch, n), padded with zeros; None if one chunk is all."""
    device = "gpu" if tf.config.list_physical_devices("GPU") else "cpu"
    queries = arrays[0].shape[1]
    if queries == 1:
        return None
    if queries is not None and keys.shape.is_fully_defined():
        chunk = reference.queries_at_once(keys.shape, device)
        if chunk >= queries:
            return None
    else:
        budget, one = reference.CHUNK_BYTES[device], 4 * tf.size(keys, "int64")
        queries = tf.shape(arrays[0])[1]
        chunk = tf.cast(tf.clip_by_value(budget // tf.maximum(one, 1), 1, 2**30), "int32")
        chunk = tf.maximum(tf.minimum(chunk, queries), 1)
    blocks = []
    for x in arrays:
        padded = tf.pad(tf.transpose(x, (1, 0, 2)), ((0, -queries % chunk), (0, 0), (0, 0)))
        count = (queries + chunk - 1) // chunk
        block = tf.reshape(padded, (count, chunk, tf.shape(x)[0], tf.shape(x)[2]))
        block.set_shape((None, None, x.shape[0], x.shape[2]))
        blocks.append(block)
    return blocks


def _joined(blocks, query):
    shape = tf.shape(blocks)
    return tf.transpose(tf.reshape(blocks, (-1, shape[2], shape[3]))[: tf.shape(query)[1]], (1, 0, 2))

"""The plain bodies, in keras.ops: what every override must equal, in value and gradient."""

import math

import keras
import numpy as np
from keras import ops

__all__ = [
    "dense",
    "layer_norm",
    "split_heads",
    "join_heads",
    "masked_softmax",
    "attention_weights",
    "dot_product_attention",
    "dropout",
    "truncated_normal",
    "portable_bits",
    "token_cross_entropy",
    "adam_update",
    "clip_gradients",
    "update_if",
    "differentiate",
    "loss_gradients",
    "write",
    "fast_matmul",
    "compiled",
    "direct_call",
    "unfold",
    "top_k",
    "embed",
    "additive_scores",
    "recurrence",
    "gru",
    "gru_step",
    "gru_weights",
    "lstm",
    "times",
]

# Of tanh in `additive_scores`: on a CPU it must stay in the last-level cache (8 of 32 MB here; 2 to 8 MB take the same
# time, 64 MB up to twice), on a GPU fill the device (not measured).
CHUNK_BYTES = {"cpu": 8 * 2**20, "gpu": 256 * 2**20}
MASKED = -1e30  # finite: a row with nothing but masked positions gets equal weights, not NaN


def dense(x, kernel, bias=None):
    """x kernel + bias: float (..., out) from x (..., in), kernel (in, out) and bias (out,)."""
    x = ops.matmul(x, kernel)
    return x if bias is None else ops.add(x, bias)


def layer_norm(x, gamma, beta, epsilon):
    """(x - mean) / sqrt(variance + epsilon) gamma + beta over the last axis; gamma and beta may be None."""
    return ops.layer_normalization(x, gamma, beta, axis=-1, epsilon=epsilon)


def split_heads(x, num_heads):
    """(batch, length, heads * head_dim) to (batch, heads, length, head_dim)."""
    return ops.swapaxes(ops.reshape(x, (-1, ops.shape(x)[1], num_heads, x.shape[2] // num_heads)), 1, 2)


def join_heads(x):
    """(batch, heads, length, head_dim) to (batch, length, heads * head_dim)."""
    x = ops.swapaxes(x, 1, 2)
    return ops.reshape(x, (-1, ops.shape(x)[1], x.shape[2] * x.shape[3]))


def masked_softmax(scores, mask=None):
    """Softmax over the last axis, in float32, of the positions where `mask` is True.

    Args:
        scores: float (..., length).
        mask: bool, broadcastable to `scores`; None keeps every position. A row that is False throughout gets
            equal weights.

    Returns:
        float32, the shape of `scores`; each row sums to 1.
    """
    scores = ops.cast(scores, "float32")
    if scores.shape[-1] == 1:  # where keras.ops.softmax would warn
        return ops.ones_like(scores)
    return ops.softmax(scores if mask is None else ops.where(mask, scores, MASKED), axis=-1)


def attention_weights(query, key, mask=None, bias=None):
    """Weights softmax(q k^T / sqrt(d_k) + bias), float32 (batch, heads, queries, keys)."""
    scores = ops.matmul(query * query.shape[-1] ** -0.5, ops.swapaxes(key, -1, -2))
    return masked_softmax(scores if bias is None else ops.cast(scores, "float32") + bias, mask)


def dot_product_attention(query, key, value, mask=None, bias=None):
    """softmax(q k^T / sqrt(d_k) + bias) v for each head. Source: Vaswani et al. 2017, section 3.2.1, equation 1.

    Args:
        query: float (batch, heads, queries, d_k).
        key: float (batch, heads, keys, d_k).
        value: float (batch, heads, keys, d_v).
        mask: bool, broadcastable to (batch, heads, queries, keys), True where a query may look.
        bias: float, broadcastable likewise, added to the scaled scores.

    Returns:
        float (batch, heads, queries, d_v), in the dtype of `value`.
    """
    weights = attention_weights(query, key, mask, bias)
    return ops.matmul(ops.cast(weights, value.dtype), value)


def dropout(x, rate, seed):
    """Zeroes each element with probability `rate` and divides the others by 1 - rate.

    Args:
        x: float tensor.
        rate: float, 0 to 1.
        seed: a keras.random.SeedGenerator; it advances by one draw.
    """
    return keras.random.dropout(x, rate, seed=seed)


def truncated_normal(shape, mean, stddev, dtype, seed):
    """Normal numbers, drawn again where they are more than two deviations from the mean.

    Args:
        shape: tuple of int.
        mean, stddev: float, of the normal distribution before it is cut.
        dtype: a float dtype; None is Keras's floatx.
        seed: int, which gives the same numbers every time, or a keras.random.SeedGenerator.
    """
    return keras.random.truncated_normal(shape, mean, stddev, dtype, seed)


def portable_bits(words, shape, xp=ops):
    """Random bits that are the same on every backend: a hash of each element's index and of the two words of a seed.

    The hash is murmur3's finaliser, twice, with a key before each round; three more rounds make the keys from the
    words, one to one, so that neighbouring seeds and counts give unrelated keys. For given words it is one to one in
    the index: no two elements are equal. Nothing but int32 that wraps, which all backends have and compute alike.
    Source: Appleby 2011, MurmurHash3, fmix32.

    Args:
        words: int32 (2,), as from `SeedGenerator.next()`.
        shape: tuple of int, of fewer than 2^31 elements.
        xp: `keras.ops`, or `numpy` for words and a result outside the framework; the bits are the same.

    Returns:
        int32 of `shape`, each of the 2^32 values equally likely.
    """

    def mixed(x, key):
        x = (x + key) * -0x61C88647  # 2^32 / golden ratio; the factors are unsigned numbers less 2^32
        for shift, factor in ((16, -0x7A143595), (13, -0x3D4D51CB), (16, 1)):
            shifted = xp.bitwise_and(xp.right_shift(x, shift), 2 ** (32 - shift) - 1)  # the shift copies the sign
            x = xp.bitwise_xor(x, shifted) * factor
        return x

    first, second = words[:1], words[1:]
    first = mixed(first, 1)
    second = mixed(second, first)
    first = mixed(first, second)
    index = xp.arange(math.prod(shape), dtype="int32")
    return xp.reshape(mixed(mixed(index, first), second), shape)


def token_cross_entropy(logits, labels, smoothing=0.0):
    """Cross-entropy of each token against (1 - smoothing) on its label plus smoothing / V on every class.

    -sum_c q_c log p_c = logsumexp(z) - (1 - smoothing) z_label - smoothing mean(z)

    Args:
        logits: float (..., vocab_size).
        labels: int (...), from 0 to vocab_size - 1.
        smoothing: float, 0 to 1.

    Returns:
        float32 (...), natural logarithm; NaN where the label is outside, of which a compiled program cannot complain.

    Raises:
        RuntimeError: if a label is outside, by the override for PyTorch.
    """
    logits, labels = ops.cast(logits, "float32"), ops.cast(labels, "int32")
    chosen = ops.sum(ops.one_hot(labels, logits.shape[-1], dtype="float32") * logits, axis=-1)
    loss = ops.logsumexp(logits, axis=-1) - (1 - smoothing) * chosen
    loss = loss if smoothing == 0 else loss - smoothing * ops.mean(logits, axis=-1)
    return ops.where((labels >= 0) & (labels < logits.shape[-1]), loss, math.nan)


def adam_update(
    variables, gradients, momentums, velocities, learning_rate, step, beta_1, beta_2, epsilon, weight_decay=0.0
):
    """One Adam update of several variables, in place, in the form that Keras and TensorFlow share.

    m = m + (1 - beta_1)(g - m);  v = v + (1 - beta_2)(g^2 - v)
    w = (1 - rate weight_decay) w - rate sqrt(1 - beta_2^step) / (1 - beta_1^step) m / (sqrt(v) + epsilon)
    Source: Kingma and Ba 2015, section 2, the variant at its end; decay of Loshchilov and Hutter 2019.

    Args:
        variables, momentums, velocities: lists of variables w, m, v.
        gradients: list of float tensors, each the shape of its variable.
        learning_rate, step: scalars; step counts from 1.
        beta_1, beta_2, epsilon, weight_decay: Python floats.
    """
    kept = 1 - learning_rate * weight_decay
    alpha = learning_rate * ops.sqrt(1 - ops.power(beta_2, step)) / (1 - ops.power(beta_1, step))
    for variable, gradient, momentum, velocity in zip(variables, gradients, momentums, velocities):
        gradient = ops.cast(gradient, variable.dtype)
        momentum.assign(momentum + (gradient - momentum) * (1 - beta_1))
        velocity.assign(velocity + (ops.square(gradient) - velocity) * (1 - beta_2))
        change = ops.cast(alpha, variable.dtype) * momentum / (ops.sqrt(velocity) + epsilon)
        variable.assign((variable * ops.cast(kept, variable.dtype) if weight_decay else variable) - change)


def clip_gradients(gradients, norm, variables=()):
    """Gradients times norm / n if n, the norm of them all together, is larger; NaN or infinite, they become NaN.

    Args:
        gradients: list of float tensors.
        norm: float, above 0.
        variables: list of variables; where a framework keeps gradients with them, those may be used up.

    Returns:
        list of float tensors.
    """
    found = ops.sqrt(sum(ops.sum(ops.square(ops.cast(x, "float32"))) for x in gradients))
    scale = ops.minimum(norm / found, 1.0) + (found - found)
    return [x * ops.cast(scale, x.dtype) for x in gradients]


def update_if(condition, update, variables):
    """Calls update(), and takes back what it did to the variables if the scalar condition is False.

    Args:
        condition: bool scalar.
        update: function without arguments that writes to no other variables.
        variables: list of variables.
    """
    before = [ops.copy(ops.convert_to_tensor(variable)) for variable in variables]
    update()
    for variable, old in zip(variables, before):
        variable.assign(ops.where(condition, ops.convert_to_tensor(variable), old))


def differentiate(variable, wanted=None):
    """Says whether the next gradients must have that of the variable, where the framework can leave it out.

    PyTorch can: its graph is new at every step. A compiled step would have to be compiled anew, and computes it still.

    Args:
        variable: a variable of a model.
        wanted: bool; None changes nothing.

    Returns:
        bool, whether the next gradients will have it.
    """
    return True


def loss_gradients(model, x, y=None, sample_weight=None):
    """The gradients of a compiled model's loss on one batch, which it sees as in `evaluate`; no weight changes.

    This body takes central differences, one number of one weight after the other: for tests, of small models.

    Args:
        model: a compiled keras.Model.
        x, y, sample_weight: arrays or nests of arrays, as for `train_on_batch`.

    Returns:
        list of NumPy float arrays, in the order of `model.trainable_weights`.
    """
    batch = as_tensors(x, y, sample_weight)
    found = []
    for variable in model.trainable_weights:
        value = ops.convert_to_numpy(variable.value).astype("float64")
        gradient = np.zeros_like(value)
        for index in np.ndindex(*value.shape):
            losses = []
            for step in (1e-2, -1e-2):
                moved = value.copy()
                moved[index] += step
                variable.assign(moved)
                losses.append(float(ops.convert_to_numpy(evaluated_loss(model, *batch))))
            gradient[index] = (losses[0] - losses[1]) / 2e-2
        variable.assign(value)
        found.append(gradient)
    return found


def as_tensors(*batch):
    """Nests of arrays as nests of tensors; None stays."""
    return [keras.tree.map_structure(lambda a: None if a is None else ops.convert_to_tensor(a), x) for x in batch]


def evaluated_loss(model, x, y, sample_weight):
    """What `evaluate` would find: float scalar."""
    found = model(x, training=False)
    return model.compute_loss(x, y, found, sample_weight, training=False)


def write(cache, update, position):
    """The cache with `update` at `position` of the axis of time; an override may do it in place.

    Args:
        cache: float (rows, heads, max_length, dim).
        update: float (rows, heads, 1, dim).
        position: int.
    """
    start = [0, 0, position, 0]
    return ops.slice_update(cache, start, ops.cast(update, cache.dtype))


def fast_matmul():
    """Chooses the fastest exact float32 matrix product of this machine's processor; here it is already chosen.

    Returns:
        str, what was chosen.
    """
    return "default"


def compiled(model, function, *static):
    """A program of `function(model, *static, *arrays)`, compiled once per model, function, static arguments and shapes.

    Args:
        model: the object whose `variables` the function reads.
        function: a function of this module's kind, in keras.ops.
        static: hashable arguments that the program is made for.

    Returns:
        Callable of nests of NumPy arrays that returns a nest of NumPy arrays.
    """

    def call(*arrays):
        arrays = keras.tree.map_structure(ops.convert_to_tensor, arrays)
        return keras.tree.map_structure(ops.convert_to_numpy, function(model, *static, *arrays))

    return call


def direct_call(layer, args, kwargs):
    """Whether `layer.call(*args, **kwargs)` may stand for the full call, which takes 0.1 ms more.

    Where a step is a compiled program that is paid once, so an override is for frameworks that go call by call.

    Args:
        layer: a built layer.
        args, kwargs: tuple and dict.

    Returns:
        bool.
    """
    return False


def unfold(step, carry, record):
    """Calls `carry, row, stop = step(t, carry)` for t = 0, 1, ... and writes each row at place t of the record.

    Args:
        step: function of int t and the carry; `stop` is a bool scalar.
        carry: nest of tensors, of the same shapes in and out.
        record: nest of tensors (length, ...), the structure of `row`; the loop ends when it is full, or at `stop`.

    Returns:
        The last carry, the record, and the number of rows written.
    """
    length = keras.tree.flatten(record)[0].shape[0]

    def more(t, carry, record, stop):
        return ops.logical_and(t < length, ops.logical_not(stop))

    def body(t, carry, record, stop):
        carry, row, stop = step(t, carry)
        put = lambda rows, values: ops.slice_update(rows, [t] + [0] * (len(rows.shape) - 1), values[None])  # noqa: E731
        return t + 1, carry, keras.tree.map_structure(put, record, row), stop

    start = ops.convert_to_tensor(0, "int32"), carry, record, ops.convert_to_tensor(False)
    t, carry, record, _ = ops.while_loop(more, body, start)
    return carry, record, t


def top_k(x, k):
    """The k greatest values along the last axis and their places, int32; of equal values the first comes first."""
    values, indices = ops.top_k(ops.where(ops.equal(x, 0), 0.0, x), k)  # JAX puts -0.0 below 0.0
    return values, ops.cast(indices, "int32")


def embed(table, ids):
    """Rows of a table: float (..., dim) from a table (rows, dim) and int ids (...)."""
    return ops.take(table, ids, axis=0)


def additive_scores(query, keys, scale):
    """e_ij = scale . tanh(query_i + keys_j). Source: Bahdanau, Cho, Bengio 2015, appendix A.1.2.

    Args:
        query: float (batch, queries, units), projected.
        keys: float (batch, length, units), projected.
        scale: float (units,).

    Returns:
        float (batch, queries, length). The overrides never hold (batch, queries, length, units): they take a few
        queries at a time, CHUNK_BYTES of tanh, and compute it again for the gradient.
    """
    return ops.matmul(ops.tanh(query[:, :, None] + keys[:, None]), scale)


def recurrence(step, state, inputs, weights, shared=(), reverse=False):
    """A recurrent network: `state, output = step(state, x, product, shared)` for every position in turn.

    What `step` multiplies by a weight it asks of product(name, left) = left weights[name], once a name. An override
    then forms a weight's gradient as one product over all positions, after the loop, in place of a sum of as many.

    Args:
        step: function in keras.ops; it reads no other differentiable tensor than its arguments.
        state: nest of float (batch, ...).
        inputs: nest of tensors (length, batch, ...), without None; x is their entry at a position.
        weights: dict of name to float (in, out), or (batch, in, out) for one of each row's own.
        shared: nest of tensors that every position reads.
        reverse: whether to go from the last position to the first.

    Returns:
        The last state; and the outputs, nest of (length, batch, ...), each where its input stands.
    """

    def product(name, left):
        return times(left, weights[name])

    length = keras.tree.flatten(inputs)[0].shape[0]
    if length is None:
        raise ValueError("The plain recurrence is unrolled: its length must be known when it is traced.")
    outputs = [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        x = keras.tree.map_structure(lambda x: x[t], inputs)  # noqa: B023
        state, outputs[t] = step(state, x, product, shared)
    return state, keras.tree.map_structure(lambda *rows: ops.stack(rows), *outputs)


def times(left, weight):
    """left weight: float (batch, out) from left (batch, in) and a weight (in, out) or (batch, in, out)."""
    return ops.matmul(left, weight) if len(weight.shape) == 2 else ops.matmul(left[:, None], weight)[:, 0]


def gru(x, state, kernel, recurrent_kernel, bias=None, recurrent_bias=None, mask=None, reverse=False,
        reset_after=False, update="old"):  # fmt: skip
    """Gated recurrent units over a sequence; the columns of kernels and biases are [z, r, candidate], n each.

    z = sigmoid(x Wz + h Uz), r = sigmoid(x Wr + h Ur), c = tanh(x W + (r h) U), or tanh(x W + r (h U)) with
    `reset_after`; h becomes (1 - z) h + z c if z weighs the "new", z h + (1 - z) c if it weighs the "old".
    Source: Bahdanau, Cho, Bengio 2015, appendix A.1.1 ("new"); Cho et al. 2014, section 2.3 ("old").

    Args:
        x: float (batch, length, in).
        state: float (batch, n), h before the first step.
        kernel: float (in, 3n); None if x is the inputs' share in the gates already, (batch, length, 3n).
        recurrent_kernel: float (n, 3n).
        bias: float (3n,), of the inputs.
        recurrent_bias: float (3n,), inside of r's product, for `reset_after` only.
        mask: bool (batch, length); where it is False, h stays as it is.
        reverse: whether to go from the last position to the first.
        reset_after: whether r follows the recurrent product.
        update: "new" or "old".

    Returns:
        h at every position, float (batch, length, n), and the last h.
    """
    return gru_by(
        recurrence, x, state, kernel, recurrent_kernel, bias, recurrent_bias, mask, reverse, reset_after, update
    )


def gru_by(recurrence, x, state, kernel, recurrent_kernel, bias, recurrent_bias, mask, reverse, reset_after, update):
    """`gru` with a given body of `recurrence`."""

    def step(h, inputs, product, shared):
        new = gru_step(h, inputs["x"], product, shared.get("bias"), reset_after, update)
        new = ops.where(inputs["mask"], new, h) if "mask" in inputs else new
        return new, new

    gates = ops.swapaxes(x, 0, 1)
    gates = gates if kernel is None else dense(gates, kernel, bias)
    shared = {} if recurrent_bias is None else {"bias": recurrent_bias}
    weights = gru_weights(recurrent_kernel, reset_after)
    state, outputs = recurrence(step, state, _time_major(gates, mask), weights, shared, reverse)
    return ops.swapaxes(outputs, 0, 1), state


def gru_step(h, gates, product, recurrent_bias=None, reset_after=False, update="old"):
    """One step of `gru` inside of a `recurrence` over `gru_weights`; gates float (batch, 3n), the inputs' share."""
    n = h.shape[-1]
    recurrent = product("gates", h)
    if recurrent_bias is not None:
        recurrent = recurrent + recurrent_bias
    z, r = ops.split(ops.sigmoid(gates[:, : 2 * n] + recurrent[:, : 2 * n]), 2, axis=-1)
    inner = r * recurrent[:, 2 * n :] if reset_after else product("candidate", r * h)
    candidate = ops.tanh(gates[:, 2 * n :] + inner)
    return h + z * (candidate - h) if update == "new" else candidate + z * (h - candidate)


def gru_weights(recurrent_kernel, reset_after=False):
    """What `gru_step` multiplies by: all of the recurrent kernel at once, or the candidate's part by itself."""
    if reset_after:
        return {"gates": recurrent_kernel}
    n = recurrent_kernel.shape[0]
    return {"gates": recurrent_kernel[:, : 2 * n], "candidate": recurrent_kernel[:, 2 * n :]}


def lstm(x, state, kernel, recurrent_kernel, bias=None, mask=None, reverse=False, window=None):
    """Long short-term memory over a sequence; the columns of kernels and bias are [i, f, g, o], n each.

    i, f, o = sigmoid(x W + h U + b), g = tanh(x W + h U + b);  c = f c + i g,  h = o tanh(c)
    Source: Hochreiter and Schmidhuber 1997; with forget gates, Gers, Schmidhuber, Cummins 2000, section 3.

    Args:
        x: float (batch, length, in).
        state: pair of float (batch, n), h and c before the first step.
        kernel: float (in, 4n).
        recurrent_kernel: float (n, 4n).
        bias: float (4n,).
        mask: bool (batch, length); where it is False, h and c stay as they are.
        reverse: whether to go from the last position to the first.
        window: int; no gradient passes from a window of so many positions to the one read before it.

    Returns:
        h at every position, float (batch, length, n), and the last (h, c).
    """
    return lstm_by(recurrence, x, state, kernel, recurrent_kernel, bias, mask, reverse, window)


def lstm_by(recurrence, x, state, kernel, recurrent_kernel, bias, mask, reverse, window):
    """`lstm` with a given body of `recurrence`."""

    def step(state, inputs, product, _):
        (h, c), mask = state, inputs.get("mask")
        if "cut" in inputs:
            h, c = (ops.where(inputs["cut"], ops.stop_gradient(s), s) for s in (h, c))
        i, f, g, o = ops.split(inputs["x"] + product("gates", h), 4, axis=-1)
        new_c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        new_h = ops.sigmoid(o) * ops.tanh(new_c)
        if mask is not None:
            new_h, new_c = ops.where(mask, new_h, h), ops.where(mask, new_c, c)
        return (new_h, new_c), new_h

    inputs = _time_major(dense(ops.swapaxes(x, 0, 1), kernel, bias), mask)
    if window is not None and not (isinstance(x.shape[1], int) and x.shape[1] <= window):
        place = ops.arange(ops.shape(x)[1])
        place = ops.flip(place) if reverse else place
        inputs["cut"] = ((place % window == 0) & (place > 0))[:, None, None]
    state, outputs = recurrence(step, tuple(state), inputs, {"gates": recurrent_kernel}, (), reverse)
    return ops.swapaxes(outputs, 0, 1), state


def _time_major(x, mask):
    """The inputs of a recurrence: x, (length, batch, ...) already, and the mask, if any, (length, batch, 1)."""
    inputs = {"x": x}
    if mask is not None:
        inputs["mask"] = ops.swapaxes(ops.cast(mask, "bool"), 0, 1)[..., None]
    return inputs


def queries_at_once(keys_shape, device):
    """How many queries' tanh(query + keys) fit into CHUNK_BYTES in float32, at least 1; device "cpu" or "gpu"."""
    return max(1, CHUNK_BYTES[device] // (4 * max(1, math.prod(keys_shape))))

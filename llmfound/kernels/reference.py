"""The plain bodies, in keras.ops: what every override must equal, in value and gradient."""

import keras
from keras import ops

__all__ = [
    "masked_softmax",
    "attention_weights",
    "dot_product_attention",
    "dropout",
    "token_cross_entropy",
    "adam_update",
    "write",
    "fast_matmul",
    "compiled",
    "unfold",
    "top_k",
]

MASKED = -1e30  # finite: a row with nothing but masked positions gets equal weights, not NaN


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
    scores = ops.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    return masked_softmax(scores if bias is None else ops.cast(scores, "float32") + bias, mask)


def dot_product_attention(query, key, value, mask=None, bias=None):
    """softmax(q k^T / sqrt(d_k) + bias) v for each head. Source: Vaswani et al. 2017, section 3.2.1, equation 1.

    Args:
        query: float (batch, queries, heads, d_k).
        key: float (batch, keys, heads, d_k).
        value: float (batch, keys, heads, d_v).
        mask: bool, broadcastable to (batch, heads, queries, keys), True where a query may look.
        bias: float, broadcastable likewise, added to the scaled scores.

    Returns:
        float (batch, queries, heads, d_v), in the dtype of `value`.
    """
    weights = attention_weights(query, key, mask, bias)
    return ops.einsum("bhqk,bkhd->bqhd", ops.cast(weights, value.dtype), value)


def dropout(x, rate, seed):
    """Zeroes each element with probability `rate` and divides the others by 1 - rate.

    Args:
        x: float tensor.
        rate: float, 0 to 1.
        seed: a keras.random.SeedGenerator; it advances by one draw.
    """
    return keras.random.dropout(x, rate, seed=seed)


def token_cross_entropy(logits, labels, smoothing=0.0):
    """Cross-entropy of each token against (1 - smoothing) on its label plus smoothing / V on every class.

    -sum_c q_c log p_c = logsumexp(z) - (1 - smoothing) z_label - smoothing mean(z)

    Args:
        logits: float (..., vocab_size).
        labels: int (...).
        smoothing: float, 0 to 1.

    Returns:
        float32 (...), natural logarithm.
    """
    logits = ops.cast(logits, "float32")
    chosen = ops.sum(ops.one_hot(ops.cast(labels, "int32"), logits.shape[-1], dtype="float32") * logits, axis=-1)
    loss = ops.logsumexp(logits, axis=-1) - (1 - smoothing) * chosen
    return loss if smoothing == 0 else loss - smoothing * ops.mean(logits, axis=-1)


def adam_update(variable, gradient, momentum, velocity, learning_rate, step, beta_1, beta_2, epsilon):
    """One Adam update, in place, in the form that Keras and TensorFlow share.

    m = m + (1 - beta_1)(g - m);  v = v + (1 - beta_2)(g^2 - v)
    w = w - rate sqrt(1 - beta_2^step) / (1 - beta_1^step) m / (sqrt(v) + epsilon)
    Source: Kingma and Ba 2015, section 2, the variant at its end.

    Args:
        variable, momentum, velocity: variables w, m, v.
        gradient: float, the shape of the variable.
        learning_rate, step: scalars; step counts from 1.
        beta_1, beta_2, epsilon: Python floats.
    """
    alpha = learning_rate * ops.sqrt(1 - ops.power(beta_2, step)) / (1 - ops.power(beta_1, step))
    gradient = ops.cast(gradient, variable.dtype)
    momentum.assign(momentum + (gradient - momentum) * (1 - beta_1))
    velocity.assign(velocity + (ops.square(gradient) - velocity) * (1 - beta_2))
    variable.assign(variable - ops.cast(alpha, variable.dtype) * momentum / (ops.sqrt(velocity) + epsilon))


def write(cache, update, position):
    """The cache with `update` at `position` of axis 1; an override may do it in place.

    Args:
        cache: float (rows, max_length, ...).
        update: float (rows, 1, ...).
        position: int.
    """
    start = [0, position] + [0] * (len(cache.shape) - 2)
    return ops.slice_update(cache, start, ops.cast(update, cache.dtype))


def fast_matmul():
    """Chooses the fastest exact float32 matrix product of this machine's processor; here it is already chosen.

    Returns:
        str, what was chosen.
    """
    return "default"

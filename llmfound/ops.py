"""Pure tensor functions that layers and models share."""

import functools

import keras
import numpy as np
from keras import ops

from llmfound.kernels import masked_softmax  # noqa: F401  the one place where masks meet scores


@keras.saving.register_keras_serializable("llmfound")
def gelu_tanh(x):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), within 4.8e-4 of x Phi(x).

    The form in the code of BERT and GPT. Source: Hendrycks and Gimpel 2016, section 2.
    """
    return ops.gelu(x, approximate=True)


def padding_mask(token_ids, pad_id):
    """bool (batch, length), True at real tokens."""
    return ops.not_equal(token_ids, pad_id)


def causal_mask(queries, keys):
    """bool (queries, keys): query i sees keys 0..i."""
    return ops.arange(queries)[:, None] >= ops.arange(keys)[None, :]


def attention_mask(mask=None, causal=False, queries=None, keys=None):
    """One bool mask, broadcastable to (batch, heads, queries, keys), from a padding mask and causality; or None.

    Args:
        mask: bool (batch, keys), (batch, queries, keys) or (batch, heads, queries, keys), True = may be looked at.
        causal: whether query i sees keys 0..i only.
        queries: int, number of queries; needed if `causal`.
        keys: int, number of keys; needed if `causal`.

    Raises:
        ValueError: if the mask has another rank, or one of (batch, keys) another length.
    """
    if mask is not None:
        mask = ops.cast(mask, "bool")
        if len(mask.shape) not in (2, 3, 4):
            raise ValueError(
                "An attention mask is (batch, keys), (batch, queries, keys) or (batch, heads, queries, keys); "
                f"got shape {tuple(mask.shape)}."
            )
        if len(mask.shape) == 2 and isinstance(keys, int) and mask.shape[1] not in (None, keys):
            raise ValueError(f"A padding mask must be (batch, {keys}), as the memory is; got {tuple(mask.shape)}.")
        mask = {2: lambda: mask[:, None, None], 3: lambda: mask[:, None], 4: lambda: mask}[len(mask.shape)]()
    if not causal:
        return mask
    causal = causal_mask(queries, keys)[None, None]
    return causal if mask is None else ops.logical_and(mask, causal)


@functools.lru_cache(maxsize=32)
def sinusoids(length, dim, layout="interleaved"):
    """The fixed position encodings, computed in float64.

    interleaved: PE[pos, 2i] = sin(pos / 10000^(2i/dim)), PE[pos, 2i+1] = cos of the same angle. Source: Vaswani et
    al. 2017, section 3.5. concatenated: w_k = 10000^(-k/(dim/2-1)), PE[pos, k] = sin(pos w_k), PE[pos, dim/2+k] =
    cos(pos w_k). Source: tensor2tensor, the authors' code; another exponent, not only another order.

    Args:
        length: int, number of positions.
        dim: int, even.
        layout: "interleaved" or "concatenated".

    Returns:
        NumPy float32 (length, dim).

    Raises:
        ValueError: if dim is odd or the layout unknown.
    """
    if layout not in ("interleaved", "concatenated"):
        raise ValueError(f'layout must be "interleaved" or "concatenated"; got {layout!r}.')
    if dim % 2:
        raise ValueError(f"Sinusoids come in pairs, so the width must be even; got {dim}.")
    half = dim // 2
    position = np.arange(length)[:, None]
    exponent = np.arange(half) / (half if layout == "interleaved" else max(half - 1, 1))
    angle = position * 10000.0**-exponent
    pair = np.sin(angle), np.cos(angle)
    table = np.stack(pair, axis=-1).reshape(length, dim) if layout == "interleaved" else np.concatenate(pair, axis=-1)
    return table.astype("float32")


def gather_positions(x, positions):
    """Rows of x at some positions: float (batch, n, dim) from x (batch, length, dim), positions int (batch, n)."""
    return ops.take_along_axis(x, positions[..., None], axis=1)


def concat_pool(x, mask=None):
    """[the last state; the greatest value of each feature; the mean]: float (batch, 3 dim) from (batch, length, dim).

    Source: Howard and Ruder 2018, section 3.3.

    Args:
        x: float (batch, length, dim).
        mask: bool (batch, length), True at what is pooled, in any pattern; None pools all. A row without any is zeros.
    """
    if mask is None:
        return ops.concatenate([x[:, -1], ops.max(x, axis=1), ops.mean(x, axis=1)], axis=-1)
    real = ops.cast(mask, x.dtype)[..., None]
    count = ops.sum(ops.cast(mask, "float32"), axis=1)[:, None]  # float16 counts to 2,048
    places = ops.arange(ops.shape(x)[1])
    last = ops.max(ops.where(mask, places, 0), axis=1)
    last = ops.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    greatest = ops.max(ops.where(real > 0, x, ops.cast(-3e4, x.dtype)), axis=1)  # within float16
    mean = ops.cast(ops.sum(ops.cast(x * real, "float32"), axis=1) / ops.maximum(count, 1), x.dtype)
    return ops.concatenate([last, greatest, mean], axis=-1) * ops.cast(count > 0, x.dtype)

"""What the attention layers of any model look at: captured for a batch, and shown in one page of HTML."""

import base64
import html
import json
import pathlib

import keras
import numpy as np
from keras import ops

from llmfound.layers import AdditiveAttention, MultiHeadAttention

LARGEST = 2**20  # bytes of a page
_TEMPLATE = pathlib.Path(__file__).with_suffix(".html")


def capture(model, inputs, layers=None):
    """The attention weights of a model's layers for one batch.

    The model is called once, without dropout and outside of any compiled step; what it is and how it is compiled stay
    as they are, and layers that are not asked for keep to their fast path.

    Args:
        model: keras.Model or layer with MultiHeadAttention or AdditiveAttention layers anywhere inside.
        inputs: what the model is called with, arrays or a dict of them.
        layers: list of str, parts of the names of layers, "encoder_block_0" for instance; None takes all.

    Returns:
        dict, the layer's path -> NumPy float32 (batch, heads, queries, keys), in the order of the calls; additive
        attention has one head. Of a layer that is called more than once, the last call.

    Raises:
        ValueError: if there is no such layer, or none of them is called.
    """
    kinds = MultiHeadAttention, AdditiveAttention
    every = [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]
    names = {id(one): one.path.removeprefix(f"{model.name}/") for one in every}
    chosen = [one for one in every if layers is None or any(part in names[id(one)] for part in layers)]
    if not chosen:
        known = ", ".join(dict.fromkeys(names.values())) or "none"
        raise ValueError(f"{model.name} has no attention layer with {layers} in its name; it has: {known}.")
    found = {}

    def listening(layer, call):
        def listen(*args, **kwargs):
            if isinstance(layer, AdditiveAttention):
                outputs = call(*args, **kwargs)
                weights = outputs[1][:, None]
            else:
                wanted = kwargs.pop("return_weights", False)
                outputs = call(*args, return_weights=True, **kwargs)
                weights = outputs[1]
                outputs = outputs if wanted else outputs[0]
            found.pop(names[id(layer)], None)
            found[names[id(layer)]] = ops.convert_to_numpy(weights).astype("float32")
            return outputs

        return listen

    for layer in chosen:
        object.__setattr__(layer, "call", listening(layer, layer.call))  # past Keras's tracking of attributes
    try:
        model(keras.tree.map_structure(ops.convert_to_tensor, inputs), training=False)
    finally:
        for layer in chosen:
            object.__delattr__(layer, "call")
    if not found:
        raise ValueError(f"None of {', '.join(names[id(one)] for one in chosen)} is called when {model.name} is.")
    return found


def entropy(weights):
    """Mean entropy of each head's rows, in bits: float (..., heads) from weights (..., heads, queries, keys)."""
    weights = np.asarray(weights, "float64")
    return -(weights * np.log2(np.maximum(weights, 1e-30))).sum(axis=-1).mean(axis=-1)


def distance(weights):
    """Mean of |query's place - key's place| under each head's weights: float (..., heads)."""
    weights = np.asarray(weights, "float64")
    queries, keys = weights.shape[-2:]
    apart = np.abs(np.arange(queries)[:, None] - np.arange(keys))
    return (weights * apart).sum(axis=-1).mean(axis=-1)


def report(captured, query_tokens, key_tokens=None, path="attention.html", title="Attention", hypotheses=(), row=0):
    """One page that needs no network: all heads of all layers, the lines and the map of one, and what heads are like.

    Args:
        captured: dict from `capture`.
        query_tokens: list of str, the tokens of the queries; or a dict, part of a layer's name -> such a list.
        key_tokens: likewise for the keys; None takes the query's tokens.
        path: file to write.
        title: str.
        hypotheses: list of (str, float), translations and their scores, shown beneath.
        row: int, which row of the batch.

    Returns:
        pathlib.Path, of the page, less than 1 MB.

    Raises:
        ValueError: if a layer has no tokens or more of them than weights, or the page would be larger.
    """
    shown = []
    for name, weights in captured.items():
        queries = _tokens(query_tokens, name)
        keys = queries if key_tokens is None else _tokens(key_tokens, name)
        weights = np.asarray(weights[row])
        heads, most, widest = weights.shape
        if not (0 < len(queries) <= most and 0 < len(keys) <= widest):
            raise ValueError(
                f"{name} has weights for {most} queries and {widest} keys, but there are {len(queries)} and "
                f"{len(keys)} tokens."
            )
        weights = weights[:, : len(queries), : len(keys)]
        bytes_ = np.round(255 * np.clip(weights, 0, 1)).astype("uint8").tobytes()
        shown.append(dict(
            name=name, heads=heads, queries=queries, keys=keys, weights=base64.b64encode(bytes_).decode(),
            entropy=entropy(weights).round(2).tolist(), distance=distance(weights).round(2).tolist(),
        ))  # fmt: skip
    data = json.dumps(dict(layers=shown, hypotheses=[[text, round(float(score), 3)] for text, score in hypotheses]))
    page = _TEMPLATE.read_text(encoding="utf-8").replace("TITLE", html.escape(title))
    page = page.replace("DATA", data.replace("<", "\\u003c"))  # no tag of the page's can end in a token
    size = len(page.encode())
    if size >= LARGEST:
        raise ValueError(
            f"The page would have {size:,} bytes, more than {LARGEST:,}; capture fewer layers, or shorter texts."
        )
    path = pathlib.Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _tokens(tokens, name):
    if not isinstance(tokens, dict):
        return [str(token) for token in tokens]
    found = [some for part, some in tokens.items() if part in name]
    if not found:
        raise ValueError(f"There are no tokens for {name}; there are for {', '.join(tokens)}.")
    return [str(token) for token in found[0]]

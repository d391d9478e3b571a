"""What the attention layers of any model look at: captured for a batch, and shown in one page of HTML."""

import base64
import collections
import html
import json
import pathlib
import re

import keras
import numpy as np
from keras import ops

from llmfound.layers import AdditiveAttention, MultiHeadAttention
from llmfound.recomputation import nothing_recomputed

LARGEST = 2**20  # bytes of a page
_TEMPLATE = pathlib.Path(__file__).with_suffix(".html")


def capture(model, inputs, layers=None):
    """The attention weights of a model's layers for one batch.

    The model is called once, without dropout and outside of any compiled step; what it is and how it is compiled stay
    as they are, and layers that are not asked for keep to their fast path.

    Args:
        model: keras.Model or layer with MultiHeadAttention or AdditiveAttention layers anywhere inside.
        inputs: what the model is called with, arrays or a dict of them.
        layers: list of str, parts of the names of layers, "encoder_block_0" for instance, or one str; None takes all.

    Returns:
        dict, the layer's path -> NumPy float32 (batch, heads, queries, keys), in the order of the calls; additive
        attention has one head. Of a layer that is called more than once, the last call; of several layers of one
        path, the second has _1 at the end of its name.

    Raises:
        ValueError: if there is no such layer, or none of them is called: RNNsearch, whose loop takes their weights
            alone, has `align`.
    """
    kinds = MultiHeadAttention, AdditiveAttention
    every = [layer for layer in model._flatten_layers() if isinstance(layer, kinds)]
    if not every:
        raise ValueError(f"{model.name} has no attention layer, neither MultiHeadAttention nor AdditiveAttention.")
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    if not all(one.built for one in every):
        model(inputs, training=False)
    names, taken = {}, collections.Counter()
    for one in every:
        name = (one.path or one.name).removeprefix(f"{model.name}/")
        names[id(one)] = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1
    parts = [""] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    chosen = [one for one in every if any(part in names[id(one)] for part in parts)]
    if not chosen:
        known = ", ".join(dict.fromkeys(names.values()))
        raise ValueError(f"{model.name} has no attention layer with any of {parts} in its name; it has: {known}.")
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
        with nothing_recomputed(model):
            model(inputs, training=False)
    finally:
        for layer in chosen:
            object.__delattr__(layer, "call")
    if not found:
        instead = "; its method `align` tells what it looks at" if hasattr(model, "align") else ""
        raise ValueError(
            f"None of {', '.join(names[id(one)] for one in chosen)} is called when {model.name} is{instead}."
        )
    return found


def entropy(weights, mask=None):
    """Mean entropy of each head's rows, in bits.

    Args:
        weights: float (..., heads, queries, keys).
        mask: bool (..., queries), True at the queries that count, the real tokens of a padded batch; None counts all.

    Returns:
        float (..., heads), NaN where no query counts.

    Raises:
        ValueError: if the mask has not one entry for each query.
    """
    weights = np.asarray(weights, "float64")
    return _mean(-(weights * np.log2(np.maximum(weights, 1e-30))).sum(axis=-1), mask)


def distance(weights, mask=None):
    """Mean of |query's place - key's place| under each head's weights; arguments and result as in `entropy`."""
    weights = np.asarray(weights, "float64")
    queries, keys = weights.shape[-2:]
    apart = np.abs(np.arange(queries)[:, None] - np.arange(keys))
    return _mean((weights * apart).sum(axis=-1), mask)


def report(captured, query_tokens, key_tokens=None, path="attention.html", title="Attention", hypotheses=(), row=0):
    """One page that needs no network: all heads of all layers, the lines and the map of one, and what heads are like.

    Tokens come without padding; the weights beyond them are left out. A list of them is for all layers. Where layers
    look at different texts, as in an encoder-decoder, a dict says which tokens are whose:
    `report(captured, {"encoder": source_tokens, "decoder": target_tokens})`.

    Args:
        captured: dict from `capture`.
        query_tokens: list of str, the tokens of the queries; or a dict, part of a layer's name -> such a list.
        key_tokens: likewise for the keys; None takes the query's tokens, and in cross-attention, from one text to
            another, those that `query_tokens` has for the encoder.
        path: file to write.
        title: str.
        hypotheses: list of (str, float), translations and their scores, shown beneath.
        row: int, which row of the batch.

    Returns:
        pathlib.Path, of the page, less than 1 MB.

    Raises:
        ValueError: if there are no weights, or not of this row, or some are not finite, a layer has no tokens or more
            of them than weights, one list is given for different texts, or the page would be larger.
    """
    if not captured:
        raise ValueError("There is nothing to show: captured is empty.")
    crossing = {name: "cross" in name or np.shape(w)[-2] != np.shape(w)[-1] for name, w in captured.items()}
    _check_one_text(crossing, query_tokens, key_tokens)
    rows = min(map(len, captured.values()))
    if not -rows <= row < rows:
        raise ValueError(f"row must be one of the {rows} rows that were captured; got {row}.")
    shown = []
    for name, weights in captured.items():
        queries = _tokens(query_tokens, name)
        if key_tokens is not None:
            keys = _tokens(key_tokens, name)
        else:
            keys = _keys(query_tokens, name) if crossing[name] else queries
        weights = np.asarray(weights[row])
        heads, most, widest = weights.shape
        if not (0 < len(queries) <= most and 0 < len(keys) <= widest):
            raise ValueError(
                f"{name} has weights for {most} queries and {widest} keys, but there are {len(queries)} and "
                f"{len(keys)} tokens."
            )
        weights = weights[:, : len(queries), : len(keys)]
        if not np.isfinite(weights).all():
            raise ValueError(f"{name} has weights that are not finite.")
        bytes_ = np.round(255 * np.clip(weights, 0, 1)).astype("uint8").tobytes()
        shown.append(dict(
            name=name, heads=heads, queries=queries, keys=keys, weights=base64.b64encode(bytes_).decode(),
            entropy=entropy(weights).round(2).tolist(), distance=distance(weights).round(2).tolist(),
            crossing=crossing[name],
        ))  # fmt: skip
    scored = [(text, float(score)) for text, score in hypotheses]
    scored = [(text, round(score, 3) if np.isfinite(score) else None) for text, score in scored]
    data = json.dumps(dict(layers=shown, hypotheses=scored), allow_nan=False)  # which has no infinity
    data = data.replace("<", "\\u003c")  # no tag of the page's can end in a token
    parts = {"TITLE": html.escape(title), "DATA": data}
    page = re.sub("|".join(parts), lambda found: parts[found[0]], _TEMPLATE.read_text(encoding="utf-8"))
    size = len(page.encode())
    if size >= LARGEST:
        raise ValueError(
            f"The page would have {size:,} bytes, more than {LARGEST:,}; capture fewer layers, or shorter texts."
        )
    path = pathlib.Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _mean(rows, mask):
    """The mean over the queries of (..., heads, queries) that the mask (..., queries) has."""
    if mask is None:
        return rows.mean(axis=-1)
    mask, expected = np.asarray(mask, "bool"), (*rows.shape[:-2], rows.shape[-1])
    if mask.shape != expected:
        raise ValueError(f"mask must have one entry for each query, shape {expected}; got shape {mask.shape}.")
    with np.errstate(invalid="ignore"):
        return np.where(mask[..., None, :], rows, 0).sum(axis=-1) / mask.sum(axis=-1)[..., None]


def _check_one_text(crossing, *tokens):
    several = len({*crossing.values()}) > 1 or all(any(p in name for name in crossing) for p in ("encoder", "decoder"))
    if several and not all(some is None or isinstance(some, dict) for some in tokens):
        first, *_, last = crossing
        raise ValueError(
            f"One list of tokens cannot be for all layers, {first} to {last}: they look at different texts. Give the "
            'tokens by parts of the layers\' names, {"encoder": source_tokens, "decoder": target_tokens} for instance.'
        )


def _tokens(tokens, name):
    if not isinstance(tokens, dict):
        return [str(token) for token in tokens]
    found = [some for part, some in tokens.items() if part in name]
    if not found:
        raise ValueError(f"There are no tokens for {name}; there are for {', '.join(tokens)}.")
    return [str(token) for token in found[0]]


def _keys(tokens, name):
    """The encoder's tokens, for a layer that looks from one text at another."""
    found = [some for part, some in tokens.items() if "encoder" in part] if isinstance(tokens, dict) else []
    if not found:
        raise ValueError(f"{name} looks from one text at another: give key_tokens, too.")
    return [str(token) for token in found[0]]

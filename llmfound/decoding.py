"""Decoding: greedy, beam_search, sample, score and translate, written once for any model with start() and step().

`state = model.start(inputs, max_length)` reads the source; `logits, state = model.step(token_ids, state)` reads one
token of every row, int32 (rows,), and gives the logits of the next, float32 (rows, vocab_size). `state` is a dict. Its
entry "memory" belongs to the sentences: constant, with the batch in front also where rows = batch * beams. Every other
tensor in it belongs to the rows, except scalars, which are common to all.

The model need not be a Keras model; on JAX, whatever of its variables may change must then stand in `model.variables`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from llmfound import kernels

__all__ = ["Hypotheses", "beam_search", "greedy", "length_penalties", "sample", "score", "translate"]

NEVER = -1  # as end_id: no token equals it


class Hypotheses(NamedTuple):
    """What `beam_search` found, for each sentence the best first.

    Attributes:
        token_ids: int32 (batch, n, max_length), without start, with end, then padding.
        scores: float32 (batch, n), log-probability / length penalty; -inf where a sentence has fewer hypotheses.
        log_probs: float32 (batch, n).
        lengths: int32 (batch, n), tokens of each, the end included.
        alignments: float32 (batch, n, max_length, source_length), zero after the end; or None.
    """

    token_ids: np.ndarray
    scores: np.ndarray
    log_probs: np.ndarray
    lengths: np.ndarray
    alignments: np.ndarray | None = None


class _Rules(NamedTuple):
    """What a compiled program is made for, beside the shapes of its arrays."""

    max_length: int
    start_id: int
    end_id: int
    min_length: int
    forbidden_ids: tuple

    def allow(self, t, logits):
        """The logits of step t, float32, -inf where a token may not come."""
        vocab_size = logits.shape[-1]
        for name, ids in (
            ("start_id", [self.start_id]),
            ("end_id", [self.end_id]),
            ("forbidden_ids", self.forbidden_ids),
        ):
            if max(ids, default=0) >= vocab_size:
                raise ValueError(f"{name} must be below the vocabulary's {vocab_size}; got {max(ids)}.")
        refused = {*self.forbidden_ids, self.end_id if self.min_length > 1 else NEVER} - {NEVER}
        if len(refused) == vocab_size:
            raise ValueError(f"forbidden_ids and min_length leave none of the {vocab_size} tokens.")
        logits, vocabulary = ops.cast(logits, "float32"), np.arange(vocab_size)
        if self.forbidden_ids:
            logits = ops.where(np.isin(vocabulary, self.forbidden_ids), -np.inf, logits)
        if self.min_length > 1:
            too_early = ops.logical_and(vocabulary == self.end_id, t + 1 < self.min_length)
            logits = ops.where(too_early, -np.inf, logits)
        return logits


def greedy(model, inputs, max_length=None, start_id=1, end_id=2, pad_id=0, min_length=0, forbidden_ids=()):
    """Takes the likeliest token at every step.

    Args:
        model: anything with `start` and `step`.
        inputs: dict of int arrays with the batch in front, for instance {"source_ids": (batch, source_length)}.
        max_length: most tokens to generate, the end included. None takes the source's length + 50 (Vaswani et al.
            2017, section 6.1).
        start_id: first token the model reads.
        end_id: token that ends a sentence; None always generates max_length tokens.
        pad_id: fills the places after the end.
        min_length: fewest tokens to generate, the end included.
        forbidden_ids: tokens never to generate.

    Returns:
        NumPy int32 (batch, max_length): without start, with end, then padding. Of equal logits the lowest id wins.

    Raises:
        ValueError: if an argument is out of range, the inputs are not integers or are empty, or the model has no
            `start` and `step`.
    """
    inputs, rules = _prepare(model, inputs, max_length, start_id, end_id, pad_id, min_length, forbidden_ids)
    return _cut(kernels.compiled(model, _greedy, rules)(inputs), rules.end_id, pad_id)


def sample(model, inputs, temperature=1.0, top_k=None, top_p=None, seed=None, max_length=None, start_id=1, end_id=2,
           pad_id=0, min_length=0, forbidden_ids=()):  # fmt: skip
    """Draws every token from the model's distribution, sharpened or cut.

    p = softmax(logits / temperature), on the top_k likeliest tokens, on the fewest of them that together reach top_p
    of their probability. A token is found by inverting the cumulative distribution at a uniform number; these come
    from NumPy before the loop, so a seed draws the same on every backend, up to rounding.
    Source: top-k, Fan et al. 2018, section 5.1; top-p, Holtzman et al. 2020, section 3.1.

    Args:
        temperature: 1 is the model's own distribution; towards 0 it becomes greedy search.
        top_k: number of tokens to choose among; None keeps all.
        top_p: probability that the tokens to choose among must reach, 0 to 1; None keeps all.
        seed: int; None takes one from NumPy's global generator, which `keras.utils.set_random_seed` sets.
        model, inputs, max_length, start_id, end_id, pad_id, min_length, forbidden_ids: as in `greedy`.

    Returns:
        NumPy int32 (batch, max_length), as from `greedy`.

    Raises:
        ValueError: as `greedy`, and if temperature, top_k or top_p is out of range.
    """
    inputs, rules = _prepare(model, inputs, max_length, start_id, end_id, pad_id, min_length, forbidden_ids)
    if not 1e-6 <= temperature < np.inf:
        raise ValueError(f"temperature must be at least 1e-6; got {temperature}; its limit 0 is greedy().")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1; got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1; got {top_p}.")
    rng = np.random.default_rng(np.random.randint(2**31) if seed is None else seed)
    noise = rng.random((rules.max_length, _batch_size(inputs)), "float32")
    program = kernels.compiled(model, _sample, rules, top_k, top_p is not None)
    tokens = program(inputs, np.float32(temperature), np.float32(top_p or 1), noise)
    return _cut(tokens, rules.end_id, pad_id)


def score(model, inputs, target_ids, start_id=1, pad_id=0):
    """Log-probability of given targets, token by token: forced decoding.

    Args:
        model, inputs, start_id: as in `greedy`.
        target_ids: int (batch, length), without start, with end if that is to count, as the decoders return it.
        pad_id: marks the places that count nothing.

    Returns:
        NumPy float32 (batch, length), log P of each token, 0 at padding; and their sum, (batch,).

    Raises:
        ValueError: as `greedy`, and if target_ids does not fit the inputs.
    """
    target_ids = _integers("target_ids", target_ids, rank=2)
    if hasattr(model, "input_limits"):
        limits = model.input_limits()
        limit = limits.get("target_ids", limits.get("token_ids", np.inf))
        if target_ids.max() >= limit:
            raise ValueError(
                f"target_ids must hold ids from 0 to {limit - 1}; got {target_ids.min()} to {target_ids.max()}."
            )
    inputs, rules = _prepare(model, inputs, target_ids.shape[1], start_id, None, pad_id, 0, ())
    if len(target_ids) != _batch_size(inputs):
        raise ValueError(f"target_ids has {len(target_ids)} rows, the inputs have {_batch_size(inputs)}.")
    log_probs = kernels.compiled(model, _score, rules)(inputs, target_ids.T).T
    log_probs = np.where(target_ids == pad_id, np.float32(0), log_probs)
    return log_probs, log_probs.sum(axis=1)


def length_penalties(lengths, alpha=0.6):
    """lp = ((5 + |Y|) / 6)^alpha, by which beam search divides the log-probability of |Y| tokens, the end included.

    Source: Wu et al. 2016, section 7, equation 14; alpha 0.6, Vaswani et al. 2017, section 6.1.

    Args:
        lengths: int array of any shape.
        alpha: 0 compares bare log-probabilities; more favours long hypotheses.

    Returns:
        NumPy float32, the shape of `lengths`.
    """
    return (((5 + np.asarray(lengths)) / 6) ** alpha).astype("float32")


def beam_search(model, inputs, beam_size=4, length_penalty=0.6, max_length=None, start_id=1, end_id=2, pad_id=0,
                n_best=None, min_length=0, forbidden_ids=(), return_alignments=False):  # fmt: skip
    """Keeps the likeliest `beam_size` prefixes of every sentence, and ranks what ends by log P / length penalty.

    At each step the best 2 * beam_size continuations are looked at: those of the first beam_size that end are finished,
    the best beam_size that do not end live on. A sentence is done when none of them can beat its n_best-th finished
    hypothesis any more, not even at max_length. If none is finished by then, those alive are returned. A single beam
    that ends is not replaced: beam_size 1 is greedy search.
    Source: Vaswani et al. 2017, section 6.1; Wu et al. 2016, section 7; 2 * beam_size, the authors' code.

    Args:
        beam_size: prefixes kept (4 in the Transformer's paper, 12 in RNNsearch's).
        length_penalty: alpha of `length_penalties`, at least 0.
        n_best: hypotheses to return for each sentence, up to beam_size; None returns an array of the best.
        return_alignments: whether to return `model.align(**inputs, target_ids=hypotheses)`, which is one more pass.
        model, inputs, max_length, start_id, end_id, pad_id, min_length, forbidden_ids: as in `greedy`. Forbidden
            tokens keep their share of the probability, so log P is the model's own.

    Returns:
        NumPy int32 (batch, max_length), as from `greedy`; or, with `n_best` or `return_alignments`, `Hypotheses`.
        Equal scores stand in the order of time, beam and token id.

    Raises:
        ValueError: as `greedy`, and if beam_size, length_penalty or n_best is out of range.
    """
    inputs, rules = _prepare(model, inputs, max_length, start_id, end_id, pad_id, min_length, forbidden_ids)
    count = 1 if n_best is None else n_best
    if beam_size < 1 or not 1 <= count <= beam_size:
        raise ValueError(f"beam_size must be at least 1, n_best from 1 to beam_size; got {beam_size} and {n_best}.")
    if not 0 <= length_penalty < np.inf:
        raise ValueError(f"length_penalty must be at least 0; got {length_penalty}.")
    if return_alignments and getattr(model, "align", None) is None:
        raise ValueError(f"return_alignments needs {type(model).__name__} to have align(source_ids, target_ids).")
    penalties = length_penalties(np.arange(1, rules.max_length + 1), length_penalty)
    found = kernels.compiled(model, _beam_search, rules, beam_size, count)(inputs, penalties)
    best = _read(*found, penalties, count, rules.end_id, pad_id)
    if return_alignments:
        best = best._replace(alignments=_alignments(model, inputs, best, start_id))
    return best.token_ids[:, 0] if n_best is None and not return_alignments else best


def translate(model, tokenizer, sentences, target_tokenizer=None, beam_size=4, length_penalty=0.6, batch_size=64,
              length_multiple=16, replace_unknown=False, dictionary=None, **options):  # fmt: skip
    """Translates text with `beam_search`.

    Sentences of similar length go together. Lengths are filled up to a multiple and batches to a power of two, so that
    a compiling backend meets few shapes.
    Source: replacing unknown words by means of the attention, Jean et al. 2015, "On Using Very Large Target Vocabulary
    for Neural Machine Translation"; a dictionary, or the word itself, in their place, Luong et al. 2015, "Addressing
    the Rare Word Problem in Neural Machine Translation".

    Args:
        model: anything with `start` and `step` that takes {"source_ids": ...}; with replace_unknown, also `align`.
        tokenizer: has encode_batch(texts), pad_id and end_id; and what target_tokenizer needs, if that is None.
        sentences: list of str. An empty one translates to an empty one.
        target_tokenizer: has decode_batch(rows of ids), pad_id, start_id and end_id; None takes `tokenizer`.
        batch_size: sentences decoded at a time.
        length_multiple: source lengths, the end included, are filled up to a multiple of this, but not above a
            `max_length` that the model has.
        replace_unknown: whether each unk_id of a translation is replaced by the source piece that it is aligned to
            most. Then `tokenizer` has pieces(text), and target_tokenizer has unk_id and decode_batch(rows, words), as
            `llmfound.data.Tokenizer`. False leaves it to decode_batch what an unk_id becomes; there, it is left out.
        dictionary: dict, source piece -> what is written for it, if it is there. None writes the pieces themselves.
        beam_size, length_penalty, **options: of `beam_search`: max_length, min_length, forbidden_ids.

    Returns:
        list of str, in the order of `sentences`.

    Raises:
        ValueError: if `sentences` are one str or a table, one is longer than the model's `max_length`, a size is not
            positive, a tokenizer lacks a special id, or the model lacks `align`; or if there is a dictionary without
            replace_unknown.
    """
    target_tokenizer = target_tokenizer or tokenizer
    if isinstance(sentences, str):
        raise ValueError(f"sentences must be a list of str; got one str, {sentences[:40]!r}.")
    if isinstance(sentences, Mapping) or hasattr(sentences, "columns"):  # which iterate over names
        raise ValueError(f"sentences must be a list of str, such as a column; got a {type(sentences).__name__}.")
    if batch_size < 1 or length_multiple < 1:
        raise ValueError(f"batch_size and length_multiple must be at least 1; got {batch_size} and {length_multiple}.")
    ids = {f"{name}_id": getattr(target_tokenizer, f"{name}_id") for name in ("start", "end", "pad")}
    pad_id, end_id = tokenizer.pad_id, tokenizer.end_id
    if None in (pad_id, end_id, *ids.values()):
        raise ValueError(f"The source needs pad_id and end_id, got {pad_id} and {end_id}; the target needs {ids}.")
    if replace_unknown:
        unk_id = getattr(target_tokenizer, "unk_id", None)
        if unk_id is None or not hasattr(tokenizer, "pieces") or getattr(model, "align", None) is None:
            raise ValueError(
                f"replace_unknown needs unk_id of the target's tokenizer, pieces(text) of the source's, and "
                f"align(source_ids, target_ids) of the model; got unk_id {unk_id}, a {type(tokenizer).__name__} and a "
                f"{type(model).__name__}."
            )
    elif dictionary is not None:
        raise ValueError("dictionary says how unknown words are replaced; give replace_unknown=True with it.")
    dictionary = {} if dictionary is None else dictionary
    sentences = list(sentences)
    sources = [[*pieces, end_id] if len(pieces) else [] for pieces in tokenizer.encode_batch(sentences)]
    limit = getattr(model, "max_length", None)
    for i, source in enumerate(sources):
        if limit is not None and len(source) > limit:
            raise ValueError(
                f"Sentence {i} has {len(source)} tokens with its end, more than the model's max_length={limit}; "
                f"shorten it, or build the model with max_length={len(source)}."
            )
    order = sorted((i for i, source in enumerate(sources) if source), key=lambda i: -len(sources[i]))
    texts = [""] * len(sources)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        longest = len(sources[chosen[0]])
        length = -(-longest // length_multiple) * length_multiple
        length = length if limit is None else min(length, limit)
        rows = min(batch_size, 2 ** (len(chosen) - 1).bit_length())
        source_ids = np.full((rows, length), pad_id, "int32")
        for row, i in enumerate(chosen + chosen[-1:] * (rows - len(chosen))):
            source_ids[row, : len(sources[i])] = sources[i]
        best = beam_search(
            model, {"source_ids": source_ids}, beam_size, length_penalty, **ids, n_best=1,
            return_alignments=replace_unknown, **options,
        )  # fmt: skip
        hypotheses, words = [], []
        for row, i in enumerate(chosen):
            tokens = best.token_ids[row, 0, : best.lengths[row, 0]]
            hypotheses.append([t for t in tokens.tolist() if t not in ids.values()])
            if replace_unknown:
                weights = best.alignments[row, 0, np.flatnonzero(tokens == unk_id), : len(sources[i]) - 1]
                pieces = tokenizer.pieces(sentences[i]) if len(weights) else ()
                words.append([dictionary.get(pieces[j], pieces[j]) for j in weights.argmax(axis=1)])
        decoded = target_tokenizer.decode_batch(hypotheses, *([words] if replace_unknown else []))
        for i, text in zip(chosen, decoded):
            texts[i] = text
    return texts


# What runs on the device: one program per function, rules and shapes.


def _greedy(model, rules, inputs):
    def choose(t, logits):
        token_ids = kernels.top_k(rules.allow(t, logits), 1)[1][:, 0]  # ops.argmax is three times slower under XLA
        return token_ids, token_ids

    return _follow(model, rules, inputs, choose, "int32")


def _sample(model, rules, top_k, has_top_p, inputs, temperature, top_p, noise):
    def choose(t, logits):
        logits, order = rules.allow(t, logits), None
        if top_k is not None:
            if top_k > logits.shape[-1]:
                raise ValueError(f"top_k must be at most the vocabulary's {logits.shape[-1]}; got {top_k}.")
            logits, order = kernels.top_k(logits, top_k)
        probs = kernels.masked_softmax((logits - ops.max(logits, axis=-1, keepdims=True)) / temperature)
        kept = probs > 0
        if has_top_p:
            kept = ops.logical_and(kept, probs >= _nucleus_threshold(probs, top_p))
        mass = ops.where(kept, ops.cumsum(ops.where(kept, probs, 0.0), axis=-1), 0.0)
        reached = mass > noise[t][:, None] * ops.max(mass, axis=-1, keepdims=True)
        index = ops.argmax(ops.cast(reached, "int32"), axis=-1)  # the first
        token_ids = index if order is None else ops.take_along_axis(order, index[:, None], axis=-1)[:, 0]
        return token_ids, token_ids

    return _follow(model, rules, inputs, choose, "int32")


def _nucleus_threshold(probs, top_p):
    """The largest probability such that the tokens at or above it reach top_p together, float32 (batch, 1).

    Found by bisection: 30 sums over the vocabulary take a small part of the time of one sort of it.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        reached = ops.sum(ops.where(probs >= middle, probs, 0.0), axis=-1, keepdims=True) >= top_p
        return ops.where(reached, middle, low), ops.where(reached, high, middle)

    high = ops.max(probs, axis=-1, keepdims=True)
    return ops.fori_loop(0, 30, halve, (ops.zeros_like(high), high))[0]


def _score(model, rules, inputs, target_ids):
    def choose(t, logits):
        logits, token_ids = rules.allow(t, logits), target_ids[t]
        chosen = ops.take_along_axis(logits, token_ids[:, None], axis=-1)[:, 0]
        return token_ids, chosen - ops.logsumexp(logits, axis=-1)

    return _follow(model, rules, inputs, choose, "float32")


def _follow(model, rules, inputs, choose, dtype):
    """Extends one sequence per sentence; choose(t, logits) gives the next tokens and what to record, both (batch,).

    Returns the record, (max_length, batch). Rows that have ended go on, and are cut afterwards: that costs nothing,
    and keeping them still would.
    """
    state, memory = _start(model, rules, inputs)
    batch = _batch_size(inputs)

    def step(t, carry):
        token_ids, ended, state = carry
        logits, state = _step(model, token_ids, state, memory)
        token_ids, row = choose(t, logits)
        ended = ops.logical_or(ended, ops.equal(token_ids, rules.end_id))
        return (token_ids, ended, state), row, ops.all(ended)

    carry = ops.full((batch,), rules.start_id, "int32"), ops.zeros((batch,), "bool"), state
    return kernels.unfold(step, carry, ops.zeros((rules.max_length, batch), dtype))[1]


def _beam_search(model, rules, beam_size, n_best, inputs, penalties):
    """Records, for every step, the tokens and parents of the live beams and the log P and parents of finished ones.

    Hypotheses are read back from that afterwards, so that the loop moves nothing but the model's own state.
    """
    state, memory = _start(model, rules, inputs)
    batch = _batch_size(inputs)
    shape = batch, beam_size
    first_rows = ops.reshape(ops.arange(batch, dtype="int32") * beam_size, (batch, 1))

    def step(t, carry):
        token_ids, alive, finished, state = carry
        logits, state = _step(model, token_ids, state, memory)
        logits = ops.cast(logits, "float32")
        normalizer = ops.logsumexp(logits, axis=-1, keepdims=True)
        logits = rules.allow(t, logits)
        # beam_size + 1 per beam are enough for beam_size that do not end
        width = min(beam_size + 1, logits.shape[-1])
        logits, token_ids = kernels.top_k(logits, width)
        log_probs = ops.reshape(ops.reshape(alive, (-1, 1)) + (logits - normalizer), (batch, beam_size * width))
        count = 1 if beam_size == 1 else min(2 * beam_size, beam_size * width)
        log_probs, index = kernels.top_k(log_probs, count)
        token_ids = ops.take_along_axis(ops.reshape(token_ids, (batch, -1)), index, axis=1)
        parents = ops.floor_divide(index, width)

        ended = ops.equal(token_ids, rules.end_id)
        ends = ops.where(ended, log_probs, -np.inf)[:, :beam_size]
        finished = ops.concatenate([finished, ends / penalties[t]], axis=1)
        finished = kernels.top_k(finished, n_best)[0]
        row = {"ends": ends, "end_parents": parents[:, :beam_size]}

        alive, index = kernels.top_k(ops.where(ended, -np.inf, log_probs), beam_size)
        token_ids, parents = (ops.take_along_axis(x, index, axis=1) for x in (token_ids, parents))
        row |= {"tokens": token_ids, "parents": parents}
        state = _take(state, ops.reshape(first_rows + parents, (-1,)))
        stop = ops.all(finished[:, -1] >= alive[:, 0] / penalties[-1])
        return (ops.reshape(token_ids, (-1,)), alive, finished, state), row, stop

    alive = ops.tile(ops.where(ops.arange(beam_size) == 0, 0.0, -np.inf), (batch, 1))
    rows = ops.reshape(ops.repeat(first_rows // beam_size, beam_size, axis=1), (-1,))
    token_ids = ops.full((batch * beam_size,), rules.start_id, "int32")
    carry = token_ids, ops.cast(alive, "float32"), ops.full((batch, n_best), -np.inf, "float32"), _take(state, rows)
    ids = {name: ops.zeros((rules.max_length, *shape), "int32") for name in ("end_parents", "tokens", "parents")}
    record = {"ends": ops.zeros((rules.max_length, *shape), "float32"), **ids}
    (_, alive, _, _), record, steps = kernels.unfold(step, carry, record)
    return record, steps, alive


def _align(model, start_id, inputs, target_ids):
    options = {} if start_id == 1 else {"start_id": start_id}
    return model.align(**inputs, target_ids=target_ids, **options)


def _start(model, rules, inputs):
    """The model's state: what belongs to the rows, and what belongs to the sentences."""
    state = model.start(inputs, rules.max_length)
    if not isinstance(state, dict):
        raise ValueError(f"{type(model).__name__}.start must return a dict; got {type(state).__name__}.")
    return _without_memory(state), {name: state[name] for name in ("memory",) if name in state}


def _step(model, token_ids, state, memory):
    logits, state = model.step(token_ids, {**state, **memory})
    return logits, _without_memory(state)


def _without_memory(state):
    return {name: x for name, x in state.items() if name != "memory"}


def _take(state, rows):
    return keras.tree.map_structure(lambda x: ops.take(x, rows, axis=0) if len(getattr(x, "shape", ())) else x, state)


# What runs in NumPy, before and after.


def _prepare(model, inputs, max_length, start_id, end_id, pad_id, min_length, forbidden_ids):
    if not (hasattr(model, "start") and hasattr(model, "step")):
        raise ValueError(
            f"{type(model).__name__} cannot decode: it needs start(inputs, max_length) and step(ids, state)."
        )
    if not isinstance(inputs, dict) or not inputs:
        raise ValueError(f'inputs must be a dict of int arrays, such as {{"source_ids": ...}}; got {inputs!r:.80}.')
    inputs = {name: _integers(name, x, rank=2 if name == "source_ids" else None) for name, x in inputs.items()}
    if len({len(x) for x in inputs.values()}) > 1:
        raise ValueError(f"inputs must have one batch size; got { {name: x.shape for name, x in inputs.items()} }.")
    if hasattr(model, "check_inputs"):
        model.check_inputs(inputs)
    if max_length is None:
        if "source_ids" not in inputs:
            raise ValueError(f"max_length must be given where there is no source_ids; got inputs {sorted(inputs)}.")
        max_length = min(inputs["source_ids"].shape[1] + 50, getattr(model, "max_length", np.inf))
    if max_length < 1 or not 0 <= min_length <= max_length:
        raise ValueError(f"max_length must be at least 1, min_length 0 to that; got {max_length} and {min_length}.")
    forbidden_ids = tuple(forbidden_ids)
    ids = start_id, pad_id, *(() if end_id is None else (end_id,)), *forbidden_ids
    if min(ids) < 0:
        raise ValueError(f"Token ids must be 0 or more; got start_id {start_id}, end_id {end_id}, pad_id {pad_id}, "
                         f"forbidden_ids {forbidden_ids}.")  # fmt: skip
    end_id = NEVER if end_id is None else int(end_id)
    forbidden_ids = tuple(sorted({int(i) for i in forbidden_ids}))
    return inputs, _Rules(int(max_length), int(start_id), end_id, int(min_length), forbidden_ids)


def _integers(name, x, rank=None):
    """`x` as NumPy int32, or ValueError."""
    x = np.asarray(x) if isinstance(x, (list, tuple)) else ops.convert_to_numpy(x)
    if x.dtype.kind not in "iu" or x.ndim == 0 or x.ndim != (rank or x.ndim):
        shape = "(batch, length)" if rank == 2 else "(batch, ...)"
        raise ValueError(f"{name} must be integers of shape {shape}; got {x.dtype}, shape {x.shape}.")
    if x.size == 0:
        raise ValueError(f"{name} is empty: shape {x.shape}.")
    if x.min() < 0 or x.max() >= 2**31:
        raise ValueError(f"{name} must hold ids, 0 or more; got {x.min()} to {x.max()}.")
    return x.astype("int32")


def _batch_size(inputs):
    return next(iter(inputs.values())).shape[0]


def _cut(tokens, end_id, pad_id):
    """(batch, length) from (length, batch), with padding after the first end."""
    tokens = tokens.T
    ends = np.cumsum(tokens == end_id, axis=1)
    return np.where((ends == 0) | ((ends == 1) & (tokens == end_id)), tokens, np.int32(pad_id))


def _read(record, steps, alive, penalties, count, end_id, pad_id):
    """The best `count` Hypotheses of each sentence, from what `_beam_search` recorded."""
    max_length, batch, beam_size = record["ends"].shape
    steps = int(steps)
    record = {name: x[:steps] for name, x in record.items()}
    # Candidates stand in the order (step, slot): the finished of every step, then those alive after the last.
    log_probs = np.concatenate([record["ends"], alive[None]]).transpose(1, 0, 2)
    is_alive = (np.arange(steps + 1) == steps)[:, None]
    none_finished = np.isneginf(log_probs[:, :steps]).all((1, 2))[:, None, None]
    log_probs = np.where(is_alive == none_finished, log_probs, np.float32(-np.inf)).reshape(batch, -1)
    scores = log_probs / np.append(penalties[:steps], penalties[steps - 1]).repeat(beam_size)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    scores, log_probs = (np.take_along_axis(x, best, axis=1) for x in (scores, log_probs))
    step, beam = best // beam_size, best % beam_size  # step: how many tokens stand before an end

    token_ids = np.full((batch, count, max_length), pad_id, "int32")
    for t in reversed(range(steps)):
        ends_here = step == t
        tokens, parents, end_parents = (
            np.take_along_axis(record[name][t], beam, axis=1) for name in ("tokens", "parents", "end_parents")
        )
        token_ids[..., t] = np.where(ends_here, end_id, np.where(t < step, tokens, pad_id))
        beam = np.where(ends_here, end_parents, np.where(t < step, parents, beam))
    lengths = np.where(np.isneginf(scores), 0, np.minimum(step + 1, steps)).astype("int32")
    token_ids[lengths == 0] = pad_id
    return Hypotheses(token_ids, scores, log_probs, lengths)


def _alignments(model, inputs, best, start_id):
    batch, count, length = best.token_ids.shape
    inputs = {name: x.repeat(count, axis=0) for name, x in inputs.items()}
    weights = kernels.compiled(model, _align, int(start_id))(inputs, best.token_ids.reshape(-1, length))
    real = np.arange(length) < best.lengths[..., None]
    return np.where(real[..., None], weights.reshape(batch, count, length, -1), np.float32(0))

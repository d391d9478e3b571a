"""Decoding against exhaustive search, a beam search in plain Python, and distributions known beforehand."""

import gc
import itertools
import warnings
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from llmfound import decoding
from llmfound.data import Tokenizer
from llmfound.models import Transformer
from llmfound.testing import assert_close

PAD, START, END = 0, 1, 2
BACKEND = keras.backend.backend()
counting = pytest.mark.skipif(BACKEND != "torch", reason="a compiled loop does not call step for every token")


class Table:
    """Logits looked up in a table, by sentence, position, last token but one, and last token.

    The table is (sentences, positions, V or 1, V, V); the sentence is the first source id. The state has all that one
    may have: a memory of the sentences, a tensor of the rows (inside a list), and a scalar common to all.
    """

    def __init__(self, table):
        self.table = np.asarray(table, "float32")
        self.rows = self.table.reshape(-1, self.table.shape[-1])
        self.calls = 0

    def start(self, inputs, max_length):
        source = inputs["source_ids"][:, 0]
        return {"memory": source, "before": [ops.zeros_like(source)], "position": 0}

    def step(self, token_ids, state):
        self.calls += 1
        source = ops.repeat(state["memory"], token_ids.shape[0] // state["memory"].shape[0])
        index = self.index(source, state["position"], state["before"][0], token_ids)
        state = {**state, "before": [token_ids], "position": state["position"] + 1}
        return ops.take(ops.convert_to_tensor(self.rows), index, axis=0), state

    def index(self, source, position, before, last):
        sentences, positions, befores, lasts, _ = self.table.shape
        index = (source % sentences) * positions + position % positions
        return (index * befores + before % befores) * lasts + last

    def log_probs(self, source, prefix, start_id=START):
        """Of every token after a prefix, in NumPy and float64."""
        before, last = (0, 0, start_id, *prefix)[-2:] if prefix else (0, start_id)
        logits = self.rows[self.index(source, len(prefix), before, last)].astype("float64")
        return logits - np.log(np.exp(logits).sum())


class Weighted(Table):
    """A table that may change: a model that is not Keras's, with `variables`."""

    def __init__(self, table):
        super().__init__(table)
        self.rows = keras.Variable(self.rows, name="rows")

    @property
    def variables(self):
        return [self.rows]


def random_table(sentences=1, positions=4, vocab_size=6, seed=0):
    return np.random.default_rng(seed).normal(size=(sentences, positions, vocab_size, vocab_size, vocab_size)) * 2


def markov(vocab_size, *steps):
    """A table from probabilities: for each step {last token: {next token: probability}}; after the last, the first."""
    probs = np.full((1, len(steps), 1, vocab_size, vocab_size), 1 / vocab_size)  # of what never comes
    for t, step in enumerate(steps):
        for last, following in step.items():
            probs[0, t, 0, last] = [following.get(token, 0) for token in range(vocab_size)]
    return logs(probs)


def constant(*distributions):
    """A table with one distribution for each sentence, whatever the prefix."""
    probs = np.array(distributions)
    sentences, vocab_size = probs.shape
    return logs(np.broadcast_to(probs[:, None, None, None], (sentences, 1, 1, vocab_size, vocab_size)))


def logs(probs):
    with np.errstate(divide="ignore"):
        return Table(np.log(probs))


def source(*ids):
    """One sentence for each id; a table takes its rows from there."""
    return {"source_ids": np.array(ids, "int32")[:, None]}


def every_hypothesis(model, sentence, alpha, max_length, forbidden_ids=()):
    """[(score, log P, tokens)] of all that end, the best first."""
    vocab_size = model.table.shape[-1]
    words = [token for token in range(vocab_size) if token != END and token not in forbidden_ids]
    found = []
    for length in range(max_length):
        for prefix in itertools.product(words, repeat=length):
            tokens = (*prefix, END)
            log_prob = sum(model.log_probs(sentence, tokens[:t])[tokens[t]] for t in range(len(tokens)))
            found.append((log_prob / penalty(len(tokens), alpha), log_prob, tokens))
    return sorted(found, key=lambda hypothesis: -hypothesis[0])


def plain_beam_search(model, sentence, beam_size, alpha, max_length, min_length=0):
    """[(score, log P, tokens)], the best first: the docstring of `beam_search` without its early end."""
    alive, finished = [(0.0, ())], []
    for t in range(max_length):
        following = [(log_prob, prefix, model.log_probs(sentence, prefix)) for log_prob, prefix in alive]
        candidates = [
            (log_prob + log_probs[token], (*prefix, token))
            for log_prob, prefix, log_probs in following
            for token in range(len(log_probs))
            if token != END or t + 1 >= min_length
        ]
        candidates = sorted(candidates, key=lambda candidate: -candidate[0])[: 2 * beam_size]
        ended = [tokens[-1] == END for _, tokens in candidates]
        finished += [c for c, has_ended in zip(candidates[:beam_size], ended) if has_ended]
        alive = [c for c, has_ended in zip(candidates, ended) if not has_ended][:beam_size]
    found = [(log_prob / penalty(len(tokens), alpha), log_prob, tokens) for log_prob, tokens in finished or alive]
    return sorted(found, key=lambda hypothesis: -hypothesis[0])


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


def assert_found(found, row, expected):
    """Holds the hypotheses of one sentence against [(score, log P, tokens)]; beyond these there must be none."""
    count, max_length = found.token_ids.shape[1:]
    for place in range(count):
        score, log_prob, tokens = expected[place] if place < len(expected) else (-np.inf, -np.inf, ())
        assert found.token_ids[row, place].tolist() == [*tokens, *[PAD] * (max_length - len(tokens))]
        assert found.lengths[row, place] == len(tokens)
        assert_close(found.scores[row, place], np.array(score), 1e-5, "score")
        assert_close(found.log_probs[row, place], np.array(log_prob), 1e-5, "log P")


TINY = dict(vocab_size=11, num_layers=1, hidden_dim=8, num_heads=2, intermediate_dim=16, dropout=0.5)
SOURCES = {"source_ids": np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 8, 9, 7, 0]], "int32")}
MODELS = {}


def transformer(norm="post"):
    """A Transformer with dropout, made once, with random weights that do not just say one word again and again."""
    if norm not in MODELS:
        MODELS[norm] = Transformer(**TINY, norm=norm)
        rng = np.random.default_rng({"post": 17, "pre": 30}[norm])
        for weight in MODELS[norm].weights:
            noise = rng.normal(size=weight.shape)
            gamma = "gamma" in weight.path
            weight.assign(0.2 * noise if "embedding" in weight.path else 0.7 * noise + gamma)
    return MODELS[norm]


class Rerun:
    """A Transformer without a cache: every step runs all of it on the prefix so far."""

    def __init__(self, model):
        self.model = model
        self.variables = model.variables

    def start(self, inputs, max_length):
        source_ids = inputs["source_ids"]
        prefix = ops.zeros((source_ids.shape[0], max_length), "int32")
        return {"memory": source_ids, "prefix": prefix, "position": 0}

    def step(self, token_ids, state):
        prefix, position = state["prefix"], state["position"]
        source_ids = ops.repeat(state["memory"], token_ids.shape[0] // state["memory"].shape[0], axis=0)
        prefix = ops.where(np.arange(prefix.shape[1]) == position, token_ids[:, None], prefix)
        logits = self.model({"source_ids": source_ids, "target_ids": prefix})
        return ops.take(logits, position, axis=1), {**state, "prefix": prefix, "position": position + 1}


# Length penalty


def test_length_penalties():
    """Wu et al. 2016, equation 14."""
    assert_close(decoding.length_penalties([1, 7, 10, 50]), np.array([1, 1.515716567, 1.732862108, 3.778564704]), 1e-7)
    assert_close(decoding.length_penalties(10, alpha=0.3), np.array(1.316382204), 1e-7)
    assert_close(decoding.length_penalties([[1, 4], [10, 100]], alpha=0), np.ones((2, 2)), 0)
    assert_close(decoding.length_penalties([7], alpha=1), np.array([2.0]), 1e-7)
    assert decoding.length_penalties([1, 2]).dtype == "float32"


# Beam search against the definition


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("n_best", [1, 13])
def test_a_wide_beam_finds_what_exhaustive_search_finds(alpha, n_best):
    model = Table(random_table(sentences=3, positions=3, vocab_size=4))
    found = decoding.beam_search(model, source(0, 1, 2), 36, alpha, max_length=3, n_best=n_best)
    for sentence in range(3):
        expected = every_hypothesis(model, sentence, alpha, max_length=3)
        assert len(expected) == 13
        assert_found(found, sentence, expected[:n_best])


def test_a_wide_beam_finds_what_exhaustive_search_finds_without_forbidden_tokens():
    model = Table(random_table(sentences=3, vocab_size=5))
    found = decoding.beam_search(
        model, source(0, 1, 2), 24, 0.6, max_length=4, n_best=16, forbidden_ids=iter((PAD, START, PAD))
    )
    for sentence in range(3):
        expected = every_hypothesis(model, sentence, 0.6, 4, forbidden_ids=(PAD, START))
        assert len(expected) == 15
        assert_found(found, sentence, expected)  # the place left over is empty


@pytest.mark.parametrize("beam_size, n_best, min_length", [(2, 2, 0), (3, 1, 0), (3, 3, 3)])
def test_a_narrow_beam_finds_what_a_plain_beam_search_finds(beam_size, n_best, min_length):
    model = Table(random_table(sentences=16))
    for alpha in (0.0, 0.6, 3.0):
        found = decoding.beam_search(
            model, source(*range(16)), beam_size, alpha, max_length=6, n_best=n_best, min_length=min_length
        )
        for sentence in range(16):
            expected = plain_beam_search(model, sentence, beam_size, alpha, 6, min_length)
            assert_found(found, sentence, expected[:n_best])


@pytest.mark.parametrize("n_best", [1, 2])
def test_a_longer_hypothesis_may_overtake_one_that_has_ended(n_best):
    """[end] has log 0.6 / 1; the other log 0.4 / 2.5, but only at length 10, where its penalty is that large."""
    middle = {3: {3: 1.0}}
    model = markov(4, {START: {END: 0.6, 3: 0.4}}, *[middle] * 8, {3: {END: 1.0}})
    found = decoding.beam_search(model, source(0), beam_size=2, length_penalty=1.0, max_length=10, n_best=n_best)
    expected = [(np.log(0.4) / 2.5, np.log(0.4), (*[3] * 9, END)), (np.log(0.6), np.log(0.6), (END,))]
    assert_found(found, 0, expected[:n_best])


def test_the_best_hypotheses_are_sorted_and_unlike():
    model = Table(random_table(sentences=16))
    found = decoding.beam_search(model, source(*range(16)), beam_size=6, max_length=6, n_best=3, min_length=3)
    there = np.isfinite(found.scores)
    assert there.mean() > 0.8 and there[:, 0].all()
    assert (found.scores[:, 1:] <= found.scores[:, :-1]).all()
    for tokens, real in zip(found.token_ids, there):
        assert len({tuple(row) for row in tokens[real].tolist()}) == real.sum()
    np.testing.assert_array_equal(found.lengths, np.where(there, (found.token_ids == END).argmax(axis=2) + 1, 0))
    assert_close(found.scores, found.log_probs / decoding.length_penalties(found.lengths), 1e-6)
    assert [x.dtype for x in found[:4]] == ["int32", "float32", "float32", "int32"]
    assert found.alignments is None


def test_equal_scores_stand_in_the_order_of_time_beam_and_token():
    half = markov(5, {START: {END: 0.5, 4: 0.25, 3: 0.25}}, {3: {END: 1.0}, 4: {END: 1.0}})
    found = decoding.beam_search(half, source(0), beam_size=4, length_penalty=0.0, max_length=4, n_best=3)
    np.testing.assert_array_equal(found.token_ids[0], [[END, 0, 0, 0], [3, END, 0, 0], [4, END, 0, 0]])
    uniform = constant([0.2] * 5)
    np.testing.assert_array_equal(decoding.greedy(uniform, source(0), max_length=3), [[0, 0, 0]])
    found = decoding.beam_search(uniform, source(0), beam_size=4, length_penalty=0.0, max_length=3, n_best=3)
    np.testing.assert_array_equal(found.token_ids[0], [[END, 0, 0], [0, END, 0], [0, 0, END]])


def test_greedy_is_a_beam_of_one():
    model, inputs = Table(random_table(sentences=16)), source(*range(16))
    options = dict(max_length=6, forbidden_ids=(PAD,))
    tokens = decoding.greedy(model, inputs, **options)
    best = decoding.beam_search(model, inputs, 1, n_best=1, **options)
    np.testing.assert_array_equal(best.token_ids[:, 0], tokens)
    assert_close(best.log_probs[:, 0], decoding.score(model, inputs, tokens)[1])
    assert (tokens[:, -1] == PAD).any() and (tokens[:, -1] != PAD).any()  # some end, some do not


def test_without_n_best_the_best_alone_comes_back():
    model, inputs = Table(random_table(sentences=16)), source(*range(16))
    best = decoding.beam_search(model, inputs, 3, max_length=6)
    assert isinstance(best, np.ndarray) and best.dtype == "int32"
    np.testing.assert_array_equal(best, decoding.beam_search(model, inputs, 3, max_length=6, n_best=1).token_ids[:, 0])


# Ends and limits


def test_the_end_may_come_at_once_or_never():
    model = constant([0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.0, 0.8])
    for decode in (decoding.greedy, decoding.beam_search):
        tokens = decode(model, source(0, 1), max_length=4)
        assert tokens.dtype == "int32"
        np.testing.assert_array_equal(tokens, [[END, 0, 0, 0], [3, 3, 3, 3]])
    found = decoding.beam_search(model, source(0, 1), max_length=4, length_penalty=1.0, n_best=2)
    np.testing.assert_array_equal(found.lengths, [[1, 2], [4, 4]])
    assert_close(found.scores[:, 0], np.array([np.log(0.7), 4 * np.log(0.8) / 1.5]))
    assert_close(found.log_probs[:, 0], np.array([np.log(0.7), 4 * np.log(0.8)]))


def test_what_has_not_ended_is_returned_only_if_nothing_has():
    model = constant([0.0, 0.0, 0.05, 0.95])
    found = decoding.beam_search(model, source(0), length_penalty=0.0, max_length=2, n_best=3)
    np.testing.assert_array_equal(found.token_ids[0], [[END, 0], [3, END], [0, 0]])
    assert_close(found.log_probs[0], np.array([np.log(0.05), np.log(0.05 * 0.95), -np.inf]))


def test_there_may_be_fewer_hypotheses_than_asked_for():
    found = decoding.beam_search(constant([0.0, 0.0, 1.0, 0.0]), source(0), max_length=5, n_best=3, pad_id=3)
    np.testing.assert_array_equal(found.token_ids[0], [[END, 3, 3, 3, 3], [3] * 5, [3] * 5])
    np.testing.assert_array_equal(found.scores[0], [0, -np.inf, -np.inf])
    np.testing.assert_array_equal(found.log_probs[0], [0, -np.inf, -np.inf])
    np.testing.assert_array_equal(found.lengths[0], [1, 0, 0])


DECODERS = [decoding.greedy, decoding.beam_search, lambda *args, **options: decoding.sample(*args, seed=0, **options)]


@pytest.mark.parametrize("decode", DECODERS, ids=["greedy", "beam_search", "sample"])
def test_limits(decode):
    """Of a model that would rather say 3, and end at once."""
    model, inputs = constant([0.0, 0.0, 0.9, 0.0999, 1e-4]), source(0, 0)
    cases = [
        (dict(min_length=3, pad_id=9), [3, 3, END, 9]),
        (dict(min_length=4, forbidden_ids=[3]), [4, 4, 4, END]),
        (dict(end_id=3, forbidden_ids=[END]), [3, 0, 0, 0]),
        (dict(end_id=None, forbidden_ids=[3]), [END, END, END, END]),
    ]
    for options, expected in cases:
        np.testing.assert_array_equal(decode(model, inputs, max_length=4, **options), [expected] * 2, str(options))


def test_forbidden_tokens_keep_their_share_of_the_probability():
    model, inputs = constant([0.0, 0.0, 0.3, 0.5, 0.2]), source(0)
    found = decoding.beam_search(model, inputs, length_penalty=0.0, max_length=3, n_best=2, forbidden_ids=[3])
    np.testing.assert_array_equal(found.token_ids[0], [[END, 0, 0], [4, END, 0]])
    assert_close(found.log_probs[0], np.log([0.3, 0.2 * 0.3]))


def test_decoding_starts_from_the_start_token():
    model = markov(5, {START: {3: 1.0}, 4: {4: 1.0}, 3: {END: 1.0}})
    for decode in (decoding.greedy, decoding.beam_search):
        np.testing.assert_array_equal(decode(model, source(0), max_length=2), [[3, END]])
        np.testing.assert_array_equal(decode(model, source(0), max_length=2, start_id=4), [[4, 4]])


@pytest.mark.parametrize("decode", DECODERS, ids=["greedy", "beam_search", "sample"])
def test_the_longest_output_is_that_of_the_paper(decode):
    """Vaswani et al. 2017, section 6.1: the source's length + 50."""
    inputs = {"source_ids": np.zeros((1, 3), "int32")}
    assert decode(constant([0.0, 0.0, 0.0, 1.0]), inputs).tolist() == [[3] * 53]


@counting
def test_decoding_stops_when_all_sentences_are_done():
    ends_soon = {START: {END: 0.9, 3: 0.1}, 3: {END: 0.9, 3: 0.1}}
    for decode, options, calls in [
        (decoding.greedy, {}, 1),
        (decoding.greedy, dict(min_length=3), 3),
        (decoding.sample, dict(temperature=1e-6), 1),
        (decoding.beam_search, {}, 1),
        (decoding.beam_search, dict(n_best=2), 2),
        (decoding.beam_search, dict(beam_size=1, min_length=3), 3),
    ]:
        model = markov(4, ends_soon)
        decode(model, source(0, 0), max_length=9, **options)
        assert model.calls == calls, (decode, options)


# A real model

OPTIONS = dict(beam_size=3, max_length=6, n_best=3, min_length=3, forbidden_ids=(PAD,))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_decoding_with_a_cache_equals_running_the_model_on_the_growing_prefix(norm):
    model = transformer(norm)
    found = decoding.beam_search(model, SOURCES, **OPTIONS)
    expected = decoding.beam_search(Rerun(model), SOURCES, **OPTIONS)
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    assert_close(found.log_probs, expected.log_probs, 1e-4)
    assert len(np.unique(found.token_ids)) > 5 and len(np.unique(found.token_ids[:, 0], axis=0)) == 3


def test_score_gives_what_beam_search_gave():
    model = transformer()
    found = decoding.beam_search(model, SOURCES, **OPTIONS)
    for place in range(3):
        log_probs, total = decoding.score(model, SOURCES, found.token_ids[:, place])
        there = found.lengths[:, place] > 0
        assert there.any()
        assert_close(total[there], found.log_probs[there, place], 1e-4)
        assert_close(log_probs, decoding.score(Rerun(model), SOURCES, found.token_ids[:, place])[0], 1e-4)


def test_a_sentence_depends_neither_on_its_neighbours_nor_on_padding():
    model, source_ids = transformer(), SOURCES["source_ids"]
    expected = decoding.beam_search(model, SOURCES, **OPTIONS)
    for chosen, rows in [(source_ids, [2, 0, 1]), (source_ids, [1, 1, 1]), (source_ids[:, :3], [1])]:
        found = decoding.beam_search(model, {"source_ids": chosen[rows]}, **OPTIONS)
        np.testing.assert_array_equal(found.token_ids, expected.token_ids[rows])
        assert_close(found.log_probs, expected.log_probs[rows], 1e-4)


def test_dropout_is_off():
    model = transformer()
    assert model.dropout.rate == 0.5
    first, second = (decoding.score(model, SOURCES, np.full((3, 6), 5, "int32"))[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_alignments_are_those_of_the_hypotheses():
    model = transformer()
    found = decoding.beam_search(model, SOURCES, return_alignments=True, **OPTIONS)
    np.testing.assert_array_equal(found.token_ids, decoding.beam_search(model, SOURCES, **OPTIONS).token_ids)
    assert found.alignments.shape == (3, 3, 6, 5) and found.alignments.dtype == "float32"
    real = np.arange(6) < found.lengths[..., None]
    assert real.any() and not real.all()
    np.testing.assert_allclose(found.alignments.sum(-1), real, atol=1e-5)
    for place in range(3):
        weights = ops.convert_to_numpy(model.align(SOURCES["source_ids"], found.token_ids[:, place]))
        assert_close(found.alignments[:, place], np.where(real[:, place, :, None], weights, 0))


class Aligned(Table):
    def align(self, source_ids, target_ids):
        return ops.cast(ops.stack([target_ids, target_ids * 10], axis=-1), "float32")


class AlignedFrom(Table):
    def align(self, source_ids, target_ids, start_id):
        return ops.cast(ops.stack([target_ids, target_ids * start_id], axis=-1), "float32")


@pytest.mark.parametrize("aligned, start_id, factor", [(Aligned, 1, 10), (AlignedFrom, 3, 3)])
def test_alignments_of_the_best_alone(aligned, start_id, factor):
    model = aligned(constant([0.0, 0.0, 0.6, 0.0, 0.4]).table)
    found = decoding.beam_search(
        model, source(0), max_length=4, min_length=2, start_id=start_id, return_alignments=True
    )
    np.testing.assert_array_equal(found.token_ids, [[[4, END, 0, 0]]])
    np.testing.assert_array_equal(found.alignments, [[[[4, 4 * factor], [2, 2 * factor], [0, 0], [0, 0]]]])


def test_half_precision_logits_are_read_as_float32():
    class Half(Table):
        def step(self, token_ids, state):
            logits, state = super().step(token_ids, state)
            return ops.cast(logits, "float16"), state

    half = Half(random_table(sentences=16))
    rounded = Table(half.table.astype("float16"))
    for a, b in zip(run_all(half, source(0, 1)), run_all(rounded, source(0, 1))):
        assert a.dtype == b.dtype
        assert_close(a, b, 1e-6)


# score


def test_score_counts_every_token_but_padding():
    model, targets = Table(random_table(sentences=2)), np.array([[3, 5, END, 1], [END, 1, 4, 1]], "int64")
    log_probs, total = decoding.score(model, source(0, 1), targets, start_id=3, pad_id=1)
    expected = [
        [0 if token == 1 else model.log_probs(row, tokens[:t], start_id=3)[token] for t, token in enumerate(tokens)]
        for row, tokens in enumerate(targets.tolist())
    ]
    assert_close(log_probs, np.array(expected), 1e-5)
    assert_close(total, np.array(expected).sum(1), 1e-5)
    assert log_probs.dtype == total.dtype == "float32"


# sample


def nucleus(probs, temperature=1.0, top_k=None, top_p=None):
    """The distribution `sample` draws from, in NumPy."""
    probs = np.array(probs) ** (1 / temperature)
    order = np.argsort(-probs, kind="stable")
    kept = order[:top_k]
    if top_p is not None:
        mass = np.cumsum(probs[kept]) / probs[kept].sum()
        kept = kept[: 1 + np.searchsorted(mass, top_p)]
    probs = np.where(np.isin(np.arange(len(probs)), kept), probs, 0)
    return probs / probs.sum()


PROBS = [0.15, 0.3, 0.05, 0.27, 0.23]


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, 5),
        (dict(temperature=0.5), 5),
        (dict(temperature=3.0), 5),
        (dict(top_k=2), 2),
        (dict(top_k=5), 5),
        (dict(top_p=0.5), 2),
        (dict(top_p=0.75), 3),
        (dict(top_p=1.0), 5),
        (dict(top_k=3, top_p=0.6), 2),
        (dict(top_p=0.75, temperature=0.25), 2),
    ],
)
def test_samples_follow_the_distribution(options, kept):
    tokens = decoding.sample(constant(PROBS), source(*[0] * 4000), seed=1, max_length=5, end_id=None, **options)
    expected = nucleus(PROBS, **options) * tokens.size
    assert (expected > 0).sum() == kept
    counts = np.bincount(tokens.ravel(), minlength=5)
    assert counts[expected == 0].sum() == 0
    assert chi_square(counts, expected) < 28  # exceeded once in 100,000 trials, with four degrees of freedom


def chi_square(counts, expected):
    counts, expected = counts[expected > 0], expected[expected > 0]
    return ((counts - expected) ** 2 / expected).sum()


def test_draws_of_different_steps_and_sentences_are_independent():
    tokens = decoding.sample(constant([0.25] * 4), source(*[0] * 4000), seed=1, max_length=5, end_id=None)
    for first, second in [(tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:])]:
        counts = np.bincount((first * 4 + second).ravel(), minlength=16)
        assert chi_square(counts, np.full(16, first.size / 16)) < 48  # likewise, with fifteen


def test_draws_are_the_same_on_every_backend():
    logits = np.array([0.5, -1.0, 0.25, 1.0, 0.0, -0.5])
    tokens = decoding.sample(Table(np.broadcast_to(logits, (1, 1, 1, 6, 6))), source(0, 0, 0), 0.8, seed=7,
                             max_length=8, end_id=None)  # fmt: skip
    mass = np.cumsum(np.exp(logits / 0.8))
    noise = np.random.default_rng(7).random((8, 3), "float32")
    np.testing.assert_array_equal(tokens, (mass > noise.T[..., None] * mass[-1]).argmax(-1))
    np.testing.assert_array_equal(tokens, DRAWN)


DRAWN = [[5, 4, 4, 2, 4, 4, 0, 2], [3, 3, 1, 2, 0, 0, 3, 2], [3, 3, 0, 4, 3, 3, 3, 2]]


def test_a_seed_repeats_its_draws():
    model, inputs = Table(random_table(sentences=16)), source(*range(16))
    draw = lambda **options: decoding.sample(model, inputs, max_length=6, **options)  # noqa: E731
    np.testing.assert_array_equal(draw(seed=3), draw(seed=3))
    assert (draw(seed=3) != draw(seed=4)).any()
    keras.utils.set_random_seed(5)
    first, second = draw(), draw()
    assert (first != second).any()
    keras.utils.set_random_seed(5)
    np.testing.assert_array_equal(draw(), first)


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-6)], ids=str)
def test_sampling_at_its_narrowest_is_greedy(options):
    model, inputs = Table(random_table(sentences=16)), source(*range(16))
    expected = decoding.greedy(model, inputs, max_length=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        tokens = decoding.sample(model, inputs, seed=0, max_length=6, **options)
    np.testing.assert_array_equal(tokens, expected)


# Programs


def run_all(model, inputs, alpha=0.6, temperature=0.8, top_p=0.9, targets=3):
    """What every decoder gives, in one list."""
    return [
        decoding.greedy(model, inputs, max_length=6),
        decoding.sample(model, inputs, temperature, top_k=4, top_p=top_p, seed=0, max_length=6),
        decoding.beam_search(model, inputs, 3, alpha, max_length=6, n_best=2).scores,
        decoding.score(model, inputs, np.full((2, 6), targets))[0],
    ]


def test_new_weights_give_new_results_and_nothing_is_traced_twice():
    model = Weighted(random_table(sentences=16))
    before = run_all(model, source(0, 1))
    calls = model.calls
    others = run_all(model, source(2, 3), alpha=0.3, temperature=1.5, top_p=0.5, targets=4)
    model.rows.assign(model.rows * -1)
    changed = run_all(model, source(0, 1))
    expected, _ = decoding.score(Table(-model.table), source(0, 1), np.full((2, 6), 3))
    assert_close(changed[-1], expected, 1e-6)
    model.rows.assign(model.rows * -1)
    again = run_all(model, source(0, 1))
    for a, b, c, d in zip(before, again, others, changed):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any() and (a != d).any()
    if BACKEND != "torch":  # where every step is a call
        assert model.calls == calls
        decoding.greedy(model, source(0, 1, 2), max_length=6)
        assert model.calls > calls


def test_a_weight_that_the_model_does_not_list():
    class Unlisted(Weighted):
        variables = ()

    model = Unlisted(random_table())
    if BACKEND == "jax":  # where it would stay as it is now in the compiled program
        with pytest.raises(ValueError, match="rows is read but not listed in the model's `variables`"):
            decoding.greedy(model, source(0), max_length=3)
    else:
        assert decoding.greedy(model, source(0), max_length=3).shape == (1, 3)


def test_a_model_can_be_forgotten():
    model = Table(random_table())
    decoding.greedy(model, source(0), max_length=3)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


# translate


class Words:
    """A tokenizer of whole words."""

    def __init__(self, text, pad_id=PAD, start_id=START, end_id=END):
        self.pad_id, self.start_id, self.end_id = pad_id, start_id, end_id
        free = (i for i in itertools.count() if i not in (pad_id, start_id, end_id))
        self.ids = dict(zip(text.split(), free))
        self.words = {i: word for word, i in self.ids.items()}

    def encode_batch(self, texts):
        return [[self.ids[word] for word in text.split()] for text in texts]

    def decode_batch(self, rows):
        return [" ".join(self.words[i] for i in row) for row in rows]


class Copy:
    """Says its source again, in other ids."""

    def __init__(self, mapping):
        self.mapping = np.array(mapping, "int32")
        self.batches = []

    def start(self, inputs, max_length):
        self.batches.append((*inputs["source_ids"].shape, max_length))
        return {"memory": inputs["source_ids"], "position": 0}

    def step(self, token_ids, state):
        source_ids, position = state["memory"], state["position"]
        beams = token_ids.shape[0] // source_ids.shape[0]
        here = ops.take(source_ids, ops.minimum(position, source_ids.shape[1] - 1), axis=1)
        wanted = ops.repeat(ops.take(ops.convert_to_tensor(self.mapping), here), beams)
        logits = ops.one_hot(wanted, int(self.mapping.max()) + 1) * 10.0
        return logits, {**state, "position": position + 1}


TEXT = "one two three four five six seven"
SENTENCES = ["three one", "", "two", "one two three four five six seven", "four four four", "   ", "seven six", "one"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_translations_come_in_order(batch_size):
    tokenizer, model = Words(TEXT), Copy(range(10))
    translations = decoding.translate(model, tokenizer, SENTENCES, batch_size=batch_size, length_multiple=4)
    assert translations == [sentence.strip() for sentence in SENTENCES]


@pytest.mark.parametrize("batch_size, shapes", [(4, [(4, 8, 9), (2, 4, 9)]), (64, [(8, 8, 9)])])
def test_translation_meets_few_shapes(batch_size, shapes):
    model = Copy(range(10))
    decoding.translate(model, Words(TEXT), SENTENCES, batch_size=batch_size, length_multiple=4, max_length=9)
    assert list(dict.fromkeys(model.batches)) == shapes  # tracing may call start more than once


def test_sources_are_not_filled_up_beyond_what_the_model_can_read():
    model = Copy(range(10))
    model.max_length = 6
    decoding.translate(model, Words(TEXT), SENTENCES[:3], length_multiple=4, max_length=9)
    decoding.translate(model, Words(TEXT), ["one two three four five"], length_multiple=4, max_length=9)
    with_end = [length for _, length, _ in dict.fromkeys(model.batches)]
    assert with_end == [4, 6]
    with pytest.raises(ValueError, match=r"^Sentence 1 has 7 tokens with its end, more .* max_length=6; shorten"):
        decoding.translate(model, Words(TEXT), ["one", "one two three four five one"], max_length=9)


def test_nothing_to_translate():
    model = Copy(range(10))
    assert decoding.translate(model, Words(TEXT), []) == []
    assert decoding.translate(model, Words(TEXT), ["", " "]) == ["", ""]
    assert decoding.translate(model, Words(TEXT), ("one",)) == ["one"]
    assert len(set(model.batches)) == 1


def test_the_target_may_have_a_tokenizer_of_its_own():
    english, german = Words("one two three"), Words("drei eins zwei", pad_id=4, start_id=2, end_id=0)
    mapping = [german.pad_id, german.start_id, german.end_id, *(german.ids[w] for w in ("eins", "zwei", "drei"))]
    translations = decoding.translate(
        Copy(mapping), english, ["three one", "two"], german, beam_size=2, length_penalty=0.0, max_length=5
    )
    assert translations == ["drei eins", "zwei"]
    assert decoding.translate(Copy(mapping), english, ["one two three"], german, 1, max_length=2) == ["eins zwei"]


def test_batching_does_not_change_a_translation():
    tokenizer, model = Words("a b c d e f g h"), Table(random_table(sentences=16, vocab_size=11))
    sentences = ["a b c", "h", "d d e f", "g a", "b"]
    options = dict(max_length=6, length_multiple=4, min_length=3, forbidden_ids=(PAD, START))
    together = decoding.translate(model, tokenizer, sentences, **options)
    assert together == [decoding.translate(model, tokenizer, [text], **options)[0] for text in sentences]
    assert len(set(together)) == 5


class Unknowing(Words):
    """Words of which the model may say that it does not know them: written as they are asked for, in brackets."""

    def __init__(self, text, unk_id, **ids):
        super().__init__(text, **ids)
        self.unk_id = unk_id
        self.asked = []

    def encode_batch(self, texts):
        return [[self.ids.get(word, self.unk_id) for word in text.split()] for text in texts]

    def pieces(self, text):
        return text.split()

    def decode_batch(self, rows, unknown=None):
        if unknown is None:
            return super().decode_batch([[i for i in row if i != self.unk_id] for row in rows])
        self.asked += unknown
        words = [iter(given) for given in unknown]
        return [" ".join(f"<{next(w)}>" if i == self.unk_id else self.words[i] for i in r) for r, w in zip(rows, words)]


class Backwards(Copy):
    """Aligned from the right: the target's first word to the source's last piece, or, most of all, to its end."""

    def align(self, source_ids, target_ids, start_id=START):
        length = ops.sum(ops.cast(source_ids != PAD, "int32"), axis=1)[:, None, None]  # the end included
        i = ops.arange(target_ids.shape[1])[None, :, None]
        j = ops.arange(source_ids.shape[1])[None, None]
        weights = ops.where(j == length - 2 - i, 0.3, ops.where(j == length - 1, 0.5, 0.01))
        return ops.where(j > length - 1, 0.9, weights)  # padding must not count


UNK = 3
UNKNOWING = Unknowing("[unk] one two three", UNK)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_unknown_words_are_those_they_are_aligned_to(batch_size):
    sentences = ["one Berlin two", "", "Paris", "three", "one two three one two Rome", "Oslo Bern one"]
    options = dict(batch_size=batch_size, length_multiple=4, beam_size=2)
    model = Backwards(range(7))
    found = decoding.translate(model, UNKNOWING, sentences, replace_unknown=True, **options)
    assert found == ["one <Berlin> two", "", "<Paris>", "three", "one two three one two <one>", "<one> <Bern> one"]
    dictionary = {"Berlin": "Berlino", "one": "uno"}
    found = decoding.translate(model, UNKNOWING, sentences, replace_unknown=True, dictionary=dictionary, **options)
    assert found == ["one <Berlino> two", "", "<Paris>", "three", "one two three one two <uno>", "<uno> <Bern> one"]
    left_out = decoding.translate(model, UNKNOWING, sentences, **options)
    assert left_out == ["one two", "", "", "three", "one two three one two", "one"]


def test_unknown_words_of_a_target_with_a_tokenizer_of_its_own():
    german = Unknowing("[unk] eins zwei drei", 1, pad_id=9, start_id=2, end_id=0)
    mapping = [9, 2, 0, 1, *(german.ids[w] for w in ("eins", "zwei", "drei"))]
    translations = decoding.translate(Backwards(mapping), UNKNOWING, ["Ulm one Bonn"], german, replace_unknown=True)
    assert translations == ["<Bonn> eins <Ulm>"] and german.asked == [["Bonn", "Ulm"]]


def test_unknown_words_are_spaced_by_the_tokenizer():
    text = "Where is L'homme (vu) ?"
    tokenizer = Tokenizer.train([text], 50, "word", min_frequency=1)
    model = Backwards(range(tokenizer.vocab_size))
    sentences = ["Where L'Éléphant Zoé is Where", "Xyz (vu) Abc", "Where 4-Abc Zoé ?"]
    found = decoding.translate(model, tokenizer, sentences, replace_unknown=True)
    assert found == ["Where L'Zoé Éléphant is Where", "Abc (vu) Xyz", "Where Zoé-Abc 4 ?"]


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_unknown_words_of_a_transformer(norm):
    tokenizer = Tokenizer.train(["a b c d e f g"], 11, "word", min_frequency=1)
    model, sentences = transformer(norm), ["a Zoé c", "Ulm Bonn b a", "d"]
    options = dict(max_length=6, min_length=4, forbidden_ids=(PAD, START, *range(4, 11)))  # it knows no word
    translations = decoding.translate(model, tokenizer, sentences, replace_unknown=True, **options)
    for sentence, text in zip(sentences, translations):
        words = text.split(" ")
        assert 3 <= len(words) <= 6 and set(words) <= set(sentence.split())


# Errors


class NoStep:
    start = None


class NotADict(Table):
    def start(self, inputs, max_length):
        return [inputs["source_ids"]]


TOY, INPUTS = constant([0.25] * 4), source(0, 0)
LARGE = Table(np.zeros((1, 1, 1, 5, 4)))  # reads one token more than it writes
TOKENIZER = Words(TEXT)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: decoding.greedy(NoStep(), INPUTS),
            r"NoStep cannot decode: it needs start\(inputs, max_length\) and step",
        ),
        (lambda: decoding.greedy(NotADict(TOY.table), INPUTS), "NotADict.start must return a dict; got list"),
        (lambda: decoding.greedy(TOY, INPUTS["source_ids"]), "inputs must be a dict of int arrays, .*; got array"),
        (lambda: decoding.greedy(TOY, {}), r"inputs must be a dict of int arrays, .*; got \{\}"),
        (
            lambda: decoding.greedy(TOY, {**INPUTS, "other": np.ones((3, 1), "int32")}),
            r"one batch size; got \{'source_ids': \(2, 1\), 'other': \(3, 1\)\}",
        ),
        (
            lambda: decoding.greedy(TOY, {"source_ids": np.ones((2, 1), "float32")}),
            r"source_ids must be integers of shape \(batch, length\); got float32, shape \(2, 1\)",
        ),
        (
            lambda: decoding.greedy(TOY, {"source_ids": np.ones(2, "int32")}),
            r"\(batch, length\); got int32, shape \(2,\)",
        ),
        (
            lambda: decoding.greedy(TOY, {**INPUTS, "language": np.int32(3)}),
            r"language must be integers of shape \(batch, ...\); got int32, shape \(\)",
        ),
        (lambda: decoding.greedy(TOY, {"source_ids": np.ones((0, 3), int)}), r"source_ids is empty: shape \(0, 3\)"),
        (lambda: decoding.greedy(TOY, {"source_ids": [[-3, 5]]}), "source_ids must hold ids, 0 or more; got -3 to 5"),
        (lambda: decoding.greedy(TOY, {"source_ids": [[2**31]]}), "got 2147483648 to 2147483648"),
        (lambda: decoding.greedy(TOY, {"ids": [[1]]}), r"max_length must be given .*; got inputs \['ids'\]"),
        (lambda: decoding.greedy(TOY, INPUTS, max_length=0), "max_length must be at least 1, .*; got 0 and 0"),
        (lambda: decoding.greedy(TOY, INPUTS, max_length=3, min_length=4), "min_length 0 to that; got 3 and 4"),
        (lambda: decoding.greedy(TOY, INPUTS, min_length=-1), "got 51 and -1"),
        (lambda: decoding.greedy(TOY, INPUTS, start_id=-1), "ids must be 0 or more; got start_id -1"),
        (lambda: decoding.greedy(TOY, INPUTS, end_id=-1), "end_id -1"),
        (lambda: decoding.greedy(TOY, INPUTS, pad_id=-1), "pad_id -1"),
        (lambda: decoding.greedy(TOY, INPUTS, forbidden_ids=[3, -2]), r"forbidden_ids \(3, -2\)"),
        (lambda: decoding.greedy(LARGE, INPUTS, start_id=4), "start_id must be below the vocabulary's 4; got 4"),
        (lambda: decoding.sample(TOY, INPUTS, end_id=7), "end_id must be below the vocabulary's 4; got 7"),
        (lambda: decoding.beam_search(TOY, INPUTS, forbidden_ids=[1, 5]), "forbidden_ids must be below .* 4; got 5"),
        (
            lambda: decoding.greedy(TOY, INPUTS, forbidden_ids=range(4)),
            "forbidden_ids and min_length leave none",
        ),
        (lambda: decoding.greedy(TOY, INPUTS, forbidden_ids=[0, 1, 3], min_length=2), "leave none of the 4 tokens"),
        (
            lambda: decoding.sample(TOY, INPUTS, temperature=0),
            r"temperature must be .*; got 0; its limit 0 is greedy\(\)",
        ),
        (lambda: decoding.sample(TOY, INPUTS, temperature=np.inf), "temperature must be at least 1e-6; got inf"),
        (lambda: decoding.sample(TOY, INPUTS, temperature=np.nan), "temperature must be at least 1e-6; got nan"),
        (lambda: decoding.sample(TOY, INPUTS, top_k=0), "top_k must be at least 1; got 0"),
        (lambda: decoding.sample(TOY, INPUTS, top_k=5), "top_k must be at most the vocabulary's 4; got 5"),
        (lambda: decoding.sample(TOY, INPUTS, top_p=0.0), "top_p must be above 0 and at most 1; got 0.0"),
        (lambda: decoding.sample(TOY, INPUTS, top_p=1.1), "top_p must be above 0 and at most 1; got 1.1"),
        (
            lambda: decoding.score(transformer(), SOURCES, [[3, 11]] * 3),
            "target_ids must hold ids from 0 to 10; got 3",
        ),
        (lambda: decoding.score(TOY, INPUTS, [[3, 2]]), "target_ids has 1 rows, the inputs have 2"),
        (lambda: decoding.score(TOY, INPUTS, [3, 2]), r"target_ids must be integers .* \(2,\)"),
        (lambda: decoding.score(TOY, INPUTS, np.ones((2, 3))), "target_ids must be integers .* float64"),
        (lambda: decoding.score(TOY, INPUTS, np.ones((2, 0), int)), r"target_ids is empty: shape \(2, 0\)"),
        (lambda: decoding.beam_search(TOY, INPUTS, beam_size=0), "beam_size must be at least 1, .*; got 0 and None"),
        (lambda: decoding.beam_search(TOY, INPUTS, beam_size=2, n_best=3), "n_best from 1 to beam_size; got 2 and 3"),
        (lambda: decoding.beam_search(TOY, INPUTS, n_best=0), "n_best from 1 to beam_size; got 4 and 0"),
        (lambda: decoding.beam_search(TOY, INPUTS, length_penalty=-0.1), "length_penalty must be at least 0; got -0.1"),
        (lambda: decoding.beam_search(TOY, INPUTS, length_penalty=np.nan), "length_penalty must be .*; got nan"),
        (
            lambda: decoding.beam_search(TOY, INPUTS, return_alignments=True),
            r"return_alignments needs Table to have align\(source_ids, target_ids\)",
        ),
        (lambda: decoding.greedy(transformer(), {"source_ids": [[3, 11]]}), "source_ids must hold ids from 0 to 10"),
        (lambda: decoding.translate(TOY, TOKENIZER, "one two"), "must be a list of str; got one str, 'one two'"),
        (lambda: decoding.translate(TOY, TOKENIZER, {"en": ["one"]}), "sentences must be .*a column; got a dict"),
        (lambda: decoding.translate(TOY, TOKENIZER, ["one"], batch_size=0), "at least 1; got 0 and 16"),
        (lambda: decoding.translate(TOY, TOKENIZER, ["one"], length_multiple=0), "at least 1; got 64 and 0"),
        (
            lambda: decoding.translate(TOY, Words(TEXT, pad_id=None), ["one"]),
            "source needs pad_id and end_id, got None and 2; the target needs .*'pad_id': None",
        ),
        (
            lambda: decoding.translate(TOY, TOKENIZER, ["one"], Words(TEXT, start_id=None)),
            "got 0 and 2; the target needs {'start_id': None, 'end_id': 2, 'pad_id': 0}",
        ),
        (
            lambda: decoding.translate(Aligned(TOY.table), TOKENIZER, [], replace_unknown=True),
            r"replace_unknown needs unk_id .*; got unk_id None, a Words and a Aligned\.",
        ),
        (
            lambda: decoding.translate(Aligned(TOY.table), TOKENIZER, [], UNKNOWING, replace_unknown=True),
            r"pieces\(text\) of the source's, .*; got unk_id 3, a Words and a Aligned\.",
        ),
        (
            lambda: decoding.translate(TOY, UNKNOWING, [], replace_unknown=True),
            r"align\(source_ids, target_ids\) of the model; got unk_id 3, a Unknowing and a Table",
        ),
        (
            lambda: decoding.translate(TOY, TOKENIZER, ["one"], dictionary={}),
            "dictionary says how unknown words are replaced; give replace_unknown=True",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""What holds for every decoder, whatever the model says: a table of logits, other numbers in every case."""

import itertools

import keras
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from llmfound import decoding
from llmfound.testing import assert_close

PAD, START, END = 0, 1, 2
SENTENCES, POSITIONS, VOCAB_SIZE, MAX_LENGTH = 3, 3, 4, 4


class Table:
    """Logits by sentence, position, last token but one, and last token; compiled once, with numbers as weights."""

    def __init__(self):
        self.rows = keras.Variable(np.zeros((SENTENCES * POSITIONS * VOCAB_SIZE**2, VOCAB_SIZE)), name="rows")
        self.variables = [self.rows]

    def start(self, inputs, max_length):
        source = inputs["source_ids"][:, 0]
        return {"memory": source, "before": ops.zeros_like(source), "position": 0}

    def step(self, token_ids, state):
        source = ops.repeat(state["memory"], token_ids.shape[0] // state["memory"].shape[0])
        index = self.index(source, state["position"], state["before"], token_ids)
        state = {**state, "before": token_ids, "position": state["position"] + 1}
        return ops.take(ops.convert_to_tensor(self.rows), index, axis=0), state

    def index(self, source, position, before, last):
        return ((source * POSITIONS + position % POSITIONS) * VOCAB_SIZE + before) * VOCAB_SIZE + last


MODEL = Table()
SOURCES = np.arange(SENTENCES, dtype="int32")[:, None]
RULES = [dict(), dict(min_length=2), dict(min_length=3, forbidden_ids=(START,))]  # few: each is a program

seeds = st.integers(0, 2**32 - 1)
rules = st.sampled_from(RULES)
alphas = st.sampled_from([0.0, 0.6, 3.0])


KINDS = "any", "sharp", "ties", "impossible"  # ties: many equal logits; impossible: many that are -inf


def tables(*kinds):
    return st.tuples(st.sampled_from(kinds or KINDS), seeds)


def put(kind, seed):
    """Puts such a table into MODEL, and returns it, float32."""
    rng, shape = np.random.default_rng(seed), tuple(MODEL.rows.shape)
    logits = rng.integers(-1, 2, shape) if kind == "ties" else rng.normal(size=shape) * (20 if kind == "sharp" else 2)
    if kind == "impossible":
        logits[:, :-1][rng.random((shape[0], VOCAB_SIZE - 1)) < 0.3] = -np.inf
    logits = logits.astype("float32")
    MODEL.rows.assign(logits)
    return logits


def source(*sentences):
    return {"source_ids": SOURCES[list(sentences)]}


EVERY = source(*range(SENTENCES))


# In NumPy and float64


def logits_after(table, sentence, prefix):
    before, last = (PAD, START, *prefix)[-2:]
    return table[MODEL.index(sentence, len(prefix), before, last)].astype("float64")


def log_probs_after(table, sentence, prefix):
    logits = logits_after(table, sentence, prefix)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def allowed(t, min_length=0, forbidden_ids=()):
    """bool (vocab_size,): the tokens that may come as number t."""
    tokens = np.arange(VOCAB_SIZE)
    return ~np.isin(tokens, forbidden_ids) & ((tokens != END) | (t + 1 >= min_length))


def log_prob_of(table, sentence, tokens):
    return sum(log_probs_after(table, sentence, tokens[:t])[token] for t, token in enumerate(tokens))


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


def filled_up(tokens, length=MAX_LENGTH):
    return [*tokens, *[PAD] * (length - len(tokens))]


def cut(row):
    """The tokens of a row, up to its end."""
    row = row.tolist()
    return row[: row.index(END) + 1] if END in row else row


def plain_beam_search(table, sentence, beam_size, alpha, max_length, limits):
    """[(score, log P, tokens)], the best first: the docstring of `beam_search`, without its early end."""
    alive, finished = [(0.0, ())], []
    for t in range(max_length):
        candidates = [
            (log_prob + log_probs_after(table, sentence, prefix)[token], (*prefix, int(token)))
            for log_prob, prefix in alive
            for token in np.flatnonzero(allowed(t, **limits))
        ]
        candidates = [c for c in sorted(candidates, key=lambda c: -c[0]) if c[0] > -np.inf][: 2 * beam_size]
        finished += [c for c in candidates[:beam_size] if c[1][-1] == END]
        alive = [c for c in candidates if c[1][-1] != END][:beam_size]
    found = [(log_prob / penalty(len(tokens), alpha), log_prob, tokens) for log_prob, tokens in finished or alive]
    return sorted(found, key=lambda c: -c[0])


def assert_found(found, row, expected):
    """Scores are as expected; tokens, too, where no other score is near."""
    count = found.scores.shape[1]
    scores = np.array([c[0] for c in expected[:count]] + [-np.inf] * (count - len(expected)))
    assert_close(found.scores[row], scores, 2e-5, "scores")
    every = np.array([c[0] for c in expected])
    for place, (score, log_prob, tokens) in enumerate(expected[:count]):
        if (np.abs(every - score) < 1e-3).sum() == 1:
            assert found.token_ids[row, place].tolist() == filled_up(tokens, found.token_ids.shape[2])
            assert_close(found.log_probs[row, place], np.array(log_prob), 2e-5, "log P")


# Greedy search and beam search


@given(tables(), rules)
def test_greedy_takes_the_likeliest_token_of_the_lowest_id(table, limits):
    table = put(*table)
    found = decoding.greedy(MODEL, EVERY, max_length=MAX_LENGTH, **limits)
    for sentence, row in enumerate(found):
        tokens = []
        while len(tokens) < MAX_LENGTH and END not in tokens:
            logits = logits_after(table, sentence, tokens)
            tokens.append(int(np.where(allowed(len(tokens), **limits), logits, -np.inf).argmax()))
        assert row.tolist() == filled_up(tokens)


@given(tables(), rules, alphas)
def test_a_beam_of_one_is_greedy(table, limits, alpha):
    table = put(*table)
    tokens = decoding.greedy(MODEL, EVERY, max_length=MAX_LENGTH, **limits)
    found = decoding.beam_search(MODEL, EVERY, 1, alpha, max_length=MAX_LENGTH, n_best=1, **limits)
    np.testing.assert_array_equal(found.token_ids[:, 0], tokens)
    expected = [log_prob_of(table, sentence, cut(row)) for sentence, row in enumerate(tokens)]
    assert_close(found.log_probs[:, 0], np.array(expected), 2e-5)


@given(tables(), alphas)
def test_a_wide_beam_finds_what_exhaustive_search_finds(table, alpha):
    table = put(*table)
    found = decoding.beam_search(MODEL, EVERY, 36, alpha, max_length=3, n_best=13)
    words = [token for token in range(VOCAB_SIZE) if token != END]
    hypotheses = [(*prefix, END) for n in range(3) for prefix in itertools.product(words, repeat=n)]
    for sentence in range(SENTENCES):
        log_probs = [(log_prob_of(table, sentence, tokens), tokens) for tokens in hypotheses]
        ended = [(log_prob / penalty(len(tokens), alpha), log_prob, tokens) for log_prob, tokens in log_probs]
        ended = sorted((c for c in ended if c[0] > -np.inf), key=lambda c: -c[0])
        if ended:
            assert_found(found, sentence, ended)
        else:
            assert END not in found.token_ids[sentence]


@given(tables("any", "sharp"), st.integers(0, SENTENCES - 1), st.sampled_from([(2, 1), (3, 3)]), rules, alphas)
def test_a_narrow_beam_finds_what_a_plain_beam_search_finds(table, sentence, sizes, limits, alpha):
    """One sentence at a time, so that nothing keeps the search going when it might end."""
    table, (beam_size, n_best) = put(*table), sizes
    found = decoding.beam_search(
        MODEL, source(sentence), beam_size, alpha, max_length=MAX_LENGTH, n_best=n_best, **limits
    )
    assert_found(found, 0, plain_beam_search(table, sentence, beam_size, alpha, MAX_LENGTH, limits))


@given(tables(), st.sampled_from([dict(), dict(min_length=3)]), alphas)
def test_hypotheses_are_sorted_unlike_well_formed_and_scored_as_score_does(table, limits, alpha):
    table, limits = put(*table), dict(limits, forbidden_ids=(PAD,))
    found = decoding.beam_search(MODEL, EVERY, 3, alpha, max_length=MAX_LENGTH, n_best=3, **limits)
    there = np.isfinite(found.scores)
    assert there[:, 0].all() and (there[:, 1:] <= there[:, :-1]).all()
    assert (found.scores[:, 1:] <= found.scores[:, :-1]).all()
    assert not found.lengths[~there].any() and not found.token_ids[~there].any()
    for place in range(3):
        totals = decoding.score(MODEL, EVERY, found.token_ids[:, place])[1]
        assert_close(totals[there[:, place]], found.log_probs[there[:, place], place], 2e-5)
    for sentence, place in zip(*np.nonzero(there)):
        row, length = found.token_ids[sentence, place], found.lengths[sentence, place]
        tokens = row[:length].tolist()
        assert row.tolist() == filled_up(tokens)
        assert END not in tokens[:-1] and (tokens[-1] == END or length == MAX_LENGTH)
        assert all(allowed(t, **limits)[token] for t, token in enumerate(tokens))
        log_prob = log_prob_of(table, sentence, tokens)
        assert_close(found.log_probs[sentence, place], np.array(log_prob), 2e-5)
        assert_close(found.scores[sentence, place], np.array(log_prob / penalty(length, alpha)), 2e-5)
    for rows, real in zip(found.token_ids.tolist(), there):
        assert len(set(map(tuple, rows))) >= real.sum()


@given(tables(), seeds, st.permutations(range(SENTENCES)), st.integers(0, SENTENCES - 1), alphas)
def test_a_sentence_does_not_depend_on_its_batch(table, seed, order, alone, alpha):
    put(*table)
    targets = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (SENTENCES, MAX_LENGTH))

    def found_of(rows):
        found = decoding.beam_search(MODEL, source(*rows), 3, alpha, max_length=MAX_LENGTH, n_best=3)
        return (
            decoding.greedy(MODEL, source(*rows), max_length=MAX_LENGTH),
            *decoding.score(MODEL, source(*rows), targets[list(rows)]),
            found.scores,
            *([] if table[0] == "ties" else [found.token_ids, found.log_probs, found.lengths]),
        )  # sums of equal numbers may differ in their last bit from one batch size to another, and so part a tie

    together = found_of(range(SENTENCES))
    for rows in (order, [alone]):
        for found, expected in zip(found_of(rows), together):
            assert_close(found, expected[list(rows)], 1e-6)


# Scores


@given(tables(), seeds, st.sampled_from([0, 3, 9]))
def test_score_is_the_log_probability_of_every_token(table, seed, pad_id):
    table = put(*table)
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, VOCAB_SIZE, (SENTENCES, MAX_LENGTH))
    if pad_id < VOCAB_SIZE:
        targets[np.arange(MAX_LENGTH) >= rng.integers(0, MAX_LENGTH + 1, (SENTENCES, 1))] = pad_id
    log_probs, totals = decoding.score(MODEL, EVERY, targets, pad_id=pad_id)
    expected = [
        [log_probs_after(table, i, row[:t])[row[t]] for t in range(MAX_LENGTH)] for i, row in enumerate(targets)
    ]
    expected = np.where(targets == pad_id, 0.0, expected)
    assert_close(log_probs, expected, 2e-5)
    assert_close(totals, expected.sum(axis=1), 2e-5)


# Samples


@given(tables(), seeds, rules, st.sampled_from([0.3, 1.0, 2.0]))
def test_sampling_one_token_is_greedy(table, seed, limits, temperature):
    table = put(*table)
    found = decoding.sample(MODEL, EVERY, temperature, top_k=1, seed=seed, max_length=MAX_LENGTH, **limits)
    np.testing.assert_array_equal(found, decoding.greedy(MODEL, EVERY, max_length=MAX_LENGTH, **limits))


@given(
    tables("any", "impossible"), seeds, st.sampled_from([RULES[0], RULES[2]]), st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([None, 3]), st.sampled_from([None, 0.4, 0.9]),
)  # fmt: skip
def test_every_draw_is_where_its_random_number_falls(table, seed, limits, temperature, top_k, top_p):
    table = put(*table)
    draw = lambda: decoding.sample(MODEL, EVERY, temperature, top_k, top_p, seed, MAX_LENGTH, **limits)  # noqa: E731
    found = draw()
    np.testing.assert_array_equal(draw(), found)
    noise = np.random.default_rng(seed).random((MAX_LENGTH, SENTENCES), "float32")
    for sentence, row in enumerate(found):
        tokens = cut(row)
        assert row.tolist() == filled_up(tokens)
        for t, token in enumerate(tokens):
            logits = np.where(allowed(t, **limits), logits_after(table, sentence, tokens[:t]), -np.inf) / temperature
            probs = np.exp(logits - logits.max())
            order = np.argsort(-probs, kind="stable")
            likeliest = order[: top_k or VOCAB_SIZE]
            probs[~np.isin(np.arange(VOCAB_SIZE), likeliest)] = 0
            probs /= probs.sum()
            reached = probs[order].cumsum() - probs[order]
            if top_p is not None and np.abs(reached - top_p).min() > 1e-5:  # else rounding decides who is in
                probs[order[reached >= top_p]] = 0
                probs /= probs.sum()
            elif top_p is not None:
                continue
            assert probs[token] > 0
            place = likeliest.tolist() if top_k else list(range(VOCAB_SIZE))
            above = probs[place].cumsum()[place.index(token)]
            assert above - probs[token] - 1e-5 <= noise[t, sentence] <= above + 1e-5

"""Tables and figures of Vaswani et al. 2017, "Attention Is All You Need"."""

import numpy as np
from keras import ops

from llmfound import plots
from llmfound.data import pad
from llmfound.reproduce.figure import Figure, spread, take_steps
from llmfound.reproduce.translation import language, step_cost, transformer


class Variations(Figure):
    name = "transformer-table3"
    title = "Variations of the Transformer"
    source = "Vaswani et al. 2017, section 6.2 and table 3"
    claim = (
        "A single head is worse than several, narrower keys and smaller models are worse, dropout is a great help, "
        "label smoothing costs perplexity, and learned positions are as good as sinusoids."
    )
    # Perplexity on newstest2013. Sizes are relative to the base model's.
    BASE = 4.92
    PAPER = {
        "one head": 5.29, "a quarter of d_k": 5.16, "a third of the layers": 6.11, "half as wide": 5.75,
        "twice as wide": 4.66, "half of the feed-forward": 5.12, "twice the feed-forward": 4.75, "no dropout": 5.77,
        "dropout doubled": 4.95, "no label smoothing": 4.67, "label smoothing doubled": 5.47, "learned positions": 4.92,
    }  # fmt: skip
    scales = {
        "tiny": dict(
            seeds=2, vocabulary=12, length=6, batches=12, batch_tokens=384, layers=1, hidden_dim=32, num_heads=4,
            intermediate_dim=64, dropout=0.1, rate=5e-3, warmup=20, steps=150,
            rows={"a quarter of d_k": dict(head_dim=2), "half as wide": dict(hidden_dim=16)},
        ),
        "small": dict(
            seeds=2, vocabulary=2000, pairs=2000, batch_tokens=1024, layers=2, hidden_dim=128, num_heads=4,
            intermediate_dim=256, dropout=0.1, rate=2e-3, warmup=100, steps=450, translated=100,
            rows={
                "one head": dict(num_heads=1), "a quarter of d_k": dict(head_dim=8), "no dropout": dict(dropout=0.0),
                "no label smoothing": dict(smoothing=0.0), "learned positions": dict(positions="learned"),
            },
        ),
        "full": dict(
            seeds=3, vocabulary=10_000, pairs=None, batch_tokens=25_000, layers=6, hidden_dim=512, num_heads=8,
            intermediate_dim=2048, dropout=0.1, rate=7e-4, warmup=4000, steps=100_000, translated=None,
            rows={
                "one head": dict(num_heads=1), "a quarter of d_k": dict(head_dim=16),
                "a third of the layers": dict(layers=2), "half as wide": dict(hidden_dim=256),
                "twice as wide": dict(hidden_dim=1024), "half of the feed-forward": dict(intermediate_dim=1024),
                "twice the feed-forward": dict(intermediate_dim=4096), "no dropout": dict(dropout=0.0),
                "dropout doubled": dict(dropout=0.2), "no label smoothing": dict(smoothing=0.0),
                "label smoothing doubled": dict(smoothing=0.2), "learned positions": dict(positions="learned"),
            },
        ),
    }  # fmt: skip
    shrunk = {
        "tiny": "one layer 32 wide that learns to write made-up tokens backwards; two rows of the table.",
        "small": "2-2 layers 128 wide, 450 steps on 2,000 pairs of Multi30k English-German instead of WMT14; five rows "
        "of the table. BLEU is of greedy translations of 100 sentences.",
        "full": "the paper's models and steps, on Multi30k instead of WMT14; the rate falls linearly to 0.",
    }

    def runs(self, settings):
        return [{"row": row} for row in ("base", *settings["rows"])]

    def prepare(self, settings, sets, folder):
        return language(settings, sets)

    def measure(self, run, settings, seed, prepared):
        model = transformer(prepared, **{**settings, **settings["rows"].get(run["row"], {})})
        take_steps(model, prepared.batches("train", seed), 0, settings["steps"])
        found = model.evaluate(prepared.batches("val"), verbose=0, return_dict=True)
        numbers = {"perplexity": found["perplexity"]}
        if "translated" in settings:
            numbers["BLEU"] = prepared.bleu(model, settings["translated"])
        return numbers

    def changes(self, results, row):
        """Of the perplexity against base, in %: float (seeds,), and the paper's."""
        here = results.of("perplexity", row=row) / results.of("perplexity", row="base")
        return 100 * (here - 1), 100 * (self.PAPER[row] / self.BASE - 1)

    def verdicts(self, results):
        found = []
        for row in results.settings["rows"]:
            here, paper = self.changes(results, row)
            here, word = here.mean(), "worse" if paper > 1 else "better" if paper < -1 else "level, within 5 %"
            margin = 5 - abs(here) if abs(paper) <= 1 else here * np.sign(paper)
            found.append((f"{row}: {word} (perplexity {here:+.1f} %; the paper's {paper:+.1f} %)", margin))
        return found

    def draw(self, results, path):
        rows = list(results.settings["rows"])
        groups = {"here": [], "the paper, WMT14": []}
        for row in rows:
            here, paper = self.changes(results, row)
            groups["here"].append(spread(here))
            groups["the paper, WMT14"].append(3 * [paper])
        plots.bars(groups, rows, "perplexity against base, %", self.title, path)

    def cost(self, settings):
        total = 0
        for changes in ({}, *settings["rows"].values()):
            s = {**settings, **changes}
            sizes = {name: s[name] for name in ("hidden_dim", "intermediate_dim", "vocabulary")}
            total += s["steps"] * step_cost(s["layers"], s["batch_tokens"], **sizes)
        return total


class Heads(Figure):
    name = "transformer-attention"
    title = "What the heads of a Transformer look at"
    source = "Vaswani et al. 2017, section 4 and figures 3 to 5"
    claim = (
        "The heads of a layer learn to perform different tasks, and many of them behave in ways that belong to the "
        "structure of the sentence."
    )
    scales = {
        "tiny": dict(
            seeds=2, vocabulary=12, length=6, batches=200, batch_tokens=384, layers=1, hidden_dim=32, num_heads=4,
            intermediate_dim=64, dropout=0.0, rate=5e-3, warmup=20, steps=250, part="cross",
        ),
        "small": dict(
            seeds=2, vocabulary=2000, pairs=None, words=12, batch_tokens=400, layers=3, hidden_dim=128, num_heads=4,
            intermediate_dim=256, dropout=0.0, rate=1.5e-3, warmup=200, steps=2000, norm="pre", part="encoder",
        ),
        "full": dict(
            seeds=3, vocabulary=10_000, pairs=None, batch_tokens=25_000, layers=6, hidden_dim=512, num_heads=8,
            intermediate_dim=2048, dropout=0.1, rate=7e-4, warmup=4000, steps=100_000, part="encoder",
        ),
    }  # fmt: skip
    shrunk = {
        "tiny": "one layer 32 wide that learns to write made-up tokens backwards; the decoder's heads on the encoder.",
        "small": "3-3 layers 128 wide, Pre-LN, after 2,000 steps of 400 tokens on Multi30k's English-German captions "
        "of at most 12 words instead of WMT14; the encoder's heads.",
        "full": "the paper's base model and steps, on Multi30k English-German instead of WMT14; the encoder's heads.",
    }
    SENTENCES = 64
    NEAR = range(-3, 4)  # places around a query
    PLACES = {-3: "three before", -2: "two before", -1: "one before", 0: "the same place", 1: "one after",
              2: "two after", 3: "three after"}  # fmt: skip

    def runs(self, settings):
        return [{"heads": "at the start"}, {"heads": "trained"}]

    def prepare(self, settings, sets, folder):
        return language(settings, sets)

    def measure(self, run, settings, seed, prepared):
        model = transformer(prepared, **settings)
        if run["heads"] == "trained":
            take_steps(model, prepared.batches("train", seed), 0, settings["steps"])
        part, sides = settings["part"], prepared.sentences(self.SENTENCES)
        inputs = {name: pad(side, 0) for name, side in zip(("source_ids", "target_ids"), sides)}
        found = ops.convert_to_numpy(model.attention(inputs)[part])  # (sentences, layers, heads, queries, keys)
        keys, queries = sides[0], sides[part == "cross"]
        found = [weights[..., : len(q), : len(k)] for weights, q, k in zip(found, queries, keys)]
        # A row that is written backwards has its places on the other diagonal.
        along = [weights[..., ::-1] if "length" in settings else weights for weights in found]
        place = [[np.trace(w, k, axis1=-2, axis2=-1) / w.shape[-2] for k in self.NEAR] for w in along]
        place = np.mean(place, axis=0)  # (places, layers, heads)
        profiles = np.moveaxis([*place, 1 - place.sum(axis=0)], 0, -1)[..., None, :]  # each head's, over places
        return {
            "divergence": np.mean([divergence(weights) for weights in found]),
            "divergence of profiles": divergence(profiles),
            "most on one place": place.max(),
            "places": np.array(self.NEAR)[place.argmax(axis=0)],
            "shares": place.max(axis=0),
            "queries": prepared.tokens(queries[0]),
            "keys": prepared.tokens(keys[0]),
            "weights": found[0].round(4),
        }

    def verdicts(self, results):
        apart, most = (
            [results.mean(name, heads=heads) for heads in ("at the start", "trained")]
            for name in ("divergence of profiles", "most on one place")
        )
        found = [
            (
                f"One looks at a fixed place, wherever it stands: with {100 * most[1]:.0f} % of its weight, "
                f"{100 * most[0]:.0f} % at the start (at least three times as much)",
                most[1] - 3 * most[0],
            )
        ]
        if results.settings["part"] == "encoder":  # a row that is written backwards gives all heads one task
            found.append((
                "The heads of a layer look at different places around the word, over all sentences: "
                f"{apart[1]:.4f} bits between two of them, {apart[0]:.4f} at the start (at least ten times as much)",
                apart[1] - 10 * apart[0],
            ))  # fmt: skip
        return found

    def draw(self, results, path):
        names = "weights", "queries", "keys", "places", "shares"
        weights, queries, keys, places, shares = (results.all(name, heads="trained")[0] for name in names)
        titles = [
            [f"{share:.0%} on {self.PLACES[place]}" if share > 0.4 else "" for place, share in zip(*layer)]
            for layer in zip(places, shares)
        ]
        plots.heads(weights, queries, keys, titles, self.title, path)

    def cost(self, settings):
        sizes = {name: settings[name] for name in ("hidden_dim", "intermediate_dim", "vocabulary")}
        return settings["steps"] * step_cost(settings["layers"], settings["batch_tokens"], **sizes)


def divergence(weights):
    """Mean Jensen-Shannon divergence of two heads of a layer, in bits, from weights (..., heads, queries, keys)."""
    first, second = np.triu_indices(weights.shape[-3], 1)
    a, b = weights[..., first, :, :], weights[..., second, :, :]
    bits = lambda p: -(p * np.log2(np.maximum(p, 1e-30))).sum(axis=-1)  # noqa: E731
    return (bits((a + b) / 2) - (bits(a) + bits(b)) / 2).mean()

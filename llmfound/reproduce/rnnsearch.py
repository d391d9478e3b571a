"""Figures of Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate"."""

import pathlib

import keras
import numpy as np
from keras import ops

from llmfound import data, decoding, models, plots, training
from llmfound.reproduce.figure import Figure, take_steps

COLOURS = {
    "black": "noir noire noirs noires", "white": "blanc blanche blancs blanches", "red": "rouge rouges",
    "blue": "bleu bleue bleus bleues", "green": "vert verte verts vertes", "yellow": "jaune jaunes",
    "pink": "rose roses", "gray": "gris grise grises", "brown": "marron marrons brun brune bruns brunes",
    "orange": "orange oranges", "purple": "violet violette violets violettes",
}  # fmt: skip
NO_NOUNS = ("en", "et", "ou", "de", ",")
MADE_UP = dict(
    corpus="made up", lengths=(3, 8), vocabulary=20, max_length=10, batch_size=64, steps=150, rate=1e-2,
    sizes=dict(embedding_dim=32, hidden_dim=64, attention_dim=32, maxout_dim=32),
)  # fmt: skip
SMALL = dict(
    vocabulary=4000, max_length=40, batch_size=48, rate=3e-3,
    sizes=dict(embedding_dim=96, hidden_dim=192, attention_dim=96, maxout_dim=96),
)  # fmt: skip
PAPER = dict(
    corpus="wmt14", vocabulary=30_000, max_length=51, batch_size=80, steps=288_000, rate=None,
    sizes=models.RNNsearch.PAPER,
)  # fmt: skip
SHRUNK = {
    "tiny": "models 64 wide learn to write rows of 3 to 8 made-up words backwards in 150 steps of Adam, from Glorot's "
    "start",
    "small": "models 192 wide, {}, 4,000 words a side; Adam, and Glorot's start instead of the paper's "
    "smaller one, which so few steps would hardly leave",
    "full": "pairs of yours in the folder wmt14, train.en, train.fr, test.en and test.fr",
}


class Lengths(Figure):
    name = "rnnsearch-length"
    title = "Translations by the length of the sentence, with and without attention"
    source = "Bahdanau et al. 2015, section 5.1 and figure 2"
    claim = (
        "RNNsearch, which searches the source for each word, translates better than RNNencdec, which has all of the "
        "source in one vector; the translations of RNNencdec get worse with the length of the sentence, those of "
        "RNNsearch much less."
    )
    scales = {
        "tiny": dict(seeds=2, **MADE_UP, beam_size=1, bins=(4, 6)),
        "small": dict(seeds=2, corpus="tatoeba", steps=1200, **SMALL, beam_size=1, bins=(4, 6, 8, 10)),
        "full": dict(seeds=1, **PAPER, beam_size=12, bins=(10, 20, 30, 40, 50)),
    }
    shrunk = {
        "tiny": SHRUNK["tiny"] + "; greedy decoding.",
        "small": SHRUNK["small"].format("1,200 steps of 48 short pairs of Tatoeba English-French")
        + "; greedy decoding.",
        "full": SHRUNK["full"] + "; as many steps for RNNencdec as for RNNsearch, where the paper made 600,000.",
    }

    def runs(self, settings):
        return [{"model": "RNNsearch"}, {"model": "RNNencdec"}]

    def prepare(self, settings, sets, folder):
        return _Pairs(settings, sets)

    def measure(self, run, settings, seed, prepared):
        model = trained(run["model"], settings, seed, prepared)
        sources, references = zip(*prepared.test)
        found = decoding.translate(
            model, prepared.source, sources, prepared.target, settings["beam_size"], length_multiple=8
        )
        return {
            "BLEU": training.bleu(found, references).score,
            "by length": training.bleu_by_length(found, references, sources, settings["bins"]),
        }

    def verdicts(self, results):
        ahead, behind = (results.mean("BLEU", **run) for run in results.runs)
        attending, fixed = (self.bins(results, run["model"]) for run in results.runs)
        of_first, of_last = (fixed[i]["bleu"] / attending[i]["bleu"] for i in (0, -1))
        return [
            (f"RNNsearch is ahead of RNNencdec: BLEU {ahead:.1f} against {behind:.1f}", ahead - behind),
            (
                f"RNNencdec falls behind with length: it has {of_first:.0%} of RNNsearch's BLEU in those of up to "
                f"{fixed[0]['high']} words, {of_last:.0%} in those of {fixed[-1]['low']} and more",
                of_first - of_last,
            ),
        ]

    def bins(self, results, model):
        """What `bleu_by_length` returns, its BLEU the mean over the seeds."""
        return [
            {**same[0], "bleu": np.mean([one["bleu"] for one in same])}
            for same in zip(*results.all("by length", model=model))
        ]

    def draw(self, results, path):
        systems = {run["model"]: self.bins(results, run["model"]) for run in results.runs}
        plots.bleu_by_length(systems, self.title, path)

    def cost(self, settings):
        return 2 * training_cost(**settings)


class Alignment(Figure):
    name = "rnnsearch-alignment"
    title = "What RNNsearch looks at"
    source = "Bahdanau et al. 2015, section 5.2.1 and figure 3"
    claim = (
        "The weights tell which source words a target word comes from. Between English and French most of them lie "
        "along the diagonal, and where the languages order adjective and noun differently, the model jumps over words "
        "and back."
    )
    scales = {
        "tiny": dict(seeds=2, **MADE_UP),
        "small": dict(seeds=2, corpus="multi30k", steps=1200, **SMALL),
        "full": dict(seeds=1, **PAPER),
    }
    shrunk = {
        "tiny": SHRUNK["tiny"] + ", so that each must look at its mirror image.",
        "small": SHRUNK["small"].format("1,200 steps of 48 pairs of Multi30k English-French") + ".",
        "full": SHRUNK["full"] + ".",
    }

    def runs(self, settings):
        return [{"model": "RNNsearch"}]

    def prepare(self, settings, sets, folder):
        return _Pairs(settings, sets)

    def measure(self, run, settings, seed, prepared):
        model = trained(run["model"], settings, seed, prepared)
        found, chance, inverted, near, near_by_chance, drawn = [], [], [], [], [], None
        for i, (source, target, weights) in enumerate(_aligned(model, prepared)):
            most, expected = weights.argmax(axis=1), prepared.expected(*prepared.test[i])
            found += [most[row] == column for row, column, _ in expected]
            chance += [1 / len(source) for _ in expected]
            inverted += [most[row - 1] > column for row, column, after_noun in expected if after_noun]
            close = np.abs(np.arange(len(source)) - np.linspace(0, len(source) - 1, len(target))[:, None]) <= 2
            near.append((weights * close).sum(axis=1).mean())
            near_by_chance.append(close.mean())
            if drawn is None and len(expected) > 1 and 9 <= len(source) <= 15:
                tokens = dict(source=prepared.source.tokens(source), target=prepared.target.tokens(target))
                drawn = {**tokens, "weights": weights.round(4)}
        return {
            "cases": len(found), "found": np.mean(found), "by chance": np.mean(chance), "inverted": np.mean(inverted),
            "near the diagonal": np.mean(near), "near by chance": np.mean(near_by_chance), "drawn": drawn,
        }  # fmt: skip

    def verdicts(self, results):
        names = "found", "by chance", "inverted", "near the diagonal", "near by chance"
        found, chance, inverted, near, near_by_chance = (results.mean(name) for name in names)
        if results.settings["corpus"] == "made up":
            return [
                (
                    f"A word looks most at its mirror image: {found:.0%} (more than half; by chance {chance:.0%})",
                    found - 0.5,
                ),
                (f"The word before it looks further right: {inverted:.0%} (more than half)", inverted - 0.5),
            ]
        return [
            (
                f"A French colour looks most at the English one: {found:.0%} (more than half; by chance {chance:.0%})",
                found - 0.5,
            ),
            (f"The noun before it looks to the right of the colour: {inverted:.0%} (more than half)", inverted - 0.5),
            (
                f"The weights lie along the diagonal: {near:.0%} within two words of it (more than half; evenly "
                f"spread {near_by_chance:.0%})",
                near - max(0.5, near_by_chance),
            ),
        ]

    def draw(self, results, path):
        drawn = results.all("drawn")[0]
        plots.alignment(drawn["weights"], drawn["source"], drawn["target"], self.title, path)

    def cost(self, settings):
        return training_cost(**settings)


class _Pairs:
    """Pairs to train on and to test, and the words of either side."""

    def __init__(self, settings, sets):
        s = settings
        self.made_up = s["corpus"] == "made up"
        if self.made_up:
            self.train = _backwards(s["steps"] * s["batch_size"], *s["lengths"], seed=0)
            self.test = _backwards(500, *s["lengths"], seed=1)
        elif s["corpus"] == "tatoeba":
            self.train, self.test = (data.tatoeba(part, "fra", sets) for part in ("train", "test"))
        elif s["corpus"] == "multi30k":
            self.train, self.test = (data.multi30k(part, "en", "fr", sets) for part in ("train", "test_2016_flickr"))
        else:
            folder = pathlib.Path(sets or ".") / s["corpus"]
            self.train, self.test = (
                data.read_parallel(folder / f"{part}.en", folder / f"{part}.fr") for part in ("train", "test")
            )
        self.source, self.target = (
            data.Tokenizer.train(side, s["vocabulary"], kind="word") for side in zip(*self.train)
        )

    def expected(self, source, target):
        """Words and what they translate, list of (place in the target, in the source, whether after a noun)."""
        words, others = (
            [piece.strip("▁").lower() for piece in side.pieces(text)]
            for side, text in ((self.source, source), (self.target, target))
        )
        if self.made_up:
            return [(i, len(words) - 1 - i, i > 0) for i in range(len(others))]
        found = []
        for english, french in COLOURS.items():
            there = [i for i, word in enumerate(others) if word in french.split()]
            if len(there) == words.count(english) == 1:
                i = there[0]
                found.append((i, words.index(english), i > 0 and others[i - 1] not in NO_NOUNS))
        return found


def _backwards(count, shortest, longest, seed):
    """Rows of made-up words and the same backwards, list of (str, str)."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(list("abcdefghijkl"), rng.integers(shortest, longest + 1)) for _ in range(count)]
    return [(" ".join(row), " ".join(row[::-1])) for row in rows]


def trained(name, settings, seed, pairs):
    """A model that has learned the pairs."""
    s = settings
    batches = data.TranslationBatches(
        pairs.train, pairs.source, pairs.target, batch_size=s["batch_size"], max_length=s["max_length"], num_buckets=8,
        seed=seed,
    )  # fmt: skip
    model = getattr(models, name)(pairs.source.vocab_size, pairs.target.vocab_size, **s["sizes"])
    optimizer = keras.optimizers.Adadelta(1.0, rho=0.95, epsilon=1e-6, global_clipnorm=1.0)
    if s["rate"]:
        _start_larger(model)
        rate = training.LinearWarmupDecay(s["rate"], s["steps"] // 20, s["steps"])
        optimizer = training.Adam(rate, global_clipnorm=1.0)
    model.compile(optimizer, training.SmoothedCrossEntropy(0.0))
    take_steps(model, batches, 0, s["steps"])
    return model


def _aligned(model, pairs):
    """Of each pair to test the ids of either side and, as the target is read, its weights, (target, source)."""
    sides = [
        [[*ids, words.end_id] for ids in words.encode_batch(side)]
        for words, side in zip((pairs.source, pairs.target), zip(*pairs.test))
    ]
    for first in range(0, len(pairs.test), 64):
        chosen = [side[first : first + 64] for side in sides]
        weights = ops.convert_to_numpy(model.align(*(data.pad(side, 0, multiple=8) for side in chosen)))
        for source, target, found in zip(*chosen, weights):
            yield source, target, found[: len(target), : len(source)]


def _start_larger(model):
    """Glorot's start of all but the recurrent matrices, which are orthogonal."""
    for weight in model.trainable_weights:
        if len(weight.shape) > 1 and "recurrent" not in weight.path:
            embedding = "embedding" in weight.path
            start = keras.initializers.RandomUniform(-0.05, 0.05) if embedding else keras.initializers.GlorotUniform()
            weight.assign(start(weight.shape))


def training_cost(sizes, vocabulary, max_length, batch_size, steps, **_):
    """Floating-point operations: six for each weight and word, sentences being half as long as the longest."""
    m, n, a, out = (sizes[f"{name}_dim"] for name in ("embedding", "hidden", "attention", "maxout"))
    encoder = 6 * n * (m + n) + 2 * n * a
    decoder = (3 * n + 2 * out) * (m + 3 * n) + n * a + out * vocabulary
    return 6 * (encoder + decoder) * steps * batch_size * max_length // 2

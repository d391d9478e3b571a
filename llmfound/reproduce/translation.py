"""What several figures train Transformers on: captions of Multi30k, and made-up rows to be written backwards."""

import keras
import numpy as np

from llmfound import data, decoding, layers, models, training


def language(settings, sets):
    """Backwards, if the settings have a "length", else Multi30k."""
    return Backwards(settings) if "length" in settings else Multi30k(settings, sets)


class Backwards:
    """Rows of made-up tokens, to be written backwards; token 1 begins them.

    Args:
        settings: dict, with "vocabulary", "length", "batch_tokens", and "batches", how many there are to train on.
    """

    def __init__(self, settings):
        self.settings, self.vocabulary = settings, settings["vocabulary"]

    def batches(self, part, seed=0):
        return _Rows(self.settings, seed) if part == "train" else _Rows({**self.settings, "batches": 4}, 10**6)

    def sentences(self, count):
        """Source ids, and target ids as the decoder reads them, of sentences that are not trained on."""
        rows, _ = self.batches("val")[0]
        return [rows[name][:count].tolist() for name in ("source_ids", "target_ids")]

    def tokens(self, ids):
        return [str(token) for token in ids]


class _Rows(keras.utils.PyDataset):
    def __init__(self, settings, seed):
        super().__init__()
        length = settings["length"]
        self.shape, self.vocabulary = (settings["batch_tokens"] // length, length), settings["vocabulary"]
        self.seed, self.count = seed, settings["batches"]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rows = np.random.default_rng([self.seed, i]).integers(3, self.vocabulary, self.shape).astype("int32")
        backwards = rows[:, ::-1].copy()
        shifted = np.concatenate([np.ones_like(rows[:, :1]), backwards[:, :-1]], axis=1)
        return {"source_ids": rows, "target_ids": shifted}, backwards


class Multi30k:
    """English-German pairs of Multi30k, in sub-words of both languages.

    Args:
        settings: dict, with "vocabulary", "batch_tokens", "words", the most in a sentence (30 without it), and "pairs",
            the first so many to train on (None: all).
        sets: folder of the public sets.
    """

    def __init__(self, settings, sets):
        most = settings.get("words", 30)
        self.pairs = {
            part: [pair for pair in data.multi30k(part, "en", "de", sets) if max(len(s.split()) for s in pair) <= most]
            for part in ("train", "val")
        }
        self.pairs["train"] = self.pairs["train"][: settings.get("pairs")]
        texts = [text for pair in self.pairs["train"] for text in pair]
        self.tokenizer = data.Tokenizer.train(texts, vocab_size=settings["vocabulary"])
        self.vocabulary, self.batch_tokens = self.tokenizer.vocab_size, settings["batch_tokens"]

    def batches(self, part, seed=0):
        return data.TranslationBatches(
            self.pairs[part], self.tokenizer, batch_tokens=self.batch_tokens, num_buckets=2, seed=seed
        )

    def sentences(self, count):
        """Source ids, and target ids as the decoder reads them, of sentences that are not trained on."""
        tokenizer, (sources, targets) = self.tokenizer, zip(*self.pairs["val"][:count])
        return (
            [[*tokenizer.encode(text), tokenizer.end_id] for text in sources],
            [[tokenizer.start_id, *tokenizer.encode(text)] for text in targets],
        )

    def tokens(self, ids):
        return self.tokenizer.tokens(ids)

    def bleu(self, model, count):
        """Of the greedy translations of so many sentences of the validation part."""
        sources, references = zip(*self.pairs["val"][:count])
        return training.bleu(decoding.translate(model, self.tokenizer, sources, beam_size=1), references).score


class LearnedPositions(models.Transformer):
    """Row E of table 3: positions are learned, and at the start as long as the sinusoids."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        normal = keras.initializers.RandomNormal(stddev=0.5**0.5)
        self.position = layers.PositionEmbedding(self.position.max_length, normal, name="position")


def transformer(language, steps, layers, hidden_dim, num_heads, intermediate_dim, dropout, rate, warmup, head_dim=None,
                smoothing=0.1, norm="post", positions="sinusoids", **_):  # fmt: skip
    """A compiled Transformer; the rate rises linearly, then falls linearly to 0 at the last of the steps."""
    kind = LearnedPositions if positions == "learned" else models.Transformer
    model = kind(
        language.vocabulary, layers, hidden_dim, num_heads, intermediate_dim, dropout, norm=norm, head_dim=head_dim
    )
    model.compile(
        training.Adam(training.LinearWarmupDecay(rate, warmup, steps), beta_2=0.98, epsilon=1e-9),
        training.SmoothedCrossEntropy(smoothing), metrics=[training.Perplexity()],
    )  # fmt: skip
    return model


def step_cost(layers, tokens, hidden_dim=512, intermediate_dim=1024, vocabulary=10_000, **_):
    """Floating-point operations of one step of an encoder-decoder: six for each weight and token, forward and back."""
    weights = layers * (12 * hidden_dim**2 + 4 * hidden_dim * intermediate_dim) + vocabulary * hidden_dim
    return 6 * weights * tokens

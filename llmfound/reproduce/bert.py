"""Tables of Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"."""

import pathlib
import re

import keras
import numpy as np
from keras import ops

from llmfound import data, models, plots, training
from llmfound.ops import padding_mask
from llmfound.reproduce.figure import Figure, take_steps

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BASE = dict(
    corpus="pretraining/*.txt", vocabulary=30_000, layers=12, hidden_dim=768, max_length=512, batch_size=256,
    steps=1_000_000, rate=1e-4, sentences=None, test_sentences=None, tuning_steps=6300, tuning_rate=5e-5,
)  # fmt: skip
SMALL = dict(
    corpus="captions", vocabulary=2000, layers=2, hidden_dim=64, max_length=24, batch_size=64, rate=2e-3,
    sentences=1000, tuning_steps=200, tuning_rate=2e-3,
)  # fmt: skip


class Objectives(Figure):
    name = "bert-objectives"
    title = "BERT's masked words against left-to-right"
    source = "Devlin et al. 2019, section 5.1 and table 5"
    claim = (
        "A model that is pre-trained on masked words and sees both sides is better on all tasks than one that is "
        "pre-trained left to right, most of all where tokens are labelled, whose vectors know nothing of what follows."
    )
    scales = {
        "tiny": dict(
            seeds=2, corpus="made up", layers=1, hidden_dim=32, max_length=16, batch_size=32, steps=50, rate=1e-2,
            tasks=("next word",), tuning_steps=120, tuning_rate=1e-2,
        ),
        "small": dict(seeds=3, tasks=("articles", "capitals"), steps=2000, **SMALL),
        "full": dict(seeds=3, tasks=("capitals", "sst2", "mrpc"), **BASE),
    }  # fmt: skip
    shrunk = {
        "tiny": "1 layer 32 wide on made-up words, each tagged with the kind of the next one.",
        "small": "2 layers 64 wide, 2,000 steps of 64 German captions of Multi30k in lower case, without next "
        "sentences; instead of the paper's five tasks two of tagging, learned from 1,000 captions: which words began "
        "with a capital (F1), and which form an article has (accuracy) where ein, eine, einen, ... all read ein. The "
        "form depends on the noun to the right.",
        "full": "BERT-base and the paper's million steps, without next sentences, on texts of yours in the folder "
        "pretraining; MRPC and SST-2 of the paper's five tasks, and capitals in WikiText-2 instead of SQuAD.",
    }

    def runs(self, settings):
        return [{"objective": "masked"}, {"objective": "left to right"}]

    def prepare(self, settings, sets, folder):
        return _prepared(settings, sets)

    def measure(self, run, settings, seed, prepared):
        causal = run["objective"] == "left to right"
        objective = "left_to_right" if causal else "masked"
        bert, numbers = _pretrain(prepared, settings, seed, causal, objective=objective)
        pretrained = bert.get_weights()
        for task in settings["tasks"]:
            bert.set_weights(pretrained)
            numbers[task] = _tune(bert, prepared.task(task, settings, seed), settings)
        return numbers

    def verdicts(self, results):
        found = []
        for task in results.settings["tasks"]:
            ahead = results.mean(task, objective="masked") - results.mean(task, objective="left to right")
            found.append((f"{task}: masked words are ahead of left-to-right ({ahead:+.1f} points)", ahead))
        return found

    def draw(self, results, path):
        tasks = results.settings["tasks"]
        groups = {run["objective"]: [results.interval(task, **run) for task in tasks] for run in results.runs}
        plots.bars(groups, tasks, "score, %", self.title, path, within=(0, 100))

    def cost(self, settings):
        return 2 * _cost(settings)


class Masking(Figure):
    name = "bert-masking"
    title = "How BERT's chosen words are hidden"
    source = "Devlin et al. 2019, appendix C.2 and table 8"
    claim = (
        "Fine-tuning is robust to how the words to be predicted are hidden. Where the encoder's vectors are used as "
        "they are, [MASK] alone does worse than the mixture of 80 % [MASK], 10 % the same word and 10 % a random one, "
        "since it is never seen after pre-training (94.0 against 94.9), and random words alone do worse, too (94.6)."
    )
    scales = {
        "tiny": dict(
            seeds=2, rows=((80, 10, 10), (0, 20, 80)), corpus="made up", task="own word", layers=1,
            hidden_dim=32, max_length=16, batch_size=32, steps=120, rate=1e-2, tuning_steps=50, tuning_rate=1e-2,
            features_rate=3e-2,
        ),
        "small": dict(
            seeds=2, rows=((80, 10, 10), (100, 0, 0), (0, 20, 80), (0, 0, 100)), task="articles", steps=1500,
            features_rate=3e-2, **SMALL,
        ),
        "full": dict(
            seeds=3, rows=((80, 10, 10), (100, 0, 0), (80, 0, 20), (80, 20, 0), (0, 20, 80), (0, 0, 100)),
            task="capitals", features_rate=1e-3, **BASE,
        ),
    }  # fmt: skip
    shrunk = {
        "tiny": "1 layer 32 wide on made-up words, each tagged with its own kind; a linear head on the last layer's "
        "vectors.",
        "small": "four of the six rows; 2 layers 64 wide, 1,500 steps of 64 German captions of Multi30k in lower case, "
        "without next sentences; instead of MNLI and names in CoNLL-2003, which form an article has where ein, eine, "
        "einen, ... all read ein (accuracy), learned from 1,000 captions; features are the last layer's vectors under "
        "a linear head, not those of four layers under an LSTM.",
        "full": "BERT-base and the paper's million steps, without next sentences, on texts of yours in the folder "
        "pretraining; capitals in WikiText-2 instead of MNLI and names in CoNLL-2003; features are the last layer's "
        "vectors under a linear head, not those of four layers under an LSTM.",
    }

    def runs(self, settings):
        return [dict(zip(("MASK", "same", "random"), row)) for row in settings["rows"]]

    def prepare(self, settings, sets, folder):
        return _prepared(settings, sets)

    def measure(self, run, settings, seed, prepared):
        shares = [run[name] / 100 for name in ("MASK", "same", "random")]
        bert, numbers = _pretrain(prepared, settings, seed, shares=shares)
        task = prepared.task(settings["task"], settings, seed)
        numbers["features"] = _tune(bert, task, settings, frozen=True)  # leaves the encoder as it was
        numbers["fine-tuned"] = _tune(bert, task, settings)
        return numbers

    def verdicts(self, results):
        scores = {
            name: {tuple(run.values()): results.mean(name, **run) for run in results.runs}
            for name in ("fine-tuned", "features")
        }
        tuned, features = (max(found.values()) - min(found.values()) for found in scores.values())
        found = [
            (
                f"fine-tuned, the strategies lie closer together than with features ({tuned:.1f} points between best "
                f"and worst, against {features:.1f})",
                features - tuned,
            )
        ]
        for name, row in (("[MASK] alone", (100, 0, 0)), ("random words alone", (0, 0, 100))):
            if row in scores["features"]:
                ahead = scores["features"][row] - scores["features"][80, 10, 10]
                found.append((f"features: {name} does worse than 80/10/10 ({ahead:+.1f} points)", -ahead))
        return found

    def draw(self, results, path):
        labels = ["/".join(map(str, run.values())) for run in results.runs]
        groups = {name: [results.interval(name, **run) for run in results.runs] for name in ("fine-tuned", "features")}
        plots.bars(groups, labels, "score, %", self.title, path, within=(0, 100))

    def cost(self, settings):
        return len(settings["rows"]) * _cost(settings)


def _prepared(settings, sets):
    if settings["corpus"] == "made up":
        return _MadeUp(400, seed=0)
    return (_Captions if settings["corpus"] == "captions" else _Published)(settings, sets)


def _pretrain(prepared, s, seed, causal=False, **options):
    """A BERT trained on the documents, options being those of PretrainingBatches; and its losses."""
    bert = models.BERT(
        prepared.tokenizer.vocab_size, s["layers"], s["hidden_dim"], num_heads=max(s["hidden_dim"] // 64, 2),
        intermediate_dim=4 * s["hidden_dim"], max_length=max(s["max_length"], 128), causal=causal,
    )  # fmt: skip
    batches = data.PretrainingBatches(
        prepared.documents, prepared.tokenizer, s["batch_size"], s["max_length"], next_sentence=False, seed=seed,
        **options,
    )  # fmt: skip
    model = models.BERTPretraining(bert, next_sentence=False)
    _compile(model, s["rate"], s["steps"], {"masked_lm": training.SmoothedCrossEntropy(0.0)})
    losses = take_steps(model, batches, 0, s["steps"])
    return bert, {"first loss": np.mean(losses[:3]), "last loss": np.mean(losses[-len(losses) // 10 :])}


def _tune(bert, task, s, frozen=False):
    """The score, in percent, of a task, (batches, head, score), after all weights, or the head's alone, are trained."""
    batches, head, score = task
    batches.epoch = 0
    model = (OnFeatures if frozen else head)(bert, batches.num_classes)
    bert.encoder.trainable = not frozen
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    _compile(model, s["features_rate" if frozen else "tuning_rate"], s["tuning_steps"], loss)
    take_steps(model, batches, 0, s["tuning_steps"])
    bert.encoder.trainable = True
    return 100 * score(lambda test: model.predict(test, verbose=0))


def _compile(model, rate, steps, loss):
    schedule = training.LinearWarmupDecay(rate, steps // 10, steps)
    model.compile(
        training.AdamW(schedule, weight_decay=0.01, exclude=["bias", "gamma", "beta"], global_clipnorm=1.0), loss
    )


def _cost(s):
    """Floating-point operations of one pre-training."""
    return 6 * 12 * s["layers"] * s["hidden_dim"] ** 2 * s["steps"] * s["batch_size"] * s["max_length"]


class _MadeUp:
    """Rows of made-up words of four kinds; after a kind the next one comes half the time, else any."""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        words = [f"{kind}{i}" for kind in "abcd" for i in range(10)]
        self.tokenizer = data.WordPiece.from_vocabulary([*SPECIAL, *words])
        self.rows = []
        for _ in range(2 * count):
            kinds = [rng.integers(4)]
            while len(kinds) < 12:
                kinds.append((kinds[-1] + 1) % 4 if rng.random() < 0.5 else rng.integers(4))
            self.rows.append([f"{'abcd'[kind]}{rng.integers(10)}" for kind in kinds])
        self.documents = data.Documents.encode([[" ".join(row)] for row in self.rows[:count]], self.tokenizer)
        self.count = count

    def task(self, name, settings, seed):
        """Each word's tag is its own kind, or that of the next word."""
        n = self.count
        tags = [[f"B-{word[0]}" for word in row] for row in self.rows]
        if name == "next word":
            tags = [[*row[1:], "O"] for row in tags]

        def score(found):
            return training.accuracy([tag for row in tags[n:] for tag in row], [tag for row in found for tag in row])

        return _tagging(self.rows[:n], tags[:n], self.rows[n:], self.tokenizer, settings, seed, score)


def _tagging(words, tags, test_words, tokenizer, settings, seed, score):
    """A task of tagging: batches to train on, the head, and what scores a function that predicts.

    Args:
        score: function of the tags found, list of lists of str.
    """
    shape = dict(batch_size=settings["batch_size"], max_length=min(settings["max_length"], 128), split_long=True)
    train = data.TaggingBatches(words, tags, tokenizer, seed=seed, **shape)
    test = data.TaggingBatches(test_words, None, tokenizer, train.classes, shuffle=False, **shape)
    return train, models.BERTTokenClassifier, lambda predict: score(test.words(predict(test)))


class _Published:
    """A corpus, and tasks of the public sets."""

    def __init__(self, settings, folder):
        self.folder = folder
        files = sorted(pathlib.Path(folder or ".").glob(settings["corpus"]))
        if not files:
            raise FileNotFoundError(
                f"There is no file {settings['corpus']} in {folder or 'the current folder'}: put texts there, one "
                "sentence a line and blank lines between documents, or name another --data."
            )
        documents = [document for file in files for document in data.read_documents(file)]
        sentences = [sentence for document in documents for sentence in document]
        self.tokenizer = data.WordPiece.train(sentences, settings["vocabulary"])
        self.documents = data.Documents.encode(documents, self.tokenizer)

    def task(self, name, settings, seed):
        if name == "capitals":
            return self._capitals(settings, seed)
        shape = dict(batch_size=settings["batch_size"], max_length=min(settings["max_length"], 128))
        train, test = (getattr(data, name)(part, self.folder) for part in ("train", "test"))
        train = data.SentenceBatches(*train, self.tokenizer, seed=seed, **shape)
        test = data.SentenceBatches(*test, self.tokenizer, train.num_classes, shuffle=False, **shape)
        return train, OfTheMean, lambda predict: training.accuracy(test.labels, predict(test).argmax(-1))

    def _capitals(self, settings, seed):
        """Of sentences of WikiText-2."""
        rows = []
        for part, count in (("train", settings["sentences"]), ("test", settings["test_sentences"])):
            sentences = [sentence for article in _articles(part, self.folder) for sentence in article]
            chosen = np.random.default_rng(0).permutation(len(sentences))[:count]
            rows.append([sentences[i].split() for i in chosen])
        return _capitals(*rows, self.tokenizer, settings, seed)


class _Captions:
    """German captions of Multi30k, and two tasks of tagging their words."""

    forms = {"ein", "eine", "einen", "einem", "einer", "eines"}

    def __init__(self, settings, folder):
        parts = (data.multi30k(part, "en", "de", folder) for part in ("train", "test_2016_flickr"))
        self.train, self.test = ([re.findall(r"\w+|[^\w\s]", german) for _, german in pairs] for pairs in parts)
        captions = [" ".join(words) for words in self.train]
        self.tokenizer = data.WordPiece.train(captions, settings["vocabulary"])
        self.documents = data.Documents.encode([[caption] for caption in captions], self.tokenizer)

    def task(self, name, settings, seed):
        chosen = np.random.default_rng(seed).permutation(len(self.train))[: settings["sentences"]]
        rows = [self.train[i] for i in chosen], self.test
        if name == "capitals":
            return _capitals(*rows, self.tokenizer, settings, seed)
        tags, test_tags = (
            [[word.lower() if word.lower() in self.forms else "O" for word in words] for words in part] for part in rows
        )
        words, test_words = (
            [["ein" if word.lower() in self.forms else word for word in words] for words in part] for part in rows
        )

        def score(found):
            pairs = [pair for row in zip(test_tags, found) for pair in zip(*row) if pair[0] != "O"]
            return training.accuracy(*zip(*pairs))

        return _tagging(words, tags, test_words, self.tokenizer, settings, seed, score)


def _capitals(words, test_words, tokenizer, settings, seed):
    """Which words, read in lower case, began with a capital: F1, but for the first of a sentence."""
    tags, test_tags = ([["CO"[not word[0].isupper()] for word in row] for row in rows] for rows in (words, test_words))

    def score(found):
        return training.f1(*([tag == "C" for row in rows for tag in row[1:]] for rows in (test_tags, found)))

    return _tagging(words, tags, test_words, tokenizer, settings, seed, score)


class OfTheMean(models.BERTTokenClassifier):
    """Reads the mean of all tokens: the first one, [CLS], knows nothing of a text that is read left to right."""

    def call(self, inputs, training=None):
        real = ops.cast(padding_mask(inputs["token_ids"], self.encoder.pad_id), "float32")[..., None]
        mean = ops.sum(real * self.encode(inputs, training), axis=1) / ops.sum(real, axis=1)
        return self.classes(self.dropout(mean, training=training))


class OnFeatures(models.BERTTokenClassifier):
    """Reads the encoder's vectors as they are, without its dropout."""

    def encode(self, inputs, training=None):
        return super().encode(inputs, training=False)


def _articles(part, folder):
    """The articles of a part of WikiText-2 as lists of sentences, without headings and the marks of its tokenizer."""
    found = [[]]
    for line in data.wikitext2(part, folder):
        if line.startswith("= ") and not line.startswith("= ="):
            found.append([])
        elif line and not line.startswith("= "):
            for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "unk")):
                line = line.replace(mark, plain)
            found[-1] += data.split_sentences(line)
    return [article for article in found if article]

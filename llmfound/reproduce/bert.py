"""Tables of Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"."""

import pathlib

import keras
import numpy as np
from keras import ops

from llmfound import data, models, plots, training
from llmfound.ops import padding_mask
from llmfound.reproduce.figure import Figure

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


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
            seeds=2, corpus="made up", layers=2, hidden_dim=32, max_length=16, batch_size=32, steps=100, rate=3e-3,
            tasks=("tags",), tuning_steps=250, tuning_rate=5e-3,
        ),
        "small": dict(
            seeds=3, corpus="wikitext2", vocabulary=6000, layers=3, hidden_dim=128, max_length=64, batch_size=32,
            steps=400, rate=1e-3, tasks=("wnut17", "sst2"), tuning_steps=500, tuning_rate=1e-3,
        ),
        "full": dict(
            seeds=3, corpus="pretraining/*.txt", vocabulary=30_000, layers=12, hidden_dim=768, max_length=512,
            batch_size=256, steps=1_000_000, rate=1e-4, tasks=("wnut17", "sst2"), tuning_steps=6300, tuning_rate=5e-5,
        ),
    }  # fmt: skip
    shrunk = {
        "tiny": "2 layers 32 wide on made-up words, each tagged with the kind of the next one.",
        "small": "3 layers 128 wide, 400 steps on WikiText-2 without next sentences; names in WNUT-17 (F1) and "
        "sentiment in SST-2 (accuracy, from the mean of all tokens' vectors) after 500 steps of fine-tuning.",
        "full": "BERT-base and the paper's million steps, without next sentences, on texts of yours in the folder "
        "pretraining; WNUT-17 and SST-2 instead of the paper's five tasks.",
    }

    def runs(self, settings):
        return [{"objective": "masked"}, {"objective": "left to right"}]

    def prepare(self, settings, sets, folder):
        if settings["corpus"] == "made up":
            return _MadeUp(400, seed=0)
        return _Published(settings, sets)

    def measure(self, run, settings, seed, prepared):
        s, causal = settings, run["objective"] == "left to right"
        bert = models.BERT(
            prepared.tokenizer.vocab_size, s["layers"], s["hidden_dim"], num_heads=max(s["hidden_dim"] // 64, 2),
            intermediate_dim=4 * s["hidden_dim"], max_length=max(s["max_length"], 128), causal=causal,
        )  # fmt: skip
        batches = data.PretrainingBatches(
            prepared.documents, prepared.tokenizer, s["batch_size"], s["max_length"], next_sentence=False, seed=seed,
            objective="left_to_right" if causal else "masked",
        )  # fmt: skip
        model = models.BERTPretraining(bert, next_sentence=False)
        _compile(model, s["rate"], s["steps"], {"masked_lm": training.SmoothedCrossEntropy(0.0)})
        losses = _steps(model, batches, s["steps"])
        numbers = {"first loss": np.mean(losses[:3]), "last loss": np.mean(losses[-len(losses) // 10 :])}
        pretrained = bert.get_weights()
        for task in s["tasks"]:
            train, head, score = prepared.task(task, s, seed)
            bert.set_weights(pretrained)
            tuned = head(bert)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
            _compile(tuned, s["tuning_rate"], s["tuning_steps"], loss)
            _steps(tuned, train, s["tuning_steps"])
            numbers[task] = 100 * score(lambda batches, tuned=tuned: tuned.predict(batches, verbose=0))
        return numbers

    def verdicts(self, results):
        found = []
        for task in results.settings["tasks"]:
            ahead = results.mean(task, objective="masked") - results.mean(task, objective="left to right")
            found.append((f"{task}: masked words are ahead of left-to-right ({ahead:+.1f} points)", ahead > 0))
        return found

    def draw(self, results, path):
        tasks = results.settings["tasks"]
        groups = {run["objective"]: [results.interval(task, **run) for task in tasks] for run in results.runs}
        plots.bars(groups, tasks, "score, %", self.title, path)

    def cost(self, settings):
        s = settings
        weights = 12 * s["layers"] * s["hidden_dim"] ** 2
        return 2 * 6 * weights * s["steps"] * s["batch_size"] * s["max_length"]


def _compile(model, rate, steps, loss):
    schedule = training.LinearWarmupDecay(rate, steps // 10, steps)
    model.compile(
        training.AdamW(schedule, weight_decay=0.01, exclude=["bias", "gamma", "beta"], global_clipnorm=1.0), loss
    )


def _steps(model, batches, count):
    losses = []
    for i in range(count):
        if i % len(batches) == 0:
            batches.epoch = i // len(batches)
        x, y = batches[i % len(batches)][:2]
        losses.append(float(model.train_on_batch(x, y)))
    return losses


class _MadeUp:
    """Rows of made-up words of four kinds, each tagged with the kind of the next, which half the time can be told."""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        words = [f"{kind}{i}" for kind in "abcd" for i in range(10)]
        self.tokenizer = data.WordPiece.from_vocabulary([*SPECIAL, *words])
        self.rows, self.tags = [], []
        for _ in range(2 * count):
            kinds = [rng.integers(4)]
            while len(kinds) < 13:
                kinds.append((kinds[-1] + 1) % 4 if rng.random() < 0.5 else rng.integers(4))
            self.rows.append([f"{'abcd'[kind]}{rng.integers(10)}" for kind in kinds[:-1]])
            self.tags.append([f"B-{'abcd'[kind]}" for kind in kinds[1:-1]] + ["O"])
        self.documents = data.Documents.encode([[" ".join(row)] for row in self.rows[:count]], self.tokenizer)
        self.count = count

    def task(self, name, settings, seed):
        n, shape = self.count, dict(batch_size=settings["batch_size"], max_length=settings["max_length"])
        train = data.TaggingBatches(self.rows[:n], self.tags[:n], self.tokenizer, seed=seed, **shape)
        test = data.TaggingBatches(self.rows[n:], None, self.tokenizer, train.classes, shuffle=False, **shape)

        def score(predict):
            found = [tag for row in test.words(predict(test)) for tag in row]
            return training.accuracy([tag for row in self.tags[n:] for tag in row], found)

        return train, lambda bert: models.BERTTokenClassifier(bert, train.num_classes), score


class _Published:
    """A corpus, and tasks of the public sets."""

    def __init__(self, settings, sets):
        self.sets = sets
        if settings["corpus"] == "wikitext2":
            documents = _articles(data.wikitext2("train", sets))
        else:
            files = sorted(pathlib.Path(sets or ".").glob(settings["corpus"]))
            if not files:
                raise FileNotFoundError(
                    f"There is no file {settings['corpus']} in {sets or 'the current folder'}: put texts there, one "
                    "sentence a line and blank lines between documents, or name another --data."
                )
            documents = [document for file in files for document in data.read_documents(file)]
        sentences = [sentence for document in documents for sentence in document]
        self.tokenizer = data.WordPiece.train(sentences, settings["vocabulary"], lowercase=False)  # names have capitals
        self.documents = data.Documents.encode(documents, self.tokenizer)

    def task(self, name, settings, seed):
        shape = dict(batch_size=settings["batch_size"], max_length=min(settings["max_length"], 128))
        if name == "wnut17":
            words, tags = data.wnut17("train", self.sets)
            classes = ["O", *sorted({tag for row in tags for tag in row} - {"O"})]
            train = data.TaggingBatches(words, tags, self.tokenizer, classes, split_long=True, seed=seed, **shape)
            words, tags = data.wnut17("test", self.sets)
            test = data.TaggingBatches(words, tags, self.tokenizer, classes, split_long=True, shuffle=False, **shape)
            score = lambda predict: training.entity_scores(tags, test.words(predict(test)))["f1"]  # noqa: E731
            return train, lambda bert: models.BERTTokenClassifier(bert, train.num_classes), score
        train = data.SentenceBatches(*data.sst2("train", self.sets), self.tokenizer, seed=seed, **shape)
        test = data.SentenceBatches(*data.sst2("dev", self.sets), self.tokenizer, 2, shuffle=False, **shape)
        score = lambda predict: training.accuracy(test.labels, predict(test).argmax(-1))  # noqa: E731
        return train, lambda bert: _OfTheMean(bert, 2), score


class _OfTheMean(models.BERTClassifier):
    """Reads the mean of all tokens: the first one, [CLS], knows nothing of a text that is read left to right."""

    def call(self, inputs, training=None):
        real = ops.cast(padding_mask(inputs["token_ids"], self.encoder.pad_id), "float32")[..., None]
        mean = ops.sum(real * self.encode(inputs, training), axis=1) / ops.sum(real, axis=1)
        return self.classes(self.dropout(mean, training=training))


def _articles(lines):
    """WikiText's articles as lists of sentences, without headings and the marks of its tokenizer."""
    found = [[]]
    for line in lines:
        if line.startswith("= ") and not line.startswith("= ="):
            found.append([])
        elif line and not line.startswith("= "):
            found[-1] += data.split_sentences(line.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", "."))
    return [article for article in found if article]

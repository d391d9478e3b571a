"""Tables and a figure of Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification"."""

import json
import pathlib
import shutil

import keras
import numpy as np

from llmfound import data, models, plots, training
from llmfound.reproduce.figure import Figure

BETAS = dict(beta_1=0.7, beta_2=0.99)
DROPOUTS = dict(input_dropout=0.4, hidden_dropout=0.3, output_dropout=0.4, embedding_dropout=0.05, weight_dropout=0.5)
NONE = dict(decay=1.0, slanted=False, gradual=False)
ROWS = {  # name: whether the language model is pre-trained, and what of the training is taken away
    "from scratch": (False, NONE),
    "last": (True, {**NONE, "decay": [0.0, 0.0, 0.0, 0.0, 1.0]}),
    "full": (True, NONE),
    "full + discr + stlr": (True, dict(gradual=False)),
    "freez + discr + stlr": (True, {}),
}
SCRATCH, LAST, FULL, _, ALL = ROWS
LANGUAGE_MODELS = {
    "tiny": dict(
        task="made up", corpus="made up", words=40_000, vocabulary=1000, embedding_dim=32, hidden_dim=48, dropout=0.1,
        rows=32, window=26, epochs=2, rate=0.03, task_epochs=1, task_rate=0.004, task_decay=2.6,
    ),
    "small": dict(
        task="ag_news", corpus="wikitext2", words=600_000, vocabulary=6000, embedding_dim=100, hidden_dim=200,
        dropout=0.2, rows=20, window=35, epochs=1, rate=0.005, task_epochs=3, task_rate=0.004, task_decay=1.0,
    ),
    "full": dict(
        task="trec", corpus="wikitext-103/wiki.train.tokens", words=103_000_000, vocabulary=60_000, embedding_dim=400,
        hidden_dim=1150, dropout=1.0, rows=64, window=70, epochs=10, rate=0.004, task_epochs=15, task_rate=0.004,
        task_decay=2.6,
    ),
}  # fmt: skip
SMALL = (
    "an AWD-LSTM of 100 and 200 that read 600,000 words of WikiText-2 once, and 6,600 articles of AG News three times, "
    "with one rate for all layers, the same language model for all seeds; labels are drawn from these articles, and "
    "errors are those on 1,000 others."
)
STARTS = {"from scratch": SCRATCH, "pre-trained": ALL}
LENGTH, QUESTIONS = 14, 5452  # words of a question of TREC, and how many are for training


class _FineTuned(Figure):
    """What the figures share: the language model of the task's texts, and the classifier that is made of it."""

    def prepare(self, settings, sets, folder):
        s = settings["language_model"]
        task = _task(s["task"], sets)
        name = folder.name.replace(self.name, "ulmfit-language-model")
        folder = folder.with_name(f"{name}-{keras.backend.backend()}")
        if not folder.exists():
            unfinished = folder.with_name(folder.name + ".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            lm, words = _language_model(s, task, sets)
            lm.save(unfinished / "model.keras")
            words.save(unfinished / "words.json")
            (unfinished / "settings.json").write_text(json.dumps(s))
            unfinished.rename(folder)
        if json.loads((folder / "settings.json").read_text()) != s:
            raise ValueError(f"{folder} has a language model of other settings; remove it, or choose another folder.")
        return task, data.WordTokenizer.load(folder / "words.json"), folder / "model.keras"

    def classify(self, row, labels, rates, settings, seed, prepared):
        """Error on the test part, %, and the one of the rates with which 500 texts that are left over err least."""
        s, (task, words, file) = settings, prepared
        (texts, classes), (_, technique) = task["train"], ROWS[row]
        order = np.random.default_rng(seed).permutation(len(texts))
        tuning, left = (
            ([texts[i] for i in part], [classes[i] for i in part])
            for part in (order[:labels], order[labels : labels + 500])
        )
        count = max(classes) + 1
        train = data.ClassificationBatches(*tuning, words, count, s["batch_size"], seed=seed)
        parts = [data.ClassificationBatches(*part, words, count, 100, shuffle=False) for part in (left, task["test"])]
        found = []
        for rate in rates:
            keras.utils.set_random_seed(seed)
            lm = keras.models.load_model(file) if ROWS[row][0] else _new(words, s["language_model"])
            classifier = models.ULMFiTClassifier(lm, count)
            _tune(classifier, train, rate, s["epochs"], **technique)
            errors = [100 * classifier.evaluate(part, verbose=0, return_dict=True)["error_rate"] for part in parts]
            found.append((*errors, rate))
        return min(found, key=lambda errors: errors[0])[1:]

    def cost_of(self, settings, questions):
        """Operations of the language model, and of classifiers that train on so many questions once an epoch."""
        s, task_words = settings["language_model"], QUESTIONS * LENGTH
        e, h = s["embedding_dim"], s["hidden_dim"]
        lstms = 4 * h * (e + h) + 4 * h * (h + h) + 4 * e * (h + e)
        general = (lstms + e * s["vocabulary"]) * s["words"] * s["epochs"]
        task = (lstms + e * min(s["vocabulary"], 3500)) * task_words * s["task_epochs"]
        return 6 * (general + task + lstms * LENGTH * questions * settings["epochs"])


class Ablation(_FineTuned):
    name = "ulmfit-ablation"
    title = "ULMFiT: what pre-training and the ways to fine-tune are worth"
    source = "Howard and Ruder 2018, section 5 and tables 4, 6 and 7"
    claim = (
        "A pre-trained language model makes a better classifier than the same network from scratch. Discriminative and "
        "slanted triangular rates with gradual unfreezing are the best way to fine-tune it, and better than training "
        "all layers plainly; training the last layers alone is the worst."
    )
    scales = {
        "tiny": dict(
            seeds=2, language_model=LANGUAGE_MODELS["tiny"], rows=(SCRATCH, ALL), labels=24, batch_size=8, epochs=10,
            rates=(0.01,),
        ),
        "small": dict(
            seeds=2, language_model=LANGUAGE_MODELS["small"], rows=tuple(ROWS), labels=200, batch_size=16, epochs=20,
            rates=(0.01,), full_rates=(0.003,),
        ),
        "full": dict(
            seeds=5, language_model=LANGUAGE_MODELS["full"], rows=tuple(ROWS), labels=4900, batch_size=64, epochs=50,
            rates=(0.01, 0.003),
        ),
    }  # fmt: skip
    shrunk = {
        "tiny": "an AWD-LSTM of 32 and 48 on made-up words of four topics; 24 labels.",
        "small": f'{SMALL} 200 labels, 20 epochs at the rate of 0.01, and "full" at 0.003, with which it had erred '
        "less on the same 1,000 articles in a trial.",
        "full": "the paper's sizes, with WikiText-103 (wikitext-103/wiki.train.tokens in the folder of the sets) read "
        "ten times, which the paper does not tell; one direction; errors on TREC-6's test questions instead of "
        "held-out ones; for each run the better one of two rates.",
    }

    def runs(self, settings):
        return [{"row": row} for row in settings["rows"]]

    def measure(self, run, settings, seed, prepared):
        rates = settings["rates"] if run["row"] != FULL else settings.get("full_rates", settings["rates"])
        error, rate = self.classify(run["row"], settings["labels"], rates, settings, seed, prepared)
        return {"error, %": error, "chosen": {"rate": rate}}

    def verdicts(self, results):
        error = {row: results.mean("error, %", row=row) for row in results.settings["rows"]}
        ahead = error[SCRATCH] - error[ALL]
        found = [
            (f"Pre-training and all three techniques err less than from scratch ({ahead:+.1f} points, more than 5)",
             ahead - 5)
        ]  # fmt: skip
        if LAST in error:
            others = max(error[row] for row in error if row not in (SCRATCH, LAST))
            found.append(
                (f'"last" is the worst way to fine-tune: {error[LAST]:.1f} %, and the next worst {others:.1f} %',
                 error[LAST] - others)
            )  # fmt: skip
        if FULL in error:
            ahead = error[FULL] - error[ALL]
            found.append((f'With all three techniques it errs less than plain "full" ({ahead:+.1f} points)', ahead))
        return found

    def draw(self, results, path):
        rows = results.settings["rows"]
        errors = [results.interval("error, %", row=row) for row in rows]
        labels = [row.replace(" + ", "\n+ ") for row in rows]
        plots.bars({"error": errors}, labels, "error, %", self.title, path, within=(0, 100))

    def cost(self, settings):
        return self.cost_of(settings, len(settings["rows"]) * len(settings["rates"]) * settings["labels"])


class LowShot(_FineTuned):
    name = "ulmfit-lowshot"
    title = "ULMFiT with few labels"
    source = "Howard and Ruder 2018, section 5 and figure 3"
    claim = (
        "With pre-training a classifier needs far fewer labels: 100 match training from scratch with 10 or 20 times "
        "as many on IMDb and AG News, or 50 and 100 times where the other texts are read without labels; on TREC-6 "
        "pre-training is ahead, too."
    )
    scales = {
        "tiny": dict(
            seeds=2, language_model=LANGUAGE_MODELS["tiny"], counts=(16, 48), reference=16, batch_size=8, epochs=10,
            rate=0.01,
        ),
        "small": dict(
            seeds=2, language_model=LANGUAGE_MODELS["small"], counts=(100, 200, 400), reference=100, batch_size=16,
            epochs=20, rate=0.01,
        ),
        "full": dict(
            seeds=5, language_model=LANGUAGE_MODELS["full"], counts=(100, 200, 500, 1000, 2000, 4900),
            reference=100, batch_size=64, epochs=50, rate=0.01,
        ),
    }  # fmt: skip
    shrunk = {
        "tiny": "an AWD-LSTM of 32 and 48 on made-up words of four topics.",
        "small": f"{SMALL} 20 epochs.",
        "full": "the paper's sizes, with WikiText-103 (wikitext-103/wiki.train.tokens in the folder of the sets) read "
        "ten times, which the paper does not tell; one direction; TREC-6 alone, errors on its test questions.",
    }

    def runs(self, settings):
        return [{"start": start, "labels": n} for n in settings["counts"] for start in STARTS]

    def measure(self, run, settings, seed, prepared):
        row, labels = STARTS[run["start"]], run["labels"]
        return {"error, %": self.classify(row, labels, [settings["rate"]], settings, seed, prepared)[0]}

    def verdicts(self, results):
        counts, reference = results.settings["counts"], results.settings["reference"]
        errors = {
            start: np.array([results.mean("error, %", start=start, labels=n) for n in counts]) for start in STARTS
        }
        ahead = errors["from scratch"] - errors["pre-trained"]
        match = labels_to_reach(errors["pre-trained"][counts.index(reference)], counts, errors["from scratch"])
        more = "more than " * bool(np.isclose(match, counts[-1]))
        return [
            (f"Pre-training errs less at every number of labels (by {ahead.min():.1f} to {ahead.max():.1f} points)",
             ahead.min()),
            (f"{reference} labels match {more}{match:.0f} from scratch, {match / reference:.1f} times as many (more "
             "than twice; the paper has 10 times and more on larger sets)", match - 2 * reference),
        ]  # fmt: skip

    def draw(self, results, path):
        counts = results.settings["counts"]
        series = {
            start: (counts, *zip(*(results.interval("error, %", start=start, labels=n) for n in counts)))
            for start in STARTS
        }
        plots.lines([plots.Panel("", "labels", "error, %", series, log="x")], self.title, path, within=(0, 100))

    def cost(self, settings):
        return self.cost_of(settings, 2 * sum(settings["counts"]))


def labels_to_reach(error, counts, errors):
    """The number of labels at which a curve comes down to an error, straight between points over log labels; float.

    The first or last number for an error above or below the curve.
    """
    falling = np.minimum.accumulate(errors)
    return float(np.exp(np.interp(-error, -falling, np.log(counts))))


def _task(name, sets):
    """Texts and classes to train on and to test with: dict, part -> (list of str, list of int)."""
    if name == "made up":
        return _made_up(seed=0)
    if name == "trec":
        return {part: data.trec(part, sets) for part in ("train", "test")}
    texts, labels = data.ag_news("test", sets)
    order = np.random.default_rng(0).permutation(len(texts))
    return {part: ([texts[i] for i in some], [labels[i] for i in some])
            for part, some in (("test", order[:1000]), ("train", order[1000:]))}  # fmt: skip


def _language_model(settings, task, sets):
    """Stages 1 and 2: the language model of the task's texts, and its words."""
    s = settings
    if s["corpus"] == "made up":
        lines = task["general"]
    elif s["corpus"] == "wikitext2":
        lines = [line for line in data.wikitext2("train", sets) if line]
    else:
        lines = [line.strip() for line in data.read_lines(pathlib.Path(sets or ".", s["corpus"])) if line.strip()]
    general = data.WordTokenizer.train(lines, s["vocabulary"])
    lm = _new(general, s)
    _read(lm, data.stream(lines, general)[: s["words"]], s["rate"], s["epochs"], s)
    keras.utils.set_random_seed(0)
    words = data.WordTokenizer.train(task["train"][0], s["vocabulary"])
    lm = lm.with_vocabulary(general, words)
    _read(lm, data.stream(task["train"][0], words), s["task_rate"], s["task_epochs"], s, lm.layer_groups())
    return lm, words


def _new(words, settings):
    sizes = {name: settings[name] for name in ("embedding_dim", "hidden_dim")}
    rates = {name: rate * settings["dropout"] for name, rate in DROPOUTS.items()}
    return models.ULMFiT(words.vocab_size, **sizes, **rates)


def _read(lm, ids, rate, epochs, settings, groups=None):
    batches = data.LanguageModelBatches(ids, settings["rows"], settings["window"])
    make, more = training.Adam, {}
    if groups:
        make, more = training.DiscriminativeAdam, dict(groups=groups, decay=settings["task_decay"])
    schedule = training.SlantedTriangular(rate, epochs * len(batches))
    lm.compile(make(schedule, global_clipnorm=0.3, **BETAS, **more), training.SmoothedCrossEntropy(0.0))
    progress = training.Progress(batches, every=60)
    for epoch in range(epochs):  # each has windows of its own, and another number of them
        lm.fit(batches, initial_epoch=epoch, epochs=epoch + 1, verbose=0, callbacks=[progress])


def _tune(classifier, batches, rate, epochs, decay=2.6, slanted=True, gradual=True):
    """Stage 3: discriminative and slanted triangular rates, and gradual unfreezing, or without some of them."""
    groups, steps = classifier.layer_groups(), epochs * len(batches)
    if gradual:
        steps = training.unfreezing_stages(len(groups), epochs, len(batches))
    classifier.compile(
        training.DiscriminativeAdam(
            training.SlantedTriangular(rate, steps) if slanted else rate, groups, decay, global_clipnorm=25.0, **BETAS
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[training.ErrorRate()],
    )
    callbacks = [training.GradualUnfreezing(verbose=False)] * gradual
    classifier.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)


def _made_up(seed, topics=4, kinds=40):
    """Words of four topics, which are the classes: long texts to read, short ones to classify."""
    rng = np.random.default_rng(seed)

    def part(count, length):
        labels = rng.integers(topics, size=count)
        texts = [" ".join(f"{'abcd'[topic]}{i}" for i in rng.integers(kinds, size=length)) for topic in labels]
        return texts, labels.tolist()

    return {"general": part(2400, 16)[0], "train": part(600, 4), "test": part(300, 4)}

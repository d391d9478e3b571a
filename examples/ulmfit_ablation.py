"""What each technique of ULMFiT is worth: the paper's tables 4, 6 and 7 at a small scale, over several seeds.

    python examples/ulmfit_ablation.py                          # who wrote it? on books in the repository
    python examples/ulmfit_ablation.py --task trec --general wikitext2 --data FOLDER --few 100 500

For each row and number of labels, the learning rate is that of --rates with which a run of seed 3 errs least on
labelled texts of the training part that nothing trained on; then come --seeds runs, each with other texts, other first
weights and another language model of the task. The table has the mean of their errors on the test part, and how far it
is below that of "full" with the same texts, each with its 95 % interval, or with both values if there are two. Stage 1
is run once. Runs that are in FOLDER/runs.jsonl already are not repeated, so an interrupted table goes on when started
again. The table is left in FOLDER/table.md.
"""

import copy
import itertools
import json
import pathlib

import ulmfit
from ulmfit import data, keras, language_model, llmfound, models, np, shared

from llmfound.reproduce.figure import cell

shared.interrupted = shared.GOES_ON
CHOOSING = 3  # seed of the runs by which rates are chosen
NONE = dict(decay=1.0, slanted=False, gradual=False)
ROWS = {  # name: the language model it begins with, and how the classifier is trained
    "from scratch": ("none", NONE),
    "from scratch + discr + stlr + freez": ("none", {}),
    "full": ("task", NONE),
    "full + discr": ("task", {**NONE, "decay": 2.6}),
    "full + discr + stlr": ("task", dict(gradual=False)),
    "last": ("task", {**NONE, "decay": [0.0, 0.0, 0.0, 0.0, 1.0]}),
    "freez": ("task", {**NONE, "gradual": True}),
    "freez + discr": ("task", dict(slanted=False)),
    "freez + stlr": ("task", dict(decay=1.0)),
    "freez + discr + stlr": ("task", {}),
    "freez + discr + stlr, no stage 2": ("general", {}),
}


def start(folder, options):
    """Stage 1's model and words, from an earlier run or made here."""
    if options.general not in ulmfit.GENERAL:
        print(f"stage 1 is taken from {options.general}")
        folder = pathlib.Path(options.general)
    elif not (folder / "words.json").exists():
        texts = ulmfit.general_texts(options.general, options.data)[: options.general_texts]
        words = data.WordTokenizer.train(texts, options.vocabulary)
        held_out, lm = max(len(texts) // 50, 1), language_model(words.vocab_size, options)
        ulmfit.fit_language_model(lm, texts[held_out:], words, options.general_rate, options.general_epochs, options,
                                  valid=texts[:held_out])  # fmt: skip
        ulmfit.save(lm, words, folder)
    return ulmfit.load_general(folder, options)


class Runs:
    """The errors of all runs, each made once."""

    def __init__(self, options):
        self.options = options
        self.parts, options.classes = ulmfit.task_texts(options.task, options.data)
        self.texts, self.labels = self.parts["train"]
        self.file = options.folder / "runs.jsonl"
        self.found = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            *key, error = json.loads(line)
            self.found[tuple(key)] = error
        self.general = start(options.folder / "general", options)
        every = [*self.texts, *self.parts["more"]][: options.task_texts]
        self.every = every
        self.words = data.WordTokenizer.train(every, options.vocabulary)

    def language_model(self, kind, seed):
        keras.utils.set_random_seed(seed)
        general, general_words = self.general
        if kind == "none":
            return language_model(self.words.vocab_size, self.options)
        lm = general.with_vocabulary(general_words, self.words)
        folder = self.options.folder / f"task-{seed}"
        if kind == "task" and not (folder / "words.json").exists():
            options = copy.copy(self.options)
            options.seed = seed
            ulmfit.fit_language_model(lm, self.every, self.words, 0.004, options.task_epochs, options,
                                      lm.layer_groups(), self.parts["test"][0][:1000])  # fmt: skip
            ulmfit.save(lm, self.words, folder)
        return keras.models.load_model(folder / "model.keras") if kind == "task" else lm

    def error(self, row, count, seed, rate, part):
        """The share of wrong classes of one run, on the "test" part or on texts that are left of the others."""
        key = (row, count, seed, rate, part)
        if key not in self.found:
            print(f"\n{row}, {count} labels, seed {seed}, rate {rate}", flush=True)
            kind, technique = ROWS[row]
            options = copy.copy(self.options)
            options.seed, options.rate = seed, rate
            order = np.random.default_rng(seed).permutation(len(self.texts))
            chosen, rest = order[:count], order[count : count + self.options.held_out]
            classifier = models.ULMFiTClassifier(self.language_model(kind, seed), len(options.classes))
            texts, labels = ([x[i] for i in chosen] for x in (self.texts, self.labels))
            ulmfit.fit_classifier(classifier, texts, labels, self.words, options, **technique)
            held_out = self.parts["test"]
            if part != "test":
                held_out = [self.texts[i] for i in rest], [self.labels[i] for i in rest]
            batches = data.ClassificationBatches(
                *held_out, self.words, len(options.classes), 32, max_length=options.max_length, shuffle=False
            )
            self.found[key] = float(classifier.evaluate(batches, verbose=0)[1])
            with open(self.file, "a") as file:
                file.write(json.dumps([*key, self.found[key]]) + "\n")
            keras.backend.clear_session()
            print(f"error {self.found[key]:.2%}", flush=True)
        return self.found[key]

    def rate(self, row, count):
        rates = self.options.rates
        if len(rates) == 1:
            return rates[0]
        return min(rates, key=lambda rate: self.error(row, count, CHOOSING, rate, "held out"))


def main(options):
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{llmfound.kernels.fast_matmul()} matrix products")
    runs = Runs(options)
    columns = [f"{count:,} labels | below full | rate" for count in options.few]
    lines = [f"| error, % | {' | '.join(columns)} |", "|---" + "|--:" * 3 * len(columns) + "|"]
    errors, rates = {}, {}
    for count, row in itertools.product(options.few, options.rows):
        rates[row, count] = rate = runs.rate(row, count)
        errors[row, count] = np.array([100 * runs.error(row, count, i, rate, "test") for i in range(options.seeds)])
    for row in options.rows:
        line = row
        for count in options.few:
            full, found = errors.get(("full", count)), errors[row, count]
            below = "" if full is None or row == "full" else cell(full - found)
            line += f" | {cell(found)} | {below} | {rates[row, count]:g}"
        lines.append(f"| {line} |")
    table = "\n".join(lines)
    print(f"\n{table}")
    (options.folder / "table.md").write_text(table + "\n")


if __name__ == "__main__":
    parser = ulmfit.parser(__doc__)
    parser.add_argument("--few", type=int, nargs="+", default=[100, 500], help="numbers of labels")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="some of the rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.003, 0.001])
    parser.add_argument("--held-out", type=int, default=500, help="labelled texts by which the rate is chosen")
    parser.set_defaults(folder=pathlib.Path("runs/ulmfit-ablation"), epochs=20, class_batch_size=32)
    main(parser.parse_args())

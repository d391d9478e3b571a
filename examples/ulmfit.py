"""ULMFiT: a language model of general text, fine-tuned to the texts of a task, becomes a classifier.

    python examples/ulmfit.py                                            # who wrote it? on books in the repository
    KERAS_BACKEND=torch python examples/ulmfit.py --task trec --general wikitext2 --data FOLDER
    python examples/ulmfit.py --task imdb --general wikitext2 --data FOLDER --labels 500
    python examples/ulmfit.py --general runs/ulmfit/general              # stage 1 taken from an earlier run

The general language model, that of the task, the classifier and what it scores are left in runs/ulmfit, or --folder.
"""

import argparse
import json
import os
import pathlib

import shared

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import llmfound
from llmfound import data, models, training

HERE = pathlib.Path(__file__).parent
shared.interrupted = "The stages that were finished are kept; --general FOLDER/general takes the first of them."
DROPOUTS = dict(input_dropout=0.4, hidden_dropout=0.3, output_dropout=0.4, embedding_dropout=0.05, weight_dropout=0.5)
SMALL = dict(embedding_dim=200, hidden_dim=400)
PAPER = dict(embedding_dim=400, hidden_dim=1150)
BETAS = dict(beta_1=0.7, beta_2=0.99)  # Howard and Ruder 2018, section 4.1
WRITERS = ("Carroll", "Doyle", "Austen")
GENERAL = "tatoeba", "wikitext2"  # texts for stage 1


def general_texts(name, folder):
    """Texts for stage 1, without classes."""
    print(f"general text: {name}")
    if name == "wikitext2":
        return [line for line in data.wikitext2("train", folder) if line]
    return [english for english, _ in data.read_pairs(HERE / "data" / "eng-fra.train.tsv.xz")]


def task_texts(name, folder):
    """{"train": (texts, labels), "test": (texts, labels), "more": texts without classes}, and the classes."""
    if name == "trec":
        return {part: data.trec(part, folder) for part in ("train", "test")} | {"more": []}, data.TREC_CLASSES
    if name == "imdb":
        found = {part: data.imdb(part, folder) for part in ("train", "test")}
        return found | {"more": data.imdb("unsup", folder)[0]}, data.IMDB_CLASSES
    chapters = "\n".join(data.read_lines(HERE / "data" / "prose.en.txt.xz")).split("\n\n")
    writers = [0] * 12 + [1] * 12 + [2] * (len(chapters) - 24)
    found = {"train": ([], []), "test": ([], []), "more": []}
    for i, (chapter, writer) in enumerate(zip(chapters, writers)):
        texts, labels = found["test" if i % 6 == 5 else "train"]  # no chapter is in both
        paragraphs = [text for text in chapter.split("\n") if len(text.split()) >= 10]
        texts += paragraphs
        labels += [writer] * len(paragraphs)
    return found, WRITERS


def language_model(vocab_size, options):
    sizes = PAPER if options.paper else SMALL
    return models.ULMFiT(vocab_size, **sizes, **rates(0.3 if options.dropout is None else options.dropout))


def rates(factor):
    """The paper's dropouts, times a factor."""
    return {name: rate * factor for name, rate in DROPOUTS.items()}


def load_general(folder, options):
    """The model and the words of an earlier stage 1, with its own dropouts or those of --dropout."""
    lm = keras.models.load_model(pathlib.Path(folder, "model.keras"))
    if options.dropout is not None:
        found = models.ULMFiT.from_config({**lm.get_config(), **rates(options.dropout)})
        found.set_weights(lm.get_weights())
        lm = found
    return lm, data.WordTokenizer.load(pathlib.Path(folder, "words.json"))


def fit_language_model(model, texts, tokenizer, rate, epochs, options, groups=None, valid=()):
    """Stages 1 and 2: slanted triangular rates; with groups, discriminative ones."""
    batches = data.LanguageModelBatches(data.stream(texts, tokenizer), options.batch_size, seed=options.seed)
    print(batches)
    schedule = training.SlantedTriangular(rate, epochs * len(batches))
    make = training.DiscriminativeAdam if groups else training.Adam
    optimizer = make(schedule, global_clipnorm=0.3, **BETAS, **(dict(groups=groups) if groups else {}))
    model.compile(optimizer, training.SmoothedCrossEntropy(0.0), metrics=[training.Perplexity()])
    held_out = data.LanguageModelBatches(data.stream(valid, tokenizer), options.batch_size, variable=False)
    progress = training.Progress(batches.tokens_per_epoch / len(batches))
    history = model.fit(batches, validation_data=held_out, epochs=epochs, verbose=0, callbacks=[progress])
    return history.history["val_perplexity"]


def fit_classifier(classifier, texts, labels, tokenizer, options, decay=2.6, slanted=True, gradual=True):
    """Stage 3: discriminative and slanted triangular rates, and gradual unfreezing, inside one fit.

    The last three arguments take one of them away: decay=1.0, or a list of a ratio for each group of layers.
    """
    batches = data.ClassificationBatches(
        texts, labels, tokenizer, len(options.classes), options.class_batch_size, options.max_length, seed=options.seed
    )
    groups = classifier.layer_groups()
    steps = options.epochs * len(batches)
    if gradual:
        steps = training.unfreezing_stages(len(groups), options.epochs, len(batches), options.epochs_per_group)
    rate = training.SlantedTriangular(options.rate, steps) if slanted else options.rate
    classifier.compile(
        training.DiscriminativeAdam(rate, groups, decay, global_clipnorm=25.0, **BETAS),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[training.ErrorRate()],
    )
    classifier.fit(
        batches, epochs=options.epochs, shuffle=False, verbose=0,
        callbacks=[*[training.GradualUnfreezing(options.epochs_per_group)] * gradual, training.Progress()],
    )  # fmt: skip


def main(options):
    keras.utils.set_random_seed(options.seed)
    print(f"{llmfound.kernels.fast_matmul()} matrix products")
    parts, options.classes = task_texts(options.task, options.data)
    options.folder.mkdir(parents=True, exist_ok=True)
    result = {"task": options.task}

    print("\nStage 1, a language model of general text")
    if options.general not in GENERAL:
        print(f"taken from {options.general}")
        if options.paper:
            raise SystemExit("--paper is for a stage 1 that is trained here; the model of --general has its own sizes.")
        lm, general = load_general(options.general, options)
    else:
        texts = general_texts(options.general, options.data)[: options.general_texts]
        general = data.WordTokenizer.train(texts, options.vocabulary)
        held_out = max(len(texts) // 50, 1)
        lm = language_model(general.vocab_size, options)
        print(f"{lm.count_params():,} parameters, {general.vocab_size:,} words")
        result["general perplexity"] = fit_language_model(
            lm, texts[held_out:], general, options.general_rate, options.general_epochs, options, valid=texts[:held_out]
        )
        save(lm, general, options.folder / "general")

    print("\nStage 2, the language model of the task's texts")
    (texts, labels), held_out = parts["train"], parts["test"]
    every = [*texts, *parts["more"]][: options.task_texts]
    tokenizer = data.WordTokenizer.train(every, options.vocabulary)
    lm = lm.with_vocabulary(general, tokenizer)
    result["task perplexity"] = fit_language_model(
        lm, every, tokenizer, 0.004, options.task_epochs, options, lm.layer_groups(), held_out[0][: options.task_texts]
    )
    save(lm, tokenizer, options.folder / "task")

    print("\nStage 3, the classifier")
    chosen = np.random.default_rng(options.seed).permutation(len(texts))[: options.labels]
    classifier = models.ULMFiTClassifier(lm, len(options.classes))
    fit_classifier(classifier, [texts[i] for i in chosen], [labels[i] for i in chosen], tokenizer, options)
    save(classifier, tokenizer, options.folder / "classifier")
    test = data.ClassificationBatches(*held_out, tokenizer, batch_size=32, max_length=options.max_length)
    result["error"] = float(classifier.evaluate(test, verbose=0)[1])
    print(
        f"\n{len(chosen):,} labels; error on {len(held_out[0]):,} texts that no stage trained on: {result['error']:.2%}"
    )
    (options.folder / "result.json").write_text(json.dumps(result, indent=1))
    for i in range(0, len(held_out[0]), max(len(held_out[0]) // 5, 1)):
        ids = data.pad([tokenizer.encode(held_out[0][i])], tokenizer.pad_id)
        found = options.classes[int(classifier.predict_on_batch({"token_ids": ids}).argmax())]
        print(f"{found:8} (it is {options.classes[held_out[1][i]]}): {held_out[0][i][:80]}")


def save(model, tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    tokenizer.save(folder / "words.json")


def text_or_folder(name):
    """A value of --general."""
    if name not in GENERAL and not all(pathlib.Path(name, file).is_file() for file in ("model.keras", "words.json")):
        raise argparse.ArgumentTypeError(
            f"must be {', '.join(GENERAL)}, or a folder of an earlier stage 1, with model.keras and words.json; "
            f"got {name!r}"
        )
    return name


def parser(description=__doc__):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["writers", "trec", "imdb"], default="writers")
    parser.add_argument("--general", type=text_or_folder, default="tatoeba",
                        help="tatoeba, wikitext2, or a folder of an earlier stage 1")  # fmt: skip
    parser.add_argument("--data", help="folder of the public sets; else the environment variable LLMFOUND_DATA")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes, 400 and 1150, in place of 200 and 400")
    parser.add_argument("--vocabulary", type=int, default=20_000, help="most frequent words that are kept")
    parser.add_argument("--general-texts", type=int, help="use so many general texts only")
    parser.add_argument("--general-epochs", type=int, default=1)
    parser.add_argument("--general-rate", type=float, default=0.005)
    parser.add_argument("--dropout", type=float, help="what the paper's dropouts are multiplied by (default 0.3, or as "
                        "the model of --general has it)")  # fmt: skip
    parser.add_argument("--task-texts", type=int, help="use so many of the task's texts in stage 2; all by default")
    parser.add_argument("--task-epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64, help="rows of the language models")
    parser.add_argument("--labels", type=int, help="texts of stage 3; all by default")
    parser.add_argument("--epochs", type=int, default=10, help="of stage 3")
    parser.add_argument("--epochs-per-group", type=int, default=1, help="from one unfreezing to the next")
    parser.add_argument("--rate", type=float, default=0.01, help="greatest rate of the top layers in stage 3")
    parser.add_argument("--class-batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=400, help="words of a text that the classifier reads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/ulmfit"))
    return parser


if __name__ == "__main__":
    main(parser().parse_args())

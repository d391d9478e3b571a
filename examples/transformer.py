"""Trains a Transformer, Post-LN or Pre-LN, to translate between the sentences of two files, and scores it with BLEU.

    python examples/transformer.py --train train.en train.de --valid val.en val.de --test test.en test.de
    KERAS_BACKEND=torch python examples/transformer.py --norm post --folder runs/post-ln --train ...

A run that was stopped goes on where it was, if the command is given again. What it scored, a picture of what the heads
of its encoder look at, the model and its tokenizer are left in runs/transformer, or --folder; examples/translate.py
uses them, on any backend. The defaults are those of a small set, such as the 29,000 pairs of Multi30k: the sizes of the
"Transformer-Tiny" of Wu et al. 2021.
"""

import argparse
import json
import os
import pathlib

import shared

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

from llmfound import data, decoding, kernels, models, plots, training

shared.interrupted = shared.GOES_ON


def train(pairs, valid, tokenizer, options):
    keras.utils.set_random_seed(options.seed)
    how = dict(batch_tokens=options.batch_tokens, max_length=options.max_length, num_buckets=6, seed=options.seed)
    batches, valid = (data.TranslationBatches(part, tokenizer, **how) for part in (pairs, valid))
    print(batches)
    model = models.Transformer(
        tokenizer.vocab_size, options.layers, options.hidden_dim, options.heads, options.intermediate_dim,
        options.dropout, norm=options.norm,
    )  # fmt: skip
    steps = options.epochs * len(batches)
    print(f"{model.count_params():,} parameters, {steps:,} steps, {kernels.fast_matmul()} matrix products", flush=True)
    warmup = min(options.warmup, steps // 2)
    if warmup < options.warmup:
        print(f"the rate rises for {warmup:,} steps instead of {options.warmup:,}, half of all", flush=True)
    model.compile(
        training.Adam(training.LinearWarmupDecay(options.rate, warmup, steps), beta_2=0.98, epsilon=1e-9),
        training.SmoothedCrossEntropy(0.1),
        metrics=[training.Perplexity()],
    )
    checkpoints = training.Checkpoints(options.folder / "checkpoints", batches, steps=options.every, keep=2)
    callbacks = [checkpoints, training.Progress(batches, every=60.0)]
    model.fit(
        batches, epochs=options.epochs, validation_data=valid, shuffle=False, verbose=0, callbacks=callbacks
    )  # fmt: skip
    return model


def score(model, tokenizer, pairs, options):
    """Translates the test pairs greedily and with a beam: the two BLEU scores, and their signature."""
    sources, references = zip(*pairs)
    found = {}
    for beam in (1, options.beam):
        translations = decoding.translate(model, tokenizer, sources, beam_size=beam)
        bleu = training.bleu(translations, references, tokenize=options.tokenize)
        found[f"beam {beam}"] = round(float(bleu.score), 2)
        print(f"beam {beam}: {bleu}")
    for i in range(0, len(pairs), max(len(pairs) // 6, 1)):
        print(f"\nsource       {sources[i]}\nreference    {references[i]}\ntranslation  {translations[i]}")
    return {**found, "signature": bleu.signature}


def draw(model, tokenizer, sentence, path):
    """What every head of the encoder looks at in one sentence."""
    inputs = {"source_ids": [[*tokenizer.encode(sentence), tokenizer.end_id]], "target_ids": [[tokenizer.start_id]]}
    inputs = {name: np.array(ids, "int32") for name, ids in inputs.items()}
    weights = keras.ops.convert_to_numpy(model.attention(inputs)["encoder"][0])
    plots.heads(weights, tokenizer.tokens(inputs["source_ids"][0]), path=path)


def main(options):
    shared.same_run(options, "epochs", "every", "beam", "tokenize", "sentence", "test")
    pairs, valid, test = (data.read_parallel(*files) for files in (options.train, options.valid, options.test))
    tokenizer = data.Tokenizer.train([text for pair in pairs for text in pair], vocab_size=options.vocabulary)
    model = train(pairs, valid, tokenizer, options)
    model.save(options.folder / "model.keras")
    tokenizer.save(options.folder / "tokenizer.json")
    result = score(model, tokenizer, test, options)
    (options.folder / "result.json").write_text(json.dumps({"norm": options.norm, **result}, indent=1))
    draw(model, tokenizer, options.sentence or test[0][0], options.folder / "heads.png")
    print(f"\nsaved model.keras, tokenizer.json, result.json and heads.png in {options.folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in ("train", "valid", "test"):
        parser.add_argument(
            f"--{part}", nargs=2, metavar=("SOURCE", "TARGET"), required=True, help="one a line; or .gz"
        )
    parser.add_argument("--norm", choices=("post", "pre"), default="pre")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=4000, help="pieces of both languages (default 4000)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate-dim", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=3e-3, help="greatest learning rate (default 3e-3)")
    parser.add_argument("--warmup", type=int, default=1000, help="steps until then, at most half of all (default 1000)")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=80, help="longer sentences are left out of the training")
    parser.add_argument("--every", type=int, default=200, help="steps from one checkpoint to the next (default 200)")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--tokenize", default="13a", help='of BLEU; "none" for text that is tokenized already')
    parser.add_argument("--sentence", help="whose heads to draw (default: the first of the test)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/transformer"))
    main(parser.parse_args())

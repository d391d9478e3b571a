"""Trains RNNsearch, or the encoder-decoder without attention, and shows what it does with long sentences.

    python examples/rnnsearch.py                                 # RNNsearch on the pairs that ship with the repository
    python examples/rnnsearch.py --model RNNencdec --against runs/RNNsearch
    KERAS_BACKEND=torch python examples/rnnsearch.py --train train.en train.de --test test.en test.de --words
    python examples/rnnsearch.py --load --sentence "He is trying to catch the ball."

The model, its tokenizers, what it scores by source length, and a picture of its alignment are left in runs/MODEL, or
--folder; --load takes them from there instead of training. With --against, figure 2 of the paper is drawn, BLEU over
source length, from those runs and this one. Ctrl-C ends the training early, and the model is kept as it is.
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

HERE = pathlib.Path(__file__).parent


def read(part, files):
    if files:
        return llmfound.data.read_parallel(*files)
    return llmfound.data.read_pairs(HERE / "data" / f"eng-fra.{part}.tsv.xz")


def make_tokenizers(pairs, options):
    """A vocabulary for each side: the most frequent words, all others being unknown, or pieces of words."""
    kind = "word" if options.words else "bpe"
    return [llmfound.data.Tokenizer.train(side, options.vocabulary, kind=kind) for side in zip(*pairs)]


def train(pairs, source, target, options):
    keras.utils.set_random_seed(options.seed)
    batches = llmfound.data.TranslationBatches(
        pairs, source, target, batch_tokens=options.batch_tokens, max_length=80, num_buckets=6, seed=options.seed
    )
    print(batches)
    model = getattr(llmfound.models, options.model)(
        source.vocab_size, target.vocab_size, embedding_dim=options.hidden_dim // 2, hidden_dim=options.hidden_dim,
        attention_dim=options.hidden_dim, maxout_dim=options.hidden_dim // 2, dropout=options.dropout,
    )  # fmt: skip
    print(f"{model.count_params():,} parameters, {llmfound.kernels.fast_matmul()} matrix products")
    model.compile(
        llmfound.training.Adam(global_clipnorm=1.0),
        llmfound.training.SmoothedCrossEntropy(0.1),
        metrics=[llmfound.training.Perplexity()],
    )
    budget = llmfound.training.TimeBudget(options.minutes, peak=options.rate, warmup_steps=400)
    progress = llmfound.training.Progress(batches, budget)
    callbacks = [budget, progress, shared.stop_on_interrupt(model)]
    model.fit(batches, epochs=1000, shuffle=False, verbose=0, callbacks=callbacks)
    return model


def score(model, source, target, pairs, options):
    """Translates the test pairs, and returns what is worth keeping."""
    sources, references = zip(*pairs)
    how = dict(target_tokenizer=target, beam_size=options.beam)
    if options.words and model.attention:
        how["replace_unknown"] = True
    translations = llmfound.decoding.translate(model, source, sources, **how)
    bleu = llmfound.training.bleu(translations, references, tokenize=options.tokenize)
    print(f"\n{type(model).__name__}, beam {options.beam}: {bleu}\n")
    for i in range(0, len(pairs), max(len(pairs) // 6, 1)):
        print(f"source       {sources[i]}\nreference    {references[i]}\ntranslation  {translations[i]}\n")
    bins = llmfound.training.bleu_by_length(
        translations, references, sources, bins=options.bins, tokenize=options.tokenize
    )
    for bin in bins:
        print(f"{bin['low']:3}-{bin['high']:<3} words, {bin['count']:4} sentences: {bin['bleu']:.1f}")
    return {"model": type(model).__name__, "bleu": float(bleu.score), "by_length": bins}


def draw(model, source, target, sentence, path):
    """The alignment of one translated sentence, figure 3 of the paper."""
    source_ids = llmfound.data.pad([[*source.encode(sentence), source.end_id]], source.pad_id)
    found = llmfound.decoding.beam_search(model, {"source_ids": source_ids}, n_best=1, return_alignments=True)
    target_ids = found.token_ids[0, 0, : found.lengths[0, 0]]
    weights = found.alignments[0, 0, : len(target_ids)]
    llmfound.plots.alignment(weights, source.tokens(source_ids[0]), target.tokens(target_ids), path=path)


def save(model, source, target, folder):
    model.save(folder / "model.keras")
    source.save(folder / "source.json")
    target.save(folder / "target.json")


def load(folder):
    source, target = (llmfound.data.Tokenizer.load(folder / f"{side}.json") for side in ("source", "target"))
    return keras.models.load_model(folder / "model.keras"), source, target


def main(options):
    if options.load:
        model, source, target = load(options.folder)
        before = json.loads((options.folder / "result.json").read_text())
        options.words |= before.get("words", False)
        test = read("test", options.test) if options.test or not options.sentence else []
    else:
        options.folder.mkdir(parents=True, exist_ok=True)
        pairs, test = read("train", options.train), read("test", options.test)
        source, target = make_tokenizers(pairs, options)
        model = train(pairs, source, target, options)
        save(model, source, target, options.folder)
    saved = [] if options.load else ["model.keras", "source.json", "target.json"]
    if options.test or not options.load:  # else the result is the one that the folder has, of its own test
        result = {"words": options.words, **score(model, source, target, test, options)}
        (options.folder / "result.json").write_text(json.dumps(result, indent=1))
        saved.append("result.json")
    else:
        result = before
    if model.attention:
        sentence = options.sentence or test[int(np.argmax([len(s.split()) == 14 for s, _ in test]))][0]
        draw(model, source, target, sentence, options.folder / "alignment.png")
        saved.append("alignment.png")
    if options.against:
        found = [(json.loads((folder / "result.json").read_text()), folder) for folder in options.against]
        found.append((result, options.folder))
        names = [other["model"] for other, _ in found]
        records = {
            name if names.count(name) == 1 else f"{name}, {folder}": other["by_length"]
            for name, (other, folder) in zip(names, found)
        }
        llmfound.plots.bleu_by_length(records, path=options.folder / "bleu_by_length.png")
        saved.append("bleu_by_length.png")
    print(f"saved {', '.join(saved)} in {options.folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("RNNsearch", "RNNencdec", "DL4MT"), default="RNNsearch")
    parser.add_argument("--load", action="store_true", help="take the model from its folder; train nothing")
    parser.add_argument("--minutes", type=float, default=15.0, help="training time (default 15)")
    parser.add_argument("--train", nargs=2, metavar=("SOURCE", "TARGET"), help="files whose lines belong together")
    parser.add_argument("--test", nargs=2, metavar=("SOURCE", "TARGET"))
    parser.add_argument("--words", action="store_true", help="whole words, not pieces of words")
    parser.add_argument("--vocabulary", type=int, default=6000, help="of each side (default 6000)")
    parser.add_argument("--hidden-dim", type=int, default=384)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="greatest learning rate (default 1.5e-3)")
    parser.add_argument("--batch-tokens", type=int, default=1000)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--tokenize", default="13a", help='of BLEU; "none" for text that is tokenized already')
    parser.add_argument("--bins", type=int, nargs="+", default=[4, 6, 8, 10, 12, 15, 20])
    parser.add_argument("--sentence", help="whose alignment to draw (default: one of 14 words)")
    parser.add_argument("--against", nargs="+", type=pathlib.Path, default=[], help="folders of other runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=None, help="where to save (default runs/MODEL)")
    options = parser.parse_args()
    if not options.load and bool(options.train) != bool(options.test):
        parser.error("--train and --test go together")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive; got {options.minutes:g}")
    options.folder = options.folder or pathlib.Path("runs") / options.model
    main(options)

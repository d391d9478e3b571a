"""Trains a small Transformer to translate English into French, in minutes, and shows what it learned.

    python examples/demo.py                             # on JAX
    KERAS_BACKEND=torch python examples/demo.py         # the same on PyTorch, or =tensorflow

160,000 sentence pairs from Tatoeba ship with the repository (examples/data). The model, its tokenizer and a picture of
its attention are left in runs/demo-BACKEND; examples/translate.py uses them, on any backend. Ctrl-C ends the training
early, and the model is kept as it is.
"""

import argparse
import os
import pathlib
import time

import shared

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

import llmfound

HERE = pathlib.Path(__file__).parent


def read(part):
    return llmfound.data.read_pairs(HERE / "data" / f"eng-fra.{part}.tsv.xz")


def train(pairs, budget, seed):
    """The model and its tokenizer after the time of the budget."""
    keras.utils.set_random_seed(seed)
    tokenizer = llmfound.data.Tokenizer.train([text for pair in pairs for text in pair], vocab_size=4000)
    batches = llmfound.data.TranslationBatches(
        pairs, tokenizer, batch_tokens=400, max_length=48, num_buckets=6, seed=seed
    )
    print(batches)
    model = llmfound.models.Transformer(
        tokenizer.vocab_size, num_layers=3, decoder_layers=2, hidden_dim=192, num_heads=4, intermediate_dim=768,
        dropout=0.0, norm="pre",
    )  # fmt: skip
    print(f"{model.count_params():,} parameters, {llmfound.kernels.fast_matmul()} matrix products")
    model.compile(
        llmfound.training.Adam(beta_2=0.98, epsilon=1e-9, global_clipnorm=1.0),
        llmfound.training.SmoothedCrossEntropy(0.1),
        metrics=[llmfound.training.Perplexity()],
    )
    progress = llmfound.training.Progress(batches, budget)
    callbacks = [budget, progress, shared.stop_on_interrupt(model)]
    model.fit(batches, epochs=1000, shuffle=False, verbose=0, callbacks=callbacks)
    return model, tokenizer


def translate(model, tokenizer, sources, beam_size):
    start = time.perf_counter()
    translations = llmfound.decoding.translate(model, tokenizer, sources, beam_size=beam_size)
    return translations, time.perf_counter() - start


def show(model, tokenizer, pairs, folder):
    """Prints BLEU and examples, and draws the attention of one sentence."""
    sources, references = zip(*pairs)
    greedy, seconds = translate(model, tokenizer, sources, beam_size=1)
    print(f"\ngreedy  {llmfound.training.bleu(greedy, references)}   {len(pairs) / seconds:.0f} sentences/s")
    beam, seconds = translate(model, tokenizer, sources, beam_size=4)
    print(f"beam 4  {llmfound.training.bleu(beam, references)}   {len(pairs) / seconds:.0f} sentences/s\n")
    step = len(pairs) // 12
    for source, reference, short, wide in list(zip(sources, references, greedy, beam))[::step][:12]:
        print(f"source     {source}\nreference  {reference}\ngreedy     {short}\nbeam 4     {wide}\n")
    draw(model, tokenizer, "I don't know what he wants to buy for his sister.", folder / "attention.png")
    print(f"saved {folder / 'attention.png'}")


def draw(model, tokenizer, sentence, path):
    source = llmfound.data.pad([[*tokenizer.encode(sentence), tokenizer.end_id]], tokenizer.pad_id)
    found = llmfound.decoding.beam_search(model, {"source_ids": source}, n_best=1, return_alignments=True)
    length = int(found.lengths[0, 0])
    target = found.token_ids[0, 0, :length]
    weights = found.alignments[0, 0, :length]
    llmfound.plots.alignment(weights, tokenizer.tokens(source[0]), tokenizer.tokens(target), path=path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="training time (default 9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=None, help="where to save (default runs/demo-BACKEND)")
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive; got {options.minutes:g}")
    folder = options.folder or pathlib.Path("runs") / f"demo-{keras.backend.backend()}"
    folder.mkdir(parents=True, exist_ok=True)
    budget = llmfound.training.TimeBudget(options.minutes, peak=1.5e-3, warmup_steps=200)
    model, tokenizer = train(read("train"), budget, options.seed)
    model.save(folder / "model.keras")
    tokenizer.save(folder / "tokenizer.json")
    print(f"saved {folder / 'model.keras'} and {folder / 'tokenizer.json'}", flush=True)
    show(model, tokenizer, read("test"), folder)

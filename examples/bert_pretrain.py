"""Pre-trains a small BERT from text: masked words and next sentences.

    python examples/bert_pretrain.py                              # on books in the repository
    KERAS_BACKEND=torch python examples/bert_pretrain.py --text wikitext2 --data FOLDER
    python examples/bert_pretrain.py --text FILE                  # a paragraph a line, blank lines between documents
    python examples/bert_pretrain.py --objective left_to_right    # table 5 of the paper

An interrupted run goes on when started again. Model and tokenizer are left in runs/bert, or --folder, as Hugging
Face's libraries read them; examples/bert_finetune.py takes that folder.
"""

import argparse
import os
import pathlib

import shared

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import llmfound
from llmfound import convert, data, models, training

HERE = pathlib.Path(__file__).parent
shared.interrupted = shared.GOES_ON


def documents(options):
    """Lists of sentences."""
    if options.text != "wikitext2":
        paragraphs = data.read_documents(options.text)
        return [[s for text in document for s in data.split_sentences(text)] for document in paragraphs]
    articles = [[]]
    for line in data.wikitext2("train", options.data):
        if line.startswith("= ") and not line.startswith("= ="):
            articles.append([])
        elif line and not line.startswith("= "):
            articles[-1] += data.split_sentences(line.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", "."))
    return [article for article in articles if article]


def show(model, tokenizer, texts, mask_rate=0.15):
    """What the model puts in place of some words that are hidden."""
    generator = np.random.default_rng(0)
    for text in texts:
        ids = np.array([tokenizer.cls_id, *tokenizer.encode(text)[:100], tokenizer.sep_id], "int32")
        places = np.sort(
            generator.choice(np.arange(1, len(ids) - 1), max(round(mask_rate * len(ids)), 1), replace=False)
        )
        hidden = ids.copy()
        hidden[places] = tokenizer.mask_id
        inputs = {"token_ids": hidden[None], "masked_positions": places[None].astype("int32")}
        best = model.predict_on_batch(inputs)["masked_lm"][0].argsort(-1)[:, ::-1][:, :3]
        print(f"\n{' '.join(tokenizer.tokens(hidden[1:-1]))}")
        for place, found in zip(places, best):
            print(f"  {tokenizer.tokens(ids[[place]])[0]:>15}: {', '.join(tokenizer.tokens(found))}")


def main(options):
    keras.utils.set_random_seed(options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    shared.same_run(options, "epochs")
    causal = options.objective == "left_to_right"
    options.no_next_sentence |= causal  # its first token knows nothing of the sentences
    texts = documents(options)
    fewest = 2 if options.no_next_sentence else 4  # some are held out, and a random next sentence is another document's
    if len(texts) < fewest:
        raise SystemExit(
            f"{options.text} has {len(texts)} documents, and {fewest} are needed at least; blank lines divide them."
        )
    held_out = texts[:: max(len(texts) // 20, 2)]
    texts = [text for i, text in enumerate(texts) if i % max(len(texts) // 20, 2)]
    if (options.folder / "tokenizer.json").exists():
        tokenizer = data.WordPiece.load(options.folder)
    else:
        tokenizer = data.WordPiece.train([sentence for text in texts for sentence in text], options.vocabulary)
        tokenizer.save_folder(options.folder)
    common = dict(batch_size=options.batch_size, max_length=options.max_length, objective=options.objective,
                  whole_word=options.whole_word, next_sentence=not options.no_next_sentence)  # fmt: skip
    batches = data.PretrainingBatches(texts, tokenizer, **common, seed=options.seed)
    validation = data.PretrainingBatches(held_out, tokenizer, **common, masking="static")
    print(batches)
    bert = models.BERT(
        tokenizer.vocab_size, options.layers, options.hidden_dim, max(options.hidden_dim // 64, 1),
        4 * options.hidden_dim, dropout=options.dropout, attention_dropout=options.dropout, causal=causal,
    )  # fmt: skip
    model = models.BERTPretraining(bert, next_sentence=not options.no_next_sentence)
    print(f"{model.count_params():,} parameters, {llmfound.kernels.fast_matmul()} matrix products")
    losses, metrics = {"masked_lm": training.SmoothedCrossEntropy(0.0)}, {"masked_lm": [training.Perplexity()]}
    if not options.no_next_sentence:
        losses["next_sentence"] = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        metrics["next_sentence"] = ["accuracy"]
    steps = options.epochs * len(batches)
    model.compile(training.BERTAdam(training.BERTSchedule(options.rate, steps // 10, steps)), losses, metrics=metrics)
    model.fit(
        batches, epochs=options.epochs, shuffle=False, verbose=0,
        callbacks=[training.Progress(), training.Checkpoints(options.folder / "checkpoints", batches, steps=200)],
    )  # fmt: skip
    found = model.evaluate(validation, verbose=0, return_dict=True)
    print("\nheld-out documents: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    if not causal:
        show(model, tokenizer, [max(text, key=len) for text in held_out[:5]])
    convert.to_huggingface(model, options.folder, tokenizer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=HERE / "data" / "prose.en.txt.xz", help="a file, or wikitext2")
    parser.add_argument("--data", help="folder of the public sets; else the environment variable LLMFOUND_DATA")
    parser.add_argument("--objective", choices=["masked", "left_to_right"], default="masked")
    parser.add_argument("--whole-word", action="store_true", help="hide all pieces of a word or none")
    parser.add_argument("--no-next-sentence", action="store_true")
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-dim", type=int, default=256)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-3, help="greatest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/bert"))
    main(parser.parse_args())

"""Translates sentences with a model that examples/demo.py saved, on any backend.

    python examples/translate.py runs/demo-jax "A man rides a bicycle."
    KERAS_BACKEND=torch python examples/translate.py runs/demo-jax/model.keras "Where is the station?"

Without a sentence it reads one per line from standard input.
"""

import argparse
import os
import pathlib
import sys

import shared  # noqa: F401  for its plain errors

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

import llmfound

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="folder, or .keras file with tokenizer.json beside it")
    parser.add_argument("sentences", nargs="*")
    parser.add_argument("--beam-size", type=int, default=4)
    options = parser.parse_args()
    path = options.model / "model.keras" if options.model.is_dir() else options.model
    if not path.is_file():
        parser.error(f"there is no folder with model.keras, and no .keras file, {options.model}")
    model = keras.saving.load_model(path, compile=False)
    tokenizer = llmfound.data.Tokenizer.load(path.with_name("tokenizer.json"))
    sentences = options.sentences or [line.rstrip("\n") for line in sys.stdin]
    for translation in llmfound.decoding.translate(model, tokenizer, sentences, beam_size=options.beam_size):
        print(translation)

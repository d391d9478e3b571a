"""The README's code, as it stands there, with smaller numbers."""

import pathlib
import re

import numpy as np
import pytest

import llmfound
from llmfound import convert, data, models

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
TINY_BERT = "num_layers=1, hidden_dim=16, num_heads=2, intermediate_dim=32"
SMALLER = {  # what stands there: what runs here
    "vocab_size=8000": "vocab_size=300", "batch_tokens=4096": "batch_tokens=512", "epochs=10": "epochs=1",
    "**llmfound.models.Transformer.BASE": "2, 16, 2, 32",
    "side, 30_000": "side, 300", "batch_size=80, window=20": "batch_size=8, window=2",
    "RNNsearch(source.vocab_size, target.vocab_size)": "RNNsearch(source.vocab_size, target.vocab_size, 8, 8, 8, 8)",
    "epochs=5,": "epochs=1,", "beam_size=12": "beam_size=2", "vocab_size=60_000": "vocab_size=300",
    "ULMFiT(words.vocab_size)": "ULMFiT(words.vocab_size, 8, 12, 2)", "epochs=15": "epochs=1",
    "(groups), 50,": "(groups), 5,", "epochs=50": "epochs=5", "epochs=3,": "epochs=1,",
    "vocab_size=30_000": "vocab_size=300", "batch_size=256, max_length=128": "batch_size=8, max_length=32",
    "**models.BERT.SMALL": TINY_BERT, "epochs=40": "epochs=1",
    'UniformTransformer(8000, norm="pre")': 'UniformTransformer(300, 1, 16, 2, 32, norm="pre")',
    "llmfound.models.Transformer(tokenizer.vocab_size)": "llmfound.models.Transformer(tokenizer.vocab_size, 1, 16, 2)",
    "model.compile(...)": "model.compile('sgd', llmfound.training.SmoothedCrossEntropy(0.1))",
}  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the README's reader has: files, texts and arrays. Each block finds what those before it made."""
    folder = tmp_path_factory.mktemp("readme")
    pairs = [p for p in data.read_pairs(ROOT / "examples" / "data" / "eng-fra.valid.tsv.xz") if len(p[1]) < 60][:160]
    for side, name in zip(zip(*pairs), ("train.en", "train.de")):
        (folder / name).write_text("\n".join(side) + "\n", "utf-8")
    english, french = map(list, zip(*pairs))
    tokenizer = data.WordPiece.train(english, vocab_size=300)
    bert = models.BERT(tokenizer.vocab_size, **eval(f"dict({TINY_BERT})"))
    convert.to_huggingface(bert, folder / "FOLDER", tokenizer)
    return folder, dict(
        np=np, general=english, reviews=french, labels=[i % 2 for i in range(len(french))], texts=english,
        test_texts=english[:8], test_labels=[0, 1] * 4, words=np.ones((2, 3, 5), "float32"),
        memory=np.ones((2, 4, 512), "float32"), mask=np.ones((2, 4), "bool"), h=np.ones((2, 256), "float32"),
        c=np.ones((2, 256), "float32"),
    )  # fmt: skip


def test_every_number_that_is_made_smaller_stands_there():
    assert [old for old in SMALLER if old not in "".join(BLOCKS)] == []


@pytest.mark.slow
def test_the_blocks_run_one_after_the_other(names, monkeypatch, capsys):
    folder, found = names
    monkeypatch.chdir(folder)
    for number, block in enumerate(BLOCKS):
        if "recorder" in block or "translation.html" in block:
            found |= translation()
        for old, new in SMALLER.items():
            block = block.replace(old, new)
        exec(compile(block, f"README.md, block {number}", "exec"), found)
    shown = capsys.readouterr().out
    assert "epoch 2: training lstm_2 at " in shown and "and head at " in shown
    for path in ("model.keras", "tokenizer.json", "OUT/model.safetensors", "attention.html", "translation.html",
                 "norms.png", "runs/bert"):  # fmt: skip
        assert (folder / path).exists(), path
    layer, inputs = found["normalised"]()
    assert layer(*inputs).shape == (3, 7, 4)


def translation():
    """The batches of the first block, and a small model of them."""
    tokenizer = data.Tokenizer.load("tokenizer.json")
    batches = data.TranslationBatches(data.read_parallel("train.en", "train.de"), tokenizer, batch_tokens=512)
    model = models.Transformer(tokenizer.vocab_size, 1, 16, 2, 32)
    model.compile("sgd", llmfound.training.SmoothedCrossEntropy(0.1))
    x, y = batches[0]
    return dict(tokenizer=tokenizer, batches=batches, model=model, x=x, y=y)

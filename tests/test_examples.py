"""The examples as a newcomer runs them, only shorter."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import pytest

import llmfound

ROOT = pathlib.Path(__file__).parents[1]
BACKENDS = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}  # backend: the package it needs


def run(backend, script, *arguments):
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, ROOT / "examples" / script, *arguments]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.slow
def test_the_demo_leaves_a_model_that_translates_on_every_backend(tmp_path):
    pytest.importorskip("matplotlib")
    here = keras.backend.backend()
    shown = run(here, "demo.py", "--minutes", "0.5", "--folder", str(tmp_path))
    assert shown.count("BLEU") == 2 and shown.count("\nreference  ") == 12
    assert {path.name for path in tmp_path.iterdir()} == {"model.keras", "tokenizer.json", "attention.png"}
    sentences = "We are here.", "I don't know what he wants."
    installed = [backend for backend, package in BACKENDS.items() if importlib.util.find_spec(package)]
    translations = {backend: run(backend, "translate.py", str(tmp_path), *sentences) for backend in installed}
    assert translations[here].count("\n") == len(sentences)
    assert set(translations.values()) == {translations[here]}


@pytest.mark.slow
def test_ulmfit_runs_its_three_stages(tmp_path):
    options = "--general-texts", "1000", "--vocabulary", "1000", "--task-epochs", "1", "--epochs", "3", "--labels", "90"
    shown = run(keras.backend.backend(), "ulmfit.py", "--folder", str(tmp_path / "a"), *options)
    assert "epoch 2: training lstm_3 at 3.85e-03 and head at 1.00e-02; waiting: embedding, lstm_1, lstm_2" in shown
    assert "90 labels; error on 755 texts" in shown
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"general", "task", "classifier", "result.json"}
    again = run(keras.backend.backend(), "ulmfit.py", "--general", str(tmp_path / "a" / "general"), "--folder",
                str(tmp_path / "b"), *options)  # fmt: skip
    assert "Stage 3" in again and not (tmp_path / "b" / "general").exists()


@pytest.mark.slow
def test_the_ablation_of_ulmfit_goes_on_where_it_stopped(tmp_path):
    options = ("--folder", str(tmp_path), "--general-texts", "500", "--vocabulary", "500", "--task-texts", "200",
               "--task-epochs", "1", "--epochs", "2", "--few", "30", "--seeds", "2", "--rates", "0.01", "0.001",
               "--held-out", "30", "--rows", "full", "freez + discr + stlr")  # fmt: skip
    shown = run(keras.backend.backend(), "ulmfit_ablation.py", *options)
    table = (tmp_path / "table.md").read_text()
    assert shown.count("\nerror ") == 2 * (2 + 2) and shown.endswith(table + "\n" * (not shown.endswith(table)))
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| full", "| freez + discr + stlr"]
    (tmp_path / "table.md").unlink()
    again = run(keras.backend.backend(), "ulmfit_ablation.py", *options)
    assert "error " not in again.replace("| error", "") and (tmp_path / "table.md").read_text() == table


@pytest.mark.slow
def test_bert_is_pretrained_and_fine_tuned_and_transformers_reads_both(tmp_path):
    transformers = pytest.importorskip("transformers")
    here, made = keras.backend.backend(), tmp_path / "made"
    sizes = "--vocabulary", "1000", "--layers", "1", "--hidden-dim", "64", "--max-length", "32", "--epochs", "2"
    shown = run(here, "bert_pretrain.py", "--folder", str(made), *sizes)
    assert "held-out documents: " in shown and "next_sentence_accuracy" in shown and shown.count(": ") > 10
    again = run(here, "bert_pretrain.py", "--folder", str(made), *sizes)
    assert "2 epochs and 0 batches are done, none is left" in again
    model = transformers.BertForPreTraining.from_pretrained(made)
    assert model.config.num_hidden_layers == 1
    (tmp_path / "SST-2").mkdir()
    rows = [f"a {word} film\t{label}" for word, label in (("good", 1), ("bad", 0)) for _ in range(32)]
    for part in ("train", "dev"):
        (tmp_path / "SST-2" / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *rows]), "utf-8")
    options = "--data", str(tmp_path), "--epochs", "40", "--rate", "0.003", "--folder", str(tmp_path / "tuned")
    shown = run(here, "bert_finetune.py", str(made), "--task", "sst2", *options)
    assert "accuracy 1" in shown
    found = transformers.pipeline("text-classification", str(tmp_path / "tuned"))(["a good film", "a bad film"])
    assert [row["label"] for row in found] == ["LABEL_1", "LABEL_0"]


@pytest.mark.slow
def test_rnnsearch_and_its_baseline_draw_the_papers_figures(tmp_path):
    pytest.importorskip("matplotlib")
    here = keras.backend.backend()
    options = "--minutes", "0.3", "--hidden-dim", "32", "--batch-tokens", "400", "--beam", "2", "--words"
    shown = run(here, "rnnsearch.py", "--model", "RNNencdec", "--folder", str(tmp_path / "a"), *options)
    assert shown.count("BLEU") == 1 and shown.count("\nreference  ") >= 6
    assert "alignment.png" not in {path.name for path in (tmp_path / "a").iterdir()}
    against = "--against", str(tmp_path / "a")
    run(here, "rnnsearch.py", "--folder", str(tmp_path / "b"), *options, *against)
    found = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert set(found) == {"model.keras", "source.json", "target.json", "result.json", "alignment.png",
                          "bleu_by_length.png"}  # fmt: skip
    again = run(here, "rnnsearch.py", "--folder", str(tmp_path / "b"), "--load", *options, "--sentence", "He is here.")
    assert (tmp_path / "b" / "result.json").read_bytes() == found["result.json"]
    assert (tmp_path / "b" / "alignment.png").read_bytes() != found["alignment.png"]
    assert "saved result.json, alignment.png" in again


@pytest.mark.slow
def test_a_transformer_of_a_small_set_goes_on_where_it_was_stopped(tmp_path):
    pytest.importorskip("matplotlib")
    pairs = llmfound.data.read_pairs(ROOT / "examples" / "data" / "eng-fra.valid.tsv.xz")[:160]
    for name, side in zip(("en", "fr"), zip(*pairs)):
        (tmp_path / name).write_text("\n".join(side) + "\n", "utf-8")
    files = [str(tmp_path / name) for name in ("en", "fr")]
    options = ["--train", *files, "--valid", *files, "--test", *files, "--folder", str(tmp_path / "out"),
               "--vocabulary", "300", "--layers", "1", "--warmup", "2", "--beam", "2", "--batch-tokens", "800",
               "--epochs", "2"]  # fmt: skip
    shown = run(keras.backend.backend(), "transformer.py", *options)
    assert "beam 1: BLEU" in shown and "beam 2: BLEU" in shown and shown.count("\ntranslation  ") >= 6
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"checkpoints", "model.keras", "tokenizer.json", "result.json", "heads.png"}
    again = run(keras.backend.backend(), "transformer.py", *options)
    assert "2 epochs and 0 batches are done, none is left" in again

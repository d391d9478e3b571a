"""The examples as a newcomer runs them, only shorter."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import pytest

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

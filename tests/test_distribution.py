"""Training on several devices is what it is on one; two devices are made of the CPU, in a process of its own."""

import json
import os
import subprocess
import sys

import keras
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution is JAX's"),
]

CODE = """
import json, sys
import keras, numpy as np
from keras import distribution
from llmfound import data, decoding, models, training

rng = np.random.default_rng(0)
words = rng.integers(3, 11, 400).astype("int32")
ids = rng.integers(3, 11, (4, 7)).astype("int32")
pair = {"source_ids": ids, "target_ids": np.roll(ids, 1, axis=1)}
MODELS = {
    "BERTClassifier": (lambda: models.BERTClassifier(models.BERT(11, 2, 8, 2, 16, dropout=0.0), 3), ids, ids[:, 0] % 3),
    "ULMFiT": (lambda: models.ULMFiT(11, 4, 6, 2), words, None),
    "RNNsearch": (lambda: models.RNNsearch(11, 12, 4, 8, 6, 4), pair, ids),
    "Transformer": (lambda: models.Transformer(11, 1, 8, 2, 16), pair, ids),
}
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
layout = distribution.LayoutMap(distribution.DeviceMesh((2,), ["model"], distribution.list_devices()))
layout[".*(feedforward|lstm_cell|forward|backward).*kernel"] = (None, "model")
WAYS = {"one": None, "data": distribution.DataParallel(), "model": distribution.ModelParallel(layout_map=layout)}
found = {}
for name, (make, x, y) in MODELS.items():
    for way, chosen in WAYS.items():
        distribution.set_distribution(chosen)
        keras.utils.set_random_seed(0)
        model = make()
        model.compile(training.Adam(0.01, global_clipnorm=1.0), loss)
        if y is None:
            batches, options = data.LanguageModelBatches(x, batch_size=4, window=10), {}
        else:
            batches, options = x, dict(y=y, batch_size=4)
        losses = model.fit(batches, epochs=2, verbose=0, **options).history["loss"]
        spread = sum(len(w.value.sharding.device_set) > 1 and not w.value.is_fully_replicated for w in model.weights)
        tokens = None
        if "source_ids" in model.input_signature():
            tokens = decoding.beam_search(model, {"source_ids": ids}, 2, max_length=5).tolist()
        found[f"{name} {way}"] = losses, sum(float(np.abs(w).sum()) for w in model.get_weights()), spread, tokens
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    flags = "--xla_force_host_platform_device_count=2 " + os.environ.get("XLA_FLAGS", "")
    result = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert not result.returncode, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["data", "model"])
@pytest.mark.parametrize("name", ["BERTClassifier", "ULMFiT", "RNNsearch", "Transformer"])
def test_two_devices_train_as_one(name, way, found):
    losses, weights, spread, tokens = found[f"{name} {way}"]
    assert losses == pytest.approx(found[f"{name} one"][0], rel=1e-4)
    assert weights == pytest.approx(found[f"{name} one"][1], rel=1e-3)
    assert tokens == found[f"{name} one"][3]
    assert bool(spread) == (way == "model")

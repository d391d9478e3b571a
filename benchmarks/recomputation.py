"""Training step of BERT whose blocks are computed again.

What memory does a step save, and what time does it cost, if activations are computed again on the way back, beside
Hugging Face transformers?
"""

import contextlib
import functools

import numpy as np
import peers
from harness import Experiment, System, main, torch_step

TEXT = """One step learns the classes of {batch} texts of {length} pieces: forward, backward, AdamW; {layers} layers,
width {dim}, dropout 0.1. "again" is with the blocks listed in a `keras.RematScope`, and of transformers with
`gradient_checkpointing_enable()`. tokens/s counts the pieces."""
SIZES = dict(layers=12, dim=256, heads=4, batch=32, length=128, vocabulary=1000, tokens=32 * 128)
SMOKE = dict(layers=2, dim=32, heads=2, batch=2, length=8, vocabulary=100, tokens=16)
DROPOUT, RATE, CLASSES = 0.1, 2e-5, 2


def data(sizes):
    """Pieces and classes, int32."""
    rng = np.random.default_rng(0)
    shape = sizes["batch"], sizes["length"]
    return rng.integers(5, sizes["vocabulary"], shape, "int32"), rng.integers(0, CLASSES, shape[0], "int32")


def ours(sizes, again=False):
    import keras

    import llmfound

    names = [f"block_{i}" for i in range(sizes["layers"])]
    with keras.RematScope("list_of_layers", layer_names=names) if again else contextlib.nullcontext():
        size = (sizes[name] for name in ("vocabulary", "layers", "dim", "heads"))
        model = llmfound.models.BERTClassifier(llmfound.models.BERT(*size, 4 * sizes["dim"], DROPOUT, DROPOUT), CLASSES)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(llmfound.training.AdamW(RATE, weight_decay=0.01), loss)
    ids, classes = data(sizes)
    return lambda: model.train_on_batch({"token_ids": ids}, classes)


def transformers(sizes, again=False):
    import torch
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(peers.bert_config(sizes, DROPOUT, num_labels=CLASSES)).train()
    if again:
        model.gradient_checkpointing_enable()
    ids, classes = (torch.from_numpy(x).long() for x in data(sizes))
    mask = torch.ones_like(ids)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01, fused=True)
    return torch_step(optimizer, lambda: model(input_ids=ids, attention_mask=mask, labels=classes).loss)


SYSTEMS = [
    System(f"{name}{', again' if again else ''}", backend, functools.partial(build, again=again), build is transformers)
    for name, backend, build in (
        ("llmfound, torch", "torch", ours),
        ("llmfound, JAX", "jax", ours),
        ("llmfound, TensorFlow", "tensorflow", ours),
        ("transformers", "torch", transformers),
    )
    for again in (False, True)
]

if __name__ == "__main__":
    main(__file__, __doc__, SYSTEMS, [Experiment("12 layers, width 256", TEXT.format(**SIZES), SIZES, SMOKE)], 2, 3)

"""Training step of a BERT that classifies.

How fast is fine-tuning, ours beside Hugging Face transformers and KerasHub, with the same sizes?
"""

import numpy as np
import peers
from harness import Experiment, main, on_backends, on_torch, torch_step

TEXT = """One step learns the classes of {batch} texts of {length} pieces without padding: forward, backward, update;
a vocabulary of 30522, dropout 0.1 also on the attention weights, AdamW with weight decay, which is PyTorch's fused one
in transformers. llmfound's last block computes the first piece alone, which the classifier reads, and of the others
keys and values. tokens/s counts the pieces."""
SIZES = dict(layers=6, dim=384, heads=12, batch=32, length=48, vocabulary=30522, tokens=32 * 48)
SMOKE = dict(layers=1, dim=32, heads=2, batch=2, length=8, vocabulary=100, tokens=16)
DROPOUT, RATE, CLASSES = 0.1, 2e-5, 2


def data(sizes):
    """Pieces and classes, int32."""
    rng = np.random.default_rng(0)
    shape = sizes["batch"], sizes["length"]
    return rng.integers(5, sizes["vocabulary"], shape, "int32"), rng.integers(0, CLASSES, shape[0], "int32")


def ours(sizes, jit):
    import keras

    import llmfound

    names = ("vocabulary", "layers", "dim", "heads")
    bert = llmfound.models.BERT(*(sizes[name] for name in names), 4 * sizes["dim"])
    model = llmfound.models.BERTClassifier(bert, CLASSES)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(llmfound.training.AdamW(RATE, weight_decay=0.01), loss, jit_compile=jit)
    ids, classes = data(sizes)
    return lambda: model.train_on_batch({"token_ids": ids}, classes)


def transformers(sizes):
    import torch
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(peers.bert_config(sizes, DROPOUT, num_labels=CLASSES)).train()
    ids, classes = (torch.from_numpy(x).long() for x in data(sizes))
    mask = torch.ones_like(ids)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01, fused=True)
    return torch_step(optimizer, lambda: model(input_ids=ids, attention_mask=mask, labels=classes).loss)


def keras_hub(sizes, jit):
    import keras
    from keras_hub import models

    backbone = peers.keras_hub_bert(sizes, DROPOUT)
    model = models.BertTextClassifier(backbone=backbone, num_classes=CLASSES, preprocessor=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.AdamW(RATE, weight_decay=0.01)
    model.compile(optimizer=optimizer, loss=loss, metrics=[], jit_compile=jit)
    ids, classes = data(sizes)
    x = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": np.ones_like(ids)}
    return lambda: np.asarray(model.train_on_batch(x, classes))


SYSTEMS = [
    *on_backends("llmfound", ours),
    *on_torch("transformers", transformers, peer=True),
    *on_backends("KerasHub", keras_hub, peer=True),
]

if __name__ == "__main__":
    main(__file__, __doc__, SYSTEMS, [Experiment("6 layers, width 384", TEXT.format(**SIZES), SIZES, SMOKE)], 2, 5)

"""Training step of a BERT that classifies.

How fast is fine-tuning, ours beside Hugging Face transformers and KerasHub, with the same sizes?
"""

import numpy as np
from harness import Experiment, System, main, torch_step

TEXT = """One step learns the classes of {batch} texts of {length} pieces without padding: forward, backward, update;
a vocabulary of 30522, dropout 0.1 also on the attention weights, AdamW with weight decay, which is PyTorch's fused one
in transformers. "graph" and "XLA" are `compile(jit_compile=False)` and `True`. llmfound's last block computes the first
piece alone, which the classifier reads, and of the others keys and values. tokens/s counts the pieces."""
SIZES = dict(layers=6, dim=384, heads=12, batch=32, length=48, vocabulary=30522, tokens=32 * 48)
SMOKE = dict(layers=1, dim=32, heads=2, batch=2, length=8, vocabulary=100, tokens=16)
RATE, CLASSES = 2e-5, 2


def data(sizes):
    """Pieces and classes, int32."""
    rng = np.random.default_rng(0)
    shape = sizes["batch"], sizes["length"]
    return rng.integers(5, sizes["vocabulary"], shape, "int32"), rng.integers(0, CLASSES, shape[0], "int32")


def ours(jit="auto"):
    def build(sizes):
        import keras

        import llmfound

        names = ("vocabulary", "layers", "dim", "heads")
        bert = llmfound.models.BERT(*(sizes[name] for name in names), 4 * sizes["dim"])
        model = llmfound.models.BERTClassifier(bert, CLASSES)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(llmfound.training.AdamW(RATE, weight_decay=0.01), loss, jit_compile=jit)
        ids, classes = data(sizes)
        return lambda: model.train_on_batch({"token_ids": ids}, classes)

    return build


def transformers(sizes):
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["dim"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"], intermediate_size=4 * sizes["dim"], num_labels=CLASSES,
    )  # fmt: skip
    model = BertForSequenceClassification(config).train()
    ids, classes = (torch.from_numpy(x).long() for x in data(sizes))
    mask = torch.ones_like(ids)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01, fused=True)
    return torch_step(optimizer, lambda: model(input_ids=ids, attention_mask=mask, labels=classes).loss)


def keras_hub(jit="auto"):
    def build(sizes):
        import keras
        from keras_hub import models

        backbone = models.BertBackbone(
            vocabulary_size=sizes["vocabulary"], num_layers=sizes["layers"], num_heads=sizes["heads"],
            hidden_dim=sizes["dim"], intermediate_dim=4 * sizes["dim"], dropout=0.1, max_sequence_length=512,
        )  # fmt: skip
        model = models.BertTextClassifier(backbone=backbone, num_classes=CLASSES, preprocessor=None)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.AdamW(RATE, weight_decay=0.01)
        model.compile(optimizer=optimizer, loss=loss, metrics=[], jit_compile=jit)
        ids, classes = data(sizes)
        x = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": np.ones_like(ids)}
        return lambda: np.asarray(model.train_on_batch(x, classes))

    return build


SYSTEMS = [
    System("llmfound, JAX", "jax", ours()),
    System("llmfound, TensorFlow, graph", "tensorflow", ours(jit=False)),
    System("llmfound, TensorFlow, XLA", "tensorflow", ours(jit=True)),
    System("llmfound, torch", "torch", ours()),
    System("transformers", "torch", transformers, peer=True),
    System("KerasHub, JAX", "jax", keras_hub(), peer=True),
    System("KerasHub, TensorFlow, graph", "tensorflow", keras_hub(jit=False), peer=True),
    System("KerasHub, TensorFlow, XLA", "tensorflow", keras_hub(jit=True), peer=True),
    System("KerasHub, torch", "torch", keras_hub(), peer=True),
]

if __name__ == "__main__":
    main(__file__, __doc__, SYSTEMS, [Experiment("6 layers, width 384", TEXT.format(**SIZES), SIZES, SMOKE)], 2, 5)

"""Training step of BERT on masked words.

How fast is ours beside Hugging Face transformers and KerasHub, with the same sizes?
"""

import numpy as np
from harness import Experiment, System, main, torch_step

PREDICTED = 20
DROPOUT = 0.1
RATE = 1e-4
COMMON = """a vocabulary of 30522 tied between embeddings and output, texts of 128 pieces without padding, dropout 0.1
also on the attention weights, AdamW with weight decay. "oneDNN" is the same system after
`torch.set_float32_matmul_precision("medium")`, which is what `llmfound.kernels.fast_matmul()` sets; "graph" and "XLA"
are `compile(jit_compile=False)` and `True`. "gathered" is transformers with the 20 predicted places gathered by hand
before its head, which else runs at all places; transformers has PyTorch's fused AdamW. llmfound's last block computes
the predicted places alone, and of the others keys and values. tokens/s counts the pieces."""
TRAIN = f"One step predicts 20 masked words of each text: forward, backward and update; {COMMON}"
SIZES = {
    "4 layers, width 256": dict(layers=4, dim=256, heads=4, batch=16),
    "BERT-base": dict(layers=12, dim=768, heads=12, batch=4),
}
SMOKE = dict(layers=1, dim=32, heads=2, batch=2, vocabulary=100, length=24, tokens=48)


def full(sizes):
    return dict(sizes, vocabulary=30522, length=128, tokens=sizes["batch"] * 128)


def data(sizes):
    """Pieces, predicted places and what stands there, int32."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, sizes["vocabulary"], (sizes["batch"], sizes["length"]), dtype="int32")
    places = np.stack([np.sort(rng.choice(sizes["length"], PREDICTED, replace=False)) for _ in ids]).astype("int32")
    labels = np.take_along_axis(ids, places, axis=1)
    np.put_along_axis(ids, places, 4, axis=1)
    return ids, places, labels


def ours(fast_matmul=False, jit="auto"):
    def build(sizes):
        import llmfound

        if fast_matmul:
            llmfound.kernels.fast_matmul()
        bert = llmfound.models.BERT(
            sizes["vocabulary"], sizes["layers"], sizes["dim"], sizes["heads"], 4 * sizes["dim"], DROPOUT, DROPOUT
        )
        model = llmfound.models.BERTPretraining(bert, next_sentence=False)
        optimizer = llmfound.training.AdamW(RATE, weight_decay=0.01)
        model.compile(optimizer, {"masked_lm": llmfound.training.SmoothedCrossEntropy(0.0)}, jit_compile=jit)
        ids, places, labels = data(sizes)
        x = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "masked_positions": places}
        return lambda: model.train_on_batch(x, {"masked_lm": labels})

    return build


def transformers(one_dnn=False, gathered=False):
    def build(sizes):
        import torch
        from transformers import BertConfig, BertForMaskedLM

        if one_dnn:
            torch.set_float32_matmul_precision("medium")
        config = BertConfig(
            vocab_size=sizes["vocabulary"], hidden_size=sizes["dim"], num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"], intermediate_size=4 * sizes["dim"], hidden_dropout_prob=DROPOUT,
            attention_probs_dropout_prob=DROPOUT,
        )  # fmt: skip
        model = BertForMaskedLM(config).train()
        ids, places, found = (torch.from_numpy(x).long() for x in data(sizes))
        mask = torch.ones_like(ids)
        flat = (torch.arange(len(ids))[:, None] * sizes["length"] + places).flatten()
        labels = torch.full_like(ids, -100).scatter_(1, places, found)

        def loss():
            if not gathered:
                return model(input_ids=ids, attention_mask=mask, labels=labels).loss
            hidden = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state.flatten(0, 1)[flat]
            return torch.nn.functional.cross_entropy(model.cls(hidden), found.flatten())

        return torch_step(torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01, fused=True), loss)

    return build


def keras_hub(one_dnn=False, jit="auto"):
    def build(sizes):
        import keras
        from keras_hub import models

        if one_dnn:
            import torch

            torch.set_float32_matmul_precision("medium")
        backbone = models.BertBackbone(
            vocabulary_size=sizes["vocabulary"], num_layers=sizes["layers"], num_heads=sizes["heads"],
            hidden_dim=sizes["dim"], intermediate_dim=4 * sizes["dim"], dropout=DROPOUT, max_sequence_length=512,
        )  # fmt: skip
        model = models.BertMaskedLM(backbone=backbone, preprocessor=None)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.AdamW(RATE, weight_decay=0.01)
        model.compile(optimizer=optimizer, loss=loss, weighted_metrics=None, jit_compile=jit)
        ids, places, labels = data(sizes)
        x = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": np.ones_like(ids),
             "mask_positions": places}  # fmt: skip
        return lambda: np.asarray(model.train_on_batch(x, labels))

    return build


SYSTEMS = [
    System("llmfound, JAX", "jax", ours()),
    System("llmfound, TensorFlow, graph", "tensorflow", ours(jit=False)),
    System("llmfound, TensorFlow, XLA", "tensorflow", ours(jit=True)),
    System("llmfound, torch", "torch", ours()),
    System("llmfound, torch, oneDNN", "torch", ours(fast_matmul=True)),
    System("transformers", "torch", transformers(), peer=True),
    System("transformers, gathered", "torch", transformers(gathered=True), peer=True),
    System("transformers, gathered, oneDNN", "torch", transformers(one_dnn=True, gathered=True), peer=True),
    System("KerasHub, JAX", "jax", keras_hub(), peer=True),
    System("KerasHub, TensorFlow, graph", "tensorflow", keras_hub(jit=False), peer=True),
    System("KerasHub, TensorFlow, XLA", "tensorflow", keras_hub(jit=True), peer=True),
    System("KerasHub, torch, oneDNN", "torch", keras_hub(one_dnn=True), peer=True),
]

if __name__ == "__main__":
    tables = [Experiment(title, TRAIN, full(sizes), SMOKE) for title, sizes in SIZES.items()]
    main(__file__, __doc__, SYSTEMS, tables, rounds=2, calls=4)

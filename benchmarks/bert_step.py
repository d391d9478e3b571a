"""Training step of BERT on masked words.

How fast is ours beside Hugging Face transformers and KerasHub, with the same sizes?
"""

import functools

import numpy as np
import peers
from harness import Experiment, System, main, on_backends, on_torch, torch_step

PREDICTED = 20
DROPOUT = 0.1
RATE = 1e-4
TEXT = """One step predicts 20 masked words of each text: forward, backward and update; a vocabulary of 30522 tied
between embeddings and output, texts of 128 pieces without padding, dropout 0.1 also on the attention weights, AdamW
with weight decay. "gathered" is transformers with the 20 predicted places gathered by hand before its head, which else
runs at all places; transformers has PyTorch's fused AdamW. llmfound's last block computes the predicted places alone,
and of the others keys and values. tokens/s counts the pieces."""
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


def ours(sizes, jit):
    import llmfound

    bert = llmfound.models.BERT(
        sizes["vocabulary"], sizes["layers"], sizes["dim"], sizes["heads"], 4 * sizes["dim"], DROPOUT, DROPOUT
    )
    model = llmfound.models.BERTPretraining(bert, next_sentence=False)
    optimizer = llmfound.training.AdamW(RATE, weight_decay=0.01)
    model.compile(optimizer, {"masked_lm": llmfound.training.SmoothedCrossEntropy(0.0)}, jit_compile=jit)
    ids, places, labels = data(sizes)
    x = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "masked_positions": places}
    return lambda: model.train_on_batch(x, {"masked_lm": labels})


def transformers(sizes, gathered=False):
    import torch
    from transformers import BertForMaskedLM

    model = BertForMaskedLM(peers.bert_config(sizes, DROPOUT)).train()
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


def keras_hub(sizes, jit):
    import keras
    from keras_hub import models

    backbone = peers.keras_hub_bert(sizes, DROPOUT)
    model = models.BertMaskedLM(backbone=backbone, preprocessor=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.AdamW(RATE, weight_decay=0.01)
    model.compile(optimizer=optimizer, loss=loss, weighted_metrics=None, jit_compile=jit)
    ids, places, labels = data(sizes)
    x = {"token_ids": ids, "segment_ids": np.zeros_like(ids), "padding_mask": np.ones_like(ids),
         "mask_positions": places}  # fmt: skip
    return lambda: np.asarray(model.train_on_batch(x, labels))


SYSTEMS = [
    *on_backends("llmfound", ours),
    System("transformers", "torch", transformers, peer=True),
    *on_torch("transformers, gathered", functools.partial(transformers, gathered=True), peer=True),
    *on_backends("KerasHub", keras_hub, peer=True),
]

if __name__ == "__main__":
    tables = [Experiment(title, TEXT, full(sizes), SMOKE) for title, sizes in SIZES.items()]
    main(__file__, __doc__, SYSTEMS, tables, rounds=2, calls=4)

"""Training step of a Transformer.

One step is forward, backward and Adam on one batch. How fast is ours beside Hugging Face Marian, torch.nn.Transformer
and KerasHub's layers, with the same sizes?
"""

import numpy as np
import peers
from harness import Experiment, main, on_backends, on_torch, torch_step

TEXT = """Encoder and decoder of 6 layers each, width 512, 8 heads, feed-forward width 2048, a vocabulary of 8000 tied
between embeddings and output, 32 sentences of 32 source and 32 target tokens without padding, Adam, dropout 0.1 also on
the attention weights. Ours smooths the labels; the peers use their own loss, without. tokens/s counts target tokens."""
FULL = dict(layers=6, dim=512, heads=8, inner=2048, vocabulary=8000, batch=32, length=32, tokens=32 * 32)
SMOKE = dict(layers=1, dim=32, heads=2, inner=64, vocabulary=100, batch=4, length=8, tokens=4 * 8)
DROPOUT = 0.1
RATE = 1e-4


def data(sizes):
    """Source, shifted target and labels, int32 (batch, length), without special tokens."""
    rng = np.random.default_rng(0)
    shape = (3, sizes["batch"], sizes["length"])
    return rng.integers(4, sizes["vocabulary"], shape, dtype="int32")


def ours(sizes, jit):
    import llmfound

    model = llmfound.models.Transformer(
        vocab_size=sizes["vocabulary"],
        num_layers=sizes["layers"],
        hidden_dim=sizes["dim"],
        num_heads=sizes["heads"],
        intermediate_dim=sizes["inner"],
        dropout=DROPOUT,
        attention_dropout=DROPOUT,
    )
    loss = llmfound.training.SmoothedCrossEntropy(0.1, pad_id=0)
    model.compile(llmfound.training.Adam(RATE), loss, jit_compile=jit)
    source, target, labels = data(sizes)
    return lambda: model.train_on_batch({"source_ids": source, "target_ids": target}, labels)


def marian(sizes):
    import torch

    model = peers.marian(sizes, DROPOUT).train()
    source, target, labels = (torch.from_numpy(ids).long() for ids in data(sizes))
    loss = lambda: model(input_ids=source, decoder_input_ids=target, labels=labels).loss  # noqa: E731
    return torch_step(torch.optim.Adam(model.parameters(), RATE, fused=True), loss)


def torch_nn(sizes):
    import torch
    from torch import nn

    layers, dim, length = sizes["layers"], sizes["dim"], sizes["length"]
    model = nn.ModuleDict(
        {
            "stacks": nn.Transformer(dim, sizes["heads"], layers, layers, sizes["inner"], DROPOUT, batch_first=True),
            "tokens": nn.Embedding(sizes["vocabulary"], dim),
            "positions": nn.Embedding(256, dim),
            "dropout": nn.Dropout(DROPOUT),
        }
    ).train()
    source, target, labels = (torch.from_numpy(ids).long() for ids in data(sizes))
    causal = nn.Transformer.generate_square_subsequent_mask(length)

    def embed(ids):
        return model["dropout"](model["tokens"](ids) * dim**0.5 + model["positions"].weight[:length])

    def loss():
        hidden = model["stacks"](embed(source), embed(target), tgt_mask=causal, tgt_is_causal=True)
        logits = nn.functional.linear(hidden, model["tokens"].weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return torch_step(torch.optim.Adam(model.parameters(), RATE, fused=True), loss)


def keras_hub(sizes, jit):
    import keras
    from keras_hub import layers

    tokens = layers.ReversibleEmbedding(sizes["vocabulary"], sizes["dim"])
    inputs = [keras.Input((sizes["length"],), dtype="int32") for _ in range(2)]
    source, target = (keras.layers.Dropout(DROPOUT)(x + layers.PositionEmbedding(256)(x)) for x in map(tokens, inputs))
    for _ in range(sizes["layers"]):
        source = layers.TransformerEncoder(sizes["inner"], sizes["heads"], DROPOUT)(source)
    for _ in range(sizes["layers"]):
        target = layers.TransformerDecoder(sizes["inner"], sizes["heads"], DROPOUT)(target, source)
    model = keras.Model(inputs, tokens(target, reverse=True))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(RATE), loss, jit_compile=jit)
    source_ids, target_ids, labels = data(sizes)
    return lambda: np.asarray(model.train_on_batch([source_ids, target_ids], labels))


SYSTEMS = [
    *on_backends("llmfound", ours),
    *on_torch("Hugging Face Marian", marian, peer=True),
    *on_torch("torch.nn.Transformer", torch_nn, peer=True),
    *on_backends("KerasHub", keras_hub, peer=True),
]

if __name__ == "__main__":
    main(__file__, __doc__, SYSTEMS, [Experiment("6 + 6 layers, width 512", TEXT, FULL, SMOKE)])

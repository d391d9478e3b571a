"""Training step of the AWD-LSTM language model.

One step is forward, backward and plain gradient descent on one window of text. How fast is ours, with all its dropouts,
beside torch.nn.LSTM and Keras's own layers with the same softmax?
"""

import itertools

import numpy as np
from harness import Experiment, main, on_backends, on_torch, torch_step

TEXT = """Three LSTM layers, {dim}-{hidden}-{hidden}-{dim}, windows of {length} words, {batch} rows, a vocabulary of
{vocabulary} whose matrix is embedding and output at once; dropout 0.4, 0.3 and 0.4 of features, the same at all
positions. Ours also drops words (0.05) and recurrent weights (0.5), carries its states from step to step, and has AR
and TAR, all of which the peers leave out."""
FULL = dict(dim=400, hidden=1150, length=70, batch=32, vocabulary=30_000, tokens=70 * 32)
SMOKE = dict(dim=6, hidden=8, length=5, batch=2, vocabulary=50, tokens=10)
RATE = 1e-3
DROPOUTS = 0.4, 0.3, 0.3, 0.4


def data(sizes):
    """Words, and those one place later, int32 (batch, length)."""
    text = np.random.default_rng(0).integers(1, sizes["vocabulary"], (sizes["batch"], sizes["length"] + 1))
    return text[:, :-1].astype("int32"), text[:, 1:].astype("int32")


def ours(sizes, jit):
    import keras

    from llmfound.models import ULMFiT
    from llmfound.training import SmoothedCrossEntropy

    model = ULMFiT(sizes["vocabulary"], sizes["dim"], sizes["hidden"])
    model.compile(keras.optimizers.SGD(RATE), SmoothedCrossEntropy(0.0), jit_compile=jit)
    words, labels = data(sizes)
    inputs = {"token_ids": words, "continues": np.ones(len(words), "int32")}
    return lambda: np.asarray(model.train_on_batch(inputs, labels))


def keras_layers(sizes, jit):
    import keras
    from keras import layers

    words, labels = data(sizes)
    inputs = keras.Input(words.shape[1:], dtype="int32")
    embedding = layers.ReversibleEmbedding(sizes["vocabulary"], sizes["dim"])
    x = layers.SpatialDropout1D(DROPOUTS[0])(embedding(inputs))
    for units, rate in zip((sizes["hidden"], sizes["hidden"], sizes["dim"]), DROPOUTS[1:]):
        x = layers.SpatialDropout1D(rate)(layers.LSTM(units, return_sequences=True)(x))
    model = keras.Model(inputs, embedding(x, reverse=True))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE), loss, jit_compile=jit)
    return lambda: np.asarray(model.train_on_batch(words, labels))


def torch_nn(sizes):
    import torch
    from torch import nn

    words, labels = (torch.from_numpy(ids).long() for ids in data(sizes))
    embedding = nn.Embedding(sizes["vocabulary"], sizes["dim"])
    widths = [sizes["dim"], sizes["hidden"], sizes["hidden"], sizes["dim"]]
    lstms = nn.ModuleList(nn.LSTM(i, o, batch_first=True) for i, o in itertools.pairwise(widths))
    bias = nn.Parameter(torch.zeros(sizes["vocabulary"]))

    def dropped(x, rate):
        return x * nn.functional.dropout(torch.ones_like(x[:, :1]), rate)

    def loss():
        x = dropped(embedding(words), DROPOUTS[0])
        for lstm, rate in zip(lstms, DROPOUTS[1:]):
            x = dropped(lstm(x)[0], rate)
        logits = nn.functional.linear(x, embedding.weight, bias)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return torch_step(torch.optim.SGD([*embedding.parameters(), *lstms.parameters(), bias], RATE), loss)


SYSTEMS = [
    *on_backends("llmfound", ours),
    *on_torch("torch.nn", torch_nn, peer=True),
    *on_backends("keras.layers", keras_layers, peer=True),
]

if __name__ == "__main__":
    main(__file__, __doc__, SYSTEMS, [Experiment("AWD-LSTM", TEXT.format(**FULL), FULL, SMOKE)], rounds=3, calls=3)

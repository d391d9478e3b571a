"""Training step of recurrent networks.

One step is forward, backward and plain gradient descent on one batch. How fast are ours beside torch.nn's, Keras's own
layers, and the same networks written by hand in torch, without masks and with?
"""

import functools

import numpy as np
from harness import Experiment, main, on_backends, on_torch, torch_step

TEXT = """{what}
"masked": a padding mask of random lengths from half to all; torch.nn then packs the sequences. tokens/s counts
positions, padding included."""
LSTM = dict(kind="LSTM", batch=32, length=70, dims=[400, 1150, 1150, 400])
GRU = dict(kind="GRU", batch=80, length=30, dims=[620, 500])
SEARCH = dict(kind="RNNsearch", batch=80, length=30, vocabulary=10_000, embedding_dim=620, hidden_dim=1000,
              attention_dim=1000, maxout_dim=500)  # fmt: skip
RATE = 1e-3


def with_tokens(sizes, **changes):
    sizes = {**sizes, **changes}
    return {**sizes, "tokens": sizes["batch"] * sizes["length"]}


def data(sizes):
    """x, float32 (batch, length, dim), the lengths of the rows, longest first, and the mask, bool (batch, length)."""
    rng = np.random.default_rng(0)
    batch, length = sizes["batch"], sizes["length"]
    lengths = np.sort(rng.integers(length // 2, length + 1, batch))[::-1].copy()
    lengths[0] = length
    mask = np.arange(length) < lengths[:, None]
    if sizes["kind"] == "RNNsearch":
        return rng.integers(4, sizes["vocabulary"], (3, batch, length)).astype("int32"), lengths, mask
    return rng.standard_normal((batch, length, sizes["dims"][0]), "float32"), lengths, mask


def stack(sizes, jit, library):
    """A step of a functional model of a library's layers, Keras's own or ours."""
    import keras

    if sizes["kind"] == "RNNsearch":
        return (search if library == "llmfound" else keras_search)(sizes, jit)
    if library == "llmfound":
        from llmfound import layers
    else:
        from keras import layers
    x, _, mask = data(sizes)
    inputs = keras.Input(x.shape[1:]), keras.Input(mask.shape[1:], dtype="bool")
    y = inputs[0]
    for dim in sizes["dims"][1:]:
        layer = getattr(layers, sizes["kind"])(dim, return_sequences=True)
        layer = keras.layers.Bidirectional(layer) if sizes["kind"] == "GRU" else layer
        y = layer(y, mask=inputs[1]) if sizes["masked"] else layer(y)
    model = keras.Model(inputs, y)
    model.compile(keras.optimizers.SGD(RATE), "mse", jit_compile=jit)
    target = np.zeros((*x.shape[:2], y.shape[-1]), "float32")
    return lambda: np.asarray(model.train_on_batch([x, mask], target))


def padded(sizes):
    """Source, shifted target and labels; with "masked", filled up with 0."""
    ids, _, mask = data(sizes)
    return ids * mask if sizes["masked"] else ids


def search(sizes, jit):
    import keras

    from llmfound.models import RNNsearch

    names = ("embedding_dim", "hidden_dim", "attention_dim", "maxout_dim")
    model = RNNsearch(sizes["vocabulary"], sizes["vocabulary"], **{name: sizes[name] for name in names})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    model.compile(keras.optimizers.SGD(RATE), loss, jit_compile=jit)
    source, target, labels = padded(sizes)
    return lambda: np.asarray(model.train_on_batch({"source_ids": source, "target_ids": target}, labels))


def keras_search(sizes, jit):
    """The network out of keras.layers: Bidirectional(GRU), and a cell with attention in keras.layers.RNN."""
    import keras
    from keras import layers, ops

    n, v = sizes["hidden_dim"], sizes["vocabulary"]

    class Cell(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.gru, self.query, self.score = layers.GRUCell(n), layers.Dense(n, use_bias=False), layers.Dense(1)
            self.state_size, self.output_size = [n, (None, 2 * n), (None, n), (None,)], 3 * n

        def build(self, shape):
            self.gru.build((None, shape[-1] + 2 * n))
            self.query.build((None, n))
            self.score.build((None, n))

        def call(self, x, states):
            s, memory, keys, mask = states
            scores = self.score(ops.tanh(self.query(s)[:, None] + keys))[..., 0] - 1e9 * (1 - mask)
            context = ops.matmul(ops.softmax(scores)[:, None], memory)[:, 0]
            _, (new,) = self.gru(ops.concatenate([x, context], -1), [s])
            return ops.concatenate([s, context], -1), [new, memory, keys, mask]

    source, target, labels = padded(sizes)
    inputs = [keras.Input(source.shape[1:], dtype="int32") for _ in range(2)]
    mask = ops.not_equal(inputs[0], 0)
    words = layers.Embedding(v, sizes["embedding_dim"])(inputs[0])
    encoder = layers.Bidirectional(layers.GRU(n, return_sequences=True))
    memory = encoder(words, mask=mask) if sizes["masked"] else encoder(words)
    before = layers.Embedding(v, sizes["embedding_dim"])(inputs[1])
    state = layers.Dense(n, "tanh")(memory[:, 0, n:])
    start = [state, memory, layers.Dense(n, use_bias=False)(memory), ops.cast(mask, "float32")]
    outputs = layers.RNN(Cell(), return_sequences=True)(before, initial_state=start)
    t = layers.Dense(2 * sizes["maxout_dim"])(ops.concatenate([outputs, before], -1))
    t = ops.max(ops.reshape(t, (-1, t.shape[1], sizes["maxout_dim"], 2)), -1)
    model = keras.Model(inputs, layers.Dense(v)(t))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    model.compile(keras.optimizers.SGD(RATE), loss, jit_compile=jit)
    return lambda: np.asarray(model.train_on_batch([source, target], labels))


def torch_nn(sizes):
    """torch.nn.LSTM or GRU; for RNNsearch torch.nn.GRU and GRUCell, in a loop by hand."""
    import torch
    from torch import nn

    x, lengths, _ = data(sizes)
    if sizes["kind"] == "RNNsearch":
        model = nn.ModuleDict(torch_search_layers(sizes))
        source, target, labels = (torch.from_numpy(ids).long() for ids in padded(sizes))
        loss = lambda: torch_search_loss(model, source, target, labels, lengths, sizes)  # noqa: E731
    else:
        x, both = torch.from_numpy(x), sizes["kind"] == "GRU"
        model = nn.ModuleList(
            getattr(nn, sizes["kind"])(i, o, batch_first=True, bidirectional=both)
            for i, o in zip(sizes["dims"], sizes["dims"][1:])
        )

        def loss():
            y = nn.utils.rnn.pack_padded_sequence(x, torch.from_numpy(lengths), True) if sizes["masked"] else x
            for layer in model:
                y, _ = layer(y)
            if sizes["masked"]:
                y, _ = nn.utils.rnn.pad_packed_sequence(y, True)
            return y.square().mean()

    return torch_step(torch.optim.SGD(model.parameters(), RATE), loss)


def torch_search_layers(sizes):
    from torch import nn

    n, m, v, units = sizes["hidden_dim"], sizes["embedding_dim"], sizes["vocabulary"], sizes["attention_dim"]
    return {
        "source": nn.Embedding(v, m), "target": nn.Embedding(v, m),
        "encoder": nn.GRU(m, n, batch_first=True, bidirectional=True), "first": nn.Linear(n, n),
        "query": nn.Linear(n, units, False), "key": nn.Linear(2 * n, units, False), "score": nn.Linear(units, 1, False),
        "decoder": nn.GRUCell(m + 2 * n, n), "readout": nn.Linear(3 * n + m, 2 * sizes["maxout_dim"]),
        "words": nn.Linear(sizes["maxout_dim"], v),
    }  # fmt: skip


def torch_search_loss(model, source, target, labels, lengths, sizes):
    import torch
    from torch import nn

    x = model["source"](source)
    if sizes["masked"]:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.from_numpy(lengths), True)
    memory, last = model["encoder"](x)
    if sizes["masked"]:
        memory, _ = nn.utils.rnn.pad_packed_sequence(memory, True)
    keys, s, before, rows = model["key"](memory), torch.tanh(model["first"](last[1])), model["target"](target), []
    for t in range(target.shape[1]):
        scores = model["score"](torch.tanh(model["query"](s)[:, None] + keys))[..., 0]
        if sizes["masked"]:
            scores = scores.masked_fill(source == 0, -1e9)
        context = torch.bmm(scores.softmax(-1)[:, None], memory)[:, 0]
        rows.append(torch.cat([s, context], -1))
        s = model["decoder"](torch.cat([before[:, t], context], -1), s)
    t = model["readout"](torch.cat([torch.stack(rows, 1), before], -1))
    logits = model["words"](t.unflatten(-1, (-1, 2)).amax(-1))
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)


SYSTEMS = [
    *on_backends("llmfound", functools.partial(stack, library="llmfound")),
    *on_torch("torch.nn", torch_nn, peer=True),
    *on_backends("keras.layers", functools.partial(stack, library="keras.layers"), peer=True),
]
WHAT = {
    "LSTM": """Three LSTM layers, 400-1150-1150-400, 70 steps, 32 rows: the sizes of AWD-LSTM. The loss is the mean
square of the outputs.""",
    "GRU": """A bidirectional GRU, 620 to 500 each way, 30 steps, 80 rows, r after the product as torch has it. The loss
is the mean square of the outputs.""",
    "RNNsearch": """RNNsearch at the paper's sizes, 620, 1000, 1000 and 500, a vocabulary of 10,000, 80 pairs of 30 and
30 words. Ours has the paper's GRU, the peers torch's and Keras's, whose products are as many.""",
}
EXPERIMENTS = [
    Experiment(
        f"{sizes['kind']}{', masked' if masked else ''}",
        TEXT.format(what=WHAT[sizes["kind"]]),
        with_tokens(sizes, masked=masked),
        with_tokens(sizes, masked=masked, batch=4, length=6, **small),
    )
    for sizes, small in (
        (LSTM, dict(dims=[8, 12, 8])),
        (GRU, dict(dims=[8, 6])),
        (SEARCH, dict(vocabulary=50, embedding_dim=6, hidden_dim=8, attention_dim=8, maxout_dim=4)),
    )
    for masked in (False, True)
]

if __name__ == "__main__":
    main(__file__, __doc__, SYSTEMS, EXPERIMENTS, rounds=3, calls=3)

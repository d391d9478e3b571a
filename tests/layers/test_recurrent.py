"""Recurrent layers against Keras's own, whatever the mask, and against the equations of the papers in NumPy."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from marks import another

from llmfound import layers
from llmfound.testing import assert_close, check_layer, fixture

BATCH, LENGTH, DIM, UNITS = 4, 5, 4, 6
X = fixture("x", (BATCH, LENGTH, DIM)).astype("float32")
STATE = fixture("state", (BATCH, UNITS)).astype("float32")
MEMORY = fixture("memory", (BATCH, 7, 8)).astype("float32")
PADDING = np.arange(LENGTH) < np.array([[5], [3], [1], [2]])
# padding on the right, on the left, gaps, and a row of nothing
ANY = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
MASKS = {"no mask": None, "any mask": ANY}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def numpy(x):
    return ops.convert_to_numpy(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def fill(layer, scale=2.0):
    for weight in layer.weights:
        if weight.dtype != "uint32":  # not the state of a generator
            weight.assign(scale * fixture("/".join(weight.path.split("/")[1:]), tuple(weight.shape)))
    return layer


# LSTM and GRU are Keras's


def twins(name, **options):
    """Keras's layer and ours, with the same weights."""
    theirs = getattr(keras.layers, name)(UNITS, return_sequences=True, return_state=True, **options)
    ours = getattr(layers, name)(UNITS, return_sequences=True, return_state=True, **options)
    theirs(X), ours(X)
    fill(theirs)
    ours.set_weights(theirs.get_weights())
    return theirs, ours


def refused(*_, **__):
    raise AssertionError("Keras's own loop ran")


VARIANTS = [
    ("LSTM", {}),
    ("LSTM", dict(go_backwards=True, use_bias=False)),
    ("LSTM", dict(zero_output_for_mask=True, unit_forget_bias=False)),
    ("GRU", {}),
    ("GRU", dict(go_backwards=True)),
    ("GRU", dict(reset_after=False)),
    ("GRU", dict(reset_after=False, use_bias=False, zero_output_for_mask=True)),
]


@masks
@pytest.mark.parametrize("name, options", VARIANTS, ids=lambda x: str(x) if isinstance(x, dict) else x)
def test_values_are_those_of_keras(name, options, mask, monkeypatch):
    theirs, ours = twins(name, **options)
    for state in (None, [STATE, -STATE][: 2 if name == "LSTM" else 1]):
        expected = theirs(X, mask=mask, initial_state=state)
        if state and mask is not None and not ours.zero_output_for_mask:
            expected = [with_state_before_the_first(numpy(expected[0]), mask, ours.go_backwards), *expected[1:]]
        monkeypatch.setattr(getattr(keras.layers, name), "inner_loop", refused)
        found = ours(X, mask=mask, initial_state=state)
        monkeypatch.undo()
        assert_close(list(found), list(expected), 1e-6)
    ours.return_sequences = False
    np.testing.assert_array_equal(numpy(ours(X, mask=mask, initial_state=state)[0]), numpy(found[0])[:, -1])


def with_state_before_the_first(outputs, mask, go_backwards):
    """What Keras gives on JAX; on the other backends it has zeros before the first real position."""
    real = np.cumsum(mask[:, ::-1] if go_backwards else mask, axis=1) > 0
    return np.where(real[..., None], outputs, STATE[:, None])


@keras.saving.register_keras_serializable("test_recurrent")
class AllOutputs(keras.Model):
    """A layer's outputs and states side by side, (batch, numbers), behind a layer that shows the input's gradient."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.input_layer = keras.layers.Dense(DIM, use_bias=False, kernel_initializer="identity")

    def call(self, inputs):
        outputs = self.layer(self.input_layer(inputs["x"]), mask=inputs.get("mask"))
        return ops.concatenate([ops.reshape(o, (BATCH, -1)) for o in outputs], axis=1)


@masks
@pytest.mark.parametrize("name, options", VARIANTS, ids=lambda x: str(x) if isinstance(x, dict) else x)
def test_training_is_that_of_keras(name, options, mask):
    """A step of plain gradient descent leaves the same weights: their gradients agree, and the input's."""
    found = []
    for layer in twins(name, **options):
        model = AllOutputs(layer)
        inputs = {"x": X} if mask is None else {"x": X, "mask": mask}
        size = model(inputs).shape[1]
        model.compile(keras.optimizers.SGD(1.0), "mse")
        model.train_on_batch(inputs, 50 * fixture("target", (BATCH, size)).astype("float32"))
        found.append(model.get_weights())
    assert_close(found[1], found[0], 1e-5)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_what_only_keras_can_do_is_done_by_keras(name):
    for options in (dict(unroll=True), dict(activation="relu"), dict(recurrent_activation="hard_sigmoid")):
        theirs, ours = twins(name, **options)
        assert_close(ours(X), theirs(X), 1e-6)
    layer = getattr(layers, name)(UNITS, weight_dropout=0.5, activation="relu")
    with pytest.raises(ValueError, match=r"weight_dropout is the native loop's.*tanh and sigmoid"):
        layer(X)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_weight_dropout_drops_recurrent_weights_in_training_only(name):
    layer = fill_after(getattr(layers, name)(UNITS, weight_dropout=0.5, return_sequences=True))
    plain = getattr(layers, name)(UNITS, return_sequences=True)
    plain(X)
    plain.set_weights(layer.get_weights()[: len(plain.weights)])
    assert_close(layer(X), plain(X), 0)
    draws = np.stack([numpy(layer(X, training=True)) for _ in range(8)])
    assert_close(draws[:, :, 0], np.broadcast_to(numpy(plain(X))[:, 0], draws[:, :, 0].shape), 1e-6)  # no state yet
    assert draws[:, :, 1:].std(axis=0).max() > 0.01


def fill_after(layer):
    layer(X)
    return fill(layer)


@pytest.mark.parametrize("name", ["LSTM", another("GRU")])
def test_in_both_directions_and_stacked_in_a_model_that_is_saved(name, tmp_path):
    wrapped = keras.layers.Bidirectional(getattr(layers, name)(UNITS, return_sequences=True, weight_dropout=0.1))
    last = getattr(layers, name)(2, stateful=False)
    model = keras.Sequential([keras.layers.Embedding(9, DIM, mask_zero=True), wrapped, last])
    ids = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [0, 0, 0, 0, 0]])
    expected = model.predict(ids, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(ids, verbose=0), expected, 1e-6)
    assert type(loaded.layers[1].forward_layer) is getattr(layers, name)
    loaded.compile("adam", "mse")
    history = loaded.fit(ids, np.ones((3, 2)), epochs=30, verbose=0).history["loss"]
    assert history[-1] < history[0]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch.utils.checkpoint")
@pytest.mark.parametrize("rate", ["dropout", "recurrent_dropout"])
@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
def test_masks_are_new_after_a_pass_that_torch_repeated(kind, rate):
    import torch

    layer, x = kind(UNITS, **{rate: 0.5}), torch.tensor(X).requires_grad_()
    run = functools.partial(layer, training=True)
    run(x)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = run(x)
        torch.manual_seed(seed)
        found = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
        assert_close(found, expected, 0)
        (found, expected) = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
        assert_close(found, expected, 1e-6)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="compiled steps of Keras carry no state on JAX")
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_a_state_is_carried_from_batch_to_batch_in_training(name):
    x = keras.Input(batch_shape=(BATCH, LENGTH, DIM))
    layer = getattr(layers, name)(UNITS, stateful=True, return_sequences=True)
    model = keras.Model(x, layer(x))
    whole = getattr(layers, name)(UNITS, return_sequences=True)
    whole(X)
    whole.set_weights(fill(layer).get_weights()[: len(whole.weights)])
    layer.reset_state()
    again = np.concatenate([X, X], axis=1)
    expected = numpy(whole(again))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    target = np.zeros((BATCH, LENGTH, UNITS), "float32")
    model.train_on_batch(X, target)
    assert_close(model.predict_on_batch(X), expected[:, LENGTH:], 1e-5)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_a_dtype_of_its_own_inside_a_wrapper(name):
    """keras.layers.TimeDistributed calls what it wraps without casting."""
    layer = getattr(layers, name)(UNITS, dtype="mixed_bfloat16")
    y = keras.layers.TimeDistributed(layer)(X[:, None])
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16" and y.shape == (BATCH, 1, UNITS)
    assert_close(ops.cast(y[:, 0], "float32"), ops.cast(layer(X), "float32"), 1e-3)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_check_lstm_and_gru(name):
    check_layer(lambda: getattr(layers, name)(UNITS, return_sequences=True), {"sequences": X, "mask": PADDING},
                mask="mask", expected_shape=(BATCH, LENGTH, UNITS))  # fmt: skip


# GatedRecurrence


def gated(w, x, state, mask, reverse, reset_after, update):
    """Bahdanau et al. 2015, appendix A, one row and one position at a time."""
    n = UNITS
    bias = w.get("bias", np.zeros(3 * n)), w.get("recurrent_bias", np.zeros(3 * n))
    states, last = np.zeros((*x.shape[:2], n)), state.copy()
    for b in range(len(x)):
        h = state[b]
        for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
            if mask is None or mask[b, t]:
                a, u = x[b, t] @ w["kernel"] + bias[0], h @ w["recurrent_kernel"] + bias[1]
                z, r = sigmoid(a[:n] + u[:n]), sigmoid(a[n : 2 * n] + u[n : 2 * n])
                inner = r * u[2 * n :] if reset_after else (r * h) @ w["recurrent_kernel"][:, 2 * n :]
                c = np.tanh(a[2 * n :] + inner)
                h = (1 - z) * h + z * c if update == "new" else z * h + (1 - z) * c
            states[b, t] = h
        last[b] = h
    return states, last


@masks
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(update="old", use_bias=False), dict(reset_after=True, use_recurrent_bias=True)],
    ids=["paper", "Keras's update", "reset after"],
)
def test_gated_recurrence(mask, reverse, options):
    layer = layers.GatedRecurrence(UNITS, **options)
    layer(X)
    weights = {w.name: numpy(w).astype("float64") for w in fill(layer).weights}
    rule = dict(reset_after=options.get("reset_after", False), update=options.get("update", "new"))
    expected = gated(weights, X, STATE, mask, reverse, **rule)
    assert_close(layer(X, state=STATE, mask=mask, reverse=reverse), expected, 1e-6)


def test_it_is_keras_gru_with_the_update_gate_negated():
    """papers: z_keras = 1 - z_paper."""
    ours = layers.GatedRecurrence(UNITS)
    ours(X)
    theirs = keras.layers.GRU(UNITS, reset_after=False, return_sequences=True)
    theirs(X)
    flip = np.repeat([-1.0, 1.0, 1.0], UNITS)
    theirs.set_weights([numpy(w) * flip for w in fill(ours).weights])
    assert_close(ours(X)[0], theirs(X), 1e-6)


def test_each_gate_starts_with_an_orthogonal_matrix_of_its_own():
    layer = layers.GatedRecurrence(32)
    layer(np.zeros((1, 1, 3), "float32"))
    blocks = np.split(numpy(layer.recurrent_kernel), 3, axis=1)
    for block in blocks:
        assert np.abs(block.T @ block - np.eye(32)).max() < 1e-5
    assert np.abs(blocks[0] - blocks[1]).max() > 0.1
    with pytest.raises(ValueError, match=r"fills \(n, k n\); got shape \(3, 7\)"):
        layers.SquareOrthogonal()((3, 7))


def test_a_seeded_initializer_repeats_itself():
    draws = [numpy(layers.SquareOrthogonal(seed=3)((4, 8))) for _ in range(2)]
    np.testing.assert_array_equal(*draws)
    assert np.abs(draws[0][:, :4] - draws[0][:, 4:]).max() > 0.1


def test_the_mask_that_comes_with_the_inputs():
    ids = np.array([[1, 2, 3, 0, 0], [4, 3, 2, 1, 0]], "int32")
    masked = keras.layers.Embedding(5, 3, mask_zero=True)(ids)
    layer, state = layers.GatedRecurrence(UNITS), STATE[:2]
    assert_close(layer(masked, state=state), layer(numpy(masked), state=state, mask=ids != 0), 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_half_the_precision(dtype):
    layer = layers.GatedRecurrence(UNITS, dtype=dtype)
    layer(X)
    recurrent = numpy(ops.cast(layer.recurrent_kernel, "float32"))[:, :UNITS]
    assert np.abs(recurrent.T @ recurrent - np.eye(UNITS)).max() < 0.02


def test_check_gated_recurrence():
    check_layer(lambda: layers.GatedRecurrence(UNITS), {"x": X, "mask": PADDING}, mask="mask",
                expected_shape=[(BATCH, LENGTH, UNITS), (BATCH, UNITS)])  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(units=0), "units must be positive; got 0"),
        (dict(units=2, update="both"), "update must be .*; got 'both'"),
        (dict(units=2, use_recurrent_bias=True), "needs reset_after=True"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        layers.GatedRecurrence(**options)


# AttentionCell


def attention_cell(cell=keras.layers.GRUCell):
    return layers.AttentionCell(cell(UNITS), units=5, memory_dim=MEMORY.shape[-1])


@pytest.mark.parametrize("cell", [keras.layers.GRUCell, keras.layers.LSTMCell])
def test_attention_cell_in_a_recurrent_decoder(cell):
    decoder = keras.layers.RNN(attention_cell(cell), return_sequences=True)
    mask = np.arange(7) < np.array([[7], [4], [2], [1]])
    states = [STATE, STATE][: 2 if cell is keras.layers.LSTMCell else 1]
    start = decoder.cell.start(states, MEMORY, mask)
    outputs = numpy(decoder(X, initial_state=start))
    assert outputs.shape == (BATCH, LENGTH, UNITS + 8)
    own, expected = states, []
    for t in range(LENGTH):  # the same by hand
        context, _ = decoder.cell.attention(own[0][:, None], MEMORY, mask)
        x = np.concatenate([X[:, t], numpy(context)[:, 0]], -1)
        output, own = decoder.cell.cell(x, own if len(own) > 1 else own[0])
        own = [numpy(s) for s in (own if isinstance(own, (list, tuple)) else [own])]
        expected.append(np.concatenate([numpy(output), numpy(context)[:, 0]], -1))
    assert_close(outputs, np.stack(expected, 1), 1e-6)


class MinimalCell(keras.layers.Layer):
    """As in Keras's guide: one state, which comes in a list."""

    state_size = UNITS

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], UNITS), name="kernel")

    def call(self, x, states):
        h = ops.tanh(ops.matmul(x, self.kernel) + states[0])
        return h, [h]


@pytest.mark.parametrize("cells", [MinimalCell, [keras.layers.LSTMCell] * 2, [keras.layers.GRUCell]])
def test_attention_around_a_users_cell_and_around_stacked_ones(cells):
    states = [STATE]
    if isinstance(cells, list):
        states = [[STATE, 2 * STATE] if make is keras.layers.LSTMCell else STATE for make in cells]
        cells = functools.partial(keras.layers.StackedRNNCells, [make(UNITS) for make in cells])
    cell = layers.AttentionCell(cells(), units=5, memory_dim=MEMORY.shape[-1])
    outputs = numpy(keras.layers.RNN(cell)(X[:, :1], initial_state=cell.start(states, MEMORY)))
    context = numpy(cell.attention(STATE[:, None], MEMORY)[0])[:, 0]
    expected = numpy(cell.cell(np.concatenate([X[:, 0], context], -1), states)[0])
    assert_close(outputs, np.concatenate([expected, context], -1), 1e-6)


@keras.saving.register_keras_serializable("test_recurrent")
class Decoder(keras.Model):
    """What a user writes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.decoder = keras.layers.RNN(attention_cell(), return_sequences=True)
        self.readout = keras.layers.Dense(3)

    def call(self, inputs):
        first = ops.mean(inputs["memory"], axis=1)[:, :UNITS]
        start = self.decoder.cell.start([first], inputs["memory"])
        return self.readout(self.decoder(inputs["x"], initial_state=start))


def test_a_users_decoder_trains_and_is_saved(tmp_path):
    model = Decoder()
    inputs = {"x": X, "memory": MEMORY}
    model(inputs)
    model.compile("adam", "mse")
    history = model.fit(inputs, np.ones((BATCH, LENGTH, 3), "float32"), epochs=20, verbose=0).history["loss"]
    assert history[-1] < history[0]
    before = [numpy(w) for w in Decoder().decoder.weights]
    assert all(len(w.shape) for w in before)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(inputs, verbose=0), model.predict(inputs, verbose=0), 1e-6)


def test_masked_words_leave_the_states_as_they_are():
    decoder = keras.layers.RNN(attention_cell(), return_sequences=True, zero_output_for_mask=True)
    start = decoder.cell.start([STATE], MEMORY)
    mask = np.ones((BATCH, LENGTH), bool)
    mask[:, 1] = False
    outputs = numpy(decoder(X, initial_state=start, mask=mask))
    without = np.delete(X, 1, axis=1)
    assert_close(np.delete(outputs, 1, axis=1), numpy(decoder(without, initial_state=start)), 1e-6)
    assert not outputs[:, 1].any()


def test_bad_cells():
    for cell in (
        keras.layers.GRUCell(3, dropout=0.1),
        keras.layers.StackedRNNCells([keras.layers.LSTMCell(3, recurrent_dropout=0.1)]),
    ):
        with pytest.raises(ValueError, match="cell must be one without dropout"):
            layers.AttentionCell(cell, 4, 8)
    with pytest.raises(ValueError, match="A decoder with attention begins with its memory"):
        keras.layers.RNN(attention_cell())(X)
    with pytest.raises(ValueError, match="could be saved, but not loaded: its file has the cell twice"):
        attention_cell().start([keras.Input((UNITS,))], keras.Input(MEMORY.shape[1:]))
    with pytest.raises(ValueError, match="cell must be a Keras cell"):
        layers.AttentionCell(keras.layers.Dense(3), 4, 5)
    with pytest.raises(ValueError, match="memory_dim must be positive; got 0"):
        layers.AttentionCell(keras.layers.GRUCell(3), 4, 0)
    with pytest.raises(ValueError, match=r"The cell has 2 states, of sizes \[3, 3\]; got 1"):
        layers.AttentionCell(keras.layers.LSTMCell(3), 4, 8).start([STATE], MEMORY)


# Maxout


def test_maxout_takes_the_greater_of_neighbours():
    x = np.array([[1.0, 3.0, -2.0, -5.0, 0.0, 0.5]], "float32")
    assert_close(layers.Maxout()(x), np.array([[3.0, -2.0, 0.5]]), 0)
    assert_close(layers.Maxout(3)(x), np.array([[3.0, 0.5]]), 0)
    with pytest.raises(ValueError, match=r"divisible by pieces \(4\); got 6"):
        layers.Maxout(4)(x)
    with pytest.raises(ValueError, match="pieces must be positive; got 0"):
        layers.Maxout(0)
    check_layer(layers.Maxout, {"x": X}, expected_shape=(BATCH, LENGTH, DIM // 2))

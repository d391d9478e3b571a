"""Recurrence at native speed: Keras's LSTM and GRU, the GRU of RNNsearch, and a cell that looks at a memory."""

import functools

import keras
from keras import activations, initializers, layers, ops

from llmfound import kernels
from llmfound.base import Configured, Layer, Recomputed
from llmfound.initializers import SquareOrthogonal
from llmfound.layers.attention import AdditiveAttention
from llmfound.layers.dropout import Dropout


class GatedRecurrence(Layer):
    """The gated recurrent units of RNNsearch, and with other arguments those of its followers.

    z = sigmoid(x Wz + h Uz + bz),  r = sigmoid(x Wr + h Ur + br),  c = tanh(x W + (r h) U + b)
    h_t = (1 - z) h_{t-1} + z c;  where the mask is False, h_t = h_{t-1}
    Source: Bahdanau, Cho, Bengio 2015, appendix A.1.1 and A.2.1. Keras and PyTorch let z weigh the old state, and
    PyTorch has no form in which r comes before the product with U.

    Args:
        units: Width (n in the paper).
        reset_after: Whether r multiplies h U instead of h.
        update: What z weighs: "new", c, as in the paper; or "old", h_{t-1}, as in Cho et al. 2014.
        use_bias: Whether the inputs' products have biases.
        use_recurrent_bias: Whether h's products have biases of their own; for `reset_after` only.
        kernel_initializer: Of Wz, Wr and W.
        recurrent_initializer: Of Uz, Ur and U, which are (n, 3n) in one; None draws three orthogonal matrices.

    Call arguments:
        x: float (batch, length, dim).
        state: float (batch, units), h_0; None is zero.
        mask: bool (batch, length), True at real positions, in any pattern. None takes the mask that came with x, if one
            did, and reads everything else.
        reverse: whether to read from the last position to the first.

    Returns:
        h at every position, float (batch, length, units), and the last h, (batch, units).

    Raises:
        ValueError: if `units` is not positive, `update` is unknown, or a recurrent bias has no product of its own.
    """

    def __init__(self, units, reset_after=False, update="new", use_bias=True, use_recurrent_bias=False,
                 kernel_initializer="glorot_uniform", recurrent_initializer=None, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        if units <= 0:
            raise ValueError(f"units must be positive; got {units}.")
        if update not in ("new", "old"):
            raise ValueError(f'update must be "new" or "old", what z weighs; got {update!r}.')
        if use_recurrent_bias and not reset_after:
            raise ValueError("use_recurrent_bias needs reset_after=True: else the inputs' biases are the same thing.")
        self.units = units
        self.rule = dict(reset_after=reset_after, update=update)
        self.use_bias = use_bias
        self.use_recurrent_bias = use_recurrent_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.recurrent_initializer = recurrent_initializer or SquareOrthogonal()
        self.supports_masking = True

    def build(self, x_shape, **_):
        width, biases = 3 * self.units, dict(initializer="zeros", shape=(3 * self.units,))
        self.kernel = self.add_weight(shape=(x_shape[-1], width), initializer=self.kernel_initializer, name="kernel")
        self.recurrent_kernel = self.add_weight(
            shape=(self.units, width), initializer=self.recurrent_initializer, name="recurrent_kernel"
        )
        self.bias = self.add_weight(name="bias", **biases) if self.use_bias else None
        self.recurrent_bias = self.add_weight(name="recurrent_bias", **biases) if self.use_recurrent_bias else None

    def call(self, x, state=None, mask=None, reverse=False, x_mask=None):
        kernel, bias = self.tensors(self.kernel, self.bias)
        return self.run(x, state, x_mask if mask is None else mask, reverse, kernel, bias)

    def run(self, x, state, mask=None, reverse=False, kernel=None, bias=None):
        """`call` with given input weights; without, x are the gates' inputs already, (batch, length, 3 units)."""
        if state is None:
            state = ops.zeros((ops.shape(x)[0], self.units), x.dtype)
        recurrent = self.tensors(self.recurrent_kernel, self.recurrent_bias)
        return kernels.gru(x, state, kernel, recurrent[0], bias, recurrent[1], mask, reverse, **self.rule)

    def project(self, x):
        """What the inputs give to the three gates, float (..., 3 units): x W + b."""
        return kernels.dense(x, *self.tensors(self.kernel, self.bias))

    def parts(self):
        """The weights that a loop of one's own multiplies by, as `kernels.recurrence` takes them."""
        return kernels.gru_weights(self.tensors(self.recurrent_kernel)[0], self.rule["reset_after"])

    def advance(self, h, gates, product, recurrent_bias=None):
        """One step of a loop of one's own: the next h from h and the gates' inputs (batch, 3 units)."""
        return kernels.gru_step(h, gates, product, recurrent_bias, **self.rule)

    def tensors(self, *weights):
        """Weights in the dtype of computation."""
        return [None if w is None else ops.cast(ops.convert_to_tensor(w), self.compute_dtype) for w in weights]


class _Native:
    """What LSTM and GRU add to Keras's: the whole loop by a kernel, and dropout of recurrent weights."""

    def _set_up(self, weight_dropout):
        self.weight_dropout = Dropout(weight_dropout, name="weight_dropout", dtype=self.dtype_policy)

    def _maybe_config_dropout_masks(self, cell, *args):
        self._maybe_reset_dropout_masks(cell)  # a pass that PyTorch repeats is broken off before it lets go of its own
        super()._maybe_config_dropout_masks(cell, *args)

    def inner_loop(self, sequences, initial_state, mask, training=False):
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        reason = self._why_not()
        if reason and self.weight_dropout.rate:
            raise ValueError(f"weight_dropout is the native loop's, which cannot run here: {reason}.")
        if reason or (mask is None and not self.weight_dropout.rate and self.use_cudnn and _keras_has_a_gpu()):
            return super().inner_loop(sequences, initial_state, mask, training)
        cast = lambda x: ops.cast(x, self.compute_dtype)  # noqa: E731  wrappers such as TimeDistributed leave it to us
        sequences, initial_state = cast(sequences), [cast(state) for state in initial_state]
        if self.stateful:  # `call` will write over the variables, while PyTorch may still need what they held
            initial_state = [ops.copy(ops.stop_gradient(state)) for state in initial_state]
        if training and self.dropout:
            sequences = sequences * self.cell.get_dropout_mask(sequences[:, 0, :])[:, None]
        outputs, states = self.run(sequences, initial_state, mask, training)
        if self.zero_output_for_mask and mask is not None:
            outputs = ops.where(mask[..., None], outputs, ops.zeros((), outputs.dtype))
        if self.go_backwards:
            outputs = ops.flip(outputs, axis=1)
        return outputs[:, -1], outputs, states

    def run(self, x, state, mask=None, training=False, window=None):
        """The native loop, and only that: outputs float (batch, length, units), and the last states, a list.

        Args:
            x: float (batch, length, dim); state: list of float (batch, units); mask: bool (batch, length) or None.
            training: whether recurrent weights are dropped.
            window: int; the state passes from one window of so many positions to the next without its gradient.
        """
        cast = lambda w: None if w is None else ops.cast(ops.convert_to_tensor(w), x.dtype)  # noqa: E731
        kernel, recurrent_kernel, bias = map(cast, (self.cell.kernel, self.cell.recurrent_kernel, self.cell.bias))
        recurrent_kernel = self.weight_dropout(recurrent_kernel, training=training)
        return self._loop(x, state, kernel, recurrent_kernel, bias, mask, window)

    def _why_not(self):
        """What only Keras's own loop can do; None if nothing of that is asked for."""
        if self.recurrent_dropout:
            return "recurrent_dropout draws masks for the state"
        if self.activation is not activations.tanh or self.recurrent_activation is not activations.sigmoid:
            return "its activations are tanh and sigmoid"
        if self.unroll:
            return "unroll=True asks for another loop"
        return None


@functools.cache
def _keras_has_a_gpu():
    """Whether Keras can take cuDNN's loops where there is no mask; on PyTorch our kernels take them, with masks too."""
    if keras.backend.backend() == "torch":
        return False
    return any(not device.startswith("cpu") for device in keras.distribution.list_devices())


class LSTM(Recomputed, Configured, _Native, layers.LSTM):
    """keras.layers.LSTM, faster, with a mask as fast as without, and with dropout of the recurrent weights.

    Weights, arguments and results are those of keras.layers.LSTM, whose loop also runs where only it can: under
    recurrent_dropout, unroll, or other activations, and with cuDNN on the GPU of another backend than PyTorch. There,
    torch's own LSTM runs, oneDNN's or cuDNN's. Before the first real position the output is the initial state on every
    backend; Keras has zeros there on two of them. With stateful=True it can be trained on PyTorch, too; on JAX, the
    compiled steps of Keras 3.15.1 carry no state. jax.jvp and the transforms of torch.func refuse the native loops;
    with LLMFOUND_KERNELS=reference in the environment they work. jax.shard_map takes them, as it does Keras's loops,
    with check_vma=False.
    Source: Hochreiter and Schmidhuber 1997; weight dropout, Merity, Keskar, Socher 2018, section 2.

    Args:
        units: Width (n).
        weight_dropout: Fraction of the recurrent kernel's elements dropped in training, the same ones at every
            position and for all rows, 0 to 1.
        **kwargs: of keras.layers.LSTM.

    Call arguments, returns: as keras.layers.LSTM.

    Raises:
        ValueError: if `weight_dropout` is outside [0, 1), or asked for together with what only Keras's loop can do.
    """

    def __init__(self, units, weight_dropout=0.0, **kwargs):
        super().__init__(units, **kwargs)
        self._set_up(weight_dropout)

    def _loop(self, x, state, kernel, recurrent_kernel, bias, mask, window):
        outputs, state = kernels.lstm(x, state, kernel, recurrent_kernel, bias, mask, self.go_backwards, window)
        return outputs, list(state)


class GRU(Recomputed, Configured, _Native, layers.GRU):
    """keras.layers.GRU, faster, with a mask as fast as without, and with dropout of the recurrent weights.

    As LSTM is to keras.layers.LSTM. RNNsearch's units are GatedRecurrence. Source: Cho et al. 2014, section 2.3.

    Args:
        units: Width (n).
        weight_dropout: as in LSTM.
        **kwargs: of keras.layers.GRU.

    Call arguments, returns: as keras.layers.GRU.

    Raises:
        ValueError: as LSTM.
    """

    def __init__(self, units, weight_dropout=0.0, **kwargs):
        super().__init__(units, **kwargs)
        self._set_up(weight_dropout)

    def _loop(self, x, state, kernel, recurrent_kernel, bias, mask, window):
        if window is not None:
            raise ValueError(f"GRU has no windows; got window={window}. LSTM has them.")
        after = self.cell.reset_after
        bias, recurrent_bias = (bias[0], bias[1]) if after and bias is not None else (bias, None)
        outputs, state = kernels.gru(
            x, state[0], kernel, recurrent_kernel, bias, recurrent_bias, mask, self.go_backwards, after
        )
        return outputs, [state]


class AttentionCell(Layer):
    """A recurrent cell that looks at a memory before every step: a decoder for keras.layers.RNN.

    c_i = attention(s_{i-1}, memory),  s_i = cell([x_i; c_i], s_{i-1}),  output_i = [s_i; c_i]
    Source: Bahdanau, Cho, Bengio 2015, section 3.1, for any cell.

        cell = llmfound.layers.AttentionCell(keras.layers.GRUCell(256), units=256, memory_dim=512)
        decoder = keras.layers.RNN(cell, return_sequences=True)
        outputs = decoder(words, initial_state=cell.start([first_state], memory, mask))

    Where the words have a mask, too, RNN needs zero_output_for_mask=True on JAX: Keras 3.15.1 would repeat the first
    state there, which has not the output's width.

    Args:
        cell: A Keras cell with one or more states, of which the first is the query, such as GRUCell or LSTMCell.
        units: Width of the scoring network (n').
        memory_dim: Width of the memory.

    Call arguments:
        x: float (batch, dim), the input of one step.
        states: the cell's states and what `start` adds to them: the memory, its projection and its mask, a row each.

    Returns:
        float (batch, output of the cell + memory_dim), and the states.

    Raises:
        ValueError: if `cell` is no cell or has dropout, a size is not positive, or the states are not from `start`.
    """

    def __init__(self, cell, units, memory_dim, **kwargs):
        super().__init__(**kwargs)
        if not hasattr(cell, "state_size"):
            raise ValueError(f"cell must be a Keras cell, with state_size, such as GRUCell; got {cell!r}.")
        if any(
            getattr(one, name, 0) for one in getattr(cell, "cells", [cell]) for name in ("dropout", "recurrent_dropout")
        ):
            raise ValueError(
                "cell must be one without dropout: keras.layers.RNN draws new masks only for cells that it has itself, "
                "and this one would keep its first for ever. Drop of the decoder's inputs or outputs instead."
            )
        if memory_dim <= 0:
            raise ValueError(f"memory_dim must be positive; got {memory_dim}.")
        self.cell = cell
        self.units = units
        self.memory_dim = memory_dim
        self.attention = AdditiveAttention(units, name="attention", dtype=self.dtype_policy)
        self._sizes = keras.tree.flatten(cell.state_size)
        self.state_size = [*self._sizes, (None,), (None,), (None,)]
        self.output_size = getattr(cell, "output_size", None) or self._sizes[0]
        self.output_size += memory_dim

    def build(self, x_shape, states_shape=None):
        if not self.cell.built:
            self.cell.build((*x_shape[:-1], x_shape[-1] + self.memory_dim))
        if not self.attention.built:
            with self._open_name_scope():
                self.attention.build((None, None, self._sizes[0]), (None, None, self.memory_dim))

    def start(self, states, memory, mask=None):
        """The initial states of the decoder, with the memory projected once.

        Args:
            states: list of the cell's own, float (batch, size) each; of StackedRNNCells, the lists of its cells.
            memory: float (batch, length, memory_dim).
            mask: bool (batch, length), True at real positions.

        Returns:
            `states`, and the memory (batch, length x memory_dim), its projection (batch, length x units) and the mask
            (batch, length): Keras masks states of no other rank on JAX.

        Raises:
            ValueError: if there are not as many states as the cell has, or the memory is a functional model's.
        """
        states = keras.tree.flatten(states)
        if len(states) != len(self._sizes):
            raise ValueError(f"The cell has {len(self._sizes)} states, of sizes {self._sizes}; got {len(states)}.")
        if isinstance(memory, keras.KerasTensor):
            raise ValueError(
                "A functional model with an AttentionCell could be saved, but not loaded: its file has the cell twice. "
                "Call start() in the call() of a keras.Model of your own."
            )
        if not self.attention.built:
            self.attention.build((None, None, self._sizes[0]), tuple(memory.shape))
        mask = ops.ones_like(memory[..., 0]) if mask is None else ops.cast(mask, memory.dtype)
        rows, keys = ops.shape(memory)[0], self.attention.project(memory)
        return [*states, ops.reshape(memory, (rows, -1)), ops.reshape(keys, (rows, -1)), mask]

    def get_initial_state(self, batch_size=None):
        raise ValueError("A decoder with attention begins with its memory: give it initial_state=cell.start(...).")

    def call(self, x, states, training=None):
        *own, memory, keys, mask = states
        rows = ops.shape(x)[0]
        memory, keys = (ops.reshape(memory, (rows, -1, self.memory_dim)), ops.reshape(keys, (rows, -1, self.units)))
        context, _ = self.attention(own[0][:, None], memory, mask > 0.5, keys, training=training)
        x = ops.concatenate([x, context[:, 0]], axis=-1)
        sizes = self.cell.state_size
        own = keras.tree.pack_sequence_as(sizes if isinstance(sizes, (list, tuple)) else [sizes], own)  # a list always
        output, own = self.cell(x, own, training=training)
        return ops.concatenate([output, context[:, 0]], axis=-1), [*keras.tree.flatten(own), *states[-3:]]

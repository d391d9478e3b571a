"""Words and positions as vectors."""

from keras import initializers, layers, ops

from llmfound import kernels
from llmfound.base import Configured, KeepsAdapter, Layer, Recomputed, is_known, plain
from llmfound.ops import sinusoids


class Embedding(Recomputed, KeepsAdapter, Configured, layers.Embedding):
    """keras.layers.Embedding that trains on TensorFlow as it does on the other backends.

    Arguments, weights and results are Keras's. There, on TensorFlow, the shares that a repeated id has in the gradient
    are squared and clipped one by one by Keras's optimizers (3.15.1), so that Adam takes other steps.
    """

    def __init__(self, input_dim, output_dim, *args, **kwargs):
        super().__init__(plain(input_dim), output_dim, *args, **kwargs)

    def call(self, inputs):
        if self.quantization_mode is not None:
            return super().call(inputs)
        return ops.cast(kernels.embed(self.embeddings, ops.cast(inputs, "int32")), self.compute_dtype)


class PositionEmbedding(Layer):
    """Adds a learned vector of its position to every vector.

    y_t = x_t + P[t], t from 0.  Source: Gehring et al. 2017, section 3.1; Devlin et al. 2019, section 3.2.

    Args:
        max_length: Longest sequence it accepts.
        embeddings_initializer: Of P (truncated normal 0.02 in BERT).

    Call arguments:
        x: float (batch, length, dim).
        start: int, position of the first vector; a decoder that goes step by step passes its step.

    Returns:
        float (batch, length, dim).

    Raises:
        ValueError: if `max_length` is not positive, or the sequence is longer.
    """

    def __init__(self, max_length, embeddings_initializer="uniform", **kwargs):
        super().__init__(**kwargs)
        if max_length <= 0:
            raise ValueError(f"max_length must be positive; got {max_length}.")
        self.max_length = max_length
        self.initializer = initializers.get(embeddings_initializer)
        self.supports_masking = True

    def build(self, input_shape):
        self.embeddings = self.add_weight((self.max_length, input_shape[-1]), self.initializer, name="embeddings")

    def call(self, x, start=None):
        return _placed(x, ops.convert_to_tensor(self.embeddings), start)

    def compute_output_shape(self, input_shape, **kwargs):
        return input_shape


class PositionalEncoding(Layer):
    """Adds a fixed sinusoid of its position to every vector.

    PE[pos, 2i] = sin(pos / 10000^(2i/dim)),  PE[pos, 2i+1] = cos(pos / 10000^(2i/dim)),  pos from 0
    Source: Vaswani et al. 2017, section 3.5; `layout="concatenated"`: the authors' code, see `ops.sinusoids`.

    Args:
        max_length: Longest sequence it accepts.
        layout: "interleaved" or "concatenated".

    Call arguments:
        x: float (batch, length, dim), dim even.
        start: int, position of the first vector; a decoder that goes step by step passes its step.

    Returns:
        float (batch, length, dim).

    Raises:
        ValueError: if dim is odd, the layout is unknown, or the sequence is longer than `max_length`.
    """

    def __init__(self, max_length=1024, layout="interleaved", **kwargs):
        super().__init__(**kwargs)
        if max_length <= 0:
            raise ValueError(f"max_length must be positive; got {max_length}.")
        if layout not in ("interleaved", "concatenated"):
            raise ValueError(f'layout must be "interleaved" or "concatenated"; got {layout!r}.')
        self.max_length = max_length
        self.layout = layout
        self.supports_masking = True
        self.built = True

    def call(self, x, start=None):
        return _placed(x, sinusoids(self.max_length, int(x.shape[-1]), self.layout), start)

    def compute_output_shape(self, input_shape, **kwargs):
        return input_shape


def _placed(x, table, start):
    """x plus the rows of a table of positions (max_length, dim), from row `start`."""
    length = x.shape[1]
    known = is_known(length)
    check_length(length + (start if isinstance(start, int) else 0) if known else 0, table.shape[0])
    if start is None and known:
        return x + ops.cast(table[:length], x.dtype)
    positions = ops.arange(ops.shape(x)[1], dtype="int32") + (0 if start is None else ops.cast(start, "int32"))
    if isinstance(length, int) and not known:  # it matters only that there are so many rows
        positions = ops.minimum(positions, table.shape[0] - 1)
    return x + ops.cast(ops.take(table, positions, axis=0), x.dtype)


def check_length(length, max_length):
    """Raises ValueError if a sequence, whose length may be unknown, is longer than a table of positions."""
    if isinstance(length, int) and length > max_length:
        raise ValueError(
            f"A sequence of {length} is longer than the position table ({max_length}); "
            f"shorten it or build the layer or model with max_length={length}."
        )

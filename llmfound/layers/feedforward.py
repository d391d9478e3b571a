"""The position-wise network of a Transformer layer, and the maxout of RNNsearch's output."""

from keras import layers, ops

from llmfound import kernels
from llmfound.base import Configured, Direct, KeepsAdapter, Layer, Recomputed, lean, overrides
from llmfound.initializers import fresh


class Dense(Direct, Recomputed, KeepsAdapter, Configured, layers.Dense):
    """keras.layers.Dense whose product and bias are one call where the framework has one (`kernels.dense`).

    Arguments, weights and results are Keras's.
    """

    def call(self, inputs, training=None):
        if self.quantization_mode is not None:
            return super().call(inputs, training=training)
        return self.activation(kernels.dense(inputs, self.kernel, self.bias))

    def quantize(self, mode=None, type_check=True, config=None):
        return super().quantize(mode, type_check=False, config=config)  # Keras refuses its subclasses otherwise


class KernelDense(Dense):
    """A Dense whose kernel a loop multiplies by without it, and which therefore is not quantized."""

    def quantize(self, mode=None, type_check=True, config=None):
        raise NotImplementedError(f"{self.path} stays as it is, for its kernel is read without it.")


class FeedForward(Layer):
    """Two dense layers, the same at every position.

    FFN(x) = max(0, x W1 + b1) W2 + b2. Source: Vaswani et al. 2017, section 3.3, equation 2.

    Args:
        hidden_dim: Width of the output (d_model in the paper).
        intermediate_dim: Width in between (d_ff).
        activation: Name or function; ReLU in the paper, GELU in GPT and BERT.
        kernel_initializer: Of both layers (Glorot uniform, as in the authors' code).

    Call arguments:
        x: float (..., dim).

    Returns:
        float (..., hidden_dim).

    Raises:
        ValueError: if a width is not positive.
    """

    def __init__(self, hidden_dim, intermediate_dim, activation="relu", kernel_initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        if hidden_dim <= 0 or intermediate_dim <= 0:
            raise ValueError(
                f"hidden_dim and intermediate_dim must be positive; got {hidden_dim} and {intermediate_dim}."
            )
        policy = dict(dtype=self.dtype_policy)
        self.expand = Dense(
            intermediate_dim, activation, kernel_initializer=fresh(kernel_initializer), name="expand", **policy
        )
        self.contract = Dense(hidden_dim, kernel_initializer=fresh(kernel_initializer), name="contract", **policy)
        self.supports_masking = True

    def call(self, x):
        return self.contract(self.expand(x))

    def step(self, x):
        """`call`, for decoding."""
        if overrides(self, FeedForward, "call"):  # a variant
            return lean(self, x)
        return lean(self.contract, lean(self.expand, x))


class Maxout(Layer):
    """The greatest of every `pieces` neighbours along the last axis.

    y[j] = max(x[2j - 1], x[2j]) for two pieces, counted from 1. Source: Goodfellow et al. 2013, section 2, in the form
    of Bahdanau, Cho, Bengio 2015, appendix A.2.2.

    Args:
        pieces: How many neighbours compete.

    Call arguments:
        x: float (..., dim), dim divisible by `pieces`.

    Returns:
        float (..., dim / pieces).

    Raises:
        ValueError: if `pieces` is not positive, or does not divide the width.
    """

    def __init__(self, pieces=2, **kwargs):
        super().__init__(**kwargs)
        if pieces <= 0:
            raise ValueError(f"pieces must be positive; got {pieces}.")
        self.pieces = pieces
        self.supports_masking = True
        self.built = True

    def call(self, x):
        if x.shape[-1] % self.pieces:
            raise ValueError(f"The width must be divisible by pieces ({self.pieces}); got {x.shape[-1]}.")
        pairs = ops.reshape(x, (*ops.shape(x)[:-1], x.shape[-1] // self.pieces, self.pieces))
        return ops.max(pairs, axis=-1)

"""Dropout of elements, whose masks come from the fastest generator of the framework, of features, and of words."""

import keras
from keras import ops

from llmfound import kernels
from llmfound.base import Layer


class Dropout(Layer):
    """Zeroes each element with probability `rate` in training and divides the others by 1 - rate.

    Equal in law to keras.layers.Dropout, whose masks cost a large part of a step on some backends (`kernels.dropout`).
    Source: Vaswani et al. 2017, section 5.4, for its places in the Transformer.

    Args:
        rate: Fraction dropped, at least 0 and below 1. `layer.rate = 0.0` changes it, and is saved; a layer made with 0
            has no generator and stays so. As with Keras's layers, a compiled step has the rate it was compiled with.
        seed: int, for masks of its own sequence; None follows keras.utils.set_random_seed.

    Call arguments:
        x: float tensor of any shape.
        training: whether to drop; nothing happens otherwise.

    Returns:
        float, the shape and dtype of x.

    Raises:
        ValueError: if `rate` is outside [0, 1), or is raised in a layer made with 0.
    """

    settable = ("rate",)

    def __init__(self, rate, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator(seed) if rate > 0 else None
        self.supports_masking = True
        self.built = True

    @property
    def rate(self):
        return self._rate

    @rate.setter
    def rate(self, rate):
        if not 0 <= rate < 1:
            raise ValueError(f"A dropout rate is at least 0 and below 1; got {rate}.")
        if rate > 0 and self.built and self.seed_generator is None:
            raise ValueError(f"{self.name} was made with a rate of 0 and draws no masks; make it anew with {rate}.")
        self._rate = rate

    def call(self, x, training=None):
        return kernels.dropout(x, self.rate, self.seed_generator) if training and self.rate > 0 else x

    def compute_output_shape(self, input_shape):
        return input_shape


class VariationalDropout(Dropout):
    """Drops the same features at every position of a sequence: one mask for each row, drawn anew at every call.

    y_bt = x_bt m_b,  m_b float (dim,) of zeros and 1 / (1 - rate)
    Also called locked dropout. Source: Gal and Ghahramani 2016; Merity, Keskar, Socher 2018, section 4.2.

    Args, errors: those of `Dropout`.

    Call arguments:
        x: float (batch, length, dim).
        training: whether to drop.

    Returns:
        float, the shape and dtype of x.
    """

    def call(self, x, training=None):
        return x * super().call(ops.ones_like(x[:, :1]), training=training) if training and self.rate > 0 else x


class EmbeddingDropout(Dropout):
    """Drops words: a dropped one is zero wherever it stands in the batch, and the others are scaled up.

    One mask over the vocabulary for each call. Source: Gal and Ghahramani 2016; Merity, Keskar, Socher 2018,
    section 4.3.

    Args:
        vocab_size: Number of words.
        rate: Fraction of the words dropped, at least 0 and below 1.
        seed: int; None follows keras.utils.set_random_seed.

    Call arguments:
        x: float (batch, length, dim), the words' vectors.
        token_ids: int (batch, length), the words.
        training: whether to drop.

    Returns:
        float, the shape and dtype of x.

    Raises:
        ValueError: if `vocab_size` is not positive, or `rate` is outside [0, 1).
    """

    def __init__(self, vocab_size, rate, seed=None, **kwargs):
        super().__init__(rate, seed, **kwargs)
        if vocab_size <= 0:
            raise ValueError(f"vocab_size must be positive; got {vocab_size}.")
        self.vocab_size = vocab_size

    def call(self, x, token_ids, training=None):
        if not training or self.rate == 0:
            return x
        mask = super().call(ops.ones((self.vocab_size,), x.dtype), training=True)
        return x * ops.take(mask, token_ids, axis=0)[..., None]

    def compute_output_shape(self, input_shape, **_):
        return input_shape

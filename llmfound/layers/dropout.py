"""Dropout whose masks come from the fastest generator of the framework."""

import keras

from llmfound import kernels
from llmfound.base import Layer


class Dropout(Layer):
    """Zeroes each element with probability `rate` in training and divides the others by 1 - rate.

    Equal in law to keras.layers.Dropout, whose masks cost a large part of a step on some backends (`kernels.dropout`).
    Source: Vaswani et al. 2017, section 5.4, for its places in the Transformer.

    Args:
        rate: Fraction dropped, at least 0 and below 1.
        seed: int, for masks of its own sequence; None follows keras.utils.set_random_seed.

    Call arguments:
        x: float tensor of any shape.
        training: whether to drop; nothing happens otherwise.

    Returns:
        float, the shape and dtype of x.

    Raises:
        ValueError: if `rate` is outside [0, 1).
    """

    def __init__(self, rate, seed=None, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"A dropout rate is at least 0 and below 1; got {rate}.")
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator(seed) if rate > 0 else None
        self.supports_masking = True
        self.built = True

    def call(self, x, training=None):
        return kernels.dropout(x, self.rate, self.seed_generator) if training and self.rate > 0 else x

    def compute_output_shape(self, input_shape):
        return input_shape

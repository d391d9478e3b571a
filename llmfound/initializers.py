"""How weights begin."""

import contextlib
import contextvars

import keras

from llmfound import kernels

_drawing = contextvars.ContextVar("drawing", default=True)


@contextlib.contextmanager
def not_drawn():
    """Here a TruncatedNormal gives zeros: a checkpoint is about to set the weights, and to draw them takes seconds."""
    token = _drawing.set(False)
    try:
        yield
    finally:
        _drawing.reset(token)


@keras.saving.register_keras_serializable("llmfound")
class TruncatedNormal(keras.initializers.TruncatedNormal):
    """keras.initializers.TruncatedNormal, drawn by `kernels.truncated_normal`.

    Source: the start of all matrices in the code of Devlin et al. 2019. Arguments as Keras's.
    """

    def __call__(self, shape, dtype=None):
        if not _drawing.get():
            return keras.ops.zeros(shape, dtype)
        return kernels.truncated_normal(shape, self.mean, self.stddev, dtype, self.seed)


@keras.saving.register_keras_serializable("llmfound")
class SquareOrthogonal(keras.initializers.Initializer):
    """Square orthogonal matrices side by side, each drawn by itself: for the recurrent kernel (n, k n) of k gates.

    keras.initializers.Orthogonal would make the rows of the whole orthogonal, and no gate's own matrix.
    Source: Bahdanau, Cho, Bengio 2015, appendix B.1.

    Args:
        seed: int; None follows keras.utils.set_random_seed.
    """

    def __init__(self, seed=None):
        self.seed = seed

    def __call__(self, shape, dtype=None):
        n, width = shape
        if width % n:
            raise ValueError(f"SquareOrthogonal fills (n, k n); got shape {tuple(shape)}.")
        seeds = [None if self.seed is None else self.seed + i for i in range(width // n)]
        blocks = [keras.initializers.Orthogonal(seed=seed)((n, n), dtype="float32") for seed in seeds]  # no QR in less
        return keras.ops.cast(keras.ops.concatenate(blocks, axis=1), dtype or keras.config.floatx())

    def get_config(self):
        return {"seed": self.seed}


def fresh(initializer):
    """A copy of an initializer for a weight of its own: one instance gives every weight of a shape the same numbers."""
    return initializer.clone() if isinstance(initializer, keras.initializers.Initializer) else initializer

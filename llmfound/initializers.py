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


def fresh(initializer):
    """A copy of an initializer for a weight of its own: one instance gives every weight of a shape the same numbers."""
    return initializer.clone() if isinstance(initializer, keras.initializers.Initializer) else initializer

"""The foundational language-model papers, exact, in Keras 3, on JAX, PyTorch and TensorFlow."""

import importlib
import sys

__version__ = "0.1.0"

# All at once, so that Keras knows every class when it loads a saved model. But `python -m llmfound` reads its --backend
# first, and while Python looks for the module of -m, that is the first argument.
if not (sys.argv[:1] == ["-m"] and {"llmfound", "-mllmfound"} & set(sys.orig_argv)):
    try:
        from llmfound import attention, convert, data, decoding, kernels, layers, models, ops, plots, random, training
        from llmfound.base import Layer, Model
    except ModuleNotFoundError as error:
        from llmfound.__main__ import absent, missing

        if backend := absent(error):
            raise ModuleNotFoundError(missing(backend), name=backend) from error
        raise


def __getattr__(name):
    """What few need is imported when it is used: llmfound.testing and llmfound.reproduce."""
    if name in ("reproduce", "testing"):
        return importlib.import_module(f"llmfound.{name}")
    raise AttributeError(f"module 'llmfound' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), "reproduce", "testing"})

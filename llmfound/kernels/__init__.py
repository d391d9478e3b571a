"""Functions with a faster body per framework, chosen once at import.

Every name has its plain body in `reference`; the file named after the backend overrides some of them.
`LLMFOUND_KERNELS=reference` in the environment switches all overrides off.
"""

import importlib
import os

import keras

from llmfound.kernels import reference

BACKENDS = ("jax", "tensorflow", "torch")
if keras.backend.backend() not in BACKENDS:
    raise ValueError(f"llmfound runs on {', '.join(BACKENDS)}; got KERAS_BACKEND={keras.backend.backend()!r}.")

globals().update({name: getattr(reference, name) for name in reference.__all__})
native = importlib.import_module(f"llmfound.kernels.{keras.backend.backend()}")
if os.environ.get("LLMFOUND_KERNELS") != "reference":
    globals().update({name: getattr(native, name) for name in native.__all__})

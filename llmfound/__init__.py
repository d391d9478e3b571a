"""The foundational language-model papers, exact, in Keras 3, on JAX, PyTorch and TensorFlow."""

from llmfound import attention, convert, data, decoding, kernels, layers, models, ops, plots, random, training
from llmfound.base import Layer, Model

__version__ = "0.1.0"

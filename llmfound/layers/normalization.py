"""The norm of a layer's features."""

from keras import layers
from keras.backend import standardize_dtype

from llmfound import kernels
from llmfound.base import Configured, Direct, Recomputed


class LayerNormalization(Direct, Recomputed, Configured, layers.LayerNormalization):
    """keras.layers.LayerNormalization, which is one call where the framework has one (`kernels.layer_norm`).

    y = gamma (x - mean) / sqrt(variance + epsilon) + beta, mean and variance over the features of each position.
    Source: Ba, Kiros, Hinton 2016, section 3. Arguments, weights and results are Keras's.
    """

    def call(self, inputs):
        dtypes = {self.compute_dtype, standardize_dtype(inputs.dtype)}
        if self.axis != [-1] or self.rms_scaling or dtypes != {"float32"}:
            return super().call(inputs)
        return kernels.layer_norm(inputs, self.gamma, self.beta, self.epsilon)

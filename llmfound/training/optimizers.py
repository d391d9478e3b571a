"""Adam and AdamW whose update is one fused operation where the framework has one."""

import keras
from keras import ops

from llmfound import kernels


class _Fused:
    def update_step(self, gradient, variable, learning_rate):
        if self.amsgrad:
            return super().update_step(gradient, variable, learning_rate)
        index = self._get_variable_index(variable)
        kernels.adam_update(
            variable, gradient, self._momentums[index], self._velocities[index], learning_rate,
            ops.cast(self.iterations, "float32") + 1, self.beta_1, self.beta_2, self.epsilon,
        )  # fmt: skip


@keras.saving.register_keras_serializable("llmfound")
class Adam(_Fused, keras.optimizers.Adam):
    """keras.optimizers.Adam, number for number, with a fused update (`kernels.adam_update`).

    Vaswani et al. 2017, section 5.3, train with beta_1=0.9, beta_2=0.98, epsilon=1e-9 and no weight decay.
    Arguments as in keras.optimizers.Adam.
    """


@keras.saving.register_keras_serializable("llmfound")
class AdamW(_Fused, keras.optimizers.AdamW):
    """keras.optimizers.AdamW, number for number, with a fused update. Arguments as in keras.optimizers.AdamW."""

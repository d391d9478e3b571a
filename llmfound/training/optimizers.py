"""Adam, AdamW and BERT's Adam, whose update is one fused operation where the framework has one."""

import math
import re

import keras
from keras import ops

from llmfound import kernels
from llmfound.base import overrides


class _Fused:
    bias_correction = True

    def update_step(self, gradient, variable, learning_rate):
        if self.amsgrad:
            return super().update_step(gradient, variable, learning_rate)
        self._update([gradient], [variable], learning_rate)

    def _clip_gradients(self, grads):
        if keras.backend.backend() != "torch" or self.clipnorm or not self.global_clipnorm:
            return super()._clip_gradients(grads)
        return kernels.clip_gradients(grads, self.global_clipnorm, self._trainable_variables)

    def _at_once(self):
        """Whether one call updates and decays all: two hundred took a tenth of the time of a small BERT's step."""
        own = overrides(self, _Fused, "update_step", "_apply_weight_decay")
        return keras.backend.backend() == "torch" and not self.amsgrad and not own

    def _apply_weight_decay(self, variables):
        if not self._at_once():
            super()._apply_weight_decay(variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if not self._at_once():
            return super()._backend_update_step(grads, trainable_variables, learning_rate)
        rows = {}
        for variable, gradient in zip(trainable_variables, grads):
            decay = self.weight_decay if self.weight_decay and self._use_weight_decay(variable) else 0.0
            rows.setdefault(decay, []).append((gradient, variable))
        for decay, some in rows.items():
            self._update(*zip(*some), learning_rate, decay)

    def _update(self, gradients, variables, learning_rate, weight_decay=0.0):
        step = ops.cast(self.iterations, "float32") + 1 if self.bias_correction else math.inf
        moments = zip(*((self._momentums[i], self._velocities[i]) for i in map(self._get_variable_index, variables)))
        kernels.adam_update(variables, gradients, *moments, learning_rate, step, self.beta_1, self.beta_2, self.epsilon,
                            weight_decay)  # fmt: skip


@keras.saving.register_keras_serializable("llmfound")
class Adam(_Fused, keras.optimizers.Adam):
    """keras.optimizers.Adam, number for number, with a fused update (`kernels.adam_update`).

    Vaswani et al. 2017, section 5.3, train with beta_1=0.9, beta_2=0.98, epsilon=1e-9 and no weight decay.
    Arguments as in keras.optimizers.Adam.
    """


@keras.saving.register_keras_serializable("llmfound")
class AdamW(_Fused, keras.optimizers.AdamW):
    """keras.optimizers.AdamW, number for number, with a fused update.

    Arguments as in keras.optimizers.AdamW, and:

    Args:
        exclude: names of the weights that do not decay, such as ("bias", "gamma", "beta"); unlike those given to
            Keras's `exclude_from_weight_decay`, they are saved with the model.

    Raises:
        ValueError: if `exclude` is one str.
    """

    def __init__(self, learning_rate=0.001, weight_decay=0.004, *args, exclude=(), **kwargs):
        super().__init__(learning_rate, weight_decay, *args, **kwargs)
        if isinstance(exclude, str):
            raise ValueError(f"exclude must be a list of names; got one str, {exclude!r}.")
        self.exclude = list(exclude)
        if self.exclude:
            names = "|".join(map(re.escape, self.exclude))
            self.exclude_from_weight_decay(var_names=[rf"(^|/)({names})(:\d+)?$"])  # on TensorFlow: path/name:0

    def get_config(self):
        return {**super().get_config(), "exclude": self.exclude}


@keras.saving.register_keras_serializable("llmfound")
class BERTAdam(AdamW):
    """Adam as BERT was trained with it: without bias correction, and no decay of biases and layer norms.

    w = w - rate (m / (sqrt(v) + epsilon) + weight_decay w), after all gradients are scaled to a norm of at most 1
    Without the correction, first steps are larger: the very first is 3.16 rate in every weight. Under
    tf.distribute.MirroredStrategy, Keras (3.15.1) clips each replica's gradients before it adds them up.
    Source: Devlin et al. 2019, appendix A.2 (which names none of this); the authors' code.

    Arguments as in AdamW, but `amsgrad`.
    """

    bias_correction = False

    def __init__(self, learning_rate=1e-4, weight_decay=0.01, beta_1=0.9, beta_2=0.999, epsilon=1e-6, *,
                 exclude=("bias", "gamma", "beta"), global_clipnorm=1.0, **kwargs):  # fmt: skip
        super().__init__(learning_rate, weight_decay, beta_1, beta_2, epsilon, exclude=exclude,
                         global_clipnorm=global_clipnorm, **kwargs)  # fmt: skip
        if self.amsgrad:
            raise ValueError("BERTAdam has no amsgrad=True; take AdamW(amsgrad=True).")

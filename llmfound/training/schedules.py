"""Learning rates as functions of the step."""

import math

import keras
from keras import ops


def _check_warmup(warmup_steps, least):
    if warmup_steps < least:
        raise ValueError(f"warmup_steps must be at least {least}; got {warmup_steps}.")


@keras.saving.register_keras_serializable(package="llmfound")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly over the warm-up, then falls with the square root of the step ("Noam").

    rate(s) = factor hidden_dim^-0.5 min(s^-0.5, s warmup_steps^-1.5) = peak min(s / w, sqrt(w / s))
    Keras counts its steps from 0 and the paper from 1, so step 0 of Keras is s = 1.
    Source: Vaswani et al. 2017, section 5.3, equation 3; `factor` is the authors' code's, whose later versions
    take factor 2 and warmup_steps 8000.

    Args:
        hidden_dim: int, width of the model (d_model). A wider model gets a smaller rate.
        warmup_steps: int, steps until the peak (w); 4000 in the paper.
        factor: float, multiplies every rate; 1 in the paper.

    Attributes:
        peak: float, the greatest rate, which is that of s = warmup_steps.

    Call arguments:
        step: int scalar, from 0.

    Returns:
        The rate, float32 scalar.

    Raises:
        ValueError: if `hidden_dim`, `warmup_steps` or `factor` is not positive.
    """

    def __init__(self, hidden_dim=512, warmup_steps=4000, factor=1.0):
        if hidden_dim <= 0 or factor <= 0:
            raise ValueError(f"hidden_dim and factor must be positive; got {hidden_dim} and {factor}.")
        _check_warmup(warmup_steps, 1)
        self.hidden_dim = hidden_dim
        self.warmup_steps = warmup_steps
        self.factor = factor
        self.peak = factor / math.sqrt(hidden_dim * warmup_steps)

    @classmethod
    def from_peak(cls, peak, warmup_steps=4000):
        """The schedule whose greatest rate is `peak`, whatever the width of the model."""
        _check_warmup(warmup_steps, 1)
        return cls(hidden_dim=1, warmup_steps=warmup_steps, factor=peak * math.sqrt(warmup_steps))

    def __call__(self, step):
        s = ops.cast(step, "float32") + 1
        return self.peak * ops.minimum(s / self.warmup_steps, ops.sqrt(self.warmup_steps / s))

    def get_config(self):
        return {"hidden_dim": self.hidden_dim, "warmup_steps": self.warmup_steps, "factor": self.factor}


@keras.saving.register_keras_serializable(package="llmfound")
class LinearWarmupDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly to `peak` over the warm-up, then falls linearly to `end` over the remaining steps.

    rate(s) = peak s / w for s <= w, peak + (end - peak) (s - w) / (steps - w) up to s = steps, `end` from there on
    Keras counts its steps from 0 and the papers from 1, so step 0 of Keras is s = 1.
    Source: Xiong et al. 2020, section 3.2; for BERT Devlin et al. 2019, appendix A.2.

    Args:
        peak: float, the greatest rate.
        warmup_steps: int, steps until the peak (w). 1 is no warm-up, and so is 0.
        steps: int, the length of the training; the last of these steps has the rate `end`.
        end: float, the last rate.

    Call arguments:
        step: int scalar, from 0.

    Returns:
        The rate, float32 scalar.

    Raises:
        ValueError: if `peak` is not positive, `end` is not in [0, peak], `warmup_steps` is negative, or `steps` is
            not greater than `warmup_steps` and 1.
    """

    def __init__(self, peak, warmup_steps, steps, end=0.0):
        if not 0 <= end <= peak or peak == 0:
            raise ValueError(f"peak must be positive and end in [0, peak]; got peak={peak} and end={end}.")
        _check_warmup(warmup_steps, 0)
        if steps <= max(warmup_steps, 1):
            raise ValueError(f"steps ({steps}) must be greater than warmup_steps ({warmup_steps}) and than 1.")
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.steps = steps
        self.end = end

    def __call__(self, step):
        s = ops.cast(step, "float32") + 1
        warmup = max(self.warmup_steps, 1)
        left = ops.clip((self.steps - s) / (self.steps - warmup), 0, 1)
        return ops.where(s < warmup, self.peak * s / warmup, self.end + (self.peak - self.end) * left)

    def get_config(self):
        return {"peak": self.peak, "warmup_steps": self.warmup_steps, "steps": self.steps, "end": self.end}

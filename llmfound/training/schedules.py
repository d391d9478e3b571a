"""Learning rates as functions of the step."""

import math
import numbers

import keras
import numpy as np
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


@keras.saving.register_keras_serializable(package="llmfound")
class BERTSchedule(LinearWarmupDecay):
    """Rises linearly over the warm-up, then falls on the line from `peak` at step 0 to 0 at the last.

    rate(s) = peak s / w for s < w, peak (1 - s / steps) from there on, s from 0
    So the rate drops a little at s = w, the first update has rate 0, and `peak` is never quite reached.
    Source: the code of Devlin et al. 2019; their paper says only warm-up and linear decay, as `LinearWarmupDecay` does.

    Args, errors: as in LinearWarmupDecay, without `end`.
    """

    def __init__(self, peak, warmup_steps, steps):
        super().__init__(peak, warmup_steps, steps)

    def __call__(self, step):
        s = ops.cast(step, "float32")
        falling = self.peak * ops.clip(1 - s / self.steps, 0, 1)
        return ops.where(s < self.warmup_steps, self.peak * s / max(self.warmup_steps, 1), falling)

    def get_config(self):
        return {"peak": self.peak, "warmup_steps": self.warmup_steps, "steps": self.steps}


@keras.saving.register_keras_serializable(package="llmfound")
class SlantedTriangular(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly over the first tenth of a stage of training, then falls linearly over the rest (STLR).

    cut = max(1, floor(T cut_fraction)),  p = t / cut for t < cut, else 1 - (t - cut) / (T - cut)
    rate(t) = peak (1 + p (ratio - 1)) / ratio,  t = 0 .. T-1
    Source: Howard and Ruder 2018, section 3.2, equation 3. As printed, p falls below 0 and the rate with it where
    T cut_fraction is no integer; this form, the authors' code's, is equal where it is one.

    Args:
        peak: float, the greatest rate, that of t = cut; 0.01 in the paper.
        steps: int, the steps of the stage (T); or a sequence of int, those of several stages, each a triangle of its
            own, as `unfreezing_stages` gives them for gradual unfreezing.
        cut_fraction: float, the share of steps in which the rate rises.
        ratio: float, how much smaller the first rate is than the greatest.

    Call arguments:
        step: int scalar, from 0. After the last stage the rate stays at peak / ratio.

    Returns:
        The rate, float32 scalar.

    Raises:
        ValueError: if `peak` is not positive, a stage has no step, `cut_fraction` is not between 0 and 1, or `ratio` is
            less than 1.
    """

    def __init__(self, peak=0.01, steps=None, cut_fraction=0.1, ratio=32):
        stages = list(steps) if isinstance(steps, (list, tuple)) else [steps]
        if not stages or not all(isinstance(n, numbers.Integral) and n > 0 for n in stages):
            raise ValueError(f"steps must be at least 1, the number of training steps of the stage; got {steps!r}.")
        if peak <= 0 or ratio < 1 or not 0 < cut_fraction < 1:
            raise ValueError(
                "peak must be positive, ratio at least 1 and cut_fraction between 0 and 1; got "
                f"peak={peak}, ratio={ratio}, cut_fraction={cut_fraction}."
            )
        self.peak = peak
        self.steps = [int(n) for n in stages]
        self.cut_fraction = cut_fraction
        self.ratio = ratio

    def __call__(self, step):
        step = ops.cast(step, "float32")
        lengths = np.array(self.steps, "float32")
        starts = np.cumsum([0, *self.steps[:-1]]).astype("float32")
        cuts = np.maximum(np.floor(np.round(lengths * self.cut_fraction, 6)), 1).astype("float32")
        stage = ops.sum(ops.cast(ops.greater_equal(step, starts), "int32")) - 1
        start, length, cut = (ops.take(ops.convert_to_tensor(x), stage) for x in (starts, lengths, cuts))
        t = step - start
        fall = 1 - (t - cut) / ops.maximum(length - cut, 1)
        p = ops.clip(ops.where(t < cut, t / cut, fall), 0, 1)
        return self.peak * (1 + p * (self.ratio - 1)) / self.ratio

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps, "cut_fraction": self.cut_fraction, "ratio": self.ratio}


def unfreezing_stages(groups, epochs, steps_per_epoch, epochs_per_group=1):
    """The steps of each stage of a gradual unfreezing, for `SlantedTriangular`: one triangle for each group added.

    Args:
        groups: int, the number of groups.
        epochs: int, of the whole `fit`; what is left when all groups are trained is one stage.
        steps_per_epoch: int, len(batches).
        epochs_per_group: int, as in `GradualUnfreezing`.

    Returns:
        list of int.

    Raises:
        ValueError: if an argument is not positive.
    """
    if min(groups, epochs, steps_per_epoch, epochs_per_group) < 1:
        raise ValueError(
            "All arguments must be positive; got "
            f"groups={groups}, epochs={epochs}, steps_per_epoch={steps_per_epoch}, epochs_per_group={epochs_per_group}."
        )
    lengths = [epochs_per_group] * min(groups - 1, -(-epochs // epochs_per_group))
    lengths.append(epochs - sum(lengths))
    if lengths[-1] <= 0:
        last = lengths.pop()
        lengths[-1] += last
    return [n * steps_per_epoch for n in lengths]

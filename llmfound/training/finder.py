"""Which learning rate to take. Source: Smith 2017, "Cyclical Learning Rates", section 3.3."""

import itertools
import math
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

_SMOOTHING = 0.9  # of the running mean of the losses
_DIVERGED = 3.0  # times the least loss, above it


@dataclass(frozen=True)
class LearningRates:
    """What `find_learning_rate` has tried.

    Attributes:
        rates: list of float, ascending.
        losses: list of float, of the batch at each rate, before its update.
        smooth: list of float, their running mean.
        suggestion: float, the rate at which the running mean falls fastest with the logarithm of the rate.
    """

    rates: list
    losses: list
    smooth: list
    suggestion: float


def find_learning_rate(model, batches, low=1e-6, high=10.0, steps=100):
    """Trains with a rate that grows from step to step, and restores the model as it was.

    rate(t) = low (high / low)^(t / (steps - 1)). It ends early when the running mean of the losses is four times its
    least value (if that is negative, above it by three times its size), or a loss is not finite. A rate for training
    lies where the loss still falls fast, below the one where it is least. Source: Smith 2017, section 3.3, with rates
    on a logarithmic scale.

    Args:
        model: a compiled keras.Model, whose optimizer has a number as its rate.
        batches: iterable of (x, y) or (x, y, sample_weight), such as TranslationBatches; taken again from its start if
            it is too short; without an end, at most `steps` of them are taken.
        low, high: float, the first and the last rate.
        steps: int, the number of rates.

    Returns:
        LearningRates; `llmfound.plots.learning_rates` draws them.

    Raises:
        ValueError: if low and high are not positive and ascending, there are fewer than 10 steps, the optimizer has a
            schedule, there is no batch, or the loss is not finite from the start.
    """
    if not 0 < low < high or steps < 10:
        raise ValueError(f"low and high must be 0 < low < high, and steps at least 10; got {low}, {high} and {steps}.")
    batches = _endless(batches, steps)
    if not model.built:
        first = next(batches)
        model(first[0])
        batches = itertools.chain([first], batches)
    optimizer = model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    before = [np.array(ops.convert_to_numpy(variable)) for variable in variables]
    rates = np.geomspace(low, high, steps).tolist()
    losses, smooth = [], []
    try:
        for rate, batch in zip(rates, batches):
            _set(optimizer, rate)
            model.reset_metrics()
            losses.append(float(model.train_on_batch(*batch, return_dict=True)["loss"]))
            mean = losses[0] if not smooth else _SMOOTHING * smooth[-1] + (1 - _SMOOTHING) * losses[-1]
            smooth.append(mean)
            if not math.isfinite(mean) or mean - min(smooth) > _DIVERGED * abs(min(smooth)):
                break
    finally:
        for variable, value in zip(variables, before):
            variable.assign(value)
        model.reset_metrics()
    if not math.isfinite(smooth[-1]):
        losses.pop(), smooth.pop()
    if len(smooth) < 3:
        raise ValueError(f"The loss is not finite, or diverges, from a rate of {rates[0]} on: {losses}. Lower `low`.")
    rates = rates[: len(smooth)]
    until = max(int(np.argmin(smooth)), 2) + 1
    slopes = np.gradient(smooth[:until], np.log(rates[:until]))
    return LearningRates(rates, losses, smooth, rates[int(np.argmin(slopes))])


def _set(optimizer, rate):
    try:
        optimizer.learning_rate = rate
    except TypeError as error:  # of Keras, if the rate is a schedule
        raise ValueError("find_learning_rate sets the rate; compile the model with a number, no schedule.") from error


def _endless(batches, steps):
    if isinstance(batches, keras.utils.PyDataset):
        if not len(batches):
            raise ValueError("There are no batches to try rates on.")
        return (batches[i % len(batches)] for i in itertools.count())
    batches = list(itertools.islice(batches, steps))
    if not batches:
        raise ValueError("There are no batches to try rates on.")
    return itertools.cycle(batches)

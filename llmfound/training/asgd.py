"""Averaged SGD, and the trigger that begins to average. Source: Merity, Keskar, Socher 2018, section 3."""

import warnings

import keras
import numpy as np
from keras import ops

from llmfound.training.unfreezing import optimizer_with

_Constant = keras.initializers.Constant
_LOSSES = 256  # that are kept one by one


@keras.saving.register_keras_serializable("llmfound")
class ASGD(keras.optimizers.SGD):
    """Stochastic gradient descent, and from some step on the mean of the weights that it passes through.

    After step k >= T:  mean = 1 / (k - T + 1) sum_{i=T..k} w_i. Steps go on from w; `swap` puts the mean in its place,
    and so does the end of `fit`. With `gradient_accumulation_steps`, a step is an update. Weight decay goes with the
    rate that WindowRates scales.
    Source: Polyak and Juditsky 1992; Merity, Keskar, Socher 2018, section 3.

    Args:
        learning_rate: float or schedule; 30 in the paper, for a mean loss per token clipped at norm 0.25.
        average: whether to average from the first step on; else from a call of `start_averaging`.
        **kwargs: of keras.optimizers.SGD.
    """

    def __init__(self, learning_rate=30.0, average=False, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.average = average
        self.averaging = self.add_variable((), "ones" if average else "zeros", name="averaging")
        self.averaged_steps = self.add_variable((), "zeros", name="averaged_steps")
        self.scale = self.add_variable((), "ones", name="scale")
        self._swapped = self.add_variable((), "zeros", name="swapped")
        # Of NonMonotonicTrigger, which a run that goes on takes up: losses, the last one at the end, the least of those
        # before, and the epoch after which it fired.
        self.losses = self.add_variable((_LOSSES,), _Constant(np.inf), "float32", name="losses")
        self.least = self.add_variable((), _Constant(np.inf), "float32", name="least")
        self.fired = self.add_variable((), _Constant(-1), "float32", name="fired")

    @property
    def averages(self):
        """Whether the weights are averaged, and there is a step to average."""
        return bool(ops.convert_to_numpy(self.averaging)) and bool(ops.convert_to_numpy(self.averaged_steps))

    @property
    def swapped(self):
        """Whether weights and means are exchanged now; files know it, too."""
        return bool(ops.convert_to_numpy(self._swapped))

    def start_averaging(self):
        """Averages the weights from the next step on; if they are averaged already, the mean goes on."""
        if not ops.convert_to_numpy(self.averaging):
            self.averaging.assign(1.0)
            self.averaged_steps.assign(0.0)

    def swap(self):
        """Exchanges weights and means; a second call exchanges them back. Nothing happens while nothing is averaged."""
        if self.averages:
            self._swapped.assign(1.0 - self._swapped)
            for variable, mean in zip(self._trainable_variables, self._means):
                weights = np.array(ops.convert_to_numpy(variable))  # a copy: PyTorch would give its own memory
                variable.assign(mean)
                mean.assign(weights)

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._means = self.add_optimizer_variables(variables, "mean")

    def apply(self, grads, trainable_variables=None):
        updates = (self._iterations + 1) % (self.gradient_accumulation_steps or 1) == 0
        self.averaged_steps.assign_add(self.averaging * ops.cast(updates, "float32"))
        super().apply(grads, trainable_variables)
        share = ops.cast(updates, "float32") / ops.maximum(ops.convert_to_tensor(self.averaged_steps), 1)
        for variable, mean in zip(self._trainable_variables, self._means):  # those without a gradient, too
            difference = ops.multiply(ops.subtract(variable, mean), ops.cast(share, variable.dtype))
            self.assign(mean, ops.add(mean, difference))

    def _apply_weight_decay(self, variables):
        if self.weight_decay is None:
            return
        for variable in variables:
            if self._use_weight_decay(variable):
                rate = ops.cast(self.learning_rate * self.scale * self.weight_decay, variable.dtype)
                variable.assign(variable - variable * rate)

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate * self.scale)

    def finalize_variable_values(self, var_list):
        if self.averaging._value is None:  # on JAX, after an error in a step, which is the one to be seen
            return
        if self.swapped:
            self.swap()
        super().finalize_variable_values(var_list)
        if self.averages:
            for variable, mean in zip(self._trainable_variables, self._means):
                variable.assign(np.array(ops.convert_to_numpy(mean)))  # JAX donates memory: the two must not share it

    def get_config(self):
        return {**super().get_config(), "average": self.average}


class NonMonotonicTrigger(keras.callbacks.Callback):
    """Begins to average once the validation loss has not got better for some epochs (NT-ASGD).

    Fires after the first epoch whose loss is greater than the least of all before the last n. From then on validation
    sees the mean of the weights, and the model has it until the next epoch begins: what ModelCheckpoint and
    EarlyStopping keep is what was validated. Source: Merity, Keskar, Socher 2018, section 3, algorithm 1, in the form
    of the authors' code.

    Its losses are kept with the optimizer, so that a `fit` that goes on, from a file or with `initial_epoch`, compares
    with those before; one that begins at epoch 0 forgets them. keras.callbacks.BackupAndRestore comes after it.

    Args:
        n: int, epochs that are not compared with, at most 256; 5 in the paper.
        monitor: str, the logged value.
        stop: whether to end the training when it fires, in place of averaging: the paper's fine-tuning, which averages
            from its first step on, ends so.
        verbose: whether to print when it fires.

    Attributes:
        fired: int, the epoch, from 0, after which it did; None before.

    Raises:
        ValueError: if `n` is negative or above 256; in `fit`, if the optimizer is not ASGD, or `monitor` is not logged.
            Of a validation that an epoch did not have, as with validation_freq=2, a warning tells once.
    """

    def __init__(self, n=5, monitor="val_loss", stop=False, verbose=True):
        super().__init__()
        if n < 0 or n > _LOSSES:
            raise ValueError(f"n must not be negative, nor above {_LOSSES}; got {n}.")
        self.n = n
        self.monitor = monitor
        self.stop = stop
        self.verbose = verbose

    def on_train_begin(self, logs=None):
        self.begun = self.warned = False
        self._show(means=False)  # after a validation that was interrupted

    def on_epoch_begin(self, epoch, logs=None):
        self.validated = False
        self._begin(epoch)
        self._show(means=False)

    def _begin(self, epoch):
        """Forgets another fit's losses; not as it begins, when a callback may still load this one's."""
        if not self.begun and epoch == 0:
            optimizer = optimizer_with(self.model, "start_averaging", "NonMonotonicTrigger")
            optimizer.losses.assign(np.full(_LOSSES, np.inf, "float32"))
            optimizer.least.assign(np.inf)
            optimizer.fired.assign(-1.0)
        self.begun = True

    @property
    def fired(self):
        optimizer = optimizer_with(self.model, "start_averaging", "NonMonotonicTrigger")
        epoch = int(ops.convert_to_numpy(optimizer.fired))
        return None if epoch < 0 else epoch

    def on_test_begin(self, logs=None):
        self.validated = True
        self._show(means=True)

    def _show(self, means):
        optimizer = optimizer_with(self.model, "start_averaging", "NonMonotonicTrigger")
        if optimizer.swapped != means:
            optimizer.swap()

    def on_epoch_end(self, epoch, logs=None):
        value = (logs or {}).get(self.monitor)
        if value is None:
            found = f"{self.monitor!r} is not logged after epoch {epoch + 1}, but {sorted(logs or {})}"
            if self.validated or not self.monitor.startswith("val_"):
                raise ValueError(f"{found}; name one of them.")
            if not self.warned:
                warnings.warn(
                    f"{found}; fit needs validation_data, and compares the epochs that have it.", stacklevel=2
                )
            self.warned = True
            return
        self._begin(epoch)
        optimizer = optimizer_with(self.model, "start_averaging", "NonMonotonicTrigger")
        value = np.float32(value)  # as it is kept
        losses, least = np.array(ops.convert_to_numpy(optimizer.losses)), ops.convert_to_numpy(optimizer.least)
        if self.fired is None and value > np.fmin.reduce(losses[: _LOSSES - self.n], initial=least):
            optimizer.fired.assign(float(epoch))
            if self.stop:
                self.model.stop_training = True
            else:
                optimizer.start_averaging()
            if self.verbose:
                print(f"epoch {epoch + 1}: {'stops' if self.stop else 'averages the weights from here on'}", flush=True)
        optimizer.least.assign(np.fmin(least, losses[0]))
        optimizer.losses.assign(np.append(losses[1:], value))

"""What watches and steers a run: its progress, and a budget of time."""

import collections
import datetime
import math
import numbers
import sys
import threading
import time
import warnings

import keras
import numpy as np
from keras import ops

_RECENT = 100  # steps that the speed is measured on
_BAR_SECONDS = 0.2  # from one update of the bar to the next
_RATE_SECONDS = 5.0  # from one look at the learning rate to the next, each of which waits for the device
_RATES = 300  # values that a TimeBudget's rate takes at least, if steps are short enough
_SECONDS_PER_RATE = 2.0  # and at most this long between two of them, if steps are no longer

_DECAYS = {"linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}


class Progress(keras.callbacks.Callback):
    """Shows step, tokens per second, loss and metrics, learning rate and remaining time; for `fit(verbose=0)`.

    On a terminal it is a bar; elsewhere (a file, a pipe, a notebook) a plain line now and then. Both write a line at
    the end of each epoch; of a metric that is a vector, the mean. Speed is that of the last 100 steps, without
    compilation and validation. Keras hands over the values of a step on a thread of its own where it deems that safe
    (JAX and PyTorch), so that the next step does not wait for them.

    Args:
        tokens: int or float, real target tokens of a step; or batches that have `tokens_per_epoch` and `len()`, of
            which the mean is taken. None shows steps per second instead.
        budget: TimeBudget of the same `fit`, whose remaining time is shown; None estimates that of all epochs.
        every: float, seconds from one plain line to the next.

    Raises:
        ValueError: if `tokens` is neither positive nor such batches, or `every` is negative.
    """

    async_safe = True  # Keras's sign for a callback whose on_train_batch_end may run on another thread

    def __init__(self, tokens=None, budget=None, every=10.0):
        super().__init__()
        if hasattr(tokens, "tokens_per_epoch"):
            tokens = tokens.tokens_per_epoch / len(tokens)
        if tokens is not None and not (isinstance(tokens, numbers.Real) and tokens > 0):
            raise ValueError(f"tokens must be positive, or batches with tokens_per_epoch and len(); got {tokens!r}.")
        if every < 0:
            raise ValueError(f"every must not be negative; got {every} seconds.")
        self.tokens = tokens
        self.budget = budget
        self.every = every

    def on_train_begin(self, logs=None):
        self.bar = _start_bar()
        self.interval = self.every if self.bar is None else _BAR_SECONDS
        self.lock = threading.Lock()
        self.first_epoch = self.rate = None
        self.steps = self.params["steps"]
        self.done = 0  # steps of this fit
        self.shown_at = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        if self.first_epoch is None:
            self.first_epoch = epoch
        self.epoch = epoch
        self.done_before = self.done
        self.ends = collections.deque(maxlen=_RECENT)  # of steps: (time, steps done)

    def on_train_batch_begin(self, batch, logs=None):
        # Here and not when it is shown: on JAX, another thread must not touch the state of a running epoch.
        now = time.monotonic()
        last = self.steps is not None and batch + self.model.steps_per_execution >= self.steps  # the line of the epoch
        if self.budget is not None:
            self.rate = self.budget.rate
        elif self.rate is None or last or now - self.rate_at >= _RATE_SECONDS:
            self.rate, self.rate_at = float(ops.convert_to_numpy(self.model.optimizer.learning_rate)), now

    def on_train_batch_end(self, batch, logs=None):
        # With steps_per_execution, `batch` may lie beyond the epoch's last one.
        now, done = time.monotonic(), self.done_before + min(batch + 1, self.params["steps"] or batch + 1)
        with self.lock:
            if done <= self.done:  # steps that end on two threads may arrive in the wrong order
                return
            self.done = done
            self.ends.append((now, done))
            if now - self.shown_at >= self.interval:
                self.shown_at = now
                self._show(logs)

    def on_epoch_end(self, epoch, logs=None):
        if self.steps is None:
            self.steps = self.done - self.done_before
        self.shown_at = time.monotonic()
        self._print(self._line(logs))

    def on_train_end(self, logs=None):
        if self.bar is not None:
            self.bar.stop()

    def _show(self, logs):
        if self.bar is None:
            self._print(self._line(logs))
        else:
            self.bar.update(self.bar.task_ids[0], completed=self._share_done(), description=self._line(logs))
            self.bar.refresh()

    def _print(self, line):
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.console.print(line, markup=False, highlight=False)

    def _line(self, logs):
        epoch, step = str(self.epoch + 1), str(self.done - self.done_before)
        if self.budget is None:
            epoch += f"/{self.params['epochs']}"
        if self.steps is not None:
            step += f"/{self.steps}"
        parts = [f"epoch {epoch}", f"step {step}"]
        speed = self._steps_per_second()
        if speed is not None:
            parts.append(f"{speed:.2f} steps/s" if self.tokens is None else f"{speed * self.tokens:,.0f} tokens/s")
        values = {name: value for name, value in (logs or {}).items() if name != "learning_rate"}
        parts += [f"{name} {float(np.mean(value)):.4g}" for name, value in values.items()]
        parts.append(f"learning rate {self.rate:.2e}")
        left = self._seconds_left(speed)
        if left is not None:
            parts.append(f"{datetime.timedelta(seconds=round(left))} left")
        return "  ".join(parts)

    def _steps_per_second(self):
        """float; None before the second step of an epoch, for the first may have been compiled."""
        if len(self.ends) < 2:
            return None
        (first_time, first), (last_time, last) = self.ends[0], self.ends[-1]
        return (last - first) / max(last_time - first_time, 1e-9)

    def _total(self):
        """int, the steps of all epochs of this fit; None until they are known."""
        return None if self.steps is None else self.steps * (self.params["epochs"] - self.first_epoch)

    def _seconds_left(self, speed):
        if self.budget is not None:
            return self.budget.remaining
        return None if speed is None or self._total() is None else (self._total() - self.done) / speed

    def _share_done(self):
        if self.budget is not None:
            return 1 - self.budget.remaining / self.budget.seconds
        return None if self._total() is None else self.done / self._total()


def _start_bar():
    """A started bar with one task, of total 1; None if there is no terminal to draw it on."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        return None
    # No thread, no redirection, a visible cursor: if `fit` is interrupted, Keras does not tell us to clean up.
    bar = Bar(
        BarColumn(bar_width=20),
        TextColumn("{task.description}", markup=False),
        console=console,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task("", total=1.0)
    bar.start()
    console.show_cursor(True)
    return bar


class TimeBudget(keras.callbacks.Callback):
    """Trains for a fixed time: sets the learning rate by the clock, and stops when it has fallen to zero.

    rate = peak min(s / warmup_steps, fall(t / budget)),  fall(x) = 1 - x  or  (1 + cos(pi x)) / 2
    s counts the optimizer's updates of this `fit` from 1, and t runs from the end of the first step, so that
    compilation is not paid for; what other shapes of batches compile later, and validation, is. Training ends
    with the step in which the time runs out.

    The rate is set between steps, for each one if they are long, else every 2 seconds or 1/300 of the budget: each
    time waits for the device, without which the loop of JAX would run ahead of the clock.

    Give `fit` more epochs than there is time for, and the optimizer any number as its rate.

    Args:
        minutes: float, the budget.
        peak: float, the greatest rate.
        warmup_steps: int, steps in which the rate rises to the peak; 0 and 1 are no warm-up.
        decay: "linear" or "cosine".

    Attributes:
        seconds: float, the budget.
        remaining: float, seconds that are left of it.
        rate: float, the rate set last.

    Raises:
        ValueError: if `minutes` or `peak` is not positive, `warmup_steps` is negative or `decay` unknown; in `fit`,
            if the optimizer's rate is a schedule.
    """

    def __init__(self, minutes, peak, warmup_steps, decay="linear"):
        super().__init__()
        if minutes <= 0 or peak <= 0:
            raise ValueError(f"minutes and peak must be positive; got {minutes} and {peak}.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative; got {warmup_steps}.")
        if decay not in _DECAYS:
            raise ValueError(f"decay must be one of {', '.join(_DECAYS)}; got {decay!r}.")
        self.seconds = 60 * minutes
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.started_at = None

    @property
    def remaining(self):
        return self.seconds if self.started_at is None else max(self.seconds - time.monotonic() + self.started_at, 0.0)

    def on_train_begin(self, logs=None):
        self.started_at = self.step_seconds = None
        self.calls = 0  # training steps, or several in one if the model was compiled so
        self.first_update = self._updates()
        try:
            self._set_rate(self.first_update)
        except TypeError as error:  # of Keras, if the rate is a schedule
            raise ValueError("TimeBudget sets the learning rate; give the optimizer a number, no schedule.") from error

    def on_epoch_begin(self, epoch, logs=None):
        self.looked_at = None  # validation, which is over now, is no part of a step
        self.next_look = self.calls

    def on_train_batch_begin(self, batch, logs=None):
        # At the end of a batch, Keras would wait for the device every time before it called us.
        if self.calls and self.calls >= self.next_look:
            self._look_at_the_clock()
        self.calls += 1

    def on_train_end(self, logs=None):
        if self.remaining > 0.01 * self.seconds:
            warnings.warn(
                f"training ended with {self.remaining:.0f} of {self.seconds:.0f} seconds left, at learning rate "
                f"{self.rate:.1e}; give fit more epochs.",
                stacklevel=2,
            )

    def _look_at_the_clock(self):
        updates = self._updates()
        now = time.monotonic()
        if self.started_at is None:
            self.started_at = now
        if self.looked_at is not None:
            self.step_seconds = (now - self.looked_at) / (self.calls - self.looked_call)
        self.looked_at, self.looked_call = now, self.calls
        wait = min(_SECONDS_PER_RATE, self.seconds / _RATES, self.remaining)
        self.next_look = self.calls + (max(int(wait / self.step_seconds), 1) if self.step_seconds else 1)
        if self.remaining <= (self.step_seconds or 0):
            self.model.stop_training = True  # after the step that begins now
        self._set_rate(updates)

    def _updates(self):
        """The optimizer's updates so far, which are over once they are known; on JAX, `self.model` has fetched them."""
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def _set_rate(self, updates):
        rise = (updates - self.first_update + 1) / max(self.warmup_steps, 1)
        self.rate = self.peak * min(rise, _DECAYS[self.decay](1 - self.remaining / self.seconds))
        self.model.optimizer.learning_rate = self.rate

"""Progress and the budget of time, in fit, with a real clock and with one that the test sets."""

import io
import math
import sys
import threading
import time
import warnings

import keras
import numpy as np
import pytest
from keras import ops

from llmfound.training import Checkpoints, LinearWarmupDecay, Perplexity, Progress, TimeBudget, callbacks

X = np.ones((24, 1), "float32")


def make_model(rate=0.1):
    """Its kernel falls by the learning rate in every step, for the gradient is always 1."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(rate), lambda y_true, y_pred: y_pred)
    return model


class Clock:
    """Stands still but for `advance`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


class Steps(keras.callbacks.Callback):
    """Makes each step take `seconds` of the clock, and records what the kernel lost in it."""

    def __init__(self, clock, seconds, compilation=None):
        super().__init__()
        self.clock = clock
        self.durations = {0: seconds if compilation is None else compilation}
        self.seconds = seconds

    def on_train_begin(self, logs=None):
        self.kernels = []

    def on_train_batch_begin(self, batch, logs=None):
        self.kernels.append(float(ops.convert_to_numpy(self.model.weights[0]).item()))

    def on_train_batch_end(self, batch, logs=None):
        self.clock.advance(self.durations.get(len(self.kernels) - 1, self.seconds))

    def on_train_end(self, logs=None):
        self.kernels.append(float(ops.convert_to_numpy(self.model.weights[0]).item()))

    @property
    def rates(self):
        return -np.diff(self.kernels)


@pytest.mark.parametrize(
    "decay, fall", [("linear", lambda x: 1 - x), ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2)]
)
def test_rate_of_every_step(clock, decay, fall):
    steps, budget = Steps(clock, 0.125, compilation=50.0), TimeBudget(0.1, 0.5, warmup_steps=8, decay=decay)
    make_model().fit(X, X, batch_size=2, epochs=100, verbose=0, callbacks=[steps, budget])
    # compilation, in the first step, is not counted, and the other 48 fill the 6 seconds
    expected = [0.5 * min((k + 1) / 8, fall(max(k - 1, 0) / 48)) for k in range(49)]
    np.testing.assert_allclose(steps.rates, expected, atol=2e-6)


def test_clock_is_looked_at_every_two_seconds(clock):
    steps, budget = Steps(clock, 0.5), TimeBudget(20, 1.0, warmup_steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the epochs are over before the budget
        make_model().fit(X, X, batch_size=1, epochs=2, shuffle=False, verbose=0, callbacks=[steps, budget])
    changes = np.flatnonzero(np.abs(np.diff(steps.rates[:24])) > 1e-6)
    np.testing.assert_array_equal(np.diff(changes)[2:], 4)


def test_validation_is_no_part_of_a_step(clock):
    """A pause between epochs costs time but does not look like one long step, which would end the training."""

    class Pause(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            clock.advance(15.0)

    steps, budget = Steps(clock, 0.1), TimeBudget(0.5, 1.0, warmup_steps=0)
    make_model().fit(X, X, batch_size=2, epochs=100, verbose=0, callbacks=[steps, Pause(), budget])
    trained = 0.1 * (len(steps.rates) - 1)
    assert 24 <= len(steps.rates) < 30 and trained < 30 - 15
    assert budget.remaining == 0


def test_warmup_counts_the_steps_of_this_fit(clock):
    model = make_model()
    for _ in range(2):
        steps = Steps(clock, 0.1)
        model.fit(X, X, batch_size=2, epochs=9, verbose=0, callbacks=[steps, TimeBudget(0.1, 0.5, warmup_steps=8)])
        np.testing.assert_allclose(steps.rates[:3], [0.5 / 8, 1.0 / 8, 1.5 / 8], atol=2e-6)


def test_budget_in_real_time():
    budget = TimeBudget(2 / 60, 0.5, warmup_steps=10)
    model = make_model()
    model.fit(X, X, batch_size=1, epochs=1_000_000, verbose=0, callbacks=[budget])
    late = time.monotonic() - budget.started_at - 2
    assert -1 < late < 1.5  # machines that are shared stall, and a step that lasts longer than what is left is the last
    assert budget.rate < 0.05 * 0.5
    np.testing.assert_allclose(float(ops.convert_to_numpy(model.optimizer.learning_rate)), budget.rate, rtol=1e-5)
    assert budget.remaining < 0.2 and model.stop_training  # it ends before a step that would end too late


def test_too_few_epochs_are_reported(clock):
    with pytest.warns(UserWarning, match="600 of 600 seconds left, at learning rate 1.0e-01; give fit more epochs"):
        make_model().fit(X, X, verbose=0, callbacks=[TimeBudget(10, 0.1, 0)])


def test_schedule_is_refused():
    with pytest.raises(ValueError, match="give the optimizer a number"):
        make_model(LinearWarmupDecay(0.1, 0, 10)).fit(X, X, verbose=0, callbacks=[TimeBudget(1, 0.1, 0)])


@pytest.mark.parametrize(
    "arguments, match",
    [
        ((0, 0.1, 0), "got 0 and 0.1"),
        ((1, 0.0, 0), "got 1 and 0.0"),
        ((1, 0.1, -1), "got -1"),
        ((1, 0.1, 0, "exponential"), "linear, cosine; got 'exponential'"),
    ],
)
def test_wrong_budgets_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        TimeBudget(*arguments)


def test_plain_lines(clock, capsys):
    steps = Steps(clock, 0.5)
    progress = Progress(tokens=np.int64(100), every=1.0)
    model = make_model(LinearWarmupDecay(0.1, 0, 1000))
    model.fit(X, X, batch_size=4, epochs=2, validation_data=(X, X), verbose=0, callbacks=[steps, progress])
    lines = capsys.readouterr().out.splitlines()
    ends = [line for line in lines if "val_loss" in line]
    assert len(ends) == 2 and "epoch 1/2  step 6/6" in ends[0] and "epoch 2/2  step 6/6" in ends[1]
    assert 4 <= len(lines) <= 8  # 6 seconds, a line a second, and the epochs' own
    for line in lines:
        assert "loss " in line and "learning rate " in line and "left" in line
    assert "learning rate 1.00e-01" in lines[0]
    assert "200 tokens/s" in ends[1] and ends[1].endswith("0:00:00 left")
    assert "\x1b" not in "".join(lines)


def test_lines_come_at_the_interval_only(clock, capsys):
    model = make_model(LinearWarmupDecay(0.24, 0, 25))
    model.fit(X, X, batch_size=1, verbose=0, callbacks=[Steps(clock, 1.0), Progress(every=100.0)])
    (line,) = capsys.readouterr().out.splitlines()
    assert "step 24/24" in line and "1.00 steps/s" in line
    assert "learning rate 1.00e-02" in line  # that of the last step


def test_an_execution_of_several_steps_may_end_beyond_the_epoch(clock, capsys):
    """As 3 at a time of 8; by hand, for Keras has no such executions on PyTorch."""
    progress = Progress(every=1000.0)
    progress.set_params({"steps": 8, "epochs": 3})
    progress.set_model(make_model())
    progress.on_train_begin()
    for epoch in range(2):
        progress.on_epoch_begin(epoch)
        for batch in (0, 3, 6):
            progress.on_train_batch_begin(batch)
            clock.advance(30.0)
            progress.on_train_batch_end(batch + 2)
        progress.on_epoch_end(epoch)
    lines = capsys.readouterr().out.splitlines()
    assert "epoch 1/3  step 8/8" in lines[0] and "epoch 2/3  step 8/8" in lines[1]
    assert "0.08 steps/s" in lines[1] and lines[1].endswith("0:01:36 left")


def test_tokens_are_the_mean_of_the_batches(clock, capsys):
    class Batches(keras.utils.PyDataset):
        tokens_per_epoch = 30

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return X[:2], X[:2]

    batches = Batches()
    make_model().fit(batches, verbose=0, callbacks=[Steps(clock, 0.25), Progress(batches)])
    assert f"{30 / 4 / 0.25:.0f} tokens/s" in capsys.readouterr().out


def test_budget_is_shown(clock, capsys):
    steps, budget = Steps(clock, 0.5), TimeBudget(0.1, 0.5, warmup_steps=0)
    make_model().fit(
        X, X, batch_size=2, epochs=10**6, verbose=0, callbacks=[steps, budget, Progress(10, budget=budget, every=0)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert "/1000000" not in lines[0] and "0:00:06 left" in lines[0]
    assert any("0:00:03 left" in line for line in lines)
    assert lines[-1].endswith("0:00:00 left")


def test_the_mean_of_a_metric_that_is_a_vector_is_shown(capsys):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, "sigmoid", bias_initializer="ones")])
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=[keras.metrics.F1Score(threshold=0.5, name="f1")])
    model.fit(0 * X, np.tile([[1.0, 0.0]], (24, 1)), verbose=0, callbacks=[Progress()])
    assert "  f1 0.5  " in capsys.readouterr().out


def test_metrics_are_shown(capsys):
    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(5, 5)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(), loss, metrics=[Perplexity()])
    ids = np.ones((8, 4), "int32")
    model.fit(ids, ids, batch_size=2, verbose=0, callbacks=[Progress(8)])
    (line,) = capsys.readouterr().out.splitlines()
    assert "perplexity " in line and "tokens/s" in line


def test_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(callbacks, "_BAR_SECONDS", 0.0)
    make_model().fit(X, X, batch_size=4, verbose=0, callbacks=[Progress(100)])
    assert sys.stdout is terminal
    written = terminal.getvalue()
    assert "\x1b[" in written and "tokens/s" in written and "━" in written
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")  # the cursor is back


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="Keras runs callbacks on its main thread")
def test_steps_do_not_wait_for_the_callbacks(tmp_path):
    threads = []

    class Watched(Progress):
        def on_train_batch_end(self, batch, logs=None):
            threads.append(threading.current_thread())
            super().on_train_batch_end(batch, logs)

    budget = TimeBudget(0.5 / 60, 0.1, 0)
    make_model().fit(
        X,
        X,
        epochs=10**6,
        verbose=0,
        callbacks=[budget, Checkpoints(tmp_path, steps=10**6), Watched(10, budget=budget)],
    )
    assert threads and threading.main_thread() not in threads


@pytest.mark.parametrize("tokens", [0, -1.0, "many"])
def test_wrong_tokens_are_named(tokens):
    with pytest.raises(ValueError, match=f"got {tokens!r}"):
        Progress(tokens)
    with pytest.raises(ValueError, match="got -1 seconds"):
        Progress(every=-1)

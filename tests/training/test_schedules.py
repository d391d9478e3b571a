"""Learning rates: the papers' numbers, and what an optimizer makes of them in fit."""

import keras
import numpy as np
import pytest
from keras import ops

from llmfound.testing import assert_close
from llmfound.training import BERTSchedule, InverseSquareRoot, LinearWarmupDecay, SlantedTriangular, unfreezing_stages


def rate(schedule, s):
    """The rate of step s, counted from 1 as in the papers."""
    value = schedule(ops.convert_to_tensor(s - 1, dtype="int32"))
    assert keras.backend.standardize_dtype(value.dtype) == "float32" and tuple(value.shape) == ()
    return float(ops.convert_to_numpy(value))


@pytest.mark.parametrize(
    "arguments, s, expected",
    [
        ({}, 1, 1.746928107e-7),
        ({}, 1000, 1.746928107e-4),
        ({}, 4000, 6.987712430e-4),
        ({}, 16000, 3.493856215e-4),
        ({}, 100_000, 1.397542486e-4),
        ({}, 1_000_000, 512**-0.5 * 1_000_000**-0.5),
        ({"hidden_dim": 1024}, 4000, 4.941058844e-4),
        ({"factor": 2.0, "warmup_steps": 8000}, 8000, 9.882117688e-4),
        ({"factor": 2.0, "warmup_steps": 8000}, 100_000, 2.795084972e-4),
    ],
)
def test_inverse_square_root_is_the_papers(arguments, s, expected):
    np.testing.assert_allclose(rate(InverseSquareRoot(**arguments), s), expected, rtol=5e-7)


def test_inverse_square_root_peaks_at_the_end_of_the_warmup():
    schedule = InverseSquareRoot(warmup_steps=50)
    rates = [rate(schedule, s) for s in range(1, 101)]
    assert np.argmax(rates) == 49
    np.testing.assert_allclose(max(rates), schedule.peak, rtol=1e-6)


def test_inverse_square_root_from_peak():
    schedule = InverseSquareRoot.from_peak(5e-4, warmup_steps=100)
    np.testing.assert_allclose(schedule.peak, 5e-4, rtol=1e-12)
    np.testing.assert_allclose([rate(schedule, s) for s in (50, 100, 400)], [2.5e-4, 5e-4, 2.5e-4], rtol=1e-6)


def test_linear_warmup_decay():
    schedule = LinearWarmupDecay(1e-3, warmup_steps=10, steps=110, end=1e-4)
    expected = {1: 1e-4, 5: 5e-4, 10: 1e-3, 60: 5.5e-4, 110: 1e-4, 111: 1e-4, 10**6: 1e-4}
    np.testing.assert_allclose([rate(schedule, s) for s in expected], list(expected.values()), rtol=1e-5)
    second_differences = np.diff([rate(schedule, s) for s in range(10, 111)], 2)
    assert np.abs(second_differences).max() < 1e-9


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_no_warmup_starts_at_the_peak(warmup_steps):
    schedule = LinearWarmupDecay(3e-4, warmup_steps, steps=1_000_000)
    np.testing.assert_allclose(rate(schedule, 1), 3e-4, rtol=1e-6)
    np.testing.assert_allclose(rate(schedule, 500_001), 1.5e-4, rtol=1e-5)
    assert rate(schedule, 1_000_000) == 0 == rate(schedule, 2_000_000)


def test_check_4_berts_schedule():
    schedule = BERTSchedule(1e-4, warmup_steps=10_000, steps=1_000_000)
    expected = {0: 0, 1: 1e-8, 5000: 5e-5, 9999: 9.999e-5, 10_000: 9.9e-5, 500_000: 5e-5, 10**6: 0, 2 * 10**6: 0}
    np.testing.assert_allclose([rate(schedule, s + 1) for s in expected], list(expected.values()), rtol=1e-5)
    assert rate(BERTSchedule(1e-4, 0, 10), 1) == pytest.approx(1e-4)


SCHEDULES = [
    BERTSchedule(0.1, 3, 8),
    InverseSquareRoot(64, 3, 0.5),
    InverseSquareRoot.from_peak(0.1, 3),
    LinearWarmupDecay(0.1, 3, 8, 0.01),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_optimizer_steps_by_the_schedule(schedule):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(schedule), lambda y_true, y_pred: y_pred)  # a gradient of 1, always
    x = np.ones((12, 1), "float32")
    model.fit(x, x, batch_size=2, epochs=2, shuffle=False, verbose=0)
    expected = -sum(rate(schedule, s) for s in range(1, 13))
    np.testing.assert_allclose(ops.convert_to_numpy(model.weights[0]).item(), expected, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_survives_saving(schedule, tmp_path):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(schedule), "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer.get_config()["learning_rate"]
    assert loaded["registered_name"] == f"llmfound>{type(schedule).__name__}"
    assert loaded["config"] == schedule.get_config()
    assert rate(keras.optimizers.schedules.deserialize(loaded), 5) == rate(schedule, 5)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: InverseSquareRoot(hidden_dim=0), "got 0 and 1.0"),
        (lambda: InverseSquareRoot(factor=-1.0), "got 512 and -1.0"),
        (lambda: InverseSquareRoot(warmup_steps=0), "at least 1; got 0"),
        (lambda: InverseSquareRoot.from_peak(1e-3, 0), "at least 1; got 0"),
        (lambda: InverseSquareRoot.from_peak(0.0), "must be positive"),
        (lambda: LinearWarmupDecay(0.0, 0, 10), "peak=0.0"),
        (lambda: LinearWarmupDecay(1e-3, 0, 10, end=1.0), "end=1.0"),
        (lambda: LinearWarmupDecay(1e-3, -1, 10), "at least 0; got -1"),
        (lambda: LinearWarmupDecay(1e-3, 10, 10), r"steps \(10\) must be greater than warmup_steps \(10\)"),
    ],
)
def test_wrong_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# Slanted triangular rates


def slanted(steps, **options):
    schedule = SlantedTriangular(0.01, steps, **options)
    total = sum(schedule.steps)
    return np.array([float(ops.convert_to_numpy(schedule(step))) for step in range(total)])


def test_check_3_the_slanted_triangle_of_1000_steps():
    rates = slanted(1000)
    expected = {0: 3.125e-4, 50: 5.15625e-3, 99: 9.903125e-3, 100: 1e-2, 550: 5.15625e-3, 999: 3.232638889e-4}
    for step, rate in expected.items():
        assert abs(rates[step] / rate - 1) < 1e-5
    assert abs(rates.mean() - 5.15625e-3) < 1e-7
    assert rates.argmax() == 100
    assert np.abs(np.diff(rates[:101], 2)).max() < 1e-8 and np.abs(np.diff(rates[100:], 2)).max() < 1e-8


def test_check_3_a_stage_that_is_no_multiple_of_ten():
    rates = slanted(19)
    assert abs(rates[18] - 8.506944e-4) < 1e-9
    assert rates.argmax() == 1 and rates.min() > 0


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 11])
def test_short_stages_have_positive_rates(steps):
    rates = slanted(steps)
    assert np.isfinite(rates).all() and rates.min() > 0 and rates.max() <= 0.01 * (1 + 1e-6)


def test_stages_follow_each_other():
    assert_close(slanted([19, 30, 1]), np.concatenate([slanted(19), slanted(30), slanted(1)]), 1e-7)
    after = SlantedTriangular(0.01, [5, 10])(40)
    assert_close(after, 0.01 / 32, 1e-7)


@pytest.mark.parametrize("arguments, stages", [
    (dict(groups=5, epochs=10, steps_per_epoch=7), [7, 7, 7, 7, 42]),
    (dict(groups=5, epochs=5, steps_per_epoch=7), [7] * 5),
    (dict(groups=3, epochs=7, steps_per_epoch=2, epochs_per_group=2), [4, 4, 6]),
    (dict(groups=5, epochs=2, steps_per_epoch=3), [3, 3]),
    (dict(groups=3, epochs=3, steps_per_epoch=1, epochs_per_group=2), [2, 1]),
    (dict(groups=1, epochs=4, steps_per_epoch=5), [20]),
])  # fmt: skip
def test_the_steps_of_the_stages(arguments, stages):
    assert unfreezing_stages(**arguments) == stages


@pytest.mark.parametrize("arguments, message", [
    (dict(steps=0), "steps must be at least 1, the number of training steps of the stage; got 0"),
    (dict(), "steps must be at least 1"),
    (dict(steps=[3, 0]), r"got \[3, 0\]"),
    (dict(steps=2.5), "got 2.5"),
    (dict(steps=5, peak=0), "peak must be positive"),
    (dict(steps=5, cut_fraction=1.0), "cut_fraction between 0 and 1"),
    (dict(steps=5, ratio=0.5), "ratio at least 1"),
])  # fmt: skip
def test_slanted_triangles_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlantedTriangular(**arguments)


def test_stages_that_make_no_sense():
    with pytest.raises(ValueError, match="All arguments must be positive; got groups=0"):
        unfreezing_stages(0, 1, 1)

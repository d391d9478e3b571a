"""Checkpoints: whole or not there, and a run that was killed ends like one that was not, bit for bit.

Run as a script, this file is the training process that is killed: `python test_checkpoints.py FOLDER EPOCHS`, and
`transformer` at the end for that model.
"""

import functools
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import llmfound
from llmfound.training import Adam, Checkpoints, checkpoints

X = np.ones((12, 3), "float32")
BATCHES = 10  # of an epoch of `train`


class Letters:
    """A tokenizer of one id per letter."""

    pad_id, start_id, end_id, vocab_size = 0, 1, 2, 29

    def encode_batch(self, texts):
        return [[ord(letter) - ord("a") + 3 for letter in text] for text in texts]


def make_batches(count=60, **options):
    words = ["".join(random.Random(i).choices("abcdefgh", k=1 + i % 11)) for i in range(2 * count)]
    options = dict(batch_size=6, num_buckets=1) | options  # one shape is one compilation
    return llmfound.data.TranslationBatches(list(zip(words[::2], words[1::2])), Letters(), **options)


def make_model(transformer=False, metrics=True):
    if transformer:
        sizes = dict(num_layers=1, hidden_dim=8, num_heads=2, intermediate_dim=8, max_length=16, dropout=0.2)
        model = llmfound.models.Transformer(Letters.vocab_size, **sizes)
    else:  # compiled in a fraction of the time
        source_ids, target_ids = (
            keras.Input((None,), dtype="int32", name=f"{side}_ids") for side in ("source", "target")
        )
        x = keras.layers.Embedding(Letters.vocab_size, 8)(target_ids)
        x = keras.layers.Dense(Letters.vocab_size)(keras.layers.Dropout(0.2)(x))
        model = keras.Model({"source_ids": source_ids, "target_ids": target_ids}, x)
    rate = llmfound.training.InverseSquareRoot(hidden_dim=8, warmup_steps=20)
    loss = llmfound.training.SmoothedCrossEntropy(0.1)
    model.compile(llmfound.training.Adam(rate), loss, metrics=[llmfound.training.Perplexity()] if metrics else None)
    return model


class Crash(keras.callbacks.Callback):
    """Raises before the step of this number."""

    def __init__(self, step):
        super().__init__()
        self.step, self.done = step, 0

    def on_train_batch_begin(self, batch, logs=None):
        if self.done == self.step:
            raise InterruptedError
        self.done += 1


def train(folder, epochs=3, crash=None, transformer=False, **options):
    """The model and the history of a run on few pairs, which goes on from the folder; None trains without."""
    keras.utils.set_random_seed(0)
    batches = make_batches()
    assert len(batches) == BATCHES
    model = make_model(transformer)
    written = [] if folder is None else [Checkpoints(folder, batches, **({"steps": 1} | options))]
    try:
        model.fit(batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[*written, Crash(crash)])
    except InterruptedError:
        pass
    return model, model.history.history


def state(model):
    return {name: ops.convert_to_numpy(x) for name, x in checkpoints._training_variables(model).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name


@functools.cache
def uninterrupted(epochs=3, transformer=False):
    """The final state and the history of a run without checkpoints."""
    model, history = train(None, epochs, transformer=transformer)
    return state(model), history


def stored(path):
    """The state and the place in a checkpoint, without the generator that PyTorch's process shares."""
    arrays, place = checkpoints.read_checkpoint(path)
    return {name: array for name, array in arrays.items() if not name.startswith("random/")}, place


def make_dense(units=2, dtype=None, optimizer="adam", steps_per_execution=1):
    layers = [keras.layers.Dense(units, dtype=dtype), keras.layers.Dropout(0.5, seed=3)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(optimizer, "mse", metrics=["mae"], steps_per_execution=steps_per_execution)
    return model


def fit_dense(folder, model=None, epochs=1, data=None, crash=None, **options):
    """A run of 6 steps an epoch."""
    model = model or make_dense()
    written = Checkpoints(folder, data, **({"steps": 1} | options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without `data`")
        model.fit(X, X[:, :2], 2, epochs, 0, callbacks=[written, Crash(crash)], shuffle=False)
    return written


class Record(keras.callbacks.Callback):
    """The kernel before every step and after the last."""

    def on_train_begin(self, logs=None):
        self.kernels = []

    def on_train_batch_begin(self, batch, logs=None):
        self.kernels.append(ops.convert_to_numpy(self.model.layers[0].kernel).copy())

    def on_train_end(self, logs=None):
        self.on_train_batch_begin(None)


def test_every_so_many_steps_and_their_mean(tmp_path):
    model, record = make_dense(), Record()
    written = Checkpoints(tmp_path / "run", keep=3, steps=4)
    model.fit(X, X[:, :2], batch_size=2, epochs=3, verbose=0, callbacks=[written, record])  # 18 steps
    names = [path.name for path in written.paths]
    assert names == [f"step-{step:09d}.safetensors" for step in (12, 16, 18)]
    assert sorted(os.listdir(tmp_path / "run")) == names
    places = [checkpoints.read_checkpoint(path)[1] for path in written.paths]
    assert [(place["epoch"], place["batch"]) for place in places] == [(2, 0), (2, 4), (3, 0)]
    before = [ops.convert_to_numpy(variable) for variable in model.optimizer.variables]
    assert written.average(model) == written.paths
    expected = np.mean([record.kernels[step] for step in (12, 16, 18)], axis=0, dtype="float64")
    np.testing.assert_array_equal(ops.convert_to_numpy(model.layers[0].kernel), expected.astype("float32"))
    for variable, array in zip(model.optimizer.variables, before):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), array)
    with pytest.raises(ValueError, match="model 'other' has"):
        llmfound.training.average_weights(written.paths, keras.Sequential([keras.Input((3,))], name="other"))


def test_every_so_many_minutes(tmp_path, monkeypatch):
    class Clock(keras.callbacks.Callback):
        now = 0.0

        def monotonic(self):
            return self.now

        def on_train_batch_end(self, batch, logs=None):
            self.now += 10

    clock = Clock()
    monkeypatch.setattr(checkpoints, "time", clock)
    written = Checkpoints(tmp_path, keep=10, minutes=1)
    make_dense().fit(X, X[:, :2], batch_size=1, epochs=2, verbose=0, callbacks=[written, clock])
    assert [int(path.name[5:14]) for path in written.paths] == [6, 12, 18, 24]


@pytest.mark.parametrize(
    "crash, transformer",
    [(1, False), (BATCHES, False), (BATCHES + 7, True)],
)
def test_run_that_goes_on_ends_like_one_without_interruption(tmp_path, capsys, crash, transformer):
    expected, history = uninterrupted(transformer=transformer)
    train(tmp_path, crash=crash, transformer=transformer)
    assert int(Checkpoints(tmp_path, steps=1).paths[-1].name[5:14]) == crash
    again, rest = train(tmp_path, transformer=transformer)
    epoch, batch = divmod(crash, BATCHES)
    assert f"{epoch} epochs and {batch} batches are done, training goes on" in capsys.readouterr().out
    assert_same(state(again), expected)
    assert rest == {name: values[epoch:] for name, values in history.items()}
    assert_same(stored(Checkpoints(tmp_path, steps=1).paths[-1])[0], expected)


def test_run_that_crashes_again_and_again(tmp_path):
    for crash in (2, BATCHES, 3, 1, 9):  # each counts the batches that are read over, too
        train(tmp_path, crash=crash, steps=2)
    again, _ = train(tmp_path, steps=2)
    assert_same(state(again), uninterrupted()[0])


def test_finished_run_trains_no_more_and_a_longer_one_goes_on(tmp_path, capsys):
    model, _ = train(tmp_path, epochs=2)
    again, history = train(tmp_path, epochs=2)
    assert history == {} and "2 epochs and 0 batches are done, none is left" in capsys.readouterr().out
    assert_same(state(again), state(model))
    longer, _ = train(tmp_path, epochs=3)
    assert_same(state(longer), uninterrupted()[0])
    longer.fit(make_batches(), epochs=1, shuffle=False, verbose=0)  # the epoch of the checkpoint is forgotten
    assert int(ops.convert_to_numpy(longer.optimizer.iterations)) == 4 * BATCHES


class Stop(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        self.model.stop_training = batch == 4


@pytest.mark.parametrize("validation", (False, True))
def test_run_that_was_stopped_within_an_epoch_goes_on_there(tmp_path, validation):
    keras.utils.set_random_seed(0)
    batches, model = make_batches(), make_model()
    written = Checkpoints(tmp_path, batches, steps=100)
    options = dict(validation_data=make_batches(12)) if validation else {}
    model.fit(batches, epochs=3, shuffle=False, verbose=0, callbacks=[written, Stop()], **options)
    assert [path.name for path in written.paths] == ["step-000000005.safetensors"]
    again, history = train(tmp_path)
    expected = uninterrupted()
    assert_same(state(again), expected[0])
    assert history == expected[1]


@pytest.mark.parametrize("make", (
    lambda: keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5),
    lambda: llmfound.training.ASGD(0.1, average=True),
), ids=("EMA", "ASGD"))  # fmt: skip
def test_a_run_goes_on_from_the_weights_and_not_from_their_mean(tmp_path, make):
    def run(*runs):
        keras.utils.set_random_seed(0)
        for callbacks, epochs in runs:
            model = make_dense(optimizer=make())
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*without `data`")
                model.fit(X, X[:, :2], 2, epochs, 0, callbacks=callbacks, shuffle=False)
        return model

    folders = [tmp_path / name for name in "abc"]
    first, stopped, longer = [Checkpoints(folder, steps=100) for folder in folders]
    expected = state(run(([first], 3)))
    assert_same(state(run(([stopped, Stop()], 3), ([stopped], 3))), expected)
    assert_same(state(run(([longer], 1), ([longer], 3))), expected)
    assert_same(state(run(([longer], 3))), expected)  # finished, and so not trained


def test_a_run_goes_on_from_the_weights_that_a_callback_exchanged_for_their_mean(tmp_path):
    def run(folder, epochs=3, crash=None):
        keras.utils.set_random_seed(0)
        model = make_dense(optimizer=Adam(0.1, use_ema=True, ema_momentum=0.5))
        callbacks = [Checkpoints(folder, steps=6), keras.callbacks.SwapEMAWeights(swap_on_epoch=True), Crash(crash)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*without `data`")
            model.fit(X, X[:, :2], 2, epochs, 0, callbacks=callbacks, shuffle=False)
        return state(model)

    expected = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "run", crash=13)  # within the third epoch
    run(tmp_path / "longer", epochs=2)
    for folder in ("run", "longer"):
        for name, found in run(tmp_path / folder).items():  # on TensorFlow, Keras exchanges by sums, which round
            np.testing.assert_allclose(found, expected[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("steps_per_execution", [1] if keras.backend.backend() == "torch" else [1, 3])
def test_arrays_go_on_too_with_a_warning(tmp_path, steps_per_execution):
    def run(folder, crash=None):
        keras.utils.set_random_seed(0)
        model = make_dense(steps_per_execution=steps_per_execution)
        fit_dense(folder, model, epochs=3, crash=crash)
        return state(model)

    expected = run(tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tmp_path / "run", crash=9 // steps_per_execution)
    assert_same(run(tmp_path / "run"), expected)
    with pytest.warns(UserWarning, match=r"from step-000000018\.safetensors without `data`.*shuffle=False"):
        make_dense().fit(X, X[:, :2], verbose=0, callbacks=[Checkpoints(tmp_path / "run", steps=1)])


def test_a_plain_model_of_mixed_float16_goes_on(tmp_path):
    for crash in (8, None):
        model = make_dense(dtype="mixed_float16", optimizer=keras.optimizers.LossScaleOptimizer(Adam(), 2.0))
        try:
            fit_dense(tmp_path, model, epochs=3, crash=crash)
        except InterruptedError:
            pass
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 18


def test_checkpoints_do_not_change_the_training(tmp_path):
    assert_same(state(train(tmp_path)[0]), uninterrupted()[0])


def test_time_budget_goes_on(tmp_path):
    for crash in (8, None):
        model = make_dense()
        budget = llmfound.training.TimeBudget(minutes=1, peak=0.01, warmup_steps=2)
        written = Checkpoints(tmp_path, steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model.fit(X, X[:, :2], 2, 3, 0, callbacks=[written, budget, Crash(crash)], shuffle=False)
            except InterruptedError:
                pass
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 18


@pytest.mark.parametrize("stage", ["save_file", "fsync", "replace"])
def test_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch, stage):
    def fail(path, *_):
        raise OSError("disk full")

    if stage == "save_file":
        monkeypatch.setattr("safetensors.numpy.save_file", lambda arrays, path, metadata: fail(path.write_bytes(b"x")))
    else:
        monkeypatch.setattr(checkpoints.os, stage, fail)
    with pytest.raises(OSError, match="disk full"):
        fit_dense(tmp_path)
    assert Checkpoints(tmp_path, steps=1).paths == []
    with pytest.raises(ValueError, match="holds no checkpoint"):
        Checkpoints(tmp_path, steps=1).average(make_dense())
    monkeypatch.undo()
    fit_dense(tmp_path)
    assert not list(tmp_path.glob("*.partial"))  # what was left over is gone


def damage(path, kind):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-1] if kind == "truncated" else content)


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, kind):
    train(tmp_path, crash=7)
    newest, good = Checkpoints(tmp_path, steps=1).paths[-1], Checkpoints(tmp_path, steps=1).paths[-2]
    damage(newest, kind)
    with pytest.warns(UserWarning, match=rf"{newest.name} is .*damaged.* {good.name} is used instead"):
        again, _ = train(tmp_path)
    assert (tmp_path / "step-000000007.damaged").exists()
    assert_same(state(again), uninterrupted()[0])


def test_all_damaged_are_listed(tmp_path):
    written = fit_dense(tmp_path, keep=2)
    for path in written.paths:
        damage(path, "truncated")
    names = [path.name for path in written.paths]
    with pytest.raises(ValueError, match=rf"(?s)remove them to start afresh.*{names[1]}.*{names[0]}"):
        fit_dense(tmp_path)
    assert sorted(os.listdir(tmp_path)) == names


def test_truncated_anywhere_is_detected(tmp_path):
    path = fit_dense(tmp_path / "run").paths[-1]
    content = path.read_bytes()
    for cut in range(len(content)):
        (tmp_path / "step.safetensors").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"step\.safetensors is truncated"):
            checkpoints.read_checkpoint(tmp_path / "step.safetensors")


def test_bit_flipped_anywhere_is_detected_or_changes_nothing(tmp_path):
    path = fit_dense(tmp_path / "run").paths[-1]
    content, (arrays, place) = path.read_bytes(), checkpoints.read_checkpoint(path)
    detected = 0
    for i in range(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1 << i % 8
        (tmp_path / "step.safetensors").write_bytes(flipped)
        try:
            found = checkpoints.read_checkpoint(tmp_path / "step.safetensors")
        except ValueError as error:
            assert "step.safetensors" in str(error)
            detected += 1
            continue
        assert found[1] == place
        assert_same(found[0], arrays)
    assert detected > 0.95 * len(content)


def test_newer_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_VERSION", 2)
    fit_dense(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 2; this llmfound reads format 1"):
        fit_dense(tmp_path)


def test_every_type_survives(tmp_path):
    path = tmp_path / "step.safetensors"
    shapes = [(), (0,), (2, 0), (3,), (2, 3)]
    dtypes = ["float64", "float32", "float16", ml_dtypes.bfloat16, "int64", "int32", "uint32", "int8", "uint8", "bool"]
    arrays = {f"{np.dtype(dtype)}{shape}": np.ones(shape, dtype) for dtype in dtypes for shape in shapes}
    checkpoints.write_checkpoint(path, arrays, {})
    found, _ = checkpoints.read_checkpoint(path)
    assert_same(found, arrays)
    assert all(found[name].shape == array.shape for name, array in arrays.items())


def test_bfloat16_model(tmp_path):
    model = make_dense(dtype="bfloat16")
    written = fit_dense(tmp_path, model)
    again = make_dense(dtype="bfloat16")
    fit_dense(tmp_path, again)
    assert_same(state(again), state(model))
    written.average(again)
    assert keras.backend.standardize_dtype(again.layers[0].kernel.dtype) == "bfloat16"


@pytest.mark.parametrize(
    "options, match",
    [
        ({"units": 4}, r"for model/0000/.*dense/kernel, .*safetensors has float32 \(3, 2\) and model .* \(3, 4\)"),
        ({"dtype": "float16"}, r"has float32 \(3, 2\) and model .* has float16 \(3, 2\)"),
        ({"optimizer": "sgd"}, r"for optimizer/Adam/0000.* has nothing; .*; and [0-9]+ more"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(tmp_path, options, match):
    fit_dense(tmp_path)
    other = make_dense(**options)
    before = [ops.convert_to_numpy(weight) for weight in other.weights]
    with pytest.raises(ValueError, match=match):
        other.fit(X, np.ones((12, other.output_shape[-1])), verbose=0, callbacks=[Checkpoints(tmp_path, steps=1)])
    for weight, array in zip(other.weights, before):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), array)


def fit_batches(folder, batches, data="same", model=None, **options):
    model = model or make_model()
    written = Checkpoints(folder, batches if data == "same" else data, steps=1)
    return model.fit(batches, epochs=2, verbose=0, **({"shuffle": False, "callbacks": [written]} | options))


def test_place_that_cannot_be_found_again_is_refused(tmp_path):
    train(tmp_path, crash=7)
    with pytest.raises(ValueError, match="after 7 batches, and fit has other data now: data_seed 0 has become 1"):
        fit_batches(tmp_path, make_batches(seed=1))
    with pytest.raises(ValueError, match=f"steps {BATCHES} has become 20"):
        fit_batches(tmp_path, make_batches(batch_size=3))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="written with an epoch of `data`"):
        fit_batches(tmp_path, make_batches(), None)
    with pytest.raises(ValueError, match=r"fit begins at epoch 1, and the checkpoint is of epoch 0; leave out"):
        fit_batches(tmp_path, make_batches(), initial_epoch=1)
    if keras.backend.backend() != "torch":  # which makes one step at a time only
        model = make_model()
        model.compile(model.optimizer, model.loss, steps_per_execution=2)
        with pytest.raises(ValueError, match="no multiple of steps_per_execution=2"):
            fit_batches(tmp_path, make_batches(), model=model)
    with pytest.raises(ValueError, match=r"for metrics/0002/perplexity/total, the checkpoint has .* has nothing"):
        fit_batches(tmp_path, make_batches(), model=make_model(metrics=False))


def test_data_read_otherwise_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not read in their own order; call fit\(..., shuffle=False\)"):
        fit_batches(tmp_path, make_batches(600), shuffle=True)
    with pytest.raises(ValueError, match=f"one pass over the data, of {BATCHES} batches; got 5 steps"):
        fit_batches(tmp_path, make_batches(), steps_per_epoch=5)
    with pytest.raises(ValueError, match=f"one pass over the data, of 100 batches; got {BATCHES} steps"):
        fit_batches(tmp_path, make_batches(), make_batches(600))


class Constant(keras.utils.PyDataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return X[:2], X[:2, :2]


class Moving(Constant):
    def on_epoch_end(self):
        pass


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"keep": 0, "steps": 1}, "keep must be at least 1; got 0"),
        ({}, "got None and None"),
        ({"steps": 1, "minutes": 1}, "got 1 and 1"),
        ({"steps": 0}, "got 0 and None"),
        ({"minutes": -1}, "got None and -1"),
        ({"steps": 1, "data": X}, "PyDataset given to fit, or None; got ndarray"),
        ({"steps": 1, "data": Constant(workers=2)}, "one worker, in a fixed order; got workers=2"),
        ({"steps": 1, "data": Moving()}, "Moving changes from epoch to epoch, and has no `epoch`"),
    ],
)
def test_wrong_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        Checkpoints("unused", **arguments)


def test_any_dataset_without_epoch(tmp_path):
    for crash in (4, None):
        model, data = make_dense(), Constant()
        try:
            model.fit(data, epochs=2, verbose=0, callbacks=[Checkpoints(tmp_path, data, steps=1), Crash(crash)])
        except InterruptedError:
            pass
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 12


def kill_and_compare(folder, epochs, kills, seed, transformer=False):
    """Kills the training process at random moments, lets the last one end, and compares it with one in this process.

    Every other kill waits for a file that is being written.

    Returns:
        int, the kills that left an unfinished file.
    """
    generator = random.Random(seed)
    command = [sys.executable, __file__, str(folder), str(epochs), *["transformer"] * transformer]
    written = Checkpoints(folder, steps=1)
    log = folder.with_suffix(".log")
    partial = 0

    def newest():
        return int(written.paths[-1].name[5:14]) if written.paths else 0

    def writing():
        return any(name.endswith(".partial") for name in os.listdir(folder))

    for kill in range(kills):
        before = newest()
        with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
            wanted = before + generator.randint(1, 12)  # at least one more step, so that the test comes to an end
            while newest() < wanted and process.poll() is None:
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.02))
            while kill % 2 == 0 and not writing() and process.poll() is None:
                pass
            assert process.poll() is None, f"the process ended before it was killed: {log.read_text()}"
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        partial += writing()
    subprocess.run(command, check=True, capture_output=True)
    found, place = stored(written.paths[-1])
    assert (place["epoch"], place["batch"]) == (epochs, 0)
    assert_same(found, uninterrupted(epochs, transformer)[0])
    assert not list(folder.glob("*.partial")) and not list(folder.glob("*.damaged"))
    return partial


@pytest.mark.on_one_backend  # what a backend has to do with it, the runs that are stopped in one process show
@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_run_killed_twice_ends_like_one_without_interruption(tmp_path):
    kill_and_compare(tmp_path / "run", epochs=10, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_run_killed_at_20_random_moments_ends_like_one_without_interruption(tmp_path):
    partial = kill_and_compare(tmp_path / "run", epochs=60, kills=20, seed=1, transformer=True)
    assert partial > 0
    print(f"{partial} of 20 kills left an unfinished file")


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), transformer="transformer" in sys.argv)

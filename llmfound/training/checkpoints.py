"""Checkpoints of a whole run: written so that a kill at any moment loses nothing, and gone on from by `fit` itself."""

import hashlib
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import ops

_ENTRY = "llmfound"  # in the header of a file
_VERSION = 1
_NAMED = 3  # differences that a message lists


class Checkpoints(keras.callbacks.Callback):
    """Writes checkpoints during `fit` and goes on from the newest one: run the same script again after a crash.

        batches = llmfound.data.TranslationBatches(pairs, tokenizer)
        checkpoints = llmfound.training.Checkpoints("runs/checkpoints", batches, steps=500)
        model.fit(batches, epochs=10, shuffle=False, callbacks=[checkpoints])
        checkpoints.average(model)  # if you like

    A file, `step-<updates of the optimizer>.safetensors`, holds the model's variables with the states of its random
    generators, the optimizer's, running metrics, and how many epochs and batches are done. So a run that was killed
    ends with the weights of one that was not, bit for bit on one backend; it may go on on another. A file is written
    under another name, flushed to the disk and renamed, and holds a SHA-256 of all it says; nothing in it is ever
    executed.

    With files in the folder, `fit` starts at the epoch of the newest, and reads over that epoch's first batches
    without training on them. A damaged file is named in a warning, set aside as `step-*.damaged`, and the one before
    it is used. `epochs` counts from the beginning, so `fit` of a finished run trains no more.

    Put it first among the callbacks, so that the others find the state restored; their own is not kept.
    Source: Vaswani et al. 2017, section 6.1: the last 5 are averaged for the base model, written every 10 minutes.

    Args:
        folder: path, made if need be; one for each run.
        data: the keras.utils.PyDataset given to `fit`, for instance TranslationBatches. Its `epoch`, if it has one,
            is stored and set again. None stands for data that comes in the same order in every epoch, for instance
            arrays and `shuffle=False`; nobody can check that, and a warning says so when a run goes on.
        keep: int, the number of files kept; older ones are removed.
        steps: int, batches from one checkpoint to the next; or
        minutes: float, minutes from one checkpoint to the next. One more is written at the end of training.

    Attributes:
        paths: list of Path, the checkpoints in the folder, oldest first.

    Raises:
        ValueError: if `keep` is not positive, not exactly one of `steps` and `minutes` is given and positive, or the
            order of `data` cannot be restored; in `fit`, if no file in the folder is whole, the newest whole one
            belongs to another model or other data, or `data` is not read in its own order.
    """

    def __init__(self, folder, data=None, keep=5, steps=None, minutes=None):
        super().__init__()
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}.")
        if (steps is None) == (minutes is None) or (minutes if steps is None else steps) <= 0:
            raise ValueError(f"exactly one of steps and minutes must be given, positive; got {steps} and {minutes}.")
        if data is not None:
            _check_data(data)
        self.folder = Path(folder)
        self.data = data
        self.keep = keep
        self.steps = steps
        self.minutes = minutes

    @property
    def paths(self):
        return sorted(self.folder.glob("step-*.safetensors"))

    def average(self, model):
        """Loads the mean of the checkpoints in the folder into `model`; see `average_weights` for errors.

        Returns:
            list of Path, the files averaged.
        """
        from llmfound.training.averaging import average_weights  # which reads these files, too

        paths = self.paths
        if not paths:
            raise ValueError(f"{self.folder} holds no checkpoint.")
        average_weights(paths, model)
        return paths

    def on_train_begin(self, logs=None):
        self.fitted = self.model  # on JAX, every look at `self.model` fetches the state of a running epoch
        self.steps_per_call = self.fitted.steps_per_execution
        if self.data is not None and self.params["steps"] != self.data.num_batches:
            raise ValueError(
                f"an epoch must be one pass over the data, of {self.data.num_batches} batches; got "
                f"{self.params['steps']} steps. Leave out steps_per_epoch, and give Checkpoints the data of fit."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob("step-*.partial"):  # of a run that was killed
            partial.unlink()
        self.epoch = self.first_epoch = None  # `epoch` and `batch` are the place of the next batch
        self.batch = self.done = self.saved_at = self.skip = 0
        self.last, self.written = None, False  # the state at the end; whether a stop within an epoch is on disk
        self.within = {}  # arrays of a checkpoint within an epoch, to load before the first step
        self.between = {}  # weights and means as an epoch ended, until the next one begins
        self.fitted._initial_epoch = None  # what Keras's own BackupAndRestore sets; `fit` looks at it after this
        if self.fitted.built and not self.fitted.optimizer.built:  # inside a step, TensorFlow gives other paths
            self.fitted.optimizer.build(self.fitted.trainable_variables)
        if self.paths:
            self._resume()
        self._watch_end()
        self.saved_time = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        if self.first_epoch not in (None, epoch):
            raise ValueError(
                f"fit begins at epoch {epoch}, and the checkpoint is of epoch {self.first_epoch}; leave out "
                "initial_epoch."
            )
        self.first_epoch = self.fitted._initial_epoch = None
        self.epoch, self.batch = epoch, 0
        self.written = False
        if self._due():
            self._save()
        self.between = {}

    def on_train_batch_begin(self, batch, logs=None):
        # At the end of a batch, Keras would wait for the device every time before it called us.
        if batch < self.skip:
            self._skip_call()
        else:
            if self.skip:
                self._load_within()
            self._check_order(batch)
            if batch and self._due():
                self._save()
            self.done += self.steps_per_call
        self.batch = batch + self.steps_per_call

    def on_test_begin(self, logs=None):
        self._save_stop()  # before the validation, which changes metrics and carried states

    def on_epoch_end(self, epoch, logs=None):
        if self._stopped():
            self._save_stop()
        else:
            self.epoch, self.batch = epoch + 1, 0
            self.between = self._weights_and_means()
        self.skip = 0

    def on_train_end(self, logs=None):
        self.fitted._initial_epoch = None
        vars(self.fitted.optimizer).pop("finalize_variable_values", None)
        if self.done and not self.written:
            self._write(*(self.last or self._state()))

    def _watch_end(self):
        """Keeps the state at the end of the last epoch, if then the mean of the weights takes their place.

        Training would not go on from that as it was, and Keras calls us only after it.
        """
        optimizer = self.fitted.optimizer
        vars(optimizer).pop("finalize_variable_values", None)  # of a run that was interrupted
        finalize = optimizer.finalize_variable_values
        if not optimizer.use_ema and finalize.__func__ is keras.optimizers.Optimizer.finalize_variable_values:
            return

        def keep_and_finalize(variables):
            if self.done and not self.batch:  # no epoch is interrupted, as JAX calls this then, too
                self.last = self._state()
            finalize(variables)

        optimizer.finalize_variable_values = keep_and_finalize

    def _stopped(self):
        """Whether training stops within the epoch."""
        steps = self.params["steps"]
        return self.fitted.stop_training if steps is None else self.batch < steps

    def _save_stop(self):
        if self.done and not self.written and self._stopped():
            self._save()
            self.written = True

    def _due(self):
        if self.minutes is None:
            return self.done - self.saved_at >= self.steps
        return time.monotonic() - self.saved_time >= 60 * self.minutes

    def _save(self):
        self._write(*self._state())

    def _state(self):
        """The number of updates, the arrays by name, copies all, and the place."""
        model = self.model  # on JAX, this puts the state of the epoch back into the variables
        variables = _training_variables(model)
        if self.batch:
            variables |= _named("metrics", model.metrics_variables)
        arrays = _copies(variables)
        arrays |= self.between
        arrays |= {name: module.get_rng_state().numpy() for name, module in _global_generators().items()}
        return int(ops.convert_to_numpy(model.optimizer.iterations)), arrays, self._place()

    def _weights_and_means(self):
        """Copies, by name, of what keras.callbacks.SwapEMAWeights may exchange until the next epoch begins."""
        optimizer = getattr(self.fitted.optimizer, "inner_optimizer", self.fitted.optimizer)
        if not optimizer.use_ema:
            return {}
        exchanged = {id(x) for x in (*optimizer._trainable_variables, *optimizer._model_variables_moving_average)}
        return _copies({name: x for name, x in _training_variables(self.model).items() if id(x) in exchanged})

    def _write(self, updates, arrays, place):
        write_checkpoint(self.folder / f"step-{updates:09d}.safetensors", arrays, place)
        for path in self.paths[: -self.keep]:
            path.unlink()
        self.saved_at, self.saved_time = self.done, time.monotonic()

    def _place(self):
        """What is done, and what the order of the batches depends on, as far as it is known."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "steps": self.params["steps"],
            "data_epoch": int(self.data.epoch) if hasattr(self.data, "epoch") else None,
            "data_seed": str(self.data.seed) if hasattr(self.data, "seed") else None,
        }

    def _resume(self):
        path, arrays, place, damaged = self._newest()
        if not self.fitted.built:
            raise ValueError(f"model {self.fitted.name!r} must be built to go on from {path}; call it on a batch.")
        self.within = {name: arrays.pop(name) for name in list(arrays) if name.startswith(("metrics/", "random/"))}
        load = _loader(arrays, _training_variables(self.fitted), f"model {self.fitted.name!r}", path)
        self._check_place(place, path)
        load()
        _set_global_generators(self.within)
        if hasattr(self.data, "epoch"):
            self.data.epoch = place["data_epoch"]
        self.fitted._initial_epoch = self.first_epoch = self.epoch = place["epoch"]
        self.batch = self.skip = place["batch"]
        for other in damaged:
            other.rename(other.with_suffix(".damaged"))
        then = "none is left" if self.epoch >= self.params["epochs"] else "training goes on"
        print(f"{path}: {self.epoch} epochs and {self.batch} batches are done, {then}.", flush=True)

    def _newest(self):
        """The path, arrays and place of the newest file that is whole, and the paths of newer ones that are not."""
        errors = {}
        for path in reversed(self.paths):
            try:
                found = read_checkpoint(path)
            except ValueError as error:
                errors[path] = error
                continue
            for error in errors.values():
                warnings.warn(f"{error} {path.name} is used instead.", stacklevel=2)
            return path, *found, list(errors)
        reasons = "\n".join(map(str, errors.values()))
        raise ValueError(f"no checkpoint in {self.folder} can be used; remove them to start afresh:\n{reasons}")

    def _check_place(self, place, path):
        """Raises ValueError, or warns, unless the data can be brought to the place."""
        now = self._place()
        known = isinstance(place, dict) and place.keys() == now.keys()
        if not known or not all(type(place[key]) is int and place[key] >= 0 for key in ("epoch", "batch")):
            raise ValueError(f"{path} does not tell its place in the data, as {now} does; it tells {place}.")
        if self.data is None:
            warnings.warn(
                f"training goes on from {path.name} without `data`, which is right only if the batches come in the "
                "same order in every epoch: arrays and fit(shuffle=False), for instance.",
                stacklevel=2,
            )
        if (place["data_epoch"] is None) != (now["data_epoch"] is None):
            raise ValueError(
                f"{path} was written {'without' if self.data is not None else 'with'} an epoch of `data`, and "
                "Checkpoints is now constructed otherwise, so that the order of the batches is lost."
            )
        if not place["batch"]:
            return
        changed = [key for key in ("steps", "data_seed") if place[key] != now[key]]
        if changed:
            raise ValueError(
                f"{path} was written within an epoch, after {place['batch']} batches, and fit has other data now: "
                f"{', '.join(f'{key} {place[key]} has become {now[key]}' for key in changed)}."
            )
        if place["batch"] % self.steps_per_call:
            raise ValueError(
                f"{path} was written after {place['batch']} batches of an epoch, no multiple of "
                f"steps_per_execution={self.steps_per_call}; compile the model as it was."
            )

    def _skip_call(self):
        """Lets the next call of the training function read its batches only.

        Keras fixes the number of batches of an epoch before it calls us, and has no way to begin within one.
        """
        model, train = self.fitted, self.fitted.train_function

        def read(*arguments):
            model.train_function = train
            if keras.backend.backend() != "torch":  # there the batches are read already
                for _ in range(self.steps_per_call):
                    batch = next(arguments[-1])
                if keras.backend.backend() == "tensorflow":
                    model._symbolic_build(data_batch=batch)  # its metrics; on JAX and PyTorch, they are there
            return ({}, arguments[0]) if keras.backend.backend() == "jax" else {}

        model.train_function = read

    def _load_within(self):
        """What `fit` resets as an epoch begins, and what reading its batches may have drawn from."""
        metrics = {name: array for name, array in self.within.items() if name.startswith("metrics/")}
        _loader(metrics, _named("metrics", self.model.metrics_variables), "fit", "the checkpoint")()
        _set_global_generators(self.within)
        self.within, self.skip = {}, 0

    def _check_order(self, batch):
        asked = getattr(self.data, "asked", None)
        if asked is not None and not asked[:batch].all():
            raise ValueError("the batches are not read in their own order; call fit(..., shuffle=False).")


def write_checkpoint(path, arrays, place):
    """Writes a checkpoint so that the file is either whole or not there, whatever happens meanwhile.

    Args:
        path: Path, to end in .safetensors.
        arrays: dict of arrays by name.
        place: dict, what JSON can hold.
    """
    from safetensors.numpy import save_file

    record = {"version": _VERSION, "place": place}
    record["sha256"] = _digest(arrays, record)
    partial = path.with_suffix(".partial")
    save_file(arrays, partial, {_ENTRY: json.dumps(record)})
    _flush(partial)
    os.replace(partial, path)
    if os.name == "posix":  # elsewhere, folders cannot be opened
        _flush(path.parent)


def read_checkpoint(path):
    """The arrays of a checkpoint by name, and its place; verified.

    Raises:
        ValueError: if the file is no checkpoint, is truncated or damaged, or a newer version wrote it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            record = json.loads((file.metadata() or {})[_ENTRY])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        version, place, digest = record["version"], record["place"], record.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path} is truncated, damaged or no checkpoint ({type(error).__name__}: {error}).") from error
    if version != _VERSION:
        raise ValueError(f"{path} has format {version}; this llmfound reads format {_VERSION}.")
    if digest != _digest(arrays, record):
        raise ValueError(f"{path} is damaged: its content does not have the SHA-256 that it was written with.")
    return arrays, place


def is_checkpoint(path):
    """Whether the header of a .safetensors file says that `Checkpoints` has written it."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return _ENTRY in (file.metadata() or {})


def model_variables(model):
    """The variables of a model, states of random generators included, by the names they have in a checkpoint."""
    return _named("model", model.variables)


def _copies(variables):
    return {name: np.array(ops.convert_to_numpy(x), order="C") for name, x in variables.items()}


def _training_variables(model):
    optimizer = model.optimizer
    return model_variables(model) | _named(f"optimizer/{type(optimizer).__name__}", optimizer.variables)


def _global_generators():
    """Modules of torch, by name, with the generator that Keras's own Dropout draws from, unless it is given a seed."""
    if keras.backend.backend() != "torch":
        return {}
    torch = sys.modules["torch"]
    return {"random/torch": torch} | ({"random/cuda": torch.cuda} if torch.cuda.is_available() else {})


def _set_global_generators(arrays):
    for name, module in _global_generators().items():
        if name in arrays:  # not if another backend wrote them
            module.set_rng_state(sys.modules["torch"].from_numpy(arrays[name].copy()))


def _named(group, variables):
    """Numbered, since paths may be shared; without Keras's own numbers, which grow with every model of a process."""
    return {f"{group}/{i:04d}/{re.sub(r'_[0-9]+(?=[_/]|$)', '', x.path)}": x for i, x in enumerate(variables)}


def _loader(arrays, variables, owner, path):
    """A function that assigns the arrays; ValueError, before anything is assigned, unless all of them fit."""
    differences = []
    for name in sorted(arrays.keys() | variables.keys()):
        found = [_form(x[name]) if name in x else "nothing" for x in (arrays, variables)]
        if found[0] != found[1]:
            differences.append(f"for {name}, {path} has {found[0]} and {owner} has {found[1]}")
    if differences:
        more = f"; and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
        raise ValueError(f"the checkpoint belongs to another model: {'; '.join(differences[:_NAMED])}{more}.")

    def load():
        for name, variable in variables.items():
            variable.assign(arrays[name].astype(keras.backend.standardize_dtype(variable.dtype)))

    return load


def _form(x):
    """Type and shape, to be compared; the type of integers differs from backend to backend."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    return f"{re.sub('u?int[0-9]+', 'integer', dtype)} {tuple(x.shape)}"


def _digest(arrays, record):
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(array.reshape(-1).view("uint8").data)
    return digest.hexdigest()


def _flush(path):
    """Waits until the file, or folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_data(data):
    """Raises ValueError unless a second process can bring the batches into the same order."""
    if not isinstance(data, keras.utils.PyDataset):
        raise ValueError(f"data must be the keras.utils.PyDataset given to fit, or None; got {type(data).__name__}.")
    if data.workers > 1 or data.use_multiprocessing:
        raise ValueError(f"data must be read by one worker, in a fixed order; got workers={data.workers}.")
    if not hasattr(data, "epoch") and type(data).on_epoch_end is not keras.utils.PyDataset.on_epoch_end:
        raise ValueError(
            f"{type(data).__name__} changes from epoch to epoch, and has no `epoch` to set it back to; give it one, as "
            "llmfound.data.TranslationBatches has."
        )

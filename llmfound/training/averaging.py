"""The mean of the last checkpoints: written during training, averaged after it."""

import io
import os
import tempfile
import time
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
from keras import ops


def average_weights(paths, model=None):
    """Arithmetic mean of the weights of several checkpoints.

    Sums run in float64 and the mean has the dtype of the checkpoints, so that the mean of equal checkpoints is bit
    for bit the checkpoint. What is not float (the states of random generators) is the last checkpoint's; optimizers
    are left out. Nothing in a file is executed.
    Source: Vaswani et al. 2017, section 6.1: the last 5 checkpoints for the base model, 20 for the big one.

    Args:
        paths: sequence of paths, each ending in .weights.h5, .keras or .safetensors; one format for all.
        model: a built keras.Model that gets the mean; its optimizer keeps its state. Tensors of a .safetensors file
            must have the paths of the model's weights as names. None loads nothing.

    Returns:
        dict of arrays by their names in the files.

    Raises:
        ValueError: if there is no path, a file is missing, cannot be read or has another format, or the names or
            shapes of two files, or of a file and `model`, differ; the model is then as it was.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise ValueError("paths must name at least one checkpoint; got none.")
    totals, arrays = {}, {}
    for path in paths:
        arrays = _read(path)
        _check_same(paths[0], totals or arrays, path, arrays)
        for name, array in arrays.items():
            wide = array.astype("float64") if _is_float(array) else array
            totals[name] = totals[name] + wide if name in totals and _is_float(array) else wide
    mean = {
        name: (total / len(paths)).astype(arrays[name].dtype) if _is_float(total) else total
        for name, total in totals.items()
    }
    if model is not None:
        load = _load_by_path if paths[0].suffix == ".safetensors" else _load_by_structure
        load(mean, model, paths[0])
    return mean


def _read(path):
    """The weights in a checkpoint by their names, "layers/dense/vars/0" where Keras wrote it; no optimizer's."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.name.endswith((".weights.h5", ".keras", ".safetensors")):
        raise ValueError(f"a checkpoint must end in .weights.h5, .keras or .safetensors; got {path}.")
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        archived = path.suffix == ".keras"
        with h5py.File(io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5")) if archived else path) as file:
            return {name: _array(dataset) for name, dataset in _datasets(file).items()}
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be read, is truncated or has another format: {error}") from error


def _is_float(array):
    return "float" in array.dtype.name  # NumPy's kinds do not count bfloat16 among them


def _datasets(file):
    """The datasets of an open file of Keras, by name, without the optimizer's."""
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer/"):
            found[name] = item

    file.visititems(visit)
    return found


def _array(dataset):
    if dataset.external or dataset.is_virtual:
        raise OSError(f"{dataset.name} lies in another file")
    array = np.asarray(dataset[()])
    return array.view(dataset.attrs["dtype"]) if "dtype" in dataset.attrs else array  # bfloat16 is stored as raw bytes


def _check_same(path, arrays, other_path, others):
    """Raises ValueError unless both have the same names with the same shapes."""
    for name in sorted(arrays.keys() | others.keys()):
        shapes = [x[name].shape if name in x else "nothing" for x in (arrays, others)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"checkpoints of one model are needed: for {name!r}, {path} has {shapes[0]} and {other_path} has "
                f"{shapes[1]}."
            )


def _load_by_structure(arrays, model, path):
    """Lets Keras load `arrays` from a file of its own making: one of this model, optimizer included, overwritten."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "mean.weights.h5")
        model.save_weights(copy)
        with h5py.File(copy, "r+") as file:
            datasets = _datasets(file)
            _check_same(path, arrays, f"model {model.name!r}", datasets)
            for name, dataset in datasets.items():
                dataset[...] = arrays[name].astype(dataset.attrs.get("dtype", dataset.dtype))
        model.load_weights(copy)


def _load_by_path(arrays, model, path):
    weights = {weight.path: weight for weight in model.weights}
    if len(weights) < len(model.weights):
        raise ValueError(f"weights of model {model.name!r} share a path, so that names do not tell them apart.")
    _check_same(path, arrays, f"model {model.name!r}", weights)
    for name, weight in weights.items():
        weight.assign(arrays[name])


class LastCheckpoints(keras.callbacks.Callback):
    """Writes checkpoints at regular distances, and one at the end of training, and keeps the last few.

    The files, `step-<updates of the optimizer>.weights.h5`, are those of `model.save_weights`: weights, and the
    optimizer's state, with which training can be resumed. A file is written under another name first, so that a
    run that is killed leaves whole checkpoints only.
    Source: Vaswani et al. 2017, section 6.1: the last 5 for the base model, written every 10 minutes.

    Args:
        folder: path, made if need be. A run that starts afresh needs one without checkpoints.
        keep: int, the number of files kept; older ones are removed.
        steps: int, batches from one checkpoint to the next; or
        minutes: float, minutes from one checkpoint to the next.

    Raises:
        ValueError: if `keep` is not positive, or not exactly one of `steps` and `minutes` is given and positive; in
            `fit`, if the folder holds checkpoints of more steps than the optimizer has made.
    """

    def __init__(self, folder, keep=5, steps=None, minutes=None):
        super().__init__()
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}.")
        if (steps is None) == (minutes is None) or (minutes if steps is None else steps) <= 0:
            raise ValueError(f"exactly one of steps and minutes must be given, positive; got {steps} and {minutes}.")
        self.folder = Path(folder)
        self.keep = keep
        self.steps = steps
        self.minutes = minutes

    @property
    def paths(self):
        """list of Path, the checkpoints in the folder, oldest first."""
        return sorted(self.folder.glob("step-*.weights.h5"))

    def average(self, model):
        """Loads the mean of the checkpoints in the folder into `model`; see `average_weights` for errors.

        Returns:
            list of Path, the files averaged.
        """
        paths = self.paths
        if not paths:
            raise ValueError(f"{self.folder} holds no checkpoint.")
        average_weights(paths, model)
        return paths

    def on_train_begin(self, logs=None):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps_per_call = self.model.steps_per_execution
        updates = self._updates()
        if self.paths and updates < int(self.paths[-1].name.removeprefix("step-").removesuffix(".weights.h5")):
            raise ValueError(
                f"{self.folder} holds checkpoints of another run, up to {self.paths[-1].name}, and this one is at "
                f"step {updates}; choose an empty folder, or load that checkpoint before `fit`."
            )
        self.done = self.saved_at = 0
        self.saved_time = time.monotonic()

    def on_train_batch_begin(self, batch, logs=None):
        # At the end of a batch, Keras would wait for the device every time before it called us.
        if self.minutes is None:
            due = self.done - self.saved_at >= self.steps
        else:
            due = time.monotonic() - self.saved_time >= 60 * self.minutes
        if due:
            self._save()
        self.done += self.steps_per_call

    def on_train_end(self, logs=None):
        self._save()

    def _updates(self):
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def _save(self):
        partial = self.folder / "partial.weights.h5"
        self.model.save_weights(partial)  # on JAX, `self.model` has put the state of the epoch back into the weights
        os.replace(partial, self.folder / f"step-{self._updates():09d}.weights.h5")
        for path in self.paths[: -self.keep]:
            path.unlink()
        self.saved_at, self.saved_time = self.done, time.monotonic()

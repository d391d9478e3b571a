"""The mean of the last checkpoints."""

import io
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np

from llmfound.training.checkpoints import is_checkpoint, model_variables, read_checkpoint


def average_weights(paths, model=None):
    """Arithmetic mean of the weights of several checkpoints.

    Sums run in float64 and the mean has the dtype of the checkpoints, so that the mean of equal checkpoints is bit
    for bit the checkpoint. What is not float (the states of random generators) is the last checkpoint's; optimizers
    are left out. Nothing in a file is executed.
    Source: Vaswani et al. 2017, section 6.1: the last 5 checkpoints for the base model, 20 for the big one.

    Args:
        paths: sequence of paths, each ending in .weights.h5, .keras or .safetensors; one format for all.
        model: a built keras.Model that gets the mean; its optimizer keeps its state. Tensors of a .safetensors file
            that `Checkpoints` has not written must have the paths of the model's weights as names. None loads nothing.

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
            if is_checkpoint(path):
                return {name: array for name, array in read_checkpoint(path)[0].items() if name.startswith("model/")}
            return load_file(path)
        with h5py.File(_unpacked(path) if path.suffix == ".keras" else path) as file:
            return {name: _array(dataset) for name, dataset in _datasets(file).items()}
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be read, is truncated or has another format: {error}") from error


def _unpacked(path):
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("model.weights.h5")
        if entry.file_size > path.stat().st_size:  # Keras compresses nothing, and a small file must not fill the memory
            raise OSError(f"{entry.filename} has {entry.file_size} bytes, more than the file it is in")
        return io.BytesIO(archive.read(entry))


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
    if dataset.nbytes > dataset.id.get_storage_size():
        raise OSError(f"{dataset.name} has {dataset.nbytes} bytes, more than are stored")
    if dataset.dtype.hasobject:
        raise OSError(f"{dataset.name} holds {dataset.dtype}, no numbers")
    array = np.asarray(dataset[()])
    try:
        return array.view(dataset.attrs["dtype"]) if "dtype" in dataset.attrs else array  # bfloat16 is stored as bytes
    except (TypeError, ValueError) as error:
        raise OSError(f"{dataset.name} holds {array.dtype}, not {dataset.attrs['dtype']}: {error}") from error


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
    weights = model_variables(model) if is_checkpoint(path) else {weight.path: weight for weight in model.weights}
    if len(weights) < len(model.weights):
        raise ValueError(f"weights of model {model.name!r} share a path, so that names do not tell them apart.")
    _check_same(path, arrays, f"model {model.name!r}", weights)
    for name, weight in weights.items():
        weight.assign(arrays[name])

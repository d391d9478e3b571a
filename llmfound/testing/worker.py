"""One backend's part of `compare_backends`: runs in a process of its own and writes down what it finds."""

import contextlib
import importlib
import importlib.util
import json
import pathlib
import re
import sys
import traceback

import keras
import numpy as np

from llmfound.testing.subjects import KeepsGradients, LayerSubject, ModelSubject, compiled, mask_of, reset_states

RANDOM = "rate", "dropout", "recurrent_dropout", "stddev"  # attributes that make a Keras layer random in training


def module(place):
    """The module that {"file": path} or {"module": name} stands for; a file is run once."""
    if "module" in place:
        return importlib.import_module(place["module"])
    path = pathlib.Path(place["file"])
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # what stands beside it can be imported, as by a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def maker(place):
    """The function, or the loader of a file, that a place stands for."""
    if "model" in place:
        return lambda: keras.saving.load_model(place["model"])
    return getattr(module(place), place["name"])


def leave(layer):
    """Prepares a layer by leaving its weights as they are."""


def make_subject(make, case, inputs, prepare, made=None):
    """The subject of one comparison, alike on every backend; `made` is what make() gave, if it was called already."""

    def layer_alone():
        result = make()
        return result[0] if isinstance(result, tuple) else result

    layer = made[0] if isinstance(made, tuple) else made
    if layer is None:
        layer = layer_alone()
    if case["labels"]:
        loss = keras.saving.deserialize_keras_object(case["loss"]) if case["loss"] else None
        return ModelSubject(layer_alone, layer, inputs, loss, case["pad_id"], prepare)
    if isinstance(layer, keras.Model) and not (isinstance(inputs, dict) and case["mask"]):
        inputs = (inputs,)
    return LayerSubject(layer_alone, layer, inputs, case["mask"], prepare)


def pack(nest, arrays):
    """A nest as JSON, its arrays appended to `arrays`."""
    if isinstance(nest, dict):
        return {"dict": [[key, pack(value, arrays)] for key, value in nest.items()]}
    if isinstance(nest, (list, tuple)):
        return {type(nest).__name__: [pack(value, arrays) for value in nest]}
    if isinstance(nest, (np.ndarray, np.generic)):
        arrays.append(np.asarray(nest))
        return {"array": len(arrays) - 1}
    if nest is None or isinstance(nest, (bool, int, float, str)):
        return {"value": nest}
    raise ValueError(
        f"inputs must be NumPy arrays, numbers, strings, and dicts, lists and tuples of them; got {nest!r}."
    )


def unpack(packed, arrays):
    ((kind, value),) = packed.items()
    if kind == "dict":
        return {key: unpack(item, arrays) for key, item in value}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](unpack(item, arrays) for item in value)
    return arrays[value] if kind == "array" else value


class Findings:
    """Named tensors by stage, written as one .npz and one .json; an error is a finding, too."""

    def __init__(self, doing):
        self.entries, self.arrays, self.doing = [], [], doing

    def stage(self, stage, find):
        """Adds the {name: tensor} that find() gives, or the error that it raised; returns whether it gave them."""
        self.doing(stage)
        try:
            for name, x in find().items():
                dtype = keras.backend.standardize_dtype(x.dtype)
                if dtype == "bfloat16":
                    x = keras.ops.cast(x, "float32")  # NumPy has no bfloat16
                self.entries.append(dict(stage=stage, tensor=name, dtype=dtype, array=len(self.arrays)))
                self.arrays.append(keras.ops.convert_to_numpy(x))
            return True
        except Exception as error:  # the table shows it
            print(traceback.format_exc(), file=sys.stderr)
            text = re.sub(r"\x1b\[\d*m", "", str(error)).partition("\n\nStack trace for op definition")[0]
            self.entries.append(dict(stage=stage, tensor="", error=f"{type(error).__name__}: {text}"))
            return False

    def write(self, path):
        np.savez(f"{path}.npz", *self.arrays)
        pathlib.Path(f"{path}.json").write_text(json.dumps(self.entries))


def flat(outputs, prefix=""):
    """{name: tensor} of a nest."""
    found = keras.tree.flatten_with_path(outputs)
    return {prefix + "".join(f"[{key!r}]" for key in path): leaf for path, leaf in found}


class _AdamRecorder(KeepsGradients, keras.optimizers.Adam):
    """Adam whose epsilon keeps noise in gradients that are zero on paper from becoming steps."""


class Work:
    """What one backend does with one subject."""

    def __init__(self, folder, backend, doing):
        self.folder, self.backend = folder, backend
        self.findings, self.subject = Findings(lambda stage: doing(f"{stage!r} of subject {folder.name}")), None

    def before_loading(self):
        stage = self.findings.stage
        if not stage("output", self.start):
            return
        stage("weights", lambda: {self.name(w): w.value for w in self.subject.layer.weights})
        stage("output mask", self.masks)
        stage("padding", self.padded)
        stage("config", self.rebuilt)
        stage("save", self.save)
        stage("bfloat16", lambda: flat(self.subject.under_bfloat16))
        if self.subject.can_train and stage("gradient", self.first_step):
            stage("optimizer step", lambda: {self.name(w): w.value for w in self.subject.second.weights})
            stage("fit", self.two_steps)

    def load(self):
        """Loads what other backends saved, after all have."""
        for path in sorted(self.folder.glob("*.keras")) if self.subject else ():
            if path.stem != self.backend:
                self.findings.stage(f"load from {path.stem}", lambda path=path: self.loaded(path))
        self.findings.write(self.folder / self.backend)

    def start(self):
        case = json.loads((self.folder / "case.json").read_text())
        for name, value in case["keras"].items():
            getattr(keras.config, f"set_{name}")(value)
        with np.load(self.folder / "inputs.npz") as file:
            inputs = unpack(case["inputs"], [file[f"arr_{i}"] for i in range(len(file.files))])
        with np.load(self.folder / "weights.npz") as file:
            weights = [file[f"arr_{i}"] for i in range(len(file.files))]

        def prepare(layer):
            shapes, expected = [tuple(w.shape) for w in layer.weights], [w.shape for w in weights]
            if shapes != expected:
                raise ValueError(f"the weights have shapes {shapes}; expected {expected}.")
            layer.set_weights(weights)

        self.subject = make_subject(maker(case["make"]), case, inputs, leave if case["own_weights"] else prepare)
        self.names = case["names"]  # those of one backend: automatic names count the layers made before
        return flat(self.subject.outputs)

    def name(self, weight):
        for layer in (self.subject.layer, self.subject.second):
            paths = [id(w) for w in layer.weights]
            if id(weight) in paths and len(paths) == len(self.names):
                return self.names[paths.index(id(weight))]
        return weight.path

    def masks(self):
        found = {f"mask of output{name}": mask_of(x) for name, x in flat(self.subject.outputs).items()}
        return {name: mask for name, mask in found.items() if mask is not None}

    def padded(self):
        found = {}
        for what, _, _, outputs in self.subject.padded:
            found.update(flat(outputs, f"{what} changed: output"))
        for what, arguments in self.subject.all_padding():
            found.update(flat(self.subject.run(self.subject.layer, arguments), f"row 0 of {what} all padding: output"))
        return found

    def rebuilt(self):
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(self.subject.layer)))
        return flat(self.subject.run(self.subject.twin(keras.saving.deserialize_keras_object(config))))

    def save(self):
        incomplete = self.folder / f"{self.backend}-incomplete"
        self.subject.savable()[0].save(f"{incomplete}.keras")
        pathlib.Path(f"{incomplete}.keras").rename(self.folder / f"{self.backend}.keras")
        return {}

    def first_step(self):
        for layer in self.subject.second._flatten_layers():
            own = {*vars(layer), *getattr(layer, "settable", ())}  # Keras's LSTM shows what its cell has, too
            for name in own.intersection(RANDOM):
                if isinstance(getattr(layer, name), float):
                    setattr(layer, name, 0.0)
        reset_states(self.subject.second)
        model = self.subject.trainable(self.subject.second, shift_inputs=True)
        self.model = compiled(model, _AdamRecorder(1e-2, epsilon=1e-3, name="recorder"), self.subject.loss)
        self.losses = self.fit(1)
        weights, gradients = self.model.trainable_weights, self.model.optimizer.gradients
        return {self.name(w).removeprefix("probe/"): g.value for w, g in zip(weights, gradients)}

    def two_steps(self):
        losses = self.losses + self.fit(2)
        return {f"loss of step {i + 1}": np.float32(loss) for i, loss in enumerate(losses)}

    def fit(self, epochs):
        options = dict(batch_size=self.subject.batch_size, epochs=epochs, shuffle=False, verbose=0)
        return self.model.fit(**self.subject.batch(), **options).history["loss"]

    def loaded(self, path):
        model = keras.saving.load_model(path)  # safe mode is the default
        return flat(model(self.subject.savable()[1], training=False))


def main():
    folder, backend = pathlib.Path(sys.argv[1]), keras.backend.backend()
    doing = folder / f"{backend}.doing"
    paths = sorted(folder.glob("*/case.json"))
    for path in paths:
        with contextlib.suppress(Exception):  # it comes again where it is reported
            maker(json.loads(path.read_text())["make"])
    if backend != "tensorflow":  # Keras would import it, for seconds, to ask whether an object is one of its
        sys.modules.setdefault("tensorflow", None)
    works = [Work(path.parent, backend, doing.write_text) for path in paths]
    for work in works:
        work.before_loading()
    (folder / f"{backend}.saved").touch()
    if sys.stdin.readline():  # empty if the parent is gone
        for work in works:
            work.load()

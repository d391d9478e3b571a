"""Runs layers and models on every backend, each in a process of its own, and tells where they differ."""

import dataclasses
import importlib.machinery
import importlib.util
import inspect
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings

import keras
import numpy as np

from llmfound.kernels import BACKENDS
from llmfound.testing import worker

SECONDS = 900  # for all backends together, from start to end
SHOWN = 8  # differing tensors of one stage that the table shows
STAGES = {  # in the order of the table: what each compares
    "weights": "every weight at the start",
    "output": "without training",
    "output mask": "the masks that Keras attaches to outputs",
    "padding": "outputs where padding holds other values, and where a row is all padding",
    "bfloat16": "output under mixed_bfloat16",
    "gradient": "of the loss, for every weight and every float input of a layer, dropout off",
    "optimizer step": "every weight after one step of Adam",
    "fit": "losses of three steps, dropout off",
    "config": "output after the config went through JSON, against that before",
    "save": "to a .keras file",
    "load": "output after loading another backend's file, against that of the same weights before",
}
NEEDS = {"optimizer step": "gradient", "fit": "gradient"}  # all others need the output
LOOSE = {"gradient", "optimizer step", "fit"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor on one backend, held against the backend that differs least from the others.

    Attributes:
        stage: one of `STAGES`.
        tensor: the weight's path, or the place in the output.
        backend: where it was found; against: the backend it is held against.
        found, expected: dtype and shape, as text.
        absolute: the largest absolute difference; relative: the same, divided by the largest expected number.
        excess: the largest difference divided by what it may be measured with, which is the largest of: the expected
            number itself, ten times the median of the expected numbers, and 1 (of gradients: a thousandth of the
            largest gradient). A tolerance limits it.
        problem: why the two cannot be compared: SHAPE, DTYPE, MISSING or an error's text; "" if they can.
    """

    stage: str
    tensor: str
    backend: str
    against: str
    found: str = ""
    expected: str = ""
    absolute: float = 0.0
    relative: float = 0.0
    excess: float = 0.0
    problem: str = ""


@dataclasses.dataclass
class Comparison:
    """What `compare_backends` found; print it for the table.

    Attributes:
        subject: str, what was compared.
        backends: list of those that ran.
        skipped: {backend: reason}.
        rows: list of Row, one for each tensor on each backend but the one it is held against.
        notes: list of str: what is equal everywhere, yet looks wrong.
    """

    subject: str
    backends: list
    skipped: dict
    rows: list
    notes: list
    tolerance: float = 1e-5
    gradient_tolerance: float = 1e-4
    bfloat16_tolerance: float = 0.05

    def limit(self, stage):
        """What a row's `excess` may be."""
        if stage == "bfloat16":
            return self.bfloat16_tolerance
        return self.gradient_tolerance if stage in LOOSE else self.tolerance

    def failures(self):
        """The rows that differ by more than is allowed."""
        return [row for row in self.rows if row.problem or not row.excess <= self.limit(row.stage)]

    def assert_equal(self, tolerance=None, gradient_tolerance=None, bfloat16_tolerance=None):
        """Raises AssertionError with the table if backends differ by more than the tolerances.

        Args:
            tolerance: of outputs: absolute for numbers below 1 and relative for those above. Default 1e-5.
            gradient_tolerance: of gradients, relative, and of weights and losses after steps. Default 1e-4.
            bfloat16_tolerance: of outputs under mixed_bfloat16, relative. Default 0.05.
        """
        given = dict(tolerance=tolerance, gradient_tolerance=gradient_tolerance, bfloat16_tolerance=bfloat16_tolerance)
        strict = dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})
        if strict.failures():
            raise AssertionError(str(strict))

    def __str__(self):
        failures = self.failures()
        lines = [("stage", "result", "tensor", "backend", "against", "max abs", "max rel", "dtype and shape")]
        errors = {}  # an error's text: its number
        for stage in STAGES:
            bad = [row for row in failures if row.stage == stage]
            good = [row for row in self.rows if row.stage == stage and row not in bad]
            if good:
                worst = max(good, key=lambda row: row.excess)
                lines.append(_cells(worst, f"{len(good)} ok"))  # with the largest difference among them
            numbers = [row for row in bad if not row.problem]
            numbers.sort(key=lambda row: -row.excess)
            for row in [row for row in bad if row.problem] + numbers[:SHOWN]:
                if row.problem in ("", "SHAPE", "DTYPE", "MISSING"):
                    lines.append(_cells(row, row.problem or "DIFFERS"))
                elif row.problem not in errors:  # the same text stands for all that met it
                    errors[row.problem] = len(errors) + 1
                    met = [other.backend for other in bad if other.problem == row.problem]
                    everyone = "everywhere" if set(met) == set(self.backends) else ", ".join(dict.fromkeys(met))
                    row = dataclasses.replace(row, backend=everyone)
                    lines.append(_cells(row, f"ERROR {errors[row.problem]}"))
            if len(numbers) > SHOWN:
                lines.append((stage, "DIFFERS", f"and {len(numbers) - SHOWN} more", *[""] * 5))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        below = [text for error, number in errors.items() for text in ["", *_wrapped(f"ERROR {number}: {error}")]]
        notes = [f"note: {note}" for note in self.notes]
        notes += [f"{backend} skipped: {reason}" for backend, reason in self.skipped.items()]
        return "\n".join([self._headline(failures), "", *table, *below, *([""] if notes else []), *notes])

    def _headline(self, failures):
        head = f"{self.subject} on {', '.join(self.backends)}: "
        if not failures:
            return f"{head}equal ({len(self.rows)} comparisons)"
        first = next(stage for stage in STAGES if any(row.stage == stage for row in failures))
        where = list(dict.fromkeys(row.backend for row in failures if row.stage == first))
        odd = f", on {where[0]}" if len(where) == 1 and len(self.backends) > 2 else ""
        return f"{head}{len(failures)} of {len(self.rows)} comparisons differ, first in: {first}{odd}"


def _cells(row, verdict):
    numbers = ("", "") if row.problem else (f"{row.absolute:.1e}", f"{row.relative:.1e}")
    kind = row.found if row.found == row.expected else f"{row.found or 'none'}, expected {row.expected}"
    return (row.stage, verdict, row.tensor, row.backend, row.against, *numbers, kind)


def _wrapped(text, width=116, lines=8):
    found = [piece for line in text.splitlines() for piece in textwrap.wrap(line, width, subsequent_indent="  ")]
    return [*found[:lines], "  ..."] if len(found) > lines else found


def installed(backend):
    """Whether a backend's package can be imported, without importing it."""
    return importlib.machinery.PathFinder.find_spec(backend) is not None


def compare_backends(make, inputs=None, backends=BACKENDS, *, labels=None, loss=None, mask=None, pad_id=0,
                     weights="fixed", tolerance=1e-5, gradient_tolerance=1e-4, bfloat16_tolerance=0.05):  # fmt: skip
    """Runs a layer or model on several backends and compares all that it does, from the same weights and inputs.

    Every backend runs on the CPU in a process of its own. Compared are `STAGES`. Each tensor is held against the
    backend that differs least from the others, so of three backends the one that is wrong is the one named. A layer
    that trains alone has as loss a fixed projection of its outputs. Dropout is off wherever a sublayer's rate can be
    set to 0; other randomness in training shows as a difference. Integers and bools must be equal.

    Args:
        make: Function of no argument at the top level of a module or script, which every process imports, that
            returns a new layer or model; or its name, "module:function" or "file.py:function"; or the path of a
            .keras file, whose weights are then used. A script must guard what it runs by
            `if __name__ == "__main__":`.
        inputs: dict of call arguments or tuple of the first ones for a layer, the inputs for a model. NumPy arrays;
            those with the leading axis of the first one are the batch. None if `make` returns (layer, inputs).
        backends: Those to compare; what is not installed is skipped, and the result says so.
        labels: Of a model, to train it with `loss`; then its padding is the token `pad_id`.
        loss: A Keras loss; None takes SparseCategoricalCrossentropy(from_logits=True).
        mask: Of a layer, the name of the argument that holds the padding mask, as in `check_layer`.
        pad_id: int, the token that fills up short sequences; None if the model knows none.
        weights: "fixed" sets all weights to the same numbers, none of them zero; "own" keeps those that `make` gives
            (which should then be equal: they are compared, too).
        tolerance, gradient_tolerance, bfloat16_tolerance: As in `Comparison.assert_equal`.

    Returns:
        Comparison: print it, or call its `assert_equal`.

    Raises:
        ValueError: if an argument is not as described, or fewer than two of the backends are installed.
        RuntimeError: if a process died or all took longer than 15 minutes; it says where, and what was printed.
    """
    case = dict(make=make, inputs=inputs, labels=labels, loss=loss, mask=mask, pad_id=pad_id, weights=weights)
    limits = dict(tolerance=tolerance, gradient_tolerance=gradient_tolerance, bfloat16_tolerance=bfloat16_tolerance)
    (comparison,) = compare_many({"": case}, backends, **limits).values()
    return comparison


def compare_many(cases, backends=BACKENDS, **limits):
    """`compare_backends` of many subjects in one process for each backend: most of the time of one is its imports.

    Args:
        cases: {name: dict of the arguments of `compare_backends`, without the tolerances}.
        backends: As in `compare_backends`.
        **limits: The tolerances.

    Returns:
        {name: Comparison}.
    """
    unknown = set(backends) - set(BACKENDS)
    if unknown or len(set(backends)) < 2:
        raise ValueError(f"backends must be two or more of {BACKENDS}; got {tuple(backends)}.")
    skipped = {backend: f"it is not installed; pip install {backend}" for backend in backends if not installed(backend)}
    backends = [backend for backend in backends if backend not in skipped]
    if len(backends) < 2:
        raise ValueError(f"Two backends are needed for a comparison; installed: {backends}; {skipped}.")
    with tempfile.TemporaryDirectory(prefix="llmfound-") as name:
        folder = pathlib.Path(name)
        titles = [_write_case(folder / str(i), **case) for i, case in enumerate(cases.values())]
        found = _run(folder, backends, len(cases))
    return {
        name: Comparison(name or title, backends, skipped, *_compare(findings), **limits)
        for name, title, findings in zip(cases, titles, found)
    }


def require_equal_backends(make, inputs=None, backends=BACKENDS, **options):
    """`compare_backends(...).assert_equal()` for pytest: skips the test where fewer than two backends are installed.

    A backend that is left out for that reason is named in a warning, which pytest shows at its end.

    Returns:
        Comparison.
    """
    import pytest

    missing = [backend for backend in backends if not installed(backend)]
    if len(backends) - len(missing) < 2:
        pytest.skip(f"two backends are needed for a comparison; not installed: {', '.join(missing)}")
    if missing:
        warnings.warn(f"compared without {', '.join(missing)}: not installed", stacklevel=2)
    comparison = compare_backends(make, inputs, backends, **options)
    comparison.assert_equal()
    return comparison


# ---------------------------------------------------------------------------------------------------------------------
# The processes


def _write_case(folder, make, inputs=None, labels=None, loss=None, mask=None, pad_id=0, weights="fixed"):
    """Writes what every process reads of one subject, and returns its title; finds mistakes before the wait."""
    if weights not in ("fixed", "own"):
        raise ValueError(f'weights must be "fixed" or "own"; got {weights!r}.')
    place = _place(make)
    make = worker.maker(place)
    layer = make()
    if inputs is None:
        if not isinstance(layer, tuple) or len(layer) != 2:
            raise ValueError(f"without inputs, make must return (layer, inputs); got {type(layer).__name__}.")
        inputs = layer[1]
    if labels is not None:
        inputs = (inputs, labels)
    arrays = []
    case = dict(
        make=place,
        labels=labels is not None,
        loss=loss and keras.saving.serialize_keras_object(loss),
        mask=mask,
        pad_id=pad_id,
        own_weights=weights == "own" or "model" in place,
        inputs=worker.pack(inputs, arrays),
        keras={name: getattr(keras.config, name)() for name in ("floatx", "epsilon", "image_data_format")},
    )
    subject = worker.make_subject(make, case, inputs, worker.leave if case["own_weights"] else None, layer)
    case["names"] = [weight.path for weight in subject.layer.weights]
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps(case))
    np.savez(folder / "inputs.npz", *arrays)
    np.savez(folder / "weights.npz", *subject.weights)
    kind = type(subject.layer).__name__
    name = place.get("name") or pathlib.Path(place["model"]).name
    return kind if kind == name else f"{name} ({kind})"


def _place(make):
    """Where another process finds `make`: {"model": path}, {"file": path, "name"} or {"module", "name"}."""
    if isinstance(make, str) and ":" in make and not make.endswith(".keras"):
        return _named_place(make)
    if isinstance(make, (str, os.PathLike)):
        path = pathlib.Path(make).resolve()
        if path.suffix != ".keras" or not path.is_file():
            raise ValueError(f"make must be a function or the path of a .keras file; there is no such file: {path}.")
        return {"model": str(path)}
    name, module = getattr(make, "__qualname__", ""), inspect.getmodule(make)
    if not name.isidentifier() or module is None or getattr(module, name, None) is not make:
        raise ValueError(
            "make must be a function at the top level of a module, since every backend's process imports it; "
            f"got {make!r}."
        )
    if module.__name__ == "__main__":
        if not getattr(module, "__file__", None):
            raise ValueError(f"make must stand in a file; {name} was typed in.")
        return {"file": str(pathlib.Path(module.__file__).resolve()), "name": name}
    return {"module": module.__name__, "name": name}


def _named_place(text):
    """The place that "module:function" or "file.py:function" names."""
    where, _, name = text.rpartition(":")
    if where.endswith(".py"):
        path = pathlib.Path(where).resolve()
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
        place = {"file": str(path), "name": name}
    else:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            spec = importlib.util.find_spec(where)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            raise ValueError(
                f"there is no module {where!r} on the path, nor in this folder; a file is written file.py:{name}."
            )
        place = {"module": where, "name": name}
    module = worker.module(place)
    if not callable(getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise ValueError(f"{where} has no function {name!r}; it has {', '.join(known) or 'none'}.")
    return place


def _run(folder, backends, count):
    """[{backend: [(entry, array or None)]}] of each subject, from one process for each backend, at the same time."""
    processes, end = {}, time.monotonic() + SECONDS

    def wait(done):
        while not all(done(backend) or process.poll() is not None for backend, process in processes.items()):
            if time.monotonic() > end:
                late = [backend for backend, process in processes.items() if process.poll() is None]
                doing = "; ".join(f"{backend} was at {_doing(folder, backend)}" for backend in late)
                raise RuntimeError(f"the comparison took more than {SECONDS} seconds: {doing}.")
            time.sleep(0.02)
        for backend, process in processes.items():
            if process.poll():
                code = process.returncode
                how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                text = (folder / f"{backend}.txt").read_text(errors="replace")[-4000:]
                raise RuntimeError(f"{backend}'s process died of {how} at {_doing(folder, backend)}:\n{text}")

    try:
        for backend in backends:
            processes[backend] = _start(folder, backend)
        wait(lambda backend: (folder / f"{backend}.saved").exists())
        for process in processes.values():
            process.stdin.write(b"load\n")
            process.stdin.close()
        wait(lambda backend: False)
    finally:  # also of an interrupt
        for process in processes.values():
            process.kill()
            process.wait()
            process.stdin.close()
    return [{backend: _read(folder / str(i) / backend) for backend in backends} for i in range(count)]


def _start(folder, backend):
    home = folder / f"{backend}-home"  # Keras writes into its home: parallel runs must not share it
    home.mkdir()
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1"),
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(home),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    command = [sys.executable, "-c", "from llmfound.testing import worker; worker.main()", str(folder)]
    with (folder / f"{backend}.txt").open("wb") as log:  # a file takes any amount; a pipe that nobody reads fills up
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)


def _doing(folder, backend):
    path = folder / f"{backend}.doing"
    return path.read_text() if path.exists() else "its imports"


def _read(path):
    entries = json.loads(pathlib.Path(f"{path}.json").read_text())
    with np.load(f"{path}.npz") as file:
        return [(entry, file[f"arr_{entry['array']}"] if "array" in entry else None) for entry in entries]


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def _compare(found):
    """Rows and notes from the findings of each backend, {backend: [(entry, array or None)]}."""
    tensors, rows, notes = {}, [], []
    failed = {backend: {entry["stage"] for entry, array in findings if array is None}
              for backend, findings in found.items()}  # fmt: skip
    for backend, findings in found.items():
        for entry, array in findings:
            stage, name = entry["stage"], entry["tensor"]
            if array is None:
                rows.append(Row(_stage(stage), name, backend, "", problem=entry["error"]))
            else:
                tensors.setdefault((stage, name), {})[backend] = entry, array
    floors = {
        "gradient": max(1e-30, 1e-2 * _largest(tensors, "gradient")),  # some are zero on paper and noise in fact
        "fit": max(1e-3, _largest(tensors, "fit")),
        "bfloat16": 1e-6,
    }
    for (stage, name), values in tensors.items():
        label, floor = _label(stage, name), floors.get(stage, 1.0)
        if stage == "config" or stage.startswith("load from "):  # held against the same backend's output before
            before = tensors.get(("output", name), {})
            pairs = [(backend, backend, before[backend]) for backend in values if backend in before]
        else:
            judge = _middle(values)
            pairs = [(backend, judge, values[judge]) for backend in values if backend != judge]
            for backend in found.keys() - values.keys():
                if not failed[backend] & {stage, NEEDS.get(stage), "output"}:
                    expected = _describe(values[judge])
                    rows.append(Row(_stage(stage), label, backend, judge, "", expected, problem="MISSING"))
        rows += [_row(_stage(stage), label, b, judge, values[b], expected, floor) for b, judge, expected in pairs]
        everywhere = [array for _, array in values.values()]
        if stage == "gradient" and len(values) == len(found) and not any(array.any() for array in everywhere):
            notes.append(f"no gradient reaches {label} on any backend.")
        if stage in ("output", "gradient") and all(np.isnan(array).any() for array in everywhere):
            notes.append(f"NaN in {'the gradient of ' * (stage == 'gradient')}{label} on every backend.")
    return rows, notes


def _stage(stage):
    return "load" if stage.startswith("load from ") else stage


def _label(stage, name):
    if stage.startswith("load from "):
        return f"output{name} from {stage.removeprefix('load from ')}'s file"
    return f"output{name}" if stage in ("output", "config", "bfloat16") else name


def _largest(tensors, stage):
    """The largest finite magnitude in one stage, on any backend."""
    found = [_size(array).max(initial=0.0) for (s, _), values in tensors.items() if s == stage
             for _, array in values.values()]  # fmt: skip
    return float(max(found, default=0.0))


def _size(array):
    """Magnitudes, as float64; 0 for what is not finite."""
    size = np.abs(array.astype("float64"))
    return np.where(np.isfinite(size), size, 0.0)


def _row(stage, label, backend, judge, value, expected, floor):
    kinds = dict(found=_describe(value), expected=_describe(expected))
    if kinds["found"] != kinds["expected"]:
        problem = "SHAPE" if value[1].shape != expected[1].shape else "DTYPE"
        return Row(stage, label, backend, judge, **kinds, problem=problem)
    difference, size = _difference(value, expected), _size(expected[1])
    largest, absolute = float(size.max(initial=0.0)), float(difference.max(initial=0.0))
    relative = absolute / largest if largest else (np.inf if absolute else 0.0)
    # a few huge numbers, such as masked scores of -1e9, must not hide what differs in all others
    typical = min(10 * np.median(size[size > 0]), largest) if size.any() else 0.0
    is_float = "float" in expected[0]["dtype"]
    scale = np.maximum(np.maximum(size, typical), floor) if is_float else np.where(difference > 0, 0.0, 1.0)
    with np.errstate(divide="ignore"):
        excess = float((difference / scale).max(initial=0.0))
    nans, expected_nans = int(np.isnan(value[1]).sum()), int(np.isnan(expected[1]).sum())
    if nans != expected_nans:
        absolute = relative = np.nan
        kinds = {
            key: f"{text} with {n} NaN" if n else text for (key, text), n in zip(kinds.items(), (nans, expected_nans))
        }
    return Row(stage, label, backend, judge, **kinds, absolute=absolute, relative=relative, excess=excess)


def _describe(value):
    entry, array = value
    return f"{entry['dtype']} {array.shape}"


def _difference(one, other):
    """Absolute differences; infinite where one alone is NaN or infinite, zero where both are the same."""
    a, b = one[1].astype("float64"), other[1].astype("float64")
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return np.where(np.isnan(difference), np.inf, difference)


def _distance(one, other):
    """The largest absolute difference, infinite where shapes or dtypes differ."""
    return float(_difference(one, other).max(initial=0.0)) if _describe(one) == _describe(other) else np.inf


def _middle(values):
    """The backend that differs least from the others; of equals, and of two, the first."""

    def distances(backend):
        return sorted(_distance(values[backend], value) for other, value in values.items() if other != backend)

    return min(values, key=distances)

"""Figures of papers: what a call leaves behind, how it goes on, what it refuses; and the figures themselves, tiny."""

import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import keras
import numpy as np
import pytest

import llmfound
from llmfound import __main__ as command
from llmfound import decoding, reproduce
from llmfound.reproduce import FIGURES, Figure, ulmfit
from llmfound.reproduce.figure import Results, judge, take_steps
from llmfound.reproduce.transformer import divergence
from llmfound.reproduce.translation import language, transformer
from llmfound.training import SmoothedCrossEntropy, mean_interval

plots = pytest.importorskip("matplotlib")


class Coins(Figure):
    """Sums of random numbers, from Keras and NumPy."""

    name, title, source, claim = "coins", "Coins", "A. Nonymous 1713, table 1", "More coins are worth more."
    scales = {"tiny": dict(seeds=2, counts=(1, 9)), "full": dict(seeds=4, counts=(1, 99))}
    shrunk = {"tiny": "nine coins at most.", "full": "nothing."}

    def __init__(self):
        self.measured, self.fails_at = [], None

    def runs(self, settings):
        return [{"coins": n} for n in settings["counts"]]

    def measure(self, run, settings, seed, prepared):
        self.measured.append((run["coins"], seed))
        if len(self.measured) == self.fails_at:
            raise KeyboardInterrupt
        values = keras.ops.convert_to_numpy(keras.random.uniform((run["coins"],))) + np.random.rand(run["coins"])
        return {"worth": values.sum(), "each": values[:1]}

    def verdicts(self, results):
        one, nine = (results.mean("worth", coins=n) for n in (1, 9))
        return [(f"nine are worth {nine - one:.1f} more than one", nine > one), ("one is worth more", one > nine)]

    def draw(self, results, path):
        pathlib.Path(path).write_bytes(b"a picture")

    def cost(self, settings):
        return 1.44e18 * settings["counts"][-1] / 99


class Worthless(Coins):
    scales = {"tiny": dict(seeds=1, counts=(1,))}

    def measure(self, run, settings, seed, prepared):
        raise ArithmeticError("worthless")


class Killed(Worthless):
    def measure(self, run, settings, seed, prepared):
        os.kill(os.getpid(), signal.SIGKILL)


def numbers(folder):
    return [line["numbers"] for line in json.loads((folder / "results.json").read_text())["runs"]]


def test_what_a_call_leaves(tmp_path):
    said = []
    verdicts = reproduce.reproduce(Coins(), "tiny", out=tmp_path, say=said.append)
    assert [held for _, held in verdicts] == [True, False]
    folder = tmp_path / "coins-tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "report.md", "results.json"]
    record = json.loads((folder / "results.json").read_text())
    assert record["backend"] == keras.backend.backend() and record["settings"] == {"counts": [1, 9]}
    assert [(line["run"], line["seed"]) for line in record["runs"]] == [
        ({"coins": n}, seed) for seed in range(2) for n in (1, 9)
    ]
    report = (folder / "report.md").read_text()
    worth = [line["numbers"]["worth"] for line in record["runs"][1::2]]
    for text in (
        "# Coins", "More coins are worth more. (A. Nonymous 1713, table 1)", "nine coins at most. 2 seeds, means with",
        f"| coins 9 | {np.mean(worth):.3g} ({worth[0]:.3g}, {worth[1]:.3g}) |", f"llmfound {llmfound.__version__}, ",
        "**Held**: nine are worth", "**Did not hold**: one is worth",
        "![Coins](figure.png)", f"reproduce coins --scale tiny --seeds 2 --backend {keras.backend.backend()}",
        "1.4e+18 floating-point operations, 1 hours of one H100",
    ):  # fmt: skip
        assert text in report
    assert "each" not in report  # a curve is no cell of a table
    assert said[0] == f"Coins. 2 runs x 2 seeds on {keras.backend.backend()}: 0 of 4 are done."
    assert [text for text in said if "seed 1" in text and text.endswith("about 0:00:00 left")]
    assert "DID NOT HOLD: one is worth more" in said


def test_an_interrupted_call_goes_on_with_the_same_numbers(tmp_path):
    for out in ("whole", "parts"):
        figure = Coins()
        if out == "parts":
            figure.fails_at = 3
            with pytest.raises(KeyboardInterrupt):
                reproduce.reproduce(figure, "tiny", out=tmp_path / out)
            assert len(numbers(tmp_path / out / "coins-tiny")) == 2
            figure.fails_at = None
        reproduce.reproduce(figure, "tiny", out=tmp_path / out)
        assert len(figure.measured) == (5 if out == "parts" else 4)
    assert numbers(tmp_path / "parts" / "coins-tiny") == numbers(tmp_path / "whole" / "coins-tiny")


@pytest.mark.on_one_backend
def test_jobs_give_the_same_numbers(tmp_path):
    said = []
    reproduce.reproduce(Coins(), "tiny", out=tmp_path / "one")
    reproduce.reproduce(Coins(), "tiny", out=tmp_path / "two", jobs=2, say=said.append)
    assert numbers(tmp_path / "one" / "coins-tiny") == numbers(tmp_path / "two" / "coins-tiny")
    assert len([text for text in said if text.startswith("coins ")]) == 4
    with pytest.raises(ArithmeticError, match="worthless"):  # of a process of its own
        reproduce.reproduce(Worthless(), "tiny", out=tmp_path / "none", jobs=2)
    with pytest.raises(ChildProcessError, match=r"was killed; .* fewer than 2 jobs .* the same call goes on"):
        reproduce.reproduce(Killed(), "tiny", out=tmp_path / "none", jobs=2)


def test_more_seeds_are_added_and_fewer_are_a_part(tmp_path):
    figure = Coins()
    for seeds, measured in ((1, 2), (3, 6), (2, 6)):
        before = len(figure.measured)
        said = []
        reproduce.reproduce(figure, "tiny", seeds, tmp_path, say=said.append)
        assert len(figure.measured) == measured
        assert f": {2 * seeds - measured + before} of {2 * seeds} are done." in said[0]
        assert f"{seeds} seed" in (tmp_path / "coins-tiny" / "report.md").read_text()


def test_what_cannot_be_made_fails_before_anything_is_run(tmp_path, monkeypatch):
    figure = Coins()
    with pytest.raises(ValueError, match="coins has the scales tiny, full; got 'small'"):
        reproduce.reproduce(figure, "small", out=tmp_path)
    with pytest.raises(ValueError, match="seeds and jobs must be 1 or more; got seeds=0 and jobs=1"):
        reproduce.reproduce(figure, "tiny", 0, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        reproduce.reproduce(figure, "tiny", out=tmp_path / "file")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 2**20))
        with pytest.raises(OSError, match="has 3 MB left; 64 MB are needed"):
            reproduce.reproduce(figure, "tiny", out=tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
            patch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match="Plots need matplotlib: pip install"):
            reproduce.reproduce(figure, "tiny", out=tmp_path)
    assert not figure.measured


def test_results_of_something_else_are_kept(tmp_path):
    reproduce.reproduce(Coins(), "tiny", out=tmp_path)
    file = tmp_path / "coins-tiny" / "results.json"
    before, figure = file.read_text(), Coins()
    figure.scales = {"tiny": dict(seeds=2, counts=(1, 9, 10))}
    with pytest.raises(ValueError, match=r"has runs of another settings \(\{'counts': \[1, 9\]\}, not"):
        reproduce.reproduce(figure, "tiny", out=tmp_path)
    file.write_text(before.replace(f'"{keras.backend.backend()}"', '"abacus"'))
    with pytest.raises(ValueError, match="has runs of another backend"):
        reproduce.reproduce(Coins(), "tiny", out=tmp_path)
    file.write_text(before[:-9])
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        reproduce.reproduce(Coins(), "tiny", out=tmp_path)
    assert file.read_text() == before[:-9] and not figure.measured
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"results\.json is damaged \(no object, but \[\]\); remove it"):
        reproduce.reproduce(Coins(), "tiny", out=tmp_path)


# The command line


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "llmfound", *arguments], env={**os.environ, **environment},
                          capture_output=True, text=True)  # fmt: skip


def test_the_command_line(capsys):
    command.main(command.parse(["reproduce", "--list"]))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FIGURES)
    with pytest.raises(SystemExit, match=r"There is no figure 'preln'; there are rnnsearch-length"):
        command.main(command.parse(["reproduce", "preln"]))
    for arguments, message in (
        ([], "name a figure, or --list them"),
        (["coins", "--jobs", "0"], "argument --jobs: must be 1 or more; got 0"),
        (["coins", "--seeds", "-1"], "argument --seeds: must be 1 or more; got -1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            command.parse(["reproduce", *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.on_one_backend
def test_the_command_line_takes_another_backend(tmp_path):
    folder = tmp_path / "preln-gradients-tiny"
    folder.mkdir()
    (folder / "results.json").write_text('{"figure": "preln-gradients", "scale": "tiny", "backend": "torch"}')
    refused = run("reproduce", "preln-gradients", "--scale", "tiny", "--backend", "jax", "--out", tmp_path)
    message = refused.stderr.splitlines()[-1]
    assert refused.returncode == 1 and message.startswith("ValueError: "), refused.stderr
    assert "has runs of another backend (torch, not jax)" in message


def test_a_backend_that_is_not_installed(monkeypatch):
    other = "jax" if keras.backend.backend() != "jax" else "torch"
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=rf'{other} is not installed: pip install "\.\[{other}\]".*KERAS_BACKEND'):
        command.main(command.parse(["reproduce", "preln-gradients", "--backend", other]))


def test_keras_does_not_change_its_backend():
    other = next(name for name in command.BACKENDS if name != keras.backend.backend() and command.installed(name))
    with pytest.raises(SystemExit, match=f"runs on {keras.backend.backend()} already; set KERAS_BACKEND={other}"):
        command.main(command.parse(["reproduce", "preln-gradients", "--backend", other]))


@pytest.fixture
def one_backend(tmp_path):
    """The environment of Python without TensorFlow and JAX, and without a choice of a backend."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tensorflow'] = sys.modules['jax'] = None\n")
    return dict(HOME=str(tmp_path), KERAS_HOME=str(tmp_path), KERAS_BACKEND="",
                PYTHONPATH=f"{tmp_path}:{pathlib.Path(llmfound.__file__).parents[1]}")  # fmt: skip


@pytest.mark.on_one_backend
def test_the_command_line_where_the_backend_of_keras_is_not_installed(one_backend):
    shown = run("reproduce", "--list", **one_backend)
    assert shown.stdout.count("\n") == len(FIGURES), shown.stderr
    assert "There is no figure 'coins'" in run("reproduce", "coins", "--backend", "torch", **one_backend).stderr
    sentence = (
        'tensorflow is not installed: pip install ".[tensorflow]" in a clone of llmfound, or let the environment '
        "variable KERAS_BACKEND name another backend (torch).\n"
    )
    assert run("reproduce", "preln-gradients", **one_backend).stderr == sentence
    imported = subprocess.run([sys.executable, "-c", "import llmfound"], env={**os.environ, **one_backend},
                              capture_output=True, text=True)  # fmt: skip
    assert imported.stderr.endswith(f"ModuleNotFoundError: {sentence}")


def test_an_interrupted_command_says_how_to_go_on(monkeypatch):
    monkeypatch.setattr(reproduce, "reproduce", interrupt)
    with pytest.raises(SystemExit, match=r"Interrupted\. What was done is kept, and the same command goes on"):
        command.main(command.parse(["reproduce", "preln-gradients"]))


def of_python(errors):
    """Without what TensorFlow, which Keras imports on every backend, logs at its start on some processors."""
    logged = re.compile(r"(WARNING: All log messages before absl|[IW]0000 ).*\n")
    return logged.sub("", errors)


@pytest.mark.on_one_backend
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no groups of processes")
@pytest.mark.parametrize("when", ["imports", pytest.param("jobs", marks=pytest.mark.slow)])
def test_ctrl_c_ends_in_one_sentence(when, tmp_path):
    """The signal goes to all processes, as a terminal sends it; again if it came where Python ignores exceptions."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background may ignore it
    process = subprocess.Popen(
        [sys.executable, "-m", "llmfound", "reproduce", "preln-gradients", "--scale", "tiny", "--seeds", "20", "--jobs",
         "2", "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    if when == "imports":
        time.sleep(0.5)
    else:
        while "about" not in process.stdout.readline():
            assert process.poll() is None
    for timeout in (30, 60):
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=timeout)
            break
        except subprocess.TimeoutExpired:
            continue
    assert of_python(errors) == "Interrupted. What was done is kept, and the same command goes on.\n"
    assert process.returncode in (1, -signal.SIGINT)  # as Python ends where the signal met code that an import compiles


@pytest.mark.on_one_backend
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows has no such signals")
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_jobs_end_with_the_process_that_started_them(how, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "llmfound", "reproduce", "preln-gradients", "--scale", "tiny", "--seeds", "99", "--jobs",
         "2", "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while "about" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)  # the jobs have its streams, too: they have ended when it returns
    assert process.returncode == (143 if how == signal.SIGTERM else -how)
    assert not of_python(errors) or how == signal.SIGKILL  # of which Python's own helper tells


@pytest.mark.on_one_backend
def test_a_job_waits_for_the_end_of_its_parent(monkeypatch):
    (ours, its), ended = multiprocessing.Pipe(), []
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: types.SimpleNamespace(sentinel=its))
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(reproduce.figure, "_prepared", lambda *_: None)
    handler, before = signal.getsignal(signal.SIGINT), set(threading.enumerate())
    try:
        reproduce.figure._begin(None, None, None, None)
    finally:
        signal.signal(signal.SIGINT, handler)
    [thread] = set(threading.enumerate()) - before
    assert thread.daemon and not ended
    ours.close()
    thread.join(10)
    assert ended == [1]


@pytest.mark.on_one_backend
def test_sigterm_exits_while_there_are_jobs(tmp_path, monkeypatch):
    """As an exception, which ends the jobs; before and behind them it is as it was."""
    monkeypatch.setattr(reproduce.figure, "_interrupts_held", lambda: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        reproduce.reproduce(Coins(), "tiny", out=tmp_path, jobs=2)
    assert signal.getsignal(signal.SIGTERM) == before


# Intervals, and what is noise


def test_intervals_from_three_seeds_on_and_values_before():
    def results(*values):
        return Results([{"n": 1}], {}, [dict(run={"n": 1}, numbers={"score": x}) for x in values])

    assert results(90.0).interval("score", n=1) == (90, 90, 90) and results(90.0).cell("score", {"n": 1}) == "90"
    two = results(80.0, 66.0)
    assert two.interval("score", n=1) == (73, 66, 80) and two.cell("score", {"n": 1}) == "73 (80, 66)"
    three = results(80.0, 66.0, 100.0)
    np.testing.assert_allclose(three.interval("score", n=1), mean_interval([80.0, 66.0, 100.0]))
    assert three.cell("score", {"n": 1}) == "82 ± 42"
    assert results([1.0, 2.0], [3.0, 6.0]).interval("score", n=1)[2].tolist() == [3, 6]


@pytest.mark.parametrize(
    "values, held, noise",
    [
        ([0.1], True, False), ([-0.1], False, False),  # one seed tells nothing of noise
        ([1.0, 1.5], True, False), ([0.1, 0.5], True, True), ([-1.0, 0.5], False, True),
        ([1.0, 1.1, 0.9], True, False), ([1.0, 2.5, 0.5], True, True), ([-1.0, -1.1, -0.9], False, False),
        ([1.0, np.nan], False, True), ([True, True], True, False), ([True, False], False, True),
    ],
)  # fmt: skip
def test_a_difference_that_the_seeds_cannot_tell_is_noise(values, held, noise):
    class Differences(Coins):
        def verdicts(self, results):
            values = results.all("x")
            return [("it is more", all(values) if isinstance(values[0], bool) else np.mean(values))]

    results = Results([{"n": 1}], {}, [dict(run={"n": 1}, numbers={"x": x}) for x in values])
    assert judge(Differences(), results, len(values)) == [("it is more", held, noise)]


def test_the_page_says_what_is_noise(tmp_path):
    figure, said = Coins(), []
    figure.measure = lambda run, settings, seed, prepared: {"worth": run["coins"] * (seed * 3 - 1)}
    assert [held for _, held in reproduce.reproduce(figure, "tiny", out=tmp_path, say=said.append)] == [True, False]
    report = (tmp_path / "coins-tiny" / "report.md").read_text()
    assert (
        "- **Held, within the noise of the seeds**: nine are" in report
        and "no more than the difference of its two values." in report
    )
    assert [text for text in said if text.startswith("DID NOT HOLD, within the noise of the seeds: one is worth more")]


# The figures


@pytest.mark.on_one_backend
@pytest.mark.parametrize("name", FIGURES)
def test_the_claim_holds_at_the_tiniest_scale(name, tmp_path):
    verdicts = reproduce.reproduce(FIGURES[name], "tiny", 1, tmp_path)
    assert all(held for _, held in verdicts), verdicts
    picture = (tmp_path / f"{name}-tiny" / "figure.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 10_000


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
def test_a_figure_tells_what_it_is(figure):
    assert set(figure.scales) == set(figure.shrunk) == set(reproduce.figure.SCALES)
    assert all(settings["seeds"] >= 1 and figure.runs(settings) for settings in figure.scales.values())
    assert figure.title and figure.source and figure.claim.endswith(".")
    cheap, dear = (
        figure.cost({k: v for k, v in figure.scales[scale].items() if k != "seeds"}) for scale in ("tiny", "full")
    )
    assert 1e6 < cheap < dear < 1e22


@pytest.mark.on_one_backend
def test_both_figures_of_ulmfit_share_a_language_model(tmp_path, monkeypatch):
    folders = {figure: tmp_path / f"{figure.name}-tiny" for figure in (ulmfit.Ablation(), ulmfit.LowShot())}
    settings = {"language_model": {**ulmfit.LANGUAGE_MODELS["tiny"], "words": 1000, "epochs": 1}}
    first, second = folders
    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            first.prepare(settings, None, folders[first])
    made = first.prepare(settings, None, folders[first])
    monkeypatch.setattr(ulmfit, "_language_model", interrupt)
    again = second.prepare(settings, None, folders[second])
    assert made[2] == again[2] == tmp_path / "ulmfit-language-model-tiny-torch" / "model.keras"
    assert made[0] == again[0] and made[1].vocabulary == again[1].vocabulary
    assert [path.name for path in tmp_path.iterdir()] == ["ulmfit-language-model-tiny-torch"]
    settings["language_model"]["rate"] = 1.0
    with pytest.raises(ValueError, match="has a language model of other settings"):
        second.prepare(settings, None, folders[second])


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_the_parts_of_ag_news_share_no_article(monkeypatch):
    monkeypatch.setattr(ulmfit.data, "ag_news", lambda *_: ([f"text {i}" for i in range(1500)], list(range(1500))))
    task = ulmfit._task("ag_news", None)
    assert [len(task[part][0]) for part in ("train", "test")] == [500, 1000]
    assert len({text for texts, _ in task.values() for text in texts}) == 1500
    assert all(text == f"text {label}" for part in task.values() for text, label in zip(*part))


def test_labels_to_reach_an_error():
    counts, errors = (100, 200, 400), np.array([60.0, 40.0, 20.0])
    found = [ulmfit.labels_to_reach(error, counts, errors) for error in (70, 60, 50, 40, 20, 10)]
    np.testing.assert_allclose(found, [100, 100, 100 * 2**0.5, 200, 400, 400], rtol=1e-6)


# What figures share

BACKWARDS = dict(vocabulary=12, length=5, batches=3, batch_tokens=40)
SIZES = dict(steps=10, layers=1, hidden_dim=8, num_heads=2, intermediate_dim=8, dropout=0.0, rate=1e-2, warmup=2)


def test_rows_are_written_backwards():
    made_up = language(BACKWARDS, None)
    for part, count in (("train", 3), ("val", 4)):
        batches = made_up.batches(part, seed=1)
        assert len(batches) == count
        x, y = batches[1]
        assert x["source_ids"].shape == (8, 5) and x["source_ids"].min() >= 3 and x["source_ids"].max() < 12
        np.testing.assert_array_equal(y, x["source_ids"][:, ::-1])
        np.testing.assert_array_equal(x["target_ids"][:, 1:], y[:, :-1])
        assert (x["target_ids"][:, 0] == 1).all()
        np.testing.assert_array_equal(y, made_up.batches(part, seed=1)[1][1])
    assert (made_up.batches("train", seed=1)[0][1] != made_up.batches("train", seed=2)[0][1]).any()
    assert (made_up.batches("train", seed=1)[0][1] != made_up.batches("val")[0][1]).any()


def test_losses_are_those_of_single_steps():
    made_up = language(BACKWARDS, None)
    model = transformer(made_up, **SIZES)
    model.compile(keras.optimizers.SGD(0.0), SmoothedCrossEntropy(0.1))
    batches = made_up.batches("train", seed=0)
    expected = [model.evaluate(*batches[i], verbose=0, return_dict=True)["loss"] for i in (1, 2, 0, 1)]
    np.testing.assert_allclose(take_steps(model, batches, 1, 4), expected, rtol=1e-5)
    assert len(set(np.round(expected, 6))) == 3  # the mean of all would be another


def test_learned_positions_can_be_decoded_step_by_step():
    made_up = language(BACKWARDS, None)
    model, (x, _) = transformer(made_up, positions="learned", **SIZES), made_up.batches("train")[0]
    found = decoding.greedy(model, {"source_ids": x["source_ids"]}, max_length=5, end_id=2, forbidden_ids=[2])
    assert found.shape == (8, 5)
    shifted = np.concatenate([np.ones((8, 1), "int32"), found[:, :-1]], axis=1)
    logits = model({"source_ids": x["source_ids"], "target_ids": shifted})
    logits = keras.ops.convert_to_numpy(logits)
    logits[..., [0, 2]] = -np.inf  # padding and what is forbidden
    np.testing.assert_array_equal(found, logits.argmax(axis=-1))


def test_divergence_of_heads():
    same, disjoint = np.zeros((2, 3, 4)), np.zeros((2, 3, 4))
    same[..., 1] = 1
    disjoint[0, :, 0] = disjoint[1, :, 3] = 1
    np.testing.assert_allclose([divergence(same), divergence(disjoint)], [0, 1], atol=1e-9)
    np.testing.assert_allclose(divergence(np.stack([same, disjoint])), 0.5, atol=1e-9)  # the mean over layers

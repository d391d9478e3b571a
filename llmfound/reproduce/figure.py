"""A figure of a paper, and what makes it: runs over seeds that go on where they stopped, a picture, and a page."""

import concurrent.futures
import contextlib
import copy
import datetime
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import shutil
import signal
import sys
import threading
import time

import keras
import numpy as np

from llmfound import __version__, kernels, plots
from llmfound.training import mean_interval

SCALES = ("tiny", "small", "full")
FREE = 64 * 2**20  # bytes that must be free before anything is run
THREADS = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"
NOISE = ", within the noise of the seeds"
H100 = 400e12  # floating-point operations per second of one H100 in bfloat16, at 40 % of its peak


class Figure:
    """One figure or table of a paper. A subclass says what is run, and reads the paper's claim from the numbers.

    A run is a dict of strings and numbers, for instance {"norm": "post", "depth": 8}; it is measured once for each
    seed, which is set before it on all generators.

    Attributes:
        name: str, on the command line.
        title: str.
        source: str, paper, section, figure or table.
        claim: str, what the paper says, in a sentence or two.
        scales: dict, "tiny", "small", "full" -> dict of settings, among them "seeds", int.
        shrunk: dict, scale -> str, what differs from the paper.
    """

    name = title = source = claim = ""
    scales, shrunk = {}, {}

    def runs(self, settings):
        """List of runs."""
        raise NotImplementedError(f"{type(self).__name__} must say what it runs: override runs().")

    def prepare(self, settings, sets, folder):
        """What all runs share: data, vocabularies, a model to begin with. It is made anew in each call.

        `sets` is the folder of the public sets, or None; what takes minutes to make can be kept in `folder`, the
        figure's own.
        """
        return None

    def measure(self, run, settings, seed, prepared):
        """One run: dict of str -> float, list of float, or anything else that JSON has, which `Results.all` returns."""
        raise NotImplementedError(f"{type(self).__name__} must say how a run is measured: override measure().")

    def verdicts(self, results):
        """List of (sentence, margin): parts of the claim, and by how much they held, in any unit; at 0 they did not.

        It is also called with the results of each seed alone, whose margins tell how much is noise. True and False are
        margins, too.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it claims: override verdicts().")

    def draw(self, results, path):
        """Saves the picture."""
        raise NotImplementedError(f"{type(self).__name__} must draw its picture: override draw().")

    def table(self, results):
        """Rows of a Markdown table, the first of them the heading: lists of str."""
        cells = {name: [x for of_run in found for x in of_run] for name, found in results.numbers.items()}
        names = [name for name, found in cells.items() if all(isinstance(x, (int, float)) for x in found)]
        return [["run", *names], *[[label(run), *(results.cell(name, run) for name in names)] for run in results.runs]]

    def cost(self, settings):
        """Floating-point operations of all runs of one seed; None is not known."""
        return None


def label(run):
    return ", ".join(f"{value}" if isinstance(value, str) else f"{key} {value}" for key, value in run.items())


def take_steps(model, batches, first, count):
    """Trains `count` steps on from step `first`, passes through the batches one after the other; list of the losses."""
    losses = []
    for i in range(first, first + count):
        if i % len(batches) == 0 and hasattr(batches, "epoch"):
            batches.epoch = i // len(batches)
        model.reset_metrics()  # else Keras gives the mean of all steps so far
        losses.append(model.train_on_batch(*batches[i % len(batches)][:2], return_dict=True)["loss"])
    return [float(loss) for loss in losses]


def spread(values):
    """Mean, low and high end of the 95 % interval, each float (...), from float (seeds, ...).

    The interval of two seeds is too wide to tell anything; the ends are then the lower and the higher value.
    """
    values = np.asarray(values, "float64")
    if len(values) < 3:
        return values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    flat = np.array([mean_interval(list(x)) for x in values.reshape(len(values), -1).T])
    return tuple(flat[:, i].reshape(values.shape[1:]) for i in range(3))


def cell(values):
    """The mean of the seeds and what `spread` says about them, as text: 73 ± 4, or 73 (66, 80) with two seeds."""
    mean, low, high = spread(values)
    if low == high:
        return f"{mean:.3g}"
    if len(values) > 2:
        return f"{mean:.3g} ± {mean - low:.2g}"
    return f"{mean:.3g} ({', '.join(f'{x:.3g}' for x in values)})"


class Results:
    """The numbers of all runs.

    Attributes:
        settings: dict, those of the scale.
        runs: list of dict.
        numbers: dict, name -> list over runs of lists over seeds.
    """

    def __init__(self, runs, settings, lines):
        self.runs, self.settings = runs, settings
        found = {}
        for line in lines:
            found.setdefault(label(line["run"]), []).append(line["numbers"])
        names = dict.fromkeys(name for rows in found.values() for row in rows for name in row)
        self.numbers = {
            name: [[row[name] for row in found[label(run)] if name in row] for run in runs] for name in names
        }

    def all(self, name, **run):
        """List over the seeds, of what the one run that has these values measured."""
        (i,) = [i for i, one in enumerate(self.runs) if run.items() <= one.items()]
        return self.numbers[name][i]

    def of(self, name, **run):
        """float (seeds, ...), a number of the one run that has these values."""
        return np.array(self.all(name, **run), "float64")

    def mean(self, name, **run):
        """float (...), over the seeds."""
        return self.of(name, **run).mean(axis=0)

    def interval(self, name, **run):
        """Mean, low and high end of a number over the seeds, each float (...), as `spread` gives them."""
        return spread(self.of(name, **run))

    def cell(self, name, run):
        """The mean and the interval, as text; empty for a run without this number."""
        values = self.of(name, **run)
        return cell(values) if len(values) else ""

    def seed(self, i):
        """The Results of one seed alone."""
        one = copy.copy(self)
        one.numbers = {name: [values[i : i + 1] for values in of_runs] for name, of_runs in self.numbers.items()}
        return one


def judge(figure, results, count):
    """List of (sentence, held, noise), str, bool, bool: noise if the margin is within what `count` seeds tell of it."""

    def margins(results):
        return [2.0 * bool(x) - 1 if isinstance(x, (bool, np.bool_)) else float(x) for _, x in figure.verdicts(results)]

    sentences = [sentence for sentence, _ in figure.verdicts(results)]
    with np.errstate(all="ignore"):  # a ratio of one seed need not exist
        by_seed = np.array([margins(results.seed(i)) for i in range(count)]).T
    found = []
    for sentence, margin, of_seeds in zip(sentences, margins(results), by_seed):
        noise = not np.isfinite(of_seeds).all()
        if count > 1 and not noise:
            mean, low, high = spread(of_seeds)
            noise = abs(margin) <= (mean - low if count > 2 else high - low)
        found.append((sentence, margin > 0, bool(noise)))
    return found


def reproduce(figure, scale="small", seeds=None, out="runs/reproduce", data=None, jobs=1, say=print):
    """Makes a figure: OUT/NAME-SCALE/ gets figure.png, results.json and report.md.

    Every run is written down when it is done, so an interrupted call goes on when made again, also with more seeds.

    Args:
        figure: Figure.
        scale: "tiny", seconds, on made-up data; "small", minutes on two processor cores; "full", the paper's set-up.
        seeds: int, how many; None takes the scale's.
        out: folder.
        data: folder of the public sets, where the scale needs some; None takes the environment variable LLMFOUND_DATA.
        jobs: int, runs at a time, each in a process of its own with its share of the processor's cores.
        say: function of a str, for progress.

    Returns:
        list of (sentence, bool): the claim, in parts, and whether they held. The page says which are within the noise.

    Raises:
        ValueError: if the scale is unknown, there is no seed, or the folder holds runs of other settings.
        OSError: before anything is run, if the folder cannot be written or its disk is full.
        ImportError: before anything is run, if matplotlib is missing.
        ChildProcessError: if the process of a job is killed.
        SystemExit: if SIGTERM comes while there are jobs, which end with this process.
    """
    if scale not in figure.scales:
        raise ValueError(f"{figure.name} has the scales {', '.join(figure.scales)}; got {scale!r}.")
    settings = dict(figure.scales[scale])
    count = settings.pop("seeds") if seeds is None else seeds
    settings.pop("seeds", None)
    if count < 1 or jobs < 1:
        raise ValueError(f"seeds and jobs must be 1 or more; got seeds={count} and jobs={jobs}.")
    plots.bars({"": [(0, 0, 0)]}, [""])  # so that a missing matplotlib is told now, not after hours
    folder = pathlib.Path(out) / f"{figure.name}-{scale}"
    record = _open(folder, figure, scale, settings)
    runs = figure.runs(settings)
    sets = data or os.environ.get("LLMFOUND_DATA")
    done = {(label(line["run"]), line["seed"]): line for line in record["runs"]}
    left = [(run, seed) for seed in range(count) for run in runs if (label(run), seed) not in done]
    seeds = f"{count} seed{'s' * (count != 1)}"
    every = len(runs) * count
    say(f"{figure.title}. {len(runs)} runs x {seeds} on {record['backend']}: {every - len(left)} of {every} are done.")
    with contextlib.closing(_measured(figure, settings, sets, folder, left, jobs)) as lines:
        for line in lines:
            done[label(line["run"]), line["seed"]] = line
            record["runs"] = sorted(done.values(), key=lambda line: (line["seed"], runs.index(line["run"])))
            _write(folder / "results.json", json.dumps(record, indent=1))
            rest = _clock(_remaining(done, [one for one in left if (label(one[0]), one[1]) not in done]) / jobs)
            say(f"{label(line['run'])}, seed {line['seed']}: {line['seconds']:.1f} s, about {rest} left")
    chosen = [done[label(run), seed] for run in runs for seed in range(count)]
    results = Results(runs, settings, chosen)
    verdicts = judge(figure, results, count)
    figure.draw(results, folder / "figure.png")
    _write(folder / "report.md", _report(figure, scale, count, results, verdicts, chosen, record))
    for sentence, held, noise in verdicts:
        say(f"{'held' if held else 'DID NOT HOLD'}{NOISE * noise}: {sentence}")
    say(f"{folder / 'report.md'}")
    return [(sentence, held) for sentence, held, _ in verdicts]


def _measured(figure, settings, sets, folder, left, jobs):
    """Yields the lines of (run, seed), as they are done."""
    if not left:
        return
    prepared = _prepared(figure, settings, sets, folder)  # by every job too, but what is kept is made once
    if jobs == 1:
        for run, seed in left:
            yield _line(figure, settings, prepared, run, seed)
        return
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    os.environ.update(dict.fromkeys(THREADS, threads))  # of the processes that are started from here on
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _begin, (figure, settings, sets, folder))
    others = set(multiprocessing.active_children())
    before = _exit_on_sigterm()
    try:
        with _interrupts_held():
            futures = [pool.submit(_one, run, seed) for run, seed in left]
        for line in concurrent.futures.as_completed(futures):
            yield line.result()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            raise ChildProcessError(
                f"A process of a run was killed; often for memory, which fewer than {jobs} jobs need less of. What was "
                "done is kept, and the same call goes on."
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _exit_on_sigterm():
    """From here on SIGTERM raises SystemExit, unless it is handled already; what handled it before, or None."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return None
    return signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


@contextlib.contextmanager
def _interrupts_held():
    """Ctrl-C waits here, and what is started meanwhile never sees it: this process ends the others."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepared(figure, settings, sets, folder):
    kernels.fast_matmul()
    keras.utils.set_random_seed(0)
    return figure.prepare(settings, sets, folder)


def _line(figure, settings, prepared, run, seed):
    keras.backend.clear_session(free_memory=False)  # else all compiled programs would be lost
    keras.utils.set_random_seed(seed)
    start = time.perf_counter()
    numbers = figure.measure(run, settings, seed, prepared)
    return dict(run=run, seed=seed, seconds=round(time.perf_counter() - start, 2), numbers=_plain(numbers))


_job = []  # of a process of its own: what it measures


def _begin(figure, settings, sets, folder):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job[:] = figure, settings, _prepared(figure, settings, sets, folder)


def _end_with_parent():
    """Ends this process when the one that started it has ended, be it killed."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _one(run, seed):
    return _line(*_job, run, seed)


def _open(folder, figure, scale, settings):
    """The record of an earlier call, or a new one; either is written, so that what cannot be written fails now."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < FREE:
        raise OSError(f"The disk of {folder} has {free / 2**20:.0f} MB left; {FREE / 2**20:.0f} MB are needed.")
    new = dict(figure=figure.name, scale=scale, backend=keras.backend.backend(), settings=_plain(settings))
    file, record = folder / "results.json", {**new, "runs": []}
    if file.exists():
        try:
            record = json.loads(file.read_text())
            if not isinstance(record, dict):
                raise ValueError(f"no object, but {str(record)[:40]}")
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); remove it, or choose another folder.") from error
        differing = [key for key in new if record.get(key) != new[key]]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{file} has runs of another {key} ({record.get(key)}, not {new[key]}); remove it, or choose another "
                "folder."
            )
    _write(file, json.dumps(record, indent=1))
    return record


def _write(path, text):
    """The whole text or, if it is interrupted, what was there before."""
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _plain(x):
    """What JSON has: NumPy's numbers and arrays, and tuples, as Python's."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [_plain(value) for value in x]
    return x.item() if isinstance(x, np.generic) else x


def _remaining(done, left):
    """Seconds: of every run the mean of its other seeds, else of all runs."""
    seconds = {}
    for (name, _), line in done.items():
        seconds.setdefault(name, []).append(line["seconds"])
    every = np.mean([s for some in seconds.values() for s in some])
    return sum(np.mean(seconds.get(label(run), every)) for run, _ in left)


def _clock(seconds):
    return str(datetime.timedelta(seconds=round(seconds)))


def _report(figure, scale, count, results, verdicts, lines, record):
    spent = sum(line["seconds"] for line in lines)
    rows = figure.table(results)
    table = "\n".join(
        "| " + " | ".join(row) + " |" for row in [rows[0], ["---"] + ["--:"] * (len(rows[0]) - 1), *rows[1:]]
    )
    marks = "\n".join(
        f"- **{'Held' if held else 'Did not hold'}{NOISE * noise}**: {sentence}" for sentence, held, noise in verdicts
    )
    if any(noise for *_, noise in verdicts):
        of_seeds = "half of its own 95 % interval" if count > 2 else "the difference of its two values"
        marks += (
            f"\n\nWithin the noise of the seeds: what decides, in the mean over the seeds, is no more than {of_seeds}."
        )
    seeds = {1: "1 seed, which cannot tell noise", 2: "2 seeds, means with both values in brackets"}.get(
        count, f"{count} seeds, means with 95 % intervals"
    )
    full = {key: value for key, value in figure.scales["full"].items() if key != "seeds"}
    cost, of_all = figure.cost(full), ""
    if cost:
        of_all = (
            f"\nAt `--scale full` one seed takes about {cost:.1e} floating-point operations, "
            f"{cost / H100 / 3600:.2g} hours of one H100.\n"
        )
    return f"""# {figure.title}

**The paper.** {figure.claim} ({figure.source})

**What was run.** {scale}: {figure.shrunk[scale]} {seeds}.
{record["backend"]}, llmfound {__version__}, Keras {keras.__version__}, {os.cpu_count()}
cores ({platform.machine()}), {_clock(spent)} in all, {datetime.date.today()}.

    python -m llmfound reproduce {figure.name} --scale {scale} --seeds {count} --backend {record["backend"]}

![{figure.title}](figure.png)

**The result.**

{marks}

{table}
{of_all}"""

"""Runs systems in turns, each in a process of its own, and writes what it measured into README.md.

A benchmark is a file that lists its `System`s and its `Experiment`s and calls `main`. Every turn of a system is a fresh
process: it builds the system, warms it up, times some calls, and ends. So Keras can have another backend in each,
peers can come from another environment, no system sees memory or threads of another, and noise falls on all alike.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

STARTED = time.perf_counter()
HERE = Path(__file__).parent
PACKAGES = ("llmfound", "keras", "jax", "tensorflow", "torch", "transformers", "keras_hub")
WARM_UP_CALLS = 2  # the first compiles; on some backends the second does once more
WORKER_SECONDS = 1800
HEADER = """# Benchmarks

Each table is written by its script, which runs our library and its peers in one and the same run: every system in a
process of its own, taking turns, all on the same processor cores with the same number of threads. The sizes are equal
and so is the work, but for the differences a table names. Run `make bench` for all, or a script alone with the command
above its table; `--smoke` tries it in a minute.

Times are of one call, in milliseconds. On a shared machine noise only ever adds, so ratios are between fastest calls:
0.80 is four fifths of the time of the fastest peer, on the same backend or on any. Start is the time from the launch
of Python to the end of the first call, with imports and compilation; peak is the largest memory of the process.

Systems differ in one setting, which stands behind their names: "graph" and "XLA" are Keras's
`compile(jit_compile=False)` and `True`; "oneDNN" is `torch.set_float32_matmul_precision("medium")`, which is what
`llmfound.kernels.fast_matmul()` sets.
"""


@dataclasses.dataclass(frozen=True)
class System:
    """One row of a table.

    Args:
        name: str, unique within the benchmark.
        backend: str, "jax", "tensorflow" or "torch".
        build: takes the sizes, a dict, and returns a function without arguments that runs and finishes one call; or
            a dict of several, which then take turns.
        peer: bool, whether it runs in the peers' environment.
    """

    name: str
    backend: str
    build: Callable
    peer: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One table: its title, what it measures in a sentence or two, the sizes, and the smaller sizes of --smoke."""

    title: str
    text: str
    sizes: dict
    smoke: dict


def work(system, sizes, calls):
    """Builds, warms up and times one system in this process; returns what the parent wants to know."""
    run = system.build(sizes)
    runs = run if isinstance(run, dict) else {"": run}
    built = peak_memory()
    start = None
    for one in runs.values():
        for _ in range(WARM_UP_CALLS):
            one()
            start = start or time.perf_counter() - STARTED
    seconds = {label: [] for label in runs}
    for _ in range(calls):
        for label, one in runs.items():
            before = time.perf_counter()
            one()
            seconds[label].append(time.perf_counter() - before)
    versions = {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}
    return {"seconds": seconds, "start": start, "built": built, "peak": peak_memory(), "versions": versions}


def one_dnn(build):
    """The same system with torch's matrix products sent to oneDNN, as `llmfound.kernels.fast_matmul()` does."""

    def chosen(sizes):
        import torch

        torch.set_float32_matmul_precision("medium")
        return build(sizes)

    return chosen


def on_torch(name, build, peer=False):
    """What runs on torch, as it is and with oneDNN."""
    return [System(name, "torch", build, peer), System(f"{name}, oneDNN", "torch", one_dnn(build), peer)]


def on_backends(name, build, peer=False):
    """What Keras runs, on every backend; `build` takes a second argument, jit, for `compile(jit_compile=jit)`."""
    auto, graph, xla = (functools.partial(build, jit=jit) for jit in ("auto", False, True))
    return [
        System(f"{name}, JAX", "jax", auto, peer),
        System(f"{name}, TensorFlow, graph", "tensorflow", graph, peer),
        System(f"{name}, TensorFlow, XLA", "tensorflow", xla, peer),
        *on_torch(f"{name}, torch", auto, peer),
    ]


def torch_step(optimizer, loss):
    """A training step of a torch peer: gradients of loss(), then the optimizer."""

    def step():
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


def peak_memory():
    """The largest memory of this process until now, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def launch(script, system, sizes, options):
    """One turn of a system, in a process of its own."""
    threads = str(options.threads)
    environment = {
        **os.environ,
        **{f"{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")},
        **{f"TF_NUM_{name}_THREADS": threads for name in ("INTRAOP", "INTEROP")},
        "KERAS_BACKEND": system.backend,
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "" if system.peer else str(HERE.parent),
    }
    python = options.peer_python if system.peer else sys.executable
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        task = json.dumps(dict(system=system.name, sizes=sizes, calls=options.calls, answer=answer.name))
        process = subprocess.run(
            [python, script, "--threads", threads, "--worker", task],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=WORKER_SECONDS,
        )  # fmt: skip
        if process.returncode:
            raise RuntimeError(f"{system.name} failed:\n{process.stderr[-4000:]}")
        return json.load(answer)


def measure(script, systems, sizes, options):
    """Lets the systems take turns; returns {name: what `work` returned, with the times of all rounds}."""
    results = {}
    for turn in range(options.rounds):
        for system in systems:
            print(f"round {turn + 1} of {options.rounds}: {system.name}", file=sys.stderr, flush=True)
            answer = launch(script, system, sizes, options)
            known = results.setdefault(system.name, answer)
            if known is answer:
                continue
            for label, seconds in answer["seconds"].items():
                known["seconds"][label] += seconds
            known["start"] = min(known["start"], answer["start"])
            known["peak"], known["built"] = max((one["peak"], one["built"]) for one in (known, answer))
    return results


def step_table(systems, results, sizes):
    """One row per system, the fastest first; ours in bold."""
    fastest = {name: min(result["seconds"][""]) for name, result in results.items()}
    peers = {system.name: system.backend for system in systems if system.peer}

    def against(seconds, backend=None):
        times = [fastest[name] for name, its in peers.items() if backend in (None, its)]
        return f"{seconds / min(times):.2f}" if times else ""

    rows = [
        "| system | backend | fastest | median | tokens/s | / peer on backend | / any peer | start s | peak MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for system in sorted(systems, key=lambda system: fastest[system.name]):
        result, seconds = results[system.name], fastest[system.name]
        cells = [
            system.name if system.peer else f"**{system.name}**",
            system.backend,
            f"{seconds * 1e3:.0f}",
            f"{statistics.median(result['seconds']['']) * 1e3:.0f}",
            f"{sizes['tokens'] / seconds:.0f}",
            against(seconds, system.backend),
            against(seconds),
            f"{result['start']:.1f}",
            f"{result['peak'] / 2**20:.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def machine():
    """The processor, cores, memory and system this runs on."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = models[0] if models else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.system()}"


def circumstances(script, results, options, load):
    """The paragraph above a table: machine, versions, date, threads, command."""
    versions = {name: version for result in results.values() for name, version in result["versions"].items()}
    found = ", ".join(f"{name.replace('_', '-')} {versions[name]}" for name in PACKAGES if name in versions)
    command = f"python benchmarks/{Path(script).name}" + (" --peer-python PYTHON" if options.peer_python else "")
    return (
        f"{machine()}. {options.threads} threads, {options.rounds} rounds of {options.calls} calls, load average "
        f"{load:.1f} before. Python {platform.python_version()}, {found}. {datetime.date.today()}.\n\n"
        f"    {command} --threads {options.threads} --rounds {options.rounds} --calls {options.calls}"
    )


def write_section(readme, name, body):
    """Puts `body` between the markers of section `name`, in place of what stood there, or at the end of the file."""
    text = readme.read_text() if readme.exists() else HEADER
    begin, end = f"<!-- {name}: written by {name}.py -->", f"<!-- end of {name} -->"
    section = f"{begin}\n\n{body}\n\n{end}\n"
    if begin in text:
        text = text[: text.index(begin)] + section.rstrip("\n") + text[text.index(end) + len(end) :]
    else:
        text = f"{text.rstrip()}\n\n{section}"
    readme.write_text(text)


def parse(description, rounds, calls):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="Python of the environment with the peers; without it only ours run")
    parser.add_argument("--threads", type=int, default=2, help="threads, and processor cores, of every system")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each system")
    parser.add_argument("--calls", type=int, default=calls, help="timed calls in a turn")
    parser.add_argument("--only", action="append", metavar="TEXT", help="only systems whose name contains this; prints")
    parser.add_argument(
        "--table", action="append", metavar="TEXT", help="only tables whose title contains this; prints"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one call each; prints, writes nothing")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md", help="the file to write the tables into")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main(script, description, systems, experiments, rounds=4, calls=5, table=step_table):
    """The command line of a benchmark.

    Args:
        script: str, its file.
        description: str, its docstring; the first line becomes the heading of its section.
        systems: list of System.
        experiments: list of Experiment; their sizes hold "tokens", the number that one call produces or learns from.
        rounds: int, default number of turns of each system.
        calls: int, default number of timed calls in each turn.
        table: function of systems, results and sizes that returns Markdown.
    """
    options = parse(description, rounds, calls)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if options.worker:
        task = json.loads(options.worker)
        (system,) = (system for system in systems if system.name == task["system"])
        Path(task["answer"]).write_text(json.dumps(work(system, task["sizes"], task["calls"])))
        return
    if options.smoke:
        options.rounds = options.calls = 1
    chosen = [s for s in systems if options.peer_python or not s.peer]
    chosen = [s for s in chosen if not options.only or any(text in s.name for text in options.only)]
    experiments = [e for e in experiments if not options.table or any(text in e.title for text in options.table)]
    load, sections = os.getloadavg()[0], []
    for experiment in experiments:
        sizes = experiment.smoke if options.smoke else experiment.sizes
        results = measure(script, chosen, sizes, options)
        sections.append(f"### {experiment.title}\n\n{experiment.text}\n\n{table(chosen, results, sizes)}")
    heading = f"## {description.splitlines()[0].rstrip('.')}"
    body = "\n\n".join([heading, circumstances(script, results, options, load), *sections])
    print(body)
    if not (options.smoke or options.only or options.table):
        write_section(options.readme, Path(script).stem, body)

"""The command line: python -m llmfound reproduce NAME makes a figure of a paper."""

import argparse
import importlib.util
import os
import sys

BACKENDS = "jax", "tensorflow", "torch"


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {number}")
    return number


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m llmfound")
    commands = parser.add_subparsers(dest="command", required=True)
    figure = commands.add_parser("reproduce", help="make a figure of a paper, with its claim checked")
    figure.add_argument("name", nargs="?", help="of the figure; --list shows all")
    figure.add_argument("--list", action="store_true", help="show the figures")
    figure.add_argument(
        "--scale", choices=["tiny", "small", "full"], default="small",
        help="tiny: a minute, made-up data; small: minutes to an hour, public sets; full: the paper's (default small)",
    )  # fmt: skip
    figure.add_argument("--backend", choices=BACKENDS, help="else KERAS_BACKEND, else Keras's own setting")
    figure.add_argument("--seeds", type=positive, help="how many (default: the scale's, 1 to 10)")
    figure.add_argument("--out", default="runs/reproduce", help="folder (default runs/reproduce)")
    figure.add_argument("--data", help="folder of the public sets; else the environment variable LLMFOUND_DATA")
    figure.add_argument("--jobs", type=positive, default=1, help="runs at a time, each in its own process (default 1)")
    options = parser.parse_args(arguments)
    if not (options.name or options.list):
        figure.error("name a figure, or --list them")
    return options


def installed(backend):
    return backend in BACKENDS and importlib.util.find_spec(backend) is not None


def absent(error):
    """The backend that an import did not find, or None."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    return name if name in BACKENDS and not installed(name) else None


def missing(backend):
    """A sentence."""
    others = ", ".join(filter(installed, BACKENDS)) or "none is installed"
    return (
        f'{backend} is not installed: pip install ".[{backend}]" in a clone of llmfound, or let the environment '
        f"variable KERAS_BACKEND name another backend ({others})."
    )


def choose_backend(options):
    """Sets KERAS_BACKEND, which Keras reads when it is imported. Figures can be listed on any backend that is there."""
    backend = options.backend
    if "keras" in sys.modules:  # by whoever called `main`
        loaded = sys.modules["keras"].backend.backend()
        if installed(backend) and backend != loaded:
            raise SystemExit(f"Keras runs on {loaded} already; set KERAS_BACKEND={backend} before it is imported.")
    elif options.list:
        candidates = backend, os.environ.get("KERAS_BACKEND"), *BACKENDS
        backend = next(filter(installed, candidates), backend)
    if backend and not installed(backend):
        raise SystemExit(missing(backend))
    if backend:
        os.environ["KERAS_BACKEND"] = backend


def run(options):
    choose_backend(options)
    from llmfound.reproduce import FIGURES, reproduce

    if options.list:
        for figure in FIGURES.values():
            print(f"{figure.name:<22} {figure.title}. {figure.source}.")
        return
    if options.name not in FIGURES:
        raise SystemExit(f"There is no figure {options.name!r}; there are {', '.join(FIGURES)}.")
    reproduce(FIGURES[options.name], options.scale, options.seeds, options.out, options.data, options.jobs,
              say=lambda text: print(text, flush=True))  # fmt: skip


def main(options):
    """Exits with 1, and a sentence, if the figure cannot be made."""
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:
        if backend := absent(error):  # which Keras chose
            raise SystemExit(missing(backend)) from None
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. What was done is kept, and the same command goes on.") from None


if __name__ == "__main__":
    main(parse())

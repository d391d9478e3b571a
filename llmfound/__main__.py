"""The command line: python -m llmfound reproduce NAME makes a figure of a paper."""

import argparse
import importlib.util
import os
import sys

PACKAGES = {"jax": "jax", "tensorflow": "tensorflow", "torch": "torch"}


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m llmfound")
    commands = parser.add_subparsers(dest="command", required=True)
    figure = commands.add_parser("reproduce", help="make a figure of a paper, with its claim checked")
    figure.add_argument("name", nargs="?", help="of the figure; --list shows all")
    figure.add_argument("--list", action="store_true", help="show the figures")
    figure.add_argument("--scale", choices=["tiny", "small", "full"], default="small")
    figure.add_argument("--backend", choices=list(PACKAGES), help="else the environment variable KERAS_BACKEND")
    figure.add_argument("--seeds", type=int, help="how many; else the scale's")
    figure.add_argument("--out", default="runs/reproduce", help="folder")
    figure.add_argument("--data", help="folder of the public sets; else the environment variable LLMFOUND_DATA")
    figure.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    options = parser.parse_args(arguments)
    if not (options.name or options.list):
        figure.error("name a figure, or --list them")
    return options


def main(options):
    """Exits with 1, and a sentence, if the figure cannot be made."""
    import keras

    if options.backend and options.backend != keras.backend.backend():
        if importlib.util.find_spec(PACKAGES[options.backend]) is None:
            raise SystemExit(f'{options.backend} is not installed: pip install "llmfound[{options.backend}]"')
        os.environ["KERAS_BACKEND"] = options.backend  # Keras has read it, so Python starts again
        os.execv(sys.executable, [sys.executable, "-m", "llmfound", *sys.argv[1:]])
    from llmfound.reproduce import FIGURES, reproduce

    if options.list:
        for figure in FIGURES.values():
            print(f"{figure.name:<22} {figure.title}. {figure.source}.")
        return
    if options.name not in FIGURES:
        raise SystemExit(f"There is no figure {options.name!r}; there are {', '.join(FIGURES)}.")
    try:
        reproduce(FIGURES[options.name], options.scale, options.seeds, options.out, options.data, options.jobs,
                  say=lambda text: print(text, flush=True))  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. What was done is kept, and the same command goes on.") from None


if __name__ == "__main__":
    main(parse())

"""What the scripts share. Import it before Keras: from then on missing files and Ctrl-C end in one sentence."""

import json
import os
import signal
import sys
import traceback
import warnings

interrupted = ""  # what to say after Ctrl-C
GOES_ON = "What was done is kept, and the same command goes on."


def show_error(kind, error, trace):
    """A missing file or framework, or Ctrl-C, in one sentence; other errors in full."""
    frames, missing = traceback.extract_tb(trace), getattr(error, "name", None)
    if issubclass(kind, KeyboardInterrupt):
        text = f"\nInterrupted. {interrupted}".rstrip()
    elif issubclass(kind, ModuleNotFoundError) and missing in ("jax", "tensorflow", "torch"):
        backend = os.environ.get("KERAS_BACKEND")
        text = f'{missing} is not installed: pip install ".[{missing}]", or change KERAS_BACKEND, which is {backend}.'
    elif issubclass(kind, OSError) or (frames and frames[-1].name == "fetch"):  # which wants a folder of public sets
        text = f"{os.path.basename(sys.argv[0])}: error: {error}"
    else:
        return sys.__excepthook__(kind, error, trace)
    print(text, file=sys.stderr, flush=True)
    if issubclass(kind, KeyboardInterrupt):
        sys.stdout.flush()
        os._exit(130)  # at once: JAX was seen to crash when Python ends while it compiles


sys.excepthook = show_error


def same_run(options, *free):
    """Writes the options of a run into its folder; if it has a run of others, which would go on, the script ends.

    `free` are the names of options that may change from one start to the next.
    """
    told = {name: [str(x) for x in value] if isinstance(value, (list, tuple)) else str(value)
            for name, value in vars(options).items() if name not in ("folder", *free)}  # fmt: skip
    file = options.folder / "options.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    for name, value in told.items():
        if before.get(name, value) != value:
            raise SystemExit(
                f"{options.folder} has a run of {name} {before[name]}, not {value}, and would go on with that; choose "
                "another --folder, or remove this one."
            )
    options.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=1))


def stop_on_interrupt(model):
    """A callback: Ctrl-C ends the training after the running step, and the model is kept; again, it ends the script."""
    from keras.callbacks import LambdaCallback

    def stop(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.filterwarnings("ignore", "training ended with")  # of time that is left
        model.stop_training = True
        print("\nThe training ends here. Ctrl-C again ends the script.", flush=True)

    return LambdaCallback(
        on_train_begin=lambda logs: signal.signal(signal.SIGINT, stop),
        on_train_end=lambda logs: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

"""python -m llmfound.testing: compares a layer or model on every backend and prints where they differ.

The function takes no argument and returns a new layer and its inputs:

    def example():
        return MyLayer(8), {"x": numpy_array, "mask": padding_mask}

    python -m llmfound.testing my_layers.py:example --mask mask

The exit status is 1 if backends differ.
"""

import argparse
import random
import sys

from llmfound.kernels import BACKENDS
from llmfound.testing import compare_backends


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m llmfound.testing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("function", help="module:function or file.py:function")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--mask", help="the call argument that holds the padding mask, bool (batch, length)")
    parser.add_argument(
        "--weights", default="fixed", choices=("fixed", "own"), help="own: those that the function gives"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of outputs")
    parser.add_argument("--gradient-tolerance", type=float, default=1e-4, help="of gradients and steps")
    options = vars(parser.parse_args(arguments))
    random.seed(0)  # Keras draws the seeds of initial weights from here: the same table in every run
    try:
        if ":" not in options["function"]:
            raise ValueError(f"name a function as module:function or file.py:function; got {options['function']!r}.")
        comparison = compare_backends(options.pop("function"), **options)
    except ValueError as error:
        parser.error(str(error))
    print(comparison)
    return bool(comparison.failures())


if __name__ == "__main__":
    sys.exit(main())

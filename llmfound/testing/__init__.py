"""Checks of layers and models, for this library's own and for yours: one call runs all of them.

    check_layer(lambda: MyLayer(8), {"x": x, "mask": mask}, mask="mask")
    check_model(lambda: MyModel(vocab_size=11), ({"token_ids": token_ids}, labels))

Both run on the current backend. `compare_backends` runs a layer or model on all of them, each in a process of its own
with the same weights and inputs, and tells where they differ:

    print(compare_backends(make_my_layer, {"x": x, "mask": mask}, mask="mask"))

`compare_many` takes several of them in one set of processes, `require_equal_backends` is for pytest, and
`python -m llmfound.testing my_layers.py:function` for the command line.
"""

from llmfound.testing.backends import Comparison, Row, compare_backends, compare_many, require_equal_backends
from llmfound.testing.checks import CHECKS, NO_PADDING, NO_WEIGHTS, Report, check_layer, check_model
from llmfound.testing.numbers import assert_close, fixture, set_weights_by_path

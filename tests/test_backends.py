"""Every public layer and model is equal on all backends, and compare_backends names what is not: planted faults."""

import json
import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from keras import layers, ops

import llmfound
from llmfound.testing import assert_close, backends, compare_backends, compare_many, require_equal_backends
from llmfound.testing.__main__ import main

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="each comparison runs all backends, whichever this one is"
)
with_all = pytest.mark.skipif(not all(map(backends.installed, backends.BACKENDS)), reason="a backend is not installed")

rng = np.random.default_rng(0)
X = rng.normal(size=(3, 7, 8)).astype("float32")
MEMORY = rng.normal(size=(3, 5, 8)).astype("float32")
MASK = np.arange(7) < np.array([[7], [4], [5]])
IDS = rng.integers(3, 11, (3, 7)).astype("int32") * MASK
TARGET = rng.integers(3, 11, (3, 5)).astype("int32")
MASKED = {"x": X, "mask": MASK}
TOKENS = dict(inputs={"source_ids": IDS, "target_ids": TARGET}, labels=np.roll(TARGET, -1, axis=1))
# Norms over a batch need more rows: over three, their gradients are mostly rounding.
ROWS = {"x": rng.normal(size=(16, 7, 8)).astype("float32"), "mask": np.arange(7) < rng.integers(2, 8, (16, 1))}
WORDS = rng.integers(3, 11, (16, 7)).astype("int32") * ROWS["mask"]
TEXTS = dict(inputs={"token_ids": WORDS}, labels=np.arange(16) % 3)
BLOCK = dict(inputs={"x": X, "memory": MEMORY, "mask": MASK}, mask="mask")


# What the library offers, and what of Keras it stands on


def additive():
    return llmfound.layers.AdditiveAttention(6)


def multi_head():
    return llmfound.layers.MultiHeadAttention(8, 2, dropout=0.1, use_bias=True)


def self_attention():
    return llmfound.layers.MultiHeadSelfAttention(8, 2, causal=True)


def pre_ln_block():
    return llmfound.layers.PreLNBlock(
        8, 2, 12, dropout=0.1, attention_dropout=0.1, use_bias=True, causal=True, cross_attention=True
    )


def post_ln_block():
    return llmfound.layers.PostLNBlock(8, 2, 12, dropout=0.1, activation="gelu")


def dropout():
    return llmfound.layers.Dropout(0.3)


def positions():
    return llmfound.layers.PositionalEncoding(16)


def feed_forward():
    return llmfound.layers.FeedForward(8, 12, "gelu")


def dense():
    return llmfound.layers.Dense(5, "gelu")


def layer_norm():
    return llmfound.layers.LayerNormalization(beta_initializer="ones")


def embedding():
    return llmfound.layers.Embedding(11, 4, mask_zero=True)


def maxout():
    return llmfound.layers.Maxout()


def gated_recurrence():
    return llmfound.layers.GatedRecurrence(3)


def lstm():
    return llmfound.layers.LSTM(3, return_sequences=True, weight_dropout=0.1)


def gru():
    return llmfound.layers.GRU(3, return_sequences=True, return_state=True, go_backwards=True)


def attention_cell():
    return llmfound.layers.AttentionCell(layers.GRUCell(8), 6, 8)


def rnnsearch():
    return llmfound.models.RNNsearch(11, 12, 4, 8, 6, 4, dropout=0.1)


def rnnencdec():
    return llmfound.models.RNNencdec(11, 12, 4, 8, 6, 4, ordering="eq4")


def dl4mt():
    return llmfound.models.DL4MT(11, 12, 4, 8)


def variational_dropout():
    return llmfound.layers.VariationalDropout(0.3)


def embedding_dropout():
    return llmfound.layers.EmbeddingDropout(11, 0.3)


def awd_lstm():
    return llmfound.layers.AWDLSTM(11, 4, 6)


def ulmfit():
    return llmfound.models.ULMFiT(11, 4, 6, 2)


def classifier():
    return llmfound.models.ULMFiTClassifier(ulmfit(), 3, hidden_dim=5, window=4)


def ensemble():
    return llmfound.models.Ensemble([classifier(), classifier()])


def language_model_head():
    return llmfound.layers.LanguageModelHead(11)


def pooling_classifier_head():
    return llmfound.layers.PoolingClassifierHead(3, 5)


def masked_lm_head():
    return llmfound.layers.MaskedLMHead(11, 8)


def transformer():
    return llmfound.models.Transformer(11, 1, 8, 2, 16, norm="post")


def pre_ln_transformer():
    return llmfound.models.Transformer(11, 1, 8, 2, 16, norm="pre")


def position_embedding():
    return llmfound.layers.PositionEmbedding(16)


def first_token_pooler():
    return llmfound.layers.FirstTokenPooler(6)


def bert_encoder():
    return llmfound.models.BERTEncoder(11, 1, 8, 2, 16)


def bert():
    return llmfound.models.BERT(11, 1, 8, 2, 16, activation="gelu_tanh")


def bert_pretraining():
    return llmfound.models.BERTPretraining(bert())


def bert_classifier():
    return llmfound.models.BERTClassifier(bert(), 3)


def bert_token_classifier():
    return llmfound.models.BERTTokenClassifier(bert(), 3)


def bert_question_answering():
    return llmfound.models.BERTQuestionAnswering(bert())


def bert_multiple_choice():
    return llmfound.models.BERTMultipleChoice(bert())


def batch_norm():
    return layers.BatchNormalization()


def recurrent():
    both = layers.Bidirectional(layers.GRU(3, return_sequences=True, dropout=0.2))
    return keras.Sequential([layers.Embedding(11, 4, mask_zero=True), both])


def several():
    """A functional model of two inputs that returns a dict, an integer among it."""
    x, y = keras.Input((7, 8), name="x"), keras.Input((7, 8), name="y")
    z = layers.Attention()([layers.Dense(8)(x), y])
    return keras.Model({"x": x, "y": y}, {"z": z, "where": ops.argmax(z, axis=-1)})


CASES = {
    "AdditiveAttention": dict(make=additive, inputs={"query": MEMORY, "memory": X, "mask": MASK}, mask="mask"),
    "MultiHeadAttention": dict(make=multi_head, inputs={"query": MEMORY, "memory": X, "mask": MASK}, mask="mask"),
    "MultiHeadSelfAttention": dict(make=self_attention, inputs=MASKED, mask="mask"),
    "PreLNBlock": dict(make=pre_ln_block, **BLOCK),
    "PostLNBlock": dict(make=post_ln_block, inputs=MASKED, mask="mask"),
    "Dropout": dict(make=dropout, inputs=(X,)),
    "PositionalEncoding": dict(make=positions, inputs=(X,)),
    "FeedForward": dict(make=feed_forward, inputs=(X,)),
    "MaskedLMHead": dict(
        make=masked_lm_head,
        inputs=(X, np.array([[0, 2], [1, 1], [6, 0]], "int32"), np.linspace(-1, 1, 88, dtype="float32").reshape(11, 8)),
    ),
    "Dense": dict(make=dense, inputs=(X,)),
    "LayerNormalization": dict(make=layer_norm, inputs=(X,)),
    "Embedding": dict(make=embedding, inputs=(IDS,)),
    "Maxout": dict(make=maxout, inputs=(X,)),
    "GatedRecurrence": dict(make=gated_recurrence, inputs=MASKED, mask="mask"),
    "LSTM": dict(make=lstm, inputs={"sequences": X, "mask": MASK}, mask="mask"),
    "GRU": dict(make=gru, inputs={"sequences": X, "mask": MASK}, mask="mask"),
    "AttentionCell": dict(
        make=attention_cell,
        inputs={"x": X[:, 0], "states": [X[:, 1], MEMORY, MEMORY[..., :6], np.ones((3, 5), "float32")]},
    ),
    "RNNsearch": dict(make=rnnsearch, **TOKENS),
    "RNNencdec": dict(make=rnnencdec, **TOKENS),
    "DL4MT": dict(make=dl4mt, **TOKENS),
    "VariationalDropout": dict(make=variational_dropout, inputs=(X,)),
    "EmbeddingDropout": dict(make=embedding_dropout, inputs=(X, IDS)),
    "AWDLSTM": dict(make=awd_lstm, inputs={"token_ids": IDS}),
    "LanguageModelHead": dict(
        make=language_model_head, inputs=(X, np.linspace(-1, 1, 88, dtype="float32").reshape(11, 8))
    ),
    "PoolingClassifierHead": dict(make=pooling_classifier_head, inputs=ROWS, mask="mask"),
    "ULMFiT": dict(make=ulmfit, inputs={"token_ids": IDS}, labels=np.roll(IDS, -1, axis=1)),
    "ULMFiTClassifier": dict(make=classifier, **TEXTS),
    "Ensemble": dict(make=ensemble, **TEXTS),
    "PositionEmbedding": dict(make=position_embedding, inputs=(X,)),
    "FirstTokenPooler": dict(make=first_token_pooler, inputs=(X,)),
    "BERTEncoder": dict(make=bert_encoder, inputs={"token_ids": IDS, "segment_ids": IDS % 2}),
    "BERT": dict(make=bert, inputs={"token_ids": IDS, "segment_ids": IDS % 2}),
    "BERTPretraining": dict(make=bert_pretraining, inputs={"token_ids": IDS, "masked_positions": IDS % 7}),
    "BERTClassifier": dict(make=bert_classifier, **TEXTS),
    "BERTTokenClassifier": dict(make=bert_token_classifier, inputs={"token_ids": IDS}, labels=IDS % 3),
    "BERTQuestionAnswering": dict(make=bert_question_answering, inputs={"token_ids": IDS}, labels=IDS[:, :2] % 7),
    "BERTMultipleChoice": dict(
        make=bert_multiple_choice, inputs={"token_ids": np.stack([IDS, IDS[::-1]], axis=1)}, labels=IDS[:, 0] % 2
    ),
    "Transformer": dict(make=transformer, **TOKENS),
    "Transformer, Pre-LN": dict(make=pre_ln_transformer, **TOKENS),
    "keras BatchNormalization": dict(make=batch_norm, inputs={"inputs": X, "mask": MASK}),
    "keras Embedding and GRU": dict(make=recurrent, inputs=IDS),
    "keras functional model": dict(make=several, inputs={"x": X, "y": X[::-1]}),
    "a .keras file": dict(inputs=X),
}
ABSTRACT = {"TransformerBlock"}


def test_every_public_layer_and_model_is_compared():
    public = {
        name for module in (llmfound.layers, llmfound.models)
        for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, keras.Layer)
    }  # fmt: skip
    compared = {type(case["make"]()).__name__ for case in CASES.values() if "make" in case}
    assert public - ABSTRACT <= compared


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory):
    if sum(map(backends.installed, backends.BACKENDS)) < 2:
        pytest.skip("one backend alone is installed")
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    keras.Sequential([keras.Input((7, 8)), layers.Dense(3)]).save(path)
    CASES["a .keras file"]["make"] = path
    return compare_many(CASES)


@pytest.mark.parametrize("name", CASES)
def test_it_is_equal_on_all_backends(name, comparisons):
    comparisons[name].assert_equal(tolerance=1e-5, gradient_tolerance=1e-4)
    assert str(comparisons[name]).startswith(f"{name} on {', '.join(comparisons[name].backends)}: equal")


@with_all
def test_everything_is_compared(comparisons):
    block = comparisons["PreLNBlock"].rows
    assert {row.stage for row in block} == set(backends.STAGES) - {"save"}
    assert len([row for row in block if row.stage == "load"]) == 6  # every file on every other backend
    gradients = {row.tensor for row in block if row.stage == "gradient"}
    assert {"input_x", "input_memory"} < gradients and len(gradients) == 2 + len(pre_ln_block_weights())
    steps = {row.tensor for row in comparisons["keras BatchNormalization"].rows if row.stage == "optimizer step"}
    assert any(name.endswith("/moving_mean") for name in steps)
    assert "output mask" in {row.stage for row in comparisons["keras Embedding and GRU"].rows}
    assert {row.tensor for row in comparisons["keras functional model"].rows if row.stage == "output"} == {
        "output['where']", "output['z']"
    }  # fmt: skip
    assert {row.stage for row in comparisons["PositionalEncoding"].rows} >= {"gradient", "fit"}  # by its input


def pre_ln_block_weights():
    layer = pre_ln_block()
    layer(X, MEMORY)
    return layer.trainable_weights


# Planted faults


@keras.saving.register_keras_serializable("test_backends")
class NoMaskOnJAX(llmfound.layers.MultiHeadSelfAttention):
    def call(self, x, mask=None, **options):
        return super().call(x, None if keras.backend.backend() == "jax" else mask, **options)


def no_mask_on_jax():
    print("more than a pipe holds " * 10_000)
    return NoMaskOnJAX(8, 2)


def converted():
    layer = layers.Dense(8, name="converted")
    layer.build((None, None, 8))
    kernel = np.arange(64, dtype="float32").reshape(8, 8) / 64
    layer.set_weights([kernel.T if keras.backend.backend() == "torch" else kernel, np.ones(8)])
    return layer


@keras.saving.register_keras_serializable("test_backends")
class PathStoppedOnTensorFlow(llmfound.layers.FeedForward):
    def call(self, x):
        hidden = self.expand(x)
        return self.contract(ops.stop_gradient(hidden) if keras.backend.backend() == "tensorflow" else hidden)


def path_stopped():
    return PathStoppedOnTensorFlow(8, 12, name="stopped")


@keras.saving.register_keras_serializable("test_backends")
class StoppedOnTensorFlow(llmfound.layers.FeedForward):
    def call(self, x):
        y = super().call(x)
        return ops.stop_gradient(y) if keras.backend.backend() == "tensorflow" else y


def stopped():
    return StoppedOnTensorFlow(8, 12, name="stopped")


@keras.saving.register_keras_serializable("test_backends")
class RaisesOnTorch(llmfound.layers.FeedForward):
    def call(self, x, training=None):
        if training and keras.backend.backend() == "torch":
            raise NotImplementedError("\n".join(f"reason {i}: {'long ' * 40}" for i in range(9)))
        return super().call(x)


def raises():
    return RaisesOnTorch(8, 12)


class Unregistered(layers.Dense):
    pass


def unregistered():
    return Unregistered(3)


FAULTS = {
    "no mask": dict(make=no_mask_on_jax, inputs=MASKED, mask="mask"),
    "transposed": dict(make=converted, inputs={"inputs": X}, weights="own"),
    "path stopped": dict(make=path_stopped, inputs=(X,)),
    "stopped": dict(make=stopped, inputs=(X,)),
    "raises": dict(make=raises, inputs=(X,)),
    "unregistered": dict(make=unregistered, inputs=(X,)),
}


@pytest.fixture(scope="module")
def faults():
    return compare_many(FAULTS)


def failed(comparison, *stages):
    return [row for row in comparison.failures() if row.stage in stages]


@with_all
def test_a_mask_applied_on_some_backends_only_is_named(faults):
    comparison = faults["no mask"]
    assert {row.backend for row in failed(comparison, "output", "padding")} == {"jax"}
    assert failed(comparison, "output") and failed(comparison, "gradient")
    assert not failed(comparison, "config", "load")  # each is held against the same backend before
    with pytest.raises(AssertionError, match=r"(?s)first in: output, on jax\n.*output +DIFFERS +output +jax "):
        comparison.assert_equal()


@with_all
def test_a_kernel_transposed_in_one_conversion_is_named(faults):
    (row,) = failed(faults["transposed"], "weights")
    assert (row.backend, row.tensor) == ("torch", "converted/kernel")
    assert row.absolute == pytest.approx(49 / 64)
    assert {row.backend for row in failed(faults["transposed"], "output")} == {"torch"}


@with_all
@pytest.mark.parametrize(
    "name, tensors",
    [
        ("path stopped", {"stopped/expand/kernel", "stopped/expand/bias", "input_x"}),
        (
            "stopped",
            {f"stopped/{part}" for part in ("expand/kernel", "expand/bias", "contract/kernel", "contract/bias")}
            | {"input_x"},
        ),
    ],
)
def test_a_gradient_stopped_on_one_backend_is_named(name, tensors, faults):
    rows = failed(faults[name], "gradient")
    assert {row.tensor for row in rows} == tensors and {row.backend for row in rows} == {"tensorflow"}
    assert all(row.relative == pytest.approx(1) for row in rows)
    assert not failed(faults[name], "output", "config", "load", "bfloat16")


@with_all
def test_an_error_on_one_backend_is_one_row_and_stands_below_the_table(faults):
    (row,) = faults["raises"].failures()
    assert (row.stage, row.backend) == ("gradient", "torch")
    table, _, below = str(faults["raises"]).partition("\n\nERROR 1: ")
    assert "gradient        ERROR 1" in table and "reason" not in table and "reason 0: long" in below
    assert max(map(len, str(faults["raises"]).splitlines())) <= 140


@with_all
def test_an_error_on_every_backend_is_one_line(faults):
    assert len(failed(faults["unregistered"], "config")) == 3
    assert str(faults["unregistered"]).count("config ") == 1 and "everywhere" in str(faults["unregistered"])


# The command, and the processes


MY_LAYERS = """
import keras, numpy as np
class Odd(keras.layers.Layer):
    def call(self, x):
        return x * (2.0 if keras.backend.backend() == "torch" else 1.0)
def odd():
    return Odd(), (np.ones((2, 3), "float32"),)
def even():
    return keras.layers.Dense(3), (np.ones((2, 3), "float32"),)
"""


def start_command(folder, *arguments, **options):
    """The command on a file of its own folder, with its temporary files there, too."""
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "my_layers.py").write_text(MY_LAYERS)
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    return subprocess.Popen(
        [sys.executable, "-m", "llmfound.testing", *arguments, "--backends", "jax", "torch"],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@with_all
def test_two_commands_at_once_share_nothing_and_leave_nothing(tmp_path):
    odd, even = (start_command(tmp_path, f"my_layers.py:{name}") for name in ("odd", "even"))
    odd_table, odd_error = odd.communicate()
    even_table, even_error = even.communicate()
    assert odd.returncode == 1, odd_error
    assert "first in: output" in odd_table and "DIFFERS" in odd_table
    assert even.returncode == 0, even_error
    assert even_table.startswith("even (Dense) on jax, torch: equal")
    assert not list((tmp_path / "tmp").glob("llmfound-*"))


@with_all
def test_an_interrupt_leaves_no_process_and_no_folder(tmp_path):
    heeded = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  a shell's "&" ignores it
    command = start_command(tmp_path, "my_layers.py:even", start_new_session=True, preexec_fn=heeded)
    for _ in range(6000):
        if list((tmp_path / "tmp").glob("llmfound-*/torch.txt")):
            break
        time.sleep(0.01)
    time.sleep(0.5)
    command.send_signal(signal.SIGINT)  # to the parent alone: a terminal sends it to all
    command.communicate(timeout=60)
    assert command.returncode
    with pytest.raises(ProcessLookupError):
        os.killpg(command.pid, 0)
    assert not list((tmp_path / "tmp").glob("llmfound-*"))


def dies_on_torch():
    if keras.backend.backend() == "torch":
        os.kill(os.getpid(), signal.SIGSEGV)
    return layers.Dense(3)


@with_all
def test_a_process_that_dies_is_named(monkeypatch):
    with pytest.raises(RuntimeError, match=r"torch's process died of SIGSEGV at 'output' of subject 0"):
        compare_backends(dies_on_torch, (X,), ("jax", "torch"))
    monkeypatch.setattr(backends, "SECONDS", 0.5)
    with pytest.raises(RuntimeError, match=r"more than 0\.5 seconds: jax was at its imports; torch was at "):
        compare_backends(feed_forward, (X,), ("jax", "torch"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("block", "module:function"),
        ("no_such_module:make", "no module 'no_such_module'"),
        ("no_such.module:make", "no module 'no_such.module'"),
        ("no_such_file.py:make", "no file"),
        ("math:no_such_function", "has no function 'no_such_function'"),
    ],
)
def test_the_command_says_what_it_cannot_find(text, message, capsys):
    with pytest.raises(SystemExit) as error:
        main([text])
    assert error.value.code == 2 and message in capsys.readouterr().err


# Arguments


@pytest.mark.parametrize(
    "make, options, message",
    [
        (lambda: layers.Dense(3), {}, "top level of a module"),
        ("no.keras", {}, "no such file"),
        (pre_ln_block, dict(backends=("jax",)), "two or more"),
        (pre_ln_block, dict(backends=("jax", "mxnet")), "two or more"),
        (pre_ln_block, dict(weights="random"), '"fixed" or "own"'),
        (pre_ln_block, dict(inputs=None), "make must return"),
        (pre_ln_block, dict(mask="x"), "mask must name a bool"),
        (pre_ln_block, dict(inputs={"x": X, "memory": object()}), "NumPy arrays, numbers, strings"),
    ],
)
def test_arguments_that_cannot_be(make, options, message):
    with pytest.raises(ValueError, match=message):
        compare_backends(make, **{"inputs": {"x": X, "memory": MEMORY, "mask": MASK}, **options})


def test_what_is_not_installed_is_skipped_by_name(monkeypatch):
    monkeypatch.setattr(backends, "installed", lambda backend: backend == "jax")
    with pytest.raises(ValueError, match=r"Two backends are needed.*pip install torch"):
        compare_backends(pre_ln_block, {"x": X, "memory": MEMORY})
    with pytest.raises(pytest.skip.Exception, match=r"not installed: (torch|tensorflow), "):
        require_equal_backends(pre_ln_block, {"x": X, "memory": MEMORY})


# The comparison itself


def found(stage="output", **values):
    """What `_run` returns for one tensor with a value on each backend."""
    result = {}
    for backend, value in values.items():
        value = np.asarray(value)
        result[backend] = [(dict(stage=stage, tensor="", dtype=value.dtype.name), value)]
    return result


@pytest.mark.parametrize("odd", ["jax", "torch", "tensorflow"])
@pytest.mark.parametrize("value, problem", [(2.0, ""), (np.nan, ""), (np.float64(1), "DTYPE"), ([1.0], "SHAPE")])
def test_the_one_that_is_wrong_is_the_one_named(odd, value, problem):
    values = {**dict.fromkeys(("jax", "torch", "tensorflow"), np.float32(1)), odd: np.asarray(value, "float32")}
    if problem == "DTYPE":
        values[odd] = np.float64(1)
    rows, _ = backends._compare(found(**values))
    failures = backends.Comparison("x", list(values), {}, rows, []).failures()
    assert [(row.backend, row.problem) for row in failures] == [(odd, problem)]


def test_tolerances_are_met_exactly():
    rows, _ = backends._compare(found(jax=np.float32(1), torch=np.float32(1 + 2**-10)))
    comparison = backends.Comparison("x", ["jax", "torch"], {}, rows, [])
    comparison.assert_equal(tolerance=2**-10)
    with pytest.raises(AssertionError, match=r"9\.8e-04"):
        comparison.assert_equal(tolerance=2**-11)


def test_a_tensor_or_a_stage_that_one_backend_lacks_is_a_failure():
    values = found(jax=1.0, torch=1.0, tensorflow=1.0)
    values["torch"][0][0]["tensor"] = "[1]"
    problems = [(row.backend, row.problem) for row in backends._compare(values)[0] if row.problem]
    assert ("torch", "MISSING") in problems
    values = found(jax=1.0, torch=1.0)
    values["torch"] = [(dict(stage="output", tensor="", error="ValueError: no"), None)]
    assert [(row.backend, row.problem) for row in backends._compare(values)[0]] == [("torch", "ValueError: no")]


def test_a_gradient_that_reaches_a_weight_nowhere_is_noted():
    rows, notes = backends._compare(found("gradient", jax=np.zeros(2), torch=np.zeros(2)))
    assert not [row for row in rows if row.problem] and "no gradient reaches" in notes[0]


def test_nan_everywhere_is_equal_and_noted():
    nan = np.array([np.nan, 1], "float32")
    rows, notes = backends._compare(found(jax=nan, torch=nan, tensorflow=nan))
    assert all(row.excess == 0 for row in rows) and notes == ["NaN in output on every backend."]
    rows, notes = backends._compare(
        found(jax=nan, torch=np.array([np.nan, 2], "float32"), tensorflow=np.ones(2, "float32"))
    )
    (row,) = [row for row in rows if row.expected.endswith("with 1 NaN")]
    assert row.backend == "tensorflow" and row.excess == np.inf and not notes


@pytest.mark.parametrize("huge", [-1e9, np.finfo("float32").min, -np.inf])
def test_huge_numbers_hide_no_difference(huge):
    one = np.array([0.1, 0.2, 0.3, huge], "float32")
    other = np.array([0.1, 0.2, 0.4, huge], "float32")
    rows, _ = backends._compare(found(jax=one, torch=other))
    assert rows[0].excess > 0.01 and rows[0].absolute == pytest.approx(0.1)


def test_integers_must_be_equal_and_no_numbers_are():
    rows, _ = backends._compare(found(jax=np.array([10**6]), torch=np.array([10**6 + 1])))
    assert rows[0].excess == np.inf
    rows, _ = backends._compare(found(jax=np.zeros((0, 3)), torch=np.zeros((0, 3))))
    assert rows[0].excess == 0


def test_noise_in_a_gradient_that_is_zero_on_paper_is_no_difference():
    values = found("gradient", jax=np.float32(1e-9), torch=np.float32(-1e-9))
    assert backends._compare(values)[0][0].excess == pytest.approx(2)
    large = found("gradient", jax=np.float32(1), torch=np.float32(1))
    for backend, findings in large.items():
        findings[0][0]["tensor"] = "large"
        values[backend] += findings
    assert max(row.excess for row in backends._compare(values)[0]) < 1e-5


def test_the_table_shows_the_worst_of_many():
    rows = [backends.Row("gradient", f"weight {i}", "torch", "jax", excess=i + 1.0) for i in range(20)]
    table = str(backends.Comparison("x", ["jax", "torch", "tensorflow"], {}, rows, []))
    assert "weight 19 " in table and "weight 12 " in table and "weight 11 " not in table and "and 12 more" in table


def test_inputs_go_through_files_unchanged():
    nest = {"x": X, "more": [MASK, (1, 2.5, None, "a", True)], "none": {}}
    arrays = []
    packed = json.loads(json.dumps(backends.worker.pack(nest, arrays)))
    again = backends.worker.unpack(packed, arrays)
    assert again["more"][1] == nest["more"][1] and again["none"] == {} and isinstance(again["more"][1], tuple)
    assert_close(again["x"], X, 0)
    assert again["more"][0].dtype == bool

"""BERT against the numbers of its authors' code, of Hugging Face's, and of an independent forward pass."""

import functools
from unittest import mock

import keras
import numpy as np
import pytest
from keras import ops
from marks import another

import llmfound
from llmfound.layers import PostLNBlock
from llmfound.models import (
    BERT,
    BERTClassifier,
    BERTEncoder,
    BERTMultipleChoice,
    BERTPretraining,
    BERTQuestionAnswering,
    BERTTokenClassifier,
)
from llmfound.ops import gelu_tanh
from llmfound.testing import assert_close, check_model, fixture
from llmfound.training import SmoothedCrossEntropy

TINY = dict(vocab_size=40, num_layers=2, hidden_dim=16, num_heads=2, intermediate_dim=32, max_length=24, dropout=0.0,
            attention_dropout=0.0)  # fmt: skip
TOKENS = np.array([[2, 5, 7, 9, 3, 11, 13, 3], [2, 21, 4, 3, 0, 0, 0, 0]], "int32")
SEGMENTS = np.array([[0, 0, 0, 0, 0, 1, 1, 1], [0] * 8], "int32")
MASKED = np.array([[1, 3], [2, 0]], "int32")
INPUTS = {"token_ids": TOKENS, "segment_ids": SEGMENTS}
PARTS = {
    "token_embedding": "embeddings.word_embeddings", "segment_embedding": "embeddings.token_type_embeddings",
    "position_embedding": "embeddings.position_embeddings", "embedding_norm": "embeddings.LayerNorm",
    "attention/query": "attention.self.query", "attention/key": "attention.self.key",
    "attention/value": "attention.self.value", "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm", "feedforward/expand": "intermediate.dense",
    "feedforward/contract": "output.dense", "feedforward_norm": "output.LayerNorm",
}  # fmt: skip
HEADS = {"pooler/dense": "bert.pooler.dense", "masked_lm/dense": "cls.predictions.transform.dense",
         "masked_lm/norm": "cls.predictions.transform.LayerNorm", "masked_lm": "cls.predictions",
         "next_sentence": "cls.seq_relationship"}  # fmt: skip
NAMES = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}


def published_name(path):
    """bert/encoder/block_1/attention/query/kernel is bert.encoder.layer.1.attention.self.query.weight."""
    *parts, last = path.split("/")[1:]
    if parts[0] != "encoder":
        return f"{HEADS['/'.join(parts)]}.{NAMES[last]}"
    if parts[1].startswith("block_"):
        return f"bert.encoder.layer.{parts[1].removeprefix('block_')}.{PARTS['/'.join(parts[2:])]}.{NAMES[last]}"
    return f"bert.{PARTS[parts[1]]}.{NAMES[last]}"


MODELS = {}


def published(activation="gelu", dtype="float32"):
    """The pre-training model of the published numbers, made once for all tests that only read it."""
    key = activation, dtype
    if key not in MODELS:
        model = BERTPretraining(BERT(**TINY, activation=activation, dtype=dtype), dtype=dtype)
        for weight in model.weights:
            name, transposed = published_name(weight.path), weight.path.endswith("kernel")
            shape = tuple(weight.shape)[::-1] if transposed else tuple(weight.shape)
            value = fixture(name, shape, norm_scale="LayerNorm.weight" in name)
            weight.assign(value.T if transposed else value)
        MODELS[key] = model
    return MODELS[key]


def run(model, **more):
    found = model.predict_on_batch({**INPUTS, **more})
    return {k: ops.convert_to_numpy(x) for k, x in found.items()} if isinstance(found, dict) else found


def count(model):
    return sum(int(np.prod(w.shape)) for w in model.weights)


# The numbers of papers and code


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation, expected", [
    ("gelu", dict(first=[-2.440445, 0.531554, 0.628639, 0.037517], last=[-3.616128, 0.342082, 2.564629, -0.355556],
                  pooled=[0.680331, -0.277815, -0.464401, -0.632471],
                  masked=[-1.566828, 0.308941, -2.140584, -0.931315])),
    ("gelu_tanh", dict(first=[-2.439890, 0.531684, 0.628285, 0.037253],
                       pooled=[0.680289, -0.277862, -0.463933, -0.632531],
                       masked=[-1.567110, 0.309681, -2.140504, -0.930825])),
])  # fmt: skip
def test_check_2_published_numbers(activation, expected, dtype):
    model = published(activation, dtype)
    embedded = model.encoder.embed(TOKENS, SEGMENTS)
    assert_close(embedded[0, 0, :4], np.array([-0.979187, -0.904859, 0.807633, 1.382574]), 2e-6)
    sequence = model.encode(INPUTS)
    assert_close(sequence[0, 0, :4], np.array(expected["first"]), 3e-6)
    if "last" in expected:
        assert_close(sequence[1, 3, :4], np.array(expected["last"]), 3e-6)
    assert_close(model.pooler(sequence)[0, :4], np.array(expected["pooled"]), 3e-6)
    found = run(model, masked_positions=MASKED)
    assert_close(found["masked_lm"][0, 0, :4], np.array(expected["masked"]), 5e-6)
    if activation == "gelu":
        nsp = np.array([[0.830324, -0.305577], [0.202806, -0.557814]])
        assert_close(found["next_sentence"], nsp, 3e-6)
    assert found["masked_lm"].dtype == found["next_sentence"].dtype == "float32"


@functools.cache
def shallow(hidden_dim, num_layers):
    heads = dict(num_heads=hidden_dim // 64, intermediate_dim=4 * hidden_dim)
    return BERT(10, num_layers=num_layers, hidden_dim=hidden_dim, **heads)


def weights(kind, vocab_size, num_layers=12, hidden_dim=768, **_):
    """The weights of a large model from those of two small ones: each block has as many, and each word."""
    zeros = keras.initializers.Zeros.__call__  # as many as truncated normal numbers, and sooner
    with mock.patch.object(keras.initializers.TruncatedNormal, "__call__", zeros):
        one, two = (count(KINDS[kind](shallow(hidden_dim, n))) for n in (1, 2))
    of_word = hidden_dim + ("MLM" in kind)
    return one + (num_layers - 1) * (two - one) + (vocab_size - 10) * of_word


KINDS = {
    "BERT": lambda bert: bert, "MLM, NSP": BERTPretraining, "MLM": lambda bert: BERTPretraining(bert, False),
    "without pooler": lambda bert: bert.encoder, "2 classes": lambda bert: BERTClassifier(bert, 2),
    "SQuAD": BERTQuestionAnswering, "9 tags": lambda bert: BERTTokenClassifier(bert, 9), "choice": BERTMultipleChoice,
}  # fmt: skip


def test_check_1_weights():
    expected = {"BERT": 109_482_240, "MLM, NSP": 110_106_428, "MLM": 109_514_298,
                "without pooler": 108_891_648, "2 classes": 109_483_778,
                "SQuAD": 108_893_186, "9 tags": 108_898_569, "choice": 109_483_009}  # fmt: skip
    assert {kind: weights(kind, 30522) for kind in KINDS} == expected
    assert (weights("BERT", 28996), weights("MLM, NSP", 28996)) == (108_310_272, 108_932_934)
    assert (weights("BERT", 119547), weights("BERT", 21128)) == (177_853_440, 102_267_648)
    assert BERT.BASE == dict(num_layers=12, hidden_dim=768, num_heads=12, intermediate_dim=3072)
    assert (weights("BERT", 30522, **BERT.LARGE), weights("MLM, NSP", 30522, **BERT.LARGE)) == (
        335_141_888,
        336_226_108,
    )
    assert count(BERT(30522, **BERT.TINY)) == weights("BERT", 30522, **BERT.TINY) == 4_385_920


def test_check_1_miniatures():
    expected = {128: (4_385_920, 4_782_464, 5_179_008, 5_575_552, 5_972_096, 6_368_640),
                256: (9_591_040, 11_170_560, 12_750_080, 14_329_600, 15_909_120, 17_488_640),
                512: (22_458_880, 28_763_648, 35_068_416, 41_373_184, 47_677_952, 53_982_720),
                768: (38_603_520, 52_779_264, 66_955_008, 81_130_752, 95_306_496, 109_482_240)}  # fmt: skip
    found = {(n, width): weights("BERT", 30522, **sizes) for (n, width), sizes in BERT.MINIATURES.items()}
    assert found == {(2 * i, width): n for width, numbers in expected.items() for i, n in enumerate(numbers, 1)}
    assert all(s["intermediate_dim"] == 64 * 4 * s["num_heads"] == 4 * h for (_, h), s in BERT.MINIATURES.items())
    named = [BERT.TINY, BERT.MINI, BERT.SMALL, BERT.MEDIUM, BERT.BASE]
    assert named == [BERT.MINIATURES[key] for key in ((2, 128), (4, 256), (4, 512), (8, 512), (12, 768))]


def test_check_3_both_forms_of_gelu():
    x = np.array([1.0, -1.0, 2.0, 3.0], "float32")
    assert_close(ops.gelu(x, approximate=False), np.array([0.841344746, -0.158655254, 1.954499736, 2.995950306]), 1e-6)
    assert_close(gelu_tanh(x), np.array([0.841191991, -0.158808009, 1.954597694, 2.996362608]), 1e-6)
    x = np.linspace(-5, 5, 100_001).astype("float32")
    difference = np.abs(ops.convert_to_numpy(gelu_tanh(x) - ops.gelu(x, approximate=False)))
    assert difference.max() == pytest.approx(4.732e-4, abs=2e-6)
    assert abs(x[difference.argmax()]) == pytest.approx(2.699, abs=0.02)


def test_check_5_a_fresh_model_knows_nothing():
    model = BERTPretraining(BERT(30522, **BERT.TINY))
    rng = np.random.default_rng(0)
    inputs = {"token_ids": rng.integers(1000, 30522, (8, 32)).astype("int32"),
              "masked_positions": np.tile(np.arange(32, dtype="int32"), (8, 1))}  # fmt: skip
    found = model.predict_on_batch(inputs)
    masked = SmoothedCrossEntropy(0.0)(rng.integers(1000, 30522, (8, 32)).astype("int32"), found["masked_lm"])
    pairs = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(np.arange(8) % 2, found["next_sentence"])
    assert float(masked) == pytest.approx(np.log(30522), abs=0.06)
    assert float(pairs) == pytest.approx(np.log(2), abs=0.02)


def test_masked_positions_beyond_the_text():
    model = BERTPretraining(BERT(30, **BERT.TINY))
    with pytest.raises(ValueError, match="masked_positions must be 0 to 3; got up to 99"):
        model.predict_on_batch(
            {"token_ids": np.ones((1, 4), "int32"), "masked_positions": np.array([[0, 99]], "int32")}
        )


def test_weights_begin_as_the_authors():
    model = BERT(500, num_layers=1, hidden_dim=128, num_heads=2, intermediate_dim=512)
    for weight in model.weights:
        w, name = ops.convert_to_numpy(weight), weight.path.split("/")[-1]
        if name in ("bias", "beta", "gamma"):
            assert (w == (name == "gamma")).all()
        elif w.size > 1000:
            assert (abs(w) > 0.04).mean() < 1e-4, weight.path  # Keras on torch lets one of 230,000 pass
            assert w.std() == pytest.approx(0.017592513, rel=0.03), weight.path
    attention = model.encoder.blocks[0].attention
    kernels = [ops.convert_to_numpy(d.kernel) for d in (attention.query, attention.key, attention.value)]
    assert (kernels[0] != kernels[1]).mean() > 0.99 and (kernels[1] != kernels[2]).mean() > 0.99


# What must not matter


def test_padding_and_what_the_mask_hides_change_nothing():
    model = published()
    alone = {"token_ids": TOKENS[1:, :4], "segment_ids": SEGMENTS[1:, :4]}
    assert_close(model.encode(INPUTS)[1:, :4], model.encode(alone), 1e-5)
    other = TOKENS.copy()
    other[1, 4:] = 17
    masked = model.encode({"token_ids": other, "segment_ids": SEGMENTS, "mask": TOKENS != 0})
    assert_close(masked[1, :4], model.encode(INPUTS)[1, :4], 1e-5)
    as_numbers = model.encode({"token_ids": other, "segment_ids": SEGMENTS, "mask": (TOKENS != 0).astype("int32")})
    assert_close(as_numbers, masked, 0)


def test_segments_matter_and_are_the_first_by_default():
    model = published()
    without = model.encode({"token_ids": TOKENS})
    assert_close(model.encode({"token_ids": TOKENS, "segment_ids": np.zeros_like(SEGMENTS)}), without, 0)
    difference = ops.convert_to_numpy(model.encode(INPUTS)[0] - without[0])
    assert np.abs(difference).max() > 0.01


@pytest.mark.parametrize("make", [
    lambda bert: BERTClassifier(bert, 3), llmfound.models.BERTMultipleChoice, BERTPretraining
])  # fmt: skip
def test_the_first_token_of_a_causal_model_tells_nothing(make):
    with pytest.raises(ValueError, match="reads the first token, which sees nothing of the text in a causal BERT"):
        make(BERT(**TINY, causal=True))
    BERTPretraining(BERT(**TINY, causal=True), next_sentence=False)


class ReadsTheLast(BERTClassifier):
    def pool(self, inputs, training=None):
        return self.encode(inputs, training)[:, -1]


def test_a_classifier_of_another_token_may_be_causal():
    logits = ReadsTheLast(BERT(**TINY, causal=True), 3)(TOKENS)
    assert np.abs(ops.convert_to_numpy(logits[0] - logits[1])).max() > 1e-3


def test_a_causal_model_does_not_look_ahead():
    bert = BERT(**TINY, causal=True)
    other = TOKENS.copy()
    other[0, 5:] = 30
    found, again = bert.encode({"token_ids": TOKENS}), bert.encode({"token_ids": other})
    assert_close(found[0, :5], again[0, :5], 1e-6)
    assert np.abs(ops.convert_to_numpy(found[0, 5:] - again[0, 5:])).max() > 0.01


def test_models_share_what_they_are_made_of():
    bert = BERT(**TINY)
    pretraining, classifier = BERTPretraining(bert), BERTClassifier(bert, 3)
    assert pretraining.encoder is classifier.encoder is bert.encoder
    assert pretraining.pooler is classifier.pooler is bert.pooler
    tagger = BERTTokenClassifier(classifier, 3)
    assert tagger.encoder is bert.encoder and not hasattr(tagger, "pooler")
    bert.encoder.embeddings.assign(np.zeros((40, 16)))
    assert (ops.convert_to_numpy(pretraining.encoder.embeddings) == 0).all()
    fresh = BERTClassifier(tagger, 2)
    assert fresh.encoder is bert.encoder and fresh.pooler is not bert.pooler


def test_choices_are_scored_one_by_one():
    model = BERTMultipleChoice(BERT(**TINY))
    tokens = np.stack([TOKENS, TOKENS[::-1], TOKENS], axis=1)
    scores = model.predict_on_batch({"token_ids": tokens, "segment_ids": np.zeros_like(tokens)})
    assert scores.shape == (2, 3)
    assert_close(scores[:, 0], scores[:, 2], 1e-6)
    assert_close(scores[::-1, 1], scores[:, 0], 1e-5)
    assert_close(model({"token_ids": tokens, "segment_ids": None}), scores, 1e-5)


def test_groups_of_layers():
    classifier = BERTClassifier(BERT(**TINY), 3)
    names = [[layer.name for layer in group] for group in classifier.layer_groups()]
    assert names == [
        ["token_embedding", "segment_embedding", "position_embedding", "embedding_norm"], ["block_0"], ["block_1"],
        ["pooler", "classes"],
    ]  # fmt: skip
    weights = {id(w) for group in classifier.layer_groups() for layer in group for w in layer.weights}
    assert weights == {id(w) for w in classifier.weights}
    assert len(BERTQuestionAnswering(BERT(**TINY)).layer_groups()) == 4


# Training, saving, errors


def smaller(**more):
    return BERT(**{**TINY, "num_layers": 1, "max_length": 96}, **more)


CASES = {
    "BERTPretraining": (lambda: BERTPretraining(smaller()), dict(masked_positions=MASKED),
                        {"masked_lm": np.array([[5, 9], [4, 0]]), "next_sentence": np.array([0, 1])},
                        {"masked_lm": SmoothedCrossEntropy(0.0),
                         "next_sentence": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}),
    "BERTClassifier": (lambda: BERTClassifier(smaller(), 3), {}, np.array([0, 2]), None),
    "BERTTokenClassifier": (lambda: BERTTokenClassifier(smaller(), 3), {},
                            np.array([[-1, 1, 2, 0, 0, 1, 2, -1], [-1, 1, 1, -1, -1, -1, -1, -1]]),
                            keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)),
    "BERTQuestionAnswering": (lambda: BERTQuestionAnswering(smaller()), {}, np.array([[5, 6], [1, 2]]), None),
}  # fmt: skip


@pytest.mark.parametrize("name", [name if name == "BERTPretraining" else another(name) for name in CASES])
def test_fit_lowers_the_loss_and_a_saved_model_is_the_same(name, tmp_path):
    make, more, labels, loss = CASES[name]
    model, inputs = make(), {**INPUTS, **more}
    model.compile(keras.optimizers.Adam(0.01), loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(inputs, labels, epochs=12, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_close(again.predict_on_batch(inputs), model.predict_on_batch(inputs), 1e-6)
    assert again.get_config() == model.get_config()


@pytest.mark.parametrize("kind", [BERTClassifier, BERTTokenClassifier])
def test_classes_may_be_counted_by_numpy(kind, tmp_path):
    model = kind(smaller(), np.int64(3))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_close(again.predict_on_batch(INPUTS), model.predict_on_batch(INPUTS), 1e-6)


def test_a_short_table_of_positions_in_a_functional_model_of_any_length(tmp_path):
    """On PyTorch Keras traces it with lengths of 83 and 89."""
    bert = BERT(**{**TINY, "max_length": 12})
    for model in (bert, llmfound.models.Transformer(np.int64(11), 1, 8, 2, 16, max_length=12)):
        inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in model.input_signature()}
        ids = {name: np.array([[5, 6, 7], [8, 9, 0]], "int32") for name in inputs}
        expected = keras.tree.map_structure(ops.convert_to_numpy, model(ids))
        model = keras.Model(inputs, model(inputs))
        model.save(tmp_path / "model.keras")
        assert_close(keras.models.load_model(tmp_path / "model.keras").predict(ids, verbose=0), expected, 1e-5)
        with pytest.raises(ValueError, match="longer than"):
            model({name: np.ones((1, 13), "int32") for name in inputs})


def test_check_model():
    check_model(lambda: BERTClassifier(smaller(), 3), (INPUTS, np.array([0, 2])), expected_shape=(2, 3))


@pytest.mark.parametrize("call, message", [
    (lambda: BERT(**{**TINY, "num_layers": 0}), "Sizes must be positive; got .*'num_layers': 0"),
    (lambda: BERT(**{**TINY, "num_heads": 3}), r"hidden_dim \(16\) must be divisible by num_heads \(3\); try 15 or 18"),
    (lambda: BERTClassifier(keras.Sequential(), 2), "first argument must be a BERT, or another model on one; got"),
    (lambda: BERTClassifier(smaller(), 0), "num_classes must be positive; got 0"),
    (lambda: BERTTokenClassifier(smaller(), 0), "num_classes must be positive; got 0"),
])  # fmt: skip
def test_arguments_that_make_no_sense(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("inputs, message", [
    (dict(token_ids=TOKENS + 30), "token_ids must hold ids from 0 to 39; got 30 to 51"),
    (dict(segment_ids=SEGMENTS + 1), "segment_ids must hold ids from 0 to 1; got 1 to 2"),
    (dict(segment_ids=SEGMENTS[:, :4]), r"segment_ids must have the shape of token_ids, \(2, 8\); got \(2, 4\)"),
    (dict(mask=(TOKENS != 0)[:1]), r"mask must have the shape of token_ids, \(2, 8\); got \(1, 8\)"),
    (dict(mask=np.ones((2, 8))), "mask must hold integers; got float64"),
    (dict(token_ids=np.ones((2, 25), "int32"), segment_ids=np.zeros((2, 25), "int32")),
     r"A text of 25 tokens is longer than the table of positions \(24\); cut it, read it in windows, or build"),
    (dict(attention_mask=TOKENS), "BERT takes token_ids, segment_ids, mask; got attention_mask"),
])  # fmt: skip
def test_inputs_that_make_no_sense(inputs, message):
    bert = BERT(**TINY)
    for call in (bert.predict, bert.predict_on_batch, bert):
        with pytest.raises(ValueError, match=message):
            call({**INPUTS, **inputs})


class Straight(PostLNBlock):
    """A variant: of it all rows are computed."""


class StraightEncoder(BERTEncoder):
    block_class = Straight


PLACES = np.array([[3, 0, 1], [2, 2, 0]], "int32")


@pytest.mark.parametrize("encoder_class", [BERTEncoder, StraightEncoder])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, np.arange(8)[None] < np.array([[6], [3]])])
def test_the_vectors_of_some_places(mask, causal, encoder_class):
    encoder = encoder_class(**TINY, causal=causal)
    whole = ops.convert_to_numpy(encoder(TOKENS, SEGMENTS, mask=mask))
    for built in (encoder, encoder_class.from_config(encoder.get_config())):  # the second is built by the call
        some = built(TOKENS, SEGMENTS, mask=mask, places=PLACES)
        assert getattr(some, "_keras_mask", None) is None
        assert [w.path for w in built.weights] == [w.path for w in encoder.weights]
        built.set_weights(encoder.get_weights())
        some = built(TOKENS, SEGMENTS, mask=mask, places=PLACES)
        assert_close(some, np.take_along_axis(whole, PLACES[..., None], axis=1), 1e-6)


@pytest.mark.parametrize("make, rows", [
    (lambda bert: BERTClassifier(bert, 3), 1), (lambda bert: BERTPretraining(bert, next_sentence=False), 2),
    (BERTPretraining, 3), (BERTMultipleChoice, 1), (lambda bert: BERTTokenClassifier(bert, 3), 8)
])  # fmt: skip
def test_the_last_block_computes_only_what_is_read(make, rows):
    model = make(BERT(**TINY))
    inputs = INPUTS | ({"masked_positions": MASKED} if isinstance(model, BERTPretraining) else {})
    if isinstance(model, BERTMultipleChoice):
        inputs = {name: x[:, None] for name, x in inputs.items()}
    lengths = []
    for block in model.encoder.blocks:
        call = block.feedforward.expand.call
        listen = lambda x, *args, call=call, **kwargs: lengths.append(x.shape[1]) or call(x, *args, **kwargs)  # noqa: E731
        object.__setattr__(block.feedforward.expand, "call", listen)
    found = model({name: ops.convert_to_tensor(x) for name, x in inputs.items()})
    assert lengths == [8, rows]
    with mock.patch.object(PostLNBlock, "row_by_row", lambda self: False):
        expected = model({name: ops.convert_to_tensor(x) for name, x in inputs.items()})
    assert lengths[2:] == [8, 8]
    keras.tree.map_structure(lambda x, y: assert_close(x, y, 1e-6), found, expected)


def test_what_is_left_out_has_no_share_in_the_gradients():
    """One step of gradient descent is the same with the last block's other rows computed and without them."""
    inputs = INPUTS | {"masked_positions": MASKED}
    labels = {"masked_lm": np.array([[4, 8], [30, 6]]), "next_sentence": np.array([0, 1])}
    bert, found = BERT(**TINY), []
    start = bert.get_weights()
    model = BERTPretraining(bert)
    rest = model.get_weights()
    for row_by_row in (True, False):
        bert.set_weights(start), model.set_weights(rest)
        with mock.patch.object(PostLNBlock, "row_by_row", lambda self, known=row_by_row: known):
            model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            model.train_on_batch(inputs, labels)
        found.append(model.get_weights())
    assert max(np.abs(x - y).max() for x, y in zip(found[0], rest)) > 0.01
    for some, every in zip(*found):
        assert_close(some, every, 1e-5)


def test_captured_attention_is_that_of_all_rows():
    model = BERTClassifier(BERT(**TINY), 2)
    captured = llmfound.attention.capture(model, INPUTS)
    assert [x.shape for x in captured.values()] == [(2, 2, 8, 8)] * 2

"""Smoothed cross-entropy: the values of both forms, what counts, and gradients."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.src import backend

from llmfound.training import SmoothedCrossEntropy

LOGITS = np.array([2, 1, 0, -1, 0.5], "float32")


def entropy(smoothing, classes):
    rest = smoothing / (classes - 1)
    return -(1 - smoothing) * np.log(1 - smoothing) - (classes - 1) * rest * np.log(rest)


def value(loss, labels, logits, **kwargs):
    return float(ops.convert_to_numpy(loss(np.array(labels, "int32"), np.array(logits, "float32"), **kwargs)))


def expected_loss(labels, logits, smoothing=0.1, pad_id=0, form="uniform", weights=None):
    """The definition, in NumPy and float64."""
    logits = np.asarray(logits, "float64")
    classes = logits.shape[-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    one_hot = np.eye(classes)[labels]
    rest = smoothing / classes if form == "uniform" else smoothing / (classes - 1)
    target = one_hot * (1 - smoothing) + (rest if form == "uniform" else rest * (1 - one_hot))
    losses = -(target * log_p).sum(-1) - (0 if form == "uniform" else entropy(smoothing, classes))
    real = np.ones_like(losses) if pad_id is None else np.asarray(labels) != pad_id
    return (losses * real * (1 if weights is None else weights)).sum() / max(real.sum(), 1)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 7, (3, 4)).astype("int32")
    labels[0, 2:] = labels[2, 3:] = 0
    return labels, rng.normal(size=(3, 4, 7)).astype("float32")


@pytest.mark.parametrize(
    "smoothing, form, expected",
    [
        (0.1, "uniform", 0.724437940),
        (0.1, "tensor2tensor", 0.761937940 - 0.463712410),
        (0.0, "uniform", 0.574437940),
        (0.0, "tensor2tensor", 0.574437940),
    ],
)
def test_value_of_the_papers_check(smoothing, form, expected):
    loss = SmoothedCrossEntropy(smoothing, pad_id=None, form=form)
    np.testing.assert_allclose(value(loss, [[0]], LOGITS[None, None]), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "classes, form, minimum",
    [
        (5, "tensor2tensor", 0.463712410),
        (5, "uniform", 0.389672921),
        (37000, "tensor2tensor", 1.376947590),
        (37000, "uniform", 1.376913223),
    ],
)
def test_minimum_is_the_entropy_of_the_labels(classes, form, minimum):
    rest = 0.1 / classes if form == "uniform" else 0.1 / (classes - 1)
    target = np.full(classes, rest)
    target[3] = 1 - 0.1 + (rest if form == "uniform" else 0)
    perfect = np.log(target)[None, None].astype("float32")
    loss = SmoothedCrossEntropy(0.1, form=form)
    subtracted = minimum if form == "tensor2tensor" else 0.0
    # float32 sums of 37000 equal terms; torch adds them up one after the other
    rtol = 2e-6 if classes < 1000 else 1e-4 if keras.backend.backend() == "torch" else 1e-5
    np.testing.assert_allclose(value(loss, [[3]], perfect) + subtracted, minimum, rtol=rtol)
    uniform = np.zeros((1, 1, classes))
    np.testing.assert_allclose(value(loss, [[3]], uniform) + subtracted, np.log(classes), rtol=rtol)


@pytest.mark.parametrize("form", ["uniform", "tensor2tensor"])
@pytest.mark.parametrize("pad_id", [0, 5, None])
def test_mean_over_real_tokens(batch, form, pad_id):
    labels, logits = batch
    got = value(SmoothedCrossEntropy(0.1, pad_id, form), labels, logits)
    np.testing.assert_allclose(got, expected_loss(labels, logits, 0.1, pad_id, form), rtol=1e-5)


def test_uniform_form_is_that_of_keras(batch):
    labels, logits = np.maximum(batch[0], 1), batch[1]
    keras_loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    expected = float(ops.convert_to_numpy(keras_loss(np.eye(7, dtype="float32")[labels], logits)))
    np.testing.assert_allclose(value(SmoothedCrossEntropy(0.1), labels, logits), expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["uniform", "tensor2tensor"])
def test_padding_is_ignored_exactly(batch, form):
    labels, logits = batch
    loss = SmoothedCrossEntropy(form=form)
    other = np.where((labels == 0)[..., None], np.float32(1e30), logits)
    assert value(loss, labels, other) == value(loss, labels, logits)


def test_pad_id_outside_the_vocabulary(batch):
    labels, logits = batch
    expected = value(SmoothedCrossEntropy(), labels, logits)
    assert value(SmoothedCrossEntropy(pad_id=-100), np.where(labels == 0, -100, labels), logits) == expected


@pytest.mark.parametrize("form", ["uniform", "tensor2tensor"])
def test_nothing_but_padding_gives_zero(batch, form):
    assert value(SmoothedCrossEntropy(form=form), np.zeros((3, 4)), batch[1]) == 0


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4)])
def test_sample_weight(batch, shape):
    labels, logits = batch
    weights = np.random.default_rng(1).uniform(size=shape).astype("float32")
    got = value(SmoothedCrossEntropy(), labels, logits, sample_weight=weights)
    per_token = weights[:, None] if len(shape) == 1 else weights
    np.testing.assert_allclose(got, expected_loss(labels, logits, weights=per_token), rtol=1e-5)


def test_weights_of_sequences_in_a_square_batch():
    logits = np.random.default_rng(0).normal(size=(2, 2, 5))
    labels = np.array([[1, 2], [3, 4]])
    got = value(SmoothedCrossEntropy(), labels, logits, sample_weight=np.array([1.0, 0.0], "float32"))
    np.testing.assert_allclose(got, expected_loss(labels, logits, weights=np.array([[1.0], [0.0]])), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_weights_beside_a_mask_of_keras(batch, shape):
    labels, logits = batch
    weights = np.arange(1, 1 + np.prod(shape), dtype="float32").reshape(shape)
    given, mask = weights.copy(), np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    logits_with_mask = ops.convert_to_tensor(logits)
    keras.src.backend.set_keras_mask(logits_with_mask, ops.convert_to_tensor(mask))
    got = SmoothedCrossEntropy(pad_id=None)(labels, logits_with_mask, sample_weight=given)
    each = weights[:, None] if len(shape) == 1 else weights
    expected = expected_loss(labels, logits, pad_id=None, weights=each * mask) * mask.size / mask.sum()
    np.testing.assert_allclose(ops.convert_to_numpy(got), expected, rtol=1e-5)
    assert (given == weights).all()


def test_mask_of_keras_counts_as_padding(batch):
    labels, _ = batch
    token_ids = np.array([[3, 4, 0, 0], [1, 0, 0, 0], [2, 2, 5, 6]], "int32")
    inputs = keras.Input((4,), dtype="int32")
    model = keras.Model(inputs, keras.layers.Dense(7)(keras.layers.Embedding(7, 5, mask_zero=True)(inputs)))
    loss = SmoothedCrossEntropy(pad_id=6)
    model.compile("sgd", loss)
    labels[2, 1] = 6
    expected = expected_loss(np.where(token_ids == 0, 6, labels), ops.convert_to_numpy(model(token_ids)), pad_id=6)
    np.testing.assert_allclose(model.evaluate(token_ids, labels, verbose=0), expected, rtol=1e-5)


def gradient(loss, labels, logits):
    """By one step of SGD with rate 1 on a table of logits, which runs on every backend."""
    table = keras.layers.Embedding(labels.size, logits.shape[-1])
    model = keras.Sequential([keras.Input(labels.shape[1:], dtype="int32"), table])
    table.embeddings.assign(logits.reshape(-1, logits.shape[-1]))
    model.compile(keras.optimizers.SGD(1.0), loss)
    model.train_on_batch(np.arange(labels.size, dtype="int32").reshape(labels.shape), labels)
    return logits - ops.convert_to_numpy(table.embeddings).reshape(logits.shape)


@pytest.mark.parametrize("form", ["uniform", "tensor2tensor"])
def test_gradient_is_that_of_finite_differences(batch, form):
    labels, logits = batch
    expected = np.zeros(logits.shape)
    for index in np.ndindex(*logits.shape):
        up, down = logits.astype("float64"), logits.astype("float64")
        up[index] += 1e-4
        down[index] -= 1e-4
        expected[index] = (expected_loss(labels, up, form=form) - expected_loss(labels, down, form=form)) / 2e-4
    got = gradient(SmoothedCrossEntropy(form=form), labels, logits)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert not got[labels == 0].any()


def test_gradient_of_nothing_but_padding_is_zero(batch):
    assert not gradient(SmoothedCrossEntropy(), np.zeros((3, 4), "int32"), batch[1]).any()


def test_mixed_precision_computes_in_float32(batch):
    labels, logits = batch
    half = ops.cast(logits, "bfloat16")
    result = SmoothedCrossEntropy()(labels, half)
    assert keras.backend.standardize_dtype(result.dtype) == "float32"
    exact = expected_loss(labels, ops.convert_to_numpy(ops.cast(half, "float32")))
    np.testing.assert_allclose(float(ops.convert_to_numpy(result)), exact, rtol=1e-5)


def test_fit_under_mixed_bfloat16(batch):
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(7, 8, dtype="mixed_bfloat16"),
            keras.layers.Dense(7, dtype="mixed_bfloat16"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.05), SmoothedCrossEntropy())
    losses = model.fit(batch[0], batch[0], epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


def test_loss_survives_saving(tmp_path):
    loss = SmoothedCrossEntropy(0.2, pad_id=None, form="tensor2tensor", name="tokens")
    copy = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(copy) is SmoothedCrossEntropy and copy.get_config() == loss.get_config()
    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(7, 7)])
    model.compile("sgd", loss)
    model.save(tmp_path / "model.keras")
    batch = np.ones((2, 4), "int32")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(batch, batch, verbose=0) == model.evaluate(batch, batch, verbose=0)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 2])
def test_smoothing_out_of_range(smoothing):
    with pytest.raises(ValueError, match=rf"smoothing must be in \[0, 1\); got {smoothing}"):
        SmoothedCrossEntropy(smoothing)


@pytest.mark.parametrize(
    "loss, labels, logits, match",
    [
        (SmoothedCrossEntropy(), np.ones((2, 3), "float32"), np.ones((2, 3, 4), "float32"), "integer.* got float32"),
        (SmoothedCrossEntropy(), np.ones((2, 3), "int32"), np.ones((2, 3, 4), "int32"), "float; got int32"),
        (SmoothedCrossEntropy(), np.ones((2, 3, 1), "int32"), np.ones((2, 3, 4), "float32"), r"\(2, 3, 1\)"),
        (SmoothedCrossEntropy(), np.ones((2,), "int32"), np.ones((2, 3, 4), "float32"), r"labels \(2,\)"),
        (SmoothedCrossEntropy(), np.ones((2, 4), "int32"), np.ones((2, 3, 4), "float32"), r"labels \(2, 4\)"),
        (
            SmoothedCrossEntropy(0.8, form="tensor2tensor"),
            np.ones((1, 1), "int32"),
            np.ones((1, 1, 2), "float32"),
            "vocabulary of 2",
        ),
    ],
)
def test_wrong_labels_and_logits_are_named(loss, labels, logits, match):
    with pytest.raises(ValueError, match=match):
        loss(labels, logits)


def test_unknown_form():
    with pytest.raises(ValueError, match="'fairseq'"):
        SmoothedCrossEntropy(form="fairseq")


def test_labels_of_replicas_as_keras_traces_them():
    """Of the batches of a tf.distribute.Strategy it takes the mean, to look at shapes, and so makes floats of ids."""
    labels, logits = keras.KerasTensor((3, 4), "float64"), keras.KerasTensor((3, 4, 7), "float32")
    assert backend.compute_output_spec(SmoothedCrossEntropy(0.1), labels, logits).shape == ()
    with pytest.raises(ValueError, match="labels must be integer token ids; got float"):
        SmoothedCrossEntropy(0.1)(np.ones((3, 4)), np.zeros((3, 4, 7), "float32"))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of tf.distribute")
def test_a_replica_has_its_share_of_the_loss(batch, monkeypatch):
    import tensorflow as tf

    alone = value(SmoothedCrossEntropy(0.1), *batch)
    monkeypatch.setattr(tf.distribute.get_strategy(), "_extended", type("Two", (), {"_num_replicas_in_sync": 2})())
    np.testing.assert_allclose(value(SmoothedCrossEntropy(0.1), *batch), alone / 2, rtol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of tf.function")
def test_in_a_tf_function_of_ones_own(batch):
    import tensorflow as tf

    loss = SmoothedCrossEntropy(0.1)
    np.testing.assert_allclose(tf.function(loss)(*batch), value(loss, *batch), rtol=1e-6)

"""Files and copies keep what was done to a model after it was made: frozen, adapted by LoRA, quantized."""

import keras
import numpy as np
import pytest
from marks import another

from llmfound import convert, decoding, layers, models, training
from llmfound.testing import assert_close

pytestmark = pytest.mark.usefixtures("weights_go_quickly")
IDS = np.random.default_rng(0).integers(3, 11, (6, 5)).astype("int32")
PAIR = {"source_ids": IDS, "target_ids": IDS[:, ::-1].copy()}


def bert():
    return models.BERTClassifier(models.BERT(11, 2, 8, 2, 16), 3)


MODELS = {
    "BERTClassifier": (
        bert, IDS, IDS[:, 0] % 3, lambda model: [model.encoder.token_embedding, model.encoder.blocks[0]]
    ),
    "ULMFiTClassifier": (
        lambda: models.ULMFiTClassifier(models.ULMFiT(11, 4, 6, 2), 3, hidden_dim=5, window=4),
        IDS, IDS[:, 0] % 3, lambda model: [model.encoder],
    ),
    "RNNsearch": (lambda: models.RNNsearch(11, 12, 4, 8, 6, 4), PAIR, IDS, lambda model: [model.attention]),
}  # fmt: skip


def compiled(model):
    model.compile(training.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def trained(model):
    return [weight.path.partition("/")[2] for weight in model.trainable_weights]


@pytest.mark.parametrize("name", ["BERTClassifier", another("ULMFiTClassifier"), another("RNNsearch")])
def test_what_is_frozen_stays_so(name, tmp_path):
    make, x, y, parts = MODELS[name]
    model = make()
    for part in parts(model):
        part.trainable = False
    frozen = [weight for part in parts(model) for weight in part.weights]
    before = [keras.ops.convert_to_numpy(weight) for weight in frozen]
    compiled(model).train_on_batch(x, y)
    assert_close([weight.value for weight in frozen], before, tolerance=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for twin in (loaded, keras.models.clone_model(model)):
        assert trained(twin) == trained(model)
        assert [part.trainable for part in twin._flatten_layers()] == [p.trainable for p in model._flatten_layers()]
    assert [v.shape for v in loaded.optimizer.variables] == [v.shape for v in model.optimizer.variables]
    assert_close(loaded.optimizer.variables, model.optimizer.variables, tolerance=0)
    for variable, value in zip(loaded.variables, model.variables):  # files of Keras leave random states out
        variable.assign(keras.ops.convert_to_numpy(value))
    model.reset_metrics()
    expected = float(model.train_on_batch(x, y))
    assert float(loaded.train_on_batch(x, y)) == pytest.approx(expected, rel=1e-5)


def test_a_rate_of_dropout_that_was_changed_stays_so(tmp_path):
    model = bert()
    model.encoder.dropout.rate = model.dropout.rate = 0.0
    model.encoder.blocks[1].attention.dropout.rate = 0.3
    model.save(tmp_path / "model.keras")
    for twin in (keras.saving.load_model(tmp_path / "model.keras"), keras.models.clone_model(model)):
        assert (twin.encoder.dropout.rate, twin.dropout.rate) == (0, 0)
        assert [block.attention.dropout.rate for block in twin.encoder.blocks] == [0.1, 0.3]
        assert len(twin.variables) == len(model.variables)
    dropout = layers.Dropout(0.5)
    dropout.rate = 0.2
    assert layers.Dropout.from_config(dropout.get_config()).rate == 0.2
    with pytest.raises(ValueError, match="at least 0 and below 1; got 1"):
        dropout.rate = 1
    none = layers.Dropout(0.0, name="none")
    with pytest.raises(ValueError, match="none was made with a rate of 0 and draws no masks; make it anew"):
        none.rate = 0.5


def test_a_frozen_part_of_a_layer(tmp_path):
    inputs = keras.Input((5, 8))
    block = layers.PreLNBlock(8, 2, 16)
    model = keras.Model(inputs, block(inputs))
    block.attention.trainable = False
    block.attention.query.trainable = True
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert trained(loaded) == trained(model)
    assert [name.split("/")[1] for name in trained(model) if name.startswith("attention/")] == ["query"]


def adapted():
    model = bert()
    for layer in model.encoder._flatten_layers():
        if isinstance(layer, keras.layers.Dense):
            layer.enable_lora(2)
        elif layer.weights and not layer._layers:
            layer.trainable = False
    return compiled(model)


def test_lora_goes_on_from_a_file_and_is_written_to_hugging_face(tmp_path):
    model = adapted()
    for _ in range(2):
        model.train_on_batch(IDS, IDS[:, 0] % 3)
    expected = model.predict(IDS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(IDS, verbose=0), expected)
    assert trained(loaded) == trained(model) and any("lora" in path for path in trained(model))
    before = loaded.encoder.blocks[0].feedforward.expand.get_weights()
    for _ in range(2):
        loaded.train_on_batch(IDS, IDS[:, 0] % 3)
    kernel, _, first, second = loaded.encoder.blocks[0].feedforward.expand.get_weights()
    assert_close(kernel, before[0], tolerance=0)
    assert second.any() and not (first == before[2]).all()

    convert.to_huggingface(model, tmp_path / "folder")
    written = convert.from_huggingface(tmp_path / "folder")
    assert_close(written.predict(IDS, verbose=0), expected)
    assert len(written.trainable_weights) == len(bert().trainable_weights)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_a_quantized_model_from_a_file(tmp_path):
    model = bert()
    convert.to_huggingface(model, tmp_path / "folder")
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert "int8" in {weight.dtype for weight in loaded.weights}
    assert_close(loaded.predict(IDS, verbose=0), model.predict(IDS, verbose=0))
    before = sorted(path.read_bytes() for path in (tmp_path / "folder").iterdir())
    with pytest.raises(ValueError, match=r"block_./.* is quantized, int8; take the model as it was before"):
        convert.to_huggingface(model, tmp_path / "folder")
    assert sorted(path.read_bytes() for path in (tmp_path / "folder").iterdir()) == before


def quantized(model):
    model.quantize("int8")


def with_lora(model):
    for block in model.decoder_blocks:
        block.feedforward.expand.enable_lora(2)
        block.feedforward.expand.lora_kernel_b.assign(np.ones((2, 16), "float32"))


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("change", (with_lora, quantized))
def test_decoders_see_what_was_done_since(change):
    model, source = models.Transformer(11, 1, 8, 2, 16), PAIR["source_ids"]
    before, _ = decoding.score(model, {"source_ids": source}, IDS)
    change(model)
    found, _ = decoding.score(model, {"source_ids": source}, IDS)
    shifted = np.concatenate([np.ones_like(IDS[:, :1]), IDS[:, :-1]], axis=1)
    logits = model({"source_ids": source, "target_ids": shifted}, training=False)
    logs = keras.ops.convert_to_numpy(keras.ops.log_softmax(logits))
    assert_close(found, np.take_along_axis(logs, IDS[..., None], axis=2)[..., 0], 1e-5)
    assert np.abs(found - before).max() > 1e-3


def test_a_file_that_was_saved_with_other_sublayers():
    model = bert()
    model.encoder.blocks[0].trainable = False
    config = model.get_config()
    place = min(config["changes"], key=int)
    config["changes"][place]["class"] = "PreLNBlock"
    with pytest.raises(ValueError, match=rf"was saved with a PreLNBlock as sublayer {place}; here it is <PostLNBlock"):
        models.BERTClassifier.from_config(config)

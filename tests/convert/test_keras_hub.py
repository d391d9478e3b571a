"""BERT from and to KerasHub: the same numbers as its backbone gives."""

import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from llmfound import models
from llmfound.convert import from_keras_hub, to_keras_hub
from llmfound.convert.keras_hub import keras_hub_name
from llmfound.models import BERT, BERTClassifier, BERTQuestionAnswering
from llmfound.testing import assert_close

TOKENS = np.array([[2, 5, 7, 9, 3, 11, 13, 3], [2, 12, 4, 3, 0, 0, 0, 0]], "int32")
RNG = np.random.default_rng(1)
SEGMENTS = np.array([[0, 0, 0, 0, 0, 1, 1, 1], [0] * 8], "int32")
SHAPES = [
    dict(num_layers=2, hidden_dim=12, num_heads=3, intermediate_dim=20, max_length=9, num_segments=3),
    dict(num_layers=1, hidden_dim=8, num_heads=1, intermediate_dim=8, max_length=8),
    dict(num_layers=3, hidden_dim=8, num_heads=4, intermediate_dim=5, max_length=30),
]


def make(shape, **more):
    model = BERT(20, activation="gelu_tanh", **shape, **more)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape, scale=0.3) + (w.name == "gamma") for w in model.weights])
    return model


def of_hub(backbone):
    inputs = {"token_ids": TOKENS, "segment_ids": SEGMENTS, "padding_mask": (TOKENS != 0).astype("int32")}
    found = backbone.predict(inputs, verbose=0)
    return found["sequence_output"][TOKENS != 0], found["pooled_output"]


def of_ours(model):
    found = model.predict({"token_ids": TOKENS, "segment_ids": SEGMENTS}, verbose=0)
    return found["sequence"][TOKENS != 0], found["pooled"]


@pytest.mark.parametrize("shape", SHAPES, ids=["3 heads", "1 head", "4 heads"])
def test_there_and_back(shape, tmp_path):
    pytest.importorskip("keras_hub")
    model = make(shape)
    backbone = to_keras_hub(model)
    assert_close(of_hub(backbone), of_ours(model), 1e-5)
    backbone.save(tmp_path / "backbone.keras")
    for hub in (backbone, keras.models.load_model(tmp_path / "backbone.keras")):
        again = from_keras_hub(hub)
        assert type(again) is BERT and len(again.conversion.copied) == len(model.weights)
        assert_close(again.get_weights(), model.get_weights(), 0)
        assert_close(of_ours(again), of_ours(model), 0)


def test_another_kind_and_other_precisions():
    pytest.importorskip("keras_hub")
    backbone = to_keras_hub(make(SHAPES[0], dtype="mixed_bfloat16"))
    assert backbone.dtype_policy.name == "mixed_bfloat16"
    with pytest.warns(UserWarning, match=r"BertBackbone 'bert_.*': 39 weights were read; new, .*: classes/bias, class"):
        classifier = from_keras_hub(backbone, BERTClassifier, num_classes=4, dtype="float32")
    assert classifier.classes.units == 4 and classifier.encoder.compute_dtype == "float32"
    with pytest.warns(UserWarning, match="KerasHub's backbone has no place for classes/kernel, classes/bias"):
        again = to_keras_hub(classifier)
    assert_close(again.get_weights(), backbone.get_weights(), 0)


def test_the_exact_gelu_is_told():
    pytest.importorskip("keras_hub")
    with pytest.warns(UserWarning, match="KerasHub's GELU is the tanh form, and this model's the exact one"):
        to_keras_hub(BERT(20, **SHAPES[0]))


class Weight(np.ndarray):
    """An array with a path."""

    def __new__(cls, path, array):
        self = np.asarray(array).view(cls)
        self.path = path
        return self


class BertBackbone:
    """What is read of KerasHub's, so that these tests need it not."""

    name, layers = "backbone", ()

    def __init__(self, shapes):
        rng = np.random.default_rng(0)
        self.arrays = {path: Weight(path, rng.normal(size=shape).astype("float32")) for path, shape in shapes.items()}

    @property
    def weights(self):
        return list(self.arrays.values())

    def _flatten_layers(self):
        return self.layers

    def get_config(self):
        return dict(vocabulary_size=7, num_layers=1, num_heads=2, hidden_dim=4, intermediate_dim=6, dropout=0.1,
                    max_sequence_length=5, num_segments=2)  # fmt: skip


@pytest.fixture
def backbone():
    """Of KerasHub's names and shapes."""
    layer, norms = "transformer_layer_0", ["embeddings_layer_norm"]
    norms += [f"{layer}/self_attention_layer_norm", f"{layer}/feedforward_layer_norm"]
    shapes = {
        "token_embedding/embeddings": (7, 4), "segment_embedding/embeddings": (2, 4),
        "position_embedding/embeddings": (5, 4), "pooled_dense/kernel": (4, 4), "pooled_dense/bias": (4,),
        f"{layer}/self_attention_layer/attention_output/kernel": (2, 2, 4),
        f"{layer}/self_attention_layer/attention_output/bias": (4,),
        f"{layer}/feedforward_intermediate_dense/kernel": (4, 6), f"{layer}/feedforward_intermediate_dense/bias": (6,),
        f"{layer}/feedforward_output_dense/kernel": (6, 4), f"{layer}/feedforward_output_dense/bias": (4,),
    }  # fmt: skip
    for name in ("query", "key", "value"):
        shapes |= {f"{layer}/self_attention_layer/{name}/kernel": (4, 2, 2),
                   f"{layer}/self_attention_layer/{name}/bias": (2, 2)}  # fmt: skip
    return BertBackbone(shapes | {f"{norm}/{weight}": (4,) for norm in norms for weight in ("gamma", "beta")})


def test_every_weight_by_its_name(backbone):
    model = from_keras_hub(backbone)
    for weight in model.weights:
        name = keras_hub_name(weight.path.split("/", 1)[1])
        assert_close(weight, backbone.arrays.pop(name).reshape(weight.shape), 0, name)
    assert not backbone.arrays
    assert model.encoder.dropout.rate == 0.1 and model.encoder.blocks[0].attention.num_heads == 2


def test_what_lora_has_learned_is_read(backbone):
    path = "transformer_layer_0/self_attention_layer/query"
    plain, merged = (np.array(x) for x in (backbone.arrays[f"{path}/kernel"], RNG.normal(size=(4, 2, 2))))
    sides = [Weight(f"{path}/lora_kernel_{side}", np.ones(3)) for side in "ab"]
    backbone.arrays |= {weight.path: weight for weight in sides}
    backbone.layers = [SimpleNamespace(
        path=path, quantization_mode=None, lora_enabled=True, kernel=merged, _kernel=backbone.arrays[f"{path}/kernel"],
        lora_kernel_a=sides[0], lora_kernel_b=sides[1],
    )]  # fmt: skip
    kernel = from_keras_hub(backbone).encoder.blocks[0].attention.query.kernel
    assert_close(kernel, merged.reshape(4, 4), 1e-6)
    assert np.abs(merged - plain).max() > 0.1
    backbone.layers[0].quantization_mode = "int8"
    with pytest.raises(ValueError, match="self_attention_layer/query is quantized, int8; take the model as it was"):
        from_keras_hub(backbone)


def test_lora_of_kerashub():
    pytest.importorskip("keras_hub")
    backbone = to_keras_hub(make(SHAPES[0]))
    backbone.enable_lora(2)
    for weight in backbone.weights:
        if "lora" in weight.path:
            weight.assign(RNG.normal(size=weight.shape))
    assert_close(of_hub(backbone), of_ours(from_keras_hub(backbone)), 1e-5)


def test_weights_that_do_not_fit(backbone):
    backbone.arrays["transformer_layer_0/lora_a"] = Weight("transformer_layer_0/lora_a", np.zeros((4, 2), "float32"))
    for kind in (None, BERT):
        with pytest.raises(ValueError, match=r"transformer_layer_0/lora_a \(4, 2\) is not used"):
            from_keras_hub(backbone, kind)
    del backbone.arrays["transformer_layer_0/lora_a"], backbone.arrays["pooled_dense/bias"]
    with pytest.raises(ValueError, match=r"pooled_dense/bias is missing, for bert.*/pooler/dense/bias"):
        from_keras_hub(backbone)
    with pytest.raises(ValueError, match=r"must be a keras_hub.models.BertBackbone; got BERT"):
        from_keras_hub(make(SHAPES[0]))


@pytest.mark.parametrize("options, message", [
    (dict(activation="relu"), "The backbone has no activation 'relu': its blocks are PostLNBlock with GELU"),
    (dict(causal=True, epsilon=1e-5), "has no causal mask, and no epsilon of 1e-05"),
    (dict(dropout=0.2), r"has no dropouts 0.2 and, of attention, 0.1"),
])  # fmt: skip
def test_models_that_it_cannot_compute(options, message):
    with pytest.raises(ValueError, match=message):
        to_keras_hub(BERT(20, **SHAPES[0], **options))


def test_models_without_a_pooler():
    for model in (BERTQuestionAnswering(make(SHAPES[0])), models.Transformer(11, 1, 8, 2, 16)):
        with pytest.raises(ValueError, match=f"or a model on one with a pooler; got {type(model).__name__}"):
            to_keras_hub(model)


def test_without_kerashub(monkeypatch):
    for name in ("keras_hub", "keras_hub.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"This needs KerasHub: pip install llmfound\[hub\]"):
        to_keras_hub(make(SHAPES[0]))

"""BERT from and to Hugging Face's files: the same numbers as its own library, every tensor accounted for."""

import json
import types
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops
from marks import another
from safetensors.numpy import load_file, save_file

from llmfound import kernels, models, training
from llmfound.convert import from_huggingface, to_huggingface
from llmfound.data import Tokenizer, WordPiece
from llmfound.layers import PreLNBlock
from llmfound.testing import assert_close, fixture

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"]
SIZES = dict(vocab_size=40, num_layers=2, hidden_dim=16, num_heads=2, intermediate_dim=32, max_length=24)
SHAPES = [
    dict(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12),
    dict(vocab_size=41, hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20,
         max_position_embeddings=33, type_vocab_size=3, hidden_act="gelu_new", layer_norm_eps=1e-5),
]  # fmt: skip
TOKENS = np.array([[2, 5, 7, 9, 3, 11, 13, 3], [2, 21, 4, 3, 0, 0, 0, 0]], "int32")
SEGMENTS = np.array([[0, 0, 0, 0, 0, 1, 1, 1], [0] * 8], "int32")
MASKED = np.tile(np.arange(8, dtype="int32"), (2, 1))
HEADS = {
    "BertModel": models.BERT, "BertForPreTraining": models.BERTPretraining, "BertForMaskedLM": models.BERTPretraining,
    "BertForSequenceClassification": models.BERTClassifier, "BertForTokenClassification": models.BERTTokenClassifier,
    "BertForQuestionAnswering": models.BERTQuestionAnswering, "BertForMultipleChoice": models.BERTMultipleChoice,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights were read")
        yield


def small(kind=models.BERT, *arguments, **options):
    bert = models.BERT(**SIZES, **options)
    return bert if kind is models.BERT else kind(bert, *arguments)


def outputs(model):
    """Every output of ours, in order of its name; and where it is not padding."""
    inputs = {"token_ids": TOKENS, "segment_ids": SEGMENTS}
    if isinstance(model, models.BERTPretraining):
        inputs["masked_positions"] = MASKED
    if isinstance(model, models.BERTMultipleChoice):
        inputs = {name: np.stack([x, x[::-1]], axis=1) for name, x in inputs.items()}
    found = model.predict_on_batch(inputs)
    return [found[name] for name in sorted(found)] if isinstance(found, dict) else [found]


def of_transformers(name, model):
    """The same of a model of transformers: list of arrays."""
    torch = pytest.importorskip("torch")
    ids, segments = torch.from_numpy(TOKENS).long(), torch.from_numpy(SEGMENTS).long()
    if name == "BertForMultipleChoice":
        ids, segments = (torch.stack([x, x.flip(0)], dim=1) for x in (ids, segments))
    with torch.no_grad():
        found = model.eval()(ids, attention_mask=ids != 0, token_type_ids=segments)
    if name == "BertModel":
        return [found.pooler_output.numpy(), found.last_hidden_state.numpy()]
    if name == "BertForPreTraining":
        return [found.prediction_logits.numpy(), found.seq_relationship_logits.numpy()]
    if name == "BertForQuestionAnswering":
        return [np.stack([found.start_logits.numpy(), found.end_logits.numpy()], axis=1)]
    return [found.logits.numpy()]


def theirs(name, shape, **more):
    """A model of transformers with random weights, biases and norms included."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = transformers.BertConfig(**shape, **more)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def assert_equal(found, expected):
    for ours, other in zip(found, expected, strict=True):
        real = TOKENS != 0
        if ours.shape[:2] == TOKENS.shape:
            ours, other = ours[real], other[real]
        assert_close(ours, other, 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=["one layer", "three layers"])
@pytest.mark.parametrize("name", HEADS)
def test_parity_with_transformers_in_both_directions(name, shape, tmp_path):
    more = dict(num_labels=3) if "Classification" in name else {}
    model = theirs(name, shape, **more)
    model.save_pretrained(tmp_path / "theirs")
    ours = from_huggingface(tmp_path / "theirs")
    assert type(ours) is HEADS[name] and not ours.conversion.new and not ours.conversion.left
    assert len(ours.conversion.copied) == len(ours.weights)
    expected = of_transformers(name, model)
    assert_equal(outputs(ours), expected)
    to_huggingface(ours, tmp_path / "ours")
    again, told = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    assert_equal(of_transformers(name, again), expected)
    assert again.config.num_labels == model.config.num_labels
    assert again.config.hidden_act == shape.get("hidden_act", "gelu")


def test_fine_tuning_takes_the_steps_of_pytorch_and_transformers(tmp_path):
    """AdamW with warm-up and clipping, biases and norms without decay; dropout, whose masks would differ, is off."""
    plain = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    other, torch = (
        theirs("BertForSequenceClassification", SHAPES[0], num_labels=3, **plain),
        pytest.importorskip("torch"),
    )
    other.save_pretrained(tmp_path)
    ours, labels, rate = from_huggingface(tmp_path), np.array([2, 0]), training.LinearWarmupDecay(1e-2, 2, 8)
    ours.compile(
        training.AdamW(rate, weight_decay=0.1, epsilon=1e-6, exclude=["bias", "gamma", "beta"], global_clipnorm=0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    decay = {True: [], False: []}
    for name, parameter in other.named_parameters():
        decay["bias" not in name and "LayerNorm" not in name].append(parameter)
    groups = [dict(params=decay[True], weight_decay=0.1), dict(params=decay[False], weight_decay=0.0)]
    optimizer, losses, expected = torch.optim.AdamW(groups), [], []
    ids, segments = torch.from_numpy(TOKENS).long(), torch.from_numpy(SEGMENTS).long()
    for step in range(8):
        ours.reset_metrics()
        losses.append(float(ours.train_on_batch({"token_ids": TOKENS, "segment_ids": SEGMENTS}, labels)))
        for group in optimizer.param_groups:  # Keras adds epsilon ahead of the bias correction, PyTorch behind it
            group.update(lr=float(rate(step)), eps=1e-6 / (1 - 0.999 ** (step + 1)) ** 0.5)
        logits = other.train()(ids, attention_mask=ids != 0, token_type_ids=segments).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        expected.append(loss.item())
    assert expected[-1] < expected[0] - 0.1
    assert_close(np.array(losses), np.array(expected), 1e-5)
    assert_equal(outputs(ours), of_transformers("BertForSequenceClassification", other))


@pytest.mark.parametrize("kind, arguments", [
    (models.BERT, ()), (models.BERTPretraining, ()), another(models.BERTPretraining, (False,)),
    another(models.BERTClassifier, (3,)), another(models.BERTClassifier, (1,)),
    another(models.BERTTokenClassifier, (5,)), another(models.BERTQuestionAnswering, ()),
    another(models.BERTMultipleChoice, ()),
])  # fmt: skip
def test_there_and_back_is_the_same(kind, arguments, tmp_path):
    model = small(kind, *arguments, activation="gelu_tanh", epsilon=1e-6, dropout=0.2)
    to_huggingface(model, tmp_path, WordPiece.from_vocabulary(VOCABULARY))
    again = from_huggingface(tmp_path)
    assert type(again) is kind and [w.shape for w in again.weights] == [w.shape for w in model.weights]
    assert_close(again.get_weights(), model.get_weights(), 0)
    assert_close(outputs(again), outputs(model), 0)
    assert again.encoder.get_config()["epsilon"] == 1e-6 and again.encoder.dropout.rate == 0.2
    assert WordPiece.load(tmp_path).vocabulary == VOCABULARY
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.on_one_backend
def test_labels_are_written(tmp_path):
    to_huggingface(small(models.BERTClassifier, 2), tmp_path, id2label={0: "bad", 1: "good"}, finetuning_task="sst2")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"} and config["label2id"] == {"bad": 0, "good": 1}
    assert config["finetuning_task"] == "sst2" and config["architectures"] == ["BertForSequenceClassification"]
    to_huggingface(from_huggingface(tmp_path), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["id2label"] == {"0": "bad", "1": "good"}
    to_huggingface(small(models.BERTClassifier, 1), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == "regression"


@pytest.mark.on_one_backend
def test_labels_stand_by_their_numbers(tmp_path):
    names = {str(i): f"class {i}" for i in range(12)}
    mixed = {str(i): names[str(i)] for i in sorted(range(12), key=str)}  # 0, 1, 10, 11, 2, as many files have them
    to_huggingface(small(models.BERTClassifier, 12), tmp_path, id2label=mixed)
    config = json.loads((tmp_path / "config.json").read_text())
    assert list(config["id2label"].items()) == list(names.items())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": mixed}))
    model = from_huggingface(tmp_path)
    assert list(model.conversion.labels.items()) == list(names.items())
    to_huggingface(model, tmp_path / "again", id2label=model.conversion.labels)


@pytest.mark.on_one_backend
def test_a_folder_stays_as_it_is_if_the_weights_or_the_config_cannot_be_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("the disk is full")

    to_huggingface(small(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError, match="not JSON serializable"):
        to_huggingface(small(models.BERTClassifier, 1), tmp_path, id2label={0: np.int64(5)})
    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="full"):
        to_huggingface(small(models.BERTClassifier, 1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("classes, problem_type", [(3, "multi_label_classification"), (1, None), (1, "regression")])
@pytest.mark.on_one_backend
def test_what_a_checkpoint_told_of_its_classes_is_written_again(tmp_path, classes, problem_type):
    names = {str(i): name for i, name in enumerate(["toxic", "insult", "threat"][:classes])}
    to_huggingface(small(models.BERTClassifier, classes), tmp_path / "a", id2label=names, problem_type=problem_type)
    model = from_huggingface(tmp_path / "a", models.BERTClassifier)
    model.save(tmp_path / "model.keras")
    for i, again in enumerate(
        (model, keras.models.load_model(tmp_path / "model.keras"), keras.models.clone_model(model))
    ):
        to_huggingface(again, tmp_path / str(i))
        config = json.loads((tmp_path / str(i) / "config.json").read_text())
        assert config["id2label"] == names and config.get("problem_type") == problem_type


class PoolsAnother(models.BERTClassifier):
    def pool(self, inputs, training=None):
        return self.encode(inputs, training)[:, 1]


class EmbedsTwice(models.BERTEncoder):
    def embed(self, *args, **kwargs):
        return 2 * super().embed(*args, **kwargs)


@pytest.mark.on_one_backend
def test_what_computes_in_another_way_is_not_written_as_the_same(tmp_path):
    with pytest.raises(ValueError, match="PoolsAnother has its own pool: written as a BERTClassifier"):
        to_huggingface(small(PoolsAnother, 3), tmp_path / "new")
    model = models.BERTQuestionAnswering(EmbedsTwice(40, 1, 16, 2, 32, max_length=24))
    with pytest.raises(ValueError, match="EmbedsTwice has its own embed: written as a BERTEncoder"):
        to_huggingface(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Files as they are found


def test_check_2_published_numbers_from_a_file(tmp_path):
    model = small(models.BERTPretraining)
    to_huggingface(model, tmp_path)

    def published(tensors):
        return {name: fixture(name, x.shape, norm_scale="LayerNorm.weight" in name).astype("float32")
                for name, x in tensors.items()}  # fmt: skip

    rewrite(tmp_path, published)
    found = outputs(from_huggingface(tmp_path))  # masked_lm, next_sentence
    assert_close(found[0][0, 1, :4], np.array([-1.566828, 0.308941, -2.140584, -0.931315]), 5e-6)
    assert_close(found[1], np.array([[0.830324, -0.305577], [0.202806, -0.557814]]), 3e-6)


def rewrite(folder, edit=lambda tensors: tensors, **config):
    """Other tensors, and other entries of config.json, None for none."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = json.loads((folder / "config.json").read_text()) | config
    found = {name: value for name, value in found.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(found))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of BERT with the heads of pre-training."""
    to_huggingface(small(models.BERTPretraining), tmp_path)
    return tmp_path


@pytest.mark.on_one_backend
def test_old_names_and_copies(folder):
    expected = outputs(from_huggingface(folder))

    def old(tensors):
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].copy()
        tensors["bert.embeddings.position_ids"] = np.arange(24)[None]
        return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
                for name, x in tensors.items()}  # fmt: skip

    rewrite(folder, old, architectures=["BertForMaskedLM"])  # as that of bert-base-uncased, which has all heads
    assert_close(outputs(from_huggingface(folder)), expected, 0)
    rewrite(folder, lambda t: t | {"cls.predictions.decoder.weight": t["cls.predictions.decoder.weight"] + 1})
    with pytest.raises(ValueError, match=r"decoder.weight and embeddings.word_embeddings.weight differ; .*. With"):
        from_huggingface(folder)
    with pytest.raises(ValueError, match=r"differ; here they are one weight\.$"):
        from_huggingface(folder, models.BERTPretraining)
    with pytest.warns(UserWarning, match=r"left out .*predictions.decoder.weight \(40, 16\)"):
        assert type(from_huggingface(folder, models.BERT)) is models.BERT


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float64"])
@pytest.mark.on_one_backend
def test_other_dtypes(folder, dtype):
    before = from_huggingface(folder).get_weights()
    rewrite(folder, lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()})
    model = from_huggingface(folder)
    assert {w.dtype for w in model.weights} == {"float32"}
    assert_close(model.get_weights(), before, 1e-7 if dtype == "float64" else 1e-2)


@pytest.mark.on_one_backend
def test_a_dtype_that_is_too_small(folder):
    path = folder / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ValueError, match=r"safetensors: a is F8_E4M3, and weights must be of float16, bfloat16 or"):
        from_huggingface(folder)


def test_a_policy_of_its_own(folder):
    model = from_huggingface(folder, dtype="mixed_bfloat16")
    assert model.encoder.compute_dtype == "bfloat16" and model.encoder.embeddings.dtype == "float32"


@pytest.mark.on_one_backend
def test_weights_in_parts(folder):
    before, tensors = from_huggingface(folder).get_weights(), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for part, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / part)
    index = {"weight_map": {name: part for part, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_close(from_huggingface(folder).get_weights(), before, 0)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors does not exist; the folder has"):
        from_huggingface(folder)
    for wrong in ({}, {"weight_map": ["x"]}, {"weight_map": {"x": 1}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"index.json has no weight_map from tensors to files"):
            from_huggingface(folder)


@pytest.mark.on_one_backend
def test_the_recipe_for_a_file_of_pytorch(folder):
    torch, of_torch = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    before, tensors = from_huggingface(folder).get_weights(), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors = {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"Of a pytorch_model.bin, PyTorch's users make it by") as error:
        from_huggingface(folder)
    lines = "\n".join(line.strip() for line in str(error.value).splitlines()[1:])
    for name in ("pytorch_model.bin", "model.safetensors"):
        lines = lines.replace(f"'{name}'", repr(str(folder / name)))
    exec(lines, {"torch": torch, "safetensors": types.SimpleNamespace(torch=of_torch)})
    assert_close(from_huggingface(folder).get_weights(), before, 0)


@pytest.mark.on_one_backend
def test_another_kind_leaves_heads_out_and_tells(folder):
    with pytest.warns(UserWarning, match=r"left out of the checkpoint: .*cls.seq_relationship.weight \(2, 16\)"):
        bert = from_huggingface(folder, models.BERT)
    assert type(bert) is models.BERT and len(bert.conversion.left) == 7 and not bert.conversion.new
    with pytest.warns(UserWarning, match=r"new, not in the checkpoint: classes/bias, classes/kernel; left out"):
        classifier = from_huggingface(folder, models.BERTClassifier, num_classes=4)
    assert classifier.classes.units == 4 and classifier.conversion.new == ["classes/bias", "classes/kernel"]
    assert "pooler/dense/kernel" in classifier.conversion.copied
    kernel = ops.convert_to_numpy(classifier.classes.kernel)
    assert kernel.std() > 0.005  # as it was initialised
    with pytest.raises(ValueError, match="no classifier; give num_classes for a new BERTClassifier"):
        from_huggingface(folder, models.BERTClassifier)


@pytest.mark.on_one_backend
def test_the_head_of_another_kind_is_not_taken_for_its_own(tmp_path):
    to_huggingface(small(models.BERTClassifier, 3), tmp_path)
    with pytest.raises(ValueError, match="no classifier; give num_classes for a new BERTTokenClassifier"):
        from_huggingface(tmp_path, models.BERTTokenClassifier)
    with pytest.warns(UserWarning, match=r"classes/kernel; left .*classifier.weight of BERTClassifier \(3, 16\)"):
        assert from_huggingface(tmp_path, models.BERTTokenClassifier, num_classes=5).classes.units == 5
    assert not from_huggingface(tmp_path, type("Mine", (models.BERTClassifier,), {})).conversion.new


@pytest.mark.on_one_backend
def test_half_a_head_is_none(folder):
    rewrite(folder, lambda t: {name: x for name, x in t.items() if name != "bert.pooler.dense.bias"})
    with pytest.raises(ValueError, match=r"pooler.dense.bias is missing, for bert_?\d*/pooler/dense/bias \(16,\)"):
        from_huggingface(folder, models.BERT)


def test_no_number_is_drawn_that_the_checkpoint_sets(folder, monkeypatch):
    drawn, draw = [], kernels.truncated_normal
    monkeypatch.setattr(kernels, "truncated_normal", lambda shape, *rest: drawn.append(shape) or draw(shape, *rest))
    with pytest.warns(UserWarning, match="new, not in the checkpoint: classes/bias, classes/kernel"):
        from_huggingface(folder, models.BERTClassifier, num_classes=3)
    assert {tuple(shape) for shape in drawn} == {(16, 3)}


@pytest.mark.on_one_backend
def test_an_encoder_without_a_pooler(tmp_path):
    to_huggingface(small(models.BERTQuestionAnswering), tmp_path)
    with pytest.warns(UserWarning, match="new, not in the checkpoint: pooler/dense/bias, pooler/dense/kernel"):
        bert = from_huggingface(tmp_path, models.BERT)
    assert bert.conversion.left == ["qa_outputs.bias (2,)", "qa_outputs.weight (2, 16)"]
    assert 0.01 < np.std(ops.convert_to_numpy(bert.pooler.dense.kernel)) < 0.03  # as in any new model


@pytest.mark.parametrize("kind, arguments", [
    (models.BERTQuestionAnswering, ()), another(models.BERTTokenClassifier, (3,)),
    another(models.BERTPretraining, (False,)),
])  # fmt: skip
@pytest.mark.on_one_backend
def test_a_pooler_that_the_head_has_no_use_for_is_left_out(tmp_path, kind, arguments):
    model = small(kind, *arguments)
    to_huggingface(model, tmp_path)
    pooler = {
        "bert.pooler.dense.weight": np.ones((16, 16), "float32"),
        "bert.pooler.dense.bias": np.ones(16, "float32"),
    }
    rewrite(tmp_path, lambda tensors: tensors | pooler)
    with pytest.warns(UserWarning, match=r"read; left out of the checkpoint: pooler.dense.bias \(16,\), pooler.de"):
        again = from_huggingface(tmp_path)
    assert type(again) is kind and not again.conversion.new and len(again.conversion.left) == 2
    assert_close(again.get_weights(), model.get_weights(), 0)


@pytest.mark.on_one_backend
def test_what_a_kind_would_leave_out_is_told(folder):
    advice = r"\. With kind=\.\.\., such as kind=llmfound.models.BERT, heads of other kinds are left out\.$"
    rewrite(folder, lambda t: {name: x for name, x in t.items() if "predictions" not in name})
    with pytest.raises(ValueError, match=r"cls.predictions.bias is missing, for .*" + advice):
        from_huggingface(folder)
    with pytest.warns(UserWarning, match=r"left out of the checkpoint: cls.seq_relationship.bias \(2,\)"):
        assert type(from_huggingface(folder, models.BERT)) is models.BERT
    rewrite(folder, lambda t: {name: x for name, x in t.items() if "cls" not in name} | {"crf": np.ones(2, "float32")})
    with pytest.raises(ValueError, match=r"crf \(2,\) is not used" + advice):
        from_huggingface(folder)
    rewrite(folder, lambda t: {name: x for name, x in t.items() if name not in ("crf", "bert.pooler.dense.bias")})
    with pytest.raises(ValueError, match=r"pooler.dense.bias is missing, for [^.]*\.$"):  # which no kind would mend
        from_huggingface(folder)


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"),
     r"encoder.layer.1.output.dense.bias is missing, for bert_?\d*/encoder/block_1/feedforward/contract/bias \(16,\)"),
    (lambda t: t.update(extra=np.zeros(3, "float32")), r"extra \(3,\) is not used"),
    (lambda t: t.update({"bert.encoder.layer.2.output.dense.bias": np.zeros(3, "float32")}),
     r"encoder.layer.2.output.dense.bias \(3,\) is not used"),
    (lambda t: t.update({"cls.predictions.bias": np.zeros(41, "float32")}),
     r"masked_lm/bias is \(40,\), which cls.predictions.bias \(41,\) does not fit"),
    (lambda t: t.update({"bert.embeddings.word_embeddings.weight": np.zeros((39, 16), "float32")}),
     r"vocab_size is 40, and embeddings.word_embeddings.weight is \(39, 16\)"),
    (lambda t: t.update({"embeddings.LayerNorm.weight": np.zeros(16, "float32")}), "LayerNorm.weight is there twice"),
    (lambda t: t.update({"bert.pooler.dense.bias": np.zeros(16, "int8")}), r"real numbers, and pooler.*bias is int8"),
])  # fmt: skip
@pytest.mark.on_one_backend
def test_tensors_that_do_not_fit(folder, edit, message):
    def edited(tensors):
        edit(tensors)
        return tensors

    rewrite(folder, edited)
    with pytest.raises(ValueError, match=message):
        from_huggingface(folder)


@pytest.mark.parametrize("config, message", [
    (dict(model_type="roberta"), "is of a 'roberta' model, not 'bert'"),
    (dict(hidden_size=None, vocab_size=None), "lacks vocab_size, hidden_size"),
    (dict(hidden_act="mish"), "hidden_act must be one of gelu, .*; got 'mish'"),
    (dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
    (dict(is_decoder=True, add_cross_attention=True), "no cross-attention can be had; got .*add_cross_attention=True"),
    (dict(vocab_size=10**12), r"vocab_size is 1000000000000, and embeddings.word_embeddings.weight is \(40, 16\)"),
    (dict(num_hidden_layers=10**9), r"is 1000000000, and encoder.layer.999999999.attention.self.query.weight is missi"),
    (dict(num_hidden_layers=1), r"encoder.layer.1.attention.output.LayerNorm.bias \(16,\) is not used"),
    (dict(hidden_size="16"), "hidden_size must be of the kind of 1; got '16'"),
    (dict(hidden_dropout_prob=[0.1]), r"hidden_dropout_prob must be of the kind of 0.1; got \[0.1\]"),
    (dict(hidden_act=["gelu"]), r"hidden_act must be one of gelu, .*; got \['gelu'\]"),
    (dict(classifier_dropout="0.1"), "classifier_dropout must be a number or null; got '0.1'"),
    (dict(id2label=["bad", "good"]), r"id2label must be an object; got \['bad', 'good'\]"),
])  # fmt: skip
@pytest.mark.on_one_backend
def test_configs_that_cannot_be(folder, config, message):
    rewrite(folder, **config)
    with pytest.raises(ValueError, match=message):
        from_huggingface(folder)


@pytest.mark.on_one_backend
def test_what_a_config_does_not_tell_or_has_as_null_is_usual(folder):
    expected, path = outputs(from_huggingface(folder)), folder / "config.json"
    config = json.loads(path.read_text())
    usual = ["model_type", "position_embedding_type", "add_cross_attention", "id2label", "classifier_dropout",
             "pad_token_id", "hidden_act", "is_decoder", "type_vocab_size", "layer_norm_eps"]  # fmt: skip
    for other in ({k: v for k, v in config.items() if k not in usual}, config | dict.fromkeys(usual)):
        path.write_text(json.dumps(other))
        assert_close(outputs(from_huggingface(folder)), expected, tolerance=0)


@pytest.mark.parametrize("kind", ["BERT", 3])
@pytest.mark.on_one_backend
def test_a_kind_that_is_no_class(folder, kind):
    with pytest.raises(ValueError, match=rf"kind must be a class: llmfound.models.BERT, .*; got {kind!r}\."):
        from_huggingface(folder, kind)


@pytest.mark.on_one_backend
def test_files_that_are_missing_or_damaged(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for content in (whole[:-5], whole[:100], b"", b"not one"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors is damaged, or no safetensors file: "):
            from_huggingface(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"does not exist; the folder has config.json. Of a pytorch_model.bin"):
        from_huggingface(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        from_huggingface(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json holds no JSON object, but \[\]"):
        from_huggingface(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist; the folder has nothing"):
        from_huggingface(folder)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        from_huggingface(folder / "none")


@pytest.mark.on_one_backend
def test_a_classifier_of_other_classes(tmp_path):
    to_huggingface(small(models.BERTClassifier, 3), tmp_path)
    with pytest.raises(
        ValueError, match=r"is \(3, 16\); got num_classes=2\. For a new one, .* a BERTClassifier of that"
    ):
        from_huggingface(tmp_path, models.BERTClassifier, num_classes=2)
    assert from_huggingface(tmp_path, models.BERTClassifier, num_classes=3).classes.units == 3


@pytest.mark.on_one_backend
def test_a_classifier_of_unknown_kind(tmp_path):
    to_huggingface(small(models.BERTClassifier, 2), tmp_path)
    rewrite(tmp_path, architectures=None)
    with pytest.raises(ValueError, match="architectures do not tell of what; give kind=BERTClassifier, BERTTok"):
        from_huggingface(tmp_path)
    assert from_huggingface(tmp_path, models.BERTClassifier).classes.units == 2


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Transformer is none of BERT, BERTPretraining"):
        to_huggingface(models.Transformer(11, 1, 8, 2, 16), tmp_path)
    with pytest.raises(ValueError, match="The activation 'selu' has no name there"):
        to_huggingface(small(activation="selu"), tmp_path)
    large = WordPiece.from_vocabulary([*VOCABULARY, *(f"w{i}" for i in range(40))])
    with pytest.raises(ValueError, match="The tokenizer has 48 pieces, and the model 40"):
        to_huggingface(small(), tmp_path, large)
    for other in ("bert-base-uncased", Tokenizer.train(["a"], 300)):
        with pytest.raises(ValueError, match=r"tokenizer must be a WordPiece, .*; got '(bert-|Tokenizer\()"):
            to_huggingface(small(), tmp_path, other)
    with pytest.raises(ValueError, match=r"id2label must name the classes 0 to 2; got \{0: 'no', 1: 'yes'\}"):
        to_huggingface(small(models.BERTClassifier, 3), tmp_path, id2label={0: "no", 1: "yes"})
    for labels in (["no", "yes"], {"no": 0, "yes": 1}):
        with pytest.raises(ValueError, match=r"id2label must be a dict of numbers and names, .*got .*no"):
            to_huggingface(small(models.BERTClassifier, 2), tmp_path, id2label=labels)
    monkeypatch.setattr(models.BERTEncoder, "block_class", PreLNBlock)
    other = small()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has blocks like PostLNBlock with .*; this model's are PreLNBlock with"):
        to_huggingface(other, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.on_one_backend
def test_a_subclass_is_written_as_what_it_is(tmp_path):
    class Mine(models.BERTClassifier):
        pass

    to_huggingface(Mine(small(), 2), tmp_path)
    assert type(from_huggingface(tmp_path)) is models.BERTClassifier
    assert type(from_huggingface(tmp_path, Mine)) is Mine


@pytest.mark.parametrize("told", [None, 4])
def test_padding_that_the_config_does_not_tell_is_that_of_the_vocabulary(tmp_path, told):
    vocabulary = ["[MASK]", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##c"]
    tokenizer = WordPiece.from_vocabulary(vocabulary)
    to_huggingface(small(pad_id=1), tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("pad_token_id")
    (tmp_path / "config.json").write_text(json.dumps(config | ({} if told is None else {"pad_token_id": told})))
    for name in ("tokenizer.json", "vocab.txt"):
        assert from_huggingface(tmp_path).pad_id == (1 if told is None else told)
        (tmp_path / name).unlink()
    assert from_huggingface(tmp_path).pad_id == (told or 0)
    with pytest.raises(ValueError, match="The tokenizer's padding is piece 1, and the model's pad_id 0"):
        to_huggingface(small(), tmp_path, tokenizer)

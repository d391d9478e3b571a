"""Checkpoints of BERT's authors, read without TensorFlow. google/ is one that TensorFlow wrote, of numbers anyone can
compute again: two layers, with both heads, and some of what the optimizer keeps."""

import json
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

from llmfound import models
from llmfound.convert import bert, bundle, from_google, from_huggingface, to_huggingface
from llmfound.convert.google import google_name
from llmfound.testing import assert_close, fixture

GOLDEN = Path(__file__).parent / "google"
TOKENS = np.array([[2, 5, 7, 9, 3, 11, 4, 3], [2, 8, 4, 3, 0, 0, 0, 0]], "int32")
SEGMENTS = np.array([[0, 0, 0, 0, 0, 1, 1, 1], [0] * 8], "int32")


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "google"))


def write_bundle(prefix, tensors, block=40, **entry):
    """A checkpoint as TensorFlow writes it, in small blocks; `entry` are more fields of that of the tensor "a"."""
    data, index, handles = b"", b"", []

    def varint(n):
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    def field(number, value):
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    def add(items):
        """One block, with the place where each key differs from that before; what tells where it stands."""
        nonlocal index
        body, last = b"", b""
        for key, value in items:
            shared = next((i for i, (a, b) in enumerate(zip(key, last)) if a != b), min(len(key), len(last)))
            body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            last = key
        body += struct.pack("<II", 0, 1)
        handle = varint(len(index)) + varint(len(body))
        index += body + b"\0" + struct.pack("<I", bundle.masked(bundle.crc32c(body + b"\0")))
        return handle

    items = [(b"", field(1, 1) + field(3, field(1, 1)))]
    for name in sorted(tensors):
        array = tensors[name]
        shape = b"".join(field(2, field(1, n)) for n in array.shape)
        number = next(n for n, dtype in bundle.DTYPES.items() if dtype == array.dtype.name)
        fields = {1: number, 2: shape, 4: len(data), 5: array.nbytes}
        fields |= {int(key.removeprefix("field")): value for key, value in entry.items()} if name == "a" else {}
        sum_ = struct.pack("<I", bundle.masked(bundle.crc32c(array.tobytes())))
        items.append((name.encode("latin-1"), b"".join(field(*f) for f in fields.items()) + varint(6 << 3 | 5) + sum_))
        data += array.tobytes()
    handles = [(items[i : i + block][-1][0], add(items[i : i + block])) for i in range(0, len(items), block)]
    ends = add([]) + add(handles)
    index += ends.ljust(40, b"\0") + struct.pack("<Q", bundle.MAGIC)
    Path(f"{prefix}.index").write_bytes(index)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)


def rewrite(folder, edit):
    tensors = bundle.read_bundle(folder / "bert_model.ckpt")
    edit(tensors)
    write_bundle(folder / "bert_model.ckpt", tensors)


def value(name, shape):
    return fixture(name, shape, norm_scale=name.endswith("gamma")).astype("float32")


def outputs(model):
    inputs = {"token_ids": TOKENS, "segment_ids": SEGMENTS, "masked_positions": TOKENS % 8}
    return model.predict_on_batch({name: x for name, x in inputs.items() if name in model.input_signature()
                                   or name in model.optional_inputs()})  # fmt: skip


def test_every_weight_of_tensorflows_file():
    model = from_google(GOLDEN)
    assert type(model) is models.BERTPretraining and len(model.conversion.copied) == len(model.weights) == 46
    assert not model.conversion.new and not model.conversion.left
    for path, weight in bert.paths(model).items():
        name, turned = google_name(path), path == "next_sentence/kernel"
        expected = value(name, tuple(weight.shape)[::-1] if turned else tuple(weight.shape))
        assert_close(weight, expected.T if turned else expected, 0, name)
    encoder = model.encoder
    assert encoder.get_config()["activation"] == "gelu_tanh" or encoder.activation.__name__ == "gelu_tanh"
    assert encoder.blocks[0].attention.num_heads == 2 and encoder.epsilon == 1e-12


def test_the_names_are_the_published_ones():
    names = {
        "encoder/token_embedding/embeddings": "bert/embeddings/word_embeddings",
        "encoder/position_embedding/embeddings": "bert/embeddings/position_embeddings",
        "encoder/segment_embedding/embeddings": "bert/embeddings/token_type_embeddings",
        "encoder/embedding_norm/gamma": "bert/embeddings/LayerNorm/gamma",
        "encoder/block_11/attention/key/kernel": "bert/encoder/layer_11/attention/self/key/kernel",
        "encoder/block_0/attention/output/bias": "bert/encoder/layer_0/attention/output/dense/bias",
        "encoder/block_0/attention_norm/beta": "bert/encoder/layer_0/attention/output/LayerNorm/beta",
        "encoder/block_0/feedforward/expand/kernel": "bert/encoder/layer_0/intermediate/dense/kernel",
        "encoder/block_0/feedforward/contract/kernel": "bert/encoder/layer_0/output/dense/kernel",
        "encoder/block_0/feedforward_norm/gamma": "bert/encoder/layer_0/output/LayerNorm/gamma",
        "pooler/dense/kernel": "bert/pooler/dense/kernel",
        "masked_lm/dense/kernel": "cls/predictions/transform/dense/kernel",
        "masked_lm/norm/beta": "cls/predictions/transform/LayerNorm/beta",
        "masked_lm/bias": "cls/predictions/output_bias", "next_sentence/bias": "cls/seq_relationship/output_bias",
        "next_sentence/kernel": "cls/seq_relationship/output_weights", "classes/kernel": "output_weights",
        "classes/bias": "output_bias", "span/kernel": "cls/squad/output_weights", "span/bias": "cls/squad/output_bias",
    }  # fmt: skip
    assert {path: google_name(path) for path in names} == names


def test_check_9_from_google_to_hugging_face_and_back_is_the_identity(tmp_path):
    model = from_google(GOLDEN / "bert_model.ckpt")
    to_huggingface(model, tmp_path)
    again = from_huggingface(tmp_path)
    assert type(again) is type(model)
    assert_close(again.get_weights(), model.get_weights(), 0)
    assert_close(outputs(again), outputs(model), 0)


def test_transformers_computes_the_same(tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = from_google(GOLDEN)
    to_huggingface(model, tmp_path)
    theirs, told = transformers.BertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    ids = torch.from_numpy(TOKENS).long()
    with torch.no_grad():
        found = theirs.eval()(ids, attention_mask=ids != 0, token_type_ids=torch.from_numpy(SEGMENTS).long())
    rows = np.take_along_axis(found.prediction_logits.numpy(), (TOKENS % 8)[..., None], axis=1)
    ours, real = outputs(model), TOKENS % 8 < np.array([[8], [4]])
    assert_close(ours["masked_lm"][real], rows[real], 1e-5)
    assert_close(ours["next_sentence"], found.seq_relationship_logits.numpy(), 1e-5)


@pytest.mark.on_one_backend
def test_what_was_fine_tuned(folder, tmp_path):
    def only(**heads):
        def edit(tensors):
            for name in [name for name in tensors if name.startswith("cls/")]:
                del tensors[name]
            tensors |= {name.replace("__", "/"): fixture(name, shape).astype("float32")
                        for name, shape in heads.items()}  # fmt: skip

        return edit

    (folder / "bert_config.json").rename(tmp_path / "elsewhere.json")
    for number, (heads, kind) in enumerate([
        (dict(output_weights=(3, 4), output_bias=(3,)), models.BERTClassifier),
        (dict(cls__squad__output_weights=(2, 4), cls__squad__output_bias=(2,)), models.BERTQuestionAnswering),
    ]):  # fmt: skip
        tensors = bundle.read_bundle(GOLDEN / "bert_model.ckpt")
        only(**heads)(tensors)
        if kind is models.BERTQuestionAnswering:
            tensors = {name: x for name, x in tensors.items() if "pooler" not in name}
        write_bundle(tmp_path / f"model.ckpt-{number}", tensors)
        model = from_google(tmp_path / f"model.ckpt-{number}.index", config=tmp_path / "elsewhere.json")
        assert type(model) is kind
        head = model.classes if kind is models.BERTClassifier else model.span
        name = next(iter(heads))
        assert_close(head.kernel, fixture(name, heads[name]).T, 1e-7)
    with pytest.raises(ValueError, match=r"has several checkpoints, model.ckpt-0, model.ckpt-1; give the path of one"):
        from_google(tmp_path, config=tmp_path / "elsewhere.json")


@pytest.mark.on_one_backend
def test_another_kind_leaves_heads_out_and_tells():
    with pytest.warns(UserWarning, match=r"left out of the checkpoint: cls/predictions/output_bias \(12,\), "):
        assert type(from_google(GOLDEN, models.BERT)) is models.BERT
    with pytest.warns(UserWarning, match=r"new, not in the checkpoint: classes/bias, classes/kernel"):
        assert from_google(GOLDEN, models.BERTClassifier, num_classes=2).classes.units == 2


@pytest.mark.on_one_backend
def test_a_pooler_that_the_head_has_no_use_for_is_left_out(folder):
    def reader(tensors):
        for name in [name for name in tensors if name.startswith("cls/")]:
            del tensors[name]
        tensors |= {"cls/squad/output_weights": value("w", (2, 4)), "cls/squad/output_bias": value("b", (2,))}

    rewrite(folder, reader)
    with pytest.warns(UserWarning, match=r"read; left out of the checkpoint: bert/pooler/dense/bias \(4,\), bert/p"):
        model = from_google(folder)
    assert type(model) is models.BERTQuestionAnswering and len(model.conversion.left) == 2


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop("bert/encoder/layer_1/output/dense/bias"),
     r"bert/encoder/layer_1/output/dense/bias is missing, for .*/encoder/block_1/feedforward/contract/bias \(4,\)"),
    (lambda t: t.update({"more": np.zeros(3, "float32")}), r"more \(3,\) is not used"),
    (lambda t: t.update({"bert/pooler/dense/bias": np.zeros(5, "float32")}),
     r"pooler/dense/bias is \(4,\), which bert/pooler/dense/bias \(5,\) does not fit"),
    (lambda t: t.update({"bert/embeddings/word_embeddings": np.zeros((13, 4), "float32")}),
     r"vocab_size is 12, and bert/embeddings/word_embeddings is \(13, 4\)"),
    (lambda t: t.update({"bert/pooler/dense/bias": np.zeros(4, "int32")}), r"be real numbers, and .*bias is int32"),
])  # fmt: skip
@pytest.mark.on_one_backend
def test_tensors_that_do_not_fit(folder, edit, message):
    rewrite(folder, edit)
    with pytest.raises(ValueError, match=message):
        from_google(folder)


@pytest.mark.parametrize("config, message", [
    ({"hidden_act": "swish"}, "hidden_act must be one of gelu, relu, tanh; got 'swish'"),
    ({"num_hidden_layers": 3}, r"num_hidden_layers is 3, and bert/encoder/layer_2/attention/self/query/kernel is miss"),
    ({"hidden_size": None}, "lacks hidden_size"),
])  # fmt: skip
def test_configs_that_cannot_be(folder, config, message):
    found = json.loads((folder / "bert_config.json").read_text())
    (folder / "bert_config.json").write_text(json.dumps(found | config))
    with pytest.raises(ValueError, match=message):
        from_google(folder)


@pytest.mark.on_one_backend
def test_a_vocabulary_that_is_too_large(folder):
    (folder / "vocab.txt").write_text("".join(f"w{i}\n" for i in range(12)))
    from_google(folder)
    (folder / "vocab.txt").write_text("".join(f"w{i}\n" for i in range(13)))
    with pytest.raises(ValueError, match=r"vocab.txt has 13 pieces, more than the vocab_size 12"):
        from_google(folder)


def test_files_that_are_missing(folder):
    with pytest.raises(
        FileNotFoundError, match=r"other.index does not exist; the folder has bert_config.json, bert_mo"
    ):
        from_google(folder / "other")
    (folder / "bert_model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(FileNotFoundError, match=r"data-00000-of-00001 does not exist, and .* says that it has bert/"):
        from_google(folder)
    (folder / "bert_config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"bert_config.json does not exist; the folder has bert_model.ckpt.index"
    ):
        from_google(folder)
    (folder / "bert_model.ckpt.index").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint, which ends in .index; the folder has nothing"):
        from_google(folder)


# The files


@pytest.mark.on_one_backend
def test_every_damaged_byte_is_found(folder):
    """Whichever byte is wrong, nothing wrong is read."""
    index, data = folder / "bert_model.ckpt.index", folder / "bert_model.ckpt.data-00000-of-00001"
    before = {name: x.copy() for name, x in bundle.read_bundle(folder / "bert_model.ckpt").items()}
    whole, rng = {path: path.read_bytes() for path in (index, data)}, np.random.default_rng(0)
    for path, places in ((index, range(0, len(whole[index]), 7)), (data, rng.integers(0, len(whole[data]), 100))):
        for place in places:
            wrong = bytearray(whole[path])
            wrong[place] ^= 1 << rng.integers(8)
            path.write_bytes(wrong)
            try:
                found = bundle.read_bundle(folder / "bert_model.ckpt")
            except ValueError as error:
                assert str(path) in str(error)
            else:  # the footer's own bytes have no checksum, and some mean nothing
                assert path == index and place > len(whole[index]) - 48 and found.keys() == before.keys()
                assert all((found[name] == before[name]).all() for name in found)
        path.write_bytes(whole[path])


def test_truncated_files(folder):
    index, data = folder / "bert_model.ckpt.index", folder / "bert_model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"00000-of-00001 is truncated: global_step ends at byte 2128 of 2127"):
        bundle.read_bundle(folder / "bert_model.ckpt")
    data.write_bytes(whole[:500])
    with pytest.raises(ValueError, match=r"00000-of-00001 is truncated: bert/"):
        from_google(folder)
    data.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"00000-of-00001 is damaged: .* does not have the checksum"):
        bundle.read_bundle(folder / "bert_model.ckpt")
    whole = index.read_bytes()
    for content in (b"", whole[:30], whole[:-1], whole[1:], b"\x80\x04K\x01."):
        index.write_bytes(content)
        with pytest.raises(ValueError, match=r"ckpt.index is truncated, damaged or no checkpoint of TensorFlow"):
            from_google(folder)


@pytest.mark.parametrize("entry, message", [
    (dict(field1=7), "a is of TensorFlow's type 7; what can be read are whole tensors of numbers"),
    (dict(field7=b"x"), "a is saved in slices"),
    (dict(field5=5), r"a \(2,\) of float32 should have another size than 5 bytes"),
    (dict(field3=1), "data-00001-of-00001"),
])  # fmt: skip
def test_entries_that_cannot_be(tmp_path, entry, message):
    write_bundle(tmp_path / "x", {"a": np.ones(2, "float32")}, **entry)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        bundle.read_bundle(tmp_path / "x")


@pytest.mark.on_one_backend
def test_a_checkpoint_of_objects_is_told(folder):
    for path in folder.glob("bert_model*"):
        path.unlink()
    name = "model/layer-1/embeddings/.ATTRIBUTES/VARIABLE_VALUE"
    write_bundle(folder / "bert_model.ckpt", {"_CHECKPOINTABLE_OBJECT_GRAPH": np.ones(2, "f4"), name: np.ones(2, "f4")})
    with pytest.raises(ValueError, match=rf"is of TensorFlow 2's Keras, .*, such as {name}; the checkpoints of the"):
        from_google(folder)


@pytest.mark.on_one_backend
def test_tensors_in_slices_are_told(tmp_path):
    slices = [f"\0a\0\1\1\2{place}\x82\x80\x82" for place in "\x80\x82"]  # TensorFlow's keys of two halves of (4, 2)
    write_bundle(tmp_path / "x", dict.fromkeys(["a", "b", *slices], np.ones((2, 2), "float32")), field7=b"x")
    with pytest.raises(ValueError, match=r"x.index: a is saved in slices; what can be read are whole tensors"):
        bundle.read_bundle(tmp_path / "x")
    assert list(bundle.read_bundle(tmp_path / "x", lambda name: name == "a")) == ["b"]


@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.on_one_backend
def test_many_tensors_in_many_blocks(tmp_path, block):
    rng = np.random.default_rng(0)
    tensors = {f"layer_{i}/{'x' * (i % 5)}": rng.normal(size=(i % 3, 2)).astype("float32") for i in range(200)}
    tensors |= {"scalar": np.array(7, "int64"), "half": np.ones(3, "float16"), "bool": np.array([True, False])}
    write_bundle(tmp_path / "x", tensors, block)
    found = bundle.read_bundle(tmp_path / "x", lambda name: name == "bool")
    assert found.keys() == tensors.keys() - {"bool"}
    assert all((found[name] == tensors[name]).all() and found[name].dtype == tensors[name].dtype for name in found)


@pytest.mark.parametrize("shards", [1, 2])
def test_what_tensorflow_writes_now(tmp_path, shards):
    tf, ml_dtypes = pytest.importorskip("tensorflow"), pytest.importorskip("ml_dtypes")
    rng, parts = np.random.default_rng(0), []
    tensors = {rng.bytes(250).hex(): np.float32(i) for i in range(600)}  # so that the index has two blocks of 256 kB
    tensors |= {"large": rng.normal(size=(1000, 1500)).astype("float32"), "none": np.zeros((0, 3), "float64"),
                "ids": rng.integers(0, 9, (3, 4)), "half": np.ones(5, ml_dtypes.bfloat16)}  # fmt: skip
    for i in range(shards):
        some = dict(list(tensors.items())[i::shards])
        parts.append(str(tmp_path / f"part{i}"))
        tf.raw_ops.SaveV2(prefix=parts[-1], tensor_names=list(some), shape_and_slices=[""] * len(some),
                          tensors=list(some.values()))  # fmt: skip
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(tmp_path / "all"))
    found = bundle.read_bundle(tmp_path / "all")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert found["half"].dtype == ml_dtypes.bfloat16
    write_bundle(tmp_path / "mine", {"a": np.ones(3, "float32"), "b": np.arange(4)})
    reader = tf.train.load_checkpoint(str(tmp_path / "mine"))  # what these tests write is what TensorFlow reads
    assert reader.get_tensor("a").tolist() == [1, 1, 1] and reader.get_tensor("b").tolist() == [0, 1, 2, 3]


@pytest.mark.on_one_backend
def test_checksums():
    assert bundle.crc32c(b"123456789") == 0xE3069283 and bundle.crc32c(b"") == 0  # RFC 3720, appendix B.4
    assert bundle.crc32c(bytes(32)) == 0x8A9136AA and bundle.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert bundle.crc32c(bytes(range(32))) == 0x46DD794E
    data = np.random.default_rng(0).bytes(2 * bundle.LANE * bundle.LANES + 77)
    for size in (1, 3, 5, 1023, 1024, 1025, 4097, bundle.LANE * bundle.LANES, len(data)):
        sum_ = 0xFFFFFFFF
        for byte in data[:size] if size < 5000 else b"":
            sum_ ^= byte
            for _ in range(8):
                sum_ = sum_ >> 1 ^ bundle.POLYNOMIAL * (sum_ & 1)
        assert size > 5000 or bundle.crc32c(data[:size]) == sum_ ^ 0xFFFFFFFF
        flipped = bytearray(data[:size])
        flipped[size // 2] ^= 4
        assert bundle.crc32c(bytes(flipped)) != bundle.crc32c(data[:size])


@pytest.mark.on_one_backend
def test_a_checksum_does_not_depend_on_the_rows(monkeypatch):
    data = np.random.default_rng(1).bytes(9_000_001)
    expected = bundle.crc32c(data)
    monkeypatch.setattr(bundle, "LANES", 8192)
    assert bundle.crc32c(data) == expected
    monkeypatch.setattr(bundle, "LANES", 256)
    assert bundle.crc32c(data) == expected


@pytest.mark.on_one_backend
def test_nothing_is_told_when_all_fits():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        from_google(GOLDEN)

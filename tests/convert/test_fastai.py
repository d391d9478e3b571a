"""Weights of fastai's AWD-LSTM: into our models, out again, and the same numbers as PyTorch's own layers give."""

import ml_dtypes
import numpy as np
import pytest
from keras import ops

from llmfound.convert import assign, from_fastai, to_fastai
from llmfound.layers import AWDLSTM
from llmfound.models import ULMFiT, ULMFiTClassifier
from llmfound.testing import assert_close, fixture

SIZES = dict(embedding_dim=6, hidden_dim=9, pad_id=1)
IDS = np.array([[2, 5, 7, 3, 9, 4], [3, 3, 8, 10, 6, 1]], "int32")


def encoder_tensors(prefix):
    tensors = {
        f"{prefix}encoder.weight": fixture("e", (13, 6)),
        f"{prefix}encoder_dp.emb.weight": fixture("e", (13, 6)),
    }
    for i, (n, h) in enumerate([(6, 9), (9, 9), (9, 6)]):
        part = f"{prefix}rnns.{i}."
        tensors[part + "weight_hh_l0_raw"] = fixture(part + "u", (4 * h, h))
        tensors[part + "module.weight_ih_l0"] = fixture(part + "w", (4 * h, n))
        tensors[part + "module.bias_ih_l0"] = fixture(part + "b", (4 * h,))
        tensors[part + "module.bias_hh_l0"] = fixture(part + "c", (4 * h,))
    return {name: array.astype("float32") for name, array in tensors.items()}


def language_model_tensors():
    bias = fixture("bias", (13,)).astype("float32")
    tensors = encoder_tensors("0.")
    return {**tensors, "1.decoder.weight": tensors["0.encoder.weight"], "1.decoder.bias": bias}


def classifier_tensors():
    tensors = encoder_tensors("0.module.")
    for i, (n, m) in enumerate([(18, 50), (50, 3)]):
        part = f"1.layers.{i}."
        tensors |= {
            part + "0.weight": fixture(part + "g", (n,), norm_scale=True),
            part + "0.bias": fixture(part + "b", (n,)),
            part + "0.running_mean": fixture(part + "m", (n,)),
            part + "0.running_var": fixture(part + "v", (n,), norm_scale=True),
            part + "0.num_batches_tracked": np.array(7),
            part + "2.weight": fixture(part + "w", (m, n)),
        }
    return {name: np.asarray(array, "float32") for name, array in tensors.items()}


def by_torch(tensors, prefix):
    """What PyTorch's own layers make of the encoder's weights: float (batch, length, 6)."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(tensors[prefix + "encoder.weight"])[torch.from_numpy(IDS).long()]
    for i, (n, h) in enumerate([(6, 9), (9, 9), (9, 6)]):
        lstm, part = torch.nn.LSTM(n, h, batch_first=True), f"{prefix}rnns.{i}."
        names = [f"{part}module.weight_ih_l0", f"{part}weight_hh_l0_raw", f"{part}module.bias_ih_l0",
                 f"{part}module.bias_hh_l0"]  # fmt: skip
        with torch.no_grad():
            for ours, name in zip(lstm.parameters(), names):
                ours.copy_(torch.from_numpy(tensors[name]))
            x, _ = lstm(x)
    return x.numpy()


def test_a_language_model():
    tensors, model = language_model_tensors(), ULMFiT(13, **SIZES)
    from_fastai(model, tensors)
    found = model.predict_on_batch({"token_ids": IDS})
    h = by_torch(tensors, "0.")
    expected = h @ tensors["0.encoder.weight"].T + tensors["1.decoder.bias"]
    assert_close(found[0], expected[0], 1e-5)
    assert_close(found[1, :5], expected[1, :5], 1e-5)  # behind them is padding
    written = to_fastai(model)
    assert written.keys() == tensors.keys()
    again = ULMFiT(13, **SIZES)
    from_fastai(again, written)
    assert_close(again.predict_on_batch({"token_ids": IDS}), found, 0)
    for name, array in written.items():
        if "bias_" not in name:
            assert (array == tensors[name]).all() and array.dtype == "float32", name


@pytest.mark.on_one_backend
def test_bfloat16():
    torch, model = pytest.importorskip("torch"), ULMFiT(13, **SIZES)
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in language_model_tensors().items()}
    expected = tensors["0.encoder.weight"].astype("float32")
    of_torch = {name: torch.from_numpy(x.astype("float32")).bfloat16() for name, x in tensors.items()}
    for found in (tensors, of_torch):
        from_fastai(model, found)
        assert_close(model.encoder.embedding.embeddings, expected, 0)


@pytest.mark.on_one_backend
def test_an_encoder_alone_or_of_a_language_model():
    for tensors, prefix in ((encoder_tensors(""), ""), (language_model_tensors(), "0.")):
        encoder = AWDLSTM(13, **SIZES)
        encoder(IDS)
        from_fastai(encoder, tensors)
        h, _, _ = encoder(IDS)
        assert_close(ops.convert_to_numpy(h)[0], by_torch(tensors, prefix)[0], 1e-5)
    assert to_fastai(encoder).keys() == encoder_tensors("").keys()


def test_a_classifier():
    tensors, classifier = classifier_tensors(), ULMFiTClassifier(ULMFiT(13, **SIZES), 3)
    from_fastai(classifier, tensors)
    h = by_torch(tensors, "0.module.")
    real = (IDS != 1)[..., None]
    last = h[[0, 1], [5, 4]]
    x = np.concatenate([last, np.where(real, h, -9).max(1), (h * real).sum(1) / real.sum(1)], axis=1)
    for i in range(2):
        part = f"1.layers.{i}."
        scale = tensors[part + "0.weight"] / np.sqrt(tensors[part + "0.running_var"] + 1e-5)
        x = ((x - tensors[part + "0.running_mean"]) * scale + tensors[part + "0.bias"]) @ tensors[part + "2.weight"].T
        x = np.maximum(x, 0) if i == 0 else x
    assert_close(classifier.predict_on_batch({"token_ids": IDS}), x, 1e-5)
    written = to_fastai(classifier)
    assert set(written) == {name for name in tensors if not name.endswith("num_batches_tracked")}
    again = ULMFiTClassifier(ULMFiT(13, **SIZES), 3)
    from_fastai(again, written)
    assert_close(again.predict_on_batch({"token_ids": IDS}), x, 1e-5)
    written["1.layers.0.1.weight"] = written.pop("1.layers.0.2.weight")  # as with drop_mult=0
    from_fastai(ULMFiTClassifier(ULMFiT(13, **SIZES), 3), written)
    again.head.output_classes.bias.assign([1.0, 2.0, 3.0])
    assert to_fastai(again)["1.layers.1.2.bias"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("0.rnns.1.weight_hh_l0_raw"), r"0\.rnns\.1\.weight_hh_l0_raw is missing, for .*lstm_2"),
    (lambda t: t.update(extra=np.zeros(3)), r"extra \(3,\) is not used"),
    (lambda t: t.update({"1.decoder.bias": np.zeros(5)}), r"decoder/bias is \(13,\), which 1\.decoder\.bias \(5,\)"),
    (lambda t: t.update({"1.decoder.weight": t["1.decoder.weight"] + 1}),
     "1.decoder.weight and 0.encoder.weight differ; here they are one weight"),
    (lambda t: t.pop("0.encoder.weight"), "There is no encoder.weight of fastai's AWD_LSTM; the names begin with"),
])  # fmt: skip
@pytest.mark.on_one_backend
def test_weights_that_do_not_fit_change_nothing(change, message):
    tensors, model = language_model_tensors(), ULMFiT(13, **SIZES)
    before = model.get_weights()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        from_fastai(model, tensors)
    assert all((a == b).all() for a, b in zip(before, model.get_weights()))


@pytest.mark.on_one_backend
def test_a_table_that_misses_a_weight():
    model = ULMFiT(13, **SIZES)
    with pytest.raises(ValueError, match=r"embedding/embeddings \(13, 6\) has 0 entries in the table; .* more\."):
        assign(model, {}, {})

"""AWD-LSTM weights of fastai, without fastai. Source: the names in its version 2, `AWD_LSTM`, `LinearDecoder` and
`PoolingLinearClassifier`."""

import numpy as np
from keras import ops

from llmfound.convert.assign import as_array, assign

_PREFIXES = ("0.module.", "0.", "")  # of a classifier, a language model, and an encoder by itself


def from_fastai(model, tensors):
    """Sets the weights of a language model, an encoder or a classifier from those of fastai.

        tensors = torch.load("wt103-fwd/lstm_fwd.pth", weights_only=True)
        llmfound.convert.from_fastai(model, tensors.get("model", tensors))

    fastai's sizes are embedding_dim 400 and hidden_dim 1152, its padding is word 1. Both of PyTorch's biases go into
    the one of Keras.

    Args:
        model: ULMFiT, AWDLSTM (of a language model's file or of an encoder's) or ULMFiTClassifier.
        tensors: dict, name -> array, what `learn.save` or `learn.save_encoder` wrote, read by you.

    Raises:
        ValueError: if there is no "encoder.weight" under any known prefix, or weights are missing, left over, or of
            other shapes. The model is then as it was.
    """
    encoder = getattr(model, "encoder", model)
    prefix = next((p for p in _PREFIXES if f"{p}encoder.weight" in tensors), None)
    if prefix is None:
        raise ValueError(f"There is no encoder.weight of fastai's AWD_LSTM; the names begin with {list(tensors)[:5]}.")
    table = {"embedding/embeddings": f"{prefix}encoder.weight"}
    ignore = {f"{prefix}encoder_dp.emb.weight", "1.decoder.weight"}  # the same matrix again
    if (
        hasattr(model, "decoder")
        and "1.decoder.weight" in tensors
        and not np.array_equal(as_array(tensors["1.decoder.weight"]), as_array(tensors[f"{prefix}encoder.weight"]))
    ):
        raise ValueError(f"1.decoder.weight and {prefix}encoder.weight differ; here they are one weight.")
    for i, lstm in enumerate(encoder.lstms):
        part = f"{prefix}rnns.{i}."
        table |= {
            f"{lstm.name}/lstm_cell/kernel": ((f"{part}module.weight_ih_l0",), np.transpose),
            f"{lstm.name}/lstm_cell/recurrent_kernel": ((f"{part}weight_hh_l0_raw",), np.transpose),
            f"{lstm.name}/lstm_cell/bias": ((f"{part}module.bias_ih_l0", f"{part}module.bias_hh_l0"), np.add),
        }
        ignore.add(f"{part}module.weight_hh_l0")  # with some elements dropped, of some versions
    if hasattr(model, "decoder"):
        table["decoder/bias"] = "1.decoder.bias"
    elif model is encoder:
        ignore |= {name for name in tensors if name.startswith("1.")}
    if hasattr(model, "head"):
        table |= {ours: (names, function) for ours, (names, function) in _head(model.head).items()}
        ignore |= {f"1.layers.{i}.0.num_batches_tracked" for i in range(2)}
        of_no_dropout = {f"1.layers.{i}.1.weight": f"1.layers.{i}.2.weight" for i in range(2)}  # of rate 0: no layer
        tensors = {of_no_dropout.get(name, name): array for name, array in tensors.items()}
        tensors = {**_zero_biases(model.head), **tensors}
    assign(model, tensors, table, ignore, keep=["carried"])


def to_fastai(model):
    """The weights of a language model, an encoder or a classifier by fastai's names: dict of NumPy float32 arrays.

    `torch.save({name: torch.from_numpy(array) ...})` or safetensors writes them to a file. fastai's head has no biases
    in its linear layers: those that are zero are left out, and a classifier that has others has them here as
    1.layers.{0,1}.2.bias, which fastai's strict loading refuses.

    Args:
        model: ULMFiT, AWDLSTM or ULMFiTClassifier.
    """
    encoder = getattr(model, "encoder", model)
    prefix = "0.module." if hasattr(model, "head") else "0." if hasattr(model, "decoder") else ""
    embeddings = _array(encoder.embedding.embeddings)
    tensors = {f"{prefix}encoder.weight": embeddings, f"{prefix}encoder_dp.emb.weight": embeddings}
    for i, lstm in enumerate(encoder.lstms):
        part, cell = f"{prefix}rnns.{i}.", lstm.cell
        tensors |= {
            f"{part}weight_hh_l0_raw": _array(cell.recurrent_kernel).T,
            f"{part}module.weight_ih_l0": _array(cell.kernel).T,
            f"{part}module.bias_ih_l0": _array(cell.bias),
            f"{part}module.bias_hh_l0": np.zeros_like(_array(cell.bias)),
        }
    if hasattr(model, "decoder"):
        tensors |= {"1.decoder.weight": embeddings, "1.decoder.bias": _array(model.decoder.bias)}
    if hasattr(model, "head"):
        for ours, (names, function) in _head(model.head).items():
            [weight] = [w for w in model.head.weights if w.path.endswith(ours)]
            array = function(_array(weight))
            if array.any() or not names[0].endswith(".2.bias"):
                tensors[names[0]] = array
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _head(head):
    """Our weights of a classifier's head: the names of fastai's, and what turns the one into the other."""
    table = {}
    for i, (norm, dense) in enumerate(((head.norm, head.hidden), (head.hidden_norm, head.output_classes))):
        for ours, theirs in zip(("gamma", "beta", "moving_mean", "moving_variance"),
                                ("weight", "bias", "running_mean", "running_var")):  # fmt: skip
            table[f"head/{norm.name}/{ours}"] = ((f"1.layers.{i}.0.{theirs}",), lambda x: x)
        table[f"head/{dense.name}/kernel"] = ((f"1.layers.{i}.2.weight",), np.transpose)
        table[f"head/{dense.name}/bias"] = ((f"1.layers.{i}.2.bias",), lambda x: x)
    return table


def _zero_biases(head):
    return {f"1.layers.{i}.2.bias": np.zeros(dense.units, "float32")
            for i, dense in enumerate((head.hidden, head.output_classes))}  # fmt: skip


def _array(variable):
    return np.asarray(ops.convert_to_numpy(variable), "float32")

"""BERT's checkpoints of Hugging Face, in and out, without transformers and without PyTorch. Source: the names and files
of its library and of those that Google's were converted to."""

import dataclasses
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
from keras import ops

from llmfound import models
from llmfound.convert.assign import assign
from llmfound.ops import gelu_tanh

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
               "silu": "silu", "swish": "silu", "tanh": "tanh"}  # fmt: skip
SIZES = {"vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "hidden_dim": "hidden_size",
         "num_heads": "num_attention_heads", "intermediate_dim": "intermediate_size"}  # fmt: skip
REST = {"dropout": ("hidden_dropout_prob", 0.1), "attention_dropout": ("attention_probs_dropout_prob", 0.1),
        "max_length": ("max_position_embeddings", 512), "num_segments": ("type_vocab_size", 2),
        "pad_id": ("pad_token_id", 0), "epsilon": ("layer_norm_eps", 1e-12),
        "causal": ("is_decoder", False)}  # fmt: skip
PARTS = {
    "token_embedding": "embeddings.word_embeddings", "segment_embedding": "embeddings.token_type_embeddings",
    "position_embedding": "embeddings.position_embeddings", "embedding_norm": "embeddings.LayerNorm",
    "attention/query": "attention.self.query", "attention/key": "attention.self.key",
    "attention/value": "attention.self.value", "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm", "feedforward/expand": "intermediate.dense",
    "feedforward/contract": "output.dense", "feedforward_norm": "output.LayerNorm", "pooler/dense": "pooler.dense",
    "masked_lm/dense": "cls.predictions.transform.dense", "masked_lm/norm": "cls.predictions.transform.LayerNorm",
    "masked_lm": "cls.predictions", "next_sentence": "cls.seq_relationship", "classes": "classifier",
    "span": "qa_outputs", "score": "classifier",
}  # fmt: skip
LAST = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}
TIED = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias"}  # fmt: skip
UNUSED = "embeddings.position_ids"  # the numbers 0, 1, 2, ... of old files
OF_KIND = {
    "BERT": "BertModel", "BERTPretraining": "BertForPreTraining", "BERTClassifier": "BertForSequenceClassification",
    "BERTTokenClassifier": "BertForTokenClassification", "BERTQuestionAnswering": "BertForQuestionAnswering",
    "BERTMultipleChoice": "BertForMultipleChoice",
}  # fmt: skip


@dataclasses.dataclass
class Conversion:
    """What went where when a checkpoint was read.

    Attributes:
        copied: dict, path of each weight of the model that was read -> name of its tensor.
        new: list of str, paths of the weights that the checkpoint lacks, as they were initialised.
        left: list of str, names and shapes of the tensors that the model has no place for.
    """

    copied: dict
    new: list
    left: list

    def __str__(self):
        lines = [f"{len(self.copied)} weights were read"]
        lines += [f"new, not in the checkpoint: {', '.join(self.new)}"] * bool(self.new)
        lines += [f"left out of the checkpoint: {', '.join(self.left)}"] * bool(self.left)
        return "; ".join(lines) + "."


def from_huggingface(folder, kind=None, num_classes=None, dtype=None):
    """The model of a checkpoint's folder: config.json and model.safetensors, whole or in parts.

        bert = llmfound.convert.from_huggingface("bert-base-uncased", llmfound.models.BERT)
        tokenizer = llmfound.data.WordPiece.load("bert-base-uncased")

    Without `kind`, every tensor must have its place: the heads that are there say which model it is, and of those with
    a "classifier" config.json's `architectures`. With it, heads of other kinds are left out and what the file lacks of
    this one begins anew, and a warning tells so. `model.conversion` tells all of it.

    Args:
        folder: path.
        kind: class of llmfound.models, BERT or one on it.
        num_classes: int, of a new BERTClassifier or BERTTokenClassifier.
        dtype: dtype policy of the model; None takes Keras's.

    Returns:
        A model of `kind`.

    Raises:
        FileNotFoundError: if a file is missing; what is there is named.
        ValueError: if config.json is no BERT's or asks for what there is not, a file is damaged, or tensors are
            missing, left over, of other shapes, or untied where the model has one weight. There is no half-read model.
    """
    folder = Path(folder)
    config, tensors = _config(folder), {_modern(name): array for name, array in _tensors(folder).items()}
    tensors.pop(UNUSED, None)
    _untie(tensors)
    strict = kind is None
    model = _model(kind or _kind(tensors, config), tensors, config, num_classes, dtype)
    table = {path: name for _, path, name in names(model)}
    left = [name for name in tensors if name not in table.values() and not _of_encoder(name) and not strict]
    new = {path for path, name in table.items() if name not in tensors and not _of_encoder(name) and not strict}
    entries = {path: ((name,), np.transpose if _turned(path) else np.asarray) for path, name in table.items()}
    kept = {path: ops.convert_to_numpy(weight) for weight, path, _ in names(model) if path in new}
    entries |= {path: path for path in kept}
    assign(model, {**tensors, **kept}, entries, ignore=left)
    copied = {path: name for path, name in table.items() if path not in new}
    model.conversion = Conversion(copied, sorted(new), [f"{name} {tensors[name].shape}" for name in left])
    if new or left:
        warnings.warn(f"{folder}: {model.conversion}", stacklevel=2)
    return model


def to_huggingface(model, folder, tokenizer=None, **config):
    """Writes a model to a folder as `transformers` reads it: config.json, model.safetensors, and a tokenizer's files.

    Files of the same names are replaced. An interrupted call leaves no config.json, without which nothing is read.

    Args:
        model: BERT, or one on it.
        folder: path; it is made.
        tokenizer: WordPiece; None leaves its files out.
        **config: more entries of config.json, such as id2label={0: "negative", 1: "positive"}.

    Raises:
        ValueError: if this is no such model, its activation has no name there, or the tokenizer has more pieces than
            the model.
    """
    from safetensors.numpy import save_file

    kind = next((base.__name__ for base in type(model).__mro__ if base.__name__ in OF_KIND), None)
    if kind is None:
        raise ValueError(f"{type(model).__name__} is none of {', '.join(OF_KIND)}.")
    if tokenizer is not None and tokenizer.vocab_size > model.encoder.token_embedding.input_dim:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} pieces, and the model {model.encoder.token_embedding.input_dim}."
        )
    settings = _labelled({**_settings(model, kind), **config})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    prefix = "" if kind == "BERT" else "bert."
    tensors = {}
    for weight, path, name in names(model):
        array = np.asarray(ops.convert_to_numpy(ops.cast(weight, "float32")))
        whole = name if name.startswith(("cls.", "classifier.", "qa_outputs.")) else prefix + name
        tensors[whole] = np.ascontiguousarray(array.T if _turned(path) else array)
    save_file(tensors, folder / "model.safetensors.part", {"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_folder(folder, max_length=model.encoder.max_length)
    (folder / "config.json.part").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    os.replace(folder / "config.json.part", folder / "config.json")


def names(model):
    """Each weight of a model, its path without the model's own name, and the name of its tensor without "bert.".

    Returns:
        list of (variable, str, str).

    Raises:
        ValueError: if a weight has no name there.
    """
    found = []
    for weight in model.weights:
        path = weight.path.split("/", 1)[1]
        *parts, last = path.removeprefix("encoder/").split("/")
        block = re.fullmatch(r"block_(\d+)", parts[0])
        part = PARTS.get("/".join(parts[1:] if block else parts))
        if part is None or last not in LAST:
            raise ValueError(f"{weight.path} has no name in Hugging Face's BERT.")
        found.append(
            (weight, path, f"encoder.layer.{block[1]}.{part}.{LAST[last]}" if block else f"{part}.{LAST[last]}")
        )
    return found


def _of_encoder(name):
    return name.startswith(("embeddings.", "encoder."))


def _turned(path):
    """Whether a matrix is (in, out) here and (out, in) there."""
    return path.endswith("/kernel")


def _modern(name):
    """The name of a tensor in new files, without the prefix that all but plain encoders have."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name).removeprefix("bert.")


def _untie(tensors):
    """Takes out what is written twice, after a look whether it is the same."""
    for name, original in TIED.items():
        twin = tensors.pop(name, None)
        if twin is not None and original not in tensors:
            tensors[original] = twin
        elif twin is not None and not np.array_equal(twin, tensors[original]):
            raise ValueError(f"{name} and {original} differ; here they are one weight.")


def _json(path):
    if not path.exists():
        there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else None
        shown = "there is no such folder" if there is None else f"the folder has {', '.join(there[:8]) or 'nothing'}"
        raise FileNotFoundError(f"{path} does not exist; {shown}.")
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, but {str(found)[:40]}.")
    return found


def _config(folder):
    config = _json(folder / "config.json")
    if config.get("model_type") != "bert":
        raise ValueError(f"{folder / 'config.json'} is of a {config.get('model_type')!r} model, not 'bert'.")
    missing = [name for name in SIZES.values() if name not in config]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}.")
    if config.get("hidden_act", "gelu") not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {config['hidden_act']!r}.")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute" or config.get("add_cross_attention"):
        raise ValueError(
            "Only absolute positions and no cross-attention can be had; got "
            f"position_embedding_type={positions!r}, add_cross_attention={config.get('add_cross_attention', False)}."
        )
    return config


def _tensors(folder):
    """{name: array} of model.safetensors, or of the parts that its index names."""
    import ml_dtypes  # noqa: F401  makes bfloat16 known to NumPy
    import safetensors

    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / files[0]).exists() and index.exists():
        files = sorted(set(_json(index).get("weight_map", {}).values()))
    found = {}
    for name in files:
        path = folder / name
        if path.parent != folder or not path.exists():
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
            raise FileNotFoundError(
                f"{path} does not exist; the folder has {there}. Of a pytorch_model.bin, PyTorch's users make it by "
                "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')."
            )
        try:
            with safetensors.safe_open(path, "numpy") as file:
                found |= {key: file.get_tensor(key) for key in file.keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from error
    return {name: array.astype("float32") if array.dtype.kind in "fV" else array for name, array in found.items()}


def _kind(tensors, config):
    """The class of the model that has these tensors."""
    if "qa_outputs.weight" in tensors:
        return models.BERTQuestionAnswering
    if any(name.startswith("cls.") for name in tensors):
        return models.BERTPretraining
    if "classifier.weight" not in tensors:
        return models.BERT
    known = {theirs: getattr(models, ours) for ours, theirs in OF_KIND.items()}
    found = [known[name] for name in config.get("architectures") or () if name in known]
    if not found:
        raise ValueError(
            "There is a classifier, and config.json's architectures do not tell of what: "
            f"{config.get('architectures')}; give kind=BERTClassifier, BERTTokenClassifier or BERTMultipleChoice."
        )
    return found[0]


def _model(kind, tensors, config, num_classes, dtype):
    options = {ours: config[theirs] for ours, theirs in SIZES.items()}
    options |= {ours: config.get(theirs, default) for ours, (theirs, default) in REST.items()}
    options["activation"] = ACTIVATIONS[config.get("hidden_act", "gelu")]
    if options["pad_id"] is None:
        options["pad_id"] = 0
    bert, policy = models.BERT(**options, dtype=dtype), dict(dtype=dtype)
    if issubclass(kind, models.BERT):
        return bert
    if issubclass(kind, models.BERTPretraining):
        return kind(bert, next_sentence="cls.seq_relationship.weight" in tensors, **policy)
    if issubclass(kind, models.BERTQuestionAnswering):
        return kind(bert, **policy)
    rate = config.get("classifier_dropout")
    policy["dropout"] = options["dropout"] if rate is None else rate
    if issubclass(kind, models.BERTMultipleChoice):
        return kind(bert, **policy)
    there = tensors.get("classifier.weight")
    if num_classes is None and there is None:
        raise ValueError(f"The file has no classifier; give num_classes for a new {kind.__name__}.")
    return kind(bert, len(there) if num_classes is None else num_classes, **policy)


def _settings(model, kind):
    """The entries of config.json."""
    encoder = model.encoder
    block = encoder.blocks[0]
    named = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    activation = "gelu_tanh" if encoder.activation is gelu_tanh else encoder.activation
    if activation not in named:
        raise ValueError(f"The activation {activation!r} has no name there; known are {', '.join(named)}.")
    architecture = OF_KIND[kind]
    if kind == "BERTPretraining" and model.next_sentence is None:
        architecture = "BertForMaskedLM"
    settings = {
        "architectures": [architecture], "model_type": "bert", "hidden_act": named[activation],
        "vocab_size": encoder.token_embedding.input_dim, "num_hidden_layers": len(encoder.blocks),
        "hidden_size": encoder.hidden_dim, "num_attention_heads": block.attention.num_heads,
        "intermediate_size": block.feedforward.expand.units, "hidden_dropout_prob": encoder.dropout.rate,
        "attention_probs_dropout_prob": block.attention.dropout.rate, "max_position_embeddings": encoder.max_length,
        "type_vocab_size": encoder.segment_embedding.input_dim, "pad_token_id": encoder.pad_id,
        "layer_norm_eps": encoder.epsilon, "is_decoder": block.attention.causal, "position_embedding_type": "absolute",
        "torch_dtype": "float32",
    }  # fmt: skip
    if hasattr(model, "dropout"):
        settings["classifier_dropout"] = model.dropout.rate
    if hasattr(model, "classes"):
        settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.classes.units)}
        if kind == "BERTClassifier" and model.classes.units == 1:
            settings["problem_type"] = "regression"
    return settings


def _labelled(settings):
    """config.json's two tables of labels, from one."""
    if "id2label" in settings:
        settings["id2label"] = {str(i): label for i, label in settings["id2label"].items()}
        settings["label2id"] = {label: int(i) for i, label in settings["id2label"].items()}
    return settings

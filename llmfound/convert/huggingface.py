"""BERT's checkpoints of Hugging Face, in and out, without transformers and without PyTorch. Source: the names and files
of its library and of those that Google's were converted to."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llmfound import models
from llmfound.convert.bert import (
    ADVICE,
    Form,
    check_kind,
    check_plain,
    huggingface_name,
    listing,
    read,
    read_config,
    read_json,
    values,
)
from llmfound.ops import gelu_tanh

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
               "silu": "silu", "swish": "silu", "tanh": "tanh"}  # fmt: skip
FORM = Form(huggingface_name, lambda path: path.endswith("/kernel"), ("embeddings.", "encoder."))
TIED = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias"}  # fmt: skip
UNUSED = "embeddings.position_ids"  # the numbers 0, 1, 2, ... of old files
OF_KIND = {
    "BERT": "BertModel", "BERTPretraining": "BertForPreTraining", "BERTClassifier": "BertForSequenceClassification",
    "BERTTokenClassifier": "BertForTokenClassification", "BERTQuestionAnswering": "BertForQuestionAnswering",
    "BERTMultipleChoice": "BertForMultipleChoice",
}  # fmt: skip


def from_huggingface(folder, kind=None, num_classes=None, dtype=None):
    """The model of a checkpoint's folder: config.json and model.safetensors, whole or in parts.

        bert = llmfound.convert.from_huggingface("bert-base-uncased", llmfound.models.BERT)
        tokenizer = llmfound.data.WordPiece.load("bert-base-uncased")

    Without `kind`, every tensor must have its place, but for a pooler that the head has no use for, which is left out:
    the heads that are there say which model it is, and of those with a "classifier" config.json's `architectures`. With
    it, heads of other kinds are left out and what the file lacks of this one begins anew. A warning tells of what was
    left out and what is new, and `model.conversion` of everything.

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
    check_kind(kind)
    folder = Path(folder)
    config = _config(folder)
    tensors = _modern(_tensors(folder), kind)
    known, told = {theirs: getattr(models, ours) for ours, theirs in OF_KIND.items()}, config.get("architectures")
    classifier = next((known[name] for name in told if name in known), None) if isinstance(told, list) else None
    if kind and classifier and not issubclass(kind, classifier):  # heads of three kinds have the same names
        of = {name: f"{name} of {classifier.__name__}" for name in tensors if name.startswith("classifier.")}
        tensors = {of.get(name, name): tensor for name, tensor in tensors.items()}
    return read(folder, FORM, tensors, config, kind, num_classes, dtype, classifier)


def to_huggingface(model, folder, tokenizer=None, **config):
    """Writes a model to a folder as `transformers` reads it: config.json, model.safetensors, and a tokenizer's files.

    What LoRA has learned is written into the weights that it adapts. The names of the classes and the `problem_type` of
    the checkpoint that a head was read from are written again, whether or not a .keras file was in between. Files of
    the same names are replaced, once the weights are on the disk. A call that is interrupted after that leaves no
    config.json, without which nothing is read.

    Args:
        model: BERT, or one on it.
        folder: path; it is made.
        tokenizer: WordPiece; None leaves its files out.
        **config: more entries of config.json, such as id2label={0: "negative", 1: "positive"}.

    Raises:
        ValueError: if this is no such model, it computes in a way of its own, its blocks or its activation have no like
            there, it is quantized, id2label does not name its classes, or the tokenizer
            has more pieces than the model, or other padding.
        TypeError: if an entry of config.json cannot be written to one.
    """
    from safetensors.numpy import save_file

    kind = next((base.__name__ for base in type(model).__mro__ if base.__name__ in OF_KIND), None)
    if kind is None:
        raise ValueError(f"{type(model).__name__} is none of {', '.join(OF_KIND)}.")
    check_plain(model, getattr(models, kind))
    check_plain(model.encoder, models.BERTEncoder)
    if tokenizer is not None and not hasattr(tokenizer, "save_folder"):
        raise ValueError(f"tokenizer must be a WordPiece, such as WordPiece.load gives; got {str(tokenizer)[:60]!r}.")
    if tokenizer is not None and tokenizer.vocab_size > model.encoder.token_embedding.input_dim:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} pieces, and the model {model.encoder.token_embedding.input_dim}."
        )
    if tokenizer is not None and tokenizer.pad_id != model.pad_id:
        raise ValueError(f"The tokenizer's padding is piece {tokenizer.pad_id}, and the model's pad_id {model.pad_id}.")
    settings = json.dumps(_labelled({**_settings(model, kind), **config}, model), indent=2, sort_keys=True)
    prefix, tensors = "" if kind == "BERT" else "bert.", {}
    for path, array in values(model).items():
        name = FORM.name(path)
        whole = name if name.startswith(("cls.", "classifier.", "qa_outputs.")) else prefix + name
        tensors[whole] = np.ascontiguousarray(array.T if FORM.turned(path) else array)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors.part", {"format": "pt"})
    (folder / "config.json").unlink(missing_ok=True)
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    if tokenizer is not None:
        tokenizer.save_folder(folder, max_length=model.encoder.max_length)
    (folder / "config.json.part").write_text(settings + "\n", "utf-8")
    os.replace(folder / "config.json.part", folder / "config.json")


def _config(folder):
    path = folder / "config.json"
    found = read_json(path)
    family = found.get("model_type") or "bert"  # old files do not tell
    if family != "bert":
        raise ValueError(f"{path} is of a {family!r} model, not 'bert'.")
    positions = found.get("position_embedding_type") or "absolute"
    if positions != "absolute" or found.get("add_cross_attention"):
        raise ValueError(
            "Only absolute positions and no cross-attention can be had; got "
            f"position_embedding_type={positions!r}, add_cross_attention={found.get('add_cross_attention', False)}."
        )
    return read_config(path, ACTIVATIONS, folder)


def _tensors(folder):
    """{name: array} of model.safetensors, or of the parts that its index names."""
    import ml_dtypes  # noqa: F401  makes bfloat16 known to NumPy
    import safetensors

    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / files[0]).exists() and index.exists():
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files.")
        files = sorted(set(parts.values()))
    found = {}
    for name in files:
        path = folder / name
        if path.parent != folder or not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; {listing(folder)}. Of a pytorch_model.bin, PyTorch's users make it by\n"
                "    tensors = torch.load('pytorch_model.bin', weights_only=True)\n"
                "    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, 'model.safetensors')"
            )
        try:
            with safetensors.safe_open(path, "numpy") as file:
                dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}
                small = [f"{key} is {dtype}" for key, dtype in dtypes.items() if re.match(r"F[468](_|$)", dtype)]
                if small:
                    raise ValueError(
                        f"{path}: {'; '.join(small[:5])}, and weights must be of float16, bfloat16 or more."
                    )
                found |= {key: file.get_tensor(key) for key in dtypes}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}.") from error
    return found


def _modern(tensors, kind):
    """With the names of new files, without the prefix that all but plain encoders have, and tied weights once.

    Where they are not the same, it is an error if the model's `kind` has them, or is to be found.
    """
    found = {}
    for name, array in tensors.items():
        new = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        new = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", new).removeprefix("bert.")
        if new in found:
            raise ValueError(f"{new} is there twice, with its old and with its new name.")
        found[new] = array
    found.pop(UNUSED, None)
    for name, original in TIED.items():
        if name in found and np.array_equal(found[name], found.setdefault(original, found[name])):
            del found[name]
        elif name in found and (kind is None or issubclass(kind, models.BERTPretraining)):
            advice = f" {ADVICE}" if kind is None else ""
            raise ValueError(f"{name} and {original} differ; here they are one weight.{advice}")
    return found


def _settings(model, kind):
    """The entries of config.json."""
    encoder = model.encoder
    block = encoder.blocks[0]
    plain = models.BERTEncoder.block_class
    if {type(x) for x in encoder.blocks} != {plain} or type(block.attention) is not plain.attention_class:
        raise ValueError(
            f"transformers' BERT has blocks like {plain.__name__} with {plain.attention_class.__name__}; this model's "
            f"are {type(block).__name__} with {type(block.attention).__name__}."
        )
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
        regression = kind == "BERTClassifier" and model.classes.units == 1
        told = {"id2label": {}, "problem_type": "regression" if regression else None, **model.told}
        settings["id2label"] = {str(i): told["id2label"].get(str(i), f"LABEL_{i}") for i in range(model.classes.units)}
        if told["problem_type"] is not None:
            settings["problem_type"] = told["problem_type"]
    return settings


def _labelled(settings, model):
    """config.json's two tables of labels, from one."""
    if "id2label" in settings:
        told = settings["id2label"]
        if not isinstance(told, Mapping) or not all(str(i).isdecimal() for i in told):
            raise ValueError(f"id2label must be a dict of numbers and names, {{0: ..., 1: ...}}; got {told}.")
        labels = dict(sorted((int(i), label) for i, label in told.items()))
        if hasattr(model, "classes") and list(labels) != list(range(model.classes.units)):
            raise ValueError(f"id2label must name the classes 0 to {model.classes.units - 1}; got {labels}.")
        settings |= {"id2label": labels, "label2id": {label: i for i, label in labels.items()}}
    return settings

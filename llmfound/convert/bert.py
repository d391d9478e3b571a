"""What all formats of BERT's checkpoints share: the names of its weights, and a model made of tensors, with a report of
what went where. Source: the names of Hugging Face's library, and of those files that Google's were converted to."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable

import numpy as np
from keras import ops

from llmfound import models
from llmfound.base import overrides
from llmfound.convert.assign import assign
from llmfound.initializers import not_drawn
from llmfound.models.bert import normal

SIZES = {"vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "hidden_dim": "hidden_size",
         "num_heads": "num_attention_heads", "intermediate_dim": "intermediate_size"}  # fmt: skip
REST = {"dropout": ("hidden_dropout_prob", 0.1), "attention_dropout": ("attention_probs_dropout_prob", 0.1),
        "max_length": ("max_position_embeddings", 512), "num_segments": ("type_vocab_size", 2),
        "pad_id": ("pad_token_id", 0), "epsilon": ("layer_norm_eps", 1e-12),
        "causal": ("is_decoder", False)}  # fmt: skip
TOLD_BY = {"vocab_size": ("encoder/token_embedding/embeddings", 0),
           "hidden_size": ("encoder/token_embedding/embeddings", 1),
           "max_position_embeddings": ("encoder/position_embedding/embeddings", 0),
           "type_vocab_size": ("encoder/segment_embedding/embeddings", 0),
           "intermediate_size": ("encoder/block_0/feedforward/expand/bias", 0)}  # fmt: skip
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
POOLER = "pooler/dense/kernel", "pooler/dense/bias"
ADVICE = "With kind=..., such as kind=llmfound.models.BERT, heads of other kinds are left out."
OF_COMPUTING = "call", "encode", "pool", "embed"  # methods
LAST = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}


@dataclasses.dataclass
class Conversion:
    """What went where when a checkpoint was read.

    Attributes:
        copied: dict, path of each weight of the model that was read -> name of its tensor.
        new: list of str, paths of the weights that the checkpoint lacks, as they were initialised.
        left: list of str, names and shapes of the tensors that the model has no place for.
        labels: dict, number of a class as a str -> its name, by number, as config.json tells.
    """

    copied: dict
    new: list
    left: list
    labels: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        lines = [f"{len(self.copied)} weights were read"]
        lines += [f"new, not in the checkpoint: {', '.join(self.new)}"] * bool(self.new)
        lines += [f"left out of the checkpoint: {', '.join(self.left)}"] * bool(self.left)
        return "; ".join(lines) + "."


@dataclasses.dataclass(frozen=True)
class Form:
    """How one family of files names and lays out the weights.

    Attributes:
        name: function of a weight's path, such as "encoder/block_0/attention/query/kernel", -> name of its tensor.
        turned: function of a path -> whether the matrix is (in, out) here and (out, in) there.
        encoder: tuple of str, what the names of the encoder's tensors begin with.
    """

    name: Callable
    turned: Callable
    encoder: tuple


def huggingface_name(path):
    """The name of a weight's tensor without "bert.".

    Raises:
        ValueError: if it has none.
    """
    *parts, last = path.removeprefix("encoder/").split("/")
    block = re.fullmatch(r"block_(\d+)", parts[0]) if parts else None
    part = PARTS.get("/".join(parts[1:] if block else parts))
    if part is None or last not in LAST:
        raise ValueError(f"{path} has no name in Hugging Face's BERT.")
    return f"encoder.layer.{block[1]}.{part}.{LAST[last]}" if block else f"{part}.{LAST[last]}"


def check_kind(kind):
    """Raises ValueError unless this is None or a class."""
    if kind is not None and not isinstance(kind, type):
        raise ValueError(
            "kind must be a class: llmfound.models.BERT, BERTPretraining, BERTClassifier, BERTTokenClassifier, "
            f"BERTQuestionAnswering, BERTMultipleChoice, or one on these; got {kind!r}."
        )


def check_plain(part, known):
    """Raises ValueError if a model or an encoder of a known class computes in a way of its own."""
    own = [name for name in OF_COMPUTING if hasattr(known, name) and overrides(part, known, name)]
    if own:
        raise ValueError(
            f"{type(part).__name__} has its own {' and '.join(own)}: written as a {known.__name__}, its weights would "
            f"give other results. A plain {known.__name__} can take them by get_weights and set_weights."
        )


def own_path(weight):
    """The path of a weight without the model's own name."""
    return weight.path.split("/", 1)[1]


def paths(model):
    """{path without the model's own name: variable} of all weights."""
    return {own_path(weight): weight for weight in model.weights}


def values(model, name=own_path):
    """{name of a weight: array} of all weights, float32, with the factors of LoRA in what they adapt.

    Raises:
        ValueError: if a layer is quantized.
    """
    merged, factors = {}, set()
    for layer in model._flatten_layers():
        if layer.quantization_mode is not None:
            raise ValueError(f"{layer.path} is quantized, {layer.quantization_mode}; take the model as it was before.")
        for part in ("kernel", "embeddings") if getattr(layer, "lora_enabled", False) else ():
            if hasattr(layer, f"lora_{part}_a"):
                merged[id(getattr(layer, f"_{part}"))] = getattr(layer, part)
                factors |= {id(getattr(layer, f"lora_{part}_{side}")) for side in "ab"}
    return {name(weight): ops.convert_to_numpy(ops.cast(merged.get(id(weight), weight), "float32"))
            for weight in model.weights if id(weight) not in factors}  # fmt: skip


def read(source, form, tensors, config, kind=None, num_classes=None, dtype=None, classifier=None):
    """A model made of tensors.

    Args:
        source: path, for messages.
        form: Form.
        tensors: dict, name -> array, in the form's names.
        config: dict of Hugging Face's entries, and ours for "hidden_act".
        kind, num_classes, dtype: as in `from_huggingface`.
        classifier: class of llmfound.models that a head with the name of a classifier belongs to; None if unknown.

    Returns:
        The model, with its `conversion`.

    Raises:
        ValueError: as `from_huggingface`.
    """
    check_kind(kind)
    tensors = {name: x.astype("float32", copy=False) if x.dtype.kind in "fV" else x for name, x in tensors.items()}
    _check_sizes(source, form, tensors, config)
    strict = kind is None
    model = _model(kind or _kind(source, form, tensors, classifier), form, tensors, config, num_classes, dtype)
    weights = paths(model)
    table = {path: form.name(path) for path in weights}
    used = {name: tensors[name].dtype for name in table.values() if name in tensors}
    whole = [f"{name} is {dtype}" for name, dtype in used.items() if dtype.kind != "f"]
    if whole:
        raise ValueError(f"{source}: weights must be real numbers, and {'; '.join(whole[:5])}.")
    surplus = [name for name in tensors if name not in table.values() and not name.startswith(form.encoder)]
    left, new, kept = surplus, [], {}
    if strict:  # files of heads that need no pooler often have one
        left = [name for name in surplus if name in map(form.name, POOLER)]
    else:
        there = {"encoder", *(_head(path) for path, name in table.items() if name in tensors)}
        new = sorted(path for path in table if _head(path) not in there)
        kept = {path: ops.convert_to_numpy(weights[path]) for path in new}
    entries = {path: ((name,), np.transpose if form.turned(path) else np.asarray) for path, name in table.items()}
    try:
        assign(model, {**tensors, **kept}, {**entries, **{path: path for path in kept}}, ignore=left)
    except ValueError as error:
        lacking = [name for name in table.values() if name not in tensors and not name.startswith(form.encoder)]
        if strict and (surplus != left or (lacking and type(model) is not models.BERT)):
            raise ValueError(f"{error} {ADVICE}") from None
        raise
    copied = {path: name for path, name in table.items() if path not in kept}
    told = {} if new else config.get("id2label", {})
    labels = {i: told[i] for i in sorted(told, key=lambda i: (len(i), i))}  # by number
    if hasattr(model, "classes") and not new:
        model.tell(id2label=labels, problem_type=config.get("problem_type"))
    model.conversion = Conversion(copied, new, [f"{name} {tensors[name].shape}" for name in left], labels)
    if new or left:
        warnings.warn(f"{source}: {model.conversion}", stacklevel=3)
    return model


def read_json(path):
    """The object in a JSON file.

    Raises:
        FileNotFoundError: if it is missing; what is there is named.
        ValueError: if it is something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {listing(path.parent)}.")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, but {str(found)[:40]}.")
    return found


def read_config(path, activations, folder):
    """The entries of a config.json or bert_config.json that are not null, "hidden_act" as our name of it.

    A padding token that they do not tell is [PAD] of the vocabulary in the folder, or else 0.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not JSON, lacks sizes, or has an entry that cannot be.
    """
    config = {name: value for name, value in read_json(path).items() if value is not None}
    missing = [name for name in SIZES.values() if name not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    config.setdefault("pad_token_id", _padding(folder))
    for name, default in [*((name, 1) for name in SIZES.values()), *REST.values()]:
        value = config.setdefault(name, default)
        right = type(value) in (int, float) if type(default) is float else type(value) is type(default)
        if not right:
            raise ValueError(f"{path}: {name} must be of the kind of {default!r}; got {value!r}.")
    if type(config.get("classifier_dropout", 0.1)) not in (int, float):
        raise ValueError(f"{path}: classifier_dropout must be a number or null; got {config['classifier_dropout']!r}.")
    if type(config.get("id2label", {})) is not dict:
        raise ValueError(f"{path}: id2label must be an object; got {config['id2label']!r}.")
    if config.setdefault("hidden_act", "gelu") not in list(activations):  # of a list, which has no hash, too
        raise ValueError(f"hidden_act must be one of {', '.join(activations)}; got {config['hidden_act']!r}.")
    return {**config, "hidden_act": activations[config["hidden_act"]]}


def _padding(folder):
    words = folder / "vocab.txt"
    if words.exists():
        found = words.read_bytes().splitlines()
        return found.index(b"[PAD]") if b"[PAD]" in found else 0
    model = read_json(folder / "tokenizer.json").get("model") if (folder / "tokenizer.json").exists() else None
    pieces = model.get("vocab") if isinstance(model, dict) else None
    return pieces.get("[PAD]", 0) if isinstance(pieces, dict) else 0


def listing(folder):
    """What a folder has, in words."""
    if not folder.is_dir():
        return "there is no such folder"
    return f"the folder has {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}"


def _head(path):
    return path.partition("/")[0]


def _check_sizes(source, form, tensors, config):
    """Before a model of these sizes is made."""
    for entry, (path, axis) in TOLD_BY.items():
        name = form.name(path)
        if name in tensors and (tensors[name].ndim <= axis or tensors[name].shape[axis] != config[entry]):
            raise ValueError(f"{source}: {entry} is {config[entry]}, and {name} is {tensors[name].shape}.")
    last = form.name(f"encoder/block_{config['num_hidden_layers'] - 1}/attention/query/kernel")
    if config["num_hidden_layers"] > 0 and last not in tensors:
        raise ValueError(f"{source}: num_hidden_layers is {config['num_hidden_layers']}, and {last} is missing.")


def _kind(source, form, tensors, classifier):
    """The class of the model that has these tensors."""

    def there(path):
        return form.name(path) in tensors

    if there("span/kernel"):
        return models.BERTQuestionAnswering
    if there("masked_lm/bias") or there("next_sentence/kernel"):
        return models.BERTPretraining
    if there("classes/kernel") and classifier is None:
        raise ValueError(
            f"{source}: there is a classifier, and config.json's architectures do not tell of what; give "
            "kind=BERTClassifier, BERTTokenClassifier or BERTMultipleChoice."
        )
    return classifier if there("classes/kernel") else models.BERT


def _model(kind, form, tensors, config, num_classes, dtype):
    options = {ours: config[theirs] for ours, theirs in SIZES.items()}
    options |= {ours: config[theirs] for ours, (theirs, _) in REST.items()}
    with not_drawn():
        bert = models.BERT(**options, activation=config["hidden_act"], dtype=dtype)
    if form.name("pooler/dense/kernel") not in tensors:
        kernel = bert.pooler.dense.kernel
        kernel.assign(normal()(kernel.shape, kernel.dtype))
    policy = dict(dtype=dtype)
    if issubclass(kind, models.BERT):
        return bert
    if issubclass(kind, models.BERTPretraining):
        return kind(bert, next_sentence=form.name("next_sentence/kernel") in tensors, **policy)
    if issubclass(kind, models.BERTQuestionAnswering):
        return kind(bert, **policy)
    rate = config.get("classifier_dropout")
    policy["dropout"] = options["dropout"] if rate is None else rate
    if issubclass(kind, models.BERTMultipleChoice):
        return kind(bert, **policy)
    there = tensors.get(form.name("classes/kernel"))
    if num_classes is None and there is None:
        raise ValueError(f"The file has no classifier; give num_classes for a new {kind.__name__}.")
    if num_classes is not None and there is not None and there.shape[:1] != (num_classes,):
        raise ValueError(
            f"The file's classifier is {there.shape}; got num_classes={num_classes}. For a new one, read the file with "
            f"kind=llmfound.models.BERT, and make a {kind.__name__} of that."
        )
    return kind(bert, len(there) if num_classes is None else num_classes, **policy)

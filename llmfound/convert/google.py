"""BERT's checkpoints of its authors, bert_config.json and TensorFlow's files, without TensorFlow. Source: the names of
google-research/bert."""

import re
from pathlib import Path

from llmfound import models
from llmfound.convert.bert import Form, huggingface_name, listing, read, read_config
from llmfound.convert.bundle import read_bundle

ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "tanh": "tanh"}
HEADS = {"masked_lm/bias": "cls/predictions/output_bias", "next_sentence": "cls/seq_relationship/output_",
         "classes": "output_", "score": "output_", "span": "cls/squad/output_"}  # fmt: skip


def google_name(path):
    """The name of a weight's tensor: bert/encoder/layer_0/attention/self/query/kernel, for instance."""
    head, last = path.split("/", 1)[0], path.rsplit("/", 1)[-1]
    if path in HEADS:
        return HEADS[path]
    if head in HEADS:
        return HEADS[head] + {"kernel": "weights", "bias": "bias"}[last]
    module = re.sub(r"layer\.(\d+)", r"layer_\1", huggingface_name(path)).rsplit(".", 1)[0].replace(".", "/")
    module = module if module.startswith("cls/") else f"bert/{module}"
    return module if last == "embeddings" else f"{module}/{last}"


PASSED_OVER = "global_step", "_CHECKPOINTABLE_OBJECT_GRAPH"
FORM = Form(google_name, lambda path: path.endswith("/kernel") and path.split("/")[0] in HEADS,
            ("bert/embeddings/", "bert/encoder/"))  # fmt: skip


def from_google(path, kind=None, num_classes=None, dtype=None, config=None):
    """The model of a checkpoint in the authors' form, pre-trained or fine-tuned by their code.

        bert = llmfound.convert.from_google("uncased_L-2_H-128_A-2", llmfound.models.BERT)

    Without `kind`, every tensor must have its place, but for a pooler that the head has no use for, and output_weights
    are of a BERTClassifier; all else is as in `from_huggingface`. Their GELU is the tanh form. What their optimizer
    keeps is passed over.

    Args:
        path: the folder, or the path of its files without .index, such as FOLDER/bert_model.ckpt.
        kind: class of llmfound.models, BERT or one on it.
        num_classes: int, of a new BERTClassifier or BERTTokenClassifier.
        dtype: dtype policy of the model; None takes Keras's.
        config: path of bert_config.json, if it stands elsewhere, as it does with what was fine-tuned.

    Returns:
        A model of `kind`, whose `conversion` tells what went where.

    Raises:
        FileNotFoundError: if a file is missing; what is there is named.
        ValueError: if bert_config.json is none, a file is truncated, damaged or of TensorFlow 2's Keras, the folder has
            several checkpoints, or more words in its vocab.txt than the model, or tensors are missing, left over, or of
            other shapes.
    """
    prefix = _prefix(Path(path))
    settings = read_config(Path(config) if config else prefix.with_name("bert_config.json"), ACTIVATIONS,
                           prefix.parent)  # fmt: skip
    vocabulary = prefix.with_name("vocab.txt")
    words = len(vocabulary.read_bytes().rstrip().split(b"\n")) if vocabulary.exists() else 0
    if words > settings["vocab_size"]:
        raise ValueError(f"{vocabulary} has {words} pieces, more than the vocab_size {settings['vocab_size']}.")
    tensors = read_bundle(prefix, lambda name: name in PASSED_OVER or name.endswith(("/adam_m", "/adam_v")))
    if any(name.endswith("/.ATTRIBUTES/VARIABLE_VALUE") for name in tensors):
        raise ValueError(
            f"{prefix}.index is of TensorFlow 2's Keras, whose names tell objects, such as {next(iter(tensors))}; the "
            "checkpoints of the authors' code, https://github.com/google-research/bert, can be read."
        )
    return read(prefix, FORM, tensors, settings, kind, num_classes, dtype, models.BERTClassifier)


def _prefix(path):
    if not path.is_dir():
        prefix = path.with_name(path.name.removesuffix(".index"))
        if not Path(f"{prefix}.index").exists():
            raise FileNotFoundError(f"{prefix}.index does not exist; {listing(path.parent)}.")
        return prefix
    found = [p.with_suffix("") for p in sorted(path.glob("*.index"))]
    if not found:
        raise FileNotFoundError(f"{path} has no checkpoint, which ends in .index; {listing(path)}.")
    if len(found) > 1:
        raise ValueError(f"{path} has several checkpoints, {', '.join(p.name for p in found)}; give the path of one.")
    return found[0]

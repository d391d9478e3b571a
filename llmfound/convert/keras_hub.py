"""BERT from and to KerasHub's backbone. Source: the names and shapes of its version 0.32."""

import re
import warnings

import numpy as np

from llmfound import models
from llmfound.convert.assign import assign
from llmfound.convert.bert import Form, check_plain, read, values
from llmfound.ops import gelu_tanh

PARTS = {
    "embedding_norm": "embeddings_layer_norm", "attention/query": "self_attention_layer/query",
    "attention/key": "self_attention_layer/key", "attention/value": "self_attention_layer/value",
    "attention/output": "self_attention_layer/attention_output", "attention_norm": "self_attention_layer_norm",
    "feedforward/expand": "feedforward_intermediate_dense", "feedforward/contract": "feedforward_output_dense",
    "feedforward_norm": "feedforward_layer_norm", "pooler/dense": "pooled_dense",
}  # fmt: skip
ENCODER = (
    "token_embedding/",
    "segment_embedding/",
    "position_embedding/",
    "embeddings_layer_norm/",
    "transformer_layer_",
)


def keras_hub_name(path):
    """The path of a weight in the backbone: transformer_layer_0/self_attention_layer/query/kernel, for instance."""
    *parts, last = path.removeprefix("encoder/").split("/")
    block = re.fullmatch(r"block_(\d+)", parts[0])
    part = "/".join(parts[1:] if block else parts)
    name = f"{PARTS.get(part, part)}/{last}"
    return f"transformer_layer_{block[1]}/{name}" if block else name


FORM = Form(keras_hub_name, lambda path: False, ENCODER)


def from_keras_hub(backbone, kind=None, num_classes=None, dtype=None):
    """A model with the weights of a keras_hub.models.BertBackbone, whose GELU is the tanh form.

    What LoRA has learned is read with the weights that it adapts.

        backbone = keras_hub.models.BertBackbone.from_preset("bert_tiny_en_uncased")
        bert = llmfound.convert.from_keras_hub(backbone)

    Args:
        backbone: the backbone.
        kind: class of llmfound.models, whose head is new, which a warning tells; None is BERT.
        num_classes: int, of a new BERTClassifier or BERTTokenClassifier.
        dtype: dtype policy of the model; None takes Keras's.

    Returns:
        A model of `kind`, whose `conversion` tells what went where.

    Raises:
        ValueError: if it is no backbone of BERT, it is quantized, or a weight is missing, left over, or does not fit.
    """
    if "BertBackbone" not in [base.__name__ for base in type(backbone).__mro__]:
        raise ValueError(f"This must be a keras_hub.models.BertBackbone; got {type(backbone).__name__}.")
    hub = backbone.get_config()
    config = dict(
        vocab_size=hub["vocabulary_size"], num_hidden_layers=hub["num_layers"], hidden_size=hub["hidden_dim"],
        num_attention_heads=hub["num_heads"], intermediate_size=hub["intermediate_dim"], hidden_act="gelu_tanh",
        hidden_dropout_prob=hub["dropout"], attention_probs_dropout_prob=hub["dropout"],
        max_position_embeddings=hub["max_sequence_length"], type_vocab_size=hub["num_segments"], pad_token_id=0,
        layer_norm_eps=1e-12, is_decoder=False,
    )  # fmt: skip
    tensors = {name: _flat(name, array) for name, array in values(backbone, _name).items()}
    return read(f"{type(backbone).__name__} {backbone.name!r}", FORM, tensors, config, kind, num_classes, dtype)


def to_keras_hub(model):
    """A keras_hub.models.BertBackbone with the weights of a model's encoder and pooler.

    The backbone's GELU is the tanh form: a model with the exact one gets a warning, as the results of each activation
    differ by up to 5e-4. Weights of other heads have no place there, which a warning tells, too.

    Args:
        model: BERT, or one on it that has a pooler.

    Raises:
        ImportError: if KerasHub is missing.
        ValueError: if the model has no pooler, or is in another way not what the backbone computes.
    """
    if not isinstance(getattr(model, "encoder", None), models.BERTEncoder) or not hasattr(model, "pooler"):
        raise ValueError(f"A backbone is made of a BERT, or a model on one with a pooler; got {type(model).__name__}.")
    check_plain(model.encoder, models.BERTEncoder)
    encoder, block = model.encoder, model.encoder.blocks[0]
    plain, dropout = models.BERTEncoder.block_class, encoder.dropout.rate
    wrong = {
        f"blocks like {type(block).__name__}": type(block) is not plain,
        "causal mask": block.attention.causal,
        f"activation {encoder.activation!r}": encoder.activation not in ("gelu", gelu_tanh),
        f"epsilon of {encoder.epsilon}": encoder.epsilon != 1e-12,
        f"dropouts {dropout} and, of attention, {block.attention.dropout.rate}": block.attention.dropout.rate
        != dropout,
    }
    if any(wrong.values()):
        raise ValueError(
            f"The backbone has no {', and no '.join(what for what, is_so in wrong.items() if is_so)}: its blocks are "
            f"{plain.__name__} with GELU, epsilon 1e-12 and one dropout for all."
        )
    try:
        from keras_hub.models import BertBackbone
    except ImportError as error:
        raise ImportError("This needs KerasHub: pip install llmfound[hub]") from error
    backbone = BertBackbone(
        vocabulary_size=encoder.token_embedding.input_dim, num_layers=len(encoder.blocks),
        num_heads=block.attention.num_heads, hidden_dim=encoder.hidden_dim,
        intermediate_dim=block.feedforward.expand.units, dropout=dropout, max_sequence_length=encoder.max_length,
        num_segments=encoder.segment_embedding.input_dim, dtype=encoder.dtype_policy,
    )  # fmt: skip
    weights = values(model)
    heads = [path for path in weights if path.partition("/")[0] not in ("encoder", "pooler")]
    tensors = {keras_hub_name(path): array for path, array in weights.items() if path not in heads}
    table = {_name(weight): ((_name(weight),), _shaped(tuple(weight.shape))) for weight in backbone.weights}
    assign(backbone, tensors, table)
    if encoder.activation == "gelu":
        warnings.warn("KerasHub's GELU is the tanh form, and this model's the exact one.", stacklevel=2)
    if heads:
        warnings.warn(f"KerasHub's backbone has no place for {', '.join(heads)}.", stacklevel=2)
    return backbone


def _name(weight):
    """The path of a weight without what may stand before it in a loaded or nested backbone."""
    found = re.search(rf"(?:^|/)((?:{'|'.join(ENCODER)}|pooled_dense/).*)$", weight.path)
    return found[1] if found else weight.path


def _flat(name, array):
    """With all heads side by side."""
    if "/self_attention_layer/" not in name or "/attention_output/bias" in name:
        return array
    return array.reshape((-1, array.shape[-1]) if "/attention_output/" in name else (*array.shape[:-2], -1))


def _shaped(shape):
    return lambda array: np.reshape(array, shape)

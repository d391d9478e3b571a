"""BERT: a Transformer that reads in both directions, its pre-training, and what it is fine-tuned to.

Source: Devlin, Chang, Lee, Toutanova 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", and the authors' code."""

import operator

import numpy as np
from keras import ops

from llmfound.base import Layer, Model, is_known, overrides
from llmfound.initializers import TruncatedNormal
from llmfound.layers import (
    Dense,
    Dropout,
    Embedding,
    FirstTokenPooler,
    LayerNormalization,
    MaskedLMHead,
    PositionEmbedding,
    PostLNBlock,
)
from llmfound.ops import gather_positions, gelu_tanh, padding_mask

EPSILON = 1e-12
ACTIVATIONS = {"gelu_tanh": gelu_tanh}  # beside those that Keras knows by name


def normal():
    """The authors' start of every matrix: normal, deviation 0.02, drawn again beyond two deviations."""
    return TruncatedNormal(stddev=0.02)


def size(num_layers, hidden_dim):
    """Sizes by the authors' rule: heads 64 wide, networks inside the blocks four times as wide as the blocks."""
    return dict(
        num_layers=num_layers, hidden_dim=hidden_dim, num_heads=hidden_dim // 64, intermediate_dim=4 * hidden_dim
    )


class BERTEncoder(Layer):
    """The vectors of all tokens, from embeddings and a stack of Post-LN blocks.

    x = Dropout(LayerNorm(E[token] + S[segment] + P[position]));  h = blocks(x)
    Source: section 3.2 and figure 2; blocks, Vaswani et al. 2017, with biases and dropout on the attention weights.

    Args: those of BERT.

    Call arguments:
        token_ids: int (batch, length).
        segment_ids: int (batch, length), 0 or 1; None is 0 everywhere.
        mask: bool or int (batch, length), True at the tokens that are attended to; None takes all but pad_id.
        places: int (batch, n), the tokens whose vectors are wanted; None is all. Of others the last block computes no
            more than their keys and values: a sixth of it.

    Returns:
        float (batch, length, hidden_dim), or (batch, n, hidden_dim).
    """

    block_class = PostLNBlock
    repeated_in_parts = True

    def __init__(self, vocab_size, num_layers=12, hidden_dim=768, num_heads=12, intermediate_dim=3072, dropout=0.1,
                 attention_dropout=0.1, activation="gelu", max_length=512, num_segments=2, pad_id=0, causal=False,
                 epsilon=EPSILON, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        sizes = dict(vocab_size=vocab_size, num_layers=num_layers, max_length=max_length, num_segments=num_segments)
        if min(sizes.values()) <= 0:
            raise ValueError(f"Sizes must be positive; got {sizes}.")
        policy = dict(dtype=self.dtype_policy)
        self.hidden_dim, self.activation, self.epsilon = hidden_dim, ACTIVATIONS.get(activation, activation), epsilon
        self.max_length = max_length
        self.pad_id = pad_id
        self.supports_masking = True
        self.token_embedding = Embedding(vocab_size, hidden_dim, normal(), name="token_embedding", **policy)
        self.segment_embedding = Embedding(num_segments, hidden_dim, normal(), name="segment_embedding", **policy)
        self.position_embedding = PositionEmbedding(max_length, normal(), name="position_embedding", **policy)
        self.embedding_norm = LayerNormalization(epsilon=epsilon, name="embedding_norm", **policy)
        self.dropout = Dropout(dropout, name="dropout", **policy)
        self.blocks = [
            self.block_class(hidden_dim, num_heads, intermediate_dim, dropout, attention_dropout,
                             activation=self.activation, use_bias=True, causal=causal, epsilon=epsilon,
                             kernel_initializer=normal(), name=f"block_{i}", **policy)
            for i in range(num_layers)
        ]  # fmt: skip

    @property
    def embeddings(self):
        """The matrix of the token embedding, (vocab_size, hidden_dim)."""
        return self.token_embedding.embeddings

    def embed(self, token_ids, segment_ids=None, training=None):
        """What the first block reads, float (batch, length, hidden_dim)."""
        segment_ids = ops.zeros_like(token_ids) if segment_ids is None else segment_ids
        x = self.position_embedding(self.token_embedding(token_ids) + self.segment_embedding(segment_ids))
        return self.dropout(self.embedding_norm(x), training=training)

    def compute_mask(self, inputs, mask=None):
        return None  # the last block's result brings its own, which that of some places has not

    def call(self, token_ids, segment_ids=None, mask=None, training=None, places=None):
        mask = padding_mask(token_ids, self.pad_id) if mask is None else mask
        x = self.embed(token_ids, segment_ids, training)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask=mask, training=training)
        if places is None:
            return last(x, mask=mask, training=training)
        if getattr(last, "row_by_row", bool)():
            return last(gather_positions(x, places), context=x, context_mask=mask, training=training)
        return gather_positions(last(x, mask=mask, training=training), places)

    def layer_groups(self):
        embedding = [self.token_embedding, self.segment_embedding, self.position_embedding, self.embedding_norm]
        return [embedding, *([block] for block in self.blocks)]


class _OnEncoder(Model):
    """What all models on a BERTEncoder share. A subclass adds the encoder by `take`, and what stands above it.

    Attributes:
        told: dict, what the checkpoint of a head told of its classes and nothing here reads; files keep it.
    """

    told = {}

    @property
    def pad_id(self):
        return self.encoder.pad_id

    def tell(self, **told):
        object.__setattr__(self, "told", told)  # past Keras's tracking of attributes

    def get_config(self):
        return {**super().get_config(), **({"told": self.told} if self.told else {})}

    @classmethod
    def from_config(cls, config):
        model = super().from_config({name: value for name, value in config.items() if name != "told"})
        model.tell(**config.get("told", {}))
        return model

    def take(self, bert, pooler=False):
        """Shares the encoder of a BERT or of another model on one, and its pooler, or makes a new pooler."""
        self.encoder = getattr(bert, "encoder", bert)
        if not isinstance(self.encoder, BERTEncoder):
            raise ValueError(f"The first argument must be a BERT, or another model on one; got {bert!r}.")
        if (
            pooler
            and self.encoder.blocks[0].attention.causal
            and not (isinstance(self, BERT) or overrides(self, _OnEncoder, "pool"))
        ):
            raise ValueError(
                f"{type(self).__name__} reads the first token, which sees nothing of the text in a causal BERT: all "
                "texts would get the same. Take a BERT with causal=False, for pre-training next_sentence=False, or a "
                "subclass whose `pool` reads another token."
            )
        if pooler:
            found = getattr(bert, "pooler", None)
            self.pooler = found or FirstTokenPooler(
                self.encoder.hidden_dim, normal(), name="pooler", dtype=self.dtype_policy
            )

    def head(self, units, name):
        return Dense(units, kernel_initializer=normal(), name=name, dtype="float32")

    def input_signature(self):
        return {"token_ids": (None,)}

    def optional_inputs(self):
        return {"segment_ids": (None,), "mask": (None,)}

    def input_limits(self):
        return {"token_ids": self.encoder.token_embedding.input_dim,
                "segment_ids": self.encoder.segment_embedding.input_dim}  # fmt: skip

    def check_inputs(self, inputs):
        super().check_inputs(inputs)
        ids = inputs.get("token_ids")
        if ids is None:
            return
        length = ids.shape[-1]
        if is_known(length) and length > self.encoder.max_length:
            raise ValueError(
                f"A text of {length} tokens is longer than the table of positions ({self.encoder.max_length}); "
                f"cut it, read it in windows, or build the model with max_length={length}."
            )
        for name in ("segment_ids", "mask"):
            x = inputs.get(name)
            if x is not None and tuple(x.shape) != tuple(ids.shape):
                raise ValueError(f"{name} must have the shape of token_ids, {tuple(ids.shape)}; got {tuple(x.shape)}.")

    def encode(self, inputs, training=None, places=None):
        """The vectors of all tokens, float (batch, length, hidden_dim), or of those at int places (batch, n)."""
        ids, segments, mask = (inputs.get(name) for name in ("token_ids", "segment_ids", "mask"))
        return self.encoder(ids, segment_ids=segments, mask=mask, training=training, places=places)

    def pool(self, inputs, training=None):
        """The vectors of the whole texts, float (batch, hidden_dim), for which the last block reads one token."""
        return self.pooler(self.encode(inputs, training, ops.zeros_like(inputs["token_ids"][:, :1])))

    def layer_groups(self):
        """Lists of layers, bottom to top: the embeddings, each block, and what stands above them."""
        groups = self.encoder.layer_groups()
        above = [layer for layer in self.layers if layer is not self.encoder and layer.weights]
        return [*groups, above] if above else groups


class BERT(_OnEncoder):
    """The encoder with its pooler, to be pre-trained, fine-tuned, or read for its features.

    Source: section 3. The defaults are BERT-base; other sizes, `BERT(vocab_size, **BERT.LARGE)`.

    Args:
        vocab_size: Number of word pieces (V).
        num_layers: Blocks (L).
        hidden_dim: Width (H).
        num_heads: Attention heads (A).
        intermediate_dim: Width inside the feed-forward networks (4H).
        dropout: On the sum of embeddings and each sub-layer's output.
        attention_dropout: On the attention weights.
        activation: "gelu", the exact form, as in Hugging Face's checkpoints, or "gelu_tanh", as in the authors' code;
            or any other of Keras.
        max_length: Longest text, in pieces.
        num_segments: Kinds of segments, A and B.
        pad_id: Piece that fills up short texts.
        causal: Whether a token sees only those before it and itself: the left-to-right model of table 5.
        epsilon: Of the layer norms.

    Call arguments:
        inputs: dict of int "token_ids" (batch, length), and if wanted "segment_ids" (batch, length), 0 for A and 1 for
            B (all 0 without them), and "mask" (batch, length), 1 at the tokens that are attended to (without it all
            but pad_id); or token_ids alone.

    Returns:
        dict: "sequence", float (batch, length, hidden_dim), the vectors of all tokens, and "pooled", float (batch,
        hidden_dim), that of the whole text.

    Raises:
        ValueError: if sizes do not fit together, ids are not integers of rank 2 within the vocabulary, or a text is
            longer than max_length.
    """

    BASE = size(12, 768)
    LARGE = size(24, 1024)
    # Turc et al. 2019, "Well-Read Students Learn Better", table 1; of their 24 these have names.
    TINY, MINI, SMALL, MEDIUM = size(2, 128), size(4, 256), size(4, 512), size(8, 512)
    MINIATURES = {(n, h): size(n, h) for n in (2, 4, 6, 8, 10, 12) for h in (128, 256, 512, 768)}

    def __init__(self, vocab_size, num_layers=12, hidden_dim=768, num_heads=12, intermediate_dim=3072, dropout=0.1,
                 attention_dropout=0.1, activation="gelu", max_length=512, num_segments=2, pad_id=0, causal=False,
                 epsilon=EPSILON, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        encoder = BERTEncoder(vocab_size, num_layers, hidden_dim, num_heads, intermediate_dim, dropout,
                              attention_dropout, activation, max_length, num_segments, pad_id, causal, epsilon,
                              name="encoder", dtype=self.dtype_policy)  # fmt: skip
        self.take(encoder, pooler=True)

    def call(self, inputs, training=None):
        sequence = self.encode(inputs, training)
        return {"sequence": sequence, "pooled": self.pooler(sequence)}


class BERTPretraining(_OnEncoder):
    """Predicts masked words, and whether the second segment follows the first in its document.

    masked_lm = MaskedLMHead(h);  next_sentence = p W + b
    Loss = mean cross-entropy of the masked words + mean cross-entropy of the pairs. Source: section 3.1.

    Args:
        bert: BERT, whose weights are shared, so that it is trained too.
        next_sentence: whether to predict the second; without it (table 5, "No NSP") there is no pooler either.

    Call arguments:
        inputs: as BERT's, and int "masked_positions" (batch, n), the places of the masked words; unused ones may hold
            any place.

    Returns:
        dict: "masked_lm", logits float32 (batch, n, vocab_size), and "next_sentence", logits float32 (batch, 2), of
        class 0, it is next, and 1, it is not.
    """

    def __init__(self, bert, next_sentence=True, **kwargs):
        super().__init__(**kwargs)
        self.take(bert, pooler=next_sentence)
        encoder = self.encoder
        self.masked_lm = MaskedLMHead(encoder.token_embedding.input_dim, encoder.hidden_dim, encoder.activation,
                                      encoder.epsilon, name="masked_lm", dtype=self.dtype_policy)  # fmt: skip
        self.next_sentence = self.head(2, "next_sentence") if next_sentence else None

    def input_signature(self):
        return {"token_ids": (None,), "masked_positions": (None,)}

    def check_inputs(self, inputs):
        super().check_inputs(inputs)
        ids, places = inputs.get("token_ids"), inputs.get("masked_positions")
        if isinstance(places, np.ndarray) and ids is not None and places.max() >= ids.shape[1]:
            raise ValueError(f"masked_positions must be 0 to {ids.shape[1] - 1}; got up to {places.max()}.")

    def call(self, inputs, training=None):
        places = inputs["masked_positions"]
        if self.next_sentence is None:
            return {"masked_lm": self.masked_lm(self.encode(inputs, training, places), None, self.encoder.embeddings)}
        rows = self.encode(inputs, training, ops.pad(places, [[0, 0], [1, 0]]))  # and the first token
        return {"masked_lm": self.masked_lm(rows[:, 1:], None, self.encoder.embeddings),
                "next_sentence": self.next_sentence(self.pooler(rows))}  # fmt: skip


class BERTClassifier(_OnEncoder):
    """Classifies a text or a pair of texts, or gives it a score.

    logits = Dropout(p) W + b.  Source: section 4.1.

    Args:
        bert: BERT, whose weights are shared; not a causal one, whose first token sees nothing of the text.
        num_classes: Number of classes (K); 1 for a score (regression).
        dropout: On the pooled vector.

    Call arguments:
        inputs: as BERT's.

    Returns:
        Logits, float32 (batch, num_classes).

    Raises:
        ValueError: if `num_classes` is not positive, the BERT is causal, or as in BERT.
    """

    def __init__(self, bert, num_classes, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        if num_classes <= 0:
            raise ValueError(f"num_classes must be positive; got {num_classes}.")
        self.take(bert, pooler=True)
        self.dropout = Dropout(dropout, name="dropout", dtype=self.dtype_policy)
        self.classes = self.head(operator.index(num_classes), "classes")

    def call(self, inputs, training=None):
        return self.classes(self.dropout(self.pool(inputs, training), training=training))


class BERTTokenClassifier(_OnEncoder):
    """Classifies every token, for instance as part of a name.

    logits = Dropout(h) W + b.  Source: section 5.3.

    Args, errors: as in BERTClassifier; the dropout is on each token's vector.

    Returns:
        Logits, float32 (batch, length, num_classes).
    """

    def __init__(self, bert, num_classes, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        if num_classes <= 0:
            raise ValueError(f"num_classes must be positive; got {num_classes}.")
        self.take(bert)
        self.dropout = Dropout(dropout, name="dropout", dtype=self.dtype_policy)
        self.classes = self.head(operator.index(num_classes), "classes")

    def call(self, inputs, training=None):
        return self.classes(self.dropout(self.encode(inputs, training), training=training))


class BERTQuestionAnswering(_OnEncoder):
    """Finds the first and the last token of the answer to a question, segment A, in a text, segment B.

    [s; e] = h W + b, softmax over all tokens.  Source: section 4.2.

    Args:
        bert: BERT, whose encoder is shared.

    Call arguments:
        inputs: as BERT's.

    Returns:
        Logits, float32 (batch, 2, length): of the first token, and of the last. With labels int (batch, 2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True) is the mean of the two cross-entropies.
    """

    def __init__(self, bert, **kwargs):
        super().__init__(**kwargs)
        self.take(bert)
        self.span = self.head(2, "span")

    def call(self, inputs, training=None):
        return ops.transpose(self.span(self.encode(inputs, training)), (0, 2, 1))


class BERTMultipleChoice(_OnEncoder):
    """Chooses among several pairs of texts the likeliest.

    score_i = Dropout(p_i) . v + b, softmax over the choices.  Source: section 4.4.

    Args:
        bert: BERT, whose weights are shared.
        dropout: On the pooled vectors.

    Call arguments:
        inputs: as BERT's, each of shape (batch, choices, length).

    Returns:
        Logits, float32 (batch, choices).
    """

    def __init__(self, bert, dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        self.take(bert, pooler=True)
        self.dropout = Dropout(dropout, name="dropout", dtype=self.dtype_policy)
        self.score = self.head(1, "score")

    def input_signature(self):
        return {"token_ids": (None, None)}

    def optional_inputs(self):
        return {"segment_ids": (None, None), "mask": (None, None)}

    def call(self, inputs, training=None):
        _, choices, length = ops.shape(inputs["token_ids"])
        rows = {name: ops.reshape(x, (-1, length)) for name, x in inputs.items() if x is not None}
        pooled = self.dropout(self.pool(rows, training), training=training)
        return ops.reshape(self.score(pooled), (-1, choices))

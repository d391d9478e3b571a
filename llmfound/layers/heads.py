"""What stands on top of an encoder."""

import functools

from keras import activations, layers, ops

from llmfound import kernels
from llmfound.base import Layer
from llmfound.initializers import TruncatedNormal
from llmfound.layers.dropout import Dropout
from llmfound.layers.feedforward import Dense
from llmfound.layers.normalization import LayerNormalization
from llmfound.ops import concat_pool, gather_positions


class Head(Layer):
    """What stands on an encoder: it may use a mask, and its output has none."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def compute_mask(self, inputs, mask=None):
        return None


class MaskedLMHead(Head):
    """Predicts the tokens at the masked positions, with the embedding matrix as output weights.

    logits = LayerNorm(gelu(h_p W + b)) E^T + c for each masked position p
    The positions are gathered first, so the vocabulary projection runs on them alone (15 % of all).
    Source: Devlin et al. 2019, section 3.1, task 1; the layer's form is that of the authors' code.

    Args:
        vocab_size: Number of tokens (V).
        hidden_dim: Width of the embeddings.
        activation: After the dense layer; "gelu" is the erf form.
        epsilon: Of the layer norm (1e-12 in the authors' code).
        kernel_initializer: Of the dense layer (truncated normal 0.02 in the authors' code).

    Call arguments:
        x: float (batch, length, dim), the encoder's output.
        masked_positions: int (batch, n), 0 to length - 1; None where x has these alone, (batch, n, dim).
        embeddings: float (vocab_size, hidden_dim), the matrix of the token embedding.

    Returns:
        Logits, float32 (batch, n, vocab_size).

    Raises:
        ValueError: if the embeddings are not (vocab_size, hidden_dim).
    """

    def __init__(self, vocab_size, hidden_dim, activation="gelu", epsilon=1e-12, kernel_initializer=None, **kwargs):
        super().__init__(**kwargs)
        if vocab_size <= 0 or hidden_dim <= 0:
            raise ValueError(f"vocab_size and hidden_dim must be positive; got {vocab_size} and {hidden_dim}.")
        self.vocab_size = vocab_size
        self.hidden_dim = hidden_dim
        self.activation = functools.partial(ops.gelu, approximate=False)
        if activation != "gelu":
            self.activation = activations.get(activation)
        policy = dict(dtype=self.dtype_policy)
        initializer = kernel_initializer or TruncatedNormal(stddev=0.02)
        self.dense = Dense(hidden_dim, kernel_initializer=initializer, name="dense", **policy)
        self.norm = LayerNormalization(epsilon=epsilon, name="norm", **policy)

    def build(self, x_shape, masked_positions_shape=None, embeddings_shape=None):
        self.bias = self.add_weight(
            shape=(self.vocab_size,), initializer="zeros", name="bias", dtype="float32", autocast=False
        )
        for layer, width in ((self.dense, x_shape[-1]), (self.norm, self.hidden_dim)):
            if not layer.built:  # a saved head has built them already
                layer.build((None, None, width))

    def call(self, x, masked_positions, embeddings):
        if tuple(embeddings.shape) != (self.vocab_size, self.hidden_dim):
            raise ValueError(
                f"embeddings must be (vocab_size, hidden_dim) = ({self.vocab_size}, {self.hidden_dim}); "
                f"got {tuple(embeddings.shape)}."
            )
        x = x if masked_positions is None else gather_positions(x, masked_positions)
        x = self.norm(self.activation(self.dense(x)))
        return tied_logits(x, embeddings, self.bias)


class LanguageModelHead(Layer):
    """Predicts the next token, with the embedding matrix as output weights.

    logits = h E^T + b.  Source: Press and Wolf 2017; Merity, Keskar, Socher 2018, section 4.5.

    Args:
        vocab_size: Number of tokens (V).
        use_bias: Whether there is b.

    Call arguments:
        x: float (..., dim), hidden states.
        embeddings: float (vocab_size, dim), the matrix of the token embedding.

    Returns:
        Logits, float32 (..., vocab_size).

    Raises:
        ValueError: if `vocab_size` is not positive, or the embeddings are not (vocab_size, dim).
    """

    def __init__(self, vocab_size, use_bias=True, **kwargs):
        super().__init__(**kwargs)
        if vocab_size <= 0:
            raise ValueError(f"vocab_size must be positive; got {vocab_size}.")
        self.vocab_size = vocab_size
        self.bias = None
        if use_bias:
            self.bias = self.add_weight(
                shape=(vocab_size,), initializer="zeros", name="bias", dtype="float32", autocast=False
            )
        self.built = True

    def call(self, x, embeddings):
        if tuple(embeddings.shape) != (self.vocab_size, x.shape[-1]):
            raise ValueError(
                f"embeddings must be (vocab_size, dim) = ({self.vocab_size}, {x.shape[-1]}); "
                f"got {tuple(embeddings.shape)}."
            )
        return tied_logits(x, embeddings, self.bias)


def tied_logits(x, embeddings, bias):
    """x E^T + bias in float32, where E is the matrix of an embedding, (vocab_size, dim)."""
    embeddings = ops.cast(ops.convert_to_tensor(embeddings), "float32")
    return kernels.dense(ops.cast(x, "float32"), ops.transpose(embeddings), bias)


class PoolingClassifierHead(Head):
    """Classifies a sequence by its last state, and the greatest and the mean value of each feature (concat pooling).

    p = [h_T; max_t h_t; mean_t h_t];  hidden = relu(W1 dropped(norm(p)) + b1)
    logits = W2 dropped(norm(hidden)) + b2;  norms are over the batch
    Source: Howard and Ruder 2018, section 3.3; the second dropout and the norms' settings are the authors' code's.

    Args:
        num_classes: Number of classes.
        hidden_dim: Width of the hidden layer.
        dropout: Fraction dropped of the pooled features.
        hidden_dropout: Fraction dropped of the hidden layer.

    Call arguments:
        x: float (batch, length, dim), hidden states.
        mask: bool (batch, length), True at the states that are pooled, in any pattern; h_T is the last of them. None
            pools all. A row with none is pooled as zeros.
        training: whether to drop, and to take the batch's own statistics.

    Returns:
        Logits, float32 (batch, num_classes).

    Raises:
        ValueError: if `hidden_dim` is not positive, or there are fewer than two classes.
    """

    def __init__(self, num_classes, hidden_dim=50, dropout=0.4, hidden_dropout=0.1, **kwargs):
        super().__init__(**kwargs)
        if num_classes < 2 or hidden_dim <= 0:
            raise ValueError(
                f"num_classes must be at least 2 and hidden_dim positive; got {num_classes} and {hidden_dim}."
            )
        policy = dict(dtype=self.dtype_policy)
        norm = dict(momentum=0.9, epsilon=1e-5, **policy)
        self.norm = layers.BatchNormalization(name="norm", **norm)
        self.dropout = Dropout(dropout, name="dropout", **policy)
        self.hidden = Dense(hidden_dim, "relu", name="hidden", **policy)
        self.hidden_norm = layers.BatchNormalization(name="hidden_norm", **norm)
        self.hidden_dropout = Dropout(hidden_dropout, name="hidden_dropout", **policy)
        self.output_classes = Dense(num_classes, name="output_classes", dtype="float32")

    def call(self, x, mask=None, training=None):
        x = self.norm(concat_pool(x, mask), training=training)
        x = self.hidden(self.dropout(x, training=training))
        x = self.hidden_norm(x, training=training)
        return self.output_classes(self.hidden_dropout(x, training=training))


class FirstTokenPooler(Head):
    """The vector of a whole text, made of that of its first token, [CLS].

    p = tanh(h_1 W + b).  Source: Devlin et al. 2019, the authors' code; the paper calls h_1 itself C.

    Args:
        hidden_dim: Width of p.
        kernel_initializer: Of W (truncated normal 0.02 in the authors' code).

    Call arguments:
        x: float (batch, length, dim).

    Returns:
        float (batch, hidden_dim).
    """

    def __init__(self, hidden_dim, kernel_initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        self.dense = Dense(
            hidden_dim, "tanh", kernel_initializer=kernel_initializer, name="dense", dtype=self.dtype_policy
        )

    def call(self, x):
        return self.dense(x[:, 0])

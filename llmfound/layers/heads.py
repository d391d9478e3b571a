"""What stands on top of an encoder."""

import functools

from keras import activations, initializers, layers, ops

from llmfound.base import Layer
from llmfound.ops import gather_positions


class MaskedLMHead(Layer):
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
        masked_positions: int (batch, n), 0 to length - 1.
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
        initializer = kernel_initializer or initializers.TruncatedNormal(stddev=0.02)
        self.dense = layers.Dense(hidden_dim, kernel_initializer=initializer, name="dense", **policy)
        self.norm = layers.LayerNormalization(epsilon=epsilon, name="norm", **policy)

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
        x = self.norm(self.activation(self.dense(gather_positions(x, masked_positions))))
        logits = ops.matmul(ops.cast(x, "float32"), ops.transpose(ops.cast(embeddings, "float32")))
        return logits + self.bias

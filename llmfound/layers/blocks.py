"""Transformer layers: self-attention, optional cross-attention, feed-forward, with Pre-LN or Post-LN residuals."""

import functools

from keras import ops

from llmfound.base import Layer, lean
from llmfound.layers.attention import MultiHeadAttention, MultiHeadSelfAttention
from llmfound.layers.dropout import Dropout
from llmfound.layers.feedforward import FeedForward
from llmfound.layers.normalization import LayerNormalization


class TransformerBlock(Layer):
    """What Pre-LN and Post-LN layers share; a subclass says in `residual` where the norm stands.

    Swap a part by naming another class in a subclass: `attention_class`, `cross_attention_class`,
    `feedforward_class`, `norm_class`.

    Args:
        hidden_dim: Width (d_model).
        num_heads: Number of attention heads (h).
        intermediate_dim: Width inside the feed-forward network (d_ff).
        dropout: Fraction dropped of each sub-layer's output before it is added, 0 to 1 (P_drop).
        attention_dropout: Fraction of attention weights dropped, 0 to 1 (none in the paper).
        head_dim: Width of each head (d_k); None takes hidden_dim / num_heads.
        activation: Of the feed-forward network.
        use_bias: Whether the attention projections have biases (not in the paper).
        causal: Whether position i sees positions 0..i only, as in a decoder.
        cross_attention: Whether the block also looks at a memory, as in an encoder-decoder's decoder.
        epsilon: Of the layer norms (1e-6 in the authors' code).
        kernel_initializer: Of all projections.

    Call arguments:
        x: float (batch, length, hidden_dim).
        memory: float (batch, memory_length, memory_dim), if the block has cross-attention.
        mask: bool (batch, length), or larger as in MultiHeadAttention, True at real tokens.
        memory_mask: bool (batch, memory_length), likewise, for the memory.
        bias: float, broadcastable to (batch, heads, length, length), added to the self-attention's scores.
        return_weights: whether to return the attention weights, too.
        context: float (batch, context_length, hidden_dim), where x is some of its rows: the rest is read only, which
            spares a last block the rows that nobody asks for. Not for a causal block.
        context_mask: bool (batch, context_length), True at real tokens of the context; a `mask`, which is of the
            context then, takes its place.

    Returns:
        float (batch, length, hidden_dim); with `return_weights` also a dict of float32 arrays: "self" (batch, heads,
        length, length) and, with cross-attention, "cross" (batch, heads, length, memory_length).

    Raises:
        ValueError: if sizes do not fit, a memory is missing or given where there is no cross-attention, or a context's
            mask comes without the context.
    """

    attention_class = MultiHeadSelfAttention
    cross_attention_class = MultiHeadAttention
    feedforward_class = FeedForward
    norm_class = LayerNormalization
    final_norm = False  # whether a stack of such blocks must end with one more norm

    def __init__(self, hidden_dim, num_heads, intermediate_dim, dropout=0.0, attention_dropout=0.0, head_dim=None,
                 activation="relu", use_bias=False, causal=False, cross_attention=False, epsilon=1e-6,
                 kernel_initializer="glorot_uniform", **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        policy = dict(dtype=self.dtype_policy)
        heads = dict(head_dim=head_dim, dropout=attention_dropout, use_bias=use_bias,
                     kernel_initializer=kernel_initializer, **policy)  # fmt: skip
        self.attention = self.attention_class(hidden_dim, num_heads, causal=causal, name="attention", **heads)
        self.attention_norm = self.norm_class(epsilon=epsilon, name="attention_norm", **policy)
        self.cross_attention = self.cross_attention_norm = None
        if cross_attention:
            self.cross_attention = self.cross_attention_class(hidden_dim, num_heads, name="cross_attention", **heads)
            self.cross_attention_norm = self.norm_class(epsilon=epsilon, name="cross_attention_norm", **policy)
        self.feedforward = self.feedforward_class(
            hidden_dim, intermediate_dim, activation, kernel_initializer, name="feedforward", **policy
        )
        self.feedforward_norm = self.norm_class(epsilon=epsilon, name="feedforward_norm", **policy)
        self.dropout = Dropout(dropout, name="dropout", **policy)
        self.supports_masking = True

    def residual(self, x, norm, sublayer, training=None):
        """One sub-layer with its residual connection."""
        raise NotImplementedError(f"{type(self).__name__} must say where its norm stands: override residual().")

    def read(self, x, norm):
        """What a sub-layer with this norm reads of x."""
        raise NotImplementedError(f"{type(self).__name__} must say what a sub-layer reads: override read().")

    def row_by_row(self):
        """Whether this is known to treat each row alike, so that some rows and a context are enough: no variant."""
        parts = self, self.attention, self.feedforward
        known = PostLNBlock, PreLNBlock, MultiHeadSelfAttention, FeedForward
        changed = any(type(part) not in known or "call" in vars(part) for part in parts)
        return not changed and not self.attention.causal

    def drop(self, x, training=None):
        """A sub-layer's output, some of it dropped in training."""
        return x if training is False else self.dropout(x, training=training)

    def call(self, x, memory=None, mask=None, memory_mask=None, bias=None, return_weights=False, training=None,
             context=None, context_mask=None):  # fmt: skip
        self._check_memory(memory)
        weights, seen = {}, {}
        if context is not None or context_mask is not None:
            context = None if context is None else self.read(context, self.attention_norm)
            seen = dict(context=context, context_mask=context_mask)

        def keep(name, attended):
            if return_weights:
                attended, weights[name] = attended
            return attended

        options = dict(return_weights=return_weights, training=training)
        x = self.residual(
            x,
            self.attention_norm,
            lambda y: keep("self", self.attention(y, mask=mask, bias=bias, **seen, **options)),
            training,
        )
        if memory is not None:
            x = self.residual(
                x,
                self.cross_attention_norm,
                lambda y: keep("cross", self.cross_attention(y, memory, mask=memory_mask, **options)),
                training,
            )
        x = self.residual(x, self.feedforward_norm, self.feedforward, training)
        return (x, weights) if return_weights else x

    def start(self, rows, max_length):
        """An empty cache of keys and values for `step`: two floats (rows, heads, max_length, head_dim)."""
        shape = (rows, self.attention.num_heads, max_length, self.attention.head_dim)
        return [ops.zeros(shape, self.compute_dtype) for _ in range(2)]

    def step(self, x, cache, position, memory=None, memory_mask=None):
        """One position of a causal block, for decoding: the last row of what `call` gives for the whole prefix.

        Args:
            x: float (rows, 1, hidden_dim).
            cache: from `start` or the step before; it is used up.
            position: int, from 0.
            memory: `self.cross_attention.remember(memory)`, (batch, heads, memory_length, head_dim) each; rows is a
                multiple of batch, and the rows of one sentence stand together.
            memory_mask: bool (batch, memory_length).

        Returns:
            float (rows, 1, hidden_dim); the new cache.
        """

        def self_attention(y):
            nonlocal cache
            y, cache = self.attention.step(y, cache, position)
            return y

        attention_norm, cross_attention_norm, feedforward_norm = (
            part and functools.partial(lean, part)
            for part in (self.attention_norm, self.cross_attention_norm, self.feedforward_norm)
        )
        feedforward = getattr(self.feedforward, "step", functools.partial(lean, self.feedforward))
        x = self.residual(x, attention_norm, self_attention)
        if memory is not None:
            x = self.residual(x, cross_attention_norm, lambda y: self.cross_attention.step(y, memory, memory_mask))
        return self.residual(x, feedforward_norm, feedforward), cache

    def _check_memory(self, memory):
        if (memory is None) != (self.cross_attention is None):
            raise ValueError(
                f"{self.name} was built with cross_attention={self.cross_attention is not None}, "
                f"but memory is {'missing' if memory is None else f'given, of shape {tuple(memory.shape)}'}."
            )


class PostLNBlock(TransformerBlock):
    """Transformer layer with the norm after each residual addition: LayerNorm(x + Dropout(Sublayer(x))).

    Source: Vaswani et al. 2017, section 3.1; Xiong et al. 2020, table 1, left. Arguments as in TransformerBlock.
    """

    def residual(self, x, norm, sublayer, training=None):
        return norm(x + self.drop(sublayer(x), training))

    def read(self, x, norm):
        return x


class PreLNBlock(TransformerBlock):
    """Transformer layer with the norm before each sub-layer: x + Dropout(Sublayer(LayerNorm(x))).

    A stack of them needs one more norm at its end; the memory of a decoder is taken as it comes, already normalised.
    Source: Xiong et al. 2020, table 1, right. Arguments as in TransformerBlock.
    """

    final_norm = True

    def residual(self, x, norm, sublayer, training=None):
        return x + self.drop(sublayer(norm(x)), training)

    def read(self, x, norm):
        return norm(x)

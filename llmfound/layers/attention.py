"""Attention: additive (Bahdanau et al. 2015) and multi-head scaled dot-product (Vaswani et al. 2017)."""

from keras import ops

from llmfound import kernels
from llmfound.base import Layer, lean, overrides
from llmfound.initializers import fresh
from llmfound.layers.dropout import Dropout
from llmfound.layers.feedforward import Dense, KernelDense
from llmfound.ops import attention_mask, masked_softmax


class AdditiveAttention(Layer):
    """Scores every memory position against every query with a one-layer network.

    e_ij = v . tanh(W q_i + U m_j),  a_i = softmax(e_i),  c_i = sum_j a_ij m_j
    Source: Bahdanau, Cho, Bengio 2015, section 3.1 and appendix A.1.2. keras.layers.AdditiveAttention has no
    projections W and U, so it is not the paper's. The scores never hold (batch, queries, length, units): see
    `kernels.additive_scores`.

    Args:
        units: Width of the scoring network (n' in the paper).
        dropout: Fraction of attention weights dropped in training, 0 to 1 (none in the paper).
        use_bias: Whether U m_j has a bias (not in the paper).
        kernel_initializer: Of W and U (N(0, 0.001^2) in RNNsearch).
        score_initializer: Of v (zeros in RNNsearch, which starts with equal weights).

    Call arguments:
        query: float (batch, queries, query_dim).
        memory: float (batch, length, memory_dim).
        mask: bool (batch, length), True at real positions. None takes the mask that came with the memory, if one did,
            and attends everywhere else.
        keys: float (batch, length, units), `project(memory)` if it was computed before; a decoder does it once.

    Returns:
        context, float (batch, queries, memory_dim); weights, float32 (batch, queries, length).

    Raises:
        ValueError: if `units` is not positive, or query or memory is not of rank 3.
    """

    def __init__(self, units, dropout=0.0, use_bias=False, kernel_initializer="glorot_uniform",
                 score_initializer="glorot_uniform", **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        if units <= 0:
            raise ValueError(f"units must be positive; got {units}.")
        policy = dict(dtype=self.dtype_policy)
        self.query = KernelDense(
            units, use_bias=False, kernel_initializer=fresh(kernel_initializer), name="query", **policy
        )
        self.key = Dense(units, use_bias=use_bias, kernel_initializer=fresh(kernel_initializer), name="key", **policy)
        self.score = KernelDense(1, use_bias=False, kernel_initializer=score_initializer, name="score", **policy)
        self.dropout = Dropout(dropout, name="dropout", **policy)
        self.supports_masking = True

    def build(self, query_shape, memory_shape=None, **_):
        units = self.query.units
        for layer, width in ((self.query, query_shape[-1]), (self.key, memory_shape[-1]), (self.score, units)):
            if not layer.built:  # a saved layer has built them already
                layer.build((None, None, width))

    def project(self, memory):
        """U m_j of every memory position: float (batch, length, units). It does not depend on the query."""
        return self.key(memory)

    @property
    def scale(self):
        """v, float (units,), in the dtype of computation."""
        return ops.cast(ops.convert_to_tensor(self.score.kernel), self.compute_dtype)[:, 0]

    def call(self, query, memory, mask=None, keys=None, training=None, memory_mask=None):
        _check_rank(query=query, memory=memory)
        mask = memory_mask if mask is None else mask  # Keras gives the memory's own by that name
        keys = self.project(memory) if keys is None else keys
        scores = kernels.additive_scores(self.query(query), keys, self.scale)
        weights = masked_softmax(scores, None if mask is None else mask[:, None])
        context = ops.matmul(self.dropout(ops.cast(weights, memory.dtype), training=training), memory)
        return context, weights


class MultiHeadAttention(Layer):
    """Lets each query look at a memory through several heads.

    head_j = softmax((q Wq_j) (m Wk_j)^T / sqrt(d_k) + bias) (m Wv_j),  output = [head_1; ...; head_h] Wo
    Source: Vaswani et al. 2017, section 3.2. The paper shows no projection biases, and no dropout on the weights.

    Args:
        hidden_dim: Width of the output (d_model in the paper).
        num_heads: Number of heads (h).
        head_dim: Width of each head (d_k = d_v); None takes hidden_dim / num_heads, as the paper does.
        dropout: Fraction of attention weights dropped in training, 0 to 1.
        use_bias: Whether the four projections have biases (BERT, GPT and BART do).
        causal: Whether query i sees memory positions 0..i only.
        kernel_initializer: Of the four projections (Glorot uniform, as in the authors' code).

    Call arguments:
        query: float (batch, queries, query_dim).
        memory: float (batch, length, memory_dim).
        mask: bool (batch, length), (batch, queries, length) or (batch, heads, queries, length), True where a query
            may look; it combines with `causal`. A query that may look nowhere gets the mean of all values. None takes
            the mask that came with the memory, if one did.
        bias: float, broadcastable to (batch, heads, queries, length), added to the scaled scores.
        return_weights: whether to return the attention weights, too. Costs nothing when False.

    Returns:
        float (batch, queries, hidden_dim); with `return_weights` also float32 (batch, heads, queries, length).

    Raises:
        ValueError: if `num_heads` does not divide `hidden_dim` and no `head_dim` is given, or a rank is not 3.
    """

    def __init__(self, hidden_dim, num_heads, head_dim=None, dropout=0.0, use_bias=False, causal=False,
                 kernel_initializer="glorot_uniform", **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        if hidden_dim <= 0 or num_heads <= 0:
            raise ValueError(f"hidden_dim and num_heads must be positive; got {hidden_dim} and {num_heads}.")
        if head_dim is not None and head_dim <= 0:
            raise ValueError(f"head_dim must be positive, or None for hidden_dim / num_heads; got {head_dim}.")
        if head_dim is None and hidden_dim % num_heads:
            below = hidden_dim - hidden_dim % num_heads
            raise ValueError(
                f"hidden_dim ({hidden_dim}) must be divisible by num_heads ({num_heads}); "
                f"try {f'{below} or ' if below else ''}{below + num_heads}."
            )
        self.num_heads = num_heads
        self.head_dim = head_dim or hidden_dim // num_heads
        self.causal = causal
        inner = self.num_heads * self.head_dim
        self.query, self.key, self.value, self.merge = (
            Dense(width, use_bias=use_bias, kernel_initializer=fresh(kernel_initializer), name=name,
                         dtype=self.dtype_policy)
            for name, width in (("query", inner), ("key", inner), ("value", inner), ("output", hidden_dim))
        )  # fmt: skip
        self.dropout = Dropout(dropout, name="dropout", dtype=self.dtype_policy)
        self.supports_masking = True

    def split(self, x):
        """(batch, length, heads * head_dim) to (batch, heads, length, head_dim)."""
        return kernels.split_heads(x, self.num_heads)

    def project(self, memory):
        """Keys and values of a memory, each (batch, heads, length, head_dim); a decoder computes them once."""
        return self.split(self.key(memory)), self.split(self.value(memory))

    def remember(self, memory):
        """`project`, laid out for many calls of `step`, which would else bring it into order each time."""
        return tuple(ops.unstack(ops.stack(self.project(memory))))

    def attend(self, query, key, value, mask=None, bias=None, training=None):
        """What the heads read, (batch, heads, queries, head_dim): the method that papers change, or `weights_of` alone.

        `mask` is bool, broadcastable to (batch, heads, queries, length), causality already in it.
        """
        if (training and self.dropout.rate > 0) or overrides(self, MultiHeadAttention, "weights_of", "read"):
            return self.read(self.weights_of(query, key, mask, bias), value, training)
        return kernels.dot_product_attention(query, key, value, mask, bias)

    def weights_of(self, query, key, mask=None, bias=None):
        """Attention weights, float32 (batch, heads, queries, length)."""
        return kernels.attention_weights(query, key, mask, bias)

    def read(self, weights, value, training=None):
        """Values averaged by the weights, after dropout of weights: (batch, heads, queries, head_dim)."""
        weights = self.dropout(ops.cast(weights, value.dtype), training=training)
        return ops.matmul(weights, value)

    def join(self, heads):
        """The output projection of the concatenated heads, (batch, queries, hidden_dim)."""
        return self.merge(kernels.join_heads(heads))

    def call(self, query, memory, mask=None, bias=None, return_weights=False, training=None, memory_mask=None):
        _check_rank(query=query, memory=memory)
        mask = memory_mask if mask is None else mask  # Keras gives the memory's own by that name
        mask = attention_mask(mask, self.causal, ops.shape(query)[1], ops.shape(memory)[1])
        query, (key, value) = self.split(self.query(query)), self.project(memory)
        if not return_weights:
            return self.join(self.attend(query, key, value, mask, bias, training))
        if not overrides(self, MultiHeadAttention, "attend"):
            weights = self.weights_of(query, key, mask, bias)
            return self.join(self.read(weights, value, training)), weights
        # A variant's weights are what it reads of one-hot values.
        one_hot = ops.zeros_like(value[..., :1]) + ops.eye(ops.shape(value)[2], dtype=value.dtype)
        weights = ops.cast(self.attend(query, key, one_hot, mask, bias), "float32")
        return self.join(self.attend(query, key, value, mask, bias, training)), weights

    def step(self, query, memory, mask=None):
        """For decoding: queries (rows, 1, query_dim) look at `memory`, the keys and values from `remember`.

        rows is a multiple of the memory's batch; the rows of one sentence, its beams, stand together and share its
        memory without copies. Returns float (rows, 1, hidden_dim).
        """
        key, value = memory
        rows, batch = query.shape[0], key.shape[0]
        query = lean(self.query, query)
        if rows != batch:
            query = ops.reshape(query, (batch, rows // batch, -1))
        found = self.join(self.attend(self.split(query), key, value, attention_mask(mask)))
        return ops.reshape(found, (rows, 1, -1)) if rows != batch else found


class MultiHeadSelfAttention(MultiHeadAttention):
    """Multi-head attention in which queries, keys and values come from the same sequence.

    Source: Vaswani et al. 2017, section 3.2.3. Arguments as in MultiHeadAttention.

    Call arguments:
        x: float (batch, length, dim).
        mask: bool (batch, length), True at real tokens, or a larger one as in MultiHeadAttention; None takes the mask
            that came with x, if one did.
        bias: float, broadcastable to (batch, heads, length, length).
        return_weights: whether to return the attention weights, too.
        context: float (batch, context_length, dim), the whole sequence, where x is some rows of it alone; not for a
            causal layer, which could not tell their places.
        context_mask: bool (batch, context_length), True at real tokens of the context; a `mask`, which is of the
            context then, takes its place.

    Returns:
        float (batch, length, hidden_dim); with `return_weights` also float32 (batch, heads, length, length).

    Raises:
        ValueError: as in MultiHeadAttention, or if a causal layer is given a context, or a context's mask comes alone.
    """

    def call(self, x, mask=None, bias=None, return_weights=False, training=None, x_mask=None, context=None,
             context_mask=None):  # fmt: skip
        if context is None:
            if context_mask is not None:
                raise ValueError(f"{self.name} is given context_mask without a context.")
            return super().call(x, x, x_mask if mask is None else mask, bias, return_weights, training)
        if self.causal:
            raise ValueError(f"{self.name} is causal, and cannot tell which rows of the context x is; leave it out.")
        return super().call(x, context, context_mask if mask is None else mask, bias, return_weights, training)

    def step(self, x, cache, position):
        """For decoding: one new position, (rows, 1, dim), looks at itself and those before it.

        `cache` is a pair of float (rows, heads, max_length, head_dim), filled below `position`; it is used up.
        Returns float (rows, 1, hidden_dim) and the new cache.
        """
        query, key, value = (self.split(lean(dense, x)) for dense in (self.query, self.key, self.value))
        cache = [kernels.write(old, new, position) for old, new in zip(cache, (key, value))]
        if isinstance(position, int):  # a plain Python loop: only the filled part
            (key, value), mask = [c[:, :, : position + 1] for c in cache], None
        else:  # a compiled loop: fixed shapes
            (key, value), mask = cache, (ops.arange(cache[0].shape[2], dtype="int32") <= position)[None, None, None]
        return self.join(self.attend(query, key, value, mask)), cache


def _check_rank(**tensors):
    for name, x in tensors.items():
        if len(x.shape) != 3:
            raise ValueError(f"{name} must be (batch, length, dim); got shape {tuple(x.shape)}.")

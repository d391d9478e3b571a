"""The Transformer. Source: Vaswani et al. 2017, "Attention Is All You Need"."""

import keras
from keras import layers, ops

from llmfound.base import Model, plain
from llmfound.layers import Dropout, PositionalEncoding, PostLNBlock, PreLNBlock
from llmfound.layers.embedding import check_length
from llmfound.ops import padding_mask


class Transformer(Model):
    """Encoder-decoder made of attention alone, with one matrix for both embeddings and the output.

    x = Dropout(sqrt(d) E[source] + PE);  memory = encoder blocks(x)
    y = Dropout(sqrt(d) E[target] + PE);  logits = decoder blocks(y, memory) E^T
    Source: Vaswani et al. 2017, section 3 and figure 1; `norm="pre"`: Xiong et al. 2020, table 1, with one more norm
    at the end of each stack. The decoder reads a start token's embedding where tensor2tensor reads a zero vector; the
    paper says only that the outputs are shifted by one position.

    Args:
        vocab_size: Number of sub-words (V), shared by both languages.
        num_layers: Blocks in each stack (N).
        hidden_dim: Width (d_model).
        num_heads: Attention heads (h).
        intermediate_dim: Width inside the feed-forward networks (d_ff).
        dropout: On every sub-layer's output and on the embedding sums (P_drop).
        attention_dropout: On attention weights (none in the paper, 0.1 in later versions of its code).
        norm: "post" as in the paper, or "pre".
        use_bias: Whether the attention projections have biases (not in the paper).
        head_dim: Width of each head (d_k); None takes hidden_dim / num_heads.
        activation: Of the feed-forward networks.
        decoder_layers: Blocks of the decoder, if not num_layers.
        layout: Of the sinusoids, "interleaved" as in the paper or "concatenated" as in its code.
        max_length: Longest sequence on either side.
        pad_id: Token that fills up short sequences.
        epsilon: Of the layer norms (1e-6 in the authors' code).

    Call arguments:
        inputs: dict of int32 "source_ids" (batch, source_length) and "target_ids" (batch, target_length); the latter
            is the target shifted right, its first token the start token.

    Returns:
        Logits of the next target token, float32 (batch, target_length, vocab_size).

    Raises:
        ValueError: if sizes do not fit together, or ids are not integers of rank 2 within the vocabulary.
    """

    block_classes = {"post": PostLNBlock, "pre": PreLNBlock}
    BASE = dict(num_layers=6, hidden_dim=512, num_heads=8, intermediate_dim=2048, dropout=0.1)  # table 3
    BIG = dict(num_layers=6, hidden_dim=1024, num_heads=16, intermediate_dim=4096, dropout=0.3)  # 0.1 for En-Fr

    def __init__(self, vocab_size, num_layers=6, hidden_dim=512, num_heads=8, intermediate_dim=2048, dropout=0.1,
                 attention_dropout=0.0, norm="post", use_bias=False, head_dim=None, activation="relu",
                 decoder_layers=None, layout="interleaved", max_length=1024, pad_id=0, epsilon=1e-6,
                 **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        if norm not in self.block_classes:
            raise ValueError(f"norm must be one of {sorted(self.block_classes)}; got {norm!r}.")
        decoder_layers = num_layers if decoder_layers is None else decoder_layers
        sizes = dict(vocab_size=vocab_size, num_layers=num_layers, decoder_layers=decoder_layers)
        if min(sizes.values()) <= 0:
            raise ValueError(f"Sizes must be positive; got {sizes}.")
        block_class, policy = self.block_classes[norm], dict(dtype=self.dtype_policy)
        sizes = (hidden_dim, num_heads, intermediate_dim, dropout, attention_dropout, head_dim, activation, use_bias)
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.pad_id = pad_id
        self.scale = hidden_dim**0.5
        self.token_embedding = layers.ReversibleEmbedding(
            plain(vocab_size), hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=hidden_dim**-0.5),
            reverse_dtype="float32", name="token_embedding", **policy,
        )  # fmt: skip
        self.position = PositionalEncoding(max_length, layout, name="position", **policy)
        self.dropout = Dropout(dropout, name="dropout", **policy)
        self.encoder_blocks = [
            block_class(*sizes, epsilon=epsilon, name=f"encoder_block_{i}", **policy) for i in range(num_layers)
        ]
        self.decoder_blocks = [
            block_class(*sizes, True, True, epsilon=epsilon, name=f"decoder_block_{i}", **policy)
            for i in range(decoder_layers)
        ]
        self.encoder_norm = self.decoder_norm = None
        if block_class.final_norm:
            self.encoder_norm = block_class.norm_class(epsilon=epsilon, name="encoder_norm", **policy)
            self.decoder_norm = block_class.norm_class(epsilon=epsilon, name="decoder_norm", **policy)

    def input_signature(self):
        return {"source_ids": (None,), "target_ids": (None,)}

    def input_limits(self):
        return {"source_ids": self.vocab_size, "target_ids": self.vocab_size}

    def layer_groups(self):
        norms = [norm for norm in (self.encoder_norm, self.decoder_norm) if norm]
        layers = [self.token_embedding, *self.encoder_blocks, *self.decoder_blocks]
        return [*[[layer] for layer in layers], *[norms] * bool(norms)]

    def embed(self, token_ids, start=None, training=None):
        x = self.position(self.token_embedding(token_ids) * self.scale, start=start)
        return self.dropout(x, training=training) if training else x

    def encode(self, source_ids, mask=None, training=None):
        """The encoder's output, float (batch, source_length, hidden_dim)."""
        x = self.embed(source_ids, training=training)
        for block in self.encoder_blocks:
            x = block(x, mask=mask, training=training)
        return x if self.encoder_norm is None else self.encoder_norm(x)

    def call(self, inputs, training=None):
        mask = padding_mask(inputs["source_ids"], self.pad_id)
        memory = self.encode(inputs["source_ids"], mask, training)
        y = self.embed(inputs["target_ids"], training=training)
        for block in self.decoder_blocks:  # padding stands behind the real tokens, so causality hides it
            y = block(y, memory, memory_mask=mask, training=training)
        return self.logits(y)

    def logits(self, y):
        y = y if self.decoder_norm is None else self.decoder_norm(y)
        return self.token_embedding(y, reverse=True)

    def attention(self, inputs):
        """The attention weights of every head.

        Returns:
            dict of "encoder" (batch, layers, heads, source_length, source_length), "decoder" (batch, layers, heads,
            target_length, target_length) and "cross" (batch, layers, heads, target_length, source_length), float32.
        """
        mask = padding_mask(inputs["source_ids"], self.pad_id)
        x, y = self.embed(inputs["source_ids"]), self.embed(inputs["target_ids"])
        encoder, decoder = [], []
        for block in self.encoder_blocks:
            x, weights = block(x, mask=mask, return_weights=True)
            encoder.append(weights)
        x = x if self.encoder_norm is None else self.encoder_norm(x)
        for block in self.decoder_blocks:
            y, weights = block(y, x, memory_mask=mask, return_weights=True)
            decoder.append(weights)
        stack = lambda found, name: ops.stack([weights[name] for weights in found], axis=1)  # noqa: E731
        return {"encoder": stack(encoder, "self"), "decoder": stack(decoder, "self"), "cross": stack(decoder, "cross")}

    def align(self, source_ids, target_ids, start_id=1):
        """How much each target token looked at each source token: the cross-attention, averaged over layers and heads.

        Args:
            source_ids: int (batch, source_length).
            target_ids: int (batch, target_length), hypotheses without the start token.
            start_id: the start token.

        Returns:
            float32 (batch, target_length, source_length); each row sums to 1.
        """
        shifted = ops.concatenate([ops.full_like(target_ids[:, :1], start_id), target_ids[:, :-1]], axis=1)
        return ops.mean(self.attention({"source_ids": source_ids, "target_ids": shifted})["cross"], axis=(1, 2))

    def start(self, inputs, max_length):
        """Encodes the source once and prepares for `max_length` calls of `step`."""
        check_length(max_length, self.max_length)
        mask = padding_mask(inputs["source_ids"], self.pad_id)
        memory = self.encode(inputs["source_ids"], mask)
        return {
            "memory": {"mask": mask, "keys": [block.cross_attention.remember(memory) for block in self.decoder_blocks]},
            "cache": [block.start(memory.shape[0], max_length) for block in self.decoder_blocks],
            "position": 0,
        }

    def step(self, token_ids, state):
        """Logits of the next token, float32 (rows, vocab_size), after one more token of every row, int (rows,)."""
        y = self.embed(token_ids[:, None], start=state["position"])
        memory, caches = state["memory"], []
        for block, cache, keys in zip(self.decoder_blocks, state["cache"], memory["keys"]):
            y, cache = block.step(y, cache, state["position"], keys, memory["mask"])
            caches.append(cache)
        return self.logits(y)[:, 0], {**state, "cache": caches, "position": state["position"] + 1}

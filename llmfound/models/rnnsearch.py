"""RNNsearch and the RNN encoder-decoder it was measured against. Source: Bahdanau, Cho, Bengio 2015, "Neural Machine
Translation by Jointly Learning to Align and Translate"."""

import functools

import keras
from keras import layers, ops

from llmfound import kernels
from llmfound.base import Model, lean
from llmfound.layers import AdditiveAttention, Dense, Dropout, Embedding, GatedRecurrence, Maxout
from llmfound.layers.feedforward import KernelDense
from llmfound.ops import masked_softmax, padding_mask

ORDERINGS = ("groundhog", "appendix", "eq4")


def normal(deviation):
    return keras.initializers.RandomNormal(stddev=deviation)


class RNNsearch(Model):
    """Recurrent encoder-decoder that searches the source for what the next word needs: the first soft attention.

    h_j = [forward_j; backward_j], gated recurrences over E x;  s_0 = tanh(backward_1 Ws)
    c_i = sum_j a_ij h_j,  a_i = softmax_j(va . tanh(s_{i-1} Wa + h_j Ua))
    s_i = gated recurrence of s_{i-1}, E y and c_i
    t_i = maxout(s Uo + E y_{i-1} Vo + c_i Co),  p(y_i) = softmax(t_i Wo)

    Which s the output reads, and which word enters s_i, is where paper and code disagree:

        ordering     s_i reads   the output reads
        groundhog    y_i         s_{i-1}             the authors' code: the output has seen y_1 .. y_{i-1}
        appendix     y_{i-1}     s_{i-1}             appendix A.2.2 as printed: the state lags one word
        eq4          y_{i-1}     s_i                 equation 4

    There is no word before the first: E y_0 is zero, and `target_ids` has a start token there only to be like those of
    other models. Source: sections 3, appendices A and B.1; biases as 9n + n + 2l + V, in every product of an input, the
    initial state, the readout and the softmax, none in the alignment.

    Args:
        source_vocab_size: Number of source words (Kx).
        target_vocab_size: Number of target words (Ky).
        embedding_dim: Width of the embeddings (m).
        hidden_dim: Width of every recurrence (n).
        attention_dim: Width of the alignment model (n').
        maxout_dim: Width of the maxout layer (l).
        ordering: "groundhog", "appendix" or "eq4".
        use_bias: Whether there are the biases named above; the paper leaves them out of its formulas.
        dropout: Fraction dropped of the embeddings and of what the softmax reads, 0 to 1 (none in the paper).
        pad_id: Token that fills up short sequences, on any side of a source.

    Call arguments:
        inputs: dict of int32 "source_ids" (batch, source_length) and "target_ids" (batch, target_length); the latter
            is the target shifted right, its first token the start token. A source of padding alone is read as zeros.

    Returns:
        Logits of the next target token, float32 (batch, target_length, target_vocab_size).

    Raises:
        ValueError: if a size is not positive or the ordering unknown, or ids are not integers of rank 2 within the
            vocabularies.
    """

    PAPER = dict(embedding_dim=620, hidden_dim=1000, attention_dim=1000, maxout_dim=500)  # appendix A.2.3

    def __init__(self, source_vocab_size, target_vocab_size, embedding_dim=620, hidden_dim=1000, attention_dim=1000,
                 maxout_dim=500, ordering="groundhog", use_bias=True, dropout=0.0, pad_id=0, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        sizes = dict(source_vocab_size=source_vocab_size, target_vocab_size=target_vocab_size, maxout_dim=maxout_dim,
                     embedding_dim=embedding_dim, hidden_dim=hidden_dim, attention_dim=attention_dim)  # fmt: skip
        if min(sizes.values()) <= 0:
            raise ValueError(f"Sizes must be positive; got {sizes}.")
        if ordering not in ORDERINGS:
            raise ValueError(f"ordering must be one of {', '.join(ORDERINGS)}; got {ordering!r}.")
        self.vocab_sizes = source_vocab_size, target_vocab_size
        self.ordering = ordering
        self.pad_id = pad_id
        policy = dict(dtype=self.dtype_policy)
        self.source_embedding, self.target_embedding = (
            Embedding(size, embedding_dim, normal(0.01), name=f"{side}_embedding", **policy)
            for side, size in (("source", source_vocab_size), ("target", target_vocab_size))
        )
        self.make_encoder(hidden_dim, use_bias)
        self.make_decoder(hidden_dim, attention_dim, use_bias)
        self.make_readout(maxout_dim, embedding_dim, use_bias)
        self.output_words = Dense(target_vocab_size, use_bias=use_bias, kernel_initializer=normal(0.01),
                                         name="output_words", dtype="float32")  # fmt: skip
        self.dropout = Dropout(dropout, name="dropout", **policy)

    def dense(self, name, units, activation=None, use_bias=False, kind=Dense):
        """A product as the paper starts it. Source: appendix B.1."""
        return kind(units, activation, use_bias, normal(0.01), name=name, dtype=self.dtype_policy)

    def gated(self, name, units, **options):
        """A gated recurrence as the paper starts it. Source: appendix B.1."""
        return GatedRecurrence(units, kernel_initializer=normal(0.01), name=name, dtype=self.dtype_policy, **options)

    def make_encoder(self, hidden_dim, use_bias):
        self.forward_encoder = self.gated("forward", hidden_dim, use_bias=use_bias)
        self.backward_encoder = self.gated("backward", hidden_dim, use_bias=use_bias)
        self.first_state = self.dense("first_state", hidden_dim, "tanh", use_bias)

    def make_decoder(self, hidden_dim, attention_dim, use_bias):
        self.attention = AdditiveAttention(attention_dim, kernel_initializer=normal(0.001), score_initializer="zeros",
                                           name="attention", dtype=self.dtype_policy)  # fmt: skip
        self.decoder = self.gated("decoder", hidden_dim, use_bias=use_bias)
        self.decoder_context = self.dense("decoder_context", 3 * hidden_dim, kind=KernelDense)

    def make_readout(self, maxout_dim, embedding_dim, use_bias):
        self.readout_state = self.dense("readout_state", 2 * maxout_dim, use_bias=use_bias)
        self.readout_word = self.dense("readout_word", 2 * maxout_dim)
        self.readout_context = self.dense("readout_context", 2 * maxout_dim)
        self.readout_activation = Maxout(name="readout_activation", dtype=self.dtype_policy)

    def input_signature(self):
        return {"source_ids": (None,), "target_ids": (None,)}

    def input_limits(self):
        return dict(zip(("source_ids", "target_ids"), self.vocab_sizes))

    def layer_groups(self):
        embeddings = [self.source_embedding, self.target_embedding]
        output = [self.readout_state, self.readout_word, self.readout_context, self.output_words]
        encoder = [layer for layer in self.layers if layer in (self.forward_encoder, self.backward_encoder)]
        rest = [layer for layer in self.layers if layer.weights and layer not in [*embeddings, *encoder, *output]]
        return [embeddings, encoder, rest, output]

    def encode(self, source_ids, mask=None, training=None):
        """The annotations h, float (batch, source_length, 2 hidden_dim), and s_0, (batch, hidden_dim)."""
        x = self.dropout(self.source_embedding(source_ids), training=training)
        ahead, _ = self.forward_encoder(x, mask=mask)
        back, first = self.backward_encoder(x, mask=mask, reverse=True)
        return ops.concatenate([ahead, back], axis=-1), self.first_state(first)

    def call(self, inputs, training=None):
        words = self.dropout(self.target_embedding(inputs["target_ids"]), training=training)
        nothing = ops.zeros_like(words[:, :1])
        before = ops.concatenate([nothing, words[:, 1:]], axis=1)  # E y_{i-1} of every i
        states, contexts, _ = self.unroll(inputs["source_ids"], before, training)
        return self.read_out(states, before, contexts, training)

    def unroll(self, source_ids, before, training=None):
        """Reads the source, and then the target word by word.

        Args:
            source_ids: int (batch, source_length).
            before: float (batch, target_length, embedding_dim), E y_{i-1} of every i.

        Returns:
            For every i the s that the output reads, c_i, and the s that the attention read, float (batch,
            target_length, dim) each.
        """
        mask = padding_mask(source_ids, self.pad_id)
        memory, state = self.encode(source_ids, mask, training)
        self.build_loop(before, state, memory)
        gates = ops.swapaxes(self.decoder.project(self.words_to_read(before)), 0, 1)
        keys = self.attention.project(memory)
        shared = {"keys": keys, "scale": self.attention.scale, "mask": mask, **self.loop_biases()}

        def step(s, gates, product, shared):
            def look(s):
                scores = kernels.additive_scores(product("query", s)[:, None], shared["keys"], shared["scale"])[:, 0]
                return product("memory", ops.cast(masked_softmax(scores, shared["mask"]), s.dtype))

            query, c, new = self.turn(s, gates, look, product, shared)
            return new, (query, c, new)

        _, rows = kernels.recurrence(step, state, gates, {**self.loop_weights(), "memory": memory}, shared)
        queries, contexts, new = (ops.swapaxes(x, 0, 1) for x in rows)
        return new if self.ordering == "eq4" else queries, contexts, queries

    def words_to_read(self, before):
        """E of the words that s_1, s_2, ... read."""
        if self.ordering != "groundhog":
            return before
        return ops.concatenate([before[:, 1:], before[:, :1]], axis=1)  # y_1, y_2, ...; nothing comes of the last

    def turn(self, s, gates, look, product, biases):
        """One turn of the loop: the s that asks, c_i, and s_i."""
        c = look(s)
        return s, c, self.decoder.advance(s, gates + product("context", c), product)

    def loop_weights(self):
        """What the loop multiplies by, but for the memory."""
        query, context = self.decoder.tensors(self.attention.query.kernel, self.decoder_context.kernel)
        return {**self.decoder.parts(), "query": query, "context": context}

    def loop_biases(self):
        return {}

    def build_loop(self, word, state, memory):
        """Builds the layers of which loops take the weights only."""
        for layer, *inputs in ((self.decoder, word), (self.decoder_context, memory), (self.attention, state, memory)):
            if layer is not None and not layer.built:
                layer.build(*(tuple(x.shape) for x in inputs))

    def read_out(self, state, word, context, training=None):
        """Logits from s, E y_{i-1} and c_i, float (..., dim) each."""
        t = self.readout_state(state) + self.readout_word(word) + self.readout_context(context)
        return self.output_words(self.dropout(self.readout_activation(t), training=training))

    def align(self, source_ids, target_ids, start_id=1):
        """How much each target word looked at each source word.

        Args:
            source_ids: int (batch, source_length).
            target_ids: int (batch, target_length), hypotheses without the start token.
            start_id: the start token, which this model does not read.

        Returns:
            The a_ij, float32 (batch, target_length, source_length); each row sums to 1.
        """
        words = self.target_embedding(target_ids)
        before = ops.concatenate([ops.zeros_like(words[:, :1]), words[:, :-1]], axis=1)
        _, _, queries = self.unroll(source_ids, before)
        mask = padding_mask(source_ids, self.pad_id)
        return self.attention(queries, self.encode(source_ids, mask)[0], mask=mask)[1]

    def start(self, inputs, max_length):
        """Reads the source once; `max_length` does not matter to a recurrent decoder."""
        mask = padding_mask(inputs["source_ids"], self.pad_id)
        memory, s = self.encode(inputs["source_ids"], mask)
        c = ops.zeros((memory.shape[0], memory.shape[2]), memory.dtype)
        memory = {"annotations": memory, "keys": self.attention.project(memory), "mask": mask}
        return {"memory": memory, "s": s, "c": c, "position": 0}

    def step(self, token_ids, state):
        """Logits of the next word, float32 (rows, target_vocab_size), after one more word of every row, int (rows,)."""
        first, s = state["position"] == 0, state["s"]
        word = self.target_embedding(token_ids)
        word = ops.where(first, ops.zeros_like(word), word)
        gates, weights = self.decoder.project(word), self.loop_weights()
        turn = functools.partial(self.turn, product=lambda name, left: kernels.times(left, weights[name]),
                                 biases=self.loop_biases())  # fmt: skip
        if self.ordering == "groundhog":  # s_{i-1} reads y_{i-1} and c_{i-1} before y_i is written
            new = s = ops.where(first, s, turn(s, gates, lambda _: state["c"])[2])
            c = self.look(s, state)
        else:
            _, c, new = turn(s, gates, lambda query: self.look(query, state))
        logits = self.read_out(new if self.ordering == "eq4" else s, word, c)
        return logits, {**state, "s": new, "c": c, "position": state["position"] + 1}

    def look(self, s, state):
        """c, float (rows, memory_dim), for the s of every row; the rows of one sentence stand together."""
        keys, annotations, mask = (state["memory"][name] for name in ("keys", "annotations", "mask"))
        rows, batch = s.shape[0], keys.shape[0]
        query = ops.reshape(lean(self.attention.query, s), (batch, rows // batch, -1))
        weights = masked_softmax(kernels.additive_scores(query, keys, self.attention.scale), mask[:, None])
        context = ops.matmul(ops.cast(weights, annotations.dtype), annotations)
        return ops.reshape(context, (rows, annotations.shape[-1]))


class RNNencdec(RNNsearch):
    """The baseline: all that the decoder knows of the source is one vector, the last state of a forward encoder.

    c_i = c = forward_T for every i, and s_0 = tanh(c Ws); the rest is as in RNNsearch, whose arguments these are.
    Source: Bahdanau, Cho, Bengio 2015, sections 2.1 and 4.2; Cho et al. 2014.

    Args:
        attention_dim: there is no attention; so that one set of sizes fits both models.
    """

    align = None  # there is no attention to tell it

    def make_encoder(self, hidden_dim, use_bias):
        self.forward_encoder = self.gated("forward", hidden_dim, use_bias=use_bias)
        self.backward_encoder = None
        self.first_state = self.dense("first_state", hidden_dim, "tanh", use_bias)

    def make_decoder(self, hidden_dim, attention_dim, use_bias):
        self.attention = None
        self.decoder = self.gated("decoder", hidden_dim, use_bias=use_bias)
        self.decoder_context = self.dense("decoder_context", 3 * hidden_dim, kind=KernelDense)

    def encode(self, source_ids, mask=None, training=None):
        """c, float (batch, hidden_dim), and s_0, (batch, hidden_dim)."""
        x = self.dropout(self.source_embedding(source_ids), training=training)
        _, c = self.forward_encoder(x, mask=mask)
        return c, self.first_state(c)

    def unroll(self, source_ids, before, training=None):
        c, state = self.encode(source_ids, padding_mask(source_ids, self.pad_id), training)
        self.build_loop(before, state, c)
        gates = self.decoder.project(self.words_to_read(before)) + self.decoder_context(c)[:, None]
        new, _ = self.decoder.run(gates, state)
        old = ops.concatenate([state[:, None], new[:, :-1]], axis=1)
        contexts = ops.broadcast_to(c[:, None], (*ops.shape(old)[:2], c.shape[-1]))
        return new if self.ordering == "eq4" else old, contexts, old

    def loop_weights(self):
        return {**self.decoder.parts(), "context": self.decoder.tensors(self.decoder_context.kernel)[0]}

    def start(self, inputs, max_length):
        c, s = self.encode(inputs["source_ids"], padding_mask(inputs["source_ids"], self.pad_id))
        return {"s": s, "c": c, "position": 0}

    def look(self, s, state):
        return state["c"]


class DL4MT(RNNsearch):
    """The "conditional GRU" of the dl4mt tutorial, which most later work means by an attention RNN; not the paper's.

    s'_i = gated recurrence of s_{i-1} and E y_{i-1};  c_i = attention of s'_i;  s_i = gated recurrence of s'_i and c_i
    p(y_i) = softmax(tanh(s_i Us + E y_{i-1} V + c_i C + b) Wo);  s_0 = tanh(mean_j h_j Ws + b)
    In every recurrence r follows the product, and z weighs the old state; the alignment model is as wide as h and has a
    bias. Source: Cho 2015, "Natural Language Understanding with Distributed Representation", and the code of
    dl4mt-tutorial, session 2; a second bias in the alignment, which softmax cancels, is left out.

    Args:
        source_vocab_size, target_vocab_size, use_bias, dropout, pad_id: as in RNNsearch.
        embedding_dim: Width of the embeddings and of the readout.
        hidden_dim: Width of every recurrence.
    """

    def __init__(self, source_vocab_size, target_vocab_size, embedding_dim=512, hidden_dim=1024, use_bias=True,
                 dropout=0.0, pad_id=0, **kwargs):  # fmt: skip
        super().__init__(source_vocab_size, target_vocab_size, embedding_dim, hidden_dim, 2 * hidden_dim,
                         embedding_dim, "eq4", use_bias, dropout, pad_id, **kwargs)  # fmt: skip

    def gated(self, name, units, **options):
        return super().gated(name, units, reset_after=True, update="old", **options)

    def make_decoder(self, hidden_dim, attention_dim, use_bias):
        self.attention = AdditiveAttention(attention_dim, use_bias=use_bias, kernel_initializer=normal(0.01),
                                           score_initializer=normal(0.01), name="attention",
                                           dtype=self.dtype_policy)  # fmt: skip
        self.decoder = self.gated("decoder", hidden_dim, use_bias=use_bias)
        self.decoder_context = self.gated("decoder_context", hidden_dim, use_bias=False, use_recurrent_bias=use_bias)

    def make_readout(self, maxout_dim, embedding_dim, use_bias):
        self.readout_state = self.dense("readout_state", embedding_dim, use_bias=use_bias)
        self.readout_word = self.dense("readout_word", embedding_dim)
        self.readout_context = self.dense("readout_context", embedding_dim)
        self.readout_activation = layers.Activation("tanh", name="readout_activation", dtype=self.dtype_policy)

    def encode(self, source_ids, mask=None, training=None):
        x = self.dropout(self.source_embedding(source_ids), training=training)
        ahead, _ = self.forward_encoder(x, mask=mask)
        back, _ = self.backward_encoder(x, mask=mask, reverse=True)
        memory = ops.concatenate([ahead, back], axis=-1)
        real = ops.ones_like(memory[..., :1]) if mask is None else ops.cast(mask, memory.dtype)[..., None]
        mean = ops.sum(memory * real, axis=1) / ops.maximum(ops.sum(real, axis=1), 1)
        return memory, self.first_state(mean)

    def turn(self, s, gates, look, product, biases):
        query = self.decoder.advance(s, gates, product)
        c = look(query)
        second = lambda name, left: product(f"second_{name}", left)  # noqa: E731
        return query, c, self.decoder_context.advance(query, product("context", c), second, biases.get("second"))

    def loop_weights(self):
        query, context = self.decoder.tensors(self.attention.query.kernel, self.decoder_context.kernel)
        second = {f"second_{name}": weight for name, weight in self.decoder_context.parts().items()}
        return {**self.decoder.parts(), **second, "query": query, "context": context}

    def loop_biases(self):
        bias = self.decoder_context.recurrent_bias
        return {} if bias is None else {"second": self.decoder.tensors(bias)[0]}

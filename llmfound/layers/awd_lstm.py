"""The AWD-LSTM: a stack of LSTMs with dropout of words, features and recurrent weights."""

from keras import initializers, ops

from llmfound.base import Layer
from llmfound.layers.dropout import EmbeddingDropout, VariationalDropout
from llmfound.layers.embedding import Embedding
from llmfound.layers.recurrent import LSTM
from llmfound.ops import padding_mask


class AWDLSTM(Layer):
    """Words to the states of a stack of LSTMs: the encoder of the AWD-LSTM language model and of ULMFiT.

    x = locked(words dropped(E w));  h_l = LSTM_l(locked_{l-1}(h_{l-1})), their recurrent matrices dropped in part
    The last LSTM is as wide as the embedding, so that a language model can share it with its output.
    Source: Merity, Keskar, Socher 2018, sections 2 and 4; sizes and dropouts of the constructor, Howard and Ruder 2018,
    section 4.1.

    Args:
        vocab_size: Number of words (V).
        embedding_dim: Width of the embedding and of the last LSTM.
        hidden_dim: Width of the other LSTMs.
        num_layers: Number of LSTMs.
        input_dropout: Fraction of features dropped of the embedded words, the same ones at every position.
        hidden_dropout: the same between LSTMs.
        output_dropout: the same of the last LSTM's outputs.
        embedding_dropout: Fraction of words dropped, everywhere in the batch.
        weight_dropout: Fraction of the elements of recurrent matrices dropped, the same ones at every position.
        pad_id: Token that fills up short sequences, in any place; None if there is none.

    Call arguments:
        token_ids: int (batch, length).
        states: list of (h, c) of each LSTM, float (batch, width); None is zero.
        window: int; no gradient passes from a window of so many positions to the one before it. None lets it pass.
        training: whether to drop.

    Returns:
        The last LSTM's outputs with dropout, float (batch, length, embedding_dim); the same without dropout; and the
        states after the last real token of each row.

    Raises:
        ValueError: if a size is not positive, or a dropout is outside [0, 1).
    """

    def __init__(self, vocab_size, embedding_dim=400, hidden_dim=1150, num_layers=3, input_dropout=0.4,
                 hidden_dropout=0.3, output_dropout=0.4, embedding_dropout=0.05, weight_dropout=0.5, pad_id=0,
                 **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        sizes = dict(vocab_size=vocab_size, embedding_dim=embedding_dim, hidden_dim=hidden_dim, num_layers=num_layers)
        if min(sizes.values()) <= 0:
            raise ValueError(f"Sizes must be positive; got {sizes}.")
        policy = dict(dtype=self.dtype_policy)
        self.pad_id = pad_id
        self.widths = [hidden_dim] * (num_layers - 1) + [embedding_dim]
        self.embedding = Embedding(vocab_size, embedding_dim, initializers.RandomUniform(-0.1, 0.1), name="embedding",
                                   **policy)  # fmt: skip
        self.embedding_dropout = EmbeddingDropout(vocab_size, embedding_dropout, name="embedding_dropout", **policy)
        self.input_dropout = VariationalDropout(input_dropout, name="input_dropout", **policy)
        rates = [hidden_dropout] * (num_layers - 1) + [output_dropout]
        self.lstms, self.dropouts = [], []
        for i, (units, rate) in enumerate(zip(self.widths, rates), 1):
            self.lstms.append(LSTM(
                units, weight_dropout, kernel_initializer=_uniform(units), recurrent_initializer=_uniform(units),
                bias_initializer=_uniform(units), unit_forget_bias=False, return_sequences=True, name=f"lstm_{i}",
                **policy,
            ))  # fmt: skip
            self.dropouts.append(VariationalDropout(rate, name=f"dropout_{i}", **policy))

    def build(self, token_ids_shape, **_):
        widths = [self.embedding.output_dim, *self.widths]
        for layer, shape in zip([self.embedding, *self.lstms], [(None, None), *((None, None, n) for n in widths)]):
            if not layer.built:  # a saved one has built them already
                layer.build(shape)

    def call(self, token_ids, states=None, window=None, training=None):
        mask = None if self.pad_id is None else padding_mask(token_ids, self.pad_id)
        x = self.embedding_dropout(self.embedding(token_ids), token_ids, training=training)
        x = self.input_dropout(x, training=training)
        states = self.zero_states(ops.shape(token_ids)[0], x.dtype) if states is None else states
        last = []
        for lstm, dropout, state in zip(self.lstms, self.dropouts, states):
            raw, state = lstm.run(x, [ops.cast(s, x.dtype) for s in state], mask, training, window)
            last.append(state)
            x = dropout(raw, training=training)
        return x, raw, last

    def zero_states(self, rows, dtype=None):
        """States of zeros, as `call` takes them."""
        return [[ops.zeros((rows, width), dtype) for _ in range(2)] for width in self.widths]

    def layer_groups(self):
        """The layers in groups, from bottom to top: the embedding, then each LSTM."""
        return [[self.embedding], *([lstm] for lstm in self.lstms)]


def _uniform(units):
    """PyTorch's start of an LSTM. One for each weight: an initializer of Keras draws the same numbers every time."""
    return initializers.RandomUniform(-(units**-0.5), units**-0.5)

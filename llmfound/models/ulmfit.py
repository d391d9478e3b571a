"""ULMFiT: a language model that becomes a classifier. Source: Howard and Ruder 2018, "Universal Language Model
Fine-tuning for Text Classification"; the language model, Merity, Keskar, Socher 2018, "Regularizing and Optimizing LSTM
Language Models"."""

import collections
import operator

import keras
import numpy as np
from keras import ops

from llmfound.base import Layer, Model
from llmfound.layers import AWDLSTM, LanguageModelHead, PoolingClassifierHead
from llmfound.ops import padding_mask

FASTAI = {"[PAD]": "xxpad", "[START]": "xxbos", "[END]": "xxeos", "[UNK]": "xxunk"}
FILLERS = "xxfake", ""  # several times in vocabularies, but in no text: of fastai, and of a Tokenizer's gaps


class CarriedStates(Layer):
    """The states that recurrent layers had at the end of one batch, for the next one; no part of a saved model.

    Those of training are kept apart from the others, so that a validation in the middle of a text does not lead on.

    Args:
        widths: list of int, of the states.
        rows: int, the most rows of a batch.
    """

    def __init__(self, widths, rows, **kwargs):
        super().__init__(**kwargs)
        self.rows = rows
        self.states, self.evaluated = (
            [[self.add_weight((rows, n), "zeros", trainable=False, dtype="float32", autocast=False,
                              name=f"{prefix}{name}_{i}")
              for name in ("h", "c")]
             for i, n in enumerate(widths, 1)]
            for prefix in ("", "evaluated_")
        )  # fmt: skip
        self.built = True

    def read(self, continues, training=False):
        """The states, float (batch, n), zero in rows that do not continue; continues int or bool (batch,)."""
        batch = ops.shape(continues)[0]
        if isinstance(batch, int) and batch > self.rows:
            raise ValueError(
                f"The batch has {batch} rows, and this model carries the states of {self.rows}; build it with "
                "max_batch of that or more, or take smaller batches."
            )
        keep = ops.cast(continues, "float32")[:, None]
        return [[ops.convert_to_tensor(state)[:batch] * keep for state in pair] for pair in self.of(training)]

    def of(self, training):
        return self.states if training else self.evaluated

    def write(self, states, training=False):
        for pair, new in zip(self.of(training), states):
            for state, value in zip(pair, new):
                value = ops.stop_gradient(ops.cast(value, "float32"))
                state.assign(ops.slice_update(ops.convert_to_tensor(state), (0, 0), value))

    def save_own_variables(self, store):
        pass

    def load_own_variables(self, store):
        pass


class ULMFiT(Model):
    """The AWD-LSTM language model that ULMFiT fine-tunes.

    h = AWDLSTM(w),  p(w_{t+1}) = softmax(h_t E^T + b), with the embedding E
    In training, with m h the outputs after dropout, the loss gains
    activation_penalty mean((m h)^2) + temporal_penalty mean((h_t - h_{t+1})^2)   (AR and TAR).
    Source: Merity, Keskar, Socher 2018, sections 2 to 4 (the paper writes the penalties as norms; its code takes means
    of squares); sizes and dropouts, Howard and Ruder 2018, section 4.1.

    Its groups of layers, for discriminative rates, are the embedding, each LSTM, and with the last of them the output's
    bias.

    Args:
        vocab_size: Number of words (V).
        embedding_dim: Width of the embedding and of the last LSTM.
        hidden_dim: Width of the other LSTMs.
        num_layers: Number of LSTMs.
        input_dropout, hidden_dropout, output_dropout, embedding_dropout, weight_dropout: as in AWDLSTM.
        activation_penalty: Weight of AR (alpha).
        temporal_penalty: Weight of TAR (beta).
        pad_id: Token that fills up short sequences; None if there is none.
        max_batch: The most rows of a batch that goes on from the one before.

    Call arguments:
        inputs: dict of int "token_ids" (batch, length), and if batches go on from each other, as LanguageModelBatches
            do, "continues" (batch,): 1 where a row goes on from the same row of the batch before, whose last states it
            then begins with, and 0 where a new text begins; or token_ids alone.

    Returns:
        Logits of the next word at every position, float32 (batch, length, vocab_size).

    Raises:
        ValueError: if a size is not positive, a penalty is negative, a dropout is outside [0, 1), ids are not integers
            of rank 2 within the vocabulary, or a batch that continues has more rows than `max_batch`.
    """

    WIKITEXT2 = dict(input_dropout=0.65, hidden_dropout=0.3, output_dropout=0.4, embedding_dropout=0.1)  # Merity et al.

    def __init__(self, vocab_size, embedding_dim=400, hidden_dim=1150, num_layers=3, input_dropout=0.4,
                 hidden_dropout=0.3, output_dropout=0.4, embedding_dropout=0.05, weight_dropout=0.5,
                 activation_penalty=2.0, temporal_penalty=1.0, pad_id=0, max_batch=128, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        if activation_penalty < 0 or temporal_penalty < 0:
            raise ValueError(f"Penalties must not be negative; got {activation_penalty} and {temporal_penalty}.")
        if max_batch <= 0:
            raise ValueError(f"max_batch must be positive; got {max_batch}.")
        self.vocab_size = vocab_size
        self.activation_penalty = activation_penalty
        self.temporal_penalty = temporal_penalty
        self.encoder = AWDLSTM(vocab_size, embedding_dim, hidden_dim, num_layers, input_dropout, hidden_dropout,
                               output_dropout, embedding_dropout, weight_dropout, pad_id, name="encoder",
                               dtype=self.dtype_policy)  # fmt: skip
        self.decoder = LanguageModelHead(vocab_size, name="decoder", dtype=self.dtype_policy)
        self.carried = CarriedStates(self.encoder.widths, max_batch, name="carried")

    @property
    def pad_id(self):
        return self.encoder.pad_id

    def input_signature(self):
        return {"token_ids": (None,)}

    def optional_inputs(self):
        return {"continues": ()}

    def input_limits(self):
        return {"token_ids": self.vocab_size}

    def check_inputs(self, inputs):
        super().check_inputs(inputs)
        continues, ids = inputs.get("continues"), inputs.get("token_ids")
        if continues is None or ids is None:
            return
        if tuple(continues.shape) != tuple(ids.shape[:1]):
            raise ValueError(
                f"continues must have an entry for each row of token_ids, {tuple(ids.shape)}; got "
                f"{tuple(continues.shape)}."
            )

    def layer_groups(self):
        *lower, top = self.encoder.layer_groups()
        return [*lower, [*top, self.decoder]]

    def call(self, inputs, training=None):
        token_ids, continues = inputs["token_ids"], inputs.get("continues")
        states = None if continues is None else self.carried.read(continues, training)
        h, raw, states = self.encoder(token_ids, states, training=training)
        if continues is not None:
            self.carried.write(states, training)
        if training and (self.activation_penalty or self.temporal_penalty):
            self.add_loss(self.penalty(h, raw, token_ids))
        return self.decoder(h, self.encoder.embedding.embeddings)

    def penalty(self, h, raw, token_ids):
        """AR on the outputs after dropout and TAR on those before, each a mean over the real positions; a scalar."""
        h, raw = ops.cast(h, "float32"), ops.cast(raw, "float32")
        pad_id, squares = self.encoder.pad_id, ops.square(h)
        steps = ops.square(raw[:, 1:] - raw[:, :-1])
        if pad_id is None:
            means = ops.mean(squares), ops.sum(steps) / ops.maximum(ops.cast(ops.size(steps), "float32"), 1)
        else:
            real = ops.cast(padding_mask(token_ids, pad_id), "float32")[..., None]
            means = [
                ops.sum(x * there) / ops.maximum(ops.sum(there) * x.shape[-1], 1)
                for x, there in ((squares, real), (steps, real[:, 1:] * real[:, :-1]))
            ]
        return ops.cast(self.activation_penalty * means[0] + self.temporal_penalty * means[1], keras.config.floatx())

    def with_vocabulary(self, old, new):
        """The same model for another vocabulary.

        The row in E, and in b, of each word that both have is copied; a new word gets the mean of all old rows. A piece
        such as [UNK] gets the row of the old vocabulary's own, xxunk in fastai's. Padding is what it is for `new`.
        Source: Howard and Ruder 2018, the authors' code.

        Args:
            old: list of str, the words of this model by their ids; or a Tokenizer.
            new: the same for the new model.

        Returns:
            ULMFiT, uncompiled, its other weights copies of this one's.

        Raises:
            ValueError: if `old` is not of this model's size, or one lists a word twice, but for fastai's xxfake.
        """
        pad_id, known = self.pad_id if self.pad_id is None else getattr(new, "pad_id", None), self.pad_id
        old, new = (list(getattr(words, "vocabulary", words)) for words in (old, new))
        if len(old) != self.vocab_size:
            raise ValueError(f"old has {len(old)} words, and the model {self.vocab_size}.")
        for words in (old, new):
            counts = collections.Counter(word for word in words if word not in FILLERS)
            twice = next((word for word, count in counts.items() if count > 1), None)
            if twice is not None:
                raise ValueError(f"{twice!r} stands twice in a vocabulary.")
        if pad_id is None and known is not None:  # lists of words do not tell
            pad_id = new.index(old[known]) if old[known] in new else known
        model = type(self).from_config({**self.get_config(), "vocab_size": len(new), "pad_id": pad_id})
        place = {word: i for i, word in enumerate(old)}
        rows = np.array([place.get(word, place.get(FASTAI.get(word), -1)) for word in new])
        for target, source in zip(model.weights, self.weights):
            value = ops.convert_to_numpy(source)
            if target.shape != source.shape or source.path.endswith(("embedding/embeddings", "decoder/bias")):
                value = np.where((rows >= 0).reshape(-1, *[1] * (value.ndim - 1)), value[rows], value.mean(axis=0))
            target.assign(value)
        return model

    def start(self, inputs, max_length):
        """Reads a text, "token_ids", and prepares for `max_length` calls of `step`.

        The text's last word takes the place of the start token, which a language model never reads in training: the
        first call gives the logits of what follows the text, whatever word it is given. Only a row that is all padding
        begins with that word.
        """
        token_ids, pad_id = inputs["token_ids"], self.encoder.pad_id
        _, h, states = self.encoder(token_ids)
        real = ops.ones_like(token_ids, "bool") if pad_id is None else padding_mask(token_ids, pad_id)
        last = ops.max(ops.where(real, ops.arange(ops.shape(token_ids)[1]), -1), axis=1)
        h = ops.take_along_axis(h, ops.maximum(last, 0)[:, None, None], axis=1)[:, 0]
        return {"states": states, "h": h, "known": last >= 0, "position": 0}

    def step(self, token_ids, state):
        """Logits of the next word, float32 (rows, vocab_size), after one more word of every row, int (rows,)."""
        _, h, states = self.encoder(token_ids[:, None], state["states"])
        stay = (state["known"] & (state["position"] == 0))[:, None]
        h = ops.where(stay, state["h"], h[:, 0])
        states = keras.tree.map_structure(lambda old, new: ops.where(stay, old, new), state["states"], states)
        logits = self.decoder(h, self.encoder.embedding.embeddings)
        return logits, {**state, "states": states, "position": state["position"] + 1}


class ULMFiTClassifier(Model):
    """A classifier on the encoder of a language model, which it shares and goes on to train.

    logits = head(h),  h = AWDLSTM(w), pooled over the real words; gradients pass through one window of the text to the
    one before only where that one's outputs are pooled, and within windows (BPT3C).
    Source: Howard and Ruder 2018, section 3.3. Dropout masks are drawn once for a text, not for each window.

    Its groups of layers, for discriminative rates and gradual unfreezing, are those of the encoder, and the head.

    Args:
        language_model: ULMFiT, or an AWDLSTM.
        num_classes: Number of classes.
        hidden_dim: Width of the head's hidden layer.
        dropout: Fraction dropped of the pooled features.
        hidden_dropout: Fraction dropped of the head's hidden layer (the authors' code).
        window: Words of a window (BPTT).
        max_windows: Windows at a text's end whose outputs are pooled, and whose words have gradients.
        reverse: Whether the language model reads from the last word to the first: texts are then turned round.

    Call arguments:
        inputs: dict of int "token_ids" (batch, length), padded with the encoder's pad_id on any side;
            or token_ids alone.

    Returns:
        Logits, float32 (batch, num_classes). A text without words is classified as zeros.

    Raises:
        ValueError: if a size is not positive, there are fewer than two classes, or ids are not integers of rank 2
            within the vocabulary.
    """

    def __init__(self, language_model, num_classes, hidden_dim=50, dropout=0.4, hidden_dropout=0.1, window=70,
                 max_windows=20, reverse=False, **kwargs):  # fmt: skip
        super().__init__(**kwargs)
        if window <= 0 or max_windows <= 0:
            raise ValueError(f"window and max_windows must be positive; got {window} and {max_windows}.")
        self.window = window
        self.max_windows = max_windows
        self.reverse = reverse
        self.encoder = getattr(language_model, "encoder", language_model)
        self.head = PoolingClassifierHead(operator.index(num_classes), hidden_dim, dropout, hidden_dropout, name="head",
                                          dtype=self.dtype_policy)  # fmt: skip

    @property
    def pad_id(self):
        return self.encoder.pad_id

    def input_signature(self):
        return {"token_ids": (None,)}

    def input_limits(self):
        return {"token_ids": self.encoder.embedding.input_dim}

    def layer_groups(self):
        return [*self.encoder.layer_groups(), [self.head]]

    def call(self, inputs, training=None):
        token_ids = self.placed(inputs["token_ids"])
        h, _, _ = self.encoder(token_ids, window=self.window, training=training)
        return self.head(h, self.pooled(token_ids), training=training)

    def placed(self, token_ids):
        """The words in the order of reading, the first at the start of a window however much padding there is."""
        token_ids = ops.flip(token_ids, axis=1) if self.reverse else token_ids
        if self.encoder.pad_id is None:
            return token_ids
        length = ops.shape(token_ids)[1]
        first = ops.argmax(padding_mask(token_ids, self.encoder.pad_id), axis=1)[:, None]
        places = (ops.arange(length, dtype="int32") + ops.cast(first, "int32")) % length
        return ops.take_along_axis(token_ids, places, axis=1)

    def pooled(self, token_ids):
        """bool (batch, length), True at the words whose outputs are pooled: the real ones of the last windows."""
        places = ops.arange(ops.shape(token_ids)[1], dtype="int32")
        pad_id = self.encoder.pad_id
        real = ops.ones_like(token_ids, "bool") if pad_id is None else padding_mask(token_ids, pad_id)
        last = ops.max(ops.where(real, places, 0), axis=1, keepdims=True)
        return real & (places // self.window > last // self.window - self.max_windows)


class Ensemble(Model):
    """The mean of the classes' probabilities that several classifiers give: of a forward and a backward ULMFiT.

    log p = log(1/n sum_k softmax(logits_k)).  Source: Howard and Ruder 2018, section 3.3.

    Args:
        classifiers: list of models with the same inputs and classes.

    Call arguments:
        inputs: as each classifier's.

    Returns:
        Logarithms of probabilities, float32 (batch, num_classes), which serve as logits.

    Raises:
        ValueError: if there is no classifier.
    """

    def __init__(self, classifiers, **kwargs):
        super().__init__(**kwargs)
        if not classifiers:
            raise ValueError("An ensemble needs at least one classifier; got none.")
        self.classifiers = list(classifiers)

    @property
    def pad_id(self):
        return getattr(self.classifiers[0], "pad_id", None)

    def input_signature(self):
        return self.classifiers[0].input_signature()

    def optional_inputs(self):
        return self.classifiers[0].optional_inputs()

    def input_limits(self):
        return self.classifiers[0].input_limits()

    def call(self, inputs, training=None):
        logits = [ops.cast(model(inputs, training=training), "float32") for model in self.classifiers]
        logs = [ops.log_softmax(x, axis=-1) for x in logits]
        return ops.logsumexp(ops.stack(logs), axis=0) - float(np.log(len(logs)))

"""Losses over the tokens of a batch, padding left out."""

import math

import keras
from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from keras.src.losses.loss import scale_loss_for_distribution

from llmfound import kernels


def checked(labels, logits):
    """Both as tensors; ValueError unless they are int (...) and float (..., vocab_size), with equal leading axes."""
    labels, logits = (x if ops.is_tensor(x) else ops.convert_to_tensor(x) for x in (labels, logits))  # keeps the mask
    label_type, logit_type = (keras.backend.standardize_dtype(x.dtype) for x in (labels, logits))
    if in_symbolic_scope() and "float" in label_type:  # of replicas Keras looks at the mean of their labels first
        labels, label_type = ops.cast(labels, "int32"), "int32"
    if "int" not in label_type:
        raise ValueError(f"labels must be integer token ids; got {label_type} of shape {tuple(labels.shape)}.")
    if "float" not in logit_type:
        raise ValueError(f"logits must be float; got {logit_type} of shape {tuple(logits.shape)}.")
    expected = tuple(logits.shape)[:-1]
    unequal = any(a != b for a, b in zip(labels.shape, expected) if a is not None and b is not None)
    if not logits.shape or len(labels.shape) != len(expected) or unequal:
        raise ValueError(
            f"labels must have the shape of logits without its last axis; "
            f"got labels {tuple(labels.shape)} and logits {tuple(logits.shape)}."
        )
    return labels, logits


def real_tokens(labels, pad_id):
    """bool, the shape of `labels`: True where the label is not `pad_id`; everywhere if `pad_id` is None."""
    return ops.ones_like(labels, dtype="bool") if pad_id is None else ops.not_equal(labels, pad_id)


def spread(sample_weight, labels):
    """Weights of sequences, (batch,), as (batch, 1), which a loss per token broadcasts; other weights as they are."""
    if sample_weight is None:
        return None
    sample_weight = ops.convert_to_tensor(sample_weight)
    missing = len(labels.shape) - len(sample_weight.shape)
    return ops.reshape(sample_weight, (-1,) + (1,) * missing) if len(sample_weight.shape) == 1 else sample_weight


class _TokenCount(keras.losses.Loss):
    """The number of real tokens that Keras's mask leaves."""

    def __init__(self, pad_id):
        super().__init__("token_count", "sum", "float32")  # TensorFlow takes no name that begins with an underscore
        self.pad_id = pad_id

    def call(self, y_true, y_pred):
        return ops.cast(real_tokens(y_true, self.pad_id), "float32")


@keras.saving.register_keras_serializable(package="llmfound")
class SmoothedCrossEntropy(keras.losses.Loss):
    """Cross-entropy against smoothed labels, averaged over the real tokens of the batch.

    loss = 1/n sum_t -sum_c q_tc log softmax(z_t)_c over the n positions t whose label y_t is not padding
    "uniform":        q_tc = (1 - e) [c = y_t] + e / V; what PyTorch and Keras call label smoothing.
    "tensor2tensor":  q_tc = 1 - e at c = y_t, e / (V - 1) elsewhere; the entropy of q is subtracted, so a perfect
                      prediction has loss 0. It is the uniform form with e V / (V - 1), less that constant.
    Source: Vaswani et al. 2017, section 5.4, which gives e = 0.1 and no formula; the second form is their code's.

    Positions that Keras masks (`mask_zero=True` in a user's model) count as padding too. A batch without a real
    token has loss 0. Sample weights, (batch,) or (batch, length), multiply the losses and, as in Keras, leave n as
    it is. Under a tf.distribute.Strategy, as of Keras's losses, each replica has its share of their mean.

    Args:
        smoothing: float in [0, 1), the e above; 0.1 in the paper.
        pad_id: int, the label of padding; None counts every position.
        form: "uniform" or "tensor2tensor".
        name: str, the name of the loss in logs of several.

    Call arguments:
        y_true: int (batch, length), labels from 0 to vocab_size - 1, or pad_id. Another makes the loss NaN on JAX and
            TensorFlow, and an error on PyTorch.
        y_pred: float (batch, length, vocab_size), logits. All is computed in float32.
        sample_weight: float (batch,) or (batch, length), or None.

    Returns:
        float32 scalar.

    Raises:
        ValueError: if `smoothing` is outside [0, 1), or beyond (V - 1) / V in the second form; if `form` is
            unknown; if labels are not integer, or shapes do not match.
    """

    def __init__(self, smoothing=0.1, pad_id=0, form="uniform", name="smoothed_cross_entropy"):
        super().__init__(name=name, reduction="sum", dtype="float32")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1); got {smoothing}.")
        if form not in ("uniform", "tensor2tensor"):
            raise ValueError(f'form must be "uniform" or "tensor2tensor"; got {form!r}.')
        self.smoothing = smoothing
        self.pad_id = pad_id
        self.form = form
        self.count = _TokenCount(pad_id)

    def __call__(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred = checked(y_true, y_pred)
        weight = spread(sample_weight, y_true)
        if weight is not None:  # of all tokens, and in its own memory: on PyTorch, Keras multiplies the mask into it
            weight = ops.cast(weight, "float32") * ops.ones_like(y_true, dtype="float32")
        total = super().__call__(y_true, y_pred, weight)  # Keras applies its mask to both
        return scale_loss_for_distribution(total / ops.maximum(self.count(y_true, y_pred), 1.0))

    def call(self, y_true, y_pred):
        labels = ops.cast(y_true, "int32")  # Keras hands over the ids as float32, exact up to 2^24
        real = real_tokens(labels, self.pad_id)
        smoothing, entropy = self._uniform(y_pred.shape[-1])
        labels = ops.where(real, labels, 0)  # pad_id need not be in the vocabulary
        return ops.where(real, kernels.token_cross_entropy(y_pred, labels, smoothing) - entropy, 0.0)

    def _uniform(self, vocab_size):
        """The smoothing of the uniform form that has the same q, and the entropy to subtract."""
        if self.form == "uniform" or self.smoothing == 0:
            return self.smoothing, 0.0
        if self.smoothing * vocab_size > vocab_size - 1:
            raise ValueError(
                f"smoothing ({self.smoothing}) must be at most (V - 1) / V for a vocabulary of {vocab_size}; "
                "beyond it the true class weighs less than the others."
            )
        entropy = -(1 - self.smoothing) * math.log(1 - self.smoothing)
        entropy -= self.smoothing * math.log(self.smoothing / (vocab_size - 1))
        return self.smoothing * vocab_size / (vocab_size - 1), entropy

    def get_config(self):
        return {"smoothing": self.smoothing, "pad_id": self.pad_id, "form": self.form, "name": self.name}

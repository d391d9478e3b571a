"""What a run reports: perplexity and accuracy of the tokens, BLEU of the translations."""

import json
import math
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from llmfound import kernels
from llmfound.training.losses import checked, real_tokens, spread


class _TokenMean(keras.metrics.MeanMetricWrapper):
    """Mean of a value per token over all real tokens since the last reset; a short batch counts for less."""

    def __init__(self, pad_id=0, name=None, dtype=None):
        super().__init__(self.token_values, name=name, dtype=dtype)
        self.pad_id = pad_id

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred = checked(y_true, y_pred)
        real = real_tokens(y_true, self.pad_id)
        weight = ops.cast(real, self.dtype)
        if sample_weight is not None:
            weight = weight * ops.cast(spread(sample_weight, y_true), self.dtype)
        super().update_state(ops.where(real, y_true, 0), y_pred, weight)

    def get_config(self):
        return {"pad_id": self.pad_id, "name": self.name, "dtype": self.dtype}


@keras.saving.register_keras_serializable(package="llmfound")
class Perplexity(_TokenMean):
    """exp of the mean negative log-likelihood of the real tokens, natural logarithm, without label smoothing.

    perplexity = exp(-1/n sum_t log p(y_t)), the sums running over all batches, so that batches of any sizes give
    the value of the whole. Before the first token it is 1.
    Source: Vaswani et al. 2017, table 3, where it is per piece too, and so cannot be compared between vocabularies.

    Args:
        pad_id: int, the label of padding; None counts every position.
        name: str, the name in the logs.

    Call arguments:
        y_true: int (batch, length), labels.
        y_pred: float (batch, length, vocab_size), logits.
        sample_weight: float (batch,) or (batch, length), or None; how often a token counts.

    Raises:
        ValueError: if labels are not integer, or shapes do not match.
    """

    def __init__(self, pad_id=0, name="perplexity", dtype=None):
        super().__init__(pad_id, name, dtype)
        self._direction = "down"

    def token_values(self, y_true, y_pred):
        return kernels.token_cross_entropy(y_pred, y_true, 0.0)

    def result(self):
        return ops.exp(super().result())


@keras.saving.register_keras_serializable(package="llmfound")
class TokenAccuracy(_TokenMean):
    """The share of the real tokens that have the greatest logit.

    Args, call arguments and errors are those of `Perplexity`.
    """

    def __init__(self, pad_id=0, name="token_accuracy", dtype=None):
        super().__init__(pad_id, name, dtype)
        self._direction = "up"

    def token_values(self, y_true, y_pred):
        return ops.cast(ops.equal(ops.argmax(y_pred, axis=-1), ops.cast(y_true, "int32")), self.dtype)


@dataclass(frozen=True)
class BLEU:
    """A BLEU score with what it takes to reproduce it.

    Attributes:
        score: float, 0 to 100.
        signature: str, sacrebleu's record of tokenizer, case, smoothing and version, to be quoted with the score.
        interval: (low, high), the 95 % bootstrap interval; None if it was not asked for.
    """

    score: float
    signature: str
    interval: tuple | None = None

    def __str__(self):
        interval = "" if self.interval is None else f" [{self.interval[0]:.1f}, {self.interval[1]:.1f}]"
        return f"BLEU {self.score:.1f}{interval} ({self.signature})"


def bleu(hypotheses, references, lowercase=False, tokenize="13a", bootstrap=0):
    """Corpus BLEU of detokenized text, by sacrebleu.

    Source: Papineni et al. 2002; Post 2018, "A Call for Clarity in Reporting BLEU Scores", for the tokenization.
    The papers of this library scored tokenized text with other scripts; their numbers are near, not equal.

    Args:
        hypotheses: sequence of str, one translation a sentence.
        references: sequence as long, of str or of sequences of str, all with the same number of references.
        lowercase: bool, whether case is ignored.
        tokenize: str, sacrebleu's tokenizer; "13a" is that of WMT, "none" takes text that is tokenized already.
        bootstrap: int, resamples of the sentences for the interval, 1000 being usual; 0 gives no interval.

    Returns:
        BLEU.

    Raises:
        ValueError: if there is no hypothesis, the lengths differ, or a hypothesis or reference is not a str.
    """
    from sacrebleu.metrics import BLEU as SacreBLEU

    hypotheses, references = list(hypotheses), [[r] if isinstance(r, str) else list(r) for r in references]
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"need one entry of references per hypothesis; got {len(hypotheses)} and {len(references)}.")
    counts = {len(r) for r in references}
    if len(counts) > 1 or counts == {0}:
        raise ValueError(f"every sentence must have the same number of references; got {sorted(counts)}.")
    for i, texts in enumerate(zip(hypotheses, *zip(*references))):
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"hypotheses and references must be str; entry {i} is {texts!r}.")
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"bootstrap must be 0 or a number of resamples above 1; got {bootstrap}.")
    metric = SacreBLEU(lowercase=lowercase, tokenize=tokenize, force=tokenize == "none")  # quiet: it is meant
    result = metric.corpus_score(hypotheses, list(zip(*references)), n_bootstrap=bootstrap or 1)
    signature = str(metric.get_signature())
    if not bootstrap:
        return BLEU(result.score, signature)
    estimate = json.loads(result.format(width=6, signature=signature, is_json=True))
    middle, half = estimate.get("confidence_mean", 0.0), estimate.get("confidence_var", 0.0)  # absent at score 0
    return BLEU(result.score, signature, (middle - half, middle + half))


def bleu_by_length(hypotheses, references, sources, bins=(10, 20, 30, 40, 50), **options):
    """Corpus BLEU of the sentences of each range of source lengths.

    Source: Bahdanau, Cho, Bengio 2015, figure 2 and section 5.1, which draws it over the length of the sentences.

    Args:
        sources: sequence as long as the hypotheses, of str, whose words are what white space separates, or of int,
            their lengths in words.
        bins: ascending int, the longest source of each bin; what is longer than the last is a bin of its own.
        hypotheses, references, **options: of `bleu`: lowercase, tokenize.

    Returns:
        list of dict, a bin each, shortest first, without those that have no sentence: "low" and "high", int, the
        shortest and longest source that belong there (beyond the last of `bins`, the longest there is); "count", int,
        its sentences; "length", float, their mean source length; "bleu", float, 0 to 100.

    Raises:
        ValueError: as `bleu`, and if the sources are not as many or neither str nor lengths, or bins do not ascend.
    """
    hypotheses, references, sources = list(hypotheses), list(references), list(sources)
    if not 0 < len(hypotheses) == len(references) == len(sources):
        raise ValueError(
            f"need hypotheses, and a reference and a source for each; got {len(hypotheses)}, {len(references)} and "
            f"{len(sources)}."
        )
    lengths = [len(source.split()) if isinstance(source, str) else source for source in sources]
    for i, length in enumerate(lengths):
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 0:
            raise ValueError(f"sources must be str, or their lengths in words; entry {i} is {length!r}.")
    highs = [int(high) for high in (*bins, max(lengths))]
    lows = [0, *(high + 1 for high in highs[:-1])]
    if lows != sorted({*lows}):
        raise ValueError(f"bins must be lengths that ascend; got {bins}.")
    records = []
    for low, high in zip(lows, highs):
        there = [i for i, length in enumerate(lengths) if low <= length <= high]
        if there:
            score = bleu([hypotheses[i] for i in there], [references[i] for i in there], **options).score
            mean = float(np.mean([lengths[i] for i in there]))
            records.append({"low": low, "high": high, "count": len(there), "length": mean, "bleu": score})
    return records


@keras.saving.register_keras_serializable(package="llmfound")
class ErrorRate(keras.metrics.SparseCategoricalAccuracy):
    """The share of examples whose class is not the one with the greatest logit. Arguments are those of its accuracy."""

    def __init__(self, name="error_rate", dtype=None):
        super().__init__(name=name, dtype=dtype)
        self._direction = "down"

    def result(self):
        return 1 - super().result()


def mean_interval(values, confidence=0.95):
    """The mean of some runs, and the interval that holds the true mean with some confidence (Student's t).

    Args:
        values: sequence of float, one for each seed.
        confidence: float, between 0 and 1.

    Returns:
        mean, low, high: float. With one value, low and high are nan.

    Raises:
        ValueError: if there is no value, one is not finite, or the confidence is not between 0 and 1.
    """
    values = np.asarray(list(values), "float64")
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be finite numbers, at least one; got {values.tolist()}.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1; got {confidence}.")
    mean = float(values.mean())
    if len(values) == 1:
        return mean, math.nan, math.nan
    half = _student(confidence, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _student(confidence, freedom):
    """t such that Student's distribution has `confidence` between -t and t; by its density, of sinh-spaced points."""
    t = np.sinh(np.linspace(0, 20, 200_001))
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(t * t / freedom))
    share = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))])
    return float(np.interp(confidence / 2, share, t))

"""What a run needs beside model and data: learning rates, losses, metrics, callbacks, checkpoints."""

from llmfound.training.asgd import ASGD, NonMonotonicTrigger
from llmfound.training.averaging import average_weights
from llmfound.training.callbacks import Progress, TimeBudget
from llmfound.training.checkpoints import Checkpoints
from llmfound.training.discriminative import Discriminative, DiscriminativeAdam, DiscriminativeAdamW, DiscriminativeSGD
from llmfound.training.finder import LearningRates, find_learning_rate
from llmfound.training.losses import SmoothedCrossEntropy
from llmfound.training.metrics import BLEU, ErrorRate, Perplexity, TokenAccuracy, bleu, bleu_by_length, mean_interval
from llmfound.training.optimizers import Adam, AdamW, BERTAdam
from llmfound.training.recorder import NormRecorder
from llmfound.training.schedules import (
    BERTSchedule,
    InverseSquareRoot,
    LinearWarmupDecay,
    SlantedTriangular,
    unfreezing_stages,
)
from llmfound.training.scores import (
    accuracy,
    entity_scores,
    f1,
    matthews_correlation,
    pearson,
    spearman,
    squad_scores,
)
from llmfound.training.unfreezing import GradualUnfreezing, WindowRates

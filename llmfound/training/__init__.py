"""What a run needs beside model and data: learning rates, losses, metrics, callbacks, averaging of checkpoints."""

from llmfound.training.averaging import LastCheckpoints, average_weights
from llmfound.training.callbacks import Progress, TimeBudget
from llmfound.training.losses import SmoothedCrossEntropy
from llmfound.training.metrics import BLEU, Perplexity, TokenAccuracy, bleu
from llmfound.training.optimizers import Adam, AdamW
from llmfound.training.schedules import InverseSquareRoot, LinearWarmupDecay

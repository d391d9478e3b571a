"""What a run needs beside model and data: learning rates, losses, metrics, callbacks, checkpoints."""

from llmfound.training.averaging import average_weights
from llmfound.training.callbacks import Progress, TimeBudget
from llmfound.training.checkpoints import Checkpoints
from llmfound.training.losses import SmoothedCrossEntropy
from llmfound.training.metrics import BLEU, Perplexity, TokenAccuracy, bleu, bleu_by_length
from llmfound.training.optimizers import Adam, AdamW
from llmfound.training.schedules import InverseSquareRoot, LinearWarmupDecay

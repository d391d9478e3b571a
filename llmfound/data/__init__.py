"""Text, tokenizers and batches, the same for every backend."""

from llmfound.data.batching import TranslationBatches, WindowedBatches, pad
from llmfound.data.text import fetch, multi30k, read_lines, read_pairs, read_parallel, tatoeba
from llmfound.data.tokenizers import Tokenizer

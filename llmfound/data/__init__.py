"""Text, tokenizers and batches, the same for every backend."""

from llmfound.data.batching import TranslationBatches, WindowedBatches, pad
from llmfound.data.finetuning import ChoiceBatches, SentenceBatches, TaggingBatches
from llmfound.data.pretraining import (
    Documents,
    PretrainingBatches,
    left_to_right,
    masked_lm,
    read_documents,
    split_sentences,
    write_documents,
)
from llmfound.data.sets import AG_NEWS_CLASSES, IMDB_CLASSES, TREC_CLASSES, ag_news, imdb, trec, wikitext2
from llmfound.data.squad import Question, QuestionAnsweringBatches, read_squad
from llmfound.data.streams import ClassificationBatches, LanguageModelBatches, stream, write_stream
from llmfound.data.tasks import RTE_CLASSES, cola, mrpc, read_conll, read_labelled, rte, sst2, stsb, wnut17
from llmfound.data.text import fetch, multi30k, read_lines, read_pairs, read_parallel, tatoeba
from llmfound.data.tokenizers import Tokenizer
from llmfound.data.wordpiece import WordPiece
from llmfound.data.words import WordTokenizer, words

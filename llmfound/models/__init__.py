from llmfound.models.bert import (
    BERT,
    BERTClassifier,
    BERTEncoder,
    BERTMultipleChoice,
    BERTPretraining,
    BERTQuestionAnswering,
    BERTTokenClassifier,
)
from llmfound.models.rnnsearch import DL4MT, RNNencdec, RNNsearch
from llmfound.models.transformer import Transformer
from llmfound.models.ulmfit import Ensemble, ULMFiT, ULMFiTClassifier

from llmfound.initializers import SquareOrthogonal
from llmfound.layers.attention import AdditiveAttention, MultiHeadAttention, MultiHeadSelfAttention
from llmfound.layers.awd_lstm import AWDLSTM
from llmfound.layers.blocks import PostLNBlock, PreLNBlock, TransformerBlock
from llmfound.layers.dropout import Dropout, EmbeddingDropout, VariationalDropout
from llmfound.layers.embedding import Embedding, PositionalEncoding, PositionEmbedding
from llmfound.layers.feedforward import Dense, FeedForward, Maxout
from llmfound.layers.heads import FirstTokenPooler, LanguageModelHead, MaskedLMHead, PoolingClassifierHead
from llmfound.layers.normalization import LayerNormalization
from llmfound.layers.recurrent import GRU, LSTM, AttentionCell, GatedRecurrence

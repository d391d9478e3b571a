from llmfound.models.transformer import Transformer

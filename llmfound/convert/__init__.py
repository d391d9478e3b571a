"""Weights of other libraries, by name, in and out."""

from llmfound.convert.assign import assign
from llmfound.convert.bert import Conversion
from llmfound.convert.fastai import from_fastai, to_fastai
from llmfound.convert.google import from_google
from llmfound.convert.huggingface import from_huggingface, to_huggingface
from llmfound.convert.keras_hub import from_keras_hub, to_keras_hub

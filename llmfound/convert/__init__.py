"""Weights of other libraries, by name, in and out."""

from llmfound.convert.assign import assign
from llmfound.convert.fastai import from_fastai, to_fastai
from llmfound.convert.huggingface import Conversion, from_huggingface, to_huggingface

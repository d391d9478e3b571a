"""The papers' figures, each made by one command: python -m llmfound reproduce NAME."""

from llmfound.reproduce.bert import Objectives
from llmfound.reproduce.figure import Figure, Results, reproduce
from llmfound.reproduce.preln import Gradients, WarmUp
from llmfound.reproduce.transformer import Heads, Variations

FIGURES = {figure.name: figure for figure in (Variations(), Heads(), Gradients(), WarmUp(), Objectives())}

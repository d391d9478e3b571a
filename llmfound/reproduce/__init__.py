"""The papers' figures, each made by one command: python -m llmfound reproduce NAME."""

from llmfound.reproduce.bert import Objectives
from llmfound.reproduce.figure import Figure, Results, reproduce
from llmfound.reproduce.preln import Gradients, WarmUp

FIGURES = {figure.name: figure for figure in (Gradients(), WarmUp(), Objectives())}

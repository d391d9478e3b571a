"""The papers' figures, each made by one command: python -m llmfound reproduce NAME."""

from llmfound.reproduce.bert import Masking, Objectives
from llmfound.reproduce.figure import Figure, Results, reproduce
from llmfound.reproduce.preln import Gradients, WarmUp
from llmfound.reproduce.rnnsearch import Alignment, Lengths
from llmfound.reproduce.transformer import Heads, Variations
from llmfound.reproduce.ulmfit import Ablation, LowShot

FIGURES = {
    figure.name: figure
    for figure in (
        Lengths(), Alignment(), Variations(), Heads(), Gradients(), WarmUp(), Ablation(), LowShot(), Objectives(),
        Masking(),
    )
}  # fmt: skip

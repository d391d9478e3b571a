"""Pictures: which source tokens each target token looked at."""

import numpy as np


def alignment(weights, source_tokens, target_tokens, title=None, path=None):
    """Heat map of attention, source tokens along the top, target tokens down the side; darker is more.

    Source: Bahdanau, Cho, Bengio 2015, figure 3.

    Args:
        weights: float (target_length, source_length), not negative; rows and columns beyond the tokens are cut.
        source_tokens: list of str.
        target_tokens: list of str.
        title: str, above the picture.
        path: file to save it to; its ending says the format.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError: if the weights are not of rank 2, not finite, negative, or fewer than the tokens.
        ImportError: if matplotlib is missing.
    """
    weights = np.asarray(weights, "float64")
    if weights.ndim != 2:
        raise ValueError(f"weights must be (target_length, source_length); got shape {weights.shape}.")
    rows, columns = len(target_tokens), len(source_tokens)
    if not (0 < rows <= weights.shape[0] and 0 < columns <= weights.shape[1]):
        raise ValueError(
            f"weights {weights.shape} must cover all tokens, (target, source) = ({rows}, {columns}), of which there "
            "must be at least one each."
        )
    weights = weights[:rows, :columns]
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError(f"weights must be finite and not negative; got {weights.min()} to {weights.max()}.")
    figure, axes = _figure(columns, rows)
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=max(weights.max(), 1e-9), aspect="equal")
    axes.set_xticks(range(columns), [_short(token) for token in source_tokens], rotation=60, ha="left", va="bottom")
    axes.set_yticks(range(rows), [_short(token) for token in target_tokens])
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False, pad=4)
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)
    if title:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return figure


def _figure(columns, rows):
    """A figure that belongs to no window and no global list, with room for so many cells."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install llmfound[plots]") from error
    size = 0.42 if max(columns, rows) <= 30 else 0.28
    figure = Figure(figsize=(max(size * columns + 2.2, 4), max(size * rows + 1.6, 3)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _short(token, longest=14):
    """The token as a label: without the mark of a word's start, and no dollar sign, which would start a formula."""
    token = token.removeprefix("▁")
    token = token if len(token) <= longest else token[: longest - 1] + "…"
    return token.replace("$", r"\$")

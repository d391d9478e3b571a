"""Pictures: which source tokens each target token looked at, how training went, and how well long sentences fare."""

import warnings
from typing import NamedTuple

import numpy as np

# Tried after matplotlib's own font, which has neither Chinese nor Japanese nor Korean.
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Hiragino Sans", "PingFang SC", "Yu Gothic",
         "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS", "Noto Emoji")  # fmt: skip


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
    weights = _covered(weights, rows, columns)
    cell = 0.42 if max(columns, rows) <= 30 else 0.28  # inches
    figure, [[axes]] = _figure(cell * columns + 2.7, max(cell * rows + 1.9, 2.9))
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=weights.max() or 1, aspect="equal")
    labels, text = _labels([*source_tokens, *target_tokens])
    axes.set_xticks(range(columns), labels[:columns], rotation=60, ha="left", va="bottom", **text)
    axes.set_yticks(range(rows), labels[columns:], **text)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False, pad=4)
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("source, looked at")
    axes.set_ylabel("target, looking")
    _weight_bar(figure, image, axes, shrink=0.6)
    return _finish(figure, title, path)


def heads(weights, query_tokens, key_tokens=None, titles=None, title=None, path=None):
    """Heat maps of the attention of all heads, a row for each layer, from the first at the top; darker is more.

    In each map the token of a row looks at those of the columns; all have one scale, from 0 to 1.

    Source: Vaswani et al. 2017, figures 3 to 5, which show single heads.

    Args:
        weights: float (layers, heads, queries, keys), not negative; what is beyond the tokens is cut.
        query_tokens: list of str.
        key_tokens: list of str; None takes the query's tokens.
        titles: str (layers, heads), over each map beneath the numbers of its layer and head, which count from 1.
        title, path: as in `alignment`.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError: if the weights are not of rank 4, not finite, negative, or fewer than the tokens.
        ImportError: if matplotlib is missing.
    """
    key_tokens = query_tokens if key_tokens is None else key_tokens
    weights = np.asarray(weights, "float64")
    if weights.ndim != 4:
        raise ValueError(f"weights must be (layers, heads, queries, keys); got shape {weights.shape}.")
    rows, columns = len(query_tokens), len(key_tokens)
    weights = _covered(weights, rows, columns)
    layers, count = weights.shape[:2]
    labels, text = _labels([*query_tokens, *key_tokens])
    over = [[f"layer {i + 1}, head {j + 1}" for j in range(count)] for i in range(layers)]
    if titles is not None:
        over = [[f"{one}\n{text}" for one, text in zip(*row)] for row in zip(over, titles)]
    longest = max(len(line) for row in over for text in row for line in text.split("\n"))
    width, height = max(0.14 * columns, 0.06 * longest), 0.14 * rows + (0.3 if titles is None else 0.45)  # inches
    figure, panels = _figure(count * (width + 0.3) + 2.1, max(layers * (height + 0.2) + 1.5, 2.6), layers, count,
                             sharex=True, sharey=True)  # fmt: skip
    for i, j in np.ndindex(layers, count):
        axes = panels[i, j]
        image = axes.imshow(weights[i, j], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(over[i][j], fontsize=8)
        axes.set_xticks(range(columns), labels[rows:], rotation=90, fontsize=7, **text)
        axes.set_yticks(range(rows), labels[:rows], fontsize=7, **text)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_color("0.8")
    figure.supxlabel("token that is looked at", fontsize=9)
    figure.supylabel("token that looks", fontsize=9)
    _weight_bar(figure, image, panels, shrink=1 / layers, aspect=15)
    return _finish(figure, title, path)


def training_curve(history, title=None, path=None):
    """Curves of what training recorded, one panel for each quantity, with its validation in the same panel.

    Args:
        history: what `fit` returns, or its dict of lists, or a list of dicts, one for each point, in which a quantity
            may be missing. "step" gives the horizontal axis; without it the points are epochs, from 1.
        title: str, above the picture.
        path: file to save it to; its ending says the format.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError: if there is nothing to draw, or the lists differ in length.
        ImportError: if matplotlib is missing.
    """
    series = _series(history)
    name_of_x = "step" if "step" in series else "epoch"
    x = series.pop("step", None)
    lengths = {name: len(y) for name, y in series.items()}
    if not lengths or min(lengths.values()) == 0:
        raise ValueError(f"history must hold at least one quantity and one point; got lengths {lengths}.")
    points = max(lengths.values())
    x = np.arange(1, points + 1) if x is None else x
    if {*lengths.values(), len(x)} != {points}:
        raise ValueError(
            f"history must hold lists of one length; got {lengths}, and {len(x)} on the horizontal axis. A list of "
            "dicts, one for each point, may leave out what was not measured there."
        )
    names = list(dict.fromkeys(name.removeprefix("val_") for name in series))
    columns = 2 if len(names) == 4 else min(len(names), 3)
    rows = -(-len(names) // columns)
    figure, panels = _figure(4 * columns, 3 * rows, rows, columns)
    for axes, name in zip(panels.flat, names):
        for key, label, color in ((name, "training", "C0"), (f"val_{name}", "validation", "C1")):
            if key in series:
                there = np.isfinite(series[key])
                style = dict(marker="." if there.sum() <= 30 else "", label=label, color=color)
                axes.plot(x[there], series[key][there], **style)
        axes.set_title(name.replace("_", " "), fontsize="medium")
        axes.set_xlabel(name_of_x)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if {name, f"val_{name}"} <= set(series):
            axes.legend(frameon=False)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    return _finish(figure, title, path)


def bleu_by_length(systems, title=None, path=None):
    """BLEU over the length of the source, one line for each system, and below it how many sentences each bin has.

    Source: Bahdanau, Cho, Bengio 2015, figure 2.

    Args:
        systems: dict, name -> what `llmfound.training.bleu_by_length` returns, all of the same sources and bins.
        title: str, above the picture.
        path: file to save it to; its ending says the format.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError: if there is no system or bin, or the systems differ in their bins.
        ImportError: if matplotlib is missing.
    """
    bins = {
        name: [tuple(record[key] for key in ("low", "high", "count", "length")) for record in records]
        for name, records in systems.items()
    }
    if not bins or not all(bins.values()):
        raise ValueError(f"There must be a system, and a bin of each; got {bins}.")
    [(first, expected), *others] = bins.items()
    for name, found in others:
        if found != expected:
            raise ValueError(
                f"All systems must be scored on the same sources and bins, (low, high, count, length); {first!r} has "
                f"{expected}, {name!r} has {found}."
            )
    low, high, count, length = np.array(expected).T
    high[-1] = min(high[-1], max(2 * length[-1] - low[-1], low[-1]))  # one very long sentence shall not fill the axis
    figure, [[axes], [below]] = _figure(6.4, 4.4, 2, 1, height_ratios=[6, 1], sharex=True)
    for i, (name, records) in enumerate(systems.items()):
        axes.plot(length, [record["bleu"] for record in records], "osD^v"[i % 5] + "-", markersize=4, label=name)
    axes.set_ylabel("BLEU")
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.tick_params(bottom=False)
    bars = below.bar((low + high) / 2, count, high - low + 0.6, color="0.85")
    below.bar_label(bars, [f"{int(n):,}" for n in count], padding=1, fontsize=8, color="0.45")
    below.set_xlim(0, high.max() + 1)
    below.set_ylim(0, 1.5 * count.max())
    below.set_yticks([])
    below.set_ylabel("sentences", color="0.45", fontsize=8, rotation=0, ha="right", va="center")
    below.set_xlabel("words in the source sentence")
    for panel in (axes, below):
        panel.spines[["top", "right"]].set_visible(False)
    below.spines["left"].set_visible(False)
    return _finish(figure, title, path)


def learning_rates(found, title=None, path=None):
    """The loss over the rates that `llmfound.training.find_learning_rate` tried, and the one that it suggests.

    Source: Smith 2017, section 3.3.

    Args:
        found: LearningRates.
        title: str, above the picture.
        path: file to save it to; its ending says the format.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError: if there is nothing to draw.
        ImportError: if matplotlib is missing.
    """
    if not found.rates:
        raise ValueError("There is no rate to draw.")
    figure, [[axes]] = _figure(6.4, 4)
    axes.plot(found.rates, found.losses, color="0.8", linewidth=1, label="each batch")
    axes.plot(found.rates, found.smooth, label="running mean")
    axes.axvline(found.suggestion, color="C1", linestyle="--", label=f"steepest: {found.suggestion:.2g}")
    axes.set_xscale("log")
    low, first = min(found.smooth), found.smooth[0]
    axes.set_ylim(low - 0.1 * abs(first - low), first + 0.5 * abs(first - low))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _finish(figure, title, path)


class Panel(NamedTuple):
    """Curves over one axis.

    series: dict, name -> (x, mean, low, high), each a sequence of float; low to high is shaded.
    log: "", "x", "y" or "xy", the logarithmic axes.
    """

    title: str
    x_label: str
    y_label: str
    series: dict
    log: str = ""


def lines(panels, title=None, path=None, within=None):
    """Panels side by side, of curves with their intervals; a name has one colour in all of them.

    Args:
        panels: list of Panel.
        title: str, above the picture.
        path: file to save it to; its ending says the format.
        within: (low, high), what the values cannot leave, (0, 100) for percentages; None is no bound, nor is None in
            place of one of them. Intervals end there.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError: if there is no panel, a curve's parts are not of one length, or a mean is not within the range.
        ImportError: if matplotlib is missing.
    """
    if not panels:
        raise ValueError("There must be at least one panel.")
    figure, [row] = _figure(4.6 * len(panels) + 0.8, 3.8, columns=len(panels))
    from matplotlib.ticker import MaxNLocator, NullLocator

    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    for axes, panel in zip(row, panels):
        for name, parts in panel.series.items():
            x, mean, low, high = (np.asarray(part, "float64") for part in parts)
            if not x.shape == mean.shape == low.shape == high.shape:
                raise ValueError(f"{name}: x, mean, low and high must be of one length; got {[len(p) for p in parts]}.")
            low, high = _bounded(name, mean, low, high, within)
            colour = f"C{names.index(name)}"
            axes.plot(x, mean, color=colour, marker="o", markersize=3.5, label=name)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        for axis, scale, ticks in (("x", axes.set_xscale, axes.xaxis), ("y", axes.set_yscale, axes.yaxis)):
            if axis in panel.log:
                scale("log", base=2)
                ticks.set_major_locator(MaxNLocator(6))
                ticks.set_minor_locator(NullLocator())
                ticks.set_major_formatter("{x:g}")
        places = sorted({float(x) for parts in panel.series.values() for x in parts[0]})
        if len(places) <= 8:
            axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        negative = any((np.asarray(parts[1]) < 0).any() for parts in panel.series.values())
        if "y" not in panel.log and not negative:
            axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # a line at 0 is seen in its whole width
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    row[0].legend(frameon=False, fontsize=9)
    return _finish(figure, title, path)


def norms(recorder, title=None, path=None):
    """What a `training.NormRecorder` found: gradients and outputs, steps along, layers up, darker is larger.

    Args:
        recorder: NormRecorder, or any object with `names`, `steps`, `gradients` and `activations`.
        title, path: as in `lines`.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError: if nothing is recorded yet.
        ImportError: if matplotlib is missing.
    """
    if not len(recorder.steps):
        raise ValueError("Nothing is recorded yet; give the recorder to fit first.")
    width, height = np.clip(1.6 + 0.2 * len(recorder.steps), 2.6, 4.5), max(1.4 + 0.25 * len(recorder.names), 3.2)
    figure, [row] = _figure(2 * width + 2, height, columns=2, sharey=True)
    from matplotlib.colors import LogNorm

    panels = (("gradient of the weights", recorder.gradients), ("length of the outputs", recorder.activations))
    for axes, (name, values) in zip(row, panels):
        values = np.asarray(values, "float64").T
        real = values[np.isfinite(values) & (values > 0)]
        low, high = (real.min(), real.max()) if real.size else (1, 1)
        shown = np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values)
        high = max(high, low * 1.01)
        image = axes.imshow(shown, aspect="auto", origin="lower", cmap="Blues", norm=LogNorm(low, high))
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        ticks = np.geomspace(low, high, 5)
        bar.set_ticks(ticks, labels=[f"{x:.3g}" for x in ticks], fontsize=8)
        bar.minorticks_off()
        axes.set_title(name, fontsize=10)
        places = range(0, len(recorder.steps), -(-len(recorder.steps) // 6))
        axes.set_xticks(places, [f"{recorder.steps[i]:,}" for i in places], fontsize=8)
        axes.set_xlabel("step")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    row[0].set_yticks(range(len(recorder.names)), recorder.names, fontsize=8)
    return _finish(figure, title, path)


def bars(groups, labels, y_label="", title=None, path=None, within=None):
    """Groups of bars with their values and intervals, one colour for each name; with one name there is no legend.

    Args:
        groups: dict, name -> list of (mean, low, high), one for each label.
        labels: list of str, along the axis.
        y_label: str.
        title, path, within: as in `lines`.

    Returns:
        matplotlib.figure.Figure.

    Raises:
        ValueError: if there is no bar, a name has not as many as there are labels, or a mean is not within the range.
        ImportError: if matplotlib is missing.
    """
    if not groups or not len(labels):
        raise ValueError(f"There must be at least one bar; got {len(groups)} groups and {len(labels)} labels.")
    figure, [[axes]] = _figure(max(4.5, 1.2 * len(labels) + 0.5 * len(labels) * len(groups)), 3.8)
    width, decimals = 0.8 / len(groups), _decimals([one[0] for found in groups.values() for one in found])
    for i, (name, found) in enumerate(groups.items()):
        if len(found) != len(labels):
            raise ValueError(f"{name} has {len(found)} bars for {len(labels)} labels.")
        mean, low, high = np.array(found, "float64").T
        low, high = _bounded(name, mean, low, high, within)
        places = np.arange(len(labels)) + (i - (len(groups) - 1) / 2) * width
        ends = np.where(high > low, np.maximum([mean - low, high - mean], 0), np.nan)  # no interval, no sign of one
        axes.bar(places, mean, width * 0.92, yerr=ends, capsize=3, label=name)
        for x, y, bottom, top in zip(places, mean, low, high):
            text = f"{y:,.{decimals}f}".replace("-", "−") if np.isfinite(y) else ""
            side = dict(xytext=(0, -3), va="top") if y < 0 else dict(xytext=(0, 3), va="bottom")
            end = np.fmin(y, bottom) if y < 0 else np.fmax(y, top)
            axes.annotate(text, (x, end), textcoords="offset points", fontsize=8, ha="center", **side)
    axes.margins(y=0.1)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(y_label)
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(groups))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return _finish(figure, title, path)


def _series(history):
    """{name: float (points,)}, NaN where a point lacks a quantity."""
    history = getattr(history, "history", history)
    if not isinstance(history, dict):
        records = list(history)
        names = dict.fromkeys(name for record in records for name in record)
        history = {name: [record.get(name, np.nan) for record in records] for name in names}
    return {name: np.asarray(values, "float64") for name, values in history.items()}


def _figure(width, height, rows=1, columns=1, **options):
    """A figure that belongs to no window and no global list, and its panels (rows, columns); sizes in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install ".[plots]" in a clone of llmfound.') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _finish(figure, title, path):
    if title:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return figure


def _covered(weights, rows, columns):
    """The weights (..., target, source) of the tokens alone."""
    if not (0 < rows <= weights.shape[-2] and 0 < columns <= weights.shape[-1]):
        raise ValueError(
            f"weights {weights.shape} must cover all tokens, (target, source) = ({rows}, {columns}), of which there "
            "must be at least one each."
        )
    weights = weights[..., :rows, :columns]
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError(f"weights must be finite and not negative; got {weights.min()} to {weights.max()}.")
    return weights


def _weight_bar(figure, image, axes, **options):
    bar = figure.colorbar(image, ax=axes, pad=0.02, **options)
    bar.outline.set_visible(False)
    bar.set_label("weight", fontsize=9)
    bar.ax.tick_params(labelsize=9)


def _bounded(name, mean, low, high, within):
    """The ends of the intervals, none of them outside of what the values can be."""
    if within is None:
        return low, high
    bottom, top = (default if end is None else end for end, default in zip(within, (-np.inf, np.inf)))
    if not np.allclose(mean, np.clip(mean, bottom, top), equal_nan=True):
        raise ValueError(f"{name} has means from {mean.min():g} to {mean.max():g}, not within {within}.")
    return np.clip(low, bottom, top), np.clip(high, bottom, top)


def _decimals(numbers):
    """How many decimals to write them all with."""
    real = np.abs([number for number in numbers if np.isfinite(number)])
    return 0 if (real == np.round(real)).all() else 1 if real.max() >= 10 else 2 if real.max() >= 1 else 3


def _labels(tokens):
    """The tokens as short labels, and matplotlib's settings for writing them as they are.

    A box stands for what no font has, with one warning for all; matplotlib would warn at each, whenever it draws.
    """
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ["sans-serif", *(name for name in FONTS if name in installed)]
    properties = [font_manager.FontProperties(family=[family]) for family in families]
    fonts = [font_manager.get_font(font_manager.findfont(one)) for one in properties]
    labels = [_short(token) for token in tokens]
    missing = {c for c in set("".join(labels)) if not any(font.get_char_index(ord(c)) for font in fonts)}
    if missing:
        warnings.warn(f"No font here has {' '.join(sorted(missing))}; a box stands for each.", stacklevel=3)
        labels = [label.translate(dict.fromkeys(map(ord, missing), "□")) for label in labels]
    return labels, dict(family=families, parse_math=False)


def _short(token, longest=14):
    """The token without the mark of a word's start, on one line, and not too long."""
    token = token.removeprefix("▁") or token
    token = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)
    return token if len(token) <= longest else token[: longest - 1] + "…"

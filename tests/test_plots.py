"""Pictures: the right numbers, labels one can read, and files that are what they should be."""

import itertools
import sys
import types
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from llmfound import plots, training

pytestmark = pytest.mark.on_one_backend


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def weights(rows, columns):
    values = np.random.default_rng(0).random((rows, columns))
    return values / values.sum(axis=1, keepdims=True)


def words(count, prefix="word"):
    return [f"▁{prefix}{i}" for i in range(count)]


def labels(figure):
    """What stands along the top and down the side."""
    axes = figure.axes[0]
    return [[text.get_text() for text in ticks] for ticks in (axes.get_xticklabels(), axes.get_yticklabels())]


def boxes(texts, figure):
    figure.canvas.draw()
    return [text.get_window_extent() for text in texts]


# alignment


def test_the_picture_shows_the_weights():
    found = weights(3, 4)
    figure = plots.alignment(found, ["The", "cat", "sat", "."], ["Le", "chat", "."], title="A title")
    image = figure.axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), found)
    assert image.get_clim() == (0, found.max())
    dark, light = (sum(image.cmap(image.norm(v))[:3]) for v in (found.max(), 0.0))
    assert dark < light
    assert labels(figure) == [["The", "cat", "sat", "."], ["Le", "chat", "."]]
    assert figure.get_suptitle() == "A title"
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("source, looked at", "target, looking")
    assert bar.get_ylabel() == "weight"


def test_weights_of_padding_are_cut_and_do_not_fade_the_rest():
    found = np.pad(weights(2, 3), ((0, 2), (0, 1)))
    found[2:] = 50.0
    image = plots.alignment(found, words(3), words(2)).axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), found[:2, :3])
    assert image.get_clim()[1] <= 1


def test_the_first_target_word_is_at_the_top_and_its_label_beside_its_row():
    figure = plots.alignment(weights(3, 4), words(4), words(3))
    axes = figure.axes[0]
    rows = [box.y0 for box in boxes(axes.get_yticklabels(), figure)]
    assert rows == sorted(rows, reverse=True)
    for ticks, axis in ((axes.get_xticklabels(), 0), (axes.get_yticklabels(), 1)):
        for i, box in enumerate(boxes(ticks, figure)):
            center = axes.transData.transform((i, i))[axis]
            low, high = (box.x0, box.x1) if axis == 0 else (box.y0, box.y1)
            assert low - 1 <= center <= high + 1
    assert min(box.y0 for box in boxes(axes.get_xticklabels(), figure)) >= axes.get_window_extent().y1


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 60), (60, 1), (10, 12), (60, 60)])
def test_labels_do_not_overlap_and_stay_in_the_picture(rows, columns):
    figure = plots.alignment(weights(rows, columns), words(columns), words(rows, "mot"), title="T")
    side = boxes(figure.axes[0].get_yticklabels(), figure)
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(side))
    top = boxes(figure.axes[0].get_xticklabels(), figure)
    # Text of a height h at 60 degrees leaves h / sin 60 to its neighbour.
    height = side[0].height
    assert all(right.x0 - left.x0 >= height / np.sin(np.pi / 3) - 2 for left, right in itertools.pairwise(top))
    whole = figure.bbox
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.y1 <= whole.y1 for box in (*side, *top))
    assert max(figure.get_size_inches()) < 25


def test_accents_and_word_marks():
    tokens = ["▁J'", "ai", "▁été", "▁naïve", "▁cœur", "▁", "…", "«", "</s>"]
    assert labels(plots.alignment(weights(9, 9), tokens, tokens))[0] == [
        "J'", "ai", "été", "naïve", "cœur", "▁", "…", "«", "</s>"
    ]  # fmt: skip


def test_long_tokens_are_cut_and_control_characters_shown():
    tokens = ["Donaudampfschifffahrt", "exactlyfifteen.", "fourteen chars", "a\nb", "\t", "\x00"]
    assert labels(plots.alignment(weights(1, 6), tokens, ["x"]))[0] == [
        "Donaudampfsch…", "exactlyfiftee…", "fourteen chars", r"a\nb", r"\t", r"\x00"
    ]  # fmt: skip


def test_no_token_is_taken_for_a_formula(tmp_path):
    tokens = ["$5", "$x^2$", "$\\frac{", r"\alpha", "_a_", "%", "{"]
    figure = plots.alignment(weights(7, 7), tokens, tokens, path=tmp_path / "a.png")
    assert labels(figure) == [tokens, tokens]


def test_a_character_that_no_font_has_becomes_a_box_and_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FONTS", ())
    tokens = ["▁a東", "東京", "b"] * 5
    with matplotlib.rc_context({"font.sans-serif": ["DejaVu Sans"]}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = plots.alignment(weights(15, 15), tokens, tokens, path=tmp_path / "a.png")
        figure.canvas.draw()
    assert [str(warning.message) for warning in caught] == ["No font here has 京 東; a box stands for each."]
    assert labels(figure)[0][:3] == ["a□", "□□", "b"]


def test_chinese_and_emoji_are_drawn_or_boxed(tmp_path):
    tokens = ["▁東京", "▁ありがとう", "▁한국어", "▁🍣", "👩\u200d🚀"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = plots.alignment(weights(5, 5), tokens, tokens, path=tmp_path / "a.png")
    assert len(caught) <= 1 and all("a box stands for each" in str(warning.message) for warning in caught)
    assert [len(label) for label in labels(figure)[0]] == [2, 5, 3, 1, 8]


def test_nothing_but_zeros():
    figure = plots.alignment(np.zeros((2, 3)), words(3), words(2))
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    figure.canvas.draw()


@pytest.mark.parametrize("ending, beginning", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_ending_of_the_path_says_the_format(tmp_path, ending, beginning):
    path = tmp_path / f"a.{ending}"
    plots.alignment(weights(2, 2), ["a", "é"], ["b", "œ"], path=path)
    assert path.read_bytes().startswith(beginning)
    plots.training_curve({"loss": [2.0, 1.0]}, path=str(path))
    assert path.read_bytes().startswith(beginning)


def test_no_window_is_opened_and_no_global_figure_kept():
    before = plt.get_fignums()
    plots.alignment(weights(2, 2), ["a", "b"], ["c", "d"])
    plots.training_curve({"loss": [1.0]})
    assert plt.get_fignums() == before


@pytest.mark.parametrize(
    "found, source, target, message",
    [
        (np.ones(3), 3, 1, r"weights must be \(target_length, source_length\); got shape \(3,\)"),
        (np.ones((1, 2, 3)), 3, 2, r"got shape \(1, 2, 3\)"),
        (np.ones((2, 3)), 2, 3, r"weights \(2, 3\) must cover all tokens, \(target, source\) = \(3, 2\)"),
        (np.ones((2, 3)), 4, 2, r"\(target, source\) = \(2, 4\)"),
        (np.ones((2, 3)), 0, 2, r"\(target, source\) = \(2, 0\), of which there must be at least one each"),
        (np.ones((2, 3)), 3, 0, r"\(target, source\) = \(0, 3\)"),
        (np.array([[0.5, -0.5]]), 2, 1, "finite and not negative; got -0.5 to 0.5"),
        (np.array([[0.5, np.nan]]), 2, 1, "finite and not negative; got nan to nan"),
        (np.array([[0.5, np.inf]]), 2, 1, "finite and not negative; got 0.5 to inf"),
    ],
)
def test_bad_weights(found, source, target, message):
    with pytest.raises(ValueError, match=message):
        plots.alignment(found, words(source), words(target))


# heads


def test_every_head_has_a_map(tmp_path):
    found = np.random.default_rng(0).dirichlet(np.ones(5), (2, 3, 6))
    titles = [["a", "", ""], ["", "", "b"]]
    figure = plots.heads(found, words(4), words(5, "key"), titles, path=tmp_path / "heads.png")
    *panels, bar = figure.axes
    assert len(panels) == 6 and (tmp_path / "heads.png").stat().st_size > 5000
    for axes, expected in zip(panels, found[:, :, :4].reshape(6, 4, 5)):
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)
        assert axes.images[0].get_clim() == (0, 1)  # so that maps can be compared
    assert [axes.get_title() for axes in panels[::5]] == ["layer 1, head 1\na", "layer 2, head 3\nb"]
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("token that is looked at", "token that looks")
    assert bar.get_ylabel() == "weight" and bar.get_ylim() == (0, 1)
    assert [text.get_text() for text in figure.axes[3].get_yticklabels()] == [f"word{i}" for i in range(4)]
    assert [text.get_text() for text in figure.axes[3].get_xticklabels()] == [f"key{i}" for i in range(5)]
    single = plots.heads(found[:1, :1, :5], words(5))  # the keys are the queries
    assert [axes.get_title() for axes in single.axes] == ["layer 1, head 1", ""]


def test_titles_over_narrow_maps_do_not_overlap():
    titles = [["looks at the one before", "looks at the same"]] * 2
    figure = plots.heads(np.full((2, 2, 2, 2), 0.5), words(2), titles=titles)
    left, right = boxes([axes.title for axes in figure.axes[:2]], figure)
    assert left.x1 < right.x0 and left.x0 >= 0 and right.x1 < figure.bbox.x1


@pytest.mark.parametrize(
    "found, message",
    [
        (np.ones((2, 3, 3)), r"must be \(layers, heads, queries, keys\); got shape \(2, 3, 3\)"),
        (np.ones((1, 1, 2, 3)), r"\(1, 1, 2, 3\) must cover all tokens, \(target, source\) = \(3, 3\)"),
        (-np.ones((1, 1, 3, 3)), "finite and not negative; got -1.0 to -1.0"),
    ],
)
def test_bad_weights_of_heads(found, message):
    with pytest.raises(ValueError, match=message):
        plots.heads(found, words(3))


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Plots need matplotlib: pip install \"\.\[plots\]\""):
        plots.alignment(weights(1, 1), ["a"], ["b"])


# training_curve


def curves(figure):
    """{panel: {label: (x, y)}}"""
    return {
        axes.get_title(): {line.get_label(): [list(x) for x in line.get_data()] for line in axes.lines}
        for axes in figure.axes
        if axes.axison
    }


HISTORY = {"loss": [3.0, 2.0], "learning_rate": [0.1, 0.05], "val_loss": [3.5, 2.5], "val_bleu": [10.0, 20.0]}
EXPECTED = {
    "loss": {"training": [[1, 2], [3.0, 2.0]], "validation": [[1, 2], [3.5, 2.5]]},
    "learning rate": {"training": [[1, 2], [0.1, 0.05]]},
    "bleu": {"validation": [[1, 2], [10.0, 20.0]]},
}


@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        types.SimpleNamespace(history=HISTORY, epoch=[0, 1]),
        [dict(zip(HISTORY, values)) for values in zip(*HISTORY.values())],
    ],
    ids=["dict", "History", "records"],
)
def test_every_quantity_has_a_panel(history):
    figure = plots.training_curve(history, title="A run")
    assert curves(figure) == EXPECTED
    assert figure.get_suptitle() == "A run"
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch"] * 3
    assert [axes.get_legend() is not None for axes in figure.axes] == [True, False, False]


def test_what_fit_returns():
    import keras

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    history = model.fit(np.ones((4, 1)), np.ones((4, 1)), epochs=2, verbose=0)
    assert curves(plots.training_curve(history)) == {"loss": {"training": [[1, 2], history.history["loss"]]}}


def test_steps_and_gaps():
    records = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": np.nan, "val_loss": 2.5}, {"step": 30, "loss": 2.0}]
    figure = plots.training_curve(records)
    assert curves(figure) == {"loss": {"training": [[10, 30], [3.0, 2.0]], "validation": [[20], [2.5]]}}
    assert figure.axes[0].get_xlabel() == "step"
    assert "step" in records[0]


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (7, (3, 3))])
def test_panels_fill_rows(count, shape):
    figure = plots.training_curve({f"metric_{i}": [1.0, 2.0] for i in range(count)})
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape
    assert sum(axes.axison for axes in figure.axes) == count == len(curves(figure))


def test_ticks_of_one_epoch_are_whole_numbers():
    figure = plots.training_curve({"loss": [2.0]})
    figure.canvas.draw()
    shown = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert shown and all(text.lstrip("−").isdigit() for text in shown)


@pytest.mark.parametrize(
    "history, message",
    [
        ({}, "at least one quantity and one point; got lengths {}"),
        ([], "at least one quantity and one point; got lengths {}"),
        ({"loss": []}, "at least one quantity and one point; got lengths {'loss': 0}"),
        ({"step": [1, 2]}, "at least one quantity"),
        ({"loss": [1, 2], "val_loss": [1]}, "lists of one length; got {'loss': 2, 'val_loss': 1}, and 2 on"),
        ({"loss": [1, 2], "step": [1, 2, 3]}, "one length; got {'loss': 2}, and 3 on the horizontal axis"),
    ],
)
def test_bad_histories(history, message):
    with pytest.raises(ValueError, match=message):
        plots.training_curve(history)


# bleu_by_length


BINS = [(0, 10, 420, 7.5), (11, 20, 1100, 15.5), (21, 88, 63, 30.0)]


def records(scores, bins=BINS):
    return [dict(zip(("low", "high", "count", "length", "bleu"), (*b, score))) for b, score in zip(bins, scores)]


SYSTEMS = {"RNNsearch": records([24.0, 27.0, 26.0]), "RNNencdec": records([22.0, 21.0, 3.0])}


def test_a_line_for_each_system_over_the_mean_lengths():
    figure = plots.bleu_by_length(SYSTEMS, title="English to French")
    axes, below = figure.axes
    lines = {line.get_label(): [list(x) for x in line.get_data()] for line in axes.lines}
    assert lines == {
        "RNNsearch": [[7.5, 15.5, 30.0], [24.0, 27.0, 26.0]],
        "RNNencdec": [[7.5, 15.5, 30.0], [22.0, 21.0, 3.0]],
    }
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(SYSTEMS)
    assert figure.get_suptitle() == "English to French"
    assert axes.get_ylim()[0] == 0 and axes.get_ylabel() == "BLEU"
    assert below.get_xlabel() == "words in the source sentence"
    assert axes.get_xlim() == below.get_xlim()


def test_the_bins_show_how_many_sentences_they_have():
    below = plots.bleu_by_length(SYSTEMS).axes[1]
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in below.patches]
    np.testing.assert_allclose(bars, [(-0.3, 10.3, 420), (10.7, 20.3, 1100), (20.7, 39.3, 63)])  # the last: 2 * 30 - 21
    assert [text.get_text() for text in below.texts] == ["420", "1,100", "63"]


def test_one_system_of_one_sentence_and_scores_of_zero(tmp_path):
    figure = plots.bleu_by_length({"a": records([0.0], [(51, 60, 1, 51.0)])}, path=tmp_path / "a.png")
    assert figure.axes[1].get_xlim() == (0, 52) and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_what_training_measures_can_be_drawn():
    from llmfound.training import bleu_by_length

    found = bleu_by_length(["a b c d", "a b c d e"], ["a b c d", "a b c d f"], ["one", "one two three"], bins=(2,))
    [line] = plots.bleu_by_length({"a": found}).axes[0].lines
    assert list(line.get_xdata()) == [1, 3] and line.get_ydata()[0] == pytest.approx(100) and line.get_ydata()[1] < 90


@pytest.mark.parametrize(
    "systems, message",
    [
        ({}, "There must be a system, and a bin of each; got {}"),
        ({"a": SYSTEMS["RNNsearch"], "b": []}, r"a bin of each; got .*'b': \[\]"),
        (
            {"a": SYSTEMS["RNNsearch"], "b": records([1.0], BINS[:1])},
            r"'a' has .*63, 30.0\)\], 'b' has \[\(0, 10, 420, 7.5\)\]",
        ),
        (
            {"a": records([1.0], BINS[:1]), "b": records([1.0], [(0, 10, 421, 7.5)])},
            "same sources and bins, .*'a' has .*420, .*'b' has .*421",
        ),
    ],
)
def test_bad_bins(systems, message):
    with pytest.raises(ValueError, match=message):
        plots.bleu_by_length(systems)


# learning_rates


def test_the_rates_that_were_tried(tmp_path):
    rates = [10.0**n for n in range(-5, 1)]
    found = training.LearningRates(rates, [3.0, 2.9, 2.5, 1.5, 1.6, 9.0], [3.0, 2.9, 2.6, 1.8, 1.7, 4.0], 1e-2)
    figure = plots.learning_rates(found, title="A search", path=tmp_path / "rates.png")
    [lines] = curves(figure).values()
    assert lines["each batch"] == [rates, found.losses] and lines["running mean"] == [rates, found.smooth]
    assert lines["steepest: 0.01"][0] == [1e-2, 1e-2]
    [axes] = figure.axes
    low, high = axes.get_ylim()
    assert axes.get_xscale() == "log" and low < 1.7 and 3.0 < high < 4.0  # where it diverges is cut off
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rate to draw"):
        plots.learning_rates(training.LearningRates([], [], [], 0.1))


# Curves and bars with their intervals


def test_lines_have_one_colour_a_name_and_their_intervals(tmp_path):
    x, curve = [1, 2, 4], ([3, 2, 1], [2, 1, 0], [4, 3, 2])
    panels = [
        plots.Panel("left", "layers", "norm", {"one": (x, *curve), "two": (x, *curve)}),
        plots.Panel("right", "layers", "", {"two": (x, *curve)}, log="xy"),
    ]
    figure = plots.lines(panels, "Two", tmp_path / "two.png")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["one", "two"]
    assert right.lines[0].get_color() == left.lines[1].get_color() != left.lines[0].get_color()
    bottom, top = left.get_ylim()
    assert -0.05 * top < bottom < 0 and right.get_xscale() == right.get_yscale() == "log"
    assert [text.get_text() for text in right.get_xticklabels()] == ["1", "2", "4"]
    (shade,) = right.collections
    np.testing.assert_array_equal(np.unique(shade.get_paths()[0].vertices[:, 1]), [0, 1, 2, 3, 4])
    assert (tmp_path / "two.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="one: x, mean, low and high must be of one length"):
        plots.lines([plots.Panel("", "", "", {"one": ([1, 2], *curve)})])
    with pytest.raises(ValueError, match="at least one panel"):
        plots.lines([])


def test_bars_stand_in_groups_with_their_intervals():
    figure = plots.bars({"one": [(5, 4, 6), (3, 3, 3)], "two": [(2, 1, 3), (1, 0, 2)]}, ["a", "b"], "score")
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [5, 3, 2, 1]
    middle = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    np.testing.assert_allclose(np.add(middle[:2], middle[2:]) / 2, [0, 1], atol=1e-9)  # each group around its label
    with pytest.raises(ValueError, match="two has 1 bars for 2 labels"):
        plots.bars({"two": [(1, 1, 1)]}, ["a", "b"])


def test_bars_have_their_values_also_where_they_are_0():
    groups = {"one": [(71.25, 60, 80), (0, 0, 0)], "two": [(-3, -4, -2), (np.nan,) * 3]}
    figure = plots.bars(groups, ["a", "b"])
    (axes,) = figure.axes
    found = {text.get_text(): text.xy[1] for text in axes.texts}
    assert found == {"71.2": 80, "0.0": 0, "−3.0": -4, "": found[""]}  # beyond the intervals
    figure.canvas.draw()
    whole = plots.bars({"one": [(3, 2, 4), (12, 12, 12)]}, ["a", "b"]).axes[0]
    assert [text.get_text() for text in whole.texts] == ["3", "12"]
    for groups, labels in (({}, []), ({}, ["a"]), ({"one": []}, [])):
        with pytest.raises(ValueError, match=f"at least one bar; got {len(groups)} groups and {len(labels)} labels"):
            plots.bars(groups, labels)


def test_intervals_end_where_values_must():
    (axes,) = plots.bars({"one": [(99, 95, 103), (1, -2, 4)]}, ["a", "b"], within=(0, 100)).axes
    ends = [segment[:, 1].tolist() for segment in axes.collections[0].get_segments()]
    assert ends == [[95, 100], [0, 4]]
    curve = [1, 2], [99, 1], [95, -2], [103, 4]
    (axes,) = plots.lines([plots.Panel("", "", "", {"one": curve})], within=(0, None)).axes
    (shade,) = axes.collections
    np.testing.assert_array_equal(np.unique(shade.get_paths()[0].vertices[:, 1]), [0, 4, 95, 103])
    plots.bars({"one": [(100 + 1e-9, 99, 101)]}, ["a"], within=(0, 100))  # a sum's rounding is no error
    with pytest.raises(ValueError, match=r"one has means from 1 to 99, not within \(0, 50\)"):
        plots.lines([plots.Panel("", "", "", {"one": curve})], within=(0, 50))
    with pytest.raises(ValueError, match=r"one has means from -1 to -1, not within \(0, None\)"):
        plots.bars({"one": [(-1, -1, -1)]}, ["a"], within=(0, None))


def test_a_line_at_0_is_above_the_axis_and_negative_ones_are_shown():
    x = [1, 2]
    at_0, negative = (
        plots.lines([plots.Panel("", "", "", {"one": (x, y, y, y), "two": (x, [5, 5], [5, 5], [5, 5])})]).axes[0]
        for y in ([0, 0], [-5, -4])
    )
    assert -0.3 < at_0.get_ylim()[0] < 0 and negative.get_ylim()[0] < -5


# norms


@pytest.mark.parametrize("layers, records", [(1, 1), (3, 17), (30, 200)])
def test_norms_of_few_layers_are_no_strip_and_their_ticks_do_not_overlap(layers, records):
    rng = np.random.default_rng(0)
    steps, names = [100 * i for i in range(records)], [f"block_{i}" for i in range(layers)]
    found = types.SimpleNamespace(
        names=names, steps=steps, gradients=rng.random((records, layers)), activations=3 + rng.random((records, layers))
    )
    figure = plots.norms(found)
    width, height = figure.get_size_inches()
    assert 3 <= height and width < 4 * height
    for axes in figure.axes:
        ticks = boxes([tick for tick in axes.get_xticklabels() if tick.get_text()], figure)
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(ticks))
    for bar in figure.axes[2:]:
        ticks = [tick.get_text() for tick in bar.get_yticklabels()]
        assert len(ticks) == 5 and all(float(tick) > 0 for tick in ticks)

"""What is captured is what the model computes; the page holds it, and needs nothing else."""

import base64
import json
import re
import shutil
import subprocess

import keras
import numpy as np
import pytest
from keras import ops

from llmfound import attention
from llmfound.layers import AdditiveAttention, MultiHeadAttention, PreLNBlock
from llmfound.models import BERT, BERTClassifier, Transformer
from llmfound.testing import assert_close, fixture

IDS = {"source_ids": np.array([[3, 4, 5, 0], [6, 7, 8, 9]], "int32"),
       "target_ids": np.array([[1, 5, 4], [1, 9, 8]], "int32")}  # fmt: skip


@pytest.fixture(scope="module")
def transformer():
    return Transformer(11, num_layers=2, hidden_dim=8, num_heads=2, intermediate_dim=16, norm="pre", name="translator")


def test_it_is_what_the_model_computes(transformer):
    before = ops.convert_to_numpy(transformer(IDS))
    found = attention.capture(transformer, IDS)
    expected = {name: ops.convert_to_numpy(x) for name, x in transformer.attention(IDS).items()}
    names = [f"encoder_block_{i}/attention" for i in range(2)]
    names += [f"decoder_block_{i}/{part}" for i in range(2) for part in ("attention", "cross_attention")]
    assert list(found) == names
    for i in range(2):
        assert_close(found[f"encoder_block_{i}/attention"], expected["encoder"][:, i], 1e-6)
        assert_close(found[f"decoder_block_{i}/attention"], expected["decoder"][:, i], 1e-6)
        assert_close(found[f"decoder_block_{i}/cross_attention"], expected["cross"][:, i], 1e-6)
    assert_close(transformer(IDS), before, 0)


def test_layers_are_chosen_by_name_and_the_others_keep_their_path(transformer, monkeypatch):
    asked = []
    weights_of = MultiHeadAttention.weights_of
    monkeypatch.setattr(MultiHeadAttention, "weights_of",
                        lambda self, *args: asked.append(self.path) or weights_of(self, *args))  # fmt: skip
    found = attention.capture(transformer, IDS, ["encoder_block_1"])
    assert list(found) == ["encoder_block_1/attention"] and found["encoder_block_1/attention"].shape == (2, 2, 4, 4)
    assert asked == ["translator/encoder_block_1/attention"]
    assert not any("call" in vars(layer) for layer in transformer._flatten_layers())
    assert list(attention.capture(transformer, IDS, "encoder_block_1")) == list(found)  # one name, not its letters


def test_layers_of_one_name_and_layers_that_were_never_called():
    class Stack(keras.Model):
        def __init__(self):
            super().__init__(name="stack")
            self.blocks = [PreLNBlock(8, 2, 16, name="block") for _ in range(2)]
            self.unused = AdditiveAttention(4)

        def call(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    x, model = fixture("x", (2, 4, 8)).astype("float32"), Stack()
    for _ in range(2):  # the first time it is not built
        found = attention.capture(model, x)
        assert list(found) == ["block/attention", "block/attention_1"]
        between = model.blocks[0](x)
        for name, block, seen in zip(found, model.blocks, (x, between)):
            assert_close(found[name], block(seen, return_weights=True)[1]["self"], 1e-6)
    assert list(attention.capture(PreLNBlock(8, 2, 16, name="alone"), x)) == ["attention"]


def test_inside_anything():
    class Reader(keras.Model):
        def __init__(self):
            super().__init__(name="reader")
            self.block, self.look = PreLNBlock(8, 2, 16, dropout=0.5, attention_dropout=0.5), AdditiveAttention(4)

        def call(self, x, training=None):
            x = self.block(x, training=training)
            return self.look(x[:, :1], x, training=training)[0]

    model, x = Reader(), fixture("x", (2, 3, 8)).astype("float32")
    model(x)
    found = attention.capture(model, x)
    assert [weights.shape for weights in found.values()] == [(2, 2, 3, 3), (2, 1, 1, 3)]
    for weights in found.values():
        assert_close(weights.sum(-1), np.ones(weights.shape[:-1]), 1e-5)
    classifier = BERTClassifier(BERT(11, 1, 8, 2, 16, max_length=8), 3)
    found = attention.capture(classifier, {"token_ids": IDS["source_ids"]})
    ((name, weights),) = found.items()
    assert name.endswith("encoder/block_0/attention") and weights[0, :, :, 3].max() == 0  # padding


def test_what_cannot_be_captured(transformer):
    with pytest.raises(
        ValueError, match=r"no attention layer with any of \['middle'\] in its name; it has: encoder_block_0/att"
    ):
        attention.capture(transformer, IDS, ["middle"])
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain")
    with pytest.raises(ValueError, match="plain has no attention layer, neither MultiHeadAttention nor Add"):
        attention.capture(model, np.zeros((1, 3), "float32"))


def test_entropy_and_distance():
    even, next_one = np.full((4, 4), 0.25), np.roll(np.eye(4), 1, axis=1)
    np.testing.assert_allclose(attention.entropy(np.stack([even, next_one])), [2, 0], atol=1e-12)
    np.testing.assert_allclose(attention.distance(np.stack([even, next_one])), [1.25, 1.5])  # the last looks 3 back


def test_entropy_and_distance_of_real_tokens_alone():
    weights = np.zeros((2, 3, 4, 4))  # (batch, heads, queries, keys)
    weights[:, :, :, 0], weights[:, :, 3] = 1, 0.25  # the last row, of padding, spreads
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], "bool")
    np.testing.assert_allclose(attention.entropy(weights, mask), np.zeros((2, 3)), atol=1e-12)
    np.testing.assert_allclose(attention.distance(weights, mask), [[1] * 3, [0.5] * 3])
    np.testing.assert_allclose(attention.entropy(weights), np.full((2, 3), 0.5))
    np.testing.assert_allclose(attention.distance(weights[0], mask[0]), [1] * 3)
    assert np.isnan(attention.entropy(weights, np.zeros((2, 4), "bool"))).all()
    with pytest.raises(ValueError, match=r"one entry for each query, shape \(2, 4\); got shape \(2, 3\)"):
        attention.entropy(weights, mask[:, :3])


def test_the_page_holds_the_numbers_and_needs_nothing_else(transformer, tmp_path):
    found = attention.capture(transformer, IDS)
    source, target = ["a", "</script>", "ç"], ["<s>", "x", "y"]
    queries, keys = {"encoder": source, "decoder": target}, {"cross": source, "encoder": source, "": target}
    path = attention.report(found, queries, keys, tmp_path / "page.html", "A & B", [("x y", -1.25)])
    page = path.read_text(encoding="utf-8")
    assert "<title>A &amp; B</title>" in page and len(page) < 100_000
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("</script>") == 2
    shown = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    assert shown["hypotheses"] == [["x y", -1.25]]
    layers = {layer["name"]: layer for layer in shown["layers"]}
    assert list(layers) == list(found)
    cross = layers["decoder_block_1/cross_attention"]
    assert (
        cross["queries"] == target and cross["keys"] == source and len(cross["entropy"]) == len(cross["distance"]) == 2
    )
    weights = np.frombuffer(base64.b64decode(cross["weights"]), "uint8").reshape(2, 3, 3) / 255
    assert_close(weights, found["decoder_block_1/cross_attention"][0, :, :, :3], 0.003)


def data_of(page):
    def refuse(constant):
        raise AssertionError(constant)

    page = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1], parse_constant=refuse)


def test_both_texts_of_an_encoder_decoder(transformer, tmp_path):
    found = attention.capture(transformer, IDS)
    source, target, path = ["a", "b", "c"], ["<s>", "x"], tmp_path / "page.html"
    layers = data_of(attention.report(found, {"encoder": source, "decoder": target}, path=path))["layers"]
    for layer in layers:
        expected = {"e": (source, source), "d": (target, target)}[layer["name"][0]]
        expected = (target, source) if "cross" in layer["name"] else expected
        assert (layer["queries"], layer["keys"]) == expected and layer["crossing"] == ("cross" in layer["name"])
    for tokens in ((source,), (source, target), ({"encoder": source, "decoder": target}, source)):
        with pytest.raises(ValueError, match=r'encoder_block_0/.* to decoder.* different texts.*\{"encoder": source_t'):
            attention.report(found, *tokens, path=path)
    self_attention = {name: weights for name, weights in found.items() if "cross" not in name}
    with pytest.raises(ValueError, match="One list of tokens cannot be for all layers"):
        attention.report(self_attention, target, path=path)
    cross = {name: weights for name, weights in found.items() if "cross" in name}
    assert {tuple(layer["keys"]) for layer in data_of(attention.report(cross, target, source, path))["layers"]} == {
        tuple(source)
    }
    for tokens in (target, {"decoder": target}):
        with pytest.raises(ValueError, match="cross_attention looks from one text at another: give key_tokens, too"):
            attention.report(cross, tokens, path=path)


def test_titles_and_scores_are_what_they_are(transformer, tmp_path):
    found = attention.capture(transformer, IDS, "encoder")
    scores = [("TITLE", -1.0), ("y", float("-inf")), ("z", np.float32("nan"))]
    path = attention.report(found, list("abc"), path=tmp_path / "page.html", title="My DATA", hypotheses=iter(scores))
    assert path.read_text("utf-8").count("<title>My DATA</title>") == 1
    assert data_of(path)["hypotheses"] == [["TITLE", -1.0], ["y", None], ["z", None]]


@pytest.mark.slow
@pytest.mark.on_one_backend
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
def test_what_a_browser_makes_of_the_page(tmp_path):
    tokens = ["▁Donaudampfschifffahrt", "▁", "a\nb"]
    layer = {"block_0/attention": np.full((1, 1, 3, 3), 1 / 3, "float32")}
    cross = {"cross_attention": np.full((1, 1, 3, 2), 0.5, "float32")}
    pages = [attention.report(layer, tokens, path=tmp_path / "a.html", hypotheses=[("x", float("-inf"))]),
             attention.report(cross, tokens, ["x", "y"], tmp_path / "b.html")]  # fmt: skip
    one, two = (
        subprocess.run(["chromium", "--headless", "--no-sandbox", "--virtual-time-budget=2000", "--dump-dom",
                        page.as_uri()], capture_output=True, text=True, timeout=120).stdout
        for page in pages
    )  # fmt: skip
    assert '<p id="about">1 layer, 1 head. Donaudampfschifffahrt ▁ a\\nb</p>' in one
    assert one.count(">Donaudampfsch…<") == 4 and one.count(">▁</text>") == 4
    assert ">block_0/attention, head 1<" in one and "<td>–</td><td>x</td>" in one
    assert "places in two texts" not in one.split("<script")[0]
    assert "places in two texts" in two.split("<script")[0]


def test_what_cannot_be_shown(transformer, tmp_path):
    with pytest.raises(ValueError, match="nothing to show: captured is empty"):
        attention.report({}, ["a"], path=tmp_path / "page.html")
    with pytest.raises(ValueError, match="layer has weights that are not finite"):
        attention.report({"layer": np.full((1, 1, 2, 2), np.nan)}, ["a", "b"], path=tmp_path / "page.html")
    found = attention.capture(transformer, IDS, ["encoder_block_0"])
    with pytest.raises(ValueError, match="row must be one of the 2 rows that were captured; got 2"):
        attention.report(found, list("abcd"), path=tmp_path / "page.html", row=2)
    with pytest.raises(ValueError, match="has weights for 4 queries and 4 keys, but there are 5 and 5 tokens"):
        attention.report(found, list("abcde"), path=tmp_path / "page.html")
    with pytest.raises(ValueError, match="no tokens for encoder_block_0/attention; there are for decoder"):
        attention.report(found, {"decoder": ["a"]}, path=tmp_path / "page.html")
    large = {"layer": np.zeros((1, 12, 300, 300), "float32")}
    with pytest.raises(ValueError, match=r"would have 1,\d+,\d+ bytes, more than 1,048,576; capture fewer layers"):
        attention.report(large, ["a"] * 300, path=tmp_path / "page.html")
    assert not list(tmp_path.iterdir())

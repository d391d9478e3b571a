"""The Transformer against the numbers of the paper, of its authors' code, and of an independent forward pass."""

import keras
import numpy as np
import pytest
from keras import ops
from marks import another

from llmfound import decoding
from llmfound.models import Transformer
from llmfound.testing import assert_close, check_model, fixture
from llmfound.training import DiscriminativeAdam

TINY = dict(vocab_size=11, num_layers=2, hidden_dim=8, num_heads=2, intermediate_dim=16, dropout=0.0)
SOURCE, TARGET = [[3, 1, 4, 1, 5]], [[2, 7, 1, 8]]
PARTS = {"query": "q", "key": "k", "value": "v", "output": "o", "expand": "1", "contract": "2"}


def tiny(**options):
    return Transformer(**{**TINY, **options})


def batch(source=SOURCE, target=TARGET):
    return {"source_ids": np.array(source, "int32"), "target_ids": np.array(target, "int32")}


def numpy(x):
    return ops.convert_to_numpy(x)


def fixture_name(path):
    """The published name of a weight of ours: encoder_block_0/feedforward/expand/kernel is enc.0.ffn.w1."""
    parts = path.split("/")[1:]
    if parts[0] == "token_embedding":
        return "emb"
    if parts[0] in ("encoder_norm", "decoder_norm"):
        return f"{parts[0][:3]}.ln.{parts[1]}"
    stack, layer = parts[0][:3], parts[0].rsplit("_", 1)[1]
    norms = ["attention_norm", "cross_attention_norm", "feedforward_norm"]
    if stack == "enc":
        norms.remove("cross_attention_norm")
    if parts[1] in norms:
        return f"{stack}.{layer}.ln{norms.index(parts[1]) + 1}.{parts[2]}"
    if parts[1] == "feedforward":
        return f"{stack}.{layer}.ffn.{parts[3][0].replace('k', 'w')}{PARTS[parts[2]]}"
    return f"{stack}.{layer}.{'cross' if parts[1] == 'cross_attention' else 'self'}.{PARTS[parts[2]]}"


def with_fixture_weights(model):
    for weight in model.trainable_weights:
        name = fixture_name(weight.path)
        weight.assign(fixture(name, weight.shape, norm_scale=name.endswith("gamma")))
    return model


MODELS = {}


def published(norm="post", layout="interleaved", dtype="float32"):
    """The model of the published numbers, made once for all tests that only read it."""
    key = norm, layout, dtype
    if key not in MODELS:
        MODELS[key] = with_fixture_weights(tiny(norm=norm, layout=layout, dtype=dtype))
    return MODELS[key]


FORWARD = {  # first four numbers of the encoder's output at position 0 and of the logits, by norm and layout
    ("post", "interleaved"): dict(
        encoder=[0.055955, -1.115296, 0.894703, -0.112750],
        first=[0.826009, 0.985567, -0.639493, 0.718592],
        last=[0.957790, 1.227614, -0.747483, 0.866586],
    ),
    ("post", "concatenated"): dict(
        encoder=[-0.096937, -1.399487, 0.819149, -0.169310], last=[0.624183, 1.125142, -0.935570, 0.473066]
    ),
    ("pre", "interleaved"): dict(
        encoder=[0.268280, -1.180103, 0.344464, 1.340104],
        first=[-0.109049, -1.072155, 1.234293, 0.022325],
        last=[0.518294, 0.098790, 0.220555, 0.682857],
    ),
    ("pre", "concatenated"): dict(
        encoder=[0.177702, -1.317164, -0.037792, 0.503268], last=[-0.066282, 0.198207, 0.125873, 0.058713]
    ),
}


@pytest.mark.parametrize(
    "norm, layout, dtype",
    [(*names, "float32") for names in FORWARD] + [(norm, "interleaved", "float64") for norm in ("post", "pre")],
)
def test_fixture_forward_pass(norm, layout, dtype):
    model = published(norm, layout, dtype)
    expected = FORWARD[norm, layout]
    memory = model.encode(batch()["source_ids"])
    logits = model(batch())
    assert_close(memory[0, 0, :4], np.array(expected["encoder"]), what="encoder")
    assert_close(logits[0, 3, :4], np.array(expected["last"]), what="logits at 3")
    if "first" in expected:
        assert_close(logits[0, 0, :4], np.array(expected["first"]), what="logits at 0")


def expected_count(v, n, d, f, norm="post", biases=False):
    encoder, decoder = 4 * d * d + 2 * d * f + f + d + 4 * d, 8 * d * d + 2 * d * f + f + d + 6 * d
    return v * d + n * (encoder + decoder) + (4 * d if norm == "pre" else 0) + (n * 12 * d if biases else 0)


@pytest.mark.parametrize(
    "sizes, options, count",
    [
        (dict(v=37000, n=6, d=512, f=2048), {}, 63_045_632),
        (dict(v=37000, n=6, d=1024, f=4096), {}, 214_171_648),
        (dict(v=37000, n=6, d=512, f=2048), dict(biases=True), 63_082_496),
        (dict(v=37000, n=6, d=1024, f=4096), dict(biases=True), 214_245_376),
        (dict(v=37000, n=6, d=512, f=2048), dict(norm="pre"), 63_047_680),
        (dict(v=32000, n=6, d=512, f=2048), {}, 60_485_632),
    ],
)
def test_published_parameter_counts_follow_the_formula(sizes, options, count):
    assert expected_count(**sizes, **options) == count


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_parameter_count_of_the_model_follows_the_formula(norm, use_bias):
    model = tiny(norm=norm, use_bias=use_bias)
    assert model.count_params() == expected_count(11, 2, 8, 16, norm, use_bias)


def test_base_model_has_the_exact_number_of_parameters():
    assert Transformer(37000).count_params() == 63_045_632


@pytest.mark.slow
def test_big_model_has_the_exact_number_of_parameters():
    assert Transformer(37000, **Transformer.BIG).count_params() == 214_171_648


@pytest.mark.parametrize("norm", ["post", another("pre")])
def test_check_model(norm):
    source_ids, target_ids, labels = np.random.default_rng(0).integers(4, 11, (3, 3, 5)).astype("int32")
    inputs = {"source_ids": source_ids, "target_ids": target_ids}
    check_model(lambda: tiny(norm=norm, dropout=0.1, num_layers=1), (inputs, labels))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_no_target_sees_its_future(norm):
    model = published(norm)
    changed = batch(target=[[2, 7, 9, 8]])
    before, after = numpy(model(batch())), numpy(model(changed))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert (np.abs(before[:, 2:] - after[:, 2:]).max(axis=-1) > 1e-4).all()


def test_source_padding_changes_nothing():
    model = published()
    assert_close(model(batch(source=[[3, 1, 4, 1, 5, 0, 0]])), model(batch()), what="logits with padded source")


def test_an_all_padding_row_gives_finite_numbers():
    model = published()
    assert np.isfinite(numpy(model(batch(source=[[0, 0, 0]], target=[[0, 0]])))).all()


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("beams", [1, 3])
def test_steps_with_a_cache_equal_the_full_pass(norm, beams):
    model = published(norm)
    rng = np.random.default_rng(0)
    source = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], "int32")
    target = rng.integers(1, 11, (2 * beams, 4)).astype("int32")
    full = model({"source_ids": np.repeat(source, beams, axis=0), "target_ids": target})
    state = model.start({"source_ids": source}, max_length=6)
    if beams > 1:  # as in a compiled beam search, where the position is a tensor, too
        state["position"] = ops.convert_to_tensor(0, "int32")
        state["cache"] = keras.tree.map_structure(lambda x: ops.repeat(x, beams, axis=0), state["cache"])
    for position in range(4):
        logits, state = model.step(ops.convert_to_tensor(target[:, position]), state)
        assert_close(logits, full[:, position], what=f"logits at {position}")


@pytest.mark.parametrize("norm, count", (("post", 5), ("pre", 6)))
def test_groups_of_layers_hold_every_weight_once(norm, count):
    groups = tiny(norm=norm).layer_groups()
    assert len(groups) == count
    model = tiny(norm=norm)
    DiscriminativeAdam(0.01, model.layer_groups()).build(model.trainable_variables)


def test_one_matrix_serves_both_embeddings_and_the_output():
    """Its gradient is the sum of the three uses: that of finite differences, which change all three at once."""
    model = with_fixture_weights(tiny(num_layers=1))
    assert len([w for w in model.trainable_weights if tuple(w.shape) == (11, 8)]) == 1
    inputs, labels = batch(source=[[3, 3, 4]], target=[[2, 2, 5]]), np.array([[6, 6, 7]], "int32")
    matrix = numpy(model.token_embedding.embeddings).copy()

    def loss(change):
        model.token_embedding.embeddings.assign(matrix + change)
        logits = numpy(model(inputs)).astype("float64")[0]
        return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(3), labels[0]])

    places = [(3, 0), (4, 5), (2, 1), (5, 6), (6, 2), (7, 7), (9, 3)]  # of the source, the target, the labels, none
    expected = []
    for place in places:
        change = np.zeros_like(matrix)
        change[place] = 1e-2
        expected.append((loss(change) - loss(-change)) / 2e-2)
    model.token_embedding.embeddings.assign(matrix)
    model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(inputs, labels)
    gradient = matrix - numpy(model.token_embedding.embeddings)
    assert_close([gradient[place] for place in places], expected, 1e-3)
    assert min(np.abs(expected)) > 1e-3


class Unordered(Transformer):
    def embed(self, token_ids, start=None, training=None):
        return self.token_embedding(token_ids) * self.scale


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_an_encoder_without_positions_does_not_know_their_order(norm):
    order = [4, 2, 0, 1, 3]
    model = with_fixture_weights(tiny(norm=norm))
    source = np.array([[3, 1, 4, 7, 5]], "int32")
    known = numpy(model.encode(source))[:, order], numpy(model.encode(source[:, order]))
    assert np.abs(known[0] - known[1]).max() > 0.1
    model = with_fixture_weights(Unordered(**TINY, norm=norm))
    assert_close(model.encode(source[:, order]), numpy(model.encode(source))[:, order], 1e-5)


def test_scaled_embeddings_have_unit_variance():
    model = Transformer(4000, num_layers=1, hidden_dim=64, num_heads=2, intermediate_dim=8)
    rows = numpy(model.token_embedding.embeddings) * 64**0.5
    assert abs(rows.std() - 1) < 0.01


def test_attention_weights_of_every_head():
    model = published()
    weights = {name: numpy(w) for name, w in model.attention(batch(source=[[3, 1, 4, 0, 0]])).items()}
    assert weights["encoder"].shape == (1, 2, 2, 5, 5)
    assert weights["decoder"].shape == (1, 2, 2, 4, 4)
    assert weights["cross"].shape == (1, 2, 2, 4, 5)
    for w in weights.values():
        np.testing.assert_allclose(w.sum(-1), 1, atol=1e-5)
    assert weights["cross"][..., 3:].max() == 0  # nobody looks at padding
    assert np.triu(weights["decoder"][0, 0, 0], 1).max() == 0


def test_align_shifts_the_hypothesis():
    model = published()
    hypothesis = np.array([[7, 1, 8, 5]], "int32")
    expected = numpy(model.attention(batch(target=[[2, 7, 1, 8]]))["cross"]).mean(axis=(1, 2))
    assert_close(model.align(batch()["source_ids"], hypothesis, start_id=2), expected)


def test_a_saved_model_trains_on_as_if_it_had_not_been_saved(tmp_path):
    model = tiny(norm="pre", num_layers=1)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(batch(), np.array(TARGET), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded(batch()), model(batch()), tolerance=0)
    for one in (model, loaded):
        one.fit(batch(), np.array(TARGET), verbose=0)
    assert_close(loaded.get_weights(), model.get_weights(), tolerance=1e-6)
    assert int(loaded.optimizer.iterations) == 2


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_truncated_model_file_is_refused(tmp_path, share):
    path = tmp_path / "model.keras"
    published().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises((ValueError, OSError), match=r"model\.keras|zip"):
        keras.saving.load_model(path)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(hidden_dim=10, num_heads=3), r"hidden_dim \(10\) must be divisible by num_heads \(3\); try 9 or 12"),
        (dict(norm="sandwich"), "'post', 'pre'.*'sandwich'"),
        (dict(dropout=1.5), "at least 0 and below 1; got 1.5"),
        (dict(layout="rotary"), "interleaved.*'rotary'"),
        (dict(vocab_size=0), "positive; got {'vocab_size': 0"),
        (dict(decoder_layers=0), "positive; got .*'decoder_layers': 0"),
        (dict(hidden_dim=9, num_heads=3), "even; got 9"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (batch(source=[[3, 11]]), "source_ids must hold ids from 0 to 10; got 3 to 11"),
        (batch(target=[[-1, 3]]), "target_ids must hold ids from 0 to 10; got -1 to 3"),
        ({**batch(), "source_ids": np.ones((1, 3), "float32")}, "source_ids must hold integers; got float32"),
        ({**batch(), "source_ids": np.ones((3,), "int32")}, r"source_ids must be of shape .*; got \(3,\)"),
        ({**batch(), "target_ids": np.ones((0, 3), "int32")}, r"target_ids is empty: shape \(0, 3\)"),
        ({"source_ids": np.ones((1, 3), "int32")}, "also needs .*target_ids"),
    ],
)
def test_bad_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        published()(inputs)


def test_a_source_longer_than_the_position_table():
    with pytest.raises(ValueError, match=r"A sequence of 9 is longer than the position table \(8\)"):
        tiny(max_length=8, num_layers=1)(batch(source=[[1] * 9]))


def test_decoding_ends_with_the_position_table():
    model, inputs = tiny(max_length=8, num_layers=1), {"source_ids": [[3, 4, 5, 2]]}
    assert decoding.greedy(model, inputs, end_id=None).shape == (1, 8)
    with pytest.raises(ValueError, match=r"A sequence of 9 is longer than the position table \(8\)"):
        decoding.greedy(model, inputs, max_length=9)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="there it works")
def test_export_says_how_on_pytorch(tmp_path):
    import torch

    model = with_fixture_weights(tiny())
    with pytest.raises(NotImplementedError, match=r'Take format="torch" and an'):
        model.export(tmp_path / "model")
    sizes = {name: keras.InputSpec("int32", (3, n), name=name) for name, n in (("source_ids", 5), ("target_ids", 4))}
    model.export(tmp_path / "model.pt2", format="torch", verbose=False, input_signature=[sizes])
    inputs = {name: torch.tensor([[3, 4, 5, 2, 1]] * 3)[:, :n].int() for name, n in
              (("source_ids", 5), ("target_ids", 4))}  # fmt: skip
    exported = torch.export.load(tmp_path / "model.pt2").module()
    assert_close(exported(inputs), model(inputs), 2e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras exports by TensorFlow")
def test_an_exported_model_takes_any_batch_and_length(tmp_path):
    import tensorflow as tf

    model = with_fixture_weights(tiny())
    model.export(tmp_path / "model", verbose=False)
    inputs = {
        name: np.array([[3, 4, 5, 2, 1]] * 3, "int32")[:, :n] for name, n in (("source_ids", 5), ("target_ids", 4))
    }
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    assert_close(loaded.serve(inputs), model(inputs), 2e-6)


def test_subclass_with_another_block():
    from llmfound.layers import MultiHeadSelfAttention, PreLNBlock

    class Uniform(MultiHeadSelfAttention):
        def attend(self, query, key, value, mask=None, bias=None, training=None):
            return super().attend(query * 0.0, key, value, mask, bias, training)

    class UniformBlock(PreLNBlock):
        attention_class = Uniform

    class UniformTransformer(Transformer):
        block_classes = {"pre": UniformBlock}

    model = UniformTransformer(**TINY, norm="pre")
    weights = numpy(model.attention(batch())["encoder"])
    assert model(batch()).shape == (1, 4, 11)
    assert weights.shape == (1, 2, 2, 5, 5)
    with pytest.raises(ValueError, match="'pre'"):
        UniformTransformer(**TINY)

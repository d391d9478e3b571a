"""Where the norm stands, checked against the theory and the measurements of Xiong et al. 2020."""

import functools
import math

import numpy as np
import pytest
from keras import ops

from llmfound.layers import FeedForward, PostLNBlock, PreLNBlock
from llmfound.models import Transformer
from llmfound.reproduce.preln import Theory, decoder_gradients, draw_block
from llmfound.testing import assert_close, fixture

BLOCKS = pytest.mark.parametrize("block_class", [PostLNBlock, PreLNBlock])
X = fixture("x", (2, 4, 8)).astype("float32")
MEMORY = fixture("memory", (2, 5, 8)).astype("float32")
TINY = dict(vocab_size=11, num_layers=1, hidden_dim=8, num_heads=2, intermediate_dim=16, dropout=0.0)


def numpy(x):
    return ops.convert_to_numpy(x)


def layer_norm(x):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True))


# The theory model of section 3.3: one head, uniform attention, Xavier-normal matrices, no biases (protocol A)

DIM, LENGTH = 256, 32


def draw(block, rng):
    draw_block(block, rng, DIM)


@functools.cache
def last_gradient(block_class, num_layers):
    """Norm of the gradient of W2 in the last layer, mean over ten draws."""
    model = Theory("post" if block_class is PostLNBlock else "pre", num_layers)
    return np.mean([model.last_gradient(seed) for seed in range(10)])


MEASURED = {  # of the last W2, by depth
    PostLNBlock: {2: 1.626, 4: 1.615, 8: 1.594, 16: 1.634, 32: 1.742},
    PreLNBlock: {2: 1.354, 4: 0.991, 8: 0.686, 16: 0.471, 32: 0.329},
}
QUICK = [(PostLNBlock, 8), (PreLNBlock, 2), (PreLNBlock, 8)]


@pytest.mark.parametrize(
    "block_class, depth",
    [
        pytest.param(block_class, depth, marks=() if (block_class, depth) in QUICK else pytest.mark.slow)
        for block_class in MEASURED
        for depth in MEASURED[block_class]
    ],
)
def test_theorem_1_the_last_gradient_by_depth(block_class, depth):
    """Constant in Post-LN, falling with 1 / sqrt(depth) in Pre-LN."""
    found = last_gradient(block_class, depth)
    np.testing.assert_allclose(found, MEASURED[block_class][depth], rtol=0.06)
    if block_class is PostLNBlock:
        assert abs(found / 1.63 - 1) < 0.2
    else:
        assert abs(found * math.sqrt(depth) / 1.92 - 1) < 0.15


def test_theorem_1_four_times_as_deep_halves_the_last_gradient_of_pre_ln():
    assert 1.7 < last_gradient(PreLNBlock, 2) / last_gradient(PreLNBlock, 8) < 2.3


def test_lemma_1_half_of_the_variance_passes_the_relu():
    layer = FeedForward(1, 1)
    x = 2 * np.random.default_rng(0).normal(size=(1_000_000, 1)).astype("float32")
    layer(x[:1])
    layer.expand.set_weights([np.ones((1, 1)), np.zeros(1)])
    assert abs((numpy(layer.expand(x)) ** 2).mean() - 2) < 0.02


def squared_norms(block_class, num_layers, seeds):
    """Mean of ||x||^2 / d after each layer; of Post-LN before its last norm, of Pre-LN before the final one."""
    block, found = block_class(DIM, 1, DIM), []
    block(np.zeros((1, LENGTH, DIM), "float32"))
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        x = ops.convert_to_tensor(rng.normal(size=(1, LENGTH, DIM)).astype("float32"))
        for _ in range(num_layers):
            draw(block, rng)
            if block_class is PostLNBlock:
                x3 = block.attention_norm(x + block.attention(x))
                before = x3 + block.feedforward(x3)
                x = block.feedforward_norm(before)
            else:
                before = x = block(x)
            found.append((numpy(before) ** 2).sum(axis=-1).mean() / DIM)
    return np.reshape(found, (seeds, num_layers)).mean(axis=0)


def test_lemma_2_post_ln_has_three_halves_in_every_layer():
    norms = squared_norms(PostLNBlock, 4, seeds=10)
    assert norms.min() > 1.4 and norms.max() < 1.6


def test_lemma_2_pre_ln_grows_within_its_bounds():
    norms, layers = squared_norms(PreLNBlock, 32, seeds=1), np.arange(1, 33)
    assert (norms >= 1 + layers / 2).all() and (norms <= 1 + 3 * layers / 2).all()
    assert 17 <= norms[-1] <= 49


# The norm itself


@pytest.fixture
def block_norm():
    """A block's norm, without epsilon to speak of."""
    norm = PostLNBlock(16, 1, 4, epsilon=1e-12).feedforward_norm
    norm.build((None, 16))
    return norm


def test_the_jacobian_of_the_norm(block_norm):
    """J = sqrt(d) / ||y|| (I - y y^T / ||y||^2) (I - 1 1^T / d), y being x less its mean."""
    x, d, step = 3 * fixture("row", (16,)), 16, 1e-2
    moved = (x + step * np.concatenate([np.eye(d), -np.eye(d)])).astype("float32")
    forward, backward = np.split(numpy(block_norm(moved)), 2)
    jacobian = ((forward - backward) / (2 * step)).T
    y = x - x.mean()
    size = np.linalg.norm(y)
    expected = d**0.5 / size * (np.eye(d) - np.outer(y, y) / size**2) @ (np.eye(d) - 1 / d)
    assert_close(jacobian, expected, 2e-4)
    assert np.abs(jacobian @ np.ones(d)).max() < 1e-3  # no response to a shift,
    assert np.abs(jacobian @ y).max() < 1e-3  # nor to a change of scale
    np.testing.assert_allclose(np.linalg.norm(jacobian, 2), d**0.5 / size, rtol=1e-3)


def test_the_norm_forgets_the_scale_of_its_input(block_norm):
    x = fixture("rows", (3, 16)).astype("float32")
    assert_close(block_norm(10 * x), block_norm(x), 1e-5)
    np.testing.assert_allclose(np.linalg.norm(numpy(block_norm(x)), axis=-1), 4, rtol=1e-5)  # sqrt(d)


# The identity path


def without_output(block, *inputs):
    """The block with W_O = W_2 = 0; its other weights stay as drawn, its biases are 0."""
    block(*inputs)
    parts = [block.attention.merge, block.feedforward.contract]
    for dense in parts if block.cross_attention is None else [*parts, block.cross_attention.merge]:
        dense.kernel.assign(np.zeros(dense.kernel.shape))
    return block


@pytest.mark.parametrize("cross_attention", [False, True])
def test_pre_ln_passes_its_input_through_exactly(cross_attention):
    inputs = (X, MEMORY) if cross_attention else (X,)
    block = without_output(PreLNBlock(8, 2, 16, cross_attention=cross_attention), *inputs)
    np.testing.assert_array_equal(numpy(block(*inputs)), X)


@pytest.mark.parametrize("cross_attention", [False, True])
def test_post_ln_normalises_even_what_its_sublayers_leave(cross_attention):
    inputs = (X, MEMORY) if cross_attention else (X,)
    block = without_output(PostLNBlock(8, 2, 16, cross_attention=cross_attention, epsilon=1e-12), *inputs)
    expected = layer_norm(layer_norm(X.astype("float64")))
    assert_close(block(*inputs), layer_norm(expected) if cross_attention else expected, 1e-5)


# The whole model


SOURCE = np.array([[3, 1]], "int32")


@functools.cache
def tiny(norm):
    return Transformer(**TINY, norm=norm, epsilon=1e-12)


def last_block(model):
    """What leaves the encoder's last block."""
    x = model.embed(SOURCE)
    for block in model.encoder_blocks:
        x = block(x)
    return numpy(x)


def test_the_final_norm_makes_a_pre_ln_stack_forget_its_scale():
    last, output = last_block(tiny("pre")), numpy(tiny("pre").encode(SOURCE))
    np.testing.assert_allclose(np.linalg.norm(output, axis=-1), math.sqrt(8), rtol=1e-5)
    assert np.abs(np.linalg.norm(last, axis=-1) - math.sqrt(8)).max() > 0.1  # it is the norm that makes it so
    for scale in (1, 10):
        assert_close(tiny("pre").encoder_norm(scale * last), output, 1e-5)


def test_post_ln_needs_no_final_norm():
    assert tiny("post").encoder_norm is None and tiny("post").decoder_norm is None
    output = numpy(tiny("post").encode(SOURCE))
    np.testing.assert_array_equal(output, last_block(tiny("post")))
    np.testing.assert_allclose(np.linalg.norm(output, axis=-1), math.sqrt(8), rtol=1e-5)


def test_the_decoder_of_pre_ln_ends_with_a_norm_before_the_output_matrix():
    y = 7 * X[:1, :2]
    expected = layer_norm(y.astype("float64")) @ numpy(tiny("pre").token_embedding.embeddings).T
    assert_close(tiny("pre").logits(y), expected, 1e-5)


def test_pre_ln_has_two_norms_more_and_otherwise_the_same_weights():
    """So that a checkpoint of one can start the other."""
    assert tiny("pre").count_params() == tiny("post").count_params() + 4 * 8
    post, pre = (
        {(w.path.split("/", 1)[1], tuple(w.shape)) for w in tiny(norm).trainable_weights} for norm in ("post", "pre")
    )
    assert {path.split("/")[0] for path, _ in pre - post} == {"encoder_norm", "decoder_norm"}
    assert not post - pre


# A real encoder-decoder at its start (protocol B)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradients_by_layer_of_a_real_decoder(norm):
    """Post-LN: larger towards the output. Pre-LN: flat. Section 3.3, figures 3a and 3b."""
    found = np.array(decoder_gradients(norm, 6, seed=0, batches=4))
    if norm == "post":
        assert (np.diff(found) > 0).all() and found[-1] / found[0] > 3
    else:
        assert found.max() / found.min() < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("norm, low, high", [("post", 0.8, 1.25), ("pre", 0.6, 0.85)])
def test_the_last_gradient_of_a_real_decoder_by_depth(norm, low, high):
    """Post-LN: constant. Pre-LN: falling, by 0.65 if with 1 / sqrt(depth). Figures 3c and 3d."""
    means = [np.mean([decoder_gradients(norm, depth, seed)[-1] for seed in range(2)]) for depth in (14, 6)]
    assert low < means[0] / means[1] < high

"""Figures of Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture"."""

import keras
import numpy as np
from keras import ops

from llmfound import models, plots, training
from llmfound.layers import LayerNormalization, PostLNBlock, PreLNBlock
from llmfound.reproduce.figure import Figure, take_steps
from llmfound.reproduce.translation import language, step_cost, transformer

BLOCKS = {"post": PostLNBlock, "pre": PreLNBlock}
NAMES = {"post": "Post-LN", "pre": "Pre-LN"}


class Exposed(keras.optimizers.SGD):
    """Changes nothing, and keeps each gradient in the weight's momentum: the one way to it that every backend has."""

    def __init__(self):
        super().__init__(1.0, momentum=0.5)

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.momentums[self._get_variable_index(variable)], gradient)


def gradient_norms(model, x, y):
    """Frobenius norm of the loss's gradient, for each trainable weight, in their order."""
    model.train_on_batch(x, y)
    return [float(np.linalg.norm(ops.convert_to_numpy(m))) for m in model.optimizer.momentums]


class Theory(keras.Model):
    """The model of section 3.3: one head that sees all positions alike, Xavier-normal matrices, no biases.

    Args:
        norm: "post" or "pre".
        depth: int, layers.
        dim, length, classes: int, width, positions, classes of the output.
    """

    def __init__(self, norm, depth, dim=256, length=32, classes=1000):
        super().__init__()
        self.sizes = dim, length, classes
        self.blocks = [BLOCKS[norm](dim, 1, dim) for _ in range(depth)]
        self.norm = LayerNormalization(epsilon=1e-6) if BLOCKS[norm].final_norm else None
        self.classes = self.add_weight(shape=(dim, classes), trainable=False, name="classes")
        self(np.zeros((1, length, dim), "float32"))
        last_matrix = self.blocks[-1].feedforward.contract.kernel
        for weight in self.weights:
            weight.trainable = weight is last_matrix
        self.compile(Exposed(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return ops.matmul(self.norm(x) if self.norm else x, self.classes)

    def draw(self, seed):
        """New matrices; returns inputs and labels."""
        rng, (dim, length, classes) = np.random.default_rng(seed), self.sizes
        for block in self.blocks:
            draw_block(block, rng, dim)
        self.classes.assign(rng.normal(size=(dim, classes)) / dim**0.5)
        return rng.normal(size=(1, length, dim)).astype("float32"), rng.integers(0, classes, (1, length))

    def last_gradient(self, seed):
        """Norm of the gradient of the last layer's W2, of one draw."""
        (found,) = gradient_norms(self, *self.draw(seed))
        return found


def draw_block(block, rng, dim):
    """New matrices for a block: W_Q = W_K = 0, and W_O, which the theory does without, is the identity."""
    value, first, second = (rng.normal(size=(dim, dim)) / dim**0.5 for _ in range(3))
    block.attention.set_weights([np.zeros((dim, dim))] * 2 + [value, np.eye(dim)])
    block.feedforward.set_weights([first, np.zeros(dim), second, np.zeros(dim)])


def decoder_gradients(norm, depth, seed, batches=1, hidden_dim=512, num_heads=4, intermediate_dim=1024,
                      vocabulary=10_000, rows=16, length=32):  # fmt: skip
    """Norms of the gradient of W2 in a Transformer's decoder at its start, bottom to top; a mean over batches.

    Tokens follow a skewed law, p(r) ~ 1 / (r + 2.7): with uniform ones the expected gradient vanishes.
    """
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model = models.Transformer(vocabulary, depth, hidden_dim=hidden_dim, num_heads=num_heads,
                               intermediate_dim=intermediate_dim, dropout=0.0, norm=norm, use_bias=True)  # fmt: skip
    kernels = [block.feedforward.contract.kernel for block in model.decoder_blocks]
    for weight in model.weights:
        weight.trainable = any(weight is kernel for kernel in kernels)
    p = 1 / (np.arange(1, vocabulary) + 2.7)
    ids = rng.choice(np.arange(1, vocabulary), (3, batches * rows, length), p=p / p.sum()).astype("int32")
    model.compile(Exposed(), training.SmoothedCrossEntropy(0.1))
    return gradient_norms(model, {"source_ids": ids[0], "target_ids": ids[1]}, ids[2])


class Gradients(Figure):
    name = "preln-gradients"
    title = "Gradients at the start of training, Post-LN and Pre-LN"
    source = "Xiong et al. 2020, theorem 1 and figure 3"
    claim = (
        "At the start of training the gradient of the last layer does not depend on depth in Post-LN, and falls with "
        "1/sqrt(depth) in Pre-LN; from the bottom to the top of a Post-LN stack it grows, in Pre-LN it is flat."
    )
    scales = {
        "tiny": dict(
            seeds=3, depths=(2, 8), draws=5, sizes=dict(dim=128, length=16, classes=300), decoder_depths=(6,),
            batches=2, decoder=dict(hidden_dim=64, intermediate_dim=128, vocabulary=500, rows=8, length=16),
        ),
        "small": dict(
            seeds=3, depths=(2, 4, 8, 16, 32), draws=10, sizes=dict(dim=256, length=32, classes=1000),
            decoder_depths=(6, 14), batches=2, decoder={},
        ),
        "full": dict(
            seeds=10, depths=(2, 4, 8, 16, 32), draws=10, sizes=dict(dim=256, length=32, classes=1000),
            decoder_depths=(6, 8, 10, 12, 14), batches=4, decoder={},
        ),
    }  # fmt: skip
    shrunk = {
        "tiny": "the model of the theory 128 wide, a decoder 64 wide; made-up tokens.",
        "small": "the model of the theory, 256 wide, ten draws a seed; a Transformer of the paper's width, 512, at two "
        "of its five depths, on made-up tokens of a skewed law instead of IWSLT14's.",
        "full": "the paper's five depths and width; made-up tokens of a skewed law instead of IWSLT14's.",
    }

    def runs(self, settings):
        theory = [{"model": "theory", "norm": n, "depth": d} for n in BLOCKS for d in settings["depths"]]
        return theory + [
            {"model": "decoder", "norm": n, "depth": d} for n in BLOCKS for d in settings["decoder_depths"]
        ]

    def measure(self, run, settings, seed, prepared):
        if run["model"] == "theory":
            model, draws = Theory(run["norm"], run["depth"], **settings["sizes"]), settings["draws"]
            return {"last": np.mean([model.last_gradient(seed * draws + i) for i in range(draws)])}
        found = decoder_gradients(run["norm"], run["depth"], seed, settings["batches"], **settings["decoder"])
        return {"last": found[-1], "layers": found}

    def verdicts(self, results):
        depths, deepest = results.settings["depths"], results.settings["decoder_depths"][0]
        last = {n: np.array([results.mean("last", model="theory", norm=n, depth=d) for d in depths]) for n in BLOCKS}
        change = last["post"].max() / last["post"].min()
        slope = np.polyfit(np.log(depths), np.log(last["pre"]), 1)[0]
        layers = {n: results.mean("layers", model="decoder", norm=n, depth=deepest) for n in BLOCKS}
        growth, flat = layers["post"][-1] / layers["post"][0], layers["pre"].max() / layers["pre"].min()
        return [
            (
                f"Post-LN, last layer: the same at every depth (greatest / least = {change:.2f}, at most 1.3)",
                1.3 - change,
            ),
            (
                f"Pre-LN, last layer: falls as depth^{slope:.2f} (the theory says -0.5; within 0.15)",
                0.15 - abs(slope + 0.5),
            ),
            (f"Post-LN, {deepest} layers: grows towards the output (top / bottom = {growth:.1f}, above 2)", growth - 2),
            (f"Pre-LN, {deepest} layers: flat (greatest / least = {flat:.1f}, below 2.5)", 2.5 - flat),
        ]

    def cost(self, settings):
        decoder = settings["decoder"]
        tokens = settings["batches"] * decoder.get("rows", 16) * decoder.get("length", 32)
        return 2 * sum(step_cost(depth, tokens, **decoder) for depth in settings["decoder_depths"])

    def draw(self, results, path):
        def by_depth(model, depths):
            return {
                NAMES[n]: (
                    depths,
                    *map(np.array, zip(*(results.interval("last", model=model, norm=n, depth=d) for d in depths))),
                )
                for n in BLOCKS
            }

        depths, decoders = results.settings["depths"], results.settings["decoder_depths"]
        panels = [plots.Panel("last layer, model of the theory", "layers", "norm of the gradient of W2",
                              by_depth("theory", depths), log="xy")]  # fmt: skip
        if len(decoders) > 1:
            panels.append(plots.Panel("last layer of the decoder", "layers", "", by_depth("decoder", decoders)))
        layers = np.arange(1, decoders[0] + 1)
        found = {
            NAMES[n]: (layers, *results.interval("layers", model="decoder", norm=n, depth=decoders[0])) for n in BLOCKS
        }
        panels.append(plots.Panel(f"decoder of {decoders[0]} layers", "layer, from the bottom", "", found))
        plots.lines(panels, self.title, path)


class WarmUp(Figure):
    name = "preln-warmup"
    title = "Training with and without warm-up, Post-LN and Pre-LN"
    source = "Xiong et al. 2020, figures 2 and 4"
    claim = (
        "A Post-LN Transformer needs the warm-up: without it, it does not train at the same rate. A Pre-LN Transformer "
        "reaches the loss of Post-LN with warm-up without any."
    )
    scales = {
        "tiny": dict(
            seeds=2, layers=3, hidden_dim=32, num_heads=2, intermediate_dim=64, dropout=0.0,
            rate=8e-3, warmup=60, steps=150, every=50, batch_tokens=240, vocabulary=12, length=6, batches=150,
        ),
        "small": dict(
            seeds=2, layers=3, hidden_dim=128, num_heads=4, intermediate_dim=256, dropout=0.1,
            rate=3e-3, warmup=150, steps=400, every=50, batch_tokens=1024, vocabulary=2000, words=12,
        ),
        "full": dict(
            seeds=3, layers=6, hidden_dim=512, num_heads=4, intermediate_dim=1024, dropout=0.1,
            rate=1e-3, warmup=4000, steps=30_000, every=1000, batch_tokens=4096, vocabulary=10_000,
        ),
    }  # fmt: skip
    shrunk = {
        "tiny": "a 3-3 Transformer 32 wide that learns to write a row of made-up tokens backwards.",
        "small": "a 3-3 Transformer 128 wide, 400 steps of 1,024 tokens on Multi30k's English-German captions of at "
        "most 12 words instead of IWSLT14 German-English; the rate rises to 3e-3 and falls linearly to 0.",
        "full": "the paper's model and warm-up on Multi30k English-German instead of IWSLT14; the rate falls linearly "
        "to 0.",
    }

    def runs(self, settings):
        return [{"norm": n, "warm-up": w} for n in BLOCKS for w in (settings["warmup"], 1)]

    def prepare(self, settings, sets, folder):
        return language(settings, sets)

    def measure(self, run, settings, seed, prepared):
        s = {**settings, "norm": run["norm"], "warmup": run["warm-up"]}
        model, train, valid = transformer(prepared, **s), prepared.batches("train", seed), prepared.batches("val")
        losses = []
        for first in range(0, s["steps"], s["every"]):
            take_steps(model, train, first, s["every"])
            losses.append(model.evaluate(valid, verbose=0, return_dict=True)["loss"])
        return {"final loss": losses[-1], "losses": losses}

    def verdicts(self, results):
        warm = results.settings["warmup"]
        loss = {(n, w): results.mean("final loss", norm=n, **{"warm-up": w}) for n in BLOCKS for w in (warm, 1)}
        gap = loss["post", 1] - loss["post", warm]
        held = loss["pre", 1] - loss["post", warm]
        return [
            (
                f"Post-LN without warm-up fails: its loss is {gap:.2f} above that with warm-up (more than 0.3)",
                gap - 0.3,
            ),
            (f"Pre-LN without warm-up reaches Post-LN with warm-up: {held:+.2f} (at most 0.1 above)", 0.1 - held),
        ]

    def cost(self, settings):
        sizes = {name: settings[name] for name in ("hidden_dim", "intermediate_dim", "vocabulary")}
        return (
            len(self.runs(settings))
            * settings["steps"]
            * step_cost(settings["layers"], settings["batch_tokens"], **sizes)
        )

    def draw(self, results, path):
        s = results.settings
        steps = np.arange(s["every"], s["steps"] + 1, s["every"])
        series = {}
        for run in results.runs:
            warmup = f"warm-up of {run['warm-up']} steps" if run["warm-up"] > 1 else "no warm-up"
            series[f"{NAMES[run['norm']]}, {warmup}"] = (steps, *results.interval("losses", **run))
        plots.lines([plots.Panel("", "step", "validation loss", series)], self.title, path, within=(0, None))

"""Kernels against their reference.

What does each override in llmfound/kernels buy over the plain body in keras.ops, forward and backward, on its backend?
"""

import keras
import numpy as np
from harness import Experiment, System, main
from keras import ops

TEXT = """Milliseconds of the fastest call, forward and backward, compiled by XLA on JAX and as a graph on TensorFlow:
`dropout` of {batch} x {dim} numbers; `truncated_normal`, {vocabulary} x {dim} of them, forward alone;
`token_cross_entropy` of {batch} x {vocabulary} logits, label smoothing 0.1;
`adam_update` of the weights of {layers} layers of width {dim} and {vocabulary} embeddings, `clip_gradients` of the
matrices of such layers; `embed`, {batch} rows of
those; `recurrence`, a tanh unit of width {dim} over {length} positions of {sentences} sentences, `gru` with r before
its product and `lstm` likewise;
`additive_scores` of {length} queries and {length} keys of width {dim} for {sentences} sentences; `write` of one token
into a cache of {length} for {sentences} sentences, `top_k` the 8 largest of {batch} x {vocabulary} logits, `unfold`
{length} steps of a recurrence, `compiled` a Transformer of one layer, `direct_call` a FeedForward layer of width
{head_dim}, `dense` from width {head_dim} to itself,
`layer_norm`, `split_heads`, `join_heads` and `dot_product_attention` (over {length} keys) for one position of
{sentences} sentences and {heads} heads of {head_dim}, all forward alone; `attention_weights` of {length} queries and as
many keys, the last two of them padding, for as many sentences and heads; `fast_matmul` for ({batch}, {dim}) x ({dim},
{inner}); `update_if` an `adam_update` that is not wanted, `differentiate` two products of ({batch}, {dim}) with their
gradients, without that of the first weights, `loss_gradients` a layer from 2 to 2. The reference of the recurrences is
unrolled where it is compiled.

Overrides that buy less than 1.15 are kept for another reason: `embed` on TensorFlow for gradients that Keras's
optimizers read rightly, `additive_scores` there for its memory (see its own table), `compiled` on torch for inference
mode, `fast_matmul` for the processors where it buys more, `attention_weights` for the calls it saves where sizes are
small, as in `dot_product_attention`."""
FULL = dict(
    batch=1024, dim=512, inner=2048, vocabulary=8000, sentences=32, length=64, heads=8, head_dim=64, layers=12
)  # fmt: skip
SMOKE = dict(batch=16, dim=32, inner=64, vocabulary=100, sentences=2, length=8, heads=2, head_dim=4, layers=1)


def normal(*shape):
    return ops.convert_to_tensor(np.random.default_rng(0).normal(size=shape).astype("float32"))


def forward(function, *inputs):
    """A function that computes function(*inputs), compiled."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(*inputs))
    if backend == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(function)
        return lambda: compiled(*inputs).numpy()
    import torch

    return torch.no_grad()(lambda: function(*inputs))


def forward_and_backward(function, *inputs, seed=None):
    """A function that computes function(*inputs) and the gradient of every input, compiled."""
    backend = keras.backend.backend()
    direction = normal(*function(*inputs).shape)
    if backend == "jax":
        import jax

        def run(state, *inputs):
            with keras.StatelessScope([] if seed is None else [(seed.state, state)]):
                output, backward = jax.vjp(function, *inputs)
            return output, backward(direction)

        state = None if seed is None else seed.state.value
        compiled = jax.jit(run)
        return lambda: jax.block_until_ready(compiled(state, *inputs))
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def run(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                output = function(*inputs)
            return output, tape.gradient(output, inputs, direction)

        return lambda: run(*inputs)[0].numpy()
    inputs = [x.requires_grad_() for x in inputs]

    def run():
        function(*inputs).backward(direction)
        for x in inputs:
            x.grad = None

    return run


def dropout(kernel, sizes):
    seed = keras.random.SeedGenerator(0)
    return forward_and_backward(lambda x: kernel(x, 0.1, seed), normal(sizes["batch"], sizes["dim"]), seed=seed)


def truncated_normal(kernel, sizes):
    return lambda: ops.convert_to_numpy(kernel((sizes["vocabulary"], sizes["dim"]), 0.0, 0.02, "float32", 0))


def token_cross_entropy(kernel, sizes):
    labels = ops.arange(sizes["batch"], dtype="int32") % sizes["vocabulary"]
    logits = normal(sizes["batch"], sizes["vocabulary"])
    return forward_and_backward(lambda logits: kernel(logits, labels, 0.1), logits)


def adam_update(kernel, sizes):
    dim, inner = sizes["dim"], sizes["inner"]
    layer = [(dim, dim)] * 4 + [(dim, inner), (inner, dim)] + [(dim,)] * 5 + [(inner,)]
    shapes = [(sizes["vocabulary"], dim), *layer * sizes["layers"]]
    gradients = [normal(*shape) for shape in shapes]
    weights, momenta, velocities = ([keras.Variable(ops.zeros(shape)) for shape in shapes] for _ in range(3))
    variables = weights + momenta + velocities

    def update(step):
        kernel(weights, gradients, momenta, velocities, 1e-4, step, 0.9, 0.98, 1e-9)
        return step

    if keras.backend.backend() != "jax":
        return forward(update, ops.convert_to_tensor(10.0))
    import jax

    @jax.jit
    def run(values, step):
        with keras.StatelessScope(zip(variables, values)) as scope:
            update(step)
        return [scope.get_current_value(variable) for variable in variables]

    return lambda: jax.block_until_ready(run([variable.value for variable in variables], 10.0))


def clip_gradients(kernel, sizes):
    dim, inner = sizes["dim"], sizes["inner"]
    gradients = [normal(*shape) for shape in ([(dim, dim)] * 4 + [(dim, inner), (inner, dim)]) * sizes["layers"]]
    return forward(lambda *gradients: kernel(gradients, 1.0)[-1], *gradients)


def update_if(kernel, sizes):
    """Adam's update, of which nothing is wanted."""
    return adam_update(lambda *arguments: kernel(False, lambda: reference_adam(*arguments), arguments[0]), sizes)


def reference_adam(*arguments):
    from llmfound.kernels import reference

    reference.adam_update(*arguments)


def differentiate(kernel, sizes):
    """A product and its gradients, after a product whose weights are to have none."""
    import torch

    x, (first, second) = normal(sizes["batch"], sizes["dim"]), (keras.Variable(normal(sizes["dim"], sizes["dim"]))
                                                                for _ in range(2))  # fmt: skip
    kernel(first, False)

    def run():
        for weight in (first, second):
            weight.value.grad = None
        torch.matmul(torch.matmul(x, first.value), second.value).sum().backward()

    return run


def loss_gradients(kernel, sizes):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    return lambda: kernel(model, np.ones((4, 2), "float32"), np.ones((4, 2), "float32"))


def position(sizes):
    """One position of each sentence, float (sentences, 1, heads * head_dim)."""
    return normal(sizes["sentences"], 1, sizes["heads"] * sizes["head_dim"])


def additive_scores(kernel, sizes):
    queries = normal(sizes["sentences"], sizes["length"], sizes["dim"])
    return forward_and_backward(kernel, queries, normal(*queries.shape), normal(sizes["dim"]))


def embed(kernel, sizes):
    ids = ops.arange(sizes["batch"], dtype="int32") % (sizes["vocabulary"] // 2)
    return forward_and_backward(lambda table: kernel(table, ids), normal(sizes["vocabulary"], sizes["dim"]))


def recurrence(kernel, sizes):
    def step(h, x, product, _):
        h = ops.tanh(x + product("h", h))
        return h, h

    def run(x, state, weights):
        return kernel(step, state, x, {"h": weights})[1]

    return forward_and_backward(run, normal(sizes["length"], sizes["sentences"], sizes["dim"]), *recurrent(sizes, 1))


def recurrent(sizes, gates):
    """A state and a recurrent kernel for so many gates."""
    return normal(sizes["sentences"], sizes["dim"]), normal(sizes["dim"], gates * sizes["dim"]) / sizes["dim"] ** 0.5


def sentences(sizes):
    return normal(sizes["sentences"], sizes["length"], sizes["dim"])


def gru(kernel, sizes):
    state, weights = recurrent(sizes, 3)
    return forward_and_backward(lambda x, h, w, u: kernel(x, h, w, u)[0], sentences(sizes), state, weights, 1 * weights)


def lstm(kernel, sizes):
    state, weights = recurrent(sizes, 4)
    run = lambda x, h, w, u: kernel(x, (h, h), w, u)[0]  # noqa: E731
    return forward_and_backward(run, sentences(sizes), state, weights, 1 * weights)


def heads(sizes, length):
    return normal(sizes["sentences"], sizes["heads"], length, sizes["head_dim"])


def dense(kernel, sizes):
    x, weights = normal(sizes["sentences"], 1, sizes["head_dim"]), normal(sizes["head_dim"], sizes["head_dim"])
    return forward(kernel, x, weights)


def layer_norm(kernel, sizes):
    x = position(sizes)
    return forward(lambda x, gamma, beta: kernel(x, gamma, beta, 1e-6), x, *[normal(x.shape[-1]) for _ in range(2)])


def split_heads(kernel, sizes):
    return forward(lambda x: kernel(x, sizes["heads"]), position(sizes))


def join_heads(kernel, sizes):
    return forward(kernel, heads(sizes, 1))


def attention_weights(kernel, sizes):
    mask = ops.convert_to_tensor(np.arange(sizes["length"]) < sizes["length"] - 2)
    run = lambda query, key: kernel(query, key, mask[None, None, None])  # noqa: E731
    return forward_and_backward(run, *[heads(sizes, sizes["length"]) for _ in range(2)])


def dot_product_attention(kernel, sizes):
    return forward(kernel, heads(sizes, 1), *[heads(sizes, sizes["length"]) for _ in range(2)])


def write(kernel, sizes):
    cache, update = heads(sizes, sizes["length"]), heads(sizes, 1)
    return forward(lambda cache, update: kernel(cache, update, 3), cache, update)


def top_k(kernel, sizes):
    return forward(lambda logits: kernel(logits, 8)[0], normal(sizes["batch"], sizes["vocabulary"]))


def unfold(kernel, sizes):
    weights = normal(sizes["dim"], sizes["dim"]) / sizes["dim"] ** 0.5

    def step(t, hidden):
        hidden = ops.tanh(ops.matmul(hidden, weights))
        return hidden, hidden[:, 0], False

    record = ops.zeros((sizes["length"], sizes["sentences"]))
    return forward(lambda hidden: kernel(step, hidden, record)[1], normal(sizes["sentences"], sizes["dim"]))


def compiled(kernel, sizes):
    from llmfound.models import Transformer

    model = Transformer(sizes["vocabulary"], 1, sizes["dim"], sizes["heads"], sizes["inner"])
    token_ids = np.full((sizes["sentences"], sizes["length"]), 4, "int32")
    run = kernel(model, call_model)
    return lambda: run({"source_ids": token_ids, "target_ids": token_ids})


def direct_call(kernel, sizes):
    from llmfound.layers import FeedForward

    layer, x = FeedForward(sizes["head_dim"], sizes["head_dim"]), position(sizes)[..., : sizes["head_dim"]]
    layer(x)
    call = lambda x: keras.layers.Layer.__call__(layer, x)  # noqa: E731  the full call
    return forward(lambda x: layer.call(x) if kernel(layer, (x,), {}) else call(x), x)


def call_model(model, inputs):
    return model(inputs)


def fast_matmul(kernel, sizes):
    """Only torch overrides it; the setting is global, so it is put back after every call."""
    import torch

    product = forward_and_backward(
        ops.matmul, normal(sizes["batch"], sizes["dim"]), normal(sizes["dim"], sizes["inner"])
    )
    kernel()
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")

    def run():
        torch.set_float32_matmul_precision(chosen)
        product()
        torch.set_float32_matmul_precision("highest")

    return run


CASES = [
    dense, layer_norm, split_heads, join_heads, attention_weights, dot_product_attention, dropout, truncated_normal,
    token_cross_entropy, adam_update, clip_gradients, write, top_k, unfold, compiled, direct_call, fast_matmul, embed,
    additive_scores, recurrence, gru, lstm, update_if, differentiate, loss_gradients,
]  # fmt: skip


def build(sizes):
    """{"name reference": call, "name override": call} for every override of this backend."""
    from llmfound import kernels

    cases = {case.__name__: case for case in CASES}
    overrides = kernels.native.__all__
    unknown = set(overrides) - set(cases)
    if unknown:
        raise ValueError(f"overrides without a benchmark: {sorted(unknown)}; add them to CASES.")
    bodies = {"reference": kernels.reference, "override": kernels.native}
    return {
        f"{name} {kind}": cases[name](getattr(body, name), sizes) for name in overrides for kind, body in bodies.items()
    }


def table(systems, results, sizes):
    rows = ["| kernel | backend | reference | override | times as fast |", "|---|---|--:|--:|--:|"]
    for system in systems:
        fastest = {label: min(seconds) * 1e3 for label, seconds in results[system.name]["seconds"].items()}
        for name in dict.fromkeys(label.split()[0] for label in fastest):
            reference, override = fastest[f"{name} reference"], fastest[f"{name} override"]
            ratio = reference / override
            rows.append(f"| {name} | {system.backend} | {reference:.3f} | {override:.3f} | {ratio:.2f} |")
    return "\n".join(rows)


SYSTEMS = [System(backend, backend, build) for backend in ("jax", "tensorflow", "torch")]

if __name__ == "__main__":
    experiment = Experiment("Every override", TEXT.format(**FULL), FULL, SMOKE)
    main(__file__, __doc__, SYSTEMS, [experiment], rounds=3, calls=20, table=table)

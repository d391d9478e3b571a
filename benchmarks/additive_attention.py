"""Memory and time of additive attention.

How much memory and time does attention by a one-layer network take over long sequences, beside
keras.layers.AdditiveAttention on each backend?
"""

import numpy as np
from harness import Experiment, System, main, step_table

TEXT = """Forward and backward, with the gradients of queries, keys and scale, for {batch} sentences of {length} queries
and {length} keys of width {units}: scores, softmax and the weighted sum of the keys. Both sides start from projected
queries and keys, so `keras.layers.AdditiveAttention`, which has no projections, does the same work; ours is
`kernels.additive_scores` and what `llmfound.layers.AdditiveAttention` does after it. "graph" and "XLA" are
`tf.function(jit_compile=False)` and `True`. "above" is the peak less what the process held before its first call, with
imports and arrays. tokens/s counts queries."""
FULL = dict(batch=8, length=512, units=512, tokens=8 * 512)
SMOKE = dict(batch=2, length=8, units=16, tokens=2 * 8)


def ours(shape):
    """A function of query, keys and scale, for queries and keys of a shape."""
    from keras import ops

    from llmfound import kernels
    from llmfound.ops import masked_softmax

    return lambda query, keys, scale: ops.matmul(masked_softmax(kernels.additive_scores(query, keys, scale)), keys)


def theirs(shape):
    import keras

    layer = keras.layers.AdditiveAttention()
    layer.build([shape, shape])
    return lambda query, keys, scale: layer.stateless_call([scale], [], [query, keys])[0]


def step(attention, jit=True):
    def build(sizes):
        import keras

        rng = np.random.default_rng(0)
        shape = sizes["batch"], sizes["length"], sizes["units"]
        arrays = [rng.standard_normal(s, "float32") for s in (shape, shape, shape[-1:])]
        inputs = [keras.ops.convert_to_tensor(x) for x in (*arrays[:2], 0.1 * arrays[2])]
        return differentiated(attention(shape), inputs, jit)

    return build


def differentiated(attention, inputs, jit):
    """A function that computes the sum of the attention's squares and its gradients."""
    import keras

    backend = keras.backend.backend()
    if backend == "torch":
        inputs = [x.detach().requires_grad_() for x in inputs]

        def run():
            attention(*inputs).square().sum().backward()
            for x in inputs:
                x.grad = None

        return run
    if backend == "jax":
        import jax

        compiled = jax.jit(jax.value_and_grad(lambda *inputs: (attention(*inputs) ** 2).sum(), (0, 1, 2)))
        return lambda: jax.block_until_ready(compiled(*inputs))
    import tensorflow as tf

    @tf.function(jit_compile=jit)
    def run(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(attention(*inputs) ** 2)
        return loss, *tape.gradient(loss, inputs)

    return lambda: [x.numpy() for x in run(*inputs)]


def table(systems, results, sizes):
    """The table of steps with one more column, the memory above what was there before the first call."""
    head, line, *rows = step_table(systems, results, sizes).splitlines()
    above = {name: (result["peak"] - result["built"]) / 2**20 for name, result in results.items()}
    name_of = lambda row: row.split("|")[1].strip(" *")  # noqa: E731
    return "\n".join([f"{head} above MB |", f"{line}--:|", *(f"{row} {above[name_of(row)]:.0f} |" for row in rows)])


SYSTEMS = [
    System(f"{who}, {where}", backend, step(attention, jit), peer=attention is theirs)
    for who, attention in (("llmfound", ours), ("Keras", theirs))
    for where, backend, jit in (
        ("JAX", "jax", True),
        ("TensorFlow, graph", "tensorflow", False),
        ("TensorFlow, XLA", "tensorflow", True),
        ("torch", "torch", False),
    )
]

if __name__ == "__main__":
    experiment = Experiment("512 queries, 512 keys, width 512", TEXT.format(**FULL), FULL, SMOKE)
    main(__file__, __doc__, SYSTEMS, [experiment], rounds=2, calls=3, table=table)

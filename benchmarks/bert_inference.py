"""BERT read for its features.

How fast are ours beside Hugging Face transformers and KerasHub, one text at a time and many?
"""

import numpy as np
from harness import Experiment, System, main

TEXT = """One call gives the pooled vectors of {batch} texts of 64 pieces without padding, from NumPy to NumPy;
BERT-base, vocabulary 30522. "oneDNN" is the same system after `torch.set_float32_matmul_precision("medium")`, which is
what `llmfound.kernels.fast_matmul()` sets. Keras models run by `predict_on_batch`, transformers in
`torch.inference_mode()`. sentences/s are 1000 `batch` / fastest; the column tokens/s counts the pieces."""
SIZES = dict(vocabulary=30522, layers=12, dim=768, heads=12, length=64)
SMOKE = dict(vocabulary=100, layers=1, dim=32, heads=2, length=8)


def sizes(batch, of):
    return dict(of, batch=batch, tokens=batch * of["length"])


def ids(sizes):
    rng = np.random.default_rng(0)
    return rng.integers(5, sizes["vocabulary"], (sizes["batch"], sizes["length"]), dtype="int32")


def ours(fast_matmul=False, jit="auto"):
    def build(sizes):
        import llmfound

        if fast_matmul:
            llmfound.kernels.fast_matmul()
        model = llmfound.models.BERT(
            sizes["vocabulary"], sizes["layers"], sizes["dim"], sizes["heads"], 4 * sizes["dim"]
        )
        model.compile(jit_compile=jit)
        x = {"token_ids": ids(sizes)}
        return lambda: np.asarray(model.predict_on_batch(x)["pooled"])

    return build


def transformers(one_dnn=False):
    def build(sizes):
        import torch
        from transformers import BertConfig, BertModel

        if one_dnn:
            torch.set_float32_matmul_precision("medium")
        config = BertConfig(
            vocab_size=sizes["vocabulary"], hidden_size=sizes["dim"], num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"], intermediate_size=4 * sizes["dim"],
        )  # fmt: skip
        model, x = BertModel(config).eval(), ids(sizes)

        @torch.inference_mode()
        def run():
            tokens = torch.from_numpy(x)
            return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).pooler_output.numpy()

        return run

    return build


def keras_hub(one_dnn=False, jit="auto"):
    def build(sizes):
        from keras_hub import models

        if one_dnn:
            import torch

            torch.set_float32_matmul_precision("medium")
        model = models.BertBackbone(
            vocabulary_size=sizes["vocabulary"], num_layers=sizes["layers"], num_heads=sizes["heads"],
            hidden_dim=sizes["dim"], intermediate_dim=4 * sizes["dim"], max_sequence_length=512,
        )  # fmt: skip
        model.compile(jit_compile=jit)
        tokens = ids(sizes)
        x = {"token_ids": tokens, "segment_ids": np.zeros_like(tokens), "padding_mask": np.ones_like(tokens)}
        return lambda: np.asarray(model.predict_on_batch(x)["pooled_output"])

    return build


SYSTEMS = [
    System("llmfound, JAX", "jax", ours()),
    System("llmfound, TensorFlow, graph", "tensorflow", ours(jit=False)),
    System("llmfound, TensorFlow, XLA", "tensorflow", ours(jit=True)),
    System("llmfound, torch", "torch", ours()),
    System("llmfound, torch, oneDNN", "torch", ours(fast_matmul=True)),
    System("transformers", "torch", transformers(), peer=True),
    System("transformers, oneDNN", "torch", transformers(one_dnn=True), peer=True),
    System("KerasHub, JAX", "jax", keras_hub(), peer=True),
    System("KerasHub, TensorFlow, graph", "tensorflow", keras_hub(jit=False), peer=True),
    System("KerasHub, TensorFlow, XLA", "tensorflow", keras_hub(jit=True), peer=True),
    System("KerasHub, torch, oneDNN", "torch", keras_hub(one_dnn=True), peer=True),
]

if __name__ == "__main__":
    experiments = [
        Experiment(f"{batch} at a time", TEXT.format(batch=batch), sizes(batch, SIZES), sizes(2, SMOKE))
        for batch in (1, 32)
    ]
    main(__file__, __doc__, SYSTEMS, experiments, rounds=2, calls=5)

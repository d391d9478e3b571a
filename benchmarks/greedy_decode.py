"""Greedy decoding with a Transformer.

One call translates a batch, always to full length. How fast is ours beside Hugging
Face Marian's `generate` and KerasHub's BART, with the same sizes?
"""

import numpy as np
from harness import Experiment, System, main

TEXT = """Encoder and decoder of 6 layers each, width 512, 8 heads, feed-forward width 2048, a vocabulary of 8000,
random weights, 32 sentences of 32 source tokens, 64 new tokens each; no sentence may end before. "oneDNN" is the same
system after `torch.set_float32_matmul_precision("medium")`, which is what `llmfound.kernels.fast_matmul()` sets.
tokens/s counts new tokens of the sentences returned."""
FULL = dict(layers=6, dim=512, heads=8, inner=2048, vocabulary=8000, batch=32, length=32, new=64, tokens=32 * 64)
SMOKE = dict(layers=1, dim=32, heads=2, inner=64, vocabulary=100, batch=4, length=8, new=6, tokens=4 * 6)


def source(sizes):
    """int32 (batch, length), without special tokens."""
    shape = sizes["batch"], sizes["length"]
    return np.random.default_rng(0).integers(4, sizes["vocabulary"], shape, dtype="int32")


def checked(run, sizes):
    """`run`, after one call that shows that every sentence gets all its tokens."""
    shape = np.shape(run())
    if shape[0] != sizes["batch"] or shape[1] < sizes["new"]:
        raise ValueError(f"decoding must return {sizes['batch']} sentences of {sizes['new']} tokens; got {shape}.")
    return run


def ours(fast_matmul=False):
    def build(sizes):
        import llmfound

        if fast_matmul:
            llmfound.kernels.fast_matmul()
        model = llmfound.models.Transformer(
            vocab_size=sizes["vocabulary"],
            num_layers=sizes["layers"],
            hidden_dim=sizes["dim"],
            num_heads=sizes["heads"],
            intermediate_dim=sizes["inner"],
        )
        inputs = {"source_ids": source(sizes)}
        ids = dict(max_length=sizes["new"], start_id=1, end_id=None)
        return checked(lambda: llmfound.decoding.greedy(model, inputs, **ids), sizes)

    return build


def marian(one_dnn=False):
    def build(sizes):
        import torch
        import transformers

        if one_dnn:
            torch.set_float32_matmul_precision("medium")
        config = transformers.MarianConfig(
            vocab_size=sizes["vocabulary"],
            decoder_vocab_size=sizes["vocabulary"],
            d_model=sizes["dim"],
            encoder_layers=sizes["layers"],
            decoder_layers=sizes["layers"],
            encoder_attention_heads=sizes["heads"],
            decoder_attention_heads=sizes["heads"],
            encoder_ffn_dim=sizes["inner"],
            decoder_ffn_dim=sizes["inner"],
            activation_function="relu",
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            decoder_start_token_id=1,
            eos_token_id=2,
            forced_eos_token_id=None,
        )
        model = transformers.MarianMTModel(config).eval()
        ids = torch.from_numpy(source(sizes)).long()
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        limits = dict(min_new_tokens=sizes["new"], max_new_tokens=sizes["new"])
        return checked(lambda: model.generate(**inputs, **limits, num_beams=1, do_sample=False), sizes)

    return build


def keras_hub(sizes):
    import keras_hub

    backbone = keras_hub.models.BartBackbone(
        vocabulary_size=sizes["vocabulary"],
        num_layers=sizes["layers"],
        num_heads=sizes["heads"],
        hidden_dim=sizes["dim"],
        intermediate_dim=sizes["inner"],
        max_sequence_length=256,
    )
    model = keras_hub.models.BartSeq2SeqLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")
    ids = source(sizes)
    target = np.zeros((sizes["batch"], sizes["new"] + 1), "int32")
    target[:, 0] = 1
    inputs = {
        "encoder_token_ids": ids,
        "encoder_padding_mask": np.ones_like(ids),
        "decoder_token_ids": target,
        "decoder_padding_mask": target,
    }
    return checked(lambda: np.asarray(model.generate(inputs, stop_token_ids=None)["decoder_token_ids"]), sizes)


SYSTEMS = [
    System("llmfound, JAX", "jax", ours()),
    System("llmfound, TensorFlow", "tensorflow", ours()),
    System("llmfound, torch", "torch", ours()),
    System("llmfound, torch, oneDNN", "torch", ours(fast_matmul=True)),
    System("Hugging Face Marian", "torch", marian(), peer=True),
    System("Hugging Face Marian, oneDNN", "torch", marian(one_dnn=True), peer=True),
    System("KerasHub BART, JAX", "jax", keras_hub, peer=True),
    System("KerasHub BART, TensorFlow", "tensorflow", keras_hub, peer=True),
    System("KerasHub BART, torch", "torch", keras_hub, peer=True),
]

if __name__ == "__main__":
    main(__file__, __doc__, SYSTEMS, [Experiment("6 + 6 layers, width 512", TEXT, FULL, SMOKE)], rounds=3, calls=2)

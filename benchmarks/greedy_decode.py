"""Greedy decoding with a Transformer.

One call translates a batch, always to full length. How fast is ours beside Hugging
Face Marian's `generate` and KerasHub's BART, with the same sizes?
"""

import numpy as np
import peers
from harness import Experiment, System, main, on_torch

TEXT = """Encoder and decoder of 6 layers each, width 512, 8 heads, feed-forward width 2048, a vocabulary of 8000,
random weights, 32 sentences of 32 source tokens, 64 new tokens each; no sentence may end before. tokens/s counts new
tokens of the sentences returned."""
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


def ours(sizes):
    import llmfound

    model = llmfound.models.Transformer(
        sizes["vocabulary"], sizes["layers"], sizes["dim"], sizes["heads"], sizes["inner"]
    )
    inputs = {"source_ids": source(sizes)}
    ids = dict(max_length=sizes["new"], start_id=1, end_id=None)
    return checked(lambda: llmfound.decoding.greedy(model, inputs, **ids), sizes)


def marian(sizes):
    import torch

    model = peers.marian(sizes).eval()
    ids = torch.from_numpy(source(sizes)).long()
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    limits = dict(min_new_tokens=sizes["new"], max_new_tokens=sizes["new"])
    return checked(lambda: model.generate(**inputs, **limits, num_beams=1, do_sample=False), sizes)


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
    System("llmfound, JAX", "jax", ours),
    System("llmfound, TensorFlow", "tensorflow", ours),
    *on_torch("llmfound, torch", ours),
    *on_torch("Hugging Face Marian", marian, peer=True),
    System("KerasHub BART, JAX", "jax", keras_hub, peer=True),
    System("KerasHub BART, TensorFlow", "tensorflow", keras_hub, peer=True),
    *on_torch("KerasHub BART, torch", keras_hub, peer=True),
]

if __name__ == "__main__":
    main(__file__, __doc__, SYSTEMS, [Experiment("6 + 6 layers, width 512", TEXT, FULL, SMOKE)], rounds=3, calls=2)

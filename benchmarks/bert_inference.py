"""BERT read for its features.

How fast are ours beside Hugging Face transformers and KerasHub, one text at a time and many?
"""

import numpy as np
import peers
from harness import Experiment, main, on_backends, on_torch

TEXT = """One call gives the pooled vectors of {batch} texts of 64 pieces without padding, from NumPy to NumPy;
BERT-base, vocabulary 30522. Keras models run by `predict_on_batch`, transformers in `torch.inference_mode()`.
sentences/s are 1000 `batch` / fastest; the column tokens/s counts the pieces."""
SIZES = dict(vocabulary=30522, layers=12, dim=768, heads=12, length=64)
SMOKE = dict(vocabulary=100, layers=1, dim=32, heads=2, length=8)


def sizes(batch, of):
    return dict(of, batch=batch, tokens=batch * of["length"])


def ids(sizes):
    rng = np.random.default_rng(0)
    return rng.integers(5, sizes["vocabulary"], (sizes["batch"], sizes["length"]), dtype="int32")


def ours(sizes, jit):
    import llmfound

    model = llmfound.models.BERT(sizes["vocabulary"], sizes["layers"], sizes["dim"], sizes["heads"], 4 * sizes["dim"])
    model.compile(jit_compile=jit)
    x = {"token_ids": ids(sizes)}
    return lambda: np.asarray(model.predict_on_batch(x)["pooled"])


def transformers(sizes):
    import torch
    from transformers import BertModel

    model, x = BertModel(peers.bert_config(sizes)).eval(), ids(sizes)

    @torch.inference_mode()
    def run():
        tokens = torch.from_numpy(x)
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).pooler_output.numpy()

    return run


def keras_hub(sizes, jit):
    model = peers.keras_hub_bert(sizes)
    model.compile(jit_compile=jit)
    tokens = ids(sizes)
    x = {"token_ids": tokens, "segment_ids": np.zeros_like(tokens), "padding_mask": np.ones_like(tokens)}
    return lambda: np.asarray(model.predict_on_batch(x)["pooled_output"])


SYSTEMS = [
    *on_backends("llmfound", ours),
    *on_torch("transformers", transformers, peer=True),
    *on_backends("KerasHub", keras_hub, peer=True),
]

if __name__ == "__main__":
    experiments = [
        Experiment(f"{batch} at a time", TEXT.format(batch=batch), sizes(batch, SIZES), sizes(2, SMOKE))
        for batch in (1, 32)
    ]
    main(__file__, __doc__, SYSTEMS, experiments, rounds=2, calls=5)

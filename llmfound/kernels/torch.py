"""Overrides for PyTorch."""

import torch

__all__ = ["token_cross_entropy", "write", "fast_matmul"]


def token_cross_entropy(logits, labels, smoothing=0.0):
    """torch's own fused loss; see `reference.token_cross_entropy`."""
    classes = logits.shape[-1]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, classes).float(), labels.reshape(-1).long(), reduction="none", label_smoothing=smoothing
    )
    return loss.reshape(labels.shape)


def write(cache, update, position):
    """In place: a copy of the whole cache at every step is what makes decoding slow."""
    cache[:, position] = update[:, 0]
    return cache


def fast_matmul():
    """Sends float32 matrix products on the CPU to oneDNN instead of MKL, if oneDNN keeps them exact here.

    torch's default sends them to MKL, which runs at half of oneDNN's speed on AMD processors. The switch,
    `torch.set_float32_matmul_precision("medium")`, is allowed to round to bfloat16 where the processor has such
    units, so a product is compared with float64 first and the setting is taken back if it lost digits.
    The setting is global to the process, which is why nothing here calls this at import.

    Returns:
        str, "medium" if oneDNN is used from now on, else the precision that stays in force.
    """
    before = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("medium")
    if ((a @ b - exact).abs().max() / exact.abs().max()).item() > 2e-6:
        torch.set_float32_matmul_precision(before)
    return torch.get_float32_matmul_precision()

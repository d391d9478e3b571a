"""Overrides for PyTorch."""

import keras
import torch

from llmfound.kernels import reference

__all__ = [
    "dense",
    "layer_norm",
    "split_heads",
    "join_heads",
    "dot_product_attention",
    "dropout",
    "token_cross_entropy",
    "adam_update",
    "write",
    "fast_matmul",
    "compiled",
    "unfold",
    "top_k",
]

SEED_FACTORS = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # odd, their high bits mix the two words of a Keras seed


def dense(x, kernel, bias=None):
    """torch's own call, without Keras's: in decoding, with one position at a time, that is a good part of the time."""
    kernel = _tensor(kernel)
    if bias is None:
        return torch.matmul(x, kernel)
    return torch.addmm(_tensor(bias), x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def layer_norm(x, gamma, beta, epsilon):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], _tensor(gamma), _tensor(beta), epsilon)


def _tensor(x):
    return x.value if isinstance(x, keras.Variable) else x


def split_heads(x, num_heads):
    batch, length, width = x.shape
    if length == 1:  # the same memory, already in order
        return x.reshape(batch, num_heads, 1, width // num_heads)
    return x.reshape(batch, length, num_heads, width // num_heads).transpose(1, 2)


def join_heads(x):
    batch, heads, length, dim = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * dim)


def dot_product_attention(query, key, value, mask=None, bias=None):
    """torch's own calls; on a CPU, its fused attention takes longer."""
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2)).float()
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = torch.where(mask, scores, reference.MASKED)
    return torch.matmul(torch.softmax(scores, -1).to(value.dtype), value)


def dropout(x, rate, seed):
    """On the CPU, masks from 16 random bits an element: torch draws a 64-bit number for each and takes 6x the time.

    The rate is met to 1/65536; see `reference.dropout`.
    """
    if x.device.type != "cpu":  # a GPU's own dropout is fast, and the meta device has no numbers
        return torch.nn.functional.dropout(x, rate)
    mixed = sum(word * factor for word, factor in zip(seed.next().tolist(), SEED_FACTORS)) % 2**64
    generator = torch.Generator().manual_seed(mixed >> 32)  # of a seed, torch's CPU generator reads only 32 bits
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    dropped = min(round(rate * 2**16), 2**16 - 1)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return torch.ops.aten.native_dropout_backward(x, keep, 2**16 / (2**16 - dropped))  # x * keep * scale


def token_cross_entropy(logits, labels, smoothing=0.0):
    """torch's own fused loss; see `reference.token_cross_entropy`."""
    classes = logits.shape[-1]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, classes).float(), labels.reshape(-1).long(), reduction="none", label_smoothing=smoothing
    )
    return loss.reshape(labels.shape)


def adam_update(variable, gradient, momentum, velocity, learning_rate, step, beta_1, beta_2, epsilon):
    """torch's fused Adam; its epsilon stands after the bias correction, so it is rescaled to mean the same."""
    step = torch.as_tensor(step, dtype=torch.float32)
    with torch.no_grad():
        torch._fused_adam_(
            [variable.value], [gradient.to(variable.value.dtype)], [momentum.value], [velocity.value], [], [step],
            lr=float(learning_rate), beta1=beta_1, beta2=beta_2, weight_decay=0.0,
            eps=epsilon / (1 - beta_2 ** float(step)) ** 0.5, amsgrad=False, maximize=False,
        )  # fmt: skip


def write(cache, update, position):
    """In place: a copy of the whole cache at every step is what makes decoding slow."""
    cache[:, :, position] = update[:, :, 0]
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


def compiled(model, function, *static):
    """Compiles nothing; see `reference.compiled`."""
    call = reference.compiled(model, function, *static)
    return torch.inference_mode()(call)


def unfold(step, carry, record):
    """A Python loop: its counters stay ints, so a model slices its caches without asking the device for them."""
    records = keras.tree.flatten(record)
    for t in range(len(records[0])):
        carry, row, stop = step(t, carry)
        for rows, values in zip(records, keras.tree.flatten(row)):
            rows[t] = values
        if stop:
            break
    return carry, record, t + 1


def top_k(x, k):
    """torch.topk leaves the order of equal values open; where there are any, a stable sort decides.

    The largest alone comes from NumPy on the CPU, whose argmax takes a tenth of torch's time.
    """
    if k == 1 and x.device.type == "cpu":
        indices = torch.from_numpy(x.detach().numpy().argmax(axis=-1, keepdims=True))
        return torch.take_along_dim(x, indices, dim=-1), indices.int()
    values, indices = torch.topk(x, min(k + 1, x.shape[-1]))
    if (values[..., 1:] == values[..., :-1]).any():
        values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k].int()

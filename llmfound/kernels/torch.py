"""Overrides for PyTorch."""

import collections
import functools
import math

import keras
import torch

from llmfound.kernels import reference

__all__ = [
    "dense",
    "layer_norm",
    "split_heads",
    "join_heads",
    "attention_weights",
    "dot_product_attention",
    "dropout",
    "truncated_normal",
    "token_cross_entropy",
    "adam_update",
    "clip_gradients",
    "update_if",
    "differentiate",
    "loss_gradients",
    "write",
    "fast_matmul",
    "compiled",
    "direct_call",
    "unfold",
    "top_k",
    "additive_scores",
    "recurrence",
    "gru",
    "lstm",
]

SEED_FACTORS = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # odd, their high bits mix the two words of a Keras seed


def _in_full_precision(function):
    """Under torch.autocast it computes in float32: its loop writes into memory of one dtype."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        halves = torch.bfloat16, torch.float16
        wide = lambda x: x.float() if isinstance(x, torch.Tensor) and x.dtype in halves else x  # noqa: E731
        args, kwargs = keras.tree.map_structure(wide, (args, kwargs))
        device = next(x.device.type for x in keras.tree.flatten((args, kwargs)) if isinstance(x, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def dense(x, kernel, bias=None):
    """torch's own call, without Keras's: in decoding, with one position at a time, that is a good part of the time."""
    kernel = _tensor(kernel)
    x = x if x.is_floating_point() else x.to(kernel.dtype)
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


def attention_weights(query, key, mask=None, bias=None):
    """torch's own calls, the mask multiplied and added: on a CPU to choose between two tensors takes longer."""
    product = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    scores = product.float()
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        # A bias may be -inf, and so may scores of float16, which no product makes finite.
        finite = bias is None and product.dtype != torch.float16
        if finite and scores.device.type == "cpu" and 2 * mask.numel() <= scores.numel():
            real = mask.to(scores.dtype)
            scores.mul_(real).add_((1 - real) * reference.MASKED)
        else:
            scores = torch.where(mask, scores, reference.MASKED)
    return torch.softmax(scores, -1)


def dot_product_attention(query, key, value, mask=None, bias=None):
    """torch's own calls; on a CPU, its fused attention takes longer."""
    return torch.matmul(attention_weights(query, key, mask, bias).to(value.dtype), value)


def dropout(x, rate, seed):
    """On the CPU, masks from 16 random bits an element: torch draws a 64-bit number for each and takes 6x the time.

    The rate is met to 1/65536; see `reference.dropout`. Processes that train one model have one seed, which
    DistributedDataParallel hands them, and by their ranks each has its own masks.
    """
    if x.device.type != "cpu":  # a GPU's own dropout is fast, and the meta device has no numbers
        return torch.nn.functional.dropout(x, rate)
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if joined else 0
    generator = torch.Generator().manual_seed(_mixed(_words(seed)) + rank)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    dropped = min(round(rate * 2**16), 2**16 - 1)
    keep = torch.empty(x.shape, dtype=torch.int8)  # torch multiplies by it five times as fast as by a bool
    torch.ge(words.view(torch.int16)[: x.numel()].view(x.shape), dropped - 2**15, out=keep)
    return _Dropped.apply(x, keep, 2**16 / (2**16 - dropped))


_drawn = collections.OrderedDict()  # number of torch's generator -> the words of a Keras seed that were drawn with it


def _words(seed):
    """The next two words of a Keras seed; in a forward pass that PyTorch repeats, those that it had the first time.

    keras.RematScope and torch.utils.checkpoint forget what a pass computed and repeat it on the way back. For that they
    put torch's own generator back to where it was, and no seed of Keras. So wherever a pass may be repeated, a number
    of that generator is drawn as well, by which the words are found again.
    """
    repeated = _on_the_way_back()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # those of a checkpoint, or others
    if not repeated and hooks is None and torch.is_grad_enabled():
        return seed.next()
    number = torch.randint(2**62, ()).item()
    if not repeated or number not in _drawn:
        _drawn[number] = seed.next()
        if len(_drawn) > 2**14:
            _drawn.popitem(last=False)
    return _drawn[number]


def _mixed(seed):
    """One number of the two words of a Keras seed: of its own, torch's CPU generator reads only 32 bits."""
    return sum(word * factor for word, factor in zip(seed.tolist(), SEED_FACTORS)) % 2**64 >> 32


def truncated_normal(shape, mean, stddev, dtype, seed):
    """One number drawn for each, through the inverse of the distribution.

    Keras draws four and takes the first inside, which takes seven times as long and eight times the memory of the
    result, and leaves four of a million outside.
    """
    x = keras.ops.zeros(shape, "float32")  # wherever Keras puts its tensors now
    if x.device.type != "meta":  # where only the shape is asked for
        generator = torch.Generator(x.device).manual_seed(seed if isinstance(seed, int) else _mixed(seed.next()))
        ends = math.erf(2**0.5)  # of two deviations
        x.uniform_(-ends, ends, generator=generator).erfinv_().mul_(2**0.5 * stddev).add_(mean)
    return keras.ops.cast(x, dtype or keras.config.floatx())


class _Dropped(torch.autograd.Function):
    """x keep scale, which keeps one byte an element for the way back."""

    @staticmethod
    def forward(ctx, x, keep, scale):
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.mul(x, keep).mul_(scale)

    @staticmethod
    def backward(ctx, gradient):
        return _Dropped.apply(gradient, *ctx.saved_tensors, ctx.scale), None, None


def token_cross_entropy(logits, labels, smoothing=0.0):
    """torch's own fused loss, and on a CPU one that stays in the cache; see `reference.token_cross_entropy`."""
    classes, shape = logits.shape[-1], labels.shape
    logits, labels = logits.reshape(-1, classes).float(), labels.reshape(-1).long()
    if logits.device.type != "cpu":
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    else:
        loss = _CrossEntropy.apply(logits, labels, smoothing)
    return loss.reshape(shape)


class _CrossEntropy(torch.autograd.Function):
    """A few rows of logits at a time, and of what is as large as they are nothing but their gradient."""

    @staticmethod
    def forward(ctx, logits, labels, smoothing):
        ctx.save_for_backward(logits, labels)
        ctx.smoothing = smoothing
        losses = []
        for rows, chosen in _chunks(logits, labels):
            log_p = torch.log_softmax(rows, -1)
            loss = log_p.gather(1, chosen)[:, 0] * (smoothing - 1)
            losses.append(loss - smoothing * log_p.mean(-1) if smoothing else loss)
        return torch.cat(losses) if losses else logits.sum(-1)

    @staticmethod
    def backward(ctx, gradient):
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone will differentiate the gradient
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=ctx.smoothing)
            return *torch.autograd.grad(loss, logits, gradient, create_graph=True), None, None
        found = torch.empty_like(logits)
        for rows, chosen, part, weights in _chunks(logits, labels, found, gradient[:, None]):
            torch.softmax(rows, -1, out=part)
            if ctx.smoothing:
                part.sub_(ctx.smoothing / logits.shape[-1])
            part.scatter_add_(1, chosen, torch.full_like(chosen, ctx.smoothing - 1, dtype=part.dtype)).mul_(weights)
        return found, None, None


def _differentiable(body, tensors, needed, gradients):
    """The gradients of the tensors that need one, None for the others, by autograd, which can differentiate them again.

    Args:
        body: function of the tensors, whose result is a nest of tensors.
        tensors: list of tensors or None.
        needed: list of bool.
        gradients: list of tensors, of the result's leaves.
    """
    tensors = [None if x is None else x.view_as(x) for x in tensors]  # one may come of another, which is not asked for
    pairs = [(x, g) for x, g in zip(keras.tree.flatten(body(*tensors)), gradients) if x.requires_grad]
    learnt = [x for x, n in zip(tensors, needed) if n]
    results, gradients = zip(*pairs)
    found = iter(torch.autograd.grad(results, learnt, gradients, create_graph=True, allow_unused=True))
    return [next(found) if n else None for n in needed]


def _chunks(logits, labels, *others):
    """Rows of logits that a cache holds, 1 MB, with their labels, (rows, 1), and their rows of the others."""
    rows = max(1, 2**18 // logits.shape[-1])
    return zip(*(x.split(rows) for x in (logits, labels[:, None], *others)))


def adam_update(
    variables, gradients, momentums, velocities, learning_rate, step, beta_1, beta_2, epsilon, weight_decay=0.0
):
    """torch's fused AdamW, of all variables of a dtype at once, the decay in the same pass over memory.

    Its epsilon stands after the bias correction, so it is rescaled to mean the same.
    """
    step, alike = torch.as_tensor(step, dtype=torch.float32), {}
    epsilon = epsilon / (1 - beta_2 ** float(step)) ** 0.5
    for row in zip(variables, momentums, velocities, gradients):
        *values, gradient = *(x.value for x in row[:3]), row[3]
        for moment in values[1:]:
            if moment.stride() != values[0].stride():  # once, as it is made
                moment.data = _laid_as(values[0], moment)
        key = values[0].dtype, values[0].device
        alike.setdefault(key, []).append([*values, _laid_as(values[0], gradient.to(values[0].dtype))])
    for rows in alike.values():
        values, first, second, found = map(list, zip(*rows))
        with torch.no_grad():
            torch._fused_adamw_(
                values, found, first, second, [], [step.to(values[0].device)] * len(rows), lr=float(learning_rate),
                beta1=beta_1, beta2=beta_2, weight_decay=weight_decay, eps=epsilon, amsgrad=False, maximize=False,
            )  # fmt: skip


def _laid_as(value, x):
    """x with its numbers in the order that value has in memory, which is all that torch's fused update looks at."""
    return x if x.stride() == value.stride() else torch.empty_like(value, dtype=x.dtype).copy_(x)


def clip_gradients(gradients, norm, variables=()):
    """All in a few calls, where Keras makes four for each; in place, without a copy, if all are the variables' own.

    So `fit` has them. Others are the caller's, and may share their memory.
    """
    gradients = list(gradients)
    places = set(map(id, gradients))
    own = len(places) == len(gradients) and places <= {id(variable.value.grad) for variable in variables}
    with torch.no_grad():
        wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
        found = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, wide)))
        scale = torch.clamp(norm / found, max=1.0) + (found - found)
        if not own:
            return list(torch._foreach_mul(gradients, scale))
        torch._foreach_mul_(gradients, scale)
    return gradients


def update_if(condition, update, variables):
    """A step is no compiled program here: what is not wanted is not done."""
    if condition:
        update()


def differentiate(variable, wanted=None):
    if wanted is not None:
        variable.value.requires_grad_(wanted)
        variable.value.grad = variable.value.grad if wanted else None
    return variable.value.requires_grad


def loss_gradients(model, x, y=None, sample_weight=None):
    weights = [variable.value for variable in model.trainable_weights]
    waiting = [weight for weight in weights if not weight.requires_grad]  # of groups that an optimizer leaves out
    try:
        for weight in waiting:
            weight.requires_grad_(True)
        loss = reference.evaluated_loss(model, *reference.as_tensors(x, y, sample_weight))
        found = torch.autograd.grad(loss, weights, allow_unused=True)
    finally:
        for weight in waiting:
            weight.requires_grad_(False)
    zero = lambda weight, gradient: torch.zeros_like(weight) if gradient is None else gradient  # noqa: E731
    return [zero(weight, gradient).detach().float().cpu().numpy() for weight, gradient in zip(weights, found)]


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


def _on_the_way_back():
    return torch._C._current_graph_task_id() >= 0


def _repeated(layer):
    mode = layer._remat_mode
    return mode and (mode.mode != "list_of_layers" or layer.name in mode.layer_names)


def direct_call(layer, args, kwargs):
    """For tensors as `call` takes them, where neither a hook of torch's nor anything of Keras's waits for the call."""
    if (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or torch.nn.modules.module._has_any_global_hook()
        or _repeated(layer)
        or layer.activity_regularizer is not None
        or layer.quantization_mode is not None
        or _on_the_way_back()  # where an exception breaks off a pass that is repeated, once it has given all it must
    ):
        return False
    name = layer.compute_dtype
    if any(variable.dtype != name for variable in layer._trainable_variables[:1]):  # they are to be cast
        return False
    dtype = getattr(torch, name)
    for x in (*args, *kwargs.values()):
        if type(x) is torch.Tensor:
            if x.dtype != dtype and x.is_floating_point():
                return False
        elif x is not None and x is not True and x is not False:
            return False
    return True


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
    if k == 1 and x.device.type == "cpu" and x.dtype != torch.bfloat16:  # which NumPy has not
        indices = torch.from_numpy(x.detach().numpy().argmax(axis=-1, keepdims=True))
        return torch.take_along_dim(x, indices, dim=-1), indices.int()
    values, indices = torch.topk(x, min(k + 1, x.shape[-1]))
    if (values[..., 1:] == values[..., :-1]).any():
        values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k].int()


def recurrence(step, state, inputs, weights, shared=(), reverse=False):
    """A loop whose backward pass forms each weight's gradient as one product; see `reference.recurrence`."""
    nests = state, inputs, weights, shared
    tensors = keras.tree.flatten(nests)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return reference.recurrence(step, state, inputs, weights, shared, reverse)
    shapes = {}  # filled by the forward pass
    flat = _Recurrence.apply(step, nests, reverse, shapes, *tensors)
    return keras.tree.pack_sequence_as(shapes["result"], flat)


class _Recurrence(torch.autograd.Function):
    """The loop runs on copies without history; the graph it makes is kept and gone through in the backward pass."""

    @staticmethod
    def forward(ctx, step, nests, reverse, shapes, *tensors):
        copies = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
        state, inputs, weights, shared = keras.tree.pack_sequence_as(nests, copies)
        factors, products = ({name: [] for name in weights} for _ in range(2))

        def product(name, left):
            factors[name].append(left)
            result = reference.times(left, weights[name].detach())
            products[name].append(result.requires_grad_(result.requires_grad or weights[name].requires_grad))
            return products[name][-1]

        with torch.enable_grad():
            loop = _by_position(step, state, inputs, product, shared, reverse)
            result = keras.tree.flatten(loop)
        shapes["result"] = loop
        ctx.kept = nests, copies, factors, products, result
        ctx.again = step, nests, reverse
        ctx.save_for_backward(*tensors)
        return tuple(x.detach() for x in result)

    @staticmethod
    def backward(ctx, *gradients):
        if torch.is_grad_enabled():  # someone will differentiate the gradient
            step, nests, reverse = ctx.again
            loop = lambda *x: reference.recurrence(step, *keras.tree.pack_sequence_as(nests, x), reverse)  # noqa: E731
            found = _differentiable(loop, ctx.saved_tensors, ctx.needs_input_grad[4:], gradients)
            return None, None, None, None, *found
        if ctx.kept is None:
            raise RuntimeError("The gradient of this recurrence was taken before; call the model again.")
        nests, copies, factors, products, result = ctx.kept
        weights = {id(x) for x in keras.tree.flatten(keras.tree.pack_sequence_as(nests, copies)[2])}
        wanted = [x for x in copies if x.requires_grad and id(x) not in weights]
        flat = [z for name in products for z in products[name] if z.requires_grad]
        pairs = [(x, g) for x, g in zip(result, gradients) if x.requires_grad]
        found = torch.autograd.grad([x for x, _ in pairs], wanted + flat, [g for _, g in pairs], allow_unused=True)
        found = {id(x): g for x, g in zip(wanted + flat, found) if g is not None}
        of_weights = {}
        for name, weight in keras.tree.pack_sequence_as(nests, copies)[2].items():
            rows = [(x, found[id(z)]) for x, z in zip(factors[name], products[name]) if id(z) in found]
            if weight.requires_grad and rows:
                left, right = (torch.stack(side) for side in zip(*rows))
                formula = "tbi,tbj->ij" if weight.ndim == 2 else "tbi,tbj->bij"
                of_weights[id(weight)] = torch.einsum(formula, left.detach().to(right.dtype), right).to(weight.dtype)
        ctx.kept = None
        return None, None, None, None, *[of_weights.get(id(x), found.get(id(x))) for x in copies]


def _by_position(step, state, inputs, product, shared, reverse):
    """`reference.recurrence` with a given `product`."""
    leaves = keras.tree.flatten(inputs)
    rows = list(zip(*[x.unbind() for x in leaves]))
    outputs = [None] * len(rows)
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        state, outputs[t] = step(state, keras.tree.pack_sequence_as(inputs, rows[t]), product, shared)
    return state, keras.tree.map_structure(lambda *rows: torch.stack(rows), *outputs)


def gru(x, state, kernel, recurrent_kernel, bias=None, recurrent_bias=None, mask=None, reverse=False,
        reset_after=False, update="old"):  # fmt: skip
    """A loop with its backward pass written out: a third of the calls of torch's autograd. See `reference.gru`.

    On a GPU cuDNN's, if it has the form that is asked for.
    """
    kernel, recurrent_kernel = _tensor(kernel), _tensor(recurrent_kernel)
    bias, recurrent_bias = _tensor(bias), _tensor(recurrent_bias)
    if x.is_cuda and reset_after and update == "old" and kernel is not None:
        return _native_gru(x, state, kernel, recurrent_kernel, bias, recurrent_bias, mask, reverse)
    mask = None if mask is None else mask.to(torch.bool).t().unsqueeze(-1)
    arguments = x, state, kernel, recurrent_kernel, bias, recurrent_bias, mask
    return _in_full_precision(_GRU.apply)(reverse, reset_after, update == "new", *arguments)


def _native_gru(x, state, kernel, recurrent_kernel, bias, recurrent_bias, mask, reverse):
    """torch.gru, whose gates stand in the order r, z, candidate; masked as in `lstm`."""
    n = len(recurrent_kernel)

    def ours(w):
        z, r, candidate = w.split(n, dim=-1)
        return torch.cat([r, z, candidate], dim=-1)

    nothing = kernel.new_zeros(3 * n)
    weights = [ours(kernel).t(), ours(recurrent_kernel).t()]
    weights += [ours(nothing if b is None else b) for b in (bias, recurrent_bias)]
    x, mask, _ = _to_the_front(x, mask, reverse)
    first = state.unsqueeze(0).contiguous()
    outputs, _ = torch.gru(x, first, weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
    outputs = _and_back(outputs, state, mask)
    return outputs.flip(1) if reverse else outputs, outputs[:, -1]


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reverse, after, new, x, state, kernel, recurrent, bias, recurrent_bias, mask):
        batch, length, _ = x.shape
        n = len(recurrent)
        gates = x.transpose(0, 1)
        gates = gates.clone(memory_format=torch.contiguous_format) if kernel is None else dense(gates, kernel, bias)
        z_and_r, candidates = gates[..., : 2 * n], gates[..., 2 * n :]
        inner = gates.new_empty(length, batch, n)  # r h, or with reset_after h U
        states = gates.new_empty(length, batch, n)
        times = range(length - 1, -1, -1) if reverse else range(length)
        h = state
        for t in times:
            zr, c = z_and_r[t], candidates[t]
            if after:
                product = dense(h, recurrent, recurrent_bias)
                zr.add_(product[:, : 2 * n]).sigmoid_()
                inner[t] = product[:, 2 * n :]
                c.addcmul_(zr[:, n:], inner[t])
            else:
                zr.addmm_(h, recurrent[:, : 2 * n]).sigmoid_()
                torch.mul(zr[:, n:], h, out=inner[t])
                c.addmm_(inner[t], recurrent[:, 2 * n :])
            c.tanh_()
            z = zr[:, :n]
            following = torch.lerp(h, c, z) if new else torch.lerp(c, h, z)
            states[t] = following if mask is None else torch.where(mask[t], following, h)
            h = states[t]
        ctx.options = reverse, after, new
        ctx.save_for_backward(x, state, kernel, recurrent, bias, recurrent_bias, mask, gates, inner, states)
        return states.transpose(0, 1), h.clone()

    @staticmethod
    @_in_full_precision
    def backward(ctx, of_outputs, of_last):
        reverse, after, new = ctx.options
        *arguments, gates, inner, states = ctx.saved_tensors
        x, state, kernel, recurrent, bias, recurrent_bias, mask = arguments
        if torch.is_grad_enabled():  # someone will differentiate the gradient
            keep, update = None if mask is None else mask[..., 0].t(), "new" if new else "old"
            loop = lambda *x: reference.gru(*x, keep, reverse, after, update)  # noqa: E731
            found = _differentiable(loop, arguments[:-1], ctx.needs_input_grad[3:-1], (of_outputs, of_last))
            return None, None, None, *found, None
        length, batch, n = states.shape
        first = state.unsqueeze(0)
        before = torch.cat([states[1:], first] if reverse else [first, states[:-1]])
        of_gates = torch.empty_like(gates)
        of_inner = torch.empty_like(inner) if after else None
        of_outputs = of_outputs.transpose(0, 1)
        zr_kernel, c_kernel = recurrent[:, : 2 * n].t(), recurrent[:, 2 * n :].t()
        dh = of_last
        for t in range(length) if reverse else range(length - 1, -1, -1):
            z, r, c = gates[t].split(n, dim=1)
            h, dgates = before[t], of_gates[t]
            dh = dh + of_outputs[t]
            skipped = None
            if mask is not None:
                skipped = dh.masked_fill(mask[t], 0)
                dh = dh.masked_fill(~mask[t], 0)
            dz = dh * (c - h) if new else dh * (h - c)
            dc = dh * z if new else torch.addcmul(dh, dh, z, value=-1)
            dh = dh - dc
            da = torch.addcmul(dc, dc * c, c, value=-1, out=dgates[:, 2 * n :])
            if after:
                torch.mul(da, r, out=of_inner[t])
                dr = da * inner[t]
            else:
                drh = da @ c_kernel
                dr = drh * h
                dh.addcmul_(drh, r)
            gate = gates[t, :, : 2 * n]
            torch.mul(torch.cat([dz, dr], 1), torch.addcmul(gate, gate, gate, value=-1), out=dgates[:, : 2 * n])
            dh.addmm_(dgates[:, : 2 * n], zr_kernel)
            if after:
                dh.addmm_(of_inner[t], c_kernel)
            if skipped is not None:
                dh += skipped
        rows = length * batch
        flat, flat_before = of_gates.view(rows, 3 * n), before.reshape(rows, n).t()
        of_candidates = of_inner.view(rows, n) if after else flat[:, 2 * n :]
        left = flat_before if after else inner.view(rows, n).t()
        of_recurrent = torch.cat([flat_before @ flat[:, : 2 * n], left @ of_candidates], dim=1)
        of_x = of_kernel = None
        if kernel is None:
            of_x = of_gates.transpose(0, 1)
        else:
            of_kernel = x.transpose(0, 1).reshape(rows, -1).t() @ flat
            if ctx.needs_input_grad[3]:
                of_x = (flat @ kernel.t()).view(length, batch, -1).transpose(0, 1)
        of_bias = flat.sum(0) if bias is not None else None
        of_recurrent_bias = None
        if recurrent_bias is not None:
            of_recurrent_bias = torch.cat([flat[:, : 2 * n].sum(0), of_candidates.sum(0)])
        return None, None, None, of_x, dh, of_kernel, of_recurrent, of_bias, of_recurrent_bias, None


def lstm(x, state, kernel, recurrent_kernel, bias=None, mask=None, reverse=False, window=None):
    """torch's own LSTM, which is oneDNN's on a CPU and cuDNN's on a GPU, also under a mask; see `reference.lstm`.

    Under a mask, every row's real positions move to the front and its outputs back. Behind them, one more input
    opens the forget gate and shuts the input gate, so that c is the same at the end.
    """
    kernel, recurrent_kernel, bias = _tensor(kernel), _tensor(recurrent_kernel), _tensor(bias)
    if window is not None and x.shape[1] > window:
        return _in_windows(x, state, kernel, recurrent_kernel, bias, mask, reverse, window)
    x, mask, real = _to_the_front(x, mask, reverse)
    if mask is not None:
        x = torch.cat([x, (~real)[..., None].to(x.dtype)], dim=-1)
        gate = torch.tensor([-_SHUT, _SHUT, 0, 0], dtype=kernel.dtype, device=kernel.device)
        kernel = torch.cat([kernel, gate.repeat_interleave(len(recurrent_kernel))[None]])
    weights = [_Transposed.apply(kernel), _Transposed.apply(recurrent_kernel)]
    if bias is not None:
        weights += [bias, torch.zeros_like(bias)]
    states = [s.unsqueeze(0).contiguous() for s in state]
    native = torch.lstm if x.is_cuda else _in_full_precision(torch.lstm)  # not every CPU has oneDNN's of bfloat16
    outputs, _, c = native(x, states, weights, bias is not None, 1, 0.0, torch.is_grad_enabled(), False, True)
    outputs = _and_back(outputs, state[0], mask)
    return outputs.flip(1) if reverse else outputs, (outputs[:, -1], c[0])


def _in_windows(x, state, kernel, recurrent_kernel, bias, mask, reverse, window):
    length, rows = x.shape[1], []
    for start in range(0, length, window):  # in the order of reading
        end = min(start + window, length)
        part = slice(length - end, length - start) if reverse else slice(start, end)
        mask_part = None if mask is None else mask[:, part]
        outputs, last = lstm(x[:, part], state, kernel, recurrent_kernel, bias, mask_part, reverse)
        rows.append(outputs)
        state = [s.detach() for s in last]
    return torch.cat(rows[::-1] if reverse else rows, dim=1), last


def _to_the_front(x, mask, reverse):
    """x as it is read, every row's real positions in front; the mask as it is read; and where x is real now.

    A mask that hides nothing is None; this is seen on a CPU only, as a GPU would have to be waited for.
    """
    if reverse:
        x, mask = x.flip(1), None if mask is None else mask.flip(1)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if mask is None or (mask.device.type == "cpu" and not traced and bool(mask.all())):
        return x, None, None
    mask = mask.to(torch.bool)
    order = torch.argsort(~mask, dim=1, stable=True)
    real = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
    return torch.where(real[..., None], torch.take_along_dim(x, order[..., None], 1), 0), mask, real


def _and_back(outputs, state, mask):
    """The outputs where the mask has them, and in between what they were before."""
    if mask is None:
        return outputs
    outputs = torch.cat([state.to(outputs.dtype)[:, None], outputs], dim=1)
    return torch.take_along_dim(outputs, mask.cumsum(1)[..., None], 1)


class _Transposed(torch.autograd.Function):
    """x.t() in its own memory, which takes all threads; torch copies transposed matrices with one."""

    @staticmethod
    def forward(ctx, x):
        return torch.mul(x.t(), 1, out=x.new_empty(x.shape[::-1]))

    @staticmethod
    def backward(ctx, gradient):
        return _Transposed.apply(gradient)


_SHUT = 1e4  # far beyond where a float32 sigmoid is 0 or 1


def additive_scores(query, keys, scale):
    """Buffers for one chunk of queries; the backward pass computes tanh again. See `reference.additive_scores`.

    tanh(x) = 2 sigmoid(2x) - 1, as torch's tanh takes three times as long on a CPU.
    """
    scale, dtypes = _tensor(scale), {query.dtype, keys.dtype}
    if 128 * query.shape[1] * keys.numel() <= reference.CHUNK_BYTES["cpu"] and dtypes == {scale.dtype}:
        # 256 KB: the calls that save it take longer
        return torch.matmul(torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)), scale)
    return _AdditiveScores.apply(query, keys, scale)


class _AdditiveScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, keys, scale):
        ctx.save_for_backward(query, keys, scale)
        dtype = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), scale.dtype)
        query, keys, scale = _wide(query, keys, scale)
        less, factor = -scale.sum(), (2 * scale)[:, None]
        parts = []
        for _, hidden in _sigmoids(query, keys):
            parts.append(torch.addmm(less, hidden.view(-1, hidden.shape[-1]), factor).view(hidden.shape[:-1]))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        needs_query, needs_keys, needs_scale = ctx.needs_input_grad
        if torch.is_grad_enabled():  # someone will differentiate the gradient
            body = reference.additive_scores
            return tuple(_differentiable(body, ctx.saved_tensors, ctx.needs_input_grad, [gradient]))
        dtypes = [x.dtype for x in ctx.saved_tensors]
        query, keys, scale = _wide(*ctx.saved_tensors)
        gradient = gradient.to(scale.dtype)
        of_query, of_keys = torch.empty_like(query), torch.zeros_like(keys)
        of_scale = -gradient.sum().expand_as(scale) if needs_scale else None
        for part, hidden in _sigmoids(query, keys):
            weights = gradient[:, part]
            if needs_scale:
                sums = hidden.view(-1, hidden.shape[-1]).t() @ weights.reshape(-1, 1)
                of_scale = of_scale + 2 * sums[:, 0]
            if needs_query or needs_keys:
                # gradient (1 - tanh^2) / 4, in the same memory
                torch.ops.aten.sigmoid_backward.grad_input(weights[..., None], hidden, grad_input=hidden)
                torch.sum(hidden, 2, out=of_query[:, part])
                if needs_keys:
                    of_keys += hidden[:, 0] if hidden.shape[1] == 1 else hidden.sum(1)
        of_query = of_query.mul_(4 * scale) if needs_query else None
        of_keys = of_keys.mul_(4 * scale) if needs_keys else None
        return tuple(None if x is None else x.to(dtype) for x, dtype in zip((of_query, of_keys, of_scale), dtypes))


def _wide(*tensors):
    """All in one dtype, float32 at least."""
    dtypes = {x.dtype for x in tensors}
    if dtypes == {torch.float32}:  # the usual case, without the time the others take
        return tensors
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    return [x.to(dtype) for x in tensors]


def _sigmoids(query, keys):
    """For each chunk of queries, its slice and sigmoid(2 (query + keys)), float (batch, chunk, length, units)."""
    batch, queries, units = query.shape
    chunk = queries
    if queries > 1 and keys.device.type != "meta":
        chunk = min(chunk, reference.queries_at_once(keys.shape, "cpu" if keys.device.type == "cpu" else "gpu"))
    query, keys = (2 * query).unsqueeze(2), keys.unsqueeze(1)
    buffer = query.new_empty(batch * chunk * keys.shape[2] * units)
    for first in range(0, max(queries, 1), max(chunk, 1)):
        some = query[:, first : first + chunk]
        shape = batch, some.shape[1], keys.shape[2], units
        hidden = buffer[: math.prod(shape)].view(shape)
        torch.add(some, keys, alpha=2, out=hidden)
        yield slice(first, first + chunk), hidden.sigmoid_()

"""token_logprobs from hidden states: the logits hidden @ weight.T are computed in chunks and never exist as a whole.

Any loss may follow (GSPO, DPO, the sum over a sequence), so the gradient of the log-probs is not known in the forward,
and the backward needs the logits of each chunk again. If all logits fit into one chunk (CHUNK_BYTES) they are kept,
which makes three matrix products in total; otherwise they are computed again, which makes four. linear_ppo_loss and
linear_cross_entropy always need three: use them for the losses of PPO and SFT.

If only hidden gets a gradient (a frozen lm_head, as with LoRA), two products are enough. The derivative of a row's
log-prob by its hidden state does not depend on the loss, so the forward computes it, and the backward multiplies:

    slopes[i] = dlogprobs[i] / dhidden[i] = sum_v (1[v = labels[i]] - p[i, v]) weight[v] / temperature
    dhidden[i] = grad_logprobs[i] slopes[i]

The slopes take as much memory as the gradient. If the loss has a gradient by the entropies too, the backward takes two
more products.
Specification: reference.linear_token_logprobs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._autograd import check_prepared, check_unchanged, may_consume
from ._dispatch import Op
from ._inputs import as_rows, check_temperature, float_or, wants_gradient
from ._layout import accumulation_dtype, byte_mask
from ._linear import (
    Gradients,
    check,
    chunk_logits,
    chunk_statistics,
    compact,
    empty_gradients,
    factors_of,
    flops_of_gradients,
    flops_of_logits,
    gradient_dtype,
    is_fused,
    logits_buffer,
    logits_dtype,
    logits_shape,
    most_rows,
    rounded,
    rounded_in_float32,
    way_of,
)

NAME = "linear_token_logprobs"
ONLY_HIDDEN = (True, False, False)  # of hidden, weight and bias, the first alone gets a gradient


def _outputs(hidden, weight, labels, with_entropy, wanted, way) -> tuple[Tensor, ...]:
    """logprobs (N,), entropy (N,) or empty, saved (N, 2), logits (N, V) in the layout of the way or empty, and slopes
    (N, D) or empty.

    saved and logits have the rows that count first.
    """
    rows, accum, slopes = labels.shape[0], accumulation_dtype(hidden), wanted == ONLY_HIDDEN
    kept, keep = logits_shape(rows, weight.shape[0], way), any(wanted) and not slopes
    if keep and _is_unknown(rows):  # then so is whether they are kept
        kept = (torch.library.get_ctx().new_dynamic_size(), kept[1])
    elif not (keep and 0 < rows <= most_rows(weight, way, kept=True)):  # one comparison, also where rows is symbolic
        kept = (0, kept[1])
    outputs = (
        ((rows,), accum),
        ((rows if with_entropy else 0,), accum),
        ((rows, 2), accum),
        (kept, logits_dtype(hidden, way)),
        ((rows if slopes else 0, hidden.shape[1]), logits_dtype(hidden, way)),
    )
    return tuple(torch.empty(shape, dtype=dtype, device=hidden.device) for shape, dtype in outputs)


def _is_unknown(size: int | torch.SymInt) -> bool:
    """Whether a compiler knows no example of the size, as of hidden[mask]."""
    if not isinstance(size, torch.SymInt):
        return False
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols  # a second, and sympy

    return has_free_unbacked_symbols(size)


def _forward_any(hidden, weight, bias, labels, mask, temperature, softcap, rounds, fused, with_entropy, *wanted):
    inputs = compact(NAME, hidden, weight, bias, labels, mask, softcap, rounds, fused)
    rows = inputs.labels.shape[0]
    logprobs, entropy, saved, logits, slopes = _outputs(hidden, inputs.weight, labels, with_entropy, wanted, inputs.way)
    only_hidden = wanted == ONLY_HIDDEN
    buffer = logits if logits.shape[0] else logits_buffer(inputs, needed=only_hidden)
    if only_hidden:  # the slopes are the gradient of the sum of the log-probs
        gradients, ones = Gradients(inputs, ONLY_HIDDEN, slopes[:rows]), torch.ones_like(logprobs)
    for part in inputs.parts:
        z, logprobs[part], h, saved[part] = chunk_statistics(buffer, inputs, part, temperature, with_entropy)
        if with_entropy:
            entropy[part] = h
        if only_hidden:
            gradients.add(z, part, temperature, saved[part], None, ones[part], None)
    # torch.library's ops must be reproducible in all of their outputs, including the unused parts.
    logits[:, weight.shape[0] :] = 0
    if inputs.index is not None:
        saved[rows:], logits[logits_shape(rows, weight.shape[0], inputs.way)[0] :] = 0, 0
        logprobs = inputs.put(logprobs[:rows])
        entropy = inputs.put(entropy[:rows]) if with_entropy else entropy
        slopes = inputs.put(slopes[:rows]) if only_hidden else slopes
    return logprobs, entropy, saved, logits, slopes


def _backward_any(
    hidden, weight, bias, labels, mask, temperature, softcap, rounds, fused, entropy, saved, logits, slopes,
    grad_logprobs, grad_entropy, *wanted, consume=False,
):  # fmt: skip
    factor = rounded(weight.new_empty(0), rounds)  # only its dtype counts: the weight itself is large
    kept_rows, kept_width = logits_shape(saved.shape[0], weight.shape[0], way_of(hidden, factor, bias, softcap, fused))
    check_unchanged(
        NAME,
        weight.ndim == 2
        and hidden.shape == (saved.shape[0], weight.shape[1])
        and saved.shape[1:] == (2,)
        and all(x is None or x.shape == saved.shape[:1] for x in (labels, mask))
        and (grad_entropy is None or entropy.shape == saved.shape[:1])
        and logits.shape[0] in (0, kept_rows)
        and logits.shape[1] == kept_width
        and slopes.shape == (saved.shape[0] if wanted == ONLY_HIDDEN else 0, weight.shape[1])
        and (bias is None or bias.shape == weight.shape[:1])
        and (not fused or hidden.dtype == factor.dtype),
    )
    if wanted == ONLY_HIDDEN and grad_logprobs is not None and grad_entropy is None:
        factors = grad_logprobs if mask is None else grad_logprobs.masked_fill(mask == 0, 0)  # it may be NaN there
        grad_hidden = torch.mul(slopes, factors[:, None], out=slopes if consume else torch.empty_like(slopes))
        return grad_hidden.to(gradient_dtype(hidden.dtype)), None, None
    saved, logits = saved.contiguous(), logits.contiguous()  # a hook may return them in another layout
    inputs = compact(NAME, hidden, weight, bias, labels, mask, softcap, rounds, fused)
    gradients = Gradients(inputs, wanted)
    kept = logits.shape[0] > 0
    buffer = (logits if consume else logits.clone()) if kept else logits_buffer(inputs, any(wanted))
    by_row = [None if t is None else inputs.take(t.contiguous()) for t in (grad_logprobs, grad_entropy)]
    entropy = None if grad_entropy is None else inputs.take(entropy.contiguous())
    for part in inputs.parts:
        z = buffer[: part.stop, : weight.shape[0]] if kept else chunk_logits(buffer, inputs, part, temperature)
        g, h, e = (None if t is None else t[part] for t in (*by_row, entropy))
        gradients.add(z, part, temperature, saved[part], e, g, h)
    return gradients.results()


def _fake(hidden, weight, bias, labels, mask, temperature, softcap, rounds, fused, with_entropy, *wanted):
    weight = rounded(weight, rounds)
    way = way_of(hidden, weight, bias, softcap, fused)
    return _outputs(hidden, weight, labels, with_entropy, wanted, way)


_backward = Op(
    f"{NAME}_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? mask, float temperature, "
    "float? softcap, bool rounds, bool fused, Tensor entropy, Tensor saved, Tensor logits, Tensor slopes, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, bool grad_hidden, bool grad_weight, bool grad_bias) "
    "-> (Tensor, Tensor, Tensor)",
    kernels={("cpu", "native"): _backward_any, ("cuda", "native"): _backward_any, ("cuda", "triton"): _backward_any},
    fake=lambda hidden, weight, bias, *rest: empty_gradients(hidden, weight, bias, rest[-3:]),
    waits=True,  # if there is a mask: `compact` in _linear.py
    flops=flops_of_gradients,
)


def _save(ctx, inputs, output):
    hidden, weight, bias, labels, mask, *ctx.options, ctx.with_entropy = inputs[:10]
    ctx.wanted = inputs[10:]
    _, entropy, *kept = output
    # A copy of the entropy, because users may change the result in place.
    ctx.save_for_backward(hidden, weight, bias, labels, mask, entropy.clone(), *kept)


def _grad(ctx, grad_logprobs, grad_entropy, *_):
    check_prepared(NAME, all(w or not needed for w, needed in zip(ctx.wanted, ctx.needs_input_grad, strict=False)))
    hidden, weight, bias, labels, mask, entropy, saved, logits, slopes = ctx.saved_tensors
    if not ctx.with_entropy:
        grad_entropy = None
    hidden, weight, entropy = hidden.detach(), weight.detach(), entropy.detach()
    bias = None if bias is None else bias.detach()
    args = (
        hidden, weight, bias, labels, mask, *ctx.options, entropy, saved, logits, slopes, grad_logprobs,
        grad_entropy, *ctx.wanted,
    )  # fmt: skip
    if may_consume(ctx, *(t for t in args if isinstance(t, Tensor))):
        grads = _backward.kernel_on(hidden.device.type)(*args, consume=True)
    else:
        grads = _backward(*args)
    return *(g if want else None for g, want in zip(grads, ctx.wanted, strict=True)), *[None] * 10


_forward = Op(
    f"{NAME}(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? mask, float temperature, "
    "float? softcap, bool rounds, bool fused, bool with_entropy, bool grad_hidden, bool grad_weight, bool grad_bias) "
    "-> (Tensor logprobs, Tensor entropy, Tensor saved, Tensor logits, Tensor slopes)",
    kernels={("cpu", "native"): _forward_any, ("cuda", "native"): _forward_any, ("cuda", "triton"): _forward_any},
    fake=_fake,
    backward=_grad,
    setup_context=_save,
    differentiable=2,
    waits=True,
    flops=flops_of_logits,
)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    with_entropy: bool = False,
):
    """(..., D) hidden, (V, D) weight, (...) labels -> (...) log-probs; with_entropy adds (...) entropies in nats.

    The logits are softcap tanh((hidden @ weight.T + bias) / softcap) / temperature, bias (V,) and softcap optional.
    mask (...) is bool or 0/1: where it is False the row is dropped before anything is computed, the label may be
    anything, and both results and the gradient are 0. hidden, weight and bias are float32, bfloat16, float16 or float64
    and receive gradients; the op is differentiable once. Results are float32 (float64 for float64 hidden). Autocast in
    bfloat16 rounds the factors, as those of an nn.Linear; the gradient of a float32 weight is not rounded.
    On the CPU, in float32 and bfloat16, the result of a row is bit-identical whatever the other rows and the number of
    threads; in other dtypes, and if PyTorch computes the products (is_fused in _linear.py), the last bits may differ.
    On a GPU, if hidden and weight are bfloat16 the logits are too, as with any lm_head (8 bits: 0.06 at a logit of 20),
    and the op synchronises with the device only if there is a mask.
    Raises ValueError or TypeError if a shape or dtype does not fit, IndexError for a label outside the vocabulary (on a
    GPU the kernel stops at it).
    """
    check(NAME, hidden, weight, labels, bias, mask, softcap)
    check_temperature(NAME, temperature)
    hidden, weight, bias, rounds = factors_of(hidden, weight, bias)
    if _forward.backend(hidden) == "reference":
        return reference.linear_token_logprobs(
            hidden, rounded_in_float32(weight, rounds), labels, bias=bias, temperature=temperature, softcap=softcap,
            mask=mask, with_entropy=with_entropy,
        )  # fmt: skip
    hidden = as_rows(hidden)
    # An argument of the op, because it determines the shapes of the outputs, and the key of Inductor's cache on disk
    # consists of the arguments.
    fused = is_fused(hidden, weight, bias, rounds)
    logprobs, entropy, *_ = _forward(
        hidden, weight, bias, labels.reshape(-1).long(),
        None if mask is None else byte_mask(mask).reshape(-1), float(temperature), float_or(softcap, None),
        rounds, fused, with_entropy, *map(wants_gradient, (hidden, weight, bias)),
    )  # fmt: skip
    logprobs = logprobs.view(labels.shape)
    return (logprobs, entropy.view(labels.shape)) if with_entropy else logprobs

"""The log-probability of each label, and the entropy of each distribution, from one read of the logits.

    z = logits / temperature;  logprobs = z[label] - logsumexp(z);  entropy = logsumexp(z) - sum_v softmax(z)_v z_v

Specification: reference.token_logprobs_and_entropy. Kernels: csrc/cpu, csrc/cuda, kernels (Triton).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import reference
from ._autograd import check_unchanged, plain_in_backward
from ._dispatch import Op, native
from ._inputs import (
    INTEGERS,
    check_temperature,
    check_tensors,
    check_vocabulary,
    device_error,
    dtype_error,
    label_error,
)
from ._layout import DTYPE_CODES, accumulation_dtype, as_bool, byte_mask, overlaps_itself, strided_rows
from ._native import _C, empties


def _outputs(logits: Tensor, labels: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    return empties(logits, None, labels, labels if with_entropy else None, (labels, 2))


def _forward_arguments(logits, labels, mask, temperature, with_entropy, inplace_backward):
    """The arguments of a forward kernel of csrc/ops.h, except the last one, and its outputs."""
    logits, inner, outer_stride, inner_stride = strided_rows(logits)
    labels, mask = labels.contiguous(), byte_mask(mask)
    outputs = logprobs, entropy, saved = _outputs(logits, labels, with_entropy)
    arguments = (
        logits, DTYPE_CODES[logits.dtype], labels.numel(), logits.shape[-1], inner, outer_stride, inner_stride,
        labels, mask, temperature, logprobs, entropy, saved,
    )  # fmt: skip
    return arguments, outputs


def _backward_arguments(logits, labels, mask, temperature, saved, entropy, grad_logprobs, grad_entropy, out=None):
    """The arguments of a backward kernel, except the last one, and the gradient that it writes.

    out: the logits, to write the gradient over them; None: a new tensor.
    """
    rows, inner, outer_stride, inner_stride = strided_rows(logits)
    labels, mask = labels.contiguous(), byte_mask(mask)
    by_row = entropy, grad_logprobs, grad_entropy
    if any(x is not None and x.dtype != accumulation_dtype(logits) for x in (saved, *by_row)):
        raise TypeError("token_logprobs_backward: needs gradients of the outputs' dtype")
    check_unchanged(
        "token_logprobs",
        logits.shape[:-1] == labels.shape
        and saved.shape == (*labels.shape, 2)
        and labels.dtype == torch.int64
        and all(x is None or x.shape == labels.shape for x in (mask, *by_row)),
    )
    # Saved tensors too, because a hook may return them in another layout.
    saved = saved.contiguous()
    entropy, grad_logprobs, grad_entropy = (None if x is None else x.contiguous() for x in by_row)
    if out is None:
        (out,) = empties(logits, logits.dtype, logits)
        grad_outer_stride, grad_inner_stride = inner * logits.shape[-1], logits.shape[-1]
    else:  # over the logits, or over the copy that strided_rows had to make
        out, grad_outer_stride, grad_inner_stride = rows, outer_stride, inner_stride
    arguments = (
        rows, DTYPE_CODES[logits.dtype], labels.numel(), logits.shape[-1], inner, outer_stride, inner_stride,
        labels, mask, temperature, saved, entropy, grad_logprobs, grad_entropy, out, grad_outer_stride,
        grad_inner_stride,
    )  # fmt: skip
    return arguments, out


def _forward_cpu(logits, labels, mask, temperature, with_entropy, inplace_backward):
    made = _C.token_logprobs(logits, labels, mask, temperature, with_entropy)
    if type(made) is tuple:
        return made
    refused = made
    if made is None:  # a layout that csrc/rows.h does not take
        arguments, outputs = _forward_arguments(logits, labels, mask, temperature, with_entropy, inplace_backward)
        refused = _C.token_logprobs_forward(*arguments, torch.get_num_threads())
    _check_label(refused, logits, labels, "token_logprobs_and_entropy" if with_entropy else "token_logprobs")
    return outputs


def _check_label(row: int, logits: Tensor, labels: Tensor, op: str) -> None:
    """row: the first row whose label is out of range, as the kernel reports it; -1: none."""
    if row >= 0:
        raise label_error(op, labels.reshape(-1)[row], row, logits.shape[-1])


def _backward_cpu(logits, labels, *args):
    arguments, out = _backward_arguments(logits, labels, *args)
    _check_label(_C.token_logprobs_backward(*arguments, torch.get_num_threads()), logits, labels, "token_logprobs")
    return out


_backward = Op(
    "token_logprobs_backward(Tensor logits, Tensor labels, Tensor? mask, float temperature, Tensor saved, "
    "Tensor? entropy, Tensor? grad_logprobs, Tensor? grad_entropy) -> Tensor",
    kernels=native("token_logprobs_backward", _backward_arguments, scratch=False, triton="token_logprobs")
    | {("cpu", "native"): _backward_cpu},
    fake=lambda logits, *rest: torch.empty(logits.shape, dtype=logits.dtype, device=logits.device),
)


def _save(ctx, inputs, output):
    logits, labels, mask, ctx.temperature, ctx.with_entropy, ctx.inplace = inputs
    _, entropy, saved = output
    # A copy of the entropy, because users may change the result in place.
    ctx.save_for_backward(logits, labels, mask, entropy.clone() if ctx.with_entropy else None, saved)


def _grad(ctx, grad_logprobs, grad_entropy, read):
    """read: the saved tensors, if csrc/rows.h has read them already and left the backward to this function. Autograd
    calls with one gradient per output, so read is None: the third output receives no gradient."""
    logits, labels, mask, entropy, saved = ctx.saved_tensors if read is None else read
    entropy, grad_entropy = (entropy, grad_entropy) if ctx.with_entropy else (None, None)
    if ctx.inplace or torch.is_grad_enabled():
        logits = logits.detach()
    args = (logits, labels, mask, ctx.temperature, saved, entropy, grad_logprobs, grad_entropy)
    if plain_in_backward(*args):
        out = None
        if ctx.inplace and not overlaps_itself(logits):
            torch.autograd.graph.increment_version(logits)  # autograd then refuses any later use of the logits
            out = logits
        grad = _backward.run(*args, out)
    else:
        grad = _backward(*args)
    return grad, None, None, None, None, None


_forward = Op(
    "token_logprobs_forward(Tensor logits, Tensor labels, Tensor? mask, float temperature, bool with_entropy, "
    "bool inplace_backward) -> (Tensor logprobs, Tensor entropy, Tensor saved)",
    kernels=native("token_logprobs_forward", _forward_arguments, scratch=False, triton="token_logprobs")
    | {("cpu", "native"): _forward_cpu},
    fake=lambda logits, labels, mask, temperature, with_entropy, inplace: _outputs(logits, labels, with_entropy),
    backward=_grad,
    setup_context=_save,
    in_c=None if _C is None else (_C.token_logprobs_and_save, _C.token_logprobs_gradient),
    differentiable=2,
)


_labelled = (lambda logits, labels, mask: False) if _C is None else _C.labelled


def check_logits(op: str, logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float = 1.0) -> None:
    """Checks the inputs of an op that reads logits."""
    check_temperature(op, temperature)
    if not is_compiling() and _labelled(logits, labels, mask):
        return  # the usual case, in a fifth of the time that the checks below take
    check_tensors(op, optional=("mask",), logits=logits, labels=labels, mask=mask)
    if labels.shape != logits.shape[:-1] or logits.ndim == 0:
        raise ValueError(
            f"{op}: labels {tuple(labels.shape)} must be logits {tuple(logits.shape)} without the vocabulary axis"
        )
    if mask is not None and mask.shape != labels.shape:
        raise ValueError(f"{op}: mask {tuple(mask.shape)} must have the shape of labels {tuple(labels.shape)}")
    if logits.dtype not in DTYPE_CODES:
        raise dtype_error(op, "logits", logits)
    if labels.dtype not in INTEGERS:
        raise dtype_error(op, "labels", labels, "integer token ids")
    for name, x in (("labels", labels), ("mask", mask)):
        if x is not None and x.device != logits.device:
            raise device_error(op, name, x, "logits", logits)
    if logits.shape[-1] == 0 and labels.numel():
        raise ValueError(f"{op}: logits {tuple(logits.shape)} have an empty vocabulary")
    check_vocabulary(op, logits.shape[-1], logits)


# The hooks on saved tensors that are active; torch 2.6 does not tell.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None)


def _in_place(wanted: bool) -> bool:
    """Autograd does not look at the version of what a hook on saved tensors returns. The examples of a vmap are slices
    of one tensor, whose version the first backward would change for all."""
    return wanted and (
        is_compiling() or (_saved_tensors_hooks(True) is None and not torch._C._are_functorch_transforms_active())
    )


def token_logprobs_and_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy (nats) of each distribution, from one read of the logits.

    logits (..., V) are float32, bfloat16, float16 or float64, with any strides; labels (...) are integer ids. The
    logits are divided by temperature. mask (...) is bool or 0/1: where it is False the row is not read, the label may
    be anything, and both results and the gradient are 0.
    Returns two (...) tensors, float32 (float64 for float64 logits). Both are differentiable, once.
    inplace_backward=True lets the backward write the gradient over the logits, which saves memory of their size.
    Autograd then raises if anything else uses them in the backward, unless hooks on saved tensors (checkpoint,
    save_on_cpu) kept them for it, which it does not notice. In a call under such hooks the argument is ignored (not by
    torch 2.6, which does not tell whether there are any), also under vmap, and by torch.compile, which plans memory
    itself.
    Raises IndexError for a label outside [0, V) where the mask is True. On a GPU the kernel stops at such a label, like
    a device-side assert.
    """
    check_logits("token_logprobs_and_entropy", logits, labels, mask, temperature)
    if _forward.backend(logits) == "reference":
        return reference.token_logprobs_and_entropy(logits, labels, temperature=temperature, mask=mask)
    in_place = _in_place(inplace_backward)
    return _forward(logits, labels.long(), as_bool(mask), float(temperature), True, in_place)[:2]


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """(..., V) logits and (...) labels -> (...) log-probabilities.

    Equals (logits / temperature).log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1), in float32. The options are
    those of token_logprobs_and_entropy, which also returns the entropy.
    """
    check_logits("token_logprobs", logits, labels, mask, temperature)
    if _forward.backend(logits) == "reference":
        return reference.token_logprobs(logits, labels, temperature=temperature, mask=mask)
    in_place = _in_place(inplace_backward)
    return _forward(logits, labels.long(), as_bool(mask), float(temperature), False, in_place)[0]

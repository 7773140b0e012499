"""The exact KL(policy || reference) of the distribution at each token, from one read of both logits.

    KL = sum_v p_v (log p_v - log q_v),  p = softmax(logits), q = softmax(ref_logits)
    dKL/dlogits_v = p_v (log p_v - log q_v - KL),  dKL/dref_logits_v = q_v - p_v

kl_penalty estimates the same KL from the sampled tokens only. Specification: reference.kl_divergence. Kernels:
csrc/cpu, csrc/cuda, kernels (Triton).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._autograd import check_unchanged
from ._dispatch import Op, native
from ._inputs import check_tensors, check_vocabulary, device_error, dtype_error
from ._layout import DTYPE_CODES, accumulation_dtype, as_bool, byte_mask
from ._native import empties

NAME = "kl_divergence"


def _outputs(logits: Tensor, *rest) -> tuple[Tensor, Tensor]:
    rows = tuple(logits.shape[:-1])
    return empties(logits, None, rows, (rows, 4))


def _forward_arguments(logits, ref_logits, mask):
    logits, ref_logits, mask = logits.contiguous(), ref_logits.contiguous(), byte_mask(mask)
    kl, saved = _outputs(logits)
    arguments = logits, ref_logits, DTYPE_CODES[logits.dtype], kl.numel(), logits.shape[-1], mask, kl, saved
    return arguments, (kl, saved)


def _gradients(logits, ref_logits, with_grads):
    return tuple(
        empties(x, x.dtype, x if wanted else 0)[0] for x, wanted in zip((logits, ref_logits), with_grads, strict=True)
    )


def _backward_arguments(logits, ref_logits, mask, kl, saved, grad_kl, *with_grads):
    # Saved tensors too, because a hook may return them in another layout.
    logits, ref_logits, kl, saved, grad_kl = (x.contiguous() for x in (logits, ref_logits, kl, saved, grad_kl))
    mask = byte_mask(mask)
    check_unchanged(
        NAME,
        logits.shape == ref_logits.shape
        and logits.dtype == ref_logits.dtype
        and all(x is None or x.shape == logits.shape[:-1] for x in (mask, kl, grad_kl))
        and saved.shape == (*kl.shape, 4)
        and kl.dtype == saved.dtype == accumulation_dtype(logits),
    )
    grads = _gradients(logits, ref_logits, with_grads)
    arguments = (
        logits, ref_logits, DTYPE_CODES[logits.dtype], kl.numel(), logits.shape[-1], mask, kl, saved, grad_kl,
        *(g if wanted else None for g, wanted in zip(grads, with_grads, strict=True)),
    )  # fmt: skip
    return arguments, grads


_backward = Op(
    f"{NAME}_backward(Tensor logits, Tensor ref_logits, Tensor? mask, Tensor kl, Tensor saved, Tensor grad_kl, "
    "bool with_grad, bool with_ref_grad) -> (Tensor, Tensor)",
    kernels=native(f"{NAME}_backward", _backward_arguments, scratch=False, triton=NAME),
    fake=lambda *args: _gradients(*args[:2], args[6:]),
)


def _save(ctx, inputs, output):
    kl, saved = output
    ctx.save_for_backward(*inputs, kl.clone(), saved)  # a copy, because users may change the result in place


def _grad(ctx, grad_kl, _):
    if grad_kl is None:
        return (None,) * 3
    logits, ref_logits, mask, kl, saved = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    grads = _backward(logits.detach(), ref_logits.detach(), mask, kl.detach(), saved, grad_kl, *wanted)
    return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None


_forward = Op(
    f"{NAME}(Tensor logits, Tensor ref_logits, Tensor? mask) -> (Tensor kl, Tensor saved)",
    kernels=native(f"{NAME}_forward", _forward_arguments, scratch=False, triton=NAME),
    fake=_outputs,
    backward=_grad,
    setup_context=_save,
)


def kl_divergence(logits: Tensor, ref_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """(..., V) logits and ref_logits -> (...) exact KL(softmax(logits) || softmax(ref_logits)) in nats.

    Logits are float32, bfloat16, float16 or float64; if the dtypes differ, both are converted to the wider one. The
    result is float32 (float64 for float64). Both inputs receive gradients, and the op is differentiable once.
    A token that p forbids (-inf) adds nothing; one that only q forbids makes the divergence infinite. mask (...) is
    bool or 0/1: where it is False the rows are not read, and the result and its gradient are 0.
    Raises ValueError if a shape or device does not fit, TypeError if a dtype does not.
    """
    check_tensors(NAME, optional=("mask",), logits=logits, ref_logits=ref_logits, mask=mask)
    if logits.shape != ref_logits.shape or logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{NAME}: logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must be (..., V)"
        )
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(f"{NAME}: mask {tuple(mask.shape)} must be logits {tuple(logits.shape)} without the last axis")
    for name, x in (("ref_logits", ref_logits), ("mask", mask)):
        if x is not None and x.device != logits.device:
            raise device_error(NAME, name, x, "logits", logits)
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        if x.dtype not in DTYPE_CODES:
            raise dtype_error(NAME, name, x)
    check_vocabulary(NAME, logits.shape[-1], logits)
    if _forward.backend(logits) == "reference":
        return reference.kl_divergence(logits, ref_logits, mask)
    wider = torch.promote_types(logits.dtype, ref_logits.dtype)
    logits, ref_logits = logits.to(wider), ref_logits.to(wider)
    return _forward(logits, ref_logits, as_bool(mask))[0]

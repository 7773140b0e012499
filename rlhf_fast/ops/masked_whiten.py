"""Shifts and scales values to mean 0 and variance 1 over a mask, as PPO does with advantages.

    (values - mean) / sqrt(var + eps), var with Bessel's correction; 0 outside the mask

Specification: reference.masked_whiten. Kernels: csrc/cpu/masked.cpp, csrc/cuda/masked.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._autograd import check_unchanged
from ._dispatch import Op, native
from ._inputs import NO_NUMBER, as_rows, refuse_no_number
from ._layout import DTYPE_CODES
from ._native import empties
from .masked_mean import _op as _mean
from .masked_mean import as_float, fitting_mask


def _outputs(values: Tensor) -> tuple[Tensor, Tensor]:
    return empties(values, None, values, 3)


def _arguments(values, mask, shift_mean, eps):
    whitened, saved = _outputs(values)
    arguments = values, mask, *values.shape, shift_mean, eps, DTYPE_CODES[saved.dtype], whitened, saved
    return arguments, (whitened, saved)


def _save(ctx, inputs, output):
    values, mask, ctx.shift_mean, ctx.eps = inputs
    ctx.save_for_backward(values, mask, output[1])


def _grad(ctx, grad, _):
    if grad is None:
        return (None,) * 4
    values, mask, saved = ctx.saved_tensors  # read once, because a checkpoint allows only one read
    shapes_hold = values.shape == grad.shape and (mask is None or mask.shape == grad.shape) and saved.shape == (3,)
    check_unchanged("masked_whiten", shapes_hold and (mask is None or mask.dtype == torch.bool))
    count = saved[2]
    # In float64 from here on: for few values the three terms below nearly cancel, and what remains is smaller than the
    # rounding error of a float32 mean.
    x, g = values.double(), grad.double()
    if mask is not None:
        x, g = torch.where(mask, x, 0.0), torch.where(mask, g, 0.0)

    def mean(y):  # not y.sum(), whose order of addition depends on the number of threads
        return _mean(y.reshape(1, -1), None if mask is None else mask.reshape(1, -1))[0]

    x = x - mean(x)
    share = count.double() / (count - 1).clamp(min=1)  # of Bessel's correction
    scale = torch.rsqrt(mean(x * x) * share + ctx.eps)
    # d/dx of (x - mean) * scale; mean and scale depend on x too.
    grad_mean, grad_scale = mean(g), mean(g * x) * scale
    grad_values = scale * (g - grad_mean - x * (scale * grad_scale * share))
    if not ctx.shift_mean:
        grad_values = grad_values + grad_mean
    grad_values = grad_values.to(grad.dtype)
    return grad_values if mask is None else torch.where(mask, grad_values, 0.0), None, None, None


_op = Op(
    "masked_whiten(Tensor values, Tensor? mask, bool shift_mean, float eps) -> (Tensor whitened, Tensor saved)",
    kernels=native("masked_whiten", _arguments, scratch=True),
    fake=lambda values, *_: _outputs(values),
    backward=_grad,
    setup_context=_save,
)


def masked_whiten(values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Whitens values (any shape) over all positions where mask is True -> the same shape, 0 outside the mask.

    mask is bool or 0/1 and must be broadcastable to values. shift_mean=False adds the mean back, so that only the scale
    changes (as TRL whitens rewards). A single value has no variance and becomes 0 (or its mean); an empty mask gives
    zeros. The result is float32 (float64 for float64), and values receives the gradient.
    Raises ValueError if the mask does not fit or eps is not positive.
    """
    try:
        outside = not eps > 0
    except NO_NUMBER:
        refuse_no_number("masked_whiten", eps=eps)
        raise
    if outside:
        raise ValueError(f"masked_whiten: eps {eps} must be > 0")
    mask = fitting_mask("masked_whiten", values, mask)
    if values.dtype not in DTYPE_CODES:
        values = as_float("masked_whiten", values)
    if _op.backend(values) == "reference":
        return reference.masked_whiten(values, mask, shift_mean=shift_mean, eps=eps)
    whitened, _ = _op(as_rows(values), None if mask is None else as_rows(mask), shift_mean, float(eps))
    return whitened if values.ndim == 2 else whitened.view(values.shape)

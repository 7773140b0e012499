"""The mean over a mask, 0 where it is empty: sum(values * mask) / max(sum(mask), 1), with NaN outside the mask ignored.

Specification: reference.masked_mean. Kernels: csrc/cpu/masked.cpp, csrc/cuda/masked.cu.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._dispatch import DTYPE_CODES, Op, as_bool, native
from ._inputs import accumulation_dtype


def _outputs(values: Tensor) -> tuple[Tensor, Tensor]:
    rows, dtype, device = values.shape[0], accumulation_dtype(values), values.device
    return torch.empty(rows, dtype=dtype, device=device), torch.empty(rows, dtype=dtype, device=device)


def _arguments(values, mask):
    means, counts = _outputs(values)
    return (values, mask, *values.shape, DTYPE_CODES[means.dtype], means, counts), (means, counts)


def _save(ctx, inputs, output):
    values, mask = inputs
    ctx.shape = values.shape
    ctx.save_for_backward(mask, output[1])


def _grad(ctx, grad_means, _):
    if grad_means is None:
        return None, None
    mask, counts = ctx.saved_tensors
    each = (grad_means / counts)[:, None].expand(ctx.shape)
    return each if mask is None else each.masked_fill(~mask, 0.0), None  # twice as fast as torch.where


_op = Op(
    "masked_mean(Tensor values, Tensor? mask) -> (Tensor means, Tensor counts)",
    kernels=native("masked_mean", _arguments, scratch=True),
    fake=lambda values, _: _outputs(values),
    backward=_grad,
    setup_context=_save,
)


def masked_mean(values: Tensor, mask: Tensor | None = None, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of values (any shape) where mask is True, over the axes dim (all of them by default), without these axes.

    mask is bool or 0/1, of the shape of values or broadcastable to it; None counts everything. 0 where the mask is
    empty. Floating values of any precision or numbers, float32 out (float64 for float64); values receives the gradient.
    Raises ValueError where the mask does not fit, IndexError for an axis that values does not have.
    """
    if mask is not None:
        mask = fitting_mask("masked_mean", values, mask)
    if not values.is_floating_point():
        values = values.float()
    if _op.backend(values) == "reference":
        return reference.masked_mean(values, mask, dim)
    if dim is None:
        shape, to_rows = (), lambda x: x.reshape(1, -1)
    else:
        reduced = tuple(range(values.ndim)[axis] for axis in ((dim,) if isinstance(dim, int) else dim))
        kept = tuple(axis for axis in range(values.ndim) if axis not in reduced)
        shape = [values.shape[axis] for axis in kept]
        rows, columns = math.prod(shape), math.prod([values.shape[axis] for axis in reduced])
        to_rows = lambda x: x.permute((*kept, *reduced)).reshape(rows, columns)  # noqa: E731
    means, _ = _op(to_rows(values), None if mask is None else to_rows(mask))
    return means.view(shape)


def fitting_mask(op: str, values: Tensor, mask: Tensor) -> Tensor:
    """As bool of the shape of values."""
    if mask.device != values.device:
        raise ValueError(f"{op}: mask is on {mask.device}, values on {values.device}; move them to one device")
    try:
        mask = as_bool(mask)
        return mask if mask.shape == values.shape else mask.expand(values.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{op}: mask {tuple(mask.shape)} cannot be broadcast to values {tuple(values.shape)}"
        ) from error

"""The mean over a mask, 0 if it is empty: sum(values * mask) / max(sum(mask), 1). NaN outside the mask is ignored.

Specification: reference.masked_mean. Kernels: csrc/cpu/masked.cpp, csrc/cuda/masked.cu.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from . import reference
from ._autograd import check_unchanged
from ._dispatch import Op, native
from ._inputs import check_tensors, device_error, dtype_error
from ._layout import DTYPE_CODES, as_bool
from ._native import _C, empties


def _outputs(values: Tensor, mask: Tensor | None, whole: bool = False) -> tuple[Tensor, Tensor]:
    shape = () if whole else values.shape[0]
    return empties(values, None, shape, shape)


def _arguments(values, mask, whole=False):
    means, counts = _outputs(values, mask, whole)
    if whole:
        values, mask = one_row(values), None if mask is None else one_row(mask)
    rows = 1 if whole else values.shape[0]
    arguments = values, mask, rows, values.numel() // max(rows, 1), DTYPE_CODES[means.dtype], means, counts
    return arguments, (means, counts)


def one_row(x: Tensor) -> Tensor:
    """x, or a copy of it, which a kernel can read as one row: the kernel knows only the last stride, not the shape."""
    return x if x.is_contiguous() and x.stride(-1) == 1 else x.reshape(1, -1)


def _backward_cpu(grad_means, counts, mask, whole):
    check_unchanged("masked_mean", whole or mask.shape[:1] == counts.shape)
    counts = counts.contiguous()  # a hook may return it in another layout
    grad_means, rows = grad_means.contiguous(), 1 if whole else mask.shape[0]
    (grad,) = empties(counts, counts.dtype, mask)
    _C.masked_mean_backward(
        one_row(mask) if whole else mask, rows, mask.numel() // max(rows, 1), DTYPE_CODES[counts.dtype], grad_means,
        counts, grad, torch.get_num_threads(),
    )  # fmt: skip
    return grad


def _backward_cuda(grad_means, counts, mask, whole):
    return _share(grad_means, counts, mask.shape, whole).masked_fill(~mask, 0.0)


def _share(grad_means: Tensor, counts: Tensor, shape: torch.Size, whole: bool) -> Tensor:
    """The gradient of each value that counts, expanded to the shape of the values."""
    each = grad_means / counts
    return (each if whole else each[:, None]).expand(shape)


_backward = Op(
    "masked_mean_backward(Tensor grad_means, Tensor counts, Tensor mask, bool whole) -> Tensor",
    kernels={("cpu", "native"): _backward_cpu, ("cuda", "native"): _backward_cuda},
    fake=lambda grad_means, counts, mask, whole: counts.new_empty(mask.shape),
)


def _save(ctx, inputs, output):
    values, mask, ctx.whole = inputs
    ctx.shape = values.shape
    ctx.save_for_backward(mask, output[1])


def _grad(ctx, grad_means, _):
    if grad_means is None:
        return None, None, None
    mask, counts = ctx.saved_tensors
    if mask is None:
        return _share(grad_means, counts, ctx.shape, ctx.whole), None, None
    return _backward(grad_means, counts, mask, ctx.whole), None, None


_op = Op(  # torch.library does not pass on arguments that have their default, so _outputs and _arguments repeat it
    "masked_mean(Tensor values, Tensor? mask, bool whole=False) -> (Tensor means, Tensor counts)",
    kernels=native("masked_mean", _arguments, scratch=True),
    fake=_outputs,
    backward=_grad,
    setup_context=_save,
    in_backward=True,  # masked_whiten's
)


def masked_mean(values: Tensor, mask: Tensor | None = None, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of values (any shape) where mask is True, over the axes dim (None or (): all axes), which are removed.

    mask is bool or 0/1 and must be broadcastable to values; None counts everything. The mean over an empty mask is 0.
    values may have any real dtype (integers and bool are converted). The result is float32 (float64 for float64), and
    values receives the gradient.
    Raises ValueError if the mask does not fit, IndexError for an axis that values does not have, RuntimeError for one
    that dim names twice.
    """
    mask = fitting_mask("masked_mean", values, mask)
    if values.dtype not in DTYPE_CODES:
        values = as_float("masked_mean", values)
    if _op.backend(values) == "reference":
        return reference.masked_mean(values, mask, dim)
    if values.ndim == 0:  # to torch.mean it has an axis too, 0 or -1
        values, mask = values[None], None if mask is None else mask[None]
    axes = () if dim is None else (dim,) if isinstance(dim, int) else _axes(dim)
    if not axes:
        return _op(values, mask, True)[0]
    if not all(-values.ndim <= axis < values.ndim for axis in axes):
        raise IndexError(f"masked_mean: dim {dim} is not among the {values.ndim} axes of values {tuple(values.shape)}")
    # Axes are only compared with constants, because torch.compile makes a symbol of a dim that changes between calls.
    reduced = tuple(i for i in range(values.ndim) if any(axis in (i, i - values.ndim) for axis in axes))
    if len(reduced) < len(axes):
        raise RuntimeError(f"masked_mean: dim {dim} names an axis twice")  # the error of torch.mean
    kept = tuple(axis for axis in range(values.ndim) if axis not in reduced)
    if kept == (0,) and values.ndim == 2:  # the usual case: the values already are rows
        return _op(values, mask, False)[0]
    shape = [values.shape[axis] for axis in kept]
    rows, columns = math.prod(shape), math.prod([values.shape[axis] for axis in reduced])
    to_rows = lambda x: x.permute((*kept, *reduced)).reshape(rows, columns)  # noqa: E731
    return _op(to_rows(values), None if mask is None else to_rows(mask), False)[0].view(shape)


def _axes(dim) -> tuple[int, ...]:
    try:
        return tuple(operator.index(axis) for axis in (dim if isinstance(dim, (tuple, list)) else (dim,)))
    except TypeError:
        raise TypeError(f"masked_mean: dim {dim!r} must be an axis, a tuple of axes or None") from None


def as_float(op: str, values: Tensor) -> Tensor:
    if values.is_complex():
        raise dtype_error(op, "values", values, "real numbers")
    return values.float()


def fitting_mask(op: str, values: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as bool, expanded to the shape of values."""
    if not (isinstance(values, Tensor) and (mask is None or isinstance(mask, Tensor))):
        check_tensors(op, optional=("mask",), values=values, mask=mask)
    if mask is None:
        return None
    if mask.device != values.device:
        raise device_error(op, "mask", mask, "values", values)
    try:
        mask = as_bool(mask)
        return mask if mask.shape == values.shape else mask.expand(values.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{op}: mask {tuple(mask.shape)} cannot be broadcast to values {tuple(values.shape)}"
        ) from error

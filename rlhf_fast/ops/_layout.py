"""How a kernel sees a tensor: its dtype as a number, a mask as bytes, rows with strides (csrc/ops.h)."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def as_bool(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask.bool()


def byte_mask(mask: Tensor | None) -> Tensor | None:
    """The mask, bool or 0/1, as a contiguous bool tensor."""
    return None if mask is None else as_bool(mask).contiguous()


def overlaps_itself(x: Tensor) -> bool:
    """Whether two indices may share memory (expanded tensors, windows), so that x must not be written in place."""
    span = 1  # elements from the first to the last index of the axes so far
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += stride * (size - 1)
    return False


def strided_rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(..., V) -> (x, inner, outer_stride, inner_stride), the layout of csrc/ops.h. Copies x if it has another one.

    Row i of the flattened leading axes starts at (i // inner) * outer_stride + (i % inner) * inner_stride.
    """
    if x.is_contiguous():
        return x, 1, x.shape[-1], 0
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    axes = []  # (size, stride) of the leading axes, with neighbours merged if their strides allow it
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        return x.contiguous(), 1, x.shape[-1], 0
    if len(axes) == 2:
        return x, axes[1][0], axes[0][1], axes[1][1]
    return x, 1, axes[0][1] if axes else 0, 0

"""What the ops over (B, T) tokens and (B,) pairs share: checks of their inputs, and where their results go."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import reference
from ._dispatch import _C, DTYPE_CODES, empties

_alike = (lambda ndim, mask, *tensors: False) if _C is None else _C.alike


def check(op: str, ndim: int | None, mask: Tensor | None, tensors: dict[str, Tensor | None]) -> None:
    """All tensors have the first one's shape and device, and a floating dtype; ndim is the number of axes it needs."""
    if not is_compiling() and _alike(-1 if ndim is None else ndim, mask, *tensors.values()):
        return  # the usual case, for a tenth of the time of what follows
    first_name, first = next(iter(tensors.items()))
    shape, device = first.shape, first.device
    if ndim is not None and len(shape) != ndim:
        need = {1: "(B,)", 2: "(B, T)"}[ndim]
        raise ValueError(f"{op}: {first_name} is {tuple(shape)}; needs {need}")
    for name, x in tensors.items():
        if x is not None and (x.shape != shape or x.dtype not in DTYPE_CODES or x.device != device):
            _refuse(op, name, x, first_name, first)
    if mask is not None and (mask.shape != shape or mask.device != device):
        _refuse(op, "mask", mask, first_name, first)


def _refuse(op: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    if name != "mask" and x.dtype not in DTYPE_CODES:
        raise TypeError(f"{op}: {name} is {x.dtype}; needs float32, bfloat16, float16 or float64")
    if x.shape != first.shape:
        raise ValueError(f"{op}: {name} {tuple(x.shape)} must have the shape of {first_name} {tuple(first.shape)}")
    raise ValueError(f"{op}: {name} is on {x.device}, {first_name} on {first.device}; move them to one device")


_AGGREGATION_CODES = {mode: code for code, mode in enumerate(reference.AGGREGATIONS)}
_ESTIMATOR_CODES = {name: ("k1", "k2", "k3", "abs").index(formula) for name, formula in reference.KL_ESTIMATORS.items()}


def aggregation_code(op: str, mode: str) -> int:
    code = _AGGREGATION_CODES.get(mode)
    if code is None:
        raise ValueError(f"{op}: loss_agg_mode {mode!r} must be one of {', '.join(reference.AGGREGATIONS)}")
    return code


def estimator_code(op: str, estimator: str, name: str = "estimator") -> int:
    code = _ESTIMATOR_CODES.get(estimator)
    if code is None:
        raise ValueError(f"{op}: {name} {estimator!r} must be one of {', '.join(reference.KL_ESTIMATORS)}")
    return code


def normalizer_tensor(op: str, normalizer: Tensor | float | None, like: Tensor) -> Tensor | None:
    """As a float64 scalar tensor, which a kernel reads where it lies: no synchronisation."""
    if normalizer is None:
        return None
    if not isinstance(normalizer, Tensor):
        return torch.full((), normalizer, dtype=torch.float64, device=like.device)
    if normalizer.numel() != 1 or normalizer.device != like.device:
        raise ValueError(
            f"{op}: normalizer is {tuple(normalizer.shape)} on {normalizer.device}; needs one number on {like.device}"
        )
    return normalizer.detach().double().reshape(())


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def loss_outputs(like: Tensor, names: tuple[str, ...], *with_grads: bool) -> tuple[Tensor | None, ...]:
    """Where a loss writes its scalar, its statistics, and the gradients that it knows already; None where unwanted."""
    grads = [like if wanted else None for wanted in with_grads]
    return empties(like, accumulation_dtype(like), (), len(names), *grads)


def wants_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def as_rows(x: Tensor) -> Tensor:
    """(...) -> (rows, columns), a view where memory allows."""
    if x.ndim == 2:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)

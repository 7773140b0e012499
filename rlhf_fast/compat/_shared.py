"""What trl, verl and openrlhf share: inputs in the form our ops take, a variance, and the adaptive KL coefficient.

Our ops do not broadcast and take no integer tensors; the peers' arithmetic does both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops.reference import as_accumulator


def _fitted(x: Tensor | None, like: Tensor) -> Tensor | None:
    """x expanded to like's shape, integers as float32. If x does not broadcast to it, the op will refuse x by name."""
    if x is None:
        return None
    x = x if x.is_floating_point() else x.float()
    fits = x.ndim <= like.ndim and all(n in (1, m) for n, m in zip(x.shape[::-1], like.shape[::-1], strict=False))
    return x.expand(like.shape) if fits else x


def _masked_var(values: Tensor, mask: Tensor, unbiased: bool) -> Tensor:
    """The variance of values over the mask; 0 if fewer than two values count."""
    mask = mask.bool().expand_as(values)
    centered = torch.where(mask, as_accumulator(values) - ops.masked_mean(values, mask), 0.0)
    return centered.square().sum() / (mask.sum() - int(unbiased)).clamp(min=1)


def _adapted(kl_coef: float, kl: float, target: float, n_steps: int, horizon: int) -> float:
    """kl_coef moved towards the target KL (arXiv 1909.08593, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n_steps / horizon)

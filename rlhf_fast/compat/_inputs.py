"""Inputs as our ops take them, which broadcast nothing and take no integers; the peers' arithmetic does both."""

from __future__ import annotations

from torch import Tensor


def fitted(x: Tensor | None, like: Tensor) -> Tensor | None:
    """x in like's shape, integers as float32. What does not broadcast to it is left for the op to refuse."""
    if x is None:
        return None
    x = x if x.is_floating_point() else x.float()
    fits = x.ndim <= like.ndim and all(n in (1, m) for n, m in zip(x.shape[::-1], like.shape[::-1], strict=False))
    return x.expand(like.shape) if fits else x

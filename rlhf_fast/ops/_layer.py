"""What a llama layer computes between its matrix products, each in one pass over memory (csrc/cpu/layer.cpp).

    rms_norm(x, w) = w x / sqrt(mean(x^2) + eps)
    rotary(x)      = (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of a head
    swiglu(g, u)   = silu(g) u

float32 on the CPU, contiguous; ask runs_on() first. Not public ops: they make our own forwards fast, and equal what
transformers' modules compute up to rounding. Each is differentiable once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._dispatch import _C, is_forced


def runs_on(x: Tensor) -> bool:
    built = hasattr(_C, "rms_norm")  # a source tree may have no build, or an older one
    return built and not is_forced() and x.is_cpu and x.dtype == torch.float32


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = torch.empty_like(x), x.new_empty(len(x))
        _C.rms_norm(x, weight, *x.shape, eps, y, scale, torch.get_num_threads())
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        arguments = (x, weight, scale, grad.contiguous(), *x.shape, grad_x, grad_weight)
        _C.rms_norm_backward(*arguments, torch.get_num_threads())
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(N, D), (D,) -> (N, D)."""
    return _RMSNorm.apply(x, weight, eps)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _turned(grad.contiguous(), *ctx.saved_tensors, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    y = torch.empty_like(x)
    rows, heads, dim = x.shape
    _C.rotary(x, cos, sin, rows, len(cos), heads, dim, direction, y, torch.get_num_threads())
    return y


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(N, heads, d), (T, d) tables whose halves are equal -> (N, heads, d), row i at position i % T."""
    return _Rotary.apply(x, cos, sin)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty_like(gate)
        _C.swiglu(gate, up, *gate.shape, y, torch.get_num_threads())
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _C.swiglu_backward(gate, up, grad.contiguous(), *gate.shape, grad_gate, grad_up, torch.get_num_threads())
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(N, I) both -> (N, I)."""
    return _SwiGLU.apply(gate, up)

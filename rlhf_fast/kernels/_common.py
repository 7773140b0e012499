"""What the Triton kernels share: the formulas of csrc/common, sizes of launches, and where Triton may run."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
# If x - max is multiplied by its own exponential, max(x - max, FLOOR) turns 0 * (-inf) into 0. So it does where the sum
# of 2^30 tokens at the least number of their dtype would be infinite.
FLOOR = tl.constexpr(-1e28)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the maximum of no values, finite so that differences are not NaN
BLOCK = 1024  # tokens per program in the small ops


@triton.jit
def number(x, ACCUM: tl.constexpr):
    """A run-time argument, which Triton passes as float64 if it is declared so, as a scalar of the accumulator."""
    return tl.full([], x, ACCUM)


@triton.jit
def load(pointer, index, counts, ACCUM: tl.constexpr):
    """Loads values of any dtype, and 0 where they do not count, so that no NaN outside a mask enters a formula."""
    return tl.load(pointer + index, mask=counts, other=0.0).to(ACCUM)


@triton.jit
def exp(x):
    """exp(x) by way of float64. Compiled for float32 it is off by 6e-8 |x|, a digit or more of a large ratio."""
    return tl.exp(x.to(tl.float64)).to(x.dtype)


@triton.jit
def exp_minus_1_minus(x):
    """exp(x) - 1 - x without cancellation for small x: for |x| < 1 its series up to x^20 / 20!."""
    square = x * x
    term = square * 0.5
    series = term
    for n in tl.static_range(3, 21):
        term = term * x * (1.0 / n)
        series += term
    return tl.where((x > -1.0) & (x < 1.0), series, tl.where(x == float("inf"), x, (exp(x) - 1.0) - x))


@triton.jit
def kl_token(d, ESTIMATOR: tl.constexpr):
    """The estimate for a token and its derivative by d. ESTIMATOR is KlEstimator of csrc/common/policy.h."""
    if ESTIMATOR == 0:
        return d, d * 0.0 + 1.0
    elif ESTIMATOR == 1:
        return 0.5 * d * d, d
    elif ESTIMATOR == 2:
        return exp_minus_1_minus(-d), 1.0 - exp(-d)
    else:
        return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)).to(d.dtype)


def accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def tiles(size: int, most: int = BLOCK) -> int:
    """The smallest power of two that holds size, at least a warp and at most `most`."""
    return max(32, min(triton.next_power_of_2(max(size, 1)), most))


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def refuse_cpu(op: str, x: torch.Tensor) -> None:
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{op}: Triton runs on CPU tensors only in its interpreter; set TRITON_INTERPRET=1 before importing triton"
        )

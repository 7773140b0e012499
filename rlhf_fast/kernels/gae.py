"""gae in Triton: one program per row computes the recurrence as a reverse scan of linear steps (csrc/cuda/gae.cu).

The scanned value is u_t = gamma (V_{t+1} + lam A_{t+1}): A_t = r_t - V_t + u_t, and u_{t-1} = add_t + keep_t u_t.
Column t scans the step of column t + 1, so that its result is u_t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import accumulator, contiguous, load, number, refuse_cpu, tiles


@triton.jit
def _compose(later_add, later_keep, add, keep):
    """The step of a later column followed by (add, keep); a reverse scan passes the later one first."""
    return add + keep * later_add, keep * later_keep


@triton.jit
def _kernel(
    rewards, values, mask, cols, gamma: tl.float64, decay: tl.float64, across: tl.float64, advantages, returns,
    ACCUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * cols
    gamma, decay, across = number(gamma, ACCUM), number(decay, ACCUM), number(across, ACCUM)
    column = tl.arange(0, BLOCK)
    carry = tl.zeros([], ACCUM)
    tile_count = tl.cdiv(cols, BLOCK)
    for i in range(0, tile_count):
        first = (tile_count - 1 - i) * BLOCK
        at = first + column
        counts = tl.load(mask + row + at, mask=at < cols, other=0) != 0
        reward, value = load(rewards, row + at, counts, ACCUM), load(values, row + at, counts, ACCUM)

        after = at + 1
        next_counts = tl.load(mask + row + after, mask=after < cols, other=0) != 0
        next_value = load(values, row + after, next_counts, ACCUM)
        excess = load(rewards, row + after, next_counts, ACCUM) - next_value
        add = gamma * next_value + decay * excess
        keep = tl.where(next_counts, decay, tl.where(after < cols, across, 1.0)).to(ACCUM)
        add, keep = tl.associative_scan((add, keep), 0, _compose, reverse=True)
        u = add + keep * carry

        tl.store(advantages + row + at, tl.where(counts, reward - value + u, 0.0), mask=at < cols)
        tl.store(returns + row + at, tl.where(counts, reward + u, 0.0), mask=at < cols)
        carry = tl.sum(tl.where(column == 0, u, 0.0), 0)


def gae(rewards, values, mask, rows, cols, gamma, lam, carry, dtype, advantages, returns):
    """The op of csrc/ops.h, with tensors instead of pointers."""
    refuse_cpu("gae", rewards)
    if rows * cols:
        _kernel[(rows,)](
            *contiguous(rewards, values, mask), cols, gamma, gamma * lam, 1.0 if carry else gamma * lam, advantages,
            returns, ACCUM=accumulator(returns.dtype), BLOCK=tiles(cols),
        )  # fmt: skip

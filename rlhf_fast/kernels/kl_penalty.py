"""kl_penalty in Triton: the estimate for each token, and its derivative if a backward will follow."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import BLOCK, accumulator, contiguous, kl_token, load, number, refuse_cpu


@triton.jit
def _kernel(
    logprobs, ref_logprobs, count, input_clamp: tl.float64, output_clamp: tl.float64, kl, slope,
    ESTIMATOR: tl.constexpr, ACCUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    most_in, most_out = number(input_clamp, ACCUM), number(output_clamp, ACCUM)
    d = load(logprobs, at, inside, ACCUM) - load(ref_logprobs, at, inside, ACCUM)
    held = (d > most_in) | (d < -most_in)
    d = tl.where(d > most_in, most_in, tl.where(d < -most_in, -most_in, d))
    value, derivative = kl_token(d, ESTIMATOR)
    held = held | (value > most_out) | (value < -most_out)
    value = tl.where(value > most_out, most_out, tl.where(value < -most_out, -most_out, value))
    tl.store(kl + at, value, mask=inside)
    if slope is not None:
        tl.store(slope + at, tl.where(held, 0.0, derivative).to(ACCUM), mask=inside)


def kl_penalty(logprobs, ref_logprobs, rows, cols, estimator, input_clamp, output_clamp, dtype, kl, slope):
    """The op of csrc/ops.h, with tensors instead of pointers."""
    refuse_cpu("kl_penalty", logprobs)
    if rows * cols:
        _kernel[(triton.cdiv(rows * cols, BLOCK),)](
            *contiguous(logprobs, ref_logprobs), rows * cols, input_clamp, output_clamp, kl, slope,
            ESTIMATOR=estimator, ACCUM=accumulator(kl.dtype), BLOCK=BLOCK,
        )  # fmt: skip

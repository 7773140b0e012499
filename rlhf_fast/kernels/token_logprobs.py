"""token_logprobs in Triton, for CUDA devices without the CUDA build. Formulas: csrc/cuda/token_logprobs.cu.

Forward: one program per row, which reads it once in (DEPTH, WIDTH) tiles. Each of the WIDTH columns keeps its own
(max, sum, weighted), so that threads exchange nothing before the end of the row.
Backward: one program per row and block.
"""

import torch
import triton
import triton.language as tl

from ._common import FLOOR, LOG2_E, LOWEST, accumulator, exp, refuse_cpu

TO_NATS = tl.constexpr(1 / LOG2_E)


@triton.jit
def _row(row, inner, outer_stride, inner_stride):
    """Element offset of a row: the layout of csrc/ops.h, in 64 bits because rows * vocab passes 2^31."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def _forward_kernel(
    logits, inner, outer_stride, inner_stride, vocab, labels, mask, scale: tl.float64, inverse_temperature: tl.float64,
    logprobs, entropy, saved, ACCUM: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    scale = tl.full([], scale, ACCUM)  # log2(e) / temperature
    inverse_temperature = tl.full([], inverse_temperature, ACCUM)
    counts = tl.full([], True, tl.int1)
    if mask is not None:
        counts = tl.load(mask + row) != 0
    x = logits + _row(row, inner, outer_stride, inner_stride)
    label = tl.load(labels + row)
    inside = (label >= 0) & (label < vocab)
    tl.device_assert(
        inside | (counts == 0),
        "token_logprobs: the label of the row with this block's number is outside the vocabulary",
    )
    x_label = tl.load(x + label, mask=inside & counts, other=float("nan")).to(ACCUM)

    max_ = tl.full([WIDTH], LOWEST, ACCUM)
    sum_ = tl.zeros([WIDTH], ACCUM)
    weighted = tl.zeros([WIDTH], ACCUM)
    tile = tl.arange(0, DEPTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for start in range(0, tl.where(counts, vocab, 0), DEPTH * WIDTH):
        values = tl.load(x + start + tile, mask=start + tile < vocab, other=-float("inf")).to(ACCUM)
        top = tl.maximum(max_, tl.max(values, 0))
        factor = tl.exp2((max_ - top) * scale)
        weighted = factor * (weighted + tl.maximum(max_ - top, FLOOR) * sum_)
        sum_ *= factor
        max_ = top
        shift = values - top[None, :]
        power = tl.exp2(shift * scale)
        sum_ += tl.sum(power, 0)
        if entropy is not None:
            weighted += tl.sum(power * tl.maximum(shift, FLOOR), 0)

    top = tl.max(max_, 0)
    factor = tl.exp2((max_ - top) * scale)
    # In float64, because the order of these sums depends on the alignment that the compiler knows of: a row's bits must
    # not depend on where it lies.
    weighted = tl.sum((factor * (weighted + tl.maximum(max_ - top, FLOOR) * sum_)).to(tl.float64), 0).to(ACCUM)
    total = tl.sum((factor * sum_).to(tl.float64), 0).to(ACCUM)
    log_sum = tl.log(total)
    tl.store(logprobs + row, tl.where(counts, (x_label - top) * inverse_temperature - log_sum, 0.0))
    if entropy is not None:
        tl.store(entropy + row, tl.where(counts, log_sum - weighted / total * inverse_temperature, 0.0))
    tl.store(saved + 2 * row, top)
    tl.store(saved + 2 * row + 1, log_sum)


@triton.jit
def _backward_kernel(
    logits, inner, outer_stride, inner_stride, vocab, labels, mask, scale: tl.float64, inverse_temperature: tl.float64,
    saved, entropy, grad_logprobs, grad_entropy, grad_logits, grad_outer_stride, grad_inner_stride,
    ACCUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.full([], scale, ACCUM)
    inverse_temperature = tl.full([], inverse_temperature, ACCUM)
    counts = tl.full([], True, tl.int1)
    if mask is not None:
        counts = tl.load(mask + row) != 0
    g = tl.full([], 0.0, ACCUM)
    h = tl.full([], 0.0, ACCUM)
    if grad_logprobs is not None:
        g = tl.where(counts, tl.load(grad_logprobs + row), 0.0)  # without waiting for the mask
    if grad_entropy is not None:
        h = tl.where(counts, tl.load(grad_entropy + row), 0.0)
    wanted = (g != 0.0) | (h != 0.0)  # if not, nothing is read and everything below is 0
    top = tl.load(saved + 2 * row, mask=wanted, other=0.0)
    log_sum = tl.load(saved + 2 * row + 1, mask=wanted, other=0.0)
    inverse = inverse_temperature * exp(-log_sum)
    x = logits + _row(row, inner, outer_stride, inner_stride)
    read = columns < tl.where(wanted, vocab, 0)
    s = (tl.load(x + columns, mask=read, other=-float("inf")).to(ACCUM) - top) * scale
    # The factor of 2^s is rounded before 2^s multiplies it: where p = 1 exactly 0 remains at the label, though the
    # compiler joins that product to the addition.
    factor = -g * inverse
    if grad_entropy is not None:
        least = -2000.0  # exp2(least) is 0, in float64 too; 0 times what the slope makes infinite would be NaN
        constant = -(g + h * (tl.load(entropy + row, mask=wanted, other=0.0) - log_sum)) * inverse
        factor = (-h * TO_NATS * inverse) * tl.maximum(s, least) + constant
    gradient = tl.exp2(s) * factor
    gradient += tl.where(columns == tl.load(labels + row), g * inverse_temperature, 0.0)
    out = grad_logits + _row(row, inner, grad_outer_stride, grad_inner_stride)
    tl.store(out + columns, gradient.to(grad_logits.dtype.element_ty), mask=columns < vocab)


def token_logprobs_forward(
    logits, dtype, rows, vocab, inner, outer_stride, inner_stride, labels, mask, temperature, logprobs, entropy, saved
):
    """The forward op of csrc/ops.h, with tensors instead of pointers."""
    refuse_cpu("token_logprobs", logits)
    if rows:
        _forward_kernel[(rows,)](
            logits, inner, outer_stride, inner_stride, vocab, labels, mask, LOG2_E / temperature, 1 / temperature,
            logprobs, entropy, saved, **forward_tiles(logits.dtype), debug=True, sanitize_overflow=False,
        )  # fmt: skip


def token_logprobs_backward(
    logits, dtype, rows, vocab, inner, outer_stride, inner_stride, labels, mask, temperature, saved, entropy,
    grad_logprobs, grad_entropy, grad_logits, grad_outer_stride, grad_inner_stride,
):  # fmt: skip
    """The backward op of csrc/ops.h, with tensors instead of pointers."""
    refuse_cpu("token_logprobs", logits)
    if rows:
        tiles = backward_tiles(logits.dtype)
        _backward_kernel[(rows, triton.cdiv(vocab, tiles["BLOCK"]))](
            logits, inner, outer_stride, inner_stride, vocab, labels, mask, LOG2_E / temperature, 1 / temperature,
            saved, entropy, grad_logprobs, grad_entropy, grad_logits, grad_outer_stride, grad_inner_stride, **tiles,
        )  # fmt: skip


def forward_tiles(dtype: torch.dtype) -> dict:
    """Four loads of 16 bytes in flight for each of 256 threads."""
    return {
        "ACCUM": accumulator(dtype),
        "DEPTH": 4,
        "WIDTH": 256 * 16 // dtype.itemsize,
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


def backward_tiles(dtype: torch.dtype) -> dict:
    """Two loads of 16 bytes per thread, which leaves enough registers for twice as many blocks."""
    return {
        "ACCUM": accumulator(dtype),
        "BLOCK": 2 * 256 * 16 // dtype.itemsize,
        "num_warps": 8,
        "enable_fp_fusion": True,
    }

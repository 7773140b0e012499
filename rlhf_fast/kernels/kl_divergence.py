"""kl_divergence in Triton: the forward and the backward each read both rows once.

Forward: one program per row. Each of the THREADS columns of a (DEPTH, THREADS, PACK) tile keeps its own state, of five
numbers: one per thread if rows lie on boundaries of 16 bytes. Otherwise a PACK would lie across threads, so it is 1,
and a thread has several columns.
Backward: one program per row and block. Formulas: csrc/cuda/kl_divergence.cu.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import LOG2_E, LOWEST, accumulator, exp, refuse_cpu

TO_POWER_OF_2 = tl.constexpr(LOG2_E)


@triton.jit
def _moved(gap, sum_p, by_p, by_q):
    """The gap after the maxima that it refers to have changed. An infinite gap (q = 0 where p > 0) stays infinite. Of a
    p that becomes 0 nothing stays, however far apart the maxima were and whatever q is."""
    factor = tl.exp2(by_p * TO_POWER_OF_2)
    moved = tl.where(gap == float("inf"), gap, factor * (gap + (by_p - by_q) * sum_p))
    return tl.where(factor * sum_p == 0, 0.0, moved), factor * sum_p


@triton.jit
def _forward_kernel(
    logits, ref_logits, vocab, mask, kl, saved, ACCUM: tl.constexpr, DEPTH: tl.constexpr, THREADS: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counts = tl.full([], True, tl.int1)
    if mask is not None:
        counts = tl.load(mask + row) != 0
    x, y = logits + row * vocab, ref_logits + row * vocab
    max_p = tl.full([THREADS], LOWEST, ACCUM)
    max_q = tl.full([THREADS], LOWEST, ACCUM)
    sum_p = tl.zeros([THREADS], ACCUM)
    sum_q = tl.zeros([THREADS], ACCUM)
    gap = tl.zeros([THREADS], ACCUM)
    lane = tl.arange(0, THREADS)[None, :, None] * PACK + tl.arange(0, PACK)[None, None, :]
    tile = tl.arange(0, DEPTH)[:, None, None] * (THREADS * PACK) + lane
    for start in range(0, tl.where(counts, vocab, 0), DEPTH * THREADS * PACK):
        p = tl.load(x + start + tile, mask=start + tile < vocab, other=-float("inf")).to(ACCUM)
        q = tl.load(y + start + tile, mask=start + tile < vocab, other=-float("inf")).to(ACCUM)
        top_p, top_q = tl.maximum(max_p, tl.max(tl.max(p, 2), 0)), tl.maximum(max_q, tl.max(tl.max(q, 2), 0))
        gap, sum_p = _moved(gap, sum_p, max_p - top_p, max_q - top_q)
        sum_q *= tl.exp2((max_q - top_q) * TO_POWER_OF_2)
        max_p, max_q = top_p, top_q
        d, f = p - top_p[None, :, None], q - top_q[None, :, None]
        power = tl.exp2(d * TO_POWER_OF_2)
        sum_p += tl.sum(tl.sum(power, 2), 0)
        sum_q += tl.sum(tl.sum(tl.exp2(f * TO_POWER_OF_2), 2), 0)
        gap += tl.sum(tl.sum(tl.where(power > 0, power * (d - f), 0.0), 2), 0)
    top_p, top_q = tl.max(max_p, 0), tl.max(max_q, 0)
    gap, sum_p = _moved(gap, sum_p, max_p - top_p, max_q - top_q)
    total, all_p = tl.sum(gap, 0), tl.sum(sum_p, 0)
    log_p, log_q = tl.log(all_p), tl.log(tl.sum(sum_q * tl.exp2((max_q - top_q) * TO_POWER_OF_2), 0))
    tl.store(kl + row, tl.where(counts, total / all_p - log_p + log_q, 0.0))
    tl.store(saved + 4 * row, tl.where(counts, top_p, 0.0))
    tl.store(saved + 4 * row + 1, tl.where(counts, top_q, 0.0))
    tl.store(saved + 4 * row + 2, tl.where(counts, log_p, 0.0))
    tl.store(saved + 4 * row + 3, tl.where(counts, log_q, 0.0))


@triton.jit
def _backward_kernel(
    logits, ref_logits, vocab, mask, kl, saved, grad_kl, grad_logits, grad_ref_logits,
    ACCUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.full([], True, tl.int1)
    if mask is not None:
        counts = tl.load(mask + row) != 0
    inside = columns < vocab
    read = columns < tl.where(counts, vocab, 0)
    g = tl.load(grad_kl + row, mask=counts, other=0.0).to(ACCUM)
    d = tl.load(logits + row * vocab + columns, mask=read, other=-float("inf")).to(ACCUM) - tl.load(saved + 4 * row)
    f = tl.load(ref_logits + row * vocab + columns, mask=read, other=-float("inf")).to(ACCUM)
    f -= tl.load(saved + 4 * row + 1)
    log_p, log_q = tl.load(saved + 4 * row + 2), tl.load(saved + 4 * row + 3)
    power = tl.exp2(d * TO_POWER_OF_2)
    p = power * (g * exp(-log_p))
    if grad_logits is not None:
        gradient = tl.where(power > 0, p * (d - f - (log_p - log_q + tl.load(kl + row))), p)
        gradient = tl.where(read, gradient, 0.0).to(grad_logits.dtype.element_ty)
        tl.store(grad_logits + row * vocab + columns, gradient, mask=inside)
    if grad_ref_logits is not None:
        gradient = tl.exp2(f * TO_POWER_OF_2) * (g * exp(-log_q)) - p
        gradient = tl.where(read, gradient, 0.0).to(grad_ref_logits.dtype.element_ty)
        tl.store(grad_ref_logits + row * vocab + columns, gradient, mask=inside)


def kl_divergence_forward(logits, ref_logits, dtype, rows, vocab, mask, kl, saved):
    """The forward op of csrc/ops.h, with tensors instead of pointers."""
    refuse_cpu("kl_divergence", logits)
    width = 256 * 16 // logits.dtype.itemsize
    pack = width // 256 if vocab % 16 == 0 else 1  # 16 is what Triton asks of a stride, whatever the dtype
    if rows:
        _forward_kernel[(rows,)](
            logits, ref_logits, vocab, mask, kl, saved, ACCUM=accumulator(kl.dtype), DEPTH=2, THREADS=width // pack,
            PACK=pack, num_warps=8,
        )  # fmt: skip


def kl_divergence_backward(
    logits, ref_logits, dtype, rows, vocab, mask, kl, saved, grad_kl, grad_logits, grad_ref_logits
):
    """The backward op of csrc/ops.h, with tensors instead of pointers."""
    refuse_cpu("kl_divergence", logits)
    block = 256 * 16 // logits.dtype.itemsize
    if rows:
        _backward_kernel[(rows, triton.cdiv(vocab, block))](
            logits, ref_logits, vocab, mask, kl, saved, grad_kl, grad_logits, grad_ref_logits,
            ACCUM=accumulator(kl.dtype), BLOCK=block, num_warps=8,
        )  # fmt: skip

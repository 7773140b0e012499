"""ppo_loss in Triton. Formulas: csrc/common/policy.h.

PyTorch counts the mask, which gives the divisor. Then each program writes the gradients and the sums of a block of
tokens, and one program adds up these sums in the order of the blocks. Nothing synchronises with the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import BLOCK, accumulator, contiguous, exp, exp_minus_1_minus, kl_token, load, number, refuse_cpu

FIELDS = tl.constexpr(16)  # results of a block: 12 sums over its tokens, then two maxima (and two unused)


@triton.jit
def _clamped(ratio, least, most):
    return tl.where(ratio > most, most, tl.where(ratio < least, least, ratio))


@triton.jit
def _kernel(
    logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, importance_weights, count, cols, of_row, norm,
    clip_low: tl.float64, clip_high: tl.float64, dual_clip: tl.float64, log_ratio_clamp: tl.float64,
    kl_coef: tl.float64, entropy_coef: tl.float64, grad_logprobs, grad_entropy, partials,
    ESTIMATOR: tl.constexpr, ACCUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    counts = tl.load(mask + at, mask=inside, other=0) != 0
    share = tl.zeros([BLOCK], tl.float64) + 1.0  # the weight of a token in its row
    if of_row is not None:
        share /= tl.maximum(tl.load(of_row + at // cols, mask=inside, other=1), 1).to(tl.float64)
    weight = (share / tl.load(norm)).to(ACCUM)

    logprob, a = load(logprobs, at, counts, ACCUM), load(advantages, at, counts, ACCUM)
    importance = tl.zeros([BLOCK], ACCUM) + 1.0
    if importance_weights is not None:
        importance = load(importance_weights, at, counts, ACCUM)
    d = logprob - load(old_logprobs, at, counts, ACCUM)
    clamp = number(log_ratio_clamp, ACCUM)
    ratio = _clamped(exp(d), exp(-clamp), exp(clamp))
    lower = tl.where(a < 0, number(clip_low, ACCUM), 0.0)
    upper = tl.where(a < 0, number(dual_clip, ACCUM), number(clip_high, ACCUM))
    over, under = ratio > upper, ratio < lower
    loss = -a * tl.where(over, upper, tl.where(under, lower, ratio)) * importance
    slope = tl.where(over | under | (d > clamp) | (d < -clamp), 0.0, loss)

    kl_sum = tl.zeros([], tl.float64)
    entropy_sum = tl.zeros([], tl.float64)
    if ref_logprobs is not None:
        kl, kl_slope = kl_token(logprob - load(ref_logprobs, at, counts, ACCUM), ESTIMATOR)
        coef = number(kl_coef, ACCUM)
        slope += tl.where(coef != 0, coef * kl_slope, 0.0)  # if the KL is only a statistic, 0 * inf must not count
        kl_sum = tl.sum(tl.where(counts, share * kl, 0.0), 0)
    if entropy is not None:
        entropy_sum = tl.sum(share * load(entropy, at, counts, ACCUM), 0)
    if grad_logprobs is not None:
        tl.store(grad_logprobs + at, tl.where(counts, weight * slope, 0.0).to(ACCUM), mask=inside)
    if grad_entropy is not None:
        bonus = -weight * number(entropy_coef, ACCUM)
        tl.store(grad_entropy + at, tl.where(counts, bonus, 0.0).to(ACCUM), mask=inside)

    mine = partials + tl.program_id(0) * FIELDS
    wide = d.to(tl.float64)
    apart = tl.where(counts, ratio.to(tl.float64) - 1.0, 0.0)
    tl.store(mine, tl.sum(tl.where(counts, share * loss, 0.0), 0))
    tl.store(mine + 1, kl_sum)
    tl.store(mine + 2, entropy_sum)
    tl.store(mine + 3, tl.sum(wide, 0))
    tl.store(mine + 4, tl.sum(0.5 * wide * wide, 0))
    tl.store(mine + 5, tl.sum(exp_minus_1_minus(d).to(tl.float64), 0))
    tl.store(mine + 6, tl.sum((over & (a > 0)).to(tl.float64), 0))
    tl.store(mine + 7, tl.sum(under.to(tl.float64), 0))
    tl.store(mine + 8, tl.sum((over & (a < 0)).to(tl.float64), 0))
    tl.store(mine + 9, tl.sum(counts.to(tl.float64), 0))
    tl.store(mine + 10, tl.sum(apart, 0))
    tl.store(mine + 11, tl.sum(apart * apart, 0))
    tl.store(mine + 12, tl.max(tl.where(counts, -wide, -float("inf")), 0))
    tl.store(mine + 13, tl.max(tl.where(counts, wide, -float("inf")), 0))


@triton.jit
def _field(values, field: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, FIELDS) == field, values, 0.0), 0)


@triton.jit
def _finish(
    partials, blocks, norm, kl_coef: tl.float64, entropy_coef: tl.float64, log_ratio_clamp: tl.float64, loss, stats,
    ACCUM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, field = tl.arange(0, ROWS)[:, None], tl.arange(0, FIELDS)[None, :]
    sums = tl.zeros([ROWS, FIELDS], tl.float64)
    most = tl.zeros([ROWS, FIELDS], tl.float64) - float("inf")
    for first in range(0, blocks, ROWS):
        given = first + row < blocks
        block = tl.load(partials + (first + row) * FIELDS + field, mask=given & (field < 14), other=0.0)
        sums += tl.where(field < 12, block, 0.0)
        most = tl.where(given & (field >= 12) & (block > most), block, most)
    total, top = tl.sum(sums, 0), tl.max(most, 0)

    tokens = _field(total, 9)
    some = tokens > 0
    each = 1.0 / tl.maximum(tokens, 1.0)
    inverse = tl.where(some, 1.0 / tl.load(norm), 0.0)
    policy = tl.where(some, _field(total, 0) * inverse, 0.0)
    kl = tl.where(some, _field(total, 1) * inverse, 0.0)
    entropy = tl.where(some, _field(total, 2) * inverse, 0.0)
    kl_coef, entropy_coef = number(kl_coef, tl.float64), number(entropy_coef, tl.float64)
    value = policy + tl.where(kl_coef != 0, kl_coef * kl, 0.0)
    tl.store(loss, (value - tl.where(entropy_coef != 0, entropy_coef * entropy, 0.0)).to(ACCUM))

    squares = _field(total, 4)
    lost = squares != squares  # a maximum ignores NaN, but the statistics must show it
    minus_min = tl.where(lost, squares, _field(tl.where(some, top, 0.0), 12))
    maximum = tl.where(lost, squares, _field(tl.where(some, top, 0.0), 13))
    clamp = number(log_ratio_clamp, ACCUM)
    least, highest = exp(-clamp), exp(clamp)
    shift = _field(total, 10) * each
    deviations = (_field(total, 11) - shift * _field(total, 10)) * each
    tl.store(stats, policy.to(ACCUM))
    tl.store(stats + 1, kl.to(ACCUM))
    tl.store(stats + 2, entropy.to(ACCUM))
    tl.store(stats + 3, (-_field(total, 3) * each).to(ACCUM))
    tl.store(stats + 4, (squares * each).to(ACCUM))
    tl.store(stats + 5, (_field(total, 5) * each).to(ACCUM))
    tl.store(stats + 6, (_field(total, 6) * each).to(ACCUM))
    tl.store(stats + 7, (_field(total, 7) * each).to(ACCUM))
    tl.store(stats + 8, (_field(total, 8) * each).to(ACCUM))
    tl.store(stats + 9, tl.where(some, 1.0 + shift, 0.0).to(ACCUM))
    tl.store(stats + 10, tl.where(deviations < 0, 0.0, deviations).to(ACCUM))
    tl.store(stats + 11, tl.where(some, _clamped(exp((-minus_min).to(ACCUM)), least, highest), 0.0))
    tl.store(stats + 12, tl.where(some, _clamped(exp(maximum.to(ACCUM)), least, highest), 0.0))
    tl.store(stats + 13, tl.where(some, tl.where(minus_min > maximum, minus_min, maximum), 0.0).to(ACCUM))
    tl.store(stats + 14, tokens.to(ACCUM))


def _divisors(mask, cols: int, aggregation: int, normalizer) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(number of tokens of each row, or None if tokens are not weighted by it; the divisor), see Aggregation in
    csrc/ops.h."""
    token_mean, seq_mean_token_mean, sum_norm = aggregation == 0, aggregation == 2, aggregation == 3
    of_row = None if token_mean or sum_norm else mask.sum(1)
    if normalizer is None:
        normalizer = mask.sum() if token_mean else None if sum_norm else (of_row > 0).sum()
    if normalizer is None:
        normalizer = torch.full((), cols, device=mask.device)
    return of_row if seq_mean_token_mean else None, normalizer.double()


def ppo_loss(
    logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, importance_weights, rows, cols, clip_low,
    clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef, aggregation, normalizer, dtype, loss,
    stats, grad_logprobs, grad_entropy,
):  # fmt: skip
    """The op of csrc/ops.h, with tensors instead of pointers."""
    refuse_cpu("ppo_loss", logprobs)
    of_row, norm = _divisors(mask, cols, aggregation, normalizer)
    accum, blocks = accumulator(loss.dtype), triton.cdiv(rows * cols, BLOCK)
    partials = torch.empty(max(blocks, 1), FIELDS.value, dtype=torch.float64, device=loss.device)
    if blocks:
        _kernel[(blocks,)](
            *contiguous(logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, importance_weights),
            rows * cols, cols, of_row, norm, clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, entropy_coef,
            grad_logprobs, grad_entropy, partials, ESTIMATOR=kl_estimator, ACCUM=accum, BLOCK=BLOCK,
        )  # fmt: skip
    _finish[(1,)](
        partials, blocks, norm, kl_coef, entropy_coef, log_ratio_clamp, loss, stats, ACCUM=accum,
        ROWS=64, num_warps=4,
    )  # fmt: skip

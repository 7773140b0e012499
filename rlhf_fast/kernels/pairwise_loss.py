"""pairwise_loss in Triton: one program reads the pairs twice, first for the sum of the weights and the mean reward.

A batch of a reward model is a few thousand pairs, which one program reads in microseconds.
Formulas: csrc/common/math.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import accumulator, contiguous, exp, load, number, refuse_cpu, tiles


@triton.jit
def _rewards(chosen, rejected, ref_chosen, ref_rejected, scale, at, inside, ACCUM: tl.constexpr):
    c, r = load(chosen, at, inside, ACCUM), load(rejected, at, inside, ACCUM)
    if ref_chosen is not None:  # implicit rewards: scale * (log pi - log pi_ref)
        c = scale * (c - load(ref_chosen, at, inside, ACCUM))
        r = scale * (r - load(ref_rejected, at, inside, ACCUM))
    return c, r


@triton.jit
def _weight(weights, at, inside, ACCUM: tl.constexpr):
    if weights is not None:
        return load(weights, at, inside, ACCUM)
    return inside.to(ACCUM)


@triton.jit
def _kernel(
    chosen, rejected, ref_chosen, ref_rejected, margin, target_prob, weights, pairs, scale: tl.float64,
    margin_value: tl.float64, prob_value: tl.float64, center_coef: tl.float64, loss, stats, grad_chosen, grad_rejected,
    ACCUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale, coef = number(scale, ACCUM), number(center_coef, ACCUM)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    rewards = tl.zeros([BLOCK], tl.float64)
    for first in range(0, pairs, BLOCK):
        at = first + lane
        inside = at < pairs
        c, r = _rewards(chosen, rejected, ref_chosen, ref_rejected, scale, at, inside, ACCUM)
        total += _weight(weights, at, inside, ACCUM)
        rewards += c.to(tl.float64) + r.to(tl.float64)
    weight_sum = tl.sum(total, 0)
    share = 1.0 / tl.where(weight_sum > 0, weight_sum, 1.0)
    mean = tl.sum(rewards, 0) / tl.maximum(2.0 * pairs, 1.0)

    losses = tl.zeros([BLOCK], tl.float64)
    accuracy = tl.zeros([BLOCK], tl.float64)
    difference = tl.zeros([BLOCK], tl.float64)
    of_chosen = tl.zeros([BLOCK], tl.float64)
    of_rejected = tl.zeros([BLOCK], tl.float64)
    deviations = tl.zeros([BLOCK], tl.float64)
    for first in range(0, pairs, BLOCK):
        at = first + lane
        inside = at < pairs
        c, r = _rewards(chosen, rejected, ref_chosen, ref_rejected, scale, at, inside, ACCUM)
        weight = _weight(weights, at, inside, ACCUM)
        d = c - r
        if margin is not None:
            d -= load(margin, at, inside, ACCUM)
        else:
            d -= number(margin_value, ACCUM)
        if target_prob is not None:
            p = load(target_prob, at, inside, ACCUM)
        else:
            p = tl.zeros([BLOCK], ACCUM) + number(prob_value, ACCUM)
        e = exp(-tl.abs(d))
        one = 1.0 + e
        log1p = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
        minor, major = e / one, 1.0 / one
        positive, negative = tl.where(d < 0, minor, major), tl.where(d < 0, major, minor)
        wrong = tl.where(d < 0, p, 1.0 - p)  # if it is 0, an infinite d must add nothing
        pair_loss = log1p + tl.where(wrong == 0, 0.0, wrong * tl.abs(d))
        slope = (1.0 - p) * positive - p * negative
        pull = tl.where(coef != 0, coef * (c + r), 0.0)
        pair_loss += tl.where(coef != 0, pull * (c + r), 0.0)
        if grad_chosen is not None:
            each = weight * share.to(ACCUM) * scale
            tl.store(grad_chosen + at, (each * (2.0 * pull + slope)).to(ACCUM), mask=inside)
            tl.store(grad_rejected + at, (each * (2.0 * pull - slope)).to(ACCUM), mask=inside)
        w = tl.where(inside, weight, 0.0).to(tl.float64)
        apart = c - r
        # Not by apart: the compiler may join a product, unrounded, to the subtraction, and a tie is none. NaN stays.
        won = tl.where(c > r, 1.0, tl.where(c < r, 0.0, 0.5 + 0.0 * apart))
        losses += tl.where(inside, w * pair_loss, 0.0)
        accuracy += w * won
        difference += w * apart
        of_chosen += w * c
        of_rejected += w * r
        deviations += tl.where(inside, (c.to(tl.float64) - mean) * (c.to(tl.float64) - mean), 0.0)
        deviations += tl.where(inside, (r.to(tl.float64) - mean) * (r.to(tl.float64) - mean), 0.0)
    tl.store(loss, (tl.sum(losses, 0) * share).to(ACCUM))
    tl.store(stats, (tl.sum(accuracy, 0) * share).to(ACCUM))
    tl.store(stats + 1, (tl.sum(difference, 0) * share).to(ACCUM))
    tl.store(stats + 2, (tl.sum(of_chosen, 0) * share).to(ACCUM))
    tl.store(stats + 3, (tl.sum(of_rejected, 0) * share).to(ACCUM))
    tl.store(stats + 4, mean.to(ACCUM))
    tl.store(stats + 5, tl.sqrt(tl.sum(deviations, 0) / tl.maximum(2.0 * pairs, 1.0)).to(ACCUM))
    tl.store(stats + 6, number(pairs, ACCUM))


def pairwise_loss(
    chosen, rejected, ref_chosen, ref_rejected, margin, target_prob, weights, pairs, scale, margin_value, prob_value,
    center_coef, dtype, loss, stats, grad_chosen, grad_rejected,
):  # fmt: skip
    """The op of csrc/ops.h, with tensors instead of pointers."""
    refuse_cpu("pairwise_loss", chosen)
    _kernel[(1,)](
        *contiguous(chosen, rejected, ref_chosen, ref_rejected, margin, target_prob, weights), pairs, scale,
        margin_value, prob_value, center_coef, loss, stats, grad_chosen, grad_rejected,
        ACCUM=accumulator(loss.dtype), BLOCK=tiles(pairs, 512),
    )  # fmt: skip

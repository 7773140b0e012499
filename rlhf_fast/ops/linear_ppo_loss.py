"""PPO's loss from hidden states: ppo_loss of linear_token_logprobs, with three matrix products including the backward.

Everything in the loss except the log-probs is known in advance, even the divisor. So each chunk of logits is turned
into its gradient at once:  dL/dlogprob_i = w_i f'(logprob_i), where f is the loss of a token and w_i its weight in the
aggregation. The ppo_loss kernel computes both: f' from the chunk's tokens, w from a batch whose ratios are all 1.
Specification: reference.linear_ppo_loss. The chunks are in _linear.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._dispatch import Op
from ._inputs import (
    AGGREGATION_CODES,
    ESTIMATOR_CODES,
    as_rows,
    check_policy,
    check_temperature,
    check_term,
    code_of,
    float_or,
    needed_mask,
    normalizer_tensor,
    wants_gradient,
)
from ._inputs import check as check_tokens
from ._known_gradient import PpoTokens
from ._layout import accumulation_dtype, byte_mask
from ._linear import (
    Gradients,
    check,
    chunk_statistics,
    compact,
    empty_gradients,
    factors_of,
    flops_of_loss,
    known_chunk_gradient,
    logits_buffer,
    rounded_in_float32,
    takes_known_gradient,
)
from .ppo_loss import _op as ppo_op
from .reference import PPO_STATS

NAME = "linear_ppo_loss"
_UNCLIPPED = (0.0, math.inf, math.inf, math.inf, 0.0, 0, 0.0)  # the `options` of _forward for a loss without a clip
_TOKEN_MEAN = 0


@torch.no_grad()  # it computes its gradients itself
def _forward(
    hidden, weight, bias, labels, old_logprobs, advantages, mask, ref_logprobs, importance_weights, normalizer,
    temperature, softcap, clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef,
    aggregation, rounds, *wanted,
):  # fmt: skip
    ppo = ppo_op.kernel_on(hidden.device.type)
    options = (clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef)
    inputs = compact(NAME, hidden, weight, bias, labels.view(-1), mask.view(-1), softcap, rounds)
    rows = inputs.labels.shape[0]
    buffer = logits_buffer(inputs, any(wanted))
    gradients = Gradients(inputs, wanted)
    logprobs, entropy = hidden.new_empty(2, rows, dtype=accumulation_dtype(hidden))
    if any(wanted):
        ones = torch.ones(mask.shape, dtype=logprobs.dtype, device=hidden.device)
        weights = ppo(ones, ones, -ones, mask, None, None, None, normalizer, *_UNCLIPPED, aggregation, True, False)[2]
        tokens = [old_logprobs, advantages, ref_logprobs, importance_weights, weights]
        tokens = [None if t is None else inputs.take(t.reshape(-1)).contiguous()[None] for t in tokens]
        one = torch.ones((), dtype=torch.float64, device=hidden.device)
    for part in inputs.parts:
        if any(wanted) and takes_known_gradient(inputs):
            old, advantage, ref, importance, w = (None if t is None else t[0, part].to(logprobs.dtype) for t in tokens)
            ppo_tokens = PpoTokens(old, advantage, ref, importance, options)
            z, logprobs[part], entropy[part] = known_chunk_gradient(buffer, inputs, part, temperature, w, ppo_tokens)
            gradients.multiply(z, part)
            continue
        z, logprobs[part], entropy[part], saved = chunk_statistics(buffer, inputs, part, temperature, True)
        if any(wanted):
            old, advantage, ref, importance, w = (None if t is None else t[:, part] for t in tokens)
            new = logprobs[None, part]
            _, _, grad, grad_entropy = ppo(
                new, new if old is None else old, advantage, torch.ones_like(new, dtype=torch.bool), ref,
                entropy[None, part], importance, one, *options, _TOKEN_MEAN, True, entropy_coef != 0,
            )  # fmt: skip
            grad_entropy = (grad_entropy * w)[0] if entropy_coef != 0 else None
            gradients.add(z, part, temperature, saved, entropy[part], (grad * w)[0], grad_entropy)
    logprobs, entropy = (inputs.put(t).view(mask.shape) for t in (logprobs, entropy))
    loss, stats, _, _ = ppo(
        logprobs, logprobs if old_logprobs is None else old_logprobs, advantages, mask, ref_logprobs, entropy,
        importance_weights, normalizer, *options, aggregation, False, False,
    )  # fmt: skip
    return loss, stats, logprobs, *gradients.results()


def _fake(hidden, weight, bias, labels, *rest):
    dtype = accumulation_dtype(hidden)
    loss, stats, logprobs = (hidden.new_empty(shape, dtype=dtype) for shape in ((), len(PPO_STATS), labels.shape))
    return loss, stats, logprobs, *empty_gradients(hidden, weight, bias, rest[-3:])


_op = Op(
    f"{NAME}(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? old_logprobs, Tensor advantages, "
    "Tensor mask, Tensor? ref_logprobs, Tensor? importance_weights, Tensor? normalizer, float temperature, "
    "float? softcap, float clip_low, float clip_high, float dual_clip, float log_ratio_clamp, float kl_coef, "
    "int kl_estimator, float entropy_coef, int aggregation, bool rounds, bool grad_hidden, bool grad_weight, "
    "bool grad_bias) -> (Tensor loss, Tensor stats, Tensor logprobs, Tensor, Tensor, Tensor)",
    kernels={("cpu", "native"): _forward, ("cuda", "native"): _forward, ("cuda", "triton"): _forward},
    fake=_fake,
    gradients={0: 3, 1: 4, 2: 5},
    statistics=PPO_STATS,
    waits=True,  # compact, in _linear.py
    flops=flops_of_loss,
)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    normalizer: Tensor | float | None = None,
    with_logprobs: bool = False,
):
    """(B, T, D) hidden, (V, D) weight, the rest (B, T) -> scalar loss to minimise, and statistics (PPO_STATS);
    with_logprobs adds the (B, T) log-probs, without a gradient and 0 outside the mask.

    Equals ppo_loss(linear_token_logprobs(hidden, weight, labels, ...), ...); the docstrings of these two describe the
    options. old_logprobs None stands for these log-probs: then none have to be computed before the first step from a
    rollout. The entropy is always computed. Rows outside the mask are dropped first and may hold anything. hidden,
    weight and bias receive gradients, and the op is differentiable once; all other inputs receive none. In addition to
    the results it needs memory for one chunk of logits. On a GPU, if hidden and weight are bfloat16 the logits are too,
    as with any lm_head; dropping the rows outside the mask synchronises with the device once.
    Raises ValueError or TypeError if a shape, dtype or option does not fit, IndexError for a label outside the
    vocabulary (on a GPU the kernel stops at it).
    """
    check(NAME, hidden, weight, labels, bias, mask, softcap)
    hidden, weight, bias, rounds = factors_of(hidden, weight, bias)
    check_tokens(
        NAME, 2, mask, "advantages old_logprobs ref_logprobs importance_weights",
        advantages, old_logprobs, ref_logprobs, importance_weights, optional=3,
    )  # fmt: skip
    check_policy(NAME, cliprange, cliprange_high, dual_clip, log_ratio_clamp)
    kl_coef = check_term(NAME, "kl_coef", kl_coef, "ref_logprobs", ref_logprobs)
    entropy_coef = check_term(NAME, "entropy_coef", entropy_coef, "entropy", hidden)  # the entropy is always computed
    mask = needed_mask(NAME, mask)
    check_temperature(NAME, temperature)
    if _op.backend(hidden) == "reference":
        return reference.linear_ppo_loss(
            hidden, rounded_in_float32(weight, rounds), labels, old_logprobs, advantages, mask, bias=bias,
            temperature=temperature, softcap=softcap,
            cliprange=cliprange, cliprange_high=cliprange_high, dual_clip=dual_clip, log_ratio_clamp=log_ratio_clamp,
            ref_logprobs=ref_logprobs, kl_coef=kl_coef, kl_estimator=kl_estimator, entropy_coef=entropy_coef,
            importance_weights=importance_weights, loss_agg_mode=loss_agg_mode, normalizer=normalizer,
            with_logprobs=with_logprobs,
        )  # fmt: skip
    results = _op(
        as_rows(hidden), weight, bias, labels.long().contiguous(), old_logprobs, advantages,
        byte_mask(mask), ref_logprobs, importance_weights, normalizer_tensor(NAME, normalizer, advantages),
        float(temperature), float_or(softcap, None), 1.0 - float(cliprange), 1.0 + float_or(cliprange_high, cliprange),
        float_or(dual_clip, math.inf), float_or(log_ratio_clamp, math.inf),
        kl_coef, code_of(NAME, "kl_estimator", kl_estimator, ESTIMATOR_CODES), entropy_coef,
        code_of(NAME, "loss_agg_mode", loss_agg_mode, AGGREGATION_CODES), rounds,
        *map(wants_gradient, (hidden, weight, bias)),
    )  # fmt: skip
    return results if with_logprobs else results[:2]

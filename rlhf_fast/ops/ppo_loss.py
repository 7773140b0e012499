"""PPO's clipped surrogate loss (Schulman et al. 2017, eq. 7), its gradient and its statistics from one pass.

    r = exp(logprobs - old_logprobs);  loss = mean over the mask of -min(r A, clip(r, 1 - cliprange, 1 + cliprange) A)

Everything except the log-probs is known in advance. So the forward also computes the gradient, and the backward only
scales it.
Specification: reference.ppo_loss. Kernels: csrc/cpu, csrc/cuda, kernels (Triton); the formula is in
csrc/common/policy.h.
"""

from __future__ import annotations

import math

from torch import Tensor

from . import reference
from ._dispatch import Op
from ._inputs import (
    AGGREGATION_CODES,
    ESTIMATOR_CODES,
    check,
    check_policy,
    check_term,
    code_of,
    float_or,
    loss_outputs,
    native_loss,
    needed_mask,
    normalizer_tensor,
    wants_gradient,
)
from .reference import PPO_STATS


def _arguments(
    logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, importance_weights, normalizer, clip_low,
    clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef, aggregation, *with_grads,
):  # fmt: skip
    arguments = (
        logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, importance_weights, *logprobs.shape, clip_low,
        clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef, aggregation, normalizer,
    )  # fmt: skip
    return arguments, with_grads


_op = Op(
    "ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? ref_logprobs, "
    "Tensor? entropy, Tensor? importance_weights, Tensor? normalizer, float clip_low, float clip_high, "
    "float dual_clip, float log_ratio_clamp, float kl_coef, int kl_estimator, float entropy_coef, int aggregation, "
    "bool with_grad, bool with_entropy_grad) -> (Tensor loss, Tensor stats, Tensor grad, Tensor entropy_grad)",
    kernels=native_loss("ppo_loss", _arguments, PPO_STATS, triton="ppo_loss"),
    fake=lambda *args: loss_outputs(args[0], PPO_STATS, *args[-2:]),
    gradients={0: 2, 5: 3},
    statistics=PPO_STATS,
)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    loss_agg_mode: str = "token-mean",
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T) log-probs, advantages and mask -> scalar loss to minimise, and statistics (PPO_STATS) as scalar tensors.

    Floating inputs are float32, bfloat16, float16 or float64, with any strides; the loss is float32 (float64 for
    float64 logprobs). mask is bool or 0/1; values outside it may be NaN. logprobs and entropy receive gradients, the
    other inputs do not.

    old_logprobs: None stands for logprobs.detach(), the old ones of the first step from a rollout: every ratio is 1.
    cliprange, cliprange_high: the ratio is clipped to [1 - cliprange, 1 + cliprange_high] (default: symmetric).
    dual_clip: c > 1 bounds the loss by -c A where A < 0 (Ye et al. 2020). Off by default; verl uses 3.
    log_ratio_clamp: clamps logprobs - old_logprobs to +-log_ratio_clamp before exp. A token that it changes has no
        gradient. Off by default; verl and OpenRLHF use 20.
    ref_logprobs, kl_coef, kl_estimator: add kl_coef * kl_penalty(logprobs, ref_logprobs) per token.
    entropy, entropy_coef: subtract entropy_coef * entropy per token. If kl_coef or entropy_coef is 0, its term is only
        a statistic.
    importance_weights: (B, T), already truncated; multiply the surrogate (for rollouts from another engine).
    loss_agg_mode: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean" or "seq-mean-token-sum-norm".
    normalizer: replaces the divisor of that mode (number of tokens; of sequences; of sequences; T). If all
        micro-batches and ranks divide by the global number, their gradients add up to that of the full batch.
    An empty mask gives a loss of 0 and zero gradients.
    Raises ValueError or TypeError if a shape, dtype, device or option does not fit.
    """
    check(
        "ppo_loss", 2, mask, "logprobs advantages old_logprobs ref_logprobs entropy importance_weights",
        logprobs, advantages, old_logprobs, ref_logprobs, entropy, importance_weights, optional=4,
    )  # fmt: skip
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    check_policy("ppo_loss", cliprange, cliprange_high, dual_clip, log_ratio_clamp)
    kl_coef = check_term("ppo_loss", "kl_coef", kl_coef, "ref_logprobs", ref_logprobs)
    entropy_coef = check_term("ppo_loss", "entropy_coef", entropy_coef, "entropy", entropy)
    if entropy is not None and entropy_coef == 0:  # only a statistic
        entropy = entropy.detach()
    mask = needed_mask("ppo_loss", mask)
    estimator = code_of("ppo_loss", "kl_estimator", kl_estimator, ESTIMATOR_CODES)
    aggregation = code_of("ppo_loss", "loss_agg_mode", loss_agg_mode, AGGREGATION_CODES)
    if _op.backend(logprobs) == "reference":
        return reference.ppo_loss(
            logprobs, old_logprobs, advantages, mask, cliprange=cliprange, cliprange_high=cliprange_high,
            dual_clip=dual_clip, log_ratio_clamp=log_ratio_clamp, ref_logprobs=ref_logprobs, kl_coef=kl_coef,
            kl_estimator=kl_estimator, entropy=entropy, entropy_coef=entropy_coef,
            importance_weights=importance_weights, loss_agg_mode=loss_agg_mode, normalizer=normalizer,
        )  # fmt: skip
    return _op(
        logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, importance_weights,
        normalizer_tensor("ppo_loss", normalizer, logprobs), 1.0 - float(cliprange),
        1.0 + float_or(cliprange_high, cliprange), float_or(dual_clip, math.inf), float_or(log_ratio_clamp, math.inf),
        kl_coef, estimator, entropy_coef,
        aggregation, wants_gradient(logprobs), wants_gradient(entropy),
    )  # fmt: skip

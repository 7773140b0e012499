"""verl's bypass mode, public under compat.verl: the log-probs of the rollout engine are used as the old log-probs.

    log w = log_prob - rollout_log_prob per token, clamped to +-20; KL estimates of the rollout against the policy:
    k1 = -log w,  k2 = (log w)^2 / 2,  k3 = w - 1 - log w

A token or sequence whose estimate exceeds its threshold is rejected: it is removed from the mask. The loss of the
others is compute_policy_loss_vanilla, whose ratio already is w, or compute_policy_loss_reinforce times truncated w.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ._verl_losses import (
    _LOG_RATIO_CLAMP,
    _inside,
    _metrics,
    _need_config,
    compute_policy_loss_reinforce,
    compute_policy_loss_vanilla,
)

_REJECTIONS = (
    *(f"{level}_k{k}" for level in ("token", "seq_sum", "seq_mean") for k in (1, 2, 3)), "seq_max_k2", "seq_max_k3",
)  # fmt: skip


def compute_policy_loss_bypass_mode(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """PPO or REINFORCE against the log-probs of the rollout engine, which are passed as old_log_prob.

    rollout_is_weights is ignored. The options are in config.policy_loss.rollout_correction, under verl's names:

    loss_type: "ppo_clip" or "reinforce".
    rollout_is: "token", "sequence" or None. rollout_is_threshold: "low_high" drops the weights outside, one number
    clamps them. rollout_is_batch_normalize divides the weights by their mean.
    rollout_rs: names such as "token_k1" and "seq_mean_k3", separated by commas. rollout_rs_threshold: one for all names
    or one for each. For k1 it is "low_high" or a number u that means 1/u to u, both as ratios; for k2 and k3 it is the
    largest estimate allowed.

    The metrics are those of the loss and, under rollout_corr/ as in verl, the off-policy measures of the tokens (kl,
    k3_kl, chi2_token), the mean, extremes and effective sample size of the weights, and the rejected shares; verl's
    breakdowns by option and by sequence are missing. An empty mask gives 0 (verl raises).
    """
    _need_config("compute_policy_loss_bypass_mode", config)
    options = config.policy_loss.get("rollout_correction", None)
    if options is None:
        raise ValueError("compute_policy_loss_bypass_mode: needs config.policy_loss.rollout_correction")
    loss_type = options.get("loss_type", "ppo_clip")
    if loss_type not in ("ppo_clip", "reinforce"):
        raise ValueError(f"compute_policy_loss_bypass_mode: loss_type {loss_type!r} must be 'ppo_clip' or 'reinforce'")
    mask = response_mask.bool()
    new, old = _inside(mask, log_prob.detach(), old_log_prob)
    log_ratio = new - old
    metrics = {
        "kl": ops.masked_mean(-log_ratio, mask),
        "k3_kl": ops.masked_mean(log_ratio.expm1() - log_ratio, mask),
        "chi2_token": ops.masked_mean((2 * _clamped(log_ratio)).expm1(), mask),
    }
    weights, threshold = None, options.get("rollout_is_threshold", 2.0)
    if options.get("rollout_is", None) is not None and threshold is not None:
        weights = _weights(log_ratio, mask, options.get("rollout_is"), threshold)
        metrics |= _weight_metrics(weights, log_ratio, mask, options.get("rollout_is"))
        if options.get("rollout_is_batch_normalize", False):
            weights = weights / _batch_mean(weights, mask, options.get("rollout_is"))
    kept = mask
    if options.get("rollout_rs", None) is not None:
        kept = mask & _within(log_ratio, mask, options.get("rollout_rs"), options.get("rollout_rs_threshold", None))
        metrics["rollout_rs_masked_fraction"] = ops.masked_mean((~kept).float(), mask)
        metrics["rollout_rs_seq_masked_fraction"] = ops.masked_mean((mask & ~kept).any(-1).float())
    if loss_type == "ppo_clip":
        loss, of_loss = compute_policy_loss_vanilla(old_log_prob, log_prob, advantages, kept, loss_agg_mode, config)
    else:
        loss, of_loss = compute_policy_loss_reinforce(
            old_log_prob, log_prob, advantages, kept, loss_agg_mode, config, weights
        )
    measured = _metrics(**metrics)
    return loss, of_loss | {name.replace("actor/", "rollout_corr/"): value for name, value in measured.items()}


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP)


def _numbers(name: str, text: str) -> list[float]:
    """The numbers in "0.5_2" or "2": one or two, positive, in ascending order."""
    try:
        values = [float(part) for part in text.strip().split("_")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or min(values) <= 0 or values != sorted(values):
        raise ValueError(f"compute_policy_loss_bypass_mode: {name} {text!r} must be 'high' or 'low_high', positive")
    return values


def _weights(log_ratio: Tensor, mask: Tensor, level: str, threshold: str | float) -> Tensor:
    """(B, T) weights of tokens or of their sequences, 0 outside the mask.

    A threshold of one number clamps them; "low_high" sets those outside to 0.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"compute_policy_loss_bypass_mode: rollout_is {level!r} must be 'token', 'sequence' or None")
    weights = _clamped(_by_level(log_ratio, level)).exp() * mask
    *low, high = _numbers("rollout_is_threshold", str(threshold))
    if not low:
        return weights.clamp(max=high)
    return torch.where((weights >= low[0]) & (weights <= high), weights, 0.0)


def _by_level(log_ratio: Tensor, level: str) -> Tensor:
    return log_ratio if level == "token" else log_ratio.sum(-1, keepdim=True)


def _weight_metrics(weights: Tensor, log_ratio: Tensor, mask: Tensor, level: str) -> dict[str, Tensor]:
    """As in verl, the extremes are those of the clamped weights for "token", and of the raw weights for "sequence"."""
    mean = ops.masked_mean(weights, mask)
    if weights.numel() == 0:
        least = most = mean
    elif level == "sequence":
        total = log_ratio.sum(-1)
        least, most = total.amin().exp(), total.amax().clamp(max=_LOG_RATIO_CLAMP).exp()
    else:
        least, most = weights.masked_fill(~mask, math.inf).amin(), weights.masked_fill(~mask, -math.inf).amax()
    some = mask.any()
    return {
        "rollout_is_mean": mean,
        "rollout_is_min": torch.where(some, least, 0.0),
        "rollout_is_max": torch.where(some, most, 0.0),
        "rollout_is_eff_sample_size": mean.square() / ops.masked_mean(weights.square(), mask).clamp(min=1e-30),
    }


def _batch_mean(weights: Tensor, mask: Tensor, level: str) -> Tensor:
    """The mean weight over the tokens or sequences of all ranks; 1 if all weights are 0."""
    if level == "sequence":
        weights, mask = ops.masked_mean(weights, mask, -1), mask.any(-1)
    totals = torch.stack([(weights * mask).sum(), mask.sum().to(weights.dtype)])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    mean = totals[0] / totals[1].clamp(min=1)
    return torch.where(mean > 1e-8, mean, 1.0)


def _within(log_ratio: Tensor, mask: Tensor, names: str, thresholds: str | float | None) -> Tensor:
    """(B, T) bool: whether every named estimate of the token, or of its sequence, lies within its threshold."""
    names = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    parts = [] if thresholds is None else [part for part in str(thresholds).split(",") if part.strip()]
    if not names or len(parts) not in (1, len(names)):
        raise ValueError(
            f"compute_policy_loss_bypass_mode: rollout_rs_threshold {thresholds!r} must be one number for all of "
            f"rollout_rs {names}, or one for each, separated by commas"
        )
    x = _clamped(log_ratio)
    estimates = {"1": -x, "2": x.square() / 2, "3": x.expm1() - x}
    kept = torch.ones_like(mask)
    for name, part in zip(names, parts * (len(names) // len(parts)), strict=True):
        if name not in _REJECTIONS:
            raise ValueError(
                f"compute_policy_loss_bypass_mode: rollout_rs {name!r} must be one of {', '.join(_REJECTIONS)}"
            )
        values = _numbers("rollout_rs_threshold", part)
        estimate = torch.where(mask, estimates[name[-1]], 0.0)
        if name.startswith("seq_sum"):
            estimate = estimate.sum(-1, keepdim=True)
        elif name.startswith("seq_mean"):
            estimate = ops.masked_mean(estimate, mask, -1)[:, None]
        elif name.startswith("seq_max") and estimate.numel():  # k2 and k3 are >= 0, the value outside the mask
            estimate = estimate.amax(-1, keepdim=True)
        if name.endswith("k1"):
            low, high = values if len(values) == 2 else (1 / values[0], values[0])
            if low > high:
                raise ValueError(
                    f"compute_policy_loss_bypass_mode: rollout_rs_threshold {part!r} of {name} must be 1 or more"
                )
            kept &= (estimate >= math.log(low)) & (estimate <= math.log(high))
        elif len(values) == 2:
            raise ValueError(
                f"compute_policy_loss_bypass_mode: rollout_rs_threshold {part!r} of {name} must be one number"
            )
        else:
            kept &= estimate <= values[0]
    return kept

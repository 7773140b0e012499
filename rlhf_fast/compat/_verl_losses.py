"""verl's aggregation and policy losses, public under compat.verl.

Shapes: all tensors are (B, T); advantages and rollout_is_weights may be (B, 1), one per response. A policy loss takes
(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights), the old log-probs first,
and returns (scalar loss, metrics as floats). config is verl's ActorConfig or any object with its fields.
rollout_is_weights multiply the losses of the tokens and receive no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops.reference import aggregate, as_accumulator
from ._shared import _fitted

_LOG_RATIO_CLAMP = 20.0


def _aggregation(mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None) -> dict:
    """verl's arguments as ours: loss_agg_mode and normalizer. dp_size undoes the averaging of gradients over ranks."""
    if mode == "token-sum":
        return {"loss_agg_mode": "token-mean", "normalizer": 1 / dp_size}
    name, count = ("batch_num_tokens", batch_num_tokens)
    if mode != "token-mean":
        name, count = ("global_batch_size", global_batch_size)
    if count is None and dp_size > 1:
        raise ValueError(f"agg_loss: {mode} over dp_size {dp_size} needs {name}, the number of the whole batch")
    normalizer = None if count is None else count / dp_size
    if mode == "seq-mean-token-sum-norm":
        sequences = mask.bool().any(-1).sum().clamp(min=1) if normalizer is None else normalizer
        normalizer = sequences * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return {"loss_agg_mode": mode, "normalizer": normalizer}


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """(B, T) losses -> scalar. An empty mask gives 0 (verl: NaN); sequences without a token do not count.

    loss_agg_mode is "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean" or
    "seq-mean-token-sum-norm", which divides the mean of the sums by loss_scale_factor (T by default). batch_num_tokens
    and global_batch_size count the tokens and sequences of the global batch and are needed if dp_size > 1.
    """
    options = _aggregation(loss_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    return aggregate(as_accumulator(loss_mat), loss_mask, options["loss_agg_mode"], options["normalizer"])


def _inside(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors in float32, with 0 outside the mask, so that the values there reach no gradient."""
    return [torch.where(mask.bool(), as_accumulator(x), 0.0) for x in tensors]


def _clip_range(config) -> dict:
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return {"cliprange": low, "cliprange_high": high}


def _need_config(name: str, config) -> None:
    if config is None:
        raise ValueError(f"{name}: needs config, the actor's (clip_ratio, global_batch_info, ...)")


def _metrics(**tensors: Tensor | float) -> dict[str, float]:
    """The metrics as floats, as in verl, with one synchronisation for all of them."""
    values = torch.stack([torch.as_tensor(x).detach().float().cpu() for x in tensors.values()])
    return {f"actor/{name}": value for name, value in zip(tensors, values.tolist(), strict=True)}


def _aggregated(losses, mask, rollout_is_weights, mode, config) -> Tensor:
    if rollout_is_weights is not None:
        losses = losses * _inside(mask, rollout_is_weights.detach())[0]
    return agg_loss(losses, mask, mode, **config.global_batch_info)


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PPO with the log-ratio clamped to +-20 and a dual clip -> (pg_loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower).

    The old log-probs come first (OpenRLHF and rlhf_fast.ppo_loss: second). An empty mask gives 0 (verl: NaN).
    ppo_kl is the mean of old - new log-probs; verl computes it after the clamp, we compute it before.
    """
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    if low is None or high is None:
        raise ValueError("compute_policy_loss: needs cliprange, or both cliprange_low and cliprange_high")
    loss, stats = ops.ppo_loss(
        log_prob, old_log_prob, _fitted(advantages, log_prob), response_mask, cliprange=low, cliprange_high=high,
        dual_clip=clip_ratio_c, log_ratio_clamp=_LOG_RATIO_CLAMP, **_aggregation(response_mask, loss_agg_mode),
    )  # fmt: skip
    return loss, stats["clipfrac_high"] + stats["clipfrac_low"], stats["approx_kl_k1"], stats["dual_clipfrac"]


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """compute_policy_loss with the options from config: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c."""
    _need_config("compute_policy_loss_vanilla", config)
    loss, stats = ops.ppo_loss(
        log_prob, old_log_prob, _fitted(advantages, log_prob), response_mask, **_clip_range(config),
        dual_clip=config.get("clip_ratio_c", 3.0), log_ratio_clamp=_LOG_RATIO_CLAMP,
        importance_weights=_fitted(rollout_is_weights, log_prob),
        **_aggregation(response_mask, loss_agg_mode, **config.global_batch_info),
    )  # fmt: skip
    return loss, _metrics(
        pg_clipfrac=stats["clipfrac_high"] + stats["clipfrac_low"],
        ppo_kl=stats["approx_kl_k1"],
        pg_clipfrac_lower=stats["dual_clipfrac"],
    )


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """GSPO (arXiv 2507.18071): the ratio is the geometric mean over the sequence, the gradient that of each token."""
    _need_config("compute_policy_loss_gspo", config)
    log_prob, old_log_prob = _inside(response_mask, log_prob, old_log_prob)
    mean = ops.masked_mean((log_prob - old_log_prob).detach(), response_mask, -1)[:, None]
    log_ratio = (log_prob - log_prob.detach() + mean).clamp(max=10.0)
    loss, stats = ops.ppo_loss(
        log_ratio, torch.zeros_like(log_ratio), _fitted(advantages, log_ratio), response_mask, **_clip_range(config),
        importance_weights=_fitted(rollout_is_weights, log_prob),
        **_aggregation(response_mask, loss_agg_mode, **config.global_batch_info),
    )  # fmt: skip
    return loss, _metrics(
        pg_clipfrac=stats["clipfrac_high"] + stats["clipfrac_low"],
        ppo_kl=ops.masked_mean(old_log_prob - log_prob, response_mask),
        pg_clipfrac_lower=0.0,
    )


def compute_policy_loss_sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """SAPO (arXiv 2511.20347): a soft gate 4/tau sigma(tau (ratio - 1)) instead of the clip.

    tau is config.tau_pos for positive advantages and config.tau_neg otherwise. The loss is aggregated as
    "seq-mean-token-mean" whatever loss_agg_mode says, as in verl.
    """
    _need_config("compute_policy_loss_sapo", config)
    log_prob, old_log_prob, a = _inside(response_mask, log_prob, old_log_prob, advantages)
    log_ratio = (log_prob - old_log_prob).clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP)
    tau = torch.where(a > 0, a.new_tensor(config.tau_pos), config.tau_neg)  # two numbers would get the default dtype
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * (4 / tau)
    loss = _aggregated(-gate * a, response_mask, rollout_is_weights, "seq-mean-token-mean", config)
    return loss, _metrics(pg_clipfrac=0.0, ppo_kl=ops.masked_mean(-log_ratio, response_mask), pg_clipfrac_lower=0.0)


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """GPG: -A log pi, the plain policy gradient. old_log_prob is not read."""
    _need_config("compute_policy_loss_gpg", config)
    log_prob, a = _inside(response_mask, log_prob, advantages)
    return _aggregated(-a * log_prob, response_mask, rollout_is_weights, loss_agg_mode, config), {}


def _covariance(log_prob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """(B, T) product of the deviations of advantage and log-prob from their means; -inf outside the mask."""
    log_prob, a = log_prob.detach(), advantages.detach()
    cov = (a - ops.masked_mean(a, mask)) * (log_prob - ops.masked_mean(log_prob, mask))
    return torch.where(mask.bool(), cov, -torch.inf)


def compute_policy_loss_clip_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Clip-Cov (arXiv 2505.22617): PPO that drops a share clip_cov_ratio of the tokens.

    They are drawn from the tokens that are not clipped and whose covariance of advantage and log-prob lies between
    clip_cov_lb and clip_cov_ub. These options are fields of config.policy_loss. torch.randperm draws, as in verl, so
    the same seed drops the same tokens.
    """
    _need_config("compute_policy_loss_clip_cov", config)
    options, clip = config.policy_loss, _clip_range(config)
    share = 0.0002 if options.clip_cov_ratio is None else options.clip_cov_ratio
    low = 1.0 if options.clip_cov_lb is None else options.clip_cov_lb
    high = 5.0 if options.clip_cov_ub is None else options.clip_cov_ub
    log_prob, old_log_prob, a = _inside(response_mask, log_prob, old_log_prob, advantages)
    with torch.no_grad():
        ratio = (log_prob - old_log_prob).exp()
        clipped = torch.where(a > 0, ratio > 1 + clip["cliprange_high"], (a < 0) & (ratio < 1 - clip["cliprange"]))
        cov = _covariance(log_prob, a, response_mask)
        candidates = ((cov > low) & (cov < high) & ~clipped).nonzero()
        number = max(int(share * response_mask.sum()), 1)
        dropped = candidates[torch.randperm(len(candidates))[:number].to(candidates.device)]
        keep = torch.ones_like(a).index_put_(tuple(dropped.T), a.new_zeros(()))
        weights = keep if rollout_is_weights is None else keep * as_accumulator(rollout_is_weights)
    loss, stats = ops.ppo_loss(
        log_prob, old_log_prob, a, response_mask, **clip, importance_weights=weights,
        **_aggregation(response_mask, loss_agg_mode, **config.global_batch_info),
    )  # fmt: skip
    return loss, _metrics(pg_clipfrac=ops.masked_mean(1 - keep, response_mask), ppo_kl=stats["approx_kl_k1"])


def compute_policy_loss_kl_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """KL-Cov (arXiv 2505.22617): -ratio A without a clip, plus a penalty ppo_kl_coef |log-ratio| on some tokens.

    The penalty applies to the share kl_cov_ratio of tokens with the largest covariance of advantage and log-prob. Both
    options are fields of config.policy_loss.
    """
    _need_config("compute_policy_loss_kl_cov", config)
    options = config.policy_loss
    share = 0.0002 if options.kl_cov_ratio is None else options.kl_cov_ratio
    coef = 1.0 if options.ppo_kl_coef is None else options.ppo_kl_coef
    log_prob, old_log_prob, a = _inside(response_mask, log_prob, old_log_prob, advantages)
    log_ratio = log_prob - old_log_prob
    cov = _covariance(log_prob, a, response_mask).flatten()
    tokens = int(response_mask.sum())
    top = cov.topk(min(tokens, max(1, int(tokens * share)))).indices
    penalised = torch.zeros_like(cov).index_fill_(0, top, 1.0).view_as(a)
    losses = -a * log_ratio.exp() + coef * penalised * log_ratio.abs()
    loss = _aggregated(losses, response_mask, rollout_is_weights, loss_agg_mode, config)
    return loss, _metrics(ppo_kl=ops.masked_mean(log_ratio.abs(), response_mask))


def compute_policy_loss_geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """GMPO (arXiv 2507.20673): -A exp(mean over the sequence of the clipped log-ratios), averaged over B.

    loss_agg_mode and config.global_batch_info are ignored, as in verl. Each sequence's loss is multiplied by the
    geometric mean of its rollout_is_weights.
    """
    _need_config("compute_policy_loss_geo_mean", config)
    clip = _clip_range(config)
    log_prob, old_log_prob, a = _inside(response_mask, log_prob, old_log_prob, advantages)
    log_ratio = log_prob - old_log_prob
    limited = log_ratio.clamp(-clip["cliprange"], clip["cliprange_high"])
    sign = a.sign()
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * limited)
    losses = -ops.masked_mean(a, response_mask, -1) * ops.masked_mean(pessimistic, response_mask, -1).exp()
    if rollout_is_weights is not None:
        weights = (as_accumulator(_fitted(rollout_is_weights.detach(), a)) + 1e-10).log()
        losses = losses * ops.masked_mean(weights, response_mask, -1).exp()
    clipped = log_ratio != limited
    return ops.masked_mean(losses), _metrics(
        pg_clipfrac=ops.masked_mean((clipped & (a > 0)).float(), response_mask),
        ppo_kl=ops.masked_mean(-log_ratio, response_mask),
        pg_clipfrac_lower=ops.masked_mean((clipped & (a < 0)).float(), response_mask),
    )


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """CISPO (arXiv 2506.13585): -clip(ratio).detach() A log pi, so a clipped token still has a gradient."""
    _need_config("compute_policy_loss_cispo", config)
    clip = _clip_range(config)
    log_prob, old_log_prob, a = _inside(response_mask, log_prob, old_log_prob, advantages)
    log_ratio = (log_prob - old_log_prob).detach().clamp(-_LOG_RATIO_CLAMP, _LOG_RATIO_CLAMP)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip["cliprange"], 1 + clip["cliprange_high"])
    loss = _aggregated(-clipped * a * log_prob, response_mask, rollout_is_weights, loss_agg_mode, config)
    return loss, _metrics(
        pg_clipfrac=ops.masked_mean((ratio != clipped).float(), response_mask),
        ppo_kl=ops.masked_mean(-log_ratio, response_mask),
        pg_clipfrac_lower=0.0,
    )


def compute_policy_loss_reinforce(
    rollout_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config=None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """REINFORCE: -A log pi, times rollout_is_weights. rollout_log_prob is only used for the metric."""
    _need_config("compute_policy_loss_reinforce", config)
    log_prob, rollout, a = _inside(response_mask, log_prob, rollout_log_prob, advantages)
    loss = _aggregated(-a * log_prob, response_mask, rollout_is_weights, loss_agg_mode, config)
    return loss, _metrics(ppo_kl=ops.masked_mean(rollout - log_prob, response_mask))

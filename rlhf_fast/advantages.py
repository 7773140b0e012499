"""From scores to the advantages that weight the policy gradient. B sequences, T response tokens; sums over t skip
padding.

scores           the reward's, scaled, clipped, minus penalties for answers that are cut or long
rewards          rewards_t = -kl_coef KL_t, plus the score on the last token (Ziegler et al. 2019, eq. 2)
REINFORCE        grad = E[ sum_t grad log pi(a_t | s_t) A ],  R = sum_t rewards_t
baselines        A = R - b, b the mean of the batch, of the other answers to the prompt (RLOO), or of all answers to it
GAE              rlhf_fast.gae, with V(s_t) as the baseline
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


def shaped_scores(
    scores: Tensor, lengths: Tensor, ended: Tensor, *, clip_range: tuple[float, float] | None,
    missing_eos_penalty: float | None, length_penalty: float, length_budget: int,
) -> Tensor:  # fmt: skip
    """(B,) scores, lengths in tokens, and whether the response ends with eos -> (B,) scores to train on.

    The penalties are subtracted after clipping, so they also lower a score at the limit. length_penalty is per token
    beyond length_budget. For responses of at most R tokens, length_budget R - b with length_penalty p / b is DAPO's
    soft overlong punishment (Yu et al. 2025, eq. 13).
    """
    if clip_range is not None:
        scores = scores.clamp(*clip_range)
    if missing_eos_penalty is not None:
        scores = scores - missing_eos_penalty * ~ended
    return scores - length_penalty * (lengths - length_budget).clamp(min=0)


class RunningStd:
    """The standard deviation of all scores so far, to divide scores by (Engstrom et al. 2020). Chan's update."""

    def __init__(self, count: float = 0.0, mean: float = 0.0, squares: float = 0.0):
        self.count, self.mean, self.squares = count, mean, squares  # squares: sum of squared deviations

    def update(self, scores: Tensor) -> float:
        """Adds (B,) scores -> the standard deviation of all scores so far; 1 while they are all equal."""
        scores = scores.double()
        count, mean = len(scores), float(scores.mean())
        total, shift = self.count + count, mean - self.mean
        self.squares += float((scores - mean).square().sum()) + shift * shift * self.count * count / total
        self.mean, self.count = self.mean + shift * count / total, total
        return (self.squares / self.count) ** 0.5 or 1.0


def kl_shaped_rewards(scores: Tensor, mask: Tensor, kl: Tensor | None = None, *, kl_coef: float = 0.0) -> Tensor:
    """(B,) scores, (B, T) mask and KL per token, nats -> (B, T) rewards per token, 0 outside the mask: -kl_coef KL,
    plus the score on the last token in the mask.

    That is eos, or the token at which the response was cut. The mask may have gaps (for example the output of a tool).
    A row without tokens gets no score.
    """
    mask = mask.bool()
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    rewards = last * scores[:, None]
    return rewards if kl is None else rewards - kl_coef * kl.masked_fill(~mask, 0.0)


def sequence_advantages(
    rewards: Tensor, mask: Tensor, baseline: str, group_size: int = 1, *, scale: str = "none"
) -> Tensor:
    """(B, T) per-token rewards -> (B, T) advantages without a critic: R - b on every token of the response, where R is
    the sum of its rewards.

    The response is one action (Ahmadian et al. 2024).
    baseline: a key of BASELINES.
    scale: divide by the standard deviation of R, over the "batch" or within the "group" (GRPO), plus TRL's 1e-4. "none"
    leaves the gradient unbiased.
    """
    # In float64 the mean of equal float32 numbers is exactly that number. A float32 mean may be off by a rounding
    # error, which would become a full-sized advantage when it is divided by a standard deviation near 0.
    returns = rewards.double().sum(1)
    advantages = returns - BASELINES[baseline](returns, group_size)
    if scale != "none":
        groups = _grouped(returns, group_size if scale == "group" else len(returns))
        std = groups.std(1, keepdim=True, correction=min(1, groups.shape[1] - 1))  # 0 for a group of one answer
        advantages = advantages / (std.expand_as(groups).reshape(-1) + 1e-4)
    return advantages.to(rewards.dtype)[:, None] * mask


def batch_mean_baseline(scores: Tensor, group_size: int = 1) -> Tensor:
    """(B,) scores -> (B,) the mean of all of them, whatever the groups."""
    return scores.mean().expand_as(scores)


def group_mean_baseline(scores: Tensor, group_size: int) -> Tensor:
    """(B,) scores, the group_size answers to a prompt adjacent -> (B,) mean of the group (GRPO, Shao et al. 2024)."""
    return _grouped(scores, group_size).mean(1, keepdim=True).expand(-1, group_size).reshape(-1)


def leave_one_out_baseline(scores: Tensor, group_size: int) -> Tensor:
    """(B,) scores -> (B,) mean of the other answers to the same prompt (RLOO, Ahmadian et al. 2024).

    Unlike the mean of the whole group, it does not depend on the answer itself, so the gradient stays unbiased.
    ValueError if group_size is below 2.
    """
    if group_size < 2:
        raise ValueError(f"leave_one_out_baseline: needs at least 2 answers per prompt, got group_size {group_size}")
    groups = _grouped(scores, group_size)
    return ((groups.sum(1, keepdim=True) - groups) / (group_size - 1)).reshape(-1)


BASELINES = {"reinforce": batch_mean_baseline, "rloo": leave_one_out_baseline, "group": group_mean_baseline}


def _grouped(scores: Tensor, group_size: int) -> Tensor:
    if scores.ndim != 1 or group_size < 1 or len(scores) % group_size:
        raise ValueError(
            f"baseline: scores {tuple(scores.shape)} must be (prompts * group_size,) with group_size {group_size}"
        )
    return scores.reshape(-1, group_size)


@dataclass
class KLController:
    """kl_coef: fixed if target is None, else adapted to reach a target KL (Ziegler et al. 2019, section 2.2).

    target: in the unit of objective/kl, nats per sequence, summed over its tokens. (6.0 is customary for 24-token
    responses. verl and OpenRLHF use the mean per token, so divide by the response length to compare.)
    horizon: the number of sequences over which a 20 % error changes kl_coef by 20 %.
    """

    kl_coef: float
    target: float | None = None
    horizon: float = 10_000

    def update(self, kl: float, num_sequences: int) -> None:
        """Adapts kl_coef to the measured KL of num_sequences sequences."""
        if self.target is not None and math.isfinite(kl):  # a NaN or inf of one batch must not reach the coefficient
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * num_sequences / self.horizon

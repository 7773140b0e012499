"""From scores to what the policy gradient is weighted with. B sequences, T response tokens; sums over t skip padding.

REINFORCE        grad = E[ sum_t grad log pi(a_t | s_t) A ]
baselines        A = R - b, b the mean of the batch, of the other answers to the prompt (RLOO), or of all of them
against drift    rewards_t = -kl_coef KL_t, plus the score on the last token (Ziegler et al. 2019, eq. 2)
GAE              rlhf_fast.gae, with V(s_t) as the baseline
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import kl_penalty


def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float, kl_estimator: str = "k1"
) -> tuple[Tensor, Tensor]:
    """(B,) scores, the rest (B, T) -> per-token rewards and KL estimate in nats, both (B, T), 0 outside the mask.

    The score lands on the last token of the mask: eos, or where the response was cut. A row without tokens gets none.
    """
    mask = mask.bool()
    kl = kl_penalty(logprobs, ref_logprobs, estimator=kl_estimator).masked_fill(~mask, 0.0)
    last = torch.arange(mask.shape[1], device=mask.device) == (mask.sum(1, keepdim=True) - 1)
    return -kl_coef * kl + last * scores[:, None], kl


def batch_mean_baseline(scores: Tensor) -> Tensor:
    """(B,) scores -> (B,) the same mean everywhere."""
    return scores.mean().expand_as(scores)


def group_mean_baseline(scores: Tensor, group_size: int) -> Tensor:
    """(B,) scores, the group_size answers to a prompt side by side -> (B,) their mean (GRPO, Shao et al. 2024)."""
    return _grouped(scores, group_size).mean(1, keepdim=True).expand(-1, group_size).reshape(-1)


def leave_one_out_baseline(scores: Tensor, group_size: int) -> Tensor:
    """(B,) scores -> (B,) mean of the other answers to the same prompt (Ahmadian et al. 2024, RLOO), which unlike the
    group's mean is independent of the answer itself and leaves the gradient unbiased. Needs group_size >= 2."""
    if group_size < 2:
        raise ValueError(f"leave_one_out_baseline: needs at least 2 answers a prompt, got group_size {group_size}")
    groups = _grouped(scores, group_size)
    return ((groups.sum(1, keepdim=True) - groups) / (group_size - 1)).reshape(-1)


def _grouped(scores: Tensor, group_size: int) -> Tensor:
    if scores.ndim != 1 or group_size < 1 or len(scores) % group_size:
        raise ValueError(
            f"baseline: scores {tuple(scores.shape)} must be (prompts * group_size,) with group_size {group_size}"
        )
    return scores.reshape(-1, group_size)


@dataclass
class KLController:
    """kl_coef, fixed where target is None, else moved toward a target KL (Ziegler et al. 2019, section 2.2).

    The unit of target is objective/kl: nats per sequence, summed over its tokens (6.0 is customary for 24-token
    responses; verl and OpenRLHF give the mean per token, so divide by the response length to compare).
    horizon is the number of sequences over which a 20 % error changes kl_coef by 20 %.
    """

    kl_coef: float
    target: float | None = None
    horizon: float = 10_000

    def update(self, kl: float, num_sequences: int) -> None:
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * num_sequences / self.horizon

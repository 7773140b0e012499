"""verl's advantage estimators for one scalar reward per response, and GAE; public under compat.verl.

Shapes: B responses, T tokens. token_level_rewards and response_mask are (B, T); index (B,) names the prompt of each
response (strings, numbers or a tensor), and responses to one prompt form a group. Every function returns
(advantages, returns), both (B, T), 0 outside the mask, without gradient.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops.reference import as_accumulator


def _scores(token_level_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """(B, T) -> (B,) sums. Finite rewards outside the mask count too, as in verl: if a response ends with an
    observation, its reward lies there."""
    rewards = as_accumulator(token_level_rewards.detach())
    return torch.where(response_mask.bool() | rewards.isfinite(), rewards, 0.0).sum(-1)


def _groups(index, like: Tensor) -> Tensor:
    """(B,) prompt names -> (B,) group numbers from 0."""
    names = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    return torch.from_numpy(np.unique(names, return_inverse=True)[1].reshape(-1)).to(like.device)


def _group_sum(x: Tensor, group: Tensor) -> Tensor:
    """(B,) -> (B,): for each response the sum of x over its group."""
    return torch.zeros_like(x).index_add_(0, group, x)[group]


def _group_moments(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each response the size, mean and unbiased standard deviation of its group. A group of one has mean 0 and
    standard deviation 1."""
    size = _group_sum(torch.ones_like(scores), group)
    alone = size == 1
    mean = _group_sum(scores, group) / size
    std = (_group_sum((scores - mean).square(), group) / (size - 1).clamp(min=1)).sqrt()
    return size, mean.masked_fill(alone, 0.0), std.masked_fill(alone, 1.0)


def _spread(scores: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) -> (B, T) advantages, twice, because they are also the returns."""
    advantages = torch.where(response_mask.bool(), scores[:, None], 0.0)
    return advantages, advantages


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE that skips masked tokens. The advantages are whitened; the returns are computed from them before that.

    verl raises if the mask has one token or none, and its returns outside the mask are values, not 0.
    """
    rewards = as_accumulator(token_level_rewards)
    advantages, returns = ops.gae(rewards, values, response_mask, gamma=float(gamma), lam=float(lam))
    return ops.masked_whiten(advantages, response_mask), returns


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config=None,
) -> tuple[Tensor, Tensor]:
    """GRPO: (score - group mean) / (group std + epsilon). A group of one gets its score.

    norm_adv_by_std_in_grpo=False leaves the division out (Dr. GRPO).
    """
    scores = _scores(token_level_rewards, response_mask)
    _, mean, std = _group_moments(scores, _groups(index, scores))
    return _spread((scores - mean) / (std + epsilon) if norm_adv_by_std_in_grpo else scores - mean, response_mask)


# verl has both as one loop and one vectorised function; this is vectorised already.
compute_grpo_vectorized_outcome_advantage = compute_grpo_outcome_advantage


def compute_grpo_passk_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config=None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Pass@k (arXiv 2503.19595): the best of each group gets best - second best (divided by the std), the others 0.

    config.get("norm_adv_by_std_in_grpo") overrides the argument, as in verl. Raises ValueError for a group of one.
    """
    if config is not None:
        norm_adv_by_std_in_grpo = config.get("norm_adv_by_std_in_grpo", True)
    scores = _scores(token_level_rewards, response_mask)
    group = _groups(index, scores)
    size, _, std = _group_moments(scores, group)
    if (size < 2).any():
        raise ValueError("compute_grpo_passk_outcome_advantage: needs at least 2 responses for each prompt")
    order = scores.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, the best first
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = group[order].diff() != 0
    best, second = order[first], order[first.roll(1)]
    gain = scores[best] - scores[second]
    if norm_adv_by_std_in_grpo:
        gain = gain / (std[best] + epsilon)
    return _spread(torch.zeros_like(scores).index_copy_(0, best, gain), response_mask)


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index, epsilon: float = 1e-6, config=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """RLOO (arXiv 2402.14740): score - mean of the others in its group. A group of one gets its score."""
    return _rloo(token_level_rewards, response_mask, index, keep_alone=True)


def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index, epsilon: float = 1e-6, config=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """compute_rloo_outcome_advantage, except that a group of one gets 0, as in verl."""
    return _rloo(token_level_rewards, response_mask, index, keep_alone=False)


def _rloo(token_level_rewards: Tensor, response_mask: Tensor, index, keep_alone: bool) -> tuple[Tensor, Tensor]:
    """keep_alone: whether a group of one gets its score, or 0."""
    scores = _scores(token_level_rewards, response_mask)
    size, mean, _ = _group_moments(scores, _groups(index, scores))
    left_out = (scores - mean) * size / (size - 1).clamp(min=1)
    return _spread(torch.where(size > 1, left_out, scores if keep_alone else 0.0), response_mask)


def compute_opo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index, epsilon: float = 1e-6, config=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """OPO (arXiv 2505.23585): score - length-weighted mean of its group. A group of one gets its score.

    If all responses of a group are empty, the baseline is 0 (verl: NaN).
    """
    scores = _scores(token_level_rewards, response_mask)
    group, length = _groups(index, scores), response_mask.bool().sum(-1).to(scores.dtype)
    size, total = _group_sum(torch.ones_like(scores), group), _group_sum(length, group)
    baseline = _group_sum(length * scores, group) / total.clamp(min=1)
    return _spread(torch.where(size > 1, scores - baseline, scores), response_mask)


def compute_gpg_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index,
    epsilon: float = 1e-6,
    f_norm: float = 1.0,
    alpha: float = 1.0,
    config=None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """GPG: alpha (score - group mean) / f_norm, where alpha = B / number of nonzero scores.

    The argument alpha is ignored.
    """
    scores = _scores(token_level_rewards, response_mask)
    _, mean, _ = _group_moments(scores, _groups(index, scores))
    alpha = scores.numel() / scores.count_nonzero().clamp(min=1)
    return _spread(alpha * (scores - mean) / f_norm, response_mask)


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """REINFORCE++ (arXiv 2501.03262): whitened rewards-to-go, discounted by config.gamma; masked tokens are skipped.

    Older verl releases lost the reward at the first masked token of a multi-turn response.
    """
    if config is None:
        raise ValueError("compute_reinforce_plus_plus_outcome_advantage: needs config, for its gamma")
    rewards = as_accumulator(token_level_rewards)
    returns, _ = ops.gae(rewards, torch.zeros_like(rewards), response_mask, gamma=float(config.gamma), lam=1.0)
    return ops.masked_whiten(returns, response_mask), returns


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index, epsilon: float = 1e-6, config=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """score - group mean on every token, whitened over the tokens of the batch. The returns equal the advantages."""
    scores = _scores(token_level_rewards, response_mask)
    _, mean, _ = _group_moments(scores, _groups(index, scores))
    advantages = ops.masked_whiten(_spread(scores - mean, response_mask)[0], response_mask)
    return advantages, advantages


def compute_remax_outcome_advantage(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """ReMax (arXiv 2310.10505): rewards-to-go minus reward_baselines (B,), the rewards of the greedy responses.

    Outside the mask the returns are 0; verl's are not 0 between two turns.
    """
    mask = response_mask.bool()
    rewards = torch.where(mask, as_accumulator(token_level_rewards.detach()), 0.0)
    returns = torch.where(mask, rewards.flip(-1).cumsum(-1).flip(-1), 0.0)
    return torch.where(mask, returns - reward_baselines.detach()[:, None], 0.0), returns

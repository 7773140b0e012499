"""The loss of a reward model over K ranked responses (Ouyang et al. 2022, eq. 1), over all pairs with unequal ranks.

    loss = mean over prompts of the mean over pairs with rank_i < rank_j of -log sigma(r_i - r_j)

Specification: reference.ranking_loss. Kernels: csrc/cpu/pairwise_loss.cpp, csrc/cuda/ranking_loss.cu.
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._dispatch import Op
from ._inputs import INTEGERS, check, check_tensors, dtype_error, loss_outputs, native_loss
from .reference import RANKING_STATS, ranks_of_counts


def _arguments(rewards, ranks):
    return (rewards, ranks.contiguous(), *rewards.shape), (True,)


_op = Op(
    "ranking_loss(Tensor rewards, Tensor ranks) -> (Tensor loss, Tensor stats, Tensor grad)",
    kernels=native_loss("ranking_loss", _arguments, RANKING_STATS),
    fake=lambda rewards, _: loss_outputs(rewards, RANKING_STATS, True),
    gradients={0: 2},
    statistics=RANKING_STATS,
)


def ranking_loss(rewards: Tensor, ranks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, K) rewards and integer ranks -> scalar loss and statistics over all pairs (RANKING_STATS).

    ranks (B, K): rank 0 is the best. Equal ranks are ties and make no pair. A negative rank marks padding, whose reward
    may be NaN. Or ranks (B,): the number of responses to each prompt, which are then ordered best first, followed by
    padding.
    Each prompt has the same weight, whatever the number of its pairs. A prompt without a pair does not count; if no
    prompt has one, the loss is 0.
    rewards are float32, bfloat16, float16 or float64 and receive the gradient; the loss is float32 (float64 for
    float64). Raises ValueError or TypeError if a shape, dtype or device does not fit.
    """
    check("ranking_loss", 2, None, "rewards", rewards)
    check_tensors("ranking_loss", ranks=ranks)
    if ranks.shape not in (rewards.shape, rewards.shape[:1]) or ranks.device != rewards.device:
        raise ValueError(
            f"ranking_loss: ranks {tuple(ranks.shape)} on {ranks.device} must have the shape and device of rewards "
            f"{tuple(rewards.shape)} on {rewards.device}, or be (B,) counts"
        )
    if ranks.dtype not in INTEGERS:
        raise dtype_error("ranking_loss", "ranks", ranks, "integers")
    ranks = ranks.long()
    if ranks.ndim == 1:
        ranks = ranks_of_counts(ranks, rewards.shape[1])
    if _op.backend(rewards) == "reference":
        return reference.ranking_loss(rewards, ranks)
    return _op(rewards, ranks)

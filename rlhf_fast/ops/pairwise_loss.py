"""The Bradley-Terry loss of a reward model, with soft labels. One pass computes loss, gradients and statistics.

    d = chosen - rejected - margin;  loss = -p log sigma(d) - (1 - p) log sigma(-d) + center_coef (chosen + rejected)^2

With p = 1 this is the loss of Ouyang et al. 2022; with a judge's probability p it is that of RLAIF (Bai et al. 2022b).
The last term centres the rewards around 0 (Eisenstein et al. 2023).
Specification: reference.pairwise_loss. Kernels: csrc/cpu, csrc/cuda, kernels (Triton).
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._dispatch import Op
from ._inputs import NO_NUMBER, check, loss_outputs, native_loss, refuse_no_number, wants_gradient
from .reference import PAIRWISE_STATS


def _arguments(
    chosen, rejected, margin, target_prob, weights, margin_value, prob_value, center_coef, with_grad
):  # fmt: skip
    arguments = (
        chosen, rejected, None, None, margin, target_prob, weights, chosen.shape[0], 1.0, margin_value, prob_value,
        center_coef,
    )  # fmt: skip
    return arguments, (with_grad, with_grad)


_op = Op(
    "pairwise_loss(Tensor chosen, Tensor rejected, Tensor? margin, Tensor? target_prob, Tensor? weights, "
    "float margin_value, float prob_value, float center_coef, bool with_grad) "
    "-> (Tensor loss, Tensor stats, Tensor grad_chosen, Tensor grad_rejected)",
    kernels=native_loss("pairwise_loss", _arguments, PAIRWISE_STATS, triton="pairwise_loss"),
    fake=lambda chosen, *args: loss_outputs(chosen, PAIRWISE_STATS, args[-1], args[-1]),
    gradients={0: 2, 1: 3},
    statistics=PAIRWISE_STATS,
)


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    target_prob: Tensor | float | None = None,
    center_coef: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) rewards of the preferred and of the other response -> scalar loss and statistics (PAIRWISE_STATS).

    Inputs are float32, bfloat16, float16 or float64; the loss is float32 (float64 for float64 rewards). Both rewards
    receive gradients.
    margin: (B,) or a number, by how much chosen must be better. target_prob: (B,) or a number in [0, 1], the
    probability that chosen is better; 1 by default. weights: (B,) >= 0; the loss is the weighted mean over the pairs.
    In the statistics, accuracy counts chosen > rejected, and a tie as one half; reward_mean and reward_std are over
    both responses. An empty batch, or one whose weights are all 0, gives 0.
    Raises ValueError or TypeError if a shape, dtype or device does not fit.
    """
    margins = _per_pair(margin, chosen) if isinstance(margin, Tensor) else None
    probs = _per_pair(target_prob, chosen) if isinstance(target_prob, Tensor) else None
    weights = _floating(weights) if isinstance(weights, Tensor) else weights
    check(
        "pairwise_loss", 1, None, "chosen rejected weights margin target_prob",
        chosen, rejected, weights, margins, probs, optional=3,
    )  # fmt: skip
    try:
        margin_value, prob_value = _number(margin, 0.0), _number(target_prob, 1.0)
        center_coef = float(center_coef)
    except NO_NUMBER:
        refuse_no_number(
            "pairwise_loss", optional=("margin", "target_prob"), margin=None if margins is not None else margin,
            target_prob=None if probs is not None else target_prob, center_coef=center_coef,
        )  # fmt: skip
        raise
    if not 0.0 <= prob_value <= 1.0:
        raise ValueError(f"pairwise_loss: target_prob {target_prob} must be a probability, in [0, 1]")
    if _op.backend(chosen) == "reference":
        return reference.pairwise_loss(
            chosen, rejected, margin=margin, target_prob=target_prob, center_coef=center_coef, weights=weights
        )
    return _op(
        chosen, rejected, margins, probs, weights, margin_value, prob_value, center_coef,
        wants_gradient(chosen) or wants_gradient(rejected),
    )  # fmt: skip


def _floating(x: Tensor) -> Tensor:
    """x as a floating tensor: margins and labels of a data set are often integers."""
    return x if x.is_floating_point() or x.is_complex() else x.float()


def _per_pair(x: Tensor, chosen: Tensor) -> Tensor:
    """x as a floating (B,) tensor; a tensor without an axis holds the one number of all pairs."""
    return _floating(x.expand(chosen.shape) if x.ndim == 0 and isinstance(chosen, Tensor) else x)


def _number(x: Tensor | float | None, default: float) -> float:
    return default if x is None or isinstance(x, Tensor) else float(x)

"""Direct preference optimisation (Rafailov et al. 2023, eq. 7): the pairwise loss of implicit rewards.

    reward = beta (log pi(y | x) - log pi_ref(y | x));  loss = -log sigma(reward of chosen - reward of rejected)

Specification: reference.dpo_loss. Kernel: pairwise_loss's, which computes the rewards while it reads the log-probs.
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._dispatch import Op
from ._inputs import NO_NUMBER, check, loss_outputs, native_loss, refuse_no_number, wants_gradient
from .reference import PAIRWISE_STATS


def _arguments(chosen, rejected, ref_chosen, ref_rejected, beta, target_prob, with_grad):
    arguments = (
        chosen, rejected, ref_chosen, ref_rejected, None, None, None, chosen.shape[0], beta, 0.0, target_prob, 0.0
    )  # fmt: skip
    return arguments, (with_grad, with_grad)


_op = Op(  # of its own, so that errors have its name and that of its arguments
    "dpo_loss(Tensor chosen_logprobs, Tensor rejected_logprobs, Tensor ref_chosen_logprobs, "
    "Tensor ref_rejected_logprobs, float beta, float target_prob, bool with_grad) "
    "-> (Tensor loss, Tensor stats, Tensor grad_chosen, Tensor grad_rejected)",
    kernels=native_loss("pairwise_loss", _arguments, PAIRWISE_STATS, triton="pairwise_loss"),
    fake=lambda chosen, *args: loss_outputs(chosen, PAIRWISE_STATS, args[-1], args[-1]),
    gradients={0: 2, 1: 3},
    statistics=PAIRWISE_STATS,
)


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) log-probs of whole responses (sums over their tokens) -> scalar loss and statistics (PAIRWISE_STATS).

    The statistics describe the implicit rewards. The policy's log-probs receive gradients; the reference's do not.
    label_smoothing is the probability that a preference is flipped (conservative DPO, Mitchell 2023).
    Inputs are float32, bfloat16, float16 or float64; the loss is float32 (float64 for float64 inputs). An empty batch
    gives 0. Raises ValueError or TypeError if a shape, dtype, device or label_smoothing does not fit.
    """
    check(
        "dpo_loss", 1, None, "chosen_logprobs rejected_logprobs ref_chosen_logprobs ref_rejected_logprobs",
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs,
    )  # fmt: skip
    try:
        beta, outside = float(beta), not 0.0 <= label_smoothing <= 1.0
    except NO_NUMBER:
        refuse_no_number("dpo_loss", beta=beta, label_smoothing=label_smoothing)
        raise
    if outside:
        raise ValueError(f"dpo_loss: label_smoothing {label_smoothing} must be a probability, in [0, 1]")
    if _op.backend(chosen_logprobs) == "reference":
        return reference.dpo_loss(
            chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta=beta,
            label_smoothing=label_smoothing,
        )  # fmt: skip
    return _op(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta,
        1.0 - float(label_smoothing), wants_gradient(chosen_logprobs) or wants_gradient(rejected_logprobs),
    )  # fmt: skip

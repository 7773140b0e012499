"""The Bradley-Terry loss of a reward model, with soft labels: one pass gives loss, gradients and statistics.

    d = chosen - rejected - margin;  loss = -p log sigma(d) - (1 - p) log sigma(-d) + center_coef (chosen + rejected)^2

p = 1 is the loss of Ouyang et al. 2022, p from a judge that of RLAIF (Bai et al. 2022b), the last term centres rewards
(Eisenstein et al. 2023). Specification: reference.pairwise_loss. Kernel: csrc/cpu/pairwise_loss.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._dispatch import _C, DTYPE_CODES, Op
from ._inputs import accumulation_dtype, check, gradient_buffer, grid, wants_gradient
from .reference import PAIRWISE_STATS


def _outputs(chosen: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(chosen)
    loss = torch.empty((), dtype=dtype, device=chosen.device)
    stats = torch.empty(len(PAIRWISE_STATS), dtype=dtype, device=chosen.device)
    return loss, stats, gradient_buffer(chosen, with_grad), gradient_buffer(chosen, with_grad)


def _cpu(chosen, rejected, ref_chosen, ref_rejected, margin, target_prob, weights, scale, margin_value, prob_value,
         center_coef, with_grad):  # fmt: skip
    loss, stats, grad_chosen, grad_rejected = outputs = _outputs(chosen, with_grad)
    _C.pairwise_loss(
        grid(chosen), grid(rejected), grid(ref_chosen), grid(ref_rejected), grid(margin), grid(target_prob),
        grid(weights), chosen.shape[0], scale, margin_value, prob_value, center_coef, DTYPE_CODES[loss.dtype],
        loss.data_ptr(), stats.data_ptr(), grad_chosen.data_ptr(), grad_rejected.data_ptr(),
    )  # fmt: skip
    return outputs


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 12
    grads = [g * grad_loss if n else None for g, n in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)]
    return *grads, *[None] * 10


pairwise_op = Op(
    "pairwise_loss(Tensor chosen, Tensor rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? margin, "
    "Tensor? target_prob, Tensor? weights, float scale, float margin_value, float prob_value, float center_coef, "
    "bool with_grad) -> (Tensor loss, Tensor stats, Tensor grad_chosen, Tensor grad_rejected)",
    kernels={("cpu", "native"): _cpu},
    fake=lambda chosen, *args: _outputs(chosen, args[-1]),
    backward=_grad,
    setup_context=_save,
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

    float32, bfloat16, float16 or float64 in, float32 out (float64 for float64 rewards); both receive gradients.
    margin: (B,) or a number, how much better chosen must be. target_prob: (B,) or a number in [0, 1], the probability
    that chosen is the better one; 1 by default. weights: (B,) >= 0, the loss is the weighted mean.
    accuracy counts chosen > rejected, a tie as one half; reward_mean and reward_std are over both responses.
    An empty batch, or one of weight 0, gives 0. Raises ValueError or TypeError for shapes, dtypes and devices.
    """
    tensors = {"chosen": chosen, "rejected": rejected, "weights": weights}
    margins, probs = (x if isinstance(x, Tensor) else None for x in (margin, target_prob))
    check("pairwise_loss", 1, None, tensors | {"margin": margins, "target_prob": probs})
    if pairwise_op.backend(chosen) == "reference":
        return reference.pairwise_loss(
            chosen, rejected, margin=margin, target_prob=target_prob, center_coef=center_coef, weights=weights
        )
    loss, stats, _, _ = pairwise_op(
        chosen, rejected, None, None, margins, probs, weights, 1.0, _number(margin, 0.0), _number(target_prob, 1.0),
        float(center_coef), wants_gradient(chosen) or wants_gradient(rejected),
    )  # fmt: skip
    return loss, dict(zip(PAIRWISE_STATS, stats.unbind(), strict=True))


def _number(x: Tensor | float | None, default: float) -> float:
    return default if x is None or isinstance(x, Tensor) else float(x)

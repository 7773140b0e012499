"""Estimates of KL(policy || reference) from log-probs of tokens that the policy sampled (Schulman 2020).

    d = logprobs - ref_logprobs;  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d,  abs = |d|

Specification: reference.kl_penalty. Kernels: csrc/cpu, csrc/cuda (formulas: csrc/common/policy.h), kernels (Triton).
"""

from __future__ import annotations

import math

from torch import Tensor

from . import reference
from ._autograd import check_prepared, may_consume
from ._dispatch import Op, is_forced, native
from ._inputs import ESTIMATOR_CODES, as_rows, check, check_limit, code_of, wants_gradient
from ._layout import DTYPE_CODES, accumulation_dtype
from ._native import empties


def _outputs(logprobs: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    return empties(logprobs, None, logprobs, logprobs if with_grad else None)


def _arguments(logprobs, ref_logprobs, estimator, input_clamp, output_clamp, with_grad):
    kl, slope = _outputs(logprobs, with_grad)
    arguments = (
        logprobs, ref_logprobs, *logprobs.shape, estimator, input_clamp, output_clamp, DTYPE_CODES[kl.dtype], kl, slope,
    )  # fmt: skip
    return arguments, (kl, slope)


def _save(ctx, inputs, outputs):
    ctx.save_for_backward(outputs[1])


def _grad(ctx, grad_kl, _):
    if grad_kl is None:
        return (None,) * 6
    (slope,) = ctx.saved_tensors
    check_prepared("kl_penalty", slope.shape == grad_kl.shape)
    grad = slope.mul_(grad_kl) if may_consume(ctx, grad_kl, slope) else slope * grad_kl
    return grad if ctx.needs_input_grad[0] else None, -grad if ctx.needs_input_grad[1] else None, *[None] * 4


_op = Op(
    "kl_penalty(Tensor logprobs, Tensor ref_logprobs, int estimator, float input_clamp, float output_clamp, "
    "bool with_grad) -> (Tensor kl, Tensor slope)",
    kernels=native("kl_penalty", _arguments, scratch=False, triton="kl_penalty"),
    fake=lambda logprobs, *args: _outputs(logprobs, args[-1]),
    backward=_grad,
    setup_context=_save,
)


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    estimator: str = "k1",
    input_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Tensor:
    """Log-probs of the same tokens under two models, both (...) -> (...) estimates in nats; both receive gradients.

    Inputs are float32, bfloat16, float16 or float64; the result is float32 (float64 for float64 logprobs).
    estimator: "k1" ("kl"), "k2" ("mse"), "k3" ("low_var_kl") or "abs". k1 is unbiased and may be negative; k3 is
    unbiased and never negative; the gradient of k2 is that of the true KL.
    input_clamp limits d to +-input_clamp, output_clamp limits the result. Both bias the estimate, so both are off by
    default. Where a clamp changes the value, the gradient is 0.
    Raises ValueError or TypeError if a shape, dtype, device or estimator does not fit.
    """
    check("kl_penalty", None, None, "logprobs ref_logprobs", logprobs, ref_logprobs)
    code = code_of("kl_penalty", "estimator", estimator, ESTIMATOR_CODES)
    one_subtraction = code == 0 and input_clamp is None and output_clamp is None
    if one_subtraction and not is_forced() and _are_accumulators(logprobs, ref_logprobs):
        return logprobs - ref_logprobs  # one subtraction: there is nothing to fuse
    check_limit("kl_penalty", "input_clamp", input_clamp)
    check_limit("kl_penalty", "output_clamp", output_clamp)
    if _op.backend(logprobs) == "reference":
        return reference.kl_penalty(
            logprobs, ref_logprobs, estimator=estimator, input_clamp=input_clamp, output_clamp=output_clamp
        )
    limits = [math.inf if limit is None else float(limit) for limit in (input_clamp, output_clamp)]
    with_grad = wants_gradient(logprobs) or wants_gradient(ref_logprobs)
    kl, _ = _op(as_rows(logprobs), as_rows(ref_logprobs), code, *limits, with_grad)
    return kl if logprobs.ndim == 2 else kl.view(logprobs.shape)


def _are_accumulators(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.dtype == accumulation_dtype(x)

"""The clipped loss of PPO's value function (Schulman et al. 2017, as in OpenAI's baselines), in one pass.

    loss = mean over the mask of 0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)

The forward also computes the gradient, and the backward only scales it.
Specification: reference.value_loss. Kernels: csrc/cpu, csrc/cuda.
"""

from __future__ import annotations

import math

from torch import Tensor

from . import reference
from ._dispatch import Op
from ._inputs import (
    AGGREGATION_CODES,
    check,
    check_limit,
    code_of,
    loss_outputs,
    native_loss,
    needed_mask,
    normalizer_tensor,
    wants_gradient,
)
from .reference import VALUE_STATS


def _arguments(values, old_values, returns, mask, normalizer, cliprange, aggregation, with_grad):
    return (values, old_values, returns, mask, *values.shape, cliprange, aggregation, normalizer), (with_grad,)


_op = Op(
    "value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor? normalizer, float cliprange, "
    "int aggregation, bool with_grad) -> (Tensor loss, Tensor stats, Tensor grad)",
    kernels=native_loss("value_loss", _arguments, VALUE_STATS),
    fake=lambda *args: loss_outputs(args[0], VALUE_STATS, args[-1]),
    gradients={0: 2},
    statistics=VALUE_STATS,
)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float | None = 0.2,
    loss_agg_mode: str = "token-mean",
    normalizer: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, T) values, values of the rollout, returns and mask -> scalar loss and statistics (VALUE_STATS).

    Floating inputs are float32, bfloat16, float16 or float64, with any strides; the loss is float32 (float64 for
    float64 values). mask is bool or 0/1; values outside it may be NaN. values receives the gradient, old_values and
    returns do not. cliprange_value=None does not clip. loss_agg_mode and normalizer are those of ppo_loss. An empty
    mask gives 0. In the statistics, variances are population variances and error is returns - values, so the explained
    variance is 1 - error_var / returns_var.
    Raises ValueError or TypeError if a shape, dtype, device or option does not fit.
    """
    check("value_loss", 2, mask, "values old_values returns", values, old_values, returns)
    mask = needed_mask("value_loss", mask)
    check_limit("value_loss", "cliprange_value", cliprange_value)
    aggregation = code_of("value_loss", "loss_agg_mode", loss_agg_mode, AGGREGATION_CODES)
    if _op.backend(values) == "reference":
        return reference.value_loss(
            values, old_values, returns, mask, cliprange_value=cliprange_value, loss_agg_mode=loss_agg_mode,
            normalizer=normalizer,
        )  # fmt: skip
    return _op(
        values, old_values, returns, mask, normalizer_tensor("value_loss", normalizer, values),
        math.inf if cliprange_value is None else float(cliprange_value), aggregation, wants_gradient(values),
    )  # fmt: skip

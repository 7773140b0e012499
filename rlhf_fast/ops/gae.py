"""Generalised advantage estimation (Schulman et al. 2016, eq. 16) over (B, T) tokens.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V

Specification: reference.gae. Kernels: csrc/cpu/gae.cpp, csrc/cuda/gae.cu, kernels/gae.py (Triton).
"""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._dispatch import Op, native
from ._inputs import NO_NUMBER, check, may_require_gradient, needed_mask, refuse_no_number
from ._layout import DTYPE_CODES
from ._native import empties


def _outputs(rewards: Tensor) -> tuple[Tensor, Tensor]:
    return empties(rewards, None, rewards, rewards)


def _arguments(rewards, values, mask, gamma, lam, carry):
    advantages, returns = _outputs(rewards)
    arguments = (
        rewards, values, mask, *rewards.shape, gamma, lam, carry, DTYPE_CODES[returns.dtype], advantages, returns,
    )  # fmt: skip
    return arguments, (advantages, returns)


_op = Op(
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, bool carry) -> "
    "(Tensor advantages, Tensor returns)",
    kernels=native("gae", _arguments, scratch=False, triton="gae"),
    fake=lambda rewards, *_: _outputs(rewards),
)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95, gap_mode: str = "carry"
) -> tuple[Tensor, Tensor]:
    """(B, T) per-token rewards, values V(s_t) and mask -> (advantages, returns), both (B, T) and 0 outside the mask.

    Inputs are float32, bfloat16, float16 or float64; results are float32 (float64 for float64 rewards) and, being
    targets, carry no gradient. After the last token of the mask V and A are 0, because the episode ends there.
    gap_mode decides how a masked token inside a sequence is treated, such as an observation in a dialogue. "carry"
    skips it: t + 1 is the next token of the mask (as in verl). "zero" counts it as a step with r = V = 0, so that A
    decays by gamma lam at each one (as in OpenRLHF).
    Raises ValueError or TypeError if a shape, dtype, device or gap_mode does not fit.
    """
    check("gae", 2, mask, "rewards values", rewards, values)
    mask = needed_mask("gae", mask)
    if gap_mode not in ("carry", "zero"):
        raise ValueError(f"gae: gap_mode {gap_mode!r} must be 'carry' or 'zero'")
    try:
        gamma, lam = float(gamma), float(lam)
    except NO_NUMBER:
        refuse_no_number("gae", gamma=gamma, lam=lam)
        raise
    if _op.backend(rewards) == "reference":
        return reference.gae(rewards, values, mask, gamma=gamma, lam=lam, gap_mode=gap_mode)
    rewards, values = (x.detach() if may_require_gradient(x) else x for x in (rewards, values))
    return _op(rewards, values, mask, gamma, lam, gap_mode == "carry")

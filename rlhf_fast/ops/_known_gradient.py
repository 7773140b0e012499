"""Turns logits into the gradient of their loss, in place, in one kernel (csrc/cuda only).

    loss = sum_i weights_i f(logprob_i, entropy_i),  f = PPO's loss of a token, or -logprob

It moves the bytes of the logits twice. Two kernels, a forward and a backward that reads the logits again, would move
them three times.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._layout import DTYPE_CODES, strided_rows
from ._native import launch


class PpoTokens(NamedTuple):
    """Inputs of PPO's loss, (N,) each, contiguous and in the accumulation dtype, and ppo_loss's options."""

    old_logprobs: Tensor | None  # None: the log-probs themselves
    advantages: Tensor
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    options: tuple  # clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef


_NO_TOKENS = (None, None, None, None, 0.0, math.inf, math.inf, math.inf, 0.0, 0, 0.0)


def known_gradient(
    logits: Tensor, labels: Tensor, mask: Tensor | None, temperature: float, weights: Tensor, ppo: PpoTokens | None
) -> tuple[Tensor, Tensor]:
    """(N, V) logits, which are overwritten -> (N,) log-probs and entropies. ppo None: the loss is cross-entropy."""
    rows, *strides = strided_rows(logits)
    if rows is not logits:
        raise ValueError(
            f"known_gradient: logits {tuple(logits.shape)} with strides {logits.stride()} cannot be read row by row"
        )
    logprobs, entropy = torch.empty(2, labels.shape[0], dtype=weights.dtype, device=logits.device)
    launch(
        "known_gradient",
        (
            logits, DTYPE_CODES[logits.dtype], labels.shape[0], logits.shape[-1], *strides, labels, mask, temperature,
            weights, *(_NO_TOKENS if ppo is None else (*ppo[:4], *ppo.options)), logprobs, entropy,
        ),
    )  # fmt: skip
    return logprobs, entropy

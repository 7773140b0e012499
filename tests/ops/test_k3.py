"""The estimator k3 = exp(-d) - 1 + d is never negative, although exp(-d) - 1 and d nearly cancel for a small d."""

from __future__ import annotations

import pytest
import torch

import rlhf_fast as rf

SIZES = torch.logspace(-8, 1, 2001, dtype=torch.float64)
DIFFERENCES = torch.cat([-SIZES.flip(0), torch.zeros(1, dtype=torch.float64), SIZES]).float()


@pytest.mark.parametrize("reference", [0.0, -5.0])  # with 0.0 the difference is exactly d
def test_kl_penalty_is_not_negative(isa, reference):
    ref_logprobs = torch.full_like(DIFFERENCES, reference)
    logprobs = ref_logprobs + DIFFERENCES
    k3 = rf.kl_penalty(logprobs, ref_logprobs, estimator="k3")
    assert (k3 >= 0).all()
    d = logprobs.double() - ref_logprobs.double()
    # The series, because in float64 exp(-d) - 1 + d has lost all digits at d = 1e-8.
    small = d.abs() < 1e-2
    exact = torch.where(small, d**2 / 2 - d**3 / 6 + d**4 / 24 - d**5 / 120, torch.expm1(-d) + d)
    torch.testing.assert_close(k3.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 37)])  # a remainder only, and whole vectors too
def test_approx_kl_k3_of_ppo_loss_is_not_negative(isa, shape):
    zeros, mask = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    for d in DIFFERENCES[::10]:
        _, stats = rf.ppo_loss(zeros + d, zeros, zeros, mask)
        assert stats["approx_kl_k3"] >= 0, d

"""Every CUDA op once, forward and backward, on small and ragged shapes: what `make gpu PART=sanitizer` runs.

Run as it is, under compute-sanitizer: python tests/cuda/small_calls.py
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

import rlhf_fast as rf
from rlhf_fast.ops._known_gradient import PpoTokens, known_gradient

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from cases import CASES, Sampler
from test_contract import cast, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def battery(device: str, seeds: int) -> int:
    """The cases of the battery, and how many calls that were."""
    calls = 0
    for case in CASES:
        for seed in range(seeds):
            inputs = cast(case.inputs(Sampler(random.Random(seed))), DTYPES[seed % len(DTYPES)])
            there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            run(case.op, case, there)
            calls += 1
    return calls


def rows_at_every_alignment(device: str) -> None:
    """GPT-2's vocabulary: logprobs, entropy and gradients, apart, in place, and known at once."""
    for dtype in DTYPES:
        logits = torch.randn(3, 50257, device=device).to(dtype)
        labels = torch.tensor([0, 50256, 777], device=device)
        for inplace in (False, True):
            x = logits.clone().requires_grad_()
            logprobs, entropy = rf.token_logprobs_and_entropy(x, labels, inplace_backward=inplace)
            torch.autograd.grad(logprobs.sum() + entropy.sum(), x)
        ones = torch.ones(3, device=device, dtype=logprobs.dtype)
        tokens = PpoTokens(-10 * ones, ones, -10 * ones, ones, (0.8, 1.2, 3.0, 20.0, 0.1, 2, 0.01))
        known_gradient(logits.clone(), labels, None, 0.7, ones, tokens)
        known_gradient(logits, labels, None, 1.0, ones, None)
        x = torch.randn(2, 3, 50257, device=device).to(dtype).requires_grad_()
        torch.autograd.grad(rf.kl_divergence(x[0], x[1]).sum(), x)


if __name__ == "__main__":
    print(f"{battery('cuda', 8)} calls of the battery")
    rows_at_every_alignment("cuda")
    torch.cuda.synchronize()

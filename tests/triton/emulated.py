"""The Triton kernels compiled for an H200, their PTX run by tests/ptx.py: test_triton.py runs this file.

A launch specialises its kernel as on a GPU: by the types and values of its numbers and the alignment of its tensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import rlhf_fast as rf
import rlhf_fast.kernels.gae
import rlhf_fast.kernels.kl_divergence
import rlhf_fast.kernels.kl_penalty
import rlhf_fast.kernels.pairwise_loss
import rlhf_fast.kernels.ppo_loss
import rlhf_fast.kernels.token_logprobs

sys.path.insert(0, str(Path(__file__).parents[1]))
import ptx

# Our kernels take no tensors of a CPU without it. Triton has read it already, for each kernel above.
os.environ["TRITON_INTERPRET"] = "1"

from interpreted import (
    case,  # noqa: F401
    on_triton_too,
    test_gae_over_tiles,  # noqa: F401
    test_is_as_close_to_float64_as_eager_is,  # noqa: F401
    test_more_than_one_tile_and_in_place,  # noqa: F401
    test_ppo_loss_of_many_blocks,  # noqa: F401
    test_the_least_number_is_an_impossible_token,  # noqa: F401
    test_two_runs_give_the_same_bits_and_a_row_those_of_its_own,  # noqa: F401
    test_what_the_mask_hides_never_matters,  # noqa: F401
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy names the infinities that the kernel means


class Driver:
    """What Triton asks of a device when it compiles."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


triton.runtime.driver.set_active(Driver())
run, programs = JITFunction.run, {}


def launch(kernel, *args, grid, warmup, **kwargs):
    compiled = run(kernel, *args, grid=grid, warmup=True, **kwargs)
    if compiled.hash not in programs:
        (programs[compiled.hash],) = ptx.kernels(compiled.asm["ptx"]).values()
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    memory, values = ptx.Memory(), []
    for name, kind in compiled.src.signature.items():
        if kind != "constexpr":
            x = given[name]
            values.append(memory.add(x) if torch.is_tensor(x) else float(x) if kind.startswith("fp") else x)
    grid = (*grid, 1, 1)[:3]
    assert all(0 < n < limit for n, limit in zip(grid, (2**31, 2**16, 2**16), strict=True))
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                programs[compiled.hash].run(values, memory, (x, y, z), shared=compiled.metadata.shared)


@pytest.fixture(autouse=True)
def on_an_emulated_gpu(monkeypatch):
    monkeypatch.setattr(JITFunction, "run", launch)


def rows_and_entropy(logits, labels):
    with rf.use_backend("triton"):
        return torch.stack(rf.token_logprobs_and_entropy(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [4112, 9000, 10007])  # multiples of 16, of 8, and of nothing
def test_a_row_gives_the_same_bits_wherever_it_lies(vocab, dtype):
    """The alignment of its stride decides which thread loads what."""
    generator = torch.Generator().manual_seed(vocab)
    logits, labels = 3 * torch.randn(6, vocab, generator=generator).to(dtype), torch.arange(6)
    want = rows_and_entropy(logits, labels)
    padded, shifted = (torch.empty(6, vocab // 16 * 16 + 16, dtype=dtype) for _ in range(2))
    padded[:, :vocab], shifted[:, -vocab:] = logits, logits
    columns = logits.T.contiguous().T
    assert torch.equal(rows_and_entropy(logits[:1], labels[:1]), want[:, :1])
    assert torch.equal(rows_and_entropy(logits[::2], labels[::2]), want[:, ::2])
    assert torch.equal(rows_and_entropy(padded[:, :vocab], labels), want)
    assert torch.equal(rows_and_entropy(shifted[:, -vocab:], labels), want)
    assert torch.equal(rows_and_entropy(columns[:1], labels[:1]), want[:, :1])


def test_a_certain_token_has_no_gradient():
    """Its product with the probability 1 must not be joined, unrounded, to the addition of the label's part."""
    logits, labels = torch.zeros(5, 1, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    with rf.use_backend("triton"):
        logprobs, entropy = rf.token_logprobs_and_entropy(logits, labels, temperature=0.7)
        weights = torch.tensor([0.1, 0.3, 0.7, 1.1, 1.9])
    (grad,) = on_triton_too(torch.autograd.grad)(logprobs @ weights + entropy @ weights, logits)
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_implicit_rewards_are_a_tie(dtype):
    """One of two equal products beta (log pi - log pi_ref) must not be subtracted unrounded from the other."""
    gain, eight = torch.arange(-20, 20, dtype=dtype) / 8, torch.full((40,), 8.0, dtype=dtype)
    for beta in (0.1, 0.3):
        with rf.use_backend("triton"):
            _, stats = rf.dpo_loss(gain - eight, gain - eight / 2, -eight, -eight / 2, beta=beta)
        assert stats["accuracy"] == 0.5


def test_a_label_out_of_range_stops_the_kernel():
    with rf.use_backend("triton"), pytest.raises(AssertionError, match="an assertion of the kernel"):
        rf.token_logprobs(torch.zeros(2, 4), torch.tensor([0, 4]))

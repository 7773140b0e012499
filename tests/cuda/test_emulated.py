"""The CUDA source executed without a GPU: arithmetic, indexing, layouts, barriers. Not its speed or memory order."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import emulation
import pytest
import torch

import rlhf_fast as rf
from rlhf_fast.ops import reference

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from cases import CASES, Sampler
from test_contract import LAYOUTS, assert_as_close_as_eager

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ORDERS = (emulation.ASCENDING, emulation.DESCENDING, emulation.SHUFFLED)
every_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.name.startswith("token_logprobs")], ids=lambda c: c.name
)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return emulation.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def on_emulator(emulated, monkeypatch):
    emulation.install(monkeypatch, emulated)
    emulated.set_order(emulation.ASCENDING)
    return emulated


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_is_as_close_to_float64_as_eager_is(case, dtype, on_emulator):
    for seed in range(16):
        on_emulator.set_order(ORDERS[seed % 3])
        assert_as_close_as_eager(case, case.inputs(Sampler(random.Random(seed))), dtype, LAYOUTS[seed % 4])


def gpt2_logits(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 50257 (odd: every alignment occurs), one with its leading 40000 forbidden."""
    logits = 4 * torch.randn(2, 50257, generator=torch.Generator().manual_seed(0)) - 100
    logits[1, :40000] = -torch.inf
    return logits.to(dtype), torch.tensor([50256, 40001])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpt2_vocabulary_forward_and_backward(dtype, on_emulator):
    logits, labels = gpt2_logits(dtype)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    logprobs, entropy = rf.token_logprobs_and_entropy(ours, labels, temperature=0.8)
    want_logprobs, want_entropy = reference.token_logprobs_and_entropy(truth, labels, temperature=0.8)
    torch.testing.assert_close(logprobs.double(), want_logprobs, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=1e-6, atol=0)
    (logprobs.sum() + 0.3 * entropy.sum()).backward()
    (want_logprobs.sum() + 0.3 * want_entropy.sum()).backward()
    one_rounding = torch.finfo(dtype).eps
    assert (ours.grad.double() - truth.grad).norm() <= one_rounding * truth.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_gives_the_same_bits_at_every_alignment(dtype, on_emulator):
    row = torch.randn(16433, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )  # 2 * 8192 + 49: full and ragged groups
    results = []
    for offset in range(8):
        room = torch.full((offset + len(row) + 8,), 1000.0, dtype=dtype)
        x = room[offset : offset + len(row)]
        x.copy_(row)
        x = x[None].requires_grad_()
        logprobs, entropy = rf.token_logprobs_and_entropy(x, torch.tensor([123]))
        (grad,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), x)
        results.append((logprobs.detach(), entropy.detach(), grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("vocab", [13, 1000, 2051])
def test_in_place_gradient_and_its_neighbours(vocab, on_emulator):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([True, False, True, True, False])
    grads = []
    for inplace in (False, True):
        room = torch.full((5, vocab + 3), 7.0)
        x = room[:, 1 : vocab + 1].copy_(logits).requires_grad_()
        rf.token_logprobs(x, torch.zeros(5, dtype=torch.long), mask=mask, inplace_backward=inplace).sum().backward()
        grads.append(x.grad.clone())
        assert (room[:, 0] == 7).all() and (room[:, vocab + 1 :] == 7).all()
        assert torch.equal(room[:, 1 : vocab + 1], grads[1] if inplace else logits)
    assert torch.equal(*grads)


def test_a_label_out_of_range_is_named(on_emulator, capfd):
    labels = torch.tensor([3, 9, -1])
    with pytest.raises(RuntimeError, match="710"):  # cudaErrorAssert
        rf.token_logprobs(torch.randn(3, 9), labels)
    on_emulator.flush()
    assert "label 9 of row 1 is outside [0, 9)" in capfd.readouterr().out
    mask = torch.tensor([True, False, False])
    assert torch.equal(rf.token_logprobs(torch.randn(3, 9), labels, mask=mask)[1:], torch.zeros(2))


def test_without_its_barrier_the_result_depends_on_the_schedule(tmp_path, monkeypatch):
    """The emulator sees races: each barrier of the kernel, taken out, changes results or never ends."""
    header = emulation.HEADER.read_text()
    barriers = header.count("__syncthreads();")
    assert barriers
    logits, labels = torch.randn(3, 4000), torch.tensor([1, 2, 3])
    truth = reference.token_logprobs(logits, labels)
    for i in range(barriers):
        folder = tmp_path / str(i)
        folder.mkdir()
        parts = header.split("__syncthreads();")
        (folder / "reduce.cuh").write_text(
            "__syncthreads();".join(parts[: i + 1]) + "__syncthreads();".join(parts[i + 1 :])
        )
        source = emulation.SOURCE.read_text().replace('"../ops.h"', '"ops.h"')
        (folder / "token_logprobs.cu").write_text(source)
        emulated = emulation.build(folder, folder / "token_logprobs.cu")
        emulation.install(monkeypatch, emulated)
        wrong = []
        for order in ORDERS:
            emulated.set_order(order)
            wrong.append((rf.token_logprobs(logits, labels) - truth).abs().max().item() > 1e-3)
        assert any(wrong)

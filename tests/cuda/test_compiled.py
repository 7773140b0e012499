"""The CUDA kernels as nvcc compiled them, without a GPU: which products are rounded, approximations, bounds."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import compiled
import emulation
import ptx
import pytest
import resources
import torch
from test_emulated import (
    LINEAR,
    PPO,
    batch,
    in_every_order,
    test_a_known_gradient_at_every_alignment,  # noqa: F401
    test_a_row_does_not_depend_on_its_batch,  # noqa: F401
    test_a_row_gives_the_same_bits_at_every_alignment,  # noqa: F401
    test_a_spread_far_smaller_than_the_mean,  # noqa: F401
    test_gpt2_vocabulary_forward_and_backward,  # noqa: F401
    test_in_place_gradient_and_its_neighbours,  # noqa: F401
    test_kl_divergence_is_infinite_where_the_reference_says_impossible,  # noqa: F401
    test_kl_divergence_of_a_gpt2_vocabulary,  # noqa: F401
    test_pairs_of_many_blocks_with_weights,  # noqa: F401
    test_scale_by_a_number_on_the_device,  # noqa: F401
    turn,
)

import rlhf_fast as rf
from rlhf_fast.ops import _linear, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from cases import CASES
from test_contract import LAYOUTS, assert_as_close_as_eager, assert_mask_hides

pytestmark = pytest.mark.skipif(
    resources.NVCC is None or not all(map(shutil.which, ("g++", "nm"))), reason="needs nvcc, g++ and nm"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EMULATED = {name.removesuffix("_forward").removesuffix("_backward") for name in emulation.signatures()}
ALL = [case for case in CASES if emulation.USES.get(case.name, case.name) in EMULATED]


@pytest.fixture(scope="module")
def kernels(emulated, tmp_path_factory):
    return compiled.Compiled(emulated, tmp_path_factory.mktemp("compiled") / "compiled.so")


@pytest.fixture
def on_emulator(kernels, monkeypatch):
    """Where ptxas may join a product and a sum it does."""
    emulation.install(monkeypatch, kernels)
    monkeypatch.setattr(kernels, "options", {"joins": True})
    monkeypatch.setattr(kernels, "order", emulation.ASCENDING)
    return kernels


@pytest.mark.parametrize("case", [*ALL, *LINEAR], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_close_to_float64_as_eager_is(case, dtype, on_emulator, monkeypatch):
    if case in LINEAR:
        emulation.logits_in_their_dtype(monkeypatch)
    # On a GPU eager's exp has the same instruction; here only that of a softmax is measured against a better one.
    of_a_row = case in LINEAR or emulation.USES.get(case.name, case.name) in ("token_logprobs", "kl_divergence")
    for seed in range(4):
        on_emulator.set_order(emulation.ORDERS[seed % 3])
        on_emulator.options = {
            "joins": seed % 2 == 0, "ex2": ptx.approximate_ex2 if of_a_row and seed < 2 else ptx.exact_ex2,
        }  # fmt: skip
        assert_as_close_as_eager(case, emulation.few_rows(case, seed), dtype, LAYOUTS[seed % 4])


@pytest.mark.parametrize("case", [c for c in ALL if c.masked], ids=lambda case: case.name)
def test_what_the_mask_hides_never_matters(case, on_emulator):
    assert_mask_hides(case, times=2)


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_certain_token_has_no_gradient(dtype, joins, on_emulator):
    on_emulator.options = {"joins": joins}
    weights, labels = torch.tensor([0.1, 0.3, 0.7, 1.1, 1.9]), torch.full((5,), 3)
    for vocab, temperature in ((4, 0.7), (1101, 1e-6)):
        logits = torch.full((5, vocab), -torch.inf, dtype=dtype)
        logits[:, 3] = torch.linspace(-90, 170, 5)
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = rf.token_logprobs_and_entropy(leaf, labels, temperature=temperature)
        (grad,) = torch.autograd.grad((logprobs + entropy) @ weights.to(logprobs), leaf)
        known = turn(logits.clone(), labels, weights.to(logprobs), temperature=temperature)
        assert not any(x.any() for x in (logprobs, entropy, grad, *known.values()))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_scoring_and_training_give_a_token_the_same_bits(dtype, on_emulator):
    """The first ratio is 1: with the entropy or without, alone or in a batch, and where the gradient is known."""
    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 7, 1100, 9001):
        room = (3 * torch.randn(3, vocab + 3, generator=generator)).to(dtype)
        logits, labels = room[:, 2 : vocab + 2], torch.randint(vocab, (3,), generator=generator)
        scored = rf.token_logprobs(logits, labels, temperature=0.7)
        one_by_one = [
            rf.token_logprobs(logits[i : i + 1].clone(), labels[i : i + 1], temperature=0.7) for i in range(3)
        ]
        known = turn(logits.clone(), labels, torch.ones(3), temperature=0.7)["logprobs"]
        trained, _ = rf.token_logprobs_and_entropy(logits, labels, temperature=0.7)
        for other in (trained, known, torch.cat(one_by_one)):
            assert torch.equal(other, scored)


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss"])
@pytest.mark.parametrize("rows, columns", [(6, 700), (514, 5)], ids=["counted by each block", "counted before"])
def test_batches_of_several_blocks(op, rows, columns, on_emulator):
    x = batch(rows, columns)
    names = PPO if op == "ppo_loss" else ("values", "old_values", "returns", "mask")

    def results(module=rf, dtype=torch.float32):
        leaf, *rest = (x[n].to(dtype) if x[n].is_floating_point() else x[n] for n in names)
        leaf = leaf.clone().requires_grad_()
        loss, stats = getattr(module, op)(leaf, *rest, loss_agg_mode="seq-mean-token-mean")
        return stats | {"loss": loss.detach(), "grad": torch.autograd.grad(loss, leaf)[0]}

    got = in_every_order(on_emulator, results)
    for name, want in results(reference, torch.float64).items():
        torch.testing.assert_close(got[name].double(), want.double(), rtol=1e-5, atol=1e-6, msg=name)
    assert ("count_kernel" in on_emulator.ran) or rows == 6


def test_means_of_long_rows(on_emulator):
    values = 100 + torch.randn(2, 2500, generator=torch.Generator().manual_seed(0))
    mask = values > 99.5
    got = in_every_order(on_emulator, lambda: {"mean": rf.masked_mean(values, mask, dim=1)})["mean"]
    torch.testing.assert_close(got.double(), reference.masked_mean(values.double(), mask, dim=1), rtol=1e-7, atol=0)
    many = rf.masked_mean(values[:1].expand(61, -1), mask[:1].expand(61, -1), dim=1)  # a block takes a row
    assert (many == got[0]).all()


def test_a_head_in_one_kernel(on_emulator, monkeypatch):
    """Chunks of rows padded to 64 columns, each turned into its gradient."""
    monkeypatch.setattr(_linear, "GPU_ROWS", 1)
    monkeypatch.setattr(_linear, "GPU_LEAST_ROWS", 1)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 6, 16, generator=g), torch.randn(131, 16, generator=g) / 4
    labels, old = torch.randint(131, (1, 6), generator=g), torch.randn(1, 6, generator=g) - 5
    mask = torch.tensor([[True, True, False, True, True, True]])
    grads = []
    for function, dtype in ((rf.linear_ppo_loss, torch.float32), (reference.linear_ppo_loss, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss, _ = function(
            *leaves, labels, old.to(dtype), old.to(dtype).cos(), mask, entropy_coef=0.01, ref_logprobs=old.to(dtype),
            kl_coef=0.1, dual_clip=3.0,
        )  # fmt: skip
        grads.append(torch.autograd.grad(loss, leaves))
    assert any("known_gradient" in name for name in on_emulator.ran)
    for got, want in zip(*grads, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


def test_equal_implicit_rewards_are_a_tie(on_emulator):
    """beta (log pi - log pi_ref) is rounded before two of them are subtracted."""
    gain = torch.arange(-20, 20) / 8
    _, stats = rf.dpo_loss(gain - 8, gain - 5, torch.full((40,), -8.0), torch.full((40,), -5.0), beta=0.1)
    assert stats["accuracy"] == 0.5


def test_a_label_out_of_range_stops_the_kernel(on_emulator):
    for labels in ([3, 9, 0], [3, -1, 0]):
        with pytest.raises(AssertionError, match="an assertion of the kernel"):
            rf.token_logprobs(torch.zeros(3, 9), torch.tensor(labels))
        with pytest.raises(AssertionError, match="an assertion of the kernel"):
            turn(torch.zeros(3, 9), torch.tensor(labels), torch.ones(3))


@pytest.mark.parametrize("file", ["token_logprobs", "kl_divergence", "known_gradient"])
def test_no_product_of_a_column_is_left_to_the_assembler(file, on_emulator):
    """Which may join it to a sum in one copy of a loop and not in another: a row's bits would depend on its alignment.
    The entropy and the derivative by the KL estimate are a product and a sum of a row's last thread."""
    kernels = [name for name, source in on_emulator.source_of.items() if source == file and "double" not in name]
    assert len(kernels) >= 6
    for name in kernels:
        code = [(operation, arguments) for _, _, operation, arguments in on_emulator.kernel(name).instructions]
        products = {arguments[0] for operation, arguments in code if operation == ["mul", "f32"]}
        sums = [arguments for operation, arguments in code if operation in (["add", "f32"], ["sub", "f32"])]
        assert len(products) > 50 and len(sums) > 50
        assert sum(not products.isdisjoint(arguments[1:]) for arguments in sums) <= 2, name


def test_an_access_outside_a_tensor_is_seen(on_emulator, monkeypatch):
    """One row more than the tensors hold, and a vector beside its boundary."""
    program = on_emulator.kernel("forward_kernel<float, false>")
    out = torch.zeros(4)
    with pytest.raises(IndexError, match="outside the tensors"):
        on_emulator.token_logprobs_forward(
            torch.zeros(1, 8), 0, 2, 8, 2, 16, 8, torch.zeros(2, dtype=torch.int64), None, 1.0, out, None, out, None
        )
    aligned = [i for i, (_, _, operation, _) in enumerate(program.instructions) if "v4" in operation]
    monkeypatch.setattr(program, "instructions", [
        (p, n, [o, *rest], [a.replace("]", "+4]") if "[" in a and "+" not in a else a for a in arguments])
        if i in aligned else (p, n, [o, *rest], arguments)
        for i, (p, n, (o, *rest), arguments) in enumerate(program.instructions)
    ])  # fmt: skip
    with pytest.raises(AssertionError, match="misaligned"):
        rf.token_logprobs(torch.zeros(1, 8192), torch.tensor([0]))

"""The Triton kernels under Triton's interpreter: test_triton.py runs this file with it switched on."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast.ops import _dispatch, _linear, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
import battery
import emulation
from cases import CASES, Sampler
from test_contract import LAYOUTS, assert_as_close_as_eager, assert_mask_hides, cast, run, tensors_of

assert os.environ["TRITON_INTERPRET"] == "1"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy names the infinities that the kernel means
IN_TRITON = {name.removesuffix("_forward") for name, op in _dispatch._OPS.items() if "triton" in op.kernels["cpu"]}
LINEAR = [case for case in CASES if case.name.startswith("linear_")]
CASES = [case for case in CASES if emulation.USES.get(case.name, case.name) in IN_TRITON]


@pytest.fixture
def case(request):
    def on_triton(**inputs):
        with rf.use_backend("triton"):
            return request.param.op(**inputs)

    return request.param._replace(op=on_triton)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_is_as_close_to_float64_as_eager_is(case, dtype, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", on_triton_too(torch.autograd.grad))
    for seed in range(4 if case.name == "gae" else 8):  # the interpreter's scan goes element by element
        assert_as_close_as_eager(case, case.inputs(Sampler(random.Random(seed))), dtype, LAYOUTS[seed % 4])


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_linear_op_on_a_gpu_without_a_cuda_build(case, dtype, monkeypatch):
    """The products are PyTorch's, in the dtypes of a GPU, and the rows Triton's."""
    emulation.logits_in_their_dtype(monkeypatch)
    monkeypatch.setattr(_linear, "on_gpu", lambda x: True)
    monkeypatch.setattr(_linear, "_C", None)
    for op in _dispatch._OPS.values():
        if "triton" in op.kernels.get("cuda", {}):
            monkeypatch.setitem(op.kernels["cpu"], "triton", op.kernels["cuda"]["triton"])
            monkeypatch.setattr(op, "_ready", {})
    monkeypatch.setattr(torch.autograd, "grad", on_triton_too(torch.autograd.grad))
    for seed in range(4):
        inputs = emulation.few_rows(case, seed)
        assert_as_close_as_eager(case, inputs, dtype, LAYOUTS[seed % 4])


def test_every_op_that_has_a_triton_kernel_is_here():
    assert {case.name for case in CASES} == {
        "token_logprobs", "token_logprobs_and_entropy", "cross_entropy", "kl_divergence", "ppo_loss", "kl_penalty",
        "gae", "pairwise_loss", "dpo_loss",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name, indirect=True)
def test_what_the_mask_hides_never_matters(case, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", on_triton_too(torch.autograd.grad))
    if case.masked:
        assert_mask_hides(case, times=3)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name, indirect=True)
def test_two_runs_give_the_same_bits_and_a_row_those_of_its_own(case, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", on_triton_too(torch.autograd.grad))
    compared = 0
    for seed in range(2 if case.name == "gae" else 6):  # the interpreter's scan goes element by element
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        first, second = run(case.op, case, inputs), run(case.op, case, inputs)
        for name in first:
            assert torch.equal(first[name].nan_to_num(nan=7.0), second[name].nan_to_num(nan=7.0)), name
        if not case.rowwise or inputs[case.rowwise[0]].ndim < 2:
            continue
        for i in range(min(inputs[case.rowwise[0]].shape[0], 3)):
            part = {k: v[i : i + 1] if k in case.rowwise else v for k, v in inputs.items()}
            for name, one in tensors_of(case.op(**part)).items():
                assert torch.equal(one[0].nan_to_num(nan=7.0), first[name][i].nan_to_num(nan=7.0)), name
                compared += 1
    assert compared or not case.rowwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_least_number_is_an_impossible_token(dtype, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", on_triton_too(torch.autograd.grad))
    with rf.use_backend("triton"):
        battery.least_numbers_are_impossible_tokens(dtype, "cpu")


def test_a_reward_that_is_nan_shows_in_the_accuracy_and_not_in_the_number_of_pairs():
    rewards = torch.tensor([torch.inf, 1.0, torch.nan])
    with rf.use_backend("triton"):
        _, stats = rf.pairwise_loss(rewards, torch.zeros(3))
    assert stats["num_pairs"] == 3 and stats["accuracy"].isnan()


@pytest.mark.parametrize("gap_mode", ["carry", "zero"])
@pytest.mark.parametrize("columns", [31, 2100])
def test_gae_over_tiles(columns, gap_mode):
    s = Sampler(random.Random(columns))
    rewards, values, mask = s.normal(2, columns).float(), s.normal(2, columns).float(), s.uniform(2, columns) < 0.7
    with rf.use_backend("triton"):
        got = rf.gae(rewards, values, mask, gamma=0.99, lam=0.95, gap_mode=gap_mode)
    want = reference.gae(rewards.double(), values.double(), mask, gamma=0.99, lam=0.95, gap_mode=gap_mode)
    for ours, truth in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-6 * truth.abs().max().item())


@pytest.mark.parametrize("mode", reference.AGGREGATIONS)
def test_ppo_loss_of_many_blocks(mode):
    s = Sampler(random.Random(0))
    old = -5 * s.uniform(9, 500)
    x = [(old + s.normal(9, 500, scale=0.3)).float(), old.float(), s.normal(9, 500).float()]
    mask = s.uniform(9, 500) < 0.8
    truth = [t.double() for t in x]
    truth[0].requires_grad_()
    want, want_stats = reference.ppo_loss(*truth, mask, loss_agg_mode=mode)
    prediction = x[0].requires_grad_()
    with rf.use_backend("triton"):
        loss, stats = rf.ppo_loss(prediction, *x[1:], mask, loss_agg_mode=mode)
        (grad,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), torch.autograd.grad(want, truth[0])[0], rtol=1e-5, atol=1e-9)
    for name, value in want_stats.items():
        torch.testing.assert_close(stats[name].double(), value.double(), rtol=2e-6, atol=1e-6, msg=name)


def on_triton_too(function):
    def call(*args, **kwargs):
        with rf.use_backend("triton"):
            return function(*args, **kwargs)

    return call


def test_more_than_one_tile_and_in_place():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 10007, generator=generator), torch.tensor([10006, 3])
    truth = logits.double().requires_grad_()
    want = rf.ops.reference.token_logprobs(truth, labels)
    (want_grad,) = torch.autograd.grad(want.sum(), truth)
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        with rf.use_backend("triton"):
            got = rf.token_logprobs(x, labels, inplace_backward=inplace)
            got.sum().backward()
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(x.grad.double(), want_grad, rtol=1e-5, atol=1e-8)
        assert torch.equal(x.detach(), x.grad if inplace else logits)


def test_a_label_out_of_range_gives_nan_where_nothing_can_stop_the_kernel():
    with rf.use_backend("triton"):  # on a GPU the kernel stops with an assertion; the interpreter has none
        got = rf.token_logprobs(torch.zeros(3, 4), torch.tensor([0, 4, -1]), mask=torch.tensor([True, True, False]))
    assert got[1].isnan() and torch.equal(got[[0, 2]], torch.tensor([-torch.log(torch.tensor(4.0)), 0.0]))

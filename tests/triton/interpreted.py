"""The Triton kernels under Triton's interpreter: test_token_logprobs_triton.py runs this file with it switched on."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
import torch

import rlhf_fast as rf

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from cases import CASES, Sampler
from test_contract import LAYOUTS, assert_as_close_as_eager

assert os.environ["TRITON_INTERPRET"] == "1"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy names the infinities that the kernel means
CASES = [case for case in CASES if case.name.startswith("token_logprobs")]


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
    for seed in range(8):
        assert_as_close_as_eager(case, case.inputs(Sampler(random.Random(seed))), dtype, LAYOUTS[seed % 4])


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

"""The ops from hidden states beyond the common battery: many chunks, tied and frozen weights, dtypes, memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import torch

from rlhf_fast.ops import _linear, linear_cross_entropy, linear_ppo_loss, linear_token_logprobs, reference

B, T, V, D = 4, 25, 301, 12


def inputs(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(B, T, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    return (
        hidden.to(dtype),
        weight.to(dtype),
        torch.randn(V).to(dtype),
        torch.randint(V, (B, T)),
        torch.rand(B, T) < 0.7,
    )


def token_logprobs(module, hidden, weight, bias, labels, mask):
    logprobs, entropy = module.linear_token_logprobs(
        hidden, weight, labels, bias=bias, mask=mask, softcap=20.0, with_entropy=True
    )
    return (logprobs.square() + 0.3 * entropy).sum()


def cross_entropy(module, hidden, weight, bias, labels, mask):
    return module.linear_cross_entropy(hidden, weight, labels.masked_fill(~mask, -100), bias=bias, softcap=20.0)


def ppo(module, hidden, weight, bias, labels, mask):
    generator = torch.Generator().manual_seed(1)
    old = module.linear_token_logprobs(hidden, weight, labels, bias=bias, mask=mask, softcap=20.0).detach()
    old = old + 0.3 * torch.randn(B, T, generator=generator)
    loss, _ = module.linear_ppo_loss(
        hidden, weight, labels, old, torch.randn(B, T, generator=generator), mask, bias=bias, softcap=20.0,
        entropy_coef=0.01, ref_logprobs=old, kl_coef=0.1, loss_agg_mode="seq-mean-token-mean",
    )  # fmt: skip
    return loss


LOSSES = pytest.mark.parametrize("loss", [token_logprobs, cross_entropy, ppo], ids=lambda f: f.__name__)


def gradients(loss, module, hidden, weight, bias, labels, mask, factor=1.0):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    out = factor * loss(module, *leaves, labels, mask)
    return [out.detach(), *torch.autograd.grad(out, leaves)]


@LOSSES
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_many_chunks_give_the_gradient_of_one(loss, factor, monkeypatch):
    data = inputs(torch.float64)
    truth = gradients(loss, reference, *data, factor)
    monkeypatch.setattr(_linear, "LEAST_ROWS", 1)
    for rows in (1, 7, 64, 1000):
        monkeypatch.setattr(_linear, "CHUNK_BYTES", 4 * V * rows)
        assert len(_linear.chunks(int(data[-1].sum()), V)) == -(-int(data[-1].sum()) // rows)
        for ours, want in zip(gradients(loss, sys.modules["rlhf_fast.ops"], *data, factor), truth, strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-11)


@LOSSES
@pytest.mark.parametrize("hidden_dtype, weight_dtype", [("bfloat16", "bfloat16"), ("float32", "bfloat16"),
                                                         ("bfloat16", "float32"), ("float16", "float16")])  # fmt: skip
def test_half_precision_by_tiles_and_chunks(loss, hidden_dtype, weight_dtype, monkeypatch):
    hidden, weight, bias, labels, mask = inputs()
    hidden, weight = hidden.to(getattr(torch, hidden_dtype)), weight.to(getattr(torch, weight_dtype))
    monkeypatch.setattr(_linear, "TILE", 100)
    monkeypatch.setattr(_linear, "LEAST_ROWS", 1)
    monkeypatch.setattr(_linear, "CHUNK_BYTES", 4 * V * 20)
    truth = gradients(loss, reference, hidden.double(), weight.double(), bias.double(), labels, mask)
    ours = gradients(loss, sys.modules["rlhf_fast.ops"], hidden, weight, bias, labels, mask)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    for got, want, like in zip(ours[1:], truth[1:], (hidden, weight, bias), strict=True):
        assert got.dtype == like.dtype
        assert (got - want).norm() <= 4 * torch.finfo(like.dtype).eps * want.norm()


@LOSSES
def test_a_frozen_weight_gets_no_gradient_and_costs_no_product(loss, monkeypatch):
    hidden, weight, bias, labels, mask = inputs()
    made = []
    monkeypatch.setattr(_linear.Gradients, "_add_weight", lambda *args: made.append(args))
    hidden.requires_grad_()
    loss(sys.modules["rlhf_fast.ops"], hidden, weight, bias, labels, mask).backward()
    assert hidden.grad is not None and weight.grad is None and not made


@LOSSES
def test_a_tied_embedding_adds_up_both_gradients(loss):
    _, weight, bias, labels, mask = inputs(torch.float64)
    tokens = torch.randint(V, (B, T))

    def grad(module):
        tied = weight.clone().requires_grad_()
        loss(module, torch.tanh(tied[tokens]), tied, bias, labels, mask).backward()
        return tied.grad

    torch.testing.assert_close(grad(sys.modules["rlhf_fast.ops"]), grad(reference), rtol=1e-9, atol=1e-11)


@LOSSES
def test_accumulating_into_grad_and_a_kept_graph(loss):
    hidden, weight, bias, labels, mask = inputs()
    (once,) = gradients(loss, sys.modules["rlhf_fast.ops"], hidden, weight, bias, labels, mask)[2:3]
    leaf = weight.clone().requires_grad_()
    out = loss(sys.modules["rlhf_fast.ops"], hidden, leaf, bias, labels, mask)
    out.backward(retain_graph=True)
    out.backward(retain_graph=True)
    out.backward()
    torch.testing.assert_close(leaf.grad, 3 * once)


@LOSSES
def test_no_row_gives_zero(loss):
    hidden, weight, bias, labels, mask = inputs()
    out = gradients(loss, sys.modules["rlhf_fast.ops"], hidden * torch.nan, weight, bias, labels - 5000, mask & False)
    assert not any(t.any() for t in out)


@pytest.mark.parametrize("mode", reference.AGGREGATIONS)
def test_linear_ppo_loss_is_ppo_loss_of_the_logprobs(mode):
    hidden, weight, _, labels, mask = inputs(torch.float64)
    old = reference.linear_token_logprobs(hidden, weight, labels) + 0.2 * torch.randn(B, T)
    advantages = torch.randn(B, T)
    options = {"cliprange": 0.1, "cliprange_high": 0.3, "dual_clip": 3.0, "loss_agg_mode": mode, "temperature": 0.8}
    results = []
    for module in (sys.modules["rlhf_fast.ops"], reference):
        leaf = weight.clone().requires_grad_()
        loss, stats = module.linear_ppo_loss(hidden, leaf, labels, old, advantages, mask, **options)
        loss.backward()
        results.append({"loss": loss.detach(), "grad": leaf.grad, **stats})
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("function", [linear_token_logprobs, linear_cross_entropy])
def test_a_label_out_of_range_is_an_error_that_names_it(function):
    hidden, weight, _, labels, _ = inputs()
    labels[2, 3] = V
    with pytest.raises(IndexError, match=f"{function.__name__}: label {V} at row 53 is outside the vocabulary of {V}"):
        function(hidden, weight, labels)


def test_shapes_are_checked():
    hidden, weight, bias, labels, mask = inputs()
    with pytest.raises(ValueError, match="linear_token_logprobs: hidden"):
        linear_token_logprobs(hidden[..., 1:], weight, labels)
    with pytest.raises(ValueError, match=r"bias .* must be \(V,\) = \(301,\)"):
        linear_cross_entropy(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match=r"linear_ppo_loss: mask .* must have the shape of old_logprobs"):
        linear_ppo_loss(hidden, weight, labels, torch.zeros(B, 3), torch.zeros(B, 3), mask)


PEAK = """
import resource, sys, torch
from rlhf_fast.ops import linear_cross_entropy, linear_token_logprobs
function, rows = sys.argv[1], int(sys.argv[2])
hidden, weight = torch.randn(rows, 64, requires_grad=True), torch.randn(50257, 64, requires_grad=True)
labels = torch.randint(50257, (rows,))
small = torch.randn(8, 64, requires_grad=True)
linear_cross_entropy(small, weight, labels[:8]).backward()  # everything that is allocated once
weight.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if function == "linear_cross_entropy":
    linear_cross_entropy(hidden, weight, labels).backward()
else:
    linear_token_logprobs(hidden, weight, labels).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="needs getrusage")
@pytest.mark.parametrize("function", ["linear_cross_entropy", "linear_token_logprobs"])
def test_memory_is_a_chunk_whatever_the_batch(function):
    def peak(rows):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        out = subprocess.check_output([sys.executable, "-c", PEAK, function, str(rows)], env=environment, text=True)
        return float(out)

    few, many = peak(700), peak(2100)  # MiB; all logits would be 134 and 403
    chunk = _linear.CHUNK_BYTES / 2**20
    assert many <= chunk + 25
    assert many <= few + 10


@LOSSES
def test_autocast_changes_nothing(loss):
    data = inputs()
    plain = gradients(loss, sys.modules["rlhf_fast.ops"], *data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(loss, sys.modules["rlhf_fast.ops"], *data)
    for a, b in zip(inside, plain, strict=True):
        assert torch.equal(a, b)

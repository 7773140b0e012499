"""The ops from hidden states beyond the common battery: many chunks, tied and frozen weights, dtypes, memory."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import flop_counter

import rlhf_fast
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


@pytest.mark.parametrize(
    ("vocab", "width", "dtype", "rows", "most_kept"),
    [
        (50257, 256, torch.float32, 304, 320),  # 64 MiB are 333 rows
        (50257, 896, torch.float32, 416, 320),  # half the weight, 90 MB
        (50257, 896, torch.bfloat16, 304, 320),
        (151936, 896, torch.float32, 416, 128),  # half the weight is 272 MB, 448 rows
        (151936, 4096, torch.float32, 512, 128),
        (8192, 8192, torch.float32, 2048, 2048),  # 64 MiB are more than 512 rows
        (0, 8, torch.float32, 2048, 1 << 24),
    ],
)
def test_chunks_are_larger_beside_a_large_weight_but_not_what_is_kept(vocab, width, dtype, rows, most_kept):
    weight = torch.empty(vocab, width, dtype=dtype, device="meta")
    parts = _linear.chunks_of(2048, weight, _linear.FUSED)
    assert parts[0] == slice(0, rows) and parts[-1].stop == 2048
    assert _linear.most_rows(weight, _linear.FUSED, kept=True) == most_kept


@LOSSES
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_many_chunks_give_the_gradient_of_one(loss, factor, monkeypatch):
    data = inputs(torch.float64)
    truth = gradients(loss, reference, *data, factor)
    monkeypatch.setattr(_linear, "LEAST_ROWS", 1)
    for rows in (1, 7, 64, 1000):
        monkeypatch.setattr(_linear, "CHUNK_BYTES", 8 * V * rows)
        monkeypatch.setattr(_linear, "MOST_ROWS", rows)
        count = int(data[-1].sum())
        assert len(_linear.chunks_of(count, data[1], _linear.WIDE)) == -(-count // rows)
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


@LOSSES
def test_without_a_width_the_logits_are_the_bias(loss):
    hidden, weight, *rest = inputs()
    given = hidden[..., :0], weight[:, :0], *rest
    ours = gradients(loss, sys.modules["rlhf_fast.ops"], *given)
    torch.testing.assert_close(ours, gradients(loss, reference, *given))


@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("mode", reference.AGGREGATIONS)
def test_linear_ppo_loss_is_ppo_loss_of_the_logprobs(mode, with_old):
    hidden, weight, _, labels, mask = inputs(torch.float64)
    old = reference.linear_token_logprobs(hidden, weight, labels) + 0.2 * torch.randn(B, T) if with_old else None
    advantages = torch.randn(B, T)
    options = {"cliprange": 0.1, "cliprange_high": 0.3, "dual_clip": 3.0, "loss_agg_mode": mode, "temperature": 0.8}
    results = []
    for module in (sys.modules["rlhf_fast.ops"], reference):
        leaf = weight.clone().requires_grad_()
        loss, stats, logprobs = module.linear_ppo_loss(
            hidden, leaf, labels, old, advantages, mask, **options, with_logprobs=True
        )
        loss.backward()
        results.append({"loss": loss.detach(), "grad": leaf.grad, "logprobs": logprobs, **stats})
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dropped", [0, 5])
@pytest.mark.parametrize("function", [linear_token_logprobs, linear_cross_entropy])
def test_a_label_out_of_range_is_an_error_that_names_it(function, dropped):
    """Rows that are dropped before it count in its number."""
    hidden, weight, _, labels, _ = inputs()
    labels[0, :dropped], labels[2, 3] = -100, V
    options = {"mask": labels != -100} if function is linear_token_logprobs else {}
    with pytest.raises(IndexError, match=f"{function.__name__}: label {V} at row 53 is outside the vocabulary of {V}"):
        function(hidden, weight, labels, **options)


def test_shapes_are_checked():
    hidden, weight, bias, labels, mask = inputs()
    with pytest.raises(ValueError, match="linear_token_logprobs: hidden"):
        linear_token_logprobs(hidden[..., 1:], weight, labels)
    with pytest.raises(ValueError, match=r"bias .* must be \(V,\) = \(301,\)"):
        linear_cross_entropy(hidden, weight, labels, bias=bias[1:])
    with pytest.raises(ValueError, match=r"linear_ppo_loss: mask .* must have the shape of advantages"):
        linear_ppo_loss(hidden, weight, labels, torch.zeros(B, 3), torch.zeros(B, 3), mask)


PEAK = """
import resource, sys, torch
from rlhf_fast.ops import linear_cross_entropy, linear_ppo_loss, linear_token_logprobs
function, dtype, rows = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3])
hidden, weight = (torch.randn(n, 64).to(dtype).requires_grad_() for n in (rows, 50257))
labels = torch.randint(50257, (rows,))

def step(hidden, labels):
    if function == "linear_cross_entropy":
        linear_cross_entropy(hidden, weight, labels).backward()
    elif function == "linear_token_logprobs":
        linear_token_logprobs(hidden, weight, labels).sum().backward()
    else:
        tokens = torch.zeros(1, len(labels))
        loss, _ = linear_ppo_loss(hidden[None], weight, labels[None], tokens - 11, tokens + 1, tokens == 0)
        loss.backward()

step(torch.randn(8, 64, dtype=dtype, requires_grad=True), labels[:8])  # everything that is allocated once
weight.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(hidden, labels)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(not hasattr(resource, "getrusage"), reason="needs getrusage")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", ["linear_cross_entropy", "linear_token_logprobs", "linear_ppo_loss"])
def test_memory_is_a_chunk_whatever_the_batch(function, dtype):
    def peak(rows):
        command = [sys.executable, "-c", PEAK, function, dtype, str(rows)]
        return float(subprocess.check_output(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True))

    few, many = peak(700), peak(2100)  # MiB; all logits would be 134 and 403 in float32
    chunk = _linear.CHUNK_BYTES / 2**20
    assert many <= chunk + 25
    assert many <= few + 10


@LOSSES
def test_autocast_changes_no_forward_of_the_reference(loss):
    data = inputs()
    plain = loss(reference, *data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(reference, *data), plain)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("only_hidden", [False, True])
@pytest.mark.parametrize("chunk_rows", [1000, 50, 20])
@LOSSES
def test_autocast_rounds_the_factors_and_not_the_gradient_of_the_weight(
    loss, chunk_rows, only_hidden, backend, monkeypatch
):
    module = sys.modules["rlhf_fast.ops"]
    monkeypatch.setattr(_linear, "LEAST_ROWS", 1)
    monkeypatch.setattr(_linear, "MOST_ROWS", chunk_rows)
    monkeypatch.setattr(_linear, "CHUNK_BYTES", 4 * V * chunk_rows)
    *factors, labels, mask = inputs()

    def run(factors, autocast):
        leaves = [t.detach().clone().requires_grad_(not (i and only_hidden)) for i, t in enumerate(factors)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = loss(module, *leaves, labels, mask)
        out.backward()
        return out.detach(), *(x.grad for x in leaves)

    with rlhf_fast.use_backend(backend) if backend else nullcontext():
        plain, grad_hidden, grad_weight, grad_bias = run([x.bfloat16() for x in factors], False)
        inside, *got = run(factors, True)
    assert torch.equal(inside, plain)
    assert torch.equal(got[0], grad_hidden.float())
    if only_hidden:
        assert got[1] is got[2] is None
        return
    assert got[1].dtype == torch.float32 and torch.equal(got[2], grad_bias.float())
    assert torch.equal(got[1].bfloat16(), grad_weight)
    assert not torch.equal(got[1], grad_weight.float())


@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast_a_backward_rounds_the_weight_only_if_a_product_reads_it(frozen):
    hidden, weight, _, labels, _ = inputs()
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs = linear_token_logprobs(hidden, weight.requires_grad_(not frozen), labels)
    with torch.profiler.profile(record_shapes=True) as profile:
        logprobs.sum().backward()
    copies = [e for e in profile.events() if e.name == "aten::_to_copy" and e.input_shapes[0] == [V, D]]
    assert len(copies) == (0 if frozen else 1)


@LOSSES
@pytest.mark.parametrize("weight", ["bfloat16", "float16"])
def test_autocast_rounds_every_dtype_that_a_linear_layer_rounds(loss, weight):
    module, (hidden, *factors, labels, mask) = sys.modules["rlhf_fast.ops"], inputs()
    factors = [x.to(getattr(torch, weight)) for x in factors]
    plain = loss(module, hidden.bfloat16(), *(x.bfloat16() for x in factors), labels, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(loss, module, hidden, *factors, labels, mask)
    assert torch.equal(inside[0], plain)
    assert [x.dtype for x in inside[1:]] == [x.dtype for x in (hidden, *factors)]


@pytest.fixture
def formulas(monkeypatch):
    """Those of torch.utils.flop_counter, as in a process that has not called an op yet."""
    for packet in [key for key in flop_counter.flop_registry if str(key).startswith("rlhf_fast")]:
        monkeypatch.delitem(flop_counter.flop_registry, packet)
    return flop_counter.flop_registry


@LOSSES
@pytest.mark.parametrize("frozen", [False, True])
def test_a_flop_counter_counts_the_products_that_pytorch_would_need(loss, frozen, formulas):
    hidden, weight, bias, labels, mask = inputs()

    def flops(module):
        leaves = [hidden.clone().requires_grad_(), *(t.clone().requires_grad_(not frozen) for t in (weight, bias))]
        with flop_counter.FlopCounterMode(display=False) as counter:
            loss(module, *leaves, labels, mask).backward()
        return counter.get_total_flops()

    assert flops(rlhf_fast) == flops(reference) >= 2 * B * T * V * D * (2 if frozen else 3)


def test_a_flop_counter_of_a_backward_alone_counts_its_products(formulas):
    hidden, weight, bias, labels, mask = inputs()
    logprobs = token_logprobs(rlhf_fast, hidden.requires_grad_(), weight.requires_grad_(), bias, labels, mask)
    with flop_counter.FlopCounterMode(display=False) as counter:
        logprobs.backward()
    assert counter.get_total_flops() == 2 * 2 * B * T * V * D


@LOSSES
def test_a_compiler_that_asks_for_the_flops_of_an_op_finds_their_formula(loss, formulas):
    """Of an op that has none it believes that computing it again costs nothing (activation_memory_budget)."""
    torch.compiler.reset()
    hidden, weight, *rest = inputs()
    torch.compile(loss, backend="aot_eager")(rlhf_fast, hidden.requires_grad_(), weight.requires_grad_(), *rest)
    assert any(str(packet).startswith("rlhf_fast") for packet in formulas)


@LOSSES
@pytest.mark.parametrize(("dtype", "autocast"), [("float64", "bfloat16"), ("float32", "float16")])
def test_autocast_changes_neither_float64_nor_anything_in_float16(loss, dtype, autocast):
    data = inputs(getattr(torch, dtype))
    plain = gradients(loss, sys.modules["rlhf_fast.ops"], *data)
    with torch.autocast("cpu", dtype=getattr(torch, autocast)):
        inside = gradients(loss, sys.modules["rlhf_fast.ops"], *data)
    for a, b in zip(inside, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wide", range(3))
def test_autocast_changes_no_factor_beside_one_in_float64(wide):
    factors = [x.double() if i == wide else x for i, x in enumerate(inputs()[:3])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        *given, rounds = _linear.factors_of(*factors)
    assert not rounds and all(a is b for a, b in zip(given, factors, strict=True))


@pytest.mark.parametrize("hidden_dtype, weight_dtype", [("bfloat16", "float32"), ("float16", "float16")])
def test_autocast_around_a_backward_alone_changes_nothing(hidden_dtype, weight_dtype):
    hidden, weight, bias, labels, mask = inputs()
    leaves = [hidden.to(getattr(torch, hidden_dtype)), weight.to(getattr(torch, weight_dtype)), bias]
    leaves = [x.requires_grad_() for x in leaves]
    out = token_logprobs(sys.modules["rlhf_fast.ops"], *leaves, labels, mask)
    plain = torch.autograd.grad(out, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(out, leaves)
    assert all(torch.equal(a, b) for a, b in zip(inside, plain, strict=True))


@pytest.mark.parametrize(
    ("hidden", "weight", "bias", "in_dtype", "half_products"),
    [
        ("bfloat16", "bfloat16", None, True, True),
        ("bfloat16", "bfloat16", "bfloat16", True, True),
        ("bfloat16", "bfloat16", "float32", False, True),
        ("bfloat16", "float32", None, False, False),
        ("float32", "bfloat16", None, False, False),
        ("float32", "float32", "float32", True, False),
        ("float16", "float16", "float16", False, False),
    ],
)
def test_on_a_gpu_products_have_the_dtype_that_all_factors_share(
    hidden, weight, bias, in_dtype, half_products, monkeypatch
):
    monkeypatch.setattr(_linear, "on_gpu", lambda x: True)
    factors = [name and torch.ones(1, 1, dtype=getattr(torch, name)) for name in (hidden, weight, bias)]
    way = _linear.IN_DTYPE if in_dtype else _linear.WIDE
    assert _linear.way_of(*factors, None, fused=False) == way
    assert _linear.way_of(*factors, 30.0, fused=False) == _linear.WIDE
    assert _linear.half_products_are_native(*factors[:2]) is half_products


def test_under_autocast_the_ops_compile_into_one_graph():
    *factors, labels, mask = inputs()
    advantages = torch.randn(B, T)

    def step(hidden, weight, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs = linear_token_logprobs(hidden, weight, labels, bias=bias, mask=mask)
            old = logprobs.detach() + 0.1
            loss, _ = linear_ppo_loss(hidden, weight, labels, old, advantages, mask, bias=bias)
            return loss + linear_cross_entropy(hidden, weight, labels, bias=bias) + logprobs.square().mean()

    def run(function):
        leaves = [x.clone().requires_grad_() for x in factors]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves)

    for a, b in zip(run(torch.compile(step, fullgraph=True)), run(step), strict=True):
        torch.testing.assert_close(a, b)


@LOSSES
def test_under_autocast_errors_are_at_most_twice_those_of_a_linear_layer(loss, monkeypatch):
    *factors, labels, mask = inputs()
    truth = gradients(loss, reference, *(x.double() for x in factors), labels, mask)

    def layer(hidden, weight, bias, softcap):
        return softcap * torch.tanh(torch.nn.functional.linear(hidden, weight, bias).float() / softcap)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(loss, sys.modules["rlhf_fast.ops"], *factors, labels, mask)
        monkeypatch.setattr(reference, "linear_logits", layer)
        theirs = gradients(loss, reference, *factors, labels, mask)
    for a, b, true in zip(ours, theirs, truth, strict=True):
        assert (a - true).norm() <= 2 * (b - true).norm()


# ---- the native way (csrc/cpu/linear.cpp), on every instruction set, also where it is not the fastest --------------


@pytest.fixture
def fused(isa, monkeypatch):
    """A function: loss, and the gradients of hidden, weight and bias, with the native products."""
    monkeypatch.setattr(_linear, "ours_are_fast", lambda: True)

    def run(loss, hidden, weight, labels, bias=None, softcap=None):
        assert _linear.is_fused(hidden, weight, bias)
        leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias) if t is not None]  # keeps the strides
        out = loss(sys.modules["rlhf_fast.ops"], *leaves[:2], labels, *leaves[2:], softcap=softcap)
        return [out.detach(), *torch.autograd.grad(out, leaves)]

    return run


def fused_logprobs(module, hidden, weight, labels, bias=None, softcap=None):
    logprobs, entropy = module.linear_token_logprobs(
        hidden, weight, labels, bias=bias, temperature=0.7, softcap=softcap, with_entropy=True
    )
    return (logprobs.square() + 0.3 * entropy).sum()


def fused_cross_entropy(module, hidden, weight, labels, bias=None, softcap=None):
    return module.linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=softcap)


FUSED_LOSSES = pytest.mark.parametrize("loss", [fused_logprobs, fused_cross_entropy], ids=lambda f: f.__name__)
HALF_OR_NOT = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def head(rows, vocab, width, dtype):
    torch.manual_seed(rows + vocab + width)
    weight = torch.randn(vocab, width) / max(width, 1) ** 0.5
    return torch.randn(rows, width).to(dtype), weight.to(dtype), torch.randint(vocab, (rows,))


def assert_is_the_gradient(loss, got, hidden, weight, labels, bias=None, softcap=None):
    """Compared with float64. Half-precision gradients of the logits are rounded once, and so are the results."""
    given = [t for t in (hidden, weight, bias) if t is not None]
    leaves = [t.detach().double().requires_grad_() for t in given]
    truth = loss(reference, *leaves[:2], labels, *leaves[2:], softcap=softcap)
    torch.testing.assert_close(got[0].double(), truth.detach(), rtol=1e-5, atol=1e-5)
    for g, want, like in zip(got[1:], torch.autograd.grad(truth, leaves), given, strict=True):
        assert g.dtype == like.dtype and g.shape == like.shape
        assert (g - want).norm() <= max(2 * torch.finfo(like.dtype).eps, 1e-5) * want.norm() + 1e-7


@FUSED_LOSSES
@HALF_OR_NOT
@pytest.mark.parametrize("rows, vocab, width", [
    (0, 3, 2), (1, 1, 1), (1, 2, 5), (3, 7, 16), (17, 191, 33), (64, 192, 64), (65, 193, 65), (130, 577, 100),
    (350, 400, 7), (20, 250, 121), (19, 130, 500), (9, 2047, 17), (33, 2403, 65),
])  # fmt: skip
def test_fused_shapes(fused, loss, dtype, rows, vocab, width):
    data = head(rows, vocab, width, dtype)
    assert_is_the_gradient(loss, fused(loss, *data), *data)


@FUSED_LOSSES
@HALF_OR_NOT
@pytest.mark.parametrize("size, softcap", [(1.0, None), (0.0, 0.8), (2.0, 3.0), (300.0, 50.0), (300.0, None)])
def test_fused_bias_and_softcap(fused, loss, dtype, size, softcap, monkeypatch):
    """Also if the bias alone decides, because its logits are e^300 times likelier than the others."""
    data = head(75, 333, 30, dtype)
    bias = None if size == 0 else size * torch.randn(333).to(dtype)
    whole = fused(loss, *data, bias, softcap)
    assert_is_the_gradient(loss, whole, *data, bias, softcap)
    monkeypatch.setattr(_linear, "LEAST_ROWS", 1)
    monkeypatch.setattr(_linear, "CHUNK_BYTES", 4 * 333 * 32)
    chunked = fused(loss, *data, bias, softcap)
    assert_is_the_gradient(loss, chunked, *data, bias, softcap)
    assert torch.equal(whole[1], chunked[1])


@FUSED_LOSSES
@HALF_OR_NOT
@pytest.mark.parametrize("softcap", [None, 41.0])  # 41 * float32(1 / 41) is not 1
def test_fused_impossible_tokens(fused, loss, dtype, softcap):
    """Tokens with logit -inf, from their bias or their weight, have probability 0, and all their gradients are 0."""
    hidden, weight, labels = head(75, 333, 30, dtype)
    hidden, impossible = hidden.abs() + 0.1, torch.tensor([5, 300])
    labels[(labels == 5) | (labels == 300)] = 6
    bias = torch.randn(333).to(dtype).index_fill(0, impossible, -torch.inf)
    got = fused(loss, hidden, weight, labels, bias, softcap)
    assert_is_the_gradient(loss, got, hidden, weight, labels, bias, softcap)
    infinite = weight.index_fill(0, impossible, -torch.inf)
    of_weight = fused(loss, hidden, infinite, labels, bias.nan_to_num(neginf=0.0), softcap)[2:]
    for a, b in zip(of_weight, got[2:], strict=True):  # the gradient of hidden is 0 times infinity
        assert torch.equal(a, b)
        assert not a[impossible].any()


@HALF_OR_NOT
def test_fused_impossible_label(fused, dtype):
    """The loss of an impossible label is infinite, but its gradient is finite."""
    hidden, weight, labels = head(20, 130, 9, dtype)
    labels[7] = 125
    bias = torch.randn(130).to(dtype).index_fill(0, labels[7], -torch.inf)
    got = fused(fused_cross_entropy, hidden, weight, labels, bias)
    assert got[0] == torch.inf
    assert_is_the_gradient(fused_cross_entropy, got, hidden, weight, labels, bias)


@pytest.mark.parametrize("softcap", [8.0, 16.0])
def test_fused_near_the_cap(fused, softcap):
    """Near the cap 1 - tanh^2 keeps few digits, but as many as eager's."""
    hidden, weight, labels = head(75, 333, 30, torch.float32)
    bias = 3000 * torch.randn(333)
    got = fused(fused_logprobs, hidden, weight, labels, bias, softcap)[1:]
    eager, truth = [], []
    for gradients, dtype in ((eager, torch.float32), (truth, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        gradients += torch.autograd.grad(fused_logprobs(reference, *leaves[:2], labels, leaves[2], softcap), leaves)
    for ours, other, want in zip(got, eager, truth, strict=True):
        assert (ours - want).abs().max() <= 2 * (other - want).abs().max() + 5e-7 * want.abs().max()


def test_fused_bias_of_many_rows(fused):
    """All rows are equal, so that rounding errors do not cancel."""
    data = torch.zeros(30_000, 1), torch.zeros(5, 1), torch.zeros(30_000, dtype=torch.long), 0.1 * torch.arange(5.0)
    bias = fused(fused_logprobs, *data)[3].double()
    probs = (data[3].double() / 0.7).softmax(0)
    logprobs = probs.log()
    entropy = -(probs * logprobs).sum()
    want = 2 * logprobs[0] * (torch.eye(5)[0] - probs) - 0.3 * probs * (logprobs + entropy)
    torch.testing.assert_close(bias, 30_000 / 0.7 * want, rtol=2e-6, atol=0)


@FUSED_LOSSES
@HALF_OR_NOT
def test_fused_gradients_that_nobody_wants_change_no_other(fused, loss, dtype, monkeypatch):
    data = (*head(75, 333, 30, dtype), torch.randn(333).to(dtype), 2.0)
    monkeypatch.setattr(_linear, "LEAST_ROWS", 1)
    monkeypatch.setattr(_linear, "CHUNK_BYTES", 4 * 333 * 32)
    _, *all_three = fused(loss, *data)
    for wanted in itertools.product((False, True), repeat=3):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((*data[:2], data[3]), wanted, strict=True)]
        if not any(wanted):
            continue
        out = loss(sys.modules["rlhf_fast.ops"], *leaves[:2], data[2], leaves[2], 2.0)
        some = torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad])
        for a, b in zip(some, itertools.compress(all_three, wanted), strict=True):
            assert torch.equal(a, b)


@FUSED_LOSSES
@HALF_OR_NOT
def test_fused_chunks(fused, loss, dtype, monkeypatch):
    data = head(150, 400, 24, dtype)
    whole = fused(loss, *data)
    monkeypatch.setattr(_linear, "LEAST_ROWS", 1)
    monkeypatch.setattr(_linear, "CHUNK_BYTES", 4 * 400 * 40)
    chunked = fused(loss, *data)
    assert_is_the_gradient(loss, chunked, *data)
    assert torch.equal(whole[1], chunked[1])  # a row of hidden does not see the others


@HALF_OR_NOT
def test_fused_strides(fused, dtype):
    hidden, weight, labels = head(50, 210, 33, dtype)
    spread = torch.full((50, 40), torch.nan, dtype=dtype)
    spread[:, 3:36] = hidden
    padded = torch.full((210, 39), torch.nan, dtype=dtype)
    padded[:, 1:34] = weight
    want = fused(fused_cross_entropy, hidden, weight, labels)
    for ours, expected in zip(fused(fused_cross_entropy, spread[:, 3:36], padded[:, 1:34], labels), want, strict=True):
        assert torch.equal(ours, expected)
    crossed = hidden.T.contiguous().T
    assert torch.equal(fused(fused_cross_entropy, crossed, weight, labels)[1], want[1])
    assert not _linear.is_fused(hidden, weight.T.contiguous().T, None)  # it would need a copy of the weight


@FUSED_LOSSES
@HALF_OR_NOT
@pytest.mark.parametrize("vocab", [700, 2501])  # from 2048 on tiles of bfloat16 are higher
def test_fused_threads_change_nothing(fused, loss, dtype, vocab):
    data = (*head(210, vocab, 300, dtype), torch.randn(vocab), 2.0)  # 5 panels of columns, or 10 or 20
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            results.append(fused(loss, *data))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@HALF_OR_NOT
def test_deterministic_algorithms_are_ours_on_every_cpu(dtype, monkeypatch):
    """Even if a library multiplies faster, so that neither the number of threads nor other rows change a bit."""
    monkeypatch.setattr(_linear, "ours_are_fast", lambda: False)
    hidden, weight, labels = head(210, 700, 300, dtype)
    before = torch.get_num_threads()
    assert not _linear.is_fused(hidden, weight, None)
    torch.use_deterministic_algorithms(True)
    try:
        assert _linear.is_fused(hidden, weight, None)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            loss = linear_cross_entropy(*leaves, labels)
            results.append([loss, *torch.autograd.grad(loss, leaves), linear_token_logprobs(hidden, weight, labels)])
        alone = torch.cat([linear_token_logprobs(hidden[i : i + 1], weight, labels[i : i + 1]) for i in range(210)])
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][-1], alone)


@pytest.mark.parametrize("before, after", [(False, True), (True, False)])
def test_a_backward_goes_the_way_of_its_forward(before, after, monkeypatch):
    """The kept logits have the layout of the forward, even if the setting has changed since."""
    monkeypatch.setattr(_linear, "ours_are_fast", lambda: False)
    hidden, weight, labels = head(9, 20, 8, torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    try:
        torch.use_deterministic_algorithms(before)
        logprobs = linear_token_logprobs(*leaves, labels)
        torch.use_deterministic_algorithms(after)
        got = torch.autograd.grad(logprobs.sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, labels[:, None])
    for gradient, expected in zip(got, torch.autograd.grad(exact.sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0**24, 2.0**-24])
def test_a_loss_scale_saves_what_float16_cannot_hold(scale):
    """Gradients below 6e-8 or above 65504 must not be rounded to float16 before the factor of the backward."""
    hidden, weight, bias, labels, mask = inputs()
    tokens = torch.zeros(B, T)

    def of(factor):  # times factor / factor
        leaves = [x.half().requires_grad_() for x in (hidden, weight, bias)]
        rows = {"bias": leaves[2], "normalizer": factor}
        ppo, _ = linear_ppo_loss(*leaves[:2], labels, tokens - 11, tokens - 1, mask, **rows)
        sft = linear_cross_entropy(*leaves[:2], labels, **rows)
        return [g for loss in (ppo, sft) for g in torch.autograd.grad(factor * loss, leaves)]

    for scaled, plain in zip(of(scale), of(1.0), strict=True):
        assert scaled.dtype == torch.float16 and plain.isfinite().all() and plain.any()
        assert torch.equal(scaled, plain)


def test_inductors_cache_tells_the_ways_apart(tmp_path, monkeypatch):
    """The cache is on disk, where another CPU or a later release may find code that was compiled for the other way."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hidden, weight, labels = head(9, 20, 8, torch.float32)
    hidden.requires_grad_()
    for ours in (False, True):
        monkeypatch.setattr(_linear, "ours_are_fast", lambda ours=ours: ours)
        torch._dynamo.reset()
        compiled = torch.compile(linear_token_logprobs, fullgraph=True)
        logprobs = compiled(hidden, weight, labels)
        assert torch.equal(logprobs, linear_token_logprobs(hidden, weight, labels))
        logprobs.sum().backward()


@HALF_OR_NOT
def test_fused_without_a_width(dtype):
    hidden, weight, _ = head(4, 7, 0, dtype)
    assert not _linear.is_fused(hidden, weight, None)


@HALF_OR_NOT
@pytest.mark.parametrize("vocab", [500, 2201])
def test_fused_rows_do_not_depend_on_the_batch(fused, dtype, vocab):
    hidden, weight, labels = head(100, vocab, 40, dtype)
    together = linear_token_logprobs(hidden, weight, labels, with_entropy=True)
    for rows in (slice(0, 1), slice(37, 38), slice(13, 80), slice(99, 100)):
        alone = linear_token_logprobs(hidden[rows], weight, labels[rows], with_entropy=True)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


@HALF_OR_NOT
def test_fused_special_values_stay_in_their_rows(fused, dtype):
    hidden, weight, labels = head(40, 300, 9, dtype)
    clean = linear_token_logprobs(hidden, weight, labels, with_entropy=True)
    hidden = hidden.clone()
    hidden[3, 2], hidden[20, 8], hidden[21, 0] = torch.nan, torch.inf, -torch.inf
    marked = linear_token_logprobs(hidden, weight, labels, with_entropy=True)
    rows = torch.tensor([3, 20, 21])
    others = torch.ones(40, dtype=torch.bool).index_fill(0, rows, False)
    for a, b in zip(marked, clean, strict=True):
        assert a[rows].isnan().all() and torch.equal(a[others], b[others])
    # A token of logit -inf is impossible; one of NaN makes every row NaN.
    hidden, weight = hidden.abs().nan_to_num(1.0, 1.0, 1.0), weight.clone()
    weight[5] = -torch.inf
    labels[labels == 5] = 6
    labels[7] = 5
    ours = linear_token_logprobs(hidden, weight, labels, with_entropy=True)
    want = reference.linear_token_logprobs(hidden.double(), weight.double(), labels, with_entropy=True)
    torch.testing.assert_close([t.double() for t in ours], list(want), rtol=1e-5, atol=1e-5)
    assert ours[0][7] == -torch.inf
    weight[5] = torch.nan
    assert linear_token_logprobs(hidden, weight, labels).isnan().all()


@pytest.mark.parametrize("offset, count", [(0, 0), (1, 1000), (3, 9_000_001)])  # the last is freed piece by piece
def test_a_total_is_narrowed_as_pytorch_does_it(offset, count):
    x = torch.randint(-(2**31), 2**31, (offset + count,), dtype=torch.int32).view(torch.float32)[offset:]
    want = x.bfloat16()
    got = _linear.narrowed(x, torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan()) and (count < 1000 or want.isnan().any())
    assert torch.equal(got[~got.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))  # ties among them


def test_a_large_total_and_its_copy_never_stand_side_by_side():
    script = """
import torch
from rlhf_fast.bench.harness import probe
from rlhf_fast.ops._linear import narrowed
total = torch.ones(32 << 20)  # 128 MiB, 64 in bfloat16
peak, _ = probe(lambda: narrowed(total, torch.bfloat16), torch.device("cpu"))
print(peak)
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == "None" or int(printed) < 24 << 20


@pytest.mark.parametrize("version, sums", [
    ("2.6.0+cu124", False), ("2.9.1", False), ("2.10.0a0+git1", True), ("2.13.0+cpu", True), ("3.0.0", True),
])  # fmt: skip
def test_an_older_torch_adds_up_the_gradient_of_the_weight_by_tiles(version, sums, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert _linear.sums_in_float32.__wrapped__() is sums


def test_one_graph_serves_any_number_of_rows():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(
        lambda h, w, y: linear_token_logprobs(h, w, y).sum(), fullgraph=True, backend=counter
    )  # fmt: skip
    weight = torch.randn(50, 16, requires_grad=True)
    for rows in (5, 7, 9, 12, 20, 33):
        hidden, labels = torch.randn(rows, 16, requires_grad=True), torch.randint(50, (rows,))
        got = torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))
        want = torch.autograd.grad(linear_token_logprobs(hidden, weight, labels).sum(), (hidden, weight))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2  # of the first size, and of any


@pytest.mark.parametrize("trained_head", [True, False])
def test_one_graph_serves_rows_that_a_mask_selects(trained_head):
    """How many they are, and so whether their logits are kept, is known only when the graph runs."""
    torch._dynamo.reset()
    hidden, weight = torch.randn(4, 6, 16, requires_grad=True), torch.randn(50, 16, requires_grad=trained_head)
    labels, mask = torch.randint(50, (4, 6)), torch.rand(4, 6) < 0.5
    leaves = [hidden, weight] if trained_head else [hidden]

    def loss(mask):
        return linear_token_logprobs(hidden[mask], weight, labels[mask]).sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for rows in (mask, ~mask, torch.zeros_like(mask)):
            got = torch.autograd.grad(compiled(rows), leaves)
            for a, b in zip(got, torch.autograd.grad(loss(rows), leaves), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_gradients_are_as_exact_as_those_of_an_lm_head(seed):
    """An lm_head multiplies in bfloat16, our reference in float32. 100 rows, so that 1 / N is rounded."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(100, 64, generator=generator), torch.randn(1000, 64, generator=generator) / 8
    labels = torch.randint(1000, (100,), generator=generator)

    def gradients(function, dtype):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight)]
        return torch.autograd.grad(function(*leaves), leaves)

    def eager(h, w):
        z = h @ w.T
        return torch.nn.functional.cross_entropy(z if z.dtype == torch.float64 else z.float(), labels)

    truth, theirs = gradients(eager, torch.float64), gradients(eager, torch.bfloat16)
    for ours, t, exact in zip(
        gradients(lambda h, w: linear_cross_entropy(h, w, labels), torch.bfloat16), theirs, truth, strict=True
    ):
        assert (ours.double() - exact).abs().max() <= 1.25 * (t.double() - exact).abs().max()


@HALF_OR_NOT
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_a_large_vocabulary_costs_no_digits(dtype, vocab):
    """Error against float64 no more than twice eager's, whose lm_head multiplies in the inputs' dtype."""
    hidden, weight, labels = head(24, vocab, 96, dtype)
    factors = torch.randn(2, len(labels), dtype=torch.float64)

    def eager(hidden, weight):
        logps = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
        return logps.gather(-1, labels[:, None]).squeeze(-1), -(logps.exp() * logps).sum(-1)

    def results(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        outputs = function(*leaves)
        total = sum((factor.to(out) * out).sum() for factor, out in zip(factors, outputs, strict=True))
        return [out.detach() for out in outputs] + [*torch.autograd.grad(total, leaves)]

    truth, theirs = results(eager, torch.float64), results(eager, dtype)
    ours = results(lambda h, w: linear_token_logprobs(h, w, labels, with_entropy=True), dtype)
    for got, other, want in zip(ours, theirs, truth, strict=True):
        slack = torch.finfo(got.dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= 2 * (other - want).abs().max() + slack
        assert (got - want).norm() <= 2 * (other - want).norm() + 1e-12

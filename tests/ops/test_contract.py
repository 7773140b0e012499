"""The battery that every op in cases.py passes. Nothing here knows an op by name."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from cases import CASES, Sampler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import rlhf_fast as rf
from rlhf_fast.ops import _dispatch

ROOT = Path(__file__).parents[2]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
fuzz = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
randoms = st.randoms(use_true_random=False)
LAYOUTS = ("contiguous", "sliced", "transposed", "padded")


def tensors_of(output) -> dict[str, torch.Tensor]:
    """An op's output (tensor, tuple, or (loss, statistics)) as named tensors."""
    if isinstance(output, torch.Tensor):
        return {"0": output}
    if isinstance(output, dict):
        return dict(output)
    return {f"{i}.{k}": t for i, part in enumerate(output) for k, t in tensors_of(part).items()}


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "sliced" and x.ndim >= 2:  # logits[:, :-1]
        big = torch.cat([x, x[:, :1] if x.shape[1] else x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
        return big[:, :-1] if x.shape[1] else big[:, :0]
    if layout == "transposed" and x.ndim >= 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "padded" and x.ndim >= 1:  # every second element
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    return x.contiguous()


def cast(inputs: dict, dtype: torch.dtype, layout: str = "contiguous") -> dict:
    def one(x):
        if not isinstance(x, torch.Tensor):
            return x
        return lay_out(x.to(dtype) if x.is_floating_point() else x, layout)

    return {name: one(x) for name, x in inputs.items()}


def run(function, case, inputs: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of a random combination of the differentiable ones."""
    inputs = {
        k: v.detach().requires_grad_(k in case.wrt) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }
    results = tensors_of(function(**inputs))
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for out in results.values():
        if out.requires_grad:
            weight = torch.randn(out.shape, generator=generator, dtype=torch.float64, device=generator.device).to(out)
            total = total + (torch.where(out.isfinite(), out, 0.0) * weight).sum()
    results = {k: v.detach() for k, v in results.items()}
    wrt = [name for name in case.wrt if isinstance(inputs.get(name), torch.Tensor)]
    if isinstance(total, torch.Tensor):
        grads = torch.autograd.grad(total, [inputs[name] for name in wrt], allow_unused=True)
        results |= {f"grad_{n}": g.detach() for n, g in zip(wrt, grads, strict=True) if g is not None}
    return results


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute error. Infinities and NaN must be at the same places and have the same sign."""
    got, truth = got.double(), truth.double()
    special = ~truth.isfinite()
    assert torch.equal(got[special].nan_to_num(nan=7.0), truth[special].nan_to_num(nan=7.0)), (got, truth)
    return (got[~special] - truth[~special]).abs().max().item() if (~special).any() else 0.0


def assert_as_close_as_eager(case, inputs, dtype, layout="contiguous"):
    """|ours - float64| <= 2 |eager - float64|, plus a few roundings at the size of the result."""
    low = cast(inputs, dtype, layout)
    truth = run(
        case.reference,
        case,
        {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in low.items()},
    )
    eager = run(case.reference, case, low)
    ours = run(case.op, case, low)
    assert ours.keys() == truth.keys() == eager.keys()
    for name, want in truth.items():
        assert ours[name].dtype == eager[name].dtype, name
        assert ours[name].shape == want.shape, name
        finite = want[want.isfinite()].abs()
        # Gradients are compared at their own size: one of 1 / N must not hide behind the rounding of numbers near 1.
        least = 1e-6 if name.startswith("grad_") else case.size
        size = max(finite.max().item() if finite.numel() else 0.0, least)
        # A few roundings of the result. In float64 eager itself is the truth, so only a fixed bound remains.
        # ratio_var squares the ratio, which doubles the rounding of its log-probs: 2^-21 each if they are below -8.
        roundings = 8 if name.endswith("ratio_var") else 4
        fixed = roundings * torch.finfo(eager[name].dtype).eps * size
        slack = 1e-12 * max(size, 1.0) if dtype == torch.float64 else fixed
        assert error(ours[name], want) <= 2 * error(eager[name], want) + slack, name


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_is_as_close_to_float64_as_eager_is(case, dtype):
    @fuzz
    @given(randoms, st.sampled_from(LAYOUTS))
    def property(rng, layout):
        assert_as_close_as_eager(case, case.inputs(Sampler(rng)), dtype, layout)

    property()


@pytest.mark.parametrize("case", [case for case in CASES if case.large], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_as_close_to_float64_as_eager_is_with_a_large_vocabulary(case, dtype, isa):
    for seed in range(2):
        assert_as_close_as_eager(case, case.large(Sampler(random.Random(seed))), dtype)


@pytest.mark.parametrize("case", [case for case in CASES if case.wrt], ids=lambda case: case.name)
def test_the_battery_notices_a_gradient_that_is_wrong_by_a_thousandth(case):
    def wrong(**inputs):
        def bent(x):
            if not (isinstance(x, torch.Tensor) and x.requires_grad):
                return x
            x = x * 1.0
            x.register_hook(lambda gradient: 1.001 * gradient)
            return x

        outputs = case.op(**inputs)
        return tuple(map(bent, outputs)) if isinstance(outputs, tuple) else bent(outputs)

    noticed = 0
    for seed in range(16):
        try:
            assert_as_close_as_eager(case._replace(op=wrong), case.inputs(Sampler(random.Random(seed))), torch.float32)
        except AssertionError:
            noticed += 1
    assert noticed >= 3  # many draws are empty, or have a gradient of zero


def far_apart(x):
    """The same values with more than 2^31 elements between the first row and the last; what lies between is never
    touched, and takes no memory."""
    if not isinstance(x, torch.Tensor) or x.ndim == 0 or x.shape[0] < 2:
        return x
    x = x.contiguous()
    stride = 2**31 // (x.shape[0] - 1) + 1
    memory = torch.empty((x.shape[0] - 1) * stride + x[0].numel(), dtype=x.dtype)
    return memory.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)


@every_case
def test_rows_past_2_to_the_31_elements(case):
    tried = 0
    for seed in range(40):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.bfloat16)
        floating = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if not any(x.ndim and x.shape[0] > 1 and x.numel() for x in floating):
            continue
        near = run(case.op, case, inputs)
        far = run(case.op, case, {name: far_apart(x) for name, x in inputs.items()})
        for name in near:
            torch.testing.assert_close(far[name], near[name], rtol=1e-6, atol=1e-6, equal_nan=True)
        tried += 1
        if tried == 3:
            return
    raise AssertionError("no draw had two rows")


@every_case
def test_every_instruction_set_of_the_wheel(case, isa):
    for seed in range(6):
        for dtype in (torch.float32, torch.bfloat16):
            assert_as_close_as_eager(case, case.inputs(Sampler(random.Random(seed))), dtype)


@every_case
def test_gradcheck(case):
    if not case.wrt:
        pytest.skip("not differentiable")
    checked = 0
    for seed in range(12):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float64)
        wrt = [n for n in case.wrt if isinstance(inputs.get(n), torch.Tensor)]
        if any(inputs[n].isinf().any() or inputs[n].numel() > 400 for n in wrt):
            continue  # finite differences need finite inputs; the fuzz test covers the others
        if inputs.get("old_logprobs", 0) is None:
            continue  # the loss is then constant, and its gradient is that of the ratio (test_reference.py)

        def f(*values, inputs=inputs, wrt=wrt):
            out = tensors_of(case.op(**(inputs | dict(zip(wrt, values, strict=True)))))
            return tuple(t for t in out.values() if t.requires_grad)

        assert torch.autograd.gradcheck(f, [inputs[n].requires_grad_() for n in wrt], eps=1e-7, atol=1e-5)
        checked += 1
    assert checked >= 2


@every_case
def test_opcheck(case, monkeypatch):
    calls = []
    original = _dispatch.Op.__call__
    monkeypatch.setattr(_dispatch.Op, "__call__", lambda self, *a: (calls.append((self, a)), original(self, *a))[1])
    for seed in range(4):
        run(case.op, case, cast(case.inputs(Sampler(random.Random(seed))), torch.float32))
    assert calls, "the op never reached a native kernel"
    monkeypatch.undo()
    for op, args in calls:
        if op.function is None:  # a backward op: its inputs carry the graph it was called from
            args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(op.library_op, args)


@every_case
def test_compiles_to_one_graph_with_the_same_result(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.op, fullgraph=True, dynamic=False)
    for seed in range(2):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        ours, graph = run(case.op, case, inputs), run(compiled, case, inputs)
        for name in ours:
            torch.testing.assert_close(graph[name], ours[name], rtol=1e-6, atol=1e-6, equal_nan=True)


def sizes(inputs) -> list[int]:
    return [n for x in inputs.values() if isinstance(x, torch.Tensor) for n in x.shape]


def batch_of(case) -> tuple[dict, int]:
    """A draw with a batch size that no other axis has, and that size: torch.compile makes one symbol of equal sizes."""
    for seed in range(200):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        n = inputs[(case.wrt or tuple(inputs))[0]].shape[:1].numel()
        axes = [x for x in inputs.values() if isinstance(x, torch.Tensor) and n in x.shape]
        if n > 1 and 0 not in sizes(inputs) and sizes(inputs).count(n) == sum(x.shape[0] == n for x in axes) > 1:
            return inputs, n
    raise AssertionError("no draw has such a batch")


@every_case
def test_a_graph_serves_the_next_call_and_batches_of_any_size(case, monkeypatch):
    """The first call of an op in a process may be a compiled one: what it finds out must not make the second compile
    the user's whole model again."""
    torch._dynamo.reset()
    for op in _dispatch._OPS.values():
        monkeypatch.setattr(op, "_chosen", {})
    inputs, n = batch_of(case)
    counter = CompileCounter()
    compiled = torch.compile(case.op, fullgraph=True, dynamic=True, backend=counter)
    run(compiled, case, inputs)
    frames = counter.frame_count
    for times in (1, 2, 5):
        larger = {
            name: torch.cat([x] * times) if isinstance(x, torch.Tensor) and x.shape[:1] == (n,) else x
            for name, x in inputs.items()
        }
        ours, graph = run(case.op, case, larger), run(compiled, case, larger)
        for name in ours:
            torch.testing.assert_close(graph[name], ours[name], rtol=1e-6, atol=1e-6, equal_nan=True)
        assert counter.frame_count == frames


def test_masked_mean_compiles_over_one_axis_after_another():
    """torch.compile makes a symbol of a number that changes between calls."""
    torch._dynamo.reset()
    compiled, values, mask = (
        torch.compile(rf.masked_mean, fullgraph=True),
        torch.randn(3, 4, 5),
        torch.rand(3, 4, 5) < 0.7,
    )
    for dim in (0, -1, -2, 2, 1, (0, 1)):
        torch.testing.assert_close(compiled(values, mask, dim), rf.masked_mean(values, mask, dim))


@pytest.mark.parametrize("kind", [int, lambda n: torch.tensor(float(n))], ids=["int", "tensor"])
def test_a_normalizer_of_any_value_serves_one_graph(kind):
    """torch.compile makes each float a constant, and raises at the ninth value."""
    if kind is int and torch.__version__ < "2.7":
        pytest.skip("torch 2.6 makes a constant of an int, too")
    torch._dynamo.reset()
    logprobs, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    loss = lambda n: rf.ppo_loss(logprobs, logprobs, logprobs, mask, normalizer=n)[0]  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True)
    for n in range(2, 13):
        torch.testing.assert_close(compiled(kind(n)), loss(kind(n)))


@every_case
def test_a_result_is_the_same_in_every_run_and_on_any_number_of_threads(case):
    threads = torch.get_num_threads()
    try:
        for seed in range(8):
            inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
            runs = []
            for n in (1, 2, 2):
                torch.set_num_threads(n)
                runs.append(run(case.op, case, inputs))
            for name, one_thread in runs[0].items():
                two, again = (r[name].nan_to_num(nan=7.0) for r in runs[1:])
                assert torch.equal(two, again), name
                assert torch.equal(two, one_thread.nan_to_num(nan=7.0)), name
    finally:
        torch.set_num_threads(threads)


@every_case
def test_a_row_does_not_depend_on_its_batch(case):
    if not case.rowwise:
        pytest.skip("reduces over the batch")
    compared = 0
    for seed in range(12):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        n = inputs[case.rowwise[0]].shape[0] if inputs[case.rowwise[0]].ndim > 1 else 0
        whole = tensors_of(case.op(**inputs))
        for i in range(n):
            part = {k: v[i : i + 1] if k in case.rowwise else v for k, v in inputs.items()}
            for name, one in tensors_of(case.op(**part)).items():
                assert torch.equal(one[0].nan_to_num(nan=7.0), whole[name][i].nan_to_num(nan=7.0))
                compared += 1
    assert compared


@every_case
def test_what_the_mask_hides_never_matters(case):
    if not case.masked:
        pytest.skip("has no mask")
    assert_mask_hides(case, times=20)


def assert_mask_hides(case, times: int) -> None:
    """NaN behind the mask changes nothing, in so many inputs whose mask hides something."""
    for seed in itertools.count():
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        if inputs.get("mask") is None or inputs["mask"].all():
            continue
        poisoned = dict(inputs)
        for name in case.masked:
            if isinstance(x := inputs.get(name), torch.Tensor):
                mask = inputs["mask"].reshape(inputs["mask"].shape + (1,) * (x.ndim - inputs["mask"].ndim))
                poisoned[name] = torch.where(mask, x, torch.nan)
        clean, dirty = run(case.op, case, inputs), run(case.op, case, poisoned)
        for name in clean:
            assert torch.equal(clean[name], dirty[name]), name
        times -= 1
        if not times:
            return


@every_case
def test_a_mask_of_numbers_counts_like_one_of_bools(case):
    for seed in range(10):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        if inputs.get("mask") is not None:
            for dtype in (torch.float32, torch.int64, torch.uint8):
                numbers = run(case.op, case, inputs | {"mask": inputs["mask"].to(dtype)})
                for name, value in run(case.op, case, inputs).items():
                    torch.testing.assert_close(numbers[name], value, rtol=0, atol=0, equal_nan=True)
            learned = inputs | {"mask": inputs["mask"].float().requires_grad_()}
            assert not any(x.requires_grad for x in tensors_of(case.op(**learned)).values())


@every_case
def test_no_argument_is_modified(case):
    for seed in range(6):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        run(case.op, case, inputs)
        for name, value in before.items():
            assert torch.equal(inputs[name].nan_to_num(nan=7.0), value.nan_to_num(nan=7.0)), name


def loss_and_leaves(case, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum of the differentiable outputs, and the inputs that receive gradients."""
    inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
    inputs = {k: v.requires_grad_(k in case.wrt) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    total = sum(t[t.isfinite()].sum() for t in tensors_of(case.op(**inputs)).values() if t.requires_grad)
    return total, [inputs[n] for n in case.wrt if isinstance(inputs.get(n), torch.Tensor)]


@every_case
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_backward_runs_twice(case, factor):
    """retain_graph: a saved gradient must not be consumed by its first use, nor be what the first use returned."""
    if not case.wrt:
        pytest.skip("not differentiable")
    for seed in range(4):
        total, wrt = loss_and_leaves(case, seed)
        first = torch.autograd.grad(factor * total, wrt, retain_graph=True, allow_unused=True)
        kept = [None if g is None else g.clone() for g in first]
        for g in first:
            if g is not None:
                g.zero_()
        second = torch.autograd.grad(factor * total, wrt, allow_unused=True)
        for a, b in zip(kept, second, strict=True):
            assert a is b is None or torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


@every_case
def test_what_an_op_returns_may_be_changed_in_place(case):
    if not case.wrt:
        pytest.skip("not differentiable")

    def changed(**arguments):
        results = tensors_of(case.op(**arguments))
        return {name: t.mul_(0.5) if t.requires_grad else t for name, t in results.items()}

    def copied(**arguments):
        results = tensors_of(case.op(**arguments))
        return {name: t * 0.5 if t.requires_grad else t for name, t in results.items()}

    for seed in range(4):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        got, expected = run(changed, case, inputs), run(copied, case, inputs)
        for name, want in expected.items():
            assert torch.equal(got[name].nan_to_num(nan=7.0), want.nan_to_num(nan=7.0)), name


@pytest.mark.parametrize("plain", [True, False])
@every_case
def test_a_second_derivative_is_refused(case, plain):
    """Also if the total itself is differentiated, as in a penalty on the norm of its gradient, and by autograd.grad,
    which leaves out what does not lead to the tensors asked for."""
    if not case.wrt:
        pytest.skip("not differentiable")
    refused, words = 0, "differentiate twice"
    for seed, by_grad in itertools.product(range(4), (False, True)):
        total, wrt = loss_and_leaves(case, seed)
        total = total if plain else total * torch.ones((), requires_grad=True)
        try:
            grads = torch.autograd.grad(total, wrt, create_graph=True, allow_unused=True)
        except RuntimeError as error:  # a loss that has kept its gradients only
            assert words in str(error)
            refused += 1
            continue
        grads = [g for g in grads if g is not None and g.requires_grad]
        if grads:
            penalty = sum(g.square().sum() for g in grads)
            with pytest.raises(RuntimeError, match=words):
                torch.autograd.grad(total + penalty, wrt, allow_unused=True) if by_grad else penalty.backward()
            refused += 1
    assert refused


def function_of_one_input(case):
    """The sum of the outputs as a function of the first differentiable input, and that input."""
    if not case.wrt:
        pytest.skip("not differentiable")
    inputs = cast(case.inputs(Sampler(random.Random(5))), torch.float32)
    name = case.wrt[0]
    if case.name == "kl_penalty":  # its k1 is PyTorch's subtraction
        inputs["estimator"] = "k3"

    def of(x):
        return sum(t.sum() for t in tensors_of(case.op(**inputs | {name: x})).values())

    return of, inputs[name]


@every_case
def test_a_forward_mode_derivative_is_refused(case):
    """It would silently be zero. The reference has one."""
    of, x = function_of_one_input(case)
    direction = torch.ones_like(x)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* use_backend\('reference'\) has one"):
        torch.func.jvp(of, (x,), (direction,))
    with torch.autograd.forward_ad.dual_level():
        of(x)  # an input without a tangent is accepted
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            of(torch.autograd.forward_ad.make_dual(x, direction))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda rows: torch.vmap(of)(rows).sum(), (x[None],), (direction[None],))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no forward-mode derivative"):
        torch.compile(lambda x: torch.func.jvp(of, (x,), (direction,))[1], backend="eager")(x)
    torch._dynamo.reset()  # or it would remember the functions that it could not compile, and call them as they are
    with torch.autograd.forward_ad.dual_level(), pytest.raises(Exception, match="no forward-mode derivative"):
        torch.compile(of, backend="eager")(torch.autograd.forward_ad.make_dual(x, direction))
    with rf.use_backend("reference"):
        assert torch.func.jvp(of, (x,), (direction,))[1].shape == ()


@every_case
def test_a_gradient_of_torch_func_is_refused(case):
    of, x = function_of_one_input(case)
    with pytest.raises(NotImplementedError, match=r"no derivative for torch.func .* use_backend\('reference'\)"):
        torch.func.grad(of)(x)
    with pytest.raises(NotImplementedError, match=r"no derivative for torch\.func"):
        torch.func.grad(lambda rows: torch.vmap(of)(rows).sum())(x[None])
    with rf.use_backend("reference"):
        assert torch.func.grad(of)(x).shape == x.shape


def test_targets_stay_data_under_torch_func():
    rewards, values = torch.randn(2, 5), torch.randn(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)

    def loss(values):
        return ((values - rf.gae(rewards, values, mask)[1].detach()) ** 2).sum()

    expected = 2 * (values - rf.gae(rewards, values, mask)[1])
    torch.testing.assert_close(torch.func.grad(loss)(values), expected)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: torch.compile(f, backend="eager")], ids=["eager", "compiled"])
def test_targets_stay_data_under_vmap(wrap):
    torch._dynamo.reset()
    rewards, values = torch.randn(3, 2, 5), torch.randn(3, 2, 5, requires_grad=True)
    mask = torch.ones(3, 2, 5, dtype=torch.bool)

    def returns(values):
        return torch.vmap(rf.gae)(rewards, values, mask)[1]

    assert not wrap(returns)(values).requires_grad
    of = wrap(lambda values: torch.func.grad(lambda v: ((v - returns(v)) ** 2).sum())(values))
    torch.testing.assert_close(of(values.detach()), 2 * (values - returns(values)).detach())


@every_case
def test_batched_gradients_are_those_of_a_loop(case):
    """is_grads_batched uses PyTorch's older vmap, whose tensors look plain but have no memory."""
    if not case.wrt:
        pytest.skip("not differentiable")
    inputs = cast(case.inputs(Sampler(random.Random(3))), torch.float64)
    name = case.wrt[0]
    x = inputs[name].detach().requires_grad_()
    out = next(t for t in tensors_of(case.op(**inputs | {name: x})).values() if t.requires_grad)
    basis = torch.eye(out.numel(), dtype=out.dtype).view(out.numel(), *out.shape)
    (batched,) = torch.autograd.grad(out, x, basis, is_grads_batched=True, retain_graph=True)
    for row, grad in zip(basis, batched, strict=True):
        (alone,) = torch.autograd.grad(out, x, row, retain_graph=True)
        torch.testing.assert_close(grad, alone, equal_nan=True)


@pytest.mark.parametrize("compiled", [False, True])
@every_case
def test_vmap_passes_the_gradient_on(case, compiled):
    if compiled:
        torch._dynamo.reset()

    def batched(**arguments):
        both = {k: torch.stack([v, v]) for k, v in arguments.items() if isinstance(v, torch.Tensor)}

        def function(both):
            one = lambda tensors: tuple(tensors_of(case.op(**arguments | tensors)).values())  # noqa: E731
            return torch.vmap(one)(both)

        whole = torch.__version__ >= "2.7"  # torch 2.6 breaks the graph under vmap
        outputs = (torch.compile(function, fullgraph=whole, backend="aot_eager") if compiled else function)(both)
        return {name: out.mean(0) for name, out in zip(tensors_of(case.op(**arguments)), outputs, strict=True)}

    for seed in range(1 if compiled else 3):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        ours = run(batched, case, inputs)
        for name, value in run(case.op, case, inputs).items():
            torch.testing.assert_close(ours[name], value, equal_nan=True)


@pytest.mark.parametrize("trace", ["make_fx", "jit"])
@every_case
def test_a_graph_that_was_made_without_gradients_gives_the_gradient_or_says_that_it_has_none(case, trace):
    """As torch.export makes it. The gradient of a loss is an output of its kernel, which may then be missing."""
    if not case.wrt:
        pytest.skip("not differentiable")
    for seed in range(3):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        expected = run(case.op, case, inputs)
        names = [name for name, x in inputs.items() if isinstance(x, torch.Tensor)]
        results = [name for name in expected if not name.startswith("grad_")]

        def of(*tensors):
            return tuple(tensors_of(case.op(**inputs | dict(zip(names, tensors, strict=True)))).values())  # noqa: B023

        examples = [torch.zeros_like(x) if x.is_floating_point() else x for x in (inputs[name] for name in names)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            graph = make_fx(of)(*examples) if trace == "make_fx" else torch.jit.trace(of, examples, check_trace=False)

        def traced(**given):
            return dict(zip(results, graph(*(given[name] for name in names)), strict=True))  # noqa: B023

        try:
            ours = run(traced, case, inputs)
        except RuntimeError as error:
            assert "its gradient is not in this graph" in str(error)
            ours = {name: x.detach() for name, x in traced(**inputs).items()}
            expected = {name: expected[name] for name in results}
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, equal_nan=True)


@every_case
def test_a_checkpoint_that_only_the_forward_counts_the_operations_of(case):
    """Under a dispatch mode a call takes the other way, through torch.library, and must save as many tensors."""
    if not case.wrt:
        pytest.skip("not differentiable")

    def counted(**arguments):
        with FlopCounterMode(display=False):
            return torch.utils.checkpoint.checkpoint(lambda: case.op(**arguments), use_reentrant=False)

    for seed in range(3):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        ours = run(counted, case, inputs)
        for name, value in run(case.op, case, inputs).items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)


@every_case
def test_a_profile_names_what_runs_without_a_gradient(case):
    """Then there is no autograd.Function, whose name it would show."""
    inputs = cast(case.inputs(Sampler(random.Random(3))), torch.float32)
    inputs |= {"estimator": "k3"} if case.name == "kl_penalty" else {}  # an unclamped k1 is PyTorch's subtraction
    with torch.no_grad(), torch.profiler.profile() as profile:
        case.op(**inputs)
    assert _dispatch._OPS.keys() & {event.name for event in profile.events()}


def imaginary(x):
    """x as the imaginary part of a conjugate, which torch marks as the negative of what is in memory."""
    halves = torch.zeros(2 * x.numel() + 1, dtype=x.dtype)[1:]  # complex numbers that are not aligned
    halves[1::2] = -x.detach().flatten()
    part = torch.from_numpy(halves.numpy().view("complex64")).reshape(x.shape).conj().imag
    assert part.is_neg()
    return part


@every_case
def test_the_imaginary_part_of_a_conjugate_has_its_sign(case):
    for seed in range(3):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        floats = {k: v for k, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
        expected = run(case.op, case, inputs)
        for name, x in floats.items():
            ours = run(case.op, case, inputs | {name: imaginary(x)})
            for key, value in expected.items():
                torch.testing.assert_close(ours[key], value, equal_nan=True)
        if not case.wrt:
            continue
        x = floats[case.wrt[0]].clone().requires_grad_()
        for factor in (1.0, -1.0):  # a 1 in memory takes a path of its own through the backward of a loss
            out = next(t for t in tensors_of(case.op(**inputs | {case.wrt[0]: x})).values() if t.requires_grad)
            coming = torch.full_like(out, factor)
            (plain,) = torch.autograd.grad(out, x, coming, retain_graph=True)
            (ours,) = torch.autograd.grad(out, x, imaginary(coming))
            torch.testing.assert_close(ours, plain, equal_nan=True)


WITHOUT_TABLE = """
import sys, pytest, torch
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
tests = "batched_gradients or imaginary_part or half_precision_is_refused"
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:], "-k", tests]))
"""


def test_an_older_torch_s_backward_sees_what_no_kernel_may_have():
    """torch before 2.10 has no DLPack exchange table, so the bindings read Python attributes."""
    trunk = Path(__file__).parents[1] / "test_trunk.py"
    command = [sys.executable, "-c", WITHOUT_TABLE, __file__, str(trunk)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]


@every_case
def test_the_gradient_under_a_checkpoint_is_the_same(case):
    """A checkpoint recomputes the saved tensors and lets a backward read them only once."""
    if not case.wrt:
        pytest.skip("not differentiable")
    for seed in range(3):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)

        def checkpointed(**arguments):
            return torch.utils.checkpoint.checkpoint(lambda: case.op(**arguments), use_reentrant=False)

        ours = run(checkpointed, case, inputs)
        for name, value in run(case.op, case, inputs).items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)


@every_case
def test_a_gradient_that_could_be_differentiated_under_a_checkpoint_is_the_same(case):
    of, x = function_of_one_input(case)
    x = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(of(x), x)
    try:
        (found,) = torch.autograd.grad(
            torch.utils.checkpoint.checkpoint(of, x, use_reentrant=False), x, create_graph=True
        )
    except RuntimeError as error:  # a loss that has kept its gradients only
        assert "differentiate twice" in str(error)
    else:
        torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_device_does_not_matter(case, dtype):
    """Outputs must be on the device of the inputs, or a kernel would write to addresses of another device."""
    for seed in range(4):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), dtype)
        with torch.device("meta"):
            ours = run(case.op, case, inputs)
        for name, value in run(case.op, case, inputs).items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)


@every_case
def test_reference_backend_is_the_reference(case):
    inputs = cast(case.inputs(Sampler(random.Random(3))), torch.float32)
    with rf.use_backend("reference"):
        ours = run(case.op, case, inputs)
    for name, value in run(case.reference, case, inputs).items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)
    with contextlib.suppress(RuntimeError), rf.use_backend("triton"):
        case.op(**inputs)  # either a kernel, or an error that names the op: never a silent other backend


@every_case
def test_a_backward_inside_use_backend_reference_of_a_forward_outside_it(case):
    if not case.wrt:
        pytest.skip("not differentiable")
    total, wrt = loss_and_leaves(case, 0)
    expected = torch.autograd.grad(total, wrt, retain_graph=True, allow_unused=True)
    with rf.use_backend("reference"):
        inside = torch.autograd.grad(total, wrt, allow_unused=True)
    for a, b in zip(inside, expected, strict=True):
        assert a is b is None or torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def test_a_kernel_chosen_while_another_thread_ends_use_backend_is_not_kept(monkeypatch):
    logits, labels = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
    op, forced = _dispatch._OPS["token_logprobs_forward"], []

    def ends_meanwhile(device):
        _dispatch._force(None)
        forced.append(device)
        return "forced"

    monkeypatch.setitem(op.kernels["cpu"], "forced", lambda *args: forced.append("kept"))
    monkeypatch.setattr(op, "_ready", {})
    with monkeypatch.context() as patch:
        patch.setattr(op, "backend_on", ends_meanwhile)
        op.kernel_on("cpu")
    assert torch.isfinite(rf.token_logprobs(logits, labels)).all() and forced == ["cpu"]


VERSION = """
import sys
import torch
from rlhf_fast.ops._dispatch import Op

factors = [2.0] if sys.argv[1] == "with a factor" else []
name, in_backward = sys.argv[2], sys.argv[2] != "doubled_backward"
backward = Op(
    name + "(Tensor grad" + ", float factor" * len(factors) + ") -> Tensor",
    kernels={("cpu", "native"): lambda grad, factor=2.0: grad * factor}, fake=lambda grad, *_: torch.empty_like(grad),
    in_backward=in_backward,
)
doubled = Op(
    "doubled(Tensor x) -> Tensor", kernels={("cpu", "native"): lambda x: 2 * x}, fake=torch.empty_like,
    backward=lambda ctx, grad: (backward(grad, *factors),), setup_context=lambda *_: None,
)
x = torch.ones(3, requires_grad=True)
torch.compile(lambda x: doubled(x).sum(), fullgraph=True)(x).backward()
assert x.grad.tolist() == [2.0] * 3
"""


@pytest.mark.parametrize("backward", ["doubled_backward", "scaled"])
def test_a_graph_that_another_version_has_left_on_disk_is_not_taken(tmp_path, backward):
    """The forward's arguments are the same, so only the name of the op can tell Inductor's cache the two apart."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for version in ("without", "with a factor"):
        subprocess.run([sys.executable, "-c", VERSION, version, backward], check=True, env=environment, timeout=300)

"""Every op on a GPU (`make gpu`): accuracy, compile, streams, graphs, devices, host synchronisation, bits, size."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from pathlib import Path

import battery
import emulation
import pytest
import torch
from battery import on_device

import rlhf_fast as rf
from rlhf_fast.ops import _dispatch, _linear, reference
from rlhf_fast.ops._known_gradient import PpoTokens, known_gradient

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from cases import CASES, Sampler
from test_contract import LAYOUTS, assert_as_close_as_eager, cast, run, tensors_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BACKENDS = ("native", "triton")
SLEEP = 1_000_000_000  # cycles, half a second: ten test processes share the CPU and the device


def backends_of(case) -> list[str]:
    """Those whose kernels the case runs on a GPU; a linear op runs those of the rows between its products."""
    name = emulation.USES.get(case.name, case.name)
    op = _dispatch._OPS.get(name) or _dispatch._OPS[f"{name}_forward"]
    return list(op.kernels["cuda"])


every_case = pytest.mark.parametrize(
    "case, backend",
    [pytest.param(case, backend, id=f"{case.name}-{backend}") for case in CASES for backend in backends_of(case)],
)


@pytest.fixture(autouse=True)
def eager_logits_in_their_dtype(monkeypatch):
    emulation.logits_in_their_dtype(monkeypatch)


def needs_gib(size: int) -> None:
    """What earlier tests have freed lies in PyTorch's cache, and a card does not count that as free."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < size * 2**30:
        pytest.skip(f"needs {size} GiB")


def backend_of(name: str):
    return rf.use_backend(name)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_is_as_close_to_float64_as_eager_is(case, backend, dtype):
    with backend_of(backend):
        for seed in range(24):
            inputs = case.inputs(Sampler(random.Random(seed)))
            assert_as_close_as_eager(on_device(case, "cuda", LAYOUTS[seed % 4]), inputs, dtype)


@every_case
def test_gradcheck(case, backend):
    if not case.wrt:
        pytest.skip("not differentiable")
    op, checked = on_device(case, "cuda").op, 0
    for seed in range(12):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float64)
        wrt = [n for n in case.wrt if isinstance(inputs.get(n), torch.Tensor)]
        if any(inputs[n].isinf().any() or inputs[n].numel() > 400 for n in wrt):
            continue

        def f(*values, inputs=inputs, wrt=wrt):
            out = tensors_of(op(**(inputs | dict(zip(wrt, values, strict=True)))))
            return tuple(t for t in out.values() if t.requires_grad)

        with backend_of(backend):
            assert torch.autograd.gradcheck(f, [inputs[n].requires_grad_() for n in wrt], eps=1e-7, atol=1e-5)
        checked += 1
    assert checked >= 2


@every_case
def test_opcheck(case, backend, monkeypatch):
    calls = []
    original = _dispatch.Op.__call__
    monkeypatch.setattr(_dispatch.Op, "__call__", lambda self, *a: (calls.append((self, a)), original(self, *a))[1])
    with backend_of(backend):
        for seed in range(2):
            run(on_device(case, "cuda").op, case, cast(case.inputs(Sampler(random.Random(seed))), torch.float32))
        monkeypatch.undo()
        assert calls, "the op never reached a kernel"
        for op, args in calls:
            # Leaves, as opcheck asks only those for a gradient; of a backward op none is asked.
            differentiates = op.function is not None
            args = tuple(
                a.detach().requires_grad_(a.requires_grad and differentiates) if isinstance(a, torch.Tensor) else a
                for a in args
            )
            torch.library.opcheck(op.library_op, args)


@every_case
def test_compiles_to_one_graph_with_the_same_result(case, backend):
    torch._dynamo.reset()
    graph = case._replace(op=torch.compile(case.op, fullgraph=True, dynamic=False))
    with backend_of(backend):
        for seed in range(2):
            inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
            ours, compiled = (run(on_device(c, "cuda").op, c, inputs) for c in (case, graph))
            for name in ours:
                torch.testing.assert_close(compiled[name], ours[name], rtol=1e-5, atol=1e-6, equal_nan=True)


@every_case
def test_two_runs_give_the_same_bits(case, backend):
    with backend_of(backend):
        for seed in range(8):
            inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
            first, second = (run(on_device(case, "cuda").op, case, inputs) for _ in range(2))
            for name in first:
                assert torch.equal(first[name].nan_to_num(nan=7.0), second[name].nan_to_num(nan=7.0)), name


@every_case
@pytest.mark.parametrize("test", battery.OF_THE_CONTRACT, ids=lambda test: test.__name__)
def test_of_the_contract(case, backend, test):
    if case.name.startswith("linear") and test.__name__ == "test_a_row_does_not_depend_on_its_batch":
        pytest.skip("cuBLAS chooses the order of its sums by the number of rows")
    with backend_of(backend):
        test(on_device(case, "cuda"))


@every_case
def test_no_argument_is_modified(case, backend):
    with backend_of(backend):
        battery.no_argument_is_modified(case, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["token_logprobs", "token_logprobs_and_entropy", "kl_divergence"])
def test_a_row_op_inside_a_cuda_graph(op, backend):
    with backend_of(backend):
        battery.rows_in_a_graph(op, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_least_number_is_an_impossible_token(dtype, backend):
    with backend_of(backend):
        battery.least_numbers_are_impossible_tokens(dtype, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kl_divergence_of_more_than_2_to_the_31_elements(backend):
    needs_gib(24)
    with backend_of(backend):
        battery.kl_divergence_of_many(16384, 151936, "cuda")


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_cross_entropy", "linear_ppo_loss"])
@pytest.mark.parametrize("rows, width, vocab", [(16384, 64, 151936), (256, 16512, 131072)], ids=["logits", "weights"])
def test_a_head_of_more_than_2_to_the_31_elements(rows, width, vocab, op):
    needs_gib(40)
    battery.head_of_many(op, rows, width, vocab, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_gives_the_same_bits_anywhere_in_the_batch(backend, dtype):
    logits = torch.randn(64, 50257, device="cuda").to(dtype)  # rows at every alignment
    labels = torch.randint(50257, (64,), device="cuda")
    order = torch.randperm(64, device="cuda")
    with rf.use_backend(backend):
        straight = rf.token_logprobs_and_entropy(logits, labels)
        shuffled = rf.token_logprobs_and_entropy(logits[order].contiguous(), labels[order])
        few = rf.token_logprobs_and_entropy(logits[:3], labels[:3])
    for a, b, c in zip(straight, shuffled, few, strict=True):
        assert torch.equal(a[order], b) and torch.equal(a[:3], c)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_the_current_stream_and_never_waits_for_it(backend):
    x = torch.zeros(32, 32000, device="cuda")
    values = torch.randn_like(x)
    labels = torch.arange(32, device="cuda")
    want = reference.token_logprobs(values, labels)
    stream = torch.cuda.Stream()
    with rf.use_backend(backend):
        rf.token_logprobs(values, labels)  # loads the kernel, which may synchronise
        with torch.cuda.stream(stream):
            rf.token_logprobs(values, labels)  # fills this stream's part of the caching allocator
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP)
                x.copy_(values)  # later on this stream: a kernel on another one would read zeros
                got = rf.token_logprobs(x, labels)
            waited = stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not waited, "the call waited for the GPU"
    torch.cuda.synchronize()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_the_31_elements(backend):
    rows, vocab = 16384, 151936
    needs_gib(12)
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(vocab, (rows,), device="cuda")
    with rf.use_backend(backend):
        logprobs, entropy = rf.token_logprobs_and_entropy(logits, labels)
        (logprobs.sum() + entropy.sum()).backward()
    for row in (0, 14133, 14135, rows - 1):  # 2^31 / vocab = 14134.1
        x = logits[row].detach().double().requires_grad_()
        want_logprobs, want_entropy = reference.token_logprobs_and_entropy(x, labels[row])
        (want_logprobs + want_entropy).backward()
        torch.testing.assert_close(logprobs[row].double(), want_logprobs, rtol=2e-6, atol=0)
        torch.testing.assert_close(entropy[row].double(), want_entropy, rtol=2e-6, atol=0)
        assert (logits.grad[row].double() - x.grad).norm() <= 2**-8 * x.grad.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_gradient(backend):
    logits, labels = torch.randn(7, 50257, device="cuda"), torch.arange(7, device="cuda")
    mask = labels % 3 != 0
    with rf.use_backend(backend):
        apart, over = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        rf.token_logprobs(apart, labels, mask=mask).sum().backward()
        rf.token_logprobs(over, labels, mask=mask, inplace_backward=True).sum().backward()
    assert torch.equal(apart.grad, over.grad) and over.grad.data_ptr() == over.data_ptr()
    assert not apart.grad[0].any()


@pytest.mark.parametrize("backend, says", [("native", "label 9 of row 1"), ("triton", "outside the vocabulary")])
def test_a_label_out_of_range_stops_the_kernel_by_name(backend, says):
    """In a process of its own, because a stopped kernel takes the CUDA context with it."""
    code = f"""
import torch, rlhf_fast as rf
with rf.use_backend({backend!r}):
    rf.token_logprobs(torch.zeros(3, 9, device="cuda"), torch.tensor([3, 9, 0], device="cuda"))
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and says in result.stdout + result.stderr, result.stdout + result.stderr


def test_backends_name_the_cuda_kernel():
    linear = ("linear_token_logprobs", "linear_cross_entropy", "linear_ppo_loss")
    for op in ("token_logprobs", "kl_divergence", "ranking_loss", *linear, *SMALL):
        assert rf.backends()[op]["cuda"]["backend"] == "native", op


# --- From hidden states -----------------------------------------------------------------------------------------------


def head(rows: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(1, rows, width) hidden, weight, labels, old log-probs, advantages, and a mask of about four in five."""
    g = torch.Generator(device="cuda").manual_seed(rows)
    draw = lambda *shape: torch.randn(*shape, device="cuda", generator=g)  # noqa: E731
    return (
        draw(1, rows, width).to(dtype), (draw(vocab, width) / width**0.5).to(dtype),
        torch.randint(vocab, (1, rows), device="cuda", generator=g), 0.1 * draw(1, rows) - 10, draw(1, rows),
        draw(1, rows) < 0.85,
    )  # fmt: skip


def linear_ppo(x, factor: float = 1.0, **options) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in x[:2]]
    loss, stats = rf.linear_ppo_loss(*leaves, *x[2:], entropy_coef=0.01, **options)
    return [loss.detach(), *torch.autograd.grad(factor * loss, leaves), stats["ratio_mean"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [5003, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_a_head_add_up(dtype, vocab, backend, monkeypatch):
    """One chunk, many, and float64: the weight's gradient is added up in float32 however many there are."""
    x = head(700, 256, vocab, dtype)
    truth = [t.double() if t.is_floating_point() else t for t in x]
    with rf.use_backend("reference"):
        want = linear_ppo(truth, factor=3.0)
    with rf.use_backend(backend):
        for rows in (1024, 128):
            monkeypatch.setattr(_linear, "GPU_LEAST_ROWS", rows)
            monkeypatch.setattr(_linear, "GPU_CHUNK_BYTES", rows * vocab * x[1].element_size())
            got = linear_ppo(x, factor=3.0)
            tolerance = 1e-4 if dtype == torch.float32 else 2e-2
            for ours, true in zip(got, want, strict=True):
                assert (ours - true).norm() <= tolerance * true.norm().clamp(min=1e-3)


def test_autocast_changes_nothing_in_a_head():
    x = head(300, 64, 5003, torch.bfloat16)
    plain = linear_ppo(x)
    with torch.autocast("cuda", dtype=torch.float16):
        inside = linear_ppo(x)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


def test_autocast_rounds_the_factors_of_a_head_and_not_the_gradient_of_its_weight():
    x = head(300, 64, 5003, torch.float32)
    plain = linear_ppo((x[0].bfloat16(), x[1].bfloat16(), *x[2:]))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = linear_ppo(x)
    assert torch.equal(inside[0], plain[0]) and torch.equal(inside[1], plain[1].float())
    assert inside[2].dtype == torch.float32
    torch.testing.assert_close(inside[2].bfloat16(), plain[2])


def test_a_head_without_a_mask_never_waits():
    """With one it waits once, to know how many rows count."""
    x = head(512, 64, 5003, torch.bfloat16)
    call = lambda: rf.linear_token_logprobs(x[0].requires_grad_(), x[1], x[2]).sum().backward()  # noqa: E731
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_head_is_a_chunk_and_the_gradient_of_the_weight():
    rows, width, vocab = 8192, 4096, 128256
    needs_gib(20)
    x = head(rows, width, vocab, torch.bfloat16)
    leaves = [t.requires_grad_() for t in x[:2]]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = rf.linear_ppo_loss(*leaves, *x[2:])
    extra = torch.cuda.max_memory_allocated() - before
    # The rows that count are copied; float32 and bfloat16 gradients of the weight stand side by side at the end.
    results = 2 * leaves[0].nbytes + (4 + 2) * vocab * width
    assert extra - results <= 0.55 * 2**30, extra / 2**30
    loss.backward()


def test_a_large_gradient_is_scaled_where_the_factor_is_not_1():
    x = head(64, 256, 8192, torch.bfloat16)  # a weight of 2^21 numbers
    one, three = linear_ppo(x), linear_ppo(x, factor=3.0)
    for a, b in zip(one[1:3], three[1:3], strict=True):
        torch.testing.assert_close(b.float(), 3 * a.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("vocab", [50257, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_known_gradient_is_that_of_two_kernels(dtype, vocab):
    """At every alignment, and with rows that shared memory holds whole, in part, and hardly."""
    rows = 40
    torch.manual_seed(0)
    logits = (4 * torch.randn(rows, vocab, device="cuda")).to(dtype)
    logits[3, : vocab // 2] = -torch.inf
    labels = torch.randint(vocab // 2, vocab, (rows,), device="cuda")
    labels[4:8] = torch.tensor([0, 1, vocab - 2, vocab - 1])  # in the ragged ends of a row, wherever it starts
    weights = torch.rand(rows, device="cuda", dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = logits.clone().requires_grad_()
    logprobs, entropy = rf.token_logprobs_and_entropy(x, labels, temperature=0.8)
    old = logprobs.detach() - 0.1
    loss, _ = rf.ppo_loss(logprobs[None], old[None], weights[None], old[None] < 0, entropy=entropy[None],
                          entropy_coef=0.01, normalizer=1.0)  # fmt: skip
    (want,) = torch.autograd.grad(loss, x)
    options = (0.8, 1.2, torch.inf, torch.inf, 0.0, 0, 0.01)
    tokens = PpoTokens(old, weights, None, None, options)
    got = logits.clone()
    known, known_entropy = known_gradient(got, labels, None, 0.8, torch.ones_like(weights), tokens)
    torch.testing.assert_close(known, logprobs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(known_entropy, entropy.detach(), rtol=1e-5, atol=1e-6)
    # In float32 the two take blocks of other sizes, and a log-probability near -24 has an ulp of 2e-6.
    allowed = max(2 * torch.finfo(dtype).eps, 4e-6 if dtype == torch.float32 else 0.0)
    assert (got.double() - want.double()).norm() <= allowed * want.double().norm() + 1e-6
    again = logits.flip(0).contiguous()  # the same bits wherever a row lies
    flipped = PpoTokens(old.flip(0), weights.flip(0), None, None, options)
    known_gradient(again, labels.flip(0), None, 0.8, torch.ones_like(weights), flipped)
    assert torch.equal(again.flip(0), got)


def test_a_known_gradient_of_more_than_2_to_the_31_elements():
    rows, vocab = 16384, 151936
    needs_gib(12)
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(vocab, (rows,), device="cuda")
    kept = {row: logits[row].double() for row in (0, 14133, 14135, rows - 1)}
    known_gradient(logits, labels, None, 1.0, torch.ones(rows, device="cuda"), None)
    for row, x in kept.items():
        x.requires_grad_()
        (want,) = torch.autograd.grad(-reference.token_logprobs(x, labels[row]), x)
        assert (logits[row].double() - want).norm() <= 2**-8 * want.norm()


# --- The small ops: one launch, whatever the stream, the device, the graph -------------------------------------------

SMALL = ("ppo_loss", "value_loss", "kl_penalty", "pairwise_loss", "gae", "masked_mean", "masked_whiten")
small_ops = pytest.mark.parametrize("op", SMALL)


def small_inputs(op: str, device: str = "cuda", rows: int = 64, columns: int = 1024) -> dict[str, torch.Tensor]:
    """Of a PPO step's size: many blocks, several of which may run on other streams at the same time."""
    generator = torch.Generator(device=device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    mask = torch.rand(rows, columns, device=device, generator=generator) < 0.8
    names = {
        "ppo_loss": ("logprobs", "old_logprobs", "advantages"), "value_loss": ("values", "old_values", "returns"),
        "kl_penalty": ("logprobs", "ref_logprobs"), "gae": ("rewards", "values"), "masked_mean": ("values",),
        "masked_whiten": ("values",),
    }  # fmt: skip
    if op == "pairwise_loss":
        return {name: draw(rows * columns) for name in ("chosen", "rejected")}
    tensors = {name: draw(rows, columns) for name in names[op]}
    if op in ("ppo_loss", "value_loss"):  # a normalizer that lies on the device, and is read there
        tensors["normalizer"] = torch.full((), 1000.0, dtype=torch.float64, device=device)
    return tensors | ({"mask": mask} if op != "kl_penalty" else {})


def forward_and_gradient(op: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(inputs))
    prediction = inputs[first].detach().requires_grad_(op != "gae")
    options = {"estimator": "k3"} if op == "kl_penalty" else {}  # k1 is one subtraction, and no kernel of ours
    outputs = tensors_of(getattr(rf, op)(**(inputs | {first: prediction} | options)))
    total = sum(out.sum() for out in outputs.values() if out.requires_grad)
    results = {name: out.detach() for name, out in outputs.items()}
    return results if op == "gae" else results | {"grad": torch.autograd.grad(total, prediction)[0]}


def assert_same_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@small_ops
def test_a_small_op_never_waits_for_its_stream(op):
    inputs = small_inputs(op)
    want = forward_and_gradient(op, inputs)  # loads the kernels, which may synchronise
    late = {name: torch.zeros_like(x) for name, x in inputs.items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward_and_gradient(op, inputs)  # fills this stream's part of the caching allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP)
            for name, x in inputs.items():
                late[name].copy_(x)
            got = forward_and_gradient(op, late)
        waited = stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited, "the call waited for the GPU"
    torch.cuda.synchronize()
    assert_same_bits(got, want)


@small_ops
def test_streams_side_by_side_share_nothing(op):
    inputs = small_inputs(op)
    want = forward_and_gradient(op, inputs)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(forward_and_gradient(op, inputs))
    torch.cuda.synchronize()
    for got in results:
        assert_same_bits(got, want)


@small_ops
def test_inside_a_cuda_graph(op):
    """Captured once, replayed with other inputs; two graphs, and calls outside them, at the same time."""
    inputs = small_inputs(op)
    static = {name: x.clone() for name, x in inputs.items()}
    want = forward_and_gradient(op, inputs)
    warmup = torch.cuda.Stream()
    with torch.cuda.stream(warmup):
        forward_and_gradient(op, static)
    torch.cuda.synchronize()
    graphs, outputs = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(forward_and_gradient(op, static))
        graphs.append(graph)
    for x in static.values():
        x.zero_()
    for graph in graphs:
        graph.replay()
    for name, x in inputs.items():
        static[name].copy_(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in graphs]
    beside = []
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        beside.append(forward_and_gradient(op, inputs))
    torch.cuda.synchronize()
    for got in (*outputs, *beside):
        assert_same_bits(got, want)


@small_ops
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one(op):
    want = forward_and_gradient(op, small_inputs(op))
    moved = {name: x.to("cuda:1") for name, x in small_inputs(op).items()}
    got = forward_and_gradient(op, moved)
    assert torch.cuda.current_device() == 0
    assert_same_bits({name: x.to("cuda:0") for name, x in got.items()}, want)


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "gae", "kl_penalty"])
def test_a_small_op_of_more_than_2_to_the_31_elements(op):
    """Its last rows are those of a small batch of them."""
    rows, columns = 2**21 + 8, 1024
    needs_gib(70)
    part = small_inputs(op, rows=8)
    whole = {
        name: x if x.ndim == 0 else torch.zeros(rows, columns, dtype=x.dtype, device="cuda") for name, x in part.items()
    }
    for name, x in part.items():
        if x.ndim:
            whole[name][-8:] = x
    names = ["grad"] if op != "gae" else ["0", "1"]
    want, got = forward_and_gradient(op, part), forward_and_gradient(op, whole)
    for name in names:
        assert torch.equal(got[name][-8:], want[name]), name


def test_a_masked_mean_of_more_than_2_to_the_31_elements():
    needs_gib(12)
    values = torch.ones(2**31 + 40, device="cuda", dtype=torch.bfloat16)
    values[-40:] = 2.0**20
    want = (2**31 + 40 * 2**20) / (2**31 + 40)
    assert abs(rf.masked_mean(values).item() / want - 1) < 1e-6


# --- What stands on the ops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", battery.GRAPHS)
def test_generation_replays_graphs_and_equals_transformers(architecture, monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), replay(self))[1])
    battery.generates_as_transformers(architecture, "cuda")
    graphs = battery.GRAPHS[architecture]  # the first step of each is run as it is
    assert len(set(map(id, replays))) == graphs and len(replays) == battery.STEPS.get(architecture, 39) - graphs


@pytest.mark.parametrize("architecture", battery.GRAPHS)
def test_generation_in_bfloat16(architecture):
    battery.bf16_generates_as_exactly_as_autocast(architecture, "cuda")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("share_trunk", [False, True])
def test_iterations_of_ppo(share_trunk, bf16, tmp_path):
    battery.ppo_iterations("cuda", tmp_path, 0.1 if bf16 else 1e-4, share_trunk=share_trunk, bf16=bf16)

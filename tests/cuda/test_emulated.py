"""The CUDA sources executed without a GPU: arithmetic, indexing, layouts, barriers. Not its speed or memory order."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import battery
import emulation
import pytest
import torch

import rlhf_fast as rf
from rlhf_fast.ops import _autograd, _dispatch, _known_gradient, _linear, _native, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from cases import CASES, Sampler
from test_contract import LAYOUTS, assert_as_close_as_eager, assert_mask_hides, cast, run, tensors_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ORDERS = emulation.ORDERS
LINEAR = [case for case in CASES if case.name.startswith("linear_")]
EMULATED = {name.removesuffix("_forward").removesuffix("_backward") for name in emulation.signatures()}
EMULATED_CASES = [case for case in CASES if emulation.USES.get(case.name, case.name) in EMULATED]
every_case = pytest.mark.parametrize("case", EMULATED_CASES, ids=lambda c: c.name)
small_ops = pytest.mark.parametrize(
    "case", [c for c in EMULATED_CASES if emulation.USES.get(c.name, c.name) != "token_logprobs"], ids=lambda c: c.name
)


def in_every_order(emulated, call) -> dict[str, torch.Tensor]:
    """The results of call(), which are the same bits whichever thread and block runs first."""
    results = []
    for order in ORDERS:
        emulated.set_order(order)
        results.append(call())
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name].nan_to_num(nan=7.0), value.nan_to_num(nan=7.0)), name
    return results[0]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_is_as_close_to_float64_as_eager_is(case, dtype, on_emulator):
    for seed in range(16):
        on_emulator.set_order(ORDERS[seed % 3])
        assert_as_close_as_eager(case, case.inputs(Sampler(random.Random(seed))), dtype, LAYOUTS[seed % 4])


@every_case
def test_the_order_of_threads_and_blocks_does_not_matter(case, on_emulator):
    for seed in range(6):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        in_every_order(on_emulator, lambda inputs=inputs: run(case.op, case, inputs))


@pytest.mark.parametrize("error, says", [
    (1, "cudaError_t 1$"), (719, "719, from a kernel that ran before"), (701, "701$"), (209, "code only for 80-real"),
    (35, "driver"),
])  # fmt: skip
def test_a_launch_that_fails_says_whose_fault_it_is(error, says, monkeypatch):
    kernels = SimpleNamespace(gae=lambda *arguments: error)
    native = SimpleNamespace(cuda=kernels, cuda_version="13.0", cuda_architectures="80-real")
    monkeypatch.setattr(_native, "_C", native)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    with pytest.raises(RuntimeError, match=f"gae: the launch on cuda:0 failed with .*{says}"):
        _native.launch("gae", (SimpleNamespace(device=torch.device("cuda:0")),))


# --- From hidden states: the products are PyTorch's, the rows a kernel's ---------------------------------------------


@pytest.mark.parametrize("case", LINEAR, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_linear_op_is_as_close_to_float64_as_eager_is(case, dtype, on_emulator, monkeypatch):
    emulation.logits_in_their_dtype(monkeypatch)
    for seed in range(8):
        on_emulator.set_order(ORDERS[seed % 3])
        assert_as_close_as_eager(case, emulation.few_rows(case, seed), dtype, LAYOUTS[seed % 4])


def head(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A PPO step's head, with a masked row that holds NaN."""
    g = torch.Generator().manual_seed(rows + vocab)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    mask = torch.rand(1, rows, generator=g) < 0.8
    mask[0, 1] = False
    hidden = draw(1, rows, 16).masked_fill(~mask[..., None], torch.nan)
    return {
        "hidden": hidden.to(dtype), "weight": (draw(vocab, 16) / 4).to(dtype),
        "labels": torch.randint(vocab, (1, rows), generator=g), "old_logprobs": 0.2 * draw(1, rows) - vocab**0.2,
        "advantages": draw(1, rows), "mask": mask,
    }  # fmt: skip


@pytest.mark.parametrize("chunk_rows", [4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_a_head_in_one_kernel(chunk_rows, dtype, on_emulator, monkeypatch):
    """One launch a chunk beside the small ops; the logits lie in rows padded to 64, whose end stays out."""
    x = head(12, 1003, dtype)
    monkeypatch.setattr(_linear, "GPU_ROWS", 1)
    monkeypatch.setattr(_linear, "GPU_LEAST_ROWS", 1)
    monkeypatch.setattr(_linear, "GPU_CHUNK_BYTES", chunk_rows * 1003 * x["weight"].element_size())
    chunks = -(-int(x["mask"].sum()) // chunk_rows)
    turned = []
    known = _linear.known_gradient
    monkeypatch.setattr(_linear, "known_gradient", lambda *a: turned.append(a[0].shape[0]) or known(*a))
    truth = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    terms = {"entropy_coef": 0.01, "ref_logprobs": x["old_logprobs"], "kl_coef": 0.1, "dual_clip": 3.0}
    for changed, option in ({}, {}), ({}, terms), ({"old_logprobs": None}, {}), ({"old_logprobs": None}, terms):
        turned.clear()
        leaves = [x[n].clone().requires_grad_() for n in ("hidden", "weight")]
        loss, stats = rf.linear_ppo_loss(*leaves, *list((x | changed).values())[2:], **option)
        assert len(turned) == chunks and sum(turned) == x["mask"].sum()
        grads = torch.autograd.grad(loss, leaves)
        true = [truth[n].clone().requires_grad_() for n in ("hidden", "weight")]
        want, want_stats = reference.linear_ppo_loss(*true, *list((truth | changed).values())[2:], **option)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(stats["ratio_mean"].double(), want_stats["ratio_mean"], rtol=tolerance, atol=0)
        for got, expected in zip(grads, torch.autograd.grad(want, true), strict=True):
            assert (got - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * expected.norm()
    turned.clear()
    with torch.no_grad():
        rf.linear_ppo_loss(*x.values())
    assert not turned  # nobody asked for a gradient: the forward kernel alone reads the logits


def test_tokens_of_a_head_may_lie_apart(on_emulator):
    """Every second number of a row, as a part of a stacked tensor lies; without a mask nothing copies them before."""
    x = head(6, 67, torch.float32) | {"mask": torch.ones(1, 6, dtype=torch.bool)}
    x["hidden"] = x["hidden"].nan_to_num(0.5)
    data = list(x.values())[2:]
    data[1] = rf.linear_token_logprobs(x["hidden"], x["weight"], x["labels"])  # no ratio is clipped, so all count

    def gradients(apart):
        old, advantages, importance = (torch.stack([t, -t], -1) for t in (*data[1:3], 1 + data[2].abs()))
        old, advantages, importance = (t[..., 0] if apart else t[..., 0].clone() for t in (old, advantages, importance))
        leaves = [x[n].clone().requires_grad_() for n in ("hidden", "weight")]
        options = {"ref_logprobs": old, "kl_coef": 0.1, "importance_weights": importance}
        loss, _ = rf.linear_ppo_loss(*leaves, data[0], old, advantages, x["mask"], **options)
        return torch.autograd.grad(loss, leaves)

    for got, want in zip(gradients(apart=True), gradients(apart=False), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(not _dispatch._NO_CUDA_GRAPH, reason="this torch has no such tag")
def test_an_op_that_waits_for_the_device_stays_out_of_cuda_graphs(on_emulator, monkeypatch):
    """Here it is nonzero that waits, for the size of its result: in a capture it would be an error."""
    running, waited, run_op, nonzero = [], set(), _dispatch.Op.run, torch.Tensor.nonzero

    def watched(self, *args):
        running.append(self.name)
        try:
            return run_op(self, *args)
        finally:
            running.pop()

    monkeypatch.setattr(_dispatch.Op, "run", watched)
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: waited.update(running[-1:]) or nonzero(x))
    monkeypatch.setattr(_autograd, "_consume", lambda *tensors: _autograd._SHARED)  # all backwards through Op
    for case in [*EMULATED_CASES, *LINEAR]:
        for seed in range(6):
            run(case.op, case, cast(emulation.few_rows(case, seed), torch.float32))
    (unsafe,) = _dispatch._NO_CUDA_GRAPH
    assert waited == {op.name for op in _dispatch._OPS.values() if unsafe in op.library_op.tags}


def test_what_a_library_op_returns_is_all_written(on_emulator, monkeypatch):
    """opcheck on a GPU compares every output of two calls: the columns of kept logits behind the vocabulary too."""
    x = head(12, 131, torch.bfloat16)
    arguments = x["hidden"][0].nan_to_num(), x["weight"], None, x["labels"][0]
    make, outputs = torch.empty, []
    for dirt in (1.0, 2.0):
        monkeypatch.setattr(torch, "empty", lambda *a, dirt=dirt, **k: make(*a, **k).fill_(dirt))
        for mask in (None, x["mask"][0]):
            options = mask, 1.0, None, False, False, True, True, True, False
            outputs.append(torch.ops.rlhf_fast.linear_token_logprobs(*arguments, *options))
    for first, second in zip(outputs[:2], outputs[2:], strict=True):
        assert first[3].shape == (12, 192)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["linear_ppo_loss", "linear_cross_entropy", "linear_token_logprobs"])
def test_autocast_rounds_the_factors(name, on_emulator):
    x = head(12, 131, torch.float32)
    x["hidden"] = x["hidden"].nan_to_num()
    more = {"mask": x.pop("mask")} if name == "linear_token_logprobs" else {}
    rest = [x[key] for key in list(x)[2:]] if name == "linear_ppo_loss" else [x["labels"]]

    def run(factors, autocast):
        leaves = [t.clone().requires_grad_() for t in factors]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = getattr(rf, name)(*leaves, *rest, **more)
        out = out[0] if isinstance(out, tuple) else out
        return out.detach(), *torch.autograd.grad(out.sum(), leaves)

    factors = x["hidden"], x["weight"]
    plain, grad_hidden, grad_weight = run([t.bfloat16() for t in factors], False)
    inside, *got = run(factors, True)
    assert torch.equal(inside, plain) and torch.equal(got[0], grad_hidden.float())
    assert got[1].dtype == torch.float32 and torch.equal(got[1].bfloat16(), grad_weight)


def turn(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, ppo=None, temperature=0.8):
    logprobs, entropy = _known_gradient.known_gradient(logits, labels, None, temperature, weights, ppo)
    return {"logprobs": logprobs, "entropy": entropy, "gradient": logits}


@pytest.mark.parametrize("shared", [2048, 9000, 20000, 232448], ids=["none", "a part", "most", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_known_gradient_at_every_alignment(dtype, shared, on_emulator):
    """Whatever of the row fits into shared memory, and wherever it lies: the same bits, and nothing beside it."""
    row = 3 * torch.randn(5003, generator=torch.Generator().manual_seed(1)) - 90
    row[:2000] = -torch.inf
    row, labels, weights = row.to(dtype), torch.tensor([2500]), torch.tensor([0.7])
    truth = row.double().requires_grad_()
    logprob, entropy = reference.token_logprobs_and_entropy(truth, labels[0], temperature=0.8)
    (-0.7 * logprob).backward()
    on_emulator.set_shared_limit(shared)
    try:
        for offset in (0, 1, 2, 3, 5, 7):
            room = torch.full((offset + len(row) + 8,), 1000.0, dtype=dtype)
            x = room[offset : offset + len(row)]

            def call(x=x):
                x.copy_(row)
                return {k: v.clone() for k, v in turn(x[None], labels, weights).items()}

            got = in_every_order(on_emulator, call) if offset == 1 else call()
            assert (room[:offset] == 1000).all() and (room[offset + len(row) :] == 1000).all()
            torch.testing.assert_close(got["logprobs"][0].double(), logprob.detach(), rtol=2e-6, atol=0)
            torch.testing.assert_close(got["entropy"][0].double(), entropy.detach(), rtol=2e-6, atol=0)
            error = (got["gradient"][0].double() - truth.grad).norm()
            assert error <= torch.finfo(dtype).eps * truth.grad.norm()
            if offset == 0:
                first = got
            for name in first:
                assert torch.equal(got[name], first[name]), (name, offset)
    finally:
        on_emulator.set_shared_limit(232448)


def test_the_attributes_of_a_kernel_do_not_depend_on_the_row(on_emulator):
    """They are the process's: a thread with short rows must not take the shared memory of one with long rows."""
    for vocab in (64, 5003, 200_000):
        turn(torch.zeros(1, vocab), torch.tensor([3]), torch.ones(1))
        assert on_emulator.function_attributes() == (232448 - 2048, 100)


def test_a_known_gradient_of_weight_0_is_0_and_a_wrong_label_is_named(on_emulator, capfd):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    got = turn(logits.clone(), torch.tensor([3, 4, 5]), torch.tensor([1.0, 0.0, 2.0]))
    assert not got["gradient"][1].any() and got["gradient"][[0, 2]].all()
    assert torch.equal(got["logprobs"], rf.token_logprobs(logits, torch.tensor([3, 4, 5]), temperature=0.8))
    with pytest.raises(RuntimeError, match="710"):
        turn(logits, torch.tensor([3, 50, 5]), torch.ones(3))
    on_emulator.flush()
    assert "known_gradient: label 50 of row 1 is outside [0, 50)" in capfd.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scale_by_a_number_on_the_device(dtype, emulated):
    x = torch.randn(9001, generator=torch.Generator().manual_seed(0)).to(dtype)
    for factor in (torch.tensor(1.0), torch.tensor(-2.5), torch.tensor(0.3, dtype=torch.float64)):
        room = torch.cat([x, x.new_full((8,), 7.0)])
        arguments = room, _native.DTYPE_CODES[dtype], 9001, factor, _native.DTYPE_CODES[factor.dtype], None
        assert emulated.scale(*arguments) == 0
        want = (x.to(torch.float64 if dtype == torch.float64 else torch.float32) * factor).to(dtype)
        assert torch.equal(room[:9001], want) and (room[9001:] == 7).all()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset, ref_offset", [(0, 0), (3, 3), (1, 4)], ids=["aligned", "odd", "apart"])
def test_kl_divergence_of_a_gpt2_vocabulary(offset, ref_offset, dtype, on_emulator):
    logits, _ = gpt2_logits(dtype)
    ref_logits = (logits.float() + torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))).to(dtype)

    def shifted(x, by):
        return torch.cat([x.new_zeros(by), x.flatten()])[by:].view(x.shape).requires_grad_()

    ours = shifted(logits, offset), shifted(ref_logits, ref_offset)
    truth = [x.detach().double().requires_grad_() for x in ours]
    kl, want = rf.kl_divergence(*ours), reference.kl_divergence(*truth)
    torch.testing.assert_close(kl.double(), want, rtol=2e-6, atol=0)
    kl.sum().backward()
    want.sum().backward()
    for x, true in zip(ours, truth, strict=True):
        assert (x.grad.double() - true.grad).norm() <= 4 * torch.finfo(dtype).eps * true.grad.norm()


def test_kl_divergence_is_infinite_where_the_reference_says_impossible(on_emulator):
    logits, ref_logits = torch.zeros(3, 9000), torch.zeros(3, 9000)
    ref_logits[1, 5] = -torch.inf
    logits[2, :8000] = ref_logits[2, :8000] = -torch.inf
    assert rf.kl_divergence(logits, ref_logits).tolist() == [0.0, torch.inf, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_least_number_is_an_impossible_token(dtype, on_emulator):
    battery.least_numbers_are_impossible_tokens(dtype, "cpu")


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


@every_case
def test_what_the_mask_hides_never_matters(case, on_emulator):
    if not case.masked:
        pytest.skip("has no mask")
    assert_mask_hides(case, times=8)


@small_ops
def test_a_row_does_not_depend_on_its_batch(case, on_emulator):
    if not case.rowwise:
        pytest.skip("reduces over the batch")
    for seed in range(8):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        whole = tensors_of(case.op(**inputs))
        for i in range(inputs[case.rowwise[0]].shape[0] if inputs[case.rowwise[0]].ndim > 1 else 0):
            part = {k: v[i : i + 1] if k in case.rowwise else v for k, v in inputs.items()}
            for name, one in tensors_of(case.op(**part)).items():
                assert torch.equal(one[0], whole[name][i]), name


def batch(rows: int, columns: int, seed: int = 0) -> dict[str, torch.Tensor]:
    s = Sampler(random.Random(seed))
    shape = (rows, columns)
    old = -5 * s.uniform(*shape)
    tensors = {
        "logprobs": old + s.normal(*shape, scale=0.3), "old_logprobs": old, "advantages": s.normal(*shape),
        "values": 3 + s.normal(*shape), "old_values": 3 + s.normal(*shape), "returns": 3 + s.normal(*shape),
    }  # fmt: skip
    return {k: v.float() for k, v in tensors.items()} | {"mask": s.uniform(*shape) < 0.8}


PPO = ("logprobs", "old_logprobs", "advantages", "mask")
VALUE = ("values", "old_values", "returns", "mask")


@pytest.mark.parametrize("mode", reference.AGGREGATIONS)
@pytest.mark.parametrize(
    "rows, columns, launches",
    [(64, 1024, 1), (600, 40, 3), (3, 70000, 3), (520, 8, 3)],
    ids=["one launch", "many rows", "long rows", "more rows than a block counts"],
)
def test_batches_of_many_blocks(mode, rows, columns, launches, on_emulator):
    """Each way to count the mask: every block for itself, or a launch before (and the memset that it needs)."""
    x = batch(rows, columns)
    counted = mode != "seq-mean-token-sum-norm"
    if mode == "token-mean" and rows * columns <= 1 << 17:  # a run of bytes, however many rows
        counted = False
    for op, want_of, names in (
        (rf.ppo_loss, reference.ppo_loss, PPO),
        (rf.value_loss, reference.value_loss, VALUE),
    ):
        truth = {n: x[n].double() if x[n].is_floating_point() else x[n] for n in names}
        truth[names[0]].requires_grad_()
        want, want_stats = want_of(*truth.values(), loss_agg_mode=mode)
        (want_grad,) = torch.autograd.grad(want, truth[names[0]])
        prediction = x[names[0]].clone().requires_grad_()
        before = on_emulator.launches()
        loss, stats = op(prediction, *(x[n] for n in names[1:]), loss_agg_mode=mode)
        assert on_emulator.launches() - before == (launches if counted else 1)
        (grad,) = torch.autograd.grad(loss, prediction)
        torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-7 * want_grad.abs().max().item())
        for name, value in want_stats.items():
            torch.testing.assert_close(stats[name].double(), value.double(), rtol=2e-6, atol=1e-6, msg=name)


def test_the_counters_of_the_last_block_are_left_at_0(on_emulator):
    """Or the second launch would end wrong; and when they are used up, as by captures, scratch memory takes over."""
    x = batch(4, 1000)
    want, _ = rf.ppo_loss(*(x[n] for n in PPO))
    on_emulator.set_capturing(True)
    try:
        for call in range(emulation.TICKETS + 8):
            before = on_emulator.launches()
            got, _ = rf.ppo_loss(*(x[n] for n in PPO))
            assert torch.equal(got, want)
            spare = on_emulator.launches() - before == 2  # a memset first
            if call == 0:
                assert not spare
    finally:
        on_emulator.set_capturing(False)
    assert spare


@pytest.mark.parametrize("columns", [5, 1024, 1025, 2500, 600_000])
@pytest.mark.parametrize("rows", [1, 3])
def test_masked_mean_of_short_and_long_rows(rows, columns, on_emulator):
    values = 100 + torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    mask = values > 99.5
    got = in_every_order(on_emulator, lambda: {"mean": rf.masked_mean(values, mask, dim=1)})["mean"]
    torch.testing.assert_close(got.double(), reference.masked_mean(values.double(), mask, dim=1), rtol=1e-7, atol=0)
    if columns <= 2500:  # 61 rows: one block takes a row, and the bits stay
        many = rf.masked_mean(values[:1].expand(61, -1), mask[:1].expand(61, -1), dim=1)
        assert (many == got[0]).all()


@pytest.mark.parametrize("gap_mode", ["carry", "zero"])
@pytest.mark.parametrize("columns", [1024, 1027, 2900, 3072])
def test_gae_over_tiles(columns, gap_mode, on_emulator):
    s = Sampler(random.Random(columns))
    rewards, values = s.normal(3, columns).float(), s.normal(3, columns).float()
    mask = s.uniform(3, columns) < 0.7
    mask[1] = True

    def ours():
        return dict(zip("ar", rf.gae(rewards, values, mask, gamma=0.99, lam=0.95, gap_mode=gap_mode), strict=True))

    got = in_every_order(on_emulator, ours)
    want = reference.gae(rewards.double(), values.double(), mask, gamma=0.99, lam=0.95, gap_mode=gap_mode)
    for name, truth in zip("ar", want, strict=True):
        torch.testing.assert_close(got[name].double(), truth, rtol=0, atol=2e-6 * truth.abs().max().item())


@pytest.mark.parametrize("pairs", [4096, 5000])
def test_pairs_of_many_blocks_with_weights(pairs, on_emulator):
    s = Sampler(random.Random(0))
    chosen, rejected, weights = s.normal(pairs).float(), s.normal(pairs).float(), s.uniform(pairs).float()
    before = on_emulator.launches()
    loss, stats = rf.pairwise_loss(chosen, rejected, weights=weights)
    assert on_emulator.launches() - before == (1 if pairs <= 4096 else 2)
    want, want_stats = reference.pairwise_loss(chosen.double(), rejected.double(), weights=weights.double())
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for name, value in want_stats.items():
        torch.testing.assert_close(stats[name].double(), value, rtol=2e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("prompts, k, launches", [(40, 40, 1), (1200, 20, 2)])
def test_rankings_of_many_blocks(prompts, k, launches, on_emulator):
    """More responses than a warp has lanes; more ranks than a block counts."""
    s = Sampler(random.Random(0))
    rewards, ranks = s.normal(prompts, k).float().requires_grad_(), s.labels(prompts, k, vocab=6) - 1
    ranks[: prompts // 4] = 2  # all tied: no pair
    rewards.data[ranks < 0] = torch.nan
    before = on_emulator.launches()
    loss, stats = rf.ranking_loss(rewards, ranks)
    assert on_emulator.launches() - before == launches
    truth = rewards.detach().double().requires_grad_()
    want, want_stats = reference.ranking_loss(truth, ranks)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for name, value in want_stats.items():
        torch.testing.assert_close(stats[name].double(), value, rtol=2e-6, atol=1e-7, msg=name)
    loss.backward()
    want.backward()
    torch.testing.assert_close(rewards.grad.double(), truth.grad, rtol=1e-5, atol=1e-8)


def test_a_spread_far_smaller_than_the_mean(on_emulator):
    values = 1000 + 1e-3 * torch.randn(40, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = {"values": values.float(), "old_values": values.float(), "returns": values.float() + 1}
    _, stats = rf.value_loss(*x.values(), torch.ones(40, 500, dtype=torch.bool))
    torch.testing.assert_close(
        stats["returns_var"].double(), x["returns"].double().var(correction=0), rtol=1e-6, atol=0
    )
    assert stats["error_var"] == 0
    white = rf.masked_whiten(x["values"])
    torch.testing.assert_close(white.double(), reference.masked_whiten(x["values"].double()), rtol=0, atol=0.05)


BARRIERS = {  # a file that waits at barriers: sources whose results show it
    "reduce.cuh": ["token_logprobs"], "sums.cuh": ["value_loss", "ppo_loss"], "weights.cuh": ["ppo_loss"],
    "gae.cu": ["gae"], "masked.cu": ["masked"], "known_gradient.cu": ["known_gradient"],
}  # fmt: skip


def results_of(op: str) -> dict[str, torch.Tensor]:
    """Of a batch that takes every barrier: several blocks, tiles, rows."""
    x = batch(64, 100)
    if op == "token_logprobs":
        return {"0": rf.token_logprobs(torch.linspace(-9, 9, 12000).view(3, 4000), torch.tensor([1, 2, 3]))}
    if op == "known_gradient":
        logits = torch.linspace(-9, 9, 2700).view(3, 900)
        return turn(logits, torch.tensor([1, 2, 3]), torch.ones(3))
    if op == "gae":
        return tensors_of(rf.gae(*(torch.cat([x[n]] * 30, 1)[:70] for n in ("values", "returns", "mask"))))
    if op == "masked":
        return tensors_of(rf.masked_mean(torch.cat([x["values"]] * 50, 1), dim=1))
    if op == "value_loss":
        x["mask"][:9] = False  # the first token lies elsewhere in the first block than in the others
        return tensors_of(rf.value_loss(*(x[n] + 1e6 for n in VALUE[:3]), x["mask"]))  # 1e6: far from their spread
    prediction = x["logprobs"].clone().requires_grad_()
    loss, stats = rf.ppo_loss(prediction, *(x[n] for n in PPO[1:]), loss_agg_mode="seq-mean-token-mean")
    return stats | {"loss": loss.detach(), "grad": torch.autograd.grad(loss, prediction)[0]}


@pytest.mark.parametrize("file", BARRIERS)
def test_without_a_barrier_the_result_depends_on_the_schedule(file, emulated, tmp_path, monkeypatch):
    """The emulator sees races: each barrier of the kernels, taken out, changes results or never ends."""
    text = (emulation.CUDA / file).read_text()
    parts = text.split("__syncthreads();")
    assert len(parts) > 1
    emulation.install(monkeypatch, emulated)
    want = {op: in_every_order(emulated, lambda op=op: results_of(op)) for op in BARRIERS[file]}

    def is_wrong(op: str, edited: str, folder: Path) -> bool:
        broken = emulation.rebuild(emulated, folder, op, {file: edited})
        emulation.install(monkeypatch, broken)
        wrong = []
        for order in ORDERS:
            broken.set_order(order)
            try:
                got = results_of(op)
            except RuntimeError:  # a thread waits for ever
                return True
            wrong.append(any(not torch.equal(got[name], value) for name, value in want[op].items()))
        return any(wrong)

    for i in range(1, len(parts)):
        if parts[i - 1].endswith("__shared__ bool last;\n  "):
            continue  # is_last_block: only blocks side by side, which the emulator does not run, would show it
        edited = "__syncthreads();".join(parts[:i]) + ";" + "__syncthreads();".join(parts[i:])
        assert any(is_wrong(op, edited, tmp_path / f"{op} {i}") for op in BARRIERS[file]), f"barrier {i} of {file}"


@pytest.mark.parametrize("op, call, file, condition", [
    ("masked", lambda x: rf.masked_whiten(x), "grid.cuh", "reinterpret_cast<uintptr_t>(p) % bytes == 0"),
    ("kl_divergence", lambda x: rf.kl_divergence(x, x), "reduce.cuh", "address % 16 == 0"),
    ("kl_divergence", lambda x: rf.kl_divergence(x, x), "reduce.cuh", "address % 8 == 0"),
])  # fmt: skip
def test_what_does_not_look_at_its_alignment_is_refused(op, call, file, condition, emulated, tmp_path, monkeypatch):
    """The emulator sees a vector read or written beside its boundary, as a GPU does: cudaErrorMisalignedAddress."""
    text = (emulation.CUDA / file).read_text()
    assert text.count(condition) == 1
    emulation.install(monkeypatch, emulation.rebuild(emulated, tmp_path, op, {file: text.replace(condition, "true")}))
    with pytest.raises(RuntimeError, match="716"):
        call(torch.ones(513)[1:].view(2, 256))

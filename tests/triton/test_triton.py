"""The Triton kernels without a GPU: interpreted and emulated, each in a process of its own, and compiled for three
architectures."""

from __future__ import annotations

import inspect
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import rlhf_fast as rf  # noqa: E402
from rlhf_fast.kernels import (  # noqa: E402
    _common,
    gae,
    kl_divergence,
    kl_penalty,
    pairwise_loss,
    ppo_loss,
    token_logprobs,
)
from rlhf_fast.ops import _dispatch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
from cases import CASES, Sampler  # noqa: E402
from emulation import USES  # noqa: E402
from test_contract import cast, tensors_of  # noqa: E402

# Triton 3.2's interpreter hands a launch's options to the kernel, and its ahead-of-time compiler is called otherwise.
current = pytest.mark.skipif("constexprs" not in inspect.signature(ASTSource).parameters, reason="needs triton 3.3")
KERNELS = (gae, kl_divergence, kl_penalty, pairwise_loss, ppo_loss, token_logprobs)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@current
@pytest.mark.parametrize("file, interpret", [("interpreted.py", "1"), ("emulated.py", "0")])
def test_in_a_process_of_its_own(file, interpret):
    """Triton reads TRITON_INTERPRET when a kernel is defined, and this process has long imported it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, str(Path(__file__).with_name(file))],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("op", ["token_logprobs", "kl_penalty", "gae"])
def test_on_the_cpu_without_the_interpreter_it_says_what_to_do(op):
    x = torch.zeros(1, 4)
    arguments = {"token_logprobs": (x, torch.tensor([0])), "kl_penalty": (x, x), "gae": (x, x, x == 0)}[op]
    with pytest.raises(RuntimeError, match=rf"{op}: .*TRITON_INTERPRET=1"), rf.use_backend("triton"):
        getattr(rf, op)(*arguments)


ON_A_GPU = [case for case in CASES if rf.backends()[USES.get(case.name, case.name)]["cuda"]["backend"] != "reference"]


@pytest.mark.parametrize("case", ON_A_GPU, ids=lambda case: case.name)
def test_a_first_call_compiles_to_one_graph_on_a_gpu(case, monkeypatch):
    """Of tensors that are of a GPU and have no memory, so that no kernel runs: what torch.compile traces is the choice
    of the kernel, and the results that it is told of are those of an eager call."""
    torch._dynamo.reset()
    for op in _dispatch._OPS.values():
        monkeypatch.setattr(op, "_chosen", {})
    inputs = cast(case.inputs(Sampler(random.Random(1))), torch.float32)
    with FakeTensorMode():
        there = {
            name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") if torch.is_tensor(x) else x
            for name, x in inputs.items()
        }
        compiled = tensors_of(torch.compile(case.op, fullgraph=True, dynamic=False, backend="eager")(**there))
        for name, want in tensors_of(case.op(**there)).items():
            got = compiled[name]
            assert got.is_cuda and got.dtype == want.dtype
            assert got.shape == want.shape and got.stride() == want.stride()


def calls(op: str, dtype: torch.dtype) -> None:
    """Forward and backward, with every option that gives a kernel more to do, at a training step's alignment."""
    x, mask = torch.zeros(4, 64, dtype=dtype), torch.ones(4, 64, dtype=torch.bool)
    leaf = x.clone().requires_grad_()
    if op == "token_logprobs":
        logits = torch.zeros(4, 256, dtype=dtype).requires_grad_()
        logprobs, entropy = rf.token_logprobs_and_entropy(logits, mask[:, 0].long(), mask=mask[:, 0])
        torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)
    elif op == "kl_divergence":
        logits = torch.zeros(2, 4, 256, dtype=dtype).requires_grad_()
        torch.autograd.grad(rf.kl_divergence(*logits, mask[:, 0]).sum(), logits)
    elif op == "kl_penalty":
        rf.kl_penalty(leaf, x, estimator="k3", input_clamp=1.0)
    elif op == "gae":
        rf.gae(x, x, mask)
    elif op == "pairwise_loss":
        rf.pairwise_loss(leaf[0], x[0], margin=x[0], target_prob=x[0], weights=x[0], center_coef=0.1)
    else:
        rf.ppo_loss(
            leaf, x, x, mask, ref_logprobs=x, kl_coef=0.1, entropy=leaf, entropy_coef=0.01, importance_weights=x,
            loss_agg_mode="seq-mean-token-mean",
        )  # fmt: skip


def launches(monkeypatch, op: str, dtype: torch.dtype) -> list:
    """(kernel, its arguments by name, its options) of every launch of those calls, none of which is made."""
    seen = []

    def record(kernel, *args, grid, warmup, **kwargs):
        named = dict(zip(kernel.arg_names, args, strict=False))
        seen.append((kernel, named | {k: v for k, v in kwargs.items() if k in kernel.arg_names},
                     {k: v for k, v in kwargs.items() if k not in kernel.arg_names}))  # fmt: skip

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    for module in KERNELS:
        monkeypatch.setattr(module, "refuse_cpu", lambda *args: None)
    with rf.use_backend("triton"):
        calls(op, dtype)
    return seen


TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.bool: "*u1", torch.int64: "*i64",
}  # fmt: skip


def compile_for(kernel, arguments: dict, options: dict, capability: int) -> bytes:
    """The cubin that a launch with these arguments would run: ahead of time, with Triton's own ptxas."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, x) in enumerate(arguments.items()):
        parameter = kernel.params[i]
        if isinstance(x, torch.Tensor):
            signature[name] = TYPES[x.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1):
            signature[name], constants[name] = "constexpr", x
        elif isinstance(x, float):
            signature[name] = "fp64"
        else:
            signature[name] = "i32"
            if x % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


# Only float32 and bfloat16 logits differ in what is loaded; the small ops read float32, as training passes them.
COMPILED = [("token_logprobs", "bfloat16"), ("token_logprobs", "float32"), ("kl_divergence", "bfloat16"),
            *((op, "float32") for op in ("kl_penalty", "gae", "pairwise_loss", "ppo_loss"))]  # fmt: skip
PER_OP = {"token_logprobs": 2, "kl_divergence": 2, "kl_penalty": 1, "gae": 1, "pairwise_loss": 1, "ppo_loss": 2}


@current
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("op, dtype", COMPILED, ids=[f"{op}-{dtype}" for op, dtype in COMPILED])
def test_compiles_without_spills(op, dtype, capability, tmp_path, monkeypatch):
    seen = launches(monkeypatch, op, getattr(torch, dtype))
    assert len(seen) == PER_OP[op]
    for i, (kernel, arguments, options) in enumerate(seen):
        cubin = tmp_path / f"{i}.cubin"
        cubin.write_bytes(compile_for(kernel, arguments, options, capability))
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
        assert stack == local == 0, usage
        assert registers <= {"token_logprobs": 80, "kl_divergence": 64}.get(op, 255), usage  # for 3 and 4 blocks


def test_a_block_of_the_small_ops_is_a_power_of_2():
    assert [_common.tiles(n) for n in (0, 1, 33, 1000, 5000)] == [32, 32, 64, 1024, 1024]

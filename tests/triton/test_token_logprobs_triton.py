"""The Triton kernels without a GPU: interpreted, in a process of its own, and compiled for three architectures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import rlhf_fast as rf  # noqa: E402
from rlhf_fast.kernels import token_logprobs as kernels  # noqa: E402

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def test_under_the_interpreter():
    """Triton reads TRITON_INTERPRET when a kernel is defined, and this process has long imported it."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).with_name("interpreted.py")),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_on_the_cpu_without_the_interpreter_it_says_what_to_do():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), rf.use_backend("triton"):
        rf.token_logprobs(torch.zeros(1, 4), torch.tensor([0]))


def compile_for(kernel, dtype: torch.dtype, capability: int) -> bytes:
    """The cubin for aligned logits, with mask and entropy."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tiles = kernels.forward_tiles(dtype) if kernel is kernels._forward_kernel else kernels.backward_tiles(dtype)
    options = {name: tiles.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    options |= {"debug": kernel is kernels._forward_kernel, "sanitize_overflow": False}
    constants = {"inner": 1, **tiles}
    logits, accum = f"*{TYPES[dtype]}", "*fp64" if dtype == torch.float64 else "*fp32"
    types = dict.fromkeys(constants, "constexpr") | {"logits": logits, "grad_logits": logits, "vocab": "i32"}
    types |= {"labels": "*i64", "mask": "*u1", "scale": "fp64", "inverse_temperature": "fp64"}
    types |= {name: "i32" for name in kernel.arg_names if name.endswith("_stride")}
    signature = {name: types.get(name, accum) for name in kernel.arg_names}
    aligned = [name for name, t in signature.items() if t.startswith("*") or name.endswith("stride") or name == "vocab"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_compiles_without_spills(direction, dtype, capability, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_for(getattr(kernels, f"_{direction}_kernel"), dtype, capability))
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    assert registers <= 80 and stack == local == 0, usage

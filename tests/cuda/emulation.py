"""Runs csrc/cuda/token_logprobs.cu on the CPU: the source as it is, compiled by g++ over tests/cuda/emulator."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from rlhf_fast.ops._dispatch import pointers

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "token_logprobs.cu"
HEADER = ROOT / "csrc" / "cuda" / "reduce.cuh"
ASCENDING, DESCENDING, SHUFFLED = 0, 1, 2  # which thread runs first

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_ROWS = [_P, _I, _L, _L, _L, _L, _L, _P, _P, _D]  # logits ... temperature, as in csrc/ops.h


def build(folder: Path, source: Path = SOURCE) -> ctypes.CDLL:
    """The compiled emulation of source; headers beside source win over csrc/cuda."""
    library = folder / "emulated.so"
    subprocess.run(
        [
            "g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing",
            "-fno-gnu-unique", f"-I{source.parent}", f"-I{Path(__file__).parent / 'emulator'}", f"-I{ROOT / 'csrc'}",
            f'-DRLHF_CUDA_SOURCE="{source}"', str(Path(__file__).parent / "emulator" / "token_logprobs.cpp"),
            "-o", str(library),
        ],
        check=True,
    )  # fmt: skip
    emulated = ctypes.CDLL(str(library))
    emulated.forward.argtypes = [*_ROWS, _P, _P, _P]
    emulated.backward.argtypes = [*_ROWS, _P, _P, _P, _P, _P, _L, _L]
    return emulated


def install(monkeypatch, emulated: ctypes.CDLL) -> None:
    """Lets the public functions run the emulated kernels on CPU tensors, through the Python of the CUDA backend."""
    module = sys.modules["rlhf_fast.ops.token_logprobs"]
    cuda = SimpleNamespace(token_logprobs_forward=emulated.forward, token_logprobs_backward=emulated.backward)
    monkeypatch.setattr(module, "_C", SimpleNamespace(cuda=cuda))

    def launch(kernel, arguments):
        error = kernel(*pointers(arguments))
        if error:
            raise RuntimeError(f"cudaError_t {error}")

    monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setitem(module._forward.kernels["cpu"], "native", module._forward_cuda)
    monkeypatch.setitem(module._backward.kernels["cpu"], "native", module._backward_cuda)

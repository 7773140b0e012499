"""Runs csrc/cuda as nvcc compiled it: the launches of emulation.py's host code, the kernels' PTX in tests/ptx.py."""

from __future__ import annotations

import ctypes
import random
import re
import subprocess
import sys
from pathlib import Path

import emulation
import numpy as np
import torch
from resources import NVCC, readable

sys.path.insert(0, str(Path(__file__).parents[1]))
import ptx

FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-arch=sm_90")  # as a release build of CMake
INSTEAD = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t),
)  # fmt: skip


def build(folder: Path) -> dict[str, ptx.Program]:
    """{name<template arguments>: kernel} of all sources, each compiled for an H200."""
    kernels = {}
    for source in sorted(emulation.CUDA.glob("*.cu")):
        to = folder / f"{source.stem}.ptx"
        subprocess.run([NVCC, *FLAGS, "-ptx", source, "-o", to], check=True)
        found = ptx.kernels(to.read_text())
        for name, program in zip(readable(list(found)), found.values(), strict=True):
            assert name not in kernels or name == "count_kernel"  # weights.cuh's, the same in every file
            kernels[name] = program
    return kernels


def addresses(library: Path) -> dict[int, str]:
    """{offset: name<template arguments>} of the kernels in the library."""
    text = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"^(\w+) [tTwW] (_ZN?L?4rlhf4cuda\w*_kernel\w*)$", text, re.MULTILINE)
    return {int(at, 16): name for (at, _), name in zip(symbols, readable([s for _, s in symbols]), strict=True)}


class Compiled(emulation.Emulated):
    """An attribute for each op, as in Emulated. What a kernel does wrong is raised as the exception that it is."""

    def __init__(self, emulated: emulation.Emulated, kernels: dict[str, ptx.Program], folder: Path):
        super().__init__(emulated.objects, folder / "compiled.so")
        self.kernels, self.order, self.options, self.ran = kernels, emulation.ASCENDING, {}, set()
        names = addresses(folder / "compiled.so")
        text = subprocess.run(["nm", folder / "compiled.so"], capture_output=True, text=True, check=True).stdout
        base = ctypes.cast(self.library.run_instead, ctypes.c_void_p).value
        base -= int(re.search(r"(\w+) T run_instead", text)[1], 16)
        self.names = {base + at: name for at, name in names.items()}
        self.callback = INSTEAD(self.run)
        self.library.run_instead(self.callback)

    def _op(self, name: str, kinds: list[str]):
        call = super()._op(name, kinds)

        def op(*arguments):
            self.memory, self.failure = ptx.Memory(), None
            for x in arguments:
                if isinstance(x, torch.Tensor):
                    self.memory.add(x)
            error = call(*arguments)
            if self.failure is not None:
                raise self.failure
            return error

        return op

    def run(self, kernel, blocks, threads, shared, count, values, sizes) -> int:
        name = self.names[kernel]
        self.ran.add(name)
        arguments = [ctypes.string_at(values[i], sizes[i]) for i in range(count)]
        order = list(range(blocks))[:: -1 if self.order == emulation.DESCENDING else 1]
        if self.order == emulation.SHUFFLED:
            random.Random(0).shuffle(order)
        try:
            for block in order:
                with np.errstate(all="ignore"):
                    self.kernels[name].run(
                        arguments, self.memory, (block, 0, 0), threads=threads, grid=blocks, shared=shared,
                        **self.options,
                    )  # fmt: skip
        except Exception as failure:
            self.failure = failure
            return 1
        return 0

    def set_order(self, order: int) -> None:
        self.order = order

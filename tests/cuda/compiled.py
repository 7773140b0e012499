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
import resources
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ptx

INSTEAD = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t),
)  # fmt: skip


def symbols(binary: str | Path) -> list[tuple[int, str]]:
    """(offset, name<template arguments>) of each kernel, which g++ compiled as an ordinary function."""
    text = subprocess.run(["nm", binary], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) \w (_ZN?L?4rlhf4cuda\w*_kernel\w*)$", text, re.MULTILINE)
    names = resources.readable([symbol for _, symbol in found])
    kernels = [(int(at, 16), name) for (at, _), name in zip(found, names, strict=True)]
    return [(at, name) for at, name in kernels if re.fullmatch(r"\w+_kernel(<[^<>]*>)?", name)]  # no lambda in one


class Compiled(emulation.Emulated):
    """An attribute for each op, as in Emulated. What a kernel does wrong is raised as the exception that it is.

    options: of ptx.Block. ran: the names of the kernels that were launched.
    """

    def __init__(self, emulated: emulation.Emulated, library: Path):
        super().__init__(emulated.objects, library)
        text = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
        start = ctypes.cast(self.library.run_instead, ctypes.c_void_p).value
        start -= int(re.search(r"(\w+) T run_instead$", text, re.MULTILINE)[1], 16)
        self.names = {start + at: name for at, name in symbols(library)}
        self.source_of = {name: o.stem for o in emulated.objects for _, name in symbols(o)}
        self.kernels: dict[str, ptx.Program] = {}
        self.order, self.options, self.ran = emulation.ASCENDING, {}, set()
        self.callback = INSTEAD(self.run)
        self.library.run_instead(self.callback)

    def kernel(self, name: str) -> ptx.Program:
        """Compiled with its file when first asked for. count_kernel, of weights.cuh, is the same in every file."""
        if name not in self.kernels:
            found = ptx.kernels(resources.ptx(self.source_of[name]))
            self.kernels |= dict(zip(resources.readable(list(found)), found.values(), strict=True))
        return self.kernels[name]

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
        try:
            name = self.names[kernel]
            self.ran.add(name)
            arguments = [ctypes.string_at(values[i], sizes[i]) for i in range(count)]
            order = list(range(blocks))
            if self.order == emulation.DESCENDING:
                order.reverse()
            elif self.order == emulation.SHUFFLED:
                random.Random(0).shuffle(order)
            with np.errstate(all="ignore"):
                for block in order:
                    self.kernel(name).run(
                        arguments, self.memory, (block, 0, 0), threads=threads, grid=blocks, shared=shared,
                        **self.options,
                    )  # fmt: skip
        except Exception as failure:  # which must not leave a callback
            self.failure = failure
            return 1
        return 0

    def set_order(self, order: int) -> None:
        self.order = order

"""Registers, shared memory and stack of every CUDA kernel, as ptxas has given them.

    python tests/cuda/resources.py             # writes resources.txt anew
    python tests/cuda/resources.py gae scale   # the lines of these files of csrc/cuda

test_build.py compares a build with that file: more registers are fewer threads on a multiprocessor, and spilled ones
are a stack in memory.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
GOLDEN = Path(__file__).parent / "resources.txt"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
TRITON = find_spec("triton")  # its package brings a cuobjdump, which not every toolkit has
CUOBJDUMP = shutil.which("cuobjdump") or (
    TRITON and shutil.which("cuobjdump", path=Path(TRITON.origin).parent / "backends" / "nvidia" / "bin")
)
RESERVED = {"sm_80": 0, "sm_90": 1024, "sm_100": 1024}  # bytes of shared memory that CUDA keeps of a block that has any


class Usage(NamedTuple):
    registers: int
    shared: int  # bytes, static
    stack: int  # bytes: spilled registers, local arrays, and 32 for the arguments of a printf


Kernels = dict[tuple[str, str], Usage]  # (kernel, architecture) -> usage


def nvcc_version() -> str:
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def readable(symbols: list[str]) -> list[str]:
    """Mangled kernels as name<template arguments>."""
    text = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True).stdout
    names = []
    for line in text.splitlines():
        line = re.sub(r"\w*_GLOBAL__N_\w*|\(anonymous namespace\)", "", line)
        line = re.sub(r"\(bool\)([01])", lambda m: ("false", "true")[int(m[1])], line)
        names.append(re.search(r"(\w+(?:<[^>]*>)?)\(", line)[1])
    return names


def measure(files: list[str] | None = None) -> Kernels:
    """Of the built module if it has them all and no source is newer; otherwise every .cu, or some, is compiled."""
    module = find_spec("rlhf_fast._C")
    newest = max(path.stat().st_mtime for path in CUDA.parent.rglob("*"))
    if not files and module and Path(module.origin).stat().st_mtime > newest:
        kernels = usage_in(module.origin)
        if {architecture for _, architecture in kernels} == set(ARCHITECTURES):
            return kernels
    kernels = {}
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
    for source in sorted(CUDA.glob("*.cu")):
        if files and source.stem not in files:
            continue
        with tempfile.TemporaryDirectory() as folder:
            compiled = f"{folder}/kernel.o"
            subprocess.run([NVCC, "-std=c++17", "-O3", *targets, "-c", source, "-o", compiled], check=True)
            kernels |= usage_in(compiled)
    return kernels


def usage_in(binary: str) -> Kernels:
    """The kernels of an object file or a module. Their names begin with the file that they are from."""
    text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True).stdout
    kernels = {}
    for part in text.split("Fatbin elf code:")[1:]:  # one for each source and architecture
        architecture = re.search(r"arch = (sm_\d+)", part)[1]
        file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", part)[1]
        found = re.findall(r"Function (\w+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", part)
        for name, (_, registers, stack, shared) in zip(readable([f[0] for f in found]), found, strict=True):
            usage = Usage(int(registers), max(0, int(shared) - RESERVED[architecture]), int(stack))
            kernels[f"{file}: {name}", architecture] = usage
    return kernels


def ptx(file: str) -> str:
    """A .cu as nvcc hands it to ptxas, where every load and store names its memory."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "kernel.ptx"
        subprocess.run(
            [NVCC, "-std=c++17", "-O3", "-arch=compute_90", "-ptx", CUDA / f"{file}.cu", "-o", to], check=True
        )
        return to.read_text()


def write(kernels: Kernels) -> str:
    names = sorted({name for name, _ in kernels})
    width = max(map(len, names))
    lines = [
        f"# registers/bytes shared/bytes of stack by nvcc {nvcc_version()}; written by python tests/cuda/resources.py",
        f"{'kernel':{width}}  {'  '.join(f'{a:>9}' for a in ARCHITECTURES)}",
    ]
    for name in names:
        cells = ["/".join(map(str, kernels[name, a])) for a in ARCHITECTURES]
        lines.append(f"{name:{width}}  {'  '.join(f'{cell:>9}' for cell in cells)}")
    return "\n".join(lines) + "\n"


def read() -> tuple[str, Kernels]:
    """The nvcc that the file is of, and what it says."""
    first, heading, *lines = GOLDEN.read_text().splitlines()
    architectures = heading.split()[1:]
    kernels = {}
    for line in lines:
        name, *cells = re.split(r"  +", line)
        for architecture, cell in zip(architectures, cells, strict=True):
            kernels[name, architecture] = Usage(*map(int, cell.split("/")))
    return re.search(r"nvcc (\S+);", first)[1], kernels


if __name__ == "__main__":
    kept = {k: u for k, u in read()[1].items() if k[0].split(":")[0] not in sys.argv[1:]} if sys.argv[1:] else {}
    GOLDEN.write_text(write(kept | measure(sys.argv[1:])))

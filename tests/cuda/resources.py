"""Registers, shared memory and spills of every CUDA kernel, as ptxas reports them.

    python tests/cuda/resources.py             # writes resources.txt anew
    python tests/cuda/resources.py gae scale   # the lines of these files of csrc/cuda

test_build.py compares a build with that file: more registers are fewer threads on a multiprocessor, a spill is traffic.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
GOLDEN = Path(__file__).parent / "resources.txt"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


class Usage(NamedTuple):
    registers: int
    shared: int  # bytes, static
    spilled: int = 0  # bytes, stores and loads


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
    """Compiles every .cu, or some, with the flags of the build."""
    kernels = {}
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
    for source in sorted(CUDA.glob("*.cu")):
        if files and source.stem not in files:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [NVCC, "-std=c++17", "-O3", "-Xptxas", "-v", *targets, "-c", source, "-o", f"{folder}/kernel.o"]
            report = subprocess.run(command, capture_output=True, text=True)
        assert report.returncode == 0, report.stderr
        found = re.findall(
            r"entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
            r".*?Used (\d+) registers([^\n]*)",
            report.stderr,
            re.DOTALL,
        )
        for name, (_, architecture, stores, loads, registers, rest) in zip(
            readable([f[0] for f in found]), found, strict=True
        ):
            shared = re.search(r"(\d+) bytes smem", rest)
            usage = Usage(int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads))
            kernels[f"{source.stem}: {name}", architecture] = usage
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
        f"# registers/bytes of shared memory by nvcc {nvcc_version()}; written by python tests/cuda/resources.py",
        f"{'kernel':{width}}  {'  '.join(f'{a:>8}' for a in ARCHITECTURES)}",
    ]
    for name in names:
        cells = [f"{kernels[name, a].registers}/{kernels[name, a].shared}" for a in ARCHITECTURES]
        lines.append(f"{name:{width}}  {'  '.join(f'{cell:>8}' for cell in cells)}")
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
    measured = measure(sys.argv[1:])
    print("\n".join(f"{name} on {a} spills {u.spilled} bytes" for (name, a), u in measured.items() if u.spilled))
    GOLDEN.write_text(write(kept | measured))

"""The CUDA source as nvcc sees it: registers and spills."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from emulation import SOURCE

NVCC = shutil.which("nvcc")
ARCHITECTURES = (90, 100)

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


def test_nothing_spills_and_two_blocks_fit_a_multiprocessor(tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-Xptxas",
        "-v",
        *targets,
        "-c",
        str(SOURCE),
        "-o",
        str(tmp_path / "kernel.o"),
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = re.findall(
        r"entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg",
        report,
        re.DOTALL,
    )
    assert len(kernels) == len(ARCHITECTURES) * 16, report  # two directions, four dtypes, with and without entropy
    for name, architecture, stores, loads, registers in kernels:
        assert stores == loads == "0", f"{name} spills on {architecture}"
        if "kernelId" not in name:  # float64, the template argument d, runs one block at a time
            assert int(registers) <= 64, f"{name} takes {registers} registers on {architecture}"

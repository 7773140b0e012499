"""AMX's tiles on CPUs without them: csrc/cpu/tiles.h compiled over an emulation of the instructions (tests/amx).

CPUs that have them run the op tests in them too, as the instruction set "amx" (conftest.py).
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf_fast.ops import _dispatch

FOLDER = Path(__file__).parent / "amx"
FLAGS = ["-std=c++17", "-O0", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize=alignment"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]


def test_products_in_tiles_are_those_without_and_touch_nothing_else(tmp_path):
    if _dispatch._C is None or not _dispatch._C.isas().get("avx512", False):
        pytest.skip("this CPU or this build does not run AVX-512")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    emulation = f'-DRLHF_EMULATED_TILES="{FOLDER / "emulated_tiles.h"}"'
    sources = ["-DRLHF_ISA=avx512", emulation, str(FOLDER / "check.cpp"), "-o", str(tmp_path / "check")]
    subprocess.run(["g++", *FLAGS, *AVX512, *sources], check=True)
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all equal\n"), done.stdout + done.stderr

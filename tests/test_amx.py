"""AMX's tiles on CPUs without them: csrc/cpu/tiles.h compiled over an emulation of the instructions (tests/amx).

CPUs that have them run the op tests in them too, as the instruction set "amx" (conftest.py).
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.ops import _native

FOLDER = Path(__file__).parent / "amx"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=alignment"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]


def test_products_in_tiles_are_those_without_and_touch_nothing_else(tmp_path):
    if _native._C is None or not _native._C.isas().get("avx512", False):
        pytest.skip("this CPU or this build does not run AVX-512")
    command = ["g++", "-std=c++17", "-O0", "-fopenmp", *SANITIZERS, "-o", str(tmp_path / "check")]
    probe = [*command, "-x", "c++", "-"]
    if shutil.which("g++") is None or subprocess.run(probe, input="int main() {}", text=True).returncode != 0:
        pytest.skip("no g++ with AddressSanitizer")
    emulation = f'-DRLHF_EMULATED_TILES="{FOLDER / "emulated_tiles.h"}"'
    subprocess.run([*command, *AVX512, "-DRLHF_ISA=avx512", emulation, str(FOLDER / "check.cpp")], check=True)
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all equal\n"), done.stdout + done.stderr


def test_the_first_product_asks_for_tiles_and_not_the_import():
    if _native._C is None or not _native._C.isas().get("amx", False):
        pytest.skip("this CPU or this build does not run AMX")
    script = """if True:
        import ctypes, torch

        def has_tiles():
            permitted, states = 0x1022, ctypes.c_uint64()
            assert ctypes.CDLL(None).syscall(158, permitted, ctypes.byref(states)) == 0  # arch_prctl
            return bool(states.value >> 18 & 1)

        before = has_tiles()
        import rlhf_fast as rf

        assert has_tiles() == before
        hidden, weight = torch.ones(2, 4, 8, dtype=torch.bfloat16)
        rf.linear_token_logprobs(hidden, weight, torch.zeros(4, dtype=torch.long))
        assert has_tiles()
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_where_linux_refuses_tiles_the_instruction_set_in_use_is_the_next():
    if _native._C is None or not _native._C.isas().get("amx", False):
        pytest.skip("this CPU or this build does not run AMX")
    script = """if True:
        import ctypes

        class Stack(ctypes.Structure):
            _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

        size = 4096  # of the stack for signals, where tiles need 8 KiB
        memory = ctypes.create_string_buffer(size)
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, size)), None) == 0
        from rlhf_fast.info import collect

        assert collect()["build"]["instruction_set_in_use"] == "avx512"
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

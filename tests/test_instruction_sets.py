"""The native module holds code for newer CPUs, none of which may run before this one was asked what it can.

By hand, where qemu-user is: qemu-x86_64 -cpu Haswell-v4 (AVX2) or Westmere (neither) python -c "import rlhf_fast".
"""

import re
import shutil
import subprocess

import pytest

from rlhf_fast.ops._native import _C

WIDE = re.compile(r"%[yz]mm|\tv[a-z]")  # registers and names of AVX and later
# Names of lambdas within generic lambdas objdump leaves as the compiler wrote them.
NEWER = re.compile(r"(?:rlhf::(?:avx2|avx512)::|_ZN4rlhf(?:4avx2|6avx512))")


@pytest.fixture(scope="module")
def functions():
    """{name: its instructions} of the module that is in use."""
    if _C is None or "avx2" not in _C.isas():
        pytest.skip("no native module for x86-64")
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)+)", listing, re.MULTILINE))
    if not any(NEWER.search(name) for name in found):
        pytest.skip("a module stripped of its names")
    return found


def test_only_the_code_of_an_instruction_set_uses_it(functions):
    assert [name for name, code in functions.items() if not NEWER.search(name) and WIDE.search(code)] == []


def test_nothing_outside_calls_it_but_through_the_table(functions):
    """Loading ran avx512's own function that filled its table: an illegal instruction where there is no AVX-512."""
    calls = re.compile(r"\t(?:call|jmp) .*" + NEWER.pattern)
    assert [name for name, code in functions.items() if not NEWER.search(name) and calls.search(code)] == []

"""The CUDA sources as nvcc compiles them: registers, shared memory and stack of every kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import resources

pytestmark = pytest.mark.skipif(resources.NVCC is None or shutil.which("c++filt") is None, reason="needs nvcc")
needs_cuobjdump = pytest.mark.skipif(resources.CUOBJDUMP is None, reason="needs cuobjdump: pip install triton")
PRINTF = 32  # bytes of stack for the arguments of a message
SLACK = 4  # registers: another order of the same instructions
ANEW = "if that is meant, python tests/cuda/resources.py writes the file anew"


@pytest.fixture(scope="module")
def kernels():
    return resources.measure()


@needs_cuobjdump
def test_nothing_spills(kernels):
    spills = [f"{name} on {a}: {u.stack} bytes" for (name, a), u in kernels.items() if u.stack not in (0, PRINTF)]
    assert not spills, "registers are spilled to memory:\n" + "\n".join(spills)


@needs_cuobjdump
def test_no_kernel_takes_more_than_resources_txt_says(kernels):
    nvcc, golden = resources.read()
    if nvcc != resources.nvcc_version():
        pytest.skip(f"resources.txt is of nvcc {nvcc}, this one is {resources.nvcc_version()}")
    assert kernels.keys() == golden.keys(), f"other kernels than in resources.txt; {ANEW}"
    grown = [
        f"{name} on {a}: registers, bytes of shared memory and of stack are {tuple(u)}, were {tuple(was)}"
        for (name, a), u in kernels.items()
        if u.registers > (was := golden[name, a]).registers + SLACK or u.shared > was.shared or u.stack > was.stack
    ]
    assert not grown, "\n".join([*grown, ANEW])


@needs_cuobjdump
def test_1024_threads_of_a_row_kernel_fit_a_multiprocessor(kernels):
    """Two blocks of 512 threads, or one of 1024; float64 runs 512 at a time."""
    of_rows = ("token_logprobs:", "known_gradient:")
    rows = {key: u for key, u in kernels.items() if key[0].startswith(of_rows) and "<double" not in key[0]}
    assert len(rows) == 54 and all(u.registers <= 64 for u in rows.values()), rows


@pytest.mark.parametrize("file", ["token_logprobs", "known_gradient", "kl_divergence"])
def test_a_row_kernel_knows_which_memory_it_reads(file):
    """Not so through a pointer made from a number: each access then looks for global, shared or local memory first."""
    generic = re.findall(r"\b(?:ld|st)\.(?:v\d\.)?[bufs]\d+\b.*", resources.ptx(file))
    assert not generic, "\n".join(generic)


def test_kl_divergence_asks_for_all_packs_of_an_iteration_at_once():
    """Of both rows, in pieces of 2 bytes where the vocabulary is odd. At the end of a branch that asks for one of them
    it would wait for it."""
    kernels = resources.ptx("kl_divergence").split(".entry")[1:]
    (kernel,) = [k for k in kernels if re.match(r"\s*\w*forward\w*bfloat", k)]
    blocks = re.split(r"^\$L\w+:|\bbra\b", kernel, flags=re.MULTILINE)
    for piece, packs in (("v4.u32", 4), ("u16", 4 * 8)):
        assert max(block.count(f"ld.global.{piece}") for block in blocks) == packs, piece


@pytest.mark.parametrize(
    ("file", "kernel"),
    [("ppo_loss", "IfLb0"), ("value_loss", "IfLb0"), ("gae", "IfLb0"), ("masked", "split_rows_kernelIf")],
)
def test_what_lies_beside_boundaries_is_asked_for_before_it_is_waited_for(file, kernel):
    """All of a quad before the first of it is converted, and the mask, whose bytes are looked at where they are read,
    after it."""
    (beside,) = [k for k in resources.ptx(file).split(".entry")[1:] if kernel in k.split("(")[0]]
    first = re.findall(r"ld\.global\.u8|ld\.global\.u16|cvt\.f32\.f16", beside)[:5]
    assert first == 4 * ["ld.global.u16"] + ["cvt.f32.f16"], first


@pytest.mark.parametrize("file", ["gae", "kl_penalty"])
def test_a_small_op_stores_sixteen_bytes_at_once(file):
    """Its plain kernel (grid.cuh). An assignment of four floats becomes four stores, and four times L2's writes."""
    (plain,) = [kernel for kernel in resources.ptx(file).split(".entry")[1:] if "IfLb1E" in kernel.split("(")[0]]
    stores = re.findall(r"\bst\.global\S*", plain)
    assert len(stores) == 2 and all(".v4." in store for store in stores), stores


CUDA_12_4 = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  *compute_100*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_100'" >&2; exit 1 ;;
  *) exec {nvcc} "$@" ;;
esac
"""


GCC_TOO_NEW = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  *-ccbin*) exec {nvcc} "$@" ;;
  *probe.cu*) printf 'In file included from x:\\n#error -- "unsupported GNU version! gcc 16"\\n' >&2; exit 1 ;;
  *) exec {nvcc} "$@" ;;
esac
"""


def configure(nvcc: Path, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    """CMake's first step with this nvcc, and a stand-in for pybind11, which need not be installed."""
    nvcc.chmod(0o755)
    (tmp_path / "pybind11Config.cmake").write_text(
        "function(pybind11_add_module name)\n  list(REMOVE_ITEM ARGN NO_EXTRAS)\n  add_library(${name} ${ARGN})\n"
        "endfunction()\n"
    )
    command = ["cmake", "-S", Path(__file__).parents[2], "-B", tmp_path / "build", "-G", "Ninja",
               f"-Dpybind11_DIR={tmp_path}", f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA", "RLHF_FAST_CUDA"))}
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True)


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")
@pytest.mark.parametrize(
    ("variable", "asked", "built"),
    [("CUDACXX", "", {"80", "90"}), ("CUDA_HOME", "90-real", {"90"})],
)
def test_an_nvcc_that_does_not_know_sm_100_is_found_and_not_asked_for_it(variable, asked, built, tmp_path):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(CUDA_12_4.format(nvcc=resources.NVCC))
    found = {"CUDACXX": str(nvcc), "CUDA_HOME": str(tmp_path)}[variable]
    done = configure(nvcc, tmp_path, **{variable: found, "RLHF_FAST_CUDA": "1", "RLHF_FAST_CUDA_ARCHITECTURES": asked})
    assert done.returncode == 0 and f"CUDA kernels: yes: {nvcc}\n" in done.stdout, done.stdout + done.stderr
    commands = (tmp_path / "build" / "build.ninja").read_text()
    assert set(re.findall(r"code=\[?sm_(\d+)", commands)) == built


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake and ninja")
def test_an_nvcc_that_refuses_the_compiler_is_left_out_unless_it_was_asked_for(tmp_path):
    """A distribution's gcc is often newer than the toolkit allows: `pip install .` then still gives the CPU kernels."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(GCC_TOO_NEW.format(nvcc=resources.NVCC))
    why = f"{nvcc} of CUDA 13.0 does not work with the C++ compiler (unsupported GNU version! gcc 16)"
    done = configure(nvcc, tmp_path, CUDACXX=str(nvcc))
    assert done.returncode == 0 and f"CUDA kernels: no: {why}: name an older one in CUDAHOSTCXX\n" in done.stdout, (
        done.stdout
    )
    insisted = configure(nvcc, tmp_path, CUDACXX=str(nvcc), RLHF_FAST_CUDA="1")
    assert insisted.returncode != 0 and why in " ".join(insisted.stderr.split())
    allowed = configure(nvcc, tmp_path, CUDACXX=str(nvcc), CUDAHOSTCXX=shutil.which("c++"), RLHF_FAST_CUDA="1")
    assert allowed.returncode == 0 and f"CUDA kernels: yes: {nvcc}\n" in allowed.stdout, allowed.stdout + allowed.stderr

"""Runs csrc/cuda on the CPU: the sources as they are, compiled by g++ over tests/cuda/emulator.

csrc/ops.h is the table of what is emulated: every op of RLHF_CUDA_OPS, with the parameters that it declares.
"""

from __future__ import annotations

import ctypes
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from rlhf_fast.ops import _dispatch, _linear, _native, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from cases import Sampler

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = Path(__file__).parent / "emulator"
ASCENDING, DESCENDING, SHUFFLED = ORDERS = (0, 1, 2)  # which thread, and which block, runs first
USES = {  # an op: whose kernel it runs
    "token_logprobs_and_entropy": "token_logprobs", "dpo_loss": "pairwise_loss", "cross_entropy": "token_logprobs",
    "linear_token_logprobs_frozen_head": "linear_token_logprobs",
}  # fmt: skip
TICKETS = 64  # of sums.cuh, few enough to use them up


class Grid(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("row_stride", ctypes.c_int64),
        ("col_stride", ctypes.c_int64),
    )  # fmt: skip

    @classmethod
    def of(cls, x: torch.Tensor | None) -> Grid:
        """As grid_of in csrc/bindings.cpp."""
        if x is None:
            return cls(None, 0, 0, 0)
        return cls(x.data_ptr(), _native.DTYPE_CODES.get(x.dtype, 4), x.stride(0) if x.ndim == 2 else 0, x.stride(-1))


C_TYPES = {"Grid": Grid, "int": ctypes.c_int, "int64_t": ctypes.c_int64, "double": ctypes.c_double}


def signatures() -> dict[str, list[str]]:
    """{op: the type of each parameter} of every op of RLHF_CUDA_OPS."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / "ops.h").read_text())
    table = text.split("struct CudaOps {")[1].split("};")[0]
    declared = re.findall(r"int \(\*(\w+)\)\((.*?)\);", table, re.DOTALL)
    listed = re.findall(r"X\((\w+)\)", text.split("#define RLHF_CUDA_OPS(X)")[1])
    assert [name for name, _ in declared] == listed
    types = {
        name: [re.sub(r"\s*\w+$", "", p.strip()).removeprefix("const ") for p in parameters.split(",")]
        for name, parameters in declared
    }
    return {name: ["pointer" if t.endswith("*") else t for t in kinds] for name, kinds in types.items()}


def compile_all(commands: list[list[str]]) -> None:
    for command in commands:
        subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", *command], check=True)


def compile_source(source: Path, to: Path) -> None:
    """One .cu as ordinary C++; headers beside it win over csrc/cuda."""
    compile_all([[
        "-ffp-contract=off", "-fno-strict-aliasing", f"-DRLHF_TICKETS={TICKETS}", f"-I{EMULATOR}",
        f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", str(source), "-o", str(to),
    ]])  # fmt: skip


class Emulated:
    """The compiled kernels; an attribute for each op, called with tensors as _C.cuda is."""

    def __init__(self, objects: list[Path], library: Path):
        compile_all([[
            "-shared", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", str(EMULATOR / "emulated.cpp"), *map(str, objects),
            "-o", str(library),
        ]])  # fmt: skip
        self.library = ctypes.CDLL(str(library))
        self.scratch_doubles = ctypes.c_int64.in_dll(self.library, "scratch_doubles").value
        self.objects = objects
        for name, kinds in signatures().items():
            setattr(self, name, self._op(name, kinds))

    def _op(self, name: str, kinds: list[str]):
        address = ctypes.c_void_p.in_dll(self.library, f"{name}_address").value
        function = ctypes.CFUNCTYPE(ctypes.c_int, *(C_TYPES.get(kind, ctypes.c_void_p) for kind in kinds))(address)

        def call(*arguments):
            def convert(kind, x):
                if kind == "Grid":
                    return Grid.of(x)
                return x.data_ptr() if isinstance(x, torch.Tensor) else x

            return function(*(convert(kind, x) for kind, x in zip(kinds, arguments, strict=True)))

        return call

    def set_order(self, order: int) -> None:
        self.library.set_order(order)

    def set_capturing(self, capturing: bool) -> None:
        self.library.set_capturing(capturing)

    def set_shared_limit(self, size: int) -> None:
        self.library.set_shared_limit(size)

    def function_attributes(self) -> tuple[int, int]:
        """Bytes of dynamic shared memory, and the share of it in per cent, that a kernel was last given."""
        return self.library.function_attribute(0), self.library.function_attribute(1)

    def launches(self) -> int:
        return self.library.launches()

    def flush(self) -> None:
        self.library.flush()


def build(folder: Path) -> Emulated:
    objects = [folder / f"{source.stem}.o" for source in sorted(CUDA.glob("*.cu"))]
    for to in objects:
        compile_source(CUDA / f"{to.stem}.cu", to)
    return Emulated(objects, folder / "emulated.so")


def rebuild(emulated: Emulated, folder: Path, op: str, edits: dict[str, str]) -> Emulated:
    """The same with the file of one op compiled anew, from a copy of csrc with other text in some files of it."""
    for source in [*(ROOT / "csrc").glob("*/*.h"), *(ROOT / "csrc").glob("*.h"), *CUDA.iterdir()]:
        to = folder / source.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(edits.get(source.name, source.read_text()))
    compile_source(folder / "csrc" / "cuda" / f"{op}.cu", folder / f"{op}.o")
    # First, because of templates that several objects hold the linker takes the first one's.
    objects = [folder / f"{op}.o", *(o for o in emulated.objects if o.stem != op)]
    return Emulated(objects, folder / "emulated.so")


def install(monkeypatch, emulated: Emulated) -> None:
    """Lets the public functions run the emulated kernels on CPU tensors, through the Python of the CUDA backend."""
    guard = 64

    def launch(op, arguments, scratch_rows=None):
        scratch = ()
        if scratch_rows is not None:  # whatever lay there, and nothing behind it is touched
            size = emulated.scratch_doubles + scratch_rows
            scratch = (torch.full((size + guard,), torch.nan, dtype=torch.float64),)
        error = getattr(emulated, op)(*arguments, *scratch, None)
        assert not scratch or scratch[0][size:].isnan().all(), f"{op} writes behind its scratch memory"
        if error:
            raise RuntimeError(f"{op}: cudaError_t {error}")

    for name, module in list(sys.modules.items()):
        if name.startswith("rlhf_fast.ops.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(_native, "_C", SimpleNamespace(cuda=emulated, cuda_version="emulated"))
    monkeypatch.setattr(_linear, "on_gpu", lambda x: True)
    monkeypatch.setattr(_native, "_empties", lambda *given: None)  # as for CUDA tensors, torch's
    monkeypatch.setattr(_linear, "_C", None)
    for op in _dispatch._OPS.values():
        if "native" in op.kernels.get("cuda", {}):
            monkeypatch.setitem(op.kernels["cpu"], "native", op.kernels["cuda"]["native"])
            monkeypatch.setattr(op, "_ready", {})
            if op._in_c is not None:
                monkeypatch.setattr(op.function, "forward", staticmethod(op.function.forward_in_python))
                monkeypatch.setattr(op.function._backward_cls, "apply", op.function.backward)
                monkeypatch.setattr(op, "_in_c", None)


def logits_in_their_dtype(monkeypatch) -> None:
    """What eager PyTorch is on a GPU: the product of two bfloat16 matrices is one, and only then becomes float32."""
    wide = reference.linear_logits

    def linear_logits(hidden, weight, bias=None, softcap=None):
        same = hidden.dtype == weight.dtype == torch.bfloat16 and (bias is None or bias.dtype == weight.dtype)
        if not same or softcap is not None:
            return wide(hidden, weight, bias, softcap)
        logits = hidden.float() @ weight.float().T
        return (logits if bias is None else logits + bias.float()).bfloat16().float()

    monkeypatch.setattr(reference, "linear_logits", linear_logits)


def few_rows(case, seed: int) -> dict:
    """The case's inputs with at most eight rows: each is a block of 512 fibers here."""
    inputs = case.inputs(Sampler(random.Random(seed)))
    if case.name == "linear_ppo_loss":
        inputs = {k: v[:2, :4] if torch.is_tensor(v) and v.ndim > 1 and k != "weight" else v for k, v in inputs.items()}
    return inputs

"""The native module rlhf_fast._C: whether it is there, what can run on this machine, its memory and its CUDA launches.

Without it everything here still works: calls then go through torch.library, and memory comes from PyTorch.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from ._layout import DTYPE_CODES, accumulation_dtype

try:
    from .. import _C
except ImportError as error:  # a source tree that is not built; backends() and the errors on the CPU say so
    _C, _C_MISSING = None, str(error)
else:
    if getattr(_C, "interface", 1) != 14:  # csrc/bindings.cpp
        _C, _C_MISSING = None, "the existing one was built from another version of the source tree"

HOW_TO_BUILD = "with nvcc on PATH run pip install . in the source tree (RLHF_FAST_CUDA=1 makes a missing nvcc an error)"
_HAS_TRITON = find_spec("triton") is not None  # asked at import, because not every torch.compile can trace find_spec

# Return values of route, the way of a call into an op (csrc/tensor.h).
LIBRARY_OP, FUNCTION = 0, 2
route = (lambda *arguments: LIBRARY_OP) if _C is None else _C.route
route_in_backward = (lambda *arguments: LIBRARY_OP) if _C is None else _C.route_in_backward
NEGATED = () if _C is None else _C.Negated  # raised for a tensor with torch's negative bit set, such as z.conj().imag


def unavailable(device: str, backend: str) -> str | None:
    """Why a backend cannot run on this machine; None where it can."""
    if device == "cpu":
        if backend == "native" and _C is None:
            return f"rlhf_fast._C is not built ({_C_MISSING}); run pip install . in the source tree"
        if backend == "triton":
            return "Triton runs on the CPU only in its interpreter, which use_backend('triton') asks for"
    elif backend == "native":
        if _C is None or _C.cuda_version is None:
            return f"this build has no CUDA kernels; {HOW_TO_BUILD}"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    elif backend == "triton" and not _HAS_TRITON:
        return "triton is not installed"
    return None


def device_type(x: Tensor) -> str:
    return "cpu" if x.is_cpu else x.device.type  # is_cpu takes a fifth of the time of x.device, which makes an object


def empties(like: Tensor, dtype: torch.dtype | None, *shapes) -> tuple[Tensor | None, ...]:
    """Uninitialised contiguous tensors on the device of like, one for each shape.

    A shape is a tensor (whose shape is meant), a number, or a tuple of these; None gives None. dtype None is the dtype
    in which like's values are accumulated. On a CPU the native module allocates, in a third of PyTorch's time, and
    large tensors reuse the memory of a previous step (csrc/memory.h). Tensors from there cannot grow, neither by
    resize_ nor as an out= of another shape.
    """
    made = _empties(like, -1 if dtype is None else DTYPE_CODES[dtype], *shapes)
    if made is not None:
        return made
    dtype = dtype or accumulation_dtype(like)
    return tuple(None if s is None else torch.empty(_sizes(s), dtype=dtype, device=like.device) for s in shapes)


_empties = (lambda *given: None) if _C is None else _C.empties


def _sizes(shape) -> tuple[int, ...]:
    if isinstance(shape, Tensor):
        return tuple(shape.shape)
    return tuple(n for part in shape for n in _sizes(part)) if isinstance(shape, tuple) else (shape,)


def empty_cache() -> int:
    """Returns the memory that is kept for large CPU gradients to the system -> its size in bytes."""
    return _C.empty_cache() if hasattr(_C, "empty_cache") else 0  # the tests' emulation of a GPU has none


def launch(op: str, arguments: tuple, scratch_rows: int | None = None) -> None:
    """Queues a CUDA op of csrc/ops.h on the current stream of the device of its first tensor."""
    device = arguments[0].device
    if scratch_rows is not None:  # freed before the kernel has run, but only later work on this stream can reuse it
        size = _C.cuda.scratch_doubles + scratch_rows
        arguments = (*arguments, torch.empty(size, dtype=torch.float64, device=device))
    with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        # Not torch.cuda.current_stream: 4 us for 0.2 (PyTorch pull request 78165), where a small op's call takes 20.
        error = getattr(_C.cuda, op)(*arguments, torch._C._cuda_getCurrentRawStream(device.index))
    if error:
        raise RuntimeError(f"{op}: the launch on {device} failed with cudaError_t {error}{_meaning(error)}")


def _meaning(error: int) -> str:
    if error >= 700 and error != 701:  # CUDA reports that a kernel has failed in the next call, whichever it is
        return ", from a kernel that ran before this one; CUDA_LAUNCH_BLOCKING=1 finds out which"
    if error == 209:
        return f": this build has code only for {_C.cuda_architectures} (RLHF_FAST_CUDA_ARCHITECTURES)"
    return f": the driver is older than CUDA {_C.cuda_version}, which built the kernels" if error == 35 else ""

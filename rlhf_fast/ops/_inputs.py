"""What several ops share: the checks of their inputs with the error messages, and the outputs of the losses.

A check that passes must cost next to nothing: on tiny tensors an op takes a few microseconds. So the usual call is
accepted by one native check (csrc/tensor.h) or one comparison, and the code that finds out which argument is wrong runs
only after that.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.compiler import is_compiling

from . import reference
from ._dispatch import native
from ._layout import DTYPE_CODES, as_bool
from ._native import _C, empties

_alike = (lambda ndim, needed, mask, *tensors: False) if _C is None else _C.alike
MOST_VOCABULARY = 2**30  # columns of a row are 32-bit numbers in csrc/cuda
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def dtype_error(op: str, name: str, x: Tensor, needed: str = "float32, bfloat16, float16 or float64") -> TypeError:
    return TypeError(f"{op}: {name} is {x.dtype}; needs {needed}")


def device_error(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> ValueError:
    return ValueError(f"{op}: {name} is on {x.device}, {like_name} on {like.device}; move them to one device")


def label_error(op: str, label: Tensor, row: int | Tensor, vocab: int) -> IndexError:
    return IndexError(
        f"{op}: label {label} at row {row} is outside the vocabulary of {vocab}; a label that does not count needs "
        "mask=False (or ignore_index) there"
    )


def check_tensors(op: str, *, optional: tuple[str, ...] = (), **arguments) -> None:
    """Checks that all arguments are dense tensors. optional: the names of those that may be None."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor) and (x is not None or name not in optional):
            raise TypeError(f"{op}: {name} is {'None' if x is None else f'of type {type(x).__name__}'}; needs a tensor")
        if x is not None and (x.layout is not torch.strided or x.is_nested):
            raise TypeError(f"{op}: {name} is {'nested' if x.is_nested else x.layout}; needs a dense tensor")


def check_vocabulary(op: str, size: int, like: Tensor) -> None:
    """Checks the limit of the GPU's kernels."""
    if size > MOST_VOCABULARY and not like.is_cpu:
        raise ValueError(f"{op}: a vocabulary of {size} is more than the kernels' limit of {MOST_VOCABULARY}")


def check(
    op: str, ndim: int | None, mask: Tensor | None, names: str, *tensors: Tensor | None, optional: int = 0
) -> None:
    """Checks that all tensors and the mask have one shape and device, and the tensors a floating dtype.

    names: the names of the tensors, separated by spaces. ndim: the number of axes that they need (None: any). The mask
    may be None, and so may the last `optional` tensors.
    """
    needed = len(tensors) - optional
    if not is_compiling() and _alike(-1 if ndim is None else ndim, needed, mask, *tensors):
        return  # the usual case, in a tenth of the time that the checks below take
    named = dict(zip(names.split(), tensors, strict=True))
    check_tensors(op, optional=(*list(named)[needed:], "mask"), **named, mask=mask)
    first_name, first = next(iter(named.items()))
    shape, device = first.shape, first.device
    if ndim is not None and len(shape) != ndim:
        need = {1: "(B,)", 2: "(B, T)"}[ndim]
        raise ValueError(f"{op}: {first_name} is {tuple(shape)}; needs {need}")
    for name, x in named.items():
        if x is None:
            continue
        if x.dtype not in DTYPE_CODES:
            raise dtype_error(op, name, x)
        if x.shape != shape or x.device != device:
            raise _mismatch(op, name, x, first_name, first)
    if mask is not None and (mask.shape != shape or mask.device != device):
        raise _mismatch(op, "mask", mask, first_name, first)


def _mismatch(op: str, name: str, x: Tensor, first_name: str, first: Tensor) -> ValueError:
    if x.shape == first.shape:
        return device_error(op, name, x, first_name, first)
    # As GRPO's loops have them, which let the loss broadcast.
    one_a_row = first.ndim == 2 and x.shape in ((len(first),), (len(first), 1))
    advice = f": {name}.reshape(-1, 1).expand_as({first_name}), if each counts for its row" if one_a_row else ""
    return ValueError(f"{op}: {name} {tuple(x.shape)} must have the shape of {first_name} {tuple(first.shape)}{advice}")


def needed_mask(op: str, mask: Tensor | None) -> Tensor:
    """The mask as bool."""
    if mask is None:
        raise ValueError(f"{op}: needs a mask (B, T); one that is True everywhere counts every token")
    return as_bool(mask)


# What float(), a comparison or torch.full raises if it is given something that is not a number. Options are used inside
# `try ... except NO_NUMBER` instead of being checked first, because a try costs the usual call nothing.
NO_NUMBER = (TypeError, ValueError, RuntimeError, OverflowError)


def refuse_no_number(op: str, *, optional: tuple[str, ...] = (), **given) -> None:
    """Call it after catching NO_NUMBER: a TypeError names the first argument that is not a number.

    The optional ones may be None. Returns if all are numbers: the error then had another cause.
    """
    for name, x in given.items():
        if x is None and name in optional:
            continue
        try:
            if not isinstance(x, str):  # float("1e-5") works, but no op takes a string
                float(x)
                continue
        except NO_NUMBER:
            pass
        if not isinstance(x, Tensor):
            got = f"{x!r} of type {type(x).__name__}"
        else:
            got = "batched by vmap" if functorch.is_batchedtensor(x) else f"{tuple(x.shape)} on {x.device}"
        raise TypeError(f"{op}: {name} is {got}; needs one number") from None


def check_policy(
    op: str, cliprange: float, cliprange_high: float | None, dual_clip: float | None, log_ratio_clamp: float | None
) -> None:
    """Checks the options of PPO's losses."""
    try:
        if (
            cliprange >= 0
            and (cliprange_high is None or cliprange_high >= 0)
            and (dual_clip is None or dual_clip > 1)
            and (log_ratio_clamp is None or log_ratio_clamp >= 0)
        ):
            return
    except NO_NUMBER:
        refuse_no_number(
            op, optional=("cliprange_high", "dual_clip", "log_ratio_clamp"), cliprange=cliprange,
            cliprange_high=cliprange_high, dual_clip=dual_clip, log_ratio_clamp=log_ratio_clamp,
        )  # fmt: skip
        raise
    limits = {"cliprange": cliprange, "cliprange_high": cliprange_high, "log_ratio_clamp": log_ratio_clamp}
    for name, value in limits.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{op}: {name} {value} must be >= 0")
    raise ValueError(f"{op}: dual_clip {dual_clip} must be > 1")


def check_temperature(op: str, temperature: float) -> None:
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(
            f"{op}: temperature is {tuple(temperature.shape)}; needs one number. For one temperature per row divide "
            "the logits by them (or the hidden states, if there is no bias and no softcap)"
        )
    check_positive(op, "temperature", temperature)


def check_positive(op: str, name: str, value: float) -> None:
    try:
        outside = not 0 < value < math.inf
    except NO_NUMBER:
        refuse_no_number(op, **{name: value})
        raise
    if outside:
        raise ValueError(f"{op}: {name} {value} must be > 0 and finite")


def check_limit(op: str, name: str, limit: float | None) -> None:
    try:
        outside = limit is not None and not limit >= 0
    except NO_NUMBER:
        refuse_no_number(op, **{name: limit})
        raise
    if outside:
        raise ValueError(f"{op}: {name} {limit} must be >= 0")


def float_or(value: float | None, default: float | None) -> float | None:
    """An option, which may be a tensor, as the float that torch.library needs; the default if it is None."""
    value = default if value is None else value
    return None if value is None else float(value)


def check_term(op: str, coefficient: str, value: float, needed: str, tensor: Tensor | None) -> float:
    """The coefficient of a term as a float. ValueError if it is not 0 and the tensor of the term is missing: the term
    would silently be left out."""
    try:
        number = float(value)
    except NO_NUMBER:
        refuse_no_number(op, **{coefficient: value})
        raise
    if tensor is None and number != 0:
        raise ValueError(f"{op}: {coefficient} {value} needs {needed}")
    return number


AGGREGATION_CODES = {mode: code for code, mode in enumerate(reference.AGGREGATIONS)}
ESTIMATOR_CODES = {name: ("k1", "k2", "k3", "abs").index(formula) for name, formula in reference.KL_ESTIMATORS.items()}


def code_of(op: str, name: str, value: str, codes: dict[str, int]) -> int:
    """The number by which the kernels know the value of the option `name`."""
    try:
        code = codes.get(value)
    except TypeError:  # not hashable, such as a list
        code = None
    if code is None:
        raise ValueError(f"{op}: {name} {value!r} must be one of {', '.join(codes)}")
    return code


def normalizer_tensor(op: str, normalizer: Tensor | float | None, like: Tensor) -> Tensor | None:
    """The normalizer as a float64 scalar tensor on like's device. A kernel reads it there, without synchronisation."""
    if normalizer is None:
        return None
    if not isinstance(normalizer, Tensor):
        try:
            return torch.full((), normalizer, dtype=torch.float64, device=like.device)
        except NO_NUMBER:
            refuse_no_number(op, normalizer=normalizer)
            # A numpy array of one number, say. If the device has failed, this raises its error again.
            return torch.full((), float(normalizer), dtype=torch.float64, device=like.device)
    check_normalizer(op, normalizer, like)
    return normalizer.detach().double().reshape(())


def check_normalizer(op: str, normalizer: Tensor | float, like: Tensor) -> None:
    if not isinstance(normalizer, Tensor):
        refuse_no_number(op, normalizer=normalizer)
    elif normalizer.numel() != 1 or normalizer.device != like.device:
        raise ValueError(
            f"{op}: normalizer is {tuple(normalizer.shape)} on {normalizer.device}; needs one number on {like.device}"
        )


def index_of_no_label(op: str, ignore_index: int) -> int:
    """ignore_index as an int. None is refused, because `labels != None` is the bool True and not a mask."""
    try:
        return operator.index(ignore_index)
    except TypeError:
        raise TypeError(
            f"{op}: ignore_index {ignore_index!r} must be an integer; to count every label, give one that no label has"
        ) from None


def loss_outputs(like: Tensor, names: tuple[str, ...], *with_grads: bool) -> tuple[Tensor | None, ...]:
    """Uninitialised outputs of a loss: the scalar, its statistics, and each gradient (None if it is not wanted)."""
    return empties(like, None, (), len(names), *[like if wanted else None for wanted in with_grads])


def native_loss(op: str, arguments: Callable, names: tuple[str, ...], triton: str | None = None) -> dict:
    """The kernels (see _dispatch.native) of a loss with statistics of these names.

    arguments(*args) returns the native op's arguments up to the dtype (csrc/ops.h), and which gradients are wanted.
    """

    def with_outputs(*args):
        given, wanted = arguments(*args)
        outputs = loss_outputs(args[0], names, *wanted)
        return (*given, DTYPE_CODES[outputs[0].dtype], *outputs), outputs

    kernels, count = native(op, with_outputs, scratch=True, triton=triton), len(names)
    made, in_two_steps = getattr(_C, f"{op}_made", None), kernels["cpu", "native"]

    def cpu(*args):
        given, wanted = arguments(*args)
        return made(*given, count, *wanted, torch.get_num_threads()) or in_two_steps(*args)

    return kernels | {("cpu", "native"): cpu}


def wants_gradient(x: Tensor | None) -> bool:
    if x is None or not torch.is_grad_enabled():
        return False
    return may_require_gradient(x)


def may_require_gradient(x: Tensor) -> bool:
    # vmap's wrapper does not tell whether what it wraps requires a gradient. (torch 2.6 compiles the first call only.)
    return x.requires_grad or (torch._C._are_functorch_transforms_active() and functorch.is_batchedtensor(x))


def as_rows(x: Tensor) -> Tensor:
    """(...) -> (rows, columns), a view where memory allows."""
    if x.ndim == 2:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)

"""What the ops over (B, T) tokens and (B,) pairs share: checks of their inputs, and where their results go."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import reference
from ._dispatch import _C, DTYPE_CODES, as_bool, check_tensors, empties, native

_alike = (lambda ndim, needed, mask, *tensors: False) if _C is None else _C.alike


def check(
    op: str, ndim: int | None, mask: Tensor | None, names: str, *tensors: Tensor | None, optional: int = 0
) -> None:  # fmt: skip
    """All tensors, whose names are the words of names, have the first one's shape and device, and a floating dtype;
    ndim is the number of axes it needs. The last `optional` of them may be None, and so may the mask."""
    needed = len(tensors) - optional
    if not is_compiling() and _alike(-1 if ndim is None else ndim, needed, mask, *tensors):
        return  # the usual case, for a tenth of the time of what follows
    named = dict(zip(names.split(), tensors, strict=True))
    check_tensors(op, optional=(*list(named)[needed:], "mask"), **named, mask=mask)
    first_name, first = next(iter(named.items()))
    shape, device = first.shape, first.device
    if ndim is not None and len(shape) != ndim:
        need = {1: "(B,)", 2: "(B, T)"}[ndim]
        raise ValueError(f"{op}: {first_name} is {tuple(shape)}; needs {need}")
    for name, x in named.items():
        if x is not None and (x.shape != shape or x.dtype not in DTYPE_CODES or x.device != device):
            _refuse(op, name, x, first_name, first)
    if mask is not None and (mask.shape != shape or mask.device != device):
        _refuse(op, "mask", mask, first_name, first)


def _refuse(op: str, name: str, x: Tensor, first_name: str, first: Tensor) -> None:
    if name != "mask" and x.dtype not in DTYPE_CODES:
        raise TypeError(f"{op}: {name} is {x.dtype}; needs float32, bfloat16, float16 or float64")
    if x.shape != first.shape:
        raise ValueError(f"{op}: {name} {tuple(x.shape)} must have the shape of {first_name} {tuple(first.shape)}")
    raise ValueError(f"{op}: {name} is on {x.device}, {first_name} on {first.device}; move them to one device")


def needed_mask(op: str, mask: Tensor | None) -> Tensor:
    """As bool."""
    if mask is None:
        raise ValueError(f"{op}: needs a mask (B, T); one that is True everywhere counts all")
    return as_bool(mask)


# What float(), a comparison or torch.full raises of what is no number. Around these, and not a check before them: the
# usual call pays nothing for a try.
NO_NUMBER = (TypeError, ValueError, RuntimeError, OverflowError)


def refuse_no_number(op: str, *, optional: tuple[str, ...] = (), **given) -> None:
    """Where NO_NUMBER was caught: a TypeError that names the first which is no number; None for the optional ones."""
    for name, x in given.items():
        if x is None and name in optional:
            continue
        try:
            if not isinstance(x, str):  # float("1e-5") is one, and nothing else here takes it
                float(x)
                continue
        except NO_NUMBER:
            pass
        got = f"{tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else f"{x!r} of type {type(x).__name__}"
        raise TypeError(f"{op}: {name} is {got}; needs one number") from None


def check_policy(
    op: str, cliprange: float, cliprange_high: float | None, dual_clip: float | None, log_ratio_clamp: float | None
) -> None:
    """What PPO's losses refuse of their options."""
    try:
        if not cliprange >= 0:
            raise ValueError(f"{op}: cliprange {cliprange} must be >= 0")
        if cliprange_high is not None and not cliprange_high >= 0:
            raise ValueError(f"{op}: cliprange_high {cliprange_high} must be >= 0")
        if dual_clip is not None and not dual_clip > 1:
            raise ValueError(f"{op}: dual_clip {dual_clip} must be > 1")
        if log_ratio_clamp is not None and not log_ratio_clamp >= 0:
            raise ValueError(f"{op}: log_ratio_clamp {log_ratio_clamp} must be >= 0")
    except NO_NUMBER:
        refuse_no_number(
            op, optional=("cliprange_high", "dual_clip", "log_ratio_clamp"), cliprange=cliprange,
            cliprange_high=cliprange_high, dual_clip=dual_clip, log_ratio_clamp=log_ratio_clamp,
        )  # fmt: skip
        raise


def check_temperature(op: str, temperature: float) -> None:
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(
            f"{op}: temperature is {tuple(temperature.shape)}; needs one number. For one of each row divide the logits "
            "(or the hidden states, where there is no bias and no softcap) by it"
        )
    check_limit(op, "temperature", temperature)


def check_limit(op: str, name: str, value: float) -> None:
    try:
        if not 0 < value < math.inf:
            raise ValueError(f"{op}: {name} {value} must be > 0 and finite")
    except NO_NUMBER:
        refuse_no_number(op, **{name: value})
        raise


def check_term(op: str, coefficient: str, value: float, needed: str, tensor: Tensor | None) -> float:
    """The coefficient of a term; one whose tensor is missing would be left out without a word."""
    try:
        number = float(value)
    except NO_NUMBER:
        refuse_no_number(op, **{coefficient: value})
        raise
    if tensor is None and number != 0:
        raise ValueError(f"{op}: {coefficient} {value} needs {needed}")
    return number


_AGGREGATION_CODES = {mode: code for code, mode in enumerate(reference.AGGREGATIONS)}
_ESTIMATOR_CODES = {name: ("k1", "k2", "k3", "abs").index(formula) for name, formula in reference.KL_ESTIMATORS.items()}


def aggregation_code(op: str, mode: str) -> int:
    try:
        code = _AGGREGATION_CODES.get(mode)
    except TypeError:  # of a list
        code = None
    if code is None:
        raise ValueError(f"{op}: loss_agg_mode {mode!r} must be one of {', '.join(reference.AGGREGATIONS)}")
    return code


def estimator_code(op: str, estimator: str, name: str = "estimator") -> int:
    try:
        code = _ESTIMATOR_CODES.get(estimator)
    except TypeError:  # of a list
        code = None
    if code is None:
        raise ValueError(f"{op}: {name} {estimator!r} must be one of {', '.join(reference.KL_ESTIMATORS)}")
    return code


def normalizer_tensor(op: str, normalizer: Tensor | float | None, like: Tensor) -> Tensor | None:
    """As a float64 scalar tensor, which a kernel reads where it lies: no synchronisation."""
    if normalizer is None:
        return None
    if not isinstance(normalizer, Tensor):
        try:
            return torch.full((), normalizer, dtype=torch.float64, device=like.device)
        except NO_NUMBER:
            refuse_no_number(op, normalizer=normalizer)
            raise
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
    """labels != None is True, of no shape."""
    try:
        return operator.index(ignore_index)
    except TypeError:
        raise TypeError(
            f"{op}: ignore_index {ignore_index!r} must be an integer; one that no label has lets all count"
        ) from None


def loss_outputs(like: Tensor, names: tuple[str, ...], *with_grads: bool) -> tuple[Tensor | None, ...]:
    """Where a loss writes its scalar, its statistics, and the gradients that it knows already; None where unwanted."""
    return empties(like, None, (), len(names), *[like if wanted else None for wanted in with_grads])


def native_loss(op: str, arguments: Callable, names: tuple[str, ...], triton: str | None = None) -> dict:
    """The kernels (_dispatch.native) of a loss with statistics of these names. arguments(*args) gives what csrc/ops.h
    asks before the dtype, and which gradients are wanted."""

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
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def as_rows(x: Tensor) -> Tensor:
    """(...) -> (rows, columns), a view where memory allows."""
    if x.ndim == 2:
        return x
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)

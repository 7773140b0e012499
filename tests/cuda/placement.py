"""A GPU to the Python above the kernels, without one: tensors on the CPU that say they lie on a CUDA device.

Inside Card() a tensor made with device="cuda", moved there or computed from such a one says so (device, is_cuda), and a
function that is given tensors of both devices raises as PyTorch would. What PyTorch allows passes: a scalar of the CPU,
an index of the CPU, a copy. It sees calls from Python only; kernels run on the CPU, under the emulator or as reference.
"""

from __future__ import annotations

import copy

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MAY_MIX = {"to", "cpu", "copy_", "__getitem__", "__deepcopy__", "_make_subclass"}


def device_of(x: torch.Tensor) -> torch.device | None:
    """None: made outside Card(), or by a kernel, so that nobody knows."""
    return vars(x).get("pretended")


def put(x, device: torch.device | None):
    if isinstance(x, torch.Tensor) and device is not None:
        vars(x)["pretended"] = device
    return x


def put_module(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    for x in (*module.parameters(), *module.buffers()):
        put(x, device)
    return module


class Card(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, dict(kwargs or {})
        if name in ("__get__", "__set__"):
            return self._property(function, args, kwargs)
        asked = None
        if kwargs.get("device") is not None:
            asked, kwargs["device"] = torch.device(kwargs["device"]), CPU
        if name == "cpu":
            asked = CPU
        elif name == "to":
            named = [x for x in args[1:] if isinstance(x, (str, torch.device))]
            like = [x for x in args[1:] if isinstance(x, torch.Tensor)]
            asked = asked or (torch.device(named[0]) if named else device_of(like[0]) if like else None)
            args = tuple(CPU if isinstance(x, (str, torch.device)) else x for x in args)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {device_of(x) for x in tensors if x.ndim or device_of(x) == CUDA} - {None}
        if len(devices) > 1 and name not in MAY_MIX:
            raise RuntimeError(f"{name} is given tensors of both devices: {[(device_of(x), x.shape) for x in tensors]}")
        result = function(*args, **kwargs)
        if name in ("to", "cpu") and result is args[0] and asked not in (None, device_of(result)):
            result = result.clone()  # the same memory is no copy to another device
        if asked is None and name == "__getitem__":
            asked = device_of(args[0])
        elif asked is None and (devices or not tensors):
            asked = CUDA if CUDA in devices else CPU
        for x in tree_leaves(result):
            put(x, asked)
        return result

    def _property(self, function, args, kwargs):
        name, device = function.__self__.__name__, device_of(args[0])
        if function.__name__ == "__set__":
            if name == "data":
                put(args[0], device_of(args[1]))
            return function(*args, **kwargs)
        if device == CUDA and name in ("device", "is_cuda", "is_cpu"):
            return {"device": CUDA, "is_cuda": True, "is_cpu": False}[name]
        return put(function(*args, **kwargs), device)


def install(monkeypatch) -> None:
    """What copies or moves whole modules past the mode, and what only a GPU has."""
    deepcopy, move = copy.deepcopy, torch.nn.Module.to

    def copied(x, memo=None):
        y = deepcopy(x, memo)
        if isinstance(x, torch.nn.Module):
            for a, b in zip((*x.parameters(), *x.buffers()), (*y.parameters(), *y.buffers()), strict=True):
                put(b, device_of(a))
        return y

    def moved(module, *args, **kwargs):
        named = [x for x in args if isinstance(x, (str, torch.device))]
        move(module, *(CPU if isinstance(x, (str, torch.device)) else x for x in args), **kwargs)
        return put_module(module, torch.device(named[0])) if named else module

    monkeypatch.setattr(copy, "deepcopy", copied)
    monkeypatch.setattr("rlhf_fast.ops._native._empties", lambda *given: None)  # which looks past the mode
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr("rlhf_fast.generation._Graph", lambda decoder: decoder.step)

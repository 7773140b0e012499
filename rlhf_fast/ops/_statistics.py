"""The statistics of a loss: a dict of scalar tensors, made from the one vector that the kernel has filled."""

from __future__ import annotations

import functools
from collections import OrderedDict

from torch import Tensor
from torch.utils import _pytree

_set, _UNSPLIT = dict.__setitem__, object()


class Statistics(dict):
    """{name: scalar tensor}. The vector is split on first use of the dict, because that takes as long as a small loss.

    Without a vector it is an ordinary dict of its first argument: accelerate, transformers and dataclasses copy a dict
    d by type(d)(items).
    """

    _unsplit: tuple[tuple[str, ...], Tensor] | None = None

    def __init__(self, names=(), vector: Tensor | None = None):
        if vector is None:
            dict.update(self, names)
        else:
            _set(self, names[0], _UNSPLIT)  # json's C code calls no method of a dict that has no entry
            self._unsplit = names, vector

    def split(self) -> None:
        if self._unsplit is not None:
            names, vector = self._unsplit
            dict.update(self, zip(names, vector.unbind(), strict=True))
            self._unsplit = None

    # Copies and pickles are OrderedDicts, the one subclass of dict that torch.load takes by default.
    def __reduce__(self):
        return OrderedDict, (), None, None, iter(self.items())


def _splitting(method):
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        self.split()
        return method(self, *args, **kwargs)

    return wrapper


for _name in vars(dict).keys() - {"__new__", "__init__", "__getattribute__", "__class_getitem__", "fromkeys"}:
    if callable(getattr(dict, _name)):
        setattr(Statistics, _name, _splitting(getattr(dict, _name)))
_pytree.register_pytree_node(
    Statistics, lambda d: (list(d.values()), list(d)), lambda values, names: dict(zip(names, values, strict=True))
)

"""The statistics of a loss: a dict of scalar tensors, all from one vector that its kernel has filled."""

from __future__ import annotations

import functools
from collections import OrderedDict

from torch import Tensor
from torch.utils import _pytree

_set, _UNCUT = dict.__setitem__, object()


class Statistics(dict):
    """{name: scalar tensor}, cut out of one vector when it is first touched: the cuts take as long as a small loss.

    Made of anything else it is that dict: accelerate, transformers and dataclasses make a copy by type(d)(items).
    """

    _uncut: tuple[tuple[str, ...], Tensor] | None = None

    def __init__(self, names=(), vector: Tensor | None = None):
        if vector is None:
            dict.update(self, names)
        else:
            _set(self, names[0], _UNCUT)  # of a dict without an entry json, in C, asks no more
            self._uncut = names, vector

    def cut(self) -> None:
        if self._uncut is not None:
            names, vector = self._uncut
            dict.update(self, zip(names, vector.unbind(), strict=True))
            self._uncut = None

    def __reduce__(self):  # of copies and pickles; the one subclass of dict that torch.load takes by default
        return OrderedDict, (), None, None, iter(self.items())


def _cutting(method):
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        self.cut()
        return method(self, *args, **kwargs)

    return wrapper


for _name in vars(dict).keys() - {"__new__", "__init__", "__getattribute__", "__class_getitem__", "fromkeys"}:
    if callable(getattr(dict, _name)):
        setattr(Statistics, _name, _cutting(getattr(dict, _name)))
_pytree.register_pytree_node(
    Statistics, lambda d: (list(d.values()), list(d)), lambda values, names: dict(zip(names, values, strict=True))
)

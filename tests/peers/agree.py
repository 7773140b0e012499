"""Ours beside the peer's: same arguments, then values and gradients compared. Used by compare_*.py."""

from __future__ import annotations

import pytest
import torch

MASKS = [  # (3, 6) int, as the peers pass them: full, ragged, with gaps, one row empty
    [[1, 1, 1, 1, 1, 1]] * 3,
    [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]],
    [[1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 0, 0]],
    [[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
]
masks = pytest.mark.parametrize("mask", [torch.tensor(m) for m in MASKS], ids=["full", "ragged", "gaps", "empty-row"])
EMPTY = torch.zeros(3, 6, dtype=torch.long)


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels_for(logits, *more, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, logits.shape[-1], (*logits.shape[:-1], *more), generator=generator)


def _call(function, args, kwargs, wrt):
    args = [
        a.detach().clone().requires_grad_(i in wrt) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)
    ]
    torch.manual_seed(7)  # for what draws at random
    return function(*args, **kwargs), [args[i] for i in wrt]


def _leaves(result):
    if isinstance(result, dict):
        return [result[key] for key in sorted(result)]
    if isinstance(result, (tuple, list)):
        return [leaf for part in result for leaf in _leaves(part)]
    return [] if result is None else [result]


def agree(ours, theirs, *args, wrt=(), inside=None, tol=1e-5, **kwargs):
    """Asserts that both give the same for args and kwargs, and the same gradients for the args numbered wrt.

    inside: a mask outside of which results are not compared (ours are 0 there).
    """
    (got, got_inputs), (want, want_inputs) = _call(ours, args, kwargs, wrt), _call(theirs, args, kwargs, wrt)
    if isinstance(want, dict):
        assert got.keys() == want.keys()
    pairs = list(zip(_leaves(got), _leaves(want), strict=True))
    got_sum, want_sum = 0.0, 0.0
    for i, (a, b) in enumerate(pairs):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        if inside is not None and a.shape == inside.shape:
            assert (a[~inside.bool()] == 0).all()
            a, b = a[inside.bool()], b[inside.bool()]
        torch.testing.assert_close(a, b, atol=tol, rtol=tol, check_dtype=False, msg=lambda m, i=i: f"result {i}: {m}")
        if b.requires_grad:
            assert a.requires_grad, f"result {i} lost its gradient"
            weight = randn(*b.shape, seed=11 + i)
            got_sum, want_sum = got_sum + (a * weight).sum(), want_sum + (b * weight).sum()
    if wrt:
        for a, b in zip(
            torch.autograd.grad(got_sum, got_inputs), torch.autograd.grad(want_sum, want_inputs), strict=True
        ):
            torch.testing.assert_close(a, b, atol=tol, rtol=tol, msg=lambda m: f"gradient: {m}")


def deviates(ours, theirs, *args, peer, **kwargs):
    """Ours on args, once it is shown what is wrong with the peer: peer(its result) is true, or it raises peer."""
    if isinstance(peer, type) and issubclass(peer, Exception):
        with pytest.raises(peer):
            _call(theirs, args, kwargs, ())
    else:
        assert peer(_call(theirs, args, kwargs, ())[0]), "the peer no longer deviates: take this test out"
    return _call(ours, args, kwargs, ())[0]


def has_nan(result):
    return any(torch.as_tensor(leaf).isnan().any().item() for leaf in _leaves(result))

"""Inputs so large that the small ops use several threads (kWorth in csrc/cpu/tile.h): the bits stay the same."""

from __future__ import annotations

import pytest
import torch

import rlhf_fast as rf

SHAPE = (3, 50_000)  # rows of several units each


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def tokens():
    a, b, c = draw(3, *SHAPE)
    return a.requires_grad_(), a.detach() + 0.1 * b, c, b < 1


def ranked():
    return draw(2000, 9).requires_grad_(), (7 * draw(2000, 9)).long()


OPS = {  # name -> its inputs, the first of which receives the gradient
    "ppo_loss": tokens,
    "value_loss": tokens,
    "kl_penalty": lambda: tokens()[:2],
    "gae": lambda: tuple(x.detach().reshape(30, -1) for x in (*tokens()[:2], tokens()[3])),
    "masked_mean": lambda: (tokens()[0], tokens()[3], -1),
    "masked_whiten": lambda: (tokens()[0], tokens()[3]),
    "ranking_loss": ranked,
}


def results(name: str) -> list[torch.Tensor]:
    inputs = OPS[name]()
    output = getattr(rf, name)(*inputs)
    first, *rest = output if isinstance(output, tuple) else (output,)
    tensors = [first, *(t for part in rest for t in (part.values() if isinstance(part, dict) else [part]))]
    if first.requires_grad:
        tensors += torch.autograd.grad(first.sum(), inputs[0])
    return [t.detach() for t in tensors]


@pytest.mark.parametrize("name", OPS)
def test_the_bits_do_not_depend_on_the_number_of_threads(name):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(name)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for one, other in zip(alone, results(name), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)

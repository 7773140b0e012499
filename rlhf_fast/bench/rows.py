"""What is measured: for each op its shapes, dtypes and directions, and the least that any implementation must do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

import rlhf_fast as rf

from . import baselines
from .harness import OURS

FORWARD, BOTH = "forward", "forward+backward"
LOGITS_SHAPES = ((512, 50257), (2048, 32000), (1024, 151936))  # GPT-2, Llama 2, Qwen
SMALL_LOGITS_SHAPES = ((64, 50257),)
LOGITS_SHAPES_CUDA = ((8192, 50257), (8192, 128256), (8192, 151936))
HEAD = dict(rows=2048, vocab=50257, widths=(256, 896))
SMALL_HEAD = dict(rows=64, vocab=5003, widths=(64,))
HEAD_CUDA = dict(rows=8192, vocab=128256, widths=(896, 4096))
LOSS_SHAPE, GAE_SHAPE, PAIRS, RANKED = (64, 512), (64, 1024), 512, (128, 4)
TINY_SHAPE = (2, 8)  # where a call costs what Python and autograd cost
DTYPES = (torch.float32, torch.bfloat16)


class Row(NamedTuple):
    op: str
    shape: str
    dtype: torch.dtype
    direction: str
    build: Callable  # () -> {name: callable without arguments}, allocating its inputs; "floor" among them

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}-{str(self.dtype).removeprefix('torch.')}-{self.direction}"


def all_rows(device: torch.device, small: bool = False) -> Iterator[Row]:
    """All of them; small is for a look and for the test of the bench itself."""
    cuda = device.type == "cuda"
    for shape in SMALL_LOGITS_SHAPES if small else LOGITS_SHAPES_CUDA if cuda else LOGITS_SHAPES:
        for dtype in DTYPES:
            for op, direction in (
                ("token_logprobs", FORWARD),
                ("token_logprobs", BOTH),
                ("token_logprobs_and_entropy", FORWARD),
            ):
                yield Row(op, f"{shape[0]}x{shape[1]}", dtype, direction, _logits(op, shape, dtype, direction, device))
    shape = SMALL_LOGITS_SHAPES[0] if small else LOGITS_SHAPES[0]
    for dtype in DTYPES:
        yield Row("kl_divergence", f"{shape[0]}x{shape[1]}", dtype, BOTH, _kl_divergence(shape, dtype, device))
    head = SMALL_HEAD if small else HEAD_CUDA if cuda else HEAD
    for width in head["widths"]:
        for dtype in (torch.bfloat16,) if cuda else DTYPES:
            for op in ("linear_cross_entropy", "linear_ppo_loss", "linear_token_logprobs"):
                shape = f"{head['rows']}x{width}x{head['vocab']}"
                yield Row(op, shape, dtype, BOTH, _head(op, head["rows"], width, head["vocab"], dtype, device))
    for op, shape in (
        ("ppo_loss", LOSS_SHAPE), ("value_loss", LOSS_SHAPE), ("kl_penalty", LOSS_SHAPE), ("masked_mean", LOSS_SHAPE),
        ("masked_whiten", LOSS_SHAPE), ("pairwise_loss", (PAIRS,)), ("dpo_loss", (PAIRS,)), ("ranking_loss", RANKED),
        ("gae", GAE_SHAPE),
    ):  # fmt: skip
        direction = FORWARD if op in ("gae", "masked_whiten") else BOTH  # advantages carry no gradient
        yield Row(op, "x".join(map(str, shape)), torch.float32, direction, _small(op, shape, direction, device))
    for op in ("ppo_loss", "pairwise_loss"):
        shape = TINY_SHAPE if op == "ppo_loss" else TINY_SHAPE[1:]
        for direction in (FORWARD, BOTH):
            build = _small(op, shape, direction, device, bare=True)
            yield Row(op, "x".join(map(str, shape)), torch.float32, direction, build)


def bind(functions: dict[str, Callable], inputs: tuple, wrt: tuple, direction: str) -> dict[str, Callable]:
    """Callables without arguments: the forward alone without a graph, or with the gradients of a plain sum."""

    def forward(function):
        with torch.no_grad():
            return function(*inputs)

    def both(function):
        outputs = function(*inputs)
        if isinstance(outputs, tuple):
            outputs = tuple(o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad)
        else:
            outputs = (outputs,)
        torch.autograd.grad(outputs, wrt, tuple(torch.ones_like(o) for o in outputs))

    run = forward if direction == FORWARD else both
    return {name: lambda function=function: run(function) for name, function in functions.items()}


def moved_bytes(read: int, written: int, device: torch.device) -> Callable:
    """The time to read and write so many bytes, and nothing else: the floor of what is bound by memory.

    On a CPU a maximum over a buffer, then a copy onto warm pages; on a GPU a copy that moves the same total.
    """
    if device.type == "cuda":
        source = torch.ones((read + written) // 8, device=device)
        target = torch.ones_like(source)
        return lambda: target.copy_(source)
    source = torch.ones(read // 4)
    if not written:
        return source.amax
    alone, target = source[: (read - written) // 4], torch.ones(written // 4)
    return lambda: (alone.amax(), target.copy_(source[: written // 4]))


def _logits(op: str, shape: tuple[int, int], dtype: torch.dtype, direction: str, device: torch.device) -> Callable:
    def build():
        generator = torch.Generator().manual_seed(0)
        logits = (4 * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()
        labels = torch.randint(shape[1], shape[:1], generator=generator).to(device)
        functions = {OURS: getattr(rf, op), **getattr(baselines, op)(device)}
        if op == "token_logprobs_and_entropy":
            functions["without entropy"] = rf.token_logprobs
        if direction == FORWARD:
            floor = moved_bytes(logits.nbytes, 0, device)
        else:  # two reads, one gradient
            floor = moved_bytes(2 * logits.nbytes, logits.nbytes, device)
        bound = bind(functions, (logits, labels), (logits,), direction) | {"floor": floor}
        if direction == BOTH:
            lost = logits.detach().clone().requires_grad_()
            in_place = lambda x, y: getattr(rf, op)(x, y, inplace_backward=True)  # noqa: E731
            bound |= bind({f"{OURS} in place": in_place}, (lost, labels), (lost,), direction)
        return bound

    return build


def _kl_divergence(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable:
    def build():
        generator = torch.Generator().manual_seed(0)
        logits, ref_logits = (4 * torch.randn(2, *shape, generator=generator)).to(device, dtype)
        inputs = logits.requires_grad_(), ref_logits
        functions = {OURS: rf.kl_divergence, **baselines.kl_divergence(device)}
        floor = moved_bytes(4 * logits.nbytes, logits.nbytes, device)  # both twice, one gradient
        return bind(functions, inputs, inputs[:1], BOTH) | {"floor": floor}

    return build


def _head(op: str, n: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Callable:
    def build():
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, width, generator=generator).to(device, dtype).requires_grad_()
        weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype).requires_grad_()
        inputs = [hidden, weight, torch.randint(vocab, (n,), generator=generator).to(device)]
        if op == "linear_ppo_loss":
            hidden, sequences = inputs[0], max(n // 512, 1)
            old, advantages = torch.randn(2, sequences, n // sequences, generator=generator).to(device)
            mask = torch.ones(sequences, n // sequences, dtype=torch.bool, device=device)
            inputs = [hidden.detach().view(sequences, -1, width).requires_grad_(), weight, inputs[2].view_as(mask)]
            inputs += [old - vocab**0.2, advantages, mask]
        functions = {OURS: getattr(rf, op), **getattr(baselines, op)(device)}
        return bind(functions, tuple(inputs), tuple(inputs[:2]), BOTH) | {
            "floor": _three_products(n, width, vocab, dtype, device)
        }

    return build


def _three_products(n: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Callable:
    """hidden W^T, dz W and dz^T hidden, by PyTorch's own product: bfloat16 ones where the CPU multiplies it natively.

    Not the least possible where PyTorch's product leaves a CPU half idle; linear.cpp's float32 ones take half of it.
    """
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        dtype = torch.float32  # the faster one for bfloat16 too
    hidden, weight = (torch.randn(size, width, device=device, dtype=dtype) for size in (n, vocab))
    z, dh, dw = (torch.empty(a, b, device=device, dtype=dtype) for a, b in ((n, vocab), (n, width), (vocab, width)))

    def products():
        torch.mm(hidden, weight.T, out=z)
        torch.mm(z, weight, out=dh)
        torch.mm(z.T, hidden, out=dw)

    return products


def _small(op: str, shape: tuple[int, ...], direction: str, device: torch.device, bare: bool = False) -> Callable:
    def build():
        generator = torch.Generator().manual_seed(0)
        a, b, c = torch.randn(3, *shape, generator=generator).to(device)
        mask = (torch.rand(shape, generator=generator) < 0.8).to(device)
        inputs = {
            "ppo_loss": (a, a + 0.1 * b, c, mask),
            "value_loss": (a, a + 0.1 * b, c, mask),
            "kl_penalty": (a, a + 0.1 * b),
            "masked_mean": (a, mask),
            "masked_whiten": (a, mask),
            "pairwise_loss": (a, b),
            "dpo_loss": (a, b, a + 0.1 * c, b - 0.1 * c),
            "ranking_loss": (a, b.argsort(-1)),
            "gae": (a, b, mask),
        }[op]
        wrt = ()
        if direction == BOTH:
            inputs = (inputs[0].clone().requires_grad_(), *inputs[1:])
            wrt = inputs[:1]
        functions = {OURS: getattr(rf, op), **_small_baselines(op)(device)}
        if op == "pairwise_loss":  # with the soft labels of a judge
            options = {"target_prob": c.sigmoid()}
            functions = {name: partial(function, **options) for name, function in functions.items()}
        if op in baselines.LOSS_ALONE:
            functions["loss alone (eager)"] = baselines.LOSS_ALONE[op]
        if bare:
            functions["bare autograd.Function"] = baselines.bare_function
        buffers = [torch.empty_like(x) for x in inputs]

        def touch():  # every input once, by the fewest PyTorch calls
            for x, buffer in zip(inputs, buffers, strict=True):
                buffer.copy_(x.detach())

        return bind(functions, inputs, wrt, direction) | {"floor": touch}

    return build


def _small_baselines(op: str) -> Callable:
    return getattr(baselines, op, None) or baselines.plain_and_compiled(op)

"""What is measured: for each op its shapes, dtypes and directions, and the least that any implementation must do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch

import rlhf_fast as rf

from ..ops._known_gradient import PpoTokens, known_gradient
from . import baselines
from .harness import OURS

FORWARD, BOTH = "forward", "forward+backward"
FROZEN = "forward+backward, frozen head"  # only the hidden states get a gradient, as with LoRA
# The call alone, of inputs that require a gradient: ours has computed it by then, PyTorch has recorded how to.
WITH_GRADIENT = "forward with gradient"
LOGITS_SHAPES = ((512, 50257), (2048, 32000), (1024, 151936))  # GPT-2, Llama 2, Qwen
SMALL_LOGITS_SHAPES = ((64, 50257),)
# On a GPU: GPT-2 (rows on every boundary) and Qwen, random and peaked as a trained model's; float32 for the first only,
# because each implementation's compilation counts against ten minutes.
LOGITS_SHAPES_CUDA = ((8192, 50257), (8192, 151936))
PEAKED = (8192, 151936)
FEW_ROWS = (64, 151936)  # a block a row: fewer rows than the device has multiprocessors
HEAD = dict(rows=2048, vocab=50257, widths=(256, 896))
SMALL_HEAD = dict(rows=64, vocab=5003, widths=(64,))
HEADS_CUDA = ((8192, 4096, 128256), (8192, 896, 151936))  # Llama 3 8B; Qwen 0.5B
LOSS_SHAPE, GAE_SHAPE, PAIRS, RANKED = (64, 512), (64, 1024), 512, (128, 4)
LOSS_SHAPE_CUDA, PAIRS_CUDA = (64, 1024), 65536
DRAWS = 16  # sets of numbers that the calls of a small op take in turn, on a CPU
TINY_SHAPE, TINY_LOGITS = (2, 8), (16, 16)  # where a call costs what Python and autograd cost
DTYPES = (torch.float32, torch.bfloat16)


class Row(NamedTuple):
    op: str
    shape: str
    dtype: torch.dtype
    direction: str
    build: Callable  # () -> {name: callable without arguments}, allocating its inputs; "floor" among them
    bytes: int = 0  # the least that must move
    flops: int = 0  # of the matrix products that the gradient needs

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype_name}-{self.direction}"


def all_rows(device: torch.device, small: bool = False, gpu: bool | None = None) -> Iterator[Row]:
    """All of them, a GPU's or a CPU's; small is for a look and for the test of the bench itself."""
    cuda = device.type == "cuda" if gpu is None else gpu
    for shape in SMALL_LOGITS_SHAPES if small else LOGITS_SHAPES_CUDA if cuda else LOGITS_SHAPES:
        for dtype in DTYPES[1:] if cuda and shape != LOGITS_SHAPES_CUDA[0] else DTYPES:
            yield from _rows_of_logits(shape, dtype, device, False, cuda)
    if cuda:
        yield from _rows_of_logits(SMALL_LOGITS_SHAPES[0] if small else PEAKED, torch.bfloat16, device, True, cuda)
        yield from _rows_in_place(device, small)
        if not small:
            size, build = (
                2 * math.prod(FEW_ROWS),
                _logits("token_logprobs", FEW_ROWS, DTYPES[1], FORWARD, device, False),
            )
            yield Row("token_logprobs", "x".join(map(str, FEW_ROWS)), DTYPES[1], FORWARD, build, size)
    shape = SMALL_LOGITS_SHAPES[0] if small else LOGITS_SHAPES[0]
    pairs_of_logits = [(shape, dtype) for dtype in DTYPES]
    if cuda and not small:
        pairs_of_logits.append((LOGITS_SHAPES_CUDA[1], torch.bfloat16))
    for shape, dtype in pairs_of_logits:
        size = shape[0] * shape[1] * dtype.itemsize
        build = _kl_divergence(shape, dtype, device)
        yield Row("kl_divergence", f"{shape[0]}x{shape[1]}", dtype, BOTH, build, 5 * size)
    yield from _rows_of_heads(device, small, cuda)
    pairs, loss_shape = ((PAIRS_CUDA,), LOSS_SHAPE_CUDA) if cuda and not small else ((PAIRS,), LOSS_SHAPE)
    for op, shape, estimator in (
        ("ppo_loss", loss_shape, ""), ("value_loss", loss_shape, ""), ("kl_penalty", loss_shape, "k1"),
        ("kl_penalty", loss_shape, "k3"), ("masked_mean", loss_shape, ""), ("masked_whiten", loss_shape, ""),
        ("pairwise_loss", pairs, ""), ("dpo_loss", pairs, ""), ("ranking_loss", RANKED, ""), ("gae", GAE_SHAPE, ""),
    ):  # fmt: skip
        directions = (FORWARD,) if op in ("gae", "masked_whiten") else (BOTH,)  # advantages carry no gradient
        if cuda and op in ("ppo_loss", "value_loss", "kl_penalty", "pairwise_loss", "dpo_loss", "ranking_loss"):
            directions = (WITH_GRADIENT, BOTH)
        for direction in directions:
            name = f"{'x'.join(map(str, shape))} {estimator}".rstrip()
            yield Row(op, name, torch.float32, direction, _small(op, shape, direction, device, estimator=estimator))
    for op, shape in (("ppo_loss", TINY_SHAPE), ("pairwise_loss", TINY_SHAPE[1:]), ("token_logprobs", TINY_LOGITS)):
        for direction in (FORWARD, BOTH):
            if op == "token_logprobs":
                build = _logits(op, shape, torch.float32, direction, device, peaked=False, bare=True)
            else:
                build = _small(op, shape, direction, device, bare=True)
            yield Row(op, "x".join(map(str, shape)), torch.float32, direction, build)


def _rows_of_logits(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, peaked: bool, cuda: bool
) -> Iterator[Row]:
    size, name = shape[0] * shape[1] * dtype.itemsize, f"{shape[0]}x{shape[1]}{' peaked' if peaked else ''}"
    for op, direction in (
        ("token_logprobs", FORWARD),
        ("token_logprobs", BOTH),
        ("token_logprobs_and_entropy", FORWARD),
        *([("token_logprobs_and_entropy", BOTH)] if cuda else []),
    ):
        build = _logits(op, shape, dtype, direction, device, peaked)
        yield Row(op, name, dtype, direction, build, size if direction == FORWARD else 3 * size)


def _rows_of_heads(device: torch.device, small: bool, cuda: bool) -> Iterator[Row]:
    head = SMALL_HEAD if small else HEAD
    shapes = HEADS_CUDA if cuda and not small else [(head["rows"], w, head["vocab"]) for w in head["widths"]]
    for n, width, vocab in shapes:
        for dtype in (torch.bfloat16,) if cuda else DTYPES:
            product = 2 * n * width * vocab
            for op in ("linear_cross_entropy", "linear_ppo_loss", "linear_token_logprobs"):
                build = _head(op, n, width, vocab, dtype, device)
                yield Row(op, f"{n}x{width}x{vocab}", dtype, BOTH, build, flops=3 * product)
            for direction, flops in ((FROZEN, 2 * product), *([(FORWARD, product)] if cuda else [])):
                build = _head("linear_token_logprobs", n, width, vocab, dtype, device, direction)
                yield Row("linear_token_logprobs", f"{n}x{width}x{vocab}", dtype, direction, build, flops=flops)


def _rows_in_place(device: torch.device, small: bool) -> Iterator[Row]:
    """Logits that become PPO's gradient in place: what the linear ops run on each chunk."""
    for shape in SMALL_LOGITS_SHAPES if small else LOGITS_SHAPES_CUDA:
        size = shape[0] * shape[1] * 2
        build = _ppo_from_logits(shape, torch.bfloat16, device)
        yield Row("ppo_from_logits", f"{shape[0]}x{shape[1]}", torch.bfloat16, BOTH, build, 2 * size)


def bind(functions: dict[str, Callable], inputs: tuple, wrt: tuple, direction: str) -> dict[str, Callable]:
    """Callables without arguments: the forward alone, without a graph or with one, or the gradients of a plain sum."""

    def forward(function):
        with torch.no_grad():
            return function(*inputs)

    def with_gradient(function):
        return function(*inputs)

    def both(function):
        outputs = function(*inputs)
        if isinstance(outputs, tuple):
            outputs = tuple(o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad)
        else:
            outputs = (outputs,)
        torch.autograd.grad(outputs, wrt, tuple(torch.ones_like(o) for o in outputs))

    run = {FORWARD: forward, WITH_GRADIENT: with_gradient, BOTH: both, FROZEN: both}[direction]
    return {
        name: function if isinstance(function, baselines.Absent) else lambda function=function: run(function)
        for name, function in functions.items()
    }


def restored(functions: dict[str, Callable], lost: torch.Tensor, logits: torch.Tensor) -> dict[str, Callable]:
    """The same, with lost = logits before each timed call (device.Events): their gradient's numbers, nearly all of them
    tiny, would cost a GPU less power than logits do."""

    def before():
        with torch.no_grad():
            lost.copy_(logits)

    for function in functions.values():
        function.before = before
    return functions


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
    alone, target = source[: max((read - written) // 4, 1)], torch.ones(written // 4)
    return lambda: (alone.amax(), target.copy_(source[: written // 4]))


def draw_logits(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, peaked: bool, seed: int = 0) -> tuple:
    """Logits and labels. Peaked as a trained model's: eight tokens hold nearly all probability, the label first."""
    on = device if device.type == "cuda" else torch.device("cpu")  # 1.2 billion draws take a CPU minutes
    generator = torch.Generator(on).manual_seed(seed)
    logits = torch.empty(shape, dtype=dtype, device=device)
    for part in logits.split(1024):
        part.copy_((2 if peaked else 4) * torch.randn(part.shape, generator=generator, device=on))
    labels = torch.randint(shape[1], shape[:1], generator=generator, device=on)
    if peaked:
        few = torch.randint(shape[1], (shape[0], 8), generator=generator, device=on)
        few[:, 0] = labels
        heights = torch.tensor([18.0, 16.0, 14.0, 13.0, 12.0, 11.0, 10.0, 9.0], device=on).to(dtype)
        logits.scatter_(1, few.to(device), heights.to(device).expand(few.shape))
    return logits, labels.to(device)


def _logits(
    op: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    direction: str,
    device: torch.device,
    peaked: bool,
    bare: bool = False,
) -> Callable:
    def build():
        logits, labels = draw_logits(shape, dtype, device, peaked)
        logits.requires_grad_(direction == BOTH)
        functions = {OURS: getattr(rf, op), **getattr(baselines, op)(device)}
        if bare:
            functions |= baselines.bare_functions(op)
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
            overwriting = {f"{OURS} in place": in_place}
            if op == "token_logprobs":
                overwriting |= baselines.token_logprobs_in_place(device)
            bound |= restored(bind(overwriting, (lost, labels), (lost,), direction), lost, logits)
        return bound

    return build


def _ppo_from_logits(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable:
    """In place, on logits that are restored before each timed call."""

    def build():
        logits, labels = draw_logits(shape, dtype, device, peaked=False)
        old = rf.token_logprobs(logits, labels)[None]
        advantages, mask = torch.randn_like(old), torch.ones_like(old, dtype=torch.bool)
        options = (0.8, 1.2, math.inf, math.inf, 0.0, 0, 0.01)
        tokens = PpoTokens(old[0], advantages[0], None, None, options)
        weights = torch.full_like(old[0], 1 / len(labels))
        apart = logits.clone().requires_grad_()

        def ours():  # as linear_ppo_loss turns a chunk, and then asks for the loss and its statistics
            logprobs, entropy = known_gradient(logits, labels, None, 1.0, weights, tokens)
            return rf.ppo_loss(logprobs[None], old, advantages, mask, entropy=entropy[None], entropy_coef=0.01)

        def in_two_kernels():
            logprobs, entropy = rf.token_logprobs_and_entropy(apart, labels, inplace_backward=True)
            loss, _ = rf.ppo_loss(logprobs[None], old, advantages, mask, entropy=entropy[None], entropy_coef=0.01)
            torch.autograd.grad(loss, apart)

        eager_logits = logits.clone().requires_grad_()

        def eager():
            logprobs, entropy = baselines.log_softmax_gather_and_entropy(eager_logits, labels)
            loss, _ = rf.ops.reference.ppo_loss(
                logprobs[None], old, advantages, mask, entropy=entropy[None], entropy_coef=0.01
            )
            torch.autograd.grad(loss, eager_logits)

        peers = {}
        for name, function in baselines.ppo_from_logits(device).items():
            if isinstance(function, baselines.Absent):
                peers[name] = function
                continue
            longer = torch.cat([logits, logits[:1]])[None].requires_grad_()  # they drop the last position themselves
            inputs = longer, labels[None], old, advantages, mask
            peers |= restored(bind({name: function}, inputs, (longer,), BOTH), longer[0, :-1], eager_logits)
        return peers | {
            **restored({OURS: ours}, logits, eager_logits),
            **restored({"rlhf_fast in two kernels": in_two_kernels}, apart, eager_logits),
            "eager": eager,
            "floor": moved_bytes(logits.nbytes, logits.nbytes, device),
        }

    return build


def _kl_divergence(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Callable:
    def build():
        logits, ref_logits = (draw_logits(shape, dtype, device, peaked=False, seed=seed)[0] for seed in range(2))
        inputs = logits.requires_grad_(), ref_logits
        functions = {OURS: rf.kl_divergence, **baselines.kl_divergence(device)}
        floor = moved_bytes(4 * logits.nbytes, logits.nbytes, device)  # both twice, one gradient
        return bind(functions, inputs, inputs[:1], BOTH) | {"floor": floor}

    return build


def _head(
    op: str, n: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device, direction: str = BOTH
) -> Callable:
    def build():
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, width, generator=generator).to(device, dtype).requires_grad_()
        weight = (torch.randn(vocab, width, generator=generator) / width**0.5).to(device, dtype)
        weight.requires_grad_(direction != FROZEN)
        inputs = [hidden, weight, torch.randint(vocab, (n,), generator=generator).to(device)]
        if op == "linear_ppo_loss":
            hidden, sequences = inputs[0], max(n // 512, 1)
            old, advantages = torch.randn(2, sequences, n // sequences, generator=generator).to(device)
            mask = torch.ones(sequences, n // sequences, dtype=torch.bool, device=device)
            inputs = [hidden.detach().view(sequences, -1, width).requires_grad_(), weight, inputs[2].view_as(mask)]
            inputs += [old - vocab**0.2, advantages, mask]
        functions = {OURS: getattr(rf, op), **getattr(baselines, op)(device)}
        if direction == FORWARD:
            functions = {name: partial(f, with_entropy=True) if name == OURS else f for name, f in functions.items()}
        floor = _products(n, width, vocab, dtype, device, count={FORWARD: 1, FROZEN: 2, BOTH: 3}[direction])
        wrt = tuple(x for x in inputs[:2] if x.requires_grad)
        return bind(functions, tuple(inputs), wrt, direction) | {"floor": floor}

    return build


def _products(n: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device, count: int) -> Callable:
    """The first `count` of hidden W^T, dz W and dz^T hidden, by PyTorch's own product: bfloat16 ones where the CPU
    multiplies it natively.

    Not the least possible where PyTorch's product leaves a CPU half idle; linear.cpp's float32 ones take half of it.
    """
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        dtype = torch.float32  # the faster one for bfloat16 too
    hidden, weight = (torch.randn(size, width, device=device, dtype=dtype) for size in (n, vocab))
    z, dh, dw = (torch.empty(a, b, device=device, dtype=dtype) for a, b in ((n, vocab), (n, width), (vocab, width)))

    def products():
        torch.mm(hidden, weight.T, out=z)
        if count > 1:
            torch.mm(z, weight, out=dh)
        if count > 2:
            torch.mm(z.T, hidden, out=dw)

    return products


def _small(
    op: str, shape: tuple[int, ...], direction: str, device: torch.device, bare: bool = False, estimator: str = ""
) -> Callable:
    def build():
        functions = {OURS: getattr(rf, op), **_small_baselines(op)(device)}
        draws = range(1 if device.type == "cuda" else DRAWS)
        bound = [_bound_to_draw(op, shape, direction, device, bare, estimator, functions, seed) for seed in draws]
        return {name: _in_turn([of_draw[name] for of_draw in bound]) for name in bound[0]}

    return build


def _bound_to_draw(
    op: str,
    shape: tuple[int, ...],
    direction: str,
    device: torch.device,
    bare: bool,
    estimator: str,
    functions: dict[str, Callable],
    seed: int,
) -> dict[str, Callable]:
    generator = torch.Generator().manual_seed(seed)
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
    if direction != FORWARD:
        inputs = (inputs[0].clone().requires_grad_(), *inputs[1:])
        wrt = inputs[:1]
    options = {"estimator": estimator} if estimator else {}
    if op == "pairwise_loss":
        options["target_prob"] = c.sigmoid()  # the soft labels of a judge
    if options:
        functions = {name: partial(function, **options) for name, function in functions.items()}
    if op in baselines.LOSS_ALONE:
        alone = baselines.LOSS_ALONE[op]
        functions = functions | {"loss alone (eager)": alone, "loss alone (compile)": baselines.compiled(alone)}
    if bare:
        functions = functions | baselines.bare_functions(op)
        functions["statistics read"] = partial(_with_statistics, functions[OURS])
    buffers = [torch.empty_like(x) for x in inputs]

    def touch():  # every input once, by the fewest PyTorch calls
        for x, buffer in zip(inputs, buffers, strict=True):
            buffer.copy_(x.detach())

    return bind(functions, inputs, wrt, direction) | {"floor": touch}


def _in_turn(calls: list[Callable]) -> Callable:
    """One of them at each call. The same tokens again and again teach a CPU's branch predictor which of them are
    masked or clipped; a training loop never shows it the same ones twice."""
    following = cycle(calls)
    return calls[0] if isinstance(calls[0], baselines.Absent) else lambda: next(following)()


def _with_statistics(function: Callable, *inputs):
    """Ours cuts the statistics out of one vector when somebody looks at them: here at all of them, in every call."""
    loss, stats = function(*inputs)
    return loss, tuple(stats.values())


def _small_baselines(op: str) -> Callable:
    return getattr(baselines, op, None) or baselines.plain_and_compiled(op)

"""Data parallelism: several processes train one model, each on a device of its own.

    torchrun --nproc-per-node 2 -m rlhf_fast sft --config run.yaml

Every process reads all the data, holds the whole model, and decides by itself what a step consists of. The decisions
agree, because they follow from the config, the seed and values that all processes have. What is shared out is the work:
micro-batches, prompts to answer, answers to judge. Results are then gathered and gradients summed; as a loss is divided
by what counts in the whole step, the sum is the gradient that one process would have computed.

The optimizer is shared out too, by whole parameters (stage 1 of ZeRO, Rajbhandari et al. 2020): a process steps its own
ones, which it alone keeps AdamW's state of, and sends the new weights to all. So the models stay equal to the last bit.
In float32, N processes need 8 + 8/N bytes a parameter each, where one needs 16.

Only the first process writes files (trainers/run.py). Without torchrun all of this is one process, and the
functions below return what they are given.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ConfigError

BUCKET = 25 * 2**20  # bytes of gradients that are summed at once, as in torch's DistributedDataParallel
WAIT = timedelta(hours=2)  # for the slowest process: a judge behind HTTP may take its time
_joined = False  # whether this process shares its work with others; a group of the user's own says nothing of that


def start(config=None) -> None:
    """Joins the processes that torchrun has started, and takes this one's GPU as the current device.

    config: the trainer's; None if it is not known yet. ConfigError if accelerate's configuration asks for FSDP or a
    precision that the config does not ask for, and that would be ignored.
    """
    global _joined
    fsdp, bf16 = (None if config is None else getattr(config, name, False) for name in ("fsdp", "bf16"))
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # of accelerate launch
    if config is not None and precision != "no" and not (bf16 and precision == "bf16"):
        ours = "set bf16: true in the run's own config" if precision == "bf16" else "these trainers have only bf16"
        raise ConfigError(
            f"accelerate's configuration asks for mixed precision in {precision}: {ours}, or start with accelerate "
            "launch --mixed_precision no"
        )
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if fsdp and not several:
        raise ConfigError("fsdp shards a model over several processes, and this is one: start it with torchrun")
    if several and fsdp is False and os.environ.get("ACCELERATE_USE_FSDP") == "true":  # of accelerate launch
        raise ConfigError("accelerate's configuration asks for FSDP: set fsdp: true in the run's own config")
    if _joined or not several:
        return
    for engine in ("DEEPSPEED", "MEGATRON_LM"):  # unheeded, each process would hold the whole model
        if os.environ.get(f"ACCELERATE_USE_{engine}") == "true":
            raise ConfigError(
                f"accelerate's configuration asks for {engine}, which these trainers do not use. Start them with "
                "torchrun, or with accelerate's plain multi-GPU; where weights and gradients do not fit, set fsdp: true"
            )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        gpu = int(os.environ.get("LOCAL_RANK") or 0)
        if gpu >= torch.cuda.device_count():
            raise ConfigError(f"process {gpu} of this machine has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(gpu)
    backends = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backends, timeout=WAIT)
        atexit.register(_leave)
    elif "cpu:" not in (theirs := dist.get_backend_config()):
        raise ConfigError(f"the process group ({theirs}) joins no CPUs: make it with {backends!r}, or not at all")
    _joined = True


def _leave() -> None:
    """Gloo's threads abort a process that ends before them."""
    if dist.is_initialized():
        time.sleep(0.1)  # torch 2.6 ends them with the GIL held, which one that still frees a tensor waits for
        dist.destroy_process_group()


def size() -> int:
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """0 in the first process, which is the one that writes and talks."""
    return dist.get_rank() if _joined else 0


def share(items: Sequence, loads: Sequence[int] | None = None) -> list:
    """What of the items is this process's to work on, in their order; never more than an equal part, rounded up.

    loads: how much work each is (tokens), by default the same. The largest go first, each to the process that has the
    least to do, so that all are done at about the same time.
    """
    return [items[i] for i in _shares(loads or [1] * len(items))[rank()]]


def _shares(loads: Sequence[int]) -> list[list[int]]:
    """Of every process the places of what is its."""
    shares, work = [[] for _ in range(size())], [0] * size()
    for i in sorted(range(len(loads)), key=lambda i: -loads[i]):
        process = min((r for r in range(size()) if len(shares[r]) * size() < len(loads)), key=work.__getitem__)
        shares[process].append(i)
        work[process] += loads[i]
    return [sorted(places) for places in shares]


def block(count: int, multiple: int) -> slice:
    """This process's part of count things side by side, no group of `multiple` cut in two."""
    groups = -(-count // multiple)
    start, stop = (min(count, multiple * (groups * r // size())) for r in (rank(), rank() + 1))
    return slice(start, stop)


@contextmanager
def ending_all():
    """What fails inside in one process ends it, and so torchrun the others: they may wait for it in a layer, where
    nothing can be told to them. For what gathers sharded layers (sharding.py)."""
    with in_all():  # here they meet one that has failed before
        pass
    try:
        yield
    except Exception as error:
        traceback.print_exception(error, file=sys.stderr)
        raise SystemExit(1) from error


@contextmanager
def in_all(stop: list | None = None):
    """What fails inside in one process raises in every one, where otherwise they would wait for it.

    One may stand within another: what the inner one has told to all passes the outer one. And a process that fails
    outside the inner one meets the others there, as this is the first thing that they wait for.

    stop: why this process is to stop. Where one has a reason at the end, afterwards each has one.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if size() == 1 or getattr(error, "_in_all", False):
            raise
        failure = error
    if size() == 1:
        return
    told = torch.tensor([failure is not None, bool(stop)], dtype=torch.uint8)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    failed, stopping = told.tolist()
    if stopping and stop == []:
        stop.append("a signal to another process")
    if not failed:
        return
    said = [None] * size()
    dist.all_gather_object(said, failure and (isinstance(failure, ConfigError), f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        if rank():  # the first one's reaches the user
            traceback.print_exception(failure, file=sys.stderr)
    else:
        process, (is_config, message) = next((i, what) for i, what in enumerate(said) if what)
        failure = (ConfigError if is_config else RuntimeError)(f"process {process} of {size()} failed: {message}")
    failure._in_all = True
    raise failure


def gather(value) -> list:
    """The value of every process, in the order of the processes; tensors on the CPU."""
    if size() == 1:
        return [value]
    everyone = [None] * size()
    dist.all_gather_object(everyone, value)
    return everyone


def spread(work: Callable[[Sequence], Sequence], items: Sequence) -> list:
    """work(share of the items) gives a result an item -> those of all items, in their order."""
    with in_all():
        mine = list(work(share(items))) if share(items) else []
    whole = [None] * len(items)
    for process, results in enumerate(gather(mine)):
        whole[process :: size()] = results
    return whole


def first(value):
    """The value that the first process has."""
    if size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def by_first(work: Callable):
    """work() is done by the first process, for all; there it may call what is shared out elsewhere."""
    if size() == 1:
        return work()
    with in_all():
        done = None
        if rank() == 0:
            with _alone():
                done = pickle.dumps(work())  # here, since what cannot be sent fails too
    return pickle.loads(first(done))


@contextmanager
def _alone():
    """Inside, this process (each thread of it) shares nothing out and waits for nobody, as if it were the only one."""
    global _joined
    _joined = False
    try:
        yield
    finally:
        _joined = True


def total(x: Tensor) -> Tensor:
    """x, which becomes the sum over the processes."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def largest(x: Tensor) -> Tensor:
    """x, which becomes the maximum over the processes."""
    if size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every gradient becomes the sum over the processes; one that no process has stays None."""
    if size() == 1:
        return
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    learned = [p for p, somewhere in zip(parameters, there.tolist(), strict=True) if somewhere]
    with in_all():  # there may be no room
        flat = [_flat_gradients(bucket) for bucket in _buckets(learned)]
    for work in [dist.all_reduce(x, async_op=True) for x in flat]:
        work.wait()


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in order, in groups of at most BUCKET bytes, of one dtype, on one device; a larger one alone."""
    buckets, held, of = [], 0, None
    for p in parameters:
        if not buckets or held + p.nbytes > BUCKET or of != (p.dtype, p.device):
            buckets.append([])
            held, of = 0, (p.dtype, p.device)
        buckets[-1].append(p)
        held += p.nbytes
    return buckets


def _flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Their gradients end to end, each row by row; from now on these are views of it. 0 where there is none."""
    rows = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    flat = torch.cat(rows) if len(rows) > 1 else rows[0]
    for p, row in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = row.view(p.shape)
    return flat


def own(parameters: Sequence[nn.Parameter]) -> list[int]:
    """The places of those that this process steps."""
    return share(range(len(parameters)), [p.numel() for p in parameters])


def leave_to_others(parameters: Sequence[nn.Parameter]) -> None:
    """Only this process's own keep their gradient; AdamW passes over the rest, and makes no state for them."""
    for i in set(range(len(parameters))).difference(own(parameters)):
        parameters[i].grad = None


@torch.no_grad()
def send_weights(parameters: Sequence[nn.Parameter]) -> None:
    """Each parameter becomes what it is in the process that steps it."""
    if size() == 1:
        return
    for process, places in enumerate(_shares([p.numel() for p in parameters])):
        for bucket in _buckets(parameters[i] for i in places):
            rows = [p.flatten() for p in bucket]
            flat = torch.cat(rows) if len(rows) > 1 else rows[0]
            dist.broadcast(flat, src=process)
            for p, row in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.copy_(row.view(p.shape))


def to_first(states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """What each process has of {place: {name: tensor}} -> in the first one all of it, the others' part on the CPU;
    elsewhere its own part. Tensor by tensor, so that the others need no room for what is not theirs."""
    if size() == 1:
        return states
    mine = {(place, name): t for place, state in states.items() for name, t in state.items()}
    theirs = gather({key: t.to("meta") for key, t in mine.items()} if rank() else {})
    with in_all():  # there may be no room
        if rank():
            mine = {key: t.cpu() for key, t in mine.items()}
        else:
            mine |= {key: torch.empty_like(t, device="cpu") for held in theirs for key, t in held.items()}
    for process, held in enumerate(theirs):
        for key in held:
            if rank() == process:
                dist.send(mine[key], dst=0)
            elif rank() == 0:
                dist.recv(mine[key], src=process)
    whole = {}
    for (place, name), t in sorted(mine.items(), key=lambda item: item[0][0]):
        whole.setdefault(place, {})[name] = t
    return whole


def begin_equal(modules: Iterable[nn.Module], **read) -> None:
    """Gives every process the first one's weights and buffers. ConfigError where what they have read, by its name, or
    which weights there are and learn is not the same in all, or a model is on another GPU than the process's own."""
    if size() == 1:
        return
    for name, values in ((name, gather(value)) for name, value in read.items()):
        if any(value != values[0] for value in values):
            raise ConfigError(f"the {size()} processes read different {name}: each must be given all, and in one order")
    named = [x for m in modules for x in (*m.named_parameters(), *m.named_buffers())]
    models = gather([(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in named])
    if any(model != models[0] for model in models):
        raise ConfigError(f"the {size()} processes hold different models, or not the same weights of them learn")
    tensors = [t for _, t in named]
    with in_all():
        for device in {t.device for t in tensors if t.is_cuda}:
            if device.index != (own := torch.cuda.current_device()):
                raise ConfigError(f"a model is on {device}, and this process's GPU is cuda:{own}: give the path of it")
    for tensor in tensors:  # row by row from now on, as their gradients: fused AdamW pairs them as they lie in memory
        tensor.data = tensor.data.contiguous()
        dist.broadcast(tensor.data, src=0)

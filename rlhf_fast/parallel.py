"""Data parallelism: several processes train one model, each on its own device.

    torchrun --nproc-per-node 2 -m rlhf_fast sft --config run.yaml

Every process reads all the data, holds the whole model, and decides by itself what a step consists of. The decisions
agree, because they follow from the config, the seed and values that all processes have. Only the work is divided:
micro-batches, prompts to answer, answers to judge. Afterwards the results are gathered and the gradients summed. A loss
is divided by the totals of the whole step, so the sum is the gradient that a single process would have computed.

The optimizer is divided too, by whole parameters (stage 1 of ZeRO, Rajbhandari et al. 2020). Each process keeps AdamW's
state only for the parameters that it owns; it steps these and sends the new weights to all. So the models stay equal to
the last bit. In float32 each of N processes needs 8 + 8/N bytes per parameter, where a single process needs 16.

Only the first process writes files (trainers/run.py). Without torchrun there is a single process, and the functions
below return what they are given.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import ConfigError, NonFiniteError

BUCKET = 25 * 2**20  # bytes of gradients summed in one call, as in torch's DistributedDataParallel
WAIT = timedelta(hours=2)  # for the slowest process: a judge behind HTTP may take long
_joined = False  # whether this process shares work with others; not implied by a process group that the user has made


def start(config=None) -> None:
    """Joins the processes that torchrun has started, and makes this process's GPU the current device.

    config: the trainer's; None if it is not known yet.
    """
    global _joined
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if config is not None:
        _check_config(config, several)
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
            raise ConfigError(
                f"process {gpu} of this machine has no GPU, because there are only {torch.cuda.device_count()}: start "
                "one process per GPU at most"
            )
        torch.cuda.set_device(gpu)
    backends = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backends, timeout=WAIT)
        atexit.register(_leave)
    elif "cpu:" not in (theirs := dist.get_backend_config()):
        raise ConfigError(
            f"the existing process group ({theirs}) has no CPU backend: create it with {backends!r}, or let the "
            "trainer create it"
        )
    _joined = True


def _check_config(config, several: bool) -> None:
    """ConfigError if the config needs several processes and there is one, or if accelerate's configuration (of
    accelerate launch) asks for FSDP or a precision that the config does not ask for, and that would be ignored."""
    fsdp, bf16 = getattr(config, "fsdp", False), getattr(config, "bf16", False)
    precision = (os.environ.get("ACCELERATE_MIXED_PRECISION") or "no").lower()
    if precision != "no" and not (bf16 and precision == "bf16"):
        ours = "set bf16: true in the run's own config" if precision == "bf16" else "these trainers have only bf16"
        message = f"accelerate (ACCELERATE_MIXED_PRECISION) asks for mixed precision in {precision}: {ours}"
        if several:
            raise ConfigError(f"{message}, or start with accelerate launch --mixed_precision no")
        # TrainingArguments of transformers 4 set the variable too, in the process of a notebook or a script.
        warnings.warn(f"{message}; this run multiplies in {'bfloat16' if bf16 else 'float32'}", stacklevel=6)
    if fsdp and not several:
        raise ConfigError("fsdp shards a model over several processes, but there is only one: start it with torchrun")
    if several and not fsdp and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ConfigError("accelerate's configuration asks for FSDP: set fsdp: true in the run's own config")


def _leave() -> None:
    """Ends gloo's threads, which would abort a process that ends before them."""
    if dist.is_initialized():
        time.sleep(0.1)  # torch 2.6 joins them while it holds the GIL, and one may need it to free a tensor
        dist.destroy_process_group()


def size() -> int:
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """0 in the first process, the one that writes files and prints."""
    return dist.get_rank() if _joined else 0


def share(items: Sequence, loads: Sequence[int] | None = None) -> list:
    """This process's share of the items, in their order; never more than an equal part, rounded up.

    loads: the work per item (tokens), by default equal. The largest items are assigned first, each to the process with
    the least work so far, so that all processes finish at about the same time.
    """
    return [items[i] for i in _shares(loads or [1] * len(items))[rank()]]


def _shares(loads: Sequence[int]) -> list[list[int]]:
    """For every process, the indices of its items."""
    shares, work = [[] for _ in range(size())], [0] * size()
    for i in sorted(range(len(loads)), key=lambda i: -loads[i]):
        process = min((r for r in range(size()) if len(shares[r]) * size() < len(loads)), key=work.__getitem__)
        shares[process].append(i)
        work[process] += loads[i]
    return [sorted(indices) for indices in shares]


def block(count: int, multiple: int) -> slice:
    """This process's contiguous part of `count` items, without splitting a group of `multiple` items."""
    groups = -(-count // multiple)
    return slice(*(multiple * (groups * r // size()) for r in (rank(), rank() + 1)))  # a slice may pass the end


@contextmanager
def exit_all():
    """An exception inside ends this process, and torchrun then ends the others. For code that gathers sharded layers
    (sharding.py): the other processes may be waiting for this one in a layer, where an exception cannot reach them."""
    with raise_in_all():  # for an exception that a process has raised before it came here
        pass
    try:
        yield
    except Exception as error:
        traceback.print_exception(error, file=sys.stderr)
        raise SystemExit(1) from error


@contextmanager
def raise_in_all(stop: list | None = None):
    """An exception inside in one process is raised in every process; otherwise the others would wait for ever.

    These can be nested. An exception that the inner one has raised in all passes through the outer one unchanged. If a
    process fails before the inner one, the others learn of it there, because it holds their next collective call.

    stop: the reasons why this process has to stop. If any process has one at the end, every process has one afterwards.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if size() == 1 or getattr(error, "_raised_in_all", False):
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
        if rank() and not isinstance(failure, (ConfigError, NonFiniteError)):  # the first one's reaches the user anyway
            traceback.print_exception(failure, file=sys.stderr)
    else:
        process, (is_config, message) = next((i, what) for i, what in enumerate(said) if what)
        failure = (ConfigError if is_config else RuntimeError)(f"process {process} of {size()} failed: {message}")
    failure._raised_in_all = True
    raise failure


def all_gather(value) -> list:
    """[the value of each process], in the order of their ranks; tensors must be on the CPU."""
    if size() == 1:
        return [value]
    everyone = [None] * size()
    dist.all_gather_object(everyone, value)
    return everyone


def map_shares(work: Callable[[Sequence], Sequence], items: Sequence) -> list:
    """work(this process's share of the items), one result per item -> the results of all items, in their order."""
    with raise_in_all():
        mine = list(work(share(items))) if share(items) else []
    whole = [None] * len(items)
    for process, results in enumerate(all_gather(mine)):
        whole[process :: size()] = results
    return whole


def broadcast(value):
    """The value of the first process, in every process."""
    if size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def on_first(work: Callable):
    """Runs work() in the first process only -> its result, in every process. Inside, functions that would divide their
    work run in the first process alone."""
    if size() == 1:
        return work()
    with raise_in_all():
        done = None
        if rank() == 0:
            with _alone():
                done = pickle.dumps(work())  # inside raise_in_all, because a result may fail to pickle
    return pickle.loads(broadcast(done))


@contextmanager
def _alone():
    """Inside, this process (all its threads) neither shares work nor waits, as if there were no other process."""
    global _joined
    _joined = False
    try:
        yield
    finally:
        _joined = True


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sums x over the processes, in place -> x."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_max(x: Tensor) -> Tensor:
    """Takes the maximum of x over the processes, in place -> x."""
    if size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sums every gradient over the processes. One that is None in every process stays None."""
    if size() == 1:
        return
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    learned = [p for p, somewhere in zip(parameters, there.tolist(), strict=True) if somewhere]
    with raise_in_all():  # memory may run out
        flat = [_flat_gradients(bucket) for bucket in _buckets(learned)]
    for work in [dist.all_reduce(x, async_op=True) for x in flat]:
        work.wait()


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in order, in groups of at most BUCKET bytes with one dtype and one device. A larger parameter is a
    group of its own."""
    buckets, held, kind = [], 0, None
    for p in parameters:
        if not buckets or held + p.nbytes > BUCKET or kind != (p.dtype, p.device):
            buckets.append([])
            held, kind = 0, (p.dtype, p.device)
        buckets[-1].append(p)
        held += p.nbytes
    return buckets


def _flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Their gradients flattened into one tensor, 0 for a missing gradient. The gradients become views of it."""
    flat, parts = _flattened([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part
    return flat


def _flattened(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The tensors flattened into one, and views of it in their shapes."""
    rows = [x.flatten() for x in tensors]
    flat = torch.cat(rows) if len(rows) > 1 else rows[0]
    parts = flat.split([x.numel() for x in tensors])
    return flat, [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def owned(parameters: Sequence[nn.Parameter]) -> list[int]:
    """The indices of the parameters that this process steps."""
    return share(range(len(parameters)), [p.numel() for p in parameters])


def leave_to_others(parameters: Sequence[nn.Parameter]) -> None:
    """Removes the gradients of parameters that other processes own, so that AdamW skips these and makes no state for
    them."""
    for i in set(range(len(parameters))).difference(owned(parameters)):
        parameters[i].grad = None


@torch.no_grad()
def send_weights(parameters: Sequence[nn.Parameter]) -> None:
    """Copies each parameter from the process that steps it to all others."""
    if size() == 1:
        return
    for process, indices in enumerate(_shares([p.numel() for p in parameters])):
        for bucket in _buckets(parameters[i] for i in indices):
            flat, parts = _flattened(bucket)
            dist.broadcast(flat, src=process)
            for p, part in zip(bucket, parts, strict=True):
                p.copy_(part)


def gather_states(states: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
    """{index of a parameter: {name: tensor}} of the parameters that this process owns -> in the first process those of
    all parameters, with the other processes' tensors on the CPU; in the others their own. The tensors are sent one by
    one, so that no other process needs memory for them."""
    if size() == 1:
        return states
    with raise_in_all():  # for an exception that a process has raised before it came here
        mine = {(index, name): t for index, state in states.items() for name, t in state.items()}
    theirs = all_gather({key: t.to("meta") for key, t in mine.items()} if rank() else {})
    with raise_in_all():  # memory may run out
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
    for (index, name), t in mine.items():
        whole.setdefault(index, {})[name] = t
    return whole


def begin_equal(modules: Iterable[nn.Module], **read) -> None:
    """Copies the first process's weights and buffers to all processes.

    read: {name: value} of what each process has read. ConfigError if such a value, the names, shapes and dtypes of the
    weights, or which of them are trainable differ between processes, or if a model is on another GPU than the process's
    own.
    """
    if size() == 1:
        return
    for name, values in ((name, all_gather(value)) for name, value in read.items()):
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"the {size()} processes read different {name}: give every process all of it, in the same order"
            )
    named = [x for m in modules for x in (*m.named_parameters(), *m.named_buffers())]
    models = all_gather([(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in named])
    if any(model != models[0] for model in models):
        raise ConfigError(
            f"the {size()} processes hold different models, or different weights of them are trainable: give every "
            "process the same model"
        )
    tensors = [t for _, t in named]
    with raise_in_all():
        for device in {t.device for t in tensors if t.is_cuda}:
            if device.index != (own := torch.cuda.current_device()):
                raise ConfigError(
                    f"a model is on {device}, but this process's GPU is cuda:{own}: give the model by its path, or "
                    "move it to that GPU"
                )
    for tensor in tensors:  # contiguous like their gradients, because fused AdamW pairs elements by their memory order
        tensor.data = tensor.data.contiguous()
        dist.broadcast(tensor.data, src=0)

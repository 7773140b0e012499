"""Models that fit one GPU, but not together with their gradients: each process keeps some rows of every layer weight.

    whole layer      gathered from all processes for its forward, freed, gathered again for its backward (torch's FSDP2)
    gradients        summed over the processes and reduced to the same rows, layer by layer during the backward
    AdamW            each process steps its own rows, and is the only one that keeps their state

Embeddings, final norm and heads stay whole in every process and go through parallel.py, because the linear ops read
their weights outside of any layer's forward. In training every process runs equally many micro-batches (as_many). Work
without gradients (sampling, scoring, evaluation, saving) takes a different number of steps in each process, and they
cannot wait for one another in every layer: gathered() makes all layers whole beforehand. In float32 each of N processes
needs 16/N bytes per weight of the layers, plus a few whole layers; inside gathered(), without gradients, 4 + 12/N.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from . import parallel
from .errors import ConfigError
from .models import has_adapters, rows_like, trunk_layers, trunk_stack, unwrapped, whole


def shard(*models: nn.Module) -> None:
    """From now on each process keeps only its rows of the layers. All processes call this together, with the same
    weights. Two models may share one trunk."""
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(
            f"fsdp needs torch 2.9 or later, and this is {torch.__version__}: update torch, or leave fsdp out"
        )
    atexit.register(_let_go)  # runs before parallel._leave, because it is registered later
    mesh = init_device_mesh(models[0].device.type, (parallel.size(),))
    for model in models:
        stack, layers = trunk_stack(unwrapped(model)), trunk_layers(unwrapped(model))
        if has_adapters(model):
            raise ConfigError(
                "fsdp shards trainable weights, and adapters (lora_r) have few of them: leave out fsdp or the adapters"
            )
        if not len(layers):
            raise ConfigError(f"fsdp cannot find the layers of {type(model).__name__}: leave fsdp out")
        if getattr(unwrapped(model).config, "layerdrop", 0):  # each process would skip other layers, and wait for ever
            raise ConfigError(
                "fsdp must run every layer in all processes, but the model's layerdrop skips some: set layerdrop to 0"
            )
        if isinstance(layers[0], FSDPModule):
            continue
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            layer.set_gradient_divide_factor(1.0)  # a sum, because a loss is divided by the totals of the step
            layer.set_force_sum_reduction_for_comms(True)
        rest = {p for p in stack.parameters() if not isinstance(p, DTensor)}
        fully_shard(stack, mesh=mesh, ignored_params=rest)  # prefetches the next layer while one computes
        # By default FSDP derives the backward's prefetches from all forwards since the last backward. The number of
        # evaluation's forwards differs between processes, which would then wait for each other. So set the order here.
        for layer, before in zip(layers, [layers[0], *layers[:-1]], strict=True):
            layer.set_modules_to_backward_prefetch([before])


def _let_go() -> None:
    """Removes the references of FSDP and of its mesh to the process group. Gloo's threads end with the last reference,
    and may abort a process that ends before them."""
    for x in gc.get_objects():
        if type(x).__name__ == "FSDPMeshInfo":
            x.shard_process_group = None
        elif type(x) is DeviceMesh:
            getattr(x, "_pg_registry", {}).clear()  # absent in torch 2.9


def is_sharded(layer: nn.Module) -> bool:
    """Whether the layer holds only this process's rows at the moment."""
    return any(isinstance(p, DTensor) for p in layer.parameters())


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Inside, every process has the whole layers as plain tensors. All processes enter together. The tensors must not
    be changed, nor shared with numpy, which would keep them from being freed."""
    layers = [layer for model in models for layer in trunk_layers(unwrapped(model)) if is_sharded(layer)]
    if layers and parallel.size() == 1:  # within parallel.on_first
        raise ConfigError(
            "fsdp: one process alone cannot gather layers; inside a rollout_func only the policy's layers are whole"
        )
    with parallel.exit_all() if layers else nullcontext():
        for layer in layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
    for module in (m for layer in layers for m in layer.modules()):
        for key, hook in list(module._state_dict_pre_hooks.items()):
            if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):  # it would shard the layer
                del module._state_dict_pre_hooks[key]
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


class Rows(nn.Parameter):
    """This process's rows of a sharded weight, as a parameter for AdamW: a plain tensor in the memory that FSDP gathers
    from. It accumulates the gradients that FSDP has reduced."""

    def __new__(cls, weight: DTensor) -> Rows:
        rows = super().__new__(cls, weight.detach().to_local())
        rows.weight = weight
        weight.register_post_accumulate_grad_hook(rows._take)
        return rows

    def _take(self, weight: DTensor) -> None:
        grad, weight.grad = weight.grad.to_local(), None
        self.grad = grad if self.grad is None else self.grad.add_(grad)

    def join(self, x: Tensor) -> Tensor:
        """x has the shape of these rows, or is a single number, which is returned unchanged -> in the first process the
        whole tensor, the rows of all processes joined. All processes call this together."""
        if x.shape != self.shape:
            return x
        w = self.weight
        sizes = {"run_check": False, "shape": w.shape, "stride": w.stride()}
        return whole(DTensor.from_local(x, w.device_mesh, w.placements, **sizes))


def own_rows(p: nn.Parameter) -> nn.Parameter:
    """The parameter that AdamW steps: p itself, or this process's rows of it if it is sharded."""
    return Rows(p) if isinstance(p, DTensor) else p


def rows_of(p: nn.Parameter, x: Tensor) -> Tensor:
    """The inverse of Rows.join: p's rows of the whole tensor x. All of x if p is not a Rows."""
    return rows_like(p.weight, x).to_local() if isinstance(p, Rows) and x.shape == p.weight.shape else x


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def norm_of_rows(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of the gradients of those parameters that are Rows, over all processes."""
    rows = [p for p in parameters if isinstance(p, Rows)]
    norm = torch.nn.utils.get_total_norm(gradients(rows))
    return parallel.all_reduce_sum(norm.square()).sqrt() if rows else norm


def as_many(parts: list, spare) -> list:
    """The parts, followed by copies of `spare` until there are as many as in the process that has the most."""
    count = int(parallel.all_reduce_max(torch.tensor(len(parts))))
    return parts + [spare] * (count - len(parts))

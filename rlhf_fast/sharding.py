"""Models that do not fit one GPU beside their gradients: each process keeps some rows of every weight of the layers.

    whole layer      gathered from all for its forward, freed, gathered again for its backward (torch's FSDP2)
    gradients        summed over the processes and cut to the same rows, layer by layer as the backward goes
    AdamW            steps the rows of its own process, which alone keeps the state of them

Embeddings, final norm and heads stay whole in every process, and go through parallel.py: the linear ops read their
weights outside of any layer's forward. Of micro-batches that learn every process has as many (as_many). What runs
without gradients (sampling, scoring, evaluation, saving) takes other numbers of steps in each, which could not wait for
the others in every layer: gathered() makes all layers whole before. In float32 each of N processes needs 16/N bytes for
a weight of the layers, and some whole layers besides; inside gathered(), where there are no gradients, 4 + 12/N.
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
    """From now on each process keeps its rows of the layers. All have the same weights, and call this together; two
    models may have one trunk."""
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(f"fsdp needs torch 2.9 or later, and this is {torch.__version__}: update it, or leave it out")
    atexit.register(_let_go)  # which runs before the processes leave each other, as it is registered after that
    mesh = init_device_mesh(models[0].device.type, (parallel.size(),))
    for model in models:
        stack, layers = trunk_stack(unwrapped(model)), trunk_layers(unwrapped(model))
        if has_adapters(model):
            raise ConfigError("fsdp shards weights that learn, and adapters (lora_r) are few: leave one of the two out")
        if not len(layers):
            raise ConfigError(f"fsdp does not find the layers of {type(model).__name__}: leave it out")
        if getattr(unwrapped(model).config, "layerdrop", 0):  # others in each process, and they would wait
            raise ConfigError(
                "fsdp runs each layer in all processes, and the layerdrop of the model skips some: set it to 0"
            )
        if isinstance(layers[0], FSDPModule):
            continue
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            layer.set_gradient_divide_factor(1.0)  # a sum: a loss is divided by what counts in the whole step
            layer.set_force_sum_reduction_for_comms(True)
        rest = {p for p in stack.parameters() if not isinstance(p, DTensor)}
        fully_shard(stack, mesh=mesh, ignored_params=rest)  # so that the next layer is gathered while one computes
        # Which one that is in the backward, FSDP would tell from all forwards since the last: evaluation has another
        # number of them in each process, and these would wait for each other.
        for layer, before in zip(layers, [layers[0], *layers[:-1]], strict=True):
            layer.set_modules_to_backward_prefetch([before])


def _let_go() -> None:
    """Takes the process group from FSDP and its mesh: gloo's threads, which may abort a process that ends before them,
    end with the last that holds it."""
    for x in gc.get_objects():
        if type(x).__name__ == "FSDPMeshInfo":
            x.shard_process_group = None
        elif type(x) is DeviceMesh:
            getattr(x, "_pg_registry", {}).clear()  # torch 2.9 has none


def is_sharded(layer: nn.Module) -> bool:
    """Whether it is rows at this moment."""
    return any(isinstance(p, DTensor) for p in layer.parameters())


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Inside, every process has the whole layers, as plain tensors that must not change, nor be shared with numpy,
    which would keep them from being freed. All enter together."""
    layers = [layer for model in models for layer in trunk_layers(unwrapped(model)) if is_sharded(layer)]
    if layers and parallel.size() == 1:  # within parallel.on_first
        raise ConfigError("fsdp: one process alone cannot gather layers; in a rollout_func the policy's are whole")
    with parallel.exit_all() if layers else nullcontext():
        for layer in layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
    for module in (m for layer in layers for m in layer.modules()):
        for key, hook in list(module._state_dict_pre_hooks.items()):
            if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):  # it would cut the layer to rows
                del module._state_dict_pre_hooks[key]
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


class Rows(nn.Parameter):
    """What this process keeps of a sharded weight, for AdamW: a plain tensor in the memory that FSDP gathers from. A
    gradient that FSDP has reduced is added to its own."""

    def __new__(cls, weight: DTensor) -> Rows:
        rows = super().__new__(cls, weight.detach().to_local())
        rows.weight = weight
        weight.register_post_accumulate_grad_hook(rows._take)
        return rows

    def _take(self, weight: DTensor) -> None:
        grad, weight.grad = weight.grad.to_local(), None
        self.grad = grad if self.grad is None else self.grad.add_(grad)

    def join(self, x: Tensor) -> Tensor:
        """Of x, which has a number for each of these rows' (or is one number for all), in the first process that of all
        processes; all call this together."""
        if x.shape != self.shape:
            return x
        w = self.weight
        sizes = {"run_check": False, "shape": w.shape, "stride": w.stride()}
        return whole(DTensor.from_local(x, w.device_mesh, w.placements, **sizes))


def own_rows(p: nn.Parameter) -> nn.Parameter:
    """What AdamW is to step: the parameter, or the rows that this process has of it."""
    return Rows(p) if isinstance(p, DTensor) else p


def rows_of(p: nn.Parameter, x: Tensor) -> Tensor:
    """Of x, as Rows.join gives it, what belongs to p; all of it where p is no Rows."""
    return rows_like(p.weight, x).to_local() if isinstance(p, Rows) and x.shape == p.weight.shape else x


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def norm_of_rows(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of the gradients of those that are Rows, over all processes."""
    norm = torch.nn.utils.get_total_norm(gradients([p for p in parameters if isinstance(p, Rows)]))
    return parallel.all_reduce_sum(norm.square()).sqrt() if any(isinstance(p, Rows) for p in parameters) else norm


def as_many(parts: list, spare) -> list:
    """The parts, and then the spare one, until there are as many as in any other process."""
    most = int(parallel.all_reduce_max(torch.tensor(len(parts))))
    return parts + [spare] * (most - len(parts))

"""AdamW, its schedule and its step, in one process or several; saving and loading its state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import parallel, sharding
from ..errors import ConfigError


def make_optimizer(modules, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over the parameters that require grad, each once. Weight decay applies only to matrices, not to norms and
    biases."""
    modules = modules if isinstance(modules, (list, tuple)) else [modules]
    unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    learning = [sharding.own_rows(p) for p in unique.values()]
    matrices = [p for p in learning if p.ndim >= 2]
    others = [p for p in learning if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=True)


def make_scheduler(optimizer, schedule: str, total_steps: int, warmup_ratio: float = 0.0):
    """Linear warm-up over warmup_ratio of the run, then one of configs.LR_SCHEDULES; linear and cosine end at 0."""
    warmup = math.ceil(total_steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total_steps - warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_learner(modules, config, total_steps: int, learning_rate: float | None = None) -> tuple:
    """make_optimizer and make_scheduler with a trainer's config. learning_rate: None takes that of the config."""
    optimizer = make_optimizer(modules, learning_rate or config.learning_rate, config.weight_decay)
    return optimizer, make_scheduler(optimizer, config.lr_scheduler_type, total_steps, config.warmup_ratio)


def optimizer_step(optimizer, scheduler=None, max_grad_norm: float | None = 1.0) -> Tensor:
    """Sums the gradients over the processes, clips their global norm, steps and clears them -> the norm before
    clipping, a float32 scalar. Each process steps the parameters that it owns and sends them to all others.

    If a gradient is not finite, the update is skipped, but the schedule advances. The returned norm is not finite then,
    and NonFiniteGuard counts it. max_grad_norm None or 0: no clipping.
    """
    parameters = _parameters(optimizer)
    unsharded = [p for p in parameters if not isinstance(p, sharding.Rows)]
    parallel.sum_gradients(unsharded)
    norm_of_rows = sharding.norm_of_rows(parameters)
    with parallel.raise_in_all():  # memory may run out for Adam's state
        norm = torch.hypot(torch.nn.utils.get_total_norm(sharding.gradients(unsharded)), norm_of_rows)
        if math.isfinite(length := float(norm)):
            if max_grad_norm and length > max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
            parallel.leave_to_others(unsharded)
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parallel.send_weights(unsharded)
    if scheduler is not None:
        scheduler.step()
    return norm.detach().float()


def _parameters(optimizer) -> list[torch.nn.Parameter]:
    """The parameters in the order of the optimizer's state_dict()."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizer_state(optimizer) -> dict:
    """The optimizer's state_dict(); all processes call this at once. Only the first one gets the complete state."""
    state, parameters = optimizer.state_dict(), _parameters(optimizer)
    rows = {i: x for i, x in state["state"].items() if isinstance(parameters[i], sharding.Rows)}
    states = parallel.gather_states({i: x for i, x in state["state"].items() if i not in rows})
    states |= {i: {name: parameters[i].join(x) for name, x in held.items()} for i, held in rows.items()}
    return state | {"state": dict(sorted(states.items()))}


def load_optimizer(optimizer, scheduler, saved_optimizer: dict, saved_scheduler: dict) -> None:
    """Loads the saved states; a process keeps only those of the parameters that it owns. Learning rate and weight decay
    stay those of the config, which may have changed since. ConfigError if the number of parameters has changed."""
    both = (saved_optimizer["param_groups"], optimizer.param_groups)
    before, now = ([len(group["params"]) for group in groups] for groups in both)
    if before != now:
        raise ConfigError(
            f"the checkpoint trained {sum(before)} tensors of the model, and this run {sum(now)}: resume with the same "
            "freeze_trunk, train_last_layers and lora_*"
        )
    rates = [{name: group[name] for name in ("initial_lr", "weight_decay")} for group in optimizer.param_groups]
    parameters = _parameters(optimizer)
    unsharded = [i for i, p in enumerate(parameters) if not isinstance(p, sharding.Rows)]
    owned = [unsharded[k] for k in parallel.owned([parameters[i] for i in unsharded])]
    not_owned = set(unsharded).difference(owned)
    mine = {}
    for i, state in saved_optimizer["state"].items():
        if i not in not_owned:
            mine[i] = {name: sharding.rows_of(parameters[i], x) for name, x in state.items()}
    optimizer.load_state_dict(saved_optimizer | {"state": mine})
    for p, state in optimizer.state.items():  # fused AdamW pairs elements by their memory order (parallel.begin_equal)
        for name, x in state.items():
            if x.shape == p.shape and x.stride() != p.stride():
                state[name] = torch.empty_like(p).copy_(x)
    scheduler.load_state_dict(saved_scheduler)
    scheduler.base_lrs = [group["initial_lr"] for group in rates]
    for group, own, factor in zip(optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
        group |= own | {"lr": own["initial_lr"] * factor(scheduler.last_epoch)}
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    optimizer.zero_grad(set_to_none=True)  # a step of this trainer that failed may have left gradients

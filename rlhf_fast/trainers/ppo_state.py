"""What PPO saves: its models, and the state of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..advantages import RunningStd
from ..errors import ConfigError
from ..models import has_adapters, load_trained_state, save_model, scalar_head_on, trained_state
from . import common, optimizers


def save_models(trainer, path) -> None:
    """Writes the policy, and in value_model/ the critic."""
    critic = trainer.value_model and trainer.value_model.model
    if trainer.config.share_trunk and has_adapters(trainer.policy):
        critic = scalar_head_on(trainer.policy)  # with its own trunk, in which the adapters are merged
        critic.score.load_state_dict(trainer.value_model.model.score.state_dict())
    save_model(trainer.policy, trainer.tokenizer, path)
    if critic is not None:
        save_model(critic, trainer.tokenizer, Path(path) / "value_model")


def _own_critic(trainer) -> nn.Module | None:
    """The part of the critic that is not the policy: only its head if the trunk is shared."""
    return trainer.value_model.model.score if trainer.config.share_trunk else trainer.value_model


def state_of(trainer) -> dict:
    """Prompts and sampling depend only on seed and step, so the step is enough to repeat them."""
    return {
        "step": trainer.step,
        "kl_coef": trainer.kl_controller.kl_coef,
        "score_scale": vars(trainer.score_scale),
        "lengths": torch.tensor(list(map(len, trainer.prompts))),
        "data": trainer.data,
        "policy": trained_state(trainer.policy),
        "value_model": trained_state(_own_critic(trainer)) if trainer.value_model else None,
        "optimizers": [optimizers.optimizer_state(optimizer) for optimizer in trainer.optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in trainer.schedulers],
    }


def load_state(trainer, state: dict) -> None:
    """Restores a state that state_of returned."""
    common.check_same_data(state, list(map(len, trainer.prompts)), trainer.data, trainer.tokenizer)
    critic = trained_state(_own_critic(trainer)) if trainer.value_model else {}
    if critic.keys() != (state["value_model"] or {}).keys():
        raise ConfigError(
            "the checkpoint has another critic, or none: resume with the same advantage_estimator and share_trunk, or "
            "start a new run in another output_dir"
        )
    load_trained_state(trainer.policy, state["policy"])
    if trainer.value_model:
        load_trained_state(_own_critic(trainer), state["value_model"])
    for learner in zip(trainer.optimizers, trainer.schedulers, state["optimizers"], state["schedulers"], strict=True):
        optimizers.load_optimizer(*learner)
    if trainer.config.kl_target is not None:  # else kl_coef is that of the config, which may have changed
        trainer.kl_controller.kl_coef = state["kl_coef"]
    trainer.score_scale = RunningStd(**state["score_scale"])
    trainer.step = state["step"]  # last: what is refused moves no step

"""Chooses the reference and the critic of PPO, and checks settings, models and rewards before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from .. import parallel
from ..data.formats import Prompt
from ..errors import ConfigError
from ..models import (
    ValueModel,
    check_lengths,
    check_lm_head,
    disable_dropout,
    load_policy,
    load_tokenizer,
    make_reference,
    starts_as_its_base,
    stop_at_eos,
    unwrapped,
)
from ..packing import why_not_packed
from ..rewards import RewardModelReward, check_room, check_signature
from . import common
from .ppo_config import PPOConfig, check_eval_rewards


def check_arguments(config: PPOConfig, eval_rewards: dict | None, eval_dataset, rollout_func) -> None:
    """ConfigError for arguments of PPOTrainer that cannot be used; a warning for a KL that has another gradient."""
    check_eval_rewards(config, eval_rewards, eval_dataset)
    if config.kl_in_rewards and config.kl_estimator != "k1":
        warnings.warn(
            f"kl_estimator {config.kl_estimator} in the rewards does not give the gradient of a KL (docs/ppo.md): "
            "use k1, or set kl_in_loss: true",
            stacklevel=3,
        )
    if not (rollout_func is None or callable(rollout_func)):
        raise ConfigError(f"PPOTrainer: rollout_func must be a function, got {rollout_func!r}")
    if config.minibatch_size < parallel.size():
        raise ConfigError(
            f"PPOTrainer: minibatch_size = {config.minibatch_size} leaves some of {parallel.size()} processes idle: "
            "raise it, or start fewer"
        )


def choose_reference(policy: nn.Module, ref_model, config: PPOConfig, tokenizer) -> nn.Module | None:
    """The frozen reference: ref_model (a model, its name or its path), or a copy of the policy.

    None in two cases, which PPOTrainer.has_reference tells apart: the reference is the policy with its adapters
    switched off, or there is none, because a KL of weight 0 needs none. ConfigError if there is a tokenizer beside
    ref_model, and its tokens are not the policy's.
    """
    if ref_model is policy:
        raise ConfigError("PPOTrainer: ref_model is the policy itself, so KL would stay 0; leave it out or give a copy")
    if ref_model is None:
        watched = "kl" in config.stop_on or config.monitors.get("kl") is not None
        if not config.kl_coef and watched:
            raise ConfigError(
                "PPOTrainer: with kl_coef 0 there is no reference, so monitors and stop_on cannot watch kl: give a "
                "ref_model to measure it, or leave kl out"
            )
        return None if not config.kl_coef or starts_as_its_base(policy) else make_reference(policy)
    if isinstance(ref_model, (str, Path)) and not _same_tokens(_tokenizer_at(ref_model, tokenizer), tokenizer):
        raise ConfigError(
            f"PPOTrainer: ref_model {str(ref_model)!r} has another tokenizer than the policy's, so its "
            "log-probabilities would be of other words: give a model of the same family"
        )
    return load_policy(ref_model).eval().requires_grad_(False)


def choose_critic(policy: nn.Module, value_model, config: PPOConfig, tokenizer) -> ValueModel | None:
    """value_model (a ValueModel, or a reward model to start from, or its path), or the policy's trunk with a head of
    zeros; None if the advantage estimator needs no critic. ConfigError if the tokens of a reward model loaded from a
    path are not the policy's."""
    estimator, shared = config.advantage_estimator, config.share_trunk
    if value_model is not None:
        if shared:
            raise ConfigError("PPOTrainer: share_trunk puts the value head on the policy; give no value_model")
        if estimator != "gae":
            raise ConfigError(f"PPOTrainer: advantage_estimator {estimator!r} has no critic; give no value_model")
        if isinstance(value_model, (str, Path)):
            if not _same_tokens(_tokenizer_at(value_model, tokenizer), tokenizer):
                raise ConfigError(
                    f"PPOTrainer: value_model {str(value_model)!r} was trained with another tokenizer than the "
                    "policy's, so its values would mean nothing: leave value_model out (it can still be the reward)"
                )
            value_model = RewardModelReward.load(value_model).model
        return value_model if isinstance(value_model, ValueModel) else ValueModel.from_reward_model(value_model)
    if estimator != "gae":
        return None
    critic = ValueModel.from_policy(policy)
    if shared:
        setattr(critic.model, critic.model.base_model_prefix, unwrapped(policy).base_model)
    return critic


def _tokenizer_at(path: str | Path, default):
    """The tokenizer that lies beside a model; default if there is none, or no model, of which load_policy will tell."""
    try:
        return load_tokenizer(path)
    except ConfigError:
        return default


def _same_tokens(tokenizer, of_policy) -> bool:
    """Whether every token of the policy has the same number in the other tokenizer, or, if it was added later (a pad
    token), one that the other does not use."""
    theirs = tokenizer.get_vocab()
    used = set(theirs.values())
    new = (item for item in of_policy.get_vocab().items() if item not in theirs.items())
    return all(token not in theirs and number not in used for token, number in new)


def check_rewards(trainer, longest: Prompt) -> None:
    """ConfigError if a reward cannot take the arguments or the lengths that it will be called with."""
    rewards = [trainer.reward, *trainer.eval_rewards.values()]
    if trainer.rollout_func is None:  # else the function may add columns
        check_signature(trainer.reward, trainer.prompts[0].columns)
        for reward in rewards if trainer.eval_prompts else ():
            check_signature(reward, trainer.eval_prompts[0].columns)
    for reward in rewards:
        check_room(reward, trainer.tokenizer, longest.prompt, trainer.config.response_length)


def prepare_networks(trainer, networks: Iterable[nn.Module], longest: int, advice: str) -> None:
    """Turns dropout off in all networks of the trainer. ConfigError if one cannot be trained or cannot read `longest`
    tokens; advice: how the user can lower that number."""
    config, policy, reference = trainer.config, trainer.policy, trainer.reference
    common.check_learns(policy, "PPOTrainer: the policy")
    if trainer.value_model:
        common.check_learns(trainer.value_model, "PPOTrainer: the value model")
    for network in networks:
        if any(p.dtype == torch.float64 for p in network.parameters()):
            raise ConfigError("PPOTrainer: a model is in float64, and PPO computes in float32: call its float()")
        check_lengths(network, trainer.tokenizer, longest, advice)
        disable_dropout(network)  # with dropout the first ratios would be noise around 1
    with common.autocast(policy, config.bf16):
        check_lm_head(policy)
        if reference is not None:
            check_lm_head(reference)
    stop_at_eos(policy, trainer.tokenizer)
    common.check_bf16(config.bf16, policy.device)


def packs(networks: Iterable[nn.Module], longest: int, config: PPOConfig) -> bool:
    """Whether responses are scored and learned from end to end in one row, without padding, where the prompt of several
    is computed once (rollout.packed_rows). Warns if a model cannot do that.

    On a GPU each response is a row of its own, because attention would be a launch per response (not measured yet).
    """
    for network in networks:
        if network.device.type != "cpu":
            return False
        if reason := why_not_packed(network, longest, config.bf16):
            warnings.warn(f"responses are padded, and each computes its prompt again: {reason}", stacklevel=3)
            return False
    return True

"""The scalar head on a trunk: rewards, read at the last token, and values, read at every token."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from ..errors import ConfigError
from .adapters import copied, merge_adapters, unwrapped
from .language import hidden_states, let_pad_learn, warn_of_lost_softcap


def scalar_head_on(model: PreTrainedModel) -> PreTrainedModel:
    """AutoModelForSequenceClassification: a copy of the trunk (adapters merged) under a new scalar head.

    The head is drawn from a normal distribution with standard deviation 1 / sqrt(D + 1) (Stiennon et al. 2020), using
    torch's current seed. ConfigError if the model is not a decoder.
    """
    model = merge_adapters(model)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    if MODEL_MAPPING.get(type(config), None) is not type(model.base_model):
        raise ConfigError(
            f"no reward or value model can be made from {type(model).__name__}, whose trunk is no model of "
            "transformers by itself. Use a reward model of another architecture; PPO needs no value model with "
            "advantage_estimator reinforce, rloo or group"
        )
    register_scalar_class(config)
    with torch.device(model.device):  # a billion weights, drawn only to be replaced, take a CPU a quarter of a minute
        scalar = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype).to(model.device)
    check_score(scalar)
    scalar.base_model.load_state_dict(model.base_model.state_dict())
    scalar.score.float()  # it is trained, whatever the dtype of the trunk
    width = scalar.score.weight.shape[1]
    nn.init.normal_(scalar.score.weight, std=1 / math.sqrt(width + 1))
    return let_pad_learn(scalar)


def register_scalar_class(config: PretrainedConfig) -> None:
    """Gives AutoModelForSequenceClassification a class for a decoder that has none in transformers (Granite, OLMoE,
    Mamba): the generic one over the decoder's trunk."""
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    language = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    base = next(parent for parent in language.__mro__ if PreTrainedModel in parent.__bases__)
    name = f"{base.__name__.removesuffix('PreTrainedModel')}ForSequenceClassification"
    members = {"base_model_prefix": language.base_model_prefix, "config_class": kind, "__module__": language.__module__}
    made = type(name, (GenericForSequenceClassification, base), members)
    AutoModelForSequenceClassification.register(kind, made, exist_ok=True)  # else ignored for a config of transformers


def check_score(model: PreTrainedModel) -> None:
    """ConfigError for a classifier that lacks `score`, the head that decoders have, or whose score is not one
    number. Warns of a lost softcap."""
    if not hasattr(model, "score"):
        raise ConfigError(
            f"{type(model).__name__} is not supported: a reward is read at the last token by `score`, the head that "
            "decoders have; encoders such as BERT classify in another way. Start from a decoder"
        )
    if model.config.num_labels != 1:
        raise ConfigError(
            f"a reward is one number, and {type(model).__name__} has num_labels={model.config.num_labels}: give a "
            "model with num_labels=1"
        )
    warn_of_lost_softcap(model)


def score_tokens(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) tokens, padded on either side -> (B,) float32 rewards, read at the last real token of each row."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (positions * attention_mask).argmax(-1)
    padded_left = not bool(attention_mask[:, 0].all())
    hidden = hidden_states(model, input_ids, attention_mask if padded_left else None)
    return scalar_head(model, hidden[torch.arange(len(last), device=last.device), last])


def scalar_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(..., D) hidden states -> (...), in float32 whatever the trunk's dtype, because differences of rewards matter."""
    bias = model.score.bias if model.score.bias is None else model.score.bias.float()
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), model.score.weight.float(), bias).squeeze(-1)


def reward_scale(config) -> tuple[float, float]:
    """Mean and standard deviation of the raw reward on its reference set, from the config; 0 and 1 if it has none."""
    return getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)


def set_reward_scale(model: nn.Module, mean: float, std: float) -> None:
    """Sets the scale in the config. RewardModelReward then gives (raw - mean) / std; forward and training stay raw."""
    config = unwrapped(model).config
    config.reward_mean, config.reward_std = mean, std


def has_reward_scale(model: nn.Module) -> bool:
    """Whether the config has a reward scale. RewardTrainer sets one, and its reward models read the score at an eos."""
    return hasattr(unwrapped(model).config, "reward_mean")


class ValueModel(nn.Module):
    """V(s) at every token. `model` is the scalar-head model.

    Values have the unit of the reward. If the config has a scale (set_reward_scale), it is applied here too, because
    the scalar heads of transformers have no bias that could learn the mean.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        check_score(model)
        self.model = model

    @classmethod
    def from_reward_model(cls, model: PreTrainedModel) -> ValueModel:
        """A copy of the reward model: at first the value of the last state equals RewardModelReward's reward."""
        if isinstance(model, (str, Path)):
            raise ConfigError(f"from_reward_model needs a model, not a path: give load_reward_model({str(model)!r})")
        if not hasattr(model, "score"):
            raise ConfigError(f"{type(model).__name__} has no scalar head: give a reward model, or use from_policy")
        return cls(copied(merge_adapters(model)).requires_grad_(True))

    @classmethod
    def from_policy(cls, model: PreTrainedModel) -> ValueModel:
        """The policy's trunk with a head of zeros, so that the first values are 0 and not noise."""
        value = scalar_head_on(model)
        nn.init.zeros_(value.score.weight)
        return cls(value)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states of the trunk -> (...) values."""
        mean, std = reward_scale(self.model.config)
        return (scalar_head(self.model, hidden) - mean) / std

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, T) tokens and their mask -> (B, T) float32 values."""
        return self.head(hidden_states(self.model, input_ids, attention_mask))

"""rlhf_fast: fused RLHF losses for PyTorch, and a thin trainer over them (SFT, reward model, PPO, Constitutional AI).

Names are imported on first use: the ops alone do not pay for transformers, nor `rlhf-fast --help` for torch.
"""

# ruff: noqa: F401, F403 - names are re-exported
from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:  # what an editor should see; "as", since in a typed package a plain import is private
    from .ops import *
    from .trainers.ppo import PPOConfig as PPOConfig
    from .trainers.ppo import PPOTrainer as PPOTrainer
    from .trainers.reward import RewardConfig as RewardConfig
    from .trainers.reward import RewardTrainer as RewardTrainer
    from .trainers.sft import SFTConfig as SFTConfig
    from .trainers.sft import SFTTrainer as SFTTrainer

_TRAINERS = {
    "SFTConfig": "trainers.sft_config",
    "SFTTrainer": "trainers.sft",
    "RewardConfig": "trainers.reward_config",
    "RewardTrainer": "trainers.reward",
    "PPOConfig": "trainers.ppo_config",
    "PPOTrainer": "trainers.ppo",
}


def __getattr__(name):
    if name in _TRAINERS:
        return getattr(import_module(f"{__name__}.{_TRAINERS[name]}"), name)
    if not name.startswith("_") or name == "__all__":
        ops = import_module(f"{__name__}.ops")
        if name == "__all__":
            return ["__version__", *ops.__all__, *_TRAINERS]
        if name == "ops":
            return ops
        if name in ops.__all__:
            globals()[name] = getattr(ops, name)  # found directly from now on
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__getattr__("__all__")})

"""Rewards: one number for an answer to a prompt, from a reward model, a Python function, or a weighted sum of them.

    reward(prompts, responses, **columns) -> B floats, or a Tensor (B,)

prompts are text or messages, responses text without special tokens, columns the other columns of the dataset (lists of
B). Text is the interface, so a reward model brings its own tokenizer and chat template; they need not be the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .data.chat import ConfigError, Text, encode_to_score
from .models import (
    check_lengths,
    has_scalar_head,
    load_reward_model,
    load_tokenizer,
    merge_adapters,
    score_tokens,
    with_own_pad,
)  # fmt: skip
from .rollout import evaluating, pad

Reward = Callable[..., "Sequence[float] | Tensor"]


class RewardModelReward:
    """The score of a reward model (a scalar head at the last token, see models.py) on prompt + response + eos."""

    def __init__(self, model: PreTrainedModel, tokenizer, *, batch_size: int = 64):
        if tokenizer.eos_token is None:
            raise ValueError(
                "RewardModelReward: the reward model's tokenizer needs an eos token, where the score is read"
            )
        _check_trained(model, type(model).__name__)
        check_lengths(model, tokenizer, 0)  # a tokenizer of another model would read past the embedding
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    @classmethod
    def load(cls, path: str | Path, **options) -> RewardModelReward:
        """A checkpoint folder (or hub name) with the reward model and the tokenizer it was trained with."""
        _check_trained(path, repr(str(path)))
        tokenizer = load_tokenizer(str(path))
        return cls(merge_adapters(load_reward_model(str(path), with_own_pad(tokenizer))), tokenizer, **options)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], responses: Sequence[str], **columns) -> Tensor:
        tokens = [self.encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        check_lengths(self.model, self.tokenizer, max(map(len, tokens), default=0))
        scores = torch.empty(len(tokens))
        by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        with evaluating(self.model):
            for start in range(0, len(tokens), self.batch_size):
                rows = by_length[start : start + self.batch_size]
                ids, mask = (x.to(self.model.device) for x in pad([tokens[i] for i in rows], 0))
                scores[rows] = score_tokens(self.model, ids, mask).cpu()
        return scores

    def encode(self, prompt: Text, response: str) -> list[int]:
        """The tokens scored: the dialogue in the reward model's own template (or plain text), ending in one eos."""
        return encode_to_score(self.tokenizer, prompt, response).tolist()


def _check_trained(model, name: str) -> None:
    """ConfigError for a language model, whose scalar head would be drawn at random."""
    if not has_scalar_head(model):
        raise ConfigError(f"a reward must be a trained reward model, and {name} is a language model: train it first")


def weighted(rewards: Sequence[tuple[Reward, float]]) -> Reward:
    """[(reward, weight), ...] -> the reward that is their weighted sum."""

    if not rewards:
        raise ConfigError("a list of rewards needs at least one [reward, weight]")

    def total(prompts, responses, **columns) -> Tensor:
        return sum(weight * compute_scores(reward, prompts, responses, columns) for reward, weight in rewards)

    return total


def make_reward(spec, tokenizer) -> Reward:
    """A reward out of what people have at hand.

    A reward model (it reads with `tokenizer`, the policy's; give RewardModelReward(model, other) where it has its own),
    a path to one saved with its tokenizer, a Python function, or a list of (any of these, weight).
    """
    if isinstance(spec, (str, Path)):
        return RewardModelReward.load(spec)
    if isinstance(spec, PreTrainedModel):
        return RewardModelReward(spec, tokenizer)
    if isinstance(spec, (list, tuple)):
        if not all(isinstance(part, (list, tuple)) and len(part) == 2 for part in spec):
            raise ConfigError(f"a list of rewards is [(reward, weight), ...], got {spec!r}")
        return weighted([(make_reward(part, tokenizer), float(weight)) for part, weight in spec])
    if callable(spec):
        return spec
    raise TypeError(
        f"a reward is a reward model, a path to one, a function reward(prompts, responses, **columns), or a list of "
        f"(reward, weight); got {type(spec).__name__}"
    )


def compute_scores(reward: Reward, prompts: Sequence[Text], responses: Sequence[str], columns: dict) -> Tensor:
    """Calls a reward -> (B,) float32 on the CPU. ConfigError, with its name, on another type or shape, NaN or inf."""
    name = getattr(reward, "__name__", type(reward).__name__)
    returned = reward(prompts, responses, **columns)
    try:
        scores = torch.as_tensor(returned, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:  # all three, for None, text, ragged lists
        raise ConfigError(f"reward {name!r} must return one number for each response, got {returned!r}") from error
    if scores.shape != (len(responses),):
        raise ConfigError(
            f"reward {name!r} returned shape {tuple(scores.shape)} for {len(responses)} responses; it must return one "
            "number for each"
        )
    if not bool(scores.isfinite().all()):
        row = int((~scores.isfinite()).nonzero()[0])
        raise ConfigError(f"reward {name!r} returned {float(scores[row])} for response {row}: {responses[row]!r}")
    return scores

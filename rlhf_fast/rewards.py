"""Rewards: one number per response, from a reward model, a Python function, or a weighted sum of these.

    reward(prompts, responses, **columns) -> B floats, or a Tensor (B,); may be an `async def`

prompts are text or messages, responses are text without special tokens, and columns are the other columns of the
dataset (lists of B). The interface is text, so a reward model may have another tokenizer and chat template than the
policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import inspect
import itertools
import math
import os
import reprlib
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .data.chat import Parts, Text, check_tokenizer, copied, encode_to_score, is_conversation
from .data.collate import pack_sorted, pad
from .data.formats import warn_of_unwritten
from .errors import ConfigError
from .generation import batches
from .models import (
    check_lengths,
    check_score,
    evaluating,
    has_reward_scale,
    has_scalar_head,
    load_reward_model,
    load_tokenizer,
    merge_adapters,
    reward_scale,
    scalar_head,
    score_tokens,
    with_own_pad,
)  # fmt: skip
from .packing import packed_hidden_states, packing, why_not_packed

Reward = Callable[..., "Sequence[float] | Tensor"]
_scoring = threading.Lock()  # meanwhile the model is in another mode and has another attention: one thread at a time


class RewardModelReward:
    """The score of a reward model (a scalar head at the last token) on prompt + response + eos.

    If RewardTrainer has given the model a scale (models.set_reward_scale), the score is (raw - mean) / standard
    deviation.

    A reward model from elsewhere reads a conversation exactly as its chat template renders it, even if that has no eos
    at the end or a line break after it: TRL trains reward models on such texts, and their model cards score them.

    Several threads may call it, and wait for each other.
    """

    def __init__(self, model: PreTrainedModel, tokenizer, *, batch_size: int = 64):
        if tokenizer.eos_token is None:
            raise ConfigError(
                "RewardModelReward: the reward model's tokenizer has no eos token, at which the score is read: set one"
            )
        if batch_size < 1:
            raise ConfigError(f"RewardModelReward: batch_size = {batch_size} must be 1 or more")
        _check_trained(model, type(model).__name__)
        check_score(model)
        if len(tokenizer) > (embedded := model.get_input_embeddings().weight.shape[0]):
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens and the model embeds {embedded}, so it is not the one that "
                "the reward model was trained with: give its path, or RewardModelReward(model, its own tokenizer)"
            )
        self.model, self.tokenizer, self.batch_size, self.name = model, tokenizer, batch_size, "reward_model"
        self._packs: bool | None = None  # unknown
        self._told: set[str] = set()  # message keys that the template leaves out and a warning has named

    @classmethod
    def load(cls, path: str | Path, **options) -> RewardModelReward:
        """path: a folder (or hub name) with the reward model and the tokenizer that it was trained with."""
        _check_trained(path, repr(str(path)))
        tokenizer = load_tokenizer(str(path))
        reward = cls(merge_adapters(load_reward_model(str(path), with_own_pad(tokenizer))), tokenizer, **options)
        reward.name = Path(path).name
        return reward

    def __call__(self, prompts: Sequence[Text | None], responses: Sequence[Text], **columns) -> Tensor:
        unwritten: list[Parts] = [[] for _ in responses]
        tokens = [self.encode(*asked) for asked in zip(prompts, responses, unwritten, strict=True)]
        new = {i: [part for part in parts if part[0] not in self._told] for i, parts in enumerate(unwritten)}
        self._told |= {key for parts in unwritten for key, _ in parts}
        warn_of_unwritten(new, self.name, "scored", "response")
        return self.score(tokens)

    @torch.no_grad()
    def score(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """B rows of tokens from encode() -> (B,) scores.

        On the CPU they are packed, and what several begin with (their prompt) is computed once, where the model can.
        """
        longest = max(map(len, tokens), default=0)
        check_lengths(self.model, self.tokenizer, longest, "score shorter responses")
        scores, device = torch.empty(len(tokens), dtype=torch.float32), self.model.device
        with _scoring:
            packed = self._can_pack() and all(map(len, tokens))
            # Packed, neighbours begin alike (big-endian bytes are in the order of their numbers, and take a ninth of a
            # list's memory); padded, they are about equally long.
            key = (lambda i: np.asarray(tokens[i], ">u4").tobytes()) if packed else (lambda i: len(tokens[i]))
            order = sorted(range(len(tokens)), key=key)
            with evaluating(self.model), packing(self.model, on=packed):
                for rows in batches(order, self.batch_size, "scoring"):
                    some = [tokens[i] for i in rows]
                    if packed:
                        row, last = pack_sorted(some, device)
                        rewards = scalar_head(self.model, packed_hidden_states(self.model, row, last))
                    else:
                        rewards = score_tokens(self.model, *(x.to(device) for x in pad(some, 0)))
                    scores[rows] = rewards.cpu()
        mean, std = reward_scale(self.model.config)
        return (scores - mean) / std

    def _can_pack(self) -> bool:
        if self.model.device.type != "cpu":  # attention would be a launch per sequence
            return False
        if self._packs is None:
            self._packs = False
            with contextlib.suppress(ConfigError):  # outputs that are not finite: so will the scores be
                self._packs = why_not_packed(self.model, math.inf) is None
        return self._packs

    def encode(self, prompt: Text | None, response: Text, unwritten: Parts | None = None) -> np.ndarray:
        """(T,) int32 tokens to score: the conversation in the reward model's own template, or plain text.

        unwritten: a list, to which the parts of the response that the template leaves out are appended.
        """
        check_tokenizer(self.tokenizer, is_conversation(prompt) or is_conversation(response))
        end = has_reward_scale(self.model)
        return encode_to_score(self.tokenizer, prompt, response, end=end, unwritten=unwritten)


def _check_trained(model, name: str) -> None:
    """ConfigError for a model without a scalar head: loading it would add a head with random weights."""
    if not has_scalar_head(model):
        raise ConfigError(
            f"a reward must be a trained reward model, but {name} has no scalar head (`score`, as decoders have it in "
            "AutoModelForSequenceClassification): train it first, or give a function of prompts and responses"
        )


class WeightedReward:
    """The weighted sum of [(reward, weight), ...]. Each part is logged under its own name, even at weight 0."""

    def __init__(self, rewards: Sequence[tuple[Reward, float]]):
        if not rewards:
            raise ConfigError("a list of rewards needs at least one [reward, weight]")
        self.parts: dict[str, tuple[Reward, float]] = {}
        for reward, weight in rewards:
            name, place = reward_name(reward), len(self.parts) + 1
            names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(place)))
            self.parts[next(free for free in names if free not in self.parts)] = (reward, weight)

    def __call__(self, prompts, responses, **columns) -> Tensor:
        return compute_scores(self, prompts, responses, columns)


def reward_name(reward: Reward) -> str:
    """Its name in the log: that of the function, of the reward model's folder, or of the class."""
    return getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)


def make_reward(spec, tokenizer) -> Reward:
    """A Reward from any of:

    - a reward model, with or without LoRA adapters. It uses `tokenizer`, the policy's. For a model that needs another
      one pass RewardModelReward(model, its_tokenizer)
    - the path of a reward model that was saved with its tokenizer
    - a Python function, async or not
    - a list of (any of these, weight)
    """
    if isinstance(spec, (str, Path)):
        return RewardModelReward.load(spec)
    if isinstance(spec, nn.Module):  # callable too, but not on texts
        return RewardModelReward(spec, tokenizer)
    if isinstance(spec, (list, tuple)):
        try:
            weights = [float(weight) for _, weight in spec]
        except (TypeError, ValueError):
            flat = (x for part in spec for x in (part if isinstance(part, (list, tuple)) else [part]))
            kinds = ", ".join(type(x).__name__ for x in flat)  # a model's repr is a page
            raise ConfigError(f"a list of rewards must be [(reward, weight), ...], got a list of {kinds}") from None
        if not np.isfinite(weights).all():
            raise ConfigError(f"a list of rewards needs finite weights, got {weights}")
        return WeightedReward([(make_reward(part, tokenizer), w) for (part, _), w in zip(spec, weights, strict=True)])
    if callable(spec):
        return spec
    raise ConfigError(
        f"a reward must be a reward model, a path to one, a function reward(prompts, responses, **columns), or a list "
        f"of (reward, weight); got {type(spec).__name__}"
    )


def compute_scores(reward: Reward, prompts: Sequence[Text], responses: Sequence[str], columns: dict) -> Tensor:
    """Calls a reward -> (B,) float32 on the CPU, possibly with NaN or inf. ConfigError, which names the reward, if it
    returns anything else."""
    return score_components(reward, prompts, responses, columns)[0]


def score_components(
    reward: Reward, prompts: Sequence[Text], responses: Sequence[str], columns: dict
) -> tuple[Tensor, dict[str, Tensor]]:
    """compute_scores, and {name: unweighted scores} of each part. Async parts run concurrently.

    A part of weight 0 is only logged. It is left out of the sum, because 0 times NaN would be NaN. Each part gets lists
    and messages of its own: if one appends a response to its prompt, no other reads it, nor does a later iteration.
    """
    parts, returned = _parts(reward), {}
    for name, (part, _) in parts.items():
        own = {column: copy.copy(values) for column, values in columns.items()}
        returned[name] = part(copied(prompts), list(responses), **own)
    waiting = {name: value for name, value in returned.items() if inspect.isawaitable(value)}
    if waiting:
        returned |= zip(waiting, _wait_for(list(waiting.values())), strict=True)
    scores = {name: _checked(name, value, responses) for name, value in returned.items()}
    weighted = (weight * scores[name] for name, (_, weight) in parts.items() if weight)
    return sum(weighted, start=torch.zeros(len(responses), dtype=torch.float32)), scores


def _parts(reward: Reward) -> dict[str, tuple[Reward, float]]:
    return reward.parts if isinstance(reward, WeightedReward) else {reward_name(reward): (reward, 1.0)}


def check_signature(reward: Reward, columns: Iterable[str]) -> None:
    """ConfigError for a function that cannot be called as (prompts, responses, **columns), or whose first two
    parameters are in the other order. (Functions for TRL may have that, because TRL passes them by keyword.)"""
    for name, (part, _) in _parts(reward).items():
        try:
            signature = inspect.signature(part)
        except (TypeError, ValueError):  # some functions written in C have no signature
            continue
        try:
            bound = signature.bind("prompts", "responses", **dict.fromkeys(columns)).arguments
            swapped = [name for name in ("responses", "completions") if bound.get(name) == "prompts"]
            if bound.get("prompts") == "responses" or swapped:
                raise TypeError("prompts must come first, then responses")
        except TypeError as error:
            call = ", ".join(["prompts", "responses", *(f"{column}=..." for column in columns)])
            raise ConfigError(
                f"reward {name!r} has the signature {signature} but is called with ({call}): {error}. Let it take "
                "prompts, responses, the columns it needs, and **columns for the others"
            ) from None


def check_room(reward: Reward, tokenizer, prompt: Text, response_length: int) -> None:
    """ConfigError for a reward model with too few positions for this prompt and a response of response_length tokens.

    tokenizer: the policy's. If the reward model has another vocabulary, the response's length in its tokens is unknown,
    and only the prompt is checked.
    """
    for part, _ in _parts(reward).values():
        if isinstance(part, RewardModelReward):
            same = part.tokenizer.get_vocab() == tokenizer.get_vocab()
            longest = len(part.encode(prompt, "")) + same * response_length  # encode counts the eos of a cut response
            advice = f"lower max_prompt_length or response_length, or leave the reward {part.name!r} out"
            check_lengths(part.model, part.tokenizer, longest, advice)


class _LoopThread(threading.Thread):
    """A thread with an event loop that runs until the process ends."""

    def __init__(self):
        super().__init__(name="rlhf_fast async rewards", daemon=True)
        self.loop = asyncio.new_event_loop()

    def run(self) -> None:
        while True:  # one of these from a reward ends run_forever(), and would leave its caller waiting
            with contextlib.suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()


@functools.cache
def _loop_thread(process: int, caller: _LoopThread | None) -> _LoopThread:
    """The thread whose loop awaits rewards. It is the same in every call, because a reward's HTTP client or semaphore
    belongs to the loop that first used it.

    process: the id of this process, because a fork inherits the loop but not the thread.
    caller: the loop thread of a reward that calls other rewards. While it waits it blocks its loop, so these get
    another.
    """
    thread = _LoopThread()
    thread.start()
    return thread


def _wait_for(awaitables: list) -> list:
    """Their results. They run in another thread, because in a notebook this one already has a running loop."""

    async def together():
        tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # if one has failed, nobody waits for the others
                task.cancel()

    here = threading.current_thread()
    thread = _loop_thread(os.getpid(), here if isinstance(here, _LoopThread) else None)
    future = asyncio.run_coroutine_threadsafe(together(), thread.loop)
    try:
        return future.result()
    finally:
        future.cancel()  # after Ctrl-C during the wait


def _first_odd(returned) -> str:
    """The first entry that is not a number, and its place; whatever was returned if it is not a list."""
    if isinstance(returned, list | tuple):
        for i, value in enumerate(returned):
            try:
                float(value)
            except (TypeError, ValueError, RuntimeError):
                return f"{reprlib.repr(value)} for response {i}"
    return reprlib.repr(returned)


def _checked(name: str, returned, responses: Sequence[str]) -> Tensor:
    if isinstance(returned, np.ndarray):
        returned = returned.copy()  # torch does not accept negative strides, which x[::-1] has
    try:
        scores = torch.as_tensor(returned, dtype=torch.float32).detach().cpu()
    except OverflowError as error:  # without the number: Python refuses to print very long ones
        raise ConfigError(f"reward {name!r} returned a number too large for a float ({error})") from error
    except (TypeError, ValueError, RuntimeError) as error:  # what torch raises for None, text or ragged lists
        raise ConfigError(
            f"reward {name!r} must return one number for each response, got {_first_odd(returned)}"
        ) from error
    if scores.shape != (len(responses),):
        raise ConfigError(
            f"reward {name!r} returned shape {tuple(scores.shape)} for {len(responses)} responses; it must return one "
            "number for each response"
        )
    return scores

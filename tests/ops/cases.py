"""One case per op: what to call, what it must equal, how to draw its inputs. test_contract.py does the rest.

To add an op, append a Case. `inputs(s)` draws one call's keyword arguments from a Sampler: floating tensors in float64
(the battery casts them), shapes small and ragged, every option sometimes on. Everything else follows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch

import rlhf_fast as rf
from rlhf_fast.ops import reference


class Sampler:
    """Draws tensors and options from one random.Random, so that hypothesis can steer and shrink it."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def integer(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def choice(self, *options):
        return options[self.rng.randrange(len(options))]

    def flag(self) -> bool:
        return self.choice(False, True)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.randrange(2**31))

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return mean + scale * torch.randn(shape, generator=self.generator(), dtype=torch.float64)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator(), dtype=torch.float64)

    def labels(self, *shape: int, vocab: int) -> torch.Tensor:
        return torch.randint(vocab, shape, generator=self.generator())

    def mask(self, *shape: int) -> torch.Tensor:
        """Ragged, full, empty, or with a whole empty row."""
        mask = torch.rand(shape, generator=self.generator()) < self.choice(0.0, 0.5, 0.9, 1.0)
        if self.flag() and shape and shape[0]:
            mask[0] = False
        return mask

    def logits(self, *shape: int) -> torch.Tensor:
        """Random, shifted, peaked, or with -inf where a sampler would forbid tokens (never a whole row)."""
        x = self.normal(*shape, scale=self.choice(0.1, 1.0, 20.0), mean=self.choice(0.0, -100.0, 170.0))
        if self.flag() and shape[-1] > 1:
            forbidden = torch.rand(shape, generator=self.generator()) < 0.3
            forbidden[..., : shape[-1] // 2] |= self.flag()  # a whole leading block
            forbidden[..., -1] = False
            x = x.masked_fill(forbidden, -torch.inf)
        return x


class Case(NamedTuple):
    name: str
    op: Callable  # the public function
    reference: Callable  # the same in plain PyTorch
    inputs: Callable[[Sampler], dict]
    wrt: tuple[str, ...]  # the differentiable arguments
    masked: tuple[str, ...] = ()  # arguments whose values do not count where mask is False, even NaN
    rowwise: tuple[str, ...] = ()  # arguments with a batch axis, of an op whose result for a row depends on it only
    size: float = 1e-3  # size of the terms of a sum: if they cancel, their rounding errors remain
    large: Callable[[Sampler], dict] | None = None  # inputs with GPT-2's vocabulary and few rows


def token_logprobs_inputs(s: Sampler) -> dict:
    shape = s.choice((), (s.integer(0, 5),), (s.integer(1, 3), s.integer(1, 4)))
    vocab = s.choice(1, 7, 33, 640, 1100)
    inputs = {
        "logits": s.logits(*shape, vocab),
        "labels": s.labels(*shape, vocab=vocab),
        "temperature": s.choice(1.0, 0.7, 2.5),
    }
    return inputs | ({"mask": s.mask(*shape)} if s.flag() else {})


def ppo_loss_inputs(s: Sampler) -> dict:
    shape = (s.integer(0, 4), s.choice(0, 1, 7, 33, 600))
    old_logprobs = -5 * s.uniform(*shape)
    inputs = {
        "logprobs": old_logprobs + s.normal(*shape, scale=s.choice(0.0, 0.01, 0.5, 3.0, 8.0)),
        "old_logprobs": old_logprobs,
        "advantages": s.normal(*shape) * (s.uniform(*shape) < 0.9),
        "mask": s.mask(*shape),
        "cliprange": s.choice(0.2, 0.1),
        "loss_agg_mode": s.choice(*reference.AGGREGATIONS),
    }
    if s.flag():
        inputs |= {"cliprange_high": 0.28, "dual_clip": 3.0}
    if s.flag():
        inputs |= {"log_ratio_clamp": s.choice(1.0, 20.0)}
    if s.flag():
        inputs |= {"ref_logprobs": old_logprobs + s.normal(*shape, scale=0.5), "kl_coef": s.choice(0.0, 0.1)}
        inputs |= {"kl_estimator": s.choice(*reference.KL_ESTIMATORS)}
    if s.flag():
        inputs |= {"entropy": 5 * s.uniform(*shape), "entropy_coef": s.choice(0.0, 0.01)}
    if s.flag():
        inputs |= {"importance_weights": 2 * s.uniform(*shape)}
    if s.flag():
        inputs |= {"normalizer": s.choice(5, 0.5, torch.tensor(7), torch.tensor(3.0))}
    if s.choice(True, False, False, False):
        inputs |= {"old_logprobs": None}
    return inputs


def linear_inputs(s: Sampler, *shape: int) -> dict:
    vocab, width = s.choice(1, 7, 33, 640), s.choice(1, 5, 16)
    inputs = {
        "hidden": s.normal(*shape, width),
        "weight": s.normal(vocab, width, scale=s.choice(0.1, 1.0)),
        "labels": s.labels(*shape, vocab=vocab),
    }
    if s.flag():
        inputs["bias"] = s.normal(vocab)
    if s.flag():
        inputs["softcap"] = s.choice(2.0, 30.0)
    return inputs


def some_shape(s: Sampler) -> tuple[int, ...]:
    return s.choice((), (s.integer(0, 5),), (s.integer(1, 3), s.integer(1, 4)))


def linear_token_logprobs_inputs(s: Sampler) -> dict:
    shape = some_shape(s)
    inputs = linear_inputs(s, *shape) | {"temperature": s.choice(1.0, 0.7, 2.5), "with_entropy": s.flag()}
    return inputs | ({"mask": s.mask(*shape)} if s.flag() else {})


def with_ignored_labels(s: Sampler, inputs: dict) -> dict:
    inputs["labels"] = inputs["labels"].masked_fill(~s.mask(*inputs["labels"].shape), -100)
    return inputs | ({"normalizer": s.choice(5, 0.5, torch.tensor(7), torch.tensor(3.0))} if s.flag() else {})


def cross_entropy_inputs(s: Sampler) -> dict:
    inputs = token_logprobs_inputs(s)
    logits, labels = inputs["logits"], inputs["labels"]
    if s.choice(True, True, True, False):  # one label at -inf makes the whole loss infinite: not in most draws
        forbidden = logits.gather(-1, labels[..., None]).squeeze(-1) == -torch.inf
        labels = labels.masked_fill(forbidden, logits.shape[-1] - 1)  # never forbidden
    return with_ignored_labels(s, {"logits": logits, "labels": labels})


def linear_ppo_loss_inputs(s: Sampler) -> dict:
    ppo = ppo_loss_inputs(s)
    ppo = {k: v for k, v in ppo.items() if k != "entropy"}
    shape = ppo.pop("logprobs").shape
    if shape[1] > 40:
        shape = (shape[0], 40)
        ppo = {k: v[:, :40] if torch.is_tensor(v) and v.ndim == 2 else v for k, v in ppo.items()}
    return linear_inputs(s, *shape) | ppo | {"temperature": s.choice(1.0, 0.7), "with_logprobs": s.flag()}


def kl_divergence_inputs(s: Sampler) -> dict:
    shape = (*some_shape(s), s.choice(1, 7, 33, 640, 5000))
    logits = s.logits(*shape)
    ref_logits = s.normal(*shape, scale=s.choice(0.1, 3.0), mean=s.choice(0.0, 100.0))
    inputs = {"logits": logits, "ref_logits": ref_logits.masked_fill(logits == -torch.inf, -torch.inf)}
    return inputs | ({"mask": s.mask(*shape[:-1])} if s.flag() else {})


GPT2_VOCAB = 50257


def large_kl_divergence_inputs(s: Sampler) -> dict:
    return {name: s.normal(3, GPT2_VOCAB, scale=3.0) for name in ("logits", "ref_logits")}


def large_linear_inputs(s: Sampler, *shape: int) -> dict:
    return {
        "hidden": s.normal(*shape, 12),
        "weight": s.normal(GPT2_VOCAB, 12),
        "labels": s.labels(*shape, vocab=GPT2_VOCAB),
        "bias": s.normal(GPT2_VOCAB),
    }


def large_linear_ppo_loss_inputs(s: Sampler) -> dict:
    linear = large_linear_inputs(s, 2, 4)
    logprobs = reference.linear_token_logprobs(**linear)
    return linear | {
        "old_logprobs": logprobs + s.normal(2, 4, scale=0.3),
        "advantages": s.normal(2, 4),
        "mask": s.uniform(2, 4) < 0.8,
        "ref_logprobs": logprobs + s.normal(2, 4, scale=0.3),
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
    }


def value_loss_inputs(s: Sampler) -> dict:
    shape = (s.integer(0, 4), s.choice(0, 1, 7, 33, 600))
    old_values, mean = s.normal(*shape), s.choice(0.0, 100.0)  # returns far from 0 ask for more than a sum of squares
    inputs = {
        "values": mean + old_values + s.normal(*shape, scale=s.choice(0.0, 0.1, 1.0)),
        "old_values": mean + old_values,
        "returns": mean + s.normal(*shape),
        "mask": s.mask(*shape),
        "cliprange_value": s.choice(0.2, 0.5, None),
        "loss_agg_mode": s.choice(*reference.AGGREGATIONS),
    }
    return inputs | ({"normalizer": s.choice(5, 0.5, torch.tensor(7))} if s.flag() else {})


def kl_penalty_inputs(s: Sampler) -> dict:
    shape = s.choice((), (s.integer(0, 40),), (s.integer(0, 4), s.choice(1, 7, 600)), (2, 3, s.integer(0, 5)))
    ref = -5 * s.uniform(*shape)
    return {
        "logprobs": ref + s.normal(*shape, scale=s.choice(0.0, 1e-3, 0.5, 8.0)),
        "ref_logprobs": ref,
        "estimator": s.choice(*reference.KL_ESTIMATORS),
        "input_clamp": s.choice(None, 1.0, 20.0),
        "output_clamp": s.choice(None, 0.5, 10.0),
    }


def gae_inputs(s: Sampler) -> dict:
    shape = (s.integer(0, 20), s.choice(0, 1, 7, 128, 300))
    return {
        "rewards": s.normal(*shape),
        "values": s.normal(*shape),
        "mask": s.mask(*shape),
        "gamma": s.choice(1.0, 0.9),
        "lam": s.choice(1.0, 0.95, 0.0),
        "gap_mode": s.choice("carry", "zero"),
    }


def pairwise_loss_inputs(s: Sampler) -> dict:
    n = s.choice(0, 1, 7, 600)
    inputs = {"chosen": s.normal(n, scale=s.choice(0.1, 3.0, 60.0)), "rejected": s.normal(n)}
    if s.flag():
        inputs |= {"margin": s.choice(0.5, s.uniform(n))}
    if s.flag():
        inputs |= {"target_prob": s.choice(0.8, 0.0, s.uniform(n))}
    if s.flag():
        inputs |= {"weights": s.uniform(n) * (s.uniform(n) < 0.8)}
    if s.flag():
        inputs |= {"center_coef": 0.01}
    return inputs


def ranking_loss_inputs(s: Sampler) -> dict:
    n, k = s.integer(0, 5), s.integer(1, 9)
    ranks = s.labels(n, k, vocab=k + 1) - 1 if s.flag() else s.labels(n, vocab=k + 1)  # or counts
    return {"rewards": s.normal(n, k, scale=s.choice(0.1, 3.0, 60.0)), "ranks": ranks}


def dpo_loss_inputs(s: Sampler) -> dict:
    n = s.choice(0, 1, 7, 600)
    ref_chosen, ref_rejected = -100 * s.uniform(n), -100 * s.uniform(n)
    return {
        "chosen_logprobs": ref_chosen + s.normal(n, scale=5.0),
        "rejected_logprobs": ref_rejected + s.normal(n, scale=5.0),
        "ref_chosen_logprobs": ref_chosen,
        "ref_rejected_logprobs": ref_rejected,
        "beta": s.choice(0.1, 1.0),
        "label_smoothing": s.choice(0.0, 0.2),
    }


def masked_mean_inputs(s: Sampler) -> dict:
    shape = s.choice((), (s.integer(0, 40),), (s.integer(0, 4), s.choice(0, 1, 600)), (2, 3, s.integer(0, 5)))
    inputs = {"values": s.normal(*shape, mean=s.choice(0.0, 100.0))}
    if s.flag():
        inputs |= {"mask": s.mask(*shape)}
    if shape and s.flag():
        inputs |= {"dim": s.choice(0, -1, tuple(range(len(shape))))}
    return inputs


def masked_whiten_inputs(s: Sampler) -> dict:
    shape = s.choice((s.integer(0, 40),), (s.integer(0, 4), s.choice(0, 1, 600)), (2, 3, s.integer(0, 5)))
    inputs = {"values": s.normal(*shape, mean=s.choice(0.0, 3.0)), "shift_mean": s.flag()}
    return inputs | ({"mask": s.mask(*shape)} if s.flag() else {})


CASES = [
    Case(
        "token_logprobs", rf.token_logprobs, reference.token_logprobs, token_logprobs_inputs,
        wrt=("logits",), masked=("logits",), rowwise=("logits", "labels", "mask"),
    ),
    Case(
        "token_logprobs_and_entropy", rf.token_logprobs_and_entropy, reference.token_logprobs_and_entropy,
        token_logprobs_inputs, wrt=("logits",), masked=("logits",), rowwise=("logits", "labels", "mask"),
        size=1 / 8,  # an entropy near 0 has log(sum of exp) with an error of 2^-24, half a bit of a sum near 1
    ),
    Case(
        "ppo_loss", rf.ppo_loss, reference.ppo_loss, ppo_loss_inputs, wrt=("logprobs", "entropy"),
        masked=("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy", "importance_weights"),
        size=1.0,
    ),
    Case(
        "kl_divergence", rf.kl_divergence, reference.kl_divergence, kl_divergence_inputs, wrt=("logits", "ref_logits"),
        masked=("logits", "ref_logits"), rowwise=("logits", "ref_logits", "mask"), size=1.0,
        large=large_kl_divergence_inputs,
    ),
    Case(
        "cross_entropy", rf.cross_entropy, reference.cross_entropy, cross_entropy_inputs, wrt=("logits",),
        size=1.0,
    ),
    Case(
        "linear_token_logprobs", rf.linear_token_logprobs, reference.linear_token_logprobs,
        linear_token_logprobs_inputs, wrt=("hidden", "weight", "bias"), masked=("hidden",),
        rowwise=("hidden", "labels", "mask"), size=1.0,
    ),
    Case(  # the forward then computes what the backward multiplies
        "linear_token_logprobs_frozen_head", rf.linear_token_logprobs, reference.linear_token_logprobs,
        linear_token_logprobs_inputs, wrt=("hidden",), masked=("hidden",), rowwise=("hidden", "labels", "mask"),
        size=1.0,
    ),
    Case(
        "linear_cross_entropy", rf.linear_cross_entropy, reference.linear_cross_entropy,
        lambda s: with_ignored_labels(s, linear_inputs(s, *some_shape(s))), wrt=("hidden", "weight", "bias"), size=1.0,
        large=lambda s: with_ignored_labels(s, large_linear_inputs(s, 8)),
    ),
    Case(
        "linear_ppo_loss", rf.linear_ppo_loss, reference.linear_ppo_loss, linear_ppo_loss_inputs,
        wrt=("hidden", "weight", "bias"),
        masked=("hidden", "old_logprobs", "advantages", "ref_logprobs", "importance_weights"), size=1.0,
        large=large_linear_ppo_loss_inputs,
    ),
    Case(
        "value_loss", rf.value_loss, reference.value_loss, value_loss_inputs, wrt=("values",),
        masked=("values", "old_values", "returns"), size=1.0,
    ),
    Case(
        "kl_penalty", rf.kl_penalty, reference.kl_penalty, kl_penalty_inputs, wrt=("logprobs", "ref_logprobs"),
        rowwise=("logprobs", "ref_logprobs"),
    ),
    Case(
        "gae", rf.gae, reference.gae, gae_inputs, wrt=(), masked=("rewards", "values"),
        rowwise=("rewards", "values", "mask"), size=1.0,
    ),
    Case(
        "pairwise_loss", rf.pairwise_loss, reference.pairwise_loss, pairwise_loss_inputs, wrt=("chosen", "rejected"),
        size=1.0,
    ),
    Case("ranking_loss", rf.ranking_loss, reference.ranking_loss, ranking_loss_inputs, wrt=("rewards",), size=1.0),
    Case(
        "dpo_loss", rf.dpo_loss, reference.dpo_loss, dpo_loss_inputs, wrt=("chosen_logprobs", "rejected_logprobs"),
        size=1.0,
    ),
    Case("masked_mean", rf.masked_mean, reference.masked_mean, masked_mean_inputs, wrt=("values",), masked=("values",)),
    Case(
        "masked_whiten", rf.masked_whiten, reference.masked_whiten, masked_whiten_inputs, wrt=("values",),
        masked=("values",), size=1.0,
    ),
]  # fmt: skip

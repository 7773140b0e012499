"""PPO on a language model, held near a reference by a per-token KL (Ziegler et al. 2019; Ouyang et al. 2022).

    rollout      sample a response to each prompt
    score        reward(prompt, response); logprobs, ref_logprobs and values of every response token
    rewards      -kl_coef KL_t, plus the score on the last token
    advantages   GAE, whitened over the batch
    update       num_ppo_epochs of shuffled minibatches: clipped surrogate + vf_coef * clipped value loss

The micro-batches of the first epoch are drawn before scoring, and the old log-probabilities come from the function that
trains, on those very micro-batches: matrix products round differently for other shapes. So the ratio of the first
minibatch is exactly 1; policy/first_minibatch_max_abs_log_ratio shows it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..advantages import KLController, kl_shaped_rewards
from ..data.formats import Prompt
from ..data.formats import prompts as read_prompts
from ..models import (
    ValueModel,
    check_lengths,
    check_lm_head,
    disable_dropout,
    hidden_states,
    lm_head,
    load_policy,
    load_tokenizer,
    make_reference,
    scalar_head,
)
from ..ops import gae, linear_token_logprobs, masked_mean, masked_whiten, ppo_loss, value_loss
from ..rewards import compute_scores, make_reward
from ..rollout import Rollout, generate, rollout_metrics, squeeze, text_metrics
from . import common


@dataclass
class PPOConfig:
    """Names are TRL's where TRL has the thing. Sizes count responses unless they say tokens."""

    output_dir: str = "runs/ppo"
    seed: int = 0
    total_episodes: int | None = None  # responses sampled in all, rounded up to whole batches; None: one per prompt
    batch_size: int = 512  # responses per iteration, that is per rollout
    minibatch_size: int = 64  # responses per optimizer step; divides batch_size
    micro_batch_size: int | None = None  # responses per forward and backward, None: all; changes memory, not the result
    generation_batch_size: int = 128
    num_ppo_epochs: int = 4
    response_length: int = 53  # tokens at most, eos included
    max_prompt_length: int = 512  # tokens
    on_overlong: str = "error"  # or "skip": leave longer prompts out, and name them
    temperature: float = 0.7  # of sampling, and so of every log-probability
    learning_rate: float = 3e-6
    value_learning_rate: float | None = None  # of a separate value model; None: learning_rate
    lr_scheduler_type: str = "linear"  # over iterations
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_target: float | None = (
        None  # nats per response, summed over its tokens like objective/kl; None: kl_coef is fixed
    )
    kl_horizon: float = 10_000.0  # responses over which the adaptive kl_coef reacts, see KLController
    target_kl: float | None = None  # nats per token (k3) from the old policy to the new one; beyond it the update stops
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False  # scales the per-token rewards to variance 1 and leaves their mean
    missing_eos_penalty: float | None = None  # subtracted from the score of a response that was cut
    share_trunk: bool = False  # the value head sits on the policy's own trunk: one forward and backward for both
    logging_steps: int = 1
    eval_steps: int = 0  # iterations between evaluations; 0: only at the end
    save_steps: int = 0  # 0: only when interrupted
    save_total_limit: int = 2
    num_samples: int = 8  # answers written to samples.jsonl at every evaluation

    def __post_init__(self):
        common.check_config(
            self,
            positive=(
                "total_episodes", "batch_size", "minibatch_size", "micro_batch_size", "generation_batch_size",
                "num_ppo_epochs", "response_length", "max_prompt_length", "temperature", "learning_rate",
                "value_learning_rate", "kl_target", "kl_horizon", "target_kl", "cliprange", "cliprange_value",
                "logging_steps", "save_total_limit",
            ),
            non_negative=(
                "weight_decay", "max_grad_norm", "kl_coef", "vf_coef", "missing_eos_penalty", "eval_steps",
                "save_steps", "num_samples",
            ),
            unit=("gamma", "lam", "warmup_ratio"),
            choices={
                "lr_scheduler_type": common.SCHEDULES, "kl_estimator": ("k1", "k2", "k3"),
                "on_overlong": ("error", "skip"),
            },
        )  # fmt: skip
        if self.batch_size % self.minibatch_size:
            raise common.ConfigError(
                f"PPOConfig.batch_size = {self.batch_size} must be a multiple of minibatch_size = {self.minibatch_size}"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise common.ConfigError("PPOConfig: kl_target moves kl_coef by factors, so kl_coef must start above 0")


class PPOTrainer:
    """Iterate it for a dict of metrics per iteration, or call train() for the run with log, evaluation and checkpoints.

    model: the policy, a causal language model, or its name or path. tokenizer: by default the model's.
    reward: reward model, its path, function(prompts, responses, **columns), or list of (any of these, weight).
    Datasets have a prompt (text or messages); their other columns go to the reward functions.
    ref_model: by default a frozen copy of the policy as it comes in.
    value_model: a ValueModel, or a reward model to start one from; by default the policy's trunk under a head of zeros.
    eval_rewards: {name: reward that the policy never trains on}, read on eval_dataset as eval_<name>: what is right,
    beside what is optimised.
    """

    def __init__(
        self, config: PPOConfig, model, *, reward, train_dataset, eval_dataset=None, tokenizer=None, ref_model=None,
        value_model=None, eval_rewards=None,
    ):  # fmt: skip
        common.set_seed(config.seed)
        self.config = config
        self.tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
        options = {"max_length": config.max_prompt_length, "on_overlong": config.on_overlong}
        self.prompts, report = read_prompts(train_dataset, self.tokenizer, **options)
        self.reports, self.eval_prompts = [report], []
        if eval_dataset is not None:
            self.eval_prompts, report = read_prompts(eval_dataset, self.tokenizer, **options, name="eval_dataset")
            self.reports.append(report)
        self.policy = load_policy(model)
        if ref_model is self.policy:
            raise common.ConfigError(
                "PPOTrainer: ref_model is the policy itself, so KL would stay 0; give none or a copy"
            )
        if taken := {"scores", "kl"}.intersection(eval_rewards or ()):
            raise common.ConfigError(
                f"PPOTrainer: eval_rewards may not be called {min(taken)!r}, eval_{min(taken)} is what the run logs "
                "itself; rename it"
            )
        self.reward = make_reward(reward, self.tokenizer)
        self.eval_rewards = {name: make_reward(r, self.tokenizer) for name, r in (eval_rewards or {}).items()}
        self.reference = make_reference(self.policy) if ref_model is None else load_policy(ref_model)
        self.reference.eval().requires_grad_(False)

        learning_rates = [config.learning_rate, config.value_learning_rate or config.learning_rate]
        if config.share_trunk:
            if value_model is not None:
                raise common.ConfigError(
                    "PPOTrainer: share_trunk puts the value head on the policy; give no value_model"
                )
            self.value_model = ValueModel.from_policy(self.policy)
            setattr(self.value_model.model, self.value_model.model.base_model_prefix, self.policy.base_model)
            trained = [[self.policy, self.value_model]]
        else:
            if value_model is None:
                value_model = ValueModel.from_policy(self.policy)
            is_value_model = isinstance(value_model, ValueModel)
            self.value_model = value_model if is_value_model else ValueModel.from_reward_model(value_model)
            trained = [[self.policy], [self.value_model]]
        longest = max(map(len, self.prompts + self.eval_prompts)) + config.response_length
        for network in (self.policy, self.reference, self.value_model.model):
            check_lengths(network, self.tokenizer, longest)
            disable_dropout(network)  # under dropout the first ratios would be noise around 1
        check_lm_head(self.policy)
        self.optimizers = [
            common.make_optimizer(models, rate, config.weight_decay)
            for models, rate in zip(trained, learning_rates, strict=False)
        ]
        self.step, self.total_steps = 0, -(-(config.total_episodes or len(self.prompts)) // config.batch_size)
        self.schedulers = [
            common.make_scheduler(optimizer, config.lr_scheduler_type, self.total_steps, config.warmup_ratio)
            for optimizer in self.optimizers
        ]
        self.kl_controller = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self._held_out: tuple[int, Rollout, dict[str, Tensor]] | None = None  # see _look_at_held_out

    def __iter__(self) -> Iterator[dict]:
        while self.step < self.total_steps:
            yield self._iteration()

    def _iteration(self) -> dict:
        config, clock = self.config, [time.perf_counter()]
        generator = torch.Generator().manual_seed((1_000_003 * config.seed + self.step) % 2**63)

        rollout = self._rollout(self._next_prompts(), generator)
        clock.append(time.perf_counter())

        rollout.scores = self._scores(self.reward, rollout)
        if config.missing_eos_penalty is not None:
            rollout.scores = rollout.scores - config.missing_eos_penalty * ~rollout.ended
        sizes = (rollout.lengths, config.minibatch_size, config.micro_batch_size)
        plan = [minibatches(*sizes, generator) for _ in range(config.num_ppo_epochs)]
        self._score_tokens(rollout, plan[0])

        kl_coef = self.kl_controller.kl_coef
        rollout.rewards, kl = kl_shaped_rewards(
            rollout.scores, rollout.logprobs, rollout.ref_logprobs, rollout.response_mask,
            kl_coef=kl_coef, kl_estimator=config.kl_estimator,
        )  # fmt: skip
        if config.whiten_rewards:
            rollout.rewards = masked_whiten(rollout.rewards, rollout.response_mask, shift_mean=False)
        advantages, rollout.returns = gae(
            rollout.rewards, rollout.values, rollout.response_mask, gamma=config.gamma, lam=config.lam
        )
        rollout.advantages = masked_whiten(advantages, rollout.response_mask)
        clock.append(time.perf_counter())

        metrics = {**rollout_metrics(rollout, kl, kl_coef), **self._update(rollout, plan)}
        clock.append(time.perf_counter())

        self.kl_controller.update(float(kl.sum(1).mean()), len(kl))
        metrics["lr"] = self.schedulers[0].get_last_lr()[0]
        for scheduler in self.schedulers:
            scheduler.step()
        self.step += 1
        seconds = dict(zip(("generate", "score", "update"), np.diff(clock).tolist(), strict=True))
        return {
            **metrics,
            "episode": self.step * config.batch_size,
            **{f"timing_s/{name}": value for name, value in seconds.items()},
            "perf/throughput": rollout.response_mask.sum() / (clock[-1] - clock[0]),  # response tokens per second
        }

    # --- rollout and scores, without gradients ---

    def _next_prompts(self) -> list[Prompt]:
        """batch_size prompts; an epoch passes once over all of them, in an order that depends on seed and epoch."""
        size, count = self.config.batch_size, len(self.prompts)
        epochs = range(self.step * size // count, (self.step * size + size - 1) // count + 1)
        orders = [np.random.default_rng([self.config.seed % 2**32, epoch]).permutation(count) for epoch in epochs]
        return [self.prompts[i] for i in np.concatenate(orders)[self.step * size % count :][:size]]

    def _rollout(self, prompts: list[Prompt], generator: torch.Generator) -> Rollout:
        return generate(
            self.policy, self.tokenizer, prompts, max_new_tokens=self.config.response_length,
            temperature=self.config.temperature, batch_size=self.config.generation_batch_size, generator=generator,
        )  # fmt: skip

    def _scores(self, reward, rollout: Rollout) -> Tensor:
        scores = compute_scores(reward, rollout.prompts, rollout.responses, rollout.columns)
        return scores.to(rollout.response_ids.device)

    @torch.no_grad()
    def _score_tokens(self, rollout: Rollout, plan: list[list[Tensor]]) -> None:
        """Fills logprobs, values and ref_logprobs, one micro-batch of the plan at a time."""
        for name in ("logprobs", "values", "ref_logprobs"):
            setattr(rollout, name, torch.zeros(rollout.response_mask.shape, device=rollout.response_mask.device))
        for rows in chain.from_iterable(plan):
            rollout.logprobs[rows], _, rollout.values[rows] = self._look(rollout, rows)
            input_ids, positions, labels = squeeze(rollout, rows)
            hidden = _hidden_at(self.reference, input_ids, positions)
            rollout.ref_logprobs[rows] = rollout.scatter(rows, self._logprobs(self.reference, hidden, labels)[0])

    def _look(self, rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Policy and critic on b rows -> logprobs, entropy, values, each (b, R) and 0 outside the mask.

        Scoring and training both come through here. Only the N response tokens reach the two heads.
        """
        input_ids, positions, labels = squeeze(rollout, rows)
        hidden = _hidden_at(self.policy, input_ids, positions)  # (N, D)
        logprobs, entropy = self._logprobs(self.policy, hidden, labels)
        if not self.config.share_trunk:
            hidden = _hidden_at(self.value_model.model, input_ids, positions)
        values = scalar_head(self.value_model.model, hidden)
        return tuple(rollout.scatter(rows, x) for x in (logprobs, entropy, values))

    def _logprobs(self, model, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias, softcap = lm_head(model)
        return linear_token_logprobs(
            hidden, weight, labels, bias=bias, softcap=softcap, temperature=self.config.temperature, with_entropy=True
        )

    # --- update ---

    def _update(self, rollout: Rollout, plan: list[list[list[Tensor]]]) -> dict:
        """One optimizer step per minibatch of the plan -> their mean statistics. Past target_kl the rest is dropped."""
        steps: list[dict] = []
        for minibatch in chain.from_iterable(plan):
            stats = self._accumulate_gradient(rollout, minibatch)
            if self.config.target_kl is not None and float(stats["policy/approxkl_k3_avg"]) > self.config.target_kl:
                for optimizer in self.optimizers:
                    optimizer.zero_grad(set_to_none=True)
                break
            norms = [common.optimizer_step(o, max_grad_norm=self.config.max_grad_norm) for o in self.optimizers]
            steps.append({**stats, **dict(zip(("policy/grad_norm", "critic/grad_norm"), norms, strict=False))})
        largest = [step.pop("max_abs_log_ratio") for step in steps]
        return {
            **{name: sum(step[name] for step in steps) / len(steps) for name in steps[0]},
            "policy/first_minibatch_max_abs_log_ratio": largest[0],
            "policy/max_abs_log_ratio": max(largest),
            "policy/updates": len(steps),
        }

    def _accumulate_gradient(self, rollout: Rollout, minibatch: list[Tensor]) -> dict:
        """Backward through the micro-batches of one minibatch -> statistics, means over its tokens.

        The losses are divided by the tokens of the whole minibatch, so the split changes memory and not the gradient.
        """
        config, stats = self.config, defaultdict(lambda: torch.zeros((), device=rollout.response_ids.device))
        num_tokens = rollout.response_mask[torch.cat(minibatch)].sum()
        for rows in minibatch:
            mask = rollout.response_mask[rows]
            logprobs, entropy, values = self._look(rollout, rows)
            policy_loss, p = ppo_loss(
                logprobs, rollout.logprobs[rows], rollout.advantages[rows], mask,
                cliprange=config.cliprange, normalizer=num_tokens,
            )  # fmt: skip
            critic_loss, v = value_loss(
                values, rollout.values[rows], rollout.returns[rows], mask,
                cliprange_value=config.cliprange_value, normalizer=num_tokens,
            )  # fmt: skip
            (policy_loss + config.vf_coef * critic_loss).backward()

            stats["loss/policy_avg"] += p["policy_loss"]
            stats["loss/value_avg"] += v["value_loss"]
            stats["max_abs_log_ratio"] = torch.maximum(stats["max_abs_log_ratio"], p["max_abs_log_ratio"])
            for name, mean in {
                "policy/approxkl_avg": p["approx_kl_k2"], "policy/approxkl_k3_avg": p["approx_kl_k3"],
                "policy/clipfrac_avg": p["clipfrac_high"] + p["clipfrac_low"],
                "policy/entropy_avg": masked_mean(entropy.detach(), mask), "val/clipfrac_avg": v["clipfrac"],
                "val/ratio": p["ratio_mean"], "val/ratio_var": p["ratio_var"],
            }.items():  # fmt: skip
                stats[name] += mean * (p["num_tokens"] / num_tokens)
        return stats

    # --- the run: see common.run_training ---

    def train(self, resume: bool = False) -> common.RunResult:
        return common.run_training(self, resume=resume)

    def evaluate(self) -> dict:
        """On the held-out prompts: eval_scores by the reward that is optimised, eval_<name> by each of eval_rewards."""
        if not self.eval_prompts:
            return {}
        rollout, scores = self._look_at_held_out()
        self._score_tokens(
            rollout, minibatches(rollout.lengths, self.config.minibatch_size, self.config.micro_batch_size)
        )
        return {
            **{f"eval_{name}": values.mean() for name, values in scores.items()},
            "eval_kl": (rollout.logprobs - rollout.ref_logprobs).sum(1).mean(),
            **{f"eval_{name}": value for name, value in text_metrics(rollout).items()},
        }

    def samples(self) -> list[dict]:
        rollout, scores = self._look_at_held_out()
        texts = zip(rollout.prompts, rollout.responses, strict=True)
        rows = [
            {"prompt": prompt, "response": response, **{name: float(values[i]) for name, values in scores.items()}}
            for i, (prompt, response) in enumerate(texts)
        ]
        return rows[: self.config.num_samples]

    def _look_at_held_out(self) -> tuple[Rollout, dict[str, Tensor]]:
        """Answers of this step's policy to eval_dataset (or a few training prompts), always on one seed, and scores."""
        if self._held_out is None or self._held_out[0] != self.step:
            prompts = self.eval_prompts or self.prompts[: max(1, self.config.num_samples)]
            rollout = self._rollout(prompts, torch.Generator().manual_seed(self.config.seed))
            rewards = {"scores": self.reward, **self.eval_rewards}
            self._held_out = (self.step, rollout, {k: self._scores(r, rollout) for k, r in rewards.items()})
        return self._held_out[1:]

    def save_model(self, path) -> None:
        """The policy (AutoModelForCausalLM), and in value_model/ the critic (AutoModelForSequenceClassification)."""
        for model, folder in ((self.policy, Path(path)), (self.value_model, Path(path) / "value_model")):
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def state_dict(self) -> dict:
        """Prompts and sampling are functions of (seed, step), so the step stands for them."""
        return {
            "step": self.step,
            "kl_coef": self.kl_controller.kl_coef,
            "lengths": torch.tensor(list(map(len, self.prompts))),
            "policy": self.policy.state_dict(),
            "value_model": self.value_model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }

    def load_state_dict(self, state: dict) -> None:
        common.check_same_data(state["lengths"], list(map(len, self.prompts)))
        self.step, self.kl_controller.kl_coef = state["step"], state["kl_coef"]
        self.policy.load_state_dict(state["policy"])
        self.value_model.load_state_dict(state["value_model"])
        for kind, mine in (("optimizers", self.optimizers), ("schedulers", self.schedulers)):
            for one, saved in zip(mine, state[kind], strict=True):
                one.load_state_dict(saved)


def minibatches(
    lengths: Tensor, minibatch_size: int, micro_batch_size: int | None, generator: torch.Generator | None = None
) -> list[list[Tensor]]:
    """(B,) lengths -> [minibatch][micro-batch] -> row numbers; each row once, shuffled where there is a generator.

    The rows of a minibatch are sorted by length before they are split, so that a micro-batch has little padding.
    """
    order = torch.arange(len(lengths)) if generator is None else torch.randperm(len(lengths), generator=generator)
    sorted_rows = (
        rows[lengths[rows].argsort(descending=True, stable=True)]
        for rows in order.to(lengths.device).split(minibatch_size)
    )
    return [list(rows.split(micro_batch_size or minibatch_size)) for rows in sorted_rows]


def _hidden_at(model, input_ids: Tensor, positions: Tensor) -> Tensor:
    """(N, D): only the hidden states that predict a response token."""
    return hidden_states(model, input_ids).flatten(0, 1).index_select(0, positions)

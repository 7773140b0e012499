"""PPO on a language model, kept near a reference by a per-token KL (Ziegler et al. 2019; Ouyang et al. 2022).

    rollout      sample num_generations responses to each prompt
    score        reward(prompt, response); logprobs, ref_logprobs and values of every response token, if needed
    rewards      -kl_coef KL_t, plus the score on the last token
    advantages   GAE, or the whole reward minus a baseline that needs no critic (REINFORCE, RLOO, GRPO's group mean)
    update       num_ppo_epochs of shuffled minibatches: clipped surrogate + vf_coef * clipped value loss

The ratio of the first minibatch is exactly 1 on the CPU, and on a GPU except for the rounding of rows that are too long
for one pass of the kernel (logged as policy/first_minibatch_max_abs_log_ratio). For this, the minibatches are drawn
before scoring, and scoring computes the old log-probabilities on the micro-batches of the first epoch, with the same
function as training. On other shapes matrix products would round differently. If a rollout is learned from in a single
step, and nothing else needs the old log-probabilities (PPOConfig.needs_old_logprobs), scoring does not compute them:
that step computes the same numbers.

PPOTrainer._iteration is one iteration from top to bottom, and the methods that it calls follow in that order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from .. import parallel
from ..advantages import KLController, RunningStd, kl_shaped_rewards, sequence_advantages, shaped_scores
from ..data.chat import copied
from ..data.collate import Packed
from ..data.formats import Prompt
from ..data.formats import prompts as read_prompts
from ..models import (
    adapters_off,
    check_lengths,
    check_positions,
    lm_head,
    load_config,
    load_policy,
    load_tokenizer,
    save_model,
    stop_ids,
)
from ..monitors import Monitors
from ..ops import gae, linear_ppo_loss, linear_token_logprobs, masked_mean, masked_whiten, value_loss
from ..packing import packed_hidden_states, packing
from ..rewards import make_reward, score_components
from ..rollout import (
    Rollout,
    check_rollout_lists,
    generate,
    make_rollout,
    minibatches,
    packed_rows,
    right_padded,
    rollout_metrics,
    shared_prompts,
    text_metrics,
)
from ..sharding import gathered
from ..trunk import hidden_states_at
from . import common, optimizers, ppo_state
from .ppo_config import PPOConfig
from .ppo_networks import check_arguments, check_rewards, choose_critic, choose_reference, packs, prepare_networks
from .run import RunResult, run_training


class PPOTrainer:
    """Iterating over it yields a dict of metrics per iteration. train() does so with log, evaluation and checkpoints.

    model: the policy, a causal language model, or its name or path. tokenizer: by default the model's.
    reward: a reward model, its path, a function(prompts, responses, **columns), sync or async, or a list of (any of
    these, weight). Datasets have a prompt (text or messages); their other columns go to the reward functions.
    ref_model: by default a frozen copy of the given policy. With new LoRA adapters (config.lora_r) the reference is the
    policy itself with its adapters switched off. With kl_coef 0 there is none by default, and no KL in the log.
    value_model: a ValueModel, or a reward model, or its path, to start one from; by default the policy's trunk with a
    head of zeros. An advantage_estimator other than "gae" has no value model.
    eval_rewards: {name: reward that the policy never trains on}, logged for eval_dataset as eval_<name>. They measure
    the true goal, beside the reward that is optimised.
    rollout_func: replaces our sampling by another engine or a loop with tools, as in TRL's GRPOTrainer:
    (prompts, trainer) -> {"completion_ids": ..., ...}, the arguments of rollout.make_rollout.

    If there are several processes (parallel.py), the first one calls rollout_func for all, and each calls the rewards
    for its share of the responses.
    """

    def __init__(
        self, config: PPOConfig, model, *, reward, train_dataset, eval_dataset=None, tokenizer=None, ref_model=None,
        value_model=None, eval_rewards=None, rollout_func=None,
    ):  # fmt: skip
        common.start(config, PPOConfig)
        check_arguments(config, eval_rewards, eval_dataset, rollout_func)
        self.config, self.rollout_func = config, rollout_func
        self.tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
        self.prompts, self.eval_prompts, self.reports = common.read_datasets(
            read_prompts, train_dataset, eval_dataset, self.tokenizer, max_length=config.max_prompt_length,
            on_overlong=config.on_overlong,
        )  # fmt: skip
        self.data = common.digest(prompt.tokens for prompt in self.prompts)
        longest_prompt = max(self.prompts + self.eval_prompts, key=len)
        longest = len(longest_prompt) + config.response_length
        advice = "lower max_prompt_length or response_length"
        check_positions(load_config(model), longest, advice)  # before weights are read

        self.policy = common.with_adapters(load_policy(model), config, model)
        self.reward = make_reward(reward, self.tokenizer)
        self.eval_rewards = {name: make_reward(r, self.tokenizer) for name, r in (eval_rewards or {}).items()}
        self.reference = choose_reference(self.policy, ref_model, config, self.tokenizer)
        self.has_reference = ref_model is not None or bool(config.kl_coef)
        self.value_model = choose_critic(self.policy, value_model, config, self.tokenizer)
        check_rewards(self, longest_prompt)
        prepare_networks(self, self._networks(), longest, advice)
        self.packed = packs(self._trunks(), longest, config)
        common.share_out(self._networks(), config, self.data, self.eval_prompts)

        self.step, self.whole = 0, True
        self.total_steps = config.iterations(len(self.prompts))
        together = [self.policy, self.value_model] if config.share_trunk else [self.policy]
        learning = [(together, config.learning_rate)]
        if self.value_model and not config.share_trunk:
            learning.append(([self.value_model], config.value_learning_rate or config.learning_rate))
        learners = [optimizers.make_learner(models, config, self.total_steps, rate) for models, rate in learning]
        self.optimizers, self.schedulers = map(list, zip(*learners, strict=True))
        self.kl_controller = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.score_scale = RunningStd()
        self.guard = common.NonFiniteGuard(config.max_skipped_steps, config.output_dir)
        self.monitors = Monitors(config.monitors, config.stop_on)
        self._held_out: tuple[int, Rollout, dict[str, Tensor]] | None = None  # cache of _held_out_rollout
        common.seed_apart(config.seed)  # for rewards that draw numbers

    def _networks(self) -> list[nn.Module]:
        """The models that read prompt and response in the policy's tokens."""
        networks = (self.policy, self.reference, self.value_model and self.value_model.model)
        return [x for x in networks if x is not None]  # `if x` would call __len__, which raises for a compiled model

    def _trunks(self) -> list[nn.Module]:
        """Those with a trunk of their own, which is the one that scoring and training call."""
        return [x for x in self._networks() if not (self.config.share_trunk and x is self.value_model.model)]

    def __iter__(self) -> Iterator[dict]:
        with common.freed_memory_kept(self.policy):
            while self.step < self.total_steps:
                yield self._iteration()

    def _iteration(self) -> dict:
        config, clock = self.config, [time.perf_counter()]
        # One for each step, so that a resumed run draws what an uninterrupted one draws.
        generator = torch.Generator().manual_seed((1_000_003 * config.seed + self.step) % 2**63)

        rollout = self._rollout(self._next_prompts(), generator)
        clock.append(time.perf_counter())

        components = self._score(rollout)
        if bool(rollout.raw_scores.isfinite().all()):
            self.whole = False
            rollout.scores = self._training_scores(rollout)
            group = config.num_generations
            plan = [self._minibatches(rollout, generator, group) for _ in range(config.num_ppo_epochs)]
            self._score_tokens(rollout, plan[0], config.needs_old_logprobs)
            self._advantages(rollout)
            clock.append(time.perf_counter())

            updated = self._update(rollout, plan)
            coef = self.kl_controller.kl_coef
            metrics = rollout_metrics(rollout, coef, config.kl_estimator, shaped=config.shapes_scores) | updated
            # During the warm-up the policy does not move, and its KL says nothing about kl_coef.
            if config.kl_target is not None and not self._warming_up:
                self.kl_controller.update(float(metrics["objective/kl"]), len(rollout.prompts))
        else:
            self.guard.check(False, "the reward", rollout.texts_and_tokens, last=self._is_last)
            metrics = text_metrics(rollout)
        clock.append(time.perf_counter())

        metrics["lr"] = self.schedulers[0].get_last_lr()[0]
        for scheduler in self.schedulers:
            scheduler.step()
        self.step, self.whole = self.step + 1, True
        seconds = dict(zip(("generate", "score", "update"), np.diff(clock).tolist(), strict=False))
        return {
            **metrics,
            **components,
            "skipped_steps": self.guard.skipped,
            "episode": self.step * config.batch_size,
            **{f"timing_s/{name}": value for name, value in seconds.items()},
            "perf/throughput": rollout.response_mask.sum() / (clock[-1] - clock[0]),  # response tokens per second
        }

    # --- rollout and scores, without gradients ---

    def _next_prompts(self) -> list[Prompt]:
        """The prompts of one iteration, each num_generations times in a row.

        An epoch uses every prompt once, in an order that depends on seed and epoch.
        """
        size, count = self.config.batch_size // self.config.num_generations, len(self.prompts)
        first = self.step * size  # counted from the start of the run
        epochs = range(first // count, (first + size - 1) // count + 1)
        orders = [np.random.default_rng([self.config.seed % 2**32, epoch]).permutation(count) for epoch in epochs]
        chosen = np.concatenate(orders)[first % count :][:size]
        return [self.prompts[i] for i in np.repeat(chosen, self.config.num_generations)]

    def _rollout(self, prompts: list[Prompt], generator: torch.Generator, copies: int = 1) -> Rollout:
        """One response to each prompt. copies: how many times rollout_func gets each prompt, as in training; only the
        first response to it is used."""
        if self.rollout_func is not None:
            return self._rollout_of_engine(prompts, copies)
        with gathered(self.policy):
            return generate(
                self.policy, self.tokenizer, prompts, max_new_tokens=self.config.response_length,
                temperature=self.config.temperature, batch_size=self.config.generation_batch_size, generator=generator,
                bf16=self.config.bf16,
            )  # fmt: skip

    def _rollout_of_engine(self, prompts: list[Prompt], copies: int) -> Rollout:
        """The Rollout that rollout_func returns. ConfigError if the models cannot read it, before anything changes."""
        texts = copied([prompt.prompt for prompt in prompts for _ in range(copies)])
        with gathered(self.policy):
            lists = parallel.on_first(lambda: self.rollout_func(texts, self))
        embedded = min(network.get_input_embeddings().weight.shape[0] for network in self._networks())
        check_rollout_lists(lists, len(texts), embedded, with_logprobs=self.config.importance_cap is not None)
        lists = {name: None if rows is None else rows[::copies] for name, rows in lists.items()}
        stops = stop_ids(self.policy, self.tokenizer)
        rollout = make_rollout(self.tokenizer, prompts, stop_token_ids=stops, **lists, device=self.policy.device)
        for network in self._networks():
            check_lengths(network, self.tokenizer, int(rollout.lengths.max()), "let rollout_func return fewer tokens")
        return rollout

    def _score(self, rollout: Rollout) -> dict:
        """Sets raw_scores -> mean and standard deviation of each part of the reward, for the log."""
        scores, parts = self._score_with(self.reward, rollout)
        rollout.raw_scores = scores.to(rollout.response_ids.device)
        means = {f"rewards/{name}/mean": values.mean() for name, values in parts.items()}
        return means | {f"rewards/{name}/std": _std(values) for name, values in parts.items()}

    def _score_with(self, reward, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """rewards.score_components of all answers. Each process scores its part, whole groups of num_generations."""
        rows, scored = parallel.block(len(rollout.prompts), self.config.num_generations), None
        with parallel.raise_in_all():
            if rows.start < rows.stop:
                columns = {name: values[rows] for name, values in rollout.columns.items()}
                scored = score_components(reward, rollout.prompts[rows], rollout.responses[rows], columns)
        scores, parts = zip(*filter(None, parallel.all_gather(scored)), strict=True)
        return torch.cat(scores), {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _training_scores(self, rollout: Rollout) -> Tensor:
        """raw_scores scaled, clipped, minus penalties."""
        config, scores = self.config, rollout.raw_scores
        if config.scale_scores:
            scores = scores / self.score_scale.update(scores)
        return shaped_scores(
            scores, rollout.response_mask.sum(1), rollout.ended, clip_range=config.reward_clip_range,
            missing_eos_penalty=config.missing_eos_penalty, length_penalty=config.length_penalty,
            length_budget=config.length_budget,
        )  # fmt: skip

    def _minibatches(
        self, rollout: Rollout, generator: torch.Generator | None = None, group: int = 1
    ) -> list[list[Tensor]]:
        """rollout.minibatches with the config's sizes."""
        config, micro_batch_size = self.config, self.config.micro_batch_size
        if parallel.size() > 1:  # enough micro-batches for every process, to give all about equally many tokens
            share = config.minibatch_size // parallel.size()
            most = share if micro_batch_size or config.micro_batch_tokens else max(1, share // 4)
            micro_batch_size = min(micro_batch_size or most, most)
        return minibatches(
            rollout.lengths, config.minibatch_size, micro_batch_size, micro_batch_tokens=config.micro_batch_tokens,
            generator=generator, group=group, shared=shared_prompts(rollout, group) if self.packed else None,
        )  # fmt: skip

    def _share(self, rollout: Rollout, minibatch: list[Tensor]) -> list[Tensor]:
        """The micro-batches of this process. With padding, every process has about equally many tokens."""
        lengths = rollout.lengths.tolist()
        return parallel.share(minibatch, [len(rows) * max(lengths[i] for i in rows.tolist()) for rows in minibatch])

    @torch.no_grad()
    def _score_tokens(
        self, rollout: Rollout, plan: list[list[Tensor]], with_policy: bool = True, with_values: bool = True
    ) -> None:
        """Sets logprobs, values (if there is a critic) and ref_logprobs (if there is a reference), one micro-batch of
        the plan at a time. with_policy=False leaves logprobs 0, for the update to add them."""
        values = with_values and self.value_model is not None
        needed = {"logprobs": with_policy, "values": values, "ref_logprobs": self.has_reference}
        filled = [name for name, is_needed in needed.items() if is_needed]
        for name in ("logprobs", *filled):
            setattr(rollout, name, torch.zeros_like(rollout.response_mask, dtype=torch.float32))
        if not filled:
            return
        with self.gathered(), parallel.raise_in_all(), packing(*self._trunks(), on=self.packed):
            for rows in chain.from_iterable(self._share(rollout, minibatch) for minibatch in plan):
                *inputs, labels = self._layout(rollout, rows)
                hidden = None
                if with_policy:
                    hidden = self._hidden_states(self.policy, *inputs)
                    rollout.logprobs[rows] = rollout.scatter(rows, self._logprobs(self.policy, hidden, labels))
                if values:
                    rollout.values[rows] = self._values(rollout, rows, inputs, hidden)
                if self.has_reference:
                    rollout.ref_logprobs[rows] = rollout.scatter(rows, self._reference_logprobs(*inputs, labels))
        for name in filled:
            parallel.all_reduce_sum(getattr(rollout, name))  # each row is 0 in all processes but one

    @property
    def _layout(self) -> Callable[[Rollout, Tensor], tuple]:
        return packed_rows if self.packed else right_padded

    # Scoring and training both call the next two, so that their numbers are equal.

    def _values(self, rollout: Rollout, rows: Tensor, inputs: Sequence, hidden: Tensor) -> Tensor:
        """The critic on b rows -> (b, R) values, 0 outside the mask. hidden: those of the policy on the same inputs,
        which the head on a shared trunk reads."""
        if not self.config.share_trunk:
            hidden = self._hidden_states(self.value_model.model, *inputs)
        elif self.config.detach_values:
            hidden = hidden.detach()
        return rollout.scatter(rows, self.value_model.head(hidden))

    def _hidden_states(self, model, tokens: Tensor | Packed, positions: Tensor) -> Tensor:
        """(N, D) of a trunk: those that predict the N response tokens, as _layout places them."""
        read = packed_hidden_states if self.packed else hidden_states_at
        with common.autocast(model, self.config.bf16):
            hidden = read(model, tokens, positions)
        return hidden.bfloat16() if self.config.bf16 else hidden

    def _reference_logprobs(self, tokens: Tensor | Packed, positions: Tensor, labels: Tensor) -> Tensor:
        with adapters_off(self.policy) if self.reference is None else nullcontext():
            model = self.policy if self.reference is None else self.reference
            return self._logprobs(model, self._hidden_states(model, tokens, positions), labels)

    def _logprobs(self, model, hidden: Tensor, labels: Tensor) -> Tensor:
        hidden, weight, bias, softcap = lm_head(model, hidden)
        with common.autocast(model, self.config.bf16):
            return linear_token_logprobs(
                hidden, weight, labels, bias=bias, softcap=softcap, temperature=self.config.temperature
            )

    def _advantages(self, rollout: Rollout) -> None:
        """Sets rewards and advantages, and returns, value_error and importance_weights if the config needs them."""
        config, mask = self.config, rollout.response_mask
        kl = rollout.kl(config.kl_estimator) if config.kl_in_rewards else None
        rollout.rewards = kl_shaped_rewards(rollout.scores, mask, kl, kl_coef=self.kl_controller.kl_coef)
        if config.whiten_rewards:
            rollout.rewards = masked_whiten(rollout.rewards, mask, shift_mean=False)
        if config.advantage_estimator == "gae":
            advantages, rollout.returns = gae(rollout.rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
            rollout.advantages = advantages
            if config.scale_advantages != "none":
                rollout.advantages = masked_whiten(advantages, mask)
                rollout.value_error = masked_mean(advantages.square(), mask) + 1e-8
        else:
            rollout.advantages = sequence_advantages(
                rollout.rewards, mask, config.advantage_estimator, config.num_generations, scale=config.scale_advantages
            )
        if config.importance_cap is not None:
            # Truncated importance sampling (Espeholt et al. 2018; Yao et al. 2025): the engine's distribution differs
            # slightly from ours, and the weight corrects for it with bounded variance.
            ratio = (rollout.logprobs - rollout.rollout_logprobs).exp()
            rollout.importance_weights = ratio.clamp(max=config.importance_cap).masked_fill(~mask, 0.0)

    # --- update ---

    @property
    def _is_last(self) -> bool:
        return self.step + 1 == self.total_steps

    @property
    def _warming_up(self) -> bool:
        return self.step < self.config.critic_warmup_steps

    def _update(self, rollout: Rollout, plan: list[list[list[Tensor]]]) -> dict:
        """One optimizer step per minibatch of the plan -> their mean statistics. Stops if the KL exceeds target_kl."""
        config, steps = self.config, []
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)  # an interrupted step may have left gradients
        for minibatch in chain.from_iterable(plan):
            stats = self._accumulate_gradient(rollout, minibatch)
            # The first step is always taken, because before it the policy is still the old one.
            if steps and config.target_kl is not None and float(stats["policy/approxkl_k3_avg"]) > config.target_kl:
                for optimizer in self.optimizers:
                    optimizer.zero_grad(set_to_none=True)
                break
            norms = [optimizers.optimizer_step(o, max_grad_norm=config.max_grad_norm) for o in self.optimizers]
            finite = all(bool(norm.isfinite()) for norm in norms)
            last = self._is_last and minibatch is plan[-1][-1]
            self.guard.check(finite, "the gradient", partial(rollout.texts_and_tokens, torch.cat(minibatch)), last)
            steps.append({**stats, **dict(zip(("policy/grad_norm", "critic/grad_norm"), norms, strict=False))})
        if not config.needs_old_logprobs:
            parallel.all_reduce_sum(rollout.logprobs)  # as in _score_tokens
        largest = [step.pop("max_abs_log_ratio") for step in steps]
        return {
            **{name: sum(step[name] for step in steps) / len(steps) for name in steps[0]},
            "policy/first_minibatch_max_abs_log_ratio": largest[0],
            "policy/max_abs_log_ratio": max(largest),
            "policy/updates": len(steps),
        }

    def _accumulate_gradient(self, rollout: Rollout, minibatch: list[Tensor]) -> dict:
        """Backward through the micro-batches of one minibatch -> statistics, means over its tokens.

        The losses are divided by the number of tokens (or sequences) in the whole minibatch, so the split changes only
        the memory (with several processes also the time), not the gradient.
        """
        with common.learning_together(self.config), packing(*self._trunks(), on=self.packed):
            parts = self._backward(rollout, minibatch)
        largest = parallel.all_reduce_max(torch.stack([part.pop("max_abs_log_ratio") for part in parts]).max())
        sums = parallel.all_reduce_sum(torch.stack([sum(part[name] for part in parts) for name in parts[0]]))
        stats = dict(zip(parts[0], sums, strict=True)) | {"max_abs_log_ratio": largest}
        stats["val/ratio_var"] -= (stats["val/ratio"] - 1).square()  # of the whole minibatch
        return stats

    def _backward(self, rollout: Rollout, minibatch: list[Tensor]) -> list[dict]:
        """Computes this process's part of the gradient -> the statistics of each of its micro-batches, to be summed."""
        config, seen = self.config, []
        every_row = torch.cat(minibatch)
        num_tokens, num_rows = rollout.response_mask[every_row].sum(), len(every_row)
        normalizers = {"token-mean": num_tokens, "seq-mean-token-sum-norm": num_rows * config.response_length}
        normalizer = normalizers.get(config.loss_agg_mode, num_rows)
        # The op aggregates the entropy like the loss. The log has nats per token (seq-mean-token-mean: of a sequence).
        per_token = 1.0 if config.loss_agg_mode == "seq-mean-token-mean" else normalizer / num_tokens
        for rows, counts in common.equally_many(self._share(rollout, minibatch), minibatch[-1][-1:], config):
            mask = rollout.response_mask[rows] & counts
            *inputs, _ = self._layout(rollout, rows)
            with torch.set_grad_enabled(not self._warming_up):
                hidden = self._hidden_states(self.policy, *inputs)
                policy_loss, p = self._policy_loss(rollout, rows, hidden, mask, normalizer)
            if not config.share_trunk and not self._warming_up:
                policy_loss.backward()  # now, so that its graph is gone before a critic of its own makes another
            v = None
            if self.value_model is not None:
                values = self._values(rollout, rows, inputs, hidden)
                critic_loss, v = self._critic_loss(rollout, rows, values, mask, num_tokens)
                (critic_loss + policy_loss if config.share_trunk else critic_loss).backward()
            seen.append(_statistics(p, v, p["num_tokens"] / num_tokens, per_token, with_kl=self.has_reference))
        return seen

    def _policy_loss(self, rollout: Rollout, rows: Tensor, hidden: Tensor, mask: Tensor, normalizer):
        config, weights = self.config, rollout.importance_weights
        old = rollout.logprobs[rows] if config.needs_old_logprobs else None
        hidden, weight, bias, softcap = lm_head(self.policy, hidden)
        with common.autocast(self.policy, config.bf16):
            loss, statistics, logprobs = linear_ppo_loss(
                rollout.scatter(rows, hidden), weight, rollout.response_ids[rows], old, rollout.advantages[rows], mask,
                bias=bias, softcap=softcap, temperature=config.temperature, cliprange=config.cliprange,
                cliprange_high=config.cliprange_high, dual_clip=config.dual_clip,
                ref_logprobs=rollout.ref_logprobs[rows] if self.has_reference else None,
                kl_coef=self.kl_controller.kl_coef if config.kl_in_loss else 0.0, kl_estimator=config.kl_estimator,
                entropy_coef=config.entropy_coef, importance_weights=None if weights is None else weights[rows],
                loss_agg_mode=config.loss_agg_mode, normalizer=normalizer, with_logprobs=True,
            )  # fmt: skip
        if old is None:
            rollout.logprobs[rows] += logprobs  # rows that do not count add 0, and may be here a second time
        return loss, statistics

    def _critic_loss(self, rollout: Rollout, rows: Tensor, values: Tensor, mask: Tensor, normalizer):
        loss, statistics = value_loss(
            values, rollout.values[rows], rollout.returns[rows], mask, cliprange_value=self.config.cliprange_value,
            normalizer=normalizer,
        )  # fmt: skip
        if self.config.share_trunk and rollout.value_error is not None:
            # Both losses train the same trunk. Whitening has made the scale of the policy's gradient independent of the
            # scale of the rewards. Here the critic's becomes so too; otherwise it would be too weak if the rewards are
            # small.
            loss = loss / rollout.value_error
        return self.config.vf_coef * loss, statistics

    # --- the run: see run.py ---

    def train(self, resume: bool = False) -> RunResult:
        """Trains to the end and writes config.output_dir (run.run_training lists the files). resume=True continues from
        its newest checkpoint. ConfigError if output_dir holds a run and resume is False."""
        return run_training(self, resume=resume)

    def evaluate(self) -> dict:
        """On the held-out prompts: eval_scores by the reward that is optimised, eval_<name> by each of eval_rewards.

        Each has its standard error beside it, as eval_..._stderr (NaN for a single prompt).
        """
        if not self.eval_prompts:
            return {}
        rollout, scores = self._held_out_rollout()
        errors = {f"{name}_stderr": _std(x) / (len(x) - 1) ** 0.5 for name, x in scores.items()}
        metrics = {**{name: x.mean() for name, x in scores.items()}, **errors, **text_metrics(rollout)}
        if self.has_reference:
            self._score_tokens(rollout, self._minibatches(rollout), with_values=False)
            metrics["kl"] = rollout.kl("k1").sum(1).mean()
        return {f"eval_{name}": value for name, value in metrics.items()}

    def samples(self) -> list[dict]:
        """The first num_samples answers of _held_out_rollout, each with its prompt and scores."""
        if not self.config.num_samples:  # without an eval_dataset nothing has to be sampled then
            return []
        rollout, scores = self._held_out_rollout()
        numbers = {name: values.tolist() for name, values in scores.items()}
        columns = {"prompt": rollout.prompts, "response": rollout.responses, **numbers}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return rows[: self.config.num_samples]

    def _held_out_rollout(self) -> tuple[Rollout, dict[str, Tensor]]:
        """The current policy's answers to eval_dataset (or a few training prompts), always on one seed, and scores."""
        if self._held_out is None or self._held_out[0] != self.step:
            prompts = self.eval_prompts or self.prompts[: self.config.num_samples]
            generator = torch.Generator().manual_seed(self.config.seed)
            rollout = self._rollout(prompts, generator, copies=self.config.num_generations)
            rewards = {"scores": self.reward, **self.eval_rewards}
            scores = {name: self._score_with(reward, rollout)[0] for name, reward in rewards.items()}
            self._held_out = (self.step, rollout, scores)
        return self._held_out[1:]

    def gathered(self):
        return gathered(*self._networks())

    def save_model(self, path) -> None:
        """The policy (AutoModelForCausalLM), and in value_model/ the critic (AutoModelForSequenceClassification)."""
        ppo_state.save_models(self, path)

    def save_in_checkpoint(self, path) -> None:
        if self.config.share_trunk:  # the critic is this policy with the head in state.pt
            save_model(self.policy, self.tokenizer, path)
        else:
            self.save_model(path)

    def state_dict(self) -> dict:
        return ppo_state.state_of(self)

    def load_state_dict(self, state: dict) -> None:
        ppo_state.load_state(self, state)


def _statistics(
    p: dict[str, Tensor], v: dict[str, Tensor] | None, share: Tensor, per_token: Tensor | float, with_kl: bool
) -> dict[str, Tensor]:
    """The terms that a micro-batch adds to the statistics of its minibatch.

    p: the statistics of linear_ppo_loss; v: those of value_loss, None without a critic. Their losses and entropy are
    divided by the normalizer. The rest are means over the micro-batch, which has this share of the tokens.
    """
    return {
        "max_abs_log_ratio": p["max_abs_log_ratio"],
        "loss/policy_avg": p["policy_loss"],
        **({"loss/kl_avg": p["kl"]} if with_kl else {}),
        "policy/entropy_avg": p["entropy"] * per_token,
        "policy/approxkl_avg": p["approx_kl_k2"] * share,
        "policy/approxkl_k3_avg": p["approx_kl_k3"] * share,
        "policy/clipfrac_avg": (p["clipfrac_high"] + p["clipfrac_low"]) * share,
        "policy/dual_clipfrac_avg": p["dual_clipfrac"] * share,
        "val/ratio": p["ratio_mean"] * share,
        "val/ratio_var": (p["ratio_var"] + (p["ratio_mean"] - 1).square()) * share,
        **({"loss/value_avg": v["value_loss"], "val/clipfrac_avg": v["clipfrac"] * share} if v else {}),
    }


def _std(scores: Tensor) -> Tensor:
    """The standard deviation of (B,) scores. In float64 it is exactly 0 if all are equal; in float32 it may not be."""
    return scores.double().std(correction=0)

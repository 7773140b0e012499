"""Reward model: a scalar r(x, y), learned from which of several responses is better (Ouyang et al. 2022, eq. 1).

    pairs     loss = - p log sigma(r_w - r_l - margin) - (1 - p) log sigma(r_l - r_w + margin) + c (r_w + r_l)^2
    K ranked  loss = mean over the pairs i better than j of - log sigma(r_i - r_j)

p is 1, or the judge's probability that the first response is better (chosen_prob); c is center_rewards_coefficient. All
responses of a micro-batch are in one row without padding, and the prompt is computed once for all its responses
(packing.py). The head reads the hidden state at eos, the last real token. The saved model is a transformers
AutoModelForSequenceClassification with num_labels=1.
"""

from __future__ import annotations

import json
import math
import warnings
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import parallel
from ..data.collate import collate_comparisons, common_prefix, pack_comparisons
from ..data.files import as_records
from ..data.floors import accuracy, bag_of_words, longer_wins, shorter_wins
from ..data.formats import PAIR_COLUMNS, Comparison, as_pairs, comparisons, responses_to_score
from ..errors import ConfigError
from ..models import (
    check_causal,
    check_lengths,
    disable_dropout,
    evaluating,
    has_adapters,
    load_reward_model,
    load_tokenizer,
    loadable,
    save_model,
    scalar_head,
    score_tokens,
    set_reward_scale,
    train_last_layers,
    unwrapped,
    with_own_pad,
)  # fmt: skip
from ..ops import pairwise_loss, ranking_loss
from ..packing import FLASH, packed_hidden_states, packing
from ..preferences import Pairs, evaluate_pairs
from ..rewards import RewardModelReward
from ..sharding import gathered
from . import common, optimizers
from .reward_config import RewardConfig
from .run import RunResult, run_training


class RewardTrainer:
    """Iterating over it yields a dict of metrics per step. train() does so with log, evaluation and checkpoints.

    model: a language model, whose trunk is copied (models.load_reward_model), or a reward model to train further, or
    the name or path of either.
    tokenizer: by default the model's. If it pads with eos, the reward model gets its own pad token (with_own_pad).
    Datasets: data/formats.py. If every prompt has two responses, the loss is that of pairs, else that of K ranked ones.
    reference_dataset: responses (demonstrations or comparisons). The rewards of the trained model are scaled so that
    these responses have mean 0 and standard deviation 1. The scale is measured at the end and saved with the model.

    Dropout is off, so that the same network computes both rewards of a pair.
    """

    def __init__(
        self, config: RewardConfig, model, *, train_dataset, eval_dataset=None, reference_dataset=None, tokenizer=None
    ):
        common.start(config, RewardConfig)
        self.config = config
        self.tokenizer = with_own_pad(load_tokenizer(model if tokenizer is None else tokenizer))
        options = {"max_length": config.max_length, "on_overlong": config.on_overlong}
        common.check_best(config, eval_dataset)
        self.records = as_records(train_dataset, "train_dataset")
        self.eval_records = None if eval_dataset is None else as_records(eval_dataset, "eval_dataset")
        self.items, self.eval_items, self.reports = common.read_datasets(
            comparisons, self.records, self.eval_records, self.tokenizer, **options
        )
        self.width = max(len(item.responses) for item in self.items + self.eval_items)
        self._check_pairs()
        if not any(item.weight for item in self.items):
            raise ConfigError("train_dataset: every record has weight 0, so there is nothing to learn from")
        self.reference: list[np.ndarray] = []
        if reference_dataset is not None:
            self.reference, report = responses_to_score(reference_dataset, self.tokenizer, **options)
            self.reports.append(report)
            if (different := len({response.tobytes() for response in self.reference})) < 2:
                raise ConfigError(
                    f"{report}; a standard deviation needs two different responses, and there is {different}"
                )
        self.model = load_reward_model(model, self.tokenizer)
        set_reward_scale(self.model, 0.0, 1.0)  # removes the scale of an earlier training
        longest = max(map(len, [*self.items, *self.eval_items, *self.reference]))
        check_lengths(self.model, self.tokenizer, longest)
        disable_dropout(self.model)
        if not has_adapters(self.model) or config.freeze_trunk:
            unwrapped(self.model).base_model.requires_grad_(not config.freeze_trunk)
        if config.train_last_layers:
            train_last_layers(self.model, config.train_last_layers)
        self.model = common.prepare(self.model, config, model)
        check_causal(self.model)  # else what follows a response in its row would change its reward
        self.packed = common.packing_if_possible(self.model, longest, config.bf16)
        self.evaluation: Pairs | None = None  # of the last evaluate()

        self.lengths = [len(item) for item in self.items]
        self.data = common.digest(
            array
            for x in self.items
            for array in (*x.responses, [len(r) for r in x.responses], x.ranks, [x.margin, x.chosen_prob, x.weight])
        )
        self.batch_size = common.batch_size(config)
        self.total_steps = common.steps_in_run(len(self.items), config)
        common.share_out([self.model], config, self.data, self.eval_items)
        self.optimizer, self.scheduler = optimizers.make_learner(self.model, config, self.total_steps)
        self.step, self.num_tokens, self.whole = 0, 0, True
        self.guard = common.NonFiniteGuard(config.max_skipped_steps, config.output_dir)
        common.seed_apart(config.seed)  # for lora_dropout

    def _check_pairs(self) -> None:
        """ConfigError if the data ranks more than two responses and something is set that only pairs have."""
        if self.width <= 2:
            return
        default, items = Comparison([], []), self.items + self.eval_items
        used = [name for name in PAIR_COLUMNS if any(getattr(item, name) != getattr(default, name) for item in items)]
        if self.config.center_rewards_coefficient:
            used.append("center_rewards_coefficient")
        if used:
            raise ConfigError(
                f"{', '.join(used)} is defined for pairs, and the data ranks {self.width} responses: leave it out, or "
                "give the data as pairs of chosen and rejected"
            )

    def __iter__(self):
        batches = common.run_batches(
            self.lengths, self.batch_size, seed=self.config.seed, start=self.step, stop=self.total_steps,
            by_length=not self.packed,
        )  # fmt: skip
        with common.freed_memory_kept(self.model):
            for epoch, indices in batches:
                yield {"epoch": epoch, **self._train_step([self.items[i] for i in indices])}

    def _train_step(self, items: list[Comparison]) -> dict:
        total = sum(item.weight for item in items)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)  # an interrupted step may have left gradients
        seen = []

        tokens = [sum(map(len, item.responses)) for item in items]
        with common.learning_together(self.config), packing(self.model, on=self.packed):
            for part, counts in common.micro_batches(items, tokens, self.config):
                rewards, batch = self._rewards(part)
                # The loss is a weighted mean over prompts, so this is its share of the step's mean.
                share = counts * sum(item.weight for item in part) / total if total else 0.0
                (self._loss(rewards, batch)[0] * share).backward()
                if counts:
                    seen.append((rewards.detach(), batch))

        taken = common.take_step(self, items, sum(tokens))
        metrics = self._metrics(list(chain(*parallel.all_gather(_on_cpu(seen))))) | taken
        self.whole = True
        return metrics

    def _rewards(self, items: list[Comparison]) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, K) rewards in one forward pass, and the batch. A rank of -1 means that there is no response."""
        with common.autocast(self.model, self.config.bf16):
            if not self.packed:
                batch = collate_comparisons(items, self.tokenizer.pad_token_id, self.width, self.model.device)
                return score_tokens(self.model, batch["input_ids"], batch["attention_mask"])[batch["slot"]], batch
            share = unwrapped(self.model).config._attn_implementation not in FLASH
            packed, batch = pack_comparisons(items, self.width, self.model.device, share=share)
            hidden = packed_hidden_states(self.model, packed, batch["last"])
        return scalar_head(self.model, hidden)[batch["slot"]], batch

    def _loss(self, rewards: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.width > 2:
            return ranking_loss(rewards, batch["ranks"])
        return pairwise_loss(
            rewards[:, 0], rewards[:, 1], margin=batch["margin"], target_prob=batch["chosen_prob"],
            center_coef=self.config.center_rewards_coefficient, weights=batch["weight"],
        )  # fmt: skip

    def _metrics(self, seen: list[tuple[Tensor, dict[str, Tensor]]]) -> dict:
        """Loss, accuracy (as in preferences.py), margin and spread of the rewards, over all micro-batches together."""
        rewards = torch.cat([r for r, _ in seen])
        batch = {name: torch.cat([b[name] for _, b in seen]) for name in _LABELS}
        loss, stats = self._loss(rewards, batch)
        if self.width == 2:  # the op's accuracy ignores soft labels
            stats["accuracy"] = accuracy(rewards[:, 0] - rewards[:, 1], batch["chosen_prob"], batch["weight"])
        real = rewards[batch["ranks"] >= 0]
        return {
            "loss": loss,
            "accuracy": stats["accuracy"],
            "margin": stats["margin"],
            "mean_reward": real.mean(),
            "min_reward": real.min(),
            "max_reward": real.max(),
            "reward_std": real.std(correction=0),
            "num_pairs": stats["num_pairs"],
        }

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Over the whole eval_dataset: eval_loss, eval_margin, eval_mean_reward, eval_reward_std, ..., eval_accuracy
        with its 95 % interval, eval_ece and eval_length_correlation (preferences.py)."""
        if not self.eval_items:
            return {}
        order = common.epoch_batches(list(map(len, self.eval_items)), self.config.per_device_eval_batch_size)
        batches = [[self.eval_items[i] for i in indices] for indices in order]
        with self.gathered(), evaluating(self.model), packing(self.model, on=self.packed):
            seen = parallel.map_shares(lambda share: _on_cpu([self._rewards(items) for items in share]), batches)
        rewards = torch.cat([r for r, _ in seen])
        self.evaluation = _pairs(list(chain(*batches)), rewards.numpy())
        judged = evaluate_pairs(self.evaluation, {})
        if broken := judged["not_finite"]:
            message = f"rewards of {broken} of {judged['pairs']} held-out pairs are not finite; these count as wrong"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        metrics = {f"eval_{k}": v for k, v in self._metrics(seen).items()}
        return metrics | {
            "eval_accuracy": judged["accuracy"],
            "eval_accuracy_low": judged["low"],
            "eval_accuracy_high": judged["high"],
            "eval_ece": judged["calibration"]["ece"],
            "eval_length_correlation": judged["length_correlation"]["reward_with_length"],
        }

    def finish(self, run_dir: Path) -> None:
        """After the last step: writes preferences.json (with the floors, for the report), sets the reward scale."""
        self._write_preferences(run_dir)
        if self.reference:
            self._set_scale()

    def _write_preferences(self, run_dir: Path) -> None:
        if self.eval_items and self.evaluation is None:  # resumed after the last evaluation was logged
            self.evaluate()
        if self.evaluation is not None:
            held_out = as_pairs(self.eval_records[item.index] for item in self.eval_items)
            train = as_pairs(self.records[item.index] for item in self.items)
            floors = {
                "shorter response wins": shorter_wins(held_out),
                "longer response wins": longer_wins(held_out),
                "bag of words": bag_of_words(train, held_out),
            }
            judged = evaluate_pairs(self.evaluation, floors)
            if parallel.rank() == 0:
                (run_dir / "preferences.json").write_text(json.dumps(judged, indent=1) + "\n", encoding="utf-8")

    def _set_scale(self) -> None:
        """Gives the rewards of reference_dataset mean 0 and standard deviation 1."""
        set_reward_scale(self.model, 0.0, 1.0)  # an earlier end of this run may have set it and then failed
        with self.gathered():
            rewards = RewardModelReward(self.model, self.tokenizer).score(self.reference)
        mean, std = float(rewards.mean()), float(rewards.std(correction=0))
        if not (math.isfinite(std) and std > 1e-5 * float(rewards.abs().max())):  # rounding: about 1e-6
            what = "do not differ" if math.isfinite(std) else "are not finite"
            message = f"the rewards of the reference set {what} (mean {mean:.4g}, standard deviation {std:.4g})"
            warnings.warn(f"{message}, so the reward keeps its own scale", RuntimeWarning, stacklevel=3)
            mean, std = mean if math.isfinite(mean) else 0.0, 1.0
        set_reward_scale(self.model, mean, std)

    def samples(self) -> list[dict]:
        """The first held-out prompts (without an eval_dataset: training prompts), each response with its reward, best
        first. Prompts that on_overlong skipped are missing; responses that it cut are scored as cut."""
        records, items = (self.eval_records, self.eval_items) if self.eval_items else (self.records, self.items)
        items, reward = items[: self.config.num_samples], RewardModelReward(self.model, self.tokenizer)
        rows = []
        with self.gathered():
            scores = [reward.score(item.responses).tolist() for item in items]
        for item, rewards in zip(items, scores, strict=True):
            texts = [text if isinstance(text, str) else text[-1]["content"] for text in item.texts]
            prompt = records[item.index].get("prompt")
            if not prompt:  # responses that are messages contain the prompt
                prompt = "" if isinstance(item.texts[0], str) else item.texts[0][:-1]
            rows += [
                {"record": item.index, "prompt": prompt, "response": x, "reward": r}
                for x, r in zip(texts, rewards, strict=True)
            ]
        return rows

    def train(self, resume: bool = False) -> RunResult:
        """Trains to the end and writes config.output_dir (run.run_training lists the files). resume=True continues from
        its newest checkpoint. ConfigError if output_dir holds a run and resume is False."""
        return run_training(self, resume=resume)

    def gathered(self):
        return gathered(self.model)

    def save_model(self, path) -> None:
        save_model(loadable(self.model), self.tokenizer, path)

    def save_in_checkpoint(self, path) -> None:
        save_model(self.model, self.tokenizer, path)

    def state_dict(self) -> dict:
        return common.state_of(self)

    def load_state_dict(self, state: dict) -> None:
        common.load_state(self, state)


_LABELS = ("ranks", *PAIR_COLUMNS)


def _on_cpu(seen: list[tuple[Tensor, dict[str, Tensor]]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The rewards and labels on the CPU, without the tokens, to send them to the other processes."""
    return [(rewards.cpu(), {name: batch[name].cpu() for name in _LABELS}) for rewards, batch in seen]


def _pairs(items: list[Comparison], rewards: np.ndarray) -> Pairs:
    """All pairs of responses to one prompt in which one is better; rewards (B, K) as _rewards returns them. The length
    of a response counts the tokens after the prefix that all responses of the prompt share."""
    rows = []
    for item, row in zip(items, rewards, strict=True):
        prefix = common_prefix(item.responses)
        for i, j in combinations(range(len(item.responses)), 2):
            if item.ranks[i] < item.ranks[j]:
                lengths = [len(item.responses[k]) - prefix for k in (i, j)]
                rows.append((row[[i, j]], lengths, item.chosen_prob, item.weight, item.source, item.prompt))
    rewards, lengths, targets, weights, sources, prompts = zip(*rows, strict=True)
    arrays = map(np.array, (rewards, lengths, targets, weights))
    return Pairs(*arrays, list(sources), np.array(prompts))

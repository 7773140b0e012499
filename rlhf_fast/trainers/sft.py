"""Supervised fine-tuning: maximise log pi(y | x) over the response tokens (Ouyang et al. 2022, section 3.5).

    loss = - sum over the response tokens of log pi(token | all tokens before it) / N

N is the number of response tokens in all micro-batches of the step together. So gradient accumulation changes only the
memory, and several processes (parallel.py) change only the time.
A micro-batch is one row of sequences without padding (packing.py). The lm_head runs only on the positions that predict
a response token, and its logits never exist as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import parallel
from ..data.chat import Encoded, as_messages, encode_prompt
from ..data.collate import collate_sft, pack_rows, pack_sft
from ..data.files import as_records
from ..data.formats import sft_examples
from ..generation import generate_text
from ..models import (
    check_lengths,
    check_lm_head,
    evaluating,
    hidden_states,
    lm_head,
    load_policy,
    load_tokenizer,
    positions_of,
    save_model,
    stop_at_eos,
)  # fmt: skip
from ..ops import linear_cross_entropy, token_logprobs_and_entropy
from ..packing import packed_hidden_states, packing
from ..sharding import gathered
from . import common, optimizers
from .run import RunResult, run_training
from .sft_config import SFTConfig


class SFTTrainer:
    """Iterating over it yields a dict of metrics per step. train() does so with log, evaluation and checkpoints.

    model: a causal language model, or its name or path. tokenizer: by default the model's. Datasets: data/formats.py.
    Training uses the dropout that the model's config has; evaluation uses none.
    """

    def __init__(self, config: SFTConfig, model, *, train_dataset, eval_dataset=None, tokenizer=None):
        common.start(config, SFTConfig)
        self.config = config
        self.tokenizer = load_tokenizer(model if tokenizer is None else tokenizer)
        records = as_records(train_dataset, "train_dataset")
        held_out = None if eval_dataset is None else as_records(eval_dataset, "eval_dataset")
        self.examples, self.eval_examples, self.reports = common.read_datasets(
            sft_examples, records, held_out, self.tokenizer, max_length=config.max_length,
            on_overlong=config.on_overlong,
        )  # fmt: skip
        common.check_best(config, eval_dataset)
        self.model = common.prepare(load_policy(model), config, model)
        longest = max(map(len, self.examples + self.eval_examples))
        check_lengths(self.model, self.tokenizer, longest)
        with common.autocast(self.model, config.bf16):
            check_lm_head(self.model)
        stop_at_eos(self.model, self.tokenizer)
        self.sample_prompts = self._choose_prompts(held_out or records)
        self.packed = common.packing_if_possible(self.model, longest, config.bf16, required=config.packing)

        self.lengths = [len(e) for e in self.examples]
        self.data = common.digest(array for e in self.examples for array in (e.input_ids, e.response_mask))
        self.rows = pack_rows(self.lengths, config.max_length) if config.packing else [[i] for i in range(len(self))]
        self.batch_size = common.batch_size(config)
        self.total_steps = common.steps_in_run(len(self.rows), config)
        common.share_out([self.model], config, self.data, self.eval_examples)
        self.optimizer, self.scheduler = optimizers.make_learner(self.model, config, self.total_steps)
        self.step, self.num_tokens, self.whole = 0, 0, True
        self.guard = common.NonFiniteGuard(config.max_skipped_steps, config.output_dir)
        common.seed_apart(config.seed)

    def __len__(self) -> int:
        """The number of examples to train on."""
        return len(self.examples)

    def __iter__(self):
        batches = common.run_batches(
            [sum(self.lengths[i] for i in row) for row in self.rows], self.batch_size, seed=self.config.seed,
            start=self.step, stop=self.total_steps, by_length=not self.packed,
        )  # fmt: skip
        with common.freed_memory_kept(self.model):
            for epoch, indices in batches:
                yield {"epoch": epoch, **self._train_step([[self.examples[i] for i in self.rows[r]] for r in indices])}

    def _train_step(self, rows: list[list[Encoded]]) -> dict:
        config = self.config
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)  # an interrupted step may have left gradients
        num_labels = max(1, sum(e.num_labels for row in rows for e in row))
        with_statistics = (self.step + 1) % config.logging_steps == 0
        loss = torch.zeros((), device=self.model.device)
        statistics = torch.zeros(3, dtype=torch.float64, device=self.model.device)

        tokens = [sum(map(len, row)) for row in rows]
        with common.learning_together(config), packing(self.model, on=self.packed):
            for part, counts in common.micro_batches(rows, tokens, config):
                hidden, labels = self._response_hidden([e for row in part for e in row])
                hidden, weight, bias, softcap = lm_head(self.model, hidden)
                with common.autocast(self.model, config.bf16):
                    micro_loss = counts * linear_cross_entropy(
                        hidden, weight, labels, bias=bias, softcap=softcap, normalizer=num_labels
                    )
                micro_loss.backward()
                loss += micro_loss.detach()
                if with_statistics:
                    statistics += counts * token_statistics(hidden, weight, bias, softcap, labels)

        taken = common.take_step(self, [e for row in rows for e in row], sum(tokens))
        metrics = {"loss": parallel.all_reduce_sum(loss), **taken}
        if with_statistics:
            _, correct, entropy = parallel.all_reduce_sum(statistics) / num_labels
            metrics |= {"mean_token_accuracy": correct, "entropy": entropy}
        self.whole = True
        return metrics

    @torch.no_grad()
    def evaluate(self) -> dict:
        """eval_loss (nats per response token), eval_perplexity, eval_mean_token_accuracy and eval_entropy (nats), over
        all response tokens of the eval_dataset."""
        num_labels = sum(e.num_labels for e in self.eval_examples)
        if not num_labels:
            return {}
        statistics = torch.zeros(3, dtype=torch.float64, device=self.model.device)
        batches = common.epoch_batches(list(map(len, self.eval_examples)), self.config.per_device_eval_batch_size)
        with self.gathered(), parallel.raise_in_all(), evaluating(self.model), packing(self.model, on=self.packed):
            for indices in parallel.share(batches):
                hidden, labels = self._response_hidden([self.eval_examples[i] for i in indices])
                statistics += token_statistics(*lm_head(self.model, hidden), labels)
        loss, correct, entropy = parallel.all_reduce_sum(statistics) / num_labels
        return {
            "eval_loss": loss, "eval_perplexity": loss.exp(), "eval_mean_token_accuracy": correct,
            "eval_entropy": entropy,
        }  # fmt: skip

    def _response_hidden(self, examples: list[Encoded]) -> tuple[Tensor, Tensor]:
        """(N, D) hidden states that predict the N response tokens, and these tokens (N,)."""
        with common.autocast(self.model, self.config.bf16):
            if self.packed:
                packed, batch = pack_sft(examples, self.model.device)
                hidden = packed_hidden_states(self.model, packed, batch["positions"])
            else:
                batch = collate_sft(examples, self.tokenizer.pad_token_id, self.model.device)
                hidden = hidden_states(self.model, batch["input_ids"]).flatten(0, 1).index_select(0, batch["positions"])
        return hidden.bfloat16() if self.config.bf16 else hidden, batch["labels"]

    def _choose_prompts(self, records: list[dict]) -> list:
        """The first num_samples prompts (all before a record's last response) that leave room for an answer."""
        room = positions_of(self.model.config) - self.config.sample_max_new_tokens
        prompts = []
        for record in records:
            if len(prompts) == self.config.num_samples:
                break
            if record.get("messages") is not None:  # they come before a prompt, as in sft_examples
                last = max(i for i, m in enumerate(record["messages"]) if m["role"] == "assistant")
                prompt = record["messages"][:last]
            else:
                prompt = record.get("prompt")
                if prompt and not isinstance(record.get("completion"), str):
                    prompt = as_messages(prompt, "user")  # training renders it with the chat template too
            if prompt and 0 < len(encode_prompt(self.tokenizer, prompt)) <= room:
                prompts.append(prompt)
        return prompts

    def samples(self) -> list[dict]:
        """Greedy answers to the first held-out prompts (without an eval_dataset: training prompts)."""
        if not self.sample_prompts:
            return []
        with self.gathered():
            responses = generate_text(
                self.model, self.tokenizer, self.sample_prompts,
                max_new_tokens=self.config.sample_max_new_tokens, do_sample=False, bf16=self.config.bf16,
            )  # fmt: skip
        return [{"prompt": p, "response": r} for p, r in zip(self.sample_prompts, responses, strict=True)]

    def train(self, resume: bool = False) -> RunResult:
        """Trains to the end and writes config.output_dir (run.run_training lists the files). resume=True continues from
        its newest checkpoint. ConfigError if output_dir holds a run and resume is False."""
        return run_training(self, resume=resume)

    def gathered(self):
        return gathered(self.model)

    def save_model(self, path) -> None:
        save_model(self.model, self.tokenizer, path)

    def state_dict(self) -> dict:
        return common.state_of(self)

    def load_state_dict(self, state: dict) -> None:
        common.load_state(self, state)


@torch.no_grad()
def token_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, labels: Tensor
) -> Tensor:
    """(3,) float64 sums over the N labels: -log p, 1 if the label is the most likely token, entropy. At most 2^22
    logits exist at a time. The product is in the dtype of hidden."""
    rows = max(1, 2**22 // weight.shape[0])
    weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    total = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    for h, label in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits = torch.nn.functional.linear(h, weight, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logprobs, entropy = token_logprobs_and_entropy(logits, label)
        total += torch.stack([-logprobs.sum(), (logits.argmax(-1) == label).sum(), entropy.sum()])
    return total

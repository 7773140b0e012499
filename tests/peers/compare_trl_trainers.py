"""SFTTrainer and RewardTrainer beside TRL's: same weights, same batches in the same order, so the same learning.

TRL's train() runs as it is, over the data in order. Every step's loss and the weights after the last agree to the
rounding of float32, with unequal lengths, gradient clipping at work, a schedule, weight decay and accumulation: what
differs between the two is time and memory.
"""

import copy

import pytest
import torch
import trl
from helpers import tiny_model, tiny_tokenizer

if trl.__version__ != "1.16.0":
    pytest.skip("the trainers of TRL 1.16", allow_module_level=True)

from datasets import Dataset

from rlhf_fast import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rlhf_fast.models import load_reward_model

STEPS, BATCH = 12, 4
RATE = 3e-3
WORDS = ["the", "cat", "sat", "on", "mat", "what", "is", "two", "plus", "four", "please", "say", "hello", "to", "world"]


def reply(i: int, length: int) -> str:
    return " ".join(WORDS[(i * 7 + k * k) % len(WORDS)] for k in range(length))


def trl_options(tmp_path, accumulate: int) -> dict:
    return {
        "output_dir": str(tmp_path / "trl"), "max_steps": STEPS, "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulate, "learning_rate": RATE, "lr_scheduler_type": "linear",
        "warmup_steps": 0, "max_grad_norm": 0.5, "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False, "max_length": 128,
    }  # fmt: skip


def our_options(tmp_path, accumulate: int) -> dict:
    return {
        "output_dir": str(tmp_path / "ours"), "max_steps": STEPS, "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulate, "learning_rate": RATE, "warmup_ratio": 0.0, "max_grad_norm": 0.5,
        "max_length": 128,
    }  # fmt: skip


def losses_of(trainer) -> list[float]:
    """Runs TRL's trainer -> the loss of each step, unrounded."""
    seen, compute_loss = [], trainer.compute_loss

    def noted(*arguments, **options):
        loss = compute_loss(*arguments, **options)
        seen.append(float(loss.detach()))
        return loss

    trainer.compute_loss = noted
    trainer.train()
    return seen


def assert_same_weights(ours, theirs, before) -> None:
    """To 3e-3 of the way that training moved them on average, but for one weight in a thousand (of a tensor: in a
    hundred). Adam makes a step of the last bit of a gradient near 0, and that bit is another on another CPU."""
    theirs = dict(theirs.named_parameters())
    start = dict(before.named_parameters())
    differ = []
    for name, weight in ours.named_parameters():
        moved = (weight - start[name]).abs().mean()
        assert moved > 0, name
        differ.append((weight - theirs[name]).abs() > 3e-3 * moved)
        assert differ[-1].sum() <= max(1, weight.numel() // 100), name
    assert torch.cat([x.flatten() for x in differ]).double().mean() <= 1e-3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_learns_step_by_step_as_trl_does(tmp_path, accumulate):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, initializer_range=0.1)
    records = [
        {"prompt": [{"role": "user", "content": reply(i, 2 + i % 5)}],
         "completion": [{"role": "assistant", "content": reply(i + 3, 1 + (i * 5) % 13)}]}
        for i in range(STEPS * BATCH * accumulate)
    ]  # fmt: skip
    ours = SFTTrainer(
        SFTConfig(**our_options(tmp_path, accumulate)), copy.deepcopy(model), train_dataset=records, tokenizer=tokenizer
    )
    rows = [
        {"input_ids": e.input_ids.tolist(), "completion_mask": e.response_mask.astype(int).tolist()}
        for e in ours.examples
    ]
    theirs = trl.SFTTrainer(
        model=copy.deepcopy(model), processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        args=trl.SFTConfig(**trl_options(tmp_path, accumulate), completion_only_loss=True),
    )  # fmt: skip
    their_losses = losses_of(theirs)
    our_losses = [
        float(ours._train_step([[e] for e in ours.examples[k : k + ours.batch_size]])["loss"])
        for k in range(0, len(rows), ours.batch_size)
    ]
    # Both divide by the learned tokens of the whole step, so TRL's micro-batches add up to the step's loss.
    steps = [sum(their_losses[k : k + accumulate]) for k in range(0, len(their_losses), accumulate)]
    torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(steps), rtol=1e-4, atol=0)
    assert our_losses[-1] < our_losses[0] - 0.1
    assert_same_weights(ours.model, theirs.model, model)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("center", [0.0, 0.05])
def test_a_reward_model_learns_step_by_step_as_trl_does(tmp_path, accumulate, center):
    tokenizer = tiny_tokenizer()
    model = load_reward_model(tiny_model(tokenizer, initializer_range=0.1), tokenizer)
    records = [
        {"prompt": [{"role": "user", "content": reply(i, 2 + (i * 3) % 17)}],
         "chosen": [{"role": "assistant", "content": reply(2 * i, 1 + i % 9)}],
         "rejected": [{"role": "assistant", "content": reply(3 * i + 1, 1 + (i * 5) % 13)}]}
        for i in range(STEPS * BATCH * accumulate)
    ]  # fmt: skip
    ours = RewardTrainer(
        RewardConfig(**our_options(tmp_path, accumulate), center_rewards_coefficient=center),
        copy.deepcopy(model), train_dataset=records, tokenizer=tokenizer,
    )  # fmt: skip
    rows = [
        dict(zip(("chosen_ids", "rejected_ids"), (r.tolist() for r in item.responses), strict=True))
        for item in ours.items
    ]
    theirs = trl.RewardTrainer(
        model=copy.deepcopy(model), processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        args=trl.RewardConfig(**trl_options(tmp_path, accumulate), center_rewards_coefficient=center or None),
    )  # fmt: skip
    their_losses = losses_of(theirs)
    our_losses = [
        float(ours._train_step(ours.items[k : k + ours.batch_size])["loss"])
        for k in range(0, len(rows), ours.batch_size)
    ]
    steps = [sum(their_losses[k : k + accumulate]) / accumulate for k in range(0, len(their_losses), accumulate)]
    torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(steps), rtol=1e-4, atol=1e-6)
    assert_same_weights(ours.model, theirs.model, model)

"""A NaN in supervised fine-tuning and reward modelling: the update is skipped, and a run of nothing else ends."""

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer

from rlhf_fast.errors import NonFiniteError
from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

DEMONSTRATIONS = [{"prompt": f"say {w}", "completion": f"{w} it is"} for w in ("one", "two", "three", "four")] * 4
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in DEMONSTRATIONS]


def trainers(tmp_path, name, **more):
    tokenizer = tiny_tokenizer()
    model, options = tiny_model(tokenizer), {"output_dir": str(tmp_path), "per_device_train_batch_size": 2}
    options |= {"max_skipped_steps": 3, "num_samples": 0} | more
    if name == "sft":
        return SFTTrainer(SFTConfig(**options), model, tokenizer=tokenizer, train_dataset=DEMONSTRATIONS)
    return RewardTrainer(RewardConfig(**options), model, tokenizer=tokenizer, train_dataset=PAIRS)


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_run_of_nans_ends_with_its_batch_saved(tmp_path, name):
    trainer = trainers(tmp_path, name)
    learned = next(p for p in reversed(list(trainer.model.parameters())) if p.requires_grad)
    run = iter(trainer)
    next(run)
    with torch.no_grad():
        learned.view(-1)[0] = float("nan")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.warns(RuntimeWarning, match="the gradient is not finite"), pytest.raises(NonFiniteError, match="in 3"):
        list(run)
    for p, same in zip(trainer.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), same, rtol=0, atol=0, equal_nan=True)
    batch = torch.load(tmp_path / "non_finite_batch.pt")  # weights_only: nothing in it needs trust
    assert len(batch) == 2 and trainer.guard.skipped == 3


@pytest.mark.parametrize("name", ["sft", "reward"])
@pytest.mark.parametrize("finite", [0, 1])
def test_a_shorter_run_of_nans_ends_so_too(tmp_path, name, finite):
    """finite: how many updates happened. After one of them the run has learned something."""
    trainer = trainers(tmp_path, name, max_steps=2)
    learned = next(p for p in reversed(list(trainer.model.parameters())) if p.requires_grad)
    run = iter(trainer)
    for _ in range(finite):
        next(run)
    with torch.no_grad():
        learned.view(-1)[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="the gradient is not finite"):
        if finite:
            list(run)
        else:
            with pytest.raises(NonFiniteError, match="in 2 updates in a row, all of the run, so"):
                list(run)
    assert (tmp_path / "non_finite_batch.pt").exists() == (not finite) and trainer.guard.taken == finite

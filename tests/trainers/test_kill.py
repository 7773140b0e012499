"""kill -9 at random steps, again and again, and resumed each time: the weights are those of the run left alone. And
after an exception within a step."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from safetensors.torch import load_file

from rlhf_fast import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from rlhf_fast.trainers.checkpoints import latest_checkpoint

STEPS = 24
RUN = {
    "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    "eval_steps": 7, "save_steps": 2,
}  # fmt: skip


def make(stage, path):
    """With dropout in SFT, so that the generators have to come back as well."""
    tokenizer = tiny_tokenizer()
    prompts = [f"say {'the cat ' * (i % 7)}{i}: " for i in range(23)]
    if stage == "sft":
        data = [{"prompt": p, "completion": f"{i} sat on the mat"} for i, p in enumerate(prompts)]
        config, trainer, model = SFTConfig, SFTTrainer, tiny_model(tokenizer, attention_dropout=0.2)
    else:
        data = [{"prompt": p, "chosen": f"{i} the cat", "rejected": f"{i} mat"} for i, p in enumerate(prompts)]
        config, trainer, model = RewardConfig, RewardTrainer, tiny_model(tokenizer)
    return trainer(config(str(path), **RUN), model, train_dataset=data, eval_dataset=data[:5], tokenizer=tokenizer)


def work(stage, path, seconds_a_step):
    torch.set_num_threads(1)
    resume = Path(path, "run_config.json").exists()
    trainer = make(stage, path)
    step = trainer._train_step
    trainer._train_step = lambda batch: (time.sleep(seconds_a_step), step(batch))[1]
    trainer.train(resume=resume)


def log_of(path):
    rows = map(json.loads, (path / "train_log.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("timing_s/")} for row in rows]


def lines(path):
    log = Path(path, "train_log.jsonl")
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.fixture(scope="module")
def processes():
    """Forked from a server that has imported everything once, and has run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf_fast.trainers.sft", "rlhf_fast.trainers.reward", "helpers"])
    return context


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_killed_at_random_steps_it_ends_with_the_same_bits(stage, tmp_path, processes):
    seed = random.SystemRandom().randrange(10**6)
    draw, kills = random.Random(seed), []
    work(stage, tmp_path / "whole", 0.0)
    for _ in range(3):
        before = lines(tmp_path / "killed")
        target, pause = draw.randint(1, 8), draw.random() * 0.05
        process = processes.Process(target=work, args=(stage, tmp_path / "killed", 0.03))
        process.start()
        # A resumed log is first cut back to its checkpoint, so progress is counted from the least seen.
        least, deadline = before, time.monotonic() + 120
        while process.is_alive() and lines(tmp_path / "killed") < least + target and time.monotonic() < deadline:
            least = min(least, lines(tmp_path / "killed"))
            time.sleep(0.005)
        time.sleep(pause)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills.append((process.exitcode, lines(tmp_path / "killed")))
    assert [code for code, _ in kills].count(-signal.SIGKILL) >= 1, kills
    work(stage, tmp_path / "killed", 0.0)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    different = [name for name in whole if not torch.equal(whole[name], killed[name])]
    assert not different, f"seed {seed}, killed at {kills}: {different}"
    logs = [log_of(tmp_path / name) for name in ("whole", "killed")]
    assert logs[0] == logs[1] and logs[0][-1]["step"] == STEPS
    if stage == "reward":
        assert len({(tmp_path / name / "preferences.json").read_text() for name in ("whole", "killed")}) == 1


@pytest.mark.parametrize("same", [False, True], ids=["another trainer", "the same trainer"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_step_that_raises_before_its_update_loses_no_other(stage, same, tmp_path):
    make(stage, tmp_path / "whole").train()
    trainer = make(stage, tmp_path / "raised")
    name = {"sft": "_response_hidden", "reward": "_rewards"}[stage]
    forward, calls = getattr(trainer, name), []

    def raising(examples):
        calls.append(trainer.step)
        if calls[-2:] == [5, 5]:  # in the second of its micro-batches
            torch.rand(1)
            raise RuntimeError("out of memory")
        return forward(examples)

    setattr(trainer, name, raising)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert latest_checkpoint(tmp_path / "raised").name == "checkpoint-5"
    setattr(trainer, name, forward)
    (trainer if same else make(stage, tmp_path / "raised")).train(resume=True)
    assert log_of(tmp_path / "raised") == log_of(tmp_path / "whole")
    whole, raised = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "raised"))
    assert all(torch.equal(whole[name], raised[name]) for name in whole)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_step_that_raises_in_its_update_saves_no_half_of_it(stage, tmp_path):
    trainer = make(stage, tmp_path)

    def raising(*_):
        if trainer.step == 5:
            raise RuntimeError("out of memory")

    trainer.optimizer.register_step_post_hook(raising)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"

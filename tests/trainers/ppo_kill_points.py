"""PPO runs killed with SIGKILL at a given moment: test_ppo_kill.py starts this, and it forks a child for each."""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
from pathlib import Path

import torch
from helpers import tiny_model, tiny_tokenizer

from rlhf_fast.trainers import checkpoints, records
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

PROMPTS = [{"prompt": f"say {word}"} for word in ("one", "two", "three", "four", "cat", "sat", "on", "mat")]


def variety(prompts, responses, **columns):
    return [len(set(response)) / 10 for response in responses]


def make_trainer(output_dir) -> PPOTrainer:
    """Two iterations, a checkpoint after each; everything that has a state is on."""
    tokenizer = tiny_tokenizer()
    config = PPOConfig(
        output_dir=str(output_dir), total_episodes=16, batch_size=8, minibatch_size=4, response_length=6,
        num_ppo_epochs=2, temperature=0.8, learning_rate=3e-3, kl_target=6.0, scale_scores=True, save_steps=1,
        save_total_limit=1, eval_steps=1, num_samples=2,
    )  # fmt: skip
    return PPOTrainer(
        config, tiny_model(tokenizer, num_hidden_layers=1), tokenizer=tokenizer, reward=variety, train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:3], eval_rewards={"length": lambda p, r, **c: [float(len(x)) for x in r]},
    )  # fmt: skip


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def when(owner, name: str, condition, then=die, after: bool = False) -> None:
    """From now on, owner.name() with arguments that meet the condition ends in `then`, before or after its work."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        if not after and condition(*args):
            then(*args)
        result = original(*args, **kwargs)
        if after and condition(*args):
            then(*args)
        return result

    setattr(owner, name, wrapped)


def half_a_state(state, path):
    Path(path).write_bytes(b"PK" + bytes(5000))
    die()


def half_a_line(log, row):
    log._file.write('{"step": 2, "obj')
    log._file.flush()
    die()


def one_file_less(path, *_):
    next(p for p in Path(path).iterdir() if p.is_file()).unlink()
    die()


def small_disk(*_):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def arm(trainer, point: str) -> None:
    """Moments before the first checkpoint, and in the second iteration or what follows it, when checkpoint-1 exists."""
    late = lambda *_: (root / "checkpoint-1").exists()  # noqa: E731
    saving = lambda *_: trainer.step == 2  # noqa: E731
    calls, root = [], Path(trainer.config.output_dir)
    {
        "in the first rollout": lambda: when(trainer, "_rollout", lambda *_: True),
        "in the first update": lambda: when(
            trainer, "_accumulate_gradient", lambda *_: calls.append(1) or len(calls) == 3
        ),
        "before checkpoint-1": lambda: when(checkpoints.os, "rename", lambda *_: trainer.step == 1),
        "in the rollout": lambda: when(trainer, "_rollout", late),
        "in the reward": lambda: when(trainer, "reward", late),
        "in scoring": lambda: when(trainer, "_score_tokens", late),
        "in the update": lambda: when(
            trainer, "_accumulate_gradient", lambda *_: late() and (calls.append(1) or len(calls) == 3)
        ),
        "in evaluation": lambda: when(trainer, "evaluate", saving),
        "in a log line": lambda: when(records.JsonLines, "write", lambda log, row: row.get("step") == 2, half_a_line),
        "before saving": lambda: when(trainer, "save_model", saving),
        "after the model is saved": lambda: when(trainer, "save_model", saving, after=True),
        "in state.pt": lambda: when(torch, "save", saving, half_a_state),
        "before the rename": lambda: when(checkpoints.os, "rename", saving),
        "after the rename": lambda: when(checkpoints.os, "rename", saving, after=True),
        "in pruning": lambda: when(
            checkpoints.shutil, "rmtree", lambda path, *_: Path(path).name == ".tmp-checkpoint-1-deleted", one_file_less
        ),
        "in the final model": lambda: when(trainer, "save_model", lambda path: Path(path) == root),
        "disk full": lambda: when(trainer, "save_model", saving, small_disk),
    }[point]()  # fmt: skip


BEFORE_THE_FIRST_CHECKPOINT = ["in the first rollout", "in the first update", "before checkpoint-1"]
POINTS = [
    *BEFORE_THE_FIRST_CHECKPOINT, "in the rollout", "in the reward", "in scoring", "in the update", "in evaluation",
    "in a log line", "before saving", "after the model is saved", "in state.pt", "before the rename",
    "after the rename", "in pruning", "in the final model", "disk full",
]  # fmt: skip


def main(root: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    for point in POINTS:
        child = os.fork()
        if child == 0:
            try:
                trainer = make_trainer(Path(root) / point.replace(" ", "-"))
                arm(trainer, point)
                trainer.train()
            except BaseException as error:
                print(f"{point}: {error!r}", flush=True)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        print(f"{point}: {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The examples run, and their configs name only keys that the commands have."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from rlhf_fast.cai_keys import CAI
from rlhf_fast.cli import main, read_keys
from rlhf_fast.jobs import resolve_reward
from rlhf_fast.judges import Constitution
from rlhf_fast.keys import STAGES
from rlhf_fast.trainers.configs import config_from_dict

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_loop_learns(capsys):
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLES / "own_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main() > 0.9  # chance is 5 words of 64
    assert "ratio 1.000" in capsys.readouterr().out


def test_a_hacked_reward_is_noticed(tmp_path):
    spec = importlib.util.spec_from_file_location("reward_hacking", EXAMPLES / "reward_hacking.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.kind_and_short([], ["please", "thanks please", "please please " * 6, "cat"]) == [0.5, 1.0, 0.5, 0.0]
    trainer = module.main(str(tmp_path))
    assert trainer.step < trainer.total_steps  # it was stopped
    alarms = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert alarms[-1]["monitor"] == "overoptimization" and alarms[-1]["evidence"]["standard_errors"] > 3
    assert "<b>overoptimization</b>" in (tmp_path / "report.html").read_text()


def test_rewards_by_hand():
    prompts = [[]] * 3
    assert resolve_reward(f"{EXAMPLES}/rewards.py:finished")(prompts, ["Yes.", "Yes", "はい。"]) == [1.0, 0.0, 1.0]
    repetition = resolve_reward(f"{EXAMPLES}/rewards.py:no_repetition")
    assert repetition(prompts, ["a b c", "a a a a", ""]) == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_yaml_files_are_accepted(path):
    if path.read_text().startswith("#") and "rlhf_fast/constitution@1" in path.read_text():
        assert Constitution.load(path).principles
        return
    stages = STAGES | CAI
    named = yaml.safe_load(path.read_text()).keys() & stages.keys()
    assert named
    for name in named:
        values = read_keys(str(path), {stage: list(s.keys()) for stage, s in stages.items()}, name)
        for cls in stages[name].configs:
            config_from_dict(cls, {k: v for k, v in values.items() if k in cls.__dataclass_fields__})


@pytest.fixture
def start(model, tokenizer, tmp_path, monkeypatch):
    """The flags for a tiny model and a few prompts; the configs find examples/ in the working directory."""
    monkeypatch.chdir(EXAMPLES.parent)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"say {word} ", "chosen": f"{word}.", "rejected": "no"} for word in ("cat", "mat", "two", "four")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    return ["--model", str(tmp_path / "model"), "--train_data", str(tmp_path / "rows.jsonl")]


def run(command, name, output_dir, *flags):
    argv = [command, "--config", f"examples/{name}", "--output_dir", str(output_dir), *flags]
    assert main([*argv, "--num_samples", "0"]) == 0
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


PPO_SIZES = ["--batch_size", "16", "--minibatch_size", "8", "--response_length", "6"]


def test_grpo_runs(start, tmp_path):
    log = run("ppo", "grpo.yaml", tmp_path / "run", *start, *PPO_SIZES, "--total_episodes", "32")
    assert len(log) == 2 and "critic/vf_explained_var" not in log[0]
    assert {"rewards/finished/mean", "rewards/no_repetition/mean", "objective/kl"} <= log[0].keys()
    config = json.loads((tmp_path / "run" / "run_config.json").read_text())
    assert config["num_generations"] == 8 and config["cliprange_high"] == 0.28 and config["kl_in_loss"]


def test_lora_runs_from_the_reward_model_to_ppo(start, tmp_path):
    assert len(run("reward", "lora.yaml", tmp_path / "reward", *start)) == 2
    sizes = [*PPO_SIZES, "--total_episodes", "32", "--critic_warmup_steps", "1"]
    log = run("ppo", "lora.yaml", tmp_path / "ppo", *start, "--reward", str(tmp_path / "reward"), *sizes)
    assert log[0]["objective/kl"] == 0 and "critic/vf_explained_var" in log[1]
    assert (tmp_path / "ppo" / "adapter_config.json").is_file()

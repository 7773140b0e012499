"""The examples run as they are, and their configs name only keys that exist."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from rlhf_fast.cai_keys import CAI
from rlhf_fast.cli import read_sections
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
    sections = read_sections(str(path), {name: list(s.keys()) for name, s in stages.items()})
    named = yaml.safe_load(path.read_text()).keys() & stages.keys()
    assert named
    for name in named:
        values = sections[name]
        for cls in stages[name].configs:
            config_from_dict(cls, {k: v for k, v in values.items() if k in cls.__dataclass_fields__})

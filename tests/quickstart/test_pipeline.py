"""All stages at the smallest size: what they leave, that a second call goes on, and that nothing is redone."""

import json

import pytest

from rlhf_fast.errors import ConfigError
from rlhf_fast.quickstart.pipeline import Quickstart, Sizes
from rlhf_fast.quickstart.rules import RULES

TINY = Sizes(
    layers=1, demonstrations=64, criticisms=32, candidates=32, pairs=32, judged_pairs=32, held_out_pairs=16,
    ppo_iterations=2, ppo_batch=8, revised_prompts=12, held_out_prompts=8,
)  # fmt: skip
STAGES = ["sft", "rm", "ppo", "cai-revise", "cai-sft", "cai-label", "cai-rm", "cai-ppo"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quickstart that was stopped in the middle of PPO, and ended by a second call."""
    root = tmp_path_factory.mktemp("quickstart")
    stopped = Quickstart(root, 0, TINY)
    stopped.cai_revise = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    trained = (root / "ppo" / "train_log.jsonl").read_bytes()
    summary = Quickstart(root, 0, TINY).run()
    assert (root / "ppo" / "train_log.jsonl").read_bytes() == trained  # not trained again
    return root, summary


def stop(run_dir):
    raise KeyboardInterrupt


def test_every_stage_is_in_the_summary_and_in_its_own_directory(finished):
    root, summary = finished
    assert summary == json.loads((root / "summary.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in summary["stages"]] == STAGES
    for stage in summary["stages"]:
        assert (root / stage["run"]).is_dir()
        assert stage["seconds"] > 0
    assert (root / "report.html").stat().st_size > 10_000


def test_policies_are_rated_by_the_rules_and_by_the_proxy(finished):
    _, summary = finished
    stages = {stage["name"]: stage for stage in summary["stages"]}
    for name in ("sft", "ppo", "cai-sft", "cai-ppo"):
        rates = stages[name]["pass_rate_per_principle"]
        assert set(rates) == set(RULES)
        assert 0 <= stages[name]["pass_rate"] <= min(rates.values()) <= 1
        assert isinstance(stages[name]["proxy_reward"], float)
    for name in ("rm", "cai-rm"):
        assert 0 <= stages[name]["rm_accuracy"] <= 1
    for name in ("ppo", "cai-ppo"):
        assert isinstance(stages[name]["kl"], float)


def test_true_and_proxy_scores_are_logged_side_by_side(finished):
    root, _ = finished
    for name in ("ppo", "cai-ppo"):
        log = [json.loads(line) for line in (root / name / "train_log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in log] == [0, 1, 2]
        for row in log:
            assert {"eval_scores", "eval_pass_rate", "eval_kl", *(f"eval_{rule}" for rule in RULES)} <= set(row)


def test_the_same_held_out_prompts_are_answered_after_each_policy(finished):
    _, summary = finished
    assert len(summary["samples"]) == 8
    for sample in summary["samples"]:
        assert [r["stage"] for r in sample["responses"]] == ["sft", "ppo", "cai-sft", "cai-ppo"]


def test_labels_of_the_constitution_are_soft_and_no_pair_is_lost(finished):
    root, summary = finished
    counts = next(stage for stage in summary["stages"] if stage["name"] == "cai-label")["counts"]
    records = [json.loads(line) for line in (root / "cai-revise" / "revisions.jsonl").open(encoding="utf-8")]
    assert counts["train"]["inputs"] == 32 + sum(record["selected"] > 0 for record in records)
    rows = [json.loads(line) for line in (root / "cai-label" / "train" / "comparisons.jsonl").open(encoding="utf-8")]
    assert len(rows) == counts["train"]["ok"]
    assert all(0.5 < row["chosen_prob"] < 1 for row in rows)


def test_revisions_are_the_models_own_text(finished):
    """The critique and the reply selected come out of the generator, never from the task's templates."""
    root, _ = finished
    generator = Quickstart(root, 0, TINY)._generator("sft")
    rows = [json.loads(line) for line in (root / "cai-revise" / "revisions.jsonl").open(encoding="utf-8")]
    from rlhf_fast.judges.stages import seed_for

    for row in rows:
        assert generator([row["prompt"]], [seed_for(0, row["id"], "reply")])[0].strip() == row["replies"][0]


def test_a_directory_of_another_seed_is_refused(finished):
    root, _ = finished
    with pytest.raises(ConfigError, match="seed 0"):
        Quickstart(root, 1, TINY)


def test_a_stage_killed_without_a_checkpoint_begins_again(finished, tmp_path):
    """A crash leaves a log and no checkpoint: nothing to resume, and nothing in the way either."""
    run_dir = tmp_path / "sft"
    run_dir.mkdir()
    (run_dir / "run_config.json").write_text("{}")  # comes before the first line of the log
    (run_dir / "train_log.jsonl").write_text('{"step": 1}\n{"ste')
    run = Quickstart(tmp_path, 0, TINY)
    assert 0 <= run.sft(run_dir)["pass_rate"] <= 1
    assert [json.loads(line)["step"] for line in (run_dir / "train_log.jsonl").open()] == [1, 2, 3, 4, 5, 6]

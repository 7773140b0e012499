"""hh_reward.py's rule lets no pair choose the settings it counts with; hh_stages.py reads what a run directory says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import hh_reward
import hh_stages
import run_report


@pytest.fixture
def five_folds(monkeypatch):
    monkeypatch.setattr(hh_reward, "FOLDS", 5)
    monkeypatch.setattr(hh_reward, "EXPLORED", (0, 1))


def row(fold: int, candidate: dict, seed: int, accuracy: float) -> dict:
    plain = {"loss": 0.7, "ece": 0.1, "reward_with_length": -0.3, "floors": {"bag of words": 0.6}}
    return {"fold": fold, "seed": seed, **candidate, "pairs": 100, "accuracy": accuracy, **plain}


def test_dialogues_with_the_same_first_turn_share_a_fold(five_folds):
    pairs = [{"prompt": [{"role": "user", "content": f"question {i % 30}"}]} for i in range(90)]
    folds = hh_reward.folds_of(pairs)
    assert np.array_equal(folds[:30], folds[30:60]) and np.array_equal(folds[:30], folds[60:])
    assert np.bincount(folds).tolist() == [18] * hh_reward.FOLDS


def test_a_fold_has_no_say_in_the_settings_it_counts_with(five_folds):
    """Candidate 0 has 0.95 on fold 0 and 0.55 elsewhere, candidate 1 has 0.6 everywhere, the rest 0.4: on the other
    folds candidate 1 is best for fold 0, and candidate 0 for the others, though over all five that is best for all."""
    candidates, seeds = hh_reward.CANDIDATES, hh_reward.SEEDS
    accuracy = {0: lambda fold: 0.95 if fold == 0 else 0.55, 1: lambda fold: 0.6}
    rows = [
        row(fold, candidate, seed, accuracy.get(i, lambda fold: 0.4)(fold) + 0.01 * (seed - seeds[1]))
        for fold in range(hh_reward.FOLDS)
        for i, candidate in enumerate(candidates)
        for seed in seeds
    ]
    found = hh_reward.summary(rows)
    assert [{k: fold[k] for k in candidates[0]} for fold in found["folds"]] == [candidates[1]] + [candidates[0]] * 4
    assert found["all"]["accuracy"] == pytest.approx((0.6 + 4 * 0.55) / 5) and found["all"]["pairs"] == 500
    assert found["all"]["of each seed"] == pytest.approx([0.55, 0.56, 0.57])
    # On folds 0 and 1 candidate 0 is best, and has 0.55 on the rest.
    assert found["confirmed"]["accuracy"] == pytest.approx(0.55) and found["confirmed"]["pairs"] == 300
    assert hh_reward.summary(rows[:-1]) == {}


def test_stages_are_read_from_what_they_leave(tmp_path):
    log = [{"step": 0, "eval_loss": 1.0}, *({"step": i, "loss": float(i)} for i in range(1, 21))]
    log[-1]["eval_loss"] = 0.5
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    found = hh_stages.read_stage(tmp_path)
    assert found["evaluations"] == [{"step": 0, "eval_loss": 1.0}, {"step": 20, "eval_loss": 0.5}]
    assert found["steps"] == 20 and found["loss_at_the_end"] == 19.5  # of its last two steps

    (tmp_path / "data.json").write_text(json.dumps([{"used": 7}, {"used": 3}]))
    left_out = [("train", "malformed"), ("train", "over-long"), ("train", "over-long"), ("eval", "malformed")]
    (tmp_path / "left_out.jsonl").write_text(
        "".join(json.dumps({"file": f"data/hh-rlhf/{name}.jsonl.gz", "kind": kind}) + "\n" for name, kind in left_out)
    )
    table = run_report.hh_data({"data": hh_stages.read_data(tmp_path)}).splitlines()
    assert table[2:] == ["| train | 10 | 7 | 1 | 0 | 0 | 2 |", "| eval | 4 | 3 | 1 | 0 | 0 | 0 |"]

"""bench_ppo.py gives both trainers the same task, and its report says what its file holds."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import bench_ppo  # noqa: E402
import ppo_report  # noqa: E402
import ppo_worker  # noqa: E402
from ppo_worker import Run  # noqa: E402

SMALL = Run(
    vocab=60, hidden=32, layers=1, batch_size=4, minibatch_size=4, micro_batch_size=2, num_ppo_epochs=1,
    prompt_length=(2, 4), response_length=6, iterations=2, num_prompts=8,
)  # fmt: skip


def test_our_run_counts_its_tokens_and_the_clock_goes_on():
    rows = ppo_worker.run_ours(SMALL)
    assert len(rows) == 2 and 0 < rows[0]["cpu_seconds"] < rows[1]["cpu_seconds"]
    for row in rows:
        assert 4 <= row["tokens"] <= 24 and 0 <= row["reward"] <= 1
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_trl_is_given_the_same_reward():
    prompt, answer = [40, 50], [2, 3, 59, 7, 8, ppo_worker.EOS]  # good are 2 to 7
    share = ppo_worker.ShareOfGood(SMALL)
    counts = share.backbone(input_ids=torch.tensor([prompt + answer])).hidden_states[-1]
    assert share.score(counts)[0, -1].item() == pytest.approx(3 / 6)
    tokenizer = ppo_worker.make_tokenizer(SMALL.vocab)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert sum(int(word[1:]) in SMALL.good for word in text.split()) / SMALL.response_length == pytest.approx(3 / 6)
    for row in ppo_worker.make_prompts(SMALL):
        assert not set(row) & set(SMALL.good)
        assert tokenizer(" ".join(f"t{i}" for i in row))["input_ids"] == row


def race(curves):
    rows = {
        name: [[dict(zip(("cpu_seconds", "kl", "reward"), point, strict=True)) for point in run] for run in runs]
        for name, runs in curves.items()
    }
    return {
        "curves": {"cpu_seconds": rows, "kl": rows},
        "tuning": {name: {"cpu_seconds": {"0.1": 0.5, "0.2": 0.7}, "kl": {"0.1": 0.5, "0.2": 0.3}} for name in rows},
        "learning_rates": {"cpu_seconds": {"shared": 0.2, "trl": 0.1}, "kl": {"shared": 0.1, "trl": 0.2}},
        "run": {"layers": 1, "hidden": 32, "vocab": 60, "batch_size": 4, "response_length": 6, "kl_coef": 0.1},
        "cpu": "cpu", "threads": 1, "OMP_WAIT_POLICY": "PASSIVE", "packages": {"torch": "2", "trl": "1"},
        "load_average": 1.0, "commit": "abc", "date": "2026-01-01T", "command": "command",
    }  # fmt: skip


def test_the_race_is_read_where_all_runs_have_been(tmp_path):
    part = race({
        "shared": [[(0, 0, 0.0), (10, 8, 1.0)], [(0, 0, 0.0), (20, 16, 1.0)]],
        "trl": [[(0, 0, 0.0), (40, 4, 0.5)], [(0, 0, 0.0), (8, 4, 0.2)]],
    })  # fmt: skip
    where, rewards = ppo_report.together(part, "cpu_seconds", 5)
    assert where.tolist() == [0, 2, 4, 6, 8]  # nobody is asked beyond 8
    np.testing.assert_allclose(rewards["shared"][:, -1], [0.8, 0.4])
    np.testing.assert_allclose(rewards["trl"][:, -1], [0.1, 0.2])
    where, rewards = ppo_report.together(part, "kl", 3)
    np.testing.assert_allclose(where, [0, 2, 4])
    np.testing.assert_allclose(rewards["shared"][:, -1], [0.5, 0.25])
    mean, half = ppo_report.interval(np.array([[1.0], [3.0]]))
    assert mean[0] == 2 and half[0] == pytest.approx(12.706)  # t(1) sqrt(2) / sqrt(2)
    text = ppo_report.race(part)
    assert "| 8.0 CPU-seconds | 0.600 +-" in text and "equal CPU-seconds 0.2 (shared trunk), 0.1 (TRL 1.12.0)" in text
    assert "equal KL 0.1 (shared trunk), 0.2 (TRL 1.12.0)" in text
    assert bench_ppo.at_kl(part["curves"]["kl"]["trl"][0]) == 0.0  # it never had that much
    long = [{"kl": kl, "reward": kl / 100} for kl in (0.0, 12.0, 8.0, 20.0)]
    assert bench_ppo.at_kl(long) == pytest.approx(0.125)
    ppo_report.picture(part, tmp_path / "race.svg")
    assert (tmp_path / "race.svg").stat().st_size > 1000

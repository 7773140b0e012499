"""kill -9 at any moment, a full disk, a torn checkpoint: the run goes on to the same weights, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ppo_kill_points
import pytest
import torch


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of the killed runs, how each ended, the log and weights of a run that nothing happened to)."""
    root, tests = tmp_path_factory.mktemp("killed"), Path(__file__).parents[1]
    command = [sys.executable, str(tests / "trainers/ppo_kill_points.py"), str(root), str(torch.get_num_threads())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    undisturbed = ppo_kill_points.make_trainer(root / "whole")
    undisturbed.train()
    return root, result.stdout + result.stderr, log(root / "whole"), undisturbed


def log(run):
    rows = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]


def same_weights(a, b):
    for x, y in ((a.policy, b.policy), (a.value_model, b.value_model)):
        for (name, left), right in zip(x.state_dict().items(), y.state_dict().values(), strict=True):
            assert torch.equal(left, right), name


@pytest.mark.parametrize("point", ppo_kill_points.POINTS)
@pytest.mark.filterwarnings("error")  # above all those of a damaged checkpoint
def test_a_killed_run_resumes_to_the_same_bits(runs, point):
    root, endings, whole_log, whole = runs
    run = root / point.replace(" ", "-")
    if point == "disk full":
        assert f"{point}: 1" in endings  # nor is there room for the model
        assert "checkpoint-2 could not be saved" in endings and "checkpoint-1 is untouched: resume from it" in endings
        assert not list(run.glob(".tmp*"))  # what was half written does not go on filling the disk
    else:
        assert f"{point}: -9" in endings
    done = sorted(path.name for path in run.glob("checkpoint-*"))
    saved = ("after the rename", "in evaluation", "in a log line", "in pruning", "in the final model")
    assert ("checkpoint-2" in done) == (point in saved)
    gone = ("in pruning", "in the final model")
    assert ("checkpoint-1" in done) == (point not in (*ppo_kill_points.BEFORE_THE_FIRST_CHECKPOINT, *gone))
    resumed = ppo_kill_points.make_trainer(run)
    resumed.train(resume=True)
    assert not list(run.glob(".tmp*"))
    same_weights(resumed, whole)
    assert log(run) == whole_log
    assert (run / "samples.jsonl").read_text() == (root / "whole/samples.jsonl").read_text()
    saved = torch.load(run / "checkpoint-2/state.pt", weights_only=True)["trainer"]
    assert saved["step"] == 2 and not list(run.glob(".tmp*"))

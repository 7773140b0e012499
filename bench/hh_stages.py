"""Runs the four stages of examples/hh_rlhf.yaml with its commands, and collects figures from their run directories.

    python bench/hh_stages.py --data data/hh-rlhf --json bench/results/hh_stages.json

Every figure is read from a file that a stage leaves behind: its evaluations from train_log.jsonl, those of a reward
model from preferences.json, the pairs it leaves out from left_out.jsonl, those of Constitutional AI from summary.json
and the run.json of its parts. CPU seconds are those of the whole command, including imports and report. --runs keeps
the directory in which the commands run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from hh_reward import command

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "reward", "ppo", "cai")


def run_stages(where: Path, data: Path) -> dict[str, float]:
    """Runs all four in `where`, after linking the paths that the config names -> CPU seconds of each."""
    (where / "data").mkdir(parents=True, exist_ok=True)
    for link, target in ((where / "data" / "hh-rlhf", data), (where / "examples", ROOT / "examples")):
        link.symlink_to(target.resolve(), target_is_directory=True)
    taken = {}
    for stage in STAGES:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "rlhf_fast.cli", stage, "--config", "examples/hh_rlhf.yaml"], cwd=where, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken[stage] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return taken


def read_stage(directory: Path) -> dict:
    """One trainer's evaluations, the mean loss of its last tenth of steps, and a reward model's preferences.json."""
    rows = [json.loads(line) for line in (directory / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [
        {"step": row["step"], **{k: v for k, v in row.items() if k.startswith("eval_")}}
        for row in rows
        if any(k.startswith("eval_") for k in row)
    ]
    found = {"steps": rows[-1]["step"], "evaluations": evaluations}
    if losses := [row["loss"] for row in rows if "loss" in row]:
        last = losses[-max(1, len(losses) // 10) :]
        found["loss_at_the_end"] = sum(last) / len(last)
    if (directory / "preferences.json").exists():
        judged = json.loads((directory / "preferences.json").read_text())
        keys = ("pairs", "accuracy", "low", "high", "ties", "by_length_difference", "length_correlation", "floors")
        found |= {key: judged[key] for key in keys} | {"ece": judged["calibration"]["ece"]}
    return found


def read_data(directory: Path) -> dict:
    """For each data file: how many records a stage uses, and how many it leaves out, by kind."""
    left_out = [json.loads(line) for line in (directory / "left_out.jsonl").read_text().splitlines()]
    reports = json.loads((directory / "data.json").read_text())
    return {
        name: {
            "used": report["used"],
            "left_out": Counter(row["kind"] for row in left_out if f"/{name}." in row["file"]),
        }
        for name, report in zip(("train", "eval"), reports, strict=True)
    }


def main() -> None:
    import torch

    from rlhf_fast.bench.harness import provenance

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/hh-rlhf"), help="with train.jsonl.gz and eval.jsonl.gz")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runs", type=Path, help="a new directory to run in, which is kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = options.runs or Path(temporary)
        taken = run_stages(where, options.data)
        runs = where / "runs" / "hh"
        found = {stage: read_stage(runs / stage) | {"cpu_seconds": taken[stage]} for stage in STAGES[:3]}
        found["cai"] = {
            "cpu_seconds": taken["cai"],
            "stages": json.loads((runs / "cai" / "summary.json").read_text())["stages"],
            "revise": json.loads((runs / "cai" / "revise" / "run.json").read_text())["counts"],
            "label": json.loads((runs / "cai" / "label" / "run.json").read_text())["counts"],
            **{name: read_stage(runs / "cai" / name) for name in ("reward", "ppo")},
        }
        result = {"data": read_data(runs / "reward"), **found}
    result |= provenance(torch.device("cpu"), [])
    result["threads"] = int(os.environ.get("OMP_NUM_THREADS", result["threads"]))
    result["command"] = command(options, "runs/hh-stages")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

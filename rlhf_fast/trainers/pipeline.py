"""The summary and report of a run of several stages, for the quickstart and `rlhf-fast cai train`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..disk import make_directory, write_json
from ..report import write_quickstart_report


class StageTable:
    """summary.json and report.html of a run of several stages (report.py has their format), rewritten after each stage.

    summary: the content of summary.json so far, at least "stages" and "samples".
    """

    def __init__(self, root: Path, summary: dict):
        self.root, self.summary, self._clock = make_directory(root), summary, time.perf_counter()

    def add(self, name: str, **values) -> None:
        """Adds a stage that has just ended. The time since the previous one is its duration."""
        stage = {"name": name, "run": name, **values, "seconds": round(time.perf_counter() - self._clock, 1)}
        self.summary["stages"].append(stage)
        write_json(self.root / "summary.json", self.summary)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in stage.items() if isinstance(v, float))
        print(f"{name}: {shown}; {write_quickstart_report(self.root)}", flush=True)
        self._clock = time.perf_counter()

    def rate(
        self, stage: str, replies: Sequence[str], kept: Sequence[dict[str, bool | None]], complete: Sequence[bool]
    ) -> dict:
        """Pass rates of a stage's replies to the held-out prompts. The first replies are added to the samples.

        kept: for each reply {principle: whether the reply keeps it}, None if it does not apply or was not decided.
        complete: for each reply, whether all its principles were decided. Other replies are not in pass_rate.
        """
        for sample, text, principles, whole in zip(self.summary["samples"], replies, kept, complete, strict=False):
            violated = [name for name, keeps in principles.items() if keeps is False]
            violates = violated if violated or whole else None
            sample["responses"].append({"stage": stage, "text": text, "violates": violates})
        passed = [False not in row.values() for row, whole in zip(kept, complete, strict=True) if whole]
        decided = {name: [row[name] for row in kept if row[name] is not None] for name in kept[0]}
        return {
            "pass_rate": sum(passed) / len(passed) if passed else None,
            "pass_rate_per_principle": {name: sum(column) / len(column) for name, column in decided.items() if column},
        }

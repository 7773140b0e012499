"""The summary and report of a run of several stages, for the quickstart and `rlhf-fast cai train`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..disk import make_directory, read_json, write_json
from ..errors import ConfigError
from ..report import write_quickstart_report


class StageTable:
    """summary.json and report.html of a run of several stages (report.py has their format), rewritten after each stage.

    summary: the content of summary.json so far, at least "stages" and "samples".
    """

    def __init__(self, root: Path, summary: dict):
        self.root, self.summary, self._clock = make_directory(root), summary, time.perf_counter()
        self._earlier = _seconds_in(root / "summary.json")

    def add(self, name: str, **values) -> None:
        """Adds a stage that has just ended. The time since the previous one is its duration, with that of earlier calls
        that ended it: on resume a stage that is done takes no time."""
        seconds = self._earlier.get(name, 0) + time.perf_counter() - self._clock
        self._earlier[name] = round(seconds, 1)
        stage = {"name": name, "run": name, **values, "seconds": self._earlier[name]}
        self.summary["stages"].append(stage)
        self.summary["seconds"] = self._earlier  # also of stages that this call has not reached yet
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


def _seconds_in(summary: Path) -> dict[str, float]:
    """{stage: seconds} in a summary.json; {} if there is none. It will be written anew, so damage does not matter."""
    try:
        return read_json(summary).get("seconds", {}) if summary.is_file() else {}
    except ConfigError:
        return {}

"""The files that a run writes at each step: log, samples, alarms, TensorBoard. A resumed run continues them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from ..disk import json_line
from ..errors import ConfigError
from ..monitors import Alarm
from ..report import whole_lines


class Records:
    """train_log.jsonl, samples.jsonl, alarms.jsonl (if there are monitors) and tensorboard/ (if it is installed).

    start: the step from which the run continues; later lines are cut off.
    at_the_end: the metrics of that step, if its checkpoint was saved before they were logged. If the log lacks them,
    `unlogged` has them, and the step's samples are cut off too, because the step will be evaluated and logged again.
    """

    def __init__(self, run_dir: Path, start: int, at_the_end: dict | None, monitors, total_steps: int):
        kept = start or -1  # -1: step 0 goes too, because a run that failed at once may have left its samples
        self.log = JsonLines(run_dir / "train_log.jsonl", kept)
        logged = bool(self.log.last) and self.log.last["step"] >= start
        self.unlogged = [at_the_end] if at_the_end and not logged else []
        kept -= len(self.unlogged)
        self._samples = JsonLines(run_dir / "samples.jsonl", kept)
        self._files, self._monitors, self._total_steps = [self.log, self._samples], monitors, total_steps
        if monitors:
            self._alarms = JsonLines(run_dir / "alarms.jsonl", kept)
            self._files.append(self._alarms)
            monitors.replay(self.log.rows())  # alarms.jsonl has their alarms already
        self._board = _tensorboard(run_dir / "tensorboard", start)

    def write(self, row: dict, say) -> list[Alarm]:
        """Logs a line and the alarms that it raises, and calls say(text) for each alarm -> the alarms that end the run.

        If an alarm ends the run before its last step, alarms.jsonl has `ended_run_of`: the steps of the whole run.
        """
        raised = self._monitors(row) if self._monitors else []
        ending = [alarm for alarm in raised if alarm.monitor in self._monitors.stop_on]
        for alarm in raised:  # before the log: a resumed run does not raise alarms for lines that the log has
            ends = alarm in ending and row["step"] < self._total_steps
            self._alarms.write(dataclasses.asdict(alarm) | ({"ended_run_of": self._total_steps} if ends else {}))
            say(f"{alarm.monitor}: {alarm.message}")
        self.log.write(row)
        return ending

    def plot(self, step: int, metrics: dict) -> None:
        if self._board:
            for key, value in metrics.items():
                self._board.add_scalar(key, value if value is not None else math.nan, step)

    def sample(self, step: int, samples: list[dict]) -> None:
        for sample in samples:
            self._samples.write({"step": step, **as_numbers(sample)})

    def sync(self) -> None:
        """Forces the files to the disk. A checkpoint survives a power failure, and so must the log it goes with."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        for file in self._files:
            file.close()
        if self._board:
            self._board.close()


class JsonLines:
    """A file with one JSON object per line. Opening it cuts off the rows after `step`; `last` is the last row that is
    left, {} if none is. The rows stay in the file, because those of a long run take hundreds of MB as objects."""

    def __init__(self, path: Path, step: int):
        self._path, self.last = path, {}
        size = 0
        for number, line in enumerate(whole_lines(path) if path.exists() else (), 1):
            try:
                row = json.loads(line)
                later = row["step"] > step
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f"{path}: line {number} is not a JSON object with a step, so it was damaged: delete that line to "
                    "resume"
                ) from None
            if later:
                break
            self.last = row
            size += len(line) + 1
        self._file = path.open("a", encoding="utf-8")
        self._file.truncate(size)

    def rows(self) -> Iterator[dict]:
        """Reads the rows in the file, one at a time."""
        return map(json.loads, whole_lines(self._path))

    def write(self, row: dict) -> None:
        self._file.write(json_line(row))
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _tensorboard(path: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _say_what_is_missing()
        return None
    return SummaryWriter(str(path), purge_step=start + 1 if start else None)


@functools.cache  # once in a process that trains several models
def _say_what_is_missing() -> None:
    print("no TensorBoard events: `pip install tensorboard` for them (the log and report.html have the same figures)")


def as_numbers(metrics: dict) -> dict:
    """Converts tensors and numpy scalars to Python numbers, and NaN and inf to None (null in JSON)."""
    numbers = {k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}

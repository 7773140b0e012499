"""Watches the metrics of a PPO run and raises an alarm, with the numbers, if the policy may be hacking the reward.

    name              metric                                 alarm, by default
    kl                objective/kl                           above 20 nats per response
    entropy           policy/entropy_avg                     below 0.1 of its start
    length            response_length/mean                   more than a factor of 2 from its start
    repetition        response/repetition                    0.2 above its start
    score_length      objective/score_length_correlation     beyond +-0.6: the score mostly follows the length
    overoptimization  eval_<name> of a held-out reward       3 standard errors below its best, while eval_scores is
                                                             higher than at that best (Gao et al. 2023)

A band compares the mean of the newest WINDOW log lines with the mean of the first WINDOW lines (its start), so it can
raise an alarm from line WINDOW + 1 on. kl and score_length compare with fixed numbers, from the second and the fifth
line on. Alarms depend on the log alone: a resumed run raises the same ones as an uninterrupted run. Neither what is
remembered nor the work at a line grows with the number of lines.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from html import escape

from .charts import Series, line_chart, points_of, short
from .page import grid

WINDOW = 5
MAX_ALARMS = 5  # of a monitor on the page, besides its last one; alarms.jsonl has all


@dataclass(frozen=True)
class _Band:
    """A metric that should stay within bounds(start, limit) -> (low, high); start is its mean in the first lines.

    lines: the log line from which on it can raise an alarm.
    """

    metric: str
    title: str
    limit: float
    bounds: Callable[[float, float], tuple[float | None, float | None]]
    lines: int = WINDOW + 1


BANDS = {
    "kl": _Band(
        "objective/kl", "KL to the reference, nats per response", 20.0, lambda start, limit: (None, limit), lines=2
    ),
    "entropy": _Band("policy/entropy_avg", "Entropy, nats per token", 0.1, lambda start, limit: (limit * start, None)),
    "length": _Band(
        "response_length/mean", "Response length, tokens", 2.0, lambda start, limit: (start / limit, start * limit)
    ),
    "repetition": _Band(
        "response/repetition", "Repeated pairs of tokens", 0.2, lambda start, limit: (None, start + limit)
    ),
    "score_length": _Band(
        "objective/score_length_correlation", "Correlation of score and length", 0.6,
        lambda start, limit: (-limit, limit), lines=WINDOW,  # fewer are noise: of two responses it is always +-1
    ),
}  # fmt: skip
LIMITS = {**{name: band.limit for name, band in BANDS.items()}, "overoptimization": 3.0}
_METRICS = {band.metric for band in BANDS.values()}


@dataclass(frozen=True)
class Alarm:
    """A metric out of its bounds: the step, the monitor, its message, and the numbers behind the message."""

    step: int
    monitor: str
    message: str
    evidence: dict[str, float] = field(default_factory=dict)


@dataclass
class _Ends:
    """The first and the newest WINDOW points (step, value) of a metric, and the number of all its points."""

    start: list[tuple[int, float]] = field(default_factory=list)
    newest: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    lines: int = 0

    def add(self, step: int, value: float) -> None:
        if self.lines < WINDOW:
            self.start.append((step, value))
        self.newest.append((step, value))
        self.lines += 1


class RunStopped(Exception):
    """A monitor of stop_on has ended a command's run. The message says which one, why, and how to continue."""


class Monitors:
    """Call it with each log line in turn; it returns the new alarms. An alarm that persists is raised once.

    limits: {name: limit, or None to switch the monitor off}, which override LIMITS.
    stop_on: the monitors whose alarm ends the run.
    """

    def __init__(self, limits: dict[str, float | None], stop_on: Iterable[str] = ()):
        self.limits = {name: limit for name, limit in (LIMITS | limits).items() if limit is not None}
        self.stop_on = set(stop_on)
        self._ends: dict[str, _Ends] = defaultdict(_Ends)  # of the metric of each band
        self._best: dict[str, dict] = {}  # the first log line with the highest value of each eval_ metric
        self._lasting: set[str] = set()

    def __call__(self, row: dict) -> list[Alarm]:
        for name, value in row.items():
            if not isinstance(value, int | float):  # None: it was not finite
                continue
            if name in _METRICS:
                self._ends[name].add(row["step"], value)
            elif name.startswith("eval_") and (name not in self._best or value > self._best[name][name]):
                self._best[name] = row
        new = []
        for name, alarm in self._readings(row):
            if alarm is None:
                self._lasting.discard(name)
            elif name not in self._lasting:
                self._lasting.add(name)
                new.append(alarm)
        return new

    def replay(self, log: Iterable[dict]) -> None:
        """Forgets all lines so far and reads these instead, without new alarms: the log of a run that continues."""
        self._ends.clear()
        self._best.clear()
        self._lasting.clear()
        for row in log:
            self(row)

    def _readings(self, row: dict) -> Iterator[tuple[str, Alarm | None]]:
        """(name, alarm or None) of every monitor that can judge this line."""
        for name, band in BANDS.items():
            if name in self.limits and band.metric in row and self._ends[band.metric].lines >= band.lines:
                yield name, self._outside(row["step"], name, band)
        if "overoptimization" in self.limits and isinstance(row.get("eval_scores"), int | float):
            alarms = (self._fallen(row, name) for name in held_out_rewards(row))
            yield "overoptimization", next(filter(None, alarms), None)

    def _outside(self, step: int, name: str, band: _Band) -> Alarm | None:
        ends = self._ends[band.metric]
        start, now = _mean(ends.start), _mean(ends.newest)
        low, high = band.bounds(start, self.limits[name])
        below, above = low is not None and now < low, high is not None and now > high
        if not (below or above):
            return None
        bound = low if below else high
        message = (
            f"{band.metric} is {short(now)} over steps {ends.newest[0][0]} to {step}, "
            f"{'below' if below else 'above'} {short(bound)}"
        )
        if ends.lines > WINDOW:  # before that, the first and the newest lines overlap entirely
            message += f"; it started at {short(start)}"
        return Alarm(step, name, message, {"now": now, "bound": bound, "start": start})

    def _fallen(self, row: dict, name: str) -> Alarm | None:
        best_row = self._best[name]
        best_step, best, proxy = best_row["step"], best_row[name], best_row.get("eval_scores")
        if proxy is None or row["eval_scores"] <= proxy:  # a score that was not finite is None
            return None
        errors = [evaluated.get(f"{name}_stderr") for evaluated in (best_row, row)]
        if None in errors:  # a single prompt has no standard error
            return None
        spread = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
        if best - row[name] <= self.limits["overoptimization"] * spread:
            return None
        # The spread is 0 if all prompts had the same value at both steps.
        measure = {"standard_errors": (best - row[name]) / spread} if spread else {}
        by = f"{short(measure['standard_errors'])} standard errors" if measure else "on every prompt alike"
        message = (
            f"{name} fell from {short(best)} at step {best_step} to {short(row[name])}, {by}, "
            f"while the optimised reward rose from {short(proxy)} to {short(row['eval_scores'])}: "
            f"step {best_step} is the better policy"
        )
        evidence = {"best_step": best_step, "best": best, "now": row[name], **measure}
        return Alarm(row["step"], "overoptimization", message, evidence)


def held_out_rewards(row: dict) -> list[str]:
    """The eval_<name> of a log line that have an eval_<name>_stderr, except for the optimised reward."""
    names = [key.removesuffix("_stderr") for key in row if key.startswith("eval_") and key.endswith("_stderr")]
    return [name for name in names if name != "eval_scores" and isinstance(row.get(name), int | float)]


def _mean(points: Collection[tuple[int, float]]) -> float:
    return sum(value for _, value in points) / len(points)


# -- in the report -----------------------------------------------------------------------------------------------------


def report_section(log: list[dict], limits: dict[str, float | None], alarms: list[dict]) -> str:
    """HTML of the alarms (rows of alarms.jsonl) and of a chart per monitor with its bounds.

    limits: for the bounds in the charts. The alarms come from the run, in which a resume may have changed the limits.
    """
    limits = Monitors(limits).limits
    # Without a reference there is no KL, and without eval_rewards nothing to over-optimise against.
    points = {name: points_of(log, BANDS[name].metric) for name in limits if name in BANDS}
    held_out = list(dict.fromkeys(name for row in log for name in held_out_rewards(row)))
    watched = [name for name in limits if points.get(name, held_out)]
    shown = list(_shown(alarms))
    text = "".join(_paragraph(alarm, log) for alarm in shown)
    if len(shown) < len(alarms):
        text += f"<p>alarms.jsonl has {len(alarms) - len(shown)} more, between the first and the last of a monitor.</p>"
    if not text and watched:
        text = f"<p>No alarm from {escape(', '.join(watched))}.</p>"
    charts = list(_bands(points, limits))
    if held_out and "overoptimization" in limits:
        charts += [_held_out(log, name) for name in ("eval_scores", *held_out)]
    return text + grid(charts)


def _shown(alarms: list[dict]) -> Iterator[dict]:
    """The first MAX_ALARMS and the last alarm of each monitor, and those that ended the run. A metric that is close to
    its bound crosses it thousands of times in a long run."""
    last = {alarm["monitor"]: i for i, alarm in enumerate(alarms)}
    times = Counter()
    for i, alarm in enumerate(alarms):
        times[alarm["monitor"]] += 1
        if times[alarm["monitor"]] <= MAX_ALARMS or i == last[alarm["monitor"]] or "ended_run_of" in alarm:
            yield alarm


def _paragraph(alarm: dict, log: list[dict]) -> str:
    end = ""
    if planned := alarm.get("ended_run_of"):
        resumed = "; it was resumed" if log and log[-1]["step"] > alarm["step"] else ""
        end = f" <b>This ended the run after step {alarm['step']:d} of {planned:d} planned steps{resumed}.</b>"
    return f"<p><b>{escape(alarm['monitor'])}</b>, step {alarm['step']:d}: {escape(alarm['message'])}.{end}</p>"


def _bands(points: dict[str, list[tuple[int, float]]], limits: dict[str, float]) -> Iterator[str]:
    for name, run in points.items():
        if len(run) > 1:
            bounds = BANDS[name].bounds(_mean(run[:WINDOW]), limits[name])
            edges = zip(("lower bound", "upper bound"), bounds, strict=True)
            ends = (run[0][0], run[-1][0])
            lines = [Series(label, [(x, edge) for x in ends]) for label, edge in edges if edge is not None]
            yield line_chart(f"{name}: {BANDS[name].title}", [Series("run", run), *lines])


def _held_out(log: list[dict], name: str) -> str:
    what = "the optimised reward" if name == "eval_scores" else f"{name.removeprefix('eval_')}, never trained on"
    return line_chart(f"overoptimization: {what}", [Series("held-out", points_of(log, name))])

"""report.html of a run: one self-contained file, readable on a phone.

    write_report(run_dir)          reads train_log.jsonl and, if they exist, samples.jsonl, run_config.json,
                                   summary.json, preferences.json (preferences.py), alarms.jsonl, job.json
    write_quickstart_report(root)  reads summary.json and the run directory of every stage

summary.json of several stages (values may be missing or null):

    {"seed": 0, "stages": [{"name": "sft", "run": "sft",         # the run directory below root
                            "pass_rate": 0.4,                    # held-out, by rules that are never trained on
                            "pass_rate_per_principle": {"polite": 0.8},
                            "proxy_reward": 0.1, "kl": 0.0,      # PPO's reward; KL to the reference, nats per sequence
                            "rm_accuracy": null, "seconds": 30.0}],
     "samples": [{"prompt": "...", "responses": [{"stage": "sft", "text": "...", "violates": ["polite"]}]}]}
"""

import json
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path

from . import monitors, preferences
from .charts import Series, line_chart, points_of, short
from .disk import read_json
from .errors import ConfigError
from .page import bar, details, grid, section, table, write_page

MAX_SAMPLES = 12  # on the page; samples.jsonl has all

# The most important charts, in reading order: (title, percent?, {metric: label}). A chart appears if the log has one of
# its metrics.
CHARTS = [
    ("Loss", False, {"loss": "training", "eval_loss": "held-out"}),
    ("Token accuracy", True, {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held-out"}),
    ("Preference accuracy", True, {"accuracy": "training", "eval_accuracy": "held-out"}),
    ("Margin, chosen over rejected", False, {"margin": "training", "eval_margin": "held-out"}),
    ("Reward that PPO optimises", False, {
        "objective/scores": "score", "objective/raw_scores": "raw score", "eval_scores": "held-out raw score",
        "objective/rlhf_reward": "score minus KL",
    }),
    ("True score, never trained on", True, {"eval_pass_rate": "held-out pass rate"}),
    ("KL to the reference, per sequence", False, {"objective/kl": "training", "eval_kl": "held-out"}),
    ("Response length, tokens", False, {"response_length/mean": "training", "eval_response_length/mean": "held-out"}),
    ("Policy loss", False, {"loss/policy_avg": "policy"}),
    ("Value loss", False, {"loss/value_avg": "value"}),
    ("Clipped share of tokens", False, {"policy/clipfrac_avg": "policy", "val/clipfrac_avg": "value"}),
    ("Entropy per token", False, {"policy/entropy_avg": "nats"}),
]  # fmt: skip


def write_report(run_dir: str | Path) -> Path:
    """Writes `run_dir`/report.html from the logs of one trainer and returns its path.

    Raises FileNotFoundError if the directory has no train_log.jsonl, ConfigError if a line of it is damaged.
    """
    run_dir = Path(run_dir)
    log = read_jsonl(run_dir / "train_log.jsonl")
    evaluation = read_mapping(run_dir / "preferences.json")
    body = [
        f"<p>{len(log)} log lines, to step {short(max((row.get('step', 0) for row in log), default=0))}.</p>",
        section("Result", _mapping_table("", run_dir / "summary.json")),
        section("Monitors", _monitors(run_dir, log)),
        section("Held-out preferences", preferences.report_section(evaluation) if evaluation else ""),
        section("Curves", _figures(log)),
        section("Samples", _first_and_last(read_jsonl(run_dir / "samples.jsonl", missing_ok=True))),
        details("Every other metric", _other_figures(log)),
        details("Last value of each metric", _last_values(log)),
        details("Models, data and rewards", _mapping_table("Key", run_dir / "job.json")),
        details("Configuration", _mapping_table("Key", run_dir / "run_config.json")),
    ]
    return write_page(run_dir / "report.html", f"Run {run_dir.resolve().name}", body)


def write_quickstart_report(root: str | Path) -> Path:
    """Writes `root`/report.html over all stages of summary.json and returns its path.

    Raises FileNotFoundError if there is no summary.json, ConfigError if it is damaged or lists no stages.
    """
    root = Path(root)
    summary = read_json(root / "summary.json")
    stages = summary.get("stages")
    if not stages:
        raise ConfigError(f"report: {root / 'summary.json'} lists no stages: give the output_dir of a run")
    runs = {stage["name"]: root / stage.get("run", stage["name"]) for stage in stages}
    logs = {name: read_jsonl(run / "train_log.jsonl", missing_ok=True) for name, run in runs.items()}
    body = [
        _headline(summary),
        section("Stages", _stage_table(stages)),
        section("What they learned from", _counts_table(stages)),
        section("True against proxy", _true_against_proxy(stages, logs)),
        section("Pass rate per principle", _principle_table(stages)),
        section("Before and after", _sample_cards(summary.get("samples", []))),
        *(section(f"Curves of {name}", _figures(log)) for name, log in logs.items()),
    ]
    return write_page(root / "report.html", "From a base model to an aligned one", body)


def read_jsonl(path: Path, *, missing_ok: bool = False) -> list[dict]:
    """The rows of a .jsonl file, without a torn last row. missing_ok: return [] if there is no such file.

    ConfigError names the first line that is not a JSON object.
    """
    if missing_ok and not path.exists():
        return []
    return [_row(line, path, number) for number, line in enumerate(whole_lines(path), 1) if line.strip()]


def _row(line: bytes, path: Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ConfigError(f"{path}: line {number} is not a JSON object, so it was damaged: delete that line")
    return row


def whole_lines(path: Path) -> Iterator[bytes]:
    """Reads the lines of a file one at a time, without "\\n". A last line without "\\n" is left out: writing it was
    interrupted, or has not finished.

    Bytes, because a crash may cut a character in two, and because str.splitlines would also split at a U+2028.
    """
    with path.open("rb") as file:
        yield from (line[:-1] for line in file if line.endswith(b"\n"))


# -- curves --------------------------------------------------------------------------------------------------------


def _figures(log: list[dict]) -> str:
    return grid(
        line_chart(title, [Series(label, points_of(log, metric)) for metric, label in metrics.items()], percent=percent)
        for title, percent, metrics in CHARTS
    )


def _monitors(run_dir: Path, log: list[dict]) -> str:
    """The alarms and charts of the monitors (monitors.py); "" for a run whose config has none."""
    limits = (read_mapping(run_dir / "run_config.json") or {}).get("monitors")
    alarms = read_jsonl(run_dir / "alarms.jsonl", missing_ok=True)
    return "" if limits is None else monitors.report_section(log, limits, alarms)


def _other_figures(log: list[dict]) -> str:
    shown = {"step", *(metric for _, _, metrics in CHARTS for metric in metrics)}
    names = dict.fromkeys(name for row in log for name in row if name not in shown)
    return grid(line_chart(name, [Series("", points)]) for name in names if (points := points_of(log, name)))


def _true_against_proxy(stages: list[dict], logs: dict[str, list[dict]]) -> str:
    """For every stage that has both: the curves of the reward that the policy optimises and of the pass rate."""
    cells = []
    for stage in stages:
        name, log = stage["name"], logs[stage["name"]]
        true, kl = points_of(log, "eval_pass_rate"), points_of(log, "objective/kl")
        proxy = points_of(log, "objective/raw_scores") or points_of(log, "objective/scores")  # eval_scores is raw
        principles = [Series(p, points_of(log, f"eval_{p}")) for p in stage.get("pass_rate_per_principle") or {}]
        if proxy and true:
            steps = [step for step, _ in (*proxy, *true)]
            axis = (min(steps), max(steps))  # shared by the three charts, for comparison
            scores = [Series("training", proxy), Series("held-out", points_of(log, "eval_scores"))]
            cells += [
                line_chart(f"{name}: proxy reward", scores, x_range=axis),
                line_chart(f"{name}: pass rate", [Series("all", true), *principles], percent=True, x_range=axis),
                line_chart(f"{name}: KL to the reference", [Series("nats", kl)], x_range=axis),
            ]
    note = "<p>The policy sees only the proxy. If it rises while the pass rate falls, the reward is being hacked.</p>"
    return note + grid(cells) if cells else ""


# -- tables --------------------------------------------------------------------------------------------------------


def _headline(summary: dict) -> str:
    rated = [stage for stage in summary["stages"] if stage.get("pass_rate") is not None]
    seconds = sum(stage.get("seconds") or 0 for stage in summary["stages"])
    text = f"Seed {escape(str(summary.get('seed', 'not recorded')))}, {seconds:.0f} s in total."
    if rated:
        rates = ", ".join(f"{stage['pass_rate']:.0%} after {escape(stage['name'])}" for stage in rated)
        text += f" Share of answers to held-out prompts that keep every rule: {rates}."
    return f'<p class="lead">{text}</p>'


def _stage_table(stages: list[dict]) -> str:
    columns = [
        ("Pass rate", "pass_rate", "{:.1%}"),
        ("Proxy reward", "proxy_reward", "{:.2f}"),
        ("KL, nats", "kl", "{:.2f}"),
        ("RM accuracy", "rm_accuracy", "{:.1%}"),
        ("Seconds", "seconds", "{:.0f}"),
    ]
    rows = [["Stage", *(title for title, _, _ in columns)]]
    for stage in stages:
        values = [(key, stage.get(key), form) for _, key, form in columns]
        rows.append(
            [stage["name"], *("" if v is None else bar(v, form, key == "pass_rate") for key, v, form in values)]
        )
    return table(rows)


def _counts_table(stages: list[dict]) -> str:
    """The counts of records, by what became of them, of each stage that has them: in total, or by part."""
    rows = []
    for stage in stages:
        counts = stage.get("counts", {})
        parts = {f" ({part})": n for part, n in counts.items() if isinstance(n, dict)} or {"": counts}
        rows += [[stage["name"] + part, in_words(n)] for part, n in parts.items() if n]
    return table([["Stage", "Records"], *rows]) if rows else ""


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n or status == "inputs")


def _principle_table(stages: list[dict]) -> str:
    rated = [stage for stage in stages if stage.get("pass_rate_per_principle")]
    principles = list(dict.fromkeys(p for stage in rated for p in stage["pass_rate_per_principle"]))
    if not principles:
        return ""
    rows = [["Principle", *(stage["name"] for stage in rated)]]
    for principle in principles:
        values = [stage["pass_rate_per_principle"].get(principle) for stage in rated]
        rows.append([principle, *("" if value is None else bar(value, "{:.0%}", True) for value in values)])
    return table(rows)


def _last_values(log: list[dict]) -> str:
    last: dict = {}
    for row in log:
        last.update(row)
    return table([["Metric", "Last value"], *([name, _plain(value)] for name, value in last.items())]) if last else ""


def read_mapping(path: Path) -> dict | None:
    """The mapping in a JSON file; None if the file is missing, torn, or holds something else."""
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mapping if isinstance(mapping, dict) else None


def _mapping_table(head: str, path: Path) -> str:
    mapping = read_mapping(path)
    if mapping is None:
        return ""
    return table([[head, "Value"], *([key, _plain(value)] for key, value in mapping.items())])


def _plain(value) -> str:
    return short(value) if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


# -- samples -------------------------------------------------------------------------------------------------------


def _first_and_last(samples: list[dict]) -> str:
    """The responses to each prompt at the first and at the last evaluation, side by side.

    A record with several responses per evaluation (chosen and rejected) is shown at the last evaluation only. Two
    records may have the same prompt, or none. They are distinguished by their index, or if they have none by their
    order, which is the same at every evaluation.
    """
    by_record: dict[tuple, list[dict]] = {}
    times: Counter[tuple] = Counter()
    for sample in samples:
        prompt = _dialogue(sample.get("prompt", ""))
        times[at := (sample.get("step"), prompt)] += 1
        by_record.setdefault((sample.get("record", f"number {times[at]}"), prompt), []).append(sample)
    cards = []
    for (_, prompt), rows in list(by_record.items())[:MAX_SAMPLES]:
        last = [row for row in rows if row.get("step") == rows[-1].get("step")]
        shown = [rows[0], rows[-1]] if len(last) == 1 < len(rows) else last
        replies = []
        for row in shown:
            extra = {k: v for k, v in row.items() if k not in ("step", "record", "prompt", "response")}
            note = ", ".join(f"{key} {_plain(value)}" for key, value in extra.items())
            replies.append(_reply(f"step {row.get('step', '?')}", row.get("response", ""), note))
        cards.append(_card(prompt, replies))
    return "".join(cards)


def _sample_cards(samples: list[dict]) -> str:
    cards = []
    for sample in samples[:MAX_SAMPLES]:
        replies = []
        for reply in sample["responses"]:
            violates = reply.get("violates")
            mark = None if violates is None else not violates
            note = "keeps every principle" if mark else ", ".join(violates or [])
            replies.append(_reply(reply["stage"], reply["text"], note, mark))
        cards.append(_card(_dialogue(sample["prompt"]), replies))
    return "".join(cards)


def _dialogue(prompt) -> str:
    """A prompt (a string or messages) as escaped HTML."""
    if isinstance(prompt, str):
        return escape(prompt)
    return "<br>".join(f"<i>{escape(str(m['role']))}</i> {escape(str(m['content']))}" for m in prompt)


def _reply(label: str, text, note: str, passed: bool | None = None) -> str:
    shown = escape(text) if isinstance(text, str) else _dialogue(text)
    sign = {None: "", True: '<span class="ok">✓</span> ', False: '<span class="bad">✗</span> '}[passed]
    empty = '<em class="none">(empty)</em>'
    return f"<div><h4>{escape(label)}</h4><p>{shown or empty}</p><small>{sign}{escape(note)}</small></div>"


def _card(prompt: str, replies: list[str]) -> str:
    return f'<article><p class="prompt">{prompt}</p><div class="replies">{"".join(replies)}</div></article>'

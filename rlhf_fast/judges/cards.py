"""The HTML pages of judges/audit.py and judges/constitution_report.py, drawn from their dictionaries."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from ..charts import Series, heat_table, interval_chart, line_chart
from ..page import grid, section, table, write_page
from .protocol import UNDECIDED


def write_card(card: dict, path: Path) -> Path:
    """A judge's card as a self-contained page."""
    body = [
        _verdict(card),
        section("Against what needs no judge", _accuracies(card)),
        section("Position", _position(card)),
        section("Calibration", _calibration(card)),
        section("Principles", _principles(card["principles"])),
        section("Sentences added to the worse reply", _injections(card["injections"])),
        section("Answers", table([["Pairs", "number"], *([k, str(n)] for k, n in card["statuses"].items())])),
        section("Made with", _made_with(card)),
    ]
    return write_page(path, f"A judge's card: {_judge_name(card['judge'])}", body)


def _judge_name(judge: Mapping) -> str:
    return str(judge.get("model") or judge.get("backend") or "judge").rstrip("/").split("/")[-1]


def _verdict(card: dict) -> str:
    lead, floor = card["lead"], card["best_floor"]
    share = f"It prefers the reply that people prefer on {_percent(card['accuracy'])} of {card['pairs']} pairs."
    if gone := sum(n for status, n in card["statuses"].items() if status in UNDECIDED):
        share += f" Each of the {gone} on which it gave no answer counts one half."
    if card["at_floor"]:
        text = (
            f"At the floor. {share} The rule of thumb “{floor}”, which needs no judge, may do as well: "
            f"the lead over it is {_points(lead)} points. Labels from this judge need not say anything about the "
            "constitution."
        )
    else:
        text = (
            f"Above the floor. {share} That is {_points(lead)} points more than the best rule of thumb that needs no "
            f"judge, “{floor}”."
        )
    return f'<p class="verdict{" no" if card["at_floor"] else ""}">{escape(text)}</p>'


def _accuracies(card: dict) -> str:
    rows = [("judge", card["accuracy"]), *card["floors"].items()]
    drawn = interval_chart(
        "Share of pairs on which the better reply is chosen",
        [(name, x["mean"], x["low"], x["high"]) for name, x in rows],
    )
    figures = [["", "pairs", "accuracy"]]
    for name, x in card["length"].items():
        accuracy = "" if x["accuracy"] is None else f"{x['accuracy']:.1%}"
        figures.append([name.replace("_", " "), str(x["pairs"]), accuracy])
    note = (
        f"<p>{card['pairs']} pairs of {card['conversations']} conversations; intervals are 95 %, over conversations. "
        f"Cohen's kappa of judge and people: {_number(card['kappa'])}.</p>"
    )
    return note + grid([drawn]) + table(figures)


def _position(card: dict) -> str:
    position = card["position"]
    if not position:
        return "<p>No votes.</p>"
    first = "" if position["first"] is None else f" ({position['first']:.0%} of them the first place)"
    bias = position["order_bias"]
    text = (
        f"{position['same_position']:.1%} of {position['votes']} votes prefer the same place in both orders{first}. "
        f"The first place is worth {bias['mean']:.3f} nats ({bias['low']:.3f} to {bias['high']:.3f})."
    )
    if "identical" in card:
        x = card["identical"]
        text += f" In pairs of a reply with itself it is worth {x['order_bias']:.3f} nats ({x['pairs']} pairs)."
    rows = [["One verdict of two orders", "accuracy", "NLL", "Brier", "ECE"]]
    for name, x in card.get("averages", {}).items():
        rows.append([name, f"{x['accuracy']:.1%}", *(f"{x[k]:.3f}" for k in ("nll", "brier", "ece"))])
    return f"<p>{escape(text)}</p>" + (table(rows) if len(rows) > 1 else "")


def _calibration(card: dict) -> str:
    if "scores" not in card:
        return "<p>There are too few answers to calibrate the judge.</p>"
    slope = card["slope"]
    text = (
        f"The judge's log-odds are multiplied by {slope['mean']:.3g} ({slope['low']:.3g} to {slope['high']:.3g}), and "
        "labels are made with that slope. The NLL of a coin is 0.693. The calibrated figures are from held-out "
        "conversations."
    )
    rows = [["P(better)", "NLL", "Brier", "ECE"]]
    rows += [[name, *(f"{x[k]:.3f}" for k in ("nll", "brier", "ece"))] for name, x in card["scores"].items()]
    lines = [Series(name, [(sure, right) for sure, right, _ in bins]) for name, bins in card["reliability"].items()]
    lines.append(Series("exact", [(0.5, 0.5), (1.0, 1.0)]))
    drawn = line_chart("Share right against confidence", lines, percent=True, x_range=(0.5, 1.0), x_label="confidence")
    return f"<p>{escape(text)}</p>" + table(rows) + grid([drawn])


def _principles(principles: Mapping[str, dict]) -> str:
    drawn = interval_chart(
        "Accuracy of each principle on its own",
        [(name, *(x["accuracy"][k] for k in ("mean", "low", "high"))) for name, x in principles.items()],
    )
    rows = [["Principle", "accuracy", "same position", "order bias, nats", "label mass", "votes", "no vote"]]
    for name, x in principles.items():
        rows.append([
            name, f"{x['accuracy']['mean']:.1%}", _share(x["same_position"]),
            f"{x['order_bias']:.3f}", _number(x["label_mass"]), str(x["votes"]), _counts(x["missing"]),
        ])  # fmt: skip
    return grid([drawn]) + table(rows)


def _injections(injections: Mapping[str, dict]) -> str:
    if not injections:
        return ""
    rows = [["Sentence", "nats", "P, mean", "P, largest", "turned", "pairs", "no answer"]]
    for name, x in injections.items():
        rows.append([
            name, *(_number(x[k], "+") for k in ("nats", "probability")), _number(x["largest"]),
            f"{x['turned']}", f"{x['pairs']}", f"{x['no_answer']}",
        ])  # fmt: skip
    note = "<p>How far the verdict moves on average towards the worse reply when the sentence is added to it; the "
    note += "largest move of one pair; and how many pairs turn in its favour. No answer: pairs that were decided "
    return note + "without the sentence but not with it.</p>" + table(rows)


def _made_with(card: dict) -> str:
    rows = [["", "value"], ["constitution", f"{card['constitution']} ({card['constitution_sha256'][:12]})"]]
    rows += [[f"judge: {name}", str(value)] for name, value in card["judge"].items()]
    rows += [["principles per pair", str(card["principles_per_pair"] or "all")]]
    rows += [["rows left out because they are few-shots", str(card["in_few_shots"])], ["seed", str(card["seed"])]]
    return table(rows)


def write_constitution_report(report: dict, path: Path) -> Path:
    """The report on a constitution as a page."""
    names = list(report["principles"])
    body = [
        _reading(report),
        section("Principles", _votes_table(report)),
        section(
            "Correlation of votes", heat_table(names, [[report["correlation"][a][b] for b in names] for a in names])
        ),
        section("Pairs of principles", _pairs_table(report)),
    ]
    return write_page(path, f"A constitution's report: {report['constitution']}", body)


def _reading(report: dict) -> str:
    text = (
        f"{report['pairs']} pairs, {report['labels']} labels under {len(report['principles'])} principles, whose votes "
        f"are worth {report['effective_principles']:.1f} independent ones."
    )
    warn = report["effective_principles"] < 0.25 * len(report["principles"])
    if warn:
        text += " The votes hardly depend on the principle: the judge ignores it, or all principles ask the same."
    return f'<p class="verdict{" no" if warn else ""}">{escape(text)}</p>'


def _votes_table(report: dict) -> str:
    truth = any(x["accuracy"] is not None for x in report["principles"].values())
    head = ["Principle", "weight", "votes", "decided", "agrees", "|nats|", "same place", "turns", "makes"]
    rows = [[*head, "change of P", *(["accuracy", "without"] if truth else [])]]
    for name, x in report["principles"].items():
        more = [_share(x["accuracy"]), _share(x["accuracy_without"])] if truth else []
        rows.append([
            name, f"{x['weight']:g}", str(x["votes"]), _share(x["decided"]), _share(x["agrees"]), f"{x['size']:.3f}",
            _share(x["same_position"]), str(x["turns"]), str(x["makes"]), f"{x['change']:.4f}", *more,
        ])  # fmt: skip
    note = (
        "<p>decided: votes that are not a tie; agrees: with the verdict of all others; |nats|: mean size. Leave one "
        "out (turns, makes, change of P): labels that turn to the other side without the principle, labels that become "
        "ties without it, and the mean change of P. accuracy: of the principle alone, on the pairs that it voted on; "
        "without: of all the others.</p>"
    )
    return table(rows) + note


def _pairs_table(report: dict) -> str:
    groups = (("redundant", "Redundant: votes rise and fall together"), ("contradictory", "Contradictory: they oppose"))
    parts = []
    for key, title in groups:
        rows = [[title, "", "correlation", "opposed"]]
        rows += [[x["a"], x["b"], f"{x['correlation']:.2f}", f"{x['opposed']:.0%}"] for x in report[key]]
        parts.append(table(rows) if len(rows) > 1 else f"<p>{escape(title.split(':')[0])} pairs: none.</p>")
    return "".join(parts)


def _percent(x: Mapping) -> str:
    return f"{x['mean']:.1%} ({x['low']:.1%} to {x['high']:.1%})"


def _points(x: Mapping) -> str:
    return f"{100 * x['mean']:+.1f} ({100 * x['low']:+.1f} to {100 * x['high']:+.1f})"


def _share(x: float | None) -> str:
    return "" if x is None else f"{x:.0%}"


def _number(x: float | None, sign: str = "") -> str:
    return "" if x is None else f"{x:{sign}.3f}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {status}" for status, n in counts.items())

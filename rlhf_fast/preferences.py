"""How far a reward model can be trusted, from its rewards on held-out comparisons: numbers, and the report's section.

    d = r(chosen) - r(rejected)        a pair agrees if d > 0; a tie is half an agreement
    P(chosen is better) = sigma(d)     calibrated if a share c of the pairs with sigma(|d|) near c agrees
    ECE = sum over bins of (pairs in the bin / all pairs) |mean sigma(|d|) - share that agrees|  (Guo et al. 2017)

If a label is a probability p, accuracy takes the likelier side as the better one (p = 1/2 is a tie), and calibration
counts p of an agreement if d > 0 and 1 - p if d < 0. A reward model has to beat the floors of data/floors.py. The
split by length shows whether it follows length instead of the labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .charts import Series, bar_chart, line_chart
from .data.floors import accuracy, wilson_interval
from .page import Html, grid, table


@dataclass
class Pairs:
    """M pairs of responses, each with the better response first."""

    rewards: np.ndarray  # (M, 2)
    lengths: np.ndarray  # (M, 2), tokens
    target: np.ndarray  # (M,): the probability that the first response is better
    weight: np.ndarray  # (M,)
    source: list[str | None]  # M: where the pair comes from
    prompt: np.ndarray  # (M,): identifies the prompt that the pair answers


def evaluate_pairs(pairs: Pairs, floors: dict[str, float]) -> dict:
    """Everything that report_section() shows, as JSON.

    The interval of a share is Wilson's at 95 %. Its number of trials counts prompts, because several pairs of one
    prompt are not independent: (sum W)^2 / sum W^2, where W is the weight of a prompt's pairs (Kish 1965). A margin
    that is not finite counts as wrong whatever the label, and not_finite is the number of these; margin, calibration
    and correlations leave them out. margin is null if no pair remains, ece if no remaining pair has weight.
    """
    rewards = pairs.rewards.astype(np.float64)  # float32 has too few values between nearly equal margins
    with np.errstate(invalid="ignore"):  # inf - inf
        margin = rewards[:, 0] - rewards[:, 1]
    finite = np.isfinite(margin)
    margin = np.where(finite, margin, np.sign(0.5 - pairs.target))
    agrees = np.select([margin > 0, margin < 0], [pairs.target, 1 - pairs.target], 0.5)
    longer = pairs.lengths[:, 0] - pairs.lengths[:, 1]

    def share(rows: np.ndarray) -> dict:
        right = float(accuracy(*(torch.from_numpy(x[rows]) for x in (margin, pairs.target, pairs.weight))))
        weight = np.bincount(np.unique(pairs.prompt[rows], return_inverse=True)[1], pairs.weight[rows])  # by prompt
        low, high = wilson_interval(right, weight.sum() ** 2 / (weight**2).sum()) if weight.any() else (0.0, 1.0)
        return {"pairs": int(rows.sum()), "accuracy": right, "low": low, "high": high}

    everything = np.ones(len(margin), bool)
    sources = sorted({s for s in pairs.source if s is not None})
    return {
        **share(everything),
        "ties": int((margin[finite] == 0).sum()),
        "not_finite": int((~finite).sum()),
        "margin": _spread(margin[finite]) if finite.any() else None,
        "calibration": _calibration(margin[finite], agrees[finite], pairs.weight[finite]),
        "by_length_difference": [
            {"from": int(longer[rows].min()), "to": int(longer[rows].max()), **share(rows)} for rows in _fifths(longer)
        ],
        "length_correlation": {
            "reward_with_length": _correlation(rewards[finite].ravel(), pairs.lengths[finite].ravel()),
            "margin_with_length_difference": _correlation(margin[finite], longer[finite]),
        },
        "by_source": {s: share(np.array([x == s for x in pairs.source])) for s in sources},
        "floors": floors,
    }  # fmt: skip


def _spread(margin: np.ndarray) -> dict:
    """Mean, standard deviation, quantiles and histogram."""
    low, high = float(margin.min()), float(margin.max())
    least = 1e-6 * max(1.0, abs(low), abs(high))  # the smallest span with 25 distinct edges
    span = (low, high) if high - low > least else (low - least, high + least)
    counts, edges = np.histogram(margin, bins=24, range=span)
    return {
        "mean": float(margin.mean()), "std": float(margin.std()),
        "quantiles": np.quantile(margin, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist(),
        "counts": counts.tolist(), "edges": edges.tolist(),
    }  # fmt: skip


def _calibration(margin: np.ndarray, agrees: np.ndarray, weight: np.ndarray) -> dict:
    """ECE (null without weight) and its 10 bins of equal width in the confidence sigma(|d|), from 0.5 to 1."""
    bins = 10
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows, ece = [], 0.0
    for k in range(bins):
        inside = place == k
        if weight[inside].sum():
            mean = [float(np.average(x[inside], weights=weight[inside])) for x in (confidence, agrees)]
            ece += float(weight[inside].sum() / weight.sum()) * abs(mean[0] - mean[1])
            rows.append({"confidence": mean[0], "accuracy": mean[1], "pairs": int(inside.sum())})
    return {"ece": ece if rows else None, "bins": rows}


def _fifths(values: np.ndarray) -> list[np.ndarray]:
    """Masks of at most five groups of values of about equal size; equal values are in the same group."""
    edges = np.unique(np.quantile(values, (0.2, 0.4, 0.6, 0.8), method="nearest"))
    place = np.searchsorted(edges, values, side="left")
    return [place == k for k in np.unique(place)]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 if one of the two is constant."""
    if len(x) < 2 or not x.std() or not y.std():
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


# -- the section of the report -----------------------------------------------------------------------------------------


def report_section(evaluation: dict) -> str:
    """evaluate_pairs' result as HTML: accuracy next to the floors, margins, calibration, length, sources."""
    correlation, calibration = evaluation["length_correlation"], evaluation["calibration"]
    lead = (
        f"The reward model prefers the better response in <b>{evaluation['accuracy']:.1%}</b> of "
        f"{evaluation['pairs']:d} held-out pairs (95 % interval {_interval(evaluation)}; {evaluation['ties']:d} ties "
        "count half)."
    )
    if broken := evaluation["not_finite"]:
        lead += f" <b>The margin of {broken:d} is not finite</b>; these count as wrong."
    figures = [_reliability(calibration), _by_length(evaluation["by_length_difference"])]
    if evaluation["margin"]:
        figures.insert(0, _histogram(evaluation["margin"]))
    ece = "unknown" if calibration["ece"] is None else f"{calibration['ece']:.3f}"
    notes = (
        f"Expected calibration error {ece}: the average distance between the probability that the model gives to its "
        "preferences and the share of them that is right. Correlation of the reward with the response's length "
        f"{correlation['reward_with_length']:+.2f}, of the margin with the difference of lengths "
        f"{correlation['margin_with_length_difference']:+.2f}."
    )
    return (
        f'<p class="lead">{lead}</p>{_beside_floors(evaluation)}<p></p>{grid(figures)}<p>{notes}</p>'
        f"{_by_source(evaluation['by_source'])}"
    )


def _beside_floors(evaluation: dict) -> str:
    rows = [["", "Accuracy", "95 % interval"]]
    rows.append(["this reward model", f"{evaluation['accuracy']:.1%}", _interval(evaluation)])
    for name, value in evaluation["floors"].items():
        reached = evaluation["low"] > value
        note = "below the interval" if reached else "inside the interval" if value <= evaluation["high"] else "better"
        mark = Html(f'<span class="{"ok" if reached else "bad"}">{note}</span>')
        rows.append([f"without a model: {name}", f"{value:.1%}", mark])
    return table(rows)


def _interval(share: dict) -> str:
    return f"{share['low']:.1%} to {share['high']:.1%}"


def _histogram(margin: dict) -> str:
    bars = list(zip(margin["edges"], margin["edges"][1:], margin["counts"], strict=False))
    return bar_chart("Pairs by margin", bars, x_label="r(chosen) - r(rejected); wrong below 0")


def _reliability(calibration: dict) -> str:
    points = [(row["confidence"], row["accuracy"]) for row in calibration["bins"]]
    ideal = Series("calibrated", [(0.5, 0.5), (1.0, 1.0)])
    return line_chart(
        "Reliability", [ideal, Series("share that agrees", points)], percent=True, x_range=(0.5, 1.0),
        x_label="probability that it gives to its preference",
    )  # fmt: skip


def _by_length(rows: list[dict]) -> str:
    middle = [(row["from"] + row["to"]) / 2 for row in rows]
    lines = {"agreement": "accuracy", "95 % interval, low": "low", "high": "high"}
    series = [Series(label, list(zip(middle, [row[key] for row in rows], strict=True))) for label, key in lines.items()]
    return line_chart(
        "Agreement by length difference", series, percent=True, x_label="tokens by which the better response is longer"
    )


def _by_source(sources: dict[str, dict]) -> str:
    if not sources:
        return ""
    rows = [["Source", "Pairs", "Accuracy", "95 % interval"]]
    rows += [[name, str(s["pairs"]), f"{s['accuracy']:.1%}", _interval(s)] for name, s in sources.items()]
    return table(rows)

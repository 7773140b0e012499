"""The contribution of each principle of a constitution to the labels, computed from existing votes.

    votes            their number, how many decide (|P - 1/2| >= tie_margin), their size, and how often they prefer the
                     same position
    agrees           share of decided votes on the side of the verdict of all other principles
    leave one out    labels that turn to the other side without the principle, or become ties; mean |change of P|, over
                     the pairs that have a verdict with and without it
    redundant        pairs of principles whose votes correlate at `REDUNDANT` or more
    contradictory    pairs whose votes correlate at `CONTRADICTORY` or less, or oppose each other on more than
                     `OPPOSED` of the pairs on which both have a side
    effective        (sum of eigenvalues)^2 / sum of their squares, of the correlation matrix: the number of independent
                     principles that the votes are worth; 1 if every principle gets the same vote

The judge is not asked. Other weights give other labels from the same votes (labels.derive), and this report shows which
principles deserve a weight.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..disk import write_json
from .calibration import UNCALIBRATED, Calibration, sigmoids
from .cards import write_constitution_report
from .labels import label_settings, read_judgements, settings_of, verdict_of
from .protocol import Verdict, sigmoid

REDUNDANT, CONTRADICTORY, OPPOSED = 0.9, -0.3, 2 / 3  # independent votes oppose each other on half of the pairs
_MIN_VOTES = 10  # in common, for a correlation


def report_on(judgements: str | Path, *, name: str = "", calibration: Calibration | None = None) -> dict:
    """The report on a directory with judgements.jsonl, as written by `label`. Writes constitution.json and
    constitution.html there, and returns the content of the former. name: the constitution's, for the heading.
    calibration: for judgements without labels; None takes that of the labels, like all other settings."""
    source, made_with = Path(judgements), settings_of(judgements)
    how = label_settings(made_with["judge"], made_with, calibration=calibration)
    records, calibration = read_judgements(source), Calibration(**how["calibration"])
    report = constitution_report(records, made_with["weights"], how["combine"], calibration, how["tie_margin"])
    report = {"constitution": name or made_with["constitution_sha256"][:12], **report}
    write_json(source / "constitution.json", report, indent=1)
    write_constitution_report(report, source / "constitution.html")
    return report


def constitution_report(
    records: Sequence[dict], weights: Mapping[str, float], combine: str = "logit",
    calibration: Calibration = UNCALIBRATED, tie_margin: float = 0.01,
) -> dict:  # fmt: skip
    """records: judgements (labels.judge_pairs), with "better" ("a" or "b") if people compared the pair."""
    names = [name for name, weight in weights.items() if weight > 0]
    votes = np.full((len(records), len(names)), np.nan)  # (N, P) log-odds that a is better
    same = [[] for _ in names]
    for i, record in enumerate(records):
        for v in record["votes"]:
            if v["principle"] in names:
                p = names.index(v["principle"])
                votes[i, p] = (v["logit_ab"] + v["logit_ba"]) / 2
                same[p].append(v["logit_ab"] * v["logit_ba"] < 0)

    def verdicts(without: str | None = None) -> list[Verdict]:
        used = {n: 0.0 if n == without else w for n, w in weights.items()}
        return [verdict_of(r, used, combine=combine, calibration=calibration) for r in records]

    def labels(found: Sequence[Verdict]) -> tuple[np.ndarray, np.ndarray]:
        """(N,) 1 for a, -1 for b, 0 for no label; and (N,) P(a is better), NaN without a verdict."""
        p = np.array([sigmoid(calibration.slope * v.logit) if v.status in ("ok", "tie") else np.nan for v in found])
        side = np.sign(np.nan_to_num(p - 0.5)) * (np.abs(np.nan_to_num(p - 0.5)) >= tie_margin)
        return side, p

    people = np.array([{"a": 1, "b": -1}.get(r.get("better"), 0) for r in records])
    side, p = labels(verdicts())
    table = {}
    for j, name in enumerate(names):
        voted = ~np.isnan(votes[:, j])
        cast, vote = votes[:, j][voted], np.nan_to_num(votes[:, j])
        decides = np.abs(sigmoids(calibration.slope * vote) - 0.5) >= tie_margin
        others, p_without = labels(verdicts(name))
        both = decides & (others != 0)
        known, moved = people != 0, np.abs(p - p_without)
        table[name] = {
            "weight": weights[name], "votes": len(cast), "decided": _mean(decides[voted]),
            "agrees": _mean(np.sign(vote[both]) == others[both]), "size": _mean(np.abs(cast)) or 0.0,
            "same_position": _mean(np.array(same[j])),
            "turns": int((side * others < 0).sum()), "makes": int(((side != 0) & (others == 0)).sum()),
            "change": _mean(moved[~np.isnan(moved)]) or 0.0,
            "accuracy": _accuracy(np.sign(vote)[known & voted], people[known & voted]),
            "accuracy_without": _accuracy(others[known], people[known]),
        }  # fmt: skip
    return {
        "pairs": len(records), "labels": int((side != 0).sum()), "principles": table,
        "accuracy": _accuracy(side[people != 0], people[people != 0]), **_compared(names, votes),
    }  # fmt: skip


def _compared(names: Sequence[str], votes: np.ndarray) -> dict:
    """The principles compared with each other. votes: (N, P) log-odds that a is better, NaN without a vote."""
    correlation = {
        a: {b: _correlation(votes[:, i], votes[:, j]) for j, b in enumerate(names)} for i, a in enumerate(names)
    }
    compared = [
        {"a": a, "b": b, "correlation": correlation[a][b], "opposed": _opposed(votes[:, i], votes[:, j])}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j and correlation[a][b] is not None
    ]
    return {
        "correlation": correlation,
        "effective_principles": _effective(correlation),
        "redundant": [x for x in compared if x["correlation"] >= REDUNDANT],
        "contradictory": [x for x in compared if x["correlation"] <= CONTRADICTORY or x["opposed"] > OPPOSED],
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _accuracy(side: np.ndarray, people: np.ndarray) -> float | None:
    """Ties count one half. None if people compared nothing."""
    return float(((side * people + 1) / 2).mean()) if len(people) else None


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's, over the pairs on which both voted. None for fewer than ten such pairs, or if a vote never varies."""
    both = ~(np.isnan(x) | np.isnan(y))
    x, y = x[both], y[both]
    if len(x) < _MIN_VOTES or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _opposed(x: np.ndarray, y: np.ndarray) -> float:
    """Share of opposed votes among the pairs on which both votes have a side."""
    product = np.nan_to_num(x) * np.nan_to_num(y)
    decided = product != 0
    return float((product[decided] < 0).mean()) if decided.any() else 0.0


def _effective(correlation: Mapping[str, Mapping[str, float | None]]) -> float:
    names = [name for name in correlation if correlation[name][name] is not None]
    if not names:
        return 0.0
    matrix = np.array([[correlation[a][b] or 0.0 for b in names] for a in names])
    values = np.clip(np.linalg.eigvalsh(matrix), 0, None)
    return float(values.sum() ** 2 / (values**2).sum())

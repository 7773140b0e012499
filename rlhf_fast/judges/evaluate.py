"""How good a judge is, beside what costs nothing: choosing the longer reply.

    accuracy        share of pairs on which it prefers the reply that people prefer; a tie or no answer counts 1/2
    same_position   share of pairs on which it prefers whatever stands first, or last, in both orders
    order_bias      mean of (logit_ab - logit_ba) / 2, in nats: what standing first is worth

Intervals are 95 % from a bootstrap over conversations, not over pairs: several pairs share one conversation, and a
judge tends to be right or wrong on all of them.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .layouts import messages_of, parse_turns
from .ledger import Ledger
from .protocol import Judge, Pair
from .stages import read_items, seed_for


def evaluate_judge(
    judge: Judge, principles: Sequence, rows: Sequence[dict], *, ledger: Ledger | None = None, samples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """rows: {"prompt": str | messages, "better": str, "worse": str}. Every pair is judged under all principles.

    Returns the figures above, `*_low` and `*_high` of each accuracy, `longer` (the accuracy of choosing the longer
    reply), `lead` (accuracy - longer, from the same resamples) and the counts of answers by status. A judge whose
    lead_low is not above 0 has not been told from the floor.
    """
    items = read_items(rows, ("better", "worse"))
    flipped = [random.Random(seed_for(seed, item["id"], "order")).random() < 0.5 for item in items]
    questions = [
        Pair(i["prompt"], *((i["worse"], i["better"]) if flip else (i["better"], i["worse"])), principles)
        for i, flip in zip(items, flipped, strict=True)
    ]
    verdicts = judge.compare(questions, ledger)
    logits = [
        0.0 if v.status != "ok" else (-v.logit if flip else v.logit) for v, flip in zip(verdicts, flipped, strict=True)
    ]
    right = (np.sign(logits) + 1) / 2  # (N,) 1, 1/2 or 0
    longer = (np.sign([len(i["better"]) - len(i["worse"]) for i in items]) + 1) / 2
    clusters = [json.dumps(item["prompt"], sort_keys=True) for item in items]
    figures = {"pairs": len(items), "conversations": len(set(clusters))}
    columns = {"accuracy": right, "longer": longer, "lead": right - longer}
    for name, (mean, low, high) in cluster_bootstrap(columns, clusters, samples, seed).items():
        figures |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    votes = [v for verdict in verdicts for v in verdict.votes]
    if votes:
        figures["same_position"] = float(np.mean([v.logit_ab * v.logit_ba < 0 for v in votes]))
        figures["order_bias"] = float(np.mean([(v.logit_ab - v.logit_ba) / 2 for v in votes]))
        figures["label_mass"] = float(np.mean([v.label_mass for v in votes]))
    statuses = [verdict.status for verdict in verdicts]
    return figures | {status: statuses.count(status) for status in sorted(set(statuses))}


def cluster_bootstrap(
    columns: dict[str, np.ndarray], clusters: Sequence, samples: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """(mean, 2.5 % and 97.5 % quantile of the mean) of each (N,) column, clusters being drawn with replacement."""
    _, which = np.unique(clusters, return_inverse=True)
    sizes = np.bincount(which)
    draws = np.random.default_rng(seed).integers(0, len(sizes), (samples, len(sizes)))  # (samples, clusters)
    results = {}
    for name, values in columns.items():
        sums = np.bincount(which, weights=values)
        means = sums[draws].sum(1) / sizes[draws].sum(1)
        low, high = np.quantile(means, [0.025, 0.975])
        results[name] = (float(np.mean(values)), float(low), float(high))
    return results


def read_released_comparisons(path: str | Path) -> list[dict]:
    """Rows of a released evaluation file (`text_correct`, `text_incorrect`: whole dialogues) for `evaluate_judge`."""
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        row = json.loads(line)
        better, worse = parse_turns(row["text_correct"]), parse_turns(row["text_incorrect"])
        if better[:-1] != worse[:-1]:
            raise ValueError(f"{path}, line {number}: the two dialogues differ before their last reply")
        rows.append({"prompt": messages_of(better[:-1]), "better": better[-1][1], "worse": worse[-1][1]})
    return rows

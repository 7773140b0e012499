"""Decides from the card that `audit` wrote whether a judge may label, and how its log-odds are calibrated.

label(pairs, constitution, judge, calibration=trusted(judge, constitution, "runs/cai/audit"), output_dir=...)
"""

import json
from collections.abc import Mapping
from pathlib import Path

from ..disk import read_json
from ..errors import ConfigError
from .calibration import UNCALIBRATED, Calibration, fit_bias, fit_slope
from .constitution import Constitution
from .labels import read_judgements, verdict_of, votes_of
from .protocol import Judge


def trusted(
    judge: Judge, constitution: Constitution, card: str | Path | None = None, *,
    principles_per_pair: int | None = None, combine: str | None = None, allow_weak_judge: bool = False,
) -> Calibration:  # fmt: skip
    """The calibration of a judge that may label: a judge of rules, or one whose card is above the floor.

    principles_per_pair: of the labels; it must equal the card's. combine: of the labels, if it differs from the
    judge's own; the calibration is then fitted again.

    Raises ConfigError for the card of another judge and, unless `allow_weak_judge` is set, for a judge without a card
    or at the floor.
    """
    if card is None:
        if judge.describe().get("backend") == "rule" or allow_weak_judge:
            return UNCALIBRATED
        raise ConfigError(
            "label: nothing is known about this judge. Run `rlhf-fast cai audit` on pairs that people compared "
            "and give its directory as card, or set allow_weak_judge"
        )
    labels = {
        "judge": judge.describe(), "constitution_sha256": constitution.sha256,
        "principles_per_pair": principles_per_pair,
    }  # fmt: skip
    known = _card_of(labels, card)
    if known["at_floor"] and not allow_weak_judge:
        lead = known["lead"]
        raise ConfigError(
            f"label: the judge is at the floor: its accuracy is {known['accuracy']['mean']:.3f}, its lead over "
            f"{known['best_floor']!r} {lead['mean']:+.3f} ({lead['low']:+.3f} to {lead['high']:+.3f}). Labels of "
            "such a judge teach nothing: use another judge, or set allow_weak_judge"
        )
    if combine in (None, known["combine"]):
        return Calibration(**known["calibration"])
    return refitted(card, labels, {p.id: p.weight for p in judge.comparable(constitution.principles)}, combine)


def refitted(card: str | Path, made_with: Mapping, weights: Mapping[str, float], combine: str) -> Calibration:
    """The calibration under other weights or another `combine`, fitted on the judgements of an audit.

    made_with: the settings of the labels (labels.settings_of). Raises ConfigError for the card of another judge.
    """
    _card_of(made_with, card)
    records = read_judgements(card)
    unbiased = Calibration(1.0, fit_bias(votes_of(records, weights)))
    verdicts = [verdict_of(r, weights, combine=combine, calibration=unbiased) for r in records]
    logits = [v.logit if r["better"] == "a" else -v.logit for r, v in zip(records, verdicts, strict=True)
              if v.status == "ok"]  # fmt: skip
    return Calibration(fit_slope(logits) if logits else 1.0, unbiased.bias)


def _card_of(made_with: Mapping, card: str | Path) -> dict:
    """The card in a directory. Its judge, constitution and principles_per_pair must be those of `made_with`."""
    path = Path(card) / "audit.json"
    if not path.is_file():
        raise ConfigError(f"card: there is no {path}; give the output_dir of `rlhf-fast cai audit` as card")
    known = read_json(path)
    for name in ("judge", "constitution_sha256", "principles_per_pair"):
        now = json.loads(json.dumps(made_with[name]))  # tuples become lists, as in the file
        if known.get(name) != now:
            raise ConfigError(
                f"card: {path} was made with another {name}: {known.get(name)!r} there, {now!r} now; audit this one"
            )
    return known

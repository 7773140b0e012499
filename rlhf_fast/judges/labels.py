"""The judge is asked for judgements once; labels are derived from them, as often as needed.

    judge_pairs   pairs, constitution, judge  ->  judgements.jsonl: the votes in both orders, and the missing ones
    derive        judgements                  ->  comparisons.jsonl: P(chosen is better); rejected.jsonl: other pairs

    logit         mean of the votes under the principles' weights, both orders           protocol.decide
    p_calibrated  sigmoid(slope * logit), after the bias is removed from each order      calibration.py
    p             p_calibrated, clamped; p_calibrated - 1/2 < tie_margin is a tie and gets no label

p is the probability of the preferred reply: P(chosen is better), at least 1/2. p_raw is that of the same reply without
calibration. If it is below 1/2, the order bias alone had favoured the other reply (combine: prob).

Other weights (0 leaves a principle out), another clamp, calibration or way to combine cost no call to the judge.
Settings that are not given stay as in the first labels.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from ..data.files import as_records, as_rows, read_dataset
from ..disk import make_directory, read_json
from ..errors import ConfigError
from .calibration import UNCALIBRATED, Calibration
from .constitution import Constitution, Principle
from .ledger import Ledger
from .principles import weight_field
from .protocol import UNDECIDED, Judge, Missing, Pair, Verdict, Vote, decide, sigmoid
from .stages import Stage, claim, finish_stage, read_items, run_stage, seed_for

COMBINE = ("logit", "prob", "sum")
COT_CLAMP = (0.4, 0.6)


def judge_pairs(
    pairs: Iterable[dict], constitution: Constitution, judge: Judge, *, output_dir: str | Path,
    principles_per_pair: int | None = None, batch_size: int = 32, seed: int = 0, settings: dict | None = None,
    retry: Iterable[str] = ("failed",), drawn_as: Callable[[str], str] = str, ledger: Ledger | None = None,
) -> list[dict]:  # fmt: skip
    """Asks the judge to compare each pair. Writes judgements.jsonl and returns its records, one per pair: its columns,
    "votes" and "missing".

    pairs: rows {"prompt": str | messages, "a": str, "b": str}, optionally "id" and "better" ("a" or "b"). A "status",
    if there is one, must be "ok". principles_per_pair: how many principles to draw for a pair; None takes all. retry:
    statuses of earlier runs that are asked again. drawn_as: id -> the id by which the pair's principles are drawn, so
    that an audit's probe gets those of its pair. ledger: an open one to ask through; None opens that of output_dir.
    """
    usable = usable_principles(judge, constitution, principles_per_pair)
    pairs = as_rows(pairs, "pairs")
    items = read_items(pairs, ("a", "b"))
    for item, row in zip(items, pairs, strict=True):
        if row.get("status", "ok") != "ok":
            raise ConfigError(
                f"pair {item['id']}: its status is {row['status']!r}, and only pairs with status 'ok' can be compared. "
                "Run `cai pairs` again: it moves the others to rejected.jsonl and generates nothing twice"
            )
        if "better" in row:
            if row["better"] not in ("a", "b"):
                raise ConfigError(f"pair {item['id']}: 'better' is {row['better']!r}, needs 'a' or 'b'")
            item["better"] = row["better"]

    def question(item: dict) -> Pair:
        draw = random.Random(seed_for(seed, drawn_as(item["id"]), "principles"))
        drawn = usable if principles_per_pair is None else draw.sample(usable, principles_per_pair)
        return Pair(item["prompt"], item["a"], item["b"], drawn)

    described = {
        "seed": seed, "principles_per_pair": principles_per_pair, "judge": judge.describe(),
        "constitution_sha256": constitution.sha256, "weights": {p.id: p.weight for p in usable}, **(settings or {}),
    }  # fmt: skip
    with contextlib.nullcontext(ledger) if ledger else Ledger(output_dir, retry=retry) as ledger:

        def work(batch: list[dict]) -> list[dict]:
            verdicts = judge.compare(list(map(question, batch)), ledger)
            return [_judgement(i, v) for i, v in zip(batch, verdicts, strict=True)]

        return run_stage(
            ledger, "judgements", items, work, settings=described, batch_size=batch_size, output_dir=output_dir
        )


def usable_principles(judge: Judge, constitution: Constitution, principles_per_pair: int | None) -> list[Principle]:
    """The principles under which the judge compares. ConfigError if there are too few for a pair."""
    usable = judge.comparable(constitution.principles)
    if principles_per_pair is not None and principles_per_pair < 1:
        raise ConfigError(f"label: principles_per_pair = {principles_per_pair} must be 1 or more, or None for all")
    if len(usable) < (principles_per_pair or 1):
        raise ConfigError(
            f"label: this judge can compare under {len(usable)} principles of "
            f"constitution {constitution.name!r}, needs {principles_per_pair or 'at least 1'}: give principles a "
            "`compare` text (a rule judge needs a `check` with a rule), or lower principles_per_pair"
        )
    return usable


def _judgement(item: dict, verdict: Verdict) -> dict:
    votes, missing = verdict.votes, verdict.missing
    if verdict.status in UNDECIDED and not missing:
        missing = (Missing("", verdict.status, verdict.reason),)
    if verdict.status == "ok" and not votes:
        votes = (Vote("", verdict.logit, verdict.logit),)
    return {**item, "votes": list(map(dataclasses.asdict, votes)), "missing": list(map(dataclasses.asdict, missing))}


def verdict_of(
    judgement: dict, weights: Mapping[str, float], *, combine: str, calibration: Calibration = UNCALIBRATED
) -> Verdict:
    """The verdict from the votes of a judgement. A principle that is not in `weights` has weight 1."""
    # Only what counts is read, because a report asks for the verdict without each principle, and with each one alone.
    found, gone = ([x for x in judgement[k] if weights.get(x["principle"], 1.0) > 0] for k in ("votes", "missing"))
    votes = [calibration.unbiased(Vote(**{**v, "keys": tuple(v["keys"])})) for v in found]
    missing = [Missing(**{**m, "keys": tuple(m["keys"])}) for m in gone]
    names = {x.principle for x in (*votes, *missing)}
    return decide(votes, missing, {name: weights.get(name, 1.0) for name in names}, combine=combine)


def votes_of(judgements: Iterable[dict], weights: Mapping[str, float]) -> list[Vote]:
    """The votes of all judgements that count under these weights."""
    return [vote for judgement in judgements for vote in verdict_of(judgement, weights, combine="logit").votes]


def derive(
    judgements: str | Path, *, output_dir: str | Path, weights: Mapping[str, float] | None = None,
    combine: str | None = None, calibration: Calibration | None = None, clamp: tuple[float, float] | None = None,
    tie_margin: float | None = None,
) -> Stage:  # fmt: skip
    """Labels from the judgements that `label` or `judge_pairs` left in a directory. The judge is not asked.

    weights: they replace those of the constitution, for the principles that they name. combine: "logit", "prob" or
    "sum" (protocol.decide). clamp: (low, high) bounds of P; (0, 1) is none. None takes the value with which the labels
    there were made: `label` uses the judge's own `combine`, and the paper's clamp (0.4, 0.6) for a judge that reasons
    step by step, whose P is near 0 or 1. A slope is valid for the weights and the `combine` under which it was fitted;
    trust.refitted fits one for others.

    Writes comparisons.jsonl (`rows`: {"prompt", "chosen", "rejected", "chosen_prob", ...} for RewardTrainer,
    chosen_prob >= 0.5), rejected.jsonl and run.json.
    """
    source, made_with = Path(judgements), settings_of(judgements)
    how = label_settings(made_with["judge"], made_with, combine, calibration, clamp, tie_margin)
    how["weights"] = other_weights(made_with, weights or {})
    records = read_judgements(source)
    if Path(output_dir).resolve() != source.resolve():
        make_directory(output_dir)
        claim(Path(output_dir) / "run.json", {"stage": "derive", "settings": made_with | how})
    elif made_with | how != made_with:
        raise ConfigError(
            f"derive: {output_dir} holds the labels that were made with these judgements: give another output_dir"
        )
    provenance = {k: made_with[k] for k in ("judge", "constitution_sha256")}
    return finish_stage(
        output_dir, [_labelled(record, how) for record in records],
        lambda record: [_comparison(record, how, provenance)], name="comparisons", used=("ok",),
        refused=("tie", *UNDECIDED),
    )  # fmt: skip


def settings_of(judgements: str | Path) -> dict:
    """The settings of the judgements in a directory, and of the labels if there are any."""
    source = Path(judgements)
    if missing := [name for name in ("judgements.jsonl", "run.json") if not (source / name).is_file()]:
        raise ConfigError(f"{source} has no {missing[0]}; `label` writes it once all pairs are compared")
    return read_json(source / "run.json")["settings"]


def read_judgements(judgements: str | Path) -> list[dict]:
    """The records of a directory with judgements.jsonl. ConfigError if they were changed after they were written."""
    path, number = Path(judgements) / "judgements.jsonl", settings_of(judgements)["items"]
    again = "repeat the call that wrote it, which restores it from its ledger"
    records = as_records(read_dataset(path), str(path))
    if len(records) != number:
        raise ConfigError(f"{path} has {len(records)} records, and {number} were written; {again}")
    for i, record in enumerate(records):
        try:
            verdict_of(record, {}, combine="logit")
            itemgetter("id", "prompt", "a", "b")(record)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: record {i} is not a judgement ({error!r}); {again}") from None
    return records


def other_weights(made_with: Mapping, weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of the judgements, updated with `weights`."""
    if unknown := set(weights) - set(made_with["weights"]):
        raise ConfigError(f"derive: no votes under {sorted(unknown)}; there are {', '.join(made_with['weights'])}")
    return made_with["weights"] | {name: weight_field(w, f"derive: {name!r}:") for name, w in weights.items()}


def label_settings(
    judge: Mapping, before: Mapping, combine: str | None = None, calibration: Calibration | None = None,
    clamp: Sequence[float] | None = None, tie_margin: float | None = None,
) -> dict:  # fmt: skip
    """The settings from which labels are derived, checked before the judge is asked. JSON-ready, for run.json.

    None takes the value of `before`, the settings of earlier labels, or the judge's default if there is none.
    """
    usual = {
        "combine": judge.get("combine", "logit"), "calibration": dataclasses.asdict(UNCALIBRATED),
        "clamp": COT_CLAMP if judge.get("cot_tokens") else None, "tie_margin": 0.01,
    }  # fmt: skip
    given = {
        "combine": combine, "calibration": calibration and dataclasses.asdict(calibration), "clamp": clamp,
        "tie_margin": tie_margin,
    }  # fmt: skip
    how = {name: before.get(name, usual[name]) if value is None else value for name, value in given.items()}
    if how["combine"] not in COMBINE:
        raise ConfigError(f"label: combine = {how['combine']!r}, needs one of {', '.join(COMBINE)}")
    if not 0 <= how["tie_margin"] < 0.5:
        raise ConfigError(f"label: tie_margin = {how['tie_margin']} is a distance from 0.5 and must lie in [0, 0.5)")
    if how["clamp"] is not None:
        how["clamp"] = list(how["clamp"])
        if not (
            len(how["clamp"]) == 2 and all(isinstance(p, (int, float)) for p in how["clamp"])
            and 0.5 < how["clamp"][1] <= 1 and abs(sum(how["clamp"]) - 1) < 1e-9
        ):  # fmt: skip
            raise ConfigError(
                f"label: clamp = {how['clamp']} must be (1 - p, p) with 0.5 < p <= 1: which reply is called a is chance"
            )
    return how


def _labelled(record: dict, how: dict) -> dict:
    calibration = Calibration(**how["calibration"])
    raw = verdict_of(record, how["weights"], combine=how["combine"])
    verdict = verdict_of(record, how["weights"], combine=how["combine"], calibration=calibration)
    logit = calibration.slope * verdict.logit
    prob = sigmoid(abs(logit))  # of the preferred reply, so that swapping the two replies changes no bit of it
    status, reason = verdict.status, verdict.reason
    if status == "ok" and (logit == 0 or prob - 0.5 < how["tie_margin"]):
        status, reason = "tie", f"P(better) = {prob:.4f}"
        if not calibration.slope:
            reason += ": the slope of the calibration is 0, because the judge was not better than chance"
    final = min(prob, how["clamp"][1]) if how["clamp"] else prob
    side = -1 if verdict.logit < 0 else 1  # removing the bias may have turned the verdict
    evidence = {"p_raw": sigmoid(side * raw.logit), "p_calibrated": prob, "p": final}
    return {**record, "status": status, "reason": reason, "logit": logit, "order_gap": raw.order_gap, **evidence}


def _comparison(record: dict, how: dict, provenance: dict) -> dict:
    chosen, rejected = ("a", "b") if record["logit"] > 0 else ("b", "a")
    evidence = {name: record[name] for name in ("p_raw", "p_calibrated", "logit", "order_gap", "votes")}
    return {
        "prompt": record["prompt"],
        "chosen": [{"role": "assistant", "content": record[chosen]}],
        "rejected": [{"role": "assistant", "content": record[rejected]}],
        "chosen_prob": record["p"],
        "cai": {
            "pair_id": record["id"], "a": "chosen" if chosen == "a" else "rejected", "clamp": how["clamp"],
            "status": record["status"], **evidence, **provenance,
        },
    }  # fmt: skip

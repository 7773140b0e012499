"""Constitutional AI (Bai et al. 2022, arXiv 2212.08073): a constitution replaces the human labels.

    phase 1   x -> y_0;  for each principle with c_i(x, y) = 0: critique, revise, check again   `revise`
              the best of y_0, y_1, ... is a demonstration                                      -> SFT
    phase 2   x -> (a, b);  a judge compares them under the constitution: P(a better)           `sample_pairs`, `label`
              (x, y_w, y_l, P(y_w better))                                                      -> RM -> PPO

Phase 1 has two schedules. "check-all" is `revise`. "paper" is `revise_sampled`, the paper's algorithm: principles drawn
at random, no checks, all revisions kept. Both flag replies (judges/hygiene.py), and use none with a flag in `drop`.
Each function reads rows, writes one directory and returns a `Stage`; it may be killed and called again
(judges/stages.py). Only `mix_comparisons`, which joins the comparisons of judges and people, writes nothing.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

from ..data.files import as_rows
from ..disk import write_json
from ..errors import ConfigError
from ..judges.calibration import UNCALIBRATED, Calibration
from ..judges.constitution import Constitution, Principle
from ..judges.generator import Cut, Generate, TextGenerator, Writer
from ..judges.hygiene import FLAGS, flags_of, hygiene
from ..judges.labels import derive, judge_pairs, label_settings
from ..judges.ledger import Ledger
from ..judges.protocol import Check, Judge, Messages, Reply
from ..judges.stages import Stage, finish_stage, read_items, run_stage, seed_for
from .configs import DROP

__all__ = [
    "SCHEDULES", "Generate", "Stage", "TextGenerator", "derive", "label", "mix_comparisons", "revise", "revise_sampled",
    "sample_pairs",
]  # fmt: skip


# --- phase 1 ---


def check_drop(drop: Sequence[str]) -> None:
    """ConfigError unless drop is a list of flags that replies can have."""
    if isinstance(drop, str) or any(name not in FLAGS for name in drop):
        raise ConfigError(f"drop = {drop!r} must be a list of flags: {', '.join(FLAGS)}")


@dataclass
class _Draft:
    """One prompt in phase 1."""

    id: str
    prompt: Messages
    kind: str  # "red-team", "benign" or any other kind in the rows
    replies: list[str]  # y_0, y_1, ... as far as they were written
    checks: list[list[Check]] = field(default_factory=list)  # of each reply, under all principles
    steps: list[dict] = field(default_factory=list)  # step i made reply i + 1
    flags: list[list[str]] = field(default_factory=list)  # of each reply
    tried: set[tuple[str, str]] = field(default_factory=set)  # (reply, principle) of every revision so far
    current: int = 0  # the reply that the next revision starts from


def revise(
    prompts: Iterable, generate: Generate, constitution: Constitution, judge: Judge, *, output_dir: str | Path,
    max_steps: int | None = None, drop: Sequence[str] = DROP, batch_size: int = 32, seed: int = 0,
) -> Stage:  # fmt: skip
    """Phase 1: answers each prompt, then checks, critiques and revises until no principle is violated.

    Each step takes the first violated principle (hard ones first) that was not yet tried on this reply. It critiques
    the reply under this principle, if that has a critique text, revises the reply, and checks the revision against all
    principles. The next step starts from the revision unless it is worse. A draft stops when nothing is left to try, or
    after max_steps revisions (None: the number of principles with a check and a revision). The best of all replies,
    including the original, is selected: the fewest hard principles violated, then the smallest weighted violation
    sum_i weight_i (1 - c_i), then the smallest edit.

    prompts: rows {"prompt": str | messages}, optionally "id" and "kind" (such as "red-team" or "benign"; hygiene.json
    counts refusals for each kind). Writes revisions.jsonl (everything), sft.jsonl (`rows`: {"prompt", "completion"} for
    SFTTrainer), rejected.jsonl and hygiene.json.

    Statuses of records that are used: "clean", the original violates nothing; "revised", a revision was selected;
    "unchanged", violations remain and no revision was better. Statuses of rejected records: "hard_violation", the best
    reply violates a hard principle; "flagged", every reply has a flag in `drop`; "failed", a reply was not written or
    the check of the first reply had no answer (hygiene.json does not count these).
    """
    principles = [p for p in constitution.principles if p.check]
    repairable = sorted(principles_to_revise("check-all", constitution), key=lambda p: not p.hard)
    max_steps = len(repairable) if max_steps is None else max_steps
    if max_steps < 1:
        raise ConfigError(f"revise: max_steps = {max_steps} must be 1 or more")
    check_drop(drop)
    items = items_with_kind(prompts)
    with Ledger(output_dir) as ledger:
        writer = Writer(generate, constitution, ledger, seed)

        def work(batch: list[dict]) -> list[dict]:
            drafts = _first_replies(batch, writer)
            _check_last(_alive(drafts, writer), judge, ledger, principles)
            for _ in range(max_steps):
                todo = [(draft, p) for draft in _alive(drafts, writer) if (p := _next_violation(draft, repairable))]
                revised = _revise_current(todo, writer)
                _check_last([draft for draft, _ in revised], judge, ledger, principles)
                for draft, principle in revised:
                    _accept_unless_worse(draft, principle, principles, drop)
            return [_revision_record(draft, writer.failures.get(draft.id), principles, drop) for draft in drafts]

        settings = {"seed": seed, "max_steps": max_steps, "drop": list(drop), "judge": judge.describe()}
        settings |= writer.settings
        records = run_stage(ledger, "revisions", items, work, settings=settings, batch_size=batch_size)
    return _finish_revisions(output_dir, records)


def revise_sampled(
    prompts: Iterable, generate: Generate, constitution: Constitution, *, output_dir: str | Path, steps: int = 4,
    drop: Sequence[str] = DROP, batch_size: int = 32, seed: int = 0,
) -> Stage:  # fmt: skip
    """Phase 1 of the paper: for each prompt `steps` principles are drawn with replacement, and each revises the
    previous reply, without checks. All revisions are demonstrations, except those with a flag in `drop`. The files are
    those of `revise`; statuses are "revised", "flagged" (all revisions are) and "failed".
    """
    usable = principles_to_revise("paper", constitution)
    if steps < 1:
        raise ConfigError(f"revise_sampled: steps = {steps} must be 1 or more")
    check_drop(drop)
    items = items_with_kind(prompts)
    with Ledger(output_dir) as ledger:
        writer = Writer(generate, constitution, ledger, seed)

        def work(batch: list[dict]) -> list[dict]:
            drafts = _first_replies(batch, writer)
            for draft in _alive(drafts, writer):
                _flag_last(draft, usable)
            for step in range(steps):
                todo = [
                    (draft, random.Random(seed_for(seed, draft.id, "draw", step)).choice(usable))
                    for draft in _alive(drafts, writer)
                ]
                for draft, _ in _revise_current(todo, writer):
                    _flag_last(draft, usable)
                    draft.current = len(draft.replies) - 1
            return [_sampled_record(draft, writer.failures.get(draft.id), drop) for draft in drafts]

        settings = {"seed": seed, "steps": steps, "drop": list(drop), **writer.settings}
        records = run_stage(ledger, "revisions", items, work, settings=settings, batch_size=batch_size)
    return _finish_revisions(output_dir, records)


SCHEDULES = {"check-all": revise, "paper": revise_sampled}


def principles_to_revise(schedule: str, constitution: Constitution) -> list[Principle]:
    """The principles under which a schedule revises. ConfigError if there are none."""
    found = [p for p in constitution.principles if p.revise and (p.check or schedule == "paper")]
    if not found:
        raise ConfigError(
            f"revise_sampled: constitution {constitution.name!r} has no principle with 'revise': add one"
            if schedule == "paper"
            else f"revise: constitution {constitution.name!r} has no principle with both 'check' and 'revise'; "
            "revise_sampled needs no checks (schedule: paper)"
        )
    return found


def items_with_kind(prompts: Iterable) -> list[dict]:
    """read_items, with the "kind" of each row; "unspecified" if the row has none, or an empty table cell."""
    rows = as_rows(prompts, "prompts")
    kinds = [row.get("kind") if isinstance(row, dict) else None for row in rows]
    for i, kind in enumerate(kinds):
        if isinstance(kind, (list, dict)):
            raise ConfigError(f"row {i}: kind = {kind!r} must be a text, such as 'red-team' or 'benign'")
    kinds = ["unspecified" if kind is None else kind for kind in kinds]
    return [{**item, "kind": kind} for item, kind in zip(read_items(rows), kinds, strict=True)]


def _finish_revisions(output_dir: str | Path, records: list[dict]) -> Stage:
    stage = finish_stage(
        output_dir, records, lambda record: [_demonstration(record, i) for i in record["used"]], name="sft",
        used=("clean", "revised", "unchanged"), refused=("hard_violation", "flagged", "failed"),
    )  # fmt: skip
    write_json(Path(output_dir) / "hygiene.json", hygiene(records), indent=1)
    return stage


def _first_replies(batch: Sequence[dict], writer: Writer) -> list[_Draft]:
    drafts = []
    for item, reply in zip(batch, writer.answer(batch, "reply"), strict=True):
        written = [] if item["id"] in writer.failures else [reply]
        drafts.append(_Draft(item["id"], item["prompt"], item["kind"], written))
    return drafts


def _alive(drafts: Sequence[_Draft], writer: Writer) -> list[_Draft]:
    """The drafts that have not failed. A failed draft is not continued, checked or used."""
    return [draft for draft in drafts if draft.id not in writer.failures]


def _revise_current(todo: Sequence[tuple[_Draft, Principle]], writer: Writer) -> list[tuple[_Draft, Principle]]:
    """Adds to each draft one revision of its current reply under the principle -> the pairs whose revision was
    written."""
    tasks = [(d.id, len(d.steps), d.prompt, d.replies[d.current], principle) for d, principle in todo]
    done = []
    for (draft, principle), (critique, revision) in zip(todo, writer.revise(tasks), strict=True):
        if draft.id not in writer.failures:
            draft.steps.append({"principle": principle.id, "of": draft.current, "critique": critique})
            draft.replies.append(revision)
            done.append((draft, principle))
    return done


def _check_last(drafts: Sequence[_Draft], judge: Judge, ledger: Ledger, principles: Sequence[Principle]) -> None:
    answers = judge.check([Reply(d.prompt, d.replies[-1], principles) for d in drafts], ledger)
    for draft, checks in zip(drafts, answers, strict=True):
        draft.checks.append(checks)
        _flag_last(draft, principles)


def _flag_last(draft: _Draft, principles: Sequence[Principle]) -> None:
    """Flags the newest reply. It is damaged if it violates a principle that the reply it revises kept."""
    reply, of, requests, damaged = draft.replies[-1], None, (), False
    if draft.steps:
        step = draft.steps[-1]
        principle = next(p for p in principles if p.id == step["principle"])
        of, requests = draft.replies[step["of"]], (principle.critique, principle.revise)
        if draft.checks:
            kept = {c.principle for c in draft.checks[step["of"]] if c.satisfied}
            damaged = any(c.principle in kept and c.satisfied is False for c in draft.checks[-1])
    draft.flags.append(
        flags_of(reply, draft.prompt, of=of, requests=requests, truncated=isinstance(reply, Cut), damaged=damaged)
    )


def _failure(checks: Sequence[Check]) -> str:
    """Why a check of a reply had no answer; "" if all had one. A reply with a failed check is never used."""
    return next((c.reason for c in checks if c.status not in ("ok", "not_applicable")), "")


def _next_violation(draft: _Draft, repairable: Sequence[Principle]) -> Principle | None:
    reply, checks = draft.replies[draft.current], draft.checks[draft.current]
    violated = set() if _failure(checks) else {c.principle for c in checks if c.satisfied is False}
    return next((p for p in repairable if p.id in violated and (reply, p.id) not in draft.tried), None)


def _violation(checks: Sequence[Check], principles: Sequence[Principle]) -> tuple[int, float]:
    """(number of violated hard principles, weighted violation); smaller is better. A principle that does not apply
    counts as kept."""
    hard = sum(p.hard and c.satisfied is False for p, c in zip(principles, checks, strict=True))
    soft = sum(p.weight * (1 - c.score) for p, c in zip(principles, checks, strict=True) if c.score is not None)
    return hard, round(soft, 9)  # so that the order of summation does not matter


def _accept_unless_worse(draft: _Draft, principle: Principle, principles: Sequence[Principle], drop) -> None:
    before, after = draft.checks[draft.current], draft.checks[-1]
    draft.tried.add((draft.replies[draft.current], principle.id))
    usable = not _failure(after) and not set(draft.flags[-1]) & set(drop)
    accepted = usable and _violation(after, principles) <= _violation(before, principles)
    draft.steps[-1]["accepted"] = accepted
    if accepted:
        draft.current = len(draft.replies) - 1


def _select(draft: _Draft, principles: Sequence[Principle], drop: Sequence[str]) -> int | None:
    """Index of the best reply; None if all have a flag in drop or a failed check. Among several that violate the least,
    it is the one most similar to the original."""
    usable = [i for i, c in enumerate(draft.checks) if not _failure(c) and not set(draft.flags[i]) & set(drop)]
    if not usable:
        return None
    violations = {i: _violation(draft.checks[i], principles) for i in usable}
    least = min(violations.values())
    best = [i for i, v in violations.items() if v == least]
    if len(best) == 1 or best[0] == 0:  # comparing takes a second for replies of 4,000 characters
        return best[0]
    return max(best, key=lambda i: SequenceMatcher(None, draft.replies[0], draft.replies[i], autojunk=False).ratio())


def _record(draft: _Draft, **more) -> dict:
    return {
        "id": draft.id, "status": "failed", "prompt": draft.prompt, "kind": draft.kind, "replies": draft.replies,
        "steps": draft.steps, "flags": draft.flags, "used": [], **more,
    }  # fmt: skip


def _dropped(flags: Sequence[Sequence[str]], drop: Sequence[str]) -> str:
    return ", ".join(name for name in drop if any(name in found for found in flags))


def _sampled_record(draft: _Draft, failure: str | None, drop: Sequence[str]) -> dict:
    if failure:
        return _record(draft, reason=failure)
    used = [i for i, flags in enumerate(draft.flags) if i and not set(flags) & set(drop)]
    if not used:
        return _record(draft, status="flagged", reason=f"every revision has a flag: {_dropped(draft.flags[1:], drop)}")
    return _record(draft, status="revised", used=used)


def _revision_record(draft: _Draft, failure: str | None, principles: Sequence[Principle], drop: Sequence[str]) -> dict:
    record = _record(draft, checks=[{c.principle: c.score for c in reply} for reply in draft.checks])
    if reason := failure or _failure(draft.checks[0]):
        return {**record, "reason": reason}
    selected = _select(draft, principles, drop)
    if selected is None:
        return {**record, "status": "flagged", "reason": f"every reply has a flag: {_dropped(draft.flags, drop)}"}
    violated = [c.principle for c in draft.checks[selected] if c.satisfied is False]
    record |= {"selected": selected, "violated": violated}
    if hard := [p.id for p in principles if p.hard and p.id in violated]:
        return {**record, "status": "hard_violation", "reason": f"violates {', '.join(hard)}"}
    status = "revised" if selected else ("unchanged" if violated else "clean")
    return {**record, "status": status, "used": [selected]}


def _demonstration(record: dict, reply: int) -> dict:
    completion = [{"role": "assistant", "content": record["replies"][reply]}]
    return {"prompt": record["prompt"], "completion": completion, "id": record["id"], "step": reply}


# --- phase 2 ---


def sample_pairs(
    prompts: Iterable, generate: Generate, constitution: Constitution, *, output_dir: str | Path, batch_size: int = 32,
    seed: int = 0,
) -> Stage:  # fmt: skip
    """Phase 2, first half: two answers to each prompt.

    Writes pairs.jsonl (`rows`: {"id", "prompt", "a", "b"}, for `label`), and rejected.jsonl with the prompts that lack
    an answer.
    """
    items = read_items(prompts)
    with Ledger(output_dir) as ledger:
        writer = Writer(generate, constitution, ledger, seed)

        def work(batch: list[dict]) -> list[dict]:
            a, b = writer.answer(batch, "a"), writer.answer(batch, "b")
            return [
                writer.or_failed({**i, "status": "ok", "a": a, "b": b}) for i, a, b in zip(batch, a, b, strict=True)
            ]

        settings = {"seed": seed, **writer.settings}
        records = run_stage(ledger, "pairs", items, work, settings=settings, batch_size=batch_size)
    return finish_stage(output_dir, records, lambda record: [record], name="pairs", used=("ok",), refused=("failed",))


def label(
    pairs: Iterable[dict], constitution: Constitution, judge: Judge, *, output_dir: str | Path,
    principles_per_pair: int | None = None, combine: str | None = None, calibration: Calibration = UNCALIBRATED,
    clamp: tuple[float, float] | None = None, tie_margin: float = 0.01, batch_size: int = 32, seed: int = 0,
    retry: Iterable[str] = ("failed",),
) -> Stage:  # fmt: skip
    """Phase 2, second half: the judge compares each pair; its probability becomes a soft label.

    pairs: rows {"prompt": str | messages, "a": str, "b": str}, optionally "id". principles_per_pair: how many
    principles to draw for a pair, all with equal probability whatever their weights (the paper draws 1); None takes
    all. clamp: see `derive`; None is (0.4, 0.6) for a judge that reasons step by step. |P(a better) - 0.5| < tie_margin
    is a tie. retry: outcomes of earlier runs in the same directory that are asked for again.

    Writes judgements.jsonl (every vote on every pair), and the files that judges/labels.py derives from it:
    comparisons.jsonl (`rows`), and rejected.jsonl with the ties and the pairs that the judge could not decide. `derive`
    makes both again under other weights, `combine`, `calibration`, `clamp` or `tie_margin`, without asking the judge.
    """
    how = label_settings(judge.describe(), {}, combine, calibration, clamp, tie_margin)
    judge_pairs(
        pairs, constitution, judge, output_dir=output_dir, principles_per_pair=principles_per_pair,
        batch_size=batch_size, seed=seed, settings=how, retry=retry,
    )  # fmt: skip
    return derive(output_dir, output_dir=output_dir)


def mix_comparisons(
    sources: Mapping[str, Iterable[dict]], weights: Mapping[str, float] | None = None, *, seed: int = 0
) -> list[dict]:
    """Comparisons from several sources as one dataset for RewardTrainer, in an order drawn from the seed.

    sources: {name: rows {"prompt", "chosen", "rejected", ...}}, such as {"ai": label(...).rows, "human": pairs}. Each
    row gets its `source`, by which RewardTrainer splits its accuracy and margin. Its `weight` is multiplied by the
    weight of the source (1 if it is not in `weights`). The paper's preference model is trained on such a mix of 182,831
    harmlessness labels by a model and 135,296 helpfulness comparisons by people, each of weight 1.

    Compare the margins of the two sources before you trust the mix: the optimal margin under a soft label is finite
    (its log-odds), under a hard label it is not.
    """
    sources, weights = {name: as_rows(rows, name) for name, rows in sources.items()}, weights or {}
    if empty := [name for name, rows in sources.items() if not rows]:
        raise ConfigError(f"mix_comparisons: source {empty[0]!r} has no rows")
    if unknown := set(weights) - set(sources):
        raise ConfigError(f"mix_comparisons: weights name {sorted(unknown)}; the sources are {', '.join(sources)}")
    if wrong := {name: w for name, w in weights.items() if not isinstance(w, (int, float)) or not w >= 0}:
        raise ConfigError(f"mix_comparisons: weights must be 0 or more, got {wrong}")
    mixed = [
        {
            **row,
            "source": name,
            "weight": (1.0 if row.get("weight") is None else row["weight"]) * weights.get(name, 1.0),
        }
        for name, rows in sources.items()
        for row in rows
    ]
    random.Random(seed).shuffle(mixed)
    return mixed

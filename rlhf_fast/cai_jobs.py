"""The commands `rlhf-fast cai WORD`. cai_keys.py has their keys, and lists what each reads and writes."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

from .cai_checks import Run, check_phase_1, check_schedule, prepare
from .cai_keys import AuditJob, DeriveJob, JudgeJob, LabelJob, PairsJob, ReviseJob, TrainJob, WriterJob
from .commands import checked_options
from .data.chat import check_tokenizer
from .data.files import read_dataset
from .data.sources import read_rows
from .disk import read_json
from .errors import ConfigError
from .generation import generate_text
from .jobs import run_trainer
from .judges import (
    Constitution,
    HTTPGenerator,
    HTTPJudge,
    LocalJudge,
    Reply,
    RuleJudge,
    Server,
    audit,
    report_on,
)
from .judges.calibration import UNCALIBRATED
from .judges.labels import label_settings, other_weights, settings_of
from .judges.ledger import Ledger
from .judges.protocol import UNDECIDED
from .judges.released import read_released_comparisons
from .judges.stages import read_items
from .judges.trust import refitted, trusted
from .models import load_policy, load_reward_model, load_tokenizer
from .report import in_words, read_jsonl
from .terminal import visible
from .trainers.common import check_bf16
from .trainers.constitutional import (
    TextGenerator,
    check_drop,
    derive,
    label,
    mix_comparisons,
    revise,
    revise_sampled,
    sample_pairs,
)
from .trainers.pipeline import StageTable
from .trainers.ppo import PPOConfig, PPOTrainer
from .trainers.reward import RewardTrainer
from .trainers.run_dir import can_resume, changed_settings, has_ended
from .trainers.sft import SFTTrainer

SAMPLES = 8  # held-out prompts whose replies summary.json shows

# -- the judge and the writer ------------------------------------------------------------------------------------------


def _is_server(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def load_judge(who: JudgeJob, seed: int):
    """(constitution, judge)"""
    constitution = load_constitution(who.constitution, who.allow_code)
    if who.judge == "rules":
        return constitution, RuleJudge(**checked_options(RuleJudge, who.judge_options, "judge_options"))
    kind = HTTPJudge if _is_server(who.judge) else LocalJudge
    options = {"seed": seed, **checked_options(kind, who.judge_options, "judge_options")}
    if kind is HTTPJudge:
        server = _server(who.judge, who.judge_model, who.judge_server, "judge_")
        judge = HTTPJudge(server, constitution, **options)
        found = "; ".join(f"{mode}: {came_to}" for mode, came_to in judge.backend.found.items())
        print(visible(f"judge: {who.judge} is asked in mode {judge.backend.mode} ({found})"))
        return constitution, judge
    return constitution, LocalJudge(load_policy(who.judge), load_tokenizer(who.judge), constitution, **options)


def load_writer(writer: WriterJob):
    if _is_server(writer.model):
        server = _server(writer.model, writer.server_model, writer.server)
        if writer.bf16:
            warnings.warn(
                f"bf16 is for a local model; {writer.model} computes in what it was started with", stacklevel=2
            )
        return HTTPGenerator(server, writer.max_new_tokens, writer.temperature, writer.top_p)
    policy, tokenizer = load_policy(writer.model), load_tokenizer(writer.model)
    check_tokenizer(tokenizer, conversational=False)
    check_bf16(writer.bf16, policy.device)
    return TextGenerator(policy, tokenizer, writer.max_new_tokens, writer.temperature, writer.top_p, bf16=writer.bf16)


def _server(url: str, model: str | None, options: dict, prefix: str = "") -> Server:
    if not model:
        raise ConfigError(f"{prefix or 'server_'}model is missing: a server needs the name of its model")
    return Server(url, model, **checked_options(Server, options, f"{prefix}server"))


def load_constitution(files: str | list, allow_code: bool) -> Constitution:
    files = [files] if isinstance(files, str) else files
    if wrong := [file for file in files if not isinstance(file, str)]:
        raise ConfigError(f"constitution: {wrong[0]!r} is not the name of a file")
    return Constitution.load(*files, allow_code=allow_code)


# -- the parts ---------------------------------------------------------------------------------------------------------


def run_revise(who: JudgeJob, writer: WriterJob, job: ReviseJob) -> None:
    check_schedule(job.schedule)
    check_drop(job.drop)
    constitution, judge = load_judge(who, job.seed)
    check_phase_1(job.schedule, constitution, judge)
    options = {name: getattr(job, name) for name in ("output_dir", "batch_size", "seed", "drop")}
    stage = _revise(job.schedule, _prompts(job), load_writer(writer), constitution, judge, writer.max_new_tokens,
                    job.max_steps, **options)  # fmt: skip
    _check_any("revise", stage)


def _revise(schedule, prompts, generate, constitution, judge, max_new_tokens: int, max_steps: int | None, **options):
    """Phase 1 under either schedule, with a summary on the terminal."""
    if schedule == "check-all":
        stage = revise(prompts, generate, constitution, judge, max_steps=max_steps, **options)
    else:
        stage = revise_sampled(prompts, generate, constitution, steps=max_steps or 4, **options)
    _tell("revise", stage, "sft.jsonl")
    cut = sum(r["status"] == "flagged" and "truncated" in r["reason"] for r in stage.rejected)
    if cut:
        print(
            f"revise: all replies to {cut} of {stage.counts['inputs']} prompts were cut off at max_new_tokens = "
            f"{max_new_tokens} and dropped. To keep them, set a larger max_new_tokens, or another `drop`"
        )
    kinds = read_json(stage.output_dir / "hygiene.json")["kinds"]
    if set(kinds) - {"unspecified"}:
        shares = {kind: [f"{x['refusal']} of {x['replies']}" for x in (k["original"], k["used"])]
                  for kind, k in kinds.items()}  # fmt: skip
        told = "; ".join(f"{kind} {before} -> {after}" for kind, (before, after) in shares.items())
        print(visible(f"revise: replies that decline, originals -> demonstrations: {told}"))
    return stage


def run_pairs(writer: WriterJob, job: PairsJob) -> None:
    if not writer.temperature:
        raise ConfigError("pairs: temperature = 0 writes the same answer twice: set it above 0")
    constitution = load_constitution(job.constitution, job.allow_code)
    stage = sample_pairs(_prompts(job), load_writer(writer), constitution, output_dir=job.output_dir,
                         batch_size=job.batch_size, seed=job.seed)  # fmt: skip
    _tell("pairs", stage, "pairs.jsonl")
    _check_any("pairs", stage)


def run_audit(who: JudgeJob, job: AuditJob) -> None:
    constitution, judge = load_judge(who, job.seed)
    rows = _compared(job.data)[: job.num_pairs]
    card = audit(rows, constitution, judge, output_dir=job.output_dir, principles_per_pair=job.principles_per_pair,
                 probe_pairs=job.probe_pairs, batch_size=job.batch_size, seed=job.seed)  # fmt: skip
    shown = ", ".join(f"{name} {card[name]['mean']:.3f} ({card[name]['low']:.3f} to {card[name]['high']:.3f})"
                      for name in ("accuracy", "lead"))  # fmt: skip
    floor = "AT THE FLOOR: `label` refuses this judge" if card["at_floor"] else "above the floor"
    print(f"audit: {card['pairs']} pairs, {shown} over {card['best_floor']!r}: {floor}; {job.output_dir}/audit.html")
    if gone := ", ".join(f"{n} {status}" for status, n in card["statuses"].items() if status in UNDECIDED):
        print(f"audit: pairs without an answer count one half: {gone}; see {job.output_dir}/judgements.jsonl for why")
    if set(card["statuses"]) <= set(UNDECIDED):
        raise ConfigError("audit: the judge answered about no pair, so its card says nothing of its judgement")


def _compared(path: str) -> list[dict]:
    """Pairs that people compared, as rows {"prompt", "better", "worse"}, from a file in any of AuditJob's forms."""
    rows = read_rows(path)
    if rows and "text_correct" in rows[0]:  # there are no rows if every pair of hh-rlhf was left out
        return read_released_comparisons(path)
    for i, row in enumerate(rows):
        for name, column in (("better", "chosen"), ("worse", "rejected")):
            if column in row:
                row[name] = _only_text(row[column], f"{path}: row {i}: {column!r}")
    return [{k: row[k] for k in ("id", "prompt", "better", "worse") if k in row} for row in rows]


def _only_text(reply, where: str) -> str:
    text = reply
    if isinstance(reply, list) and len(reply) == 1 and isinstance(reply[0], dict):
        text = reply[0].get("content")
    if not isinstance(text, str):
        raise ConfigError(f"{where} must be text or a single message, with the rest in 'prompt'; got {reply!r}")
    return text


def run_label(who: JudgeJob, job: LabelJob) -> None:
    """rlhf-fast cai label: makes labels, if the judge's card allows it, and the report on the constitution."""
    constitution, judge = load_judge(who, job.seed)
    calibration = trusted(judge, constitution, job.card, principles_per_pair=job.principles_per_pair,
                          combine=job.combine, allow_weak_judge=job.allow_weak_judge)  # fmt: skip
    stage = label(
        read_dataset(job.data), constitution, judge, output_dir=job.output_dir, combine=job.combine,
        principles_per_pair=job.principles_per_pair, calibration=calibration, clamp=job.clamp,
        tie_margin=job.tie_margin, batch_size=job.batch_size, seed=job.seed, retry=job.retry.split(","),
    )  # fmt: skip
    report_on(job.output_dir, name=constitution.name)
    _tell("label", stage, "comparisons.jsonl", "constitution.html")
    _check_any("label", stage)


def run_derive(job: DeriveJob) -> None:
    """rlhf-fast cai derive: labels again from kept judgements, with other weights or thresholds; asks no model."""
    made_with = settings_of(job.judgements)
    before = label_settings(made_with["judge"], made_with)
    weights, combine = other_weights(made_with, job.weights), job.combine or before["combine"]
    calibration = refitted(job.card, made_with, weights, combine) if job.card else None
    stage = derive(
        job.judgements, output_dir=job.output_dir, weights=job.weights, combine=combine, calibration=calibration,
        clamp=job.clamp, tie_margin=job.tie_margin,
    )  # fmt: skip
    slope, same = before["calibration"]["slope"], (weights, combine) == (made_with["weights"], before["combine"])
    if not (job.card or same or slope == UNCALIBRATED.slope):
        print(
            f"derive: the slope {slope:.3g} was fitted under other weights or another combine; give the judge's card "
            "to fit it again under these"
        )
    _tell("derive", stage, "comparisons.jsonl")


def validate(files: list[str], allow_code: bool) -> str:
    """A description of the constitution in the files, with a line per principle. ConstitutionError if it is wrong."""
    constitution = Constitution.load(*files, allow_code=allow_code)
    lines = []
    for p in constitution.principles:
        has = [name for name in ("critique", "revise", "compare", "check") if getattr(p, name)]
        lines.append(f"  {p.id}: {', '.join(has)}; weight {p.weight:g}{', hard' if p.hard else ''}")
    shots = (
        f"{len(constitution.critique_few_shots)} for critiques, {len(constitution.compare_few_shots)} for comparisons, "
        f"{len(constitution.cot_few_shots)} with rationales"
    )
    return "\n".join([
        f"{constitution.name}: {len(constitution.principles)} principles; few-shots: {shots}", *lines,
        f"layouts: compare {constitution.compare_layout}, critique {constitution.critique_layout}; words around a "
        f"question: {constitution.language}",
        f"sha256 {constitution.sha256}",
    ])  # fmt: skip


def _prompts(job) -> list[dict]:
    return read_rows(job.train_data, "ppo")[: job.num_prompts]


def _tell(name: str, stage, *files: str) -> None:
    print(f"{name}: {in_words(stage.counts)}; {', '.join(f'{stage.output_dir}/{file}' for file in files)}")
    why = next((record["reason"] for record in stage.rejected if record.get("reason")), None)
    if why:
        shown = visible(why[:200])
        print(f"{name}: {stage.output_dir}/rejected.jsonl says why the others were left out; the first: {shown}")


def _check_any(name: str, stage) -> None:
    """ConfigError if a stage has nothing for the next one. Ties are no failure: the judge has compared."""
    if not stage.rows and not stage.counts.get("tie"):
        raise ConfigError(
            f"{name}: none of {stage.counts['inputs']} inputs came to anything; {stage.output_dir}/rejected.jsonl says "
            "why"
        )


# -- from end to end ---------------------------------------------------------------------------------------------------


def run_train(who: JudgeJob, job: TrainJob, resume: bool) -> None:
    """rlhf-fast cai train: revisions -> SFT -> comparisons -> reward model -> PPO; held-out answers in between."""
    root, run = Path(job.output_dir), prepare(job, lambda: load_judge(who, job.seed), resume)
    constitution, judge, prompts = run.constitution, run.judge, run.prompts
    options = {"seed": job.seed, "batch_size": 128}

    def generator(model: str) -> TextGenerator:
        return TextGenerator(load_policy(model), run.tokenizer, job.max_new_tokens, job.temperature, bf16=job.bf16)

    def part(name: str, make: Callable) -> dict:
        return _train_part(root / name, run.configs[name], make, resume)

    samples = [{"prompt": row["prompt"], "responses": []} for row in (run.held_out or [])[:SAMPLES]]
    stages = StageTable(root, {"seed": job.seed, "stages": [], "samples": samples})
    stages.add("start", **rate_held_out(stages, "start", job.model, job, run))

    # Phase 1, on the first half of the prompts.
    half = len(prompts) // 2
    revised = _revise(run.schedule, prompts[:half], generator(job.model), constitution, judge, job.max_new_tokens,
                      job.max_revisions, output_dir=root / "revise", drop=job.drop, **options)  # fmt: skip
    if not revised.rows:
        raise ConfigError(f"cai: no reply is left to learn from; {root}/revise/rejected.jsonl says why")
    part("sft", lambda config: SFTTrainer(config, job.model, train_dataset=revised.rows, tokenizer=run.tokenizer))
    sft = str(root / "sft")
    stages.add("sft", counts=revised.counts, **rate_held_out(stages, "sft", sft, job, run))

    # Phase 2, on the other half. PPO uses all prompts.
    writer = generator(sft)
    writer.model.config.name_or_path = "sft"  # in pairs/run.json: without output_dir, which may have been moved
    pairs = sample_pairs(prompts[half:], writer, constitution, output_dir=root / "pairs", **options)
    labelled = label(pairs.rows, constitution, judge, output_dir=root / "label", calibration=run.calibration,
                     principles_per_pair=job.principles_per_pair, **options)  # fmt: skip
    _tell("label", labelled, "comparisons.jsonl")
    if not labelled.rows:
        raise ConfigError(
            "cai: the judge preferred neither answer in any pair, so a reward model has nothing to learn; "
            f"{root}/label/rejected.jsonl says why"
        )
    compared = _mixed(job, {"ai": labelled.rows, **run.people})
    part("reward", lambda config: RewardTrainer(config, sft, **compared))
    judged = root / "reward" / "preferences.json"  # of the model that was kept; the log ends with the last step's
    accuracy = read_json(judged)["accuracy"] if judged.is_file() else None
    stages.add("reward", rm_accuracy=accuracy, counts=labelled.counts)
    reward = str(root / "reward")
    data = {"train_dataset": prompts, "eval_dataset": run.held_out, "eval_rewards": run.eval_rewards}

    def ppo(config: PPOConfig) -> PPOTrainer:
        own_critic = config.advantage_estimator == "gae" and not config.share_trunk
        critic = load_reward_model(reward) if own_critic else None
        return PPOTrainer(config, sft, reward=reward, value_model=critic, **data)

    metrics = part("ppo", ppo)
    rates = rate_held_out(stages, "ppo", str(root / "ppo"), job, run)
    stages.add("ppo", kl=metrics.get("objective/kl"), proxy_reward=metrics.get("objective/scores"), **rates)


def _train_part(directory: Path, config, make: Callable, resume: bool) -> dict:
    """Trains one part and returns its last metrics. On resume a part that has ended is left unchanged; the others
    continue from their checkpoint, or begin again if they have none."""
    if resume and has_ended(directory):
        if changed := changed_settings(directory, dataclasses.asdict(config)):
            warnings.warn(
                f"{directory} has ended and is left unchanged, although it was trained with other "
                f"{', '.join(changed)} than are given now. To train it with these, delete it and the parts after it, "
                "and resume",
                stacklevel=3,
            )
    else:
        run_trainer(make(config), can_resume(directory))
    log = read_jsonl(directory / "train_log.jsonl", missing_ok=True)
    return log[-1] if log else {}  # somebody may have emptied the log of a part that has ended


def _mixed(job: TrainJob, sources: dict[str, list[dict]]) -> dict:
    """The datasets for RewardTrainer: the comparisons of all sources, with the first eval_share of each held out."""
    cuts = {name: round(len(rows) * job.eval_share) for name, rows in sources.items()}
    train = {name: rows[cuts[name] :] for name, rows in sources.items()}
    held = [{**row, "source": name} for name, rows in sources.items() for row in rows[: cuts[name]]]
    mixed = mix_comparisons(train, job.source_weights, seed=job.seed)
    return {"train_dataset": mixed, "eval_dataset": held or None}


def rate_held_out(stages: StageTable, name: str, model: str, job: TrainJob, run: Run) -> dict:
    """A model's answers to the held-out prompts, checked by the judge -> the pass rates of the stage."""
    principles = [p for p in run.constitution.principles if p.check]
    if not (run.held_out and principles):
        return {}
    prompts = [row["prompt"] for row in run.held_out]
    replies = generate_text(
        load_policy(model), run.tokenizer, prompts, max_new_tokens=job.max_new_tokens, temperature=job.temperature,
        seed=job.seed, bf16=job.bf16,
    )  # fmt: skip
    asked = [Reply(i["prompt"], reply, principles) for i, reply in zip(read_items(prompts), replies, strict=True)]
    with Ledger(stages.root / "checks") as ledger:
        checks = run.judge.check(asked, ledger)
    undecided = [[check.reason for check in row if check.status in UNDECIDED] for row in checks]
    if reasons := [row[0] for row in undecided if row]:
        print(
            f"{name}: {len(reasons)} of {len(checks)} replies are in no pass rate, because a check had no answer "
            f"({visible(reasons[0])})"
        )
    kept = [{check.principle: check.satisfied for check in row} for row in checks]
    return stages.rate(name, replies, kept, [not row for row in undecided])

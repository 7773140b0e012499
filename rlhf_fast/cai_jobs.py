"""rlhf-fast cai WORD: Constitutional AI, one part at a time or from end to end.

  validate  constitution files      -> what is in them, or what is wrong, where
  revise    prompts                 -> revisions.jsonl, sft.jsonl (phase 1)
  pairs     prompts                 -> pairs.jsonl, rejected.jsonl (phase 2)
  audit     pairs people compared   -> audit.json, audit.html: the judge's card
  label     pairs, the judge's card -> judgements.jsonl, comparisons.jsonl,
                                       constitution.html
  derive    judgements              -> comparisons.jsonl under other weights,
                                       clamp, calibration; without the judge
  train     prompts                 -> all of it, with SFT, reward model, PPO

Each writes one directory and goes on there when it is called again; train does
so with --resume. `rlhf-fast cai WORD --help` has the keys of each.
"""

import dataclasses
import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .cai_checks import check_phase_1, known_schedule, prepare
from .commands import Checked, Command, known
from .data.chat import ConfigError
from .data.files import read_dataset
from .data.sources import read_rows
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
)  # fmt: skip
from .judges.calibration import UNCALIBRATED
from .judges.labels import label_settings, other_weights, settings_of
from .judges.ledger import Ledger
from .judges.released import read_released_comparisons
from .judges.stages import read_items
from .judges.trust import refitted, trusted
from .models import load_policy, load_reward_model, load_tokenizer
from .report import read_jsonl, write_quickstart_report
from .trainers.checkpoints import latest_checkpoint
from .trainers.common import check_config
from .trainers.constitutional import (
    DROP,
    TextGenerator,
    check_drop,
    derive,
    label,
    mix_comparisons,
    revise,
    revise_sampled,
    sample_pairs,
)
from .trainers.ppo import PPOConfig, PPOTrainer
from .trainers.reward import RewardTrainer
from .trainers.run_dir import changed_settings, has_ended
from .trainers.sft import SFTTrainer

# -- who judges, who writes --------------------------------------------------------------------------------------------


def _is_server(name: str) -> bool:
    return name.startswith(("http://", "https://"))


@dataclass
class JudgeJob(Checked):
    constitution: str | list  # file of principles, or several that make one
    judge: str = "rules"  # or a model's directory or name, or the URL of an OpenAI-compatible server (http://.../v1)
    judge_model: str | None = None  # the model's name there, where judge is a URL
    judge_options: dict = field(default_factory=dict)  # of LocalJudge or HTTPJudge: cot_tokens, mode, votes, ...
    judge_server: dict = field(default_factory=dict)  # of Server: concurrency, max_requests, max_cost, ...
    allow_code: bool = False  # the constitution may name rules by import path, which runs code

    def load(self, seed: int):
        """(constitution, judge)"""
        constitution = load_constitution(self.constitution, self.allow_code)
        if self.judge == "rules":
            return constitution, RuleJudge(**known(RuleJudge, self.judge_options, "judge_options"))
        kind = HTTPJudge if _is_server(self.judge) else LocalJudge
        options = {"seed": seed, **known(kind, self.judge_options, "judge_options")}
        if kind is HTTPJudge:
            server = _server(self.judge, self.judge_model, self.judge_server, "judge_")
            judge = HTTPJudge(server, constitution, **options)
            found = "; ".join(f"{mode}: {came_to}" for mode, came_to in judge.backend.found.items())
            print(f"judge: {self.judge} is asked in mode {judge.backend.mode} ({found})")
            return constitution, judge
        return constitution, LocalJudge(load_policy(self.judge), load_tokenizer(self.judge), constitution, **options)


@dataclass
class WriterJob:
    model: str  # directory or name of the model that writes, or the URL of an OpenAI-compatible server
    server_model: str | None = None  # the model's name there, where model is a URL
    server: dict = field(default_factory=dict)  # of Server: concurrency, max_requests, max_cost, ...
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        check_config(self, positive=("max_new_tokens", "top_p"), non_negative=("temperature",), unit=("top_p",))

    def load(self):
        if _is_server(self.model):
            server = _server(self.model, self.server_model, self.server)
            return HTTPGenerator(server, self.max_new_tokens, self.temperature, self.top_p)
        policy, tokenizer = load_policy(self.model), load_tokenizer(self.model)
        return TextGenerator(policy, tokenizer, self.max_new_tokens, self.temperature, self.top_p)


def _server(url: str, model: str | None, options: dict, prefix: str = "") -> Server:
    if not model:
        raise ConfigError(f"{url} is a server: give the model's name there as {prefix or 'server_'}model")
    return Server(url, model, **known(Server, options, f"{prefix}server"))


def load_constitution(files: str | list, allow_code: bool) -> Constitution:
    files = [files] if isinstance(files, str) else files
    if wrong := [file for file in files if not isinstance(file, str)]:
        raise ConfigError(f"constitution: {wrong[0]!r} is not the name of a file")
    return Constitution.load(*files, allow_code=allow_code)


# -- the parts ---------------------------------------------------------------------------------------------------------


@dataclass
class ReviseJob:
    train_data: str  # rows with a prompt
    schedule: str = "check-all"  # check-all: revise what is violated, keep the best; paper: four revisions at random
    max_steps: int | None = None  # revisions of a prompt; null is the schedule's own number
    drop: list = field(default_factory=lambda: list(DROP))  # flags of replies that no model should learn from
    num_prompts: int | None = None  # the first so many; null takes all
    output_dir: str = "runs/cai/revise"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        check_config(self, positive=("max_steps", "num_prompts", "batch_size"))


def run_revise(who: JudgeJob, writer: WriterJob, job: ReviseJob, resume: bool) -> None:
    known_schedule(job.schedule)
    check_drop(job.drop)
    constitution, judge = who.load(job.seed)
    check_phase_1(job.schedule, constitution, judge)
    _revise(job.schedule, _prompts(job), writer.load(), constitution, judge, writer.max_new_tokens, job.max_steps,
            output_dir=job.output_dir, batch_size=job.batch_size, seed=job.seed, drop=job.drop)  # fmt: skip


def _revise(schedule, prompts, generate, constitution, judge, max_new_tokens: int, max_steps: int | None, **options):
    """Phase 1 under either schedule, and what it came to on the terminal."""
    if schedule == "check-all":
        stage = revise(prompts, generate, constitution, judge, max_steps=max_steps, **options)
    else:
        stage = revise_sampled(prompts, generate, constitution, steps=max_steps or 4, **options)
    _tell("revise", stage, "sft.jsonl")
    cut = sum(r["status"] == "flagged" and "truncated" in r["reason"] for r in stage.rejected)
    if cut:
        print(
            f"revise: {cut} of {stage.counts['inputs']} prompts have no reply that was not cut off at max_new_tokens = "
            f"{max_new_tokens}. Such replies are dropped; a larger max_new_tokens keeps them, or another `drop`"
        )
    kinds = json.loads((stage.output_dir / "hygiene.json").read_text(encoding="utf-8"))["kinds"]
    if set(kinds) - {"unspecified"}:
        shares = {kind: [f"{x['refusal']} of {x['replies']}" for x in (k["original"], k["used"])]
                  for kind, k in kinds.items()}  # fmt: skip
        told = "; ".join(f"{kind} {before} -> {after}" for kind, (before, after) in shares.items())
        print(f"revise: replies that decline, originals -> demonstrations: {told}")
    return stage


@dataclass
class PairsJob:
    train_data: str  # rows with a prompt
    constitution: str | list  # its layout says how prompts are put
    num_prompts: int | None = None  # the first so many; null takes all
    output_dir: str = "runs/cai/pairs"
    batch_size: int = 32
    seed: int = 0
    allow_code: bool = False  # the constitution may name rules by import path, which runs code

    def __post_init__(self):
        check_config(self, positive=("num_prompts", "batch_size"))


def run_pairs(writer: WriterJob, job: PairsJob, resume: bool) -> None:
    constitution = load_constitution(job.constitution, job.allow_code)
    stage = sample_pairs(_prompts(job), writer.load(), constitution, output_dir=job.output_dir,
                         batch_size=job.batch_size, seed=job.seed)  # fmt: skip
    _tell("pairs", stage, "pairs.jsonl")


@dataclass
class AuditJob:
    data: str  # rows {prompt, better, worse} or {prompt, chosen, rejected}, or Anthropic's evaluation file
    num_pairs: int | None = None  # the first so many; null takes all
    principles_per_pair: int | None = None  # as for the labels to come: `label` refuses a card with another number
    probe_pairs: int = 24  # pairs that are asked again with an injection in the worse reply
    output_dir: str = "runs/cai/audit"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        check_config(self, positive=("num_pairs", "principles_per_pair", "batch_size"), non_negative=("probe_pairs",))


def run_audit(who: JudgeJob, job: AuditJob, resume: bool) -> None:
    constitution, judge = who.load(job.seed)
    rows = _compared(job.data)[: job.num_pairs]
    card = audit(rows, constitution, judge, output_dir=job.output_dir, principles_per_pair=job.principles_per_pair,
                 probe_pairs=job.probe_pairs, batch_size=job.batch_size, seed=job.seed)  # fmt: skip
    shown = ", ".join(f"{name} {card[name]['mean']:.3f} ({card[name]['low']:.3f} to {card[name]['high']:.3f})"
                      for name in ("accuracy", "lead"))  # fmt: skip
    floor = "AT THE FLOOR: `label` refuses this judge" if card["at_floor"] else "above the floor"
    print(f"audit: {card['pairs']} pairs, {shown} over {card['best_floor']!r}: {floor}; {job.output_dir}/audit.html")


def _compared(path: str) -> list[dict]:
    """Pairs that people compared, as rows {"prompt", "better", "worse"}, from a file of any of AuditJob's forms."""
    if path.endswith(".jsonl") and Path(path).is_file():
        with open(path, encoding="utf-8") as file:
            if "text_correct" in file.readline():
                return read_released_comparisons(path)
    rows = read_rows(path)
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
        raise ConfigError(f"{where} must be text or one message, and what comes before it the prompt; got {reply!r}")
    return text


@dataclass
class LabelJob:
    data: str  # pairs.jsonl of `cai pairs`, or rows {prompt, a, b}
    card: str | None = None  # directory of `cai audit` of this judge: its floor, and the calibration of the labels
    allow_weak_judge: bool = False  # label without a card, or at the floor
    principles_per_pair: int | None = None  # the paper draws 1; null takes all
    combine: str | None = None  # logit or prob, of both orders and all principles; null is the judge's own
    clamp: list | None = None  # [low, high] of P; null is [0.4, 0.6] for a judge with cot_tokens, and none otherwise
    tie_margin: float = 0.01  # |P - 0.5| below it is a tie
    retry: str = "failed"  # outcomes of earlier runs that are asked again: failed,refused,unparsed
    output_dir: str = "runs/cai/label"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        check_config(self, positive=("principles_per_pair", "batch_size"))


def run_label(who: JudgeJob, job: LabelJob, resume: bool) -> None:
    """rlhf-fast cai label: labels, if the judge's card allows it, and the report on the constitution."""
    constitution, judge = who.load(job.seed)
    calibration = trusted(judge, constitution, job.card, principles_per_pair=job.principles_per_pair,
                          combine=job.combine, allow_weak_judge=job.allow_weak_judge)  # fmt: skip
    stage = label(
        read_dataset(job.data), constitution, judge, output_dir=job.output_dir, combine=job.combine,
        principles_per_pair=job.principles_per_pair, calibration=calibration, clamp=job.clamp,
        tie_margin=job.tie_margin, batch_size=job.batch_size, seed=job.seed, retry=job.retry.split(","),
    )  # fmt: skip
    report_on(job.output_dir, name=constitution.name)
    _tell("label", stage, "comparisons.jsonl", "constitution.html")


@dataclass
class DeriveJob(Checked):
    judgements: str  # directory of `cai label`
    output_dir: str
    weights: dict = field(default_factory=dict)  # principle: weight, in place of the constitution's; 0 leaves it out
    combine: str | None = None  # logit, prob or sum; null, here and below, is what the labels there were made with
    card: str | None = None  # directory of `cai audit`: the calibration is fitted again, under these weights
    clamp: list | None = None  # [low, high] of P; [0, 1] is none
    tie_margin: float | None = None


def run_derive(job: DeriveJob, resume: bool) -> None:
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
            f"derive: the slope {slope:.3g} was fitted under other weights or another combine; with the judge's card "
            "it is fitted under these"
        )
    _tell("derive", stage, "comparisons.jsonl")


def validate(files: list[str], allow_code: bool) -> str:
    """What the files hold together, a line for each principle. ConstitutionError says what is wrong, and where."""
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
    counts = ", ".join(f"{n} {status}" for status, n in stage.counts.items() if n or status == "inputs")
    print(f"{name}: {counts}; {', '.join(f'{stage.output_dir}/{file}' for file in files)}")
    why = next((record["reason"] for record in stage.rejected if record.get("reason")), None)
    if why:
        print(f"{name}: why they were left out is in {stage.output_dir}/rejected.jsonl; the first: {why[:200]}")


# -- from end to end ---------------------------------------------------------------------------------------------------


@dataclass
class TrainJob:
    model: str  # the SFT model: answers, critiques and revises, and is then trained
    train_data: str  # rows with a prompt; text is what a user says, in every part
    eval_data: str | None = None  # prompts whose answers are checked before, between and after
    card: str | None = None  # directory of `cai audit` of this judge; a judge of rules needs none
    allow_weak_judge: bool = False  # label without a card, or at the floor
    output_dir: str = "runs/cai"
    seed: int = 0
    num_prompts: int = 512  # for the revisions, and as many others for the comparisons
    max_prompt_length: int = 512  # tokens; longer prompts of hh-rlhf are left out, and named
    max_new_tokens: int = 64
    temperature: float = 1.0
    schedule: str | None = None  # of the revisions; null is check-all where a principle has a check, else paper
    max_revisions: int = 4
    principles_per_pair: int | None = None  # the paper draws 1; null takes all
    drop: list = field(default_factory=lambda: list(DROP))  # flags of replies that no model should learn from
    human_data: str | None = None  # comparisons by people, for the reward model beside the judge's
    source_weights: dict = field(default_factory=dict)  # of "ai" and "human" in its loss; 1 where not named
    eval_share: float = 0.1  # of the comparisons of each source, held out from the reward model
    sft: dict = field(default_factory=dict)  # keys of that trainer; its directory is output_dir/sft
    reward: dict = field(default_factory=dict)  # the same of the reward model
    ppo: dict = field(default_factory=dict)  # and eval_rewards, as `rlhf-fast ppo` takes them; they read eval_data

    def __post_init__(self):
        check_config(
            self,
            positive=("num_prompts", "max_prompt_length", "max_new_tokens", "max_revisions", "principles_per_pair"),
            non_negative=("temperature",),
        )


def run_train(who: JudgeJob, job: TrainJob, resume: bool) -> None:
    """rlhf-fast cai train: revisions -> SFT -> comparisons -> reward model -> PPO; held-out answers in between."""
    root, run = Path(job.output_dir), prepare(who, job, resume)
    constitution, judge, prompts = run.constitution, run.judge, run.prompts
    options = {"seed": job.seed, "batch_size": 128}

    def generator(model: str) -> TextGenerator:
        return TextGenerator(load_policy(model), run.tokenizer, job.max_new_tokens, job.temperature)

    def part(name: str, make: Callable) -> dict:
        return _train_part(root / name, run.configs[name], make, resume)

    stages = _StageTable(root, job, constitution, judge, run.tokenizer, run.held_out)
    stages.add("start", job.model)

    # Phase 1, on the first half of the prompts.
    half = len(prompts) // 2
    revised = _revise(run.schedule, prompts[:half], generator(job.model), constitution, judge, job.max_new_tokens,
                      job.max_revisions, output_dir=root / "revise", drop=job.drop, **options)  # fmt: skip
    if not revised.rows:
        raise ConfigError(f"cai: no reply is left to learn from; {root}/revise/rejected.jsonl says why")
    part("sft", lambda config: SFTTrainer(config, job.model, train_dataset=revised.rows, tokenizer=run.tokenizer))
    sft = str(root / "sft")
    stages.add("sft", sft)

    # Phase 2, on the other half; PPO sees all of them.
    pairs = sample_pairs(prompts[half:], generator(sft), constitution, output_dir=root / "pairs", **options)
    labelled = label(pairs.rows, constitution, judge, output_dir=root / "label", calibration=run.calibration,
                     principles_per_pair=job.principles_per_pair, **options)  # fmt: skip
    _tell("label", labelled, "comparisons.jsonl")
    if not labelled.rows:
        raise ConfigError(
            "cai: the judge told no pair of answers apart, so there is nothing for a reward model to learn"
        )
    compared = _mixed(job, {"ai": labelled.rows, **run.people})
    part("reward", lambda config: RewardTrainer(config, sft, **compared))
    judged = root / "reward" / "preferences.json"  # of the model that was kept, where the log ends with the last step's
    accuracy = json.loads(judged.read_text(encoding="utf-8"))["accuracy"] if judged.is_file() else None
    stages.add("reward", rm_accuracy=accuracy)
    reward = str(root / "reward")
    data = {"train_dataset": prompts, "eval_dataset": run.held_out, "eval_rewards": run.eval_rewards}

    def ppo(config: PPOConfig) -> PPOTrainer:
        own_critic = config.advantage_estimator == "gae" and not config.share_trunk
        critic = load_reward_model(reward) if own_critic else None
        return PPOTrainer(config, sft, reward=reward, value_model=critic, **data)

    metrics = part("ppo", ppo)
    stages.add("ppo", str(root / "ppo"), kl=metrics.get("objective/kl"), proxy_reward=metrics.get("objective/scores"))


def _train_part(directory: Path, config, make: Callable, resume: bool) -> dict:
    """Trains one part and returns its last metrics. On resume a part that has ended is left as it is, one with a
    checkpoint goes on from there, and one without begins again."""
    if resume and has_ended(directory):
        if changed := changed_settings(directory, dataclasses.asdict(config)):
            warnings.warn(
                f"{directory} has ended and stays as it is: it was trained with other {', '.join(changed)} than "
                "are given now. To train it so, delete it and the parts that came after it, and resume",
                stacklevel=3,
            )
    else:
        goes_on = resume and latest_checkpoint(directory) is not None
        if resume and not goes_on:
            (directory / "train_log.jsonl").unlink(missing_ok=True)
            shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        run_trainer(make(config), goes_on)
    return read_jsonl(directory / "train_log.jsonl")[-1]


def _mixed(job: TrainJob, sources: dict[str, list[dict]]) -> dict:
    """The datasets for RewardTrainer: comparisons of all sources, of each the first eval_share held out."""
    cuts = {name: round(len(rows) * job.eval_share) for name, rows in sources.items()}
    train = {name: rows[cuts[name] :] for name, rows in sources.items()}
    held = [{**row, "source": name} for name, rows in sources.items() for row in rows[: cuts[name]]]
    mixed = mix_comparisons(train, job.source_weights, seed=job.seed)
    return {"train_dataset": mixed, "eval_dataset": held or None}


class _StageTable:
    """summary.json and report.html of a run of several stages, written again as each of them ends."""

    def __init__(self, root: Path, job: TrainJob, constitution, judge, tokenizer, held_out: list[dict] | None):
        self.root, self.job, self.judge, self.tokenizer = root, job, judge, tokenizer
        self.principles = [p for p in constitution.principles if p.check]
        self.prompts = [row["prompt"] for row in held_out or []]
        self.stages: list[dict] = []
        self.samples: list[dict] = [{"prompt": prompt, "responses": []} for prompt in self.prompts[:8]]
        self.clock = time.perf_counter()

    def add(self, name: str, model: str | None = None, **values) -> None:
        stage = {"name": name, "run": name, "seconds": round(time.perf_counter() - self.clock, 1), **values}
        if model is not None and self.prompts and self.principles:
            stage |= self._check_answers(name, model)
        self.stages.append(stage)
        summary = {"seed": self.job.seed, "stages": self.stages, "samples": self.samples}
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8")
        shown = ", ".join(f"{k} {v:.4g}" for k, v in stage.items() if isinstance(v, float))
        print(f"{name}: {shown}; {write_quickstart_report(self.root)}")
        self.clock = time.perf_counter()

    def _check_answers(self, name: str, model: str) -> dict:
        replies = generate_text(
            load_policy(model), self.tokenizer, self.prompts, max_new_tokens=self.job.max_new_tokens,
            temperature=self.job.temperature, seed=self.job.seed,
        )  # fmt: skip
        items = read_items(self.prompts)
        asked = [Reply(item["prompt"], r, self.principles) for item, r in zip(items, replies, strict=True)]
        with Ledger(self.root / "checks") as ledger:
            checks = self.judge.check(asked, ledger)
        violated = [[check.principle for check in row if check.satisfied is False] for row in checks]
        missing = [[check for check in row if check.status not in ("ok", "not_applicable")] for row in checks]
        for sample, text, violates, gone in zip(self.samples, replies, violated, missing, strict=False):
            known = None if gone and not violates else violates
            sample["responses"].append({"stage": name, "text": text, "violates": known})
        if reasons := [row[0].reason for row in missing if row]:
            print(f"{name}: {len(reasons)} of {len(checks)} replies are in no pass rate, a check had no answer "
                  f"({reasons[0]})")  # fmt: skip
        applies = {p.id: [c.satisfied for row in checks for c in row if c.principle == p.id and c.satisfied is not None]
                   for p in self.principles}  # fmt: skip
        passed = [not violates for violates, gone in zip(violated, missing, strict=True) if not gone]
        return {
            "pass_rate": sum(passed) / len(passed) if passed else None,
            "pass_rate_per_principle": {p: sum(kept) / len(kept) for p, kept in applies.items() if kept},
        }


CAI = {
    command.name: command
    for command in (
        Command(
            "revise", "Phase 1: answers are checked, criticised and revised.", (JudgeJob, WriterJob, ReviseJob),
            run_revise, usual=("judge", "judge_model", "max_new_tokens", "schedule", "num_prompts", "output_dir"),
        ),
        Command("pairs", "Phase 2, first half: two answers to each prompt.", (WriterJob, PairsJob), run_pairs),
        Command("audit", "The judge's card, before money is spent on its labels.", (JudgeJob, AuditJob), run_audit),
        Command(
            "label", "Phase 2, second half: the judge compares each pair.", (JudgeJob, LabelJob), run_label,
            usual=("judge", "judge_model", "card", "output_dir"),
        ),
        Command("derive", "Labels under other weights, from the same judgements.", (DeriveJob,), run_derive),
        Command(
            "cai", "Constitutional AI: revise and fine-tune, label, reward model, PPO.", (JudgeJob, TrainJob),
            run_train,
            usual=("judge", "judge_model", "eval_data", "card", "output_dir", "num_prompts", "sft", "reward", "ppo"),
        ),
    )
}  # fmt: skip

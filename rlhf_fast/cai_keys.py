"""rlhf-fast cai WORD: Constitutional AI, one part at a time or from end to end.

  validate  constitution files      -> what is in them, or what is wrong where
  revise    prompts                 -> revisions.jsonl, sft.jsonl (phase 1)
  pairs     prompts                 -> pairs.jsonl, rejected.jsonl (phase 2)
  audit     pairs people compared   -> audit.json, audit.html: the judge's card
  label     pairs, the judge's card -> judgements.jsonl, comparisons.jsonl,
                                       constitution.html
  derive    judgements              -> comparisons.jsonl under other weights,
                                       clamp, calibration; asks no judge
  train     prompts                 -> all of it, with SFT, reward model, PPO

Each writes one directory, and continues there when it is called again (train
only with --resume). `rlhf-fast cai WORD --help` lists the keys of each.
"""

from dataclasses import dataclass, field

from .commands import Checked, Command
from .trainers.configs import DROP, check_config


@dataclass
class JudgeJob(Checked):
    """The judge, and the principles that it judges by."""

    constitution: str | list  # file of principles, or several files that make one constitution
    judge: str = "rules"  # or a model's directory or name, or the URL of an OpenAI-compatible server (http://.../v1)
    judge_model: str | None = None  # the model's name on the server, if judge is a URL
    judge_options: dict = field(default_factory=dict)  # of LocalJudge or HTTPJudge: cot_tokens, mode, votes, ...
    judge_server: dict = field(default_factory=dict)  # of Server: concurrency, max_requests, max_cost, ...
    allow_code: bool = False  # the constitution may name rules by import path, which runs code


@dataclass
class WriterJob:
    """The model that writes answers, and how it samples."""

    model: str  # directory or name of the model that writes, or the URL of an OpenAI-compatible server
    server_model: str | None = None  # the model's name on the server, if model is a URL
    server: dict = field(default_factory=dict)  # of Server: concurrency, max_requests, max_cost, ...
    max_new_tokens: int = 256  # of an answer
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0  # sample from the fewest tokens whose probabilities add up to this
    bf16: bool = False  # of a local model: products in bfloat16, weights in float32; refused if the hardware lacks it

    def __post_init__(self):
        check_config(self, positive=("max_new_tokens", "top_p"), non_negative=("temperature",), unit=("top_p",))


@dataclass
class ReviseJob:
    """Which prompts are answered and revised, and how."""

    train_data: str  # rows with a prompt
    schedule: str = "check-all"  # check-all: revise what is violated, keep the best; paper: four revisions at random
    max_steps: int | None = None  # revisions per prompt; null: the schedule's own number
    drop: list = field(default_factory=lambda: list(DROP))  # flags of replies that no model should learn from
    num_prompts: int | None = None  # use only this many, the first ones; null: all
    output_dir: str = "runs/cai/revise"  # files and a ledger of what was asked
    batch_size: int = 32  # prompts at once
    seed: int = 0  # of all random choices

    def __post_init__(self):
        check_config(self, positive=("max_steps", "num_prompts", "batch_size"))


@dataclass
class PairsJob:
    """Which prompts get two answers each."""

    train_data: str  # rows with a prompt
    constitution: str | list  # its layout says how prompts are put to the model
    num_prompts: int | None = None  # use only this many, the first ones; null: all
    output_dir: str = "runs/cai/pairs"  # files and a ledger of what was asked
    batch_size: int = 32  # prompts at once
    seed: int = 0  # of all random choices
    allow_code: bool = False  # the constitution may name rules by import path, which runs code

    def __post_init__(self):
        check_config(self, positive=("num_prompts", "batch_size"))


@dataclass
class AuditJob:
    """The pairs that the judge is tested on."""

    data: str  # rows {prompt, better, worse} or {prompt, chosen, rejected}, or Anthropic's evaluation file
    num_pairs: int | None = None  # use only this many, the first ones; null: all
    principles_per_pair: int | None = None  # as for the labels later: `label` refuses a card with another number
    probe_pairs: int = 24  # pairs that are asked again with an injection in the worse reply
    output_dir: str = "runs/cai/audit"  # the card, a report, and a ledger of what was asked
    batch_size: int = 32  # pairs at once
    seed: int = 0  # of all random choices

    def __post_init__(self):
        check_config(self, positive=("num_pairs", "principles_per_pair", "batch_size"), non_negative=("probe_pairs",))


@dataclass
class LabelJob:
    """The pairs to label, and how judgements become labels."""

    data: str  # pairs.jsonl of `cai pairs`, or rows {prompt, a, b}
    card: str | None = None  # directory of `cai audit` of this judge: its floor, and the calibration of the labels
    allow_weak_judge: bool = False  # label without a card, or at the floor
    principles_per_pair: int | None = None  # how many are drawn for each pair; the paper draws 1; null: all
    combine: str | None = None  # logit, prob or sum, of both orders and all principles; null: the judge's own
    clamp: list | None = None  # [low, high] of P; null: [0.4, 0.6] for a judge with cot_tokens, none otherwise
    tie_margin: float = 0.01  # |P - 0.5| below it is a tie
    retry: str = "failed"  # outcomes of earlier runs that are asked again: failed,refused,unparsed
    output_dir: str = "runs/cai/label"  # files, a report, and a ledger of what was asked
    batch_size: int = 32  # pairs at once
    seed: int = 0  # of all random choices

    def __post_init__(self):
        check_config(self, positive=("principles_per_pair", "batch_size"))


@dataclass
class DeriveJob(Checked):
    """The judgements to derive labels from, and what to change."""

    judgements: str  # directory of `cai label`
    output_dir: str  # for the new comparisons.jsonl
    weights: dict = field(default_factory=dict)  # {principle: weight} in place of the constitution's; 0 leaves it out
    combine: str | None = None  # logit, prob or sum; null, here and below: what those labels were made with
    card: str | None = None  # directory of `cai audit`: the calibration is fitted again under these weights
    clamp: list | None = None  # [low, high] of P; [0, 1] clamps nothing
    tie_margin: float | None = None  # |P - 0.5| below it is a tie


@dataclass
class TrainJob:
    """All parts of Constitutional AI in one run."""

    model: str  # the SFT model: it answers, criticises and revises, and is then trained
    train_data: str  # rows with a prompt; in every part a prompt that is text is what a user says
    eval_data: str | None = None  # prompts whose answers are checked before, between and after the stages
    card: str | None = None  # directory of `cai audit` of this judge; a judge of rules needs none
    allow_weak_judge: bool = False  # label without a card, or at the floor
    output_dir: str = "runs/cai"  # with a directory for each part
    seed: int = 0  # of every part, unless sft, reward or ppo has another
    num_prompts: int = 512  # for the revisions, and as many others for the comparisons
    max_prompt_length: int = 512  # tokens; longer prompts of hh-rlhf are left out, and named
    max_new_tokens: int = 64  # of an answer or a revision
    temperature: float = 1.0  # of answers and revisions
    bf16: bool = False  # of the model that answers and revises; sft, reward and ppo have a key of their own
    schedule: str | None = None  # of the revisions; null: check-all if a principle has a check, else paper
    max_revisions: int = 4  # per prompt
    principles_per_pair: int | None = None  # how many are drawn for each pair; the paper draws 1; null: all
    drop: list = field(default_factory=lambda: list(DROP))  # flags of replies that no model should learn from
    human_data: str | None = None  # comparisons by people, which the reward model learns as well as the judge's
    source_weights: dict = field(default_factory=dict)  # of "ai" and "human" in its loss; 1 if not given
    eval_share: float = 0.1  # share of each source's comparisons that the reward model does not train on
    sft: dict = field(default_factory=dict)  # keys of that trainer's config; it writes output_dir/sft
    reward: dict = field(default_factory=dict)  # the same for the reward model
    ppo: dict = field(default_factory=dict)  # the same for PPO, and eval_rewards, which are read on eval_data

    def __post_init__(self):
        check_config(
            self,
            positive=(
                "num_prompts", "max_prompt_length", "max_new_tokens", "max_revisions", "principles_per_pair",
                "temperature",  # at 0 the two answers of a pair would be the same
            ),
        )  # fmt: skip


CAI = {
    command.name: command
    for command in (
        Command(
            "revise", "Phase 1: the model answers prompts, criticises its answers and revises them.",
            (JudgeJob, WriterJob, ReviseJob), "cai_jobs.run_revise",
            usual=("judge", "judge_model", "max_new_tokens", "schedule", "num_prompts", "output_dir"),
        ),
        Command(
            "pairs", "Phase 2, first half: the model answers each prompt twice.", (WriterJob, PairsJob),
            "cai_jobs.run_pairs",
        ),
        Command(
            "audit", "Tests the judge on pairs that people compared, before money is spent on its labels.",
            (JudgeJob, AuditJob), "cai_jobs.run_audit",
        ),
        Command(
            "label", "Phase 2, second half: the judge compares each pair.", (JudgeJob, LabelJob), "cai_jobs.run_label",
            usual=("judge", "judge_model", "card", "output_dir"),
        ),
        Command(
            "derive", "Makes labels under other weights, from the same judgements.", (DeriveJob,),
            "cai_jobs.run_derive",
        ),
        Command(
            "cai", "Constitutional AI: revise and fine-tune, label, reward model, PPO.", (JudgeJob, TrainJob),
            "cai_jobs.run_train", resumes=True,
            usual=("judge", "judge_model", "eval_data", "card", "output_dir", "num_prompts", "sft", "reward", "ppo"),
        ),
    )
}  # fmt: skip

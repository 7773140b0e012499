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

from dataclasses import dataclass, field

from .commands import Checked, Command
from .trainers.configs import DROP, check_config


@dataclass
class JudgeJob(Checked):
    constitution: str | list  # file of principles, or several that make one
    judge: str = "rules"  # or a model's directory or name, or the URL of an OpenAI-compatible server (http://.../v1)
    judge_model: str | None = None  # the model's name there, where judge is a URL
    judge_options: dict = field(default_factory=dict)  # of LocalJudge or HTTPJudge: cot_tokens, mode, votes, ...
    judge_server: dict = field(default_factory=dict)  # of Server: concurrency, max_requests, max_cost, ...
    allow_code: bool = False  # the constitution may name rules by import path, which runs code


@dataclass
class WriterJob:
    model: str  # directory or name of the model that writes, or the URL of an OpenAI-compatible server
    server_model: str | None = None  # the model's name there, where model is a URL
    server: dict = field(default_factory=dict)  # of Server: concurrency, max_requests, max_cost, ...
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    bf16: bool = False  # of a model here: products in bfloat16, weights in float32; refused where the hardware lacks it

    def __post_init__(self):
        check_config(self, positive=("max_new_tokens", "top_p"), non_negative=("temperature",), unit=("top_p",))


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


@dataclass
class DeriveJob(Checked):
    judgements: str  # directory of `cai label`
    output_dir: str
    weights: dict = field(default_factory=dict)  # principle: weight, in place of the constitution's; 0 leaves it out
    combine: str | None = None  # logit, prob or sum; null, here and below, is what the labels there were made with
    card: str | None = None  # directory of `cai audit`: the calibration is fitted again, under these weights
    clamp: list | None = None  # [low, high] of P; [0, 1] is none
    tie_margin: float | None = None


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
    bf16: bool = False  # of the model that answers and revises; sft, reward and ppo have a key of their own
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
            positive=(
                "num_prompts", "max_prompt_length", "max_new_tokens", "max_revisions", "principles_per_pair",
                "temperature",  # at 0 the two answers of a pair would be the same
            ),
        )  # fmt: skip


CAI = {
    command.name: command
    for command in (
        Command(
            "revise", "Phase 1: answers are checked, criticised and revised.", (JudgeJob, WriterJob, ReviseJob),
            "cai_jobs.run_revise",
            usual=("judge", "judge_model", "max_new_tokens", "schedule", "num_prompts", "output_dir"),
        ),
        Command(
            "pairs", "Phase 2, first half: two answers to each prompt.", (WriterJob, PairsJob), "cai_jobs.run_pairs"
        ),
        Command(
            "audit", "The judge's card, before money is spent on its labels.", (JudgeJob, AuditJob),
            "cai_jobs.run_audit",
        ),
        Command(
            "label", "Phase 2, second half: the judge compares each pair.", (JudgeJob, LabelJob), "cai_jobs.run_label",
            usual=("judge", "judge_model", "card", "output_dir"),
        ),
        Command("derive", "Labels under other weights, from the same judgements.", (DeriveJob,), "cai_jobs.run_derive"),
        Command(
            "cai", "Constitutional AI: revise and fine-tune, label, reward model, PPO.", (JudgeJob, TrainJob),
            "cai_jobs.run_train",
            usual=("judge", "judge_model", "eval_data", "card", "output_dir", "num_prompts", "sft", "reward", "ppo"),
        ),
    )
}  # fmt: skip

"""Reads and checks everything for `rlhf-fast cai train` before its first part, so that its last part does not refuse
the input after hours.

<output_dir>/run.json records the settings of each part. A resumed run is compared with it before any file is written. A
part that has not begun takes the current settings.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .cai_keys import TrainJob
from .data.chat import as_messages, encode_to_score, is_conversation
from .data.checks import responses_of
from .data.formats import comparisons
from .data.formats import prompts as read_prompts
from .data.sources import read_rows
from .disk import make_directory, read_json, write_json
from .errors import ConfigError
from .jobs import prompt_limit, read_sources, resolve_reward, write_left_out
from .judges import Constitution, Judge, RuleJudge
from .judges.calibration import Calibration
from .judges.generator import describe_model
from .judges.labels import usable_principles
from .judges.rule_judge import with_rules
from .judges.trust import trusted
from .models import check_lengths, load_policy, load_tokenizer, with_own_pad
from .rewards import check_room, check_signature, make_reward
from .trainers.checkpoints import latest_checkpoint
from .trainers.common import check_bf16
from .trainers.configs import config_from_dict
from .trainers.constitutional import SCHEDULES, check_drop, items_with_kind, mix_comparisons, principles_to_revise
from .trainers.ppo_config import PPOConfig, check_eval_rewards
from .trainers.reward import RewardConfig
from .trainers.run_dir import check_is_new, has_ended
from .trainers.sft import SFTConfig

PARTS = ("revise", "sft", "pairs", "label", "reward", "ppo")  # in order of time, each a directory


@dataclass
class Run:
    """Everything that the parts of a run need, read and checked."""

    tokenizer: object
    constitution: Constitution
    judge: Judge
    calibration: Calibration
    schedule: str  # of phase 1
    configs: dict  # of the three trainers, by name
    eval_rewards: dict  # name: reward, for PPOTrainer
    prompts: list[dict]  # as chats; the first half for phase 1, the second for phase 2
    held_out: list[dict] | None
    people: dict[str, list[dict]]  # "human": the comparisons by people, if there are any


def prepare(job: TrainJob, load_judge: Callable, resume: bool) -> Run:
    """Reads everything that a run needs. ConfigError for anything that one of its parts would refuse.

    load_judge: () -> (constitution, judge).
    """
    if job.schedule:
        check_schedule(job.schedule)
    check_drop(job.drop)
    root = Path(job.output_dir)
    if not resume:
        _check_is_new(root)
    tokenizer = load_tokenizer(job.model)
    constitution, judge = load_judge()
    calibration = trusted(judge, constitution, job.card, principles_per_pair=job.principles_per_pair,
                          allow_weak_judge=job.allow_weak_judge)  # fmt: skip
    configs, eval_rewards = _configs(job)
    sources, left_out = read_sources(job, "ppo", **prompt_limit(tokenizer, job.max_prompt_length))
    prompts, held_out = map(_as_chats, sources)
    prompts = prompts[: 2 * job.num_prompts]
    items_with_kind(prompts)  # now, because the second half is only read in phase 2
    if len(prompts) < 2:
        raise ConfigError(
            f"cai: {job.train_data} has one prompt, and each phase needs prompts of its own: give two or more"
        )
    people = {"human": _as_chats(read_rows(job.human_data))} if job.human_data else {}
    checked = any(p.check and p.revise for p in constitution.principles)
    schedule = job.schedule or ("check-all" if checked else "paper")
    policy = load_policy(job.model)
    run = Run(tokenizer, constitution, judge, calibration, schedule, configs, eval_rewards, prompts, held_out, people)
    _check_settings(job, run)
    _check_people(run)
    _check_lengths(job, run, policy)
    check_phase_1(schedule, constitution, judge)
    if held_out:
        check_rules(judge, constitution)
    usable_principles(judge, constitution, job.principles_per_pair)
    _claim(root, _made_from(job, run, policy))
    write_left_out(root, left_out)
    return run


def _configs(job: TrainJob) -> tuple[dict, dict]:
    """The configs of the three trainers, by name, and PPO's eval_rewards."""
    ppo = dict(job.ppo)
    specs = ppo.pop("eval_rewards", {})
    if not isinstance(specs, dict):
        raise ConfigError(f"cai: ppo's eval_rewards must map names to rewards, got {specs!r}")
    configs = {
        name: config_from_dict(cls, {"seed": job.seed, **values, "output_dir": str(Path(job.output_dir, name))})
        for name, cls, values in (
            ("sft", SFTConfig, job.sft), ("reward", RewardConfig, job.reward), ("ppo", PPOConfig, ppo)
        )
    }  # fmt: skip
    return configs, {name: resolve_reward(spec) for name, spec in specs.items()}


def _check_is_new(root: Path) -> None:
    """ConfigError for a directory that holds a run, or a part that was made by another command."""
    if (root / "summary.json").exists() or any(map(_begun, map(root.joinpath, PARTS))):
        raise ConfigError(
            f"output_dir {str(root)!r} already holds a run: continue it with --resume, choose another output_dir, "
            "or delete it"
        )
    for directory in (root, *map(root.joinpath, PARTS)):
        check_is_new(directory)


def _begun(part: Path) -> bool:
    """Whether a part has something from which a resumed run continues."""
    return (part / "run.json").is_file() or has_ended(part) or latest_checkpoint(part) is not None


def _made_from(job, run: Run, policy) -> dict[str, dict]:
    """{part: the settings that determine its result}, besides the earlier parts and the configs of the trainers."""
    judge = run.judge.describe()
    return {
        "revise": {
            "seed": job.seed, "model": describe_model(policy), "constitution": {"sha256": run.constitution.sha256},
            "prompts (train_data, num_prompts, max_prompt_length)": _digest(run.prompts),
            "max_new_tokens": job.max_new_tokens, "temperature": job.temperature, "schedule": run.schedule,
            "max_revisions": job.max_revisions, "drop": job.drop,
            **({"judge": judge} if run.schedule == "check-all" else {}),  # the schedule "paper" asks no judge
        },
        "label": {
            "judge": judge, "principles_per_pair": job.principles_per_pair,
            "calibration (card)": dataclasses.asdict(run.calibration),
        },
        "reward": {
            "human_data": _digest(run.people.get("human")), "source_weights": job.source_weights,
            "eval_share": job.eval_share,
        },
        "ppo": {"eval_data": _digest(run.held_out), "eval_rewards": job.ppo.get("eval_rewards", {})},
    }  # fmt: skip


def _digest(rows: list[dict] | None) -> dict | None:
    """A hash of the rows, which does not depend on the file they come from."""
    if rows is None:
        return None
    text = json.dumps(rows, ensure_ascii=False, sort_keys=True, default=str)  # str: dates
    return {"rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _claim(root: Path, made_from: dict[str, dict]) -> None:
    """ConfigError if a part that has begun was made from other settings, or if parts before it are gone. Otherwise
    writes the settings into run.json, for comparison at the next resumption."""
    path, begun = root / "run.json", [part for part in PARTS if _begun(root / part)]
    now = json.loads(json.dumps(made_from))  # tuples become lists, as in the file
    before = read_json(path)["settings"] if path.is_file() else {}
    for part, settings in now.items():
        there = before.get(part, {}) if part in begun else {}
        if changed := [name for name in settings if name in there and there[name] != settings[name]]:
            what = ", ".join(
                name if isinstance(there[name], dict) or isinstance(settings[name], dict)
                else f"{name} ({there[name]!r} there, {settings[name]!r} now)"
                for name in changed
            )  # fmt: skip
            rest = ", ".join(str(root / later) for later in begun if PARTS.index(later) >= PARTS.index(part))
            raise ConfigError(
                f"{root}: {part} was made with other settings than are given now: {what}. Resume with those of "
                f"{path}, or delete {rest} to make them again, or choose another output_dir"
            )
    gone = next((part for part in PARTS if part not in begun), PARTS[-1])
    if after := [str(root / part) for part in begun if PARTS.index(part) > PARTS.index(gone)]:
        raise ConfigError(
            f"{root}: {gone} is gone, and a new one would not be the one from which {', '.join(after)} came: delete "
            "what came after it too, and resume"
        )
    if before or not begun:  # parts that have begun without a run.json were made from unknown settings
        make_directory(root)
        write_json(path, {"stage": "cai", "settings": now})


def _as_chats(rows: list[dict] | None) -> list[dict] | None:
    """The rows with text prompts as user messages, so that all parts of the run read the same form. A text reply is
    then scored as the assistant's turn."""
    return rows and [
        {**row, "prompt": as_messages(row["prompt"], "user")} if isinstance(row.get("prompt"), str) else row
        for row in rows
    ]


def check_schedule(schedule: str) -> None:
    """ConfigError for an unknown schedule of phase 1."""
    if schedule not in SCHEDULES:
        raise ConfigError(f"revise: schedule = {schedule!r}, needs {' or '.join(SCHEDULES)}")


def check_phase_1(schedule: str, constitution: Constitution, judge: Judge) -> None:
    """ConfigError if a schedule has no principle under which to revise, or if the judge cannot answer its checks."""
    principles_to_revise(schedule, constitution)
    if schedule == "check-all":
        check_rules(judge, constitution)


def check_rules(judge: Judge, constitution: Constitution) -> None:
    """ConfigError if the judge only has rules, and a check of the constitution is a question for a model."""
    if isinstance(judge, RuleJudge):
        with_rules([p for p in constitution.principles if p.check], "check")


def _check_settings(job: TrainJob, run: Run) -> None:
    """ConfigError for settings that do not go together."""
    configs = run.configs
    if not 0 <= job.eval_share < 1:
        raise ConfigError(f"cai: eval_share = {job.eval_share} must be 0 or more and below 1")
    if not run.tokenizer.chat_template:
        raise ConfigError(
            f"cai: the tokenizer of {job.model!r} has no chat template, but training uses chats whatever the "
            "constitution's layout: set tokenizer.chat_template and save it with the model"
        )
    if configs["sft"].lora_r and configs["ppo"].lora_r:
        raise ConfigError("cai: PPO continues to train the adapters of SFT: set lora_r for one of the two")
    if configs["sft"].load_best_model_at_end:
        raise ConfigError("cai: sft's load_best_model_at_end has no held-out demonstrations to choose by: leave it out")
    if configs["reward"].load_best_model_at_end and not (configs["reward"].eval_steps and job.eval_share):
        raise ConfigError("cai: reward's load_best_model_at_end needs eval_steps too, and an eval_share above 0")
    check_eval_rewards(configs["ppo"], run.eval_rewards, run.held_out)
    mix_comparisons({"ai": [{}], **run.people}, job.source_weights)


def _check_people(run: Run) -> None:
    """ConfigError for comparisons by people that the reward model cannot learn together with the judge's."""
    config = run.configs["reward"]
    for rows in run.people.values():
        limit = {"max_length": config.max_length, "on_overlong": config.on_overlong}
        comparisons(rows, with_own_pad(run.tokenizer), **limit, name="human_data")
        for i, row in enumerate(rows):
            asked = responses_of(row, "human_data", i)
            if any(prompt is None and not is_conversation(reply) for prompt, reply in asked):
                raise ConfigError(
                    f"cai: human_data record {i} has no prompt and its replies are text, but the judge's comparisons "
                    "are chats: give the prompt a column, or chosen and rejected as messages"
                )
            if len(asked) > 2:
                raise ConfigError(
                    f"cai: human_data record {i} ranks {len(asked)} responses, but the judge's comparisons are "
                    "pairs: give rows of chosen and rejected"
                )


def _check_lengths(job: TrainJob, run: Run, policy) -> None:
    """ConfigError if a prompt, or a prompt with its answer, is too long for a trainer, a reward or the model."""
    configs, tokenizer = run.configs, run.tokenizer
    configs["ppo"].iterations(len(run.prompts))
    limit = {"max_length": configs["ppo"].max_prompt_length, "on_overlong": configs["ppo"].on_overlong}
    of_ppo = read_prompts(run.prompts, tokenizer, **limit, name="train_data")[0]
    if run.held_out:
        unseen = read_prompts(run.held_out, tokenizer, **limit, name="eval_data")[0]
        of_ppo += unseen
        for spec in run.eval_rewards.values():
            reward = make_reward(spec, tokenizer)
            check_signature(reward, unseen[0].columns)
            check_room(reward, tokenizer, max(of_ppo, key=len).prompt, configs["ppo"].response_length)

    def longest(texts) -> int:
        return max(len(encode_to_score(tokenizer, text, "")) for text in texts)

    for name in ("sft", "reward"):
        config, length = configs[name], longest(row["prompt"] for row in run.prompts) + job.max_new_tokens
        if config.on_overlong == "error" and length > config.max_length:
            raise ConfigError(
                f"cai: the longest prompt and max_new_tokens = {job.max_new_tokens} are {length} tokens, and {name}'s "
                f"max_length is {config.max_length}: raise it, or set {name}'s on_overlong"
            )
        advice = f"lower max_new_tokens, or {name}'s max_length with on_overlong: skip"
        check_lengths(policy, tokenizer, min(length, config.max_length), advice)
    length = longest(prompt.prompt for prompt in of_ppo) + configs["ppo"].response_length
    check_lengths(policy, tokenizer, length, "lower ppo's response_length or max_prompt_length")
    for wanted in (job.bf16, *(config.bf16 for config in configs.values())):
        check_bf16(wanted, policy.device)

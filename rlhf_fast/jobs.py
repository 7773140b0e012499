"""What the commands do: read models and data, then train, score or answer. keys.py defines the jobs."""

import dataclasses
import functools
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging as transformers_logging

from . import parallel
from .commands import checked_options
from .data import hh_rlhf
from .data.chat import check_tokenizer, encode_prompt, encode_to_score
from .data.checks import is_pair, is_ranking, naming_record, responses_of
from .data.files import as_records
from .data.formats import prompts as encode_prompts
from .data.formats import warn_of_unwritten
from .data.progress import progress
from .data.sources import print_left_out, read_rows, rows_for
from .disk import make_directory, write_atomic
from .errors import ConfigError, NonFiniteError
from .generation import generate_text
from .keys import PPOJob, RewardJob, Scratch, SFTJob
from .models import check_lengths, check_positions, load_config, load_policy, load_tokenizer, positions_of
from .monitors import RunStopped
from .quickstart.model import tiny_llama, train_tokenizer
from .report import read_mapping, write_report
from .rewards import RewardModelReward
from .rollout_server import RolloutServer
from .trainers.common import check_bf16
from .trainers.ppo import PPOConfig, PPOTrainer
from .trainers.reward import RewardConfig, RewardTrainer
from .trainers.run_dir import check_is_new
from .trainers.sft import SFTConfig, SFTTrainer


def run_sft(job: SFTJob, config: SFTConfig, resume: bool) -> None:
    """rlhf-fast sft"""
    model, tokenizer = _from_scratch(job, config) if job.scratch else (job.model, load_tokenizer(job.model))
    train, held_out = read_data(job, "sft", config, tokenizer, resume)
    run_trainer(SFTTrainer(config, model, train_dataset=train, eval_dataset=held_out, tokenizer=tokenizer), resume, job)


def _from_scratch(job: SFTJob, config: SFTConfig):
    """A new Llama, and a tokenizer trained on the texts of train_data. Both are determined by the data and the seed."""
    options = vars(Scratch(**checked_options(Scratch, job.scratch, "sft: scratch")))
    rows, _ = rows_for("sft", job.train_data)
    replies = [[row[key] for key in ("messages", "prompt", "completion", "text") if key in row] for row in rows]
    texts = [text for reply in replies for text in _texts(reply)]
    tokenizer = train_tokenizer(texts, options.pop("vocab_size"), max_length=config.max_length)
    return tiny_llama(tokenizer, config.seed, **options), tokenizer


def run_reward(job: RewardJob, config: RewardConfig, resume: bool) -> None:
    """rlhf-fast reward: trains, then compares the held-out accuracy with floors that need no model."""
    tokenizer = load_tokenizer(job.model)
    train, held_out = read_data(job, "reward", config, tokenizer, resume)
    reference = None if job.reference_data is None else read_rows(job.reference_data)
    trainer = RewardTrainer(
        config, job.model, train_dataset=train, eval_dataset=held_out, reference_dataset=reference, tokenizer=tokenizer
    )
    run_trainer(trainer, resume, job)
    if held_out and parallel.rank() == 0:
        judged = json.loads(Path(config.output_dir, "preferences.json").read_text(encoding="utf-8"))
        ece = judged["calibration"]["ece"]
        summary = {
            "held-out accuracy": round(judged["accuracy"], 4),
            "95 % interval": f"{judged['low']:.3f} to {judged['high']:.3f}",
            "held-out pairs": judged["pairs"],
            **{f"floor: {name}": round(value, 4) for name, value in judged["floors"].items()},
            "expected calibration error": None if ece is None else round(ece, 4),
        }
        write_atomic(Path(config.output_dir, "summary.json"), json.dumps(summary, indent=2) + "\n")
        print("\n".join(f"  {name}: {value}" for name, value in summary.items()))


def score(model: str, records: list[dict], batch_size: int) -> list[dict]:
    """rlhf-fast score: each record with its "score", or, if it has several responses, their "scores" in order.

    Pairs of hh-rlhf transcripts are scored as conversations. Malformed pairs are left out, and named on standard error.
    """
    records = as_records(records, "input")
    reward, asked, tokens = RewardModelReward.load(model, batch_size=batch_size), [], []
    hh, unwritten = hh_rlhf.are_transcripts(records[0]), {}
    for i, record in enumerate(progress(records, "encoding input")):
        try:
            readable = dict(zip(("chosen", "rejected"), hh_rlhf.transcripts(record), strict=True)) if hh else record
        except ValueError as error:
            print(f"input record {i} is left out: {error}", file=sys.stderr)
        else:
            asked.append((record, responses_of(readable, "input", i)))
            with naming_record("input", i):
                tokens += [reward.encode(*pair, unwritten.setdefault(i, [])) for pair in asked[-1][1]]
    warn_of_unwritten(unwritten, "input", "scored")
    scores = iter(reward.score(tokens).tolist())
    rows = []
    for record, pairs in asked:
        values = [next(scores) for _ in pairs]
        several = is_pair(record) or is_ranking(record)
        rows.append({**record, **({"scores": values} if several else {"score": values[0]})})
    return rows


def run_ppo(job: PPOJob, config: PPOConfig, resume: bool) -> None:
    """rlhf-fast ppo"""
    tokenizer = load_tokenizer(job.model)
    train, held_out = read_data(job, "ppo", config, tokenizer, resume)
    trainer = PPOTrainer(
        config, job.model, reward=resolve_reward(job.reward), train_dataset=train, eval_dataset=held_out,
        tokenizer=tokenizer, ref_model=job.ref_model or None, value_model=job.value_model or None,
        eval_rewards={name: resolve_reward(spec) for name, spec in job.eval_rewards.items()},
        rollout_func=_rollout_func(job),
    )  # fmt: skip
    run_trainer(trainer, resume, job)


def _rollout_func(job: PPOJob) -> Callable | None:
    if job.rollout_func and job.rollout_server:
        raise ConfigError("ppo: rollout_server and rollout_func both sample all responses: give only one of them")
    if job.rollout_server:
        return RolloutServer(
            job.rollout_server, **checked_options(RolloutServer, job.rollout_options, "rollout_options")
        )
    if job.rollout_options:
        raise ConfigError("ppo: rollout_options are for a rollout_server: give its URL as rollout_server")
    return resolve_reward(job.rollout_func) if job.rollout_func else None


# -- around a trainer --------------------------------------------------------------------------------------------------


def run_trainer(trainer, resume: bool, job=None):
    """trainer.train(resume) -> its RunResult, with what a command adds: job.json, and an exception for a run that ended
    early (RunStopped for a monitor, KeyboardInterrupt for a signal, NonFiniteError).

    job: names the models, data and rewards, for `output_dir`/job.json and the report. A run that resumes with another
    job than it began with gets a warning.
    """
    path = Path(trainer.config.output_dir, "job.json")
    if job is not None and resume:
        _warn_of_another(job, path)
    elif job is not None:
        _write_job(job, path)
    report = f"{trainer.config.output_dir}/report.html"
    try:
        result = trainer.train(resume)
    except NonFiniteError as error:
        if parallel.rank() == 0:
            write_report(path.parent)
        raise NonFiniteError(
            f"{error}. {report} shows the run so far; --resume continues from the newest checkpoint, if there is one"
        ) from error
    if job is not None and resume and parallel.rank() == 0:  # not earlier, because train may refuse to resume
        try:
            _write_job(job, path)
            write_report(path.parent)
        except OSError as error:  # a full disk; what was trained is saved by now
            warnings.warn(
                f"{path} and the report could not be updated and still describe the run before it was resumed: {error}",
                stacklevel=2,
            )
    if result.stopped_by:
        raise RunStopped(
            f"monitor {result.stopped_by} (step {result.step} of {trainer.total_steps}); {report} shows it, --resume "
            "continues the run all the same"
        )
    if result.interrupted:
        raise KeyboardInterrupt
    if parallel.rank():
        return result
    shown = ", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items() if k.startswith("eval_") and v is not None)
    print(f"{result.output_dir}: step {result.step}{', ' + shown if shown else ''}; {report}")
    return result


def _warn_of_another(job, path: Path) -> None:
    """Warns if job.json holds another job."""
    now, before = json.loads(_as_json(job)), read_mapping(path)
    if before is None:
        return
    changed = [f"{name} (it was {json.dumps(before.get(name))})" for name in now if now[name] != before.get(name)]
    if changed:
        warnings.warn(f"resuming with another {', another '.join(changed)}", stacklevel=3)


def _write_job(job, path: Path) -> None:
    if parallel.rank():
        return
    make_directory(path.parent)
    write_atomic(path, _as_json(job))


def _as_json(job) -> str:
    return json.dumps(dataclasses.asdict(job), indent=2) + "\n"


def read_data(job, stage: str, config, tokenizer, resume: bool) -> list[list[dict] | None]:
    """The rows of job.train_data and of job.eval_data (None if there is none), in the form that the stage takes.

    Prints which pairs are left out, with their lines, and lists them in `output_dir`/left_out.jsonl.
    """
    if not resume:
        check_is_new(config.output_dir, _models_of(job))  # before any file of an earlier run is overwritten
    sources, left_out = read_sources(job, stage, **_limit(stage, tokenizer, config))
    if parallel.rank() == 0:
        write_left_out(config.output_dir, left_out)
    return sources


def read_sources(job, stage: str, **limit) -> tuple[list[list[dict] | None], list[dict]]:
    """The rows that read_data returns, and those of left_out.jsonl. Writes no file.

    limit: max_length and length of hh_rlhf.load_pairs; the trainer applies its own limit to all other data.
    """
    sources, named = [], []
    for path in (job.train_data, job.eval_data):
        rows, left_out = (None, []) if path is None else rows_for(stage, path, **limit)
        sources.append(rows)
        named += [{"file": path, **vars(item)} for item in left_out]
        print_left_out(path, rows, left_out)
    return sources, named


def write_left_out(output_dir: str | Path, left_out: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in left_out)
    write_atomic(make_directory(output_dir) / "left_out.jsonl", text)


def _models_of(job) -> list[str]:
    """The models that a job reads, by the names that it gives them."""
    is_ppo = isinstance(job, PPOJob)
    others = [job.reward, job.ref_model, job.value_model, *job.eval_rewards.values()] if is_ppo else []
    return _texts([job.model, *others])


def _limit(stage: str, tokenizer, config) -> dict:
    """max_length and length for hh_rlhf.load_pairs, so that it leaves out what the trainer would; unlike the trainer,
    load_pairs knows the line numbers. {} if the trainer would refuse or cut long rows instead of leaving them out."""
    if config.on_overlong != "skip":
        return {}
    if stage == "ppo":
        return prompt_limit(tokenizer, config.max_prompt_length)
    return {"max_length": config.max_length, "length": lambda m: len(encode_to_score(tokenizer, m[:-1], m[-1:]))}


def prompt_limit(tokenizer, max_length: int) -> dict:
    """The limit that leaves out pairs with a prompt of more than max_length tokens."""
    return {"max_length": max_length, "length": lambda messages: len(encode_prompt(tokenizer, messages[:-1]))}


def quiet() -> None:
    """Turns off the progress bars of transformers; ours show how far a stage is."""
    transformers_logging.disable_progress_bar()


def _texts(value) -> list[str]:
    """All texts in a string, a message, or a list of these. Anything else has none, and the trainer will refuse it."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _texts(value.get("content"))
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []


def resolve_reward(spec: str | list):
    """A reward in a config -> the reward that PPOTrainer takes. In a config it is the directory of a reward model,
    file.py:function, or [[either, weight], ...]."""
    if isinstance(spec, list):
        if not all(isinstance(part, list) and len(part) == 2 for part in spec):
            raise ConfigError(f"a list of rewards is [[reward, weight], ...], got {spec!r}")
        return [(resolve_reward(reward), weight) for reward, weight in spec]
    if not isinstance(spec, str):  # YAML reads {short:rewards.py:short}, without a space, as a key that has no value
        raise ConfigError(f"a reward is a reward model's directory, file.py:function, or a list of both, got {spec!r}")
    if spec.endswith(".py"):
        raise ConfigError(f"reward {spec!r} is a file of functions: give file.py:function")
    path, colon, name = spec.rpartition(":")
    if not (colon and path.endswith(".py")):
        if colon and not Path(spec).exists():  # no name on the hub has a colon
            raise ConfigError(f"reward {spec!r}: there is no such directory; a function is given as file.py:function")
        return spec
    if not Path(path).is_file():
        raise ConfigError(f"reward {spec!r}: there is no file {path!r}")
    module = _module(resolved := Path(path).resolve(), resolved.stat().st_mtime_ns)
    if not callable(getattr(module, name, None)):
        raise ConfigError(f"reward {spec!r}: {path} has no function {name!r}")
    return getattr(module, name)


@functools.cache
def _module(path: Path, changed: int):
    """The file as a module. Like a script it can import modules from its own directory. It is executed once, however
    often a config names it, so that its functions can share state (a judge, for example), and again if the file has
    changed since.

    changed: the file's modification time, for the cache.
    """
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = str(path)  # unique among modules, and in sys.modules because dataclasses look their module up there
    spec = importlib.util.spec_from_file_location(name, path)
    try:
        spec.loader.get_code(name)  # only compiles
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:  # a NUL byte is a ValueError in Python 3.10, and has no line in 3.11
        line = getattr(error, "lineno", None)
        where = f"{path}, line {line}" if line else path
        raise ConfigError(
            f"{where}: {getattr(error, 'msg', error)} (a file of functions must be Python, saved as UTF-8)"
        ) from None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def answer(model: str, prompt: list[str], system: str | None, **sampling) -> list[str]:
    """rlhf-fast generate: one answer per prompt. Prompts go through the chat template if the tokenizer has one."""
    tokenizer = load_tokenizer(model)
    check_tokenizer(tokenizer, conversational=False)
    prompts: list = prompt
    if tokenizer.chat_template:
        before = [{"role": "system", "content": system}] if system else []
        prompts = [[*before, {"role": "user", "content": text}] for text in prompt]
    elif system:
        raise ConfigError(
            f"generate: the tokenizer of {model!r} has no chat template, which --system needs: leave it out"
        )
    return _answers(model, tokenizer, prompts, **sampling)


def answer_records(model: str, path: str, **sampling) -> list[dict]:
    """rlhf-fast generate --input: each record with the "response" to its prompt, in the form that score reads. As in
    PPO, prompts that are messages go through the chat template, and prompts that are text do not."""
    tokenizer, rows = load_tokenizer(model), read_rows(path, "ppo")
    encode_prompts(rows, tokenizer, max_length=sys.maxsize, name="input")  # refuses what PPO would refuse
    responses = _answers(model, tokenizer, [row["prompt"] for row in rows], **sampling)
    whole = ("messages", "response")  # columns that score would read in place of this response
    rows = [{k: v for k, v in row.items() if k not in whole} for row in rows]
    return [{**row, "response": response} for row, response in zip(rows, responses, strict=True)]


def _answers(model: str, tokenizer, prompts: list, **sampling) -> list[str]:
    longest, config = max((len(encode_prompt(tokenizer, p)) for p in prompts), default=0), load_config(model)
    check_positions(config, longest, "shorten the prompt")
    room = positions_of(config) + 1 - longest  # the last token is never an input
    if sampling["max_new_tokens"] > room:
        print(f"answers have at most {room} tokens, because the model has no positions for more", file=sys.stderr)
        sampling["max_new_tokens"] = room
    policy = load_policy(model)
    check_lengths(policy, tokenizer, longest, "shorten the prompt")
    check_bf16(sampling["bf16"], policy.device)
    temperature = sampling.pop("temperature")
    return generate_text(
        policy, tokenizer, prompts, do_sample=temperature != 0, temperature=temperature or 1.0, **sampling
    )

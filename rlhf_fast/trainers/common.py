"""What the trainers share: the run around the steps (log, evaluation, checkpoints, signals), seeds, batches, optimizer.

A trainer is any object with

    config                  flat dataclass with output_dir, seed, logging_steps, eval_steps, save_steps,
                            save_total_limit
    total_steps: int        optimizer steps (PPO: iterations) of the whole run
    step: int               how many of them are done
    __iter__()              goes on from `step`, yields a dict of metrics per step; state is updated before the yield
    evaluate() -> dict      eval_* metrics; {} where there is nothing to evaluate
    samples() -> list[dict] a few texts for samples.jsonl
    state_dict(), load_state_dict(state)   models, optimizer, scheduler, counters (the RNG is kept here)
    save_model(path)        transformers checkpoint and tokenizer
    finish(run_dir)         if there: once after the last step, before the report is written and the model saved
    guard                   a NonFiniteGuard, which the checkpoint keeps
    monitors                (optional) a Monitors, which reads every log line and may end the run

and `train(resume=False)` that returns `run_training(self, resume=resume)`. No base class.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import threading
import time
import types
import typing
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .. import models
from ..data.chat import ConfigError
from ..packing import why_not_packed
from ..report import write_report

# --- configs ---------------------------------------------------------------------------------------------------------


def check_config(config, *, positive=(), non_negative=(), unit=(), choices=None) -> None:
    """Raises ConfigError unless every field has its annotated type and lies in its range.

    positive: > 0. non_negative: >= 0. unit: in [0, 1]. choices: {field: allowed values}. None passes.
    """
    name = type(config).__name__
    for field, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        union = typing.get_origin(kind) in (types.UnionType, typing.Union)
        kinds = tuple(typing.get_origin(k) or k for k in (typing.get_args(kind) if union else (kind,)))
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, field, float(value))
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("None" if k is types.NoneType else k.__name__ for k in kinds)
            raise ConfigError(f"{name}.{field} = {value!r} must be {names}")
    for fields, ok, what in (
        (positive, lambda v: v > 0, "greater than 0"),
        (non_negative, lambda v: v >= 0, "0 or more"),
        (unit, lambda v: 0 <= v <= 1, "between 0 and 1"),
    ):
        for field in fields:
            value = getattr(config, field)
            if value is not None and not ok(value):
                raise ConfigError(f"{name}.{field} = {value!r} must be {what}")
    for field, allowed in (choices or {}).items():
        if getattr(config, field) not in allowed:
            raise ConfigError(
                f"{name}.{field} = {getattr(config, field)!r} must be one of {', '.join(map(repr, allowed))}"
            )


def config_from_dict(cls, values: dict):
    """cls(**values), where an unknown key is a ConfigError that proposes the nearest field.

    Numbers written as text are converted: YAML 1.1 reads 1e-5 as a string.
    """
    hints = typing.get_type_hints(cls)
    converted = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(hints))}"
            raise ConfigError(f"{cls.__name__} has no field {key!r}{hint}")
        kinds = typing.get_args(hints[key]) or (hints[key],)
        if isinstance(value, str) and float in kinds and str not in kinds:
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{cls.__name__}.{key} = {value!r} must be a number") from None
        converted[key] = value
    try:
        return cls(**converted)
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"{cls.__name__}: {str(error).replace('__init__() ', '')}") from None


# --- seeds -----------------------------------------------------------------------------------------------------------


def set_seed(seed: int) -> None:
    """Seeds torch (all devices), numpy and random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The state of every generator that set_seed seeds, in types that torch.load(weights_only=True) accepts."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "random": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


@contextmanager
def preserved_rng():
    """What runs inside draws from the generators without moving them: looking at a run does not change it."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


# --- batches ---------------------------------------------------------------------------------------------------------


def epoch_batches(
    lengths, batch_size: int, *, seed: int | None = None, epoch: int = 0, by_length: bool = True
) -> list[list[int]]:
    """Indices of one epoch in batches; one batch may be smaller, nothing is dropped.

    A function of its arguments alone, so the number of steps done is all that a checkpoint has to know. by_length:
    within a pool of 50 shuffled batches, neighbours in length share a batch, longest first; then the batches are
    shuffled. Without it (where nothing is padded) batches are drawn at random. seed None does not shuffle: one pool,
    longest first.
    """
    lengths, order, batches = np.asarray(lengths), np.arange(len(lengths)), []
    if seed is None:
        order = np.argsort(-lengths, kind="stable")
        return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    generator = np.random.default_rng([seed % 2**32, epoch])
    generator.shuffle(order)
    if not by_length:
        return [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    for start in range(0, len(order), 50 * batch_size):
        pool = order[start : start + 50 * batch_size]
        pool = pool[np.argsort(-lengths[pool], kind="stable")]
        batches += [pool[i : i + batch_size].tolist() for i in range(0, len(pool), batch_size)]
    generator.shuffle(batches)
    return batches


def run_batches(lengths, batch_size: int, *, seed: int, start: int, stop: int, by_length: bool = True):
    """(epochs done, indices) of steps start to stop - 1, epoch after epoch."""
    per_epoch = math.ceil(len(lengths) / batch_size)
    while start < stop:
        batches = epoch_batches(lengths, batch_size, seed=seed, epoch=start // per_epoch, by_length=by_length)
        for indices in batches[start % per_epoch :]:
            if start == stop:
                return
            start += 1
            yield start / per_epoch, indices


def check_same_data(before: Tensor, lengths: list[int]) -> None:
    """Raises ConfigError where the lengths in a checkpoint are not those of the data at hand."""
    if before.tolist() != lengths:
        raise ConfigError(
            f"the checkpoint was trained on other data ({len(before)} examples, now {len(lengths)}, or of other "
            "lengths): resume with the same dataset, tokenizer and max_length, or start anew from that model"
        )


def steps_in_run(num_examples: int, batch_size: int, num_train_epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run: max_steps where it is > 0, else num_train_epochs over the data, at least one."""
    if max_steps > 0:
        return max_steps
    return max(1, math.ceil(math.ceil(num_examples / batch_size) * num_train_epochs))


# --- the model as it is trained ---------------------------------------------------------------------------------------


def check_best(config, eval_dataset) -> None:
    """Raises ConfigError where load_best_model_at_end has nothing to choose by."""
    if config.load_best_model_at_end and (eval_dataset is None or not config.eval_steps):
        raise ConfigError("load_best_model_at_end needs an eval_dataset (eval_data) and eval_steps")


def with_adapters(model, config, given):
    """The model with the adapters that lora_* ask for; given: the argument of the trainer that it was loaded from."""
    if not config.lora_r:
        return model
    if not models.has_adapters(model):  # add_lora refuses these
        models.check_base_is_saved(given)
    return models.add_lora(
        model, r=config.lora_r, alpha=config.lora_alpha, dropout=getattr(config, "lora_dropout", 0.0),
        target_modules=config.lora_target_modules,
    )  # fmt: skip


def prepare(model, config, given):
    """The model with what a config asks for: lora_* adapters, gradient_checkpointing; bf16 is checked, not applied."""
    model = with_adapters(model, config, given)
    if config.gradient_checkpointing:
        models.checkpoint_activations(model)
    if config.bf16 and not bf16_supported(model.device):
        raise ConfigError(f"bf16: {model.device.type} has no bfloat16 instructions here, so it would only be slower")
    check_learns(model, "the model")
    return model


def check_learns(model, name: str) -> None:
    """Raises ConfigError where no parameter would learn, or one in 16 bits.

    AdamW moves a weight by about the learning rate, and a bfloat16 has 8 bits: a step below 1/512 of the weight, which
    most are at the usual rates, rounds to nothing.
    """
    learning = {p.dtype for p in model.parameters() if p.requires_grad}
    if not learning:
        raise ConfigError(
            f"{name} has nothing that requires grad: load adapters that are to learn with "
            "peft.PeftModel.from_pretrained(base, path, is_trainable=True), or give their path"
        )
    if half := learning & {torch.bfloat16, torch.float16}:
        raise ConfigError(
            f"{name} would learn in {str(half.pop()).removeprefix('torch.')}, where most of AdamW's steps round to "
            "nothing: load it with dtype=torch.float32, or give its path (SFT and reward models still multiply in "
            "bfloat16 with bf16: true), or train float32 adapters on it (lora_r; in PPO with share_trunk)"
        )


def bf16_supported(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(model, bf16: bool):
    """Products in bfloat16, weights and sums in float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)


def packing_if_possible(model, longest: int, required: bool = False) -> bool:
    """Whether batches can be rows without padding (packing.py), of sequences of at most `longest` tokens. If not: a
    warning, or ConfigError where required."""
    reason = why_not_packed(model, longest)
    if reason and required:
        raise ConfigError(f"packing: {reason}; set packing to false")
    if reason:
        warnings.warn(f"batches are padded, within buckets of similar length: {reason}", stacklevel=3)
    return not reason


# --- optimizer -------------------------------------------------------------------------------------------------------


def make_optimizer(modules, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW over the parameters that require grad, each once; only matrices decay (no norms, no biases)."""
    modules = modules if isinstance(modules, (list, tuple)) else [modules]
    unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    matrices = [p for p in unique.values() if p.ndim >= 2]
    others = [p for p in unique.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=True)


SCHEDULES = ("linear", "cosine", "constant")


def make_scheduler(optimizer, schedule: str, total_steps: int, warmup_ratio: float = 0.0):
    """Linear warm-up over warmup_ratio of the run, then one of SCHEDULES; linear and cosine end at 0."""
    warmup = math.ceil(total_steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total_steps - warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def optimizer_step(optimizer, scheduler=None, max_grad_norm: float | None = 1.0) -> Tensor:
    """Clips the global gradient norm, steps, clears the gradients; returns the norm before clipping, a float32 scalar.

    A gradient that is not finite skips the update (the schedule still advances); the norm returned shows it, and
    NonFiniteGuard counts it. max_grad_norm None or 0 does not clip.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    if torch.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if scheduler is not None:
        scheduler.step()
    return norm.detach().float()


class NonFiniteError(RuntimeError):
    """So many updates in a row were skipped for a NaN or inf that the run would go on without learning."""


class NonFiniteGuard:
    """Counts the updates that were skipped because something was not finite; after `limit` in a row it ends the run."""

    def __init__(self, limit: int, output_dir: str):
        self.limit, self.output_dir, self.skipped, self.in_a_row = limit, output_dir, 0, 0

    def check(self, finite: bool, what: str, batch: typing.Callable[[], object]) -> bool:
        """Returns `finite`, having counted. Warns where it is False; at the limit saves batch() and raises."""
        if finite:
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        message = f"{what} is not finite: this update is skipped, number {self.skipped} of the run"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        if self.in_a_row >= self.limit:
            path = Path(self.output_dir) / "non_finite_batch.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(_with_tensors(batch()), path)
            raise NonFiniteError(
                f"{what} was not finite in {self.in_a_row} updates in a row, so the run ends; its last batch is "
                f"{str(path)!r} (torch.load). Look there first; then at the learning rate, and at the dtype"
            )
        return False


def _with_tensors(x):
    """Nested lists and dicts with their arrays as tensors, which torch.load takes without trust in the file."""
    if isinstance(x, dict):
        return {key: _with_tensors(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_with_tensors(value) for value in x]
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class RunResult:
    """How run_training ended: the last step's metrics (with the final eval_*), and whether it stopped early."""

    step: int
    metrics: dict
    interrupted: bool
    output_dir: str


def run_training(trainer, resume: bool = False) -> RunResult:
    """Runs the trainer from its step to its end and keeps the run directory; returns early on SIGINT or SIGTERM, and on
    an alarm of a monitor that is to end the run.

    output_dir/ gets run_config.json, train_log.jsonl (a line per step), samples.jsonl, alarms.jsonl, tensorboard/ (if
    installed), report.html, checkpoint-N/, and at the end the model itself. Evaluation and samples: every eval_steps
    (then also before the first step) and at the end; eval_steps 0: only at the end. Checkpoints: every save_steps (0:
    never) and when stopped; the newest save_total_limit are kept. One more, from after the last step until the model is
    saved, keeps a run whose evaluation or end fails. resume=True goes on, bit for bit, from the newest checkpoint that
    is whole. load_best_model_at_end (if the config has it): a checkpoint at every evaluation whose
    metric_for_best_model is the best so far, and in the end the model of the best of them, evaluated once more.

    Raises ConfigError where output_dir already holds a run and resume is False, or holds no checkpoint and it is True.
    """
    config, run_dir = trainer.config, Path(trainer.config.output_dir)
    start, at_the_end = _open_run(trainer, run_dir, resume)
    spare = start if at_the_end else None  # the step of a checkpoint that goes when the model is saved
    kept = start if resume else -1  # a run that failed before its first line leaves samples of step 0
    log = _JsonLines(run_dir / "train_log.jsonl", kept)
    unlogged = [at_the_end] if at_the_end and (not log.kept or log.kept[-1]["step"] < start) else []
    kept -= len(unlogged)  # that step is looked at again
    samples = _JsonLines(run_dir / "samples.jsonl", kept)
    files, monitors = [log, samples], getattr(trainer, "monitors", None)
    if monitors:
        files.append(alarms := _JsonLines(run_dir / "alarms.jsonl", kept))
        for row in log.kept:
            monitors(row)  # what it raised then is in alarms.jsonl already
    board = _tensorboard(run_dir / "tensorboard", start)
    best = _Best(config, log.kept)
    metrics = dict(log.kept[-1]) if log.kept else {}  # what a run with no step left to do returns
    metrics.pop("step", None)

    def write(row: dict) -> list[str]:
        """Logs a line and the alarms that it raises -> why the run should end, if it should."""
        log.write(row)
        raised = monitors(row) if monitors else []
        for alarm in raised:
            alarms.write(dataclasses.asdict(alarm))
            bar.write(f"{alarm.monitor}: {alarm.message}")
        return [f"monitor {alarm.monitor}" for alarm in raised if alarm.monitor in monitors.stop_on]

    def checkpoint(metrics: dict | None = None) -> None:
        for file in files:
            file.sync()  # the log that a checkpoint goes on from must outlast a power failure as it does
        save_checkpoint(trainer, run_dir, metrics)

    def due(step: int) -> bool:
        return bool(config.save_steps) and step % config.save_steps == 0

    def look(step: int) -> dict:
        with preserved_rng():
            for sample in trainer.samples():
                samples.write({"step": step, **sample})
        with preserved_rng():
            return as_numbers(trainer.evaluate())

    with (
        _signals() as stop,
        tqdm(
            total=trainer.total_steps, initial=start - len(unlogged), desc=type(trainer).__name__, disable=None
        ) as bar,
    ):
        if start == 0 and config.eval_steps:
            write({"step": 0, **(first := look(0))})
            best.improved(0, first)
        clock = time.perf_counter()
        for metrics in itertools.chain(unlogged, trainer if trainer.step < trainer.total_steps else ()):
            step, last = trainer.step, trainer.step >= trainer.total_steps
            metrics = as_numbers(metrics)
            metrics.setdefault("timing_s/step", time.perf_counter() - clock)
            if last and step > start:
                try:
                    checkpoint(metrics)
                    spare = step
                except OSError as error:
                    if due(step) or best.name:
                        raise
                    warnings.warn(f"{error}. The run goes on to its end without it", stacklevel=2)
            if last or (config.eval_steps and step % config.eval_steps == 0):
                metrics |= look(step)
            stop += write({"step": step, **metrics})
            if board and (last or step % config.logging_steps == 0):
                for key, value in metrics.items():
                    board.add_scalar(key, value if value is not None else math.nan, step)
            bar.update(1)
            bar.set_postfix({k: f"{v:.4g}" for k, v in metrics.items() if k in _SHOWN and v is not None}, refresh=False)
            stopping = bool(stop)  # read once: a signal between the two uses must not skip the checkpoint
            if best.improved(step, metrics) or stopping or due(step):
                if not last:
                    checkpoint()
                prune_checkpoints(run_dir, config.save_total_limit, best.step)
            if stopping:
                break
            clock = time.perf_counter()

    for file in [*files, *([board] if board else [])]:
        file.close()
    interrupted = trainer.step < trainer.total_steps
    if best.step is not None and not interrupted:
        state = torch.load(run_dir / f"checkpoint-{best.step}" / "state.pt", map_location="cpu", weights_only=True)
        models.load_trained_state(trainer.model, state["trainer"]["model"])
        print(f"The model of step {best.step} is kept: {best.name} {best.value:.4g}")
        with preserved_rng():
            metrics |= {"best_step": best.step, **as_numbers(trainer.evaluate())}
    if hasattr(trainer, "finish") and not interrupted:
        with preserved_rng():
            trainer.finish(run_dir)
    write_report(run_dir)
    if interrupted:
        print(
            f"Stopped by {stop[0]} after step {trainer.step} of {trainer.total_steps}; nothing is lost. "
            f"Continue with resume=True (--resume): {run_dir / f'checkpoint-{trainer.step}'}"
        )
    else:
        _save_quietly(trainer, run_dir)
        (run_dir / "README.md").write_text(model_card(trainer, metrics), encoding="utf-8")
        if spare == trainer.step and not due(spare) and spare != best.step:
            shutil.rmtree(run_dir / f"checkpoint-{spare}")
    return RunResult(trainer.step, metrics, interrupted, str(run_dir))


_SHOWN = ("loss", "eval_loss", "accuracy", "eval_accuracy", "objective/kl", "objective/scores", "learning_rate")


class _Best:
    """The step whose evaluation was the best so far; on resume, found again in the log."""

    def __init__(self, config, log: list[dict]):
        self.name = config.metric_for_best_model if getattr(config, "load_best_model_at_end", False) else None
        self.step, self.value = None, math.inf
        if self.name is None:
            return
        greater = config.greater_is_better
        self.sign = -1 if (not self.name.endswith(("loss", "perplexity", "ece")) if greater is None else greater) else 1
        for row in log:
            self.improved(row["step"], row)

    def improved(self, step: int, metrics: dict) -> bool:
        """Whether the metrics of a step are an evaluation, and the best so far."""
        evaluated = [name for name in metrics if name.startswith("eval_")]
        if self.name is None or not evaluated:
            return False
        if self.name not in metrics:
            raise ConfigError(f"metric_for_best_model = {self.name!r} is not among {', '.join(evaluated)}")
        value = metrics[self.name]
        if step == 0 or value is None or (self.step is not None and self.sign * value >= self.sign * self.value):
            return False  # step 0 is the model that was given; None was not finite
        self.step, self.value = step, value
        return True


def _open_run(trainer, run_dir: Path, resume: bool) -> tuple[int, dict | None]:
    """Prepares the directory and, on resume, the trainer -> the step from which the run goes on, and the metrics of
    that step where its checkpoint was saved before they were logged."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for stale in run_dir.glob(".tmp-checkpoint-*"):
        shutil.rmtree(stale)
    written = {"trainer": type(trainer).__name__, **dataclasses.asdict(trainer.config)}
    config_path = run_dir / "run_config.json"
    if not resume:
        check_is_new(run_dir)
        for report in getattr(trainer, "reports", ()):
            if report.overlong or report.truncated:
                print(report)
        (run_dir / "data.json").write_text(json.dumps([dataclasses.asdict(r) for r in getattr(trainer, "reports", ())]))
        config_path.write_text(json.dumps(written, indent=2, default=str) + "\n")
        return trainer.step, None
    newest = _newest_whole_checkpoint(run_dir)
    if newest is None:
        raise ConfigError(
            f"nothing to resume: output_dir {str(run_dir)!r} holds no checkpoint (saved every save_steps and "
            "on Ctrl-C); run without resume"
        )
    before = json.loads(config_path.read_text()) if config_path.exists() else {}
    changed = [
        k for k, v in json.loads(json.dumps(written, default=str)).items() if before.get(k) != v and k != "output_dir"
    ]
    if changed:
        warnings.warn(f"resuming with a config that differs in {', '.join(changed)}", stacklevel=3)
    unlogged = load_checkpoint(trainer, newest)
    return trainer.step, unlogged


def check_is_new(run_dir) -> None:
    """Raises ConfigError where output_dir already holds a run."""
    log, newest = Path(run_dir) / "train_log.jsonl", latest_checkpoint(run_dir)
    if newest is not None or (log.exists() and log.stat().st_size):
        way_on = "" if newest is None else "continue it with resume=True (--resume), "
        raise ConfigError(
            f"output_dir {str(run_dir)!r} already holds a run: {way_on}choose another output_dir, or delete it"
        )


def model_card(trainer, metrics: dict) -> str:
    """Markdown with the metadata that the Hugging Face hub reads, the last metrics and every setting."""
    name = type(trainer).__name__
    settings = {k: v for k, v in dataclasses.asdict(trainer.config).items() if k != "output_dir"}
    tables = [
        f"| {title} | |\n|---|---|\n" + "\n".join(f"| `{k}` | {_short(v)} |" for k, v in rows.items())
        for title, rows in (("metric at the end", metrics), ("setting", settings))
        if rows
    ]
    head = f"---\nlibrary_name: transformers\ntags: [rlhf-fast, {name.removesuffix('Trainer').lower()}]\n---\n"
    title = f"# {Path(trainer.config.output_dir).name}\n\nTrained with rlhf_fast's `{name}`, {trainer.step} steps.\n"
    return "\n".join([head + title, *(table + "\n" for table in tables)])


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_numbers(metrics: dict) -> dict:
    """Tensors and numpy scalars to Python numbers; what is not finite becomes None (null in JSON)."""
    numbers = {k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


class _JsonLines:
    """Appends one JSON object a line, flushed; what a file has beyond `step` is cut when it is opened."""

    def __init__(self, path: Path, step: int):
        self.kept: list[dict] = []
        size = 0
        # Bytes, because a crash may cut within a character; and "\n" alone ends a line, U+2028 in a text does not.
        for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
            row = json.loads(line)
            if row["step"] > step:
                break
            self.kept.append(row)
            size += len(line) + 1
        self._file = path.open("a", encoding="utf-8")
        self._file.truncate(size)

    def write(self, row: dict) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _tensorboard(path: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path), purge_step=start + 1 if start else None)


@contextmanager
def _signals():
    """Yields a list that the name of a SIGINT or SIGTERM enters; a second signal acts as it did before."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may install handlers
        yield received
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handler(number, frame):
        received.append(signal.Signals(number).name)
        for s, old in previous.items():
            signal.signal(s, old)
        print(f"\n{received[0]}: finishing this step, then saving (again to stop at once)", flush=True)

    for s in previous:
        signal.signal(s, handler)
    try:
        yield received
    finally:
        for s, old in previous.items():
            signal.signal(s, old)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(trainer, run_dir: Path, metrics: dict | None = None) -> Path:
    """Writes checkpoint-N/ (state.pt and the model's files), either whole or not at all.

    metrics: those of step N, where they are not in the log yet.

    The files are written beside it, hashed into manifest.json, forced to the disk, and appear under their name in one
    rename. Raises OSError where that fails (a full disk, say); what was there before is untouched then.
    """
    run_dir = Path(run_dir)
    target = run_dir / f"checkpoint-{trainer.step}"
    temporary, replaced = (target.with_name(f".tmp-{target.name}{suffix}") for suffix in ("", "-replaced"))
    temporary.mkdir(parents=True)
    try:
        _save_quietly(trainer, temporary)
        state = {"step": trainer.step, "trainer": trainer.state_dict(), "rng": rng_state(), "metrics": metrics}
        if guard := getattr(trainer, "guard", None):
            state["guard"] = {"skipped": guard.skipped, "in_a_row": guard.in_a_row}
        torch.save(state, temporary / "state.pt")
        (temporary / MANIFEST).write_text(json.dumps(_hashes(temporary), indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
    except Exception as error:  # a full disk is an OSError, a RuntimeError of torch.save or one of safetensors' own
        shutil.rmtree(temporary, ignore_errors=True)
        before = latest_checkpoint(run_dir)
        kept = f"{before} is untouched: resume from it" if before else "there is no earlier one"
        raise OSError(f"{target} could not be saved ({error}); {kept}") from error
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    _fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def prune_checkpoints(run_dir: Path, keep: int, best: int | None) -> None:
    """Removes all but the newest `keep`, and that of step `best`."""
    for old in _checkpoints(run_dir)[:-keep]:
        if old.name != f"checkpoint-{best}":
            shutil.rmtree(old)


MANIFEST = "manifest.json"


def _hashes(folder: Path) -> dict[str, str]:
    """{file below the folder: SHA-256 of its content}, the manifest aside."""
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        hashes[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return hashes


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files (torn, changed or missing), or None."""
    try:
        expected = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or torn"
    found = _hashes(checkpoint)
    wrong = [name for name, digest in expected.items() if found.get(name) != digest]
    return f"{', '.join(wrong)} not as written" if wrong else None


def _save_quietly(trainer, path: Path) -> None:
    """save_model without the progress bar of transformers, which would write over ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    trainer.save_model(path)
    if shown:
        transformers_logging.enable_progress_bar()


def load_checkpoint(trainer, path: Path) -> dict | None:
    """Returns the metrics that save_checkpoint was given."""
    state = torch.load(Path(path) / "state.pt", map_location="cpu", weights_only=True)
    trainer.load_state_dict(state["trainer"])
    for name, value in state.get("guard", {}).items():
        setattr(trainer.guard, name, value)
    if trainer.step != state["step"]:
        raise RuntimeError(f"{type(trainer).__name__}.load_state_dict left step at {trainer.step}, not {state['step']}")
    set_rng_state(state["rng"])
    return state.get("metrics")


def latest_checkpoint(run_dir) -> Path | None:
    found = _checkpoints(run_dir)
    return found[-1] if found else None


def _newest_whole_checkpoint(run_dir: Path) -> Path | None:
    """The one to resume from; newer ones that are damaged are named, and moved out of the way as damaged-checkpoint-N.

    Raises ConfigError where there are checkpoints and none is whole.
    """
    found, reasons = _checkpoints(run_dir)[::-1], {}
    for checkpoint in found:
        if why := damage(checkpoint):
            reasons[checkpoint] = why
            continue
        for bad, why in reasons.items():
            warnings.warn(f"{bad} is damaged ({why}): going on from {checkpoint.name}", stacklevel=4)
            aside = bad.with_name(f"damaged-{bad.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(bad, aside)
        return checkpoint
    if reasons:
        listed = "; ".join(f"{bad.name}: {why}" for bad, why in reasons.items())
        raise ConfigError(f"no checkpoint in {str(run_dir)!r} is whole ({listed}): start anew in another output_dir")
    return None


def _checkpoints(run_dir) -> list[Path]:
    found = [p for p in Path(run_dir).glob("checkpoint-*") if (p / "state.pt").exists()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

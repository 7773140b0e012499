"""The run around a trainer's steps: log, samples, evaluation, alarms, checkpoints, signals, and the model at the end.

A trainer is any object with

    config                  flat dataclass with output_dir, seed, logging_steps, eval_steps, save_steps,
                            save_total_limit
    total_steps: int        optimizer steps (PPO: iterations) of the whole run
    step: int               the steps done so far
    __iter__()              continues from `step`, yields a dict of metrics per step; updates the state before the yield
    evaluate() -> dict      eval_* metrics; {} if there is nothing to evaluate
    samples() -> list[dict] a few texts for samples.jsonl
    state_dict(), load_state_dict(state)   models, optimizer, scheduler, counters, but not the random state, which the
                            run saves; all processes call them at once
    save_model(path)        transformers checkpoint and tokenizer
    save_in_checkpoint(path)  (optional) called for checkpoints instead of save_model, if that writes too much
    gathered()              (optional) a context in which the first process alone can save the model (sharding.py)
    finish(run_dir)         (optional) called once after the last step, before the report and the model are written
    guard                   (optional) a NonFiniteGuard; checkpoints save its counts
    reports                 (optional) the Report of each dataset, for data.json
    monitors                (optional) a Monitors; it reads every log line and may end the run
    whole                   (optional) False while a step changes the trainer. If a step fails while it is True, the run
                            saves a checkpoint of the steps before

and `train(resume=False)` that returns `run_training(self, resume=resume)`. There is no base class.

If there are several processes (parallel.py), the first one runs all of this. It tells the others when to take a step,
to evaluate and to sample (everywhere.py); they write nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from .. import parallel
from ..disk import delete, make_directory, write_atomic
from ..errors import ConfigError
from ..models import save_quietly
from ..monitors import Alarm
from ..report import write_report
from .checkpoints import damage, newest_whole_checkpoint, prune_checkpoints, remove_checkpoint, save_checkpoint
from .everywhere import Everywhere
from .records import Records, as_numbers
from .run_dir import RUN_CONFIG, begins_again, changed_settings, check_is_new, has_ended, model_card

# The names of models' files, logs and records, but not those of what a scheduler writes (slurm-1.out, a link to a log).
_WRITTEN_OVER = re.compile(r"value_model|.+\.(?:safetensors|jsonl?|jinja|model|txt|md|html)")


@dataclasses.dataclass
class RunResult:
    """How run_training ended: the last step's metrics (with the final eval_*), and whether it stopped early.

    stopped_by: the monitor that ended the run early, with its message; None if no monitor did.
    """

    step: int
    metrics: dict
    interrupted: bool
    output_dir: str
    stopped_by: str | None


def run_training(trainer, resume: bool = False) -> RunResult:
    """Runs the trainer from its current step to the last one and writes the run directory. Stops early on SIGINT or
    SIGTERM, and on an alarm of a monitor in stop_on.

    output_dir/ gets run_config.json, train_log.jsonl (a line per step), samples.jsonl, alarms.jsonl, tensorboard/ (if
    installed), report.html, checkpoint-N/, and at the end the model itself.

    Evaluation and samples: before the first step, every eval_steps and at the end. If eval_steps is 0: only at the end.

    Checkpoints: every save_steps (0: never), if the run is stopped, if an evaluation fails, and if a step fails before
    it has changed the trainer (in PPO: a reward fails; in SFT and the reward model: anything before the optimizer).
    None is saved if a process is gone, because its part of the optimizer's state is gone too. The newest
    save_total_limit are kept. The last step also gets a checkpoint, in case the final evaluation or the saving of the
    model fails. It is deleted once the model is saved. If it cannot be written, a warning says so and the run
    continues. resume=True continues, bit for bit, from the newest undamaged checkpoint.

    load_best_model_at_end (if the config has it): every evaluation that is the best so far by metric_for_best_model
    gets a checkpoint. At the end the best model is loaded from its checkpoint and evaluated once more. A resumed run
    ignores evaluations whose checkpoint is gone or damaged; if the best one is among them, a warning says so.

    Raises ConfigError if output_dir already holds a run or a model and resume is False, or if it holds no checkpoint
    and resume is True. A run that was killed before its first checkpoint is an exception: resume=True starts it again
    from its first step.
    """
    if not isinstance(resume, bool):
        raise ConfigError(
            "train: resume must be True or False; True continues from the newest checkpoint in output_dir; "
            f"got {resume!r}"
        )
    everywhere = Everywhere(trainer)
    if parallel.rank():
        with _signals(everywhere.stop, say=False):
            return everywhere.follow()
    try:
        run = _Run(trainer, resume, everywhere)
        run.take_steps()
        return everywhere(Everywhere.end, run.end())
    except Exception as error:
        everywhere.leave(error)
        raise


class _Run:
    """The run in the first process. The other processes only do what is called through `everywhere`."""

    def __init__(self, trainer, resume: bool, everywhere: Everywhere):
        self.trainer, self.everywhere, self.run_dir = trainer, everywhere, Path(trainer.config.output_dir)
        at_the_end = _open_run(trainer, self.run_dir, resume, everywhere)
        self.start = trainer.step
        # The last step, once it has a checkpoint. end() deletes this checkpoint after it has saved the model.
        self.spare_step = self.start if at_the_end else None
        monitors = getattr(trainer, "monitors", None)
        self.records = Records(self.run_dir, self.start, at_the_end, monitors, trainer.total_steps)
        self.best = _Best(trainer.config, self.records.log.rows(), self.run_dir)
        # The result, if no step is left.
        self.metrics = {name: value for name, value in self.records.log.last.items() if name != "step"}
        self.ending: list[Alarm] = []  # alarms of the last step that end the run

    def take_steps(self) -> None:
        """Takes all steps, or stops after a signal or an alarm."""
        trainer, config, records, best = self.trainer, self.trainer.config, self.records, self.best
        done, stop, name = self.start - len(records.unlogged), self.everywhere.stop, type(trainer).__name__
        with _signals(stop), tqdm(total=trainer.total_steps, initial=done, desc=name, disable=None) as bar:
            if self.start == 0 and config.eval_steps:
                first = self.evaluate(0)
                records.write({"step": 0, **first}, bar.write)
                records.plot(0, first)
                best.improved(0, first)  # for its refusal of a metric that evaluations do not have
                _show(bar, f"{name} 0/{trainer.total_steps}", first, as_line=True)
            clock = time.perf_counter()
            for metrics in itertools.chain(records.unlogged, self.steps()):
                step, last = trainer.step, trainer.step >= trainer.total_steps
                self.metrics = metrics = as_numbers(metrics)
                metrics.setdefault("timing_s/step", time.perf_counter() - clock)
                if last and step > self.start:
                    try:
                        self.checkpoint(metrics)
                        self.spare_step = step
                    except OSError as error:  # the model can still be saved
                        warnings.warn(f"{error}. The run continues to its end without it", stacklevel=3)
                if last or (config.eval_steps and step % config.eval_steps == 0):
                    try:
                        metrics |= self.evaluate(step)
                    except Exception:
                        self.checkpoint_before_raising(metrics)
                        raise
                self.ending = records.write({"step": step, **metrics}, bar.write)
                stop += [f"monitor {alarm.monitor}" for alarm in self.ending]
                told = step % config.logging_steps == 0 or last or bool(_evaluated(metrics))
                if told:
                    records.plot(step, metrics)
                bar.update(1)
                _show(bar, f"{name} {step}/{trainer.total_steps}", metrics, as_line=told)
                stopping = bool(stop)  # read once: a signal between the two uses must not skip the checkpoint
                if best.improved(step, metrics) or (stopping and not last) or self.saves_at(step):
                    if not last:
                        self.checkpoint()
                    prune_checkpoints(self.run_dir, config.save_total_limit, best.step)
                if stopping:
                    break
                clock = time.perf_counter()
        records.close()

    def steps(self) -> Iterator[dict]:
        """The metrics of each step that is left."""
        while True:
            try:
                metrics = self.everywhere(Everywhere.step)
            except Exception:
                if getattr(self.trainer, "whole", False):
                    self.checkpoint_before_raising()
                raise
            if metrics is None:
                return
            yield metrics

    def evaluate(self, step: int) -> dict:
        """Writes samples and evaluates -> eval_* metrics."""
        self.records.sample(step, self.everywhere(Everywhere.samples))
        return as_numbers(self.everywhere(Everywhere.evaluate))

    def saves_at(self, step: int) -> bool:
        every = self.trainer.config.save_steps
        return bool(every) and step % every == 0

    def checkpoint(self, metrics: dict | None = None) -> None:
        self.records.sync()
        with self.everywhere.gathered():
            save_checkpoint(self.trainer, self.run_dir, metrics, partial(self.everywhere, Everywhere.state))

    def checkpoint_before_raising(self, metrics: dict | None = None) -> None:
        """Saves a checkpoint before a failure is raised, if this run has done a step that no checkpoint holds yet."""
        step, path = self.trainer.step, self.run_dir / f"checkpoint-{self.trainer.step}"
        if step == self.start or path.exists():
            return
        try:
            self.checkpoint(metrics)
            prune_checkpoints(self.run_dir, self.trainer.config.save_total_limit, self.best.step)
            tqdm.write(f"Failed after step {step}, which is saved. Continue with resume=True (--resume): {path}")
        except Exception as error:  # for example because a process is gone, and with it its part of the state
            warnings.warn(str(error), stacklevel=3)

    def end(self) -> RunResult:
        """Evaluates and saves the final model and writes the report. If the run was stopped: only the report."""
        trainer, everywhere, run_dir, best = self.trainer, self.everywhere, self.run_dir, self.best
        interrupted = trainer.step < trainer.total_steps
        if not interrupted and best.step is not None:
            if best.step != trainer.step:  # else the trainer has it already, perhaps without a checkpoint
                everywhere(Everywhere.load_model, run_dir / f"checkpoint-{best.step}")
            print(f"The model of step {best.step} is kept: {best.name} {best.value:.4g}")
            self.metrics |= {"best_step": best.step, **as_numbers(everywhere(Everywhere.evaluate))}
        if not interrupted and hasattr(trainer, "finish"):
            everywhere(Everywhere.finish, run_dir)
        write_report(run_dir)
        if interrupted:
            print(
                f"Stopped by {everywhere.stop[0]} after step {trainer.step} of {trainer.total_steps}; nothing is lost. "
                f"Continue with resume=True (--resume): {run_dir / f'checkpoint-{trainer.step}'}"
            )
        else:
            with everywhere.gathered():
                save_quietly(trainer.save_model, run_dir)
            (run_dir / "README.md").write_text(model_card(trainer, self.metrics), encoding="utf-8")
            spare = self.spare_step
            if spare == trainer.step and not self.saves_at(spare) and spare != best.step:
                remove_checkpoint(run_dir / f"checkpoint-{spare}")
            prune_checkpoints(run_dir, trainer.config.save_total_limit, best.step)  # if the last step's was interrupted
        stopped_by = None
        if interrupted and self.ending:
            stopped_by = f"{self.ending[0].monitor}: {self.ending[0].message}"
        return RunResult(trainer.step, self.metrics, interrupted, str(run_dir), stopped_by)


class _Best:
    """The step whose evaluation was the best so far. A resumed run finds it in the log, among the evaluations whose
    checkpoint is undamaged."""

    def __init__(self, config, log: Iterable[dict], run_dir: Path):
        self.name = config.metric_for_best_model if getattr(config, "load_best_model_at_end", False) else None
        self.step, self.value = None, math.inf
        if self.name is None:
            return
        greater = config.greater_is_better
        if greater is None:
            greater = not self.name.endswith(("loss", "perplexity", "ece"))
        self.sign = -1 if greater else 1
        values = [(row["step"], value) for row in log if (value := self._value(row["step"], row)) is not None]
        ranked = sorted(values, key=lambda pair: self.sign * pair[1])
        # The best first, because damage() reads a whole checkpoint. Some are missing if the run began without
        # load_best_model_at_end, or with another metric.
        whole = next((pair for pair in ranked if not damage(run_dir / f"checkpoint-{pair[0]}")), None)
        if ranked and ranked[0] != whole:
            lost, left = (f"step {p[0]} ({self.name} {p[1]:.4g})" if p else "none" for p in (ranked[0], whole))
            warnings.warn(
                f"the checkpoint of the best evaluation, {lost}, is gone or damaged; the best one still there: {left}",
                stacklevel=5,
            )
        if whole:
            self.step, self.value = whole

    def improved(self, step: int, metrics: dict) -> bool:
        """Whether the metrics of a step contain an evaluation that is the best so far; it is remembered then."""
        value = self._value(step, metrics)
        if value is None or (self.step is not None and self.sign * value >= self.sign * self.value):
            return False
        self.step, self.value = step, value
        return True

    def _value(self, step: int, metrics: dict) -> float | None:
        """The metric's value; None if the metrics have no evaluation, if the value is not finite, and at step 0, where
        the model is not trained yet."""
        evaluated = _evaluated(metrics)
        if self.name is None or not evaluated:
            return None
        if self.name not in metrics:
            raise ConfigError(f"metric_for_best_model = {self.name!r} is not among {', '.join(evaluated)}")
        return metrics[self.name] if step else None


def _evaluated(metrics: dict) -> list[str]:
    """The names of the metrics that an evaluation has added."""
    return [name for name in metrics if name.startswith("eval_")]


_IN_BAR = ("loss", "eval_loss", "accuracy", "eval_accuracy", "objective/kl", "objective/scores", "learning_rate")


def _show(bar: tqdm, place: str, metrics: dict, as_line: bool) -> None:
    """Writes the metrics beside the bar. as_line: prints a line if there is no bar, as in a batch job, whose output
    would not tell a run from one that hangs."""
    shown = {k: f"{v:.4g}" for k, v in metrics.items() if k in _IN_BAR and v is not None}
    bar.set_postfix(shown, refresh=False)
    if as_line and bar.disable:
        print(", ".join([place, *(f"{k}={v}" for k, v in shown.items())]), file=sys.stderr, flush=True)


def _open_run(trainer, run_dir: Path, resume: bool, everywhere: Everywhere) -> dict | None:
    """Prepares the directory and, on resume, the trainer -> the metrics of the trainer's step, if its checkpoint was
    saved before they were logged."""
    make_directory(trainer.config.output_dir)
    paths = itertools.chain(run_dir.iterdir(), run_dir.glob("value_model/*"))
    if links := [path for path in paths if path.is_symlink() and _WRITTEN_OVER.fullmatch(path.name)]:
        raise ConfigError(
            f"{links[0]} is a link, through which the run would write over {links[0].resolve()}: replace it by a copy"
        )
    for stale in run_dir.glob(".tmp-checkpoint-*"):
        delete(stale)
    settings = {"trainer": type(trainer).__name__, **dataclasses.asdict(trainer.config)}
    settings["num_processes"] = parallel.size()
    newest = newest_whole_checkpoint(run_dir) if resume else None
    if newest is not None:
        return _continue(trainer, newest, settings, everywhere)
    if resume:
        trained = trainer.step > 0 or not getattr(trainer, "whole", True)  # by an earlier train() that failed
        if trained or not begins_again(run_dir):
            if has_ended(run_dir):
                advice = "choose another output_dir, or delete it"
            elif trained:
                advice = "create a new trainer"
            else:
                advice = "run without resume"
            raise ConfigError(
                f"nothing to resume: output_dir {str(run_dir)!r} holds no checkpoint (saved every save_steps and "
                f"on Ctrl-C; a run that ended needs none): {advice}"
            )
        print(f"{run_dir} holds no checkpoint yet: the run starts again from its first step")
        for name in ("train_log.jsonl", "samples.jsonl", "alarms.jsonl"):
            (run_dir / name).unlink(missing_ok=True)
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    _begin(trainer, run_dir, settings)
    return None


def _begin(trainer, run_dir: Path, settings: dict) -> None:
    """Writes the first files of a new run. ConfigError if the run would overwrite what the directory holds,
    or if no step is left."""
    networks = (getattr(trainer, name, None) for name in ("model", "policy"))
    check_is_new(run_dir, filter(None, (getattr(network, "name_or_path", None) for network in networks)))
    if trainer.step >= trainer.total_steps:  # train() again, in a directory that was deleted in between
        raise ConfigError(f"this trainer has taken all its {trainer.total_steps} steps: create a new trainer")
    reports = getattr(trainer, "reports", ())
    for report in reports:
        if report.overlong or report.truncated:
            print(report)
    (run_dir / "data.json").write_text(json.dumps([dataclasses.asdict(report) for report in reports]))
    write_atomic(run_dir / RUN_CONFIG, json.dumps(settings, indent=2, default=str) + "\n")


def _continue(trainer, checkpoint: Path, settings: dict, everywhere: Everywhere) -> dict | None:
    """Loads the checkpoint in all processes, and warns about settings that have changed since. Returns what _open_run
    returns."""
    run_dir = checkpoint.parent
    changed = changed_settings(run_dir, settings)
    if changed:
        message = f"resuming with a config that differs in {', '.join(changed)}"
        sizes_of_a_step = (
            "per_device_train_batch_size", "gradient_accumulation_steps", "batch_size", "num_generations",
            "num_processes",
        )  # fmt: skip
        if set(changed).intersection(sizes_of_a_step):
            message += "; a checkpoint's place in the data is a number of steps: if a step has another size now, some "
            message += "data is read twice or not at all"
        warnings.warn(message, stacklevel=5)
    unlogged = everywhere(Everywhere.load, checkpoint)
    if trainer.step > trainer.total_steps:
        raise ConfigError(
            f"nothing to resume: {checkpoint.name} is past the {trainer.total_steps} steps of the config as it is now "
            f"({', '.join(changed)}): resume with the run's own settings, or start a new run in another output_dir"
        )
    if changed or not (run_dir / RUN_CONFIG).exists():
        write_atomic(run_dir / RUN_CONFIG, json.dumps(settings, indent=2, default=str) + "\n")
    return unlogged


@contextmanager
def _signals(received: list[str], say: bool = True):
    """Inside, the name of a received SIGINT or SIGTERM is added to the list, and a second signal has its usual effect.
    After Ctrl-C each of several processes gets SIGINT, and then SIGTERM from torchrun, so there only a second signal of
    the same kind has its usual effect."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may install handlers
        yield
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handler(number, frame):
        received.append(signal.Signals(number).name)
        for s, old in previous.items():
            if parallel.size() == 1 or s == number:
                signal.signal(s, old)
        if say:
            print(f"\n{received[0]}: finishing this step, then saving (again to stop at once)", flush=True)

    for s in previous:
        signal.signal(s, handler)
    try:
        yield
    finally:
        for s, old in previous.items():
            signal.signal(s, old)

"""The run around a trainer's steps: log, samples, evaluation, alarms, checkpoints, signals, and the model at the end.

A trainer is any object with

    config                  flat dataclass with output_dir, seed, logging_steps, eval_steps, save_steps,
                            save_total_limit
    total_steps: int        optimizer steps (PPO: iterations) of the whole run
    step: int               how many of them are done
    __iter__()              goes on from `step`, yields a dict of metrics per step; state is updated before the yield
    evaluate() -> dict      eval_* metrics; {} where there is nothing to evaluate
    samples() -> list[dict] a few texts for samples.jsonl
    state_dict(), load_state_dict(state)   models, optimizer, scheduler, counters (the RNG is kept here); of several
                            processes all call it at once
    save_model(path)        transformers checkpoint and tokenizer
    save_in_checkpoint(path)  (optional) called for checkpoints instead of save_model, where that writes too much
    gathered()              (optional) a context in which the first process alone can save the model (sharding.py)
    finish(run_dir)         (optional) called once after the last step, before the report and the model are written
    guard                   (optional) a NonFiniteGuard, whose counts the checkpoint keeps
    reports                 (optional) the Report of each dataset, for data.json
    monitors                (optional) a Monitors, which reads every log line and may end the run
    whole                   (optional) False while a step changes the trainer; if one fails before, a checkpoint is
                            saved, and no earlier step is lost

and `train(resume=False)` that returns `run_training(self, resume=resume)`. No base class.

Of several processes (parallel.py) the first runs all of this. The others follow: they take the same steps and the same
looks at its word (everywhere.py), and write nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from .. import parallel
from ..disk import make_directory, write_atomic
from ..errors import ConfigError
from ..models import save_quietly
from ..monitors import Alarm
from ..report import write_report
from .checkpoints import damage, newest_whole_checkpoint, prune_checkpoints, save_checkpoint
from .everywhere import Everywhere
from .records import Records, as_numbers
from .run_dir import RUN_CONFIG, begins_again, changed_settings, check_is_new, has_ended, model_card


@dataclasses.dataclass
class RunResult:
    """How run_training ended: the last step's metrics (with the final eval_*), and whether it stopped early.

    stopped_by: the monitor that ended the run early, with its message; None also where a signal did.
    """

    step: int
    metrics: dict
    interrupted: bool
    output_dir: str
    stopped_by: str | None


def run_training(trainer, resume: bool = False) -> RunResult:
    """Runs the trainer from its step to its end and keeps the run directory; returns early on SIGINT or SIGTERM, and on
    an alarm of a monitor that is to end the run.

    output_dir/ gets run_config.json, train_log.jsonl (a line per step), samples.jsonl, alarms.jsonl, tensorboard/ (if
    installed), report.html, checkpoint-N/, and at the end the model itself.

    Evaluation and samples: every eval_steps (then also before the first step) and at the end; eval_steps 0: only at the
    end.

    Checkpoints: every save_steps (0: never), when stopped, when an evaluation fails, and when a step fails that has not
    changed the trainer yet (in PPO a reward; in SFT and the reward model everything before the optimizer), unless a
    process is gone, and with it its part of the optimizer's state. The newest save_total_limit are kept. One more is
    kept from the last step until the model is saved, in case the final evaluation or the saving fails. If that
    checkpoint itself cannot be written, a warning says so and the run continues. resume=True continues, bit for bit,
    from the newest undamaged checkpoint.

    load_best_model_at_end (if the config has it): every evaluation that is the best so far by metric_for_best_model
    gets a checkpoint, and in the end the best model is taken from there and evaluated once more. On resume only
    evaluations count whose checkpoint is still there and undamaged; if the best one's is not, a warning says so.

    Raises ConfigError where output_dir already holds a run or a model and resume is False, or holds no checkpoint and
    it is True. A run that was killed before its first checkpoint starts again from its first step where resume is True.
    """
    if not isinstance(resume, bool):
        raise ConfigError(f"train(resume=True) goes on from the newest checkpoint in output_dir; got {resume!r}")
    everywhere = Everywhere(trainer)
    if parallel.rank():
        with _signals(everywhere.stop, say=False):
            return everywhere.follow()
    try:
        lead = _Lead(trainer, resume, everywhere)
        lead.take_steps()
        return everywhere(Everywhere.end, lead.end())
    except Exception as error:
        everywhere.leave(error)
        raise


class _Lead:
    """The run as its first process leads it. Only what goes through `everywhere` is done by the others too."""

    def __init__(self, trainer, resume: bool, everywhere: Everywhere):
        self.trainer, self.everywhere, self.run_dir = trainer, everywhere, Path(trainer.config.output_dir)
        self.start, at_the_end = _open_run(trainer, self.run_dir, resume, everywhere)
        self.spare = self.start if at_the_end else None  # the step of a checkpoint that goes when the model is saved
        monitors = getattr(trainer, "monitors", None)
        self.records = Records(self.run_dir, self.start, at_the_end, monitors, trainer.total_steps)
        log = self.records.log.kept
        self.best = _Best(trainer.config, log, self.run_dir)
        self.metrics = dict(log[-1]) if log else {}  # the result of a run that has no step left to do
        self.metrics.pop("step", None)
        self.ending: list[Alarm] = []  # alarms of the last step that end the run

    def take_steps(self) -> None:
        """To the last step, or until something stops the run."""
        trainer, config, records, best = self.trainer, self.trainer.config, self.records, self.best
        done, stop = self.start - len(records.unlogged), self.everywhere.stop
        with (
            _signals(stop),
            tqdm(total=trainer.total_steps, initial=done, desc=type(trainer).__name__, disable=None) as bar,
        ):
            if self.start == 0 and config.eval_steps:
                records.write({"step": 0, **(first := self.look(0))}, bar.write)
                records.plot(0, first)
                best.improved(0, first)
            clock = time.perf_counter()
            steps = self.steps() if trainer.step < trainer.total_steps else ()
            for metrics in itertools.chain(records.unlogged, steps):
                step, last = trainer.step, trainer.step >= trainer.total_steps
                self.metrics = metrics = as_numbers(metrics)
                metrics.setdefault("timing_s/step", time.perf_counter() - clock)
                if last and step > self.start:
                    try:
                        self.checkpoint(metrics)
                        self.spare = step
                    except OSError as error:  # what counts now is the model
                        warnings.warn(f"{error}. The run goes on to its end without it", stacklevel=3)
                if last or (config.eval_steps and step % config.eval_steps == 0):
                    try:
                        metrics |= self.look(step)
                    except Exception:
                        self.keep(metrics)
                        raise
                self.ending = records.write({"step": step, **metrics}, bar.write)
                stop += [f"monitor {alarm.monitor}" for alarm in self.ending]
                if step % config.logging_steps == 0 or last or any(name.startswith("eval_") for name in metrics):
                    records.plot(step, metrics)
                bar.update(1)
                shown = {k: f"{v:.4g}" for k, v in metrics.items() if k in _SHOWN and v is not None}
                bar.set_postfix(shown, refresh=False)
                stopping = bool(stop)  # read once: a signal between the two uses must not skip the checkpoint
                if best.improved(step, metrics) or stopping or self.due(step):
                    if not last:
                        self.checkpoint()
                    prune_checkpoints(self.run_dir, config.save_total_limit, best.step)
                if stopping:
                    break
                clock = time.perf_counter()
        records.close()

    def steps(self) -> Iterator[dict]:
        while True:
            try:
                metrics = self.everywhere(Everywhere.step)
            except Exception:
                if getattr(self.trainer, "whole", False):
                    self.keep()
                raise
            if metrics is None:
                return
            yield metrics

    def look(self, step: int) -> dict:
        self.records.sample(step, self.everywhere(Everywhere.samples))
        return as_numbers(self.everywhere(Everywhere.evaluate))

    def due(self, step: int) -> bool:
        every = self.trainer.config.save_steps
        return bool(every) and step % every == 0

    def checkpoint(self, metrics: dict | None = None) -> None:
        self.records.sync()
        with self.everywhere.gathered():
            save_checkpoint(self.trainer, self.run_dir, metrics, partial(self.everywhere, Everywhere.state))

    def keep(self, metrics: dict | None = None) -> None:
        """Saves a checkpoint before a failure is raised, if this run has done a step that none holds yet."""
        step, path = self.trainer.step, self.run_dir / f"checkpoint-{self.trainer.step}"
        if step == self.start or path.exists():
            return
        try:
            self.checkpoint(metrics)
            tqdm.write(f"Failed after step {step}, which is kept. Continue with resume=True (--resume): {path}")
        except Exception as error:  # also where a process is gone, and with it its share of the state or the layers
            warnings.warn(str(error), stacklevel=3)

    def end(self) -> RunResult:
        """What comes after the last step; of a run that was stopped only the report."""
        trainer, everywhere, run_dir, best = self.trainer, self.everywhere, self.run_dir, self.best
        interrupted = trainer.step < trainer.total_steps
        if not interrupted and best.step is not None:
            if best.step != trainer.step:  # that one may have no checkpoint, and is the model as it is
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
            if self.spare == trainer.step and not self.due(self.spare) and self.spare != best.step:
                shutil.rmtree(run_dir / f"checkpoint-{self.spare}")
        alarm = self.ending[0] if interrupted and self.ending else None
        stopped_by = alarm and f"{alarm.monitor}: {alarm.message}"
        return RunResult(trainer.step, self.metrics, interrupted, str(run_dir), stopped_by)


_SHOWN = ("loss", "eval_loss", "accuracy", "eval_accuracy", "objective/kl", "objective/scores", "learning_rate")


class _Best:
    """The step whose evaluation was the best so far; on resume, of those in the log whose checkpoint is whole."""

    def __init__(self, config, log: list[dict], run_dir: Path):
        self.name = config.metric_for_best_model if getattr(config, "load_best_model_at_end", False) else None
        self.step, self.value = None, math.inf
        if self.name is None:
            return
        greater = config.greater_is_better
        self.sign = -1 if (not self.name.endswith(("loss", "perplexity", "ece")) if greater is None else greater) else 1
        values = [(row["step"], value) for row in log if (value := self._value(row["step"], row)) is not None]
        ranked = sorted(values, key=lambda pair: self.sign * pair[1])
        # The best first, because damage() reads a whole checkpoint. Some are gone if the run began without
        # load_best_model_at_end, or with another metric.
        whole = next((pair for pair in ranked if not damage(run_dir / f"checkpoint-{pair[0]}")), None)
        if ranked and ranked[0] != whole:
            lost, left = (f"step {p[0]} ({self.name} {p[1]:.4g})" if p else "none" for p in (ranked[0], whole))
            warnings.warn(
                f"the checkpoint of the best evaluation, {lost}, is gone or damaged; the best that is there: {left}",
                stacklevel=5,
            )
        if whole:
            self.step, self.value = whole

    def improved(self, step: int, metrics: dict) -> bool:
        """Whether the metrics of a step are an evaluation, and the best so far."""
        value = self._value(step, metrics)
        if value is None or (self.step is not None and self.sign * value >= self.sign * self.value):
            return False
        self.step, self.value = step, value
        return True

    def _value(self, step: int, metrics: dict) -> float | None:
        """The metric of an evaluation. None where there is no evaluation, where it is not finite, and at step 0, for
        that is the model as it was given."""
        evaluated = [name for name in metrics if name.startswith("eval_")]
        if self.name is None or not evaluated:
            return None
        if self.name not in metrics:
            raise ConfigError(f"metric_for_best_model = {self.name!r} is not among {', '.join(evaluated)}")
        return metrics[self.name] if step else None


def _open_run(trainer, run_dir: Path, resume: bool, everywhere: Everywhere) -> tuple[int, dict | None]:
    """Prepares the directory and, on resume, the trainer -> the step from which the run continues, and the metrics of
    that step if its checkpoint was saved before they were logged."""
    make_directory(trainer.config.output_dir)
    for stale in run_dir.glob(".tmp-checkpoint-*"):
        shutil.rmtree(stale)
    written = {"trainer": type(trainer).__name__, **dataclasses.asdict(trainer.config)}
    written["num_processes"] = parallel.size()
    newest = newest_whole_checkpoint(run_dir) if resume else None
    if newest is not None:
        return _continue(trainer, newest, written, everywhere)
    if resume:
        trained = trainer.step > 0 or not getattr(trainer, "whole", True)  # by an earlier train() that failed
        if trained or not begins_again(run_dir):
            way_on = "make the trainer anew" if trained else "run without resume"
            way_on = "choose another output_dir, or delete it" if has_ended(run_dir) else way_on
            raise ConfigError(
                f"nothing to resume: output_dir {str(run_dir)!r} holds no checkpoint (saved every save_steps and "
                f"on Ctrl-C; a run that ended needs none): {way_on}"
            )
        print(f"{run_dir} holds no checkpoint yet: the run starts again from its first step")
        for name in ("train_log.jsonl", "samples.jsonl", "alarms.jsonl"):
            (run_dir / name).unlink(missing_ok=True)
        shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)
    _begin(trainer, run_dir, written)
    return trainer.step, None


def _begin(trainer, run_dir: Path, written: dict) -> None:
    networks = (getattr(trainer, name, None) for name in ("model", "policy"))
    check_is_new(run_dir, filter(None, (getattr(network, "name_or_path", None) for network in networks)))
    reports = getattr(trainer, "reports", ())
    for report in reports:
        if report.overlong or report.truncated:
            print(report)
    (run_dir / "data.json").write_text(json.dumps([dataclasses.asdict(report) for report in reports]))
    write_atomic(run_dir / RUN_CONFIG, json.dumps(written, indent=2, default=str) + "\n")


def _continue(trainer, checkpoint: Path, written: dict, everywhere: Everywhere) -> tuple[int, dict | None]:
    """Loads the checkpoint in all processes, and warns about settings that have changed since. Returns as _open_run."""
    run_dir = checkpoint.parent
    changed = changed_settings(run_dir, written)
    if changed:
        sizes = {"per_device_train_batch_size", "gradient_accumulation_steps", "batch_size", "num_generations"}
        moved = (sizes | {"num_processes"}) & set(changed)
        place = "; a checkpoint's place in the data is a number of steps: if they have another size now, some is read "
        place += "twice or not at all"
        differs = f"resuming with a config that differs in {', '.join(changed)}"
        warnings.warn(differs + (place if moved else ""), stacklevel=5)
    unlogged = everywhere(Everywhere.load, checkpoint)
    if trainer.step > trainer.total_steps:
        raise ConfigError(
            f"nothing to resume: {checkpoint.name} is past the {trainer.total_steps} steps of the config as it is now "
            f"({', '.join(changed)}): resume with the run's own settings, or start anew in another output_dir"
        )
    if changed or not (run_dir / RUN_CONFIG).exists():
        write_atomic(run_dir / RUN_CONFIG, json.dumps(written, indent=2, default=str) + "\n")
    return trainer.step, unlogged


@contextmanager
def _signals(received: list[str], say: bool = True):
    """The name of a SIGINT or SIGTERM enters the list; a second signal acts as it did before. Of several processes
    each gets Ctrl-C's SIGINT and then torchrun's SIGTERM: there only a second one of its kind does."""
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

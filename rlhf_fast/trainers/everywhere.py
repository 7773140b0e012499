"""A run in several processes (parallel.py): the first process leads, and the others follow its calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from .. import models, parallel
from ..errors import ConfigError
from .checkpoints import load_checkpoint
from .common import preserved_rng, rng_state, set_rng_state


class Everywhere:
    """The parts of a run that every process takes part in.

    In the first process everywhere(Everywhere.step) runs that method in every process: the call is broadcast, and
    follow() makes it in the others. If it fails in one process, it raises in all. If a process has received a signal,
    all know it afterwards.
    """

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, None
        self.stop: list[str] = []  # the signals that this or another process has received

    def __call__(self, part: Callable, *arguments):
        parallel.broadcast((part, arguments))
        with parallel.raise_in_all(self.stop):
            return part(self, *arguments)

    def follow(self):
        """The loop of every process except the first, until the run ends -> the RunResult of the first process.

        A failure is handled by the first process, before it calls leave(). If the first process is gone, the broadcast
        raises.
        """
        failure = None
        while True:
            part, arguments = parallel.broadcast(None)
            if part is Everywhere.leave:
                raise failure or arguments[0]
            try:
                with parallel.raise_in_all(self.stop):
                    result = part(self, *arguments)
            except Exception as error:
                failure = error
            else:
                if part is Everywhere.end:
                    return result

    def leave(self, error: Exception) -> None:
        """Called by the first process before it raises the error: the other processes that are still alive raise it
        too."""
        if not isinstance(error, ConfigError):  # other errors may not survive pickling
            error = RuntimeError(f"the first process failed: {type(error).__name__}: {error}")
        with suppress(Exception):
            parallel.broadcast((Everywhere.leave, (error,)))

    def step(self) -> dict | None:
        """The metrics of the next step; None after the last. If a step fails before it has changed the trainer, the
        random state and the guard's counts are restored, because the step will be repeated."""
        self.steps = self.steps or iter(self.trainer)
        guard = getattr(self.trainer, "guard", None)
        rng, counts = rng_state(), dict(vars(guard)) if guard else {}
        try:
            return next(self.steps, None)
        except BaseException:  # also a second Ctrl-C
            if getattr(self.trainer, "whole", False):
                set_rng_state(rng)
                if guard:
                    vars(guard).update(counts)
            raise

    def samples(self) -> list[dict]:
        with preserved_rng():
            return self.trainer.samples()

    def evaluate(self) -> dict:
        with preserved_rng():
            return self.trainer.evaluate()

    def finish(self, run_dir: Path) -> None:
        with preserved_rng():
            self.trainer.finish(run_dir)

    def state(self) -> dict:
        """The state for a checkpoint: that of the trainer (complete only in the first process) and the random state of
        every process."""
        # In this order, so that after a failure in state_dict() no process waits for the random states.
        return {"rng": parallel.all_gather(rng_state()), "trainer": self.trainer.state_dict()}

    def load(self, checkpoint: Path) -> dict | None:
        return load_checkpoint(self.trainer, checkpoint)

    def load_model(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        models.load_trained_state(self.trainer.model, state["trainer"]["model"])

    @contextmanager
    def gathered(self):
        """Inside, the first process can save the model even if its layers are sharded."""
        self(Everywhere.gather)
        try:
            yield
        finally:
            self(Everywhere.scatter)

    def gather(self) -> None:
        self.gathering = getattr(self.trainer, "gathered", nullcontext)()
        self.gathering.__enter__()

    def scatter(self) -> None:
        self.gathering.__exit__(None, None, None)

    def end(self, result):
        return result

"""A run in several processes (parallel.py): the first process leads, and the others follow it."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from .. import models, parallel
from ..errors import ConfigError
from .checkpoints import load_checkpoint
from .common import preserved_rng, rng_state, set_rng_state


class Everywhere:
    """The parts of a run that every process takes part in: the first calls one by name, and the others do the same.
    One that fails in any of them fails in all, and after it a signal to one has become known to all."""

    def __init__(self, trainer):
        self.trainer, self.going = trainer, None
        self.stop: list[str] = []  # the signals that this process has got, or another

    def __call__(self, part: str, *arguments):
        parallel.broadcast((part, arguments))
        with parallel.raise_in_all(self.stop):
            return getattr(self, part)(*arguments)

    def follow(self):
        """What the processes after the first do until the run ends -> the RunResult of the first one.

        What fails is the first one's to deal with, before it leaves; where it is gone, waiting for its word raises.
        """
        failure = None
        while True:
            part, arguments = parallel.broadcast(None)
            if part == "leave":
                raise failure or arguments[0]
            try:
                with parallel.raise_in_all(self.stop):
                    result = getattr(self, part)(*arguments)
            except Exception as error:
                failure = error
            else:
                if part == "end":
                    return result

    def leave(self, error: Exception) -> None:
        """The first process will raise the error, and so are the others to; those that are left of them."""
        if not isinstance(error, ConfigError):  # another may not bear to be sent
            error = RuntimeError(f"the first process failed: {type(error).__name__}: {error}")
        with suppress(Exception):
            parallel.broadcast(("leave", (error,)))

    def step(self) -> dict | None:
        """The metrics of the next step, None after the last. One that fails has drawn, and will draw again."""
        self.going = self.going or iter(self.trainer)
        rng = rng_state()
        try:
            return next(self.going, None)
        except Exception:
            if getattr(self.trainer, "whole", False):
                set_rng_state(rng)
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
        """What a checkpoint holds of the trainer, and of the generators of every process; whole in the first one."""
        return {"trainer": self.trainer.state_dict(), "rng": parallel.all_gather(rng_state())}

    def load(self, checkpoint: Path) -> dict | None:
        return load_checkpoint(self.trainer, checkpoint)

    def load_model(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        models.load_trained_state(self.trainer.model, state["trainer"]["model"])

    @contextmanager
    def gathered(self):
        """Inside, the first process can save the model, of which the layers may be sharded."""
        self("gather")
        try:
            yield
        finally:
            self("scatter")

    def gather(self) -> None:
        self.gathering = getattr(self.trainer, "gathered", nullcontext)()
        self.gathering.__enter__()

    def scatter(self) -> None:
        self.gathering.__exit__(None, None, None)

    def end(self, result):
        return result

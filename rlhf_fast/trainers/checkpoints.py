"""Checkpoints of a run: checkpoint-N/ appears complete or not at all, and hashes show later damage to its files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from .. import parallel
from ..disk import delete
from ..errors import ConfigError
from ..models import save_quietly
from ..terminal import visible
from .common import preserved_rng, set_rng_state

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(trainer, run_dir: Path, metrics: dict | None, state: Callable[[], dict]) -> Path:
    """Writes checkpoint-N/ (state.pt and the model's files), either completely or not at all.

    metrics: those of step N, if they are not in the log yet. state: returns Everywhere.state() of the run.

    The files are written to a temporary directory, hashed into manifest.json, forced to the disk, and then renamed.
    Raises OSError if that fails (a full disk, no memory to gather the state); earlier checkpoints are untouched then.
    """
    run_dir = Path(run_dir)
    target = run_dir / f"checkpoint-{trainer.step}"
    temporary, replaced = (target.with_name(f".tmp-{target.name}{suffix}") for suffix in ("", "-replaced"))
    temporary.mkdir(parents=True)
    try:
        with preserved_rng():  # a trainer may build a model in order to save it, and that draws random weights
            save_quietly(getattr(trainer, "save_in_checkpoint", trainer.save_model), temporary)
        whole = state() | {"step": trainer.step, "metrics": metrics}
        if guard := getattr(trainer, "guard", None):
            whole["guard"] = {name: getattr(guard, name) for name in ("taken", "skipped", "in_a_row")}
        torch.save(whole, temporary / "state.pt")
        (temporary / MANIFEST).write_text(json.dumps(_hashes(temporary), indent=1))
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
    except Exception as error:  # a full disk is an OSError, a RuntimeError (torch.save) or a SafetensorError
        shutil.rmtree(temporary, ignore_errors=True)
        before = latest_checkpoint(run_dir)
        kept = f"{before} is untouched: resume from it" if before else "there is no earlier one"
        raise OSError(f"{target} could not be saved ({error}); {kept}") from error
    if target.exists():
        os.rename(target, replaced)
    os.rename(temporary, target)
    _fsync(target.parent)
    with suppress(OSError):
        delete(replaced)
    return target


def prune_checkpoints(run_dir: Path, keep: int, best: int | None) -> None:
    """Deletes all checkpoints except the newest `keep` and that of step `best`."""
    for old in _checkpoints(run_dir)[:-keep]:
        if old.name != f"checkpoint-{best}":
            remove_checkpoint(old)


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so that no part of it keeps its name if this is interrupted; run.py
    deletes what is left when the run is resumed."""
    aside = path.with_name(f".tmp-{path.name}-deleted")
    os.rename(path, aside)
    delete(aside)


def _hashes(folder: Path) -> dict[str, str]:
    """{file below the folder: SHA-256 of its content}, without the manifest."""
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        hashes[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return hashes


def damage(checkpoint: Path) -> str | None:
    """The reason why a checkpoint is damaged (files are torn, changed or missing); None if it is not."""
    try:
        expected = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        expected = None
    if not isinstance(expected, dict):
        return f"{MANIFEST} is missing or torn"
    found = _hashes(checkpoint)
    wrong = [name for name, digest in expected.items() if found.get(name) != digest]
    return f"{visible(', '.join(wrong))} not as written" if wrong else None


def load_checkpoint(trainer, path: Path) -> dict | None:
    """Restores the trainer and the random generators -> the metrics that were given to save_checkpoint."""
    state = torch.load(Path(path) / "state.pt", map_location="cpu", weights_only=True)
    trainer.load_state_dict(state["trainer"])
    for name, value in state.get("guard", {}).items():
        setattr(trainer.guard, name, value)
    if trainer.step != state["step"]:
        raise RuntimeError(f"{type(trainer).__name__}.load_state_dict left step at {trainer.step}, not {state['step']}")
    if parallel.rank() < len(state["rng"]):  # else the run continues with more processes than it had
        set_rng_state(state["rng"][parallel.rank()])
    return state["metrics"]


def latest_checkpoint(run_dir) -> Path | None:
    found = _checkpoints(run_dir)
    return found[-1] if found else None


def newest_whole_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint to resume from; None if there is none. ConfigError if all are damaged.

    Newer ones that are damaged are named in a warning and renamed to damaged-checkpoint-N.
    """
    reasons = {}
    for checkpoint in reversed(_checkpoints(run_dir)):
        if why := damage(checkpoint):
            reasons[checkpoint] = why
            continue
        for bad, why in reasons.items():
            warnings.warn(f"{bad} is damaged ({why}): resuming from {checkpoint.name}", stacklevel=5)
            aside = bad.with_name(f"damaged-{bad.name}")
            with suppress(FileNotFoundError):
                delete(aside)
            os.rename(bad, aside)
        return checkpoint
    if reasons:
        listed = "; ".join(f"{bad.name}: {why}" for bad, why in reasons.items())
        raise ConfigError(
            f"no checkpoint in {str(run_dir)!r} is whole ({listed}): start a new run in another output_dir"
        )
    return None


def _checkpoints(run_dir) -> list[Path]:
    """The checkpoints of a run, oldest first. A user's copy under another name (checkpoint-best) does not count."""
    found = [p for p in Path(run_dir).glob("checkpoint-*") if _NAME.fullmatch(p.name) and (p / "state.pt").exists()]
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

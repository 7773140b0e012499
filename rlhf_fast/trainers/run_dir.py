"""A run's directory: whether it is free, what settings its run had, whether that has ended, and the model's card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import ConfigError
from .checkpoints import latest_checkpoint

RUN_CONFIG = "run_config.json"


def changed_settings(run_dir, settings: dict) -> list[str]:
    """The names of settings that the run in this directory had at another value, or not at all. [] if it has no file of
    them."""
    path = Path(run_dir, RUN_CONFIG)
    if not path.exists():
        return []
    try:
        before = {"num_processes": 1} | json.loads(path.read_text())
    except (ValueError, TypeError):
        raise ConfigError(f"{path} is damaged: delete it to resume, with no look at what the settings were") from None
    now = json.loads(json.dumps(settings, default=str))  # tuples become lists, as in the file
    return [name for name, value in now.items() if before.get(name) != value and name != "output_dir"]


def check_is_new(run_dir, reads: Iterable[str | Path] = ()) -> None:
    """Raises ConfigError where the run's model would be written over something: output_dir holds a run or somebody's
    model, or is one of the models that the run `reads`."""
    read = (Path(model) for model in reads if Path(model).exists())  # the others are names on the hub
    if any(path.resolve() == Path(run_dir).resolve() for path in read):
        raise ConfigError(
            f"output_dir {str(run_dir)!r} is a model that the run reads, and would be written over: choose another"
        )
    log, newest = Path(run_dir) / "train_log.jsonl", latest_checkpoint(run_dir)
    if newest is not None or (log.exists() and log.stat().st_size):
        way_on = "continue it with resume=True (--resume), " if newest or begins_again(run_dir) else ""
        raise ConfigError(
            f"output_dir {str(run_dir)!r} already holds a run: {way_on}choose another output_dir, or delete it"
        )
    if (Path(run_dir) / RUN_CONFIG).exists() and not has_ended(run_dir):  # a run of ours that was killed at its start
        return
    if found := _model_in(run_dir):
        raise ConfigError(
            f"output_dir {str(run_dir)!r} holds a {found.name}, which the run would write over: choose another "
            "output_dir"
        )


def _model_in(run_dir) -> Path | None:
    """A file that belongs to a saved model."""
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "config.json", "adapter_config.json")
    return next((path for pattern in patterns for path in Path(run_dir).glob(pattern)), None)


def begins_again(run_dir) -> bool:
    """Whether a run was started here and ended before its first checkpoint, so that resuming it starts it anew.

    Its model is saved while there is a checkpoint of the last step. So a directory with a model and no checkpoint holds
    a run that has ended, whatever somebody has made of its model card since.
    """
    started = (Path(run_dir) / RUN_CONFIG).exists()
    return started and latest_checkpoint(run_dir) is None and _model_in(run_dir) is None and not has_ended(run_dir)


def can_resume(run_dir) -> bool:
    """Whether train(resume=True) would continue a run here, or start it anew."""
    return latest_checkpoint(run_dir) is not None or begins_again(run_dir)


def model_card(trainer, metrics: dict) -> str:
    """Markdown with the metadata that the Hugging Face hub reads, the last metrics and every setting."""
    name = type(trainer).__name__
    settings = {k: v for k, v in dataclasses.asdict(trainer.config).items() if k != "output_dir"}
    tables = [
        f"| {title} | |\n|---|---|\n" + "\n".join(f"| `{k}` | {_short(v)} |" for k, v in rows.items())
        for title, rows in (("metric at the end", metrics), ("setting", settings))
        if rows
    ]
    head = f"{_CARD}, {name.removesuffix('Trainer').lower()}]\n---\n"
    title = f"# {Path(trainer.config.output_dir).name}\n\nTrained with rlhf_fast's `{name}`, {trainer.step} steps.\n"
    return "\n".join([head + title, *(table + "\n" for table in tables)])


_CARD = "---\nlibrary_name: transformers\ntags: [rlhf-fast"


def has_ended(run_dir) -> bool:
    """Whether the run in this directory has saved its model: the card comes last (peft writes one of its own first)."""
    card = Path(run_dir) / "README.md"
    return card.is_file() and card.read_bytes().startswith(_CARD.encode())  # somebody's may not be UTF-8


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

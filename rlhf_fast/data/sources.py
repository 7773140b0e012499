"""Reads the rows of a source (a file or dataset in a TRL format, or hh-rlhf transcripts) in the form a stage takes."""

from __future__ import annotations

import json

from .. import parallel
from ..errors import ConfigError
from . import hh_rlhf
from .chat import is_conversation
from .files import as_records, open_text, read_dataset


def rows_for(stage: str, path: str, **limit) -> tuple[list[dict], list[hh_rlhf.LeftOut]]:
    """The rows of one source in the form that a stage ("sft", "reward" or "ppo") takes, and the pairs of hh-rlhf that
    were left out. limit: max_length and length of hh_rlhf.load_pairs.

    Preferences can also serve as demonstrations (sft: the chosen reply) and as prompts (ppo).
    """
    if _is_hh(path):
        rows, left_out = hh_rlhf.load_pairs(path, **limit)
    else:
        rows, left_out = as_records(read_dataset(path), path), []
        if hh_rlhf.are_transcripts(rows[0]):
            rows, left_out = hh_rlhf.parse_pairs(rows, **limit)
    if stage == "sft":
        rows = [_as_demonstration(row) for row in rows]
    if stage == "ppo":
        answers = ("chosen", "rejected", "responses", "ranks")
        rows = [{k: v for k, v in row.items() if k not in answers} if "prompt" in row else row for row in rows]
    return rows, left_out


def read_rows(path: str, stage: str = "reward") -> list[dict]:
    """The rows of rows_for. Prints the pairs that were left out."""
    rows, left_out = rows_for(stage, path)
    print_left_out(path, rows, left_out)
    return rows


def print_left_out(path: str, rows: list[dict] | None, left_out: list[hh_rlhf.LeftOut]) -> None:
    """Prints which pairs of hh-rlhf were left out, if any were."""
    if left_out and parallel.rank() == 0:
        print(f"{path}: {hh_rlhf.describe(rows, left_out)}")


def _is_hh(path: str) -> bool:
    """Whether the first line of a .jsonl or .jsonl.gz holds Anthropic's transcripts."""
    if not path.endswith((".jsonl", ".jsonl.gz")):
        return False
    try:
        with open_text(path) as file:
            return hh_rlhf.are_transcripts(json.loads(file.readline()))
    except (ValueError, EOFError, RecursionError):  # not JSON, not UTF-8, a truncated gzip file, or nested too deep
        return False
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def _as_demonstration(row: dict) -> dict:
    """A preference as a row for SFT, which learns the chosen reply; any other row unchanged."""
    if row.get("chosen") is not None and row.get("completion") is None and row.get("messages") is None:
        if row.get("prompt") is not None:
            return {"prompt": row["prompt"], "completion": row["chosen"]}
        if is_conversation(row["chosen"]):
            return {"messages": row["chosen"]}
    # Also unchanged: a preference without a prompt column whose replies are text that contains the prompt. Nothing says
    # where the reply begins, so the trainer refuses the row.
    return row

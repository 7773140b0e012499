"""TRL's dataset formats, checked record by record and encoded; what is left out is counted and named.

SFT       {"messages": [...]}                                     every assistant turn is learned
          {"prompt": text | messages, "completion": text | messages}
pairs     {"prompt": ..., "chosen": ..., "rejected": ...}         prompt optional: chosen and rejected may hold it
          optional: margin (r_w - r_l is to exceed it), chosen_prob (how likely chosen is better, RLAIF), weight
ranked    {"prompt": ..., "responses": [best, ..., worst]}        optional: ranks, 0 best, equal = tie
prompts   {"prompt": ...} and any other columns                   for PPO, which hands them to reward functions
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from . import chat
from .chat import ConfigError, Encoded, as_messages, is_conversation

SFT_FORMATS = '{"messages": [...]} or {"prompt": ..., "completion": ...}'
PREFERENCE_FORMATS = (
    '{"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ..., "responses": [best, ..., worst]}'
)


@dataclass
class Report:
    """What became of a dataset: records read, records used, and the index and length of each that was too long."""

    name: str
    records: int = 0
    used: int = 0
    max_length: int | None = None
    overlong: list[tuple[int, int]] = field(default_factory=list)  # (index in the dataset, tokens)

    def __str__(self) -> str:
        text = f"{self.name}: {self.used} of {self.records} records used"
        return f"{text}; {self.named_overlong()}" if self.overlong else text

    def named_overlong(self) -> str:
        names = ", ".join(f"{i} ({n} tokens)" for i, n in self.overlong[:5])
        more = f" and {len(self.overlong) - 5} more" if len(self.overlong) > 5 else ""
        return f"{len(self.overlong)} longer than max_length={self.max_length}: record {names}{more}"


@dataclass
class Comparison:
    """One prompt's responses, each encoded to be scored, best first; K = 2 is a pair."""

    responses: list[np.ndarray]
    ranks: list[int]
    margin: float = 0.0
    chosen_prob: float = 1.0
    weight: float = 1.0

    def __len__(self) -> int:
        return max(map(len, self.responses))


def read_dataset(source, split: str = "train") -> list[dict]:
    """Records from a list, a datasets.Dataset, a .json or .jsonl file, or whatever datasets.load_dataset takes."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix in (".jsonl", ".json") and path.is_file():
            return _read_json(path)
        if path.suffix in (".jsonl", ".json"):
            raise ConfigError(f"dataset file {str(source)!r} does not exist")
        from datasets import load_dataset  # takes a second to import, and lists do not need it

        try:
            source = load_dataset(str(source), split=split)
        except OSError as error:  # what datasets raises for a name that is nowhere, or out of reach
            raise ConfigError(f"dataset {str(source)!r} cannot be loaded: {error}") from error
    return source


def _read_json(path: Path) -> list[dict]:
    # Only "\n" ends a row: str.splitlines would also cut at the U+2028 and U+0085 that JSON leaves inside texts.
    rows = path.read_text(encoding="utf-8").split("\n")
    numbered = (
        [(1, "\n".join(rows))] if path.suffix == ".json" else [(i, r) for i, r in enumerate(rows, 1) if r.strip()]
    )
    records = []
    for number, text in numbered:
        try:
            records.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number + error.lineno - 1}: not JSON ({error.msg})") from None
    return records[0] if path.suffix == ".json" else records


@dataclass
class Prompt:
    """What a policy answers: as the data has it, its tokens, and the record's other columns, for reward functions."""

    prompt: chat.Text
    tokens: list[int]
    columns: dict

    def __len__(self) -> int:
        return len(self.tokens)


def as_records(dataset, name: str) -> list[dict]:
    """The dataset as a list of dicts. Raises ConfigError where it is anything else, or empty."""
    if not isinstance(dataset, Iterable) or isinstance(dataset, (str, dict)):
        raise ConfigError(f"{name} must be a list of dicts or a datasets.Dataset, got {type(dataset).__name__}")
    records = list(dataset)
    if not records:
        raise ConfigError(f"{name} is empty: give at least one record (an eval_dataset may be left out)")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ConfigError(f"{name} record {i} must be a dict, got {type(record).__name__}")
    return records


def _text_or_messages(record: dict, key: str, name: str, i: int, text: bool = True):
    value = record[key]
    if text and isinstance(value, str):
        return value
    if is_conversation(value) and value:
        for turn in value:
            if not isinstance(turn["content"], str):
                raise ConfigError(
                    f"{name} record {i}: {key!r}: the content of a {turn['role']} turn must be text, "
                    f"got {str(turn['content'])[:80]!r}"
                )
        return value
    raise ConfigError(
        f"{name} record {i}: {key!r} must be {'text or ' * text}a list of {{'role', 'content'}} messages, "
        f"got {str(value)[:80]!r}"
    )


def _check_not_repeated(prompt, response, name: str, i: int) -> None:
    """ConfigError for a response that holds its whole conversation while the prompt is given beside it."""
    if prompt is not None and is_conversation(response):
        before = as_messages(prompt, "user")
        if before and response[: len(before)] == before:
            raise ConfigError(
                f"{name} record {i}: the response repeats the prompt, which the model would read twice: leave the "
                "prompt out of the response, or leave the column 'prompt' out"
            )


def _number(record: dict, key: str, name: str, i: int) -> float:
    try:
        value = float(record[key])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{name} record {i}: {key!r} must be a finite number, got {record[key]!r}")
    return value


def _wrong_columns(record: dict, name: str, i: int, accepted: str) -> ConfigError:
    return ConfigError(f"{name} record {i} has the columns {', '.join(map(str, record))}; it needs {accepted}")


def _limited(examples: dict[int, int], report: Report, on_overlong: str) -> set[int]:
    """Which of the records ({index: tokens}) to keep; raises where some are too long and none may be skipped."""
    report.overlong = [(i, n) for i, n in examples.items() if n > report.max_length]
    report.used = len(examples) - len(report.overlong)
    if report.overlong and on_overlong == "error":
        raise ConfigError(
            f"{report.name}: {report.named_overlong()}. Raise max_length, shorten them, or set on_overlong='skip'"
        )
    if not report.used:
        raise ConfigError(
            f"{report.name}: every record is {report.named_overlong().split(' ', 1)[1]}; raise max_length"
        )
    return {i for i, n in examples.items() if n <= report.max_length}


def sft_examples(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "train_dataset"
) -> tuple[list[Encoded], Report]:
    """SFT records -> encoded sequences. ConfigError names a record in the wrong form, or too long under "error"."""
    records = as_records(dataset, name)
    encoded: dict[int, list[Encoded]] = {}
    for i, record in enumerate(tqdm(records, desc=f"encoding {name}", disable=None, leave=False)):
        if "messages" in record:
            prompt, completion = [], _text_or_messages(record, "messages", name, i, text=False)
        elif "prompt" in record and "completion" in record:
            prompt, completion = (_text_or_messages(record, key, name, i) for key in ("prompt", "completion"))
        else:
            raise _wrong_columns(record, name, i, SFT_FORMATS)
        _check_not_repeated(prompt, completion, name, i)
        conversational = not (isinstance(prompt, str) and isinstance(completion, str))
        chat.check_tokenizer(tokenizer, conversational)
        if conversational:
            before = as_messages(prompt, "user")
            encoded[i] = chat.encode_conversation(tokenizer, before + as_messages(completion, "assistant"), len(before))
        else:
            encoded[i] = [chat.encode_response(tokenizer, prompt, completion)]
        if not any(e.num_labels for e in encoded[i]):
            raise ConfigError(
                f"{name} record {i} has no response (assistant turn), so there is nothing to learn from it"
            )
    report = Report(name, len(records), max_length=max_length)
    kept = _limited({i: max(map(len, e)) for i, e in encoded.items()}, report, on_overlong)
    return [e for i in sorted(kept) for e in encoded[i]], report


def comparisons(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "train_dataset"
) -> tuple[list[Comparison], Report]:
    """Pairs or ranked responses -> encoded comparisons. Raises ConfigError as sft_examples does."""
    records = as_records(dataset, name)
    encoded: dict[int, Comparison] = {}
    for i, record in enumerate(tqdm(records, desc=f"encoding {name}", disable=None, leave=False)):
        prompt = _text_or_messages(record, "prompt", name, i) if record.get("prompt") is not None else None
        if "chosen" in record and "rejected" in record:
            responses = [_text_or_messages(record, key, name, i) for key in ("chosen", "rejected")]
            ranks, extra = [0, 1], {k: _number(record, k, name, i) for k in _PAIR_COLUMNS if record.get(k) is not None}
        elif "responses" in record:
            responses, ranks, extra = *_ranked(record, name, i), {}
        else:
            raise _wrong_columns(record, name, i, PREFERENCE_FORMATS)
        for response in responses:
            _check_not_repeated(prompt, response, name, i)
        if not 0 <= extra.get("chosen_prob", 1.0) <= 1 or extra.get("weight", 1.0) < 0:
            raise ConfigError(f"{name} record {i}: chosen_prob must lie in [0, 1] and weight be 0 or more, got {extra}")
        chat.check_tokenizer(tokenizer, any(map(is_conversation, [prompt, *responses])))
        encoded[i] = Comparison([chat.encode_to_score(tokenizer, prompt, r) for r in responses], ranks, **extra)
    report = Report(name, len(records), max_length=max_length)
    kept = _limited({i: len(c) for i, c in encoded.items()}, report, on_overlong)
    return [encoded[i] for i in sorted(kept)], report


def prompts(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "train_dataset"
) -> tuple[list[Prompt], Report]:
    """Prompt records -> encoded prompts of at most max_length tokens. Raises ConfigError as sft_examples does.

    Every prompt has the columns of all records, None where its own has none: reward functions see the same ones always.
    """
    records = as_records(dataset, name)
    columns = [key for key in dict.fromkeys(key for record in records for key in record) if key != "prompt"]
    if taken := {"prompts", "responses"}.intersection(columns):
        raise ConfigError(
            f"{name} has the column {min(taken)!r}, a name that reward(prompts, responses, **columns) uses itself: "
            "rename it, or leave it out"
        )
    encoded: dict[int, Prompt] = {}
    for i, record in enumerate(tqdm(records, desc=f"encoding {name}", disable=None, leave=False)):
        if "prompt" not in record:
            raise _wrong_columns(record, name, i, '{"prompt": ...}')
        prompt = _text_or_messages(record, "prompt", name, i)
        chat.check_tokenizer(tokenizer, is_conversation(prompt))
        tokens = chat.encode_prompt(tokenizer, prompt)
        if not tokens:
            raise ConfigError(
                f"{name} record {i}: its prompt {prompt!r} has no tokens, so there is nothing to go on from"
            )
        encoded[i] = Prompt(prompt, tokens, {key: record.get(key) for key in columns})
    report = Report(name, len(records), max_length=max_length)
    kept = _limited({i: len(p) for i, p in encoded.items()}, report, on_overlong)
    return [encoded[i] for i in sorted(kept)], report


_PAIR_COLUMNS = ("margin", "chosen_prob", "weight")


def _ranked(record: dict, name: str, i: int) -> tuple[list, list[int]]:
    responses = record["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise ConfigError(f"{name} record {i}: 'responses' must be a list of at least two, best first")
    ranks = record.get("ranks")
    if ranks is not None and not all(isinstance(r, int) for r in ranks):
        raise ConfigError(f"{name} record {i}: 'ranks' must be whole numbers, 0 for the best, got {ranks}")
    ranks = list(range(len(responses)) if ranks is None else ranks)
    if len(ranks) != len(responses) or min(ranks) < 0 or len(set(ranks)) < 2:
        raise ConfigError(
            f"{name} record {i}: 'ranks' must give each of the {len(responses)} responses a rank, 0 for the best, and "
            f"not all the same, got {ranks}"
        )
    checked = [_text_or_messages({"responses": r}, "responses", name, i) for r in responses]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return [checked[j] for j in order], [ranks[j] for j in order]

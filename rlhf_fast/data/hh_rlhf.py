"""Parses Anthropic's preference transcripts (hh-rlhf) into turns.

    "\\n\\nHuman: Hi\\n\\nAssistant: Hello"
    -> [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

A line holds two transcripts, `chosen` and `rejected`, that share everything up to the last reply (Bai et al. 2022,
arXiv 2204.05862, section 2). A pair becomes {"prompt": messages, "chosen": [reply], "rejected": [reply]} and keeps its
other columns. A pair of another form is left out, and reported with its line and the reason.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .files import open_text
from .progress import progress

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class LeftOut:
    """A pair that was not used: its 1-based line, one of four kinds, and what is wrong with it."""

    line: int
    kind: str  # "malformed", "identical", "diverging" or "over-long"
    reason: str

    def __str__(self):
        return f"line {self.line}: {self.kind}: {self.reason}"


def parse_transcript(text: str) -> list[dict[str, str]]:
    """A transcript -> its messages. User and assistant take turns; the user begins and the assistant ends.

    Raises ValueError, which names the turn, if they do not or if a turn is empty.
    """
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise ValueError(f"starts with {text[:20]!r}, not with a Human turn")
    messages = []
    for turn, (speaker, content) in enumerate(zip(parts[::2], parts[1::2], strict=True), 1):
        expected = ("Human", "Assistant")[(turn - 1) % 2]
        if speaker != expected:
            raise ValueError(f"turn {turn} is {speaker}'s, expected {expected}'s")
        if not content.strip():
            raise ValueError(f"turn {turn} ({speaker}) is empty")
        messages.append({"role": _ROLES[speaker], "content": content.strip()})
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last turn is not the Assistant's")
    return messages


def load_pairs(
    path: str | Path, *, max_length: int | None = None, length: Callable[[list[dict]], int] | None = None
) -> tuple[list[dict], list[LeftOut]]:
    """Reads a .jsonl or .jsonl.gz file -> (pairs, the pairs left out).

    A pair is over-long if one of its transcripts is longer than `max_length`. `length` measures the messages of a
    transcript, for example in tokens; by default it counts the characters of their contents.
    """
    with open_text(path) as lines:
        return parse_pairs(lines, max_length=max_length, length=length)


def parse_pairs(
    lines: Iterable[str | dict], *, max_length: int | None = None, length: Callable[[list[dict]], int] | None = None
) -> tuple[list[dict], list[LeftOut]]:
    """`load_pairs` for lines of text or rows of a table. Blank lines are skipped."""
    length = length or (lambda messages: sum(len(message["content"]) for message in messages))
    pairs, left_out = [], []
    for number, line in enumerate(progress(lines, "reading pairs"), 1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            row = _parse(line) if isinstance(line, str) else line
            chosen, rejected = transcripts(row)
        except ValueError as error:
            left_out.append(LeftOut(number, "malformed", str(error)))
            continue
        longest = max(length(chosen), length(rejected)) if max_length is not None else 0
        if chosen == rejected:
            left_out.append(LeftOut(number, "identical", "chosen and rejected are the same"))
        elif chosen[:-1] != rejected[:-1]:
            left_out.append(
                LeftOut(number, "diverging", f"the transcripts part at turn {_first_difference(chosen, rejected)}")
            )
        elif max_length is not None and longest > max_length:
            left_out.append(LeftOut(number, "over-long", f"length {longest} is over {max_length}"))
        else:
            pairs.append({**row, "prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})
    return pairs, left_out


def describe(pairs: list[dict], left_out: list[LeftOut]) -> str:
    """A text for people: how many pairs are used, and for each kind of LeftOut how many there are, the first ten lines
    and the first reason."""
    lines = [f"{len(pairs)} of {len(pairs) + len(left_out)} pairs used"]
    for kind in ("malformed", "identical", "diverging", "over-long"):
        of_kind = [item for item in left_out if item.kind == kind]
        if of_kind:
            numbers = ", ".join(str(item.line) for item in of_kind[:10])
            more = f" and {len(of_kind) - 10} more" if len(of_kind) > 10 else ""
            lines.append(f"  {len(of_kind)} {kind}, on line {numbers}{more}; {of_kind[0]}")
    return "\n".join(lines)


def are_transcripts(row) -> bool:
    """Whether a record looks like one of Anthropic's pairs, in which chosen and rejected are whole transcripts."""
    return isinstance(row, dict) and any(str(row.get(side)).startswith("\n\nHuman:") for side in ("chosen", "rejected"))


def transcripts(row) -> tuple[list[dict], list[dict]]:
    """The messages of chosen and of rejected. If parse_transcript raises a ValueError, it names the side."""
    parsed = []
    for side in ("chosen", "rejected"):
        if not isinstance(row, dict) or not isinstance(row.get(side), str):
            raise ValueError(f"has no text under {side!r}")
        try:
            parsed.append(parse_transcript(row[side]))
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from None
    return parsed[0], parsed[1]


def _parse(line: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None


def _first_difference(a: list[dict], b: list[dict]) -> int:
    """The 1-based turn at which two transcripts begin to differ."""
    return next((turn for turn, (x, y) in enumerate(zip(a, b, strict=False), 1) if x != y), min(len(a), len(b)) + 1)

"""One record of a dataset: its columns, taken out and checked. Every error names the dataset and the record.

In all functions `name` is what errors call the dataset, and `i` the record's index in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..errors import ConfigError
from .chat import Text, as_messages, is_conversation

SFT_FORMATS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
PREFERENCE_FORMATS = (
    '{"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ..., "responses": [best, ..., worst]}'
)


@contextmanager
def placed(name: str, i: int) -> Iterator[None]:
    """Puts the dataset and the record before the message of a ConfigError that is raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name} record {i}: {error}") from error


def text_or_messages(record: dict, key: str, name: str, i: int, text: bool = True) -> Text:
    """record[key], if it is messages with text as their content, or (unless text is False) text itself."""
    value = record[key]
    if text and isinstance(value, str):
        return _encodable(value, key, name, i)
    if is_conversation(value) and value:
        for turn in value:
            if not isinstance(turn["content"], str):
                raise ConfigError(
                    f"{name} record {i}: {key!r}: the content of a {turn['role']} turn must be text, "
                    f"got {turn['content']!r:.80}"
                )
            _encodable(turn["content"], key, name, i)
        return value
    raise ConfigError(
        f"{name} record {i}: {key!r} must be {'text or ' * text}a list of {{'role', 'content'}} messages, "
        f"got {value!r:.80}"
    )


def _encodable(text: str, key: str, name: str, i: int) -> str:
    """The text. ConfigError for half a surrogate pair: JSON can hold one (an emoji that was cut), a tokenizer cannot
    read it."""
    try:
        text.isascii() or text.encode()  # isascii is much the faster of the two
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} record {i}: {key!r} has half a character ({text[error.start]!r}, of a surrogate pair) behind "
            f"{text[: error.start][-40:]!r}: repair or remove it"
        ) from None
    return text


def number(record: dict, key: str, name: str, i: int) -> float:
    """record[key], if it is a finite number."""
    try:
        value = float(record[key])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{name} record {i}: {key!r} must be a finite number, got {record[key]!r}")
    return value


def ranked(record: dict, name: str, i: int) -> tuple[list[Text], list[int]]:
    """The responses of a record, best first, and their ranks."""
    responses = record["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise ConfigError(f"{name} record {i}: 'responses' must be a list of at least two, best first")
    ranks = record.get("ranks")
    ranks = ranks.tolist() if isinstance(ranks, np.ndarray) else ranks
    if ranks is not None and not (isinstance(ranks, list) and all(type(r) is int for r in ranks)):
        raise ConfigError(f"{name} record {i}: 'ranks' must be whole numbers, 0 for the best, got {ranks}")
    ranks = list(range(len(responses)) if ranks is None else ranks)
    if len(ranks) != len(responses) or min(ranks) < 0 or len(set(ranks)) < 2:
        raise ConfigError(
            f"{name} record {i}: 'ranks' must give each of the {len(responses)} responses a rank, 0 for the best, and "
            f"not all the same, got {ranks}"
        )
    checked = [text_or_messages({"responses": r}, "responses", name, i) for r in responses]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return [checked[j] for j in order], [ranks[j] for j in order]


def check_template_only(record: dict, name: str, i: int) -> None:
    """ConfigError for columns that are meant for the chat template: it is given the messages and nothing else."""
    for key in ("tools", "chat_template_kwargs"):
        if record.get(key):
            raise ConfigError(
                f"{name} record {i}: {key!r} is not given to the chat template: write it into a system message, or "
                "leave the column out"
            )


def check_prompt_is_read(record: dict, responses: list, name: str, i: int) -> None:
    """ConfigError where a record has no prompt, its responses are text, and what they answer stands in another column,
    which nothing would read."""
    for key in ("question", "instruction", "input"):
        asked = record.get(key)
        if isinstance(asked, str) and any(isinstance(r, str) and asked.strip() not in r for r in responses):
            raise ConfigError(
                f"{name} record {i} has no 'prompt', and a column {key!r} that its responses do not hold: rename it to "
                "'prompt' (with the text of other columns that belongs to it), or leave it out"
            )


def wrong_columns(record: dict, name: str, i: int, accepted: str) -> ConfigError:
    """The error to raise for a record in none of the accepted formats. A column without text or a list counts as
    none, and is shown with its type."""
    columns = [f"{k}" if isinstance(v, (str, list)) else f"{k} ({type(v).__name__})" for k, v in record.items()]
    return ConfigError(f"{name} record {i} has the columns {', '.join(columns)}; it needs {accepted}")


def split_prompt(prompt, response, name: str, i: int) -> tuple[Text | None, Text]:
    """(prompt, response) without a repetition, where the response is a whole conversation that holds the prompt too.

    HuggingFaceH4/ultrafeedback_binarized is of this form: {"prompt": text, "chosen": [user, assistant], ...}. Turns
    count as equal if role and stripped content are: a table may add keys to one of the two copies, or have stripped it.
    ConfigError where the response looks like a whole conversation and the prompt is not all in it.
    """
    if prompt is None or isinstance(response, str):
        return prompt, response
    before, turns = ([(m["role"], m["content"].strip()) for m in as_messages(x, "user")] for x in (prompt, response))
    if turns[0][0] == "assistant" and turns[: len(before)] != before:
        return prompt, response  # the usual form: it begins with the assistant's answer
    for end in range(len(before), len(turns)):
        if turns[end - len(before) : end] == before:
            return response[:end], response[end:]
    ends_alike = before[-1][0] == "user" and before[-1] in turns
    if isinstance(prompt, str) or turns == before or ends_alike:
        raise ConfigError(
            f"{name} record {i}: the response begins as a whole conversation does, and the prompt beside it is not in "
            "it, or only a part of the prompt is, so the model would read both: let the response begin with the "
            "assistant's turn, or give no 'prompt'"
        )
    return prompt, response  # the prompt is a system message, say, and the response begins with the user's turn


def responses_of(record: dict, name: str, i: int) -> list[tuple[Text | None, Text]]:
    """(prompt, response) of each response to score in a record of any format, or {"prompt": ..., "response": ...}."""
    check_template_only(record, name, i)
    prompt = text_or_messages(record, "prompt", name, i) if record.get("prompt") is not None else None
    if "chosen" in record and "rejected" in record:
        responses = [text_or_messages(record, key, name, i) for key in ("chosen", "rejected")]
    elif isinstance(record.get("responses"), list) and record["responses"]:
        responses = [text_or_messages({"responses": r}, "responses", name, i) for r in record["responses"]]
    elif record.get("messages") is not None:
        messages = text_or_messages(record, "messages", name, i, text=False)
        return [(messages[:-1], messages[-1:])]
    elif key := next((key for key in ("response", "completion", "text") if record.get(key) is not None), None):
        responses = [text_or_messages(record, key, name, i)]
    else:
        accepted = f'{PREFERENCE_FORMATS}, {SFT_FORMATS} or {{"prompt": ..., "response": ...}}'
        raise wrong_columns(record, name, i, accepted)
    if prompt is None and "text" not in record:  # which is the whole
        check_prompt_is_read(record, responses, name, i)
    return [split_prompt(prompt, response, name, i) for response in responses]

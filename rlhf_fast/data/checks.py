"""Extracts and checks the columns of one record of a dataset. Every error names the dataset and the record.

In all functions `name` is the name of the dataset in errors, and `i` is the record's index in it.
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
def naming_record(name: str, i: int) -> Iterator[None]:
    """Prefixes the message of a ConfigError raised inside the block with the dataset and the record."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name} record {i}: {error}") from error


def text_or_messages(record: dict, key: str, name: str, i: int, text: bool = True) -> Text:
    """record[key], if it is messages whose contents are text, or (unless text is False) text itself."""
    value, where = record[key], f"{name} record {i}: {key!r}"
    if text and isinstance(value, str):
        check_encodable(value, where)
        return value
    if is_conversation(value) and value:
        for turn in value:
            if not isinstance(turn["content"], str):
                raise ConfigError(
                    f"{where}: the content of a {turn['role']} turn must be text, got {turn['content']!r:.80}"
                )
            check_encodable(turn["content"], where)
        return value
    raise ConfigError(f"{where} must be {'text or ' * text}a list of {{'role', 'content'}} messages, got {value!r:.80}")


def check_encodable(text: str, where: str) -> None:
    """ConfigError for half a surrogate pair. JSON can hold one (an emoji that was cut); no tokenizer can read it."""
    try:
        text.isascii() or text.encode()  # isascii is much faster
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where} has half a character ({text[error.start]!r}, of a surrogate pair) after "
            f"{text[: error.start][-40:]!r}: repair or remove it"
        ) from None


def number(record: dict, key: str, name: str, i: int) -> float:
    """record[key], if it is a finite number."""
    try:
        value = float(record[key])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{name} record {i}: {key!r} must be a finite number, got {record[key]!r}")
    return value


def is_pair(record: dict) -> bool:
    """Whether a record compares chosen with rejected. In a table of several formats both are None in the other rows."""
    both = ("chosen", "rejected")
    return all(key in record for key in both) and any(record[key] is not None for key in both)


def is_ranking(record: dict) -> bool:
    """Whether a record has a list of responses."""
    return isinstance(record.get("responses"), list) and bool(record["responses"])


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
    """ConfigError for columns that are meant for the chat template, because we pass it the messages only."""
    for key in ("tools", "chat_template_kwargs"):
        if record.get(key):
            raise ConfigError(
                f"{name} record {i}: {key!r} is not passed to the chat template: write it into a system message, or "
                "leave the column out"
            )


def check_prompt_is_read(record: dict, responses: list, name: str, i: int) -> None:
    """ConfigError if a record has no prompt, its responses are text, and the question is in another column, which
    would not be read."""
    for key in ("question", "instruction", "input"):
        asked = record.get(key)
        if isinstance(asked, str) and any(isinstance(r, str) and asked.strip() not in r for r in responses):
            raise ConfigError(
                f"{name} record {i} has no 'prompt', but a column {key!r} that its responses do not contain: rename it "
                "to 'prompt' (adding the text of other columns that belong to it), or leave it out"
            )


def wrong_columns(record: dict, name: str, i: int, accepted: str) -> ConfigError:
    """The error to raise for a record in none of the accepted formats. It shows the type of columns that are neither
    text nor a list, because these are ignored."""
    columns = [f"{k}" if isinstance(v, (str, list)) else f"{k} ({type(v).__name__})" for k, v in record.items()]
    return ConfigError(f"{name} record {i} has the columns {', '.join(columns)}; it needs {accepted}")


def split_prompt(prompt, response, name: str, i: int) -> tuple[Text | None, Text]:
    """(prompt, response) without repetition, if the response is a whole conversation that contains the prompt too.

    HuggingFaceH4/ultrafeedback_binarized has this form: {"prompt": text, "chosen": [user, assistant], ...}. Turns are
    equal if their roles and stripped contents are: a table may have added keys to one of the two copies, or stripped
    it. ConfigError if the response looks like a whole conversation but does not contain all of the prompt.
    """
    if prompt is None or isinstance(response, str):
        return prompt, response
    before, turns = ([(m["role"], m["content"].strip()) for m in as_messages(x, "user")] for x in (prompt, response))
    if turns[0][0] == "assistant" and turns[: len(before)] != before:
        return prompt, response  # the usual form: the response begins with the assistant's turn
    for end in range(len(before), len(turns)):
        if turns[end - len(before) : end] == before:
            return response[:end], response[end:]
    ends_alike = before[-1][0] == "user" and before[-1] in turns
    if isinstance(prompt, str) or turns == before or ends_alike:
        raise ConfigError(
            f"{name} record {i}: the response begins like a whole conversation but does not contain all of the prompt, "
            "so the model would read both: begin the response with the assistant's turn, or leave 'prompt' out"
        )
    return prompt, response  # for example, the prompt is a system message and the response begins with the user's turn


def responses_of(record: dict, name: str, i: int) -> list[tuple[Text | None, Text]]:
    """(prompt, response) of each response to score, in a record of any format or {"prompt": ..., "response": ...}."""
    check_template_only(record, name, i)
    prompt = text_or_messages(record, "prompt", name, i) if record.get("prompt") is not None else None
    if is_pair(record):
        responses = [text_or_messages(record, key, name, i) for key in ("chosen", "rejected")]
    elif is_ranking(record):
        responses = [text_or_messages({"responses": r}, "responses", name, i) for r in record["responses"]]
    elif record.get("messages") is not None:
        messages = text_or_messages(record, "messages", name, i, text=False)
        return [(messages[:-1], messages[-1:])]
    elif key := next((key for key in ("response", "completion", "text") if record.get(key) is not None), None):
        responses = [text_or_messages(record, key, name, i)]
    else:
        accepted = f'{PREFERENCE_FORMATS}, {SFT_FORMATS} or {{"prompt": ..., "response": ...}}'
        raise wrong_columns(record, name, i, accepted)
    if prompt is None and "text" not in record:  # text holds prompt and response
        check_prompt_is_read(record, responses, name, i)
    return [split_prompt(prompt, response, name, i) for response in responses]

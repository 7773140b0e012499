"""TRL's dataset formats: checks records one by one (checks.py), encodes them, and reports which were left out.

SFT       {"messages": [...]}                                     every assistant turn is learned
          {"prompt": text | messages, "completion": text | messages}    the completion's assistant turns
          {"text": text}                                          every token
pairs     {"prompt": ..., "chosen": ..., "rejected": ...}         chosen and rejected may be whole conversations, with
          the prompt in a column too (ultrafeedback_binarized; it is read once) or without one
          optional: margin (which r_w - r_l should exceed), chosen_prob (the probability that chosen is better, RLAIF),
          weight, source (evaluation is also split by it)
ranked    {"prompt": ..., "responses": [best, ..., worst]}        optional: ranks, 0 best, equal = tie; two are a pair
prompts   {"prompt": ...} and any other columns                   for PPO, which passes them to reward functions
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, takewhile

import numpy as np

from ..errors import ConfigError
from . import chat
from .chat import Encoded, as_messages, is_conversation
from .checks import (
    PREFERENCE_FORMATS,
    SFT_FORMATS,
    check_prompt_is_read,
    check_template_only,
    is_pair,
    naming_record,
    number,
    ranked,
    responses_of,
    split_prompt,
    text_or_messages,
    wrong_columns,
)
from .files import as_records
from .progress import progress

PAIR_COLUMNS = ("margin", "chosen_prob", "weight")  # optional columns, with numbers that only pairs have


@dataclass
class Report:
    """The counts of records read and used of a dataset, and the index and length of each record that was too long."""

    name: str
    records: int = 0
    used: int = 0
    max_length: int | None = None
    overlong: list[tuple[int, int]] = field(default_factory=list)  # left out: (index in the dataset, tokens)
    truncated: list[tuple[int, int]] = field(default_factory=list)  # used, but cut: (index, tokens before)
    tokens_cut: int = 0
    setting: str = "max_length"  # the name of max_length in the trainer's config

    def __str__(self) -> str:
        text = f"{self.name}: {self.used} of {self.records} records used"
        if self.truncated:
            text += f", {len(self.truncated)} of them cut to max_length={self.max_length} ({self.tokens_cut} tokens)"
        return f"{text}; {self.named_overlong()}" if self.overlong else text

    def named_overlong(self) -> str:
        names = ", ".join(f"{i} ({n} tokens)" for i, n in self.overlong[:5])
        more = f" and {len(self.overlong) - 5} more" if len(self.overlong) > 5 else ""
        return f"{len(self.overlong)} longer than {self.setting}={self.max_length}: record {names}{more}"


@dataclass
class Comparison:
    """The K responses to one prompt, each encoded to be scored, best first. In a pair (K = 2) the response that is
    more likely to be better comes first."""

    responses: list[np.ndarray]
    ranks: list[int]
    margin: float = 0.0
    chosen_prob: float = 1.0
    weight: float = 1.0
    source: str | None = None  # the record's column; evaluation is also split by it
    index: int = 0  # of the record in its dataset
    prompt: int = 0  # index of the first record with an equal prompt
    texts: list[chat.Text] = field(default_factory=list)  # the responses as in the data, uncut

    def __len__(self) -> int:
        return max(map(len, self.responses))


@dataclass
class Prompt:
    """A prompt as in the data, its tokens (T,) int32, and the record's other columns, for reward functions."""

    prompt: chat.Text
    tokens: np.ndarray
    columns: dict

    def __len__(self) -> int:
        return len(self.tokens)


def _asked(pairs: list[tuple[chat.Text | None, chat.Text]]) -> tuple[tuple[str, str], ...]:
    """(role, text) of every turn that the responses answer: the turns of the prompt or, without a prompt, the turns
    that all responses share. () if there is no user turn among them; texts without a prompt have none."""
    if (prompt := pairs[0][0]) is not None:
        conversations = [as_messages(prompt, "user")]
    elif any(isinstance(response, str) for _, response in pairs):
        return ()
    else:
        conversations = [response[:-1] for _, response in pairs]
    turns = [[(m["role"], m["content"]) for m in messages] for messages in conversations]
    shared = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, zip(*turns, strict=False))]
    return tuple(shared) if any(role == "user" and text for role, text in shared) else ()


def _within_max_length(
    examples: dict[int, list], report: Report, on_overlong: str, cuts: dict[str, Callable] | None = None
) -> list:
    """{index of a record: its sequences} -> the sequences of all records that are used. The others go into the report.

    cuts: {on_overlong: function}. The function takes a sequence and returns a shorter one, or None if nothing would be
    left to learn from. If there is none for this on_overlong, a record that is too long is left out; under "error" it
    is a ConfigError.
    """
    cuts = cuts or {}
    used = []
    for i, sequences in examples.items():
        longest = max(map(len, sequences))
        if longest > report.max_length and on_overlong in cuts:
            before = sum(map(len, sequences))
            sequences = [s if len(s) <= report.max_length else cuts[on_overlong](s) for s in sequences]
            sequences = [s for s in sequences if s is not None]
            if sequences:
                report.truncated.append((i, longest))
                report.tokens_cut += before - sum(map(len, sequences))
        elif longest > report.max_length:
            sequences = []
        if not sequences:
            report.overlong.append((i, longest))
        used += sequences
        report.used += bool(sequences)
    if report.overlong and on_overlong == "error":
        ways = f" (or, to cut them, {' or '.join(map(repr, cuts))})" if cuts else ""
        raise ConfigError(
            f"{report.name}: {report.named_overlong()}. Raise {report.setting}, shorten them, or set "
            f"on_overlong='skip'{ways}"
        )
    if not report.used:
        raise ConfigError(
            f"{report.name}: every record is {report.named_overlong().split(' ', 1)[1]}. Raise {report.setting}"
        )
    return used


def sft_examples(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "train_dataset"
) -> tuple[list[Encoded], Report]:
    """SFT records -> encoded sequences. ConfigError names a record of a wrong form.

    on_overlong decides what happens to a record of more than max_length tokens: "error" raises a ConfigError; "skip"
    leaves it out; "keep_start" cuts its end (so the response has no eos to learn); "keep_end" cuts its beginning but
    keeps a bos. A record is left out if the cut leaves no token to learn. The report counts the records that were left
    out or cut.
    """
    records = as_records(dataset, name)
    encoded = {
        i: _sft_sequences(record, tokenizer, name, i) for i, record in enumerate(progress(records, f"encoding {name}"))
    }
    unwritten = {i: list(chain(*(e.unwritten for e in examples))) for i, examples in encoded.items()}
    warn_of_unwritten(unwritten, name, "learned")
    unread = {i: e.unread.strip() for i, examples in encoded.items() for e in examples if e.unread.strip()}
    if unread:
        i, end = next(iter(unread.items()))
        warnings.warn(
            f"{name}: in {len(unread)} of {len(records)} records the chat template does not write what its generation "
            f"prompt ends with before an assistant turn (in record {i} {end[-80:]!r}), so nothing is learned of how to "
            "answer behind it: set tokenizer.chat_template to one whose generation prompt is how it begins a turn",
            stacklevel=3,
        )
    if empty := [i for i, record in enumerate(records) if _says_nothing(record)]:
        warnings.warn(
            f"{name}: the response is empty in {len(empty)} of {len(records)} records, the first is {empty[0]}: from "
            "these the model learns to end at once",
            stacklevel=3,
        )
    report = Report(name, len(records), max_length=max_length)

    def only(example: Encoded, kept) -> Encoded | None:
        example = Encoded(example.input_ids[kept], example.response_mask[kept])
        return example if example.num_labels else None

    def end(example: Encoded) -> Encoded | None:
        bos = int(example.input_ids[0] == tokenizer.bos_token_id)
        return only(example, np.r_[:bos, len(example) - max_length + bos : len(example)])

    cuts = {"keep_start": lambda example: only(example, slice(max_length)), "keep_end": end}
    return _within_max_length(encoded, report, on_overlong, cuts), report


def _sft_sequences(record: dict, tokenizer, name: str, i: int) -> list[Encoded]:
    """The sequences from which one record is learned."""
    if record.get("messages") is not None:
        prompt, completion = None, text_or_messages(record, "messages", name, i, text=False)
    elif record.get("completion") is not None and "prompt" in record:
        prompt, completion = (text_or_messages(record, key, name, i) for key in ("prompt", "completion"))
    elif isinstance(record.get("text"), str):
        prompt, completion = "", text_or_messages(record, "text", name, i)
    else:
        raise wrong_columns(record, name, i, SFT_FORMATS)
    check_template_only(record, name, i)
    prompt, completion = split_prompt(prompt, completion, name, i)
    conversational = not (isinstance(prompt, str) and isinstance(completion, str))
    chat.check_tokenizer(tokenizer, conversational)
    if conversational:
        before = as_messages(prompt, "user")
        messages = before + as_messages(completion, "assistant")
        with naming_record(name, i):
            sequences = chat.encode_conversation(tokenizer, messages, len(before))
    else:
        sequences = [chat.encode_response(tokenizer, prompt, completion)]
    if not any(e.num_labels for e in sequences):
        raise ConfigError(f"{name} record {i} has no response (assistant turn), so there is nothing to learn from it")
    return sequences


def _says_nothing(record: dict) -> bool:
    """Whether all assistant turns of a record are empty, also in keys such as tool_calls."""
    reply = next(record[key] for key in ("messages", "completion", "text") if record.get(key) is not None)
    turns = [turn for turn in as_messages(reply, "assistant") if turn["role"] == "assistant"]
    return not any(value and str(value).strip() for turn in turns for key, value in turn.items() if key != "role")


def warn_of_unwritten(unwritten: dict[int, chat.Parts], name: str, use: str, unit: str = "record") -> None:
    """Warns once for each key of the assistant turns from which the chat template leaves something out.

    unwritten: {index: the parts left out} of every record (or response: unit). use: what would have been done with
    them, "learned" or "scored".
    """
    found: dict[str, dict[int, str]] = {}
    for i, parts in unwritten.items():
        for key, part in parts:
            found.setdefault(key, {}).setdefault(i, part)
    for key, parts in found.items():
        i, part = next(iter(parts.items()))
        warnings.warn(
            f"{name}: in {len(parts)} of {len(unwritten)} {unit}s the chat template leaves out {key!r} of an assistant "
            f"turn, or a part of it, so it is not {use}: in {unit} {i} {part.strip()[:80]!r}. Set "
            "tokenizer.chat_template to one that writes it, or remove it from the data",
            stacklevel=3,
        )


def responses_to_score(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "reference_dataset"
) -> tuple[list[np.ndarray], Report]:
    """Every response in records of any format (responses_of), encoded to be scored. on_overlong and errors are as in
    sft_examples, without "keep_start"."""
    records = as_records(dataset, name)
    encoded: dict[int, list[np.ndarray]] = {}
    unwritten: dict[int, chat.Parts] = {i: [] for i in range(len(records))}
    for i, record in enumerate(progress(records, f"encoding {name}")):
        asked = responses_of(record, name, i)
        chat.check_tokenizer(tokenizer, any(map(is_conversation, chain(*asked))))
        with naming_record(name, i):
            encoded[i] = [chat.encode_to_score(tokenizer, *pair, unwritten=unwritten[i]) for pair in asked]
    warn_of_unwritten(unwritten, name, "scored")
    report = Report(name, len(records), max_length=max_length)

    def end(ids: np.ndarray) -> np.ndarray:
        bos = int(ids[0] == tokenizer.bos_token_id)
        return np.r_[ids[:bos], ids[len(ids) - max_length + bos :]]

    return _within_max_length(encoded, report, on_overlong, {"keep_end": end}), report


def as_pairs(records: Iterable[dict]) -> list[dict]:
    """Comparisons as rows of chosen and rejected, with their other columns. K ranked responses give one row for each
    pair in which one is better."""
    rows = []
    for record in records:
        if is_pair(record):
            rows.append(record)
            continue
        responses, ranks = ranked(record, "dataset", len(rows))
        rows += [
            {**record, "chosen": responses[a], "rejected": responses[b]}
            for a, b in combinations(range(len(ranks)), 2)
            if ranks[a] < ranks[b]
        ]
    return rows


def comparisons(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "train_dataset"
) -> tuple[list[Comparison], Report]:
    """Pairs or ranked responses -> encoded comparisons. on_overlong and errors are as in sft_examples, without
    "keep_start".

    "keep_end" cuts the same tokens from the beginning of all responses to a prompt, so that they still answer the same
    question. If the responses differ in the tokens to cut, the record is left out.
    """
    records = as_records(dataset, name)
    encoded: dict[int, Comparison] = {}
    first: dict = {}  # prompt -> index
    unwritten: dict[int, chat.Parts] = {i: [] for i in range(len(records))}
    for i, record in enumerate(progress(records, f"encoding {name}")):
        encoded[i], asked = _comparison(record, tokenizer, name, i, unwritten[i])
        encoded[i].prompt = first.setdefault(asked or i, i)
    warn_of_unwritten(unwritten, name, "scored")
    if same := [i for i, c in encoded.items() if all(np.array_equal(c.responses[0], r) for r in c.responses)]:
        warnings.warn(
            f"{name}: all responses are the same in {len(same)} of {len(records)} records, the first is {same[0]}: "
            "these say nothing of what is better",
            stacklevel=3,
        )
    report = Report(name, len(records), max_length=max_length)

    def end(item: Comparison) -> Comparison | None:
        bos = int(all(r[0] == tokenizer.bos_token_id for r in item.responses))
        start = len(item) - max_length + bos
        same = all(len(r) > start and np.array_equal(r[:start], item.responses[0][:start]) for r in item.responses)
        return replace(item, responses=[np.r_[r[:bos], r[start:]] for r in item.responses]) if same else None

    return _within_max_length(
        {i: [item] for i, item in encoded.items()}, report, on_overlong, {"keep_end": end}
    ), report


def _comparison(record: dict, tokenizer, name: str, i: int, unwritten: chat.Parts) -> tuple[Comparison, tuple]:
    """One record encoded, and the turns that its responses answer. unwritten gets what the template leaves out."""
    prompt = text_or_messages(record, "prompt", name, i) if record.get("prompt") is not None else None
    if is_pair(record):
        responses = [text_or_messages(record, key, name, i) for key in ("chosen", "rejected")]
        ranks = [0, 1]
    elif record.get("responses") is not None:
        responses, ranks = ranked(record, name, i)
    else:
        raise wrong_columns(record, name, i, PREFERENCE_FORMATS)
    check_template_only(record, name, i)
    extra = {k: number(record, k, name, i) for k in PAIR_COLUMNS if record.get(k) is not None}
    if prompt is None:
        check_prompt_is_read(record, responses, name, i)
    pairs = [split_prompt(prompt, response, name, i) for response in responses]
    if not 0 <= extra.get("chosen_prob", 1.0) <= 1 or extra.get("weight", 1.0) < 0:
        raise ConfigError(f"{name} record {i}: chosen_prob must be in [0, 1] and weight 0 or more, got {extra}")
    if len(responses) == 2 and extra.get("chosen_prob", 1.0) < 0.5:  # swap the two, which does not change the loss
        pairs, extra["chosen_prob"] = pairs[::-1], 1 - extra["chosen_prob"]
        extra["margin"] = -extra.get("margin", 0.0)
    source = record.get("source")
    if not isinstance(source, str | None):
        raise ConfigError(f"{name} record {i}: 'source', by which evaluation is split, must be text, got {source!r}")
    chat.check_tokenizer(tokenizer, any(map(is_conversation, chain(*pairs))))
    with naming_record(name, i):
        sequences = [chat.encode_to_score(tokenizer, *pair, unwritten=unwritten) for pair in pairs]
    texts = [response for _, response in pairs]
    return Comparison(sequences, ranks, **extra, source=source, index=i, texts=texts), _asked(pairs)


def prompts(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "train_dataset"
) -> tuple[list[Prompt], Report]:
    """Prompt records -> encoded prompts. on_overlong: "error" or "skip", as in sft_examples.

    Every prompt gets the columns of all records, with None if its own record lacks one, so that a reward function is
    always called with the same columns.
    """
    records = as_records(dataset, name)
    columns = [key for key in dict.fromkeys(key for record in records for key in record) if key != "prompt"]
    if taken := {"prompts", "responses"}.intersection(columns):
        raise ConfigError(
            f"{name} has the column {min(taken)!r}, which is itself an argument of reward(prompts, responses, "
            "**columns): rename it, or leave it out"
        )
    encoded: dict[int, Prompt] = {}
    for i, record in enumerate(progress(records, f"encoding {name}")):
        if "prompt" not in record:
            raise wrong_columns(record, name, i, '{"prompt": ...}')
        prompt = text_or_messages(record, "prompt", name, i)
        if is_conversation(prompt) and prompt[-1]["role"] == "assistant":
            raise ConfigError(
                f"{name} record {i}: its prompt ends with an assistant turn, but PPO generates that turn: leave it out"
            )
        chat.check_tokenizer(tokenizer, is_conversation(prompt))
        with naming_record(name, i):
            tokens = chat.encode_prompt(tokenizer, prompt)
        if not tokens:
            raise ConfigError(
                f"{name} record {i}: its prompt {prompt!r} has no tokens, so there is nothing to continue from"
            )
        encoded[i] = Prompt(prompt, np.array(tokens, np.int32), {key: record.get(key) for key in columns})
    report = Report(name, len(records), max_length=max_length, setting="max_prompt_length")
    return _within_max_length({i: [p] for i, p in encoded.items()}, report, on_overlong), report

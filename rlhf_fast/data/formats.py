"""TRL's dataset formats, checked record by record and encoded; what is left out is counted and named.

SFT       {"messages": [...]}                                     every assistant turn is learned
          {"prompt": text | messages, "completion": text | messages}    the completion's assistant turns
          {"text": text}                                          every token
pairs     {"prompt": ..., "chosen": ..., "rejected": ...}         prompt optional: chosen and rejected may hold it;
          where they are messages that do and it stands beside them (ultrafeedback_binarized), it is read once
          optional: margin (r_w - r_l is to exceed it), chosen_prob (how likely chosen is better, RLAIF), weight,
          source (evaluation is also split by it)
ranked    {"prompt": ..., "responses": [best, ..., worst]}        optional: ranks, 0 best, equal = tie; two are a pair
prompts   {"prompt": ...} and any other columns                   for PPO, which hands them to reward functions
"""

from __future__ import annotations

import gzip
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, takewhile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from . import chat
from .chat import ConfigError, Encoded, as_messages, is_conversation

SFT_FORMATS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
PREFERENCE_FORMATS = (
    '{"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ..., "responses": [best, ..., worst]}'
)


@dataclass
class Report:
    """What became of a dataset: records read and used, and the index and length of each that was too long."""

    name: str
    records: int = 0
    used: int = 0
    max_length: int | None = None
    overlong: list[tuple[int, int]] = field(default_factory=list)  # left out: (index in the dataset, tokens)
    truncated: list[tuple[int, int]] = field(default_factory=list)  # used, but cut: (index, tokens before)
    tokens_cut: int = 0
    setting: str = "max_length"  # what the trainer's config calls it

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
    """One prompt's responses, each encoded to be scored, best first; K = 2 is a pair, the likelier one first."""

    responses: list[np.ndarray]
    ranks: list[int]
    margin: float = 0.0
    chosen_prob: float = 1.0
    weight: float = 1.0
    source: str | None = None  # where the record says it comes from: evaluation is also split by it
    index: int = 0  # of the record in its dataset
    prompt: int = 0  # index of the first record with an equal prompt
    texts: list[chat.Text] = field(default_factory=list)  # the responses as the data has them, uncut

    def __len__(self) -> int:
        return max(map(len, self.responses))


_FILES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}  # suffix -> builder of datasets


def read_dataset(source) -> list[dict]:
    """Records from a list, a datasets.Dataset, a file (.jsonl, .jsonl.gz, .json, .parquet, .csv, .arrow), a directory
    of Dataset.save_to_disk, or what has splits, a name that datasets.load_dataset takes or a directory of
    DatasetDict.save_to_disk: "name" is its split train, "name:test" another."""
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source)
    json_like = path.suffix in (".jsonl", ".json") or path.name.endswith(".jsonl.gz")
    if (json_like or path.suffix in _FILES) and not path.is_file():
        raise ConfigError(f"dataset file {str(source)!r} does not exist")
    if json_like:
        return _read_json(path)
    import datasets  # takes a second to import, and lists do not need it

    named = None if path.exists() else re.fullmatch(r"(.+?):(\w[\w\[\]:%+-]*)", str(source))  # not hf://, not C:\\
    name, split = named.groups() if named else (str(source), "train")
    try:
        if path.suffix in _FILES:
            return datasets.load_dataset(_FILES[path.suffix], data_files=str(path), split="train")
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:  # not there, or no such form
        raise ConfigError(f"dataset {str(source)!r} cannot be loaded: {error}") from error


def _read_json(path: Path) -> list[dict]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from None
    except (OSError, EOFError) as error:  # no gzip, or a part of one
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return parse_jsonl(text, str(path)) if path.suffix != ".json" else _parse(text, str(path), 1)


def parse_jsonl(text: str, name: str) -> list:
    """One JSON value a line; empty lines are skipped. ConfigError names the line that is none."""
    # Only "\n" ends a row: str.splitlines would also cut at the U+2028 and U+0085 that JSON leaves inside texts.
    return [_parse(row, name, i) for i, row in enumerate(text.split("\n"), 1) if row.strip()]


def _parse(text: str, name: str, line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}, line {line + error.lineno - 1}: not JSON ({error.msg})") from None


@dataclass
class Prompt:
    """What a policy answers: as the data has it, its tokens, and the record's other columns, for reward functions."""

    prompt: chat.Text
    tokens: list[int]
    columns: dict

    def __len__(self) -> int:
        return len(self.tokens)


def as_records(dataset, name: str) -> list[dict]:
    """The dataset, a DataFrame too, as a list of dicts. Raises ConfigError where it is anything else, or empty."""
    if hasattr(dataset, "to_dict") and hasattr(dataset, "iterrows"):
        dataset = dataset.to_dict("records")
    if isinstance(dataset, dict):
        splits = [str(key) for key, value in dataset.items() if _holds_records(value)]
        raise ConfigError(
            f"{name} must be a list of dicts or a datasets.Dataset, got {type(dataset).__name__}: give "
            + (f"one of its datasets ({', '.join(splits)})" if splits else "datasets.Dataset.from_dict of columns")
        )
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")  # torch's Subset is that alone
    if not (indexed or isinstance(dataset, Iterable)) or isinstance(dataset, str):
        raise ConfigError(f"{name} must be a list of dicts or a datasets.Dataset, got {type(dataset).__name__}")
    records = list(dataset if isinstance(dataset, Iterable) else map(dataset.__getitem__, range(len(dataset))))
    if not records:
        raise ConfigError(f"{name} is empty: give at least one record (an eval_dataset may be left out)")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ConfigError(f"{name} record {i} must be a dict, got {type(record).__name__}")
        readable = {key: _readable(record[key]) for key in _CONVERSATIONS if not isinstance(record.get(key, ""), str)}
        if any(value is not record[key] for key, value in readable.items()):
            records[i] = record | readable
    return records


def _holds_records(value) -> bool:
    return hasattr(value, "column_names") or (isinstance(value, list) and all(isinstance(x, dict) for x in value))


_CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected", "response", "responses")


def _readable(value):
    """Arrays as the lists that they were before pandas read them from a table; and what a turn says that only calls
    tools, which OpenAI's format leaves out or null, as empty text."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        parts = [_readable(x) for x in value]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
    if isinstance(value, dict) and value.get("role") == "assistant" and value.get("tool_calls"):
        return value if value.get("content") is not None else value | {"content": ""}
    return value


@contextmanager
def placed(name: str, i: int) -> Iterator[None]:
    """A ConfigError inside names the record, as what encodes a conversation alone cannot."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name} record {i}: {error}") from error


def _text_or_messages(record: dict, key: str, name: str, i: int, text: bool = True):
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
    """The text. ConfigError for half a surrogate pair, which JSON can write (a cut emoji) and no tokenizer reads."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} record {i}: {key!r} has half a character ({text[error.start]!r}, of a surrogate pair) behind "
            f"{text[: error.start][-40:]!r}: repair or remove it"
        ) from None
    return text


def _check_template_only(record: dict, name: str, i: int) -> None:
    """ConfigError for what a chat template would have to be given beside the messages, and is not here."""
    for key in ("tools", "chat_template_kwargs"):
        if record.get(key):
            raise ConfigError(
                f"{name} record {i}: {key!r} is not given to the chat template: write it into a system message, or "
                "leave the column out"
            )


def _split_prompt(prompt, response, name: str, i: int) -> tuple[chat.Text | None, chat.Text]:
    """The prompt and what answers it, where the response may be the whole conversation, which has the prompt in it.

    So it is in HuggingFaceH4/ultrafeedback_binarized: {"prompt": text, "chosen": [user, assistant], ...}. Turns are
    compared by role and content alone: a table gives them other keys, and the copy of a text may have been stripped.
    """
    if prompt is None or isinstance(response, str):
        return prompt, response
    before, turns = ([(m["role"], m["content"].strip()) for m in as_messages(x, "user")] for x in (prompt, response))
    if turns[0][0] == "assistant" and turns[: len(before)] != before:
        return prompt, response  # it goes on from the prompt
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
    return prompt, response  # of a system message, say


def _asked(pairs: list[tuple[chat.Text | None, chat.Text]]) -> tuple[tuple[str, str], ...]:
    """Role and text of every turn that the responses answer: the prompt, or without one the turns that they share. ()
    where none of them is a user's, as without a prompt to texts."""
    if (prompt := pairs[0][0]) is not None:
        conversations = [as_messages(prompt, "user")]
    elif any(isinstance(response, str) for _, response in pairs):
        return ()
    else:
        conversations = [response[:-1] for _, response in pairs]
    text = lambda content: content if isinstance(content, str) else repr(content)  # noqa: E731
    turns = [[(m["role"], text(m["content"])) for m in messages] for messages in conversations]
    shared = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, zip(*turns, strict=False))]
    return tuple(shared) if any(role == "user" and text for role, text in shared) else ()


def _check_prompt_is_read(record: dict, responses: list, name: str, i: int) -> None:
    """ConfigError for responses of text, without a prompt, to what stands in a column that nothing would read."""
    for key in ("question", "instruction", "input"):
        asked = record.get(key)
        if isinstance(asked, str) and any(isinstance(r, str) and asked.strip() not in r for r in responses):
            raise ConfigError(
                f"{name} record {i} has no 'prompt', and a column {key!r} that its responses do not hold: rename it to "
                "'prompt' (with the text of other columns that belongs to it), or leave it out"
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


ON_OVERLONG = ("error", "skip", "keep_start", "keep_end")


def _limited(
    examples: dict[int, list], report: Report, on_overlong: str, cuts: dict[str, Callable] | None = None
) -> list:
    """The sequences of the records to use, in order, {index: [sequence, ...]}; what is too long goes to the report.

    cuts: {on_overlong: sequence -> a shorter one, or None where nothing would be left to learn from}.
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
            f"{report.name}: every record is {report.named_overlong().split(' ', 1)[1]}; raise {report.setting}"
        )
    return used


def sft_examples(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "train_dataset"
) -> tuple[list[Encoded], Report]:
    """SFT records -> encoded sequences. ConfigError names a record in the wrong form, or too long under "error".

    on_overlong: "error"; "skip" leaves the record out; "keep_start" cuts its end (a response then has no eos to learn),
    "keep_end" its beginning (a bos stays). A record with no learned token left is left out. The report counts each.
    """
    records = as_records(dataset, name)
    encoded: dict[int, list[Encoded]] = {}
    for i, record in enumerate(tqdm(records, desc=f"encoding {name}", disable=None, leave=False)):
        if "messages" in record:
            prompt, completion = None, _text_or_messages(record, "messages", name, i, text=False)
        elif "prompt" in record and "completion" in record:
            prompt, completion = (_text_or_messages(record, key, name, i) for key in ("prompt", "completion"))
        elif isinstance(record.get("text"), str):
            prompt, completion = "", _text_or_messages(record, "text", name, i)
        else:
            raise _wrong_columns(record, name, i, SFT_FORMATS)
        _check_template_only(record, name, i)
        prompt, completion = _split_prompt(prompt, completion, name, i)
        conversational = not (isinstance(prompt, str) and isinstance(completion, str))
        chat.check_tokenizer(tokenizer, conversational)
        if conversational:
            before = as_messages(prompt, "user")
            messages = before + as_messages(completion, "assistant")
            with placed(name, i):
                encoded[i] = chat.encode_conversation(tokenizer, messages, len(before))
        else:
            encoded[i] = [chat.encode_response(tokenizer, prompt, completion)]
        if not any(e.num_labels for e in encoded[i]):
            raise ConfigError(
                f"{name} record {i} has no response (assistant turn), so there is nothing to learn from it"
            )
    unwritten = {i: list(chain(*(e.unwritten for e in examples))) for i, examples in encoded.items()}
    warn_of_unwritten(unwritten, name, "learned")
    report = Report(name, len(records), max_length=max_length)

    def only(example: Encoded, kept) -> Encoded | None:
        example = Encoded(example.input_ids[kept], example.response_mask[kept])
        return example if example.num_labels else None

    def end(example: Encoded) -> Encoded | None:
        bos = int(example.input_ids[0] == tokenizer.bos_token_id)
        return only(example, np.r_[:bos, len(example) - max_length + bos : len(example)])

    cuts = {"keep_start": lambda example: only(example, slice(max_length)), "keep_end": end}
    return _limited(encoded, report, on_overlong, cuts), report


def warn_of_unwritten(unwritten: dict[int, chat.Said], name: str, use: str, unit: str = "record") -> None:
    """Warns once of each key of the assistant turns that the chat template leaves out, by design or not.

    unwritten: of every unit ("record", "response"), by its index. use: what it would have been, "learned" or "scored".
    """
    found: dict[str, dict[int, str]] = {}
    for i, lost in unwritten.items():
        for key, part in lost:
            found.setdefault(key, {}).setdefault(i, part)
    for key, parts in found.items():
        i, part = next(iter(parts.items()))
        warnings.warn(
            f"{name}: in {len(parts)} of {len(unwritten)} {unit}s the chat template leaves out {key!r} of an assistant "
            f"turn, or a part of it, so it is not {use}: in {unit} {i} {part.strip()[:80]!r}. Set "
            "tokenizer.chat_template to one that writes it, or take it out of the data",
            stacklevel=3,
        )


def responses_of(record: dict, name: str, i: int) -> list[tuple[chat.Text | None, chat.Text]]:
    """(prompt, response) of each response to score in a record of any format, or {"prompt": ..., "response": ...}."""
    _check_template_only(record, name, i)
    prompt = _text_or_messages(record, "prompt", name, i) if record.get("prompt") is not None else None
    if "chosen" in record and "rejected" in record:
        responses = [_text_or_messages(record, key, name, i) for key in ("chosen", "rejected")]
    elif isinstance(record.get("responses"), list) and record["responses"]:
        responses = [_text_or_messages({"responses": r}, "responses", name, i) for r in record["responses"]]
    elif "messages" in record:
        messages = _text_or_messages(record, "messages", name, i, text=False)
        return [(messages[:-1], messages[-1:])]
    elif key := next((key for key in ("response", "completion", "text") if key in record), None):
        responses = [_text_or_messages(record, key, name, i)]
    else:
        accepted = f'{PREFERENCE_FORMATS}, {SFT_FORMATS} or {{"prompt": ..., "response": ...}}'
        raise _wrong_columns(record, name, i, accepted)
    if prompt is None and "text" not in record:  # which is the whole
        _check_prompt_is_read(record, responses, name, i)
    return [_split_prompt(prompt, response, name, i) for response in responses]


def responses_to_score(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "reference_dataset"
) -> tuple[list[np.ndarray], Report]:
    """Every response in records of any format (responses_of), encoded to be scored. Raises ConfigError as sft_examples
    does; on_overlong "keep_end" cuts the beginning."""
    records = as_records(dataset, name)
    encoded: dict[int, list[np.ndarray]] = {}
    unwritten: dict[int, chat.Said] = {i: [] for i in range(len(records))}
    for i, record in enumerate(records):
        asked = responses_of(record, name, i)
        chat.check_tokenizer(tokenizer, any(map(is_conversation, chain(*asked))))
        with placed(name, i):
            encoded[i] = [chat.encode_to_score(tokenizer, *pair, unwritten=unwritten[i]) for pair in asked]
    warn_of_unwritten(unwritten, name, "scored")
    report = Report(name, len(records), max_length=max_length)

    def end(ids: np.ndarray) -> np.ndarray:
        bos = int(ids[0] == tokenizer.bos_token_id)
        return np.r_[ids[:bos], ids[len(ids) - max_length + bos :]]

    return _limited(encoded, report, on_overlong, {"keep_end": end}), report


def as_pairs(records: Iterable[dict]) -> list[dict]:
    """Comparisons as rows of chosen and rejected, with their other columns: every ordered pair of ranked responses."""
    rows = []
    for record in records:
        if "chosen" in record:
            rows.append(record)
            continue
        responses, ranks = _ranked(record, "dataset", len(rows))
        rows += [
            {**record, "chosen": responses[a], "rejected": responses[b]}
            for a, b in combinations(range(len(ranks)), 2)
            if ranks[a] < ranks[b]
        ]
    return rows


def comparisons(
    dataset, tokenizer, *, max_length: int, on_overlong: str = "error", name: str = "train_dataset"
) -> tuple[list[Comparison], Report]:
    """Pairs or ranked responses -> encoded comparisons. Raises ConfigError as sft_examples does.

    on_overlong "keep_end" cuts the same tokens from the beginning of all responses of a prompt, so that they still
    answer the same; where they differ there already, the record is left out.
    """
    records = as_records(dataset, name)
    encoded: dict[int, Comparison] = {}
    first: dict = {}  # prompt -> index
    unwritten: dict[int, chat.Said] = {i: [] for i in range(len(records))}
    for i, record in enumerate(tqdm(records, desc=f"encoding {name}", disable=None, leave=False)):
        prompt = _text_or_messages(record, "prompt", name, i) if record.get("prompt") is not None else None
        if "chosen" in record and "rejected" in record:
            responses = [_text_or_messages(record, key, name, i) for key in ("chosen", "rejected")]
            ranks = [0, 1]
        elif "responses" in record:
            responses, ranks = _ranked(record, name, i)
        else:
            raise _wrong_columns(record, name, i, PREFERENCE_FORMATS)
        _check_template_only(record, name, i)
        extra = {k: _number(record, k, name, i) for k in _PAIR_COLUMNS if record.get(k) is not None}
        if prompt is None:
            _check_prompt_is_read(record, responses, name, i)
        pairs = [_split_prompt(prompt, response, name, i) for response in responses]
        if not 0 <= extra.get("chosen_prob", 1.0) <= 1 or extra.get("weight", 1.0) < 0:
            raise ConfigError(f"{name} record {i}: chosen_prob must lie in [0, 1] and weight be 0 or more, got {extra}")
        if len(responses) == 2 and extra.get("chosen_prob", 1.0) < 0.5:  # the same loss, said of the other side
            pairs, extra["chosen_prob"] = pairs[::-1], 1 - extra["chosen_prob"]
            extra["margin"] = -extra.get("margin", 0.0)
        source = record.get("source")
        if not isinstance(source, str | None):
            raise ConfigError(f"{name} record {i}: 'source' must be text, by which evaluation is split, got {source!r}")
        chat.check_tokenizer(tokenizer, any(map(is_conversation, chain(*pairs))))
        with placed(name, i):
            sequences = [chat.encode_to_score(tokenizer, *pair, unwritten=unwritten[i]) for pair in pairs]
        encoded[i] = Comparison(
            sequences, ranks, **extra, source=source, index=i, prompt=first.setdefault(_asked(pairs) or i, i),
            texts=[response for _, response in pairs],
        )  # fmt: skip
    warn_of_unwritten(unwritten, name, "scored")
    report = Report(name, len(records), max_length=max_length)

    def end(item: Comparison) -> Comparison | None:
        bos = int(all(r[0] == tokenizer.bos_token_id for r in item.responses))
        start = len(item) - max_length + bos
        same = all(len(r) > start and np.array_equal(r[:start], item.responses[0][:start]) for r in item.responses)
        return replace(item, responses=[np.r_[r[:bos], r[start:]] for r in item.responses]) if same else None

    return _limited({i: [item] for i, item in encoded.items()}, report, on_overlong, {"keep_end": end}), report


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
        with placed(name, i):
            tokens = chat.encode_prompt(tokenizer, prompt)
        if not tokens:
            raise ConfigError(
                f"{name} record {i}: its prompt {prompt!r} has no tokens, so there is nothing to go on from"
            )
        encoded[i] = Prompt(prompt, tokens, {key: record.get(key) for key in columns})
    report = Report(name, len(records), max_length=max_length, setting="max_prompt_length")
    return _limited({i: [p] for i, p in encoded.items()}, report, on_overlong), report


_PAIR_COLUMNS = ("margin", "chosen_prob", "weight")


def _ranked(record: dict, name: str, i: int) -> tuple[list, list[int]]:
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
    checked = [_text_or_messages({"responses": r}, "responses", name, i) for r in responses]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return [checked[j] for j in order], [ranks[j] for j in order]

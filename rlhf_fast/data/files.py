"""Reads records from files, directories, names of datasets, lists and tables."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import numpy as np
import yaml

from ..errors import ConfigError

_FILES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}  # suffix -> builder of datasets


def read_dataset(source) -> list[dict]:
    """Records, from any of:

    - a list or a datasets.Dataset, which is returned unchanged
    - a file: .jsonl, .jsonl.gz, .json, .parquet, .csv, .arrow
    - a directory of Dataset.save_to_disk
    - a name for datasets.load_dataset, or a directory of DatasetDict.save_to_disk. These have splits: "name" is the
      split train, "name:test" the split test
    """
    if not isinstance(source, (str, Path)):
        return source
    if source == "":
        raise ConfigError("the name of a dataset is empty: give a file, a directory or a name on the hub")
    path = Path(source)
    # os.path, because pathlib raises for a name that is too long. Spark writes directories with a file's ending.
    suffix = "" if os.path.isdir(path) else path.suffix
    json_like = suffix in (".jsonl", ".json") or (suffix == ".gz" and path.name.endswith(".jsonl.gz"))
    if (json_like or suffix in _FILES) and not os.path.isfile(path):
        raise ConfigError(f"dataset file {str(source)!r} does not exist: looked for {str(path.absolute())!r}")
    if json_like:
        return _read_json(path)

    # A split begins with a letter or digit, so hf://... and C:\... are not taken for one.
    named = None if os.path.exists(path) else re.fullmatch(r"(.+?):(\w[\w\[\]:%+-]*)", str(source))
    name, split = named.groups() if named else (str(source), "train")
    if name.endswith(".py"):  # datasets 3 would ask on the terminal, and leave an alarm that fires later
        raise ConfigError(f"dataset {str(source)!r} is a script, which is never run: give the files that it reads")
    if os.path.isfile(name) and suffix not in _FILES:
        raise ConfigError(
            f"dataset file {str(source)!r} has an ending that is not read: give a .jsonl, .jsonl.gz, .json, "
            f"{', '.join(_FILES)} file"
        )
    import datasets  # takes a second to import, and lists do not need it

    try:
        if suffix in _FILES:
            return datasets.load_dataset(_FILES[suffix], data_files=str(path), split="train")
        if os.path.isfile(path / "state.json"):
            return datasets.load_from_disk(str(path))
        if os.path.isfile(saved := Path(name, "dataset_dict.json")):  # datasets 3 would read its other files as records
            parts = {part: f"{name}/{part}/*.arrow" for part in json.loads(saved.read_text())["splits"]}
            return datasets.load_dataset("arrow", data_files=parts, split=split)
        return datasets.load_dataset(name, split=split, trust_remote_code=False)  # datasets 3 runs scripts, or asks
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ConfigError(f"dataset {str(source)!r} cannot be loaded: {_why_not_loaded(name, error)}") from error


def _why_not_loaded(name: str, error: Exception) -> str:
    """What an error of the datasets library means for whoever gave this name of a dataset."""
    import datasets

    generating = isinstance(error, datasets.exceptions.DatasetGenerationError)  # says no more than that
    reason = " ".join(str(error.__cause__ if generating and error.__cause__ else error).split())
    if isinstance(error, FileNotFoundError):
        needs = "a directory must hold data files, or what Dataset.save_to_disk writes; "
        return needs + reason if os.path.isdir(name) else reason
    cache, at = Path(datasets.config.HF_DATASETS_CACHE), Path(str(getattr(error, "filename", None)))
    if isinstance(error, OSError) and (at == cache or at in cache.parents or cache in at.parents):
        reason += ": datasets keeps what it has read there; set HF_HOME to a directory that can be written"
    return reason


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that occurs twice in a mapping is a ValueError, where PyYAML silently keeps the last, and in
    which 1e-9 is a number, as in YAML 1.2, where PyYAML reads text."""

    def __init__(self, stream):
        super().__init__(stream)
        self._checked: set[int] = set()  # ids of nodes, all of which live as long as the document is read

    def flatten_mapping(self, node):
        """Puts the keys of `<<: *anchor` before those of the mapping, which override them. This is called for every
        mapping, and again for one that is merged into others, whose keys are not its own any more."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            once([self.construct_object(key, deep=True) for key in own], f"line {node.start_mark.line + 1}: ")
        super().flatten_mapping(node)


UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def once(keys: list, where: str = "") -> None:
    if repeated := [key for i, key in enumerate(keys) if key in keys[:i]]:
        raise ValueError(f"{where}field {repeated[0]!r} occurs twice")


def open_text(path: str | Path) -> TextIO:
    """Opens a text file for reading, decompressed if its name ends in .gz. It may begin with a byte order mark."""
    opener = gzip.open if str(path).endswith(".gz") else open
    # Only "\n" ends a line: str.splitlines would also split at the U+2028 and U+0085 that JSON allows inside texts.
    return opener(path, "rt", encoding="utf-8-sig", newline="\n")


def _read_json(path: Path) -> list[dict]:
    try:
        with open_text(path) as file:
            if path.suffix != ".json":
                return parse_jsonl(file, str(path))
            text = file.read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from None
    except (OSError, EOFError) as error:  # EOFError: a gzip file that was cut
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return _parse(text, str(path), 1, "a .json file holds one list of records; with a record per line it is a .jsonl")


def parse_jsonl(lines: Iterable[str], name: str) -> list:
    """One JSON value per line; empty lines are skipped. ConfigError names the first line that is not JSON. The lines
    are read one at a time, because as a whole they may take several times the memory of the records."""
    form = "each line must be a whole record"
    return [_parse(row.removesuffix("\n"), name, i, form) for i, row in enumerate(lines, 1) if row.strip()]


def _parse(text: str, name: str, line: int, form: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}, line {line + error.lineno - 1}: not JSON ({error.msg}); {form}") from None
    except (ValueError, RecursionError) as error:  # more than 4300 digits; brackets in a thousand others
        raise ConfigError(f"{name}, what begins on line {line}: cannot be read ({error})") from None


def as_records(dataset, name: str) -> list[dict]:
    """as_rows, where every row must be a dict. ConfigError if one is not, or if there are none."""
    records = as_rows(dataset, name)
    if not records:
        raise ConfigError(f"{name} is empty: give at least one record (an eval_dataset may be left out)")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ConfigError(f"{name} record {i} must be a dict, got {type(record).__name__}")
    return records


def as_rows(dataset, name: str) -> list:
    """The rows of a list, a datasets.Dataset, a DataFrame, an Arrow table, or anything else that is iterated or indexed
    by row. ConfigError for everything else, such as a dict, whose iterator would give its keys."""
    is_table = any(hasattr(dataset, kind) for kind in ("column_names", "iterrows", "read_all", "to_pylist"))
    if hasattr(dataset, "to_dict") and hasattr(dataset, "iterrows"):
        dataset = dataset.astype(object).where(dataset.notna(), None).to_dict("records")  # pandas marks gaps with NaN
    if hasattr(dataset, "read_all"):  # Arrow's reader
        dataset = dataset.read_all()
    if hasattr(dataset, "to_pylist"):
        dataset = dataset.to_pylist()
    if isinstance(dataset, dict):
        splits = [str(key) for key, value in dataset.items() if _holds_records(value)]
        raise ConfigError(
            f"{name} must be a list of dicts or a datasets.Dataset, got {type(dataset).__name__}: give "
            + (f"one of its datasets ({', '.join(splits)})" if splits else "datasets.Dataset.from_dict of columns")
        )
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")  # torch's Subset has no iterator
    if not (indexed or isinstance(dataset, Iterable)) or isinstance(dataset, str):
        hint = ": rlhf_fast.data.files.read_dataset reads files" if isinstance(dataset, (str, Path)) else ""
        raise ConfigError(f"{name} must be a list of dicts or a datasets.Dataset, got {type(dataset).__name__}{hint}")
    rows = list(dataset if isinstance(dataset, Iterable) else map(dataset.__getitem__, range(len(dataset))))
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            continue
        readable = {
            key: _readable(row[key], is_table) for key in _CONVERSATIONS if not isinstance(row.get(key, ""), str)
        }
        if any(value is not row[key] for key, value in readable.items()):
            rows[i] = row | readable
    return rows


def _holds_records(value) -> bool:
    return hasattr(value, "column_names") or (isinstance(value, list) and all(isinstance(x, dict) for x in value))


_CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected", "response", "responses")


def _readable(value, is_table: bool):
    """Turns arrays back into the lists that they were before pandas read them from a table. A turn that only calls
    tools gets empty text as its content, which OpenAI's format leaves out or sets to null.

    Other keys of a turn that hold None are left out, because templates ask which keys a turn has. All rows of a table
    have the same keys, so there those within a turn are left out too, such as an argument that only another call has.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        parts = [_readable(x, is_table) for x in value]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
    if isinstance(value, dict):
        parts, is_turn = {key: _readable(x, is_table) for key, x in value.items()}, "role" in value
        if parts.get("role") == "assistant" and parts.get("tool_calls") and parts.get("content") is None:
            parts["content"] = ""
        if is_turn or is_table:
            parts = {key: x for key, x in parts.items() if x is not None or (is_turn and key == "content")}
        same = parts.keys() == value.keys() and all(parts[key] is x for key, x in value.items())
        return value if same else parts
    return value

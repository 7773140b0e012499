"""A stage that may be killed at any moment: its questions are in its ledger, and its files are derived from that.

    <output_dir>/ledger.sqlite   every question to a model and its answer (ledger.py)
    <output_dir>/<name>.jsonl    one record per item, in the order of the items, written in one go when all are done
    <output_dir>/run.json        the settings of the stage; another run in the same directory is refused, not mixed in

A second run processes the same items in the same batches, takes existing answers from the ledger and asks for the rest.
Seeds belong to items, so the final bytes do not depend on whether, or where, the run was interrupted.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..data.checks import check_encodable
from ..data.files import as_rows
from ..disk import json_line, make_directory, read_json, write_atomic, write_json
from ..errors import ConfigError
from .ledger import Ledger


def seed_for(run_seed: int, *names: object) -> int:
    """A seed of 63 bits that depends on the run and on the item, but not on the order of the items."""
    digest = hashlib.blake2b(json.dumps([run_seed, *names]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class Stage:
    """The result of a stage. counts["inputs"] is the sum of the other counts."""

    records: list[dict]  # one per input, in the order of the inputs
    rows: list[dict]  # for the next trainer
    rejected: list[dict]  # not for the trainer, each with its reason
    counts: dict[str, int]
    output_dir: Path


def read_items(rows: Iterable, texts: Sequence[str] = ()) -> list[dict]:
    """Rows (or bare prompts) -> {"id", "prompt" as messages, and the named text columns}.

    A row without "id" gets a hash of its content, with a counter appended if it occurs again. Raises ConfigError for a
    missing column, a prompt that is not text or messages of system, user and assistant, a prompt that does not end with
    the user, half a character, an id that occurs twice, or no rows at all.
    """
    items, seen = [], Counter()
    for i, row in enumerate(as_rows(rows, "rows")):
        row = row if isinstance(row, dict) else {"prompt": row}
        item = _item(row, i, texts)
        content = json.dumps(item, sort_keys=True, ensure_ascii=False, default=str)  # str: dates in messages
        check_encodable(content, f"row {i}")
        given = row.get("id")  # None in a table where only other rows have one
        name = hashlib.blake2b(content.encode(), digest_size=8).hexdigest() if given is None else str(given)
        seen[name] += 1
        if seen[name] > 1:
            if given is not None:
                raise ConfigError(
                    f"row {i}: id {name!r} occurs twice; ids name items in the records and must be unique"
                )
            name = f"{name}-{seen[name]}"
        items.append({"id": name, **item})
    if not items:
        raise ConfigError("no rows: there is nothing to answer or to compare")
    return items


def _item(row: dict, i: int, texts: Sequence[str]) -> dict:
    """{"prompt" as messages, and the named text columns} of one row, checked."""
    if missing := {"prompt", *texts} - set(row):
        raise ConfigError(f"row {i} has no {sorted(missing)}; it has {sorted(row)}")
    if not all(isinstance(row[name], str) for name in texts):
        raise ConfigError(f"row {i}: {list(texts)} must be text, got {[type(row[name]).__name__ for name in texts]}")
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if wrong := [m for m in messages if not _is_message(m)] if isinstance(messages, list) else [messages]:
        raise ConfigError(
            f"row {i}: a message of the prompt is {wrong[0]!r}; it needs a role (system, user or assistant) and a "
            "content of text"
        )
    if not messages or messages[-1]["role"] != "user":
        raise ConfigError(f"row {i}: the prompt must end with a user message, it ends with {messages[-1:]}")
    return {"prompt": messages, **{name: row[name] for name in texts}}


def _is_message(message) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
    )


def run_stage(
    ledger: Ledger, name: str, items: Sequence[dict], work: Callable[[list[dict]], list[dict]], *, settings: dict,
    batch_size: int, output_dir: str | Path | None = None,
) -> list[dict]:  # fmt: skip
    """Applies `work` to batches of items with an "id". It returns one record per item, with the same "id".

    `work` puts its questions to models through the ledger, so that they cost nothing a second time. Writes all records
    into output_dir (None: the ledger's directory) and returns them. Raises ConfigError if it holds another run.
    """
    if batch_size < 1:
        raise ConfigError(f"{name}: batch_size = {batch_size} must be 1 or more")
    output_dir, ids = Path(output_dir or ledger.directory), [item["id"] for item in items]
    make_directory(output_dir)
    # A digest of whole items, not of their ids: pairs have the ids of their prompts, whatever the answers.
    digest = hashlib.sha256()
    for item in items:
        digest.update(json_line(item).encode())
    claimed = {**settings, "items": len(ids), "data_sha256": digest.hexdigest()}
    claim(output_dir / "run.json", {"stage": name, "settings": claimed})
    records: list[dict] = []
    with tqdm(total=len(ids), desc=name, unit="item", disable=None) as bar:
        for start in range(0, len(items), batch_size):
            try:
                done = work(list(items[start : start + batch_size]))
            except KeyboardInterrupt:
                tqdm.write(
                    f"{name}: stopped after {start} of {len(ids)} items; {ledger.directory}/ledger.sqlite has every "
                    "answer, and the same call continues from there"
                )
                raise
            if [r["id"] for r in done] != ids[start : start + batch_size]:
                raise RuntimeError(f"{name}: a batch must give one record for each of its items, in their order")
            tenths = 10 * len(records) // len(ids)
            records += done
            bar.update(len(done))
            if bar.disable and 10 * len(records) // len(ids) > tenths:  # as in a batch job
                print(f"{name} {len(records)}/{len(ids)}", file=sys.stderr, flush=True)
    write_atomic(output_dir / f"{name}.jsonl", map(json_line, records))
    return records


def finish_stage(
    output_dir: str | Path, records: list[dict], row_of: Callable[[dict], list[dict]], *, used: Sequence[str],
    refused: Sequence[str], name: str,
) -> Stage:  # fmt: skip
    """Writes the rows for training (row_of every record with a status in `used`) to `<name>.jsonl`, the records with a
    status in `refused` to `rejected.jsonl`, each file atomically, and the counts into run.json.

    Raises RuntimeError for any other status, because the counts would then not add up.
    """
    output_dir, statuses = Path(output_dir), Counter(record["status"] for record in records)
    if unknown := set(statuses) - {*used, *refused}:
        raise RuntimeError(f"{output_dir}: records have statuses {sorted(unknown)}, needs one of {[*used, *refused]}")
    counts = {"inputs": len(records), **{status: statuses[status] for status in (*used, *refused)}}
    rows = [row for record in records if record["status"] in used for row in row_of(record)]
    rejected = [record for record in records if record["status"] in refused]
    write_atomic(output_dir / f"{name}.jsonl", map(json_line, rows))
    write_atomic(output_dir / "rejected.jsonl", map(json_line, rejected))
    write_json(output_dir / "run.json", read_json(output_dir / "run.json") | {"counts": counts})
    return Stage(records, rows, rejected, counts, output_dir)


def claim(run_json: Path, manifest: dict) -> None:
    """Starts a run, or checks that this is the run that was started here."""
    if not run_json.exists():
        write_json(run_json, manifest)
        return
    old = read_json(run_json)
    wanted = json.loads(json.dumps(manifest))  # tuples become lists, as in the file
    before, now = {"stage": old["stage"], **old["settings"]}, {"stage": wanted["stage"], **wanted["settings"]}
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        what = "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in changed)
        raise ConfigError(f"{run_json}: output_dir holds another run ({what}); give another output_dir or remove it")

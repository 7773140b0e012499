"""Records every question put to a model or a server, and its answer, in SQLite: kill -9 loses no paid answer.

    key        blake2b of (backend, request): model and weights or server, prompt, labels, sampling, seed
    attempts   one row per try: key, sha256 of the prompt, status, answer, raw reply, reason, tokens, time
    status     started  ->  ok | refused | unparsed | too_long     answers, never asked for again
                        ->  failed                                 no answer; a later run asks again
                        ->  interrupted                            its process died before it saw an answer

A row is committed before its question is sent, and again when the answer arrives. Everything that a stage writes is
derived from these rows (stages.py). WAL with synchronous=NORMAL is safe if the process dies; a power cut may lose the
last few rows, whose questions are then asked again.
"""

import fcntl
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..disk import make_directory
from ..errors import ConfigError

ANSWERS = ("ok", "refused", "unparsed", "too_long")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS backends (id TEXT PRIMARY KEY, description TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attempts (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, backend TEXT NOT NULL, about TEXT NOT NULL, prompt_sha256 TEXT NOT NULL,
    status TEXT NOT NULL, value TEXT, reason TEXT, raw TEXT, http_status INTEGER,
    prompt_tokens INTEGER, completion_tokens INTEGER, started REAL NOT NULL, seconds REAL);
CREATE INDEX IF NOT EXISTS attempts_by_key ON attempts (key, id);
"""


@dataclass(frozen=True)
class Answer:
    """The outcome of one question. Only status "ok" has a value, and only it may become text or a label."""

    status: str  # "ok" | "refused" | "unparsed" | "too_long" | "failed"
    value: Any = None  # JSON
    reason: str = ""
    key: str = ""  # of its rows in the ledger


class Call(NamedTuple):
    """A call that was made before there was a ledger to record it."""

    request: dict
    answer: Answer
    started: float  # seconds since 1970
    seconds: float
    about: dict  # raw, http_status, prompt_tokens, completion_tokens, as far as they are known


class Usage(NamedTuple):
    """Totals over attempts. `requests` counts all that were started, whatever their outcome."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Backend(Protocol):
    """A model, a server or a function that answers requests."""

    def describe(self) -> dict:
        """JSON-ready, part of every key. Backends that may answer differently must have different descriptions."""
        ...

    def answer(self, requests: Sequence[dict], tries: "Tries") -> None:
        """Answers every request, through `tries.all` for a whole batch, or `begin` and `end` for single calls."""
        ...


class Tries:
    """Through this a backend records its tries and answers in the ledger. Threads may share it."""

    def __init__(self, ledger: "Ledger", requests: Sequence["_Request"], backend: str):
        self._ledger, self._requests, self._backend = ledger, requests, backend
        self.last: list[Answer | None] = [None] * len(requests)

    def usage(self) -> Usage:
        """The usage of this backend, including earlier runs."""
        return self._ledger.usage(self._backend)

    def begin(self, i: int) -> int:
        """Records that request i is about to be sent -> the number of the attempt."""
        request, now = self._requests[i], time.time()
        self._ledger._count(self._backend, 1)
        row = (request.key, self._backend, request.about, request.prompt_sha256, "started", now)
        with self._ledger.transaction() as db:
            return db.execute(
                "INSERT INTO attempts (key, backend, about, prompt_sha256, status, started) VALUES (?,?,?,?,?,?)", row
            ).lastrowid

    def end(
        self, attempt: int, i: int, answer: Answer, *, raw: str | None = None, http_status: int | None = None,
        prompt_tokens: int | None = None, completion_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """Records the outcome. A request may be begun again after "failed"; its last outcome counts."""
        answer = _as_read(answer, self._requests[i].key)
        with self._ledger.transaction() as db:
            db.execute(
                "UPDATE attempts SET status=?, value=?, reason=?, raw=?, http_status=?, prompt_tokens=?, "
                "completion_tokens=?, seconds=?-started WHERE id=?",
                (*_columns(answer), raw and _utf8(raw), http_status, prompt_tokens, completion_tokens, time.time(),
                 attempt),
            )  # fmt: skip
        self._ledger._count(self._backend, 0, prompt_tokens, completion_tokens)
        self.last[i] = answer

    def all(self, answers: Sequence[Answer]) -> None:
        """Records the answers to all requests in one transaction: after a crash all of them are there, or none."""
        now = time.time()
        ended = [(r, a, now, 0.0, {}) for r, a in zip(self._requests, answers, strict=True)]
        self.last = self._ledger._insert(self._backend, ended)


class _Request(NamedTuple):
    key: str
    prompt_sha256: str
    about: str


class Ledger:
    """The ledger of one directory, `directory/ledger.sqlite`. One process at a time can open it. A context manager.

    directory None keeps it in memory, for questions whose answers no later run needs.
    retry: statuses of earlier runs that are asked again. "refused", "unparsed" and "too_long" may be added to "failed".
    Raises ConfigError if another process has it open, or if the directory cannot be made.
    """

    def __init__(self, directory: str | Path | None, *, retry: Iterable[str] = ("failed",)):
        self.directory, self.retry = directory and Path(directory), frozenset(retry)
        if wrong := self.retry - {*ANSWERS[1:], "failed"}:
            raise ConfigError(f"retry: {sorted(wrong)} are not among failed, {', '.join(ANSWERS[1:])}")
        self._held = self._hold() if self.directory else None
        self._lock = threading.RLock()
        path = self.directory / "ledger.sqlite" if self.directory else ":memory:"
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.DatabaseError as error:  # for example, the path is a directory
            if self._held:
                self._held.close()
            raise ConfigError(f"{path} cannot be used: {error}") from None
        try:
            self._open()
        except sqlite3.DatabaseError as error:  # not a database, damaged, or on a disk that is full or read-only
            self.close()
            raise ConfigError(f"{path} cannot be used: {error}") from None

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        self._db.execute("UPDATE attempts SET status='interrupted' WHERE status='started'")
        (self._opened_after,) = self._db.execute("SELECT coalesce(max(id), 0) FROM attempts").fetchone()
        self._used = {who: Usage(*used) for who, *used in self._db.execute(
            "SELECT backend, count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0) "
            "FROM attempts GROUP BY backend"
        )}  # fmt: skip

    def _hold(self):
        make_directory(self.directory)
        held = open(self.directory / "ledger.lock", "a")  # noqa: SIM115  closing the file, or dying, releases the lock
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.close()
            raise ConfigError(f"{self.directory}: another process is using it; wait for it or stop it") from None
        return held

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()
        if self._held:
            self._held.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commits as a whole, or not at all; one at a time."""
        with self._lock, self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db

    def ask(self, backend: Backend, requests: Sequence[dict]) -> list[Answer]:
        """One answer per request, in order: from the ledger if it has one, otherwise from `backend`.

        A request is {"prompt": str | messages, ...} and must be JSON. "about" names it for people and is not part of
        the key. Equal requests are asked once.
        """
        if not requests:  # describing a model reads all its weights
            return []
        who = self._register(backend)
        described = [_request(who, request) for request in requests]
        answers = self._answered([r.key for r in described])
        missing = {r.key: i for i, r in reversed(list(enumerate(described))) if r.key not in answers}
        which = sorted(missing.values())
        if which:
            tries = Tries(self, [described[i] for i in which], who)
            backend.answer([requests[i] for i in which], tries)
            for i, answer in zip(which, tries.last, strict=True):
                if answer is None:
                    raise RuntimeError(f"{backend.describe()}: ended without an answer to {described[i].about!r}")
                answers[described[i].key] = answer
        return [answers[r.key] for r in described]

    def note(self, backend: Backend, calls: Iterable[Call]) -> None:
        """Records earlier calls, such as a probe of the server. They count as usage, and answer no request."""
        who = self._register(backend)
        self._insert(who, [(_request(who, {**c.request, "started": c.started}), *c[1:]) for c in calls])

    def _insert(self, who: str, ended: Sequence[tuple["_Request", Answer, float, float, dict]]) -> list[Answer]:
        """Records attempts that have ended, given as (request, answer, started, seconds, about) -> the answers."""
        answers, rows = [], []
        for request, answer, started, seconds, about in ended:
            answers.append(_as_read(answer, request.key))
            raw, *more = (about.get(name) for name in ("raw", "http_status", "prompt_tokens", "completion_tokens"))
            rows.append((*request, who, *_columns(answers[-1]), raw and _utf8(raw), *more, started, seconds))
        with self.transaction() as db:
            db.executemany(
                "INSERT INTO attempts (key, prompt_sha256, about, backend, status, value, reason, raw, http_status, "
                "prompt_tokens, completion_tokens, started, seconds) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                rows,
            )
        for *_, about in ended:
            self._count(who, 1, about.get("prompt_tokens"), about.get("completion_tokens"))
        return answers

    def _register(self, backend: Backend) -> str:
        """Stores the description of a backend -> its id."""
        description = _dump(backend.describe())
        who = hashlib.blake2b(description.encode(), digest_size=16).hexdigest()
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO backends VALUES (?, ?)", (who, description))
        return who

    def _answered(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The recorded answers to these keys, except those of earlier runs that are to be asked again."""
        found: dict[str, Answer] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks, statuses = ",".join("?" * len(part)), (*ANSWERS, "failed")
            rows = self._db.execute(
                f"SELECT id, key, status, value, reason FROM attempts WHERE key IN ({marks}) AND status IN "
                f"({','.join('?' * len(statuses))}) ORDER BY id",
                (*part, *statuses),
            )
            for number, key, status, value, reason in rows:
                if number > self._opened_after or status not in self.retry:
                    found[key] = Answer(status, None if value is None else json.loads(value), reason or "", key)
        return found

    def usage(self, backend: str) -> Usage:
        """The usage of the backend with this id."""
        with self._lock:
            return self._used.get(backend, Usage())

    def _count(
        self, backend: str, requests: int, prompt_tokens: int | None = None, completion_tokens: int | None = None
    ) -> None:
        with self._lock:
            more, used = (requests, prompt_tokens or 0, completion_tokens or 0), self._used.get(backend, Usage())
            self._used[backend] = Usage(*map(sum, zip(used, more, strict=True)))


def _dump(value: Any) -> str:
    return _utf8(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str))  # str: dates in messages


def _utf8(text: str) -> str:
    """The text, encodable: a reply may contain half a surrogate pair, a file cannot."""
    return text.encode("utf-8", "replace").decode()


def _as_read(answer: Answer, key: str) -> Answer:
    """The answer as a later run will read it from the ledger, so that this run sees the same."""
    return Answer(answer.status, json.loads(_dump(answer.value)), _utf8(answer.reason), key)


def _columns(answer: Answer) -> tuple[str, str, str]:
    return answer.status, _dump(answer.value), answer.reason


def _request(who: str, request: dict) -> _Request:
    asked = {name: value for name, value in request.items() if name != "about"}
    key = hashlib.blake2b(f"{who}{_dump(asked)}".encode(), digest_size=16).hexdigest()
    return _Request(key, hashlib.sha256(_dump(asked["prompt"]).encode()).hexdigest(), str(request.get("about", "")))

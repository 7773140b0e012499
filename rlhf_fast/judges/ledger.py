"""Every question put to a model or a server, and what came of it, in SQLite: kill -9 loses nothing that was paid for.

    key        blake2b of (who is asked, request): model and weights or server, prompt, labels, sampling, seed
    attempts   one row a try: key, sha256 of the prompt, status, answer, raw reply, reason, tokens, time
    status     started  ->  ok | refused | unparsed | too_long     answers, never asked for again
                        ->  failed                                 no answer; a later run asks again
                        ->  interrupted                            its process died before it saw an answer

A row is committed before its question is sent and again when the answer is there. Whatever a stage writes is derived
from these rows (stages.py). WAL with synchronous=NORMAL: safe against the death of the process; a power cut may take
the last few rows, which are then asked again.
"""

import fcntl
import hashlib
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
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
    """What came of one question. Only status "ok" has a value, and only it may become text or a label."""

    status: str  # "ok" | "refused" | "unparsed" | "too_long" | "failed"
    value: Any = None  # JSON
    reason: str = ""
    key: str = ""  # of the ledger's rows that it stands in


class Call(NamedTuple):
    """A call that was made before there was a ledger to write it down in."""

    request: dict
    answer: Answer
    started: float  # seconds since 1970
    seconds: float
    about: dict  # raw, http_status, prompt_tokens, completion_tokens: what is known of them


class Usage(NamedTuple):
    """What attempts came to; `requests` are all that were started, whatever came of them."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Backend(Protocol):
    """Whoever answers: a model, a server, a function."""

    def describe(self) -> dict:
        """JSON-ready, part of every key: two that may answer differently describe themselves differently."""
        ...

    def answer(self, requests: Sequence[dict], tries: "Tries") -> None:
        """Ends every request: `tries.all` for a batch that is answered at once, `begin` and `end` for single calls."""
        ...


class Tries:
    """How a backend tells the ledger what it does with the requests that it was given. Threads may share it."""

    def __init__(self, ledger: "Ledger", requests: Sequence["_Request"], backend: str):
        self._ledger, self._requests, self._backend = ledger, requests, backend
        self.last: list[Answer | None] = [None] * len(requests)

    def usage(self) -> Usage:
        """Of this backend, earlier runs included."""
        return self._ledger.usage(self._backend)

    def begin(self, i: int) -> int:
        """Request i is about to be sent."""
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
        """What came of it. A request may be begun again after "failed"; what it ended with last counts."""
        answer = _as_read(answer, self._requests[i].key)
        with self._ledger.transaction() as db:
            db.execute(
                "UPDATE attempts SET status=?, value=?, reason=?, raw=?, http_status=?, prompt_tokens=?, "
                "completion_tokens=?, seconds=?-started WHERE id=?",
                (answer.status, _dump(answer.value), answer.reason, raw and _utf8(raw), http_status, prompt_tokens,
                 completion_tokens, time.time(), attempt),
            )  # fmt: skip
        self._ledger._count(self._backend, 0, prompt_tokens, completion_tokens)
        self.last[i] = answer

    def all(self, answers: Sequence[Answer]) -> None:
        """All requests of the batch at once, in one transaction: after a crash they are all there, or none is."""
        if len(answers) != len(self._requests):
            raise RuntimeError(f"{len(self._requests)} questions, {len(answers)} answers")
        now, answers = time.time(), [_as_read(a, r.key) for r, a in zip(self._requests, answers, strict=True)]
        rows = [
            (r.key, self._backend, r.about, r.prompt_sha256, a.status, _dump(a.value), a.reason, now, 0.0)
            for r, a in zip(self._requests, answers, strict=True)
        ]
        with self._ledger.transaction() as db:
            db.executemany(
                "INSERT INTO attempts (key, backend, about, prompt_sha256, status, value, reason, started, seconds) "
                "VALUES (?,?,?,?,?,?,?,?,?)",
                rows,
            )
        self._ledger._count(self._backend, len(rows))
        self.last = answers


class _Request(NamedTuple):
    key: str
    prompt_sha256: str
    about: str


class Ledger:
    """The ledger of one directory, `directory/ledger.sqlite`; open in one process at a time. A context manager.

    directory None keeps it in memory, for questions that no run hangs on.
    retry: statuses of earlier runs that are asked again; "refused" and "unparsed" may be added to "failed".
    Raises ConfigError where another process has it open, or the directory cannot be made.
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
        except sqlite3.DatabaseError as error:  # a directory, say
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
        held = open(self.directory / "ledger.lock", "w")  # noqa: SIM115  the lock goes when the file is closed, or we die
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.close()
            raise ConfigError(f"{self.directory}: another process works in it; wait for it or stop it") from None
        return held

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()
        if self._held:
            self._held.close()

    def transaction(self) -> "_Transaction":
        return _Transaction(self._db, self._lock)

    def ask(self, backend: Backend, requests: Sequence[dict]) -> list[Answer]:
        """One answer a request, in their order: those that the ledger has, and `backend`'s for the others.

        A request is {"prompt": str | messages, ...}, JSON throughout; "about" names it for people and is not part of
        the key. Equal requests are asked once.
        """
        who = self._register(backend)
        described = [_request(who, request) for request in requests]
        known = self._known([r.key for r in described])
        missing = {r.key: i for i, r in reversed(list(enumerate(described))) if r.key not in known}
        which = sorted(missing.values())
        if which:
            tries = Tries(self, [described[i] for i in which], who)
            backend.answer([requests[i] for i in which], tries)
            for i, answer in zip(which, tries.last, strict=True):
                if answer is None:
                    raise RuntimeError(f"{backend.describe()}: ended without an answer to {described[i].about!r}")
                known[described[i].key] = answer
        return [known[r.key] for r in described]

    def note(self, backend: Backend, calls: Iterable[Call]) -> None:
        """Writes down calls of the past, such as a probe of the server: they count, and are the answer to nothing."""
        who = self._register(backend)
        for call in calls:
            key, prompt_sha256, about = _request(who, {**call.request, "started": call.started})
            more = [call.about.get(name) for name in ("raw", "http_status", "prompt_tokens", "completion_tokens")]
            answer = _as_read(call.answer, key)
            row = (key, who, about, prompt_sha256, answer.status, _dump(answer.value), answer.reason,
                   more[0] and _utf8(more[0]), *more[1:], call.started, call.seconds)  # fmt: skip
            with self.transaction() as db:
                db.execute(
                    "INSERT INTO attempts (key, backend, about, prompt_sha256, status, value, reason, raw, "
                    "http_status, prompt_tokens, completion_tokens, started, seconds) "
                    "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                    row,
                )
            self._count(who, 1, *more[2:])

    def _register(self, backend: Backend) -> str:
        """The id of a backend, whose description the ledger has from now on."""
        description = _dump(backend.describe())
        who = hashlib.blake2b(description.encode(), digest_size=16).hexdigest()
        with self.transaction() as db:
            db.execute("INSERT OR IGNORE INTO backends VALUES (?, ?)", (who, description))
        return who

    def _known(self, keys: Sequence[str]) -> dict[str, Answer]:
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

    def usage(self, backend: str | None = None) -> Usage:
        """Of all backends, or of the one with this id."""
        with self._lock:
            if backend is not None:
                return self._used.get(backend, Usage())
            return Usage(*map(sum, zip(Usage(), *self._used.values(), strict=True)))

    def _count(
        self, backend: str, requests: int, prompt_tokens: int | None = None, completion_tokens: int | None = None
    ) -> None:  # fmt: skip
        with self._lock:
            more, used = (requests, prompt_tokens or 0, completion_tokens or 0), self._used.get(backend, Usage())
            self._used[backend] = Usage(*map(sum, zip(used, more, strict=True)))

    def counts(self) -> Counter:
        """Attempts by status; they sum to `usage().requests`."""
        with self._lock:
            return Counter(dict(self._db.execute("SELECT status, count(*) FROM attempts GROUP BY status")))


class _Transaction:
    """Commits as a whole, or not at all; one at a time."""

    def __init__(self, db: sqlite3.Connection, lock: threading.RLock):
        self._db, self._lock = db, lock

    def __enter__(self) -> sqlite3.Connection:
        self._lock.acquire()
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def __exit__(self, kind, *_) -> None:
        try:
            self._db.execute("ROLLBACK" if kind else "COMMIT")
        finally:
            self._lock.release()


def _dump(value: Any) -> str:
    return _utf8(json.dumps(value, sort_keys=True, ensure_ascii=False))


def _utf8(text: str) -> str:
    """A reply may hold half of a surrogate pair; no file may."""
    return text.encode("utf-8", "replace").decode()


def _as_read(answer: Answer, key: str) -> Answer:
    """The answer as a later run reads it, so that this run does not see another."""
    return Answer(answer.status, json.loads(_dump(answer.value)), _utf8(answer.reason), key)


def _request(who: str, request: dict) -> _Request:
    asked = {name: value for name, value in request.items() if name != "about"}
    key = hashlib.blake2b(f"{who}{_dump(asked)}".encode(), digest_size=16).hexdigest()
    return _Request(key, hashlib.sha256(_dump(asked["prompt"]).encode()).hexdigest(), str(request.get("about", "")))

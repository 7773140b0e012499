"""The ledger: what was answered is not asked again, what failed is, and nothing is in between."""

import json
import os
import signal
import sqlite3
import threading

import pytest
from helpers import attempts

from rlhf_fast.judges.ledger import Answer, Ledger


class Echo:
    """Answers prompts with themselves, unless its script says otherwise; counts what it was asked."""

    def __init__(self, script=None, name="echo"):
        self.script, self.name, self.asked, self.usage = script or {}, name, [], None

    def describe(self):
        return {"name": self.name}

    def answer(self, requests, tries):
        self.asked += [r["prompt"] for r in requests]
        self.usage = tries.usage()  # before these
        tries.all([self.script.get(r["prompt"]) or Answer("ok", {"text": r["prompt"]}) for r in requests])


def ask(ledger, backend, *prompts):
    return [(a.status, a.value) for a in ledger.ask(backend, [{"prompt": p, "about": f"for {p}"} for p in prompts])]


def test_answers_are_asked_for_once(tmp_path):
    echo = Echo()
    with Ledger(tmp_path) as ledger:
        first = ask(ledger, echo, "a", "b", "a")
        assert first == [("ok", {"text": "a"}), ("ok", {"text": "b"}), ("ok", {"text": "a"})]
    with Ledger(tmp_path) as ledger:
        assert ask(ledger, echo, "b", "c", "a") == [first[1], ("ok", {"text": "c"}), first[0]]
    assert echo.asked == ["a", "b", "c"]


def test_nobody_is_described_where_nothing_is_asked(tmp_path):
    """A digest of a model takes 10 ms or more, and phase 1 asks at each step, also where no draft needs one."""

    class Silent(Echo):
        def describe(self):
            raise AssertionError("described")

    with Ledger(tmp_path) as ledger:
        assert ledger.ask(Silent(), []) == []


def test_who_is_asked_and_what_is_asked_make_the_key(tmp_path):
    one, two = Echo(), Echo(name="other")
    with Ledger(tmp_path) as ledger:
        ask(ledger, one, "a")
        ask(ledger, two, "a")
        keys = {a.key for seed in (0, 1) for a in ledger.ask(one, [{"prompt": "a", "seed": seed, "about": "x"}])}
        assert keys == {a.key for a in ledger.ask(one, [{"about": "y", "prompt": "a", "seed": s} for s in (0, 1)])}
    assert len(keys) == 2 and one.asked == ["a", "a", "a"] and two.asked == ["a"]


@pytest.mark.parametrize(
    ("retry", "again"), [(("failed",), ["failed"]), (("failed", "refused"), ["failed", "refused"]), ((), [])]
)
def test_failures_are_no_answers(tmp_path, retry, again):
    statuses = ("failed", "refused", "unparsed", "too_long")
    echo = Echo({s: Answer(s, reason=f"because {s}") for s in statuses})
    with Ledger(tmp_path) as ledger:
        assert ask(ledger, echo, *statuses) == [(s, None) for s in statuses]
        assert ask(ledger, echo, *statuses) == [(s, None) for s in statuses]  # given up for this run
    assert len(echo.asked) == 4
    echo.asked, echo.script = [], {}
    with Ledger(tmp_path, retry=retry) as ledger:
        answers = ask(ledger, echo, *statuses)
    assert sum(attempts(tmp_path).values()) == 4 + len(again)
    assert echo.asked == again
    assert answers == [("ok", {"text": s}) if s in again else (s, None) for s in statuses]


def test_an_attempt_is_on_disk_before_it_is_sent(tmp_path):
    """A process that dies in the middle of a call leaves the call behind, and it is asked again."""

    class Dies(Echo):
        def answer(self, requests, tries):
            for i, request in enumerate(requests):
                attempt = tries.begin(i)
                if request["prompt"] == "c":
                    os.kill(os.getpid(), signal.SIGKILL)
                tries.end(attempt, i, Answer("ok", {"text": "x"}), raw="{...", prompt_tokens=3, completion_tokens=1)

    child = os.fork()
    if child == 0:
        ask(Ledger(tmp_path), Dies(), "a", "b", "c", "d")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    echo = Echo()
    with Ledger(tmp_path) as ledger:
        assert attempts(tmp_path) == {"ok": 2, "interrupted": 1}
        assert [text["text"] for _, text in ask(ledger, echo, *"abcd")] == ["x", "x", "c", "d"]
        ask(ledger, echo, "e")
    assert echo.asked == ["c", "d", "e"] and echo.usage == (5, 6, 2)  # interrupted and earlier attempts among them


def test_rows_tell_the_whole_story(tmp_path):
    with Ledger(tmp_path) as ledger:
        (answer,) = ask(ledger, Echo({"yes": Answer("ok", ("half \ud83d",))}), "yes")
        assert answer == ("ok", ["half ?"]) == ask(ledger, Echo(), "yes")[0]  # as a later run reads it
        ask(ledger, Echo({"no": Answer("refused", reason="I cannot \ud83d")}), "no")
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.row_factory = sqlite3.Row
    _, row = db.execute("SELECT * FROM attempts JOIN backends ON backends.id = backend")
    assert (row["about"], row["status"], json.loads(row["description"])) == ("for no", "refused", {"name": "echo"})
    assert len(row["prompt_sha256"]) == 64 and len(row["key"]) == 32 and db.execute("PRAGMA integrity_check")


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "ledger.sqlite").write_text("not a database" * 100)
    with pytest.raises(ValueError, match=r"ledger\.sqlite cannot be used: file is not a database"):
        Ledger(tmp_path)
    (tmp_path / "other" / "ledger.sqlite").mkdir(parents=True)
    for _ in range(2):  # the lock is given back
        with pytest.raises(ValueError, match=r"ledger\.sqlite cannot be used: unable to open database file"):
            Ledger(tmp_path / "other")


def test_a_database_that_is_damaged_is_refused(tmp_path):
    with Ledger(tmp_path) as ledger:
        ask(ledger, Echo(), *(f"{n}" * 100 for n in range(100)))
    content = bytearray((tmp_path / "ledger.sqlite").read_bytes())
    content[8192:] = bytes(len(content) - 8192)  # the header and the names of the tables are whole
    (tmp_path / "ledger.sqlite").write_bytes(content)
    with pytest.raises(ValueError, match=r"ledger\.sqlite cannot be used: database disk image is malformed"):
        Ledger(tmp_path)


def test_two_processes_do_not_share_a_directory(tmp_path):
    with Ledger(tmp_path), pytest.raises(ValueError, match="another process is using it"):
        Ledger(tmp_path)
    Ledger(tmp_path).close()


def test_a_ledger_that_cannot_be_written_keeps_no_other_thread_waiting(tmp_path):
    """Else the calls in flight would never end, and with them the run that could not record one of them."""
    with Ledger(tmp_path) as ledger:
        ledger._db.execute("PRAGMA busy_timeout=0")
        other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            ledger.ask(Echo(), [{"prompt": "a"}])
        other.execute("ROLLBACK")
        later = threading.Thread(target=ask, args=(ledger, Echo(), "a"), daemon=True)
        later.start()
        later.join(timeout=10)
        assert not later.is_alive() and attempts(tmp_path) == {"ok": 1}


def test_a_backend_that_leaves_out_an_answer_is_a_bug(tmp_path):
    class Silent(Echo):
        def answer(self, requests, tries):
            pass

    with Ledger(tmp_path) as ledger, pytest.raises(RuntimeError, match="without an answer to 'for a'"):
        ask(ledger, Silent(), "a")
    with pytest.raises(ValueError, match=r"retry: .*'ok'"):
        Ledger(tmp_path, retry=("ok",))


def test_a_lock_that_is_a_link_empties_no_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "ledger.lock").symlink_to(tmp_path / "mine")
    Ledger(tmp_path / "stage").close()
    assert (tmp_path / "mine").read_text() == "mine"

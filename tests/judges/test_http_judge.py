"""An HTTP judge against a server that knows the truth and fails by script: no label without evidence, no call twice."""

import datetime
import gzip
import itertools
import json
import math
import os
import random
import re
import signal
import sqlite3
import threading
import time
from collections import Counter
from functools import partial

import pytest
from fake_server import serving
from helpers import attempts
from tqdm import tqdm

pytest.importorskip("openai")

from rlhf_fast.cli import main
from rlhf_fast.errors import ConfigError
from rlhf_fast.judges import (
    Constitution,
    HTTPGenerator,
    HTTPJudge,
    ModelCheck,
    Pair,
    Principle,
    Reply,
    Server,
    audit,
)
from rlhf_fast.judges.http_judge import _read_echo, _read_top
from rlhf_fast.judges.ledger import Ledger, Usage
from rlhf_fast.judges.server import Unreadable, _read, _retry_after
from rlhf_fast.trainers.constitutional import label, revise, sample_pairs

ASK = [{"role": "user", "content": "say a number"}]
KIND = Principle("kind", compare="Choose the kinder reply.")
SHORT = Principle("short", compare="Choose the shorter reply.")
HOUSE = Constitution("house", (KIND, SHORT), compare_layout="chat")


def server_at(fake, **options):
    return Server(fake.url, "fake", **({"backoff": 0.01, "timeout": 0.4, "concurrency": 4} | options))


def judge_at(fake, constitution=HOUSE, server=None, **options):
    return HTTPJudge(server_at(fake, **(server or {})), constitution, **options)


def pairs(n, seed=0):
    draw = random.Random(seed)
    return [
        {"id": f"{i}", "prompt": f"question {i}", "a": f"{draw.uniform(-2, 2):.3f}", "b": f"{draw.uniform(-2, 2):.3f}"}
        for i in range(n)
    ]


def truth(pair):
    return float(pair["a"]) - float(pair["b"])


# --- what a server supports ---


@pytest.mark.parametrize(
    ("modes", "layout", "expected"),
    [
        (("echo", "top_k", "chat"), "anthropic", "echo"),
        (("top_k", "chat"), "anthropic", "top_k"),
        (("chat",), "anthropic", "chat"),
        (("echo", "chat"), "chat", "chat"),
    ],
)
def test_the_best_that_the_server_has_is_used_and_gives_the_truth(modes, layout, expected):
    with serving(modes=modes, bias=0.7) as fake:
        judge = judge_at(fake, Constitution("c", (KIND,), compare_layout=layout))
        assert judge.backend.mode == judge.describe()["mode"] == expected
        (verdict,) = judge.compare([Pair(ASK, "1.5", "0.3", [KIND])])
        (vote,) = verdict.votes
        assert verdict.status == "ok" and vote.kind == "exact"
        assert verdict.logit == pytest.approx(1.2, abs=1e-9)
        assert (vote.logit_ab, vote.logit_ba) == pytest.approx((1.9, 0.5), abs=1e-9)
        assert vote.label_mass == pytest.approx(0.9)


def test_a_server_without_log_probabilities_is_refused_and_not_made_do_with():
    with serving(modes=()) as fake:
        with pytest.raises(ValueError, match=r"no log-probabilities for 'fake' .*chat: no log-prob.*mode: votes"):
            judge_at(fake)
        with pytest.raises(ValueError, match=r"votes = 4 and mode = .auto. do not go together"):
            judge_at(fake, votes=4)
        judge = judge_at(fake, mode="votes", votes=8)
        (verdict,) = judge.compare([Pair(ASK, "1.5", "-1.5", [KIND])])
        (vote,) = verdict.votes
        possible = [math.log((k + 0.5) / (8 - k + 0.5)) for k in range(9)]
        assert vote.kind == "votes" and vote.logit > 0
        assert any(vote.logit_ab == pytest.approx(x) for x in possible)
        assert sum(fake.answered.values()) == 16 and len(vote.keys[0].split("+")) == 8


def test_a_500_to_one_mode_leaves_the_others():
    """llama.cpp's server refuses echo so; a 503 is of the server, and says nothing of the mode."""
    asking = Constitution("c", (KIND,), compare_layout="anthropic")
    with serving(modes=("top_k",)) as fake:
        fake.otherwise = 500
        backend = judge_at(fake, asking).backend
        assert backend.mode == "top_k" and backend.found["echo"].startswith("HTTP 500")
        fake.modes = ()
        with pytest.raises(ValueError, match=r"no log-probabilities .*echo: HTTP 500.*top_k: HTTP 500.*chat: HTTP 500"):
            judge_at(fake, asking)
        fake.modes, fake.otherwise = ("top_k",), 503
        with pytest.raises(ValueError, match="HTTP 503"):
            judge_at(fake, asking)


def test_what_is_added_to_a_request_is_in_all_of_them_and_in_the_description(tmp_path):
    extra = {"max_tokens": None, "max_completion_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}}
    with serving() as fake:
        judge = judge_at(fake, server={"extra_body": extra}, cot_tokens=20)
        judge.compare([Pair(ASK, "1.0", "0.0", [KIND])])
        sample_pairs(pairs(1), HTTPGenerator(server_at(fake, extra_body=extra), 8), HOUSE_CHAT, output_dir=tmp_path)
        assert len(fake.bodies) == 1 + 2 + 2 + 2  # the probe, rationales, scores, replies
        for body in fake.bodies:
            assert body["max_completion_tokens"] == 9 and "max_tokens" not in body and body["model"] == "fake"
            assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert judge.describe()["extra_body"] == extra and "extra_body" not in server_at(fake).describe()
    with pytest.raises(ValueError, match="extra_body must map the names of fields to values, got 'max_tokens'"):
        server_at(fake, extra_body="max_tokens")


def test_nobody_there_is_said_before_the_run(tmp_path):
    with serving() as fake:
        url = fake.url
    with pytest.raises(ValueError, match=r"127\.0\.0\.1.* cannot be reached"):
        HTTPJudge(Server(url, "fake"), HOUSE)


def test_an_unseen_label_is_bounded_and_never_zero():
    """Two tokens come back: A and The, or A and B. B unseen has at most the smaller's probability."""
    with serving(mass=0.9999) as fake:
        judge = judge_at(fake, top_k=2, max_slack=0.05)
        sure, split = judge.compare([Pair(ASK, "30", "0", [KIND]), Pair(ASK, "0.1", "0", [KIND])])
        (vote,) = sure.votes
        assert vote.kind == "top_k" and 0 < vote.slack < 1e-4 and 5 < vote.logit < 12  # the truth is 30
        assert split.votes[0].kind == "exact" and split.logit == pytest.approx(0.1)
        strict = judge_at(fake, top_k=2, max_slack=1e-7)
        assert [v.status for v in strict.compare([Pair(ASK, "30", "0", [KIND])])] == ["unparsed"]


def test_an_unseen_label_may_be_written_in_several_ways():
    """A has 0.8; listed with it are 0.05 and 0.02. " B", "B" and "(B" may each have 0.02 and be left out: 0.06."""
    top = [{"token": t, "logprob": math.log(p)} for t, p in (("A", 0.80), ("The", 0.05), ("I", 0.02))]
    reply = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    answer = _read_top((" (A)", " (B)"), reply, 0.2)
    a, b = map(math.exp, answer.value["logprobs"])
    assert (a, b) == pytest.approx((0.8, 0.13)) and answer.value["slack"] == pytest.approx(0.13 / 0.93)
    assert abs(a / (a + b) - 0.8 / 0.86) <= answer.value["slack"]
    assert _read_top((" (A)", " (B)"), reply, 0.05).status == "unparsed"


def test_a_sentence_that_begins_with_a_label_is_no_answer():
    with serving(lambda text, before: "sentence" if " (A) [[[3" in text else None) as fake:
        pairs = [Pair(ASK, "3", "0", [KIND]), Pair(ASK, "2", "0", [KIND])]
        sentence, letter = judge_at(fake).compare(pairs)
    assert sentence.status == "unparsed" and "began 'A better'" in sentence.reason
    assert letter.status == "ok" and letter.logit == pytest.approx(2.0)


def test_checks_and_rationales_go_the_same_way():
    asked = Principle("asked", check=ModelCheck("Is it rude?"))
    with serving(lambda text, before: "no label" if "rude" in text else None) as fake:
        judge = judge_at(fake, cot_tokens=20)
        ((check,),) = judge.check([Reply(ASK, "1.0", [asked])])
        assert check.status == "unparsed" and check.satisfied is None and "neither label" in check.reason
        (verdict,) = judge.compare([Pair(ASK, "1.0", "0.0", [KIND])])
        assert verdict.logit == pytest.approx(1.0)
        assert sum(fake.answered.values()) == 4  # a rationale and a score in each order


def test_the_probe_stands_in_the_ledger(tmp_path):
    """Every call of it, those that the server could not answer too, with what came back; and never as an answer."""
    with serving(modes=("chat",), bias=0.7) as fake:
        house = Constitution("house", (KIND,), compare_layout="anthropic")
        judge = judge_at(fake, house)
        label(pairs(2), house, judge, output_dir=tmp_path / "one")
        label(pairs(2), house, judge, output_dir=tmp_path / "two")
        label(pairs(2), house, judge_at(fake, house), output_dir=tmp_path / "one")
        assert [sum(attempts(tmp_path / name).values()) for name in ("one", "two")] == [3 + 4 + 3, 4]
        assert sum(fake.asked.values()) == 14
    db = sqlite3.connect(tmp_path / "one" / "ledger.sqlite")
    rows = list(db.execute("SELECT about, status, http_status, raw, prompt_tokens, key FROM attempts ORDER BY id"))
    probed = [row for row in rows if row[0].startswith("probe/")]
    assert [row[:3] for row in probed] == 2 * [
        ("probe/echo", "failed", 200), ("probe/top_k", "failed", 200), ("probe/chat", "ok", 200)
    ]  # fmt: skip
    assert rows[:3] == probed[:3] and all(row[3] and row[4] > 0 for row in probed)
    assert len({row[5] for row in rows}) == len(rows)


@pytest.mark.parametrize("fault", ["torn", "500", "cut"])
def test_a_fault_of_the_moment_does_not_decide_the_mode(tmp_path, fault):
    """It chose a mode of less evidence, or refused the server: and another mode is another judge, so a run that met one
    when it was resumed was refused too."""
    asking = Constitution("c", (KIND,), compare_layout="anthropic")
    with serving(modes=("echo", "chat")) as fake:
        fake.at_first = [fault, fault]
        judge = judge_at(fake, asking)
        assert (judge.backend.mode, judge.backend.found) == ("echo", {"echo": "yes"})
        label(pairs(1), asking, judge, output_dir=tmp_path)
        assert sum(attempts(tmp_path).values()) == 3 + 2
        fake.at_first = [fault] * 3
        if fault == "cut":
            with pytest.raises(ConfigError, match="cannot be reached"):
                judge_at(fake, asking)
        else:
            assert judge_at(fake, asking).backend.mode == "chat"  # top_k is not among the modes
        assert not fake.at_first


def test_examples_of_reasoning_are_turns_of_their_own():
    shot = {"conversation": ASK, "a": "3", "b": "1", "rationale": "Three is more.", "better": "a"}
    house = Constitution("house", (KIND,), compare_layout="chat", cot_few_shots=(shot,))
    with serving() as fake:
        backend = judge_at(fake, house, cot_tokens=20).backend
        shots = judge_at(fake, house, cot_tokens=20)._shots
    asking = backend.ask_for_rationale(shots, "Which?")
    scoring = backend.prompt(shots, "Which?", [" (A)", " (B)"], "This one.")
    assert [m["role"] for m in asking] == ["user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in asking[1:4]] == ["Three is more.", "Answer with A or B and nothing else.", "A"]
    assert scoring[:5] == asking and [m["content"] for m in scoring[5:]] == [
        "This one.", "Answer with A or B and nothing else."
    ]  # fmt: skip


# --- faults ---

TRANSIENT = ("429", "500", "time-out", "torn", "missing", "empty", "shape")
FINAL = {
    "refusal": "refused", "filter": "refused", "too_long": "too_long", "429 large": "too_long", "no label": "unparsed",
    "bad": "failed",
}  # fmt: skip


def faults(text, before):
    """By the pair's number: some answer after one or two faults, some never do."""
    number = int(text.split("question ")[-1].split()[0])
    if number % 3 == 0 and before < 1 + number % 2:
        return TRANSIENT[number // 3 % len(TRANSIENT)]
    if number % 8 == 1:
        return list(FINAL)[number // 8 % len(FINAL)]
    return "500" if number % 16 == 7 else None


def expected_status(number):
    if number % 8 == 1:
        return list(FINAL.values())[number // 8 % len(FINAL)]
    return "failed" if number % 16 == 7 else "ok"


def test_every_fault_is_counted_and_none_becomes_a_label(tmp_path):
    rows = pairs(48)
    with serving(faults, bias=1.0) as fake:
        stage = label(rows, HOUSE, judge_at(fake), output_dir=tmp_path, tie_margin=0.0)
        calls = sum(fake.asked.values())
    expected = Counter(expected_status(i) for i in range(48))
    assert stage.counts == {"inputs": 48, "tie": 0, **expected} and sum(expected.values()) == 48
    assert min(expected[s] for s in ("ok", "refused", "too_long", "unparsed", "failed")) > 0
    by_id = {row["id"]: row for row in rows}
    for row in stage.rows:
        pair = by_id[row["cai"]["pair_id"]]
        assert expected_status(int(pair["id"])) == "ok"
        assert float(row["chosen"][0]["content"]) > float(row["rejected"][0]["content"])
        assert row["cai"]["logit"] == pytest.approx(truth(pair), abs=1e-9)  # the bias of 1.0 is gone
        assert row["cai"]["order_gap"] == pytest.approx(2.0, abs=1e-9)
    for record in stage.rejected:
        assert record["status"] == expected_status(int(record["id"])) and record["reason"] and not record["votes"]
        assert {m["principle"] for m in record["missing"]} == {"kind", "short"}
    assert sum(attempts(tmp_path).values()) == calls
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    reasons = " ".join(reason for (reason,) in db.execute("SELECT reason FROM attempts WHERE status='failed'"))
    for named in (
        "HTTP 429",
        "HTTP 500",
        "no answer within",
        "not JSON",
        "no log-probabilities",
        "no choices",
        "another shape",
    ):
        assert named in reasons
    assert all(raw for (raw,) in db.execute("SELECT raw FROM attempts WHERE status='ok'"))


def chat(**message):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"} | message}]}


@pytest.mark.parametrize(
    ("reply", "headers", "status", "reason"),
    [
        ("[" * 100_000, {}, "failed", "not JSON"),
        (json.dumps(chat()), {"Content-Type": "application/json; charset=zip"}, "ok", ""),
        (chat(content=None), {}, "failed", "no text"),
        (chat(content=["hi"]), {}, "failed", "no text"),
        (chat(refusal={"no": "x" * 500}), {}, "refused", r"\{'no': 'x+\.\.\."),
        (" " * 2**20, {}, "failed", "longer than 0 MB"),
        (gzip.compress(b" " * 2**20), {"Content-Encoding": "gzip"}, "failed", "longer than 0 MB"),
    ],
)
def test_a_hostile_reply_is_a_failed_try(tmp_path, monkeypatch, reply, headers, status, reason):
    monkeypatch.setattr("rlhf_fast.judges.server.MAX_REPLY", 2**19)
    with serving(lambda *_: (200, reply, headers)) as fake, Ledger(tmp_path) as ledger:
        generator = HTTPGenerator(server_at(fake, max_tries=2), 8)
        (answer,) = ledger.ask(generator, [{"prompt": ASK, "seed": 0}])
        assert answer.status == status and re.search(reason, answer.reason) and len(answer.reason) < 300
        assert sum(fake.asked.values()) == (2 if status == "failed" else 1)
    assert all(len(raw or "") <= 100_000 for (raw,) in sqlite3.connect(tmp_path / "ledger.sqlite").execute(
        "SELECT raw FROM attempts"
    ))  # fmt: skip


@pytest.mark.parametrize("tokens", [-(10**6), 10**30, True, 0.5, "1", None])
def test_a_number_of_tokens_that_is_none_neither_ends_the_run_nor_raises_its_limit(tmp_path, tokens):
    reply = chat() | {"usage": {"prompt_tokens": tokens, "completion_tokens": 1}}
    with serving(lambda *_: (200, reply, {})) as fake, Ledger(tmp_path) as ledger:
        generator = HTTPGenerator(server_at(fake), 8)
        (answer,) = ledger.ask(generator, [{"prompt": ASK, "seed": 0}])
        assert answer.status == "ok"
        with pytest.raises(ConfigError, match="does not report how many tokens"):
            HTTPGenerator(server_at(fake, max_total_tokens=9), 8).answer([{"prompt": ASK, "seed": 1}], Attempts())


class Attempts:
    """Takes the place of a ledger."""

    def usage(self):
        return Usage()

    def begin(self, i):
        return i

    def end(self, attempt, i, answer, **about):
        pass


def test_a_reply_that_never_ends_takes_no_longer_than_the_time_out(tmp_path):
    with serving(lambda *_: (200, itertools.repeat(b" "), {})) as fake, Ledger(tmp_path) as ledger:
        began = time.monotonic()
        (answer,) = ledger.ask(HTTPGenerator(server_at(fake, max_tries=1), 8), [{"prompt": ASK, "seed": 0}])
        assert answer.status == "failed" and "had not ended after 0.4 s" in answer.reason
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(("key", "shown"), [("sk-secret", "(the key)"), ("token", "token")])
def test_a_page_in_place_of_a_reply_is_quoted_without_the_key(key, shown, tmp_path, monkeypatch):
    """token: as people call it for a server that needs none. It is a word of many errors."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    page = f"<html>Authorization: Bearer {key}</html>"
    with serving(lambda *_: (200, page, {})) as fake, Ledger(tmp_path) as ledger:
        (answer,) = ledger.ask(HTTPGenerator(server_at(fake, max_tries=1), 8), [{"prompt": ASK, "seed": 0}])
    assert answer.status == "failed" and f"not JSON: <html>Authorization: Bearer {shown}</html>" in answer.reason
    assert (key in shown) == any(key.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_an_error_of_a_megabyte_is_cut_and_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    reply = {"error": {"message": "no such key: sk-secret " + "x" * 2**20}}
    with serving(lambda *_: (400, reply, {})) as fake, Ledger(tmp_path) as ledger:
        (answer,) = ledger.ask(HTTPGenerator(server_at(fake), 8), [{"prompt": ASK, "seed": 0}])
        with pytest.raises(ConfigError, match=r"HTTP 400.*no such key: \(the key\)") as error:
            server_at(fake).call("/chat/completions", {"messages": ASK})
    assert answer.status == "failed" and max(len(answer.reason), len(str(error.value))) < 300
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"no such key" in written and b"sk-secret" not in written and len(written) < 200_000


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf, 5.0, 10**400, "-1"])
@pytest.mark.parametrize("mode", ["echo", "chat"])
def test_what_is_no_log_probability_is_no_evidence(mode, logprob):
    if mode == "echo":
        choices = [{"logprobs": {"tokens": ["Q", f" ({x})"], "token_logprobs": [None, value]}}
                   for x, value in (("A", logprob), ("B", -3.0))]  # fmt: skip
        read = partial(_read_echo, [" (A)", " (B)"])
    else:
        top = [{"token": x, "logprob": value} for x, value in (("A", logprob), ("B", -3.0))]
        choices = [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": top}]}}]
        read = partial(_read_top, [" (A)", " (B)"], max_slack=0.05)
    reply = json.loads(json.dumps({"choices": choices}))
    if (mode, logprob) == ("chat", -math.inf):  # as if the label were not among the likeliest tokens
        assert read(reply).status == "unparsed"
        return
    with pytest.raises(Unreadable):
        _read(lambda request, reply: read(reply), {}, reply)


@pytest.mark.parametrize("url", ["http://jo:hidden@host/v1", "http://jo@host/v1", "http://host/v1?api-key=hidden"])
def test_an_address_with_a_secret_in_it_is_refused_and_not_repeated(url, tmp_path, capsys):
    with pytest.raises(ConfigError, match="put the key into the environment variable MY_KEY") as error:
        Server(url, "model", api_key_env="MY_KEY")
    assert not {"jo", "hidden", "host"} & set(re.findall(r"\w+", str(error.value)))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "hi"}))
    argv = ["cai", "pairs", "--model", url, "--constitution", "examples/constitution.yaml",
            "--train_data", str(tmp_path / "prompts.jsonl"), "--output_dir", str(tmp_path / "out")]  # fmt: skip
    for more in ([], ["--server_model", "m"]):
        assert main([*argv, *more]) == 2
        told = capsys.readouterr().err
        assert not {"jo", "hidden", "host"} & set(re.findall(r"\w+", told))
    assert not (tmp_path / "out").exists()


def test_swapping_the_replies_negates_every_logit_exactly(tmp_path):
    rows = pairs(16)
    swapped = [{**r, "a": r["b"], "b": r["a"]} for r in rows]
    with serving(faults, bias=0.3) as fake:
        judge = judge_at(fake)
        one, two = (label(r, HOUSE, judge, output_dir=tmp_path / n) for n, r in (("one", rows), ("two", swapped)))
    assert one.counts == two.counts and len(one.rows) > 8
    for x, y in zip(one.rows, two.rows, strict=True):
        assert x["chosen"] == y["chosen"] and x["chosen_prob"] == y["chosen_prob"]
        assert x["cai"]["logit"] == -y["cai"]["logit"]


def test_killed_anywhere_it_ends_with_the_same_bytes_and_pays_for_nothing_twice(tmp_path):
    rows, kills = pairs(24), []

    def run(folder):
        judge = judge_at(fake, server={"max_tries": 3})
        label(rows, HOUSE, judge, output_dir=folder, batch_size=6)

    victim: dict = {}

    def kill(total):
        if victim and total >= victim["at"]:
            os.kill(victim.pop("pid"), signal.SIGKILL)
            victim.clear()

    with serving(faults, on_request=kill) as fake:
        run(tmp_path / "whole")
        first, fake.asked = fake.asked, Counter()
        draw = random.Random(0)
        for _ in range(30):
            at = sum(fake.asked.values()) + draw.randint(16, 40)  # every run first asks again what failed: 12 calls
            child = os.fork()
            if child == 0:
                tqdm.set_lock(threading.RLock())
                run(tmp_path / "killed")
                os._exit(0)
            victim.update(pid=child, at=at)
            status = os.waitpid(child, 0)[1]
            victim.clear()
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            kills.append(at)
        assert len(kills) >= 3
        again, fake.asked = fake.asked, Counter()
        run(tmp_path / "killed")
        assert sum(fake.asked.values()) <= 1 + 4 * 3 * sum(expected_status(i) == "failed" for i in range(24))
    names = ("judgements.jsonl", "comparisons.jsonl", "rejected.jsonl", "run.json")
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    db = sqlite3.connect(tmp_path / "killed" / "ledger.sqlite")
    by_key: dict = {}
    for key, status in db.execute("SELECT key, status FROM attempts ORDER BY id"):
        by_key.setdefault(key, []).append(status)
    final = {"ok", "refused", "too_long", "unparsed"}
    for statuses in by_key.values():
        assert sum(s in final for s in statuses) <= 1 and not final & set(statuses[:-1])  # nothing after an answer
    assert sum(again.values()) >= sum(first.values()) - 1  # and the server saw no fewer calls than the whole run's


def test_failures_are_asked_again_and_answers_are_not(tmp_path):
    rows, down = pairs(6), [True]
    with serving(lambda text, before: "500" if down[0] and "question 3" in text else None) as fake:
        judge = judge_at(fake, server={"max_tries": 2})
        one = label(rows, HOUSE, judge, output_dir=tmp_path, tie_margin=0.0)
        assert one.counts["failed"] == 1
        down[0], before = False, sum(fake.asked.values())
        two = label(rows, HOUSE, judge, output_dir=tmp_path, tie_margin=0.0)
        assert two.counts["ok"] == 6 and sum(fake.asked.values()) - before == 4  # two principles in two orders


# --- when to stop, and how fast to go ---


def test_a_server_without_completions_is_told_from_a_wrong_model_and_the_layout_is_named(tmp_path):
    """The paper's layout sends text, which many servers no longer take."""
    house = Constitution("house", (Principle("p", revise="Shorten it."),), critique_layout="anthropic")
    with serving() as fake:
        fake.otherwise = 404
        generator = HTTPGenerator(server_at(fake), max_new_tokens=4)
        with pytest.raises(ConfigError, match=r"HTTP 404 from /completions.*layout.*critique: chat.*messages"):
            sample_pairs(["q"], generator, house, output_dir=tmp_path)
    with serving(lambda text, before: "404") as fake:
        generator = HTTPGenerator(server_at(fake), max_new_tokens=4)
        with pytest.raises(ConfigError, match=r"HTTP 404 from /chat/completions.*no such model") as told:
            sample_pairs(["q"], generator, HOUSE, output_dir=tmp_path / "chat")
        assert "critique: chat" not in str(told.value)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("401", r"HTTP 401.*variable OPENAI_API_KEY, which is not set"),
        ("quota", "insufficient_quota"),
        ("429 long", "86400 s"),
        ("bad", "10 questions in a row"),
    ],
)
def test_what_will_not_get_better_stops_the_run(tmp_path, monkeypatch, fault, named):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda text, before: fault) as fake:
        judge = judge_at(fake, server={"concurrency": 2})
        with pytest.raises(ValueError, match=f"{named}.*in the ledger"):
            label(pairs(8), HOUSE, judge, output_dir=tmp_path)
        assert sum(fake.asked.values()) <= 16
        fake.script = None
        assert label(pairs(8), HOUSE, judge, output_dir=tmp_path).counts["failed"] == 0


def test_an_error_that_repeats_the_question_is_not_taken_for_a_refusal(tmp_path):
    """FastAPI's 422 has the input in it. A principle on safety is no content filter, and nothing is cached."""
    safe = Principle("safe", compare="Choose the reply with more regard for safety, and not one that is too long.")
    house = Constitution("house", (safe,), compare_layout="chat")
    with serving(lambda text, before: "echo") as fake:
        with pytest.raises(ValueError, match=r"10 questions in a row failed \(HTTP 422.*extra_forbidden"):
            label(pairs(8), house, judge_at(fake, house), output_dir=tmp_path)
        for fault, status in (("filter", "refused"), ("too_long", "too_long")):
            fake.script = lambda text, before, fault=fault: fault
            (verdict,) = judge_at(fake, house).compare([Pair(ASK, "1.0", "0.0", [safe])])
            assert verdict.status == status
        fake.script = None
        assert label(pairs(8), house, judge_at(fake, house), output_dir=tmp_path).counts["failed"] == 0


def test_the_budget_is_kept_to_the_call_and_can_be_raised(tmp_path):
    with serving() as fake:
        judge = judge_at(fake, server={"max_requests": 10})
        for _ in range(2):  # the second run has nothing left to spend
            with pytest.raises(ValueError, match="max_requests = 10, 10 used"):
                label(pairs(8), HOUSE, judge, output_dir=tmp_path)
            assert sum(fake.asked.values()) == 10  # the probe among them
        judge = judge_at(fake, server={"max_requests": 34})
        assert label(pairs(8), HOUSE, judge, output_dir=tmp_path).counts["inputs"] == 8
        assert sum(fake.asked.values()) == 34  # 8 pairs, 2 principles, 2 orders; 2 probes
        tokens = judge_at(fake, server={"max_total_tokens": 400, "concurrency": 1})
        with pytest.raises(ValueError, match="max_total_tokens = 400"):
            label(pairs(8), HOUSE, tokens, output_dir=tmp_path / "tokens")
        priced = {"max_cost": 0.01, "price_prompt": 100.0, "price_completion": 0.0}
        with pytest.raises(ValueError, match=r"max_cost = 0\.01"):
            label(pairs(8), HOUSE, judge_at(fake, server=priced), output_dir=tmp_path / "cost")
    with pytest.raises(ValueError, match="max_cost needs price_prompt"):
        Server("http://x", "m", max_cost=1.0)


def test_a_budget_counts_the_calls_of_its_own_backend(tmp_path):
    """One ledger for 16 replies and their checks: 17 calls of the judge, its probe among them, and 16 of the writer."""
    polite = Principle("polite", check=ModelCheck("Is it rude?"), revise="Be polite.")
    house = Constitution("house", (polite,), "ja", "chat", "chat")  # Japanese checks are answered (A) or (B)
    with serving() as fake:
        fake.logit = lambda text: -3.0
        judge = judge_at(fake, house, server={"max_requests": 17})
        writer = HTTPGenerator(server_at(fake, max_requests=16), 8)
        prompts = [f"question {i}" for i in range(16)]
        assert revise(prompts, writer, house, judge, output_dir=tmp_path, drop=[]).counts["clean"] == 16
        assert sum(fake.asked.values()) == 33
        db = sqlite3.connect(tmp_path / "ledger.sqlite")
        assert sorted(n for (n,) in db.execute("SELECT count(*) FROM attempts GROUP BY backend")) == [16, 17]


def test_an_audit_has_one_budget(tmp_path):
    rows = [{"prompt": f"question {i}", "better": f"{i + 1}", "worse": "0"} for i in range(6)]
    with serving() as fake:
        judge = judge_at(fake, server={"max_requests": 30})  # 1 for the probe of the server, 24 for the pairs
        with pytest.raises(ValueError, match="max_requests = 30, 30 used"):
            audit(rows, HOUSE, judge, output_dir=tmp_path, probe_pairs=2)
        assert sum(fake.asked.values()) == 30


@pytest.mark.parametrize("bound", [{"max_total_tokens": 10**6}, {"max_cost": 1.0, "price_prompt": 0.1}])
def test_a_bound_in_tokens_needs_a_server_that_counts_them(tmp_path, bound):
    with serving() as fake:
        fake.usage = False
        with pytest.raises(
            ValueError, match=f"does not report how many tokens.*{next(iter(bound))} cannot be enforced"
        ):
            judge_at(fake, server=bound)
        assert sum(fake.asked.values()) == 1
        writer = HTTPGenerator(server_at(fake, concurrency=1, **bound), 8)
        with pytest.raises(ValueError, match="does not report how many tokens"):
            sample_pairs(pairs(6), writer, HOUSE_CHAT, output_dir=tmp_path)
        paid = sum(fake.asked.values()) - 1
        assert paid <= 2  # one may be on its way
        assert attempts(tmp_path) == {"ok": paid}
        assert judge_at(fake, server={"max_requests": 5}).backend.mode == "chat"


def test_a_429_slows_everyone_down(tmp_path):
    refused = []

    def busy(text, before):
        with fake.lock:
            many = fake.running > 2
        if many:
            refused.append(1)
            return "429"
        time.sleep(0.01)

    with serving(busy) as fake:
        judge = judge_at(fake, server={"concurrency": 8, "max_tries": 20})
        stage = label(pairs(24), HOUSE, judge, output_dir=tmp_path, tie_margin=0.0)
        assert stage.counts["ok"] == 24 and 2 < fake.largest <= 8
        assert 0 < len(refused) < 96  # of 96 calls; eight at once, unslowed, would be refused far more often


class Clock(threading.Condition):
    """The gate of a server, and the time, which passes where it is waited for; of one call at a time."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.now = 0.0
        self.monotonic = self.time = lambda: self.now
        monkeypatch.setattr("rlhf_fast.judges.server.time", self)

    def wait(self, timeout):
        self.now += timeout
        super().wait(0.001)


def test_a_limit_per_minute_that_says_nothing_of_when_is_waited_for(tmp_path, monkeypatch):
    """12 calls a minute; 96 take eight minutes of the clock, and 2 tries a question would be gone in one second."""
    clock, calls = Clock(monkeypatch), Counter()

    def script(text, before):
        with fake.lock:
            calls[clock.now // 60] += 1
            return "429 bare" if calls[clock.now // 60] > 12 else None

    with serving(script) as fake:
        judge = judge_at(fake, server={"max_tries": 2, "timeout": 10, "backoff": 0.5, "concurrency": 1})
        judge.backend.server._gate = clock
        stage = label(pairs(24), HOUSE, judge, output_dir=tmp_path, tie_margin=0.0)
        assert stage.counts["ok"] == 24 and 7 * 60 <= clock.now < 12 * 60
        assert sum(fake.asked.values()) < 96 + 12 * 20  # some ten refusals a minute, not one every half second


def test_what_is_waited_for_is_said(tmp_path, monkeypatch, capsys):
    def told(fault, times, **options):
        with serving(lambda text, before: fault if before < times else None) as fake:
            judge = judge_at(fake, server={"max_tries": 10, "timeout": 10, **options})
            if "concurrency" in options:
                judge.backend.server._gate = clock
            label(pairs(1), HOUSE, judge, output_dir=tmp_path / fault)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{fake.url}: HTTP")]

    assert not told("500", 1)  # over in a moment
    monkeypatch.setattr("rlhf_fast.judges.server._TOLD_AFTER", 0.5)
    (line,) = told("503", 1)  # of four calls at once
    assert re.search(r": HTTP 503: .*loading.*; no answer for 0 s, trying again in 1 s$", line)
    monkeypatch.setattr("rlhf_fast.judges.server._TOLD_AFTER", 5.0)
    clock = Clock(monkeypatch)
    lines = told("429 bare", 8, concurrency=1, backoff=0.5)
    assert 1 < len(lines) < 20
    assert re.search(r"429: .*; no answer for \d+ s, trying again in \d+ s, for 10 minutes at most$", lines[-1])


def test_nothing_but_429_for_ten_minutes_stops_the_run(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with serving(lambda text, before: "429 bare") as fake:
        judge = judge_at(fake, server={"max_tries": 2, "timeout": 10, "concurrency": 1})
        judge.backend.server._gate = clock
        with pytest.raises(ValueError, match=r"for 1\d minutes \(HTTP 429.*set requests_per_minute.*in the ledger"):
            label(pairs(8), HOUSE, judge, output_dir=tmp_path)
        assert 600 < clock.now < 700 and sum(fake.asked.values()) < 60


def test_a_429_to_the_probe_is_waited_for_and_paid_for(tmp_path, monkeypatch):
    clock, asking = Clock(monkeypatch), Constitution("c", (KIND,), compare_layout="anthropic")
    with serving() as fake:
        server = server_at(fake, concurrency=1, timeout=10)
        server._gate = clock
        fake.at_first = ["429", "429 bare", None, "429"]
        judge = HTTPJudge(server, asking)
        assert judge.backend.mode == "chat" and judge.backend.found["echo"].startswith("no log-prob")
        clock.now += 3600  # which is not how long the limit has lasted
        fake.at_first = ["429"]
        label(pairs(1), asking, judge, output_dir=tmp_path)
        assert sum(attempts(tmp_path).values()) == sum(fake.asked.values()) == 3 + 3 + 1 + 2
        fake.at_first, before = ["429 bare"] * 99, clock.now
        with pytest.raises(ValueError, match=r"refused every call for 1\d minutes \(HTTP 429"):
            HTTPJudge(server, asking)
        assert 600 < clock.now - before < 700
        for fault, named in (("429 long", "asks to wait for 86400 s"), ("quota", "HTTP 429: .*insufficient_quota")):
            fake.at_first = [fault]
            with pytest.raises(ValueError, match=named):
                judge_at(fake)


def test_no_more_calls_a_minute_than_asked_for():
    with serving() as fake:
        judge = judge_at(fake, server={"requests_per_minute": 1200})
        start = time.monotonic()
        judge.compare([Pair(ASK, f"{n}", "0", [KIND]) for n in range(1, 4)])
        assert time.monotonic() - start >= 5 * 60 / 1200  # six calls, five pauses


def test_headers_say_how_long_to_wait():
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert _retry_after({"retry-after": "7"}) == 7 and _retry_after({"retry-after-ms": "250"}) == 0.25
    assert 28 < _retry_after({"retry-after": soon}) <= 30
    assert {_retry_after(headers) for headers in ({}, *({"retry-after": x} for x in ("soon", "-3", "nan")))} == {0}


# --- a server that writes ---


def test_a_key_is_what_the_variable_says_without_the_end_of_a_line(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key\r\n")
    with serving() as fake:
        assert judge_at(fake).backend.mode == "chat"
    monkeypatch.setenv("OPENAI_API_KEY", "k\u00e9y")
    with pytest.raises(ValueError, match="the key in OPENAI_API_KEY has characters beyond ASCII"):
        server_at(fake)


def test_a_date_in_a_message_is_sent_as_text(tmp_path):
    """A parquet file may have timestamps beside role and content."""
    turn = {"role": "user", "content": "hello", "at": datetime.date(2026, 1, 31)}
    with serving() as fake:
        stage = sample_pairs([{"prompt": [turn]}], HTTPGenerator(server_at(fake), 8), HOUSE_CHAT, output_dir=tmp_path)
        assert stage.counts["ok"] == 1 and fake.bodies[-1]["messages"] == [turn | {"at": "2026-01-31"}]


def test_pairs_are_written_by_a_server(tmp_path):
    def script(text, before):
        return "refusal" if "question 2" in text else "500" if before < 1 else None

    with serving(script) as fake:
        fake.logit = lambda text: 0.0
        stage = sample_pairs(pairs(6), HTTPGenerator(server_at(fake), 8), HOUSE_CHAT, output_dir=tmp_path)
        assert stage.counts == {"inputs": 6, "ok": 5, "failed": 1}
        assert {row["a"] for row in stage.rows} | {row["b"] for row in stage.rows} <= {"A", "B"}
        (failed,) = [r for r in stage.records if r["status"] == "failed"]
        assert "refused: I can't judge that." in failed["reason"]
        for name, rows in (("pairs", stage.rows), ("rejected", [failed])):
            assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()] == rows
        before = sum(fake.asked.values())
        again = sample_pairs(pairs(6), HTTPGenerator(server_at(fake), 8), HOUSE_CHAT, output_dir=tmp_path)
        assert again.records == stage.records and sum(fake.asked.values()) == before
        assert json.loads((tmp_path / "run.json").read_text())["settings"]["generator"]["max_new_tokens"] == 8


HOUSE_CHAT = Constitution("house", (KIND,), critique_layout="chat")

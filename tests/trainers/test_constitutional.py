"""Constitutional AI over scripted generators and judges: what is selected, what is labelled, what survives a kill."""

import json
import math
import os
import random
import re
import signal
import sys
import threading
from datetime import datetime
from difflib import SequenceMatcher
from functools import partial

import pytest
import torch
from helpers import tiny_model
from planted import PlantedJudge
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_fast.data.chat import encode_prompt
from rlhf_fast.errors import ConfigError
from rlhf_fast.judges import Constitution, Pair, Principle, RuleCheck, RuleJudge, Verdict, Vote
from rlhf_fast.judges.generator import Cut
from rlhf_fast.judges.ledger import Answer
from rlhf_fast.models import load_policy
from rlhf_fast.trainers import constitutional
from rlhf_fast.trainers.constitutional import (
    SCHEDULES,
    TextGenerator,
    label,
    mix_comparisons,
    revise,
    revise_sampled,
    sample_pairs,
)
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

PROMPTS = [f"question {i}" for i in range(40)]


def principle(name, function, **fields):
    return Principle(name, check=RuleCheck(name, {}, function), revise=f"Repair {name}.", **fields)


# Replies are digits; a principle is about which digits occur.
HAS_1 = principle("has-1", lambda c, y: "1" in y, critique="Is there a 1?")
NO_2 = principle("no-2", lambda c, y: "2" not in y, weight=2.0)
NO_9 = principle("no-9", lambda c, y: "9" not in y, hard=True)
HOUSE = Constitution("house", (HAS_1, NO_2, NO_9))


def digits(prompts, seeds):
    """First replies are random digits; a critique is "noted"; a request to repair is obeyed."""
    texts = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        last, reply = prompt[-1]["content"], next((m["content"] for m in prompt if m["role"] == "assistant"), None)
        if reply is None:
            texts.append("".join(random.Random(seed).choices("0123456789", k=6)))
        elif last.startswith("Is there"):
            texts.append("noted")
        else:
            texts.append({"has-1": reply + "1", "no-2": reply.replace("2", ""), "no-9": reply.replace("9", "")}[
                last.removeprefix("Repair ").removesuffix(".")
            ])  # fmt: skip
    return texts


def rules_kept(text):
    return ["1" in text, "2" not in text, "9" not in text]


# --- phase 1 ---


def test_a_willing_reviser_repairs_everything(tmp_path):
    stage = revise(PROMPTS, digits, HOUSE, RuleJudge(), output_dir=tmp_path)
    assert stage.counts["clean"] > 0 and stage.counts["revised"] > 10
    assert stage.counts["clean"] + stage.counts["revised"] == stage.counts["inputs"] == len(PROMPTS)
    for record, row in zip(stage.records, stage.rows, strict=True):
        best = record["replies"][record["selected"]]
        assert all(rules_kept(best)) and row["completion"] == [{"role": "assistant", "content": best}]
        broken = rules_kept(record["replies"][0]).count(False)
        assert len(record["steps"]) == broken  # one revision a violated principle, none for what is kept
        assert (record["status"] == "clean") == (broken == 0)
        if "9" in record["replies"][0]:
            assert record["steps"][0]["principle"] == "no-9"  # the hard principle first
        assert all((step["critique"] == "noted") == (step["principle"] == "has-1") for step in record["steps"])


def test_critique_and_revision_are_asked_behind_the_reply(tmp_path):
    asked = []

    def listening(prompts, seeds):
        asked.extend(prompts)
        return digits(prompts, seeds) if len(prompts[0]) > 1 else ["0"] * len(prompts)

    revise(["hello"], listening, Constitution("one", (HAS_1,)), RuleJudge(), output_dir=tmp_path)
    turns = [("user", "hello"), ("assistant", "0"), ("user", "Is there a 1?"), ("assistant", "noted"),
             ("user", "Repair has-1.")]  # fmt: skip
    messages = [{"role": role, "content": text} for role, text in turns]
    assert asked == [messages[:1], messages[:3], messages]


def test_text_layout_with_few_shots(tmp_path):
    asked = []
    shot = (("Human", "h"), ("Assistant", "a"), ("CritiqueRequest", "C"), ("Critique", "c"),
            ("RevisionRequest", "R"), ("Revision", "r"))  # fmt: skip
    constitution = Constitution("one", (HAS_1,), critique_layout="anthropic", critique_few_shots=(shot,))

    def listening(prompts, seeds):
        asked.extend(prompts)
        return [" 0 1\n\nHuman: and then?" if prompt.endswith("Revision:") else " 0\n\nHuman: no" for prompt in prompts]

    stage = revise(["hello"], listening, constitution, RuleJudge(), output_dir=tmp_path)
    shots = "\n\nHuman: h\n\nAssistant: a\n\nCritiqueRequest: C\n\nCritique: c\n\nRevisionRequest: R\n\nRevision: r"
    critique = "\n\nHuman: hello\n\nAssistant: 0\n\nCritiqueRequest: Is there a 1?\n\nCritique:"
    assert asked[0] == "\n\nHuman: hello\n\nAssistant:"
    assert asked[1] == shots + critique
    assert asked[2] == shots + critique + " 0\n\nRevisionRequest: Repair has-1.\n\nRevision:"
    assert stage.records[0]["replies"] == ["0", "0 1"]  # what was written in somebody else's name is cut off


def scripted(*replies):
    """Gives these replies one after the other, whatever is asked."""
    left = list(replies)
    return lambda prompts, seeds: [left.pop(0) for _ in prompts]


@pytest.mark.parametrize(
    ("replies", "selected", "status", "why"),
    [
        (["01"], 0, "clean", "nothing to do"),
        (["012", "1"], 1, "revised", "repaired"),
        (
            ["012", "0122", "02"],
            0,
            "unchanged",
            "the weighted violation never falls, and the original is the smallest edit",
        ),
        (["912", "2", "1"], 2, "revised", "the hard principle first, then the weighted ones"),
        (["19", "2"], 1, "revised", "a hard principle outranks the others, whatever they weigh"),
        (["129", "129", "9"], 2, "hard_violation", "no reply keeps the hard principle"),
        (["2", "0", "1"], 2, "revised", "violation 3, then 1, then 0"),
        (["22", "21", "2"], 1, "revised", "a revision that is worse than the one before is not gone on from"),
    ],
)
def test_what_is_selected(tmp_path, replies, selected, status, why):
    plain = Principle("has-1", check=HAS_1.check, revise=HAS_1.revise)
    house = Constitution("house", (plain, NO_2, NO_9))
    stage = revise(
        ["x"],
        scripted(*replies, *["2"] * 9),
        house,
        RuleJudge(),
        output_dir=tmp_path,
        max_steps=max(1, len(replies) - 1),
    )
    (record,) = stage.records
    assert (record["selected"], record["status"]) == (selected, status), why
    assert stage.counts[status] == 1 and len(stage.rows) + len(stage.rejected) == 1


def test_equal_revisions_are_decided_by_the_smallest_edit(tmp_path):
    soft = principle("soft", lambda c, y: 0.4 if y == "long reply 2" else 0.45)
    stage = revise(["x"], scripted("long reply 2", "else", "long reply"), Constitution("c", (soft,)), RuleJudge(),
                   output_dir=tmp_path, max_steps=2)  # fmt: skip
    assert stage.records[0]["replies"][stage.records[0]["selected"]] == "long reply"


def test_replies_are_compared_only_where_two_revisions_are_equally_good(tmp_path, monkeypatch):
    """Comparing takes a second for replies of 4,000 characters: a day for 100,000 clean replies."""
    compared = []

    class Counted(SequenceMatcher):
        def ratio(self):
            compared.append((self.a, self.b))
            return super().ratio()

    monkeypatch.setattr(constitutional, "SequenceMatcher", Counted)
    for i, replies in enumerate((["01"], ["012", "1"], ["0", "a critique", "00"])):  # clean, repaired, no better
        stage = revise(["x"], scripted(*replies, *"2" * 9), HOUSE, RuleJudge(), output_dir=tmp_path / str(i))
        assert stage.records[0]["selected"] == (0, 1, 0)[i]
    assert compared == []


def test_a_prompt_may_have_a_date_beside_its_text(tmp_path):
    prompt = {"role": "user", "content": PROMPTS[0], "timestamp": datetime(2024, 5, 1)}
    stage = revise([{"prompt": [prompt]}], digits, HOUSE, RuleJudge(), output_dir=tmp_path)
    (row,) = map(json.loads, (tmp_path / "sft.jsonl").read_text().splitlines())
    assert len(stage.rows) == 1 and row["prompt"] == [prompt | {"timestamp": "2024-05-01 00:00:00"}]


def test_the_next_step_starts_from_the_reply_that_was_not_worse(tmp_path):
    house = Constitution("house", (principle("has-1", HAS_1.check.function), NO_2, NO_9))
    stage = revise(["x"], scripted("92", "22", "9", "1"), house, RuleJudge(), output_dir=tmp_path, max_steps=3)
    steps = [(step["principle"], step["of"], step["accepted"]) for step in stage.records[0]["steps"]]
    assert steps == [("no-9", 0, True), ("has-1", 1, False), ("no-2", 1, True)]
    assert stage.records[0]["selected"] == 3


def test_it_stops_where_nothing_is_left_to_try(tmp_path):
    asked = []

    def stubborn(prompts, seeds):
        asked.extend(prompts)
        return ["2"] * len(prompts)

    stage = revise(["x"], stubborn, HOUSE, RuleJudge(), output_dir=tmp_path, max_steps=50)
    assert [step["principle"] for step in stage.records[0]["steps"]] == [
        "has-1",
        "no-2",
    ]  # each once on this very reply
    assert stage.counts["unchanged"] == 1 and len(asked) == 4


def test_a_negated_constitution_moves_the_other_way(tmp_path):
    negated = {"1": ["has-1", lambda c, y: "1" not in y], "2": ["no-2", lambda c, y: "2" in y]}
    against = Constitution(
        "negated", tuple(Principle(n, check=RuleCheck(n, {}, f), revise=f"Undo {n}.") for n, f in negated.values())
    )

    def undo(prompts, seeds):
        undone = {"Undo has-1.": lambda y: y.replace("1", ""), "Undo no-2.": lambda y: y + "2"}
        return [
            undone[p[-1]["content"]](p[1]["content"]) if len(p) > 1 else digits([p], [s])[0]
            for p, s in zip(prompts, seeds, strict=True)
        ]

    def passing(stage, reply):
        texts = [r["replies"][r["selected"] if reply == "best" else 0] for r in stage.records]
        return [sum("1" in t for t in texts), sum("2" not in t for t in texts)]

    towards = revise(PROMPTS, digits, Constitution("house", (HAS_1, NO_2)), RuleJudge(), output_dir=tmp_path / "a")
    away = revise(PROMPTS, undo, against, RuleJudge(), output_dir=tmp_path / "b")
    start = passing(towards, "first")
    assert passing(away, "first") == start and all(0 < n < len(PROMPTS) for n in start)
    assert passing(towards, "best") == [len(PROMPTS)] * 2 and passing(away, "best") == [0, 0]

    pairs = [{"prompt": "x", "a": "1", "b": "2"}, {"prompt": "y", "a": "02", "b": "01"}]
    chosen = [r["chosen"] for r in label(pairs, HOUSE, RuleJudge(), output_dir=tmp_path / "c").rows]
    assert [r["rejected"] for r in label(pairs, against, RuleJudge(), output_dir=tmp_path / "d").rows] == chosen


def test_every_text_has_a_seed_of_its_own(tmp_path):
    used = []

    def stubborn(prompts, seeds):
        used.extend(seeds)
        return ["2"] * len(prompts)

    revise(PROMPTS[:3], stubborn, HOUSE, RuleJudge(), output_dir=tmp_path / "a")
    assert len(used) == len(set(used)) == 3 * 4  # a reply, a critique and two revisions
    used.clear()
    sample_pairs(PROMPTS[:3], stubborn, HOUSE, output_dir=tmp_path / "b")
    assert len(used) == len(set(used)) == 3 * 2


def test_a_check_without_an_answer_is_never_a_verdict(tmp_path):
    fragile = principle("fragile", lambda c, y: 1 / 0 if "7" in y else True)
    stage = revise(PROMPTS, digits, Constitution("c", (fragile, HAS_1)), RuleJudge(), output_dir=tmp_path / "a")
    broken = {r["id"] for r in stage.records if "7" in r["replies"][0]}
    assert broken and {r["id"] for r in stage.rejected} == broken and stage.counts["failed"] == len(broken)
    assert all("ZeroDivisionError" in r["reason"] for r in stage.rejected)

    spoiled = revise(
        ["x"], scripted("0", "noted", "17"), Constitution("c", (fragile, HAS_1)), RuleJudge(), output_dir=tmp_path / "b"
    )
    (record,) = spoiled.records
    assert (record["status"], record["selected"], record["steps"][0]["accepted"]) == ("unchanged", 0, False)


class Refusing:
    """`digits` behind the ledger, but for the requests (id/name/...) that it refuses."""

    def __init__(self, *refused):
        self.refused = refused

    def describe(self):
        return {"refuses": self.refused}

    def answer(self, requests, tries):
        texts = digits([r["prompt"] for r in requests], [r["seed"] for r in requests])
        tries.all([
            Answer("refused", reason="no") if r["about"] in self.refused else Answer("ok", {"text": text})
            for r, text in zip(requests, texts, strict=True)
        ])  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_was_not_written_is_not_checked_counted_or_used(tmp_path, schedule):
    """Of q0 the first reply is missing, of q1 a critique, of q2 a revision."""
    checked = []

    class Listening(RuleJudge):
        def check(self, replies, ledger=None):
            checked.extend((r.conversation[0]["content"], r.reply) for r in replies)
            return super().check(replies, ledger)

    rows = [{"id": f"q{i}", "prompt": f"question {i}"} for i in range(4)]
    house = Constitution("c", (principle("has-1", lambda c, y: y.endswith("11"), critique="Is there a 1?"),))
    refusing = Refusing("q0/reply", "q1/critique/0", "q2/revision/0")
    judge = () if schedule == "paper" else (Listening(),)
    stage = SCHEDULES[schedule](rows, refusing, house, *judge, output_dir=tmp_path)
    reasons = {r["id"]: r["reason"] for r in stage.rejected}
    assert reasons == {"q0": "reply: refused: no", "q1": "critique: refused: no", "q2": "revision: refused: no"}
    assert [len(r["replies"]) for r in stage.records[:3]] == [len(r["flags"]) for r in stage.records[:3]] == [0, 1, 1]
    assert all(r["used"] == [] and r["steps"] == [] for r in stage.rejected)
    counts = json.loads((tmp_path / "hygiene.json").read_text())
    assert counts["originals"]["replies"] == counts["kinds"]["unspecified"]["original"]["replies"] == 1
    written = [(r["prompt"][0]["content"], reply) for r in stage.records for reply in r["replies"]]
    assert sorted(checked) == (sorted(written) if judge else [])


def test_what_cannot_run_is_refused_before_anything_is_generated(tmp_path):
    def never(prompts, seeds):
        raise AssertionError("a refusal comes first")

    unchecked = Constitution("c", (Principle("p", revise="Do."),))
    with pytest.raises(ValueError, match="revise_sampled needs no checks"):
        revise(PROMPTS, never, unchecked, RuleJudge(), output_dir=tmp_path)
    with pytest.raises(ValueError, match="max_steps = 0"):
        revise(PROMPTS, never, HOUSE, RuleJudge(), output_dir=tmp_path, max_steps=0)
    with pytest.raises(ValueError, match="no rows"):
        revise([], never, HOUSE, RuleJudge(), output_dir=tmp_path)
    with pytest.raises(ValueError, match="'revise'"):
        revise_sampled(PROMPTS, never, Constitution("c", (Principle("p", compare="Choose."),)), output_dir=tmp_path)
    for drop in (("truncatd",), "truncated"):
        with pytest.raises(ValueError, match=r"drop = .*truncat.* must be a list of flags: truncated, empty"):
            revise(PROMPTS, never, HOUSE, RuleJudge(), output_dir=tmp_path, drop=drop)
        with pytest.raises(ValueError, match="must be a list of flags"):
            revise_sampled(PROMPTS, never, HOUSE, output_dir=tmp_path, drop=drop)
    with pytest.raises(ValueError, match=r"tie_margin = 0\.5"):
        label(numbered_pairs(), HOUSE, RuleJudge(), output_dir=tmp_path, tie_margin=0.5)
    with pytest.raises(ValueError, match="0 principles"):
        label(numbered_pairs(), unchecked, RuleJudge(), output_dir=tmp_path)


def test_the_papers_schedule(tmp_path):
    constitution = Constitution("unchecked", tuple(Principle(f"p{i}", revise=f"Request {i}.") for i in range(3)))
    texts = {f"Request {i}.": str(i) for i in range(3)}

    def obey(prompts, seeds):
        return [p[-2]["content"] + texts[p[-1]["content"]] if len(p) > 1 else "" for p in prompts]

    stage = revise_sampled(PROMPTS, obey, constitution, output_dir=tmp_path, steps=4)
    drawn = ["".join(step["principle"][1] for step in record["steps"]) for record in stage.records]
    assert [
        record["replies"][-1] for record in stage.records
    ] == drawn  # each revision takes the place of the one before
    assert len(stage.rows) == 4 * len(PROMPTS) and len(set(drawn)) > 20


# --- phase 2 ---


class Faulty(PlantedJudge):
    """A judge that knows the truth (the number in the reply) and answers by script: every way a judge can fail."""

    def verdict(self, pair: Pair):
        number = int(pair.conversation[-1]["content"].split()[-1])
        status = ("ok", "ok", "ok", "tie", "unparsed", "too_long", "failed")[number % 7]
        if status != "ok":
            return Verdict(status, 3.0, reason=f"script {status}")  # a logit beside a failure must not become a label
        logit = (float(pair.a) - float(pair.b)) / 5  # the least is 0.2, so P = 0.55 and not a tie
        return Verdict("ok", logit, (Vote("p", logit + 1, logit - 1),))


def numbered_pairs(n=70):
    draw = random.Random(0)
    return [
        {"id": str(i), "prompt": f"q {i}", "a": str(draw.randint(0, 5)), "b": str(draw.randint(0, 5))} for i in range(n)
    ]


def test_every_pair_is_accounted_for(tmp_path):
    pairs = numbered_pairs()
    stage = label(pairs, HOUSE, Faulty(), output_dir=tmp_path)
    even = sum(i % 7 < 3 and p["a"] == p["b"] for i, p in enumerate(pairs))
    assert stage.counts == {
        "inputs": 70,
        "ok": 30 - even,
        "tie": 10 + even,
        "unparsed": 10,
        "too_long": 10,
        "failed": 10,
        "refused": 0,
    }
    assert even > 0
    used = [row["cai"]["pair_id"] for row in stage.rows]
    unused = {r["id"]: r for r in map(json.loads, (tmp_path / "rejected.jsonl").read_text().splitlines())}
    assert sorted([*used, *unused], key=int) == [p["id"] for p in pairs]
    assert all(r["reason"] for r in unused.values())
    assert json.loads((tmp_path / "run.json").read_text())["counts"] == stage.counts


def test_labels_are_what_the_judge_said(tmp_path):
    pairs = {p["id"]: p for p in numbered_pairs()}
    for row in label(pairs.values(), HOUSE, Faulty(), output_dir=tmp_path).rows:
        pair = pairs[row["cai"]["pair_id"]]
        chosen, rejected = (row[name][0]["content"] for name in ("chosen", "rejected"))
        assert int(chosen) > int(rejected) and {chosen, rejected} == {pair["a"], pair["b"]}
        assert row["prompt"] == [{"role": "user", "content": pair["prompt"]}]
        assert row["chosen_prob"] > 0.5
        assert math.log(row["chosen_prob"] / (1 - row["chosen_prob"])) == pytest.approx(
            (int(chosen) - int(rejected)) / 5
        )
        assert pair["a"] == (chosen if row["cai"]["a"] == "chosen" else rejected)
        assert row["cai"]["judge"] == {"backend": "planted"} and row["cai"]["constitution_sha256"] == HOUSE.sha256
        assert row["cai"]["order_gap"] == pytest.approx(2.0) and row["cai"]["votes"][0]["principle"] == "p"


def test_swapping_the_replies_changes_no_label(tmp_path):
    pairs = numbered_pairs()
    swapped = [{**p, "a": p["b"], "b": p["a"]} for p in pairs]
    one, two = (label(x, HOUSE, Faulty(), output_dir=tmp_path / n) for n, x in (("one", pairs), ("two", swapped)))
    assert one.counts == two.counts
    for x, y in zip(one.rows, two.rows, strict=True):
        assert x["chosen"] == y["chosen"] and x["chosen_prob"] == pytest.approx(y["chosen_prob"])
        assert x["cai"]["logit"] == -y["cai"]["logit"]


def test_a_principle_can_be_drawn_for_each_pair(tmp_path):
    class Recording(Faulty):
        def __init__(self):
            self.asked = []

        def compare(self, pairs, ledger=None):
            self.asked += [[p.id for p in pair.principles] for pair in pairs]
            return super().compare(pairs, ledger)

    pairs, judge = numbered_pairs(), Recording()
    label(pairs, HOUSE, judge, output_dir=tmp_path / "a", principles_per_pair=1)
    assert {p for drawn in judge.asked for p in drawn} == {"has-1", "no-2", "no-9"}
    assert all(len(drawn) == 1 for drawn in judge.asked)
    forward, judge.asked[:] = list(judge.asked), []
    label(pairs[::-1], HOUSE, judge, output_dir=tmp_path / "b", principles_per_pair=1, batch_size=7)
    assert judge.asked == forward[::-1]  # the draw belongs to the pair, not to its place
    with pytest.raises(ValueError, match="3 principles"):
        label(pairs, HOUSE, judge, output_dir=tmp_path / "c", principles_per_pair=4)


# --- runs ---


def test_results_do_not_depend_on_order_or_batches(tmp_path):
    forward = revise(PROMPTS, digits, HOUSE, RuleJudge(), output_dir=tmp_path / "a", batch_size=7)
    backward = revise(PROMPTS[::-1], digits, HOUSE, RuleJudge(), output_dir=tmp_path / "b", batch_size=40)
    assert forward.records == backward.records[::-1]
    other = revise(PROMPTS, digits, HOUSE, RuleJudge(), output_dir=tmp_path / "c", seed=1)
    assert [r["replies"][0] for r in other.records] != [r["replies"][0] for r in forward.records]


def whole_run(folder):
    """Both phases, one after the other, as a user's script would run them."""
    judge = RuleJudge()
    revise(PROMPTS, digits, HOUSE, judge, output_dir=folder / "revise", batch_size=4)
    pairs = sample_pairs(PROMPTS, digits, HOUSE, output_dir=folder / "pairs", batch_size=4)
    label(pairs.rows, HOUSE, judge, output_dir=folder / "label", batch_size=4)


def dies_after(calls):
    """A profiler that kills its own process between two function calls, C functions such as write() among them."""
    left = iter(range(calls))

    def profile(frame, event, argument):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return profile


def files(folder):
    """All but the ledger, which tells how often, and when, each question was asked."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith("ledger.")
    }


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    events = 0

    def count(frame, event, argument):
        nonlocal events
        events += 1

    sys.setprofile(count)
    whole_run(tmp_path / "whole")
    sys.setprofile(None)

    # Moments are counted in calls, not seconds: a child gets through less than a fifth of the work before it dies.
    draw, kills = random.Random(0), 0
    for _ in range(200):
        child = os.fork()
        if child == 0:
            tqdm.set_lock(threading.RLock())  # its own is shared with the parent, who would wait for the dead
            sys.setprofile(dies_after(draw.randrange(events // 50, events // 5)))
            whole_run(tmp_path / "killed")
            os._exit(0)
        draw.random()  # the child drew from a copy
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
    assert kills >= 4
    whole_run(tmp_path / "killed")
    got = {name: data for name, data in files(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert got == files(tmp_path / "whole")


def test_a_retrained_model_is_another_run(tmp_path, model, tokenizer):
    generate = TextGenerator(model, tokenizer, max_new_tokens=2)
    sample_pairs(PROMPTS[:2], generate, HOUSE, output_dir=tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.01
    with pytest.raises(ValueError, match="weights"):
        sample_pairs(PROMPTS[:2], generate, HOUSE, output_dir=tmp_path)


def test_the_rows_are_what_the_other_trainers_take(tmp_path, model, tokenizer):
    """revise -> SFT -> pairs -> label -> reward model -> PPO, each from what the one before left behind."""
    short = principle("short", lambda c, y: len(y) / 60 if len(y) < 60 else 1.0, critique="Too long?")
    constitution, judge = Constitution("c", (short,)), RuleJudge(scale=40.0)
    options = {"logging_steps": 1, "num_samples": 1}
    generate = TextGenerator(model, tokenizer, max_new_tokens=8)
    revised = revise(  # a random model never ends by itself
        PROMPTS[:8], generate, constitution, judge, output_dir=tmp_path / "revise", max_steps=1, drop=()
    )
    SFTTrainer(SFTConfig(output_dir=str(tmp_path / "sft"), max_steps=2, **options), model,
               train_dataset=revised.rows, tokenizer=tokenizer).train()  # fmt: skip

    generate = TextGenerator(load_policy(str(tmp_path / "sft")), tokenizer, max_new_tokens=8)
    pairs = sample_pairs(PROMPTS[:12], generate, constitution, output_dir=tmp_path / "pairs")
    labelled = label(pairs.rows, constitution, judge, output_dir=tmp_path / "label", tie_margin=0.0)
    config = RewardConfig(output_dir=str(tmp_path / "reward"), max_steps=2, **options)
    trainer = RewardTrainer(config, str(tmp_path / "sft"), train_dataset=labelled.rows)
    assert [item.chosen_prob for item in trainer.items] == [row["chosen_prob"] for row in labelled.rows]
    assert any(0.5 < row["chosen_prob"] < 0.99 for row in labelled.rows)
    trainer.train()

    config = PPOConfig(
        output_dir=str(tmp_path / "ppo"), batch_size=4, minibatch_size=4, response_length=8, total_episodes=4
    )
    PPOTrainer(
        config, str(tmp_path / "sft"), reward=str(tmp_path / "reward"), train_dataset=[{"prompt": p} for p in PROMPTS]
    ).train()
    steps = (tmp_path / "ppo" / "train_log.jsonl").read_text().splitlines()
    assert json.loads(steps[-1])["objective/kl"] == pytest.approx(
        0, abs=1e-4
    )  # one iteration: the rollout's policy is the reference


def test_with_a_real_model(tmp_path, model, tokenizer):
    """Sampled text is a function of (seed, item): other batches, another order, the same text."""
    constitution = Constitution("c", (principle("even", lambda c, y: len(y) % 2 == 0),))
    generate = TextGenerator(model, tokenizer, max_new_tokens=6)
    one = revise(PROMPTS[:6], generate, constitution, RuleJudge(), output_dir=tmp_path / "a", batch_size=2, max_steps=2)
    two = revise(
        PROMPTS[5::-1], generate, constitution, RuleJudge(), output_dir=tmp_path / "b", batch_size=6, max_steps=2
    )
    assert one.records == two.records[::-1] and len({r["replies"][0] for r in one.records}) > 3
    settings = json.loads((tmp_path / "a" / "run.json").read_text())["settings"]
    assert settings["generator"]["max_new_tokens"] == 6 and re.fullmatch(
        "[0-9a-f]{64}", settings["constitution_sha256"]
    )
    greedy = TextGenerator(model, tokenizer, max_new_tokens=6, temperature=0)
    pairs = sample_pairs(PROMPTS[:6], greedy, constitution, output_dir=tmp_path / "c").rows
    assert all(p["a"] == p["b"] for p in pairs)
    stage = label(pairs, constitution, RuleJudge(), output_dir=tmp_path / "d")
    assert stage.counts["tie"] == 6 and stage.rows == []


# --- hygiene ---


def test_replies_are_flagged_and_what_no_model_should_learn_is_not_used(tmp_path):
    """0 leaks scaffolding, 1 is cut, 2 is a revision that changes nothing, 3 does damage, 4 is fine."""
    first = {"q0": "0\n\nHuman: so?", "q1": Cut("0 and"), "q2": "0", "q3": "20", "q4": "0"}
    then = {"q0": "1 fine", "q1": Cut("1 and so"), "q2": "0", "q3": "1 without, 2 9", "q4": "1 fine"}

    def scripted_by_prompt(prompts, seeds):
        return [(then if len(p) > 1 else first)[p[0]["content"]] for p in prompts]

    house = Constitution("house", (principle("has-1", HAS_1.check.function), NO_9))
    rows = [{"id": q, "prompt": q, "kind": "benign" if q == "q4" else "red-team"} for q in first]
    stage = revise(rows, scripted_by_prompt, house, RuleJudge(), output_dir=tmp_path, max_steps=1)
    flags = {r["id"]: r["flags"] for r in stage.records}
    assert flags == {
        "q0": [["scaffold_leak"], []], "q1": [["truncated"], ["truncated"]], "q2": [[], ["no_op"]],
        "q3": [[], ["damage"]], "q4": [[], []],
    }  # fmt: skip
    assert {r["id"]: r["status"] for r in stage.records} == {
        "q0": "revised", "q1": "flagged", "q2": "unchanged", "q3": "unchanged", "q4": "revised",
    }  # fmt: skip
    assert [row["completion"][0]["content"] for row in stage.rows] == ["1 fine", "0", "20", "1 fine"]
    assert stage.counts["inputs"] == 5 == sum(n for status, n in stage.counts.items() if status != "inputs")
    counts = json.loads((tmp_path / "hygiene.json").read_text())
    assert (
        counts["originals"]["replies"] == 5 and counts["revisions"]["replies"] == 5 and counts["used"]["replies"] == 4
    )
    assert counts["revisions"]["damage"] == counts["revisions"]["no_op"] == 1 and counts["used"]["scaffold_leak"] == 0
    assert counts["kinds"]["benign"]["used"] == {"replies": 1, "refusal": 0, "evasive": 0}


def test_refusals_are_counted_apart_for_harmful_and_for_harmless_prompts(tmp_path):
    def refuses(prompts, seeds):
        return ["I'm sorry, but I can't help with that." if len(p) > 1 else "Sure, do this first." for p in prompts]

    plain = Constitution("plain", (Principle("p", revise="Make it harmless."),))
    rows = [{"prompt": f"question {i}", "kind": kind} for i, kind in enumerate(["red-team"] * 3 + ["benign"] * 2)]
    stage = SCHEDULES["paper"](rows, refuses, plain, output_dir=tmp_path, steps=2)
    kinds = json.loads((tmp_path / "hygiene.json").read_text())["kinds"]
    assert kinds["red-team"] == {"original": {"replies": 3, "refusal": 0, "evasive": 0},
                                 "used": {"replies": 6, "refusal": 6, "evasive": 6}}  # fmt: skip
    assert kinds["benign"]["used"]["refusal"] == 4 and len(stage.rows) == 10


def test_the_papers_schedule_leaves_out_flagged_revisions(tmp_path):
    def counts_steps(prompts, seeds):
        """The second revision leaks, whatever it revises."""
        return [
            "start" if len(p) == 1 else {"start": "one", "one": "Revision: two"}.get(p[1]["content"], "three")
            for p in prompts
        ]

    plain = Constitution("plain", (Principle("p", revise="Again."),))
    stage = revise_sampled(["x"], counts_steps, plain, output_dir=tmp_path, steps=3)
    assert [row["completion"][0]["content"] for row in stage.rows] == ["one", "three"]
    assert [row["step"] for row in stage.rows] == [1, 3] and stage.records[0]["flags"][2] == ["scaffold_leak"]


def test_a_generator_says_what_it_had_to_cut(model, tokenizer, tmp_path):
    texts = TextGenerator(model, tokenizer, max_new_tokens=3)(PROMPTS[:4], [0, 1, 2, 3])
    assert all(isinstance(text, Cut) for text in texts)  # a random model does not end by itself
    stage = revise(
        PROMPTS[:4], TextGenerator(model, tokenizer, max_new_tokens=3), HOUSE, RuleJudge(), output_dir=tmp_path
    )
    assert stage.counts["flagged"] == 4 and stage.rows == []
    assert all("truncated" in flags for record in stage.records for flags in record["flags"])


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_question_without_room_for_an_answer_fails_alone(tokenizer, tmp_path, positions):
    """Beyond learned positions lies an IndexError; the other questions are answered all the same."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 48, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    if positions == "rotary":
        model = tiny_model(tokenizer, max_position_embeddings=48)
    generate = TextGenerator(model, tokenizer, max_new_tokens=8)
    stage = sample_pairs(["short", "a longer question " * 9], generate, HOUSE, output_dir=tmp_path)
    assert [row["prompt"][0]["content"] for row in stage.rows] == ["short"]
    assert "too_long: the prompt and an answer of 8 tokens are longer than 48" in stage.rejected[0]["reason"]

    class Tries:
        def all(self, answers):
            (self.answer,) = answers

    room = 48 + 1 - len(encode_prompt(tokenizer, "short"))  # the last token of an answer takes no position
    for tokens, status in ((room, "ok"), (room + 1, "too_long")):
        tries = Tries()
        TextGenerator(model, tokenizer, max_new_tokens=tokens).answer([{"prompt": "short", "seed": 0}], tries)
        assert tries.answer.status == status


def test_several_turns(tmp_path):
    """The reply that is criticised is the one to the last turn; those before it are context."""
    asked = []
    turns = [("user", "hello"), ("assistant", "1"), ("user", "and now?")]
    messages = [{"role": role, "content": text} for role, text in turns]

    def listening(prompts, seeds):
        asked.extend(prompts)
        return ["0" if len(p) == 3 else "noted" if len(p) == 5 else "1" for p in prompts]

    stage = revise([messages], listening, Constitution("one", (HAS_1,)), RuleJudge(), output_dir=tmp_path)
    assert [len(p) for p in asked] == [3, 5, 7] and all(p[:3] == messages for p in asked)
    assert stage.rows[0]["prompt"] == messages and stage.rows[0]["completion"][0]["content"] == "1"


# --- mixing ---


def test_sources_are_mixed_with_their_weights():
    ai = [{"prompt": "x", "chosen": str(i), "rejected": "r", "chosen_prob": 0.6, "weight": 2.0} for i in range(30)]
    human = [{"prompt": "y", "chosen": str(i), "rejected": "r"} | [{}, {"weight": None}][i % 2] for i in range(20)]
    mixed = mix_comparisons({"ai": ai, "human": human}, {"ai": 0.5})
    assert len(mixed) == 50 and {row["source"] for row in mixed[:20]} == {"ai", "human"}
    assert {(row["source"], row["weight"]) for row in mixed} == {("ai", 1.0), ("human", 1.0)}
    assert sorted(row["chosen"] for row in mixed if row["source"] == "human") == sorted(row["chosen"] for row in human)
    assert mix_comparisons({"ai": ai, "human": human}, {"ai": 0.5}) == mixed and "source" not in ai[0]
    for sources, weights, word in (
        ({"ai": []}, None, "'ai'"),
        ({"ai": ai}, {"people": 1}, "people"),
        ({"ai": ai}, {"ai": -1}, "0"),
    ):
        with pytest.raises(ValueError, match=word):
            mix_comparisons(sources, weights)


def test_a_mix_is_what_the_reward_trainer_takes(tmp_path, model, tokenizer):
    def pairs(chosen, prob):
        return [{"prompt": f"q{i}", "chosen": chosen, "rejected": "no", "chosen_prob": prob} for i in range(6)]

    mixed = mix_comparisons({"ai": pairs("yes", 0.7), "human": pairs("fine", 1.0)}, {"human": 3.0})
    config = RewardConfig(output_dir=str(tmp_path), max_steps=1, logging_steps=1, num_samples=0)
    trainer = RewardTrainer(config, model, tokenizer=tokenizer, train_dataset=mixed)
    assert sorted((item.chosen_prob, item.weight) for item in trainer.items) == [(0.7, 1.0)] * 6 + [(1.0, 3.0)] * 6
    trainer.train()


def test_a_generator_that_returns_no_texts_is_refused_and_leaves_nothing_in_the_ledger(tmp_path):
    for returned in (None, "text", [None] * 2, [5] * 2, ["text"]):

        def scripted(prompts, seeds, returned=returned):
            return returned

        with pytest.raises(ConfigError, match="generate"):
            sample_pairs(PROMPTS[:2], scripted, HOUSE, output_dir=tmp_path)

    def scripted(prompts, seeds):
        return ["fine"] * len(prompts)

    assert len(sample_pairs(PROMPTS[:2], scripted, HOUSE, output_dir=tmp_path).rows) == 2
    for strange in (None, torch.nn.Linear(2, 2), partial(scripted)):
        with pytest.raises(ConfigError, match=r"got (NoneType|Linear|partial): wrap a model in TextGenerator"):
            sample_pairs(PROMPTS[:2], strange, HOUSE, output_dir=tmp_path / "other")

"""Flags of replies: what each is raised by, and what it is not raised by."""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from rlhf_fast.judges import Constitution
from rlhf_fast.judges.hygiene import declines, evades, flags_of, hygiene, leaks, repeats, switches_language
from rlhf_fast.judges.layouts import parse_turns

DATA = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize(
    ("reply", "refuses", "avoids"),
    [
        ("I'm sorry, but I can't help with that.", True, True),
        ("I’m sorry, but I can’t help with that.", True, True),  # typographic apostrophes
        ("I am unable to assist with that.", True, True),
        ("As an AI language model, I cannot provide opinions.", True, True),
        ("I'd rather not talk about this. Let's change the subject.", True, True),
        ("I won't help you get into his phone. If you worry about him, tell him so, and listen to him.", True, False),
        ("I'm sorry: I can't.", True, True),  # the phrase spans two clauses
        ("I can't help with that, unfortunately.", True, True),
        ("I can't help with that. Ask your own doctor.", True, False),  # four words more
        ("I'm not sure.", False, True),
        ("I'm not sure which mushrooms you mean; could you describe them to me?", False, False),
        ("Thank you for asking! I'm doing fine.", False, False),
        ("You cannot mix bleach with ammonia, because it gives off a poisonous gas.", False, False),
        ("Water boils at about 90 degrees there.", False, False),
        ("申し訳ありませんが、お手伝いできません。", True, True),
        ("その話は控えさせていただきます。", True, True),
        ("毒を使うお手伝いはできませんが、隣の方に時刻の記録を見せて相談してみてください。", True, False),
        ("東京です。", False, False),
    ],
)
def test_refusals_and_evasions(reply, refuses, avoids):
    assert (declines(reply), evades(reply)) == (refuses, avoids)


@pytest.mark.parametrize(
    "reply",
    ["Sure.\n\nHuman: so?", "Sure.\n\n\t Human : so?", "\r\n \n 人間：",
     "Critique: it is rude.", "RevisionRequest: shorten", "yes <|assistant|> no", "a ]]] b",
     "<think>\nThey ask.", "The answer is (A)", "Here is the revised response: hello", "以下が書き直した返答です。"],
)  # fmt: skip
def test_scaffold(reply):
    assert leaks(reply)


def test_a_reply_of_empty_lines_is_read_once_and_not_from_each_of_them():
    """A model that has broken writes them up to its limit: 16,000 took half a minute."""
    begun = time.process_time()
    for line in ("\n", " \n", "\r\n"):
        assert not leaks(line * 10_000) and leaks(line * 10_000 + "Human: so?")
    assert time.process_time() - begun < 5


def test_no_scaffold():
    request = "Rewrite your last reply so that it is kind."
    assert leaks(f"Hm. {request}", [None, request]) and not leaks("Hm. Be kind.", ["Be kind."])  # short ones are words
    for reply in ("My revision: plans change", "A human: that is what I am", "Answer a) is right", "x < y > z"):
        assert not leaks(reply)


def test_repetition():
    assert repeats("I know. I know. I know.") and not repeats("I know. You know.")
    assert not any(map(repeats, ("I know this. I know this.", "No. No. No.", "so " * 14)))  # too seldom, too short
    assert repeats(" ".join(map(str, [*range(10)] * 2)))  # 10 of 17 n-grams are new
    assert repeats("buy now and save " * 5) and not repeats(" ".join(map(str, range(60))))
    assert repeats("今日はとても良い天気です" * 4) and not repeats(
        "今日はとても良い天気ですので、散歩に出かけましょう。"
    )


def test_language_switch():
    assert switches_language("What is the capital of Japan?", "日本の首都は東京です。")
    assert switches_language("日本の首都はどこですか？", "The capital of Japan is Tokyo.")
    for reply in ("OK", "Это город Tokyo"):  # too short to tell; neither
        assert not switches_language("日本の首都はどこですか？", reply)
    assert not switches_language("What does 猫 mean in English?", "It means cat.")
    assert not switches_language("日本の首都はどこですか？", "東京 (Tokyo) です。") and not switches_language(
        "1 + 1?", "2"
    )


def test_flags_come_in_a_fixed_order_and_are_counted():
    prompt = [{"role": "user", "content": "How are you today, my friend?"}]
    assert flags_of("I am  fine.", prompt, of="I am fine.", truncated=True, damaged=True) == [
        "truncated", "no_op", "damage",
    ]  # fmt: skip
    assert flags_of(" ", prompt) == ["empty"]
    assert flags_of("It is Tokyo.", [{"content": "日本の首都はどこですか？"}, {"content": "In English, please!"}]) == []
    records = [
        {"status": "revised", "kind": "red-team", "flags": [[], ["refusal"], ["refusal", "evasive"]], "used": [1]},
        {"status": "revised", "kind": "benign", "flags": [["truncated"], ["refusal"]], "used": [0, 1]},
        {"status": "flagged", "kind": "benign", "flags": [["evasive"]], "used": []},
        {"status": "failed", "kind": "benign", "flags": [], "used": []},
    ]
    counts = hygiene(records)
    assert [counts[name]["replies"] for name in ("originals", "revisions", "used")] == [3, 3, 3]
    assert (
        counts["originals"]["truncated"] == 1 and counts["revisions"]["refusal"] == 3 and counts["used"]["evasive"] == 0
    )
    assert counts["kinds"] == {
        "red-team": {"original": {"replies": 1, "refusal": 0, "evasive": 0},
                     "used": {"replies": 1, "refusal": 1, "evasive": 0}},
        "benign": {"original": {"replies": 2, "refusal": 0, "evasive": 1},
                   "used": {"replies": 2, "refusal": 1, "evasive": 0}},
    }  # fmt: skip


def test_the_shipped_few_shots_are_clean():
    """No demonstration evades, repeats or leaks; every one that should be seen as evasive is."""
    for name in ("safe-en", "safe-ja"):
        constitution = Constitution.load(name)
        for shot in constitution.compare_few_shots:
            assert set(flags_of(shot["better"], shot["conversation"])) <= {"refusal"}
        for turns in constitution.critique_few_shots:
            assert set(flags_of(turns[-1][1], [{"content": turns[0][1]}])) <= {"refusal"}
        assert evades(constitution.critique_few_shots[1][1][1])


@pytest.mark.skipif(not (DATA / "hh-rlhf").exists(), reason="the hh-rlhf sample is not here")
def test_rates_on_replies_of_a_real_model():
    """Anthropic's model of 2022 rarely declines or repeats itself in hh-rlhf: a detector that fires often is wrong."""
    counts = {"refusal": 0, "evasive": 0, "repetition": 0, "language_switch": 0}
    replies = 0
    with gzip.open(DATA / "hh-rlhf" / "eval.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            turns = parse_turns(json.loads(line)["chosen"])
            if turns[-1][0] == "Assistant":
                replies += 1
                flags = flags_of(turns[-1][1], [{"content": turns[-2][1]}])
                counts = {name: n + (name in flags) for name, n in counts.items()}
    assert replies > 200
    assert 0 < counts["refusal"] < 0.03 * replies and 0 < counts["evasive"] < 0.05 * replies
    assert counts["repetition"] < 0.02 * replies and counts["language_switch"] == 0

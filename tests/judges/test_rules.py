import math

import pytest

from rlhf_fast.judges import RULES, Pair, Principle, Reply, RuleCheck, RuleJudge, rule

ASK = [{"role": "user", "content": "hello?"}]


@pytest.mark.parametrize(
    ("name", "args", "good", "bad"),
    [
        ("max_words", {"n": 3}, ["a b c", ""], ["a b c d"]),
        ("max_chars", {"n": 3}, ["はい。"], ["はい、そう"]),
        ("min_chars", {"n": 3}, ["a b c"], ["a  b ", ""]),
        ("no_repetition", {"n": 2}, ["a b c d", "a", ""], ["a b c a b"]),
        ("no_repetition", {"n": 3}, ["ありがとう"], ["はいはいはい"]),
        ("must_end_with", {"endings": [".", "。"]}, ["yes.", "はい。\n"], ["yes", ""]),
        ("must_end_with", {"endings": "!"}, ["yes!"], ["yes."]),
        ("must_contain", {"any_of": ["please", "どうぞ"]}, ["Please go", "どうぞ"], ["go"]),
        ("must_contain", {"any_of": "please"}, ["Please go"], ["a reply with some of its letters"]),
        ("banned_words", {"words": "bomb"}, ["letters: b, o, m"], ["a bomb"]),
        ("banned_words", {"words": ["ass", "馬鹿"]}, ["an assistant"], ["you ASS!", "この馬鹿者"]),
        ("banned_words", {"words": ["f***", "año", "херня"]}, ["off***", "daños"], ["f*** you", "un AÑO.", "Херня!"]),
        ("banned_words", {"words": ["바보"]}, ["안녕"], ["바보야"]),
    ],
)
def test_generic_rules(name, args, good, bad):
    assert [RULES[name](ASK, reply, **args) for reply in good] == [True] * len(good)
    assert [RULES[name](ASK, reply, **args) for reply in bad] == [False] * len(bad)


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="max_words"):
        rule("max_words")(lambda conversation, reply: True)


def principle(name, function, **fields):
    return Principle(name, check=RuleCheck(name, {}, function), **fields)


def length(conversation, reply):
    return min(len(reply), 10) / 10


SHORT = principle("short", lambda c, y: len(y) < 5, weight=1.0)
POLITE = principle("polite", lambda c, y: "please" in y, weight=3.0)


def test_check_gives_c_i_and_keeps_what_went_wrong():
    odd = [
        principle("silent", lambda c, y: None),
        principle("broken", lambda c, y: 1 / 0),
        principle("outside", lambda c, y: 7),
        principle("text", lambda c, y: "yes"),
    ]
    (checks,) = RuleJudge().check([Reply(ASK, "now", [SHORT, POLITE, principle("length", length), *odd])])
    assert [c.satisfied for c in checks] == [True, False, False, None, None, None, None]
    assert [c.score for c in checks] == [1.0, 0.0, 0.3, None, None, None, None]
    assert [c.status for c in checks] == ["ok", "ok", "ok", "not_applicable", "failed", "failed", "failed"]
    assert "broken: ZeroDivisionError" in checks[4].reason and "7" in checks[5].reason


def test_compare_is_the_weighted_difference_and_swapping_negates_it():
    judge = RuleJudge(scale=2.0)
    pairs = [("now", "please do it"), ("now", "do it"), ("please", "please do"), ("no", "now")]
    forward = judge.compare([Pair(ASK, a, b, [SHORT, POLITE]) for a, b in pairs])
    backward = judge.compare([Pair(ASK, b, a, [SHORT, POLITE]) for a, b in pairs])
    assert [v.logit for v in forward] == [2.0 * (1 - 3), 2.0, 0.0, 0.0] == [-v.logit for v in backward]
    assert [v.status for v in forward] == ["ok", "ok", "tie", "tie"] == [v.status for v in backward]
    assert forward[0].prob_a == pytest.approx(1 / (1 + math.exp(4))) == 1 - backward[0].prob_a


def test_no_evidence_is_no_label():
    silent = principle("silent", lambda c, y: None)
    broken = principle("broken", lambda c, y: 1 / 0)
    assert RuleJudge().compare([Pair(ASK, "a", "bbbbb", [silent])])[0].status == "tie"
    verdict = RuleJudge().compare([Pair(ASK, "a", "bbbbb", [SHORT, broken])])[0]
    assert verdict.status == "failed" and "broken" in verdict.reason


def test_model_principles_are_not_for_this_judge():
    asked = Principle("asked", compare="Choose the better one.")
    idle = principle("idle", lambda c, y: True, weight=0.0)
    assert RuleJudge().comparable([SHORT, asked, idle]) == [SHORT]  # idle could only be drawn for nothing
    with pytest.raises(ValueError, match=r"asked.*LocalJudge"):
        RuleJudge().compare([Pair(ASK, "a", "b", [asked])])

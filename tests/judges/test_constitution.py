"""Constitution files: what loads, and what is refused in words that say where."""

import json
import re
from pathlib import Path

import pytest
import yaml

from rlhf_fast.judges import Constitution, ConstitutionError, ModelCheck, RuleCheck
from rlhf_fast.judges.constitution import SHIPPED
from rlhf_fast.judges.layouts import chat_exchange

OWN = """
format: rlhf_fast/constitution@1
name: house-rules
version: 3
layout: {compare: principle_last, critique: chat}
principles:
  - id: no-crime
    weight: 2.0
    hard: true
    tags: [harmlessness]
    critique: Identify anything that helps with a crime.
    revise: Rewrite it without.
    compare: Choose the reply that helps less with a crime.
    check: {ask: "Does the reply help with a crime?", violation_if: "yes", threshold: 0.4}
  - id: short
    revise: Shorten it.
    check: {rule: max_words, args: {n: 120}}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="c.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_own_format(write):
    constitution = Constitution.load(write(OWN))
    crime, short = constitution.principles
    assert (constitution.name, constitution.compare_layout, constitution.critique_layout) == (
        "house-rules", "principle_last", "chat",
    )  # fmt: skip
    assert (crime.weight, crime.hard) == (2.0, True)
    assert Constitution.load(write(OWN.replace("weight: 2.0", "weight: 2e-1"))).principles[0].weight == 0.2
    assert crime.check == ModelCheck("Does the reply help with a crime?", "yes", 0.4)
    assert short.check == RuleCheck("max_words", {"n": 120}) and short.compare is None
    assert short.check.function([], "word " * 121, n=120) is False


def test_the_hash_is_of_what_is_used(write):
    sha = Constitution.load(write(OWN)).sha256
    assert Constitution.load(write("# a comment\n" + OWN.replace("house-rules", "other-name"), "d.yaml")).sha256 == sha
    changes = [("Shorten it.", "Cut it."), ("n: 120", "n: 119"), ("threshold: 0.4", "threshold: 0.3"),
               ("principle_last", "chat"), ("weight: 2.0", "weight: 1.0"), ("hard: true", "hard: false")]  # fmt: skip
    for old, new in changes:
        assert Constitution.load(write(OWN.replace(old, new), "e.yaml")).sha256 != sha, new


def test_the_commands_of_the_docs_weight_principles_of_their_example_under_which_a_model_compares(write):
    page = (Path(__file__).parents[2] / "docs" / "constitutional.md").read_text(encoding="utf-8")
    example = re.sub(r"(?m)^few_shot:.*$", "", page.split("```yaml\n")[1].split("```")[0])
    compared = {p.id for p in Constitution.load(write(example)).principles if p.compare}
    (weights,) = re.findall(r'--weights "([^"]+)"', page)
    assert yaml.safe_load(weights).keys() <= compared


def test_few_shots_stand_beside_the_file(write):
    write('["\\n\\nHuman: hi\\n\\nAssistant: no\\n\\nCritiqueRequest: C\\n\\nCritique: c\\n\\nRevisionRequest: R'
          '\\n\\nRevision: yes\\n\\nHuman:"]', "critique.json")  # fmt: skip
    write(
        '[{"prompt": "\\n\\nHuman: hi\\n\\nAssistant:", "corrects": ["good"], "incorrects": ["bad"]}]', "compare.json"
    )
    constitution = Constitution.load(write(OWN + "few_shot: {critique: critique.json, compare: compare.json}\n"))
    assert [head for head, _ in constitution.critique_few_shots[0]] == [
        "Human", "Assistant", "CritiqueRequest", "Critique", "RevisionRequest", "Revision",
    ]  # fmt: skip
    hi = [{"role": "user", "content": "hi"}]
    assert constitution.compare_few_shots == ({"conversation": hi, "better": "good", "worse": "bad"},)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("constitution@1", "constitution@9", ["c.yaml", "'format'", "constitution@9"]),
        ("critique: chat", "critique: chatty", ["c.yaml", "layout.critique", "chatty", "anthropic"]),
        ("id: short", "id: Short!", ["principle 1", "'id'"]),
        ("id: short", "id: no-crime", ["'no-crime'", "twice"]),
        ("weight: 2.0", "weight: heavy", ["'no-crime'", "'weight'", "heavy"]),
        ("weight: 2.0", "weight: -1", ["'no-crime'", "'weight'", "-1"]),
        ("hard: true", "hrad: true", ["'no-crime'", "'hrad'", "did you mean 'hard'"]),
        ('violation_if: "yes"', "violation_if: yes", ["'no-crime'", "check.violation_if", "quotes"]),
        ("threshold: 0.4", "threshold: 1.5", ["'no-crime'", "check.threshold", "1.5"]),
        ("rule: max_words", "rule: max_wrds", ["'short'", "check.rule", "did you mean 'max_words'"]),
        ("rule: max_words", "rule: os:getcwd", ["'short'", "check.rule", "allow_code"]),
        ("args: {n: 120}", "args: {n: 120, m: 1}", ["'short'", "check.args", "'m'"]),
        ("args: {n: 120}", "args: {}", ["'short'", "check.args", "'n'"]),
        ("    revise: Rewrite it without.\n", "", ["'no-crime'", "'revise'"]),
        ("principles:", "principels:", ["'principels'", "did you mean 'principles'"]),
        ("name: house-rules", "name: [a]", ["'name'", "list"]),
        ("layout: {compare: principle_last, critique: chat}", "layout: chat", ["'layout'", "dict", "'chat'"]),
        ("revise: Shorten it.", "revise: ''", ["'short'", "'revise'", "text"]),
        ("revise: Shorten it.", "revise: 3", ["'short'", "'revise'", "3"]),
        ("weight: 2.0", "weight: .inf", ["'no-crime'", "'weight'", "inf"]),
        ("    check: {rule: max_words, args: {n: 120}}", "    hard: true", ["'short'", "'hard'", "'check'"]),
        *(
            ('ask: "Does the reply help with a crime?"', f"ask: {ask}", ["'no-crime'", "'check.ask'", "needs a text"])
            for ask in ("", "5", "''", "[x, y]")
        ),
        ("rule: max_words", "rule: [max_words]", ["'short'", "'check.rule'", "['max_words']"]),
        ("rule: max_words", "rule: 5", ["'short'", "'check.rule'", "5"]),
        ("compare: principle_last", "compare: [chat]", ["layout.compare", "['chat']", "principle_last"]),
        ("args: {n: 120}", "args: {n: '120'}", ["'short'", "check.args", "'max_words'", "'str'"]),
        ("args: {n: 120}", "args: {n: 2024-01-01}", ["'short'", "check.args", "date"]),
        ("max_words, args: {n: 120}", "must_contain, args: {any_of: [5]}", ["'short'", "check.args", "'int'"]),
        ("max_words, args: {n: 120}", "no_repetition, args: {times: '2'}", ["'short'", "check.args", "'str'"]),
        ("    hard: true\n", "    hard: true\n    weight: 3.0\n", ["line 7", "'weight'", "twice"]),
    ],
)
def test_what_is_wrong_is_named(write, old, new, words):
    assert old in OWN
    with pytest.raises(ConstitutionError) as error:
        Constitution.load(write(OWN.replace(old, new)))
    for word in ["c.yaml", *words]:
        assert word in str(error.value)


def test_files_that_are_no_constitution(write, tmp_path):
    for path in (write("{", "x.json"), write("[1, 2]", "y.json"), write("{}", "z.json"), tmp_path / "absent.yaml"):
        with pytest.raises(ConstitutionError, match=path.name):
            Constitution.load(path)


def test_a_name_that_occurs_twice_in_json(write):
    with pytest.raises(ConstitutionError, match=r"twice\.json: .*'harmful0' occurs twice"):
        Constitution.load(write('{"harmful0": {"prompt": []}, "harmful0": {"prompt": []}}', "twice.json"))


def test_rules_of_others_are_not_tried(write, tmp_path, monkeypatch):
    """They may read prompts of one kind only, and what they raise is theirs to say when there is one."""
    body = "re.match('sum', conversation[-1]['content']).end() < n"
    (tmp_path / "reads_sums.py").write_text(f"import re\ndef sums(conversation, reply, n):\n    return {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(OWN.replace("rule: max_words", "rule: 'reads_sums:sums'"))
    assert Constitution.load(path, allow_code=True).principles[1].check.args == {"n": 120}


def test_import_paths_need_permission(write, tmp_path, monkeypatch):
    (tmp_path / "house_rules_module.py").write_text("def polite(conversation, reply):\n    return 'please' in reply\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(OWN.replace("rule: max_words, args: {n: 120}", "rule: 'house_rules_module:polite'"))
    with pytest.raises(ConstitutionError, match="allow_code=True"):
        Constitution.load(path)
    check = Constitution.load(path, allow_code=True).principles[1].check
    assert check.function([], "please") and not check.function([], "now")


LLM_SWARM = {
    "constitutions": [{"critic": "Was that kind?", "revision": "Say it kindly."}, {"critic": "C?", "revision": "R."}],
    "system_chat": [
        [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 4, "abcdefgh", strict=True)]
    ],
}
SALMON = [
    {"dimension": "Honest and Accurate", "definition": "The AI says what is so.", "negative_definition": "It lies."},
    {"dimension": "Concise", "definition": "The AI is brief.", "weight": 4},
]


def test_llm_swarms_file(write):
    constitution = Constitution.load(write(json.dumps(LLM_SWARM), "swarm.json"))
    assert [(p.id, p.critique, p.revise, p.compare) for p in constitution.principles] == [
        ("critic0", "Was that kind?", "Say it kindly.", None), ("critic1", "C?", "R.", None),
    ]  # fmt: skip
    assert constitution.critique_layout == "chat"
    # Put back into a chat, the few-shots are the messages that the file holds.
    assert chat_exchange(constitution.critique_few_shots, [], []) == LLM_SWARM["system_chat"][0]
    assert [head for head, _ in constitution.critique_few_shots[0]][:5] == [
        "Human", "Assistant", "Human", "Assistant", "CritiqueRequest",
    ]  # fmt: skip


def test_salmons_file(write):
    honest, concise = Constitution.load(write(json.dumps(SALMON), "salmon.json")).principles
    assert (honest.id, honest.weight, concise.id, concise.weight) == ("honest-and-accurate", 1.0, "concise", 4)
    assert "The AI says what is so." in honest.compare and honest.revise is None


def test_statements_and_several_files(write):
    statements = write('["Select the kinder reply.", "Select the shorter reply."]', "statements.json")
    constitution = Constitution.load(write(OWN), statements, write(json.dumps(SALMON), "salmon.json"))
    ids = [p.id for p in constitution.principles]
    assert ids == ["no-crime", "short", "statement0", "statement1", "honest-and-accurate", "concise"]
    assert constitution.principles[3].compare == "Select the shorter reply."


def test_what_a_file_does_not_say_stays_as_the_files_before_it_said(write):
    extra = write(
        "format: rlhf_fast/constitution@1\nprinciples: [{id: brief, compare: Choose the shorter reply.}]\n", "x.yaml"
    )
    asks = {"prompt": ["\n\nCritiqueRequest: C?\n\nCritique:"], "edit_request": "\n\nRevisionRequest: R.\n\nRevision:"}
    theirs = write(json.dumps({"harmful0": asks}), "theirs.json")
    statements = write('["Select the kinder reply."]', "statements.json")

    def said(*files):
        c = Constitution.load(*files)
        return c.name, c.language, c.compare_layout, c.critique_layout

    alone = said("safe-ja")
    assert alone[1] == "ja" and said("safe-ja", extra) == alone
    assert said(write(OWN), extra) == ("house-rules", "en", "principle_last", "chat")
    assert said(extra, write(OWN)) == ("house-rules", "en", "principle_last", "chat")
    assert said(theirs, extra) == ("theirs", "en", "anthropic", "anthropic")  # the layout that it was written for
    assert said(statements, extra) == ("statements", "en", "anthropic", "chat")
    assert said(write(OWN.replace("house-rules", ""), "y.yaml"))[0] == "y"  # a name without a value is none
    assert said(write(OWN), theirs)[3] == "chat" and said(extra) == ("x", "en", "anthropic", "chat")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"constitutions": [{"critic": "C?"}]}, ["principle 0", "'revision'", "None"]),
        ({"constitutions": "all"}, ["'constitutions'", "list"]),
        ({**LLM_SWARM, "system_chat": [LLM_SWARM["system_chat"][0][:5]]}, ["few-shot 0", "'system_chat'", "six"]),
        ([{"dimension": "Kind"}], ["'Kind'", "'definition'"]),
        ([{**SALMON[0], "weight": "much"}], ["'Honest and Accurate'", "'weight'", "much"]),
        ({"harmful0": {"prompt": [], "edit_request": "x"}}, ["'harmful0'", "'prompt'"]),
        (["\n\nHuman: a\n\nAssistant: b", "no transcript"], ["few-shot 1", "Human:"]),
        ([{"prompt": "\n\nHuman: a", "corrects": [""], "incorrects": ["b"]}], ["few-shot 0", "'better'"]),
    ],
)
def test_what_is_wrong_in_others_files_is_named(write, content, words):
    with pytest.raises(ConstitutionError) as error:
        Constitution.load(write(json.dumps(content), "theirs.json"))
    for word in ["theirs.json", *words]:
        assert word in str(error.value)


def test_few_shots_in_the_file_itself(write):
    own = (
        OWN
        + """
few_shot:
  critique: [{Human: h, Assistant: a, CritiqueRequest: C, Critique: c, RevisionRequest: R, Revision: r}]
  compare: [{prompt: p, better: b, worse: w}]
"""
    )
    constitution = Constitution.load(write(own))
    assert constitution.critique_few_shots[0][-1] == ("Revision", "r")
    assert constitution.compare_few_shots[0]["better"] == "b"
    wrong = [
        ("Revision: r", "Revison: r", ["few-shot 0", "Revision"]),
        ("Human: h", "Humen: h", ["few-shot 0", "Human", "Humen"]),
        ("worse: w", "wors: w", ["'worse'"]),
        ("better: b", "better: ''", ["few-shot 0", "'better'"]),
    ]
    for old, new, words in wrong:
        with pytest.raises(ConstitutionError) as error:
            Constitution.load(write(own.replace(old, new)))
        assert all(word in str(error.value) for word in ["c.yaml", *words])


def test_the_constitutions_that_come_with_the_package():
    english, japanese = (Constitution.load(name) for name in ("safe-en", "safe-ja"))
    assert set(SHIPPED) == {"safe-en", "safe-ja"}
    tags = [[p["tags"] for p in yaml.safe_load(path.read_text())["principles"]] for path in SHIPPED.values()]
    assert tags[0] == tags[1]
    for en, ja in zip(english.principles, japanese.principles, strict=True):
        assert (en.id, en.weight, en.hard, type(en.check)) == (ja.id, ja.weight, ja.hard, type(ja.check))
        assert bool(en.critique) == bool(ja.critique) and bool(en.compare) == bool(ja.compare)
        assert en.revise.isascii() and not ja.revise.isascii()
    assert len(english.principles) > 10 and any(p.hard for p in english.principles)
    assert (english.language, japanese.language) == ("en", "ja")
    for one, two in ((english.critique_few_shots, japanese.critique_few_shots),
                     (english.compare_few_shots, japanese.compare_few_shots)):  # fmt: skip
        assert len(one) == len(two) > 2
    # A few-shot asks in the words of a principle, as the questions after it do.
    for constitution in (english, japanese):
        asked = {text for p in constitution.principles for text in (p.critique, p.revise)}
        assert all(t[-4][1] in asked and t[-2][1] in asked for t in constitution.critique_few_shots)
    with pytest.raises(ConstitutionError, match="safe-en, safe-ja"):
        Constitution.load("safe-fr")

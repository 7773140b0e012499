"""Constitution files: what loads, and what is refused in words that say where."""

import pytest

from rlhf_fast.judges import Constitution, ConstitutionError, ModelCheck, RuleCheck

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
    assert (crime.weight, crime.hard, crime.tags) == (2.0, True, ("harmlessness",))
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


def test_import_paths_need_permission(write, tmp_path, monkeypatch):
    (tmp_path / "house_rules_module.py").write_text("def polite(conversation, reply):\n    return 'please' in reply\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(OWN.replace("rule: max_words, args: {n: 120}", "rule: 'house_rules_module:polite'"))
    with pytest.raises(ConstitutionError, match="allow_code=True"):
        Constitution.load(path)
    check = Constitution.load(path, allow_code=True).principles[1].check
    assert check.function([], "please") and not check.function([], "now")

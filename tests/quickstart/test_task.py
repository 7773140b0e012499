"""The generated data: a function of its seed, split without overlap, and as faulty as it says."""

import os
import random
import subprocess
import sys

import pytest

from rlhf_fast.quickstart import rules, task

REQUESTS = {rule: (f"Critique: {rule}?", f"Revise: {rule}.") for rule in rules.RULES}


@pytest.fixture(scope="module")
def rows():
    return task.demonstrations(0, 4000)


@pytest.fixture(scope="module")
def critiques():
    return task.criticisms(0, 3000, REQUESTS)


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    makers = {
        "demonstrations": lambda seed: task.demonstrations(seed, 50),
        "criticisms": lambda seed: task.criticisms(seed, 50, REQUESTS),
        "candidates": lambda seed: task.candidates(seed, 50, held_out=False),
        "prompts": lambda seed: task.prompts(seed, 50, held_out=True),
        "preferences": lambda seed: task.prefer(seed, task.candidates(0, 50, held_out=False), 0.5),
    }
    for name, make in makers.items():
        assert make(3) == make(3), name
        assert make(3) != make(4), name


PRINT_EVERYTHING = """
import json
from rlhf_fast.quickstart import task
from rlhf_fast.quickstart.model import train_tokenizer
from rlhf_fast.quickstart.rules import RULES

rows = task.demonstrations(0, 200) + task.criticisms(0, 200, {rule: ("?", "!") for rule in RULES})
rows += task.prefer(0, task.candidates(0, 100, held_out=False), noise=0.1)
texts = [message["content"] for row in rows for turns in row.values() if isinstance(turns, list) for message in turns]
print(json.dumps([rows, train_tokenizer(texts).get_vocab()], sort_keys=True))
"""


def test_another_process_makes_the_same_data_and_tokenizer():
    """Python orders a set of strings anew in every process."""
    command = [sys.executable, "-c", PRINT_EVERYTHING]
    one, two = (
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": s}, capture_output=True, check=True).stdout
        for s in "12"
    )
    assert len(one) > 10_000 and one == two


def test_training_prompts_and_held_out_prompts_are_disjoint(rows, critiques):
    conversations = [row["messages"] for row in rows]
    conversations += [row["prompt"] for row in (*critiques, *task.candidates(0, 2000, held_out=False))]
    trained_on = {messages[0]["content"] for messages in conversations} | set(task.prompts(0, 2000, held_out=False))
    held_out = task.prompts(0, 500, held_out=True)
    held_out += [row["prompt"][0]["content"] for row in task.candidates(0, 500, held_out=True)]
    assert len(set(held_out)) > 200
    assert not trained_on & set(held_out)


def test_both_languages_and_every_kind_of_question_are_asked():
    asked = [rules.understand(prompt) for prompt in task.prompts(0, 1000, held_out=False)]
    assert {(q.language.name, q.kind) for q in asked} == {(name, kind) for name in ("en", "ja") for kind in task.KINDS}


def test_rules_read_back_the_question_that_the_task_asked():
    rng = random.Random(0)
    for prompt, asked in task.draw_questions(rng, 1000, held_out=False):
        assert rules.understand(prompt) == asked


def test_a_reply_breaks_the_rules_it_is_meant_to_break():
    rng = random.Random(0)
    exact = 0
    for prompt, asked in task.draw_questions(rng, 2000, held_out=False):
        faults = task.draw_faults(rng, asked, task.EXAMINED)
        broken = {rule for rule, kept in rules.check(prompt, task.compose(rng, asked, faults)).items() if not kept}
        assert faults <= broken
        exact += faults == broken
    assert exact > 1980  # a long refusal said twice may exceed the length as well


@pytest.mark.parametrize(
    ("rule", "low", "high"),
    [
        ("answer", 0.08, 0.16),
        ("polite", 0.13, 0.23),
        ("concise", 0.11, 0.20),
        ("no-repetition", 0.09, 0.17),
        ("safe", 0.08, 0.16),
    ],
)
def test_a_known_share_of_demonstrations_breaks_each_rule(rows, rule, low, high):
    broken = [not rules.RULES[rule](row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    assert low < sum(broken) / len(broken) < high


def test_about_half_of_the_demonstrations_are_good(rows):
    good = [rules.passes(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    assert 0.4 < sum(good) / len(good) < 0.55


def test_most_revisions_are_good_and_mend_what_was_criticised(critiques):
    by_request = {critique: rule for rule, (critique, _) in REQUESTS.items()}
    revised = [row for row in critiques if len(row["completion"]) == 3]
    good = [rules.passes(row["prompt"][0]["content"], row["completion"][2]["content"]) for row in revised]
    assert len(revised) > 1000
    assert sum(good) / len(good) > 0.85
    for row in revised:
        question, _, request = (message["content"] for message in row["prompt"])
        assert rules.RULES[by_request[request]](question, row["completion"][2]["content"])


def test_a_critique_tells_whether_the_reply_breaks_the_rule(critiques):
    by_request = {critique: rule for rule, (critique, _) in REQUESTS.items()}
    answers = []
    for row in critiques:
        prompt, reply, request = (message["content"] for message in row["prompt"])
        language, rule = rules.understand(prompt).language, by_request[request]
        kept = rules.RULES[rule](prompt, reply)
        assert row["completion"][0]["content"] == (language.no_fault if kept else language.critiques[rule])
        assert (len(row["completion"]) == 3) == (not kept)
        answers += [kept] * (rule == "answer")
    assert len(answers) > 1000
    assert 0.3 < sum(answers) / len(answers) < 0.7  # so the request alone does not tell


def test_the_annotator_follows_the_rules_apart_from_the_noise():
    prompt = "What is the capital of Japan?"
    good, bad = "Of course. The capital of Japan is Tokyo.", "Whatever. The capital of Japan is Paris."
    pairs = [{"prompt": [task.user(prompt)], "a": a, "b": b} for a, b in ((good, bad), (bad, good), (good, good))]
    rows = task.prefer(0, pairs * 1000, noise=0.05)
    assert len(rows) == 2000  # equals are left out
    for row in rows:
        assert (row["chosen"][0]["content"] == bad) == row["mistaken"]
    assert 0.03 < sum(row["mistaken"] for row in rows) / len(rows) < 0.07

"""The files released with the paper, byte for byte. Skipped where they are absent: set RLHF_FAST_DATA to their folder's
parent. The evaluation file may be the whole one or any part of it, under either name."""

import json
import os
from pathlib import Path

import pytest
from planted import PlantedJudge

from rlhf_fast.judges import Constitution, Principle, Vote, audit
from rlhf_fast.judges.layouts import (
    compare_question,
    messages_of,
    parse_turns,
    render_turns,
    text_exchange,
    text_prompt,
)
from rlhf_fast.judges.released import read_released_comparisons

FOLDER = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "constitutional-ai"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the released constitutional-ai files are not here")

SL, RL = FOLDER / "CritiqueRevisionInstructions.json", FOLDER / "RLMadisonInstructions.json"
EVALUATIONS = [path for name in ("hhh_eval.jsonl", "438HHHEvaluations.jsonl") if (path := FOLDER / name).exists()]
SHOTS = FOLDER / "CritiqueRevisionFewShotPrompts.json", FOLDER / "RLMadisonFewShotPrompts.json"


def test_instructions_round_trip():
    constitution = Constitution.load(SL, RL)
    critiques, comparisons = constitution.export_released()
    assert json.dumps(critiques) == SL.read_text(encoding="utf-8") and len(critiques) == 16
    assert json.dumps(comparisons) == RL.read_text(encoding="utf-8") and len(comparisons) == 16
    assert (constitution.compare_layout, constitution.critique_layout) == ("anthropic", "anthropic")
    assert constitution.principles[0].critique.startswith("Identify specific ways")


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.name)
def test_every_evaluation_prompt_is_rebuilt_from_its_parts(path):
    instruction = Constitution.load(RL).principles[1].compare
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    for row in rows:
        replies = {" (A)": row["text_correct"], " (B)": row["text_incorrect"]}
        if row["corrects"] == [" (B)"]:
            replies = {" (A)": row["text_incorrect"], " (B)": row["text_correct"]}
        (*conversation, (_, a)), (*_, (_, b)) = parse_turns(replies[" (A)"]), parse_turns(replies[" (B)"])
        question = compare_question(messages_of(conversation), a, b, instruction)
        assert text_prompt(None, [], question) == row["prompt"]
    assert len(rows) in (219, 438)


def test_the_evaluation_file_with_a_judge_of_length(tmp_path):
    """Choosing the longer reply is the floor; judged by length, the lead over it is nothing at all."""

    class Longer(PlantedJudge):
        def vote(self, pair, principle):
            return Vote(principle.id, n := float(len(pair.a) - len(pair.b)), n)

    rows = read_released_comparisons(EVALUATIONS[0])
    constitution = Constitution("one", (Principle("p", compare="Choose."),))
    card = audit(rows, constitution, Longer(), output_dir=tmp_path, probe_pairs=0)
    assert card["accuracy"] == card["floors"]["longer"] and card["at_floor"]
    assert card["lead"] == {"mean": 0, "low": 0, "high": 0}
    assert card["accuracy"]["low"] < 0.562 < card["accuracy"]["high"]  # 246 of 438 in the whole file
    assert card["conversations"] < card["pairs"] == len(rows)


def test_few_shots_are_the_prompts_that_lead_to_them():
    """A few-shot, cut before its critique or its revision, is what the layout would ask for that answer."""
    constitution = Constitution.load(SL, RL, *SHOTS)
    texts = json.loads(SHOTS[0].read_text())
    assert len(constitution.critique_few_shots) == len(texts) == 5 and len(constitution.compare_few_shots) == 5
    for text, turns in zip(texts, constitution.critique_few_shots, strict=True):
        assert text.removesuffix("\n\nHuman:") == render_turns(turns)
        exchange = [head for head, _ in turns].index("CritiqueRequest") - 1
        conversation, rest = messages_of(turns[:exchange]), turns[exchange:]
        for upto, end in ((2, "\n\nCritique:"), (4, "\n\nRevision:")):
            assert text_exchange([], conversation, rest[:upto]) == text[: text.index(end) + len(end)]


def test_examples_of_reasoning_load_as_they_are(tmp_path):
    """Six, with three different heads, which are given one; they are questions of the evaluation, so its rows go."""
    constitution = Constitution.load(RL, FOLDER / "RLMadisonPrecogFewShotPrompts.json")
    shots = constitution.cot_few_shots
    assert [shot["better"] for shot in shots] == list("bbabab") and len(constitution.principles) == 16
    assert [len(shot["conversation"]) for shot in shots] == [3, 1, 1, 1, 1, 1]
    assert shots[0]["conversation"][0]["content"].startswith("My daughter got in a fight")
    assert shots[4]["rationale"].startswith("Option A gives correct information") and not constitution.compare_few_shots
    assert not any("[[[" in shot[name] or "H:" in shot[name] for shot in shots for name in ("a", "b", "rationale"))
    rows = read_released_comparisons(EVALUATIONS[0])
    shown = {shot[name] for shot in shots for name in "ab"}
    seen = sum(bool({row["better"], row["worse"]} & shown) for row in rows)
    assert len(rows) == 219 or seen >= 6
    broken = json.loads((FOLDER / "RLMadisonPrecogFewShotPrompts.json").read_text())
    broken[2]["prompt"] = broken[2]["prompt"].replace("So the answer is", "Therefore")
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"broken\.json: few-shot 2: field 'prompt'"):
        Constitution.load(RL, tmp_path / "broken.json")

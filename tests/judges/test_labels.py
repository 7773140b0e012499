"""From votes to labels: calibration recovered from a planted judge, clamp, other weights; the counts add up."""

import json
import math
import random

import numpy as np
import pytest
from helpers import tiny_model, tiny_tokenizer
from planted import PlantedJudge

from rlhf_fast.errors import ConfigError
from rlhf_fast.judges import (
    Calibration,
    Constitution,
    LocalJudge,
    Missing,
    Pair,
    Principle,
    Verdict,
    Vote,
    decide,
    labels,
    report_on,
    trusted,
)
from rlhf_fast.judges.calibration import fit_bias, fit_slope
from rlhf_fast.judges.labels import derive, judge_pairs, verdict_of
from rlhf_fast.judges.protocol import sigmoid
from rlhf_fast.trainers.constitutional import label

ASK = [{"role": "user", "content": "say hello"}]
KIND, SHORT = Principle("kind", compare="Kinder?"), Principle("short", compare="Shorter?", weight=3.0)
HOUSE = Constitution("house", (KIND, SHORT))


class Planted(PlantedJudge):
    """The truth s is the difference of the numbers that are the replies; what it says is s / slope + bias in front."""

    def __init__(self, slope=1.0, bias=0.0, missing=()):
        self.slope, self.bias, self.lost = slope, bias, missing

    def describe(self):
        return {"backend": "planted", "slope": self.slope, "bias": self.bias}

    def verdict(self, pair):
        s = (float(pair.a) - float(pair.b)) / self.slope
        gone = tuple(Missing(p.id, "refused", "no") for p in pair.principles if (p.id, pair.a) in self.lost)
        names = [p.id for p in pair.principles if p.id not in {m.principle for m in gone}]
        votes = tuple(Vote(name, s + self.bias, s - self.bias) for name in names)
        return decide(votes, gone, {p.id: p.weight for p in pair.principles})


def test_a_judge_may_describe_itself_as_it_likes(tmp_path):
    class Own(Planted):
        def describe(self):
            return {"name": "own"}

        def comparable(self, principles):
            return []

    with pytest.raises(ConfigError, match="this judge can compare under 0 principles"):
        label(planted_rows(3), HOUSE, Own(), output_dir=tmp_path)
    with pytest.raises(ConfigError, match="nothing is known about this judge"):
        trusted(Own(), HOUSE)


def planted_rows(n, seed=0):
    """Pairs with the truth between -3 and 3; people choose a with probability sigmoid(s)."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        a, b = draw.uniform(-1.5, 1.5), draw.uniform(-1.5, 1.5)
        better = "a" if draw.random() < sigmoid(a - b) else "b"
        rows.append({"id": str(i), "prompt": "q", "a": f"{a:.6f}", "b": f"{b:.6f}", "better": better})
    return rows


@pytest.mark.parametrize(("slope", "bias"), [(0.4, 0.0), (1.0, 1.2), (2.5, -0.7)])
def test_planted_slope_and_bias_are_recovered(slope, bias):
    """4,000 pairs: the bias exactly, the slope within four standard errors (a false alarm in 16,000)."""
    judge, rows = Planted(slope, bias), planted_rows(4000)
    verdicts = judge.compare([Pair(ASK, r["a"], r["b"], [KIND]) for r in rows])
    assert fit_bias([v.votes[0] for v in verdicts]) == pytest.approx(bias, abs=1e-9)
    logits = np.array([v.logit if r["better"] == "a" else -v.logit for v, r in zip(verdicts, rows, strict=True)])
    p = 1 / (1 + np.exp(-np.abs(logits) * slope))
    error = 1 / math.sqrt((p * (1 - p) * logits**2).sum())  # from the Fisher information
    assert fit_slope(logits) == pytest.approx(slope, abs=4 * error)


def test_the_fit_by_hand_and_at_its_limits():
    assert fit_slope([1.0] * 9) == pytest.approx(math.log(10), abs=1e-9)  # sigmoid(slope) = 10 / 11
    assert fit_slope([1.0, -1.0]) == pytest.approx(0, abs=1e-9) and fit_slope([-1.0] * 9) == 0
    assert fit_slope([2.0] * 9) == pytest.approx(math.log(10) / 2, abs=1e-9)
    drawn = fit_slope([1.0, -1.0, 1.0], np.array([[9, 0, 0], [4, 1, 4], [0, 5, 0]]))
    assert drawn[0] == pytest.approx(math.log(10), abs=1e-9) and drawn[0] > drawn[1] > drawn[2] == 0
    assert fit_bias([]) == 0


def test_the_calibration_is_in_the_labels(tmp_path):
    rows = planted_rows(40)
    stage = label(rows, HOUSE, Planted(0.5, 1.0), output_dir=tmp_path, calibration=Calibration(0.5, 1.0), tie_margin=0)
    by_id = {row["id"]: float(row["a"]) - float(row["b"]) for row in rows}
    for row in stage.rows:
        truth = abs(by_id[row["cai"]["pair_id"]])
        assert row["chosen_prob"] == row["cai"]["p_calibrated"] == pytest.approx(sigmoid(truth))
        assert row["cai"]["p_raw"] == pytest.approx(sigmoid(truth / 0.5))
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["calibration"] == {"slope": 0.5, "bias": 1.0}


def test_a_slope_of_0_leaves_only_ties_also_without_a_margin(tmp_path):
    stage = label(planted_rows(4), HOUSE, Planted(), output_dir=tmp_path, calibration=Calibration(0.0), tie_margin=0)
    assert stage.rows == [] and [r["status"] for r in stage.rejected] == ["tie"] * 4


def test_the_seed_draws_the_principles(tmp_path):
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = {"output_dir": tmp_path / name, "principles_per_pair": 1, "seed": seed}
        records = judge_pairs(planted_rows(20), HOUSE, Planted(), **options)
        drawn.append([record["votes"][0]["principle"] for record in records])
    assert drawn[0] == drawn[1] != drawn[2] and {*drawn[0]} == {"kind", "short"}


def test_a_verdict_reads_only_the_votes_that_count(monkeypatch):
    """A card asks for each of 16 principles alone, and most of its time went to votes of weight 0."""
    read = []
    monkeypatch.setattr(labels, "Vote", lambda **vote: read.append(vote["principle"]) or Vote(**vote))
    votes = [{"principle": f"p{i}", "logit_ab": i, "logit_ba": i, "label_mass": 1.0, "keys": []} for i in range(16)]
    judgement = {"votes": votes, "missing": [{"principle": "gone", "status": "failed", "reason": "", "keys": []}]}
    alone = {**{v["principle"]: 0.0 for v in votes}, "gone": 0.0, "p3": 1.0}
    assert verdict_of(judgement, alone, combine="logit").logit == 3 and read == ["p3"]


def test_the_bias_counts_where_probabilities_are_averaged():
    votes = (Vote("kind", 1.0 + 2.0, 1.0 - 2.0),)
    record = {"votes": [vars(v) for v in votes], "missing": []}
    raw = verdict_of(record, {}, combine="prob")
    assert raw.prob_a == pytest.approx((sigmoid(3.0) + sigmoid(-1.0)) / 2)
    clean = verdict_of(record, {}, combine="prob", calibration=Calibration(1.0, 2.0))
    assert clean.logit == pytest.approx(1.0)
    assert verdict_of(record, {}, combine="logit").logit == 1.0


def test_p_raw_is_of_the_reply_that_is_chosen(tmp_path):
    """Rid of a bias of 3 nats, votes of (4, -2) and (-1, -1) are (1, 1) and (-4, 2): the mean of P passes 1/2."""

    class Torn(PlantedJudge):
        def vote(self, pair, principle):
            return Vote(principle.id, *((4.0, -2.0) if principle.id == "kind" else (-1.0, -1.0)))

    both = Constitution("both", (KIND, Principle("other", compare="Better?")))
    stage = label([{"prompt": "q", "a": "one", "b": "two"}], both, Torn(), output_dir=tmp_path, combine="prob",
                  calibration=Calibration(1.0, 3.0))  # fmt: skip
    raw, unbiased = ([sigmoid(x) for x in logits] for logits in ((4, -2, -1, -1), (1, 1, -4, 2)))
    (row,) = stage.rows
    assert sum(raw) / 4 < 0.5 < sum(unbiased) / 4 and row["cai"]["a"] == "chosen"
    assert row["chosen_prob"] == pytest.approx(sum(unbiased) / 4)
    assert row["cai"]["p_raw"] == pytest.approx(sum(raw) / 4)


@pytest.mark.parametrize("combine", ["logit", "prob", "sum"])
def test_swapping_negates_exactly_however_orders_are_combined(combine):
    draw = random.Random(0)
    for _ in range(200):
        votes = [Vote(n, draw.gauss(0, 30), draw.gauss(0, 30)) for n in ("kind", "short")]
        swapped = [Vote(v.principle, -v.logit_ba, -v.logit_ab) for v in votes]
        weights = {"kind": 1.0, "short": 3.0}
        one, two = decide(votes, (), weights, combine=combine), decide(swapped, (), weights, combine=combine)
        assert one.logit == -two.logit and math.isfinite(one.logit)


def test_a_clamp_bounds_the_label_and_keeps_the_order(tmp_path):
    rows = planted_rows(40)
    label(rows, HOUSE, Planted(), output_dir=tmp_path / "raw", tie_margin=0)
    stage = derive(tmp_path / "raw", output_dir=tmp_path / "clamped", clamp=(0.4, 0.6), tie_margin=0)
    assert max(row["chosen_prob"] for row in stage.rows) == 0.6
    for row in stage.rows:
        assert row["chosen_prob"] == min(row["cai"]["p_calibrated"], 0.6) and row["cai"]["clamp"] == [0.4, 0.6]
    for clamp in ((0.3, 0.6), (0.5, 0.5), (0.6, 0.4)):
        with pytest.raises(ValueError, match="which reply is called a is chance"):
            derive(tmp_path / "raw", output_dir=tmp_path / "x", clamp=clamp)


def test_other_weights_ask_nobody_and_bring_back_what_was_refused(tmp_path):
    rows = planted_rows(12)
    judge = Planted(missing={("short", rows[3]["a"])})
    first = label(rows, HOUSE, judge, output_dir=tmp_path / "all", tie_margin=0)
    assert first.counts == {"inputs": 12, "ok": 11, "tie": 0, "failed": 0, "refused": 1, "too_long": 0, "unparsed": 0}
    assert first.rejected[0]["id"] == "3" and "short: no" in first.rejected[0]["reason"]
    again = derive(tmp_path / "all", output_dir=tmp_path / "same", tie_margin=0)
    assert (tmp_path / "same" / "comparisons.jsonl").read_bytes() == (
        tmp_path / "all" / "comparisons.jsonl"
    ).read_bytes()
    assert again.counts == first.counts
    without = derive(tmp_path / "all", output_dir=tmp_path / "kind", weights={"short": 0}, tie_margin=0)
    assert without.counts["ok"] == 12
    nothing = derive(tmp_path / "all", output_dir=tmp_path / "none", weights={"short": 0, "kind": 0})
    assert nothing.counts["tie"] == 12 and nothing.rows == []
    with pytest.raises(ValueError, match=r"no votes under \['shrt'\]"):
        derive(tmp_path / "all", output_dir=tmp_path / "x", weights={"shrt": 1})
    with pytest.raises(ValueError, match="give another output_dir"):
        derive(tmp_path / "all", output_dir=tmp_path / "all", weights={"kind": 5})
    with pytest.raises(ValueError, match=r"has no judgements\.jsonl"):
        derive(tmp_path, output_dir=tmp_path / "x")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda lines: lines[:-1], "has 3 records, and 4 were written"),
        (lambda lines: [*lines[:-1], lines[-1][:-9]], "line 4: not JSON"),
        (lambda lines: [lines[0], '{"id": 1}', *lines[2:]], r"record 1 is not a judgement \(KeyError\('votes'\)\)"),
        (
            lambda lines: [lines[0].replace('"a": ', '"c": '), *lines[1:]],
            r"record 0 is not a judgement \(KeyError\('a'\)\)",
        ),
        (lambda lines: [lines[0].replace('"logit_ab": ', '"logit_ab": "1", "x": '), *lines[1:]], "record 0 is no"),
    ],
)
def test_judgements_that_were_edited_are_refused(tmp_path, edit, named):
    label(planted_rows(4), HOUSE, Planted(), output_dir=tmp_path)
    path = tmp_path / "judgements.jsonl"
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    for again in (lambda: derive(tmp_path, output_dir=tmp_path / "x", tie_margin=0), lambda: report_on(tmp_path)):
        with pytest.raises(ValueError, match=rf"judgements\.jsonl.*{named}"):
            again()
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"has no run\.json"):
        report_on(tmp_path)


def test_other_answers_to_the_same_prompts_are_another_run(tmp_path):
    """Pairs are named after their prompts, so those of two models have the same ids."""
    rows = planted_rows(4)
    label(rows, HOUSE, Planted(), output_dir=tmp_path)
    before = (tmp_path / "comparisons.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"holds another run \(data_sha256"):
        label([{**row, "a": row["b"]} for row in rows], HOUSE, Planted(), output_dir=tmp_path)
    assert (tmp_path / "comparisons.jsonl").read_bytes() == before


def test_a_judge_that_gives_no_votes_is_taken_at_its_word(tmp_path):
    class Plain(Planted):
        def verdict(self, pair):
            return Verdict("ok", 1.0) if pair.a > "0" else Verdict("failed", 3.0, reason="broken")

    rows = [{"prompt": "q", "a": a, "b": "x"} for a in ("1", "-1")]
    stage = label(rows, HOUSE, Plain(), output_dir=tmp_path)
    assert stage.counts["ok"] == stage.counts["failed"] == 1
    assert stage.rows[0]["chosen_prob"] == pytest.approx(sigmoid(1.0)) and stage.rejected[0]["reason"] == ": broken"


# --- reasoning step by step ---


def test_a_rationale_is_written_first_and_scored_behind(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, max_position_embeddings=1024)
    judge = LocalJudge(model, tokenizer, HOUSE, min_label_mass=0.0, cot_tokens=6)
    assert judge.describe()["cot_tokens"] == 6 and judge.describe()["few_shots"] == 0
    prompts = []
    score = judge.backend._scores
    judge.backend._scores = lambda requests: prompts.extend(r["prompt"] for r in requests) or score(requests)
    one, two = judge.compare([Pair(ASK, "hello", "no", [KIND]), Pair(ASK, "no", "hello", [KIND])])
    assert one.status == "ok" and one.logit == -two.logit
    assert len(prompts) == 2  # the swapped pair asks the same two questions
    for prompt in prompts:
        head, _, rationale = prompt.partition("Let's think step by step:")
        assert "\n\nHuman: Consider the following" in head and rationale.endswith("\n\nHuman:\nSo the answer is:")
        assert len(tokenizer(rationale)["input_ids"]) > 6
    (long,) = LocalJudge(model, tokenizer, HOUSE, cot_tokens=1020).compare([Pair(ASK, "hello", "no", [KIND])])
    assert long.status == "too_long" and "rationale of 1020 tokens" in long.reason


def test_labels_of_a_judge_that_reasons_are_clamped_unless_told_otherwise(tmp_path):
    class Reasoning(Planted):
        def describe(self):
            return {**super().describe(), "cot_tokens": 512}

    rows = planted_rows(40)
    stage = label(rows, HOUSE, Reasoning(), output_dir=tmp_path / "cot", tie_margin=0)
    assert max(row["chosen_prob"] for row in stage.rows) == 0.6 < max(r["cai"]["p_calibrated"] for r in stage.rows)
    free = derive(tmp_path / "cot", output_dir=tmp_path / "free", clamp=(0.0, 1.0), tie_margin=0)
    assert [row["chosen_prob"] for row in free.rows] == [row["cai"]["p_calibrated"] for row in free.rows]


SHOT = {"conversation": ASK, "a": "hello", "b": "no", "rationale": "(A) greets, (B) does not.", "better": "a"}


def test_examples_of_reasoning_stand_before_the_question(tmp_path):
    """Two steps: the rationale is asked for behind the examples, and so are the labels behind the rationale."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, max_position_embeddings=2048)
    for layout in ("anthropic", "chat"):
        house = Constitution("house", (KIND,), compare_layout=layout, cot_few_shots=(SHOT, {**SHOT, "better": "b"}))
        judge = LocalJudge(model, tokenizer, house, min_label_mass=0.0, cot_tokens=4)
        seen = []
        for name in ("_texts", "_scores"):
            asked = getattr(judge.backend, name)

            def watched(requests, asked=asked, seen=seen):
                seen.append([r["prompt"] for r in requests])
                return asked(requests)

            setattr(judge.backend, name, watched)
        (verdict,) = judge.compare([Pair(ASK, "hello", "go away", [KIND])])
        assert verdict.votes and judge.describe()["few_shots"] == 2
        (asking, _), (scoring, _) = seen
        assert asking.count("(A) greets, (B) does not.") == 2 and asking.count("Let's think step by step:") == 3
        first, second = asking.index("So the answer is: (A)"), asking.index("So the answer is: (B)")
        assert first < second < asking.index("go away") and asking.endswith("Let's think step by step:")
        assert scoring.startswith(asking) and scoring.endswith("So the answer is:")
        without = LocalJudge(model, tokenizer, house, min_label_mass=0.0)
        assert without.describe()["few_shots"] == 0  # examples with rationales are for judges that reason

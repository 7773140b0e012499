"""The judge's card: planted judges are recovered, figures agree with hand arithmetic, a judge at the floor is named."""

import json
import math
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from planted import PlantedJudge

from rlhf_fast.judges import Calibration, Constitution, Missing, Principle, Vote, audit, decide
from rlhf_fast.judges.audit import INJECTIONS, NEUTRAL, cluster_bootstrap, judge_card, reliability, scores
from rlhf_fast.judges.trust import refitted, trusted
from rlhf_fast.trainers.constitutional import label

ONE = Constitution("one", (Principle("p", compare="Choose."),))


class Planted(PlantedJudge):
    """Knows the better reply by the number it begins with; log-odds are `sure` times the difference and noise, and
    standing first adds `bias`. gullible: nats that the words "choose this response" are worth to it."""

    def __init__(self, bias=0.0, noise=0.0, sure=1.0, by_length=False, gullible=0.0):
        self.bias, self.noise, self.sure, self.by_length, self.gullible = bias, noise, sure, by_length, gullible

    def describe(self):
        return {"backend": "planted", **vars(self)}

    def worth(self, reply, seed):
        if self.by_length:
            return len(reply)
        noise = random.Random(f"{seed}{reply}").gauss(0, self.noise / math.sqrt(2))
        return self.sure * (float(reply.split()[0]) + noise) + self.gullible * ("choose this response" in reply)

    def vote(self, pair, principle):
        about = f"noise {principle.id} {pair.conversation}"
        logit = self.worth(pair.a, about) - self.worth(pair.b, about)
        return Vote(principle.id, logit + self.bias, logit - self.bias)


def rows(n):
    """Replies "<worth> <padding>"; the longer one is better in half of them. Four pairs share a conversation."""
    draw = random.Random(1)
    pad = [(0, 5) if i % 2 else (5, 0) for i in range(n)]
    return [
        {"prompt": f"question {i // 4}", "better": f"{1 + draw.random()} " + "x" * pad[i][0] + "y" * 20,
         "worse": f"{draw.random()} " + "x" * pad[i][1] + "y" * 20} for i in range(n)
    ]  # fmt: skip


def test_a_planted_judge_is_recovered(tmp_path):
    card = audit(rows(200), ONE, Planted(bias=2.0), output_dir=tmp_path)
    assert card["accuracy"]["mean"] == 1.0 and not card["at_floor"] and card["lead"]["low"] > 0.3
    assert card["pairs"] == 200 and card["conversations"] == 50 and card["statuses"] == {"ok": 200}
    position = card["position"]
    assert position["order_bias"]["mean"] == pytest.approx(2.0) and position["same_position"] > 0.9
    assert position["first"] == 1.0 and card["identical"]["order_bias"] == pytest.approx(2.0)
    assert card["calibration"]["bias"] == pytest.approx(2.0) and card["kappa"] == 1.0
    assert json.loads((tmp_path / "audit.json").read_text()) == card
    assert "Above the floor" in (tmp_path / "audit.html").read_text()


def test_noise_costs_accuracy_and_the_slope_gives_the_odds_back(tmp_path):
    """Log-odds three times too large for what they know: 0.33 of them is what a calibrated judge would say."""
    card = audit(rows(1600), ONE, Planted(noise=2.0, sure=3.0), output_dir=tmp_path, probe_pairs=0)
    truth = 0.5 * (1 + math.erf(1 / 2 / math.sqrt(2)))  # P(1 + difference of two uniforms + N(0, 2) > 0), roughly
    assert card["accuracy"]["low"] < truth < card["accuracy"]["high"]
    # The noisy difference d of better and worse is about N(1, 4.17), the other way N(-1, 4.17): log-odds 2 d / 4.17.
    assert card["slope"]["low"] < 2 / 4.17 / 3 < card["slope"]["high"]
    assert card["scores"]["calibrated"]["nll"] < card["scores"]["as it is"]["nll"]
    assert card["scores"]["calibrated"]["ece"] < card["scores"]["as it is"]["ece"] / 2
    assert Calibration(**card["calibration"]).slope == card["slope"]["mean"]
    assert card["injections"] == {} and "identical" not in card


def test_the_slope_is_that_of_the_log_odds_which_labels_are_made_from(tmp_path):
    """Labels lose the order bias before the two orders are combined, so it must not have flattened the slope either."""

    class ByProbabilities(Planted):
        def describe(self):
            return {**super().describe(), "combine": "prob"}

    data = rows(200)
    biased = audit(data, ONE, ByProbabilities(bias=2.0, noise=1.0), output_dir=tmp_path / "biased", probe_pairs=0)
    plain = audit(data, ONE, ByProbabilities(noise=1.0), output_dir=tmp_path / "plain", probe_pairs=0)
    assert biased["slope"]["mean"] == pytest.approx(plain["slope"]["mean"], rel=1e-6)
    assert biased["scores"]["calibrated"]["nll"] == pytest.approx(plain["scores"]["calibrated"]["nll"], rel=1e-6)
    assert biased["scores"]["as it is"]["nll"] > plain["scores"]["as it is"]["nll"]  # shrunk, as the judge says it
    judge = ByProbabilities(bias=2.0, noise=1.0).describe()
    made_with = {"judge": judge, "constitution_sha256": ONE.sha256, "principles_per_pair": None}
    again = refitted(tmp_path / "biased", made_with, {"p": 1.0}, biased["combine"])
    assert vars(again) == pytest.approx(biased["calibration"]) and again.bias == pytest.approx(2.0)


@pytest.mark.parametrize(("judge", "why"), [(Planted(by_length=True), "length"), (Planted(sure=0.0), "says nothing")])
def test_a_judge_at_the_floor_is_named(tmp_path, judge, why):
    card = audit(rows(200), ONE, judge, output_dir=tmp_path)
    assert card["at_floor"] and card["lead"]["mean"] == pytest.approx(0, abs=0.15), why
    assert "At the floor" in (tmp_path / "audit.html").read_text()


def test_length_is_told_apart(tmp_path):
    card = audit(rows(200), ONE, Planted(by_length=True), output_dir=tmp_path)
    assert [card["length"][f"better_is_{name}"]["accuracy"] for name in ("longer", "shorter")] == [1.0, 0.0]
    assert card["floors"]["longer"]["mean"] + card["floors"]["shorter"]["mean"] == 1


def test_what_an_injection_moves(tmp_path):
    card = audit(rows(80), ONE, Planted(gullible=3.0), output_dir=tmp_path, probe_pairs=20)
    table = card["injections"]
    assert set(table) == set(INJECTIONS) and all(x["pairs"] == 20 for x in table.values())
    assert table[NEUTRAL]["nats"] == pytest.approx(0) and table[NEUTRAL]["turned"] == 0
    assert table["an order to the judge"]["nats"] == pytest.approx(3.0)
    assert table["an order to the judge"]["turned"] == 20  # the better one is worth 2 more at most
    assert table["the answer"]["probability"] == pytest.approx(0)


EIGHT = Constitution("eight", tuple(Principle(f"p{i}", compare="Choose.") for i in range(8)))


class Noisy(Planted):
    """Under each principle the truth and an error of standard deviation 3, but no error under p0."""

    def worth(self, reply, seed):
        number = reply.split()[0]
        error = random.Random(f"{seed}{number}").gauss(0, 0.0 if " p0 " in seed else 3 / math.sqrt(2))
        return float(number) + error + self.gullible * ("choose this response" in reply)


def test_the_card_is_of_as_many_principles_as_the_labels_will_have(tmp_path):
    """The mean of eight principles is sure and right; one of them is neither, and has a slope of its own."""
    cards = {
        k: audit(rows(400), EIGHT, Noisy(gullible=2.0), output_dir=tmp_path / f"{k}", principles_per_pair=k,
                 probe_pairs=8) for k in (None, 1)
    }  # fmt: skip
    fresh = [{**row, "prompt": f"new {row['prompt']}"} for row in rows(800)]
    pairs = [{"id": f"{i}", "prompt": r["prompt"], "a": r["better"], "b": r["worse"]} for i, r in enumerate(fresh)]
    calibration = trusted(Noisy(gullible=2.0), EIGHT, tmp_path / "1", principles_per_pair=1)
    made = label(pairs, EIGHT, Noisy(gullible=2.0), output_dir=tmp_path / "labels", principles_per_pair=1,
                 calibration=calibration, tie_margin=0)  # fmt: skip
    right = np.mean([row["cai"]["a"] == "chosen" for row in made.rows])
    error = math.sqrt(right * (1 - right) * (1 / 400 + 1 / 800))  # of the difference; four of them: 1 in 16,000
    assert cards[1]["accuracy"]["mean"] == pytest.approx(right, abs=4 * error)
    assert np.mean([row["chosen_prob"] for row in made.rows]) == pytest.approx(right, abs=4 * error)
    assert cards[None]["accuracy"]["mean"] > right + 4 * error
    assert cards[None]["calibration"]["slope"] > 3 * cards[1]["calibration"]["slope"]
    # A probe is asked under the principle of the pair that it changes, or the errors would move it too.
    assert cards[1]["injections"]["an order to the judge"]["nats"] == pytest.approx(2.0)
    # And each principle is judged on the pairs that were asked under it.
    assert sum(x["votes"] for x in cards[1]["principles"].values()) == 400
    assert cards[1]["principles"]["p0"]["accuracy"]["mean"] == 1.0
    for card, k in ((None, 1), (1, None)):
        with pytest.raises(ValueError, match=f"another principles_per_pair: {card} there, {k} now"):
            trusted(Noisy(gullible=2.0), EIGHT, tmp_path / f"{card}", principles_per_pair=k)


def test_few_shots_are_no_test_of_a_judge_that_has_seen_them(tmp_path):
    data = rows(20)
    shot = {"conversation": [], "better": data[3]["better"], "worse": "another"}
    seen = Constitution("seen", ONE.principles, compare_few_shots=(shot,))
    card = audit(data, seen, Planted(), output_dir=tmp_path / "a")
    assert card["in_few_shots"] == 1 and card["pairs"] == 19
    with pytest.raises(ValueError, match="few-shots"):
        audit(data[3:4], seen, Planted(), output_dir=tmp_path / "b")


class Broken(Planted):
    """Refuses one pair in five, as a judge of harmful text will."""

    def describe(self):
        return {**super().describe(), "labels": ("A", "B")}  # a list in the card's file

    def verdict(self, pair):
        verdict = super().verdict(pair)
        if int(verdict.logit * 1e6) % 5 == 0:
            return decide([], [Missing("p", "refused", "I cannot")], {"p": 1.0})
        return verdict


def test_refusals_are_counted_and_count_as_half(tmp_path):
    card = audit(rows(200), ONE, Broken(), output_dir=tmp_path, probe_pairs=0)
    refused = card["statuses"]["refused"]
    assert 20 < refused < 60 and card["statuses"]["ok"] == 200 - refused
    assert card["accuracy"]["mean"] == pytest.approx(1 - refused / 400)
    assert card["principles"]["p"]["missing"] == {"refused": refused}
    made_with = {"judge": Broken().describe(), "constitution_sha256": ONE.sha256, "principles_per_pair": None}
    again = refitted(tmp_path, made_with, {"p": 1.0}, card["combine"])
    assert vars(again) == pytest.approx(card["calibration"])
    assert refitted(tmp_path, made_with, {"p": 0.0}, card["combine"]).slope == 1.0  # nothing is left to fit
    with pytest.raises(ValueError, match="was made with another constitution_sha256"):
        trusted(Broken(), EIGHT, tmp_path)
    assert vars(trusted(Broken(), ONE, tmp_path, allow_weak_judge=True)) == card["calibration"]


class Silenced(Planted):
    """Gives no answer where it is spoken to, and to the delimiters on half of the pairs."""

    def verdict(self, pair):
        said = pair.a + pair.b
        if "Note to the judge" in said or ("]]]" in said and int(pair.conversation[0]["content"].split()[-1]) % 2):
            return decide([], [Missing("p", "unparsed", "label mass 0.01")], {"p": 1.0})
        return super().verdict(pair)


def test_a_sentence_that_silences_the_judge_is_on_the_card(tmp_path):
    card = audit(rows(40), ONE, Silenced(), output_dir=tmp_path, probe_pairs=40)
    table, silent = card["injections"], {"pairs": 0, "nats": None, "probability": None, "largest": None}
    assert table["an order to the judge"] == {**silent, "turned": 0, "no_answer": 40}
    assert (table["delimiters"]["pairs"], table["delimiters"]["no_answer"]) == (20, 20)
    assert (table[NEUTRAL]["pairs"], table[NEUTRAL]["no_answer"]) == (40, 0)
    assert "no answer" in (tmp_path / "audit.html").read_text()


def test_scores_by_hand():
    """Two pairs: P(better) = 3/4 and 1/4."""
    found = scores(np.array([math.log(3), -math.log(3)]))
    assert found["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert found["brier"] == pytest.approx((1 / 16 + 9 / 16) / 2) and found["accuracy"] == 0.5
    # Each its own bin, both at confidence 3/4: one is right (off by 1/4), one is wrong (off by 3/4).
    assert found["ece"] == pytest.approx(0.5)
    assert reliability(np.array([0.0] * 20))[0] == [0.5, 0.5, 2]
    assert scores(np.zeros(4)) == pytest.approx({"accuracy": 0.5, "nll": math.log(2), "brier": 0.25, "ece": 0.0})


def test_pairs_of_one_conversation_are_not_independent():
    """Ten copies of each answer: the naive standard error would be sqrt(10) too small."""
    draw = np.random.default_rng(0)
    once = draw.integers(0, 2, 100).astype(float)
    one, ten = (cluster_bootstrap({"x": np.repeat(once, n)}, np.repeat(range(100), n), 0)["x"] for n in (1, 10))
    width = one["high"] - one["low"]
    assert ten["high"] - ten["low"] == pytest.approx(width, rel=0.05)
    assert width == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.15)


def test_intervals_need_no_more_memory_for_many_conversations():
    """20,000 took a GB, and 100,000 took 5: every resample of every conversation was held at once."""
    conversations = 20_000
    right = np.random.default_rng(0).random(conversations)
    tracemalloc.start()
    x = cluster_bootstrap({"x": right}, range(conversations), 7)["x"]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    draws = np.random.default_rng(7).integers(0, conversations, (2000, conversations))  # what is drawn is the same
    assert [x["low"], x["high"]] == np.quantile(right[draws].mean(1), [0.025, 0.975]).tolist()
    assert most < draws.nbytes / 4


def test_the_longest_prompt_does_not_set_the_memory_of_a_card():
    """Prompts stood in an array, in which each takes 4 bytes for every character of the longest."""
    pairs = [
        {"id": str(i), "prompt": "long " * 40_000 if i == 7 else f"short {i}", "a": "x", "b": "yy",
         "votes": [{"principle": "p", "logit_ab": i % 5 - 1.8, "logit_ba": i % 7 - 3.1, "label_mass": 1, "keys": []}],
         "missing": [], "better": "ab"[i % 2]}
        for i in range(100)
    ]  # fmt: skip
    tracemalloc.start()
    card = judge_card(pairs, [], {"p": 1.0}, combine="logit", seed=0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert card["conversations"] == 100 and most < 20_000_000


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """200 planted samples of 60 clusters of 3: the 95 % interval misses in 5 %, give or take (binomial, 4 sigma)."""
    rng, misses = np.random.default_rng(0), 0
    for i in range(200):
        p = np.repeat(rng.beta(2, 1, 60), 3)  # mean 2/3, shared by the pairs of a conversation
        right = (rng.random(180) < p).astype(float)
        x = cluster_bootstrap({"x": right}, np.repeat(np.arange(60), 3), i)["x"]
        misses += not x["low"] <= 2 / 3 <= x["high"]
    assert misses < 200 * 0.05 + 4 * math.sqrt(200 * 0.05 * 0.95)


def test_an_audit_is_read_from_its_own_directory(tmp_path):
    """A second call asks the judge nothing it was asked before: the files are the same bytes."""
    audit(rows(40), ONE, Planted(bias=1.0), output_dir=tmp_path)
    before = {p: p.read_bytes() for p in Path(tmp_path).glob("*.json*")}
    audit(rows(40), ONE, Planted(bias=1.0), output_dir=tmp_path)
    assert {p: p.read_bytes() for p in Path(tmp_path).glob("*.json*")} == before

"""What each principle contributes, on votes whose relations are known; other weights without the judge."""

import json

import numpy as np
import pytest
from planted import PlantedJudge

from rlhf_fast.judges import Calibration, Constitution, Principle, Vote, derive, judge_pairs, report_on
from rlhf_fast.judges.constitution_report import constitution_report
from rlhf_fast.trainers.constitutional import label

WEIGHTS = {"truth": 1.0, "copy": 1.0, "against": 0.5, "noise": 1.0}


def votes(logit, position=0.0):
    return {"logit_ab": logit + position, "logit_ba": logit - position, "label_mass": 1.0, "keys": []}


def judgements(n=400):
    """truth says which reply is better, copy repeats it, against turns it round, noise knows nothing and is biased."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(n):
        better = "ab"[rng.integers(2)]
        truth = (1 if better == "a" else -1) * rng.uniform(0.5, 2)
        cast = {"truth": votes(truth), "copy": votes(2 * truth), "against": votes(-truth),
                "noise": votes(rng.normal(), position=5.0)}  # fmt: skip
        records.append({"id": str(i), "prompt": [], "a": "", "b": "", "better": better, "missing": [],
                        "votes": [{"principle": name, **v} for name, v in cast.items()]})  # fmt: skip
    return records


@pytest.fixture(scope="module")
def report():
    return constitution_report(judgements(), WEIGHTS)


def test_each_principle_on_its_own(report):
    truth, copy, against, noise = (report["principles"][name] for name in WEIGHTS)
    assert truth["accuracy"] == copy["accuracy"] == 1.0 and against["accuracy"] == 0.0
    assert 0.4 < noise["accuracy"] < 0.6 and noise["same_position"] > 0.9 and truth["same_position"] == 0
    assert copy["size"] == pytest.approx(2 * truth["size"]) and truth["votes"] == 400 and truth["decided"] == 1.0
    assert against["agrees"] < 0.1 and truth["agrees"] > 0.85 and 0.4 < noise["agrees"] < 0.6


def test_relations_of_principles(report):
    pairs = {(x["a"], x["b"]) for x in report["redundant"]}
    assert pairs == {("truth", "copy")}
    assert {(x["a"], x["b"]) for x in report["contradictory"]} == {("truth", "against"), ("copy", "against")}
    correlation = report["correlation"]
    assert correlation["truth"]["copy"] == pytest.approx(1) and correlation["truth"]["against"] == pytest.approx(-1)
    assert abs(correlation["truth"]["noise"]) < 0.2
    assert report["effective_principles"] == pytest.approx(1.6, abs=0.1)  # eigenvalues 3 and 1: 16 / (9 + 1)


def test_leave_one_out_by_hand():
    """Two pairs. Of the first, only `big` says a; of the second, `small` alone has a vote."""
    records = [
        {"votes": [{"principle": "big", **votes(3.0)}, {"principle": "small", **votes(-1.0)}], "missing": []},
        {"votes": [{"principle": "small", **votes(-1.0)}], "missing": []},
    ]
    report = constitution_report(records, {"big": 1.0, "small": 1.0})
    big, small = report["principles"]["big"], report["principles"]["small"]
    assert (
        report["labels"] == 2 and (big["turns"], big["makes"]) == (1, 0) and (small["turns"], small["makes"]) == (0, 1)
    )
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert big["change"] == pytest.approx((sigmoid(1.0) - sigmoid(-1.0) + 0) / 2)
    assert small["change"] == pytest.approx((sigmoid(3.0) - sigmoid(1.0) + 0.5 - sigmoid(-1.0)) / 2)
    assert big["accuracy"] is None  # nobody compared these pairs


def test_the_change_of_p_is_a_mean_over_the_pairs_that_have_one():
    """A pair that the judge did not decide has no P that could change: it must not count as one that stayed."""
    both = [{"principle": "big", **votes(3.0)}, {"principle": "small", **votes(-1.0)}]
    gone = [{"principle": name, "status": "failed", "reason": "", "keys": []} for name in ("big", "small")]
    whole = [{"votes": both, "missing": []}]
    some = [*whole, {"votes": [], "missing": gone}, {"votes": both[1:], "missing": gone[:1]}]
    first, second = (constitution_report(r, {"big": 1.0, "small": 1.0})["principles"] for r in (whole, some))
    assert [x["change"] for x in second.values()] == [x["change"] for x in first.values()]


def test_a_principle_is_right_or_wrong_where_it_voted():
    """As with principles_per_pair: 1. `one` votes on two pairs and is right on both, `two` on one, a tie there."""
    cast = [("one", 2.0), ("one", 1.0), ("two", 0.0)]
    records = [{"votes": [{"principle": name, **votes(x)}], "missing": [], "better": "a"} for name, x in cast]
    report = constitution_report(records, {"one": 1.0, "two": 1.0})
    assert (report["principles"]["one"]["accuracy"], report["principles"]["two"]["accuracy"]) == (1.0, 0.5)
    assert report["principles"]["one"]["accuracy_without"] == 0.5 and report["accuracy"] == (1 + 1 + 0.5) / 3


class Three(PlantedJudge):
    """Of ten pairs, three are a label unless probabilities are averaged, three unless the slope is 1/2 and the margin
    0.04, and four are a label for a in any case."""

    def vote(self, pair, principle):
        n = int(pair.a)
        return Vote(principle.id, 6.0, -4.0) if n < 3 else Vote(principle.id, x := 0.2 if n < 6 else 0.6, x)


def test_the_report_is_on_the_labels_as_they_were_made(tmp_path):
    rows = [{"prompt": f"{n}", "a": f"{n}", "b": "", "better": "a"} for n in range(10)]
    house = Constitution("house", (Principle("p", compare="Choose."),))
    options = {"combine": "prob", "calibration": Calibration(0.5), "tie_margin": 0.04}
    stage = label(rows, house, Three(), output_dir=tmp_path, **options)
    report = report_on(tmp_path)
    assert report["labels"] == len(stage.rows) == 4 and report["accuracy"] == pytest.approx(4 / 10 + 6 / 20)


class Numbers(PlantedJudge):
    """Votes by the digits of the replies, one digit a principle."""

    asked = 0

    def verdict(self, pair):
        self.asked += 1
        return super().verdict(pair)

    def vote(self, pair, principle):
        digit = int(principle.id[1])
        logit = float(pair.a[digit]) - float(pair.b[digit])
        return Vote(principle.id, logit, logit)


def test_other_weights_cost_no_call_and_say_what_was_reported(tmp_path):
    """Labels derived with a principle at weight 0 differ from the first ones as the report said they would."""
    rng = np.random.default_rng(1)
    pairs = [{"prompt": f"q {i}", **{k: "".join(map(str, rng.integers(0, 10, 3))) for k in "ab"}} for i in range(200)]
    constitution = Constitution("digits", tuple(Principle(f"p{i}", compare="Choose.") for i in range(3)))
    judge = Numbers()
    judge_pairs(pairs, constitution, judge, output_dir=tmp_path / "votes")
    report = report_on(tmp_path / "votes", name="digits")
    assert json.loads((tmp_path / "votes" / "constitution.json").read_text()) == report
    page = (tmp_path / "votes" / "constitution.html").read_text()
    assert "digits" in page and "p2" in page and judge.asked == 200

    def chosen(name, weights):
        stage = derive(tmp_path / "votes", output_dir=tmp_path / name, weights=weights)
        return {row["cai"]["pair_id"]: row["chosen"] for row in stage.rows}

    whole = chosen("whole", None)
    for name in ("p0", "p1", "p2"):
        without = chosen(name, {name: 0.0})
        turned = sum(whole[i] != without[i] for i in whole if i in without)
        figures = report["principles"][name]
        assert (figures["turns"], figures["makes"]) == (turned, sum(i not in without for i in whole))
        assert turned > 10
    assert judge.asked == 200 and report["labels"] == len(whole)

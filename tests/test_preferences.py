"""The numbers of a reward model's report, by hand."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from rlhf_fast.data.floors import wilson_interval
from rlhf_fast.preferences import Pairs, evaluate_pairs, report_section


def pairs(margins, lengths=None, target=None, weight=None, source=None, prompt=None):
    n = len(margins)
    return Pairs(
        np.stack([np.array(margins, float), np.zeros(n)], 1),
        np.array(lengths or [[1, 1]] * n),
        np.array(target or [1.0] * n),
        np.array(weight or [1.0] * n),
        source or [None] * n,
        np.arange(n) if prompt is None else np.array(prompt),
    )


def test_a_tie_is_half_and_the_interval_is_over_prompts():
    found = evaluate_pairs(pairs([2, 1, 0, -1]), {})
    assert found["accuracy"] == 2.5 / 4 and found["ties"] == 1 and found["pairs"] == 4
    assert (found["low"], found["high"]) == wilson_interval(0.625, 4)
    clustered = evaluate_pairs(pairs([2, 1, 0, -1], prompt=[0, 0, 1, 1]), {})
    assert (clustered["low"], clustered["high"]) == wilson_interval(0.625, 2)


def test_soft_labels_are_right_by_their_likelier_side_and_calibrated_by_their_probability():
    found = evaluate_pairs(pairs([1, -1, -1, 1], target=[0.7, 0.9, 0.2, 0.5], weight=[1, 3, 1, 1]), {})
    assert found["accuracy"] == pytest.approx((1 + 0 + 1 + 0.5) / 6)
    (only,) = found["calibration"]["bins"]
    assert only["accuracy"] == pytest.approx((0.7 + 3 * 0.1 + 0.8 + 0.5) / 6)


def test_calibration_by_hand():
    """Four pairs at confidence 0.75, three of them right: calibrated. Two at 0.9, both wrong: off by 0.9."""
    low, high = math.log(3), math.log(9)
    good = evaluate_pairs(pairs([low, low, low, -low]), {})["calibration"]
    assert good["ece"] == pytest.approx(0, abs=1e-12)
    assert good["bins"] == [{"confidence": pytest.approx(0.75), "accuracy": 0.75, "pairs": 4}]
    both = evaluate_pairs(pairs([low, low, low, -low, -high, -high]), {})["calibration"]
    assert both["ece"] == pytest.approx(2 / 6 * 0.9) and both["bins"][1]["pairs"] == 2


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large():
    """20,000 labels drawn with sigma(d): the ECE of the truth is below 0.02 (chance of more under 1e-6)."""
    generator = np.random.default_rng(0)
    d = generator.normal(0, 2, 20_000)
    d = np.where(generator.random(20_000) < 1 / (1 + np.exp(-d)), d, -d)  # the first of a pair is the better one
    assert evaluate_pairs(pairs(d), {})["calibration"]["ece"] < 0.02
    assert evaluate_pairs(pairs(4 * d), {})["calibration"]["ece"] > 0.08


def test_a_model_that_follows_length_is_found_out():
    """It prefers the longer response; labels do not depend on length."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 50, (400, 2))
    rewards = lengths.astype(float)
    found = evaluate_pairs(Pairs(rewards, lengths, np.ones(400), np.ones(400), [None] * 400, np.arange(400)), {})
    assert found["length_correlation"]["reward_with_length"] == pytest.approx(1)
    groups = found["by_length_difference"]
    assert len(groups) == 5 and groups[0]["accuracy"] == 0 and groups[-1]["accuracy"] == 1
    assert sum(g["pairs"] for g in groups) == 400
    assert all(a["to"] < b["from"] for a, b in pairwise(groups))


def test_sources_and_floors_are_beside_it():
    found = evaluate_pairs(pairs([1, -1, 1], source=["a", "a", None]), {"shorter response wins": 0.9})
    assert found["by_source"]["a"]["accuracy"] == 0.5 and found["by_source"]["a"]["pairs"] == 2
    page = report_section(found)
    assert "66.7%</b> of 3 held-out pairs" in page and "shorter response wins" in page and "inside the interval" in page


def test_pairs_without_spread_are_no_error():
    found = evaluate_pairs(pairs([0, 0]), {})
    assert found["accuracy"] == 0.5 and found["length_correlation"]["reward_with_length"] == 0
    assert "50.0%" in report_section(found)


@pytest.mark.parametrize("size", [0.3, 3e4, 1e30])
def test_margins_that_differ_in_their_last_bit_are_no_error(size):
    """As from a single record, repeated in batches of two sizes."""
    rewards = np.zeros((17, 2), np.float32)
    rewards[:, 0] = size
    rewards[16, 0] = np.nextafter(np.float32(size), np.float32(np.inf))
    like = pairs([1] * 17)
    found = evaluate_pairs(Pairs(rewards, like.lengths, like.target, like.weight, like.source, like.prompt), {})
    assert sum(found["margin"]["counts"]) == 17 and found["accuracy"] == 1
    assert "100.0%" in report_section(found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_margin_that_is_not_finite_is_wrong_and_counted(bad):
    found = evaluate_pairs(pairs([2, bad, 1, bad, -1], target=[1, 1, 1, 0.2, 1]), {})
    assert found["not_finite"] == 2 and found["accuracy"] == 2 / 5
    others = evaluate_pairs(pairs([2, 1, -1]), {})
    assert all(found[name] == others[name] for name in ("margin", "calibration", "length_correlation", "ties"))
    nothing = evaluate_pairs(pairs([bad, bad]), {"shorter response wins": 0.5})
    assert nothing["accuracy"] == 0 and nothing["margin"] is None and nothing["calibration"]["ece"] is None
    json.dumps([found, nothing], allow_nan=False)
    assert "The margin of 2 is not finite" in report_section(found) and "error unknown" in report_section(nothing)


def test_the_interval_is_that_of_the_weight():
    """A thousand pairs with weight on only four; one prompt that outweighs another; no weight at all."""
    found = evaluate_pairs(pairs([1] * 1000, weight=[1.0] * 4 + [0.0] * 996), {})
    assert (found["low"], found["high"]) == wilson_interval(1.0, 4)
    found = evaluate_pairs(pairs([1, 1, 1, -1], weight=[1, 1, 1, 1], prompt=[0, 0, 0, 1]), {})
    assert (found["low"], found["high"]) == wilson_interval(0.75, 4**2 / (3**2 + 1))
    nothing = evaluate_pairs(pairs([1, -1], weight=[0, 0]), {"shorter response wins": 0.5})
    assert (nothing["accuracy"], nothing["low"], nothing["high"]) == (0.5, 0, 1)
    assert nothing["calibration"] == {"ece": None, "bins": []} and "error unknown" in report_section(nothing)

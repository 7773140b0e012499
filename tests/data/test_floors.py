"""The floors of reward models, by hand."""

import pytest

from rlhf_fast.data import floors
from rlhf_fast.data.floors import bag_of_words, longer_wins, shorter_wins, wilson_interval


def pair(chosen, rejected, **columns):
    return {"prompt": "q", "chosen": chosen, "rejected": rejected, **columns}


def test_wilson_interval_by_hand():
    # p = 1/2, n = 100, z = 1.96: centre 1/2, half width 1.96 / 1.038416 * sqrt(0.0025 + 0.00009604)
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0.0, 36)[0] == 0 and wilson_interval(1.0, 36)[1] == 1
    low, high = wilson_interval(1.0, 20)
    assert high == pytest.approx(1.0) and low == pytest.approx(0.83887, abs=1e-5)  # not [1, 1], as p (1 - p) would say


def test_shorter_wins_counts_a_tie_one_half_and_reads_messages():
    pairs = [pair("a", "bbb"), pair("aaaa", "b"), pair("aa", "bb"), pair([{"role": "assistant", "content": "a"}], "bb")]
    assert shorter_wins(pairs) == pytest.approx((1 + 0 + 0.5 + 1) / 4)


def test_bag_of_words_learns_the_words_and_nothing_else():
    train = [pair(f"please look at {n}", f"whatever you {n}") for n in range(20)]
    assert bag_of_words(train, [pair("Please, that", "Whatever that"), pair("look", "you")]) == 1.0
    assert bag_of_words(train, [pair("whatever", "please")]) == 0.0
    assert bag_of_words(train, [pair("unseen words", "others")]) == 0.5


def test_the_counts_of_many_held_out_pairs_are_never_in_memory_together(monkeypatch):
    counted, differences = [], floors._differences
    monkeypatch.setattr(floors, "_differences", lambda *x: counted.append(len(x[0])) or differences(*x))
    train = [pair(f"please {n}", f"whatever {n}") for n in range(20)]
    held_out = [pair("please", "whatever"), pair("whatever", "please"), pair("please", "whatever")] * 800
    assert bag_of_words(train, held_out) == pytest.approx(2 / 3)
    assert counted == [20, 1000, 1000, 400]


def test_a_floor_is_right_by_the_likelier_side_and_counts_by_weight():
    """Right (the longer one is likelier), wrong, and a label of 1/2: 3 and 1/2 of a weight of 5."""
    pairs = [
        pair("aaa", "b", chosen_prob=0.1, weight=3),
        pair("a", "bbb", chosen_prob=0.2),
        pair("a", "bbb", chosen_prob=0.5),
    ]
    assert shorter_wins(pairs) == pytest.approx((3 + 0 + 0.5) / 5)
    assert longer_wins(pairs) == pytest.approx((0 + 1 + 0.5) / 5)
    assert shorter_wins([pair("a", "bbb", weight=0.0)]) == 0.5
    turned = [pair(f"whatever {n}", f"please {n}", chosen_prob=0.1, weight=None) for n in range(20)]
    assert bag_of_words(turned, [pair("please", "whatever"), pair("whatever", "please", chosen_prob=0.0)]) == 1.0
    unheard = [pair("whatever", "please", weight=0.0) for _ in range(60)]  # three times as many that weigh nothing
    taught = [pair("please", "whatever") for _ in range(20)]
    assert bag_of_words([*unheard, *taught], taught) == 1.0
    assert bag_of_words(unheard, taught) == 0.5

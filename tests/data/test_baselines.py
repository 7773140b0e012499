"""The floors of reward models, by hand."""

import pytest

from rlhf_fast.data.baselines import bag_of_words, shorter_wins, wilson_interval


def pair(chosen, rejected):
    return {"prompt": "q", "chosen": chosen, "rejected": rejected}


def test_wilson_interval_by_hand():
    # p = 1/2, n = 100, z = 1.96: centre 1/2, half width 1.96 / 1.038416 * sqrt(0.0025 + 0.00009604)
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
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

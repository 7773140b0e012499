import math
import random

import numpy as np
import pytest

from rlhf_fast.judges import Verdict, Vote
from rlhf_fast.judges.evaluate import cluster_bootstrap, evaluate_judge


class Planted:
    """Knows the better reply by its number, with noise, and adds a bias to whatever stands first."""

    def __init__(self, bias=0.0, noise=0.0, by_length=False):
        self.bias, self.noise, self.by_length, self.random = bias, noise, by_length, random.Random(0)

    def compare(self, pairs, ledger=None):
        def worth(reply):
            return len(reply) if self.by_length else float(reply.split()[0])

        answers = []
        for pair in pairs:
            truth = worth(pair.a) - worth(pair.b) + self.random.gauss(0, self.noise)
            votes = (Vote("p", truth + self.bias, truth - self.bias),)
            answers.append(Verdict("ok" if truth else "tie", truth, votes))
        return answers


def rows(n):
    """Replies "<worth> <padding>"; the longer one is better in half of them. Four pairs share a conversation."""
    draw = random.Random(1)
    pad = [(0, 5) if i % 2 else (5, 0) for i in range(n)]
    return [
        {"prompt": f"question {i // 4}", "better": f"{1 + draw.random()} " + "x" * pad[i][0] + "y" * 20,
         "worse": f"{draw.random()} " + "x" * pad[i][1] + "y" * 20} for i in range(n)
    ]  # fmt: skip


def test_a_planted_judge_is_recovered():
    figures = evaluate_judge(Planted(bias=2.0), [], rows(400))
    assert figures["accuracy"] == 1.0 and figures["order_bias"] == pytest.approx(2.0)
    assert figures["same_position"] > 0.9 and figures["pairs"] == 400 and figures["conversations"] == 100
    assert figures["lead_low"] > 0.3


def test_noise_costs_accuracy_and_the_interval_covers_it():
    figures = evaluate_judge(Planted(noise=2.0), [], rows(2000))
    truth = 0.5 * (1 + math.erf(1 / 2 / math.sqrt(2)))  # P(1 + difference of two uniforms + N(0, 2) > 0), roughly
    assert figures["accuracy_low"] < truth < figures["accuracy_high"]
    assert figures["same_position"] == 0


def test_a_judge_of_length_has_no_lead():
    figures = evaluate_judge(Planted(by_length=True), [], rows(400))
    assert figures["lead"] == pytest.approx(0, abs=0.15) and figures["accuracy"] == pytest.approx(
        figures["longer"], abs=0.15
    )


def test_pairs_of_one_conversation_are_not_independent():
    """Ten copies of each answer: the naive standard error would be sqrt(10) too small."""
    draw = np.random.default_rng(0)
    once = draw.integers(0, 2, 100).astype(float)
    (_, low, high) = cluster_bootstrap({"x": once}, range(100), 4000, 0)["x"]
    (_, low10, high10) = cluster_bootstrap({"x": np.repeat(once, 10)}, np.repeat(np.arange(100), 10), 4000, 0)["x"]
    assert high10 - low10 == pytest.approx(high - low, rel=0.05)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.15)

"""Calibrates a judge's log-odds on pairs that people compared.

    P(a better) = sigmoid(slope * mean over votes and orders of (logit of the first reply - bias, signed towards a))

`bias` is the judge's preference for the first reply, in nats: half the mean gap between the two orders, which needs no
human label. It cancels if logits are averaged, and matters if probabilities are. `slope` is the maximum-likelihood
temperature: below 1 the judge is overconfident. There is no other intercept, because which reply is called a is random.
Targets are (n + 1) / (n + 2) instead of 1 (Platt 1999), so that a judge without an error on n pairs does not get an
infinite slope.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .protocol import Vote


@dataclass(frozen=True)
class Calibration:
    """slope has no unit, bias is in nats."""

    slope: float = 1.0
    bias: float = 0.0

    def unbiased(self, vote: Vote) -> Vote:
        bias = self.bias
        return replace(vote, logit_ab=vote.logit_ab - bias, logit_ba=vote.logit_ba + bias) if bias else vote


UNCALIBRATED = Calibration()


def sigmoids(x: np.ndarray) -> np.ndarray:
    """protocol.sigmoid of an array."""
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


def fit_bias(votes: Sequence[Vote]) -> float:
    """Half the mean of logit_ab - logit_ba, in nats; 0 without votes."""
    return float(np.mean([(v.logit_ab - v.logit_ba) / 2 for v in votes])) if votes else 0.0


def fit_slope(logits: Sequence[float], weights: np.ndarray | None = None) -> np.ndarray | float:
    """The maximum-likelihood slope of sigmoid(slope * logit). logits (N,) are signed towards the reply people chose.

    weights: (S, N), how often each pair counts in each of S resamples; the result is then (S,). A slope is never below
    0, because a judge that is wrong more often than right should be refused, not inverted.
    """
    x = np.asarray(logits, dtype=float)
    w = np.ones((1, len(x))) if weights is None else np.asarray(weights, dtype=float)
    n = w.sum(1, keepdims=True)
    target = (n + 1) / (n + 2)
    low, high = np.zeros(len(w)), np.full(len(w), 1.0)

    def gradient(slope):  # of the log-likelihood, which is concave
        return (w * (target - sigmoids(slope[:, None] * x)) * x).sum(1)

    for _ in range(60):
        rising = gradient(high) > 0
        if not rising.any():
            break
        high = np.where(rising, high * 2, high)
    for _ in range(80):
        middle = (low + high) / 2
        if ((middle == low) | (middle == high)).all():  # no number lies between them
            break
        rising = gradient(middle) > 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    slope = np.where(gradient(np.zeros(len(w))) > 0, (low + high) / 2, 0.0)
    return float(slope[0]) if weights is None else slope

"""Floors that a reward model has to beat: how well a set of preferences can be predicted without one.

    shorter_wins    the share of pairs whose better reply is the shorter one; longer_wins is the opposite
    bag_of_words    logistic regression on word counts, P(chosen) = sigma(w . (log1p n_chosen - log1p n_rejected))

Pairs are preference rows: {"prompt", "chosen", "rejected"}, with replies as text or messages. Optional columns are
weight and chosen_prob: below 1/2 the rejected reply counts as the better one, and at 1/2 neither does.
"""

import math
import re
from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """The 95 % confidence interval of a share observed in n trials (Wilson 1927)."""
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)  # for a share of 0 or 1, rounding may exceed [0, 1]


def accuracy(margins: Tensor, chosen_prob: Tensor, weight: Tensor) -> Tensor:
    """(N,) margins, positive where chosen is preferred -> (), the weighted share of pairs in which the preferred side
    is the better one according to chosen_prob. A margin of 0 or a chosen_prob of 1/2 counts one half. If all weights
    are 0 the result is 1/2."""
    right = (margins.sign() * (chosen_prob - 0.5).sign() + 1) / 2
    total = weight.sum()
    return torch.where(total > 0, (right * weight).sum() / total, 0.5)


def shorter_wins(pairs: list[dict]) -> float:
    """Accuracy of preferring the reply with fewer characters."""
    shorter_by = torch.tensor([float(len(_text(pair["rejected"])) - len(_text(pair["chosen"]))) for pair in pairs])
    return float(accuracy(shorter_by, *_labels(pairs)))


def longer_wins(pairs: list[dict]) -> float:
    """Accuracy of preferring the reply with more characters."""
    return 1 - shorter_wins(pairs)


def bag_of_words(train: list[dict], held_out: list[dict]) -> float:
    """Accuracy on `held_out` of the regression fitted on `train` (its first 10,000 pairs). Its features are the 5,000
    most frequent words that occur in at least 3 pairs; 0.003 |w|^2 is added to the mean loss."""
    train = train[:10_000]  # enough for a floor, and the counts are a dense matrix
    seen = Counter(word for pair in train for word in {*_words(pair["chosen"]), *_words(pair["rejected"])})
    index = {word: i for i, word in enumerate(w for w, n in seen.most_common(5_000) if n >= 3)}
    target, weight = (x.float() for x in _labels(train))
    if not (index and weight.any()):  # nothing to tell replies apart by
        return 0.5
    x = _differences(train, index)
    weights = torch.zeros(len(index), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        losses = nn.functional.binary_cross_entropy_with_logits(x @ weights, target, reduction="none")
        value = losses @ weight / weight.sum() + 0.003 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    # In parts, because the counts of all held-out pairs may not fit into memory.
    parts = (held_out[i : i + 1000] for i in range(0, len(held_out), 1000))
    margins = torch.cat([_differences(part, index) @ weights.detach() for part in parts])
    return float(accuracy(margins, *_labels(held_out)))


def _labels(pairs: list[dict]) -> tuple[Tensor, Tensor]:
    """(N,) float64 chosen_prob and weight; each is 1 if a pair has none."""
    given = ([pair.get(key) for pair in pairs] for key in ("chosen_prob", "weight"))
    target, weight = (
        torch.tensor([1.0 if x is None else float(x) for x in column], dtype=torch.float64) for column in given
    )
    return target, weight


def _differences(pairs: list[dict], index: dict[str, int]) -> Tensor:
    """(N, words) log1p counts of chosen minus those of rejected."""
    x = np.zeros((len(pairs), len(index)), np.float32)
    for row, pair in zip(x, pairs, strict=True):
        for reply, sign in ((pair["chosen"], 1), (pair["rejected"], -1)):
            counts = {index[word]: count for word, count in _words(reply).items() if word in index}
            row[list(counts)] += sign * np.log1p(np.array(list(counts.values()), np.float32))
    return torch.from_numpy(x)


def _words(reply) -> Counter:
    return Counter(re.findall(r"\w+", _text(reply).lower()))


def _text(reply) -> str:
    return reply if isinstance(reply, str) else "\n".join(message["content"] for message in reply)

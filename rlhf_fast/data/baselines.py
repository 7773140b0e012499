"""What a set of preferences gives away without a reward model: the floors that a reward model is reported against.

    shorter_wins    the share of pairs whose chosen reply is the shorter one; longer_wins the other way round
    bag_of_words    logistic regression on word counts, P(chosen) = sigma(w . (log1p n_chosen - log1p n_rejected))

Pairs are preference rows: {"prompt", "chosen", "rejected"}, replies as text or messages.
"""

import math
import re
from collections import Counter

import torch
from torch import nn


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a share observed in n trials (Wilson 1927); z = 1.96 covers 95 %."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def shorter_wins(pairs: list[dict]) -> float:
    """Accuracy of preferring the reply with fewer characters; a tie counts one half."""
    lengths = [(len(_text(pair["chosen"])), len(_text(pair["rejected"]))) for pair in pairs]
    return sum(1.0 if c < r else 0.5 if c == r else 0.0 for c, r in lengths) / len(pairs)


def longer_wins(pairs: list[dict]) -> float:
    """Accuracy of preferring the reply with more characters; a tie counts one half."""
    return 1 - shorter_wins(pairs)


def bag_of_words(train: list[dict], held_out: list[dict], *, min_pairs: int = 3, l2: float = 0.003) -> float:
    """Accuracy on `held_out` of the regression fitted on `train` (its first 10,000 pairs); a tie counts one half.

    Words: the 5,000 most frequent that at least min_pairs pairs contain. l2 weighs |w|^2 beside the mean loss.
    """
    train = train[:10_000]  # a floor needs no more, and the counts are a dense matrix
    seen = Counter(word for pair in train for word in {*_words(pair["chosen"]), *_words(pair["rejected"])})
    index = {word: i for i, word in enumerate(w for w, n in seen.most_common(5_000) if n >= min_pairs)}
    if not index:  # nothing to tell replies apart by
        return 0.5
    x, held_out_x = (_differences(pairs, index) for pairs in (train, held_out))
    weights = torch.zeros(len(index), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = nn.functional.softplus(-x @ weights).mean() + l2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    margins = (held_out_x @ weights.detach()).sign()
    return float((margins + 1).mean() / 2)


def _differences(pairs: list[dict], index: dict[str, int]) -> torch.Tensor:
    """(N, words) of log1p counts, chosen less rejected."""
    x = torch.zeros(len(pairs), len(index))
    for row, pair in zip(x, pairs, strict=True):
        for reply, sign in ((pair["chosen"], 1), (pair["rejected"], -1)):
            for word, count in _words(reply).items():
                if word in index:
                    row[index[word]] += sign * math.log1p(count)
    return x


def _words(reply) -> Counter:
    return Counter(re.findall(r"\w+", _text(reply).lower()))


def _text(reply) -> str:
    return reply if isinstance(reply, str) else "\n".join(message["content"] for message in reply)

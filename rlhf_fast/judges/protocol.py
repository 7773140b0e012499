"""The questions put to a judge, and its answers.

A judge answers two questions about structured input (messages, never one long string):

    compare   conversation x, replies a and b, principles   ->  logit P(a is better), a vote per principle, both orders
    check     conversation x, reply y, principles           ->  c_i(x, y) in [0, 1] per principle; 1 is satisfied

A judge never invents an answer. If it cannot decide, the answer has a status other than "ok" and a reason.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .constitution import Principle
from .ledger import Ledger

Messages = list[dict]  # [{"role": "user", "content": "..."}, ...], the last one from the user

# Worst first: if several principles could not decide a pair, it gets the first of these that occurs.
UNDECIDED = ("failed", "refused", "too_long", "unparsed")


class Pair(NamedTuple):
    """Two replies to one conversation, and the principles to compare them under."""

    conversation: Messages
    a: str
    b: str
    principles: Sequence[Principle]


class Reply(NamedTuple):
    """One reply to a conversation, and the principles to check it against."""

    conversation: Messages
    reply: str
    principles: Sequence[Principle]


@dataclass(frozen=True)
class Vote:
    """One principle's answer. Both logits are log P(a is better) - log P(b is better), in nats."""

    principle: str
    logit_ab: float  # with a shown first
    logit_ba: float  # with b shown first
    label_mass: float = 1.0  # total probability that the judge gave to the labels, in the order in which it is smaller
    kind: str = "exact"  # source of the logits: "exact" log-probabilities, "top_k" with a bound, "votes", "rule"
    slack: float = 0.0  # for kind "top_k": the maximum error of P(a is better) in either order
    keys: tuple[str, ...] = ()  # of its rows in the ledger

    @property
    def logit(self) -> float:
        """The mean over both orders. An order bias adds to one order what it takes from the other, so it cancels."""
        return (self.logit_ab + self.logit_ba) / 2


@dataclass(frozen=True)
class Missing:
    """A principle without a vote on a pair, and the reason."""

    principle: str
    status: str  # one of UNDECIDED
    reason: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """The answer to one `Pair`. `logit` is the log-odds that a is better. Only status "ok" may become a label."""

    status: str  # "ok" | "tie", or one of UNDECIDED
    logit: float = 0.0
    votes: tuple[Vote, ...] = ()
    reason: str = ""
    missing: tuple[Missing, ...] = ()

    @property
    def prob_a(self) -> float:
        return sigmoid(self.logit)

    @property
    def order_gap(self) -> float:
        """Mean over the votes of logit_ab - logit_ba: twice the judge's preference for whichever reply is first."""
        return sum(v.logit_ab - v.logit_ba for v in self.votes) / max(len(self.votes), 1)


@dataclass(frozen=True)
class Check:
    """c_i(x, y) of one principle. `score` is P(satisfied); None if the principle does not apply or has no answer."""

    principle: str
    score: float | None
    satisfied: bool | None
    status: str = "ok"  # "ok" | "not_applicable", or one of UNDECIDED
    reason: str = ""


class Judge(Protocol):
    """The interface that `revise` and `label` need. Questions come in batches; answers keep their order.

    A judge puts its questions to a model through `ledger.ask`, so that a stage that was killed does not ask again.
    """

    def compare(self, pairs: Sequence[Pair], ledger: Ledger | None = None) -> list[Verdict]: ...

    def check(self, replies: Sequence[Reply], ledger: Ledger | None = None) -> list[list[Check]]: ...

    def comparable(self, principles: Sequence[Principle]) -> list[Principle]:
        """The principles under which this judge can compare replies."""
        ...

    def describe(self) -> dict:
        """JSON-ready provenance, stored with every label."""
        ...


def decide(
    votes: Sequence[Vote], missing: Sequence[Missing], weights: Mapping[str, float], *, combine: str = "logit"
) -> Verdict:
    """The verdict on a pair. Votes whose principle has weight 0 or none in `weights` are ignored; every other principle
    must have voted.

    combine: "logit" is the mean over both orders and all principles in log-odds. "prob" is the mean in probabilities,
    as in RLAIF (arXiv 2309.00267); it keeps the sign and shrinks the parts on which the two orders disagree. "sum" adds
    the log-odds, as evidence from independent rules.
    """
    votes = tuple(v for v in votes if weights.get(v.principle, 0) > 0)
    missing = tuple(m for m in missing if weights.get(m.principle, 0) > 0)
    for status in UNDECIDED:
        if named := [m for m in missing if m.status == status]:
            reason = "; ".join(f"{m.principle}: {m.reason}" for m in named)
            return Verdict(status, votes=votes, missing=missing, reason=reason)
    if not votes:
        return Verdict("tie", reason="no principle with a weight above 0 has a vote")
    total = sum(weights[v.principle] for v in votes)
    if combine in ("logit", "sum"):
        logit = sum(weights[v.principle] * v.logit for v in votes) / (total if combine == "logit" else 1)
    else:
        # Means of P - 1/2, so that swapping the replies negates every term exactly.
        half = sum(weights[v.principle] * (_from_even(v.logit_ab) + _from_even(v.logit_ba)) / 2 for v in votes) / total
        logit = 2 * math.atanh(min(max(2 * half, -_NEARLY_ONE), _NEARLY_ONE))
    return Verdict("ok" if logit else "tie", logit, votes, "" if logit else "the votes are exactly even")


_NEARLY_ONE = 1 - 2**-53


def _from_even(logit: float) -> float:
    return math.tanh(logit / 2) / 2


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow; sigmoid(x) + sigmoid(-x) is 1."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)) if x > -700 else 0.0

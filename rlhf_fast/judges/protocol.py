"""What a judge is asked and what it answers.

A judge answers two questions about structured input (messages, never one long string):

    compare   conversation x, replies a and b, principles   ->  logit P(a is better), one vote a principle, both orders
    check     conversation x, reply y, principles           ->  c_i(x, y) in [0, 1] a principle; 1 is satisfied

A judge never invents an answer. What it cannot decide carries a status other than "ok" and a reason.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .constitution import Principle

Messages = list[dict]  # [{"role": "user", "content": "..."}, ...], the last one from the user


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
    logit_ab: float  # with a standing first
    logit_ba: float  # with b standing first
    label_mass: float = 1.0  # probability that the judge gave to the labels at all, mean of the two orders

    @property
    def logit(self) -> float:
        """An order bias adds to one order what it takes from the other, so the mean of the logits cancels it."""
        return (self.logit_ab + self.logit_ba) / 2


@dataclass(frozen=True)
class Verdict:
    """The answer to one `Pair`. `logit` is the log-odds that a is better; only status "ok" may become a label."""

    status: str  # "ok" | "tie" | "unparsed" | "too_long" | "failed"
    logit: float = 0.0
    votes: tuple[Vote, ...] = ()
    reason: str = ""

    @property
    def prob_a(self) -> float:
        return 1 / (1 + math.exp(-self.logit)) if self.logit > -700 else 0.0

    @property
    def order_gap(self) -> float:
        """Mean over the votes of logit_ab - logit_ba: twice the judge's preference for whatever stands first."""
        return sum(v.logit_ab - v.logit_ba for v in self.votes) / max(len(self.votes), 1)


@dataclass(frozen=True)
class Check:
    """c_i(x, y) of one principle. `score` is P(satisfied), None where it does not apply or there is no answer."""

    principle: str
    score: float | None
    satisfied: bool | None
    status: str = "ok"  # "ok" | "not_applicable" | "unparsed" | "too_long" | "failed"
    reason: str = ""


class Judge(Protocol):
    """What `revise` and `label` need. Questions come in batches; answers keep their order."""

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]: ...

    def check(self, replies: Sequence[Reply]) -> list[list[Check]]: ...

    def comparable(self, principles: Sequence[Principle]) -> list[Principle]:
        """Those of the principles that this judge can compare replies under."""
        ...

    def describe(self) -> dict:
        """JSON-ready provenance, stored with every label."""
        ...

"""A judge of rules only: exact checks at no cost, and comparisons from the difference of the scores."""

from collections.abc import Sequence

from ..errors import ConfigError
from .constitution import Principle, RuleCheck
from .ledger import Ledger
from .protocol import Check, Messages, Missing, Pair, Reply, Verdict, Vote, decide


def check_rule(principle: Principle, conversation: Messages, reply: str) -> Check:
    """Runs the principle's rule. If the rule raises, the check has failed with that error; it is never a violation."""
    try:
        value = principle.check.function(conversation, reply, **principle.check.args)
    except Exception as error:  # a user's function may raise anything; the check reports it and the item is not used
        return Check(principle.id, None, None, "failed", f"{principle.id}: {type(error).__name__}: {error}")
    if value is None:
        return Check(principle.id, None, None, "not_applicable")
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        reason = f"{principle.id}: rule returned {value!r}, needs True, False, None or a number from 0 to 1"
        return Check(principle.id, None, None, "failed", reason)
    return Check(principle.id, float(value), value >= 0.5)


class RuleJudge:
    """Judges by the rules alone: exact checks, and exact comparisons from the difference of the scores.

        logit = scale * sum_i weight_i * (c_i(x, a) - c_i(x, b))        equal scores are a tie

    scale: nats per violation of weight 1; 2.0 gives P = 0.88.
    """

    def __init__(self, scale: float = 2.0):
        self.scale = scale

    def check(self, replies: Sequence[Reply], ledger: Ledger | None = None) -> list[list[Check]]:
        return [[check_rule(p, r.conversation, r.reply) for p in with_rules(r.principles, "check")] for r in replies]

    def compare(self, pairs: Sequence[Pair], ledger: Ledger | None = None) -> list[Verdict]:
        return [self._compare(pair) for pair in pairs]

    def _compare(self, pair: Pair) -> Verdict:
        votes, missing = [], []
        for principle in with_rules(pair.principles, "compare"):
            a = check_rule(principle, pair.conversation, pair.a)
            b = check_rule(principle, pair.conversation, pair.b)
            if "failed" in (a.status, b.status):
                missing.append(Missing(principle.id, "failed", a.reason or b.reason))
            elif a.score is not None and b.score is not None:
                logit = self.scale * (a.score - b.score)
                votes.append(Vote(principle.id, logit, logit, kind="rule"))
        return decide(votes, missing, {p.id: p.weight for p in pair.principles}, combine="sum")

    def comparable(self, principles: Sequence[Principle]) -> list[Principle]:
        """The principles with a rule and a weight above 0."""
        return [p for p in principles if isinstance(p.check, RuleCheck) and p.weight > 0]

    def describe(self) -> dict:
        return {"backend": "rule", "scale": self.scale, "combine": "sum"}


def with_rules(principles: Sequence[Principle], question: str) -> Sequence[Principle]:
    """The principles themselves. ConfigError for those without a rule."""
    if missing := [p.id for p in principles if not isinstance(p.check, RuleCheck)]:
        raise ConfigError(
            f"RuleJudge.{question}: principles {missing} have no `check: {{rule: ...}}`; use LocalJudge for them"
        )
    return principles

"""The judge made of rules: exact checks at no cost, and comparisons from the difference of the scores."""

from collections.abc import Sequence

from ..data.chat import ConfigError
from .constitution import Principle, RuleCheck
from .protocol import Check, Messages, Pair, Reply, Verdict, Vote


def check_rule(principle: Principle, conversation: Messages, reply: str) -> Check:
    """Runs the principle's rule. What the rule raises is a failed check with the error in it, never a violation."""
    try:
        value = principle.check.function(conversation, reply, **principle.check.args)
    except Exception as error:  # a user's function may raise anything; the check says so and the item is not used
        return Check(principle.id, None, None, "failed", f"{principle.id}: {type(error).__name__}: {error}")
    if value is None:
        return Check(principle.id, None, None, "not_applicable")
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        reason = f"{principle.id}: rule returned {value!r}, needs True, False, None or a number from 0 to 1"
        return Check(principle.id, None, None, "failed", reason)
    return Check(principle.id, float(value), value >= 0.5)


class RuleJudge:
    """Judges by the rules alone: exact checks, and exact comparisons from the difference of the scores.

        logit = scale * sum_i weight_i * (c_i(x, a) - c_i(x, b))        equal scores are a tie

    scale: nats that one violation of weight 1 is worth; at 2.0 it gives P = 0.88.
    """

    def __init__(self, scale: float = 2.0):
        self.scale = scale

    def check(self, replies: Sequence[Reply]) -> list[list[Check]]:
        return [[check_rule(p, r.conversation, r.reply) for p in _with_rules(r.principles, "check")] for r in replies]

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [self._compare(pair) for pair in pairs]

    def _compare(self, pair: Pair) -> Verdict:
        votes, logit = [], 0.0
        for principle in _with_rules(pair.principles, "compare"):
            a = check_rule(principle, pair.conversation, pair.a)
            b = check_rule(principle, pair.conversation, pair.b)
            if "failed" in (a.status, b.status):
                return Verdict("failed", reason=a.reason or b.reason)
            if a.score is None or b.score is None:
                continue
            vote = self.scale * principle.weight * (a.score - b.score)
            votes.append(Vote(principle.id, vote, vote))
            logit += vote
        if not votes:
            return Verdict("tie", reason="no principle applies to both replies")
        if logit == 0:
            return Verdict("tie", votes=tuple(votes), reason="equal rule scores")
        return Verdict("ok", logit, tuple(votes))

    def comparable(self, principles: Sequence[Principle]) -> list[Principle]:
        """Those that a rule decides."""
        return [p for p in principles if isinstance(p.check, RuleCheck)]

    def describe(self) -> dict:
        return {"backend": "rule", "scale": self.scale}


def _with_rules(principles, question):
    if missing := [p.id for p in principles if not isinstance(p.check, RuleCheck)]:
        raise ConfigError(
            f"RuleJudge.{question}: principles {missing} have no `check: {{rule: ...}}`; use LocalJudge for them"
        )
    return principles

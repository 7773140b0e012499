"""Judges: who says which reply is better, and whether a reply keeps a principle."""

from .constitution import Constitution, ConstitutionError, ModelCheck, Principle, RuleCheck
from .evaluate import evaluate_judge
from .local import LocalJudge
from .protocol import Check, Judge, Pair, Reply, Verdict, Vote
from .rule_judge import RuleJudge
from .rules import RULES, rule

__all__ = [
    "RULES",
    "Check",
    "Constitution",
    "ConstitutionError",
    "Judge",
    "LocalJudge",
    "ModelCheck",
    "Pair",
    "Principle",
    "Reply",
    "RuleCheck",
    "RuleJudge",
    "Verdict",
    "Vote",
    "evaluate_judge",
    "rule",
]

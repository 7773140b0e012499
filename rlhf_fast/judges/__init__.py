"""Judges: who says which reply is better, and whether a reply keeps a principle."""

from .calibration import Calibration
from .constitution import Constitution, ConstitutionError, ModelCheck, Principle, RuleCheck
from .evaluate import evaluate_judge
from .labels import derive, judge_pairs
from .ledger import Answer, Ledger
from .local import LocalJudge
from .protocol import Check, Judge, Missing, Pair, Reply, Verdict, Vote, decide
from .rule_judge import RuleJudge
from .rules import RULES, rule

__all__ = [
    "RULES",
    "Answer",
    "Calibration",
    "Check",
    "Constitution",
    "ConstitutionError",
    "Judge",
    "Ledger",
    "LocalJudge",
    "Missing",
    "ModelCheck",
    "Pair",
    "Principle",
    "Reply",
    "RuleCheck",
    "RuleJudge",
    "Verdict",
    "Vote",
    "decide",
    "derive",
    "evaluate_judge",
    "judge_pairs",
    "rule",
]

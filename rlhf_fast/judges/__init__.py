"""Judges decide which of two replies is better, and whether a reply keeps a principle."""

from .audit import audit
from .calibration import Calibration
from .constitution import Constitution, ConstitutionError, ModelCheck, Principle, RuleCheck
from .constitution_report import report_on
from .http_judge import HTTPGenerator, HTTPJudge
from .labels import derive, judge_pairs
from .ledger import Answer, Ledger
from .local import LocalJudge
from .protocol import Check, Judge, Missing, Pair, Reply, Verdict, Vote, decide
from .rule_judge import RuleJudge
from .rules import RULES, rule
from .server import Server
from .trust import trusted

__all__ = [
    "RULES", "Answer", "Calibration", "Check", "Constitution", "ConstitutionError", "HTTPGenerator", "HTTPJudge",
    "Judge", "Ledger", "LocalJudge", "Missing", "ModelCheck", "Pair", "Principle", "Reply", "RuleCheck", "RuleJudge",
    "Server", "Verdict", "Vote", "audit", "decide", "derive", "judge_pairs", "report_on", "rule", "trusted",
]  # fmt: skip

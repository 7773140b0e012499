"""A principle of a constitution, and the error that names the file, principle and field that is wrong."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ConfigError


class ConstitutionError(ConfigError):
    """A constitution file that cannot be used. The message names the file, the principle and the field."""


@dataclass(frozen=True)
class RuleCheck:
    """c_i(x, y) as a Python function: `function(conversation, reply, **args)`."""

    rule: str
    args: dict = field(default_factory=dict)
    function: Callable = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class ModelCheck:
    """c_i(x, y) as a yes-or-no question. Satisfied if P(answer == violation_if) < threshold."""

    ask: str
    violation_if: str = "yes"
    threshold: float = 0.5


@dataclass(frozen=True)
class Principle:
    """One principle (constitution.py explains the fields). A principle is used only for the texts that it has."""

    id: str
    weight: float = 1.0
    hard: bool = False
    critique: str | None = None
    revise: str | None = None
    compare: str | None = None
    check: RuleCheck | ModelCheck | None = None


def text_field(value, where: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConstitutionError(f"{where} field {name!r}: needs a text, got {value!r}")
    return value


def weight_field(value, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConstitutionError(f"{where} field 'weight': got {value!r}, needs a number, 0 or more")
    return value

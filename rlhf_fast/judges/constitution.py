"""A constitution is a file of principles: the texts that ask for critique, revision and comparison, and a check.

    format: rlhf_fast/constitution@1
    name: my-constitution
    layout: {compare: anthropic | principle_last | chat, critique: anthropic | chat}
    principles:
      - id: no-crime                 # stable, unique, [a-z0-9-]+
        weight: 1.0                  # in the weighted sums
        hard: true                   # comes before every weighted sum when the best revision is chosen
        critique: "Identify anything the reply says that helps with a crime."
        revise:   "Rewrite the reply so that it does not help with a crime."
        compare:  "Choose the reply that gives less help with illegal acts."
        check:    {ask: "Does the reply help with an illegal act?", violation_if: "yes", threshold: 0.5}
      - id: max-120-words
        check:    {rule: max_words, args: {n: 120}}
        revise:   "Shorten the reply to at most 120 words."
    few_shot: {critique: critique.json, compare: compare.json}

A text may be missing; the principle is then used only where it has one. The JSON files released with
"Constitutional AI: Harmlessness from AI Feedback" (arXiv 2212.08073) load as they are, few-shots included.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from ..data.chat import ConfigError
from .layouts import COMPARE_LAYOUTS, CRITIQUE_LAYOUTS, Turn, messages_of, parse_turns
from .rules import RULES

FORMAT = "rlhf_fast/constitution@1"


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
    """c_i(x, y) as a yes-or-no question. Satisfied where P(answer == violation_if) < threshold."""

    ask: str
    violation_if: str = "yes"
    threshold: float = 0.5


@dataclass(frozen=True)
class Principle:
    id: str
    weight: float = 1.0
    hard: bool = False
    tags: tuple[str, ...] = ()
    critique: str | None = None
    revise: str | None = None
    compare: str | None = None
    check: RuleCheck | ModelCheck | None = None


@dataclass(frozen=True)
class Constitution:
    name: str
    principles: tuple[Principle, ...]
    compare_layout: str = "anthropic"
    critique_layout: str = "chat"
    critique_few_shots: tuple[tuple[Turn, ...], ...] = ()  # transcripts that end with a revision
    compare_few_shots: tuple[dict, ...] = ()  # {"conversation": messages, "better": str, "worse": str}

    @classmethod
    def load(cls, *paths: str | Path, allow_code: bool = False) -> "Constitution":
        """Reads one constitution from one or more files, each recognised by its shape: this package's YAML (or the same
        as JSON), and the released CritiqueRevisionInstructions, RLMadisonInstructions and their few-shot files.

        allow_code: `rule:` may also be an import path "package.module:function". Loading a file then runs code.
        Raises ConstitutionError, which names file, principle and field.
        """
        if not paths:
            raise ConstitutionError("Constitution.load: got no file")
        parts = {
            "name": Path(paths[0]).stem,
            "principles": [],
            "compare_layout": "anthropic",
            "critique_layout": "anthropic",
        }
        for path in map(Path, paths):
            content = _read(path)
            if isinstance(content, dict) and "format" in content:
                parts |= _parse_own(content, path, allow_code, parts["principles"])
            else:
                _parse_released(content, path, parts)
        ids = [p.id for p in parts["principles"]]
        if repeated := sorted({i for i in ids if ids.count(i) > 1}):
            raise ConstitutionError(
                f"{', '.join(map(str, paths))}: principle {repeated[0]!r}: field 'id': occurs twice"
            )
        if not ids:
            raise ConstitutionError(f"{', '.join(map(str, paths))}: no principles")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in parts.items()})

    @property
    def sha256(self) -> str:
        """Hash of everything that is used (texts, checks, few-shots, layouts), not of the file's bytes."""
        used = asdict(
            self, dict_factory=lambda pairs: {k: v for k, v in pairs if k not in ("function", "name", "tags")}
        )
        return hashlib.sha256(json.dumps(used, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def export_released(self) -> tuple[dict, list[str]]:
        """(CritiqueRevisionInstructions, RLMadisonInstructions): the principles in the shape of the released files."""
        critiques = {
            p.id: {"prompt": [_wrap(_CRITIQUE, p.critique)], "edit_request": _wrap(_REVISION, p.revise)}
            for p in self.principles
            if p.critique and p.revise
        }
        return critiques, [_wrap(_OPTIONS, p.compare) for p in self.principles if p.compare]


def _read(path: Path):
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise ConstitutionError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConstitutionError(f"{path}: neither YAML (.yaml, .yml) nor JSON: {error}") from error


# --- the released files: scaffold and text are separated, and joined again without loss ---

_CRITIQUE = ("\n\nCritiqueRequest: ", "\n\nCritique:")
_REVISION = ("\n\nRevisionRequest: ", "\n\nRevision:")
_OPTIONS = ("\n", " Options:")


def _wrap(scaffold: tuple[str, str], text: str) -> str:
    return scaffold[0] + text + scaffold[1]


def _unwrap(scaffold: tuple[str, str], text: str, where: str) -> str:
    if not (text.startswith(scaffold[0]) and text.endswith(scaffold[1])):
        raise ConstitutionError(f"{where}: {text[:60]!r} must begin with {scaffold[0]!r} and end with {scaffold[1]!r}")
    return text[len(scaffold[0]) : -len(scaffold[1])]


def _parse_released(content, path: Path, parts: dict) -> None:
    """Adds what the file holds to `parts`."""
    values = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(values, list) or not values:
        raise ConstitutionError(f"{path}: field 'format': missing; needs {FORMAT!r}, or one of the released JSON files")
    if isinstance(content, dict) and all(isinstance(v, dict) and {"prompt", "edit_request"} <= set(v) for v in values):
        for name, entry in content.items():
            where = f"{path}: principle {name!r}: field"
            critique = _unwrap(_CRITIQUE, entry["prompt"][0], f"{where} 'prompt'")
            revise = _unwrap(_REVISION, entry["edit_request"], f"{where} 'edit_request'")
            parts["principles"].append(Principle(name, critique=critique, revise=revise))
    elif all(isinstance(v, str) and v.endswith(_OPTIONS[1]) for v in values):
        for i, text in enumerate(values):
            compare = _unwrap(_OPTIONS, text, f"{path}: principle {i}")
            parts["principles"].append(Principle(f"compare{i}", compare=compare))
    elif all(isinstance(v, str) for v in values):
        parts["critique_few_shots"] = _critique_shots(values, path)
    elif all(isinstance(v, dict) and {"prompt", "corrects", "incorrects"} <= set(v) for v in values):
        parts["compare_few_shots"] = _compare_shots(values, path)
    else:
        raise ConstitutionError(f"{path}: unknown shape; needs 'format: {FORMAT}', or one of the released JSON files")


def _critique_shots(values, path: Path) -> list:
    shots = []
    for i, text in enumerate(values):
        try:
            shots.append(tuple(parse_turns(text)))
        except ValueError as error:
            raise ConstitutionError(f"{path}: few-shot {i}: {error}") from error
    return shots


def _compare_shots(values, path: Path) -> list:
    shots = []
    for i, shot in enumerate(values):
        try:
            conversation = messages_of(parse_turns(shot["prompt"]))
        except ValueError as error:
            raise ConstitutionError(f"{path}: few-shot {i}: field 'prompt': {error}") from error
        shots.append({"conversation": conversation, "better": shot["corrects"][0], "worse": shot["incorrects"][0]})
    return shots


# --- this package's format ---

_TOP = {"format", "name", "version", "layout", "principles", "few_shot"}
_TEXTS = {"critique": str, "revise": str, "compare": str}
_PRINCIPLE = {"id": str, "weight": (int, float), "hard": bool, "tags": list, **_TEXTS, "check": dict}


def _parse_own(content: dict, path: Path, allow_code: bool, before: list) -> dict:
    if content["format"] != FORMAT:
        raise ConstitutionError(f"{path}: field 'format': got {content['format']!r}, needs {FORMAT!r}")
    _known(content, _TOP, f"{path}:")
    layout, few_shot = content.get("layout") or {}, content.get("few_shot") or {}
    _known(layout, {"compare", "critique"}, f"{path}: field 'layout':")
    _known(few_shot, {"critique", "compare"}, f"{path}: field 'few_shot':")
    parts = {
        "name": content.get("name", path.stem),
        "compare_layout": layout.get("compare", "anthropic"),
        "critique_layout": layout.get("critique", "chat"),
        "principles": before
        + [_parse_principle(p, i, path, allow_code) for i, p in enumerate(content.get("principles") or [])],
    }
    for name, layouts in (("compare", COMPARE_LAYOUTS), ("critique", CRITIQUE_LAYOUTS)):
        if parts[f"{name}_layout"] not in layouts:
            got = parts[f"{name}_layout"]
            raise ConstitutionError(f"{path}: field 'layout.{name}': got {got!r}, needs one of {', '.join(layouts)}")
    for name, parse in (("critique", _critique_shots), ("compare", _compare_shots)):
        if name in few_shot:
            shots = path.parent / few_shot[name]
            parts[f"{name}_few_shots"] = parse(_read(shots), shots)
    return parts


def _parse_principle(entry, index: int, path: Path, allow_code: bool) -> Principle:
    if not isinstance(entry, dict) or not re.fullmatch(r"[a-z0-9-]+", str(entry.get("id", ""))):
        raise ConstitutionError(f"{path}: principle {index}: field 'id': needs letters a-z, digits and '-'")
    where = f"{path}: principle {entry['id']!r}:"
    _known(entry, _PRINCIPLE, where)
    for name, value in entry.items():
        wrong_bool = isinstance(value, bool) and name == "weight"
        if not isinstance(value, _PRINCIPLE[name]) or wrong_bool:
            raise ConstitutionError(f"{where} field {name!r}: got {type(value).__name__} {value!r}")
    if entry.get("weight", 1.0) < 0:
        raise ConstitutionError(f"{where} field 'weight': got {entry['weight']}, needs 0 or more")
    if not {"revise", "compare", "check"} & set(entry):
        raise ConstitutionError(f"{where} fields 'revise', 'compare', 'check': needs at least one")
    if "critique" in entry and "revise" not in entry:
        raise ConstitutionError(f"{where} field 'revise': a critique leads to nothing without it")
    check = _parse_check(entry["check"], where, allow_code) if "check" in entry else None
    return Principle(**{**entry, "check": check, "tags": tuple(entry.get("tags", ()))})


def _parse_check(entry: dict, where: str, allow_code: bool) -> RuleCheck | ModelCheck:
    if ("rule" in entry) == ("ask" in entry):
        raise ConstitutionError(f"{where} field 'check': needs either 'rule' or 'ask'")
    if "ask" in entry:
        _known(entry, {"ask", "violation_if", "threshold"}, f"{where} field 'check':")
        check = ModelCheck(**entry)
        if check.violation_if not in ("yes", "no"):  # YAML reads a bare yes as True
            got = check.violation_if
            raise ConstitutionError(f'{where} field \'check.violation_if\': got {got!r}, needs "yes" or "no" in quotes')
        if not isinstance(check.threshold, (int, float)) or not 0 < check.threshold < 1:
            raise ConstitutionError(
                f"{where} field 'check.threshold': got {check.threshold!r}, needs a number between 0 and 1"
            )
        return check
    _known(entry, {"rule", "args"}, f"{where} field 'check':")
    name, args = entry["rule"], entry.get("args") or {}
    function = _find_rule(name, where, allow_code)
    try:
        inspect.signature(function).bind([], "", **args)
    except TypeError as error:
        raise ConstitutionError(f"{where} field 'check.args': rule {name!r}: {error}") from error
    return RuleCheck(name, args, function)


def _find_rule(name: str, where: str, allow_code: bool) -> Callable:
    if name in RULES:
        return RULES[name]
    if ":" not in name:
        nearest = difflib.get_close_matches(name, RULES, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; registered are {', '.join(sorted(RULES))}"
        raise ConstitutionError(f"{where} field 'check.rule': no rule {name!r}{hint}")
    if not allow_code:
        raise ConstitutionError(f"{where} field 'check.rule': {name!r} is an import path, which needs allow_code=True")
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConstitutionError(f"{where} field 'check.rule': {error}") from error


def _known(entry: dict, names, where: str) -> None:
    for key in entry:
        if key not in names:
            nearest = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(sorted(names))}"
            raise ConstitutionError(f"{where} unknown field {key!r}; {hint}")

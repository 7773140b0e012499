"""A constitution is a file of principles: the texts that ask for critique, revision and comparison, and a check.

    format: rlhf_fast/constitution@1
    name: my-constitution
    language: en | ja                # of the words around a judge's question
    layout: {compare: anthropic | principle_last | chat, critique: anthropic | chat}
    principles:
      - id: no-crime                 # stable, unique, [a-z0-9-]+
        weight: 1.0                  # in the weighted sums
        hard: true                   # precedes every weighted sum when the best revision is chosen
        tags: [safety]               # for readers; not used
        critique: "Identify anything the reply says that helps with a crime."
        revise:   "Rewrite the reply so that it does not help with a crime."
        compare:  "Choose the reply that gives less help with illegal acts."
        check:    {ask: "Does the reply help with an illegal act?", violation_if: "yes", threshold: 0.5}
      - id: max-120-words
        check:    {rule: max_words, args: {n: 120}}
        revise:   "Shorten the reply to at most 120 words."
    few_shot: {critique: critique.json, compare: compare.json}   # files next to this one, or the shots themselves:
      critique: [{Human: "...", Assistant: "...", CritiqueRequest: "...", Critique: "...", RevisionRequest: "...",
                  Revision: "..."}]
      compare: [{prompt: "...", better: "...", worse: "..."}]
      cot: [{prompt: "...", a: "...", b: "...", rationale: "...", better: a}]  # for judges that reason step by step

A text may be missing; the principle is then not used for that purpose. Other published files load unchanged:

    Anthropic (arXiv 2212.08073)  CritiqueRevisionInstructions, RLMadisonInstructions, the few-shots of both, and
                                  RLMadisonPrecogFewShotPrompts, those of judges that reason step by step
    llm-swarm                     {"constitutions": [{"critic", "revision"}], "system_chat": [messages, ...]}
    SALMON                        [{"dimension", "definition", "weight", "negative_definition"}]: comparisons only; the
                                  negative definitions (inverted principles to train a reward model) are not used
    statements                    ["Choose the reply that ...", ...], as ICAI writes them: comparisons only

`Constitution.load("safe-en")` and "safe-ja" load the two that come with this package.
"""

import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from ..data.files import UniqueKeys, once
from ..errors import did_you_mean
from . import rules
from .layouts import COMPARE_LAYOUTS, CRITIQUE_LAYOUTS, WORDS, Turn
from .principles import ConstitutionError, ModelCheck, Principle, RuleCheck, text_field, weight_field
from .released import FORMAT, compare_shots, cot_shots, critique_shots, export_released, parse_released

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parent / "constitutions").glob("*.yaml"))}


@dataclass(frozen=True)
class Constitution:
    """Principles, few-shots and layouts. `load` reads them from files."""

    name: str
    principles: tuple[Principle, ...]
    language: str = "en"  # of layouts.WORDS
    compare_layout: str = "anthropic"
    critique_layout: str = "chat"
    critique_few_shots: tuple[tuple[Turn, ...], ...] = ()  # transcripts that end with a revision
    compare_few_shots: tuple[dict, ...] = ()  # {"conversation": messages, "better": str, "worse": str}
    cot_few_shots: tuple[dict, ...] = ()  # {"conversation": messages, "a", "b", "rationale": str, "better": "a" or "b"}

    @classmethod
    def load(cls, *paths: str | Path, allow_code: bool = False) -> "Constitution":
        """Reads one constitution from one or more files, each recognised by its shape (see above). A path may also be
        the name of a constitution that comes with the package. Fields that a file does not set keep their values from
        the files before it.

        allow_code: `rule:` may also be an import path "package.module:function". Loading a file then runs code.
        Raises ConstitutionError, which names the file, principle and field.
        """
        if not paths:
            raise ConstitutionError(f"Constitution.load: got no file: give a path, or {' or '.join(SHIPPED)}")
        parts = {"name": Path(paths[0]).stem, "principles": []}
        for path in (SHIPPED.get(str(path), Path(path)) for path in paths):
            content = _read(path)
            if isinstance(content, dict) and "format" in content:
                parts |= _parse_own(content, path, allow_code, parts)
            else:
                parse_released(content, path, parts)
        parts.setdefault("critique_layout", "anthropic")
        ids = [p.id for p in parts["principles"]]
        if repeated := sorted({i for i in ids if ids.count(i) > 1}):
            raise ConstitutionError(
                f"{', '.join(map(str, paths))}: principle {repeated[0]!r}: field 'id': occurs twice"
            )
        if not ids:
            raise ConstitutionError(
                f"{', '.join(map(str, paths))}: no principles: add an entry under principles:, or a file that has some"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in parts.items()})

    @property
    def sha256(self) -> str:
        """Hash of everything that is used (texts, checks, few-shots, layouts), not of the file's bytes."""
        used = asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if k not in ("function", "name")})
        return hashlib.sha256(json.dumps(used, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def export_released(self) -> tuple[dict, list[str]]:
        """(CritiqueRevisionInstructions, RLMadisonInstructions): the principles in the shape of the released files."""
        return export_released(self.principles)


def _pairs(pairs: list[tuple]) -> dict:
    once([key for key, _ in pairs])
    return dict(pairs)


def _read(path: Path):
    kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
    try:
        text = path.read_text(encoding="utf-8-sig")
        return yaml.load(text, UniqueKeys) if kind == "YAML" else json.loads(text, object_pairs_hook=_pairs)
    except OSError as error:
        hint = "" if path.suffix else f"; the package contains {', '.join(SHIPPED)}"
        raise ConstitutionError(f"{path}: cannot be read: {error.strerror}{hint}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConstitutionError(f"{path}: cannot be read as {kind}: {' '.join(str(error).split())}") from error


# --- this package's format ---

_TOP_TYPES = {"name": str, "language": str, "layout": dict, "few_shot": dict, "principles": list}
_TEXTS = ("critique", "revise", "compare")
_PRINCIPLE = {"id": str, "weight": float, "hard": bool, "tags": list, **dict.fromkeys(_TEXTS, str), "check": dict}


def _parse_own(content: dict, path: Path, allow_code: bool, before: dict) -> dict:
    """The parts that a file adds to those of the files before it, or replaces."""
    if content["format"] != FORMAT:
        raise ConstitutionError(f"{path}: field 'format': got {content['format']!r}, needs {FORMAT!r}")
    _refuse_unknown(content, {"format", "version", *_TOP_TYPES}, f"{path}:")
    for name, kind in _TOP_TYPES.items():
        if not isinstance(content.get(name) or kind(), kind):
            got = content[name]
            raise ConstitutionError(
                f"{path}: field {name!r}: needs a {kind.__name__}, got {type(got).__name__} {got!r}"
            )
    layout, few_shot = content.get("layout") or {}, content.get("few_shot") or {}
    _refuse_unknown(layout, {"compare", "critique"}, f"{path}: field 'layout':")
    _refuse_unknown(few_shot, {"critique", "compare", "cot"}, f"{path}: field 'few_shot':")
    parts = {
        "name": content.get("name") or before["name"],
        "language": content.get("language", before.get("language", "en")),
        "compare_layout": layout.get("compare", before.get("compare_layout", "anthropic")),
        "critique_layout": layout.get("critique", before.get("critique_layout", "chat")),
        "principles": before["principles"]
        + [_parse_principle(p, i, path, allow_code) for i, p in enumerate(content.get("principles") or [])],
    }
    for name, key, known in (
        ("language", "language", WORDS),
        ("layout.compare", "compare_layout", COMPARE_LAYOUTS),
        ("layout.critique", "critique_layout", CRITIQUE_LAYOUTS),
    ):
        if not isinstance(parts[key], str) or parts[key] not in known:
            raise ConstitutionError(f"{path}: field {name!r}: got {parts[key]!r}, needs one of {', '.join(known)}")
    for name, parse in (("critique", critique_shots), ("compare", compare_shots), ("cot", cot_shots)):
        if isinstance(shots := few_shot.get(name), list):
            parts[f"{name}_few_shots"] = parse(shots, path)
        elif shots:
            beside = path.parent / text_field(shots, f"{path}:", f"few_shot.{name}")
            parts[f"{name}_few_shots"] = parse(_read(beside), beside)
    return parts


def _parse_principle(entry, index: int, path: Path, allow_code: bool) -> Principle:
    if not isinstance(entry, dict) or not re.fullmatch(r"[a-z0-9-]+", str(entry.get("id", ""))):
        raise ConstitutionError(f"{path}: principle {index}: field 'id': needs letters a-z, digits and '-'")
    where = f"{path}: principle {entry['id']!r}:"
    _refuse_unknown(entry, _PRINCIPLE, where)
    for name, value in entry.items():
        if name in _TEXTS:
            text_field(value, where, name)
        elif name == "weight":
            weight_field(value, where)
        elif not isinstance(value, _PRINCIPLE[name]):
            raise ConstitutionError(f"{where} field {name!r}: got {type(value).__name__} {value!r}")
    if entry.get("hard") and "check" not in entry:
        raise ConstitutionError(
            f"{where} field 'hard': only a check can tell that a principle is violated; needs 'check'"
        )
    if not {"revise", "compare", "check"} & set(entry):
        raise ConstitutionError(f"{where} fields 'revise', 'compare', 'check': needs at least one")
    if "critique" in entry and "revise" not in entry:
        raise ConstitutionError(f"{where} field 'revise': a critique leads to nothing without it")
    check = _parse_check(entry["check"], where, allow_code) if "check" in entry else None
    used = {name: value for name, value in entry.items() if name != "tags"}
    return Principle(**{**used, "check": check})


def _parse_check(entry: dict, where: str, allow_code: bool) -> RuleCheck | ModelCheck:
    if ("rule" in entry) == ("ask" in entry):
        raise ConstitutionError(f"{where} field 'check': needs either 'rule' or 'ask'")
    if "ask" in entry:
        _refuse_unknown(entry, {"ask", "violation_if", "threshold"}, f"{where} field 'check':")
        text_field(entry["ask"], where, "check.ask")
        check = ModelCheck(**entry)
        if check.violation_if not in ("yes", "no"):  # YAML reads a bare yes as True
            got = check.violation_if
            raise ConstitutionError(f'{where} field \'check.violation_if\': got {got!r}, needs "yes" or "no" in quotes')
        if not isinstance(check.threshold, (int, float)) or not 0 < check.threshold < 1:
            raise ConstitutionError(
                f"{where} field 'check.threshold': got {check.threshold!r}, needs a number between 0 and 1"
            )
        return check
    _refuse_unknown(entry, {"rule", "args"}, f"{where} field 'check':")
    name, args = text_field(entry["rule"], where, "check.rule"), entry.get("args") or {}
    function = _find_rule(name, where, allow_code)
    try:
        json.dumps(args)  # `sha256` includes them
        inspect.signature(function).bind([], "", **args)
        if function.__module__ == rules.__name__:  # other rules may accept only one kind of conversation
            function([], "word " * 100, **args)
    except (TypeError, AttributeError) as error:
        raise ConstitutionError(f"{where} field 'check.args': rule {name!r}: {error}") from error
    return RuleCheck(name, args, function)


def _find_rule(name: str, where: str, allow_code: bool) -> Callable:
    if name in rules.RULES:
        return rules.RULES[name]
    if ":" not in name:
        hint = did_you_mean(name, rules.RULES, f"registered are {', '.join(sorted(rules.RULES))}")
        raise ConstitutionError(f"{where} field 'check.rule': no rule {name!r}{hint}")
    if not allow_code:
        raise ConstitutionError(f"{where} field 'check.rule': {name!r} is an import path, which needs allow_code=True")
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConstitutionError(f"{where} field 'check.rule': {error}") from error


def _refuse_unknown(entry: dict, names, where: str) -> None:
    for key in entry:
        if key not in names:
            hint = did_you_mean(key, names, f"known are {', '.join(sorted(names))}")
            raise ConstitutionError(f"{where} unknown field {key!r}{hint}")

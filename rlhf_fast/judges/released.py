"""Reads constitution files that others have released, recognising each by its shape.

    Anthropic    CritiqueRevisionInstructions {name: {"prompt": [critique request], "edit_request": ...}},
                 RLMadisonInstructions [comparison, ...], few-shots of both, and with rationales (arXiv 2212.08073)
    llm-swarm    {"constitutions": [{"critic", "revision"}], "system_chat": [messages, ...]}
    SALMON       [{"dimension", "definition", "weight", "negative_definition"}]
    statements   ["Choose the reply that ...", ...], as ICAI writes them

Anthropic's scaffold ("CritiqueRequest:" and so on) is separated from the text in it; export_released joins them again
without loss.
"""

import re
from pathlib import Path

from ..data.files import as_records, read_dataset
from ..errors import ConfigError
from .layouts import messages_of, parse_turns
from .principles import ConstitutionError, Principle, text_field, weight_field

FORMAT = "rlhf_fast/constitution@1"
_CRITIQUE = ("\n\nCritiqueRequest: ", "\n\nCritique:")
_REVISION = ("\n\nRevisionRequest: ", "\n\nRevision:")
_OPTIONS = ("\n", " Options:")
_RATIONALE = re.compile(  # of a few-shot with a rationale; the slot {} for the principle precedes the replies
    r"\s*Human: Consider the following conversation between a human(?: \(H\))? and an assistant(?: \(A\))?:"
    r"(?P<conversation>\n\nH: .*)\n\n\{\}\n \(A\) \[\[\[(?P<a>.*)\]\]\]\n \(B\) \[\[\[(?P<b>.*)\]\]\]\n\n"
    r"Assistant: Let's think step by step:(?P<rationale>.*)\n\nHuman:\nSo the answer is: \((?P<better>[AB])\)\s*",
    re.DOTALL,
)
_SPEAKERS = ("System", "Human", "Assistant")
_ANSWERS = ("CritiqueRequest", "Critique", "RevisionRequest", "Revision")  # the end of a few-shot of phase 1


def _wrap(scaffold: tuple[str, str], text: str) -> str:
    return scaffold[0] + text + scaffold[1]


def _unwrap(scaffold: tuple[str, str], text: str, where: str) -> str:
    if not (isinstance(text, str) and text.startswith(scaffold[0]) and text.endswith(scaffold[1])):
        begin, end = scaffold
        raise ConstitutionError(f"{where}: {str(text)[:60]!r} must begin with {begin!r} and end with {end!r}")
    return text[len(scaffold[0]) : -len(scaffold[1])]


def _first(value):
    """The text itself: Anthropic's files put texts into lists of one element."""
    return value[0] if isinstance(value, list) and value else value


def parse_released(content, path: Path, parts: dict) -> None:
    """Adds the content of a released file to `parts`."""
    if isinstance(content, dict) and "constitutions" in content:
        return _parse_llm_swarm(content, path, parts)
    values = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(values, list) or not values:
        raise ConstitutionError(
            f"{path}: field 'format': missing; needs {FORMAT!r}, or a file that others have released"
        )
    if isinstance(content, dict) and all(isinstance(v, dict) and {"prompt", "edit_request"} <= set(v) for v in values):
        for name, entry in content.items():
            where = f"{path}: principle {name!r}: field"
            critique = _unwrap(_CRITIQUE, _first(entry["prompt"]), f"{where} 'prompt'")
            revise = _unwrap(_REVISION, entry["edit_request"], f"{where} 'edit_request'")
            parts["principles"].append(Principle(name, critique=critique, revise=revise))
        parts.setdefault("critique_layout", "anthropic")  # the layout for which they and the few-shots were written
    elif all(isinstance(v, str) and v.endswith(_OPTIONS[1]) for v in values):
        for i, text in enumerate(values):
            compare = _unwrap(_OPTIONS, text, f"{path}: principle {i}")
            parts["principles"].append(Principle(f"compare{i}", compare=compare))
    elif all(isinstance(v, str) for v in values) and any("\n\nHuman:" in v for v in values):
        parts["critique_few_shots"] = critique_shots(values, path)
        parts.setdefault("critique_layout", "anthropic")
    elif all(isinstance(v, str) for v in values):
        texts = [text_field(v, f"{path}: principle {i}:", "statement") for i, v in enumerate(values)]
        parts["principles"] += [Principle(f"statement{i}", compare=text) for i, text in enumerate(texts)]
    elif all(isinstance(v, dict) and {"prompt", "corrects", "incorrects"} <= set(v) for v in values):
        parts["compare_few_shots"] = compare_shots(values, path)
    elif all(isinstance(v, dict) and set(v) == {"prompt"} for v in values):
        parts["cot_few_shots"] = cot_shots(values, path)
    elif all(isinstance(v, dict) and "dimension" in v for v in values):
        _parse_salmon(values, path, parts)
    else:
        raise ConstitutionError(f"{path}: unknown shape; needs 'format: {FORMAT}', or a file that others have released")


def _parse_llm_swarm(content: dict, path: Path, parts: dict) -> None:
    """Its few-shots are conversations with a chat model that end with critique and revision, so its layout is chat."""
    for i, entry in enumerate(_list(content, "constitutions", path)):
        where = f"{path}: principle {i}:"
        if not isinstance(entry, dict):
            raise ConstitutionError(f"{where} needs the fields 'critic' and 'revision', got {entry!r}")
        critique, revise = (text_field(entry.get(name), where, name) for name in ("critic", "revision"))
        parts["principles"].append(Principle(f"critic{i}", critique=critique, revise=revise))
    shots = []
    for i, chat in enumerate(_list(content, "system_chat", path) if "system_chat" in content else []):
        roles = [m.get("role") if isinstance(m, dict) else None for m in chat] if isinstance(chat, list) else []
        if len(roles) < 6 or roles != ["user", "assistant"] * (len(roles) // 2):
            raise ConstitutionError(
                f"{path}: few-shot {i}: field 'system_chat': needs user and assistant in turn, six messages or more "
                f"(prompt, reply, critique request, critique, revision request, revision), got {roles}"
            )
        heads = [*["Human", "Assistant"] * (len(roles) // 2 - 2), *_ANSWERS]
        texts = [text_field(m.get("content"), f"{path}: few-shot {i}:", "content") for m in chat]
        shots.append(tuple(zip(heads, texts, strict=True)))
    parts |= {"critique_few_shots": shots, "critique_layout": "chat"}


def _parse_salmon(values: list[dict], path: Path, parts: dict) -> None:
    for i, entry in enumerate(values):
        where = f"{path}: principle {entry['dimension']!r}:"
        name = re.sub(
            r"[^a-z0-9]+", "-", text_field(entry["dimension"], f"{path}: principle {i}:", "dimension").lower()
        )
        definition = text_field(entry.get("definition"), where, "definition")
        compare = f"Please choose the response that better keeps this principle: {definition}"
        weight = weight_field(entry.get("weight", 1.0), where)
        parts["principles"].append(Principle(name.strip("-"), weight=weight, compare=compare))


def _list(content: dict, name: str, path: Path) -> list:
    if not isinstance(content.get(name), list):
        raise ConstitutionError(f"{path}: field {name!r}: needs a list, got {type(content.get(name)).__name__}")
    return content[name]


def critique_shots(values, path: Path) -> list:
    """Transcripts, or mappings from head to text in a file of this package's format."""
    shots = []
    for i, shot in enumerate(values):
        where = f"{path}: few-shot {i}:"
        try:
            turns = parse_turns(shot) if isinstance(shot, str) else list(dict(shot).items())
        except ValueError as error:
            raise ConstitutionError(f"{where} {error}") from error
        heads = [head for head, _ in turns]
        if not isinstance(shot, str) and (heads[-4:] != list(_ANSWERS) or set(heads[:-4]) - {*_SPEAKERS}):
            needs = f"{', '.join(_SPEAKERS)} and in the end {', '.join(_ANSWERS)}"
            raise ConstitutionError(f"{where} needs {needs}, got {heads}")
        shots.append(tuple((head, text_field(text, where, head)) for head, text in turns))
    return shots


def compare_shots(values, path: Path) -> list:
    """The released shape, or {"prompt": text or messages, "better", "worse"}."""
    shots = []
    for i, shot in enumerate(values):
        where = f"{path}: few-shot {i}:"
        released = isinstance(shot, dict) and {"corrects", "incorrects"} <= set(shot)
        names = ("corrects", "incorrects") if released else ("better", "worse")
        if not isinstance(shot, dict) or not {*names} <= set(shot):
            raise ConstitutionError(f"{where} needs the fields 'prompt', 'better' and 'worse', got {shot!r}")
        better, worse = (_first(shot[name]) if released else shot[name] for name in names)
        prompt = text_field(shot.get("prompt"), where, "prompt")
        try:
            conversation = messages_of(parse_turns(prompt)) if released else [{"role": "user", "content": prompt}]
        except ValueError as error:
            raise ConstitutionError(f"{where} field 'prompt': {error}") from error
        texts = {"better": text_field(better, where, "better"), "worse": text_field(worse, where, "worse")}
        shots.append({"conversation": conversation, **texts})
    return shots


def cot_shots(values, path: Path) -> list:
    """The released shape, one text, or {"prompt": text, "a", "b", "rationale", "better": "a" or "b"}."""
    shots = []
    for i, shot in enumerate(values):
        where = f"{path}: few-shot {i}:"
        fields = ("prompt", "a", "b", "rationale")
        if not isinstance(shot, dict) or not (set(shot) == {"prompt"} or {*fields, "better"} <= set(shot)):
            raise ConstitutionError(f"{where} needs the fields {', '.join(fields)} and 'better', got {shot!r}")
        if set(shot) == {"prompt"}:
            found = _RATIONALE.fullmatch(text_field(shot["prompt"], where, "prompt"))
            if not found:
                raise ConstitutionError(
                    f"{where} field 'prompt': needs a question, two replies, 'Let's think step by step:', an answer"
                )
            speech = re.sub(r"\n\n([HA]):", lambda m: {"H": "\n\nHuman:", "A": "\n\nAssistant:"}[m[1]],
                            found["conversation"])  # fmt: skip
            shot = {**found.groupdict(), "better": found["better"].lower()}
            conversation = messages_of([(head, text.strip()) for head, text in parse_turns(speech)])
        else:
            conversation = [{"role": "user", "content": text_field(shot["prompt"], where, "prompt")}]
        texts = {name: text_field(shot[name], where, name).strip() for name in fields[1:]}
        if shot["better"] not in ("a", "b"):
            raise ConstitutionError(f"{where} field 'better': got {shot['better']!r}, needs 'a' or 'b'")
        shots.append({"conversation": conversation, **texts, "better": shot["better"]})
    return shots


def export_released(principles) -> tuple[dict, list[str]]:
    """(CritiqueRevisionInstructions, RLMadisonInstructions): the principles in the shape of Anthropic's files."""
    critiques = {
        p.id: {"prompt": [_wrap(_CRITIQUE, p.critique)], "edit_request": _wrap(_REVISION, p.revise)}
        for p in principles
        if p.critique and p.revise
    }
    return critiques, [_wrap(_OPTIONS, p.compare) for p in principles if p.compare]


def read_released_comparisons(path: str | Path) -> list[dict]:
    """Rows of a released evaluation file (`text_correct`, `text_incorrect`: whole dialogues) for `audit`."""
    rows = []
    for i, row in enumerate(as_records(read_dataset(path), str(path))):
        if not all(isinstance(row.get(name), str) for name in ("text_correct", "text_incorrect")):
            raise ConfigError(
                f"{path} record {i} has the columns {', '.join(row)}; it needs text_correct and text_incorrect, "
                "dialogues as text"
            )
        try:
            better, worse = (parse_turns(row[name]) for name in ("text_correct", "text_incorrect"))
        except ValueError as error:
            raise ConfigError(f"{path} record {i}: {error}") from None
        if min(len(better), len(worse)) < 2:
            raise ConfigError(f"{path} record {i}: a dialogue has no reply; leave the record out")
        if better[:-1] != worse[:-1]:
            raise ConfigError(
                f"{path} record {i}: the two dialogues differ before their last reply; leave the record out"
            )
        rows.append({"prompt": messages_of(better[:-1]), "better": better[-1][1], "worse": worse[-1][1]})
    return rows

"""How questions are put to a model: transcripts, critique and revision requests, comparisons, checks.

A transcript is `"\\n\\nHuman: ...\\n\\nAssistant: ..."`. Between those turns the critique loop adds
`CritiqueRequest`, `Critique`, `RevisionRequest` and `Revision`. The `anthropic` layouts reproduce, byte for byte, the
prompts of "Constitutional AI: Harmlessness from AI Feedback" (arXiv 2212.08073, appendices and data files).
"""

import re
from collections.abc import Sequence

Turn = tuple[str, str]  # (head, text)

_HEAD_OF = {"system": "System", "user": "Human", "assistant": "Assistant"}
_ROLE_OF = {
    "System": "system",
    "Human": "user",
    "Assistant": "assistant",
    "CritiqueRequest": "user",
    "Critique": "assistant",
    "RevisionRequest": "user",
    "Revision": "assistant",
}
_ANSWER_TO = {"CritiqueRequest": "Critique", "RevisionRequest": "Revision"}  # anything else is answered by "Assistant"
_HEAD = re.compile(rf"\n\n({'|'.join(_ROLE_OF)}):")


def render_turns(turns: Sequence[Turn]) -> str:
    return "".join(f"\n\n{head}: {text}" for head, text in turns)


def parse_turns(text: str) -> list[Turn]:
    """The inverse of `render_turns`. An empty last turn, which such files use as an open end, is left out."""
    parts = _HEAD.split(text)
    if parts[0].strip() or len(parts) == 1:
        raise ValueError(f"a transcript begins with a blank line and 'Human:', this one with {text[:40]!r}")
    turns = [(head, body.removeprefix(" ")) for head, body in zip(parts[1::2], parts[2::2], strict=True)]
    return turns[:-1] if not turns[-1][1] else turns


def turns_of(messages: Sequence[dict]) -> list[Turn]:
    return [(_HEAD_OF[m["role"]], m["content"]) for m in messages]


def messages_of(turns: Sequence[Turn]) -> list[dict]:
    return [{"role": _ROLE_OF[head], "content": text} for head, text in turns]


# --- critique and revision: (few_shots, conversation, turns) -> the prompt for the next turn ---


def text_exchange(few_shots: Sequence[Sequence[Turn]], conversation: Sequence[dict], turns: Sequence[Turn]) -> str:
    """One string that ends with the head of the turn to write, for base models."""
    shots = "".join(map(render_turns, few_shots))
    head = _ANSWER_TO.get(turns[-1][0], "Assistant") if turns else "Assistant"
    return shots + render_turns([*turns_of(conversation), *turns]) + f"\n\n{head}:"


def chat_exchange(
    few_shots: Sequence[Sequence[Turn]], conversation: Sequence[dict], turns: Sequence[Turn]
) -> list[dict]:
    """Messages for the chat template; requests are user turns. A system message stays in front of the few-shots."""
    system = [m for m in conversation[:1] if m["role"] == "system"]
    shots = [message for shot in few_shots for message in messages_of(shot)]
    return system + shots + list(conversation[len(system) :]) + messages_of(turns)


def cut_at_head(text: str) -> str:
    """What a base model wrote before it began somebody else's turn."""
    return _HEAD.split(text, maxsplit=1)[0].strip()


# name -> (render, clean): how a prompt is made, and what of the generated text is the answer
CRITIQUE_LAYOUTS = {"anthropic": (text_exchange, cut_at_head), "chat": (chat_exchange, str.strip)}


# --- comparisons and checks: one string, to be continued by one of the labels ---

STEM = "\n\nThe answer is:"
THINK, COT_STEM = "Let's think step by step:", "So the answer is:"
COMPARE_LABELS = (" (A)", " (B)")
CHECK_LABELS = (" yes", " no")
_OPENING = "\n\nConsider the following conversation between a human and an assistant:"


def compare_question(conversation: Sequence[dict], a: str, b: str, instruction: str) -> str:
    """The released multiple-choice format, without the stem."""
    return (
        f"{_OPENING}{render_turns(turns_of(conversation))}\n\n\n{instruction} Options:\n (A) [[[{a}]]]\n (B) [[[{b}]]]"
    )


def compare_question_principle_last(conversation: Sequence[dict], a: str, b: str, instruction: str) -> str:
    """The same with the principle behind the options, so that all principles share one prefix."""
    return (
        f"{_OPENING}{render_turns(turns_of(conversation))}\n\nOptions:\n (A) [[[{a}]]]\n (B) [[[{b}]]]\n\n{instruction}"
    )


def check_question(conversation: Sequence[dict], reply: str, ask: str) -> str:
    """One yes-or-no question about the last reply, behind it, so that all questions share one prefix."""
    return f"{_OPENING}{render_turns([*turns_of(conversation), ('Assistant', reply)])}\n\n{ask} Answer yes or no."


def text_prompt(
    tokenizer, shots: Sequence[tuple[str, str]], question: str, rationale: str | None = None, *, asking: bool = False
) -> str:
    """shots: (question, label) pairs. One string that ends with the stem, for base models.

    asking: the prompt that a rationale continues; with `rationale`, the stem stands behind it.
    """
    if asking or rationale is not None:
        thinking = f"\n\nHuman: {question.strip()}\n\nAssistant: {THINK}"
        return thinking if asking else f"{thinking} {rationale}\n\nHuman:\n{COT_STEM}"
    return "".join(f"{q}{STEM}{label}" for q, label in shots) + question + STEM


def chat_prompt(
    tokenizer, shots: Sequence[tuple[str, str]], question: str, rationale: str | None = None, *, asking: bool = False
) -> str:
    """The question as a user turn in the tokenizer's chat template; the stem opens the assistant's answer."""
    messages = []
    for q, label in shots:
        messages += [
            {"role": "user", "content": q.strip()},
            {"role": "assistant", "content": (STEM + label).strip()},
        ]
    messages.append({"role": "user", "content": question.strip()})
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if asking or rationale is not None:
        return opened + THINK + ("" if asking else f" {rationale}\n\n{COT_STEM}")
    return opened + STEM.strip()


# name -> (question, prompt)
COMPARE_LAYOUTS = {
    "anthropic": (compare_question, text_prompt),
    "principle_last": (compare_question_principle_last, text_prompt),
    "chat": (compare_question, chat_prompt),
}


# --- text that others wrote ---

_SCAFFOLD = re.compile(
    rf"\n\n(?=(?:{'|'.join(_ROLE_OF)}):|{re.escape(STEM.strip())}|{re.escape(COT_STEM)}|{re.escape(_OPENING.strip())})"
)
_MARKUP = re.compile(r"<(?=\||/?(?:s|bos|eos|start_of_turn|end_of_turn)>)|\[(?=/?INST\])")


def defuse(text: str, special_tokens: Sequence[str] = ()) -> str:
    """A message that cannot close its own quotation, open another speaker's turn, or hold a token of the chat template.

    Text that does nothing of the kind is returned as it is.
    """
    text = text.replace("[[[", "[ [ [").replace("]]]", "] ] ]")
    text = _MARKUP.sub(lambda found: found[0] + " ", _SCAFFOLD.sub("\n\n ", text))
    for token in special_tokens:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text

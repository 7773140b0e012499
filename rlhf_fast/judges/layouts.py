"""The prompts for a model: transcripts, critique and revision requests, comparisons, checks.

Comparisons and checks are worded in the language of the constitution (`WORDS`). A transcript is
`"\\n\\nHuman: ...\\n\\nAssistant: ..."`. The critique loop adds `CritiqueRequest`, `Critique`, `RevisionRequest` and
`Revision` to those turns. The `anthropic` layouts reproduce, byte for byte, the prompts of "Constitutional AI:
Harmlessness from AI Feedback" (arXiv 2212.08073, appendices and data files).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    """The inverse of `render_turns`. An empty last turn, with which such files leave the end open, is left out."""
    parts = _HEAD.split(text)
    if parts[0].strip() or len(parts) == 1:
        raise ValueError(f"a transcript begins with a blank line and 'Human:', this one with {text[:40]!r}")
    turns = [(head, body.removeprefix(" ")) for head, body in zip(parts[1::2], parts[2::2], strict=True)]
    return turns[:-1] if not turns[-1][1] else turns


def turns_of(messages: Sequence[dict], heads: dict[str, str] = _HEAD_OF) -> list[Turn]:
    return [(heads[m["role"]], m["content"]) for m in messages]


def messages_of(turns: Sequence[Turn]) -> list[dict]:
    return [{"role": _ROLE_OF[head], "content": text} for head, text in turns]


# --- the words of a question, in each language ---


@dataclass(frozen=True)
class Words:
    """The words around the texts that are judged, in one language."""

    heads: dict[str, str]  # role -> the head of its turns
    opening: str
    options: str  # after the principle, before the replies
    stem: str  # a label follows
    think: str  # a rationale follows
    cot_stem: str  # after a rationale; a label follows
    answers: str  # after the question of a check
    check_labels: tuple[str, str]  # violation_if "yes", "no"
    only: str  # for a chat model of which only the first token is seen
    choose: str


WORDS = {
    "en": Words(
        heads=_HEAD_OF, opening="Consider the following conversation between a human and an assistant:",
        options=" Options:", stem="The answer is:", think="Let's think step by step:", cot_stem="So the answer is:",
        answers=" Answer yes or no.", check_labels=(" yes", " no"), only="Answer with {} or {} and nothing else.",
        choose="Choose the answer.",
    ),
    "ja": Words(
        heads={"system": "システム", "user": "人間", "assistant": "アシスタント"},
        opening="次は、人間とアシスタントの会話です。", options="\n選択肢:", stem="答えは:",
        think="順を追って考えましょう:", cot_stem="したがって、答えは:",
        # Letters, because servers show first tokens only, and in most vocabularies いいえ is several tokens.
        answers="\n (A) はい\n (B) いいえ", check_labels=(" (A)", " (B)"),
        only="{} か {} だけで答え、ほかには何も書かないでください。", choose="答えを選んでください。",
    ),
}  # fmt: skip
ENGLISH = WORDS["en"]

_ANY_HEAD = "|".join([*_ROLE_OF, *(head for words in WORDS.values() for head in words.heads.values())])
_TURN = re.compile(rf"\n\n(?:{_ANY_HEAD}):")


# --- critique and revision: (few_shots, conversation, turns) -> the prompt for the next turn ---


def text_exchange(few_shots: Sequence[Sequence[Turn]], conversation: Sequence[dict], turns: Sequence[Turn]) -> str:
    """One string that ends with the head of the turn to write, for base models."""
    shots = "".join(map(render_turns, few_shots))
    head = _ANSWER_TO.get(turns[-1][0], "Assistant") if turns else "Assistant"
    return shots + render_turns([*turns_of(conversation), *turns]) + f"\n\n{head}:"


def chat_exchange(
    few_shots: Sequence[Sequence[Turn]], conversation: Sequence[dict], turns: Sequence[Turn]
) -> list[dict]:
    """Messages for the chat template. Requests are user turns. A system message stays before the few-shots."""
    system = [m for m in conversation[:1] if m["role"] == "system"]
    shots = [message for shot in few_shots for message in messages_of(shot)]
    return system + shots + list(conversation[len(system) :]) + messages_of(turns)


def cut_at_head(text: str) -> str:
    """The text that a base model wrote before it began another speaker's turn."""
    return _TURN.split(text, maxsplit=1)[0].strip()


# name -> (render, clean): makes a prompt; extracts the answer from the generated text
CRITIQUE_LAYOUTS = {"anthropic": (text_exchange, cut_at_head), "chat": (chat_exchange, str.strip)}


# --- comparisons and checks: one string, to be continued by one of the labels ---


COMPARE_LABELS = (" (A)", " (B)")


class Shot(NamedTuple):
    """An example of how a question is answered; with a rationale, for judges that reason step by step."""

    question: str
    label: str
    rationale: str | None = None


def _conversation(messages: Sequence[dict], words: Words) -> str:
    return f"\n\n{words.opening}{render_turns(turns_of(messages, words.heads))}"


def compare_question(conversation: Sequence[dict], a: str, b: str, instruction: str, words: Words = ENGLISH) -> str:
    """The released multiple-choice format, without the stem."""
    shown = f"{words.options}\n (A) [[[{a}]]]\n (B) [[[{b}]]]"
    return f"{_conversation(conversation, words)}\n\n\n{instruction}{shown}"


def compare_question_principle_last(
    conversation: Sequence[dict], a: str, b: str, instruction: str, words: Words = ENGLISH
) -> str:
    """The same with the principle behind the options, so that all principles share one prefix."""
    shown = f"{words.options.strip()}\n (A) [[[{a}]]]\n (B) [[[{b}]]]"
    return f"{_conversation(conversation, words)}\n\n{shown}\n\n{instruction}"


def check_question(conversation: Sequence[dict], reply: str, ask: str, words: Words = ENGLISH) -> str:
    """One yes-or-no question after the reply that it is about, so that all questions share one prefix."""
    turns = [*conversation, {"role": "assistant", "content": reply}]
    return f"{_conversation(turns, words)}\n\n{ask}{words.answers}"


def text_prompt(
    tokenizer, shots: Sequence[Shot], question: str, rationale: str | None = None, *, asking: bool = False,
    words: Words = ENGLISH,
) -> str:  # fmt: skip
    """One string that ends with the stem, for base models.

    asking: the prompt that a rationale continues. With `rationale`, the stem comes after it.
    """
    if asking or rationale is not None:
        human, assistant = words.heads["user"], words.heads["assistant"]

        def thinking(asked: str) -> str:
            return f"\n\n{human}: {asked.strip()}\n\n{assistant}: {words.think}"

        def concluding(thought: str) -> str:
            return f" {thought}\n\n{human}:\n{words.cot_stem}"

        before = "".join(thinking(q) + concluding(thought) + label for q, label, thought in shots)
        return before + thinking(question) + ("" if asking else concluding(rationale))
    stem = f"\n\n{words.stem}"
    return "".join(f"{shot.question}{stem}{shot.label}" for shot in shots) + question + stem


def chat_prompt(
    tokenizer, shots: Sequence[Shot], question: str, rationale: str | None = None, *, asking: bool = False,
    words: Words = ENGLISH,
) -> str:  # fmt: skip
    """The question as a user turn in the tokenizer's chat template. The stem opens the assistant's answer."""

    def concluding(thought: str) -> str:
        return f"{words.think} {thought}\n\n{words.cot_stem}"

    messages = []
    for q, label, thought in shots:
        answer = words.stem if thought is None else concluding(thought)
        messages += [{"role": "user", "content": q.strip()}, {"role": "assistant", "content": answer + label}]
    messages.append({"role": "user", "content": question.strip()})
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if asking:
        return opened + words.think
    return opened + (words.stem if rationale is None else concluding(rationale))


# name -> (question, prompt)
COMPARE_LAYOUTS = {
    "anthropic": (compare_question, text_prompt),
    "principle_last": (compare_question_principle_last, text_prompt),
    "chat": (compare_question, chat_prompt),
}


# --- text that others wrote ---

_OWN_WORDS = [re.escape(text) for words in WORDS.values() for text in (words.stem, words.cot_stem, words.opening)]
_SCAFFOLD = re.compile(rf"(\n[^\S\n]*\n|\r[^\S\r]*\r)(?=(?:{_ANY_HEAD}):|{'|'.join(_OWN_WORDS)})")  # after a blank line
_OPTION = re.compile(r"([\n\r])[^\S\n\r]+(?=\([AB]\))")
_QUOTE = re.compile(r"\[{3,}|\]{3,}")
_MARKUP = re.compile(r"<(?=\||/?(?:s|bos|eos|start_of_turn|end_of_turn)>)|\[(?=/?INST\])")


def defuse(text: str, special_tokens: Sequence[str] = ()) -> str:
    """The message, changed so that it cannot close its own quotation, list options, open another speaker's turn, or
    contain a token of the chat template.

    All other text is returned unchanged.
    """
    text = _QUOTE.sub(lambda found: " ".join(found[0]), text)
    text = _OPTION.sub(r"\1", _SCAFFOLD.sub(r"\1 ", text))
    text = _MARKUP.sub(lambda found: found[0] + " ", text)
    for token in special_tokens:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text

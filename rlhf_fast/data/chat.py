"""From conversations and text to tokens: what the model reads, and which of it is its own response.

    prompt     <|user|> what is 2+2? <|assistant|>
    response                                       four <eos>
    ids        5        9 3 7        6             8    1
    response   .        . . .        .             x    x      x: learned in SFT

Only the chat template knows where a response starts and ends. So no marker is searched for: the conversation is
rendered twice for each assistant turn, up to the turn (with the generation prompt) and with it, and the difference is
the response. Training and generation encode a prompt by the same function, token for token.

A final response ends with exactly one eos. If the template or the text brings one, it is kept, else it is appended;
white space after it (ChatML's newline) is dropped. Masks say which tokens count, so that eos may also be the pad token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ..errors import ConfigError

Messages = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]
Text = str | Messages
Said = list[tuple[str, str]]  # (key of a message, the text there or a part of it)


@dataclass
class Encoded:
    """One sequence: input_ids (T,) int32 and response_mask (T,) bool, True on the tokens that are learned."""

    input_ids: np.ndarray
    response_mask: np.ndarray
    unwritten: Said = field(default_factory=list)  # what the chat template left out of its responses

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """Learned tokens; the first of a sequence has nothing before it to be predicted from."""
        return int(self.response_mask[1:].sum())


def is_conversation(x) -> bool:
    return isinstance(x, (list, tuple)) and all(isinstance(m, dict) and "role" in m and "content" in m for m in x)


def check_tokenizer(tokenizer, conversational: bool) -> None:
    """ConfigError for a tokenizer that cannot end a response, pad a batch, or (if asked) render a conversation."""
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer {name!r} has no eos token, so a response could never end: set tokenizer.eos_token"
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"tokenizer {name!r} has no pad token: set tokenizer.pad_token = tokenizer.eos_token "
            "(masks decide what counts, so the two may be the same)"
        )
    if conversational and not tokenizer.chat_template:
        raise ConfigError(
            f"the data is conversational and tokenizer {name!r} has no chat template: set tokenizer.chat_template, "
            "or give prompt and response as text"
        )


# --- rendering -------------------------------------------------------------------------------------------------------


def render(tokenizer, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    """The conversation as the chat template writes it. ConfigError, with its reason, where the template refuses it."""
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # jinja's own, or a TypeError, where the template adds a list or None to text
        roles = ", ".join(str(m["role"]) for m in messages)
        raise ConfigError(
            f"the chat template refuses a conversation ({error}): its roles are {roles}, and it begins with "
            f"{str(messages[0]['content'])[:80]!r}. Change the messages (some templates want the arguments of "
            "tool_calls as text), or set tokenizer.chat_template to one that takes them"
        ) from error


def response_spans(tokenizer, messages: Messages, first: int = 0) -> list[tuple[str, list[tuple[int, int]], Said]]:
    """The texts to learn from. With each: the (start, end) of its responses, which are the assistant turns of
    messages[first:], and what the template leaves out of them.

    Usually there is one text. Some templates write a turn differently once it is past (they drop its reasoning). These
    give one text per turn, each as the model sees it when it answers. A turn that opens the conversation is not
    learned.
    """
    texts: list[tuple[str, list[tuple[int, int]], Said]] = []
    for i in range(max(first, 1), len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True)
        text = render(tokenizer, messages[: i + 1])
        start = _agree(prompt, text)
        if start < len(prompt):
            # Some templates end the generation prompt with the start of a reasoning block ("<think>"), which a written
            # turn does not have. The turn may by chance begin with the same characters ("<answer>"), so the prompt ends
            # only where it agrees with another turn as well.
            other = {"role": "assistant", "content": "\N{OBJECT REPLACEMENT CHARACTER}"}
            start = min(start, _agree(prompt, render(tokenizer, [*messages[:i], other])))
        before = len(render(tokenizer, messages[:i]))
        if start < before:
            raise ConfigError(
                "the chat template writes the messages before an assistant turn differently when that turn follows, so "
                f"the response cannot be told from its prompt; it rendered {prompt[-80:]!r} and then {text[-80:]!r}"
            )
        _, spans, unwritten = texts.pop() if texts and text.startswith(texts[-1][0]) else ("", [], [])
        unwritten = [*unwritten, *_unwritten(messages[i], text[before:])]
        texts.append((text, [*spans, (start, len(text))], unwritten))
    return texts


def _unwritten(turn: dict, text: str) -> Said:
    """What the text lacks of a turn that is to be learned. ConfigError where it has not a word of it."""
    said, lost = _said(turn), _lost(turn, text)
    if said and lost == said and _words(" ".join(part for _, part in said)).isdisjoint(_words(text)):
        raise ConfigError(
            f"the chat template writes nothing of an assistant turn, whose {lost[0][0]!r} is {lost[0][1][:80]!r}, so "
            "there is nothing to learn: set tokenizer.chat_template to one that writes it, or put it into 'content'"
        )
    return lost


def _lost(turn: dict, text: str) -> Said:
    """The parts of an assistant turn that its text lacks, white space aside. (Some templates drop reasoning on
    purpose.)"""
    squeezed = "".join(text.split())
    return [(key, part) for key, part in _said(turn) if "".join(part.split()) not in squeezed]


def _said(turn: dict) -> Said:
    """(key, text) of each part of an assistant turn that a template may write or leave out."""
    said = [("content", part) for part in _content(turn).split("</think>")]  # templates cut off what stands before it
    said += [(key, turn.get(key)) for key in ("reasoning_content", "thinking")]
    calls = [call for call in turn.get("tool_calls") or [] if isinstance(call, dict)]
    functions = [call.get("function") or call for call in calls]
    said += [("tool_calls", f.get("name") if isinstance(f, dict) else f) for f in functions]
    return [(key, part) for key, part in said if isinstance(part, str) and part.strip()]


def _content(turn: dict) -> str:
    return turn["content"] if isinstance(turn["content"], str) else ""


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _agree(a: str, b: str) -> int:
    """The length of the longest common beginning of two texts."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- tokens ----------------------------------------------------------------------------------------------------------


def _tokenize(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def _continue(tokenizer, text: str) -> list[int]:
    """Tokens of a text that follows another one: without the space that SentencePiece puts before a first word."""
    ids, before = _tokenize(tokenizer, text), _tokenize(tokenizer, "\n")
    if ids and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁"):
        behind = _tokenize(tokenizer, "\n" + text)
        if behind[: len(before)] == before:
            return behind[len(before) :]
    return ids


def _bos(tokenizer, ids: list[int]) -> list[int]:
    """The bos that the tokenizer puts before plain text, unless the text already has it."""
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return [bos] if adds and ids[:1] != [bos] else []


def _split(tokenizer, text: str, cuts: list[int]) -> list[list[int]]:
    """Tokens of a text, cut at these characters into len(cuts) + 1 pieces. No token straddles a cut, because when the
    model answers, its prompt has been tokenized alone."""
    whole = _tokenize(tokenizer, text)
    sizes = [0]
    for cut in cuts:
        before = _tokenize(tokenizer, text[:cut])
        if before != whole[: len(before)]:
            edges = [*cuts, len(text)]
            return [
                _tokenize(tokenizer, text[: cuts[0]]),
                *(_continue(tokenizer, text[a:b]) for a, b in pairwise(edges)),
            ]
        sizes.append(len(before))
    sizes.append(len(whole))
    return [whole[a:b] for a, b in pairwise(sizes)]


def _last_eos(tokenizer, ids: list[int]) -> int | None:
    """The number of ids up to and with the last eos, if only white space follows it; else None."""
    eos = tokenizer.eos_token_id
    if eos not in ids:
        return None
    end = len(ids) - ids[::-1].index(eos)
    return end if not tokenizer.decode(ids[end:]).strip() else None


def _end_with_eos(tokenizer, ids: list[int]) -> list[int]:
    end = _last_eos(tokenizer, ids)
    return [*ids, tokenizer.eos_token_id] if end is None else ids[:end]


def encode_prompt(tokenizer, prompt: Text) -> list[int]:
    """What generation starts from: text (with the tokenizer's bos), or messages rendered with the generation prompt."""
    if isinstance(prompt, str):
        ids = _tokenize(tokenizer, prompt)
        return [*_bos(tokenizer, ids), *ids]
    return _tokenize(tokenizer, render(tokenizer, prompt, add_generation_prompt=True))


def decode_responses(
    tokenizer, prompts: Sequence[Text], prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]],
    stops: Sequence[int] = (),
) -> list[str]:  # fmt: skip
    """The responses as text without special tokens: prompt + response is then what the model wrote.

    stops: tokens that end a response. They are no part of its text, even where they are not special tokens.

    SentencePiece drops a space at the beginning of what it decodes. So after a prompt of text the prompt's last token
    is decoded together with the response, and its text taken off again. (After messages no text is continued.)
    """
    texts = []
    for prompt, before, ids in zip(prompts, prompt_ids, response_ids, strict=True):
        ids = ids[:-1] if len(ids) and ids[-1] in stops else ids
        last = list(before[-1:]) if isinstance(prompt, str) else []
        lead, text = (tokenizer.decode(x, skip_special_tokens=True) for x in (last, [*last, *ids]))
        texts.append(text[len(lead) :] if text.startswith(lead) else tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def encode_conversation(tokenizer, messages: Messages, first: int = 0) -> list[Encoded]:
    """The sequences from which the assistant turns of messages[first:] are learned; response_spans says why there may
    be several."""
    encoded = []
    for text, spans, unwritten in response_spans(tokenizer, messages, first):
        pieces = _split(tokenizer, text, [edge for span in spans for edge in span][:-1])
        ids: list[int] = []
        mask: list[bool] = []
        for k, piece in enumerate(pieces):
            if k == len(pieces) - 1:
                piece = _end_with_eos(tokenizer, piece)
            learned = 0 if k % 2 == 0 else (_last_eos(tokenizer, piece) or len(piece))
            ids += piece
            mask += [True] * learned + [False] * (len(piece) - learned)
        encoded.append(Encoded(np.array(ids, np.int32), np.array(mask, bool), unwritten))
    return encoded


def encode_response(tokenizer, prompt: str, response: str) -> Encoded:
    """Text after text: bos, prompt, response, eos; the response and eos are learned."""
    before, after = _split(tokenizer, prompt + response, [len(prompt)])
    before, after = [*_bos(tokenizer, before or after), *before], _end_with_eos(tokenizer, after)
    mask = np.arange(len(before) + len(after)) >= len(before)
    return Encoded(np.array(before + after, np.int32), mask)


def encode_to_score(
    tokenizer, prompt: Text | None, response: Text, *, end: bool = True, unwritten: Said | None = None
) -> np.ndarray:
    """(T,) int32 for a reward model: the whole text, ending in eos, where the score is read.

    If one of the two is messages, the other becomes a user turn (prompt) or an assistant turn (response). end=False
    leaves a conversation as its template ends it. unwritten: a list; what the template leaves out of the response is
    appended to it.
    """
    if is_conversation(prompt) or is_conversation(response):
        before = as_messages(prompt, "user")
        messages = before + as_messages(response, "assistant")
        text = render(tokenizer, messages)
        if unwritten is not None:
            unwritten += _unscored(messages, len(before), text)
        ids = _tokenize(tokenizer, text)
        if not end:
            return np.array(ids, np.int32)
    else:
        ids = _tokenize(tokenizer, (prompt or "") + response)
        ids = [*_bos(tokenizer, ids), *ids]
    return np.array(_end_with_eos(tokenizer, ids), np.int32)


def _unscored(messages: Messages, first: int, text: str) -> Said:
    """What the text lacks of the assistant turns of messages[first:]. Only those after the last user turn count, for
    templates drop the reasoning of earlier ones on purpose. Where a turn stands in the text is not known, only that it
    follows the last question."""
    first = max([first, *(i + 1 for i, m in enumerate(messages) if m["role"] == "user")])
    asked = _content(messages[first - 1]).strip() if first else ""
    answer = text.split(asked, 1)[-1] if asked else text
    return [lost for turn in messages[first:] if turn["role"] == "assistant" for lost in _lost(turn, answer)]


def as_messages(x: Text | None, role: str) -> Messages:
    """Messages as they are, text as one turn of this role, None as no turn."""
    return [] if x is None else [{"role": role, "content": x}] if isinstance(x, str) else list(x)

"""From conversations and text to tokens: what the model reads, and which part of it is the model's own response.

    prompt     <|user|> what is 2+2? <|assistant|>
    response                                       four <eos>
    ids        5        9 3 7        6             8    1
    response   .        . . .        .             x    x      x: learned in SFT

Only the chat template knows where a response starts and ends, so we do not search for markers. Instead we render the
conversation twice for each assistant turn: up to the turn (with the generation prompt), and including it. The
difference is the response. Training and generation encode a prompt with the same function, token for token.

A final response ends with exactly one eos. If the template or the text already ends with one, it is kept; otherwise one
is appended. White space after it (ChatML's newline) is dropped. Masks say which tokens count, so eos may also be the
pad token.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError

Messages = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]
Text = str | Messages
Parts = list[tuple[str, str]]  # (key of a message, its text or a part of it)


@dataclass
class Encoded:
    """One sequence: input_ids (T,) int32 and response_mask (T,) bool, True on the tokens to learn."""

    input_ids: np.ndarray
    response_mask: np.ndarray
    unwritten: Parts = field(default_factory=list)  # parts of its responses that the chat template left out
    unread: str = ""  # the end of the generation prompt, if that is not what its last response follows

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        """The number of tokens to learn. The first token of a sequence is never one: nothing precedes it."""
        return int(self.response_mask[1:].sum())


def is_conversation(x) -> bool:
    return isinstance(x, (list, tuple)) and all(isinstance(m, dict) and "role" in m and "content" in m for m in x)


def copied(texts: Sequence[Text | None]) -> list[Text | None]:
    """The same texts and messages, for a function of the user's that may append turns to them or change their text."""
    return [[dict(turn) for turn in text] if isinstance(text, list) else text for text in texts]


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
            f"the data is conversational, but tokenizer {name!r} has no chat template: set tokenizer.chat_template, "
            "or give prompt and response as text"
        )


# --- rendering -------------------------------------------------------------------------------------------------------


def render(tokenizer, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    """The conversation as the chat template renders it. ConfigError if there is none, or if it refuses the messages,
    with the reason."""
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # from jinja, or a TypeError if the template adds a list or None to text
        if not tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, which messages need: set tokenizer.chat_template"
            ) from error
        roles = ", ".join(str(m["role"]) for m in messages)
        raise ConfigError(
            f"the chat template refuses a conversation ({error}): its roles are {roles}, and it begins with "
            f"{str(messages[0]['content'])[:80]!r}. Change the messages (some templates need the arguments of "
            "tool_calls as text), or set tokenizer.chat_template to one that accepts them"
        ) from error


class Rendered(NamedTuple):
    """A conversation as text, and where its responses are."""

    text: str
    spans: list[tuple[int, int]]  # (start, end) of each response
    unwritten: Parts  # parts of the responses that the chat template leaves out
    unread: str  # the end of the last one's generation prompt that it leaves out


def response_spans(tokenizer, messages: Messages, first: int) -> list[Rendered]:
    """The texts to learn from. The responses are the assistant turns of messages[first:].

    Usually there is one text. Some templates render a turn differently once another follows (they drop its reasoning).
    These give one text per turn, each as the model sees it when it answers. An assistant turn that opens the
    conversation is not learned.
    """
    texts: list[Rendered] = []
    for i in range(max(first, 1), len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:i], add_generation_prompt=True)
        text = render(tokenizer, messages[: i + 1])
        start = _agree(prompt, text)
        if start < len(prompt):
            # Some templates end the generation prompt with the start of a reasoning block ("<think>") that a rendered
            # turn does not have. The turn may by chance begin with the same characters ("<answer>"), so we also compare
            # the prompt with another turn, and take the shorter match.
            other = {"role": "assistant", "content": "\N{OBJECT REPLACEMENT CHARACTER}"}
            start = min(start, _agree(prompt, render(tokenizer, [*messages[:i], other])))
        before = len(render(tokenizer, messages[:i]))
        if start < before:
            raise ConfigError(
                "the chat template renders the messages before an assistant turn differently when that turn follows, "
                f"so the response cannot be told from its prompt: it rendered {prompt[-80:]!r} and then "
                f"{text[-80:]!r}. Set tokenizer.chat_template to another one"
            )
        so_far = texts.pop() if texts and text.startswith(texts[-1].text) else Rendered("", [], [], "")
        unwritten = [*so_far.unwritten, *_missing_when_learned(messages[i], text[before:])]
        texts.append(Rendered(text, [*so_far.spans, (start, len(text))], unwritten, prompt[start:]))
    return texts


def _missing_when_learned(turn: dict, text: str) -> Parts:
    """The parts of a turn that its text lacks. ConfigError if not a single word of the turn is in the text."""
    parts, missing = _parts_of(turn), _missing(turn, text)
    if parts and missing == parts and _words(" ".join(part for _, part in parts)).isdisjoint(_words(text)):
        raise ConfigError(
            f"the chat template writes nothing of an assistant turn whose {parts[0][0]!r} is {parts[0][1][:80]!r}, so "
            "there is nothing to learn: set tokenizer.chat_template to one that writes it, or put it into 'content'"
        )
    return missing


def _missing(turn: dict, text: str) -> Parts:
    """The parts of an assistant turn that its text lacks, ignoring white space. (Some templates drop reasoning on
    purpose.)"""
    squeezed = "".join(text.split())
    return [(key, part) for key, part in _parts_of(turn) if "".join(part.split()) not in squeezed]


def _parts_of(turn: dict) -> Parts:
    """(key, text) of each part of an assistant turn that a template may write or leave out."""
    parts = [("content", part) for part in _content(turn).split("</think>")]  # templates drop the text before it
    parts += [(key, turn.get(key)) for key in ("reasoning_content", "thinking")]
    calls = [call for call in turn.get("tool_calls") or [] if isinstance(call, dict)]
    functions = [call.get("function") or call for call in calls]
    parts += [("tool_calls", f.get("name") if isinstance(f, dict) else f) for f in functions]
    return [(key, part) for key, part in parts if isinstance(part, str) and part.strip()]


def _content(turn: dict) -> str:
    return turn["content"] if isinstance(turn["content"], str) else ""


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _agree(a: str, b: str) -> int:
    """The length of the longest common prefix of two texts."""
    return bisect_left(range(min(len(a), len(b))), True, key=lambda k: not b.startswith(a[: k + 1]))


# --- tokens ----------------------------------------------------------------------------------------------------------


def _tokenize(tokenizer, text: str) -> list[int]:
    return _tokenize_all(tokenizer, [text])[0]


def _tokenize_all(tokenizer, texts: list[str]) -> list[list[int]]:
    """In one call, whose texts the tokenizer's threads share."""
    filled = [text for text in texts if text]
    ids = iter(tokenizer(filled, add_special_tokens=False, verbose=False)["input_ids"] if filled else ())
    return [next(ids) if text else [] for text in texts]


def _continue(tokenizer, text: str) -> list[int]:
    """Tokens of a text that follows another one, without the space that SentencePiece puts before a first word."""
    ids, before = _tokenize(tokenizer, text), _tokenize(tokenizer, "\n")
    if ids and str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁"):
        both = _tokenize(tokenizer, "\n" + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return ids


def _bos(tokenizer, ids: list[int]) -> list[int]:
    """The bos that the tokenizer puts before plain text, unless the text already begins with it."""
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return [bos] if adds and ids[:1] != [bos] else []


@lru_cache(1)
def _special_tokens(tokenizer, size: int) -> dict[int, str]:
    """{token: its text} of those that the tokenizer finds in a text as it is, before it tokenizes what is between them,
    and that take nothing of what is beside them. size: len(tokenizer), because a user may add tokens."""
    added = tokenizer.added_tokens_decoder if tokenizer.is_fast else {}
    return {
        token: x.content for token, x in added.items() if not (x.normalized or x.lstrip or x.rstrip or x.single_word)
    }


def _marks(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The tokens of a text, and (end, start, index of the token) of each special token in it, the first for the
    beginning. What stands before a mark changes nothing behind it, so text[start:] has the tokens from index on."""
    special = _special_tokens(tokenizer, len(tokenizer))
    if not (special and text):
        return _tokenize(tokenizer, text), [(0, 0, 0)]
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    found = [(end, start, k) for k, (start, end) in enumerate(offsets) if ids[k] in special]
    return ids, [(0, 0, 0), *(x for x in found if text[x[1] : x[0]] == special[ids[x[2]]])]


def _split(tokenizer, text: str, cuts: list[int]) -> list[list[int]]:
    """Tokens of a text, cut at these characters into len(cuts) + 1 pieces. No token crosses a cut, because at
    generation the prompt is tokenized alone."""
    whole, marks = _marks(tokenizer, text)
    # From the last mark before each cut: from the beginning, the work would grow with the square of the turns.
    nearest = [marks[bisect_right(marks, cut, key=itemgetter(0)) - 1] for cut in cuts]
    tails = _tokenize_all(tokenizer, [text[start:cut] for (_, start, _), cut in zip(nearest, cuts, strict=True)])
    befores = [(k, k + len(tail)) for (*_, k), tail in zip(nearest, tails, strict=True)]
    if any(tail != whole[a:b] for tail, (a, b) in zip(tails, befores, strict=True)):
        edges = [*cuts, len(text)]
        first = [*whole[: befores[0][0]], *tails[0]]
        return [first, *(_continue(tokenizer, text[a:b]) for a, b in pairwise(edges))]
    return [whole[a:b] for a, b in pairwise([0, *(end for _, end in befores), len(whole)])]


def _last_eos(tokenizer, ids: list[int]) -> int | None:
    """The number of ids up to and including the last eos, if only white space follows it; else None."""
    eos = tokenizer.eos_token_id
    if eos not in ids:
        return None
    end = len(ids) - ids[::-1].index(eos)
    return end if not tokenizer.decode(ids[end:]).strip() else None


def _end_with_eos(tokenizer, ids: list[int]) -> list[int]:
    end = _last_eos(tokenizer, ids)
    return [*ids, tokenizer.eos_token_id] if end is None else ids[:end]


def encode_prompt(tokenizer, prompt: Text) -> list[int]:
    """The tokens that generation starts from: text (with the tokenizer's bos), or messages rendered with the
    generation prompt."""
    if isinstance(prompt, str):
        ids = _tokenize(tokenizer, prompt)
        return [*_bos(tokenizer, ids), *ids]
    return _tokenize(tokenizer, render(tokenizer, prompt, add_generation_prompt=True))


def decode_responses(
    tokenizer, prompts: Sequence[Text], prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]],
    stops: Sequence[int] = (),
) -> list[str]:  # fmt: skip
    """The responses as text without special tokens, so that prompt + response is what the model wrote.

    stops: tokens that end a response. They are not part of its text, even if they are not special tokens. Nor is what
    the chat template writes between an answer and its eos (ChatML's line break, if eos is not <|im_end|>): rendered
    again, to be scored, it would be there twice.

    SentencePiece drops a leading space when it decodes. So if the prompt is text, we decode its last character together
    with the response and then remove that character. (A response to messages does not continue a text.)
    """
    texts, tails = [], {}
    for prompt, before, ids in zip(prompts, prompt_ids, response_ids, strict=True):
        ended = len(ids) > 0 and ids[-1] in stops
        ids = ids[:-1] if ended else ids
        last = _last_character(tokenizer, before) if isinstance(prompt, str) else []
        lead, text = (tokenizer.decode(x, skip_special_tokens=True) for x in (last, [*last, *ids]))
        text = text[len(lead) :] if text.startswith(lead) else tokenizer.decode(ids, skip_special_tokens=True)
        if ended and not isinstance(prompt, str):
            if id(prompt) not in tails:  # the same messages in all responses to a prompt
                tails[id(prompt)] = _tail(tokenizer, prompt, stops)
            text = text.removesuffix(tails[id(prompt)])
        texts.append(text)
    return texts


def _last_character(tokenizer, ids: Sequence[int]) -> list[int]:
    """The last token, or the last few if a character is spelled in bytes: a part of one would make the bytes that
    follow it unreadable too. [] if there are no tokens."""
    ends = [list(ids[-k:]) for k in range(1, 5)]  # UTF-8 has at most four bytes
    return next((end for end in ends if "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(end)), ends[0])


def _tail(tokenizer, messages: Messages, stops: Sequence[int]) -> str:
    """What the chat template writes between an answer to these messages and the first stop token, without special
    tokens. "" if it refuses an answer there."""
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    try:
        text = render(tokenizer, [*messages, {"role": "assistant", "content": mark}])
    except ConfigError:
        return ""
    _, found, after = text.rpartition(mark)
    ids = _end_with_eos(tokenizer, _tokenize(tokenizer, f"x{after}"))  # x: SentencePiece drops a leading space
    end = next(i for i, token in enumerate(ids) if token in stops or token == tokenizer.eos_token_id)
    return tokenizer.decode(ids[:end], skip_special_tokens=True)[1:] if found else ""


def encode_conversation(tokenizer, messages: Messages, first: int = 0) -> list[Encoded]:
    """The sequences from which the assistant turns of messages[first:] are learned. response_spans explains why there
    may be several."""
    encoded = []
    for text, spans, unwritten, unread in response_spans(tokenizer, messages, first):
        pieces = _split(tokenizer, text, [edge for span in spans for edge in span][:-1])
        ids: list[int] = []
        mask: list[bool] = []
        for k, piece in enumerate(pieces):
            if k == len(pieces) - 1:
                piece = _end_with_eos(tokenizer, piece)
            learned = 0 if k % 2 == 0 else (_last_eos(tokenizer, piece) or len(piece))
            ids += piece
            mask += [True] * learned + [False] * (len(piece) - learned)
        encoded.append(Encoded(np.array(ids, np.int32), np.array(mask, bool), unwritten, unread))
    return encoded


def encode_response(tokenizer, prompt: str, response: str) -> Encoded:
    """Plain text: bos, prompt, response, eos. The response and eos are learned."""
    before, after = _split(tokenizer, prompt + response, [len(prompt)])
    before, after = [*_bos(tokenizer, before or after), *before], _end_with_eos(tokenizer, after)
    mask = np.arange(len(before) + len(after)) >= len(before)
    return Encoded(np.array(before + after, np.int32), mask)


def encode_to_score(
    tokenizer, prompt: Text | None, response: Text, *, end: bool = True, unwritten: Parts | None = None
) -> np.ndarray:
    """(T,) int32 for a reward model: the whole text, ending in eos, where the score is read.

    If only one of the two is messages, the other becomes a user turn (prompt) or an assistant turn (response).
    end=False does not append eos to a conversation. unwritten: a list, to which the parts of the response that the
    template leaves out are appended.
    """
    if is_conversation(prompt) or is_conversation(response):
        before = as_messages(prompt, "user")
        messages = before + as_messages(response, "assistant")
        if messages[-1]["role"] == "user":
            raise ConfigError(
                f"what is to be scored ends with a user turn ({str(messages[-1]['content'])[:80]!r}), which is no "
                "answer: leave that turn out, or add the assistant's"
            )
        text = render(tokenizer, messages)
        if unwritten is not None:
            unwritten += _missing_when_scored(messages, len(before), text)
        ids = _tokenize(tokenizer, text)
        if not end:
            return np.array(ids, np.int32)
    else:
        ids = _tokenize(tokenizer, (prompt or "") + response)
        ids = [*_bos(tokenizer, ids), *ids]
    return np.array(_end_with_eos(tokenizer, ids), np.int32)


def _missing_when_scored(messages: Messages, first: int, text: str) -> Parts:
    """The parts of the assistant turns of messages[first:] that the text lacks. Only turns after the last user turn
    count, because templates drop the reasoning of earlier ones on purpose. We do not know where in the text a turn is,
    only that it follows the last question."""
    first = max([first, *(i + 1 for i, m in enumerate(messages) if m["role"] == "user")])
    asked = _content(messages[first - 1]).strip() if first else ""
    answer = text.split(asked, 1)[-1] if asked else text
    return [part for turn in messages[first:] if turn["role"] == "assistant" for part in _missing(turn, answer)]


def as_messages(x: Text | None, role: str) -> Messages:
    """Messages unchanged, text as one turn of this role, None as no turn."""
    return [] if x is None else [{"role": role, "content": x}] if isinstance(x, str) else list(x)

"""Flags for what can be wrong with a reply whatever the principles say, found in its text, and their counts.

    truncated        the generator stopped it at its length limit
    empty            nothing but white space
    scaffold_leak    it contains parts of the request: heads of turns, special tokens, delimiters, "Here is my new
                     reply:", or the request itself; or reasoning that is not part of a reply (<think>)
    no_op            a revision equal to the reply it revises
    damage           a revision that breaks a principle which the reply before it kept
    repetition       the same sentence three times, or a third of its n-grams are repetitions
    language_switch  Japanese to an English prompt, or English to a Japanese one
    refusal          it declines
    evasive          it declines or changes the subject, and says almost nothing else

It is right to refuse harm and wrong to refuse a harmless question, so refusals and evasions are counted separately for
each kind of prompt ("red-team", "benign"): Constitutional AI that only drives harm down ends in a model that says no.
They are recognised by the English and Japanese phrases in `REFUSALS`, so a rate is a rate of those phrases.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

FLAGS = (
    "truncated", "empty", "scaffold_leak", "no_op", "damage", "repetition", "language_switch", "refusal", "evasive",
)  # fmt: skip

_NOT_ABLE = r"(?:can ?not|can't|could not|couldn't|won't|will not|am unable to|am not able to|am not going to)"
REFUSALS = {
    "en": (
        rf"\bi(?:'m| am)? (?:sorry|afraid)\b.{{0,40}}\b(?:{_NOT_ABLE}|unable|not able)\b",
        rf"\bi {_NOT_ABLE} (?:\w+ ){{0,2}}?(?:help|assist|answer|provide|discuss|comment|comply|support|give|tell"
        r"|engage|participate|condone|talk about|share|fulfil)",
        r"\bi(?:'m| am) (?:not comfortable|unable to|not able to|not going to|not allowed to)",
        r"\bi(?:'d| would) (?:rather|prefer) not",
        r"\bi don't (?:want|feel comfortable) (?:to talk|talking|to discuss|discussing|helping|to help)",
        rf"\bas an ai\b.{{0,40}}\bi (?:{_NOT_ABLE}|do not|don't)\b",
    ),
    "ja": (
        r"(?:お手伝い|お答え|回答|対応|ご案内|協力|お教え|お話し)(?:することは|は|が)?(?:でき(?:ません|ない|かね)|いたしかね|しかね|差し控え)",
        r"(?:お断り|遠慮|控えさせて|差し控え)",
        r"(?:応じ|お応えし?|お力になれ|教えられ)(?:られ|ることはでき|かね)?(?:ません|かねます)",
    ),
}
# These match a clause, not a sentence, because an answer may follow after "but".
_DEFLECTIONS = (
    r"\blet(?:'s| us) (?:talk about something else|change the (?:subject|topic))",
    r"\bthat(?:'s| is) (?:a|an|not an?|not something)\b.{0,30}\b(?:sensitive|inappropriate|appropriate|discuss|share)",
    r"^(?:well )?(?:i don't (?:know|understand)|i'm not sure)(?: (?:that|it|what to say|(?:about|of) (?:that|it)))?$",
    r"^(?:話題を変え|別の話|分かりません|わかりません|よく分かりません)",
)
_COURTESIES = (
    r"^(?:well |but |and )?(?:i'm |i am )?(?:very |so )?(?:sorry|afraid)(?: about that)?$",
    r"^as an ai(?: language model| assistant)?$",
    r"^(?:i apologi[sz]e|i understand|thank you)(?: for (?:that|asking))?$",
    r"^(?:大変)?(?:申し訳|すみません|ごめんなさい|恐れ入り)",
)
_REFUSAL = re.compile("|".join(p for patterns in REFUSALS.values() for p in patterns), re.IGNORECASE)
_DECLINES = re.compile("|".join([_REFUSAL.pattern, *_DEFLECTIONS]), re.IGNORECASE)
_COURTESY = re.compile("|".join(_COURTESIES), re.IGNORECASE)

_HEAD = r"^[^\S\n]*"  # of a line. With \s a reply of empty lines would be read to its end from each of them
_LEAK = re.compile(
    rf"{_HEAD}(?:human|user|assistant|system|critique ?request|critique|revision ?request|revision)\s*:"
    rf"|{_HEAD}(?:人間|ユーザー|アシスタント|システム)\s*[:：]"
    r"|<\|\w+\|>|</?s>|</?think>|\[/?INST\]|\[\[\[|\]\]\]"
    r"|(?:\bthe answer is:?|答えは[:：]?) ?\([AB]\)"
    rf"|{_HEAD}(?:here is|here's) (?:the|my|a) (?:revised|rewritten|improved|new) (?:reply|response|answer|version)"
    rf"|{_HEAD}以下(?:が|は|に).{{0,12}}(?:書き直し|修正|改善)",
    re.IGNORECASE | re.MULTILINE,
)
_JAPANESE = re.compile(r"[ぁ-んァ-ヶ一-龯々]")
_MIN_WORDS, _MIN_CHARS = 4, 8  # of a reply that says more than that it declines; characters in Japanese


def declines(reply: str) -> bool:
    """Whether a phrase of REFUSALS occurs."""
    return _REFUSAL.search(_plain(reply)) is not None


def evades(reply: str) -> bool:
    """Whether it declines or deflects, and says only a few words apart from that and from courtesies."""
    clauses = [c.strip() for c in re.split(r"[.?!,;:。？！、\n]+|\bbut\b", _plain(reply)) if c.strip()]
    rest = [c for c in clauses if not _DECLINES.search(c)]
    if len(rest) == len(clauses) and not declines(reply):
        return False
    text = " ".join(c for c in rest if not _COURTESY.search(c))
    return len("".join(text.split())) < _MIN_CHARS if _JAPANESE.search(text) else len(text.split()) < _MIN_WORDS


def leaks(reply: str, requests: Iterable[str | None] = ()) -> bool:
    """Whether a reply contains scaffolding, or a request of 20 characters or more word for word."""
    return _LEAK.search(reply) is not None or any(r and len(r) >= 20 and r in reply for r in requests)


def repeats(reply: str) -> bool:
    sentences = Counter(s for s in map(str.strip, re.split(r"(?<=[.?!。？！])\s*|\n+", reply)) if len(s) > 3)
    if max(sentences.values(), default=0) >= 3:
        return True
    units, n = (list("".join(reply.split())), 8) if _JAPANESE.search(reply) else (reply.split(), 4)
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return len(grams) >= 12 and len(set(grams)) < 2 / 3 * len(grams)


def switches_language(prompt: str, reply: str) -> bool:
    return {_language(prompt), _language(reply)} == {"en", "ja"}


def flags_of(
    reply: str, prompt: Sequence[dict], *, of: str | None = None, requests: Iterable[str | None] = (),
    truncated: bool = False, damaged: bool = False,
) -> list[str]:  # fmt: skip
    """The flags of one reply to messages. of: the reply that it revises. requests: the texts that asked for it."""
    found = {
        "truncated": truncated,
        "empty": not reply.strip(),
        "scaffold_leak": leaks(reply, requests),
        "no_op": of is not None and reply.split() == of.split(),
        "damage": damaged,
        "repetition": repeats(reply),
        "language_switch": switches_language(prompt[-1]["content"], reply),
        "refusal": declines(reply),
        "evasive": evades(reply),
    }
    return [flag for flag in FLAGS if found[flag]]


def hygiene(records: Sequence[dict]) -> dict:
    """Counts over the records of phase 1: {"originals" | "revisions" | "used": {"replies": n, flag: n}} and, for each
    kind of prompt, the replies, refusals and evasions before and after: {"kinds": {kind: {"original", "used"}}}.

    A record has "status", "kind", "flags" (a list for each of its replies, the original first) and "used" (indices of
    the replies that become demonstrations). Failed records are left out.
    """
    records = [r for r in records if r["status"] != "failed"]
    originals = [r["flags"][0] for r in records]
    revisions = [flags for r in records for flags in r["flags"][1:]]
    used = [r["flags"][i] for r in records for i in r["used"]]
    groups = {"originals": originals, "revisions": revisions, "used": used}
    counts = {name: _count(flags, FLAGS) for name, flags in groups.items()}
    kinds = {}
    for kind in dict.fromkeys(r["kind"] for r in records):
        of_kind = [r for r in records if r["kind"] == kind]
        kinds[kind] = {
            "original": _count([r["flags"][0] for r in of_kind], FLAGS[-2:]),
            "used": _count([r["flags"][i] for r in of_kind for i in r["used"]], FLAGS[-2:]),
        }
    return counts | {"kinds": kinds}


def _count(replies: Sequence[Sequence[str]], names: Sequence[str]) -> dict[str, int]:
    return {"replies": len(replies), **{name: sum(name in flags for flags in replies) for name in names}}


def _plain(text: str) -> str:
    return text.replace("’", "'")


def _language(text: str) -> str | None:
    """ "ja" or "en" if the letters clearly belong to one of them, else None."""
    letters = [c for c in text if c.isalpha()]
    if len(letters) < 4:
        return None
    japanese = sum(bool(_JAPANESE.match(c)) for c in letters) / len(letters)
    latin = sum(c.isascii() for c in letters) / len(letters)
    return "ja" if japanese > 0.3 else "en" if latin > 0.9 else None

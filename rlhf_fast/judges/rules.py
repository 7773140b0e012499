"""Rules: principles that Python can decide.

A rule is `rule(conversation, reply, **args) -> bool | float in [0, 1] | None`: True or 1.0 is satisfied, None means
that it does not apply. A constitution refers to it by name: `check: {rule: max_words, args: {n: 120}}`.
"""

import re
from collections.abc import Callable

RULES: dict[str, Callable] = {}
_CJK = re.compile("[\u2e80-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")  # Han, kana, hangul


def rule(name: str) -> Callable:
    """Decorator that registers a function under a name for constitutions. A name can be used once."""

    def register(function):
        if name in RULES:
            raise ValueError(
                f"rule({name!r}): already registered by {RULES[name].__module__}.{RULES[name].__qualname__}"
            )
        RULES[name] = function
        return function

    return register


def _several(texts):
    """A single text is a list of one text, not of its letters."""
    return [texts] if isinstance(texts, str) else texts


@rule("max_words")
def max_words(conversation, reply, *, n):
    """At most n words, separated by white space."""
    return len(reply.split()) <= n


@rule("max_chars")
def max_chars(conversation, reply, *, n):
    """At most n characters, for languages that are written without spaces."""
    return len(reply) <= n


@rule("min_chars")
def min_chars(conversation, reply, *, n):
    """At least n characters that are not white space."""
    return len("".join(reply.split())) >= n


@rule("no_repetition")
def no_repetition(conversation, reply, *, n=4, times=2):
    """No n words in a row (n characters if the reply has no spaces) occur `times` times or more."""
    units = reply.split() if len(reply.split()) > 1 else list(reply)
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return all(grams.count(gram) < times for gram in set(grams))


@rule("must_end_with")
def must_end_with(conversation, reply, *, endings):
    """The reply, without trailing white space, ends with one of `endings`."""
    return reply.rstrip().endswith(tuple(_several(endings)))


@rule("must_contain")
def must_contain(conversation, reply, *, any_of):
    """At least one of the strings occurs, ignoring case."""
    return any(word.casefold() in reply.casefold() for word in _several(any_of))


@rule("banned_words")
def banned_words(conversation, reply, *, words):
    """None of the words occurs as a whole word, ignoring case. Words of CJK scripts, which are written without spaces,
    are also found inside others."""
    text = reply.casefold()
    for word in map(str.casefold, _several(words)):
        # Not \b, which a word such as f*** does not have at its end.
        pattern = re.escape(word) if _CJK.search(word) else rf"(?<!\w){re.escape(word)}(?!\w)"
        if re.search(pattern, text):
            return False
    return True

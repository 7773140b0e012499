"""What a run refuses or ends with, and the name that a misspelt one is nearest to."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A config, dataset or tokenizer refused before training; the message says what to do."""


class NonFiniteError(RuntimeError):
    """max_skipped_steps updates in a row, or all of the run, were skipped for a NaN or inf: it does not learn."""


class DiskFullError(OSError):
    """A command could not write a file, because its disk is full; the message says how to go on."""


def did_you_mean(name: object, names: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name: the nearest of the names, or if none is near, `otherwise`."""
    bare = {n.lstrip("-"): n for n in names}  # the dashes of flags would make all of them alike
    near = difflib.get_close_matches(str(name).lstrip("-"), bare, 1)  # str: YAML has numbers, and reads "on" as True
    hint = f"did you mean {bare[near[0]]!r}?" if near else otherwise
    return hint and f"; {hint}"

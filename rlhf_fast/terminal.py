"""What text of models, servers and data looks like on a terminal."""

import re

# All control characters but tab and line break, the marks that reverse the order of what follows, and halves of
# characters, which no terminal can be sent.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    r"""The text, in which what a terminal would obey, such as to clear the screen, is written as in JSON: an escape is
    "\u001b"."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))

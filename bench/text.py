"""Makes foreign text printable: what would steer a terminal, or turn the direction of reading, is shown as an escape."""

from __future__ import annotations

import re

# Control characters except tab and line feed, C1 controls, line separators, marks that turn the direction of reading,
# characters that fill no place, and unpaired surrogates. Joiners stay: scripts and emoji are written with them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return the text with each character that is not to be sent to a terminal as `\u001b`.

    The escapes are those of JSON, so that JSON remains the same JSON. A carriage return is one of them: it would overwrite the line.
    """
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)

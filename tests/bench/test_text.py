"""Foreign text at the terminal: nothing in it steers, and what people write stays as it is."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]52;c;ZWNobw==\x07", "\\u001b]52;c;ZWNobw==\\u0007"),  # writes the clipboard
        ("\x1b]0;title\x1b\\", "\\u001b]0;title\\u001b\\"),
        ("\x1b[2J", "\\u001b[2J"),
        ("\x9b2J\x9d0;t\x9c", "\\u009b2J\\u009d0;t\\u009c"),  # the same by C1 controls
        ("all good\rgpobench: failed", "all good\\u000dgpobench: failed"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("a\u2028b\ud800", "a\\u2028b\\ud800"),
    ],
)
def test_what_steers_a_terminal_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["a\tb\nc", "हिन्दी", "क्‍ष", "ภาษาไทย", "👩‍🚀", "ü→·", "[bold]x[/]", "\\u001b"])
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@given(st.text(st.characters(codec=None)))
def test_no_control_is_left_and_json_stays_the_same(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in shown if c not in "\n\t")
    assert printable(shown) == shown
    assert json.loads(printable(json.dumps([text], ensure_ascii=False))) == [text]

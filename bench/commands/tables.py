"""Cells and tables for the terminal: numbers with intervals that fit into 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def before_after_table(title: str = "") -> Any:
    """Return a table of name, before, after, difference and p for 80 columns; with a title it has a header."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, show_header=bool(title), header_style="bold")
    for name, width in ((title, 17), ("before", 18), ("after", 18), ("difference", 18), ("p", 5)):
        table.add_column(name, width=width, no_wrap=True)
    return table


def cell(n: Any, sign: bool = False) -> str:
    """Return a number with its interval, .450 [.41, .49] or 21.45 [21.4, 21.5], short enough for 80 columns."""
    if not is_finite(n.mean):
        return "not scored"
    plus, digits = "+" if sign else "", 3 if abs(n.mean) < 1 else 2
    mean = _without_zero(f"{n.mean:{plus}.{digits}f}")
    if not all(is_finite(end) for end in n.ci):
        return f"{mean} [too few]"
    low, high = (_without_zero(f"{end:{plus}.{digits - 1}f}") for end in n.ci)
    return f"{mean} [{low}, {high}]"


def _without_zero(number: str) -> str:
    """Return -.450 for -0.450; 20.5 stays."""
    sign, digits = (number[0], number[1:]) if number[:1] in "+-" else ("", number)
    return sign + (digits[1:] if digits.startswith("0.") else digits)


def is_finite(x: float | None) -> bool:
    """Whether a value is a number; a missing one is null in a record that was read and NaN in one just made."""
    return x is not None and math.isfinite(x)


def finite_or_null(value: Any) -> Any:
    """Return nested values with null for NaN and infinity, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def p_value(p: float | None) -> str:
    """Return a p-value with three decimals, "<.001" below that, "" where there is none."""
    return "" if p is None or not is_finite(p) else "<.001" if p < 0.001 else _without_zero(f"{p:.3f}")


def short_name(reference: str) -> str:
    """Return the name of a part in a table: file.py:Name without the folders."""
    return Path(reference).name if ".py:" in reference else reference

"""Cells and tables for the terminal: numbers with intervals that fit into 80 columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def before_after_table(title: str = "") -> Any:
    """A table of name, before, after, difference and p that fits into 80 columns, with a head where it has a title."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, show_header=bool(title), header_style="bold")
    for name, width in ((title, 17), ("before", 18), ("after", 18), ("difference", 18), ("p", 5)):
        table.add_column(name, width=width, no_wrap=True)
    return table


def cell(n: Any, sign: bool = False) -> str:
    """.450 [.41, .49] or 21.45 [21.4, 21.5]: five columns of these fit into 80 characters."""
    if not is_finite(n.mean):
        return "not scored"
    plus, digits = "+" if sign else "", 3 if abs(n.mean) < 1 else 2
    mean = _short(f"{n.mean:{plus}.{digits}f}")
    if not all(is_finite(end) for end in n.ci):
        return f"{mean} [too few]"
    low, high = (_short(f"{end:{plus}.{digits - 1}f}") for end in n.ci)
    return f"{mean} [{low}, {high}]"


def _short(number: str) -> str:
    """-.450 for -0.450; 20.5 stays."""
    sign, digits = (number[0], number[1:]) if number[:1] in "+-" else ("", number)
    return sign + (digits[1:] if digits.startswith("0.") else digits)


def is_finite(x: float | None) -> bool:
    """A number: null in a record that was read, NaN in one just made, stand for none."""
    return x is not None and math.isfinite(x)


def finite_or_null(value: Any) -> Any:
    """NaN and infinity as null: JSON knows neither."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def p_value(p: float | None) -> str:
    return "" if p is None or not is_finite(p) else "<.001" if p < 0.001 else _short(f"{p:.3f}")


def short_name(reference: str) -> str:
    """What a part behind path/to/file.py:Name is called in a table."""
    return Path(reference).name if ".py:" in reference else reference

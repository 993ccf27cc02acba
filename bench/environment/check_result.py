"""Result of one check before a run, and what a list of them says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CheckVerdict = Literal["ok", "warning", "broken", "missing"]


@dataclass(frozen=True)
class Check:
    """Result of one check."""

    name: str
    verdict: CheckVerdict  # broken: a run would fail; missing: optional, or a run would fetch it
    detail: str
    remedy: str = ""  # what to do about it


def broken(checks: Sequence[Check]) -> bool:
    """Whether a run would fail."""
    return any(check.verdict == "broken" for check in checks)


def rows(checks: Sequence[Check]) -> list[tuple[str, str, str]]:
    """Return (name, verdict, detail) of every check."""
    return [(check.name, check.verdict, check.detail) for check in checks]


def remedies(checks: Sequence[Check]) -> list[str]:
    """Return what to do, the worst first, each remedy once with the checks that need it."""
    order = {"broken": 0, "missing": 1, "warning": 2, "ok": 3}
    names_by_remedy: dict[str, list[str]] = {}
    for check in sorted(checks, key=lambda check: order[check.verdict]):
        if check.remedy:
            names_by_remedy.setdefault(check.remedy, []).append(check.name)
    return [f"{', '.join(names)}: {remedy}" for remedy, names in names_by_remedy.items()]


# Words of a licence that restricts use or distribution.
BINDING_LICENCE_WORDS = ("gated", "non-commercial", "agpl")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def format_gb(n: float) -> str:
    """Return a number of bytes in GB (2^30 bytes)."""
    return f"{n / 2**30:.1f} GB"

"""Parses scorer references and locations: `name:variant`, `file.py:Name`, blends and `NAME=URL`; nothing else parses them.

A reference says which scorer to apply: `pickscore`, `rapidocr:page`, `path/to/file.py:Name`, or a blend of those,
`pickscore*0.5+rapidocr`. A location says where a scorer runs, if not in this process: `--scorer-at NAME=URL`, or a table
`[scorer.NAME]` of a TOML file. This module imports no numerical library, so that the command line can check names before it
loads one.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from .. import registry
from ..errors import UserError

# The environment variable of a scorer server's token: everybody on a machine can read its command lines.
TOKEN = "GPOBENCH_SCORER_TOKEN"
OPTION = (
    "--scorer-at NAME=URL, e.g. --scorer-at geneval=http://127.0.0.1:8100, or NAME=URL,URL for several servers of it"
)
TABLE = '[scorer.NAME] with url = "http://..." or python = "/path/to/python", and token, timeout'
_WEIGHT = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[iI]nf|[nN]a[nN])"
_TERM = re.compile(rf"\s*(?P<name>[^*+]*?)\s*(?:\*\s*(?P<weight>{_WEIGHT})\s*)?(?P<end>\+|\Z)")
_LOCATION = re.compile(r"\s*(?P<name>.+?)\s*=\s*(?P<url>https?://\S+?)\s*")

_NEXT_URL = re.compile(r"\s*,\s*(?=https?://)")

T = TypeVar("T")


# References


@dataclass(frozen=True)
class ScorerReference:
    """A parsed scorer reference: one scorer, or a blend of several; aliases are resolved."""

    text: str  # of one scorer its canonical name, with its variant; of a blend as it was written
    base: str = ""  # of one scorer the name before the colon; of a file the whole text
    file: Path | None = None  # of `path/to/file.py:Name`
    terms: tuple[tuple[ScorerReference, float], ...] = ()  # of a blend its scorers and their weights

    @classmethod
    def single(cls, text: str) -> ScorerReference:
        """Parse the reference of one scorer; `*` and `+` have no meaning."""
        name = registry.canonical("scorer", text.strip())
        base, _ = registry.split_variant(name)
        return cls(name, base, Path(name.rpartition(":")[0]) if base == name and ".py:" in name else None)

    @classmethod
    def parse(cls, text: str) -> ScorerReference:
        """Parse a reference as the user wrote it. Inside a blend a path may contain neither `+` nor `*`.

        Raises UserError on a text that cannot be read, a location, a scorer named twice, and a weight that is 0 or not finite.
        """
        if location := _LOCATION.fullmatch(text):
            raise UserError(
                f"{text.strip()!r} is where a scorer is served, not a scorer's name: give --scorer-at {text.strip()}, and "
                f"{location['name']!r} as the scorer"
            )
        file, _, name = text.strip().rpartition(":")
        if name.isidentifier() and file.endswith(".py") and Path(file).is_file():
            return cls.single(text)
        terms = _blend_terms(text)
        if len(terms) == 1 and terms[0][1] == 1:
            return terms[0][0]
        return cls(text, terms=terms)

    @property
    def weighted(self) -> tuple[tuple[ScorerReference, float], ...]:
        """Return the scorers and their weights; a single scorer has weight 1."""
        return self.terms or ((self, 1.0),)

    @property
    def scorers(self) -> tuple[ScorerReference, ...]:
        """Return the single scorers that it consists of."""
        return tuple(scorer for scorer, _ in self.weighted)

    def check_registered(self) -> None:
        """Raise UserError, with the nearest name, where a scorer is neither registered nor in a file."""
        registered = registry.entries("scorer")
        for scorer in self.scorers:
            if scorer.file is None and scorer.base not in registered:
                raise registry.unknown("scorer", scorer.base, registered)

    def at(self, by_name: Mapping[str, T]) -> T | None:
        """Look up this one scorer in `by_name`: under its whole name first, then under the name before the colon."""
        named = {registry.canonical("scorer", name): value for name, value in by_name.items()}
        return named.get(self.text) or named.get(self.base)


def _blend_terms(text: str) -> tuple[tuple[ScorerReference, float], ...]:
    terms: dict[ScorerReference, float] = {}
    at, more = 0, True
    while more:
        term = _TERM.match(text, at)
        if term is None or not term["name"]:
            raise UserError(
                f"cannot read the blend {text!r}; write NAME*WEIGHT+NAME*WEIGHT, e.g. pickscore*0.5+rapidocr"
            )
        weight = float(term["weight"] or 1)
        if not math.isfinite(weight) or weight == 0:
            raise UserError(
                f"the blend {text!r}: {term['name']} has the weight {term['weight']}; any other number will do"
            )
        scorer = ScorerReference.single(term["name"])
        if scorer in terms:
            raise UserError(f"the blend {text!r} names {scorer.text!r} twice; add the two weights")
        terms[scorer] = weight
        at, more = term.end(), term["end"] == "+"
    return tuple(terms.items())


def blend_name(weights: Iterable[tuple[str, float]]) -> str:
    """Format a blend as text: sorted by name, weights as short as possible, weight 1 omitted."""
    terms = [(f"({name})" if set(name) & set("+*") else name, weight) for name, weight in weights]
    return "+".join(
        name if weight == 1 else f"{name}*{repr(weight).removesuffix('.0')}" for name, weight in sorted(terms)
    )


def check_locations(references: Iterable[ScorerReference], locations: Iterable[str]) -> None:
    """Raise UserError where a location is of a scorer that none of the references names."""
    named = {name for reference in references for scorer in reference.scorers for name in (scorer.text, scorer.base)}
    for location in locations:
        if location not in named:
            raise UserError(
                f"--scorer-at says where {location!r} is served, but no --scorer names it: add --scorer {location}"
            )


# Locations


@dataclass(frozen=True)
class ScorerLocation:
    """Where a scorer runs: behind a URL, or in another Python that is started for it."""

    url: str = ""  # of several servers of the same scorer, replicas: URL,URL
    python: str = ""  # an interpreter that has gpobench[serve] and what the scorer needs
    token: str = ""  # of the server behind the URL
    timeout: float = 60.0  # seconds that one request may take

    def __post_init__(self) -> None:
        if bool(self.url) == bool(self.python):
            raise UserError(f"a scorer's location is either a url or a python; use {TABLE}")
        if len(set(self.urls)) < len(self.urls):
            raise UserError(f"a scorer's location names one server twice: {self.url}")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"a scorer's timeout is a number of seconds above 0, got {self.timeout}")

    @property
    def urls(self) -> tuple[str, ...]:
        """The URLs of the servers."""
        return tuple(url.strip() for url in _NEXT_URL.split(self.url))

    @classmethod
    def from_option(cls, option: str) -> tuple[str, ScorerLocation]:
        """Parse `NAME=URL` into the scorer's canonical name and its location."""
        match = _LOCATION.fullmatch(option)
        if match is None:
            raise UserError(f"--scorer-at {option!r} is no location; use {OPTION}")
        return registry.canonical("scorer", match["name"]), cls(url=match["url"], token=os.environ.get(TOKEN, ""))

    @classmethod
    def from_table(cls, name: str, table: Mapping[str, Any]) -> tuple[str, ScorerLocation]:
        """Parse a table `[scorer.NAME]` into the scorer's canonical name and its location."""
        where = f"[scorer.{name}]"
        kinds = {"url": str, "python": str, "token": str, "timeout": (int, float)}
        for key, value in table.items():
            if key not in kinds:
                raise registry.unknown(f"key of {where}", key, kinds)
            if not isinstance(value, kinds[key]) or isinstance(value, bool):
                raise UserError(f"{where}: {key} = {value!r} is of the wrong type; use {TABLE}")
        try:
            location = cls(**table)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if location.url and not location.token:
            location = replace(location, token=os.environ.get(TOKEN, ""))
        return registry.canonical("scorer", name), location


def scorer_locations(options: Iterable[str], tables: Mapping[str, Mapping[str, Any]]) -> dict[str, ScorerLocation]:
    """Map each scorer to its location, from `NAME=URL` options and `[scorer.NAME]` tables; an option overrides a table.

    A URL without a token gets the one in the environment variable GPOBENCH_SCORER_TOKEN, if there is one.
    Raises UserError on anything that is neither, and on a scorer with two locations.
    """
    from_tables: dict[str, ScorerLocation] = {}
    for written, table in tables.items():
        name, location = ScorerLocation.from_table(written, table)
        if name in from_tables:
            raise UserError(
                f"[scorer.{written}]: the scorer {name!r} has a location already; keep one of the two tables"
            )
        from_tables[name] = location
    from_options: dict[str, ScorerLocation] = {}
    for option in options:
        name, location = ScorerLocation.from_option(option)
        if name in from_options:
            raise UserError(f"--scorer-at {option!r}: the scorer {name!r} has a location already; name it once")
        from_options[name] = location
    return {**from_tables, **from_options}

"""Scorers wherever they live: made here, served over HTTP, run by another Python, or several blended into one.

A reference is `name`, `name:variant`, `path/to/file.py:Name`, or a blend of those, `pickscore*0.5+rapidocr`. Where a name lives
elsewhere, a `Place` says so: `--scorer NAME=URL`, or a table `[scorer.NAME]` of a TOML file. What asks for the name need not know.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..errors import UserError
from ..spec import Images, Prompt, Scorer, Scores, Values
from .remote import TOKEN, Remote, connect, start

OPTION = "--scorer NAME=URL, e.g. --scorer geneval=http://127.0.0.1:8100"
TABLE = '[scorer.NAME] with url = "http://..." or python = "/path/to/python", and token, timeout'
_WEIGHT = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[iI]nf|[nN]a[nN])"
_TERM = re.compile(rf"\s*(?P<name>[^*+]*?)\s*(?:\*\s*(?P<weight>{_WEIGHT})\s*)?(?P<end>\+|\Z)")


@dataclass(frozen=True)
class ScorerLocation:
    """Where a scorer lives: behind a URL, or in another Python that is started for it."""

    url: str = ""
    python: str = ""  # an interpreter that has gpobench[serve] and what the scorer needs
    token: str = ""  # of the server behind the URL
    timeout: float = 60.0  # seconds that one request may take

    def __post_init__(self) -> None:
        if bool(self.url) == bool(self.python):
            raise UserError(f"a scorer's place is either a url or a python; use {TABLE}")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"a scorer's timeout is a number of seconds above 0, got {self.timeout}")


def scorer_locations(options: Iterable[str], tables: Mapping[str, Mapping[str, Any]]) -> dict[str, ScorerLocation]:
    """Scorer -> where it lives, from `NAME=URL` options and `[scorer.NAME]` tables; an option wins over a table.

    A URL without a token gets the one in the environment variable GPOBENCH_SCORER_TOKEN, if there is one.
    Raises UserError on anything that is neither.
    """
    found: dict[str, ScorerLocation] = {}
    for name, table in tables.items():
        key = registry.canonical("scorer", name)
        if key in found:
            raise UserError(f"[scorer.{name}]: the scorer {key!r} has a place already; keep one of the two tables")
        found[key] = _from_table(name, table)
    told: set[str] = set()
    for option in options:
        match = re.fullmatch(r"\s*(.+?)\s*=\s*(https?://\S+?)\s*", option)
        if match is None:
            raise UserError(f"--scorer {option!r} names no place; use {OPTION}")
        key = registry.canonical("scorer", match[1])
        if key in told:
            raise UserError(f"--scorer {option!r}: the scorer {key!r} has a place already; name it once")
        told.add(key)
        found[key] = ScorerLocation(url=match[2], token=os.environ.get(TOKEN, ""))
    return found


def _from_table(name: str, table: Mapping[str, Any]) -> ScorerLocation:
    where = f"[scorer.{name}]"
    kinds = {"url": str, "python": str, "token": str, "timeout": (int, float)}
    for key, value in table.items():
        if key not in kinds:
            raise registry.unknown(f"key of {where}", key, kinds)
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise UserError(f"{where}: {key} = {value!r} is of the wrong type; use {TABLE}")
    try:
        place = ScorerLocation(**table)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return replace(place, token=os.environ.get(TOKEN, "")) if place.url and not place.token else place


# References


def parts(reference: str) -> tuple[tuple[str, float], ...]:
    """The references a reference is made of, with their weights; a plain one is itself with weight 1.

    Inside a blend a path may hold neither `+` nor `*`. Raises UserError on what cannot be read, a scorer said twice, and a
    weight that is 0 or not finite.
    """
    file, _, name = reference.strip().rpartition(":")
    if name.isidentifier() and file.endswith(".py") and Path(file).is_file():
        return ((reference.strip(), 1.0),)
    found: dict[str, float] = {}
    at, more = 0, True
    while more:
        term = _TERM.match(reference, at)
        if term is None or not term["name"]:
            raise UserError(
                f"cannot read the blend {reference!r}; write NAME*WEIGHT+NAME*WEIGHT, e.g. pickscore*0.5+rapidocr"
            )
        weight = float(term["weight"] or 1)
        if not math.isfinite(weight) or weight == 0:
            raise UserError(
                f"the blend {reference!r}: {term['name']} has the weight {term['weight']}; any other number will do"
            )
        name = registry.canonical("scorer", term["name"])
        if name in found:
            raise UserError(f"the blend {reference!r} names {name!r} twice; add the two weights")
        found[name] = weight
        at, more = term.end(), term["end"] == "+"
    return tuple(found.items())


def expression(terms: Iterable[tuple[str, float]]) -> str:
    """How a blend is written: sorted by name, weights as short as they can be, 1 left out."""
    said = [(f"({name})" if set(name) & set("+*") else name, weight) for name, weight in terms]
    return "+".join(name if weight == 1 else f"{name}*{_short(weight)}" for name, weight in sorted(said))


def _short(weight: float) -> str:
    return repr(weight).removesuffix(".0")


def open_scorer(reference: str, places: Mapping[str, ScorerLocation] | None = None) -> Scorer:
    """The scorer behind a reference, made here or found at its place.

    A place is looked up by the whole reference first, then by the name before the colon; aliases are one name. Raises UserError
    where there is no such scorer, or the server at its place is not there or serves another one; Missing where its engine is not
    installed.
    """
    known = {registry.canonical("scorer", name): place for name, place in (places or {}).items()}
    whole = registry.canonical("scorer", reference.strip())
    base = whole if ".py:" in whole else whole.partition(":")[0]
    place = known.get(whole) or known.get(base)
    if place is not None:
        return _open_at(place, whole)
    terms = parts(reference)
    if len(terms) == 1 and terms[0][1] == 1:
        only = terms[0][0]
        return registry.scorer(only) if only == whole else open_scorer(only, places)
    opened: list[tuple[Scorer, float]] = []
    try:
        for name, weight in terms:
            opened.append((open_scorer(name, places), weight))
        return Blend(opened)
    except BaseException:
        close_scorers([part for part, _ in opened])
        raise


def _open_at(place: ScorerLocation, reference: str) -> Remote:
    if place.python:
        return start(place.python, reference, timeout=place.timeout)
    remote = connect(place.url, token=place.token, timeout=place.timeout)
    served = registry.canonical("scorer", remote.reference)
    name = reference.partition(":")[0]
    if served and served != reference and name in registry.entries("scorer"):
        raise UserError(
            f"the server at {place.url} serves {served!r}, not {reference!r}; start it with: gpobench serve-scorer {reference}"
        )
    return remote


def close_scorers(scorers: Iterable[Scorer]) -> None:
    """End what was started for them: the processes of scorers in another Python."""
    for scorer in scorers:
        if isinstance(scorer, Blend):
            close_scorers([part for part, _ in scorer.parts])
        elif isinstance(scorer, Remote):
            scorer.close()


# Asking


class Blend:
    """A weighted sum of the first metrics of several scorers; one part that cannot score an image leaves it without a score."""

    def __init__(self, weighted: Iterable[tuple[Scorer, float]]) -> None:
        """UserError where two parts share a name, or a weight is 0 or not finite."""
        self.parts = sorted(weighted, key=lambda pair: pair[0].name)
        names = [part.name for part, _ in self.parts]
        twice = len(set(names)) < len(names)
        if twice or not names:
            raise UserError(f"a blend is of scorers of different names, got {', '.join(names) or 'none'}")
        for part, weight in self.parts:
            if not math.isfinite(weight) or weight == 0:
                raise UserError(f"a blend's weights are finite and not 0, got {weight} for {part.name}")
        self.name = expression((part.name, weight) for part, weight in self.parts)
        self.id = (
            "blend(" + ", ".join(f"{weight!r} * {id}" for id, weight in sorted((p.id, w) for p, w in self.parts)) + ")"
        )
        self.metrics: Sequence[str] = (
            "blend",
            *(f"{part.name}.{metric}" for part, _ in self.parts for metric in part.metrics),
        )

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """(B, H, W, 3) and B prompts -> blend (B,), and every metric of every part as `name.metric`."""
        total = np.zeros(len(images))
        value: dict[str, Values] = {}
        reasons: dict[int, list[str]] = {}
        notes: list[list[str]] = [[] for _ in range(len(images))]
        for part, weight in self.parts:
            said = ask(part, images, prompts)
            total += weight * said.value[part.metrics[0]]
            value |= {f"{part.name}.{metric}": said.value[metric] for metric in part.metrics}
            for row, why in said.reasons.items():
                reasons.setdefault(row, []).append(why if part.name in why else f"{part.name}: {why}")
            for row, note in enumerate(said.notes or ()):
                notes[row].append(f"{part.name}: {note}")
        joined = [" | ".join(row) for row in notes] if any(notes) else None
        return Scores({"blend": total, **value}, {row: "; ".join(whys) for row, whys in reasons.items()}, joined)


def ask(scorer: Scorer, images: Images, prompts: Sequence[Prompt]) -> Scores:
    """Ask a scorer; whatever it does wrong becomes NaN with a reason. Every metric of the answer is a fresh (B,) float64.

    A prompt that a scorer refuses costs the others of its batch nothing: they are asked again, each by itself.
    """
    try:
        return _checked(scorer, scorer(images, prompts), len(images))
    except UserError as error:
        if len(images) == 1:
            return _nothing(scorer, 1, error)
        return _joined(scorer, [ask(scorer, images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))])
    except (Exception, SystemExit) as error:  # a scorer is foreign code: nothing it does may end or falsify a run
        return _nothing(scorer, len(images), error)


def _nothing(scorer: Scorer, n: int, error: BaseException) -> Scores:
    nan = {metric: np.full(n, np.nan) for metric in scorer.metrics}
    return Scores(nan, dict.fromkeys(range(n), f"{scorer.name}: {_said(error)}"))


def _joined(scorer: Scorer, each: Sequence[Scores]) -> Scores:
    """The answers to single images as one."""
    value = {metric: np.concatenate([np.zeros(0), *(one.value[metric] for one in each)]) for metric in scorer.metrics}
    reasons = {row: why for row, one in enumerate(each) for why in one.reasons.values()}
    notes = [one.notes[0] if one.notes else "" for one in each]
    return Scores(value, reasons, notes if any(notes) else None)


def _said(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # even this is foreign code
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _checked(scorer: Scorer, scores: Any, n: int) -> Scores:
    """What a scorer returned, every NaN with a reason; raises ValueError when it is no such thing."""
    if not isinstance(scores, Scores):
        raise ValueError(f"returned {type(scores).__name__}, not Scores")
    value: dict[str, Values] = {}
    told: dict[Any, Any] = dict(scores.reasons)  # foreign code may say anything
    said = {int(row): "" if why is None else _text(why) for row, why in told.items()}
    reasons = {row: why for row, why in said.items() if why and 0 <= row < n}
    for metric in scorer.metrics:
        if metric not in scores.value:
            raise ValueError(f"returned no {metric!r}")
        column = _numbers(scores.value[metric], metric)
        if column.shape != (n,):
            raise ValueError(f"returned {metric} of shape {column.shape} for {n} images")
        for row in np.flatnonzero(~np.isfinite(column)):
            reasons.setdefault(int(row), f"{scorer.name}: returned {column[row]} for {metric}")
        column[~np.isfinite(column)] = np.nan
        value[metric] = column
    if scores.notes is not None and len(scores.notes) != n:
        raise ValueError(f"returned {len(scores.notes)} notes for {n} images")
    return Scores(value, reasons, None if scores.notes is None else [_text(note) for note in scores.notes])


def _text(said: Any) -> str:
    """As a table can hold it: a string, without half characters."""
    return str(said).encode("utf-8", "replace").decode()


def _numbers(values: Any, metric: str) -> Values:
    """A copy in float64. numpy would read "0.5" as a number and forget the imaginary part of another: neither is a score."""
    column = np.asarray(values)
    if column.dtype == object and all(value is None or isinstance(value, Real) for value in column.flat):
        return column.astype(np.float64)  # None becomes NaN
    if column.dtype.kind not in "fiub":
        raise ValueError(f"returned {column.dtype} for {metric}, not numbers")
    return column.astype(np.float64)

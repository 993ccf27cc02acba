"""What lies behind a table: curves over spend, parts of the prompt set, the prompts that fare worst, and the pictures."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bench.errors import UserError
from ..bench.stats import intervals
from ..bench.stats.curves import area, time_to_target
from ..bench.stats.intervals import Contrast, Estimate
from .board import BASE, Array, Board, BoardRow, LoadedRun

RESAMPLES = 2_000  # of bands and parts: nothing is ranked or tested by them
PARTS = 6  # groups of a length, at most
FEWEST = 5  # prompts that make a group worth naming
SHARP = 160  # pixels: pictures up to here are kept as they are, larger ones as JPEG
LONGEST = 320  # pixels: the longer side of a larger picture in a page
ROOM = 3_000_000  # bytes of pictures in a page
NUMBERS = {word: n for n, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)}


def groups(board: Board, runs: Sequence[LoadedRun]) -> dict[str, list[LoadedRun]]:
    """Label -> the runs of that row, in the order of the table; the base has none."""
    by = {str(r.folder): r for r in runs}
    return {row.label: [by[folder] for folder in row.folders] for row in board.rows}


# Curves


@dataclass(frozen=True)
class Curve:
    """Validation scores of one row over what had been spent, the mean over its seeds."""

    label: str
    spent: Mapping[str, Sequence[float]]  # currency -> (marks,)
    scores: Mapping[str, Sequence[Estimate]]  # scorer/metric -> (marks,)


def curve(label: str, runs: Sequence[LoadedRun], clock: str) -> Curve | None:
    """The curve of one row; None where a run kept none. clock: the currency at whose spends seeds are put side by side.

    One seed is shown at its own marks. Several are read, along straight lines, at as many evenly spaced spends of the clock
    as the one with fewest marks has, up to where the first of them ends; other currencies are the mean of what they had
    spent by then. Prompts without a score at some mark are left out.
    Raises UserError on a file that cannot be read.
    """
    looks = [_marks(run) for run in runs]
    if not looks or not all(looks):
        return None
    spends = [[point.spent for point in run.record.curve] for run in runs]
    times = [np.array([spent.get(clock, float(k)) for k, spent in enumerate(points)]) for points in spends]
    at = times[0]
    if len(runs) > 1:
        at = np.linspace(max(t[0] for t in times), min(t[-1] for t in times), min(map(len, times)))
    # (marks, at): the weights of straight lines between marks
    weights = [np.stack([np.interp(at, t, one) for one in np.eye(len(t))]) for t in times]
    names = [c for c in spends[0][0] if all(c in spent for points in spends for spent in points)]
    spent = {
        c: np.mean([np.array([s[c] for s in points]) @ w for points, w in zip(spends, weights, strict=True)], axis=0)
        for c in names
    }
    found = [look for look in looks if look]
    strata = found[0].strata if len(set(found[0].strata)) > 1 else None
    keys = [key for key in found[0].scores if all(key in look.scores for look in found)]
    tables = {key: [look.scores[key] @ w for look, w in zip(found, weights, strict=True)] for key in keys}
    asked = [Contrast([t[:, k] for t in tables[key]]) for key in keys for k in range(len(at))]
    told = iter(intervals.crossed(asked, resamples=RESAMPLES, strata=strata))
    return Curve(
        label, {c: [float(x) for x in xs] for c, xs in spent.items()}, {key: [next(told) for _ in at] for key in keys}
    )


@dataclass(frozen=True)
class Pace:
    """How fast rows get where, on validation prompts: gains over where the curve begins, prompt by prompt."""

    key: str
    clock: str
    target: float  # half the best gain at the end
    rows: Mapping[str, tuple[Estimate, Estimate]]  # label -> mean gain over the budget, what is spent until the target


def pace(
    curves: Sequence[Curve], rows: Mapping[str, Sequence[LoadedRun]], key: str, clock: str, bound: float
) -> Pace | None:
    """The area under each curve and what is spent until it stays above the target, by the rules of `stats.curves.area` and
    `stats.curves.time_to_target`; None where no row was looked at on the way. bound: of the budget, in units of the clock.
    """
    there = {c.label: c for c in curves if key in c.scores and clock in c.spent and len(c.scores[key]) > 2}
    if not there or not bound > 0:
        return None
    target = max(c.scores[key][-1].mean - c.scores[key][0].mean for c in there.values()) / 2
    if not target > 0:
        return None
    found: dict[str, tuple[Estimate, Estimate]] = {}
    for label in there:
        looks = [(_marks(run), [point.spent[clock] for point in run.record.curve]) for run in rows[label]]
        seeds = [(spent, look.scores[key] - look.scores[key][:, :1]) for look, spent in looks if look is not None]
        strata = next(list(look.strata) if len(set(look.strata)) > 1 else None for look, _ in looks if look is not None)
        over = area(seeds, bound, resamples=RESAMPLES, strata=strata)
        found[label] = (over, time_to_target(seeds, target, resamples=RESAMPLES, strata=strata))
    return Pace(key, clock, target, found)


@dataclass(frozen=True)
class _Look:
    scores: Mapping[str, Array]  # scorer/metric -> (prompts, marks)
    strata: Sequence[str]  # (prompts,)


def _marks(run: LoadedRun) -> _Look | None:
    path, marks = run.folder / "curve.parquet", len(run.record.curve)
    if not path.is_file() or not marks:
        return None
    table = _read(path)
    table = table[table.mark < marks]
    prompts = int(table.prompt.max()) + 1 if len(table) else 0
    if not prompts:
        return None
    key = table.scorer.astype(str) + "/" + table.metric.astype(str)
    scores: dict[str, Array] = {}
    for name, part in table.groupby(key, sort=False):
        means = part.groupby(["prompt", "mark"]).value.mean().unstack("mark")
        scores[str(name)] = means.reindex(index=range(prompts), columns=range(marks)).to_numpy(np.float64)
    strata = [""] * prompts
    if "stratum" in table:
        first = table.drop_duplicates("prompt")
        for prompt, stratum in zip(first.prompt, first.stratum, strict=True):
            strata[int(prompt)] = str(stratum)
    return _Look(scores, strata)


def _read(path: Path, columns: Sequence[str] | None = None) -> Any:
    import pandas as pd
    import pyarrow as pa

    try:
        return pd.read_parquet(path, columns=list(columns) if columns else None)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {(str(error).splitlines() or ['damaged'])[0]}") from None


# What was asked for


def texts(run: LoadedRun) -> list[str]:
    """The test prompts in order; their numbers where the run kept no texts."""
    import pyarrow.parquet as pq

    found = [f"prompt {k}" for k in range(len(run.strata))]
    path = run.folder / "scores.parquet"
    if "text" in pq.read_schema(path).names:
        table = _read(path, ["prompt", "text"]).drop_duplicates("prompt")
        for prompt, text in zip(table.prompt, table.text, strict=True):
            found[int(prompt)] = str(text)
    return found


@dataclass(frozen=True)
class Breakdown:
    """The table's key over the prompts of each part of the test set."""

    name: str
    parts: Sequence[str]
    prompts: Sequence[int]  # of each part
    cells: Mapping[str, Sequence[tuple[Estimate, Estimate | None]]]  # label -> a part's after, and after - before


def breakdowns(board: Board, rows: Mapping[str, Sequence[LoadedRun]], asked: Sequence[str]) -> list[Breakdown]:
    """By stratum, by the length of the text a prompt quotes and by the number it names, as far as prompts differ in them."""
    strata = next(run.strata for group in rows.values() for run in group)
    lengths = [max((len(said) for said in re.findall(r'"([^"]+)"', text)), default=None) for text in asked]
    found = {
        "By kind of prompt": [stratum or None for stratum in strata],
        "By letters in the quoted text": _ranges(lengths),
        "By the number named": [_named(text) for text in asked],
    }
    made = [_parts(name, labels, board, rows) for name, labels in found.items()]
    return [parts for parts in made if len(parts.parts) > 1]


def _named(text: str) -> str | None:
    """The first number word outside quotation marks."""
    outside = re.sub(r'"[^"]*"', " ", text.casefold())
    number = next((NUMBERS[word] for word in re.findall(r"[a-z]+", outside) if word in NUMBERS), None)
    return None if number is None else str(number)


def _ranges(lengths: Sequence[int | None]) -> list[str | None]:
    """Each length as it is, or, where there are many, as one of a few ranges that hold about as many prompts each."""
    known = sorted(n for n in lengths if n is not None)
    if len(set(known)) <= PARTS:
        return [None if n is None else str(n) for n in lengths]
    ends = sorted({known[min(len(known) - 1, (k + 1) * len(known) // PARTS)] for k in range(PARTS)})
    starts = [known[0], *(end + 1 for end in ends[:-1])]
    names = [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    return [None if n is None else names[int(np.searchsorted(ends, n))] for n in lengths]


def _parts(name: str, labels: Sequence[str | None], board: Board, rows: Mapping[str, Sequence[LoadedRun]]) -> Breakdown:
    count = {part: labels.count(part) for part in dict.fromkeys(labels) if part is not None}
    parts = sorted((part for part, n in count.items() if n >= FEWEST), key=_natural)
    cells: dict[str, list[tuple[Estimate, Estimate | None]]] = {}
    key, everything = board.key, [run for group in rows.values() for run in group if board.key in run.before]
    for part in parts if len(parts) > 1 else []:
        here = np.flatnonzero([label == part for label in labels])
        asked: dict[str, Contrast] = {}
        for label, group in rows.items():
            mine = [run for run in group if key in run.before and key in run.after]
            if label == BASE and not group:
                asked[f"after {label}"] = Contrast([everything[0].before[key][here]])
            elif mine:
                asked[f"after {label}"] = Contrast([run.after[key][here] for run in mine])
                asked[f"gain {label}"] = Contrast([(run.after[key] - run.before[key])[here] for run in mine])
        told = dict(zip(asked, intervals.crossed(list(asked.values()), resamples=RESAMPLES), strict=True))
        for label in rows:
            if f"after {label}" in told:
                cells.setdefault(label, []).append((told[f"after {label}"], told.get(f"gain {label}")))
    return Breakdown(name, parts, [count[part] for part in parts], cells)


def _natural(text: str) -> tuple[int, str]:
    number = re.match(r"\d+", text)
    return (int(number[0]) if number else 0, text)


@dataclass(frozen=True)
class Case:
    """One prompt and how it fared: means over seeds and images."""

    prompt: int
    before: float
    after: float
    images: int  # that could be scored after, of all seeds


def hardest(runs: Sequence[LoadedRun], key: str, count: int = 8) -> tuple[list[Case], list[Case]]:
    """The prompts with the lowest score after, and those that lost most; of equal ones, the larger loss first."""
    mine = [run for run in runs if key in run.before and key in run.after]
    if not mine:
        return [], []
    before = np.mean([intervals.per_prompt(run.before[key]) for run in mine], axis=0)
    every = np.concatenate([run.after[key] for run in mine], axis=1)
    after = intervals.per_prompt(every)
    images = np.isfinite(every).sum(1)
    cases = [
        Case(p, float(before[p]), float(after[p]), int(images[p]))
        for p in np.flatnonzero(np.isfinite(before) & np.isfinite(after)).tolist()
    ]
    loss: Callable[[Case], float] = lambda c: c.after - c.before
    lowest = sorted(cases, key=lambda c: (c.after, loss(c), c.prompt))[:count]
    return lowest, [c for c in sorted(cases, key=lambda c: (loss(c), c.after, c.prompt))[:count] if loss(c) < 0]


# Pictures


@dataclass(frozen=True)
class Frame:
    """One noise before and after, as places in an album's pictures; None: this run did not keep it."""

    before: int | None
    after: int | None
    scores: Mapping[str, tuple[float, float]]  # scorer/metric -> before and after
    notes: Mapping[str, tuple[str, str]]  # scorer -> what it saw before and after, or why it could not score


@dataclass(frozen=True)
class Album:
    """The same noise under every row."""

    pictures: Sequence[str]  # data URIs, equal ones once
    size: tuple[int, int]  # width and height as they were made
    noises: Sequence[tuple[int, int]]  # prompt and image
    frames: Mapping[str, Sequence[Frame]]  # label -> (noises,)
    seeds: Mapping[str, int]  # label -> the training seed shown


def album(rows: Mapping[str, Sequence[LoadedRun]], keys: Sequence[str], room: int = ROOM) -> Album | None:
    """The pictures that the first run of each row kept, of as many noises as fit into the room; None where none did.

    Raises UserError on pictures that cannot be read.
    """
    shown = {label: next((r for r in group if _kept(r).is_file()), None) for label, group in rows.items()}
    runs = {label: run for label, run in shown.items() if run is not None}
    kept = {label: _open(_kept(run)) for label, run in runs.items()}
    places = {
        label: {(int(p), int(o)): k for k, (p, o) in enumerate(zip(one["prompt"], one["ordinal"], strict=True))}
        for label, one in kept.items()
    }
    noises = list(next(iter(places.values()), {}))
    if not noises:
        return None
    pictures: dict[str, int] = {}
    found: list[dict[str, tuple[int | None, int | None]]] = []
    for noise in noises:
        mine: dict[str, tuple[int | None, int | None]] = {}
        fresh = dict(pictures)
        for label, place in places.items():
            at = place.get(noise)
            uris = ["" if at is None else _encode(kept[label][phase][at]) for phase in ("before", "after")]
            before, after = (fresh.setdefault(uri, len(fresh)) if uri else None for uri in uris)
            mine[label] = (before, after)
        if found and sum(map(len, fresh)) > room:
            break
        pictures = fresh
        found.append(mine)
    noises = noises[: len(found)]
    notes = {label: _notes(run, set(noises)) for label, run in runs.items()}
    frames = {
        label: [
            Frame(*mine[label], _scores(run, noise, keys), notes[label].get(noise, {}))
            for noise, mine in zip(noises, found, strict=True)
        ]
        for label, run in runs.items()
    }
    height, width = next(iter(kept.values()))["before"].shape[1:3]
    return Album(
        list(pictures), (width, height), noises, frames, {label: run.record.seed for label, run in runs.items()}
    )


def _kept(run: LoadedRun) -> Path:
    return run.folder / "samples" / "images.npz"


def _open(path: Path) -> dict[str, NDArray[Any]]:
    """before and after (K, H, W, 3) uint8, prompt and ordinal (K,)."""
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: np.asarray(file[name]) for name in ("before", "after", "prompt", "ordinal")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the pictures in {path}: {error}") from None
    images = [found["before"], found["after"]]
    if any(i.ndim != 4 or i.dtype != np.uint8 or i.shape != images[0].shape for i in images):
        raise UserError(f"cannot read the pictures in {path}: they are no images of bytes before and after")
    return found


def _encode(image: NDArray[Any]) -> str:
    """A data URI: PNG of a small picture, a reduced JPEG of a large one, of which a page would otherwise hold few."""
    from PIL import Image

    picture, out = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= SHARP:
        picture.save(out, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
    picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    picture.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _scores(run: LoadedRun, noise: tuple[int, int], keys: Sequence[str]) -> dict[str, tuple[float, float]]:
    there = [key for key in keys if key in run.before and key in run.after]
    return {key: (float(run.before[key][noise]), float(run.after[key][noise])) for key in there}


def _notes(run: LoadedRun, noises: set[tuple[int, int]]) -> dict[tuple[int, int], dict[str, tuple[str, str]]]:
    import pyarrow.parquet as pq

    path = run.folder / "scores.parquet"
    there = set(pq.read_schema(path).names)
    if "note" not in there:
        return {}
    table = _read(path, ["prompt", "ordinal", "scorer", "phase", "note", *(["reason"] if "reason" in there else [])])
    found: dict[tuple[int, int], dict[str, tuple[str, str]]] = {}
    table = table[table.prompt.isin({p for p, _ in noises})].drop_duplicates(["prompt", "ordinal", "scorer", "phase"])
    for line in table.to_dict("records"):
        noise = (int(line["prompt"]), int(line["ordinal"]))
        said = str(line.get("reason") or line["note"] or "")
        if noise in noises and said:
            both = found.setdefault(noise, {})
            before, after = both.get(str(line["scorer"]), ("", ""))
            both[str(line["scorer"])] = (said, after) if line["phase"] == "before" else (before, said)
    return found


# Two numbers of a row against each other


@dataclass(frozen=True)
class Measure:
    """One number of every row that a person may want much or little of."""

    name: str
    less: bool  # is better
    values: Mapping[str, Estimate]  # label -> the number


def measures(board: Board) -> list[Measure]:
    """The columns, the distance to the base and what was spent, each by row; the base spends nothing."""
    found = [
        Measure(f"{c.key} ({c.role})", c.role == "drift", {r.label: r.cells[c.key].after for r in board.rows if c.key in r.cells})
        for c in board.columns
    ]  # fmt: skip
    embedders = dict.fromkeys(name for r in board.rows for name in r.cmmd)
    found += [
        Measure(f"CMMD to the base ({name})", True, {r.label: r.cmmd[name] for r in board.rows if name in r.cmmd})
        for name in embedders
    ]
    currencies = dict.fromkeys(c for r in board.rows for c in r.spent)
    found += [Measure(f"spent: {c}", True, _spent(board.rows, c)) for c in currencies]
    return [m for m in found if m.values]


def _spent(rows: Sequence[BoardRow], currency: str) -> dict[str, Estimate]:
    # A mean over seeds, counted and not estimated: no interval.
    known = {r.label: 0.0 if r.kind == "base" else r.spent.get(currency) for r in rows}
    return {label: Estimate(x, x, x, 0) for label, x in known.items() if x is not None}

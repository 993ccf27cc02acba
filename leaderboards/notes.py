"""Writes the notes below a board: mandatory rows that are missing, uneven seeds, unchanged or invalid rows, scorers with gaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bench.evaluation import record
from ..bench.evaluation.ranking import MANDATORY_BASELINES
from ..bench.evaluation.transfer import UNIT_NOTE
from ..bench.evaluation.verification import REFUTED, read_statements, verification_line
from ..bench.files import read_json
from .board import BoardRow, Column
from .looks import look_notes
from .rows import runs_by_row
from .runs import LoadedRun


def notes_on(rows: Sequence[BoardRow], columns: Sequence[Column], key: str, runs: Sequence[LoadedRun]) -> list[str]:
    """Return the caveats on these rows that no cell shows."""
    methods = {r.method.partition(":")[0] for r in rows}
    notes: list[str] = []
    missing = sorted(name for name in MANDATORY_BASELINES if name not in methods)
    if missing:
        notes.append(f"Rows that every table should have and this one lacks: {', '.join(missing)}.")
    notes += look_notes(rows, runs, key)
    if any(row.transfer and row.transfer.unit == "sd" for row in rows):
        notes.append(UNIT_NOTE)
    notes += _verification_notes(rows, runs)
    notes += _seed_notes(rows) + _lending_notes(rows) + _row_notes(rows, runs) + _scorer_notes(rows, columns)
    role = next(c.role for c in columns if c.key == key)
    if role == "training" and "best-of-n" in methods:
        notes.append(
            f"best-of-n was selected by {key.partition('/')[0]} itself: its place in this ranking has no meaning."
        )
    machines = {str(r.record.provenance.get("machine", "")) for r in runs}
    if len(machines) > 1:
        notes.append(f"Seconds were measured on {len(machines)} machines and do not compare.")
    return notes


def key_notes(key: str, task_key: str) -> list[str]:
    """Return a note where a table is ranked by another score than the task's."""
    return [f"Ranked by {key}, which is not the task's key {task_key}."] if key != task_key else []


def _verification_notes(rows: Sequence[BoardRow], runs: Sequence[LoadedRun]) -> list[str]:
    """Return which runs did not hold when they were verified, and which statements are ignored."""
    notes: list[str] = []
    for label, group in runs_by_row(rows, runs).items():
        for run in group:
            for verified in map(read_statements, run.folders):
                if verified.level == REFUTED:
                    notes.append(f"{label}, seed {run.record.seed}. {verification_line(verified)}")
                if verified.note:
                    notes.append(f"{verified.note}.")
    return notes


def sequential_notes(paths: Sequence[Path]) -> list[str]:
    """Return a note on runs that `compare --until-told` added until pairs were told: p and ranks do not know that they were looked at.

    paths: folders of runs, run directories, or files of comparisons; the files about looks lie beside the run directories.
    """
    files: dict[Path, None] = {}
    for path in paths:
        folder = path.parent if (path / "record.json").is_file() else path
        places = [path] if path.suffix == ".json" else folder.glob("until-told-*.json")
        files |= dict.fromkeys(place.resolve() for place in places)
    notes: list[str] = []
    for file in files:
        try:
            contents = read_json(file)
            test = contents.get("sequential")
            names = {str(run["run"]) for run in contents["runs"]}
            named = any(
                path.suffix == ".json" or not (path / "record.json").is_file() or path.name in names for path in paths
            )
            if test and named:
                notes.append(_sequential_note(test))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            notes.append(
                f"{file.name} is not what `gpobench compare --until-told` writes; what it says of looks is left out."
            )
    return notes


def _sequential_note(test: Mapping[str, Any]) -> str:
    """Return the verdicts of a sequential test."""
    looks = len(test["looks"])
    state = lambda each: f"told at {each['told_at']} seeds" if each["told_at"] else "not told"
    verdicts = "; ".join(f"{':'.join(map(str, each['pair']))} {state(each)}" for each in test["pairs"])
    return (
        f"Sequential: seeds were added in {looks} look{'s' * (looks != 1)} until pairs were told, so the p and ranks of these rows, "
        "which are those of a fixed number of seeds, are too optimistic. By the rule for all looks (error "
        f"{100 * test['level']:g} %): {verdicts}."
    )


def _seed_notes(rows: Sequence[BoardRow]) -> list[str]:
    seeds = Counter(row.seeds for row in rows if row.kind != "base")
    if len(seeds) < 2:
        return []
    usual = seeds.most_common(1)[0][0]
    joined = lambda numbers: ", ".join(map(str, numbers))
    others = "; ".join(f"{r.label} {joined(r.seeds)}" for r in rows if r.kind != "base" and r.seeds != usual)
    return [f"Not all rows have the seeds {joined(usual)}: {others}."]


def _lending_notes(rows: Sequence[BoardRow]) -> list[str]:
    """Return what the intervals and ranks of the rows of one seed rest on."""
    texts = {
        "table": "the variance between their seeds is lent from the rows with several seeds.",
        "library": "the variance between their seeds is that of the shipped library, of the same method, task, model and budget.",
        "unknown": (
            "the variance between their seeds is unknown, so their intervals do not contain what another seed would change, and "
            "they are ranked neither above nor below another row."
        ),
    }
    labels = {source: [r.label for r in rows if r.single_seed and r.seed_source == source] for source in texts}
    return [f"One seed, {', '.join(labels[source])}: {text}" for source, text in texts.items() if labels[source]]


def _row_notes(rows: Sequence[BoardRow], runs: Sequence[LoadedRun]) -> list[str]:
    notes: list[str] = []
    by_row = runs_by_row(rows, runs)
    for row in rows:
        group = by_row[row.label]
        if group and all(
            np.array_equal(r.before[k], r.after[k], equal_nan=True) for r in group for k in r.after if k in r.before
        ):
            updates = row.spent.get("updates", 0)
            notes.append(
                f"{row.label} changed no score of any image; it made {updates:,.0f} updates within the budget."
            )
        if row.hack:
            notes.append(f"{row.label} has the hack flag: {'; '.join(row.hack)}.")
        if row.invalid:
            share = 100 * record.INVALID
            notes.append(f"{row.label}: more than {share:g} % of the images could not be scored, so it is not ranked.")
        if row.faults:
            notes.append(f"{row.label} ended by a fault, so it is not ranked: {'; '.join(row.faults)}.")
    return notes


def _scorer_notes(rows: Sequence[BoardRow], columns: Sequence[Column]) -> list[str]:
    notes: list[str] = []
    for scorer in dict.fromkeys(c.key.partition("/")[0] for c in columns):
        scored = [r for r in rows if any(key.partition("/")[0] == scorer for key in r.cells)]
        if len(scored) < len(rows):
            notes.append(f"{scorer} scored {len(scored)} of {len(rows)} rows: {', '.join(r.label for r in scored)}.")
    return notes

"""Test looks of a board's rows: how many settings of a method were evaluated on the test prompts, by the ledgers beside the runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.evaluation.look_ledger import (
    LookCount,
    count_looks,
    inflation_text,
    ledger_damage,
    look_text,
    read_ledger,
)
from .board import BoardRow
from .rows import runs_by_row
from .runs import LoadedRun


def row_looks(group: Sequence[LoadedRun]) -> LookCount | None:
    """Count the looks at the test prompts of these runs with their method; None where a run is in no ledger."""
    if not group or any(r.record.look is None or r.record.look.not_recorded for r in group):
        return None
    first = group[0].record
    folders = dict.fromkeys(folder.resolve().parent for r in group for folder in r.folders)
    count = count_looks(map(read_ledger, folders), first.prompts.get("test", ""), first.model, first.method)
    return count if count.looks else None


def look_notes(rows: Sequence[BoardRow], runs: Sequence[LoadedRun], key: str) -> list[str]:
    """Return the notes on test looks: counts, what the best of several settings shows by chance, and ledgers that were edited."""
    if any(r.record.config.get("evaluation", {}).get("split", "test") != "test" for r in runs):
        return []  # a table has runs of one split
    notes = [f"Test looks: {note}." for note in _damage_notes(runs)]
    counts = {label: (group[0], row_looks(group)) for label, group in runs_by_row(rows, runs).items() if group}
    by_method = {run.record.method: count for run, count in counts.values() if count}
    notes += [f"Test looks: {look_text(method, count)}" for method, count in by_method.items() if count.settings > 1]
    if single := [f"{method} {count.looks}" for method, count in by_method.items() if count.settings == 1]:
        notes.append(f"Test looks with one setting: {', '.join(single)}.")
    for row in rows:
        run, count = counts.get(row.label, (None, None))
        cell = row.cells.get(key)
        if run is None or count is None or cell is None or cell.delta is None:
            continue
        if count.settings <= int(run.record.config.get("studies", 1)):  # all of them are in the row
            continue
        lacking = " The spread of its seeds is unknown and not in that." if row.seed_source == "unknown" else ""
        notes.append(f"{row.label}:{inflation_text(count, cell.delta.se, key)}{lacking}")
    if uncounted := [label for label, (_, count) in counts.items() if count is None]:
        notes.append(f"Test looks are not counted, as no ledger has all of their runs: {', '.join(uncounted)}.")
    return notes


def _damage_notes(runs: Sequence[LoadedRun]) -> list[str]:
    """Return what is wrong with the ledgers beside these runs."""
    entries: dict[str, dict[str, str]] = {}
    for run in runs:
        look = run.record.look
        if look is not None and look.entry:
            entries.setdefault(str(run.folder.resolve().parent), {})[run.folder.name] = look.entry
    folders = dict.fromkeys(folder.resolve().parent for run in runs for folder in run.folders)
    return [text for folder in folders for text in ledger_damage(read_ledger(folder), entries.get(str(folder), {}))]

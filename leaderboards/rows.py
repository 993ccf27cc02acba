"""Rows of a board: groups runs by method and settings, and sums up a group's spend, flags and CMMD."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..bench import registry
from ..bench.errors import UserError
from ..bench.evaluation import record
from ..bench.evaluation.ranking import MANDATORY_BASELINES
from ..bench.evaluation.record import Record
from ..bench.evaluation.verification import lowest_level, read_statements
from .board import BASE, BoardRow
from .runs import Array, LoadedRun


def settings_of(r: Record) -> dict[str, Any]:
    """Return the part of a run's configuration that defines a row: neither the seed nor what all runs of a table share."""
    return {
        k: v
        for k, v in r.config.items()
        if k in ("settings", "adapter", "precision", "sampling_precision", "reward", "sources", "studies")
    }


def settings_text(r: Record) -> str:
    """Return method and settings as text: equal for two runs of one row."""
    return json.dumps([r.method, settings_of(r)], sort_keys=True)


def group_runs(runs: Sequence[LoadedRun]) -> dict[str, list[LoadedRun]]:
    """Map label to the runs of one method with one set of settings; a label names settings where a method has several rows."""
    by_method: dict[str, dict[str, list[LoadedRun]]] = {}
    for run in runs:
        by_method.setdefault(run.record.method, {}).setdefault(settings_text(run.record), []).append(run)
    groups: dict[str, list[LoadedRun]] = {}
    for method, by_settings in by_method.items():
        tables = [dict(_flat(settings_of(group[0].record))) for group in by_settings.values()]
        plain = [table for table in tables if "studies" not in table]  # a row over studies has several settings
        names = dict.fromkeys(name for table in plain for name in table)
        differing = [name for name in names if len({str(table.get(name)) for table in plain}) > 1]
        for table, group in zip(tables, by_settings.values(), strict=True):
            settings = ", ".join(f"{k.removeprefix('settings.')}={table.get(k, 'none')}" for k in differing)
            settings = f"{table['studies']} studies" if "studies" in table else settings
            # A method may have the same name as the row of the base.
            label = f"{method} ({settings})" if settings else f"{BASE} (method)" if method == BASE else method
            groups[label] = group
    return groups


def runs_by_row(rows: Sequence[BoardRow], runs: Sequence[LoadedRun]) -> dict[str, list[LoadedRun]]:
    """Map label to the runs of that row, in the order of the table; the base has none."""
    by_folder = {str(r.folder): r for r in runs}
    return {row.label: [by_folder[folder] for folder in row.folders] for row in rows}


def base_row(bases: Mapping[str, LoadedRun]) -> BoardRow:
    """Build the row of the base model. bases: scorer/metric -> the run whose scores of the base are shown."""
    invalid = _missing_share([{key: run.before[key]} for key, run in bases.items()]) > record.INVALID
    return BoardRow(BASE, BASE, "base", (), (), {}, {}, invalid=invalid)


def method_row(label: str, group: Sequence[LoadedRun]) -> BoardRow:
    """Build the row of one group of runs, without cells, rank and CMMD."""
    records = [r.record for r in group]
    currencies = dict.fromkeys(c for r in records for c in r.spent)
    method = records[0].method
    return BoardRow(
        label=label,
        method=method,
        kind="baseline" if method.partition(":")[0] in MANDATORY_BASELINES else "method",
        seeds=tuple(r.seed for r in records),
        folders=tuple(str(r.folder) for r in group),
        settings=settings_of(records[0]),
        cells={},
        spent={c: float(np.mean([r.spent[c] for r in records if c in r.spent])) for c in currencies},
        hacked=sum(r.flags.hack for r in records),
        invalid=any(r.flags.invalid for r in records)
        or _missing_share([scores for r in group for scores in (r.before, r.after)]) > record.INVALID,
        faults=tuple(dict.fromkeys(r.fault for r in records if r.fault)),
        trials=max(int(r.tuning.get("trials", 0)) for r in records),
        revisions=tuple(dict.fromkeys(str(r.provenance.get("revision", "")) for r in records)),
        verified=lowest_level(read_statements(folder).level for r in group for folder in r.folders),
    )


def find_row(rows: Sequence[BoardRow], name: str) -> BoardRow:
    """Find the row of this label, or the only row of this method. Raises UserError where there is none or several."""
    matching = [r for r in rows if r.label == name] or [r for r in rows if r.method == name]
    if not matching:
        raise registry.unknown("baseline", name, [r.label for r in rows])
    if len(matching) > 1:
        raise UserError(f"the baseline {name!r} has several rows, name one: {'; '.join(r.label for r in matching)}")
    return matching[0]


def _missing_share(evaluations: Sequence[Mapping[str, Array]]) -> float:
    """Return the largest share of images without a score, over scorers and metrics."""
    return max((float(np.isnan(scores).mean()) for by_key in evaluations for scores in by_key.values()), default=1.0)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{key}", value

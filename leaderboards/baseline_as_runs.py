"""Makes finished runs of a baseline's scores, so that its table and its gate can be computed without the runs themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bench.evaluation.record import Flags, Record, ScorerUse
from .baseline import Claim
from .board import BASE
from .regress import LoadedBaseline
from .runs import Array, LoadedRun


def runs_of_baseline(against: LoadedBaseline) -> list[LoadedRun]:
    """Return a run for each row and seed, without spend, flags and curves; the base's scores before, the row's after."""
    before = _scores(against, BASE, 0)
    strata = tuple(against.scores.strata or [""] * len(next(iter(before.values()))))
    return [
        LoadedRun(
            Path(f"{claim.label}-{seed}"),
            _record(against, claim, seed),
            before,
            _scores(against, claim.label, k),
            strata,
        )
        for claim in against.baseline.row
        for k, seed in enumerate(claim.seeds)
    ]


def _scores(against: LoadedBaseline, label: str, k: int) -> Mapping[str, Array]:
    return {key: seeds[k] for (row, key), seeds in against.scores.by.items() if row == label}


def _record(against: LoadedBaseline, claim: Claim, seed: int) -> Record:
    b = against.baseline
    uses = {
        name: ScorerUse(
            id=scorer_id, role="training" if name == b.training else "held-out", calls=0, seconds=0, errors=0
        )
        for name, scorer_id in b.scorers.items()
    }
    return Record(
        method=claim.method, task=b.task, model=b.model, seed=seed, stop="", before={}, after={}, delta={}, spent={}, run_dir="",
        flags=Flags(hack=False, invalid=False), scorers=uses, task_version=b.task_version, prompts=b.prompts, wall={},
        config={"budget": b.budget, "evaluation": b.evaluation, **_nested(claim.settings)},
        provenance={"weights": b.weights, "processor": b.processor, "machine": b.device, "versions": b.versions},
    )  # fmt: skip


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as nested tables: what `flat` undoes."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, name = key.split(".")
        table = nested
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    return nested

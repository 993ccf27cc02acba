"""Rows over tuning studies: the mean of each study's runs takes the place that a training seed has elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..bench.errors import UserError
from .rows import settings_text
from .runs import Array, LoadedRun

Study = tuple[str, int]  # the command of the tuning without its seed, and the seed


def by_study(runs: Sequence[LoadedRun]) -> tuple[list[LoadedRun], list[str]]:
    """Average the runs of each tuning study, where a method has several studies; other runs stay as they are.

    Returns:
        The runs, and notes that say which runs each study is made of.

    Raises:
        UserError: where no method has several studies, or the runs of one study have different settings.
    """
    tunings: dict[tuple[str, str], dict[int, list[LoadedRun]]] = {}
    rest: list[LoadedRun] = []
    for run in runs:
        study = _study(run)
        if study is None:
            rest.append(run)
        else:
            tunings.setdefault((run.record.method, study[0]), {}).setdefault(study[1], []).append(run)
    averaged: list[LoadedRun] = []
    notes: list[str] = []
    for (method, _), studies in tunings.items():
        if len(studies) < 2:
            rest += [run for group in studies.values() for run in group]
            continue
        averaged += [_mean_run(method, seed, group, len(studies)) for seed, group in sorted(studies.items())]
        parts = (f"study {seed}: {', '.join(r.folder.name for r in group)}" for seed, group in sorted(studies.items()))
        notes.append(
            f"{method} ({len(studies)} studies): a study stands where training seeds stand in other rows; {'; '.join(parts)}."
        )
    if not averaged:
        raise UserError(
            "--studies: no method here has runs of two tuning studies; make them with `gpobench tune --studies K`, then `gpobench run "
            "--config FOLDER/study-SEED/best.toml`"
        )
    return [*rest, *averaged], notes


def _study(run: LoadedRun) -> Study | None:
    """Return the study that chose a run's settings; None where they were not tuned."""
    try:
        words = shlex.split(str(run.record.tuning.get("command", "")))
        place = words.index("--seed")
        return shlex.join([*words[:place], *words[place + 2 :]]), int(words[place + 1])
    except (ValueError, IndexError):
        return None


def _mean_run(method: str, seed: int, group: Sequence[LoadedRun], studies: int) -> LoadedRun:
    """Return the mean of a study's runs over their training seeds, as one run whose seed is that of the study."""
    if len({settings_text(run.record) for run in group}) > 1:
        names = ", ".join(run.folder.name for run in group)
        raise UserError(f"the runs of study {seed} of {method} have different settings: {names}")
    first = next((run for run in group if run.record.flags.hack), group[0])
    records = [run.record for run in group]
    config = {**first.record.config, "settings": {}, "adapter": {}, "studies": studies}
    merged = first.record.model_copy(
        update={
            "seed": seed,
            "config": config,
            "cmmd": {},  # it has no value by prompt that could be averaged
            "fault": "; ".join(dict.fromkeys(r.fault for r in records if r.fault)),
            "flags": first.record.flags.model_copy(update={"invalid": any(r.flags.invalid for r in records)}),
            "spent": {c: float(np.mean([r.spent[c] for r in records if c in r.spent])) for c in first.record.spent},
        }
    )
    return replace(
        first,
        record=merged,
        before=_mean([run.before for run in group]),
        after=_mean([run.after for run in group]),
        averaged=tuple(run.folder for run in group),
    )


def _mean(scores: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return the mean of every image's scores by what all have; NaN where one is missing."""
    keys = [key for key in scores[0] if all(key in others for others in scores)]
    return {key: np.mean([by_key[key] for by_key in scores], axis=0) for key in keys}

"""Finished runs as data: finds run directories, reads each run's record and scores, and lists the runs that no table can hold."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..bench import registry
from ..bench.errors import UserError
from ..bench.evaluation import record
from ..bench.evaluation.record import Record
from ..bench.evaluation.run_scores import SCORES, read_scores
from ..bench.files import read_json

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LoadedRun:
    """A finished run: its record and the scores of every image."""

    folder: Path
    record: Record
    before: Mapping[str, Array]  # scorer/metric -> (prompts, images); NaN = could not be scored
    after: Mapping[str, Array]
    strata: tuple[str, ...]  # (prompts,)
    averaged: tuple[Path, ...] = ()  # the directories of the runs whose mean this is, where it is one

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the run directories behind it."""
        return self.averaged or (self.folder,)

    def has(self, key: str) -> bool:
        """Return whether both the base and the result have scores of this `scorer/metric`."""
        return key in self.before and key in self.after

    def gain(self, key: str) -> Array:
        """Return after minus before of one `scorer/metric` on the same noise, (prompts, images)."""
        return self.after[key] - self.before[key]


def strata_or_none(strata: Sequence[str]) -> list[str] | None:
    """Return the stratum of each prompt; None where all prompts are of one stratum."""
    return list(strata) if len(set(strata)) > 1 else None


def load_runs(paths: Sequence[Path], task: str | None = None) -> list[LoadedRun]:
    """Load the finished runs in these paths. Each path is a run directory, a folder of run directories, or a `compare` JSON file.

    A run that several paths name counts once. task: load only the runs of this task.
    Raises UserError where there is no run, where a run named itself is not finished, and on files that cannot be read.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in _folders_of_comparison(path) if path.suffix == ".json" else _run_folders(path):
            folders.setdefault(folder.resolve(), folder)
    runs = [_read_run(folder) for _, folder in sorted(folders.items())]
    tasks = dict.fromkeys(run.record.task for run in runs)
    if task is not None and task not in tasks:
        raise registry.unknown("task of these runs", task, tasks)
    return [run for run in runs if task in (None, run.record.task)]


def excluded_runs(paths: Sequence[Path], task: str | None = None) -> list[str]:
    """Return a note on the runs in these paths that no table can contain: failed runs, with the reason, and unfinished runs.

    Without it a method would silently be ranked by only those of its seeds that finished.
    """
    reasons: dict[Path, str] = {}
    for path in paths:
        if path.suffix == ".json":
            for run in _runs_of_comparison(path):
                if run["state"] != "done" and task in (None, run["task"]):
                    why = f": {run['reason'].rstrip('.')}" if run["reason"] else ""
                    name = f"{run['method']} on {run['task']} with seed {run['seed']}"
                    reasons[(path.parent / run["run"]).resolve()] = f"{name} ({run['state']}{why})"
        elif not (path / "record.json").is_file():
            for file in sorted(path.glob("*/config.toml")):
                if not (file.with_name("record.json")).is_file() and task in (None, _task_of_unfinished(file)):
                    reasons.setdefault(file.parent.resolve(), f"{file.parent.name} (not finished)")
    return [f"Not in this table: {'; '.join(reasons.values())}."] if reasons else []


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path} is no folder of runs")
    folders = [path] if (path / "record.json").is_file() else sorted(p.parent for p in path.glob("*/record.json"))
    if not folders:
        unfinished = (path / "config.toml").is_file()
        raise UserError(f"the run in {path} is not finished" if unfinished else f"no finished run in {path}")
    return folders


def _folders_of_comparison(path: Path) -> list[Path]:
    """Return the runs that a comparison finished; they are beside its file, also after that folder was moved."""
    names = [run["run"] for run in _runs_of_comparison(path) if run["state"] == "done"]
    if not names:
        raise UserError(f"none of the runs of {path} is done")
    return [folder for name in names for folder in _run_folders(path.parent / name)]


def _runs_of_comparison(path: Path) -> list[dict[str, str]]:
    """Return the runs that a comparison's file lists, each with its state."""
    words = ("method", "task", "seed", "reason")
    try:
        return [
            {"run": str(run["run"]), "state": str(run["state"])} | {word: str(run.get(word, "")) for word in words}
            for run in read_json(path)["runs"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not what `gpobench compare` writes about its runs") from None


def _task_of_unfinished(file: Path) -> str | None:
    """Return the task of a run that has only its configuration, from the command in the first line of that file."""
    try:
        words = shlex.split(file.read_text("utf-8").partition("\n")[0].lstrip("# "))
        return words[words.index("--task") + 1]
    except (OSError, ValueError, IndexError):
        return None


def _read_run(folder: Path) -> LoadedRun:
    loaded = record.read(folder / "record.json")
    if loaded.kind != "run":
        raise UserError(f"{folder} is no run but an {loaded.kind}: a table is made of runs")
    return LoadedRun(folder, loaded, *read_scores(record.verified(folder, loaded, SCORES)))

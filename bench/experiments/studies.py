"""Tuning studies: the same tuning with several seeds, so that the luck of one choice of settings shows."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import write_atomically
from ..progress import Progress
from .tune import Tuning, plan, tune, tuning_folder


def plan_studies(tuning: Tuning, studies: int) -> list[Tuning]:
    """Return the tuning of each study: draws and training from the seeds seed, seed + 1, and so on."""
    if studies < 1:
        raise UserError(f"--studies must be at least 1, got {studies}")
    return [replace(tuning, seed=tuning.seed + study) for study in range(studies)]


def tune_studies(
    tuning: Tuning,
    studies: int,
    *,
    out: Path,
    progress: Progress,
    jobs: int = 1,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run several independent studies and write studies.json, a summary of what they chose.

    Args:
        tuning: what to tune; its seed is that of the first study.
        studies: how many; each has a folder of its own with tuning.json and best.toml.
        out: the folder in which the tuning's own folder is made.
        progress: shows lines and the progress of runs.
        jobs: trials at once, within a study.
        interrupted: returns true when the tuning must stop.

    Returns:
        What studies.json holds.

    Raises:
        UserError: when no study finds settings that can be used.
        Interrupted: when asked to stop.
    """
    results: list[dict[str, Any]] = []
    failures: dict[int, str] = {}
    for study in plan_studies(tuning, studies):
        progress.message(f"study {study.seed} (of {tuning.seed} to {tuning.seed + studies - 1})")
        try:
            results.append(tune(study, out=out, progress=progress, jobs=jobs, interrupted=interrupted, is_study=True))
        except UserError as error:
            if not (tuning_folder(study, plan(study), out, is_study=True) / "tuning.json").is_file():
                raise  # no trial was run: the request is wrong, for every study
            failures[study.seed] = str(error)
            progress.message(f"study {study.seed} chose nothing: {error}")
    if not results:
        raise UserError(f"no study found settings that can be used: {next(iter(failures.values()))}")
    folder = Path(results[0]["folder"]).parent
    summary = _summary(tuning, studies, results, failures)
    text = json.dumps({**summary, "folder": str(folder)}, indent=1) + "\n"
    write_atomically(folder / "studies.json", lambda path: path.write_text(text, "utf-8"))
    return {**summary, "folder": str(folder)}


def _summary(
    tuning: Tuning, studies: int, results: Sequence[Mapping[str, Any]], failures: Mapping[int, str]
) -> dict[str, Any]:
    """What studies.json holds: the choice of each study, and the spread of the chosen settings' gains."""
    chosen = [_choice(result) for result in results]
    gains = np.array([choice["gain"]["mean"] for choice in chosen], np.float64)
    spread = float(gains.std(ddof=1)) if len(gains) > 1 else math.nan
    return {
        "kind": "tuning studies",
        "method": results[0]["method"],
        "task": tuning.task,
        "model": tuning.model,
        "objective": results[0]["objective"],
        "studies": chosen,
        "failed": {str(seed): why for seed, why in failures.items()},
        "gain": {"mean": float(gains.mean()), "sd_between_studies": spread if math.isfinite(spread) else None},
        "spent": {c: sum(result["spent"][c] for result in results) for c in results[0]["spent"]},
        "command": f"{tuning.command()} {shlex.join(['--studies', str(studies)])}",
    }


def _choice(result: Mapping[str, Any]) -> dict[str, Any]:
    """What one study chose: the trial, its settings, and its gain on validation prompts."""
    trial = next(trial for trial in result["trials"] if trial["trial"] == result["best"])
    return {
        "seed": result["seed"],
        "folder": result["folder"],
        "best": result["best"],
        "settings": trial["settings"],
        "gain": trial["gain"],
    }

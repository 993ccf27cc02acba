"""A finished run as a claim to verify: its record, its scores and its settings, resolved again on this machine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..assets.weight_store import weights_hash
from ..errors import UserError
from ..evaluation import record
from ..evaluation.estimates import Evaluation, differences, estimates
from ..evaluation.record import Record
from ..evaluation.splits import prompts_hash
from ..model_spec import ModelSpec
from ..spec import Search, Task
from .config import Config, RunRequest, resolve
from .context import open_task

ADAPTER = "adapter/pytorch_lora_weights.safetensors"
MEAN_TOLERANCE = 1e-6  # relative, of a mean that is computed again from the same scores


@dataclass(frozen=True)
class RunClaim:
    """What a finished run says, and all that is needed to try it again."""

    run_dir: Path
    record: Record
    record_hash: str  # sha256 of the record's content
    config: Config
    model_spec: ModelSpec
    task: Task
    before: Evaluation  # scores of the base as the run wrote them; no images
    after: Evaluation

    @property
    def searched(self) -> bool:
        """Return whether the run searched at inference and has no adapter."""
        return isinstance(self.config.settings, Search)

    def misstatements(self) -> list[str]:
        """Say which means of the record are not those of its scores."""
        made_again = {
            "before": estimates(self.before),
            "after": estimates(self.after),
            "difference": differences(self.before, self.after),
        }
        stated = {"before": self.record.before, "after": self.record.after, "difference": self.record.delta}
        wrong: list[str] = []
        for what, numbers in stated.items():
            for key, number in numbers.items():
                found = made_again[what].get(key, {}).get("mean")
                if not _same(number.mean, found):
                    wrong.append(f"{what} of {key} is {_text(number.mean)} and its scores have {_text(found)}")
        return wrong


def open_claim(run_dir: Path) -> RunClaim:
    """Read a finished run, check it against its checksums, and resolve its settings here.

    Raises:
        UserError: where the run is not finished or no result, a file does not match its checksum, or settings, task, prompts or weights
            are not here as the record names them.
    """
    if not (run_dir / record.RECORD).is_file():
        raise UserError(f"no finished run in {run_dir}")
    claimed = record.read(run_dir / record.RECORD)
    if claimed.kind != "run":
        raise UserError(f"{run_dir} is no run but an {claimed.kind}: there is nothing to verify")
    if why := record.disqualification(claimed):
        raise UserError(f"the run in {run_dir} {why}: it claims nothing that could be verified")
    present = [name for name in claimed.checksums if name.startswith("adapter/") or (run_dir / name).exists()]
    for name in dict.fromkeys(("scores.parquet", "config.toml", *present)):  # sample images may have been deleted
        record.verified(run_dir, claimed, name)
    config = _resolve(run_dir, claimed)
    model_spec, task = config.model_spec(), open_task(config)
    if not isinstance(config.settings, Search):
        record.verified(run_dir, claimed, ADAPTER)
    _check_inputs(run_dir, claimed, model_spec, task)
    before, after = read_scores(run_dir / "scores.parquet")
    return RunClaim(
        run_dir, claimed, record.content_hash(run_dir / record.RECORD), config, model_spec, task, before, after
    )


def _resolve(run_dir: Path, claimed: Record) -> Config:
    """Resolve the settings in config.toml. Raises UserError where they are not those of the record."""
    bounds = {name: bound for name, bound in claimed.config.get("budget", {}).items() if name != "name"}
    config = resolve(
        RunRequest(
            claimed.method,
            claimed.task,
            claimed.model,
            seed=claimed.seed,
            budget=",".join(f"{name}={bound!r}" for name, bound in bounds.items()) or None,
            reward=claimed.config.get("reward"),
            config=run_dir / "config.toml",
            prompts=_prompt_options(run_dir / "config.toml"),
        )
    )
    here, there = _flat(config.mapping()), _flat(claimed.config)
    for key in dict.fromkeys([*there, *here]):
        if here.get(key) != there.get(key) and key != "budget.name":
            raise UserError(
                f"{run_dir}: the record's {key} is {there.get(key, 'none')!r} and config.toml with the files of this machine makes it "
                f"{here.get(key, 'none')!r}"
            )
    return config


def _prompt_options(path: Path) -> list[str]:
    """The --prompts of the command in the first line of config.toml."""
    try:
        words = shlex.split(path.read_text("utf-8").partition("\n")[0].lstrip("# "))
    except ValueError:  # a name that cannot be printed
        return []
    return [words[k + 1] for k, word in enumerate(words[:-1]) if word == "--prompts"]


def _check_inputs(run_dir: Path, claimed: Record, model_spec: ModelSpec, task: Task) -> None:
    """Raise UserError where task, prompts or weights are others than the record names."""
    facts = {
        f"version of the task {claimed.task}": (claimed.task_version, task.version),
        f"weights of {claimed.model}": (str(claimed.provenance.get("weights", "")), weights_hash(model_spec)),
    }
    for split in ("train", "validation", "test"):
        facts[f"{split} prompts"] = (
            claimed.prompts.get(split, ""),
            prompts_hash(task.prompts(split, model_spec.domain)),
        )
    for what, (there, here) in facts.items():
        if there != here:
            named = (text[:16] or "none" for text in (there, here))
            raise UserError(f"{run_dir}: the {what}: {' in the record and '.join(named)} on this machine")


def read_scores(path: Path) -> tuple[Evaluation, Evaluation]:
    """Read the scores before and after. Raises UserError where the file is no table of scores."""
    nothing = np.zeros((0, 1, 1, 3), np.uint8)
    try:
        table = pd.read_parquet(path)
        before, after = (
            Evaluation(table.loc[table.phase == phase].drop(columns=["phase"]), nothing)
            for phase in ("before", "after")
        )
        if not len(before.table) or not len(after.table):
            raise ValueError("it lacks a phase")
        before.strata()
    except (ValueError, OSError, AttributeError, KeyError) as error:
        raise UserError(f"cannot read {path}: {(str(error).splitlines() or ['damaged'])[0]}") from None
    return before, after


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names, values as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(json.dumps(value))
    return flat


def _same(a: float | None, b: float | None) -> bool:
    """Return whether two means of the same scores are equal but for the order of summation; missing ones are."""
    missing = [x is None or x != x for x in (a, b)]
    if any(missing):
        return all(missing)
    assert a is not None and b is not None
    return abs(a - b) <= MEAN_TOLERANCE * max(1.0, abs(a), abs(b))


def _text(x: float | None) -> str:
    return "not scored" if x is None or x != x else f"{x:.4g}"

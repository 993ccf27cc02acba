"""Fetch: downloads the model, the prompts and the scorers' weights that a run needs, and checks every file's hash.

Which files a scorer needs is learnt by making it and giving it a blank image while a ledger notes the files it asks for, so no
list of files can go out of date. Hashes are locked at the first fetch: other bytes under the same commit, or at the same address,
are refused afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import registry
from ..assets import downloads, weight_store
from ..errors import Missing, UserError
from ..model_spec import ModelSpec, find_model_spec
from ..progress import Progress
from ..spec import Prompt, Task
from .bundle import export_bundle, install_bundle
from .inventory import check_hashes, take_inventory
from .needs import SPLITS, Need, needs_of_run, one_prompt_per_stratum, rehearse
from .pipeline import fetch_pipeline


@dataclass
class _FetchReport:
    """What could not be fetched: failures of needed things, and optional things that were left out."""

    failures: list[str] = field(default_factory=list[str])
    left_out: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def add(self, need: Need, reason: str) -> None:
        """Add a scorer or an embedder that could not be made."""
        if need.needed:
            self.failures.append(f"{need.kind} {need.name}: {reason}")
        else:
            self.left_out.append({"kind": need.kind, "name": need.name, "why": reason})


def fetch(
    task: str | None = None,
    model: str | None = None,
    *,
    to: Path | None = None,
    source: Path | None = None,
    progress: Progress,
    scorers: Sequence[str] = (),
) -> dict[str, Any]:
    """Download what runs of this task and model need and check every hash; with HF_HUB_OFFLINE, check what is here.

    A task that keeps its prompts in memory must be asked in a fresh process, because prompt files that it has read before
    are not noted again.

    Args:
        task: a task's name; its prompts and the weights of its scorers are fetched.
        model: a model's name; the files that diffusers loads are fetched.
        to: also copy everything into this folder, for a machine without a network.
        source: install a folder that `to` wrote, and fetch nothing.
        progress: shows phases and lines.
        scorers: further scorers by name.

    Returns:
        Repositories, prompt files, what was left out, bytes and seconds.

    Raises:
        UserError: with the whole list where something that a run needs cannot be had, and on a wrong hash.
    """
    if source is not None:
        if task or model or scorers or to:
            raise UserError("--from installs all that its folder holds: give it alone")
        return install_bundle(source, progress)
    if not (task or model or scorers):
        raise UserError("say what to fetch: --task, --model, --scorer, or --from FOLDER")
    start = time.monotonic()
    model_spec = find_model_spec(model) if model else None
    domain = model_spec.domain if model_spec else "open"
    task_object: Task | None = registry.task(task) if task else None
    with downloads.log_downloads() as requests, weight_store.allow_pickled():
        report = _fetch_all(task, task_object, model_spec, scorers, progress)
    inventory = take_inventory(requests)
    check_hashes(inventory, progress)
    if report.failures:
        failures = "; ".join(report.failures)
        raise UserError(f"{len(report.failures)} of the things that a run needs cannot be had, or fail: {failures}")
    request = {"task": task, "model": model, "domain": domain, "scorers": list(scorers)}
    if to is not None:
        export_bundle(inventory, to, request, progress)
    return {
        "task": task, "model": model, "domain": domain,
        "repositories": [repository.summary(name) for name, repository in sorted(inventory.repositories.items())],
        "prompts": [{"path": path, **file.facts} for path, file in sorted(inventory.prompts.items())],
        "left_out": report.left_out,
        "bytes": inventory.bytes,
        "lock": str(weight_store.store() / weight_store.LOCK),
        "to": str(to) if to else None,
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def _fetch_all(
    task_name: str | None,
    task: Task | None,
    model_spec: ModelSpec | None,
    scorers: Sequence[str],
    progress: Progress,
) -> _FetchReport:
    """Fetch the model, read the prompts and rehearse every scorer; all files asked for are noted in the ledger."""
    report = _FetchReport()
    domain = model_spec.domain if model_spec else "open"
    if model_spec is not None and not Path(model_spec.source).is_dir():
        try:
            fetch_pipeline(model_spec, progress)
        except Missing as missing:
            report.failures.append(f"model {model_spec.name}: {missing}")
    prompts: list[Prompt] = []
    if task is not None:
        try:
            for split in SPLITS:
                task.prompts(split, domain)
            prompts = one_prompt_per_stratum(task, domain)
        except UserError as error:
            report.failures.append(f"prompts of {task_name}: {error}")
    height, width = (model_spec.height, model_spec.width) if model_spec else (512, 512)
    for need in needs_of_run(task, domain, scorers):
        progress.phase(f"{need.kind} {need.name}", 1.0)
        try:
            rehearse(need, prompts, height, width)
        except weight_store.WrongHash:
            raise
        except UserError as error:
            report.add(need, str(error))
            if not need.needed:
                progress.message(f"left out, runs do without it: {need.name}: {error}")
        except Exception as error:  # foreign code may raise anything; its weights may be here all the same
            report.add(need, f"{type(error).__name__}: {error}")
        progress.advance(1.0)
    return report

"""Evaluation of a base model, or of a base with an adapter, outside of any run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import registry
from ..assets.prompts import own_prompt_notes, with_own_prompts
from ..assets.weight_store import weights_hash
from ..evaluation import plots, record
from ..evaluation.estimates import Evaluation, estimates, invalid, strata_of, task_summary
from ..evaluation.evaluator import evaluate, images_per_prompt
from ..evaluation.look_ledger import Look, record_look, setting_hash
from ..evaluation.record import LookEntry
from ..evaluation.request import EvaluationRequest
from ..evaluation.scorer_set import open_scorer_set
from ..evaluation.splits import prompts_hash
from ..files import content_digest, make_folder, utf_8_name, write_atomically
from ..model_spec import find_model_spec
from ..models.open import open_model
from ..progress import Progress
from ..scoring.scorers import ScorerLocation
from ..scoring.worker_setting import WorkerSetting
from ..spec import Prompt, Scorer, Split, Task
from .context import open_accelerator


@dataclass(frozen=True)
class ModelEvaluation:
    """Which model to evaluate, and on which prompts; the noise and the scorers are those of a run."""

    task: str
    model: str
    adapter: Path | None = None  # a LoRA folder; None evaluates the base
    split: Split = "test"
    images: int | None = None  # a prompt; None is the task's number
    prompts: Path | None = None  # the user's own prompts instead of the split's
    scorer_locations: Mapping[str, ScorerLocation] = field(default_factory=dict[str, ScorerLocation])
    runs: Path | None = None  # the folder of runs whose ledger counts a look that no run directory's folder counts


def evaluate_model(what: ModelEvaluation, progress: Progress, out: Path | None = None) -> dict[str, Any]:
    """Evaluate a base model, or a base with an adapter, on a task.

    out: a folder in which scores.parquet and samples.png are written. Returns scores with intervals, also by stratum, the
    ids of scorers and embedders, provenance, the ledger's line where an adapter was evaluated on test prompts, and as
    `not_written` why the files could not be written.
    """
    if out is not None:
        make_folder(out)
    model_spec, task = find_model_spec(what.model), registry.task(what.task)
    if what.prompts:
        task = with_own_prompts(task, {what.split: what.prompts}, model_spec.domain)
        for note in own_prompt_notes(task):
            progress.message(note)
    scorers = open_scorer_set(
        task, model_spec.domain, progress.message, locations=what.scorer_locations, workers=WorkerSetting.parse()
    )
    try:
        model = open_model(model_spec, device=open_accelerator(model_spec.precision).device)
        if what.adapter is not None:
            for note in model.load_adapter(what.adapter):
                progress.message(note)
        settings = task.evaluation(model_spec.domain)
        prompts = task.prompts(what.split, model_spec.domain)
        images = what.images or images_per_prompt(settings, what.split)
        request = EvaluationRequest(
            prompts,
            scorers.all,
            images=images,
            seed=settings.seed,
            rows=model_spec.rows,
            diversity=scorers.diversity,
        )
        look = _record_look(what, task, prompts) if what.split == "test" and what.adapter is not None else None
        if look is not None and look.not_recorded:
            progress.message(f"this look at the test prompts is counted nowhere: {look.not_recorded}")
        progress.phase(f"evaluating on {what.split}", len(prompts) * images)
        evaluation = evaluate(model, request, advance=progress.advance)
    finally:
        scorers.close()
    not_written = _write(out, evaluation, what.split, scorers.training) if out is not None else ""
    return {
        "task": what.task,
        "task_version": task.version,
        "model": what.model,
        "adapter": str(what.adapter) if what.adapter else None,
        "split": what.split,
        "images_a_prompt": images,
        "scores": estimates(evaluation),
        "strata": {stratum: estimates(evaluation.only(stratum)) for stratum in strata_of(evaluation)},
        "summary": task_summary(task, after=evaluation).get("after", {}),
        "embedders": scorers.embedders,
        "scorers": {s.name: {"id": s.id, "role": scorers.role(s)} for s in scorers.all},
        "prompts": prompts_hash(prompts),
        "look": look.model_dump() if look else None,
        "invalid": invalid(evaluation.table),
        "not_written": not_written,
        "provenance": record.provenance(weights=weights_hash(model_spec)),
    }


def _record_look(what: ModelEvaluation, task: Task, prompts: Sequence[Prompt]) -> LookEntry:
    """Count the evaluation of an adapter on test prompts in the ledger of its run's folder, else of `what.runs`."""
    assert what.adapter is not None
    content = content_digest(what.adapter)
    run_dir = next(
        (folder for folder in (what.adapter, what.adapter.parent) if (folder / record.RECORD).is_file()), None
    )
    made_by = record.read(run_dir / record.RECORD) if run_dir else None
    folder = run_dir.absolute().parent if run_dir else what.runs
    if folder is None or not folder.is_dir():
        return LookEntry(not_recorded="the adapter is of no run, and there is no folder of runs here")
    # The same adapter on the same prompts gives the same numbers: asked again it is no further look.
    facts = [content, prompts_hash(prompts), str(what.images), what.model]
    look = Look(
        token=hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32],
        task=task.name,
        version=task.version,
        prompts=prompts_hash(prompts),
        model=what.model,
        method=made_by.method if made_by else "adapter",
        settings=setting_hash(made_by.config) if made_by else content[:12],
        seed=made_by.seed if made_by else None,
        run=run_dir.name if run_dir else utf_8_name(str(what.adapter)),
        source="eval",
    )
    return record_look(folder, look)


def _write(out: Path, evaluation: Evaluation, split: Split, scorer: Scorer) -> str:
    """Write scores.parquet and samples.png; returns why they could not be written, or ""."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "scores.parquet", lambda path: evaluation.table.to_parquet(path, index=False))
        plots.samples([evaluation], [split], scorer).save(out / "samples.png")
    except OSError as error:
        return f"cannot write {out}: {error.strerror or error}"
    return ""

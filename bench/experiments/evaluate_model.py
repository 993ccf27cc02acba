"""Evaluation of a base model, or of a base with an adapter, outside of any run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import registry
from ..assets.prompts import own_prompt_notes, with_own_prompts
from ..assets.weight_store import weights_hash
from ..evaluation import plots, record
from ..evaluation.estimates import Evaluation, estimates, invalid, strata_of, task_summary
from ..evaluation.evaluator import evaluate, images_per_prompt
from ..evaluation.request import EvaluationRequest
from ..evaluation.scorer_set import open_scorer_set
from ..evaluation.splits import prompts_hash
from ..files import make_folder, write_atomically
from ..model_spec import find_model_spec
from ..models.open import open_model
from ..progress import Progress
from ..scoring.scorers import ScorerLocation
from ..spec import Scorer, Split
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


def evaluate_model(what: ModelEvaluation, progress: Progress, out: Path | None = None) -> dict[str, Any]:
    """Evaluate a base model, or a base with an adapter, on a task.

    out: a folder in which scores.parquet and samples.png are written. Returns scores with intervals, also by stratum, the
    ids of scorers and embedders, provenance, and as `not_written` why the files could not be written.
    """
    if out is not None:
        make_folder(out)
    model_spec, task = find_model_spec(what.model), registry.task(what.task)
    if what.prompts:
        task = with_own_prompts(task, {what.split: what.prompts}, model_spec.domain)
        for note in own_prompt_notes(task):
            progress.message(note)
    scorers = open_scorer_set(task, model_spec.domain, progress.message, locations=what.scorer_locations)
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
        "invalid": invalid(evaluation.table),
        "not_written": not_written,
        "provenance": record.provenance(weights=weights_hash(model_spec)),
    }


def _write(out: Path, evaluation: Evaluation, split: Split, scorer: Scorer) -> str:
    """Write scores.parquet and samples.png; returns why they could not be written, or ""."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "scores.parquet", lambda path: evaluation.table.to_parquet(path, index=False))
        plots.samples([evaluation], [split], scorer).save(out / "samples.png")
    except OSError as error:
        return f"cannot write {out}: {error.strerror or error}"
    return ""

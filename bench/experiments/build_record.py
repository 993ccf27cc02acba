"""The record of a finished run, built from its context, its stage and its evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..evaluation import record
from ..evaluation.estimates import (
    Evaluation,
    by_stratum,
    differences,
    estimates,
    invalid,
    task_summary,
    unscored_images,
)
from ..evaluation.record import Flags, FrontierPoint, Observed, ObservedCounts, Record, ScorerUse
from ..evaluation.scorer_set import ScorerSet
from ..evaluation.splits import prompts_hash
from ..evaluation.transfer import RunScores, Transfer, flag_keys, hack_reasons, transfers
from ..spec import nfe_of_an_image
from ..training.observation import (
    BACKWARDS,
    DECODED,
    FORWARDS,
    GRADIENT_DECODED,
    GRADIENT_FORWARDS,
    GRADIENT_SCORED,
    MISMATCH,
    SCORED,
    UPDATES,
    WEIGHTS,
    by_name,
    forward_equivalents,
)
from ..training.train import COLLAPSED, PLANNED
from .artifacts import RunResult
from .budgeted_stage import BudgetedStage
from .context import RunContext, sampling_precision

MOST = 0.5  # share of a scorer's images without a score above which the scorer counts as broken
FAILURES = 20  # reasons of scoring failures that a record keeps, the last ones


def build_record(context: RunContext, stage: BudgetedStage, result: RunResult) -> Record:
    """The record: settings, scores before and after, spend, flags and provenance."""
    config, scorers, meter = context.config, context.scorers, stage.meter
    before, after = result.before, result.after
    delta = differences(before, after)
    uses = _scorer_uses(scorers, stage, result)
    transferred = _transfers(scorers, uses, before, after)
    quality = scorers.quality_keys
    reasons = hack_reasons(transferred, {key: (delta[key]["mean"], delta[key]["p"]) for key in quality if key in delta})
    observed = _observed(context, stage)
    return Record(
        method=config.method,
        task=config.task,
        model=config.model,
        seed=config.seed,
        stop=result.stop,
        fault=_fault(scorers, stage, result, delta)
        if not observed.differences
        else f"{MISMATCH} {'; '.join(observed.differences[:3])}",
        before=estimates(before),  # type: ignore[arg-type]
        after=estimates(after),  # type: ignore[arg-type]
        delta=delta,  # type: ignore[arg-type]
        spent=meter.spent(),
        run_dir=str(context.launch.run_dir),
        nfe_by_role=dict(meter.roles),
        observed=observed,
        flags=Flags(
            hack=bool(reasons),
            reasons=list(reasons),
            invalid=invalid(before.table)
            or invalid(after.table)
            or meter.errors > record.INVALID * max(1, meter.reward_calls),
        ),
        scorers=uses,
        key=scorers.key,
        transfer={each.held_out: each.recorded() for each in transferred},
        curve=result.curve,  # type: ignore[arg-type]
        nfe_an_image=nfe_of_an_image(context.model),
        frontier=[
            FrontierPoint(
                candidates=point.candidates,
                nfe=point.nfe,
                delta=differences(before, point.evaluation),  # type: ignore[arg-type]
            )
            for point in result.frontier
        ],
        config=config.mapping(),
        task_version=context.task.version,
        prompts={
            split: prompts_hash(context.task.prompts(split, context.model_spec.domain))
            for split in ("train", "validation", "test")
        },
        failures=list(dict.fromkeys([*stage.rig.failures, *before.reasons(), *after.reasons()]))[-FAILURES:],
        strata=by_stratum(before, after),  # type: ignore[arg-type]
        summary=task_summary(context.task, before=before, after=after),
        embedders=scorers.embedders,
        cmmd=dict(result.cmmd),
        wall=context.timer.seconds,
        provenance=record.provenance(
            device=str(context.accelerator.device),
            dtype=config.precision,
            weights=context.launch.weights_hash,
            compiled=context.model_spec.compile is True,
            sampling_dtype=sampling_precision(context),
        ),
        checksums=context.files.checksums(),
        tuning=config.tuned,
    )


def _transfers(
    scorers: ScorerSet, uses: Mapping[str, ScorerUse], before: Evaluation, after: Evaluation
) -> tuple[Transfer, ...]:
    """The transfer ratios of this run, one a held-out scorer; that of the key first."""
    keys = flag_keys(uses, [key for key in after.keys() if key in before.keys()], scorers.key)
    if keys is None:
        return ()
    needed = [
        key
        for key in after.keys()
        if key.partition("/")[0] in (scorers.training.name, *(s.name for s in scorers.held_out))
    ]
    run = RunScores(*({key: evaluation.matrix(key) for key in needed} for evaluation in (before, after)))
    return transfers([[run]], keys, after.strata())[0]


def _observed(context: RunContext, stage: BudgetedStage) -> Observed:
    """What was computed, with every difference from what was charged and every change that nothing may make."""
    observation = stage.observe()
    context.observer.close()  # the code is compared as it was before the counters came
    differences = [*observation.differences, *context.seal.evidence()]
    return Observed(
        training=_observed_counts(observation.training),
        evaluation=_observed_counts(observation.evaluation),
        seconds=observation.seconds,
        differences=list(dict.fromkeys(differences)),
    )


def _observed_counts(counts: Mapping[str, int]) -> ObservedCounts:
    return ObservedCounts(
        nfe=forward_equivalents(counts),
        nfe_by_weights=by_name(counts, WEIGHTS),
        forwards=counts.get(FORWARDS, 0),
        gradient_forwards=counts.get(GRADIENT_FORWARDS, 0),
        backwards=counts.get(BACKWARDS, 0),
        images=counts.get(DECODED, 0),
        scored=by_name(counts, SCORED),
        gradient_images=counts.get(GRADIENT_DECODED, 0),
        gradient_scored=by_name(counts, GRADIENT_SCORED),
        updates=counts.get(UPDATES, 0),
    )


def _fault(scorers: ScorerSet, stage: BudgetedStage, result: RunResult, delta: Mapping[str, Mapping[str, Any]]) -> str:
    """What went wrong in the run, "" if nothing: training could not go on, or a scorer is broken.

    Rewards that become equal after the training scorer has risen are no fault: there was nothing left to learn.
    """
    low = delta.get(scorers.training_key, {}).get("ci", [None])[0]
    risen = low is not None and low > 0
    if not result.stop.startswith(PLANNED) and not (result.stop.startswith(COLLAPSED) and risen):
        return result.stop
    meter, training = stage.meter, scorers.training.name
    if meter.errors > MOST * max(1, meter.reward_calls):
        return f"{meter.errors:,} of {meter.reward_calls:,} images of training have no score by {training}"
    for scorer in (scorers.training, *scorers.held_out):
        for phase, evaluation in (("base", result.before), ("result", result.after)):
            missing, images = unscored_images(evaluation.table, scorer.name)
            if missing > MOST * images:
                return f"{missing:,} of {images:,} images of the {phase} have no score by {scorer.name}"
    return ""


def _scorer_uses(scorers: ScorerSet, stage: BudgetedStage, result: RunResult) -> dict[str, ScorerUse]:
    """How much training or search used each scorer, and how many images of the evaluations it left without a score."""
    tables = (result.before.table, result.after.table)
    unused = {"calls": 0, "seconds": 0.0, "errors": 0}
    uses = {scorer.name: stage.meter.scorers.get(scorer.name, unused) for scorer in scorers.all}
    return {
        scorer.name: ScorerUse(
            id=scorer.id,
            role=scorers.role(scorer),
            metrics=list(scorer.metrics),
            calls=int(uses[scorer.name]["calls"]),
            seconds=uses[scorer.name]["seconds"],
            errors=int(uses[scorer.name]["errors"]),
            backwards=stage.meter.reward_backwards[scorer.name],
            unscored=sum(unscored_images(table, scorer.name)[0] for table in tables),
        )
        for scorer in scorers.all
    }

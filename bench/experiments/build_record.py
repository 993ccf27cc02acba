"""The record of a finished run, built from its context, its stage and its evaluations."""

from __future__ import annotations

from ..evaluation import record
from ..evaluation.estimates import by_stratum, differences, estimates, invalid, task_summary
from ..evaluation.record import Flags, Record, ScorerUse
from ..evaluation.scorer_set import ScorerSet
from ..evaluation.splits import prompts_hash
from .artifacts import RunResult
from .budgeted_stage import BudgetedStage
from .context import RunContext

FAILURES = 20  # reasons of scoring failures that a record keeps, the last ones


def build_record(context: RunContext, stage: BudgetedStage, result: RunResult) -> Record:
    """The record: settings, scores before and after, spend, flags and provenance."""
    config, scorers, meter = context.config, context.scorers, stage.meter
    before, after = result.before, result.after
    delta = differences(before, after)
    return Record(
        method=config.method,
        task=config.task,
        model=config.model,
        seed=config.seed,
        stop=result.stop,
        before=estimates(before),  # type: ignore[arg-type]
        after=estimates(after),  # type: ignore[arg-type]
        delta=delta,  # type: ignore[arg-type]
        spent=meter.spent(),
        run_dir=str(context.launch.run_dir),
        nfe_by_role=dict(meter.roles),
        flags=Flags(
            hack=record.hacked(
                delta, scorers.training_key, [s.name for s in scorers.held_out], [s.name for s in scorers.quality]
            ),
            invalid=invalid(before.table)
            or invalid(after.table)
            or meter.errors > record.INVALID * max(1, meter.reward_calls),
        ),
        scorers=_scorer_uses(scorers, stage),
        curve=result.curve,  # type: ignore[arg-type]
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
            device=str(context.accelerator.device), dtype=config.precision, weights=context.launch.weights_hash
        ),
        tuning=config.tuned,
    )


def _scorer_uses(scorers: ScorerSet, stage: BudgetedStage) -> dict[str, ScorerUse]:
    """How much training or search used each scorer."""
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
        )
        for scorer in scorers.all
    }

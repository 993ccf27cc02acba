"""One run: evaluate the base, train or search under a budget, evaluate the result, write the record."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from .. import registry
from ..assets.weight_store import settings_hash, weights_hash
from ..evaluation import evaluation_cache, record
from ..evaluation.estimates import Evaluation, add_drift, check_base, cmmd_by_embedder, estimates
from ..evaluation.evaluator import Evaluator
from ..evaluation.look_ledger import Look, record_look, setting_hash
from ..evaluation.record import LookEntry, Record
from ..evaluation.scorer_set import ScorerSet
from ..evaluation.splits import prompts_hash
from ..files import make_folder
from ..model_spec import find_model_spec
from ..progress import NullProgress, Progress
from ..spec import Search
from .artifacts import FrontierEvaluation, RunFiles, RunResult
from .budgeted_stage import BudgetedStage
from .build_record import build_record
from .config import Config
from .context import Launch, RunContext, open_run, open_task, process_group
from .oom_advice import advise_on_oom
from .run_dir import (
    check_inputs,
    clear_run_dir,
    delete_unfinished,
    fingerprint,
    lock_run_dir,
    refuse_links,
    report_disk_errors,
)
from .run_readme import run_readme
from .searcher import Searcher
from .trainer import Trainer

BASES = ".bases"  # in the folder of runs: evaluations of the base that several runs share


def run(
    config: Config,
    *,
    runs: Path = Path("runs"),
    progress: Progress | None = None,
    fresh: bool = False,
    track: str | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Record:
    """Run a configuration, or continue where an earlier start of the same run was stopped.

    Args:
        config: the resolved settings; they name the run directory.
        runs: the folder of run directories.
        progress: where progress is shown; None shows none.
        fresh: delete what an earlier start of this run left.
        track: a tracker that accelerate knows (tensorboard, wandb ...); it is given the numbers of every iteration.
        interrupted: asked whether to stop.

    Raises:
        UserError: on what a user can correct.
        Interrupted: when asked to stop; the same call continues.
    """
    processes = process_group()
    launch = Launch(
        config, runs / config.slug(), runs / BASES, "", processes, progress or NullProgress(), track, interrupted
    )
    if not processes.is_main:
        return _follow(launch)
    run_dir = launch.run_dir
    with report_disk_errors(run_dir), advise_on_oom(config):
        config.refuse_changed_files()
        make_folder(run_dir)
        with lock_run_dir(run_dir) as check_run_dir:
            delete_unfinished(run_dir)
            if fresh:
                clear_run_dir(run_dir)
            refuse_links(run_dir)
            weights = _check_inputs(config, run_dir)
            launch = replace(launch, weights_hash=weights, check_run_dir=check_run_dir)
            complete = RunFiles(run_dir).record.is_file()
            processes.from_main(lambda: (complete, launch.weights_hash))
            if complete:
                return _read_complete(launch)
            processes.gather("every process has copied the run directory")
            return _complete(launch)


def _follow(launch: Launch) -> Record:
    """Do the run in another process than the first: from the same checkpoint, in a copy of the run directory that is deleted."""
    complete, weights = launch.processes.from_main(lambda: (False, ""))
    if complete:
        return record.read(RunFiles(launch.run_dir).record)
    with TemporaryDirectory(prefix="gpobench-") as folder:
        own_dir = Path(folder, launch.run_dir.name)
        shutil.copytree(launch.run_dir, own_dir, ignore=shutil.ignore_patterns(".lock", "samples", "adapter"))
        launch.processes.gather("every process has copied the run directory")
        return _complete(replace(launch, run_dir=own_dir, weights_hash=weights, progress=NullProgress(), track=None))


def _read_complete(launch: Launch) -> Record:
    """The record of a run that is complete, with the price of its settings where that became known since."""
    config, path = launch.config, RunFiles(launch.run_dir).record
    finished = record.read(path)
    for name in finished.checksums:
        if (launch.run_dir / name).is_file() or name == "scores.parquet":
            record.verified(launch.run_dir, finished, name)
    finished = finished.model_copy(update={"run_dir": str(launch.run_dir)})  # it may have been moved
    hint = (
        "; scores are missing in it: without its record.json only the last evaluation is made again"
        if finished.flags.invalid
        else ""
    )
    launch.progress.message(f"this run is already done: {launch.run_dir} (--fresh does it again{hint})")
    if config.tuned and finished.tuning != config.tuned:
        finished = finished.model_copy(update={"tuning": config.tuned})
        record.write(path, finished)
    return finished


def _complete(launch: Launch) -> Record:
    """Evaluate the base, spend the budget, evaluate the result, and write the files of the run."""
    with open_run(launch) as context:
        evaluator = context.evaluator()
        if context.processes.is_main:
            _check_scorers(launch.run_dir, context.scorers)
        with context.timer("evaluate"):
            before = evaluator.base(context.files.base_evaluation)
        check_base(before, context.progress.message)
        searching = isinstance(context.config.settings, Search)
        stage: BudgetedStage = (Searcher if searching else Trainer)(context, evaluator)
        stop = stage.run()
        look = _record_look(context)
        result = _evaluate_result(context, evaluator, stage, before, stop)
        launch.check_run_dir()
        _write_artifacts(context, stage, result)
        launch.check_run_dir()
        own_record = build_record(context, stage, result).model_copy(update={"look": look})
        finished = context.processes.from_main(lambda: own_record)  # one record, whichever process computed what
        context.files.write_record(finished, run_readme(finished, context.model_spec, stage.has_adapter))
        return finished


def _record_look(context: RunContext) -> LookEntry | None:
    """Count the evaluation of the result that follows in the ledger of test looks; None where it is not on test prompts."""
    if context.plan.on_validation or not context.processes.is_main:
        return None
    config = context.config
    look = record_look(
        context.launch.base_folder.parent,
        Look(
            token=context.files.own_look_token(),
            task=context.task.name,
            version=context.task.version,
            prompts=prompts_hash(context.plan.result),
            model=config.model,
            method=config.method,
            settings=setting_hash(config.mapping()),
            seed=config.seed,
            run=context.launch.run_dir.name,
            source="run",
        ),
    )
    if look.not_recorded:
        context.progress.message(f"this look at the test prompts is counted nowhere: {look.not_recorded}")
    return look


def _evaluate_result(
    context: RunContext, evaluator: Evaluator, stage: BudgetedStage, before: Evaluation, stop: str
) -> RunResult:
    """Evaluate the result and the last point of the curve, and compare with the base."""
    with context.timer("evaluate"):
        after = evaluator.result(stage.weights, stage.latents)
        last = evaluator.last_point(after, stage.weights, stage.validation_latents)
    scores = {key: number for key, number in estimates(last).items() if key in stage.curve[0]["scores"]}
    context.files.write_curve_point(len(stage.curve), last, stage.curve_hash)
    frontier = _evaluate_frontier(context, evaluator, stage, after)
    curve = [*stage.curve, {"spent": stage.meter.spent(), "scores": scores}]
    drift = context.scorers.drift
    cmmd = cmmd_by_embedder(before, after, [embedder.name for embedder in drift])
    before, after = add_drift(before, after, drift)
    return RunResult(stop, before, after, curve, cmmd, frontier)


def _evaluate_frontier(
    context: RunContext, evaluator: Evaluator, stage: BudgetedStage, result: Evaluation
) -> list[FrontierEvaluation]:
    """Evaluate what a search would have served after fewer candidates; its last point is the result."""
    if not stage.frontier:
        return []
    *on_the_way, last = stage.frontier
    with context.timer("evaluate"):
        points = [
            FrontierEvaluation(p.candidates, p.nfe, evaluator.served(p.latents, p.candidates)) for p in on_the_way
        ]
    shown = [scorer.name for scorer in context.scorers.curve]
    table = result.table.loc[result.table.scorer.isin(shown)]
    return [*points, FrontierEvaluation(last.candidates, last.nfe, replace(result, table=table))]


def _write_artifacts(context: RunContext, stage: BudgetedStage, result: RunResult) -> None:
    """Write the files of a finished run but its README and record.json, which names their checksums and comes last."""
    files, scorer = context.files, context.scorers.training
    if stage.has_adapter:
        context.model.save_adapter(files.adapter, stage.weights)
    files.write_scores(result.before, result.after)
    if result.frontier:
        files.write_frontier(result.frontier)
    files.write_samples(result.before, result.after, scorer)
    files.write_curve_plot(result.curve, scorer, currency=next(iter(stage.meter.budget.bounds())))


def _check_inputs(config: Config, run_dir: Path) -> str:
    """Raise UserError where model, task or pairs changed under the same name since the run began; returns the weights' hash."""
    model_spec, task = find_model_spec(config.model), open_task(config)
    weights = weights_hash(model_spec)
    inputs = {"task": f"{task.name} {task.version}", "weights": weights, "model_settings": settings_hash(model_spec)}
    pairs = getattr(config.settings, "pairs", "")
    if pairs and Path(pairs).is_dir():
        inputs["pairs"] = fingerprint(Path(pairs))
    descriptions = {
        "weights": f"the weights of {config.model}",
        "task": f"the task {config.task}",
        "model_settings": f"the configuration in the folder of {config.model}",
        "pairs": f"the data set {pairs}",
    }
    check_inputs(run_dir, inputs, descriptions)
    return weights


def _check_scorers(run_dir: Path, scorers: ScorerSet) -> None:
    """Raise UserError where a scorer changed under the same name since the run began."""
    parts = {part.name: part for part in (*scorers.all, *scorers.diversity, *scorers.drift)}
    inputs: dict[str, str] = {}
    for name, part in parts.items():
        third_party = type(part).__module__.startswith(registry.PLUGIN)
        inputs[f"scorer {name}"] = f"{part.id} {evaluation_cache.source(part) if third_party else ''}".strip()
    check_inputs(run_dir, inputs, {key: f"the {key}" for key in inputs})

"""Where the parts meet: one configuration in, a judged base, training or a search, a judged result and one record out."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .. import registry
from ..assets.prompts import with_own_prompts
from ..assets.weight_store import settings_hash, weights_hash
from ..budget import Meter
from ..errors import Interrupted, Missing, UserError
from ..evaluation import evaluation_cache, evaluator, plots, record
from ..evaluation.evaluator import Evaluation
from ..evaluation.record import Record
from ..evaluation.search import answers, search, share
from ..files import write_atomically
from ..model_spec import ModelSpec, find_model_spec
from ..models.open import open_model, usage
from ..process_group import ProcessGroup
from ..progress import NullProgress, Progress
from ..scoring.references import ScorerLocation, ScorerReference
from ..scoring.scorers import close_scorers, open_scorer
from ..spec import (
    Columns,
    Embedder,
    EvaluationSettings,
    Prompt,
    Scorer,
    Search,
    Split,
    SupportsColumns,
    SupportsSummary,
    Task,
    counted_guidance,
    fold_text,
)
from ..training import checkpoint
from ..training.pairs import open_pairs
from ..training.rig import Rig
from ..training.train import optimiser, train
from .config import Config
from .oom_advice import advise_on_oom
from .run_dir import check_inputs, clear_run_dir, fingerprint, lock_run_dir, report_disk_errors

SAVES = 10  # checkpoints in the course of a budget, beside those at the marks of the curve
BASES = ".bases"  # in the folder of runs: looks at the base that several runs have in common


@dataclass
class ScorerSet:
    """A task's scorers, made: the one that trains, those held out, further ones where they are installed."""

    training: Scorer
    held_out: list[Scorer]
    further: list[Scorer] = field(default_factory=list[Scorer])
    quality: list[Scorer] = field(default_factory=list[Scorer])
    spread: list[Embedder] = field(default_factory=list[Embedder])
    drift: list[Embedder] = field(default_factory=list[Embedder])

    @property
    def all(self) -> list[Scorer]:
        return [self.training, *self.held_out, *self.further, *self.quality]

    @property
    def embedders(self) -> dict[str, str]:
        """Name -> id."""
        return {e.name: e.id for e in (*self.spread, *self.drift)}

    def close(self) -> None:
        """End what was started for them."""
        close_scorers(self.all)

    @property
    def key(self) -> str:
        """The `scorer/metric` that methods are trained on."""
        return f"{self.training.name}/{self.training.metrics[0]}"

    def role(self, scorer: Scorer) -> Any:
        named = {"training": [self.training], "held-out": self.held_out, "further": self.further}
        return next((role for role, scorers in named.items() if scorer in scorers), "quality")


def open_scorer_set(
    task: Task,
    domain: str,
    say: Callable[[str], None],
    training: str = "",
    locations: Mapping[str, ScorerLocation] | None = None,
) -> ScorerSet:
    """Make the scorers a task names; a further one that is not installed is left out and said, a needed one is an error.

    training: the scorer to train on; when it is not the task's own, the task's own is held out. A part of a blend is trained
    on too, and holds nothing out. locations: where scorers run, if not in this process.
    """
    own = task.reward(domain)
    training = training or own
    named = lambda name: registry.canonical("scorer", name)
    trained = {scorer.text for scorer in ScorerReference.parse(training).scorers}
    held = [name for name in dict.fromkeys(map(named, (own, *task.held_out(domain)))) if name not in trained]
    if not held and training != own:
        raise UserError(
            f"--reward {training} trains on every scorer that the task {task.name} holds out: none is left to judge by"
        )
    made = ScorerSet(open_scorer(training, locations), [open_scorer(name, locations) for name in held])
    columns = task.columns(domain) if isinstance(task, SupportsColumns) else Columns()
    taken = {*trained, *held}

    absent: set[str] = set()  # an embedder may be wanted twice

    def add(names: Sequence[str], into: list[Any], make: Callable[[str], Any]) -> None:
        for name in dict.fromkeys(names):
            try:
                into.append(make(name))
            except Missing as missing:
                if name not in absent:
                    say(f"not judged by {name}: {missing}")
                absent.add(name)

    scorer = lambda name: open_scorer(name, locations)
    add([name for name in task.scorers(domain) if named(name) not in taken], made.further, scorer)
    taken |= set(map(named, task.scorers(domain)))
    add([name for name in columns.quality if named(name) not in taken], made.quality, scorer)
    embedder = cache(registry.embedder)  # most tasks name one for both
    add(columns.diversity, made.spread, embedder)
    add(columns.drift, made.drift, embedder)
    twice = [name for name, times in Counter(s.name for s in made.all).items() if times > 1]
    if twice:
        made.close()
        raise UserError(f"two scorers of this run are called {twice[0]!r}: a table could not tell them apart")
    return made


def run(
    config: Config,
    *,
    runs: Path,
    progress: Progress,
    fresh: bool = False,
    track: str | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Record:
    """Do what the configuration says, or go on where an earlier start of the same run was cut off.

    runs: the folder of run directories. fresh: forget what an earlier start of this run left.
    track: a tracker that accelerate knows (tensorboard, wandb ...), given the numbers of every iteration.
    Raises UserError on what a person can mend, Interrupted when asked to stop.
    """
    run_dir, processes = runs / config.slug(), _crew()
    if not processes.is_main:
        return _follow(config, run_dir, runs / BASES, processes, interrupted)
    with report_disk_errors(run_dir), advise_on_oom(config):
        config.unchanged()
        run_dir.mkdir(parents=True, exist_ok=True)
        with lock_run_dir(run_dir):
            for left in run_dir.rglob(".*.tmp"):  # of a start that was killed
                if left.is_file():
                    left.unlink(missing_ok=True)
            if fresh:
                clear_run_dir(run_dir)
            weights = _same_ground(config, run_dir)
            there = (run_dir / "record.json").is_file()
            processes.from_main(lambda: (there, weights))
            if there:
                done = record.read(run_dir / "record.json")
                again = (
                    "; scores are missing in it: without its record.json only the last look is made again"
                    if done.flags.invalid
                    else ""
                )
                progress.say(f"this run is already done: {run_dir} (--fresh does it again{again})")
                if config.tuned and done.tuning != config.tuned:  # the price of settings found only now, or found anew
                    done = done.model_copy(update={"tuning": config.tuned})
                    record.write(run_dir / "record.json", done)
                return done
            processes.gather("everybody has seen where the run stands")
            return _run(config, run_dir, runs / BASES, weights, progress, track, interrupted, processes)


def _crew() -> ProcessGroup:
    """The processes that `accelerate launch` or `torchrun` started for this run."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return ProcessGroup(state.process_index, state.num_processes)


def _follow(
    config: Config, run_dir: Path, bases: Path, processes: ProcessGroup, interrupted: Callable[[], bool]
) -> Record:
    """The same run in a further process: it goes on from the same checkpoint and writes into a folder that is thrown away."""
    there, weights = processes.from_main(lambda: (False, ""))  # what the first process says
    if there:
        return record.read(run_dir / "record.json")
    with TemporaryDirectory(prefix="gpobench-") as folder:
        own_home = Path(folder, run_dir.name)
        shutil.copytree(run_dir, own_home, ignore=shutil.ignore_patterns(".lock", "samples", "adapter"))
        processes.gather("everybody has seen where the run stands")
        return _run(config, own_home, bases, weights, NullProgress(), None, interrupted, processes)


def _run(
    config: Config,
    run_dir: Path,
    bases: Path,
    weights: str,
    progress: Progress,
    track: str | None,
    interrupted: Callable[[], bool],
    processes: ProcessGroup,
) -> Record:
    wall = _Wall()
    model_spec, task = config.model_spec(), task_of(config)
    with wall("load"):
        evaluator.refuse_overlap(task, model_spec.domain)
        judges = open_scorer_set(task, model_spec.domain, progress.say, config.reward, config.scorer_locations)
    try:
        with wall("load"):
            accelerator = _accelerator(config.precision, track, run_dir)
        try:
            return _judged_run(
                config,
                model_spec,
                task,
                run_dir,
                bases,
                weights,
                progress,
                accelerator,
                interrupted,
                processes,
                wall,
                judges,
            )
        finally:
            accelerator.end_training()  # the trackers', and the end of the talk between several processes
    finally:
        judges.close()


def _judged_run(
    config: Config,
    model_spec: ModelSpec,
    task: Task,
    run_dir: Path,
    bases: Path,
    weights: str,
    progress: Progress,
    accelerator: Any,
    interrupted: Callable[[], bool],
    processes: ProcessGroup,
    wall: _Wall,
    judges: ScorerSet,
) -> Record:
    with wall("load"):
        model = open_model(
            model_spec, device=accelerator.device, precision=config.precision, adapter=config.adapter, seed=config.seed
        )
        write_atomically(run_dir / "config.toml", lambda p: p.write_text(_toml(config), "utf-8"))
        _fits(config.settings, model)
    book, validation = task.prompts("train", model_spec.domain), task.prompts("validation", model_spec.domain)
    evaluation = config.evaluation
    # Settings are chosen on the validation split: then no test prompt is touched.
    exam = validation if evaluation.split == "validation" else task.prompts("test", model_spec.domain)
    each = evaluation.validation_images if evaluation.split == "validation" else evaluation.test_images

    def look(
        prompts: Sequence[Prompt],
        images: int,
        weights: str,
        scorers: Sequence[Scorer],
        advance: Callable[[int], None] = lambda _: None,
        found: Tensor | None = None,
        columns: bool = False,
    ) -> Evaluation:
        """found: the images' latents, where a search has them already. columns: diversity and drift too."""
        draw = None
        if found is not None:
            place = {one: k for k, one in enumerate(evaluator.image_indices(prompts, images))}
            draw = lambda _, part: found[[place[one] for one in part]].to(model.device)
        return evaluator.judge(
            model, prompts, scorers, images=images, seed=evaluation.seed, rows=model_spec.rows, weights=weights, advance=advance, draw=draw,
            spread=judges.spread if columns else (), drift=judges.drift if columns else (), processes=processes,
        )  # fmt: skip

    def base(prompts: Sequence[Prompt], images: int, scorers: Sequence[Scorer], columns: bool) -> Evaluation:
        """A look at the base, which the runs of one folder have in common."""
        place = bases / evaluation_cache.cache_key(
            model_spec, task, prompts, [*scorers, *(judges.spread if columns else ())], judges.drift if columns else (),
            images=images, seed=evaluation.seed, rows=model_spec.rows, precision=config.precision, weights=weights,
            device=str(accelerator.device),
        )  # fmt: skip
        return evaluation_cache.cached_evaluation(
            place,
            lambda: _watched(
                progress,
                "judging the base",
                len(prompts) * images,
                lambda advance: look(prompts, images, "ref", scorers, advance, columns=columns),
            ),
            judges.drift if columns else (),
            processes,
            progress.say,
        )

    if processes.is_main:
        _same_jury(run_dir, judges)
    with wall("judge"):
        before = evaluation_cache.cached_evaluation(
            run_dir / "before",
            lambda: base(exam, each, judges.all, columns=True),
            judges.drift,
            processes,
            progress.say,
        )

    meter = Meter(config.budget, flops_a_forward=model.flops_a_forward())
    method, searching = config.settings, isinstance(config.settings, Search)
    rig = Rig(
        model,
        exam if searching else book,
        judges.training,
        meter,
        seed=config.seed,
        rows=model_spec.rows,
        processes=processes,
    )
    rig.sealed = frozenset(
        fold_text(p.text) for s in ("validation", "test") for p in task.prompts(s, model_spec.domain)
    )
    # A search moves no weight; its checkpoints hold its answers, and an optimiser that never stepped.
    adam = torch.optim.AdamW(model.parameters()) if searching else optimiser(method, rig)
    found = checkpoint.restore(run_dir / "checkpoint", rig, adam, progress.say)
    facts: dict[str, Any] = found or {"mark": -1, "curve": []}
    # The gradient of a mean over a latent's elements is below what fp16 can hold; bf16 has the range of float32.
    scaler = torch.amp.GradScaler(model.device.type, enabled=config.precision == "fp16")
    if "scaler" in facts:
        scaler.load_state_dict(facts["scaler"])
    if found:
        where = f"image {len(answers(rig))}" if searching else f"update {meter.updates}"
        progress.say(f"going on from {where}, {100 * meter.fraction():.0f} % of the budget spent")
    _cut(run_dir / "metrics.jsonl", rig.iteration)

    def judged_by() -> str:
        """The averaged weights, once there are any."""
        return "ema" if "ema" in model.lora.copies else "policy"

    log, shown = _Log(run_dir / "metrics.jsonl"), [judges.training, *judges.held_out]
    saved = int(meter.fraction() * SAVES)

    def save() -> None:
        nonlocal saved
        saved = int(meter.fraction() * SAVES)
        if scaler.is_enabled():
            facts["scaler"] = scaler.state_dict()
        with wall("checkpoint"):
            checkpoint.save(run_dir / "checkpoint", rig.iteration, rig, adam, facts)

    def mark() -> None:
        with wall("judge"):
            seen = (
                base(validation, evaluation.curve_images, shown, columns=False)
                if facts["mark"] < 0
                else look(validation, evaluation.curve_images, judged_by(), shown)
            )
        _keep_mark(run_dir / "curve.parquet", len(facts["curve"]), seen)
        facts["curve"].append({"spent": meter.spent(), "scores": evaluator.estimates(seen)})
        facts["mark"] = int(meter.fraction() * evaluation.eval_points)
        save()

    def tell(done: float, numbers: dict[str, float]) -> None:
        numbers = {
            "iteration": rig.iteration,
            **numbers,
            **{f"spent/{k}": v for k, v in meter.spent().items()},
            "reward/errors": meter.errors,
        }
        log(numbers)
        accelerator.log(numbers, step=rig.iteration)
        progress.status(done, numbers)

    def after(numbers: dict[str, float]) -> None:
        tell(meter.fraction(), numbers)
        if int(meter.fraction() * evaluation.eval_points) > facts["mark"]:
            mark()
        elif int(meter.fraction() * SAVES) > saved or processes.any(interrupted()):
            save()

    def after_answers(done: float, numbers: dict[str, float]) -> None:
        tell(done, numbers)
        if int(done * SAVES) > facts["mark"] or interrupted():
            facts["mark"] = int(done * SAVES)
            save()

    try:
        if facts["mark"] < 0:
            mark()
        progress.phase("searching" if searching else "training", 1.0)
        seeds = {"noise_seed": evaluation.seed, "seed": config.seed}
        with wall("search" if searching else "train"):
            why = (
                search(method, rig, each, **seeds, after=after_answers, interrupted=interrupted)
                if searching
                else train(
                    method,
                    rig,
                    adam,
                    backward=accelerator.backward,
                    scaler=scaler,
                    after=after,
                    interrupted=interrupted,
                )
            )
        final = None  # the curve's last point
        if searching and exam is not validation and why != "interrupted":
            final = _off_budget(
                method, rig, validation, evaluation, len(exam) * each, config.seed, progress, interrupted
            )
    finally:
        rig.close()
        log.close()
    if why == "interrupted":
        where = f"image {len(answers(rig))}" if searching else f"update {meter.updates}"
        raise Interrupted(f"stopped after {where}; the same command goes on from there")
    if not searching and not meter.updates:
        progress.say(
            "no update was made: what follows is the base against itself (--dry-run tells what a budget affords)"
        )
    with wall("judge"):
        done = _watched(
            progress,
            "judging the result",
            len(exam) * each,
            lambda a: look(exam, each, judged_by(), judges.all, a, answers(rig) if searching else None, columns=True),
        )
        last = (
            Evaluation(done.table.loc[done.table.ordinal < evaluation.curve_images], done.images)
            if exam is validation
            else look(validation, evaluation.curve_images, judged_by(), shown, found=final)
        )
    scores = {key: number for key, number in evaluator.estimates(last).items() if key in facts["curve"][0]["scores"]}
    _keep_mark(run_dir / "curve.parquet", len(facts["curve"]), last)
    curve = [*facts["curve"], {"spent": meter.spent(), "scores": scores}]

    cmmd = evaluator.cmmd_by_embedder(before, done, [e.name for e in judges.drift])
    before, done = evaluator.add_drift(before, done, judges.drift)
    if not searching:
        model.save_adapter(run_dir / "adapter", judged_by())
    _scores(run_dir / "scores.parquet", before, done)
    _samples(run_dir, before, done, judges.training, curve, meter)
    delta = evaluator.differences(before, done)
    finished = Record(
        method=config.method,
        task=config.task,
        model=config.model,
        seed=config.seed,
        stop=why,
        before=evaluator.estimates(before),  # type: ignore[arg-type]
        after=evaluator.estimates(done),  # type: ignore[arg-type]
        delta=delta,  # type: ignore[arg-type]
        spent=meter.spent(),
        run_dir=str(run_dir),
        nfe_by_role=dict(meter.roles),
        flags=record.Flags(
            hack=record.hacked(delta, judges.key, [s.name for s in judges.held_out], [s.name for s in judges.quality]),
            invalid=evaluator.invalid(before.table)
            or evaluator.invalid(done.table)
            or meter.errors > record.INVALID * max(1, meter.reward_calls),
        ),
        scorers=_use(judges, meter),
        curve=curve,  # type: ignore[arg-type]
        config=config.mapping(),
        task_version=task.version,
        prompts={
            split: evaluator.prompts_hash(task.prompts(split, model_spec.domain))
            for split in ("train", "validation", "test")
        },
        failures=list(dict.fromkeys([*rig.failures, *before.reasons(), *done.reasons()]))[-20:],
        strata=evaluator.by_stratum(before, done),  # type: ignore[arg-type]
        summary=_summary(task, before=before, after=done),
        embedders=judges.embedders,
        cmmd=cmmd,  # type: ignore[arg-type]
        wall=wall.seconds,
        provenance=record.provenance(device=str(accelerator.device), dtype=config.precision, weights=weights),
        tuning=config.tuned,
    )
    write_atomically(run_dir / "README.md", lambda p: p.write_text(_card(finished, model_spec, not searching), "utf-8"))
    record.write(run_dir / "record.json", finished)  # last: its presence says that the run is whole
    return finished


def _fits(settings: Any, model: Any) -> None:
    """Say what cannot work with this model, or is not there, before minutes go into judging the base."""
    cost = getattr(type(settings), "cost", None)  # a method may do without; `gpobench check` asks for it
    if cost is not None:
        cost(settings, model.steps, counted_guidance(model))
    pairs = asdict(settings).get("pairs")
    if isinstance(pairs, str) and pairs:
        open_pairs(pairs)


def task_of(config: Config) -> Task:
    """The task of a configuration, with the person's own prompts where there are any."""
    task = registry.load("task", config.task)()
    return with_own_prompts(task, config.prompts, find_model_spec(config.model).domain) if config.prompts else task


def _summary(task: Task, **looks: Evaluation) -> Any:
    """Phase -> the task's own aggregates; NaN becomes null."""
    if not isinstance(task, SupportsSummary):
        return {}
    numbers = {phase: task.summary(look.table) for phase, look in looks.items()}
    return {phase: {k: v if math.isfinite(v) else None for k, v in ns.items()} for phase, ns in numbers.items()}


def _off_budget(
    method: Search,
    rig: Rig,
    validation: Sequence[Prompt],
    evaluation: EvaluationSettings,
    judged: int,
    seed: int,
    progress: Progress,
    interrupted: Callable[[], bool],
) -> Tensor:
    """What the same search finds for the validation prompts, with as much to spend on an image as it had: the curve's end."""
    images = evaluation.curve_images
    budget = share(rig.meter.budget, len(validation) * images, judged)
    meter = Meter(budget, flops_a_forward=rig.meter.flops_a_forward)
    other = Rig(rig.model, validation, rig.scorer, meter, seed=seed, rows=rig.rows)
    progress.phase("searching for validation prompts, off budget", len(validation) * images)
    try:
        why = search(
            method, other, images, noise_seed=evaluation.seed, seed=seed,
            after=lambda done, numbers: progress.advance(rig.rows), interrupted=interrupted,
        )  # fmt: skip
    finally:
        other.close()
    if why == "interrupted":
        raise Interrupted("stopped after the search; the same command goes on from there")
    return answers(other)


def evaluate_only(
    task_name: str,
    model_name: str,
    *,
    adapter: Path | None,
    images: int | None,
    split: Split,
    progress: Progress,
    out: Path | None = None,
    locations: Mapping[str, ScorerLocation] | None = None,
    prompts_file: Path | None = None,
) -> dict[str, Any]:
    """Judge a base, or a base with an adapter, on a task: the same prompts, noise and scorers as a run's.

    prompts_file: the person's own prompts instead of the split's.
    """
    model_spec, task = find_model_spec(model_name), registry.load("task", task_name)()
    task = with_own_prompts(task, {split: prompts_file}, model_spec.domain) if prompts_file else task
    judges = open_scorer_set(task, model_spec.domain, progress.say, locations=locations)
    try:
        model = open_model(model_spec, device=_accelerator(model_spec.precision).device)
        if adapter is not None:
            model.load_adapter(adapter)
        evaluation = task.evaluation(model_spec.domain)
        prompts = task.prompts(split, model_spec.domain)
        each = images or (evaluation.test_images if split == "test" else evaluation.validation_images)
        seen = _watched(
            progress,
            f"judging on {split}",
            len(prompts) * each,
            lambda a: evaluator.judge(
                model, prompts, judges.all, images=each, seed=evaluation.seed, rows=model_spec.rows, advance=a,
                spread=judges.spread,
            ),
        )  # fmt: skip
    finally:
        judges.close()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "scores.parquet", lambda p: seen.table.to_parquet(p, index=False))
        _sheet([seen], [split], judges.training).save(out / "samples.png")
    return {
        "task": task_name,
        "task_version": task.version,
        "model": model_name,
        "adapter": str(adapter) if adapter else None,
        "split": split,
        "images_a_prompt": each,
        "scores": evaluator.estimates(seen),
        "strata": {name: evaluator.estimates(seen.only(name)) for name in evaluator.strata_of(seen)},
        "summary": _summary(task, after=seen).get("after", {}),
        "embedders": judges.embedders,
        "scorers": {s.name: {"id": s.id, "role": judges.role(s)} for s in judges.all},
        "prompts": evaluator.prompts_hash(prompts),
        "invalid": evaluator.invalid(seen.table),
        "provenance": record.provenance(weights=weights_hash(model_spec)),
    }


class _Wall:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        began = time.perf_counter()
        inner = sum(self.seconds.values())
        try:
            yield
        finally:  # a phase inside another is not counted twice
            spent = time.perf_counter() - began - (sum(self.seconds.values()) - inner)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent


class _Log:
    """metrics.jsonl: one line an iteration."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, numbers: dict[str, float]) -> None:
        plain = {key: value if math.isfinite(value) else None for key, value in numbers.items()}  # JSON knows no NaN
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _accelerator(precision: str, track: str | None = None, run_dir: Path | None = None) -> Any:
    """The device and the trackers. The model casts by itself, so that differences and latents stay float32.

    On a GPU, kernels that add in a changing order are asked for their repeatable twins: the same command, the same bytes.
    """
    from accelerate import Accelerator

    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision fp16 needs a CUDA device: --set precision=bf16 or fp32")
    try:
        on_cpu = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", log_with=track, project_dir=run_dir)
    except ValueError as error:
        raise UserError(f"--track {track}: {error}") from None
    if accelerator.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrices are multiplied
        torch.use_deterministic_algorithms(True, warn_only=True)
    if track and not accelerator.log_with:  # accelerate leaves out in silence what is not installed
        raise Missing(f"the tracker {track!r} is not installed; tensorboard comes with: pip install 'gpobench[track]'")
    if track:
        accelerator.init_trackers("tracker")
    return accelerator


def _watched(
    progress: Progress, name: str, total: float, work: Callable[[Callable[[int], None]], Evaluation]
) -> Evaluation:
    progress.phase(name, total)
    return work(progress.advance)


def _same_ground(config: Config, run_dir: Path) -> str:
    """Refuse to go on, or to show a result, where what it stands on changed behind the same name: the model, the task, the pairs.

    Returns the hash of the weights.
    """
    model_spec, task = find_model_spec(config.model), task_of(config)
    weights = weights_hash(model_spec)
    now = {"task": f"{task.name} {task.version}", "weights": weights, "folder": settings_hash(model_spec)}
    pairs = getattr(config.settings, "pairs", "")
    if pairs and Path(pairs).is_dir():
        now["pairs"] = fingerprint(Path(pairs))
    names = {
        "weights": f"the weights of {config.model}",
        "task": f"the task {config.task}",
        "folder": f"the configuration in the folder of {config.model}",
        "pairs": f"the data set {pairs}",
    }
    check_inputs(run_dir, now, names)
    return weights


def _same_jury(run_dir: Path, judges: ScorerSet) -> None:
    """Refuse to go on where a scorer is another one under the same name; one that came or went is told of elsewhere."""
    own = lambda part: evaluation_cache.source(part) if type(part).__module__.startswith(registry.PLUGIN) else ""
    everyone = {part.name: part for part in (*judges.all, *judges.spread, *judges.drift)}
    now = {f"scorer {name}": f"{part.id} {own(part)}".strip() for name, part in everyone.items()}
    check_inputs(run_dir, now, {key: f"the {key}" for key in now})


def _cut(path: Path, iteration: int) -> None:
    """Drop the lines that were written after the checkpoint a run goes on from."""
    if path.is_file():
        kept: list[str] = []
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["iteration"] <= iteration:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a kill cut this line off
        write_atomically(path, lambda p: p.write_text("".join(line + "\n" for line in kept), "utf-8"))


def _scores(path: Path, before: Evaluation, after: Evaluation) -> None:
    table = pd.concat([before.table.assign(phase="before"), after.table.assign(phase="after")], ignore_index=True)
    write_atomically(path, lambda p: table.to_parquet(p, index=False))


def _keep_mark(path: Path, mark: int, seen: Evaluation) -> None:
    """Every validation score of one point of the curve, behind those of the points before it; later ones are of a start cut off."""
    new = seen.table.drop(columns=["text", "reason", "note"]).assign(mark=mark)
    try:
        old = pd.read_parquet(path) if mark and path.is_file() else None
    except (ValueError, OSError):  # damaged: the points themselves are in the checkpoint
        old = None
    table = new if old is None else pd.concat([old[old.mark < mark], new], ignore_index=True)
    write_atomically(path, lambda p: table.to_parquet(p, index=False))


def _samples(
    run_dir: Path, before: Evaluation, after: Evaluation, scorer: Scorer, curve: Sequence[dict[str, Any]], meter: Meter
) -> None:
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    for name, versions, titles in (
        ("before", [before], ["before"]),
        ("after", [after], ["after"]),
        ("pairs", [before, after], ["before", "after"]),
    ):
        _sheet(versions, titles, scorer).save(folder / f"{name}.png")
    rows = after.shown()
    prompt, ordinal = rows.prompt.to_numpy(), rows.ordinal.to_numpy()

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, before=before.images, after=after.images, prompt=prompt, ordinal=ordinal)

    write_atomically(folder / "images.npz", write)
    shown = (f"/{scorer.metrics[0]}", "/exact", "/correct")
    keys = [key for key in curve[0]["scores"] if key.endswith(shown)]
    plots.curve(run_dir / "curve.png", curve, keys, next(iter(meter.budget.bounds())))


def _sheet(versions: Sequence[Evaluation], titles: Sequence[str], scorer: Scorer) -> Any:
    count = min(len(v.images) for v in versions)
    yes = next((metric for metric in ("exact", "correct") if metric in scorer.metrics), None)  # right or wrong
    metric = yes or scorer.metrics[0]
    marks: list[list[bool | None]] = []
    for v in versions:
        mine: Any = v.table[(v.table.scorer == scorer.name) & (v.table.metric == metric)]
        values = v.shown(mine).value
        marks.append([bool(x == 1) if yes else None for x in values])
    images, notes = [v.images[:count] for v in versions], [v.notes(scorer.name) for v in versions]
    return plots.grid(images, notes, marks, titles, prompts=versions[0].texts())


def _use(judges: ScorerSet, meter: Meter) -> dict[str, record.ScorerUse]:
    nothing = {"calls": 0, "seconds": 0.0, "errors": 0}
    return {
        s.name: record.ScorerUse(
            id=s.id,
            role=judges.role(s),
            metrics=list(s.metrics),
            calls=int(meter.scorers.get(s.name, nothing)["calls"]),
            seconds=meter.scorers.get(s.name, nothing)["seconds"],
            errors=int(meter.scorers.get(s.name, nothing)["errors"]),
        )
        for s in judges.all
    }


def _literal(value: Any) -> str:
    """As TOML has it, which is JSON but for what is not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else json.dumps(value)


def _toml(config: Config) -> str:
    """The settings as a file that --config takes back."""
    mapping = config.mapping()
    budget = ",".join(f"{k}={v!r}" for k, v in config.budget.bounds().items())
    lines = [
        f"# gpobench run --method {config.method} --task {config.task} --model {config.model} "
        f"--reward {config.reward} --seed {config.seed} --budget {budget} --config config.toml"
    ]
    tables = {
        "": {**mapping["settings"], "precision": config.precision, **config.execution},
        "adapter": mapping["adapter"],
        "evaluation": mapping["evaluation"],
    }
    if config.tuned:
        tables["tuned"] = {**config.tuned, **config.tuned["spent"], "spent": None}
    tables |= {key: tables[""].pop(key) for key in [k for k, v in tables[""].items() if isinstance(v, dict)]}
    for name, table in tables.items():
        lines += ["", f"[{name}]"] if name else [""]
        lines += [f"{key} = {_literal(value)}" for key, value in table.items() if value is not None]
    return "\n".join(lines) + "\n"


def _card(r: Record, model_spec: ModelSpec, adapter: bool) -> str:
    """The run's README: what it is, what it did, how to use the adapter, if there is one."""
    rows = [
        f"| {key} | {_show(r.before[key])} | {_show(r.after[key])} | {_show(d)} | {d.p if d.p is None else f'{d.p:.4f}'} |"
        for key, d in r.delta.items()
    ]
    spent = ", ".join(f"{k} {v:,.0f}" for k, v in r.spent.items())
    trained = f"a LoRA for {r.model}" if adapter else f"{r.model} as it is"
    done = "Trained" if adapter else "Searched for, without training,"
    chosen = "" if adapter else " The training scorer chose the images, so only the held-out ones say what was gained."
    use = [
        "```python",
        *usage(model_spec),
        "```",
    ]
    tuning = f" Its settings were chosen in {r.tuning['trials']} trials, which are not in that." if r.tuning else ""
    return "\n".join(
        [
            f"# {r.method} on {r.task}, {trained}",
            "",
            f"{done} by gpobench with seed {r.seed}; ended by {r.stop}. Spent: {spent}.{tuning}",
            "",
            "| scorer/metric | before | after | difference | p |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Means over {r.config['evaluation']['split']} prompts with 95 % intervals (clustered bootstrap); "
            "differences are paired by prompt on the same noise.",
            f"One training seed: the interval does not cover what another seed would change.{chosen}",
            "",
            *([*use, ""] if adapter else []),
        ]
    )


def _show(n: record.Number) -> str:
    if n.mean is None or n.ci[0] is None or n.ci[1] is None:
        return "not scored"
    return f"{n.mean:.3f} [{n.ci[0]:.3f}, {n.ci[1]:.3f}]"

"""What a run works with: its settings, model, scorers, files and processes, opened once and closed together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..assets.prompts import own_prompt_notes, with_own_prompts
from ..budget import nothing_uncharged
from ..errors import Missing, UserError
from ..evaluation.evaluation_cache import RunConditions
from ..evaluation.evaluator import EvaluationPlan, Evaluator
from ..evaluation.scorer_set import ScorerSet, open_scorer_set
from ..evaluation.splits import refuse_overlap
from ..model_spec import ModelSpec, find_model_spec
from ..models.base import PipelineModel
from ..models.compiling import seconds_compiling
from ..models.open import open_model
from ..process_group import ProcessGroup
from ..progress import Progress
from ..scoring.differentiable import require_gradient
from ..scoring.scorers import parts_behind
from ..spec import Model, Prompt, SupportsRewardGradient, Task, counted_guidance
from ..training.observation import Observer
from ..training.pairs import open_pairs
from ..training.several_rewards import check_aggregation
from ..training.tampering import Seal
from .artifacts import RunFiles
from .compile_choice import choose_compiling
from .config import Config


class PhaseTimer:
    """Wall-clock seconds by phase; a phase inside another one is not counted twice. Compiling is a phase of its own."""

    def __init__(self, compiling: Callable[[], float] = nothing_uncharged) -> None:
        """Start at zero. compiling: the seconds so far in which torch compiled."""
        self.seconds: dict[str, float] = {}
        self._compiling, self._compiling_before = compiling, compiling()

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        """Time the block as a part of a phase."""
        self._count_compiling()
        start, counted = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            self._count_compiling()
            inner = sum(self.seconds.values()) - counted
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start - inner

    def _count_compiling(self) -> None:
        """Add the seconds in which torch compiled since the last call."""
        if more := self._compiling() - self._compiling_before:
            self.seconds["compile"] = self.seconds.get("compile", 0.0) + more
            self._compiling_before += more


@dataclass(frozen=True)
class Launch:
    """One start of a run in one process."""

    config: Config
    run_dir: Path
    base_folder: Path  # evaluations of the base that the runs of one folder share
    weights_hash: str  # of the model's files
    processes: ProcessGroup
    progress: Progress
    track: str | None  # a tracker of accelerate's
    interrupted: Callable[[], bool]
    check_run_dir: Callable[[], None] = lambda: None  # raises UserError where the run directory was removed


@dataclass(frozen=True)
class RunContext:
    """An opened run: all that training, search, evaluation and the record need."""

    launch: Launch
    model_spec: ModelSpec
    task: Task
    model: Model
    scorers: ScorerSet
    accelerator: Any  # accelerate's: the device, the backward pass and the trackers
    train_prompts: Sequence[Prompt]
    plan: EvaluationPlan
    timer: PhaseTimer
    observer: Observer  # counts what is computed, from beside the rig
    seal: Seal  # knows the code and the prompts of the start
    uncharged: Callable[[], float]  # seconds so far in which torch compiled the network

    @property
    def config(self) -> Config:
        """The resolved settings."""
        return self.launch.config

    @property
    def files(self) -> RunFiles:
        """The files of the run directory."""
        return RunFiles(self.launch.run_dir)

    @property
    def processes(self) -> ProcessGroup:
        """The processes that share the run."""
        return self.launch.processes

    @property
    def progress(self) -> Progress:
        """Where progress is shown."""
        return self.launch.progress

    @property
    def interrupted(self) -> Callable[[], bool]:
        """Whether the run was asked to stop."""
        return self.launch.interrupted

    def evaluator(self) -> Evaluator:
        """The evaluator of this run's model."""
        conditions = RunConditions(
            self.model_spec,
            self.task,
            self.config.precision,
            self.launch.weights_hash,
            str(self.accelerator.device),
        )
        return Evaluator(
            self.model, self.scorers, self.plan, self.launch.base_folder, conditions, self.processes, self.progress
        )


def sampling_precision(context: RunContext) -> str:
    """The precision in which steps without a density are computed in training; evaluations are in that of the base weights."""
    in_bf16 = isinstance(context.model, PipelineModel) and context.model.samples_in_bf16
    return "bf16" if in_bf16 else context.config.precision


@contextmanager
def open_run(launch: Launch) -> Generator[RunContext]:
    """Open task, scorers, device and model of a run; scorers and trackers are closed at the end of the block.

    Raises UserError where settings, scorers or model do not fit, Missing where a part is not installed.
    """
    config, timer = launch.config, PhaseTimer(seconds_compiling)
    model_spec, task = config.model_spec(), open_task(config)
    with ExitStack() as stack:
        with timer("load"):
            for note in own_prompt_notes(task):
                launch.progress.message(note)
            refuse_overlap(task, model_spec.domain)
            scorers = open_scorer_set(
                task,
                model_spec.domain,
                launch.progress.message,
                config.reward,
                config.scorer_locations,
                config.scorer_workers,
            )
            stack.callback(scorers.close)
            check_aggregation(config.reward_aggregation, scorers.training)
            if isinstance(config.settings, SupportsRewardGradient):
                require_gradient(scorers.training, config.method, model_spec.domain)
            accelerator = open_accelerator(config.precision, launch.track, launch.run_dir)
            # Ends the trackers, and the communication between several processes.
            stack.callback(accelerator.end_training)
            model = open_model(
                _decide_compiling(launch, model_spec, accelerator.device),
                device=accelerator.device,
                precision=config.precision,
                adapter=config.adapter,
                seed=config.seed,
            )
            model_spec = replace(model_spec, compile=_is_compiled(model, launch.progress.message))
            RunFiles(launch.run_dir).write_config(config)
            _check_settings(config.settings, model)
        train_prompts = task.prompts("train", model_spec.domain)
        plan = EvaluationPlan.of_task(task, model_spec.domain, config.evaluation)
        opened = (*scorers.all, *scorers.diversity, *scorers.drift)
        parts = [part for each in opened for part in parts_behind(each)]
        seal = Seal(
            {"training": train_prompts, "validation": plan.validation, "evaluation": plan.result}, map(type, parts)
        )
        # Only where the network is compiled: elsewhere nothing may stop the clock of training.
        uncharged = seconds_compiling if model_spec.compile else nothing_uncharged
        observer = Observer(model, parts, uncharged)
        stack.callback(observer.close)
        observer.install()
        yield RunContext(
            launch=launch,
            model_spec=model_spec,
            task=task,
            model=model,
            scorers=scorers,
            accelerator=accelerator,
            train_prompts=train_prompts,
            plan=plan,
            timer=timer,
            observer=observer,
            seal=seal,
            uncharged=uncharged,
        )


def _decide_compiling(launch: Launch, model_spec: ModelSpec, device: torch.device) -> ModelSpec:
    """The model spec with `compile` decided: as it is set, or by `compile_choice` where it is auto."""
    if model_spec.compile != "auto":
        return model_spec
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    choice = choose_compiling(launch.config, device.type, name)
    if choice.earned:
        launch.progress.message(choice.line())
    return replace(model_spec, compile=choice.earned)


def _is_compiled(model: Model, message: Callable[[str], None]) -> bool:
    """Whether the model's network is compiled; says why it is not where it should be."""
    if not isinstance(model, PipelineModel):
        return False
    if model.bf16_fault:
        message(f"images are sampled in fp32: {model.bf16_fault}")
    if model.compiler_fault:
        message(
            f"nothing can be compiled here, so the run takes longer; its results are the same: {model.compiler_fault}"
        )
    return model.compiled


def check_data(config: Config) -> None:
    """Raise UserError where a person's prompts or pairs cannot be read, or one of these test prompts stands in the train split."""
    task = open_task(config)
    if config.prompts:
        with suppress(Missing):  # prompts of the task that a run would fetch
            refuse_overlap(task, config.model_spec().domain)
    _open_pairs(config.settings)


def open_task(config: Config) -> Task:
    """The task of a configuration, with the user's own prompts where they are given."""
    task = registry.task(config.task)
    return with_own_prompts(task, config.prompts, find_model_spec(config.model).domain) if config.prompts else task


def process_group() -> ProcessGroup:
    """The processes that `accelerate launch` or `torchrun` started for this run."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return ProcessGroup(state.process_index, state.num_processes)


def open_accelerator(precision: str, track: str | None = None, run_dir: Path | None = None) -> Any:
    """The device and the trackers. The model casts by itself, so that differences and latents stay float32.

    On a GPU, kernels that add in a changing order are replaced by deterministic ones, so that the same command gives the same
    bytes.
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
    if track and not accelerator.log_with:  # accelerate skips a tracker that is not installed without a message
        raise Missing(f"the tracker {track!r} is not installed; tensorboard comes with: pip install 'gpobench[track]'")
    if track:
        accelerator.init_trackers("tracker")
    return accelerator


def _check_settings(settings: Any, model: Any) -> None:
    """Raise UserError on settings that cannot work with this model, before minutes go into evaluating the base."""
    cost = getattr(type(settings), "cost", None)  # a third party's method may lack it; `gpobench check` asks for it
    if cost is not None:
        cost(settings, model.steps, counted_guidance(model))
    _open_pairs(settings)


def _open_pairs(settings: Any) -> None:
    """Raise UserError where the data set of pairs that a method learns from cannot be read."""
    pairs = asdict(settings).get("pairs")
    if isinstance(pairs, str) and pairs:
        open_pairs(pairs)

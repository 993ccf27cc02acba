"""Plans a comparison: the frontier of designs (seeds, images, prompts) with what each tells, what it costs, and the command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np

from ..bench import registry
from ..bench.errors import Missing, UserError
from ..bench.evaluation.ranking import MANDATORY_BASELINES
from ..bench.stats.planning import (
    BASE,
    LEVEL,
    Design,
    Pair,
    ToldPairs,
    all_pairs,
    predict_told,
    prompt_deviation,
    resolve_pairs,
)
from .pilot import Pilot

FAMILIES = ("pairs", "base", "asked")
SEEDS = (2, 3, 4, 5, 6, 8, 10)
BAND = 0.9  # of the told pairs


@dataclass(frozen=True)
class Target:
    """What is to be told."""

    pairs: Sequence[Pair]
    difference: float  # in units of the score
    power: float
    family: str = "pairs"  # of FAMILIES: which pairs are corrected together

    def family_of(self, rows: Sequence[str]) -> list[Pair]:
        """Return the pairs that are tested together."""
        if self.family == "asked":
            return list(self.pairs)
        if self.family == "base":
            if wrong := [pair for pair in self.pairs if BASE not in pair]:
                raise UserError(
                    f"--family base tests rows against the base alone, and {':'.join(wrong[0])} is another pair"
                )
            return [(row, BASE) for row in rows]
        return all_pairs(rows)


@dataclass(frozen=True)
class Axes:
    """The designs to try; empty: the pilot's own number, for seeds those of SEEDS."""

    seeds: Sequence[int] = ()
    images: Sequence[int] = ()
    prompts: Sequence[int] = ()


@dataclass(frozen=True)
class DesignPlan:
    """What one design tells and costs. half_width, mde and power are those of the asked pair that is hardest to tell."""

    design: Design
    half_width: float
    mde: float
    power: float
    told: ToldPairs | None  # None where the pilot has no gains
    runs: int
    nfe: float  # of training; NaN where the budget bounds none
    hours: float  # on the device; NaN: not known


@dataclass(frozen=True)
class Plan:
    """The frontier and the design that it chooses."""

    pilot: Pilot
    target: Target
    family: int  # pairs tested together
    designs: Sequence[DesignPlan]
    chosen: DesignPlan | None  # the cheapest that reaches the power; None: none does
    floor: float  # MDE with endless seeds on the most images and prompts of the designs
    device: str  # of the hours; "" where none is known
    hours_from: str  # measured | data sheet | ""
    jobs: int
    notes: Sequence[str]
    command: str


def make_plan(pilot: Pilot, target: Target, axes: Axes, device: str = "", jobs: int = 1) -> Plan:
    """Plan the comparison.

    Args:
        pilot: what is known.
        target: what is to be told.
        axes: designs to try.
        device: on which hours are asked; "": that of the pilot's runs.
        jobs: runs at once.

    Raises:
        UserError: on a design that cannot be planned, and an unknown device.
    """
    components = pilot.components
    family = target.family_of(components.labels)
    clock = _clock(pilot, device)
    designs = [Design(*parts) for parts in product(*_axes(pilot, axes))]
    planned = [_plan_design(pilot, target, family, design, clock.hours(design) / jobs) for design in designs]
    planned.sort(key=_cost)
    enough = [each for each in planned if each.power >= target.power]
    # `compare` takes the task's own prompts.
    ours = [each for each in enough if each.design.prompts == components.prompts]
    chosen = next(iter([*ours, *enough]), None)
    largest = max(designs, key=lambda d: (d.prompts, d.images))
    return Plan(
        pilot,
        target,
        len(family),
        planned,
        chosen,
        _floor(pilot, target, len(family), largest),
        clock.device,
        clock.source,
        jobs,
        _notes(pilot, designs),
        "" if chosen is None or not ours else _command(pilot, chosen.design, jobs),
    )


def _axes(pilot: Pilot, axes: Axes) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    components = pilot.components
    seeds = sorted(set(axes.seeds or SEEDS))
    if min(seeds) < 2:
        raise UserError("--seeds: one seed shows no spread between seeds, so nothing is told from it; plan at least 2")
    known = math.isfinite(components.prompt_images)
    images = axes.images or ([components.images * factor for factor in (1, 2, 4)] if known else [components.images])
    prompts = axes.prompts or [components.prompts]
    if min(images) < 1:
        raise UserError(f"--images is a number of images of a prompt, got {min(images)}")
    if min(prompts) < 5 * components.strata:
        raise UserError(f"--prompts: below {5 * components.strata} prompts there is no test, got {min(prompts)}")
    return seeds, sorted(set(images)), sorted(set(prompts))


def _plan_design(pilot: Pilot, target: Target, family: Sequence[Pair], design: Design, hours: float) -> DesignPlan:
    components = pilot.components
    seen = resolve_pairs(
        components, design, target.pairs, len(family), difference=target.difference, power=target.power
    )
    told = predict_told(components, design, family, level=BAND) if pilot.has_gains else None
    runs = design.seeds * len(components.labels)
    nfe = pilot.budget.get("nfe", math.nan) * runs
    return DesignPlan(
        design, float(seen.half_width.max()), float(seen.mde.max()), float(seen.power.min()), told, runs, nfe, hours
    )


def _cost(plan: DesignPlan) -> tuple[float, int, int]:
    """Sort key: hours where they are known, else runs; then images to evaluate."""
    d = plan.design
    return plan.hours if math.isfinite(plan.hours) else plan.runs, plan.runs, d.seeds * d.images * d.prompts


def _floor(pilot: Pilot, target: Target, family: int, design: Design) -> float:
    """Return the MDE of the hardest pair where seeds add no noise any more: that of the prompts stays."""
    from scipy.special import ndtri

    factor = float(ndtri(1 - LEVEL / family / 2) + ndtri(target.power))
    return factor * max(prompt_deviation(pilot.components, design, pair) for pair in target.pairs)


# Hours


@dataclass(frozen=True)
class _Clock:
    """Hours of a design on one device."""

    pilot: Pilot
    device: str = ""
    source: str = ""
    flops: float = math.nan  # of one network evaluation, for the data sheet

    def hours(self, design: Design) -> float:
        """Return the hours of all runs one after another; NaN where they are not known."""
        rows = self.pilot.components.labels
        if self.source == "data sheet":
            from ..bench.models.memory import hours

            return hours(self.pilot.budget.get("nfe", math.nan) * design.seeds * len(rows), self.flops, self.device)
        costs = [self.pilot.costs.get(row) for row in rows]
        if not self.source or any(cost is None or math.isnan(cost.train_seconds) for cost in costs):
            return math.nan
        components = self.pilot.components
        growth = design.images * design.prompts / (components.images * components.prompts)
        seconds = sum(c.train_seconds + np.nan_to_num(c.evaluation_seconds) * growth for c in costs if c is not None)
        return float(seconds) * design.seeds / 3600


def _clock(pilot: Pilot, device: str) -> _Clock:
    """Return the clock of a device: the pilot's own, else one of a data sheet. Raises UserError on an unknown device."""
    if pilot.device and (not device or device.casefold() in pilot.device.casefold()):
        return _Clock(pilot, pilot.device, "measured")
    if not device:
        return _Clock(pilot)
    from ..bench.models.memory import DEVICES, estimate

    if device not in DEVICES:
        raise registry.unknown("device", device, [*DEVICES, *([pilot.device] if pilot.device else [])])
    from ..bench.model_spec import find_model_spec

    spec = find_model_spec(pilot.model)
    try:
        flops = estimate(spec, adapter=spec.adapter, precision=spec.precision, micro=1, copies=0).flops
    except Missing:
        return _Clock(pilot, device)
    return _Clock(pilot, device, "data sheet", flops)


# Notes and command


def _notes(pilot: Pilot, designs: Sequence[Design]) -> list[str]:
    components, notes = pilot.components, list[str]()
    if missing := [name for name in MANDATORY_BASELINES if name not in components.labels]:
        notes.append(f"not in the plan, as the pilot does not have it: {', '.join(missing)}")
    if not pilot.has_gains:
        notes.append("told pairs are predicted from a pilot's gains only: --pilot")
    if others := sorted({d.prompts for d in designs} - {components.prompts}):
        numbers = ", ".join(f"{n:,}" for n in others)
        notes.append(
            f"{numbers} prompts need a file of prompts (gpobench run --prompts test=FILE); the task has {components.prompts:,}"
        )
    if math.isnan(components.prompt_images):
        notes.append(
            "these scores are by prompt, so other numbers of images cannot be planned; a pilot of run directories can"
        )
    return notes


def _command(pilot: Pilot, design: Design, jobs: int) -> str:
    """Return the command that makes the runs of a design, baselines included."""
    methods = [label for label in pilot.components.labels if label not in MANDATORY_BASELINES]
    baselines = [name for name in MANDATORY_BASELINES if name in pilot.components.labels]
    named = methods or baselines
    budget = ",".join(f"{currency}={bound:.12g}" for currency, bound in pilot.budget.items())
    words = ["gpobench", "compare", "--methods", ",".join(named), "--task", pilot.task, "--model", pilot.model]
    words += ["--seeds", str(design.seeds), "--budget", budget]
    for key, value in _evaluation_settings(pilot, design).items():
        words += ["--set", f"evaluation.{key}={value}"]
    return shlex.join([*words, *(["--jobs", str(jobs)] if jobs > 1 else [])])


def _evaluation_settings(pilot: Pilot, design: Design) -> Mapping[str, object]:
    """Return the evaluation settings that differ from the task's own."""
    from ..bench.model_spec import find_model_spec

    usual = asdict(registry.task(pilot.task).evaluation(find_model_spec(pilot.model).domain))
    split = pilot.evaluation.get("split", "test")
    wanted = {**usual, **pilot.evaluation, f"{split}_images": design.images}
    return {key: value for key, value in wanted.items() if usual.get(key) != value}

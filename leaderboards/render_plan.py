"""Renders a plan as text of 80 columns, and as JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bench.stats.planning import BASE
from .plan import BAND, DesignPlan, Plan

HEAD = ("", "seeds", "images", "prompts", "95 %", "MDE", "power", "told pairs", "nfe", "hours")
WIDTHS = (1, 5, 6, 7, 6, 6, 5, 14, 10, 8)


def text(plan: Plan) -> str:
    """Return the components, the frontier, the chosen design and its command."""
    pilot, target = plan.pilot, plan.target
    unit = "points" if pilot.share else "units of the score"
    pairs = ", ".join(":".join(pair) for pair in target.pairs)
    lines = [
        f"{pilot.task} on {pilot.model}, by {pilot.key}, budget {_budget(plan)}",
        *_prose(f"to tell {pairs}"),
        *_prose(
            f"by {_number(plan, target.difference)} {unit} with power {target.power:g}, corrected over {_family(plan)} (Holm)"
        ),
        "",
        f"Standard deviations in {unit}, of one seed and of one prompt:",
        *_table(("row", "gain", "seeds", "prompts", "rest"), (24, 8, 8, 8, 8), _component_lines(plan)),
        *_prose(f"from {pilot.source}"),
        "",
        *_table(HEAD, WIDTHS, [_design_line(plan, each) for each in plan.designs]),
        "",
        *_prose(
            "95 %: half the interval of a difference; MDE: the difference told with that power; both, and the power, of the asked pair "
            "that is hardest to tell."
        ),
    ]
    if pilot.has_gains:
        lines += _prose(
            f"told pairs: expected of the {plan.family}, with a {100 * BAND:.0f} % band; the pilot's gains are shrunk towards each other "
            "first, as observed ones overstate differences."
        )
    lines += _prose(_hours_line(plan))
    lines += [line for note in plan.notes for line in _prose(f"note: {note}")]
    lines += ["", *_answer(plan, unit)]
    return "\n".join(lines) + "\n"


def as_json(plan: Plan) -> str:
    """Return everything as one JSON object, in units of the score; null where nothing is known."""
    pilot, c = plan.pilot, plan.pilot.components
    rows = [
        {
            "row": label,
            "gain": float(c.seed_means[label].mean()) if label in c.seed_means else None,
            "seeds_sd": math.sqrt(c.seeds[k]),
            "prompts_sd": math.sqrt(max(c.prompt[k, k], 0.0)),
            "residual_sd": math.sqrt(c.residual[k]),
        }
        for k, label in enumerate(c.labels)
    ]
    table: dict[str, Any] = {
        "task": pilot.task, "model": pilot.model, "key": pilot.key, "budget": dict(pilot.budget), "source": pilot.source,
        "pairs": [list(pair) for pair in plan.target.pairs], "difference": plan.target.difference, "power": plan.target.power,
        "family": plan.family, "device": plan.device or None, "hours_from": plan.hours_from or None, "jobs": plan.jobs,
        "components": rows, "designs": [_design_json(each) for each in plan.designs],
        "chosen": _design_json(plan.chosen) if plan.chosen else None, "mde_of_endless_seeds": plan.floor,
        "notes": list(plan.notes), "command": plan.command or None,
    }  # fmt: skip
    return json.dumps(table, indent=1, allow_nan=False) + "\n"


def _design_json(each: DesignPlan) -> dict[str, Any]:
    finite = lambda x: x if math.isfinite(x) else None
    d, told = each.design, each.told
    return {
        "seeds": d.seeds, "images": d.images, "prompts": d.prompts, "half_width": each.half_width, "mde": each.mde,
        "power": each.power, "runs": each.runs, "nfe": finite(each.nfe), "hours": finite(each.hours),
        "told": None if told is None
        else {"expected": told.expected, "low": told.low, "high": told.high, "level": told.level, "pairs": told.pairs},
    }  # fmt: skip


def _component_lines(plan: Plan) -> list[list[str]]:
    c = plan.pilot.components
    number = lambda x, sign="": _number(plan, x, sign)
    return [
        [
            label if len(label) <= 24 else label[:23] + "…",
            number(float(c.seed_means[label].mean()), "+") if label in c.seed_means else "",
            number(math.sqrt(c.seeds[k])),
            number(math.sqrt(max(c.prompt[k, k], 0.0))),
            number(math.sqrt(c.residual[k])),
        ]
        for k, label in enumerate(c.labels)
    ]


def _design_line(plan: Plan, each: DesignPlan) -> list[str]:
    d, told = each.design, each.told
    return [
        "*" if each is plan.chosen else "",
        str(d.seeds),
        str(d.images),
        f"{d.prompts:,}",
        _number(plan, each.half_width),
        _number(plan, each.mde),
        f"{each.power:.2f}",
        "-" if told is None else f"{told.expected:.0f} [{told.low}, {told.high}]",
        "unknown" if math.isnan(each.nfe) else f"{each.nfe:,.0f}",
        "unknown" if math.isnan(each.hours) else f"{each.hours:.1f}",
    ]


def _prose(sentence: str) -> list[str]:
    """Break a sentence into lines of 80 columns; names stay whole."""
    return textwrap.wrap(sentence, 80, break_long_words=False, break_on_hyphens=False)


def _hours_line(plan: Plan) -> str:
    at_once = f", {plan.jobs} runs at once as fast as one" if plan.jobs > 1 else ""
    if not plan.hours_from:
        return f"hours are not known{f' on {plan.device}' if plan.device else ''}: give a pilot of runs made there."
    if plan.hours_from == "data sheet":
        return f"hours on {plan.device} by its data sheet, of training alone{at_once}."
    whole = all(np.isfinite(cost.evaluation_seconds) for cost in plan.pilot.costs.values())
    return f"hours as measured on {plan.device}{'' if whole else ', of training alone'}{at_once}."


def _answer(plan: Plan, unit: str) -> list[str]:
    if plan.chosen is None:
        return _prose(
            f"no design here reaches a power of {plan.target.power:g}. With endless seeds the prompts' noise alone leaves an MDE of "
            f"{_number(plan, plan.floor)} {unit}. Take more seeds, prompts or images, fewer pairs (--family asked), or a graded key."
        )
    if not plan.command:
        return _prose(
            f"* the cheapest design that reaches a power of {plan.target.power:g}; none on the task's own prompts does, which are those "
            "that compare takes: make its runs one by one, each with --prompts test=FILE."
        )
    return [f"* the cheapest design that reaches a power of {plan.target.power:g}:", "", f"    {plan.command}"]


def _family(plan: Plan) -> str:
    rows = len(plan.pilot.components.labels)
    what = {
        "pairs": f"all {plan.family} pairs of {rows} rows and the base",
        "base": f"{plan.family} rows against the {BASE}",
        "asked": f"the {plan.family} asked pair{'s' * (plan.family > 1)}",
    }
    return what[plan.target.family]


def _budget(plan: Plan) -> str:
    return ", ".join(f"{bound:,.12g} {currency}" for currency, bound in plan.pilot.budget.items())


def _number(plan: Plan, x: float, sign: str = "") -> str:
    """Return a number in points where the score is a share, else in its own units."""
    value = 100 * x if plan.pilot.share else x
    return f"{value:{sign}.2f}" if abs(value) < 100 else f"{value:{sign}.0f}"


def _table(head: Sequence[str], widths: Sequence[int], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with columns to the right, the first to the left."""
    row = lambda cells: " ".join(
        cell.ljust(width) if k == 0 else cell.rjust(width)
        for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()
    return [row(head), *(row(line) for line in lines)]

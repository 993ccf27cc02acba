"""gpobench plan: what it takes to tell methods apart, before the spend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ...bench.errors import UserError
from ...bench.model_spec import registered_name
from .options import say

if TYPE_CHECKING:
    from ..pilot import Pilot

Methods = Annotated[list[str], typer.Option("--methods", help="Methods, separated by commas; repeatable.")]
Task = Annotated[str, typer.Option("--task", help="The task.")]
Model = Annotated[str, typer.Option("--model", help="The model.", callback=registered_name)]
Difference = Annotated[
    float,
    typer.Option(
        help="The difference to tell: in points (hundredths) where the score lies between 0 and 1, so 3 is .03; else in units of the score."
    ),
]
Power = Annotated[float, typer.Option(help="The probability with which it is to be told, between 0 and 1.")]
PilotPaths = Annotated[
    list[str] | None,
    typer.Option(
        "--pilot",
        help="Runs (folders, or the JSON file of a comparison), or a baseline: a TOML file or the name of a built-in one; default: "
        "the shipped library of variances.",
    ),
]
Pairs = Annotated[
    str | None,
    typer.Option(
        help="The pairs to tell, gpo:nft,gpo:base; default: each two of the methods, of a single one its pair with the base."
    ),
]
Family = Annotated[
    str,
    typer.Option(
        help="Which pairs are corrected together: pairs (all of the table, as its ranks), base (rows against the base), asked."
    ),
]
Key = Annotated[str | None, typer.Option(help="The scorer/metric; default: that of the table.")]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="The budget of each run; default: the pilot's, whose spread alone is known."),
]
Seeds = Annotated[str | None, typer.Option(help="Seeds to try, 3,5,10.")]
Images = Annotated[str | None, typer.Option(help="Images of a prompt to try, 2,4,8; needs a pilot of runs.")]
Prompts = Annotated[str | None, typer.Option(help="Test prompts to try, 300,1000; default: the pilot's.")]
Device = Annotated[
    str,
    typer.Option(
        help="The device for the hours: (part of) the name of the pilot's, or one of a data sheet, h100; default: the pilot's."
    ),
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at once.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, in units of the score.")]


def plan(
    methods: Methods,
    task: Task,
    model: Model,
    difference: Difference,
    power: Power = 0.8,
    pilot: PilotPaths = None,
    pairs: Pairs = None,
    family: Family = "pairs",
    key: Key = None,
    budget: BudgetOption = None,
    seeds: Seeds = None,
    images: Images = None,
    prompts: Prompts = None,
    device: Device = "",
    jobs: Jobs = 1,
    as_json: Json = False,
) -> None:
    """Plan a comparison: seeds and hours that tell methods apart.

    From the components of variance of a pilot or of the shipped library it prints a frontier of designs, marks the cheapest one that
    reaches the power, and prints the command that makes it. sft and best-of-n are planned too, as `compare` runs them.

    Examples: `gpobench plan --methods gpo,nft --task ocr --model tiny --difference 3` · `gpobench plan --methods gpo,nft --task ocr --model
    tiny --difference 3 --power .9 --pilot tiny-ocr --seeds 3,5,10` · `gpobench plan --methods gpo --task ocr --model tiny --difference 5
    --pilot runs --images 2,4,8 --device h100`
    """
    from ..plan import FAMILIES, Axes, Target, make_plan
    from ..render_plan import as_json as render_json
    from ..render_plan import text

    _check_numbers(difference, power)
    if family not in FAMILIES:
        from ...bench.registry import unknown

        raise unknown("family", family, FAMILIES)
    found, names = _find(methods, task, model, (key, budget), pilot or [])
    from ...bench import registry
    from ...bench.evaluation.asked_pairs import asked_pairs

    canonical = lambda name: registry.canonical("method", name)
    asked = asked_pairs(pairs, names, found.components.labels, canonical)
    if found.share and difference >= 100:
        raise UserError(f"--difference is in points where the score lies between 0 and 1, got {difference:g}")
    target = Target(asked, difference / 100 if found.share else difference, power, family)
    axes = Axes(_numbers("--seeds", seeds), _numbers("--images", images), _numbers("--prompts", prompts))
    made = make_plan(found, target, axes, device, jobs)
    say(render_json(made) if as_json else text(made), nl=False)


def _check_numbers(difference: float, power: float) -> None:
    if not (math.isfinite(difference) and difference > 0):
        raise UserError(
            f"--difference must be above 0, got {difference:g}: no design tells rows apart that do not differ"
        )
    if not 0 < power < 1:
        raise UserError(
            f"--power is a probability between 0 and 1, got {power:g}: no design is sure to tell a difference"
        )


def _find(
    methods: Sequence[str], task: str, model: str, how: tuple[str | None, str | None], paths: Sequence[str]
) -> tuple[Pilot, list[str]]:
    """Return the pilot and the canonical names of the methods. how: key and budget."""
    from pathlib import Path

    from ...bench import registry
    from ...bench.budget import load_budget
    from ..pilot import Question, find_pilot

    names = [name.strip() for text in methods for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--methods names nothing to plan")
    canonical = list(dict.fromkeys(registry.canonical("method", name) for name in names))
    for name in canonical:
        if ".py:" not in name:
            registry.load("method", name)
    registry.task(task)
    key, budget = how
    bounds = load_budget(budget).bounds() if budget else None
    return find_pilot(Question(canonical, task, model, key, bounds), [Path(path) for path in paths]), canonical


def _numbers(option: str, text: str | None) -> list[int]:
    """Parse `3,5,10`. Raises UserError on anything else."""
    if text is None:
        return []
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} takes whole numbers with commas between, as 3,5,10, got {text!r}")
    return numbers

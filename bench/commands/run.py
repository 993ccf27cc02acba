"""`gpobench run`: trains one method under a budget and evaluates the model before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import NO_RESULT
from ..signals import asked_to_stop
from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, MethodName, ModelName, ScorerLocations, Sets, TaskName, check_names, check_scorer
from .tables import before_after_table, cell, p_value

if TYPE_CHECKING:
    from ..evaluation.record import Record
    from ..experiments.config import Config


EPILOG = (
    "Examples: `gpobench run --method gpo --task ocr --model tiny --seed 1` · `gpobench run ... --set loss_type=pairwise "
    "--budget nfe=50000` · `gpobench run ... --dry-run`\n\nExit codes: 0 the run is complete · 2 one line says what to change · "
    "3 the run is complete but no result, because it ended by a fault or is invalid · 130 stopped, the same command goes on"
)


def run(
    method: MethodName,
    task: TaskName,
    model: ModelName,
    seed: Annotated[int, typer.Option(help="The training seed; evaluations have a seed of their own.")] = 0,
    budget: Annotated[
        str | None, typer.Option(help="A budget's name, a TOML file, or nfe=200000,seconds=600; default: the model's.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="The scorer to train on, or a blend: 'pickscore*0.5+rapidocr'; default: the task's, which is held out otherwise."
        ),
    ] = None,
    sets: Sets = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings; --set overrides it.")] = None,
    scorer_at: ScorerLocations = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Train on FILE's prompts (txt, json, csv, parquet ...); SPLIT=FILE for another split; repeatable."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where run directories are made.")] = Path("runs"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what an earlier start of this run left, and start again.")
    ] = False,
    track: Annotated[
        str | None, typer.Option(help="Also log to tensorboard, wandb ... (accelerate's trackers).")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved settings, the memory and the time the run would take, and stop."
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="With --dry-run: the GPU whose hours are estimated (h200, a100, rtx4090 ...).")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Train a method under a budget; evaluate before and after.

    The same command resumes an interrupted run from its last checkpoint, and shows the result of a finished one.
    """
    check_names(method=method, task=task, model=model)
    check_scorer(reward)
    with clean_stdout() as answer, terminal_progress() as progress, asked_to_stop() as stopped:
        from ..experiments.config import RunRequest, resolve

        request = RunRequest(
            method, task, model, seed=seed, budget=budget, reward=reward, config=config, sets=sets or (),
            scorer_locations=scorer_at or (), prompts=prompts or (),
        )  # fmt: skip
        config_of_run = resolve(request)
        if dry_run:
            answer(_dry_run(config_of_run, device, out, as_json))
            return
        from ..evaluation.record import disqualification
        from ..experiments.run import run as train_and_evaluate

        record = train_and_evaluate(
            config_of_run, runs=out, progress=progress, fresh=fresh, track=track, interrupted=stopped
        )
        answer(record.model_dump_json(indent=1) if as_json else lambda: print_run_result(record))
    if why := disqualification(record):
        typer.echo(f"gpobench: this run is no result: it {why}", err=True)
        raise typer.Exit(NO_RESULT)


def _dry_run(config: Config, device: str, out: Path, as_json: bool) -> str | Callable[[], None]:
    """Return the settings and the cost estimate of a run as JSON, or a function that prints them."""
    from ..experiments.context import check_data
    from ..experiments.cost_estimate import estimate_cost

    check_data(config)
    estimate = estimate_cost(config, device)
    settings, lines = config.mapping(), [*estimate.pop("lines"), *_compiling(config, device)]
    if as_json:
        return json.dumps({**settings, "cost_estimate": estimate}, indent=1)
    return lambda: print_dry_run(settings, lines, out / config.slug())


def _compiling(config: Config, device: str) -> list[str]:
    """Return a line that says whether the run would compile its network, where it decides by itself."""
    import torch

    from ..experiments.compile_choice import choose_compiling

    if config.model_spec().compile != "auto":
        return []
    kind = "cuda" if device or torch.cuda.is_available() else "cpu"
    return [choose_compiling(config, kind, device).line()]


def print_dry_run(settings: Mapping[str, Any], estimate: Sequence[str], run_dir: Path) -> None:
    """Print the resolved settings, the lines of the cost estimate and the run directory."""
    console = open_console()
    for line in _flat(settings):
        console.print(line, highlight=False, markup=False)
    console.print()
    for line in estimate:
        console.print(line, highlight=False, markup=False)
    console.print(f"would run in {run_dir}", highlight=False, markup=False, soft_wrap=True)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield nested settings as lines `a.b = value`."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {json.dumps(value)}"


def print_run_result(r: Record) -> None:
    """Print a run's numbers before and after, their differences, its flags and what it spent."""
    from rich.text import Text

    console = open_console()
    title = Text.assemble((f"\n{r.method}", "bold"), f" on {r.task}, {r.model}, seed {r.seed}: ended by {r.stop}")
    console.print(title, highlight=False)
    fits_on_one_line = max(len(key + _role_sign(r, key)) for key in r.delta) <= 17
    table, scorer_above = before_after_table("scorer"), ""
    for key, d in r.delta.items():
        scorer, _, metric = key.partition("/")
        if not fits_on_one_line and scorer != scorer_above:  # a long name gets a line of its own
            console.print(table)
            console.print(scorer + _role_sign(r, key), style="bold", highlight=False)
            table, scorer_above = before_after_table(), scorer
        name = key + _role_sign(r, key) if fits_on_one_line else f"  {metric}"
        table.add_row(name, cell(r.before[key]), cell(r.after[key]), cell(d, sign=True), p_value(d.p))
    console.print(table)
    n, split = max(d.n for d in r.delta.values()), r.config["evaluation"].get("split", "test")
    console.print(
        f"means over {n} {split} prompts with 95 % intervals; differences paired by\n"
        "prompt on the same noise; * held out, + a further one: never trained on;\n"
        "' quality, diversity and drift: what the rise has cost",
        style="dim",
        highlight=False,
    )
    from ..evaluation.look_ledger import look_note, read_ledger
    from ..evaluation.seed_library import seed_note

    console.print(seed_note(r), style="dim", highlight=False, markup=False)
    if note := look_note(r, read_ledger(Path(r.run_dir).parent)):
        console.print(note, style="dim", highlight=False, markup=False)
    if r.strata:
        console.print()
        console.print(_strata_table(r))
    for name, number in r.cmmd.items():
        console.print(f"drift from the base by CMMD ({name}): {cell(number)}", highlight=False)
    from ..evaluation.transfer import transfer_text

    for key, transfer in r.transfer.items():
        console.print(f"transfer to {key}: {transfer_text(transfer)}", highlight=False, markup=False)
    if r.flags.hack:
        reasons = "; ".join(r.flags.reasons) or "the held-out scorers did not follow, or a quality column fell"
        console.print(f"HACK FLAG: {reasons}", style="bold red", markup=False)
    if r.fault:
        console.print(f"FAULT, so this is no result: {r.fault}", style="bold red", markup=False, highlight=False)
    if r.flags.invalid:
        console.print("INVALID: more than 0.5 % of the images could not be scored", style="bold red")
    spent = " · ".join(
        f"{key} {value:,.0f}" if key != "flops" else f"{key} {value:.2e}" for key, value in r.spent.items()
    )
    roles = ", ".join(f"{role} {nfe:,}" for role, nfe in r.nfe_by_role.items())
    errors = sum(s.errors + s.unscored for s in r.scorers.values())
    console.print(f"spent: {spent}\nnfe by role: {roles} · images not scored: {errors}", highlight=False)
    for failure in dict.fromkeys(r.failures[-3:]):
        console.print(f"  {failure}", highlight=False, markup=False)
    names = ("samples/pairs.png", "curve.png", "adapter", "record.json")  # a search trains no adapter
    present = [name + "/" * Path(r.run_dir, name).is_dir() for name in names if Path(r.run_dir, name).exists()]
    console.print(f"see {r.run_dir}/: {', '.join(present)}", highlight=False, markup=False, soft_wrap=True)


def _role_sign(r: Record, key: str) -> str:
    """Return the sign behind a row's name that tells the role of its scorer."""
    scorer = r.scorers.get(key.partition("/")[0])  # none: diversity and drift
    return {"training": "", "held-out": " *", "auxiliary": " +", "quality": " '"}[scorer.role if scorer else "quality"]


def _strata_table(r: Record) -> Any:
    """Return a table of the training scorer's number by stratum."""
    from ..evaluation.ranking import BINARY_METRICS

    name = next(name for name, scorer in r.scorers.items() if scorer.role == "training")
    keys = [key for key in r.delta if key.startswith(f"{name}/")]
    key = next((key for key in keys if key.partition("/")[2] in BINARY_METRICS), keys[0])
    table = before_after_table("by stratum")
    for stratum, numbers in r.strata.items():
        d = numbers.delta[key]
        table.add_row(stratum, cell(numbers.before[key]), cell(numbers.after[key]), cell(d, sign=True), p_value(d.p))
    return table

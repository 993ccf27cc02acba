"""`gpobench compare`: runs several methods, tasks and seeds under one budget."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import NO_RESULT, UserError
from ..signals import asked_to_stop
from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, ModelName, ScorerLocations, check_names, check_scorer
from .tables import cell, short_name

EPILOG = (
    "Examples: `gpobench compare --methods gpo,dpo,grpo --task ocr --model tiny` · `gpobench compare ... --set gpo/beta=50 "
    "--jobs 2` · `gpobench compare --methods gpo,nft --task ocr --model tiny --until-told "
    "--pairs gpo:nft,gpo:base` · on any scheduler: `gpobench compare ... --print | xargs -d '\\n' -P 4 -I{} sh -c '{}'`\n\n"
    "Exit codes: 0 every run is a result · 1 a run failed twice · 2 one line says what to change · 3 every run is complete, but one "
    "ended by a fault or is invalid · 130 stopped, the same command goes on"
)


def compare(
    methods: Annotated[list[str], typer.Option("--methods", help="Methods, separated by commas; repeatable.")],
    tasks: Annotated[list[str], typer.Option("--task", help="Tasks, separated by commas; repeatable.")],
    model: ModelName,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="How many training seeds, from 0 on; or a list: 0,4,7. Default 3, with --until-told 2 to begin with."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="The budget of each run: a name, a TOML file, or nfe=200000; default: the model's."),
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="The scorer to train on, or a blend; default: each task's.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value for all; METHOD/key=value for one, e.g. gpo/beta=50; repeatable."),
    ] = None,
    configs: Annotated[
        list[str] | None,
        typer.Option("--config", help="A TOML file of settings for all; METHOD=FILE replaces it for one; repeatable."),
    ] = None,
    scorer_at: ScorerLocations = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Also run sft and best-of-n, which any method must beat.")
    ] = True,
    until_told: Annotated[
        bool,
        typer.Option(
            "--until-told",
            help="Add a seed to the rows of untold pairs until every pair of --pairs is told apart or has --max-seeds. The error "
            "is 5 % over all looks and pairs.",
        ),
    ] = False,
    pairs: Annotated[
        str | None,
        typer.Option(
            help="With --until-told: gpo:nft,gpo:base; default: each two of --methods, of a single one its pair with the base."
        ),
    ] = None,
    max_seeds: Annotated[
        int | None, typer.Option("--max-seeds", help="With --until-told: seeds of a row at most; default 10.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at once; with more than one, each in a process of its own.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="Where run directories are made.")] = Path("runs"),
    print_: Annotated[
        bool, typer.Option("--print", help="Print the command of each run, one per line, and stop.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run several methods, tasks and seeds under one budget.

    The same command goes on where it was cut off; finished runs are not made again.
    """
    from ..experiments import compare as comparing
    from ..experiments.until_told import until_told as add_seeds

    if not until_told and (pairs is not None or max_seeds is not None):
        raise UserError("--pairs and --max-seeds say when --until-told stops: without it every method has --seeds")
    if until_told and print_:
        raise UserError(
            "--print lists runs that are known beforehand: which ones --until-told makes follows from their scores"
        )
    grid_methods, grid_tasks = comparing.split(methods), comparing.split(tasks)
    for name in grid_methods:
        check_names(method=name)
    for name in grid_tasks:
        check_names(task=name)
    check_names(model=model)
    check_scorer(reward)
    with clean_stdout() as answer, terminal_progress() as progress, asked_to_stop() as stopped:
        count = comparing.seeds(seeds or ("2" if until_told else "3"))
        grid = comparing.Grid(
            grid_methods, grid_tasks, model, count, budget, reward, sets or (), configs or (),
            scorer_at or (), baselines,
        )  # fmt: skip
        if print_:
            answer("\n".join(comparing.commands(grid, out)))
            return
        launch = comparing.GridLaunch(out, progress, jobs, stopped)
        if until_told:
            result = add_seeds(grid, pairs, 10 if max_seeds is None else max_seeds, launch)
        else:
            result = comparing.compare(grid, out=out, progress=progress, jobs=jobs, interrupted=stopped)
        answer(json.dumps(result, indent=1) if as_json else lambda: print_comparison(result))
    if result["failed"]:
        raise typer.Exit(1)
    if any(row.get("no_result") for row in result["runs"]):
        raise typer.Exit(NO_RESULT)


def print_comparison(result: Mapping[str, Any]) -> None:
    """Print a table per task, one line per run: its change by a held-out and by the training scorer; then the failures."""
    from rich.table import Table
    from rich.text import Text

    from ..evaluation.record import Difference

    console, rows = open_console(), result["runs"]
    for task in dict.fromkeys(row["task"] for row in rows):
        task_rows = [row for row in rows if row["task"] == task]
        keys = next(((r["key"], r["training_key"]) for r in task_rows if "key" in r), ("held out", "trained on"))
        heads = ["method", "seed", "state", f"{keys[0]} *", keys[1]]
        table = Table(*heads, box=None, pad_edge=False, header_style="bold")
        for row in task_rows:
            cells = [cell(Difference(**row[k]), sign=True) if k in row else "" for k in ("delta", "training_delta")]
            flags = [flag for flag in ("hack", "invalid") if row.get("flags", {}).get(flag)]
            flags += ["fault"] * bool(row.get("fault"))
            table.add_row(short_name(row["method"]), str(row["seed"]), ", ".join([row["state"], *flags]), *cells)
        title = Text.assemble((f"\n{short_name(task)}", "bold"), f", {result['model']}")
        console.print(title, highlight=False)
        console.print(table, markup=False)
    console.print(
        "after minus before with 95 % intervals, one training seed each; * held out: never trained on",
        style="dim",
        highlight=False,
    )
    for row in rows:
        word, reason = ("FAILED", row["reason"]) if row["reason"] else ("NO RESULT", row.get("no_result"))
        if reason:
            text = f"{word} {short_name(row['method'])} on {short_name(row['task'])}, seed {row['seed']}: {reason}"
            console.print(text, style="bold red", markup=False, highlight=False)
    if "sequential" in result:
        from ..experiments.until_told import summary_lines

        console.print("\n".join(summary_lines(result["sequential"])), markup=False, highlight=False, soft_wrap=True)
    spent = " · ".join(f"{key} {value:,.0f}" for key, value in result["spent"].items() if key != "flops")
    lines = [f"spent by all of them: {spent}", f"see {result['path']}"]
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["state"] == "done"))
    lines += [  # by this file: the folder may hold runs of other budgets
        f"to rank them: gpobench leaderboard {result['path']}"
        + (f" --task {shlex.quote(task)}" if len(tasks) > 1 else "")
        for task in tasks
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)

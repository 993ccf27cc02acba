"""`gpobench tune`: chooses a method's settings on validation prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..signals import asked_to_stop
from .console import clean_stdout, open_console, terminal_progress
from .options import AsJson, MethodName, ModelName, TaskName, check_names, check_scorer
from .tables import is_finite

EPILOG = (
    "Example: `gpobench tune --method gpo --task ocr --model tiny --trials 8 --jobs 2`, then `gpobench run ... --config "
    "runs/tune/gpo-ocr-tiny/best.toml`"
)


def tune(
    method: MethodName,
    task: TaskName,
    model: ModelName,
    trials: Annotated[
        int, typer.Option(help="How many settings to try; the first is the method's preset, the others are drawn.")
    ],
    budget: Annotated[str | None, typer.Option(help="The budget of each trial: a name, a file, or nfe=200000.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of the draws and of every trial's training.")] = 0,
    reward: Annotated[str | None, typer.Option(help="The scorer to train on; default: the task's.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for every trial; such a key is not drawn; repeatable.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Trials at once, each in a process of its own.")] = 1,
    studies: Annotated[
        int,
        typer.Option(
            help="Independent studies, with the seeds seed, seed + 1 ...; each has a folder study-SEED with its best.toml."
        ),
    ] = 1,
    out: Annotated[Path, typer.Option(help="The folder in which METHOD-TASK-MODEL/ is made.")] = Path("runs/tune"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the draws and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose a method's settings by trials on validation prompts.

    Every method gets the same number of draws under the same budget. The same command goes on where it was cut off. With --studies the
    choice is repeated, and studies.json says how far the studies' choices lie apart.
    """
    check_names(method=method, task=task, model=model)
    check_scorer(reward)
    with clean_stdout() as answer, terminal_progress() as progress, asked_to_stop() as stopped:
        from ..experiments import studies as tuning_studies
        from ..experiments import tune as tuning

        request = tuning.Tuning(method, task, model, trials, seed, budget, reward, sets or ())
        if dry_run:
            drawn = [
                {
                    **({"study": study.seed} if studies > 1 else {}),
                    "trial": t.number,
                    "settings": t.settings,
                    "rejected": t.failure,
                }
                for study in tuning_studies.plan_studies(request, studies)
                for t in tuning.plan(study)
            ]
            answer(json.dumps(drawn, indent=1) if as_json else lambda: print_trials(drawn, None))
            return
        if studies != 1:
            summary = tuning_studies.tune_studies(
                request, studies, out=out, progress=progress, jobs=jobs, interrupted=stopped
            )
            answer(json.dumps(summary, indent=1) if as_json else lambda: print_studies(summary))
            return
        result = tuning.tune(request, out=out, progress=progress, jobs=jobs, interrupted=stopped)
        answer(json.dumps(result, indent=1) if as_json else lambda: print_tuning(result))


def print_trials(trials: Sequence[Mapping[str, Any]], best: int | None) -> None:
    """Print one line per trial; the chosen one is marked."""
    from rich.table import Table

    keys = list(dict.fromkeys(key for t in trials for key in t["settings"]))
    result_columns = ["difference", "nfe", "ended by"] if any("gain" in t for t in trials) else []
    table = Table("", "trial", *keys, *result_columns, "", box=None, pad_edge=False, header_style="bold")
    for t in trials:
        values = [f"{t['settings'][key]}" if key in t["settings"] else "preset" for key in keys]
        if result_columns and "gain" in t:
            gain = t["gain"]
            ends = [end for end in gain["ci"] if is_finite(end)]
            low_high = f" [{', '.join(f'{end:+.2f}' for end in ends)}]" if ends else ""
            cell = f"{gain['mean']:+.3f}{low_high}" if is_finite(gain["mean"]) else "not scored"
            values += [cell, f"{t['spent']['nfe']:,.0f}", t["stop"]]
        elif result_columns:
            values += ["", "", ""]
        mark = ">" if t["trial"] == best else ""
        table.add_row(mark, str(t["trial"]), *values, t["rejected"], style="bold" if mark else None)
    open_console().print(table, markup=False)


def print_studies(summary: Mapping[str, Any]) -> None:
    """Print what each study chose, and how far the gains of the chosen settings lie apart."""
    from rich.table import Table

    keys = list(dict.fromkeys(key for study in summary["studies"] for key in study["settings"]))
    table = Table("study", "trial", *keys, "difference", box=None, pad_edge=False, header_style="bold")
    for study in summary["studies"]:
        gain, settings = study["gain"], study["settings"]
        ends = ", ".join(f"{end:+.2f}" for end in gain["ci"] if is_finite(end))
        interval = f" [{ends}]" if ends else ""
        values = [str(settings[key]) if key in settings else "preset" for key in keys]
        table.add_row(str(study["seed"]), str(study["best"]), *values, f"{gain['mean']:+.3f}{interval}")
    console = open_console()
    console.print(table, markup=False)
    mean, spread = summary["gain"]["mean"], summary["gain"]["sd_between_studies"]
    apart = f", standard deviation between studies {spread:.3f}" if spread is not None else ""
    for seed, why in summary["failed"].items():
        console.print(f"study {seed} chose nothing: {why}", highlight=False, markup=False)
    console.print(
        f"{summary['objective']}, of the chosen settings: mean {mean:+.3f}{apart}. A chosen gain is the best of several and too high.\n"
        f"to use them: --config {summary['folder']}/study-SEED/best.toml, then gpobench leaderboard RUNS --studies",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def print_tuning(result: Mapping[str, Any]) -> None:
    """Print all trials, what tuning spent and where the chosen settings are."""
    print_trials(result["trials"], result["best"])
    spent = " · ".join(f"{key} {value:,.0f}" for key, value in result["spent"].items() if key != "flops")
    open_console().print(
        f"{result['objective']}, 95 % intervals, one seed\nspent on tuning: {spent}\n"
        f"to use it: --config {result['folder']}/best.toml",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip

"""gpobench regress: compares runs with the numbers of a baseline, or writes a new baseline from them."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...bench.errors import UserError
from .options import RUNS_HELP, say, write_text

if TYPE_CHECKING:
    from ..baseline import Baseline
    from ..baseline_runs import RunOptions
    from ..regress import LoadedBaseline, RegressionReport
    from ..runs import LoadedRun

Against = Annotated[str | None, typer.Option(help="The baseline: a TOML file, or the name of a built-in one.")]
Run = Annotated[str | None, typer.Option("--run", help="Like --against, but first make every run of this baseline.")]
Rows = Annotated[list[str] | None, typer.Option("--row", help="Only these rows of the baseline; repeatable.")]
Task = Annotated[str | None, typer.Option(help="Only the task of this name, where the baseline has several.")]
Out = Annotated[Path, typer.Option(help="With --run: the folder of the new run directories.")]
Jobs = Annotated[int, typer.Option(min=1, help="With --run: runs at once.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="With --run: make again also runs that are done, perhaps by other code.")
]
AllowUnsure = Annotated[
    bool,
    typer.Option("--allow-unsure", help="Exit 0 although some numbers cannot be told, when none is worse or missing."),
]
Junit = Annotated[Path | None, typer.Option(help="Write the verdicts there as JUnit XML, for a build server.")]
Markdown = Annotated[
    Path | None, typer.Option(help="Write the table there; it also goes to the file in $GITHUB_STEP_SUMMARY.")
]
Update = Annotated[bool, typer.Option("--update", help="Compare nothing: write a new baseline from these runs.")]
Margins = Annotated[
    list[str] | None,
    typer.Option(
        "--margin",
        help="With --update: the margin of sameness, NUMBER or SHARE% of the gain, or scorer/metric= and one of them; "
        "default: that of the old baseline, else 50%.",
    ),
]
Keys = Annotated[
    list[str] | None,
    typer.Option("--key", help="With --update: a scorer/metric to guard; default: the training and held-out scorers'."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything else goes to stderr.")]


@dataclass(frozen=True)
class Output:
    """Where the verdicts go, and whether "cannot tell" passes."""

    junit: Path | None
    markdown: Path | None
    as_json: bool
    allow_unsure: bool


def regress(
    runs: Annotated[list[Path] | None, typer.Argument(help=RUNS_HELP)] = None,
    against: Against = None,
    run: Run = None,
    rows: Rows = None,
    task: Task = None,
    out: Out = Path("runs"),
    jobs: Jobs = 1,
    fresh: Fresh = False,
    allow_unsure: AllowUnsure = False,
    junit: Junit = None,
    markdown: Markdown = None,
    update: Update = False,
    margins: Margins = None,
    keys: Keys = None,
    as_json: Json = False,
) -> None:
    """Compare the numbers of runs with those of a baseline.

    Each of the baseline's numbers is the same, better, worse, or it cannot be told. A gain over the base that was told must be
    told again, else its number is worse.

    Exit code 0: all are the same or better; 1: some are worse; 3: none is worse, but some cannot be told, or these runs do not
    have them (narrow the baseline with --row and --task); 2: the runs cannot be compared.

    Examples: `gpobench regress runs --against leaderboards/tiny.toml` · `gpobench regress --run tiny --junit verdicts.xml` ·
    `gpobench regress runs --against numbers.toml --update --margin 25%`
    """
    _check_request(runs, against, run, update)
    if (margins or keys) and not update:
        raise UserError("--margin and --key say what --update writes: comparing does not change a baseline")
    if (rows or task) and update:
        raise UserError("--update writes all rows and tasks: name the runs that belong in it instead")
    from ..baseline import find_baseline
    from ..baseline_runs import RunOptions
    from ..regress import check_all, select
    from ..runs import excluded_runs, load_runs

    path = find_baseline(str(against or run))
    baselines = [] if update and not path.is_file() else _load(path)
    if baselines and (rows or task):
        baselines = select(baselines, rows or (), task)
    folders = list(runs or ())
    if run is not None:
        folders = _make_runs(path, [each.baseline for each in baselines], RunOptions(out, jobs, fresh))
    loaded = load_runs(folders)
    if update:
        _update(path, loaded, keys or (), margins or ())
        return
    reports = check_all(baselines, loaded, excluded_runs(folders))
    raise typer.Exit(_print(reports, Output(junit, markdown, as_json, allow_unsure)))


def _check_request(runs: list[Path] | None, against: str | None, run: str | None, update: bool) -> None:
    if (against is None) == (run is None):
        raise UserError("name one baseline: --against FILE, or --run FILE to make its runs first")
    if bool(runs) == (run is not None):
        raise UserError(
            "name runs to compare" if run is None else "--run makes its own runs: leave RUNS out, or use --against"
        )


def _load(path: Path) -> list[LoadedBaseline]:
    from ..baseline import baseline_files, read_baseline
    from ..regress import LoadedBaseline

    return [LoadedBaseline(file, *read_baseline(file)) for file in baseline_files(path)]


def _make_runs(path: Path, baselines: Sequence[Baseline], options: RunOptions) -> list[Path]:
    from ...bench.signals import asked_to_stop
    from ..baseline_runs import run_baselines

    if not baselines:
        raise UserError(f"no baseline at {path} that says what to run")
    with asked_to_stop() as stopped:
        return run_baselines(baselines, options, lambda text: say(text, err=True), interrupted=stopped)


def _print(reports: Sequence[RegressionReport], output: Output) -> int:
    """Print the verdicts and write the files asked for; returns the exit code, the worst of all reports."""
    from .. import render_regression

    codes = [report.code(output.allow_unsure) for report in reports]
    code = next(worst for worst in (1, 3, 0) if worst in codes)
    table = "\n".join(map(render_regression.markdown, reports))
    if output.junit:
        write_text(output.junit, render_regression.junit(reports, output.allow_unsure))
    if output.markdown:
        write_text(output.markdown, table)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(table)
        except OSError as error:
            raise UserError(f"cannot write {summary}, which GITHUB_STEP_SUMMARY names: {error.strerror}") from None
    if output.as_json:
        say(render_regression.as_json(reports, code), nl=False)
    else:
        say("\n".join(map(render_regression.terminal, reports)), nl=False)
    return code


def _update(path: Path, runs: Sequence[LoadedRun], keys: Sequence[str], margins: Sequence[str]) -> None:
    """Write a baseline of these runs; where they are of several tasks, one for each task and an index of them."""
    from ..baseline import baseline_files, read_baseline, scores_path, write_baseline, write_index
    from ..new_baseline import BaselineRequest, make_baseline

    by_task: dict[str, list[LoadedRun]] = {}
    for each in runs:
        by_task.setdefault(each.record.task, []).append(each)
    listed = baseline_files(path)
    index = listed != [path] or len(by_task) > 1
    if listed == [path] and len(by_task) > 1 and path.is_file():
        raise UserError(f"{path} is of one task, these runs are of {', '.join(by_task)}: name another file")
    command = shlex.join(["gpobench", *sys.argv[1:]])
    baselines_by_file = {}
    for task, group in by_task.items():
        name = Path(task).name.replace(":", "-")
        file = path.with_name(f"{path.stem}-{name}.toml") if index else path
        old = read_baseline(file)[0] if file.is_file() else None
        baselines_by_file[file] = make_baseline(
            group, BaselineRequest(command, keys, _margins_of(margins, group, runs), old)
        )
    # Nothing is written before all of them are made.
    written = [write_baseline(file, *each) for file, each in baselines_by_file.items()]
    if index:
        write_index(path, list(dict.fromkeys([*([] if listed == [path] else listed), *baselines_by_file])))
    for each in runs:
        if each.record.flags.hack:
            say(f"gpobench: {each.folder} has the hack flag, and is now part of a baseline", err=True)
    for file, each in zip(baselines_by_file, written, strict=True):
        _warn_of_wide_margins(file, each)
    numbers = sum(len(claim.number) for each in written for claim in each.row)
    files = [*([path] if index else []), *(f for file in baselines_by_file for f in (file, scores_path(file)))]
    rows = sum(len(each.row) for each in written)
    say(f"wrote {', '.join(map(str, files))}: {numbers} numbers of {rows} rows", err=True)


def _warn_of_wide_margins(file: Path, baseline: Baseline) -> None:
    """Say where a margin is as large as the told gain that it guards."""
    from ..margins import unguarded

    wide = unguarded(baseline.row)
    if wide:
        label, number = max(wide, key=lambda each: each[1].margin / (each[1].gain or 1.0))
        say(
            f"gpobench: {file}: {len(wide)} margins are as large as the gain that they guard, as {label} {number.key}: "
            f"{number.margin:g} for a gain of {number.gain:+.3g}. The floor guards it all the same; --margin 50% is half of each gain",
            err=True,
        )


def _margins_of(margins: Sequence[str], group: Sequence[LoadedRun], runs: Sequence[LoadedRun]) -> list[str]:
    """The margins that concern these runs of one task, without those of a metric that only other tasks have."""
    group_keys, all_keys = ({key for run in part for key in run.after} for part in (group, runs))
    return [text for text in margins if (key := text.rpartition("=")[0]) in group_keys or key not in all_keys]

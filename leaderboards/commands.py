"""What a person types to rank finished runs, to read about them, to hold reported numbers against new ones, and to hand an adapter on."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bench.errors import UserError

if TYPE_CHECKING:
    from .board import LoadedRun

# Nothing heavy above this line: `gpobench --help` loads this module.

FORMATS = ("terminal", "md", "csv", "json", "latex", "html")
Task = Annotated[str | None, typer.Option(help="Only the runs of this task, where there are several.")]
SUFFIXES = {".md": "md", ".csv": "csv", ".json": "json", ".tex": "latex", ".html": "html"}


def leaderboard(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, folders that hold some, or the JSON file of a comparison.")
    ],
    format: Annotated[
        str | None,
        typer.Option("--format", help=" | ".join(FORMATS) + "; default: by the suffix of --out, else terminal."),
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="The row that the others are compared with: a method or a label.")
    ] = "base",
    out: Annotated[Path | None, typer.Option(help="Write the table there instead of printing it.")] = None,
    key: Annotated[
        str | None, typer.Option(help="The scorer/metric that ranks; default: that of the first held-out scorer.")
    ] = None,
    task: Task = None,
    across: Annotated[
        bool,
        typer.Option(
            "--across", help="Sum up runs of several tasks: each one's gain, IQM, probability of improvement."
        ),
    ] = False,
) -> None:
    """Rank finished runs of one task, model and budget, with an interval on every number.

    Rows are methods, averaged over their seeds; the base they started from is one of them. A rank is one more than the
    number of rows that are told to be better, corrected over all pairs; rows that share one cannot be told apart.

    Examples: `gpobench leaderboard runs` · `gpobench leaderboard runs --baseline flow-grpo --out table.md` ·
    `gpobench leaderboard runs/gpo-* runs/sft-* --format latex` · `gpobench leaderboard runs --across`
    """
    if format is None and out is not None and out.suffix not in {**SUFFIXES, ".txt": "", "": ""}:
        raise UserError(f"{out}: name it {', '.join(f'*{s}' for s in SUFFIXES)} or *.txt, or say --format")
    width = max(80, shutil.get_terminal_size((80, 24)).columns) if out is None else 80
    kind = format or (SUFFIXES.get(out.suffix, "terminal") if out else "terminal")
    if kind not in FORMATS:
        from ..bench.registry import unknown

        raise unknown("format", kind, FORMATS)
    from .board import board, left_out, load
    from .render import render

    if across:
        if task is not None or key is not None:
            raise UserError(
                "--across is over all tasks, each by its own first held-out scorer: leave --task and --key out"
            )
        from .aggregate import across as sum_up
        from .aggregate import render as write

        text = write(sum_up(load(runs), baseline, notes=left_out(runs)), kind, width=width)
        typer.echo(text, nl=False) if out is None else _write(out, text)
        return
    made = board(load(runs, task), baseline=baseline, key=key, notes=left_out(runs, task))
    text = render(made, kind, width=width)
    if out is None:
        typer.echo(text, nl=False)
        return
    _write(out, text)


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, folders that hold some, or the JSON file of a comparison.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    baseline: Annotated[
        str, typer.Option(help="The row that the others are compared with: a method or a label.")
    ] = "base",
    key: Annotated[
        str | None, typer.Option(help="The scorer/metric that ranks; default: that of the first held-out scorer.")
    ] = None,
    task: Task = None,
    plots: Annotated[
        Path | None, typer.Option(help="A folder for the curves and the trade-off as SVG and PNG files.")
    ] = None,
) -> None:
    """Write one page about finished runs of one task, model and budget, which opens in any browser without a network.

    It holds the leaderboard, curves over spend, trade-offs, pictures on the same noise, the hardest prompts, settings and
    provenance.

    Examples: `gpobench report runs` · `gpobench report runs -o ocr.html --plots figures`
    """
    from .board import board, left_out, load
    from .report import gather, page
    from .report import plots as draw

    read = load(runs, task)
    made = board(read, baseline=baseline, key=key, notes=left_out(runs, task))
    found = gather(made, read)
    _write(out, page(made, found))
    if plots is not None:
        try:
            files = draw(made, found, plots)
        except OSError as error:
            raise UserError(f"cannot write {plots}: {error.strerror}") from None
        typer.echo(f"wrote {', '.join(map(str, files)) or 'no plots'}", err=True)


def regress(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories, folders that hold some, or a comparison's JSON file.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The baseline: a TOML file, or the name of a built-in one.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="The same, and first do every run that this baseline is made of.")
    ] = None,
    rows: Annotated[
        list[str] | None, typer.Option("--row", help="Only these rows of the baseline; repeatable.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Only the part of the baseline that is of this task, where there are several.")
    ] = None,
    out: Annotated[Path, typer.Option(help="With --run: where run directories are made.")] = Path("runs"),
    jobs: Annotated[int, typer.Option(min=1, help="With --run: runs at once.")] = 1,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="With --run: also those that are done already, as other code may have done them."),
    ] = False,
    allow_unsure: Annotated[
        bool,
        typer.Option(
            "--allow-unsure", help="Exit 0 although some numbers cannot be told, when none is worse or missing."
        ),
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(help="Write the verdicts there as JUnit XML, for a build server.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table there; it also goes to the file in $GITHUB_STEP_SUMMARY.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Judge nothing: write the baseline anew from these runs.")
    ] = False,
    margins: Annotated[
        list[str] | None,
        typer.Option("--margin", help="With --update: how far from it is the same, NUMBER or scorer/metric=NUMBER."),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            "--key", help="With --update: a scorer/metric to guard; default: the training and held-out scorers'."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout; all else goes to stderr.")
    ] = False,
) -> None:
    """Do reported numbers still hold? Same, better, worse or cannot tell, for each number of a baseline.

    Exit code 0: all are the same or better; 1: some are worse; 3: none is worse, but some cannot be told, or these runs do not
    have them (narrow the baseline with --row and --task); 2: cannot be judged.

    Examples: `gpobench regress runs --against leaderboards/tiny.toml` · `gpobench regress --run tiny --junit verdicts.xml` ·
    `gpobench regress runs --against numbers.toml --update --margin 0.03`
    """
    if (against is None) == (run is None):
        raise UserError("name one baseline: --against FILE, or --run FILE to do its runs first")
    if bool(runs) == (run is not None):
        raise UserError(
            "name runs to judge" if run is None else "--run does its own runs: leave RUNS out, or use --against"
        )
    if (margins or keys) and not update:
        raise UserError("--margin and --key say what --update writes: a baseline that stands is not changed by judging")
    if (rows or task) and update:
        raise UserError("--update writes all rows and tasks: name the runs that belong in it instead")
    from . import render_regression
    from .baseline import locate, parts, read
    from .board import left_out, load
    from .regress import judge_all, only, train

    path = locate(str(against or run))
    files = parts(path)
    known = [] if update and not path.is_file() else [(file, *read(file)) for file in files]
    if known and (rows or task):
        known = only(known, rows or (), task)
    folders = list(runs or ())
    if run is not None:
        if not known:
            raise UserError(f"no baseline at {path} that says what to run")
        from ..bench.signals import asked_to_stop

        say = lambda text: typer.echo(text, err=True)
        with asked_to_stop() as stopped:
            folders = train([one for _, one, _ in known], out, say, jobs=jobs, fresh=fresh, interrupted=stopped)
    found = load(folders)
    if update:
        _update(path, found, keys or (), margins or ())
        return
    reports = judge_all(known, found, left_out(folders))
    codes = [report.code(allow_unsure) for report in reports]
    code = next(worst for worst in (1, 3, 0) if worst in codes)
    table = "\n".join(map(render_regression.markdown, reports))
    if junit:
        _write(junit, render_regression.junit(reports, allow_unsure))
    if markdown:
        _write(markdown, table)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(table)
        except OSError as error:
            raise UserError(f"cannot write {summary}, which GITHUB_STEP_SUMMARY names: {error.strerror}") from None
    typer.echo(
        render_regression.as_json(reports, code) if as_json else "\n".join(map(render_regression.terminal, reports)),
        nl=False,
    )
    raise typer.Exit(code)


def _update(path: Path, found: Sequence[LoadedRun], keys: Sequence[str], margins: Sequence[str]) -> None:
    """Write a baseline of these runs; where they are of several tasks, one a task and an index of them."""
    from ..bench.evaluation.record import flagged
    from .baseline import beside, parts, read, write, write_index
    from .regress import compose

    by: dict[str, list[LoadedRun]] = {}
    for one in found:
        by.setdefault(one.record.task, []).append(one)
    listed = parts(path)
    index = listed != [path] or len(by) > 1
    if listed == [path] and len(by) > 1 and path.is_file():
        raise UserError(f"{path} is of one task, these runs are of {', '.join(by)}: name another file")
    command = shlex.join(["gpobench", *sys.argv[1:]])
    made: list[tuple[Path, Any]] = []
    for task, runs in by.items():
        clean = Path(task).name.replace(":", "-")
        part = path.with_name(f"{path.stem}-{clean}.toml") if index else path
        old = read(part)[0] if part.is_file() else None
        made.append((part, compose(runs, keys=keys, margins=_own(margins, runs, found), old=old, command=command)))
    done = [write(part, *one) for part, one in made]
    if index:
        before = [] if listed == [path] else listed
        write_index(path, list(dict.fromkeys([*before, *(part for part, _ in made)])))
    for one in found:
        if flagged(one.record):
            typer.echo(f"gpobench: {one.folder} wears the hack flag, and is now part of a baseline", err=True)
    numbers = sum(len(claim.number) for one in done for claim in one.row)
    files = ", ".join(
        str(f) for f in [*([path] if index else []), *(f for part, _ in made for f in (part, beside(part)))]
    )
    typer.echo(f"wrote {files}: {numbers} numbers of {sum(len(one.row) for one in done)} rows", err=True)


def _own(margins: Sequence[str], runs: Sequence[LoadedRun], found: Sequence[LoadedRun]) -> list[str]:
    """The margins that concern these runs: one of a metric that only another task has is left to that task."""
    mine, all_ = ({key for run in group for key in run.after} for group in (runs, found))
    return [text for text in margins if (key := text.rpartition("=")[0]) in mine or key not in all_]


def export(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write.")],
    push: Annotated[
        str | None, typer.Option(help="owner/name on the model hub: upload the folder there; needs a token.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: a repository that is made stays private.")
    ] = False,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="A data set on the hub that is registered as a benchmark of this task: also write .eval_results for it."
        ),
    ] = None,
) -> None:
    """Write a run's adapter with a model card that says what it scores, how sure that is and what it was paid with.

    Examples: `gpobench export runs/NAME --to card` · `gpobench export runs/NAME --to card --push me/my-lora`
    """
    from ..bench.experiments.export import export as write
    from ..bench.experiments.export import push as upload

    done = write(run, to, repo=push, benchmark=benchmark)
    for warning in done.warnings:
        typer.echo(f"gpobench: {warning}", err=True)
    typer.echo(f"wrote {', '.join(done.files)} to {to}", err=True)
    if push:
        typer.echo(upload(done, push, private=private))


def _write(path: Path, text: str) -> None:
    from ..bench.files import write_atomically

    try:
        write_atomically(path, lambda p: p.write_text(text, "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    typer.echo(f"wrote {path}", err=True)

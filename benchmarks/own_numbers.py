"""The project's own numbers as pages: the table of the README, and leaderboards/tiny.md with every column and the curves.

make board                                         # makes the runs (hours), the baselines, then calls this
python benchmarks/own_numbers.py                   # the pages anew from runs/tiny
python benchmarks/own_numbers.py DIR --print       # the README's tables on stdout, nothing written
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from gpobench.bench.errors import UserError
from gpobench.leaderboards.board import Board, LoadedRun, board, load
from gpobench.leaderboards.render import cell, p_value, rank, render, spend
from gpobench.leaderboards.report import gather, plots

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "leaderboards" / "tiny.md"
README = ROOT / "README.md"
FIGURES = ROOT / "docs"
MARKS = ("<!-- made by benchmarks/own_numbers.py -->", "<!-- end -->")
SHOWN = ("training", "quality", "diversity")  # one column of each role, and the drift


def tables(runs: Sequence[LoadedRun]) -> dict[str, Board]:
    """Task -> its table, the one of most prompts first: it tells most."""
    tasks = dict.fromkeys(run.record.task for run in runs)
    found = {task: board([run for run in runs if run.record.task == task]) for task in tasks}
    return dict(sorted(found.items(), key=lambda item: (-prompts(item[1]), item[0])))


def prompts(table: Board) -> int:
    """How many the model was judged on."""
    base = next(row for row in table.rows if row.kind == "base")
    return base.cells[table.key].after.n


def short(table: Board, roles: Sequence[str] = SHOWN) -> list[str]:
    """Rank, gains by role, drift and spend: what fits a page. One line a row. roles: further columns; of one, no drift."""
    shown = [key for role in roles if (key := _first(table, role))]
    drift = next((name for row in table.rows for name in row.cmmd), "") if len(roles) > 1 else ""
    base = next(row for row in table.rows if row.kind == "base")
    first = cell(base.cells[table.key].after)
    head = ["rank", "method", f"{table.key} (held out), base {first}", "p (Holm)"]
    head += [f"{key} (training scorer)" if key == _first(table, "training") else key for key in shown]
    head += [f"CMMD ({drift})"] if drift else []
    marked = any(row.hacked or row.single_seed for row in table.rows)
    head += ["images", "updates", "seconds", *(["marks"] if marked else [])]
    lines = [head, ["---"] * len(head)]
    for row in table.rows:
        if row.kind == "base":
            continue
        line = [rank(row, table.rows), row.label, cell(row.versus, sign=True), p_value(row.holm)]
        line += [cell(row.cells[key].delta, sign=True) if key in row.cells else "" for key in shown]
        line += [cell(row.cmmd.get(drift))] if drift else []
        line += [spend(c, row.spent[c]) for c in ("images", "updates", "seconds")]
        marks = ["hack" if row.hacked else "", "one seed" if row.single_seed else ""]
        line += [", ".join(filter(None, marks))] if marked else []
        lines.append(line)
    return [f"| {' | '.join(text.replace('<', '&lt;') for text in line)} |" for line in lines]


def _first(table: Board, role: str) -> str:
    """The column of this role: the metric of the same name as the one that ranks, else the first."""
    metric, keys = table.key.partition("/")[2], [c.key for c in table.columns if c.role == role]
    return next((key for key in keys if key.partition("/")[2] == metric), next(iter(keys), ""))


def ground(runs: Sequence[LoadedRun]) -> str:
    """Where the numbers come from, in a sentence."""
    first = runs[0].record
    commits = sorted({str(run.record.provenance.get("revision", ""))[:12] for run in runs})
    machines = sorted({str(run.record.provenance.get("machine", "")) for run in runs})
    seeds = sorted({run.record.seed for run in runs})
    bounds = ", ".join(f"{k} {v:,.0f}" for k, v in first.config["budget"].items() if k != "name")
    return (
        f"{len(runs)} runs on {first.model}, budget {bounds} each, seeds {', '.join(map(str, seeds))}, commit {', '.join(commits)}, "
        f"torch {first.provenance['versions']['torch']}, {', '.join(machines)}."
    )


def readme(found: dict[str, Board], runs: Sequence[LoadedRun]) -> str:
    """The part between the marks."""
    lines = [f"`make board`: {ground(runs)}", ""]
    for task, table in found.items():
        split = table.evaluation.get("split", "test")
        lines += [f"**{task}**, {prompts(table)} {split} prompts", "", *short(table, roles=["training"]), ""]
    return "\n".join(lines)


def page(found: dict[str, Board], runs: Sequence[LoadedRun]) -> str:
    """leaderboards/tiny.md."""
    lines = [
        "# The methods on the embedded model",
        "",
        f"Made by `make board`: {ground(runs)}",
        "`leaderboards/tiny.toml` guards these numbers; how the table is made and read: [docs/leaderboards.md](../docs/leaderboards.md).",
        "",
    ]
    for task, table in found.items():
        lines += [f"## {task}", "", *short(table), "", f"![curves](../docs/board-{task}-curves.png)"]
        lines += ["", f"![score against drift](../docs/board-{task}-pareto.png)", ""]
        lines += ["<details><summary>every column</summary>", "", render(table, "md"), "</details>", ""]
    return "\n".join(lines)


def figures(found: dict[str, Board], runs: Sequence[LoadedRun]) -> None:
    """docs/board-TASK-*.png."""
    for task, table in found.items():
        mine = [run for run in runs if run.record.task == task]
        with TemporaryDirectory() as folder:
            for file in plots(table, gather(table, mine), Path(folder)):
                if file.suffix == ".png":
                    shutil.copy(file, FIGURES / f"board-{task}-{file.name}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="?", type=Path, default=ROOT / "runs" / "tiny")
    options.add_argument("--print", action="store_true")
    said = options.parse_args()
    try:
        runs = load([said.runs])
    except UserError as error:
        raise SystemExit(f"own_numbers: {error}") from None
    found = tables(runs)
    if said.print:
        print(readme(found, runs))
        return
    text = README.read_text("utf-8")
    if any(mark not in text for mark in MARKS):
        raise SystemExit(f"own_numbers: {README.name} has no place for the table: put {MARKS[0]} and {MARKS[1]} there")
    PAGE.write_text(page(found, runs), "utf-8")
    figures(found, runs)
    head, _, rest = text.partition(MARKS[0])
    _, _, tail = rest.partition(MARKS[1])
    README.write_text(f"{head}{MARKS[0]}\n\n{readme(found, runs)}\n{MARKS[1]}{tail}", "utf-8")


if __name__ == "__main__":
    main()

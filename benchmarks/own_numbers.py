"""Writes the project's own numbers into pages: the table of docs/board.md, and leaderboards/tiny.md with every column and the curves.

make board                                         # makes the runs (hours), the baselines, then runs this script
python benchmarks/own_numbers.py                   # writes the pages from runs/tiny
python benchmarks/own_numbers.py DIR --print       # the tables of docs/board.md on stdout, nothing written
python benchmarks/own_numbers.py --shipped         # docs/board.md and tiny-*.toml by the present statistics, from the shipped scores
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from marked_section import MarkedSection

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.ranking import verdict_beside
from gpobench.leaderboards.baseline import baseline_files, find_baseline, read_baseline, write_baseline
from gpobench.leaderboards.baseline_as_runs import runs_of_baseline
from gpobench.leaderboards.board import Board
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.figures import write_figures
from gpobench.leaderboards.formatting import cell, p_value, rank, spend, transfer
from gpobench.leaderboards.margins import choose_rules
from gpobench.leaderboards.new_baseline import report_numbers
from gpobench.leaderboards.regress import LoadedBaseline
from gpobench.leaderboards.render import render
from gpobench.leaderboards.report_data import read_report_data
from gpobench.leaderboards.runs import LoadedRun, load_runs

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "leaderboards" / "tiny.md"
BOARD_PAGE = ROOT / "docs" / "board.md"
FIGURES = ROOT / "docs"
SECTION = MarkedSection(BOARD_PAGE, "own_numbers")
SHOWN_ROLES = ("training", "quality", "diversity")  # one column of each role, and the drift


def tables(runs: Sequence[LoadedRun]) -> dict[str, Board]:
    """Task -> its board, the one with most prompts first."""
    tasks = dict.fromkeys(run.record.task for run in runs)
    boards = {task: build_board([run for run in runs if run.record.task == task]) for task in tasks}
    return dict(sorted(boards.items(), key=lambda item: (-prompts(item[1]), item[0])))


def prompts(table: Board) -> int:
    """How many prompts the model was evaluated on."""
    return table.base_row.cells[table.key].after.n


def short(table: Board, roles: Sequence[str] = SHOWN_ROLES) -> list[str]:
    """The lines of a Markdown table that fits a page: rank, gains by role, drift and spend of each row.

    roles: one column is shown for each; with a single role the drift is left out.
    """
    verdict = _verdict(table)
    shown = [*([verdict] if verdict else []), *(key for role in roles if (key := _first(table, role)))]
    drift = next((name for row in table.rows for name in row.cmmd), "") if len(roles) > 1 else ""
    first = cell(table.base_row.cells[table.key].after)
    head = ["rank", "method", f"{table.key} (held out), base {first}", "p (Holm)"]
    head += [f"{key} (training scorer)" if key == _first(table, "training") else key for key in shown]
    head += ["transfer", *([f"CMMD ({drift})"] if drift else [])]
    has_flags = any(row.hack or row.single_seed for row in table.rows)
    head += ["images", "updates", "seconds", *(["marks"] if has_flags else [])]
    lines = [head, ["---"] * len(head)]
    for row in table.rows:
        if row.kind == "base":
            continue
        line = [rank(row), row.label, cell(row.versus, sign=True), p_value(row.holm)]
        line += [cell(row.cells[key].delta, sign=True) if key in row.cells else "" for key in shown]
        line += [transfer(row), *([cell(row.cmmd.get(drift))] if drift else [])]
        line += [spend(c, row.spent[c]) if c in row.spent else "" for c in ("images", "updates", "seconds")]
        flags = ["hack" if row.hack else "", "one seed" if row.single_seed else ""]
        line += [", ".join(filter(None, flags))] if has_flags else []
        lines.append(line)
    return [f"| {' | '.join(text.replace('<', '&lt;') for text in line)} |" for line in lines]


def _verdict(table: Board) -> str | None:
    """The share of right images by the scorer of the key, which stands beside it."""
    return verdict_beside(table.key, [c.key for c in table.columns])


def _first(table: Board, role: str) -> str:
    """The column of this role: the metric of the same name as the one that ranks, else the first."""
    metric, keys = table.key.partition("/")[2], [c.key for c in table.columns if c.role == role]
    return next((key for key in keys if key.partition("/")[2] == metric), next(iter(keys), ""))


def run_facts(runs: Sequence[LoadedRun]) -> str:
    """The model, budget, seeds, commits and machines of the runs, in a sentence."""
    first = runs[0].record
    commits = sorted({str(run.record.provenance.get("revision", ""))[:12] for run in runs})
    machines = sorted({str(run.record.provenance.get("machine", "")) for run in runs})
    seeds = sorted({run.record.seed for run in runs})
    bounds = ", ".join(f"{k} {v:,.0f}" for k, v in first.config["budget"].items() if k != "name")
    return (
        f"{len(runs)} runs on {first.model}, budget {bounds} each, seeds {', '.join(map(str, seeds))}, commit {', '.join(commits)}, "
        f"torch {first.provenance['versions']['torch']}, {', '.join(machines)}."
    )


def board_page(boards: dict[str, Board], runs: Sequence[LoadedRun]) -> str:
    """The text between the two markers of docs/board.md."""
    lines = [f"`make board`: {run_facts(runs)}", ""]
    for task, table in boards.items():
        split = table.evaluation.get("split", "test")
        lines += [f"**{task}**, {prompts(table)} {split} prompts", "", *short(table, roles=["training"]), ""]
    return "\n".join(lines)


def page(boards: dict[str, Board], runs: Sequence[LoadedRun]) -> str:
    """The text of leaderboards/tiny.md."""
    lines = [
        "# The methods on the embedded model",
        "",
        f"Made by `make board`: {run_facts(runs)}",
        "`leaderboards/tiny.toml` guards these numbers; how the table is made and read: [docs/leaderboards.md](../docs/leaderboards.md).",
        "",
    ]
    for task, table in boards.items():
        lines += [f"## {task}", "", *short(table), "", f"![curves](../docs/board-{task}-curves.png)"]
        lines += ["", f"![score against drift](../docs/board-{task}-pareto.png)", ""]
        lines += [f"![search against training](../docs/board-{task}-frontier.png)", ""] if table.frontiers else []
        lines += ["<details><summary>every column</summary>", "", render(table, "md"), "</details>", ""]
    return "\n".join(lines)


def shipped_board(path: Path) -> Board:
    """The board of a shipped baseline's scores, without spend and flags."""
    return build_board(runs_of_baseline(LoadedBaseline(path, *read_baseline(path))))


def restate_baseline(path: Path) -> None:
    """Write gains, intervals, and margins that are shares of a gain anew into a shipped baseline, from the scores beside it."""
    baseline, scores = read_baseline(path)
    rules = choose_rules(
        [], list(dict.fromkeys(key for _, key in scores.by)), [c.label for c in baseline.row], baseline.row
    )
    board = shipped_board(path)
    numbers = report_numbers(board, scores.by, rules, scores.strata, baseline.digits)
    rows = tuple(c.model_copy(update={"number": numbers.of_row(c.label)}) for c in baseline.row)
    write_baseline(path, baseline.model_copy(update={"row": rows}), scores)


def restated(page_text: str) -> str:
    """docs/board.md with ranks, gains and p computed anew from the shipped scores; the columns of spend stay."""
    lines: list[str] = []
    pending = page_text.splitlines()
    while pending:
        line = pending.pop(0)
        lines.append(line)
        if not (task := re.match(r"\*\*(\w+)\*\*, [\d,]+ \w+ prompts", line)):
            continue
        board = shipped_board(ROOT / "leaderboards" / f"tiny-{task[1]}.toml")
        lines.append(pending.pop(0))
        table = [[cell.strip() for cell in pending.pop(0).strip("|").split("|")] for _ in range(len(board.rows) + 1)]
        head, _, *old = table
        spends = {row[1]: row[head.index("images") :] for row in old}
        made = [[cell.strip() for cell in line.strip("|").split("|")] for line in short(board, roles=["training"])]
        numbers = made[0].index("images")
        rows = [made[0][:numbers] + head[head.index("images") :]]
        rows += [["---"] * len(rows[0]), *(row[:numbers] + spends[row[1]] for row in made[2:])]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def figures(boards: dict[str, Board], runs: Sequence[LoadedRun]) -> None:
    """Write docs/board-TASK-*.png."""
    for task, table in boards.items():
        group = [run for run in runs if run.record.task == task]
        with TemporaryDirectory() as folder:
            for file in write_figures(table, read_report_data(table, group), Path(folder)):
                if file.suffix == ".png":
                    shutil.copy(file, FIGURES / f"board-{task}-{file.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=Path, default=ROOT / "runs" / "tiny")
    parser.add_argument("--print", action="store_true")
    parser.add_argument(
        "--shipped",
        action="store_true",
        help="restate docs/board.md and leaderboards/tiny-*.toml by the present statistics, from the shipped scores",
    )
    options = parser.parse_args()
    if options.shipped:
        for path in baseline_files(find_baseline("tiny")):
            restate_baseline(path)
        BOARD_PAGE.write_text(restated(BOARD_PAGE.read_text("utf-8")), "utf-8")
        return
    try:
        runs = load_runs([options.runs])
    except UserError as error:
        raise SystemExit(f"own_numbers: {error}") from None
    boards = tables(runs)
    if options.print:
        print(board_page(boards, runs))
        return
    SECTION.check()
    PAGE.write_text(page(boards, runs), "utf-8")
    figures(boards, runs)
    SECTION.write(board_page(boards, runs))


if __name__ == "__main__":
    main()

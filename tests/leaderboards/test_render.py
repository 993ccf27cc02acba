"""The six formats of a board have the same numbers, and no name breaks one of them."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.record import Flags, Number
from gpobench.bench.stats.intervals import Estimate
from gpobench.bench.stats.law import RankInterval
from gpobench.leaderboards import paper_numbers
from gpobench.leaderboards.board import Board
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.formatting import cell, csv_cell, number, p_value, plain, spend
from gpobench.leaderboards.render import render
from gpobench.leaderboards.render_markup import LATEX
from gpobench.leaderboards.runs import load_runs

FORMATS = ("terminal", "md", "csv", "json", "latex", "html")
KEY = "other/exact"
HOSTILE = r"""<script>alert("1")</script> | a & b_c $x$ {~^#%} \end{tabular} \\ `*[bold]x[/]*` 'q', "r" ![i](j)"""


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, make_at: Callable[..., Path], before_and_after: Callable[..., Any]
) -> Board:
    """Three methods, one of them invalid, one with the hack flag; and the paper numbers of another model."""
    run_dir = tmp_path_factory.mktemp("runs")
    for s in range(2):
        make_at(
            run_dir / f"gpo{s}",
            "gpo",
            s,
            0.2,
            tuning={"trials": 8},
            cmmd={"clip": Number(mean=0.1, ci=(0.0, 0.2), n=9)},
        )
    hack = {"engine/exact": before_and_after(0.1, 3), KEY: before_and_after(0.0, 4)}
    make_at(run_dir / "awm", "awm", 0, scores_by_key=hack, flags=Flags(hack=True, invalid=False))
    make_at(run_dir / "sft", "sft", 0, 0.0, flags=Flags(hack=False, invalid=True))
    return replace(build_board(load_runs([run_dir])), reported=tuple(paper_numbers.matching("ocr", "sd35m")))


def named(b: Board, name: str) -> Board:
    """The board with one row, its scorer, the task and a note of this name."""
    rows = tuple(replace(r, label=name) if r.label == "gpo" else r for r in b.rows)
    return replace(b, rows=rows, task=name, notes=(name, *b.notes))


# Numbers


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.45, ".450"),
        (-0.04, "-.040"),
        (1.0, "1.000"),
        (10.5, "10.500"),
        (20.0, "20.000"),
        (math.nan, "-"),
        (0.0, ".000"),
    ],
)
def test_a_number_loses_only_its_leading_zero(x: float, expected: str) -> None:
    assert number(x) == expected and number(abs(x), sign=True) in (f"+{expected.lstrip('-')}", "-")


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [
        (0.45, 0.41, 0.49, ".450 [.41, .49]"),
        (21.7234, 21.7, 21.746, "21.723 [21.70, 21.75]"),
        (0.2791, 0.2781, 0.2801, ".2791 [.278, .280]"),
        (1.0, 1.0, 1.0, "1.000 [1.00, 1.00]"),
        (0.5, math.nan, math.nan, ".500 [too few]"),
        (math.nan, math.nan, math.nan, "not scored"),
    ],
)
def test_a_cell_shows_the_interval(mean: float, low: float, high: float, expected: str) -> None:
    assert cell(Estimate(mean, low, high, 9)) == expected


def test_small_texts() -> None:
    assert cell(Estimate(0.1, -0.05, 0.25, 9), sign=True) == "+.100 [-.05, +.25]" and cell(None) == ""
    assert [p_value(p) for p in (math.nan, 0.0004, 0.0123, 1.0)] == ["", "<.001", ".012", "1.000"]
    assert spend("nfe", 40_000.4) == "40,000" and spend("flops", 6.7195e12) == "6.72e+12"
    assert plain("a\x1b[31m\nb\u202ec\tü→") == "a?[31m b?c ü→"


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1", "-", "+nan1"]
)
def test_no_cell_is_a_formula(text: str) -> None:
    assert csv_cell(text) == f"'{plain(text)}"


@given(st.floats() | st.integers())
def test_numbers_and_words_are_cells_as_they_are(number: float) -> None:
    assert csv_cell(f"{number:+.6g}") == f"{number:+.6g}" and csv_cell("gpo, 2=") == "gpo, 2=" and csv_cell("") == ""


# Each format


def cells_of(text: str) -> list[list[str]]:
    class Reader(HTMLParser):
        rows: list[list[str]] = []
        tags: list[str] = []
        inside = False

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.append(tag)
            if tag == "tr":
                self.rows.append([])
            if tag in ("td", "th"):
                self.rows[-1].append("")
                self.inside = True

        def handle_endtag(self, tag: str) -> None:
            self.inside = self.inside and tag not in ("td", "th")

        def handle_data(self, data: str) -> None:
            if self.inside:
                self.rows[-1][-1] += data

    reader = Reader()
    reader.rows, reader.tags = [], []
    reader.feed(text)
    assert set(reader.tags) <= set("html meta title style h1 div table tr th td p ul li".split())
    return reader.rows


def markdown_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    split = [re.findall(r"(?:\\.|[^\\|])+", line) for line in lines]
    return [[re.sub(r"\\(.)", r"\1", part).strip() for part in parts] for parts in split]


def latex_rows(text: str) -> list[list[str]]:
    body = text.partition(r"\hline")[2].partition(r"\end{tabular}")[0].replace("\\hline\n", "").strip()
    rows: list[list[str]] = []
    for line in body.splitlines():
        assert line.endswith(r" \\")
        parts = line.removesuffix(r" \\").split(" & ")
        for raw, escaped in LATEX.items():
            parts = [part.replace(escaped, f"\0{ord(raw)};") for part in parts]
        assert not any(set(part) & set("\\{}$&#_%~^<>") for part in parts), line
        rows.append([re.sub("\0(\\d+);", lambda m: chr(int(m[1])), part) for part in parts])
    return rows


def test_the_full_tables_say_the_same(made: Board) -> None:
    tables = [cells_of(render(made, "html")), latex_rows(render(made, "latex"))]
    assert tables[0] == tables[1] and len(tables[0]) == 5
    lines = [line for line in render(made, "md").splitlines() if line.startswith("| ")]
    assert len(lines) == 6 and all(f"{r.label} |" in lines[2 + i] for i, r in enumerate(made.rows))
    head, *rows = tables[0]
    assert all(len(r) == len(head) for r in rows)
    gpo = dict(zip(head, rows[0], strict=True))
    assert (
        gpo["rank"] == "1" and gpo["method"] == "gpo" and gpo["seeds"] == "0, 1" and gpo["marks"] == "tuned in 8 trials"
    )
    assert gpo[f"{KEY} minus base"] == cell(made.rows[0].versus, sign=True)
    assert " → " in gpo[f"{KEY} (held-out): before → after"] and gpo["CMMD to the base (clip)"].startswith(".100")
    marks = {r[1]: r[-1] for r in rows}
    assert marks["awm"] == "one seed; HACK" and "INVALID" in marks["sft"]
    assert {r[1]: r[0] for r in rows}["sft"] == "-"


def test_programs_read_it(made: Board) -> None:
    text = render(made, "json")
    output = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    gpo = next(r for r in output["rows"] if r["label"] == "gpo")
    mine = made.rows[0].cells[KEY]
    metric = next(m for m in gpo["metrics"] if m["name"] == KEY)
    assert metric["value"] == mine.after.mean and (metric["ci_low"], metric["ci_high"]) == (
        mine.after.low,
        mine.after.high,
    )
    assert (
        metric["n_prompts"] == 40 and metric["n_images"] == 80 and metric["n_errors"] == 0 and metric["split"] == "test"
    )
    assert gpo["train_seeds"] == [0, 1] and gpo["flags"] == {
        "hack": False,
        "single_seed": False,
        "invalid": False,
        "fault": False,
    }
    awm = next(r for r in output["rows"] if r["label"] == "awm")
    assert awm["flags"]["hack"] and "transfer below 0.4" in awm["hack_reasons"][0] and awm["transfer"]["ci_high"] < 0.4
    assert (gpo["transfer"]["held_out"], gpo["transfer"]["training"], gpo["transfer"]["unit"]) == (
        KEY,
        "engine/exact",
        "sd",
    )
    assert gpo["transfer"]["ci_low"] < gpo["transfer"]["value"] < gpo["transfer"]["ci_high"]
    assert gpo["provenance"]["kind"] == "reproduced" and len(gpo["provenance"]["source"]) == 2
    assert (
        output["task"]["name"] == "ocr"
        and output["base_model"]["revision"] == "w1"
        and output["budget"] == {"nfe": 1000.0}
    )
    assert {r["provenance"]["kind"] for r in output["reported"]} == {"reported"}
    rows = list(csv.DictReader(io.StringIO(render(made, "csv"))))
    assert [r["label"] for r in rows[:4]] == [r.label for r in made.rows] and len(rows) == 4 + len(made.reported)
    assert float(rows[0]["transfer low"]) == pytest.approx(gpo["transfer"]["ci_low"], rel=1e-5)
    assert float(rows[0][f"{KEY} after"]) == pytest.approx(mine.after.mean, rel=1e-5)
    assert {r["provenance"] for r in rows[4:]} == {"reported"} and all(
        not r["rank"] and r["reported value"] for r in rows[4:]
    )


@pytest.mark.parametrize("width", [70, 100, 200])
def test_a_terminal_gets_what_fits(made: Board, width: int) -> None:
    text = render(made, width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert KEY in text and cell(made.rows[0].cells[KEY].after) in text and "one training seed" in text
    assert ("More columns" in text) is (width < 200) and ("engine/exact" in text.split("\n\n")[1]) is (width > 70)
    assert "Reported elsewhere" in text and "flow-grpo, accuracy: 0.92 fraction (with KL" in " ".join(text.split())


def test_an_unknown_format_is_refused(made: Board) -> None:
    with pytest.raises(UserError, match="did you mean 'latex'"):
        render(made, "latx")


def test_both_ends_of_a_rank_are_shown(made: Board) -> None:
    rows = tuple(replace(r, rank=RankInterval(1, 4)) for r in made.rows)
    assert all(line.startswith("1-4 ") for line in render(replace(made, rows=rows)).split("\n\n")[1].splitlines()[1:])


# No name can break it


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(min_size=1, max_size=80))
@example(name=HOSTILE)
@example(name="a|b\n| c | d |\r\n<td>")
@example(name="\\")
@example(name=r"\|")
@example(name="汉字" * 30)
def test_no_name_breaks_a_table(made: Board, name: str) -> None:
    b, clean = named(made, name), plain(name)
    assert all(sum(clean.strip() == part.strip() for part in r) == 1 for r in cells_of(render(b, "html"))[1:2])
    assert {len(r) for r in cells_of(render(b, "html"))} == {len(cells_of(render(made, "html"))[0])}
    assert latex_rows(render(b, "latex"))[1][1] == clean
    rows = markdown_rows(render(b, "md"))
    assert {len(r) for r in rows if len(r) > 1} == {len(rows[0])} and rows[2][1] == clean.strip()
    assert list(csv.DictReader(io.StringIO(render(b, "csv"), newline="")))[0]["label"] == csv_cell(name)
    assert json.loads(render(b, "json"))["rows"][0]["label"] == name
    text = render(b)
    assert max(map(cell_len, text.splitlines())) <= 80 and "\x1b" not in text

"""A search against training: the base at one candidate, its result at the last, and a break-even that agrees with brute force."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gpobench.bench.errors import UserError
from gpobench.bench.stats import intervals
from gpobench.bench.stats.intervals import Contrast, Estimate
from gpobench.leaderboards.board import Board
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.figures import write_figures
from gpobench.leaderboards.frontier import ServedImages, break_even, cheapest_nfe, trained_row
from gpobench.leaderboards.page import page
from gpobench.leaderboards.render import render
from gpobench.leaderboards.report_data import read_report_data
from gpobench.leaderboards.runs import load_runs

Make = Callable[..., Path]
NFE = 10  # of one image
SHARES = {1: 0.0, 2: 0.4, 4: 0.75, 8: 1.0}  # candidates -> the part of the whole gain


def exact(mean: float) -> Estimate:
    return Estimate(mean, mean, mean, 100)


# The number of served images


@pytest.mark.parametrize("seed", range(12))
def test_the_number_of_served_images_is_that_of_a_search_over_all_numbers(seed: int) -> None:
    """Brute force: the first S whose image costs less than any search, of a fine grid, that gains as much."""
    rng = np.random.default_rng(seed)
    gains = np.array([0.0, *np.cumsum(rng.uniform(0.01, 0.1, 3))])
    gains[2] -= 0.12 * (seed % 3 == 0)  # a search may lose again: the cheapest that gains as much is what counts
    costs, spent = [float(NFE * n) for n in SHARES], float(rng.integers(1_000, 200_000))
    gain = float(rng.uniform(0.005, gains.max()))
    grid = np.geomspace(costs[0], costs[-1], 400_001)
    curve = np.interp(np.log(grid), np.log(costs), np.maximum.accumulate(gains))
    cheapest = grid[np.argmax(curve >= gain)]
    served = np.arange(1, 2_000_000)
    first = served[np.argmax(NFE + spent / served <= cheapest)]

    row = trained_row("gpo", exact(gain), spent, NFE, costs, [exact(gain - g) for g in gains])
    assert row.images.limit == "" and row.images == row.low == row.high
    assert math.ceil(row.images.count) == pytest.approx(first, rel=2e-4, abs=1)
    assert row.nfe(NFE, row.images.count) == pytest.approx(cheapest, rel=1e-4)


def test_beyond_the_largest_number_of_candidates_nothing_is_extrapolated() -> None:
    costs, gains = [10.0, 20.0, 40.0], [0.0, 0.1, 0.2]
    above = trained_row("gpo", exact(0.9), 120_000, NFE, costs, [exact(0.9 - g) for g in gains])
    far_above = trained_row("gpo", exact(9.0), 120_000, NFE, costs, [exact(9.0 - g) for g in gains])
    assert above.images == far_above.images == ServedImages(4_000.0, "at most")  # as best-of-4 costs there
    assert trained_row("gpo", exact(-0.1), 1e5, NFE, costs, [exact(-0.1 - g) for g in gains]).images.count == math.inf
    assert trained_row("gpo", exact(0.0), 1e5, NFE, costs, [exact(0.0 - g) for g in gains]).images.count == math.inf


def test_a_larger_gain_never_needs_more_images() -> None:
    costs, gains = [10.0, 20.0, 40.0, 80.0], np.array([0.0, 0.1, 0.08, 0.3])
    counts = [
        trained_row("gpo", exact(g), 1e5, NFE, costs, [exact(g - x) for x in gains]).images.count
        for g in np.linspace(-0.1, 0.5, 200)
    ]
    assert all(a >= b for a, b in zip(counts, counts[1:], strict=False)) and counts[0] == math.inf


def test_a_single_point_bounds_the_number_from_one_side() -> None:
    assert cheapest_nfe([40.0], [0.1]) == (40.0, "at least")
    assert break_even(3_000, NFE, cheapest_nfe([40.0], [0.1])) == ServedImages(100.0, "at most")
    assert break_even(3_000, NFE, cheapest_nfe([40.0], [-0.1])) == ServedImages(100.0, "at least")
    assert math.isnan(break_even(3_000, NFE, cheapest_nfe([40.0], [math.nan])).count)


def test_the_interval_of_the_number_holds_the_true_one() -> None:
    """Simulated: a row whose true gain lies between two points of the search; at least 93 % of 250 intervals hold the number."""
    rng, prompts, held = np.random.default_rng(5), 60, 0
    costs, true, gain, spent = [10.0, 20.0, 40.0, 80.0], np.array([0.0, 0.1, 0.2, 0.3]), 0.16, 30_000.0
    number = break_even(spent, NFE, cheapest_nfe(costs, list(gain - true))).count
    for _ in range(250):
        shared = rng.normal(0, 0.2, prompts)  # what a prompt makes of any change
        ours = gain + shared + rng.normal(0, 0.2, prompts)
        points = [g + (g > 0) * (shared + rng.normal(0, 0.2, prompts)) for g in true]
        own, *behind = intervals.crossed([Contrast([ours]), *(Contrast([ours], [p]) for p in points)])
        row = trained_row("gpo", own, spent, NFE, costs, behind)
        assert row.low.count <= row.images.count <= row.high.count
        held += (row.low.count <= number or row.low.limit == "at most") and number <= row.high.count
    assert held >= 0.93 * 250, held


# Of runs


@pytest.fixture
def folders(make: Make, with_frontier: Make) -> list[Path]:
    trained = [make(f"{m}{s}", m, s, g, spent={"nfe": 1200.0}) for m, g in (("gpo", 0.1), ("awm", 0.5)) for s in (0, 1)]
    searches = [with_frontier(make(f"b{s}", "best-of-n", s, 0.2), SHARES) for s in (0, 1)]
    return [*trained, make("sft", "sft", 0, -0.3), *searches]


def test_the_frontier_is_the_base_at_one_candidate_and_the_row_at_the_last(folders: list[Path]) -> None:
    board = build_board(load_runs(folders))
    (frontier,) = board.frontiers
    assert (frontier.label, frontier.key, frontier.nfe_an_image) == ("best-of-n", board.key, NFE)
    first, *_, last = frontier.points
    assert (first.gain.mean, first.gain.low, first.gain.high) == (0.0, 0.0, 0.0) and first.nfe == NFE
    delta = next(r for r in board.rows if r.label == "best-of-n").cells[board.key].delta
    assert delta is not None and last.gain.mean == pytest.approx(delta.mean, rel=1e-12)
    assert (last.gain.low, last.gain.high) == pytest.approx((delta.low, delta.high), rel=1e-9)
    assert [p.nfe for p in frontier.points] == [10, 20, 40, 80]
    assert [p.gain.mean for p in frontier.points] == pytest.approx([delta.mean * share for share in SHARES.values()])
    assert all(p.gain.low < p.gain.mean < p.gain.high for p in frontier.points[1:]) and frontier.is_measured


def test_each_trained_row_has_its_number(folders: list[Path]) -> None:
    board = build_board(load_runs(folders))
    (frontier,) = board.frontiers
    rows = {row.label: row for row in frontier.trained}
    assert set(rows) == {"gpo", "awm", "sft"}
    nfe = np.exp(np.interp(rows["gpo"].gain.mean, [p.gain.mean for p in frontier.points], np.log([10, 20, 40, 80])))
    assert rows["gpo"].images == ServedImages(pytest.approx(1200 / (nfe - NFE)), "")
    assert rows["gpo"].low.count < rows["gpo"].images.count < rows["gpo"].high.count
    assert rows["awm"].images == ServedImages(pytest.approx(1200 / 70), "at most")
    assert rows["sft"].images.count == math.inf


def shown(board: Board, format: str) -> str:
    return " ".join(render(board, format, width=120).split())


def test_every_format_states_the_number_and_what_bounds_it(folders: list[Path]) -> None:
    board = build_board(load_runs(folders))
    for format in ("terminal", "md", "html", "latex"):
        text = shown(board, format)
        assert (
            "Against best-of-n" in text and "at most 18: gains more than best-of-8" in text and "never: no gain" in text
        )
    (found,) = json.loads(render(board, "json"))["frontiers"]
    assert [p["candidates"] for p in found["points"]] == list(SHARES)
    assert {r["label"]: r["cheaper_from"]["bound"] for r in found["trained"]} == {
        "gpo": None,
        "awm": "at most",
        "sft": None,
    }
    assert {r["label"]: r["cheaper_from"]["never"] for r in found["trained"]}["sft"]
    table = (
        pd.read_csv(folders[0].parent / "t.csv")
        if (folders[0].parent / "t.csv").write_text(render(board, "csv"))
        else None
    )
    assert table is not None
    column = table.set_index("label")["served images until cheaper than best-of-n"]
    assert (
        column["awm"] == pytest.approx(1200 / 70, rel=1e-5) and math.isinf(column["sft"]) and math.isnan(column["base"])
    )


def test_the_page_and_the_figures_show_it(folders: list[Path], tmp_path: Path) -> None:
    runs = load_runs(folders)
    board = build_board(runs)
    data = read_report_data(board, runs)
    text = page(board, data)
    script = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert [p["nfe"] for p in script["frontiers"][0]["points"]] == [10, 20, 40, 80] and 'id="frontier-chart-0"' in text
    assert {row["label"] for row in script["frontiers"][0]["rows"]} == {"gpo", "awm", "sft"}
    names = {path.name for path in write_figures(board, data, tmp_path / "figures")}
    assert {"frontier.svg", "frontier.png"} <= names
    without = build_board(load_runs(folders[:2]))
    assert without.frontiers == () and "Against" not in render(without, "md")


def test_a_record_of_an_earlier_version_has_one_point_and_says_so(make: Make) -> None:
    spent = {"nfe": 80.0 * 40, "images": 80.0 * 4}  # best-of-4
    runs = load_runs([make("b", "best-of-n", 0, 0.2, spent=spent), make("g", "gpo", 0, 0.1), make("a", "awm", 0, 0.5)])
    board = build_board(runs)
    (frontier,) = board.frontiers
    ((point,), rows) = frontier.points, {row.label: row for row in frontier.trained}
    assert (point.candidates, point.nfe, frontier.nfe_an_image, frontier.is_measured) == (4, 40, NFE, False)
    assert rows["gpo"].images == ServedImages(pytest.approx(1000 / 30), "at least")
    assert rows["awm"].images == ServedImages(pytest.approx(1000 / 30), "at most")
    text = shown(board, "md")
    assert "is the only one with a gain" in text and "at least 34" in text


def test_a_key_that_was_not_evaluated_on_the_way_has_one_point(make: Make, with_frontier: Make) -> None:
    folders = [with_frontier(make("b", "best-of-n", 0, 0.2), SHARES, ["engine/exact"]), make("g", "gpo", 0, 0.1)]
    (frontier,) = build_board(load_runs(folders), key="other/exact").frontiers
    assert len(frontier.points) == 1 and not frontier.is_measured and frontier.points[0].nfe == 80
    (frontier,) = build_board(load_runs(folders), key="engine/exact").frontiers
    assert len(frontier.points) == 4


def test_scores_that_were_edited_are_refused(folders: list[Path]) -> None:
    table = pd.read_parquet(folders[-1] / "frontier.parquet")
    table.assign(value=table.value + 0.1).to_parquet(folders[-1] / "frontier.parquet", index=False)
    with pytest.raises(UserError, match=r"frontier\.parquet was changed or cut"):
        build_board(load_runs(folders))


def test_a_search_that_is_no_result_is_compared_with_nothing(make: Make) -> None:
    spent = {"nfe": 3200.0, "images": 320.0}
    runs = load_runs([make("b", "best-of-n", spent=spent, fault="a broken scorer"), make("g", "gpo")])
    assert build_board(runs).frontiers == ()

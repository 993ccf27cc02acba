"""Sequential comparison on the miniature model: seeds are added to untold pairs alone, and the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpobench.bench.errors import Interrupted, UserError
from gpobench.bench.experiments.compare import Grid, GridLaunch
from gpobench.bench.experiments.until_told import PairState, RowScores, SequentialTest, summary_lines, until_told
from gpobench.bench.progress import NullProgress
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.notes import sequential_notes
from gpobench.leaderboards.runs import load_runs

FIXED = ["prompts=2", "group=4", "optim.warmup=0", "optim.minibatches=1"]


class Said(NullProgress):
    """Progress that keeps its messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def grid(tiny_pipe: Path, redness: str) -> Callable[..., Grid]:
    def make(*methods: str, **more: Any) -> Grid:
        given = {"seeds": 2, "budget": "nfe=60", "sets": FIXED, "baselines": False, **more}
        return Grid(methods or ("gpo", "rwr"), [f"{redness}:Paint"], str(tiny_pipe), **given)

    return make


def test_seeds_are_added_up_to_the_cap_and_the_same_command_goes_on(grid: Any, tmp_path: Path) -> None:
    said = Said()
    stop = GridLaunch(tmp_path, said, interrupted=lambda: any("look 1" in line for line in said.lines))
    with pytest.raises(Interrupted, match="the same command goes on"):
        until_told(grid(), "gpo:rwr", 3, stop)
    (path,) = tmp_path.glob("until-told-*.json")
    assert {run["seed"] for run in json.loads(path.read_text())["runs"] if run["state"] == "done"} == {0, 1}
    said = Said()
    result = until_told(grid(), "gpo:rwr", 3, GridLaunch(tmp_path, said))
    test = result["sequential"]
    assert result["path"] == str(path) and result["command"].endswith("--until-told --max-seeds 3 --pairs gpo:rwr")
    assert [look["seeds"] for look in test["looks"]] == [2, 3] and test["pairs"][0]["told_at"] is None
    assert [(r["method"], r["seed"], r["state"]) for r in result["runs"]] == [
        (method, seed, "done") for seed in range(3) for method in ("gpo", "rwr")
    ]
    by_look = [look["pairs"][0] for look in test["looks"]]
    assert by_look[1]["anytime_p"] <= by_look[0]["anytime_p"] and all(x["anytime_p"] >= x["p"] for x in by_look)
    assert json.loads(path.read_text()) == {k: v for k, v in result.items() if k != "path"}
    assert "gpo : rwr: not told by 3 seeds" in "\n".join(summary_lines(test))
    # The table of these runs says that its p are those of a fixed number of seeds.
    for paths in ([path], [tmp_path], [Path(result["runs"][0]["run_dir"])]):
        (note,) = sequential_notes(paths)
        assert "Sequential: seeds were added in 2 looks" in note and "gpo:rwr not told" in note
    board = build_board(load_runs([path]), notes=sequential_notes([path]))
    row = next(r for r in board.rows if r.label == "gpo")
    (pair,) = [p for p in by_look[1:]]
    assert row.seeds == (0, 1, 2) and any("too optimistic" in note for note in board.notes)
    gpo, rwr = (next(r for r in board.rows if r.label == name).cells[board.key].after.mean for name in ("gpo", "rwr"))
    assert pair["difference"] == pytest.approx(gpo - rwr, abs=1e-9)
    again = until_told(grid(), "gpo:rwr", 3, GridLaunch(tmp_path, NullProgress()))
    assert again["sequential"] == test and {run["how"] for run in again["runs"]} == {"found"}


def test_what_cannot_be_tested_look_by_look_is_refused_before_anything_runs(grid: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for change, pairs, cap, said in (
        ({"seeds": 1}, None, 5, "--seeds 2 at least: one seed shows no spread"),
        ({"seeds": (0, 4)}, None, 5, "give --seeds as a number"),
        ({"seeds": 4}, None, 3, "--max-seeds 3 is below --seeds 4"),
        ({}, "gpo:rvr", 5, "did you mean 'rwr'"),
        ({}, "gpo:gpo", 5, "does not differ from itself"),
    ):
        with pytest.raises(UserError, match=said):
            until_told(grid(**change), pairs, cap, GridLaunch(out, NullProgress()))
    assert not out.exists()


# The looks, without runs


def scores(rng: np.random.Generator, gain: float, seeds: int, sd: float = 0.01, prompts: int = 200) -> RowScores:
    before = np.random.default_rng(9).random((prompts, 1))
    after = [before + gain + sd * rng.standard_normal() + 0.1 * rng.standard_normal((prompts, 1)) for _ in range(seeds)]
    return RowScores([before] * seeds, after)


def test_a_told_pair_needs_no_further_seed_and_stays_told() -> None:
    rng = np.random.default_rng(0)
    test = SequentialTest([PairState(("a", "base")), PairState(("b", "base")), PairState(("b", "c"))], first=2)
    rows = {"a": scores(rng, 0.3, 2), "b": scores(rng, 0.0, 2), "c": scores(rng, 0.0, 2)}
    test.look(2, rows, None)
    assert [s.told_at for s in test.states] == [2, None, None] and test.open_rows() == {"b", "c"}
    rows = {"a": rows["a"], "b": scores(rng, 0.0, 3), "c": scores(rng, 0.0, 3)}
    test.look(3, rows, None)
    assert test.states[0].told_at == 2 and len(test.looks[1]["pairs"]) == 2
    del rows["c"]
    test.look(4, rows, None)
    assert test.states[2].reason == "c has no scores to rank by" and test.open_rows() == {"b"}


def test_equal_rows_are_told_at_some_look_in_few_tables() -> None:
    """The miniature of benchmarks/plan_calibration.py: looks at 2 to 6 seeds; at 5 % at every look it would be about 10 %."""
    rng, told, tables = np.random.default_rng(1), 0, 40
    for _ in range(tables):
        every = {name: scores(rng, 0.0, 6, prompts=60) for name in "abcd"}
        test = SequentialTest([PairState(("a", "b")), PairState(("c", "base"))], first=2)
        for seeds in range(2, 7):
            rows = {name: RowScores(row.before[:seeds], row.after[:seeds]) for name, row in every.items()}
            test.look(seeds, rows, None)
            if not test.open_rows():
                break
        told += any(state.told_at for state in test.states)
    assert told <= 6  # 5 % of 40 and 3 standard errors

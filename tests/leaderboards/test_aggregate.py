"""Aggregates put all tasks on one scale, and their intervals contain prompts and seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpobench.bench.errors import UserError
from gpobench.leaderboards.aggregate import AggregateTable, aggregate
from gpobench.leaderboards.render_aggregate import render
from gpobench.leaderboards.runs import load_runs

Make = Callable[..., Path]
KEY = "other/exact"


def grid(
    make: Make, gains: dict[str, dict[str, float]], seeds: int = 3, scale: float = 1.0, spread: float = 0.0
) -> None:
    """gains: task -> method -> what it gains; scale: of the second task's scorer."""
    for t, (task, by) in enumerate(gains.items()):
        size = scale if t else 1.0
        before = np.random.default_rng(t).random((40, 2))
        for m, (method, gain) in enumerate(by.items()):
            for seed in range(seeds):
                rng = np.random.default_rng(100 * t + 10 * m + seed)
                after = before + gain + rng.normal(0, spread) + rng.normal(0, 0.1, before.shape)
                scores_by_key = {KEY: (before * size, after * size)}
                make(f"{task}-{method}-{seed}", method, seed, task=task, scores_by_key=scores_by_key)


def line(table: AggregateTable, label: str) -> Any:
    return next(row for row in table.rows if row.label == label)


@pytest.fixture
def two(make: Make, tmp_path: Path) -> Callable[..., AggregateTable]:
    def made(scale: float = 1.0, baseline: str = "base", **more: Any) -> AggregateTable:
        grid(make, {"ocr": {"gpo": 0.2, "awm": 0.0}, "counting": {"gpo": 0.1, "awm": 0.0}}, scale=scale, **more)
        return aggregate(load_runs([tmp_path]), baseline, resamples=500)

    return made


def test_rows_are_sorted_by_the_middle_of_all_gains(two: Callable[..., AggregateTable]) -> None:
    table = two()
    assert [row.label for row in table.rows] == ["gpo", "awm"] and set(table.keys) == {"ocr", "counting"}
    gpo, awm = table.rows
    assert gpo.middle.low > 0 > awm.middle.low and gpo.middle.mean > awm.middle.mean
    assert gpo.improvement and gpo.improvement.mean == 1 and awm.improvement and awm.improvement.low < 0.5
    for task in table.keys:
        assert gpo.gains[task].low < gpo.gains[task].mean < gpo.gains[task].high


@pytest.mark.parametrize("scale", [0.01, 50.0])
def test_a_scorers_unit_does_not_matter(
    make: Make, tmp_path_factory: pytest.TempPathFactory, scale: float, make_at: Any
) -> None:
    def one_scale(size: float) -> AggregateTable:
        run_dir = tmp_path_factory.mktemp("runs")
        gains = {task: {"gpo": 0.2} for task in ("ocr", "counting")}
        grid(lambda name, *a, **k: make_at(run_dir / name, *a, **k), gains, scale=size)
        return aggregate(load_runs([run_dir]), resamples=200)

    tables = [one_scale(1.0), one_scale(scale)]
    row, other = (line(table, "gpo") for table in tables)
    assert row.middle.mean == pytest.approx(other.middle.mean) and row.middle.low == pytest.approx(other.middle.low)


def test_against_another_row_it_counts_who_wins(two: Callable[..., AggregateTable]) -> None:
    table = two(baseline="awm")
    assert line(table, "awm").improvement is None and line(table, "gpo").improvement.mean == 1


def test_prompts_are_in_the_interval(make: Make, tmp_path: Path) -> None:
    """Seeds that agree to a hair on forty prompts are no certainty about others."""
    grid(make, {t: {"gpo": 0.0} for t in ("ocr", "counting")}, seeds=3)
    gpo = line(aggregate(load_runs([tmp_path]), resamples=500), "gpo")
    assert gpo.middle.low < 0 < gpo.middle.high and gpo.middle.high - gpo.middle.low > 0.05


def test_rows_that_lack_a_task_or_a_seed_are_named(make: Make, tmp_path: Path) -> None:
    grid(make, {"ocr": {"gpo": 0.1, "awm": 0.1, "nft": 0.1}, "counting": {"gpo": 0.1, "nft": 0.1}}, seeds=2)
    make("more", "nft", 7, task="ocr", scores_by_key={KEY: (x := np.random.default_rng(0).random((40, 2)), x + 0.1)})
    table = aggregate(load_runs([tmp_path]), resamples=50)
    assert [row.label for row in table.rows] == ["gpo"]
    assert any("left out: awm, nft" in note for note in table.notes)
    with pytest.raises(UserError, match="unknown baseline 'awm'"):
        aggregate(load_runs([tmp_path]), "awm", resamples=50)


def test_what_cannot_be_summed_up_is_refused(make: Make, tmp_path: Path) -> None:
    grid(make, {"ocr": {"gpo": 0.1}}, seeds=1)
    with pytest.raises(UserError, match="several tasks; these runs are of ocr"):
        aggregate(load_runs([tmp_path]))
    make("other", "awm", 0, task="counting", scores_by_key={KEY: (x := np.random.default_rng(0).random((40, 2)), x)})
    with pytest.raises(UserError, match="no method has runs of the same seeds"):
        aggregate(load_runs([tmp_path]))
    make("model", "gpo", 0, task="counting", model="sd35m", scores_by_key={KEY: (x, x)})
    with pytest.raises(UserError, match="several models, sd35m, tiny"):
        aggregate(load_runs([tmp_path]))


def test_one_seed_has_no_interval_and_a_flat_base_no_scale(make: Make, tmp_path: Path) -> None:
    grid(make, {t: {"gpo": 0.1} for t in ("ocr", "counting")}, seeds=1)
    assert math.isnan(line(aggregate(load_runs([tmp_path]), resamples=50), "gpo").middle.low)
    flat = np.zeros((40, 2))
    make("z", "gpo", 0, task="third", scores_by_key={KEY: (flat, flat + 1)})
    with pytest.raises(UserError, match="have no scale"):
        aggregate(load_runs([tmp_path]), resamples=50)


def test_every_dress_has_every_row(two: Callable[..., AggregateTable]) -> None:
    table = two()
    for format in ("terminal", "md", "csv", "json"):
        text = render(table, format)
        assert all(row.label in text for row in table.rows) and text.endswith("\n")
    assert all(len(row) <= 80 for row in render(table, width=80).splitlines())
    assert "counting" in render(table, width=140).splitlines()[2] and "More columns" in render(table, width=60)
    document = json.loads(render(table, "json"))
    assert [row["label"] for row in document["rows"]] == ["gpo", "awm"] and document["rows"][0]["iqm"]["ci_low"] > 0
    with pytest.raises(UserError, match="did you mean"):
        render(table, "jsn")

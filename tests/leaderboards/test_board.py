"""A board does not depend on the order of runs, ranks significant differences, ties the others, and refuses runs that do not compare."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.record import Flags, Number, ScorerUse
from gpobench.bench.stats import intervals, significance
from gpobench.leaderboards.board import Board, BoardRow
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.runs import LoadedRun, excluded_runs, load_runs

Make = Callable[..., Path]
KEY = "other/exact"


def row(b: Board, label: str) -> BoardRow:
    return next(r for r in b.rows if r.label == label)


def table(*folders: Path, **more: Any) -> Board:
    return build_board(load_runs(folders), resamples=400, **more)


# Reading


def test_folders_and_folders_of_folders_are_read_once(make: Make, tmp_path: Path) -> None:
    first, second = make("one", seed=0), make("two", seed=1)
    (tmp_path / "noise").mkdir()
    assert [r.folder.name for r in load_runs([first, tmp_path, second, tmp_path / "noise" / ".." / "one"])] == [
        "one",
        "two",
    ]
    run = load_runs([first])[0]
    assert run.before[KEY].shape == (40, 2) and np.isfinite(run.after[KEY]).all() and set(run.strata) == {""}


def test_a_comparisons_file_stands_for_the_runs_it_finished(make: Make, tmp_path: Path) -> None:
    folders = [make(f"grid/{name}", name, 0, 0.1) for name in ("gpo", "awm", "sft")]
    states = {"gpo": "done", "awm": "done", "sft": "waiting"}
    file = tmp_path / "grid" / "compare-x.json"
    file.write_text(json.dumps({"runs": [{"run": n, "state": s, "run_dir": "/elsewhere"} for n, s in states.items()]}))
    assert [r.folder for r in load_runs([file])] == sorted(folders[:2], key=lambda f: f.name)
    assert len(load_runs([file, tmp_path / "grid"])) == 3
    for text, message in (
        ("{", "is not what"), ('{"runs": 3}', "is not what"), ('{"runs": []}', "none of the runs"),
        ('{"runs": [{"run": "gone", "state": "done"}]}', "no folder of runs"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_runs([file])


def test_failed_and_unfinished_runs_are_named(make: Make, tmp_path: Path) -> None:
    """A method is not ranked by the seeds that survived without a word."""
    make("grid/one", "gpo", 0, 0.1)
    make("grid/two", "sft", 1, 0.1)
    for name, task in (("three", "ocr"), ("four", "counting")):
        (tmp_path / "grid" / name).mkdir()
        (tmp_path / "grid" / name / "config.toml").write_text(f"# gpobench run --method gpo --task {task} --seed 2\n")
    known = {"method": "gpo", "task": "ocr", "seed": 2}
    listed = [
        {"run": "one", "state": "done"}, {**known, "run": "three", "state": "failed", "reason": "loss is NaN."},
        {**known, "run": "five", "state": "waiting", "reason": ""},
    ]  # fmt: skip
    file = tmp_path / "grid" / "compare-x.json"
    file.write_text(json.dumps({"runs": listed}))
    assert excluded_runs([tmp_path / "grid"], "ocr") == ["Not in this table: three (not finished)."]
    assert "four (not finished); three (not finished)" in excluded_runs([tmp_path / "grid"])[0]
    failed = "gpo on ocr with seed 2 (failed: loss is NaN); gpo on ocr with seed 2 (waiting)"
    assert excluded_runs([file]) == [f"Not in this table: {failed}."] and excluded_runs([file], "counting") == []
    assert excluded_runs([tmp_path / "grid" / "one"]) == []
    b = build_board(load_runs([tmp_path / "grid"]), resamples=10, notes=excluded_runs([tmp_path / "grid"]))
    assert b.notes[0].startswith("Not in this table") and any("Not all rows have the seeds" in note for note in b.notes)


def test_one_task_of_several_is_taken(make: Make, tmp_path: Path) -> None:
    for task in ("ocr", "counting"):
        make(f"both/{task}", "gpo", 0, 0.1, task=task)
    with pytest.raises(UserError, match=r"differ in task: .*\(--task selects one, --across"):
        build_board(load_runs([tmp_path / "both"]), resamples=10)
    assert {r.record.task for r in load_runs([tmp_path / "both"], "counting")} == {"counting"}
    with pytest.raises(UserError, match="did you mean 'ocr'"):
        load_runs([tmp_path / "both"], "orc")


def test_scores_come_back_where_they_were(make: Make, before_and_after: Any) -> None:
    before, after = before_and_after(0.1, 7)
    after[3, 1] = math.nan
    folder = make("one", scores_by_key={KEY: (before, after)}, strata=[f"s{i % 3}" for i in range(40)])
    run = load_runs([folder])[0]
    assert np.array_equal(run.before[KEY], before) and np.array_equal(run.after[KEY], after, equal_nan=True)
    assert run.strata == tuple(f"s{i % 3}" for i in range(40))


def test_scores_without_strata_are_read(make: Make) -> None:
    assert set(load_runs([make("old", columns=["stratum"])])[0].strata) == {""}


def test_what_is_no_finished_run_is_said(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.toml").write_text("")
    cut, newer, lost, column = (make(name) for name in ("cut", "newer", "lost", "column"))
    whole = (cut / "scores.parquet").read_bytes()
    (cut / "scores.parquet").write_bytes(whole[: len(whole) // 2])
    text = json.loads((newer / "record.json").read_text())
    (newer / "record.json").write_text(json.dumps(text | {"schema_version": 99}))
    (lost / "scores.parquet").unlink()
    for folder, message in {
        tmp_path / "empty": "no finished run in",
        tmp_path / "begun": "is not finished",
        tmp_path / "gone": "is no folder of runs",
        cut: "was changed or cut after the run wrote it",
        newer: "has schema version 99",
        lost: "cannot read",
        make("bare", columns=["value"]): "has no column 'value'",
        make("eval", kind="eval"): "is no run but an eval",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_runs([folder])
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


# Rows, ranks and tests


def test_a_planted_difference_is_ranked(make: Make) -> None:
    folders = [
        make(f"{m}{s}", m, s, gain) for m, gain in (("gpo", 0.2), ("awm", 0.1), ("sft", 0.0001)) for s in range(3)
    ]
    b = table(*folders)
    assert {r.label: r.rank for r in b.rows} == {"gpo": 1, "awm": 2, "sft": 3, "base": 3}
    assert [r.label for r in b.rows[:2]] == ["gpo", "awm"]
    gpo = row(b, "gpo")
    assert gpo.seeds == (0, 1, 2) and gpo.spent["nfe"] == 1001 and not gpo.single_seed and gpo.kind == "method"
    assert row(b, "sft").kind == "baseline" and row(b, "base").kind == "base" and not row(b, "base").single_seed
    assert gpo.versus is not None and gpo.versus.low > 0.15 and gpo.holm < 0.05
    assert gpo.cells[KEY].delta is not None and gpo.cells[KEY].delta.mean == pytest.approx(gpo.versus.mean)
    assert b.key == KEY and b.baseline == "base" and [c.key for c in b.columns] == ["engine/exact", KEY]
    assert any("best-of-n" in note and "sft" not in note for note in b.notes)


def test_numbers_are_those_of_stats(make: Make) -> None:
    folders = [make(f"{m}{s}", m, s, gain) for m, gain in (("gpo", 0.2), ("awm", 0.1)) for s in range(3)]
    runs = load_runs([*folders, make("sft", "sft")])
    b = build_board(runs, baseline="awm", resamples=500)
    after = {m: [r.after[KEY] for r in runs if r.record.method == m] for m in ("gpo", "awm", "sft")}
    mean = intervals.two_level([intervals.per_prompt(a) for a in after["gpo"]], resamples=500)
    cell = row(b, "gpo").cells[KEY]
    assert (cell.after.mean, cell.after.low, cell.after.high) == pytest.approx((mean.mean, mean.low, mean.high))
    alone = intervals.mean_ci(after["sft"][0], resamples=500)
    cell = row(b, "sft").cells[KEY]
    assert (cell.after.low, cell.after.high) == pytest.approx((alone.low, alone.high))
    gain = intervals.paired(runs[-1].before[KEY], after["sft"][0], resamples=500)
    assert cell.delta is not None and (cell.delta.low, cell.delta.p) == pytest.approx((gain.low, gain.p))
    versus = row(b, "gpo").versus
    alone = intervals.crossed([intervals.Contrast(after["gpo"], after["awm"], test=True)])[0]
    assert versus is not None and (versus.mean, versus.p) == pytest.approx((alone.mean, alone.p))
    assert (versus.low, versus.high) == pytest.approx((alone.low, alone.high), abs=0.1 * alone.se)
    tested = [r for r in b.rows if r.versus is not None]
    assert row(b, "awm") not in tested and len(tested) == 3
    assert [r.holm for r in tested] == significance.holm(
        [r.versus.p for r in tested if r.versus and r.versus.p is not None]
    )


def test_identical_methods_tie_at_the_top(make: Make, before_and_after: Any) -> None:
    scores_by_key = {key: before_and_after(0.2, 1) for key in ("engine/exact", KEY)}
    b = table(*(make(m, m, scores_by_key=scores_by_key) for m in ("gpo", "awm", "dgpo")))
    assert {r.label: r.rank for r in b.rows} == {"gpo": 1, "awm": 1, "dgpo": 1, "base": 4}
    assert all(r.single_seed for r in b.rows if r.label != "base")


def test_settings_make_rows_of_their_own(make: Make) -> None:
    b = table(
        make("a", seed=0), make("b", seed=1),
        make("c", seed=0, config={"settings": {"lr": 1e-3, "optim": {"clip": 2.0}}}),
    )  # fmt: skip
    assert {r.label: r.seeds for r in b.rows} == {
        "gpo (optim.clip=1.0)": (0, 1), "gpo (optim.clip=2.0)": (0,), "base": (),
    }  # fmt: skip
    with pytest.raises(UserError, match="several rows"):
        table(*(Path(f) for r in b.rows for f in r.folders), baseline="gpo")
    assert table(*(Path(f) for r in b.rows for f in r.folders), baseline="gpo (optim.clip=2.0)").baseline


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_order_changes_nothing(data: st.DataObject, make: Make, tmp_path: Path) -> None:
    """Neither that of the runs nor that of the scores in their files."""
    if not (tmp_path / "gpo0").exists():
        for method, gain in (("gpo", 0.2), ("awm", 0.19), ("sft", 0.0)):
            for seed in range(2):
                make(f"{method}{seed}", method, seed, gain)
    runs = load_runs([tmp_path])
    shuffled = data.draw(st.permutations(runs))
    order = np.array(data.draw(st.permutations(range(40))))
    moved = [
        replace(
            r, strata=tuple(r.strata[i] for i in order), before={k: v[order] for k, v in r.before.items()},
            after={k: v[order] for k, v in r.after.items()},
        )
        for r in runs
    ]  # fmt: skip
    first = build_board(runs, resamples=100)
    assert build_board(shuffled, resamples=100) == first
    other = build_board(moved, resamples=100)
    assert [(r.label, r.rank) for r in other.rows] == [(r.label, r.rank) for r in first.rows]
    assert [r.cells[KEY].after.mean for r in other.rows] == pytest.approx([r.cells[KEY].after.mean for r in first.rows])


def in_memory(run: LoadedRun, method: str, seed: int, after: np.ndarray) -> LoadedRun:
    known = run.record.model_copy(update={"method": method, "seed": seed})
    return replace(run, folder=Path(f"{method}{seed}"), record=known, after=dict.fromkeys(run.after, after))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gains=st.lists(st.sampled_from([0.0, 0.005, 0.1, 0.5]), min_size=1, max_size=6), data=st.data())
def test_ranks_and_holm_are_laws(gains: list[float], data: st.DataObject, make: Make, tmp_path: Path) -> None:
    """Ranks rise with falling means and are no later than places; who is beaten, corrected over all pairs, stands behind.

    A smaller p is never corrected to a larger one.
    """
    run = load_runs([tmp_path / "one"])[0] if (tmp_path / "one").exists() else load_runs([make("one")])[0]
    seeds = data.draw(st.integers(1, 3))
    runs = [
        in_memory(run, f"m{k}", s, run.before[KEY] + gain + np.random.default_rng(9 * k + s).normal(0, 0.05, (40, 2)))
        for k, gain in enumerate(gains)
        for s in range(seeds)
    ]
    b = build_board(runs, resamples=100)
    means = [r.cells[KEY].after.mean for r in b.rows]
    ranks = [r.rank for r in b.rows if r.rank is not None]
    assert (
        means == sorted(means, reverse=True) and ranks == sorted(ranks) and ranks[0] == 1 and len(ranks) == len(b.rows)
    )
    assert all(rank <= place for place, rank in enumerate(ranks, start=1))
    ends = {r.label: [x.after[KEY] for x in runs if x.record.method == r.label] or [run.before[KEY]] for r in b.rows}
    order = [r.label for r in b.rows]
    pairs = list(combinations(order, 2))
    differences = [
        intervals.crossed(
            [intervals.Contrast(ends[first], ends[second], test=True, lend="base" not in (first, second))],
            resamples=max(100, 40 * len(pairs)),
        )[0]
        for first, second in pairs
    ]
    corrected = significance.holm([d.p for d in differences if d.p is not None])
    significant = {pair for pair, d, p in zip(pairs, differences, corrected, strict=True) if d.mean > 0 and p < 0.05}
    for k, below in enumerate(b.rows):
        better = [above for above in b.rows[:k] if (above.label, below.label) in significant]
        assert all(above.rank < below.rank for above in better)
        assert below.rank == max([1 + len(better), *ranks[:k], *(1 + above.rank for above in better)])
    tested = sorted((r.versus.p, r.holm) for r in b.rows if r.versus and r.versus.p is not None)
    assert [h for _, h in tested] == sorted(h for _, h in tested) and all(p <= h <= 1 for p, h in tested)


def test_strata_weigh_the_same(make: Make, before_and_after: Any) -> None:
    before, after = before_and_after(0.1, 3)
    after[:10] += 1
    b = table(make("one", scores_by_key={KEY: (before, after)}, strata=["rare"] * 10 + ["common"] * 30))
    expected = (after[:10].mean() + after[10:].mean()) / 2
    assert row(b, "gpo").cells[KEY].after.mean == pytest.approx(expected)


def test_columns_are_ordered_by_role(make: Make, before_and_after: Any) -> None:
    keys = (
        "drift-clip/paired",
        "style/score",
        "engine/soft",
        "engine/exact",
        "diversity-clip/pairwise",
        KEY,
        "more/exact",
    )
    uses = {
        name: ScorerUse(id=f"{name}-1", role=role, calls=0, seconds=0, errors=0)
        for name, role in {"engine": "training", "other": "held-out", "style": "quality", "more": "auxiliary"}.items()
    }
    b = table(
        make(
            "one", scores_by_key={k: before_and_after(0.1, 5) for k in keys}, scorers=uses, embedders={"clip": "clip-1"}
        )
    )
    assert [c.key for c in b.columns] == [
        "engine/exact", "engine/soft", KEY, "more/exact", "style/score", "diversity-clip/pairwise", "drift-clip/paired",
    ]  # fmt: skip
    assert [c.role for c in b.columns[-2:]] == ["diversity", "drift"]
    assert b.scorers["embedder clip"] == "clip-1"
    for bad in ("drift-clip/paired", "engine/exakt"):
        with pytest.raises(UserError, match="unknown scorer/metric"):
            build_board(load_runs([Path(b.rows[0].folders[0])]), key=bad)
    assert build_board(load_runs([Path(b.rows[0].folders[0])]), key="engine/soft", resamples=50).key == "engine/soft"


def test_cmmd_of_several_seeds(make: Make) -> None:
    numbers = [Number(mean=m, ci=(m - 0.02, m + 0.02), n=40) for m in (0.1, 0.2, 0.3)]
    folders = [make(f"r{s}", seed=s, cmmd={"clip": numbers[s]}) for s in range(3)]
    e = row(table(*folders), "gpo").cmmd["clip"]
    v_prompt, v_seed = (0.04 / 2 / 1.96) ** 2, 0.01 / 3
    assert e.mean == pytest.approx(0.2) and e.se == pytest.approx(math.sqrt(v_prompt / 4 * 4 + v_seed))
    assert e.high - e.mean > 4 * math.sqrt(v_seed)  # Student's, at little more than two degrees of freedom
    first = row(table(folders[0]), "gpo").cmmd["clip"]
    assert (first.low, first.high) == pytest.approx((0.08, 0.12))


# Marks


def test_flags_seeds_and_tuning_are_counted(make: Make) -> None:
    b = table(
        make("a", seed=0, flags=Flags(hack=True, invalid=False), tuning={"trials": 8}), make("b", seed=1),
        make("best", "best-of-n", seed=0), baseline="best-of-n",
    )  # fmt: skip
    gpo, best = row(b, "gpo"), row(b, "best-of-n")
    assert (gpo.hacked, gpo.trials, gpo.single_seed) == (1, 8, False) and best.single_seed and best.versus is None
    with pytest.raises(UserError, match="did you mean 'gpo'"):
        build_board(load_runs([Path(f) for f in gpo.folders]), baseline="gp")


@pytest.mark.parametrize("holes,invalid", [(0, False), (1, False), (2, True)])
def test_more_than_half_a_percent_without_a_score_is_no_rank(
    make: Make, before_and_after: Any, holes: int, invalid: bool
) -> None:
    before, after = before_and_after(0.3, 3, prompts=100)
    after.flat[:holes] = math.nan  # of 200
    b = table(
        make("a", scores_by_key={KEY: (before, after)}),
        make("b", "awm", scores_by_key={KEY: before_and_after(0.1, 2, prompts=100)}),
    )
    gpo = row(b, "gpo")
    assert gpo.invalid is invalid and (gpo.rank is None) is invalid and gpo.cells[KEY].errors == holes
    assert math.isnan(gpo.holm) is invalid
    assert any("gpo" in note and "not ranked" in note for note in b.notes) is invalid
    assert row(b, "awm").rank == (1 if invalid else 2)


def test_scores_that_were_edited_are_not_believed(make: Make) -> None:
    folder = make("one")
    table = pd.read_parquet(folder / "scores.parquet")
    table.assign(value=table.value + (table.phase == "after")).to_parquet(folder / "scores.parquet", index=False)
    with pytest.raises(UserError, match="scores.parquet was changed or cut after the run wrote it.*--fresh"):
        load_runs([folder])


def test_a_run_that_ended_by_a_fault_is_never_ranked(make: Make) -> None:
    """However high its scores: the seeds of its row that ended well do not rank it either."""
    runs = [make("a", "gpo", 0, 0.5), make("b", "gpo", 1, 0.5, fault="the loss is nan"), make("c", "awm", 0, 0.1)]
    b = table(*runs, make("d", "awm", 1, 0.1))
    assert row(b, "gpo").rank is None and row(b, "awm").rank == 1 and row(b, "gpo").faults == ("the loss is nan",)
    assert "gpo ended by a fault, so it is not ranked: the loss is nan." in b.notes


def test_a_record_that_says_invalid_is_believed(make: Make) -> None:
    assert row(table(make("a", flags=Flags(hack=False, invalid=True))), "gpo").rank is None


# What a table never mixes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "counting"}, "task: ocr"),
        ({"task_version": "2"}, "task version: 1"),
        ({"model": "sd35m"}, "model: tiny"),
        ({"provenance": {"weights": "w2"}}, "weights of the model: w1"),
        ({"config": {"budget": {"name": "x", "nfe": 2000.0}}}, "budget nfe: 1000.0"),
        ({"config": {"budget": {"name": "x", "seconds": 9.0}}}, "budget nfe: 1000.0"),
        ({"config": {"evaluation": {"split": "validation", "seed": 1}}}, "evaluation split: test"),
        ({"prompts": {"test": "cc"}}, "prompts of split test: bb"),
        (
            {"scorers": {"other": ScorerUse(id="other-2", role="held-out", calls=0, seconds=0, errors=0)}},
            "other: other-1",
        ),
        ({"strata": True}, "strata of the prompts"),
        ({"shape": 20}, "number of prompts and images: .40, 2."),
        ({"base": 1}, "the base's engine/exact"),
    ],
)
def test_runs_that_do_not_compare_are_refused(
    make: Make, before_and_after: Any, change: dict[str, Any], message: str
) -> None:
    change = dict(change)
    if change.pop("strata", None):
        change["strata"] = [f"s{i % 2}" for i in range(40)]
    shape, base = change.pop("shape", 40), change.pop("base", 0)
    scores_by_key = {key: before_and_after(0.1, 3, prompts=shape, base=base) for key in ("engine/exact", KEY)}
    a, b = (
        make("a", "awm", config={"budget": {"name": "named", "nfe": 1000.0}}),
        make("b", "gpo", scores_by_key=scores_by_key, **change),
    )
    with pytest.raises(UserError, match=message) as caught:
        table(a, b)
    assert str(a) in str(caught.value) and str(b) in str(caught.value) and "\n" not in str(caught.value)


def test_the_training_scorer_is_shared(make: Make) -> None:
    swapped = {
        name: ScorerUse(id=f"{name}-1", role=role, calls=0, seconds=0, errors=0)
        for name, role in {"other": "training", "engine": "held-out"}.items()
    }
    with pytest.raises(UserError, match="training scorer: engine in .* and other in"):
        table(make("a", "awm"), make("b", "gpo", scorers=swapped))


def test_the_name_of_a_budget_does_not_matter(make: Make) -> None:
    a, b = make("a", "awm", config={"budget": {"name": "x", "nfe": 1000.0}}), make("b")
    assert len(table(a, b).rows) == 3


def test_the_same_run_in_two_places_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="the same run twice, gpo with seed 0"):
        table(make("a"), make("b"))
    with pytest.raises(UserError, match="no runs"):
        build_board([])


@pytest.mark.parametrize("scale", [1.0, 0.01, 30.0])
def test_another_machines_last_bits_are_noted_on_any_scale(scale: float, make: Make, before_and_after: Any) -> None:
    """A base that moved by a twentieth of its spread is the same base; one that moved further is none, and no row gains by it."""
    before, after = (x * scale for x in before_and_after(0.1, 3))
    other, far = before.copy(), before + 0.06 * before.mean(1).std()
    other[0] += 0.04 * len(before) * before.mean(1).std()
    first = make("a", scores_by_key={KEY: (before, after)})
    b = table(first, make("b", "awm", scores_by_key={KEY: (other, other)}, provenance={"machine": "n"}))
    assert any("rounding on another machine" in note for note in b.notes)
    assert any("2 machines" in note for note in b.notes)
    # it changed nothing, so it is no better than the base that it had
    assert (versus := row(b, "awm").versus) and versus.mean == 0 and versus.p == 1
    with pytest.raises(UserError, match="the base's other/exact"):
        table(first, make("c", "awm", scores_by_key={KEY: (far, far)}))


# 1 % of such experiments show more than so many second ranks, if 5 % of tables have one.
@pytest.mark.parametrize(("tables", "most"), [(50, 6), pytest.param(400, 30, marks=pytest.mark.slow)])
def test_equal_methods_share_a_rank(make: Make, tables: int, most: int) -> None:
    """Of tables of eleven equal methods no more have a second rank than the table says: 5 in 100."""
    run, rng = load_runs([make("one")])[0], np.random.default_rng(5)
    second = 0
    for _ in range(tables):
        seeds = [(f"m{k}", s, rng.normal(0, 0.02)) for k in range(11) for s in range(3)]
        runs = [in_memory(run, m, s, run.before[KEY] + gain + rng.normal(0, 0.1, (40, 2))) for m, s, gain in seeds]
        second += max(r.rank or 1 for r in build_board(runs, resamples=100).rows) > 1
    assert second <= most


def test_what_did_not_change_is_not_told_from_the_base(make: Make) -> None:
    """Three seeds that changed nothing: the mean of three equal numbers may differ in its last bit from the number."""
    run = load_runs([make("one")])[0]
    soft = np.random.default_rng(1).choice([0.1, 0.2, 0.4, 0.6, 0.8], (328, 2))
    run = replace(run, before={KEY: soft}, after={KEY: soft}, strata=("",) * 328)
    b = build_board([in_memory(run, m, s, soft.copy()) for m in ("a", "b") for s in range(3)], resamples=100)
    assert {r.rank for r in b.rows} == {1}
    assert all(r.versus and (r.versus.mean, r.versus.p) == (0, 1) for r in b.rows if r.kind != "base")


def test_a_few_changed_prompts_are_no_second_rank(make: Make) -> None:
    """Two prompts gained and none lost have a sign-flip p of .5, whatever a bootstrap of them never leaves."""
    run = load_runs([make("one")])[0]
    after = run.before[KEY].copy()
    after[:2] += 0.5
    b = build_board([in_memory(run, "a", 0, after)], resamples=1000)
    assert (
        {r.rank for r in b.rows} == {1} and (versus := row(b, "a").versus) and versus.p == pytest.approx(0.5, abs=0.06)
    )


def test_two_scores_of_one_image_are_refused(make: Make, sealed: Callable[[Path], Path]) -> None:
    path = make("one") / "scores.parquet"
    once = pd.read_parquet(path)
    again = once[once.phase == "after"].assign(value=lambda t: t.value + 0.5)
    pd.concat([once, again]).to_parquet(path, index=False)
    with pytest.raises(UserError, match="two scores of one image after training by"):
        load_runs([sealed(path.parent)])


def test_a_scorer_that_one_run_lacks_leaves_a_gap(make: Make, before_and_after: Any) -> None:
    both = {key: before_and_after(0.1, 3) for key in ("engine/exact", KEY)}
    b = table(make("a", scores_by_key=both), make("b", "awm", scores_by_key={"engine/exact": both["engine/exact"]}))
    assert KEY not in row(b, "awm").cells and row(b, "awm").rank is None and row(b, "gpo").rank == 1
    assert any(note.startswith("other scored 2 of 3 rows") for note in b.notes)
    assert row(table(*(Path(f) for r in b.rows for f in r.folders), key="engine/exact"), "awm").rank is not None

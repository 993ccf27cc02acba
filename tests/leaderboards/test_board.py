"""A board does not depend on the order of runs, ranks significant differences, ties the others, and refuses runs that do not compare."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation import seed_library
from gpobench.bench.evaluation.record import Flags, Number, ScorerUse
from gpobench.bench.stats import intervals, law
from gpobench.bench.stats.intervals import Contrast
from gpobench.leaderboards.board import Board, BoardRow
from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.columns import in_shown_order
from gpobench.leaderboards.runs import LoadedRun, excluded_runs, load_runs

Make = Callable[..., Path]
KEY = "other/exact"


def row(b: Board, label: str) -> BoardRow:
    return next(r for r in b.rows if r.label == label)


def ranks_of(b: Board) -> dict[str, str]:
    return {r.label: str(r.rank) for r in b.rows}


def table(*folders: Path, **more: Any) -> Board:
    return build_board(load_runs(folders), **more)


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
    b = build_board(load_runs([tmp_path / "grid"]), notes=excluded_runs([tmp_path / "grid"]))
    assert b.notes[0].startswith("Not in this table") and any("Not all rows have the seeds" in note for note in b.notes)


def test_one_task_of_several_is_taken(make: Make, tmp_path: Path) -> None:
    for task in ("ocr", "counting"):
        make(f"both/{task}", "gpo", 0, 0.1, task=task)
    with pytest.raises(UserError, match=r"differ in task: .*\(--task selects one, --across"):
        build_board(load_runs([tmp_path / "both"]))
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
    assert ranks_of(b) == {"gpo": "1", "awm": "2", "sft": "3-4", "base": "3-4"}
    assert [r.label for r in b.rows[:2]] == ["gpo", "awm"]
    gpo = row(b, "gpo")
    assert gpo.seeds == (0, 1, 2) and gpo.spent["nfe"] == 1001 and not gpo.single_seed and gpo.kind == "method"
    assert row(b, "sft").kind == "baseline" and row(b, "base").kind == "base" and not row(b, "base").single_seed
    assert gpo.versus is not None and gpo.versus.low > 0.15 and gpo.holm < 0.05
    assert gpo.cells[KEY].delta is not None and gpo.cells[KEY].delta.mean == pytest.approx(gpo.versus.mean)
    assert b.key == KEY and b.baseline == "base" and [c.key for c in b.columns] == ["engine/exact", KEY]
    assert any("best-of-n" in note and "sft" not in note for note in b.notes)


def test_numbers_are_those_of_stats(make: Make) -> None:
    """Every cell and test is that of its contrast with the variance between seeds moderated over the rows; one seed is lent it."""
    folders = [make(f"{m}{s}", m, s, gain) for m, gain in (("gpo", 0.2), ("awm", 0.1)) for s in range(3)]
    runs = load_runs([*folders, make("sft", "sft")])
    b = build_board(runs, baseline="awm")
    after = {m: [r.after[KEY] for r in runs if r.record.method == m] for m in ("gpo", "awm", "sft")}
    spreads = intervals.table_spreads(after)
    gain = [runs[-1].after[KEY] - runs[-1].before[KEY]]
    share = all(map(intervals.is_share, after["gpo"]))
    expected = intervals.crossed(
        [
            Contrast(after["gpo"], spreads=[spreads["gpo"]], share=share),
            Contrast(gain, test=True, spreads=[spreads["sft"]]),
            Contrast(after["gpo"], after["awm"], test=True, spreads=[spreads["gpo"], spreads["awm"]]),
        ]
    )
    measured = [row(b, "gpo").cells[KEY].after, row(b, "sft").cells[KEY].delta, row(b, "gpo").versus]
    for estimate, alone in zip(measured, expected, strict=True):
        assert estimate is not None
        assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((alone.mean, alone.low, alone.high))
        assert estimate.p == (None if alone.p is None else pytest.approx(alone.p))
    assert expected[1].se > intervals.paired(runs[-1].before[KEY], after["sft"][0]).se
    tested = [r for r in b.rows if r.versus is not None]
    assert row(b, "awm") not in tested and len(tested) == 3
    assert [r.holm for r in tested] == law.holm([r.versus.p for r in tested if r.versus and r.versus.p is not None])
    assert {r.label: r.seed_source for r in b.rows} == {"gpo": "own", "awm": "own", "sft": "table", "base": ""}
    assert any("sft: the variance between their seeds is lent from the rows" in note for note in b.notes)


def test_rows_of_one_seed_are_never_ranked_without_a_seed_variance(make: Make) -> None:
    """However large the gain: what another seed would change is unknown, and the table says so."""
    b = table(*(make(m, m, 0, gain) for m, gain in (("gpo", 0.9), ("awm", 0.5), ("dgpo", 0.0))))
    assert set(ranks_of(b).values()) == {"1-4"} and all(r.single_seed for r in b.rows if r.label != "base")
    assert all(r.versus is None or (r.versus.p is None and math.isnan(r.holm)) for r in b.rows)
    assert any("awm, dgpo" in note and "neither above nor below" in note for note in b.notes)


def test_the_library_lends_where_no_row_has_several_seeds(make: Make, before_and_after: Any) -> None:
    """The shipped entry of the same method, task, model, budget and scorer; another budget has none."""
    entry = next(e for e in seed_library.entries() if e.method == "gpo" and e.key == "reader/exact" and e.task == "ocr")
    uses = {"reader": ScorerUse(id="reader-1", role="held-out", calls=0, seconds=0, errors=0)}
    more: dict[str, Any] = {"scores_by_key": {entry.key: before_and_after(0.3, 1)}, "scorers": uses}
    lent = table(make("a", config={"budget": {"name": "x", **entry.budget}}, **more))
    assert row(lent, "gpo").seed_source == "library" and ranks_of(lent) == {"gpo": "1", "base": "2"}
    versus = row(lent, "gpo").versus
    assert versus is not None and versus.se >= entry.sd and any("shipped library" in note for note in lent.notes)
    other = table(make("b", config={"budget": {"name": "x", "nfe": 77.0}}, **more))
    assert row(other, "gpo").seed_source == "unknown" and set(ranks_of(other).values()) == {"1-2"}


def test_below_five_prompts_nothing_is_ranked(make: Make, before_and_after: Any) -> None:
    scores = {s: {KEY: before_and_after(0.5, s, prompts=4)} for s in range(3)}
    b = table(*(make(f"a{s}", "gpo", s, scores_by_key=scores[s]) for s in range(3)))
    versus = row(b, "gpo").versus
    assert versus is not None and versus.mean > 0.4 and math.isnan(versus.low) and versus.p is None
    assert set(ranks_of(b).values()) == {"1-2"}


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
    first = build_board(runs)
    assert build_board(shuffled) == first
    other = build_board(moved)
    assert [(r.label, r.rank) for r in other.rows] == [(r.label, r.rank) for r in first.rows]
    assert [r.cells[KEY].after.mean for r in other.rows] == pytest.approx([r.cells[KEY].after.mean for r in first.rows])


def in_memory(run: LoadedRun, method: str, seed: int, after: np.ndarray) -> LoadedRun:
    known = run.record.model_copy(update={"method": method, "seed": seed})
    return replace(run, folder=Path(f"{method}{seed}"), record=known, after=dict.fromkeys(run.after, after))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gains=st.lists(st.sampled_from([0.0, 0.005, 0.1, 0.5]), min_size=1, max_size=6), data=st.data())
def test_ranks_and_holm_are_laws(gains: list[float], data: st.DataObject, make: Make, tmp_path: Path) -> None:
    """Means fall, every interval of ranks holds the row's place, and who is beaten cannot be first.

    A smaller p is never corrected to a larger one.
    """
    run = load_runs([tmp_path / "one"])[0] if (tmp_path / "one").exists() else load_runs([make("one")])[0]
    seeds = data.draw(st.integers(1, 3))
    runs = [
        in_memory(run, f"m{k}", s, run.before[KEY] + gain + np.random.default_rng(9 * k + s).normal(0, 0.05, (40, 2)))
        for k, gain in enumerate(gains)
        for s in range(seeds)
    ]
    b = build_board(runs)
    means = [r.cells[KEY].after.mean for r in b.rows]
    assert means == sorted(means, reverse=True)
    for place, r in enumerate(b.rows, start=1):
        assert r.rank is not None and 1 <= r.rank.best <= place <= r.rank.worst <= len(b.rows)
        if seeds == 1:
            assert (r.rank.best, r.rank.worst) == (1, len(b.rows))
    tested = sorted((r.versus.p, r.holm) for r in b.rows if r.versus and r.versus.p is not None)
    assert bool(tested) is (seeds > 1)
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
        "engine/soft", "engine/exact", KEY, "more/exact", "style/score", "diversity-clip/pairwise", "drift-clip/paired",
    ]  # fmt: skip
    assert [c.role for c in b.columns[-2:]] == ["diversity", "drift"]
    assert b.scorers["embedder clip"] == "clip-1"
    for bad in ("drift-clip/paired", "engine/exakt"):
        with pytest.raises(UserError, match="unknown scorer/metric"):
            build_board(load_runs([Path(b.rows[0].folders[0])]), key=bad)
    assert build_board(load_runs([Path(b.rows[0].folders[0])]), key="engine/soft").key == "engine/soft"


def graded(before_and_after: Any, seed: int = 0) -> dict[str, Any]:
    return {key: before_and_after(0.1, 10 * k + seed) for k, key in enumerate(("engine/soft", "other/soft", KEY))}


def test_the_graded_score_ranks_and_the_verdict_stands_beside_it(make: Make, before_and_after: Any) -> None:
    b = table(make("a", scores_by_key=graded(before_and_after)))
    assert (b.key, b.task_key) == ("other/soft", "other/soft")
    assert [c.key for c in in_shown_order(b)] == ["other/soft", KEY, "engine/soft"]


def test_the_key_is_the_records_and_a_table_by_another_says_so(make: Make, before_and_after: Any) -> None:
    folder = make("a", scores_by_key=graded(before_and_after), key=KEY)
    said = f"Ranked by other/soft, which is not the task's key {KEY}."
    assert table(folder).key == KEY and said not in table(folder).notes
    looked_at = table(folder, key="other/soft")
    assert (looked_at.key, looked_at.task_key) == ("other/soft", KEY) and said in looked_at.notes


def test_records_with_different_keys_are_not_compared(make: Make, before_and_after: Any) -> None:
    a = make("a", scores_by_key=graded(before_and_after), key=KEY)
    b = make("b", "awm", scores_by_key=graded(before_and_after, 1), key="other/soft")
    with pytest.raises(UserError, match=f"differ in key that ranks: (other/soft|{KEY}) in"):
        table(a, b)
    before_keys_were_stated = make("c", "awm", scores_by_key=graded(before_and_after, 1))
    assert table(a, before_keys_were_stated).key == KEY


def test_cmmd_of_several_seeds(make: Make) -> None:
    numbers = [Number(mean=m, ci=(m - 0.02, m + 0.02), n=40) for m in (0.1, 0.2, 0.3)]
    folders = [make(f"r{s}", seed=s, cmmd={"clip": numbers[s]}) for s in range(3)]
    e = row(table(*folders), "gpo").cmmd["clip"]
    v_prompt, v_seed = (0.04 / 2 / 1.96) ** 2, 0.01 / 3
    assert e.mean == pytest.approx(0.2) and e.se == pytest.approx(math.sqrt(v_prompt / 4 * 4 + v_seed))
    assert e.high - e.mean > 4 * math.sqrt(v_seed)  # Student's, at little more than two degrees of freedom
    assert e.low == 0  # no distance is below it
    first = row(table(folders[0]), "gpo").cmmd["clip"]
    assert (first.low, first.high) == pytest.approx((0.08, 0.12))


def test_the_spread_of_cmmd_is_moderated_over_rows_of_any_size(make: Make) -> None:
    """Rows that moved ten times as far spread ten times as much: each gets an interval of its own scale, narrower than alone."""
    made: dict[str, list[Path]] = {}
    for k, (name, scale) in enumerate((("gpo", 1.0), ("awm", 10.0), ("dgpo", 0.1), ("rwr", 1.0))):
        means = [scale * (1 + 0.1 * x) for x in np.random.default_rng(k).normal(size=2)]
        numbers = [Number(mean=m, ci=(m - 0.01 * scale, m + 0.01 * scale), n=40) for m in means]
        made[name] = [make(f"{name}{s}", name, s, cmmd={"clip": numbers[s]}) for s in range(2)]
    together = table(*(folder for folders in made.values() for folder in folders))
    width = lambda b, name: (e := row(b, name).cmmd["clip"]).high - e.mean
    assert (
        5 < width(together, "awm") / width(together, "gpo") < 20
        and 5 < width(together, "gpo") / width(together, "dgpo") < 20
    )
    assert width(together, "gpo") < width(table(*made["gpo"]), "gpo")


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
    assert (gpo.seed_source, gpo.single_seed) == ("unknown", True)
    assert any("gpo" in note and "not ranked" in note for note in b.notes) is invalid
    assert ranks_of(b)["awm"] == ("1-2" if invalid else "1-3")


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
    assert row(b, "gpo").rank is None and ranks_of(b)["awm"] == "1" and row(b, "gpo").faults == ("the loss is nan",)
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
    assert (versus := row(b, "awm").versus) and (versus.mean, versus.low, versus.high) == (0, 0, 0)
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
        second += any(r.rank is not None and r.rank.best > 1 for r in build_board(runs).rows)
    assert second <= most


def test_what_did_not_change_is_not_told_from_the_base(make: Make) -> None:
    """Three seeds that changed nothing: the mean of three equal numbers may differ in its last bit from the number."""
    run = load_runs([make("one")])[0]
    soft = np.random.default_rng(1).choice([0.1, 0.2, 0.4, 0.6, 0.8], (328, 2))
    run = replace(run, before={KEY: soft}, after={KEY: soft}, strata=("",) * 328)
    b = build_board([in_memory(run, m, s, soft.copy()) for m in ("a", "b") for s in range(3)])
    assert set(ranks_of(b).values()) == {"1-3"}
    assert all(r.versus and (r.versus.mean, r.versus.p) == (0, 1) for r in b.rows if r.kind != "base")


def test_a_few_changed_prompts_are_no_second_rank(make: Make) -> None:
    """Two prompts gained and none lost, the same under three seeds."""
    run = load_runs([make("one")])[0]
    after = run.before[KEY].copy()
    after[:2] += 0.5
    b = build_board([in_memory(run, "a", s, after) for s in range(3)])
    versus = row(b, "a").versus
    assert set(ranks_of(b).values()) == {"1-2"} and versus is not None and versus.p is not None and versus.p > 0.1


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
    assert KEY not in row(b, "awm").cells and row(b, "awm").rank is None and ranks_of(b)["gpo"] == "1-2"
    assert any(note.startswith("other scored 2 of 3 rows") for note in b.notes)
    assert row(table(*(Path(f) for r in b.rows for f in r.folders), key="engine/exact"), "awm").rank is not None

"""Regression checks find planted changes, have the stated error rates, and refuse runs with other inputs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation import record
from gpobench.bench.evaluation.record import Flags, ScorerUse
from gpobench.bench.stats.law import holm
from gpobench.leaderboards import render_regression
from gpobench.leaderboards.baseline import baseline_files, read_baseline, scores_path
from gpobench.leaderboards.baseline_runs import BaselineRun, RunOptions, run_baselines
from gpobench.leaderboards.change import (
    Changes,
    NumberScores,
    estimate_changes,
    expected_half_widths,
    shared_spreads,
    verdicts,
)
from gpobench.leaderboards.commands.regress import regress
from gpobench.leaderboards.regress import LoadedBaseline, RegressionReport, check, check_all
from gpobench.leaderboards.runs import load_runs

Make = Callable[..., Path]
Vectors = list[np.ndarray]
KEY = "other/exact"
app = typer.Typer()
app.command()(regress)


@pytest.fixture(autouse=True)
def commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPOBENCH_REVISION", "0123abc")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


@pytest.fixture
def baseline(make: Make, tmp_path: Path) -> Path:
    """Three seeds of gpo, two of awm and the base, with a margin of .03."""
    for seed in range(3):
        make(f"old/gpo{seed}", "gpo", seed, 0.2)
    for seed in range(2):
        make(f"old/awm{seed}", "awm", seed, 0.1)
    path = tmp_path / "mine.toml"
    assert run(tmp_path / "old", "--against", path, "--update", "--margin", "0.03")[0] == 0
    return path


def verdict_of(report: RegressionReport) -> dict[tuple[str, str], str]:
    return {(f.row, f.key): f.verdict for f in report.findings}


def check_runs(path: Path, *folders: Path) -> RegressionReport:
    return check(LoadedBaseline(path, *read_baseline(path)), load_runs(folders))


# The rule


def draw(
    rng: np.random.Generator, shift: float = 0.0, *, n: int = 80, seeds: tuple[int, int] = (3, 3), spread: float = 0.02,
    own: float = 0.15, binary: bool = False,
) -> tuple[Vectors, Vectors]:  # fmt: skip
    """New and reported: prompts are hard or easy for all, `spread` the seeds' own, `own` what a seed makes of a prompt."""
    hard = rng.uniform(0.3, 0.6, n)

    def side(count: int, more: float) -> Vectors:
        made: Vectors = []
        for _ in range(count):
            mean = hard + more + rng.normal(0, spread)
            made.append(rng.binomial(2, np.clip(mean, 0, 1)) / 2 if binary else mean + rng.normal(0, own, n))
        return made

    return side(seeds[0], shift), side(seeds[1], 0.0)


def changes_of(*pairs: tuple[Vectors, Vectors], trained: bool = True) -> Changes:
    """New and reported of each row of a report with one key."""
    spreads = shared_spreads({str(k): pair for k, pair in enumerate(pairs)})
    return estimate_changes(
        [NumberScores(*pair, trained=trained, spread=spreads[str(k)]) for k, pair in enumerate(pairs)]
    )


def verdicts_of(changes: Changes, margin: float) -> list[str]:
    return verdicts(changes, np.full(len(changes.mean), margin)).tolist()


def rates(times: int, shift: float, margin: float, numbers: int = 1, **more: Any) -> dict[str, float]:
    """How often some number of a table got each verdict, and how often all were the same."""
    rng = np.random.default_rng(7)
    some: dict[str, float] = dict.fromkeys(("same", "better", "worse", "cannot tell", "all same"), 0.0)
    for _ in range(times):
        drawn = verdicts_of(changes_of(*(draw(rng, shift, **more) for _ in range(numbers))), margin)
        for verdict in set(drawn):
            some[verdict] += 1 / times
        some["all same"] += set(drawn) == {"same"}
    return some


def bound(rate: float, times: int) -> float:
    """Three standard errors above a rate that holds."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / times)


CASES: list[dict[str, Any]] = [
    {},
    {"binary": True},
    {"seeds": (1, 3)},
    {"seeds": (2, 2)},
    {"seeds": (3, 3), "spread": 0.06},
    {"seeds": (3, 3), "spread": 0.0},
    {"seeds": (5, 3), "n": 30},
]


def check_rates(times: int, **case: Any) -> None:
    still = rates(times, 0.0, 0.08, **case)
    assert still["worse"] <= bound(0.01, times) and still["better"] <= bound(0.01, times), still
    edge = rates(times, -0.08, 0.08, **case)  # the true change is the margin
    assert edge["same"] <= bound(0.05, times), edge


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_errors_are_as_rare_as_the_rule_says(case: dict[str, Any]) -> None:
    check_rates(300, **case)


def test_errors_of_a_whole_table_are_as_rare() -> None:
    still = rates(100, 0.0, 0.05, numbers=8, n=40)
    assert still["worse"] <= bound(0.01, 100), still


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_as_rare_in_a_thousand(case: dict[str, Any]) -> None:
    check_rates(1000, **case)


@pytest.mark.slow
def test_errors_of_a_whole_table_are_as_rare_in_a_thousand() -> None:
    still = rates(1000, 0.0, 0.05, numbers=12)
    assert still["worse"] <= bound(0.01, 1000), still


def test_real_changes_are_detected() -> None:
    assert rates(60, -0.2, 0.05)["worse"] > 0.85 and rates(60, 0.2, 0.05)["better"] > 0.85
    assert rates(60, 0.0, 0.12)["same"] > 0.9


def test_the_opposite_change_has_the_opposite_verdict() -> None:
    rng = np.random.default_rng(0)
    for shift in (-0.3, -0.06, 0.0, 0.06, 0.3):
        new, old = draw(rng, shift)
        one, other = changes_of((new, old)), changes_of((old, new))
        assert one.mean == pytest.approx(-other.mean) and one.noise.se == pytest.approx(other.noise.se)
        (there,), (back,) = verdicts_of(one, 0.05), verdicts_of(other, 0.05)
        assert back == {"better": "worse", "worse": "better"}.get(there, there)


def test_with_one_seed_each_the_margin_decides() -> None:
    rng = np.random.default_rng(1)
    near = [draw(rng, -0.05, seeds=(1, 1), spread=0.0, own=0.01)]
    of = changes_of(*near)
    assert not of.known[0] and verdicts_of(of, 0.1) == ["same"]
    assert verdicts_of(of, 0.05) == ["cannot tell"] and verdicts_of(of, 0.02) == ["worse"]
    untrained = changes_of(*near, trained=False)
    assert untrained.known[0] and verdicts_of(untrained, 0.04) == ["worse"]


def test_one_seed_is_lent_the_spread_of_rows_with_several() -> None:
    rng = np.random.default_rng(2)
    several, single = draw(rng, spread=0.03), draw(rng, seeds=(1, 1), spread=0.03)
    of = changes_of(several, single)
    assert of.known.all() and of.noise.seeds[1] > 0


def test_strata_weigh_alike() -> None:
    new, old = np.array([0.2] * 30 + [1.0] * 3), np.array([0.0] * 30 + [1.0] * 3)
    strata = ["many"] * 30 + ["few"] * 3
    number = NumberScores([new], [old])
    assert estimate_changes([number], strata).mean == pytest.approx(0.1)
    assert estimate_changes([number]).mean == pytest.approx(0.2 * 30 / 33)


@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_too_few_prompts_give_no_verdict_and_no_interval(prompts: int) -> None:
    old = [np.linspace(0.8, 0.9, prompts) + seed for seed in (0.0, 0.01)]
    new = [x - 0.7 for x in old]
    of = changes_of((new, old))
    assert verdicts_of(of, 0.5) == ["cannot tell"]
    assert np.isnan(of.noise.se).all() and np.isnan(of.p(np.array([0.5]))).all()
    assert np.isnan(of.noise.quantile()).all()


def test_the_expected_half_width_is_that_of_a_repetition() -> None:
    """Half the 90 % interval as predicted from one side's seeds agrees with that of other seeds."""
    rng = np.random.default_rng(3)
    expected, observed = list[float](), list[float]()
    for _ in range(60):
        new, old = draw(rng, seeds=(4, 4))
        spread = shared_spreads({"row": ([], old)})["row"]
        expected.append(float(expected_half_widths(spread, np.array(4.0))))
        observed.append(float(changes_of((new, old)).noise.quantile(0.9)[0]))
    assert np.median(expected) == pytest.approx(np.median(observed), rel=0.25)
    alone = shared_spreads({"row": ([], draw(rng)[1][:1])})["row"]
    assert math.isnan(expected_half_widths(alone, np.array(1.0)))


# The floor


def gate(gain: float, reported_gain: float = 0.3, *, spread: float = 0.02, told: bool = True) -> Changes:
    """One row whose gain was reported and is now another one; more rows are as reported."""
    rng = np.random.default_rng(5)
    base = rng.uniform(0.2, 0.5, 80)
    side = lambda level: [
        base + level + rng.normal(0, spread) + rng.normal(0, 0.15, 80) * (level != 0) for _ in range(3)
    ]
    rows = {"mine": (side(gain), side(reported_gain))} | {f"other{k}": (side(0.2), side(0.2)) for k in range(4)}
    spreads = shared_spreads(rows)
    over = lambda seeds: [x - base for x in seeds]
    return estimate_changes(
        [
            NumberScores(new, old, over(new), over(old), told=told, spread=spreads[label])
            for label, (new, old) in rows.items()
        ]
    )


def test_a_told_gain_that_is_lost_is_worse_within_any_margin() -> None:
    dead, alive = gate(0.0, spread=0.0), gate(0.3)
    assert verdicts_of(dead, 5.0)[0] == "worse" and dead.lost()[0] and not dead.lost()[1:].any()
    assert not alive.lost().any() and "worse" not in verdicts_of(alive, 0.05)
    assert verdicts_of(gate(0.0, spread=0.0, told=False), 5.0)[0] == "same"


def test_a_gain_that_is_smaller_and_told_again_keeps_its_floor() -> None:
    assert not gate(0.2).lost().any() and verdicts_of(gate(0.2), 0.5)[0] == "same"


def test_a_method_that_moves_nothing_is_found_though_its_gain_was_barely_told() -> None:
    """The change alone is not significant; that no score moved is."""
    rng = np.random.default_rng(8)
    base = rng.uniform(0.2, 0.5, 40)
    old = [base + 0.04 + shift + rng.normal(0, 0.1, 40) for shift in (-0.03, 0.03)]
    over = lambda seeds: [x - base for x in seeds]
    moving = [base + rng.normal(0, 0.1, 40) for _ in range(2)]
    for new, verdict in (([base, base], "worse"), (moving, "cannot tell")):
        spread = shared_spreads({"row": (new, old)})["row"]
        of = estimate_changes([NumberScores(new, old, over(new), over(old), told=True, spread=spread)])
        assert verdicts_of(of, 0.02) == [verdict] and of.corrected_p(np.array([0.02]))[0] > 0.02


def test_repeated_and_base_numbers_are_no_part_of_holms_family() -> None:
    """Three numbers that repeat and two of the base leave the p of the one that moved as it is."""
    rng = np.random.default_rng(4)
    moved, still = draw(rng, -0.1), draw(rng)
    spreads = shared_spreads({"moved": moved, "still": still})
    alone = NumberScores(*moved, spread=spreads["moved"])
    repeated = NumberScores(still[1], still[1], repeated=True, spread=spreads["still"])
    of_base = NumberScores(still[0][:1], still[1][:1], trained=False)
    many = estimate_changes([alone, repeated, repeated, repeated, of_base, of_base])
    margins = np.full(6, 0.01)
    assert many.corrected_p(margins)[0] == many.p(margins)[0] > 0
    assert np.isnan(many.corrected_p(margins)[1:4]).all() and np.isfinite(many.corrected_p(margins)[4:]).all()


# Runs against a baseline


def test_the_same_runs_repeat_their_numbers(baseline: Path, tmp_path: Path) -> None:
    report = check_runs(baseline, tmp_path / "old")
    assert set(verdict_of(report).values()) == {"same"} and all(f.repeated for f in report.findings)
    assert len(report.findings) == 6 and report.code() == 0 and not report.missing
    one = check_runs(baseline, tmp_path / "old" / "gpo1")  # one of the reported seeds
    assert all(f.change.mean == 0 == f.change.high for f in one.findings)
    assert "1 of 3 seeds run, repeated exactly" in render_regression.terminal(one)
    assert {f.row: f.seeds for f in one.findings} == {"base": (0, 0), "gpo": (1, 3)}
    assert one.missing == (("awm", "engine/exact"), ("awm", KEY))


def test_a_missing_number_never_passes(baseline: Path, tmp_path: Path) -> None:
    """Runs of one row of two: its numbers are the same, and those of the other row are missing, with --allow-unsure too."""
    for allow in ([], ["--allow-unsure"]):
        code, output = run(tmp_path / "old" / "gpo1", "--against", baseline, *allow)
        assert (
            code == 3 and "Not in these runs: awm engine/exact" in output and "6 numbers: 4 same, 2 missing" in output
        )
    assert run(tmp_path / "old" / "gpo1", "--against", baseline, "--row", "gpo", "--row", "base")[0] == 0
    tree = Xml.fromstring(render_regression.junit([check_runs(baseline, tmp_path / "old" / "gpo1")], allow_unsure=True))
    assert tree.get("errors") == "2" and {e.get("type") for e in tree.iter("error")} == {"missing"}


def test_other_seeds_are_no_regression(baseline: Path, make: Make, tmp_path: Path) -> None:
    for seed in (5, 6, 7):
        make(f"new/gpo{seed}", "gpo", seed, 0.2)
    report = check_runs(baseline, tmp_path / "new")
    assert not any(f.repeated for f in report.findings if f.row == "gpo")
    assert set(verdict_of(report).values()) == {"same"}
    one = check_runs(baseline, tmp_path / "new" / "gpo6")
    assert set(verdict_of(one).values()) <= {"same", "cannot tell"}


MINE, OTHER_KIND = "AuthenticAMD family 26 model 2, AVX512", "GenuineIntel family 6 model 85, AVX512"


def test_the_last_digits_are_expected_of_the_kind_of_processor_that_made_them(
    make: Make, before_and_after: Any, tmp_path: Path
) -> None:
    """On another kind the change of a last digit is no regression, and a note says so; on the same kind it is reported."""
    for seed in range(2):
        make(f"old/{seed}", "gpo", seed, 0.2, provenance={"processor": MINE})
        shaken = {
            key: (before + 1e-3, after - 1e-3)
            for k, key in enumerate(("engine/exact", KEY))
            for before, after in [before_and_after(0.2, 10 * k + seed)]
        }
        make(f"same/{seed}", "gpo", seed, 0.2, scores_by_key=shaken, provenance={"processor": MINE})
        make(f"elsewhere/{seed}", "gpo", seed, 0.2, scores_by_key=shaken, provenance={"processor": OTHER_KIND})
        make(f"unknown/{seed}", "gpo", seed, 0.2, scores_by_key=shaken)
        make(f"none changed/{seed}", "gpo", seed, 0.2, provenance={"processor": OTHER_KIND})
    path = tmp_path / "mine.toml"
    assert run(tmp_path / "old", "--against", path, "--update", "--margin", "0.05")[0] == 0
    assert read_baseline(path)[0].processor == MINE
    assert not check_runs(path, tmp_path / "old").notes
    made = f"Made on {MINE}; this is {OTHER_KIND}: numbers repeat within the margin, not to the last digit."
    for folder, message in {
        "same": f"Made on the same kind of processor ({MINE})",
        "elsewhere": made,
        "unknown": f"Made on {MINE}: on another kind of processor numbers repeat within the margin",
        "none changed": made,
    }.items():
        report = check_runs(path, tmp_path / folder)
        assert report.code() == 0 and set(verdict_of(report).values()) == {"same"}
        assert len([note for note in report.notes if message in note]) == 1, (folder, report.notes)
        assert message in render_regression.terminal(report).replace("\n", " ")


def test_a_baseline_without_the_kind_of_processor_is_read(baseline: Path, tmp_path: Path) -> None:
    lines = baseline.read_text().splitlines(keepends=True)
    baseline.write_text("".join(line for line in lines if not line.startswith("processor = ")))
    assert read_baseline(baseline)[0].processor == "" and not check_runs(baseline, tmp_path / "old").notes


def test_a_planted_regression_fails(baseline: Path, make: Make, tmp_path: Path) -> None:
    for seed in range(3):
        make(f"new/gpo{seed}", "gpo", seed, 0.05)
        make(f"new/awm{seed}", "awm", seed, 0.3)
    report = check_runs(baseline, tmp_path / "new")
    by_number = verdict_of(report)
    assert by_number["gpo", KEY] == by_number["gpo", "engine/exact"] == "worse" and by_number["awm", KEY] == "better"
    assert by_number["base", KEY] == "same" and report.code() == report.code(allow_unsure=True) == 1
    code, text = run(tmp_path / "new", "--against", baseline)
    assert code == 1 and text.splitlines()[4].startswith("worse")


def test_a_flipped_sign_fails(baseline: Path, make: Make, before_and_after: Any, tmp_path: Path) -> None:
    for seed in range(3):
        scores_by_key = {}
        for k, key in enumerate(("engine/exact", KEY)):
            before, after = before_and_after(0.2, 10 * k + seed)
            scores_by_key[key] = (before, before - (after - before))
        make(f"new/gpo{seed}", "gpo", seed, scores_by_key=scores_by_key)
    assert verdict_of(check_runs(baseline, tmp_path / "new"))["gpo", KEY] == "worse"


def test_an_undecided_number_exits_with_3(baseline: Path, make: Make, before_and_after: Any, tmp_path: Path) -> None:
    for seed in (7, 8, 9):
        scores_by_key = {key: before_and_after(0.2, 10 * k + seed) for k, key in enumerate(("engine/exact", KEY))}
        scores_by_key[KEY] = (scores_by_key[KEY][0], scores_by_key[KEY][1] + 0.3 * (seed - 8))  # seeds far apart
        make(f"new/gpo{seed}", "gpo", seed, scores_by_key=scores_by_key)
    assert verdict_of(check_runs(baseline, tmp_path / "new"))["gpo", KEY] == "cannot tell"
    mine = ("--row", "gpo", "--row", "base")
    assert run(tmp_path / "new", "--against", baseline, *mine)[0] == 3
    assert run(tmp_path / "new", "--against", baseline, *mine, "--allow-unsure")[0] == 0
    case = Xml.fromstring(render_regression.junit([check_runs(baseline, tmp_path / "new")])).find(
        ".//testcase[@classname='gpo']/error"
    )
    assert case is not None and case.get("type") == "cannot tell"


def test_few_missing_scores_are_tolerated_many_refused(baseline: Path, make: Make, before_and_after: Any) -> None:
    before, after = before_and_after(0.2, 10)
    big = {"engine/exact": before_and_after(0.2, 0), KEY: (before, after.copy())}
    big[KEY][1][0, 0] = math.nan
    with pytest.raises(UserError, match=r"1.2 % of the images have no other/exact, more than 0.5 %"):
        check_runs(baseline, make("holes", "gpo", 0, scores_by_key=big))
    scores_by_key = {key: before_and_after(0.2, k, prompts=150) for k, key in enumerate(("engine/exact", KEY))}
    scores_by_key[KEY][1][0, 0] = math.nan
    folder = make("wide", "gpo", 0, scores_by_key=scores_by_key)
    path = baseline.with_name("wide.toml")
    assert run(folder, "--against", path, "--update", "--margin", "0.03")[0] == 0
    assert check_runs(path, folder).code() == 0
    with pytest.raises(UserError, match="is invalid: more than 0.5 %"):
        check_runs(baseline, make("bad", "gpo", 0, 0.2, flags=Flags(hack=False, invalid=True)))
    with pytest.raises(UserError, match="faulty ended by a fault: the loss is nan"):
        check_runs(baseline, make("faulty", "gpo", 0, 0.2, fault="the loss is nan"))


OTHER = {
    "task version is 2 in": {"task_version": "2"},
    "prompts of split test is cc in": {"prompts": {"test": "cc"}},
    "scorer id of other is other-2 in": {
        "scorers": {"other": ScorerUse(id="other-2", role="held-out", calls=0, seconds=0.0, errors=0)}
    },
    "budget nfe is 2000.0 in": {"config": {"budget": {"nfe": 2000.0}}},
    "budget seconds is 9 in": {"config": {"budget": {"nfe": 1000.0, "seconds": 9}}},
    "weights of the model is w2 in": {"provenance": {"weights": "w2"}},
    "evaluation seed is 2 in": {"config": {"evaluation": {"split": "test", "seed": 2}}},
    "no run in common: .* is of awm, gpo on ocr with tiny; these are of sft on ocr with tiny": {"method": "sft"},
    "no run in common": {"task": "counting"},
    "no run in common.*these are of gpo on ocr with big": {"model": "big"},
}


@pytest.mark.parametrize("message", OTHER)
def test_other_inputs_are_refused(baseline: Path, make: Make, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_runs(baseline, make("new", **OTHER[message]))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_refused(baseline: Path, make: Make, tmp_path: Path) -> None:
    cut, empty = make("cut"), tmp_path / "empty"
    empty.mkdir()
    whole = (cut / "scores.parquet").read_bytes()
    (cut / "scores.parquet").write_bytes(whole[: len(whole) // 2])
    for folder, message in (
        (cut, "was changed or cut after the run wrote it"),
        (empty, "no finished run"),
        (tmp_path / "gone", "is no folder of runs"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, "--against", baseline)


def test_other_settings_are_judged_and_said(baseline: Path, make: Make, tmp_path: Path) -> None:
    other = {"config": {"settings": {"lr": 5.0, "optim": {"clip": 1.0}}}}
    make("new/a", "gpo", 0, 0.2, **other)
    report = check_runs(baseline, tmp_path / "new")
    assert any("gpo has other settings than reported: lr 0.001 -> 5.0" in note for note in report.notes)
    make("new/b", "gpo", 0, 0.2)  # now one of them is the reported one
    assert not check_runs(baseline, tmp_path / "new").notes
    make("more/c", "gpo", 0, 0.2, config={"settings": {"lr": 7.0, "optim": {"clip": 1.0}}})
    with pytest.raises(
        UserError, match="several settings and none of them is the reported one: gpo .lr=5.0.; gpo .lr=7.0."
    ):
        check_runs(baseline, tmp_path / "new" / "a", tmp_path / "more")


def test_settings_tell_the_rows_of_one_method_apart(make: Make, tmp_path: Path) -> None:
    """Runs of one of two rows are not compared with the other, which is missing."""
    low = {"config": {"settings": {"lr": 1e-4, "optim": {"clip": 1.0}}}}
    for seed in range(2):
        make(f"old/high{seed}", "gpo", seed, 0.3)
        make(f"old/low{seed}", "gpo", seed, 0.1, **low)
    path = tmp_path / "two.toml"
    assert run(tmp_path / "old", "--against", path, "--update", "--margin", "0.03")[0] == 0
    report = check_runs(path, tmp_path / "old" / "low0", tmp_path / "old" / "low1")
    assert set(verdict_of(report).values()) == {"same"} and {row for row, _ in report.missing} == {"gpo (lr=0.001)"}


def test_a_changed_base_is_detected_in_any_run(make: Make, before_and_after: Any, tmp_path: Path) -> None:
    """Two of three runs saw a base that is lower by more than the margin, though by little of its spread."""
    before, after = before_and_after(0.2, 3)
    shift = 0.04 * float(before.mean(1).std())
    make("old/a", scores_by_key={KEY: (before, after)})
    path = tmp_path / "one.toml"
    assert run(tmp_path / "old", "--against", path, "--update", "--margin", str(shift / 4))[0] == 0
    for seed in range(3):
        make(f"new/{seed}", "gpo", seed, scores_by_key={KEY: (before - shift * (seed > 0), after)})
    report = check_runs(path, tmp_path / "new")
    assert verdict_of(report)["base", KEY] == "worse"
    assert any("base's scores are not the same" in note for note in report.notes)


def test_a_margin_that_a_person_edited_stays_with_its_row(baseline: Path, tmp_path: Path) -> None:
    text = baseline.read_text()
    head, rows = text.split("[[row]]", 1)
    first, rest = rows.split("[[row]]", 1)
    baseline.write_text("[[row]]".join([head, first.replace("margin = 0.03", "margin = 0.001"), rest]))
    assert run(tmp_path / "old", "--against", baseline, "--update")[0] == 0
    margins = {claim.label: {n.margin for n in claim.number} for claim in read_baseline(baseline)[0].row}
    assert margins == {"base": {0.001}, "awm": {0.03}, "gpo": {0.03}}
    with pytest.raises(UserError, match="finest"):
        run(tmp_path / "old", "--against", baseline, "--update", "--margin", "1e-11")


def test_runs_that_did_not_end_are_named(baseline: Path, make: Make, tmp_path: Path) -> None:
    (tmp_path / "old" / "gpo9").mkdir()
    (tmp_path / "old" / "gpo9" / "config.toml").write_text("# gpobench run --method gpo --task ocr\n")
    code, output = run(tmp_path / "old", "--against", baseline)
    assert code == 0 and "gpo9 (not finished)" in output


def test_runs_of_other_methods_are_left_out(baseline: Path, make: Make, tmp_path: Path) -> None:
    make("new/gpo", "gpo", 0, 0.2)
    make("new/sft", "sft", 0, 0.2, config={"budget": {"nfe": 5.0}})
    report = check_runs(baseline, tmp_path / "new")
    assert "1 runs are not of this baseline and were left out." in report.notes and {
        f.row for f in report.findings
    } == {"base", "gpo"}


def test_a_key_that_is_not_there_is_missing(baseline: Path, make: Make, before_and_after: Any) -> None:
    engine = ScorerUse(id="engine-1", role="training", calls=9, seconds=1.0, errors=0)
    folder = make("new", "gpo", 0, scores_by_key={"engine/exact": before_and_after(0.2, 0)})
    file = folder / "record.json"
    record.write(file, record.read(file).model_copy(update={"scorers": {"engine": engine}}))
    report = check_runs(baseline, folder)
    assert ("gpo", KEY) in report.missing and verdict_of(report)["gpo", "engine/exact"] == "same"


# The command


def test_every_format_has_the_same_verdicts(
    baseline: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("new/gpo0", "gpo", 0, 0.0001)
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    files = tmp_path / "v.xml", tmp_path / "v.md"
    code, text = run(tmp_path / "new", "--against", baseline, "--junit", files[0], "--markdown", files[1], "--json")
    output = json.loads(text)
    assert code == output["exit_code"] == 1 and output["counts"] == {
        "same": 2,
        "better": 0,
        "worse": 2,
        "cannot tell": 0,
    }
    suite = Xml.parse(files[0]).getroot().find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "2", "2")
    failed = [(c.get("classname"), c.get("name")) for c in suite.findall("testcase") if c.find("failure") is not None]
    assert sorted(failed) == [("gpo", "engine/exact"), ("gpo", KEY)]
    table = files[1].read_text()
    assert table.count("**worse**") == 2 and "6 numbers: 2 same, 2 worse, 2 missing" in table
    assert summary.read_text() == "before\n" + table


def test_only_the_rows_asked_for(baseline: Path, tmp_path: Path) -> None:
    output = json.loads(run(tmp_path / "old", "--against", baseline, "--row", "awm", "--json")[1])
    assert {f["row"] for f in output["findings"]} == {"awm"} and "3 runs are not of this baseline" in output["notes"][0]
    output = json.loads(run(tmp_path / "old", "--against", baseline, "--row", "base", "--json")[1])
    assert {f["row"] for f in output["findings"]} == {"base"}
    with pytest.raises(UserError, match="did you mean 'gpo'"):
        run(tmp_path / "old", "--against", baseline, "--row", "gpoo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("RUNS",), "name one baseline"),
        (("RUNS", "--against", "a.toml", "--run", "a.toml"), "name one baseline"),
        (("--against", "a.toml"), "name runs to compare"),
        (("RUNS", "--run", "a.toml"), "leave RUNS out"),
        (("RUNS", "--against", "a.toml", "--margin", "1"), "--update writes"),
        (("RUNS", "--against", "a.toml", "--update", "--row", "gpo"), "--update writes all rows"),
        (("RUNS", "--against", "a.toml"), "no baseline at a.toml"),
        (("--run", "a.toml", "--update"), "no baseline at a.toml that says what to run"),
    ],
)
def test_requests_that_make_no_sense(make: Make, arguments: Sequence[str], message: str) -> None:
    folder = make("old/gpo")
    with pytest.raises(UserError, match=message):
        run(*(folder if word == "RUNS" else word for word in arguments))


# Several tasks


@pytest.fixture
def both(make: Make, tmp_path: Path) -> Path:
    """Three seeds of gpo on two tasks, in one folder: an index of two baselines."""
    for task in ("ocr", "counting"):
        for seed in range(3):
            make(f"old/{task}{seed}", "gpo", seed, 0.2, task=task)
    path = tmp_path / "all.toml"
    assert run(tmp_path / "old", "--against", path, "--update", "--margin", "0.03")[0] == 0
    return path


def test_runs_of_several_tasks_make_a_baseline_each_and_an_index(both: Path, make: Make, tmp_path: Path) -> None:
    listed = [both.with_name(f"all-{task}.toml") for task in ("ocr", "counting")]
    assert sorted(baseline_files(both)) == sorted(listed) and all(baseline_files(one) == [one] for one in listed)
    code, output = run(tmp_path / "old", "--against", both, "--json")
    found = json.loads(output)
    assert code == 0 and found["counts"]["same"] == sum(len(part["findings"]) for part in found["parts"]) > 0
    assert {part["baseline"] for part in found["parts"]} == {str(one) for one in listed}
    make("new/bad", "gpo", 0, 0.0, task="counting")
    make("new/good", "gpo", 0, 0.2, task="ocr")
    files = tmp_path / "v.xml", tmp_path / "v.md"
    code, text = run(tmp_path / "new", "--against", both, "--junit", files[0], "--markdown", files[1])
    assert code == 1 and "ocr (version" in text and "counting (version" in text
    suites = Xml.parse(files[0]).getroot().findall("testsuite")
    assert len(suites) == 2 and sorted(s.get("failures") != "0" for s in suites) == [False, True]
    assert files[1].read_text().count("### ") == 2


def test_numbers_of_all_parts_are_corrected_together(both: Path, make: Make, tmp_path: Path) -> None:
    for task in ("ocr", "counting"):
        for seed in (3, 4):
            make(f"new/{task}{seed}", "gpo", seed, 0.17, task=task)
    together = [LoadedBaseline(part, *read_baseline(part)) for part in baseline_files(both)]
    runs = load_runs([tmp_path / "new"])
    joint = [f.holm for report in check_all(together, runs) for f in report.findings]
    alone = [f.holm for one in together for f in check(one, runs).findings]
    raw = [f.change.p for report in check_all(together, runs) for f in report.findings]
    trained = [f.row != "base" for report in check_all(together, runs) for f in report.findings]
    of_rows = lambda values: [x for x, is_row in zip(values, trained, strict=True) if is_row]
    assert of_rows(joint) == pytest.approx(holm(of_rows(raw)))
    assert all(a >= b for a, b in zip(of_rows(joint), of_rows(alone), strict=True)) and joint != alone


def test_a_part_without_runs_is_missing_and_all_without_are_an_error(both: Path, make: Make, tmp_path: Path) -> None:
    code, output = run(tmp_path / "old" / "ocr0", "--against", both, "--json")
    found = {part["protocol"].split()[0]: part for part in json.loads(output)["parts"]}
    assert code == 3 and not found["counting"]["findings"] and found["counting"]["missing"] and found["ocr"]["findings"]
    assert run(tmp_path / "old" / "ocr0", "--against", both, "--task", "ocr")[0] == 0
    with pytest.raises(UserError, match="did you mean 'ocr'"):
        run(tmp_path / "old" / "ocr0", "--against", both, "--task", "orc")
    make("odd/x", "awm", 0, 0.1, task="colour")
    with pytest.raises(UserError, match="no run in common"):
        run(tmp_path / "odd", "--against", both)


def test_one_task_is_written_anew_without_the_other(both: Path, make: Make, tmp_path: Path) -> None:
    kept = both.with_name("all-counting.toml").read_text()
    for seed in range(3):
        make(f"newer/{seed}", "gpo", seed, 0.3, task="ocr")
    assert run(tmp_path / "newer", "--against", both, "--update")[0] == 0
    assert both.with_name("all-counting.toml").read_text() == kept and len(baseline_files(both)) == 2
    assert run(tmp_path / "newer", "--against", both, "--task", "ocr")[0] == 0
    with pytest.raises(UserError, match="is of one task"):
        run(tmp_path / "old", "--against", both.with_name("all-ocr.toml"), "--update", "--margin", "0.03")


@pytest.mark.parametrize("text", ["format = 3\nparts = []", "format = 3\nparts = 'a'", "parts = ['a.toml']\nx = 1"])
def test_a_damaged_index_is_refused(text: str, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "index.toml"
    path.write_text(text)
    with pytest.raises(UserError, match="no list of baselines"):
        run(make("old/a"), "--against", path)
    path.write_text("format = 3\nparts = ['nowhere.toml']")
    with pytest.raises(UserError, match="no baseline at .*nowhere"):
        run(make("old/b"), "--against", path)


# A new baseline


def test_update_keeps_margins_and_takes_new_ones(baseline: Path, make: Make, tmp_path: Path) -> None:
    make("old/sft", "sft", 0, 0.1)
    assert run(tmp_path / "old", "--against", baseline, "--update", "--margin", f"{KEY}=0.05")[0] == 0
    written, _ = read_baseline(baseline)
    assert {n.key: n.margin for c in written.row for n in c.number} == {"engine/exact": 0.03, KEY: 0.05}
    assert [c.label for c in written.row] == ["base", "awm", "gpo", "sft"]
    assert [c.number[0].repeat is None for c in written.row] == [True, False, False, True]
    assert (
        written.commit == "0123abc"
        and written.runs_commits == ("abc",)
        and written.task == "ocr"
        and written.date[:2] == "20"
    )
    text = baseline.read_text()
    assert run(tmp_path / "old", "--against", baseline, "--update")[0] == 0
    assert text.replace(written.command, "") == baseline.read_text().replace(read_baseline(baseline)[0].command, "")


@pytest.mark.parametrize("revision", ["0123abc-dirty", ""])
def test_a_baseline_is_of_a_commit(make: Make, tmp_path: Path, revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = make("good"), make("bad", provenance={"revision": revision})
    path = tmp_path / "x.toml"
    with pytest.raises(UserError, match="bad was made with uncommitted changes"):
        run(bad, "--against", path, "--update", "--margin", "0.1")
    monkeypatch.setattr("gpobench.bench.evaluation.record.revision", lambda: revision)
    with pytest.raises(UserError, match="this tree has uncommitted changes, or no history"):
        run(good, "--against", path, "--update", "--margin", "0.1")
    assert not path.exists() and not scores_path(path).exists()


def test_a_baseline_needs_margins_and_keys_that_exist(make: Make, tmp_path: Path) -> None:
    folder, path = make("old/gpo"), tmp_path / "x.toml"
    for more, message in (
        (("--margin", "100%"), "a share is below 100%"),
        (("--margin", "wide"), "--margin wants a positive number"),
        (("--margin", "0"), "--margin wants a positive number"),
        (("--margin", "othr/exact=0.1"), "did you mean 'other/exact'"),
        (("--margin", "0.1", "--key", "other/exat"), "did you mean 'other/exact'"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, "--against", path, "--update", *more)
    assert run(folder, "--against", path, "--update", "--margin", "0.0005", "--key", KEY)[0] == 0
    written, _ = read_baseline(path)
    assert (
        written.digits == 6
        and {n.key for c in written.row for n in c.number} == {KEY}
        and set(written.scorers) == {"engine", "other"}
    )


def margins_of(path: Path) -> dict[tuple[str, str], float]:
    return {(c.label, n.key): n.margin for c in read_baseline(path)[0].row for n in c.number}


def test_a_margin_is_a_share_of_the_gain_and_half_where_none_is_stated(make: Make, tmp_path: Path) -> None:
    for seed in range(3):
        make(f"old/gpo{seed}", "gpo", seed, 0.2)
        make(f"old/awm{seed}", "awm", seed, 0.1)
    path = tmp_path / "x.toml"
    assert run(tmp_path / "old", "--against", path, "--update")[0] == 0
    half = margins_of(path)
    assert half["gpo", KEY] == pytest.approx(0.1, rel=0.1) and half["awm", KEY] == pytest.approx(0.05, rel=0.1)
    assert half["base", KEY] == half["awm", KEY]  # the smallest
    assert all(n.told and n.rule == "50%" for c in read_baseline(path)[0].row[1:] for n in c.number)
    assert run(tmp_path / "old", "--against", path, "--update", "--margin", f"{KEY}=10%")[0] == 0
    tenth = margins_of(path)
    assert tenth["gpo", KEY] == pytest.approx(0.02, rel=0.1)
    assert tenth["gpo", "engine/exact"] == half["gpo", "engine/exact"]
    for seed in range(3):
        make(f"better/gpo{seed}", "gpo", seed, 0.4)
        make(f"better/awm{seed}", "awm", seed, 0.1)
    assert run(tmp_path / "better", "--against", path, "--update")[0] == 0  # the rule is kept, not its number
    assert margins_of(path)["gpo", KEY] == pytest.approx(0.04, rel=0.1)


def test_a_share_is_never_less_than_seeds_can_show(make: Make, tmp_path: Path) -> None:
    for seed in range(3):
        make(f"old/sft{seed}", "sft", seed, 0.001)
    path = tmp_path / "x.toml"
    assert run(tmp_path / "old", "--against", path, "--update", "--margin", "1%")[0] == 0
    for number in read_baseline(path)[0].row[1].number:
        assert number.repeat is not None and number.margin >= number.repeat > 0.01 * abs(number.gain or 0.0)


def test_a_margin_as_large_as_the_gain_that_it_guards_is_said(make: Make, tmp_path: Path) -> None:
    for seed in range(3):
        make(f"old/gpo{seed}", "gpo", seed, 0.2)
    arguments = [str(tmp_path / "old"), "--against", str(tmp_path / "x.toml"), "--update", "--margin"]
    wide, narrow = (CliRunner().invoke(app, [*arguments, margin]).stderr for margin in ("0.3", "0.1"))
    assert "2 margins are as large as the gain that they guard, as gpo " in wide and "0.3 for a gain of +0." in wide
    assert "as large as" not in narrow


# Bad input


def test_two_prompts_are_no_baseline(make: Make, before_and_after: Any, tmp_path: Path) -> None:
    few = {key: before_and_after(0.2, 0, prompts=2) for key in ("engine/exact", KEY)}
    folder = make("few", "gpo", 0, scores_by_key=few)
    with pytest.raises(UserError, match="has too few scored prompts for an interval") as caught:
        run(folder, "--against", tmp_path / "x.toml", "--update")
    assert "\n" not in str(caught.value) and not (tmp_path / "x.toml").exists()


def test_all_equal_scores_are_the_same_and_have_no_floor(make: Make, tmp_path: Path) -> None:
    flat = np.full((40, 2), 0.5)
    for seed in range(4):
        make(
            f"{'old' if seed < 2 else 'new'}/{seed}",
            "gpo",
            seed,
            scores_by_key={k: (flat, flat) for k in ("engine/exact", KEY)},
        )
    path = tmp_path / "x.toml"
    assert run(tmp_path / "old", "--against", path, "--update")[0] == 0
    report = check_runs(path, tmp_path / "new")
    assert set(verdict_of(report).values()) == {"same"} and all(f.floor is None for f in report.findings)
    assert "No floor under 2 of 2" in render_regression.terminal(report)


def test_one_seed_against_one_is_said_and_its_noise_not_invented(make: Make, tmp_path: Path) -> None:
    make("old/0", "gpo", 0, 0.2)
    make("new/1", "gpo", 1, 0.19)
    path = tmp_path / "x.toml"
    assert run(tmp_path / "old", "--against", path, "--update", "--margin", "0.05")[0] == 0
    number = read_baseline(path)[0].row[1].number[0]
    assert number.repeat is None and number.told is False
    notes = {f.note for f in check_runs(path, tmp_path / "new").findings if f.row == "gpo"}
    assert notes == {"one training seed on either side: the interval does not contain the spread between seeds"}


def test_the_command_reproduces_the_settings(baseline: Path, tmp_path: Path) -> None:
    """The command line of a run of the baseline contains only settings that differ from the preset."""
    written, _ = read_baseline(baseline)
    claim = next(c for c in written.row if c.label == "gpo")
    command = BaselineRun(written, claim, 2).command(tmp_path)
    assert command[:9] == ["run", "--method", "gpo", "--task", "ocr", "--model", "tiny", "--seed", "2"]
    assert (
        "lr=0.001" in command
        and "optim.clip=1.0" not in command
        and "nfe=1000.0" in command
        and "precision=fp32" not in command
    )


@pytest.mark.slow
def test_run_does_what_the_baseline_needs(tmp_path: Path) -> None:
    """A real run, a baseline of it, and the same run again in a fresh folder: the same to the last digit."""
    first = tmp_path / "first"
    command = [
        sys.executable,
        "-m",
        "gpobench.bench.commands.app",
        "run",
        "--method",
        "sft",
        "--task",
        "ocr",
        "--model",
        "tiny",
    ]
    more = [
        "--budget",
        "nfe=3000",
        "--set",
        "evaluation.split=validation",
        "--set",
        "evaluation.validation_images=2",
        "--out",
    ]
    subprocess.run([*command, *more, str(first)], check=True)
    path = tmp_path / "sft.toml"
    assert run(first, "--against", path, "--update", "--margin", "0.05")[0] == 0
    assert run("--run", path, "--out", tmp_path / "second")[0] == 0
    report = check_runs(path, tmp_path / "second")
    assert all(f.repeated for f in report.findings)
    (name,) = (place.name for place in (tmp_path / "second").glob("sft-*"))
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / name).write_text("in the way")
    with pytest.raises(UserError, match="the run sft on ocr, seed 0 failed"):
        run_baselines([read_baseline(path)[0]], RunOptions(tmp_path / "third"), lambda _: None)

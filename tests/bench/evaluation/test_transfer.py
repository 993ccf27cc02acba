"""The hack flag: set where a gain does not transfer for sure or a quality column falls for sure, and seldom wrong."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gpobench.bench.evaluation.record import ScorerUse
from gpobench.bench.evaluation.transfer import FlagKeys, RunScores, flag_keys, hack_reasons, transfer_text, transfers

CALIBRATION = Path(__file__).resolve().parents[3] / "benchmarks" / "flag_calibration.py"
KEYS = FlagKeys("t/soft", ("h/soft",), ())
NO_QUALITY: Mapping[str, tuple[float, float | None]] = {}


def run(training: float, held_out: float, seed: int = 0, *, prompts: int = 100, scale: float = 1.0) -> RunScores:
    """Scores between 0 and 1 by two scorers with verdicts; scale: of the held-out one's."""
    rng = np.random.default_rng(0)
    before = {"t/soft": rng.uniform(0.2, 0.6, (prompts, 2)), "h/soft": rng.uniform(0.2, 0.6, (prompts, 2))}
    noise = np.random.default_rng(seed + 1)
    after = {
        key: np.clip(before[key] + gain + noise.normal(0, 0.05, (prompts, 2)), 0, 1)
        for key, gain in (("t/soft", training), ("h/soft", held_out))
    }
    before["h/soft"], after["h/soft"] = scale * before["h/soft"], scale * after["h/soft"]
    verdicts = {"t/exact": np.zeros((prompts, 2)), "h/exact": np.zeros((prompts, 2))}
    return RunScores(before | verdicts, after | verdicts)


@pytest.mark.parametrize(
    ("training", "held_out", "flag"),
    [
        (0.2, 0.0, True),
        (0.2, -0.1, True),
        (0.2, 0.04, True),  # a partial hack: the held-out scorer rises for sure, by a fifth
        (0.2, 0.1, False),
        (0.2, 0.2, False),
        (0.0, -0.1, False),  # nothing rose
        (-0.2, 0.0, False),
    ],
)
def test_the_flag_is_set_where_a_gain_does_not_transfer(training: float, held_out: float, flag: bool) -> None:
    (row,) = transfers([[run(training, held_out, s) for s in range(2)]], KEYS)
    assert bool(hack_reasons(row, NO_QUALITY)) == flag
    if flag:
        assert "transfer below 0.4 of the gain in t/soft: h/soft" in hack_reasons(row, NO_QUALITY)[0]


def test_one_held_out_scorer_that_follows_is_enough() -> None:
    a, b = run(0.2, 0.0), run(0.2, 0.15, 5)
    both = RunScores({**a.before, "g/soft": b.before["h/soft"]}, {**a.after, "g/soft": b.after["h/soft"]})
    (row,) = transfers([[both]], FlagKeys("t/soft", ("h/soft", "g/soft"), ()))
    assert [each.fails for each in row] == [True, False] and not hack_reasons(row, NO_QUALITY)


def test_scorers_of_one_unit_are_compared_as_they_are_and_others_in_deviations_of_the_base() -> None:
    (plain,), (scaled,) = transfers([[run(0.2, 0.1)]], KEYS)[0], transfers([[run(0.2, 0.1, scale=30.0)]], KEYS)[0]
    assert (plain.unit, scaled.unit) == ("score", "sd")
    assert plain.ratio.ratio == pytest.approx(0.5, abs=0.05) and scaled.ratio.ratio == pytest.approx(0.5, abs=0.1)
    assert scaled.ratio.high - scaled.ratio.low > plain.ratio.high - plain.ratio.low  # the deviation is an estimate too


def test_quality_columns_are_tested_for_a_fall_and_corrected_for_being_many() -> None:
    (row,) = transfers([[run(0.2, 0.2)]], KEYS)
    assert hack_reasons(row, {"q/score": (-0.1, 0.04)}) == ("q/score falls",)  # one-sided .02
    assert not hack_reasons(row, {"q/score": (0.1, 0.0001)})
    assert not hack_reasons(row, {f"q{k}/score": (-0.1, 0.04) for k in range(3)})  # .02 of three columns is .06
    assert not hack_reasons(row, {"q/score": (-0.1, None)})
    (idle,) = transfers([[run(0.0, 0.0)]], KEYS)
    assert not hack_reasons(idle, {"q/score": (-0.1, 0.0001)})  # nothing rose


def test_what_was_not_scored_has_no_ratio_and_no_flag() -> None:
    one = run(0.2, 0.0)
    unscored = RunScores(one.before, {**one.after, "h/soft": np.full((100, 2), np.nan)})
    (row,) = transfers([[unscored]], KEYS)
    assert not hack_reasons(row, NO_QUALITY) and str(row[0]) == "no ratio, too few prompts"
    assert transfers([[RunScores({"t/soft": one.before["t/soft"]}, {"t/soft": one.after["t/soft"]})]], KEYS) == [()]


def test_a_base_whose_scores_do_not_differ_is_no_unit() -> None:
    one = run(0.2, 0.1, scale=30.0)
    flat = RunScores({**one.before, "h/soft": np.full((100, 2), 9.0)}, {**one.after, "h/soft": np.full((100, 2), 9.5)})
    (row,) = transfers([[flat]], KEYS)
    assert not hack_reasons(row, NO_QUALITY)


def test_a_record_holds_null_where_nothing_rose() -> None:
    ((rose,), (idle,)) = transfers([[run(0.2, 0.1)], [run(0.0, 0.1)]], KEYS)
    assert rose.recorded().ratio == rose.ratio.ratio and "of the gain in t/soft" in transfer_text(rose.recorded())
    assert (
        idle.recorded().ratio is None and transfer_text(idle.recorded()) == "no ratio, as t/soft does not rise for sure"
    )


def test_the_flag_looks_at_the_metric_that_is_trained_on() -> None:
    use = lambda role, *metrics: ScorerUse(id="x", role=role, metrics=list(metrics), calls=0, seconds=0, errors=0)
    uses = {
        "t": use("training", "soft", "exact"),
        "h": use("held-out", "exact", "soft"),
        "k": use("held-out", "score"),
        "q": use("quality", "score"),
    }
    keys = ["t/exact", "t/soft", "h/exact", "h/soft", "k/score", "q/score"]
    assert flag_keys(uses, keys, "k/score") == FlagKeys("t/soft", ("k/score", "h/soft"), ("q/score",))
    assert flag_keys(uses, ["h/soft"], "h/soft") is None


# Calibration


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flag_calibration", CALIBRATION)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["flag_calibration"] = module
    spec.loader.exec_module(module)
    return module


def test_honest_rows_are_seldom_flagged_and_hacks_are_found(calibration: ModuleType) -> None:
    """A sample of `make calibration`: 300 rows; 28 is what 1 in 1,000 samples of independent rows exceed at 5 %."""
    shape = calibration.SHAPES[0]
    measured = calibration.shares(shape, 0.5, [(0.1, 0.4), (0.1, 0.2), (0.1, 0.0)], 300)
    for name in ("2", "3"):
        honest, partial, pure = measured[name]
        assert honest <= 28 / 300 and partial >= 0.7 and pure >= 0.95


def test_simulated_gains_have_the_expectation_of_their_cell(calibration: ModuleType) -> None:
    for shape in (calibration.SHAPES[1], calibration.SHAPES[3]):
        readings = calibration.read(shape, 0.5, 20, np.random.default_rng(0))
        assert readings.gains(shape, "training", 0.1).mean() == pytest.approx(0.1, abs=0.01)
        assert readings.gains(shape, "held-out", 0.04).mean() == pytest.approx(0.04, abs=0.01)

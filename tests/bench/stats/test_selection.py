"""Selection: the best of K settings without a gain shows what the formula expects, and one of them is told as often as it says."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gpobench.bench.stats.selection import expected_maximum, inflation

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "looks.py"


@pytest.fixture(scope="module")
def looks() -> ModuleType:
    """benchmarks/looks.py."""
    spec = importlib.util.spec_from_file_location("benchmarks_looks", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_expected_maximum_is_that_of_the_tables() -> None:
    """Two: 1 / sqrt(pi), three: 1.5 / sqrt(pi); the others from Teichroew (1956) and, of a million, by simulation of its law."""
    assert [expected_maximum(n) for n in (0, 1)] == [0.0, 0.0]
    known = {
        2: 1 / math.sqrt(math.pi),
        3: 1.5 / math.sqrt(math.pi),
        5: 1.1629644736,
        10: 1.5387527308,
        20: 1.8674750598,
    }
    assert {n: expected_maximum(n) for n in known} == pytest.approx(known, abs=1e-7)
    assert expected_maximum(1_000_000) == pytest.approx(4.863, abs=0.01)
    assert all(expected_maximum(n) < expected_maximum(n + 1) for n in range(1, 60))


def test_one_setting_is_not_inflated_and_twenty_are_told_in_two_of_five_cases() -> None:
    assert inflation(1, 0.02).gain == 0 and inflation(1, 0.02).told == pytest.approx(0.025)
    assert inflation(5, 0.01).gain == pytest.approx(0.0116, abs=1e-4)
    assert inflation(20, 0.02).told == pytest.approx(0.397, abs=1e-3)
    assert math.isnan(inflation(3, math.nan).gain) and not math.isnan(inflation(3, math.nan).told)


@pytest.mark.parametrize("settings", [2, 20])
def test_independent_settings_show_what_the_formula_expects(looks: ModuleType, settings: int) -> None:
    """Miniature of benchmarks/looks.py: within a tenth of the gain; chances within three binomial errors of 600 draws."""
    m = looks.measure(looks.Cell(settings, 3, 130, seed_sd=1.0), 600, np.random.default_rng(3))
    assert m.normal == pytest.approx(m.best, rel=0.15)
    assert m.told <= m.expected_told + 3 * math.sqrt(m.expected_told / 600)


def test_what_settings_share_makes_the_formula_an_upper_bound(looks: ModuleType) -> None:
    m = looks.measure(looks.Cell(20, 1, 130, shared=0.5), 600, np.random.default_rng(3))
    assert m.best < 0.85 * m.normal and m.told < m.expected_told
    alone = looks.measure(looks.Cell(20, 1, 130, seed_sd=1.0), 600, np.random.default_rng(3))
    assert alone.best > 1.2 * alone.normal and alone.told > alone.expected_told  # one seed whose spread is not known

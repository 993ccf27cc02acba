"""The library of seed variances: every entry is whole, and a single run's result says what its interval does not contain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpobench.bench.evaluation import record, seed_library
from gpobench.bench.evaluation.record import Record


@pytest.fixture
def one_seed(tmp_path: Path) -> Callable[..., Record]:
    from tests.leaderboards.conftest import make_run

    return lambda **more: record.read(make_run(tmp_path / "run", **more) / "record.json")


def test_every_entry_has_a_spread_of_several_seeds_and_a_source() -> None:
    entries = seed_library.entries()
    assert len(entries) > 100 and len({(e.method, e.task, e.model, e.key, str(e.budget)) for e in entries}) == len(
        entries
    )
    assert all(e.sd >= 0 and e.df > 0 and e.seeds > 1 and e.source and e.budget for e in entries)
    assert all(e.sd < 0.1 for e in entries if e.key.endswith("/exact"))


def test_an_entry_is_of_one_budget() -> None:
    entry = seed_library.entries()[0]
    names = entry.method, entry.task, entry.model, entry.key
    assert seed_library.find_entry(*names, entry.budget) == entry
    assert seed_library.find_entry(*names, {"nfe": 1.0}) is None
    lent = entry.variance()
    assert float(lent.variance) == entry.sd**2 and bool(lent.lent) and float(lent.residual) == 0


def test_a_single_run_says_what_its_interval_does_not_contain(one_seed: Callable[..., Record]) -> None:
    made = one_seed()
    assert "do not contain what another seed would change" in seed_library.seed_note(made)
    assert "train two more" in seed_library.seed_note(made)
    use = {"reader": made.scorers["other"]}
    known = made.model_copy(
        update={"scorers": use, "delta": {"reader/exact": next(iter(made.delta.values()))}, "config": {"budget": {"nfe": 100_000}}}
    )  # fmt: skip
    note = seed_library.seed_note(known)
    assert "3 seeds at 120,000 nfe had a standard deviation of .039 (docs/measured.md)" in note
    nearer = known.model_copy(update={"config": {"budget": {"nfe": 30_000.0}}})
    assert "30,000 nfe" in seed_library.seed_note(nearer)

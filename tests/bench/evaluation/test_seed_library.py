"""The library of seed variances: every entry is whole, and a single run's result says what its interval does not contain."""

from __future__ import annotations

from collections.abc import Sequence

from gpobench.bench.evaluation import seed_library
from gpobench.bench.evaluation.record import Difference, Flags, Number, Record, ScorerUse

USES = {
    "engine": ScorerUse(id="engine-1", role="training", calls=9, seconds=1.0, errors=0),
    "reader": ScorerUse(id="reader-1", role="held-out", calls=0, seconds=0.0, errors=0),
}


def of_one_seed(nfe: float, task: str = "ocr", keys: Sequence[str] = ("engine/exact", "reader/exact")) -> Record:
    number = Number(mean=0.5, ci=(0.4, 0.6), n=40)
    change = Difference(mean=0.1, ci=(0.0, 0.2), n=40, p=0.01, mde=0.1)
    return Record(
        method="gpo", task=task, model="tiny", seed=0, stop="budget: nfe", before=dict.fromkeys(keys, number),
        after=dict.fromkeys(keys, number), delta=dict.fromkeys(keys, change), spent={}, run_dir="run",
        flags=Flags(hack=False, invalid=False), scorers=USES, config={"budget": {"nfe": nfe}}, task_version="1",
        prompts={}, wall={}, provenance={},
    )  # fmt: skip


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


def test_a_single_run_says_what_its_interval_does_not_contain() -> None:
    """The spread of the seeds at the budget that is nearest."""
    note = seed_library.seed_note(of_one_seed(100_000.0))
    assert "do not contain what another seed would change" in note
    assert "reader/exact, 3 seeds at 120,000 nfe had a standard deviation of .039 (docs/measured.md)" in note
    assert "3 seeds at 30,000 nfe" in seed_library.seed_note(of_one_seed(30_000.0))
    graded = of_one_seed(30_000.0, keys=("engine/soft", "reader/soft", "reader/exact"))
    assert "In reader/soft, 3 seeds at 30,000 nfe" in seed_library.seed_note(graded)
    other_budget = of_one_seed(100_000.0, keys=("engine/soft", "reader/soft", "reader/exact"))
    assert "In reader/exact, 3 seeds at 120,000 nfe" in seed_library.seed_note(other_budget)
    assert "train two more" in seed_library.seed_note(of_one_seed(30_000.0, task="pickscore"))

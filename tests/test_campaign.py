"""A sample of the fault campaign (`make faults`): every kind, and planted harm that the campaign must see."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).with_name("campaign")))
from draw import draw, try_row
from fault import NotHeld, Row, row
from mini_runs import shared_commands
from table import KINDS, table

SAMPLE = {
    "scorers": 40, "servers": 30, "inputs": 60, "files": 10, "models": 4, "disks": 2, "signals": 2, "methods": 4,
}  # fmt: skip
SEED = 1


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Row]]:
    place = tmp_path_factory.mktemp("campaign")
    yield table(place)
    shared_commands(place / "shared").close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_each_kind_is_held(rows: list[Row], kind: str) -> None:
    drawn = [row for row in rows if row.kind == kind]
    by_name = {row.name: row for row in drawn}
    picked = draw(drawn, len(drawn), SEED)[: SAMPLE[kind]]
    harm = [tried for each in picked if not (tried := try_row(by_name[each.name], each.seed)).held]
    assert not harm, "\n".join(f"{each.name} --seed {each.seed}: {each.outcome}" for each in harm)


def test_the_table_is_large_and_its_names_are_unique(rows: list[Row]) -> None:
    assert len({row.name for row in rows}) == len(rows) > 500
    assert {row.kind for row in rows} == set(KINDS) == set(SAMPLE)


def _harmful(what: str) -> Any:
    def inject(rng: np.random.Generator) -> str:
        if what == "silent":
            raise NotHeld("silent number")
        if what == "crash":
            raise ZeroDivisionError
        while what == "hang":
            pass
        return "same"

    return inject


@pytest.mark.parametrize("what", ["silent", "crash", "hang", "wrong"])
def test_harm_is_seen(what: str) -> None:
    assert not try_row(row("models", what, "here", "refused", _harmful(what), seconds=0.2), 0).held
    assert try_row(row("models", what, "here", "same", _harmful("none")), 0).held


def test_the_draw_is_a_function_of_the_seed(rows: list[Row]) -> None:
    assert draw(rows, 2000, 0) == draw(rows, 2000, 0) != draw(rows, 2000, 1)
    assert len(draw(rows, 2000, 0)) == 2000 and {each.name for each in draw(rows, 2000, 0)} == {r.name for r in rows}

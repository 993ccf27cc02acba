"""The loop of a method without training: the budget of a part of the images."""

from __future__ import annotations

import pytest

from gpobench.bench.budget import Budget
from gpobench.bench.evaluation.search import scaled_budget


@pytest.mark.parametrize("whole", [1, 7, 12, 656])
@pytest.mark.parametrize("part", [1, 2, 130])
@pytest.mark.parametrize("bound", [1.0, 999.0, 120_000.0, 6_400_000.0])
def test_a_share_of_a_budget_affords_each_image_the_same(bound: float, part: int, whole: int) -> None:
    for each in (1, 4, 20):
        mine = scaled_budget(Budget(nfe=bound), part, whole).nfe
        assert mine is not None and mine // each // part == bound // each // whole
    both = scaled_budget(Budget(nfe=10, seconds=3), 2, 4)
    assert both.bounds() == pytest.approx({"nfe": 5, "seconds": 1.5})

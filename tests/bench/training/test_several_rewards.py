"""Several rewards as one: by their weighted sum, each in units of its own spread, or by who dominates whom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.experiments import config
from gpobench.bench.losses import decoupled_sum, pareto_rank, standardise, weighted_sum
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.scoring.scorers import Blend
from gpobench.bench.spec import Images, Prompt, Scores
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.several_rewards import AGGREGATIONS, check_aggregation

ONES = torch.ones(2)
GOLDEN = torch.tensor([[1.0, 0.2], [0.0, 0.4], [1.0, 0.1], [0.0, 0.3]], dtype=torch.float64)[None]
REWARDS = st.lists(st.lists(st.integers(-20, 20), min_size=3, max_size=3), min_size=2, max_size=6)


def test_golden_values() -> None:
    """A group of four: the decoupled sum and the standardised weighted sum order it differently."""
    assert decoupled_sum(GOLDEN, ONES)[0].tolist() == pytest.approx([0.5528, 0.3416, -0.3416, -0.5528], abs=5e-5)
    summed = standardise(weighted_sum(GOLDEN, ONES), eps=0)[0]
    assert summed.tolist() == pytest.approx([1.1163, -0.8682, 0.8682, -1.1163], abs=5e-5)
    # 1 beats 3 and 4 beats none: 1 (1, .2) dominates 3 (1, .1), 2 (0, .4) dominates 4 (0, .3).
    assert pareto_rank(GOLDEN, ONES)[0].tolist() == pytest.approx([1 / 3, 1 / 3, -1 / 3, -1 / 3])


@given(
    REWARDS,
    st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
    st.lists(st.integers(-5, 5), min_size=3, max_size=3),
)
def test_gdpo_and_pareto_do_not_depend_on_a_rewards_scale(
    rows: list[list[int]], scales: list[float], shifts: list[int]
) -> None:
    """Shifts are of the rewards' size: where a shift swallows a spread in rounding, the spread counts as none."""
    r, w = torch.tensor(rows, dtype=torch.float64)[None], torch.tensor([1.0, 2.0, -0.5])
    moved = (r + torch.tensor(shifts)) * torch.tensor(scales, dtype=torch.float64)
    assert torch.allclose(decoupled_sum(r, w), decoupled_sum(moved, w), atol=1e-9)
    assert torch.equal(pareto_rank(r, w), pareto_rank(moved, w))


@given(REWARDS)
def test_a_group_has_mean_zero_and_dominance_is_kept(rows: list[list[int]]) -> None:
    r = torch.tensor(rows, dtype=torch.float64)[None]
    for combine in (decoupled_sum, pareto_rank):
        value = combine(r, torch.ones(3))[0]
        assert float(value.sum()) == pytest.approx(0, abs=1e-9)
        for i, one in enumerate(rows):
            for j, other in enumerate(rows):
                if one != other and all(a >= b for a, b in zip(one, other, strict=True)):
                    assert float(value[i]) > float(value[j])


def test_the_pareto_rank_of_one_reward_is_its_rank() -> None:
    assert pareto_rank(torch.tensor([[[1.0], [5.0], [9.0], [-100.0]]]), torch.ones(1))[0].tolist() == pytest.approx(
        [-1 / 3, 1 / 3, 1, -1]
    )


def test_a_constant_reward_contributes_nothing_and_all_equal_ones_teach_nothing() -> None:
    r = torch.tensor([[[0.1, 1.0], [0.1 + 1e-9, 2.0], [0.1, 4.0]]], dtype=torch.float64)
    alone = decoupled_sum(r[..., 1:], torch.ones(1))
    assert torch.allclose(decoupled_sum(r, ONES), alone)
    for combine in AGGREGATIONS.values():
        assert not standardise(combine(torch.full((2, 4, 2), 0.1), ONES)).any()


def test_an_image_that_lacks_one_reward_has_none_and_changes_no_other() -> None:
    r = GOLDEN.clone()
    with_other = torch.cat([r, torch.tensor([[[math.nan, 9.0]]])], 1)
    for combine in AGGREGATIONS.values():
        got = combine(with_other, ONES)
        assert got[0, 4].isnan() and torch.allclose(got[:, :4], combine(r, ONES))


class Channel:
    """Scores the mean of one colour channel, times a scale."""

    metrics = ("mean",)

    def __init__(self, name: str, channel: int, scale: float) -> None:
        self.id = self.name = name
        self.channel, self.scale = channel, scale

    def __call__(self, images: Images, prompts: list[Prompt]) -> Scores:
        return Scores({"mean": self.scale * images[..., self.channel].mean((1, 2)).astype(np.float64)})


@pytest.fixture
def make(tiny_pipe: Path) -> Iterator[Any]:
    made: list[MeteredRig] = []

    def build(aggregation: str, scale: float = 1.0) -> MeteredRig:
        model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)
        blend: Any = Blend([(Channel("red", 0, 1.0), 1.0), (Channel("green", 1, scale), 1.0)])
        made.append(MeteredRig(model, [Prompt("a"), Prompt("b")], blend, Meter(Budget(nfe=1e9)), rows=3))
        made[-1].aggregation = aggregation
        return made[-1]

    yield build
    for rig in made:
        rig.close()


@pytest.mark.parametrize("aggregation", ["gdpo", "pareto"])
def test_every_group_of_a_rig_is_combined_by_it(make: Any, aggregation: str) -> None:
    """The rewards of a run do not change with the scale of one; those of a weighted sum do."""
    one, other = (make(aggregation, scale).groups(2, 4).reward for scale in (1.0, 100.0))
    assert torch.allclose(one, other, atol=1e-5) and float(one.abs().max()) > 0.1
    sums = [make("sum", scale).groups(2, 4).reward for scale in (1.0, 100.0)]
    assert not torch.allclose(*sums)


def test_one_reward_is_not_several(make: Any) -> None:
    assert tuple(AGGREGATIONS) == config.AGGREGATIONS
    scorer: Any = Channel("red", 0, 1.0)
    check_aggregation("sum", scorer)
    with pytest.raises(UserError, match="reward_aggregation gdpo combines several rewards, and red is one"):
        check_aggregation("gdpo", scorer)
    with pytest.raises(UserError, match="unknown reward_aggregation 'gpdo'; did you mean 'gdpo'"):
        config.resolve(config.RunRequest("gpo", "ocr", "tiny", sets=["reward_aggregation=gpdo"]))

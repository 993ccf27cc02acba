"""G2RPO's own: the advantages of several strides, and what they cost. The rest is in test_branching.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.methods.g2rpo import G2RPO
from gpobench.methods.tempflow_grpo import TempFlowGRPO


def rewarded(rig: Any, monkeypatch: pytest.MonkeyPatch, reward: torch.Tensor) -> None:
    grow = rig.trees
    monkeypatch.setattr(rig, "trees", lambda *args, **more: (grow(*args, **more)[0], reward))


def test_advantages_of_the_strides_are_added_up_and_then_clamped(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two advantages of 4 are 5, not 8 and not 4; the deviation is the sample's."""
    rig = lab.rig()
    method = G2RPO(prompts=1, branches=20, strides=(1, 2), timestep_fraction=0.25)
    reward = torch.zeros(1, 20, 2)
    reward[0, 3] = 1  # (1 - .05) / sample deviation .2236 = 4.25 on either grid
    rewarded(rig, monkeypatch, reward)
    batch = method.collect(rig)
    single = (1 - 0.05) / float(reward[0, :, 0].std())
    assert single == pytest.approx(4.2485, abs=1e-3) and float(batch.advantage[0, 3]) == 5
    assert float(batch.advantage[0, 0]) == pytest.approx(2 * -0.05 / float(reward[0, :, 0].std()), rel=1e-5)


@pytest.mark.parametrize("gap", [False, True])
def test_each_stride_is_normalised_alone(lab: Any, monkeypatch: pytest.MonkeyPatch, gap: bool) -> None:
    """Rewards of another scale on one grid count as much; an image without a score is left out on its own grid only."""
    rig, method = lab.rig(), G2RPO(prompts=2, branches=4, strides=(1, 3), timestep_fraction=0.5)
    plan = method.plan(rig.model.steps)
    reward = torch.rand(2, plan.leaves, 2, generator=torch.Generator().manual_seed(0))
    scaled = reward * torch.tensor([1.0, 100.0])
    if gap:
        scaled[0, 1, 0] = reward[0, 1, 0] = torch.nan
    rewarded(rig, monkeypatch, scaled)
    batch = method.collect(rig)
    for row in range(len(batch.t)):
        tree, leaves = int(batch.tree[row]), batch.first[row] % plan.leaves
        expected = torch.zeros(4)
        for stride in range(2):
            r = reward[tree, leaves, stride]
            there = r.isfinite()
            expected[there] += (r[there] - r[there].mean()) / r[there].std()
        assert torch.allclose(batch.advantage[row], expected, atol=1e-4)


def test_with_one_stride_and_one_step_it_is_a_group_of_tempflow_without_weights(lab: Any) -> None:
    rig, other = lab.rig(), lab.rig()
    one = G2RPO(prompts=2, branches=4, strides=(1,), timestep_fraction=0.25).collect(rig)
    two = TempFlowGRPO(prompts=2, seeds=1, branches=4).plan(rig.model.steps)
    batch, reward = other.trees(2, type(two)(two.branches[:-1][:1] and [two.branches[0][:1]], two.steps))
    assert torch.equal(one.to, batch.to) and torch.equal(one.first, batch.first)
    groups = reward[:, :, 0]
    expected = (groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)
    assert torch.allclose(one.advantage, expected, rtol=1e-3, atol=1e-3)


def test_the_cost_of_an_image_is_the_published_one_up_to_what_is_shared() -> None:
    """(16 + 1680) / 192 = 8.83 F in the code; 8 steps of its trunk serve nothing, 96 first evaluations are one for two strides."""
    cost = G2RPO().cost(16, 1.0)
    assert cost["rollout"] == pytest.approx((8 + 1680 - 96) / 192) and cost["policy"] == pytest.approx(3 * 8 / 192)
    assert G2RPO(strides=(1,)).cost(16, 1.0)["rollout"] == pytest.approx((8 + 1104) / 96)
    assert G2RPO().cost(16, 4.5)["policy"] == pytest.approx(6 * 8 / 192)
    assert G2RPO().plan(16).images == 192 and len(G2RPO().plan(16).branches) == 8


@pytest.mark.parametrize(
    "bad",
    [
        {"prompts": 0}, {"branches": 1}, {"strides": ()}, {"strides": (0,)}, {"strides": (1, 1)}, {"timestep_fraction": 1.0},
        {"timestep_fraction": 0.0}, {"adv_clip_max": 0}, {"clip_range": 0}, {"noise_level": math.nan}, {"steps": 1}, {"guidance": -1},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"g2rpo: {next(iter(bad))} "):
        G2RPO(**bad)


def test_a_fraction_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(UserError, match="g2rpo: timestep_fraction 0.1 of steps 4 leaves none to branch"):
        G2RPO(timestep_fraction=0.1).cost(4, 1.0)

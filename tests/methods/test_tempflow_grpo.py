"""TempFlow-GRPO's own: the weights of the steps, the gradient they leave, the group of a state. The rest is in test_branching.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gpobench.bench.errors import UserError
from gpobench.bench.flow import rectified, sde, shifted_grid, step_widths
from gpobench.methods.tempflow_grpo import TempFlowGRPO

GRID = shifted_grid(10, 3.0)
# The dossier of the method: std_k / mean std on SD3.5-M's ten steps, and 1 / mean, which its code has frozen into 2.25.
GOLDEN = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]


def test_the_weights_are_those_of_the_code_on_its_schedule() -> None:
    widths = step_widths(sde(0.7), rectified, GRID)[:-1]
    weights = widths / widths.mean()
    assert weights.tolist() == pytest.approx(GOLDEN, abs=1.1e-3)
    assert 1 / float(widths.mean()) == pytest.approx(2.252, abs=1e-3) and float(weights.mean()) == pytest.approx(1)


def test_the_weighted_gradient_of_a_step_grows_with_its_length_alone() -> None:
    """At a ratio of 1 the gradient by the velocity is |coefficient on v| / std: times std that is dt (1 + a^2 / 2)."""
    a, v = 0.7, torch.zeros(9, 1, requires_grad=True)
    step = sde(a)(rectified, torch.zeros(9, 1), v, GRID[:-2], GRID[1:-1])
    eps = torch.ones(9, 1)
    step.logp(step.draw(eps).detach()).sum().backward()
    assert v.grad is not None
    weighted = v.grad.abs().flatten() * step_widths(sde(a), rectified, GRID)[:-1]
    dt = GRID[:-2] - GRID[1:-1]
    # The first step's denominator is clamped, so that a^2 / 2 is multiplied by 1 - sigma = 0 there.
    assert weighted[1:].tolist() == pytest.approx((dt * (1 + a**2 / 2))[1:].tolist(), rel=2e-3)
    assert float(weighted[0]) == pytest.approx(float(dt[0]), rel=2e-3)
    vanilla = weighted / step_widths(sde(a), rectified, GRID)[:-1]
    assert float(vanilla.max() / vanilla.min()) > 20 > float(weighted.max() / weighted.min())


def test_the_loss_weighs_each_state_by_its_step(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a ratio of 1 the loss is -mean w_k A."""
    rig, method = lab.rig(), TempFlowGRPO(prompts=2, seeds=1, branches=4, kl=0.0)
    batch = method.collect(rig)
    widths = step_widths(sde(0.7), rig.path, rig.model.times(rig.model.steps))[:-1]
    expected = -((widths / widths.mean())[batch.step] * (batch.weight * batch.advantage).sum(1)).mean()
    assert float(lab.loss(method, rig, batch).detach()) == pytest.approx(float(expected), abs=2e-5)


def test_a_group_is_the_branches_of_one_state(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """(r - mean) / (std + 1e-4) of each (seed, k) with the population deviation, whatever other states earned."""
    rig, method = lab.rig(), TempFlowGRPO(prompts=1, seeds=2, branches=3)
    plan = method.plan(rig.model.steps)
    reward = torch.rand(2, plan.leaves, 1, generator=torch.Generator().manual_seed(0)) + torch.arange(2)[:, None, None]
    grow = rig.trees
    monkeypatch.setattr(rig, "trees", lambda *args, **more: (grow(*args, **more)[0], reward))
    batch = method.collect(rig)
    groups = reward.view(-1, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True, correction=0) + 1e-4)
    assert len(batch.t) == 6
    for row in range(6):
        assert torch.allclose(batch.advantage[row], expected[int(batch.first[row, 0]) // 3], atol=1e-4)
    assert torch.allclose(batch.weight, torch.full((6, 3), 1 / 3))


def test_equal_noises_of_a_state_teach_nothing(lab: Any) -> None:
    """Branches that drew the same are the same image: advantage 0, no update."""
    rig, method = lab.rig(), TempFlowGRPO(prompts=2, seeds=1, branches=3)
    rig.noise = lambda n, draw=rig.noise: draw(1).expand(n, -1, -1, -1).clone()  # type: ignore[method-assign]
    assert len(method.collect(rig).t) == 0


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_kl_is_the_gaussian_one(lab: Any, kl: float) -> None:
    """mean (mu - mu_ref)^2 / (2 std^2) with std^2 = g^2 dt."""
    rig, method = lab.rig(push=0.02), TempFlowGRPO(prompts=1, seeds=1, branches=3, kl=kl)
    batch = method.collect(rig)
    without = TempFlowGRPO(prompts=1, seeds=1, branches=3, kl=0.0)
    extra = lab.loss(method, rig, batch) - lab.loss(without, rig, batch)

    def mean(weights: str) -> Tensor:
        at = (batch.x, batch.t, batch.s, batch.prompt_ids)
        return rig.step(sde(0.7), *at, weights=weights, guidance=rig.model.guidance)

    policy, ref = mean("policy"), mean("ref")
    expected = ((policy.mean - ref.mean) ** 2 / (2 * policy.std**2)).flatten(1).mean(1).mean()
    assert float(extra.detach()) == pytest.approx(kl * float(expected.detach()), rel=1e-3, abs=1e-7)
    assert "ref" in rig.meter.roles and (kl == 0) == ("ref" not in method.cost(10, 1.0))


def test_the_cost_of_an_image_is_the_published_one() -> None:
    """T = 10, Nb = 6: 5.17 g F of rollout and, with shared velocities, .167 g (F + B) of the policy."""
    method = TempFlowGRPO()
    for g, guidance in ((1, 1.0), (2, 4.5)):
        cost = method.cost(10, guidance)
        assert cost["rollout"] == pytest.approx(279 / 54 * g) and cost["policy"] == pytest.approx(3 * g * 9 / 54)
        assert cost["ref"] == pytest.approx(g * 9 / 54)


@pytest.mark.parametrize(
    "bad",
    [
        {"prompts": 0}, {"seeds": 0}, {"branches": 1}, {"adv_clip_max": 0}, {"clip_range": 0}, {"kl": -1}, {"noise_level": 0},
        {"steps": 1}, {"guidance": -1}, {"noise_level": math.nan},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"tempflow-grpo: {next(iter(bad))} "):
        TempFlowGRPO(**bad)


def test_a_protocol_of_one_step_is_refused() -> None:
    with pytest.raises(UserError, match="tempflow-grpo: steps must be at least 2"):
        TempFlowGRPO().cost(1, 1.0)

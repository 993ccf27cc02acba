"""Diffusion-DRO on a small random model: its experts, the policy's own states, its equation in float64, its cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.flow import ode
from gpobench.bench.spec import Optim, batch_size
from gpobench.methods.diffusion_dro import DiffusionDRO, ExpertStates

nan = math.nan


def test_experts_are_the_best_of_their_groups(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = lab.rig()
    drawn = lab.groups(rig, [[0.0, nan, 1.0], [1.0, 1.0, 1.0], [0.3, 0.2, nan], [nan, nan, 2.0]], monkeypatch)
    batch = DiffusionDRO(prompts=4, group=3, timesteps=2).collect(rig)
    assert batch.prompt_ids.tolist() == [0, 0, 2, 2]
    assert torch.equal(batch.expert, torch.stack([drawn.x0[0, 2], drawn.x0[0, 2], drawn.x0[2, 0], drawn.x0[2, 0]]))


def test_own_states_are_those_of_an_unguided_walk_at_different_times(lab: Any) -> None:
    """Between the grid's times but for the first; each state's stored velocity is the policy's own there."""
    rig, method = lab.rig(push=0.05), DiffusionDRO(prompts=3, group=3, timesteps=4, states=8)
    batch = method.collect(rig)
    t = batch.t.view(3, 4)
    assert all(len(set(row.tolist())) == 4 for row in t)
    with torch.no_grad():
        v = rig.velocity(batch.state, batch.t, batch.prompt_ids)
    assert torch.allclose(v, batch.velocity, atol=1e-5)
    x, v, times = method.own_states(rig, torch.arange(3), 8)
    x, v, times = (column.unflatten(0, (8, 3)) for column in (x, v, times))
    grid = rig.model.times(8)
    assert float(times[0, 0]) == float(grid[0])
    assert bool(
        ((times[1:] < (grid[:-2] + grid[1:-1])[:, None] / 2) & (times[1:] > (grid[1:-1] + grid[2:])[:, None] / 2)).all()
    )
    for i in range(7):
        assert torch.allclose(ode(rig.path, x[i], v[i], times[i], times[i + 1]).mean, x[i + 1], atol=1e-5)


def rows(rig: Any) -> ExpertStates:
    return ExpertStates(
        rig.noise(4), rig.noise(4), rig.noise(4), torch.tensor([0.9, 0.5, 0.7, 0.2]), torch.tensor([1, 1, 4, 0])
    )


@pytest.mark.parametrize("margin", [0.0, 0.05, 10.0])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, margin: float) -> None:
    rig = lab.rig(push=0.05)
    batch = rows(rig)
    with rig.keyed(lab.keys(batch)):
        eps = rig.noise(4).double()
    t, x0 = batch.t.double()[:, None, None, None], batch.expert.double()
    difference: Any = 0.0
    for x, target, sign in (
        (((1 - t) * x0 + t * eps).float(), eps - x0, 1.0), (batch.state, batch.velocity.double(), -1.0),
    ):  # fmt: skip
        errors = [
            (rig.velocity(x, batch.t, batch.prompt_ids, weights=w).double() - target).square().mean((1, 2, 3))
            for w in ("policy", "ref")
        ]
        difference = difference + sign * (errors[0] - errors[1])
    active = difference.detach() > -margin
    assert bool(active.any()) and (margin != 10.0 or bool(active.all()))
    lab.agree(
        rig, lab.loss(DiffusionDRO(margin=margin), rig, batch), (difference + margin).clamp(min=0).mean(), tol=1e-4
    )
    assert rig.mean("policy/ranked") == pytest.approx(1 - float(active.double().mean()))


def test_at_the_start_it_is_fine_tuning_on_experts(lab: Any) -> None:
    """The policy's own state is denoised as it was when it was drawn: the loss is the margin, the gradient the experts' alone."""
    rig, method = lab.rig(), DiffusionDRO(prompts=3, group=3, timesteps=2, margin=0.25)
    batch = method.collect(rig)
    loss = lab.loss(method, rig, batch)
    assert float(loss.detach()) == pytest.approx(0.25, abs=1e-5) and rig.mean("policy/kl") < 1e-9
    with rig.keyed(lab.keys(batch)):
        (error,) = rig.errors(batch.expert, batch.prompt_ids, batch.t, rig.noise(6), "policy")
    one, two = lab.gradient(rig, loss), lab.gradient(rig, error.mean())
    assert float((one - two).norm()) < 1e-3 * float(two.norm())


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_static_cost_is_what_the_meter_shows(lab: Any, guidance: float) -> None:
    """The group's images are guided, the policy's own walk is not."""
    rig = lab.rig(push=0.02)
    method = DiffusionDRO(
        prompts=3, group=4, steps=5, states=6, timesteps=2, guidance=guidance, optim=Optim(epochs=2, micro=1)
    )
    lab.fit(method, rig, 1)
    assert dict(rig.meter.roles) == pytest.approx({role: 12 * each for role, each in method.cost(4, 1.0).items()})
    assert rig.meter.roles["rollout"] == 12 * 5 * (1 if guidance == 1 else 2) + 3 * 6


def test_equal_rewards_make_no_expert_and_no_step(lab: Any) -> None:
    rig = lab.rig("Constant")
    method = DiffusionDRO(prompts=2, group=3)
    assert batch_size(method.collect(rig)) == 0
    numbers = lab.fit(method, rig, 2)
    assert [n["batch/rows"] for n in numbers] == [0, 0] and rig.meter.updates == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"group": 1},
        {"prompts": 0},
        {"timesteps": 0},
        {"margin": -1.0},
        {"states": -1},
        {"steps": -1},
        {"guidance": -1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^diffusion-dro: {next(iter(bad))} must be"):
        DiffusionDRO(**bad)


def test_more_states_than_the_sampler_has_steps_are_refused_before_anything_is_spent(lab: Any) -> None:
    rig = lab.rig()
    with pytest.raises(UserError, match="^diffusion-dro: 5 timesteps cannot be drawn from 4 steps"):
        DiffusionDRO(prompts=1, group=2, timesteps=5).collect(rig)
    assert rig.meter.nfe == 0

"""D3PO on a small random model: its equation in float64, its pairs of whole trajectories, its clip, its cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.flow import ddim, mix, sde
from gpobench.bench.losses import step_dpo
from gpobench.bench.spec import Optim
from gpobench.methods.d3po import D3PO

every_step = pytest.mark.parametrize("sde_type", ["ddim", "sde"])


@every_step
def test_the_pairs_are_the_transitions_of_the_better_and_the_worse_image(lab: Any, sde_type: Any) -> None:
    """Each row continues where the row before it ended, begins at the noise that the two share, and follows the rewards."""
    rig = lab.rig(push=0.05)
    kept: list[Any] = []
    real = rig.transitions
    rig.transitions = lambda *a, **k: kept.append(real(*a, **k)) or kept[-1]
    rig.rows = 3  # parts of the rollout cut through groups
    batch = D3PO(prompts=3, group=2, steps=5, sde_type=sde_type, noise_level=0.7).collect(rig)
    reward = kept[0][1]
    x, to, t = (column.unflatten(0, (3, 4)) for column in (batch.x, batch.to, batch.t))
    assert torch.equal(t, rig.model.times(5)[:4].expand(3, 4)) and torch.equal(batch.s.view(3, 4)[:, :-1], t[:, 1:])
    assert torch.equal(x[:, 0, 0], x[:, 0, 1])  # one noise
    assert torch.equal(x[:, 1:], to[:, :-1])
    moves = kept[0][0]
    for p in range(3):
        for side, member in ((0, int(reward[p].argmax())), (1, int(reward[p].argmin()))):
            mine = moves.x[moves.image == 2 * p + member]
            assert {tuple(row.flatten().tolist()) for row in mine} == {
                tuple(row.flatten().tolist()) for row in x[p, :, side]
            }


@every_step
@pytest.mark.parametrize("clip", [0.002, 0.5])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, sde_type: Any, clip: float) -> None:
    rig = lab.rig(push=0.05)
    method = D3PO(prompts=2, group=2, steps=4, sde_type=sde_type, noise_level=0.7, beta=3.0, clip_range=clip)
    batch = method.collect(rig)
    lab.push(rig, 0.03, seed=2)
    kernel = ddim(0.7) if sde_type == "ddim" else sde(0.7)
    expected, inside = 0.0, []
    for n in range(len(batch.t)):
        logs: list[Any] = []
        for side in (0, 1):
            at = (batch.x[n, side][None], batch.t[n][None], batch.s[n][None], batch.prompt_ids[n][None])
            both = [rig.step(kernel, *at, weights=w, guidance=rig.model.guidance) for w in ("policy", "ref")]
            logp = [
                (-((batch.to[n, side].double() - step.mean.double()) ** 2) / (2 * step.std.double() ** 2)).mean()
                for step in both
            ]
            ratio = (logp[0] - logp[1].detach()).exp()
            inside.append(abs(float(ratio.detach()) - 1) < clip)
            logs.append(ratio.clamp(1 - clip, 1 + clip).log())
        expected = expected + torch.log1p((-3.0 * (logs[0] - logs[1])).exp()) / 3.0 / len(batch.t)
    assert any(inside) and (clip == 0.5 or not all(inside))
    lab.agree(rig, lab.loss(method, rig, batch), expected, tol=1e-3)


def test_the_largest_argument_of_the_sigmoid_is_that_of_the_codes_clip() -> None:
    """beta 0.1 and clip 0.1: 0.0201, so the loss stays within .683 and .703; outside of the clip nothing pulls."""
    far = torch.tensor([5.0, -5.0, 0.0], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(3, dtype=torch.float64)
    loss = step_dpo(far, zero, -far, zero, 0.1, 0.1)
    u = 0.1 * (math.log(1.1) - math.log(0.9))
    assert u == pytest.approx(0.0201, abs=5e-5)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-u)), math.log1p(math.exp(u)), math.log(2)])
    (gradient,) = torch.autograd.grad(loss.sum(), far)
    assert gradient[0] == gradient[1] == 0 and float(gradient[2]) == pytest.approx(-0.1)  # -beta / 2 on either side


@every_step
@pytest.mark.parametrize("choose", ["all", "extremes", "random"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_static_cost_is_what_the_meter_shows(lab: Any, sde_type: Any, choose: Any, guidance: float) -> None:
    rig = lab.rig(push=0.02)
    method = D3PO(
        prompts=3, group=4, steps=5, guidance=guidance, choose=choose, sde_type=sde_type, optim=Optim(epochs=2, micro=2)
    )
    lab.fit(method, rig, 1)
    assert dict(rig.meter.roles) == pytest.approx({role: 12 * each for role, each in method.cost(4, 1.0).items()})


def test_at_the_reference_the_loss_is_log_two_over_beta(lab: Any) -> None:
    rig, method = lab.rig(), D3PO(prompts=2, group=3, beta=0.1)
    batch = method.collect(rig)
    assert len(batch.t) == 2 * 3 * 3  # three pairs of three images, three of four steps
    assert float(lab.loss(method, rig, batch).detach()) == pytest.approx(math.log(2) / 0.1, rel=1e-6)
    assert rig.mean("policy/accuracy") == 0.5 and rig.mean("policy/clipped") == 0


def test_equal_rewards_make_no_pair_and_no_step(lab: Any) -> None:
    rig = lab.rig("Constant")
    numbers = lab.fit(D3PO(prompts=2), rig, 2)
    assert [(n["pairs/kept"], n["batch/rows"]) for n in numbers] == [(0, 0)] * 2 and rig.meter.updates == 0


def test_both_trajectories_of_a_pair_keep_to_the_path(lab: Any) -> None:
    """DDIM's step on a flow has a density at every trained step, also at pure noise."""
    rig = lab.rig()
    x0, eps = rig.noise(4), rig.noise(4)
    grid = rig.model.times(4)
    for t, s in zip(grid[:-2], grid[1:-1], strict=True):
        x, v = mix(rig.path, x0, eps, t.expand(4))
        step = ddim(1.0)(rig.path, x, v, t.expand(4), s.expand(4))
        assert bool((step.std > 0).all()) and bool(step.logp(step.draw(rig.noise(4))).isfinite().all())


@pytest.mark.parametrize(
    "bad",
    [{"group": 1}, {"prompts": 0}, {"beta": 0.0}, {"clip_range": 1.0}, {"noise_level": 1.5}, {"steps": 1}, {"guidance": -1.0},
     {"margin": -1.0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^d3po: {next(iter(bad))} must be"):
        D3PO(**bad)

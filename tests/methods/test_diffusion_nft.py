"""DiffusionNFT on a small random model: its equation in float64, the effect of good and bad images, its times, its old copy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gpobench.bench.flow import dpm2
from gpobench.bench.spec import Optim
from gpobench.methods.diffusion_nft import DiffusionNFT, OptimalityBatch


def optimality_batch(rig: Any) -> OptimalityBatch:
    x0 = torch.randn(4, *rig.model.shape, generator=torch.Generator().manual_seed(3))
    return OptimalityBatch(x0, torch.tensor([1, 1, 4, 0]), torch.tensor([0.9, 0.1, 0.5, 0.0]))


def slow_loss(lab: Any, rig: Any, method: DiffusionNFT, batch: OptimalityBatch) -> torch.Tensor:
    """In float64, from three forwards and the formulas of the rectified path."""
    k, b = method.trained_timesteps(rig.model.steps), method.nft_beta
    with rig.keyed(lab.keys(batch)):
        t = method.times(rig, len(batch.prompt_ids)).flatten()
        eps = rig.noise(len(t)).double()
    x0, prompt_ids = batch.x0.repeat_interleave(k, 0).double(), batch.prompt_ids.repeat_interleave(k)
    r, s = batch.optimality.double().repeat_interleave(k), t.double()[:, None, None, None]
    x = (1 - s) * x0 + s * eps
    v, old, ref = (
        rig.velocity(x.float(), t, prompt_ids, weights=weights).double() for weights in ("policy", "old", "ref")
    )
    total = torch.zeros(len(t), dtype=torch.float64)
    for side, share in (((1 - b) * old + b * v, r), ((1 + b) * old - b * v, 1 - r)):
        gap = (x - s * side) - x0
        total = total + share * (gap**2).mean((1, 2, 3)) / gap.detach().abs().mean((1, 2, 3))
    return (total * method.adv_clip_max / b + method.kl * ((v - ref) ** 2).mean((1, 2, 3))).mean()


@pytest.mark.parametrize("mix", [1.0, 0.1])
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, mix: float, kl: float) -> None:
    rig, method = lab.rig(push=0.05), DiffusionNFT(nft_beta=mix, kl=kl, timesteps=2, adv_clip_max=4.0)
    rig.model.update_copy("old", 0.0)
    lab.push(rig, 0.05, seed=2)
    batch = optimality_batch(rig)
    lab.agree(rig, lab.loss(method, rig, batch), slow_loss(lab, rig, method, batch))


def test_at_the_old_policy_the_gradient_goes_with_how_good_the_image_is(lab: Any) -> None:
    rig, method = lab.rig(push=0.05), DiffusionNFT(kl=0.0, timesteps=2)
    rig.model.update_copy("old", 0.0)
    one = {}
    for r in (0.0, 0.25, 0.5, 0.8, 1.0):
        batch = replace(optimality_batch(rig), optimality=torch.full((4,), r))
        one[r] = lab.gradient(rig, lab.loss(method, rig, batch))
    whole = float(one[1.0].norm())
    assert whole > 1e-4
    for r, gradient in one.items():
        assert float((gradient - (2 * r - 1) * one[1.0]).norm()) < 1e-5 * whole
    lab.push(rig, 0.05, seed=2)  # elsewhere r = 1/2 pulls back to the old policy
    batch = replace(optimality_batch(rig), optimality=torch.full((4,), 0.5))
    loss = lab.loss(method, rig, batch)
    pull = lab.gradient(rig, loss)
    assert float(pull.norm()) > 1e-4
    with torch.no_grad():
        drift = torch.cat([p.flatten() for p in rig.model.parameters()])
        lab.push(rig, -0.05, seed=2)
        drift -= torch.cat([p.flatten() for p in rig.model.parameters()])
    assert float(pull @ drift) > 0  # downhill is the way back


def test_times_are_distinct_ones_of_the_samplers_own(lab: Any) -> None:
    rig = lab.rig()
    grid = rig.model.times(10)
    with rig.keyed(torch.arange(50)):
        t = DiffusionNFT(steps=10).times(rig, 50)
    index = (t[:, :, None] == grid).int().argmax(2)
    assert t.shape == (50, 9) and all(len(set(row)) == 9 for row in index.tolist())
    assert set(index.flatten().tolist()) == set(range(10)) and len({tuple(row) for row in index.tolist()}) == 50
    with rig.keyed(torch.arange(50)):
        t = DiffusionNFT(steps=10, timesteps=2, t_min=0.6).times(rig, 50)
    assert t.shape == (50, 2) and set(t.flatten().tolist()) == set(grid[:7].tolist())
    assert (
        (t[:, 0] != t[:, 1]).all()
        and DiffusionNFT().trained_timesteps(1) == 1
        and DiffusionNFT().trained_timesteps(40) == 39
    )


def test_goodness_is_a_clamped_advantage(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, method = lab.rig(), DiffusionNFT(prompts=1, group=64, std="group")
    lab.groups(rig, [[1.0] + [0.0] * 63], monkeypatch)
    r = method.collect(rig).optimality
    assert float(r[0]) == 1.0 and float(r[1]) == pytest.approx(0.5 - 63**-0.5 / 10, rel=1e-4)


@pytest.mark.parametrize(
    "decay, lags",
    [
        (0, {0: 0, 1: 0, 1000: 0}),
        (1, {0: 0, 1: 0.001, 100: 0.1, 500: 0.5, 9999: 0.5}),
        (2, {0: 0, 74: 0, 75: 0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999, 9999: 0.999}),
    ],
)
def test_the_old_copy_lags_by_schedule_and_samples(
    lab: Any, monkeypatch: pytest.MonkeyPatch, decay: Any, lags: dict[int, float]
) -> None:
    method = DiffusionNFT(prompts=1, group=2, decay_type=decay)
    assert {updates: method.old_decay(updates) for updates in lags} == pytest.approx(lags)
    rig, asked, decays = lab.rig(), list[Any](), list[float]()
    drawn, blend = rig.groups, rig.model.update_copy
    monkeypatch.setattr(rig.model, "update_copy", lambda name, weights: (decays.append(weights), blend(name, weights)))
    monkeypatch.setattr(rig, "groups", lambda *a, **k: (asked.append(k), drawn(*a, **k))[1])
    rig.iteration = 40
    replace(method, optim=Optim(minibatches=2)).collect(rig)
    assert decays == [method.old_decay(80)]
    assert (asked[0]["weights"], asked[0]["kernel"], asked[0]["guidance"]) == ("old", dpm2, 1.0)

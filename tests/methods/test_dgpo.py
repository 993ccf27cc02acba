"""DGPO on a small random model: its equation in float64, GPO's gradient without the clip, its times, its old copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpobench.bench.flow import dpm2, ode
from gpobench.bench.losses import gpo, standardise
from gpobench.bench.spec import Optim
from gpobench.methods.dgpo import DGPO, TimedGroups

REWARD = torch.tensor([[0.0, 0.2, 0.9, 1.0], [0.3, float("nan"), 0.5, 0.1]])


def timed_groups(rig: Any) -> TimedGroups:
    """Two groups, each at two times, one of them pure noise."""
    x0 = torch.randn(2, 4, *rig.model.shape, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, 0)
    reward = REWARD.repeat_interleave(2, 0)
    return TimedGroups(x0, torch.tensor([1, 1, 4, 4]), torch.tensor([1.0, 0.7, 1.0, 0.7]), reward, standardise(reward))


def slow_errors(lab: Any, rig: Any, batch: TimedGroups) -> dict[str, torch.Tensor]:
    """(N, G) float64 by weights: mean (v - (eps - x0))^2, and the distance to the reference under "kl"."""
    with rig.keyed(lab.keys(batch)):
        eps = rig.noise(len(batch.prompt_ids))
    out: dict[str, list[torch.Tensor]] = {"policy": [], "ref": [], "old": [], "kl": []}
    for n in range(len(batch.prompt_ids)):
        t, x0, noise = batch.t[n].double(), batch.x0[n].double(), eps[n].double()
        x = (1 - t) * x0 + t * noise
        v = {
            weights: rig.velocity(
                x.float(), batch.t[n].repeat(4), batch.prompt_ids[n].repeat(4), weights=weights
            ).double()
            for weights in ("policy", "ref", "old")
        }
        for weights in v:
            out[weights].append(((v[weights] - (noise - x0)) ** 2).mean((1, 2, 3)))
        out["kl"].append(((v["policy"] - v["ref"]) ** 2).mean((1, 2, 3)))
    return {key: torch.stack(rows) for key, rows in out.items()}


@pytest.fixture
def moved(lab: Any) -> Any:
    """A rig whose policy, old copy and reference all differ."""
    rig = lab.rig(push=0.05)
    rig.model.update_copy("old", 0.0)
    lab.push(rig, 0.05, seed=2)
    return rig


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e9])
@pytest.mark.parametrize("beta", [1.0, 300.0])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, moved: Any, clip: float, beta: float) -> None:
    batch, method = timed_groups(moved), DGPO(group=4, beta=beta, clip_range=clip, kl=0.3)
    e = slow_errors(lab, moved, batch)
    a, known = batch.advantage.double(), batch.reward.isfinite()
    weight = 1 / (1 + (-(beta / 4) * (a * (e["policy"] - e["ref"])).sum(1, keepdim=True)).exp())
    ratio = (e["old"] - e["policy"]).exp()
    free = (~(((a > 0) & (ratio > 1 + clip)) | ((a <= 0) & (ratio < 1 - clip)))).double() if clip else 1.0
    constant = e["policy"].detach()
    taught = constant + free * (e["policy"] - constant)
    kl = sum((e["kl"][n] * known[n]).sum() / known[n].sum() for n in range(4)) / 4
    lab.agree(moved, lab.loss(method, moved, batch), (weight.detach() * a * taught).mean() + 0.3 * kl)
    if clip == 1e-3:
        assert 0 < float(free.mean()) < 1  # some are beyond the clip, some are not


@pytest.mark.parametrize("clip", [0.0, 1e9])
def test_where_nothing_is_clipped_the_gradient_is_that_of_gpo(lab: Any, moved: Any, clip: float) -> None:
    batch = timed_groups(moved)
    e = slow_errors(lab, moved, batch)
    one = lab.gradient(moved, lab.loss(DGPO(group=4, beta=40.0, clip_range=clip, kl=0), moved, batch))
    two = lab.gradient(moved, gpo(batch.advantage.double(), e["policy"], e["ref"], 40.0).mean())
    assert float((one - two).norm()) < 2e-4 * float(two.norm())


def test_the_times_are_the_samplers_own_early_ones_and_all_groups_share_them(lab: Any) -> None:
    rig, method = lab.rig(), DGPO(prompts=3, group=4, steps=10, timesteps=4, trunc_steps=5)
    seen: set[float] = set()
    for _ in range(6):
        batch = method.collect(rig)
        t = batch.t.view(3, 4)
        assert (t == t[0]).all() and len(set(t[0].tolist())) == 4
        assert torch.equal(batch.prompt_ids.view(3, 4), batch.prompt_ids.view(3, 4)[:, :1].expand(3, 4))
        assert all(torch.equal(batch.x0[4 * g], batch.x0[4 * g + 3]) for g in range(3))
        seen |= set(t[0].tolist())
    assert seen == set(rig.model.times(10)[:6].tolist())


def test_advantages_are_clamped(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of 64 is liked: its standardised reward is sqrt 63."""
    rig, method = lab.rig(), DGPO(prompts=1, group=64, timesteps=1, std="group")
    lab.groups(rig, [[1.0] + [0.0] * 63], monkeypatch)
    adv = method.collect(rig).advantage[0]
    assert float(adv[0]) == 5.0 and float(adv[1]) == pytest.approx(-(63**-0.5), rel=1e-3)


def test_the_old_copy_follows_and_then_samples(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, decays, weights = lab.rig(), list[float](), list[Any]()
    drawn, blend = rig.groups, rig.model.update_copy
    monkeypatch.setattr(rig.model, "update_copy", lambda name, decay: (decays.append(decay), blend(name, decay)))

    def groups(*args: Any, **kwargs: Any) -> Any:
        weights.append((kwargs["weights"], kwargs["kernel"]))
        return drawn(*args, **kwargs)

    monkeypatch.setattr(rig, "groups", groups)
    for rig.iteration in (0, 1, 2, 3, 199, 200, 201, 300, 301, 302, 5000):
        DGPO(prompts=1, group=2, switch_ema_ref=200).collect(rig)
    # one update an iteration; after update g their copy follows with min(0.3, 0.001 (g - 1)): the counter goes up afterwards
    assert decays == pytest.approx([0.0, 0.0, 0.001, 0.002, 0.198, 0.199, 0.2, 0.299, 0.3, 0.3, 0.3])
    assert weights == [("policy", dpm2)] * 6 + [("old", dpm2)] * 5  # where global_step > switch_ema_ref
    decays.clear()
    weights.clear()
    for rig.iteration in (0, 33, 34, 50):
        DGPO(prompts=1, group=2, switch_ema_ref=200, optim=Optim(epochs=2, minibatches=3)).collect(rig)
    assert decays == pytest.approx([0.0, 0.197, 0.203, 0.299])  # six updates an iteration
    assert [name for name, _ in weights] == ["policy", "policy", "old", "old"]
    DGPO(prompts=1, group=2, switch_ema_ref=0, solver="ode").collect(rig)
    assert weights[-1] == ("old", ode)

"""AWM on a small random model: its equation in float64, flow matching weighted by advantages, its strata, its old copy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gpobench.bench.flow import dpm2
from gpobench.bench.spec import Optim
from gpobench.methods.awm import AWM, AdvantageBatch

FREE = {"kl": 0.0, "ema_kl": 0.0}


def advantage_batch(rig: Any) -> AdvantageBatch:
    x0 = torch.randn(5, *rig.model.shape, generator=torch.Generator().manual_seed(3))
    return AdvantageBatch(x0, torch.tensor([1, 1, 4, 0, 2]), torch.tensor([0.9, -0.4, 0.0, 0.3, -1.0]))


@pytest.fixture
def moved(lab: Any) -> Any:
    """A rig whose policy, old copy and reference all differ."""
    rig = lab.rig(push=0.05)
    rig.model.update_copy("old", 0.0)
    lab.push(rig, 0.05, seed=2)
    return rig


def slow(lab: Any, rig: Any, method: AWM, batch: AdvantageBatch) -> dict[str, torch.Tensor]:
    """(N Kt,) float64: the times t, the advantages, the errors by weights, the distances "kl" and "lag"."""
    k = method.timesteps
    with rig.keyed(lab.keys(batch)):
        t = method.times(rig, len(batch.prompt_ids)).flatten()
        eps = rig.noise(len(t)).double()
    x0, prompt_ids = batch.x0.repeat_interleave(k, 0).double(), batch.prompt_ids.repeat_interleave(k)
    mixed = (1 - t.double())[:, None, None, None] * x0 + t.double()[:, None, None, None] * eps
    v = {
        weights: rig.velocity(mixed.float(), t, prompt_ids, weights=weights).double()
        for weights in ("policy", "ref", "old")
    }
    square = {weights: ((v[weights] - (eps - x0)) ** 2).mean((1, 2, 3)) for weights in v}
    kl, lag = (((v["policy"] - v[weights]) ** 2).mean((1, 2, 3)) for weights in ("ref", "old"))
    return {"t": t.double(), "adv": batch.advantage.double().repeat_interleave(k), **square, "kl": kl, "lag": lag}


def slow_fit(form: str, d: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return {
        "uniform": lambda: -d,
        "t": lambda: -t * d,
        "t2": lambda: -t * t * d,
        "huber": lambda: -t * ((d + 1e-10) ** 0.5 - 1e-5),
        "ghuber": lambda: -4 * t * ((d + 1e-10) ** 0.25 - 1e-10**0.25),
    }[form]()


@pytest.mark.parametrize("form", ["uniform", "t", "t2", "huber", "ghuber"])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("clip", [1.0, 1e-3])
def test_the_loss_and_its_gradient_are_the_equation(
    lab: Any, moved: Any, form: Any, off_policy: bool, clip: float
) -> None:
    method = AWM(weighting=form, off_policy=off_policy, clip_range=clip, kl=0.3, ema_kl=0.7, timesteps=2)
    batch = advantage_batch(moved)
    e = slow(lab, moved, method, batch)
    ell = slow_fit(form, e["policy"], e["t"])
    ratio = (ell - (slow_fit(form, e["old"], e["t"]) if off_policy else ell).detach()).exp()
    pessimistic = torch.stack([-e["adv"] * ratio, -e["adv"] * ratio.clamp(1 - clip, 1 + clip)]).amax(0)
    expected = (pessimistic + 0.3 * e["kl"] + 0.7 * e["lag"]).mean()
    lab.agree(moved, lab.loss(method, moved, batch), expected)


def test_without_advantages_the_policy_has_no_gradient(lab: Any, moved: Any) -> None:
    batch = replace(advantage_batch(moved), advantage=torch.zeros(5))
    for off_policy in (False, True):
        loss = lab.loss(AWM(off_policy=off_policy, **FREE), moved, batch)
        assert float(loss.detach()) == 0 and float(lab.gradient(moved, loss).abs().max()) == 0


def test_on_policy_it_is_flow_matching_weighted_by_advantages(lab: Any, moved: Any) -> None:
    """The ratio is 1 and the gradient that of mean A e: the advantage-weighted flow matching of the paper's title."""
    method, batch = AWM(weighting="uniform", **FREE), advantage_batch(moved)
    loss = lab.loss(method, moved, batch)
    assert float(loss.detach()) == pytest.approx(-float(batch.advantage.mean()), abs=1e-6)
    assert moved.mean("policy/ratio") == 1
    e = slow(lab, moved, method, batch)
    one, two = lab.gradient(moved, loss), lab.gradient(moved, (e["adv"] * e["policy"]).mean())
    assert float((one - two).norm()) < 1e-4 * float(two.norm())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_image_beyond_the_clip_teaches_nothing(lab: Any, moved: Any, sign: float) -> None:
    method = AWM(weighting="uniform", off_policy=True, clip_range=1e-6, timesteps=1, **FREE)
    batch = replace(advantage_batch(moved), advantage=torch.full((5,), sign))
    e = slow(lab, moved, method, batch)
    ratio = (e["old"] - e["policy"]).exp()
    beyond = (ratio > 1) if sign > 0 else (ratio < 1)  # it has moved its own way already
    assert 0 < int(beyond.sum()) < 5
    loss = lab.loss(method, moved, batch)
    expected = -sign * torch.where(beyond, 1.0, ratio).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    one, two = lab.gradient(moved, loss), lab.gradient(moved, expected)
    assert float((one - two).norm()) < 1e-4 * float(two.norm())


def test_strata() -> None:
    """Of 14 steps the code's linspace(1, 12, 7), cut to whole numbers."""
    assert AWM(timesteps=6).strata(14) == [1, 2, 4, 6, 8, 10, 12]
    assert AWM(timesteps=6, with_init=True).strata(14) == [0, 2, 4, 6, 8, 10, 12]
    for k in range(1, 12):
        bounds = AWM(timesteps=k).strata(14)
        assert bounds == [int(x) for x in (1 + 11 * i / k + 1e-9 for i in range(k + 1))]
        assert all(low < high for low, high in zip(bounds, bounds[1:]))


def test_every_image_has_one_time_from_every_stratum(lab: Any) -> None:
    rig, method = lab.rig(), AWM(timesteps=6, steps=14)
    with rig.keyed(torch.arange(200)):
        t = method.times(rig, 200)
    grid = rig.model.times(14)
    index = (t[:, :, None] == grid).int().argmax(2)
    bounds = method.strata(14)
    for i in range(6):
        assert set(index[:, i].tolist()) == set(range(bounds[i], bounds[i + 1]))
    assert float(t.max()) < 1 and len({tuple(row) for row in index.tolist()}) > 20  # 1 * 2^5 there are


def test_advantages_lie_between_minus_one_and_one(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, method = lab.rig(), AWM(prompts=1, group=64, std="group")
    lab.groups(rig, [[1.0] + [0.0] * 63], monkeypatch)
    adv = method.collect(rig).advantage
    assert float(adv[0]) == 1.0 and float(adv[1]) == pytest.approx(-(63**-0.5) / 5, rel=1e-3)


def test_the_old_copy_follows_where_it_is_needed(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, decays = lab.rig(), list[float]()
    blend = rig.model.update_copy
    monkeypatch.setattr(rig.model, "update_copy", lambda name, decay: (decays.append(decay), blend(name, decay)))
    kernels: list[Any] = []
    collectors: list[str] = []
    drawn = rig.groups

    def groups(*args: Any, **kwargs: Any) -> Any:
        kernels.append(kwargs["kernel"])
        collectors.append(kwargs["weights"])
        return drawn(*args, **kwargs)

    monkeypatch.setattr(rig, "groups", groups)
    for rig.iteration in (0, 1, 100, 299, 300, 4000):
        AWM(prompts=1, group=2).collect(rig)
    assert decays == [0.0, 0.001, 0.1, 0.299, 0.3, 0.3]  # updates / 1000 up to 0.3; one update an iteration
    AWM(prompts=1, group=2, ema_kl=0.0).collect(rig)
    assert len(decays) == 6 and kernels == [dpm2] * 7
    rig.iteration = 7
    AWM(prompts=1, group=2, ema_kl=0.0, off_policy=True, optim=Optim(epochs=2, minibatches=3)).collect(rig)
    assert decays[-1] == pytest.approx(0.042)
    assert collectors == ["policy"] * 7 + ["old"]


def test_off_policy_the_lagged_copy_draws_the_images(lab: Any) -> None:
    """The images are those that the copy gives for the same noise, and not the policy's."""
    images: dict[tuple[bool, str], torch.Tensor] = {}
    for off_policy in (False, True):
        for moved in ("policy", "old"):
            rig = lab.rig(seed=3)
            rig.model.update_copy("old", 0.0)
            lab.push(rig, 0.05, seed=2)
            if moved == "old":  # then the policy goes back: only the copy differs from the first case
                rig.model.update_copy("old", 0.0)
                lab.push(rig, -0.05, seed=2)
            rig.iteration = 10**6
            rig.model.update_copy = lambda name, decay: None  # type: ignore[method-assign]
            images[off_policy, moved] = AWM(prompts=1, group=3, steps=4, off_policy=off_policy).collect(rig).x0
    assert torch.allclose(images[False, "policy"], images[True, "old"], atol=1e-4)
    assert torch.allclose(images[True, "policy"], images[False, "old"], atol=1e-4)
    assert not torch.allclose(images[False, "policy"], images[True, "policy"], atol=1e-2)

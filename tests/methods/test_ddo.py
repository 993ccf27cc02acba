"""DDO on a small random model: real and fake images of the round's reference, its equation in float64, its cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.losses import ddo
from gpobench.bench.spec import Optim, Pairs
from gpobench.methods.ddo import DDO

nan = math.nan


def test_real_is_the_best_image_and_fake_any_other_scored_one(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = lab.rig()
    drawn = lab.groups(rig, [[0.0, nan, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.3, nan, 0.2, nan]], monkeypatch)
    fakes: list[int] = []
    for _ in range(200):
        batch = DDO(prompts=3, group=4).collect(rig)
        assert batch.prompt_ids.tolist() == [0, 2]
        assert torch.equal(batch.win, torch.stack([drawn.x0[0, 2], drawn.x0[2, 0]]))
        assert torch.equal(batch.lose[1], drawn.x0[2, 2])
        fakes.append(next(i for i in range(4) if torch.equal(batch.lose[0], drawn.x0[0, i])))
    assert set(fakes) == {0, 3} and abs(fakes.count(0) - 100) < 5 * math.sqrt(50)  # the second best too


def test_the_reference_of_a_round_draws_its_images(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, copied, weights = lab.rig(), list[int](), list[str]()
    update, groups = rig.model.update_copy, rig.groups
    monkeypatch.setattr(
        rig.model, "update_copy", lambda name, decay: (copied.append(rig.iteration), update(name, decay))
    )
    monkeypatch.setattr(rig, "groups", lambda *a, **k: weights.append(k["weights"]) or groups(*a, **k))
    for rig.iteration in range(5):
        DDO(prompts=1, group=2, ref_update_step=2).collect(rig)
    assert copied == [0, 2, 4] and set(weights) == {"old"}


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 1.0), (300.0, 4.0)])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, beta: float, alpha: float) -> None:
    """Real and fake each have a time and a noise of their own."""
    rig = lab.rig()
    rig.model.update_copy("old", 0.0)
    lab.push(rig, 0.05)
    images = rig.noise(6).view(3, 2, *rig.model.shape)
    batch = Pairs(images[:, 0], images[:, 1], torch.tensor([1, 4, 0]))
    with rig.keyed(lab.keys(batch)):
        low = 0.5 / (3 - 2 * 0.5)
        u = low + (1 - low) * rig.normal(6).sigmoid()
        t, eps = (3 * u / (1 + 2 * u)).view(3, 2), rig.noise(6).view(3, 2, *rig.model.shape)
    expected: Any = 0.0
    for p in range(3):
        for side, (sign, weight) in enumerate(((1.0, 1.0), (-1.0, alpha))):
            time, x0, noise = t[p, side].double(), images[p, side].double(), eps[p, side].double()
            x = ((1 - time) * x0 + time * noise).float()[None]
            errors = [
                (rig.velocity(x, t[p, side][None], batch.prompt_ids[p][None], weights=w).double()[0] - (noise - x0))
                .square().mean() for w in ("policy", "old")
            ]  # fmt: skip
            expected = expected + weight * torch.log1p((sign * beta / 2 * (errors[0] - errors[1])).exp()) / beta / 3
    lab.agree(rig, lab.loss(DDO(beta=beta, alpha=alpha, t_min=0.5), rig, batch), expected, tol=1e-4)


def test_the_formula_stays_finite_and_swaps_with_its_arguments() -> None:
    s = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4], dtype=torch.float64)
    assert bool(ddo(s, -s, 100.0, 2.0).isfinite().all())
    assert torch.allclose(ddo(s, -s, 3.0, 1.0), 2 * (1 + (1.5 * s).exp()).log().nan_to_num(posinf=1.5e4), rtol=1e-9)
    assert torch.allclose(ddo(s, s.flip(0), 3.0, 1.0), ddo(-s.flip(0), -s, 3.0, 1.0))  # a swap of the two kinds
    half = ddo(s.bfloat16(), s.bfloat16(), 3.0, 1.0)
    assert half.dtype == torch.float32


def test_at_the_reference_the_loss_is_log_two_times_one_plus_alpha(lab: Any) -> None:
    rig, method = lab.rig(push=0.05), DDO(prompts=3, group=3, beta=50.0, alpha=2.0)
    batch = method.collect(rig)
    assert float(lab.loss(method, rig, batch).detach()) == pytest.approx(3 * math.log(2) / 50, rel=1e-6)
    assert rig.mean("policy/accuracy") == 0.5


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_static_cost_is_what_the_meter_shows(lab: Any, guidance: float) -> None:
    rig = lab.rig(push=0.02)
    method = DDO(prompts=3, group=4, steps=5, guidance=guidance, optim=Optim(epochs=2, micro=1))
    lab.fit(method, rig, 1)
    assert dict(rig.meter.roles) == pytest.approx({role: 12 * each for role, each in method.cost(4, 1.0).items()})


def test_equal_rewards_make_no_step(lab: Any) -> None:
    rig = lab.rig("Constant")
    numbers = lab.fit(DDO(prompts=2, group=3), rig, 2)
    assert [n["batch/rows"] for n in numbers] == [0, 0] and rig.meter.updates == 0


@pytest.mark.parametrize(
    "bad",
    [{"group": 1}, {"prompts": 0}, {"beta": 0.0}, {"alpha": 0.0}, {"ref_update_step": 0}, {"t_min": 1.0}, {"steps": -1},
     {"guidance": -1.0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^ddo: {next(iter(bad))} must be"):
        DDO(**bad)

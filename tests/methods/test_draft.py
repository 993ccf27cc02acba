"""DRaFT: its gradient is that of the steps written out, by autograd and by the adjoint ODE; the reward's is the scorer's own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.conformance.harness import ToyScorer, equal_rewards, redness, unscored_first_image
from gpobench.bench.errors import UserError
from gpobench.bench.flow import mix
from gpobench.bench.spec import Optim
from gpobench.bench.training.observation import Observer
from gpobench.bench.training.train import optimiser, train
from gpobench.bench.training.unscored import Unscored
from gpobench.methods.draft import DRaFT

FEW = DRaFT(prompts=3, group=2, steps=4, optim=Optim(lr=1e-3, minibatches=1))


@pytest.fixture
def toy(lab: Any) -> Any:
    """A rig whose scorer has a gradient."""

    def make(rule: Any = redness, push: float = 0.05) -> Any:
        rig = lab.rig(push=push)
        rig.scorer = ToyScorer(rule)
        return rig

    return make


def euler(rig: Any, x: Tensor, prompt_ids: Tensor, indices: range, steps: int, guidance: float = 1.0) -> Tensor:
    """Explicit steps x + (s - t) v on the flow path."""
    grid, cond = rig.model.times(steps), rig.model.encode([p.text for p in rig.texts(prompt_ids)])
    for i in indices:
        v = rig.model.velocity(x, grid[i].expand(len(x)), cond, guidance=guidance)
        x = x + (grid[i + 1] - grid[i]) * v
    return x


def plain_reward(rig: Any, x0: Tensor) -> Tensor:
    """The toy's rule on decoded pixels, rounded for the value and not for the gradient."""
    images = rig.model.decode(x0).clamp(0, 1)
    pixels = images + ((images * 255).round() / 255 - images).detach()
    return redness((pixels * 255).movedim(1, -1), [])


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_gradient_is_autograds_through_k_explicit_steps(
    lab: Any, toy: Any, k: int, adjoint: bool, guidance: float
) -> None:
    """To 1e-4 of its norm, by the adjoint ODE too: float32 sums in another order."""
    rig, method = toy(), replace(FEW, last_steps=k % 4, adjoint=adjoint, guidance=guidance)
    batch = method.collect(rig.view)
    got = lab.gradient(rig, lab.loss(method, rig, batch))
    with torch.no_grad():
        x = euler(rig, batch.noise, batch.prompt_ids, range(4 - k), 4, guidance or 1.0)
    x0 = euler(rig, x, batch.prompt_ids, range(4 - k, 4), 4, guidance or 1.0)
    expected = lab.gradient(rig, -plain_reward(rig, x0).mean())
    assert float(expected.norm()) > 1e-6 and float((got - expected).norm()) < 1e-4 * float(expected.norm())


def test_lv_is_the_mean_over_the_image_and_its_noised_copies(
    lab: Any, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, method = toy(), replace(FEW, last_steps=1, renoise=2)
    batch = method.collect(rig.view)
    drawn = [torch.randn_like(batch.noise, generator=None) for _ in range(2)]
    left = list(drawn)
    monkeypatch.setattr(rig, "noise", lambda n: left.pop(0))
    got = lab.gradient(rig, lab.loss(method, rig, batch))
    ids, t = batch.prompt_ids, rig.model.times(4)[3].expand(len(batch.noise))
    with torch.no_grad():
        x = euler(rig, batch.noise, ids, range(3), 4)
    first = euler(rig, x, ids, range(3, 4), 4)
    again = [euler(rig, mix(rig.path, first.detach(), eps, t)[0], ids, range(3, 4), 4) for eps in drawn]
    expected = lab.gradient(rig, -torch.stack([plain_reward(rig, x0) for x0 in (first, *again)]).mean())
    assert not left and float((got - expected).norm()) < 1e-4 * float(expected.norm())


@pytest.mark.parametrize(
    "method",
    [FEW, replace(FEW, last_steps=0), replace(FEW, renoise=2), replace(FEW, last_steps=0, adjoint=True),
     replace(FEW, last_steps=2, adjoint=True), replace(FEW, renoise=1, adjoint=True)],
)  # fmt: skip
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_what_is_computed_is_what_is_charged_and_declared(toy: Any, method: DRaFT, guidance: float) -> None:
    """Counted beside the rig: the network with and without a gradient, decoder and scorer with one."""
    rig, method = toy(), replace(method, guidance=guidance, optim=Optim(lr=1e-3, minibatches=2, micro=2, epochs=2))
    adam, observer = optimiser(method, rig), Observer(rig.model, [rig.scorer])
    observer.install()
    try:
        train(method, rig, adam, after=lambda notes: None, interrupted=lambda: True, watched=observer.training)
        seen = observer.observe(rig.meter, rig.meter.budget)
    finally:
        observer.close()
    images = 12 * (1 + method.renoise)
    assert seen.differences == [] and rig.meter.images == rig.meter.reward_calls == images
    assert rig.meter.reward_backwards == {"toy": images}
    assert seen.training["gradient_decoded"] == seen.training["gradient_scored toy"] == images
    declared = method.cost(rig.model.steps, rig.model.guidance)
    assert {role: nfe / images for role, nfe in rig.meter.roles.items()} == pytest.approx(
        {role: nfe for role, nfe in declared.items() if nfe}
    )
    assert seen.training["backwards"] == seen.training["gradient_forwards"]


@pytest.mark.parametrize("nfe", [30, 60, 100, 130])
def test_a_budget_that_ends_between_forward_and_backward_is_no_difference(toy: Any, nfe: int) -> None:
    """The adjoint's backward pass is charged before its forward pass; what is left of it then is the meter's `deferred`."""
    rig, method = toy(), replace(FEW, last_steps=0, adjoint=True, optim=Optim(minibatches=1, micro=1))
    rig.meter = Meter(Budget(nfe=nfe))
    adam, observer = optimiser(method, rig), Observer(rig.model, [rig.scorer])
    observer.install()
    try:
        stop = train(method, rig, adam, after=lambda notes: None, watched=observer.training)
        seen = observer.observe(rig.meter, rig.meter.budget)
    finally:
        observer.close()
    assert stop == "budget: nfe" and seen.differences == [] and rig.meter.nfe <= nfe


@pytest.mark.parametrize("where", ["decoder", "scorer"])
def test_a_gradient_past_the_rig_is_a_difference(toy: Any, where: str) -> None:
    rig = toy()
    observer = Observer(rig.model, [rig.scorer])
    observer.install()
    try:
        with observer.training():
            images = rig.model.decode(rig.noise(2).requires_grad_(where == "decoder"))
            if where == "scorer":
                rig.scorer.differentiable(images.requires_grad_(), rig.texts(torch.tensor([0, 1])))
        lines = observer.observe(rig.meter, rig.meter.budget).differences
    finally:
        observer.close()
    word = "images decoded with a gradient: 2" if where == "decoder" else "scores of toy with a gradient: 2"
    assert any(line.startswith(word) for line in lines)


def test_equal_rewards_have_no_gradient(lab: Any, toy: Any) -> None:
    rig = toy(equal_rewards)
    assert float(lab.gradient(rig, lab.loss(FEW, rig, FEW.collect(rig.view))).abs().max()) == 0


def test_images_without_a_score_are_counted_and_teach_nothing(lab: Any, toy: Any) -> None:
    rig = toy(unscored_first_image)
    batch = FEW.collect(rig.view)
    got = lab.gradient(rig, lab.loss(FEW, rig, batch))
    scored = torch.tensor([row % 2 == 1 for row in range(6)])  # the second image of each prompt
    x0 = euler(rig, batch.noise, batch.prompt_ids, range(3), 4).detach()
    x0 = euler(rig, x0, batch.prompt_ids, range(3, 4), 4)
    expected = lab.gradient(rig, -torch.where(scored, plain_reward(rig, x0), 0.0).mean())
    assert float((got - expected).norm()) < 1e-4 * float(expected.norm())
    rig.settle_reward_gradients()
    assert rig.meter.errors == 3 and rig.images_sent == 6 and rig.images_scored == 3 and len(rig.failures) == 3


@pytest.mark.parametrize("fault", ["nan", "raises", "no gradient", "too many"])
def test_where_nothing_has_a_score_no_step_is_made(lab: Any, toy: Any, fault: str) -> None:
    rig = toy()
    value = {"nan": lambda x: x.flatten(1).sum(1) * math.nan, "no gradient": lambda x: torch.ones(len(x)),
             "too many": lambda x: x.flatten(1).sum(1).repeat(2), "raises": lambda x: 1 / 0}[fault]  # fmt: skip
    rig.scorer.differentiable = lambda images, prompts: value(images)
    before = [p.detach().clone() for p in rig.model.parameters()]
    with pytest.raises(Unscored):
        lab.fit(FEW, rig, 1)
    assert rig.meter.errors == rig.meter.reward_calls == 6 and rig.meter.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(before, rig.model.parameters(), strict=True))


def test_it_makes_the_model_better(lab: Any, toy: Any) -> None:
    rig, method = toy(push=0.0), replace(FEW, prompts=6, group=4, last_steps=2, optim=Optim(lr=3e-3, minibatches=1))
    first, *_, last = lab.fit(method, rig, 25)
    assert last["reward/mean"] > first["reward/mean"] + 0.02


@pytest.mark.parametrize(
    "bad",
    [{"prompts": 0}, {"group": 0}, {"last_steps": -1}, {"last_steps": 5, "steps": 4}, {"renoise": -1}, {"renoise": 1, "last_steps": 2},
     {"steps": -1}, {"guidance": -1}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"draft: {next(iter(bad))} "):
        DRaFT(**bad)
    with pytest.raises(UserError, match="draft: last_steps must be at most the 4 steps"):
        DRaFT(last_steps=5).cost(4, 1.0)

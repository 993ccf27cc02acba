"""Laws that Flow-GRPO, MixGRPO and GRPO-Guard share, on a small random model; then Flow-GRPO's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.flow import ode, rectified
from gpobench.bench.losses import guard_log_ratio, standardise
from gpobench.bench.model_spec import SMALL, Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Optim, Prompt, batch_size, select_rows
from gpobench.bench.training import checkpoint
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import optimiser, train
from gpobench.methods.flow_grpo import FlowGRPO
from gpobench.methods.grpo_guard import GRPOGuard
from gpobench.methods.mix_grpo import MixGRPO

BOOK = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle", "a photo"]
FEW: dict[str, Any] = {"prompts": 2, "group": 4, "steps": 6}
FAST: dict[str, Any] = {
    "window_size": 2,
    "window_range": (0, 4),
    "sde_type": "cps",
    "noise_level": 0.8,
    "clip_range": 1e-5,
}
METHODS: dict[str, Any] = {
    "flow-grpo": FlowGRPO(**FEW, kl=0.0),
    "flow-grpo-kl": FlowGRPO(**FEW),
    "flow-grpo:fast": FlowGRPO(**FEW, **FAST, kl=0.0),
    "mix-grpo": MixGRPO(**FEW, window_size=3),
    "mix-grpo-cps": MixGRPO(**FEW, window_size=3, sde_type="cps", noise_level=0.8, clip_range=1e-5),
    "mix-grpo:flash": MixGRPO(**FEW, window_size=2, compress_ratio=0.5, shift_interval=1),
    "mix-grpo:flash-star": MixGRPO(**FEW, window_size=2, compress_ratio=0.4, window_stride=0),
    "grpo-guard": GRPOGuard(**FEW),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(scope="module")
def shared(tiny_pipe: Path) -> Any:
    return open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)


@pytest.fixture
def make(shared: Any, tiny_pipe: Path, redness: str) -> Iterator[Any]:
    """One model for all tests, reset to its first weights each time; a test that needs two at once opens its own."""
    made: list[MeteredRig] = []
    first = shared.lora.state()

    def build(
        name: str = "Redness", push: float = 0.0, adapter: Adapter | None = None, rows: int = 64, **bounds: float
    ) -> MeteredRig:
        shared.lora.restore(first)
        own = adapter and open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=adapter, seed=0)
        meter = Meter(Budget(**bounds or {"nfe": 1e9}))
        made.append(MeteredRig(own or shared, [Prompt(p) for p in BOOK], scorer(f"{redness}:{name}"), meter, rows=rows))
        shove(made[-1], push)
        return made[-1]

    yield build
    shared.lora.restore(first)
    for rig in made:
        rig.close()


def shove(rig: MeteredRig, push: float) -> None:
    """Move the trained weights, always by the same numbers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in rig.model.parameters():
            p.add_(push * torch.randn(p.shape, generator=generator))


def fit(method: Any, rig: MeteredRig, iterations: int) -> tuple[torch.optim.Optimizer, list[dict[str, float]]]:
    adam, seen = optimiser(method, rig), []
    go_on(method, rig, adam, iterations, seen)
    return adam, seen


def go_on(method: Any, rig: MeteredRig, adam: torch.optim.Optimizer, iterations: int, seen: list[Any]) -> None:
    end = rig.iteration + iterations
    train(
        method, rig, adam, 
        after=seen.append, interrupted=lambda: rig.iteration >= end,
    )  # fmt: skip


def keyed_loss(method: Any, rig: MeteredRig, batch: Any) -> Tensor:
    with rig.keyed(torch.arange(batch_size(batch))):
        return method.loss(rig, batch)


def weights(rig: MeteredRig) -> list[Tensor]:
    return [p.detach().clone() for p in rig.model.parameters()]


def gradient(loss: Tensor, rig: MeteredRig) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, rig.model.parameters())])


def step_of(method: Any, v: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, s) of a step, each formula as its paper or code prints it, in float64: arXiv 2505.05470, Eqs. 7-9, and 2509.05952."""
    x, v = batch.x.double(), v.double()
    t, s = (u.double().view(-1, 1, 1, 1) for u in (batch.t, batch.s))
    a, dt = method.noise_level, s - t
    if getattr(method, "sde_type", "sde") == "cps":
        std = s * math.sin(a * math.pi / 2)
        return (1 - s) * (x - t * v) + (s**2 - std**2).sqrt() * (x + (1 - t) * v), std, std
    scale = a * (t / (1 - torch.where(t == 1, s, t))).sqrt()
    mean = x * (1 + scale**2 / (2 * t) * dt) + v * (1 + scale**2 * (1 - t) / (2 * t)) * dt
    return mean, scale * (-dt).sqrt(), scale


def guidance_of(method: Any, rig: MeteredRig) -> float:
    return method.guidance or rig.model.guidance


# What the three have in common


@every_method
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_ratio_is_one_before_the_first_update(make: Any, method: Any, guidance: float) -> None:
    """Whatever batch the log-probabilities come from: sampled 8 at once, asked again 5 at once."""
    rig, method = make(push=0.1, rows=8), replace(method, guidance=guidance)
    batch = method.collect(rig)
    assert batch_size(batch) > 5 and bool(batch.advantage.abs().min() > 0)
    for rows in torch.arange(batch_size(batch)).split(5):
        part = select_rows(batch, rows)
        guided = {"guidance": guidance_of(method, rig)}
        with torch.no_grad():
            if isinstance(method, GRPOGuard):
                mean, std, _ = step_of(method, rig.velocity(part.x, part.t, part.prompt_ids, **guided), part)
                log_ratio = guard_log_ratio(mean.float(), part.mean, part.to, std.float())
            else:
                step = rig.step(method.kernel, part.x, part.t, part.s, part.prompt_ids, **guided)
                log_ratio = step.logp(part.to, drop=method.sde_type == "cps") - part.logp
        assert float(log_ratio.abs().max()) < 1e-6
        keyed_loss(method, rig, part)
    assert rig.mean("policy/ratio") == pytest.approx(1, abs=1e-6) and rig.mean("policy/clipped") == 0
    assert rig.mean("policy/kl") > 0 if getattr(method, "kl", 0) else math.isnan(rig.mean("policy/kl"))


@every_method
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_first_gradient_is_the_plain_policy_gradient(make: Any, method: Any, guidance: float) -> None:
    """grad of -mean A log p, log p written out in float64; Guard's is -mean A std log p / dt."""
    rig, method = make(), replace(method, guidance=guidance)
    batch = method.collect(rig)
    got = gradient(keyed_loss(method, rig, batch), rig)
    v = rig.velocity(batch.x, batch.t, batch.prompt_ids, guidance=guidance_of(method, rig))
    mean, std, _ = step_of(method, v, batch)
    square = (batch.to.double() - mean) ** 2
    if getattr(method, "sde_type", "sde") == "cps":
        logp = -square.mean((1, 2, 3))
    else:
        logp = (-square / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))).mean((1, 2, 3))
    assert torch.allclose(logp.float(), batch.logp, atol=1e-5) or isinstance(method, GRPOGuard)
    if isinstance(method, GRPOGuard):
        logp = logp * std.flatten() / (batch.t - batch.s).double()
    expected = gradient(-(batch.advantage.double() * logp).mean(), rig)
    assert float((got - expected).norm() / expected.norm()) < 2e-4 and float(expected.norm()) > 1e-5


# The weight of step k in the gradient, |d mean / d v| / std and its like, on SD3.5-M's grid of ten steps: computed from the formulas.
SIGMAS = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
WEIGHTS = {
    "flow-grpo": [0.0570, 0.0784, 0.1292, 0.1880, 0.2640, 0.3710, 0.5356, 0.8248, 1.4867],
    "mix-grpo": [0.0570, 0.0784, 0.1292, 0.1880, 0.2640, 0.3710, 0.5356, 0.8248, 1.4867],
    "mix-grpo-cps": [0.073, 0.125, 0.175, 0.218, 0.250, 0.260, 0.234, 0.153, 0.005],
    "grpo-guard": [1.0, *[1.245] * 8],
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_step_weighs_what_its_formula_says(make: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, method = make(), replace(METHODS[name], steps=10, **({"window_size": 9} if "mix" in name else {}))
    batch = method.collect(rig)
    v = rig.velocity(batch.x, batch.t, batch.prompt_ids).detach().requires_grad_()
    monkeypatch.setattr(rig, "velocity", lambda *args, **kwargs: v)
    (grad,) = torch.autograd.grad(keyed_loss(method, rig, batch), v)
    mean, std, _ = step_of(method, v.detach(), batch)
    eps = (batch.to.double() - mean) / std
    grid = rig.model.times(10)
    assert torch.allclose(grid, torch.tensor(SIGMAS), atol=1e-4)
    for k, weight in enumerate(WEIGHTS[name]):
        rows = batch.t == grid[k]
        assert int(rows.sum()) == batch_size(batch) / 9
        scale = batch.advantage[rows].view(-1, 1, 1, 1) * eps[rows] / grad[0].numel() / batch_size(batch)
        each = (grad[rows] * scale).sum((1, 2, 3)) / (scale**2).sum((1, 2, 3))
        assert each.tolist() == pytest.approx([weight] * len(each), rel=0.02, abs=6e-4), k


@every_method
def test_a_move_outside_the_clip_teaches_nothing_more(make: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, method = make(), replace(method, **({"kl": 0.0} if isinstance(method, FlowGRPO) else {}))
    batch = method.collect(rig)
    shove(rig, 0.2)
    v = rig.velocity(batch.x, batch.t, batch.prompt_ids).detach().requires_grad_()
    monkeypatch.setattr(rig, "velocity", lambda *args, **kwargs: v)
    rig.notes()
    (grad,) = torch.autograd.grad(keyed_loss(method, rig, batch), v)
    mean, std, _ = step_of(method, v.detach(), batch)
    if isinstance(method, GRPOGuard):
        log_ratio = ((mean - batch.mean) * (batch.to - batch.mean) / std).mean((1, 2, 3))
    elif method.sde_type == "cps":
        log_ratio = -((batch.to - mean) ** 2).mean((1, 2, 3)) - batch.logp
    else:
        log_ratio = ((batch.to - batch.mean) ** 2 - (batch.to - mean) ** 2).mean((1, 2, 3)) / (2 * std.flatten() ** 2)
    ratio = log_ratio.exp()
    silent = torch.where(batch.advantage > 0, ratio > 1 + method.clip_range, ratio < 1 - method.clip_range)
    assert 0 < int(silent.sum()) < batch_size(batch)
    assert torch.equal(grad.flatten(1).abs().sum(1) == 0, silent)
    assert rig.mean("policy/clipped") == pytest.approx(float(((ratio - 1).abs() > method.clip_range).float().mean()))


@every_method
def test_groups_without_spread_leave_no_rows(make: Any, method: Any) -> None:
    rig = make("Constant")
    batch = method.collect(rig)
    assert batch_size(batch) == 0 and rig.mean("groups/informative") == 0 and rig.meter.images == 8


@every_method
def test_an_image_without_a_score_teaches_nothing(make: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing the image that could not be scored changes no gradient; the others are standardised without it."""
    reward = torch.tensor([[math.nan, 0.0, 1.0, 5.0], [0.0, 2.0, 1.0, math.inf]])

    def learn(change: float) -> tuple[Any, Tensor]:
        rig = make()
        walk = rig.transitions

        def changed(*args: Any, **kwargs: Any) -> Any:
            transitions, _ = walk(*args, **kwargs)
            lost = torch.isin(transitions.image, torch.tensor([0, 7])).view(-1, 1, 1, 1)
            return replace(transitions, x=transitions.x + change * lost, to=transitions.to - change * lost), reward

        monkeypatch.setattr(rig, "transitions", changed)
        batch = method.collect(rig)
        return batch, gradient(keyed_loss(method, rig, batch), rig)

    (batch, first), (_, second) = learn(0.0), learn(1.0)
    assert set(batch.image.tolist()) == {1, 2, 3, 4, 5}  # image 6 earned exactly the mean of those known
    assert torch.equal(first, second) and float(first.abs().max()) > 0
    sample_std: dict[str, Any] = {"eps": 1e-8, "ddof": 1} if isinstance(method, MixGRPO) else {}
    advantage = standardise(reward, method.std, **sample_std).flatten()
    assert torch.allclose(batch.advantage, advantage[batch.image])


def test_advantages_are_held_within_their_bound(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, method = make(), FlowGRPO(prompts=1, group=40, steps=2, std="group")
    monkeypatch.setattr(rig, "_reward", lambda answer: torch.tensor([100.0] + [0.0] * 39))
    batch = method.collect(rig)
    assert float(batch.advantage.max()) == 5 and float(standardise(torch.tensor([[100.0] + [0.0] * 39])).max()) > 6


@every_method
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_static_cost_is_what_the_meter_shows(make: Any, method: Any, guidance: float) -> None:
    rig = make()
    method = replace(method, guidance=guidance, optim=Optim(epochs=2, minibatches=2, micro=3))
    fit(method, rig, 1)
    expected = {role: 8 * each for role, each in method.cost(rig.model.steps, rig.model.guidance).items()}
    assert dict(rig.meter.roles) == expected and rig.meter.images == rig.meter.reward_calls == 8
    assert ("ref" in expected) == bool(getattr(method, "kl", 0)) and rig.meter.updates == 4


@every_method
def test_the_same_seed_gives_the_same_weights_and_splitting_changes_nothing(make: Any, method: Any) -> None:
    def trained(micro: int) -> list[Tensor]:
        rig = make()
        fit(replace(method, optim=Optim(lr=1e-3, minibatches=2, micro=micro)), rig, 2)
        return weights(rig)

    first, same, parts, before = trained(0), trained(0), trained(3), weights(make())
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(first, before, strict=True)))
    off = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(first, parts, strict=True)))
    assert off < 0.02 * moved  # a last bit can decide about a clip, so not to the last bit


@every_method
def test_a_resumed_run_goes_on_to_the_same_bytes(make: Any, method: Any, tmp_path: Path) -> None:
    method = replace(method, optim=Optim(lr=1e-3, minibatches=2, ema=0.9))
    rig = make(adapter=Adapter(rank=4))
    adam, seen = fit(method, rig, 2)
    checkpoint.save(tmp_path, 2, rig, adam, {})
    go_on(method, rig, adam, 3, seen)

    other, again = make(adapter=Adapter(rank=4), push=0.3), []
    adam = optimiser(method, other)
    checkpoint.restore(tmp_path, other, adam, print)
    go_on(method, other, adam, 3, again)
    assert all(torch.equal(a, b) for a, b in zip(weights(rig), weights(other), strict=True))
    assert again == seen[2:]


def test_they_make_the_model_better(make: Any) -> None:
    """Each from the same start, for the same spend, evaluated on noise that none was trained on."""
    optim = Optim(lr=3e-3, weight_decay=0, minibatches=2)
    few: dict[str, Any] = {"prompts": 4, "group": 8, "steps": 4, "optim": optim}
    for method in (
        FlowGRPO(**few, kl=0.0, clip_range=1e-2, std="group"),
        FlowGRPO(**few, kl=0.0, window_size=2, window_range=(0, 3), sde_type="cps", noise_level=0.8, clip_range=1e-2),
        MixGRPO(**few, window_size=2, shift_interval=5, clip_range=1e-2),
        GRPOGuard(**few, clip_range=1e-3),
    ):
        rig = make(adapter=SMALL["adapter"], nfe=5_000)
        fit(method, rig, 1_000)
        rig.meter = Meter(Budget(nfe=1e9))
        x, prompt_ids = rig.noise(60), torch.arange(6).repeat(10)
        gain = rig.score(rig.sample(x, prompt_ids), prompt_ids) - rig.score(
            rig.sample(x, prompt_ids, weights="ref"), prompt_ids
        )
        # 13.7, 11.4, 13.6 and 15.4 standard errors, by less than 0.01 others with other instructions or with weights moved by
        # 1e-5 of themselves; 0 without training. The seed is part of the test: other seeds make 1.7 to 17.5.
        assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(60), method


@pytest.mark.parametrize(
    "name", "flow-grpo grpo flow-grpo:fast mix-grpo mix-grpo:flash mix-grpo:flash-star grpo-guard".split()
)
@pytest.mark.parametrize("model", ["tiny", "sd35m"])
def test_presets_and_search_spaces_are_settings(name: str, model: str) -> None:
    method = resolve(RunRequest(name, "ocr", model)).settings
    known = {f.name for f in fields(method)} | {f"optim.{f.name}" for f in fields(Optim)}
    assert set(type(method).space) <= known
    assert method.cost(10, 1.0)["rollout"] > 0


# Flow-GRPO's own


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("sampler", ["sde", "cps"])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_kl_is_its_formula(make: Any, form: Any, sampler: Any, guidance: float) -> None:
    rig = make(push=0.2)
    method = FlowGRPO(**FEW, kl=0.5, kl_form=form, sde_type=sampler, noise_level=0.7, guidance=guidance)
    batch = method.collect(rig)
    without = keyed_loss(replace(method, kl=0.0), rig, batch)
    rig.notes()
    got = keyed_loss(method, rig, batch)

    w = guidance_of(method, rig)
    policy, ref = (
        rig.velocity(batch.x, batch.t, batch.prompt_ids, weights=weights, guidance=w).double()
        for weights in ("policy", "ref")
    )
    dt = (batch.t - batch.s).double()
    (mean, std, scale), (mean_ref, _, _) = step_of(method, policy, batch), step_of(method, ref, batch)
    if sampler == "cps":
        kl = ((mean - mean_ref) ** 2 / (2 * std**2)).mean((1, 2, 3))
    elif form == "code":
        kl = ((mean - mean_ref) ** 2 / (2 * scale**2)).mean((1, 2, 3))
    else:  # the paper's closed form; at t = 1 its first factor is the clamp's, so the means are used there
        t, s = batch.t.double(), scale.flatten()
        kl = dt / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2 * ((policy - ref) ** 2).mean((1, 2, 3))
    assert rig.mean("policy/kl") == pytest.approx(float(kl.mean().detach()), rel=1e-3)
    assert float((got - without).detach()) == pytest.approx(0.5 * float(kl.mean().detach()), rel=1e-3)
    difference = gradient(got, rig) - gradient(without, rig)
    expected = gradient(0.5 * kl.mean(), rig)
    assert float((difference - expected).norm() / expected.norm()) < 1e-2 and float(expected.norm()) > 1e-5


def test_detaching_the_unconditional_branch_changes_the_gradient_only(make: Any) -> None:
    rig, method = make(push=0.1), FlowGRPO(**FEW, guidance=3.0)
    batch = method.collect(rig)
    both, one = (keyed_loss(replace(method, detach_uncond=detach), rig, batch) for detach in (False, True))
    assert float(both.detach()) == float(one.detach())
    a, b = gradient(both, rig), gradient(one, rig)
    assert float((a - b).norm() / a.norm()) > 0.05 and float(b.norm()) > 0


@pytest.mark.parametrize("sampler", ["sde", "cps"])
def test_with_hardly_any_noise_the_walk_is_the_ode(make: Any, sampler: Any) -> None:
    rig, method = make(), FlowGRPO(**FEW, sde_type=sampler, noise_level=1e-6, kl=0.0)
    batch = method.collect(rig)
    v = rig.velocity(batch.x, batch.t, batch.prompt_ids).detach()
    assert torch.allclose(batch.to, ode(rectified, batch.x, v, batch.t, batch.s).mean, atol=2e-5)


@pytest.mark.parametrize("steps,fraction,learnt", [(10, 0.99, 9), (4, 0.99, 3), (10, 0.5, 5), (2, 0.99, 1)])
def test_the_first_steps_are_learnt_from_and_never_the_last(
    make: Any, steps: int, fraction: float, learnt: int
) -> None:
    rig, method = make(), FlowGRPO(prompts=1, group=3, steps=steps, timestep_fraction=fraction)
    batch = method.collect(rig)
    grid = rig.model.times(steps)
    assert sorted(set(batch.t.tolist()), reverse=True) == grid[:learnt].tolist()
    assert int(batch.image.unique().numel()) * learnt == batch_size(batch)
    assert not torch.isclose(batch.to, batch.mean).all()


def test_only_the_window_is_noisy_and_it_goes_everywhere(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, method = make(), FlowGRPO(**FEW, **{**FAST, "window_size": 3, "window_range": (1, 5)}, kl=0.0)
    grid, places = rig.model.times(6), []
    walked: list[Any] = []
    walk = rig.walk
    monkeypatch.setattr(
        rig, "walk", lambda x, prompt_ids, kernels, **k: walked.append(kernels) or walk(x, prompt_ids, kernels, **k)
    )
    for _ in range(12):
        batch = method.collect(rig)
        start = int(rig.notes()["rollout/window"])
        places.append(start)
        assert [kernel != ode for kernel in walked[-1]] == [start <= i < start + 3 for i in range(6)]
        assert sorted(set(batch.t.tolist()), reverse=True) == grid[start : start + 3].tolist()
    assert set(places) == {1, 2}


def test_a_window_starts_anywhere_in_its_range_alike(make: Any) -> None:
    rig, method = make(), FlowGRPO(steps=10, window_size=3, window_range=(0, 5), sde_type="cps")
    starts = [method.plan(rig)[1][0] for _ in range(600)]
    assert set(starts) == {0, 1, 2} and min(starts.count(i) for i in range(3)) > 160


@pytest.mark.parametrize(
    "bad",
    [
        {"group": 1}, {"prompts": 0}, {"clip_range": 0}, {"clip_range": -1e-4}, {"kl": -0.1}, {"noise_level": 0},
        {"noise_level": 1.5, "sde_type": "cps"}, {"timestep_fraction": 1.0}, {"timestep_fraction": 0}, {"steps": 1}, {"guidance": -1},
        {"window_size": -1}, {"window_range": (0, 2), "window_size": 3}, {"window_range": (-1, 3), "window_size": 3}, {"adv_clip_max": 0},
        {"clip_range": math.nan},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"flow-grpo: {next(iter(bad))} "):
        FlowGRPO(**bad)


def test_what_does_not_fit_the_schedule_is_refused(make: Any) -> None:
    for method, word in (
        (FlowGRPO(window_size=3, window_range=(0, 4)), "window_range"),  # the protocol of this model has four steps
        (FlowGRPO(timestep_fraction=0.2), "timestep_fraction"),
    ):
        rig = make()
        with pytest.raises(UserError, match=f"flow-grpo: {word}"):
            method.collect(rig)
        with pytest.raises(UserError, match=f"flow-grpo: {word}"):
            method.cost(rig.model.steps, 1.0)
        assert rig.meter.nfe == 0

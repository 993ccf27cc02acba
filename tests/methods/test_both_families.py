"""Two model families under one contract: methods for a velocity model train a noise-predicting U-Net without a change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.flow import Kernel, Step, cps, dance, ddim, ddim_grid, ddpm, mix, sde, to_velocity
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.spec import Optim, Prompt, batch_size
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import optimiser, train
from gpobench.methods.gpo import GPO, AdvantageGroups

BOOK = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle", "a photo"]
FAMILIES = ("tiny_pipe", "tiny_unet")
SMALL = {"prompts": 2, "group": 3, "seeds": 1, "branches": 3, "split_steps": (0, 2)}  # of whatever fields a method has


def methods() -> list[str]:
    """The registered methods that train, each under its own name once; a name whose file is not there yet is left out.

    Those that need a reward with a gradient are left out, which the scorer here has not; `gpobench check` gives them one.
    """
    names: list[str] = []
    for name, entry in registry.entries("method").items():
        package, _, leaf = entry.value.partition(":")[0].rpartition(".")
        there = package != "gpobench.methods" or find_spec(f"{package}.{leaf}") is not None
        if not there or registry.canonical("method", name) != name:
            continue
        kind = registry.load("method", name)
        if "collect" in dir(kind) and "reward_backwards" not in dir(kind):
            names.append(name)
    return names


def build(name: str, **more: Any) -> Any:
    kind = registry.load("method", name)
    return kind(**{key: value for key, value in {**SMALL, **more}.items() if key in {f.name for f in fields(kind)}})


@pytest.fixture
def make(request: pytest.FixtureRequest, redness: str) -> Iterator[Callable[..., MeteredRig]]:
    made: list[MeteredRig] = []

    def rig(family: str, push: float = 0.0) -> MeteredRig:
        model_spec = find_model_spec(str(request.getfixturevalue(family)))
        model = open_model(model_spec, device="cpu", adapter=model_spec.adapter, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(push * torch.randn(p.shape, generator=generator))
        book, judge = [Prompt(p) for p in BOOK], registry.scorer(f"{redness}:Redness")
        made.append(MeteredRig(model, book, judge, Meter(Budget(nfe=1e9)), rows=64))
        return made[-1]

    yield rig
    for one in made:
        one.close()


def keyed_loss(method: Any, rig: MeteredRig, batch: Any) -> torch.Tensor:
    with rig.keyed(torch.arange(batch_size(batch)) + 5):
        return method.loss(rig, batch)


# Every method


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", methods())
def test_every_method_has_a_gradient_on_both_families(make: Any, name: str, family: str) -> None:
    rig, method = make(family, push=0.02), build(name)
    batch = method.collect(rig)
    assert batch_size(batch) > 0
    loss = keyed_loss(method, rig, batch)
    assert loss.ndim == 0 and bool(loss.isfinite())
    loss.backward()
    gradients = [p.grad for p in rig.model.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", methods())
def test_every_method_updates_both_families_and_costs_what_it_says(make: Any, name: str, family: str) -> None:
    """Two iterations of the loop; the meter agrees with the static cost where every group taught."""
    rig = make(family)
    method = build(name, optim=Optim(lr=1e-4, minibatches=1))
    before, seen = [p.detach().clone() for p in rig.model.parameters()], []
    why = train(
        method, rig, optimiser(method, rig), 
        after=seen.append, interrupted=lambda: len(seen) == 2,
    )  # fmt: skip
    assert why == "interrupted" and rig.meter.updates >= 2
    moved = [float((p.detach() - q).abs().max()) for p, q in zip(rig.model.parameters(), before, strict=True)]
    assert max(moved) > 0 and all(math.isfinite(m) for m in moved)
    cost = method.cost(rig.model.steps, rig.model.guidance)
    assert set(rig.meter.roles) <= set(cost)
    assert rig.meter.roles["rollout"] == pytest.approx(rig.meter.images * cost["rollout"])
    assert rig.meter.nfe <= rig.meter.images * sum(cost.values()) * (1 + 1e-9)


# GPO on the U-Net, in detail


@pytest.mark.parametrize("beta", [1.0, 100.0])
def test_at_the_reference_the_loss_of_gpo_is_log_two_over_beta(make: Any, beta: float) -> None:
    rig, method = make("tiny_unet"), GPO(prompts=3, group=4, beta=beta)
    batch = method.collect(rig)
    assert float(keyed_loss(method, rig, batch).detach()) == pytest.approx(math.log(2) / beta, rel=1e-6)
    assert rig.mean("policy/kl") == 0 and rig.mean("policy/accuracy") == 0.5


@pytest.mark.parametrize("guidance", [0.0, 7.5])
def test_the_static_cost_of_gpo_is_what_the_meter_shows(make: Any, guidance: float) -> None:
    rig = make("tiny_unet")
    method = GPO(prompts=3, group=4, steps=5, guidance=guidance, optim=Optim(epochs=2, minibatches=1, micro=1))
    train(
        method, rig, optimiser(method, rig), 
        after=lambda numbers: None, interrupted=lambda: True,
    )  # fmt: skip
    expected = {role: 12 * each for role, each in method.cost(rig.model.steps, rig.model.guidance).items()}
    assert dict(rig.meter.roles) == expected and rig.meter.images == rig.meter.reward_calls == 12
    assert expected["rollout"] == 12 * 5 * (2 if guidance else 1)


def test_the_first_gradient_of_gpo_is_finite_at_every_time(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first entry of the noise table to the last, t = 1, where alpha is 0.07 and an error in eps is no more than that."""
    rig, method = make("tiny_unet"), GPO(prompts=2, group=3)
    drawn = method.collect(rig)
    for time in [*rig.model.times(10).tolist(), *rig.model.times(50).tolist(), 1.0, 1e-4]:
        # sigmoid(log(t / (1 - t))) is t, and 1 in float32 from 17 on
        number = math.log(time / (1 - time)) if time < 1 else 30.0
        monkeypatch.setattr(rig, "normal", lambda n, number=number: torch.full((n,), number))
        batch = AdvantageGroups(drawn.x0, drawn.prompt_ids, drawn.reward, drawn.advantage)
        loss = keyed_loss(method, rig, batch)
        gradients = torch.autograd.grad(loss, rig.model.parameters())
        assert bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients), time
        assert max(float(g.abs().max()) for g in gradients) > 0, time


def test_the_error_of_a_noise_model_is_the_error_of_the_noise(make: Any) -> None:
    """Published betas of epsilon models refer to it."""
    rig = make("tiny_unet", push=0.05)
    x0, eps = rig.noise(4), rig.noise(4)
    t, prompt_ids = torch.tensor([1.0, 0.7, 0.3, 0.002]), torch.tensor([0, 1, 2, 3])
    x, _ = mix(rig.path, x0, eps, t)
    with torch.no_grad():
        said = rig.model.network(x, (t * 1000 - 1).round(), rig.model.encode(BOOK[:4])["text"]).sample
    (error,) = rig.errors(x0, prompt_ids, t, eps, "policy")
    assert torch.allclose(error.detach(), (said - eps).square().mean((1, 2, 3)), rtol=2e-3)


def test_a_run_on_a_unet_from_the_command_line(gpobench: Any, tiny_unet: Path, redness: str, tmp_path: Path) -> None:
    task, model = f"{redness}:Paint", str(tiny_unet)
    sets = (
        "prompts=4",
        "group=4",
        "optim.lr=3e-3",
        "optim.minibatches=1",
        "optim.warmup=0",
        "optim.ema=0.5",
        "t_min=0",
    )
    chosen = [word for key in sets for word in ("--set", key)]
    ended = gpobench(
        "run", "--method", "gpo", "--task", task, "--model", model, "--budget", "nfe=1500", "--out", tmp_path, "--json",
        *chosen,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    done = json.loads(ended.out)
    assert done["spent"]["updates"] > 2 and done["spent"]["nfe"] <= 1500 and not done["flags"]["invalid"]
    again = gpobench("eval", "--task", task, "--model", model, "--adapter", f"{done['run_dir']}/adapter", "--json")
    assert again.code == 0, again.err
    told = json.loads(again.out)["scores"]["redness/mean"]["mean"]
    assert told == pytest.approx(done["after"]["redness/mean"]["mean"], abs=1e-4)
    assert told != done["before"]["redness/mean"]["mean"]
    base = gpobench("eval", "--task", task, "--model", model, "--json")
    assert json.loads(base.out)["scores"]["redness/mean"]["mean"] == done["before"]["redness/mean"]["mean"]


# Noisy steps on SD1.5's table


def noisy_walk(kernel: Kernel, steps: int, spacing: Any) -> list[tuple[float, Step]]:
    """(t, step) along DDIM's grid with the exact noise prediction for data of width 1, 16 rows of 64 numbers."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    path = ddpm((1 - betas).cumprod(0))
    grid = ddim_grid(steps, spacing=spacing, offset=1 if spacing == "leading" else 0, alpha_to_one=False)
    generator = torch.Generator().manual_seed(0)
    x, walked = torch.randn(16, 64, generator=generator), []
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        t, s = t.expand(16), s.expand(16)
        eps = x * path(t.double())[1].float()[:, None]
        step = kernel(path, x, to_velocity(path, x, t, eps, "epsilon"), t, s)
        walked.append((float(t[0]), step))
        x = step.draw(torch.randn(16, 64, generator=generator))
    return walked


@pytest.mark.parametrize("kernel", [sde(0.7), cps(0.8), dance(0.3), ddim(1.0)], ids=["sde", "cps", "dance", "ddim"])
@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # trailing begins at t = 1
def test_noisy_steps_stay_finite_on_the_noise_table_of_sd15(kernel: Kernel, steps: int, spacing: str) -> None:
    for t, step in noisy_walk(kernel, steps, spacing):
        to = step.draw(torch.ones_like(step.mean))
        assert bool(step.mean.isfinite().all()) and bool((step.std > 0).all()), t
        assert bool(step.logp(to).isfinite().all()) and bool(step.logp(to, drop=True).isfinite().all()), t

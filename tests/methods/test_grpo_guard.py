"""GRPO-Guard's own: the published loss, centred and of one scale, per transition. The rest is in test_flow_grpo.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.flow import sde
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Prompt, batch_size, select_rows
from gpobench.bench.training.rig import MeteredRig
from gpobench.methods.grpo_guard import GRPOGuard


@pytest.fixture
def rig(tiny_pipe: Path, redness: str) -> Iterator[MeteredRig]:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)
    judge, book = scorer(f"{redness}:Redness"), ["a red circle", "two blue squares", "a photo"]
    made = MeteredRig(model, [Prompt(p) for p in book], judge, Meter(Budget(nfe=1e9)), rows=32)
    yield made
    made.close()


def shove(rig: MeteredRig, push: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in rig.model.parameters():
            p.add_(push * torch.randn(p.shape, generator=generator))


def test_the_loss_is_the_codes_per_transition(rig: MeteredRig) -> None:
    """train_sd3_GRPO_Guard.py in float64 with batches of one, where its batch mean is the transition's own."""
    method = GRPOGuard(prompts=2, group=4, steps=10, clip_range=1e-4)
    batch = method.collect(rig)
    shove(rig, 0.1)
    rig.notes()
    loss = float(method.loss(rig, batch).detach())
    with torch.no_grad():
        v = rig.velocity(batch.x, batch.t, batch.prompt_ids).double()
    each: list[float] = []
    ratios: list[float] = []
    for i in range(batch_size(batch)):
        x, to, t, s = (getattr(batch, name)[i].double() for name in ("x", "to", "t", "s"))
        dt = s - t
        sigma = 0.7 * (t / (1 - (s if t == 1 else t))).sqrt()  # std_dev_t, with the clamp of the first step
        mean = x * (1 + sigma**2 / (2 * t) * dt) + v[i] * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
        old, std = batch.mean[i].double(), sigma * (-dt).sqrt()
        log_ratio = (((to - old) ** 2 - (to - mean) ** 2) / (2 * std**2)).mean()
        bias = ((mean - old) ** 2).mean() / (2 * std**2)
        ratio = ((log_ratio + bias) * std).exp()
        adv = batch.advantage[i].double()
        each.append(float(torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - 1e-4, 1 + 1e-4)) / -dt))
        ratios.append(float(ratio))
    assert loss == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert rig.mean("policy/ratio") == pytest.approx(sum(ratios) / len(ratios), abs=1e-6)
    assert 0 < rig.mean("policy/clipped") < 1
    parts = [float(method.loss(rig, select_rows(batch, torch.tensor([i]))).detach()) for i in range(batch_size(batch))]
    assert sum(parts) / len(parts) == pytest.approx(loss, rel=1e-4)  # no row depends on its company


def test_the_guarded_ratio_is_centred_where_the_plain_one_is_not(rig: MeteredRig) -> None:
    """The point of the paper: log rho is below 0 in the mean and differs in scale from step to step, the guarded one does not."""
    method = GRPOGuard(prompts=3, group=16, steps=10)
    batch = method.collect(rig)
    shove(rig, 0.1)
    with torch.no_grad():
        step = rig.step(sde(0.7), batch.x, batch.t, batch.s, batch.prompt_ids)
        plain = step.logp(batch.to) - batch.logp
        eps = (batch.to - batch.mean) / step.std
        guard = ((step.mean - batch.mean) * eps).flatten(1).mean(1)
    assert float(plain.mean()) < -3 * float(plain.std()) / len(plain) ** 0.5
    assert abs(float(guard.mean())) < 3 * float(guard.std()) / len(guard) ** 0.5
    spread = [
        [float((u[batch.t == t] / dt).std()) for t, dt in zip(grid[:9], -grid.diff(), strict=False)]
        for grid in (rig.model.times(10),)
        for u in (plain, guard)
    ]
    assert max(spread[0][1:]) / min(spread[0][1:]) > 1.5 * max(spread[1][1:]) / min(spread[1][1:])


def test_cost_and_cost_under_guidance() -> None:
    method = GRPOGuard(steps=10)
    assert method.cost(40, 1.0) == {"rollout": 10, "policy": 27}
    assert method.cost(40, 4.5) == {"rollout": 20, "policy": 54}  # 20 forwards, then 18 with their backwards
    assert replace(method, guidance=1.0).cost(40, 4.5) == method.cost(40, 1.0)


@pytest.mark.parametrize(
    "bad",
    [{"group": 1}, {"prompts": 0}, {"clip_range": 0}, {"noise_level": 0}, {"timestep_fraction": 1.0}, {"steps": 1}, {"guidance": -1},
     {"adv_clip_max": -1}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"grpo-guard: {next(iter(bad))} "):
        GRPOGuard(**bad)

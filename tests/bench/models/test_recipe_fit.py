"""Training loop of the embedded parts: averaging, rates, resuming, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpobench.bench.errors import UserError
from gpobench.bench.models.recipe_fit import FitSettings, Interval, Learner, Weights, Workers, cosine_rate, fit


class Line(Learner):
    """A matrix fitted to another one, with a head and a count of its forward passes as a buffer."""

    def __init__(self, shards: int = 1, poison: int = -1) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(4, 3)
        self.module.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.heads = nn.Linear(3, 1)
        parameters = [*self.module.parameters(), *self.heads.parameters()]
        self.optimisers = [torch.optim.AdamW(parameters, lr=0.1)]
        self.shards, self.poison = shards, poison
        self.weights_seen: list[Tensor] = []
        self.rates_seen: list[float] = []

    def loss(self, step: int, shard: int) -> Tensor:
        g = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=g).chunk(self.shards)[shard]
        self.module.get_buffer("passes").add_(1)
        self.rates_seen.append(self.optimisers[0].param_groups[0]["lr"])
        loss = self.module(x).square().mean() + self.heads(self.module(x)).square().mean()
        return loss * (math.nan if step == self.poison else 1.0)

    def constrain(self) -> None:
        self.module.get_parameter("bias").clamp_(min=-0.25, max=0.25)
        self.weights_seen.append(self.module.get_parameter("weight").detach().clone())

    def evaluate(self, weights: Weights, step: int) -> dict[str, float]:
        return {"norm": float(weights["weight"].norm())}


def settings(folder: Path, **given: Any) -> FitSettings:
    every = Interval(steps=2)
    plain = FitSettings(
        label={"recipe": "line"}, made_by={"seed": 0, "sizes": (4, 3)}, checkpoint=folder / "line.state.pt", steps=5,
        samples=8, rate=cosine_rate(2, 5, 1e-6), save=every, report=every, evaluate=every, average=0.6, clip_norm=1.0,
    )  # fmt: skip
    return replace(plain, **given)


def test_the_average_is_the_recursion_in_float64(tmp_path: Path) -> None:
    learner = Line()
    mean = learner.module.get_parameter("weight").detach().double().clone()
    weights, _ = fit(learner, settings(tmp_path), log=lambda line: None)
    for step, seen in enumerate(learner.weights_seen):
        decay = min(0.6, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * seen.double()
    assert np.allclose(weights["weight"], mean, atol=1e-6) and int(weights["passes"]) == 5
    assert float(learner.module.get_parameter("bias").detach().abs().max()) <= 0.25


def test_rates_follow_the_schedule(tmp_path: Path) -> None:
    learner = Line()
    fit(learner, settings(tmp_path), log=lambda line: None)
    want = [0.1 * min(1, (k + 1) / 2) * (1 + math.cos(math.pi * k / 5)) / 2 + 1e-6 for k in range(5)]
    assert learner.rates_seen == pytest.approx(want, rel=1e-12)


def test_without_an_average_the_last_weights_are_returned(tmp_path: Path) -> None:
    learner = Line()
    weights, _ = fit(learner, settings(tmp_path, average=0.0), log=lambda line: None)
    assert torch.equal(weights["weight"], learner.weights_seen[-1])


@pytest.mark.parametrize("stop", [2, 4])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    straight, _ = fit(Line(), settings(tmp_path, checkpoint=tmp_path / "straight.pt"), log=lambda line: None)

    def cut(line: dict[str, Any]) -> None:
        if line.get("step") == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Line(), settings(tmp_path), log=cut)
    lines: list[dict[str, Any]] = []
    resumed, _ = fit(Line(), settings(tmp_path), log=lines.append)
    assert lines[0] == {"recipe": "line", "continues_at": stop}
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    again, _ = fit(Line(), settings(tmp_path), log=lines.append)  # finished: no step is done again
    assert lines[-1] == {"recipe": "line", "continues_at": 5}
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_progress_lines(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    weights, seconds = fit(Line(), settings(tmp_path), log=lines.append)
    assert [(line["step"], line["of"]) for line in lines] == [(2, 5), (4, 5), (5, 5)]
    assert all(line["loss"] > 0 and line["samples_per_second"] > 0 and line["eta"] >= 0 for line in lines)
    assert lines[-1]["norm"] == float(weights["weight"].norm()) and 0 <= lines[-1]["seconds"] <= seconds


def test_shards_of_a_batch_sum_to_its_mean(tmp_path: Path) -> None:
    whole, _ = fit(Line(), settings(tmp_path, checkpoint=tmp_path / "one.pt"), log=lambda line: None)
    workers = Workers(shards=2)
    split, _ = fit(Line(2), settings(tmp_path, checkpoint=tmp_path / "two.pt"), log=lambda line: None, workers=workers)
    assert np.allclose(whole["weight"], split["weight"], atol=1e-5) and int(split["passes"]) == 10


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    fit(Line(), settings(tmp_path), log=lambda line: None)
    with pytest.raises(UserError, match="left by another recipe or seed"):
        fit(Line(), settings(tmp_path, made_by={"seed": 1, "sizes": (4, 3)}), log=lambda line: None)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line: the loss is nan at step 3"):
        fit(Line(poison=3), settings(tmp_path), log=lambda line: None)

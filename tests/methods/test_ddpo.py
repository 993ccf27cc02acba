"""DDPO: its step is DDIM's, its advantages are of a prompt's last rewards, its two estimators agree where they must."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.spec import Optim, batch_size
from gpobench.methods.ddpo import DDPO, running_advantages

ONCE = Optim(minibatches=1)
FEW = DDPO(prompts=2, group=4, steps=4, optim=Optim(minibatches=2))


# The statistics


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), min_size=2, max_size=12), min_size=1, max_size=6),
    st.integers(2, 6),
    st.data(),
)
def test_the_statistics_are_those_of_the_published_tracker(
    batches: list[list[tuple[int, float]]], size: int, data: st.DataObject
) -> None:
    """stat_tracking.py of ddpo-pytorch, written again: a queue of a prompt's last rewards, else the batch's own statistics."""
    min_count = data.draw(st.integers(2, size))
    buffers: dict[str, list[float]] = {}
    queues: dict[int, list[float]] = {}
    for batch in batches:
        prompts = np.array([prompt for prompt, _ in batch])
        rewards = np.array([reward for _, reward in batch], dtype=np.float32).astype(np.float64)
        got, buffers = running_advantages(torch.from_numpy(rewards), prompts.tolist(), buffers, size, min_count)
        for prompt in set(prompts.tolist()):
            rows = prompts == prompt
            queues[prompt] = [*queues.get(prompt, []), *rewards[rows]][-size:]
            known = queues[prompt] if len(queues[prompt]) >= min_count else rewards
            if np.ptp(known) == 0:  # there the code divides by its 1e-6 what has left the queue, or rounding
                assert not got[torch.from_numpy(rows)].any()
                continue
            expected = (rewards[rows] - np.mean(known)) / (np.std(known) + 1e-6)
            np.testing.assert_allclose(got.numpy()[rows], expected, atol=1e-6)


def test_golden_advantages() -> None:
    """Two prompts; the first has filled its buffer of 4, the second takes the mean .55 and deviation .35 of the four new rewards."""
    buffers = {"0": [0.0, 0.0, 1.0]}
    got, updated = running_advantages(
        torch.tensor([1.0, 0.0, 0.8, 0.4], dtype=torch.float64), [0, 0, 1, 1], buffers, 4, 4
    )
    assert got.tolist() == pytest.approx([1.0, -1.0, 0.25 / math.sqrt(0.1475), -0.15 / math.sqrt(0.1475)], abs=1e-5)
    assert updated == {"0": [0.0, 1.0, 1.0, 0.0], "1": [0.8, 0.4]} and buffers == {"0": [0.0, 0.0, 1.0]}


def test_rewards_that_are_no_numbers_enter_nothing_and_equal_ones_teach_nothing() -> None:
    reward = torch.tensor([1.0, math.nan, 0.0, math.inf])
    got, updated = running_advantages(reward, [0, 0, 1, 1], {}, 4, 4)
    assert got.tolist() == pytest.approx([1, 0, -1, 0], abs=1e-5) and updated == {"0": [1.0], "1": [0.0]}
    for equal in (0.1, 1e6, -3.0):
        assert running_advantages(torch.full((7,), equal), [0] * 7, {}, 8, 3)[0].tolist() == [0.0] * 7
    assert running_advantages(torch.full((2,), math.nan), [0, 1], {}, 4, 4)[0].tolist() == [0.0, 0.0]


def test_the_buffer_is_kept_over_iterations(lab: Any) -> None:
    rig = lab.rig()
    lab.fit(FEW, rig, 3)
    kept = rig.state["rewards"]
    assert all(len(rewards) <= 16 for rewards in kept.values()) and sum(map(len, kept.values())) == 3 * 8


# The step and the loss


def test_the_density_is_that_of_ddims_step(lab: Any) -> None:
    """In float64, on the flow path: std = s sqrt(1 - ((1 - t) s / ((1 - s) t))^2), mean = (1 - s) x0 + sqrt(s^2 - std^2) eps."""
    rig = lab.rig(push=0.05)
    batch = FEW.collect(rig.view)
    t, s = (time.double().view(-1, 1, 1, 1) for time in (batch.t, batch.s))
    v = rig.velocity(batch.x, batch.t, batch.prompt_ids).detach().double()
    x0, eps = batch.x.double() - t * v, batch.x.double() + (1 - t) * v
    std = s * (1 - ((1 - t) * s / ((1 - s) * t)) ** 2).sqrt()
    mean = (1 - s) * x0 + (s**2 - std**2).sqrt() * eps
    logp = (-((batch.to - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))
    assert torch.allclose(logp.float(), batch.logp, atol=1e-5)
    assert len(set(batch.t.tolist())) == 3 and float(batch.s.min()) > 0  # every step but the one that ends at the image


def test_both_estimators_have_one_gradient_where_the_policy_is_the_one_that_sampled(lab: Any) -> None:
    """There rho = 1, so grad rho = grad log p and nothing is clipped."""
    rig, is_ = lab.rig(push=0.05), replace(FEW, optim=ONCE)
    batch = is_.collect(rig.view)
    importance = lab.gradient(rig, lab.loss(is_, rig, batch))
    score = lab.gradient(rig, lab.loss(replace(is_, estimator="sf"), rig, batch))
    assert float((importance - score).norm()) < 1e-4 * float(score.norm()) and float(score.norm()) > 1e-6


def test_equal_rewards_leave_no_rows(lab: Any) -> None:
    rig = lab.rig("Constant")
    assert batch_size(FEW.collect(rig.view)) == 0 and rig.meter.images == 8


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_the_static_cost_is_what_the_meter_shows(lab: Any, guidance: float) -> None:
    rig, method = lab.rig(), replace(FEW, guidance=guidance, optim=Optim(epochs=2, minibatches=2, micro=3))
    lab.fit(method, rig, 1)
    assert dict(rig.meter.roles) == {
        role: 8 * each for role, each in method.cost(rig.model.steps, rig.model.guidance).items()
    }
    assert rig.meter.reward_calls == 8


def test_a_last_step_without_noise_is_refused(lab: Any) -> None:
    rig = lab.rig()
    with pytest.raises(UserError, match="ddpo: timestep_fraction must be below 1 on this model"):
        replace(FEW, timestep_fraction=1.0).collect(rig.view)
    assert rig.meter.nfe == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"prompts": 0}, {"group": 0}, {"prompts": 1, "group": 1}, {"buffer_size": 1}, {"min_count": 17}, {"min_count": 1},
        {"adv_clip_max": 0}, {"clip_range": 0}, {"eta": 0}, {"eta": 1.1}, {"timestep_fraction": 0}, {"timestep_fraction": 1.1},
        {"steps": 1}, {"guidance": -1}, {"estimator": "sf"}, {"estimator": "reinforce"}, {"clip_range": math.nan},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"ddpo: {next(iter(bad))} "):
        DDPO(**bad)

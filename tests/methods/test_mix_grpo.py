"""MixGRPO's own: the window's place, the compressed steps, what a group shares. The rest is in test_flow_grpo.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.flow import cps, dpm2, ode, sde, shift, shifted_grid
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Prompt, batch_size
from gpobench.bench.training.rig import MeteredRig
from gpobench.methods.mix_grpo import MixGRPO, compress_grid

SDE = sde(0.7)


@pytest.fixture
def rig(tiny_pipe: Path, redness: str) -> Iterator[MeteredRig]:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)
    judge, book = scorer(f"{redness}:Redness"), ["a red circle", "two blue squares", "a photo"]
    made = MeteredRig(model, [Prompt(p) for p in book], judge, Meter(Budget(nfe=1e9)), rows=3)
    yield made
    made.close()


def start(method: MixGRPO, iteration: int, steps: int) -> int:
    return method.plan(iteration, steps).index(method.kernel)


def test_the_window_slides_to_its_last_place_and_rolls_back() -> None:
    method = MixGRPO(window_size=4)
    starts = [start(method, iteration, 25) for iteration in range(600)]
    assert starts[:26] == [0] * 25 + [1] and starts[299] == 11  # the paper's 300 steps see twelve places
    assert starts[500:525] == [20] * 25  # steps 20 to 23: never the last one
    assert starts[525:] == starts[:75]
    stays = [start(replace(method, roll_back=False), iteration, 25) for iteration in range(600)]
    assert stays[:525] == starts[:525] and stays[525:] == [20] * 75
    for iteration in range(0, 600, 25):
        kernels = method.plan(iteration, 25)
        assert len(kernels) == 25 and kernels.count(SDE) == 4 and kernels.count(ode) == 21
        first = kernels.index(SDE)
        assert kernels[first : first + 4] == [SDE] * 4


@pytest.mark.parametrize(
    "roll_back, starts", [(True, [0, 0, 3, 3, 6, 6, 0, 0, 3]), (False, [0, 0, 3, 3, 6, 6, 7, 7, 7])]
)
def test_stride_and_pace(roll_back: bool, starts: list[int]) -> None:
    method = MixGRPO(window_size=2, window_stride=3, shift_interval=2, roll_back=roll_back)
    assert [start(method, i, 10) for i in range(9)] == starts
    frozen = MixGRPO(window_size=2, window_stride=0, shift_interval=1, roll_back=roll_back)
    assert {start(frozen, i, 10) for i in range(50)} == {0}


def test_the_window_moves_as_the_authors_state_machine_while_theirs_is_whole() -> None:
    """GRPOTrainingStates of fastvideo/utils/grpo_states.py: progressive, overlapping, rolled back after steps - 2."""
    steps, size, stride, pace, cursor, seen = 25, 4, 1, 3, 0, 0
    method = MixGRPO(window_size=size, window_stride=stride, shift_interval=pace)
    theirs: list[int] = []
    for _ in range(2 * pace * (steps - 1)):
        theirs.append(cursor)
        seen += 1
        if seen >= pace:
            cursor, seen = cursor + stride, 0
        if cursor > steps - 2:
            cursor, seen = 0, 0
    whole = [place for place in theirs if place <= steps - 1 - size]  # afterwards theirs shrinks to nothing
    assert [start(method, i, steps) for i in range(len(whole))] == whole and whole.count(0) == 2 * pace


def test_advantages_are_divided_by_the_sample_deviation(rig: MeteredRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """(r - mean) / (std + 1e-8) with torch's own std: a spread of 1e-6 is a full advantage, not a hundredth of one."""
    reward = torch.tensor([[0.0, 1e-6, 3e-6], [0.2, 0.9, 0.4]])
    walk = rig.transitions
    monkeypatch.setattr(rig, "transitions", lambda *args, **kwargs: (walk(*args, **kwargs)[0], reward))
    batch = MixGRPO(prompts=2, group=3, steps=6, window_size=1).collect(rig)
    expected = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-8)
    assert torch.allclose(batch.advantage, expected.flatten()[batch.image], rtol=1e-4) and len(batch.advantage) == 6


def test_the_flash_presets_are_the_scripts() -> None:
    flash, star, plain = (
        resolve(RunRequest(name, "ocr", "flux1-dev")).settings
        for name in ("mix-grpo:flash", "mix-grpo:flash-star", "mix-grpo")
    )
    assert (flash.shift_interval, flash.compress_ratio, flash.window_stride, flash.steps) == (20, 0.4, 1, 25)
    assert (star.shift_interval, star.compress_ratio, star.window_stride, star.steps) == (20, 0.2, 0, 25)
    assert (plain.shift_interval, plain.compress_ratio) == (25, 0)
    assert all(own.roll_back for own in (flash, star, plain))


def test_flash_shortens_what_comes_after_the_window() -> None:
    method = MixGRPO(window_size=4, compress_ratio=0.4)
    lengths = [len(method.plan(25 * i, 25)) for i in range(12)]
    assert lengths[0] == 4 + 8 and round(sum(lengths) / 12) == 16  # the paper's mean number of evaluations
    for i in range(40):
        kernels = method.plan(25 * i, 25)
        first = kernels.index(SDE)
        tail = kernels[first + 4 :]
        assert kernels[:first] == [ode] * first and tail == [dpm2] * len(tail) and len(tail) >= 1
        assert len(tail) == max(1, round(0.4 * (21 - first)))
    assert len(MixGRPO(window_size=4, compress_ratio=1.0).plan(0, 25)) == 25
    star = resolve(RunRequest("mix-grpo:flash-star", "ocr", "sd35m")).settings
    assert {len(star.plan(i, 25)) for i in range(0, 300, 25)} == {8}  # the paper's Flash*


def test_a_coarser_grid_keeps_what_lies_before_it() -> None:
    grid = shifted_grid(25, 3.0)
    assert torch.equal(compress_grid(grid, 4, 21), grid)
    for first, tail in ((4, 8), (14, 4), (24, 1), (0, 5)):
        new = compress_grid(grid, first, tail)
        assert torch.equal(new[: first + 1], grid[: first + 1]) and new[-1] == 0
        assert len(new) == first + tail + 1 and bool((new.diff() < 0).all())
    assert compress_grid(grid, 5, 10)[6] == pytest.approx(float(grid[7]))  # every second step of an even rest


@pytest.mark.parametrize("first,tail", [(4, 8), (10, 6), (14, 4)])
def test_the_tails_grid_is_nearly_the_authors(first: int, tail: int) -> None:
    """shift(linspace(1 - first / T, 0)) in their code, where the schedule is shift(linspace(1, 0)) all along."""
    theirs = shift(torch.linspace(1, 0, 26, dtype=torch.float64), 3.0)
    expected = shift(torch.linspace(1 - first / 25, 0, tail + 1, dtype=torch.float64), 3.0)
    assert torch.allclose(compress_grid(theirs, first, tail)[first:], expected, atol=4e-3)


@pytest.mark.parametrize("tail", [0.0, 0.5])
@pytest.mark.parametrize("kernel", [SDE, cps(0.8)])
def test_only_the_window_is_kept_at_its_place(rig: MeteredRig, tail: float, kernel: Any) -> None:
    name = "sde" if kernel == SDE else "cps"
    method = MixGRPO(
        prompts=2,
        group=3,
        steps=8,
        window_size=2,
        shift_interval=2,
        compress_ratio=tail,
        roll_back=False,
        sde_type=name,
        noise_level=0.7,
    )
    grid = rig.model.times(8)
    for rig.iteration, place in ((0, 0), (1, 0), (2, 1), (7, 3), (99, 5)):
        batch = method.collect(rig)
        assert rig.notes()["rollout/window"] == place == start(method, rig.iteration, 8)
        assert sorted(set(batch.t.tolist()), reverse=True) == grid[place : place + 2].tolist()
        assert sorted(set(batch.s.tolist()), reverse=True) == grid[place + 1 : place + 3].tolist()
        assert batch_size(batch) == 12 and not torch.isclose(batch.to, batch.mean).all()


def test_a_group_shares_its_noise_and_its_way_to_the_window(rig: MeteredRig) -> None:
    method = MixGRPO(prompts=2, group=3, steps=6, window_size=2, shift_interval=1)
    rig.iteration = 2
    batch = method.collect(rig)
    at = batch.t == rig.model.times(6)[2]
    x, group = batch.x[at], batch.image[at] // 3
    for g in (0, 1):
        members = x[group == g]
        assert len(members) == 3 and torch.allclose(members, members[:1].expand_as(members), atol=1e-5)
    assert not torch.allclose(x[group == 0][0], x[group == 1][0], atol=0.1)
    assert not torch.allclose(batch.to[at][0], batch.to[at][1], atol=1e-2)


def test_the_rollout_costs_what_the_first_place_says(rig: MeteredRig) -> None:
    method = MixGRPO(prompts=2, group=3, steps=8, window_size=2, compress_ratio=0.5, shift_interval=1)
    for rig.iteration, rollout in ((0, 2 + 3), (3, 5 + 2), (5, 7 + 1)):
        before = rig.meter.nfe
        method.collect(rig)
        assert rig.meter.nfe - before == 6 * rollout == 6 * len(method.plan(rig.iteration, 8))
    assert method.cost(40, 1.0) == {"rollout": 5, "policy": 6} and method.cost(40, 4.5)["policy"] == 12


@pytest.mark.parametrize(
    "bad",
    [
        {"group": 1}, {"prompts": 0}, {"clip_range": 0}, {"noise_level": 0}, {"noise_level": 1.5, "sde_type": "cps"},
        {"window_size": 0}, {"window_stride": -1}, {"shift_interval": 0}, {"compress_ratio": -0.1},
        {"compress_ratio": 1.5}, {"steps": 1}, {"guidance": -1},
        {"adv_clip_max": 0}, {"compress_ratio": math.nan},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"mix-grpo: {next(iter(bad))} "):
        MixGRPO(**bad)


def test_a_window_as_long_as_the_schedule_is_refused(rig: MeteredRig) -> None:
    method = MixGRPO(window_size=4)  # the protocol of this model has four steps
    for ask in (lambda: method.collect(rig), lambda: method.cost(4, 1.0), lambda: method.plan(0, 3)):
        with pytest.raises(UserError, match="mix-grpo: window"):
            ask()
    assert rig.meter.nfe == 0 and len(replace(method, window_size=3).plan(10_000, 4)) == 4

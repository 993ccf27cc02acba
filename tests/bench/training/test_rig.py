"""The one metered door: what goes through is counted, what is drawn is repeatable, what fails is NaN and never zero."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpobench.bench.budget import Budget, Meter, Spent
from gpobench.bench.errors import UserError
from gpobench.bench.flow import cps, dpm2, ode, sde
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.rendering import IMAGE_FAULT, LATENT_FAULT, RenderedImages
from gpobench.bench.spec import Prompt, Scores, select_rows
from gpobench.bench.training.rig import BATCHES_AHEAD, MeteredRig, stochastic, timed_scores

BOOK = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle"]
Make = Callable[..., MeteredRig]


@pytest.fixture(scope="module")
def model(tiny_pipe: Path) -> Any:
    return open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)


@pytest.fixture
def make(model: Any, redness: str) -> Any:
    made: list[MeteredRig] = []

    def build(seed: int = 0, rows: int = 4, name: str = "Redness", **bounds: float) -> MeteredRig:
        judge = scorer(f"{redness}:{name}")
        rig = MeteredRig(
            model, [Prompt(p) for p in BOOK], judge, Meter(Budget(**bounds or {"nfe": 1e9})), seed=seed, rows=rows
        )
        made.append(rig)
        return rig

    yield build
    for rig in made:
        rig.close()


class Held:
    """A scorer that answers when it is released."""

    id, name, metrics = "held-v1", "held", ("mean",)

    def __init__(self) -> None:
        self.released = threading.Event()

    def __call__(self, images: Any, prompts: Any) -> Scores:
        self.released.wait(300)
        return Scores({"mean": images.mean((1, 2, 3)) / 255})


def test_the_sampler_waits_where_the_scorer_is_four_batches_behind(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held, decoded, decode = Held(), list[int](), type(model).decode
    monkeypatch.setattr(type(model), "decode", lambda self, x: (decoded.append(len(x)), decode(self, x))[1])
    rig = MeteredRig(model, [Prompt(text) for text in BOOK], held, Meter(Budget(nfe=1e9)), rows=1)
    with ThreadPoolExecutor(1) as thread:
        groups = thread.submit(rig.groups, 3, 4)
        while len(decoded) <= BATCHES_AHEAD:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(decoded) == BATCHES_AHEAD + 1 and not groups.done()  # the last one waits for its place
        held.released.set()
        reward = groups.result().reward
    rig.close()
    assert len(decoded) == 12 and bool(reward.isfinite().all()) and rig.meter.scorers["held"]["calls"] == 12


# Randomness


def test_the_same_seed_draws_the_same_numbers(make: Make) -> None:
    def draws(seed: int) -> list[torch.Tensor]:
        rig = make(seed)
        return [rig.prompts(7), rig.noise(3), rig.uniform(5), rig.normal(5), rig.groups(2, 2).x0]

    first, same, other = draws(0), draws(0), draws(1)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[1:], other[1:], strict=True))


def test_nothing_but_the_rigs_own_numbers_is_random(make: Make) -> None:
    torch.manual_seed(0)
    first = make().groups(2, 2)
    torch.manual_seed(1)
    second = make().groups(2, 2)
    assert torch.equal(first.x0, second.x0) and torch.equal(first.reward, second.reward)
    before = torch.get_rng_state()
    make().groups(1, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_draws_have_their_law(make: Make) -> None:
    rig = make()
    u, n, e = rig.uniform(4000, 0.25, 0.5), rig.normal(4000), rig.noise(40)
    assert float(u.min()) >= 0.25 and float(u.max()) < 0.5 and abs(float(u.mean()) - 0.375) < 0.01
    assert abs(float(n.mean())) < 0.06 and abs(float(n.std()) - 1) < 0.05
    assert abs(float(e.mean())) < 0.04 and abs(float(e.std()) - 1) < 0.03
    assert len({round(float(v), 6) for v in n}) > 3900


def test_prompts_do_not_repeat_while_there_are_enough(make: Make) -> None:
    rig = make()
    for n in (1, 3, 5):
        assert len(set(rig.prompts(n).tolist())) == n
    many = rig.prompts(12).tolist()
    assert len(many) == 12 and all(2 <= many.count(i) <= 3 for i in range(5))
    assert any(make(s).prompts(5).tolist() != make(0).prompts(5).tolist() for s in range(1, 4))


class Book(Sequence[Prompt]):
    """A million million prompts, none of which may be read."""

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, i: Any) -> Any:
        raise AssertionError("drawing prompt ids reads no prompt")


def test_drawing_prompts_costs_nothing_for_the_others(make: Make) -> None:
    rig = make()
    rig.train_prompts = Book()
    drawn = torch.stack([rig.prompts(50) for _ in range(20)])
    assert len(drawn.unique()) == 1000 and int(drawn.min()) >= 0 and int(drawn.max()) < 10**12
    # uniform: the mean of 1,000 ids lies within five standard errors, 1 / sqrt(12,000) of the book each
    assert abs(float(drawn.double().mean()) / 10**12 - 0.5) < 5 / 12_000**0.5


@pytest.mark.parametrize("split", [1, 2, 3, 6])
def test_a_row_draws_the_same_in_whatever_part_it_lies(make: Make, split: int) -> None:
    rig = make()
    keys = torch.randint(2**62, (6,), generator=torch.Generator().manual_seed(1))

    def draws(part: torch.Tensor) -> list[torch.Tensor]:
        with rig.keyed(part):
            n = len(part)
            return [rig.normal(n), rig.noise(n), rig.uniform(n), rig.noise(2 * n).unflatten(0, (n, 2))]

    whole = draws(keys)
    parts = [draws(part) for part in keys.split(split)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected)
    assert not torch.equal(whole[1], whole[3][:, 0])  # one draw is not the next one
    assert not torch.equal(whole[3][:, 0], whole[3][:, 1])
    state = rig.rng.get_state()
    draws(keys)
    assert torch.equal(rig.rng.get_state(), state)


def test_a_loss_must_draw_for_each_of_its_rows(make: Make) -> None:
    rig = make()
    with rig.keyed(torch.arange(3)), pytest.raises(ValueError, match="4 draws for 3 rows"):
        rig.noise(4)
    assert rig.noise(4).shape[0] == 4  # outside, the keys are gone even after an error


# Metering


def count_rows(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[int]:
    counted: list[int] = []
    forward = model.network.forward

    def counting(*args: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        counted.append(len(hidden_states) * (3 if torch.is_grad_enabled() else 1))
        return forward(*args, hidden_states=hidden_states, **kwargs)

    monkeypatch.setattr(model.network, "forward", counting)
    return counted


@pytest.mark.parametrize(("cost", "asked"), [(2, 1.0), (1, 3.5)])
def test_one_evaluation_is_unguided_or_what_the_network_was_taught(
    cost: int, asked: float, make: Make, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where guidance is an input of the network, the guidance of training is that of sampling and evaluation."""
    rig, seen = make(), list[float]()
    velocity = type(model).velocity
    monkeypatch.setattr(model, "guidance", 3.5)
    monkeypatch.setattr(model, "guided_cost", cost)

    def watched(self: Any, *args: Any, guidance: float, **more: Any) -> Any:
        seen.append(guidance)
        return velocity(self, *args, guidance=1.0, **more)

    monkeypatch.setattr(type(model), "velocity", watched)
    x, t, prompt_ids = rig.noise(2), torch.full((2,), 0.5), rig.prompts(2)
    rig.velocity(x, t, prompt_ids)
    rig.step(ode, x, t, t / 2, prompt_ids)
    rig.sample(x, prompt_ids, steps=2)
    assert seen == [asked, asked, 3.5, 3.5]


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_every_evaluation_is_charged_to_its_role(
    make: Make, model: Any, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    rig, counted = make(), count_rows(monkeypatch, model)
    x, t, prompt_ids, each = rig.noise(3), torch.full((3,), 0.5), rig.prompts(3), 1 if guidance == 1 else 2
    rig.velocity(x, t, prompt_ids, guidance=guidance)
    assert dict(rig.meter.roles) == {"policy": 9 * each}
    rig.velocity(x, t, prompt_ids, weights="ref", guidance=guidance)
    with torch.no_grad():
        rig.velocity(x, t, prompt_ids, guidance=guidance, role="probe")
    for _ in rig.walk(x, prompt_ids, [ode, sde(0.7)], of=4, guidance=guidance):
        pass
    rig.sample(x, prompt_ids, steps=5, start=2, guidance=guidance)
    assert dict(rig.meter.roles) == {
        "policy": 9 * each, "ref": 3 * each, "probe": 3 * each, "rollout": (2 + 3) * 3 * each
    }  # fmt: skip
    assert rig.meter.nfe == sum(counted)


def test_groups_charge_every_image_and_every_reward_call(make: Make) -> None:
    rig = make(rows=5)
    groups = rig.groups(3, 4, steps=2)
    assert (
        groups.x0.shape == (3, 4, *rig.model.shape)
        and groups.prompt_ids.shape == (3,)
        and groups.reward.shape == (3, 4)
    )
    assert (rig.meter.nfe, rig.meter.images, rig.meter.reward_calls) == (24, 12, 12)
    rewards = rig.score(groups.x0.flatten(0, 1), groups.prompt_ids.repeat_interleave(4))
    assert torch.allclose(rewards.view(3, 4), groups.reward, atol=1e-3)  # the parts met each in its place
    assert rig.meter.images == 24


def test_what_was_refused_was_not_done(make: Make, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, counted = make(nfe=10), count_rows(monkeypatch, model)
    with pytest.raises(Spent):
        rig.groups(1, 3, steps=4)
    assert rig.meter.nfe == sum(counted) == 9 and rig.meter.images == 0
    rig = make(reward_calls=5)
    with pytest.raises(Spent, match="reward_calls"):
        rig.score(rig.noise(6), rig.prompts(5).repeat(2)[:6])
    assert rig.meter.reward_calls == 0


def test_only_the_live_weights_carry_a_gradient(make: Make, model: Any) -> None:
    rig = make()
    model.update_copy("old", 0.0)
    x, t, prompt_ids = rig.noise(2), torch.full((2,), 0.5), rig.prompts(2)
    assert rig.velocity(x, t, prompt_ids).requires_grad
    assert not rig.velocity(x, t, prompt_ids, weights="ref").requires_grad
    assert not rig.velocity(x, t, prompt_ids, weights="old").requires_grad
    assert dict(rig.meter.roles) == {"policy": 6, "ref": 2, "old": 2}


def test_a_walk_is_the_kernels_in_order(make: Make) -> None:
    rig = make()
    x, prompt_ids = rig.noise(2), rig.prompts(2)
    walked = list(rig.walk(x, prompt_ids, [ode, sde(0.7), ode], start=1, of=4))
    times = rig.model.times(4)
    assert [i for i, *_ in walked] == [1, 2, 3]
    assert [float(t[0]) for _, _, t, *_ in walked] == times[1:4].tolist()
    assert [float(s[0]) for *_, s, _, _ in walked] == times[2:].tolist()
    for (*_, to), (_, at, *_) in zip(walked[:-1], walked[1:], strict=True):
        assert torch.equal(to, at)
    assert torch.equal(walked[0][5], walked[0][4].mean) and not torch.equal(walked[1][5], walked[1][4].mean)


# Transitions


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("drop", [False, True])
def test_moves_are_the_transitions_of_what_was_scored(make: Make, rows: int, drop: bool) -> None:
    rig = make(rows=rows)
    kernels = [sde(0.7), ode, cps(0.8), sde(0.5), ode]
    transitions, reward = rig.transitions(2, 3, kernels, drop=drop)
    grid = rig.model.times(5)
    assert reward.shape == (2, 3) and len(transitions.t) == 3 * 6 and not transitions.advantage.any()
    assert rig.meter.roles == {"rollout": 30} and rig.meter.images == rig.meter.reward_calls == 6
    for k, kernel in enumerate(kernels):
        at = transitions.t == grid[k]
        if kernel == ode:
            assert not at.any()
            continue
        part = select_rows(transitions, at)
        assert sorted(part.image.tolist()) == list(range(6)) and torch.equal(part.s, grid[k + 1].expand(6))
        step = rig.step(kernel, part.x, part.t, part.s, part.prompt_ids)
        assert torch.allclose(step.mean, part.mean, atol=1e-5) and not torch.isclose(part.to, part.mean).all()
        assert torch.allclose(step.logp(part.to, drop), part.logp, atol=1e-4)
    for i in range(6):  # each image's steps follow one another, and the last one's end is what was scored
        own = select_rows(transitions, transitions.image == i)
        first, third, fourth = (select_rows(own, own.t == grid[k]) for k in (0, 2, 3))
        prompt_ids = own.prompt_ids[:1]
        assert len(own.prompt_ids.unique()) == 1 and torch.equal(third.to, fourth.x)
        ends = [list(rig.walk(a, prompt_ids, [ode], start=k, of=5))[-1][-1] for a, k in ((first.to, 1), (fourth.to, 4))]
        assert torch.allclose(ends[0], third.x, atol=1e-5)
        assert torch.allclose(rig.score(ends[1], prompt_ids), reward.flatten()[i], atol=5e-3)
        assert int(prompt_ids) == int(transitions.prompt_ids[transitions.image == i - i % 3][0])
    assert int(transitions.prompt_ids.unique().numel()) == 2


@pytest.mark.parametrize(("merge", "precision"), [(True, "fp32"), (False, "fp32"), (True, "bf16")])
@pytest.mark.parametrize("kernel", [sde(0.7), cps(0.8)])
def test_the_ratio_of_a_first_update_is_one(
    tiny_pipe: Path, redness: str, kernel: Any, merge: bool, precision: Any
) -> None:
    """A rollout on merged weights has the log-probabilities of the update, whose LoRA is beside them, up to rounding.

    Also where its other steps, here the last one, are computed in bf16.
    """
    model_spec = replace(find_model_spec(str(tiny_pipe)), merge=merge, sampling_precision=precision)
    model = open_model(model_spec, device="cpu", adapter=Adapter(rank=4), seed=0)
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
    meter = Meter(Budget(nfe=1e9))
    rig = MeteredRig(model, [Prompt(p) for p in BOOK], scorer(f"{redness}:Redness"), meter, rows=4)
    try:
        kept, _ = rig.transitions(2, 3, [kernel] * (model.steps - 1) + [ode])
        assert model.lora.merged == merge and model.samples_in_bf16 == (precision == "bf16")
        step = rig.step(kernel, kept.x, kept.t, kept.s, kept.prompt_ids, guidance=model.guidance)
        ratio = (step.logp(kept.to) - kept.logp).exp()
        # 1e-6 of noise in every product moves a log-probability by about 1e-6 / std, and the smallest std here is near 0.2.
        assert not model.lora.merged and torch.allclose(ratio, torch.ones(()), rtol=0, atol=1e-4)
    finally:
        rig.close()


def test_transitions_keep_the_named_steps_and_none_without_noise(make: Make) -> None:
    rig = make()
    kernels = [sde(0.7)] * 4
    transitions, _ = rig.transitions(1, 2, kernels, keep=range(2))
    assert sorted(set(transitions.t.tolist())) == sorted(rig.model.times(4)[:2].tolist())
    spent = rig.meter.nfe
    wrong: list[tuple[list[Any], Any]] = [
        ([ode] * 3, None), ([sde(0.7), ode], [1]), ([sde(0.7), dpm2], [0, 1]), (kernels, [4]), (kernels, [-1]), (kernels, []),
    ]  # fmt: skip
    for kinds, keep in wrong:
        with pytest.raises(ValueError, match="cannot be kept"):
            rig.transitions(1, 2, kinds, keep=keep)
    assert rig.meter.nfe == spent


def test_a_group_may_share_its_first_noise(make: Make) -> None:
    for shared in (True, False):
        transitions, _ = make().transitions(2, 3, [sde(0.7)] * 2, shared=shared)
        start = select_rows(transitions, transitions.t == 1)
        x = start.x[start.image.argsort()].unflatten(0, (2, 3))
        assert torch.equal(x[:, 0], x[:, 1]) == torch.equal(x[:, 0], x[:, 2]) == shared
        assert not torch.equal(x[0], x[1]) and not torch.equal(start.to[0], start.to[1])


def test_moves_follow_a_grid_of_ones_own(make: Make) -> None:
    rig, times = make(), torch.tensor([1.0, 0.75, 0.3, 0.0])
    transitions, _ = rig.transitions(1, 2, [sde(0.7), sde(0.7), dpm2], times=times)
    assert sorted({*transitions.t.tolist(), *transitions.s.tolist()}) == pytest.approx([0.3, 0.75, 1.0])
    guided, _ = rig.transitions(1, 2, [sde(0.7), ode], guidance=3.0)
    assert rig.meter.roles == {"rollout": 6 + 8} and len(guided.t) == 2


def test_the_two_step_solver_remembers_one_step(make: Make) -> None:
    """A walk of dpm2 begins and ends with the ODE's step and differs from it between; another kernel makes it forget."""
    rig = make()
    x, prompt_ids = rig.noise(2), rig.prompts(2)
    walked = list(rig.walk(x, prompt_ids, [dpm2, dpm2, ode, dpm2, dpm2, dpm2], start=1, of=7))
    same: list[bool] = []
    for _, at, t, s, step, _ in walked:
        same.append(torch.allclose(step.mean, rig.step(ode, at, t, s, prompt_ids, weights="ref").mean, atol=1e-5))
    assert same == [True, False, True, True, False, True]


def test_which_kernels_draw_noise() -> None:
    assert [stochastic(k) for k in (ode, dpm2, sde(0.7), cps(0.8), sde(1e-9))] == [False, False, True, True, True]


def test_what_the_budget_still_affords(make: Make) -> None:
    rig = make(nfe=100, images=7)
    assert rig.affords(nfe=8) == 12 and rig.affords(nfe=8, images=1) == 7 and rig.affords(images=8) == 0
    rig.noise(1)
    rig.velocity(rig.noise(2), torch.ones(2), rig.prompts(2), weights="ref")
    assert rig.affords(nfe=49) == 2 and rig.affords(nfe=50) == 1
    with pytest.raises(UserError, match="updates"):
        rig.affords(updates=1)


# Failing scorers


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Raises", "redness: RuntimeError: the engine is on fire"),
        ("ReturnsNone", "redness: ValueError: returned NoneType, not Scores"),
        ("WrongShape", "redness: ValueError: returned mean of shape (6, 2) for 6 images"),
        ("WrongCount", "redness: ValueError: returned mean of shape (7,) for 6 images"),
        ("WrongMetric", "redness: ValueError: returned no 'mean'"),
    ],
)
def test_a_scorer_that_fails_is_nan_with_a_reason(make: Make, name: str, why: str) -> None:
    rig = make(rows=6, name=name)
    groups = rig.groups(2, 3, steps=1)
    assert bool(groups.reward.isnan().all())
    assert rig.meter.errors == 6 and rig.meter.reward_calls == 6 and set(rig.failures) == {why}


def test_one_image_that_cannot_be_scored_spoils_no_other(make: Make) -> None:
    rig = make(rows=6, name="NotANumber")
    reward = rig.groups(2, 3, steps=1).reward.flatten()
    assert reward.isnan().tolist() == [True, True, False, False, False, False]
    assert rig.meter.errors == 2
    assert rig.failures == ["it is too dark", "redness: returned inf for mean"]
    sound = make(rows=6).groups(2, 3, steps=1).reward.flatten()
    assert torch.equal(reward[2:], sound[2:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_not_scored(make: Make, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Neither a rollout nor a search nor a set of pairs gets a reward for it; it is counted, and no other image changes."""
    rig, images = make(rows=6), make(rows=6).groups(2, 3, steps=1)
    decode = rig.model.decode

    def damaged(x0: torch.Tensor) -> torch.Tensor:
        decoded = decode(x0)
        decoded[4, 0, 0, 0] = value
        return decoded

    monkeypatch.setattr(rig.model, "decode", damaged)
    reward = rig.groups(2, 3, steps=1).reward.flatten()
    assert reward.isnan().tolist() == [False, False, False, False, True, False]
    assert torch.equal(reward[:4], images.reward.flatten()[:4])
    assert rig.meter.errors == 1 and rig.meter.reward_calls == 6 and rig.failures == [f"redness: {IMAGE_FAULT}"]
    reward, _ = rig.score_images(images.x0.flatten(0, 1), torch.arange(6) % 5)
    assert reward.isnan().nonzero().tolist() == [[4]]
    x0 = images.x0.flatten(0, 1).clone()
    x0[1] = value
    assert rig.score(x0, torch.arange(6) % 5).isnan().nonzero().tolist() == [[1], [4]]
    assert f"redness: {LATENT_FAULT}" in rig.failures


def test_a_batch_without_one_finite_image_asks_no_scorer(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make(rows=6, name="Raises")
    monkeypatch.setattr(rig.model, "decode", lambda x0: torch.full((len(x0), 3, 8, 8), float("nan")))
    assert bool(rig.groups(1, 6, steps=1).reward.isnan().all())
    assert set(rig.failures) == {f"redness: {IMAGE_FAULT}"} and rig.meter.errors == 6


def test_only_the_last_failures_are_kept(make: Make) -> None:
    rig = make(rows=4, name="Raises")
    for _ in range(8):
        rig.score(rig.noise(4), rig.prompts(4))
    assert len(rig.failures) == 20 and rig.meter.errors == 32


def test_a_scorer_cannot_rewrite_its_answer(redness: str) -> None:
    """What was checked is a copy: an array that the scorer fills anew later changes nothing."""
    sound = scorer(f"{redness}:Redness")
    kept: list[np.ndarray] = []

    class Sly:
        id, name, metrics = "sly-v1", "sly", ("mean",)

        def __call__(self, images: Any, prompts: Any) -> Any:
            scores = sound(images, prompts)
            kept.append(scores.value["mean"])
            return scores

    images = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    scores, seconds = timed_scores(Sly(), RenderedImages(images), [Prompt("x")] * 3)
    before = scores.value["mean"].copy()
    kept[0][:] = 9
    assert np.array_equal(scores.value["mean"], before) and seconds >= 0


# Notes


def test_notes_are_averaged_and_taken_once(make: Make) -> None:
    rig = make()
    rig.note("a/b", 1.0)
    rig.note("a/b", torch.tensor(2.0))
    rig.note("c", 5.0)
    assert rig.mean("a/b") == 1.5 and np.isnan(rig.mean("nothing"))
    assert rig.notes() == {"a/b": 1.5, "c": 5.0} and rig.notes() == {}


def test_rewards_do_not_depend_on_how_many_images_are_sampled_at_once(make: Make) -> None:
    a, b = make(rows=2).groups(2, 3), make(rows=64).groups(2, 3)
    assert torch.equal(a.prompt_ids, b.prompt_ids) and torch.allclose(a.x0, b.x0, atol=1e-5)
    assert torch.allclose(a.reward, b.reward, atol=2e-3)


def test_a_budget_of_another_kind_binds_as_well(make: Make) -> None:
    rig = make()
    rig.meter = Meter(Budget(images=4))
    rig.groups(2, 2, steps=1)
    with pytest.raises(Spent, match="images"):
        rig.groups(1, 2, steps=1)
    assert rig.meter.images == 4

"""Trees: every image is what a walk of its own would have reached, one velocity serves all children, and what is charged is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpobench.bench.budget import Budget, Meter, Spent
from gpobench.bench.flow import Kernel, ode, rectified, sde
from gpobench.bench.losses import leaf_means
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Branchings, Prompt, assign_branch_advantages, batch_size, select_rows
from gpobench.bench.training.observation import Observer
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.tree_rollout import Sampler, grow, stack
from gpobench.bench.trees import Branches, TreePlan

BOOK = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle"]
SDE, TRUNK = sde(0.7), Branches(ode)
Make = Callable[..., MeteredRig]


def single_branch(steps: int, branch_steps: int, count: int, strides: tuple[int, ...] = (1,)) -> TreePlan:
    closed = Branches(SDE, count, closed=True)
    return TreePlan([*[[closed, TRUNK]] * (branch_steps - 1), [closed]], steps, strides)


def split_tree(steps: int, splits: tuple[int, ...], spread: float = math.inf) -> TreePlan:
    branches = [[Branches(SDE, 2 if k in splits else 1, spread=spread)] for k in range(steps - 1)]
    return TreePlan([*branches, [TRUNK]], steps)


PLANS = [single_branch(4, 3, 3), single_branch(5, 2, 2, (1, 2)), split_tree(4, (0, 2)), split_tree(4, (0, 1), 4.0)]


@pytest.fixture(scope="module")
def model(tiny_pipe: Path) -> Any:
    return open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)


@pytest.fixture
def make(model: Any, redness: str) -> Any:
    made: list[MeteredRig] = []

    def build(seed: int = 0, rows: int = 64, name: str = "Redness", **bounds: float) -> MeteredRig:
        meter = Meter(Budget(**bounds or {"nfe": 1e9}))
        made.append(
            MeteredRig(model, [Prompt(p) for p in BOOK], scorer(f"{redness}:{name}"), meter, seed=seed, rows=rows)
        )
        return made[-1]

    yield build
    for rig in made:
        rig.close()


def rows_of(branchings: Branchings, **values: int) -> Branchings:
    mask = torch.ones(batch_size(branchings), dtype=torch.bool)
    for name, value in values.items():
        mask &= getattr(branchings, name) == value
    return select_rows(branchings, mask)


# Every image is that of a walk


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("plan", PLANS)
def test_a_tree_costs_what_its_plan_says_and_no_more_is_computed(make: Make, plan: TreePlan, rows: int) -> None:
    rig = make(rows=rows)
    observer = Observer(rig.model, [rig.scorer])
    observer.install()
    with observer.training():
        rig.meter.start()
        _, reward = rig.trees(2, plan, seeds=2)
        rig.drain()
        rig.meter.stop()
    observer.close()
    assert observer.observe(rig.meter, rig.meter.budget).differences == []
    assert reward.shape == (4, plan.leaves, len(plan.strides)) and bool(reward.isfinite().all())
    assert rig.meter.roles == {"rollout": 4 * plan.evaluations * rig.model.guided_cost ** (rig.model.guidance != 1)}
    assert rig.meter.images == rig.meter.reward_calls == 4 * plan.images


@pytest.mark.parametrize("strides", [(1,), (1, 2, 3)])
def test_every_closed_branch_ends_where_a_walk_from_it_ends(make: Make, strides: tuple[int, ...]) -> None:
    rig, plan = make(), single_branch(5, 3, 2, strides)
    branchings, reward = rig.trees(2, plan)
    grid = rig.model.times(5)
    assert batch_size(branchings) == 2 * 3 and branchings.to.shape[1] == 2
    for k in range(3):
        for tree in range(2):
            row = rows_of(branchings, step=k, tree=tree)
            assert batch_size(row) == 1 and float(row.t) == grid[k] and float(row.s) == grid[k + 1]
            if k < 2:  # the trunk goes on by the ODE
                trunk = rows_of(branchings, step=k + 1, tree=tree)
                end = rig.step(ode, row.x, row.t, row.s, row.prompt_ids, guidance=rig.model.guidance).mean
                assert torch.allclose(end.detach(), trunk.x, atol=1e-5)
            for child in range(2):
                leaf = int(row.first[0, child])
                assert leaf == tree * plan.leaves + 2 * k + child and int(row.leaves) == 1
                for j, stride in enumerate(strides):
                    times = torch.cat([grid[k + 1 : 5 : stride], grid[5:]])
                    assert len(times) - 1 == math.ceil((5 - k - 1) / stride)
                    *_, last = rig.walk(row.to[:, child], row.prompt_ids, [ode] * (len(times) - 1), times=times)
                    told = rig.score(last[-1], row.prompt_ids)
                    assert torch.allclose(told, reward[tree, leaf - tree * plan.leaves, j], atol=5e-3)


def test_every_node_of_an_open_tree_follows_from_its_parent(make: Make) -> None:
    rig, plan = make(), split_tree(4, (0, 2))
    branchings, reward = rig.trees(1, plan)
    assert [batch_size(rows_of(branchings, step=k)) for k in range(4)] == [1, 2, 2, 0]
    for k in range(2):
        parents, children = rows_of(branchings, step=k), rows_of(branchings, step=k + 1)
        ends = parents.to[parents.first >= 0]
        assert torch.equal(ends, children.x) and torch.equal(parents.first[parents.first >= 0], children.first[:, 0])
    last = rows_of(branchings, step=2)
    assert last.first.flatten().tolist() == [0, 1, 2, 3] and last.leaves.tolist() == [1, 1]
    assert rows_of(branchings, step=0).leaves.tolist() == [2] and rows_of(branchings, step=1).leaves.tolist() == [2, 2]
    x, ids = last.to.flatten(0, 1), last.prompt_ids.repeat_interleave(2)
    *_, end = rig.walk(x, ids, [ode], start=3, of=4)
    assert torch.allclose(rig.score(end[-1], ids), reward[0, :, 0], atol=5e-3)


@pytest.mark.parametrize("plan", PLANS)
def test_the_log_probabilities_are_those_of_the_update(make: Make, plan: TreePlan) -> None:
    """One velocity of a state gives the step of all its children; so does a velocity of each child."""
    rig = make()
    branchings, _ = rig.trees(2, plan)
    k = branchings.to.shape[1]
    at = (branchings.x, branchings.t, branchings.s, branchings.prompt_ids)
    shared = rig.step(SDE, *at, guidance=rig.model.guidance).repeat(k).logp(branchings.to.flatten(0, 1)).view(-1, k)
    at = tuple(value.repeat_interleave(k, 0) for value in at)
    naive = rig.step(SDE, *at, guidance=rig.model.guidance).logp(branchings.to.flatten(0, 1)).view(-1, k)
    assert torch.allclose(shared, branchings.logp, atol=1e-5) and torch.allclose(shared, naive, atol=1e-5)


# Randomness


def test_how_many_rows_are_computed_at_once_changes_no_image(make: Make) -> None:
    for plan in (PLANS[0], PLANS[2]):
        (one, few), (two, many) = (make(rows=rows).trees(1, plan) for rows in (2, 64))
        assert torch.allclose(one.to, two.to, atol=1e-5) and torch.allclose(few, many, atol=5e-3)


@pytest.mark.parametrize("spread", [math.inf, 4.0, 0.5])
def test_siblings_share_as_much_noise_as_their_spread_says(spread: float) -> None:
    """(xi_0 + s xi_b) / sqrt(1 + s^2): unit variance each, correlation 1 / (1 + s^2) of siblings and none of others."""
    generator = torch.Generator().manual_seed(0)
    noise = lambda n: torch.randn(n, 4, 40, 40, generator=generator, dtype=torch.float64)
    sampler = Sampler(rectified, lambda x, t, ids: torch.zeros_like(x), noise)
    plan = TreePlan([[Branches(SDE, 3, closed=True, spread=spread)]], 1)
    grid = torch.tensor([0.5, 0.25])
    found, _ = grow(sampler, noise(8), torch.zeros(8, dtype=torch.long), grid, plan)
    step = SDE(rectified, found.x, torch.zeros_like(found.x), found.t, found.s)
    xi = ((found.to - step.mean[:, None]) / step.std[:, None]).flatten(2)
    n = xi.shape[0] * xi.shape[2]
    expected = 0.0 if math.isinf(spread) else 1 / (1 + spread**2)
    assert float(xi.square().mean()) == pytest.approx(1, abs=6 * math.sqrt(2 / n))
    assert float((xi[:, 0] * xi[:, 1]).mean()) == pytest.approx(expected, abs=6 / math.sqrt(n))
    assert float((xi[:-1, 0] * xi[1:, 0]).mean()) == pytest.approx(0, abs=6 / math.sqrt(n))


# Ends and gaps


def test_a_budget_that_ends_within_a_tree_is_not_passed(make: Make) -> None:
    plan = PLANS[0]
    rig = make(nfe=plan.evaluations - 1)
    with pytest.raises(Spent):
        rig.trees(1, plan)
    assert rig.meter.nfe < plan.evaluations and rig.meter.images == 0
    few = make(images=plan.images - 1)
    with pytest.raises(Spent):
        few.trees(1, plan)
    assert few.meter.images == 0


def test_rewards_of_nodes_are_the_means_of_the_leaves_below_that_have_one() -> None:
    reward = torch.tensor([[0.1, 0.2, torch.nan, 0.4], [torch.nan, torch.nan, 1.0, 1.0]])
    first = torch.tensor([[0, 2], [4, 6], [1, -1]])
    means = leaf_means(reward, first, torch.tensor([2, 2, 1]))
    assert torch.allclose(means, torch.tensor([[0.15, 0.4], [torch.nan, 1.0], [0.2, torch.nan]]), equal_nan=True)
    equal = torch.full((3, 12), 0.1)
    equal[0, 0] = torch.nan  # means of 3 and of 4 equal numbers are equal
    assert len(leaf_means(equal, torch.arange(0, 36, 4)[:, None], torch.full((9,), 4)).unique()) == 1


def test_children_without_an_advantage_have_no_weight_and_a_mean_of_rows_is_the_mean_of_the_others(make: Make) -> None:
    branchings, _ = make().trees(2, PLANS[2])
    n, k = branchings.first.shape
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    advantage = values.clone()
    advantage[0], advantage[1, 0] = 0, 0
    given = assign_branch_advantages(branchings, advantage)
    there = (branchings.first >= 0) & (advantage != 0)
    assert batch_size(given) == int(there.any(1).sum()) < n
    assert float((given.weight * given.advantage).sum(1).mean()) == pytest.approx(
        float(advantage[there].mean()), rel=1e-5
    )
    assert bool(((given.weight > 0) == (given.advantage != 0)).all())
    assert batch_size(assign_branch_advantages(branchings, torch.zeros(n, k))) == 0


def test_a_missing_child_is_marked_and_repeats_the_first() -> None:
    one = lambda k: Branchings(
        *(torch.randn(2, 3) for _ in range(1)), torch.ones(2), torch.zeros(2), torch.randn(2, k, 3), torch.randn(2, k),
        torch.zeros(2, k), torch.zeros(2, k), *(torch.zeros(2, dtype=torch.long) for _ in range(3)),
        torch.arange(2 * k).view(2, k), torch.ones(2, dtype=torch.long),
    )  # fmt: skip
    narrow, wide = one(1), one(3)
    both = stack([narrow, wide])
    assert both.first[:2].tolist() == [[0, -1, -1], [1, -1, -1]] and torch.equal(both.first[2:], wide.first)
    assert torch.equal(both.to[:2], narrow.to.expand(2, 3, 3)) and torch.equal(both.logp[:2, 2], narrow.logp[:, 0])


def test_a_leaf_of_an_unsound_image_is_nan_and_its_siblings_are_not(make: Make, monkeypatch: Any) -> None:
    rig, plan = make(), PLANS[0]
    decode = rig.model.decode

    def damaged(x0: Tensor) -> Tensor:
        images = decode(x0)
        images[1] = torch.nan
        return images

    monkeypatch.setattr(rig.model, "decode", damaged)
    branchings, reward = rig.trees(1, plan)
    assert reward.flatten().isnan().nonzero().flatten().tolist() == [1]
    assert bool(branchings.to.isfinite().all()) and rig.meter.scorers[rig.scorer.name]["errors"] == 1


def test_two_rollouts_of_one_seed_are_equal_and_of_two_are_not(make: Make) -> None:
    (one, a), (same, b), (other, _) = (make(seed=seed).trees(1, PLANS[3]) for seed in (0, 0, 1))
    assert torch.equal(one.to, same.to) and torch.equal(a, b) and not torch.equal(one.to, other.to)


def test_guidance_counts_twice_and_reaches_every_node(make: Make) -> None:
    rig, plain = make(), make()
    guided, _ = rig.trees(1, PLANS[1], guidance=3.0)
    unguided, _ = plain.trees(1, PLANS[1], guidance=1.0)
    assert rig.meter.nfe == 2 * plain.meter.nfe == 2 * PLANS[1].evaluations
    assert not torch.equal(guided.x, unguided.x) and torch.equal(guided.x[:1], unguided.x[:1])


def test_a_kernel_is_the_only_difference_between_two_plans(make: Make) -> None:
    def first(kernel: Kernel) -> Branchings:
        plan = replace(PLANS[0], branches=[[Branches(kernel, 3, closed=True)]])
        return make().trees(1, plan)[0]

    low, high = first(sde(0.1)), first(sde(0.9))
    assert torch.equal(low.x, high.x) and low.to.std(1).mean() < high.to.std(1).mean()

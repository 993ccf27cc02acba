"""Tree plans: images, states and evaluations by formula are those of trees that are walked node by node, and the published ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpobench.bench.flow import dance, dpm2, ode, sde
from gpobench.bench.trees import Branches, TreePlan

SDE, TRUNK = sde(0.7), Branches(ode)


def single_branch(steps: int, branch_steps: int, count: int, strides: tuple[int, ...] = (1,)) -> TreePlan:
    """TempFlow-GRPO's and G2RPO's: closed children at each of the first steps, along a trunk of ODE steps."""
    closed = Branches(SDE, count, closed=True)
    return TreePlan([*[[closed, TRUNK]] * (branch_steps - 1), [closed]], steps, strides)


def split_tree(steps: int, splits: tuple[int, ...], factor: int = 2, last: Any = None) -> TreePlan:
    """BranchGRPO's: open children by the SDE, several of them where the tree splits."""
    branches = [[Branches(dance(0.3), factor if k in splits else 1)] for k in range(steps)]
    return TreePlan([*branches[:-1], [last]] if last else branches, steps)


def walked(plan: TreePlan) -> tuple[int, int, int]:
    """Images, evaluations and states with a transition of one tree, counted node by node."""
    images = evaluations = states = 0

    def complete(at: int, strides: tuple[int, ...]) -> None:
        nonlocal images, evaluations
        if at >= plan.steps:
            images += len(strides)
            return
        evaluations += 1
        for stride in strides:
            complete(min(at + stride, plan.steps), (stride,))

    def go(k: int) -> None:
        nonlocal evaluations, states
        if k == plan.steps:
            complete(k, tuple(plan.strides))
            return
        evaluations += 1
        states += any(b.kernel != ode for b in plan.branches[k])
        for branches in plan.branches[k]:
            for _ in range(branches.count):
                complete(k + 1, tuple(plan.strides)) if branches.closed else go(k + 1)

    go(0)
    return images, evaluations, states


@st.composite
def plans(draw: st.DrawFn) -> TreePlan:
    steps = draw(st.integers(2, 6))
    length = draw(st.integers(1, steps))
    strides = draw(st.sampled_from([(1,), (1, 2), (2, 3), (1, 2, 3)]))
    closed = st.builds(Branches, st.just(SDE), st.integers(1, 3), st.just(True))
    opened = st.builds(Branches, st.just(SDE), st.integers(1, 2))
    branches: list[list[Branches]] = []
    for k in range(length):
        goes_on = [[], [TRUNK]] if k < length - 1 or length == steps else [[]]
        stochastic = [draw(closed)] if k == length - 1 and length < steps else [draw(st.one_of(closed, opened))]
        chosen = stochastic + (draw(st.sampled_from(goes_on)) if stochastic[0].closed else [])
        if k < length - 1 and all(b.closed for b in chosen):
            chosen = [*chosen, TRUNK]
        branches.append(chosen)
    return TreePlan(branches, steps, strides)


@settings(max_examples=200, deadline=None)
@given(plans())
def test_the_formulas_count_what_a_walk_counts(plan: TreePlan) -> None:
    assert (plan.images, plan.evaluations, plan.states(plan.stochastic_steps)) == walked(plan)


@pytest.mark.parametrize("steps, branches, seeds", [(10, 6, 1), (10, 6, 4), (4, 3, 2)])
def test_tempflows_trees_cost_what_is_published(steps: int, branches: int, seeds: int) -> None:
    """54 images a seed, 9 F for the trunk and 270 F for the branches, one velocity for the six losses of a state."""
    plan = single_branch(steps, steps - 1, branches)
    assert plan.images == branches * (steps - 1)
    assert plan.evaluations == (steps - 1) + branches * sum(range(1, steps))
    assert plan.states(plan.stochastic_steps) == steps - 1
    if steps == 10:
        assert plan.images == 54 and plan.evaluations == 9 + 270
        assert plan.evaluations / plan.images == pytest.approx(5.17, abs=0.005)


@pytest.mark.parametrize("strides, completions", [((1,), 1104), ((1, 2), 1680), ((1, 2, 3), 2076)])
def test_g2rpos_completions_are_the_published_ones_up_to_what_they_share(
    strides: tuple[int, ...], completions: int
) -> None:
    """12 sum_k sum_lambda ceil((15 - k) / lambda); of several grids the first evaluation of a branch is one."""
    assert 12 * sum(math.ceil((15 - k) / stride) for k in range(8) for stride in strides) == completions
    plan = single_branch(16, 8, 12, strides)
    assert plan.images == 96 * len(strides)
    shared = 96 * (len(strides) - 1)
    assert (
        plan.evaluations == 8 + completions - shared
    )  # the authors' trunk walks 8 steps more, which nothing branches from
    assert plan.states(plan.stochastic_steps) == 8


def test_a_completion_of_every_third_time_takes_a_third_of_the_evaluations() -> None:
    assert single_branch(16, 8, 12, (3,)).completion(1) == 5


def test_branchgrpos_tree_has_the_published_nodes() -> None:
    """13.68 evaluations a leaf in its Table 1 are the nodes, the root among them, over 16 leaves; states that split share one."""
    plan = split_tree(20, (0, 3, 6, 9))
    nodes = sum(plan.open_nodes(k) for k in range(21))
    assert plan.leaves == 16 and nodes == 219 and nodes / 16 == pytest.approx(13.68, abs=0.01)
    assert plan.evaluations == 203 and plan.states(plan.stochastic_steps) == 203
    without_last = split_tree(20, (0, 3, 6, 9), last=TRUNK)
    assert without_last.evaluations == 203 and without_last.states(without_last.stochastic_steps) == 187


@pytest.mark.parametrize(
    "make",
    [
        lambda: TreePlan([], 3),
        lambda: TreePlan([[Branches(SDE)]] * 4, 3),
        lambda: TreePlan([[]], 1),
        lambda: TreePlan([[Branches(SDE)]], 3),  # open nodes that lead nowhere
        lambda: TreePlan([[TRUNK]] * 3, 3),  # nothing has a log-probability
        lambda: TreePlan([[Branches(SDE), Branches(sde(0.1))]] * 3, 3),
        lambda: TreePlan([[Branches(SDE, closed=True)]], 3, ()),
        lambda: TreePlan([[Branches(SDE, closed=True)]], 3, (1, 1)),
        lambda: TreePlan([[Branches(SDE, closed=True)]], 3, (0,)),
        lambda: Branches(ode, 2),
        lambda: Branches(dpm2),
        lambda: Branches(SDE, 0),
        lambda: Branches(SDE, 2, spread=math.nan),
    ],
)
def test_plans_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(ValueError):
        make()

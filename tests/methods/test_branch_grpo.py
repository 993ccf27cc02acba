"""BranchGRPO's own: rewards of nodes, advantages of a depth, the tree. The rest is in test_branching.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.flow import dance, ode, sde
from gpobench.methods.branch_grpo import BranchGRPO


def test_the_tree_is_the_scripts() -> None:
    plan = BranchGRPO().plan(20)
    assert plan.leaves == plan.images == 16 and [len(step) for step in plan.branches] == [1] * 20
    assert [step[0].count for step in plan.branches] == [2 if k in (0, 3, 6, 9) else 1 for k in range(20)]
    assert all(step[0].kernel == dance(0.3) for step in plan.branches[:-1]) and plan.branches[-1][0].kernel == ode
    assert {step[0].spread for step in plan.branches if step[0].count == 2} == {4.0}
    assert BranchGRPO(sde_type="sde", noise_level=0.7).plan(20).branches[0][0].kernel == sde(0.7)


def test_the_cost_of_a_leaf_is_that_of_the_states() -> None:
    """The paper's 13.68 are 219 nodes over 16 leaves; 203 of them are states that a velocity is computed at, 187 are trained."""
    cost = BranchGRPO().cost(20, 1.0)
    assert cost["rollout"] == pytest.approx(203 / 16) and cost["policy"] == pytest.approx(3 * 187 / 16)
    late = BranchGRPO(split_steps=(3, 6)).cost(20, 1.0)  # three steps before the first split have no siblings
    assert late["policy"] == pytest.approx(3 * (1 + 3 * 2 + 12 * 4) / 4)


def reference(batch: Any, reward: torch.Tensor) -> torch.Tensor:
    """compute_node_rewards_from_leaves and compute_hierarchical_advantages_by_depth of the code, tree by tree, depth by depth."""
    leaves, found = reward.shape[1], torch.zeros(batch.first.shape, dtype=torch.float64)
    for tree in range(len(reward)):
        for step in batch.step.unique().tolist():
            rows = ((batch.tree == tree) & (batch.step == step)).nonzero().flatten().tolist()
            edges = [
                (row, child) for row in rows for child in range(batch.first.shape[1]) if batch.first[row, child] >= 0
            ]
            means = [
                float(
                    reward[tree, int(batch.first[row, child]) - tree * leaves :][: int(batch.leaves[row])]
                    .double()
                    .mean()
                )
                for row, child in edges
            ]
            values = torch.tensor(means, dtype=torch.float64)
            if len(means) > 1 and float(values.std()) >= 1e-6:
                for (row, child), advantage in zip(
                    edges, (values - values.mean()) / (values.std() + 1e-8), strict=True
                ):
                    found[row, child] = advantage
    return found


@pytest.mark.parametrize("rows", [64, 4])
def test_advantages_are_the_codes_depth_by_depth(lab: Any, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    rig, method = lab.rig(), BranchGRPO(prompts=3, split_steps=(0, 1, 2))
    rig.rows = rows
    plan = method.plan(rig.model.steps)
    reward = torch.rand(3, plan.leaves, 1, generator=torch.Generator().manual_seed(0))
    whole, _ = lab.rig().trees(3, plan)
    grow = rig.trees
    monkeypatch.setattr(rig, "trees", lambda *args, **more: (grow(*args, **more)[0], reward))
    batch = method.collect(rig)
    assert len(batch.t) == len(whole.t) == 3 * (1 + 2 + 4)
    assert torch.allclose(batch.advantage.double(), reference(batch, reward[:, :, 0]), atol=1e-4)


def test_rewards_that_differ_by_rounding_teach_nothing(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a deviation of 1e-6 a depth counts as equal: with an eps of 1e-8 rounding would be a full advantage."""
    rig, method = lab.rig(), BranchGRPO(prompts=2, split_steps=(0, 2))
    reward = 0.5 + 1e-7 * torch.rand(2, 4, 1, generator=torch.Generator().manual_seed(0))
    grow = rig.trees
    monkeypatch.setattr(rig, "trees", lambda *args, **more: (grow(*args, **more)[0], reward))
    assert len(method.collect(rig).t) == 0


def test_steps_before_the_first_split_teach_nothing(lab: Any) -> None:
    rig, method = lab.rig(), BranchGRPO(prompts=2, split_steps=(1,))
    batch = method.collect(rig)
    assert sorted(set(batch.step.tolist())) == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompts": 0}, {"split_steps": ()}, {"split_steps": (3, 1)}, {"split_steps": (-1, 2)}, {"split_steps": (1, 1)},
        {"split_factor": 1}, {"split_noise_scale": 0}, {"adv_clip_max": 0}, {"clip_range": 0}, {"noise_level": math.nan}, {"steps": 1},
        {"guidance": -1},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"branch-grpo: {next(iter(bad))} "):
        BranchGRPO(**bad)


def test_a_split_that_leaves_no_trained_step_is_refused() -> None:
    with pytest.raises(UserError, match="branch-grpo: split_steps must end before step 9"):
        BranchGRPO().cost(10, 1.0)

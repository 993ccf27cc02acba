"""The methods that branch: tempflow-grpo, g2rpo and branch-grpo. What they share; each has a file of its own beside this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gpobench.bench.losses import clipped_surrogate
from gpobench.bench.spec import Branchings, Optim, batch_size, select_rows
from gpobench.bench.training.rig import MeteredRig
from gpobench.methods.branch_grpo import BranchGRPO
from gpobench.methods.g2rpo import G2RPO
from gpobench.methods.tempflow_grpo import TempFlowGRPO

OPTIM = Optim(lr=1e-3, minibatches=1)
METHODS: dict[str, Any] = {
    "tempflow-grpo": TempFlowGRPO(prompts=2, seeds=2, branches=3, clip_range=1.0, optim=OPTIM),
    "g2rpo": G2RPO(prompts=2, branches=3, strides=(1, 2), clip_range=1.0, optim=OPTIM),
    "branch-grpo": BranchGRPO(
        prompts=2, split_steps=(0, 2), clip_range=1.0, sde_type="sde", noise_level=0.7, optim=OPTIM
    ),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
Change = Callable[[Branchings, Tensor], tuple[Branchings, Tensor]]


def changed(rig: MeteredRig, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """From now on the rig's trees are these, changed."""
    grow = rig.trees
    monkeypatch.setattr(rig, "trees", lambda *args, **more: change(*grow(*args, **more)))


def naive_loss(method: Any, rig: MeteredRig, batch: Branchings) -> Tensor:
    """The mean over the children that teach, each with a velocity of its own."""
    row, child = (batch.advantage != 0).nonzero(as_tuple=True)
    at = (batch.x[row], batch.t[row], batch.s[row], batch.prompt_ids[row])
    kernel = method.plan(rig.model.steps).branches[0][0].kernel
    step = rig.step(kernel, *at, guidance=rig.model.guidance)
    ratio = (step.logp(batch.to[row, child]) - batch.logp[row, child]).exp()
    each = clipped_surrogate(ratio, batch.advantage[row, child], method.clip_range)
    if not isinstance(method, TempFlowGRPO):
        return each.mean()
    times = rig.model.times(rig.model.steps)
    zero = torch.zeros(1, 1)
    widths = torch.stack(
        [kernel(rig.path, zero, zero, t, s).std[0, 0] for t, s in zip(times[:-2], times[1:-1], strict=True)]
    )
    kl = step.kl(rig.step(kernel, *at, weights="ref", guidance=rig.model.guidance))
    return (widths[batch.step[row]] / widths.mean() * each + method.kl * kl).mean()


@every_method
@pytest.mark.parametrize("clip_range", [1.0, 1e-3])
def test_the_shared_velocity_gives_the_update_of_one_velocity_for_each_branch(
    lab: Any, method: Any, clip_range: float
) -> None:
    rig = lab.rig(push=0.02)
    method = replace(method, clip_range=clip_range, **({"kl": 0.5} if hasattr(method, "kl") else {}))
    batch = method.collect(rig)
    lab.push(rig, 0.005, seed=2)
    shared, naive = lab.loss(method, rig, batch), naive_loss(method, rig, batch)
    assert float(shared.detach()) == pytest.approx(float(naive.detach()), rel=1e-6, abs=1e-6)
    one, two = lab.gradient(rig, shared), lab.gradient(rig, naive)
    assert float(two.norm()) > 1e-4 and float((one - two).norm()) < 2e-6 * float(two.norm())


@every_method
def test_the_ratio_is_one_and_nothing_is_clipped_before_the_first_update(lab: Any, method: Any) -> None:
    rig = lab.rig(push=0.02)
    method = replace(method, clip_range=1e-4)
    lab.loss(method, rig, method.collect(rig))
    assert rig.mean("policy/ratio") == pytest.approx(1, abs=1e-5) and rig.mean("policy/clipped") == 0


@every_method
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_meter_shows_the_static_cost_and_the_rewards_of_the_formula(lab: Any, method: Any, guidance: float) -> None:
    rig, method = lab.rig(), replace(method, guidance=guidance)
    lab.fit(method, rig, 1)
    plan = method.plan(rig.model.steps)
    trees = method.prompts * getattr(method, "seeds", 1)
    assert rig.meter.images == rig.meter.reward_calls == trees * plan.images
    cost = method.cost(rig.model.steps, rig.model.guidance)
    assert set(cost) == set(rig.meter.roles)
    assert rig.meter.roles["rollout"] == pytest.approx(rig.meter.images * cost["rollout"])
    for role in set(cost) - {"rollout"}:
        assert rig.meter.roles[role] <= rig.meter.images * cost[role] + 1e-6


# Gaps


@every_method
def test_equal_rewards_make_no_row_and_no_update(lab: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = lab.rig()
    changed(rig, monkeypatch, lambda batch, reward: (batch, torch.full_like(reward, 0.1)))
    before = [p.detach().clone() for p in rig.model.parameters()]
    numbers = lab.fit(method, rig, 3)
    assert [n["batch/rows"] for n in numbers] == [0, 0, 0] and rig.iterations_without_signal == 3
    assert all(n["branches/informative"] == 0 for n in numbers) and rig.meter.updates == 0
    assert all(torch.equal(p, q) for p, q in zip(rig.model.parameters(), before, strict=True))


@every_method
def test_an_iteration_without_any_score_makes_no_row(lab: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = lab.rig()
    changed(rig, monkeypatch, lambda batch, reward: (batch, torch.full_like(reward, torch.nan)))
    assert batch_size(method.collect(rig)) == 0


@every_method
def test_one_scored_leaf_of_a_tree_makes_no_row(lab: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_the_first(batch: Branchings, reward: Tensor) -> tuple[Branchings, Tensor]:
        alone = torch.full_like(reward, torch.nan)
        alone[:, 0, 0] = reward[:, 0, 0]
        return batch, alone

    rig = lab.rig()
    changed(rig, monkeypatch, only_the_first)
    assert batch_size(method.collect(rig)) == 0


@every_method
@pytest.mark.parametrize("leaf", [0, 2])
def test_a_branch_without_a_score_leaves_no_trace(
    lab: Any, method: Any, leaf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what it drew nor its log-probability changes the update; its siblings still teach."""
    updates: list[tuple[Tensor, Tensor, int]] = []
    for garbage in (0.0, 3.0):

        def unscored(batch: Branchings, reward: Tensor, garbage: float = garbage) -> tuple[Branchings, Tensor]:
            reward[0, leaf] = torch.nan
            own = (batch.first == leaf) & (batch.leaves == 1)[:, None]
            to, logp = batch.to.clone(), batch.logp.clone()
            to[own] += garbage
            logp[own] += garbage
            return replace(batch, to=to, logp=logp), reward

        rig = lab.rig(push=0.02)
        with monkeypatch.context() as patch:
            changed(rig, patch, unscored)
            batch = method.collect(rig)
        here = (batch.first == leaf) & (batch.leaves == 1)[:, None]
        assert not batch.weight[here].any() and not batch.advantage[here].any()
        lab.push(rig, 0.005, seed=2)
        loss = lab.loss(method, rig, batch)
        updates.append((loss.detach(), lab.gradient(rig, loss), batch_size(batch)))
    (loss, gradient, rows), (other_loss, other_gradient, other_rows) = updates
    assert rows == other_rows > 0 and torch.equal(loss, other_loss) and torch.equal(gradient, other_gradient)


@every_method
def test_a_state_whose_image_is_not_finite_is_left_out_with_all_its_children(
    lab: Any, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A velocity that is NaN spoils every image below it: the scorer refuses them, and their rows are dropped."""

    def spoilt(batch: Branchings, reward: Tensor) -> tuple[Branchings, Tensor]:
        hit = (batch.tree == 0).nonzero().flatten()
        x, to, logp = batch.x.clone(), batch.to.clone(), batch.logp.clone()
        x[hit], to[hit], logp[hit], reward[0] = torch.nan, torch.nan, torch.nan, torch.nan
        return replace(batch, x=x, to=to, logp=logp), reward

    rig = lab.rig(push=0.02)
    changed(rig, monkeypatch, spoilt)
    batch = method.collect(rig)
    assert batch_size(batch) > 0 and not bool((batch.tree == 0).any())
    loss = lab.loss(method, rig, batch)
    assert bool(loss.isfinite()) and bool(lab.gradient(rig, loss).isfinite().all())


# Rows


@every_method
def test_affine_rewards_change_no_advantage(lab: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[Branchings] = []
    for scale, offset in ((1.0, 0.0), (16.0, -3.0)):
        rig = lab.rig()
        with monkeypatch.context() as patch:
            spread = lambda batch, reward, scale=scale, offset=offset: (
                batch, scale * torch.arange(reward.numel()).remainder(7).view_as(reward).float() + offset,
            )  # fmt: skip
            changed(rig, patch, spread)
            batches.append(method.collect(rig))
    assert torch.allclose(batches[0].advantage, batches[1].advantage, rtol=1e-3)


@every_method
def test_the_loss_of_a_batch_is_the_mean_of_its_rows(lab: Any, method: Any) -> None:
    rig = lab.rig(push=0.02)
    batch = method.collect(rig)
    lab.push(rig, 0.005, seed=2)
    n = batch_size(batch)
    rows = [lab.loss(method, rig, select_rows(batch, torch.tensor([i]))) for i in range(n)]
    mean = torch.stack(rows).mean().detach()
    assert float(lab.loss(method, rig, batch).detach()) == pytest.approx(float(mean), rel=1e-4, abs=1e-6)


@every_method
def test_trees_that_do_not_fit_one_batch_of_the_network_get_the_same_advantages(lab: Any, method: Any) -> None:
    batches: list[Branchings] = []
    for rows in (64, 4):
        rig = lab.rig()
        rig.rows = rows
        batch = method.collect(rig)
        batches.append(select_rows(batch, (batch.step * 1000 + batch.first[:, 0]).argsort()))
    one, two = batches
    assert torch.equal(one.first, two.first) and torch.equal(one.step, two.step)

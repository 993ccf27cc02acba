"""Grows trees of images after a plan: the nodes of all trees are walked step by step, one velocity for each state.

The plan, and what a tree costs, is in `trees.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..flow import Path, Step, ode, stochastic
from ..spec import Branchings
from ..trees import Branches, TreePlan


class Sampler(NamedTuple):
    """What the nodes of a tree are walked with."""

    path: Path  # between image and noise
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, C, h, w), t (B,), prompt_ids (B,) -> (B, C, h, w)
    noise: Callable[[int], Tensor]  # n -> (n, C, h, w) standard normal


@dataclass(frozen=True)
class Nodes:
    """n nodes at one time: their latents, and where they belong."""

    x: Tensor  # (n, C, h, w)
    prompt_ids: Tensor  # (n,)
    tree: Tensor  # (n,)
    leaf: Tensor  # (n,) the first leaf below, within the tree

    def children(self, x: Tensor, leaf: Tensor) -> Nodes:
        """Children (n, K) of these nodes, each node's in a row: latents x (n K, C, h, w), first leaves (n, K)."""
        count = leaf.shape[1]
        return Nodes(x, self.prompt_ids.repeat_interleave(count), self.tree.repeat_interleave(count), leaf.flatten())


def _together(nodes: Sequence[Nodes]) -> Nodes:
    return Nodes(*(torch.cat([getattr(n, f.name) for n in nodes]) for f in fields(Nodes)))


@dataclass(frozen=True)
class _Completion:
    """Closed nodes that wait at a time of the grid, and the strides with which they go on from there."""

    nodes: Nodes
    strides: Sequence[int]


def grow(
    sampler: Sampler, noise: Tensor, prompt_ids: Tensor, grid: Tensor, plan: TreePlan
) -> tuple[Branchings, Tensor]:
    """Grow a tree from each initial noise; (branchings, clean latents (R, L, S, C, h, w)).

    Args:
        sampler: path, velocity and noise.
        noise: initial noises (R, C, h, w), of one tree each.
        prompt_ids: (R,).
        grid: (steps + 1,), falling.
        plan: what branches where.
    """
    x0 = noise.new_zeros(len(noise), plan.leaves, len(plan.strides), *noise.shape[1:])
    trees = torch.arange(len(noise))
    open_nodes: Nodes | None = Nodes(noise, prompt_ids, trees, torch.zeros_like(trees))
    waiting: dict[int, list[_Completion]] = defaultdict(list)
    found: list[Branchings] = []

    def arrive(nodes: Nodes, at: int, strides: Sequence[int]) -> None:
        """Closed nodes go on from grid[at], or end there as the images of these strides."""
        if at < plan.steps:
            waiting[at].append(_Completion(nodes, strides))
        for stride in strides if at == plan.steps else ():
            x0[nodes.tree, nodes.leaf, list(plan.strides).index(stride)] = nodes.x

    for i in range(plan.steps):
        # Closed nodes first, so that in a batch of the network an image's own node stands before the trunk that all share.
        completions = waiting.pop(i, [])
        groups = [c.nodes for c in completions] + ([open_nodes] if open_nodes is not None else [])
        if not groups:
            continue
        nodes = _together(groups)
        velocities = sampler.velocity(nodes.x, grid[i].expand(len(nodes.x)), nodes.prompt_ids)
        parts = velocities.split([len(group.x) for group in groups])
        for completion, v in zip(completions, parts, strict=False):
            for stride in completion.strides:
                j = min(i + stride, plan.steps)
                step = _step(sampler.path, completion.nodes, v, grid[i], grid[j])
                arrive(replace(completion.nodes, x=step.mean), j, (stride,))
        if open_nodes is not None:
            children, branchings = _branch(sampler, open_nodes, parts[-1], (i, grid[i], grid[i + 1]), plan)
            found += branchings
            open_nodes = None
            for branches, nodes in zip(plan.branches[i], children, strict=True):
                if branches.closed or i + 1 == plan.steps:
                    arrive(nodes, i + 1, plan.strides)
                else:
                    open_nodes = nodes if open_nodes is None else _together([open_nodes, nodes])
    return stack(found), x0


def _step(path: Path, nodes: Nodes, v: Tensor, t: Tensor, s: Tensor) -> Step:
    return ode(path, nodes.x, v, t.expand(len(v)), s.expand(len(v)))


def _branch(
    sampler: Sampler, nodes: Nodes, v: Tensor, place: tuple[int, Tensor, Tensor], plan: TreePlan
) -> tuple[list[Nodes], list[Branchings]]:
    """The children of open nodes by each of a step's branches, and the branchings of the stochastic one.

    Args:
        sampler: path, velocity and noise.
        nodes: n open nodes.
        v: their velocities (n, C, h, w).
        place: the step's index in the grid, its start and its end.
        plan: what branches where.
    """
    i, t, s = place[0], place[1].expand(len(v)), place[2].expand(len(v))
    children: list[Nodes] = []
    branchings: list[Branchings] = []
    leaf = nodes.leaf
    for branches in plan.branches[i]:
        below = 1 if branches.closed else plan.leaves_below(i + 1)
        leaves = leaf[:, None] + below * torch.arange(branches.count)
        leaf = leaf + below * branches.count
        step = branches.kernel(sampler.path, nodes.x, v, t, s)
        if stochastic(branches.kernel):
            step = step.repeat(branches.count)
            to = step.draw(_sibling_noise(sampler.noise, len(v), branches))
            logp = step.logp(to).view(len(v), -1)
            branchings.append(
                Branchings(
                    nodes.x, t, s, to.unflatten(0, (len(v), -1)), logp, torch.zeros_like(logp), torch.zeros_like(logp),
                    nodes.prompt_ids, nodes.tree, torch.full_like(nodes.tree, i),
                    nodes.tree[:, None] * plan.leaves + leaves, torch.full_like(nodes.tree, below),
                )
            )  # fmt: skip
        else:
            to = step.mean
        children.append(nodes.children(to, leaves))
    return children, branchings


def _sibling_noise(noise: Callable[[int], Tensor], n: int, branches: Branches) -> Tensor:
    """(n K, C, h, w): standard normal noise of the K children of n nodes, siblings alike as their `spread` says.

    xi = (xi_0 + s xi_b) / sqrt(1 + s^2), arXiv 2509.06040, Eq. 2: each is standard normal, two siblings have correlation 1 / (1 + s^2).
    """
    own, s = noise(n * branches.count), torch.tensor(branches.spread, dtype=torch.float64)
    if branches.count == 1 or not bool(s.isfinite()):
        return own
    common = noise(n).repeat_interleave(branches.count, 0)
    return float((1 + s**2).rsqrt()) * common + float(s * (1 + s**2).rsqrt()) * own


def numbered(branchings: Branchings, first_tree: int, leaves: int) -> Branchings:
    """The branchings of trees that are a part of a rollout, whose first one has this number there."""
    offset = torch.where(branchings.first < 0, 0, first_tree * leaves)
    return replace(branchings, tree=branchings.tree + first_tree, first=branchings.first + offset)


def stack(parts: Sequence[Branchings]) -> Branchings:
    """The rows of all parts, each with as many children as the widest has: the first one is repeated, and marked as none."""
    widest = max(part.first.shape[1] for part in parts)
    padded = [_padded(part, widest - part.first.shape[1]) for part in parts]
    return Branchings(*(torch.cat([getattr(part, f.name) for part in padded]) for f in fields(Branchings)))


def _padded(part: Branchings, more: int) -> Branchings:
    if not more:
        return part
    columns = {
        name: torch.cat([value, value[:, :1].repeat_interleave(more, 1)], 1)
        for name in ("to", "logp", "advantage", "weight", "first")
        for value in (getattr(part, name),)
    }
    columns["first"][:, -more:] = -1
    return replace(part, **columns)

"""Tree plans: how several images branch off one trajectory, as data, with the images and evaluations that a plan costs.

A tree begins at one initial noise. At every step of the grid each open node gets children by one or more kernels; one velocity of
the node serves all of them. A child that stays open branches again at the next step. One that is closed is completed by the ODE,
once for each stride: on the next time of the grid, then on every stride-th one, and at the end. What the completions of one state
share, its first evaluation, is computed once too.

    TempFlow-GRPO   each step k but the last: 6 closed children by the SDE, and one open child by the ODE, the trunk
    G2RPO           the same with 12 children in the first half of the steps, completed with strides 1 and 2
    BranchGRPO      open children by the SDE, two where the tree splits and one elsewhere
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .flow import Kernel, ode, stochastic


@dataclass(frozen=True)
class Branches:
    """Children that each open node gets at one step."""

    kernel: Kernel
    count: int = 1  # children of each node; a step without noise has one
    closed: bool = False  # they branch no more: the ODE completes them
    # Siblings are drawn with the noises (xi_0 + s xi_b) / sqrt(1 + s^2), s the spread and xi_0 common to them; infinite: independent.
    spread: float = math.inf

    def __post_init__(self) -> None:
        if not stochastic(self.kernel) and (self.kernel != ode or self.count != 1):
            raise ValueError(f"a step without noise is one child by the ODE, not {self.count} by {self.kernel}")
        if self.count < 1 or not self.spread >= 0:
            raise ValueError(
                f"branches need a count of at least 1 and a spread of at least 0: {self.count}, {self.spread}"
            )


@dataclass(frozen=True)
class TreePlan:
    """The branches of each step, the length of the grid, and the strides of the completions.

    The leaves of a tree are numbered depth first, the children of a node in the order of its branches. An image is a leaf on one
    stride's grid.
    """

    branches: Sequence[
        Sequence[Branches]
    ]  # of each step from the first on; shorter than the grid where the last step closes all
    steps: int  # of the grid
    strides: Sequence[int] = (1,)

    def __post_init__(self) -> None:
        if not 1 <= len(self.branches) <= self.steps or not all(self.branches):
            raise ValueError(f"{len(self.branches)} steps of branches do not fit a grid of {self.steps} steps")
        if len(self.branches) < self.steps and any(not b.closed for b in self.branches[-1]):
            raise ValueError(
                f"nodes that are still open after step {len(self.branches) - 1} of {self.steps} lead nowhere"
            )
        if any(sum(stochastic(b.kernel) for b in step) > 1 for step in self.branches) or not self.stochastic_steps:
            raise ValueError("a step has at most one stochastic kernel, and a tree at least one step with one")
        if not self.strides or min(self.strides) < 1 or len(set(self.strides)) < len(self.strides):
            raise ValueError(f"strides are different numbers of at least 1, not {tuple(self.strides)}")

    @property
    def stochastic_steps(self) -> list[int]:
        """The steps whose transitions have a log-probability."""
        return [k for k, step in enumerate(self.branches) if any(stochastic(b.kernel) for b in step)]

    def leaves_below(self, step: int) -> int:
        """Leaves below an open node before this step."""
        if step == len(self.branches):
            return 1
        return sum(b.count * (1 if b.closed else self.leaves_below(step + 1)) for b in self.branches[step])

    @property
    def leaves(self) -> int:
        """Leaves of a tree."""
        return self.leaves_below(0)

    @property
    def images(self) -> int:
        """Images of a tree, each of which is scored: its leaves on every stride's grid."""
        return self.leaves * len(self.strides)

    def open_nodes(self, step: int) -> int:
        """Open nodes of a tree before this step."""
        return math.prod(sum(b.count for b in before if not b.closed) for before in self.branches[:step])

    def states(self, steps: Iterable[int]) -> int:
        """States of a tree at these steps: evaluations of an update on their transitions, one for all children of a state."""
        return sum(self.open_nodes(step) for step in steps)

    @property
    def evaluations(self) -> int:
        """Velocities for growing a tree to its last image: one at each open node, and those of the completions."""
        closed = [
            self.open_nodes(k) * sum(b.count for b in step if b.closed) * self.completion(k + 1)
            for k, step in enumerate(self.branches)
        ]
        return self.states(range(len(self.branches))) + sum(closed)

    def completion(self, start: int) -> int:
        """Velocities for completing a state at grid[start] on every stride's grid; the first one is common to them."""
        if start >= self.steps:
            return 0
        return 1 + sum(math.ceil((self.steps - start) / stride) - 1 for stride in self.strides)

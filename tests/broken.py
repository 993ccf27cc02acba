"""One sound method, and many that each break one law of the conformance checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gpobench.bench.budget import Spent
from gpobench.bench.losses import informative
from gpobench.bench.spec import Choice, Groups, LogUniform, Optim, Range, Rig, select_rows


@dataclass(frozen=True)
class Sound:
    """Flow matching on every image of a group, weighted by a softmax of the rewards."""

    space: ClassVar[Mapping[str, Range]] = {"optim.lr": LogUniform(1e-4, 1e-2), "group": Choice((4, 8))}
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-3, minibatches=1))
    prompts: int = 3
    group: int = 4

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        return {"rollout": steps * (1 if guidance == 1 else 2), "policy": 3}

    def collect(self, rig: Rig) -> Groups:
        groups = rig.groups(self.prompts, self.group)
        return select_rows(groups, informative(groups.reward))

    def weights(self, reward: Tensor) -> Tensor:
        return (reward / 0.1).nan_to_num(nan=-torch.inf).softmax(1)

    def loss(self, rig: Rig, batch: Groups) -> Tensor:
        n = batch.reward.numel()
        t, eps, prompt_ids = (
            rig.uniform(n, 0.02, 0.98),
            rig.noise(n),
            batch.prompt_ids.repeat_interleave(batch.reward.shape[1]),
        )
        (error,) = rig.errors(batch.x0.flatten(0, 1), prompt_ids, t, eps, "policy")
        return (self.weights(batch.reward) * error.view_as(batch.reward)).sum(1).mean()


@dataclass(frozen=True)
class Sums(Sound):
    def loss(self, rig: Rig, batch: Groups) -> Tensor:
        return Sound.loss(self, rig, batch) * len(batch.prompt_ids)


@dataclass(frozen=True)
class Compares(Sound):
    """Weights each row by the other rows of the batch."""

    def loss(self, rig: Rig, batch: Groups) -> Tensor:
        return Sound.loss(self, rig, batch) * batch.reward.nan_to_num().std().detach()


@dataclass(frozen=True)
class LearnsTies(Sound):
    def collect(self, rig: Rig) -> Groups:
        return rig.groups(self.prompts, self.group)

    def weights(self, reward: Tensor) -> Tensor:
        return torch.where(reward.isfinite(), reward, 0.0) / self.group


@dataclass(frozen=True)
class TakesNaNForZero(Sound):
    def weights(self, reward: Tensor) -> Tensor:
        return (reward / 0.1).nan_to_num(nan=0.0).softmax(1)


@dataclass(frozen=True)
class KeepsNaN(Sound):
    def weights(self, reward: Tensor) -> Tensor:
        return (reward / 0.1).softmax(1)


@dataclass(frozen=True)
class Ratio(Sound):
    def loss(self, rig: Rig, batch: Groups) -> Tensor:
        rig.note("policy/ratio", 1.00001)
        return Sound.loss(self, rig, batch)


@dataclass(frozen=True)
class Accuracy(Sound):
    def loss(self, rig: Rig, batch: Groups) -> Tensor:
        rig.note("policy/accuracy", 0.51)
        return Sound.loss(self, rig, batch)


@dataclass(frozen=True)
class Drift(Sound):
    def loss(self, rig: Rig, batch: Groups) -> Tensor:
        rig.note("policy/kl", 1e-6)
        return Sound.loss(self, rig, batch)


@dataclass(frozen=True)
class Chance(Sound):
    """Uses the process's global random generator, which no checkpoint holds."""

    def collect(self, rig: Rig) -> Groups:
        groups = Sound.collect(self, rig)
        return Groups(torch.nn.Dropout(0.3)(groups.x0), groups.prompt_ids, groups.reward)


@dataclass(frozen=True)
class Remembers(Sound):
    """Keeps state on the class."""

    memory: ClassVar[list[int]] = []

    def collect(self, rig: Rig) -> Groups:
        self.memory.append(rig.iteration)
        return Sound.collect(self, rig)


@dataclass(frozen=True)
class Counts(Sound):
    """Keeps state in a field, which no checkpoint holds."""

    seen: dict[str, float] = field(default_factory=dict[str, float])

    def collect(self, rig: Rig) -> Groups:
        groups = Sound.collect(self, rig)
        self.seen["rounds"] = self.seen.get("rounds", 0.0) + 1
        return Groups(groups.x0 * self.seen["rounds"], groups.prompt_ids, groups.reward)


@dataclass(frozen=True)
class Lies(Sound):
    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        return {"rollout": steps, "policy": 3}  # leaves out the cost of guidance


@dataclass(frozen=True)
class GoesOn(Sound):
    """Catches the end of the budget and goes on."""

    def collect(self, rig: Rig) -> Groups:
        try:
            return Sound.collect(self, rig)
        except Spent:
            x = torch.zeros(0, self.group, *rig.noise(1).shape[1:])
            return Groups(x, torch.zeros(0, dtype=torch.long), torch.zeros(0, self.group))


@dataclass(frozen=True)
class Wide(Sound):
    """Its search space names a field that does not exist."""

    space: ClassVar[Mapping[str, Range]] = {"optim.lr": LogUniform(1e-4, 1e-2), "groop": Choice((1, 2))}


@dataclass(frozen=True)
class Loose(Sound):
    temperature = 0.1  # without an annotation it is not a field


@dataclass
class Soft:
    """Not frozen: its fields can be changed."""

    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class Backwards(Sound):
    """Keeps every law and learns the worst images."""

    def weights(self, reward: Tensor) -> Tensor:
        return (-reward / 0.1).nan_to_num(nan=-torch.inf).softmax(1)


@dataclass(frozen=True)
class First:
    """A search that returns the base's image of the given noise."""

    space: ClassVar[Mapping[str, Range]] = {}

    def answer(self, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Tensor:
        return rig.sample(noise, prompt_ids, weights="ref")


@dataclass(frozen=True)
class Forgets:
    """A search whose answers on the way do not end in its answer."""

    space: ClassVar[Mapping[str, Range]] = {}

    def answer(self, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Tensor:
        *_, last = self.answers(rig, noise, prompt_ids, images)
        return last + 1

    def answers(self, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Iterator[Tensor]:
        yield rig.sample(noise, prompt_ids, weights="ref")


@dataclass(frozen=True)
class Overwrites:
    """A search that overwrites the noise it is given."""

    space: ClassVar[Mapping[str, Range]] = {}

    def answer(self, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Tensor:
        x: Any = rig.sample(noise, prompt_ids, weights="ref")
        return noise.copy_(x)

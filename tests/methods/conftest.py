"""Fixtures for tests of one method: small rigs, losses on chosen keys, and the training loop for a few iterations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Groups, Prompt, batch_size
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import optimiser, train

BOOK = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle", "a photo"]


class Lab:
    """Makes rigs on the random miniature and closes them."""

    def __init__(self, pipe: Path, scorers: str):
        self._pipe, self._scorers = pipe, scorers
        self.made: list[MeteredRig] = []

    def rig(
        self, name: str = "Redness", push: float = 0.0, adapter: Adapter = Adapter(rank=8), seed: int = 0
    ) -> MeteredRig:
        """push: how far the policy is moved from the reference."""
        model = open_model(find_model_spec(str(self._pipe)), device="cpu", adapter=adapter, seed=0)
        book, meter = [Prompt(p) for p in BOOK], Meter(Budget(nfe=1e9))
        self.made.append(MeteredRig(model, book, scorer(f"{self._scorers}:{name}"), meter, seed=seed, rows=64))
        self.push(self.made[-1], push)
        return self.made[-1]

    def push(self, rig: MeteredRig, weights: float, seed: int = 1) -> None:
        """Move the policy's weights a little, at random."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in rig.model.parameters():
                p.add_(weights * torch.randn(p.shape, generator=generator))

    def groups(self, rig: MeteredRig, reward: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> Groups:
        """From now on the rig draws these groups: random latents with these rewards."""
        value = torch.tensor(reward)
        x0 = torch.randn(*value.shape, *rig.model.shape, generator=torch.Generator().manual_seed(7))
        drawn = Groups(x0, torch.arange(len(value)), value)
        monkeypatch.setattr(rig, "groups", lambda *args, **kwargs: drawn)
        return drawn

    def keys(self, batch: Any) -> torch.Tensor:
        return torch.arange(batch_size(batch)) + 5

    def loss(self, method: Any, rig: MeteredRig, batch: Any) -> torch.Tensor:
        with rig.keyed(self.keys(batch)):
            return method.loss(rig, batch)

    def gradient(self, rig: MeteredRig, loss: torch.Tensor) -> torch.Tensor:
        """The gradient as one vector; 0 where the loss depends on no weight."""
        if not loss.requires_grad:
            return torch.zeros(sum(p.numel() for p in rig.model.parameters()))
        found = torch.autograd.grad(loss, rig.model.parameters(), allow_unused=True)
        both = zip(found, rig.model.parameters(), strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in both])

    def agree(self, rig: MeteredRig, got: torch.Tensor, expected: torch.Tensor, tol: float = 2e-5) -> None:
        """Two losses are equal, and so are their gradients, relative to the larger one's size."""
        assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=tol, abs=1e-7)
        one, two = self.gradient(rig, got), self.gradient(rig, expected)
        assert float(two.norm()) > 1e-7 and float((one - two).norm()) < tol * 10 * float(two.norm())

    def fit(self, method: Any, rig: MeteredRig, iterations: int, adam: Any = None) -> list[dict[str, float]]:
        """The numbers of each iteration of the real loop."""
        numbers: list[dict[str, float]] = []
        train(
            method, rig, adam or optimiser(method, rig), 
            after=numbers.append, interrupted=lambda: len(numbers) >= iterations,
        )  # fmt: skip
        return numbers


@pytest.fixture
def lab(tiny_pipe: Path, redness: str) -> Iterator[Lab]:
    made = Lab(tiny_pipe, redness)
    yield made
    for rig in made.made:
        rig.close()


@pytest.fixture
def make(tiny_pipe: Path, redness: str) -> Iterator[Any]:
    made: list[MeteredRig] = []

    def build(
        name: str = "Redness", push: float = 0.0, adapter: Adapter = Adapter(rank=8), **bounds: float
    ) -> MeteredRig:
        model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=adapter, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(push * torch.randn(p.shape, generator=generator))
        meter = Meter(Budget(**bounds or {"nfe": 1e9}))
        made.append(MeteredRig(model, [Prompt(p) for p in BOOK], scorer(f"{redness}:{name}"), meter, rows=64))
        return made[-1]

    yield build
    for rig in made:
        rig.close()

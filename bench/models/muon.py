"""Muon, an optimiser of matrices: orthogonalises the momentum before each step (Jordan 2024; Liu et al. 2025, arXiv:2502.16982)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Orthogonalises the momentum by Newton-Schulz and scales it to the size of an Adam step.

    Each of `world` processes orthogonalises its part of the matrices, and `total` sums the parts into the buffer of each.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, part: tuple[int, int], total: Callable[[Tensor], None]
    ):
        super().__init__(params, {"lr": lr, "momentum": 0.95})
        self.rank, self.world = part
        self.total = total

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closure here
        """Make one step on every matrix that has a gradient."""
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            flat = torch.zeros(sum(p.numel() for p in members))
            slices = flat.split([p.numel() for p in members])
            updates = [piece.view_as(p) for p, piece in zip(members, slices, strict=True)]
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for i, (p, update) in enumerate(zip(members, updates, strict=True)):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                if i % self.world == self.rank:
                    nesterov = torch.lerp(p.grad, momentum, group["momentum"])
                    by_shape.setdefault(p.shape, []).append((update, nesterov))
            for pairs in by_shape.values():
                orthogonal = orthogonalised(torch.stack([momentum for _, momentum in pairs]))
                for (update, _), matrix in zip(pairs, orthogonal, strict=True):
                    update.copy_(matrix)
            self.total(flat)
            for p, update in zip(members, updates, strict=True):
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def orthogonalised(x: Tensor) -> Tensor:
    """Approximate the nearest orthogonal matrix of each of (K, rows, columns) by five quintic Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    y = y / (y.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).float()

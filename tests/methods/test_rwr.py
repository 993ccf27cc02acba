"""Reward-weighted regression: the weight of each image, and flow matching times that weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpobench.methods.rwr import RWR, WeightedImages

nan = float("nan")


@pytest.mark.parametrize(
    "weights, temperature", [("softmax", 1.0), ("softmax", 0.1), ("raw", 1.0), ("exp", 1.0), ("exp", 0.1)]
)
def test_the_weights_are_by_hand(lab: Any, monkeypatch: pytest.MonkeyPatch, weights: Any, temperature: float) -> None:
    rig, reward = lab.rig(), [[0.1, 0.7, 0.3], [0.4, 0.4, 0.4], [nan, 0.2, 0.1]]
    drawn = lab.groups(rig, reward, monkeypatch)
    batch = RWR(prompts=3, group=3, image_weights=weights, temperature=temperature, timesteps=2).collect(rig)
    assert batch.prompt_ids.tolist() == [0] * 6 + [2] * 4
    expected: list[float] = []
    for p, members in ((0, [0, 1, 2]), (2, [1, 2])):
        whole = sum(math.exp(reward[p][g] / temperature) for g in members)
        for g in members:
            softmax = len(members) * math.exp(reward[p][g] / temperature) / whole
            everything = [math.exp(r / temperature) for row in reward for r in row if r == r]
            exp = len(everything) * math.exp(reward[p][g] / temperature) / sum(everything)
            expected += [{"softmax": softmax, "raw": reward[p][g], "exp": exp}[weights]] * 2
    assert batch.weight.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(batch.x0[-1], drawn.x0[2, 2]) and torch.equal(batch.x0[2], drawn.x0[0, 1])


@pytest.mark.parametrize("kl, noisy", [(0.0, 0.0), (0.4, 0.6)])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, kl: float, noisy: float) -> None:
    rig = lab.rig(push=0.05)
    batch = WeightedImages(rig.noise(4), torch.tensor([1, 1, 4, 0]), torch.tensor([0.0, 1.7, 2.0, 0.3]))
    with rig.keyed(lab.keys(batch)):
        low = noisy / (3 - 2 * noisy)  # what the miniature's shift of 3 takes to the lowest time
        u = low + (1 - low) * rig.normal(4).sigmoid()  # logit-normal
        t = 3 * u / (1 + 2 * u)
        eps = rig.noise(4).double()
    s, x0 = t.double()[:, None, None, None], batch.x0.double()
    v, ref = (
        rig.velocity(((1 - s) * x0 + s * eps).float(), t, batch.prompt_ids, weights=weights).double()
        for weights in ("policy", "ref")
    )
    square = ((v - (eps - x0)) ** 2).mean((1, 2, 3))
    expected = sum(w * e for w, e in zip(batch.weight.double(), square)) / 4 + kl * ((v - ref) ** 2).mean()
    before = rig.meter.roles["ref"]
    lab.agree(rig, lab.loss(RWR(kl=kl, t_min=noisy), rig, batch), expected)
    assert (rig.meter.roles["ref"] > before) == (kl > 0)

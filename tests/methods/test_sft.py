"""Filtered fine-tuning: which images are kept, and plain flow matching on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpobench.methods.sft import SFT, BestImages

nan = float("nan")


def test_the_best_are_kept_all_that_tie(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = lab.rig()
    drawn = lab.groups(rig, [[0.1, 0.7, 0.3], [0.5, 0.5, 0.2], [0.4, 0.4, 0.4], [nan, 0.2, 0.1]], monkeypatch)
    batch = SFT(prompts=4, group=3, timesteps=2).collect(rig)
    assert batch.prompt_ids.tolist() == [0, 0, 1, 1, 1, 1, 3, 3]
    for row, (p, g) in enumerate([(0, 1), (1, 0), (1, 1), (3, 1)]):
        assert torch.equal(batch.x0[2 * row], drawn.x0[p, g]) and torch.equal(batch.x0[2 * row + 1], drawn.x0[p, g])


@pytest.mark.parametrize("kl, noisy", [(0.0, 0.0), (0.4, 0.6)])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, kl: float, noisy: float) -> None:
    rig = lab.rig(push=0.05)
    batch = BestImages(rig.noise(4), torch.tensor([1, 1, 4, 0]))
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
    expected = ((v - (eps - x0)) ** 2).mean() + kl * ((v - ref) ** 2).mean()
    assert float(t.min()) > noisy
    before = rig.meter.roles["ref"]
    lab.agree(rig, lab.loss(SFT(kl=kl, t_min=noisy), rig, batch), expected)
    assert (rig.meter.roles["ref"] > before) == (kl > 0)  # no reference where it is not asked for

"""OP-GFN on a small random model: its equation in float64, online DPO at two images, its pairs, its cost."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.spec import Groups, Optim, Pairs
from gpobench.methods.diffusion_dpo import DiffusionDPO
from gpobench.methods.op_gfn import OPGFN

nan = math.nan
REWARD = torch.tensor([[0.0, 1.0, 0.9, 1.0], [0.3, nan, 0.5, 0.3]])
every_loss = pytest.mark.parametrize("loss_type", ["listwise", "pairs"])


def groups(rig: Any, reward: torch.Tensor = REWARD) -> Groups:
    x0 = torch.randn(*reward.shape, *rig.model.shape, generator=torch.Generator().manual_seed(3))
    return Groups(x0, torch.tensor([1, 4]), reward)


@every_loss
@pytest.mark.parametrize("beta", [1.0, 300.0])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, loss_type: Any, beta: float) -> None:
    """-log softmax of what the images at the maximum have, or the two-way one of each image and its random partner."""
    rig = lab.rig(push=0.05)
    batch = groups(rig)
    with rig.keyed(lab.keys(batch)):
        u = rig.normal(2).sigmoid()
        t, eps = 3 * u / (1 + 2 * u), rig.noise(2)  # the miniature's shift of 3
        draws = rig.uniform(8).view(2, 4).tolist()
    expected: Any = 0.0
    for p in range(2):
        x0, noise, time = batch.x0[p].double(), eps[p].double(), t[p].double()
        x, at = ((1 - time) * x0 + time * noise).float(), (t[p].repeat(4), batch.prompt_ids[p].repeat(4))
        policy, ref = (
            (rig.velocity(x, *at, weights=w).double() - (noise - x0)).square().mean((1, 2, 3))
            for w in ("policy", "ref")
        )
        score, r = -beta / 2 * (policy - ref), REWARD[p].tolist()
        scored = [i for i in range(4) if not math.isnan(r[i])]
        if loss_type == "listwise":
            best = [i for i in scored if r[i] == max(r[j] for j in scored)]
            expected += (score[scored].logsumexp(0) - score[best].mean()) / beta / 2
        else:
            for i in scored:
                others = [j for j in scored if j != i]
                j = others[int(draws[p][i] * len(others))]
                share = 0.5 if r[i] == r[j] else float(r[i] > r[j])
                two = score[[i, j]].logsumexp(0)
                expected += (two - share * score[i] - (1 - share) * score[j]) / len(scored) / beta / 2
    lab.agree(rig, lab.loss(OPGFN(beta=beta, loss_type=loss_type), rig, batch), expected, tol=1e-4)


@every_loss
def test_two_images_are_online_dpo(lab: Any, loss_type: Literal["listwise", "pairs"]) -> None:
    rig = lab.rig(push=0.05)
    batch = groups(rig, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    pairs = Pairs(
        torch.stack([batch.x0[0, 0], batch.x0[1, 1]]), torch.stack([batch.x0[0, 1], batch.x0[1, 0]]), batch.prompt_ids
    )
    dpo = DiffusionDPO(group=2, beta=40.0)
    lab.agree(
        rig,
        lab.loss(OPGFN(group=2, beta=40.0, loss_type=loss_type), rig, batch),
        lab.loss(dpo, rig, pairs),
    )


@every_loss
def test_the_static_cost_is_what_the_meter_shows(lab: Any, loss_type: Any) -> None:
    rig = lab.rig(push=0.02)
    method = OPGFN(prompts=3, group=4, steps=5, guidance=4.5, loss_type=loss_type, optim=Optim(epochs=2, micro=1))
    lab.fit(method, rig, 1)
    assert dict(rig.meter.roles) == {role: 12 * each for role, each in method.cost(4, 1.0).items()}


@every_loss
def test_groups_without_an_order_make_no_step(lab: Any, loss_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = lab.rig()
    lab.groups(rig, [[1.0, 1.0, 1.0], [nan, nan, 0.3]], monkeypatch)
    numbers = lab.fit(OPGFN(prompts=2, group=3, loss_type=loss_type), rig, 2)
    assert [n["batch/rows"] for n in numbers] == [0, 0] and rig.meter.updates == 0


@pytest.mark.parametrize(
    "bad", [{"group": 1}, {"prompts": 0}, {"beta": 0.0}, {"t_min": 1.0}, {"steps": -1}, {"guidance": -1.0}]
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^op-gfn: {next(iter(bad))} must be"):
        OPGFN(**bad)

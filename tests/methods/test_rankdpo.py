"""RankDPO on a small random model: its equation in float64, DPO at two images, what it costs, and what it leaves out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.spec import Groups, Optim, batch_size
from gpobench.methods.rankdpo import RankDPO

nan = math.nan
REWARD = torch.tensor([[0.0, 0.2, 0.9, 1.0], [0.3, nan, 0.5, 0.3]])


def groups(rig: Any) -> Groups:
    x0 = torch.randn(2, 4, *rig.model.shape, generator=torch.Generator().manual_seed(3))
    return Groups(x0, torch.tensor([1, 4]), REWARD)


@pytest.mark.parametrize("beta", [1.0, 300.0])
@pytest.mark.parametrize("shared", [False, True])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, beta: float, shared: bool) -> None:
    """One image and one pair at a time; each image has its own noise, as in the paper, unless it is shared."""
    rig = lab.rig(push=0.05)
    batch, low = groups(rig), 0.5 / (3 - 2 * 0.5)  # what the miniature's shift of 3 takes to the lowest time
    with rig.keyed(lab.keys(batch)):
        u = low + (1 - low) * rig.normal(2).sigmoid()
        t, eps = 3 * u / (1 + 2 * u), rig.noise(2 if shared else 8)
    eps = eps.repeat_interleave(4, 0) if shared else eps
    s: list[Any] = []
    for n in range(8):
        x0, noise, time = batch.x0.flatten(0, 1)[n].double(), eps[n].double(), t[n // 4].double()
        x = ((1 - time) * x0 + time * noise).float()[None]
        errors = [
            (rig.velocity(x, t[n // 4][None], batch.prompt_ids[n // 4][None], weights=w).double()[0] - (noise - x0))
            .square().mean() for w in ("policy", "ref")
        ]  # fmt: skip
        s.append(errors[0] - errors[1])
    expected: Any = 0.0
    for p in range(2):
        scored = [i for i in range(4) if not math.isnan(REWARD[p, i])]
        r = REWARD[p].tolist()
        gain = {i: 2 ** (sum(r[i] > r[j] for j in scored) / (len(scored) - 1)) for i in scored}
        rank = {i: 1 + sum(r[j] > r[i] for j in scored) for i in scored}
        for i, j in itertools.permutations(scored, 2):
            if r[i] > r[j]:
                weight = (gain[i] - gain[j]) * (1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                expected += weight * torch.log1p((beta / 2 * (s[4 * p + i] - s[4 * p + j])).exp()) / beta / 2
    lab.agree(rig, lab.loss(RankDPO(beta=beta, t_min=0.5, shared_noise=shared), rig, batch), expected, tol=1e-4)


def test_at_the_reference_the_loss_is_the_sum_of_the_weights_times_log_two(lab: Any) -> None:
    rig = lab.rig()
    method = RankDPO(prompts=3, group=4, beta=50.0)
    batch = method.collect(rig)
    sum_of_weights = 0.2197 + 0.5339 + 0.8214 + 0.0619 + 0.1697 + 0.0260  # four images without a tie
    got = float(lab.loss(method, rig, batch).detach())
    assert got == pytest.approx(sum_of_weights * math.log(2) / 50, abs=1e-5)
    assert rig.mean("policy/accuracy") == 0.5


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_static_cost_is_what_the_meter_shows(lab: Any, guidance: float) -> None:
    rig = lab.rig(push=0.02)
    method = RankDPO(prompts=3, group=4, steps=5, guidance=guidance, optim=Optim(epochs=2, micro=1))
    lab.fit(method, rig, 1)
    assert dict(rig.meter.roles) == {role: 12 * each for role, each in method.cost(4, 1.0).items()}


def test_groups_without_an_order_make_no_row_and_are_counted(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = lab.rig()
    lab.groups(rig, [[1.0, 1.0, 1.0], [nan, nan, 0.3], [0.1, nan, 0.2]], monkeypatch)
    assert RankDPO(prompts=3, group=3).collect(rig).prompt_ids.tolist() == [2]
    lab.groups(rig, [[1.0, 1.0, 1.0]], monkeypatch)
    numbers = lab.fit(RankDPO(prompts=1, group=3), rig, 2)
    assert [n["batch/rows"] for n in numbers] == [0, 0] and rig.meter.updates == 0
    assert batch_size(RankDPO(prompts=1, group=3).collect(rig)) == 0


@pytest.mark.parametrize(
    "bad",
    [{"group": 1}, {"prompts": 0}, {"beta": 0.0}, {"t_min": 1.0}, {"steps": -1}, {"guidance": -1.0}, {"timestep_shift": nan}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^rankdpo: {next(iter(bad))} must be"):
        RankDPO(**bad)

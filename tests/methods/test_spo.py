"""SPO on a small random model: its walk, its candidates and gap rule, its equation in float64, its cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.flow import split
from gpobench.bench.spec import Optim, batch_size
from gpobench.methods.spo import SPO, Candidates

nan = math.nan


def small(**more: Any) -> SPO:
    return SPO(**{"prompts": 3, "candidates": 4, "gap": 0.0, "sde_type": "sde", "noise_level": 0.7, **more})


def test_the_gap_rule_is_a_difference_of_scores() -> None:
    """A softmax of two logits differs by .3 at .6190, and by .4 at .8473."""
    assert SPO(gap=0.3).margin == pytest.approx(0.6190, abs=5e-5)
    assert SPO(gap=0.4).margin == pytest.approx(0.8473, abs=5e-5)
    assert SPO(gap=0.3, temperature=0.1).margin == pytest.approx(0.0619, abs=5e-6)


def test_twenty_steps_cost_what_the_code_costs() -> None:
    """Four candidates from step 4 on: 5 + 15 k = 65 evaluations of a prompt, 15 k images, 15 pairs; twice under guidance."""
    method = SPO(steps=20, candidates=4)
    assert {role: each * 60 for role, each in method.cost(50, 7.5).items()} == pytest.approx(
        {"rollout": 2 * 65, "policy": 2 * 3 * 15, "ref": 2 * 15}
    )


def walk(rig: Any, method: SPO) -> tuple[Candidates, list[tuple[Any, Any]]]:
    """A batch, and what the scorer was asked: (images' latents (P, k, ...), rewards (P, k)) of each step."""
    asked: list[tuple[Any, Any]] = []
    real = rig.score

    def score(x0: Any, prompt_ids: Any) -> Any:
        reward = real(x0, prompt_ids)
        shape = (method.prompts, method.candidates)
        asked.append((x0.unflatten(0, shape), reward.view(shape)))
        return reward

    rig.score = score
    try:
        return method.collect(rig), asked
    finally:
        rig.score = real


def test_the_candidates_are_judged_by_the_images_that_they_predict(lab: Any) -> None:
    rig, method = lab.rig(push=0.05), small(steps=7)
    batch, asked = walk(rig, method)
    assert len(asked) == 5 and batch_size(batch) == 15  # steps 1 to 5 of 0 to 6
    for k, (x0, reward) in enumerate(asked):
        rows = slice(3 * k, 3 * k + 3)
        t, s = batch.t[rows], batch.s[rows]
        assert torch.equal(t, rig.model.times(7)[1 + k].expand(3)) and torch.equal(
            s, rig.model.times(7)[2 + k].expand(3)
        )
        for side, of in ((0, reward.argmax(1)), (1, reward.argmin(1))):
            latent = batch.to[rows][:, side]
            with torch.no_grad():
                v = rig.velocity(latent, s, batch.prompt_ids[rows], guidance=rig.model.guidance)
            assert torch.allclose(split(rig.path, latent, v, s)[0], x0[torch.arange(3), of], atol=1e-5)
    assert rig.mean("pairs/kept") == 1 and math.isfinite(rig.mean("reward/mean"))


def test_a_random_candidate_goes_on_whatever_the_scores_are(lab: Any) -> None:
    """The latents of two walks with opposite rewards are the same; only who wins differs."""
    batches = [walk(lab.rig(name, push=0.05), small(steps=6))[0] for name in ("Redness", "Redness")]
    flipped = lab.rig(push=0.05)
    real = flipped.score
    flipped.score = lambda *a: -real(*a)
    other = small(steps=6).collect(flipped)
    assert torch.equal(batches[0].x, batches[1].x) and torch.equal(batches[0].x, other.x)
    assert torch.equal(batches[0].to[:, [1, 0]], other.to)


def test_pairs_within_the_gap_and_images_without_a_score_are_left_out(lab: Any) -> None:
    rig = lab.rig()
    rig.score = lambda x0, prompt_ids: torch.tensor(
        [[0.0, 0.05, nan, 0.01], [0.0, 0.07, 0.01, nan], [nan] * 4]
    ).flatten()
    batch = small(steps=6, gap=0.3, temperature=0.1).collect(rig)  # a margin of .0619
    assert batch.prompt_ids.tolist() == [batch.prompt_ids[0].item()] * 4 and rig.mean("pairs/kept") == pytest.approx(
        1 / 3
    )
    rig.score = lambda x0, prompt_ids: torch.full((12,), nan)
    assert batch_size(small(steps=6).collect(rig)) == 0
    numbers = lab.fit(small(steps=6, gap=0.3), lab.rig("Constant"), 2)
    assert [n["batch/rows"] for n in numbers] == [0, 0]


@pytest.mark.parametrize("sde_type", ["ddim", "sde"])
@pytest.mark.parametrize("clip", [0.002, 0.5])
def test_the_loss_and_its_gradient_are_the_equation(lab: Any, sde_type: Any, clip: float) -> None:
    """One evaluation of each model serves both candidates; by hand there are two."""
    rig = lab.rig(push=0.05)
    method = small(steps=4, sde_type=sde_type, clip_range=clip, beta=10.0)
    batch = method.collect(rig)
    lab.push(rig, 0.03, seed=2)
    expected, inside = 0.0, []
    for n in range(len(batch.t)):
        logs: list[Any] = []
        for side in (0, 1):
            at = (batch.x[n][None], batch.t[n][None], batch.s[n][None], batch.prompt_ids[n][None])
            both = [rig.step(method.kernel, *at, weights=w, guidance=rig.model.guidance) for w in ("policy", "ref")]
            logp = [
                (-((batch.to[n, side].double() - step.mean.double()) ** 2) / (2 * step.std.double() ** 2)).mean()
                for step in both
            ]
            ratio = (logp[0] - logp[1].detach()).exp()
            inside.append(abs(float(ratio.detach()) - 1) < clip)
            logs.append(ratio.clamp(1 - clip, 1 + clip).log())
        expected = expected + torch.log1p((-10.0 * (logs[0] - logs[1])).exp()) / 10.0 / len(batch.t)
    assert any(inside) and (clip == 0.5 or not all(inside))
    lab.agree(rig, lab.loss(method, rig, batch), expected, tol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_static_cost_is_what_the_meter_shows(lab: Any, guidance: float) -> None:
    rig = lab.rig(push=0.02)
    method = small(steps=6, guidance=guidance, optim=Optim(epochs=2, micro=2))
    lab.fit(method, rig, 1)
    assert rig.meter.images == rig.meter.reward_calls == 3 * 4 * 4
    assert dict(rig.meter.roles) == pytest.approx({role: 48 * each for role, each in method.cost(4, 1.0).items()})


@pytest.mark.parametrize(
    "bad",
    [{"candidates": 1}, {"prompts": 0}, {"beta": 0.0}, {"clip_range": 1.0}, {"noise_level": 1.5}, {"steps": -1}, {"gap": 1.0},
     {"temperature": 0.0}, {"start_fraction": 1.0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^spo: {next(iter(bad))} must be"):
        SPO(**bad)


def test_a_walk_that_is_too_short_is_refused_before_anything_is_spent(lab: Any) -> None:
    rig = lab.rig()
    with pytest.raises(UserError, match=r"^spo: start_fraction 0\.9 of steps 4 leaves none"):
        small(start_fraction=0.9).collect(rig)
    assert rig.meter.nfe == 0

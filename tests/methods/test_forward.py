"""Laws of the methods that train on finished images only: costs, groups, missing scores, seeds, resumes and splits."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.model_spec import SMALL
from gpobench.bench.spec import Choice, LogUniform, Optim, Pairs, Uniform, batch_size, select_rows
from gpobench.bench.training import checkpoint
from gpobench.bench.training.train import optimiser
from gpobench.methods.awm import AWM
from gpobench.methods.dgpo import DGPO
from gpobench.methods.diffusion_dpo import DiffusionDPO
from gpobench.methods.diffusion_nft import DiffusionNFT
from gpobench.methods.gpo import GPO, AdvantageGroups
from gpobench.methods.rwr import RWR, WeightedImages
from gpobench.methods.sft import SFT, BestImages

KINDS: dict[str, Any] = {"awm": AWM, "dgpo": DGPO, "diffusion-nft": DiffusionNFT, "rwr": RWR, "sft": SFT}
every = pytest.mark.parametrize("name", list(KINDS))
nan = math.nan


def small(name: str, **fields: Any) -> Any:
    return KINDS[name](prompts=3, group=4, **fields)


# Costs


@every
@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("thrifty", [False, True])
def test_the_static_cost_is_what_the_meter_shows(lab: Any, name: str, guidance: float, thrifty: bool) -> None:
    rig = lab.rig(push=0.02)
    free = {"awm": {"kl": 0, "ema_kl": 0}, "dgpo": {"clip_range": 0}}.get(name, {"kl": 0}) if thrifty else {}
    extra = free or ({"kl": 0.1} if name in ("sft", "rwr", "diffusion-nft") else {})
    method = small(name, timesteps=2, steps=5, guidance=guidance, optim=Optim(epochs=2, micro=1), **extra)
    lab.fit(method, rig, 1)
    cost = method.cost(rig.model.steps, rig.model.guidance)
    assert dict(rig.meter.roles) == {role: 12 * each for role, each in cost.items()}
    assert rig.meter.images == rig.meter.reward_calls == 12
    assert cost["rollout"] == 5 * (2 if guidance != 1 else 1) and ("ref" in cost) == (not thrifty or name == "dgpo")


@pytest.mark.parametrize(
    "name, cost",
    [
        ("awm", {"rollout": 14, "policy": 3 * 6, "ref": 6, "old": 6}),
        ("diffusion-nft", {"rollout": 10, "policy": 3 * 9, "ref": 9, "old": 9}),
        ("dgpo", {"rollout": 20, "policy": 3 * 4, "ref": 4, "old": 4}),
        ("rwr", {"rollout": 80, "policy": 3 * 39}),
        ("sft", {"rollout": 80, "policy": 3 * 39 / 24}),
    ],
)
def test_the_published_settings_cost_what_was_published(name: str, cost: dict[str, float]) -> None:
    """One image, in forwards, a backward counting two; the evaluation's protocol is 40 steps at guidance 4.5."""
    assert resolve(RunRequest(name, "ocr", "sd35m")).settings.cost(40, 4.5) == cost


@every
def test_presets_resolve_and_the_search_space_fits(name: str) -> None:
    method = resolve(RunRequest(name, "ocr", "tiny")).settings
    assert (method.prompts, method.optim.warmup, method.optim.ema) == (8, 20, 0.9) and method.group in (8, 16)
    for key, range_ in KINDS[name].space.items():
        owner, _, leaf = key.rpartition(".")
        assert leaf in {f.name for f in fields(Optim if owner else KINDS[name])}
        ends = range_.options if isinstance(range_, Choice) else (range_.low, range_.high)
        assert isinstance(range_, Choice | Uniform) or (isinstance(range_, LogUniform) and range_.low > 0)
        for value in ends:  # both ends are settings that make sense, beside the preset
            changed = {"optim": replace(method.optim, **{leaf: value})} if owner else {leaf: value}
            replace(method, **changed).cost(10, 1.0)


# Times of training


@pytest.mark.parametrize("name", ["gpo", "diffusion-dpo", "sft", "rwr"])
@pytest.mark.parametrize("own, low, expected", [
    ({}, 0.0, (0.36674, 0.75, 0.93954)),  # the miniature's schedule has a shift of 3, as SD3.5's
    ({"timestep_shift": 1.0}, 0.0, (0.16181, 0.5, 0.83819)),
    ({"t_min": 0.5625}, 0.5625, (0.67877, 0.84783, 0.95916)),  # shift(0.3 + 0.7 u)
])  # fmt: skip
def test_the_loss_trains_at_the_times_of_the_published_law(
    lab: Any, name: str, own: dict[str, float], low: float, expected: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantiles of t at the 5 %, 50 % and 95 % quantiles of the normal draws."""
    rig = lab.rig()
    x0, one, prompt_ids = rig.noise(6).view(3, 2, *rig.model.shape), torch.ones(3), torch.arange(3)
    reward = torch.tensor([[-1.0, 1.0]]).repeat(3, 1)
    batches: dict[str, Any] = {
        "gpo": AdvantageGroups(x0, prompt_ids, reward, reward),
        "diffusion-dpo": Pairs(x0[:, 0], x0[:, 1], prompt_ids),
        "sft": BestImages(x0[:, 0], prompt_ids),
        "rwr": WeightedImages(x0[:, 0], prompt_ids, one),
    }
    kind = {"gpo": GPO, "diffusion-dpo": DiffusionDPO, "sft": SFT, "rwr": RWR}[name]
    monkeypatch.setattr(rig, "normal", lambda n: torch.tensor([-1.6448536, 0.0, 1.6448536]))
    times: list[torch.Tensor] = []
    velocity = rig.velocity

    def record(x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        times.append(t)
        return velocity(x, t, *args, **kwargs)

    monkeypatch.setattr(rig, "velocity", record)
    lab.loss(kind(group=2, **own), rig, batches[name])
    for t in times:
        assert sorted(set(t.tolist())) == pytest.approx(list(expected), abs=2e-5) and float(t.min()) > low
    with pytest.raises(UserError, match="timestep_shift"):
        kind(timestep_shift=-1.0)


# Groups and missing scores


@every
def test_groups_without_spread_are_dropped_and_counted(lab: Any, name: str) -> None:
    rig = lab.rig("Constant")
    batch = small(name).collect(rig)
    assert batch_size(batch) == 0 and rig.mean("groups/informative") == 0 and rig.mean("reward/mean") == 1
    assert rig.meter.images == 12 and rig.meter.roles.keys() == {"rollout"}  # paid for all the same


@every
def test_an_image_without_a_score_leaves_no_trace(lab: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its image nor its group's other rewards change the gradient, penalties included."""
    rig = lab.rig(push=0.05)
    method = small(name, timesteps=2, kl=0.1)
    found: list[torch.Tensor] = []
    for shift in (0.0, 1.0):
        drawn = lab.groups(rig, [[nan, -1.0, 0.5, 1.0], [nan, nan, nan, 2.0], [0.0, 1.0, 0.0, 1.0]], monkeypatch)
        drawn.x0[drawn.reward.isnan()] += shift
        rig.rng.manual_seed(3)
        batch = method.collect(rig)
        assert set(batch.prompt_ids.tolist()) == {0, 2}  # one scored image is no group
        loss = lab.loss(method, rig, batch)
        assert bool(loss.isfinite())
        found.append(lab.gradient(rig, loss))
    assert float(found[0].abs().max()) > 1e-6
    assert torch.allclose(found[0], found[1], atol=1e-7)


# Splits, seeds and resumes


@every
def test_splitting_a_batch_changes_nothing(lab: Any, name: str) -> None:
    rig = lab.rig(push=0.05)
    method = small(name, timesteps=2)
    batch = method.collect(rig)
    lab.push(rig, 0.05, seed=2)  # away from the old copy
    rows, keys = batch_size(batch), lab.keys(batch)
    whole = lab.gradient(rig, lab.loss(method, rig, batch))
    parts = torch.zeros_like(whole)
    for some in torch.arange(rows).split(2):
        with rig.keyed(keys[some]):
            parts += lab.gradient(rig, method.loss(rig, select_rows(batch, some)) * (len(some) / rows))
    assert float(whole.norm()) > 1e-6 and float((whole - parts).norm()) < 1e-4 * float(whole.norm())


@every
def test_the_seed_decides_and_a_resume_changes_nothing(lab: Any, name: str, tmp_path: Path) -> None:
    """Four iterations = two, a checkpoint, and two more in another process' stead; the copies come along."""
    method = small(name, optim=Optim(lr=1e-2, minibatches=1, ema=0.5))

    def state(rig: Any) -> dict[str, torch.Tensor]:
        return rig.model.lora.state()

    whole, first = lab.rig(seed=4), lab.rig(seed=4)
    lab.fit(method, whole, 4)
    adam = optimiser(method, first)
    lab.fit(method, first, 2, adam)
    checkpoint.save(tmp_path, 2, first, adam, {})
    second = lab.rig(push=1.0, seed=9)
    adam = optimiser(method, second)
    assert checkpoint.restore(tmp_path, second, adam, print) == {}
    lab.fit(method, second, 2, adam)
    assert state(whole).keys() == state(second).keys()
    assert any(key.startswith("old/") for key in state(whole)) == (name in ("awm", "dgpo", "diffusion-nft"))
    assert all(torch.equal(tensor, state(second)[key]) for key, tensor in state(whole).items())
    other = lab.rig(seed=5)
    lab.fit(method, other, 4)
    assert any(not torch.equal(tensor, state(other)[key]) for key, tensor in state(whole).items())


GAINS: dict[str, Any] = {  # settings under which a random miniature learns in seconds
    "awm": {"timesteps": 2},
    "dgpo": {"timesteps": 2, "kl": 0.0, "trunc_steps": 3, "beta": 30.0},
    "diffusion-nft": {"timesteps": 2},
    "rwr": {"temperature": 0.02},
    "sft": {"timesteps": 4, "group": 16, "lr": 1e-2},
}


@every
def test_it_makes_the_model_better(lab: Any, name: str) -> None:
    rig = lab.rig(adapter=SMALL["adapter"])
    own = {"group": 8, "lr": 3e-3, **GAINS[name]}
    optim = Optim(lr=own.pop("lr"), weight_decay=0, minibatches=1)
    lab.fit(KINDS[name](prompts=4, optim=optim, **own), rig, 40)
    x, prompt_ids = rig.noise(240), torch.arange(6).repeat(40)
    gain = rig.score(rig.sample(x, prompt_ids), prompt_ids) - rig.score(
        rig.sample(x, prompt_ids, weights="ref"), prompt_ids
    )  # on the same noise
    # 240 images: of 60 the gain of rwr is 2 to 10 standard errors over six seeds, of 240 it is 5 to 21. Without training it is 0.
    assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(240)


# Settings, and what a method may use


@every
@pytest.mark.parametrize("bad", [{"group": 1}, {"prompts": 0}, {"timesteps": -1}, {"steps": -1}, {"guidance": -1.0}])
def test_settings_that_make_no_sense_are_refused(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{name}: .*{next(iter(bad))}"):
        KINDS[name](**bad)


@pytest.mark.parametrize(
    "name, bad",
    [("awm", {key: value}) for key, value in
     {"clip_range": 0.0, "adv_clip_max": 0.0, "kl": -1.0, "ema_kl": -1.0, "timestep_fraction": 0.0, "timesteps": 0}.items()]
    + [("awm", {"timesteps": 12, "steps": 14})]
    + [("dgpo", {key: value}) for key, value in
       {"beta": 0.0, "adv_clip_max": 0.0, "clip_range": -1.0, "kl": -1.0, "switch_ema_ref": -1, "trunc_steps": 2, "timesteps": 0}.items()]
    + [("diffusion-nft", {key: value}) for key, value in
       {"nft_beta": 0.0, "adv_clip_max": -1.0, "kl": -1.0, "t_min": 1.0, "decay_type": 3}.items()]
    + [("diffusion-nft", {"timesteps": 11, "steps": 10})]
    + [("sft", {"kl": -1.0}), ("sft", {"t_min": 1.0}), ("sft", {"timesteps": 0})]
    + [("rwr", {"temperature": 0.0}), ("rwr", {"temperature": nan}), ("rwr", {"t_min": -0.1}), ("rwr", {"kl": nan})],
)  # fmt: skip
def test_its_own_settings_are_checked_too(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{name}: .*{next(iter(bad))}"):
        KINDS[name](**bad)


@pytest.mark.parametrize("name, bad", [("awm", {}), ("diffusion-nft", {}), ("dgpo", {"trunc_steps": 9})])
def test_more_timesteps_than_the_sampler_has_are_refused_before_anything_is_spent(
    lab: Any, name: str, bad: dict[str, Any]
) -> None:
    rig = lab.rig()  # whose protocol has four steps
    with pytest.raises(UserError, match=f"^{name}: 5 timesteps"):
        small(name, timesteps=5, **bad).collect(rig)
    assert rig.meter.nfe == 0


@every
def test_the_method_owns_no_loop_optimiser_device_or_file(name: str) -> None:
    source = inspect.getsource(sys.modules[KINDS[name].__module__])
    nodes = list(ast.walk(ast.parse(source)))
    words = {node.id for node in nodes if isinstance(node, ast.Name)}
    words |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom | ast.Import)]
    words |= {alias.name for node in imports for alias in node.names}
    forbidden = "cuda device backward Adam AdamW open Path save step randn manual_seed hasattr rng meter prediction"
    assert not set(forbidden.split()) & words
    assert "torch.optim" not in source

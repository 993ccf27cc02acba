"""Diffusion-DPO on a small random model: its equation, its pairs, and that it works on its own and on given pairs."""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.experiments.config import RunRequest, resolve, variants
from gpobench.bench.experiments.make_pairs import PairsRequest, make_pairs
from gpobench.bench.flow import mix
from gpobench.bench.losses import dpo, margin_mask
from gpobench.bench.model_spec import SMALL
from gpobench.bench.progress import NullProgress
from gpobench.bench.registry import load
from gpobench.bench.spec import Optim, Pairs, select_rows
from gpobench.bench.training import checkpoint
from gpobench.bench.training.pairs import compare
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import optimiser, train
from gpobench.methods import diffusion_dpo as module
from gpobench.methods.diffusion_dpo import DiffusionDPO

BOOK = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle", "a photo"]


@pytest.fixture(scope="module")
def dataset(tiny_pipe: Path, redness: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs that `gpobench pairs` makes of the base's own images."""
    out = tmp_path_factory.mktemp("pairs")
    make_pairs(PairsRequest(str(tiny_pipe), f"{redness}:Paint", prompts=24, group=6, seed=3), out, NullProgress())
    return str(out)


def keyed_loss(method: DiffusionDPO, rig: MeteredRig, batch: Pairs) -> torch.Tensor:
    with rig.keyed(torch.arange(len(batch.prompt_ids)) + 5):
        return method.loss(rig, batch)


def go(method: DiffusionDPO, rig: MeteredRig, adam: torch.optim.Optimizer, iterations: int) -> list[dict[str, float]]:
    """So many iterations of the real loop; their numbers."""
    numbers: list[dict[str, float]] = []
    train(
        method, rig, adam, after=numbers.append,
        interrupted=lambda: len(numbers) == iterations,
    )  # fmt: skip
    return numbers


def weights(rig: MeteredRig) -> dict[str, torch.Tensor]:
    return rig.model.weight_state()


# The loss


@pytest.mark.parametrize("beta", [1.0, 100.0, 5000.0])
@pytest.mark.parametrize("choose", ["extremes", "random", "all"])
def test_at_the_reference_the_loss_is_log_two_over_beta(make: Any, beta: float, choose: Any) -> None:
    rig, method = make(), DiffusionDPO(prompts=3, group=4, beta=beta, choose=choose)
    batch = method.collect(rig)
    assert len(batch.prompt_ids) == (18 if choose == "all" else 3)
    assert float(keyed_loss(method, rig, batch).detach()) == pytest.approx(math.log(2) / beta, rel=1e-6)
    assert rig.mean("policy/kl") == 0 and rig.mean("policy/accuracy") == 0.5
    assert rig.mean("policy/error_win") > 0 and rig.mean("policy/error_lose") > 0


@pytest.mark.parametrize("times", ["logit-normal", "uniform"])
def test_loss_and_gradient_are_the_closed_form_in_float64(make: Any, times: Any) -> None:
    """By hand, with no autograd between loss and velocity: dL/dv = sigmoid(z) / 2 * 2 (v - target) / D / P, z = beta/2 (s_w - s_l)."""
    rig = make(push=0.05)
    method = DiffusionDPO(prompts=4, group=2, beta=50.0, t_min=0.3, timestep_sampling=times)
    batch = method.collect(rig)
    n, beta = len(batch.prompt_ids), method.beta
    got = keyed_loss(method, rig, batch)
    with rig.keyed(torch.arange(n) + 5):
        u = rig.normal(n).sigmoid() if times == "logit-normal" else rig.uniform(n)
        u = 0.125 + 0.875 * u  # the miniature's shift of 3 takes 0.125 to 0.3
        t, eps = 3 * u / (1 + 2 * u), rig.noise(n)
    v: list[torch.Tensor] = []
    gap: list[torch.Tensor] = []
    s: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    for x0 in (batch.win, batch.lose):
        x, target = mix(rig.path, x0, eps, t)
        v.append(rig.velocity(x, t, batch.prompt_ids))
        gap.append(v[-1].detach().double() - target.double())
        ref = (
            (rig.velocity(x, t, batch.prompt_ids, weights="ref").double() - target.double()).square().flatten(1).mean(1)
        )
        error = gap[-1].square().flatten(1).mean(1)
        errors += [error, ref]
        s.append(error - ref)
    z = beta / 2 * (s[0] - s[1])
    expected = torch.log1p(z.exp()).mean() / beta
    assert float(got.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(dpo(*errors, beta).mean() / beta) == pytest.approx(float(expected), rel=1e-6)
    assert abs(float(expected) * beta - math.log(2)) > 1e-3  # away from the reference it says something
    weight = (z.sigmoid() / (n * gap[0][0].numel())).view(-1, 1, 1, 1)
    outer = [(weight * gap[0]).float(), (-weight * gap[1]).float()]
    by_hand = torch.autograd.grad(v, rig.model.parameters(), grad_outputs=outer)
    for a, b in zip(torch.autograd.grad(got, rig.model.parameters()), by_hand, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-7)


def test_swapping_winner_and_loser_mirrors_the_loss(make: Any) -> None:
    """softplus(z) - softplus(-z) = z: the two orders of a pair differ by beta/2 (s_w - s_l), over beta."""
    rig, method = make(push=0.05), DiffusionDPO(prompts=1, group=2, beta=80.0)
    batch = method.collect(rig)
    there = float(keyed_loss(method, rig, batch).detach())
    back = float(keyed_loss(method, rig, Pairs(batch.lose, batch.win, batch.prompt_ids)).detach())
    assert 2 * math.log(2) / 80 <= there + back and there != back
    assert math.expm1(80 * there) * math.expm1(80 * back) == pytest.approx(1, rel=1e-3)  # e^z e^-z


def test_splitting_the_rows_changes_nothing(make: Any) -> None:
    rig, method = make(push=0.05), DiffusionDPO(prompts=5, group=3, beta=50.0)
    batch = method.collect(rig)
    keys = torch.arange(5) + 5
    whole = torch.autograd.grad(keyed_loss(method, rig, batch), rig.model.parameters())
    parts = [torch.zeros_like(g) for g in whole]
    for rows in torch.arange(5).split(2):
        with rig.keyed(keys[rows]):
            loss = method.loss(rig, select_rows(batch, rows)) * (len(rows) / 5)
        for total, g in zip(parts, torch.autograd.grad(loss, rig.model.parameters()), strict=True):
            total += g
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))


def test_one_step_makes_the_better_image_likelier(make: Any) -> None:
    rig, method = make(), DiffusionDPO(prompts=6, group=4)
    batch = method.collect(rig)
    steepest = torch.optim.SGD(rig.model.parameters(), lr=1e-2)
    keyed_loss(method, rig, batch).backward()
    steepest.step()
    rig.notes()
    after = keyed_loss(method, rig, batch)
    assert rig.mean("policy/accuracy") > 0.7 and rig.mean("policy/kl") > 0 and bool(after.isfinite())


# Its own pairs


@pytest.mark.parametrize("choose", ["extremes", "random", "all"])
@pytest.mark.parametrize("gap", [0.0, 0.5])
def test_pairs_are_those_of_a_search_by_hand(
    make: Any, monkeypatch: pytest.MonkeyPatch, choose: Any, gap: float
) -> None:
    rig, nan = make(), math.nan
    reward = torch.tensor([[0, 0.25, 1, 1], [1, 1, 1, 1], [nan, nan, nan, 1], [nan, 0.5, 0, nan], [2, 1, 0, 3]])
    monkeypatch.setattr(rig, "_reward", lambda answer: reward.flatten())
    monkeypatch.setattr(rig, "prompts", lambda n: torch.arange(n))
    kept: list[Any] = []
    real = rig.groups
    monkeypatch.setattr(rig, "groups", lambda *a, **k: kept.append(real(*a, **k)) or kept[-1])
    batch = DiffusionDPO(prompts=5, group=4, choose=choose, margin=gap).collect(rig)
    assert rig.mean("pairs/kept") == len(batch.prompt_ids)
    apart: dict[int, list[tuple[int, int]]] = {}
    for p, row in enumerate(reward.tolist()):
        found = [(i, j) for i in range(4) for j in range(4) if row[i] - row[j] > gap]
        if found:
            apart[p] = found
    assert list(apart) == ([0, 3, 4] if not gap else [0, 4])
    x0 = kept[0].x0
    got = [
        (
            p,
            next(i for i in range(4) if torch.equal(x0[p, i], win)),
            next(j for j in range(4) if torch.equal(x0[p, j], lose)),
        )
        for p, win, lose in zip(batch.prompt_ids.tolist(), batch.win, batch.lose, strict=True)
    ]
    if choose == "all":
        assert got == [(p, i, j) for p, found in apart.items() for i, j in found]
    elif choose == "extremes":
        best = {0: (2, 0), 3: (1, 2), 4: (3, 2)}  # of equal rewards the first
        assert got == [(p, *best[p]) for p in apart]
    else:
        assert [p for p, _, _ in got] == list(apart) and all((i, j) in apart[p] for p, i, j in got)


def test_a_random_pair_is_any_pair_equally_often() -> None:
    reward = torch.tensor([[0.0, 1.0, 1.0, 2.0]]).expand(5000, 4)
    _, win, lose = compare(reward, "random", 0.0, torch.rand(5000, generator=torch.Generator().manual_seed(0)))
    counts: dict[tuple[int, int], int] = {}
    for pair in zip(win.tolist(), lose.tolist(), strict=True):
        counts[pair] = counts.get(pair, 0) + 1
    assert set(counts) == {(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)}  # never the two equal ones
    assert all(abs(n - 1000) < 5 * math.sqrt(800) for n in counts.values())
    edge = compare(reward[:2], "random", 0.0, torch.tensor([0.0, 1 - 2**-24]))
    assert (edge[1].tolist(), edge[2].tolist()) == ([1, 3], [0, 2])


def test_near_ties_are_dropped_at_the_gap_exactly() -> None:
    reward = torch.tensor([[0.0, 0.25], [0.0, 0.25001], [0.5, 0.5]])
    for choose in ("extremes", "random", "all"):
        which, win, lose = compare(reward, choose, 0.25, torch.zeros(3))
        assert (which.tolist(), win.tolist(), lose.tolist()) == ([1], [1], [0])


@pytest.mark.parametrize("letters", range(3, 12))
def test_a_gap_of_one_letter_means_the_same_for_good_and_for_bad_images(letters: int) -> None:
    """Rewards 1 - edits / letters in float32: their differences round either way."""
    reward = torch.tensor([[1 - edits / letters for edits in range(letters + 1)]])
    for gap, least in ((1 / letters, 2), (0.99 / letters, 1)):
        _, win, lose = compare(reward, "all", gap, torch.zeros(1))
        assert set(zip(win.tolist(), lose.tolist(), strict=True)) == {
            (i, j) for i in range(letters + 1) for j in range(letters + 1) if j - i >= least
        }
        told = margin_mask(reward, gap)[0].nonzero()
        assert {(int(i), int(j)) for i, j in told} == set(zip(win.tolist(), lose.tolist(), strict=True))


def test_groups_without_spread_or_scores_make_no_pair(make: Any) -> None:
    for name in ("Constant", "Raises"):
        rig, method = make(name), DiffusionDPO(prompts=3, group=4)
        batch = method.collect(rig)
        assert len(batch.prompt_ids) == 0 and rig.mean("groups/informative") == 0 and rig.mean("pairs/kept") == 0
        assert rig.meter.images == 12  # paid for all the same


@pytest.mark.parametrize("collector", ["policy", "reference"])
def test_after_a_refresh_the_policy_is_the_reference(make: Any, collector: Any) -> None:
    rig = make()
    method = DiffusionDPO(
        prompts=3, group=4, ref_update_step=2, collector=collector, optim=Optim(lr=1e-3, minibatches=1)
    )
    adam, at = optimiser(method, rig), math.log(2) / method.beta
    numbers = go(method, rig, adam, 4)
    # Half a difference of squared errors of size 1, of velocities that agree to rounding: below 1e-6; an update moves it by 1e-4.
    still = [abs(n["policy/loss"] - at) < 1e-6 for n in numbers]
    assert still == [True, False, True, False]  # the first update of each refresh begins at its reference
    # The squared difference of two velocities of size 1: with a gradient torch may choose another kernel, whose rounding is below
    # 1e-6 of them; an update of this learning rate moves them by 1e-3.
    assert [n["policy/kl"] < 1e-12 for n in numbers] == still
    assert set(rig.meter.roles) == {"rollout", "policy", "old"}


def test_who_collects(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    rig = make()
    real = rig.groups
    monkeypatch.setattr(rig, "groups", lambda *a, **k: asked.append(k["weights"]) or real(*a, **k))
    for collector, refresh in (("policy", 0), ("policy", 3), ("reference", 0), ("reference", 3)):
        DiffusionDPO(prompts=1, group=2, collector=collector, ref_update_step=refresh).collect(rig)  # type: ignore[arg-type]
    assert asked == ["policy", "policy", "ref", "old"]


# Given pairs


def test_given_pairs_cost_no_rollout(make: Any, dataset: str) -> None:
    rig, method = make(), DiffusionDPO(pairs=dataset, prompts=8, optim=Optim(epochs=2, minibatches=2, micro=3))
    numbers = go(method, rig, optimiser(method, rig), 2)
    roles = rig.meter.roles
    data = roles.pop("data")
    assert (
        data == 24 * 6 * 4 and rig.meter.images == rig.meter.reward_calls == 24 * 6
    )  # what the set said it cost, once
    per_image = method.cost(rig.model.steps, rig.model.guidance)
    assert dict(roles) == {role: 2 * 16 * each for role, each in per_image.items()}  # 2 iterations, 8 pairs each
    assert all(n["pairs/usable"] == 24 and n["pairs/skipped"] == 0 and n["batch/rows"] == 8 for n in numbers)


def accuracy(method: DiffusionDPO, rig: MeteredRig) -> float:
    """The implicit accuracy over a hundred pairs at three timesteps each."""
    rig.notes()
    batch = rig.pairs(method.pairs, 100)
    with torch.no_grad():
        for k in range(3):
            with rig.keyed(torch.arange(100) + 1000 * k):
                method.loss(rig, batch)
    return rig.mean("policy/accuracy")


def test_learning_from_given_pairs_ranks_pairs_it_never_saw(
    make: Any, tiny_pipe: Path, redness: str, tmp_path: Path
) -> None:
    for name, seed in (("seen", 3), ("unseen", 99)):
        make_pairs(
            PairsRequest(str(tiny_pipe), f"{redness}:Paint", prompts=100, group=8, seed=seed),
            tmp_path / name,
            NullProgress(),
        )
    rig = make(adapter=SMALL["adapter"])
    optim = Optim(lr=3e-3, weight_decay=0, minibatches=1)
    method = DiffusionDPO(pairs=str(tmp_path / "seen"), prompts=32, beta=30.0, optim=optim)
    unseen = replace(method, pairs=str(tmp_path / "unseen"))
    assert accuracy(method, rig) == accuracy(unseen, rig) == 0.5
    go(method, rig, optimiser(method, rig), 60)
    seen = accuracy(method, rig), accuracy(unseen, rig)
    # Without learning both are 0.5. Seeds 0 to 3: 0.72 to 0.81 of the seen pairs, 0.58 to 0.70 of the unseen; this one 0.777 and
    # 0.590, within 0.003 (one pair) whatever the instructions, and with weights moved by 1e-5 of themselves.
    assert seen[0] > 0.65 and seen[1] > 0.55, seen


@pytest.mark.parametrize("way", ["online", "refresh", "offline"])
def test_two_and_two_iterations_are_four(make: Any, dataset: str, tmp_path: Path, way: str) -> None:
    """A checkpoint between them changes not a bit; nor does the seed's second life."""
    own: dict[str, Any] = {
        "refresh": {"ref_update_step": 3, "collector": "reference"},
        "offline": {"pairs": dataset},
    }.get(way, {})
    method = DiffusionDPO(prompts=4, group=3, choose="random", optim=Optim(lr=1e-3, epochs=2, ema=0.5, warmup=3), **own)
    whole, twin, before, after = (make() for _ in range(4))
    for rig in (whole, twin):
        go(method, rig, optimiser(method, rig), 4)
    adam = optimiser(method, before)
    go(method, before, adam, 2)
    checkpoint.save(tmp_path, 2, before, adam, {})
    adam = optimiser(method, after)
    assert checkpoint.restore(tmp_path, after, adam, print) is not None
    go(method, after, adam, 2)
    for other in (twin, after):
        assert weights(other).keys() == weights(whole).keys()
        assert all(torch.equal(v, weights(other)[k]) for k, v in weights(whole).items())
        assert other.meter.roles == whole.meter.roles and other.meter.images == whole.meter.images
        assert other.state == whole.state


# As a method


@pytest.mark.parametrize("choose", ["extremes", "random", "all"])
@pytest.mark.parametrize("guidance", [0.0, 4.5])
@pytest.mark.parametrize("refresh", [0, 1])
def test_the_static_cost_is_what_the_meter_shows(make: Any, choose: Any, guidance: float, refresh: int) -> None:
    rig = make(push=0.02)
    method = DiffusionDPO(
        prompts=3, group=4, steps=5, guidance=guidance, choose=choose, ref_update_step=refresh,
        optim=Optim(epochs=2, minibatches=1, micro=1),
    )  # fmt: skip
    go(method, rig, optimiser(method, rig), 1)
    expected = {role: 12 * each for role, each in method.cost(rig.model.steps, rig.model.guidance).items()}
    assert dict(rig.meter.roles) == pytest.approx(expected)
    assert rig.meter.images == rig.meter.reward_calls == 12


def test_it_makes_the_model_better(make: Any) -> None:
    rig = make(nfe=8_000, adapter=SMALL["adapter"])
    method = DiffusionDPO(prompts=6, group=8, beta=30.0, optim=Optim(lr=3e-3, weight_decay=0, minibatches=1))
    why = train(method, rig, optimiser(method, rig), after=lambda numbers: None)
    assert why == "budget: nfe"
    rig.meter = Meter(Budget(nfe=1e9))
    x, prompt_ids = rig.noise(60), torch.arange(6).repeat(10)
    gain = rig.score(rig.sample(x, prompt_ids), prompt_ids) - rig.score(
        rig.sample(x, prompt_ids, weights="ref"), prompt_ids
    )  # on the same noise
    # 17.7 standard errors (17 to 23 with other seeds), the same to three digits with other instructions
    assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(60)


@pytest.mark.parametrize(
    "bad",
    [
        {"group": 1},
        {"prompts": 0},
        {"beta": 0},
        {"beta": -1},
        {"margin": -0.1},
        {"ref_update_step": -1},
        {"steps": -1},
        {"guidance": -1},
        {"t_min": 1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"diffusion-dpo: .*{next(iter(bad))}"):
        DiffusionDPO(**bad)


@pytest.mark.parametrize("bad", ["choose=best", "collector=old", "timestep_sampling=log"])
def test_a_word_that_is_no_choice_is_refused(bad: str, redness: str) -> None:
    with pytest.raises(UserError, match=f"setting {bad.partition('=')[0]}"):
        resolve(RunRequest("dpo", f"{redness}:Paint", "tiny", sets=[bad]))


def test_its_presets_and_variants_resolve() -> None:
    assert load("method", "dpo") is load("method", "diffusion-dpo") is DiffusionDPO
    assert variants("diffusion-dpo") == ["random", "margin", "offline"]
    for model in ("tiny", "sd35m"):
        plain = resolve(RunRequest("dpo", "ocr", model)).settings
        assert resolve(RunRequest("dpo:random", "ocr", model)).settings == replace(plain, choose="random")
        assert resolve(RunRequest("dpo:offline", "ocr", model)).settings == replace(
            plain, pairs="pairs", prompts=32, collector="policy", ref_update_step=0
        )  # the reference of a fixed data set never moves
        gap = resolve(RunRequest("dpo:margin", "ocr", model)).settings
        assert (gap.choose, gap.margin) == ("all", 0.25)


def test_the_method_owns_no_loop_optimiser_device_or_file() -> None:
    tree = ast.parse(inspect.getsource(module))
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom | ast.Import) for a in n.names}
    forbidden = {"cuda", "device", "backward", "Adam", "AdamW", "open", "Path", "save", "step", "randn", "manual_seed"}
    assert not forbidden & words

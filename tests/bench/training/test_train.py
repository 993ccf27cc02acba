"""The one loop: it stops for a reason, keeps the last whole update, and does not care how a batch is split."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import InitialNoise, Optim, Prompt
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import PATIENCE, Gradients, _fit, optimiser, train  # pyright: ignore[reportPrivateUsage]
from gpobench.methods.gpo import GPO


@dataclass(frozen=True)
class Shrink:
    """Pull the velocity to zero: the plainest method there is, with ways to go wrong."""

    optim: Optim = field(default_factory=lambda: Optim(minibatches=2))
    rows: int = 4
    scale: float = 1.0
    ratio: float = 1.0

    def collect(self, rig: MeteredRig) -> InitialNoise:
        return InitialNoise(rig.noise(max(1, self.rows))[: self.rows], rig.prompts(5).repeat(9)[: self.rows])

    def loss(self, rig: MeteredRig, batch: InitialNoise) -> Tensor:
        rig.note("policy/ratio", self.ratio)
        v = rig.velocity(batch.noise, rig.uniform(len(batch.prompt_ids)), batch.prompt_ids)
        return self.scale * v.square().mean()


@pytest.fixture
def make(tiny_pipe: Path, redness: str) -> Iterator[Any]:
    made: list[MeteredRig] = []

    def build(**bounds: float) -> MeteredRig:
        model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)
        book = [Prompt(p) for p in ("a red circle", "two blue squares", "a sign", "a card", "a photo")]
        made.append(MeteredRig(model, book, scorer(f"{redness}:Redness"), Meter(Budget(**bounds)), rows=8))
        return made[-1]

    yield build
    for rig in made:
        rig.close()


def go(method: Any, rig: MeteredRig, **more: Any) -> tuple[str, list[dict[str, float]]]:
    seen: list[dict[str, float]] = []
    why = train(method, rig, optimiser(method, rig), after=seen.append, **more)
    return why, seen


Make = Callable[..., MeteredRig]


def test_it_stops_at_the_bound_and_says_which(make: Make) -> None:
    rig = make(updates=5)
    why, seen = go(Shrink(), rig)
    assert why == "budget: updates" and rig.meter.updates == 5
    assert len(seen) == rig.iteration == 2  # the third iteration ended in its middle
    assert seen[0].keys() >= {"policy/loss", "policy/grad_norm", "batch/rows"}


def test_an_update_that_cannot_be_paid_is_not_made(make: Make) -> None:
    """With 18 evaluations, three a row: two updates of two rows, then two rows, and no third update is begun."""
    rig = make(nfe=6 * 3 - 1)
    why, _ = go(Shrink(optim=Optim(minibatches=2, micro=1)), rig)
    assert why == "budget: nfe" and rig.meter.updates == 2 and rig.meter.nfe == 15
    weights = [p.detach().clone() for p in rig.model.parameters()]
    other = make(updates=2)
    go(Shrink(optim=Optim(minibatches=2, micro=1)), other)
    assert all(torch.equal(a, b) for a, b in zip(weights, other.model.parameters(), strict=True))
    assert all(p.grad is None for p in rig.model.parameters())


def test_the_clock_runs_in_training_only(make: Make) -> None:
    rig = make(updates=4)
    ran: list[bool] = []
    train(
        Shrink(), rig, optimiser(Shrink(), rig), 
        after=lambda numbers: ran.append(rig.meter._since is None),  # pyright: ignore[reportPrivateUsage]
    )  # fmt: skip
    assert ran == [True, True] and rig.meter.seconds > 0
    stood = rig.meter.seconds
    assert rig.meter.seconds == stood


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (Shrink(scale=math.nan), "the loss is nan"),
        (Shrink(scale=math.inf), "the loss is inf"),
        (Shrink(ratio=1000.0), "exploded: the policy ratio is 1e+03"),
        (Shrink(ratio=1e-4), "exploded: the policy ratio is 0.0001"),
        (Shrink(rows=0), f"collapsed: the rewards of every group were equal for {PATIENCE} iterations"),
    ],
)
def test_a_run_gone_wrong_says_how(make: Make, method: Shrink, why: str) -> None:
    rig = make(updates=100)
    said, _ = go(method, rig)
    assert said.startswith(why)
    assert all(bool(p.isfinite().all()) for p in rig.model.parameters())
    assert rig.meter.updates <= 1


def test_a_gradient_that_is_not_finite_moves_nothing(make: Make) -> None:
    rig = make(updates=100)
    before = [p.detach().clone() for p in rig.model.parameters()]

    def backward(loss: Tensor) -> None:
        (loss * math.inf).backward()

    why = train(Shrink(), rig, optimiser(Shrink(), rig), gradients=Gradients(backward), after=lambda numbers: None)
    assert why.startswith("the gradient's norm is") and rig.meter.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(before, rig.model.parameters(), strict=True))


def test_an_update_that_makes_weights_that_are_not_finite_is_undone(make: Make) -> None:
    """Loss and gradient are finite, and the third step overflows in one number: the weights are those of the second."""
    method = Shrink(optim=Optim(minibatches=2, ema=0.5))
    other = make(updates=2)
    go(method, other)
    rig = make(updates=100)
    optimizer = optimiser(method, rig)
    step = optimizer.step

    def overflow(*arguments: Any) -> None:
        step(*arguments)
        if rig.meter.updates == 3:
            with torch.no_grad():
                rig.model.parameters()[-1].view(-1)[-1] = math.inf

    optimizer.step = overflow  # type: ignore[method-assign, assignment]
    why = train(method, rig, optimizer, after=lambda numbers: None)
    assert why == "the weights are not finite after 3 updates: the last one was undone"
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), rig.model.parameters(), strict=True))
    assert all(bool(tensor.isfinite().all()) for tensor in rig.model.weight_state().values())


class Poisoned(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.full_like(gradients[0], math.nan)


@dataclass(frozen=True)
class PoisonedShrink(Shrink):
    """A finite loss whose gradient is NaN, in the second micro-batch only."""

    def loss(self, rig: MeteredRig, batch: InitialNoise) -> Tensor:
        loss = super().loss(rig, batch)
        rig.state["parts"] = rig.state.get("parts", 0) + 1
        return Poisoned.apply(loss) if rig.state["parts"] == 2 else loss  # type: ignore[no-any-return]


def test_one_micro_batch_whose_gradient_is_not_finite_stops_the_update(make: Make) -> None:
    rig = make(updates=100)
    before = [p.detach().clone() for p in rig.model.parameters()]
    why, _ = go(PoisonedShrink(optim=Optim(minibatches=1, micro=1)), rig)
    assert why == "the gradient's norm is nan after 0 updates" and rig.state["parts"] == 4
    assert all(torch.equal(a, b) for a, b in zip(before, rig.model.parameters(), strict=True))


@pytest.mark.parametrize("factor", [2.0**16, 2.0**127])
def test_scaled_losses_make_the_same_updates(make: Make, factor: float) -> None:
    """A power of two rounds nothing; where it makes gradients overflow, the update is skipped and the factor halved until they do not."""
    method = Shrink(optim=Optim(minibatches=1, lr=1e-2), scale=2.0**8)

    def once(scaler: GradScaler | None) -> tuple[list[Tensor], list[float]]:
        rig = make(nfe=1e9)
        numbers: list[dict[str, float]] = []
        why = train(
            method, rig, optimiser(method, rig), gradients=Gradients(scaler=scaler) if scaler else None,
            after=numbers.append, interrupted=lambda: rig.meter.updates >= 1,
        )  # fmt: skip
        assert why == "interrupted"
        return list(rig.model.parameters()), [n["policy/skipped"] for n in numbers if "policy/skipped" in n]

    scaler = GradScaler("cpu", init_scale=factor)
    after, skipped = once(scaler)
    assert skipped[-1] == 0 and all(skipped[:-1]) and scaler.get_scale() == factor / 2 ** (len(skipped) - 1)
    if factor > 2.0**100:
        assert len(skipped) > 1
        return  # later iterations draw other rows
    plain, never = once(None)
    assert not never and all(torch.equal(a, b) for a, b in zip(after, plain, strict=True))


def test_a_gradient_that_is_never_finite_ends_a_scaled_run(make: Make) -> None:
    rig = make(updates=100)

    def backward(loss: Tensor) -> None:
        (loss * math.inf).backward()

    scaler = GradScaler("cpu", init_scale=8.0)
    gradients = Gradients(backward, scaler)
    why = train(Shrink(), rig, optimiser(Shrink(), rig), gradients=gradients, after=lambda numbers: None)
    assert why.startswith("the gradient's norm is") and rig.meter.updates == 0 and scaler.get_scale() == 1


def test_a_few_iterations_without_signal_do_not_end_a_run(make: Make) -> None:
    @dataclass(frozen=True)
    class Moody(Shrink):
        def collect(self, rig: MeteredRig) -> InitialNoise:
            without_signal = rig.iteration % PATIENCE != 0
            return (
                super().collect(rig)
                if not without_signal
                else InitialNoise(rig.noise(1)[:0], torch.zeros(0, dtype=torch.long))
            )

    rig = make(updates=6)
    assert go(Moody(), rig)[0] == "budget: updates" and rig.iteration == 3 * PATIENCE


def test_an_interruption_ends_a_whole_iteration(make: Make) -> None:
    rig = make(updates=100)
    why, seen = go(Shrink(), rig, interrupted=lambda: rig.iteration == 3)
    assert why == "interrupted" and len(seen) == 3 and rig.meter.updates == 6


@pytest.mark.parametrize("link", ["logsigmoid", "pairwise", "linear"])
def test_splitting_a_minibatch_changes_neither_loss_nor_gradient(make: Make, link: Any) -> None:
    def fit(micro: int) -> tuple[list[Tensor], float, int]:
        rig = make(nfe=1e9)
        o = Optim(lr=1.0, weight_decay=0, clip=1e9, minibatches=1, micro=micro)
        method = GPO(optim=o, prompts=5, group=4, beta=10.0, loss_type=link, kl=0.1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in rig.model.parameters():  # away from the reference, where the sigmoid is not flat
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        before = [p.detach().clone() for p in rig.model.parameters()]
        batch = method.collect(rig)
        steepest = torch.optim.SGD(rig.model.parameters(), lr=1.0)  # one step is minus the gradient
        _fit(method, rig, steepest, Gradients(), batch, len(batch.prompt_ids))
        moved = [a - b.detach() for a, b in zip(before, rig.model.parameters(), strict=True)]
        return moved, rig.meter.updates, rig.meter.nfe

    (whole, updates, nfe), *parts = (fit(micro) for micro in (0, 1, 2))
    assert max(float(g.abs().max()) for g in whole) > 1e-4 and updates == 1
    for moved, u, n in parts:
        assert (u, n) == (updates, nfe)
        for a, b in zip(moved, whole, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_epochs_and_minibatches_make_the_updates(make: Make) -> None:
    rig = make(nfe=1e9)
    method = Shrink(optim=Optim(epochs=3, minibatches=2), rows=5)
    train(
        method, rig, optimiser(method, rig), 
        after=lambda numbers: None, interrupted=lambda: True,
    )  # fmt: skip
    assert rig.meter.updates == 6 and rig.meter.nfe == 3 * 5 * 3


def test_the_rate_warms_up(make: Make) -> None:
    rig, rates = make(updates=6), []
    method = Shrink(optim=Optim(lr=1e-3, warmup=4, minibatches=1))
    adam = optimiser(method, rig)
    train(
        method, rig, adam, 
        after=lambda numbers: rates.append(adam.param_groups[0]["lr"]),
    )  # fmt: skip
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_the_average_follows_the_updates(make: Make) -> None:
    rig = make(updates=2)
    go(replace(Shrink(), optim=Optim(ema=0.75, minibatches=2, lr=1e-2)), rig)
    assert rig.model.lora.copies == ["ema"]
    state = rig.model.lora.state()
    gaps = [float((state[f"policy/{k[4:]}"] - v).abs().max()) for k, v in state.items() if k.startswith("ema/")]
    assert 0 < max(gaps) < 0.01


def recorded_copies(rig: MeteredRig, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """(name, decay) of every later update of a weight copy."""
    calls: list[tuple[str, float]] = []
    update = rig.model.update_copy
    monkeypatch.setattr(
        rig.model, "update_copy", lambda name, decay: (calls.append((name, decay)), update(name, decay))
    )
    return calls


def test_the_decay_of_the_average_warms_up_from_the_untrained_weights(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, from the weights after each update: a_k = d a_(k-1) + (1 - d) w_k with d = min((1 + k) / (10 + k), ema)."""
    rig = make(updates=6)
    weights = [rig.model.lora.state()]
    calls: list[tuple[str, float]] = []
    update = rig.model.update_copy

    def record(name: str, decay: float) -> None:
        if decay:
            weights.append(rig.model.lora.state())
        calls.append((name, decay))
        update(name, decay)

    monkeypatch.setattr(rig.model, "update_copy", record)
    go(Shrink(optim=Optim(ema=0.3, lr=1e-2)), rig)
    assert calls == [("ema", 0.0), *(("ema", min((1 + k) / (10 + k), 0.3)) for k in range(1, 7))]
    assert [decay for _, decay in calls][:4] == pytest.approx([0.0, 2 / 11, 3 / 12, 0.3])
    state = rig.model.lora.state()
    for key in (k.removeprefix("policy/") for k in weights[0]):
        average = weights[0][f"policy/{key}"].double()
        for k, after in enumerate(weights[1:], 1):
            decay = min((1 + k) / (10 + k), 0.3)
            average = decay * average + (1 - decay) * after[f"policy/{key}"].double()
        assert torch.allclose(state[f"ema/{key}"].double(), average, atol=1e-6)


def test_the_average_takes_in_every_so_many_updates(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flow-GRPO's: where (update + 1) is a multiple of the interval, so first after update 3 of an interval of 4."""
    rig = make(updates=8)
    calls = recorded_copies(rig, monkeypatch)
    go(Shrink(optim=Optim(ema=0.9, ema_interval=4, minibatches=2, lr=1e-2)), rig)
    assert calls == [("ema", 0.0), ("ema", 4 / 13), ("ema", 8 / 17)]


def test_without_averaging_there_is_no_copy(make: Make) -> None:
    rig = make(updates=2)
    go(Shrink(), rig)
    assert rig.model.lora.copies == []


@pytest.mark.parametrize("updates, warm, cold", [(16, 14.30, 8.67), (52, 46.70, 43.04), (230, 221.0, 221.0)])
def test_the_mean_age_of_the_average(updates: int, warm: float, cold: float) -> None:
    """The update at which the averaged weights stand on average; with the warm-up a short run is judged on its own weights."""
    for optim, stands in ((Optim(ema=0.9), warm), (Optim(ema=0.9, ema_warmup=1), cold)):
        share = [1.0]  # of the weights after update k, k = 0, 1, ...
        for k in range(1, updates + 1):
            decay = optim.ema_decay(k)
            share = [decay * part for part in share] + [1 - decay]
        assert sum(share) == pytest.approx(1)
        assert sum(k * part for k, part in enumerate(share)) == pytest.approx(stands, abs=0.005)
    assert Optim(ema=0.99).ema_decay(79) == pytest.approx(80 / 89) and Optim(ema=0.9).ema_decay(80) == 0.9


@pytest.mark.parametrize("bad", [{"ema_warmup": 0}, {"ema_interval": 0}, {"ema": 1.0}])
def test_settings_of_the_average_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"optim.{next(iter(bad))} "):
        Optim(**bad)


def test_the_gradient_is_clipped(make: Make) -> None:
    rig = make(updates=1)
    method = Shrink(optim=Optim(clip=1e-3, minibatches=1), scale=1e3)
    norms: list[float] = []

    def step(*args: Any) -> None:
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in rig.model.parameters() if p.grad is not None)))

    adam = optimiser(method, rig)
    adam.register_step_pre_hook(step)
    train(method, rig, adam, after=lambda numbers: None)
    assert norms and norms[0] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (None, "NoneType"),
        (0.5, "float"),
        (torch.tensor(3), "a tensor of shape (), int64, without a gradient"),
        (torch.tensor(0.5), "a tensor of shape (), float32, without a gradient"),
        (torch.ones(3, requires_grad=True), "a tensor of shape (3,), float32, with a gradient"),
    ],
)
def test_a_loss_that_is_no_number_with_a_gradient_is_refused(make: Make, loss: Any, shown: str) -> None:
    @dataclass(frozen=True)
    class Odd(Shrink):
        def loss(self, rig: Any, batch: Any) -> Any:
            return loss

    with pytest.raises(
        UserError,
        match=re.escape(
            f"Odd.loss must return one number with a gradient, a floating-point tensor of shape (); it returned {shown}"
        ),
    ):
        go(Odd(), make(updates=2))


@pytest.mark.parametrize("batch", [None, "x", InitialNoise])
def test_a_batch_that_is_none_is_refused(make: Make, batch: Any) -> None:
    @dataclass(frozen=True)
    class Odd(Shrink):
        def collect(self, rig: Any) -> Any:
            return batch

    with pytest.raises(UserError, match="Odd.collect must return a batch, a dataclass of rows; it returned"):
        go(Odd(), make(updates=2))


@pytest.mark.parametrize("where", ["collect", "loss"])
def test_a_method_that_ends_the_process_does_not_end_the_run_in_silence(make: Make, where: str) -> None:
    def leave(*_: Any) -> Any:
        raise SystemExit(0)

    odd = type("Odd", (Shrink,), {where: leave})
    with pytest.raises(UserError, match=r"Odd called sys.exit\(0\) in the middle of a run"):
        go(odd(), make(updates=2))

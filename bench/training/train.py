"""The training loop that every method shares: collect and fit until the budget is spent or training fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

from ..budget import Spent
from ..errors import UserError
from ..spec import Method, batch_size, select_rows
from .observation import MISMATCH
from .rig import MeteredRig, read_numbers
from .unscored import expect_scores

PATIENCE = 25  # iterations in which no group's rewards differ, after which a run counts as collapsed
PLANNED = ("budget:", "search:")  # how the stop reason of a run begins that ended as planned
COLLAPSED = "collapsed:"  # how it begins where the rewards of every group were equal
RATIO = (1e-2, 1e2)  # a mean policy ratio outside of this counts as exploded


class Stop(Exception):
    """Ends training with a reason that goes into the record."""


def optimiser(method: Method, rig: MeteredRig) -> torch.optim.Optimizer:
    """AdamW on the trained parameters, with the method's settings."""
    o = method.optim
    return torch.optim.AdamW(rig.model.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)


def _plain_backward(loss: torch.Tensor) -> None:
    loss.backward()


@dataclass(frozen=True)
class Gradients:
    """How the gradients of a loss are computed: by which backward pass, and scaled by what."""

    backward: Callable[[torch.Tensor], None] = _plain_backward
    # Multiplies losses where gradients would vanish in half precision; an update that overflows is skipped, and tried anew
    # with half the factor.
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))


def train(
    method: Method,
    rig: MeteredRig,
    optimizer: torch.optim.Optimizer,
    *,
    after: Callable[[dict[str, float]], None],
    gradients: Gradients | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    watched: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> str:
    """Train until the budget is spent; returns why training stopped. The weights are those of the last complete update.

    Args:
        method: collects a batch and computes its loss.
        rig: what the method may use.
        optimizer: of the trained parameters, from `optimiser`.
        after: called with the iteration's notes at the end of every iteration, the clock stopped; it writes, evaluates and
            saves checkpoints.
        gradients: how they are computed; None is `loss.backward()` without scaling.
        interrupted: asked after every iteration whether to stop.
        watched: entered around all that the budget pays for, as the clock is started and stopped: `Observer.training`.

    Raises:
        Unscored: when the scorer gave no image of an iteration a score.
    """
    try:
        rig.meter.agree(rig.processes)
        while True:
            with watched():
                rig.meter.start()
                since = rig.meter.since
                try:
                    _iterate(method, rig, optimizer, gradients or Gradients())
                except Spent:
                    rig.drain()  # what was charged before is still scored
                    raise
                rig.drain()
                if rig.meter.since != since:
                    raise Stop(f"{MISMATCH} the clock was stopped inside an iteration")
                rig.meter.stop()
            rig.meter.agree(rig.processes)
            after(rig.notes())
            if rig.processes.any(interrupted()):
                return "interrupted"
    except Spent as spent:
        return f"budget: {spent.currency}"
    except Stop as stop:
        return str(stop)
    finally:
        rig.meter.stop()
        optimizer.zero_grad(set_to_none=True)  # drops the gradients of an unfinished update


def _iterate(method: Method, rig: MeteredRig, optimizer: torch.optim.Optimizer, gradients: Gradients) -> None:
    """Collect a batch and update the weights on it."""
    with expect_scores(rig), _no_exit(method):
        batch = method.collect(rig.view)
    if not is_dataclass(batch) or isinstance(batch, type) or not fields(batch):
        raise UserError(
            f"{_name(method)}.collect must return a batch, a dataclass of rows; it returned {_described(batch)}"
        )
    rows = batch_size(batch)
    rig.note("batch/rows", rows)
    rig.iterations_without_signal = rig.iterations_without_signal + 1 if rows == 0 else 0
    if rig.iterations_without_signal >= PATIENCE:
        raise Stop(f"{COLLAPSED} the rewards of every group were equal for {PATIENCE} iterations")
    if rows:
        _fit(method, rig, optimizer, gradients, batch, rows)
    rig.iteration += 1


def _fit(
    method: Method, rig: MeteredRig, optimizer: torch.optim.Optimizer, gradients: Gradients, batch: Any, rows: int
) -> None:
    """Update the weights on a batch: epochs of minibatches, each in micro-batches."""
    o = method.optim
    for _ in range(o.epochs):
        for minibatch in torch.randperm(rows, generator=rig.rng).chunk(o.minibatches):
            with expect_scores(rig):  # where the loss asks for scores
                losses = _differentiate(method, rig, gradients, batch, minibatch)
                rig.settle_reward_gradients()
            rig.meter.settle_deferred()
            rig.processes.sum_gradients(rig.model.parameters())
            ratio = _update(method, rig, optimizer, gradients.scaler, losses)
            if not math.isnan(ratio) and not RATIO[0] < ratio < RATIO[1]:
                raise Stop(f"exploded: the policy ratio is {ratio:.3g} after {rig.meter.updates} updates")


def _differentiate(
    method: Method, rig: MeteredRig, gradients: Gradients, batch: Any, minibatch: torch.Tensor
) -> list[torch.Tensor]:
    """Add up the gradients of the rows of a minibatch that this process computes; returns their losses, which are not read yet."""
    keys = torch.randint(2**62, (len(minibatch),), generator=rig.rng)
    losses: list[torch.Tensor] = []
    for k, rows in enumerate(torch.arange(len(minibatch)).split(method.optim.micro or len(minibatch))):
        with rig.keyed(keys[rows]), rig.turn(k) as computed_here:
            with _no_exit(method):
                loss = method.loss(rig.view, select_rows(batch, minibatch[rows]))
            if computed_here:  # elsewhere the network is not evaluated, and the loss has no gradient
                loss = _checked_loss(method, loss)
            rig.note("policy/loss", loss)
        if computed_here:
            losses.append(loss.detach())
            gradients.backward(gradients.scaler.scale(loss * (len(rows) / len(minibatch))))
    return losses


def _checked_loss(method: Method, loss: Any) -> torch.Tensor:
    """Return the loss if it is one number with a gradient; UserError otherwise."""
    if isinstance(loss, torch.Tensor) and loss.ndim == 0 and loss.is_floating_point() and loss.requires_grad:
        return loss
    raise UserError(
        f"{_name(method)}.loss must return one number with a gradient, a floating-point tensor of shape (); "
        f"it returned {_described(loss)}"
    )


@contextmanager
def _no_exit(method: Method) -> Generator[None]:
    """Raise UserError where the method's code ends the process: a run that is cut short this way would look like a success."""
    try:
        yield
    except SystemExit as end:
        raise UserError(f"{_name(method)} called sys.exit({end.code!r}) in the middle of a run") from end


def _name(method: Method) -> str:
    return type(method).__name__


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    gradient = "with" if value.requires_grad else "without"
    return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, {gradient} a gradient"


def _update(
    method: Method,
    rig: MeteredRig,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    losses: Sequence[torch.Tensor],
) -> float:
    """Clip the gradient and step the optimiser, unless half precision overflowed; returns the mean policy ratio, NaN without one.

    The device is waited for twice: losses, ratios and norm are read together before the step, and after it whether the weights are finite.

    Raises:
        Stop: where a loss, the gradient's norm or a weight is not finite.
    """
    o = method.optim
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(rig.model.parameters(), o.clip)
    ratios = rig.noted("policy/ratio")
    norm_value, *values = read_numbers([norm, *losses, *ratios])
    infinite = [loss for loss in values[: len(losses)] if not math.isfinite(loss)]
    parts = rig.processes.gather((infinite[-1:], values[len(losses) :]))
    for infinite_losses, _ in parts:
        if infinite_losses:
            raise Stop(f"the loss is {infinite_losses[0]:g} after {rig.meter.updates} updates")
    all_ratios = [ratio for _, of_part in parts for ratio in of_part]
    ratio = sum(all_ratios) / len(all_ratios) if all_ratios else math.nan
    overflowed = not math.isfinite(norm_value)
    if scaler.is_enabled():
        rig.note("policy/skipped", float(overflowed))
        if overflowed and scaler.get_scale() > 1:  # the factor was too large, not the gradient
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            return ratio
    if overflowed:
        raise Stop(f"the gradient's norm is {norm_value:g} after {rig.meter.updates} updates")
    rig.meter.charge(updates=1)
    rig.note("policy/grad_norm", norm)
    for group in optimizer.param_groups:
        group["lr"] = o.lr * min(1.0, rig.meter.updates / o.warmup if o.warmup else 1.0)
    if o.ema and "ema" not in rig.model.copies:
        rig.model.update_copy("ema", 0.0)  # the average begins at the untrained weights, as in the published code
    parameters = rig.model.parameters()
    previous = [parameter.detach().clone() for parameter in parameters]
    scaler.step(optimizer)
    if not bool(torch.stack([parameter.isfinite().all() for parameter in parameters]).all()):
        with torch.no_grad():
            for parameter, value in zip(parameters, previous, strict=True):
                parameter.copy_(value)
        raise Stop(f"the weights are not finite after {rig.meter.updates} updates: the last one was undone")
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    # The meter's updates are in every checkpoint, so that a resumed run averages with the same decay.
    if o.ema and (rig.meter.updates + 1) % o.ema_interval == 0:
        rig.model.update_copy("ema", o.ema_decay(rig.meter.updates))
    return ratio

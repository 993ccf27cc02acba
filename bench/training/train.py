"""The one loop that every method shares: collect, fit, until the budget is spent or something is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..budget import Spent
from ..spec import Method, Optim, batch_size, select_rows
from .rig import Rig

PATIENCE = 25  # iterations without a single group whose rewards differ, before a run is called collapsed
RATIO = (1e-2, 1e2)  # outside of this the mean policy ratio counts as exploded


class Stop(Exception):
    """Ends training with a reason that goes into the record."""


def optimiser(method: Method, rig: Rig) -> torch.optim.Optimizer:
    """AdamW on the trained parameters, with the method's settings."""
    o = method.optim
    return torch.optim.AdamW(rig.model.parameters(), lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)


def train(
    method: Method,
    rig: Rig,
    adam: torch.optim.Optimizer,
    *,
    backward: Callable[[torch.Tensor], None],
    scaler: torch.amp.GradScaler | None = None,
    after: Callable[[dict[str, float]], None],
    interrupted: Callable[[], bool] = lambda: False,
) -> str:
    """Train until the budget is spent; returns why it stopped. The weights are those of the last complete update.

    backward: how a loss is differentiated. scaler: multiplies losses where gradients would vanish in half precision; an update
    that overflows is skipped, as everywhere, and tried anew with half the factor. after: called at the end of every iteration
    with its numbers, the clock stopped; it writes, judges and checkpoints.
    """
    try:
        rig.meter.agree(rig.processes)
        while True:
            rig.meter.start()
            batch = method.collect(rig)
            rows = batch_size(batch)
            rig.note("batch/rows", rows)
            rig.barren = rig.barren + 1 if rows == 0 else 0
            if rig.barren >= PATIENCE:
                raise Stop(f"collapsed: the rewards of every group were equal for {PATIENCE} iterations")
            if rows:
                _fit(method, rig, adam, batch, rows, backward, scaler or torch.amp.GradScaler(enabled=False))
            rig.iteration += 1
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
        adam.zero_grad(set_to_none=True)  # what an unfinished update had gathered is dropped


def _fit(
    method: Method,
    rig: Rig,
    adam: torch.optim.Optimizer,
    batch: Any,
    rows: int,
    backward: Callable[..., None],
    scaler: torch.amp.GradScaler,
) -> None:
    o = method.optim
    for _ in range(o.epochs):
        for part in torch.randperm(rows, generator=rig.rng).chunk(o.minibatches):
            keys = torch.randint(2**62, (len(part),), generator=rig.rng)
            broken: float | None = None
            for k, some in enumerate(torch.arange(len(part)).split(o.micro or len(part))):
                with rig.keyed(keys[some]), rig.turn(k) as mine:
                    loss = method.loss(rig, select_rows(batch, part[some]))
                    rig.note("policy/loss", loss)
                if mine and not bool(loss.isfinite()):
                    broken = float(loss.detach())
                elif mine:
                    backward(scaler.scale(loss * (len(some) / len(part))))
            for worst in rig.processes.gather([] if broken is None else [broken]):
                if worst:
                    raise Stop(f"the loss is {worst[0]:g} after {rig.meter.updates} updates")
            rig.processes.sum_gradients(rig.model.parameters())
            _update(rig, adam, o, scaler)
            ratio = rig.mean("policy/ratio")
            if not math.isnan(ratio) and not RATIO[0] < ratio < RATIO[1]:
                raise Stop(f"exploded: the policy ratio is {ratio:.3g} after {rig.meter.updates} updates")


def _update(rig: Rig, adam: torch.optim.Optimizer, o: Optim, scaler: torch.amp.GradScaler) -> None:
    scaler.unscale_(adam)
    norm = torch.nn.utils.clip_grad_norm_(rig.model.parameters(), o.clip)
    over = not bool(norm.isfinite())
    if scaler.is_enabled():
        rig.note("policy/skipped", float(over))
        if over and scaler.get_scale() > 1:  # the factor was too large, not the gradient
            scaler.update()
            adam.zero_grad(set_to_none=True)
            return
    if over:
        raise Stop(f"the gradient's norm is {float(norm):g} after {rig.meter.updates} updates")
    rig.meter.charge(updates=1)
    rig.note("policy/grad_norm", norm)
    for group in adam.param_groups:
        group["lr"] = o.lr * min(1.0, rig.meter.updates / o.warmup if o.warmup else 1.0)
    scaler.step(adam)
    scaler.update()
    adam.zero_grad(set_to_none=True)
    if o.ema:
        rig.model.update_copy("ema", o.ema)

"""Laws about one batch: test its loss, its gradient and how `collect` uses scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..budget import Spent
from ..errors import UserError
from ..spec import Search, batch_size, select_rows
from .harness import (
    PERTURBATION,
    STEP_COUNTS,
    Harness,
    collect_rows,
    equal_rewards,
    first_rows,
    loss_and_gradient,
    perturb_weights,
    relative_distance,
    row_keys,
    unscored_everywhere,
    unscored_first_image,
)
from .law import LawBroken, LawSkipped, law


@law("its settings fit the model")
def fits_model(harness: Harness) -> None:
    """Set the smallest number of sampling steps that the method's settings accept, so that the other laws run fast."""
    for harness.model.steps in STEP_COUNTS:
        rig, method = harness.rig(), harness.method
        try:
            if isinstance(method, Search):
                return
            batch = method.collect(rig.view)
            if batch_size(batch):
                loss_and_gradient(method, rig, batch, row_keys(batch))
            return
        except UserError:
            if harness.model.steps == STEP_COUNTS[-1]:
                raise


@law("the loss is a mean over rows")
def loss_is_row_mean(harness: Harness) -> None:
    """The loop splits rows into micro-batches and over devices, so the loss of a batch must be the mean of its parts' losses."""
    rig, method = harness.rig(scale=PERTURBATION), harness.method
    whole = collect_rows(method, rig)
    perturb_weights(rig, PERTURBATION / 2)  # away from the policy that sampled, where every term counts
    few = select_rows(whole, torch.arange(min(5, batch_size(whole))))
    for batch, pieces in ((whole, 2), (few, batch_size(few))):
        rows, keys = torch.arange(batch_size(batch)), row_keys(batch)
        if len(rows) < 2:
            raise LawSkipped("a batch is one row")
        loss, gradient = loss_and_gradient(method, rig, batch, keys)
        parts = [
            (len(r) / len(rows), *loss_and_gradient(method, rig, select_rows(batch, r), keys[r]))
            for r in rows.chunk(pieces)
        ]
        mean_loss = sum(share * float(part) for share, part, _ in parts)
        mean_gradient = torch.stack([share * part for share, _, part in parts]).sum(0)
        if abs(mean_loss - float(loss)) > 1e-4 * max(abs(share * float(part)) for share, part, _ in parts) + 1e-7:
            raise LawBroken(
                f"the loss of {len(rows)} rows is {float(loss):.6g}, the mean of its {pieces} parts {mean_loss:.6g}"
            )
        if (distance := relative_distance(gradient, mean_gradient)) > 1e-3:
            raise LawBroken(
                f"the gradient of {len(rows)} rows and the mean of its {pieces} parts' differ by {distance:.1%}"
            )


@law("where all rewards are equal nothing is learnt")
def equal_rewards_teach_nothing(harness: Harness) -> None:
    """Equal rewards say nothing about which image is better, so their gradient must vanish."""
    rig, method = harness.rig(equal_rewards, nfe=2e5), harness.method
    try:
        batch = method.collect(rig.view)
        gradient = loss_and_gradient(method, rig, batch, row_keys(batch))[1] if batch_size(batch) else None
    except Spent:
        return
    _require_scored(rig)
    if gradient is not None:
        usual_rig = harness.rig()
        usual_batch = collect_rows(method, usual_rig)
        _, usual_gradient = loss_and_gradient(method, usual_rig, usual_batch, row_keys(usual_batch))
        share = float(gradient.norm() / usual_gradient.norm().clamp(min=1e-12))
        if not share < 1e-4:
            raise LawBroken(
                f"{batch_size(batch)} rows with equal rewards have a gradient of {share:.2g} times that of rows with different ones"
            )


def _require_scored(rig: Any) -> None:
    """Raise LawSkipped where the method never called the scorer."""
    if not rig.scorer.images:
        raise LawSkipped("it asks for no reward")


@law("the policy ratio is 1 before the first update")
def ratio_starts_at_one(harness: Harness) -> None:
    """Before the first update the sampling policy is the policy in training; another ratio means that two formulas disagree."""
    for scale in (0.0, PERTURBATION):
        rig, method = harness.rig(scale=scale), harness.method
        batch = collect_rows(method, rig)
        loss_and_gradient(method, rig, batch, row_keys(batch))
        ratio, limit = rig.mean("policy/ratio"), 1e-6 if rig.model.prediction == "velocity" else 1e-5
        if math.isnan(ratio):
            raise LawSkipped("it notes no policy/ratio")
        if not abs(ratio - 1) < limit:
            raise LawBroken(f"policy/ratio is 1 {ratio - 1:+.2g} before any update")


@law("at the reference the accuracy is one half and the drift zero")
def reference_is_neutral(harness: Harness) -> None:
    """Before the first update policy and reference weights predict the same."""
    rig, method = harness.rig(), harness.method
    batch = collect_rows(method, rig)
    loss_and_gradient(method, rig, batch, row_keys(batch))
    accuracy, drift = rig.mean("policy/accuracy"), rig.mean("policy/kl")
    if math.isnan(accuracy) and math.isnan(drift):
        raise LawSkipped("it notes neither policy/accuracy nor policy/kl")
    if not math.isnan(accuracy) and abs(accuracy - 0.5) > 1e-6:
        raise LawBroken(f"policy/accuracy is {accuracy:.4g} at the reference, not 0.5")
    if not math.isnan(drift) and abs(drift) > 1e-9:
        raise LawBroken(f"policy/kl is {drift:.3g} at the reference, not 0")


@law("an image that could not be scored leaves no trace")
def unscored_images_leave_no_trace(harness: Harness) -> None:
    """The weights must not learn from an image whose reward is NaN.

    The same rollout is made twice: as it is, and with the path of the unscored images shifted. Every gradient must be the same.
    """
    rollouts: list[tuple[Any, int, Tensor, Tensor]] = []
    for offset in (0.0, 0.5):
        rig, method = harness.rig(unscored_first_image, scale=PERTURBATION), harness.method
        velocity = rig.charged_velocity
        # A method of the rig.
        setattr(rig, "charged_velocity", partial(_shifted_velocity, velocity, offset))  # noqa: B010
        batch = method.collect(rig.view)
        if rig.scorer.images:  # else the images are drawn and scored in the loss
            setattr(rig, "charged_velocity", velocity)  # noqa: B010
        if not batch_size(batch):
            loss, gradient = torch.zeros(()), torch.zeros(1)
        else:
            perturb_weights(rig, PERTURBATION / 2)
            loss, gradient = loss_and_gradient(method, rig, batch, row_keys(batch))
        setattr(rig, "charged_velocity", velocity)  # noqa: B010
        _require_scored(rig)
        if not (bool(loss.isfinite()) and bool(gradient.isfinite().all())):
            raise LawBroken(f"with one unscored image a prompt the loss is {float(loss):g} and its gradient not finite")
        rollouts.append((rig.scorer, batch_size(batch), loss, gradient))
    _check_all_unscored(harness)
    (scorer, rows, loss, gradient), (shifted_scorer, shifted_rows, shifted_loss, shifted_gradient) = rollouts
    scored = [np.isfinite(np.concatenate(toy.values)) for toy in (scorer, shifted_scorer)]
    images = [np.concatenate(toy.images) for toy in (scorer, shifted_scorer)]
    if not np.array_equal(scored[0], scored[1]) or not np.array_equal(images[0][scored[0]], images[1][scored[1]]):
        raise LawSkipped("its unscored images cannot be changed without changing others")
    if np.array_equal(images[0], images[1]):
        raise LawSkipped("its unscored images cannot be changed from outside")
    if rows != shifted_rows:
        raise LawBroken(f"the content of unscored images changes the number of rows: {rows} or {shifted_rows}")
    distance = relative_distance(gradient, shifted_gradient)
    if distance > 1e-4 or abs(float(loss - shifted_loss)) > 1e-4 * abs(float(loss)) + 1e-7:
        raise LawBroken(
            f"other content in unscored images changes the loss from {float(loss):.6g} to {float(shifted_loss):.6g} "
            f"and the gradient by {distance:.2g} of its length"
        )


def _shifted_velocity(
    velocity: Callable[..., Tensor], offset: float, x: Tensor, t: Tensor, prompt_ids: Tensor, how: Any
) -> Tensor:
    """Return the rig's velocity, with an offset for the first row of each prompt that has more than one.

    A prompt's only row may be the trunk of a tree, from which all of its images branch.
    """
    v, ids = velocity(x, t, prompt_ids, how), prompt_ids.tolist()
    rows = torch.zeros(len(v), *[1] * (v.ndim - 1))
    rows[[row for row in first_rows(ids) if ids.count(ids[row]) > 1]] = offset
    return v + rows.to(v)


def _check_all_unscored(harness: Harness) -> None:
    """Raise LawBroken where a batch without any score has a gradient."""
    rig, method = harness.rig(unscored_everywhere, nfe=2e5), harness.method
    try:
        batch = method.collect(rig.view)
    except Spent:
        return
    if batch_size(batch):
        loss, gradient = loss_and_gradient(method, rig, batch, row_keys(batch))
        if not bool(loss.isfinite()) or not float(gradient.norm()) < 1e-6:
            raise LawBroken(
                f"where no image could be scored the loss is {float(loss):g} and its gradient {float(gradient.norm()):.2g}"
            )

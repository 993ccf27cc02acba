"""Laws about whole runs: test seed, resume, side effects, cost, budget, and that a method learns."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..budget import Budget, Meter
from ..spec import SupportsRewardGradient, counted_guidance
from ..training import checkpoint
from ..training.train import optimiser
from .harness import (
    AMPLE_NFE,
    FAST_OPTIM,
    PROMPTS,
    Harness,
    all_weights,
    differing_keys,
    observed,
    require_as_charged,
    scaled_redness,
    train_iterations,
)
from .law import LawBroken, law


@law("the seed decides and nothing else")
def seed_decides(harness: Harness) -> None:
    """The same seed gives the same weights whatever the global random states are; another seed gives other weights."""
    if keys := differing_keys(harness.first.weights, harness.trained(global_seed=1).weights):
        raise LawBroken(f"the same seed twice gives other weights: {len(keys)} tensors differ, {keys[0]} among them")
    if not differing_keys(harness.first.weights, harness.other.weights):
        raise LawBroken("two seeds give the same weights")


@law("it leaves nothing behind for the next run")
def leaves_nothing_behind(harness: Harness) -> None:
    """A run must not mutate the method instance, its class or its module, or the next run would differ."""
    if harness.other.changed:
        raise LawBroken(f"a run changed its {', '.join(harness.other.changed)}")
    rig = harness.rig()
    train_iterations(harness.other.method, rig, 2)  # the instance that was trained with seed 1, now with seed 0
    if keys := differing_keys(harness.first.weights, all_weights(rig)):
        raise LawBroken(f"after another run the same seed gives other weights: {len(keys)} tensors differ")


@law("a run that was cut off goes on to the same bytes")
def resumes_exactly(harness: Harness) -> None:
    """Two iterations, a checkpoint, fresh objects and two more iterations equal four iterations without a break."""
    uncut, rig, method = harness.first, harness.rig(), harness.make()
    adam = optimiser(method, rig)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 2, uncut.rig, uncut.adam, {})
        checkpoint.restore(Path(folder), rig, adam, lambda text: None)
    train_iterations(uncut.method, uncut.rig, 4, uncut.adam)
    train_iterations(method, rig, 4, adam)
    if keys := differing_keys(_end_state(uncut.rig, uncut.adam), _end_state(rig, adam)):
        raise LawBroken(f"after a resume these differ from an uncut run: {', '.join(keys[:4])} ({len(keys)} in all)")


def _end_state(rig: Any, adam: torch.optim.Optimizer) -> dict[str, Any]:
    """Return all that a run leaves, except the seconds it took."""
    moments = adam.state_dict()["state"]
    meter = rig.meter
    return {
        **{f"weights {key}": value for key, value in all_weights(rig).items()},
        **{
            f"optimiser {i} {key}": value
            for i, parameter_state in moments.items()
            for key, value in parameter_state.items()
        },
        **{f"rig.state[{key!r}]": value for key, value in rig.state.items()},
        "random numbers": rig.rng.get_state(),
        "counts": (
            rig.iteration,
            rig.iterations_without_signal,
            dict(meter.roles),
            meter.images,
            meter.reward_calls,
            meter.updates,
        ),
    }


@law("its cost is what the meter shows")
def cost_matches_meter(harness: Harness) -> None:
    """`cost` must equal the nfe an image that the meter shows, by role, with and without guidance: cost estimates rest on it.

    Images are those sampled for training, or, where none is sampled, those of a data set's pairs; making that data set
    (role "data") is no cost of the method. FLUX takes guidance as an input of the network, so there it costs nothing.
    """
    for guidance in (1.0, 2.5):
        rig, rows = harness.rig(scaled_redness), list[float]()
        rig.model.guidance = guidance
        train_iterations(harness.make(), rig, 1, after=lambda numbers, rows=rows: rows.append(numbers["batch/rows"]))
        images = rig.meter.images or 2 * sum(rows)
        declared = {
            role: nfe for role, nfe in harness.method.cost(rig.model.steps, counted_guidance(rig.model)).items() if nfe
        }
        spent = {role: nfe / images for role, nfe in rig.meter.roles.items() if nfe and role != "data"}
        wrong = [role for role in {**declared, **spent} if abs(declared.get(role, 0) - spent.get(role, 0)) > 1e-6]
        if wrong:
            line = ", ".join(f"{role} {spent.get(role, 0):g}, declared {declared.get(role, 0):g}" for role in wrong)
            raise LawBroken(f"nfe an image at guidance {guidance:g}: {line}")
        differentiated = rig.meter.reward_backwards.total() / images
        method: Any = harness.make()
        stated = method.reward_backwards if isinstance(method, SupportsRewardGradient) else 0.0
        if abs(differentiated - stated) > 1e-6:
            raise LawBroken(
                f"reward_backwards: {differentiated:g} backward passes of the reward an image, declared {stated:g}"
            )


@law("nothing is spent outside the rig")
def spends_through_rig(harness: Harness) -> None:
    """The meter shows every call of network, decoder, scorer and optimiser, counted beside the rig, and nothing was replaced."""
    require_as_charged(harness.first.differences)


@law("a bench as large as that of a real run changes nothing", families=("sd3",))
def same_in_a_real_run(harness: Harness) -> None:
    """What is computed is what was charged also with 320 prompts, a real scorer's name and a budget that ends the run.

    A method that cheats only where it believes itself in a real run is caught here, unless it looks at more than a rig shows;
    every run counts in the same way, so there it is caught too.
    """
    bound, differences = math.ceil(2.2 * harness.first.spent["nfe"]), list[str]()
    rig, method = harness.rig(real=True, nfe=bound), harness.make()
    adam = optimiser(method, rig)
    with observed(rig, adam, differences) as watched:
        stop = train_iterations(method, rig, 8, adam, watched=watched)
    require_as_charged(differences)
    if stop != "budget: nfe":
        raise LawBroken(f"a budget of {bound:,} nfe did not end the run: {stop} after {rig.iteration} iterations")


@law("no budget is passed, and the last complete update stays")
def keeps_budget(harness: Harness) -> None:
    """Spent is raised before the budget would be exceeded; it ends the run, and an unfinished update is dropped."""
    for currency, share in {"nfe": 0.8, "images": 0.3, "updates": 0.3}.items():
        if not harness.first.spent[currency]:
            continue  # it draws no images of its own
        bound = max(1, int(harness.first.spent[currency] * share))
        limit: dict[str, Any] = {currency: float(bound)}
        rig, method = harness.rig(**limit), harness.make()
        adam = optimiser(method, rig)
        last = [_policy_weights(rig)]
        adam.register_step_post_hook(lambda *_, rig=rig, last=last: last.append(_policy_weights(rig)))
        stop = train_iterations(method, rig, 50, adam)
        if stop != f"budget: {currency}":
            raise LawBroken(
                f"a budget of {bound} {currency} did not end the run: {stop} after {rig.iteration} iterations"
            )
        if getattr(rig.meter, currency) > bound:
            raise LawBroken(f"{getattr(rig.meter, currency)} {currency} were spent of {bound}")
        if not torch.equal(last[-1], _policy_weights(rig)):
            raise LawBroken(
                f"at the end of a budget of {bound} {currency} the weights are not those of the last update"
            )


def _policy_weights(rig: Any) -> Tensor:
    """Return the weights in training as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in rig.model.parameters()])


@law("it learns", families=("sd3",), hard=False)
def learns(harness: Harness) -> None:
    """8,000 nfe, or else 64,000, must raise an easy reward by more than three standard errors, on the same noise."""
    mean = error = 0.0
    for nfe in (8_000.0, 64_000.0):
        method, rig = harness.make(prompts=4, group=8, optim=FAST_OPTIM), harness.rig(nfe=nfe)
        train_iterations(method, rig, 10_000)
        mean, error = reward_gain(rig)
        if mean > 3 * error:
            return
    raise LawBroken(f"the reward rose by {mean:+.4f} with a standard error of {error:.4f} on the same noise")


def reward_gain(rig: Any, each: int = 10) -> tuple[float, float]:
    """Return how much higher the policy's reward is than the reference's on the same noise: mean and standard error."""
    rig.meter = Meter(Budget(nfe=AMPLE_NFE))
    prompt_ids = torch.arange(len(PROMPTS)).repeat(each)
    x = rig.noise(len(prompt_ids))
    with torch.no_grad():
        difference = rig.score(rig.sample(x, prompt_ids), prompt_ids) - rig.score(
            rig.sample(x, prompt_ids, weights="ref"), prompt_ids
        )
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(prompt_ids))

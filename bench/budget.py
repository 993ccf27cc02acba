"""Budget and meter: bounds on a run's cost in six currencies, and a charge that is refused before it passes one."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter as _now
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .process_group import ProcessGroup

CURRENCIES = ("nfe", "images", "reward_calls", "updates", "seconds", "flops")
STATED = ("nfe", "images", "reward_calls")  # the currencies in which a data set may state what making it cost
DATA = "data"  # the role, and the scorer's name, under which that is charged


class Spent(Exception):
    """Raised before a charge that would pass a bound; `currency` names the bound."""

    def __init__(self, currency: str):
        super().__init__(f"the budget of {currency} is spent")
        self.currency = currency


@dataclass(frozen=True)
class Budget:
    """One or more bounds; each that is set binds, and the first one reached ends training.

    nfe: denoiser evaluations in forward-equivalents (forward 1, twice where guidance takes a second one, backward +2; what is
    recomputed to save memory is not counted and shows in seconds only);
    images: generated for training, discarded ones included; reward_calls: images given to scorers;
    updates: optimiser steps; seconds: of training on the device, evaluation and checkpoints excluded; time that passes cannot be
    refused, so this bound is passed by as much as the operation takes that is under way (with several processes the iteration);
    flops: nfe times the model's measured cost of one forward.
    """

    nfe: float | None = None
    images: float | None = None
    reward_calls: float | None = None
    updates: float | None = None
    seconds: float | None = None
    flops: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        bounds = self.bounds()
        if not bounds:
            raise UserError(f"a budget needs at least one bound: {', '.join(CURRENCIES)}")
        for currency, bound in bounds.items():
            if not (bound > 0 and math.isfinite(bound)):
                raise UserError(f"budget: {currency} must be a finite number above zero, got {bound:g}")

    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by currency."""
        return {c: getattr(self, c) for c in CURRENCIES if getattr(self, c) is not None}


def nothing_uncharged() -> float:
    """No seconds: all of training is charged."""
    return 0.0


class Meter:
    """Counts what a run has spent, and only ever upwards; every cost goes through one of the `charge` methods.

    What it counted is read through properties that return copies. A charge is a whole number of at least 0; the clock is bound
    when this module is imported, so that a later change of the module `time` does not reach it.
    """

    __slots__ = (
        "_backwards", "_before", "_budget", "_deferred", "_flops_a_forward", "_images", "_roles", "_scorers",
        "_since", "_stated", "_together", "_uncharged", "_uncharged_before", "_updates",
    )  # fmt: skip

    def __init__(
        self, budget: Budget, flops_a_forward: float = 0.0, uncharged: Callable[[], float] = nothing_uncharged
    ):
        """Open a meter at zero.

        Args:
            budget: the bounds.
            flops_a_forward: floating-point operations of one forward of one latent.
            uncharged: seconds so far, of this process, that are no training: those in which torch compiles the network.
        """
        self._budget, self._flops_a_forward, self._uncharged = budget, flops_a_forward, uncharged
        self._uncharged_before = 0.0  # when the clock was last started
        self._roles: Counter[str] = Counter()
        self._scorers: dict[str, dict[str, float]] = {}
        self._backwards: Counter[str] = Counter()  # images whose score was differentiated, by scorer
        self._deferred = 0  # nfe charged for backward passes that are still to come
        self._images = self._updates = 0
        self._stated: Counter[str] = Counter()  # by currency: the part of the spend that data sets stated
        self._before = 0.0  # seconds of earlier stretches of the clock
        self._since: float | None = None  # when the clock was last started; None while it stands
        self._together = False  # one of several processes

    @property
    def budget(self) -> Budget:
        """The bounds."""
        return self._budget

    @property
    def flops_a_forward(self) -> float:
        """Floating-point operations of one forward of one latent."""
        return self._flops_a_forward

    @property
    def roles(self) -> Counter[str]:
        """nfe by role: rollout, policy, ref, old ..."""
        return Counter(self._roles)

    @property
    def scorers(self) -> dict[str, dict[str, float]]:
        """calls, seconds and errors by the scorer's name."""
        return {name: dict(use) for name, use in self._scorers.items()}

    @property
    def reward_backwards(self) -> Counter[str]:
        """Images whose reward was differentiated, by the scorer's name: a backward pass of scorer and decoder each.

        No currency has a bound on them; each is one of the reward calls, and its seconds are counted.
        """
        return Counter(self._backwards)

    @property
    def stated(self) -> dict[str, int]:
        """The part of the spend that was charged because a data set stated it as its cost, by currency."""
        return {currency: self._stated[currency] for currency in STATED}

    @property
    def nfe(self) -> int:
        return sum(self._roles.values())

    @property
    def images(self) -> int:
        return self._images

    @property
    def updates(self) -> int:
        return self._updates

    @property
    def reward_calls(self) -> int:
        return int(sum(s["calls"] for s in self._scorers.values()))

    @property
    def errors(self) -> int:
        """Number of images that a scorer could not score."""
        return int(sum(s["errors"] for s in self._scorers.values()))

    @property
    def flops(self) -> float:
        return self.nfe * self._flops_a_forward

    @property
    def seconds(self) -> float:
        if self._since is None:
            return self._before
        return self._before + _now() - self._since - (self._uncharged() - self._uncharged_before)

    @property
    def since(self) -> float | None:
        """When the clock was last started, in seconds of its own; None while it stands."""
        return self._since

    def agree(self, processes: ProcessGroup) -> None:
        """Take over the main process's clock.

        With several processes the time limit is checked only between iterations, because all must stop together.
        """
        if processes.size > 1:
            self._before, self._together = processes.from_main(lambda: self.seconds), True

    def start(self) -> None:
        """Start the clock of training."""
        if self._since is None:
            self._since, self._uncharged_before = _now(), self._uncharged()

    def stop(self) -> None:
        """Stop the clock, for an evaluation or a checkpoint."""
        self._before, self._since = self.seconds, None

    def charge(self, *, nfe: int = 0, role: str = "", images: int = 0, updates: int = 0) -> None:
        """Charge a cost, or raise Spent and charge nothing. Raises ValueError on an amount that is no whole number from 0 up."""
        self._refuse(nfe=nfe, images=images, updates=updates)
        if nfe:
            self._roles[role] += nfe
        self._images += images
        self._updates += updates

    @property
    def deferred(self) -> int:
        """nfe that is charged and not yet computed, because a backward pass will compute it."""
        return self._deferred

    def charge_deferred(self, nfe: int, role: str) -> None:
        """Charge evaluations that a backward pass will compute, before its forward pass; raises as `charge` does.

        Where the budget is spent in between, the backward pass never comes: so much may be charged and not computed.
        """
        self.charge(nfe=nfe, role=role)
        self._deferred += nfe

    def settle_deferred(self) -> None:
        """The backward passes of all that was charged so far are done."""
        self._deferred = 0

    def charge_scorer(self, name: str, calls: int, *, images: int = 0, backwards: int = 0) -> None:
        """Charge reward calls, before the scorer is called, and the images that are decoded for it; raises as `charge` does.

        backwards: how many of the calls are differentiated.
        """
        _check_amount("backwards", backwards)
        self._refuse(images=images, reward_calls=calls)
        if backwards:
            self._backwards[name] += backwards
        self._images += images
        self._use(name)["calls"] += calls

    def charge_stated(self, spent: Mapping[str, int]) -> None:
        """Charge what a data set states as the cost of making it, under the role and the scorer "data"; raises as `charge` does.

        spent: amounts of nfe, images and reward_calls.
        """
        amounts = {currency: spent.get(currency, 0) for currency in STATED}
        self._refuse(**amounts)
        self._stated.update(amounts)
        if amounts["nfe"]:
            self._roles[DATA] += amounts["nfe"]
        self._images += amounts["images"]
        if amounts["reward_calls"]:
            self._use(DATA)["calls"] += amounts["reward_calls"]

    def note_scorer(self, name: str, seconds: float, errors: int) -> None:
        """Add a scorer's seconds and the number of images that it could not score."""
        _check_amount("errors", errors)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"a scorer takes a finite number of seconds from 0 up, got {seconds!r}")
        self._use(name)["seconds"] += seconds
        self._use(name)["errors"] += errors

    def _use(self, name: str) -> dict[str, float]:
        return self._scorers.setdefault(name, {"calls": 0, "seconds": 0.0, "errors": 0})

    def _refuse(self, **spend: int) -> None:
        for currency, amount in spend.items():
            _check_amount(currency, amount)
        for currency, bound in self._budget.bounds().items():
            if currency == "seconds":
                if (self._before if self._together else self.seconds) >= bound:
                    raise Spent(currency)
                continue
            more = spend.get("nfe", 0) * self._flops_a_forward if currency == "flops" else spend.get(currency, 0)
            if more and getattr(self, currency) + more > bound:
                raise Spent(currency)

    def affords(self, **each: float) -> int:
        """How many times these costs, by currency, still fit under every bound; seconds cannot be foreseen."""
        each = {**each, "flops": each.get("nfe", 0) * self._flops_a_forward}
        fits = [
            int((bound - getattr(self, currency)) // each[currency])
            for currency, bound in self._budget.bounds().items()
            if each.get(currency)
        ]
        if not fits:
            raise UserError(f"the budget sets no bound on {', '.join(each)}: it affords any number of them")
        return max(0, min(fits))

    def fraction(self) -> float:
        """Fraction of the tightest bound that is spent, from 0 to 1."""
        return min(1.0, max(getattr(self, currency) / bound for currency, bound in self._budget.bounds().items()))

    def spent(self) -> dict[str, float]:
        """The amount spent in every currency."""
        return {currency: getattr(self, currency) for currency in CURRENCIES}

    def state(self) -> dict[str, Any]:
        """The meter's state as JSON values, for a checkpoint."""
        return {
            "roles": dict(self._roles),
            "scorers": self.scorers,
            "reward_backwards": dict(self._backwards),
            "images": self._images,
            "updates": self._updates,
            "stated": self.stated,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set a meter that has counted nothing yet to a `state`. Raises ValueError on another one: a meter never goes back."""
        if self.nfe or self._images or self._updates or self._scorers or self._since is not None:
            raise ValueError("a meter that has begun to count cannot be set to another state")
        self._roles = Counter(state["roles"])
        self._scorers = {name: dict(s) for name, s in state["scorers"].items()}
        self._backwards = Counter(state.get("reward_backwards", {}))
        self._images, self._updates = state["images"], state["updates"]
        self._stated = Counter(state["stated"])
        self._before, self._since = state["seconds"], None


def _check_amount(currency: str, amount: Any) -> None:
    """Raise ValueError on an amount that is no whole number from 0 up: nothing is ever given back."""
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
        raise ValueError(f"a charge of {currency} is a whole number from 0 up, got {amount!r}")


def named_budgets() -> dict[str, Path]:
    """Files of the budgets that come with the package, by name."""
    return {p.stem: p for p in sorted((Path(__file__).parent / "budgets").glob("*.toml"))}


def load_budget(reference: str) -> Budget:
    """Load a budget by its name, from a TOML file, or from text such as `nfe=100000,seconds=60`.

    Raises UserError on an unknown name or currency, an unreadable file, or a bound that is not above zero.
    """
    from .registry import unknown

    if "=" in reference:
        table: dict[str, Any] = {}
        for part in reference.split(","):
            key, _, value = part.partition("=")
            try:
                table[key.strip()] = float(value)
            except ValueError:
                raise UserError(f"budget: {part.strip()!r} is not currency=number") from None
        return _budget(table, reference)
    if reference in named_budgets():
        source = named_budgets()[reference]
    elif reference.endswith(".toml"):
        source = Path(reference)
    else:
        raise unknown("budget", reference, named_budgets())
    try:
        table = tomllib.loads(source.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"budget {source}: {error}") from None
    return _budget(table, source.stem)


def _budget(table: dict[str, Any], name: str) -> Budget:
    from .registry import unknown

    currencies = {f.name for f in fields(Budget)} - {"name"}
    for key, value in table.items():
        if key not in currencies:
            raise unknown("currency", key, currencies)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"budget: {key} must be a number, got {value!r}")
    return Budget(**{key: float(value) for key, value in table.items()}, name=name)

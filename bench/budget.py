"""Budget and meter: bounds on a run's cost in six currencies, and a charge that is refused before it passes one."""

from __future__ import annotations

import math
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .process_group import ProcessGroup

CURRENCIES = ("nfe", "images", "reward_calls", "updates", "seconds", "flops")


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
    updates: optimiser steps; seconds: of training on the device, evaluation and checkpoints excluded;
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


@dataclass
class Meter:
    """Counts what a run has spent; every cost goes through `charge` or `charge_scorer`."""

    budget: Budget
    flops_a_forward: float = 0.0
    roles: Counter[str] = field(default_factory=Counter[str])  # nfe by role: rollout, policy, ref, old ...
    scorers: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])  # calls, seconds, errors
    images: int = 0
    updates: int = 0
    _before: float = 0.0  # seconds of earlier stretches of the clock
    _since: float | None = None  # when the clock was last started; None while it stands
    _together: bool = False  # one of several processes

    @property
    def nfe(self) -> int:
        return sum(self.roles.values())

    @property
    def reward_calls(self) -> int:
        return int(sum(s["calls"] for s in self.scorers.values()))

    @property
    def errors(self) -> int:
        """Number of images that a scorer could not score."""
        return int(sum(s["errors"] for s in self.scorers.values()))

    @property
    def flops(self) -> float:
        return self.nfe * self.flops_a_forward

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    def agree(self, processes: ProcessGroup) -> None:
        """Take over the main process's clock.

        With several processes the time limit is checked only between iterations, because all must stop together.
        """
        if processes.size > 1:
            self._before, self._together = processes.from_main(lambda: self.seconds), True

    def start(self) -> None:
        """Start the clock of training."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock, for an evaluation or a checkpoint."""
        self._before, self._since = self.seconds, None

    def charge(self, *, nfe: int = 0, role: str = "", images: int = 0, updates: int = 0) -> None:
        """Charge a cost, or raise Spent and charge nothing."""
        self._refuse(nfe=nfe, images=images, updates=updates)
        if nfe:
            self.roles[role] += nfe
        self.images += images
        self.updates += updates

    def charge_scorer(self, name: str, calls: int) -> None:
        """Charge reward calls, before the scorer is called; raises Spent as `charge` does."""
        self._refuse(reward_calls=calls)
        self.scorers.setdefault(name, {"calls": 0, "seconds": 0.0, "errors": 0})["calls"] += calls

    def note_scorer(self, name: str, seconds: float, errors: int) -> None:
        """Add a scorer's seconds and the number of images that it could not score."""
        self.scorers[name]["seconds"] += seconds
        self.scorers[name]["errors"] += errors

    def _refuse(self, **spend: int) -> None:
        for currency, bound in self.budget.bounds().items():
            if currency == "seconds":
                if (self._before if self._together else self.seconds) >= bound:
                    raise Spent(currency)
                continue
            more = spend.get("nfe", 0) * self.flops_a_forward if currency == "flops" else spend.get(currency, 0)
            if more and getattr(self, currency) + more > bound:
                raise Spent(currency)

    def affords(self, **each: float) -> int:
        """How many times these costs, by currency, still fit under every bound; seconds cannot be foreseen."""
        each = {**each, "flops": each.get("nfe", 0) * self.flops_a_forward}
        fits = [
            int((bound - getattr(self, currency)) // each[currency])
            for currency, bound in self.budget.bounds().items()
            if each.get(currency)
        ]
        if not fits:
            raise UserError(f"the budget sets no bound on {', '.join(each)}: it affords any number of them")
        return max(0, min(fits))

    def fraction(self) -> float:
        """Fraction of the tightest bound that is spent, from 0 to 1."""
        return min(1.0, max(getattr(self, currency) / bound for currency, bound in self.budget.bounds().items()))

    def spent(self) -> dict[str, float]:
        """The amount spent in every currency."""
        return {currency: getattr(self, currency) for currency in CURRENCIES}

    def state(self) -> dict[str, Any]:
        """The meter's state as JSON values, for a checkpoint."""
        return {
            "roles": dict(self.roles),
            "scorers": {name: dict(s) for name, s in self.scorers.items()},
            "images": self.images,
            "updates": self.updates,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set the meter to a `state`."""
        self.roles = Counter(state["roles"])
        self.scorers = {name: dict(s) for name, s in state["scorers"].items()}
        self.images, self.updates = state["images"], state["updates"]
        self._before, self._since = state["seconds"], None


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

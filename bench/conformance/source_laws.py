"""Laws about source: test a method's class and source without a model."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..experiments import config
from ..model_spec import Adapter
from ..spec import Choice, LogUniform, Optim, Search, Uniform
from .harness import STEP_COUNTS, MethodSource
from .law import LawBroken, law
from .source_rules import local_files, rule_violations


@law("it is a frozen dataclass with annotated fields", "source")
def is_frozen_dataclass(source: MethodSource) -> None:
    """Only fields are written to the record, and only a frozen instance still has the values that were written."""
    kind = source.kind
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise LawBroken(f"{kind!r} is not a dataclass")
    if not getattr(kind, "__dataclass_params__").frozen:  # noqa: B009 - not in the type of a class
        raise LawBroken("the dataclass is not frozen: @dataclass(frozen=True)")
    constants = [
        name for name, value in vars(kind).items()
        if not name.startswith("_") and name not in inspect.get_annotations(kind)
        and not isinstance(value, property | staticmethod | classmethod | cached_property) and not callable(value)
    ]  # fmt: skip
    if constants:
        raise LawBroken(f"without an annotation these are constants, not settings: {', '.join(constants)}")


@law("its defaults and its settings for tiny models construct", "source")
def constructs(source: MethodSource) -> None:
    """`gpobench run` makes a method from its defaults, its preset and --set."""
    source.kind()
    method = source.make()
    if not isinstance(method, Search) and not isinstance(method.optim, Optim):
        raise LawBroken(f"optim is {type(method.optim).__name__}, not Optim")


@law("its search space and its cost are declared", "source")
def declares_space_and_cost(source: MethodSource) -> None:
    """Tuning draws from the search space, and cost estimates use the declared cost."""
    space: Any = getattr(source.kind, "space", None)
    if not isinstance(space, Mapping):
        raise LawBroken(
            "space is missing: the key of a --set -> LogUniform, Uniform or Choice; {} where nothing may be tuned"
        )
    ranges: dict[str, Any] = dict(space)
    for key, span in ranges.items():
        if not isinstance(span, LogUniform | Uniform | Choice):
            raise LawBroken(f"space[{key!r}] is {span!r}, not LogUniform, Uniform or Choice")
        if (
            isinstance(span, LogUniform | Uniform)
            and not span.low < span.high
            or isinstance(span, LogUniform)
            and not span.low > 0
        ):
            raise LawBroken(f"space[{key!r}] = {span} is empty, or has no logarithm")
    rng = random.Random(0)
    for draw in range(30):
        drawn = {key: _draw_value(span, rng, draw) for key, span in ranges.items()}
        table: dict[str, Any] = {}
        for key, value in drawn.items():
            table |= _with_nested(table, key.split("."), value)
        if "adapter" in table:
            config.build(Adapter, table.pop("adapter"), prefix="adapter.")
        try:
            config.build(source.kind, table)
        except UserError as error:
            raise LawBroken(f"a draw from space is refused: {drawn}: {error}") from None
    method = source.make()
    if isinstance(method, Search):
        return
    cost = dict(method.cost(STEP_COUNTS[-1], 1.0))
    if not cost or not all(isinstance(value, int | float) and value >= 0 for value in cost.values()):
        raise LawBroken(f"cost({STEP_COUNTS[-1]}, 1.0) must map roles to nfe an image, got {cost}")


def _draw_value(span: Any, rng: random.Random, draw: int) -> Any:
    """Draw a value of a range; the first two draws are its ends."""
    if isinstance(span, Choice):
        return span.options[draw % len(span.options)]
    share = (0.0, 1.0)[draw] if draw < 2 else rng.random()
    if isinstance(span, LogUniform):
        return min(span.high, span.low * (span.high / span.low) ** share)
    return span.low + (span.high - span.low) * share


def _with_nested(table: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a copy of a nested mapping with the value at this path."""
    if len(path) == 1:
        return {**table, path[0]: value}
    return {**table, path[0]: _with_nested(table.get(path[0], {}), path[1:], value)}


@law("its source touches no optimiser, device, file, other method or model family", "source")
def source_is_restricted(source: MethodSource) -> None:
    """Exact resume, device placement and the budget hold only where a method leaves them to the rig.

    The rules hold for the method's file and for the files beside it that it imports.
    """
    module = sys.modules[source.kind.__module__]
    file = Path(str(inspect.getsourcefile(module)))
    violations = list(rule_violations(inspect.getsource(module), module.__name__))
    waiting, visited = [(module.__name__, file)], {file.resolve()}
    while waiting:
        name, path = waiting.pop()
        for imported, helper in local_files(path.read_text("utf-8"), name, path).items():
            if helper.resolve() not in visited:
                visited.add(helper.resolve())
                waiting.append((imported, helper))
                text = helper.read_text("utf-8")
                violations += [f"{helper.name} {violation}" for violation in rule_violations(text, imported)]
    if violations:
        more = f"; and {len(violations) - 4} more" if len(violations) > 4 else ""
        raise LawBroken("; ".join(violations[:4]) + more)

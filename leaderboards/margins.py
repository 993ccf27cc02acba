"""Margins of a baseline: how far from its number a new one is still the same, stated as a number or as a share of the gain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..bench import registry
from ..bench.errors import UserError
from ..bench.stats.law import holm
from .baseline import BaselineNumber, Claim
from .board import BASE, Board

FINEST_MARGIN = 1e-10
LEAST_MARGIN = 1e-4  # of a share of the gain
DEFAULT_SHARE = 0.5  # of the reported gain, where no margin is stated


@dataclass(frozen=True)
class MarginRule:
    """A margin in units of the score, or a share of the reported gain."""

    value: float
    of_gain: bool = False

    @property
    def text(self) -> str:
        """Return the rule as `--margin` takes it."""
        return f"{100 * self.value:g}%" if self.of_gain else f"{self.value:g}"

    def margin(self, number: BaselineNumber) -> float:
        """Return the margin of a number.

        A share of the gain is never less than what seeds can show: half the 90 % interval that other seeds of an unchanged method are
        expected to have, or, of one seed, half the interval of the gain. Else hardly any repetition could be the same.
        """
        if not self.of_gain:
            return self.value
        ends = (number.gain_ci, number.ci)
        shown = [number.repeat, *((high - low) / 2 for low, high in filter(None, ends))]
        least = next((x for x in shown if x is not None and math.isfinite(x) and x > 0), 0.0)
        return max(self.value * abs(number.gain or 0.0), least, LEAST_MARGIN)


DEFAULT = MarginRule(DEFAULT_SHARE, of_gain=True)


def told_gains(table: Board, key: str) -> set[str]:
    """Return the labels of the rows whose gain over the base in this scorer/metric is told: above 0 at 5 %, Holm over the rows."""
    rows = [row for row in table.rows if row.kind != "base" and row.is_result and key in row.cells]
    deltas = {row.label: delta for row in rows if (delta := row.cells[key].delta) is not None and delta.p is not None}
    corrected = holm([delta.p for delta in deltas.values() if delta.p is not None])
    return {label for (label, d), p in zip(deltas.items(), corrected, strict=True) if p < 0.05 and d.mean > 0}


def choose_rules(
    texts: Sequence[str], keys: Sequence[str], labels: Sequence[str], old: Sequence[Claim]
) -> dict[tuple[str, str], MarginRule]:
    """Choose the rule per (row, key), first match wins: --margin KEY=x, --margin x, the old row's, that of all old rows, the default.

    Raises UserError on what is no margin, and where a row is new and the old ones differ.
    """
    old_rules = {(claim.label, n.key): _rule_of(n) for claim in old for n in claim.number}
    by_key, default = parse_margins(texts, keys)
    rules: dict[tuple[str, str], MarginRule] = {}
    for key in keys:
        stated = by_key.get(key, default)
        of_old_rows = {rule for (label, other), rule in old_rules.items() if other == key and label != BASE}
        of_old_rows = of_old_rows or {rule for (_, other), rule in old_rules.items() if other == key}
        for label in labels:
            rule = stated or old_rules.get((label, key))
            if rule is None and len(of_old_rows) > 1:
                raise UserError(
                    f"the old rows have several margins for {key} and {label} is new: --margin {key}=NUMBER"
                )
            rules[label, key] = rule or next(iter(of_old_rows), DEFAULT)
    return rules


def parse_margins(texts: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, MarginRule], MarginRule | None]:
    """Parse the margins of single keys, and the one of all keys. texts: NUMBER, SHARE%, KEY=NUMBER or KEY=SHARE%."""
    default: MarginRule | None = None
    by_key: dict[str, MarginRule] = {}
    for text in texts:
        key, _, stated = text.rpartition("=")
        rule = _parse(text, stated)
        if key and key not in keys:
            raise registry.unknown("scorer/metric", key, keys)
        if key:
            by_key[key] = rule
        else:
            default = rule
    return by_key, default


def base_margins(margins: Mapping[tuple[str, str], float], keys: Sequence[str]) -> dict[str, float]:
    """Return for each key the smallest margin of its trained rows, which serves the base; it has no gain of its own."""
    of_key = {key: [m for (label, other), m in margins.items() if other == key and label != BASE] for key in keys}
    return {key: min(found) for key, found in of_key.items() if found}


def unguarded(claims: Sequence[Claim]) -> list[tuple[str, BaselineNumber]]:
    """Return the numbers, with their rows, whose margin is as large as the gain that it guards."""
    return [(c.label, n) for c in claims for n in c.number if n.gain is not None and n.told and n.margin >= n.gain]


def _rule_of(number: BaselineNumber) -> MarginRule:
    return _parse(number.rule, number.rule) if number.rule else MarginRule(number.margin)


def _parse(text: str, stated: str) -> MarginRule:
    share = stated.endswith("%")
    try:
        value = float(stated.removesuffix("%")) / (100 if share else 1)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UserError(
            f"--margin wants a positive number, a share of the gain such as 50%, or scorer/metric= and one of them; got {text!r}"
        )
    if share and value >= 1:
        raise UserError(f"--margin {text}: a margin of the whole gain guards nothing; a share is below 100%")
    if value < FINEST_MARGIN:
        raise UserError(
            f"--margin {text}: scores are stored with twelve decimals, so {FINEST_MARGIN:g} is the finest margin"
        )
    return MarginRule(value, share)

"""Defines the leaderboard types: a board of rows and columns, the cells of a row, and the rules printed below every table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..bench.evaluation.ranking import RANK_RULE
from ..bench.evaluation.transfer import FLAG_LEVEL, HONEST_TRANSFER, Transfer
from ..bench.stats.intervals import Estimate
from ..bench.stats.law import RankInterval
from .frontier import Frontier
from .paper_numbers import PaperNumber

Role = Literal["training", "held-out", "auxiliary", "quality", "diversity", "drift"]
ROLES: tuple[Role, ...] = ("training", "held-out", "auxiliary", "quality", "diversity", "drift")
SCORED_ROLES: tuple[Role, ...] = ROLES[:4]  # more is better; diversity and drift are distances between images
BASE = "base"  # the label of the row of the base model
SeedSource = Literal["own", "table", "library", "unknown", ""]  # "": no seeds, as the base
RULES = (
    "Intervals are 95 %, of prompts, images of a prompt clustered, and of training seeds; the variance between seeds is moderated over "
    "the rows (limma's way, guarded). They, p and ranks are by one law (docs/statistics.md).",
    RANK_RULE,
    "p: against the baseline, corrected over the rows (Holm). A row of one seed is lent the variance between seeds from the rows with "
    "several, else from the library of seed variances; where neither knows it, the row has no p and is ranked neither above nor below "
    "another.",
    "Transfer: the held-out gain over the training gain on the same images, with its 95 % interval (Fieller); none where the training "
    "scorer does not rise for sure. Hack flag: the training scorer rises for sure and the transfer is below "
    f"{HONEST_TRANSFER:g} (one-sided, {100 * FLAG_LEVEL:g} %), or a quality column falls (5 %, Holm over these columns).",
)


@dataclass(frozen=True)
class Column:
    """One scorer/metric and the role of its scorer in these runs."""

    key: str
    role: Role


@dataclass(frozen=True)
class Cell:
    """The scores of one row in one column; the base has neither a before nor a difference."""

    after: Estimate
    before: Estimate | None = None
    delta: Estimate | None = None  # after - before, paired
    images: int = 0  # of one seed
    errors: int = 0  # images that could not be scored, of all seeds, before and after


@dataclass(frozen=True)
class BoardRow:
    """A method with one set of settings, over its training seeds."""

    label: str
    method: str
    kind: Literal["base", "baseline", "method"]
    seeds: tuple[int, ...]
    folders: tuple[str, ...]
    settings: Mapping[str, Any]
    cells: Mapping[str, Cell]
    cmmd: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])
    versus: Estimate | None = None  # minus the baseline, in the key; p before correction
    holm: float = math.nan  # that p, Holm-corrected
    rank: RankInterval | None = None  # None: not ranked
    seed_source: SeedSource = ""  # where the variance between its seeds comes from
    spent: Mapping[str, float] = field(default_factory=dict[str, float])  # by currency, the mean over seeds
    transfer: Transfer | None = None  # to the held-out scorer of the task's key
    hack: tuple[str, ...] = ()  # why the row has the hack flag
    hacked: int = 0  # seeds whose record has it
    invalid: bool = False
    faults: tuple[str, ...] = ()  # what went wrong in the runs that ended by a fault
    trials: int = 0  # of tuning, whose spend is not in `spent`
    revisions: tuple[str, ...] = ()  # of the code
    verified: str = ""  # the lowest verification level of its runs; "" for the base

    @property
    def is_result(self) -> bool:
        """Return whether the row may be ranked: no run of it is invalid or ended by a fault."""
        return not self.invalid and not self.faults

    @property
    def single_seed(self) -> bool:
        """Return whether the row has one training seed, so that its interval does not contain the spread between seeds."""
        return self.kind != "base" and len(self.seeds) == 1


@dataclass(frozen=True)
class Board:
    """A table of rows that may be compared: one task, model, budget, evaluation protocol and set of scorers."""

    task: str
    task_version: str
    model: str
    weights: str
    dtype: str
    budget: Mapping[str, float]
    evaluation: Mapping[str, Any]
    prompts: Mapping[str, str]  # split -> hash
    scorers: Mapping[str, str]  # name -> id, embedders too
    key: str  # the scorer/metric that ranks this table
    task_key: str  # the one that the task states
    baseline: str
    columns: tuple[Column, ...]
    rows: tuple[BoardRow, ...]  # ranked ones first, by mean
    notes: tuple[str, ...]
    reported: tuple[PaperNumber, ...] = ()
    frontiers: tuple[Frontier, ...] = ()  # of the searches among the rows

    @property
    def base_row(self) -> BoardRow:
        """Return the row of the base model."""
        return next(row for row in self.rows if row.kind == "base")

    @property
    def clock(self) -> str:
        """Return the first currency of the budget, over which curves are drawn."""
        return next(iter(self.budget), "nfe")

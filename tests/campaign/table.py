"""The table of faults: every kind's rows, in one list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import disks
import files
import inputs
import models
import scorers
import servers
from fault import Row

import methods

KINDS = ("scorers", "servers", "disks", "signals", "models", "files", "inputs", "methods")


def table(place: Path, kinds: Sequence[str] = KINDS) -> list[Row]:
    """The rows of the kinds. place: a folder for what they prepare, at the first injection that needs it."""
    modules = (scorers, servers, disks, models, files, inputs, methods)
    rows = [row for module in modules for row in module.rows(place / module.__name__)]
    return [row for row in rows if row.kind in kinds]

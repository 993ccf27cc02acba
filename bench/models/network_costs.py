"""Table of computed sizes and costs of the named models' networks, so that an estimate need not build them.

Building T5-XXL on the meta device takes seconds and a GB of memory. `python benchmarks/network_costs.py` writes the table; an entry is
named by a hash of everything it was computed from, and holds for the library versions it was computed with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("network_costs.json")
LIBRARIES = ("torch", "diffusers", "transformers", "peft")  # whose versions decide what is built and counted


def entry_name(*computed_from: Any) -> str:
    """Return the name of an entry: a hash of what it was computed from, given as values whose text says all of them."""
    return sha256(repr(computed_from).encode()).hexdigest()[:24]


def find_entry(name: str) -> list[float] | None:
    """Return an entry of the table; None where there is none, or it was computed with other versions of the libraries."""
    return _entries().get(name)


def library_versions() -> dict[str, str]:
    """Return the installed version of each library."""
    return {name: metadata.version(name).partition("+")[0] for name in LIBRARIES}


def table_text(entries: Mapping[str, list[float]]) -> str:
    """Format a table."""
    return json.dumps({"versions": library_versions(), "entries": dict(sorted(entries.items()))}, indent=0) + "\n"


@lru_cache(maxsize=1)
def _entries() -> Mapping[str, list[float]]:
    table: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return table["entries"] if table["versions"] == library_versions() else {}

"""A look that was paid for is kept: the base is judged once for all runs that begin from it, and not again after a cut.

Judging a large model costs hours, and every run of a comparison begins with the same base, prompts, noise and scorers. What a look
depends on is hashed into its place: settings, weights, prompts, ids of scorers, versions, device, and the source files themselves,
so that an edit anywhere makes a new look and never an old number.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from . import record
from .card import Card
from .crew import Crew
from .disk import digest, write_atomically
from .evaluate import Judged, prompts_hash
from .spec import Embedder, Prompt, Scorer, Task

ROOT = Path(__file__).resolve().parents[1]


def ground(
    card: Card, task: Task, prompts: Sequence[Prompt], judges: Sequence[Scorer | Embedder], drift: Sequence[Embedder],
    **settings: str | int,
) -> str:  # fmt: skip
    """The name of everything a look at the base depends on."""
    where = {key: value for key, value in record.provenance().items() if key != "revision"}  # `sources` says it better
    facts: dict[str, Any] = {
        "card": asdict(card),
        "task": [task.name, task.version],
        "prompts": prompts_hash(prompts),
        "strata": [p.stratum for p in prompts],
        "judges": [one.id for one in judges],
        "drift": [one.id for one in drift],
        "sources": [_sources(), *(_source(one) for one in (task, *judges, *drift))],
        "where": where,
        **settings,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def kept(place: Path, make: Callable[[], Judged], drift: Sequence[Embedder], crew: Crew) -> Judged:
    """What `make` returns, or what it returned when this place was last asked; who asks meanwhile waits for it."""
    table, images, vectors = (place.with_name(f"{place.name}.{kind}") for kind in ("parquet", "npy", "npz"))

    def there() -> bool:
        if not (table.is_file() and images.is_file() and vectors.is_file()):
            return False
        with np.load(vectors, allow_pickle=False) as found:
            return set(found.files) == {e.name for e in drift}  # one may have been installed since

    with _turn(place, crew):
        if crew.lead(there):
            with np.load(vectors, allow_pickle=False) as found:
                each = {name: found[name] for name in found.files}
            return Judged(pd.read_parquet(table), np.load(images, allow_pickle=False), each)
        judged = make()
        if crew.leads:
            _save(images, lambda file: np.save(file, judged.images))
            _save(vectors, lambda file: np.savez(file, **judged.vectors))  # type: ignore[arg-type]
            write_atomically(table, lambda path: judged.table.to_parquet(path, index=False))
        return judged


@contextmanager
def _turn(place: Path, crew: Crew) -> Generator[None]:
    """One process at a time, and what it starts with `accelerate launch` or `torchrun`."""
    if not crew.leads:
        yield
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _save(path: Path, save: Callable[[IO[bytes]], None]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy would append a suffix
            save(file)

    write_atomically(path, write)


@cache
def _sources() -> str:
    """sha256 over the source files of this package that a look at the base passes through."""
    total = hashlib.sha256()
    for path in sorted(path for part in ("bench", "rewards", "tasks") for path in (ROOT / part).rglob("*.py")):
        total.update(f"{path.relative_to(ROOT)} {digest(path)}\n".encode())
    return total.hexdigest()


def _source(part: object) -> str:
    """sha256 of the file that defines it: a person's own scorer may be edited without a new id."""
    try:
        return digest(Path(inspect.getfile(type(part))))
    except (OSError, TypeError):
        return ""

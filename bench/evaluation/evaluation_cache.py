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
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from ..assets.weight_store import settings_hash
from ..files import digest, write_atomically
from ..model_spec import ModelSpec
from ..process_group import ProcessGroup
from ..scoring.scorers import Blend
from ..spec import Embedder, Prompt, Scorer, Task
from . import record
from .evaluator import Evaluation, invalid

ROOT = Path(__file__).resolve().parents[2]


def cache_key(
    model_spec: ModelSpec, task: Task, prompts: Sequence[Prompt], judges: Sequence[Scorer | Embedder], drift: Sequence[Embedder],
    **settings: str | int,
) -> str:  # fmt: skip
    """The name of everything a look at the base depends on."""
    where = {key: value for key, value in record.provenance().items() if key != "revision"}  # `sources` says it better
    facts: dict[str, Any] = {
        "card": asdict(model_spec),
        "task": [task.name, task.version],
        "prompts": [[p.text, p.stratum, p.meta] for p in prompts],
        "folder": settings_hash(model_spec),
        "judges": [one.id for one in judges],
        "drift": [one.id for one in drift],
        "sources": [_sources(), *(source(one) for one in (task, *_apart(judges), *drift))],
        "where": where,
        **settings,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cached_evaluation(
    place: Path,
    make: Callable[[], Evaluation],
    drift: Sequence[Embedder],
    processes: ProcessGroup,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """What `make` returns, or what it returned when this place was last asked; who asks meanwhile waits for it.

    A look in which too many scores are missing is not kept: whatever failed may work when it is asked again.
    """
    table, images, vectors = (place.with_name(f"{place.name}.{kind}") for kind in ("parquet", "npy", "npz"))

    def read() -> Evaluation:
        with np.load(vectors, allow_pickle=False) as found:
            each = {name: found[name] for name in found.files}
        return Evaluation(pd.read_parquet(table), np.load(images, allow_pickle=False), each)

    def there() -> bool:
        if not (table.is_file() and images.is_file() and vectors.is_file()):
            return False
        try:
            return set(read().vectors) == {e.name for e in drift}  # one may have been installed since
        except (ValueError, EOFError, KeyError, BadZipFile) as error:  # what a full disk or a copy half-way leaves
            say(f"{table} is damaged and is made anew: {str(error).partition(chr(10))[0]}")
            return False

    with _turn(place, processes):
        if processes.from_main(there):
            return read()
        judged = make()
        if processes.is_main and not invalid(judged.table):
            _save(images, lambda file: np.save(file, judged.images))
            _save(vectors, lambda file: np.savez(file, **judged.vectors))  # type: ignore[arg-type]
            write_atomically(table, lambda path: judged.table.to_parquet(path, index=False))
        return judged


@contextmanager
def _turn(place: Path, processes: ProcessGroup) -> Generator[None]:
    """One process at a time, and what it starts with `accelerate launch` or `torchrun`."""
    if not processes.is_main:
        yield
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in place.parent.glob(f".{place.name}.*.tmp"):  # of a start that was killed
            left.unlink(missing_ok=True)
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


def _apart(judges: Sequence[Scorer | Embedder]) -> list[Scorer | Embedder]:
    """Each by itself: a blend's file is ours, its parts' files may be a person's."""
    found: list[Scorer | Embedder] = []
    for one in judges:
        found += _apart([part for part, _ in one.parts]) if isinstance(one, Blend) else [one]
    return found


def source(part: object) -> str:
    """sha256 of the file that defines it: a person's own scorer may be edited without a new id."""
    try:
        return digest(Path(inspect.getfile(type(part))))
    except (OSError, TypeError):
        return ""

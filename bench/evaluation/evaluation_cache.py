"""Cache of evaluations: a file name made of everything that an evaluation depends on, and the files that hold it.

Evaluating a large model takes hours, and every run of a comparison begins with the same base, prompts, noise and scorers. What an
evaluation depends on is hashed into its name: settings, weights, prompts, ids of scorers, versions, device, and the source files,
so that an edit anywhere causes a new evaluation and never returns an old number.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile

import numpy as np

from ..assets.weight_store import settings_hash
from ..errors import UserError
from ..files import acquire_lock, digest, open_lock, write_atomically
from ..model_spec import ModelSpec
from ..process_group import ProcessGroup
from ..scoring.scorers import Blend, part_behind
from ..spec import Embedder, Scorer, Task
from . import record
from .estimates import Evaluation, invalid
from .request import EvaluationRequest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RunConditions:
    """What an evaluation of the base depends on beside the request."""

    model_spec: ModelSpec
    task: Task
    precision: str
    weights_hash: str
    device: str


def cache_key(request: EvaluationRequest, conditions: RunConditions) -> str:
    """16 hexadecimal digits: a hash of everything that an evaluation of the base depends on."""
    # The hash of the source files says more than the revision does.
    versions = {key: value for key, value in record.provenance().items() if key != "revision"}
    task, parts = conditions.task, [*request.scorers, *request.diversity]
    facts: dict[str, Any] = {
        "model_spec": asdict(conditions.model_spec),
        "task": [task.name, task.version],
        "prompts": [[p.text, p.stratum, p.meta] for p in request.prompts],
        "model_settings": settings_hash(conditions.model_spec),
        "scorers": [part.id for part in parts],
        "drift": [embedder.id for embedder in request.drift],
        "sources": [_sources(), *(source(part) for part in (task, *_unblended(parts), *request.drift))],
        "versions": versions,
        "images": request.images,
        "seed": request.seed,
        "rows": request.rows,
        "precision": conditions.precision,
        "weights": conditions.weights_hash,
        "device": conditions.device,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cached_evaluation(
    stem: Path,
    compute: Callable[[], Evaluation],
    drift: Sequence[Embedder],
    processes: ProcessGroup,
    message: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """The evaluation stored at STEM.parquet, .npy and .npz, or what `compute` returns, stored there.

    STEM.sha256 holds their checksums, in the form that sha256sum reads, and is written last: files that do not match it, because
    they were changed or cut, or a write was cut short, are computed again with a message.

    A second process that asks meanwhile waits. An evaluation in which too many scores are missing is not stored: whatever
    failed may work the next time.

    Args:
        stem: the path of the files, without suffix.
        compute: makes the evaluation.
        drift: the embedders whose vectors the stored evaluation must have; others cause a new one.
        processes: one of them reads and writes.
        message: called with one line when stored files are damaged.
    """
    table, images, vectors, checksums = (
        stem.with_name(f"{stem.name}.{suffix}") for suffix in ("parquet", "npy", "npz", "sha256")
    )

    def read() -> Evaluation:
        import pandas as pd

        with np.load(vectors, allow_pickle=False) as arrays:
            by_embedder = {name: arrays[name] for name in arrays.files}
        return Evaluation(pd.read_parquet(table), np.load(images, allow_pickle=False), by_embedder)

    def is_stored() -> bool:
        if not (table.is_file() and images.is_file() and vectors.is_file()):
            return False
        if damage := _damage((table, images, vectors), checksums):
            message(damage)
            return False
        try:
            return set(read().vectors) == {e.name for e in drift}  # an embedder may have been installed since
        except (ValueError, EOFError, KeyError, BadZipFile) as error:  # left by a full disk or an unfinished copy
            message(f"{table} is damaged and is computed again: {str(error).partition(chr(10))[0]}")
            return False

    with _locked(stem, processes):
        if processes.from_main(is_stored):
            return read()
        evaluation = compute()
        if processes.is_main and not invalid(evaluation.table):
            checksums.unlink(missing_ok=True)
            _save(images, lambda file: np.save(file, evaluation.images))
            _save(vectors, lambda file: np.savez(file, **evaluation.vectors))  # type: ignore[arg-type]
            write_atomically(table, lambda path: evaluation.table.to_parquet(path, index=False))
            lines = "".join(f"{digest(path)}  {path.name}\n" for path in (table, images, vectors))
            write_atomically(checksums, lambda path: path.write_text(lines, "utf-8"))
        return evaluation


def _damage(files: Sequence[Path], checksums: Path) -> str:
    """What is wrong with stored files, in words; "" where each matches its line in the file of checksums."""
    try:
        lines = checksums.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return f"{files[0]} has no checksum beside it and is computed again"
    for file in files:
        if f"{digest(file)}  {file.name}" not in lines:
            return f"{file} is damaged and is computed again: it does not match its checksum in {checksums.name}"
    return ""


@contextmanager
def _locked(stem: Path, processes: ProcessGroup) -> Generator[None]:
    """Hold the lock of an evaluation; the other processes of the group follow the first without it."""
    if not processes.is_main:
        yield
        return
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(f".{stem.name}.lock")
    try:
        opened = open_lock(path)
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}") from error
    with opened as lock:
        acquire_lock(lock, wait=True)
        for unfinished in stem.parent.glob(f".{stem.name}.*.tmp"):  # by a process that was killed
            unfinished.unlink(missing_ok=True)
        yield


def _save(path: Path, save: Callable[[IO[bytes]], None]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy would append a suffix
            save(file)

    write_atomically(path, write)


@cache
def _sources() -> str:
    """sha256 over the source files of this package that an evaluation of the base runs through."""
    total = hashlib.sha256()
    for path in sorted(path for folder in ("bench", "rewards", "tasks") for path in (ROOT / folder).rglob("*.py")):
        total.update(f"{path.relative_to(ROOT)} {digest(path)}\n".encode())
    return total.hexdigest()


def _unblended(parts: Sequence[Scorer | Embedder]) -> list[Scorer | Embedder]:
    """The parts with each blend replaced by its scorers: a blend's file is ours, its scorers' files may be a third party's."""
    flat: list[Scorer | Embedder] = []
    for part in parts:
        flat += _unblended([scorer for scorer, _ in part.parts]) if isinstance(part, Blend) else [part]
    return flat


def source(part: object) -> str:
    """sha256 of the file that defines the part's class: a third party's scorer may be edited without a new id."""
    try:
        return digest(Path(inspect.getfile(type(part_behind(part)))))
    except (OSError, TypeError):
        return ""

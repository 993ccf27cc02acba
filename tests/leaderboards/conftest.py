"""Run directories made for tests, through the very classes that a run writes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gpobench.bench.evaluation import record
from gpobench.bench.evaluation.record import Difference, Flags, FrontierPoint, Number, Point, Record, ScorerUse
from gpobench.bench.files import digest

KEYS = ("engine/exact", "other/exact")
USES = {
    "engine": ScorerUse(id="engine-1", role="training", calls=9, seconds=1.0, errors=0),
    "other": ScorerUse(id="other-1", role="held-out", calls=0, seconds=0.0, errors=0),
}


def scores(
    gain: float, seed: int, *, prompts: int = 40, images: int = 2, base: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Before and after (prompts, images) of a method that raises every score by about `gain`."""
    before = np.random.default_rng(base).random((prompts, images))
    noise = np.random.default_rng(seed + 1000).normal(0, 0.02, (prompts, images))
    return before, before + gain + noise if gain or seed else before.copy()


def make_run(
    run_dir: Path,
    method: str = "gpo",
    seed: int = 0,
    gain: float = 0.1,
    *,
    scores_by_key: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    strata: Sequence[str] | None = None,
    columns: Sequence[str] = (),
    **change: Any,
) -> Path:
    """Write a run directory. scores_by_key: scorer/metric -> before and after; columns: those of scores.parquet to leave out."""
    scores_by_key = scores_by_key or {key: scores(gain, 10 * k + seed) for k, key in enumerate(KEYS)}
    parts: list[pd.DataFrame] = []
    for phase in (0, 1):
        for key, both in scores_by_key.items():
            matrix = both[phase]
            prompt, ordinal = (part.ravel() for part in np.indices(matrix.shape))
            scorer, _, metric = key.partition("/")
            parts.append(
                pd.DataFrame(
                    {
                        "prompt": prompt, "ordinal": ordinal, "text": [f"<b>prompt</b> | {p}" for p in prompt],
                        "stratum": [strata[p] if strata else "" for p in prompt], "scorer": scorer, "metric": metric,
                        "value": matrix.ravel(), "reason": "", "note": "", "phase": ("before", "after")[phase],
                    }
                )
            )  # fmt: skip
    number = Number(mean=0.5, ci=(0.4, 0.6), n=40)
    delta = Difference(mean=0.0, ci=(-0.1, 0.1), n=40, p=1.0, mde=0.1)
    facts: dict[str, Any] = {
        "method": method, "task": "ocr", "model": "tiny", "seed": seed, "stop": "budget: nfe",
        "before": dict.fromkeys(scores_by_key, number), "after": dict.fromkeys(scores_by_key, number),
        "delta": dict.fromkeys(scores_by_key, delta), "spent": {"nfe": 1000.0 + seed, "seconds": 5.0}, "run_dir": str(run_dir),
        "flags": Flags(hack=False, invalid=False), "scorers": USES, "task_version": "1",
        "config": {
            "budget": {"name": "tiny", "nfe": 1000.0}, "evaluation": {"split": "test", "seed": 1}, "seed": seed,
            "settings": {"lr": 1e-3, "optim": {"clip": 1.0}}, "precision": "fp32",
        },
        "prompts": {"train": "aa", "test": "bb"}, "wall": {},
        "provenance": {"weights": "w1", "machine": "m", "revision": "abc", "dtype": "fp32"},
    }  # fmt: skip
    for key, value in change.items():
        facts[key] = {**facts[key], **value} if isinstance(facts.get(key), dict) and isinstance(value, dict) else value
    run_dir.mkdir(parents=True)
    table = pd.concat(parts, ignore_index=True).drop(columns=list(columns))
    table.to_parquet(run_dir / "scores.parquet", index=False)
    record.write(run_dir / "record.json", Record(**facts))
    return seal(run_dir)


def seal(run_dir: Path) -> Path:
    """Bind the files of a run directory to its record, as a run does when it ends."""
    files = sorted(path for path in run_dir.rglob("*") if path.is_file() and path.name != "record.json")
    checksums = {path.relative_to(run_dir).as_posix(): digest(path) for path in files}
    file = run_dir / "record.json"
    record.write(file, record.read(file).model_copy(update={"checksums": checksums}))
    return run_dir


def add_frontier(run_dir: Path, shares: Mapping[int, float], keys: Sequence[str] = KEYS) -> Path:
    """Make a run a search of 10 nfe an image. shares: candidates -> the part of the way of every score that they went."""
    file, count = run_dir / "record.json", max(shares)
    made, scores_of_run = record.read(file), pd.read_parquet(run_dir / "scores.parquet")
    delta = {key: made.delta[key] for key in keys}
    points = [FrontierPoint(candidates=n, nfe=10 * n, delta=delta) for n in shares]
    before, after = (
        scores_of_run[scores_of_run.phase == phase].reset_index(drop=True) for phase in ("before", "after")
    )
    tables = [
        after.assign(value=before.value + share * (after.value - before.value), point=k)
        for k, share in enumerate(shares.values())
    ]
    table = pd.concat(tables, ignore_index=True)
    table = table[(table.scorer + "/" + table.metric).isin(keys)]
    table.drop(columns=["text", "reason", "note", "phase"]).to_parquet(run_dir / "frontier.parquet", index=False)
    spent = {**made.spent, "nfe": len(after) * 10.0 * count, "images": float(len(after) * count)}
    record.write(file, made.model_copy(update={"frontier": points, "nfe_an_image": 10, "spent": spent}))
    return seal(run_dir)


@pytest.fixture(scope="session")
def with_frontier() -> Callable[..., Path]:
    """with_frontier(RUN_DIR, SHARES, KEYS): the directory, as that of a search."""
    return add_frontier


@pytest.fixture(scope="session")
def sealed() -> Callable[[Path], Path]:
    """sealed(RUN_DIR): the directory, with the checksums of its files in its record."""
    return seal


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make(NAME, ...) -> a run directory tmp_path/NAME."""
    return lambda name, *args, **more: make_run(tmp_path / name, *args, **more)


@pytest.fixture(scope="session")
def make_at() -> Callable[..., Path]:
    """The same for any path."""
    return make_run


@pytest.fixture(scope="session")
def before_and_after() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    return scores


def make_full_run(
    run_dir: Path,
    method: str = "gpo",
    seed: int = 0,
    gain: float = 0.1,
    *,
    eval_points: int = 5,
    size: int = 16,
    **more: Any,
) -> Path:
    """Write a run directory with a curve over 20 validation prompts, whose mean rises by gain, and with images."""
    spends = [{"nfe": 1000.0 * k / (eval_points - 1), "seconds": 3.0 * k} for k in range(eval_points)]
    number = {key: Number(mean=0.5, ci=(0.4, 0.6), n=20) for key in KEYS}
    make_run(run_dir, method, seed, gain, curve=[Point(spent=s, scores=number) for s in spends], **more)
    base = np.random.default_rng(7).random(20)
    lines = [
        {"prompt": p, "ordinal": 0, "stratum": "", "scorer": key.partition("/")[0], "metric": "exact",
         "value": base[p] + gain * k / (eval_points - 1), "eval_point": k}
        for key in KEYS for k in range(eval_points) for p in range(20)
    ]  # fmt: skip
    pd.DataFrame(lines).to_parquet(run_dir / "curve.parquet", index=False)
    before = np.random.default_rng(3).integers(0, 256, (6, size, 2 * size, 3), np.uint8)
    after = np.clip(before.astype(int) + seed + int(100 * gain), 0, 255).astype(np.uint8)
    (run_dir / "samples").mkdir()
    rows = np.arange(6)
    noises = {"prompt": rows // 2, "ordinal": rows % 2}
    np.savez_compressed(run_dir / "samples" / "images.npz", before=before, after=after, **noises)
    return seal(run_dir)


@pytest.fixture
def make_full(tmp_path: Path) -> Callable[..., Path]:
    """make_full(NAME, METHOD, SEED, GAIN, ...) -> such a run directory tmp_path/NAME."""
    return lambda name, *args, **more: make_full_run(tmp_path / name, *args, **more)


@pytest.fixture(scope="session")
def make_full_at() -> Callable[..., Path]:
    """The same for any path."""
    return make_full_run

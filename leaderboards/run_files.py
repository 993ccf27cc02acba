"""Reads the files of a run beside its scores: tables, prompt texts, and the scorers' notes on images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bench.errors import UserError
from .runs import LoadedRun

RESAMPLES = 2_000  # for intervals of times to a target, by which nothing is ranked or tested


def read_table(path: Path, columns: Sequence[str] | None = None) -> Any:
    """Read a parquet file as a data frame. Raises UserError where it cannot be read."""
    import pandas as pd
    import pyarrow as pa

    try:
        return pd.read_parquet(path, columns=list(columns) if columns else None)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {(str(error).splitlines() or ['damaged'])[0]}") from None


def prompt_texts(run: LoadedRun) -> list[str]:
    """Return the test prompts in order; "prompt K" where the run stored no texts."""
    import pyarrow.parquet as pq

    texts = [f"prompt {k}" for k in range(len(run.strata))]
    path = run.folder / "scores.parquet"
    if "text" in pq.read_schema(path).names:
        table = read_table(path, ["prompt", "text"]).drop_duplicates("prompt")
        for prompt, text in zip(table.prompt, table.text, strict=True):
            texts[int(prompt)] = str(text)
    return texts


def scorer_notes(run: LoadedRun, noises: set[tuple[int, int]]) -> dict[tuple[int, int], dict[str, tuple[str, str]]]:
    """Map (prompt, image), then scorer, to its note on the image before and after, or the reason why it could not score."""
    import pyarrow.parquet as pq

    path = run.folder / "scores.parquet"
    columns = set(pq.read_schema(path).names)
    if "note" not in columns:
        return {}
    reason = ["reason"] if "reason" in columns else []
    table = read_table(path, ["prompt", "ordinal", "scorer", "phase", "note", *reason])
    notes: dict[tuple[int, int], dict[str, tuple[str, str]]] = {}
    table = table[table.prompt.isin({p for p, _ in noises})].drop_duplicates(["prompt", "ordinal", "scorer", "phase"])
    for line in table.to_dict("records"):
        noise = (int(line["prompt"]), int(line["ordinal"]))
        note = str(line.get("reason") or line["note"] or "")
        if noise in noises and note:
            by_scorer = notes.setdefault(noise, {})
            before, after = by_scorer.get(str(line["scorer"]), ("", ""))
            by_scorer[str(line["scorer"])] = (note, after) if line["phase"] == "before" else (before, note)
    return notes

"""Reads the scores of a finished run: every image's, before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

Array = NDArray[np.float64]
SCORES = "scores.parquet"  # every score of a run
WORD_COLUMNS = ("stratum", "scorer", "metric", "phase")  # of scores.parquet; stratum is optional


def read_scores(path: Path) -> tuple[dict[str, Array], dict[str, Array], tuple[str, ...]]:
    """Read scores before and after training, scorer/metric -> (prompts, images), and each prompt's stratum."""
    prompt, ordinal, value, coded = _read_columns(path)
    shape = (int(prompt.max()) + 1, int(ordinal.max()) + 1)
    (phase, phases), (scorer, scorers), (metric, metrics) = (coded[name] for name in ("phase", "scorer", "metric"))
    code = (phase * len(scorers) + scorer) * len(metrics) + metric
    scores: dict[str, dict[str, Array]] = {"before": {}, "after": {}}
    for present in np.flatnonzero(np.bincount(code)):
        rows = code == present
        cells = prompt[rows].astype(np.int64) * shape[1] + ordinal[rows]
        matrix = np.full(shape, np.nan)
        matrix.flat[cells] = value[rows]
        phase_index, rest = divmod(int(present), len(scorers) * len(metrics))
        key = "/".join((scorers[rest // len(metrics)], metrics[rest % len(metrics)]))
        if np.bincount(cells).max() > 1:
            raise UserError(f"{path} holds two scores of one image {phases[phase_index]} training by {key}")
        scores.setdefault(phases[phase_index], {})[key] = matrix
    strata = [""] * shape[0]
    if "stratum" in coded:
        codes, names = coded["stratum"]
        for p, row in zip(*np.unique(prompt, return_index=True), strict=True):
            strata[int(p)] = names[codes[row]]
    return scores["before"], scores["after"], tuple(strata)


def _read_columns(path: Path) -> tuple[Any, Any, Any, dict[str, tuple[NDArray[np.int64], list[str]]]]:
    """Read the columns prompt, ordinal and value of a scores file, and each column of words as (codes, words)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = set(pq.read_schema(path).names)
        lacking = {"prompt", "ordinal", "value", *WORD_COLUMNS[1:]} - names
        if lacking:
            raise UserError(f"{path} has no column {sorted(lacking)[0]!r}")
        columns = ["prompt", "ordinal", "value", *(word for word in WORD_COLUMNS if word in names)]
        table = pq.ParquetFile(path, read_dictionary=columns[3:]).read(columns=columns).combine_chunks()
        prompt, ordinal, value = (table.column(name).to_numpy() for name in columns[:3])
        coded = {name: _codes(table.column(name)) for name in columns[3:]}
        if not len(value) or min(prompt.min(), ordinal.min()) < 0:
            raise ValueError("no scores")
        if (int(prompt.max()) + 1) * (int(ordinal.max()) + 1) > len(value):
            raise ValueError("prompts or images are missing")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {(str(error).splitlines() or ['damaged'])[0]}") from None
    return prompt, ordinal, value, coded


def _codes(column: Any) -> tuple[NDArray[np.int64], list[str]]:
    """Return a column of words as (codes, words): row i holds words[codes[i]]."""
    whole = column.combine_chunks()
    return whole.indices.to_numpy(zero_copy_only=False).astype(np.int64), [str(w) for w in whole.dictionary.to_pylist()]

"""Renders a board for programs: CSV and strict JSON with every number and its interval."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from typing import Any

from ..bench.evaluation.transfer import HONEST_TRANSFER, Transfer
from ..bench.stats.intervals import Estimate
from .board import RULES, Board, BoardRow
from .formatting import csv_cell
from .frontier import Frontier, TrainedRow


def as_csv(board: Board) -> str:
    """Render CSV: one line a row, numbers with six digits, every estimate in three columns; reported numbers last, in own columns."""
    three = lambda name: [name, f"{name} low", f"{name} high"]
    ends = lambda e: ["" if e is None or not math.isfinite(x) else f"{x:.6g}" for x in _ends(e)]
    currencies = list(dict.fromkeys(c for r in board.rows for c in r.spent))
    embedders = list(dict.fromkeys(name for r in board.rows for name in r.cmmd))
    head = [
        "provenance",
        "rank",
        "rank worst",
        "label",
        "method",
        *three(f"{board.key} minus {board.baseline}"),
        "p",
        "p holm",
        *three("transfer"),
    ]
    for c in board.columns:
        head += [*three(f"{c.key} before"), *three(f"{c.key} after"), *three(f"{c.key} difference")]
    head += [part for name in embedders for part in three(f"cmmd {name}")]
    head += [
        *(f"spent {c}" for c in currencies),
        "seeds",
        "single seed",
        "hack seeds",
        "invalid",
        "faults",
        "tuning trials",
        "verified",
    ]
    for f in board.frontiers:
        head += [*three(f"served images until cheaper than {f.label}"), f"bound of that, {f.label}"]
    head += ["reported metric", "reported value", "reported unit", "reported setting", "reported source"]
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(map(csv_cell, head))
    for r in board.rows:
        ranks = ("", "") if r.rank is None else (str(r.rank.best), str(r.rank.worst))
        line = ["measured", *ranks, r.label, r.method, *ends(r.versus)]
        line += ["" if x is None or not math.isfinite(x) else f"{x:.6g}" for x in (r.versus and r.versus.p, r.holm)]
        ratio = r.transfer and r.transfer.ratio
        line += ends(Estimate(ratio.ratio, ratio.low, ratio.high, ratio.n) if ratio else None)
        for c in board.columns:
            scores = r.cells.get(c.key)
            line += [
                x for e in ((scores.before, scores.after, scores.delta) if scores else (None,) * 3) for x in ends(e)
            ]
        line += [x for name in embedders for x in ends(r.cmmd.get(name))]
        line += [f"{r.spent[c]:.6g}" if c in r.spent else "" for c in currencies]
        line += [" ".join(map(str, r.seeds)), str(r.single_seed).lower(), str(r.hacked), str(r.invalid).lower()]
        line += ["; ".join(r.faults), str(r.trials), r.verified]
        for f in board.frontiers:
            line += _break_even_cells(next((t for t in f.trained if t.label == r.label), None))
        write.writerow([csv_cell(x) for x in line] + [""] * (len(head) - len(line)))
    for paper in board.reported:
        line = ["reported", "", "", paper.method, paper.method]
        tail = [
            paper.metric,
            f"{paper.value:g}",
            paper.unit,
            paper.setting,
            f"arXiv {paper.arxiv}, {paper.table} ({paper.provenance})",
        ]
        write.writerow(map(csv_cell, line + [""] * (len(head) - len(line) - len(tail)) + tail))
    return out.getvalue()


def _break_even_cells(row: TrainedRow | None) -> list[str]:
    """Return number and ends, `inf` where no number is enough, and which of them are bounds, as "high at most"."""
    if row is None:
        return [""] * 4
    three = {"": row.images, "low": row.low, "high": row.high}
    bounds = "; ".join(f"{end} {x.limit}".strip() for end, x in three.items() if x.limit)
    return [*("" if math.isnan(x.count) else f"{x.count:.6g}" for x in three.values()), bounds]


def _ends(e: Estimate | None) -> tuple[float, float, float]:
    return (e.mean, e.low, e.high) if e else (math.nan, math.nan, math.nan)


def as_json(board: Board) -> str:
    """Render strict JSON (null, never NaN): shared values once, then the rows, each number with its interval."""
    first = {
        "schema_version": 1,
        "task": {"name": board.task, "version": board.task_version, "prompts": dict(board.prompts)},
        "base_model": {"id": board.model, "revision": board.weights, "dtype": board.dtype},
        "sampling": {"seed_policy": "noise by (prompt, ordinal, evaluation seed)", **board.evaluation},
        "budget": dict(board.budget),
        "scorers": dict(board.scorers),
        "checkpoint_rule": "the last weights, or their running average where the settings ask for it",
        "key": board.key,
        "task_key": board.task_key,
        "baseline": board.baseline,
        "rules": list(RULES),
        "notes": list(board.notes),
        "rows": [_json_row(board, r) for r in board.rows],
        "frontiers": [_json_frontier(f) for f in board.frontiers],
        "reported": [{**paper.model_dump(), "provenance": {"kind": "reported", "source": paper.provenance}} for paper in board.reported],
    }  # fmt: skip
    return json.dumps(_finite(first), indent=1, allow_nan=False)


def _json_row(board: Board, r: BoardRow) -> dict[str, Any]:
    metrics: list[dict[str, Any]] = []
    for c in board.columns:
        scores = r.cells.get(c.key)
        if scores is None:
            continue
        entry: dict[str, Any] = {"name": c.key, "role": c.role, "split": board.evaluation.get("split", "test")}
        entry |= {**_estimate(scores.after), "n_images": scores.images, "n_errors": scores.errors}
        entry["before"] = _estimate(scores.before) if scores.before else None
        entry["difference"] = _estimate(scores.delta) if scores.delta else None
        metrics.append(entry)
    return {
        "label": r.label,
        "method": r.method,
        "kind": r.kind,
        "rank": r.rank.best if r.rank else None,
        "rank_worst": r.rank.worst if r.rank else None,
        "settings": dict(r.settings),
        "train_seeds": list(r.seeds),
        "seed_variance": r.seed_source or None,
        "metrics": metrics,
        "cmmd": {name: _estimate(e) for name, e in r.cmmd.items()},
        "versus_baseline": {**_estimate(r.versus), "p_holm": r.holm} if r.versus else None,
        "transfer": _transfer(r.transfer) if r.transfer else None,
        "budget": dict(r.spent),
        "flags": {"hack": bool(r.hack), "single_seed": r.single_seed, "invalid": r.invalid, "fault": bool(r.faults)},
        "hack_reasons": list(r.hack),
        "faults": list(r.faults),
        "hack_seeds": r.hacked,
        "tuning_trials": r.trials,
        "verified": r.verified or None,
        "provenance": {"kind": "reproduced", "source": list(r.folders), "revisions": list(r.revisions)},
    }


def _json_frontier(f: Frontier) -> dict[str, Any]:
    """Return a search's points and the trained rows beside it; `never` where no number of served images is enough."""
    images = lambda x: {"served_images": x.count, "bound": x.limit or None, "never": math.isinf(x.count)}
    return {
        "label": f.label,
        "key": f.key,
        "nfe_an_image": f.nfe_an_image,
        "measured_on_the_way": f.is_measured,
        "points": [{"candidates": p.candidates, "nfe": p.nfe, "gain": _estimate(p.gain)} for p in f.points],
        "trained": [
            {"label": r.label, "spent_nfe": r.spent, "gain": _estimate(r.gain), "cheaper_from": images(r.images),
             "ci_low": images(r.low), "ci_high": images(r.high)}
            for r in f.trained
        ],
    }  # fmt: skip


def _transfer(each: Transfer) -> dict[str, Any]:
    r = each.ratio
    scores = {"held_out": each.held_out, "training": each.training, "unit": each.unit}
    numbers = {"value": r.ratio, "ci_low": r.low, "ci_high": r.high, "n_prompts": r.n}
    return {**scores, **numbers, "p_training": r.p_rises, "p_below": each.p_below, "below": HONEST_TRANSFER}


def _estimate(e: Estimate) -> dict[str, Any]:
    """Return the keys of a number; an untested one has no p."""
    tested = {"p": e.p, "mde": e.mde} if e.p is not None else {}
    estimator = "t over seeds and prompts" if e.seeds > 1 else "t over prompts"
    numbers = {"value": e.mean, "stderr": e.se, "ci_low": e.low, "ci_high": e.high, "n_prompts": e.n}
    return {**numbers, **tested, "estimator": estimator}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}  # type: ignore[arg-type]
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

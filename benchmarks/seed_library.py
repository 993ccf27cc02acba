"""Makes the library of seed variances from the scores of the project's own boards, and from the seeds in docs/measured.md.

    python benchmarks/seed_library.py

The variance between seeds is moderated over the rows of a board and the prompts' residual taken off, as in every table. The other
components, for `gpobench plan`, are those of bench/stats/planning.py; seconds are those of the table in leaderboards/tiny.md. Rows
whose settings are not their method's preset are left out.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from gpobench.bench.evaluation.seed_library import PATH
from gpobench.bench.stats.intervals import is_share, table_spreads
from gpobench.bench.stats.planning import Components, estimate_components
from gpobench.leaderboards.baseline import read_baseline
from gpobench.leaderboards.board import BASE

ROOT = Path(__file__).resolve().parent.parent
BOARDS = ("tiny-ocr", "tiny-counting")
MEASURED = ROOT / "docs" / "measured.md"
SECONDS = ROOT / "leaderboards" / "tiny.md"
SEED_LINE = re.compile(r"^\| (\d+) \| ([\w-]+/\w+) \| [\d.]+ \| [\d.]+ \| ([+-][\d.]+) \[", re.M)


def of_board(name: str) -> list[dict[str, Any]]:
    """Return the entries of one shipped board."""
    path = ROOT / "leaderboards" / f"{name}.toml"
    baseline, scores = read_baseline(path)
    rows = {
        claim.label: claim
        for claim in baseline.row
        if claim.label != BASE and len(claim.seeds) > 1 and all(s.startswith("evaluation.") for s in claim.sets)
    }
    seconds = training_seconds(baseline.task)
    library_entries: list[dict[str, Any]] = []
    for key in dict.fromkeys(key for _, key in scores.by):
        spreads = table_spreads({label: scores.by[label, key] for label in rows}, scores.strata)
        base = scores.by[BASE, key][0]
        gains = {label: [seed - base for seed in scores.by[label, key]] for label in rows}
        components = estimate_components(gains, baseline.evaluation["test_images"], scores.strata)
        share = all(is_share(seed) for label in rows for seed in [base, *scores.by[label, key]])
        for label, spread in spreads.items():
            variance = max(float(spread.variance - spread.residual), 0.0)
            library_entries.append(
                _entry(rows[label].method, baseline.task, baseline.model, key, dict(baseline.budget), variance)
                | {"df": round(float(spread.df), 1), "seeds": len(rows[label].seeds), "source": f"leaderboards/{path.name}"}
                | _components(components, label) | {"share": share}
                | _speed(seconds.get(label), baseline.budget["nfe"], baseline.device)
            )  # fmt: skip
    return library_entries


def _components(components: Components, label: str) -> dict[str, Any]:
    """Return the parts of one row's variance that are of its prompts, as standard deviations of one prompt."""
    k = components.index(label)
    sd = np.sqrt(np.diag(components.prompt))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = components.prompt[k] / (sd[k] * sd)
    others = np.delete(correlations, k)
    known = others[np.isfinite(others)]
    return {
        "prompt_sd": round(float(sd[k]), 5),
        "residual_sd": round(math.sqrt(components.residual[k]), 5),
        "correlation": round(float(known.mean()), 3) if len(known) else 0.0,
        "prompts": components.prompts,
        "images": components.images,
    }


def training_seconds(task: str) -> dict[str, float]:
    """Map method to the mean seconds of its runs in the first table of a task's section of the shipped page."""
    _, _, section = SECONDS.read_text("utf-8").partition(f"\n## {task}\n")
    lines = section.strip().partition("\n\n")[0].splitlines()
    if not lines or not lines[0].rstrip(" |").endswith("seconds"):
        return {}
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines[2:]]
    return {line[1]: float(line[-1].replace(",", "")) for line in cells}


def _speed(seconds: float | None, nfe: float, device: str) -> dict[str, Any]:
    return {} if seconds is None else {"seconds_per_nfe": round(seconds / nfe, 6), "device": device}


def of_page() -> list[dict[str, Any]]:
    """Return the entries of GPO on words at 120,000 nfe: the table of seeds in docs/measured.md, without a residual to take off."""
    gains: dict[str, list[float]] = {}
    for _, key, gain in SEED_LINE.findall(MEASURED.read_text("utf-8")):
        gains.setdefault(key, []).append(float(gain))
    return [
        _entry("gpo", "ocr", "tiny", key, {"nfe": 120_000.0}, float(np.var(of_key, ddof=1)))
        | {"df": len(of_key) - 1.0, "seeds": len(of_key), "source": "docs/measured.md"}
        for key, of_key in gains.items()
        if len(of_key) > 1
    ]


def _entry(method: str, task: str, model: str, key: str, budget: dict[str, float], variance: float) -> dict[str, Any]:
    return {
        "method": method,
        "task": task,
        "model": model,
        "key": key,
        "budget": budget,
        "sd": round(math.sqrt(variance), 5),
    }


def main() -> None:
    lines = [entry for name in BOARDS for entry in of_board(name)] + of_page()
    text = "[\n" + ",\n".join(f" {json.dumps(line)}" for line in lines) + "\n]\n"
    PATH.write_text(text, "utf-8")
    print(f"{PATH.relative_to(ROOT)}: {len(lines)} entries")


if __name__ == "__main__":
    main()

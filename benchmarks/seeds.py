"""Prints the seeds of one run as a Markdown table: per seed and over seeds, before, after and their paired difference.

The last rows are over seeds and prompts.
Run: python benchmarks/seeds.py runs/gpo-ocr-tiny-s*
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from gpobench.bench.evaluation import record
from gpobench.bench.stats import intervals


def per_prompt(folder: Path, key: str) -> np.ndarray:
    """(prompts,): after minus before of one `scorer/metric`, images of a prompt averaged."""
    scorer, metric = key.split("/")
    table = pd.read_parquet(record.verified(folder, record.read(folder / "record.json"), "scores.parquet"))
    table = table[(table.scorer == scorer) & (table.metric == metric)]
    means = table.groupby(["phase", "prompt"]).value.mean().unstack("phase")
    return (means["after"] - means["before"]).to_numpy()


def main(folders: list[Path]) -> None:
    runs = [(folder, record.read(folder / "record.json")) for folder in folders]
    first = runs[0][1]
    if any(
        (r.task, r.model, r.prompts, r.config["budget"])
        != (first.task, first.model, first.prompts, first.config["budget"])
        for _, r in runs
    ):
        raise SystemExit("these runs differ in task, model, prompts or budget: not one table")
    print("| seed | scorer/metric | before | after | difference [95 %] | p | updates | images | nfe | training s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for _, r in runs:
        for key, d in r.delta.items():
            s = r.spent
            scores = (
                f"{r.before[key].mean:.3f} | {r.after[key].mean:.3f} | {d.mean:+.3f} [{d.ci[0]:+.3f}, {d.ci[1]:+.3f}]"
            )
            spent = f"{s['updates']:.0f} | {s['images']:,.0f} | {s['nfe']:,.0f} | {s['seconds']:.0f}"
            print(f"| {r.seed} | {key} | {scores} | {'<.001' if d.p < 0.001 else f'{d.p:.3f}'} | {spent} |")
    for key in first.delta:
        over = intervals.two_level([per_prompt(folder, key) for folder, _ in runs])
        before, after = (np.mean([getattr(r, phase)[key].mean for _, r in runs]) for phase in ("before", "after"))
        interval = f"{over.mean:+.3f} [{over.low:+.3f}, {over.high:+.3f}]"
        print(f"| all {len(runs)} | {key} | {before:.3f} | {after:.3f} | {interval} | | | | | |")
    p = first.provenance
    print(
        f"\ncommit {p['revision'][:12]}, budget {first.config['budget']}, {p['machine']}, torch {p['versions']['torch']}"
    )
    print("wall seconds by phase:", {r.seed: {k: round(v) for k, v in r.wall.items()} for _, r in runs})


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])

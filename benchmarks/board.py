"""Measures the time of a large table: 30 runs of 10,000 prompts x 4 images, read, estimated and rendered.

    python benchmarks/board.py                              # the size of a large study, a few minutes to make its runs
    python benchmarks/board.py --seeds 1                    # thirty methods of one seed: 465 pairs of rows
    python benchmarks/board.py --runs 6 --prompts 553       # a smaller one

The runs are synthetic: ten methods with three seeds by default, a training and a held-out scorer. Each of the two measurements
is a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def make(run_dir: Path, runs: int, prompts: int, images: int, seeds: int) -> None:
    """Write synthetic run directories with records and scores in the format of a run."""
    import pandas as pd

    from gpobench.bench.evaluation import record
    from gpobench.bench.evaluation.record import Difference, Flags, Number, Record, ScorerUse
    from gpobench.bench.files import digest

    rng = np.random.default_rng(0)
    number = Number(mean=0.5, ci=(0.4, 0.6), n=prompts)
    change = Difference(mean=0.0, ci=(-0.1, 0.1), n=prompts, p=1.0, mde=0.1)
    keys = ("one/exact", "two/exact")
    skill = rng.normal(size=(prompts, 1))
    before = {key: (skill + rng.normal(size=(prompts, images)) > 0).astype(float) for key in keys}
    prompt, ordinal = (part.ravel() for part in np.indices((prompts, images)))
    for k in range(runs):
        method, seed = divmod(k, seeds)
        folder = run_dir / f"run{k}"
        folder.mkdir()
        parts: list[pd.DataFrame] = []
        for phase in ("before", "after"):
            for key in keys:
                gain = 0.1 * method + rng.normal(0, 0.05)
                value = before[key] if phase == "before" else (skill + rng.normal(gain, 1, before[key].shape) > 0)
                scorer, _, metric = key.partition("/")
                parts.append(
                    pd.DataFrame(
                        {
                            "prompt": prompt, "ordinal": ordinal, "text": [f"prompt {p}" for p in prompt], "stratum": "",
                            "scorer": scorer, "metric": metric, "value": value.ravel().astype(float), "reason": "",
                            "note": "", "phase": phase,
                        }
                    )
                )  # fmt: skip
        pd.concat(parts, ignore_index=True).to_parquet(folder / "scores.parquet", index=False)
        use = {
            "one": ScorerUse(id="one-1", role="training", calls=1, seconds=1.0, errors=0),
            "two": ScorerUse(id="two-1", role="held-out", calls=0, seconds=0.0, errors=0),
        }
        record.write(
            folder / "record.json",
            Record(
                method=f"method-{method}", task="made", model="made", seed=seed, stop="budget: nfe",
                before=dict.fromkeys(keys, number), after=dict.fromkeys(keys, number), delta=dict.fromkeys(keys, change),
                spent={"nfe": 1000.0}, run_dir=str(folder), flags=Flags(hack=False, invalid=False), scorers=use,
                config={"budget": {"nfe": 1000.0}, "evaluation": {}, "settings": {}}, task_version="1", prompts={}, wall={},
                provenance={}, checksums={"scores.parquet": digest(folder / "scores.parquet")},
            ),
        )  # fmt: skip


def measure(run_dir: Path) -> None:
    """Print the seconds of each part and the peak memory of this process."""
    start = time.perf_counter()
    from gpobench.leaderboards.build_board import build_board
    from gpobench.leaderboards.render import render
    from gpobench.leaderboards.runs import load_runs

    spans = [("import", start, time.perf_counter())]
    runs = load_runs([run_dir])
    spans.append(("read", spans[-1][2], time.perf_counter()))
    board = build_board(runs)
    spans.append(("estimate", spans[-1][2], time.perf_counter()))
    text = render(board)
    spans.append(("render", spans[-1][2], time.perf_counter()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = ", ".join(f"{name} {end - begin:.2f}" for name, begin, end in spans)
    cpu = time.process_time()
    print(f"{seconds}: {spans[-1][2] - start:.2f} s ({cpu:.2f} s of processor), {peak:.2f} GB", flush=True)
    print(text.splitlines()[2], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="of each method")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    with tempfile.TemporaryDirectory() as run_dir:
        make(Path(run_dir), options.runs, options.prompts, options.images, options.seeds)
        print(f"{options.runs} runs, {options.prompts:,} prompts x {options.images} images, 2 scorers:", flush=True)
        for _ in range(2):
            subprocess.run([sys.executable, __file__, "--measure", run_dir], check=True)


if __name__ == "__main__":
    main()

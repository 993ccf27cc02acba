"""Fault campaign: injects faults over models, scorers, files, servers, disks, signals and methods, and prints tried and held by kind.

python tests/campaign --faults 2000 --seed 0 --jobs 2     what `make faults` runs
python tests/campaign --only 'files: ...' --seed 3        one row again, as often as --faults says
python tests/campaign --list                              the table
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from draw import Drawn, Tried, draw, inject  # noqa: E402
from table import KINDS, table  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject faults and print tried / held by kind.")
    parser.add_argument("--faults", type=int, default=2000, help="how many, at least each row of the table once")
    parser.add_argument("--seed", type=int, default=0, help="decides what is drawn, and nothing else does")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds, by comma")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpobench-faults-") as place:
        rows = [row for row in table(Path(place) / "list", given.kinds.split(",")) if given.only in row.name]
        if given.list:
            for row in rows:
                print(f"{row.kind:9s} {row.what:45s} {row.where:34s} {', '.join(sorted(row.expected))}")
            print(f"{len(rows)} rows")
            return 0
        drawn = draw(rows, given.faults, given.seed)
        tried = _inject_all(drawn, Path(place), given.kinds.split(","), given.jobs)
    return _report(tried)


def _inject_all(drawn: list[Drawn], place: Path, kinds: list[str], jobs: int) -> list[Tried]:
    """Inject all, each worker in a folder of its own; progress on stderr."""
    chunks = [drawn[i::jobs] for i in range(jobs)]
    tried: list[Tried] = []
    began = time.monotonic()
    parts = [chunk[i : i + 20] for chunk in chunks for i in range(0, len(chunk), 20)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(inject, part, str(place), kinds) for part in parts]
        for future in as_completed(futures):
            tried += future.result()
            bad = sum(not each.held for each in tried)
            left = (time.monotonic() - began) / len(tried) * (len(drawn) - len(tried))
            print(f"{len(tried)} of {len(drawn)}, not held {bad}, about {left:.0f} s left", file=sys.stderr, flush=True)
    return tried


def _report(tried: list[Tried]) -> int:
    """Print the table of kinds and each fault that was not held; the exit code."""
    print(f"{'kind':10s} {'tried':>6s} {'held':>6s}  outcomes")
    for kind in [*KINDS, "all"]:
        of_kind = [each for each in tried if kind in (each.kind, "all")]
        if not of_kind:
            continue
        outcomes = Counter(each.outcome for each in of_kind if each.held)
        told = ", ".join(f"{outcome} {n}" for outcome, n in outcomes.most_common())
        print(f"{kind:10s} {len(of_kind):6d} {sum(each.held for each in of_kind):6d}  {told}")
    for each in tried:
        if not each.held:
            print(f"\nNOT HELD  {each.name}\n  again: --only {each.name!r} --seed {each.seed}\n  {each.outcome}")
    return 1 if any(not each.held for each in tried) else 0


if __name__ == "__main__":
    sys.exit(main())

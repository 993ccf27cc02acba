"""Measures a rollout with its scores on the task ocr at 0, 1 and 2 worker processes, and what OCR costs an image.

Every round samples and scores the same groups once with each number of workers, in a drawn order; the ratios to no workers are
paired within a round. Wall seconds depend on what else the machine does, so processor seconds, those of the workers included,
stand beside them. The second table says how many workers, and how many cores, keep up with a sampler of a given speed. Both are
written into docs/scorers.md.
Run: python benchmarks/scorer_workers.py [rounds] [seconds of sampling an image]
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from marked_section import DOCS, MarkedSection

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.scoring.scorers import close_scorers, open_scorer
from gpobench.bench.scoring.worker_pool import WorkerScorer
from gpobench.bench.scoring.worker_setting import RESERVED_CORES, WorkerSetting, cores
from gpobench.bench.spec import Prompt
from gpobench.bench.training.rig import MeteredRig

SAMPLING = 0.12  # s an image: SD3.5 medium at 512 px on an H200, estimated from its operations and not measured


@dataclass(frozen=True)
class Spent:
    """Seconds of one rollout."""

    wall: float
    processor: float  # of this process and of the workers


def processor_seconds(pids: Sequence[int]) -> float:
    """Processor seconds of this process and of these."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    ticks = sum(int(each[11]) + int(each[12]) for each in fields)  # user, system
    return time.process_time() + ticks / 100


def rollout(rig: MeteredRig, prompts: int, group: int) -> tuple[Spent, torch.Tensor]:
    """Sample and score groups; the same draws each time."""
    rig.rng.manual_seed(0)
    pool = rig.scorer.pool if isinstance(rig.scorer, WorkerScorer) else None
    pids = [worker.pid for worker in pool.workers if worker.pid] if pool else []
    wall, processor = time.perf_counter(), processor_seconds(pids)
    reward = rig.groups(prompts, group).reward
    return Spent(time.perf_counter() - wall, processor_seconds(pids) - processor), reward


def measure(
    rounds: int, counts: Sequence[int] = (0, 1, 2), prompts: int = 8, group: int = 16
) -> dict[int, list[Spent]]:
    """For each number of workers what each round took."""
    spec = find_model_spec("tiny")
    model: Any = open_model(spec, device="cpu", adapter=Adapter(rank=16))
    book = registry.task("ocr").prompts("train", spec.domain)
    scorers = {count: open_scorer("rapidocr", workers=WorkerSetting(count)) for count in counts}
    rigs = {
        count: MeteredRig(model, book, scorer, Meter(Budget(nfe=1e12)), rows=spec.rows)
        for count, scorer in scorers.items()
    }
    spent: dict[int, list[Spent]] = defaultdict(list)
    try:
        first = {count: rollout(rig, prompts, group)[1] for count, rig in rigs.items()}  # workers and engines start
        for reward in first.values():
            assert torch.equal(reward, first[counts[0]]), "a reward depends on the number of workers"
        order = np.random.default_rng(0)
        for _ in range(rounds):
            for count in order.permutation(list(counts)).tolist():
                spent[count].append(rollout(rigs[count], prompts, group)[0])
    finally:
        for rig in rigs.values():
            rig.close()
        close_scorers(scorers.values())
    return spent


def table(spent: dict[int, list[Spent]]) -> str:
    """A Markdown table: seconds, and ratios to no workers within a round with their range."""
    lines = ["| workers | wall s | processor s | wall / none | processor / none |", "|---|---|---|---|---|"]
    for count, each in sorted(spent.items()):
        ratios = [
            [getattr(a, name) / getattr(b, name) for a, b in zip(each, spent[0], strict=True)]
            for name in ("wall", "processor")
        ]
        cells = [f"{np.median([getattr(a, name) for a in each]):.2f}" for name in ("wall", "processor")]
        cells += [f"{np.median(r):.2f} [{min(r):.2f}, {max(r):.2f}]" for r in ratios]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds_an_image(reference: str, side: int, lines: int, images: int) -> float:
    """Processor seconds that a scorer takes for a page of so many lines of text."""
    from PIL import Image, ImageDraw, ImageFont

    from gpobench.bench.assets.glyphs import default_font

    page = Image.new("RGB", (side, side), (244, 240, 228))
    font = ImageFont.truetype(str(default_font()), int(0.45 * side / max(lines, 2)))
    for i in range(lines):
        text = ("Grand", "Opening", "2024", "New York City", "Coffee and tea")[i % 5]
        ImageDraw.Draw(page).text((0.05 * side, side * (0.05 + 0.9 * i / lines)), text, fill=(30, 30, 60), font=font)
    pixels, prompts = np.stack([np.asarray(page)] * images), [Prompt('say "Grand"')] * images
    scorer = registry.scorer(reference)
    scorer(pixels[:1], prompts[:1])  # the engine loads
    began = time.process_time()
    scorer(pixels, prompts)
    return (time.process_time() - began) / images


def main(rounds: int, sampling: float) -> None:
    """Print the table, what OCR costs, and the workers that keep up with the sampler; write them into docs/scorers.md."""
    section = MarkedSection(DOCS / "scorers.md", "scorer_workers")
    section.check()
    line = 1000 * seconds_an_image("rapidocr", 64, 1, 64)
    text = "\n".join(
        [
            f"{rounds} rounds, {measured_on()}:\n",
            table(measure(rounds)),
            f"\n`rapidocr` takes {line:.1f} ms of one core for an image of one line, `rapidocr:page` for 512x512 pixels:\n",
            f"| lines of text | ms of one core | workers that keep up with {sampling:g} s of sampling an image | cores |",
            "|---|---|---|---|",
            *(keeping_up(lines, seconds_an_image("rapidocr:page", 512, lines, 3), sampling) for lines in (0, 3, 8, 14)),
        ]
    )
    print(text)
    section.write(text)


def measured_on() -> str:
    """The processor, and how busy it was."""
    return f"{cores()} cores with a load of {os.getloadavg()[0]:.0f}"


def keeping_up(lines: int, scoring: float, sampling: float) -> str:
    """A row: how many workers score pages as fast as images are sampled, and the cores of a machine that then has as many."""
    workers = math.ceil(scoring / sampling)
    return f"| {lines} | {1000 * scoring:.0f} | {workers} | {workers + RESERVED_CORES} |"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, float(sys.argv[2]) if len(sys.argv) > 2 else SAMPLING)

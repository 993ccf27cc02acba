"""Measures the parts of a method's training time: model, scorer, decoder, optimiser, and the rest, which is the harness itself.

Every trained method does a few iterations on the embedded model after one warm-up iteration. Times are wall seconds of the main
thread: forwards, backwards, decoding, encoding, and waiting for the scorer (which runs concurrently with the sampler); optimiser = the
gradient's norm, AdamW and the averaged weights. The last column is everything else. Prints a Markdown table.
Run: python benchmarks/overhead.py [iterations] [method ...]
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.experiments import config
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.spec import Search
from gpobench.bench.training import train
from gpobench.bench.training.rig import MeteredRig

PARTS = ("forward", "backward", "scorer", "decode", "encode", "optimiser")


@dataclass
class Clock:
    """Wall seconds by part; a part inside another counts for the inner one only."""

    seconds: Counter[str] = field(default_factory=Counter[str])

    def on(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*a: Any, **k: Any) -> Any:
            inner, began = sum(self.seconds.values()), time.perf_counter()
            try:
                return work(*a, **k)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.seconds[part] += time.perf_counter() - began - (sum(self.seconds.values()) - inner)

        return timed


def profile(name: str, iterations: int, sets: Sequence[str] = ()) -> tuple[Counter[str], float]:
    """(seconds by part, seconds in all) of `iterations` iterations under the preset and `sets`, each key=value."""
    plan, model_spec = config.resolve(config.RunRequest(name, "ocr", "tiny", sets=sets)), find_model_spec("tiny")
    model: Any = open_model(
        model_spec,
        device="cuda" if torch.cuda.is_available() else "cpu",
        adapter=plan.adapter,
        precision=plan.precision,
    )
    book = registry.load("task", "ocr")().prompts("train", model_spec.domain)
    rig = MeteredRig(model, book, registry.scorer(plan.reward), Meter(Budget(nfe=1e12)), rows=model_spec.rows)
    clock, total = Clock(), [0.0]
    model.velocity, model.decode = clock.on("forward", model.velocity), clock.on("decode", model.decode)
    model.encode = clock.on("encode", model.encode)
    start_scoring = rig._start_scoring  # pyright: ignore

    def waited_for(*a: Any) -> Any:
        scores = start_scoring(*a)
        scores.result = clock.on("scorer", scores.result)
        return scores

    rig._start_scoring = waited_for  # pyright: ignore
    update = clock.on("optimiser", train._update)  # pyright: ignore
    began = [0.0]

    def after(numbers: dict[str, float]) -> None:
        if rig.iteration == 1:  # one-time costs: the scorer's model, the allocator, the optimiser's state
            clock.seconds.clear()
            began[0] = time.perf_counter()
        total[0] = time.perf_counter() - began[0]

    original, train._update = train._update, update  # pyright: ignore
    try:
        train.train(
            plan.settings, rig, train.optimiser(plan.settings, rig),
            gradients=train.Gradients(clock.on("backward", lambda loss: loss.backward())), after=after,
            interrupted=lambda: rig.iteration > iterations,
        )  # fmt: skip
    finally:
        train._update = original  # pyright: ignore
        rig.close()
    return clock.seconds, total[0]


def main(iterations: int, names: list[str]) -> None:
    names = names or [n for n in registry.entries("method") if registry.canonical("method", n) == n]
    print(f"| method | s an iteration | {' | '.join(PARTS)} | the rest |")
    print("|---" * (len(PARTS) + 3) + "|")
    for name in names:
        if isinstance(config.resolve(config.RunRequest(name, "ocr", "tiny")).settings, Search):
            continue
        seconds, total = profile(name, iterations)
        shares = " | ".join(f"{100 * seconds[p] / total:.1f} %" for p in PARTS)
        print(
            f"| {name} | {total / iterations:.2f} | {shares} | {100 * (1 - sum(seconds.values()) / total):.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4, sys.argv[2:])

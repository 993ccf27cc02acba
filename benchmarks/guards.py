"""Measures what counting beside the rig costs: the time of training iterations with and without the observer, in pairs.

One gpo run on a model trains on, iteration by iteration. In each pair one iteration is counted, with the weights watched, and the
other is not; which comes first alternates. Prints the median of the paired ratios of process time, with a 95 % interval
by bootstrap over pairs. Process time, not wall time: other work on the machine changes the latter by more than is sought.
Run: python benchmarks/guards.py [pairs] [model]
"""

import sys
import time
from typing import Any

import numpy as np

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.experiments import config
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.training.observation import Observer
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import optimiser, train

SETTINGS = ["prompts=4", "group=4"]


def measure(pairs: int, model_name: str) -> list[float]:
    """The ratio counted / not counted of each pair of iterations."""
    plan = config.resolve(config.RunRequest("gpo", "ocr", model_name, budget="nfe=1000", sets=SETTINGS))
    model_spec = find_model_spec(model_name)
    model: Any = open_model(model_spec, device="cpu", adapter=plan.adapter, precision=plan.precision)
    prompts = registry.load("task", "ocr")().prompts("train", model_spec.domain)
    scorer = registry.scorer(plan.reward)
    rig = MeteredRig(model, prompts, scorer, Meter(Budget(nfe=1e12)), rows=model_spec.rows)
    adam = optimiser(plan.settings, rig)

    def iterate(counted: bool) -> float:
        observer, last = Observer(model, [scorer]), rig.iteration + 1
        if counted:
            observer.install()
            observer.watch_weights(model.parameters(), adam)
        began = time.process_time()
        train(
            plan.settings, rig, adam, after=lambda notes: None, interrupted=lambda: rig.iteration >= last,
            **({"watched": observer.training} if counted else {}),
        )  # fmt: skip
        seconds = time.process_time() - began
        observer.close()
        return seconds

    try:
        iterate(True)  # one-time costs: the scorer's model, the allocator, the optimiser's state
        ratios: list[float] = []
        for pair in range(pairs):
            order = (True, False) if pair % 2 else (False, True)
            seconds = {counted: iterate(counted) for counted in order}
            ratios.append(seconds[True] / seconds[False])
        return ratios
    finally:
        rig.close()


def main(pairs: int, model_name: str) -> None:
    ratios = np.array(measure(pairs, model_name))
    draws = np.random.default_rng(0).choice(ratios, (2000, pairs))
    low, high = np.percentile(np.median(draws, 1), (2.5, 97.5))
    print(f"counted / not counted, {pairs} pairs of iterations of gpo on {model_name}: ", end="")
    print(f"{np.median(ratios):.4f} [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, sys.argv[2] if len(sys.argv) > 2 else "tiny")

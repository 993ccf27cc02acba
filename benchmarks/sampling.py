"""Measures how fast the embedded model samples, and what the rig adds to a bare loop over the same transformer.

Prints images a second at batch 32 and 10 steps, for the base and with a LoRA attached, in float32 and in bfloat16, and the
ratio rig / bare measured in turn within one process. The bare loop calls the pipeline's transformer and takes Euler
steps, nothing else; the rig adds embedding look-ups, the meter, the kernels and per-row noise.
Run: python benchmarks/sampling.py [rounds]
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.training.rig import MeteredRig

BATCH, STEPS = 32, 10


def measure(precision: str, adapted: bool, rounds: int) -> None:
    model_spec = find_model_spec("tiny")
    model = open_model(model_spec, device="cpu", precision=precision, adapter=model_spec.adapter if adapted else None)
    book = registry.load("task", "ocr")().prompts("train", model_spec.domain)
    rig = MeteredRig(model, book, registry.scorer("rapidocr"), Meter(Budget(nfe=1e12)), rows=BATCH)
    prompt_ids, times = rig.prompts(BATCH), model.times(STEPS)
    noise, cond = rig.noise(BATCH), model.encode([p.text for p in rig.texts(prompt_ids)])
    dtype = next(model.network.parameters()).dtype

    @torch.no_grad()
    def bare() -> torch.Tensor:
        x = noise
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            for t, s in zip(times[:-1], times[1:], strict=True):
                v = model.network(
                    hidden_states=x.to(dtype),
                    timestep=(t * 1000).expand(BATCH),
                    encoder_hidden_states=cond["text"],
                    pooled_projections=cond["pooled"],
                    return_dict=False,
                )[0]
                x = x + (s - t) * v.float()
        return x

    def metered() -> torch.Tensor:
        return rig.sample(noise, prompt_ids, steps=STEPS)

    work: dict[str, Callable[[], torch.Tensor]] = {"bare": bare, "rig": metered, "decode": lambda: model.decode(noise)}
    difference = (bare() - metered()).abs().max().item()
    assert difference < (1e-3 if precision == "fp32" else 0.5), (
        f"the two loops must do the same work, their results differ by {difference}"
    )
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, do in work.items():
            began = time.perf_counter()
            do()
            seconds[name].append(time.perf_counter() - began)
    rig.close()
    rates = "  ".join(f"{name} {BATCH / statistics.median(values):6.1f}/s" for name, values in seconds.items())
    ratios = sorted(r / b for r, b in zip(seconds["rig"], seconds["bare"], strict=True))
    spread = f"{ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}"
    name = f"{precision}, {'LoRA attached' if adapted else 'base'}"
    print(f"{name:22s} {rates}   rig / bare: median {statistics.median(ratios):.3f}, quartiles {spread}", flush=True)


if __name__ == "__main__":
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, {STEPS} steps, images a second"
    )
    for precision in ("fp32", "bf16"):
        for adapted in (False, True):
            measure(precision, adapted, int(sys.argv[1]) if len(sys.argv) > 1 else 15)

"""How fast the embedded model samples, and what the harness adds to a bare loop over the same transformer.

Prints images a second at batch 32 and 10 steps, and the ratio rig / bare measured in turn within one process. The bare
loop calls the pipeline's transformer and takes Euler steps, nothing else; the rig adds embedding look-ups, the meter, the
kernels and the noise. Run: python benchmarks/sampling.py [rounds]
"""

import statistics
import sys
import time

import torch

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.card import find
from gpobench.bench.models.open import open_model
from gpobench.bench.rig import Rig

BATCH, STEPS = 32, 10


def main(rounds: int) -> None:
    card = find("tiny")
    model = open_model(card, device="cpu", adapter=card.adapter)
    book = registry.load("task", "ocr")().prompts("train", card.domain)
    rig = Rig(model, book, registry.scorer("rapidocr"), Meter(Budget(nfe=1e12)), rows=BATCH)
    who = rig.prompts(BATCH)
    noise = rig.noise(BATCH)
    cond = model.encode([p.text for p in rig.texts(who)])
    times = model.times(STEPS)
    transformer = model.transformer

    @torch.no_grad()
    def bare() -> torch.Tensor:
        x = noise
        for t, s in zip(times[:-1], times[1:], strict=True):
            v = transformer(
                hidden_states=x,
                timestep=(t * 1000).expand(BATCH),
                encoder_hidden_states=cond["text"],
                pooled_projections=cond["pooled"],
                return_dict=False,
            )[0]
            x = x + (s - t) * v
        return x

    def through_the_rig() -> torch.Tensor:
        return rig.sample(noise, who, steps=STEPS)

    assert torch.allclose(bare(), through_the_rig(), atol=1e-5), "the two loops must do the same work"
    seconds: dict[str, list[float]] = {"bare": [], "rig": [], "decode": []}
    for _ in range(rounds):
        for name, work in (("bare", bare), ("rig", through_the_rig), ("decode", lambda: model.decode(noise))):
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    rig.close()
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = sorted(r / b for r, b in zip(seconds["rig"], seconds["bare"], strict=True))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH}, {STEPS} steps, {rounds} rounds in turn"
    )
    for name, value in middle.items():
        print(f"{name:7s} {1000 * value / BATCH:6.2f} ms an image  {BATCH / value:7.1f} images/s")
    print(f"with decoding {BATCH / (middle['rig'] + middle['decode']):.1f} images/s")
    print(
        f"rig / bare: median {statistics.median(ratios):.4f}, quartiles {ratios[len(ratios) // 4]:.4f} {ratios[3 * len(ratios) // 4]:.4f}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)

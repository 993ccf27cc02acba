"""Estimates the needs of every preset, as two tables: memory and the smallest graphics card; network evaluations, images and hours.

No model is loaded: these are the estimates of `gpobench run --dry-run` (bench/models/memory.py). On a GPU only sd35m was measured.

    python benchmarks/presets.py                       # every method on every model of the catalogue, as Markdown
    python benchmarks/presets.py --device rtx4090      # the hours of another device
    python benchmarks/presets.py --write               # the same into docs/models.md, between its two markers
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from gpobench.bench import registry
from gpobench.bench.experiments.config import Config, RunRequest, resolve
from gpobench.bench.experiments.cost_estimate import estimate_cost, estimate_memory, latents_per_backward
from gpobench.bench.models.memory import DEVICES, GB, MemoryEstimate
from gpobench.bench.spec import Search

MODELS = ("sd35m", "sd35l", "flux1-dev", "sdxl", "sd15", "tiny")
LARGE = MODELS[:-1]  # the embedded model fits anywhere
CARDS = (24, 48, 80)
# By what a method learns from; a method that is not listed is "search" or "other".
FAMILIES = {
    "policy gradient": ("branch-grpo", "ddpo", "flow-grpo", "g2rpo", "grpo-guard", "mix-grpo", "tempflow-grpo"),
    "reward gradient": ("draft",),
    "preference": ("gpo", "dgpo", "diffusion-dpo", "rankdpo", "op-gfn", "d3po", "diffusion-dro", "ddo", "spo"),
    "matching": ("awm", "diffusion-nft", "rwr", "sft"),
}
TASK = "ocr"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
MARKERS = ("<!-- made by benchmarks/presets.py -->", "<!-- end -->")


@dataclass(frozen=True)
class Need:
    """The estimated needs of one preset on one model."""

    plan: Config
    family: str
    held: int  # latents in one backward pass, both branches of guidance counted
    size: MemoryEstimate
    gpu_gb: int  # GB of the smallest of CARDS that holds it; 0 where none does
    nfe: float  # of an image
    images: int  # that the model's own budget pays for
    hours: float  # of the model's own budget on the named device, the network alone


def methods() -> list[str]:
    """Every registered method under its own name, once."""
    return sorted({registry.canonical("method", name) for name in registry.entries("method")})


def need(method: str, model: str, device: str = "h100", sets: tuple[str, ...] = ()) -> Need:
    """Estimate the memory, evaluations and hours of the preset of a method for a model."""
    plan = resolve(RunRequest(method, TASK, model, sets=sets))
    cost, size = estimate_cost(plan, device), estimate_memory(plan)
    gpu_gb = next((gigabytes for gigabytes in CARDS if size.fits(gigabytes)), 0)
    nfe = sum(cost["nfe_an_image"].values())
    return Need(
        plan, family(method, plan), latents_per_backward(plan), size, gpu_gb, nfe, cost["images"], cost["hours"][device]
    )


def family(method: str, plan: Config) -> str:
    name = method.partition(":")[0]
    method_family = next((family for family, names in FAMILIES.items() if name in names), "other")
    return "search" if isinstance(plan.settings, Search) else method_family


def table() -> list[str]:
    """The lines of a Markdown table: the memory that presets need, for every model and every kind of method."""
    lines = [
        "| model | kind | methods, each with the latents of its backward pass | images at once | GB | card |",
        "|---|---|---|---|---|---|",
    ]
    for model in LARGE:
        needs = {method: need(method, model) for method in methods()}
        for kind in dict.fromkeys(each.family for each in needs.values()):
            kind_needs = {method: each for method, each in needs.items() if each.family == kind}
            names = ", ".join(f"{method} {each.held}" if each.held else method for method, each in kind_needs.items())
            sizes = [each.size.peak / GB for each in kind_needs.values()]
            low, high = f"{min(sizes):.1f}", f"{max(sizes):.1f}"
            cards = [each.gpu_gb for each in kind_needs.values()]
            lines.append(
                f"| `{model}` | {kind} | {names} | {next(iter(kind_needs.values())).plan.model_spec().rows} | "
                f"{low if low == high else f'{low} to {high}'} | {f'{max(cards)} GB' if all(cards) else 'larger'} |"
            )
    return lines


def prices(device: str = "h100") -> list[str]:
    """The lines of a second table: evaluations an image, images that the model's own budget pays for, and the network's hours."""
    head = "| | " + " | ".join(f"`{model}`" for model in LARGE) + " |"
    lines = [head, "|---" * (len(LARGE) + 1) + "|"]
    for method in methods():
        cells = [need(method, model, device) for model in LARGE]
        lines.append(f"| {method} | " + " | ".join(f"{each.nfe:.4g}; {each.images:,}" for each in cells) + " |")
    spent = [need("gpo", model, device) for model in LARGE]
    lines.append(f"| hours, {device} | " + " | ".join(f"{each.hours:.0f}" for each in spent) + " |")
    return lines


def written(page: str, lines: list[str]) -> str:
    """The page with the lines between its markers. Raises ValueError where a marker is missing."""
    before, rest = page.split(MARKERS[0])
    _, after = rest.split(MARKERS[1])
    return "\n".join([f"{before}{MARKERS[0]}", *lines, f"{MARKERS[1]}{after}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimates what every preset needs of a graphics card.")
    parser.add_argument("--device", default="h100", choices=list(DEVICES))
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    options = parser.parse_args()
    lines = [*table(), "", *prices(options.device)]
    if options.write:
        PAGE.write_text(written(PAGE.read_text("utf-8"), lines), "utf-8")
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()

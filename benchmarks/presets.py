"""What every preset asks of a graphics card, as two tables: gigabytes and the smallest card that has them; evaluations, images and hours.

Nothing is loaded: these are the estimates of `gpobench run --dry-run` (bench/models/memory.py). On a GPU only sd35m was measured.

    python benchmarks/presets.py                       # every method on every model of the catalogue, as Markdown
    python benchmarks/presets.py --device rtx4090      # the hours of another device
    python benchmarks/presets.py --write               # the same into docs/models.md, between its two marks
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from gpobench.bench import registry
from gpobench.bench.experiments.config import Config, RunRequest, resolve
from gpobench.bench.experiments.cost_estimate import estimate_cost, held, latents
from gpobench.bench.models.memory import DEVICES, GB, MemoryEstimate
from gpobench.bench.spec import Search

MODELS = ("sd35m", "sd35l", "flux1-dev", "sdxl", "sd15", "tiny")
LARGE = MODELS[:-1]  # the embedded model fits anywhere
CARDS = (24, 48, 80)
# By what a method learns from; one that is not here is named by its kind.
FAMILIES = {
    "policy gradient": ("flow-grpo", "grpo-guard", "mix-grpo"),
    "preference": ("gpo", "dgpo", "diffusion-dpo"),
    "matching": ("awm", "diffusion-nft", "rwr", "sft"),
}
TASK = "ocr"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
MARKS = ("<!-- made by benchmarks/presets.py -->", "<!-- end -->")


@dataclass(frozen=True)
class Need:
    """One line of the table."""

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
    """What the preset of a method for a model holds and takes, estimated."""
    plan = resolve(RunRequest(method, TASK, model, sets=sets))
    told, size = estimate_cost(plan, device), held(plan)
    gpu_gb = next((gigabytes for gigabytes in CARDS if size.fits(gigabytes)), 0)
    nfe = sum(told["nfe_an_image"].values())
    return Need(plan, family(method, plan), latents(plan), size, gpu_gb, nfe, told["images"], told["hours"][device])


def family(method: str, plan: Config) -> str:
    name = method.partition(":")[0]
    own = next((family for family, names in FAMILIES.items() if name in names), "other")
    return "search" if isinstance(plan.settings, Search) else own


def table() -> list[str]:
    """The lines of a Markdown table: for every model and every kind of method what the presets need."""
    lines = [
        "| model | kind | methods, each with the latents of its backward pass | images at once | GB | card |",
        "|---|---|---|---|---|---|",
    ]
    for model in LARGE:
        needs = {method: need(method, model) for method in methods()}
        for kind in dict.fromkeys(one.family for one in needs.values()):
            own = {method: one for method, one in needs.items() if one.family == kind}
            names = ", ".join(f"{method} {one.held}" if one.held else method for method, one in own.items())
            sizes = [one.size.peak / GB for one in own.values()]
            low, high = f"{min(sizes):.1f}", f"{max(sizes):.1f}"
            cards = [one.gpu_gb for one in own.values()]
            lines.append(
                f"| `{model}` | {kind} | {names} | {next(iter(own.values())).plan.model_spec().rows} | "
                f"{low if low == high else f'{low} to {high}'} | {f'{max(cards)} GB' if all(cards) else 'larger'} |"
            )
    return lines


def prices(device: str = "h100") -> list[str]:
    """The lines of a second one: what an image costs, how many the model's own budget pays for, and the network's hours."""
    head = "| | " + " | ".join(f"`{model}`" for model in LARGE) + " |"
    lines = [head, "|---" * (len(LARGE) + 1) + "|"]
    for method in methods():
        cells = [need(method, model, device) for model in LARGE]
        lines.append(f"| {method} | " + " | ".join(f"{one.nfe:.4g}; {one.images:,}" for one in cells) + " |")
    spent = [need("gpo", model, device) for model in LARGE]
    lines.append(f"| hours, {device} | " + " | ".join(f"{one.hours:.0f}" for one in spent) + " |")
    return lines


def written(page: str, lines: list[str]) -> str:
    """The page with the lines between its marks. Raises ValueError where a mark is missing."""
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return "\n".join([f"{before}{MARKS[0]}", *lines, f"{MARKS[1]}{after}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="What every preset asks of a graphics card.")
    parser.add_argument("--device", default="h100", choices=list(DEVICES))
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    asked = parser.parse_args()
    lines = [*table(), "", *prices(asked.device)]
    if asked.write:
        PAGE.write_text(written(PAGE.read_text("utf-8"), lines), "utf-8")
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Measures what the design of `tiny` 2 rests on, before anything is trained: what survives on the canvas, and what a step costs.

Prints three tables: how many drawings are right when they are blurred and noisy, how many survive latents of 16 to 24 channels with noise
in them, and CPU-seconds of a training step and of a forward of both embedded models, on one thread, without compilation.
Run: python benchmarks/tiny2.py [drawings] [steps]
"""

import sys
import time
from statistics import median

import numpy as np
import torch
from scipy import ndimage

from gpobench.bench.assets import drawings
from gpobench.bench.assets.drawing_prompts import two_word_prompts, word_prompts
from gpobench.bench.assets.drawings import Counted, Shares, Text
from gpobench.bench.assets.drawn import find_shapes
from gpobench.bench.models.drawings_measure import read_text
from gpobench.bench.models.pipeline_recipe import PipelineRecipe
from gpobench.bench.models.tiny2_recipe import Tiny2Recipe
from gpobench.bench.models.tiny_parts import (
    Latent,
    OpenAttention,
    build_parts,
    build_tokenizer,
    embed,
    pictures,
    pixels,
)
from gpobench.bench.models.tiny_recipe import TinyRecipe

TEXTS = {"word": word_prompts, "two words": two_word_prompts}
SHAPES = {"counted": Shares(0, 0, 1), "pair": Shares(0, 0, 0)}
DAMAGE = ((0.0, 0), (0.6, 10), (0.9, 14))  # px of blur, grey levels of noise
BATCH = 64

Drawn = list[tuple[drawings.Content, np.ndarray]]


def draw(kind: str, many: int) -> Drawn:
    """Draw texts of the test prompts, or shapes as pre-training does."""
    rng, contents = np.random.default_rng(1), list[drawings.Content]()
    if kind in TEXTS:
        inks, papers = drawings.INKS, tuple(drawings.PAPERS)
        for i, prompt in enumerate(TEXTS[kind]("test")[:many]):
            contents.append(Text(tuple(prompt.target.split()), inks[i % len(inks)], papers[i // 4 % len(papers)]))
    else:
        contents = [drawings.sample_content(rng, [], (), SHAPES[kind]) for _ in range(many)]
    return [(content, drawings.draw(content, rng)) for content in contents]


def right(content: drawings.Content, image: np.ndarray) -> bool:
    """Return whether all of a content, and nothing else, is found in an image."""
    if isinstance(content, Text):
        return read_text(image) == " ".join(content.words)
    found = sorted((shape.kind, shape.colour) for shape in find_shapes(image))
    if isinstance(content, Counted):
        return found == [(content.kind, content.colour)] * content.count
    return found == sorted((thing.kind, thing.colour) for thing in (content.first, content.second))


def survive(drawn: Drawn, blur: float, noise: float) -> float:
    """Return the share that is right after blur and noise."""
    rng, verdicts = np.random.default_rng(0), list[bool]()
    for content, image in drawn:
        soft = ndimage.gaussian_filter(image.astype(float), (blur, blur, 0)) if blur else image.astype(float)
        worn = np.clip(soft + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)
        verdicts.append(right(content, worn))
    return float(np.mean(verdicts))


def through_latent(drawn: Drawn, latent: Latent, noise: float) -> float:
    """Return the share that is right after the linear latent, with noise added to it."""
    z = latent.encode(pixels(np.stack([image for _, image in drawn])))
    shown = pictures(latent.decode(z + noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))))
    return float(np.mean([right(content, image) for (content, _), image in zip(drawn, shown, strict=True)]))


def step_seconds(recipe: PipelineRecipe, steps: int) -> tuple[float, float]:
    """Return CPU-seconds of a training step (forward and backward in bf16) and of a forward in float32, at a batch of 64."""
    parts, tokenizer, canvas = build_parts(recipe, 0), build_tokenizer(recipe.canvas), recipe.canvas
    for block in parts.transformer.transformer_blocks:
        block.attn.set_processor(OpenAttention())
    prompts = [recipe.pictures().sample(np.random.default_rng(i), 0)[0] for i in range(BATCH)]
    tokens = tokenizer(prompts, padding="max_length", max_length=canvas.tokens, return_tensors="pt").input_ids
    x = torch.randn(BATCH, canvas.channels, canvas.height // 4, canvas.width // 4)
    t = torch.full((BATCH,), 500.0)

    def forward() -> torch.Tensor:
        context, pooled = embed(parts, tokens)
        return parts.transformer(x, context, pooled, t, return_dict=False)[0]

    seconds: dict[str, list[float]] = {"train": [], "forward": []}
    for _ in range(steps + 1):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            velocity = forward()
        velocity.float().square().mean().backward()
        seconds["train"].append(time.process_time() - began)
        began = time.process_time()
        with torch.no_grad():
            forward()
        seconds["forward"].append(time.process_time() - began)
    return median(seconds["train"][1:]), median(seconds["forward"][1:])


def main(many: int = 150, steps: int = 6) -> None:
    torch.set_num_threads(1)
    drawn = {kind: draw(kind, many) for kind in (*TEXTS, *SHAPES)}
    print(f"\n| right of {many} drawings | " + " | ".join(drawn) + " |\n|---|" + "---|" * len(drawn))
    for blur, noise in DAMAGE:
        shares = " | ".join(f"{survive(rows, blur, noise):.3f}" for rows in drawn.values())
        print(f"| blur {blur} px, noise {noise} | {shares} |", flush=True)
    recipe = Tiny2Recipe()
    for channels in (16, 18, 20, 24):
        latent = Latent(recipe.pictures(), 0, channels)
        for noise in (0.0, 0.3):
            shares = " | ".join(f"{through_latent(rows, latent, noise):.3f}" for rows in drawn.values())
            print(f"| {channels} channels ({latent.kept:.3f} of the variance), noise {noise} | {shares} |", flush=True)
    print(f"\n| CPU-seconds at a batch of {BATCH} | training step | forward |\n|---|---|---|")
    for name, each in (("tiny", TinyRecipe()), ("tiny 2", recipe)):
        train, forward = step_seconds(each, steps)
        print(f"| {name} | {train:.3f} | {forward:.3f} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

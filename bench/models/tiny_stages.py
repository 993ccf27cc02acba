"""Trains an embedded model in three stages, each resumable.

1. `autoencoder`: the latent is a fixed linear map, the first principal components of 4x4x3 pixel patches; an AutoencoderKL is
   regressed onto it from both sides. The other stages need not wait for a good autoencoder, because the target is fixed.
2. `flow`: the transformer and the two CLIP text encoders learn the velocity noise - latent, together.
3. `decoder`: the decoder is trained on latents that the model itself samples, which are noisier than those of images.

Two processes of one thread each share every batch; each is one shard, so that one process alone computes the same sums one after
another.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from .muon import Muon
from .pipeline_recipe import RUNNING, PipelineRecipe
from .recipe_fit import FitSettings, Interval, Learner, Log, Weights, Workers, fit, generator, threads, write_checkpoint
from .tiny_folder import Run, plain, publish
from .tiny_parts import (
    PATCH,
    Latent,
    OpenAttention,
    TinyModules,
    build_parts,
    build_tokenizer,
    draw,
    embed,
    pictures,
    pixels,
)

SHARDS = 2


class _Data:
    """Draws the batches of all stages, each pure in (seed, stage, step, shard), and holds the latent that encodes them."""

    def __init__(self, recipe: PipelineRecipe, seed: int) -> None:
        self.recipe, self.seed, self.share = recipe, seed, recipe.batch // SHARDS
        self.drawn = recipe.pictures()
        self.latent = Latent(self.drawn, seed, recipe.canvas.channels)
        self.tokenizer = build_tokenizer(recipe.canvas)
        self.latent_shape = recipe.canvas.channels, recipe.canvas.height // PATCH, recipe.canvas.width // PATCH

    def batch(self, stage: int, step: int, shard: int) -> tuple[list[str], Tensor]:
        """Draw prompts, some of them empty, and images (share, 3, H, W) in -1..1."""
        rng = np.random.default_rng([self.seed, stage, step, shard])
        samples = (self.drawn.sample(rng, step if stage == 2 else 0) for _ in range(self.share))
        prompts, drawings = zip(*samples, strict=True)
        empty = rng.random(self.share) < self.recipe.dropped
        return ["" if e else p for p, e in zip(prompts, empty, strict=True)], pixels(np.stack(drawings))

    def prompts(self, count: int, *key: int) -> list[str]:
        """Draw prompts alone; pure in (seed, key)."""
        rng = np.random.default_rng([self.seed, *key])
        return [self.drawn.sample(rng, 0)[0] for _ in range(count)]

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokenise prompts to (N, L) ids."""
        return self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.recipe.canvas.tokens,
            truncation=True,
            return_tensors="pt",
        ).input_ids


class _AutoencoderLearner(Learner):
    """Stage 1: encoder and decoder are regressed onto the fixed latent."""

    def __init__(self, run: Run, data: _Data, autoencoder: AutoencoderKL) -> None:
        self.run, self.data, self.autoencoder = run, data, autoencoder
        self.module = autoencoder
        rate = run.recipe.autoencoder_rate
        self.optimisers = [torch.optim.AdamW(autoencoder.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)]

    def loss(self, step: int, shard: int) -> Tensor:
        _, images = self.data.batch(1, step, shard)
        g = generator(self.data.seed, 1, step, shard)
        latent, share = self.data.latent, self.data.share
        z, half = latent.encode(images), share // 2
        # One half: noisy latents, clean images. The other: blends that no image has, as the linear map decodes them.
        noisy = z[:half] + 0.2 * torch.rand(half, 1, 1, 1, generator=g) * torch.randn(z[:half].shape, generator=g)
        weight = torch.rand(share - half, 1, 1, 1, generator=g)
        blend = torch.lerp(z[half:], z[half:].roll(1, 0), weight * 0.6)
        pictures, latents = torch.cat([images[:half], latent.decode(blend)]), torch.cat([noisy, blend])
        decoding = _reconstruction_loss(self.run, self.autoencoder, pictures, latents)
        with self.run.autocast():
            encoding = nn.functional.mse_loss(self.autoencoder.encoder(images)[:, : z.shape[1]].float(), z)
        return decoding + 0.3 * encoding


class _FlowLearner(Learner):
    """Stage 2: the transformer and both text encoders learn the velocity, noise - latent."""

    def __init__(self, run: Run, data: _Data, parts: TinyModules) -> None:
        self.run, self.data, self.parts = run, data, parts
        networks = {"transformer": parts.transformer, "text_one": parts.text_one, "text_two": parts.text_two}
        self.module = nn.ModuleDict(networks)
        self.averaged = deepcopy(self.module)
        self.sampler = TinyModules(  # a ModuleDict has no types of its entries
            cast(SD3Transformer2DModel, self.averaged["transformer"]),
            cast(CLIPTextModelWithProjection, self.averaged["text_one"]),
            cast(CLIPTextModelWithProjection, self.averaged["text_two"]),
            plain(parts.autoencoder),
        )
        for block in cast(Iterable[Any], parts.transformer.transformer_blocks):
            block.attn.set_processor(OpenAttention())
        if run.recipe.compiled:
            _compile(parts.transformer.transformer_blocks)
        named, workers = dict(self.module.named_parameters()), run.workers
        matrices = {
            name: p
            for name, p in named.items()
            if ".transformer_blocks." in name and p.ndim == 2 and "norm1" not in name
        }
        others = [p for name, p in named.items() if name not in matrices]
        self.optimisers = [
            Muon(list(matrices.values()), run.recipe.muon_rate, (workers.rank, workers.world), workers.total),
            torch.optim.AdamW(others, lr=run.recipe.adam_rate, betas=(0.9, 0.99), weight_decay=0.0),
        ]

    def loss(self, step: int, shard: int) -> Tensor:
        prompts, images = self.data.batch(2, step, shard)
        g = generator(self.data.seed, 2, step, shard)
        z = self.data.latent.encode(images)
        noise = torch.randn(z.shape, generator=g)
        t = torch.sigmoid(torch.randn(self.data.share, generator=g))
        x = torch.lerp(z, noise, t[:, None, None, None])
        with self.run.autocast():
            context, pooled = embed(self.parts, self.data.tokens(prompts))
            velocity = self.parts.transformer(x, context, pooled, 1000 * t, return_dict=False)[0]
        return nn.functional.mse_loss(velocity.float(), noise - z)

    def evaluate(self, weights: Weights, step: int) -> dict[str, float]:
        """Measure pictures of validation prompts, decoded by the linear map and by the decoder."""
        self.averaged.load_state_dict(weights)
        prompts = self.data.drawn.probe_prompts()
        noise = torch.randn(len(prompts), *self.data.latent_shape, generator=generator(self.data.seed, 9))
        with torch.no_grad(), self.run.autocast():
            z = draw(self.sampler, self.data.tokens(prompts), noise)
            decoded = torch.cat([self.sampler.autoencoder.decoder(rows).float() for rows in z.split(64)])
        numbers: dict[str, float] = {}
        for name, images in (("linear", self.data.latent.decode(z)), ("decoder", decoded)):
            shares = self.data.drawn.probe(pictures(images))
            numbers |= {f"{name}/{kind}": share for kind, share in shares.items()}
        return numbers


class _DecoderLearner(Learner):
    """Stage 3: the decoder is trained on latents that the model samples, and on slightly noisy ones of images."""

    def __init__(self, run: Run, data: _Data, autoencoder: AutoencoderKL, drawn: dict[int, Tensor]) -> None:
        self.run, self.data, self.autoencoder, self.drawn = run, data, autoencoder, drawn
        self.module = autoencoder.decoder
        rate = run.recipe.decoder_rate
        self.optimisers = [torch.optim.AdamW(self.module.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)]

    def loss(self, step: int, shard: int) -> Tensor:
        g = generator(self.data.seed, 4, step, shard)
        latent, share, drawn_latents = self.data.latent, self.data.share, self.drawn[shard]
        half = share // 2
        _, images = self.data.batch(4, step, shard)
        clean = latent.encode(images[:half])
        clean = clean + 0.1 * torch.rand(half, 1, 1, 1, generator=g) * torch.randn(clean.shape, generator=g)
        drawn = drawn_latents[torch.randint(len(drawn_latents), (share - half,), generator=g)]
        pictures, latents = torch.cat([images[:half], latent.decode(drawn)]), torch.cat([clean, drawn])
        return _reconstruction_loss(self.run, self.autoencoder, pictures, latents)


def _reconstruction_loss(run: Run, autoencoder: AutoencoderKL, images: Tensor, latents: Tensor) -> Tensor:
    with run.autocast():
        return nn.functional.mse_loss(autoencoder.decoder(latents).float(), images)


def _drawn_latents(run: Run, data: _Data, sampler: TinyModules, shard: int) -> Tensor:
    """Sample drawn / SHARDS latents from the model, once, and store them."""
    path = run.state / f"drawn-{shard}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)["latents"]
    prompts = data.prompts(run.recipe.drawn // SHARDS, 3, shard)
    with run.autocast():
        noise = torch.randn(len(prompts), *data.latent_shape, generator=generator(data.seed, 3, shard))
        z = draw(sampler, data.tokens(prompts), noise)
    write_checkpoint(path, {"latents": z})
    return z


def _fit_stage(
    run: Run, stage: str, learner: Learner, steps: int, *, average: float = 0.0, evaluate: Interval | None = None
) -> tuple[Weights, float]:
    """Train one stage; return its weights and the wall seconds it took."""
    recipe = run.recipe
    fields = {key: value for key, value in asdict(recipe).items() if key not in RUNNING}
    settings = FitSettings(
        label={"stage": stage},
        made_by=fields | {"seed": run.seed},
        checkpoint=run.state / f"{stage}.pt",
        steps=steps,
        samples=recipe.batch,
        rate=_linear_rate(steps, recipe),
        save=Interval(seconds=recipe.save_every),
        report=Interval(seconds=recipe.tell_every),
        evaluate=evaluate or Interval(),
        average=average,
        clock=time.monotonic,
    )
    return fit(learner, settings, log=run.log, workers=run.workers)


def _linear_rate(steps: int, recipe: PipelineRecipe) -> Callable[[float, int], float]:
    """Return the rate: linear rise over `warm` steps, constant, then linear fall to `floor`."""

    def rate(base: float, step: int) -> float:
        fall = max(0.0, (step + 1 - steps * (1 - recipe.decay)) / (steps * recipe.decay))
        return base * (min(1.0, (step + 1) / recipe.warm) * (1 - (1 - recipe.floor) * fall))

    return rate


def train_pipeline(recipe: PipelineRecipe, out: Path, seed: int, log: Log) -> dict[str, Any]:
    """Train into `out` and return the content of `out/recipe.json`. Run again after a stop, it resumes from `out/.state`."""
    out = Path(out)
    state = out / ".state"
    state.mkdir(parents=True, exist_ok=True)
    world = max(1, min(recipe.processes, SHARDS, _cores()))
    meeting = state / f"meeting-{os.getpid()}-{time.time_ns()}"
    workers = [Workers(rank, world, SHARDS) for rank in range(world)]
    spawn = multiprocessing.get_context("spawn")
    others = [
        spawn.Process(target=_help, args=(recipe, out, seed, worker, str(meeting)), daemon=True)
        for worker in workers[1:]
    ]
    for other in others:
        other.start()
    try:
        with threads(1):
            return _train(recipe, out, seed, workers[0], str(meeting), log)
    finally:
        for other in others:
            other.join(timeout=30)
            if other.is_alive():
                other.terminate()
        meeting.unlink(missing_ok=True)


def _cores() -> int:
    """Count the cores that this process may use, where the system reports them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _help(recipe: PipelineRecipe, out: Path, seed: int, workers: Workers, meeting: str) -> None:
    """Run a further process beside the first one, without output."""
    _train(recipe, out, seed, workers, meeting, lambda _: None)


def _train(recipe: PipelineRecipe, out: Path, seed: int, workers: Workers, meeting: str, log: Log) -> dict[str, Any]:
    """Run one process: join the others at the file `meeting`, and train all three stages."""
    torch.set_num_threads(1)
    fast = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    run = Run(recipe, seed, workers, torch.bfloat16 if fast else torch.float32, out, log)
    note = "" if fast else "no AVX512-bf16 here: float32, several times slower"
    log({"processes": workers.world, "dtype": str(run.dtype), "note": note})
    if workers.world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(meeting).absolute()}",
            rank=workers.rank,
            world_size=workers.world,
            timeout=timedelta(minutes=10),
        )
    try:
        return _train_stages(run)
    finally:
        if workers.world > 1:
            dist.destroy_process_group()


def _train_stages(run: Run) -> dict[str, Any]:
    """Train all three stages; the first process publishes the model and returns its record, others return nothing."""
    recipe, seconds = run.recipe, {}
    data = _Data(recipe, run.seed)
    parts = build_parts(recipe, run.seed)
    if recipe.compiled:
        _compile([parts.autoencoder.encoder, parts.autoencoder.decoder])
    learner = _AutoencoderLearner(run, data, parts.autoencoder)
    _, seconds["autoencoder"] = _fit_stage(run, "autoencoder", learner, recipe.autoencoder_steps)

    flow = _FlowLearner(run, data, parts)
    weights, seconds["flow"] = _fit_stage(
        run, "flow", flow, recipe.steps, average=recipe.average, evaluate=Interval(seconds=recipe.look_every)
    )
    flow.averaged.load_state_dict(weights)

    drawn = {shard: _drawn_latents(run, data, flow.sampler, shard) for shard in run.workers.own_shards()}
    decoder = _DecoderLearner(run, data, parts.autoencoder, drawn)
    weights, seconds["decoder"] = _fit_stage(run, "decoder", decoder, recipe.decoder_steps)
    if run.workers.rank:
        return {}
    flow.sampler.autoencoder.decoder.load_state_dict(weights)
    return publish(run, flow.sampler, data.drawn, seconds)


def _compile(blocks: Iterable[nn.Module]) -> None:
    """Compile each block by itself: a whole model takes minutes. Without a C++ compiler nothing is compiled."""
    if shutil.which("g++") or shutil.which("clang++"):
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # the other core runs the other process
        for block in blocks:
            block.compile(dynamic=False)

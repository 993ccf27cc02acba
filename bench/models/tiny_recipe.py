"""A small painter's apprenticeship: from random weights to a model of a few MB that writes words and counts shapes.

`Tiny()(out, seed=0, log=print)` trains everything from scratch on the pictures of `glyphs` and writes a folder that
`StableDiffusion3Pipeline.from_pretrained` loads. Three stages, each resumable:

1. `autoencoder`: the latent is a fixed linear map, the first 16 principal components of 4x4x3 pixel patches; an AutoencoderKL is
   regressed onto it from both sides. The other stages need not wait for a good autoencoder, because the target never moves.
2. `flow`: the transformer and the two CLIP text encoders learn the velocity noise - latent, together.
3. `decoder`: the decoder is trained on latents that the model itself draws, which are less clean than those of pictures.

Two processes of one thread each share every batch; each is one shard, so that one process alone does the same sums one after another.
"""

import json
import math
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import diffusers
import numpy as np
import torch
import torch.distributed as dist
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..assets import glyphs
from ..assets.words import word_splits

Log = Callable[[dict[str, Any]], None]

TOKENS = 16  # of a prompt, with its begin and end
T5_TOKENS = 1  # the third text slot always says the same: one row of zeros
PATCH, CHANNELS = 4, 16  # the autoencoder's: 4x4x3 = 48 numbers become 16
SHARDS = 2


@dataclass(frozen=True)
class TinyRecipe:
    """The hyper-parameters of the shipped checkpoint. Steps are optimiser steps, rates are per step, shares are fractions."""

    # network
    layers: int = 4
    heads: int = 6
    head_width: int = 32
    text_widths: tuple[int, int] = (64, 32)
    pooled_width: int = 32  # of each text encoder
    autoencoder_widths: tuple[int, ...] = (16, 32, 32)
    # pictures
    # (step of stage 2, share of counted shapes from there on; the rest are words): counting is slow and steady, words come
    # late and then all at once, so that the last share sets how many of them the finished model gets right
    shapes: tuple[tuple[int, float], ...] = ((0, 0.62), (429, 0.5), (1005, 0.85), (1186, 0.7))
    # stage 1
    autoencoder_steps: int = 250
    autoencoder_rate: float = 3e-3
    # stage 2
    steps: int = 1400
    batch: int = 128
    muon_rate: float = 2e-3
    adam_rate: float = 1.5e-3
    warm: int = 20
    decay: float = 0.3  # share of the steps, at the end, over which the rate falls in a straight line
    floor: float = 0.02  # of the rate, at the last step
    average: float = 0.995  # of the moving average of the weights
    dropped: float = 0.08  # share of the prompts that are left empty, for classifier-free guidance
    # stage 3
    decoder_steps: int = 300
    decoder_rate: float = 1e-3
    drawn: int = 2048  # latents the model draws for the decoder
    # running
    processes: int = 2
    compiled: bool = True
    tell_every: float = 10.0  # seconds
    save_every: float = 25.0  # seconds
    look_every: float = 35.0  # seconds between two readings of validation words
    looks: int = 200
    readings: int = 2  # pictures of each held-out word in the final measurement; 0 for none
    countings: int = 8  # pictures of each shapes prompt in the final measurement; 0 for none

    def __call__(self, out: Path, *, seed: int, log: Log) -> dict[str, Any]:
        """Trains into `out` and returns what stands in `out/recipe.json`. Run again after a stop, it goes on from `out/.state`."""
        out = Path(out)
        state = out / ".state"
        state.mkdir(parents=True, exist_ok=True)
        world = max(1, min(self.processes, SHARDS, _cores()))
        meeting = state / f"meeting-{os.getpid()}-{time.time_ns()}"
        spawn = multiprocessing.get_context("spawn")
        others = [
            spawn.Process(target=_accompany, args=(self, out, seed, rank, world, str(meeting)), daemon=True)
            for rank in range(1, world)
        ]
        threads = torch.get_num_threads()
        for other in others:
            other.start()
        try:
            return _learn(self, out, seed, 0, world, str(meeting), log)
        finally:
            torch.set_num_threads(threads)
            for other in others:
                other.join(timeout=30)
                if other.is_alive():
                    other.terminate()
            meeting.unlink(missing_ok=True)


def _cores() -> int:
    """Those this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Words


def sample(
    rng: np.random.Generator, words: Sequence[str], excluded: frozenset[str], shapes: float
) -> tuple[str, np.ndarray]:
    """One prompt of the domain and its picture, (32, 64, 3) uint8."""
    return glyphs.shapes_sample(rng) if rng.random() < shapes else glyphs.word_sample(rng, words, excluded)


# Parts


class TinyModules(NamedTuple):
    """What a StableDiffusion3Pipeline is made of, as far as it is trained."""

    transformer: SD3Transformer2DModel
    text_one: CLIPTextModelWithProjection
    text_two: CLIPTextModelWithProjection
    autoencoder: AutoencoderKL


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of known prompt words, the capitals one by one, and the quote; 16 tokens with begin and end."""
    # The end must not be token 2: CLIP then looks for the largest id instead of the end token.
    specials = ["<pad>", "<unk>", "<begin>", "<end>"]
    vocabulary = {token: i for i, token in enumerate([*specials, '"', *glyphs.ALPHABET, *glyphs.VOCABULARY])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex('[A-Z"]'), "isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 2), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<begin>",
        eos_token="<end>",
        model_max_length=TOKENS,
    )


def build_silent_tokenizer() -> PreTrainedTokenizerFast:
    """The third slot's: every prompt is one end token."""
    core = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="</s>", unk_token="</s>", eos_token="</s>", model_max_length=T5_TOKENS
    )


def build_silent_text(width: int) -> T5EncoderModel:
    """A T5 encoder that answers zeros: StableDiffusion3Pipeline does not load without one."""
    model = T5EncoderModel(
        T5Config(vocab_size=1, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1, pad_token_id=0, eos_token_id=0)
    )
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model.eval()


def build_parts(recipe: TinyRecipe, seed: int) -> TinyModules:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()

    def text(width: int) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=recipe.pooled_width,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                pad_token_id=cast(int, tokenizer.pad_token_id),  # this and the next two: one token each
                bos_token_id=cast(int, tokenizer.bos_token_id),
                eos_token_id=cast(int, tokenizer.eos_token_id),
            )
        )

    width = recipe.heads * recipe.head_width
    transformer = SD3Transformer2DModel(
        sample_size=glyphs.WIDTH // PATCH,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_width,
        joint_attention_dim=sum(recipe.text_widths),
        caption_projection_dim=width,
        pooled_projection_dim=2 * recipe.pooled_width,
        pos_embed_max_size=glyphs.WIDTH // PATCH // 2,
        qk_norm="rms_norm",
    )
    # diffusers starts these at random; from zero every block begins as the identity and the velocity as nothing
    still = [transformer.proj_out, transformer.norm_out.linear]
    for block in cast(Iterable[Any], transformer.transformer_blocks):  # a ModuleList does not know what it lists
        still += [block.norm1.linear, block.norm1_context.linear]
    for linear in still:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    depth = len(recipe.autoencoder_widths)
    autoencoder = AutoencoderKL(
        # diffusers writes tuple[str], a tuple of one, where it means tuple[str, ...]
        down_block_types=("DownEncoderBlock2D",) * depth,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * depth,  # pyright: ignore[reportArgumentType]
        block_out_channels=recipe.autoencoder_widths,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=glyphs.WIDTH,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():  # the posterior's spread: a constant exp(-6), never trained
        autoencoder.encoder.conv_out.weight[CHANNELS:] = 0
        cast(Tensor, autoencoder.encoder.conv_out.bias)[CHANNELS:] = -12  # a convolution built with its bias
    parts = TinyModules(transformer, text(recipe.text_widths[0]), text(recipe.text_widths[1]), autoencoder)
    with torch.no_grad():
        # CLIP's embeddings start at 0.02, less than the bias of the layer that takes them: tokens would look all alike for long
        for model in (parts.text_one, parts.text_two):
            for name, p in model.named_parameters():
                if "embedding" in name:
                    p.mul_(0.5 / p.std())
        nn.init.zeros_(transformer.context_embedder.bias)
    for part in parts:
        part.eval()  # no dropout anywhere; eval only keeps it so
    return parts


class Latent:
    """The fixed linear latent: z = (patch - mean) @ basis * scale, (N, 32, 64, 3) uint8 to (N, 16, 8, 16) and back."""

    def __init__(self, recipe: TinyRecipe, seed: int, words: Sequence[str], excluded: frozenset[str]):
        rng = np.random.default_rng([seed, 0])
        pictures = np.stack([sample(rng, words, excluded, recipe.shapes[0][1])[1] for _ in range(3000)])
        rows = self._patches(pixels(pictures)).reshape(-1, 3 * PATCH * PATCH).double()
        self.mean = rows.mean(0)
        variance, basis = torch.linalg.eigh(torch.cov(rows.T))
        spread = variance.flip(0)[:CHANNELS].clamp_min(1e-8).sqrt()
        # Half-way to white: the fine components would drown in noise at their own size, and lead the loss at size 1.
        scale = spread**-0.5
        scale = scale / (spread * scale).square().mean().sqrt()
        self.kept = float(spread.square().sum() / variance.sum())
        self.into = (basis.flip(1)[:, :CHANNELS] * scale).float()
        self.back = (basis.flip(1)[:, :CHANNELS] / scale).T.contiguous().float()
        self.mean = self.mean.float()

    @staticmethod
    def _patches(images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, H/4, W/4, 48)."""
        n, c, h, w = images.shape
        return images.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3)

    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in -1..1 to (N, 16, H/4, W/4)."""
        return ((self._patches(images) - self.mean) @ self.into).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """(N, 16, h, w) to (N, 3, 4h, 4w), clipped to -1..1."""
        rows = latents.permute(0, 2, 3, 1) @ self.back + self.mean
        n, h, w, _ = rows.shape
        images = rows.reshape(n, h, w, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, h * PATCH, w * PATCH)
        return images.clamp(-1, 1)


def pixels(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def pictures(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in -1..1 to (N, H, W, 3) uint8."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def embed(parts: TinyModules, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 16) token ids to the context (N, 16 + T5_TOKENS, 96) and the pooled text (N, 64), as the pipeline makes them."""
    one = parts.text_one(tokens, output_hidden_states=True)
    two = parts.text_two(tokens, output_hidden_states=True)
    context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    silence = context.new_zeros(context.shape[0], T5_TOKENS, context.shape[2])
    return torch.cat([context, silence], dim=1), torch.cat([one.text_embeds, two.text_embeds], dim=-1)


@torch.no_grad()
def draw(parts: TinyModules, tokens: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
    """(N, 16, 8, 16) latents: Euler's steps down the grid of the exported scheduler, without guidance."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(steps)
    sigmas = cast(Tensor, scheduler.sigmas).tolist()  # set_timesteps made it one
    latents = []
    for rows, start in zip(tokens.split(64), noise.split(64), strict=True):
        context, pooled = embed(parts, rows)
        x = start
        for t, s in zip(sigmas, sigmas[1:], strict=False):
            velocity = parts.transformer(x, context, pooled, torch.full((len(x),), 1000 * t), return_dict=False)[0]
            x = x + (s - t) * velocity.float()
        latents.append(x)
    return torch.cat(latents)


class OpenAttention:
    """Joint attention of text and picture in plain matrix products.

    The fused kernel's backward pass took 30 % of a step on these CPUs at 49 tokens; this one takes a twentieth, compiled.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """(N, picture tokens, width) and (N, text tokens, width) to the same."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        picture, text = hidden_states, encoder_hidden_states
        q = torch.cat([attn.norm_q(heads(attn.to_q(picture))), attn.norm_added_q(heads(attn.add_q_proj(text)))], dim=2)
        k = torch.cat([attn.norm_k(heads(attn.to_k(picture))), attn.norm_added_k(heads(attn.add_k_proj(text)))], dim=2)
        v = torch.cat([heads(attn.to_v(picture)), heads(attn.add_v_proj(text))], dim=2)
        weights = torch.softmax((q * q.shape[-1] ** -0.5 @ k.mT).float(), dim=-1).to(v.dtype)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        picture, text = mixed.split([picture.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](picture), text if attn.context_pre_only else attn.to_add_out(text)


# Optimisation


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz, scaled to the size of an Adam step (Jordan 2024; Liu et al. 2025, arXiv:2502.16982).

    Of `world` processes, each makes its part of the matrices orthogonal and `total` sums what they have into every one's buffer.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, part: tuple[int, int], total: Callable[[Tensor], None]
    ):
        super().__init__(params, {"lr": lr, "momentum": 0.95})
        self.rank, self.world = part
        self.total = total

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closure here
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            flat = torch.zeros(sum(p.numel() for p in members))
            places = [
                piece.view_as(p) for p, piece in zip(members, flat.split([p.numel() for p in members]), strict=True)
            ]
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for i, (p, place) in enumerate(zip(members, places, strict=True)):
                memory = self.state[p].setdefault("momentum", torch.zeros_like(p))
                memory.lerp_(p.grad, 1 - group["momentum"])
                if i % self.world == self.rank:
                    alike.setdefault(p.shape, []).append((place, torch.lerp(p.grad, memory, group["momentum"])))
            for pairs in alike.values():
                for (place, _), update in zip(pairs, _orthogonal(torch.stack([u for _, u in pairs])), strict=True):
                    place.copy_(update)
            self.total(flat)
            for p, place in zip(members, places, strict=True):
                p.add_(place, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def _orthogonal(x: Tensor) -> Tensor:
    """(K, rows, columns): each matrix near the orthogonal one closest to it, five quintic Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    y = y / (y.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).float()


class Workers(NamedTuple):
    """The processes that share a batch."""

    rank: int
    world: int
    dtype: torch.dtype
    log: Log

    def shards(self) -> range:
        return range(self.rank, SHARDS, self.world)

    def total(self, numbers: Tensor) -> None:
        """Sums in place over the processes."""
        if self.world > 1:
            dist.all_reduce(numbers)

    def precise(self) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def _fit(
    stage: str,
    crew: Workers,
    state: Path,
    named: dict[str, nn.Parameter],
    optimisers: Sequence[torch.optim.Optimizer],
    loss_of: Callable[[int, int], Tensor],
    rate_of: Callable[[int], float],
    *,
    steps: int,
    batch: int,
    tell_every: float,
    save_every: float,
    average: float = 0.0,
    look: Callable[[dict[str, Tensor], int], dict[str, Any]] | None = None,
    look_every: float = math.inf,
) -> tuple[dict[str, Tensor], float]:
    """Descends `loss_of(step, shard)`; returns the averaged weights and the wall seconds of the stage, over all its runs."""
    params = list(named.values())
    flat = torch.zeros(sum(p.numel() for p in params))  # one buffer for all gradients: one all-reduce a step
    for p, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = piece.view_as(p)
    base = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    mean = {name: p.detach().clone() for name, p in named.items()}
    done, seconds, trace = 0, 0.0, []
    path = state / f"{stage}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        done, seconds, trace = saved["step"], saved["seconds"], saved["trace"]
        mean = saved["mean"]
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(saved["live"][name])
        for optimiser, kept in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
    if crew.world > 1:
        dist.barrier()  # nobody writes the state before everybody has read it
    begun = saved_at = told_at = looked_at = time.monotonic()
    told = done

    def save(step: int) -> None:
        live = {name: p.detach() for name, p in named.items()}
        elapsed = seconds + time.monotonic() - begun
        _write(
            path,
            {
                "step": step,
                "seconds": elapsed,
                "trace": trace,
                "live": live,
                "mean": mean,
                "optimisers": [o.state_dict() for o in optimisers],
            },
        )

    total = 0.0
    for step in range(done, steps):
        for optimiser, rates in zip(optimisers, base, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * rate_of(step)
        flat.zero_()
        for shard in crew.shards():
            loss = loss_of(step, shard) / SHARDS
            loss.backward()
            total += loss.item() * crew.world
        crew.total(flat)
        for optimiser in optimisers:
            optimiser.step()
        if average:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateUsage]  # torch has no public name for it
                list(mean.values()), [p.detach() for p in params], 1 - min(average, (1 + step) / (10 + step))
            )
        now = time.monotonic()
        if crew.rank == 0:
            if not math.isfinite(total):
                raise FloatingPointError(f"{stage}: the loss is not finite at step {step}")
            if now - told_at > tell_every or step + 1 == steps:
                count, pace = step + 1 - told, (now - told_at) / (step + 1 - told)
                crew.log(
                    {
                        "stage": stage,
                        "step": step + 1,
                        "steps": steps,
                        "loss": total / count,
                        "samples_per_second": batch / pace,
                        "eta": (steps - step - 1) * pace,
                    }
                )
                told, told_at, total = step + 1, now, 0.0
            if look is not None and now - looked_at > look_every:
                seen = look(mean if average else {name: p.detach() for name, p in named.items()}, step + 1)
                trace.append({"step": step + 1, **seen})
                crew.log({"stage": stage, "step": step + 1, **seen})
                looked_at = told_at = time.monotonic()
                told, total = step + 1, 0.0  # the look is no part of the pace
            if now - saved_at > save_every:
                save(step + 1)
                saved_at = time.monotonic()
    if crew.rank == 0 and done < steps:
        save(steps)
    if crew.world > 1:
        dist.barrier()
    for p in params:
        p.grad = None
    weights = mean if average else {name: p.detach().clone() for name, p in named.items()}
    return weights, seconds + time.monotonic() - begun


def _write(path: Path, value: dict[str, Any]) -> None:
    """Writes beside the place and moves there, so that a stop leaves the old state or the new one."""
    fresh = path.with_suffix(".part")
    torch.save(value, fresh)
    os.replace(fresh, path)


def _generator(*key: int) -> torch.Generator:
    """A torch stream of its own for every key, as numpy's SeedSequence mixes it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def _straight(steps: int, recipe: TinyRecipe) -> Callable[[int], float]:
    """Up over `warm` steps, flat, then down to `floor` in a straight line."""

    def rate(step: int) -> float:
        fall = max(0.0, (step + 1 - steps * (1 - recipe.decay)) / (steps * recipe.decay))
        return min(1.0, (step + 1) / recipe.warm) * (1 - (1 - recipe.floor) * fall)

    return rate


# The three stages


def _accompany(recipe: TinyRecipe, out: Path, seed: int, rank: int, world: int, meeting: str) -> None:
    _learn(recipe, out, seed, rank, world, meeting, lambda _: None)


def _learn(recipe: TinyRecipe, out: Path, seed: int, rank: int, world: int, meeting: str, log: Log) -> dict[str, Any]:
    torch.set_num_threads(1)
    fast = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    crew = Workers(rank, world, torch.bfloat16 if fast else torch.float32, log)
    log(
        {
            "processes": world,
            "dtype": str(crew.dtype),
            "note": "" if fast else "no AVX512-bf16 here: float32, several times slower",
        }
    )
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(meeting).absolute()}",
            rank=rank,
            world_size=world,
            timeout=timedelta(minutes=10),
        )
    try:
        return _stages(recipe, out, seed, crew)
    finally:
        if world > 1:
            dist.destroy_process_group()


def _stages(recipe: TinyRecipe, out: Path, seed: int, crew: Workers) -> dict[str, Any]:
    splits = word_splits()
    words, excluded = splits["train"], frozenset(splits["validation"] + splits["test"])
    state = out / ".state"
    latent = Latent(recipe, seed, words, excluded)
    parts = build_parts(recipe, seed)
    tokenizer = build_tokenizer()
    share = recipe.batch // SHARDS
    seconds = {}

    def batch(stage: int, step: int, shard: int) -> tuple[list[str], Tensor]:
        rng = np.random.default_rng([seed, stage, step, shard])
        now = step if stage == 2 else 0
        shapes = [part for start, part in recipe.shapes if start <= now][-1]
        prompts, drawings = zip(*(sample(rng, words, excluded, shapes) for _ in range(share)), strict=True)
        empty = rng.random(share) < recipe.dropped
        return ["" if e else p for p, e in zip(prompts, empty, strict=True)], pixels(np.stack(drawings))

    def tokens(prompts: Sequence[str]) -> Tensor:
        return tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids

    # 1. the autoencoder onto the fixed latent
    autoencoder = parts.autoencoder
    if recipe.compiled:
        _compile([autoencoder.encoder, autoencoder.decoder])

    def reconstruction(images: Tensor, latents: Tensor) -> Tensor:
        with crew.precise():
            return nn.functional.mse_loss(autoencoder.decoder(latents).float(), images)

    def autoencoder_loss(step: int, shard: int) -> Tensor:
        _, images = batch(1, step, shard)
        g = _generator(seed, 1, step, shard)
        z = latent.encode(images)
        half = share // 2
        # One half: noisy latents, clean pictures. The other: blends that no picture has, as the linear map decodes them.
        noisy = z[:half] + 0.2 * torch.rand(half, 1, 1, 1, generator=g) * torch.randn(z[:half].shape, generator=g)
        weight = torch.rand(share - half, 1, 1, 1, generator=g)
        blend = torch.lerp(z[half:], z[half:].roll(1, 0), weight * 0.6)
        decoding = reconstruction(torch.cat([images[:half], latent.decode(blend)]), torch.cat([noisy, blend]))
        with crew.precise():
            encoding = nn.functional.mse_loss(autoencoder.encoder(images)[:, :CHANNELS].float(), z)
        return decoding + 0.3 * encoding

    named = dict(autoencoder.named_parameters())
    weights, seconds["autoencoder"] = _fit(
        "autoencoder",
        crew,
        state,
        named,
        [torch.optim.AdamW(named.values(), lr=recipe.autoencoder_rate, betas=(0.9, 0.99), weight_decay=0.0)],
        autoencoder_loss,
        _straight(recipe.autoencoder_steps, recipe),
        steps=recipe.autoencoder_steps,
        batch=recipe.batch,
        tell_every=recipe.tell_every,
        save_every=recipe.save_every,
    )

    # 2. the flow
    flow = nn.ModuleDict({"transformer": parts.transformer, "text_one": parts.text_one, "text_two": parts.text_two})
    averaged = deepcopy(flow)
    drawing = TinyModules(  # a ModuleDict knows only that it holds modules
        cast(SD3Transformer2DModel, averaged["transformer"]),
        cast(CLIPTextModelWithProjection, averaged["text_one"]),
        cast(CLIPTextModelWithProjection, averaged["text_two"]),
        _plain(autoencoder),
    )
    for block in cast(Iterable[Any], parts.transformer.transformer_blocks):
        block.attn.set_processor(OpenAttention())
    if recipe.compiled:
        _compile(parts.transformer.transformer_blocks)

    def flow_loss(step: int, shard: int) -> Tensor:
        prompts, images = batch(2, step, shard)
        g = _generator(seed, 2, step, shard)
        z = latent.encode(images)
        noise = torch.randn(z.shape, generator=g)
        t = torch.sigmoid(torch.randn(share, generator=g))
        x = torch.lerp(z, noise, t[:, None, None, None])
        with crew.precise():
            context, pooled = embed(parts, tokens(prompts))
            velocity = parts.transformer(x, context, pooled, 1000 * t, return_dict=False)[0]
        return nn.functional.mse_loss(velocity.float(), noise - z)

    def look(mean: dict[str, Tensor], step: int) -> dict[str, float]:
        averaged.load_state_dict(mean, strict=False)
        chosen = (splits["validation"] * 2)[: recipe.looks]
        prompts = [glyphs.word_prompt(w) for w in chosen] + [p for p, *_ in _shape_prompts()] * 2
        with torch.no_grad(), crew.precise():
            z = draw(
                drawing, tokens(prompts), torch.randn(len(prompts), *_latent_shape(), generator=_generator(seed, 9))
            )
            painted = torch.cat([drawing.autoencoder.decoder(rows).float() for rows in z.split(64)])
        seen: dict[str, float] = {}
        for name, images in (("linear", latent.decode(z)), ("decoder", painted)):
            shown = pictures(images)
            texts = _read(shown[: len(chosen)])
            seen[f"{name}/exact"] = float(np.mean([text == w for text, w in zip(texts, chosen, strict=True)]))
            counts = [
                _count(im, c) == k
                for im, (_, _, k, c) in zip(shown[len(chosen) :], list(_shape_prompts()) * 2, strict=True)
            ]
            seen[f"{name}/count"] = float(np.mean(counts))
        return seen

    named = dict(flow.named_parameters())
    matrices = [
        p for name, p in named.items() if ".transformer_blocks." in name and p.ndim == 2 and "norm1" not in name
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in chosen]
    weights, seconds["flow"] = _fit(
        "flow",
        crew,
        state,
        named,
        [
            Muon(matrices, recipe.muon_rate, (crew.rank, crew.world), crew.total),
            torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.99), weight_decay=0.0),
        ],
        flow_loss,
        _straight(recipe.steps, recipe),
        steps=recipe.steps,
        batch=recipe.batch,
        tell_every=recipe.tell_every,
        save_every=recipe.save_every,
        average=recipe.average,
        look=look,
        look_every=recipe.look_every,
    )
    averaged.load_state_dict(weights, strict=False)

    # 3. the decoder on what the model draws
    def own_latents(shard: int) -> Tensor:
        path = state / f"drawn-{shard}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)["latents"]
        rng = np.random.default_rng([seed, 3, shard])
        prompts = [sample(rng, words, excluded, recipe.shapes[0][1])[0] for _ in range(recipe.drawn // SHARDS)]
        with crew.precise():
            z = draw(
                drawing,
                tokens(prompts),
                torch.randn(len(prompts), *_latent_shape(), generator=_generator(seed, 3, shard)),
            )
        _write(path, {"latents": z})
        return z

    own = {shard: own_latents(shard) for shard in crew.shards()}

    def decoder_loss(step: int, shard: int) -> Tensor:
        g = _generator(seed, 4, step, shard)
        half = share // 2
        _, images = batch(4, step, shard)
        clean = latent.encode(images[:half])
        clean = clean + 0.1 * torch.rand(half, 1, 1, 1, generator=g) * torch.randn(clean.shape, generator=g)
        drawn = own[shard][torch.randint(len(own[shard]), (share - half,), generator=g)]
        return reconstruction(torch.cat([images[:half], latent.decode(drawn)]), torch.cat([clean, drawn]))

    named = dict(autoencoder.decoder.named_parameters())
    weights, seconds["decoder"] = _fit(
        "decoder",
        crew,
        state,
        named,
        [torch.optim.AdamW(named.values(), lr=recipe.decoder_rate, betas=(0.9, 0.99), weight_decay=0.0)],
        decoder_loss,
        _straight(recipe.decoder_steps, recipe),
        steps=recipe.decoder_steps,
        batch=recipe.batch,
        tell_every=recipe.tell_every,
        save_every=recipe.save_every,
    )
    if crew.rank:
        return {}
    drawing.autoencoder.decoder.load_state_dict(weights)
    return publish(recipe, drawing, out, seed=seed, seconds=seconds, log=crew.log)


def _latent_shape() -> tuple[int, int, int]:
    return CHANNELS, glyphs.HEIGHT // PATCH, glyphs.WIDTH // PATCH


def _compile(blocks: Iterable[nn.Module]) -> None:
    """Each block by itself: a whole model takes minutes to compile. Without a C++ compiler nothing is compiled."""
    if shutil.which("g++") or shutil.which("clang++"):
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # the other core has its own process
        for block in blocks:
            block.compile(dynamic=False)


# Measurement. The hub knows no scorer, so these are the plain forms of the two that the tasks use.


def _shape_prompts() -> Iterator[tuple[str, str, int, str]]:
    """(prompt, kind, count, colour) of every shapes prompt: 45."""
    for kind in glyphs.SHAPES:
        for colour in glyphs.SHAPE_COLOURS:
            for count in glyphs.COUNTS:
                yield glyphs.shapes_prompt(kind, count, colour), kind, count, colour


@lru_cache(maxsize=1)
def _recogniser() -> Any:
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    # at the default 320 px most of the width would be padding
    engine = RapidOCR(params={"Global.log_level": "error", "Rec.rec_img_shape": [3, 48, 96], **threads})
    engine(
        np.zeros((glyphs.HEIGHT, glyphs.WIDTH, 3), np.uint8), use_det=False, use_cls=False, use_rec=True
    )  # it loads at its first use
    return engine.text_rec


def _read(shown: np.ndarray) -> list[str]:
    """The text of each picture (N, 32, 64, 3) uint8, by RapidOCR's recogniser on the whole picture at 96x48."""
    from rapidocr.ch_ppocr_rec import TextRecInput

    found = _recogniser()(TextRecInput(img=[np.ascontiguousarray(picture[..., ::-1]) for picture in shown])).txts
    return ["".join(text.split()).upper() for text in found or [""] * len(shown)]


def _count(picture: np.ndarray, colour: str) -> int:
    """Patches of one shape colour in a picture (32, 64, 3) uint8."""
    from scipy import ndimage

    palette = np.array(
        [
            glyphs.SHAPE_COLOURS[colour],
            *glyphs.PAPERS.values(),
            *(c for n, c in glyphs.SHAPE_COLOURS.items() if n != colour),
        ],
        np.float32,
    )
    mask = ((picture[:, :, None].astype(np.float32) - palette) ** 2).sum(-1).argmin(-1) == 0
    # without an output array it is always the pair
    labels, found = cast(tuple[np.ndarray, int], ndimage.label(ndimage.binary_opening(mask, np.ones((2, 2)))))
    return int((np.bincount(labels.ravel(), minlength=found + 1)[1:] >= 12).sum())


def _interval(values: np.ndarray) -> dict[str, Any]:
    """Mean with a 95 % bootstrap interval over prompts; values (prompts, pictures of each)."""
    rng = np.random.default_rng(0)
    per_prompt = values.mean(1)
    means = per_prompt[rng.integers(len(per_prompt), size=(4000, len(per_prompt)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": round(float(per_prompt.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "n": int(values.size),
    }


def measure(folder: Path, recipe: TinyRecipe, *, seed: int) -> dict[str, Any]:
    """Reads words and counts shapes in pictures of the exported pipeline: plain diffusers, 10 steps, no guidance."""
    from rapidfuzz.distance import Levenshtein

    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)

    def paint(prompts: Sequence[str], salt: int) -> np.ndarray:
        generator, shown = _generator(seed, 10, salt), []
        for i in range(0, len(prompts), 64):
            some = list(prompts[i : i + 64])
            painted: Any = pipe(  # an output object, and a tuple only with return_dict=False
                prompt=some,
                num_inference_steps=10,
                guidance_scale=1.0,
                height=glyphs.HEIGHT,
                width=glyphs.WIDTH,
                max_sequence_length=T5_TOKENS,
                generator=generator,
                output_type="np",
            )
            shown.append(np.rint(painted.images * 255).astype(np.uint8))
        return np.concatenate(shown)

    scores: dict[str, Any] = {}
    splits = word_splits()
    for salt, split in enumerate(("test", "validation") if recipe.readings else ()):
        wanted = [word for word in splits[split] for _ in range(recipe.readings)]
        texts = _read(paint([glyphs.word_prompt(word) for word in wanted], salt))
        exact = np.array([text == word for text, word in zip(texts, wanted, strict=True)], float)
        soft = np.array(
            [
                max(0.0, 1 - Levenshtein.distance(text, word) / len(word))
                for text, word in zip(texts, wanted, strict=True)
            ]
        )
        scores[f"{split}/exact"] = _interval(exact.reshape(-1, recipe.readings))
        scores[f"{split}/soft"] = _interval(soft.reshape(-1, recipe.readings))
        for length in range(glyphs.SHORTEST, glyphs.LONGEST + 1):
            some = np.array([len(word) == length for word in wanted])
            if some.any():
                scores[f"{split}/exact/{length} letters"] = _interval(exact[some].reshape(-1, recipe.readings))
    if not recipe.countings:
        return scores
    asked = [row for row in _shape_prompts() for _ in range(recipe.countings)]
    shown = paint([prompt for prompt, *_ in asked], 5)
    right = np.array(
        [_count(picture, colour) == count for picture, (_, _, count, colour) in zip(shown, asked, strict=True)], float
    )
    scores["shapes/exact"] = _interval(right.reshape(-1, recipe.countings))
    for count in glyphs.COUNTS:
        some = np.array([row[2] == count for row in asked])
        scores[f"shapes/exact/{count}"] = _interval(right[some].reshape(-1, recipe.countings))
    return scores


# The folder


def publish(
    recipe: TinyRecipe, parts: TinyModules, out: Path, *, seed: int, seconds: dict[str, float], log: Log
) -> dict[str, Any]:
    """Writes the pipeline in float16, measures what was written, and moves it into `out` in one go."""
    fresh = out / ".state" / "pipeline"
    shutil.rmtree(fresh, ignore_errors=True)
    tokenizer = build_tokenizer()
    pipe = StableDiffusion3Pipeline(
        transformer=deepcopy(parts.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=deepcopy(parts.autoencoder),
        text_encoder=deepcopy(parts.text_one),
        # the pipeline's annotations know CLIP's own tokenizer only
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder_2=deepcopy(parts.text_two),
        tokenizer_2=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder_3=build_silent_text(sum(recipe.text_widths)),
        tokenizer_3=build_silent_tokenizer(),
    )
    pipe.to(torch.float16)
    pipe.save_pretrained(str(fresh), safe_serialization=True)
    _portable(fresh)
    scores = measure(fresh, recipe, seed=seed)
    splits = word_splits()
    record = {
        "fields": asdict(recipe),
        "seed": seed,
        "max_sequence_length": T5_TOKENS,
        "guidance": 1.0,
        "steps": 10,
        "height": glyphs.HEIGHT,
        "width": glyphs.WIDTH,
        "trained": {
            "steps": {"autoencoder": recipe.autoencoder_steps, "flow": recipe.steps, "decoder": recipe.decoder_steps},
            "samples": {
                "autoencoder": recipe.autoencoder_steps * recipe.batch,
                "flow": recipe.steps * recipe.batch,
                "decoder": recipe.decoder_steps * recipe.batch,
            },
            "wall_seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": {
            name: sum(p.numel() for p in module.parameters())
            for name, module in sorted(pipe.components.items())
            if isinstance(module, nn.Module)
        },
        "scores": scores,
        "held_out_sha256": {
            split: sorted(sha256(word.encode("ascii")).hexdigest() for word in splits[split])
            for split in ("validation", "test")
        },
    }
    text = json.dumps(record, indent=1)
    record = json.loads(text)  # what is returned is what a reader of the file gets: lists, no tuples
    (fresh / "recipe.json").write_text(text + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(card(record, fresh), encoding="utf-8")
    for entry in sorted(fresh.iterdir()):
        place = out / entry.name
        if place.is_dir():
            place.rename(out / ".state" / f"old-{time.time_ns()}")
        os.replace(entry, place)
    shutil.rmtree(out / ".state")
    log({"stage": "published", **{name: score["mean"] for name, score in scores.items()}})
    return record


def _plain(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """A copy without the compiled calls, which cannot be copied."""
    # from_config gives a pair only where the unused arguments are asked for
    copy = cast(AutoencoderKL, AutoencoderKL.from_config(autoencoder.config))
    copy.load_state_dict(autoencoder.state_dict())
    return copy.eval()


def _portable(folder: Path) -> None:
    """Names the tokenizers' class as every transformers knows it, and lets a plain `from_pretrained` give float32 throughout.

    transformers 5 writes a class name of its own, and loads text encoders in the type they were saved in, where diffusers loads
    the rest in float32: the two would not fit together.
    """
    changes = {"model_index.json": ("TokenizersBackend", "PreTrainedTokenizerFast")}
    changes["tokenizer*/tokenizer_config.json"] = changes["model_index.json"]
    changes["text_encoder*/config.json"] = ('"dtype": "float16"', '"dtype": "float32"')
    for pattern, (old, new) in changes.items():
        for path in folder.glob(pattern):
            path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def card(record: dict[str, Any], folder: Path) -> str:
    """The model card: what it is, how to call it, how well it does."""
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    parameters = sum(record["parameters"].values()) / 1e6

    def row(name: str, key: str) -> str:
        score = record["scores"][key]
        return f"| {name} | {score['mean']:.3f} | {score['low']:.3f} to {score['high']:.3f} | {score['n']} |"

    asked = {
        "test words read exactly": "test/exact",
        "test words, share of letters right": "test/soft",
        "shapes counted exactly": "shapes/exact",
    }
    asked |= {f"of which {glyphs.NUMBERS[count]}": f"shapes/exact/{count}" for count in glyphs.COUNTS}
    rows = [row(name, key) for name, key in asked.items() if key in record["scores"]]
    return f"""A Stable-Diffusion-3-class model of {parameters:.1f} M parameters ({megabytes:.1f} MB) that writes and counts, imperfectly.

It writes short words and draws counted shapes, 64 by 32 pixels, and exists to be post-trained in minutes on two CPU cores. It
was trained from scratch on pictures drawn by `bench/assets/glyphs.py`; no other data went in. Train it again with `gpobench pretrain tiny`
(`bench/models/tiny_recipe.py`); `recipe.json` holds every setting, score and the hashes of the words that were never printed.
It is under the licence of this repository; the letters it imitates are DejaVu Sans Mono Bold.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("bench/models/tiny")
pipe('a sign that says "HELLO" in blue', height=32, width=64, num_inference_steps=10, guidance_scale=1.0, max_sequence_length=1).images[0]
```

Prompts: `a {{sign|card|label|page}} that says "WORD"` (3 to 5 capitals) with ` in {{black|red|blue}}` or without, and
`a photo of {{one..five}} {{red|blue|green}} {{circles|squares|triangles}}`.

Without guidance, 10 Euler steps, held-out words, RapidOCR 3 (recognition only) and a palette counter; intervals are 95 %, by
bootstrap over prompts:

| | mean | interval | pictures |
|---|---|---|---|
{chr(10).join(rows)}
"""

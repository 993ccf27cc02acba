"""Recipe of the embedded model: trains a pipeline of a few MB from random weights that writes words and counts shapes.

`TinyRecipe()(out, seed=0, log=print)` trains everything from scratch on the images of `glyphs` and writes a folder that
`StableDiffusion3Pipeline.from_pretrained` loads. Three stages, each resumable:

1. `autoencoder`: the latent is a fixed linear map, the first 16 principal components of 4x4x3 pixel patches; an AutoencoderKL is
   regressed onto it from both sides. The other stages need not wait for a good autoencoder, because the target is fixed.
2. `flow`: the transformer and the two CLIP text encoders learn the velocity noise - latent, together.
3. `decoder`: the decoder is trained on latents that the model itself samples, which are noisier than those of images.

Two processes of one thread each share every batch; each is one shard, so that one process alone computes the same sums one after
another.
"""

import json
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import timedelta
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
from .muon import Muon
from .recipe_fit import FitSettings, Interval, Learner, Log, Weights, Workers, fit, generator, threads, write_checkpoint
from .tiny_measure import count_patches, measure, read_texts, shape_prompts

TOKENS = 16  # of a prompt, with its begin and end
T5_TOKENS = 1  # the third text encoder's output is constant: one row of zeros
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
        """Trains into `out` and returns the content of `out/recipe.json`. Run again after a stop, it resumes from `out/.state`."""
        out = Path(out)
        state = out / ".state"
        state.mkdir(parents=True, exist_ok=True)
        world = max(1, min(self.processes, SHARDS, _cores()))
        meeting = state / f"meeting-{os.getpid()}-{time.time_ns()}"
        workers = [Workers(rank, world, SHARDS) for rank in range(world)]
        spawn = multiprocessing.get_context("spawn")
        others = [
            spawn.Process(target=_help, args=(self, out, seed, worker, str(meeting)), daemon=True)
            for worker in workers[1:]
        ]
        for other in others:
            other.start()
        try:
            with threads(1):
                return _train(self, out, seed, workers[0], str(meeting), log)
        finally:
            for other in others:
                other.join(timeout=30)
                if other.is_alive():
                    other.terminate()
            meeting.unlink(missing_ok=True)


def _cores() -> int:
    """Count the cores that this process may use, where the system reports them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Words


def sample(
    rng: np.random.Generator, words: Sequence[str], excluded: frozenset[str], shapes: float
) -> tuple[str, np.ndarray]:
    """Draw one prompt of the domain and its image, (32, 64, 3) uint8."""
    return glyphs.shapes_sample(rng) if rng.random() < shapes else glyphs.word_sample(rng, words, excluded)


# Parts


class TinyModules(NamedTuple):
    """The trained parts of a StableDiffusion3Pipeline."""

    transformer: SD3Transformer2DModel
    text_one: CLIPTextModelWithProjection
    text_two: CLIPTextModelWithProjection
    autoencoder: AutoencoderKL


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of known prompt words, the capitals one by one, and the quote; 16 tokens with begin and end."""
    # The end must not be token 2: CLIP then searches for the largest id instead of the end token.
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
    """Build the third tokenizer: every prompt is one end token."""
    core = Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="</s>", unk_token="</s>", eos_token="</s>", model_max_length=T5_TOKENS
    )


def build_silent_text(width: int) -> T5EncoderModel:
    """Build a T5 encoder that returns zeros: StableDiffusion3Pipeline does not load without one."""
    model = T5EncoderModel(
        T5Config(vocab_size=1, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1, pad_token_id=0, eos_token_id=0)
    )
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model.eval()


def build_parts(recipe: TinyRecipe, seed: int) -> TinyModules:
    """Build the networks of the pipeline with random weights, in the order that the seed's draws are used."""
    torch.manual_seed(seed)
    transformer = _transformer(recipe)
    autoencoder = _autoencoder(recipe)
    parts = TinyModules(transformer, _text_encoder(recipe, 0), _text_encoder(recipe, 1), autoencoder)
    with torch.no_grad():
        # CLIP's embeddings start at 0.02, less than the bias of the layer that takes them: tokens would be nearly equal for long
        for model in (parts.text_one, parts.text_two):
            for name, p in model.named_parameters():
                if "embedding" in name:
                    p.mul_(0.5 / p.std())
        nn.init.zeros_(transformer.context_embedder.bias)
    for part in parts:
        part.eval()  # there is no dropout; eval only makes sure
    return parts


def _text_encoder(recipe: TinyRecipe, number: int) -> CLIPTextModelWithProjection:
    """Build one layer of CLIP over the embedded model's 16 tokens."""
    tokenizer, width = build_tokenizer(), recipe.text_widths[number]
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


def _transformer(recipe: TinyRecipe) -> SD3Transformer2DModel:
    """Build the velocity network; every block begins as the identity and the velocity as zero."""
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
    # diffusers initialises these randomly
    zeroed = [transformer.proj_out, transformer.norm_out.linear]
    for block in cast(Iterable[Any], transformer.transformer_blocks):  # a ModuleList has no element type
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for linear in zeroed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def _autoencoder(recipe: TinyRecipe) -> AutoencoderKL:
    """Build encoder and decoder of the latent; the posterior's spread is a constant exp(-6) that is never trained."""
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
    with torch.no_grad():
        autoencoder.encoder.conv_out.weight[CHANNELS:] = 0
        cast(Tensor, autoencoder.encoder.conv_out.bias)[CHANNELS:] = -12  # a convolution built with its bias
    return autoencoder


class Latent:
    """Fixed linear latent: maps (N, 32, 64, 3) uint8 to (N, 16, 8, 16) by z = (patch - mean) @ basis * scale, and back."""

    def __init__(self, recipe: TinyRecipe, seed: int, words: Sequence[str], excluded: frozenset[str]):
        rng = np.random.default_rng([seed, 0])
        pictures = np.stack([sample(rng, words, excluded, recipe.shapes[0][1])[1] for _ in range(3000)])
        rows = self._patches(pixels(pictures)).reshape(-1, 3 * PATCH * PATCH).double()
        self.mean = rows.mean(0)
        variance, basis = torch.linalg.eigh(torch.cov(rows.T))
        spread = variance.flip(0)[:CHANNELS].clamp_min(1e-8).sqrt()
        # Half-way to whitening: the fine components would be lost in noise at their own scale, and dominate the loss at scale 1.
        scale = spread**-0.5
        scale = scale / (spread * scale).square().mean().sqrt()
        self.kept = float(spread.square().sum() / variance.sum())
        self.into = (basis.flip(1)[:, :CHANNELS] * scale).float()
        self.back = (basis.flip(1)[:, :CHANNELS] / scale).T.contiguous().float()
        self.mean = self.mean.float()

    @staticmethod
    def _patches(images: Tensor) -> Tensor:
        """Cut (N, 3, H, W) into patches (N, H/4, W/4, 48)."""
        n, c, h, w = images.shape
        return images.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3)

    def encode(self, images: Tensor) -> Tensor:
        """Encode (N, 3, H, W) in -1..1 as (N, 16, H/4, W/4)."""
        return ((self._patches(images) - self.mean) @ self.into).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (N, 16, h, w) to (N, 3, 4h, 4w), clipped to -1..1."""
        rows = latents.permute(0, 2, 3, 1) @ self.back + self.mean
        n, h, w, _ = rows.shape
        images = rows.reshape(n, h, w, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, h * PATCH, w * PATCH)
        return images.clamp(-1, 1)


def pixels(pictures: np.ndarray) -> Tensor:
    """Convert (N, H, W, 3) uint8 to (N, 3, H, W) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def pictures(images: Tensor) -> np.ndarray:
    """Convert (N, 3, H, W) in -1..1 to (N, H, W, 3) uint8."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def embed(parts: TinyModules, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Encode (N, 16) token ids as the pipeline does: context (N, 16 + T5_TOKENS, 96) and pooled text (N, 64)."""
    output_one = parts.text_one(tokens, output_hidden_states=True)
    output_two = parts.text_two(tokens, output_hidden_states=True)
    context = torch.cat([output_one.hidden_states[-2], output_two.hidden_states[-2]], dim=-1)
    silence = context.new_zeros(context.shape[0], T5_TOKENS, context.shape[2])
    return torch.cat([context, silence], dim=1), torch.cat([output_one.text_embeds, output_two.text_embeds], dim=-1)


@torch.no_grad()
def draw(parts: TinyModules, tokens: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
    """Sample (N, 16, 8, 16) latents by Euler steps down the grid of the exported scheduler, without guidance."""
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
    """Computes joint attention of text and image in plain matrix products.

    The fused kernel's backward pass took 30 % of a step on these CPUs at 49 tokens; this one takes a twentieth, compiled.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        """Map (N, image tokens, width) and (N, text tokens, width) to the same shapes."""

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


# The three stages

# Fields that change a run's speed and output but not what it learns: a checkpoint may be resumed under other values.
RUNNING = ("processes", "compiled", "tell_every", "save_every", "look_every", "looks", "readings", "countings")


@dataclass(frozen=True)
class _Run:
    """State that the stages share: recipe, seed, processes, device, number type and output."""

    recipe: TinyRecipe
    seed: int
    workers: Workers
    dtype: torch.dtype  # of the networks' forward passes
    out: Path
    log: Log

    @property
    def state(self) -> Path:
        """Return the folder of the state from which a stopped run resumes."""
        return self.out / ".state"

    def autocast(self) -> Any:
        """Make networks compute in the run's number type inside the context."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def fit(
        self, stage: str, learner: Learner, steps: int, *, average: float = 0.0, evaluate: Interval | None = None
    ) -> tuple[Weights, float]:
        """Train one stage; return its weights and the wall seconds it took."""
        recipe = self.recipe
        fields = {key: value for key, value in asdict(recipe).items() if key not in RUNNING}
        settings = FitSettings(
            label={"stage": stage},
            made_by=fields | {"seed": self.seed},
            checkpoint=self.state / f"{stage}.pt",
            steps=steps,
            samples=recipe.batch,
            rate=_linear_rate(steps, recipe),
            save=Interval(seconds=recipe.save_every),
            report=Interval(seconds=recipe.tell_every),
            evaluate=evaluate or Interval(),
            average=average,
            clock=time.monotonic,
        )
        return fit(learner, settings, log=self.log, workers=self.workers)


class _Data:
    """Draws the batches of all stages, each pure in (seed, stage, step, shard), and holds the latent that encodes them."""

    def __init__(self, recipe: TinyRecipe, seed: int) -> None:
        splits = word_splits()
        self.words, self.validation = splits["train"], splits["validation"]
        self.excluded = frozenset(splits["validation"] + splits["test"])
        self.recipe, self.seed, self.share = recipe, seed, recipe.batch // SHARDS
        self.latent = Latent(recipe, seed, self.words, self.excluded)
        self.tokenizer = build_tokenizer()

    def batch(self, stage: int, step: int, shard: int) -> tuple[list[str], Tensor]:
        """Draw prompts, some of them empty, and images (share, 3, 32, 64) in -1..1."""
        rng = np.random.default_rng([self.seed, stage, step, shard])
        now = step if stage == 2 else 0
        shapes = [part for start, part in self.recipe.shapes if start <= now][-1]
        samples = (sample(rng, self.words, self.excluded, shapes) for _ in range(self.share))
        prompts, drawings = zip(*samples, strict=True)
        empty = rng.random(self.share) < self.recipe.dropped
        return ["" if e else p for p, e in zip(prompts, empty, strict=True)], pixels(np.stack(drawings))

    def prompts(self, count: int, *key: int) -> list[str]:
        """Draw prompts alone; pure in (seed, key)."""
        rng = np.random.default_rng([self.seed, *key])
        return [sample(rng, self.words, self.excluded, self.recipe.shapes[0][1])[0] for _ in range(count)]

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Tokenise prompts to (N, 16) ids."""
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids


class _AutoencoderLearner(Learner):
    """Stage 1: encoder and decoder are regressed onto the fixed latent."""

    def __init__(self, run: _Run, data: _Data, autoencoder: AutoencoderKL) -> None:
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
            encoding = nn.functional.mse_loss(self.autoencoder.encoder(images)[:, :CHANNELS].float(), z)
        return decoding + 0.3 * encoding


class _FlowLearner(Learner):
    """Stage 2: the transformer and both text encoders learn the velocity, noise - latent."""

    def __init__(self, run: _Run, data: _Data, parts: TinyModules) -> None:
        self.run, self.data, self.parts = run, data, parts
        networks = {"transformer": parts.transformer, "text_one": parts.text_one, "text_two": parts.text_two}
        self.module = nn.ModuleDict(networks)
        self.averaged = deepcopy(self.module)
        self.sampler = TinyModules(  # a ModuleDict has no types of its entries
            cast(SD3Transformer2DModel, self.averaged["transformer"]),
            cast(CLIPTextModelWithProjection, self.averaged["text_one"]),
            cast(CLIPTextModelWithProjection, self.averaged["text_two"]),
            _plain(parts.autoencoder),
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
        """Measure validation words read and shapes counted, decoded by the linear map and by the decoder."""
        self.averaged.load_state_dict(weights)
        words = (self.data.validation * 2)[: self.run.recipe.looks]
        shapes = list(shape_prompts()) * 2
        prompts = [glyphs.word_prompt(word) for word in words] + [prompt for prompt, *_ in shapes]
        noise = torch.randn(len(prompts), *_latent_shape(), generator=generator(self.data.seed, 9))
        with torch.no_grad(), self.run.autocast():
            z = draw(self.sampler, self.data.tokens(prompts), noise)
            decoded = torch.cat([self.sampler.autoencoder.decoder(rows).float() for rows in z.split(64)])
        numbers: dict[str, float] = {}
        for name, images in (("linear", self.data.latent.decode(z)), ("decoder", decoded)):
            shown = pictures(images)
            texts, drawings = read_texts(shown[: len(words)]), shown[len(words) :]
            exact = [text == word for text, word in zip(texts, words, strict=True)]
            counted = [count_patches(im, c) == k for im, (_, _, k, c) in zip(drawings, shapes, strict=True)]
            numbers |= {f"{name}/exact": float(np.mean(exact)), f"{name}/count": float(np.mean(counted))}
        return numbers


class _DecoderLearner(Learner):
    """Stage 3: the decoder is trained on latents that the model samples, and on slightly noisy ones of images."""

    def __init__(self, run: _Run, data: _Data, autoencoder: AutoencoderKL, drawn: dict[int, Tensor]) -> None:
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


def _reconstruction_loss(run: _Run, autoencoder: AutoencoderKL, images: Tensor, latents: Tensor) -> Tensor:
    with run.autocast():
        return nn.functional.mse_loss(autoencoder.decoder(latents).float(), images)


def _drawn_latents(run: _Run, data: _Data, sampler: TinyModules, shard: int) -> Tensor:
    """Sample (drawn / SHARDS, 16, 8, 16) latents from the model, once, and store them."""
    path = run.state / f"drawn-{shard}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)["latents"]
    prompts = data.prompts(run.recipe.drawn // SHARDS, 3, shard)
    with run.autocast():
        noise = torch.randn(len(prompts), *_latent_shape(), generator=generator(data.seed, 3, shard))
        z = draw(sampler, data.tokens(prompts), noise)
    write_checkpoint(path, {"latents": z})
    return z


def _linear_rate(steps: int, recipe: TinyRecipe) -> Callable[[float, int], float]:
    """Return the rate: linear rise over `warm` steps, constant, then linear fall to `floor`."""

    def rate(base: float, step: int) -> float:
        fall = max(0.0, (step + 1 - steps * (1 - recipe.decay)) / (steps * recipe.decay))
        return base * (min(1.0, (step + 1) / recipe.warm) * (1 - (1 - recipe.floor) * fall))

    return rate


def _help(recipe: TinyRecipe, out: Path, seed: int, workers: Workers, meeting: str) -> None:
    """Run a further process beside the first one, without output."""
    _train(recipe, out, seed, workers, meeting, lambda _: None)


def _train(recipe: TinyRecipe, out: Path, seed: int, workers: Workers, meeting: str, log: Log) -> dict[str, Any]:
    """Run one process: join the others at the file `meeting`, and train all three stages."""
    torch.set_num_threads(1)
    fast = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    run = _Run(recipe, seed, workers, torch.bfloat16 if fast else torch.float32, out, log)
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


def _train_stages(run: _Run) -> dict[str, Any]:
    """Train all three stages; the first process publishes the model and returns its record, others return nothing."""
    recipe, seconds = run.recipe, {}
    data = _Data(recipe, run.seed)
    parts = build_parts(recipe, run.seed)
    if recipe.compiled:
        _compile([parts.autoencoder.encoder, parts.autoencoder.decoder])
    learner = _AutoencoderLearner(run, data, parts.autoencoder)
    _, seconds["autoencoder"] = run.fit("autoencoder", learner, recipe.autoencoder_steps)

    flow = _FlowLearner(run, data, parts)
    weights, seconds["flow"] = run.fit(
        "flow", flow, recipe.steps, average=recipe.average, evaluate=Interval(seconds=recipe.look_every)
    )
    flow.averaged.load_state_dict(weights)

    drawn = {shard: _drawn_latents(run, data, flow.sampler, shard) for shard in run.workers.own_shards()}
    decoder = _DecoderLearner(run, data, parts.autoencoder, drawn)
    weights, seconds["decoder"] = run.fit("decoder", decoder, recipe.decoder_steps)
    if run.workers.rank:
        return {}
    flow.sampler.autoencoder.decoder.load_state_dict(weights)
    return publish(run, flow.sampler, seconds)


def _latent_shape() -> tuple[int, int, int]:
    return CHANNELS, glyphs.HEIGHT // PATCH, glyphs.WIDTH // PATCH


def _compile(blocks: Iterable[nn.Module]) -> None:
    """Compile each block by itself: a whole model takes minutes. Without a C++ compiler nothing is compiled."""
    if shutil.which("g++") or shutil.which("clang++"):
        import torch._inductor.config as inductor

        inductor.compile_threads = 1  # the other core runs the other process
        for block in blocks:
            block.compile(dynamic=False)


# The folder


def publish(run: _Run, parts: TinyModules, seconds: dict[str, float]) -> dict[str, Any]:
    """Write the pipeline in float16, measure what was written, and move it into the run's folder in one go."""
    fresh, recipe = run.state / "pipeline", run.recipe
    shutil.rmtree(fresh, ignore_errors=True)
    pipe = _pipeline(recipe, parts)
    pipe.to(torch.float16)
    pipe.save_pretrained(str(fresh), safe_serialization=True)
    _portable(fresh)
    scores = measure(
        fresh, readings=recipe.readings, countings=recipe.countings, max_sequence_length=T5_TOKENS, seed=run.seed
    )
    text = json.dumps(_record(run, pipe, seconds, scores), indent=1)
    record = json.loads(text)  # as read back from the file: lists, no tuples
    (fresh / "recipe.json").write_text(text + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(model_card(record, fresh), encoding="utf-8")
    for entry in sorted(fresh.iterdir()):
        target = run.out / entry.name
        if target.is_dir():
            target.rename(run.state / f"old-{time.time_ns()}")
        os.replace(entry, target)
    shutil.rmtree(run.state)
    run.log({"stage": "published", **{name: score["mean"] for name, score in scores.items()}})
    return record


def _pipeline(recipe: TinyRecipe, parts: TinyModules) -> StableDiffusion3Pipeline:
    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=deepcopy(parts.transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=deepcopy(parts.autoencoder),
        text_encoder=deepcopy(parts.text_one),
        # the pipeline's annotations name CLIP's own tokenizer only
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder_2=deepcopy(parts.text_two),
        tokenizer_2=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder_3=build_silent_text(sum(recipe.text_widths)),
        tokenizer_3=build_silent_tokenizer(),
    )


def _record(
    run: _Run, pipe: StableDiffusion3Pipeline, seconds: dict[str, float], scores: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of recipe.json: settings, training, versions, sizes, scores, and hashes of the held-out words."""
    recipe, splits = run.recipe, word_splits()
    steps = {"autoencoder": recipe.autoencoder_steps, "flow": recipe.steps, "decoder": recipe.decoder_steps}
    return {
        "fields": asdict(recipe),
        "seed": run.seed,
        "max_sequence_length": T5_TOKENS,
        "guidance": 1.0,
        "steps": 10,
        "height": glyphs.HEIGHT,
        "width": glyphs.WIDTH,
        "trained": {
            "steps": steps,
            "samples": {stage: count * recipe.batch for stage, count in steps.items()},
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


def _plain(autoencoder: AutoencoderKL) -> AutoencoderKL:
    """Copy a module without the compiled calls, which cannot be copied."""
    # from_config returns a pair only with return_unused_kwargs
    copy = cast(AutoencoderKL, AutoencoderKL.from_config(autoencoder.config))
    copy.load_state_dict(autoencoder.state_dict())
    return copy.eval()


def _portable(folder: Path) -> None:
    """Write a tokenizer class name that every transformers knows, and settings with which `from_pretrained` loads float32 throughout.

    transformers 5 writes a class name of its own, and loads text encoders in the type they were saved in, where diffusers loads
    the rest in float32: the two would not fit together.
    """
    changes = {"model_index.json": ("TokenizersBackend", "PreTrainedTokenizerFast")}
    changes["tokenizer*/tokenizer_config.json"] = changes["model_index.json"]
    changes["text_encoder*/config.json"] = ('"dtype": "float16"', '"dtype": "float32"')
    for pattern, (old, new) in changes.items():
        for path in folder.glob(pattern):
            path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def model_card(record: dict[str, Any], folder: Path) -> str:
    """Return the model card: description, usage and scores."""
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    parameters = sum(record["parameters"].values()) / 1e6

    def row(name: str, key: str) -> str:
        score = record["scores"][key]
        return f"| {name} | {score['mean']:.3f} | {score['low']:.3f} to {score['high']:.3f} | {score['n']} |"

    keys_by_label = {
        "test words read exactly": "test/exact",
        "test words, share of letters right": "test/soft",
        "shapes counted exactly": "shapes/exact",
    }
    keys_by_label |= {f"of which {glyphs.NUMBERS[count]}": f"shapes/exact/{count}" for count in glyphs.COUNTS}
    rows = [row(name, key) for name, key in keys_by_label.items() if key in record["scores"]]
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

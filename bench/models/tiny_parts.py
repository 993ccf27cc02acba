"""Networks of the embedded models, the fixed latent, and sampling: all of a StableDiffusion3Pipeline of a few MB."""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..assets import glyphs
from .pipeline_recipe import Canvas, PictureSource, PipelineRecipe

TOKENS = 16  # of a prompt of `tiny`, with its begin and end
GLYPHS = Canvas(glyphs.WIDTH, glyphs.HEIGHT, TOKENS, glyphs.VOCABULARY)
T5_TOKENS = 1  # the third text encoder's output is constant: one row of zeros
PATCH = 4  # px: the autoencoder's


class TinyModules(NamedTuple):
    """The trained parts of a StableDiffusion3Pipeline."""

    transformer: SD3Transformer2DModel
    text_one: CLIPTextModelWithProjection
    text_two: CLIPTextModelWithProjection
    autoencoder: AutoencoderKL


def build_tokenizer(canvas: Canvas = GLYPHS) -> PreTrainedTokenizerFast:
    """Build a tokenizer of known prompt words, the capitals one by one, and the quote, of the canvas's length with begin and end."""
    # The end must not be token 2: CLIP then searches for the largest id instead of the end token.
    specials = ["<pad>", "<unk>", "<begin>", "<end>"]
    vocabulary = {token: i for i, token in enumerate([*specials, '"', *glyphs.ALPHABET, *canvas.vocabulary])}
    if canvas.gap:
        vocabulary[canvas.gap] = len(vocabulary)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if canvas.gap:  # the space between two capitals is a token of its own
        core.normalizer = normalizers.Replace(Regex("(?<=[A-Z]) +(?=[A-Z])"), canvas.gap)
    alone = f'[A-Z"{canvas.gap}]'
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(alone), "isolated")]
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
        model_max_length=canvas.tokens,
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


def build_parts(recipe: PipelineRecipe, seed: int) -> TinyModules:
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


def _text_encoder(recipe: PipelineRecipe, number: int) -> CLIPTextModelWithProjection:
    """Build one layer of CLIP over the tokens of a prompt."""
    tokenizer, width = build_tokenizer(recipe.canvas), recipe.text_widths[number]
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=recipe.pooled_width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=recipe.canvas.tokens,
            pad_token_id=cast(int, tokenizer.pad_token_id),  # this and the next two: one token each
            bos_token_id=cast(int, tokenizer.bos_token_id),
            eos_token_id=cast(int, tokenizer.eos_token_id),
        )
    )


def _transformer(recipe: PipelineRecipe) -> SD3Transformer2DModel:
    """Build the velocity network; every block begins as the identity and the velocity as zero."""
    width = recipe.heads * recipe.head_width
    transformer = SD3Transformer2DModel(
        sample_size=recipe.canvas.width // PATCH,
        patch_size=2,
        in_channels=recipe.canvas.channels,
        out_channels=recipe.canvas.channels,
        num_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_width,
        joint_attention_dim=sum(recipe.text_widths),
        caption_projection_dim=width,
        pooled_projection_dim=2 * recipe.pooled_width,
        pos_embed_max_size=recipe.canvas.width // PATCH // 2,
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


def _autoencoder(recipe: PipelineRecipe) -> AutoencoderKL:
    """Build encoder and decoder of the latent; the posterior's spread is a constant exp(-6) that is never trained."""
    depth = len(recipe.autoencoder_widths)
    autoencoder = AutoencoderKL(
        # diffusers writes tuple[str], a tuple of one, where it means tuple[str, ...]
        down_block_types=("DownEncoderBlock2D",) * depth,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * depth,  # pyright: ignore[reportArgumentType]
        block_out_channels=recipe.autoencoder_widths,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=recipe.canvas.channels,
        norm_num_groups=8,
        sample_size=recipe.canvas.width,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        autoencoder.encoder.conv_out.weight[recipe.canvas.channels :] = 0
        cast(Tensor, autoencoder.encoder.conv_out.bias)[
            recipe.canvas.channels :
        ] = -12  # a convolution built with its bias
    return autoencoder


class Latent:
    """Fixed linear latent: maps (N, H, W, 3) uint8 to (N, C, H/4, W/4) by z = (patch - mean) @ basis * scale, and back."""

    def __init__(self, drawn: PictureSource, seed: int, channels: int = GLYPHS.channels):
        rng = np.random.default_rng([seed, 0])
        pictures = np.stack([drawn.sample(rng, 0)[1] for _ in range(3000)])
        rows = self._patches(pixels(pictures)).reshape(-1, 3 * PATCH * PATCH).double()
        self.mean = rows.mean(0)
        variance, basis = torch.linalg.eigh(torch.cov(rows.T))
        spread = variance.flip(0)[:channels].clamp_min(1e-8).sqrt()
        # Half-way to whitening: the fine components would be lost in noise at their own scale, and dominate the loss at scale 1.
        scale = spread**-0.5
        scale = scale / (spread * scale).square().mean().sqrt()
        self.kept = float(spread.square().sum() / variance.sum())
        self.into = (basis.flip(1)[:, :channels] * scale).float()
        self.back = (basis.flip(1)[:, :channels] / scale).T.contiguous().float()
        self.mean = self.mean.float()

    @staticmethod
    def _patches(images: Tensor) -> Tensor:
        """Cut (N, 3, H, W) into patches (N, H/4, W/4, 48)."""
        n, c, h, w = images.shape
        return images.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3)

    def encode(self, images: Tensor) -> Tensor:
        """Encode (N, 3, H, W) in -1..1 as (N, C, H/4, W/4)."""
        return ((self._patches(images) - self.mean) @ self.into).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (N, C, h, w) to (N, 3, 4h, 4w), clipped to -1..1."""
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
    """Encode (N, L) token ids as the pipeline does: context (N, L + T5_TOKENS, 96) and pooled text (N, 64)."""
    output_one = parts.text_one(tokens, output_hidden_states=True)
    output_two = parts.text_two(tokens, output_hidden_states=True)
    context = torch.cat([output_one.hidden_states[-2], output_two.hidden_states[-2]], dim=-1)
    silence = context.new_zeros(context.shape[0], T5_TOKENS, context.shape[2])
    return torch.cat([context, silence], dim=1), torch.cat([output_one.text_embeds, output_two.text_embeds], dim=-1)


@torch.no_grad()
def draw(parts: TinyModules, tokens: Tensor, noise: Tensor, steps: int = 10) -> Tensor:
    """Sample latents (N, C, H/4, W/4) by Euler steps down the grid of the exported scheduler, without guidance."""
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

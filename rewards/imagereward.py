"""Scorer `imagereward`: applies ImageReward v1.0, a learned human preference; BLIP encodes image and prompt, an MLP maps to a number.

Source: arXiv 2304.05977 and THUDM/ImageReward at 0f5fa3e (Apache-2.0), whose package needs old versions of half a dozen others; so the
network is BLIP of transformers here, filled from the published ImageReward.pt. Three settings differ from the defaults of
transformers: 12 heads in the text half and not 8, an epsilon of 1e-6 in the image half and not 1e-5, and [CLS] stays in front of the
text. A prompt ends after 35 tokens: the rest of a longer one is not scored. Images are scored one by one, each with its own prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bench.assets import weight_store
from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.spec import Images, Prompt, Scores, check_images
from . import two_towers

if TYPE_CHECKING:
    from torch import Tensor

REPOSITORY, VOCABULARY = "THUDM/ImageReward", "google-bert/bert-base-uncased"
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the raw reward over the authors' images
TOKENS = 35
WIDTHS = (1024, 128, 64, 16, 1)  # of the layers behind BLIP; no activation between them
# In the file, not in the reward: BLIP's projections for retrieval, and the positions 0, 1, 2 ... themselves
# Required values of the text encoder's settings in med_config.json
MED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


@dataclass(frozen=True)
class Eye:
    """BLIP's image half: ViT-L/16."""

    size: int = 224
    patch: int = 16
    width: int = 1024
    depth: int = 24
    heads: int = 16


def renamed(key: str) -> str:
    """Map a weight's name in ImageReward.pt to its name in `network`; the text half and the MLP keep theirs."""
    key = re.sub(r"^blip\.text_encoder\.", "text.", key)
    key = re.sub(r"^mlp\.layers\.", "mlp.", key)
    if not key.startswith("blip.visual_encoder."):
        return key
    key = key.replace("blip.visual_encoder.", "eye.", 1)
    for old, new in (
        ("eye.cls_token", "eye.embeddings.class_embedding"),
        ("eye.pos_embed", "eye.embeddings.position_embedding"),
        ("eye.patch_embed.proj.", "eye.embeddings.patch_embedding."),
        ("eye.norm.", "eye.post_layernorm."),
        ("eye.blocks.", "eye.encoder.layers."),
        (".attn.proj.", ".self_attn.projection."),
        (".attn.qkv.", ".self_attn.qkv."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
    ):
        key = key.replace(old, new)
    return key


def network(eye: Eye, text: Mapping[str, Any]) -> Any:
    """Build BLIP's two halves and the MLP without weights; `text` holds med_config.json, at least the keys of `MED`."""
    from torch import nn
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    image_half = BlipVisionConfig(
        hidden_size=eye.width,
        intermediate_size=4 * eye.width,
        num_hidden_layers=eye.depth,
        num_attention_heads=eye.heads,
        image_size=eye.size,
        patch_size=eye.patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text_half = BlipTextConfig(
        **{key: text[key] for key in MED},
        encoder_hidden_size=eye.width,  # not the file's encoder_width, which is the base model's
        is_decoder=True,  # transformers' word for: has cross-attention
    )
    widths = (int(text["hidden_size"]), *WIDTHS)
    # The file counts the three dropouts between the layers: 0, 2, 4, 6, 7.
    places = zip(("0", "2", "4", "6", "7"), widths[:-1], widths[1:], strict=True)
    layers = {place: nn.Linear(before, after) for place, before, after in places}
    return nn.ModuleDict(
        {
            "eye": BlipVisionModel(image_half),
            "text": BlipTextModel(text_half, add_pooling_layer=False),
            "mlp": nn.ModuleDict(layers),
        }
    )


def square(image: np.ndarray, size: int) -> Tensor:
    """Map (H, W, 3) uint8 to (3, size, size): short side to `size` (PIL, bicubic), centre crop, CLIP's mean and deviation.

    torchvision's rounding, as the published code's: the long side is cut off, the crop's corner rounded to even.
    """
    import torch
    from PIL import Image

    high, wide = image.shape[:2]
    short = min(high, wide)
    h, w = (int(size * side / short) for side in (high, wide))
    small = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    top, left = (round((side - size) / 2) for side in (h, w))
    x = torch.from_numpy(small[top : top + size, left : left + size].copy()).movedim(-1, 0).float() / 255
    return two_towers.standardise(x[None])[0]


class ImageReward:
    """Scores every image with its prompt; typical scores lie between -2 and 2."""

    name = "imagereward"
    metrics: Sequence[str] = ("imagereward",)

    def __init__(self, eye: Eye | None = None) -> None:
        """Build and fill the network; `eye` is the shape of the image half, for a file other than the published one."""
        if find_spec("transformers") is None:
            raise Missing("the scorer 'imagereward' needs transformers; install with: pip install 'gpobench[clip]'")
        weights, shape = (
            weight_store.file(REPOSITORY, "ImageReward.pt"),
            weight_store.file(REPOSITORY, "med_config.json"),
        )
        vocabulary = weight_store.file(VOCABULARY, "vocab.txt")
        self._eye = eye or Eye()
        self._tokens = _tokenizer(vocabulary)
        self._network = network(self._eye, _facts(shape))
        _fill(self._network, weights)
        self._device = weight_store.device()
        self._network.to(self._device).eval().requires_grad_(False)
        self.id = (
            f"imagereward-1.0/ImageReward@{weight_store.short_digest(weights)}+med@{weight_store.short_digest(shape)}"
            f"+vocab@{weight_store.short_digest(vocabulary)}/crop{self._eye.size}-pil-bicubic/{TOKENS}-tokens/float32"
        )

    def score(self, image: np.ndarray, prompt: str) -> float:
        """Return the standardised reward of (H, W, 3) uint8 and a text. Raises what torch raises."""
        import torch

        words = self._tokens(prompt, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        with torch.inference_mode():
            x = square(image, self._eye.size)[None].to(self._device)
            image_states = self._network["eye"](pixel_values=x).last_hidden_state
            text_output = self._network["text"](
                input_ids=words["input_ids"].to(self._device),
                attention_mask=words["attention_mask"].to(self._device),
                encoder_hidden_states=image_states,
            )
            reward = text_output.last_hidden_state[:, 0]
            for layer in self._network["mlp"].values():
                reward = layer(reward)
        return (reward.item() - MEAN) / DEVIATION

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to imagereward, row by row; NaN with a reason where an image could not be scored."""
        check_images(images, prompts)
        value, reasons = np.full(len(images), np.nan), dict[int, str]()
        for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            try:
                value[row] = self.score(image, prompt.text)
            except (ValueError, RuntimeError, ArithmeticError) as error:
                reasons[row] = f"{type(error).__name__}: {error}"
            if row not in reasons and not np.isfinite(value[row]):
                value[row], reasons[row] = np.nan, "the network gave a number that is not finite"
        return Scores(value={"imagereward": value}, reasons=reasons)

    def self_test(self) -> None:
        """Raise RuntimeError unless a red circle and a blue square score higher with their own prompts than with each other's."""
        from PIL import Image, ImageDraw

        red, blue = (Image.new("RGB", (256, 256), (250, 250, 250)) for _ in range(2))
        ImageDraw.Draw(red).ellipse((64, 64, 192, 192), fill=(214, 40, 40))
        ImageDraw.Draw(blue).rectangle((64, 64, 192, 192), fill=(40, 80, 210))
        pictures = [np.asarray(picture) for picture in (red, blue)]
        table = [[self.score(picture, f"a {text}") for picture in pictures] for text in ("red circle", "blue square")]
        if not table[0][0] + table[1][1] > table[0][1] + table[1][0]:
            raise RuntimeError(f"{self.id} prefers the wrong prompts: {np.round(table, 3).tolist()}")


def _tokenizer(vocabulary: Path) -> Any:
    """Load BERT's lower-case tokenizer, with BLIP's two tokens after the vocabulary, in case a prompt contains them."""
    from transformers import BertTokenizer

    words = {word: index for index, word in enumerate(vocabulary.read_text("utf-8").split("\n")) if word}
    if not {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} <= words.keys():
        raise UserError(f"{vocabulary} is not a vocabulary of BERT: [PAD], [UNK], [CLS] or [SEP] is not in it")
    tokenizer = BertTokenizer(vocab=words, do_lower_case=True)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer


def _facts(file: Path) -> Mapping[str, Any]:
    try:
        facts: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not med_config.json: {error}") from error
    if lacking := [key for key in MED if key not in facts]:
        raise UserError(f"{file} is not med_config.json: it does not say {', '.join(lacking)}")
    return facts


def _fill(empty: Any, file: Path) -> None:
    """Load ImageReward.pt; UserError where a weight is missing, unexpected, or of another shape."""
    import torch

    try:
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors have no common parent
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not a file of weights: {message}") from error
    weights = {renamed(key): value.float() for key, value in state.items() if not key.startswith(UNUSED)}
    try:
        empty.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{file} does not hold ImageReward's weights: {' '.join(str(error).split())[:300]}") from error
    check_finite(weights, file)


def make(variant: str | None = None) -> ImageReward:
    """Make the scorer, which has no variants. Missing where its package or its weights are absent."""
    if variant is not None:
        raise UserError(f"the scorer 'imagereward' has no variant {variant!r}; write it as 'imagereward'")
    return ImageReward()

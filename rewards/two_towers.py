"""Two-tower scorers (pickscore, hpsv2, clipscore): compute the scaled cosine of an image embedding and a text embedding.

PickScore (arXiv 2305.01569), HPSv2 and v2.1 (arXiv 2306.09341) and three CLIPScores are the same network with other weights and other
settings, and most disagreements about their numbers are disagreements about settings. So the settings are fixed here and part of
the id: how an image is resized to the tower's size, the factor of the cosine, the type of the weights, their digest.
The variants `tiny` of `pickscore` and `hpsv2` run two small models of the 64x32 glyph domain, made by `tiny_clip_recipe.py`, through
the same class; their scores of other images have no meaning.

On a CPU every forward pass holds one image or one prompt, so that a score depends only on its own, to the last bit; on a GPU
it always holds eight images, and an image's place among them changes a cosine by about 1e-7. Vectors of prompts are cached.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ..bench.assets import weight_store
from ..bench.assets.finite import check_finite
from ..bench.errors import Missing, UserError
from ..bench.rendering import differentiable_pixels
from ..bench.spec import Images, Prompt, Scores, check_images

if TYPE_CHECKING:
    from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of channels in 0..1
KEPT = 20_000  # vectors of prompts that a scorer caches
TINY = Path(__file__).with_name("tiny_clip")


# Resizing to the tower's size: (H, W, 3) uint8 -> (3, h, w) in 0..1, not yet standardised


class Fit(Protocol):
    def __call__(self, image: np.ndarray) -> Tensor: ...
    def differentiable(self, x: Tensor) -> Tensor: ...
    def __str__(self) -> str: ...


def _tensor(image: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255


@dataclass(frozen=True)
class Crop:
    """Resizes the short side to `size` and keeps the centre square: the ends of a wide image are cut off.

    `pil-bicubic` is CLIP's own preprocessing; `bilinear` resizes a tensor with torchvision's current defaults (antialiased),
    which is what Flow-GRPO's and DiffusionNFT's CLIPScore do.
    Where an odd number of pixels is cut off, `transformers` cuts the smaller half first (PickScore's processor), `torchvision`
    rounds the half to even (OpenAI's clip, and the code that took its preprocessing): one pixel apart for a quarter of all shapes.
    """

    size: int = 224
    how: Literal["pil-bicubic", "bilinear"] = "pil-bicubic"
    corner: Literal["transformers", "torchvision"] = "transformers"

    def __call__(self, image: np.ndarray) -> Tensor:
        import torch.nn.functional as F
        from PIL import Image

        h, w = self._resized(*image.shape[:2])
        if self.how == "bilinear":
            x = F.interpolate(_tensor(image)[None], (h, w), mode="bilinear", antialias=True)[0]
        else:
            x = _tensor(np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)))
        return self._cut(x)

    def differentiable(self, x: Tensor) -> Tensor:
        """Resize (3, H, W) in 0..1 with a gradient; of PIL's result no value is more than a 255th off."""
        import torch.nn.functional as F

        size = self._resized(*x.shape[1:])
        if self.how == "bilinear":
            return self._cut(F.interpolate(x[None], size, mode="bilinear", antialias=True)[0])
        if size == tuple(x.shape[1:]):  # PIL copies
            return self._cut(x)
        for part in ((x.shape[1], size[1]), size):  # PIL's passes: across, then down
            x = differentiable_pixels(F.interpolate(x[None], part, mode="bicubic", antialias=True))[0]
        return self._cut(x)

    def _resized(self, high: int, wide: int) -> tuple[int, int]:
        short = min(high, wide)
        return int(self.size * high / short), int(self.size * wide / short)

    def _cut(self, x: Tensor) -> Tensor:
        """The centre square of (3, h, w)."""
        top, left = (
            round(cut / 2) if self.corner == "torchvision" else cut // 2
            for cut in (x.shape[1] - self.size, x.shape[2] - self.size)
        )
        return x[:, top : top + self.size, left : left + self.size]

    def __str__(self) -> str:
        named = self.corner == "torchvision" and self.how != "bilinear"  # which is torchvision's as a whole
        return f"crop{self.size}-{self.how}{'-torchvision' if named else ''}"


@dataclass(frozen=True)
class Letterbox:
    """Resizes as HPSv2 does: the LONG side to `size`, bicubic on the tensor, and pads to a square with black bars.

    torchvision 0.17 turned `antialias` on for tensors; HPSv2 leaves it to the default, so its numbers depend on torchvision's
    version. Here it is set explicitly.
    """

    size: int = 224
    antialias: bool = True

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.differentiable(_tensor(image))

    def differentiable(self, x: Tensor) -> Tensor:
        """Resize (3, H, W) in 0..1, with a gradient."""
        import torch.nn.functional as F

        scale = self.size / max(x.shape[1:])
        h, w = (round(side * scale) for side in x.shape[1:])
        x = x[None]
        if scale != 1:
            x = F.interpolate(x, (h, w), mode="bicubic", align_corners=False, antialias=self.antialias)
        top, left = (self.size - h) // 2, (self.size - w) // 2
        return F.pad(x, (left, self.size - w - left, top, self.size - h - top))[0]

    def __str__(self) -> str:
        return f"letterbox{self.size}-bicubic-{'antialias' if self.antialias else 'aliased'}"


@dataclass(frozen=True)
class Stretch:
    """Resizes height and width separately to the tower's; an image of that size is unchanged."""

    height: int
    width: int

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.differentiable(_tensor(image))

    def differentiable(self, x: Tensor) -> Tensor:
        """Resize (3, H, W) in 0..1, with a gradient."""
        return self.batch(x[None])[0]

    def batch(self, x: Tensor) -> Tensor:
        """Resize (B, 3, H, W) to (B, 3, height, width)."""
        import torch.nn.functional as F

        size = (self.height, self.width)
        return (
            x if x.shape[-2:] == size else F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
        )

    def __str__(self) -> str:
        return f"stretch{self.width}x{self.height}-bicubic-antialias"


def standardise(x: Tensor) -> Tensor:
    """Standardise (B, 3, h, w) in 0..1 by CLIP's mean and deviation."""
    import torch

    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


# The towers


class Towers(Protocol):
    """An image tower and a text tower that map to one embedding space."""

    scale: float  # the learnt temperature, exp(logit_scale)
    size: tuple[int, int]  # (h, w) of the pictures the image tower sees

    def image(self, x: Tensor) -> Tensor:
        """Encode (B, 3, h, w) standardised images as (B, D)."""
        ...

    def text(self, texts: Sequence[str]) -> Tensor:
        """Encode B texts as (B, D)."""
        ...


def as_tensor(features: Any) -> Tensor:
    """Unwrap the vectors of get_image_features and get_text_features: transformers 5 returns an output object."""
    import torch

    vectors = features if isinstance(features, torch.Tensor) else features.pooler_output
    if vectors.ndim != 2:
        raise RuntimeError(f"a tower gave features of shape {tuple(vectors.shape)} where (B, D) was expected")
    return vectors


def _needs(package: str, scorer: str) -> None:
    if find_spec(package) is None:
        raise Missing(f"the scorer '{scorer}' needs {package}; install with: pip install 'gpobench[clip]'")


class HubTowers:
    """A `CLIPModel` of transformers with the tokenizer beside it."""

    def __init__(self, model: Path, tokenizer: Path, device: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        try:
            loaded: Any = CLIPModel.from_pretrained(str(model), dtype="float32", output_loading_info=True)
            network, facts = loaded  # a pair, because the loading info was asked for
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer))
        except (OSError, ValueError, RuntimeError) as error:
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{model} and {tokenizer} do not hold a CLIP model and its tokenizer: {message}") from error
        # transformers only warns, and scores with random weights
        lacking = sorted([*facts["missing_keys"], *(str(key) for key in facts["mismatched_keys"])])
        if lacking:
            raise UserError(f"{model} does not hold all weights of a CLIP model: {', '.join(lacking[:3])} ... missing")
        check_finite(network.state_dict(), model)
        self._network: Any = network.to(device).eval().requires_grad_(False)
        self._device = device
        self.scale = math.exp(float(network.logit_scale))
        self.activation = str(network.config.vision_config.hidden_act)
        side = int(network.config.vision_config.image_size)
        self.size = (side, side)
        self._context = int(network.config.text_config.max_position_embeddings)

    def image(self, x: Tensor) -> Tensor:
        return as_tensor(self._network.get_image_features(pixel_values=x.to(self._device)))

    def text(self, texts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._context, return_tensors="pt"
        )
        # pickscore's authors pass the mask too; nothing after the end token is attended to
        return as_tensor(self._network.get_text_features(**tokens.to(self._device)))


class OpenTowers:
    """A `CLIP` of open_clip with one of its tokenizers."""

    def __init__(self, network: Any, tokenizer: Any, device: str) -> None:
        self._network = network.to(device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._device = device
        self.scale = math.exp(float(network.logit_scale))
        side = network.visual.image_size
        self.size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))

    def image(self, x: Tensor) -> Tensor:
        return self._network.encode_image(x.to(self._device))

    def text(self, texts: Sequence[str]) -> Tensor:
        return self._network.encode_text(self._tokenizer(list(texts)).to(self._device))


def _fill(network: Any, weights: dict[str, Tensor], where: Path) -> None:
    """Load a state dict that must fit exactly and be finite; half precision becomes single."""
    check_finite(weights, where)
    try:
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    except RuntimeError as error:
        message = " ".join(str(error).split())
        raise UserError(f"{where} does not hold the weights of this model: {message[:200]}") from error


# The score

Formula = Literal["exp(scale)*cos", "100*cos", "cos", "2.5*max(cos,0)"]
Vectors = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Sight:
    """Maps images to unit vectors, each independent of the other images in the batch."""

    towers: Towers
    fit: Fit
    chunk: int  # pictures a forward pass, the last pass filled up with black: kernels differ with the number of rows

    def __call__(self, images: Images) -> tuple[Vectors, dict[int, str]]:
        """Map (B, H, W, 3) to (B, D) unit vectors, and return the reason for every row that is NaN."""
        import torch
        import torch.nn.functional as F

        rows: dict[int, Tensor] = {}
        reasons: dict[int, str] = {}
        for row, image in enumerate(images):
            try:
                rows[row] = self.fit(image)
            except (ValueError, RuntimeError, ArithmeticError) as error:
                reasons[row] = f"{type(error).__name__}: {error}"
        vector_by_row: dict[int, Vectors] = {}
        for part in batched(rows, self.chunk):
            x = torch.zeros(self.chunk, 3, *self.towers.size)
            try:
                x[: len(part)] = torch.stack([rows[row] for row in part])
                with torch.inference_mode():
                    out = F.normalize(self.towers.image(standardise(x)).float(), dim=-1).cpu().numpy()
            except RuntimeError as error:  # torch raises it for every error at run time
                reasons |= {row: f"{type(error).__name__}: {error}" for row in part}
                continue
            for row, vector in zip(part, out, strict=False):
                if np.isfinite(vector).all():
                    vector_by_row[row] = vector
                else:
                    reasons[row] = "the image tower gave numbers that are not finite"
        vectors = np.full((len(images), max((len(v) for v in vector_by_row.values()), default=0)), np.nan, np.float32)
        for row, vector in vector_by_row.items():
            vectors[row] = vector
        return vectors, reasons

    def differentiable(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) in 0..1 to (B, D) unit vectors with a gradient, in the forward passes of a call."""
        import torch
        import torch.nn.functional as F

        fitted = [self.fit.differentiable(image) for image in x.float()]
        vectors: list[Tensor] = []
        for part in batched(range(len(fitted)), self.chunk):
            rows = torch.stack([fitted[row] for row in part])
            filled = torch.cat([rows, rows.new_zeros(self.chunk - len(part), *rows.shape[1:])])
            vectors.append(F.normalize(self.towers.image(standardise(filled)).float(), dim=-1)[: len(part)])
        return torch.cat(vectors)


def batched(rows: Iterable[int], size: int) -> Iterator[list[int]]:
    """Yield lists of at most `size` rows, in order (itertools has it from Python 3.12 on)."""
    left = iter(rows)
    while part := list(islice(left, size)):
        yield part


def chunk() -> int:
    """Return the number of images a forward pass: one on a CPU, which gains nothing from more."""
    return 1 if weight_store.device() == "cpu" else 8


class TwoTowers:
    """Scores images by the cosine with their prompts."""

    metrics: Sequence[str] = ("score",)

    def __init__(self, name: str, sight: Sight, formula: Formula, weights: str, prefix: str = "") -> None:
        """Keep the parts. weights: their name and digest, for the id; prefix: put before every prompt."""
        self.name, self.sight, self.formula, self.prefix = name, sight, formula, prefix
        before = f"{prefix.strip().replace(' ', '-')}-/" if prefix else ""
        self.id = f"{name}-1/{weights}/{sight.fit}/{before}{formula}/float32"
        self._texts: dict[str, Tensor] = {}

    def text(self, prompt: str) -> Tensor:
        """Return the (D,) unit vector of a prompt, encoded by itself."""
        import torch
        import torch.nn.functional as F

        if prompt not in self._texts:
            with torch.inference_mode():
                vector = F.normalize(self.sight.towers.text([self.prefix + prompt])[0].float(), dim=-1).cpu()
            if len(self._texts) >= KEPT:
                self._texts.clear()
            self._texts[prompt] = vector
        return self._texts[prompt]

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to score; NaN with a reason where an image or its prompt could not be scored."""
        check_images(images, prompts)
        vectors, reasons = self.sight(images)
        value = np.full(len(images), np.nan)
        for row, prompt in enumerate(prompts):
            if row in reasons:
                continue
            try:
                cosine = float(vectors[row].astype(np.float64) @ self.text(prompt.text).double().numpy())
            except (RuntimeError, IndexError) as error:  # what torch and its embeddings raise
                reasons[row] = f"the prompt: {type(error).__name__}: {error}"
                continue
            if math.isfinite(cosine):
                value[row] = self._scored(cosine)
            else:
                reasons[row] = "the text tower gave numbers that are not finite"
        return Scores(value={"score": value}, reasons=reasons)

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Map (B, 3, H, W) in 0..1 and B prompts to the score (B,) with a gradient.

        Of the same pixels it is the score of a call to 1e-5 of its size; where PIL resizes (`pil-bicubic`), to about 1e-3 of it.
        """
        import torch

        vectors = self.sight.differentiable(images)
        texts = torch.stack([self.text(prompt.text) for prompt in prompts]).to(vectors.device)
        cosine = (vectors.double() * texts.double()).sum(1)
        if self.formula == "exp(scale)*cos":
            return self.sight.towers.scale * cosine
        if self.formula == "100*cos":
            return 100 * cosine
        return cosine if self.formula == "cos" else 2.5 * cosine.clamp(min=0)

    def _scored(self, cosine: float) -> float:
        if self.formula == "exp(scale)*cos":
            return self.sight.towers.scale * cosine
        if self.formula == "100*cos":
            return 100 * cosine
        return cosine if self.formula == "cos" else 2.5 * max(cosine, 0.0)

    def self_test(self) -> None:
        """Raise RuntimeError unless the prompts of three red circles, a blue square and a word each score their own image highest."""
        from ..bench.assets import glyphs

        rng = np.random.default_rng(0)
        paper = glyphs.PAPERS["white"]
        images = np.stack(
            [
                glyphs.draw_shapes("circle", 3, glyphs.SHAPE_COLOURS["red"], paper, rng),
                glyphs.draw_shapes("square", 1, glyphs.SHAPE_COLOURS["blue"], paper, rng),
                glyphs.draw_word("BOX"),
            ]
        )
        texts = [glyphs.shapes_prompt("circle", 3, "red"), glyphs.shapes_prompt("square", 1, "blue")]
        texts.append(glyphs.word_prompt("BOX"))
        table = np.stack([self(images, [Prompt(text)] * 3).value["score"] for text in texts])  # (prompt, image)
        if not (np.isfinite(table).all() and (table.argmax(1) == np.arange(3)).all()):
            raise RuntimeError(f"{self.id} prefers the wrong picture: {np.round(table, 3).tolist()}")


# Weights


def hub_towers(repository: str, tokenizer: str = "") -> tuple[HubTowers, str]:
    """Load a CLIP model of a hub repository in transformers' format, with its or another repository's tokenizer; and NAME@DIGEST."""
    texts = ("*.json", "*.txt")
    model = weight_store.folder(repository, patterns=(*texts, "model*.safetensors"))
    if not list(
        model.glob("model*.safetensors")
    ):  # older repositories only hold pickles, which are read as weights only
        model = weight_store.folder(repository, patterns=(*texts, "pytorch_model*.bin"))
    words = weight_store.folder(tokenizer, patterns=texts) if tokenizer else model
    files = sorted(model.glob("model*.safetensors")) or sorted(model.glob("pytorch_model*.bin"))
    digests = "+".join(weight_store.short_digest(path) for path in files)
    return HubTowers(model, words, weight_store.device()), f"{repository.rpartition('/')[2]}@{digests}"


def open_towers(architecture: str, checkpoint: Path) -> OpenTowers:
    """Build an open_clip architecture and load a checkpoint that keeps its weights under `state_dict`."""
    import open_clip
    import torch

    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # pickle's errors have no common parent
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{checkpoint} is not a checkpoint with a state_dict: {message}") from error
    network = open_clip.create_model(architecture)
    _fill(network, weights, checkpoint)
    return OpenTowers(network, open_clip.get_tokenizer(architecture), weight_store.device())


def tiny_tokenizer(folder: Path, shape: Mapping[str, Any]) -> Any:
    """Load the tokenizer of the glyph domain, one token for each capital, as open_clip wraps it."""
    from open_clip.tokenizer import HFTokenizer

    return HFTokenizer(str(folder), context_length=int(shape["text_cfg"]["context_length"]))


def _tiny(tower: str, folder: Path) -> tuple[Sight, str]:
    import open_clip
    from safetensors.torch import load_file

    path, config = folder / f"{tower}.safetensors", folder / f"{tower}.json"
    if not (path.exists() and config.exists()):
        raise Missing(f"there are no weights at {path}; make them with: gpobench pretrain tiny-clip --out {folder}")
    shape = json.loads(config.read_text("utf-8"))
    network = open_clip.CLIP(**shape)
    _fill(network, load_file(path), path)
    towers = OpenTowers(
        network, tiny_tokenizer(folder, shape), "cpu"
    )  # starting a GPU kernel takes longer than running this
    return Sight(towers, Stretch(*towers.size), chunk=1), f"tiny-clip-{tower}@{weight_store.short_digest(path)}"


# The scorers


def pickscore(variant: str | None = None) -> TwoTowers:
    """Make PickScore: exp(logit_scale) * cos, about 18 to 25, unscaled; other tables divide by 26 or 100. Variant: tiny."""
    _known("pickscore", variant, ("tiny",))
    if variant == "tiny":
        return tiny("pick")
    _needs("transformers", "pickscore")
    towers, weights = hub_towers("yuvalkirstain/PickScore_v1", tokenizer="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    return TwoTowers("pickscore", Sight(towers, Crop(towers.size[0]), chunk()), "exp(scale)*cos", weights)


HPS_ARCHITECTURE = "ViT-H-14"
HPS_FILES = {"v2": ("hpsv2.0", "HPS_v2_compressed.pt"), "v2.1": ("hpsv2.1", "HPS_v2.1_compressed.pt")}


def hpsv2(variant: str | None = None) -> TwoTowers:
    """Make HPSv2: 100 * cos, about 14 to 34. Variants: v2.1 (the default), v2, tiny."""
    _known("hpsv2", variant, (*HPS_FILES, "tiny"))
    if variant == "tiny":
        return tiny("hps")
    _needs("open_clip", "hpsv2")
    name, file = HPS_FILES[variant or "v2.1"]
    checkpoint = weight_store.file("xswu/HPSv2", file)
    towers = open_towers(HPS_ARCHITECTURE, checkpoint)
    weights = f"{HPS_ARCHITECTURE}/{checkpoint.name.removesuffix('.pt')}@{weight_store.short_digest(checkpoint)}"
    return TwoTowers(name, Sight(towers, Letterbox(towers.size[0]), chunk()), "100*cos", weights)


@dataclass(frozen=True)
class ClipScore:
    """Settings of one of the CLIPScores in use; their scales are not comparable."""

    name: str
    repository: str
    crop: Crop  # of the source's own convention; the size is the tower's
    formula: Formula
    prefix: str = ""
    activation: str = "gelu"  # what the weights were trained with; with another one they load and score wrongly


CLIP_SCORES = {
    "b32": ClipScore(  # Hessel et al. 2021, jmhessel/clipscore
        "clip_b32_w2.5",
        "openai/clip-vit-base-patch32",
        Crop(corner="torchvision"),
        "2.5*max(cos,0)",
        prefix="A photo depicts ",
        activation="quick_gelu",
    ),
    "l14": ClipScore(  # DiffusionNFT and newer Flow-GRPO
        "clip_l14_cos",
        "openai/clip-vit-large-patch14",
        Crop(how="bilinear", corner="torchvision"),
        "cos",
        activation="quick_gelu",
    ),
    # LAION's H/14 by its own processor. No published table is known to be made with it: the CLIP score in MixGRPO's code is that
    # of apple/DFN5B-CLIP-ViT-H-14-384, and DanceGRPO's code has none.
    "h14": ClipScore("clip_h14_cos", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", Crop(), "cos"),
}


def clipscore(variant: str | None = None) -> TwoTowers:
    """Make CLIPScore. Variants: b32 (2.5 max(cos, 0) with the prefix of the paper), l14 (the default) and h14 (plain cosines)."""
    _known("clipscore", variant, tuple(CLIP_SCORES))
    _needs("transformers", "clipscore")
    chosen = CLIP_SCORES[variant or "l14"]
    towers, weights = hub_towers(chosen.repository)
    if towers.activation != chosen.activation:
        raise UserError(
            f"the config of {chosen.repository} says the activation {towers.activation!r}, but its weights were "
            f"trained with {chosen.activation!r}"
        )
    sight = Sight(towers, replace(chosen.crop, size=towers.size[0]), chunk())
    return TwoTowers(chosen.name, sight, chosen.formula, f"{weights}-{chosen.activation}", chosen.prefix)


TINY_FORMULAS: dict[str, tuple[str, Formula]] = {
    "pick": ("pickscore-tiny", "exp(scale)*cos"),
    "hps": ("hpsv2-tiny", "100*cos"),
}


def tiny(tower: str, folder: Path = TINY) -> TwoTowers:
    """Make one of the two scorers of the glyph domain, `pick` or `hps`, from the shipped folder or another that the recipe wrote."""
    name, formula = TINY_FORMULAS[tower]
    _needs("open_clip", name.replace("-", ":"))
    sight, weights = _tiny(tower, folder)
    return TwoTowers(name, sight, formula, weights)


def _known(scorer: str, variant: str | None, variants: Sequence[str]) -> None:
    if variant is not None and variant not in variants:
        raise UserError(f"the scorer '{scorer}' has no variant {variant!r}; valid: {', '.join(variants)}")


class TinyEmbedder:
    """Embeds images of the glyph domain as unit vectors of the image tower of `pick`."""

    name = "clip-tiny"
    distance: Literal["cosine", "squared"] = "cosine"

    def __init__(self) -> None:
        _needs("open_clip", "clip:tiny")
        self._sight, weights = _tiny("pick", TINY)
        self.id = f"clip-tiny-1/{weights}/{self._sight.fit}/float32"

    def __call__(self, images: Images) -> Vectors:
        """Map (B, H, W, 3) to (B, D); RuntimeError where an image gives no vector."""
        vectors, reasons = self._sight(images)
        if reasons:
            raise RuntimeError("; ".join(f"image {row}: {why}" for row, why in sorted(reasons.items())))
        return vectors


def tiny_embedder() -> TinyEmbedder:
    """Make the embedder `clip:tiny`."""
    return TinyEmbedder()

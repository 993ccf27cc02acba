"""Colour classifiers: the palette one on prints, the published one on random weights of a small architecture of the same make."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpobench.bench.assets import glyphs
from gpobench.bench.errors import Missing, UserError
from gpobench.rewards import colours, palette
from gpobench.rewards.detectors import Detection
from gpobench.rewards.geneval_rules import COLOURS

open_clip = pytest.importorskip("open_clip")
torch = pytest.importorskip("torch")
SMALL = "gpobench-small-quickgelu"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights of a small CLIP with QuickGELU, in the format of the hub's file."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / f"{SMALL}.json").write_text(json.dumps(config), "utf-8")
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(SMALL)
    save_file(model.state_dict(), folder / colours.FILE)
    yield folder / colours.FILE


@pytest.fixture(scope="module")
def clip(weights: Path) -> colours.ClipColours:
    return colours.open_clip_colours(SMALL, weights)


def scene(n: int = 6) -> tuple[np.ndarray, list[Detection]]:
    """A noisy picture and objects of several classes in it, every third without a mask."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)
    found = []
    for i in range(n):
        x, y = rng.uniform(0, 50, 2)
        w, h = rng.uniform(5, 30, 2)
        mask = np.zeros((60, 80), bool)
        mask[int(y) + 1 : int(y + h), int(x) : int(x + w) - 1] = True
        found.append(Detection(("dog", "wine glass")[i % 2], 0.9, (x, y, x + w, y + h), mask if i % 3 else None))
    return image, found


def test_likeness_is_the_published_formula(clip: colours.ClipColours, weights: Path) -> None:
    """Three templates, unit vectors averaged and brought back to length 1; the object on #999, cropped; in float64."""
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(SMALL, pretrained=str(weights))
    model.eval()
    tokenizer = open_clip.get_tokenizer(SMALL)
    image, objects = scene()
    got = clip.likeness(image, objects)
    for row, thing in zip(got, objects, strict=True):
        picture = image.copy()
        if thing.mask is not None:
            picture[~thing.mask] = 0x99
        crop = Image.fromarray(picture).crop(thing.box)
        with torch.no_grad():
            seen = model.encode_image(preprocess(crop)[None])[0].double().numpy()
            for colour, likeness in zip(COLOURS, row, strict=True):
                said = [
                    f"a photo of a {colour} {thing.label}",
                    f"a photo of a {colour}-colored {thing.label}",
                    f"a photo of a {colour} object",
                ]
                each = model.encode_text(tokenizer(said)).double().numpy()
                mean = (each / np.linalg.norm(each, axis=1, keepdims=True)).mean(0)
                cosine = seen @ mean / np.linalg.norm(seen) / np.linalg.norm(mean)
                assert likeness == pytest.approx(cosine, abs=1e-5)
    assert clip(image, objects) == [COLOURS[i] for i in got.argmax(1)]


@pytest.mark.parametrize("rows", [1, 4])
def test_an_object_depends_on_itself_alone(weights: Path, rows: int) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(SMALL, pretrained=str(weights))
    clip = colours.ClipColours(model, preprocess, open_clip.get_tokenizer(SMALL), id="x", rows=rows)
    image, objects = scene(7)
    whole = clip.likeness(image, objects)
    assert whole.shape == (7, 10)
    np.testing.assert_array_equal(whole, np.concatenate([clip.likeness(image, [thing]) for thing in objects]))
    order = np.random.default_rng(1).permutation(7)
    np.testing.assert_array_equal(whole[order], clip.likeness(image, [objects[i] for i in order]))
    assert clip.likeness(image, []).shape == (0, 10) and clip(image, []) == []


def test_what_lies_outside_the_mask_does_not_matter(clip: colours.ClipColours) -> None:
    image, _ = scene()
    mask = np.zeros((60, 80), bool)
    mask[20:30, 30:40] = True
    thing = Detection("dog", 0.9, (20.0, 10.0, 50.0, 40.0), mask)
    other = image.copy()
    other[~mask] = 255 - other[~mask]
    np.testing.assert_array_equal(clip.likeness(image, [thing]), clip.likeness(other, [thing]))
    bare = thing._replace(mask=None)
    assert (clip.likeness(image, [bare]) != clip.likeness(other, [bare])).any()


def test_the_published_architecture_has_quickgelu_and_its_transform() -> None:
    """The trap: the name without `-quickgelu` makes another network of the same weights."""
    assert open_clip.get_model_config(colours.CLIP_MODEL)["quick_gelu"] is True
    assert not open_clip.get_model_config("ViT-L-14").get("quick_gelu", False)
    tag = open_clip.get_pretrained_cfg("ViT-L-14-quickgelu", "openai")
    assert tag["hf_hub"].rstrip("/") == colours.REPOSITORY and tag["quick_gelu"] is True


def test_the_transform_is_that_of_validation(clip: colours.ClipColours) -> None:
    said = str(clip._preprocess).lower()
    assert "centercrop" in said and "bicubic" in said and "randomresizedcrop" not in said
    assert "0.48145466" in said and "0.26862954" in said


def test_an_empty_box_keeps_a_pixel_and_a_wrong_mask_is_refused() -> None:
    image, _ = scene()
    assert colours.cut_out(image, Detection("dog", 1, (3.2, 3.2, 3.3, 3.3))).size == (1, 1)
    with pytest.raises(ValueError, match="does not fit"):
        colours.cut_out(image, Detection("dog", 1, (0, 0, 9, 9), np.ones((9, 9), bool)))


def test_without_weights_it_says_where_they_belong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    with pytest.raises(Missing, match="GPOBENCH_WEIGHTS"):
        colours.open_clip_colours()


def test_weights_of_another_network_are_refused(tmp_path: Path, weights: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="does not hold the weights"):
        colours.open_clip_colours(SMALL, path)


def test_a_file_of_yours_is_named_in_the_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GPOBENCH_WEIGHTS", raising=False)
    assert colours.clip_id() == "clip-ViT-L-14-quickgelu-openai-999-crop"
    path = tmp_path / colours.REPOSITORY / colours.FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other weights")
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    assert "openai@" in colours.clip_id()


# Crayons


@pytest.mark.parametrize("masked", [True, False])
def test_palette_colours_are_told_apart(masked: bool) -> None:
    rng = np.random.default_rng(0)
    for kind in glyphs.SHAPES:
        for colour, rgb in glyphs.SHAPE_COLOURS.items():
            for paper in glyphs.PAPERS.values():
                image = glyphs.draw_shapes(kind, 3, rgb, paper, rng)
                objects: list[Any] = palette.detector()(image[None])[0]
                objects = objects if masked else [d._replace(mask=None) for d in objects]
                assert colours.PaletteColours()(image, objects) == [colour] * 3


def test_paper_has_no_vote() -> None:
    image = np.full((32, 64, 3), 255, np.uint8)
    image[10:13, 10:13] = glyphs.SHAPE_COLOURS["green"]
    assert colours.palette_colour(image, Detection("circle", 1, (0, 0, 64, 32))) == "green"
    assert colours.palette_colour(image, Detection("circle", 1, (40, 0, 64, 32))) == "paper"
    assert colours.palette_colour(image, Detection("circle", 1, (-9, -9, -2, -2))) == "paper"

"""Detectors of transformers: random weights of the true architectures on disk, and post-processing against loops in float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpobench.bench.errors import Missing, UserError
from gpobench.rewards import detect_transformers as engine
from gpobench.rewards.detectors import Detection, open_detector

NAMES = ["person", "mouse", "sofa", "remote", "keyboard"]
WORDS = ("person", "computer mouse", "couch", "tv remote", "computer keyboard")
ID2LABEL = dict(enumerate(NAMES))
SMALL = engine.ResizeRule(long=160, short=96)


def write_mask2former(folder: Path) -> None:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=[f"stage{i}" for i in range(1, 5)],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=12,
        id2label=ID2LABEL,
        label2id={name: i for i, name in ID2LABEL.items()},
    )
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def write_boxes(folder: Path, name: str) -> None:
    import transformers

    common: dict[str, Any] = {
        "encoder_hidden_dim": 16,
        "encoder_in_channels": [16, 16, 32],
        "encoder_ffn_dim": 32,
        "encoder_attention_heads": 2,
        "d_model": 16,
        "decoder_in_channels": [16, 16, 16],
        "decoder_ffn_dim": 32,
        "decoder_attention_heads": 2,
        "decoder_layers": 2,
        "num_queries": 10,
        "num_denoising": 0,
        "hidden_expansion": 0.5,
        "anchor_image_size": None,
        "id2label": ID2LABEL,
        "label2id": {name: i for i, name in ID2LABEL.items()},
    }
    torch.manual_seed(1)
    if name == "rtdetr":
        backbone: Any = transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            downsample_in_bottleneck=False,
            out_features=["stage2", "stage3", "stage4"],
        )
        network: Any = transformers.RTDetrForObjectDetection(
            transformers.RTDetrConfig(backbone_config=backbone, decoder_n_points=2, **common)
        )
    else:
        backbone = transformers.HGNetV2Config(
            embedding_size=8,
            stem_channels=[3, 8, 8],
            hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1],
            stage_in_channels=[8, 8, 16, 16],
            stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=[8, 16, 16, 32],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[2, 2, 2, 2],
            out_features=["stage2", "stage3", "stage4"],
        )
        network = transformers.DFineForObjectDetection(
            transformers.DFineConfig(backbone_config=backbone, decoder_n_points=[2, 2, 2], **common)
        )
    network.save_pretrained(folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    write_mask2former(root / engine.SOURCES["mask2former"])
    for name in ("rtdetr", "dfine"):
        write_boxes(root / engine.SOURCES[name], name)
    return root


@pytest.fixture(scope="module")
def detectors(weights: Path) -> dict[str, Any]:
    folder = {name: weights / source for name, source in engine.SOURCES.items()}
    return {
        "mask2former": engine.Mask2Former("mask2former", folder["mask2former"], "tiny", SMALL),
        "rtdetr": engine.Boxes("rtdetr", folder["rtdetr"], "tiny", side=64),
        "dfine": engine.Boxes("dfine", folder["dfine"], "tiny", side=64),
    }


def pictures(rows: int, size: tuple[int, int] = (48, 64), seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (rows, 6, 8, 3), dtype=np.uint8)
    return coarse.repeat(size[0] // 6, 1).repeat(size[1] // 8, 2)


def same(one: list[Detection], other: list[Detection]) -> bool:
    return len(one) == len(other) and all(
        a[:3] == b[:3] and (a.mask is b.mask is None or np.array_equal(a.mask, b.mask))  # type: ignore[arg-type]
        for a, b in zip(one, other, strict=True)
    )


# What mmdet does with Mask2Former's answer


def reference(
    logits: np.ndarray, masks: np.ndarray, top: int, floor: float
) -> list[tuple[int, float, Any, np.ndarray]]:
    """The same rule, pair by pair and pixel by pixel in float64."""
    pairs = []
    for query, row in enumerate(logits.astype(np.float64)):
        p = np.exp(row - row.max())
        p /= p.sum()
        pairs += [(p[k], query, k) for k in range(len(row) - 1)]
    out = []
    for p, query, k in sorted(pairs, key=lambda one: -one[0])[:top]:
        total, xs, ys = [], [], []
        for y in range(masks.shape[1]):
            for x in range(masks.shape[2]):
                if masks[query, y, x] > 0:
                    total.append(1 / (1 + np.exp(-float(masks[query, y, x]))))
                    xs.append(x)
                    ys.append(y)
        if total and p * np.mean(total) > floor:
            box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
            out.append((k, p * np.mean(total), box, masks[query] > 0))
    return sorted(out, key=lambda one: -one[1])


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 6))
def test_instances_are_those_of_the_reference(seed: int, queries: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (queries, classes + 1)).astype(np.float32)
    masks = rng.normal(rng.normal(0, 2, (queries, 1, 1)), 1, (queries, 5, 7)).astype(np.float32)
    masks[0] = -1  # one paints nothing
    names = [f"class {k}" for k in range(classes)]
    found = engine.instances(torch.from_numpy(logits), lambda q: torch.from_numpy(masks[q]), names)
    wanted = reference(logits, masks, engine.TOP, engine.FLOOR)
    assert len(found) == len(wanted)
    for one, (k, score, box, mask) in zip(found, wanted, strict=True):
        assert one.label == names[k] and one.score == pytest.approx(score, abs=1e-5) and one.box == box
        assert one.mask is not None and np.array_equal(one.mask, mask)


def test_one_query_may_stand_for_two_classes_and_masks_may_overlap() -> None:
    logits = torch.tensor([[2.0, 2.0, -9.0], [3.0, -9.0, -9.0]])
    mask = torch.full((4, 6), -9.0)
    mask[1:3, 2:5] = 9.0
    found = engine.instances(logits, lambda q: mask, ["a", "b"])
    assert [one.label for one in found] == ["a", "a", "b"] or [one.label for one in found] == ["a", "b", "a"]
    assert all(one.box == (2, 1, 5, 3) for one in found)
    assert [round(one.score, 3) for one in found] == [1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((1024, 1024), (800, 800)), ((512, 512), (800, 800)), ((480, 640), (800, 1067)), ((100, 400), (333, 1333))],
)
def test_framing(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert engine.ResizeRule().size(*size) == wanted


def test_the_picture_is_prepared_as_mmdet_prepares_it(detectors: dict[str, Any]) -> None:
    import cv2

    (image,) = pictures(1, (96, 128))
    pixels = detectors["mask2former"].pixels(image)  # 96 x 128 fits into 160 x 96 as it is
    assert pixels.shape == (1, 3, 96, 128)
    back = pixels[0] * torch.tensor(engine.STD).view(3, 1, 1) + torch.tensor(engine.MEAN).view(3, 1, 1)
    np.testing.assert_allclose(back.movedim(0, -1).numpy(), image, atol=1e-3)

    (image,) = pictures(1, (60, 88))
    pixels = detectors["mask2former"].pixels(image)  # to 96 x 141, padded to 96 x 160
    assert pixels.shape == (1, 3, 96, 160)
    back = (pixels[0] * torch.tensor(engine.STD).view(3, 1, 1) + torch.tensor(engine.MEAN).view(3, 1, 1)).movedim(0, -1)
    resized = cv2.resize(image, (141, 96), interpolation=cv2.INTER_LINEAR)
    assert np.abs(back[:, :141].numpy() - resized).max() <= 1.01  # OpenCV works in fixed point
    np.testing.assert_allclose(back[:, 141:].numpy(), engine.GREY, atol=1e-3)


# The engines


@pytest.mark.parametrize("name", ["mask2former", "rtdetr", "dfine"])
def test_answers_have_the_form_of_the_contract(detectors: dict[str, Any], name: str) -> None:
    detector, images = detectors[name], pictures(2)
    found = detector(images)
    assert len(found) == 2 and sum(map(len, found)) and detector([]) == []
    assert detector.classes == WORDS and detector.name == name and "tiny@" in detector.id
    for row in found:
        assert [one.score for one in row] == sorted((one.score for one in row), reverse=True)
        for label, score, (x1, y1, x2, y2), mask in row:
            assert label in WORDS and engine.FLOOR < score <= 1 and x1 <= x2 and y1 <= y2
            if name == "mask2former":
                assert mask is not None and mask.shape == images.shape[1:3] and mask.dtype == bool
                ys, xs = np.nonzero(mask)
                assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x1, y1, x2, y2)
            else:
                assert mask is None


@pytest.mark.parametrize("name", ["mask2former", "rtdetr", "dfine"])
def test_a_batch_is_its_pictures_one_by_one_in_any_order(detectors: dict[str, Any], name: str) -> None:
    images = pictures(4)
    whole = detectors[name](images)
    for i in range(4):
        assert same(detectors[name](images[i : i + 1])[0], whole[i])
    order = np.random.default_rng(0).permutation(4)
    assert all(same(one, whole[i]) for one, i in zip(detectors[name](images[order]), order, strict=True))


@pytest.mark.parametrize("name", ["rtdetr", "dfine"])
def test_boxes_are_those_of_the_library(detectors: dict[str, Any], name: str) -> None:
    """RT-DETR's own image settings and post-processing, which D-FINE shares, as the reference."""
    from PIL import Image
    from transformers import RTDetrImageProcessorPil

    images = pictures(3, seed=4)
    own = RTDetrImageProcessorPil(size={"height": 64, "width": 64})
    for image, found in zip(images, detectors[name](images), strict=True):
        inputs = own(Image.fromarray(image), return_tensors="pt")
        torch.testing.assert_close(inputs["pixel_values"], detectors[name].pixels(image))
        with torch.inference_mode():
            said = detectors[name]._network(**inputs)
        (wanted,) = own.post_process_object_detection(said, threshold=engine.FLOOR, target_sizes=[image.shape[:2]])
        assert [one.label for one in found] == [WORDS[k] for k in wanted["labels"].tolist()]
        np.testing.assert_allclose([one.score for one in found], wanted["scores"], atol=1e-6)
        np.testing.assert_allclose([one.box for one in found], wanted["boxes"], atol=1e-4)


@pytest.mark.parametrize("name", ["mask2former", "rtdetr", "dfine"])
def test_a_broken_engine_raises(weights: Path, name: str) -> None:
    folder = weights / engine.SOURCES[name]
    broken: Any = (
        engine.Mask2Former(name, folder, "x", SMALL) if name == "mask2former" else engine.Boxes(name, folder, "x", 64)
    )
    with torch.no_grad():
        broken._network.model = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError):
        broken(pictures(1))


# Weights


@pytest.mark.parametrize("name", ["mask2former", "rtdetr", "dfine"])
def test_opened_by_name_from_a_folder_of_ones_own(weights: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(weights))
    detector = open_detector(name)
    assert detector.classes == WORDS and engine.SOURCES[name] in detector.id and "transformers-" in detector.id
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(weights.parent))
    with pytest.raises(Missing, match=engine.SOURCES[name]):
        open_detector(name)


@pytest.mark.parametrize("name", ["mask2former", "rtdetr", "dfine"])
def test_a_missing_weight_is_refused(weights: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "x"
    shutil.copytree(weights / engine.SOURCES[name], folder)
    architecture = engine.ARCHITECTURES.get(name, "Mask2FormerForUniversalSegmentation")
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(tensors) if "encoder" in key and key.endswith("weight"))
    save_file(
        {k: v.contiguous() for k, v in tensors.items() if k != key}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="lacks 1 weights"):
        engine.load(name, architecture, folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="does not hold"):
        engine.load(name, architecture, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(Missing, match="pickled"):
        engine.load(name, architecture, folder)

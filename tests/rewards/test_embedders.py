"""The embedders on small random networks, saved in the format of the true ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpobench.bench.errors import Missing, UserError
from gpobench.bench.spec import Embedder
from gpobench.bench.stats.distances import distances, paired
from gpobench.rewards import embedders

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def pictures(n: int, height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3)).astype(np.uint8)


def small_clip(folder: Path, side: int = 28) -> None:
    """A whole CLIPModel, as the published repositories hold: the embedder takes its image half."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**shape, "image_size": side, "patch_size": 14}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)


def small_dino(folder: Path) -> None:
    torch.manual_seed(1)
    transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2
        )
    ).save_pretrained(folder)


def random_alexnet(folder: Path, seed: int = 2) -> None:
    """torchvision's file: features that LPIPS looks at, and a classifier that it does not (60 million zeros in one number each)."""
    from torchvision.models import alexnet

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in alexnet(weights=None).state_dict().items()}
    torch.manual_seed(seed)
    state = {
        key: 0.1 * torch.randn(shape) if key.startswith("features") else torch.zeros(1).expand(shape)
        for key, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    torch.save(state, folder / "alexnet.pth")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    small_clip(root / "openai/clip-vit-large-patch14-336")
    small_clip(root / "openai/clip-vit-large-patch14", side=14)
    small_dino(root / "facebook/dinov2-base")
    random_alexnet(root / "pytorch")
    return root


@pytest.fixture(autouse=True)
def own_weights(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(weights))
    monkeypatch.setenv("GPOBENCH_SCORER_DEVICE", "cpu")


MAKERS: dict[str, Callable[[], Embedder]] = {
    "clip-l14-336": lambda: embedders.clip(),
    "clip-l14": lambda: embedders.clip("l14"),
    "dino-v2-base": lambda: embedders.dino(),
    "lpips-alex": lambda: embedders.lpips("alex"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_laws_of_an_embedder(name: str) -> None:
    embedder = MAKERS[name]()
    images = pictures(4)
    vectors = embedder(images)
    assert embedder.name == name and embedder.id.startswith(f"{name}@")
    assert vectors.shape[0] == 4 and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    looped = np.concatenate([embedder(images[i : i + 1]) for i in range(4)])
    assert np.array_equal(vectors, looped)
    order = np.array([2, 0, 3, 1])
    assert np.array_equal(embedder(images[order]), vectors[order])
    if embedder.distance == "cosine":
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    apart = distances(vectors, vectors, embedder.distance)
    assert (apart[~np.eye(4, dtype=bool)] > 1e-6).all()  # other pictures, other vectors
    assert embedder.id == MAKERS[name]().id


@pytest.mark.parametrize("name", ["clip-l14-336", "lpips-alex"])
def test_a_part_that_is_filled_up_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does: 16 rows at once, the last ones black."""
    embedder = MAKERS[name]()
    images = pictures(3)
    alone = embedder(images)
    monkeypatch.setattr(embedder, "_rows", 2)
    assert np.allclose(embedder(images), alone, atol=1e-5)


def test_clip_is_the_model_on_whole_pictures(weights: Path) -> None:
    """Against transformers' own image features of the full model, in float64, on pictures of the network's size."""
    images = pictures(2, 28, 28)
    model = transformers.CLIPModel.from_pretrained(weights / "openai/clip-vit-large-patch14-336").double().eval()
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    x = torch.from_numpy((images / 255 - np.array(mean)) / np.array(std)).movedim(-1, 1)
    with torch.inference_mode():
        out = model.get_image_features(pixel_values=x)
    want = (out if isinstance(out, torch.Tensor) else out.pooler_output).numpy()
    assert np.allclose(embedders.clip()(images), want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-5)


def test_dino_is_the_normalised_class_token(weights: Path) -> None:
    images = pictures(2, 224, 224)
    model = transformers.Dinov2Model.from_pretrained(weights / "facebook/dinov2-base").double().eval()
    x = torch.from_numpy((images / 255 - np.array((0.485, 0.456, 0.406))) / np.array((0.229, 0.224, 0.225)))
    with torch.inference_mode():
        want = model(pixel_values=x.movedim(-1, 1)).last_hidden_state[:, 0].numpy()
    assert np.allclose(embedders.dino()(images), want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-5)


def test_wide_pictures_are_seen_to_their_ends() -> None:
    images = pictures(1, 28, 112).repeat(2, 0)
    images[1, :, :20] = 255 - images[1, :, :20]  # a centre crop would not see it
    embedder = embedders.clip()
    assert paired(embedder(images[:1]), embedder(images[1:]), "cosine") > 1e-4


def test_squared_distance_is_lpips(weights: Path) -> None:
    """Against the forward of the lpips package itself, its linear weights true, the trunk random."""
    from lpips import LPIPS

    reference = LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = torch.load(weights / "pytorch/alexnet.pth", weights_only=True)
    renamed = {f"features.{key.partition('.')[2]}": key for key in reference.net.state_dict()}
    reference.net.load_state_dict({renamed[key]: value for key, value in trunk.items() if key in renamed})
    images = pictures(4, 224, 224)
    images[1] = np.clip(images[0].astype(int) + 20, 0, 255)
    x = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
    with torch.inference_mode():
        want = reference(x[[0, 0, 2]], x[[1, 3, 3]]).flatten().numpy()
    vectors = embedders.lpips()(images)
    assert vectors.shape[1] == 484_992
    assert np.allclose(paired(vectors[[0, 0, 2]], vectors[[1, 3, 3]], "squared"), want, atol=1e-5)
    assert want.min() > 1e-3


def test_tiny_comes_from_the_two_towers() -> None:
    try:
        embedder = embedders.clip("tiny")
    except Missing as missing:
        pytest.skip(str(missing))
    vectors = embedder(pictures(3, 32, 64))
    assert embedder.name == "clip-tiny" and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_other_weights_are_another_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = embedders.lpips().id, embedders.clip().id
    random_alexnet(tmp_path / "pytorch", seed=9)
    small_clip(tmp_path / "openai/clip-vit-large-patch14-336", side=42)
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    assert embedders.lpips().id != before[0] and embedders.clip().id != before[1]


def test_a_missing_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    small_dino(tmp_path / "facebook/dinov2-base")
    file = tmp_path / "facebook/dinov2-base/model.safetensors"
    state = load_file(file)
    state.pop("layernorm.weight")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of facebook/dinov2-base: .*layernorm.weight"):
        embedders.dino()
    (tmp_path / "pytorch").mkdir()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "pytorch/alexnet.pth")
    with pytest.raises(UserError, match="does not hold the weights of AlexNet"):
        embedders.lpips()
    (tmp_path / "pytorch/alexnet.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="is not a file of weights"):
        embedders.lpips()


def test_older_repositories_hold_a_bin_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "openai/clip-vit-large-patch14-336"
    small_clip(folder)
    want = embedders.clip()(pictures(1))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    assert np.allclose(embedders.clip()(pictures(1)), want, atol=1e-6)  # other places in memory, other last bits


def test_what_is_not_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(Missing, match=r"openai/clip-vit-large-patch14-336"):
        embedders.clip()
    with pytest.raises(Missing, match=r"GPOBENCH_WEIGHTS names, as pytorch/alexnet.pth"):
        embedders.lpips()
    folder = tmp_path / "facebook/dinov2-base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(Missing, match=r"facebook/dinov2-base/model.safetensors"):
        embedders.dino()


def test_a_wrong_request_is_said() -> None:
    with pytest.raises(UserError, match="valid: l14-336, l14, tiny"):
        embedders.clip("b32")
    with pytest.raises(UserError, match="valid: alex"):
        embedders.lpips("vgg")
    with pytest.raises(UserError, match="valid: v2-base"):
        embedders.dino("v3")
    embedder = embedders.clip()
    for wrong in (pictures(2)[0], pictures(2).astype(np.float32), pictures(2)[:0]):
        with pytest.raises(ValueError, match="uint8"):
            embedder(wrong)

"""The aesthetic predictor: its real layers with random weights in the published file's format, behind a small random tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from gpobench.bench.errors import Missing, UserError
from gpobench.bench.models.tiny_parts import build_tokenizer
from gpobench.bench.spec import Prompt
from gpobench.rewards import aesthetic

# What the published file holds: dropouts take numbers, the last layers follow one another.
KEYS = [f"layers.{i}.{what}" for i in (0, 2, 4, 6, 7) for what in ("weight", "bias")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = {f"layers.{key}": value.clone() for key, value in aesthetic.network().state_dict().items()}
        mlp["layers.7.bias"] += 5
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = shape | {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 3}
        vision = shape | {"image_size": 32, "patch_size": 8}
        tower = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    file = root / aesthetic.REPOSITORY / aesthetic.FILE
    file.parent.mkdir(parents=True)
    torch.save(mlp, file)
    tower.save_pretrained(str(root / aesthetic.TOWER))
    build_tokenizer().save_pretrained(str(root / aesthetic.TOWER))
    return root


@pytest.fixture
def scorer(weights: Path, monkeypatch: pytest.MonkeyPatch) -> aesthetic.Aesthetic:
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(weights))
    monkeypatch.setenv("GPOBENCH_SCORER_DEVICE", "cpu")
    return aesthetic.make()


def pictures(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, 40, 56, 3), dtype=np.uint8)


def test_the_layers_have_the_published_names_and_sizes() -> None:
    state = aesthetic.network().state_dict()
    assert [f"layers.{key}" for key in state] == KEYS
    # 4 bytes a number and the file's own frame: the published file has 3 714 759 bytes
    assert 3_710_000 < 4 * sum(value.numel() for value in state.values()) < 3_714_759


def test_the_network_is_affine() -> None:
    """Source: no activation stands between the layers, so at inference the mark is w.x + b."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        mlp = aesthetic.network()
        x = torch.randn(20, 768)
    weights, bias = aesthetic.collapsed(mlp)
    assert weights.shape == (768,) and weights.dtype == np.float64
    exact = mlp.double()(x.double())[:, 0].numpy()
    np.testing.assert_allclose(x.double().numpy() @ weights + bias, exact, atol=1e-12)
    np.testing.assert_allclose(mlp.float()(x)[:, 0].numpy(), exact, atol=1e-5)


def test_the_mark_is_the_affine_function_of_the_unit_features_in_float64(scorer: aesthetic.Aesthetic) -> None:
    images = pictures(4)
    network = scorer.sight.towers._network.double()  # type: ignore[attr-defined]
    weights, bias = aesthetic.collapsed(scorer.mlp)
    want: list[float] = []
    for image in images:
        from gpobench.rewards.two_towers import standardise

        x = standardise(scorer.sight.fit(image)[None]).double()
        with torch.no_grad():
            feature = network.visual_projection(network.vision_model(pixel_values=x).pooler_output)[0].numpy()
        want.append(float(feature / np.linalg.norm(feature) @ weights + bias))
    network.float()
    np.testing.assert_allclose(scorer(images, [Prompt("")] * 4).value["score"], want, atol=2e-5)


def test_laws_of_a_scorer(scorer: aesthetic.Aesthetic) -> None:
    images, prompts = pictures(5), [Prompt(f"picture {i}") for i in range(5)]
    whole = scorer(images, prompts).value["score"]
    assert len(set(whole)) == 5
    np.testing.assert_array_equal(
        whole, [scorer(images[i : i + 1], [Prompt("another")]).value["score"][0] for i in range(5)]
    )
    order = np.array([4, 2, 0, 1, 3])
    np.testing.assert_array_equal(scorer(images[order], prompts).value["score"], whole[order])
    with pytest.raises(ValueError, match="5 images but 4 prompts"):
        scorer(images, prompts[:4])
    assert scorer(pictures(0), []).value["score"].shape == (0,)
    broken = scorer(np.zeros((2, 0, 8, 3), np.uint8), prompts[:2])
    assert np.isnan(broken.value["score"]).all() and set(broken.reasons) == {0, 1}
    scorer.self_test()


def test_the_id_names_both_weights(scorer: aesthetic.Aesthetic) -> None:
    assert scorer.id.startswith("aesthetic-1/mlp@") and scorer.id.endswith("/crop32-pil-bicubic-torchvision/float32")
    assert "/clip-vit-large-patch14@" in scorer.id
    assert (scorer.name, tuple(scorer.metrics)) == ("aesthetic", ("score",))


def test_what_cannot_be_loaded_is_said(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Missing, match=r"github\.com/christophschuhmann.*GPOBENCH_WEIGHTS"):
        aesthetic.make()
    with pytest.raises(UserError, match="no variant 'v2'"):
        aesthetic.make("v2")
    state = torch.load(weights / aesthetic.REPOSITORY / aesthetic.FILE, weights_only=True)
    torch.save({key: value for key, value in state.items() if not key.startswith("layers.7")}, tmp_path / "short.pth")
    with pytest.raises(UserError, match=r"7\.weight"):
        aesthetic.load(tmp_path / "short.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(UserError, match="does not hold"):
        aesthetic.load(tmp_path / "text.pth")

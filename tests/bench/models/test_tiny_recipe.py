"""Recipe of the embedded model: a stopped run learns the same, and the shipped checkpoint is what its record says."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpobench.bench.assets import glyphs
from gpobench.bench.assets.words import word_splits
from gpobench.bench.models import tiny_recipe
from gpobench.bench.models.muon import orthogonalised
from gpobench.bench.models.tiny_measure import count_patches, shape_prompts
from gpobench.bench.models.tiny_parts import TOKENS, Latent, build_tokenizer, pixels
from gpobench.bench.models.tiny_recipe import TinyRecipe

SHORT = TinyRecipe(
    layers=1,
    heads=2,
    head_width=16,
    text_widths=(16, 16),
    pooled_width=8,
    autoencoder_widths=(8, 8, 8),
    autoencoder_steps=3,
    steps=6,
    batch=8,
    decoder_steps=2,
    drawn=8,
    processes=1,
    compiled=False,
    tell_every=0.0,
    save_every=0.0,
    readings=0,
    countings=1,
)
WEIGHTS = (
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "whole"
    heard: list[dict] = []
    record = SHORT(out, seed=3, log=heard.append)
    assert record == json.loads((out / "recipe.json").read_text())
    told = [line for line in heard if line.get("stage") == "flow"]
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(line["loss"]) and line["samples_per_second"] > 0 and line["eta"] >= 0 for line in told)
    return out


def test_the_folder_holds_a_pipeline_and_no_scaffolding(finished: Path):
    assert {path.name for path in finished.iterdir()} == {
        *(
            "README.md",
            "model_index.json",
            "recipe.json",
            "scheduler",
            "text_encoder",
            "text_encoder_2",
            "text_encoder_3",
        ),
        *("tokenizer", "tokenizer_2", "tokenizer_3", "transformer", "vae"),
    }
    record = json.loads((finished / "recipe.json").read_text())
    assert record["fields"]["steps"] == 6 and record["seed"] == 3
    assert record["trained"]["samples"]["flow"] == 48


@pytest.mark.parametrize("stage", ["autoencoder", "flow", "decoder"])
def test_stopped_and_woken_it_learns_the_same(finished: Path, tmp_path: Path, stage: str):
    out = tmp_path / "interrupted"

    def pull_the_plug(line: dict) -> None:
        if line.get("stage") == stage and line.get("step") == 1:
            raise Stop

    with pytest.raises(Stop):
        SHORT(out, seed=3, log=pull_the_plug)
    assert not (out / "model_index.json").exists(), "a half-trained model is not published"
    lines: list[dict] = []
    SHORT(out, seed=3, log=lines.append)
    assert {"stage": stage, "continues_at": 1} in lines
    steps = [line["step"] for line in lines if line.get("stage") == stage and "step" in line]
    assert steps[0] == 2, "it went on where the last state was saved"
    for name in WEIGHTS:
        one, other = load_file(finished / name), load_file(out / name)
        assert one.keys() == other.keys()
        assert all((one[key] == other[key]).all() for key in one), name


def test_another_seed_is_another_model(finished: Path, tmp_path: Path):
    SHORT(tmp_path, seed=4, log=lambda _: None)
    one, other = load_file(finished / WEIGHTS[0]), load_file(tmp_path / WEIGHTS[0])
    assert any((one[key] != other[key]).any() for key in one)


def test_the_linear_latent_is_nearly_lossless():
    drawn = SHORT.pictures()
    latent = Latent(drawn, 0)
    rng = np.random.default_rng(5)
    images = pixels(np.stack([drawn.sample(rng, 0)[1] for _ in range(64)]))
    z = latent.encode(images)
    assert z.shape == (64, 16, 8, 16)
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)
    assert latent.kept > 0.95
    assert (latent.decode(z) - images).square().mean().item() < 0.05 * images.var().item()


def test_muon_makes_orthogonal_steps():
    import torch

    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalised(x))
    assert singular.min() > 0.5 and singular.max() < 1.3


def test_the_hub_counts_as_the_scorer_does():
    palette = pytest.importorskip("gpobench.rewards.palette")
    rng = np.random.default_rng(2)
    for _ in range(60):
        kind, colour, count = rng.choice(glyphs.SHAPES), rng.choice(list(glyphs.SHAPE_COLOURS)), int(rng.integers(1, 6))
        picture = glyphs.draw_shapes(kind, count, glyphs.SHAPE_COLOURS[colour], glyphs.PAPERS["cream"], rng)
        picture = np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
        assert count_patches(picture, colour) == palette.count(picture, colour)


def every_prompt() -> list[str]:
    """One word a letter, every surface and ink; every shapes prompt."""
    inks = (None, *glyphs.INKS)
    words = [glyphs.ALPHABET[i : i + 5] for i in range(0, 26, 5)]
    words = [word if len(word) > 2 else "XYZ" for word in words]
    prompts = [
        glyphs.word_prompt(word, surface=surface, ink=ink)
        for word in words
        for surface in glyphs.SURFACES
        for ink in inks
    ]
    return prompts + [prompt for prompt, *_ in shape_prompts()]


# The checkpoint that ships


@pytest.fixture(scope="module")
def shipped() -> Path:
    folder = Path(tiny_recipe.__file__).parent / "tiny"
    assert (folder / "model_index.json").exists(), "the embedded model is part of the package"
    return folder


def test_it_is_small(shipped: Path):
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) <= 12e6


def test_it_was_made_by_these_settings(shipped: Path):
    from dataclasses import asdict

    record = json.loads((shipped / "recipe.json").read_text())
    assert record["fields"] == json.loads(json.dumps(asdict(TinyRecipe())))
    assert (record["width"], record["height"], record["steps"], record["guidance"]) == (64, 32, 10, 1.0)
    assert record["drop_last_step"]


def test_the_words_it_never_saw_are_the_held_out_splits(shipped: Path):
    record = json.loads((shipped / "recipe.json").read_text())
    splits = word_splits()
    for split in ("validation", "test"):
        assert record["held_out_sha256"][split] == sorted(sha256(word.encode()).hexdigest() for word in splits[split])


def test_it_leaves_room_to_learn(shipped: Path):
    scores = json.loads((shipped / "recipe.json").read_text())["scores"]
    assert 0.35 <= scores["test/exact"]["mean"] <= 0.55
    assert 0.35 <= scores["shapes/exact"]["mean"] <= 0.55


def test_its_tokenizers_know_every_word_of_every_prompt(shipped: Path):
    from transformers import AutoTokenizer

    fresh = build_tokenizer()
    for place in ("tokenizer", "tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(str(shipped / place))
        for prompt in every_prompt():
            ids = tokenizer(prompt).input_ids
            assert tokenizer.unk_token_id not in ids, prompt
            assert len(ids) <= TOKENS == tokenizer.model_max_length
            assert ids == fresh(prompt).input_ids
        quote = tokenizer.convert_tokens_to_ids('"')
        at = {tokenizer(p).input_ids.index(quote) for p in every_prompt() if '"' in p}
        assert len(at) == 1, "the word starts at the same place in every prompt"


def test_plain_diffusers_loads_it_and_it_writes(shipped: Path):
    import torch
    from diffusers import StableDiffusion3Pipeline

    record = json.loads((shipped / "recipe.json").read_text())
    pipe = StableDiffusion3Pipeline.from_pretrained(str(shipped))
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_3)} == {
        torch.float32
    }
    pipe.set_progress_bar_config(disable=True)
    words = ["CAT", "TREE", "HELLO", "MOON", "SUN", "PAPER", "DOG", "FISH"]
    images = pipe(
        prompt=[glyphs.word_prompt(word, ink="black") for word in words],
        height=record["height"],
        width=record["width"],
        num_inference_steps=record["steps"],
        guidance_scale=record["guidance"],
        max_sequence_length=record["max_sequence_length"],
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (8, 32, 64, 3)
    # nearer to the word that was asked for than to the others, whatever the paper: compare the dark pixels
    drawn = images.min(-1).reshape(8, -1)
    clean = np.stack([glyphs.draw_word(word) for word in words]).min(-1).reshape(8, -1) / 255
    likeness = np.corrcoef(drawn, clean)[:8, 8:]
    assert (likeness.argmax(1) == np.arange(8)).mean() >= 0.75

"""Recipe of the second embedded model, in miniature: a stopped run learns the same, and its tokens hold every prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpobench.bench.assets import drawings
from gpobench.bench.assets.drawing_prompts import (
    ShapePrompt,
    counting_prompts,
    geneval_prompts,
    two_word_prompts,
    word_prompts,
)
from gpobench.bench.models.tiny2_recipe import DRAWINGS, Tiny2Recipe, prompts_by_kind, right
from gpobench.bench.models.tiny_parts import Latent, build_parts, build_tokenizer, pictures, pixels

SHORT = Tiny2Recipe(
    layers=1,
    heads=2,
    head_width=16,
    text_widths=(16, 16),
    pooled_width=8,
    autoencoder_widths=(8, 8, 8),
    autoencoder_steps=2,
    steps=3,
    batch=8,
    decoder_steps=2,
    drawn=8,
    processes=1,
    compiled=False,
    tell_every=0.0,
    save_every=0.0,
    look_every=0.0,
    looks=1,
    readings=0,
    countings=0,
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
    out = tmp_path_factory.mktemp("tiny2") / "whole"
    heard: list[dict] = []
    record = SHORT(out, seed=3, log=heard.append)
    assert record == json.loads((out / "recipe.json").read_text())
    assert (record["width"], record["height"]) == (64, 32)
    looked = [line for line in heard if "linear/two_words" in line]
    assert looked and {"decoder/word", "decoder/counts", "decoder/position", "decoder/color_attr"} <= set(looked[0])
    return out


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
    for name in WEIGHTS:
        one, other = load_file(finished / name), load_file(out / name)
        assert one.keys() == other.keys()
        assert all((one[key] == other[key]).all() for key in one), name


def test_plain_diffusers_loads_it(finished: Path):
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(str(finished))
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a photo of a ring left of a star on pink", 'a sign that says "TWO WORDS" in red']
    images = pipe(
        prompt=prompts,
        height=32,
        width=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=1,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (2, 32, 64, 3) and np.isfinite(images).all()


def test_the_default_network_stays_below_twelve_megabytes():
    parts = build_parts(Tiny2Recipe(), 0)
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 11.6e6, (
        "the configs and tokenizers need the rest"
    )


def test_its_tokenizer_knows_every_prompt_of_every_split():
    tokenizer = build_tokenizer(DRAWINGS)
    unknown = tokenizer.unk_token_id
    texts = [
        p.text for split in ("train", "validation", "test") for row in prompts_by_kind(split).values() for p in row
    ]
    longest = 0
    for text in texts:
        ids = tokenizer(text).input_ids
        assert unknown not in ids, text
        longest = max(longest, len(ids))
    assert longest <= DRAWINGS.tokens == tokenizer.model_max_length
    long_text = drawings.text_prompt(("ABCDEF", "GHIJKL"), surface="label", ink="blue")
    assert len(tokenizer(long_text).input_ids) == DRAWINGS.tokens


def test_the_space_between_two_words_is_a_token():
    tokenizer = build_tokenizer(DRAWINGS)
    one, two = (tokenizer(f'a sign that says "{text}"').input_ids for text in ("ABCDEF", "ABC DEF"))
    assert len(two) == len(one) + 1
    gap = tokenizer.convert_tokens_to_ids("_")
    assert two.count(gap) == 1 and gap not in one


def content_of(prompt: ShapePrompt) -> drawings.Content:
    """A content that fulfils a prompt."""
    paper, names = prompt.text.split(" on ")[1], [clause["class"] for clause in prompt.include]
    if prompt.tag in ("counting", "single_object", "colors"):
        kind, count, colour = prompt.cell
        return drawings.Counted(str(kind), int(str(count)), str(colour), paper)
    colours = [clause.get("color", colour) for clause, colour in zip(prompt.include, ("red", "blue"), strict=True)]
    one, other = (drawings.ColouredShape(name, colour) for name, colour in zip(names, colours, strict=True))
    relation = prompt.include[1].get("position", ("right of", 0))[0]  # of the second clause to the first
    if relation in drawings.MIRRORED:
        return drawings.Pair(one, other, drawings.MIRRORED[relation], paper)
    return drawings.Pair(other, one, relation, paper)


def test_drawings_of_every_test_prompt_are_right_and_those_of_its_neighbours_are_not():
    rng = np.random.default_rng(0)
    for prompts in prompts_by_kind("test").values():
        shapes = [prompt for prompt in prompts if isinstance(prompt, ShapePrompt)][:60]
        pictures = [drawings.draw(content_of(prompt), rng) for prompt in shapes]
        assert all(right(picture, prompt) for picture, prompt in zip(pictures, shapes, strict=True))
        others = [right(picture, prompt) for picture, prompt in zip(pictures, shapes[1:], strict=False)]
        assert not shapes or np.mean(others) < 0.5


def test_clean_drawings_stay_right_through_the_latent():
    rng = np.random.default_rng(0)
    prompts = [prompt for prompt in counting_prompts("test")[:60] + geneval_prompts("test")[::8]]
    drawn = pixels(np.stack([drawings.draw(content_of(prompt), rng) for prompt in prompts]))
    latent = Latent(SHORT.pictures(), 0, DRAWINGS.channels)
    decoded = pictures(latent.decode(latent.encode(drawn)))
    assert np.mean([right(image, prompt) for image, prompt in zip(decoded, prompts, strict=True)]) >= 0.97


def test_clean_texts_are_read():
    rng = np.random.default_rng(0)
    prompts = (word_prompts("test")[:25], two_word_prompts("test")[:25])
    verdicts = [
        right(drawings.draw(drawings.Text(tuple(p.target.split()), "blue", "cream"), rng), p)
        for row in prompts
        for p in row
    ]
    assert np.mean(verdicts) >= 0.94

"""Recipe of the two small preference scorers: what they may see, what counts as better, and exact resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpobench.bench.assets import glyphs
from gpobench.bench.errors import UserError
from gpobench.rewards import tiny_clip_recipe as recipe
from gpobench.rewards import two_towers

SMALL: dict[str, Any] = {"steps": 4, "prompts": 4, "save_every": 2, "measured": 4}


@pytest.fixture(scope="module")
def batches() -> list[recipe.Batch]:
    return [recipe.draw_batch(24, (0, step)) for step in range(4)]


def test_a_batch_is_pure_in_its_seed(batches: list[recipe.Batch]) -> None:
    again = recipe.draw_batch(24, (0, 1))
    assert torch.equal(again.pictures, batches[1].pictures) and again.prompts == batches[1].prompts
    assert not torch.equal(batches[0].pictures, batches[1].pictures)
    assert batches[0].pictures.shape == (6, 24, 3, 32, 64)
    assert torch.isfinite(batches[0].pictures).all()


def test_no_held_out_string_is_ever_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in prompts, not in pictures, near misses included."""
    printed: set[str] = set()
    draw = glyphs.draw_word
    monkeypatch.setattr(glyphs, "draw_word", lambda word, **how: (printed.add(word), draw(word, **how))[1])
    for step in range(6):
        for prompt in recipe.draw_batch(24, (5, step)).prompts:
            if '"' in prompt:
                printed.add(prompt.split('"')[1])
    assert len(printed) > 150 and {glyphs.split_of(word) for word in printed} == {"train"}


def test_near_misses_are_near_and_misses() -> None:
    rng = np.random.default_rng(0)
    for _ in range(400):
        thing, named = recipe.draw_thing(rng, 0.5), bool(rng.random() < 0.5)
        miss = recipe.near_miss(thing, rng, colour_counts=named)
        assert miss != thing and bool(miss.word) == bool(thing.word)
        if thing.word:
            assert glyphs.split_of(miss.word) == "train" and 1 <= len(miss.word) <= glyphs.LONGEST
            assert named or miss.word != thing.word
        else:
            assert 1 <= miss.count <= 6


def test_fits_says_which_picture_shows_what_a_prompt_asks_for(batches: list[recipe.Batch]) -> None:
    for batch in batches:
        p = 24
        rows = torch.arange(p)
        for own in (recipe.RIGHT, recipe.WORN, recipe.RUINED):
            assert batch.fits[rows, own * p + rows].all()
        for other in (recipe.MISS, recipe.MISS_WORN):
            assert not batch.fits[rows, other * p + rows].any()
        assert batch.fits[p + rows, recipe.MISS * p + rows].all()
        assert not batch.fits[p + rows, recipe.RIGHT * p + rows].any()
        assert [bool(prompt) for prompt in batch.prompts] == batch.askable.tolist()


def test_wear_goes_from_light_to_ruin() -> None:
    """The further from the print, the worse: what the order of the preference loss stands on."""
    ink = torch.from_numpy(np.stack([recipe.coverage(recipe.Thing(word="JUDGE", colour="red"), s) for s in range(64)]))
    ink = ink[:, None]
    g = torch.Generator().manual_seed(0)
    light = (recipe.worn(ink, g) - ink).square().mean((1, 2, 3))
    heavy = (recipe.ruined(ink, ink.roll(1, 0), g) - ink).square().mean((1, 2, 3))
    assert 0 < float(light.mean()) < 0.6 * float(heavy.mean())


def test_the_contrastive_loss_in_float64() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 9, generator=g).double()
    positive = torch.randint(0, 9, (5,), generator=g)
    negative = torch.rand(5, 9, generator=g) < 0.5
    negative[torch.arange(5), positive] = False
    want = np.mean(
        [
            -math.log(
                math.exp(row[k]) / (math.exp(row[k]) + sum(math.exp(v) for v, n in zip(row, keep, strict=True) if n))
            )
            for row, k, keep in zip(logits.tolist(), positive.tolist(), negative.tolist(), strict=True)
        ]
    )
    assert float(recipe.contrast(logits, positive, negative)) == pytest.approx(want, abs=1e-12)


def test_the_preference_loss_falls_when_the_better_picture_gains(batches: list[recipe.Batch]) -> None:
    batch = batches[0]
    g = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(48, 16, generator=g), dim=-1)
    images = torch.nn.functional.normalize(torch.randn(6, 24, 16, generator=g), dim=-1)
    before = recipe.losses(texts, images, torch.tensor(10.0), batch)
    better = images.clone()
    better[recipe.RIGHT] = texts[:24]
    after = recipe.losses(texts, better, torch.tensor(10.0), batch)
    assert after["order"] < before["order"] and after["contrast"] < before["contrast"]


@pytest.mark.parametrize("tower", list(recipe.TOWERS))
def test_a_stopped_run_continues_as_if_it_had_not(tower: str, tmp_path: Path) -> None:
    small = recipe.TinyClipRecipe(towers=(tower,), **SMALL)
    facts = small(tmp_path / "straight", seed=3, log=lambda line: None)
    assert set(facts) == {tower} and facts[tower]["recipe"]["seed"] == 3

    class Cut(Exception):
        pass

    def cut(line: dict[str, Any]) -> None:
        raise Cut

    with pytest.raises(Cut):
        small(tmp_path / "cut", seed=3, log=cut)
    lines: list[dict[str, Any]] = []
    small(tmp_path / "cut", seed=3, log=lines.append)
    assert lines[0] == {"recipe": "tiny-clip", "tower": tower, "continues_at": 2}
    assert [line["step"] for line in lines[1:]] == [4]
    one, two = (load_file(tmp_path / run / f"{tower}.safetensors") for run in ("straight", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert two_towers.tiny(tower, tmp_path / "cut").id == two_towers.tiny(tower, tmp_path / "straight").id
    lines.clear()
    small(tmp_path / "cut", seed=3, log=lines.append)
    assert lines == []  # finished: nothing is trained again


def test_another_seed_does_not_continue_a_run(tmp_path: Path) -> None:
    small = recipe.TinyClipRecipe(towers=("pick",), **SMALL)

    def cut(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(tmp_path, seed=0, log=cut)
    with pytest.raises(UserError, match="another recipe or seed"):
        small(tmp_path, seed=1, log=cut)
    with pytest.raises(UserError, match="no tower 'eva'"):
        recipe.TinyClipRecipe(towers=("eva",))(tmp_path, seed=0, log=cut)


def test_the_shipped_facts_are_of_this_recipe() -> None:
    facts = json.loads((two_towers.TINY / "facts.json").read_text("utf-8"))
    assert set(facts) == set(recipe.TOWERS)
    for tower, said in facts.items():
        assert json.loads((two_towers.TINY / f"{tower}.json").read_text("utf-8")) == recipe.TOWERS[tower]
        assert set(said["recipe"]) == set(recipe.TinyClipRecipe.__dataclass_fields__) - {"towers"} | {"seed"}

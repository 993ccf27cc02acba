"""The held-out reader: what it reads, what its weights are, and that its recipe learns and continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpobench.bench.assets import glyphs
from gpobench.bench.errors import Missing, UserError
from gpobench.bench.spec import Prompt
from gpobench.rewards import reader, reader_recipe, rules


@pytest.fixture(scope="module")
def scorer() -> reader.Reader:
    return reader.make()


def test_id_follows_the_weights(scorer: reader.Reader, tmp_path: Path) -> None:
    assert scorer.id.startswith("reader-1/ctc@") and scorer.id.endswith(rules.RULE)
    other = {key: value + 1 if value.is_floating_point() else value for key, value in load_file(reader.WEIGHTS).items()}
    save_file(other, tmp_path / "other.safetensors")
    assert reader.Reader(tmp_path / "other.safetensors").id != scorer.id
    assert reader.WEIGHTS.stat().st_size < 2_000_000


def test_self_test(scorer: reader.Reader) -> None:
    scorer.self_test()


def test_reads_as_well_as_its_recipe_says(scorer: reader.Reader) -> None:
    facts = reader.recipe_facts()
    for key, draw in (
        ("clean_test_words_in_dejavu_sans_mono_bold", reader_recipe.clean_words),
        ("degraded_test_words_in_dejavu_sans_mono_bold", reader_recipe.degraded_words),
    ):
        told: Any = facts[key]
        found = reader_recipe.rate(scorer.read, *draw())
        assert found["n"] == told["n"] and abs(found["exact"] - told["exact"]) <= 0.01  # other machines round otherwise
    clean: Any = facts["clean_test_words_in_dejavu_sans_mono_bold"]
    assert clean["exact"] >= 0.98


def test_it_has_no_dictionary_and_sees_nothing_on_blank_paper(scorer: reader.Reader) -> None:
    rng = np.random.default_rng(3)
    strings = ["".join(rng.choice(list(glyphs.ALPHABET), 4)) for _ in range(150)]
    read = scorer.read(np.stack([glyphs.draw_word(text) for text in strings]))
    assert np.mean([a == b for a, b in zip(read, strings, strict=True)]) >= 0.95
    blank = np.stack([np.full((32, 64, 3), level, np.uint8) for level in (0, 127, 222, 255)])
    assert scorer.read(blank) == [""] * 4


def test_a_batch_is_its_pictures_one_by_one_in_any_order(scorer: reader.Reader) -> None:
    pictures, _ = reader_recipe.draw_batch(70, (9,))
    images = pictures.numpy().astype(np.uint8)
    whole = scorer.logits(images)
    for i in (0, 31, 32, 69):
        assert torch.equal(scorer.logits(images[i : i + 1])[0], whole[i])
    order = np.random.default_rng(0).permutation(70)
    assert torch.equal(scorer.logits(images[order]), whole[torch.from_numpy(order)])


def test_scores(scorer: reader.Reader) -> None:
    images = np.stack([glyphs.draw_word(word) for word in ("OPEN", "SHUT")])
    scores = scorer(images, [Prompt("", {"target": "OPEN"}), Prompt('say "SHOT"')])
    np.testing.assert_array_equal(scores.value["soft"], [1, 0.75])
    np.testing.assert_array_equal(scores.value["exact"], [1, 0])
    assert scores.notes == ["OPEN", "SHUT"]
    assert scorer(np.zeros((0, 32, 64, 3), np.uint8), []).value["soft"].shape == (0,)


def test_bad_input(scorer: reader.Reader, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pictures of"):
        scorer(np.zeros((1, 64, 64, 3), np.uint8), [Prompt('say "A"')])
    with pytest.raises(ValueError, match="images but"):
        scorer(np.zeros((2, 32, 64, 3), np.uint8), [Prompt('say "A"')])
    with pytest.raises(UserError, match="no variant"):
        reader.make("large")
    with pytest.raises(Missing, match="gpobench pretrain reader"):
        reader.Reader(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(reader.WEIGHTS.read_bytes()[:5000])
    with pytest.raises(UserError, match="does not hold"):
        reader.Reader(tmp_path / "broken.safetensors")


def test_a_network_that_fails_is_nan_with_a_reason() -> None:
    broken = reader.make()
    broken.network[0] = torch.nn.Conv2d(4, 24, 5, 2, 2)  # four channels where a picture has three
    scores = broken(np.zeros((2, 32, 64, 3), np.uint8), [Prompt('say "A"')] * 2)
    assert (
        np.isnan(scores.value["exact"]).all() and "RuntimeError" in scores.reasons[0] and set(scores.reasons) == {0, 1}
    )


def test_spelling() -> None:
    a, b = 1, 2
    rows = np.array([[0, a, a, 0, a, b, b, 0], [0] * 8, [b, a, b, a, 0, 0, 0, 26]])
    assert reader.spell(rows) == ["AAB", "", "BABAZ"]


def test_training_strings_are_of_the_train_split_and_faces_are_others() -> None:
    rng = np.random.default_rng(0)
    drawn = {reader_recipe.random_letters(rng) for _ in range(3000)}
    assert {glyphs.split_of(text) for text in drawn} == {"train"}
    assert {len(text) for text in drawn} == {1, 2, 3, 4, 5}
    assert not [face for face in reader_recipe.FACES if "Mono" in face]
    assert glyphs.default_font().name == "DejaVuSansMono-Bold.ttf"


def test_batches_are_pure_in_their_seed() -> None:
    (a, x), (b, y), (c, z) = (reader_recipe.draw_batch(12, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(a, b) and x == y and x != z and a.shape == (12, 32, 64, 3)
    assert float(a.min()) >= 0 and float(a.max()) <= 255


def test_the_recipe_continues_bit_for_bit(tmp_path: Path) -> None:
    recipe = reader_recipe.ReaderRecipe(steps=4, batch=8, save_every=2, warmup=1, probe=8, measured=8)
    told: list[dict[str, Any]] = []
    recipe(tmp_path / "straight", seed=5, log=told.append)
    assert [fact["step"] for fact in told] == [2, 4]

    class Cut(Exception):
        pass

    def cut(fact: dict[str, Any]) -> None:
        raise Cut

    with pytest.raises(Cut):
        recipe(tmp_path / "cut", seed=5, log=cut)
    assert not (tmp_path / "cut" / "reader.safetensors").exists()
    again: list[dict[str, Any]] = []
    facts = recipe(tmp_path / "cut", seed=5, log=again.append)
    assert again[0] == {"recipe": "reader", "continues_at": 2}
    one, two = (load_file(tmp_path / name / "reader.safetensors") for name in ("straight", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert json.loads((tmp_path / "cut" / "reader.json").read_text()) == facts
    with pytest.raises(UserError, match="another recipe or seed"):
        recipe(tmp_path / "cut", seed=6, log=again.append)

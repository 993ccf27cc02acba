"""Recipe of the held-out reader of lines: what it may see, its loss over two lines, and that a stopped run repeats itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gpobench.bench.assets import glyphs
from gpobench.bench.errors import Missing
from gpobench.bench.spec import Prompt
from gpobench.rewards import line_reader_recipe as recipe
from gpobench.rewards.line_reader import COLUMNS, LineReader, spell_lines
from gpobench.rewards.reader import ALPHABET

SMALL = recipe.LineReaderRecipe(steps=3, batch=8, save_every=1, probe=4, measured=8)


def test_a_batch_is_pure_in_its_seed():
    (a, x), (b, y), (c, _) = (recipe.draw_batch(12, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(a, b) and x == y and not torch.equal(a, c)
    assert a.shape == (12, 32, 64, 3) and 0 <= float(a.min()) <= float(a.max()) <= 255


def test_no_held_out_string_is_ever_printed():
    rng = np.random.default_rng(0)
    texts = [recipe.random_text(rng) for _ in range(600)]
    assert {len(text) for text in texts} == {1, 2}
    assert {glyphs.split_of(word) for text in texts for word in text} == {"train"}
    assert {len(word) for text in texts if len(text) == 1 for word in text} == set(range(2, 8))


def test_two_lines_are_spelt_with_a_space_and_an_empty_one_without():
    classes = np.zeros((3, 2, COLUMNS), int)
    classes[0, 0, [1, 2, 4]] = [1, 2, 2]
    classes[0, 1, [3, 5]] = [26, 26]
    classes[1, 0, 7] = 3
    assert spell_lines(classes) == ["ABB ZZ", "C", ""]


def test_the_loss_is_the_mean_of_both_lines_a_letter():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, len(ALPHABET) + 1, COLUMNS, generator=g).double()
    terms = []
    for row, lines in enumerate((("AB", "ABBA"), ("XYZ", ""))):
        for i, line in enumerate(lines):
            logp = logits[row, i].log_softmax(0).T[:, None]
            letters = torch.tensor([ALPHABET.index(c) + 1 for c in line], dtype=torch.long)
            each = F.ctc_loss(logp, letters, torch.tensor([COLUMNS]), torch.tensor([len(line)]), reduction="sum")
            terms.append(float(each) / max(len(line), 1))
    loss = recipe.lines_loss(logits, [("AB", "ABBA"), ("XYZ",)])
    assert float(loss) == pytest.approx(np.mean(terms), abs=1e-12)


def test_a_stopped_run_continues_as_if_it_had_not(tmp_path: Path):
    facts = SMALL(tmp_path / "straight", seed=3, log=lambda line: None)
    assert facts == json.loads((tmp_path / "straight" / "line_reader.json").read_text())
    assert (facts["clean_test_words"]["n"], facts["clean_test_texts_of_two_words"]["n"]) == (300, 150)

    class Cut(Exception):
        pass

    def cut(line: dict[str, Any]) -> None:
        if line.get("step") == 2:
            raise Cut

    with pytest.raises(Cut):
        SMALL(tmp_path / "cut", seed=3, log=cut)
    lines: list[dict[str, Any]] = []
    SMALL(tmp_path / "cut", seed=3, log=lines.append)
    assert lines[0] == {"recipe": "line-reader", "continues_at": 2}
    one, two = (load_file(tmp_path / run / "line_reader.safetensors") for run in ("straight", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

    reader = LineReader(tmp_path / "cut" / "line_reader.safetensors")
    pictures = recipe.draw_batch(5, (0, 0))[0].numpy().astype(np.uint8)
    together = reader.logits(pictures)
    assert all(torch.equal(reader.logits(p[None])[0], row) for p, row in zip(pictures, together, strict=True))
    scores = reader(pictures, [Prompt('a sign that says "TWO WORDS"', {"target": "TWO WORDS"})] * 5)
    assert np.isfinite(scores.value["soft"]).all()
    with pytest.raises(ValueError, match="32, 64"):
        reader(np.zeros((1, 48, 64, 3), np.uint8), [Prompt('a "A"')])


def test_without_weights_it_says_how_to_make_them(tmp_path: Path):
    with pytest.raises(Missing, match="gpobench pretrain line-reader"):
        LineReader(tmp_path / "none.safetensors")

"""Tesseract on real renders where it is installed; what is said where it is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gpobench.bench.assets.glyphs import draw_word
from gpobench.bench.errors import Missing, UserError
from gpobench.bench.spec import Prompt
from gpobench.rewards import rules, tesseract
from gpobench.tasks import ocr

needs_it = pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")


@needs_it
def test_id_and_self_tests() -> None:
    assert tesseract.available()
    line = tesseract.make()
    assert line.id.startswith("tesseract-") and "/eng@" in line.id and line.id.endswith(f"{rules.RULE}/line-psm7-x4")
    assert "unknown" not in line.id
    line.self_test()
    tesseract.make("page").self_test()


@needs_it
def test_reads_clean_words_alike_in_any_order_and_one_by_one() -> None:
    prompts = list(ocr.OCR().prompts("test", "glyphs"))[:24]
    images = np.stack([draw_word(p.meta["target"]) for p in prompts])
    images[::4] = images[::4, :, ::-1]  # mirrored: read in part
    line = tesseract.make()
    whole = line(images, prompts)
    clean = [i for i in range(24) if i % 4]
    assert np.mean(whole.value["exact"][clean]) >= 0.9 and len(set(whole.value["soft"])) > 1
    order = np.random.default_rng(1).permutation(24)
    mixed = line(images[order], [prompts[i] for i in order])
    np.testing.assert_array_equal(mixed.value["soft"], whole.value["soft"][order])
    for i in range(6):
        alone = line(images[i : i + 1], prompts[i : i + 1])
        assert alone.notes is not None and whole.notes is not None and alone.notes[0] == whole.notes[i]


@needs_it
def test_failures_are_nan_with_a_reason(tmp_path: Path) -> None:
    line = tesseract.make()
    scores = line(np.zeros((2, 0, 64, 3), np.uint8), [Prompt('say "A"')] * 2)
    assert np.isnan(scores.value["soft"]).all() and set(scores.reasons) == {0, 1}
    # One unreadable file stops the program's run over the list; the others are read all the same.
    files = {row: tmp_path / f"{row}.png" for row in range(3)}
    for row, word in enumerate(("ONE", "TWO", "SIX")):
        line._write(draw_word(word), files[row])
    files[1].write_bytes(b"no picture")
    read = line._read(files, tmp_path)
    assert (read[0], read[2]) == ("ONE", "SIX") and isinstance(read[1], RuntimeError)


@needs_it
def test_mismatched_lengths_and_unknown_variants() -> None:
    with pytest.raises(ValueError, match="images but"):
        tesseract.make()(np.zeros((2, 32, 64, 3), np.uint8), [Prompt('say "A"')])
    assert tesseract.make()(np.zeros((0, 32, 64, 3), np.uint8), []).value["exact"].shape == (0,)
    with pytest.raises(UserError, match="line, page"):
        tesseract.make("word")


def test_without_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not tesseract.available()
    with pytest.raises(Missing, match="apt-get install tesseract-ocr"):
        tesseract.make()


@needs_it
def test_without_its_language(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TESSDATA_PREFIX", str(tmp_path))
    assert not tesseract.available()
    with pytest.raises(Missing, match="English data"):
        tesseract.make()

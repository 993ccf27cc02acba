"""The training scorer on real renders, with its real engine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpobench.bench.assets import drawings
from gpobench.bench.assets.drawing_prompts import two_word_prompts, word_prompts
from gpobench.bench.assets.glyphs import INKS, PAPERS, draw_word
from gpobench.bench.errors import Missing, UserError
from gpobench.bench.spec import Prompt
from gpobench.rewards import rapidocr, rules
from gpobench.tasks import ocr


@pytest.fixture(scope="module")
def line() -> rapidocr.RapidOCR:
    return rapidocr.make()


@pytest.fixture(scope="module")
def renders() -> tuple[np.ndarray, list[Prompt]]:
    """100 test words in every paper and ink; every fifth is mirrored, so that not all are read alike."""
    rng = np.random.default_rng(0)
    prompts = list(ocr.OCR().prompts("test", "glyphs"))[:100]
    papers, inks = list(PAPERS.values()), list(INKS.values())
    images = np.stack(
        [
            draw_word(
                p.meta["target"],
                paper=papers[i % 3],
                ink=inks[i // 3 % 3],
                shift=(int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
            )
            for i, p in enumerate(prompts)
        ]
    )
    images[::5] = images[::5, :, ::-1]
    return images, prompts


def test_id_says_rule_engine_weights_and_framing(line: rapidocr.RapidOCR) -> None:
    engine, weights, rule, framing = line.id.split("/")
    assert engine.startswith("rapidocr-3.") and weights.startswith("PP-OCRv6-rec-small@")
    assert rule == rules.RULE and framing == "line-48x80"
    assert (line.name, tuple(line.metrics)) == ("rapidocr", ("soft", "exact"))


def test_self_test_of_both_framings(line: rapidocr.RapidOCR) -> None:
    line.self_test()
    page = rapidocr.make("page")
    page.self_test()
    assert page.id.endswith("page-320-0.5") and "PP-OCRv6-det-small@" in page.id
    blank = page(np.full((1, 128, 128, 3), 255, np.uint8), [Prompt('say "A"')])
    assert blank.value["soft"][0] == 0 and not blank.reasons  # nothing found is an answer, not a failure


def test_clean_renders_are_read(line: rapidocr.RapidOCR, renders: tuple[np.ndarray, list[Prompt]]) -> None:
    images, prompts = renders
    clean = [i for i in range(len(prompts)) if i % 5]
    scores = line(images[clean], [prompts[i] for i in clean])
    assert np.mean(scores.value["exact"]) >= 0.975
    assert np.mean(scores.value["soft"]) >= np.mean(scores.value["exact"])


def test_a_batch_is_its_pictures_one_by_one_in_any_order(
    line: rapidocr.RapidOCR, renders: tuple[np.ndarray, list[Prompt]]
) -> None:
    images, prompts = renders[0][:40], renders[1][:40]
    whole = line(images, prompts)
    assert len(set(whole.value["soft"])) > 2  # mirrored words are read in part: there is something to compare
    singly = [line(images[i : i + 1], prompts[i : i + 1]) for i in range(40)]
    for metric in line.metrics:
        np.testing.assert_array_equal(whole.value[metric], [s.value[metric][0] for s in singly])
    assert whole.notes == [s.notes[0] for s in singly if s.notes]
    order = np.random.default_rng(1).permutation(40)
    mixed = line(images[order], [prompts[i] for i in order])
    np.testing.assert_array_equal(mixed.value["soft"], whole.value["soft"][order])


def test_the_recogniser_sees_batches_of_one_size_in_which_rows_do_not_depend_on_each_other(
    line: rapidocr.RapidOCR, renders: tuple[np.ndarray, list[Prompt]]
) -> None:
    """The probabilities, not only the texts: bit by bit the same beside any neighbours, at any place, and beside padding."""
    session, seen = line._engine.text_rec.session, []
    run = type(session).__call__

    def listen(self: object, batch: np.ndarray) -> np.ndarray:
        seen.append((batch, run(self, batch)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(session), "__call__", listen)
        for rows in (range(24), range(23, -1, -1), [5], [3, 5, 7]):
            line(renders[0][list(rows)], [renders[1][i] for i in rows])
    assert {len(batch) for batch, _ in seen} == {rapidocr.BATCH}
    by_picture: dict[bytes, list[np.ndarray]] = {}
    for batch, out in seen:
        for picture, row in zip(batch, out, strict=True):
            by_picture.setdefault(picture.tobytes(), []).append(row)
    repeated = [rows for rows in by_picture.values() if len(rows) > 1]
    assert len(repeated) >= 24
    for rows in repeated:
        for row in rows[1:]:
            np.testing.assert_array_equal(row, rows[0])


def test_one_picture_that_fails_costs_its_own_row_of_a_batch(
    line: rapidocr.RapidOCR, renders: tuple[np.ndarray, list[Prompt]]
) -> None:
    images, prompts = renders[0][:12], renders[1][:12]
    recognise, bad = line._engine.recognize_txt, []

    def failing(pictures: list[np.ndarray]) -> object:
        if not bad:
            bad.append(pictures[2])
        if any(np.array_equal(picture, bad[0]) for picture in pictures):
            raise RuntimeError("cannot read this one")
        return recognise(pictures)

    try:
        line._engine.recognize_txt = failing
        scores = line(images, prompts)
    finally:
        del line._engine.recognize_txt
    assert scores.reasons == {2: "RuntimeError: cannot read this one"}
    sound = [row for row in range(12) if row != 2]
    np.testing.assert_array_equal(scores.value["soft"][sound], line(images, prompts).value["soft"][sound])


def test_threads_agree(line: rapidocr.RapidOCR, renders: tuple[np.ndarray, list[Prompt]]) -> None:
    images, prompts = renders[0][:24], renders[1][:24]
    whole = line(images, prompts)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: line(images[i : i + 6], prompts[i : i + 6]), range(0, 24, 6)))
    np.testing.assert_array_equal(np.concatenate([p.value["soft"] for p in parts]), whole.value["soft"])


def test_colour_order_is_rgb(line: rapidocr.RapidOCR) -> None:
    """Red ink on blue of the same luminance as BGR would see it: the engine gets the channels its weights expect."""
    seen: list[np.ndarray] = []
    recognise = line._engine.recognize_txt  # the real one, listened to
    try:
        line._engine.recognize_txt = lambda pictures: (seen.extend(pictures), recognise(pictures))[1]
        line(draw_word("RED", ink=(200, 30, 10))[None], [Prompt('say "RED"')])
    finally:
        del line._engine.recognize_txt
    assert len(seen) == rapidocr.BATCH
    darkest = seen[0].reshape(-1, 3)[seen[0].reshape(-1, 3).sum(1).argmin()]
    assert darkest[2] > darkest[1] > darkest[0] and seen[0].shape == (48, 80, 3)


def test_a_picture_the_engine_cannot_take_is_nan_with_a_reason() -> None:
    for variant in ("line", "page"):
        scorer = rapidocr.make(variant)
        scores = scorer(np.zeros((2, 0, 64, 3), np.uint8), [Prompt('say "A"')] * 2)
        assert np.isnan(scores.value["soft"]).all() and np.isnan(scores.value["exact"]).all()
        assert set(scores.reasons) == {0, 1} and all(scores.reasons.values())


def test_mismatched_lengths_raise(line: rapidocr.RapidOCR) -> None:
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        line(np.zeros((2, 32, 64, 3), np.uint8), [Prompt('say "A"')])
    empty = line(np.zeros((0, 32, 64, 3), np.uint8), [])
    assert empty.value["soft"].shape == (0,)


def test_lines_reads_one_word_or_two_with_a_space_between_them() -> None:
    """Nineteen images with 1 or 2 lines each, so that batches of lines end inside an image; one is blank."""
    rng, scorer = np.random.default_rng(0), rapidocr.make("lines")
    prompts = [p for pair in zip(word_prompts("test")[:9], two_word_prompts("test")[:9], strict=True) for p in pair]
    texts = [drawings.Text(tuple(p.target.split()), "blue", "cream") for p in prompts]
    images = np.stack([drawings.draw(text, rng) for text in texts] + [np.full((32, 64, 3), 250, np.uint8)])
    asked = [Prompt(p.text, {"target": p.target}) for p in prompts] + [Prompt('a "X"', {"target": "X"})]
    scores = scorer(images, asked)
    assert scores.notes and scores.notes[-1] == "" and scores.value["soft"][-1] == 0
    read = [note.upper() == p.target for note, p in zip(scores.notes, prompts, strict=False)]
    assert np.mean(read) >= 0.85 and scores.value["exact"][:-1].tolist() == [float(hit) for hit in read]
    assert [scorer.read(image) for image in images[:4]] == list(scores.notes[:4])


def test_unknown_variant() -> None:
    with pytest.raises(UserError, match="line, lines, page"):
        rapidocr.make("word")


def test_silent(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        rapidocr.make("page")(np.full((1, 64, 64, 3), 255, np.uint8), [Prompt('say "A"')])
    out = capfd.readouterr()
    assert out.out == "" and out.err == "" and not caplog.records


def test_without_the_engine_it_says_what_to_install() -> None:
    """In an interpreter that finds no engine: a finder that refuses the wheel's name stands in front of all others."""
    code = """
import importlib.abc, importlib.util, sys
from gpobench.bench.errors import Missing
from gpobench.rewards import rapidocr
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "rapidocr" else real(name, *rest)
try:
    rapidocr.make()
except Missing as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert "pip install" in done.stdout and "rapidocr" in done.stdout


def test_without_its_weights_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rapidocr, "RECOGNISER", "PP-OCRv9_rec_small.onnx")
    with pytest.raises(Missing, match=r"does not carry PP-OCRv9_rec_small\.onnx"):
        rapidocr.make()

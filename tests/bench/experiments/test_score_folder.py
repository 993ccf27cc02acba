"""Folders of images in every layout, scored by real scorers: one table, however often scoring was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gpobench.bench.assets.glyphs import draw_word
from gpobench.bench.errors import UserError
from gpobench.bench.experiments import score_folder as scoring
from gpobench.bench.experiments.image_folder import read_image_folder
from gpobench.bench.experiments.score_folder import COLUMNS, FolderRequest, Interrupted
from gpobench.bench.scoring import scorers as doors
from gpobench.bench.spec import Prompt
from gpobench.bench.stats.intervals import mean_ci

WORDS = ("ACT", "BOX", "JUDGE", "SILK", "FROWN", "VEST", "TWO", "CHALK", "QUIZ", "JAZZ", "MOTH", "LYNX")


def prompt(word: str) -> str:
    return f'a sign that says "{word}"'


def draw(path: Path, word: str, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_word(word)).save(path, **more)


def score_folder(
    folder: Path,
    scorers: Sequence[str],
    *,
    progress: Any = None,
    fresh: bool = False,
    interrupted: Any = None,
    **more: Any,
) -> dict[str, Any]:
    stop = interrupted or (lambda: False)
    request = FolderRequest(folder, scorers, **more)
    return scoring.score_folder(request, progress=progress, fresh=fresh, interrupted=stop)


def scored(out: Path) -> pd.DataFrame:
    return pd.read_csv(out, keep_default_na=False) if out.suffix == ".csv" else pd.read_parquet(out)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


@pytest.fixture
def listed(folder: Path) -> Path:
    """12 drawings of words, and a table that asks for them; every third asks for its word spelled backwards."""
    lines = ["file,prompt"]
    for i, word in enumerate(WORDS):
        draw(folder / f"{i}.png", word)
        asked = word[::-1] if i % 3 == 2 else word
        lines.append(f'{i}.png,"{prompt(asked)}"'.replace(f'"{asked}"', f'""{asked}""'))
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


# Layouts


def geneval(folder: Path) -> None:
    for i, word in enumerate(WORDS[:3]):
        run_dir = folder / f"{i:05}"
        for k in (0, 1, 10, 2):
            draw(run_dir / "samples" / f"{k}.png", word)
        draw(run_dir / "samples" / "grid.png", word)
        (run_dir / "metadata.jsonl").write_text(json.dumps({"tag": f"tag {i % 2}", "prompt": prompt(word)}), "utf-8")
    draw(folder / "00000b" / "samples" / "0.png", "MOTH")


def test_geneval_visits_digits_only(folder: Path) -> None:
    geneval(folder)
    found = read_image_folder(folder)
    assert [pair.file for pair in found.images[:4]] == [f"00000/samples/{k}.png" for k in (0, 1, 2, 10)]
    assert len(found.images) == 12 and found.layout == "geneval"
    assert [pair.prompt.stratum for pair in found.images[::4]] == ["tag 0", "tag 1", "tag 0"]
    assert found.images[4].prompt == Prompt(prompt("BOX"), {"tag": "tag 1"}, stratum="tag 1")
    assert "4 images belong to no prompt" in found.notes[0]
    (folder / "00001" / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="00001/metadata.jsonl"):
        read_image_folder(folder)
    (folder / "00001" / "metadata.jsonl").write_text("\n", "utf-8")
    with pytest.raises(UserError, match="holds 0 prompts, not one"):
        read_image_folder(folder)
    shutil.rmtree(folder / "00001")
    shutil.rmtree(folder / "00002" / "samples")
    with pytest.raises(UserError, match="00002/samples holds no image"):
        read_image_folder(folder)


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["file", "file_name", "image", "path"])
def test_a_table_in_any_form_and_any_order(folder: Path, form: str, column: str) -> None:
    for i, word in enumerate(WORDS[:4]):
        draw(folder / "deep" / f"{i}.png", word)
    draw(folder / "extra.png", "LYNX")
    rows = [{column: f"deep/{i}.png", "prompt": prompt(w), "target": w} for i, w in enumerate(WORDS[:4])]
    for order in (rows, rows[::-1]):
        frame, path = pd.DataFrame(order), folder / f"table.{form}"
        if form == "parquet":
            frame.to_parquet(path)
        elif form == "jsonl":
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_csv(path, index=False, sep="," if form == "csv" else "\t")
        for found in (read_image_folder(folder), read_image_folder(folder, prompts=path)):
            assert [(p.file, p.prompt) for p in found.images] == [
                (f"deep/{i}.png", Prompt(prompt(w), {"target": w})) for i, w in enumerate(WORDS[:4])
            ]
            assert found.notes == ["1 images belong to no prompt and were left out: extra.png"]


def test_a_table_that_does_not_fit_its_folder(folder: Path) -> None:
    draw(folder / "0.png", "ACT")
    table = folder / "table.csv"
    for text, said in (
        ("file,prompt\n0.png,a\n1.png,b\n", "names 1 images that are not in .*: 1.png"),
        ("file,prompt\n0.png,a\n,b\n", "line 3: no image file is named"),
        ("file,prompt\n0.png,a\n0.png,a\n", "0.png twice with one prompt"),
        ("file,title\n0.png,a\n", "line 2: there is no prompt"),
    ):
        table.write_text(text, "utf-8")
        with pytest.raises(UserError, match=said):
            read_image_folder(folder)
    table.write_text("file,prompt\n0.png,a\n", "utf-8")
    (folder / "other.jsonl").write_text('{"file": "0.png", "prompt": "b"}', "utf-8")
    with pytest.raises(UserError, match="several tables: other.jsonl, table.csv"):
        read_image_folder(folder)


def test_a_text_beside_every_image(folder: Path) -> None:
    for i, word in enumerate(WORDS[:3]):
        draw(folder / f"{i}.png", word)
        (folder / f"{i}.txt").write_text(prompt(word) + "\n", "utf-8")
    assert [p.prompt.text for p in read_image_folder(folder).images] == [prompt(word) for word in WORDS[:3]]
    (folder / "1.txt").unlink()
    with pytest.raises(UserError, match="1 of 3 images have no .txt beside them: 1.png"):
        read_image_folder(folder)


def test_as_many_prompts_as_images_in_the_order_of_the_names(folder: Path, tmp_path: Path) -> None:
    for i, word in enumerate(WORDS):
        draw(folder / f"{i}.png", word)  # 10 and 11 come behind 9
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(map(prompt, WORDS)), "utf-8")
    assert [(p.file, p.prompt.text) for p in read_image_folder(folder, prompts=path).images] == [
        (f"{i}.png", prompt(word)) for i, word in enumerate(WORDS)
    ]
    path.write_text("a cat\n" * 5, "utf-8")
    with pytest.raises(UserError, match="holds 5 prompts and .* 12 images"):
        read_image_folder(folder, prompts=path)
    with pytest.raises(UserError, match=r"ends in \.txt"):
        read_image_folder(folder, prompts=tmp_path / "prompts.docx")


def benchmark(folder: Path, prompts: Path) -> None:
    prompts.mkdir()
    for style, words in (("anime", WORDS[:3]), ("photo", WORDS[3:6])):
        (prompts / f"{style}.json").write_text(json.dumps([prompt(word) for word in words]), "utf-8")
        for i, word in enumerate(words):
            draw(folder / style / f"{i:05}.{'jpg' if i else 'png'}", word)


def test_the_layout_of_hpsv2(folder: Path, tmp_path: Path) -> None:
    benchmark(folder, tmp_path / "lists")
    found = read_image_folder(folder, prompts=tmp_path / "lists")
    assert [(p.file, p.prompt.text, p.prompt.stratum) for p in found.images][2:4] == [
        ("anime/00002.jpg", prompt("JUDGE"), "anime"), ("photo/00000.png", prompt("SILK"), "photo"),
    ]  # fmt: skip
    (tmp_path / "lists" / "drawbench.json").write_text('["a"]', "utf-8")
    assert read_image_folder(folder, prompts=tmp_path / "lists").notes == ["no images of: drawbench"]
    draw(folder / "anime" / "00001.png", "ACT")
    with pytest.raises(UserError, match="anime: 4 images for 3 prompts"):
        read_image_folder(folder, prompts=tmp_path / "lists")
    (folder / "anime" / "00001.png").unlink()
    (folder / "anime" / "00001.jpg").unlink()
    with pytest.raises(UserError, match="anime: 2 images for 3 prompts; the first that is missing is 00001"):
        read_image_folder(folder, prompts=tmp_path / "lists")


def test_the_layout_of_hpsv2_with_the_tasks_prompts(folder: Path) -> None:
    from gpobench.tasks.hpsv2 import HPSv2

    test = HPSv2().prompts("test", "glyphs")
    counts = dict.fromkeys([p.stratum for p in test], 0)
    for p in test:
        draw(folder / p.stratum / f"{counts[p.stratum]:05}.png", "ACT")
        counts[p.stratum] += 1
    found = read_image_folder(folder, task=HPSv2(), domain="glyphs")
    shapes = [p for p in test if p.stratum == "shape"]
    assert [pair.prompt for pair in found.images[: len(shapes)]] == shapes and len(found.images) == len(test)
    shutil.rmtree(folder / "word")
    with pytest.raises(UserError, match="word: 0 images for 45 prompts"):
        read_image_folder(folder, task=HPSv2(), domain="glyphs")


def test_folders_without_images_or_prompts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no images"):
        read_image_folder(folder)
    with pytest.raises(UserError, match="no such folder"):
        read_image_folder(tmp_path / "none")
    draw(folder / ".hidden" / "0.png", "ACT")
    with pytest.raises(UserError, match="there are no images"):
        read_image_folder(folder)
    draw(folder / "0.png", "ACT")
    with pytest.raises(UserError, match="the 1 images in .* have no prompts"):
        read_image_folder(folder)


# Scores


def test_the_scores_are_the_scorers(listed: Path, tmp_path: Path) -> None:
    done = score_folder(listed, ["reader", "rapidocr"], task="ocr", out=tmp_path / "s.parquet", rows=5)
    table = scored(tmp_path / "s.parquet")
    assert tuple(table.columns) == COLUMNS and len(table) == 4 * 12
    images = np.stack([draw_word(word) for word in WORDS])
    asked = [Prompt(prompt(word[::-1] if i % 3 == 2 else word)) for i, word in enumerate(WORDS)]
    for name in ("reader", "rapidocr"):
        scorer = doors.open_scorer(name)
        direct = scorer(images, asked)
        for metric in scorer.metrics:
            rows = table[(table.scorer == name) & (table.metric == metric)]
            np.testing.assert_array_equal(rows.value, direct.value[metric])
            assert list(rows.note) == list(direct.notes or ()) and set(rows.scorer_id) == {scorer.id}
            assert list(rows.file) == [f"{i}.png" for i in range(12)]
            estimate = mean_ci(direct.value[metric])
            assert done["scores"][f"{name}/{metric}"] == {
                "mean": estimate.mean, "ci": [estimate.low, estimate.high], "n": 12, "images": 12, "failed": 0,
            }  # fmt: skip
    assert 0 < done["scores"]["reader/exact"]["mean"] < 1
    assert (done["images"], done["prompts"], done["failed"], done["invalid"], done["notes"]) == (12, 12, 0, False, [])
    assert not (tmp_path / "s.parquet.partial").exists() and done["path"] == str(tmp_path / "s.parquet")


def test_csv_and_parquet_hold_the_same(listed: Path, tmp_path: Path, redness: str) -> None:
    for suffix in ("csv", "parquet"):
        score_folder(listed, [f"{redness}:Redness", "reader"], out=tmp_path / f"s.{suffix}")
    one, two = scored(tmp_path / "s.csv"), scored(tmp_path / "s.parquet")
    pd.testing.assert_frame_equal(one.astype({"value": float}), two, check_dtype=False, check_exact=True)


def test_images_of_a_prompt_are_a_cluster_and_strata_weigh_the_same(folder: Path, tmp_path: Path) -> None:
    geneval(folder)
    draw(folder / "00002" / "samples" / "0.png", "ACT")  # asked for JUDGE
    for task in ("ocr", None):
        number = score_folder(folder, ["reader"], task=task, out=tmp_path / "s.csv")["scores"]["reader/exact"]
        assert (number["n"], number["images"]) == (3, 12)
        assert number["mean"] == pytest.approx(((1 + 0.75) / 2 + 1) / 2)  # of the means of tag 0 and tag 1


def test_sizes_are_batched_apart_and_change_nothing(listed: Path, tmp_path: Path, redness: str) -> None:
    red = f"{redness}:Redness"
    score_folder(listed, [red], out=tmp_path / "a.csv", rows=1)
    for i in (1, 4, 5):
        with Image.open(listed / f"{i}.png") as image:
            image.resize((128, 64), Image.Resampling.NEAREST).save(listed / f"{i}.png")
    score_folder(listed, [red], out=tmp_path / "b.csv", rows=4)
    np.testing.assert_allclose(scored(tmp_path / "a.csv").value, scored(tmp_path / "b.csv").value, atol=1e-12)


def test_files_that_are_no_images_are_rows_without_a_score(listed: Path, tmp_path: Path) -> None:
    whole = (listed / "3.png").read_bytes()
    (listed / "3.png").write_bytes(whole[: len(whole) // 2])
    (listed / "5.png").write_text("I am a picture", "utf-8")
    (listed / "6.png").write_bytes(b"")
    Image.fromarray(np.zeros((32, 64), np.uint16)).save(listed / "7.png")
    (listed / "8.png").write_bytes(whole[:20])
    done = score_folder(listed, ["reader"], out=tmp_path / "s.parquet", rows=3)
    table = scored(tmp_path / "s.parquet")
    failed = table[table.value.isna()]
    assert sorted(set(failed.file)) == [f"{i}.png" for i in (3, 5, 6, 7, 8)] and all(failed.reason)
    assert not any("0x" in reason for reason in failed.reason)  # an address in memory would be another one next time
    assert "truncated" in table[table.file == "3.png"].reason.iloc[0]
    assert table[table.file == "5.png"].reason.iloc[0] == "this is no image"
    assert "8 bits" in table[table.file == "7.png"].reason.iloc[0]
    assert (done["failed"], done["invalid"], done["scores"]["reader/soft"]["failed"]) == (5, True, 5)
    assert sum(done["reasons"].values()) == 5
    (fine,) = {row.value for row in table[(table.file == "0.png") & (table.metric == "exact")].itertuples()}
    assert fine == 1


def test_no_image_has_one_reason_where_pillow_tries_a_format_that_is_not_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ultralytics does when it is imported."""
    opens = Image.open

    def taught(*args: Any, **more: Any) -> Any:
        try:
            return opens(*args, **more)
        except Exception:
            raise ModuleNotFoundError("No module named 'pi_heif'")  # noqa: B904

    monkeypatch.setattr(Image, "open", taught)
    draw(folder / "0.png", "ACT")
    (folder / "0.txt").write_text(prompt("ACT"), "utf-8")
    (folder / "1.png").write_text("I am a picture", "utf-8")
    (folder / "1.txt").write_text(prompt("ACT"), "utf-8")
    score_folder(folder, ["reader"], out=tmp_path / "s.parquet")
    table = scored(tmp_path / "s.parquet")
    assert set(table[table.file == "1.png"].reason) == {"this is no image"} and set(
        table[table.file == "0.png"].reason
    ) == {""}


def test_jpeg_is_scored_with_a_note(folder: Path, tmp_path: Path) -> None:
    draw(folder / "0.jpg", "ACT", quality=90)
    (folder / "0.txt").write_text(prompt("ACT"), "utf-8")
    assert scoring.JPEG in score_folder(folder, ["reader"], out=tmp_path / "s.csv")["notes"]


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_an_image_is_scored_as_it_is_shown(folder: Path, tmp_path: Path, orientation: int) -> None:
    """Cameras store an image as the sensor lay and its orientation in EXIF."""
    upright = Image.fromarray(draw_word("ACT"))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(back).save(folder / "0.png", exif=exif)
    upright.save(folder / "1.png")
    for i in range(2):
        (folder / f"{i}.txt").write_text(prompt("ACT"), "utf-8")
    score_folder(folder, ["reader"], out=tmp_path / "s.parquet")
    table = scored(tmp_path / "s.parquet").set_index(["metric", "file"]).value
    assert all(table[metric, "0.png"] == table[metric, "1.png"] == 1 for metric in ("exact", "soft"))


def test_a_prompt_the_scorer_refuses_stops_it(listed: Path, tmp_path: Path) -> None:
    (listed / "prompts.csv").write_text("file,prompt\n0.png,a cat\n", "utf-8")
    with pytest.raises(UserError, match="reader: an OCR prompt holds its target .*'a cat'"):
        score_folder(listed, ["reader"], out=tmp_path / "s.csv")
    with pytest.raises(UserError, match="prompts.csv, line 2: an OCR prompt needs the text"):
        score_folder(listed, ["reader"], task="ocr", out=tmp_path / "s.csv")
    (listed / "prompts.csv").write_text("file,prompt,target\n0.png,a cat,ACT\n", "utf-8")
    done = score_folder(listed, ["reader"], task="ocr", out=tmp_path / "s.csv")
    assert done["scores"]["reader/exact"]["mean"] == 1


def test_what_makes_no_sense(listed: Path, tmp_path: Path, redness: str) -> None:
    for more, said in (
        ({"scorers": []}, "at least one --scorer"),
        ({"rows": 0}, "--rows must be at least 1"),
        ({"out": tmp_path / "s.xlsx"}, "a .parquet or a .csv"),
        ({"scorers": ["raeder"]}, "did you mean 'reader'"),
        ({"scorers": ["reader", "reader"]}, "two scorers are called reader"),
        ({"task": "orc"}, "did you mean 'ocr'"),
    ):
        with pytest.raises(UserError, match=said):
            score_folder(listed, **{"scorers": ["reader"], "out": tmp_path / "s.csv", **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["Raises", "ReturnsNone", "WrongShape", "WrongCount"])
def test_a_scorer_that_fails_costs_its_scores_and_nothing_else(
    listed: Path, tmp_path: Path, redness: str, kind: str
) -> None:
    done = score_folder(listed, [f"{redness}:{kind}"], out=tmp_path / "s.csv")
    assert done["invalid"] and done["failed"] == 12 and all(scored(tmp_path / "s.csv").reason)


# Going on


class Stop:
    """Asks to stop at the n-th question."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a scorer was given from now on."""
    calls: list[int] = []
    ask = scoring.ask

    def counting(scorer: Any, images: Any, prompts: Sequence[Prompt]) -> Any:
        calls.append(len(images))
        return ask(scorer, images, prompts)

    monkeypatch.setattr(scoring, "ask", counting)
    return calls


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_cut_off_anywhere_it_goes_on_to_the_same_bytes(
    listed: Path, tmp_path: Path, redness: str, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    (listed / "3.png").write_text("no picture", "utf-8")
    names, out, rest = ["reader", f"{redness}:Redness"], tmp_path / f"s.{suffix}", {"task": "ocr", "rows": 4}
    score_folder(listed, names, out=tmp_path / f"whole.{suffix}", **rest)  # type: ignore[arg-type]
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    calls = counted(monkeypatch)
    for point in range(6) if suffix == "csv" else (3,):  # three batches, two scorers
        calls.clear()
        with pytest.raises(Interrupted, match="the same command goes on"):
            score_folder(listed, names, out=out, interrupted=Stop(point), **rest)  # type: ignore[arg-type]
        assert not out.exists()
        score_folder(listed, names, out=out, **rest)  # type: ignore[arg-type]
        assert out.read_bytes() == whole and sum(calls) == 22
        out.unlink()
    for _ in range(5 if suffix == "csv" else 0):  # one batch at every start
        with pytest.raises(Interrupted):
            score_folder(listed, names, out=out, interrupted=Stop(1), **rest)  # type: ignore[arg-type]
    score_folder(listed, names, out=out, **rest)  # type: ignore[arg-type]
    assert out.read_bytes() == whole


def test_killed_outright_it_goes_on(listed: Path, tmp_path: Path, redness: str) -> None:
    names, out = [f"{redness}:Redness"], tmp_path / "s.parquet"
    score_folder(listed, names, out=tmp_path / "whole.parquet", rows=5)

    def die_at_the_second_batch() -> None:
        stop, kill = Stop(1), lambda: bool(signal.raise_signal(signal.SIGKILL))
        score_folder(listed, names, out=out, rows=5, interrupted=lambda: stop() and kill())

    for _ in range(2):  # three batches, one at every start
        pid = os.fork()
        if pid == 0:
            try:
                die_at_the_second_batch()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL and not out.exists()
    score_folder(listed, names, out=out, rows=5)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_killed_while_it_writes_it_goes_on(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "s.csv"
    score_folder(listed, ["reader"], out=out, rows=4)
    whole = out.read_bytes()
    out.unlink()

    class Killed(BaseException):
        pass

    def torn(path: Path, write: Callable[[Path], object]) -> None:
        write(path.with_name(f".{path.name}.tmp"))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "write_atomically", torn)
        with pytest.raises(Killed):
            score_folder(listed, ["reader"], out=out, rows=4)
    with pytest.raises(Interrupted):
        score_folder(listed, ["reader"], out=out, rows=4, interrupted=Stop(1))
    (part,) = (tmp_path / "s.csv.partial").glob("*.json")
    (tmp_path / "s.csv.partial" / "torn.json").write_text(part.read_text("utf-8")[:40], "utf-8")
    calls = counted(monkeypatch)
    score_folder(listed, ["reader"], out=out, rows=4)
    assert out.read_bytes() == whole and calls == [4, 4]


def test_what_changed_is_scored_anew(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "s.csv", counted(monkeypatch)
    with pytest.raises(Interrupted):
        score_folder(listed, ["reader"], out=out, rows=4, interrupted=Stop(2))
    draw(listed / "1.png", "LYNX")
    table = (listed / "prompts.csv").read_text("utf-8")
    (listed / "prompts.csv").write_text(table.replace('5.png,"a sign', '5.png,"a card'), "utf-8")
    calls.clear()
    score_folder(listed, ["reader"], out=out, rows=4)
    assert calls == [4, 4, 4]
    changed = out.read_bytes()
    score_folder(listed, ["reader"], out=out, rows=4)
    assert out.read_bytes() == changed
    assert scored(out).set_index(["file", "metric"]).value[("1.png", "exact")] in (0, "0.0")


def test_fresh_forgets(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    with pytest.raises(Interrupted):
        score_folder(listed, ["reader"], out=tmp_path / "s.csv", rows=4, interrupted=Stop(2))
    score_folder(listed, ["reader"], out=tmp_path / "s.csv", rows=4, fresh=True)
    assert calls == [4, 4, 4, 4, 4]


def test_a_table_written_into_the_folder_is_not_taken_for_prompts(listed: Path) -> None:
    first = score_folder(listed, ["reader"], out=listed / "scores.csv")
    again = score_folder(listed, ["reader"], out=listed / "more.csv")
    assert first["scores"] == again["scores"]
    assert (listed / "scores.csv").read_bytes() == (listed / "more.csv").read_bytes()


def test_progress_reaches_its_end(listed: Path, tmp_path: Path) -> None:
    class Bar:
        total = done = 0.0

        def message(self, text: str) -> None: ...
        def phase(self, name: str, total: float) -> None:
            self.total = total

        def advance(self, by: float) -> None:
            self.done += by

        def status(self, fraction: float, numbers: Any) -> None: ...

    (listed / "3.png").write_text("no picture", "utf-8")
    bar = Bar()
    score_folder(listed, ["reader"], out=tmp_path / "s.csv", progress=bar, rows=5)
    assert bar.done == bar.total == 12


def test_the_tasks_own_numbers(listed: Path, tmp_path: Path) -> None:
    (tmp_path / "sums.py").write_text(
        "from gpobench.bench.spec import Prompt\n"
        "class Sums:\n"
        "    name, version = 'sums', '1'\n"
        "    def read(self, text, facts, domain): return Prompt(text, facts, stratum='all')\n"
        "    def summary(self, table):\n"
        "        assert {'prompt', 'ordinal', 'text', 'stratum', 'scorer', 'metric', 'value'} <= set(table.columns)\n"
        "        return {'best': float(table.value.max()), 'prompts': float(table.prompt.nunique())}\n",
        "utf-8",
    )
    done = score_folder(listed, ["reader"], task=f"{tmp_path / 'sums.py'}:Sums", out=tmp_path / "s.csv")
    assert done["summary"] == {"best": 1.0, "prompts": float(done["prompts"])}
    assert set(scored(tmp_path / "s.csv").stratum) == {"all"}

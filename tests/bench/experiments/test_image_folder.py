"""Folders of images as people leave them: every picture is matched or named, by whatever name a table gives it."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gpobench.bench.errors import UserError
from gpobench.bench.experiments.image_folder import ImageFolder, read_image_folder
from gpobench.bench.experiments.score_folder import FolderRequest, score_folder
from gpobench.tasks.ocr import OCR


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def draw(path: Path, grey: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(path)


def matched(image_folder: ImageFolder) -> list[tuple[str, str]]:
    return [(image.file, image.prompt.text) for image in image_folder.images]


# Nothing vanishes


def test_pictures_of_every_kind_that_is_read_are_matched(folder: Path) -> None:
    names = ["a.png", "b.bmp", "c.gif", "d.tiff", "e.avif", "f.JPG", "g.jfif", "h.webp"]
    for name in names:
        draw(folder / name)
        (folder / name).with_suffix(".txt").write_text(name)
    image_folder = read_image_folder(folder)
    assert matched(image_folder) == [(name, name) for name in names] and image_folder.notes == []


def test_what_is_not_read_is_named(folder: Path) -> None:
    draw(folder / "a.png")
    for name, text in (("a.txt", "a cat"), ("b.heic", "x"), ("b.txt", "a dog"), ("deep/c.caption", "a fox")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "gone").symlink_to("nowhere")
    image_folder = read_image_folder(folder)
    assert matched(image_folder) == [("a.png", "a cat")]
    assert image_folder.notes == [
        "2 prompts have no picture that is read beside them: b.txt, deep/c.caption",
        "1 pictures of a kind that is not read (.heic) were left out: b.heic",
        "1 links lead nowhere: gone",
    ]


def test_a_picture_that_is_not_read_but_named_by_a_table_is_a_row_without_a_score(
    folder: Path, tmp_path: Path, redness: str
) -> None:
    draw(folder / "a.png")
    (folder / "b.heic").write_bytes(b"x")
    (folder / "t.csv").write_text("file,prompt\na.png,a cat\nb.heic,a dog\n")
    done = score_folder(FolderRequest(folder, [f"{redness}:Redness"], out=tmp_path / "s.csv"))
    assert (done["images"], done["failed"], done["reasons"]) == (2, 1, {"this is no image": 1})
    assert done["notes"] == ["1 files could not be opened as images"]


def test_a_folder_of_pictures_that_are_not_read_says_which(folder: Path) -> None:
    (folder / "b.heic").write_text("x")
    with pytest.raises(UserError, match=r"there are no images in .*; 1 pictures of a kind that is not read \(\.heic\)"):
        read_image_folder(folder)


def test_linked_folders_are_followed_and_loops_end(folder: Path, tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "elsewhere" / "b.txt").write_text("a dog")
    draw(folder / "deep" / "a.png")
    (folder / "deep" / "a.txt").write_text("a cat")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "self").symlink_to("self")
    image_folder = read_image_folder(folder)
    assert matched(image_folder) == [("deep/a.png", "a cat"), ("linked/b.png", "a dog")]
    assert image_folder.notes == ["1 links lead nowhere: self"]


def test_a_picture_that_is_a_dead_link_or_no_file_is_a_row_without_a_score(
    folder: Path, tmp_path: Path, redness: str
) -> None:
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"picture {name}")
    draw(folder / "a.png")
    (folder / "b.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(folder / "c.png")
    done = score_folder(FolderRequest(folder, [f"{redness}:Redness"], out=tmp_path / "s.csv"))
    assert (done["images"], done["failed"], done["invalid"]) == (3, 2, True)
    assert done["reasons"] == {"the link leads nowhere": 1, "this is no file": 1}


def test_transparent_and_animated_pictures_are_noted(folder: Path, tmp_path: Path, redness: str) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "a.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "red")]
    frames[0].save(folder / "b.gif", save_all=True, append_images=frames[1:])
    (folder / "prompts.csv").write_text("file,prompt\na.png,a cat\nb.gif,a dog\n")
    done = score_folder(FolderRequest(folder, [f"{redness}:Redness"], out=tmp_path / "s.csv"))
    assert [line.split()[0:2] for line in done["notes"]] == [["1", "images"]] * 2
    assert "scored on white" in done["notes"][0] and "of which the first is scored" in done["notes"][1]
    table = pd.read_csv(tmp_path / "s.csv")
    assert table.value[0] == table.value[1]  # both are white


# Names


def test_a_table_may_name_the_folders_pictures_in_any_way(folder: Path, tmp_path: Path) -> None:
    composed, taken_apart = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    for name in ("a.png", "deep/b.png", taken_apart):
        draw(folder / name)
    (tmp_path / "linked").symlink_to(folder)
    for first, second, third in (
        (str(folder / "a.png"), "./deep//b.png", composed),
        (str(tmp_path / "linked" / "a.png"), "deep\\b.png", taken_apart),
        (f"../{folder.name}/a.png", "deep/../deep/b.png", f"./{composed}"),
        ("../linked/deep/../a.png", str(folder / "deep" / "b.png"), composed),
    ):
        rows = pd.DataFrame({"file": [first, second, third], "prompt": ["a cat", "a dog", "a fox"]})
        rows.to_csv(folder / "table.csv", index=False)
        image_folder = read_image_folder(folder)
        assert matched(image_folder) == [("a.png", "a cat"), (taken_apart, "a fox"), ("deep/b.png", "a dog")]
        assert image_folder.notes == []
    rows = pd.DataFrame({"file": ["a.png", str(folder / "a.png")], "prompt": ["a cat"] * 2})
    rows.to_csv(folder / "table.csv", index=False)
    with pytest.raises(UserError, match=r"names a\.png twice with one prompt"):
        read_image_folder(folder)


def test_names_that_are_not_utf_8_are_scored_and_shown_escaped(folder: Path, tmp_path: Path, redness: str) -> None:
    name = os.fsdecode(b"caf\xe9")
    draw(folder / f"{name}.png")
    draw(folder / "left.png")
    for out in ("s.csv", "s.parquet"):
        (folder / "t.jsonl").write_text(json.dumps({"file": f"{name}.png", "prompt": "a cat"}))
        done = score_folder(FolderRequest(folder, [f"{redness}:Redness"], out=tmp_path / out))
        table = pd.read_csv(tmp_path / out) if out.endswith("csv") else pd.read_parquet(tmp_path / out)
        assert list(table.file) == ["caf\\xe9.png"] and done["failed"] == 0
    (folder / "t.jsonl").unlink()
    (folder / "left.txt").write_text("a dog")
    with pytest.raises(UserError, match=r"1 of 2 images have no \.txt beside them: caf\\xe9\.png"):
        read_image_folder(folder)


# Tables


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.csv", "File,Prompt\na.png,a cat\n"),
        ("T.CSV", "image_path,caption\na.png,a cat\n"),
        ("t.csv", "filename;prompt\na.png;a cat\n"),
        ("t.tsv", "Image Path\tText\na.png\ta cat\n"),
        ("t.tsv", "file,prompt\na.png,a cat\n"),
        ("t.json", '[{"image": "a.png", "prompt": "a cat"}]'),
        ("t.ndjson", '{"img_path": "a.png", "text": "a cat"}'),
    ],
)
def test_a_table_is_known_by_its_columns(folder: Path, name: str, content: str) -> None:
    draw(folder / "a.png")
    (folder / name).write_text(content)
    (folder / "config.json").write_text('{"size": [1, 2], "path": "a.png"}')  # JSON that is no table
    assert matched(read_image_folder(folder)) == [("a.png", "a cat")]
    assert matched(read_image_folder(folder, prompts=folder / name)) == [("a.png", "a cat")]


def test_the_metadata_of_folders_for_training_are_one_table(folder: Path) -> None:
    for split, text in (("train", "a cat"), ("test", "a dog")):
        draw(folder / split / "0.png")
        (folder / split / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": text}))
    image_folder = read_image_folder(folder)
    assert matched(image_folder) == [("test/0.png", "a dog"), ("train/0.png", "a cat")] and image_folder.notes == []
    assert matched(read_image_folder(folder / "train")) == [("0.png", "a cat")]


def test_where_no_prompts_are_found_the_way_in_is_named(folder: Path) -> None:
    draw(folder / "a.png")
    (folder / "t.csv").write_text("title,words\na.png,a cat\n")
    (folder / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError) as error:
        read_image_folder(folder)
    assert "t.csv has the columns title, words, of which none names image files (file | " in str(error.value)
    assert "t.xlsx is not read: save the sheet as .csv" in str(error.value) and "\n" not in str(error.value)


# Prompts by id, and captions


def test_prompts_may_be_called_as_their_images(folder: Path, tmp_path: Path) -> None:
    for name in ("p1.png", "p2/0.png", "p2/1.png", "p10_0.png", "p10_1.png", "other.png"):
        draw(folder / name)
    texts = {"p1": "a cat", "p2": "a dog", "p10": "a fox"}
    (tmp_path / "prompts").mkdir()
    for name, text in texts.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    (tmp_path / "by_id.json").write_text(json.dumps({name: {"prompt": text} for name, text in texts.items()}))
    for prompts in (tmp_path / "prompts", tmp_path / "by_id.json"):
        image_folder = read_image_folder(folder, prompts=prompts)
        assert matched(image_folder) == [
            ("p1.png", "a cat"), ("p2/0.png", "a dog"), ("p2/1.png", "a dog"), ("p10_0.png", "a fox"), ("p10_1.png", "a fox"),
        ]  # fmt: skip
        assert image_folder.notes == ["1 images belong to no prompt and were left out: other.png"]
    (folder / "p1.png").unlink()
    with pytest.raises(UserError, match="1 of the 3 prompts in .* have no image called by their name: p1"):
        read_image_folder(folder, prompts=tmp_path / "prompts")


def test_prompts_whose_ids_are_no_names_are_in_the_order_of_the_images(folder: Path, tmp_path: Path) -> None:
    for name in ("x.png", "y.png"):
        draw(folder / name)
    (tmp_path / "by_id.json").write_text('{"1": "a cat", "2": "a dog"}')
    image_folder = read_image_folder(folder, prompts=tmp_path / "by_id.json")
    assert matched(image_folder) == [("x.png", "a cat"), ("y.png", "a dog")] and image_folder.layout == "order of names"


def test_captions_of_either_suffix_serve_and_two_of_one_image_do_not(folder: Path) -> None:
    for name, suffix in (("a", ".caption"), ("b", ".txt")):
        draw(folder / f"{name}.png")
        (folder / f"{name}{suffix}").write_text(f"picture {name}")
    assert matched(read_image_folder(folder)) == [("a.png", "picture a"), ("b.png", "picture b")]
    (folder / "a.txt").write_text("another")
    with pytest.raises(UserError, match="an image has two prompts beside it: a.caption, a.txt"):
        read_image_folder(folder)


def test_a_target_that_is_unclear_is_refused_with_its_line(folder: Path) -> None:
    draw(folder / "a.png")
    (folder / "t.jsonl").write_text(json.dumps({"file": "a.png", "prompt": 'A 12" tall sign that says "HELLO"'}))
    with pytest.raises(UserError, match=r"t\.jsonl, line 1: 3 quotation marks do not pair"):
        read_image_folder(folder, task=OCR(), domain="open")


NAMES = st.sampled_from(["a.png", "./a.png", "b.png", "", "/", "a\0b.png", "\udce9.png", "..", "x" * 300]) | st.text(
    max_size=5
)


@given(names=st.lists(NAMES, min_size=1, max_size=2), key=st.sampled_from(["file", "Image Path", "title"]))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_table_is_matched_or_refused_in_one_line(tmp_path: Path, names: Sequence[str], key: str) -> None:
    folder = tmp_path / "any"
    if not folder.exists():
        draw(folder / "a.png")
    (folder / "t.jsonl").write_text("\n".join(json.dumps({key: name, "prompt": f"a cat {name}"}) for name in names))
    try:
        image_folder = read_image_folder(folder)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len(image_folder.images) == len(names)

"""A folder of images with their prompts: five layouts are understood, those of published evaluations among them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..assets.prompts import READERS, PromptRow, read_prompts, records, row_of, understood
from ..errors import UserError
from ..spec import Prompt, Task

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Names of the column that holds image files; the first that a table has is taken.
FILE_COLUMNS = ("file", "file_name", "image", "path")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class PromptedImage:
    """An image file, relative to the folder, and its prompt."""

    file: str
    prompt: Prompt


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder with their prompts, in the order of the files' names, numbers by their value."""

    layout: str
    images: Sequence[PromptedImage]
    notes: Sequence[str] = ()


def read_image_folder(
    folder: Path,
    *,
    prompts: Path | None = None,
    task: Task | None = None,
    domain: str = "open",
    ignore: Collection[Path] = (),
) -> ImageFolder:
    """Match the images of a folder with their prompts. Layouts are tried in this order; the first that fits is taken.

        with `prompts`, a folder of STYLE.json     HPSv2: STYLE/00000.png (or .jpg), one for each prompt of the style's list
        with `prompts`, a table with image files   a column file (file_name, image, path) and a column prompt; the others are facts
        with `prompts`, any other list             as many prompts as images, in the order of the names
        00000/metadata.jsonl, 00000/samples/0.png  GenEval: folders and images whose names are digits
        a table in the folder                      as above
        image.png, image.txt                       the prompt beside its image
        with `task`, STYLE/00000.png               HPSv2, with the task's test prompts

    Args:
        folder: of the images.
        prompts: a file or folder of prompts, where the folder of images has none.
        task: reads the facts of the prompts.
        domain: of the task's prompts.
        ignore: tables that are no part of the layout.

    Raises:
        UserError: where images and prompts do not match one to one.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    images = sorted((path.relative_to(folder).as_posix() for path in _images(folder)), key=_natural)
    if not images:
        raise UserError(f"there are no images in {folder} ({', '.join(SUFFIXES)})")
    if prompts is not None:
        return _with_prompts(folder, prompts, images, task, domain)
    if geneval := _geneval(folder, images, task, domain):
        return geneval
    if table := _own_table(folder, ignore):
        return _by_table(folder, table, images, task, domain)
    if beside := _beside(folder, images, task, domain):
        return beside
    if by_style := _by_task_style(folder, images, task, domain):
        return by_style
    raise UserError(
        f"the {len(images)} images in {folder} have no prompts: put a table with the columns file and prompt there, a .txt "
        "beside every image, or name --prompts FILE"
    )


def _with_prompts(folder: Path, prompts: Path, images: Sequence[str], task: Task | None, domain: str) -> ImageFolder:
    """The layouts whose prompts lie elsewhere: lists by style, a table, a list in the order of the images."""
    if not prompts.is_dir():
        read_layout = _by_table if _names_files(prompts) else _in_order
        return read_layout(folder, prompts, images, task, domain)
    styles = _lists(prompts, task, domain)
    used = {style: prompts_of_style for style, prompts_of_style in styles.items() if (folder / style).is_dir()}
    matched = _by_style(folder, used or styles, images)
    unused = ", ".join(sorted(styles.keys() - used.keys()))
    return replace(matched, notes=[*matched.notes, f"no images of: {unused}"]) if unused else matched


def _own_table(folder: Path, ignore: Collection[Path]) -> Path | None:
    """The table with image files that lies in the folder. Raises UserError where there are several."""
    ignored = {path.resolve() for path in ignore}
    tables = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in TABLES and path.resolve() not in ignored and _names_files(path)
    ]
    if len(tables) > 1:
        raise UserError(f"{folder} holds several tables: {', '.join(p.name for p in tables)}; name one with --prompts")
    return tables[0] if tables else None


def _by_task_style(folder: Path, images: Sequence[str], task: Task | None, domain: str) -> ImageFolder | None:
    """HPSv2's layout with the test prompts of the task."""
    if task is None or not any(re.fullmatch(r"[^/]+/\d{5}\.(png|jpe?g)", image) for image in images):
        return None
    styles: dict[str, list[Prompt]] = {}
    for prompt in task.prompts("test", domain):
        styles.setdefault(prompt.stratum, []).append(prompt)
    return _by_style(folder, styles, images) if any((folder / style).is_dir() for style in styles if style) else None


def _images(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _natural(name: str) -> tuple[list[int | str], str]:
    """Sort key of names: by letters and by the values of numbers, 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)], name


def _geneval(folder: Path, images: Sequence[str], task: Task | None, domain: str) -> ImageFolder | None:
    """GenEval's layout (djghosh13/geneval at af4902f): it reads folders whose names are digits, and images DIGITS.png."""
    digits = re.compile(r"[0-9]+")
    folders = [path for path in folder.iterdir() if path.is_dir() and digits.fullmatch(path.name)]
    folders.sort(key=lambda path: _natural(path.name))
    if not any((path / "metadata.jsonl").is_file() for path in folders):
        return None
    matched: list[PromptedImage] = []
    for path in folders:
        metadata = path / "metadata.jsonl"
        rows = [row_of(metadata, line, record) for line, record in records(metadata)]
        if len(rows) != 1:
            raise UserError(f"{metadata} holds {len(rows)} prompts, not one")
        (prompt,) = understood(task, metadata, rows, domain)
        prompt = replace(prompt, stratum=prompt.stratum or str(rows[0].facts.get("tag", "")))
        image_names = [name for name in images if re.fullmatch(rf"{path.name}/samples/[0-9]+\.png", name)]
        if not image_names:
            raise UserError(f"{path / 'samples'} holds no image called by a number, 0.png")
        matched += [PromptedImage(name, prompt) for name in image_names]
    return ImageFolder("geneval", matched, _without_prompt(images, matched))


def _by_table(folder: Path, table: Path, images: Sequence[str], task: Task | None, domain: str) -> ImageFolder:
    rows: list[tuple[str, PromptRow]] = []
    for line, record in records(table):
        key = next((name for name in FILE_COLUMNS if name in record), None)
        if key is None or not isinstance(record[key], str) or not record[key]:
            raise UserError(f"{table}, line {line}: no image file is named ({' | '.join(FILE_COLUMNS)})")
        others = {name: value for name, value in record.items() if name != key}
        rows.append((Path(record[key]).as_posix(), row_of(table, line, others)))
    missing = [name for name, _ in rows if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{table} names {len(missing)} images that are not in {folder}: {', '.join(missing[:3])}")
    texts = understood(task, table, [row for _, row in rows], domain)
    matched = [PromptedImage(name, prompt) for (name, _), prompt in zip(rows, texts, strict=True)]
    matched.sort(key=lambda image: (_natural(image.file), image.prompt.text))
    keys = [(image.file, image.prompt.text) for image in matched]
    repeated = [a for a, b in zip(keys, keys[1:]) if a == b]
    if repeated:
        raise UserError(f"{table} names {repeated[0][0]} twice with one prompt")
    return ImageFolder(f"table {table.name}", matched, _without_prompt(images, matched))


def _in_order(folder: Path, prompts: Path, images: Sequence[str], task: Task | None, domain: str) -> ImageFolder:
    rows = read_prompts(prompts, unique=False)  # a prompt may have several images
    if len(rows) != len(images):
        raise UserError(
            f"{prompts} holds {len(rows)} prompts and {folder} {len(images)} images; a prompt an image is needed, or a "
            "table with the columns file and prompt"
        )
    texts = understood(task, prompts, rows, domain)
    return ImageFolder(
        "order of names", [PromptedImage(name, prompt) for name, prompt in zip(images, texts, strict=True)]
    )


def _beside(folder: Path, images: Sequence[str], task: Task | None, domain: str) -> ImageFolder | None:
    texts = {name: (folder / name).with_suffix(".txt") for name in images}
    without = [name for name, path in texts.items() if not path.is_file()]
    if len(without) == len(images):
        return None
    if without:
        raise UserError(f"{len(without)} of {len(images)} images have no .txt beside them: {', '.join(without[:3])}")
    matched: list[PromptedImage] = []
    for name, path in texts.items():
        try:
            text = path.read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        matched += [PromptedImage(name, p) for p in understood(task, path, [row_of(path, 1, {"prompt": text})], domain)]
    return ImageFolder("text beside images", matched)


def _lists(folder: Path, task: Task | None, domain: str) -> dict[str, list[Prompt]]:
    """Style -> its prompts, from a folder of STYLE.json as HPDv2 publishes them: lists of texts."""
    styles: dict[str, list[Prompt]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            texts = json.loads(path.read_text("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no list of prompts: {error}") from None
        if not isinstance(texts, list) or not texts:
            raise UserError(f"{path} is no list of prompts")
        rows = [row_of(path, i, {"prompt": text, "style": path.stem}) for i, text in enumerate(texts, 1)]
        styles[path.stem] = [replace(p, stratum=path.stem) for p in understood(task, path, rows, domain)]
    if not styles:
        raise UserError(f"there is no STYLE.json in {folder}")
    return styles


def _by_style(folder: Path, styles: Mapping[str, Sequence[Prompt]], images: Sequence[str]) -> ImageFolder:
    """HPSv2's layout (tgxs002/HPSv2 at 866735e), which leaves out a missing image without a message; here it is an error."""
    matched: list[PromptedImage] = []
    for style, prompts in sorted(styles.items()):
        image_names = [name for name in images if re.fullmatch(rf"{re.escape(style)}/\d{{5}}\.(png|jpe?g)", name)]
        numbers = [int(Path(name).stem) for name in image_names]
        if numbers != list(range(len(prompts))):
            missing = sorted(set(range(len(prompts))) - set(numbers))
            which = f"; the first that is missing is {missing[0]:05}" if missing else ""
            raise UserError(f"{folder / style}: {len(image_names)} images for {len(prompts)} prompts{which}")
        matched += [PromptedImage(name, prompt) for name, prompt in zip(image_names, prompts, strict=True)]
    return ImageFolder("hpsv2", matched, _without_prompt(images, matched))


def _names_files(path: Path) -> bool:
    """Return whether a table has a column of image files and is no table of scores."""
    if path.suffix.lower() not in TABLES:
        if path.suffix.lower() not in READERS:
            next(records(path))  # raises an error that lists the suffixes
        return False
    _, record = next(records(path), (0, {}))
    return any(name in record for name in FILE_COLUMNS) and "scorer_id" not in record


def _without_prompt(images: Sequence[str], matched: Iterable[PromptedImage]) -> list[str]:
    left = sorted(set(images) - {pair.file for pair in matched}, key=_natural)
    return [f"{len(left)} images belong to no prompt and were left out: {', '.join(left[:3])}"] if left else []

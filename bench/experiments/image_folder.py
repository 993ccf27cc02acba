"""A folder of images with their prompts: the layouts that people and published evaluations use.

Whatever the folder holds is scored or named: linked folders are followed, and pictures that are not read, links that lead nowhere
and prompts without a picture are listed in the notes.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from ..assets.prompts import PromptRow, read_prompts, row_of, understood
from ..assets.record_files import (
    CAPTION_FILES,
    OTHER_FORMATS,
    READERS,
    TEXT,
    Record,
    column,
    natural,
    place,
    read_caption,
    records,
    records_by_id,
    shown,
    style_lists,
)
from ..errors import UserError
from ..files import printable_name
from ..spec import Prompt, Task

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jpe", ".jfif", ".dib")
UNREAD = (
    ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr", ".tga", ".ico", ".ppm",
    ".pgm", ".pnm", ".qoi", ".npy", ".npz",
)  # fmt: skip
# Names of the column that holds image files; the first that a table has is taken.
FILE_COLUMNS = (
    "file", "file_name", "image", "path", "image_path", "image_file", "image_name", "file_path", "img", "img_path", "img_name", "picture",
)  # fmt: skip
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json")
# What a folder of images for training is published with, in each of its folders.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


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
        with `prompts`, a folder of ID.txt         ID.png, ID_0.png or ID/0.png; a file {ID: prompt} in JSON does the same
        with `prompts`, a table with image files   a column file (file_name, image, path ...) and a column prompt; the others are facts
        with `prompts`, any other list             as many prompts as images, in the order of the names
        00000/metadata.jsonl, 00000/samples/0.png  GenEval: folders and images whose names are digits
        a table in the folder                      as above; without one, metadata.jsonl (.csv, .parquet) in its folders
        image.png, image.txt                       the prompt beside its image (or image.caption)
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
    listing = _list(folder)
    if not listing.images:
        raise UserError("; ".join([f"there are no images in {folder} ({', '.join(SUFFIXES)})", *listing.notes()]))
    image_folder = _layout(listing, _Reading(task, domain), prompts, ignore)
    return replace(
        image_folder, notes=[*image_folder.notes, *listing.notes({image.file for image in image_folder.images})]
    )


# What the folder holds


@dataclass(frozen=True)
class _Listing:
    """The files of a folder, relative to it and in the order of their names; what lies below a linked folder too."""

    folder: Path
    images: list[str] = field(default_factory=list[str])
    captions: list[str] = field(default_factory=list[str])  # files of one prompt each, where there are any
    metadata: list[str] = field(default_factory=list[str])  # tables called METADATA
    unread: list[str] = field(default_factory=list[str])  # pictures of a kind that is not read
    dead: list[str] = field(default_factory=list[str])  # links that lead nowhere, but for those called like an image

    def notes(self, matched: Collection[str] = ()) -> list[str]:
        """What is left out, a line for each kind; matched: files that a table names all the same."""
        unread = [name for name in self.unread if name not in matched]
        kinds = ", ".join(sorted({PurePosixPath(name).suffix.lower() for name in unread}))
        return [
            *([_count(unread, f"pictures of a kind that is not read ({kinds}) were left out")] if unread else []),
            *([_count(self.dead, "links lead nowhere")] if self.dead else []),
        ]


def _list(folder: Path) -> _Listing:
    """List a folder. Raises UserError where one of its folders cannot be read."""
    listing = _Listing(folder)
    for name, dead in sorted(_walk(folder), key=lambda entry: natural(entry[0])):
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            listing.images.append(name)  # one that cannot be opened is a row without a score
        elif dead:
            listing.dead.append(name)
        elif suffix in CAPTION_FILES:
            listing.captions.append(name)
        elif suffix in UNREAD:
            listing.unread.append(name)
        elif path.name in METADATA:
            listing.metadata.append(name)
    return listing


def _walk(folder: Path) -> Iterable[tuple[str, bool]]:
    """Yield (file relative to the folder, whether it is a link that leads nowhere); hidden ones are left out, links followed once."""
    start = os.stat(folder)
    pending = [("", frozenset({(start.st_dev, start.st_ino)}))]
    while pending:
        prefix, above = pending.pop()
        try:
            entries = list(os.scandir(folder / prefix))
        except OSError as error:
            raise UserError(f"cannot read the folder {folder / prefix}: {error.strerror or error}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                status = entry.stat()
            except OSError:  # a link to nothing, to itself, or through a folder that may not be entered
                yield prefix + entry.name, True
                continue
            key = (status.st_dev, status.st_ino)
            if not entry.is_dir():
                yield prefix + entry.name, False
            elif key not in above:  # else a link to a folder it lies in
                pending.append((f"{prefix}{entry.name}/", above | {key}))


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}: {', '.join(map(printable_name, names[:3]))}"


class _ImageNames:
    """Finds an image of the folder by the name that a table gives it: other spellings of a path, and of its letters."""

    def __init__(self, listing: _Listing):
        self._folder, self._names = listing.folder, set(listing.images)

    @cached_property
    def _composed(self) -> dict[str, list[str]]:
        """Name in composed letters (NFC) -> the names that are spelled so."""
        names: dict[str, list[str]] = {}
        for name in self._names:
            names.setdefault(unicodedata.normalize("NFC", name), []).append(name)
        return names

    @cached_property
    def _real(self) -> dict[str, str]:
        """Path without links -> name."""
        return {os.path.realpath(self._folder / name): name for name in sorted(self._names, reverse=True)}

    def find(self, file: str, folders: Sequence[Path]) -> str | None:
        """The name of an image file, relative to one of the folders or absolute; None where there is no such file."""
        for folder in folders:
            for spelling in dict.fromkeys((file, file.replace("\\", "/"))):
                if (name := self._find(os.path.join(folder, spelling))) is not None:
                    return name
        return None

    def _find(self, path: str) -> str | None:
        name = Path(os.path.relpath(os.path.normpath(path), self._folder)).as_posix()
        if name in self._names:
            return name
        alike = self._composed.get(unicodedata.normalize("NFC", name), [])
        if len(alike) == 1:
            return alike[0]
        try:
            real = self._real.get(os.path.realpath(path))
            return real or (name if Path(path).is_file() else None)  # a picture elsewhere, or of no known suffix
        except (OSError, ValueError):  # a name that no file can have
            return None


# Layouts


@dataclass(frozen=True)
class _Reading:
    """How prompts are read."""

    task: Task | None
    domain: str

    def prompts(self, path: Path, rows: Sequence[PromptRow]) -> list[Prompt]:
        return understood(self.task, path, rows, self.domain)


def _layout(listing: _Listing, reading: _Reading, prompts: Path | None, ignore: Collection[Path]) -> ImageFolder:
    if prompts is not None:
        return _with_prompts(listing, prompts, reading)
    tables = _own_tables(listing.folder, ignore)
    image_folder = (
        _geneval(listing, reading)
        or (_by_tables(listing, tables, reading) if tables else None)
        or _by_metadata(listing, reading)
        or _beside(listing, reading)
        or _by_task_style(listing, reading)
    )
    if image_folder is None:
        raise UserError(
            f"the {len(listing.images)} images in {listing.folder} have no prompts: put a table with the columns file and prompt there, "
            f"a .txt beside every image, or name --prompts FILE{_hints(listing.folder, ignore)}"
        )
    return image_folder


def _with_prompts(listing: _Listing, prompts: Path, reading: _Reading) -> ImageFolder:
    """The layouts whose prompts lie elsewhere: lists by style, prompts by id, a table, a list in the order of the images."""
    if prompts.is_dir() and style_lists(prompts):
        styles = _lists(prompts, reading)
        used = {style: style_prompts for style, style_prompts in styles.items() if (listing.folder / style).is_dir()}
        matched = _by_style(listing, used or styles)
        unused = shown(sorted(styles.keys() - used.keys()))
        return replace(matched, notes=[*matched.notes, f"no images of: {unused}"]) if unused else matched
    if not prompts.is_dir() and _names_files(prompts):
        return _by_tables(listing, [prompts], reading)
    by_id = records_by_id(prompts)
    owners = [_owner(image, by_id) for image in listing.images]
    if prompts.is_dir() or any(owner is not None for owner in owners):
        return _by_id(listing, prompts, by_id, owners, reading)
    return _in_order(listing, prompts, reading)


def _own_tables(folder: Path, ignore: Collection[Path]) -> list[Path]:
    """The table with image files that lies in the folder. Raises UserError where there are several."""
    tables = [path for path in _candidates(folder, ignore) if path.suffix.lower() in TABLES and _names_files(path)]
    if len(tables) > 1:
        raise UserError(f"{folder} holds several tables: {shown(p.name for p in tables)}; name one with --prompts")
    return tables


def _candidates(folder: Path, ignore: Collection[Path]) -> list[Path]:
    """The files that lie in the folder itself."""
    ignored = {path.resolve() for path in ignore}
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return [path for path in files if path.resolve() not in ignored]


def _hints(folder: Path, ignore: Collection[Path]) -> str:
    """What lies in the folder and could hold its prompts, each with the way in."""
    hints: list[str] = []
    for path in _candidates(folder, ignore):
        suffix = path.suffix.lower()
        if suffix in OTHER_FORMATS:
            hints.append(f"{printable_name(path.name)} is not read: {OTHER_FORMATS[suffix]}")
        elif suffix in TABLES and (names := _first_record(path)) and "scorer_id" not in names:
            hints.append(
                f"{printable_name(path.name)} has the columns {shown(names, 6)}, of which none names image files "
                f"({' | '.join(FILE_COLUMNS[:5])})"
            )
    return "".join(f"; {hint}" for hint in hints[:3])


def _by_task_style(listing: _Listing, reading: _Reading) -> ImageFolder | None:
    """HPSv2's layout with the test prompts of the task."""
    if reading.task is None or not any(re.fullmatch(r"[^/]+/\d{5}\.(png|jpe?g)", image) for image in listing.images):
        return None
    styles: dict[str, list[Prompt]] = {}
    for prompt in reading.task.prompts("test", reading.domain):
        styles.setdefault(prompt.stratum, []).append(prompt)
    return _by_style(listing, styles) if any((listing.folder / style).is_dir() for style in styles if style) else None


def _geneval(listing: _Listing, reading: _Reading) -> ImageFolder | None:
    """GenEval's layout (djghosh13/geneval at af4902f): it reads folders whose names are digits, and images DIGITS.png."""
    digits = re.compile(r"[0-9]+")
    folders = [path for path in listing.folder.iterdir() if path.is_dir() and digits.fullmatch(path.name)]
    folders.sort(key=lambda path: natural(path.name))
    if not any((path / "metadata.jsonl").is_file() for path in folders):
        return None
    matched: list[PromptedImage] = []
    for path in folders:
        metadata = path / "metadata.jsonl"
        rows = [row_of(metadata, line, record) for line, record in records(metadata)]
        if len(rows) != 1:
            raise UserError(f"{metadata} holds {len(rows)} prompts, not one")
        (prompt,) = reading.prompts(metadata, rows)
        prompt = replace(prompt, stratum=prompt.stratum or str(rows[0].facts.get("tag", "")))
        image_names = [name for name in listing.images if re.fullmatch(rf"{path.name}/samples/[0-9]+\.png", name)]
        if not image_names:
            raise UserError(f"{path / 'samples'} holds no image called by a number, 0.png")
        matched += [PromptedImage(name, prompt) for name in image_names]
    return ImageFolder("geneval", matched, _without_prompt(listing, matched))


def _by_metadata(listing: _Listing, reading: _Reading) -> ImageFolder | None:
    """Folders of images for training as `datasets` reads them: train/metadata.jsonl names the images beside it."""
    tables = [listing.folder / name for name in listing.metadata if _names_files(listing.folder / name)]
    return _by_tables(listing, tables, reading) if tables else None


def _by_tables(listing: _Listing, tables: Sequence[Path], reading: _Reading) -> ImageFolder:
    """Tables with a column of image files. One in the folder names them from where it lies, another from the folder."""
    names = _ImageNames(listing)
    matched: list[PromptedImage] = []
    for table in tables:
        inside = listing.folder.resolve() in table.resolve().parents
        folders = (table.parent, listing.folder) if inside else (listing.folder, table.parent)
        rows: list[tuple[str, PromptRow]] = [_row_with_file(table, line, record) for line, record in records(table)]
        located = [names.find(file, folders) for file, _ in rows]
        missing = [file for (file, _), name in zip(rows, located, strict=True) if name is None]
        if missing:
            raise UserError(
                f"{table} names {len(missing)} images that are not in {listing.folder}: {shown(missing, 3)}"
            )
        prompts = reading.prompts(table, [row for _, row in rows])
        matched += [PromptedImage(name or "", prompt) for name, prompt in zip(located, prompts, strict=True)]
    matched.sort(key=lambda image: (natural(image.file), image.prompt.text))
    keys = [(image.file, image.prompt.text) for image in matched]
    which = ", ".join(table.name if table.parent == listing.folder else str(table) for table in tables)
    repeated = [a for a, b in zip(keys, keys[1:]) if a == b]
    if repeated:
        raise UserError(f"{which} names {printable_name(repeated[0][0])} twice with one prompt")
    return ImageFolder(f"table {which}", matched, _without_prompt(listing, matched))


def _row_with_file(table: Path, line: int, record: Record) -> tuple[str, PromptRow]:
    """The image file that a row names, and its prompt with the other columns as facts."""
    key = column(record, FILE_COLUMNS)
    if key is None or not isinstance(record[key], str) or not record[key]:
        raise UserError(f"{table}, {place(table, line)}: no image file is named ({' | '.join(FILE_COLUMNS)})")
    return record[key], row_of(table, line, {name: value for name, value in record.items() if name != key})


def _in_order(listing: _Listing, prompts: Path, reading: _Reading) -> ImageFolder:
    rows = read_prompts(prompts, unique=False)  # a prompt may have several images
    if len(rows) != len(listing.images):
        raise UserError(
            f"{prompts} holds {len(rows)} prompts and {listing.folder} {len(listing.images)} images; a prompt an image is needed, or a "
            "table with the columns file and prompt"
        )
    matched = zip(listing.images, reading.prompts(prompts, rows), strict=True)
    return ImageFolder("order of names", [PromptedImage(name, prompt) for name, prompt in matched])


def _owner(image: str, by_id: Collection[str]) -> str | None:
    """The id of the prompt that an image is called by: ID.png, ID_0.png, or a file in a folder ID."""
    path = PurePosixPath(image)
    names = (
        path.with_suffix("").as_posix(),
        path.stem,
        re.sub(r"[_-][0-9]+$", "", path.stem),
        *(parent.name for parent in path.parents),
    )
    return next((name for name in names if name in by_id), None)


def _by_id(
    listing: _Listing,
    prompts: Path,
    by_id: Mapping[str, tuple[int, Record]],
    owners: Sequence[str | None],
    reading: _Reading,
) -> ImageFolder:
    """Images that are called by the ids of their prompts, as DPG-Bench and MJHQ-30K publish theirs.

    Args:
        listing: of the folder of images.
        prompts: the file or folder of prompts.
        by_id: its records.
        owners: of each image the id, or None.
        reading: how prompts are read.

    Raises:
        UserError: where a prompt has no image.
    """
    if missing := [name for name in by_id if name not in owners]:
        raise UserError(
            f"{len(missing)} of the {len(by_id)} prompts in {prompts} have no image called by their name: {shown(missing, 3)}"
        )
    rows = [row_of(prompts, number, record) for number, record in by_id.values()]
    read = dict(zip(by_id, reading.prompts(prompts, rows), strict=True))
    pairs = zip(listing.images, owners, strict=True)
    matched = [PromptedImage(image, read[owner]) for image, owner in pairs if owner is not None]
    return ImageFolder("prompts by id", matched, _without_prompt(listing, matched))


def _beside(listing: _Listing, reading: _Reading) -> ImageFolder | None:
    captions: dict[str, list[str]] = {}
    for name in listing.captions:
        captions.setdefault(PurePosixPath(name).with_suffix("").as_posix(), []).append(name)
    stems = [PurePosixPath(name).with_suffix("").as_posix() for name in listing.images]
    without = [name for name, stem in zip(listing.images, stems, strict=True) if stem not in captions]
    if len(without) == len(listing.images):
        return None
    if without:
        raise UserError(
            f"{len(without)} of {len(listing.images)} images have no .txt beside them: {', '.join(map(printable_name, without[:3]))}"
        )
    if twice := [names for stem, names in captions.items() if len(names) > 1 and stem in stems]:
        raise UserError(
            f"{listing.folder}: an image has two prompts beside it: {', '.join(map(printable_name, twice[0]))}"
        )
    matched: list[PromptedImage] = []
    for name, stem in zip(listing.images, stems, strict=True):
        path = listing.folder / captions[stem][0]
        (prompt,) = reading.prompts(path, [row_of(path, 1, {"prompt": read_caption(path)})])
        matched.append(PromptedImage(name, prompt))
    orphans = [name for stem, names in captions.items() if stem not in stems for name in names]
    notes = [_count(orphans, "prompts have no picture that is read beside them")] if orphans else []
    return ImageFolder("text beside images", matched, notes)


def _lists(folder: Path, reading: _Reading) -> dict[str, list[Prompt]]:
    """Style -> its prompts, from a folder of STYLE.json as HPDv2 publishes them: lists of texts."""
    styles: dict[str, list[Prompt]] = {}
    for path in style_lists(folder):
        rows = [row_of(path, number, {"style": path.stem, **record}) for number, record in records(path)]
        if not rows:
            raise UserError(f"{path} is no list of prompts")
        styles[path.stem] = [replace(prompt, stratum=path.stem) for prompt in reading.prompts(path, rows)]
    return styles


def _by_style(listing: _Listing, styles: Mapping[str, Sequence[Prompt]]) -> ImageFolder:
    """HPSv2's layout (tgxs002/HPSv2 at 866735e), which leaves out a missing image without a message; here it is an error."""
    matched: list[PromptedImage] = []
    for style, prompts in sorted(styles.items()):
        image_names = [
            name for name in listing.images if re.fullmatch(rf"{re.escape(style)}/\d{{5}}\.(png|jpe?g)", name)
        ]
        numbers = [int(Path(name).stem) for name in image_names]
        if numbers != list(range(len(prompts))):
            missing = sorted(set(range(len(prompts))) - set(numbers))
            which = f"; the first that is missing is {missing[0]:05}" if missing else ""
            raise UserError(f"{listing.folder / style}: {len(image_names)} images for {len(prompts)} prompts{which}")
        matched += [PromptedImage(name, prompt) for name, prompt in zip(image_names, prompts, strict=True)]
    return ImageFolder("hpsv2", matched, _without_prompt(listing, matched))


def _names_files(path: Path) -> bool:
    """Return whether a table has a column of image files and is no table of scores."""
    if path.suffix.lower() not in TABLES:
        if path.suffix.lower() not in READERS:
            next(iter(records(path)))  # raises an error that lists the suffixes
        return False
    names = _first_record(path)
    prompted = path.suffix.lower() != ".json" or column(names, TEXT) is not None  # JSON holds much else
    return column(names, FILE_COLUMNS) is not None and prompted and "scorer_id" not in names


def _first_record(path: Path) -> Record:
    """The first record of a table, {} where it has none; JSON that is no list of prompts has none."""
    try:
        return next(iter(records(path)), (0, Record()))[1]
    except UserError:
        if path.suffix.lower() == ".json":
            return {}
        raise


def _without_prompt(listing: _Listing, matched: Iterable[PromptedImage]) -> list[str]:
    left = sorted(set(listing.images) - {pair.file for pair in matched}, key=natural)
    return [_count(left, "images belong to no prompt and were left out")] if left else []

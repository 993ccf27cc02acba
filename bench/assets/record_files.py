"""Reads records from the files people bring: plain lines, JSON, JSON lines, tables, parquet, and folders of texts.

A record is a mapping of names to values; one name holds the prompt. Names of columns are compared without case, spaces and
underscores, so that published lists are read as they are. A file is read rightly or refused in one line that names it and the place.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import printable_name

Record = dict[str, Any]
Records = Iterator[tuple[int, Record]]

TEXT = ("prompt", "prompts", "text", "caption", "captions")  # names of the prompt column; the first that exists is used
CAPTION_FILES = (".txt", ".caption")  # of one prompt each: beside images, or in a folder of their own
DELIMITERS = (",", ";", "\t", "|")
DEEPEST = 64  # levels of nested values
# Suffixes that are met where prompts are expected, and the way in.
OTHER_FORMATS = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the sheet as .csv"),
    **dict.fromkeys((".arrow", ".feather", ".h5"), "save the table as .parquet"),
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst", ".tar"), "unpack it"),
    **dict.fromkeys((".yaml", ".yml", ".xml", ".toml"), "save the list as .json"),
}


def column(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The name of the first wanted column that is there, compared without case, spaces and underscores; the same spelling first."""
    present = list(names)
    for name in wanted:
        alike = [other for other in present if fold_name(other) == fold_name(name)]
        if alike:
            return name if name in alike else alike[0]
    return None


def fact(facts: Mapping[str, Any], name: str) -> Any:
    """The value of a fact, whose name is compared as those of columns are; None where it is not there."""
    key = column(facts, (name,))
    return None if key is None else facts[key]


def fold_name(name: str) -> str:
    """The name of a column without case, spaces, underscores and other signs."""
    return "".join(character for character in name.casefold() if character.isalnum())


def place(path: Path, number: int) -> str:
    """Where a record of a file stands, in words: `line 3`, of JSON `entry 3`, of parquet `row 3`."""
    words = {".json": "entry", ".parquet": "row"}
    return f"{'entry' if path.is_dir() else words.get(path.suffix.lower(), 'line')} {number}"


def shown(names: Iterable[str], most: int = 20) -> str:
    """The first names, in one line whatever characters they hold."""
    first = list(names)[: most + 1]
    return ", ".join([*map(printable_name, first[:most]), *["..."] * (len(first) > most)])


def records(path: Path) -> Records:
    """Yield (number, record) of a file, or of a folder of texts or lists, read by its suffix.

    The number is the line where the record begins, from 1; in JSON and parquet its own. Of plain lines the record is {"prompt": line}.
    Raises UserError naming the file, and the place where there is one.
    """
    if path.is_dir():
        return _folder(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        way_in = f": {OTHER_FORMATS[suffix]}" if suffix in OTHER_FORMATS else ""
        raise UserError(
            f"{path}: a file of prompts ends in {', '.join(READERS)}, not in {path.suffix or 'nothing'!r}{way_in}"
        )
    return READERS[suffix](path, _content(path))


def records_by_id(path: Path) -> dict[str, tuple[int, Record]]:
    """id -> (number, record), where prompts are named: a folder of ID.txt, or JSON of the form {ID: prompt}; {} elsewhere."""
    if path.is_dir() and not style_lists(path) or path.suffix.lower() == ".json":
        named = [(number, record) for number, record in records(path) if isinstance(record, _Named)]
        return {record.id: (number, record) for number, record in named}
    return {}


def style_lists(folder: Path) -> list[Path]:
    """The STYLE.json of a folder, as HPDv2 publishes its prompts."""
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def caption_files(folder: Path) -> list[Path]:
    """The texts of a folder, each of one prompt, in the order of their names, numbers by their value."""
    texts = [path for path in folder.iterdir() if path.suffix.lower() in CAPTION_FILES and path.name[0] != "."]
    return sorted(texts, key=lambda path: natural(path.name))


def read_caption(path: Path) -> str:
    """The one prompt of a file. Raises UserError where it cannot be read."""
    return _text(path, _content(path)).strip()


def natural(name: str) -> tuple[list[int | str], str]:
    """Sort key of names: by letters and by the values of numbers, 2.png before 10.png."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))], name


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON holds it: dates as ISO text, decimals as numbers; None for bytes. Raises ValueError on what has no such form."""
    if depth > DEEPEST:
        raise ValueError(f"is nested deeper than {DEEPEST} levels")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"holds half a character: {value!r}") from None
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return None
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return {plain(str(key), depth + 1): plain(inner, depth + 1) for key, inner in items}
    if isinstance(value, list | tuple):
        return [plain(inner, depth + 1) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    return plain(str(value), depth + 1)


def finite(value: Any) -> Any:
    """A plain value without numbers that JSON has not: NaN and infinity are None."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return {key: finite(inner) for key, inner in items}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Texts


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _text(path: Path, raw: bytes) -> str:
    utf_16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))  # as spreadsheets save "Unicode text"
    try:
        return raw.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: this is not UTF-{16 if utf_16 else 8} ({error.reason})") from None


def _lines(path: Path, raw: bytes) -> Iterator[tuple[int, str]]:
    """Yield lines that are not blank. Not splitlines(): it also breaks at characters that a prompt may contain."""
    for number, line in enumerate(_text(path, raw).replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _txt(path: Path, raw: bytes) -> Records:
    for number, line in _lines(path, raw):
        yield number, {"prompt": line}


class _Named(Record):
    """A record that stands under a name of its own, which is its fact `id`."""

    def __init__(self, name: str, record: Mapping[str, Any]):
        super().__init__({"id": name, **record})
        self.id = name


def _folder(path: Path) -> Records:
    """The prompts of a folder: of STYLE.json with their style, else of ID.txt, a prompt a file."""
    lists, texts = style_lists(path), caption_files(path)
    if lists:
        for file in lists:
            for number, record in records(file):
                yield number, {"style": file.stem, **record}
        return
    if not texts:
        raise UserError(f"there is no STYLE.json, and no ID.txt or ID.caption of one prompt each, in {path}")
    if twice := [a for a, b in zip(texts, texts[1:]) if a.stem == b.stem]:
        raise UserError(f"{path} holds two prompts called {twice[0].stem}: a .txt and a .caption")
    for number, file in enumerate(texts, 1):
        yield number, _Named(file.stem, {"prompt": read_caption(file)})


# JSON


def _parse(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise UserError(f"{path}{where}: this JSON is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}{where}: this is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    """A JSON object; ValueError where two of its values have one name, of which one would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two values are called {next(name for name in names if names.count(name) > 1)!r}")
    return value


def _jsonl(path: Path, raw: bytes) -> Records:
    for number, line in _lines(path, raw):
        record = _parse(path, line, f", line {number}")
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: this is no JSON object but {type(record).__name__}")
        yield number, record


def _json(path: Path, raw: bytes) -> Records:
    """A list of texts or records; {ID: text or record}; {name: list}; or columns, as data frames write them."""
    value = _parse(path, _text(path, raw), "")
    for number, entry in enumerate(_entries(path, value), 1):
        if isinstance(entry, str):
            yield number, {"prompt": entry}
        elif isinstance(entry, dict):
            yield number, entry
        else:
            raise UserError(f"{path}, entry {number}: this is neither a text nor a record but {type(entry).__name__}")


def _entries(path: Path, value: Any) -> list[Any]:
    """The texts and records of a JSON file."""
    if isinstance(value, list):
        return value  # pyright: ignore[reportUnknownVariableType]
    table: Record = value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]
    key = column(table, TEXT)
    if key is not None and isinstance(table[key], str):
        return [table]
    values: Any = table[key] if key is not None else None
    if isinstance(values, dict) and any(isinstance(entry, dict) for entry in values.values()):  # pyright: ignore[reportUnknownVariableType]
        table = values  # {"prompts": {ID: record}}
    elif isinstance(values, list) and any(isinstance(entry, dict) for entry in values):  # pyright: ignore[reportUnknownVariableType]
        return values  # pyright: ignore[reportUnknownVariableType]
    elif isinstance(values, dict | list):
        return _transposed(path, table, type(values))  # pyright: ignore[reportUnknownArgumentType]
    lists = [inner for inner in table.values() if isinstance(inner, list)]
    if len(lists) == 1:  # pyright: ignore[reportUnknownArgumentType]
        return lists[0]  # pyright: ignore[reportUnknownVariableType]
    if table and all(isinstance(inner, str | dict) for inner in table.values()):
        return [_Named(name, {"prompt": v} if isinstance(v, str) else v) for name, v in table.items()]
    raise UserError(f"{path} is no list of prompts, and no table of them by id or by column")


def _transposed(path: Path, table: Record, kind: type) -> list[Record]:
    """Records from columns, {"prompt": [...], "tag": [...]} or {"prompt": {"0": ...}, "tag": {"0": ...}}."""
    columns: dict[str, Any] = {name: values for name, values in table.items() if isinstance(values, kind)}
    rows = [list(values) if kind is dict else range(len(values)) for values in columns.values()]
    if any(row != rows[0] for row in rows):
        raise UserError(f"{path}: the columns {shown(columns)} have not the same rows")
    return [{name: values[row] for name, values in columns.items()} for row in rows[0]]


# Tables

Row = tuple[int, list[str]]  # line where it begins, cells


def _table(preferred: str) -> Callable[[Path, bytes], Records]:
    """A reader of delimited tables: by the preferred delimiter, or by the one that makes a prompt column of the header."""

    def read(path: Path, raw: bytes) -> Records:
        text = _text(path, raw)
        first = next((line for line in text.split("\n") if line.strip()), "")
        delimiters = dict.fromkeys((preferred, *DELIMITERS))
        fitting = (d for d in delimiters if column((cell.strip(' \r"') for cell in first.split(d)), TEXT))
        delimiter = next(fitting, preferred)
        return _keyed(path, (_tab_rows if delimiter == "\t" else _quoted_rows)(path, text, delimiter), delimiter)

    return read


def _keyed(path: Path, rows: Iterable[Row], delimiter: str) -> Records:
    """The records of rows, the first of which is the header; an empty cell is none, but for the prompt's."""
    header: list[str] = []
    text = None
    for line, cells in rows:
        if not header:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise UserError(f"{path}, line {line}: two columns have one name: {shown(header)}")
            text = column(header, TEXT)
        elif len(cells) != len(header):
            raise UserError(
                f"{path}, line {line}: {len(cells)} cells under {len(header)} columns; a cell that holds "
                f"{delimiter!r} stands in quotes"
            )
        else:
            yield line, {name: cell for name, cell in zip(header, cells, strict=True) if cell or name == text}


def _quoted_rows(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    """The rows of a table in which a cell may stand in quotation marks (RFC 4180); blank lines are skipped."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    begins = 1
    try:
        for cells in lines:
            if cells:
                yield begins, cells
            begins = lines.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {begins}: {error}") from None


def _tab_rows(path: Path, text: str, delimiter: str) -> list[Row]:
    """The rows of a table of tabs, in which quotation marks quote only if all of them stand as a program writes them.

    Published lists know no quoting: there a cell may begin with a quotation mark that belongs to the text.
    """
    quoted: list[Row] | UserError
    try:
        quoted = list(_quoted_rows(path, text, delimiter))
    except UserError as error:
        quoted = error
    if (
        not isinstance(quoted, UserError)
        and _even(quoted)
        and _as_written(text, [cells for _, cells in quoted], delimiter)
    ):
        return quoted
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    bare = [(number, line.split(delimiter)) for number, line in lines if line]
    if isinstance(quoted, UserError):
        if _even(bare):
            return bare
        raise quoted
    return bare if _even(bare) else quoted


def _even(rows: Sequence[Row]) -> bool:
    """Whether all rows have as many cells as the first."""
    return len({len(cells) for _, cells in rows}) <= 1


def _as_written(text: str, rows: Sequence[Sequence[str]], delimiter: str) -> bool:
    """Whether the text is these rows as a program writes them: it quotes every cell, those that need it, or those with commas too."""
    normal = lambda written: written.replace("\r\n", "\n").strip("\n")
    return any(
        normal("\n".join(delimiter.join(_quote(cell, special, len(cells)) for cell in cells) for cells in rows))
        == normal(text)
        for special in (f'{delimiter}\r\n"', f'{delimiter}\r\n",', None)
    )


def _quote(cell: str, special: str | None, cells: int) -> str:
    """A cell in quotation marks where it holds a special character (None: always) or would leave a blank line."""
    needed = special is None or any(character in special for character in cell) or (cells == 1 and not cell)
    return '"' + cell.replace('"', '""') + '"' if needed else cell


def _parquet(path: Path, raw: bytes) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(pa.BufferReader(raw)).names
        rows = pq.read_table(pa.BufferReader(raw)).to_pylist() if len(set(names)) == len(names) else []
    except Exception as error:  # arrow and the types of Python may fail in any way on foreign bytes
        message = str(error).strip() or type(error).__name__
        raise UserError(f"{path} is not a parquet file: {message.splitlines()[0]}") from None
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns have one name: {shown(names)}")
    text = column(names, TEXT)
    for number, row in enumerate(rows, 1):
        yield number, {name: value for name, value in row.items() if value is not None or name == text}


READERS: dict[str, Callable[[Path, bytes], Records]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".json": _json,
    ".ndjson": _jsonl,
}

"""Reads a user's own prompts from plain lines, JSON lines or a table, and wraps a task so that it uses them.

Errors name the file and the line, so that the user finds the faulty one in a list of a thousand prompts.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from .. import registry
from ..errors import UserError
from ..spec import (
    Columns,
    EvaluationSettings,
    Prompt,
    Split,
    SupportsColumns,
    SupportsOwnPrompts,
    SupportsSummary,
    Task,
    fold_text,
)

if TYPE_CHECKING:
    import pandas as pd

SPLITS: tuple[Split, ...] = get_args(Split)
TEXT = ("prompt", "text", "caption")  # names of the prompt column; the first that exists is used
OWN = "+own"  # suffix of a task's version with a user's own prompts: its numbers are not comparable with others


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a file, and the facts that the file holds about it."""

    text: str
    facts: Mapping[str, Any]
    line: int  # where its record begins, from 1; of a parquet file the row


def read_prompts(path: Path, *, unique: bool = True) -> list[PromptRow]:
    """Read the prompts of a .txt (one a line), .jsonl, .csv, .tsv or .parquet file, in order; blank lines are skipped.

    The column of the prompts is `prompt`, `text` or `caption`, all others are facts; an empty cell of a table is no fact.
    unique: refuse prompts that differ only in case, punctuation and spacing.
    Raises UserError naming the file, and the line where there is one.
    """
    rows = [row_of(path, line, record) for line, record in records(path)]
    if not rows:
        raise UserError(f"{path} holds no prompts")
    if unique:
        _refuse_repeats(path, rows)
    return rows


def row_of(path: Path, line: int, record: Mapping[str, Any]) -> PromptRow:
    """Return a record's prompt and facts; UserError where it has no prompt."""
    key = next((name for name in TEXT if name in record), None)
    if key is None:
        raise UserError(f"{path}, line {line}: there is no {' | '.join(TEXT)}, only {', '.join(record) or 'nothing'}")
    text = record[key]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{path}, line {line}: the {key} is {'empty' if text in ('', None) else repr(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}, line {line}: the {key} holds half a character: {text!r}") from None
    return PromptRow(text, {name: value for name, value in record.items() if name != key}, line)


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, record) of a file, read by its suffix; of a .txt file the record is {"prompt": line}."""
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: a file of prompts ends in {', '.join(READERS)}, not in {path.suffix or 'nothing'!r}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return READERS[path.suffix.lower()](path, raw)


# Formats


def _text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: this is not UTF-8 ({error.reason})") from None


def _lines(path: Path, raw: bytes) -> Iterator[tuple[int, str]]:
    """Yield lines that are not blank. Not splitlines(): it also breaks at characters that a prompt may contain."""
    for number, line in enumerate(_text(path, raw).replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _txt(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path, raw):
        yield number, {"prompt": line}


def _jsonl(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path, raw):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: this is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: this is no JSON object but {type(record).__name__}")
        yield number, record


def _table(delimiter: str) -> Callable[[Path, bytes], Iterator[tuple[int, dict[str, Any]]]]:
    def read(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        lines = csv.reader(io.StringIO(_text(path, raw), newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        begins = 1
        try:
            for cells in lines:
                if cells and not header:
                    header = [cell.strip() for cell in cells]
                    if len(set(header)) < len(header):
                        raise UserError(f"{path}, line {begins}: two columns have one name: {', '.join(header)}")
                elif cells:
                    if len(cells) != len(header):
                        raise UserError(
                            f"{path}, line {begins}: {len(cells)} cells under {len(header)} columns; a cell that holds "
                            f"{delimiter!r} stands in quotes"
                        )
                    yield begins, {n: cell for n, cell in zip(header, cells, strict=True) if cell or n in TEXT}
                begins = lines.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}, line {begins}: {error}") from None

    return read


def _parquet(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(pa.BufferReader(raw)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        yield number, {name: value for name, value in row.items() if value is not None or name in TEXT}


READERS: dict[str, Callable[[Path, bytes], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}


def _refuse_repeats(path: Path, rows: Sequence[PromptRow]) -> None:
    first: dict[str, PromptRow] = {}
    again = [(first[key], row) for row in rows if first.setdefault(key := fold_text(row.text), row) is not row]
    if again:
        shown = "; ".join(f"lines {earlier.line} and {later.line}: {later.text!r}" for earlier, later in again[:3])
        raise UserError(f"{path} holds {len(again)} prompt{'s' * (len(again) > 1)} twice: {shown}")


# Tasks


@dataclass(frozen=True)
class OwnPrompts:
    """Wraps a task and replaces the prompts of some splits by a user's own; all else is the task's.

    It implements SupportsColumns, SupportsOwnPrompts and SupportsSummary, with empty results where the task does not.
    """

    task: Task
    rows: Mapping[Split, tuple[Path, Sequence[PromptRow]]]
    domain: str  # of the prompts in the files
    name: str
    version: str

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """Return the file's prompts with the facts that the task derives from them; the task's own where no file is given."""
        if split not in self.rows:
            return self.task.prompts(split, domain)
        if domain != self.domain:
            raise UserError(
                f"the prompts in {self.rows[split][0]} are of the domain {self.domain!r}, not of {domain!r}"
            )
        path, rows = self.rows[split]
        return understood(self.task, path, rows, domain)

    def reward(self, domain: str) -> str:
        return self.task.reward(domain)

    def scorers(self, domain: str) -> Sequence[str]:
        return self.task.scorers(domain)

    def held_out(self, domain: str) -> Sequence[str]:
        return self.task.held_out(domain)

    def evaluation(self, domain: str) -> EvaluationSettings:
        return self.task.evaluation(domain)

    def columns(self, domain: str) -> Columns:
        return self.task.columns(domain) if isinstance(self.task, SupportsColumns) else Columns()

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        return understand(self.task, text, facts, domain)

    def summary(self, table: pd.DataFrame) -> Mapping[str, float]:
        return self.task.summary(table) if isinstance(self.task, SupportsSummary) else {}


def with_own_prompts(task: Task, files: Mapping[Split, Path], domain: str) -> Task:
    """Wrap the task with the prompts of these files in these splits, marked in its version.

    Raises UserError where a file cannot be read, or the task cannot interpret a line.
    """
    # Published training lists weight prompts by repeating them; an evaluation uses each once.
    rows: dict[Split, tuple[Path, Sequence[PromptRow]]] = {
        split: (path, read_prompts(path, unique=split != "train")) for split, path in files.items()
    }
    for path, each in rows.values():
        understood(task, path, each, domain)
    return cast(Task, OwnPrompts(task, rows, domain, task.name, task.version + (OWN if files else "")))


def understand(task: Task | None, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
    """Convert a prompt as the task reads it; where no task reads prompts, keep its facts unchanged.

    A fact `stratum` is then the prompt's stratum.
    """
    if task is not None and isinstance(task, SupportsOwnPrompts):
        return task.read(text, facts, domain)
    return Prompt(text, dict(facts), stratum=str(facts.get("stratum") or ""))


def understood(task: Task | None, path: Path, rows: Sequence[PromptRow], domain: str) -> list[Prompt]:
    """Convert the rows of a file in the same way; an error names the line."""
    prompts: list[Prompt] = []
    for row in rows:
        try:
            prompts.append(understand(task, row.text, row.facts, domain))
        except UserError as error:
            raise UserError(f"{path}, line {row.line}: {error}") from None
    return prompts


def parse_option(options: Sequence[str]) -> dict[Split, Path]:
    """Parse `FILE` (the train split), `test=FILE`, `validation=FILE` to split -> file. UserError on a split named twice or unknown."""
    files: dict[Split, Path] = {}
    for option in options:
        name, equals, file = option.partition("=")
        if equals and name not in SPLITS and not Path(option).exists():
            raise registry.unknown("split", name, SPLITS)
        split, path = (name, file) if equals and name in SPLITS else ("train", option)
        if not path:
            raise UserError(f"--prompts {option}: no file is named")
        if split in files:
            raise UserError(f"--prompts names two files for the {split} split: {files[split]} and {path}")
        files[split] = Path(path)
    return files

"""Reads a user's own prompts from the files of `record_files`, and wraps a task so that it uses them.

Errors name the file and the line, so that the user finds the faulty one in a list of a thousand prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha1
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
    SupportsKey,
    SupportsOwnPrompts,
    SupportsPublishedLists,
    SupportsSummary,
    Task,
    fold_text,
)
from .record_files import TEXT, column, fact, finite, place, plain, records, shown

if TYPE_CHECKING:
    import pandas as pd

SPLITS: tuple[Split, ...] = get_args(Split)
OWN = "+own"  # suffix of a task's version with a user's own prompts: its numbers are not comparable with others


@dataclass(frozen=True)
class PromptRow:
    """A prompt of a file, and the facts that the file holds about it."""

    text: str
    facts: Mapping[str, Any]  # as JSON holds them, but NaN and infinity may be there
    line: int  # where its record begins, from 1; of a JSON or parquet file its number


def read_prompts(path: Path, *, unique: bool = True) -> list[PromptRow]:
    """Read the prompts of a file, or of a folder of texts or lists, in order; blank lines are skipped.

    The formats are those of `record_files`. The column of the prompts is `prompt`, `prompts`, `text` or `caption`, all others are
    facts; an empty cell of a table is no fact.
    unique: keep the first of rows with the same prompt and facts, and refuse prompts that differ otherwise in no more than case,
    punctuation and spacing.
    Raises UserError naming the file, and the line where there is one.
    """
    rows = _read_rows(path)
    return _unique_rows(path, rows) if unique else rows


def _read_rows(path: Path) -> list[PromptRow]:
    rows = [row_of(path, line, record) for line, record in records(path)]
    if not rows:
        raise UserError(f"{path} holds no prompts")
    return rows


def _unique_rows(path: Path, rows: Sequence[PromptRow]) -> list[PromptRow]:
    first = {_content(row): row for row in reversed(rows)}
    kept = [row for row in rows if first[_content(row)] is row]
    _refuse_repeats(path, kept)
    return kept


def _content(row: PromptRow) -> str:
    """The prompt and its facts as text: equal for two rows that say the same."""
    return repr((row.text.strip(), sorted((name, repr(value)) for name, value in row.facts.items())))


def row_of(path: Path, line: int, record: Mapping[str, Any]) -> PromptRow:
    """Return a record's prompt and facts; UserError where it has no prompt, or a value that JSON cannot hold."""
    key = column(record, TEXT)
    if key is None:
        raise UserError(
            f"{path}, {place(path, line)}: there is no {' | '.join(TEXT)}, only {shown(record) or 'nothing'}"
        )
    facts: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, bytes):  # an embedded file: no scorer could be sent it
            continue
        try:
            facts[plain(name)] = plain(value)
        except ValueError as error:
            what = f"the {name!a}" if name != key else f"the {key}"
            raise UserError(f"{path}, {place(path, line)}: {what} {error}") from None
    text = facts.pop(key, None)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{path}, {place(path, line)}: the {key} is {'empty' if text in ('', None) else repr(text)}")
    return PromptRow(text, facts, line)


def _refuse_repeats(path: Path, rows: Sequence[PromptRow]) -> None:
    first: dict[str, PromptRow] = {}
    again = [(first[key], row) for row in rows if first.setdefault(key := fold_text(row.text), row) is not row]
    if again:
        examples = "; ".join(f"lines {earlier.line} and {later.line}: {later.text!r}" for earlier, later in again[:3])
        raise UserError(f"{path} holds {len(again)} prompt{'s' * (len(again) > 1)} twice: {examples}")


# Tasks


@dataclass(frozen=True)
class OwnPrompts:
    """Wraps a task and replaces the prompts of some splits by a user's own; all else is the task's.

    It implements SupportsColumns, SupportsKey, SupportsOwnPrompts and SupportsSummary, with empty results where the task does not.
    """

    task: Task
    rows: Mapping[Split, tuple[Path, Sequence[PromptRow]]]
    domain: str  # of the prompts in the files
    name: str
    version: str
    notes: tuple[str, ...] = ()  # what of the files was not taken

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

    def key(self, domain: str) -> str:
        return self.task.key(domain) if isinstance(self.task, SupportsKey) else ""

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        return understand(self.task, text, facts, domain)

    def summary(self, table: pd.DataFrame) -> Mapping[str, float]:
        return self.task.summary(table) if isinstance(self.task, SupportsSummary) else {}


def with_own_prompts(task: Task, files: Mapping[Split, Path], domain: str) -> Task:
    """Wrap the task with the prompts of these files in these splits, marked in its version.

    Raises UserError where a file cannot be read, or the task cannot interpret a line.
    """
    rows: dict[Split, tuple[Path, Sequence[PromptRow]]] = {}
    notes: list[str] = []
    for split, path in files.items():
        listed = _read_rows(path)
        # Published training lists weight prompts by repeating them; an evaluation uses each once.
        kept = listed if split == "train" else _unique_rows(path, listed)
        rows[split] = path, kept
        if repeats := len(listed) - len(kept):
            count = f"{repeats} row{'s' * (repeats > 1)}"
            notes.append(f"{path} repeats prompts: {count} left out, as each prompt is evaluated once")
    for path, each in rows.values():
        understood(task, path, each, domain)
    return cast(Task, OwnPrompts(task, rows, domain, task.name, task.version + (OWN if files else ""), tuple(notes)))


def own_prompt_notes(task: Task) -> tuple[str, ...]:
    """What a user should know of the prompt files of a task, one line each; () for a task without any."""
    return task.notes if isinstance(task, OwnPrompts) else ()


def understand(task: Task | None, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
    """Convert a prompt as the task reads it; where no task reads prompts, keep its facts unchanged.

    A fact `stratum` is then the prompt's stratum.
    """
    if task is not None and isinstance(task, SupportsOwnPrompts):
        return _sendable(task.read(text, facts, domain))
    stratum = fact(facts, "stratum")
    return _sendable(Prompt(text, dict(facts), stratum="" if stratum is None else str(stratum)))


def _sendable(prompt: Prompt) -> Prompt:
    """The prompt without facts that are no finite number: a scorer elsewhere is sent JSON, which has none."""
    facts = {name: finite(value) for name, value in prompt.meta.items()}
    return replace(
        prompt,
        meta={name: facts[name] for name, value in prompt.meta.items() if value is None or facts[name] is not None},
    )


def understood(task: Task | None, path: Path, rows: Sequence[PromptRow], domain: str) -> list[Prompt]:
    """Convert the rows of a file in the same way; an error names the line."""
    if isinstance(task, SupportsPublishedLists) and path.is_file() and blob_id(path) in task.published_lists:
        return [task.read_published(row.text, domain) for row in rows]
    prompts: list[Prompt] = []
    for row in rows:
        try:
            prompts.append(understand(task, row.text, row.facts, domain))
        except UserError as error:
            raise UserError(f"{path}, {place(path, row.line)}: {error}") from None
    return prompts


def blob_id(path: Path) -> str:
    """What `git hash-object FILE` prints: it names the content of a file as its repository does."""
    raw = path.read_bytes()
    return sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


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

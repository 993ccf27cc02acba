"""Ledger of test looks: one line for each result that was evaluated on test prompts, in the folder of runs.

Whoever tries many settings and reports the best by test score reports noise too. The ledger counts the settings, so that tables can
say what the best of them would show by chance (bench/stats/selection.py). A line is appended before the evaluation begins and
stays when the run's directory is deleted. Each line holds the hash of the line before, so an edited, deleted or inserted line shows.
Each record holds the hash of its own line, so lines that were cut off at the end show while the record is there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ..files import acquire_lock, open_lock
from ..stats.selection import inflation
from .ranking import record_key
from .record import LookEntry, Record
from .seed_library import nearest_entry

LEDGER = ".looks.jsonl"  # in the folder of runs
LOCK = ".looks.lock"
# What of a run's configuration makes a setting; training seeds, names of budgets and how much memory a run takes do not.
SETTING_KEYS = ("settings", "adapter", "evaluation", "budget", "precision", "reward", "sources", "prompts")


@dataclass(frozen=True)
class Look:
    """One evaluation of a result on test prompts."""

    token: str  # of the run; the same when an interrupted run goes on
    task: str
    version: str  # of the task
    prompts: str  # sha256 of the test prompts in order
    model: str
    method: str
    settings: str  # hash of what was chosen, without the training seed
    seed: int | None  # of training; None where it is not known
    run: str  # the run directory's name, or the adapter's path
    source: str  # the command: run | eval


@dataclass(frozen=True)
class LookCount:
    """How often results of one method were evaluated on the same test prompts."""

    looks: int
    settings: int


@dataclass(frozen=True)
class Ledger:
    """The lines of a ledger, and what is wrong with the file."""

    path: Path
    looks: tuple[Look, ...]
    hashes: tuple[str, ...]  # of the lines
    damage: tuple[str, ...]  # sentences

    def count(self, prompts: str, model: str, method: str) -> LookCount:
        """Count the looks at these test prompts with a method on a model."""
        return count_looks([self], prompts, model, method)


def count_looks(ledgers: Iterable[Ledger], prompts: str, model: str, method: str) -> LookCount:
    """Count the looks of several ledgers at these test prompts with a method on a model; a setting in two of them counts once."""
    looks = [
        look
        for ledger in ledgers
        for look in ledger.looks
        if (look.prompts, look.model, look.method) == (prompts, model, method)
    ]
    return LookCount(len(looks), len({look.settings for look in looks}))


def setting_hash(config: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits of what defines a setting in a run's configuration."""
    chosen = {key: config[key] for key in SETTING_KEYS if key in config}
    if "budget" in chosen:
        chosen["budget"] = {key: value for key, value in chosen["budget"].items() if key != "name"}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True, default=str).encode()).hexdigest()[:12]


def record_look(folder: Path, look: Look) -> LookEntry:
    """Append a look to the ledger of a folder of runs, unless a line of its token is there; returns what its record says of it.

    Several processes may append at once. Where the ledger cannot be written the answer says so, and nothing is raised.
    """
    try:
        with open_lock(folder / LOCK) as lock:
            acquire_lock(lock, wait=True)
            entry = _append(folder / LEDGER, look)
        ledger = read_ledger(folder)
    except OSError as error:
        return LookEntry(not_recorded=f"cannot write {folder / LEDGER}: {error.strerror or error}")
    count = ledger.count(look.prompts, look.model, look.method)
    return LookEntry(entry=entry, looks=count.looks, settings=count.settings)


def read_ledger(folder: Path) -> Ledger:
    """Read the ledger of a folder of runs; an empty one where there is none, with the reason where it cannot be read."""
    path = folder / LEDGER
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        return Ledger(path, (), (), (f"{path} cannot be read: {error.strerror or error}",))
    looks: list[Look] = []
    hashes: list[str] = []
    damage: list[str] = []
    previous = ""
    for number, line in enumerate(lines, 1):
        parsed = _parse(line)
        if parsed is None:
            damage.append(f"{path}: line {number} is damaged or was edited")
            previous = "?"
            continue
        look, before, own = parsed
        if before != previous and previous != "?":
            damage.append(f"{path}: line {number} does not follow the line before: lines were deleted, moved or added")
        looks.append(look)
        hashes.append(own)
        previous = own
    return Ledger(path, tuple(looks), tuple(hashes), tuple(damage))


def _append(path: Path, look: Look) -> str:
    """Append the line of a look, and return its hash; that of the line with its token where there is one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(descriptor, "r+b") as file:
        _drop_unfinished_line(file)
        file.seek(0)
        lines = file.read().splitlines()
        for line in lines:
            if (parsed := _parse(line)) and parsed[0].token == look.token:
                return parsed[2]
        last = _parse(lines[-1]) if lines else None
        previous = last[2] if last else hashlib.sha256(lines[-1]).hexdigest() if lines else ""
        content = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(look), "previous": previous}
        own = _line_hash(content)
        file.write(json.dumps({**content, "sha256": own}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return own


def _drop_unfinished_line(file: IO[bytes]) -> None:
    """Cut off what stands behind the last line's end: the process that wrote it was killed, and its run appends again."""
    content = file.read()
    if content and not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)


def _line_hash(content: Mapping[str, Any]) -> str:
    """sha256 of a line's content without its own hash."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(line: bytes) -> tuple[Look, str, str] | None:
    """Return the look, the hash of the line before and its own; None where the line is not what was written."""
    try:
        content = dict(json.loads(line))
        own, names = str(content.pop("sha256")), [field.name for field in fields(Look)]
        if own != _line_hash(content):
            return None
        return Look(**{name: content[name] for name in names}), str(content["previous"]), own
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


# What is said of it


def look_note(record: Record, ledger: Ledger | None = None) -> str:
    """Say how often results of this method were evaluated on the record's test prompts, and what that does to the best of them.

    ledger: as it stands now; None takes what the record says. "" where the run was not evaluated on test prompts.
    """
    look = record.look
    if look is None:
        return ""
    if look.not_recorded:
        return f"Test looks: this one is counted nowhere ({look.not_recorded})."
    count = LookCount(look.looks, look.settings)
    if ledger is not None:
        now = ledger.count(record.prompts.get("test", ""), record.model, record.method)
        count = now if now.looks >= count.looks else count
    key = record_key(record)
    se = _gain_se(record, key) if key else math.nan
    return f"{look_text(record.method, count)}{inflation_text(count, se, key or 'the key')}"


def look_text(method: str, count: LookCount) -> str:
    """Say the counts in one sentence."""
    plural = lambda n, word: f"{n:,} {word}{'' if n == 1 else 's'}"
    return f"{plural(count.looks, 'look')} at these test prompts with {method} ({plural(count.settings, 'setting')})."


def inflation_text(count: LookCount, se: float, key: str) -> str:
    """Say what the best of the settings would show without any gain; "" for one setting."""
    if count.settings < 2:
        return ""
    by_chance = inflation(count.settings, se)
    known = math.isfinite(by_chance.gain)
    gain = f" shows a gain of {f'{by_chance.gain:.3f}'.removeprefix('0')} in {key}, and" if known else ""
    return (
        f" Of {count.settings:,} settings without any gain the best{gain} is told better than the base in "
        f"{100 * by_chance.told:.0f} of 100 cases."
    )


def ledger_damage(ledger: Ledger, entries: Mapping[str, str]) -> list[str]:
    """Say what is wrong with a ledger: its own damage, and the runs whose lines it lacks. entries: run -> hash of its line."""
    known = set(ledger.hashes)
    lacking = [run for run, entry in entries.items() if entry not in known]
    missing = f"{ledger.path} lacks the looks of {', '.join(lacking)}: it was cut, or the runs were moved"
    return [*ledger.damage, *([missing] if lacking else [])]


def _gain_se(record: Record, key: str) -> float:
    """The standard error of a single run's gain, the spread of seeds included where the library knows it."""
    from scipy.special import stdtrit

    (low, high), n = record.delta[key].ci, record.delta[key].n
    if low is None or high is None or n < 2:
        return math.nan
    entry = nearest_entry(record, key)
    return math.hypot((high - low) / (2 * float(stdtrit(n - 1, 0.975))), entry.sd if entry else 0.0)

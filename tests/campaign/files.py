"""Damaged files of finished runs: no command reads a number from one without saying so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from fault import NotHeld, Row, one_line, row
from mini_runs import FAULTY_RUN, LIMIT, SETTINGS, Runs, ended_well

Damage = Callable[[Path, np.random.Generator], None]


def _write(change: Callable[[bytes, np.random.Generator], bytes]) -> Damage:
    def damage(path: Path, rng: np.random.Generator) -> None:
        path.write_bytes(change(path.read_bytes(), rng))

    return damage


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _zero_block(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(content)))
    return content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]


def _digit(content: bytes, rng: np.random.Generator) -> bytes:
    """Another digit in the place of one: what an edited number looks like."""
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    if not places:
        return _flip(content, rng)
    changed = bytearray(content)
    at = int(rng.choice(places))
    changed[at] = ord("0") + (changed[at] - ord("0") + int(rng.integers(1, 10))) % 10
    return bytes(changed)


def _replaced(make: Callable[[Path], None]) -> Damage:
    def damage(path: Path, rng: np.random.Generator) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Damage] = {
    "a bit flipped": _write(_flip),
    "cut": _write(lambda content, rng: content[: int(rng.integers(len(content)))]),
    "a block of zeros": _write(_zero_block),
    "garbage appended": _write(lambda content, rng: content + rng.bytes(int(rng.integers(1, 300)))),
    "garbage": _write(lambda content, rng: rng.bytes(int(rng.integers(1, 3000)))),
    "empty": _write(lambda content, rng: b""),
    "deleted": lambda path, rng: path.unlink(),
    "a folder": _replaced(Path.mkdir),
    "a dangling link": _replaced(lambda path: path.symlink_to("nowhere")),
    "a link to itself": _replaced(lambda path: path.symlink_to(path.name)),
}
TEXT_DAMAGES: dict[str, Damage] = {
    "another digit": _write(_digit),
    "null": _write(lambda content, rng: b"null"),
    "a list": _write(lambda content, rng: b"[]"),
    "deep": _write(lambda content, rng: b"[" * 100_000 + b"]" * 100_000),
    "not UTF-8": _write(lambda content, rng: content.replace(b"e", b"\xff", 1)),
    "another program's": _write(lambda content, rng: b'{"name": "other", "metrics": {"accuracy": 0.9}}'),
}
FILES = {  # what a run leaves: its name, and whether it is text
    "record.json": True, "scores.parquet": False, "curve.parquet": False, "config.toml": True, "inputs.json": True,
    "before.parquet": False, "before.npz": False, "samples/images.npz": False, "metrics.jsonl": True,
    "adapter/pytorch_lora_weights.safetensors": False,
}  # fmt: skip
SHARED = "the shared evaluation of the base"
# A baseline is written from a commit, and this tree may have none.
COMMITTED = "from gpobench.bench.evaluation import record; record.revision = lambda: '0123456789ab'"
COMMANDS = ("leaderboard", "report", "regress", "export", "run", "another run")


class Files(Runs):
    """A folder of two finished runs and what each command prints of it, copied before each fault."""

    @cached_property
    def finished(self) -> Path:
        out = self.folder()
        for seed in ("0", "1"):
            ended = self.gpobench(*self.command(out, "--seed", seed), before=COMMITTED, limit=LIMIT)
            if ended.code:
                raise RuntimeError(ended.err)
        return out

    @cached_property
    def baseline(self) -> Path:
        """A regression baseline of the finished runs."""
        path = self.folder().with_suffix(".toml")
        ended = self.gpobench("regress", *self.run_dirs(self.finished), "--against", path, "--update", "--margin", ".5",
                              before=COMMITTED, limit=LIMIT)  # fmt: skip
        if ended.code:
            raise RuntimeError(ended.err)
        return path

    @cached_property
    def clean(self) -> dict[str, str]:
        """What each command prints of the undamaged folder."""
        printed: dict[str, str] = {}
        for command in COMMANDS:
            out = self.copy()
            ended = self.gpobench(*self.words(command, out), limit=LIMIT)
            if ended.code:
                raise RuntimeError(f"{command}: {ended.err}")
            printed[command] = self.numbers(command, out, ended.out)
        return printed

    def copy(self) -> Path:
        out = self.folder()
        shutil.copytree(self.finished, out, symlinks=True)
        return out

    @staticmethod
    def run_dirs(out: Path) -> list[Path]:
        return sorted(path for path in out.iterdir() if path.is_dir() and not path.name.startswith("."))

    def words(self, command: str, out: Path) -> list[str]:
        first, *_ = run_dirs = [str(path) for path in self.run_dirs(out)]
        if command == "leaderboard":
            return ["leaderboard", *run_dirs, "--format", "json"]
        if command == "report":
            return ["report", *run_dirs, "--out", str(out / "report.html")]
        if command == "regress":
            return ["regress", *run_dirs, "--against", str(self.baseline), "--allow-unsure"]
        if command == "export":
            return ["export", first, "--to", str(out / "export")]
        if command == "run":
            return self.command(out)
        return self.command(out, sets=(*SETTINGS[:-1], "beta=100"))  # shares the base's evaluation

    def numbers(self, command: str, out: Path, printed: str) -> str:
        """What a command says in numbers: its JSON without times and paths, its page, or its card."""
        if command == "report":
            return (out / "report.html").read_text()
        if command == "export":
            return (out / "export" / "README.md").read_text()
        if command in ("run", "another run"):
            facts = json.loads(printed)
            return json.dumps([facts[key] for key in ("before", "after", "delta", "nfe_by_role", "flags")])
        return printed.replace(str(out), "OUT")

    def damaged(self, name: str, damage: Damage, command: str) -> Callable[[np.random.Generator], str]:
        def inject(rng: np.random.Generator) -> str:
            expected = self.clean[command]
            out = self.copy()
            if name == SHARED:
                path = Path(rng.choice([str(p) for p in sorted((out / ".bases").iterdir()) if p.suffix != ".lock"]))
            else:
                path = self.run_dirs(out)[0] / name
            damage(path, rng)
            ended = self.gpobench(*self.words(command, out), limit=LIMIT)
            outside = [p for p in out.rglob("*") if p.is_symlink() and os.readlink(p) not in ("nowhere", path.name)]
            if outside:
                raise NotHeld(f"wrong outcome: links {outside}")
            if not ended_well(ended):
                if ended.code not in (1, 2, FAULTY_RUN) or (ended.code == 1 and command != "regress"):
                    raise NotHeld(f"wrong outcome: exit code {ended.code}: {ended.err[-300:]}")
                if ended.code != 1:
                    one_line(ended.err)
                return "refused"
            if self.numbers(command, out, ended.out) == expected:
                return "same"
            if ended.err.strip() and (path.name in ended.err or path.parent.name in ended.err):
                return "told"
            raise NotHeld(
                f"silent number: exit code 0, another result, and nothing said of {path.name}: {ended.err[-200:]}"
            )

        return inject


def rows(place: Path) -> list[Row]:
    files = Files(place)
    made: list[Row] = []
    for name, text in {**FILES, SHARED: False}.items():
        for what, damage in {**DAMAGES, **(TEXT_DAMAGES if text else {})}.items():
            for command in ("run", "another run") if name == SHARED else COMMANDS[:-1]:
                made.append(
                    row(
                        "files",
                        what,
                        f"{name}, then {command}",
                        ["refused", "same", "told"],
                        files.damaged(name, damage, command),
                    )
                )
    return made

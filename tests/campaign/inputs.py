"""Damaged and random foreign input through every parser: a valid parse or a UserError of one line, nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import faulty
import numpy as np
from fault import NotHeld, Row, row

from gpobench.bench.errors import UserError

Make = Callable[[np.random.Generator], bytes]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, lost, doubled or inserted."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 8))):
        at = int(rng.integers(len(changed) + 1))
        act = int(rng.integers(5))
        if act == 0 and at < len(changed):
            changed[at] = int(rng.integers(256))
        elif act == 1:
            del changed[at : at + int(rng.integers(1, 40))]
        elif act == 2:
            changed[at:at] = changed[at : at + 30]
        elif act == 3:
            changed[at:at] = rng.choice(
                [b'"', b"\n", b"\x00", b"\xff", b"[", b"{", b",", b"\t", b"'", b"\\", b"NaN", b"-1"]
            )
        else:
            changed[at:at] = rng.bytes(int(rng.integers(1, 10)))
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "bytes changed": mutated,
    "cut": lambda content, rng: content[: int(rng.integers(len(content) + 1))],
    "random bytes": lambda content, rng: rng.bytes(int(rng.integers(0, 2000))),
    "UTF-16": lambda content, rng: content.decode("utf-8", "replace").encode("utf-16"),
    "null bytes": lambda content, rng: bytes(len(content)),
    "deep": lambda content, rng: b"[" * int(rng.integers(10_000, 200_000)),
    "deep objects": lambda content, rng: b'{"a":' * int(rng.integers(10_000, 50_000)),
}
JSON_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 10_000,
    [],
    {},
    [[]],
    {"a": {"a": 1}},
    "\ud800",
    2**70,
]


def a_value_exchanged(content: bytes, rng: np.random.Generator) -> bytes:
    """JSON in which one value, anywhere, is another one."""
    document = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(document)
    node, key = places[int(rng.integers(len(places)))]
    node[key] = JSON_VALUES[int(rng.integers(len(JSON_VALUES)))]
    return json.dumps(document).encode("utf-8", "replace")


def a_key_missing(content: bytes, rng: np.random.Generator) -> bytes:
    document = json.loads(content)
    if isinstance(document, dict) and document:
        del document[list(document)[int(rng.integers(len(document)))]]
    return json.dumps(document).encode()


class Inputs:
    """Valid input of every kind, and its parser."""

    def __init__(self, place: Path):
        self.place = place

    @cached_property
    def folder(self) -> Path:
        self.place.mkdir(parents=True, exist_ok=True)
        return self.place

    @cached_property
    def record(self) -> bytes:
        """A record as a run writes it."""
        from mini_runs import LIMIT, Runs

        runs = Runs(self.folder)
        out = runs.folder()
        ended = runs.gpobench(*runs.command(out), limit=LIMIT)
        if ended.code:
            raise RuntimeError(ended.err)
        return next(out.glob("*/record.json")).read_bytes()

    def pairs(self, rng: np.random.Generator) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pictures = [faulty.PNG(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(4)]
        table = pa.table({
            "caption": ["a red circle", "a sign"], "jpg_0": pictures[:2], "jpg_1": pictures[2:],
            "label_0": [1.0, 0.0], "label_1": [0.0, 1.0],
        })  # fmt: skip
        file = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({"gpobench": json.dumps({"spent": {"nfe": 10}})}), file)
        return file.getvalue()

    def parsed_file(self, suffix: str, make: Make, damage: Any, parse: Callable[[Path], object]) -> Any:
        def inject(rng: np.random.Generator) -> str:
            path = self.folder / f"input{suffix}"
            path.write_bytes(damage(make(rng), rng))
            try:
                parse(path)
            except UserError as error:
                if "\n" in str(error).strip() or not str(error).strip():
                    raise NotHeld(f"wrong outcome: not one line: {str(error)[:300]!r}") from None
                return "refused"
            return "parsed"

        return inject


def _prompts(path: Path) -> object:
    from gpobench.bench.assets.prompts import read_prompts

    rows = read_prompts(path, unique=False)
    for each in rows:
        each.text.encode()
    return rows


def _folder_table(path: Path) -> object:
    """A table beside images."""
    from gpobench.bench.experiments.image_folder import read_image_folder

    folder = path.parent / "images"
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(faulty.PNG(np.zeros((8, 8, 3), np.uint8)))
    for old in folder.glob("prompts.*"):
        old.unlink()
    (folder / f"prompts{path.suffix}").write_bytes(path.read_bytes())
    return read_image_folder(folder)


def _pairs(path: Path) -> object:
    from gpobench.bench.training.pairs import open_pairs

    opened = open_pairs(str(path))
    opened.spent()
    return [opened.images(row, 16, 16) for row in range(len(opened))]


def _record(path: Path) -> object:
    from gpobench.bench.evaluation import record

    return record.read(path)


def _settings(path: Path) -> object:
    from gpobench.bench.experiments.config import RunRequest, resolve

    return resolve(RunRequest("gpo", "ocr", "tiny", config=path))


def _budget(path: Path) -> object:
    from gpobench.bench.budget import load_budget

    return load_budget(str(path))


def _baseline(path: Path) -> object:
    from gpobench.leaderboards.baseline import read_baseline

    return read_baseline(path)


def _set(path: Path) -> object:
    from gpobench.bench.experiments.config import parse_settings

    return parse_settings([path.read_bytes().decode("utf-8", "replace")])


def _scorer(path: Path) -> object:
    from gpobench.bench.scoring.references import ScorerReference

    return ScorerReference.parse(path.read_bytes().decode("utf-8", "replace"))


LINES = b'a red circle\ntwo blue squares\na sign that says "HELLO"\n'
JSONL = b"".join(
    json.dumps({"prompt": f"a {colour} sign", "target": colour, "include": [{"class": "sign", "count": 1}]}).encode()
    + b"\n"
    for colour in ("red", "blue", "green")
)
CSV = b'prompt,target,count\n"a sign, red",HELLO,2\na card,"say ""X""",3\n'
TABLE = b'file,prompt,target\na.png,"a sign, red",HELLO\nb.png,a card,X\n'
TOML = b'beta = 1000.0\n[optim]\nlr = 1e-3\nwarmup = 5\n[evaluation]\nsplit = "validation"\n'


def rows(place: Path) -> list[Row]:
    inputs = Inputs(place)
    repo = Path(__file__).parents[2]
    sources: list[tuple[str, str, Make, Callable[[Path], object]]] = [
        ("prompts .txt", ".txt", lambda rng: LINES, _prompts),
        ("prompts .jsonl", ".jsonl", lambda rng: JSONL, _prompts),
        ("prompts .csv", ".csv", lambda rng: CSV, _prompts),
        ("prompts .tsv", ".tsv", lambda rng: CSV.replace(b",", b"\t"), _prompts),
        ("prompts .parquet", ".parquet", inputs.pairs, _prompts),
        ("a table of images .csv", ".csv", lambda rng: TABLE, _folder_table),
        ("a table of images .jsonl", ".jsonl", lambda rng: JSONL.replace(b'"target"', b'"file"'), _folder_table),
        ("preference pairs", ".parquet", inputs.pairs, _pairs),
        ("record.json", ".json", lambda rng: inputs.record, _record),
        ("--config", ".toml", lambda rng: TOML, _settings),
        ("--budget", ".toml", lambda rng: b"nfe = 100000\nseconds = 60\n", _budget),
        ("a baseline", ".toml", lambda rng: (repo / "leaderboards" / "short.toml").read_bytes(), _baseline),
        ("--set", ".set", lambda rng: b"optim.lr=[1, 2, {a = 3}]", _set),
        ("a scorer's name", ".name", lambda rng: b"pickscore*0.5+reader:x+file.py:Name*2", _scorer),
    ]
    made: list[Row] = []
    for name, suffix, make, parse in sources:
        damages = dict(DAMAGES)
        if suffix == ".json":
            damages |= {"a value exchanged": a_value_exchanged, "a key missing": a_key_missing}
        for what, damage in damages.items():
            weight = 6.0 if what in ("bytes changed", "a value exchanged") else 1.0
            inject = inputs.parsed_file(suffix, make, damage, parse)
            made.append(row("inputs", what, name, ["refused", "parsed"], inject, weight=weight, seconds=30.0))
    return made

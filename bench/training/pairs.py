"""Preference pairs on disk: two images of one caption, and which of them was liked better.

The columns are those of Pick-a-Pic v2 (huggingface.co/datasets/yuvalkirstain/pickapic_v2): `caption`, `jpg_0` and `jpg_1` (an
encoded image: raw bytes, or struct{bytes, path}), `label_0` and `label_1` (1 and 0; 0.5 twice is a tie), and `has_label` where
there is one. Read from local files only: one .parquet file, a folder of them (a hub snapshot has data/*.parquet), or a folder
that `datasets.save_to_disk` wrote. A row that cannot serve is skipped, and counted under its reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..errors import UserError
from ..images import fitted_pixels
from ..losses import apart
from ..spec import Images

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
SIDES = ("jpg_0", "jpg_1")
STATEMENT = b"gpobench"  # key of the schema's metadata: JSON of what made the set, and what that cost
HELD = 256 * 2**20  # bytes of encoded images kept in memory between draws

Choose = Literal["extremes", "random", "all"]


def compare(reward: Tensor, choose: Choose, gap: float, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P, G) rewards -> which group, its winner, its loser, all (N,): the pairs whose rewards differ by more than gap.

    extremes: the best against the worst; random: one pair of a group, drawn by its u (P,) in [0, 1); all: every one.
    A NaN is no reward and makes no pair. Of equal rewards the first counts. Everything is on the CPU.
    """
    r = reward.detach().cpu().double()
    ahead = r[:, :, None] - r[:, None, :]  # (P, G, G): how far i is ahead of j
    told = apart(r, gap)
    if choose == "all":
        which, win, lose = told.nonzero().unbind(1)
        return which, win, lose
    flat = told.flatten(1)
    if choose == "extremes":
        pick = ahead.masked_fill(~told, -torch.inf).flatten(1).argmax(1)
    else:
        nth = (u.cpu().double() * flat.sum(1)).floor()
        pick = (flat.cumsum(1) > nth[:, None]).int().argmax(1)
    which = flat.any(1).nonzero().flatten()
    return which, pick[which] // r.shape[1], pick[which] % r.shape[1]


@dataclass(frozen=True)
class PairSet:
    """A data set of pairs, looked through once; its images stay on disk until they are drawn."""

    reference: str  # as it was named
    captions: list[str]  # the different ones of the usable rows, in order of appearance
    caption: np.ndarray[Any, np.dtype[np.int64]]  # (N,) of each usable row: which caption
    place: np.ndarray[Any, np.dtype[np.int64]]  # (N, 3) of each usable row: chunk, row in it, side of the winner
    skipped: Counter[str]  # why rows cannot serve -> how many
    sha256: str  # of captions, labels and encoded images, whatever file format holds them
    statement: Mapping[str, Any]  # what the set says of its making; {} where it says nothing
    chunks: list[tuple[Path, int]]  # row groups of parquet files, record batches of arrow files
    _held: dict[int, Any] = field(default_factory=dict[int, Any], repr=False)  # chunks in memory, the oldest first

    def __len__(self) -> int:
        """How many rows can serve, as far as can be told without decoding an image."""
        return len(self.place)

    def spent(self) -> dict[str, int]:
        """What the making of the set cost, {} where it does not say."""
        told = self.statement.get("spent", {})
        return {key: int(told[key]) for key in ("nfe", "images", "reward_calls") if told.get(key)}

    def images(self, row: int, height: int, width: int) -> Images | str:
        """(2, H, W, 3): the winner and the loser of a usable row, cropped and resized; or why it cannot serve after all."""
        chunk, at, better = (int(n) for n in self.place[row])
        table = self._chunk(chunk)
        try:
            sides = [fitted_pixels(_content(table.column(name)[at]), height, width) for name in SIDES]
        except Exception:  # Pillow meets the bytes of strangers: there is no end to what it raises
            return "unreadable image"
        if np.array_equal(sides[0], sides[1]):
            return "identical images"
        return np.stack([sides[better], sides[1 - better]])

    def _chunk(self, number: int) -> Any:
        if number not in self._held:
            file, part = self.chunks[number]
            self._held[number] = _read(file, part)
            while len(self._held) > 1 and sum(table.nbytes for table in self._held.values()) > HELD:
                del self._held[next(iter(self._held))]
        return self._held[number]


def open_pairs(reference: str) -> PairSet:
    """Look through a data set once, from beginning to end: which rows can serve, why the others cannot, and its hash.

    Raises UserError on a path that is not there or holds no data set, other columns, or no usable pair at all.
    """
    skipped: Counter[str] = Counter()
    which: dict[str, int] = {}
    captions: list[int] = []
    places: list[tuple[int, int, int]] = []
    chunks: list[tuple[Path, int]] = []
    total, statement = hashlib.sha256(), dict[str, Any]()
    for file in _files(reference):
        schema = _schema(reference, file)
        statement = statement or _statement(schema)
        columns = [*COLUMNS, *(["has_label"] if "has_label" in schema.names else [])]
        for part in range(_parts(reference, file)):
            for at, row in enumerate(_rows(reference, file, part, columns)):
                verdict = _verdict(row, total)
                if isinstance(verdict, str):
                    skipped[verdict] += 1
                else:
                    captions.append(which.setdefault(row["caption"], len(which)))
                    places.append((len(chunks), at, verdict))
            chunks.append((file, part))
    if not places:
        why = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
        raise UserError(f"pairs {reference}: no usable pair: {why or 'it has no rows'}")
    return PairSet(
        reference=reference, captions=list(which), caption=np.array(captions), place=np.array(places), skipped=skipped,
        sha256=total.hexdigest(), statement=statement, chunks=chunks,
    )  # fmt: skip


def captions(reference: str) -> list[str]:
    """The different captions of a data set, of skipped rows too: to be checked against the prompts that judge."""
    found: dict[str, None] = {}
    for file in _files(reference):
        _schema(reference, file)
        for part in range(_parts(reference, file)):
            found.update(dict.fromkeys(row["caption"] for row in _rows(reference, file, part, ["caption"])))
    return [caption for caption in found if caption]


def _verdict(row: Mapping[str, Any], total: Any) -> int | str:
    """The side of the winner, or why the row cannot serve; the row goes into the hash either way."""
    images = [_content(row[side]) for side in SIDES]
    labels = [None if (label := row[name].as_py()) is None else float(label) for name in ("label_0", "label_1")]
    given = "has_label" not in row or row["has_label"].as_py() is not False
    for part in (json.dumps([row["caption"], *labels, given]).encode(), *images):
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    if not given or any(label not in (0, 0.5, 1) for label in labels):
        return "without label"
    if labels[0] == labels[1]:
        return "tie"
    if set(labels) != {0, 1}:
        return "without label"
    if not row["caption"] or not row["caption"].strip():
        return "without caption"
    if not all(images):
        return "missing image"
    if images[0] == images[1]:
        return "identical images"
    return 0 if labels[0] == 1 else 1


def _content(cell: Any) -> bytes:
    """The encoded image of a cell, b"" where there is none; a struct that only names a file elsewhere has none."""
    value = cell.as_py()
    value = value.get("bytes") if isinstance(value, dict) else value
    return value or b""


# Files. A chunk is what can be read at once: a row group of a parquet file, a record batch of an arrow file.


def _files(reference: str) -> list[Path]:
    path = Path(reference)
    if not path.exists():
        raise UserError(f"pairs: no such path: {reference} (`gpobench pairs` makes a set from a model and a scorer)")
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"pairs: {reference} is no .parquet file")
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise UserError(f"pairs: {reference} holds several splits, name one of its folders: {', '.join(splits)}")
    for pattern in ("data/*.parquet", "*.parquet", "*.arrow"):
        if files := sorted(path.glob(pattern)):
            # A snapshot may hold splits for judging beside the one to learn from: train-00000-of-00004-HASH.parquet.
            train = [file for file in files if re.match(r"train-\d+-of-\d+", file.name)]
            return train or files
    raise UserError(f"pairs: {reference} has no data/*.parquet, *.parquet or *.arrow in it")


def _schema(reference: str, file: Path) -> Any:
    """The columns of a file, checked."""
    with _told(file):
        schema = (
            pq.read_schema(file) if file.suffix == ".parquet" else pa.ipc.open_stream(pa.memory_map(str(file))).schema
        )
    if missing := [name for name in COLUMNS if name not in schema.names]:
        raise UserError(
            f"pairs {reference}: no column {', '.join(missing)} in {file.name}; "
            f"found {', '.join(schema.names) or 'none'}; wanted {', '.join(COLUMNS)}"
        )
    for name in COLUMNS:
        kind = schema.field(name).type
        if name in SIDES:
            content = (
                kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
            )
            fits, wanted = (
                pa.types.is_binary(content) or pa.types.is_large_binary(content),
                "bytes or struct{bytes, path}",
            )
        elif name == "caption":
            fits, wanted = pa.types.is_string(kind) or pa.types.is_large_string(kind), "text"
        else:
            fits, wanted = pa.types.is_integer(kind) or pa.types.is_floating(kind), "a number"
        if not (fits or pa.types.is_null(kind)):  # null: a column in which nothing is set
            raise UserError(f"pairs {reference}: column {name} of {file.name} is {kind}, wanted {wanted}")
    return schema


def _statement(schema: Any) -> dict[str, Any]:
    try:
        told = json.loads((schema.metadata or {}).get(STATEMENT, b"{}"))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _parts(reference: str, file: Path) -> int:
    with _told(file):
        if file.suffix == ".parquet":
            return pq.read_metadata(file).num_row_groups
        return len(_mapped(file))


def _rows(reference: str, file: Path, part: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a chunk, a few at a time in memory; captions as text, the rest as arrow's scalars."""
    with _told(file):
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=32, row_groups=[part], columns=columns):
                    yield from _scalars(batch, columns)
        else:
            yield from _scalars(_mapped(file)[part], columns)


def _scalars(batch: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    for at in range(len(batch)):
        row = {name: batch.column(name)[at] for name in columns}
        yield {**row, "caption": row["caption"].as_py()}


def _read(file: Path, part: int) -> Any:
    with _told(file):
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as opened:
                return opened.read_row_group(part, columns=list(SIDES))
        return _mapped(file)[part]


def _mapped(file: Path) -> list[Any]:
    """The record batches of an arrow stream: mapped, not read."""
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all().to_batches()


@contextmanager
def _told(file: Path) -> Generator[None]:
    """Arrow's errors as one line that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"pairs: {file} cannot be read: {str(error).splitlines()[0]}") from error

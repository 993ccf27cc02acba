"""Preference pairs on disk: two images of one caption, and which of them was preferred.

The columns are those of Pick-a-Pic v2 (huggingface.co/datasets/yuvalkirstain/pickapic_v2): `caption`, `jpg_0` and `jpg_1` (an
encoded image: raw bytes, or struct{bytes, path}), `label_0` and `label_1` (1 and 0; 0.5 twice is a tie), and `has_label` where
there is one (true or false, as a boolean, a number or text; a row that leaves it empty is not labelled). Read from local files only:
one .parquet file, a folder of them (a hub snapshot has data/*.parquet), or a folder that `datasets.save_to_disk` wrote. A row that
cannot be used is skipped, and counted under its reason.
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

from ..budget import STATED
from ..errors import UserError
from ..images import UnsupportedPixels, fitted_pixels
from ..losses import margin_mask
from ..spec import Images

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
SIDES = ("jpg_0", "jpg_1")
STATEMENT = b"gpobench"  # key of the schema's metadata: JSON of how the set was made, and what that cost
HAS_LABEL = {
    "true": True,
    "1": True,
    "1.0": True,
    "yes": True,
    "false": False,
    "0": False,
    "0.0": False,
    "no": False,
    "": False,
}
CACHED = 256 * 2**20  # bytes of encoded images kept in memory between draws

Choose = Literal["extremes", "random", "all"]


def compare(reward: Tensor, choose: Choose, margin: float, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose pairs whose rewards differ by more than margin; returns group, winner and loser, each (N,), on the CPU.

    A NaN makes no pair. Of equal rewards the first counts.

    Args:
        reward: (P, G).
        choose: "extremes" takes the best and the worst of a group, "random" one pair of it, "all" every pair.
        margin: the smallest difference, exclusive.
        u: (P,) uniform in [0, 1); draws the random pairs.
    """
    r = reward.detach().cpu().double()
    difference = r[:, :, None] - r[:, None, :]  # (P, G, G): r_i - r_j
    valid = margin_mask(r, margin)
    if choose == "all":
        which, win, lose = valid.nonzero().unbind(1)
        return which, win, lose
    flat = valid.flatten(1)
    if choose == "extremes":
        pick = difference.masked_fill(~valid, -torch.inf).flatten(1).argmax(1)
    else:
        nth = (u.cpu().double() * flat.sum(1)).floor()
        pick = (flat.cumsum(1) > nth[:, None]).int().argmax(1)
    which = flat.any(1).nonzero().flatten()
    return which, pick[which] // r.shape[1], pick[which] % r.shape[1]


@dataclass(frozen=True)
class PairSet:
    """A data set of pairs, indexed once; its images stay on disk until they are drawn."""

    reference: str  # the path it was opened by
    captions: list[str]  # distinct captions of the usable rows, in order of appearance
    caption: np.ndarray[Any, np.dtype[np.int64]]  # (N,) index into captions of each usable row
    place: np.ndarray[Any, np.dtype[np.int64]]  # (N, 3) of each usable row: chunk, row in it, side of the winner
    skipped: Counter[str]  # reason -> number of rows that cannot be used
    sha256: str  # of captions, labels and encoded images, whatever file format holds them
    statement: Mapping[str, Any]  # how the set was made, from its metadata; {} where they state nothing
    chunks: list[tuple[Path, int]]  # row groups of parquet files, record batches of arrow files
    _cached: dict[int, Any] = field(default_factory=dict[int, Any], repr=False)  # chunks in memory, oldest first

    def __len__(self) -> int:
        """Number of usable rows, as far as is known without decoding the images."""
        return len(self.place)

    def spent(self) -> dict[str, int]:
        """What making the set cost by currency, {} where it does not state that. Raises UserError on what is no cost."""
        return stated_cost(self.statement, self.chunks[0][0])

    def images(self, row: int, height: int, width: int) -> Images | str:
        """(2, H, W, 3): the winner and the loser of a usable row, cropped and resized; or why it cannot be used after all."""
        chunk, chunk_row, winner = (int(n) for n in self.place[row])
        table = self._chunk(chunk)
        try:
            sides = [fitted_pixels(_content(table.column(name)[chunk_row]), height, width) for name in SIDES]
        except UnsupportedPixels:
            return "image of unsupported pixels"
        except Exception:  # Pillow may raise anything on bytes from elsewhere
            return "unreadable image"
        if np.array_equal(sides[0], sides[1]):
            return "identical images"
        return np.stack([sides[winner], sides[1 - winner]])

    def _chunk(self, number: int) -> Any:
        if number not in self._cached:
            file, part = self.chunks[number]
            self._cached[number] = _read(file, part)
            while len(self._cached) > 1 and sum(table.nbytes for table in self._cached.values()) > CACHED:
                del self._cached[next(iter(self._cached))]
        return self._cached[number]


def stated_cost(statement: Mapping[str, Any], file: Path) -> dict[str, int]:
    """The cost by currency that a set states in its metadata: whole numbers from 0 up. Raises UserError on anything else.

    file: the file whose metadata state it. What it says is charged to every run that learns from the set, so a number below
    zero would buy budget.
    """
    spent: Any = statement.get("spent", {})
    if not isinstance(spent, Mapping):
        raise UserError(
            f"pairs: {file} states spent as {_shown(spent)}; wanted amounts by currency ({', '.join(STATED)})"
        )
    amounts: dict[str, int] = {}
    for currency in STATED:
        amount: Any = spent.get(currency, 0)
        whole = isinstance(amount, int | float) and not isinstance(amount, bool) and amount >= 0 and amount % 1 == 0
        if not whole:
            raise UserError(
                f"pairs: {file} states spent.{currency} as {_shown(amount)}; wanted a whole number from 0 up: make the set "
                "again, or correct its metadata"
            )
        amounts[currency] = int(amount)
    return {currency: amount for currency, amount in amounts.items() if amount}


def _shown(value: Any) -> str:
    """A value of the metadata as JSON, cut to 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def open_pairs(reference: str) -> PairSet:
    """Read a data set once from beginning to end: which rows can be used, why the others cannot, and its hash.

    Raises UserError on a path that does not exist or holds no data set, on other columns, or without any usable pair.
    """
    skipped: Counter[str] = Counter()
    caption_ids: dict[str, int] = {}
    captions: list[int] = []
    places: list[tuple[int, int, int]] = []
    chunks: list[tuple[Path, int]] = []
    total, statement = hashlib.sha256(), dict[str, Any]()
    for file in _files(reference):
        schema = _schema(reference, file)
        if not statement:
            statement = _statement(schema)
            stated_cost(statement, file)
        columns = [*COLUMNS, *(["has_label"] if "has_label" in schema.names else [])]
        for part in range(_parts(reference, file)):
            for chunk_row, row in enumerate(_rows(reference, file, part, columns)):
                winner = _winner(row, _is_labelled(file, row), total)
                if isinstance(winner, str):
                    skipped[winner] += 1
                else:
                    captions.append(caption_ids.setdefault(row["caption"], len(caption_ids)))
                    places.append((len(chunks), chunk_row, winner))
            chunks.append((file, part))
    if not places:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
        raise UserError(f"pairs {reference}: no usable pair: {reasons or 'it has no rows'}")
    return PairSet(
        reference=reference,
        captions=list(caption_ids),
        caption=np.array(captions),
        place=np.array(places),
        skipped=skipped,
        sha256=total.hexdigest(),
        statement=statement,
        chunks=chunks,
    )


def captions(reference: str) -> list[str]:
    """The distinct captions of a data set, of skipped rows too, to be compared with evaluation prompts."""
    distinct: dict[str, None] = {}
    for file in _files(reference):
        _schema(reference, file)
        for part in range(_parts(reference, file)):
            distinct.update(dict.fromkeys(row["caption"] for row in _rows(reference, file, part, ["caption"])))
    return [caption for caption in distinct if caption]


def _is_labelled(file: Path, row: Mapping[str, Any]) -> bool:
    """Whether a row is labelled, as its `has_label` says; UserError on a value that says neither."""
    if "has_label" not in row:
        return True
    value = row["has_label"].as_py()
    labelled = HAS_LABEL.get("" if value is None else str(value).strip().lower())
    if labelled is None:
        raise UserError(f"pairs: has_label of a row of {file} is {value!r}, which is neither true nor false")
    return labelled


def _winner(row: Mapping[str, Any], labelled: bool, total: Any) -> int | str:
    """The side of the winner, or why the row cannot be used; the row goes into the hash `total` either way."""
    images = [_content(row[side]) for side in SIDES]
    labels = [None if (label := row[name].as_py()) is None else float(label) for name in ("label_0", "label_1")]
    for part in (json.dumps([row["caption"], *labels, labelled]).encode(), *images):
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    if not labelled or any(label not in (0, 0.5, 1) for label in labels):
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


# Files. A chunk is read at once: a row group of a parquet file, a record batch of an arrow file.


def _files(reference: str) -> list[Path]:
    path = Path(reference)
    if not path.exists():
        raise UserError(f"pairs: no such path: {reference} (`gpobench pairs` makes a set from a model and a scorer)")
    if path.is_file():
        if path.suffix != ".parquet":
            raise UserError(f"pairs: {reference} is not a .parquet file")
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise UserError(f"pairs: {reference} holds several splits, name one of its folders: {', '.join(splits)}")
    for pattern in ("data/*.parquet", "*.parquet", "*.arrow"):
        if files := sorted(path.glob(pattern)):
            # A snapshot may hold evaluation splits beside the training split: train-00000-of-00004-HASH.parquet.
            train = [file for file in files if re.match(r"train-\d+-of-\d+", file.name)]
            return train or files
    raise UserError(f"pairs: {reference} has no data/*.parquet, *.parquet or *.arrow in it")


def _schema(reference: str, file: Path) -> Any:
    """The schema of a file. Raises UserError where a column is missing or of another type."""
    with _reading(file):
        schema = (
            pq.read_schema(file) if file.suffix == ".parquet" else pa.ipc.open_stream(pa.memory_map(str(file))).schema
        )
    if missing := [name for name in COLUMNS if name not in schema.names]:
        raise UserError(
            f"pairs {reference}: no column {', '.join(missing)} in {file.name}; "
            f"found {', '.join(schema.names) or 'none'}; wanted {', '.join(COLUMNS)}"
        )
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise UserError(f"pairs {reference}: {file.name} has several columns called {', '.join(twice)}")
    for name in COLUMNS:
        kind = schema.field(name).type
        if name in SIDES:
            content = (
                kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
            )
            fits = pa.types.is_binary(content) or pa.types.is_large_binary(content)
            wanted = "bytes or struct{bytes, path}"
        elif name == "caption":
            fits, wanted = pa.types.is_string(kind) or pa.types.is_large_string(kind), "text"
        else:
            fits, wanted = pa.types.is_integer(kind) or pa.types.is_floating(kind), "a number"
        if not (fits or pa.types.is_null(kind)):  # null: a column in which nothing is set
            raise UserError(f"pairs {reference}: column {name} of {file.name} is {kind}, wanted {wanted}")
    return schema


def _statement(schema: Any) -> dict[str, Any]:
    try:
        statement = json.loads((schema.metadata or {}).get(STATEMENT, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return statement if isinstance(statement, dict) else {}


def _parts(reference: str, file: Path) -> int:
    with _reading(file):
        if file.suffix == ".parquet":
            return pq.read_metadata(file).num_row_groups
        return len(_mapped(file))


def _rows(reference: str, file: Path, part: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a chunk, a few at a time in memory; captions as text, the rest as arrow's scalars."""
    with _reading(file):
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(batch_size=32, row_groups=[part], columns=columns):
                    yield from _scalars(batch, columns)
        else:
            yield from _scalars(_mapped(file)[part], columns)


def _scalars(batch: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    for i in range(len(batch)):
        row = {name: batch.column(name)[i] for name in columns}
        yield {**row, "caption": row["caption"].as_py()}


def _read(file: Path, part: int) -> Any:
    with _reading(file):
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as opened:
                return opened.read_row_group(part, columns=list(SIDES))
        return _mapped(file)[part]


def _mapped(file: Path) -> list[Any]:
    """The record batches of an arrow stream, mapped into memory."""
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all().to_batches()


@contextmanager
def _reading(file: Path) -> Generator[None]:
    """Turn errors of arrow in the block into a UserError that names the file."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
        message = str(error).strip() or type(error).__name__
        raise UserError(f"pairs: {file} cannot be read: {message.splitlines()[0]}") from error

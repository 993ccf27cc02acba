"""Album of a report: embeds the images that runs stored of the same noise, before and after training, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bench.errors import UserError
from ..bench.evaluation import record
from .run_files import scorer_notes
from .runs import LoadedRun

IMAGES = "samples/images.npz"  # of a run: the images before and after, and their noises
MAX_ORIGINAL = 160  # pixels of the longer side: images up to this size are stored unchanged as PNG, larger ones as JPEG
MAX_SIDE = 320  # pixels: the longer side of a larger image in a page
MAX_BYTES = 3_000_000  # of all images in a page

Noise = tuple[int, int]  # prompt and image
Places = tuple[int | None, int | None]  # before and after, as indices of an album's images; None: not stored


@dataclass(frozen=True)
class Frame:
    """Images of one noise before and after, as indices of an album's images; None: this run did not store it."""

    before: int | None
    after: int | None
    scores: Mapping[str, tuple[float, float]]  # scorer/metric -> before and after
    notes: Mapping[str, tuple[str, str]]  # scorer -> its note before and after, or why it could not score


@dataclass(frozen=True)
class Album:
    """Images of the same noises for every row."""

    pictures: Sequence[str]  # data URIs, equal ones once
    size: tuple[int, int]  # width and height in pixels as they were sampled
    noises: Sequence[Noise]
    frames: Mapping[str, Sequence[Frame]]  # label -> (noises,)
    seeds: Mapping[str, int]  # label -> the training seed shown


def make_album(
    rows: Mapping[str, Sequence[LoadedRun]], keys: Sequence[str], max_bytes: int = MAX_BYTES
) -> Album | None:
    """Collect the images that the first run of each row stored, of as many noises as fit; None where no run stored any.

    rows: label -> the runs of that row. keys: the scorer/metric shown with an image. max_bytes: of all data URIs.
    Raises UserError on images that cannot be read.
    """
    first_runs = {label: next((r for r in group if _file(r).is_file()), None) for label, group in rows.items()}
    runs = {label: run for label, run in first_runs.items() if run is not None}
    stored = {label: _read_images(record.verified(run.folder, run.record, IMAGES)) for label, run in runs.items()}
    indices = {
        label: {(int(p), int(o)): k for k, (p, o) in enumerate(zip(each["prompt"], each["ordinal"], strict=True))}
        for label, each in stored.items()
    }
    noises = list(next(iter(indices.values()), {}))
    if not noises:
        return None
    pictures: dict[str, int] = {}
    places: list[dict[str, Places]] = []
    for noise in noises:
        extended = dict(pictures)
        of_noise = {label: _place(stored[label], index.get(noise), extended) for label, index in indices.items()}
        if places and sum(map(len, extended)) > max_bytes:
            break
        pictures = extended
        places.append(of_noise)
    noises = noises[: len(places)]
    notes = {label: scorer_notes(run, set(noises)) for label, run in runs.items()}
    frames = {
        label: [
            Frame(*of_noise[label], _scores(run, noise, keys), notes[label].get(noise, {}))
            for noise, of_noise in zip(noises, places, strict=True)
        ]
        for label, run in runs.items()
    }
    height, width = next(iter(stored.values()))["before"].shape[1:3]
    seeds = {label: run.record.seed for label, run in runs.items()}
    return Album(list(pictures), (width, height), noises, frames, seeds)


def _place(stored: Mapping[str, NDArray[Any]], at: int | None, pictures: dict[str, int]) -> Places:
    """Return the indices of an image before and after in `pictures`, adding new ones."""
    uris = ["" if at is None else _data_uri(stored[phase][at]) for phase in ("before", "after")]
    before, after = (pictures.setdefault(uri, len(pictures)) if uri else None for uri in uris)
    return before, after


def _file(run: LoadedRun) -> Path:
    return run.folder / IMAGES


def _read_images(path: Path) -> dict[str, NDArray[Any]]:
    """Read images before and after, (K, H, W, 3) uint8, and their prompt and ordinal, (K,)."""
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in ("before", "after", "prompt", "ordinal")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the pictures in {path}: {error}") from None
    images = [arrays["before"], arrays["after"]]
    if any(i.ndim != 4 or i.dtype != np.uint8 or i.shape != images[0].shape for i in images):
        raise UserError(f"cannot read the pictures in {path}: they are not uint8 images before and after")
    return arrays


def _data_uri(image: NDArray[Any]) -> str:
    """Encode a small image as PNG and a large one as a reduced JPEG, so that a page can contain more of them."""
    from PIL import Image

    picture, out = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= MAX_ORIGINAL:
        picture.save(out, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    picture.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _scores(run: LoadedRun, noise: Noise, keys: Sequence[str]) -> dict[str, tuple[float, float]]:
    return {key: (float(run.before[key][noise]), float(run.after[key][noise])) for key in keys if run.has(key)}

"""Scores for any folder of images: every image is scored with its prompt by every scorer, in one table.

Scores are stored beside the table until all are there, keyed by the scorer and by the content of image and prompt: after a stop at
any moment the same command continues, and the table is the same to the byte.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import registry
from ..errors import Interrupted, UserError
from ..evaluation.estimates import invalid
from ..files import make_place, read_json, utf_8_name, write_atomically
from ..images import UnsupportedPixels, read_header, upright_pixels
from ..progress import NullProgress, Progress
from ..scoring.scorers import ask, close_scorers, open_scorer
from ..scoring.worker_setting import WorkerSetting
from ..spec import Images, Prompt, Scorer, Scores, SupportsSummary, Task
from ..stats import intervals
from .image_folder import ImageFolder, PromptedImage, read_image_folder

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("file", "prompt", "stratum", "scorer", "scorer_id", "metric", "value", "reason", "note")
JPEG = "JPEG: scores differ from PNG"
ALPHA = "may have transparent parts, which are scored on white"
ANIMATED = "hold several pictures, of which the first is scored"


@dataclass(frozen=True)
class FolderRequest:
    """Which images to score, by which scorers, into which table."""

    folder: Path
    scorers: Sequence[str]  # references, as `scorers.open_scorer` takes them
    scorer_locations: Mapping[str, Any] = field(default_factory=dict[str, Any])  # scorer -> where it is served
    prompts: Path | None = None  # a file or folder of prompts, where the folder of images has none
    task: str | None = None  # reads the facts of the prompts, and aggregates in its own way
    domain: str = "open"
    out: Path = Path("scores.parquet")  # .parquet or .csv, with the columns COLUMNS
    rows: int = 16  # images scored at once; only images of one size are

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"--rows must be at least 1, got {self.rows}")
        if not self.scorers:
            raise UserError("score: name at least one --scorer")
        if self.out.suffix not in (".parquet", ".csv"):
            raise UserError(f"--out {self.out}: the table is a .parquet or a .csv file")

    @property
    def partial(self) -> Path:
        """The folder of scores that are stored until the table is written."""
        return self.out.with_name(f"{self.out.name}.partial")


def score_folder(
    request: FolderRequest,
    *,
    progress: Progress | None = None,
    fresh: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Score every image of a folder with every scorer, and write the table.

    A file that is no image, or half of one, is a row without a score and with the reason. An image that a scorer failed on is
    scored again by the same command if that was stopped, and not if it ended.

    Args:
        request: what to score.
        progress: where progress is shown.
        fresh: delete the scores of an earlier start.
        interrupted: asked before every batch whether to stop.

    Returns:
        folder, layout, images, failed (images without some score), scores (`scorer/metric` -> mean and ci over prompts, strata
        weighted equally; n prompts, images, failed), scorers (name -> id), summary (the task's own aggregates), invalid (more
        than 0.5 % of a scorer's images failed), reasons (reason -> count), notes, path.

    Raises:
        UserError: on what a user can correct.
        Interrupted: when asked to stop.
    """
    progress = progress or NullProgress()
    make_place(request.out)
    task: Task | None = registry.task(request.task) if request.task else None
    image_folder = read_image_folder(
        request.folder, prompts=request.prompts, task=task, domain=request.domain, ignore=[request.out]
    )
    if fresh:
        shutil.rmtree(request.partial, ignore_errors=True)
    files = [_inspect(request.folder, image) for image in image_folder.images]
    scorers: list[Scorer] = []
    try:
        scorers += (
            open_scorer(reference, request.scorer_locations, WorkerSetting.parse()) for reference in request.scorers
        )
        names = [scorer.name for scorer in scorers]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"two scorers are called {', '.join(repeated)}: score them into two tables")
        scores = _score(request, files, scorers, progress, interrupted)
    finally:
        close_scorers(scorers)
    table = _table(files, scorers, scores)
    not_written = ""
    try:
        _write(request.out, table)
        shutil.rmtree(request.partial, ignore_errors=True)
    except OSError as error:
        not_written = f"cannot write {request.out}: {error.strerror or error}"
    summary = _summary(table, image_folder, files, task)
    for reason, count in summary["reasons"].items():
        progress.message(f"{count} not scored: {reason}")
    ids = {scorer.name: scorer.id for scorer in scorers}
    return {
        "folder": str(request.folder),
        **summary,
        "scorers": ids,
        "path": str(request.out),
        "not_written": not_written,
    }


# Images


@dataclass(frozen=True)
class ImageFile:
    """An image file as far as its header says; `error` where it is no image."""

    image: PromptedImage
    digest: str
    size: tuple[int, int]  # width and height in pixels, upright
    jpeg: bool
    alpha: bool = False  # may have transparent parts
    animated: bool = False  # holds several pictures
    error: str = ""

    def key(self, scorer: Scorer) -> str:
        """A hash of what a score depends on: the scorer, the file's bytes, the prompt and its facts."""
        prompt = self.image.prompt
        facts = json.dumps(prompt.meta, sort_keys=True, default=str)
        parts = "\0".join((scorer.id, *scorer.metrics, self.digest, prompt.text, facts, prompt.stratum))
        return sha256(parts.encode()).hexdigest()


def _inspect(folder: Path, image: PromptedImage) -> ImageFile:
    """Hash a file and read its header."""
    path = folder / image.file
    if not path.is_file():  # reading a pipe would wait for its other end
        reason = "the link leads nowhere" if path.is_symlink() else "this is no file"
        return ImageFile(image, "", (0, 0), False, error=reason)
    try:
        raw = path.read_bytes()
    except OSError as error:
        return ImageFile(image, "", (0, 0), False, error=f"the file cannot be read: {error.strerror}")
    digest, jpeg = sha256(raw).hexdigest(), raw.startswith(b"\xff\xd8\xff")
    try:
        header = read_header(raw)
    except Exception as error:  # a decoder given foreign bytes may fail in any way
        return ImageFile(image, digest, (0, 0), jpeg, error=_decoding_error(error))
    return ImageFile(image, digest, header.size, jpeg, header.alpha, header.animated)


def _open(folder: Path, file: ImageFile) -> Images | str:
    """(H, W, 3), or why the image cannot be scored. Raises UserError where the file changed since it was inspected."""
    path = folder / file.image.file
    try:
        raw = path.read_bytes()
    except OSError as error:
        return f"the file cannot be read: {error.strerror}"
    if sha256(raw).hexdigest() != file.digest:
        raise UserError(f"{path} changed while it was scored; start again")
    try:
        return upright_pixels(raw)
    except Exception as error:
        return _decoding_error(error)


def _decoding_error(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnsupportedPixels):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:  # ultralytics, once imported, lets Pillow try a format whose package is not installed
        if isinstance(cause, UnidentifiedImageError):  # its message holds an address in memory
            return "this is no image"
        cause = cause.__context__
    message = str(error).strip()
    return f"this is no whole image: {message.splitlines()[0] if message else type(error).__name__}"


# Scoring


@dataclass(frozen=True)
class ImageScore:
    """The scores of one image by one scorer; NaN with a reason where there is none."""

    value: Mapping[str, float]  # by metric
    reason: str = ""
    note: str = ""


class _RaisingScorer:
    """A scorer whose UserError about the request is remembered; other failures concern one image and are its reason."""

    def __init__(self, scorer: Scorer) -> None:
        self.id, self.name, self.metrics, self._scorer = scorer.id, scorer.name, scorer.metrics, scorer
        self.error: UserError | None = None

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        try:
            return self._scorer(images, prompts)
        except UserError as error:
            self.error = error
            raise


def _score(
    request: FolderRequest,
    files: Sequence[ImageFile],
    scorers: Sequence[Scorer],
    progress: Progress,
    interrupted: Callable[[], bool],
) -> dict[tuple[str, int], ImageScore]:
    """(scorer's name, index of the file) -> scores. Batches are the same whatever an earlier start has scored."""
    stored = _read_stored(request.partial)
    scores = {(s.name, i): _unscored(s, file.error) for s in scorers for i, file in enumerate(files) if file.error}
    total = len(files) * len(scorers)
    progress.phase(f"scoring with {', '.join(scorer.name for scorer in scorers)}", total)
    progress.advance(len(scores))
    for batch in _batches(files, request.rows):
        images: list[Images | str] = []
        for scorer in scorers:
            keys = [files[i].key(scorer) for i in batch]
            if not all(key in stored for key in keys):
                if interrupted():
                    count = f"{len(scores):,} of {total:,} scores"
                    raise Interrupted(f"stopped after {count}; the same command goes on from there")
                images = images or [_open(request.folder, files[i]) for i in batch]
                fresh = dict(
                    zip(keys, _score_batch(scorer, [files[i].image.prompt for i in batch], images), strict=True)
                )
                _store(request.partial, {key: score for key, score in fresh.items() if not score.reason})
                stored |= fresh
            scores |= {(scorer.name, i): stored[key] for i, key in zip(batch, keys, strict=True)}
            progress.advance(len(batch))
    return scores


def _batches(files: Sequence[ImageFile], rows: int) -> list[list[int]]:
    """Indices of images of one size together, in order."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, file in enumerate(files):
        if not file.error:
            by_size.setdefault(file.size, []).append(i)
    return [same[start : start + rows] for same in by_size.values() for start in range(0, len(same), rows)]


def _score_batch(scorer: Scorer, prompts: Sequence[Prompt], images: Sequence[Images | str]) -> list[ImageScore]:
    """Score one batch; an image that would not open gets its reason. Raises UserError where the scorer refuses the request."""
    opened = [row for row, image in enumerate(images) if not isinstance(image, str)]
    batch = [_unscored(scorer, image if isinstance(image, str) else "") for image in images]
    if opened:
        raising = _RaisingScorer(scorer)
        scores = ask(raising, np.stack([np.asarray(images[row]) for row in opened]), [prompts[row] for row in opened])
        if raising.error is not None:
            raise UserError(f"{scorer.name}: {raising.error}")
        for k, row in enumerate(opened):
            batch[row] = ImageScore(
                {metric: float(scores.value[metric][k]) for metric in scorer.metrics},
                scores.reasons.get(k, ""),
                scores.notes[k] if scores.notes else "",
            )
    return batch


def _unscored(scorer: Scorer, reason: str) -> ImageScore:
    return ImageScore(dict.fromkeys(scorer.metrics, float("nan")), reason)


def _read_stored(partial: Path) -> dict[str, ImageScore]:
    """Key -> the scores of an earlier start; damaged files are ignored."""
    stored: dict[str, ImageScore] = {}
    for path in sorted(partial.glob("*.json")):
        try:
            stored |= {key: ImageScore(**score) for key, score in read_json(path).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return stored


def _store(partial: Path, scores: Mapping[str, ImageScore]) -> None:
    """Write scores for a later start."""
    if not scores:
        return
    name = sha256("\n".join(sorted(scores)).encode()).hexdigest()[:32]
    text = json.dumps({key: vars(score) for key, score in scores.items()})
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write_atomically(partial / f"{name}.json", lambda p: p.write_text(text, "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror or error}") from error


# The table


def _table(
    files: Sequence[ImageFile], scorers: Sequence[Scorer], scores: Mapping[tuple[str, int], ImageScore]
) -> pd.DataFrame:
    """COLUMNS, and those a task's summary reads: `text`, `prompt` (its number here) and `ordinal` of the image."""
    import pandas as pd

    indices: list[tuple[int, int]] = []  # number of the prompt, ordinal of the image
    prompts: dict[tuple[str, str], int] = {}
    images: Counter[int] = Counter()
    for file in files:
        prompt = file.image.prompt
        number = prompts.setdefault((prompt.stratum, prompt.text), len(prompts))
        indices.append((number, images[number]))
        images[number] += 1
    rows = [
        {
            "prompt": number,
            "ordinal": ordinal,
            "file": utf_8_name(file.image.file),
            "text": file.image.prompt.text,
            "stratum": file.image.prompt.stratum,
            "scorer": scorer.name,
            "scorer_id": scorer.id,
            "metric": metric,
            "value": scores[scorer.name, i].value[metric],
            "reason": scores[scorer.name, i].reason,
            "note": scores[scorer.name, i].note,
        }
        for scorer in scorers
        for metric in scorer.metrics
        for i, (file, (number, ordinal)) in enumerate(zip(files, indices, strict=True))
    ]
    return pd.DataFrame(rows)


def _write(out: Path, table: pd.DataFrame) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = table.drop(columns="prompt").rename(columns={"text": "prompt"})[list(COLUMNS)]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".csv":
        write_atomically(out, lambda p: plain.to_csv(p, index=False, lineterminator="\n", encoding="utf-8"))
    else:
        types = {name: pa.float64() if name == "value" else pa.string() for name in COLUMNS}
        columns = {name: pa.array(plain[name].tolist(), types[name]) for name in COLUMNS}  # NaN stays NaN
        write_atomically(out, lambda p: pq.write_table(pa.table(columns), p))


def _summary(
    table: pd.DataFrame, image_folder: ImageFolder, files: Sequence[ImageFile], task: Task | None
) -> dict[str, Any]:
    """Means with intervals, counts and reasons of failures, and the task's own aggregates."""
    scores: dict[str, dict[str, Any]] = {}
    for scorer, metric in dict.fromkeys(zip(table.scorer, table.metric, strict=True)):
        rows: pd.DataFrame = table.loc[(table.scorer == scorer) & (table.metric == metric)]
        grid = rows.pivot(index="prompt", columns="ordinal", values="value")
        strata = [str(s) for s in rows.drop_duplicates("prompt").sort_values("prompt").stratum]
        estimate = intervals.mean_ci(grid.to_numpy(np.float64), strata=strata if any(strata) else None)
        scores[f"{scorer}/{metric}"] = {
            "mean": estimate.mean,
            "ci": [estimate.low, estimate.high],
            "n": estimate.n,
            "images": len(rows),
            "failed": int(rows.value.isna().sum()),
        }
    notes = [*image_folder.notes, *([JPEG] if any(file.jpeg for file in files) else [])]
    for count, what in ((sum(f.alpha for f in files), ALPHA), (sum(f.animated for f in files), ANIMATED)):
        notes += [f"{count} images {what}"] if count else []
    if damaged := sum(bool(file.error) for file in files):
        notes.append(f"{damaged} files could not be opened as images")
    failed = table.loc[table.value.isna()]
    reasons = Counter(str(reason) for reason in failed.drop_duplicates(["file", "prompt", "reason"]).reason)
    summary = task.summary(table) if task is not None and isinstance(task, SupportsSummary) else {}
    return {
        "layout": image_folder.layout,
        "images": len(files),
        "prompts": int(table.prompt.nunique()),
        "failed": int(len(failed.drop_duplicates(["file", "prompt"]))),
        "scores": scores,
        "summary": dict(summary),
        "invalid": invalid(table),
        "reasons": dict(reasons.most_common(5)),
        "notes": notes,
    }

"""A folder of images is laid on the table, each beside the prompt it was made for, and every scorer walks along it once.

Five ways to lie in a folder are understood (`find_pairs`). What is scored is kept beside the table until all is done, keyed by the scorer
and by what the image and the prompt hold: cut off at any moment, the same command goes on, and the table is the same to the byte.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import registry
from ..assets.prompts import READERS, PromptRow, read_prompts, records, row_of, understood
from ..errors import Interrupted, UserError
from ..evaluation import evaluator
from ..files import write_atomically
from ..images import UnsupportedPixels, upright_pixels, upright_size
from ..progress import NullProgress, Progress
from ..scoring.references import ScorerLocation
from ..scoring.scorers import ask, close_scorers, open_scorer
from ..spec import Images, Prompt, Scorer, Scores, SupportsSummary, Task
from ..stats import intervals

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FILE = (
    "file",
    "file_name",
    "image",
    "path",
)  # what a table's column of image files may be called; the first that is there
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
COLUMNS = ("file", "prompt", "stratum", "scorer", "scorer_id", "metric", "value", "reason", "note")
JPEG = "JPEG: scores differ from PNG"


@dataclass(frozen=True)
class Pair:
    """An image file, below the folder, and what was asked for."""

    file: str
    prompt: Prompt


@dataclass(frozen=True)
class Found:
    """What lies in a folder."""

    layout: str
    pairs: Sequence[Pair]  # in the order of the files' names, numbers by their value
    notes: Sequence[str] = ()


def score_folder(
    folder: Path,
    references: Sequence[str],
    *,
    locations: Mapping[str, ScorerLocation] | None = None,
    prompts: Path | None = None,
    task: str | None = None,
    domain: str = "open",
    out: Path = Path("scores.parquet"),
    rows: int = 16,
    progress: Progress | None = None,
    fresh: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Score every image of a folder with every scorer, write the table `out` (COLUMNS; .parquet or .csv), and say what it holds.

    references, locations: as `scorers.open_scorer` takes them. prompts: a file or folder that says what was asked for, where the folder
    itself does not. task: whose facts the prompts hold, and who aggregates them in its own way. rows: images scored at once; only images of
    one size are. fresh: forget what an earlier start left. A file that is no image, or half of one, is a row without a score and with
    the reason. A scorer that gave no score is asked again by the same command if that is cut off, and not if it ends.

    Returns folder, layout, images, failed (images without some score), scores (`scorer/metric` -> mean and ci over prompts, strata
    weighing the same; n prompts, images, failed), scorers (name -> id), summary (the task's own numbers), invalid (more than 0.5 % of a
    scorer's images failed), reasons (why, and how often), notes, path.
    Raises UserError on what a person can mend, Interrupted when asked to stop.
    """
    progress = progress or NullProgress()
    if rows < 1 or not references:
        raise UserError("score: name at least one --scorer" if rows > 0 else f"--rows must be at least 1, got {rows}")
    if out.suffix not in (".parquet", ".csv"):
        raise UserError(f"--out {out}: the table is a .parquet or a .csv file")
    judge: Task | None = registry.load("task", task)() if task else None
    found = find_pairs(folder, prompts=prompts, task=judge, domain=domain, ignore=[out])
    partial = out.with_name(f"{out.name}.partial")
    if fresh:
        shutil.rmtree(partial, ignore_errors=True)
    pictures = [_glance(folder, pair) for pair in found.pairs]
    scorers: list[Scorer] = []
    try:
        for reference in references:
            scorers.append(open_scorer(reference, locations))
        names = [scorer.name for scorer in scorers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"two scorers are called {', '.join(twice)}: score them into two tables")
        scored = _score(folder, pictures, scorers, partial, rows, progress, interrupted)
    finally:
        close_scorers(scorers)
    table = _table(pictures, scorers, scored)
    try:
        _write(out, table)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    shutil.rmtree(partial, ignore_errors=True)
    told = _told(table, found, pictures, judge)
    for reason, times in told["reasons"].items():
        progress.say(f"{times} not scored: {reason}")
    return {"folder": str(folder), **told, "scorers": {s.name: s.id for s in scorers}, "path": str(out)}


# Layouts


def find_pairs(
    folder: Path,
    *,
    prompts: Path | None = None,
    task: Task | None = None,
    domain: str = "open",
    ignore: Collection[Path] = (),
) -> Found:
    """The images of a folder with their prompts. Asked for in this order; the first that fits is taken.

        with `prompts`, a folder of STYLE.json     HPSv2: STYLE/00000.png (or .jpg), one for each prompt of the style's list
        with `prompts`, a table with image files   a column file (file_name, image, path) and a column prompt; the others are facts
        with `prompts`, any other list             as many prompts as images, in the order of the names
        00000/metadata.jsonl, 00000/samples/0.png  GenEval: folders and images whose names are digits
        a table in the folder                      as above
        image.png, image.txt                       the prompt beside its image
        with `task`, STYLE/00000.png               HPSv2, with the task's test prompts

    ignore: tables that are none of it. Raises UserError where images and prompts do not meet one to one.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    images = sorted((path.relative_to(folder).as_posix() for path in _images(folder)), key=_natural)
    if not images:
        raise UserError(f"there are no images in {folder} ({', '.join(SUFFIXES)})")
    if prompts is not None:
        if prompts.is_dir():
            styles = _lists(prompts, task, domain)
            there = {style: asked for style, asked in styles.items() if (folder / style).is_dir()}
            found = _by_style(folder, there or styles, images)
            unused = ", ".join(sorted(styles.keys() - there.keys()))
            return replace(found, notes=[*found.notes, f"no images of: {unused}"]) if unused else found
        if _names_files(prompts):
            return _by_table(folder, prompts, images, task, domain)
        return _in_order(folder, prompts, images, task, domain)
    if found := _geneval(folder, images, task, domain):
        return found
    skipped = {path.resolve() for path in ignore}
    tables = [
        p for p in sorted(folder.iterdir()) if p.suffix in TABLES and p.resolve() not in skipped and _names_files(p)
    ]
    if len(tables) > 1:
        raise UserError(f"{folder} holds several tables: {', '.join(p.name for p in tables)}; name one with --prompts")
    if tables:
        return _by_table(folder, tables[0], images, task, domain)
    if found := _beside(folder, images, task, domain):
        return found
    if task is not None and any(re.fullmatch(r"[^/]+/\d{5}\.(png|jpe?g)", image) for image in images):
        own: dict[str, list[Prompt]] = {}
        for prompt in task.prompts("test", domain):
            own.setdefault(prompt.stratum, []).append(prompt)
        if any((folder / style).is_dir() for style in own if style):
            return _by_style(folder, own, images)
    raise UserError(
        f"nothing says what the {len(images)} images in {folder} were made for: put a table with the columns file and prompt "
        "there, a .txt beside every image, or name --prompts FILE"
    )


def _images(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            yield path


def _natural(name: str) -> tuple[list[int | str], str]:
    """Names in the order of their letters and of the values of their numbers: 2.png before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)], name


def _geneval(folder: Path, images: Sequence[str], task: Task | None, domain: str) -> Found | None:
    """djghosh13/geneval at af4902f: it visits folders whose names are digits, and images DIGITS.png; so do we, and say what is left."""
    digits = re.compile(r"[0-9]+")
    homes = sorted(
        (p for p in folder.iterdir() if p.is_dir() and digits.fullmatch(p.name)), key=lambda p: _natural(p.name)
    )
    if not any((run_dir / "metadata.jsonl").is_file() for run_dir in homes):
        return None
    pairs: list[Pair] = []
    for run_dir in homes:
        about = run_dir / "metadata.jsonl"
        rows = [row_of(about, line, record) for line, record in records(about)]
        if len(rows) != 1:
            raise UserError(f"{about} holds {len(rows)} prompts, not one")
        (prompt,) = understood(task, about, rows, domain)
        prompt = replace(prompt, stratum=prompt.stratum or str(rows[0].facts.get("tag", "")))
        own = [name for name in images if re.fullmatch(rf"{run_dir.name}/samples/[0-9]+\.png", name)]
        if not own:
            raise UserError(f"{run_dir / 'samples'} holds no image called by a number, 0.png")
        pairs += [Pair(name, prompt) for name in own]
    return Found("geneval", pairs, _left(images, pairs))


def _by_table(folder: Path, table: Path, images: Sequence[str], task: Task | None, domain: str) -> Found:
    rows: list[tuple[str, PromptRow]] = []
    for line, record in records(table):
        key = next((name for name in FILE if name in record), None)
        if key is None or not isinstance(record[key], str) or not record[key]:
            raise UserError(f"{table}, line {line}: no image file is named ({' | '.join(FILE)})")
        rest = {name: value for name, value in record.items() if name != key}
        rows.append((Path(record[key]).as_posix(), row_of(table, line, rest)))
    missing = [name for name, _ in rows if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{table} names {len(missing)} images that are not in {folder}: {', '.join(missing[:3])}")
    asked = understood(task, table, [row for _, row in rows], domain)
    pairs = [Pair(name, prompt) for (name, _), prompt in zip(rows, asked, strict=True)]
    pairs.sort(key=lambda pair: (_natural(pair.file), pair.prompt.text))
    again = [
        one.file for one, two in zip(pairs, pairs[1:]) if (one.file, one.prompt.text) == (two.file, two.prompt.text)
    ]
    if again:
        raise UserError(f"{table} names {again[0]} twice with one prompt")
    return Found(f"table {table.name}", pairs, _left(images, pairs))


def _in_order(folder: Path, prompts: Path, images: Sequence[str], task: Task | None, domain: str) -> Found:
    rows = read_prompts(prompts, unique=False)  # a prompt may have several images
    if len(rows) != len(images):
        raise UserError(
            f"{prompts} holds {len(rows)} prompts and {folder} {len(images)} images; a prompt an image is needed, or a "
            "table with the columns file and prompt"
        )
    asked = understood(task, prompts, rows, domain)
    return Found("order of names", [Pair(name, prompt) for name, prompt in zip(images, asked, strict=True)])


def _beside(folder: Path, images: Sequence[str], task: Task | None, domain: str) -> Found | None:
    texts = {name: (folder / name).with_suffix(".txt") for name in images}
    without = [name for name, path in texts.items() if not path.is_file()]
    if len(without) == len(images):
        return None
    if without:
        raise UserError(f"{len(without)} of {len(images)} images have no .txt beside them: {', '.join(without[:3])}")
    pairs: list[Pair] = []
    for name, path in texts.items():
        try:
            text = path.read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        pairs += [Pair(name, p) for p in understood(task, path, [row_of(path, 1, {"prompt": text})], domain)]
    return Found("text beside images", pairs)


def _lists(folder: Path, task: Task | None, domain: str) -> dict[str, list[Prompt]]:
    """Style -> its prompts, of a folder of STYLE.json as HPDv2 publishes them: lists of texts."""
    styles: dict[str, list[Prompt]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            texts = json.loads(path.read_text("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no list of prompts: {error}") from None
        if not isinstance(texts, list) or not texts:
            raise UserError(f"{path} is no list of prompts")
        rows = [row_of(path, i, {"prompt": text, "style": path.stem}) for i, text in enumerate(texts, 1)]
        styles[path.stem] = [replace(p, stratum=path.stem) for p in understood(task, path, rows, domain)]
    if not styles:
        raise UserError(f"there is no STYLE.json in {folder}")
    return styles


def _by_style(folder: Path, styles: Mapping[str, Sequence[Prompt]], images: Sequence[str]) -> Found:
    """tgxs002/HPSv2 at 866735e, except that an image that is missing there is left out in silence and is an error here."""
    pairs: list[Pair] = []
    for style, prompts in sorted(styles.items()):
        own = [name for name in images if re.fullmatch(rf"{re.escape(style)}/\d{{5}}\.(png|jpe?g)", name)]
        numbers = [int(Path(name).stem) for name in own]
        if numbers != list(range(len(prompts))):
            missing = sorted(set(range(len(prompts))) - set(numbers))
            which = f"; the first that is missing is {missing[0]:05}" if missing else ""
            raise UserError(f"{folder / style}: {len(own)} images for {len(prompts)} prompts{which}")
        pairs += [Pair(name, prompt) for name, prompt in zip(own, prompts, strict=True)]
    return Found("hpsv2", pairs, _left(images, pairs))


def _names_files(path: Path) -> bool:
    """A table that says which image belongs to which prompt, and no table of scores."""
    if path.suffix.lower() not in TABLES:
        if path.suffix.lower() not in READERS:
            next(records(path))  # says which suffixes there are
        return False
    _, record = next(records(path), (0, {}))
    return any(name in record for name in FILE) and "scorer_id" not in record


def _left(images: Sequence[str], pairs: Iterable[Pair]) -> list[str]:
    left = sorted(set(images) - {pair.file for pair in pairs}, key=_natural)
    return [f"{len(left)} images belong to no prompt and were left out: {', '.join(left[:3])}"] if left else []


# Pictures


@dataclass(frozen=True)
class Picture:
    """What a first glance at a file tells; `wrong` where it is no image."""

    pair: Pair
    digest: str
    size: tuple[int, int]
    jpeg: bool
    wrong: str = ""

    def key(self, scorer: Scorer) -> str:
        """What a score depends on: the scorer, the file's bytes, the prompt and its facts."""
        prompt = self.pair.prompt
        facts = json.dumps(prompt.meta, sort_keys=True, default=str)
        said = "\0".join((scorer.id, *scorer.metrics, self.digest, prompt.text, facts, prompt.stratum))
        return sha256(said.encode()).hexdigest()


def _glance(folder: Path, pair: Pair) -> Picture:
    try:
        raw = (folder / pair.file).read_bytes()
    except OSError as error:
        return Picture(pair, "", (0, 0), False, f"the file cannot be read: {error.strerror}")
    digest, jpeg = sha256(raw).hexdigest(), raw.startswith(b"\xff\xd8\xff")
    try:
        return Picture(pair, digest, upright_size(raw), jpeg)
    except Exception as error:  # foreign bytes: a reader of images may fail in any way
        return Picture(pair, digest, (0, 0), jpeg, _why(error))


def _open(folder: Path, picture: Picture) -> Images | str:
    """(H, W, 3), or why not."""
    try:
        raw = (folder / picture.pair.file).read_bytes()
    except OSError as error:
        return f"the file cannot be read: {error.strerror}"
    if sha256(raw).hexdigest() != picture.digest:
        raise UserError(f"{folder / picture.pair.file} changed while it was scored; start again")
    try:
        return upright_pixels(raw)
    except UnsupportedPixels as error:
        return str(error)
    except Exception as error:
        return _why(error)


def _why(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    cause: BaseException | None = error
    while cause is not None:  # ultralytics, once imported, lets Pillow try a format whose package is not there
        if isinstance(cause, UnidentifiedImageError):  # its own words hold an address in memory
            return "this is no image"
        cause = cause.__context__
    return (
        f"this is no whole image: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
    )


# Scoring


@dataclass(frozen=True)
class Said:
    """What a scorer says of one image."""

    value: Mapping[str, float]
    reason: str = ""
    note: str = ""


class _Frank:
    """A scorer whose complaint about the request is kept; for what else goes wrong it goes on with the next image."""

    def __init__(self, scorer: Scorer) -> None:
        self.id, self.name, self.metrics, self._scorer = scorer.id, scorer.name, scorer.metrics, scorer
        self.complaint: UserError | None = None

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        try:
            return self._scorer(images, prompts)
        except UserError as error:
            self.complaint = error
            raise


def _score(
    folder: Path,
    pictures: Sequence[Picture],
    scorers: Sequence[Scorer],
    partial: Path,
    rows: int,
    progress: Progress,
    interrupted: Callable[[], bool],
) -> dict[tuple[str, int], Said]:
    """(scorer's name, picture) -> what it says. Batches are the same whatever an earlier start has done already."""
    known = _known(partial)
    found = {(s.name, i): _nothing(s, p.wrong) for s in scorers for i, p in enumerate(pictures) if p.wrong}
    progress.phase(f"scoring with {', '.join(scorer.name for scorer in scorers)}", len(pictures) * len(scorers))
    progress.advance(len(found))
    for batch in _batches(pictures, rows):
        shown: dict[int, Images | str] = {}
        for scorer in scorers:
            keys = {i: pictures[i].key(scorer) for i in batch}
            if not all(key in known for key in keys.values()):
                if interrupted():
                    done, of = len(found), len(pictures) * len(scorers)
                    raise Interrupted(f"stopped after {done:,} of {of:,} scores; the same command goes on from there")
                shown = shown or {i: _open(folder, pictures[i]) for i in batch}
                fresh = _ask(scorer, [pictures[i] for i in batch], [shown[i] for i in batch])
                said = {key: one for key, one in zip(keys.values(), fresh, strict=True)}
                _keep(partial, {key: one for key, one in said.items() if not one.reason})
                known |= said
            found |= {(scorer.name, i): known[key] for i, key in keys.items()}
            progress.advance(len(batch))
    return found


def _batches(pictures: Sequence[Picture], rows: int) -> list[list[int]]:
    """Pictures of one size together, in order."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, picture in enumerate(pictures):
        if not picture.wrong:
            sizes.setdefault(picture.size, []).append(i)
    return [some[start : start + rows] for some in sizes.values() for start in range(0, len(some), rows)]


def _ask(scorer: Scorer, pictures: Sequence[Picture], shown: Sequence[Images | str]) -> list[Said]:
    """One batch; an image that would not open has no score and its reason. Raises UserError where the scorer refuses the request."""
    good = [row for row, image in enumerate(shown) if not isinstance(image, str)]
    said = [_nothing(scorer, image if isinstance(image, str) else "") for image in shown]
    if good:
        frank = _Frank(scorer)
        images = np.stack([np.asarray(shown[row]) for row in good])
        scores = ask(frank, images, [pictures[row].pair.prompt for row in good])
        if frank.complaint is not None:
            raise UserError(f"{scorer.name}: {frank.complaint}")
        for k, row in enumerate(good):
            said[row] = Said(
                {metric: float(scores.value[metric][k]) for metric in scorer.metrics},
                scores.reasons.get(k, ""),
                scores.notes[k] if scores.notes else "",
            )
    return said


def _nothing(scorer: Scorer, reason: str) -> Said:
    return Said(dict.fromkeys(scorer.metrics, float("nan")), reason)


def _known(partial: Path) -> dict[str, Said]:
    """What an earlier start has scored; a part that was torn is not there."""
    known: dict[str, Said] = {}
    for path in sorted(partial.glob("*.json")):
        try:
            known |= {key: Said(**said) for key, said in json.loads(path.read_text("utf-8")).items()}
        except (OSError, ValueError, TypeError):
            continue
    return known


def _keep(partial: Path, said: Mapping[str, Said]) -> None:
    if not said:
        return
    name = sha256("\n".join(sorted(said)).encode()).hexdigest()[:32]
    text = json.dumps({key: vars(one) for key, one in said.items()})
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write_atomically(partial / f"{name}.json", lambda p: p.write_text(text, "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror or error}") from error


# Tables


def _table(
    pictures: Sequence[Picture], scorers: Sequence[Scorer], scored: Mapping[tuple[str, int], Said]
) -> pd.DataFrame:
    """COLUMNS, and what a task's summary asks for: `text`, and for `prompt` (a number here) and `ordinal` of the image."""
    import pandas as pd

    places: list[tuple[int, int]] = []
    prompts: dict[tuple[str, str], int] = {}
    seen: Counter[int] = Counter()
    for picture in pictures:
        number = prompts.setdefault((picture.pair.prompt.stratum, picture.pair.prompt.text), len(prompts))
        places.append((number, seen[number]))
        seen[number] += 1
    rows = [
        {
            "prompt": place[0], "ordinal": place[1], "file": picture.pair.file, "text": picture.pair.prompt.text,
            "stratum": picture.pair.prompt.stratum, "scorer": scorer.name, "scorer_id": scorer.id, "metric": metric,
            "value": scored[scorer.name, i].value[metric], "reason": scored[scorer.name, i].reason,
            "note": scored[scorer.name, i].note,
        }
        for scorer in scorers
        for metric in scorer.metrics
        for i, (picture, place) in enumerate(zip(pictures, places, strict=True))
    ]  # fmt: skip
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


def _told(table: pd.DataFrame, found: Found, pictures: Sequence[Picture], task: Task | None) -> dict[str, Any]:
    scores: dict[str, dict[str, Any]] = {}
    for scorer, metric in dict.fromkeys(zip(table.scorer, table.metric, strict=True)):
        rows: pd.DataFrame = table.loc[(table.scorer == scorer) & (table.metric == metric)]
        grid = rows.pivot(index="prompt", columns="ordinal", values="value")
        strata = [str(s) for s in rows.drop_duplicates("prompt").sort_values("prompt").stratum]
        estimate = intervals.mean_ci(grid.to_numpy(np.float64), strata=strata if any(strata) else None)
        scores[f"{scorer}/{metric}"] = {
            "mean": estimate.mean, "ci": [estimate.low, estimate.high], "n": estimate.n, "images": len(rows),
            "failed": int(rows.value.isna().sum()),
        }  # fmt: skip
    notes = [*found.notes, *([JPEG] if any(picture.jpeg for picture in pictures) else [])]
    if wrong := sum(bool(picture.wrong) for picture in pictures):
        notes.append(f"{wrong} files could not be opened as images")
    failed = table.loc[table.value.isna()]
    why = Counter(str(reason) for reason in failed.drop_duplicates(["file", "prompt", "reason"]).reason)
    summary = task.summary(table) if task is not None and isinstance(task, SupportsSummary) else {}
    return {
        "layout": found.layout, "images": len(pictures),
        "prompts": int(table.prompt.nunique()), "failed": int(len(failed.drop_duplicates(["file", "prompt"]))),
        "scores": scores, "summary": dict(summary), "invalid": evaluator.invalid(table), "reasons": dict(why.most_common(5)),
        "notes": notes,
    }  # fmt: skip

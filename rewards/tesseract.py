"""Scorer `tesseract`: reads the image with Tesseract, an independently developed engine; no method trains on it.

The program `tesseract` (Apache-2.0; Debian: tesseract-ocr) is started once for a batch, on a list of PNG files. Two framings, named
after Tesseract's own page segmentation modes: `line` (7, one line, the picture enlarged four times, as a 64x32 image needs) and `page`
(11, sparse text, at the image's own size). It has no reject option: on a blank image it may report a letter or two.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from ..bench.errors import Missing, UserError
from ..bench.spec import Images, Prompt, Scores, check_images
from . import rules

INSTALL = "the scorer 'tesseract' needs {}; install them with: apt-get install tesseract-ocr tesseract-ocr-eng (or your system's packages)"


@dataclass(frozen=True)
class PageFraming:
    """How an image is presented to the engine."""

    name: str
    mode: int  # --psm
    enlarge: int


FRAMINGS = {"line": PageFraming("line", 7, 4), "page": PageFraming("page", 11, 1)}


def _run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    # One thread: its own threads are slower than none on small images, and would take cores from the run.
    env = os.environ | {"OMP_THREAD_LIMIT": "1", "LC_ALL": "C"}
    return subprocess.run(["tesseract", *arguments], capture_output=True, env=env, timeout=timeout, check=False)


@cache
def _installed(program: str, prefix: str) -> tuple[str, str]:
    """Return (version, digest of the English data) of the program at that path; Missing where either is absent."""
    del program, prefix  # only cache keys: another program or data folder gives another result
    version = _run("--version")
    words = (version.stdout + version.stderr).decode("utf-8", "replace").split()
    listed = _run("--list-langs").stdout.decode("utf-8", "replace").splitlines()
    if version.returncode or len(words) < 2 or "eng" not in listed[1:]:
        raise Missing(INSTALL.format("its English data (eng)"))
    folder = Path(listed[0].split('"')[1]) if listed[0].count('"') == 2 else None
    data = folder / "eng.traineddata" if folder else None
    return words[1], sha256(data.read_bytes()).hexdigest()[:8] if data and data.exists() else "unknown"


def version() -> tuple[str, str]:
    """Return (version of the program, first digits of its English data's sha256); Missing where either is not installed."""
    program = shutil.which("tesseract")
    if program is None:
        raise Missing(INSTALL.format("the program 'tesseract' and its English data"))
    return _installed(program, os.environ.get("TESSDATA_PREFIX", ""))


def available() -> bool:
    """Return whether the program and its data are installed."""
    try:
        version()
    except Missing:
        return False
    return True


class Tesseract:
    """Reads a batch with one run of Tesseract and scores the text by the published rule."""

    name = "tesseract"
    metrics: Sequence[str] = rules.METRICS
    worker_images, image_seconds = 8, 0.01  # the program starts once a call

    def __init__(self, framing: PageFraming = FRAMINGS["line"]) -> None:
        release, data = version()
        self.framing = framing
        self.id = f"tesseract-{release}/eng@{data}/{rules.RULE}/{framing.name}-psm{framing.mode}-x{framing.enlarge}"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to soft and exact; NaN with a reason where the engine failed on an image."""
        check_images(images, prompts)
        reasons: dict[int, str] = {}
        texts: list[str | None] = [None] * len(images)
        with TemporaryDirectory(prefix="gpobench-tesseract-") as folder:
            files: dict[int, Path] = {}
            for row, image in enumerate(images):
                path = Path(folder, f"{row}.png")
                try:
                    self._write(image, path)
                    files[row] = path
                except Exception as error:  # an image that is none, e.g. of no size
                    reasons[row] = f"{type(error).__name__}: {error}"
            for row, result in self._read(files, Path(folder)).items():
                if isinstance(result, Exception):
                    reasons[row] = f"{type(result).__name__}: {result}"
                else:
                    texts[row] = result
        return rules.score_texts(prompts, texts, reasons)

    def _write(self, image: np.ndarray, path: Path) -> None:
        picture = Image.fromarray(image)
        size = (picture.width * self.framing.enlarge, picture.height * self.framing.enlarge)
        picture.resize(size, Image.Resampling.BICUBIC).save(path, compress_level=1)

    def _read(self, files: dict[int, Path], folder: Path) -> "dict[int, str | Exception]":
        """Map each row to its text or its error. An image that stops the run of a batch is found by reading each alone."""
        if not files:
            return {}
        listing = folder / "files.txt"
        listing.write_text("".join(f"{path}\n" for path in files.values()), "utf-8")
        options = ("--psm", str(self.framing.mode), "--oem", "1", "--dpi", "300", "-l", "eng")
        failure: Exception
        try:
            process = _run(str(listing), "stdout", *options, timeout=30 + 5 * len(files))
            pages = process.stdout.decode("utf-8", "replace").split(
                "\f"
            )  # a form feed between pages, in some versions after the last too
            if len(pages) == len(files) + 1 and not pages[-1].strip():
                pages.pop()
            if process.returncode == 0 and len(pages) == len(files):
                return {row: "".join(page.split("\n")).strip() for row, page in zip(files, pages, strict=True)}
            messages = process.stderr.decode("utf-8", "replace").strip().splitlines()
            failure = RuntimeError(
                f"tesseract ended with {process.returncode}: {messages[-1] if messages else 'no message'}"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = error
        if len(files) == 1:
            return dict.fromkeys(files, failure)
        alone: dict[int, str | Exception] = {}
        for row, path in files.items():
            alone |= self._read({row: path}, folder)
        return alone

    def self_test(self) -> None:
        """Read built-in renders; raises RuntimeError with the text read where one is wrong."""
        rules.check_known_answers(self, paged=self.framing.name == "page")


def make(variant: str | None = None) -> Tesseract:
    """Make the scorer in the framing `line` (the default) or `page`; Missing where Tesseract is not installed."""
    if variant is not None and variant not in FRAMINGS:
        raise UserError(f"the scorer 'tesseract' has no variant {variant!r}; valid: {', '.join(FRAMINGS)}")
    return Tesseract(FRAMINGS[variant or "line"])

"""Scorer `rapidocr`: reads the image with RapidOCR and scores the text by the published OCR rule; the training reward.

Three framings. `line` gives the whole image to the recogniser, as a small image of one word needs; `lines` cuts a small image
into one or two lines first (`bench/assets/drawn.py`); `page` finds the lines by a network, for natural images. The engine is
RapidOCR 3 (Apache-2.0) with the PP-OCR models in its wheel: no download, no network. In the first two framings lines are
recognised in batches of exactly BATCH, the last one padded: 1.25 times as fast as one by one (6.2 against 7.7 ms of a core for
`line`), and in batches of one size the bits of an image depend on no other image. In the framing `page` images are processed one
at a time, and the lines of an image together. The engine uses one thread and releases the interpreter lock, so it can run during
sampling.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from ..bench.assets.drawn import text_lines
from ..bench.errors import Missing, UserError
from ..bench.spec import Images, Prompt, Scores, check_images
from . import rules

DETECTOR, RECOGNISER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
LINE_HEIGHT = 48  # px, what the recogniser was trained on
# Images of one line recognised at once: the last bits depend on the number of images in a batch, so it is always this one.
BATCH = 8


@dataclass(frozen=True)
class TextLine:
    """Framing of a small image: resizes it, or each of its lines, to `width` x 48 and recognises that as a whole."""

    width: int = (
        80  # px; reads clean and worn 64x32 renders as well as 96 (their proportions) does, and takes less time
    )
    cut: bool = False  # first cuts the image into its one or two lines, and joins their texts with a space

    def __str__(self) -> str:
        return f"{'lines' if self.cut else 'line'}-{LINE_HEIGHT}x{self.width}"


@dataclass(frozen=True)
class Page:
    """Framing of any image: finds lines, and joins those read with confidence in reading order."""

    side: int = 320  # px; a picture whose shorter side is smaller is enlarged for the detector
    confidence: float = 0.5  # lines below it are dropped, as the published reward's engine does (drop_score)

    def __str__(self) -> str:
        return f"page-{self.side}-{self.confidence:g}"


FRAMINGS: dict[str, TextLine | Page] = {"line": TextLine(), "lines": TextLine(160, cut=True), "page": Page()}


def _model(name: str) -> Path:
    """Find a model file inside the wheel, without importing it."""
    spec = util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise Missing(
            "the scorer 'rapidocr' needs its engine; install with: pip install 'rapidocr>=3.9,<4' onnxruntime"
        )
    path = Path(spec.origin).parent / "models" / name
    if not path.is_file():
        raise Missing(
            f"rapidocr {metadata.version('rapidocr')} does not carry {name}; install with: pip install 'rapidocr>=3.10,<4'"
        )
    return path


class RapidOCR:
    """Reads every image with RapidOCR and scores the text by the published rule; safe to call from several threads."""

    name = "rapidocr"
    metrics: Sequence[str] = rules.METRICS

    def __init__(self, framing: TextLine | Page = FRAMINGS["line"]) -> None:
        self.framing = framing
        # A page of 512 px with three lines of text.
        self.worker_images, self.image_seconds = (1, 0.2) if isinstance(framing, Page) else (BATCH, 0.006)
        self._lock = (
            threading.Lock()
        )  # the engine loads its models at the first call and keeps a call's settings on itself
        models = [_model(name) for name in ((DETECTOR, RECOGNISER) if isinstance(framing, Page) else (RECOGNISER,))]
        params: dict[str, Any] = {
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Global.use_det": isinstance(framing, Page),
            "Rec.model_path": str(models[-1]),
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        if isinstance(framing, Page):
            params |= {
                "Det.model_path": str(models[0]),
                "Det.limit_side_len": framing.side,
                "Global.text_score": framing.confidence,
            }
        else:
            params |= {"Rec.rec_img_shape": [3, LINE_HEIGHT, framing.width], "Rec.rec_batch_num": BATCH}
        try:
            from rapidocr import RapidOCR as Engine

            self._engine: Any = Engine(params=params)
        except ImportError as error:
            raise Missing(
                f"the scorer 'rapidocr' needs its engine ({error}); install with: pip install 'rapidocr>=3.9,<4' onnxruntime"
            ) from error
        weights = "+".join(
            f"{path.stem.replace('_', '-')}@{sha256(path.read_bytes()).hexdigest()[:8]}" for path in models
        )
        self.id = f"rapidocr-{metadata.version('rapidocr')}/{weights}/{rules.RULE}/{framing}"

    def read(self, image: np.ndarray) -> str:
        """Return the text in (H, W, 3) uint8 RGB, lines joined without a gap. Raises what the engine raises."""
        return self._read_page(image) if isinstance(self.framing, Page) else self._read_lines([image], self.framing)[0]

    def _read_page(self, image: np.ndarray) -> str:
        """Find and read the lines of one image, (H, W, 3) uint8 RGB."""
        with self._lock:
            result = self._engine(_bgr(image))
        lines = zip(result.txts or (), result.scores or (), strict=True)
        return "".join(text for text, score in lines if score > 0)

    def _read_lines(self, images: Images | Sequence[np.ndarray], framing: TextLine) -> list[str]:
        """Read at most BATCH images (H, W, 3) uint8 RGB as one line each, or cut into lines; raises what the engine raises."""
        if not framing.cut:
            return self._recognise(images, framing)
        cut = [text_lines(image) for image in images]
        lines = [line for image in cut for line in image]
        batches = (lines[start : start + BATCH] for start in range(0, len(lines), BATCH))
        texts = iter([text for batch in batches for text in self._recognise(batch, framing)])
        return [" ".join(next(texts) for _ in image) for image in cut]

    def _recognise(self, images: Images | Sequence[np.ndarray], framing: TextLine) -> list[str]:
        """Recognise at most BATCH lines (h, w, 3) uint8 RGB."""
        import cv2

        lines = [cv2.resize(_bgr(image), (framing.width, LINE_HEIGHT)) for image in images]
        blank = np.zeros((LINE_HEIGHT, framing.width, 3), np.uint8)
        with self._lock:
            result = self._engine.recognize_txt([*lines, *[blank] * (BATCH - len(lines))])
        read = list(zip(result.txts, result.scores, strict=True))
        return [text if score > 0 else "" for text, score in read[: len(lines)]]

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to soft and exact; NaN with a reason where the engine failed on an image."""
        check_images(images, prompts)
        texts: list[str | None] = []
        reasons: dict[int, str] = {}
        for start in range(0, len(images), BATCH):
            for text, reason in self._attempt(images[start : start + BATCH]):
                if reason:
                    reasons[len(texts)] = reason
                texts.append(text)
        return rules.score_texts(prompts, texts, reasons)

    def _attempt(self, batch: Images) -> list[tuple[str | None, str]]:
        """Read at most BATCH images: for each its text and "", or None and the reason."""
        try:
            texts = (
                [self._read_page(image) for image in batch]
                if isinstance(self.framing, Page)
                else self._read_lines(batch, self.framing)
            )
            return [(text, "") for text in texts]
        except Exception as error:  # whatever a third party's engine raises must cost one image, not a run
            if len(batch) > 1:
                return [self._attempt(batch[row : row + 1])[0] for row in range(len(batch))]
            return [(None, f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[-1]}")]

    def self_test(self) -> None:
        """Read built-in renders; raises RuntimeError with the text read where one is wrong."""
        rules.check_known_answers(self, paged=isinstance(self.framing, Page))


def _bgr(image: np.ndarray) -> np.ndarray:
    """The image in the channel order that the models were trained on."""
    return np.ascontiguousarray(image[..., ::-1])


def make(variant: str | None = None) -> RapidOCR:
    """Make the scorer in the framing `line` (the default), `lines` or `page`; Missing where the engine is not installed."""
    if variant is not None and variant not in FRAMINGS:
        raise UserError(f"the scorer 'rapidocr' has no variant {variant!r}; valid: {', '.join(FRAMINGS)}")
    return RapidOCR(FRAMINGS[variant or "line"])

"""Scorer `paddleocr`: finds and reads the lines of an image with PaddleOCR 3, the engine family of the published OCR reward.

Three variants. `paddleocr` uses the default models of PaddleOCR 3; `paddleocr:2.9` is the nearest 3.x configuration to the
published reward, which pins 2.9.1; `paddleocr:rapid` runs the small models of RapidOCR's wheel through PaddleOCR's own code and
needs no download. PaddleOCR is Apache-2.0. Its models come from its own repositories on the hub, `PaddlePaddle/...`, and run on ONNX
Runtime or, where their files are Paddle's, on paddlepaddle; always on the CPU, because paddlepaddle and torch may clash over CUDA's
libraries in one process.
"""

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..bench.assets import downloads, weight_store
from ..bench.assets.downloads import cache, offline
from ..bench.errors import Missing, UserError
from ..bench.files import write_atomically
from ..bench.spec import Images, Prompt, Scores, check_images
from . import rules

INSTALL = "the scorer 'paddleocr' needs {}; install with: pip install 'gpobench[paddle]' onnxruntime"


@dataclass(frozen=True)
class Configuration:
    """Models and preprocessing of a variant; every setting is explicit, none is left to a version's default."""

    name: str
    detector: str
    recogniser: str
    side: int  # px
    # min: an image whose shorter side is below `side` is enlarged for the detector; max: one whose longer side is above is reduced
    limit: Literal["min", "max"]
    # PaddleOCR takes an array for BGR. The published reward hands it RGB, which swaps red and blue in every image.
    channels: Literal["bgr", "rgb"] = "bgr"
    confidence: float = 0.5  # lines below it are dropped, as 2.9.1 does (drop_score); 3.x would keep all
    onnx: bool = True  # PaddleOCR offers these models as ONNX files too

    def __str__(self) -> str:
        return f"{self.limit}-{self.side}-{self.confidence:g}-{self.channels}"


# The defaults of 3.7.0 make a 64x32 image 128x64 for the detector, which is enough for a word across it (60 of 60 read by the
# small models; no gain from 96, 128, 160 or 320). Under 2.9.1's own limit it stays 64x32, and letters are sometimes missed.
CONFIGURATIONS = {
    "": Configuration("paddleocr", "PP-OCRv6_medium_det", "PP-OCRv6_medium_rec", 64, "min"),
    # Flow-GRPO's flow_grpo/ocr.py with 2.9.1, lang="en": en_PP-OCRv3_det and en_PP-OCRv4_rec. 3.x has no English v3 detector,
    # so the detector differs, and with it the id.
    "2.9": Configuration(
        "paddleocr-2.9", "PP-OCRv4_mobile_det", "en_PP-OCRv4_mobile_rec", 960, "max", "rgb", onnx=False
    ),
    "rapid": Configuration("paddleocr-rapid", "PP-OCRv6_small_det", "PP-OCRv6_small_rec", 64, "min"),
}
# DB's own thresholds, the same in 2.9.1 and in 3.7.0: of a pixel, of a box, and the ratio by which a box is widened.
DETECTION = {"text_det_thresh": 0.3, "text_det_box_thresh": 0.6, "text_det_unclip_ratio": 1.5}
FILES = ("inference.*",)  # the files of a model's package that are needed to run it
WHEEL = {"PP-OCRv6_small_det": "PP-OCRv6_det_small.onnx", "PP-OCRv6_small_rec": "PP-OCRv6_rec_small.onnx"}


class PaddleOCR:
    """Reads every image with PaddleOCR and scores the text by the published rule; safe to call from several threads."""

    metrics: Sequence[str] = rules.METRICS

    def __init__(self, configuration: Configuration) -> None:
        os.environ.setdefault(
            "PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True"
        )  # read at import: else it contacts four hosts
        if util.find_spec("paddleocr") is None:
            raise Missing(INSTALL.format("its engine"))
        self.name, self.configuration = configuration.name, configuration
        models = (configuration.detector, configuration.recogniser)
        folders = [_folder(model) for model in models]
        engine = _engine(configuration, folders)
        folders = [folder or _brought(model, engine) for model, folder in zip(models, folders, strict=True)]
        try:
            from paddleocr import PaddleOCR as Engine
        except ImportError as error:
            raise Missing(INSTALL.format(f"its engine ({error})")) from error
        logging.getLogger("paddlex").setLevel(logging.WARNING)  # it reports every model that it opens
        try:
            self._engine: Any = Engine(
                text_detection_model_name=configuration.detector,
                text_detection_model_dir=folders[0] and str(folders[0]),
                text_recognition_model_name=configuration.recogniser,
                text_recognition_model_dir=folders[1] and str(folders[1]),
                text_recognition_batch_size=1,  # in a batch a line is padded to its longest neighbour
                use_doc_orientation_classify=False,
                use_doc_unwarping=False,
                use_textline_orientation=False,
                text_det_limit_side_len=configuration.side,
                text_det_limit_type=configuration.limit,
                text_rec_score_thresh=configuration.confidence,
                **DETECTION,
                device="cpu",
                engine=engine,
                engine_config=(
                    {"intra_op_num_threads": 1, "inter_op_num_threads": 1} if engine == "onnxruntime" else None
                ),
            )
        except Exception as error:  # a failed download, a broken model file: the engine lets any exception through
            raise UserError(
                f"PaddleOCR cannot open {configuration.detector} and {configuration.recogniser}: {_line(error)}"
            ) from error
        # With ONNX Runtime one image at a time on one thread; paddlepaddle takes the threads that it finds.
        self.worker_images, self.image_seconds = int(engine == "onnxruntime"), 0.3
        self._lock = threading.Lock()  # PaddleOCR objects are not thread-safe
        folder_by_model = {
            model: folder or _folder(model) for model, folder in zip(models, folders, strict=True)
        }  # by now here
        weights = "+".join(_revision(model, folder) for model, folder in folder_by_model.items() if folder)
        self.id = f"paddleocr-{metadata.version('paddleocr')}-{engine}/{weights}/{rules.RULE}/{configuration}"

    def read(self, image: np.ndarray) -> str:
        """Return the text in (H, W, 3) uint8 RGB, lines joined in reading order without a gap, "" where there is none."""
        array = image[..., ::-1] if self.configuration.channels == "bgr" else image
        with self._lock:
            pages = self._engine.predict(np.ascontiguousarray(array))
        return "".join(text for page in pages for text in page["rec_texts"])

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to soft and exact; NaN with a reason where the engine failed on an image."""
        check_images(images, prompts)
        texts: list[str | None] = []
        reasons: dict[int, str] = {}
        for row, image in enumerate(images):
            try:
                texts.append(self.read(image))
            except Exception as error:  # whatever a third party's engine raises must cost one image, not a run
                texts.append(None)
                reasons[row] = _line(error)
        return rules.score_texts(prompts, texts, reasons)

    def self_test(self) -> None:
        """Read a built-in page, and small words where the detector can find them; RuntimeError with the text read where it is wrong."""
        if self.configuration.limit == "min":
            rules.check_known_answers(self)
        rules.check_known_answers(self, paged=True)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[-1]}"


def _folder(model: str) -> Path | None:
    """Find a model's local files: in a folder of the user's or the store's, RapidOCR's wheel, or PaddleOCR's own cache."""
    user_folder = weight_store.given_by_hand(f"PaddlePaddle/{model}")
    if user_folder is not None:
        return user_folder
    if model in WHEEL:
        return from_wheel(model)
    home = os.environ.get("PADDLE_PDX_CACHE_HOME") or Path.home() / ".paddlex"
    for name in (model, f"{model}_onnx"):  # PaddleOCR's names for a model's two packages
        path = Path(home, "official_models", name)
        if path.is_dir():
            return downloads.log_download(downloads.DownloadRequest("folder", f"PaddlePaddle/{model}", FILES, "", path))
    return None


def _brought(model: str, engine: Literal["onnxruntime", "paddle"]) -> Path | None:
    """Fetch a model's package for this engine from the hub; None where the hub lacks it, so that PaddleOCR tries its other hosts.

    Raises Missing where HF_HUB_OFFLINE forbids that.
    """
    try:
        return weight_store.folder(f"PaddlePaddle/{model}{'_onnx' if engine == 'onnxruntime' else ''}", patterns=FILES)
    except Missing:
        if not offline():
            return None
    raise Missing(
        f"the OCR model {model} is not here and HF_HUB_OFFLINE forbids fetching it; put inference.onnx (or inference.json and "
        f"inference.pdiparams) and inference.yml below the folder that GPOBENCH_WEIGHTS names, in PaddlePaddle/{model}"
    )


def _engine(configuration: Configuration, folders: Sequence[Path | None]) -> Literal["onnxruntime", "paddle"]:
    """Choose ONNX Runtime where the models are or can be fetched as ONNX files, else paddlepaddle; Missing where that is not installed."""
    bare = [folder for folder in folders if folder and not (folder / "inference.onnx").is_file()]
    if not bare and (configuration.onnx or None not in folders):
        if util.find_spec("onnxruntime") is None:
            raise Missing(INSTALL.format("ONNX Runtime"))
        return "onnxruntime"
    if util.find_spec("paddle") is None:
        where = (
            f"{bare[0]} holds"
            if bare
            else f"PaddleOCR offers for {configuration.detector} and {configuration.recogniser}"
        )
        raise Missing(
            f"{where} no inference.onnx; put one there, or install what runs the other files: pip install paddlepaddle"
        )
    return "paddle"


def _revision(model: str, folder: Path) -> str:
    """Return PP-OCRv6-small-det@1a2b3c4d for PP-OCRv6_small_det: the digest covers weights and settings, which both change numbers."""
    names = ("inference.onnx", "inference.json", "inference.pdmodel", "inference.pdiparams", "inference.yml")
    digest = sha256()
    for path in (folder / name for name in names):
        if path.is_file():
            digest.update(path.read_bytes())
    return f"{model.replace('_', '-')}@{digest.hexdigest()[:8]}"


# RapidOCR's wheel carries PP-OCR models as bare ONNX files; PaddleOCR wants a folder with a description beside them.


def from_wheel(model: str) -> Path:
    """Return the folder of a model of RapidOCR's wheel, made once in the cache; Missing where the wheel does not contain it."""
    spec = util.find_spec("rapidocr")
    if spec is None or spec.origin is None:
        raise Missing(
            "the scorer 'paddleocr:rapid' reads RapidOCR's models; install with: pip install 'rapidocr>=3.10,<4'"
        )
    source = Path(spec.origin).parent / "models" / WHEEL[model]
    if not source.is_file():
        raise Missing(
            f"rapidocr {metadata.version('rapidocr')} does not carry {source.name}; install with: pip install 'rapidocr>=3.10,<4'"
        )
    weights = source.read_bytes()
    folder = cache() / "paddleocr" / sha256(weights).hexdigest()[:16] / model
    if not (folder / "inference.yml").is_file():
        write_model(folder, model, source)
    return folder


def write_model(folder: Path, model: str, source: Path) -> None:
    """Convert a PP-OCR model in one ONNX file to PaddleOCR's format: inference.onnx, and inference.yml with its inputs and outputs.

    The numbers are PP-OCR's (ImageNet's mean and deviation for the detector, lines of 48 x 320 for the recogniser); a recogniser's
    alphabet stands in its file, as metadata.
    """
    import onnxruntime
    import yaml

    alphabet = onnxruntime.InferenceSession(str(source)).get_modelmeta().custom_metadata_map.get("character")
    decode = {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}
    if alphabet is None:
        normal = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "scale": "1./255.", "order": "hwc"}
        before = [decode, {"DetResizeForTest": {}}, {"NormalizeImage": normal}, {"ToCHWImage": None}]
        after = {"name": "DBPostProcess", "thresh": 0.3, "box_thresh": 0.6, "unclip_ratio": 1.5, "max_candidates": 1000}
    else:
        before = [decode, {"RecResizeImg": {"image_shape": [3, 48, 320]}}]
        after = {"name": "CTCLabelDecode", "character_dict": alphabet.splitlines()}
    facts = {"Global": {"model_name": model}, "PreProcess": {"transform_ops": before}, "PostProcess": after}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "inference.onnx", lambda path: path.write_bytes(source.read_bytes()))
    text = yaml.safe_dump(facts, allow_unicode=True)
    write_atomically(
        folder / "inference.yml", lambda path: path.write_text(text, "utf-8")
    )  # written last: it marks the folder as complete


def make(variant: str | None = None) -> PaddleOCR:
    """Make the scorer `paddleocr`, `paddleocr:2.9` or `paddleocr:rapid`; Missing where the engine or a model is absent."""
    if variant is not None and (not variant or variant not in CONFIGURATIONS):
        valid = ", ".join(name for name in CONFIGURATIONS if name)
        raise UserError(f"the scorer 'paddleocr' has no variant {variant!r}; valid: {valid}, or none")
    return PaddleOCR(CONFIGURATIONS[variant or ""])

"""PaddleOCR's own code on real renders, with true PP-OCR weights: those that RapidOCR's wheel carries."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gpobench.bench.assets import downloads, weight_store
from gpobench.bench.assets.glyphs import INKS, PAPERS, draw_word
from gpobench.bench.errors import Missing, UserError
from gpobench.bench.spec import Prompt
from gpobench.rewards import paddle, rules
from gpobench.tasks import ocr

for package in ("paddleocr", "onnxruntime", "rapidocr"):
    pytest.importorskip(package, exc_type=ImportError)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A cache of our own for this file: what the wheel's models become is made here once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PADDLE_PDX_CACHE_HOME", str(tmp_path_factory.mktemp("paddlex")))
        patch.delenv("GPOBENCH_WEIGHTS", raising=False)
        yield


@pytest.fixture(scope="module")
def rapid(home: None) -> paddle.PaddleOCR:
    return paddle.make("rapid")


@pytest.fixture(scope="module")
def other(home: None, tmp_path_factory: pytest.TempPathFactory) -> paddle.PaddleOCR:
    """`2.9` with the wheel's weights under its models' names: the path and the settings are its own, the reading is not."""
    root = tmp_path_factory.mktemp("weights")
    for model, source in (("PP-OCRv4_mobile_det", "det"), ("en_PP-OCRv4_mobile_rec", "rec")):
        wheel = paddle.from_wheel(f"PP-OCRv6_small_{source}")
        paddle.write_model(root / "PaddlePaddle" / model, model, wheel / "inference.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPOBENCH_WEIGHTS", str(root))
        return paddle.make("2.9")


def words(n: int) -> tuple[np.ndarray, list[Prompt]]:
    """Test words in every paper and ink; every fifth is mirrored, so that not all are read alike."""
    rng = np.random.default_rng(0)
    prompts = list(ocr.OCR().prompts("test", "glyphs"))[:n]
    papers, inks = list(PAPERS.values()), list(INKS.values())
    images = np.stack(
        [
            draw_word(
                p.meta["target"],
                paper=papers[i % 3],
                ink=inks[i // 3 % 3],
                shift=(int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
            )
            for i, p in enumerate(prompts)
        ]
    )
    images[::5] = images[::5, :, ::-1]
    return images, prompts


def test_id_says_engine_weights_rule_and_settings(rapid: paddle.PaddleOCR, other: paddle.PaddleOCR) -> None:
    engine, weights, rule, settings = rapid.id.split("/")
    assert engine.startswith("paddleocr-3.") and engine.endswith("-onnxruntime")
    detector, recogniser = weights.split("+")
    assert detector.startswith("PP-OCRv6-small-det@") and recogniser.startswith("PP-OCRv6-small-rec@")
    assert rule == rules.RULE and settings == "min-64-0.5-bgr"
    assert other.id.split("/")[-1] == "max-960-0.5-rgb" and "/PP-OCRv4-mobile-det@" in other.id
    assert (rapid.name, other.name) == ("paddleocr-rapid", "paddleocr-2.9")
    assert tuple(rapid.metrics) == tuple(other.metrics) == ("soft", "exact")


def test_self_test(rapid: paddle.PaddleOCR, other: paddle.PaddleOCR) -> None:
    rapid.self_test()
    other.self_test()


def test_reads_renders_and_one_picture_at_a_time(rapid: paddle.PaddleOCR) -> None:
    images, prompts = words(25)
    scores = rapid(images, prompts)
    upright = np.arange(25) % 5 != 0
    assert scores.value["exact"][upright].mean() >= 0.95 and scores.value["exact"][~upright].mean() <= 0.2
    some = [6, 0, 3, 11, 1]
    permuted = rapid(images[some], [prompts[i] for i in some])
    assert np.array_equal(permuted.value["soft"], scores.value["soft"][some])
    assert list(permuted.notes or ()) == [(scores.notes or ())[i] for i in some]
    alone = rapid(images[7:8], prompts[7:8])
    assert alone.value["soft"][0] == scores.value["soft"][7]


def test_lines_are_joined_in_reading_order(rapid: paddle.PaddleOCR) -> None:
    from PIL import Image, ImageDraw, ImageFont

    from gpobench.bench.assets.glyphs import default_font

    page = Image.new("RGB", (420, 200), (240, 240, 235))
    font = ImageFont.truetype(str(default_font()), 40)
    for place, word in (((20, 20), "FIRST"), ((240, 24), "SECOND"), ((20, 120), "THIRD")):
        ImageDraw.Draw(page).text(place, word, fill=(20, 20, 60), font=font)
    assert rapid.read(np.asarray(page)) == "FIRSTSECONDTHIRD"


@pytest.mark.parametrize("size", [(32, 64), (1, 1), (3, 200)])
def test_no_text_is_an_empty_text(rapid: paddle.PaddleOCR, size: tuple[int, int]) -> None:
    scores = rapid(np.full((1, *size, 3), 255, np.uint8), [Prompt('say "A"')])
    assert scores.value["soft"][0] == 0 and not scores.reasons and list(scores.notes or ()) == [""]


def test_channel_order_reaches_the_engine(rapid: paddle.PaddleOCR, other: paddle.PaddleOCR) -> None:
    """A picture of pure red arrives as BGR, in `2.9` as RGB: the published reward's mistake, kept."""
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 200

    class Engine:
        seen: np.ndarray

        def predict(self, array: np.ndarray) -> list[dict[str, list[str]]]:
            self.seen = array
            return [{"rec_texts": []}]

    for scorer, channel in ((rapid, 2), (other, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scorer, "_engine", engine := Engine())
            assert scorer.read(red) == ""
        assert engine.seen[..., channel].min() == 200 and engine.seen.sum() == 200 * 64 * 64


def test_an_engine_that_fails_costs_one_picture(rapid: paddle.PaddleOCR, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = words(3)
    want = rapid(images, prompts)
    predict = rapid._engine.predict  # pyright: ignore[reportPrivateUsage]

    class Failing:
        def predict(self, array: np.ndarray) -> object:
            if np.array_equal(array, images[1][..., ::-1]):
                raise RuntimeError("the engine\nlost a picture")
            return predict(array)

    monkeypatch.setattr(rapid, "_engine", Failing())
    scores = rapid(images, prompts)
    assert np.isnan(scores.value["soft"][1]) and scores.reasons == {1: "RuntimeError: lost a picture"}
    assert np.array_equal(scores.value["soft"][[0, 2]], want.value["soft"][[0, 2]])


def test_several_threads_read_as_one(rapid: paddle.PaddleOCR) -> None:
    images, prompts = words(8)
    want = rapid(images, prompts).value["soft"]
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda i: rapid(images[i : i + 1], prompts[i : i + 1]).value["soft"][0], range(8))
    assert np.array_equal(list(parts), want)


def test_what_the_wheel_becomes_is_made_once(home: None) -> None:
    folder = paddle.from_wheel("PP-OCRv6_small_rec")
    stamp = (folder / "inference.yml").stat().st_mtime_ns
    assert paddle.from_wheel("PP-OCRv6_small_rec") == folder and (folder / "inference.yml").stat().st_mtime_ns == stamp
    assert Path(os.environ["XDG_CACHE_HOME"]) in folder.parents


def test_a_missing_model_says_where_to_put_it(home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Missing, match=r"PP-OCRv6_medium_det is not here .* in PaddlePaddle/PP-OCRv6_medium_det$"):
        paddle.make()
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    for model in ("PP-OCRv6_medium_det", "PP-OCRv6_medium_rec"):
        folder = tmp_path / "PaddlePaddle" / model
        folder.mkdir(parents=True)
        (folder / "inference.json").write_text("{}")
    monkeypatch.setattr(paddle.util, "find_spec", lambda name: None if name == "paddle" else object())
    with pytest.raises(Missing, match="pip install paddlepaddle"):
        paddle.make()


def test_models_that_fetch_left_in_the_store_are_found_and_noted(home: None, rapid: paddle.PaddleOCR) -> None:
    """Where they stand is no part of the id: the same files from RapidOCR's wheel have the same."""
    names = ("PP-OCRv6_small_det", "PP-OCRv6_small_rec")
    for name in names:
        shutil.copytree(paddle.from_wheel(name), weight_store.store() / "PaddlePaddle" / name)
    try:
        with downloads.log_downloads() as asked:
            stored = paddle.make("rapid")
        assert [one.source for one in asked] == [f"PaddlePaddle/{name}" for name in names]
        assert all(one.path.is_relative_to(weight_store.store()) for one in asked) and stored.id == rapid.id
    finally:
        shutil.rmtree(weight_store.store() / "PaddlePaddle")


def test_models_that_paddleocr_itself_fetched_are_found_and_noted(
    home: None, rapid: paddle.PaddleOCR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADDLE_PDX_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(paddle, "WHEEL", {})
    for name, suffix in (("PP-OCRv6_small_det", ""), ("PP-OCRv6_small_rec", "_onnx")):
        source = next(Path(os.environ["XDG_CACHE_HOME"]).rglob(f"paddleocr/*/{name}"))
        shutil.copytree(source, tmp_path / "official_models" / f"{name}{suffix}")
        (tmp_path / "official_models" / f"{name}{suffix}" / "README.md").write_text("not needed")
    with downloads.log_downloads() as asked:
        assert paddle.make("rapid").id == rapid.id
    assert [sorted(one.files()) for one in asked] == [["inference.onnx", "inference.yml"]] * 2


def test_a_broken_model_is_one_line(home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    for model in ("PP-OCRv6_medium_det", "PP-OCRv6_medium_rec"):
        folder = tmp_path / "PaddlePaddle" / model
        folder.mkdir(parents=True)
        (folder / "inference.onnx").write_bytes(b"no model")
        (folder / "inference.yml").write_text(f"Global: {{model_name: {model}}}")
    with pytest.raises(UserError, match="^PaddleOCR cannot open PP-OCRv6_medium_det") as caught:
        paddle.make()
    assert "\n" not in str(caught.value)


def test_what_is_not_offered_is_said_before_a_download(home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """PaddleOCR has no ONNX files of the v4 models: without paddlepaddle there is nothing to download."""
    if paddle.util.find_spec("paddle"):
        pytest.skip("paddlepaddle is installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(Missing, match="PaddleOCR offers for PP-OCRv4_mobile_det .* no inference.onnx"):
        paddle.make("2.9")


def test_a_wrong_variant_is_said() -> None:
    for variant in ("3.0", ""):
        with pytest.raises(UserError, match=r"valid: 2\.9, rapid, or none"):
            paddle.make(variant)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle.util, "find_spec", lambda name: None)
    with pytest.raises(
        Missing, match=r"^the scorer 'paddleocr' needs its engine; install with: pip install 'gpobench\[paddle\]'"
    ):
        paddle.make("rapid")

"""mmdet's Mask2Former: real inference on a shrunk network of random weights; mmcv's operators, which it never calls, are a stub."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gpobench.bench.errors import Missing, UserError
from gpobench.bench.files import digest
from gpobench.rewards import detect_mmdet as engine
from gpobench.rewards.detectors import open_detector

pytest.importorskip("mmdet")


class Operators(ModuleType):
    """Stands where mmcv's compiled part would be: every operator is there, and says so when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"mmcv's operator {name} is not compiled")

        return absent


@pytest.fixture(scope="module")
def operators() -> Iterator[None]:
    """mmcv with its compiled operators where they are there, with a stub where they are not."""
    if importlib.util.find_spec("mmcv._ext") is not None:
        yield
        return
    stub = Operators("mmcv._ext")
    stub.__spec__ = ModuleSpec("mmcv._ext", None)
    sys.modules["mmcv._ext"] = stub
    yield
    del sys.modules["mmcv._ext"]


def shrunk() -> Any:
    """GenEval's settings with a ResNet-18 instead of the Swin transformer, 64 channels, 20 queries, 3 classes, pictures of 96 px."""
    from mmengine.config import Config

    config = Config.fromfile(engine.config_file().with_name("mask2former_r50_8xb2-lsj-50e_coco.py"))
    model = config.model
    model.backbone.update(depth=18, init_cfg=None)
    head = model.panoptic_head
    head.update(
        in_channels=[64, 128, 256, 512], feat_channels=64, out_channels=64, num_queries=20, num_things_classes=3
    )
    head.loss_cls.class_weight = [1.0] * 3 + [0.1]
    pixels = head.pixel_decoder.encoder
    pixels.num_layers = 1
    pixels.layer_cfg.self_attn_cfg.embed_dims = 64
    pixels.layer_cfg.ffn_cfg.update(embed_dims=64, feedforward_channels=64)
    head.pixel_decoder.positional_encoding.num_feats = 32
    head.positional_encoding.num_feats = 32
    decoder = head.transformer_decoder
    decoder.num_layers = 2
    decoder.layer_cfg.self_attn_cfg.embed_dims = 64
    decoder.layer_cfg.cross_attn_cfg.embed_dims = 64
    decoder.layer_cfg.ffn_cfg.update(embed_dims=64, feedforward_channels=64)
    model.panoptic_fusion_head.num_things_classes = 3
    model.test_cfg.max_per_image = 40  # of 60 pairs of a query and a class
    for step in config.test_dataloader.dataset.pipeline:
        if step.type == "Resize":
            step.scale = (96, 96)
    return config


@pytest.fixture(scope="module")
def made(operators: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[engine.MMDet, Path]:
    """The detector on random weights, saved as mmdet's runner saves them: with the log of a training in the file."""
    from mmdet.apis import init_detector
    from mmengine.logging import HistoryBuffer

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="checkpoint is None"):
        network: Any = init_detector(shrunk(), None, palette="random", device="cpu")
    with torch.no_grad():  # random weights that see something: surer of a class than of nothing
        network.panoptic_head.cls_embed.bias[:3] = torch.tensor([2.0, 1.0, 0.0])
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    names = ("person", "mouse", "remote")
    log = {"loss": HistoryBuffer([1.0, 0.5], [1, 1])}
    torch.save(
        {"state_dict": network.state_dict(), "meta": {"dataset_meta": {"classes": names}}, "message_hub": log}, path
    )
    return engine.MMDet(shrunk(), path), path


def pictures(rows: int) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (rows, 8, 12, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)


def test_answers_have_the_form_of_the_contract(made: tuple[engine.MMDet, Path]) -> None:
    detector, path = made
    found = detector(pictures(2))
    assert len(found) == 2 and sum(map(len, found)) and detector(pictures(0)) == []
    assert detector.classes == ("person", "computer mouse", "tv remote") and detector.name == "mmdet"
    assert "mmdet-3." in detector.id and "tiny@" in detector.id
    for row in found:
        assert [one.score for one in row] == sorted((one.score for one in row), reverse=True)
        for label, score, box, mask in row:
            assert label in detector.classes and engine.FLOOR < score <= 1
            assert mask is not None and mask.shape == (64, 96) and mask.dtype == bool
            ys, xs = np.nonzero(mask)
            assert box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_a_batch_is_its_pictures_one_by_one_in_any_order(made: tuple[engine.MMDet, Path]) -> None:
    detector, images = made[0], pictures(3)
    whole = [[one[:3] for one in row] for row in detector(images)]
    for i in (2, 0, 1):
        assert [[one[:3] for one in row] for row in detector(images[i : i + 1])] == [whole[i]]
    assert [[one[:3] for one in row] for row in detector(images[::-1])] == whole[::-1]


def test_the_network_sees_red_as_red(made: tuple[engine.MMDet, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """mmdet takes arrays for blue, green, red and turns them itself: what arrives at its backbone is RGB, standardised."""
    detector = made[0]
    seen: list[torch.Tensor] = []
    hook = detector._network.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    red = np.zeros((1, 64, 96, 3), np.uint8)
    red[..., 0] = 255
    detector(red)
    hook.remove()
    wanted = (np.array([255, 0, 0]) - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(seen[0][0, :, 10, 10].numpy(), wanted, atol=1e-4)


def test_a_broken_engine_raises(made: tuple[engine.MMDet, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made[0]._network, "backbone", torch.nn.Linear(1, 1))
    with pytest.raises(RuntimeError):
        made[0](pictures(1))


def test_weights_that_do_not_fit_are_refused(made: tuple[engine.MMDet, Path], tmp_path: Path) -> None:
    kept = torch.load(made[1], weights_only=False)
    key = next(iter(kept["state_dict"]))
    del kept["state_dict"][key]
    torch.save(kept, tmp_path / "less.pth")
    with pytest.raises(UserError, match="does not hold the weights.*" + key):
        engine.MMDet(shrunk(), tmp_path / "less.pth")
    torch.save({"state_dict": {}, "meta": {"code": engine.mask2former}}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="weights alone"):
        engine.MMDet(shrunk(), tmp_path / "code.pth")


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("mmcv._ext") is None:
        with pytest.raises(Missing, match="mmcv._ext") as missing:
            open_detector("mmdet")
        assert "\n" not in str(missing.value)


def test_no_weights_say_where_they_belong(operators: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Missing, match=r"GPOBENCH_WEIGHTS names, as open-mmlab/mask2former.*c9d0c4f2.pth$"):
        open_detector("mmdet")


def test_the_checkpoint_is_fetched_from_its_publisher(
    made: tuple[engine.MMDet, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From a server on this machine, under a name that ends with the beginning of its hash, as the true one's does."""
    _, path = made
    begins, settings = digest(path)[:8], shrunk()
    monkeypatch.delenv("GPOBENCH_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(engine, "config_file", lambda: deepcopy(settings))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Folder, directory=str(path.parent))) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        link = replace(engine.WEIGHTS, url=f"http://127.0.0.1:{server.server_port}/{path.name}", begins=begins)
        monkeypatch.setattr(engine, "WEIGHTS", replace(link, begins="00000000"))
        with pytest.raises(UserError, match="wrong hash after download"):
            open_detector("mmdet")
        monkeypatch.setattr(engine, "WEIGHTS", link)
        fetched = open_detector("mmdet")
        server.shutdown()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = open_detector("mmdet")
    assert again.id == fetched.id and again.id.endswith(f"-c9d0c4f2@{begins}")
    assert again(pictures(1))[0][0].box == fetched(pictures(1))[0][0].box


class Folder(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, format: str, *args: Any) -> None: ...


def test_the_settings_of_genevals_model_are_in_the_package(operators: None) -> None:
    from mmengine.config import Config

    config = Config.fromfile(engine.config_file())
    assert config.model.type == "Mask2Former" and config.model.backbone.depths == [2, 2, 18, 2]
    assert config.model.test_cfg.max_per_image == 100 and config.model.panoptic_head.num_things_classes == 80
    assert [step.scale for step in config.test_dataloader.dataset.pipeline if step.type == "Resize"] == [(1333, 800)]

"""Fetch: downloads from a local hub over HTTP, hash checks, bundles, and every kind of wrong or missing byte."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from gpobench.bench import files
from gpobench.bench.assets import downloads, weight_store
from gpobench.bench.environment import fetch, needs, part_checks, pipeline
from gpobench.bench.errors import Missing, UserError
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.progress import NullProgress

TOY = '''
"""A task whose scorers keep their weights on a hub."""
import numpy as np
from dataclasses import dataclass
from gpobench.bench.assets import weight_store as hub
from gpobench.bench.model_spec import ModelSpec
from gpobench.bench.errors import Missing
from gpobench.bench.assets.downloads import PinnedFile
from gpobench.bench.spec import Columns, EvaluationSettings, Prompt, Scores

LISTS = PinnedFile("toy/prompts.txt", "{address}/prompts.txt")
mini = ModelSpec(name="mini", source="acme/mini", revision="main", pipeline="StableDiffusion3Pipeline")


class Love:
    id, name, metrics = "love-1", "love", ("score",)

    def __init__(self):
        self.weights = hub.file("acme/love", "love.safetensors")
        self.folder = hub.folder("acme/clip", patterns=("*.json", "model*.safetensors"))

    def __call__(self, images, prompts):
        assert images.shape[1:] == (512, 512, 3)
        if any(p.stratum == "colours" for p in prompts):
            hub.file("acme/late", "late.bin")
        return Scores({{"score": np.ones(len(images))}})


class Plain:
    id, name, metrics = "plain-1", "plain", ("score",)

    def __call__(self, images, prompts):
        return Scores({{"score": np.ones(len(images))}})


class Bitten(Plain):
    name = "bitten"

    def __call__(self, images, prompts):
        raise ValueError("a bug")


def Absent():
    raise Missing("the scorer 'absent' needs nothing that there is")


class Eye:
    id, name, distance = "eye-1", "eye", "cosine"

    def __init__(self):
        hub.file("acme/eye", "eye.bin")

    def __call__(self, images):
        return images.mean((1, 2))


@dataclass(frozen=True)
class Toy:
    name: str = "toy"
    version: str = "1"
    own: str = "Love"

    def prompts(self, split, domain):
        lines = [line for line in LISTS.read().decode().splitlines() if line.startswith(split)]
        return [Prompt(line, stratum="colours" if "red" in line else "shapes") for line in lines]

    def reward(self, domain):
        return f"{{__file__}}:{{self.own}}"

    def held_out(self, domain):
        return [f"{{__file__}}:Plain"]

    def scorers(self, domain):
        return [self.reward(domain), *self.held_out(domain), f"{{__file__}}:Absent", f"{{__file__}}:Bitten"]

    def columns(self, domain):
        return Columns(diversity=[f"{{__file__}}:Eye"], drift=[f"{{__file__}}:Eye"])

    def evaluation(self, domain):
        return EvaluationSettings()


def Needy():
    return Toy(own="Absent")
'''
PROMPTS = "".join(
    f"{split}: a {what}\n" for split in needs.SPLITS for what in ("red circle", "square", f"blue {split}")
).encode()


@dataclass
class Notes(NullProgress):
    """Progress that keeps what it was told."""

    phases: list[list[Any]] = field(default_factory=list[list[Any]])
    said: list[str] = field(default_factory=list[str])

    def message(self, text: str) -> None:
        self.said.append(text)

    def phase(self, name: str, total: float) -> None:
        self.phases.append([name, total, 0.0])

    def advance(self, by: float) -> None:
        self.phases[-1][2] += by


@pytest.fixture
def world(hub_server: Any, repository: Any, empty_machine: Path, tiny_pipe: Path) -> str:
    """A hub with a model among much that no run needs, weights of scorers, and a list of prompts; the toy's file."""
    parts = {p.relative_to(tiny_pipe).as_posix(): p.read_bytes() for p in tiny_pipe.rglob("*") if p.is_file()}
    parts.pop("recipe.json")
    junk = {
        "mini.safetensors": b"a whole model in one file" * 99,
        "transformer/diffusion_pytorch_model.fp16.safetensors": b"half",
        "text_encoder/pytorch_model.bin": b"pickled",
        "README.md": b"read me",
        "onnx/unet/model.safetensors": b"not a part",
    }
    hub_server.repositories |= {
        "acme/mini": repository({**parts, **junk}),
        "acme/love": repository({"love.safetensors": b"l" * 1000, "other.bin": b"o" * 50}),
        "acme/clip": repository({"config.json": b"{}", "model.safetensors": b"m" * 700, "model.bin": b"b" * 70}),
        "acme/late": repository({"late.bin": b"late" * 20}),
        "acme/eye": repository({"eye.bin": b"eye" * 30}),
    }
    hub_server.plain["prompts.txt"] = PROMPTS
    toy = empty_machine / "toy.py"
    toy.write_text(TOY.format(address=hub_server.address))
    return str(toy)


def elsewhere(there: Path, monkeypatch: pytest.MonkeyPatch, offline: bool = True) -> None:
    """Another machine: empty caches, and by default no network."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(there / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(there / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")


def test_everything_a_run_needs_and_nothing_else(world: str, tiny_pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Notes()
    told = fetch.fetch(f"{world}:Toy", f"{world}:mini", progress=progress)
    names = {one["repository"]: one["files"] for one in told["repositories"]}
    weights = sum(1 for p in tiny_pipe.rglob("*") if p.is_file()) - 1  # but its recipe
    assert names == {"acme/mini": weights, "acme/love": 1, "acme/clip": 2, "acme/late": 1, "acme/eye": 1}
    assert [one["path"] for one in told["prompts"]] == ["toy/prompts.txt"]
    assert [one["name"].rpartition(":")[2] for one in told["left_out"]] == ["Absent", "Bitten"]
    fetching = next(phase for phase in progress.phases if phase[0] == "fetching mini")
    assert fetching[1] > 10_000 and fetching[1] * 0.9 < fetching[2] <= fetching[1]
    checking = next(phase for phase in progress.phases if phase[0] == "checking hashes")
    assert checking[1] == checking[2] == told["bytes"]
    lock = json.loads(Path(told["lock"]).read_text())
    assert lock["acme/love@" + "c" * 40]["files"]["love.safetensors"]["bytes"] == 1000

    # The model is whole: it loads from that folder alone. And the same again asks for no file.
    from gpobench.bench.models.open import open_model

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model_spec = find_model_spec(f"{world}:mini")
    folder = weight_store.local(model_spec.source, model_spec.revision)
    assert folder is not None
    small = replace(find_model_spec(str(tiny_pipe)), source=str(folder))
    open_model(small, device="cpu", precision="fp32")
    assert fetch.fetch(f"{world}:Toy", f"{world}:mini", progress=Notes())["bytes"] == told["bytes"]


def test_fetched_again_nothing_is_downloaded(world: str, hub_server: Any) -> None:
    first = fetch.fetch(None, f"{world}:mini", progress=NullProgress())
    hub_server.asked.clear()
    again = fetch.fetch(None, f"{world}:mini", progress=NullProgress())
    assert again["bytes"] == first["bytes"] and not [one for one in hub_server.asked if one.startswith("GET acme")]
    hub_server.close()
    notes = Notes()
    assert fetch.fetch(None, f"{world}:mini", progress=notes)["bytes"] == first["bytes"]
    assert any("fetched before are checked" in line for line in notes.said)


def test_scorers_by_name(world: str) -> None:
    told = fetch.fetch(scorers=[f"{world}:Love"], progress=NullProgress())
    assert [one["repository"] for one in told["repositories"]] == ["acme/clip", "acme/love"]


def test_everything_needed_that_cannot_be_had_is_listed(world: str, hub_server: Any) -> None:
    del hub_server.repositories["acme/mini"]
    hub_server.plain.clear()
    with pytest.raises(UserError) as error:
        fetch.fetch(f"{world}:Needy", f"{world}:mini", progress=NullProgress())
    said = str(error.value)
    assert said.startswith("3 of the things") and "\n" not in said
    assert "model mini: " in said and "prompts of" in said and "the scorer 'absent' needs" in said


def test_a_bug_in_a_scorer_that_a_run_needs_is_not_hidden(world: str) -> None:
    toy = Path(world)
    toy.write_text(toy.read_text() + '\n\ndef Sick():\n    return Toy(own="Bitten")\n')
    with pytest.raises(UserError, match="ValueError: a bug"):
        fetch.fetch(f"{world}:Sick", progress=NullProgress())


@pytest.mark.parametrize("name", ["love.safetensors", "config.json"])
def test_wrong_bytes_are_refused(world: str, hub_server: Any, name: str) -> None:
    source = "acme/love" if name == "love.safetensors" else "acme/clip"
    true = hub_server.repositories[source].files[name]
    hub_server.repositories[source].sent[name] = bytes(len(true))
    with pytest.raises(UserError, match=f"wrong hash after download: {name} of {source}.* expected [0-9a-f]+"):
        fetch.fetch(scorers=[f"{world}:Love"], progress=NullProgress())
    assert not (weight_store.store() / weight_store.LOCK).exists()


def test_a_corrupt_file_in_the_hubs_cache_is_found_offline(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch.fetch(scorers=[f"{world}:Love"], progress=NullProgress())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = weight_store.file("acme/love", "love.safetensors")
    path.resolve().write_bytes(b"L" * 1000)
    with pytest.raises(UserError, match="wrong hash after download: love.safetensors"):
        fetch.fetch(scorers=[f"{world}:Love"], progress=NullProgress())


def test_another_hash_under_the_same_commit_is_refused(
    world: str, hub_server: Any, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    fetch.fetch(scorers=[f"{world}:Love"], progress=NullProgress())
    hub_server.repositories["acme/love"].files["love.safetensors"] = b"L" * 1000  # consistent, and not what it was
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(empty_machine / "fresh"))
    with pytest.raises(UserError, match="wrong hash after download: love.safetensors of acme/love@c+ is "):
        fetch.fetch(scorers=[f"{world}:Love"], progress=NullProgress())
    hub_server.repositories["acme/love"].commit = "d" * 40  # another commit may be anything
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(empty_machine / "fresher"))
    assert fetch.fetch(scorers=[f"{world}:Love"], progress=NullProgress())["bytes"] > 1000


def test_prompts_without_a_published_hash_are_locked_too(world: str, hub_server: Any) -> None:
    fetch.fetch(f"{world}:Toy", progress=NullProgress())
    (downloads.cache() / "toy" / "prompts.txt").unlink()
    hub_server.plain["prompts.txt"] = PROMPTS + b"test: more\n"
    with pytest.raises(UserError, match="wrong hash after download: toy/prompts.txt"):
        fetch.fetch(f"{world}:Toy", progress=NullProgress())


def test_a_full_disk_refuses_a_download(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=files.MIN_FREE_DISK + 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(UserError, match="acme/mini takes .* free"):
        fetch.fetch(None, f"{world}:mini", progress=NullProgress())


def test_a_bundle_installs_on_a_machine_without_network(
    world: str, hub_server: Any, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stick = empty_machine / "stick"
    told = fetch.fetch(f"{world}:Toy", f"{world}:mini", to=stick, progress=NullProgress())
    assert told["to"] == str(stick) and (stick / "weights/acme/mini/model_index.json").is_file()
    elsewhere(empty_machine / "there", monkeypatch)
    hub_server.close()
    model_spec = find_model_spec(f"{world}:mini")
    assert weight_store.local(model_spec.source, model_spec.revision) is None
    done = fetch.fetch(source=stick, progress=NullProgress())
    assert done["bytes"] == told["bytes"] and not list(weight_store.store().glob(".incoming-*"))
    assert weight_store.local(model_spec.source, model_spec.revision) == weight_store.store() / "acme" / "mini"
    assert weight_store.file("acme/late", "late.bin").read_bytes() == b"late" * 20
    # All of it is there, and the same command again checks that.
    assert fetch.fetch(f"{world}:Toy", f"{world}:mini", progress=NullProgress())["bytes"] == told["bytes"]
    fetch.fetch(source=stick, progress=NullProgress())
    # The folder also serves as it is, without being installed.
    elsewhere(empty_machine / "third", monkeypatch)
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(stick / "weights"))
    monkeypatch.setenv("GPOBENCH_DATA", str(stick / "data"))
    assert fetch.fetch(f"{world}:Toy", f"{world}:mini", progress=NullProgress())["bytes"] > 0
    assert not (weight_store.store() / "acme").exists()


def test_installing_keeps_the_files_that_were_installed_before(
    world: str, empty_machine: Path, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, scorer in {"one": "Love", "two": "Other"}.items():
        if scorer == "Other":
            toy = Path(world)
            toy.write_text(
                toy.read_text() + '\n\ndef Other():\n    hub.file("acme/love", "other.bin")\n    return Plain()\n'
            )
        fetch.fetch(scorers=[f"{world}:{scorer}"], to=empty_machine / name, progress=NullProgress())
    elsewhere(empty_machine / "there", monkeypatch)
    for name in ("one", "two"):
        fetch.fetch(source=empty_machine / name, progress=NullProgress())
    assert weight_store.file("acme/love", "love.safetensors").read_bytes() == b"l" * 1000
    assert weight_store.file("acme/love", "other.bin").read_bytes() == b"o" * 50
    # A newer commit takes the place of the older one, whole.
    elsewhere(empty_machine / "newer", monkeypatch, offline=False)
    hub_server.repositories["acme/love"].commit = "d" * 40
    fetch.fetch(scorers=[f"{world}:Other"], to=empty_machine / "three", progress=NullProgress())
    elsewhere(empty_machine / "there", monkeypatch)
    fetch.fetch(source=empty_machine / "three", progress=NullProgress())
    assert weight_store.file("acme/love", "other.bin").read_bytes() == b"o" * 50
    with pytest.raises(Missing):
        weight_store.file("acme/love", "love.safetensors")


def test_a_folder_of_the_persons_own_is_bundled_too(
    world: str, empty_machine: Path, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Path(world)
    toy.write_text(
        toy.read_text() + '\n\ndef Gift():\n    assert hub.given_by_hand("pytorch", "net.pth")\n    return Plain()\n'
    )
    own = empty_machine / "own" / "pytorch" / "net.pth"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"net")
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(empty_machine / "own"))
    fetch.fetch(scorers=[f"{world}:Gift"], to=empty_machine / "stick", progress=NullProgress())
    monkeypatch.delenv("GPOBENCH_WEIGHTS")
    elsewhere(empty_machine / "there", monkeypatch)
    fetch.fetch(source=empty_machine / "stick", progress=NullProgress())
    place = weight_store.given_by_hand("pytorch", "net.pth")
    assert place is not None and place.read_bytes() == b"net"


def test_a_file_at_a_plain_address_is_locked_and_bundled(
    world: str, empty_machine: Path, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.plain["net.pth"] = b"net"
    toy, url = Path(world), f"{hub_server.address}/net.pth"
    link = f'hub.PublishedWeights("pytorch", "net.pth", "{url}", pickled=True)'
    toy.write_text(toy.read_text() + f"\n\ndef Far():\n    {link}.find()\n    return Plain()\n")
    told = fetch.fetch(scorers=[f"{world}:Far"], to=empty_machine / "stick", progress=NullProgress())
    digest = hashlib.sha256(b"net").hexdigest()
    row = {"repository": "pytorch", "commit": digest, "files": 1}
    assert told["repositories"] == [{**row, "bytes": 3}]
    lock = json.loads(Path(told["lock"]).read_text())
    assert lock[f"pytorch@{url}"]["files"]["net.pth"]["sha256"] == digest

    # Other bytes at the same address, and rot in the store.
    kept = weight_store.store() / "pytorch" / "net.pth"
    kept.write_bytes(b"rot")
    with pytest.raises(UserError, match="wrong hash after download: net.pth of pytorch@http"):
        fetch.fetch(scorers=[f"{world}:Far"], progress=NullProgress())
    kept.unlink()
    hub_server.plain["net.pth"] = b"other"
    with pytest.raises(UserError, match=f"wrong hash after download: {url} is .* expected {digest}"):
        fetch.fetch(scorers=[f"{world}:Far"], progress=NullProgress())
    assert not kept.exists()

    elsewhere(empty_machine / "there", monkeypatch)
    hub_server.close()
    assert fetch.fetch(source=empty_machine / "stick", progress=NullProgress())["repositories"] == [row]
    again = fetch.fetch(scorers=[f"{world}:Far"], progress=NullProgress())
    assert again["repositories"] == told["repositories"]
    assert json.loads(Path(again["lock"]).read_text())[f"pytorch@{url}"] == lock[f"pytorch@{url}"]


@pytest.fixture
def publishers(hub_server: Any, repository: Any, empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PaddlePaddle, ultralytics and torchvision publish: the small models of a wheel, and random ones of the right form."""
    torch = pytest.importorskip("torch")
    ultralytics = quiet_ultralytics(monkeypatch)
    for package in ("paddleocr", "onnxruntime", "rapidocr", "lpips", "torchvision"):
        pytest.importorskip(package, exc_type=ImportError)
    from torchvision.models import alexnet

    from gpobench.rewards import detect_yolo, embedders, paddle

    for name in ("TORCH_HOME", "PADDLE_PDX_CACHE_HOME"):
        monkeypatch.setenv(name, str(empty_machine / name))
    monkeypatch.delenv("GPOBENCH_YOLO", raising=False)
    for part in ("det", "rec"):
        model, folder = f"PP-OCRv6_medium_{part}", empty_machine / "paddle" / part
        wheel = paddle.from_wheel(f"PP-OCRv6_small_{part}")
        paddle.write_model(folder, model, wheel / "inference.onnx")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub_server.repositories[f"PaddlePaddle/{model}_onnx"] = repository({**files, "README.md": b"read me"})

    torch.manual_seed(0)
    state = {key: value for key, value in alexnet(weights=None).state_dict().items() if key.startswith("features.")}
    torch.save(state, empty_machine / "alexnet.pth")
    serve(embedders, "ALEXNET", empty_machine / "alexnet.pth", hub_server, monkeypatch)
    shape = {"nc": 3, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}
    (empty_machine / "tiny.yaml").write_text(json.dumps(shape))  # JSON is YAML
    ultralytics.YOLO(str(empty_machine / "tiny.yaml"), task="detect").save(empty_machine / "yolo.pt")
    serve(detect_yolo, "WEIGHTS", empty_machine / "yolo.pt", hub_server, monkeypatch)


def quiet_ultralytics(monkeypatch: pytest.MonkeyPatch) -> Any:
    from gpobench.rewards import detect_yolo

    for key, value in detect_yolo.QUIET.items():
        monkeypatch.setenv(key, value)
    Path(detect_yolo.QUIET["YOLO_CONFIG_DIR"]).mkdir(exist_ok=True)
    return pytest.importorskip("ultralytics", exc_type=ImportError)


def serve(module: Any, name: str, file: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's weights as this server publishes them, their hash in their name where the real ones have it."""
    link: weight_store.PublishedWeights = getattr(module, name)
    data = file.read_bytes()
    begins = hashlib.sha256(data).hexdigest()[:8] if link.begins else ""
    path = f"{name.lower()}-{begins}.pth"
    server.plain[path] = data
    monkeypatch.setattr(module, name, replace(link, url=f"{server.address}/{path}", begins=begins))


@pytest.mark.filterwarnings("ignore:.*AGPL-3.0")
def test_the_weights_of_other_engines_are_bundled(
    world: str, publishers: None, hub_server: Any, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    toy = Path(world)
    columns = 'Columns(diversity=["lpips"])'
    more = f"\n\nclass Seen(Toy):\n    def columns(self, domain):\n        return {columns}\n"
    toy.write_text(toy.read_text() + more)
    scorers = ["geneval:yolo", "paddleocr"]
    asked: dict[str, dict[str, Any]] = {"one": {"task": f"{world}:Seen"}, "two": {"scorers": scorers}}
    told = {name: fetch.fetch(**ask, to=empty_machine / name, progress=NullProgress()) for name, ask in asked.items()}
    rows = {one["repository"]: one for done in told.values() for one in done["repositories"]}
    models = [f"PaddlePaddle/PP-OCRv6_medium_{part}_onnx" for part in ("det", "rec")]
    files = {"pytorch": 1, "ultralytics": 1} | dict.fromkeys(models, 2)
    assert {name: rows[name]["files"] for name in files} == files and all(one["commit"] for one in rows.values())

    def looked() -> dict[str, str]:
        parts = [needs.Need("embedder", "lpips", False), *(needs.Need("scorer", name, True) for name in scorers)]
        found = [next(part_checks.check_part(need, False, True, f"gpobench fetch: {need.name}")) for need in parts]
        return {check.name: check.verdict if check.verdict != "broken" else check.detail for check in found}

    elsewhere(empty_machine / "there", monkeypatch)
    hub_server.close()
    before = looked()
    assert before["embedder lpips"] == "missing"
    assert "ultralytics/yolo11n.pt are not here" in before["scorer geneval:yolo"]
    assert before["scorer paddleocr"] == "the OCR model PP-OCRv6_medium_det is not here"
    for name, ask in asked.items():
        fetch.fetch(source=empty_machine / name, progress=NullProgress())
        assert fetch.fetch(**ask, progress=NullProgress())["repositories"] == told[name]["repositories"]
    after = looked()
    assert after["embedder lpips"] == after["scorer paddleocr"] == "ok"  # it reads with true weights
    assert "are not here" not in after["scorer geneval:yolo"]  # random ones count nothing


def cut(stick: Path) -> None:
    os.truncate(stick / "weights/acme/love/love.safetensors", 900)


def flip(stick: Path) -> None:
    (stick / "weights/acme/love/love.safetensors").write_bytes(b"L" * 1000)


def lose(stick: Path) -> None:
    (stick / "weights/acme/clip/config.json").unlink()


def unfinished(stick: Path) -> None:
    (stick / "manifest.json").unlink()


def escape(stick: Path) -> None:
    text = (stick / "manifest.json").read_text()
    (stick / "manifest.json").write_text(text.replace("love.safetensors", "../../../love"))


def scribble(stick: Path) -> None:
    (stick / "manifest.json").write_text('{"repositories": 3}')


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, "love.safetensors is truncated: 900 bytes, expected 1,000; nothing was installed"),
        (flip, "love.safetensors has the wrong hash: [0-9a-f]+, expected [0-9a-f]+; nothing was installed"),
        (lose, "config.json is missing.*nothing was installed"),
        (unfinished, "was not written by `gpobench fetch --to`, or not to its end"),
        (escape, "would lie outside"),
        (scribble, "cannot be read"),
    ],
)
def test_a_damaged_folder_installs_nothing(
    world: str, empty_machine: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None], said: str
) -> None:
    stick = empty_machine / "stick"
    fetch.fetch(scorers=[f"{world}:Love"], to=stick, progress=NullProgress())
    harm(stick)
    elsewhere(empty_machine / "there", monkeypatch)
    with pytest.raises(UserError, match=said) as error:
        fetch.fetch(source=stick, progress=NullProgress())
    assert "\n" not in str(error.value) and not [p for p in weight_store.store().rglob("*") if p.is_file()]


def test_requests_that_make_no_sense(empty_machine: Path) -> None:
    with pytest.raises(UserError, match="say what to fetch"):
        fetch.fetch(progress=NullProgress())
    with pytest.raises(UserError, match="give it alone"):
        fetch.fetch("ocr", source=empty_machine, progress=NullProgress())


def test_needs_of_the_built_in_task() -> None:
    from gpobench.tasks.ocr import OCR

    parts = needs.needs_of_run(OCR(), "glyphs")
    assert [(n.kind, n.name) for n in parts if n.needed] == [("scorer", "rapidocr"), ("scorer", "reader")]
    assert ("embedder", "clip:tiny", False) in [(n.kind, n.name, n.needed) for n in parts]


def test_files_that_diffusers_loads() -> None:
    index = {
        "_class_name": "X", "transformer": ["diffusers", "T"], "text_encoder": ["transformers", "C"],
        "safety_checker": ["stable_diffusion", "S"], "image_encoder": [None, None], "tokenizer_3": ["transformers", "T"],
    }  # fmt: skip
    good = [
        "text_encoder/model-00001-of-00002.safetensors", "text_encoder/model.safetensors.index.json",
        "tokenizer_3/spiece.model", "tokenizer_3/tokenizer.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    bad = [
        "sd3.5_medium.safetensors", "text_encoder/model.fp16-00001-of-00002.safetensors", "text_encoder/pytorch_model.bin",
        "text_encoder/model.safetensors.index.fp16.json", "safety_checker/model.safetensors", "image_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.non_ema.safetensors", "text_encoders/t5xxl.safetensors", "README.md",
    ]  # fmt: skip
    assert pipeline.diffusers_files(index, [*bad, *good]) == ["model_index.json", *good]

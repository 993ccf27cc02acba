"""Planted diseases, each of which the examination must find and name; and a clean bill for what is healthy."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gpobench.bench.assets import weight_store
from gpobench.bench.environment import check_result, doctor, machine_checks, model_checks, part_checks
from gpobench.bench.environment.check_result import Check
from gpobench.bench.environment.needs import Need
from gpobench.bench.errors import UserError
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models import catalogue
from gpobench.bench.progress import NullProgress
from gpobench.tasks.ocr import OCR

NETWORK = "transformer/diffusion_pytorch_model.safetensors"
TOYS = """
import warnings
import numpy as np
from gpobench.bench.assets import weight_store as hub
from gpobench.bench.errors import Missing
from gpobench.bench.spec import Scores


class Untested:
    id, name, metrics = "toy-1", "toy", ("score",)

    def __call__(self, images, prompts):
        return Scores({"score": np.ones(len(images))})


class Good(Untested):
    def self_test(self):
        warnings.warn("this engine is AGPL-3.0")


class Bad(Untested):
    def self_test(self):
        raise RuntimeError("read FISH as FlSH\\nand more")


class Bug(Untested):
    def __init__(self):
        raise ZeroDivisionError("oops")


class Large(Good):
    def __init__(self):
        self.weights = hub.file("acme/large", "model.safetensors")
        assert False, "loaded"


def Absent():
    raise Missing("the scorer 'absent' needs a thing; install with: pip install thing")


class Blind:
    id, name, distance = "blind-1", "blind", "cosine"

    def __call__(self, images):
        return np.ones((len(images), 3), np.float32)
"""


@pytest.fixture
def toys(tmp_path: Path) -> str:
    path = tmp_path / "toys.py"
    path.write_text(TOYS)
    return str(path)


@pytest.fixture
def sick(tiny_pipe: Path, tmp_path: Path) -> Path:
    """A copy of a healthy model."""
    return Path(shutil.copytree(tiny_pipe, tmp_path / "sick"))


def only(checks: Any) -> Check:
    (check,) = checks
    return check


# The whole round


def test_the_embedded_model_and_its_task_are_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPOBENCH_WEIGHTS", raising=False)
    found = {check.name: check for check in doctor.doctor("ocr", "tiny", progress=NullProgress())}
    assert not check_result.broken(list(found.values())), found
    fine = ["python", "packages", "model tiny", "licence of tiny", "memory", "prompts of ocr", "splits"]
    fine += ["scorer rapidocr", "scorer reader"]
    assert [name for name in fine if found[name].verdict != "ok"] == []
    assert "self-test passed" in found["scorer reader"].detail and found["hub"].detail.startswith("HF_HUB_OFFLINE")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert json.loads(json.dumps([asdict(check) for check in found.values()]))


def test_one_collapse_does_not_end_the_round(tiny_pipe: Path, redness: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def collapse() -> Any:
        raise KeyError("something nobody thought of")

    monkeypatch.setattr(doctor, "check_packages", collapse)
    monkeypatch.setattr(doctor, "check_memory", lambda model_spec: iter([Check("memory", "ok", "")]))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(machine_checks, "_unreachable", lambda address: "")
    found = {c.name: c for c in doctor.doctor(f"{redness}:Rich", str(tiny_pipe), progress=NullProgress())}
    assert found["packages"].verdict == "broken" and "KeyError" in found["packages"].detail
    assert found["splits"].verdict == "ok" and found[f"scorer {redness}:Redness"].verdict == "ok"
    assert found[f"scorer {redness}:Absent"].verdict == "missing"
    assert found[f"embedder {redness}:Colour"].verdict == "ok"
    assert "HF_HUB_OFFLINE" not in os.environ
    assert check_result.broken(list(found.values()))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="unknown task"):
        doctor.doctor("orc", "tiny", progress=NullProgress())


def test_rows_and_remedies() -> None:
    checks = [Check("a", "ok", "fine"), Check("b", "warning", "so so", "rest"), Check("c", "broken", "bad", "mend")]
    assert check_result.rows(checks)[2] == ("c", "broken", "bad")
    assert check_result.remedies([*checks, Check("d", "missing", "not here", "rest")]) == ["c: mend", "d, b: rest"]
    assert check_result.broken(checks) and not check_result.broken(checks[:2])


# The model


def model_of(folder: Path) -> Check:
    return next(iter(model_checks.check_weights(find_model_spec(str(folder)), offline=True)))


def test_a_healthy_folder(tiny_pipe: Path) -> None:
    check = model_of(tiny_pipe)
    assert check.verdict == "ok" and "headers and indexes agree" in check.detail


def test_weights_that_are_cut_off_are_found_by_their_head(sick: Path) -> None:
    os.truncate(sick / NETWORK, (sick / NETWORK).stat().st_size - 4)
    check = model_of(sick)
    assert (
        check.verdict == "broken" and "diffusion_pytorch_model.safetensors is cut off" in check.detail and check.remedy
    )


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda data: data[:5], "cut off or no safetensors file"),
        (lambda data: b"\xff" * 200, "cut off or no safetensors file"),
        (lambda data: data[:8] + b"x" + data[9:], "head cannot be read"),
        (lambda data: data + b"more", "too long"),
        (lambda data: data.replace(b'"shape":[', b'"shape":[9', 1), "damaged|cut off|head"),
    ],
)
def test_damaged_heads(sick: Path, harm: Any, said: str) -> None:
    path = sick / NETWORK
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(UserError, match=said):
        model_checks.read_safetensors_header(path)
    assert model_of(sick).verdict == "broken"


def test_the_head_is_what_the_library_reads(tiny_pipe: Path) -> None:
    real = {key: list(tensor.shape) for key, tensor in load_file(tiny_pipe / NETWORK).items()}
    assert {key: one["shape"] for key, one in model_checks.read_safetensors_header(tiny_pipe / NETWORK).items()} == real


def shards(folder: Path) -> tuple[Path, dict[str, str]]:
    """The network split in two files with an index, as large models are."""
    path = folder / NETWORK
    tensors = load_file(path)
    names = sorted(tensors)
    place = {name: f"diffusion_pytorch_model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(names)}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in names if place[name] == file}, path.with_name(file))
    path.unlink()
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return index, place


def test_a_file_that_the_index_names(sick: Path) -> None:
    _, place = shards(sick)
    assert model_of(sick).verdict == "ok"
    lost = sorted(place.values())[-1]
    (sick / "transformer" / lost).unlink()
    check = model_of(sick)
    assert check.verdict == "broken" and f"{lost} is missing, the index names it" in check.detail


def test_a_tensor_that_the_index_places_elsewhere(sick: Path) -> None:
    index, place = shards(sick)
    index.write_text(json.dumps({"weight_map": {**place, "ghost": sorted(place.values())[0]}}))
    assert "lacks 1 tensors that the index places there, ghost first" in model_of(sick).detail
    index.write_text("[]")
    assert "is no index" in model_of(sick).detail


def test_fewer_numbers_than_the_config_asks_for(sick: Path) -> None:
    tensors = load_file(sick / NETWORK)
    largest = max(tensors, key=lambda name: tensors[name].numel())
    save_file({name: tensor for name, tensor in tensors.items() if name != largest}, sick / NETWORK)
    check = model_of(sick)
    assert check.verdict == "broken" and "its config asks for" in check.detail


def test_parts_that_are_not_there(sick: Path) -> None:
    shutil.rmtree(sick / "scheduler")
    (sick / "vae" / "config.json").write_text("{")
    (sick / "text_encoder" / "model.safetensors").unlink()
    told = "; ".join(model_checks.folder_faults(sick))
    assert "scheduler is missing" in told and "vae/config.json cannot be read" in told
    assert "text_encoder holds no weights" in told


def test_a_model_that_is_not_here(empty_machine: Path) -> None:
    online, licence = model_checks.check_weights(catalogue.sd35m, offline=False)
    assert online.verdict == "missing" and online.remedy == "gpobench fetch --model sd35m"
    assert licence.verdict == "warning" and "huggingface.co/stabilityai" in licence.remedy
    assert next(model_checks.check_weights(catalogue.sd35m, offline=True)).verdict == "broken"


def test_a_machine_that_is_too_small(tiny_pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model_spec = find_model_spec(str(tiny_pipe))
    assert only(model_checks.check_memory(model_spec)).verdict == "ok"
    monkeypatch.setattr(model_checks, "main_memory", lambda: 2.0**20)
    assert only(model_checks.check_memory(model_spec)).verdict == "warning"


# Packages, disk, hub


def test_an_extra_that_is_not_installed_and_one_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "lpips":
            raise metadata.PackageNotFoundError(name)
        return {"ultralytics": "7.0", "peft": "0.1"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = {check.name: check for check in machine_checks.check_packages()}
    assert found["extra lpips"].verdict == "missing" and found["extra lpips"].remedy == "pip install 'gpobench[lpips]'"
    assert found["extra yolo"].verdict == "warning" and "7.0 is outside of" in found["extra yolo"].detail
    assert found["peft"].verdict == "broken" and found["peft"].remedy.startswith("pip install 'peft")
    assert "packages" not in found


@pytest.mark.parametrize(("free", "verdict"), [(2**20, "broken"), (2**30, "warning"), (2**40, "ok")])
def test_the_disk(free: int, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert (
        next(check for check in machine_checks.check_disk_and_hub(True) if check.name == "disk for runs").verdict
        == verdict
    )


def test_the_hub_and_the_folders_of_the_environment(
    hub_server: Any, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(empty_machine / "nowhere"))
    monkeypatch.setenv("GPOBENCH_DATA", str(empty_machine))
    found = {check.name: check for check in machine_checks.check_disk_and_hub(False)}
    assert found["hub"].verdict == "ok" and "answers" in found["hub"].detail
    assert found["GPOBENCH_WEIGHTS"].verdict == "broken" and found["GPOBENCH_DATA"].verdict == "ok"
    hub_server.close()
    unreachable = next(check for check in machine_checks.check_disk_and_hub(False) if check.name == "hub")
    assert unreachable.verdict == "warning" and "cannot be reached" in unreachable.detail


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    gb = 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * gb, 40 * gb))
    found = {check.name: check for check in machine_checks.check_device(None)}
    assert found["device"].detail.startswith("a card, 30.0 GB of 40.0 GB free, no bf16")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * gb, 40 * gb))
    assert next(machine_checks.check_device(None)).verdict == "warning"


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    found = {check.name: check for check in machine_checks.check_device(None)}
    assert found["threads"].verdict == "warning" and "OMP_NUM_THREADS" in found["threads"].remedy


# Prompts and scorers


def test_a_wrong_prompt_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "flow_grpo" / "dataset" / "ocr" / "test.txt"
    path.parent.mkdir(parents=True)
    path.write_text('A sign that says "NOT THE FILE"\n')
    monkeypatch.setenv("GPOBENCH_DATA", str(tmp_path))
    check = only(part_checks.check_prompts(OCR(), "open", False))
    assert check.verdict == "broken" and "is not the published file: its sha256 is" in check.detail and check.remedy


def test_prompts_that_stand_in_two_splits(redness: str) -> None:
    from gpobench.bench import registry

    task = registry.load("task", f"{redness}:Overlapping")()
    fine, overlap = part_checks.check_prompts(task, "open", False)
    assert fine.verdict == "ok" and overlap.name == "splits" and overlap.verdict == "broken"


@pytest.mark.parametrize(
    ("name", "needed", "verdict", "said"),
    [
        ("Good", True, "ok", "toy-1: self-test passed"),
        ("Untested", True, "ok", "it has no self-test"),
        ("Bad", False, "broken", "self-test failed: read FISH as FlSH"),
        ("Absent", True, "broken", "pip install thing"),
        ("Absent", False, "missing", "pip install thing"),
        ("Bug", True, "broken", "ZeroDivisionError: oops"),
        ("Bug", False, "warning", "ZeroDivisionError: oops"),
    ],
)
def test_scorers(toys: str, name: str, needed: bool, verdict: str, said: str) -> None:
    check, *_ = part_checks.check_part(Need("scorer", f"{toys}:{name}", needed), False, False, "fetch it")
    assert check.verdict == verdict and said in check.detail and "\n" not in check.detail


def test_weights_that_a_run_would_fetch_are_missing_not_broken(
    toys: str, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = Need("scorer", f"{toys}:Large", True)
    for offline, verdict in ((False, "missing"), (True, "broken")):
        check = only(part_checks.check_part(need, False, offline, "fetch it"))
        assert (check.verdict, check.remedy) == (verdict, "fetch it")
        assert check.detail == "the weights acme/large/model.safetensors are not here"
    monkeypatch.setenv("GPOBENCH_DATA", str(empty_machine))
    check = only(part_checks.check_prompts(OCR(), "open", False))
    assert check.verdict == "missing" and check.detail.endswith(f"is not below GPOBENCH_DATA ({empty_machine})")


def test_a_licence_that_binds_is_said_aloud(toys: str) -> None:
    _, licence = part_checks.check_part(Need("scorer", f"{toys}:Good", True), False, False, "fetch it")
    assert licence.verdict == "warning" and "AGPL" in licence.detail


def test_an_embedder_that_sees_nothing(toys: str) -> None:
    check = only(part_checks.check_part(Need("embedder", f"{toys}:Blind", False), False, False, "fetch it"))
    assert check.verdict == "broken" and "equal or not finite" in check.detail


def test_heavy_weights_are_looked_at_and_not_loaded(
    toys: str, tiny_pipe: Path, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = empty_machine / "own" / "acme" / "large" / "model.safetensors"
    own.parent.mkdir(parents=True)
    shutil.copy(tiny_pipe / NETWORK, own)
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(empty_machine / "own"))
    monkeypatch.setattr(doctor, "HEAVY", 1000)
    need = Need("scorer", f"{toys}:Large", True)
    look = lambda deep: only(part_checks.check_part(need, deep, False, "fetch it"))
    assert look(False).verdict == "ok" and "--deep" in look(False).detail
    assert "AssertionError: loaded" in look(True).detail
    os.truncate(own, own.stat().st_size - 1)
    assert look(False).verdict == "broken" and "is cut off" in look(False).detail
    assert weight_store.file("acme/large", "model.safetensors") == own

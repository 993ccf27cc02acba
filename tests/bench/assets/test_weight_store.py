"""Weights are searched in order (user's folder, store, hub's cache, hub), and each refusal of the hub is one line."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gpobench.bench.assets import downloads, weight_store
from gpobench.bench.errors import Missing, UserError
from gpobench.bench.model_spec import find_model_spec

COMMIT = "c" * 40


def keep(root: Path, name: str, files: dict[str, bytes], **notes: Any) -> Path:
    """A repository as `fetch --from` leaves it in the store."""
    folder = weight_store.store() / name
    for file, data in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    facts = {file: {"bytes": len(data), "sha256": ""} for file, data in files.items()}
    told = {"commit": COMMIT, "revisions": ["main"], "patterns": [], "files": facts, **notes}
    (folder / weight_store.STORED).write_text(json.dumps(told))
    return folder


def test_own_folder_before_store_before_hub(
    hub_server: Any, repository: Any, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.repositories["acme/love"] = repository({"a.bin": b"hub"})
    assert weight_store.file("acme/love", "a.bin").read_bytes() == b"hub"
    keep(empty_machine, "acme/love", {"a.bin": b"store"})
    assert weight_store.file("acme/love", "a.bin").read_bytes() == b"store"
    assert weight_store.file("acme/love", "a.bin", revision=COMMIT).read_bytes() == b"store"
    own = empty_machine / "own" / "acme" / "love" / "a.bin"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"own")
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(empty_machine / "own"))
    assert weight_store.file("acme/love", "a.bin").read_bytes() == b"own"
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(empty_machine / "nowhere"))
    with pytest.raises(UserError, match="names no folder"):
        weight_store.file("acme/love", "a.bin")


def test_a_folder_comes_from_the_store_only_where_all_that_was_asked_for_is_there(
    hub_server: Any, repository: Any, empty_machine: Path
) -> None:
    hub_server.repositories["acme/clip"] = repository({"config.json": b"{}", "model.safetensors": b"x" * 9})
    stored = keep(empty_machine, "acme/clip", {"config.json": b"{}"}, patterns=[["*.json"]])
    assert weight_store.folder("acme/clip", patterns=("*.json",)) == stored
    both = weight_store.folder("acme/clip", patterns=("*.json", "model*.safetensors"))
    assert both != stored and (both / "model.safetensors").is_file()
    assert weight_store.folder("acme/clip", patterns=("*.json",), revision=COMMIT) == stored


def test_the_ledger_keeps_what_was_asked_for(hub_server: Any, repository: Any) -> None:
    hub_server.repositories["acme/clip"] = repository(
        {"config.json": b"{}", "model.safetensors": b"x" * 9, "b.md": b""}
    )
    with downloads.log_downloads() as outer:
        weight_store.file("acme/clip", "config.json")
        with downloads.log_downloads() as inner:
            weight_store.folder("acme/clip", patterns=("*.json", "*.safetensors"))
    weight_store.file("acme/clip", "b.md")
    assert [(a.kind, a.source, a.names, a.revision) for a in outer] == [
        ("file", "acme/clip", ("config.json",), "main"),
        ("folder", "acme/clip", ("*.json", "*.safetensors"), "main"),
    ]
    assert inner == outer[1:] and sorted(inner[0].files()) == ["config.json", "model.safetensors"]
    assert sum(outer.files().values()) == 11  # the config once


def test_refusals_are_one_line_that_says_what_to_do(hub_server: Any, repository: Any) -> None:
    hub_server.repositories |= {
        "acme/shut": repository({"a.bin": b"1"}, gated=True),
        "acme/open": repository({"a.bin": b"1"}),
    }
    cases = [
        (
            lambda: weight_store.file("acme/shut", "a.bin"),
            "accept the licence at https://huggingface.co/acme/shut and log in with: hf auth login",
        ),
        (lambda: weight_store.file("acme/none", "a.bin"), "shows you no repository acme/none"),
        (lambda: weight_store.folder("acme/none"), "shows you no repository acme/none"),
        (lambda: weight_store.file("acme/open", "a.bin", revision="v9"), "acme/open has no revision 'v9'"),
        (lambda: weight_store.folder("acme/open", revision="v9"), "acme/open has no revision 'v9'"),
        (lambda: weight_store.file("acme/open", "b.bin"), "holds no such file"),
        (lambda: weight_store.listing("acme/none", "main"), "shows you no repository acme/none"),
    ]  # fmt: skip
    for ask, said in cases:
        with pytest.raises(Missing) as error:
            ask()
        assert said in str(error.value) and "\n" not in str(error.value) and "GPOBENCH_WEIGHTS" in str(error.value)


def test_a_hub_that_does_not_answer(hub_server: Any) -> None:
    hub_server.close()
    for ask in (
        lambda: weight_store.file("acme/a", "a.bin"), lambda: weight_store.folder("acme/a"), lambda: weight_store.listing("acme/a", "main")
    ):  # fmt: skip
        with pytest.raises(Missing, match="cannot be reached: check the connection"):
            ask()


def test_offline_asks_nobody(hub_server: Any, repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_server.repositories["acme/love"] = repository({"a.bin": b"hub"})
    weight_store.file("acme/love", "a.bin")
    before = len(hub_server.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert weight_store.file("acme/love", "a.bin").read_bytes() == b"hub"
    for ask in (lambda: weight_store.file("acme/love", "b.bin"), lambda: weight_store.folder("acme/other")):
        with pytest.raises(Missing, match="HF_HUB_OFFLINE forbids asking it"):
            ask()
    assert len(hub_server.asked) == before


def test_a_full_disk_is_said() -> None:
    full = ValueError("cannot save")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk is full" in str(weight_store.hub_refusal("acme/love", "a.bin", "main", full))


def test_a_pipeline_is_local_where_it_is_whole(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weight_store.local(str(empty_machine)) == empty_machine
    assert weight_store.local("acme/mini", "main") is None
    assert weight_store.local("not a/repository/name", None) is None
    keep(empty_machine, "acme/mini", {"model_index.json": b"{}"})
    assert weight_store.local("acme/mini", "main") is None  # some file of it
    stored = keep(empty_machine, "acme/mini", {"model_index.json": b"{}"}, patterns=[list(weight_store.PIPELINE)])
    assert weight_store.local("acme/mini", "main") == weight_store.local("acme/mini", COMMIT) == stored
    assert weight_store.local("acme/mini", "d" * 40) is None
    (stored / weight_store.STORED).write_text("{")
    with pytest.raises(UserError, match="fetch again"):
        weight_store.local("acme/mini", "main")
    own = empty_machine / "own" / "acme" / "mini"
    own.mkdir(parents=True)
    (own / "model_index.json").write_text("{}")
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(empty_machine / "own"))
    assert weight_store.local("acme/mini", "main") == own


def test_what_no_hub_serves(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        weight_store.given_by_hand("pytorch", "alexnet.pth") is None
        and weight_store.given_by_hand("paddle/model") is None
    )
    stored = keep(empty_machine, "pytorch", {"alexnet.pth": b"store"})
    with downloads.log_downloads() as asked:
        assert (
            weight_store.given_by_hand("pytorch", "alexnet.pth") == stored / "alexnet.pth"
            and weight_store.given_by_hand("pytorch") == stored
        )
    assert [sorted(one.files()) for one in asked] == [["alexnet.pth"]] * 2
    own = empty_machine / "own" / "pytorch" / "alexnet.pth"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"own")
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(empty_machine / "own"))
    assert weight_store.given_by_hand("pytorch", "alexnet.pth") == own


# What stands at an address


@pytest.fixture
def far(hub_server: Any) -> weight_store.PublishedWeights:
    """Weights that a publisher offers for download."""
    hub_server.plain["files/net-1.pth"] = b"net"
    begins = hashlib.sha256(b"net").hexdigest()[:8]
    return weight_store.PublishedWeights("pytorch", "net.pth", f"{hub_server.address}/files/net-1.pth", begins)


def test_an_address_is_asked_once_and_last(
    far: weight_store.PublishedWeights, hub_server: Any, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = empty_machine / "torch" / "net-1.pth"
    other.parent.mkdir()
    other.write_bytes(b"net")
    assert far.find(other) == other and not hub_server.asked
    rotten = other.with_name("rotten.pth")
    rotten.write_bytes(b"rot")  # a cache of another program, with something else in it
    path = far.find(rotten)
    assert path == weight_store.store() / "pytorch" / "net.pth" and path.read_bytes() == b"net"
    with downloads.log_downloads() as asked:
        assert far.find() == path and hub_server.asked == ["GET files/net-1.pth"]
    assert [(one.kind, one.source, one.names, one.revision) for one in asked] == [
        ("file", "pytorch", ("net.pth",), far.url)
    ]
    kept = weight_store.read_stored(path.parent / weight_store.STORED)
    assert kept and kept.commit == far.url and kept.files["net.pth"]["bytes"] == 3
    assert sorted(one.name for one in path.parent.iterdir()) == [weight_store.STORED, "net.pth"]
    own = empty_machine / "own" / "pytorch" / "net.pth"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"my own, whatever the publisher says")
    monkeypatch.setenv("GPOBENCH_WEIGHTS", str(empty_machine / "own"))
    assert far.find() == own


def test_an_address_is_not_asked_offline(
    far: weight_store.PublishedWeights, hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Missing, match="net.pth are not here, and HF_HUB_OFFLINE forbids .* as pytorch/net.pth$"):
        far.find()
    assert not hub_server.asked


def test_other_bytes_at_an_address_are_not_kept(far: weight_store.PublishedWeights, hub_server: Any) -> None:
    hub_server.plain["files/net-1.pth"] = b"not it"
    with pytest.raises(
        weight_store.WrongHash, match=f"wrong hash after download: {far.url} is [0-9a-f]+, expected {far.begins}"
    ):
        far.find()
    assert list((weight_store.store() / "pytorch").iterdir()) == []
    free = replace(far, begins="")  # nobody says what it must be: what came first is what it must be
    free.find()
    (weight_store.store() / "pytorch" / "net.pth").unlink()
    kept = weight_store.read_stored(weight_store.store() / "pytorch" / weight_store.STORED)
    assert kept is not None
    (weight_store.store() / weight_store.LOCK).write_text(json.dumps({f"pytorch@{far.url}": kept.mapping()}))
    hub_server.plain["files/net-1.pth"] = b"net"
    with pytest.raises(weight_store.WrongHash, match=f"expected {kept.files['net.pth']['sha256']}"):
        free.find()


def test_what_runs_code_when_opened_is_fetched_only_where_a_person_asked(
    far: weight_store.PublishedWeights, hub_server: Any
) -> None:
    pickled = replace(far, pickled=True)
    with pytest.raises(Missing, match="no run fetches them: `gpobench fetch --scorer` does, or put them below"):
        pickled.find()
    assert not hub_server.asked
    with weight_store.allow_pickled():
        path = pickled.find()
    assert pickled.find() == path  # it is here now


def test_an_address_that_does_not_give(far: weight_store.PublishedWeights, hub_server: Any) -> None:
    with pytest.raises(Missing, match="does not give them .*404"):
        replace(far, url=f"{hub_server.address}/nowhere/else/at/all").find()
    hub_server.close()
    with pytest.raises(Missing, match="does not give them") as error:
        far.find()
    assert "\n" not in str(error.value) and not list((weight_store.store() / "pytorch").iterdir())


def test_a_download_that_breaks_off(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        line, _ = server.accept()
        with line:
            line.recv(4096)
            line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nten bytes.")

    with server:
        Thread(target=answer, daemon=True).start()
        with pytest.raises(Missing, match="cut off after 10 of 100 bytes"):
            weight_store.PublishedWeights(
                "pytorch", "net.pth", f"http://127.0.0.1:{server.getsockname()[1]}/net.pth"
            ).find()
    assert not list((weight_store.store() / "pytorch").iterdir())


def test_the_device_of_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPOBENCH_SCORER_DEVICE", "cuda:3")
    assert weight_store.device() == "cuda:3"


# What a local folder is known by


def test_weights_and_settings_are_hashed_apart_and_links_are_followed(tmp_path: Path) -> None:
    shared, folder = tmp_path / "shared", tmp_path / "model"
    for place in (shared, folder / "scheduler"):
        place.mkdir(parents=True)
    (shared / "a.safetensors").write_text("weights")
    (shared / "config.json").write_text("{}")
    (folder / "transformer").symlink_to(shared)
    (folder / "loop").symlink_to(folder)
    model_spec = replace(find_model_spec("tiny"), source=str(folder))
    hashes = lambda: (weight_store.weights_hash(model_spec), weight_store.settings_hash(model_spec))
    first = hashes()
    assert hashes() == first
    (shared / "a.safetensors").write_text("other")
    second = hashes()
    assert second[0] != first[0] and second[1] == first[1]
    (folder / "scheduler" / "scheduler_config.json").write_text('{"shift": 1}')
    third = hashes()
    assert third[0] == second[0] and third[1] != second[1]
    shutil.copytree(folder / "transformer", tmp_path / "copy" / "transformer")
    assert (
        weight_store.weights_hash(replace(model_spec, source=str(tmp_path / "copy"))) == third[0]
    )  # a copy is the same model


def test_a_model_of_the_hub_is_known_by_its_revision() -> None:
    model_spec = find_model_spec("sd35m")
    assert weight_store.weights_hash(model_spec) == weight_store.settings_hash(model_spec) == model_spec.revision

"""Downloads: a published file has the published bytes wherever it comes from, or it is refused."""

from __future__ import annotations

import urllib.error
import urllib.request
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from gpobench.bench.assets import downloads
from gpobench.bench.assets.downloads import PinnedFile, log_download, log_downloads, matches
from gpobench.bench.errors import DownloadLimitExceeded, UserError

TEXT = b"a red circle\nthree blue squares\n"


def lists(server: Any) -> PinnedFile:
    server.plain["lists/test.txt"] = TEXT
    return PinnedFile("toy/test.txt", f"{server.address}/lists/test.txt", sha256=sha256(TEXT).hexdigest())


def test_fetched_once_then_from_the_cache(hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lists(hub_server)
    with log_downloads() as asked:
        assert file.read() == TEXT and file.read() == TEXT
    assert len(hub_server.asked) == 1
    assert [(a.kind, a.source, a.names) for a in asked] == [("prompts", file.url, ("toy/test.txt",))] * 2
    assert asked[0].path == downloads.cache() / "toy" / "test.txt" and asked.files() == {asked[0].path: len(TEXT)}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert file.read() == TEXT


def test_other_bytes_are_refused_from_every_place(
    hub_server: Any, empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lists(hub_server)
    hub_server.plain["lists/test.txt"] = TEXT + b"one more\n"
    with pytest.raises(UserError, match="is not the published file"):
        file.read()
    assert not (downloads.cache() / "toy").exists()
    own = empty_machine / "data" / "toy" / "test.txt"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    monkeypatch.setenv("GPOBENCH_DATA", str(empty_machine / "data"))
    with pytest.raises(UserError, match="is not the published file"), log_downloads() as asked:
        file.read()
    assert not asked


def test_what_cannot_be_had_is_said(hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lists(hub_server)
    hub_server.plain.clear()
    with pytest.raises(UserError, match="GPOBENCH_DATA is not set.*cannot be reached"):
        file.read()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        file.read()


@pytest.mark.parametrize(("said", "means"), [("", False), ("0", False), ("false", False), ("1", True), ("ON", True)])
def test_offline(said: str, means: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", said)
    assert downloads.offline() is means


def test_a_limit_refuses_what_is_heavy(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 100)
    asked = downloads.DownloadRequest("file", "acme/a", ("a.bin",), "main", path)
    with log_downloads(limit=150), pytest.raises(DownloadLimitExceeded):
        assert log_download(asked) == path and log_download(asked) == path  # the same file weighs once
        (tmp_path / "b.bin").write_bytes(b"x" * 51)
        log_download(downloads.DownloadRequest("file", "acme/a", ("b.bin",), "main", tmp_path / "b.bin"))
    assert log_download(asked) == path  # nobody counts any more


def test_patterns_are_the_hub_s() -> None:
    assert matches("unet/a/config.json", ("*.json",)) and matches("anything", ())
    assert not matches("model.bin", ("*.json", "model*.safetensors"))


def test_no_redirect_leads_out_of_https() -> None:
    follow = downloads._HttpsOnlyRedirects().redirect_request  # pyright: ignore[reportPrivateUsage]
    secure = urllib.request.Request("https://acme.test/a")
    with pytest.raises(urllib.error.URLError, match="which is not https"):
        follow(secure, None, 302, "", {}, "http://acme.test/b")
    assert follow(secure, None, 302, "", {}, "https://acme.test/b").full_url == "https://acme.test/b"

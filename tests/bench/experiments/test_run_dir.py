"""The lock of a run directory, its inputs, and what is left of it when `--fresh` is interrupted."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from gpobench.bench.errors import UserError
from gpobench.bench.experiments import run_dir as homes
from gpobench.bench.experiments.run_dir import (
    check_inputs,
    clear_run_dir,
    fingerprint,
    is_locked,
    lock_run_dir,
    refuse_links,
    report_disk_errors,
)


def test_one_at_a_time_and_who_asks_takes_nothing(tmp_path: Path) -> None:
    assert not is_locked(tmp_path) and not (tmp_path / ".lock").exists()
    with lock_run_dir(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match="another process is at work"), lock_run_dir(tmp_path):
            pass
    assert not is_locked(tmp_path)


def test_is_locked_keeps_no_process_from_locking(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            is_locked(tmp_path)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(500):
            with lock_run_dir(tmp_path):
                pass
    finally:
        stop.set()
        asking.join()


def test_on_a_file_system_without_locks_no_process_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock_run_dir(tmp_path):
        assert not is_locked(tmp_path)


def test_inputs_may_be_added_and_not_changed(tmp_path: Path) -> None:
    check_inputs(tmp_path, {"weights": "a"}, {"weights": "the weights"})
    check_inputs(tmp_path, {"task": "ocr"}, {"task": "the task"})  # an earlier start did not store it
    assert json.loads((tmp_path / "inputs.json").read_text()) == {"weights": "a", "task": "ocr"}
    with pytest.raises(UserError, match="the weights changed since .*: --fresh starts over"):
        check_inputs(tmp_path, {"task": "ocr", "weights": "b"}, {"task": "the task", "weights": "the weights"})
    for damage in (b"{", b"[1]", b"\xff"):
        (tmp_path / "inputs.json").write_bytes(damage)
        with pytest.raises(UserError, match="inputs.json is damaged"):
            check_inputs(tmp_path, {"task": "ocr"}, {"task": "the task"})


def test_a_directory_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "ground.json").write_text("{}")
    with pytest.raises(UserError, match="written by an earlier version of gpobench .*: --fresh starts over") as error:
        check_inputs(tmp_path, {"task": "ocr"}, {"task": "the task"})
    assert "\n" not in str(error.value) and not (tmp_path / "inputs.json").exists()


def test_the_fingerprint_is_of_names_sizes_and_the_content_of_small_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "a.parquet"
    found: list[str] = []
    for content in ("one", "two", "three", "one"):
        file.write_text(content)
        found.append(fingerprint(tmp_path))
    assert len(set(found)) == 3 and found[0] == found[-1]
    monkeypatch.setattr(homes, "SMALL", 3)
    assert fingerprint(tmp_path) != found[0]
    before = fingerprint(tmp_path)
    file.write_text("two")
    assert fingerprint(tmp_path) == before  # as large, and too large to be read


@pytest.mark.parametrize("after", range(6))
def test_a_directory_that_is_half_forgotten_shows_no_old_result(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, far = tmp_path / "run", tmp_path / "far"
    for folder in (run / "samples", far):
        folder.mkdir(parents=True)
    for name in ("record.json", "inputs.json", "scores.parquet", "metrics.jsonl", ".lock", "samples/0.png"):
        (run / name).write_text("old")
    (run / "checkpoint").symlink_to(far)

    class Killed(BaseException):
        pass

    left = [after]

    def counted(real):  # type: ignore[no-untyped-def]
        def once(*args, **kwargs):  # type: ignore[no-untyped-def]
            if not left[0]:
                raise Killed
            left[0] -= 1
            return real(*args, **kwargs)

        return once

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(homes.shutil, "rmtree", counted(homes.shutil.rmtree))
        try:
            clear_run_dir(run)
        except Killed:
            assert not after or not (run / "record.json").exists()
            # without what it stands on nobody would see that an old part is old
            assert (run / "inputs.json").exists()
    clear_run_dir(run)
    assert os.listdir(run) == [".lock"] and far.is_dir()


def test_a_finished_run_is_shown_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "MIN_FREE_DISK", 2**62)
    with pytest.raises(UserError, match="a run needs"), report_disk_errors(tmp_path):
        pass
    (tmp_path / "record.json").touch()
    with report_disk_errors(tmp_path):
        pass


def test_a_lock_that_is_a_link_or_a_folder_is_one_line(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(target)
    with pytest.raises(UserError, match="cannot lock"), lock_run_dir(run):
        pass
    assert not is_locked(run) and target.read_text() == "kept"
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot lock"), lock_run_dir(run):
        pass


@pytest.mark.parametrize("name", ["config.toml", "checkpoint", "samples/pairs.png"])
def test_a_run_directory_holds_no_links(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    refuse_links(tmp_path)
    (tmp_path / name).symlink_to("/etc")
    with pytest.raises(UserError, match=f"{name} is a link"):
        refuse_links(tmp_path)

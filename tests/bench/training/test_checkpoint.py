"""Pull the plug at any moment: the next start goes on from what was whole, and ends at the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Optim, Prompt
from gpobench.bench.training import checkpoint
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import optimiser
from gpobench.methods.gpo import GPO

SETTINGS = (
    "optim.epochs=1",
    "optim.minibatches=2",
    "optim.weight_decay=0",
    "prompts=4",
    "group=6",
    "optim.lr=1e-2",
    "optim.ema=0.5",
    "optim.warmup=5",
    "beta=1000",
)
BUDGET = "nfe=4000"  # some twenty iterations
METHOD = GPO(optim=Optim(ema=0.5))


# In one process


@pytest.fixture
def make(tiny_pipe: Path, redness: str) -> Iterator[Callable[[], tuple[MeteredRig, Any]]]:
    made: list[MeteredRig] = []

    def build() -> tuple[MeteredRig, Any]:
        model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=len(made))
        made.append(
            MeteredRig(
                model, [Prompt("a red circle"), Prompt("a sign")], scorer(f"{redness}:Redness"), Meter(Budget(nfe=1e6))
            )
        )
        return made[-1], optimiser(METHOD, made[-1])

    yield build
    for rig in made:
        rig.close()


def work(rig: MeteredRig, adam: torch.optim.Optimizer) -> None:
    """One update, a blend and some memory: something of everything that must survive."""
    rig.score(rig.noise(2), rig.prompts(2))
    rig.velocity(rig.noise(2), rig.uniform(2), rig.prompts(2)).square().mean().backward()
    adam.step()
    adam.zero_grad()
    rig.model.update_copy("ema", 0.5)
    rig.meter.charge(updates=1)
    rig.state["baseline"] = rig.state.get("baseline", torch.zeros(3)) + rig.normal(3)
    rig.state["count"] = rig.state.get("count", 0) + 1
    rig.iteration, rig.iterations_without_signal = rig.iteration + 1, 4
    rig.failures = ["why"]


def test_everything_comes_back(make: Any, tmp_path: Path) -> None:
    rig, adam = make()
    for _ in range(3):
        work(rig, adam)
    checkpoint.save(tmp_path, 3, rig, adam, {"mark": 1, "curve": [{"x": 0.1}]})
    other, other_adam = make()
    assert checkpoint.restore(tmp_path, other, other_adam, print) == {"mark": 1, "curve": [{"x": 0.1}]}
    for left, right in ((rig, adam), (other, other_adam)):  # and both go on alike
        work(left, right)
    assert all(torch.equal(v, other.model.lora.state()[k]) for k, v in rig.model.lora.state().items())
    assert torch.equal(rig.rng.get_state(), other.rng.get_state())
    assert torch.equal(rig.state["baseline"], other.state["baseline"])
    assert rig.state["count"] == other.state["count"] == 4
    moments, others = adam.state_dict()["state"], other_adam.state_dict()["state"]
    assert moments.keys() == others.keys()
    assert all(torch.equal(v, others[i][k]) for i, own in moments.items() for k, v in own.items())
    assert (other.iteration, other.iterations_without_signal, other.failures) == (4, 4, ["why"])
    mine, theirs = rig.meter.state(), other.meter.state()
    for state in (mine, theirs):
        state["seconds"] = 0
        state["scorers"]["redness"]["seconds"] = 0
    assert mine == theirs


def test_the_two_latest_are_kept_and_unfinished_ones_deleted(make: Any, tmp_path: Path) -> None:
    rig, adam = make()
    (tmp_path / ".7.tmp").mkdir()
    for number in (0, 5, 11, 100):
        checkpoint.save(tmp_path, number, rig, adam, {})
    assert checkpoint.numbers(tmp_path) == [11, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000011", "00000100"]
    assert checkpoint.restore(tmp_path / "gone", rig, adam, print) is None


def harm(place: Path, how: str) -> None:
    tensors, facts = place / checkpoint.TENSORS, place / checkpoint.FACTS
    if how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif how == "no tensors":
        tensors.unlink()
    elif how == "no facts":
        facts.unlink()
    elif how == "empty facts":
        facts.write_bytes(b"")
    elif how == "exchanged":
        older = sorted(place.parent.iterdir())[0]
        shutil.copy(older / checkpoint.TENSORS, tensors)
    else:
        file = facts if "facts" in how else tensors
        content = bytearray(file.read_bytes())
        content[{"first": 0, "middle": len(content) // 2, "last": -20}[how.split()[-1]]] ^= 0x04
        file.write_bytes(content)


@pytest.mark.parametrize(
    "how",
    ["truncated tensors", "no tensors", "no facts", "empty facts", "exchanged", "flipped facts first",
     "flipped facts middle", "flipped facts last", "flipped tensors first", "flipped tensors middle",
     "flipped tensors last"],
)  # fmt: skip
def test_a_damaged_one_is_passed_over_with_a_message(make: Any, tmp_path: Path, how: str) -> None:
    rig, adam = make()
    for number in (1, 2):
        work(rig, adam)
        checkpoint.save(tmp_path, number, rig, adam, {"number": number})
    harm(tmp_path / "00000002", how)
    said: list[str] = []
    other, other_adam = make()
    assert checkpoint.restore(tmp_path, other, other_adam, said.append) == {"number": 1}
    assert other.iteration == 1 and other.meter.updates == 1
    assert len(said) == 1 and "00000002 is damaged" in said[0] and "\n" not in said[0]
    harm(tmp_path / "00000001", "no facts")
    assert checkpoint.restore(tmp_path, other, other_adam, said.append) is None
    assert len(said) == 3


@pytest.mark.parametrize("file", [checkpoint.TENSORS, checkpoint.FACTS])
def test_a_disk_that_fills_up_half_way_leaves_the_last_one(
    make: Any, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, adam = make()
    checkpoint.save(tmp_path, 1, rig, adam, {"number": 1})

    def full(path: Path) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, 2, rig, adam, {"number": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001"]
    assert checkpoint.restore(tmp_path, rig, adam, print) == {"number": 1}


# As a person sees it: real processes, real signals


def command(tiny_pipe: Path, redness: str, out: Path, seed: int = 0, task: str = "Paint") -> list[str]:
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return [
        "run", "--method", "gpo", "--task", f"{redness}:{task}", "--model", str(tiny_pipe), "--budget", BUDGET,
        "--seed", str(seed), "--out", str(out), "--json", *sets,
    ]  # fmt: skip


def home_of(out: Path) -> Path:
    (run_dir,) = (path for path in out.iterdir() if not path.name.startswith("."))
    return run_dir


def result(out: Path) -> tuple[bytes, dict[str, torch.Tensor]]:
    run_dir = home_of(out)
    return (run_dir / "scores.parquet").read_bytes(), load_file(
        run_dir / "adapter" / "pytorch_lora_weights.safetensors"
    )


def same(a: tuple[bytes, dict[str, torch.Tensor]], b: tuple[bytes, dict[str, torch.Tensor]]) -> bool:
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(v, b[1][k]) for k, v in a[1].items())


def iterations(out: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (home_of(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(gpobench: Any, tiny_pipe: Path, redness: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was not interrupted."""
    out = tmp_path_factory.mktemp("whole")
    ended = gpobench(*command(tiny_pipe, redness, out))
    assert ended.code == 0, ended.err
    return out


# What a process does to itself at an exact moment: the Nth call of a function.
AT = """
import itertools, shutil, signal
from pathlib import Path
from gpobench.bench.evaluation import evaluator
from gpobench.bench.experiments.artifacts import RunFiles
def at(home, name, n, act):
    real, calls = getattr(home, name), itertools.count(1)
    def counted(*args, **kwargs):
        if next(calls) == n:
            act()
        return real(*args, **kwargs)
    setattr(home, name, counted)
def die(): os.kill(os.getpid(), signal.SIGKILL)
def interrupt(): os.kill(os.getpid(), signal.SIGINT)
def terminate(): os.kill(os.getpid(), signal.SIGTERM)
"""
STEP = "torch.optim.AdamW, 'step'"  # two in each iteration; a mark falls on every other iteration
MOMENTS = [
    ("before anything is on disk", "os, 'fsync', 1"),
    ("while the base is evaluated", "evaluator, 'render', 1"),
    ("between the base's pictures and their table", "os, 'fsync', 3"),
    ("when the first checkpoint waits for its name", "Path, 'rename', 1"),
    ("in the first update", f"{STEP}, 1"),
    ("right after a checkpoint", f"{STEP}, 9"),
    ("half-way through writing a checkpoint", "checkpoint, 'sync', 2"),
    ("when a checkpoint waits for its name", "Path, 'rename', 2"),
    ("between two checkpoints", f"{STEP}, 6"),
    ("while a checkpoint too many is removed", "shutil, 'rmtree', 2"),
    ("while the result is evaluated", "running, 'estimates', 1"),
    ("before the scores are written", "RunFiles, 'write_scores', 1"),
    ("after the scores were written", "RunFiles, 'write_samples', 1"),
    ("before the record is written", "running.record, 'write', 1"),
]


def test_a_run_killed_at_any_moment_ends_at_the_same_bytes(
    gpobench: Any, whole: Path, tiny_pipe: Path, redness: str, tmp_path: Path
) -> None:
    argv = command(tiny_pipe, redness, tmp_path)
    for moment, where in MOMENTS:
        ended = gpobench(*argv, before=f"{AT}at({where}, die)")
        assert ended.code == -signal.SIGKILL, f"{moment}: {ended.err}"
        assert ended.out == "" and not list(tmp_path.glob("*/record.json")), moment
        assert "damaged" not in ended.err, moment
    ended = gpobench(*argv)
    assert ended.code == 0 and "going on from update" in ended.err
    assert same(result(tmp_path), result(whole))
    assert iterations(tmp_path) == iterations(whole) == list(range(1, 21))
    mine, theirs = (json.loads((home_of(out) / "record.json").read_text()) for out in (tmp_path, whole))
    for key in ("before", "after", "delta", "stop", "nfe_by_role", "config", "flags"):
        assert mine[key] == theirs[key], key
    for key in ("nfe", "images", "reward_calls", "updates", "flops"):
        assert mine["spent"][key] == theirs["spent"][key]
    assert [p["scores"] for p in mine["curve"]] == [p["scores"] for p in theirs["curve"]]
    left = [p for p in home_of(tmp_path).rglob("*") if ".tmp" in p.name]
    assert left == []


@pytest.fixture(scope="module")
def undisturbed(gpobench: Any, tiny_pipe: Path, redness: str, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that the whole run takes on this machine, now."""
    began = time.monotonic()
    assert gpobench(*command(tiny_pipe, redness, tmp_path_factory.mktemp("timed"))).code == 0
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_kills_at_random(
    gpobench: Any, whole: Path, undisturbed: float, tiny_pipe: Path, redness: str, tmp_path: Path, trial: int
) -> None:
    argv, chance, kills = command(tiny_pipe, redness, tmp_path), random.Random(trial), 0

    def kill(pid: int) -> None:
        time.sleep(chance.uniform(0.02, 0.9) * undisturbed)
        with suppress(
            ProcessLookupError
        ):  # it was done first, which only a start that went on from a late checkpoint is
            os.kill(pid, signal.SIGKILL)

    while kills < 6 and (ended := gpobench(*argv, meanwhile=kill)).code != 0:
        assert ended.code == -signal.SIGKILL and "damaged" not in ended.err, ended.err
        kills += 1
    assert kills > 0 and gpobench(*argv).code == 0
    assert same(result(tmp_path), result(whole)) and iterations(tmp_path) == iterations(whole)


@pytest.mark.parametrize("how", ["interrupt", "terminate"])
def test_an_interrupted_run_says_so_and_continues_later(
    gpobench: Any, whole: Path, tiny_pipe: Path, redness: str, tmp_path: Path, how: str
) -> None:
    argv = command(tiny_pipe, redness, tmp_path)
    ended = gpobench(*argv, before=f"{AT}at({STEP}, 9, {how})")
    assert ended.code == 130 and ended.out == ""
    assert "stopping after the step at hand" in ended.err and "the same command goes on from there" in ended.err
    assert "Traceback" not in ended.err
    done = iterations(tmp_path)[-1]
    assert done == 5  # the iteration at hand was ended
    assert checkpoint.numbers(home_of(tmp_path) / "checkpoint")[-1] == done  # nothing was lost
    ended = gpobench(*argv)
    assert ended.code == 0 and "going on from update" in ended.err
    assert same(result(tmp_path), result(whole)) and iterations(tmp_path) == iterations(whole)


def test_interrupted_twice_a_run_stops_at_once(gpobench: Any, tiny_pipe: Path, redness: str, tmp_path: Path) -> None:
    argv = command(tiny_pipe, redness, tmp_path)
    ended = gpobench(*argv, before=f"{AT}at({STEP}, 9, interrupt); at({STEP}, 10, interrupt)")
    assert ended.code == 130 and ended.out == "" and "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("gpobench: stopped")
    assert iterations(tmp_path)[-1] == 4


def test_a_finished_run_is_shown_not_done_again(gpobench: Any, whole: Path, tiny_pipe: Path, redness: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in home_of(whole).rglob("*") if p.is_file() and p.name != ".lock"}
    ended = gpobench(*command(tiny_pipe, redness, whole))
    assert ended.code == 0 and "already done" in ended.err
    stored = json.loads((home_of(whole) / "record.json").read_text())
    assert stored["checksums"].pop("record.json") and json.loads(ended.out) == stored
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_the_seed_decides_and_nothing_else(
    gpobench: Any, whole: Path, tiny_pipe: Path, redness: str, tmp_path: Path
) -> None:
    assert gpobench(*command(tiny_pipe, redness, tmp_path / "again")).code == 0
    assert same(result(tmp_path / "again"), result(whole))
    assert gpobench(*command(tiny_pipe, redness, tmp_path / "other", seed=1)).code == 0
    assert result(tmp_path / "other")[0] != result(whole)[0]
    assert not same(result(tmp_path / "other"), result(whole))


@pytest.mark.parametrize("how", ["truncated tensors", "flipped facts middle"])
def test_a_damaged_checkpoint_is_reported_and_the_result_is_the_same(
    gpobench: Any, whole: Path, tiny_pipe: Path, redness: str, tmp_path: Path, how: str
) -> None:
    argv = command(tiny_pipe, redness, tmp_path)
    gpobench(*argv, before=f"{AT}at({STEP}, 14, die)")
    places = home_of(tmp_path) / "checkpoint"
    newest = checkpoint.numbers(places)[-1]
    harm(places / f"{newest:08d}", how)
    ended = gpobench(*argv)
    assert ended.code == 0 and f"{newest:08d} is damaged" in ended.err and "the one before it is used" in ended.err
    assert same(result(tmp_path), result(whole)) and iterations(tmp_path) == iterations(whole)


def test_two_processes_never_share_a_run(gpobench: Any, tiny_pipe: Path, redness: str, tmp_path: Path) -> None:
    import fcntl

    argv = command(tiny_pipe, redness, tmp_path)
    gpobench(*argv, before=f"{AT}at({STEP}, 1, die)")
    with (home_of(tmp_path) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = gpobench(*argv)
    assert ended.code == 2 and "another process is at work on" in ended.err and ended.out == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, where this user may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("left", [0, 100_000])
def test_a_full_disk_is_one_line_and_loses_nothing(
    gpobench: Any, whole: Path, tiny_pipe: Path, redness: str, small_disk: Path, left: int
) -> None:
    out = small_disk / "runs"
    argv = command(tiny_pipe, redness, out)
    ballast = small_disk / "ballast"
    fill = f"""
def fill():
    with open({str(ballast)!r}, "wb", buffering=0) as file:
        room = shutil.disk_usage(file.name).free - {left}
        file.write(bytes(max(0, room)))
at({STEP}, 13, fill)
from gpobench.bench.experiments import run_dir as place
place.MIN_FREE_DISK = 0  # else the run would not begin on so small a disk
"""
    ended = gpobench(*argv, before=AT + fill)
    assert ended.code == 2 and ended.out == "", ended.err
    assert ended.err.splitlines()[-1].startswith("gpobench: no space left at") and "Traceback" not in ended.err
    kept = checkpoint.numbers(home_of(out) / "checkpoint")
    assert kept and kept[-1] > 0
    ballast.unlink()
    ended = gpobench(*argv, before="from gpobench.bench.experiments import run_dir; run_dir.MIN_FREE_DISK = 0")
    assert ended.code == 0 and "damaged" not in ended.err, ended.err
    assert same(result(out), result(whole)) and iterations(out) == iterations(whole)


@pytest.mark.parametrize("syncs", [1, 3, 6, 12])
def test_a_disk_that_fills_up_at_any_write_loses_nothing(
    gpobench: Any, whole: Path, tiny_pipe: Path, redness: str, tmp_path: Path, syncs: int
) -> None:
    """As above for users who may not mount: the Nth write that must reach the disk does not."""
    fault = (
        "import errno, itertools\nreal, count = os.fsync, itertools.count(1)\n"
        f"def fsync(fd):\n    if next(count) >= {syncs}: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "    real(fd)\nos.fsync = fsync"
    )
    argv = command(tiny_pipe, redness, tmp_path)
    ended = gpobench(*argv, before=fault)
    assert ended.code == 2 and ended.out == ""
    assert ended.err.splitlines()[-1].startswith("gpobench: no space left at") and "Traceback" not in ended.err
    ended = gpobench(*argv)
    assert ended.code == 0 and same(result(tmp_path), result(whole))


def test_a_disk_with_too_little_room_is_refused_at_once(
    gpobench: Any, tiny_pipe: Path, redness: str, tmp_path: Path
) -> None:
    ended = gpobench(
        *command(tiny_pipe, redness, tmp_path),
        before="from gpobench.bench.experiments import run_dir; run_dir.MIN_FREE_DISK = 2**62",
    )
    assert ended.code == 2 and "MB are free" in ended.err and ended.out == "" and list(tmp_path.iterdir()) == []


def checked(payload: str) -> str:
    return json.dumps({"sha256": hashlib.sha256(payload.encode()).hexdigest(), "payload": payload})


DEEP = "[" * 100_000 + "]" * 100_000
FORGED = ["[]", "null", "1", '"x"', "{}", DEEP, '{"payload": 1, "sha256": "x"}', '{"payload": "x", "sha256": 1}']
FORGED += [checked(text) for text in ("[]", "null", "1", "{}", "x", DEEP, '{"iteration": "3"}')]


@given(st.sampled_from(FORGED) | st.text().map(checked) | st.text())
def test_what_is_no_checkpoint_is_passed_over_in_one_line(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "00000003").mkdir()
        (folder / "00000003" / checkpoint.FACTS).write_text(text, "utf-8", errors="replace")
        (folder / "00000003" / checkpoint.TENSORS).write_bytes(b"")
        messages: list[str] = []
        nothing: Any = None  # neither rig nor optimiser is touched
        assert checkpoint.restore(folder, nothing, nothing, messages.append) is None
        assert len(messages) == 1 and "is damaged" in messages[0]


def test_only_names_that_save_gives_are_checkpoints(tmp_path: Path) -> None:
    for name in ("²", "٣", "3", "000000003", "-0000001", "00000002", "100000000", ".00000004"):
        (tmp_path / name).mkdir()
    assert checkpoint.numbers(tmp_path) == [2, 100_000_000]

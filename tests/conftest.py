"""The quiet room the tests run in: one thread, no network, the same random examples every time."""

from __future__ import annotations

import os

# Before anything imports torch or huggingface_hub: spinning threads on shared cores cost a factor of ten.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_THREAD_LIMIT", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

import contextlib  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import suppress  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

sys.path.insert(0, str(Path(__file__).with_name("perturbed")))
pytest_plugins = ["perturbation", "selection"]

# The published prompt lists, where they lie beside the checkout; the tests that need them are skipped elsewhere.
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if BESIDE.is_dir():
    os.environ.setdefault("GPOBENCH_DATA", str(BESIDE))


def pytest_configure(config: pytest.Config) -> None:
    """Write yapf's grammar cache before the workers start: mmdet imports yapf, which, on its first use after it was installed,
    writes a pickle that another process can read half-written (EOFError at collection, seen in a clean clone)."""
    if not hasattr(config, "workerinput"):
        with contextlib.suppress(ImportError):
            importlib.import_module("yapf")


settings.register_profile("gpobench", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("gpobench")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository root, which is the package."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection that would leave this machine fails the test that tried it."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address[0]}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


# A small model, a small task, and the real command line at the speed of a fork


@pytest.fixture(scope="session")
def tiny_pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random StableDiffusion3Pipeline of a few thousand parameters on disk, 16x16 pixels, that states its protocol."""
    from gpobench.bench.models.mini import write_sd3

    return write_sd3(tmp_path_factory.mktemp("models") / "mini", seed=0)


@pytest.fixture(scope="session")
def tiny_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the other family: a random StableDiffusionPipeline, a U-Net that predicts the noise."""
    from gpobench.bench.models.mini import write_sd15

    return write_sd15(tmp_path_factory.mktemp("models") / "mini-unet", seed=0)


@pytest.fixture(scope="session")
def redness() -> str:
    """The file of the test task: `redness + ":Paint"` is a task."""
    return str(Path(__file__).with_name("redness.py"))


ZYGOTE = """
import json, os, sys, traceback
import diffusers, pandas, peft, pyarrow.parquet, torch
from diffusers import StableDiffusion3Pipeline
import gpobench.bench.experiments.run as running
from gpobench.bench.training import checkpoint
from gpobench.bench.commands.app import main
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for fd, path in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv = ["gpobench", *job["argv"]]
        try:
            exec(job["before"])
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int  # minus the signal's number where one ended it
    out: str
    err: str


class Commands:
    """The command line, forked from a process that has already imported what is heavy: real processes, real kills."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __call__(
        self, *argv: str | Path, meanwhile: Callable[[int], None] = lambda pid: None, before: str = ""
    ) -> Ended:
        """Run `gpobench ARGV`. meanwhile: given the process id while it runs. before: Python run first, in there."""
        out, err = self._folder / "out", self._folder / "err"
        job = {"argv": [str(a) for a in argv], "out": str(out), "err": str(err), "before": before}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        pid = int(self._line())
        try:
            meanwhile(pid)
        except BaseException:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(pid, signal.SIGKILL)
            self._line()
            raise
        return Ended(int(self._line()), out.read_text("utf-8"), err.read_text("utf-8"))

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture(scope="session")
def gpobench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """`gpobench("run", "--method", ...)` -> exit code, stdout and stderr."""
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()

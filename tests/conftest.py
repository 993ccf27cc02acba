"""The quiet room the tests run in: one thread, no network, the same random examples every time."""

from __future__ import annotations

import os

# Before anything imports torch or huggingface_hub: spinning threads on shared cores cost a factor of ten.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_THREAD_LIMIT", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("GPOBENCH_SCORER_WORKERS", "0")  # on machines of many cores too; tests that want some say so

import contextlib  # noqa: E402
import importlib  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.with_name("benchmarks")))  # which import one another
sys.path.insert(0, str(Path(__file__).with_name("perturbed")))
sys.path.insert(0, str(Path(__file__).parent))
pytest_plugins = ["perturbation", "selection"]

from forked import Commands  # noqa: E402

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


@pytest.fixture(scope="session")
def gpobench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """`gpobench("run", "--method", ...)` -> exit code, stdout and stderr."""
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()

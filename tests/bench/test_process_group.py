"""Several processes make the run of one: same prompts, same cost, same updates, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpobench.bench.process_group import ProcessGroup


def test_alone_nothing_is_shared() -> None:
    processes, part = ProcessGroup(), torch.ones(2)
    processes.broadcast_parts([part])
    assert processes.is_main and processes.owns(3)
    assert (
        processes.exchange_objects([1, "two"]) == [1, "two"]
        and processes.gather({"a": 1}) == [{"a": 1}]
        and processes.any(True)
    )
    assert processes.from_main(lambda: 5) == 5
    p = torch.nn.Parameter(part.clone())
    processes.sum_gradients([p])
    assert p.grad is None


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_part_has_one_owner(size: int) -> None:
    owners = [[k for k in range(20) if ProcessGroup(rank, size).owns(k)] for rank in range(size)]
    assert sorted(k for own in owners for k in own) == list(range(20))


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes")  # with CPUs its --cpu starts one


def start(processes: int, *argv: str, out: Path, by: Sequence[str] = TORCHRUN) -> dict:  # type: ignore[type-arg]
    """`torchrun --nproc-per-node N -m gpobench.bench.commands.app run ...`, or the same by `accelerate launch`; the record it prints."""
    command = [sys.executable, "-m", *by, str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "-m", "gpobench.bench.commands.app", "run", *argv, "--out", str(out), "--json"],
        capture_output=True,
        text=True,
        env=env,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("method", "group"), [("gpo", ["group=4"]), ("flow-grpo", ["group=4"]), ("branch-grpo", ["split_steps=[0,2]"])]
)
def test_two_processes_make_the_run_of_one(
    method: str, group: list[str], tiny_pipe: Path, redness: str, tmp_path: Path
) -> None:
    sets = [
        *group,
        "optim.lr=1e-3",
        "optim.minibatches=2",
        "optim.epochs=1",
        "prompts=3",
        "optim.ema=0.5",
        "optim.micro=1",
        "rows=5",
    ]
    argv = ["--method", method, "--task", f"{redness}:Rich", "--model", str(tiny_pipe), "--budget", "nfe=700"]
    argv += [part for text in sets for part in ("--set", text)]
    one, two = (start(n, *argv, out=tmp_path / str(n)) for n in (1, 2))
    for key in ("images", "updates", "nfe", "reward_calls"):
        assert one["spent"][key] == two["spent"][key] > 0, key
    assert one["nfe_by_role"] == two["nfe_by_role"] and one["stop"] == two["stop"]
    assert one["scorers"]["redness"]["calls"] == two["scorers"]["redness"]["calls"]
    weights = [load_file(Path(r["run_dir"], "adapter", "pytorch_lora_weights.safetensors")) for r in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] - weights[1][key]).abs().max() < 1e-5 for key in weights[0])
    assert any(bool(tensor.any()) for key, tensor in weights[0].items() if "lora_B" in key)  # it did learn
    for key, number in one["after"].items():
        assert number["mean"] == pytest.approx(two["after"][key]["mean"], abs=2e-3), key
    lines = [Path(r["run_dir"], "metrics.jsonl").read_text().splitlines() for r in (one, two)]
    assert len(lines[0]) == len(lines[1])


def test_accelerate_starts_them_on_the_embedded_model(redness: str, tmp_path: Path) -> None:
    sets = ["prompts=3", "group=4", "optim.warmup=0", "optim.micro=1", "rows=5", "evaluation.test_images=1"]
    argv = ["--method", "gpo", "--task", f"{redness}:Paint", "--model", "tiny", "--budget", "updates=3"]
    argv += [part for text in sets for part in ("--set", text)]
    one, two = start(1, *argv, out=tmp_path / "1"), start(2, *argv, out=tmp_path / "2", by=ACCELERATE)
    assert {k: v for k, v in one["spent"].items() if k != "seconds"} == {
        k: v for k, v in two["spent"].items() if k != "seconds"
    }
    weights = [load_file(Path(r["run_dir"], "adapter", "pytorch_lora_weights.safetensors")) for r in (one, two)]
    assert all((weights[0][key] - weights[1][key]).abs().max() < 1e-5 for key in weights[0])
    assert any(bool(tensor.any()) for key, tensor in weights[0].items() if "lora_B" in key)

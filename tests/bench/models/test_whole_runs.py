"""Whole runs of every pipeline class: trained by three methods, killed, resumed, the adapter loaded by plain diffusers."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpobench.bench.evaluation import record
from gpobench.bench.evaluation.evaluator import noise, sample_protocol
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.progress import NullProgress
from gpobench.bench.rendering import to_uint8
from gpobench.bench.spec import Prompt

FAMILIES = ("tiny_pipe", "tiny_flux", "tiny_sdxl", "tiny_unet")
SETS = ["prompts=2", "group=4", "optim.lr=3e-3", "optim.micro=0", "optim.ema=0", "evaluation.eval_points=2"]
BUDGET = "nfe=600"

# What the process does to itself in the update LAST.
DIE = """
import signal
real, calls = torch.optim.AdamW.step, iter(range(1, 10**6))
def step(*args, **more):
    if next(calls) == LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **more)
torch.optim.AdamW.step = step
"""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["gpo", "diffusion-dpo", "flow-grpo"])
def test_a_run_is_killed_goes_on_and_its_adapter_loads(
    method: str, family: str, request: pytest.FixtureRequest, gpobench: Any, redness: str, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(family)
    plan = resolve(RunRequest(method, f"{redness}:Paint", str(folder), budget=BUDGET, sets=SETS))
    whole = running.run(plan, runs=tmp_path / "whole", progress=NullProgress())
    assert whole.spent["updates"] >= 2 and whole.stop == "budget: nfe"
    argv = ["run", "--method", method, "--task", f"{redness}:Paint", "--model", folder, "--budget", BUDGET]
    argv += [word for text in SETS for word in ("--set", text)] + ["--out", tmp_path / "cut"]
    assert gpobench(*argv, before=DIE.replace("LAST", str(int(whole.spent["updates"])))).code == -signal.SIGKILL
    ended = gpobench(*argv)
    assert ended.code == 0 and re.search("going on from update [1-9]", ended.err), ended.err
    again = record.read(tmp_path / "cut" / plan.slug() / "record.json")
    files = [Path(r.run_dir, "adapter", "pytorch_lora_weights.safetensors") for r in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes() and again.after == whole.after
    assert_same_pictures(folder, files[0].parent)


def assert_same_pictures(folder: Path, adapter: Path) -> None:
    """Our class with the adapter, and a pipeline of diffusers that loaded it in its own way, draw the same from one noise."""
    model_spec, prompt = find_model_spec(str(folder)), Prompt("a red circle")
    with torch.no_grad():
        bare, ours, theirs = (open_model(model_spec, device="cpu") for _ in range(3))
        ours.load_adapter(adapter)
        theirs.pipe.load_lora_weights(str(adapter), weight_name="pytorch_lora_weights.safetensors")
        x = noise([(prompt.text, 0)], 7, ours.shape)
        drawn: list[Any] = [to_uint8(m.decode(sample_protocol(m, x, [prompt]))) for m in (bare, ours, theirs)]
    assert np.array_equal(drawn[1], drawn[2])
    assert not np.array_equal(drawn[0], drawn[1])  # the adapter does something

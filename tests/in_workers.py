"""Scorers that run in worker processes, and do there what an image's prompt says: fail, hang or end the process."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpobench.bench.errors import UserError
from gpobench.bench.spec import Images, Prompt, Scores

HERE = __file__
IN_WORKER = "gpobench.bench.scoring.worker" in getattr(sys, "orig_argv", ())


@dataclass(frozen=True)
class Obedient:
    """The mean of each image. Its note is the process that made it where the prompt asks for that, else the prompt's text."""

    id: str = "obedient-v1"
    name: str = "obedient"
    metrics: Sequence[str] = ("mean", "red")
    worker_images: int = 2
    image_seconds: float = 1.0

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        for prompt in prompts:
            _obey(prompt.text)
        dark = {row: "too dark" for row, image in enumerate(images) if image.max() == 0}
        mean = np.array([image.mean() if image.max() else np.nan for image in images])
        notes = [str(os.getpid()) if prompt.text == "process" else prompt.text for prompt in prompts]
        return Scores({"mean": mean, "red": images[..., 0].mean((1, 2)) / 3}, dark, notes)


def _obey(text: str) -> None:
    word, _, file = text.partition(" ")
    if word == "refuse":
        raise UserError("this prompt has no target")
    if word == "raise":
        raise RuntimeError("the engine is on fire")
    if word == "exit":
        sys.exit("enough")
    if word == "hang":
        time.sleep(600)
    if word == "die" or (word == "die-once" and not Path(file).exists()):
        Path(file or os.devnull).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def OnlyHere() -> Obedient:
    """Cannot be made in a worker."""
    if IN_WORKER:
        raise RuntimeError("no display")
    return Obedient()


def Drifting() -> Obedient:
    """Another scorer in a worker."""
    return Obedient(id=f"obedient-{IN_WORKER}")

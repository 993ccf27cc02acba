"""Notices an iteration in which the scorer gave no score: going on would spend the budget for nothing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from .rig import MeteredRig


class Unscored(Exception):
    """An iteration asked for scores and got none: its scorer is gone. The run is stopped, and goes on from its last checkpoint."""


@contextmanager
def expect_scores(rig: MeteredRig) -> Generator[None]:
    """Raise Unscored, with the scorer's last reason, where the block had images scored and not one has a score."""
    rig.images_sent = rig.images_scored = 0
    yield
    if rig.images_sent > 0 and rig.images_scored == 0:
        raise Unscored(rig.failures[-1] if rig.failures else "it gave no reason")

"""How many worker processes score images beside the sampler: `--set scorer.workers=N`, an environment variable, or by the cores.

This module imports no numerical library, so that settings can be checked before one is loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

WORKERS = "GPOBENCH_SCORER_WORKERS"  # environment variable: the setting of commands that take no --set
CORES = "GPOBENCH_CORES"  # environment variable: of the cores, those that this command may count as its own
AUTOMATIC = "auto"
MOST_AUTOMATIC = 8  # processes: each holds the engine and what it imports, 0.3 to 0.5 GB
RESERVED_CORES = 2  # the sampler's, and that of the threads that hand out images
WORTHWHILE_SECONDS = 0.05  # of a core an image: below, scoring is hidden behind the sampler anyway


@dataclass(frozen=True)
class WorkerSetting:
    """The number of worker processes of this command, and whether the machine or a person chose it."""

    count: int = 0
    automatic: bool = False

    @classmethod
    def parse(cls, value: Any = None) -> WorkerSetting:
        """Parse a setting, by default the environment's, by default `auto`.

        Raises UserError on what is neither `auto` nor a number that this machine can start.
        """
        source = "scorer.workers"
        if value is None:
            source, value = WORKERS, os.environ.get(WORKERS) or AUTOMATIC
            value = int(value) if value.isdecimal() else value
        if value == AUTOMATIC:
            return cls(automatic_count(), automatic=True)
        most = max(8, 2 * cores())
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise UserError(
                f"{source} is {AUTOMATIC!r} or a number of processes from 0 to {most} on this machine, got {value!r}"
            )
        return cls(value)

    def processes(self, worker_images: int, image_seconds: float) -> int:
        """The number for one scorer, which states both (`spec.SupportsWorkers`); 0: it is called in this process."""
        cheap = self.automatic and image_seconds < WORTHWHILE_SECONDS
        return 0 if cheap or worker_images < 1 else self.count


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def automatic_count() -> int:
    """None on two cores, else those that the sampler leaves, divided over the processes of a distributed run on this machine."""
    own = min(_positive(CORES, cores()), cores()) // _positive("LOCAL_WORLD_SIZE", 1)
    return max(0, min(own - RESERVED_CORES, MOST_AUTOMATIC))


def _positive(variable: str, default: int) -> int:
    """The number in an environment variable that programs set, not people; the default where it is none."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and int(text) > 0 else default

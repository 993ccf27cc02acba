"""Whether a run compiles its network by itself (`compile=auto`): where it is predicted to save twice what compiling takes.

The prediction reads the settings, the size of the network and the kind of device, and measures nothing: the same command decides
the same on every machine with such a device, and a run that goes on decides as it did before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import Missing
from ..models.memory import DEVICES, UTILISATION
from .config import Config
from .cost_estimate import affordable_images, estimate_memory, format_duration, nfe_per_image

MARGIN = 2.0  # by how much the predicted saving must exceed the cost: both are known to about a factor of two


@dataclass(frozen=True)
class CompilingGain:
    """What compiling costs once, and by how much it shortens passes without a gradient and with one."""

    seconds: float
    sampling: float
    training: float


# CPU: `tiny` at one thread (benchmarks/compiling.py; docs/models.md). CUDA: not measured; assumed from the bytes that fused
# kernels need not move, and set low.
GAINS = {"cpu": CompilingGain(160.0, 1.37, 1.68), "cuda": CompilingGain(900.0, 1.2, 1.2)}
# Operations a second of one thread in the merged forward of `tiny`, as the estimate counts them: 383 M in 3.85 ms.
CPU_SPEED = 1e11


@dataclass(frozen=True)
class CompileChoice:
    """What compiling would save and cost in a run, in seconds; the network's own seconds are infinite where no bound says them."""

    network: float
    saving: float
    cost: float

    @property
    def earned(self) -> bool:
        """Whether the run compiles."""
        return math.isfinite(self.network) and self.saving >= MARGIN * self.cost

    def line(self) -> str:
        """One line of text."""
        if not math.isfinite(self.network):
            return "compile=auto: not compiled, because the budget does not say how long the network computes"
        decided = "compiled" if self.earned else f"not compiled, it should save {MARGIN:g} times that"
        return (
            f"compile=auto: of about {format_duration(self.network / 3600)} of the network compiling would save "
            f"{format_duration(self.saving / 3600)} and take about {format_duration(self.cost / 3600)} once: {decided}"
        )


def choose_compiling(config: Config, device: str, name: str = "") -> CompileChoice:
    """Predict what compiling saves in a run on a device, and what it costs.

    Args:
        config: of the run.
        device: its type, as torch names it: cpu, cuda ...
        name: the GPU's; what is in no table counts as the fastest that is.
    """
    gain, nfe_by_role = GAINS.get(device), nfe_per_image(config)
    total = sum(nfe_by_role.values())
    try:
        flops = estimate_memory(config).flops
    except Missing:
        return CompileChoice(math.inf, 0.0, 0.0)
    network = affordable_images(config, total, flops) * total * flops / _speed(device, name)
    network = min(network, config.budget.bounds().get("seconds", math.inf))
    if gain is None or not math.isfinite(network):
        return CompileChoice(math.inf, 0.0, 0.0)
    training = nfe_by_role.get("policy", 0.0) / total
    share = (1 - training) * (1 - 1 / gain.sampling) + training * (1 - 1 / gain.training)
    return CompileChoice(network, network * share, gain.seconds)


def _speed(device: str, name: str) -> float:
    """Operations a second that the network is assumed to reach."""
    if device != "cuda":
        return CPU_SPEED
    known = [speed for model, speed in DEVICES.items() if model in name.lower().replace(" ", "")]
    return max(known or DEVICES.values()) * 1e12 * UTILISATION

"""torch.compile on the blocks of a trained network, each by itself, and the seconds that compiling takes.

One block is compiled and serves all that are built like it, which takes a fraction of the time of a whole network. Gradient
checkpointing lies around a block, so the two go together. Every shape is compiled for itself: a graph for all shapes would
depend on the order in which they came, and a resumed run could end at other bits.

What was compiled is kept in gpobench/compiled in the user's cache (TORCHINDUCTOR_CACHE_DIR names another folder).
"""

from __future__ import annotations

import os
from functools import lru_cache
from time import perf_counter as _now
from time import time_ns
from typing import Any

import torch
from torch import nn

from ..assets import downloads
from ..errors import error_line

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # environment variable of torch: the folder of compiled graphs
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks", "resnets")  # of diffusers' transformers and U-Nets
GRAPHS = 1024  # of one block: its shapes, its weights, with and without a gradient; torch stops at 8 unless told


class CompileClock:
    """Adds up the seconds in which torch compiles, in this process."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of compiling so far."""
        return self._before + (0.0 if self._since is None else _now() - self._since)

    def start(self, _: Any = None) -> None:
        """torch begins to compile."""
        self._since = _now()

    def stop(self, _: Any = None) -> None:
        """torch has compiled."""
        self._before, self._since = self.seconds, None


_CLOCK = CompileClock()


def seconds_compiling() -> float:
    """Seconds so far in which torch compiled in this process, since something here was first to be compiled."""
    return _CLOCK.seconds


@lru_cache(maxsize=1)
def _watch_compiler() -> None:
    """Let torch start and stop the clock."""
    from torch._dynamo import callback

    callback.on_compile_start(_CLOCK.start)
    callback.on_compile_end(_CLOCK.stop)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network that are compiled, and that checkpointing computes again: the members of BLOCK_LISTS."""
    lists = [m for name, m in network.named_modules() if name.rpartition(".")[2] in BLOCK_LISTS]
    return [block for members in lists if isinstance(members, nn.ModuleList) for block in members]


def compile_blocks(network: nn.Module) -> None:
    """Let torch compile each block of a network when it is first called; where there are none, the network as a whole."""
    _configure()
    for module in blocks(network) or [network]:
        module.compile(dynamic=False)


def _configure() -> None:
    """Set torch's compiler up: the folder of its cache, room for all graphs, and no choice that a measurement makes."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    _watch_compiler()
    if os.environ.get(CACHE) in (None, default_cache_dir()):  # torch sets the variable when it is imported
        os.environ[CACHE] = str(downloads.cache() / "compiled")
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, GRAPHS)
    inductor.fx_graph_cache = True
    inductor.deterministic = True  # the fastest of several kernels may be another one in the next run


@lru_cache(maxsize=4)
def compiler_fault(device: torch.device) -> str:
    """Why nothing can be compiled for a device, in one line; "" where a small function was compiled and gives what it should.

    A compiler may be missing, too old, or without Python's header files: so it is tried and not looked up.
    """
    _configure()
    number = time_ns() % 2**31  # a function that no cache holds

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x + number).sin()

    x = torch.arange(64, dtype=torch.float64, device=device)
    try:
        with torch.no_grad():
            right = torch.allclose(torch.compile(function, dynamic=False)(x), function(x))
    except Exception as error:  # whatever the compiler, its wrapper or torch raise
        return error_line(error)
    return "" if right else "a compiled function gives other numbers"

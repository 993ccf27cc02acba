"""The hub: contract, rig, budget, loop, models, evaluation, statistics, records and the command line.

Public names are loaded on first use, so that `import gpobench.bench` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import Budget, Meter, Spent
    from .errors import Missing, UserError
    from .spec import (
        Choice,
        EvaluationSettings,
        Groups,
        InitialNoise,
        LogUniform,
        Method,
        Model,
        Optim,
        Pairs,
        Prompt,
        Scorer,
        Scores,
        Search,
        Task,
        Transitions,
        Uniform,
    )
    from .training.rig import Rig

_HOME = {
    "Budget": "budget",
    "Meter": "budget",
    "Spent": "budget",
    "Missing": "errors",
    "UserError": "errors",
    "Rig": "training.rig",
    **dict.fromkeys(
        "Choice EvaluationSettings Groups InitialNoise LogUniform Method Model Optim Pairs Prompt Scorer Scores Search Task "
        "Transitions Uniform".split(),
        "spec",
    ),
}

__all__ = [
    "Budget",
    "Choice",
    "Uniform",
    "Groups",
    "EvaluationSettings",
    "LogUniform",
    "Meter",
    "Method",
    "Missing",
    "Model",
    "Transitions",
    "Optim",
    "Pairs",
    "Prompt",
    "Rig",
    "Scorer",
    "Scores",
    "Search",
    "Spent",
    "InitialNoise",
    "Task",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

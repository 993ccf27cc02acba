"""Several rewards of one image as the one number that every group method takes: the one place where they are combined."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import UserError
from ..losses import decoupled_sum, pareto_rank, weighted_sum
from ..registry import unknown
from ..scoring.scorers import Blend
from ..spec import Scorer, Scores

# By the names of `--set reward_aggregation`.
AGGREGATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": weighted_sum,
    "gdpo": decoupled_sum,
    "pareto": pareto_rank,
}


def check_aggregation(name: str, scorer: Scorer) -> None:
    """Raise UserError on an unknown aggregation, or one of several rewards where the training scorer is one."""
    if name not in AGGREGATIONS:
        raise unknown("reward_aggregation", name, AGGREGATIONS)
    if name != "sum" and not isinstance(scorer, Blend):
        raise UserError(
            f"reward_aggregation {name} combines several rewards, and {scorer.name} is one: --reward NAME*WEIGHT+NAME*WEIGHT"
        )


def part_rewards(scorer: Scorer, scores: Scores) -> Tensor:
    """(B, R), float64: the rewards of a blend's parts, in its order; of another scorer its one reward."""
    if not isinstance(scorer, Blend):
        return torch.as_tensor(scores.value[scorer.metrics[0]])[:, None]
    columns = [scores.value[f"{part.name}.{part.metrics[0]}"] for part, _ in scorer.parts]
    return torch.stack([torch.as_tensor(column) for column in columns], 1)


def aggregate(name: str, scorer: Scorer, rewards: Tensor) -> Tensor:
    """(P, G, R) -> (P, G), float32: the groups' rewards as the methods standardise them."""
    weights = [weight for _, weight in scorer.parts] if isinstance(scorer, Blend) else [1.0]
    return AGGREGATIONS[name](rewards, torch.tensor(weights, dtype=torch.float64)).float()

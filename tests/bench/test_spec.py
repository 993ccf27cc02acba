"""The contract's own small print: batches of any kind are cut by rows, settings that make no sense are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.spec import Groups, Judging, Moves, Optim, Pairs, Prompt, Starts, size, take


def batch(kind: Any, rows: int) -> Any:
    tensors = [torch.arange(rows * 6.0).view(rows, 2, 3) + i for i in range(len(kind.__dataclass_fields__))]
    return kind(*tensors)


@pytest.mark.parametrize("kind", [Groups, Pairs, Moves, Starts])
def test_every_kind_of_batch_is_cut_by_rows(kind: Any) -> None:
    whole = batch(kind, 5)
    part = take(whole, torch.tensor([3, 0]))
    assert isinstance(part, kind) and size(whole) == 5 and size(part) == 2
    for name in kind.__dataclass_fields__:
        assert torch.equal(getattr(part, name), getattr(whole, name)[[3, 0]])
    assert size(take(whole, torch.zeros(5, dtype=torch.bool))) == 0


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0}, {"lr": -1}, {"lr": float("nan")}, {"epochs": 0}, {"minibatches": 0}, {"micro": -1}, {"clip": 0},
     {"warmup": -1}, {"ema": 1.0}, {"ema": -0.1}, {"betas": (0.9, 1.0)}, {"weight_decay": -1}],
)  # fmt: skip
def test_a_fit_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"optim.*{next(iter(bad))}"):
        Optim(**bad)


@pytest.mark.parametrize("bad", [{"test_images": 0}, {"validation_images": 0}])
def test_a_judge_without_images_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least one image"):
        Judging(**bad)


def test_prompts_do_not_share_their_facts() -> None:
    assert Prompt("a").meta is not Prompt("b").meta

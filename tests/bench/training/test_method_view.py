"""The method's view of the rig: the members of the contract, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import PolicyModel, Prompt, Rig
from gpobench.bench.training.rig import MeteredRig


@pytest.fixture
def rig(tiny_pipe: Path, redness: str) -> Iterator[MeteredRig]:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4))
    made = MeteredRig(model, [Prompt("a sign"), Prompt("a card")], scorer(f"{redness}:Redness"), Meter(Budget(nfe=1e6)))
    yield made
    made.close()


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_a_view_has_the_members_of_the_contract_and_no_others(rig: MeteredRig) -> None:
    view: Any = rig.view
    assert public(view) == {name for name in vars(Rig) if not name.startswith("_")}
    assert public(view.model) == {name for name in vars(PolicyModel) if not name.startswith("_")}
    for name in (*vars(rig), "meter", "rng", "texts", "keyed", "turn", "bookkeeping"):
        assert hasattr(view, name) == (name in public(view)), name
    for thing in (view, view.model):
        with pytest.raises(TypeError):
            vars(thing)
        assert not hasattr(thing, "__dict__")


def test_nothing_of_a_view_can_be_set(rig: MeteredRig) -> None:
    for thing in (rig.view, rig.view.model):
        for name in (*public(thing), "meter", "more"):
            with pytest.raises(AttributeError):
                object.__setattr__(thing, name, None)


def test_a_view_does_what_the_rig_does_and_is_charged_for_it(rig: MeteredRig) -> None:
    view = rig.view
    groups = view.groups(2, 2, steps=1)
    assert rig.meter.images == 4 and groups.x0.shape[:2] == (2, 2)
    view.state["count"] = 3
    assert rig.state == {"count": 3} and view.iteration == rig.iteration and view.path == rig.path
    view.model.update_copy("old", 0.0)
    assert list(rig.model.copies) == ["old"] and view.model.steps == rig.model.steps
    assert [i for i, *_ in view.walk(groups.x0[:, 0], groups.prompt_ids, [])] == []
    assert view.velocity.__doc__ == Rig.velocity.__doc__

"""What is counted beside the rig: every row, image, step and text, once, in whatever way a run computes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.scoring.scorers import Blend
from gpobench.bench.spec import Images, Optim, Prompt, Scores
from gpobench.bench.training import observation
from gpobench.bench.training.observation import Observation, Observer, by_name, forward_equivalents
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import optimiser, train
from gpobench.methods.gpo import GPO

METHOD = GPO(prompts=2, group=4, steps=2, optim=Optim(lr=1e-3, minibatches=2, micro=3))
TEXTS = ["a red circle", "two blue squares", "a sign"]


@pytest.fixture
def make(tiny_pipe: Path, redness: str) -> Iterator[Any]:
    made: list[MeteredRig] = []

    def build(judge: Any = None, guidance: float = 1.0, **execution: Any) -> MeteredRig:
        model_spec = replace(find_model_spec(str(tiny_pipe)), guidance=guidance, **execution)
        model = open_model(model_spec, device="cpu", adapter=Adapter(rank=4))
        judge = judge or scorer(f"{redness}:Redness")
        made.append(MeteredRig(model, [Prompt(text) for text in TEXTS], judge, Meter(Budget(nfe=1e9)), rows=3))
        return made[-1]

    yield build
    for rig in made:
        rig.close()


def watch(
    rig: MeteredRig, iterations: int, earlier: Observation | None = None, others: Sequence[Any] = ()
) -> Observation:
    """Train on until so many iterations are done, counted; calls of `others` are counted too."""
    adam, observer = optimiser(METHOD, rig), Observer(rig.model, [rig.scorer, *others])
    if earlier:
        observer.restore(earlier)
    observer.install()
    try:
        observer.watch_weights(rig.model.parameters(), adam)
        train(METHOD, rig, adam, after=lambda notes: None, interrupted=lambda: rig.iteration >= iterations,
              watched=observer.training)  # fmt: skip
        return observer.observe(rig.meter, rig.meter.budget, ["", *TEXTS])
    finally:
        observer.close()


@pytest.mark.parametrize("execution", [{}, {"guidance": 3.0}, {"checkpointing": True}])
def test_what_is_counted_is_what_is_charged(make: Any, execution: dict[str, Any]) -> None:
    """Also under two-pass guidance, and where checkpointing computes every block twice."""
    rig = make(**execution)
    counted = watch(rig, 2)
    assert counted.differences == [] and forward_equivalents(counted.training) == rig.meter.nfe > 0
    assert counted.training["decoded"] == by_name(counted.training, "scored ")["redness"] == 16
    assert counted.training["updates"] == 4 and counted.training["backwards"] == counted.training["gradient_forwards"]
    assert sum(by_name(counted.training, "weights ").values()) == rig.meter.nfe
    assert counted.evaluation == {} and counted.seconds == pytest.approx(rig.meter.seconds, abs=0.2)
    assert "forward" not in vars(rig.model.network) and "encode" not in vars(rig.model)  # taken away again


def test_a_resumed_run_goes_on_counting(make: Any) -> None:
    whole, first, second = make(), make(), make()
    at_once = watch(whole, 2)
    earlier = Observation(**json.loads(json.dumps(asdict(watch(first, 1)))))  # as it lies in a checkpoint
    second.meter.restore(first.meter.state())
    second.iteration = 1
    resumed = watch(second, 2, earlier)
    assert resumed.training == at_once.training and resumed.differences == []


def test_calls_outside_of_training_are_evaluation(make: Any) -> None:
    rig = make()
    observer = Observer(rig.model, [rig.scorer])
    observer.install()
    with torch.no_grad():
        rig.model.decode(rig.model.velocity(rig.noise(2), torch.ones(2), rig.model.encode(["x", "y"])))
    observer.close()
    counted = observer.observe(rig.meter, rig.meter.budget, TEXTS)
    assert counted.evaluation["forwards"] == counted.evaluation["decoded"] == 2 and counted.training == {}
    assert counted.differences == []


@dataclass
class Refuses:
    """Refuses batches that hold more than one image, or every image but the first that comes alone."""

    every: bool = False
    id: str = "refuses-v1"
    name: str = "refuses"
    metrics: Sequence[str] = ("mean",)
    calls: list[int] = field(default_factory=list[int])

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        self.calls.append(len(images))
        if len(images) > 1 or (self.every and self.calls.count(1) > 1):
            raise UserError("one at a time")
        return Scores({"mean": images.mean((1, 2, 3)) / 255.0})


@pytest.mark.parametrize("every", [False, True])
def test_an_image_that_is_scored_in_a_second_try_counts_once(make: Any, every: bool) -> None:
    judge = Refuses(every)
    rig = make(judge)
    counted = watch(rig, 1)
    assert counted.differences == [] and by_name(counted.training, "scored ") == {"refuses": 8}
    assert sum(judge.calls) == 16  # in batches, then one by one


def test_a_spend_that_is_not_computed_is_a_difference_too(make: Any) -> None:
    rig = make()
    rig.meter.charge(nfe=5, role="rollout")
    assert watch(rig, 1).differences == [
        f"evaluations of the network: {rig.meter.nfe - 5:,} computed, {rig.meter.nfe:,} charged"
    ]


def test_a_stated_cost_is_not_looked_for(make: Any) -> None:
    rig = make()
    rig.meter.charge_stated({"nfe": 50, "images": 5, "reward_calls": 5})
    assert watch(rig, 1).differences == []


def test_a_clock_that_stood_is_a_difference() -> None:
    meter = Meter(Budget(nfe=1))
    assert observation.clock_difference(0.5, meter) == []
    (line,) = observation.clock_difference(60.0, meter)
    assert line == "seconds of training: 60.0 passed, 0.0 charged"


def test_the_parts_of_a_blend_count_as_one_scorer(make: Any) -> None:
    """They are called in threads of their own, inside the call of the blend."""
    rig = make(Blend([(Refuses(), 0.5), (Refuses(name="other"), 0.5)]))
    counted = watch(rig, 1, others=[Refuses()])
    assert counted.differences == [] and by_name(counted.training, "scored ") == {rig.scorer.name: 8}

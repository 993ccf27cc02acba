"""How often the host waits for the device: in no step of a rollout, in no loss, twice an update.

There may be no GPU here, so what a GPU would hold is followed on the CPU: the model's parameters, latents and whatever is computed from
them. A read of such a number is what a GPU would be waited for.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from gpobench.bench import flow, registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.conformance.check import SMALL_FIELDS
from gpobench.bench.experiments import config
from gpobench.bench.flow import cps, dpm2, ode, sde
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Prompt, Search, batch_size, select_rows
from gpobench.bench.training import train
from gpobench.bench.training.rig import MeteredRig, read_numbers

BOOK = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle"]
METHODS = [
    name for name in sorted(set(registry.entries("method"))) if not issubclass(registry.load("method", name), Search)
]
READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
    "nonzero",
    "equal",
    "allclose",
}
READING_OPERATIONS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
)


class DeviceReads(TorchDispatchMode):
    """Follows tensors that a device would hold, and lists the places where one is read."""

    def __init__(self, *held: Tensor) -> None:
        super().__init__()
        self.held = WeakIdKeyDictionary()
        self.places: list[str] = []
        for tensor in held:
            self.held[tensor] = True

    def holds(self, values: Any) -> bool:
        return any(isinstance(leaf, Tensor) and leaf in self.held for leaf in tree_leaves(values))

    def note(self, what: str) -> None:
        ours = ("gpobench", "/bench/", "/methods/")
        frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in ours)]
        places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
        self.places.append(f"{what} at {[place for place in places if not place.startswith('test_')][-2:]}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = self.holds((args, kwargs))
        name = func.name().partition(".")[0]
        if held and name in READING_OPERATIONS:
            self.note(name)
        if held and name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.note("an index of booleans")
        output = func(*args, **kwargs)
        if held:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self.held[leaf] = True
        return output


class PythonReads(TorchFunctionMode):
    """Lists the reads that copy a CPU tensor's memory without an operation, such as `tolist` and `numpy`."""

    def __init__(self, reads: DeviceReads, device: torch.device | None) -> None:
        self.reads, self.device = reads, device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS - {
            "item",
            "nonzero",
            "equal",
            "__bool__",
            "__float__",
            "__int__",
            "__index__",
        } and self.reads.holds(args[:1]):
            self.reads.note(name)
            if name == "cpu":  # a copy, which the host holds
                copied = args[0].detach().clone()
                del self.reads.held[copied]
                return copied
        output = func(*args, **(kwargs or {}))
        if (
            name == "to"
            and isinstance(output, Tensor)
            and any(isinstance(a, torch.device) and (self.device is None or a is self.device) for a in args[1:])
        ):
            output = output.view_as(output)  # on the CPU `to` returns the tensor of the host
            self.reads.held[output] = True
        return output


@contextmanager
def watched(rig: MeteredRig, batch: Any = None) -> Generator[DeviceReads]:
    """Inside the block reads are listed. Held are the parameters, a batch's numbers, and what is moved to a device.

    With a batch only what is moved to the object `model.device`: its row numbers are moved to where its prompt ids are, the host.
    """
    model: Any = rig.model
    numbers = [
        value
        for value in (vars(batch) if batch is not None else {}).values()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    reads = DeviceReads(*model.network.parameters(), *model.vae.parameters(), *numbers)
    with PythonReads(reads, rig.model.device if batch is not None else None), reads:
        yield reads


@pytest.fixture
def make(tiny_pipe: Path, redness: str) -> Any:
    made: list[MeteredRig] = []

    def build() -> MeteredRig:
        model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)
        rig = MeteredRig(model, [Prompt(p) for p in BOOK], scorer(f"{redness}:Redness"), Meter(Budget(nfe=1e9)), rows=4)
        made.append(rig)
        return rig

    yield build
    for rig in made:
        rig.close()


@pytest.mark.parametrize(
    "planted",
    [
        lambda x: bool((x > 0).any()),
        lambda x: float(x.sum()),
        lambda x: x.mean().item(),
        lambda x: x.tolist(),
        lambda x: x.detach().numpy(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_a_read_is_seen(make: Callable[[], MeteredRig], planted: Callable[[Tensor], Any]) -> None:
    rig = make()
    with watched(rig) as reads, torch.no_grad():
        planted(rig.model.parameters()[0] * 2)
        torch.ones(3).sum().item()  # of the host's own
    assert len(reads.places) == 1, reads.places


@pytest.mark.parametrize("kernel", [ode, sde(0.7), cps(0.8), dpm2])
def test_no_step_of_a_rollout_waits_for_the_device(make: Callable[[], MeteredRig], kernel: flow.Kernel) -> None:
    rig = make()
    ids = rig.prompts(3)
    with watched(rig) as reads:
        for *_, step, x_next in rig.walk(rig.noise(3), ids, [kernel] * 4):
            if kernel == sde(0.7):
                step.logp(x_next), step.kl(step)
    assert not reads.places


def test_a_rollout_waits_for_its_images_and_once_at_its_end(make: Callable[[], MeteredRig]) -> None:
    """Two reads a part: which rows are finite, and the pixels; however many steps it has."""
    for steps in (3, 6):
        rig = make()
        with watched(rig) as reads:
            rig.transitions(2, 4, [sde(0.7)] * steps, keep=[0, 1])
        assert len(reads.places) <= 2 * 2 + 1, reads.places


FIELDS = {**SMALL_FIELDS, "split_steps": (0, 1)}  # the miniature takes few steps


@pytest.mark.parametrize("name", METHODS)
def test_no_loss_waits_for_the_device_and_an_update_does_twice(make: Callable[[], MeteredRig], name: str) -> None:
    """In micro-batches of one row: their number does not matter."""
    rig, kind = make(), registry.load("method", name)
    if hasattr(kind, "reward_backwards"):
        pytest.skip("its loss decodes and scores images, which waits")
    table = {key: value for key, value in FIELDS.items() if key in kind.__dataclass_fields__}
    method = config.build(kind, {**table, "optim": {"micro": 1, "minibatches": 1, "epochs": 1}})
    batch: Any = None
    for _ in range(8):
        batch = method.collect(rig.view)
        if batch_size(batch) > 1:
            break
    if batch_size(batch) < 2:
        pytest.skip("no reward differs")
    batch = select_rows(batch, torch.arange(2))
    adam = train.optimiser(method, rig)
    with watched(rig, batch) as reads:
        train._fit(method, rig, adam, train.Gradients(), batch, 2)  # pyright: ignore[reportPrivateUsage]
    assert len(reads.places) <= 2, reads.places


def test_numbers_are_read_as_they_are() -> None:
    values = [torch.tensor(0.1), 0.1, torch.tensor(float("nan")), torch.tensor(3, dtype=torch.bfloat16), 2]
    numbers = read_numbers(values)
    assert numbers[:2] == [float(torch.tensor(0.1)), 0.1] and numbers[2] != numbers[2] and numbers[3:] == [3.0, 2.0]
    assert read_numbers([]) == []

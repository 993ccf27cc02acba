"""Process group: divides the parts of a batch over processes and gathers the results.

Every process runs the whole iteration: it draws the same noise and charges the same costs, in the same order. Of the parts of
a rollout (`rows` images each), of a minibatch (`optim.micro` rows each) and of an evaluation, process k computes those whose
number is k modulo the size; the others are charged and filled with zeros, and the owner's result replaces them. The parts are
those of one process, so group size, batch, number of updates and the end of a budget do not depend on the number of processes:
more processes make the same run faster as long as there are enough parts, and the meter counts it once. Methods that call
`rig.sample` directly run it on every process, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_DIVIDED: ContextVar[bool] = ContextVar("divided", default=False)


def dividing() -> bool:
    """Whether the present work is a part of what several processes divide, and not repeated by each of them."""
    return _DIVIDED.get()


@dataclass(frozen=True)
class ProcessGroup:
    """Process `rank` of `size`. With size 1 every method returns its input."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the process that prints and writes files."""
        return self.rank == 0

    def owns(self, part: int) -> bool:
        """True where this process computes this part."""
        return part % self.size == self.rank

    @contextmanager
    def part(self, number: int) -> Generator[bool]:
        """Inside the block part `number` of a batch is done; yields whether this process computes it."""
        token = _DIVIDED.set(self.size > 1)
        try:
            yield self.owns(number)
        finally:
            _DIVIDED.reset(token)

    def broadcast_parts(self, parts: Sequence[Tensor]) -> None:
        """Broadcast every part from its owner, in place; process k modulo size owns part k."""
        if self.size > 1:
            for k, part in enumerate(parts):
                torch.distributed.broadcast(part, src=k % self.size)

    def exchange_objects(self, parts: Sequence[T | None]) -> list[T]:
        """Every part from its owner, for small objects; what this process has for the parts of others is ignored."""
        objects: list[T] = []
        for k, part in enumerate(parts):
            box = [part]
            if self.size > 1:
                torch.distributed.broadcast_object_list(box, src=k % self.size)
            assert box[0] is not None, "the owner of a part must hold it"
            objects.append(box[0])
        return objects

    def gather(self, value: T) -> list[T]:
        """The objects of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return [value for value in values if value is not None]

    def from_main(self, compute: Callable[[], T]) -> T:
        """The result of `compute` on the main process, which alone calls it."""
        return self.exchange_objects([compute() if self.is_main else None])[0]

    def any(self, flag: bool) -> bool:
        """True where the flag is set on any process."""
        return any(self.gather(flag))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients over the processes, in place; a missing gradient counts as zero."""
        if self.size == 1:
            return
        trained = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
        torch.distributed.all_reduce(flat)
        for p, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p).clone()

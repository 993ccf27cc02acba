"""Several processes at one oar: who does which part of the work, and how all come to hold the whole.

Every process walks through the whole iteration: it draws the same noise and charges the same spend, in the same order. Of the parts of
a rollout (`rows` images each), of a minibatch (`optim.micro` rows each) and of a look, process k really computes those whose number is
k modulo the size; for the others the rig stands by and the owner's result takes the place of its zeros. The parts are those of one
process, so group size, batch, number of updates, and where a budget ends, are constants of the method: more processes make the
same run faster as long as there are parts enough, and the meter counts it once. A method that does its own sampling through
`rig.sample` is computed by all, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """Process `rank` of `size`. Alone, every method does nothing."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """The one that speaks and writes."""
        return self.rank == 0

    def owns(self, part: int) -> bool:
        """Is this part of the work this process's?"""
        return part % self.size == self.rank

    def broadcast_parts(self, parts: Sequence[Tensor]) -> None:
        """Fill in, in place, the parts that others computed; part k is the (k modulo size)-th process's."""
        if self.size > 1:
            for k, part in enumerate(parts):
                torch.distributed.broadcast(part, src=k % self.size)

    def exchange_objects(self, parts: Sequence[T | None]) -> list[T]:
        """The same for any small object; what this process has at the place of another's part does not matter."""
        found: list[T] = []
        for k, part in enumerate(parts):
            box = [part]
            if self.size > 1:
                torch.distributed.broadcast_object_list(box, src=k % self.size)
            assert box[0] is not None, "the owner of a part has it"
            found.append(box[0])
        return found

    def gather(self, mine: T) -> list[T]:
        """Everybody's object, by rank."""
        if self.size == 1:
            return [mine]
        all_: list[T | None] = [None] * self.size
        torch.distributed.all_gather_object(all_, mine)
        return [one for one in all_ if one is not None]

    def from_main(self, say: Callable[[], T]) -> T:
        """What the first process says."""
        return self.exchange_objects([say() if self.is_main else None])[0]

    def any(self, flag: bool) -> bool:
        """Does it hold for one of them?"""
        return any(self.gather(flag))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients over the processes; where one has none, it counts as zero."""
        if self.size == 1:
            return
        own = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
        torch.distributed.all_reduce(flat)
        for p, part in zip(own, flat.split([p.numel() for p in own]), strict=True):
            p.grad = part.view_as(p).clone()

"""Faulty and dishonest methods: a fault ends the run as a faulty run or in one line, and a cheat is seen beside the meter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from fault import NotHeld, Row, row
from mini_runs import FAULTY_RUN, LIMIT, Runs, ended_well, finite_record, of_faulty_run

METHOD = '''"""GPO with one fault."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gpobench.methods.gpo import GPO


@dataclass(frozen=True)
class Faulty(GPO):
    def collect(self, rig):
        batch = GPO.collect(self, rig)
        if rig.iteration >= {iteration}:
{collect}
        return batch

    def loss(self, rig, batch):
        loss = GPO.loss(self, rig, batch)
        if rig.iteration >= {iteration}:
{loss}
        return loss
'''
LOSSES = {
    "NaN": ("loss = loss * float('nan')", ["faulty run"]),
    "infinity": ("loss = loss + float('inf')", ["faulty run"]),
    "minus infinity": ("loss = loss - float('inf')", ["faulty run"]),
    "an infinite gradient": ("loss.register_hook(lambda g: g * float('inf'))", ["faulty run"]),
    "a gradient that is NaN": ("loss.register_hook(lambda g: g * float('nan'))", ["faulty run"]),
    "a vector": ("loss = loss.repeat(3)", ["refused"]),
    "None": ("loss = None", ["refused"]),
    "a number": ("loss = 0.5", ["refused"]),
    "no gradient": ("loss = loss.detach()", ["refused"]),
    "integers": ("loss = torch.tensor(3)", ["refused"]),
    "raises": ("raise RuntimeError('a mistake of its author')", ["own error"]),
    "ends the process": ("raise SystemExit(0)", ["refused"]),
}
STOPPED = ["faulty run", "refused", "own error", "stalled"]
BATCHES = {
    "None": ("batch = None", ["refused"]),
    "text": ("batch = 'x'", ["refused"]),
    "no rows": (
        "batch = type(batch)(*(v[:0] for v in vars(batch).values()))",
        ["faulty run", "refused", "same", "stalled"],
    ),
    "latents that are NaN": ("batch = replace(batch, x0=batch.x0 * float('nan'))", ["faulty run"]),
    "infinite rewards": (
        "batch = replace(batch, reward=batch.reward + float('inf'))",
        ["faulty run", "refused", "own error"],
    ),
    "rewards that are NaN": (
        "batch = replace(batch, reward=batch.reward * float('nan'))",
        STOPPED,
    ),
    "raises": ("raise ValueError('a mistake of its author')", ["own error"]),
}
CHEATS = {
    "evaluates the network beside the rig": (
        "torch.no_grad()(rig.model.velocity)(torch.ones(1, *rig.model.shape), torch.ones(1), rig.model.encode(['a sign']))"
    ),
    "calls the scorer beside the rig": "rig.scorer(torch.zeros(2, 16, 16, 3, dtype=torch.uint8).numpy(), rig.texts(batch.prompt_ids[:2]))",
    "gives the meter a negative charge": "getattr(rig, 'meter').charge(nfe=-150)",
    "stops the clock": "rig.meter.stop()",
    "reads the book of prompts": "rig.book = rig.book[:1]",
    "takes updates of its own": "[p.data.add_(1e-3) for p in rig.model.parameters()]",
}  # fmt: skip


def _indented(code: str) -> str:
    return "            " + code


class Methods(Runs):
    """The faulty methods, one file each."""

    def write(self, iteration: int, collect: str = "pass", loss: str = "pass") -> str:
        self.place.mkdir(parents=True, exist_ok=True)
        path = self.folder().with_suffix(".py")
        path.write_text(METHOD.format(iteration=iteration, collect=_indented(collect), loss=_indented(loss)))
        return f"{path}:Faulty"

    def ran(self, method: str) -> str:
        out = self.folder()
        ended = self.gpobench(*self.command(out, method=method), limit=LIMIT)
        if "mistake of its author" in ended.err or (
            ended.code == 1 and Path(method.rpartition(":")[0]).name in ended.err
        ):
            if ended.out:
                raise NotHeld("silent number: a result beside the method's exception")
            return "own error"
        if ended_well(ended):
            facts = finite_record(ended.out)
            if facts["flags"]["invalid"] or facts.get("fault"):
                raise NotHeld("wrong outcome: an invalid or faulty run with exit code 0")
            return "same" if facts["stop"].startswith("budget") else "stalled"
        if ended.code == FAULTY_RUN:
            return of_faulty_run(ended, out)
        if ended.code == 1:
            raise NotHeld(f"traceback: {ended.err[-600:]}")
        return "refused"

    def fault(self, collect: str = "pass", loss: str = "pass"):  # noqa: ANN201
        def inject(rng: np.random.Generator) -> str:
            return self.ran(self.write(int(rng.integers(0, 4)), collect, loss))

        return inject

    def cheat(self, code: str):  # noqa: ANN201
        """A run of it ends as no result, with the evidence in its record, or at the first attempt."""

        def inject(rng: np.random.Generator) -> str:
            method, out = self.write(int(rng.integers(0, 4)), code), self.folder()
            ended = self.gpobench(*self.command(out, method=method), limit=LIMIT)
            if ended.code == 0:
                facts = json.loads(ended.out)
                raise NotHeld(f"silent number: the cheat passes, observed {facts.get('observed')}")
            if ended.timed_out:
                raise NotHeld("hang: the cheat never ends")
            if ended.code == FAULTY_RUN:
                return of_faulty_run(ended, out)
            if ended.out:
                raise NotHeld("silent number: a result on stdout")
            return "refused" if ended.code == 2 else "own error"

        return inject


def rows(place: Path) -> list[Row]:
    methods = Methods(place)
    return [
        *(row("methods", what, "the loss", expected, methods.fault(loss=code)) for what, (code, expected) in LOSSES.items()),
        *(row("methods", what, "the batch", expected, methods.fault(collect=code)) for what, (code, expected) in BATCHES.items()),
        *(row("methods", what, "collect", ["faulty run", "refused", "own error"], methods.cheat(code)) for what, code in CHEATS.items()),
    ]  # fmt: skip

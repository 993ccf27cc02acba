"""Damaged models and adapters, and networks whose outputs are not finite: refused on load, unscored, or a faulty run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fault import NotHeld, Row, one_line, row
from mini_runs import AT, LIMIT, Runs, ended_well, finite_record, of_faulty_run, result
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
VALUES = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}


def one_element(value: float) -> Callable[[Tensors, np.random.Generator], Tensors]:
    """Set one element of one floating-point tensor."""

    def change(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        names = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]
        name = str(rng.choice(names))
        changed = tensors[name].clone()
        changed.view(-1)[int(rng.integers(changed.numel()))] = value
        return {**tensors, name: changed}

    return change


def a_tensor(change: Callable[[str, torch.Tensor], Tensors]) -> Callable[[Tensors, np.random.Generator], Tensors]:
    """Exchange one tensor for what `change` makes of it."""

    def changed(tensors: Tensors, rng: np.random.Generator) -> Tensors:
        name = str(rng.choice(list(tensors)))
        return {**{k: v for k, v in tensors.items() if k != name}, **change(name, tensors[name])}

    return changed


STRUCTURES: dict[str, Callable[[Tensors, np.random.Generator], Tensors]] = {
    "a tensor missing": a_tensor(lambda name, tensor: {}),
    "a tensor of another shape": a_tensor(lambda name, tensor: {name: torch.cat([tensor, tensor])}),
    "a tensor without elements": a_tensor(lambda name, tensor: {name: tensor[:0].clone()}),
    "a tensor of integers": a_tensor(lambda name, tensor: {name: tensor.to(torch.int32)}),
    "a tensor under another name": a_tensor(lambda name, tensor: {f"{name}x": tensor}),
    "only the first half of each pair": lambda tensors, rng: {k: v for k, v in tensors.items() if "lora_B" not in k and ".up." not in k},
    "no tensor": lambda tensors, rng: {},
}  # fmt: skip


class Models(Runs):
    """Copies of the miniature model and of an adapter of it, each with one fault."""

    @cached_property
    def adapter(self) -> Path:
        out = self.folder()
        ended = self.gpobench(*self.command(out), limit=LIMIT)
        if ended.code:
            raise RuntimeError(ended.err)
        return next(out.glob("*/adapter"))

    @cached_property
    def sound(self) -> dict[str, Any]:
        """What `eval` prints of the adapter."""
        return self.evaluated(self.model, self.adapter)

    def words(self, model: Path, adapter: Path | None) -> list[str]:
        task = f"{Path(__file__).parents[1] / 'redness.py'}:Paint"
        return [
            "eval",
            "--task",
            task,
            "--model",
            str(model),
            "--json",
            *(["--adapter", str(adapter)] if adapter else []),
        ]

    def evaluated(self, model: Path, adapter: Path | None) -> dict[str, Any]:
        ended = self.gpobench(*self.words(model, adapter), limit=LIMIT)
        if ended.code:
            raise RuntimeError(ended.err)
        return json.loads(ended.out)

    def refused(self, model: Path, adapter: Path | None, mention: str) -> str:
        ended = self.gpobench(*self.words(model, adapter), limit=LIMIT)
        if ended_well(ended):
            raise NotHeld(f"silent number: evaluated, {ended.out[:300]}")
        one_line(ended.err, mention=[mention])
        if ended.code != 2 or ended.out:
            raise NotHeld(f"wrong outcome: exit code {ended.code}, {ended.err[-300:]}")
        return "refused"

    def component(self, component: str, value: float) -> Any:
        """A model with one element that is not finite."""

        def inject(rng: np.random.Generator) -> str:
            model = self.folder()
            shutil.copytree(self.model, model)
            file = next((model / component).glob("*.safetensors"))
            save_file(one_element(value)(load_file(file), rng), file, metadata={"format": "pt"})
            return self.refused(model, None, component)

        return inject

    def damaged_adapter(self, change: Callable[[Tensors, np.random.Generator], Tensors]) -> Any:
        def inject(rng: np.random.Generator) -> str:
            adapter = self.folder()
            shutil.copytree(self.adapter, adapter)
            file = next(adapter.glob("*.safetensors"))
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            save_file(change(load_file(file), rng), file, metadata=metadata)
            return self.refused(self.model, adapter, file.name)

        return inject

    def damaged_file(self, component: str, what: str) -> Any:
        """A file of weights that is cut, or whose header is damaged."""

        def inject(rng: np.random.Generator) -> str:
            source = self.adapter if component == "adapter" else self.model
            place = self.folder()
            shutil.copytree(source, place)
            file = next((place if component == "adapter" else place / component).glob("*.safetensors"))
            content = file.read_bytes()
            if what == "cut":
                file.write_bytes(content[: int(rng.integers(0, len(content)))])
            elif what == "its header damaged":
                head = bytearray(content)
                for _ in range(8):
                    head[int(rng.integers(0, 60))] = int(rng.integers(256))
                file.write_bytes(bytes(head))
            elif what == "another kind of file":
                file.write_bytes(b"\x80\x04K\x01.")
            elif what == "empty":
                file.write_bytes(b"")
            else:
                file.unlink()
            model, adapter = (self.model, place) if component == "adapter" else (place, None)
            return self.refused(model, adapter, "")

        return inject

    def output(self, target: str, nth: int, rows: str, value: float) -> Any:
        """A network whose Nth call, or every call from there on, returns a value that is not finite for some rows."""

        def inject(rng: np.random.Generator) -> str:
            out, n = self.folder(), int(rng.integers(1, nth + 1))
            first = "0:1" if rows == "one image" else "0:"
            once = bool(rng.integers(2))
            before = AT + OUTPUT.format(target=target, n=n, rows=first, value=value, once=once)
            ended = self.gpobench(*self.command(out), before=before, limit=LIMIT)
            if ended_well(ended):
                record = finite_record(ended.out)
                if [result(out)[name] == self.whole[name] for name in ("scores.parquet", "adapter")] == [True, True]:
                    return "same"  # the call came after the last one
                errors = sum(use["errors"] for use in record["scorers"].values())
                if not errors:
                    raise NotHeld("silent number: the result differs and no image is unscored")
                return "unscored"
            if ended.code == 2:
                one_line(ended.err)
                return "refused"
            return of_faulty_run(ended, out)

        return inject


OUTPUT = """
import diffusers
def plant():
    kind, name = {target}
    real, calls = getattr(kind, name), itertools.count(1)
    def planted(*args, **kwargs):
        out, k = real(*args, **kwargs), next(calls)
        if (k == {n}) if {once} else (k >= {n}):
            tensor = out[0] if isinstance(out, tuple) else out.sample
            tensor.data[{rows}].view(-1)[0] = float("{value}")
        return out
    setattr(kind, name, planted)
plant()
"""
OUTPUTS = {
    "the network": ('diffusers.SD3Transformer2DModel, "forward"', 60),
    "the decoder": ('diffusers.AutoencoderKL, "decode"', 12),
}


def rows(place: Path) -> list[Row]:
    models = Models(place)
    made: list[Row] = []
    for what, value in VALUES.items():
        for component in COMPONENTS:
            made.append(
                row("models", f"{what} in one weight", component, "refused", models.component(component, value))
            )
        made.append(
            row("models", f"{what} in one weight", "adapter", "refused", models.damaged_adapter(one_element(value)))
        )
        for target, (where, nth) in OUTPUTS.items():
            for images in ("one image", "all images"):
                expected = ["unscored", "faulty run", "refused", "same"]
                fault = models.output(where, nth, images, value)
                made.append(row("models", f"{what} in {images}", f"output of {target}", expected, fault))
    for what, change in STRUCTURES.items():
        made.append(row("models", what, "adapter", "refused", models.damaged_adapter(change)))
    for what in ("cut", "its header damaged", "another kind of file", "empty", "deleted"):
        for component in ("adapter", "transformer", "vae"):
            made.append(
                row("models", f"{what}", f"file of the {component}", "refused", models.damaged_file(component, what))
            )
    return made

"""What a network's passes take at least on a GPU, on paper: kernels, matrix operations and bytes of every operation, by a roofline.

An operation takes the longer of two times: its matrix operations at the data sheet's bf16 speed, and the bytes it reads and writes at
the data sheet's bandwidth. "Fused" joins every run of operations between two matrix products into one kernel that reads what comes
from outside and writes what is used later: the most that a compiler can do without changing the products. Launches, waits and
whatever a real kernel loses are left out, so no time here is reached; what is reached is a part of the share that stands here.

The networks have their true size and no storage (torch's meta device). Writes the table of docs/models.md.
Run: python benchmarks/roofline.py [--write] [model] [device] [latents]
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models import memory
from gpobench.bench.models.open import pipeline_class

sys.path.insert(0, str(Path(__file__).parent))
from marked_section import DOCS, MarkedSection

BANDWIDTH = {"h200": 4.8e12, "h100": 3.35e12, "a100": 2.039e12}  # bytes a second, data sheets
# Operations that move nothing: they make a view, or storage that another one fills.
FREE = ("view", "reshape", "transpose", "permute", "expand", "slice", "select", "split", "chunk", "squeeze", "unsqueeze", "t", "detach",
        "alias", "empty", "unbind", "as_strided", "_unsafe_view", "lift_fresh", "new_empty", "empty_like", "split_with_sizes")  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One kernel: what it reads and writes, by identity and bytes, and its matrix operations."""

    inputs: dict[int, float]
    outputs: dict[int, float]
    flops: float

    @property
    def bytes(self) -> float:
        return sum(self.inputs.values()) + sum(self.outputs.values())


@dataclass
class Trace(TorchDispatchMode):
    """Lists the kernels of what runs inside."""

    operations: list[Operation] = field(default_factory=list[Operation])
    _alive: list[Tensor] = field(default_factory=list[Tensor])  # a freed storage's identity could be used again

    def __post_init__(self) -> None:
        super().__init__()

    def add(self, inputs: Any, outputs: Any, flops: float) -> None:
        """List one kernel."""
        sizes = [
            {_storage(t): float(t.numel() * t.element_size()) for t in _tensors(side)} for side in (inputs, outputs)
        ]
        self._alive += [*_tensors(inputs), *_tensors(outputs)]
        self.operations.append(Operation(sizes[0], sizes[1], flops))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in FREE:
            count = flop_registry.get(func.overloadpacket)
            self.add((args, kwargs), output, float(count(*args, **(kwargs or {}), out_val=output)) if count else 0.0)
        return output


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage()
    return storage._cdata


class Attention(torch.autograd.Function):
    """The fused attention of a GPU: one kernel forward (two products), one backward (five)."""

    trace: Trace | None = None

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        ctx.products = 2.0 * prod(q.shape) * k.shape[-2]  # one product of (L, D) by (D, L')
        if Attention.trace is not None:
            Attention.trace.add((q, k, v), out, 2 * ctx.products)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out = ctx.saved_tensors
        results = tuple(torch.empty_like(x) for x in (q, k, v))
        if Attention.trace is not None:
            Attention.trace.add((q, k, v, out, grads), results, 5 * ctx.products)
        return results


@contextmanager
def as_on_a_gpu(trace: Trace, dtype: torch.dtype) -> Generator[None]:
    """Inside the block torch casts as autocast does, attention is one kernel, and kernels are listed."""
    functional: Any = torch.nn.functional
    with memory._as_on_a_gpu(dtype):  # pyright: ignore[reportPrivateUsage]
        cast = functional.scaled_dot_product_attention
        functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: Attention.apply(
            q.to(dtype), k.to(dtype), v.to(dtype)
        )
        Attention.trace = trace
        try:
            with trace:
                yield
        finally:
            Attention.trace = None
            functional.scaled_dot_product_attention = cast


@dataclass(frozen=True)
class Roof:
    """The two speeds of a device."""

    flops: float
    bandwidth: float

    @classmethod
    def of(cls, device: str) -> Roof:
        return cls(memory.DEVICES[device] * 1e12, BANDWIDTH[device])

    def milliseconds(self, operations: Sequence[Operation]) -> float:
        return 1e3 * sum(max(o.flops / self.flops, o.bytes / self.bandwidth) for o in operations)

    def matrix_milliseconds(self, operations: Sequence[Operation]) -> float:
        return 1e3 * sum(o.flops for o in operations) / self.flops


def fuse(operations: Sequence[Operation]) -> list[Operation]:
    """Join each run of operations without matrix products into one kernel."""
    last_use = {key: k for k, o in enumerate(operations) for key in o.inputs}
    fused: list[Operation] = []
    run: list[int] = []

    def close() -> None:
        if not run:
            return
        inputs: dict[int, float] = {}
        outputs: dict[int, float] = {}
        for k in run:
            inputs |= {key: size for key, size in operations[k].inputs.items() if key not in outputs}
            outputs |= operations[k].outputs
        kept = {key: size for key, size in outputs.items() if last_use.get(key, len(operations)) > run[-1]}
        fused.append(Operation(inputs, kept, 0.0))
        run.clear()

    for k, operation in enumerate(operations):
        if operation.flops:
            close()
            fused.append(operation)
        else:
            run.append(k)
    close()
    return fused


def trace_passes(model: str, latents: int) -> dict[str, list[Operation]]:
    """The kernels of each kind of pass over so many latents at once, in bf16."""
    from peft import LoraConfig

    model_spec, dtype = find_model_spec(model), torch.bfloat16
    parts, _ = memory.blueprint(model_spec)
    case = memory._forward_case(model_spec, parts, model_spec.adapter, "bf16")  # pyright: ignore[reportPrivateUsage]
    network = memory._build(case.part, dtype).requires_grad_(False).eval()  # pyright: ignore[reportPrivateUsage]
    inputs = pipeline_class(model_spec).network_inputs(network.config, *case.size, dtype)
    inputs = {
        name: value.new_empty(latents, *value.shape[1:])
        if isinstance(value, Tensor) and value.shape[:1] == (1,)
        else value
        for name, value in inputs.items()
    }
    passes: dict[str, list[Operation]] = {}

    def run(name: str, backward: bool = False) -> None:
        trace = Trace()
        with as_on_a_gpu(trace, dtype), torch.set_grad_enabled(backward):
            output = network(**inputs, return_dict=False)[0]
            if backward:
                output.backward(torch.empty_like(output))
        passes[name] = trace.operations

    run("merged, or the base")
    adapter = model_spec.adapter
    network.add_adapter(LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets)))
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    run("LoRA live")
    run("LoRA, forward and backward", backward=True)
    passes["the same, checkpointed"] = [*passes["LoRA live"], *passes["LoRA, forward and backward"]]
    return passes


def table(model: str, device: str, latents: int) -> str:
    """The Markdown table."""
    roof = Roof.of(device)
    lines = [
        f"`{model}` on one {device.upper()} ({roof.flops / 1e12:g} TFLOP/s in bf16, {roof.bandwidth / 1e12:g} TB/s), "
        f"{latents} latents a pass, `python benchmarks/roofline.py {model} {device} {latents}`:",
        "",
        "| pass | kernels | matrix ms | all operations ms | share of the ceiling at most | kernels, fused | ms, fused | share, fused |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, operations in trace_passes(model, latents).items():
        fused, matrix = fuse(operations), roof.matrix_milliseconds(operations)
        eager, compiled = roof.milliseconds(operations), roof.milliseconds(fused)
        lines.append(
            f"| {name} | {len(operations):,} | {matrix:.3g} | {eager:.3g} | {100 * matrix / eager:.0f} % | {len(fused):,} "
            f"| {compiled:.3g} | {100 * matrix / compiled:.0f} % |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    write = "--write" in arguments
    words = [argument for argument in arguments if argument != "--write"] or ["sd35m", "h200", "16"]
    model, device, latents = words if len(words) == 3 else ("", "", "0")
    if device not in BANDWIDTH or not latents.isdigit() or int(latents) < 1:
        raise SystemExit(f"roofline: [--write] [model device latents], a device of {', '.join(BANDWIDTH)}")
    section = MarkedSection(DOCS / "models.md", "roofline", "<!-- end roofline -->")
    if write:
        section.check()
    text = table(model, device, int(latents))
    print(text)
    if write:
        section.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Source rules: find what a method's code must not use, from its syntax tree, without running it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator, Mapping

from ..spec import Model, PolicyModel

# Names that a method must not import or use, with everything below them where they are imported.
FORBIDDEN_NAMES = (
    "torch.optim torch.cuda torch.mps torch.device torch.load torch.save torch.manual_seed torch.Generator torch.seed "
    "torch.distributed torch.backends torch.nn.functional.dropout torch.dropout random secrets numpy.random os io sys pathlib "
    "shutil tempfile subprocess socket pickle threading multiprocessing diffusers transformers peft accelerate safetensors "
    "gpobench.methods gpobench.rewards gpobench.tasks gpobench.leaderboards gpobench.bench.models gpobench.bench.model_spec "
    "gpobench.bench.training.train gpobench.bench.training.checkpoint gpobench.bench.experiments.run gpobench.bench.models.lora "
    "gpobench.bench.budget.Meter gpobench.bench.budget.Budget"
).split()
RANDOM_DRAWS = {
    f"torch.{name}"
    for name in "rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like".split()
}
FORBIDDEN_ATTRIBUTES = set(
    "cuda cpu backward zero_grad manual_seed normal_ uniform_ random_ bernoulli_ exponential_ log_normal_ charge".split()
)
FORBIDDEN_BUILTINS = {"open", "exec", "eval", "compile", "input", "__import__"}
# Members of the model contract that differ between families.
FAMILY_ATTRIBUTES = {"name", "prediction"}
# Members of the model contract that mean the same in every family.
SHARED_ATTRIBUTES = {
    name for protocol in (PolicyModel, Model) for name in (*inspect.get_annotations(protocol), *vars(protocol))
} - FAMILY_ATTRIBUTES


def rule_violations(source: str, module: str) -> Iterator[str]:
    """Yield each violation in a method's source, with its line number. module: the dotted name that resolves relative imports."""
    tree = ast.parse(source)
    full_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for local_name, full_name, imported in _imports(node, module.rpartition(".")[0]):
                full_names[local_name] = full_name
                yield from _forbidden_name(imported, node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield from _name_violations(node, _dotted_name(node, full_names))
        elif isinstance(node, ast.Call):
            yield from _call_violations(node, full_names)


def _imports(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, str, str]]:
    """Yield (local name, the full name it stands for, the full name imported) of an import statement."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.partition(".")[0]
            yield alias.asname or top, alias.name if alias.asname else top, alias.name
        return
    origin = "." * node.level + (node.module or "")
    origin = importlib.util.resolve_name(origin, package) if node.level else origin
    for alias in node.names:
        yield alias.asname or alias.name, f"{origin}.{alias.name}", f"{origin}.{alias.name}"


def _name_violations(node: ast.Attribute | ast.Name, name: str) -> Iterator[str]:
    """Yield what is wrong with the use of a name; `name` is its full dotted name."""
    if isinstance(node, ast.Name):
        if name in FORBIDDEN_BUILTINS:
            yield f"line {node.lineno}: {name}"
        return
    yield from _forbidden_name(name, node)
    owner, _, leaf = name.rpartition(".")
    if leaf in FORBIDDEN_ATTRIBUTES:
        yield f"line {node.lineno}: .{leaf}"
    if owner.rpartition(".")[2] == "model" and leaf not in SHARED_ATTRIBUTES:
        yield f"line {node.lineno}: {name} tells one family of models from another"


def _call_violations(node: ast.Call, full_names: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with a call: randomness that is not the rig's, a test of the model's class, a device by name."""
    name = _dotted_name(node.func, full_names)
    options = {word.arg: word.value for word in node.keywords}
    generator = _dotted_name(options["generator"], full_names) if "generator" in options else ""
    if name in RANDOM_DRAWS and not generator.endswith(".rng"):
        yield f"line {node.lineno}: {name} draws randomness of its own, not the rig's"
    if name in ("isinstance", "type") and node.args and _dotted_name(node.args[0], full_names).endswith("model"):
        yield f"line {node.lineno}: {name} of a model"
    devices = [*(node.args if name.endswith(".to") else ()), *([options["device"]] if "device" in options else ())]
    if any(isinstance(device, ast.Constant) and isinstance(device.value, str) for device in devices):
        yield f"line {node.lineno}: a device by name"


def _forbidden_name(name: str, node: ast.AST) -> Iterator[str]:
    """Yield a violation where a name is forbidden; an import also where it lies below a forbidden name.

    An attribute must be equal, because a chain `a.b.c` is visited at each of its links.
    """
    imported = isinstance(node, ast.Import | ast.ImportFrom)
    if any(name == forbidden or (imported and name.startswith(forbidden + ".")) for forbidden in FORBIDDEN_NAMES):
        yield f"line {getattr(node, 'lineno', 0)}: {name}"


def _dotted_name(node: ast.AST, full_names: Mapping[str, str]) -> str:
    """Return `a.b.c` for a chain of attributes, its head replaced by the full name it was imported as; other heads are '?'."""
    if isinstance(node, ast.Name):
        return full_names.get(node.id, node.id)
    return f"{_dotted_name(node.value, full_names)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"

"""The method's view of the rig: an object with the members that `spec.Rig` names, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from ..spec import PolicyModel, Rig


def method_view(rig: Any) -> Rig:
    """The rig as a method gets it: every member of `spec.Rig`, with the model as `spec.PolicyModel`.

    It has no attribute beside these, none can be set, and it has no `__dict__`. What lies behind is reached through closures
    only, which the source rules of `gpobench check` refuse; what a method computes all the same, `observation` counts.
    """
    model = _restricted(PolicyModel, lambda: rig.model)
    return cast(Rig, _restricted(Rig, lambda: rig, model=model))


def _restricted(protocol: type, target: Callable[[], Any], **replaced: Any) -> Any:
    """An object with the public members of a protocol, each looked up on the target at every use.

    Args:
        protocol: names the members.
        target: returns the object that has them.
        replaced: properties that are something else than the target's own.
    """
    members = {
        name: _constant(replaced[name]) if name in replaced else _forwarded(name, member, target)
        for name, member in vars(protocol).items()
        if not name.startswith("_")
    }
    return type(protocol.__name__, (), {"__slots__": (), "__doc__": protocol.__doc__, **members})()


def _constant(value: Any) -> property:
    return property(lambda self: value)


def _forwarded(name: str, member: Any, target: Callable[[], Any]) -> Any:
    """A property or a method that does what the target's member of this name does."""
    if isinstance(member, property):
        return property(lambda self: getattr(target(), name), doc=member.__doc__)

    @wraps(member)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return getattr(target(), name)(*args, **options)

    return forward

"""What a model takes on devices that are not here: memory, collectives, and the speed at best.

The table of devices is looked up without jax, so that a wrong name is told at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qjax.planning.collectives import planned_collectives
    from qjax.planning.planner import Plan, plan

_HOMES = {"Plan": "planner", "plan": "planner", "planned_collectives": "collectives"}
__all__ = ["Plan", "plan", "planned_collectives"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
